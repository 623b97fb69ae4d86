"""Measures trained runs on images they have not seen, or predicts new ones.

    python test.py                             the newest run, on the test split of its data folder
    python test.py runs/*                      these runs on their validation rows, and a table that compares them
    python test.py RUN --tta                   the mean prediction over flips (and, to segment, turns)
    python test.py RUN --save-masks DIR        segmentation: masks, label images and outlines too, of each image
    python test.py RUN --images "new/*.tif"    images without truth: the same, and tables of images and of nuclei
    python test.py RUN --export FILE           its network as FILE.pt2, to be used without this project

Each run's folder gets test.json (the printed numbers), test.csv (a row an image, of a segmentation the worst first) and
test.png: of a segmentation the best, median and worst image with contours, of a classification images with their true
labels and those found. Whole images are measured, of any
size: predicted by tiles that overlap, put together, every pixel counted once. A cross-validation is measured fold by
fold and as the ensemble of its folds, their mean probability.
"""
import os
from argparse import Namespace
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
import dedl
from images import manifests, reading
from images.manifests import Field, Record
from networks import encoders
from running import comparison, export, figures, nuclei, prediction, process, runs
from running.compute import Compute, add_compute, choose_compute
from running.process import InputError, note, progress
from running.settings import digest

KEPT_MEMORY = 1 << 27  # maps of a large image are given back
# flags of segmentations alone, with their defaults
OF_NUCLEI = {"save_masks": None, "save_probabilities": None, "channel": None, "ring": 0, "rois": False,
             "geojson": False, "scale": 1.0}


def main(argv: list | None = None) -> None:
    args = parse_args(argv)
    folders = args.runs or [runs.newest_run("best.pt")]
    # settings are chosen by a comparison: then the test rows stay unseen, unless one asks for them
    args.by_parts = len(folders) > 1 and not (args.split or args.data or args.tta or flags_of_nuclei(args))
    args.split = args.split or ("validation" if len(folders) > 1 else "test")
    if args.export:
        return export.export_run(folders[0], runs.read_config(folders[0]), args.export)
    compute = choose_compute(args.device, args.amp, KEPT_MEMORY)
    print(compute)
    measured = []
    failed = []
    for run in folders:
        try:
            config = runs.read_config(run)
            measured.append((run, config, test(run, config, compute, args, brief=len(folders) > 1)))
        except (OSError, InputError) as error:
            if len(folders) == 1:
                raise
            print(f"{run}: left out: {error}")
            failed.append(str(error))
    if len(folders) > 1:
        comparison.show(measured)
    if failed:
        raise InputError(f"{len(failed)} of {len(folders)} runs cannot be measured; {failed[0]}")


def parse_args(argv: list | None) -> Namespace:
    parser = process.Parser(description=__doc__)
    add = parser.add_argument
    add("runs", nargs="*", type=Path, metavar="RUN", help="folders of trained runs [the newest in runs/]")
    what = parser.add_mutually_exclusive_group().add_argument
    what("--images", nargs="+", metavar="PATH",
         help="predict these images without truth: files, folders, or patterns like \"new/*.tif\"")
    what("--data", type=Path, help="data folder [the run's own]")
    add("--split", choices=manifests.SPLITS,
        help="[test; of several runs validation, of a cross-validation the validation parts of its folds]")
    add("--save-masks", type=Path, metavar="DIR",
        help="write there, for each image, <stem>.png (the mask, 0 and 255), <stem>_labels.tif (nuclei), "
             "<stem>_overlay.png, and of --images predictions.csv and nuclei.csv [with --images: RUN/predictions]")
    add = parser.add_argument_group("finer settings").add_argument
    add("--tta", action="store_true",
        help="average over flips and turns of each image: eight times slower to segment, four times to classify "
             "(flips alone)")
    add("--scale", type=process.number(float, 0.05, 20), default=1.0, metavar="S",
        help="enlarge images by S before they are predicted, where nuclei or pixels are of another size than in "
             "training; what is written has their own size [1]")
    add("--channel", help="pages of multi-page TIFFs, where they are named otherwise than in training [the run's]")
    add("--ring", type=process.number(int, 0, 1000), default=0, metavar="N",
        help="in nuclei.csv also the means in a ring of N pixels around each nucleus, as a stand-in for its cell [0]")
    add("--rois", action="store_true", help="write <stem>_RoiSet.zip for ImageJ too; needs roifile")
    add("--geojson", action="store_true", help="write <stem>.geojson for QuPath too")
    add("--save-probabilities", type=Path, metavar="DIR",
        help="write the nucleus probability there, <image stem>.png, 16 bits: 0 to 65535")
    add("--export", type=Path, metavar="FILE", help="write the network to FILE.pt2 (torch.export)")
    add_compute(add)
    args = parser.parse_args(argv)
    for path in args.images or ():
        if (Path(path) / "config.json").is_file():
            parser.error(f"argument --images: {path} is the folder of a run; name runs before --images")
    for flag in ("save_masks", "save_probabilities", "images", "export"):
        if getattr(args, flag) and len(args.runs) > 1:
            parser.error(f"argument --{flag.replace('_', '-')}: takes one run; name one")
    if not args.images and (args.ring or (args.rois or args.geojson) and not args.save_masks):
        parser.error("argument --ring, --rois or --geojson: is for what --images writes; name images (--rois, "
                     "--geojson: or --save-masks)")
    if args.export and (args.images or args.data or args.tta or flags_of_nuclei(args)):
        parser.error("argument --export: writes the network alone; leave --images, --data, --save-..., --channel and "
                     "--tta out")
    return args


