"""Forms of APP on trial (docs/app_plan.md): tables.py with three more values of --app and a flag --prior.

    python benchmarks/priors.py data DSB2018 OUT --noise 20          a data folder whose images have noise
    python benchmarks/priors.py data DSB2018 OUT --biased            a data folder whose training masks are biased
    python benchmarks/priors.py teach DATA PRIOR.pt                  what --app restore needs, of all training masks
    python benchmarks/priors.py segmentation --data DIR --vary app=none,blind ...     as tables.py
    python benchmarks/priors.py after RUN ... --prior PRIOR.pt       runs without APP, their predictions mended after

--app blind: a quarter of each batch is of images without masks; all give back blanked pixels (question A).
--app restore: half of each batch is of images without masks; there the prediction is pulled to what a frozen network,
that has learnt from masks alone, makes of it (question B).
--app frozen: conv, whose autoencoder has learnt from true masks before, and is frozen (question C).
"""
import shutil
import sys
from argparse import Namespace
from copy import copy
from pathlib import Path

import numpy as np
import tables
import tifffile
import torch
import torch.nn.functional as F
from torch import nn

import data
import dedl
import models
import test
import train
from images import manifests, reading
from running import prediction, process, runs, settings

FORMS = ("blind", "restore", "frozen")
MASKED = 64           # a pixel in so many is blanked
REACH = 2             # pixels, of the neighbours that one of them is replaced by
UNKNOWN = {"blind": 1 / 4, "restore": 1 / 2}  # share of a batch that is of images without masks
LATE, RAMP = 120, 40   # steps before the pull of restore, and until it has its whole weight
LEARN = 400           # steps of an autoencoder that is frozen then
OF_IMAGE = 10, 1e5    # how a blanked pixel's value stands among class indices: (value + 10) * 1e5
EMPTY = 0.3           # of the tiles without a nucleus are shown to a prior
DROPPED = 0.15        # of the nuclei, where masks are spoilt for a prior to learn from
seen = Namespace()    # what a training here knows beyond train.py's: the records without masks


# --------------------------------------------------------------------------------------------------------- data folders
def write_folder(argv):
    parser = process.Parser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--noise", type=float, default=0, help="deviation, of 255")
    parser.add_argument("--biased", action="store_true")
    args = parser.parse_args(argv)
    records, _ = manifests.find_records(args.source)
    rows = []
    for folder in ("images", "masks"):
        (args.out / folder).mkdir(parents=True, exist_ok=True)
    for place, record in enumerate(records):
        rng = np.random.default_rng([7, place])
        image = f"images/{record.image.name}"
        if args.noise:
            image = f"images/{record.image.stem}.tif"
            values, _ = reading.read_image(record.image)
            noisy = values[0] + args.noise * rng.standard_normal(values[0].shape)
            tifffile.imwrite(args.out / image, noisy.astype(np.float32))
        else:
            shutil.copyfile(record.image, args.out / image)
        mask = f"masks/{record.image.stem}.tif"
        labels = torch.from_numpy(reading.read_mask(record.mask).astype(np.int32))
        if args.biased and record.split == "train":
            labels = labels * torch.from_numpy(rng.random(int(labels.max()) + 1) >= 0.3)[labels.long()]
            labels = labels * ~dedl.outline(labels)
        tifffile.imwrite(args.out / mask, labels.numpy().astype(np.uint16))
        rows.append([image, mask, record.split])
    process.save_csv(args.out / "segmentation.csv", ["image", "mask", "split"], rows)


# ----------------------------------------------------------------------------------------------- images without masks
class Crops(data.Crops):
    """train.py's tiles, remembered."""

    def __init__(self, *inputs, classes=2, **flags):
        super().__init__(*inputs, classes=classes, **flags)
        self.classes = classes
        if type(self) is Crops:
            seen.tiles = self


class Unlabelled(Crops):
    """Tiles as train.py's, whose truth is not known."""

    def __getitem__(self, index):
        image, truth = super().__getitem__(index)
        return image, torch.full_like(truth, dedl.IGNORED)


