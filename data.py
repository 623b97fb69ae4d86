"""What training and testing see: images with masks or labels, tiles, augmentation, folds.

    python data.py synthetic OUT                write the built-in synthetic set
    python data.py dsb2018 STAGE1_TRAIN OUT     import the Data Science Bowl 2018 download (its fluorescence images)
    python data.py check DIR                    report what a data folder holds, and what is wrong with it

Segmentation: image (C, H, W) float32 in [0, 1], truth (H, W) of classes, see dedl.nucleus_classes.
Classification: image (3, S, S) uint8, labels (classes,) of 0 and 1.
"""
import glob
import math
import random
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

import dedl
from images import folders, manifests, reading
from running import process
from running.process import InputError, progress

ROTATION = 10                 # degrees
NOISE = 0.05                  # the largest deviation of what is added to a tile
EMPTY = 0.02                  # of the tiles are made to show background alone
PUBLISHED_ROTATION = 3        # degrees, of the authors' notebooks


# ------------------------------------------------------------------------------------------------------- augmentation
@contextmanager
def seeded(*numbers):
    """Let torch draw from a state that these numbers give, and restore its own afterwards: an image is changed alike
    with any number of loader processes, and after a resume."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(int(np.random.default_rng(numbers).integers(2 ** 63)))
        yield


def tile_augmentation(recipe, tile):
    """Return what changes a tile's image and truth alike, the truth to the nearest pixels. paper: the notebooks'; zeros
    in the corners. short: tiles come with a margin, from which the corners are filled."""
    if recipe == "paper":
        return v2.Compose([v2.RandomRotation(PUBLISHED_ROTATION), v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()])
    return v2.Compose([
        v2.RandomApply([v2.RandomRotation(ROTATION, v2.InterpolationMode.BILINEAR)]),
        v2.CenterCrop(tile),
        v2.RandomHorizontalFlip(),
        v2.RandomVerticalFlip(),
        # a transposition in half of the cases: with both flips all eight ways to lay a square
        v2.RandomApply([v2.Lambda(partial(torch.transpose, dim0=-2, dim1=-1))]),
    ])


# On uint8 images (3, S, S). paper: the notebook's. short: half of the images are flipped alone, since a network learns
# slower from random weights where all are distorted; saturation stays, since cells differ by their colour.
IMAGE_AUGMENTATIONS = {
    "paper": v2.Compose([
        v2.RandomApply([v2.ColorJitter(0.2, 0.2, 0.2), v2.RandomPerspective(0.2)], p=0.3),
        v2.RandomApply([v2.ColorJitter(0.2, 0.2, 0.2), v2.RandomAffine(10)], p=0.3),
        v2.RandomVerticalFlip(p=0.3),
        v2.RandomHorizontalFlip(p=0.3),
    ]),
    "short": v2.Compose([
        v2.RandomApply([
            v2.ColorJitter(0.2, 0.2),
            v2.RandomPerspective(0.2),
            v2.RandomAffine(15, (0.1, 0.1), (0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR),
        ]),
        v2.RandomVerticalFlip(),
        v2.RandomHorizontalFlip(),
    ]),
}


# ------------------------------------------------------------------------------------------------ segmentation: tiles
def read_fields(records: list, channels: tuple = ("DAPI",), what: str = "images") -> list:
    """Read the records' images and masks into memory, in their order. Raises InputError, also where images differ in
    their number of channels."""
    with ThreadPoolExecutor() as pool:  # decoders release the interpreter's lock
        read = pool.map(lambda record: manifests.read_field(record, channels), records)
        fields = list(progress(read, f"reading {what}", total=len(records)))
    first = fields[0]
    for field in fields:
        if len(field.image) != len(first.image):
            raise InputError(f"{field.record.image}: has {len(field.image)} channels, {first.record.image.name} has "
                             f"{len(first.image)}; all images of a data folder must have as many")
    return fields


def stains(config: dict) -> tuple:
    """Return the names of a run's stains, by which they are found in further images. A page that --channel named by its
    number goes by its name from then on, if it has one."""
    asked = reading.channel_names(config["channel"])
    found = tuple(config["channels"])
    return asked if found in (reading.GREY, reading.COLOURED) else found


class Crops(Dataset):
    """Tiles of the training images, augmented: image (C, tile, tile) float32, truth (tile, tile) int64.

    A pass draws from each image as many random tiles as cover its annotated area; published: the tiles of a grid. Every
    tile holds annotated pixels. passes: how many passes the indices hold.
    """

    def __init__(self, fields: list, tile: int, seed: int = 0, recipe: str = "short", passes: int = 1,
                 classes: int = 2):
        self.fields = fields
        self.truths = [dedl.nucleus_classes(field.labels, classes).masked_fill(~field.known, dedl.IGNORED)
                       for field in fields]
        self.tile = tile
        self.seed = seed
        self.epoch = 0
        self.passes = passes
        self.published = recipe == "paper"
        self.augment = tile_augmentation(recipe, tile)
        self.places = []                                               # index of the image; paper: top, left
        for i, field in enumerate(fields):
            height, width = field.shape
            if self.published:
                corners = [(top, left) for top in range(0, height, tile) for left in range(0, width, tile)
                           if field.known[top:top + tile, left:left + tile].any()]
            else:
                corners = [()] * math.ceil(field.known.sum() / tile ** 2)
            self.places += [(i, *corner) for corner in corners]

    def __len__(self):
        return len(self.places) * self.passes

    def __getitem__(self, index):
        i, *corner = self.places[index % len(self.places)]
        cut = padded_tile if self.published else random_tile
        truth = torch.tensor(dedl.IGNORED)
        with seeded(self.seed, self.epoch, index):
            while (truth == dedl.IGNORED).all():
                image, truth = cut(self.fields[i], self.truths[i], self.tile, *corner)
                image, truth = self.augment(tv_tensors.Image(image), tv_tensors.Mask(truth))
                image, truth = image.as_subclass(torch.Tensor), truth.as_subclass(torch.Tensor).long()
            if not self.published:
                if torch.rand(()) < EMPTY and not truth.all():
                    image, truth = emptied(image, truth)
                image = image + NOISE * torch.rand(()) * torch.randn(image.shape)
        return image, truth


def random_tile(field, truth, tile):
    """Return a random tile of image (C, S, S) float32 and truth (S, S) uint8, with the margin that a rotation needs: S
    is tile * (cos + sin) of the largest angle. Beyond the border the image is mirrored."""
    angle = math.radians(ROTATION)
    margin = math.ceil(tile * (math.cos(angle) + math.sin(angle) - 1) / 2)
    rows, columns = (mirrored_window(size, tile, margin) for size in field.shape)
    return field.window(rows, columns), truth[rows[:, None], columns]


def emptied(image, truth):
    """Return a tile (C, S, S) without nuclei and its truth (S, S): pixels of the tile's background, of which there must
    be some, in random order, blurred, on uneven light, and brought to [0, 1] as whole images are. Who never saw such
    tiles finds nuclei in every empty image, since there the normalisation makes noise and light as bright as nuclei."""
    background = image[:, truth == 0]                                                   # (C, pixels)
    noise = background[:, torch.randint(background.shape[1], truth.shape)]              # (C, S, S)
    noise = v2.GaussianBlur(17, (0.1, 4.0))(noise)
    light = F.interpolate(torch.randn(1, 1, 3, 3), truth.shape, mode="bicubic", align_corners=True)[0]
    empty = torch.lerp(noise / (noise.std() + 1e-6), light, torch.rand(())).numpy()
    return torch.from_numpy(reading.normalise(empty, reading.find_limits(empty))), torch.zeros_like(truth)


def mirrored_window(size, tile, margin):
    """Return the indices of a random tile and its margins along an axis of `size` pixels, back and forth beyond it."""
    low, high = sorted((0, size - tile))
    start = int(torch.randint(low, high + 1, ()))
    index = torch.arange(start - margin, start + tile + margin)
    period = max(1, 2 * (size - 1))
    index = index % period
    return torch.minimum(index, period - index)


def padded_tile(field, truth, tile, top, left):
    """Return the tile at (top, left), as the authors' notebooks cut it: zeros beyond the border."""
    rows = slice(top, top + tile)
    columns = slice(left, left + tile)
    image = field.window(rows, columns)                                                 # (C, h, w)
    truth = truth[rows, columns]                                                        # (h, w)
    beyond = (0, tile - truth.shape[1], 0, tile - truth.shape[0])
    return F.pad(image, beyond), F.pad(truth, beyond)