def flags_of_nuclei(args):
    """Return the flags given that only a segmentation takes."""
    return [f"--{name.replace('_', '-')}" for name, default in OF_NUCLEI.items() if getattr(args, name) != default]


def test(run, config, compute, args, brief):
    """Measure a run, or predict new images by it. Return its scores; print them, in one line if `brief`."""
    if args.by_parts and config["folds"] > 1:
        return validation_scores(run, config)
    if config["task"] == "seg":
        if args.images:
            return predict_masks(run, config, compute, args)
        return test_segmentation(run, config, compute, args, brief)
    if flags := flags_of_nuclei(args):
        raise InputError(f"{run}: is a classification; it takes no {', '.join(flags)}")
    if args.images:
        return predict_labels(run, config, compute, args)
    return test_classification(run, config, compute, args, brief)


def find_split(config, args):
    """Return the data folder and its records of the split that is asked for. Raises InputError where there are none."""
    folder = args.data or Path(config["data"])
    needs_validation = config["folds"] == 1
    records, lines = manifests.find_records(folder, config["seed"], None, config["task"], needs_validation)
    print(*lines, sep="\n")
    if not args.data and digest(records) != config["rows"]:
        note(["its images or their splits have changed since the training, which may have seen images of this split"])
    records = [record for record in records if record.split == args.split]
    if not records:
        raise InputError(f"{folder}: has no images of split {args.split}; choose another --split")
    return folder, records


def title(run, folder, args):
    return f"{run} on the {args.split} split of {folder}{', with --tta' if args.tta else ''}"


# -------------------------------------------------------------------------------------------------------- in a notebook
@dataclass
class Loaded:
    """A run that is ready to predict: its config.json and its network, of several folds their ensemble."""
    config: dict
    network: torch.nn.Module
    compute: Compute


def load(run: Path | str, device: str = "auto", amp: str = "auto") -> Loaded:
    """Load a run, for several calls of segment or classify. device and amp: as the flags. Raises InputError, and
    OSError where there is no run."""
    compute = choose_compute(device, amp, KEPT_MEMORY)
    config = runs.read_config(Path(run))
    *_, network = runs.load_networks(Path(run), config, compute).values()
    return Loaded(config, network, compute)


def segment(run: Loaded | Path | str, image: np.ndarray, tta: bool = False, scale: float = 1.0) -> np.ndarray:
    """Return the nuclei in an image: a label image (H, W) int32, 0 background, 1, 2, ... the nuclei.

    run: a run's folder, or what load gave of it. image: (H, W), (C, H, W) or, of colours, (H, W, 3), of any type and
    range, as it is in its file, with the stains that the run was trained on, in their order. tta, scale: as the flags.
    Raises InputError where the channels are not as many.
    """
    loaded = run if isinstance(run, Loaded) else load(run)
    image = reading.as_channels(image)
    field = Field(Record(Path("the image"), "test"), image, (), reading.find_limits(image))
    check_channels(field, loaded.config)
    probabilities = prediction.predict(loaded.network, field, loaded.compute, tta, scale)
    return nuclei.separate(*nuclei.mask_and_cores(probabilities), loaded.config["nucleus"], scale).numpy()


