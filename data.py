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
import csv
import glob
import hashlib
import math
import os
import random
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

import process
import reading
from reading import DataError, normalise, read_image, read_mask, read_picture

SPLITS = ("train", "validation", "test")
MANIFESTS = {"seg": ("segmentation.csv", "mask"), "cls": ("classification.csv", "labels")}  # file, column of the truth
PAPER_CLASSES = ("b", "tfh", "tfh217", "tfhl", "other")  # in the order of the numbers in the paper's csv
INFORM_MASKS = ("_component_data.tifMask.tif", "_binary_seg_maps.tif")
PICTURE_MEMORY = 4 << 30      # bytes; pictures to classify are kept in memory up to here
PART_PIXELS = 1 << 25         # of fields to be predicted, read at a time; a larger one alone
ROTATION = 10                 # degrees
PUBLISHED_ROTATION = 3        # degrees, of the authors' notebooks
VALIDATION_SHARE = 0.2        # of the training images, where a data folder names no validation rows
PUBLISHED_PATIENTS = {        # the paper's split of its private set
    "train": ("121919_Myo089", "121919_Myo253", "121919_Myo368"),
    "validation": ("121919_Myo208", "121919_Myo388"), "test": ("121919_Myo231", "121919_Myo511")}


# ------------------------------------------------------------------------------------------------------------ manifests
@dataclass
class Record:
    """One row of a manifest; image and mask are whole paths. Segmentation has masks, classification labels."""
    image: Path
    split: str
    patient: str = ""
    mask: Path | None = None
    labels: tuple = ()
    name: str = ""  # of the image, as the manifest or the command line has it


def find_records(folder, seed=77, problems=None, task="seg", needs_validation=True):
    """The records of a data folder and a list of lines that say how they were found and split.

    From the task's manifest; without segmentation.csv from inForm's file names. Without validation rows, whole patients
    (or else images) of the training rows become validation, drawn by `seed`, unless they are not needed, as in a
    cross-validation. What is wrong with rows of the manifest is added to `problems`, or raised as DataError if that is
    None.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder (--data)")
    manifest, column = folder / MANIFESTS[task][0], MANIFESTS[task][1]
    if manifest.exists():
        records, wrong = read_manifest(manifest, column)
        said = [f"{manifest}"]
        if wrong and problems is None:
            raise DataError(wrong[0])
        problems = [] if problems is None else problems
        problems += wrong
    elif task == "cls":
        raise DataError(f"{folder}: holds no classification.csv (image,labels,split[,patient])")
    else:
        records, said = _inform_records(folder)
        if not records:
            raise DataError(f"{folder}: holds neither segmentation.csv (image,mask,split[,patient]) nor inForm files "
                            f"(*_component_data.tif with masks)")
        said += _split_patients(records, seed)
    count = {split: sum(record.split == split for record in records) for split in SPLITS}
    if needs_validation and count["validation"] == 0 and count["train"] > 1:
        said.append(move_rows(records, "validation", seed))
    return records, said


def read_manifest(manifest, truth="mask"):
    """The records of a segmentation.csv (truth "mask") or classification.csv ("labels") and a line for each row that is
    wrong. Paths are relative to the manifest and stay below its folder; an image has one row. Raises DataError for a
    file that is no such manifest."""
    rows = read_csv(manifest, ("image", truth, "split"), f"image,{truth},split[,patient]")
    records, problems, seen = [], [], {}
    for line, row in rows:
        for column in {"image", "mask"} & set(row):
            row[column] = row[column].replace("\\", "/")  # as Windows writes paths
        wrong = []
        if row["split"] not in SPLITS:
            wrong.append(f"split {row['split']!r} is none of {', '.join(SPLITS)}")
        first, split = seen.setdefault(Path(row["image"]), (line, row["split"]))
        if first != line:
            leak = "" if split == row["split"] else ", so that what is tested was trained on"
            wrong.append(f"image {row['image']!r} is in line {first} already, of split {split}{leak}; give it one row")
        for column in ("image", "mask") if truth == "mask" else ("image",):
            path = Path(row[column])
            if not row[column] or path.is_absolute() or ".." in path.parts:
                wrong.append(f"{column} {row[column]!r} must be a path below the manifest's folder")
            elif not _is_file(manifest.parent / path):
                wrong.append(f"{column} {row[column]!r} is not there")
        problems += [f"{manifest}, line {line}: {what}" for what in wrong]
        if not wrong:
            record = Record(manifest.parent / row["image"], row["split"], row.get("patient", "").strip(),
                            name=row["image"])
            if truth == "mask":
                record.mask = manifest.parent / row["mask"]
            else:
                record.labels = tuple(dict.fromkeys(filter(None, map(str.strip, row["labels"].split(";")))))
            records.append(record)
    return records, problems


def _is_file(path):
    try:
        return path.is_file()
    except (ValueError, OSError):  # a NUL in the name, or a longer one than there can be
        return False


def refuse_special(path):
    """Raises DataError for a pipe or a device, from which one would read for ever."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise DataError(f"{path}: is no plain file")


