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
import csv
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
import dedl
import models
from images import manifests, reading
from running import comparison, export, figures, prediction, process, runs
from running.process import InputError


def main(argv=None):
    args = parse_args(argv)
    for path in args.images or ():
        if (Path(path) / "config.json").is_file():
            raise InputError(f"--images {path}: is the folder of a run; name runs before --images")
    folders = args.runs or [runs.newest_run("best.pt")]
    # settings are chosen by a comparison: then the test rows stay unseen, unless one asks for them
    args.by_parts = len(folders) > 1 and not (args.split or args.data or args.tta)
    args.split = args.split or ("validation" if len(folders) > 1 else "test")
    for flag in ("save_masks", "save_probabilities", "images", "export"):
        if getattr(args, flag) and len(folders) > 1:
            raise InputError(f"--{flag.replace('_', '-')}: takes one run; name one")
    if args.images and args.data:
        raise InputError("--images: takes pictures in place of a data folder; leave --data out")
    if args.export and (args.images or args.data or args.save_masks or args.save_probabilities or args.tta
                        or args.channel):
        raise InputError("--export: writes the network alone; leave --images, --data, --save-..., --channel and "
                            "--tta out")
    compute = None if args.export else runs.choose_compute(args.device, args.amp)
    if compute:
        print(f"{compute.device}, {compute.precision()}", flush=True)
    measured, failed = [], []
    for run in folders:
        try:
            config = runs.read_config(run)
            measured.append((run, config, test(run, config, compute, args, brief=len(folders) > 1)))
        except (OSError, InputError) as error:
            if len(folders) == 1:
                raise
            print(f"{run}: left out: {error}", flush=True)
            failed.append(str(error))
    if len(folders) > 1:
        comparison.show(measured)
    if failed:
        raise InputError(f"{len(failed)} of {len(folders)} runs cannot be measured; {failed[0]}")


def test(run, config, compute, args, brief):
    """Measures a run, predicts new images by it, or exports it. Returns its scores; prints them, in one line if
    `brief`."""
    if args.export:
        return export.export_run(run, config, args.export)
    for flag in ("save_masks", "save_probabilities", "channel"):
        if config["task"] == "cls" and getattr(args, flag):
            raise InputError(f"--{flag.replace('_', '-')}: {run} is a classification; it has no masks")
    if args.images:
        return (predict_labels if config["task"] == "cls" else predict_masks)(run, config, compute, args)
    if config["task"] == "cls" and args.by_parts:
        return validation_scores(run, config)
    if config["task"] == "cls":
        return test_classification(run, config, compute, args, brief)
    return test_segmentation(run, config, compute, args, brief)


def parse_args(argv):
    parser = process.Parser(description=__doc__)
    add = parser.add_argument
    add("runs", nargs="*", type=Path, metavar="RUN", help="folders of trained runs [the newest in runs/]")
    add("--data", type=Path, help="data folder [the run's own]")
    add("--split", choices=manifests.SPLITS, help="[test; of several runs validation, of a cross-validation the "
        "validation parts of its folds]")
    add("--images", nargs="+", metavar="PATH", help="predict these images without truth: files, folders, "
        "or patterns like \"new/*.tif\"")
    add("--save-masks", type=Path, metavar="DIR", help="write predicted masks there, <image stem>.png, 0 and 255, and "
        "of --images predictions.csv [with --images: RUN/predictions]")
    add("--save-probabilities", type=Path, metavar="DIR", help="write the nucleus probability there, <image stem>.png, "
        "16 bits: 0 to 65535")
    add("--channel", help="pages of multi-page TIFFs, where they are named otherwise than in training [the run's]")
    add("--export", type=Path, metavar="FILE", help="write the network to FILE.pt2 (torch.export) or FILE.onnx")
    add("--tta", action="store_true", help="average over flips and turns of each image: eight times slower to segment, "
        "four times to classify (flips alone)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="[auto]")
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="mixed precision; auto: on a CPU bf16 "
        "if a convolution, timed at the start, is faster in it [auto]")
    return parser.parse_args(argv)


def find_split(config, args):
    """The data folder and its records of the split that is asked for. Raises InputError where there are none."""
    folder = args.data or Path(config["data"])
    records, _ = manifests.find_records(folder, config["seed"], task=config["task"],
                                   needs_validation=config.get("folds", 1) == 1)
    records = [record for record in records if record.split == args.split]
    if not records:
        raise InputError(f"{folder}: has no images of split {args.split}; choose another --split")
    return folder, records