class Joined:
    """Batches of two loaders, joined; with blanks if they are to be given back."""

    def __init__(self, loaders, blanks, seed):
        self.loaders = loaders
        self.blanks = blanks
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self):
        return min(map(len, self.loaders))

    def __iter__(self):
        for parts in zip(*self.loaders):
            images, truth = map(torch.cat, zip(*parts))
            yield blanked(images, truth, self.generator) if self.blanks else (images, truth)


def blanked(images, truth, generator):
    """Return images (N, 1, H, W) with blanks, and truth (N, 2, H, W): classes, and what was at the blanks, else -1."""
    height, width = truth.shape[1:]
    blank = torch.rand(truth.shape, generator=generator) < 1 / MASKED
    n, y, x = blank.nonzero(as_tuple=True)
    dy, dx = torch.randint(-REACH, REACH + 1, (2, len(n)), generator=generator)
    dx = torch.where((dy == 0) & (dx == 0), 1, dx)
    beyond, scale = OF_IMAGE
    given = torch.where(blank, ((images[:, 0] + beyond) * scale).round().long(), -1)
    changed = images.clone()
    changed[n, 0, y, x] = images[n, 0, (y + dy).clamp(0, height - 1), (x + dx).clamp(0, width - 1)]
    return changed, torch.stack([truth, given], 1)


def make_loader(dataset, count, args, compute, state, original=train.make_loader):
    if args.app not in ("blind", "restore"):
        return original(dataset, count, args, compute, state)
    fields = [copy(field) for field in seen.others]
    for field in fields:
        field.labels = torch.zeros_like(field.labels)
    others = Unlabelled(fields, args.tile, args.seed + 1, classes=dataset.classes)
    others.passes = 1 + count // len(others)
    loaders = []
    for tiles, share in ((dataset, 1 - UNKNOWN[args.app]), (others, UNKNOWN[args.app])):
        part = Namespace(**vars(args) | {"batch_size": round(share * args.batch_size)})
        loaders.append(original(tiles, round(share * count), part, compute, state))
    return Joined(loaders, args.app == "blind", args.seed)


def choose_folds(records, args, original=train.choose_folds):
    """Remember the fields that a training may see without their masks: of blind all, of restore those not drawn."""
    known, folds = original(records, args)
    if args.app in ("blind", "restore"):
        chosen = [record for record in records if record.split == "train"]
        drawn = {record.image for record in known if record.split == "train"}
        if args.app == "restore" and len(drawn) < len(chosen):
            chosen = [record for record in chosen if record.image not in drawn]
        seen.others = data.read_fields(chosen, reading.channel_names(args.channel), "images without masks")
    return known, folds


# -------------------------------------------------------------------------------------------------------------- losses
class OpenHead(nn.Conv2d):
    """The network's head, which in training also gives the map it is shown."""

    def forward(self, x):
        logits = super().forward(x)
        return torch.cat([logits, x], 1) if self.training else logits


class Blind(nn.Module):
    """The image at blanked pixels from the decoder's last map."""

    def __init__(self, channels):
        super().__init__()
        self.image = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, features, given):
        beyond, scale = OF_IMAGE
        blank = given >= 0
        wanted = given[blank] / scale - beyond
        return F.mse_loss(self.image(features)[:, 0][blank], wanted) / wanted.var()


class Restore(nn.Module):
    """The pull towards what a frozen network makes of a prediction."""

    def __init__(self, file):
        super().__init__()
        self.prior = load_prior(file)
        self.steps = 0

    def forward(self, logits):
        self.steps += 1
        if self.steps < LATE:
            return 0 * logits.sum()
        with torch.no_grad():
            wanted = self.prior(logits.softmax(1)).float().softmax(1)
        return min(1, (self.steps - LATE) / RAMP) * F.cross_entropy(logits, wanted)


class Frozen(dedl.ConvAPP):
    """The conv form whose autoencoder has learnt before."""

    def learn(self, tiles):
        optimizer = dedl.app_optimizer(self)
        generator = torch.Generator().manual_seed(tiles.seed)
        for _ in range(LEARN):
            places = torch.randint(len(tiles), (8,), generator=generator).tolist()
            truth = torch.stack([tiles[place][1] for place in places])
            _, own = super().forward(torch.zeros(8, self.classes, *truth.shape[1:]), truth)
            optimizer.zero_grad()
            own.backward()
            optimizer.step()
            tiles.epoch += 1
        tiles.epoch = 0

    def forward(self, logits, truth, class_weights=None):
        penalty, own = super().forward(logits, truth)
        return penalty, 0 * own