def read_csv(path, columns, first_line):
    """[(line number, {column: text})] of a CSV file that has these columns, separated by commas or, as some
    spreadsheets write, all by semicolons or tabs. Raises DataError."""
    refuse_special(path)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            separator = next((mark for mark in ",\t;" if mark in first), ",")
            reader = csv.reader(file, delimiter=separator, strict=True)
            rows = [(reader.line_num, row) for row in reader if any(row)]
    except UnicodeDecodeError as error:
        with open(path, "rb") as file:
            found = "UTF-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "Windows-1252 (cp1252)"
        raise DataError(f"{path}: is not a CSV file in UTF-8, but in {found}, it seems; save it as \"CSV UTF-8\""
                        ) from error
    except csv.Error as error:
        raise DataError(f"{path}: is not a CSV file ({error})") from error
    names = rows[0][1] if rows else []
    if len(rows) < 2:
        raise DataError(f"{path}: is empty; it needs a line {first_line} and one line an image")
    for column in columns:
        if names.count(column) != 1:
            raise DataError(f"{path}: needs one column {column!r}: its first line is {first_line}")
    for line, row in rows:
        if len(row) != len(names):
            raise DataError(f"{path}, line {line}: has {len(row)} cells, the first line {len(names)}; a cell with the "
                            f"separator in it must stand in quotes")
    return [(line, dict(zip(names, row))) for line, row in rows[1:]]


def leaks(records):
    """A line for each patient, and each picture (by its file's bytes), that is in two splits."""
    def groups(rows, key):
        found = {}
        for row in rows:
            found.setdefault(key(row), []).append(row)
        return [group for group in found.values() if len({row.split for row in group}) > 1]

    def digest(row, size):
        with open(row.image, "rb") as file:
            return hashlib.sha256(file.read(size)).digest()

    what = "what is validated or tested was trained on"
    lines = []
    for group in groups([row for row in records if row.patient], lambda row: row.patient):
        splits = ", ".join(dict.fromkeys(row.split for row in group))
        lines.append(f"patient {group[0].patient} is in several splits, {splits}: {what}")
    # files of different sizes are not read, those with another beginning not further
    alike = groups(records, lambda row: row.image.stat().st_size)
    for size in (1 << 16, -1):
        alike = [same for group in alike for same in groups(group, lambda row, size=size: digest(row, size))]
    for first, *others in alike:
        other = next(row for row in others if row.split != first.split)
        lines.append(f"{first.image} ({first.split}) and {other.image} ({other.split}) are the same picture: {what}")
    return lines


def class_notes(records):
    """A line for each group of classes that differ only in case or spaces, and for each class with a single image."""
    counts = Counter(label for record in records for label in record.labels)
    spellings = {}
    for name in sorted(counts):
        spellings.setdefault("".join(name.split()).casefold(), []).append(name)
    lines = [f"classes {', '.join(map(repr, names))} differ only in case or spaces; are they one?"
             for names in spellings.values() if len(names) > 1]
    return lines + [f"class {name!r} has a single image; is it meant? (a ';' in a cell separates labels)"
                    for name, count in sorted(counts.items()) if count == 1]


