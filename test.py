"""Measures trained runs on images they have not seen, or predicts new ones.

    python test.py                             the newest run, on the test split of its data folder
    python test.py runs/*                      these runs on their validation rows, and a table that compares them
    python test.py RUN --tta                   the mean prediction over flips (and, to segment, turns)
    python test.py RUN --save-masks DIR        segmentation: the predicted masks too, one PNG an image
    python test.py RUN --images "new/*.tif"    images without truth: predictions.csv, to segment with masks beside it
    python test.py RUN --export FILE           its network as FILE.pt2 or FILE.onnx, to be used without this project

Each run's folder gets test.json (the printed numbers) and test.png: of a segmentation the best, median and worst image
with contours, of a classification images with their true labels and those found. Whole images are measured, of any
size: predicted by tiles that overlap, put together, every pixel counted once. A cross-validation is measured fold by
fold and as the ensemble of its folds, their mean probability.
"""
import os
from argparse import Namespace
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
from running.process import InputError, progress


def main(argv: list | None = None) -> None:
    args = parse_args(argv)
    folders = args.runs or [runs.newest_run("best.pt")]
    # settings are chosen by a comparison: then the test rows stay unseen, unless one asks for them
    args.by_parts = len(folders) > 1 and not (args.split or args.data or args.tta)
    args.split = args.split or ("validation" if len(folders) > 1 else "test")
    if args.export:
        return export.export_run(folders[0], runs.read_config(folders[0]), args.export)
    compute = choose_compute(args.device, args.amp)
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
    add("--save-masks", type=Path, metavar="DIR", help="write predicted masks there, <image stem>.png, 0 and 255, and "
        "of --images predictions.csv [with --images: RUN/predictions]")
    add("--save-probabilities", type=Path, metavar="DIR", help="write the nucleus probability there, <image stem>.png, "
        "16 bits: 0 to 65535")
    add("--channel", help="pages of multi-page TIFFs, where they are named otherwise than in training [the run's]")
    add("--export", type=Path, metavar="FILE", help="write the network to FILE.pt2 (torch.export) or FILE.onnx")
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
    others = (args.images, args.data, args.save_masks, args.save_probabilities, args.tta, args.channel)
    if args.export and any(others):
        parser.error("argument --export: writes the network alone; leave --images, --data, --save-..., --channel and "
                     "--tta out")
    return args


