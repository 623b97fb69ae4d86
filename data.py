"""Images, masks and labels: manifests, splits and folds, fields, crops and augmentation (files are read in reading.py).

    python data.py synthetic OUT                write the built-in synthetic set
    python data.py dsb2018 STAGE1_TRAIN OUT     import the Data Science Bowl 2018 download (its fluorescence fields)
    python data.py dedl-csv CSV [IMAGES] OUT    import the paper's csv (file,label) with the pictures it names
    python data.py check DIR                    say what is found in a data folder, and what is wrong with it

A data folder holds segmentation.csv (image,mask,split[,patient]), classification.csv (image,labels,split[,patient]) or
both; without the first, inForm's file names are recognised.
Segmentation: image (C, H, W) float32 in [0, 1], mask (H, W) bool, True where a nucleus is.
Classification: picture (3, H, W) uint8, labels (classes,) of 0 and 1.
"""
import glob
import math
import os
import random
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from images import folders, manifests, reading
from images.reading import read_picture
from running import process
from running.process import InputError

PICTURE_MEMORY = 4 << 30      # bytes; pictures to classify are kept in memory up to here
PART_PIXELS = 1 << 25         # of fields to be predicted, read at a time; a larger one alone
ROTATION = 10                 # degrees
PUBLISHED_ROTATION = 3        # degrees, of the authors' notebooks


# --------------------------------------------------------------------------------------------------------------- fields
def read_fields(records, channels=("DAPI",), what="images"):
    """All fields of the records, read once and kept in memory, in the records' order. Raises InputError."""
    with ThreadPoolExecutor() as pool:  # decoders release the interpreter's lock
        read = pool.map(lambda record: manifests.read_field(record, channels), records)
        fields = list(process.progress(read, f"reading {what}", total=len(records)))
    usual = Counter(len(field.image) for field in fields).most_common(1)[0][0]
    first = next(field for field in fields if len(field.image) == usual)
    for field in fields:
        if len(field.image) != len(first.image):
            raise InputError(f"{field.record.image}: has {len(field.image)} channels, {first.record.image.name} has "
                            f"{len(first.image)}; all images of a data folder must have as many")
        if stains(channels, field.channels) != stains(channels, first.channels):
            raise InputError(f"{field.record.image}: the pages {', '.join(channels)} (--channel) are "
                            f"{', '.join(field.channels)}, in {first.record.image.name} {', '.join(first.channels)}; "
                            f"give names, or files with the same pages")
    return fields


def read_in_parts(records, channels=("DAPI",), most=None):
    """Reads fields raw, some at a time, as many as have `most` pixels together, PART_PIXELS if it is None, or one that
    is larger: yields lists of each record's Field, or the InputError of reading it, in the records' order."""
    def read(record):
        try:
            return manifests.read_field(record, channels, raw=True)
        except InputError as error:
            return error

    parts, pixels = [[]], 0
    for record in records:
        size = reading.pixels_of(record.image)
        if parts[-1] and pixels + size > (PART_PIXELS if most is None else most):
            parts, pixels = [*parts, []], 0
        parts[-1].append(record)
        pixels += size
    with ThreadPoolExecutor() as pool:
        for part in parts:
            yield list(pool.map(read, part))


def stains(asked, found):
    """The names to look for in further images, of `asked` pages that had the names `found`: where one was asked for by
    its place, the name that it had there, if it had one."""
    if found in (reading.GREY, reading.COLOURED):
        return tuple(asked)
    return tuple(name if number.isdecimal() else number for number, name in zip(asked, found))


class ReadInTurn(torch.utils.data.Dataset):
    """A dataset whose loader processes note what they are at: `noted`, in shared memory, holds each one's (process id,
    index), so that `naming_files` can say what it was reading when it died: `file_of(index)`, of each such dataset."""

    noted = None

    def note(self, index):
        worker = torch.utils.data.get_worker_info()
        if worker and self.noted is not None:
            self.noted[worker.id] = torch.tensor([os.getpid(), index])