def _inform_records(folder):
    """Records of all *_component_data.tif below a folder that have a mask, beside them or alone of its name elsewhere.
    The slide, the name before _[x,y], is the patient."""
    files = {}
    for path in sorted(folder.rglob("*.tif")):
        files.setdefault(path.name, []).append(path)
    images = [path for name in files if name.endswith("_component_data.tif") for path in files[name]]
    records = []
    for image in images:
        names = [image.name.replace("_component_data.tif", mask) for mask in INFORM_MASKS]
        masks = [path for name in names for path in files.get(name, []) if len(files[name]) == 1 or
                 path.parent == image.parent]
        if masks:
            slide = slide_of(image)
            records.append(Record(image, "train", slide, masks[0]))
    said = [f"{folder}: {len(records)} inForm component files with masks"]
    if len(records) < len(images):
        said.append(f"{len(images) - len(records)} component files have no mask and are left out")
    return records, said


def slide_of(image):
    """The slide an inForm file is of: its name up to _[x,y] or _component_data.tif; "" for another program's names."""
    match = re.match(r"(.+?)(_\[[\d.,]+\].*|_component_data\.tif)$", image.name)
    return match[1] if match else ""


def _by_patient(records):
    """Indices of the records, in a list for each patient; an image without a patient stands for itself."""
    groups = {}
    for index, record in enumerate(records):
        groups.setdefault(record.patient or index, []).append(index)
    return [groups[key] for key in sorted(groups, key=str)]


def _split_patients(records, seed):
    """The published split where the slides are the published patients', else a fifth of the patients for the test."""
    split_of = {patient: split for split, patients in PUBLISHED_PATIENTS.items() for patient in patients}
    if all(record.patient in split_of for record in records):
        for record in records:
            record.split = split_of[record.patient]
        return ["split by patient as in the paper"]
    return [move_rows(records, "test", seed)] if len(records) > 1 else []


def move_rows(records, split, seed):
    """Moves VALIDATION_SHARE of two or more training records to another split, whole patients where there are several.
    Returns a line that says so."""
    train = [record for record in records if record.split == "train"]
    groups, unit = [[train[i] for i in group] for group in _by_patient(train)], "patients"
    if len(groups) < 2 or len(groups) == len(train):
        groups, unit = [[record] for record in train], "images"
    random.Random(seed).shuffle(groups)
    moved = []
    for group in groups:
        if len(moved) + len(group) <= VALIDATION_SHARE * len(train):
            moved += group
    moved = moved or min(groups, key=len)
    for record in moved:
        record.split = split
    return f"no {split} rows: {len(moved)} of {len(train)} training images became it, by whole {unit}, seed {seed}"


# --------------------------------------------------------------------------------------------------------------- fields
@dataclass
class Field:
    """One image with its mask: image (C, H, W) float32 in [0, 1]; or, with `limits`, as its file has it, normalised by
    them where it is looked at: a quarter of the memory. mask (H, W) bool, None of new images."""
    record: Record
    image: torch.Tensor | np.ndarray
    mask: torch.Tensor | None
    channels: tuple
    limits: tuple | None = None

    @property
    def shape(self):
        return tuple(self.image.shape[1:])                                                                # (H, W)

    def window(self, rows=slice(None), columns=slice(None)):
        """A part of the image, float32 (C, h, w) in [0, 1]."""
        part = self.image[:, rows, columns]
        return part if self.limits is None else torch.from_numpy(normalise(part, self.limits))


def read_field(record, channels=("DAPI",), raw=False):
    """Reads a record's image and, where it has one, mask. raw: the image is normalised by Field.window, part by part.
    Raises DataError, also when their sizes differ."""
    image, names = read_image(record.image, channels, None if raw else np.float32)
    mask = torch.from_numpy(read_mask(record.mask)) if record.mask else None
    if mask is not None and image.shape[1:] != mask.shape:
        raise DataError(f"{record.mask}: the mask is {size_of(mask)} pixels, its image {record.image.name} "
                        f"{size_of(image)}; they must be equal")
    if raw:
        return Field(record, image, mask, names, reading.find_limits(image))
    return Field(record, torch.from_numpy(normalise(image)), mask, names)