def title(run, folder, args):
    return f"{run} on the {args.split} split of {folder}{', with --tta' if args.tta else ''}"


# --------------------------------------------------------------------------------------------------------- segmentation
def test_segmentation(run, config, compute, args, brief):
    """Predicts a split with a run's best network; prints and writes what it finds. Returns the scores."""
    # 1. the network, the images, where files go
    model = runs.load_best(run, models.build_segmenter, compute, config)
    folder, records = find_split(config, args)
    channels = channels_of(config, args)
    files = output_files(records, args)
    bar = process.progress(None, f"predicting {args.split}", "px", sum(reading.pixels_of(r.image) for r in records))

    # 2. predict and measure, as many images at a time as memory should hold
    counts, loss, masks = [], 0.0, []
    for part in data.read_in_parts(records, channels):
        fields = [usable(field, run, config) for field in part]
        of_part, mean_loss, found, maps = predict_part(run, model, fields, compute, args, bar)
        del part, fields  # large images and what is made of them are not in memory together
        save_part(found, maps, files[len(masks):])
        counts.append(of_part)
        loss += mean_loss * of_part.sum().item()
        masks += [np.packbits(mask.numpy(), 1) for mask in found]  # eight pixels a byte
        del found, maps
    bar.close()
    counts = torch.cat(counts)
    scores = {**dedl.segmentation_scores(counts), "cross_entropy": loss / counts.sum().item()}

    # 3. numbers, picture
    runs.save_json({**scores, "tta": args.tta, "split": args.split, "data": str(folder)}, run / f"{args.split}.json")
    ious = [dedl.image_iou(c) for c in counts]
    order = sorted(range(len(ious)), key=lambda i: -ious[i])
    shown = {}  # of few images one is several of these
    for name, i in (("best", order[0]), ("median", order[len(order) // 2]), ("worst", order[-1])):
        shown.setdefault(i, []).append(name)
    figures.save_sheet(((f"{', '.join(names)}: IoU {ious[i]:.3f}", manifests.read_field(records[i], channels, raw=True),
                          masks[i]) for i, names in shown.items()), run / f"{args.split}.png")
    if brief:
        print(f"{title(run, folder, args)}: IoU {scores['iou']:.4f}", flush=True)
        return scores
    print(title(run, folder, args))
    for name, value in scores.items():
        print(f"  {name:16} {value:.4f}" if isinstance(value, float) else f"  {name:16} {value}")
    return scores


def channels_of(config, args):
    """The names of the stains to look for. Raises InputError."""
    return reading.channel_names(args.channel) if args.channel else \
        data.stains(reading.channel_names(config["channel"]), tuple(config["channels"]))


def usable(field, run, config):
    """The field. Raises the InputError that reading it ended in, or InputError where it has not the run's channels."""
    if isinstance(field, InputError):
        raise field
    channels = config["setting"]["in_channels"]
    if len(field.image) != channels:
        raise InputError(f"{field.record.image}: has {len(field.image)} channels; {run} was trained on {channels}")
    return field


def predict_part(run, model, fields, compute, args, bar):
    """What prediction.evaluate gives for some fields; and, if they are asked for, probability maps, uint16 (H, W).
    Raises InputError where the network gives no numbers."""
    maps = [np.empty(field.shape, np.uint16) if args.save_probabilities else None for field in fields]

    def seen(indices, rows, logits):
        bar.update(logits[:, 0].numel())
        if not logits.isfinite().all():
            image = fields[indices[0]].record.image
            raise InputError(f"{run}: its network gives no numbers for {image}; use --amp off")
        if args.save_probabilities:
            probabilities = (logits.softmax(1)[:, 1] * 65535).round().cpu().numpy()           # (N, rows, W)
            for i, probability in zip(indices, probabilities):
                maps[i][rows] = probability

    return *prediction.evaluate(model, fields, compute, tta=args.tta, seen=seen), maps


def save_part(masks, maps, files):
    """Writes masks and maps where output_files has it."""
    for mask, probability, (of_mask, of_map) in zip(masks, maps, files):
        if of_mask:
            save_png(mask.numpy().view(np.uint8) * np.uint8(255), of_mask)
        if of_map:
            save_png(probability, of_map)


def save_png(array, file):
    with process.replacing(file) as handle:
        Image.fromarray(array).save(handle, "PNG")


def output_files(records, args, earlier=()):
    """For each record where its mask and its probability map go, DIR/<image stem>.png of the flags' DIRs; None without
    one. earlier: images whose masks are there. Makes the folders. InputError if two images' would be one file, or
    one might overwrite data."""
    inputs = {path.resolve().parent for record in records for path in (record.image, record.mask) if path}
    if args.save_masks and args.save_probabilities and args.save_masks.resolve() == args.save_probabilities.resolve():
        raise InputError(f"--save-probabilities {args.save_probabilities}: is the folder of the masks; give another")
    columns = []
    for flag, folder in (("--save-masks", args.save_masks), ("--save-probabilities", args.save_probabilities)):
        if folder and folder.resolve() in inputs:
            raise InputError(f"{flag} {folder}: holds images or masks of the data; give another folder")
        files = [folder and folder / f"{record.image.stem}.png" for record in records]
        owners = {folder / f"{Path(image).stem}.png": image for image in earlier} if flag == "--save-masks" else {}
        for file, record in zip(files if folder else (), records):
            if owners.setdefault(file, os.path.abspath(record.image)) != os.path.abspath(record.image):
                raise InputError(f"{'--images' if args.images else flag}: {owners[file]} and {record.image} would "
                                    f"both go into {file}; give them to two commands, each with its --save-masks")
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        columns.append(files)
    return list(zip(*columns))


def read_table(file, header):
    """{image: row} of a predictions.csv with this header that earlier calls wrote, {} where there is none. Raises
    InputError, so that no other table is overwritten."""
    if not file.is_file():
        return {}
    rows = [row for _, row in manifests.read_csv(file, header, ",".join(header))]
    if list(rows[0]) != header:
        raise InputError(f"{file}: has other columns than {', '.join(header)}; move it away")
    return {row["image"]: list(row.values()) for row in rows}


def predict_masks(run, config, compute, args):
    """Predicts images without truth: into RUN/predictions or --save-masks DIR their masks and a table, predictions.csv,
    of nucleus area and count, to which later calls add. Images that cannot be read are left out and named at the end;
    then InputError is raised."""
    records = [manifests.Record(path, "test", name=os.path.abspath(path)) for path in data.find_images(args.images)]
    args.save_masks = args.save_masks or run / "predictions"
    table, header = args.save_masks / "predictions.csv", ["image", "height", "width", "nucleus_area_fraction", "nuclei"]
    rows = read_table(table, header)
    file_of = dict(zip((record.image for record in records), output_files(records, args, earlier=rows)))
    model = runs.load_best(run, models.build_segmenter, compute, config)
    bar = process.progress(None, "predicting", "px", sum(reading.pixels_of(record.image) for record in records))
    finished, unreadable = 0, []
    try:
        # fewer at a time than are measured: the masks of all that are finished are there after an interruption
        for part in data.read_in_parts(records, channels_of(config, args), data.PART_PIXELS // 8):
            fields, mask = [], None  # there may be none
            for field in part:
                try:
                    fields.append(usable(field, run, config))
                except InputError as error:
                    unreadable.append(str(error))
            _, _, masks, maps = predict_part(run, model, fields, compute, args, bar)
            done = [field.record for field in fields]
            del part, field, fields  # as above
            save_part(masks, maps, [file_of[record.image] for record in done])
            for record, mask in zip(done, masks):  # Tensor.sum would make a copy of eight bytes a pixel
                area = np.count_nonzero(mask) / mask.numel()
                rows[record.name] = [record.name, *mask.shape, f"{area:.6f}", prediction.count_nuclei(mask)]
                finished += 1
            del masks, maps, mask
    except KeyboardInterrupt as stop:
        raise type(stop)(f"interrupted; {finished} of {len(records)} images are in {table}") from None
    finally:
        bar.close()
        if finished:
            with process.replacing(table, "w", newline="") as handle:
                csv.writer(handle).writerows([header, *rows.values()])
    if finished:
        print(f"{table}: {finished} images, their masks beside it"
              + (f", probabilities in {args.save_probabilities}" if args.save_probabilities else "")
              + (f"; {len(rows) - finished} more are there" if len(rows) > finished else ""))
    refuse_unreadable(unreadable, records)


def refuse_unreadable(unreadable, records):
    """Says which images could not be read, and raises InputError if there is one."""
    if unreadable:
        print(*unreadable[1:], sep="\n", end="\n" * (len(unreadable) > 1))  # the first follows
        raise InputError(f"--images: {len(unreadable)} of {len(records)} cannot be predicted; {unreadable[0]}")


# ------------------------------------------------------------------------------------------------------- classification
COLUMNS = {"f1_micro": "micro F1", "precision_micro": "precision", "recall_micro": "recall", "f1_macro": "macro F1",
           "precision_macro": "precision", "recall_macro": "recall", "f1_macro_present": "F1 present",
           "subset_accuracy": "all right"}  # of the printed table


def test_classification(run, config, compute, args, brief):
    """Measures each fold and their ensemble on a split; prints and writes what it finds. Returns the ensemble's
    scores."""
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
    prediction.save_probabilities(run / f"{args.split}.csv", records, classes, ensemble, with_labels=True)
    figures.save_labels(records, ensemble.numpy(), labelled.truth.numpy(), classes, run / f"{args.split}.png")

    # 4. the same numbers in print
    if brief:
        print(f"{title(run, folder, args)}: micro F1 {at_half['f1_micro']:.4f} of {len(folds)} folds", flush=True)
        return {**at_half, "folds": len(folds)}
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
    return {**at_half, "folds": len(folds)}


def predict_by_folds(run, config, shown, compute, args):
    """{fold: probabilities (N, classes) of the shown pictures by its best network} of the folds in a run's folder.
    Raises InputError, also where one is of another run."""
    found = {}
    for fold, folder in runs.fold_folders(run).items():  # one network at a time in memory
        model = runs.load_best(folder, models.build_classifier, compute, config)
        bar = partial(process.progress, what=f"predicting, fold {fold}", unit="batch")
        found[fold] = prediction.classify(model, shown, compute, flips=args.tta, progress=bar).sigmoid()
        if not found[fold].isfinite().all():
            raise InputError(f"{folder}: its network gives no numbers for some images; use --amp off")
    return found


def validation_parts(run, classes):
    """Probabilities and truth (images, classes) of the validation parts of all folds put together. Raises InputError
    where an image is in two of them: then the folds are not of one cross-validation."""
    parts = [prediction.load_probabilities(folder / "validation.csv", classes)
             for folder in runs.fold_folders(run).values()]
    images = [image for part, _, _ in parts for image in part]
    if len(set(images)) < len(images):
        twice = next(image for image in images if images.count(image) > 1)
        raise InputError(f"{run}: {twice} is in the validation part of two folds; they are not of one run")
    return torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts])


def validation_scores(run, config):
    """Scores of a cross-validation on all of its training images, each as the fold saw it that did not train on it."""
    probabilities, truth = validation_parts(run, config["classes"])
    scores = dedl.classification_scores(probabilities > 0.5, truth, config["classes"])
    folds = len(runs.fold_folders(run))
    print(f"{run} on the validation parts of its {folds} folds: micro F1 {scores['f1_micro']:.4f}", flush=True)
    return {**scores, "folds": folds}


def predict_labels(run, config, compute, args):
    """Writes the ensemble's probabilities for pictures without truth to RUN/predictions.csv, to which later calls add.
    Pictures that cannot be read are left out and named at the end; then InputError is raised."""
    earlier = read_table(run / "predictions.csv", ["image", *config["classes"]])
    records = [manifests.Record(path, "test", name=os.path.abspath(path)) for path in data.find_images(args.images)]
    found = data.PicturesOnDisk(records, config["image_size"], models.interpolation(config["model"]))
    shown, readable, unreadable = [], [], []
    for i, record in enumerate(process.progress(records, "reading")):
        try:
            shown.append(found[i])                                                                      # (3, S, S)
            readable.append(record)
        except InputError as error:
            unreadable.append(str(error))
    if readable:
        folds = list(predict_by_folds(run, config, shown, compute, args).values())
        prediction.save_probabilities(run / "predictions.csv", readable, config["classes"], torch.stack(folds).mean(0),
                                      earlier=earlier)
        print(f"{run / 'predictions.csv'}: {len(readable)} images, mean probabilities of {len(folds)} folds")
    refuse_unreadable(unreadable, records)


if __name__ == "__main__":
    process.command(main)