def classify(run: Loaded | Path | str, image: np.ndarray) -> dict:
    """Return {class: probability} of an image (H, W), (3, H, W) or (H, W, 3), of any type. run: as for segment."""
    loaded = run if isinstance(run, Loaded) else load(run)
    config = loaded.config
    rgb = reading.as_rgb(reading.as_channels(image))
    interpolation = encoders.interpolation(config["model"], config["recipe"])
    image = data.square(rgb, config["image_size"], interpolation)                                         # (3, S, S)
    logits = prediction.classify(loaded.network, image[None], loaded.compute)[0]                          # (classes,)
    return dict(zip(config["classes"], logits.sigmoid().tolist()))


# --------------------------------------------------------------------------------------------------------- segmentation
def test_segmentation(run, config, compute, args, brief):
    """Predict a split by a run's best network, or those of its folds and their ensemble; print and write what is found.
    Return the scores."""
    # 1. the images, where files go
    folder, records = find_split(config, args)
    names = output_names(records, args)
    fields = data.read_fields(records, channels_of(config, args), f"{args.split} images")
    check_channels(fields[0], config)
    objects = any(field.labelled for field in fields)

    # 2. predict and measure; the last network is the run's
    of_networks = {}
    for name, network in runs.load_networks(run, config, compute).items():
        measured = prediction.measure(network, fields, config["nucleus"], compute, None, args.tta, args.scale)
        of_networks[name] = measured.scores if objects else dedl.segmentation_scores(measured.counts)
    scores = of_networks.pop(name)
    for field, own, labels in zip(fields, measured.probabilities, measured.found):
        mask, _ = nuclei.mask_and_cores(own)
        save_nuclei(mask, labels, figures.overview(field), field.record, names[field.record.image], args)
        save_probability(own, names[field.record.image], args)

    # 3. numbers, a row an image, the worst first, a figure
    folds = {"ensemble": scores, **over_folds(of_networks, scores)} if of_networks else {}
    saved = {**scores, **folds, "tta": args.tta, "split": args.split, "data": str(folder)}
    runs.save_json(saved, run / f"{args.split}.json")
    ious = [dedl.image_iou(c) for c in measured.counts]
    order = sorted(range(len(ious)), key=ious.__getitem__)
    rows = []
    for i in order:
        _, found, true = measured.matched[i]
        rows.append((records[i].name, f"{ious[i]:.4f}", f"{dedl.image_ap50(measured.matched[i]):.4f}", true, found))
    process.save_csv(run / f"{args.split}.csv", ["image", "iou", "ap50", "nuclei", "found"], rows)
    shown = {"best": order[-1], "median": order[len(order) // 2], "worst": order[0]}
    samples = [(f"{name}: IoU {ious[i]:.3f}", fields[i], measured.found[i]) for name, i in shown.items()]
    figures.save_samples(samples, run / f"{args.split}.png")
    of_folds = f" by {len(of_networks) or 1} of {config['folds']} folds" if config["folds"] > 1 else ""
    print(f"{title(run, folder, args)}: IoU {scores['iou']:.4f}{of_folds}")
    if not brief:
        print_scores(saved, scores)
    return scores


def over_folds(folds, names):
    """Return what test.json has of the folds, {fold: scores}: also the mean and the standard deviation (n - 1) of those
    of these names, None of one fold."""
    table = torch.tensor([[scores[name] for name in names] for scores in folds.values()], dtype=torch.float64)
    return {
        "folds": folds,
        "mean": dict(zip(names, table.mean(0).tolist())),
        "std": dict(zip(names, table.std(0).tolist())) if len(folds) > 1 else None,
    }


def channels_of(config, args):
    """Return the names of the stains to look for."""
    if args.channel:
        return reading.channel_names(args.channel)
    return data.stains(config)


def check_channels(field, config):
    """Raise InputError where an image does not have the run's number of channels."""
    channels = config["setting"]["in_channels"]
    if len(field.image) != channels:
        raise InputError(f"{field.record.image}: has {len(field.image)} channels; the run was trained on {channels}")


def save_nuclei(mask, labels, view, record, name, args):
    """Write a mask (H, W), the nuclei in it (H, W) and a picture of their outlines, under this name in --save-masks, if
    it is given. view: what figures.overview gave."""
    if not args.save_masks:
        return
    folder = args.save_masks
    save_png(mask.numpy().astype(np.uint8) * 255, folder / f"{name}.png")
    nuclei.save_labels(labels, folder / f"{name}_labels.tif", reading.pixel_size(record.image))
    save_png(figures.overlay(view, labels), folder / f"{name}_overlay.png")
    if args.rois:
        nuclei.save_rois(labels, folder / f"{name}_RoiSet.zip")
    if args.geojson:
        nuclei.save_geojson(labels, folder / f"{name}.geojson")


def save_probability(probabilities, name, args):
    """Write the probability of the mask, the sum of those of its classes (classes - 1, H, W), under this name in
    --save-probabilities, if it is given."""
    if args.save_probabilities:
        values = (probabilities.sum(0) * 65535).round().numpy().astype(np.uint16)
        save_png(values, args.save_probabilities / f"{name}.png")


def save_png(array, file):
    with process.replacing(file) as handle:
        Image.fromarray(array).save(handle, "PNG")


def output_names(records, args, earlier=()):
    """Return {image: how its files are called}: its stem or, where several images have it, FOLDER_STEM; and make the
    folders of --save-masks and --save-probabilities. earlier: images whose files are there. Raises InputError if two
    images would go into one file, or one might overwrite data."""
    inputs = {path.resolve().parent for record in records
              for path in (record.image, record.mask, record.ignore) if path}
    for folder in filter(None, (args.save_masks, args.save_probabilities)):
        if folder.resolve() in inputs:
            raise InputError(f"--save-masks or --save-probabilities {folder}: holds images or masks already; give "
                             f"another folder")
        inputs.add(folder.resolve())
        folder.mkdir(parents=True, exist_ok=True)
    images = {*map(Path, earlier), *(record.image for record in records)}
    stems = Counter(image.stem for image in images)
    names = {}
    for image in images:
        names[image] = image.stem if stems[image.stem] == 1 else f"{image.parent.name}_{image.stem}"
    for name, number in Counter(names.values()).items():
        if number > 1 and (args.save_masks or args.save_probabilities):
            raise InputError(f"{number} images would go into {name}.png; rename one, or give them to two commands, "
                             f"each with a --save-masks of its own")
    return names


def predict_masks(run, config, compute, args):
    """Predict images without truth, one after another: into RUN/predictions or --save-masks DIR the files of
    save_nuclei and two tables, to which later calls add: predictions.csv, a row an image, and nuclei.csv, a row a
    nucleus. Images that cannot be read are named at the end; then InputError is raised."""
    # 1. the network, where files go
    records = new_records(args)
    args.save_masks = args.save_masks or run / "predictions"
    table = args.save_masks / "predictions.csv"
    table_of_nuclei = args.save_masks / "nuclei.csv"
    prediction.earlier_rows(table_of_nuclei)  # an unreadable one is reported now, not after hours
    names = output_names(records, args, [row["image"] for row in prediction.earlier_rows(table)])
    *_, model = runs.load_networks(run, config, compute).values()
    images = {}    # {name: columns of predictions.csv}
    measured = {}  # {name: columns of nuclei.csv}
    unreadable = []

    # 2. image by image
    try:
        for record in progress(records, "predicting"):
            name = names[record.image]
            try:
                field = manifests.read_field(record, channels_of(config, args))
                check_channels(field, config)
                view = figures.overview(field)
                probabilities = prediction.predict(model, field, compute, args.tta, args.scale)
                save_probability(probabilities, name, args)
                mask, cores = nuclei.mask_and_cores(probabilities)
                del field, probabilities  # a large image needs the memory
                labels = nuclei.separate(mask, cores, config["nucleus"], args.scale)
                columns = nuclei.measure(labels, record.image, args.ring)
            except InputError as error:
                unreadable.append(str(error))
                continue
            save_nuclei(mask, labels, view, record, name, args)
            measured[record.name] = columns
            images[record.name] = {
                "height": [mask.shape[0]],
                "width": [mask.shape[1]],
                "nucleus_area_fraction": [np.count_nonzero(mask) / mask.numel()],
                "nuclei": [labels.max().item()],
            }
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {len(images)} of {len(records)} images are in {table}") from None
    finally:
        if images:
            prediction.save_rows(table_of_nuclei, measured)
            prediction.save_rows(table, images)

    # 3. what was found
    if images:
        print(f"{table}: {len(images)} images, their nuclei in nuclei.csv beside it")
        note(nuclei.unlike_training(measured, config["nucleus"], args.scale))
    refuse_unreadable(unreadable, records)


def new_records(args):
    """Return records of the images that --images names, each once, without a truth."""
    paths = dict.fromkeys(map(os.path.abspath, data.find_images(args.images)))
    return [Record(Path(path), "test", name=path) for path in paths]


def refuse_unreadable(unreadable, records):
    """Print which images could not be read, and raise InputError if there is one."""
    for line in unreadable[1:]:  # the first follows
        print(line)
    if unreadable:
        raise InputError(f"--images: {len(unreadable)} of {len(records)} cannot be predicted; {unreadable[0]}")


# ------------------------------------------------------------------------------------------------------- classification
def test_classification(run, config, compute, args, brief):
    """Measure each fold and their ensemble on a split; print and write what is found. Return the ensemble's scores."""
    # 1. probabilities of the folds and of their ensemble
    folder, records = find_split(config, args)
    classes = config["classes"]
    interpolation = encoders.interpolation(config["model"], config["recipe"])
    labelled = data.read_labelled(records, classes, config["image_size"], interpolation, f"{args.split} images")
    networks = runs.load_networks(run, config, compute)
    networks.pop("ensemble", None)
    of_fold = {name: prediction.classify(network, labelled.images, compute, flips=args.tta).sigmoid()
               for name, network in networks.items()}                                      # {fold: (N, classes)}
    ensemble = torch.stack(list(of_fold.values())).mean(0)

    # 2. scores
    folds = {name: dedl.classification_scores(own > 0.5, labelled.truth, classes) for name, own in of_fold.items()}
    scores = dedl.classification_scores(ensemble > 0.5, labelled.truth, classes)
    names = [name for name, value in scores.items() if isinstance(value, float)]

    # 3. files: the ensemble's scores stand at the top level, as a segmentation's do
    saved = {
        **scores,
        "ensemble": scores,
        **over_folds(folds, names),
        "tta": args.tta,
        "split": args.split,
        "data": str(folder),
    }
    runs.save_json(saved, run / f"{args.split}.json")
    prediction.save_labels(run / f"{args.split}.csv", records, classes, ensemble)
    figures.save_labels(records, ensemble.numpy(), labelled.truth.numpy(), classes, run / f"{args.split}.png")
    print(f"{title(run, folder, args)}: micro F1 {scores['f1_micro']:.4f} of {len(records)} images by {len(folds)} of "
          f"{config['folds']} folds")
    if not brief:
        print_scores(saved, names)
        for name, row in scores["per_class"].items():
            print(f"    {name:19.19}", "  ".join(f"{score} {value:.4g}" for score, value in row.items()))
    return scores


def print_scores(saved, names):
    """Print those scores of test.json, beside them mean and deviation over the folds."""
    for name in names:
        value = saved[name]
        if isinstance(value, float):
            value = f"{value:.4f}"
            if saved.get("std"):
                value += f"    folds {saved['mean'][name]:.4f} ± {saved['std'][name]:.4f}"
        print(f"  {name:16} {value}")


def validation_scores(run, config):
    """Return the scores of a cross-validation on all of its training images, each as the fold saw it that did not train
    on it."""
    parts = [runs.load_checkpoint(folder / "best.pt", "validation")["validation"]
             for folder in runs.fold_folders(run).values()]
    first, second = ([part[name] for part in parts] for name in parts[0])
    if config["task"] == "seg":
        scores = dedl.segmentation_scores(torch.cat(first)) | dedl.nucleus_scores([*chain(*second)])
    else:
        scores = dedl.classification_scores(torch.cat(first) > 0.5, torch.cat(second), config["classes"])
    name = comparison.COLUMNS[config["task"]][0]
    print(f"{run} on the validation parts of its {len(parts)} folds: {name} {scores[name]:.4f}")
    return scores


def predict_labels(run, config, compute, args):
    """Write the ensemble's probabilities for images without truth to RUN/predictions.csv, to which later calls add.
    Images that cannot be read are named at the end; then InputError is raised."""
    table = run / "predictions.csv"
    records = new_records(args)
    interpolation = encoders.interpolation(config["model"], config["recipe"])
    images = {}
    unreadable = []
    for record in progress(records, "reading"):
        try:
            rgb = reading.read_rgb(record.image)
            images[record.name] = data.square(rgb, config["image_size"], interpolation)                 # (3, S, S)
        except InputError as error:
            unreadable.append(str(error))
    if images:
        *_, network = runs.load_networks(run, config, compute).values()
        squares = torch.stack(list(images.values()))                                                    # (N, 3, S, S)
        found = prediction.classify(network, squares, compute, flips=args.tta).sigmoid().tolist()
        rows = {}
        for name, own in zip(images, found):
            labels = prediction.labels_found(own, config["classes"])
            rows[name] = {"labels_found": [labels], **{of: [p] for of, p in zip(config["classes"], own)}}
        prediction.save_rows(table, rows)
        print(f"{table}: {len(images)} images, mean probabilities of the folds")
    refuse_unreadable(unreadable, records)


if __name__ == "__main__":
    process.command(main, less_memory="take smaller images, or --amp bf16")
