"""Measures trained runs on images they have not seen, or predicts new ones.

    python test.py                             the newest run, on the test split of its data folder
    python test.py runs/*                      these runs on their validation rows, and a table that compares them
    python test.py RUN --tta                   the mean prediction over flips (and, to segment, turns)
    python test.py RUN --save-masks DIR        segmentation: masks, label images and outlines too, of each image
    python test.py RUN --images "new/*.tif"    images without truth: the same, and tables of images and of nuclei
    python test.py RUN --export FILE           its network as FILE.pt2, to be used without this project

Each run's folder gets test.json (the printed numbers) and test.png: of a segmentation the best, median and worst image
with contours, of a classification images with their true labels and those found. Whole images are measured, of any
size: predicted by tiles that overlap, put together, every pixel counted once. A cross-validation is measured fold by
fold and as the ensemble of its folds, their mean probability.
"""
import os
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
import dedl
import models
from images import manifests, reading
from images.manifests import Record
from networks import encoders, fast
from running import comparison, export, figures, nuclei, prediction, process, runs
from running.compute import PRECISIONS, Compute, choose_compute
from running.process import InputError, note, progress

# flags of segmentations alone, with their defaults
OF_NUCLEI = {"save_masks": None, "save_probabilities": None, "channel": None, "ring": 0, "rois": False, "scale": 1.0}


