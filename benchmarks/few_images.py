"""What helps with few annotated images: an earlier run to start from; more images, of which only a part is annotated;
first weights, longer training, test-time averaging, better-chosen images.

    python benchmarks/few_images.py finetune RUN WEIGHTS [--data INFORM] [--seeds 5] -- --epochs 3 --steps 30
    python benchmarks/few_images.py partly [--data DSB2018] [--seeds 5] -- --epochs 1 --steps 240
    python benchmarks/few_images.py instead WEIGHTS [--data DSB2018] [--seeds 5] -- --epochs 1 --steps 240

finetune: 1, 2 and 3 training images; the network of RUN starts at random, from WEIGHTS (a file of timm's, of the
encoder of RUN) and from RUN. Its encoder is that of RUN. --plane N takes one colour of the images alone, as grey.

partly: 16 training images of which each has one annotated quarter, drawn by the seed, against the first 4 of them,
which are annotated as a whole. Both have about as many annotated pixels.

instead: 4 images drawn by the seed and WEIGHTS, a file of timm's, against random weights, three times the steps, 8
images, and 4 chosen images: those for which the other training images lie nearest to one of them, by the features of
the encoder with WEIGHTS, chosen one after the other. All are measured as they are and as a mean over eight views.

Behind -- stand flags of train.py. All runs are measured on the test images. A run that was measured is not done
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
import torch
from PIL import Image

import data
import test
import train
from images import manifests, reading
from networks import encoders
from running import process, runs

SCORES = ("iou", "mean_image_iou", "ap50", "ap50_mean_image", "count_ratio")
IMAGES, WHOLE = 16, 4
FEW = 4
ENCODER = "tf_efficientnet_lite0"


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = process.Parser(description=__doc__)
    add = parser.add_argument
    add("part", choices=["finetune", "partly", "instead"])
    add("start", nargs="*", help="finetune: RUN and WEIGHTS; instead: WEIGHTS")
    add("--data", type=Path, help="data folder [finetune: the shared inform; else the shared DSB2018]")
    add("--plane", type=int, choices=[0, 1, 2], help="finetune: red, green or blue alone [all]")
    add("--out", type=Path, default=Path("runs/few_images"), help="[%(default)s]")
    add("--seeds", type=int, default=5, help="seeds 1 to N [5]")
    add("--seed-list", type=lambda text: list(map(int, text.split(","))), help="these seeds alone")
    args = parser.parse_args(argv[:cut])
    args.flags = argv[cut + 1:]
    args.seed_list = args.seed_list or list(range(1, args.seeds + 1))
    {"finetune": finetune, "partly": partly, "instead": instead}[args.part](args)


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
        write_rows([*taken, *held], place, rng if place.name == "quarters" else None)
    return folders


def write_rows(records, folder, rng=None):
    """A data folder with copies of these records' files; with rng one quarter of each training image is annotated."""
    rows = []
    for record in records:
        row = [f"images/{record.image.name}", f"masks/{record.mask.name}", record.split, ""]
        for name, file in zip(row, (record.image, record.mask)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / name)
        if rng and record.split == "train":
            row[3] = f"masks/{record.image.stem}_ignore.png"
            Image.fromarray(all_but_a_quarter(record, rng)).save(folder / row[3])
        rows.append(row)
    process.save_csv(folder / "segmentation.csv", ["image", "mask", "split", "ignore"], rows)


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


def instead(args):
    source = args.data or harness.DATA
    weights, = args.start
    usual = ["--encoder", ENCODER, "--weights", weights]
    few = ["--limit-train", str(FEW)]
    steps = int(args.flags[args.flags.index("--steps") + 1])
    arms = {
        f"{FEW} images": (source, [*usual, *few]),
        "random weights": (source, ["--encoder", ENCODER, "--weights", "none", *few]),
        "three times the steps": (source, [*usual, *few, "--steps", str(3 * steps)]),
        f"{2 * FEW} images": (source, [*usual, "--limit-train", str(2 * FEW)]),
        f"{FEW} chosen images": (write_chosen(source, args.out / "chosen", weights), usual),
    }
    compare(arms, args, views=True)


def write_chosen(source, folder, weights):
    """A data folder with the FEW medoids of the source's training images, and its validation and test images."""
    records, _ = manifests.find_records(source)
    train = [record for record in records if record.split == "train"]
    features = features_of(data.read_fields(train), weights)
    apart = torch.cdist(features, features)                           # (images, images)
    nearest = torch.full((len(train),), torch.inf)
    chosen = []
    for _ in range(FEW):
        left = torch.minimum(apart, nearest).sum(1)                   # of all images, were this one chosen too
        chosen.append(int(left.argmin()))
        nearest = torch.minimum(nearest, apart[chosen[-1]])
    print("chosen:", ", ".join(train[i].image.name for i in chosen))
    write_rows([train[i] for i in chosen] + [record for record in records if record.split != "train"], folder)
    return folder


@torch.inference_mode()
def features_of(fields, weights):
    """The means over each image of the encoder's deepest map, each over its deviation: (images, channels)."""
    encoder, _ = encoders.create_encoder(ENCODER, 1, 5, weights)
    encoder.eval()
    rows = []
    for field in fields:
        height, width = (size // encoder.multiple * encoder.multiple for size in field.shape)
        rows.append(encoder(field.window()[None, :, :height, :width])[-1].mean((0, 2, 3)))
    features = torch.stack(rows)
    return (features - features.mean(0)) / (features.std(0) + 1e-6)


def compare(arms, args, views=False):
    """Train and measure each arm, {name: (data folder or {seed: data folder}, flags)}, with each seed, of `views` also
    as a mean over eight views; print a table."""
    ways = {"": [], ", eight views": ["--tta"]} if views else {"": []}
    measured = {name + way: [] for name in arms for way in ways}
    for seed in args.seed_list:
        for name, (folder, flags) in arms.items():
            folder = folder[seed] if isinstance(folder, dict) else folder
            run = args.out / f"{name.replace(' ', '_').replace(',', '')}-seed{seed}"
            if not list(run.glob("measured*.json")):
                shutil.rmtree(run, ignore_errors=True)
                train.main(["--data", str(folder), *args.flags, *flags, "--seed", str(seed), "--out", str(run)])
            for way, more in ways.items():
                file = run / f"measured{way.replace(', ', '_').replace(' ', '_')}.json"
                if not file.is_file():
                    test.main([str(run), "--amp", runs.read_config(run)["amp"], *more])
                    shutil.copyfile(run / "test.json", file)
                measured[name + way].append(json.loads(file.read_text()))
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
