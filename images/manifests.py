"""Data folders: rows of manifests, inForm's files without one, splits and leaks; images with their masks."""
import csv
import hashlib
import os
import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from images.reading import find_limits, normalise, read_image, read_mask
from running.process import InputError

SPLITS = ("train", "validation", "test")
MANIFESTS = {"seg": ("segmentation.csv", "mask"), "cls": ("classification.csv", "labels")}  # file, column of the truth
COMPONENT = "_component_data.tif"                        # how inForm's image files end, and their masks:
INFORM_MASKS = (f"{COMPONENT}Mask.tif", "_binary_seg_maps.tif")
VALIDATION_SHARE = 0.2  # of the training images, where a data folder names no validation rows
PUBLISHED_SPLIT = {     # of the paper's private set, by patient
    "121919_Myo089": "train",
    "121919_Myo253": "train",
    "121919_Myo368": "train",
    "121919_Myo208": "validation",
    "121919_Myo388": "validation",
    "121919_Myo231": "test",
    "121919_Myo511": "test",
}


# ------------------------------------------------------------------------------------------------------------ manifests
@dataclass
class Record:
    """A row of a manifest; image and mask are whole paths. Segmentation has masks, classification labels."""
    image: Path
    split: str
    patient: str = ""
    mask: Path | None = None
    labels: tuple = ()
    name: str = ""  # of the image, as the manifest or the command line has it


def find_records(
    folder: Path | str,
    seed: int = 77,
    problems: list | None = None,
    task: str = "seg",
    needs_validation: bool = True,
) -> tuple[list, list]:
    """Return the records of a data folder, and lines that report how they were found and split.

    They come from the task's manifest or, without segmentation.csv, from inForm's file names. Without validation rows,
    whole patients (or else images) of the training rows become validation, drawn by `seed`, if they are needed; a
    cross-validation does without. What is wrong with rows of the manifest is added to `problems`, or raised as
    InputError where that is None.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder (--data)")
    name, truth = MANIFESTS[task]
    manifest = folder / name
    if manifest.exists():
        records, wrong = _read_manifest(manifest, truth)
        lines = [f"{manifest}"]
        if problems is not None:
            problems += wrong
        elif wrong:
            raise InputError(wrong[0])
    elif task == "cls":
        raise InputError(f"{folder}: holds no classification.csv (image,labels,split[,patient])")
    else:
        records, lines = _inform_records(folder)
        lines += _split_patients(records, seed)
    splits = Counter(record.split for record in records)
    if needs_validation and not splits["validation"] and splits["train"] > 1:
        lines.append(move_rows(records, "validation", seed))
    return records, lines


def _read_manifest(manifest, truth):
    """The records of a manifest, whose paths stay below its folder, and a line for each thing that is wrong in a row.

    truth: the column "mask" or "labels".
    """
    files = ("image", "mask") if truth == "mask" else ("image",)
    records, problems, seen = [], [], {}
    for line, row in read_csv(manifest, ("image", truth, "split"), f"image,{truth},split[,patient]"):
        wrong = []
        if row["split"] not in SPLITS:
            wrong.append(f"split {row['split']!r} is none of {', '.join(SPLITS)}")
        for column in files:
            row[column] = row[column].replace("\\", "/")  # as Windows writes paths
            path = Path(row[column])
            if path.anchor or ".." in path.parts:
                wrong.append(f"{column} {row[column]!r} must be a path below the manifest's folder")
            elif not os.path.isfile(manifest.parent / path):
                wrong.append(f"{column} {row[column]!r} is not there")
        first = seen.setdefault(Path(row["image"]), line)
        if first != line:
            wrong.append(f"image {row['image']!r} is in line {first} already; give it one row")
        problems += [f"{manifest}, line {line}: {what}" for what in wrong]
        if not wrong:
            record = Record(manifest.parent / row["image"], row["split"], name=row["image"])
            record.patient = row.get("patient", "").strip()
            if truth == "mask":
                record.mask = manifest.parent / row["mask"]
            else:
                labels = map(str.strip, row["labels"].split(";"))
                record.labels = tuple(dict.fromkeys(filter(None, labels)))
            records.append(record)
    return records, problems


def read_csv(path: Path, columns: tuple, first_line: str) -> list:
    """Return [(line number, {column: text})] of a CSV file that has these columns.

    Cells are separated by commas or, as some spreadsheets write, all by semicolons or tabs. Raises InputError.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        first = text.partition("\n")[0]
        separator = max(",;\t", key=first.count)
        reader = csv.reader(text.splitlines(True), delimiter=separator, strict=True)
        rows = [(reader.line_num, row) for row in reader if any(row)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: is not a CSV file in UTF-8 ({error}); spreadsheets save one as \"CSV UTF-8\""
                         ) from error
    if len(rows) < 2:
        raise InputError(f"{path}: is empty; it needs a line {first_line} and one line an image")
    names = rows[0][1]
    for column in columns:
        if names.count(column) != 1:
            raise InputError(f"{path}: needs one column {column!r}: its first line is {first_line}")
    for line, row in rows:
        if len(row) != len(names):
            raise InputError(f"{path}, line {line}: has {len(row)} cells, the first line {len(names)}; put a cell that "
                             f"contains the separator in quotes")
    return [(line, dict(zip(names, row))) for line, row in rows[1:]]