def main(argv: list | None = None) -> None:
    args = parse_args(argv)
    folders = args.runs or [runs.newest_run("best.pt")]
    # settings are chosen by a comparison: then the test rows stay unseen, unless one asks for them
    args.by_parts = len(folders) > 1 and not (args.split or args.data or args.tta)
    args.split = args.split or ("validation" if len(folders) > 1 else "test")
    if args.export:
        return export.export_run(folders[0], runs.read_config(folders[0]), args.export)
    compute = choose_compute(args.device, args.amp, 1 << 27)  # maps of a large image are given back
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
    add("--data", type=Path, help="data folder [the run's own]")
    add("--split", choices=manifests.SPLITS, help="[test; of several runs validation, of a cross-validation the "
        "validation parts of its folds]")
    add("--images", nargs="+", metavar="PATH", help="predict these images without truth: files, folders, or patterns "
        "like \"new/*.tif\"")
    add("--save-masks", type=Path, metavar="DIR", help="write there, for each image, <stem>.png (the mask, 0 "
        "and 255), <stem>_labels.tif (nuclei), <stem>_overlay.png, and of --images predictions.csv and nuclei.csv "
        "[with --images: RUN/predictions]")
    add("--save-probabilities", type=Path, metavar="DIR", help="write the nucleus probability there, <image stem>.png, "
        "16 bits: 0 to 65535")
    add("--channel", help="pages of multi-page TIFFs, where they are named otherwise than in training [the run's]")
    add("--ring", type=process.number(int, 0, 1000), default=0, metavar="N", help="in nuclei.csv also the means in a "
        "ring of N pixels around each nucleus, as a stand-in for its cell [0: none]")
    add("--rois", action="store_true", help="write <stem>_RoiSet.zip for ImageJ too; needs roifile")
    add("--scale", type=process.number(float, 0.05, 20), default=1.0, metavar="S", help="enlarge images by S before "
        "they are predicted, where nuclei or pixels are of another size than in training; what is written has their "
        "own size [1]")
    add("--export", type=Path, metavar="FILE", help="write the network to FILE.pt2 (torch.export)")
    add("--tta", action="store_true", help="average over flips and turns of each image: eight times slower to segment, "
        "four times to classify (flips alone)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="[auto]")
    add("--amp", choices=["auto", *PRECISIONS], default="auto", help="mixed precision; auto: on a CPU bf16 if a "
        "convolution, timed at the start, is faster in it [auto]")
    args = parser.parse_args(argv)
    for path in args.images or ():
        if (Path(path) / "config.json").is_file():
            parser.error(f"argument --images: {path} is the folder of a run; name runs before --images")
    for flag in ("save_masks", "save_probabilities", "images", "export"):
        if getattr(args, flag) and len(args.runs) > 1:
            parser.error(f"argument --{flag.replace('_', '-')}: takes one run; name one")
    if args.images and args.data:
        parser.error("argument --images: takes the place of a data folder; leave --data out")
    if not args.images and (args.ring or args.rois and not args.save_masks):
        parser.error("argument --ring or --rois: is for what --images writes; name images (--rois: or --save-masks)")
    if args.export and (args.images or args.data or args.tta or flags_of_nuclei(args)):
        parser.error("argument --export: writes the network alone; leave --images, --data, --save-..., --channel and "
                     "--tta out")
    return args


def flags_of_nuclei(args: Namespace) -> list:
    """Return the flags given that only a segmentation takes."""
    return [f"--{name.replace('_', '-')}" for name, default in OF_NUCLEI.items() if getattr(args, name) != default]


def test(run: Path, config: dict, compute: Compute, args: Namespace, brief: bool) -> dict | None:
    """Measure a run, or predict new images by it. Return its scores; print them, in one line if `brief`."""
    if config["task"] == "seg":
        if args.images:
            return predict_masks(run, config, compute, args)
        return test_segmentation(run, config, compute, args, brief)
    if flags := flags_of_nuclei(args):
        raise InputError(f"{run}: is a classification; it takes no {', '.join(flags)}")
    if args.images:
        return predict_labels(run, config, compute, args)
    if args.by_parts:
        return validation_scores(run, config)
    return test_classification(run, config, compute, args, brief)


def find_split(config: dict, args: Namespace) -> tuple:
    """Return the data folder and its records of the split that is asked for. Raises InputError where there are none."""
    folder = args.data or Path(config["data"])
    needs_validation = config.get("folds", 1) == 1
    records, _ = manifests.find_records(folder, config["seed"], task=config["task"], needs_validation=needs_validation)
    records = [record for record in records if record.split == args.split]
    if not records:
        raise InputError(f"{folder}: has no images of split {args.split}; choose another --split")
    return folder, records


def title(run: Path, folder: Path, args: Namespace) -> str:
    return f"{run} on the {args.split} split of {folder}{', with --tta' if args.tta else ''}"


# --------------------------------------------------------------------------------------------------------- segmentation
def test_segmentation(run: Path, config: dict, compute: Compute, args: Namespace, brief: bool) -> dict:
    """Predict a split by a run's best network; print and write what is found. Return the scores."""
    # 1. the network, the images, where files go
    model = runs.load_best(run, models.build_segmenter, compute)
    folder, records = find_split(config, args)
    names = output_names(records, args)
    fields = data.read_fields(records, channels_of(config, args), f"{args.split} images")
    check_channels(fields[0], run, config)

    # 2. predict and measure
    model = fast.for_inference(model)
    counts, _, probabilities = prediction.evaluate(model, fields, compute, tta=args.tta, scale=args.scale)
    found = []
    for field, own in zip(fields, probabilities):
        mask, cores = nuclei.mask_and_cores(own)
        found.append(nuclei.separate(mask, cores, config["nucleus"], args.scale))
        name = names[field.record.image]
        save_nuclei(mask, found[-1], figures.overview(field), field.record, name, args)
        save_probability(own, name, args)
    scores = dedl.segmentation_scores(counts)
    if any(field.labelled for field in fields):
        scores |= nuclei.scores(found, fields)

    # 3. numbers, a figure
    runs.save_json({**scores, "tta": args.tta, "split": args.split, "data": str(folder)}, run / f"{args.split}.json")
    ious = [dedl.image_iou(c) for c in counts]
    order = sorted(range(len(ious)), key=ious.__getitem__)
    shown = {"best": order[-1], "median": order[len(order) // 2], "worst": order[0]}
    rows = [(f"{name}: IoU {ious[i]:.3f}", fields[i], found[i]) for name, i in shown.items()]
    figures.save_samples(rows, run / f"{args.split}.png")
    print(f"{title(run, folder, args)}: IoU {scores['iou']:.4f}")
    if not brief:
        for name, value in scores.items():
            print(f"  {name:16} {value:.4f}" if isinstance(value, float) else f"  {name:16} {value}")
    return scores


def channels_of(config: dict, args: Namespace) -> tuple:
    """Return the names of the stains to look for."""
    if args.channel:
        return reading.channel_names(args.channel)
    return data.stains(reading.channel_names(config["channel"]), tuple(config["channels"]))


def check_channels(field: manifests.Field, run: Path, config: dict) -> None:
    """Raise InputError where an image does not have the run's number of channels."""
    channels = config["setting"]["in_channels"]
    if len(field.image) != channels:
        raise InputError(f"{field.record.image}: has {len(field.image)} channels; {run} was trained on {channels}")


def save_nuclei(mask: torch.Tensor, labels: torch.Tensor, view: torch.Tensor, record: Record, name: str,
                args: Namespace) -> None:
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


def save_probability(probabilities: torch.Tensor, name: str, args: Namespace) -> None:
    """Write the probability of the mask, the sum of those of its classes (classes - 1, H, W), under this name in
    --save-probabilities, if it is given."""
    if args.save_probabilities:
        values = (probabilities.sum(0) * 65535).round().numpy().astype(np.uint16)
        save_png(values, args.save_probabilities / f"{name}.png")


def save_png(array, file):
    with process.replacing(file) as handle:
        Image.fromarray(array).save(handle, "PNG")


def output_names(records: list, args: Namespace, earlier=()) -> dict:
    """Return {image: how its files are called}: its stem or, where several images have it, FOLDER_STEM; and make the
    folders of --save-masks and --save-probabilities. earlier: images whose files are there. Raises InputError if two
    images would go into one file, or one might overwrite data."""
    inputs = {path.resolve().parent for record in records for path in (record.image, record.mask) if path}
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


def predict_masks(run: Path, config: dict, compute: Compute, args: Namespace) -> None:
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
    model = fast.for_inference(runs.load_best(run, models.build_segmenter, compute))
    images = {}    # {name: columns of predictions.csv}
    measured = {}  # {name: columns of nuclei.csv}
    unreadable = []

    # 2. image by image
    try:
        for record in progress(records, "predicting"):
            name = names[record.image]
            try:
                field = manifests.read_field(record, channels_of(config, args))
                check_channels(field, run, config)
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


def new_records(args: Namespace) -> list:
    """Return records of the images that --images names, each once, without a truth."""
    paths = dict.fromkeys(map(os.path.abspath, data.find_images(args.images)))
    return [Record(Path(path), "test", name=path) for path in paths]


def refuse_unreadable(unreadable: list, records: list) -> None:
    """Print which images could not be read, and raise InputError if there is one."""
    for line in unreadable[1:]:  # the first follows
        print(line)
    if unreadable:
        raise InputError(f"--images: {len(unreadable)} of {len(records)} cannot be predicted; {unreadable[0]}")


# ------------------------------------------------------------------------------------------------------- classification
COLUMNS = {  # of the printed table
    "f1_micro": "micro F1",
    "precision_micro": "precision",
    "recall_micro": "recall",
    "f1_macro": "macro F1",
    "precision_macro": "precision",
    "recall_macro": "recall",
    "subset_accuracy": "all right",
}


def test_classification(run: Path, config: dict, compute: Compute, args: Namespace, brief: bool) -> dict:
    """Measure each fold and their ensemble on a split; print and write what is found. Return the ensemble's scores."""
    # 1. probabilities of the folds and of their ensemble
    folder, records = find_split(config, args)
    classes = config["classes"]
    interpolation = encoders.interpolation(config["model"])
    labelled = data.read_labelled(records, classes, config["image_size"], interpolation, f"{args.split} images")
    of_fold = predict_by_folds(run, labelled.images, compute, args)                            # {fold: (N, classes)}
    ensemble = torch.stack(list(of_fold.values())).mean(0)

    # 2. scores; beside them those of guesses that look at no image
    def scores_of(found):
        return dedl.classification_scores(found.expand(labelled.truth.shape), labelled.truth, classes)

    folds = {f"fold{number}": scores_of(probabilities > 0.5) for number, probabilities in of_fold.items()}
    table = torch.tensor([[scores[name] for name in COLUMNS] for scores in folds.values()], dtype=torch.float64)
    at_half = scores_of(ensemble > 0.5)
    commonest = torch.arange(len(classes)) == labelled.truth.sum(0).argmax()
    guesses = {"commonest label": scores_of(commonest), "all labels": scores_of(torch.ones_like(commonest))}

    # 3. files: the ensemble's scores stand at the top level, as a segmentation's do
    measured = {
        **at_half,
        "ensemble": at_half,
        "folds": folds,
        "mean": dict(zip(COLUMNS, table.mean(0).tolist())),
        "std": dict(zip(COLUMNS, table.std(0).tolist())) if len(folds) > 1 else None,  # one fold alone has none
        "guesses": guesses,
        "tta": args.tta,
        "split": args.split,
        "data": str(folder),
    }
    runs.save_json(measured, run / f"{args.split}.json")
    prediction.save_labels(run / f"{args.split}.csv", records, classes, ensemble)
    figures.save_labels(records, ensemble.numpy(), labelled.truth.numpy(), classes, run / f"{args.split}.png")
    print(f"{title(run, folder, args)}: micro F1 {at_half['f1_micro']:.4f} of {len(records)} images by {len(folds)} of "
          f"{config['folds']} folds")
    if not brief:
        print_scores(measured)
    return {**at_half, "folds": len(folds)}


def print_scores(measured: dict) -> None:
    """Print the tables of what test_classification measured."""
    rows = {**measured["folds"], "mean": measured["mean"]}
    if measured["std"]:
        rows["std"] = measured["std"]
    rows["ensemble"] = measured["ensemble"]
    rows |= {f"guess {name}": scores for name, scores in measured["guesses"].items()}
    print(f"{'':23}" + "".join(f"{name:>11}" for name in COLUMNS.values()))
    for name, scores in rows.items():
        print(f"  {name:21}" + "".join(f"{scores[column]:11.4f}" for column in COLUMNS))
    print("  ensemble, by class          F1  precision     recall    support")
    for name, row in measured["per_class"].items():
        print(f"    {name:19.19}{row['f1']:11.4f}{row['precision']:11.4f}{row['recall']:11.4f}{row['support']:11d}")


def predict_by_folds(run: Path, images, compute: Compute, args: Namespace) -> dict:
    """Return {fold: probabilities (N, classes) of the images by its best network} of the folds in a run's folder."""
    found = {}
    for number, folder in runs.fold_folders(run).items():  # one network at a time in memory
        model = runs.load_best(folder, models.build_classifier, compute)
        found[number] = prediction.classify(model, images, compute, flips=args.tta).sigmoid()
    return found


def validation_scores(run: Path, config: dict) -> dict:
    """Return the scores of a cross-validation on all of its training images, each as the fold saw it that did not train
    on it."""
    parts = []
    for folder in runs.fold_folders(run).values():
        parts.append(runs.load_checkpoint(folder / "best.pt", "validation")["validation"])
    probabilities = torch.cat([part["probabilities"] for part in parts])
    truth = torch.cat([part["truth"] for part in parts])
    scores = dedl.classification_scores(probabilities > 0.5, truth, config["classes"])
    print(f"{run} on the validation parts of its {len(parts)} folds: micro F1 {scores['f1_micro']:.4f}")
    return {**scores, "folds": len(parts)}


def predict_labels(run: Path, config: dict, compute: Compute, args: Namespace) -> None:
    """Write the ensemble's probabilities for images without truth to RUN/predictions.csv, to which later calls add.
    Images that cannot be read are named at the end; then InputError is raised."""
    table = run / "predictions.csv"
    records = new_records(args)
    interpolation = encoders.interpolation(config["model"])
    images = {}
    unreadable = []
    for record in progress(records, "reading"):
        try:
            images[record.name] = data.read_square(record, config["image_size"], interpolation)         # (3, S, S)
        except InputError as error:
            unreadable.append(str(error))
    if images:
        folds = list(predict_by_folds(run, list(images.values()), compute, args).values())
        ensemble = torch.stack(folds).mean(0)[:, :, None].tolist()
        rows = {name: dict(zip(config["classes"], own)) for name, own in zip(images, ensemble)}
        prediction.save_rows(table, rows)
        print(f"{table}: {len(images)} images, mean probabilities of {len(folds)} folds")
    refuse_unreadable(unreadable, records)


if __name__ == "__main__":
    process.command(main, less_memory="take smaller images, or --amp bf16")