def test(
    run: Path,
    config: dict,
    compute: Compute,
    args: Namespace,
    brief: bool,
) -> dict | None:
    """Measure a run, or predict new images by it. Return its scores; print them, in one line if `brief`."""
    if config["task"] == "seg":
        if args.images:
            return predict_masks(run, config, compute, args)
        return test_segmentation(run, config, compute, args, brief)
    if args.save_masks or args.save_probabilities or args.channel:
        raise InputError(f"{run}: is a classification; it takes no --save-masks, --save-probabilities or --channel")
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
def test_segmentation(
    run: Path,
    config: dict,
    compute: Compute,
    args: Namespace,
    brief: bool,
) -> dict:
    """Predict a split by a run's best network; print and write what is found. Return the scores."""
    # 1. the network, the images, where files go
    model = runs.load_best(run, models.build_segmenter, compute, config)
    folder, records = find_split(config, args)
    files = output_files(records, args)
    fields = data.read_fields(records, channels_of(config, args), f"{args.split} images")
    check_channels(fields[0], run, config)

    # 2. predict and measure
    counts, _, probabilities = prediction.evaluate(fast.for_inference(model), fields, compute, tta=args.tta)
    masks = [probability > 0.5 for probability in probabilities]
    for record, mask, probability in zip(records, masks, probabilities):
        save_prediction(mask, probability, *files[record.image])
    scores = dedl.segmentation_scores(counts)

    # 3. numbers, a figure
    runs.save_json({**scores, "tta": args.tta, "split": args.split, "data": str(folder)}, run / f"{args.split}.json")
    ious = [dedl.image_iou(c) for c in counts]
    order = sorted(range(len(ious)), key=ious.__getitem__)
    shown = {"best": order[-1], "median": order[len(order) // 2], "worst": order[0]}
    rows = [(f"{name}: IoU {ious[i]:.3f}", fields[i], masks[i]) for name, i in shown.items()]
    figures.save_samples(rows, run / f"{args.split}.png")
    if brief:
        print(f"{title(run, folder, args)}: IoU {scores['iou']:.4f}")
        return scores
    print(title(run, folder, args))
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


def save_prediction(
    mask: torch.Tensor,
    probability: torch.Tensor,
    mask_file: Path | None,
    probability_file: Path | None,
) -> None:
    """Write a mask (H, W) and the probability of the nucleus (H, W), each where a file is given."""
    if mask_file:
        save_png(mask.numpy().astype(np.uint8) * 255, mask_file)
    if probability_file:
        save_png((probability * 65535).round().numpy().astype(np.uint16), probability_file)


def save_png(array, file):
    with process.replacing(file) as handle:
        Image.fromarray(array).save(handle, "PNG")


def output_files(records: list, args: Namespace, earlier=()) -> dict:
    """Return {image: [file of its mask, file of its probability]}, DIR/<image stem>.png of the flags' DIRs or None, and
    make these folders. earlier: images whose masks are there. Raises InputError if two images would go into one file,
    or one might overwrite data."""
    inputs = {path.resolve().parent for record in records for path in (record.image, record.mask) if path}
    folders = (args.save_masks, args.save_probabilities)
    for folder in filter(None, folders):
        if folder.resolve() in inputs:
            raise InputError(f"--save-masks or --save-probabilities {folder}: holds images or masks already; give "
                             f"another folder")
        inputs.add(folder.resolve())
    owners = {Path(image).stem: image for image in earlier}
    files = {}
    for record in records:
        stem = record.image.stem
        files[record.image] = [folder and folder / f"{stem}.png" for folder in folders]
        path = os.path.abspath(record.image)
        other = owners.setdefault(stem, path)
        if other != path and any(folders):
            raise InputError(f"{other} and {path} would both go into {stem}.png; give them to two commands, each with "
                             f"a folder of its own")
    for folder in filter(None, folders):
        folder.mkdir(parents=True, exist_ok=True)
    return files


def read_table(file: Path, header: list) -> dict:
    """Return {image: row} of a table with this header that earlier calls wrote, {} where there is none. Raises
    InputError for other tables."""
    if not file.is_file():
        return {}
    rows = [row for _, row in manifests.read_csv(file, header, ",".join(header))]
    if list(rows[0]) != header:
        raise InputError(f"{file}: has other columns than {', '.join(header)}; move it away")
    return {row["image"]: list(row.values()) for row in rows}


def predict_masks(run: Path, config: dict, compute: Compute, args: Namespace) -> None:
    """Predict images without truth, one after another: into RUN/predictions or --save-masks DIR their masks and a
    table, predictions.csv, of nucleus area and count, to which later calls add. Images that cannot be read are
    named at the end; then InputError is raised."""
    records = new_records(args)
    args.save_masks = args.save_masks or run / "predictions"
    table = args.save_masks / "predictions.csv"
    header = ["image", "height", "width", "nucleus_area_fraction", "nuclei"]
    rows = read_table(table, header)
    files = output_files(records, args, earlier=rows)
    model = fast.for_inference(runs.load_best(run, models.build_segmenter, compute, config))
    finished = 0
    unreadable = []
    try:
        for record in progress(records, "predicting"):
            try:
                field = manifests.read_field(record, channels_of(config, args))
                check_channels(field, run, config)
            except InputError as error:
                unreadable.append(str(error))
                continue
            probability, = prediction.predict(model, [field], compute, args.tta)
            mask = probability > 0.5
            save_prediction(mask, probability, *files[record.image])
            area = np.count_nonzero(mask) / mask.numel()
            rows[record.name] = [record.name, *mask.shape, f"{area:.6f}", nuclei.connected_parts(mask).max().item()]
            finished += 1
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {finished} of {len(records)} images are in {table}") from None
    finally:
        if finished:
            process.save_csv(table, header, rows.values())
    if finished:
        print(f"{table}: {finished} images, their masks beside it; {len(rows)} in all")
    refuse_unreadable(unreadable, records)


def new_records(args: Namespace) -> list:
    """Return records of the images that --images names, without a truth."""
    return [Record(path, "test", name=os.path.abspath(path)) for path in data.find_images(args.images)]


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


def test_classification(
    run: Path,
    config: dict,
    compute: Compute,
    args: Namespace,
    brief: bool,
) -> dict:
    """Measure each fold and their ensemble on a split; print and write what is found. Return the ensemble's scores."""
    # 1. probabilities of the folds and of their ensemble
    folder, records = find_split(config, args)
    classes = config["classes"]
    interpolation = encoders.interpolation(config["model"])
    labelled = data.read_labelled(records, classes, config["image_size"], interpolation, f"{args.split} images")
    of_fold = predict_by_folds(run, config, labelled.images, compute, args)                    # {fold: (N, classes)}
    ensemble = torch.stack(list(of_fold.values())).mean(0)

    # 2. scores; beside them those of guesses that look at no image
    def scores_of(found):
        return dedl.classification_scores(found.expand(labelled.truth.shape), labelled.truth, classes)

    folds = {f"fold{number}": scores_of(probabilities > 0.5) for number, probabilities in of_fold.items()}
    table = torch.tensor([[scores[name] for name in COLUMNS] for scores in folds.values()], dtype=torch.float64)
    at_half = scores_of(ensemble > 0.5)
    commonest = torch.arange(len(classes)) == labelled.truth.sum(0).argmax()
    guesses = {
        "commonest label": scores_of(commonest),
        "all labels": scores_of(torch.ones_like(commonest)),
    }

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
    if brief:
        print(f"{title(run, folder, args)}: micro F1 {at_half['f1_micro']:.4f} of {len(folds)} folds")
    else:
        print(f"{title(run, folder, args)}: {len(records)} images, {len(folds)} of {config['folds']} folds")
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


def predict_by_folds(run: Path, config: dict, images, compute: Compute, args: Namespace) -> dict:
    """Return {fold: probabilities (N, classes) of the images by its best network} of the folds in a run's folder."""
    found = {}
    for number, folder in runs.fold_folders(run).items():  # one network at a time in memory
        model = runs.load_best(folder, models.build_classifier, compute, config)
        found[number] = prediction.classify(model, images, compute, flips=args.tta).sigmoid()
    return found


def validation_scores(run: Path, config: dict) -> dict:
    """Return the scores of a cross-validation on all of its training images, each as the fold saw it that did not train
    on it."""
    parts = []
    for folder in runs.fold_folders(run).values():
        file = folder / "best.pt"
        checkpoint = runs.load_checkpoint(file, "validation")
        runs.check_setting(file, checkpoint, {"classes": config["classes"]})
        parts.append(checkpoint["validation"])
    probabilities = torch.cat([part["probabilities"] for part in parts])
    truth = torch.cat([part["truth"] for part in parts])
    scores = dedl.classification_scores(probabilities > 0.5, truth, config["classes"])
    print(f"{run} on the validation parts of its {len(parts)} folds: micro F1 {scores['f1_micro']:.4f}")
    return {**scores, "folds": len(parts)}


def predict_labels(run: Path, config: dict, compute: Compute, args: Namespace) -> None:
    """Write the ensemble's probabilities for images without truth to RUN/predictions.csv, to which later calls add.
    Images that cannot be read are named at the end; then InputError is raised."""
    table = run / "predictions.csv"
    header = ["image", *config["classes"]]
    rows = read_table(table, header)
    records = new_records(args)
    on_disk = data.ImagesOnDisk(records, config["image_size"], encoders.interpolation(config["model"]))
    images = {}
    unreadable = []
    for i, record in enumerate(progress(records, "reading")):
        try:
            images[record.name] = on_disk[i]                                                            # (3, S, S)
        except InputError as error:
            unreadable.append(str(error))
    if images:
        folds = list(predict_by_folds(run, config, list(images.values()), compute, args).values())
        for name, probabilities in zip(images, torch.stack(folds).mean(0).tolist()):
            rows[name] = [name, *(f"{p:.6f}" for p in probabilities)]
        process.save_csv(table, header, rows.values())
        print(f"{table}: {len(images)} images, mean probabilities of {len(folds)} folds; {len(rows)} in all")
    refuse_unreadable(unreadable, records)


if __name__ == "__main__":
    process.command(main, less_memory="take smaller images, or --amp bf16")