# ------------------------------------------------------------------------------------------------- inForm files, splits
def _inform_records(folder):
    """Records of all component files below a folder that have a mask, beside them or alone of its name elsewhere."""
    files = defaultdict(list)
    for path in sorted(folder.rglob("*.tif")):
        files[path.name].append(path)
    images = [path for name in files if name.endswith(COMPONENT) for path in files[name]]
    records = []
    for image in images:
        masks = []
        for ending in INFORM_MASKS:
            found = files.get(image.name.replace(COMPONENT, ending), [])
            masks += [path for path in found if len(found) == 1 or path.parent == image.parent]
        if masks:
            slide = re.sub(r"(_\[[\d.,]+\].*)?_component_data\.tif$", "", image.name)
            records.append(Record(image, "train", slide, masks[0]))
    if not records:
        raise InputError(f"{folder}: holds neither segmentation.csv (image,mask,split[,patient]) nor inForm files "
                         f"(*{COMPONENT} with masks)")
    lines = [f"{folder}: {len(records)} inForm component files with masks"]
    if len(records) < len(images):
        lines.append(f"{len(images) - len(records)} component files have no mask and are left out")
    return records, lines


def _split_patients(records, seed):
    """The published split where all slides are the published patients', else a fifth of the patients for the test."""
    if all(record.patient in PUBLISHED_SPLIT for record in records):
        for record in records:
            record.split = PUBLISHED_SPLIT[record.patient]
        return ["split by patient as in the paper"]
    return [move_rows(records, "test", seed)] if len(records) > 1 else []


def by_patient(records: list) -> list:
    """Return the records' indices, a list for each patient; an image without a patient stands for itself."""
    groups = defaultdict(list)
    for index, record in enumerate(records):
        groups[record.patient or index].append(index)
    return [groups[key] for key in sorted(groups, key=str)]


def move_rows(records: list, split: str, seed: int) -> str:
    """Move VALIDATION_SHARE of two or more training records to another split; return a line that reports it.

    Whole patients are moved where there are several of several images.
    """
    train = [record for record in records if record.split == "train"]
    groups = by_patient(train)
    unit = "patients"
    if len(groups) in (1, len(train)):
        groups = [[index] for index in range(len(train))]
        unit = "images"
    random.Random(seed).shuffle(groups)
    moved = []
    for group in groups:
        if len(moved) + len(group) <= VALIDATION_SHARE * len(train):
            moved += group
    moved = moved or min(groups, key=len)
    for index in moved:
        train[index].split = split
    return f"no {split} rows: {len(moved)} of {len(train)} training images became it, by whole {unit}, seed {seed}"


# ------------------------------------------------------------------------------------------------------------- warnings
def leaks(records: list) -> list:
    """Return a line for each patient and each image, by its file's bytes, that is in two splits."""
    what = "what is validated or tested was trained on"
    lines = []
    for group in _across_splits(records, lambda record: record.patient):
        splits = dict.fromkeys(record.split for record in group)
        lines.append(f"patient {group[0].patient} is in several splits, {', '.join(splits)}: {what}")
    for same_size in _across_splits(records, lambda record: record.image.stat().st_size):
        for same in _across_splits(same_size, lambda record: hashlib.sha256(record.image.read_bytes()).digest()):
            files = " and ".join(f"{record.image} ({record.split})" for record in same)
            lines.append(f"{files} are the same image: {what}")
    return lines


def _across_splits(records, key):
    """Lists of the records with the same key, if it is not empty, that are in several splits."""
    groups = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    groups.pop("", None)
    return [group for group in groups.values() if len({record.split for record in group}) > 1]


def class_names(records: list) -> list:
    """Return all labels of the records, sorted."""
    return sorted({label for record in records for label in record.labels})


# --------------------------------------------------------------------------------------------------------------- images
@dataclass
class Field:
    """One image with its mask.

    image: (C, H, W) as it is in the file. mask: (H, W) bool, None for new images. limits: what becomes 0 and 1.
    """
    record: Record
    image: np.ndarray
    mask: torch.Tensor | None
    channels: tuple
    limits: tuple

    @property
    def shape(self) -> tuple:
        return self.image.shape[1:]                       # (H, W)

    def window(self, rows=slice(None), columns=slice(None)) -> torch.Tensor:
        """Return a part of the image, float32 (C, h, w) in [0, 1]; rows and columns: slices or arrays of indices."""
        part = self.image[:, rows][:, :, columns]
        return torch.from_numpy(normalise(part, self.limits))


def read_field(record: Record, channels: tuple = ("DAPI",)) -> Field:
    """Read a record's image and, where it has one, its mask. Raises InputError, also where their sizes differ."""
    image, names = read_image(record.image, channels)
    mask = None
    if record.mask:
        mask = torch.from_numpy(read_mask(record.mask))
        if mask.shape != image.shape[1:]:
            raise InputError(f"{record.mask}: the mask is {size_of(mask)} pixels, its image {record.image.name} "
                             f"{size_of(image)}; they must be equal")
    return Field(record, image, mask, names, find_limits(image))


def size_of(array: np.ndarray | torch.Tensor) -> str:
    return f"{array.shape[-2]}x{array.shape[-1]}"


def inverted_masks(fields: list) -> list:
    """Return a line for each image whose nuclei cover more than half of it."""
    lines = []
    for field in fields:
        share = field.mask.float().mean()
        if share > 0.5:
            lines.append(f"{field.record.mask}: nuclei cover {share:.0%} of the pixels; is the mask inverted?")
    return lines
