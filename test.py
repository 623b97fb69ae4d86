"""Measures trained runs on images they have not seen.

    python test.py                             the newest run, on the test split of its data folder
    python test.py RUN [RUN ...]               these runs
    python test.py RUN --save-masks DIR        the predicted masks too, one PNG an image
    python test.py RUN --tta                   the mean prediction over eight flips and turns

Each run's folder gets test.json (the printed numbers) and test.png (its best, median and worst image with contours).
Whole images are measured: predicted by tiles, put together, every pixel counted once.
"""
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import data
import dedl
import pictures
import runs


def main(argv=None):
    args = parse_args(argv)
    folders = args.runs or [runs.newest_run("best.pt")]
    if args.save_masks and len(folders) > 1:
        raise runs.RunError("--save-masks: takes one run, else their masks would overwrite each other")
    compute = runs.choose_compute(args.device, args.amp)
    for run in folders:
        scores = test_segmentation(run, compute, args)
        print(f"{run} on the {args.split} split of {scores['data']}{', with --tta' if args.tta else ''}")
        for name, value in scores.items():
            if name not in ("data", "split", "tta"):
                print(f"  {name:16} {value:.4f}" if isinstance(value, float) else f"  {name:16} {value}")


def parse_args(argv):
    parser = data.Parser(description=__doc__)
    add = parser.add_argument
    add("runs", nargs="*", type=Path, metavar="RUN", help="folders of trained runs [the newest in runs/]")
    add("--data", type=Path, help="data folder [the run's own]")
    add("--split", choices=data.SPLITS, default="test", help="[test]")
    add("--save-masks", type=Path, metavar="DIR", help="write predicted masks there, <image stem>.png, 0 and 255")
    add("--tta", action="store_true", help="average the eight flips and turns of each image: eight times slower")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="[auto]")
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="mixed precision [auto]")
    return parser.parse_args(argv)


def test_segmentation(run, compute, args):
    """Predicts a split with a run's best network and writes what it finds. Returns the scores."""
    # 1. the network and the images
    config, model = runs.load_run(run)
    model = model.to(compute.device, memory_format=torch.channels_last)
    folder = args.data or Path(config["data"])
    records, _ = data.find_records(folder, config["seed"])
    records = [record for record in records if record.split == args.split]
    if not records:
        raise runs.RunError(f"{folder}: has no images of split {args.split}; choose another --split")
    files = mask_files(records, args.save_masks) if args.save_masks else []
    fields = data.read_fields(records, data.channel_names(config["channel"]), f"{args.split} images")
    channels = config["setting"]["in_channels"]
    if len(fields[0].image) != channels:
        raise runs.RunError(f"{records[0].image}: has {len(fields[0].image)} channels; {run} was trained on {channels}")

    # 2. predict and measure
    bar = partial(tqdm, desc=f"predicting {args.split}", unit="image", leave=False, disable=None)
    counts, loss, masks = runs.evaluate(model, fields, compute, progress=bar,
                                        predict=runs.predict_eight_ways if args.tta else runs.predict)
    scores = {**dedl.segmentation_scores(counts), "cross_entropy": loss, "tta": args.tta, "split": args.split,
              "data": str(folder)}

    # 3. numbers, picture, masks
    runs.save_json(scores, run / f"{args.split}.json")
    pictures.save_sheet(fields, masks, [dedl.image_iou(c) for c in counts], run / f"{args.split}.png")
    for file, mask in zip(files, masks):
        Image.fromarray(mask.numpy().astype("uint8") * 255).save(file)
    return scores


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


if __name__ == "__main__":
    runs.command(main)
