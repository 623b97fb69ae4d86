"""How good a segmentation is after so many minutes of training, from random weights: train.py's default against what
one would use instead.

    python benchmarks/minutes.py                                   8 minutes a side, on dsb2018 in ../shared/data
    python benchmarks/minutes.py --seeds 3 --plot figures/minutes.png
    python benchmarks/minutes.py --minutes 30 --marks 2,8,15,30 --sides ours,smp

ours: train.py with its defaults, the learning rate by the share of the minutes that is over.
smp: what users of segmentation_models_pytorch write: its U-Net over ResNet-18 as it comes (depth 5, no attention, two
classes), random crops of 256, flips and quarter turns, batch 8, cross-entropy and its Dice loss, Adam, --smp-lr with a
cosine to 0 over the minutes; its masks are taken apart into nuclei by our code.
published: the paper's notebooks, as benchmarks/epoch.py has them, without APP.

All sides see the same normalised images, in the same precision and on the same cores, where they train in turn, some
seconds each. Only training counts: drawing and changing tiles, network, loss, optimizer. At each mark (minutes) the
images of --splits are measured. A side and seed whose result lies in --out is not trained again. The tables have the
medians over seeds, and their range; the plot is of the last split.
"""
import itertools
import json
import math
import statistics
import tempfile
import time
from pathlib import Path

import epoch
import harness
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

import data
import models
import train
from images import manifests
from running import nuclei, prediction, process, runs
from running.compute import add_compute, choose_compute
from running.process import number

TURN = 10  # seconds
SCORES = {"iou": "IoU", "mean_image_iou": "mean image IoU", "ap50": "AP@0.5", "ap50_mean_image": "AP@0.5, mean image"}


def main(argv=None):
    parser = process.Parser(description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, default=harness.DATA, help="data folder [%(default)s]")
    add("--minutes", type=number(float, 0.01), default=8, help="a side [8]")
    add("--marks", type=lambda text: list(map(float, text.split(","))), help="[1,2,4,8, as far as --minutes goes]")
    add("--sides", type=lambda text: text.split(","), default=list(SIDES), help=f"[{','.join(SIDES)}]")
    add("--seeds", type=number(int, 1), default=1, help="seeds 1 to N [1]")
    add("--smp-lr", type=number(float, 1e-12), default=3e-4, help="[3e-4, the best of 1e-4 to 3e-3]")
    add("--splits", type=lambda text: text.split(","), default=["validation"], help="to measure [validation]")
    add("--out", type=Path, default=Path("runs/minutes"), help="[%(default)s]")
    add("--plot", type=Path, metavar="FILE", help="the scores over the minutes, as PNG (needs matplotlib)")
    add_compute(add)
    args = parser.parse_args(argv)
    args.marks = args.marks or [mark for mark in (1, 2, 4, 8) if mark < args.minutes] + [args.minutes]
    compute = choose_compute(args.device, args.amp)
    args.out.mkdir(parents=True, exist_ok=True)
    records, _ = manifests.find_records(args.data)
    training = data.read_fields([record for record in records if record.split == "train"])
    held = {split: data.read_fields([record for record in records if record.split == split]) for split in args.splits}
    found = {}
    for seed in range(1, args.seeds + 1):
        files = {side: args.out / f"{side}-{args.minutes:g}min-seed{seed}.json" for side in args.sides}
        missing = [side for side, file in files.items() if not file.is_file()]
        with tempfile.TemporaryDirectory() as folder:
            racers = [Racer(side, *SIDES[side](training, seed, args, compute, folder)) for side in missing]
            race(racers, training, held, args, compute)
        for racer in racers:
            runs.save_json({"machine": harness.machine(compute), "rows": racer.rows}, files[racer.name])
        for side, file in files.items():
            found.setdefault(side, []).append(json.loads(file.read_text())["rows"])
    print(f"{harness.machine(compute)}, {args.data.name}, median (least to largest) of {args.seeds} seeds\n")
    for split in args.splits:
        print_table(found, split, args)
    if args.plot:
        plot(found, args)


# ------------------------------------------------------------------------------------------------------------ the sides
class Racer:
    """A side in training. step(share of the minutes that is over) trains on a batch and returns how many pixels that
    are; network() is what would be saved now."""

    def __init__(self, name, step, network):
        self.name = name
        self.step = step
        self.network = network
        self.seconds = 0.0
        self.pixels = 0
        self.rows = []


def race(racers, training, held, args, compute):
    """Train the sides in turn, and measure them at the marks."""
    usual = nuclei.describe(training)
    for mark in args.marks:
        behind = list(racers)
        while behind:
            for racer in behind:
                until = min(racer.seconds + TURN, 60 * mark)
                while racer.seconds < until:
                    started = time.perf_counter()
                    racer.pixels += racer.step(racer.seconds / 60 / args.minutes)
                    harness.wait(compute.device)
                    racer.seconds += time.perf_counter() - started
            behind = [racer for racer in behind if racer.seconds < 60 * mark]
        for racer in racers:
            row = {"minutes": mark, "images_a_second": racer.pixels / 256 ** 2 / racer.seconds}
            for split, fields in held.items():
                row[split] = prediction.measure(racer.network().eval(), fields, usual, compute).scores
                print(f"{racer.name}, {mark:g} minutes, {split}: "
                      + ", ".join(f"{name} {row[split][score]:.3f}" for score, name in SCORES.items()), flush=True)
            racer.rows.append(row)