@contextmanager
def naming_files(dataset):
    """Turns what a loader process of a ReadInTurn fails by, or its death, into a InputError that names the file."""
    try:
        try:
            yield
        except (ConnectionError, EOFError):  # it died while it handed over a batch; which one did, the loader says by
            time.sleep(5)                    # a RuntimeError as soon as the system tells it, and so out of this sleep
            raise
    except InputError as error:  # of a loader process it holds a whole traceback
        raise InputError(str(error).strip().splitlines()[-1].removeprefix("InputError: ")) from error
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        if "Terminated" in str(error):  # SIGTERM to all processes, which reached this one later
            raise process.Terminated from error
        dead = set(map(int, re.findall(r"\d+", str(error))))
        files = [str(dataset.file_of(index)) for pid, index in dataset.noted.tolist() if pid in dead]
        raise InputError(f"{', '.join(files) or 'a file'}: a loader process died while it read this "
                        f"({process.one_line(error, 80)}); is it whole? for lack of memory, lower --workers") from error


# -------------------------------------------------------------------------------- segmentation: crops and augmentation
class Crops(ReadInTurn):
    """Tiles of the training fields, augmented: image (C, tile, tile) float32, mask (tile, tile) int64.

    A pass draws from each field as many random crops as tiles cover its area; published: the tiles of a grid, as
    published_tile changes them. Indices from the length on are further passes. Each crop has a random state of its own,
    from (seed, epoch, index): the same crops come with any number of workers, and after a resume.
    """

    def __init__(self, fields, tile, seed=0, published=False):
        self.fields, self.tile, self.seed, self.epoch, self.published = fields, tile, seed, 0, published
        self.owner, self.corner = [], []                               # of each tile its field, and (top, left) in it
        for i, field in enumerate(fields):
            height, width = field.mask.shape
            if published:
                corners = [(top, left) for top in range(0, height, tile) for left in range(0, width, tile)]
            else:
                corners = [None] * math.ceil(height * width / tile ** 2)  # drawn anew each time
            self.owner += [i] * len(corners)
            self.corner += corners

    def __len__(self):
        return len(self.owner)

    def __getitem__(self, index):
        self.note(index)
        rng = np.random.default_rng((self.seed, self.epoch, index))
        place = index % len(self.owner)
        field = self.fields[self.owner[place]]
        if self.published:
            image, mask = published_tile(field.image, field.mask, *self.corner[place], self.tile, rng)
        else:
            image, mask = random_crop(field.image, field.mask, self.tile, rng)
        return image, mask.long()

    def file_of(self, index):
        return self.fields[self.owner[index % len(self.owner)]].record.image


def random_crop(image, mask, tile, rng):
    """One random tile of image (C, H, W) and mask (H, W), both changed alike: place, flips, quarter turns, and for half
    of the tiles a rotation within +-ROTATION degrees. Beyond the border the field is mirrored.
    """
    angle = math.radians(rng.uniform(-ROTATION, ROTATION)) if rng.random() < 0.5 else 0.0
    # a tile turned by `angle` fits in a square of this side, so no corner is invented where the field is large enough
    side = tile if angle == 0 else math.ceil(tile * (math.cos(angle) + abs(math.sin(angle))))
    rows, columns = (_mirrored(size, side, rng) for size in mask.shape)
    if isinstance(rows, slice) and isinstance(columns, slice):
        image, mask = image[:, rows, columns], mask[rows, columns]
    else:
        rows, columns = (torch.arange(s.start, s.stop) if isinstance(s, slice) else s for s in (rows, columns))
        image, mask = image[:, rows[:, None], columns], mask[rows[:, None], columns]
    if angle:
        image, mask = _rotate(image, mask, angle, tile)
    turns, flip = int(rng.integers(4)), rng.random() < 0.5
    image, mask = image.rot90(turns, (1, 2)), mask.rot90(turns)
    if flip:
        image, mask = image.flip(2), mask.flip(1)
    return image.contiguous(), mask.contiguous()                                        # (C, tile, tile), (tile, tile)


