"""Measures trained runs on images they have not seen, or predicts new ones.

    python test.py                             the newest run, on the test split of its data folder
    python test.py RUN [RUN ...]               these runs
    python test.py RUN --tta                   the mean prediction over flips (and, to segment, turns)
    python test.py RUN --save-masks DIR        segmentation: the predicted masks too, one PNG an image
    python test.py RUN --images PATH ...       classification: pictures without truth, into RUN/predictions.csv
    python test.py RUN --export FILE           its network as FILE.pt2 or FILE.onnx, to be used without this project

Each run's folder gets test.json (the printed numbers) and test.png: of a segmentation the best, median and worst image
with contours, of a classification images with their true labels and those found. Whole images are measured: predicted
by tiles, put together, every pixel counted once. A cross-validation is measured fold by fold and as the ensemble of its
folds, their mean probability.
"""
import math
from functools import partial
from pathlib import Path

import torch
from PIL import Image

import data
import dedl
import export
import models
import pictures
import process
import reading
import runs


def main(argv=None):
    args = parse_args(argv)
    for path in args.images or ():
        if (Path(path) / "config.json").is_file():
            raise runs.RunError(f"--images {path}: is the folder of a run; name runs before --images")
    folders = args.runs or [runs.newest_run("best.pt")]
    if args.save_masks and len(folders) > 1:
        raise runs.RunError("--save-masks: takes one run, else their masks would overwrite each other")
    if args.images and (args.data or args.save_masks or len(folders) > 1):
        raise runs.RunError("--images: takes pictures in place of a data folder, and one run; leave the others out")
    if args.export and (args.images or args.data or args.save_masks or args.tta or len(folders) > 1):
        raise runs.RunError("--export: takes one run, and no --images, --data, --save-masks or --tta beside it")
    compute = runs.choose_compute(args.device, args.amp)
    for run in folders:
        config = runs.read_config(run)
        if config["task"] == "seg" and args.images:
            raise runs.RunError(f"--images: {run} is a segmentation; only classifications can do that so far")
        if config["task"] == "cls" and args.save_masks:
            raise runs.RunError(f"--save-masks: {run} is a classification; it has no masks")
        if args.export:
            export.export_run(run, config, args.export)
        elif args.images:
            predict_labels(run, config, compute, args)
        elif config["task"] == "seg":
            test_segmentation(run, config, compute, args)
        else:
            test_classification(run, config, compute, args)


def parse_args(argv):
    parser = process.Parser(description=__doc__)
    add = parser.add_argument
    add("runs", nargs="*", type=Path, metavar="RUN", help="folders of trained runs [the newest in runs/]")
    add("--data", type=Path, help="data folder [the run's own]")
    add("--split", choices=data.SPLITS, default="test", help="[test]")
    add("--save-masks", type=Path, metavar="DIR", help="write predicted masks there, <image stem>.png, 0 and 255")
    add("--images", nargs="+", metavar="PATH", help="predict these pictures, or those in these folders")
    add("--export", type=Path, metavar="FILE", help="write the network to FILE.pt2 (torch.export) or FILE.onnx")
    add("--tta", action="store_true", help="average over flips and turns of each image: eight times slower to segment, "
        "four times to classify (flips alone)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="[auto]")
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="mixed precision [auto]")
    return parser.parse_args(argv)


def find_split(config, args):
    """The data folder and its records of the split that is asked for. Raises RunError where there are none."""
    folder = args.data or Path(config["data"])
    records, _ = data.find_records(folder, config["seed"], task=config["task"],
                                   needs_validation=config.get("folds", 1) == 1)
    records = [record for record in records if record.split == args.split]
    if not records:
        raise runs.RunError(f"{folder}: has no images of split {args.split}; choose another --split")
    return folder, records


def title(run, folder, args):
    return f"{run} on the {args.split} split of {folder}{', with --tta' if args.tta else ''}"