def read_fields(records, channels=("DAPI",), what="images"):
    """All fields of the records, read once and kept in memory, in the records' order. Raises DataError."""
    with ThreadPoolExecutor() as pool:  # decoders release the interpreter's lock
        read = pool.map(lambda record: read_field(record, channels), records)
        fields = list(process.progress(read, f"reading {what}", total=len(records)))
    usual = Counter(len(field.image) for field in fields).most_common(1)[0][0]
    first = next(field for field in fields if len(field.image) == usual)
    for field in fields:
        if len(field.image) != len(first.image):
            raise DataError(f"{field.record.image}: has {len(field.image)} channels, {first.record.image.name} has "
                            f"{len(first.image)}; all images of a data folder must have as many")
        if stains(channels, field.channels) != stains(channels, first.channels):
            raise DataError(f"{field.record.image}: the pages {', '.join(channels)} (--channel) are "
                            f"{', '.join(field.channels)}, in {first.record.image.name} {', '.join(first.channels)}; "
                            f"give names, or files with the same pages")
    return fields


def inverted_masks(fields):
    """A line for each field whose nuclei cover more than half of it."""
    shares = [(field, field.mask.sum().item() / field.mask.numel()) for field in fields]
    return [f"{field.record.mask}: nuclei cover {share:.0%} of the pixels; is the mask inverted?"
            for field, share in shares if share > 0.5]


def read_in_parts(records, channels=("DAPI",), most=None):
    """Reads fields raw, some at a time, as many as have `most` pixels together, PART_PIXELS if it is None, or one that
    is larger: yields lists of each record's Field, or the DataError of reading it, in the records' order."""
    def read(record):
        try:
            return read_field(record, channels, raw=True)
        except DataError as error:
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


def size_of(array):
    return f"{array.shape[-2]}x{array.shape[-1]}"


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
    """Turns what a loader process of a ReadInTurn fails by, or its death, into a DataError that names the file."""
    try:
        try:
            yield
        except (ConnectionError, EOFError):  # it died while it handed over a batch; which one did, the loader says by
            time.sleep(5)                    # a RuntimeError as soon as the system tells it, and so out of this sleep
            raise
    except DataError as error:  # of a loader process it holds a whole traceback
        raise DataError(str(error).strip().splitlines()[-1].removeprefix("reading.DataError: ")) from error
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        if "Terminated" in str(error):  # SIGTERM to all processes, which reached this one later
            raise process.Terminated from error
        dead = set(map(int, re.findall(r"\d+", str(error))))
        files = [str(dataset.file_of(index)) for pid, index in dataset.noted.tolist() if pid in dead]
        raise DataError(f"{', '.join(files) or 'a file'}: a loader process died while it read this "
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
def class_names(records):
    """All labels of the records, sorted."""
    return sorted({label for record in records for label in record.labels})


def find_images(paths):
    """The image files that paths name: files, folders and patterns like "a/*.tif", of which all images are taken, but
    not the masks that lie beside inForm's. Raises DataError for one that names none."""
    found = []
    for path in paths:
        if Path(path).is_dir():
            files = sorted(Path(path).iterdir())
        else:
            files = [Path(path)] if Path(path).exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
        if Path(path).is_dir() or not Path(path).exists():
            files = [file for file in files if file.suffix.lower() in reading.IMAGES and not file.is_dir()
                     and not file.name.endswith(INFORM_MASKS)]
        if not files:
            raise DataError(f"--images {path}: names no image file ({', '.join(reading.IMAGES)})")
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

    Raises DataError, also for a label that is none of the classes.
    """
    for record in records:
        for label in record.labels:
            if label not in classes:
                raise DataError(f"{record.image}: its label {label!r} is none of the run's, {', '.join(classes)}")
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
    allows, the same number of images, of each label, and of each set of labels. Raises DataError if there are too few.

    Greedy (after Sechidis et al. 2011, "On the stratification of multi-label data"): patients, those with the rarest
    labels first, go one by one where they raise the squared deviation from equal folds least.
    """
    groups = _by_patient(records)
    if len(groups) < count:
        unit = "patients, which are never split" if any(record.patient for record in records) else "images"
        raise DataError(f"--folds {count}: the training rows are of {len(groups)} {unit}; take at most {len(groups)}")
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
    import folders  # imports this file, as `data`
    process.command(folders.main, errors=(folders.data.DataError,))
