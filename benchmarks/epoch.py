"""Training epochs of train.py against the published recipe, in images a second: reading, augmentation, network, APP,
loss and optimizer, everything but the validation.

    python benchmarks/epoch.py                           on dsb2018 in ../shared/data, or on the built-in synthetic set
    python benchmarks/epoch.py --data DIR --limit 64 --device cuda

The published recipe, as its notebooks have it: segmentation_models_pytorch's U-Net with scSE in contiguous layout;
images padded to multiples of 480 and cut into tiles of 480, kept as .npy files that are read for each epoch; PIL
transforms (rotation, flips), image by image; cross-entropy summed over pixels, Adam, a loss.item() at every step; its
APP, a row-wise Linear autoencoder with an Adam of its own. It is also run with tiles as large as ours, since an image
of 256 x 256 is one tile of 256, or one of 480 that is mostly padding. Here: train.py's loop with --recipe short --depth
3. The notebooks train in float32, which --amp off gives both sides.
"""
import math
import statistics
import tempfile
from pathlib import Path

import harness
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import data
import dedl
import models
import train
from images import manifests
from running import runs


def main(argv=None):
    parser = harness.parser(__doc__, rounds=3)
    parser.add_argument("--data", type=Path, help="data folder")
    parser.add_argument("--limit", type=int, default=24, help="training images an epoch [%(default)s]")
    parser.add_argument("--published-tile", type=int, default=480, help="tiles of the published recipe [480]")
    parser.add_argument("--workers", type=int, default=0, help="loader processes of both sides [0]")
    args = parser.parse_args(argv)
    compute = harness.start(args)
    folder = args.data or (harness.DATA if harness.DATA.is_dir() else runs.synthetic_folder())
    records = [record for record in manifests.find_records(folder)[0] if record.split == "train"][:args.limit]
    fields = data.read_fields(records)
    rows, tiles_of = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        sides = {}
        for app in ("none", "conv", "linear"):
            name = f"ours, --app {app}"
            sides[name], tiles_of[name] = ours(fields, app, args, compute)
        for tile in dict.fromkeys((args.tile, args.published_tile)):
            for app in (False, True):
                name = f"published recipe, tiles of {tile}, {'its APP' if app else 'no APP'}"
                sides[name], tiles_of[name] = published(fields, tile, app, Path(temporary) / f"{tile}", args, compute)
        seconds = harness.in_turn(sides, args.rounds, compute.device, warmup=1)
    for name in sides:
        against = [f"published recipe, tiles of {tile}, {'no APP' if name.endswith('none') else 'its APP'}"
                   for tile in dict.fromkeys((args.tile, args.published_tile))]
        gains = [f"{harness.ratio(seconds, other, name):.1f}x" for other in against] if name.startswith("ours") else []
        rows.append([name, tiles_of[name], f"{len(fields) / statistics.median(seconds[name]):.2f}",
                     *(gains or [""] * len(against))])
    print(f"{len(fields)} training images of {folder.name}, depth {args.depth}, batch {args.batch}, median of "
          f"{args.rounds} epochs. Ours: tiles of {args.tile}\n")
    columns = [f"against tiles of {tile}" for tile in dict.fromkeys((args.tile, args.published_tile))]
    harness.table(["", "tiles an epoch", "images/s", *columns], rows)


def ours(fields, app, args, compute):
    """A function that trains one epoch as train.py does, and how many tiles that are."""
    flags = dict(recipe="short", depth=args.depth, tile=args.tile, app=app, batch_size=args.batch,
                 workers=args.workers, epochs=100, steps=0)
    settings = train.parse_args([f"--{name.replace('_', '-')}={value}" for name, value in flags.items()])
    model = models.build_segmenter(in_channels=len(fields[0].image), depth=args.depth,
                                   decoder_channels=models.default_decoder_channels(args.depth))
    module, losses_of = train.segmentation_losses(torch.ones(2, device=compute.device), settings)
    parts = train.make_parts(model, module, settings, compute)
    crops = data.Crops(fields, args.tile)

    def epoch():
        state = {"epoch": crops.epoch, "later": 0}
        loader = train.make_loader(crops, len(crops), settings, compute, state)
        train.train_epoch(parts, loader, losses_of, compute, state, settings)
    return epoch, len(crops)


class PublishedTiles(Dataset):
    """Tiles from .npy files, each augmented by PIL transforms, as in the published notebooks (but image and mask alike,
    which costs the same)."""

    def __init__(self, fields, tile, folder):
        folder.mkdir(exist_ok=True)
        self.files = []
        for number, field in enumerate(fields):
            height, width = (math.ceil(size / tile) * tile for size in field.shape)
            image, mask = np.zeros((height, width), np.float32), np.zeros((height, width), np.uint8)
            image[:field.shape[0], :field.shape[1]] = field.window()[0]
            mask[:field.shape[0], :field.shape[1]] = field.mask * 255
            for y in range(0, height, tile):
                for x in range(0, width, tile):
                    self.files.append([folder / f"{kind}_{number}_{y}_{x}.npy" for kind in ("image", "mask")])
                    for file, array in zip(self.files[-1], (image, mask)):
                        np.save(file, array[y:y + tile, x:x + tile])
        self.transform = transforms.Compose([transforms.ToPILImage(), transforms.RandomRotation(3),
                                             transforms.RandomVerticalFlip(), transforms.RandomHorizontalFlip(),
                                             transforms.ToTensor()])

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        seed, both = torch.randint(2 ** 31, ()).item(), []
        for file in self.files[index]:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                both.append(self.transform(torch.from_numpy(np.load(file))[None]))
        return both[0], (both[1][0] > 0.5).long()


def published(fields, tile, with_app, folder, args, compute):
    """A function that trains one epoch as the notebooks do, and how many tiles that are."""
    tiles = PublishedTiles(fields, tile, folder)
    _, learn = published_step(with_app, tile, args.depth, compute)

    def epoch():
        total = 0.0
        for images, masks in DataLoader(tiles, args.batch, shuffle=True, num_workers=args.workers):
            total += learn(images, masks)
    return epoch, len(tiles)


def published_step(with_app, tile, depth, compute):
    """The notebooks' network, and a function that trains it on a batch and returns the loss."""
    model = harness.reference("unet", depth=depth).to(compute.device).train()
    app = dedl.RowAutoencoder(tile, "relu").to(compute.device) if with_app else None
    optimizers = [torch.optim.Adam(model.parameters(), 3.6e-4, weight_decay=1e-5)]
    if app:
        optimizers.append(torch.optim.Adam(app.parameters(), 1e-3))
    class_weights = torch.tensor(list(dedl.PUBLISHED_CLASS_WEIGHTS.values()), device=compute.device)
    criterion = nn.CrossEntropyLoss(class_weights, reduction="sum")

    def learn(images, masks):
        images, masks = images.to(compute.device), masks.to(compute.device)
        with torch.autocast(compute.device.type, torch.bfloat16, enabled=compute.amp_dtype is torch.bfloat16):
            logits = model(images).float()
            loss = criterion(logits, masks)
            if app:
                loss = loss + criterion(app(logits).float(), masks)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()
    return model, learn


if __name__ == "__main__":
    harness.process.command(main)