def batches(tiles, size):
    """Batches of the tiles without end, each pass in an order drawn from torch's state."""
    for number_of_pass in itertools.count(1):
        tiles.epoch = number_of_pass
        yield from DataLoader(tiles, min(size, len(tiles)), shuffle=True, drop_last=True)


def ours(training, seed, args, compute, _):
    settings = train.parse_args(["--data", str(args.data), "--weights", "none", "--seed", str(seed)])
    classes = train.choose_classes(settings.nuclei, training)
    torch.manual_seed(seed)
    model = models.build_segmenter(settings.arch, settings.encoder, len(training[0].image), classes, settings.depth,
                                   models.default_decoder_channels(settings.depth))
    app, losses_of = train.segmentation_losses(torch.ones(classes, device=compute.device), settings)
    parts = train.make_parts(model, app, settings, compute)
    tiles = data.Crops(training, settings.tile, seed, settings.recipe, classes=classes)
    stream = batches(tiles, settings.batch_size)

    def step(done):
        batch = next(stream)
        parts["model"].train()
        train.train_step(parts, batch, losses_of, train.learning_rate(settings, done * settings.epochs), compute)
        return batch[1].numel()
    return step, lambda: parts["average"].module


class RandomCrops(Dataset):
    """A random square of each image, turned and flipped, and its mask."""

    def __init__(self, fields, side):
        self.fields = fields
        self.transform = v2.Compose([
            v2.RandomCrop(side, pad_if_needed=True),
            v2.RandomHorizontalFlip(),
            v2.RandomVerticalFlip(),
            v2.RandomApply([v2.Lambda(lambda image: image.transpose(-2, -1))]),
        ])

    def __len__(self):
        return len(self.fields)

    def __getitem__(self, index):
        field = self.fields[index]
        image, mask = self.transform(tv_tensors.Image(field.window()), tv_tensors.Mask(field.mask))
        return image.as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor).long()


class Padded(nn.Module):
    """A network of sizes that 32 divides, for all sizes."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, image):
        height, width = image.shape[-2:]
        return self.network(F.pad(image, (0, -width % 32, 0, -height % 32)))[..., :height, :width]


def smp(training, seed, args, compute, _):
    import segmentation_models_pytorch

    torch.manual_seed(seed)
    model = segmentation_models_pytorch.Unet("resnet18", encoder_weights=None, in_channels=len(training[0].image),
                                             classes=2).to(compute.device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), args.smp_lr, fused=True)
    dice = segmentation_models_pytorch.losses.DiceLoss("multiclass")
    stream = batches(RandomCrops(training, 256), 8)

    def step(done):
        optimizer.param_groups[0]["lr"] = args.smp_lr * (1 + math.cos(math.pi * min(1, done))) / 2
        images, truth = next(stream)
        truth = truth.to(compute.device)
        model.train()
        with compute.autocast():
            logits = model(compute.batch(images)).float()
            loss = F.cross_entropy(logits, truth) + dice(logits, truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return truth.numel()
    return step, lambda: Padded(model)


def published(training, seed, args, compute, folder):
    torch.manual_seed(seed)
    tiles = epoch.PublishedTiles(training, 480, Path(folder))
    model, learn = epoch.published_step(False, 480, 3, compute)
    stream = batches(tiles, 16)

    def step(_):
        batch = next(stream)
        model.train()
        learn(*batch)
        return batch[1].numel()
    return step, lambda: Padded(model)


SIDES = {"ours": ours, "smp": smp, "published": published}


# -------------------------------------------------------------------------------------------------------------- results
def print_table(found, split, args):
    rows = []
    for place, mark in enumerate(args.marks):
        for side, of_seeds in found.items():
            there = [rows_of_seed[place] for rows_of_seed in of_seeds]
            speed = statistics.median(row["images_a_second"] for row in there)
            scores = [middle_and_range([row[split][score] for row in there]) for score in SCORES]
            rows.append([f"{mark:g}", side, f"{speed:.1f}", *scores])
    print(f"{split} images\n")
    harness.table(["minutes", "", "images/s", *SCORES.values()], rows)


def middle_and_range(values):
    text = f"{statistics.median(values):.3f}"
    return text if len(values) == 1 else f"{text} ({min(values):.3f} to {max(values):.3f})"


def plot(found, args):
    from matplotlib.figure import Figure
    figure = Figure((4.2 * len(SCORES), 3.4), dpi=110, layout="constrained")
    for axes, (score, name) in zip(figure.subplots(1, len(SCORES)), SCORES.items()):
        for side, of_seeds in found.items():
            values = [[row[args.splits[-1]][score] for row in rows] for rows in of_seeds]
            lines = axes.plot(args.marks, [statistics.median(column) for column in zip(*values)], "o-", label=side)
            axes.fill_between(args.marks, *([reach(column) for column in zip(*values)] for reach in (min, max)),
                              color=lines[0].get_color(), alpha=0.2)
        axes.set(title=name, xlabel="minutes of training", xscale="log", xticks=args.marks,
                 xticklabels=[f"{mark:g}" for mark in args.marks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    with process.replacing(args.plot) as handle:
        figure.savefig(handle, format="png")


if __name__ == "__main__":
    process.command(main)