def published_tile(image, mask, top, left, tile, rng):
    """The tile of image (C, H, W) and mask (H, W) that begins at (top, left), as the authors' notebooks have it: cut
    from a field padded with zeros, turned about its middle by up to PUBLISHED_ROTATION degrees, to the nearest pixels
    and with zeros in the corners, flipped along either axis.
    """
    image, mask = image[:, top:top + tile, left:left + tile], mask[top:top + tile, left:left + tile]
    beyond = (0, tile - mask.shape[1], 0, tile - mask.shape[0])
    image, mask = F.pad(image, beyond), F.pad(mask, beyond)
    angle = math.radians(rng.uniform(-PUBLISHED_ROTATION, PUBLISHED_ROTATION))
    image, mask = _rotate(image, mask, angle, tile, mode="nearest", beyond="zeros")
    for axis in (-2, -1):
        if rng.random() < 0.5:
            image, mask = image.flip(axis), mask.flip(axis)
    return image, mask                                                                  # (C, tile, tile), (tile, tile)


def _mirrored(size, side, rng):
    """Random window of `side` pixels along an axis of `size`: a slice, or, if too short, indices back and forth."""
    if size >= side:
        start = int(rng.integers(size - side + 1))
        return slice(start, start + side)
    start = int(rng.integers(side - size + 1)) - (side - size)
    period = max(1, 2 * (size - 1))
    index = torch.arange(start, start + side) % period
    return torch.minimum(index, period - index) if size > 1 else torch.zeros(side, dtype=torch.long)


def _rotate(image, mask, angle, tile, mode="bilinear", beyond="reflection"):
    """The tile x tile middle of a square image and mask, turned by `angle`: image by `mode`, mask nearest. beyond: what
    lies around the square, "reflection" or "zeros"."""
    side = mask.shape[-1]
    axis = (torch.arange(tile) - (tile - 1) / 2) * (2 / side)                           # in [-1, 1] of the square
    y, x = axis[:, None], axis[None, :]
    grid = torch.stack([math.cos(angle) * x - math.sin(angle) * y, math.sin(angle) * x + math.cos(angle) * y], -1)[None]
    image = F.grid_sample(image[None], grid, mode=mode, padding_mode=beyond, align_corners=False)[0]
    mask = F.grid_sample(mask[None, None].float(), grid, mode="nearest", padding_mode=beyond, align_corners=False)
    return image, mask[0, 0] > 0.5


# ------------------------------------------------------------------------ classification: pictures, augmentation, folds
def find_images(paths):
    """The image files that paths name: files, folders and patterns like "a/*.tif", of which all images are taken, but
    not the masks that lie beside inForm's. Raises InputError for one that names none."""
    found = []
    for path in paths:
        if Path(path).is_dir():
            files = sorted(Path(path).iterdir())
        else:
            files = [Path(path)] if Path(path).exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
        if Path(path).is_dir() or not Path(path).exists():
            files = [file for file in files if file.suffix.lower() in reading.IMAGES and not file.is_dir()
                     and not file.name.endswith(manifests.INFORM_MASKS)]
        if not files:
            raise InputError(f"--images {path}: names no image file ({', '.join(reading.IMAGES)})")
        found += files
    return list(dict.fromkeys(found))


@dataclass
class Labelled:
    """Records with their truth (N, classes) bool and their pictures by index, uint8 (3, S, S)."""
    records: list
    classes: list
    truth: torch.Tensor
    pictures: object


class PicturesOnDisk:
    """The records' pictures by index, uint8 (3, size, size), decoded and resized at each access. They are stretched to
    a square, as in the paper, so that nothing is cut off. interpolation: "bicubic", "bilinear" or "nearest"."""

    def __init__(self, records, size, interpolation):
        self.records, self.size, self.interpolation = records, size, v2.InterpolationMode(interpolation)

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        picture = torch.from_numpy(read_picture(self.records[index].image))
        return v2.functional.resize(picture, [self.size, self.size], self.interpolation, antialias=True)


def read_labelled(records, classes, size, interpolation="bicubic", what="pictures"):
    """Labelled of the records, size x size pixels. The pictures are read once, into one tensor; if that would take more
    than PICTURE_MEMORY they stay on disk, and are read again in each epoch.

    Raises InputError, also for a label that is none of the classes.
    """
    for record in records:
        for label in record.labels:
            if label not in classes:
                raise InputError(f"{record.image}: its label {label!r} is none of the run's, {', '.join(classes)}")
    truth = torch.tensor([[name in record.labels for name in classes] for record in records], dtype=torch.bool)
    pictures = PicturesOnDisk(records, size, interpolation)
    if len(records) * 3 * size * size <= PICTURE_MEMORY:
        kept = torch.empty(len(records), 3, size, size, dtype=torch.uint8)
        with ThreadPoolExecutor() as pool:
            read = pool.map(pictures.__getitem__, range(len(records)))
            for i, picture in enumerate(process.progress(read, f"reading {what}", total=len(records))):
                kept[i] = picture
        pictures = kept
    return Labelled(records, classes, truth, pictures)