def segmentation_losses(class_weights, args, original=train.segmentation_losses):
    if args.app == "frozen":
        own = Namespace(**vars(args) | {"app": "conv"})
        app, _ = original(class_weights, own)
        app.__class__ = Frozen
        app.classes = len(class_weights)
        app.learn(seen.tiles)
        build = dedl.build_app
        dedl.build_app = lambda *inputs: app
        result = original(class_weights, own)
        dedl.build_app = build
        return result
    if args.app not in FORMS:
        return original(class_weights, args)
    classes = len(class_weights)
    app = Blind(16) if args.app == "blind" else Restore(args.prior)

    def losses_of(logits, truth, share):
        if args.app == "blind":
            penalty = app(logits[:, classes:], truth[:, 1])
            logits, truth = logits[:, :classes], truth[:, 0]
        known = (truth != dedl.IGNORED).flatten(1).any(1)
        if args.app == "restore":
            penalty = app(logits[~known])
        logits, truth = logits[known], truth[known]
        cross_entropy = F.cross_entropy(logits, truth, class_weights, ignore_index=dedl.IGNORED)
        loss = cross_entropy + dedl.dice_loss(logits, truth) + args.app_weight * penalty
        return loss, cross_entropy, penalty
    return app, losses_of


def make_parts(model, app, args, compute, original=train.make_parts):
    if args.app == "blind":
        model.head.__class__ = OpenHead
    parts = original(model, app, args, compute)
    if args.app == "blind":
        parts["app_optimizer"] = torch.optim.Adam(app.parameters(), lr=1e-2)
    return parts


# --------------------------------------------------------------------------------------------------------------- prior
def new_prior():
    return models.build_segmenter("unet", "resnet18", in_channels=3, classes=3, depth=2, decoder_channels=(64, 32))


def load_prior(file):
    prior = new_prior()
    prior.load_state_dict(runs.load_checkpoint(Path(file), "model")["model"])
    return prior.eval().requires_grad_(False)


def spoilt(labels, rng):
    """Return a label image (H, W) as a bad segmentation has it."""
    count = int(labels.max()) + 1
    keep = torch.from_numpy(rng.random(count) >= DROPPED)
    number = torch.arange(count)
    if rng.random() < 0.5:  # merge: some nuclei take the number of the one to their left
        left, right = labels[:, :-1].flatten().long(), labels[:, 1:].flatten().long()
        touching = ((left != right) & (left > 0) & (right > 0)).nonzero()[:, 0]
        for place in touching.tolist():
            if rng.random() < 0.1:
                number[right[place]] = number[left[place]]
    labels = (number * keep)[labels.long()].int()
    for _ in range(rng.integers(3)):
        labels = labels * ~dedl.outline(labels)
    height, width = labels.shape
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    for _ in range(rng.integers(4)):
        top, column, radius = rng.integers(height), rng.integers(width), rng.integers(1, 6)
        labels = labels * ((y - top) ** 2 + (x - column) ** 2 > radius ** 2)
    return labels


def label_tiles(fields, rng, count, tile):
    """Spoilt and true classes (count, tile, tile) of random places of label images."""
    pairs = []
    while len(pairs) < count:
        labels = fields[rng.integers(len(fields))].labels
        rows, columns = (data.mirrored_window(size, tile, 0) for size in labels.shape)
        labels = labels[rows[:, None], columns]
        if labels.any() or rng.random() < EMPTY:
            pairs.append([dedl.nucleus_classes(part).long() for part in (spoilt(labels, rng), labels)])
    return [torch.stack(part) for part in zip(*pairs)]