# ----------------------------------------------------------------------------------------- classification: whole images
@dataclass
class Labelled:
    """Records with their truth (N, classes) bool, and their images, uint8 (N, 3, S, S)."""
    records: list
    classes: list
    truth: torch.Tensor
    images: torch.Tensor


def square(rgb: np.ndarray, size: int, interpolation: str) -> torch.Tensor:
    """Return an image, uint8 (3, H, W), stretched to a square (3, size, size), as in the paper, so that nothing is cut
    off. interpolation: "bicubic", "bilinear" or "nearest"."""
    image = torch.from_numpy(rgb)
    return v2.functional.resize(image, [size, size], v2.InterpolationMode(interpolation), antialias=True)


def read_labelled(records: list, classes: list, size: int, interpolation: str = "bicubic",
                  what: str = "images") -> Labelled:
    """Return the records as Labelled, size x size pixels. Raises InputError, also for a label that is none of the
    classes."""
    for record in records:
        for label in record.labels:
            if label not in classes:
                raise InputError(f"{record.image}: its label {label!r} is none of the run's, {', '.join(classes)}")
    truth = torch.tensor([[name in record.labels for name in classes] for record in records], dtype=torch.bool)
    images = torch.empty(len(records), 3, size, size, dtype=torch.uint8)
    with ThreadPoolExecutor() as pool:
        read = pool.map(lambda record: square(reading.read_rgb(record.image), size, interpolation), records)
        for place, image in zip(images, progress(read, f"reading {what}", total=len(records))):
            place.copy_(image)
    return Labelled(records, classes, truth, images)