# On uint8 tensors (3, S, S). paper: the notebook's. short: half of the pictures are flipped alone, since a network
# learns slower from random weights where all are distorted; saturation stays, since cells differ by their colour.
AUGMENTATIONS = {
    "paper": v2.Compose([
        v2.RandomApply([v2.ColorJitter(0.2, 0.2, 0.2), v2.RandomPerspective(0.2)], p=0.3),
        v2.RandomApply([v2.ColorJitter(0.2, 0.2, 0.2), v2.RandomAffine(10)], p=0.3),
        v2.RandomVerticalFlip(p=0.3), v2.RandomHorizontalFlip(p=0.3)]),
    "short": v2.Compose([
        v2.RandomApply([v2.ColorJitter(0.2, 0.2), v2.RandomPerspective(0.2),
                        v2.RandomAffine(15, translate=(0.1, 0.1), scale=(0.9, 1.1),
                                        interpolation=v2.InterpolationMode.BILINEAR)], p=0.5),
        v2.RandomVerticalFlip(), v2.RandomHorizontalFlip()])}


class AugmentedPictures(ReadInTurn):
    """Training pictures of a Labelled: uint8 (3, S, S), augmented, and their truth (classes,) float32.

    chosen: the indices that an epoch goes through. Each picture is drawn with random numbers of its own, from (seed,
    epoch, index): the same ones come with any number of workers, and after a resume.
    """

    def __init__(self, labelled, chosen, seed=0, augment=AUGMENTATIONS["paper"]):
        self.records, self.pictures, self.truth = labelled.records, labelled.pictures, labelled.truth.float()
        self.augment = augment
        self.chosen, self.seed, self.epoch = chosen, seed, 0

    def __len__(self):
        return len(self.chosen)

    def __getitem__(self, place):
        self.note(place)
        index = int(self.chosen[place])
        with torch.random.fork_rng(devices=[]):  # v2 draws from torch's own generator
            torch.random.default_generator.manual_seed(
                int(np.random.default_rng((self.seed, self.epoch, index)).integers(2 ** 63)))
            return self.augment(self.pictures[index]), self.truth[index]

    def file_of(self, place):
        return self.records[self.chosen[place]].image


def make_folds(records, count, seed=77):
    """Splits records into `count` folds, lists of indices: patients stay whole, and each fold gets, as well as that
    allows, the same number of images, of each label, and of each set of labels. Raises InputError if there are too few.

    Greedy (after Sechidis et al. 2011, "On the stratification of multi-label data"): patients, those with the rarest
    labels first, go one by one where they raise the squared deviation from equal folds least.
    """
    groups = manifests._by_patient(records)
    if len(groups) < count:
        unit = "patients, which are never split" if any(record.patient for record in records) else "images"
        raise InputError(f"--folds {count}: the training rows are of {len(groups)} {unit}; take at most {len(groups)}")
    features = [[None, tuple(sorted(record.labels)), *((label,) for label in record.labels if len(record.labels) > 1)]
                for record in records]                                  # None counts images; label sets; single labels
    names = sorted({feature for row in features for feature in row}, key=str)
    table = np.array([[row.count(name) for name in names] for row in features])                 # (images, features)
    rows = [(table[indices].sum(0), indices) for indices in groups]
    random.Random(seed).shuffle(rows)
    total = table.sum(0)
    rows.sort(key=lambda row: -(row[0] / total).max())
    folds, held = [[] for _ in range(count)], np.zeros((count, len(names)))
    for features, indices in rows:
        # what sum((held + features - total / count)^2 / total) over all folds grows by, if they go to one of them
        growth = ((2 * (held - total / count) * features + features ** 2) / total).sum(1)
        fold = int(growth.argmin())
        folds[fold] += indices
        held[fold] += features
    return [sorted(fold) for fold in folds]


if __name__ == "__main__":
    process.command(partial(folders.main, description=__doc__))
