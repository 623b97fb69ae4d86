"""What helps with few annotated images: an earlier run to start from; more images, of which only a part is annotated.

    python benchmarks/few_images.py finetune RUN WEIGHTS [--data INFORM] [--seeds 5] -- --epochs 3 --steps 30
    python benchmarks/few_images.py partly [--data DSB2018] [--seeds 5] -- --epochs 1 --steps 240

finetune: 1, 2 and 3 training images; the network of RUN starts at random, from WEIGHTS (a file of timm's, of the
encoder of RUN) and from RUN. Its encoder is that of RUN. --plane N takes one colour of the images alone, as grey.

partly: 16 training images of which each has one annotated quarter, drawn by the seed, against the first 4 of them,
which are annotated as a whole. Both have about as many annotated pixels.

Behind -- stand flags of train.py. All runs are measured on the test images. A run whose test.json is there is not done
again. Of each arm and score the mean over seeds, and the mean difference to the first arm with the 95 % interval of
Student's t over seeds. --seed-list trains these seeds alone.
"""
import json
import shutil
import sys
from pathlib import Path

import harness
import numpy as np
import tables
from PIL import Image

import test
import train
from images import manifests, reading
from running import process, runs

SCORES = ("iou", "mean_image_iou", "ap50", "ap50_mean_image", "count_ratio")
IMAGES, WHOLE = 16, 4


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = process.Parser(description=__doc__)
    add = parser.add_argument
    add("part", choices=["finetune", "partly"])
    add("start", nargs="*", help="finetune: RUN and WEIGHTS")
    add("--data", type=Path, help="data folder [finetune: the shared inform; partly: the shared DSB2018]")
    add("--plane", type=int, choices=[0, 1, 2], help="finetune: red, green or blue alone [all]")
    add("--out", type=Path, default=Path("runs/few_images"), help="[%(default)s]")
    add("--seeds", type=int, default=5, help="seeds 1 to N [5]")
    add("--seed-list", type=lambda text: list(map(int, text.split(","))), help="these seeds alone")
    args = parser.parse_args(argv[:cut])
    args.flags = argv[cut + 1:]
    args.seed_list = args.seed_list or list(range(1, args.seeds + 1))
    (finetune if args.part == "finetune" else partly)(args)


def finetune(args):
    run, weights = args.start
    folder = args.data or harness.DATA.parent / "inform"
    if args.plane is not None:
        folder = write_plane(folder, args.out / f"data{args.plane}", args.plane)
    encoder = runs.read_config(Path(run))["encoder"]
    for count in (1, 2, 3):
        arms = {
            f"{count} images, random": ["--encoder", encoder, "--weights", "none"],
            f"{count} images, ImageNet": ["--encoder", encoder, "--weights", weights],
            f"{count} images, earlier run": ["--weights", run],
        }
        compare({name: (folder, [*flags, "--limit-train", str(count)]) for name, flags in arms.items()}, args)


def write_plane(source, folder, plane):
    """A data folder with one colour of the source's images, as grey."""
    records, _ = manifests.find_records(source)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for record in records:
        image = f"{record.image.stem}.png"
        Image.fromarray(reading.read_rgb(record.image)[plane]).save(folder / image)
        shutil.copyfile(record.mask, folder / record.mask.name)
        rows.append([image, record.mask.name, record.split, record.patient])
    process.save_csv(folder / "segmentation.csv", ["image", "mask", "split", "patient"], rows)
    return folder


def partly(args):
    source = args.data or harness.DATA
    arms = {f"{IMAGES} images, a quarter of each": None, f"{WHOLE} whole images": None}
    of_seed = {seed: write_folders(source, args.out / f"data{seed}", seed) for seed in args.seed_list}
    compare({name: ({seed: folders[place] for seed, folders in of_seed.items()}, [])
             for place, name in enumerate(arms)}, args)


def write_folders(source, folder, seed):
    """Two data folders, `quarters` and `whole`, with the validation and test images of the source."""
    rng = np.random.default_rng(seed)
    records, _ = manifests.find_records(source)
    train = [record for record in records if record.split == "train"]
    chosen = [train[i] for i in rng.permutation(len(train))[:IMAGES]]
    held = [record for record in records if record.split != "train"]
    folders = folder / "quarters", folder / "whole"
    for place, taken in zip(folders, (chosen, chosen[:WHOLE])):
        rows = []
        for record in [*taken, *held]:
            row = [f"images/{record.image.name}", f"masks/{record.mask.name}", record.split, ""]
            for name, file in zip(row, (record.image, record.mask)):
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place / name)
            if place.name == "quarters" and record.split == "train":
                row[3] = f"masks/{record.image.stem}_ignore.png"
                Image.fromarray(all_but_a_quarter(record, rng)).save(place / row[3])
            rows.append(row)
        process.save_csv(place / "segmentation.csv", ["image", "mask", "split", "ignore"], rows)
    return folders


def all_but_a_quarter(record, rng):
    """What is ignored, uint8 (H, W): all but one quarter, at random, in which there is a nucleus."""
    labels = np.asarray(Image.open(record.mask))
    height, width = labels.shape
    while True:
        top, left = rng.integers(2, size=2) * (height // 2, width // 2)
        quarter = slice(top, top + height // 2), slice(left, left + width // 2)
        if labels[quarter].any():
            break
    ignore = np.full(labels.shape, 255, np.uint8)
    ignore[quarter] = 0
    return ignore


def compare(arms, args):
    """Train and measure each arm, {name: (data folder or {seed: data folder}, flags)}, with each seed; print a
    table."""
    measured = {name: [] for name in arms}
    for seed in args.seed_list:
        for name, (folder, flags) in arms.items():
            folder = folder[seed] if isinstance(folder, dict) else folder
            run = args.out / f"{name.replace(' ', '_').replace(',', '')}-seed{seed}"
            if not (run / "test.json").is_file():
                shutil.rmtree(run, ignore_errors=True)
                train.main(["--data", str(folder), *flags, *args.flags, "--seed", str(seed), "--out", str(run)])
                test.main([str(run), "--amp", runs.read_config(run)["amp"]])
            measured[name].append(json.loads((run / "test.json").read_text()))
    rows = []
    first, *_ = measured.values()
    for name, of_seeds in measured.items():
        row = [name]
        for score in SCORES:
            values = [scores[score] for scores in of_seeds]
            mean, _ = tables.mean_and_interval(values)
            row.append(f"{mean:.3f}")
            if of_seeds is not first:
                mean, beyond = tables.mean_and_interval([a - b[score] for a, b in zip(values, first)])
                row[-1] += f" ({mean:+.3f} [{mean - beyond:+.3f}, {mean + beyond:+.3f}])"
        rows.append(row)
    print(f"{len(args.seed_list)} seeds, test images\n")
    harness.table(["", *SCORES], rows)


if __name__ == "__main__":
    process.command(main)