# --------------------------------------------------------------------------------------------------------- segmentation
def test_segmentation(run, config, compute, args):
    """Predicts a split with a run's best network; prints and writes what it finds."""
    # 1. the network and the images
    model = runs.load_best(run, models.build_segmenter, compute, config)
    folder, records = find_split(config, args)
    files = mask_files(records, args.save_masks) if args.save_masks else []
    fields = data.read_fields(records, reading.channel_names(config["channel"]), f"{args.split} images")
    channels = config["setting"]["in_channels"]
    if len(fields[0].image) != channels:
        raise runs.RunError(f"{records[0].image}: has {len(fields[0].image)} channels; {run} was trained on {channels}")

    # 2. predict and measure
    bar = partial(process.progress, what=f"predicting {args.split}", unit="batch")
    counts, loss, masks = runs.evaluate(model, fields, compute, progress=bar,
                                        predict=runs.predict_eight_ways if args.tta else runs.predict)
    if not math.isfinite(loss):
        raise runs.RunError(f"{run}: its network gives no numbers for the {args.split} images; use --amp off")
    scores = {**dedl.segmentation_scores(counts), "cross_entropy": loss}

    # 3. numbers, picture, masks
    runs.save_json({**scores, "tta": args.tta, "split": args.split, "data": str(folder)}, run / f"{args.split}.json")
    pictures.save_sheet(fields, masks, [dedl.image_iou(c) for c in counts], run / f"{args.split}.png")
    for file, mask in zip(files, masks):
        Image.fromarray(mask.numpy().astype("uint8") * 255).save(file)
    print(title(run, folder, args))
    for name, value in scores.items():
        print(f"  {name:16} {value:.4f}" if isinstance(value, float) else f"  {name:16} {value}")


