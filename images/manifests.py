"""Data folders: rows of manifests, inForm's files without one, splits and leaks; fields, images with their masks."""
import csv
import hashlib
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from images import reading
from images.reading import normalise, read_image, read_mask
from running.process import InputError

SPLITS = ("train", "validation", "test")
MANIFESTS = {"seg": ("segmentation.csv", "mask"), "cls": ("classification.csv", "labels")}  # file, column of the truth
PAPER_CLASSES = ("b", "tfh", "tfh217", "tfhl", "other")  # in the order of the numbers in the paper's csv
INFORM_MASKS = ("_component_data.tifMask.tif", "_binary_seg_maps.tif")
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
    cross-validation. What is wrong with rows of the manifest is added to `problems`, or raised as InputError if that is
    None.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder (--data)")
    manifest, column = folder / MANIFESTS[task][0], MANIFESTS[task][1]
    if manifest.exists():
        records, wrong = read_manifest(manifest, column)
        said = [f"{manifest}"]
        if wrong and problems is None:
            raise InputError(wrong[0])
        problems = [] if problems is None else problems
        problems += wrong
    elif task == "cls":
        raise InputError(f"{folder}: holds no classification.csv (image,labels,split[,patient])")
    else:
        records, said = _inform_records(folder)
        if not records:
            raise InputError(f"{folder}: holds neither segmentation.csv (image,mask,split[,patient]) nor inForm files "
                            f"(*_component_data.tif with masks)")
        said += _split_patients(records, seed)
    count = {split: sum(record.split == split for record in records) for split in SPLITS}
    if needs_validation and count["validation"] == 0 and count["train"] > 1:
        said.append(move_rows(records, "validation", seed))
    return records, said


def read_manifest(manifest, truth="mask"):
    """The records of a segmentation.csv (truth "mask") or classification.csv ("labels") and a line for each row that is
    wrong. Paths are relative to the manifest and stay below its folder; an image has one row. Raises InputError for a
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
    """Raises InputError for a pipe or a device, from which one would read for ever."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise InputError(f"{path}: is no plain file")


def read_csv(path, columns, first_line):
    """[(line number, {column: text})] of a CSV file that has these columns, separated by commas or, as some
    spreadsheets write, all by semicolons or tabs. Raises InputError."""
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
        raise InputError(f"{path}: is not a CSV file in UTF-8, but in {found}, it seems; save it as \"CSV UTF-8\""
                        ) from error
    except csv.Error as error:
        raise InputError(f"{path}: is not a CSV file ({error})") from error
    names = rows[0][1] if rows else []
    if len(rows) < 2:
        raise InputError(f"{path}: is empty; it needs a line {first_line} and one line an image")
    for column in columns:
        if names.count(column) != 1:
            raise InputError(f"{path}: needs one column {column!r}: its first line is {first_line}")
    for line, row in rows:
        if len(row) != len(names):
            raise InputError(f"{path}, line {line}: has {len(row)} cells, the first line {len(names)}; a cell with the "
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
    Raises InputError, also when their sizes differ."""
    image, names = read_image(record.image, channels, None if raw else np.float32)
    mask = torch.from_numpy(read_mask(record.mask)) if record.mask else None
    if mask is not None and image.shape[1:] != mask.shape:
        raise InputError(f"{record.mask}: the mask is {size_of(mask)} pixels, its image {record.image.name} "
                        f"{size_of(image)}; they must be equal")
    if raw:
        return Field(record, image, mask, names, reading.find_limits(image))
    return Field(record, torch.from_numpy(normalise(image)), mask, names)


def size_of(array):
    return f"{array.shape[-2]}x{array.shape[-1]}"


def inverted_masks(fields):
    """A line for each field whose nuclei cover more than half of it."""
    shares = [(field, field.mask.sum().item() / field.mask.numel()) for field in fields]
    return [f"{field.record.mask}: nuclei cover {share:.0%} of the pixels; is the mask inverted?"
            for field, share in shares if share > 0.5]


def class_names(records):
    """All labels of the records, sorted."""
    return sorted({label for record in records for label in record.labels})