def unsure(classes):
    """Return classes (N, H, W) as the probabilities (N, 3, H, W) of a network that is not sure of them: of each tile
    more or less, with noise from pixel to pixel and, in half of the tiles, from region to region."""
    count, height, width = classes.shape
    sure, fine, coarse = torch.rand(3, count, 1, 1, 1)
    logits = (1 + 5 * sure) * F.one_hot(classes, 3).movedim(-1, 1)
    regions = F.interpolate(torch.randn(count, 3, 5, 5), (height, width), mode="bicubic")
    logits = logits + 2 * fine * torch.randn(logits.shape) + 4 * (coarse - 0.5).clamp(min=0) * regions
    return (F.avg_pool2d(logits, 3, 1, 1) if torch.rand(()) < 0.5 else logits).softmax(1)


def teach(argv):
    """Train a prior on the training masks of a data folder."""
    parser = process.Parser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=800)
    args = parser.parse_args(argv)
    records, _ = manifests.find_records(args.data)
    fields = data.read_fields([record for record in records if record.split == "train"])
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    prior = new_prior().train()
    optimizer = torch.optim.AdamW(prior.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    for step in range(args.steps):
        bad, good = label_tiles(fields, rng, 8, 128)
        loss = F.cross_entropy(prior(unsure(bad)), good)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1}: {loss.item():.4f}", flush=True)
    runs.save_checkpoint({"model": prior.state_dict()}, args.out)


# --------------------------------------------------------------------------------------------- predictions mended after
def after(argv):
    """The scores of runs as they are, with an opened mask, with a mask grown by a pixel, and with the prior's word on
    their predictions."""
    parser = process.Parser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--prior", type=Path, required=True)
    parser.add_argument("--split", default="test")
    args = parser.parse_args(argv)
    prior = load_prior(args.prior)
    of_way = {"as it is": [], "opened": [], "grown": [], "by the prior": []}
    for run in args.runs:
        loaded = test.load(run)
        config = loaded.config
        records, _ = manifests.find_records(Path(config["data"]))
        fields = data.read_fields([record for record in records if record.split == args.split])
        counts = {way: [] for way in of_way}
        for field in fields:
            own = prediction.predict(loaded.network, field, loaded.compute)
            whole = torch.cat([1 - own.sum(0, keepdim=True), own])[None]
            with torch.inference_mode():
                mended = prior(whole)[0].softmax(0)[1:].sum(0) > 0.5
            mask = own.sum(0) > 0.5
            opened = -F.max_pool2d(-mask[None].float(), 3, 1, 1)
            opened = F.max_pool2d(opened, 3, 1, 1)[0] > 0.5
            grown = F.max_pool2d(mask[None].float(), 3, 1, 1)[0] > 0.5
            for way, found in zip(of_way, (mask, opened, grown, mended)):
                counts[way].append(dedl.confusion(found, field.mask))
        for way in of_way:
            of_way[way].append(dedl.segmentation_scores(torch.stack(counts[way]))["mean_image_iou"])
        print(run.name, {way: round(values[-1], 4) for way, values in of_way.items()}, flush=True)
    first = of_way["as it is"]
    for way, values in of_way.items():
        mean, beyond = tables.mean_and_interval([a - b for a, b in zip(values, first)])
        print(f"{way}: {np.mean(values):.4f}, {mean:+.4f} [{mean - beyond:+.4f}, {mean + beyond:+.4f}]")


# ---------------------------------------------------------------------------------------------------------------- main
def add_segmentation(add, original=settings._add_segmentation):
    def add_more(name, **options):
        if name == "--app":
            options["choices"] = [*options["choices"], *FORMS]
        add(name, **options)
    original(add_more)
    add("--prior", metavar="FILE", help="of --app restore")


def main(argv=None):
    part, *rest = sys.argv[1:] or ["--help"]
    if part in ("-h", "--help"):
        print(__doc__)
        return
    settings._add_segmentation = add_segmentation
    data.Crops = Crops
    for name in ("make_loader", "choose_folds", "segmentation_losses", "make_parts"):
        setattr(train, name, globals()[name])
    parts = {"data": write_folder, "teach": teach, "after": after, "one": tables.one}
    if part in parts:
        parts[part](rest)
    else:
        tables.main(argv)


if __name__ == "__main__":
    process.command(main)