class AugmentedImages(Dataset):
    """Training images of a Labelled: uint8 (3, S, S), augmented, and their truth (classes,) float32. chosen: the
    indices that an epoch goes through."""

    def __init__(self, labelled: Labelled, chosen: np.ndarray, seed: int, recipe: str):
        self.labelled = labelled
        self.chosen = chosen
        self.seed = seed
        self.epoch = 0
        self.augment = IMAGE_AUGMENTATIONS[recipe]

    def __len__(self):
        return len(self.chosen)

    def __getitem__(self, place):
        index = int(self.chosen[place])
        with seeded(self.seed, self.epoch, index):
            return self.augment(self.labelled.images[index]), self.labelled.truth[index].float()


def make_folds(records: list, count: int, seed: int = 77) -> list:
    """Split records into `count` folds, lists of indices. Patients stay whole, and each fold gets, as well as that
    allows, the same number of images, of each label, and of each set of labels. Raises InputError if there are too few.

    Greedy (after Sechidis et al. 2011, "On the stratification of multi-label data"): patients, those with the rarest
    labels first, go one by one where they raise the squared deviation from equal folds least.
    """
    groups = manifests.by_patient(records)
    if len(groups) < count:
        raise InputError(f"--folds {count}: the training rows are of {len(groups)} patients, which are never split, or "
                         f"images without one; take at most {len(groups)}")
    # what is to be equal: the number of images (None), of each set of labels, of each label
    features = [[None, tuple(sorted(record.labels)), *record.labels] for record in records]
    names = sorted({feature for row in features for feature in row}, key=str)
    table = np.array([[row.count(name) for name in names] for row in features])         # (images, features)
    total = table.sum(0)
    random.Random(seed).shuffle(groups)
    groups.sort(key=lambda indices: -(table[indices].sum(0) / total).max())
    folds = [[] for _ in range(count)]
    held = np.zeros((count, len(names)))
    for indices in groups:
        more = table[indices].sum(0)
        # what sum((held + more - total / count)^2 / total) over all folds grows by, if they go to one of them
        growth = ((2 * (held - total / count) * more + more ** 2) / total).sum(1)
        fold = int(growth.argmin())
        folds[fold] += indices
        held[fold] += more
    return [sorted(fold) for fold in folds]


# --------------------------------------------------------------------------------------------------------- new images
def find_images(paths: Iterable) -> list:
    """Return the image files that paths name: files, folders and patterns like "a/*.tif", of which all images are
    taken, but not masks beside them. Raises InputError for a path that names none."""
    found = []
    for path in paths:
        path = Path(path)
        if path.is_file():
            found.append(path)
            continue
        files = path.iterdir() if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
        files = [file for file in sorted(files) if file.is_file() and file.suffix.lower() in reading.IMAGES
                 and not file.stem.endswith(tuple(manifests.ENDINGS))]
        if not files:
            raise InputError(f"--images {path}: names no image file ({', '.join(reading.IMAGES)})")
        found += files
    return found


if __name__ == "__main__":
    process.command(partial(folders.main, description=__doc__))