def mask_files(records, folder):
    """Where the predicted masks go: folder/<image stem>.png. Raises RunError if one would overwrite another file."""
    files = [folder / f"{record.image.stem}.png" for record in records]
    inputs = {path.resolve() for record in records for path in (record.image, record.mask)}
    for i, file in enumerate(files):
        if file in files[:i]:
            raise runs.RunError(f"--save-masks: two images are named {file.stem}; their masks would be one file")
        if file.resolve() in inputs:
            raise runs.RunError(f"--save-masks {folder}: would overwrite {file.name} of the data; give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    return files


# ------------------------------------------------------------------------------------------------------- classification
COLUMNS = {"f1_micro": "micro F1", "precision_micro": "precision", "recall_micro": "recall", "f1_macro": "macro F1",
           "precision_macro": "precision", "recall_macro": "recall", "f1_macro_present": "F1 present",
           "subset_accuracy": "all right"}  # of the printed table


def test_classification(run, config, compute, args):
    """Measures each fold and their ensemble on a split; prints and writes what it finds."""
    # 1. probabilities of the folds and of their ensemble
    folder, records = find_split(config, args)
    classes = config["classes"]
    labelled = data.read_labelled(records, classes, config["image_size"], models.interpolation(config["model"]),
                                  f"{args.split} images")
    of_fold = predict_by_folds(run, config, labelled.pictures, compute, args)                      # (N, classes) each
    ensemble = torch.stack(list(of_fold.values())).mean(0)

    # 2. scores at 0.5; beside them at the thresholds that the validation parts of all folds together choose; and what
    # comes of guesses that look at no picture
    val_probabilities, val_truth = validation_parts(run, classes)
    thresholds = dedl.best_thresholds(val_probabilities, val_truth)
    commonest = torch.arange(len(classes)) == val_truth.sum(0).argmax()
    guesses = {name: dedl.classification_scores(guess.expand(labelled.truth.shape), labelled.truth, classes)
               for name, guess in (("commonest label", commonest), ("all labels", torch.ones_like(commonest)))}
    folds = {f"fold{number}": dedl.classification_scores(p > 0.5, labelled.truth, classes)
             for number, p in of_fold.items()}
    at_half = dedl.classification_scores(ensemble > 0.5, labelled.truth, classes)
    tuned = dedl.classification_scores(ensemble > torch.tensor(thresholds), labelled.truth, classes)
    table = torch.tensor([[scores[name] for name in COLUMNS] for scores in folds.values()], dtype=torch.float64)
    mean = dict(zip(COLUMNS, table.mean(0).tolist()))
    deviation = dict(zip(COLUMNS, table.std(0).tolist())) if len(folds) > 1 else None  # one fold alone has none

    # 3. files: the ensemble's scores stand at the top level, as a segmentation's do
    runs.save_json({**at_half, "ensemble": at_half, "folds": folds, "mean": mean, "std": deviation,
                    "thresholds": dict(zip(classes, thresholds)), "ensemble_at_thresholds": tuned, "guesses": guesses,
                    "tta": args.tta, "split": args.split, "data": str(folder)}, run / f"{args.split}.json")
    runs.save_probabilities(run / f"{args.split}.csv", records, classes, ensemble, with_labels=True)
    pictures.save_labels(records, ensemble.numpy(), labelled.truth.numpy(), classes, run / f"{args.split}.png")

    # 4. the same numbers in print
    print(f"{title(run, folder, args)}: {len(records)} images, {len(folds)} of {config['folds']} folds")
    epochs = {}  # shown, since a fold may not be finished; killed in its first it has no metrics.csv yet
    for fold, folder in runs.fold_folders(run).items():
        file = folder / "metrics.csv"
        epochs[f"fold{fold}"] = len(file.read_text(errors="replace").splitlines()) - 1 if file.is_file() else 1
    rows = {**{f"{fold}, {epochs[fold]} epochs": scores for fold, scores in folds.items()}, "mean": mean,
            **({"std": deviation} if deviation else {}), "ensemble": at_half, "at thresholds": tuned,
            **{f"guess {name}": scores for name, scores in guesses.items()}}
    print(f"{'':23}" + "".join(f"{name:>11}" for name in COLUMNS.values()))
    for name, scores in rows.items():
        print(f"  {name:21}" + "".join(f"{scores[column]:11.4f}" for column in COLUMNS))
    print("  ensemble, by class          F1  precision     recall    support  threshold   F1 there")
    for name, threshold in zip(classes, thresholds):
        row = at_half["per_class"][name]
        print(f"    {name:19.19}{row['f1']:11.4f}{row['precision']:11.4f}{row['recall']:11.4f}{row['support']:11d}"
              f"{threshold:11.3f}{tuned['per_class'][name]['f1']:11.4f}")


def predict_by_folds(run, config, shown, compute, args):
    """{fold: probabilities (N, classes) of the shown pictures by its best network} of the folds in a run's folder.
    Raises RunError, also where one is of another run."""
    found = {}
    for fold, folder in runs.fold_folders(run).items():  # one network at a time in memory
        model = runs.load_best(folder, models.build_classifier, compute, config)
        bar = partial(process.progress, what=f"predicting, fold {fold}", unit="batch")
        found[fold] = runs.classify(model, shown, compute, flips=args.tta, progress=bar).sigmoid()
        if not found[fold].isfinite().all():
            raise runs.RunError(f"{folder}: its network gives no numbers for some images; use --amp off")
    return found


def validation_parts(run, classes):
    """Probabilities and truth (images, classes) of the validation parts of all folds put together. Raises RunError
    where an image is in two of them: then the folds are not of one cross-validation."""
    parts = [runs.load_probabilities(folder / "validation.csv", classes) for folder in runs.fold_folders(run).values()]
    images = [image for part, _, _ in parts for image in part]
    if len(set(images)) < len(images):
        twice = next(image for image in images if images.count(image) > 1)
        raise runs.RunError(f"{run}: {twice} is in the validation part of two folds; they are not of one run")
    return torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts])


def predict_labels(run, config, compute, args):
    """Writes the ensemble's probabilities for pictures without truth to RUN/predictions.csv. Pictures that cannot be
    read are left out and named at the end; then RunError is raised."""
    records = [data.Record(path, "test", name=str(path)) for path in data.find_images(args.images)]
    found = data.PicturesOnDisk(records, config["image_size"], models.interpolation(config["model"]))
    shown, readable, unreadable = [], [], []
    for i, record in enumerate(process.progress(records, "reading")):
        try:
            shown.append(found[i])                                                                      # (3, S, S)
            readable.append(record)
        except data.DataError as error:
            unreadable.append(str(error))
    if readable:
        folds = list(predict_by_folds(run, config, shown, compute, args).values())
        runs.save_probabilities(run / "predictions.csv", readable, config["classes"], torch.stack(folds).mean(0))
        print(f"{run / 'predictions.csv'}: {len(readable)} images, mean probabilities of {len(folds)} folds")
    if unreadable:
        print(*unreadable, sep="\n")
        raise runs.RunError(f"--images: {len(unreadable)} of {len(records)} cannot be read; "
                            f"{unreadable[0]}")


if __name__ == "__main__":
    runs.command(main)
