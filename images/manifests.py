"""Data folders: rows of manifests, inForm's files without one, splits and leaks; images with their masks."""
import csv
import hashlib
import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from images.labels import as_labels
from images.reading import IMAGES, find_limits, normalise, read_image, read_mask
from running.process import InputError

SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {name: name for name in SPLITS} | {"val": "validation"}
# how the stems of files end that belong to an image; Cellpose and inForm have their own
ENDINGS = {"_mask": "mask", "_masks": "mask", "_cp_masks": "mask", "_labels": "mask", "_ignore": "ignore",
           ".tifMask": "mask", "_binary_seg_maps": "mask"}
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
    """A row of a manifest; image, mask and ignore are whole paths. Segmentation has masks, classification labels."""
    image: Path
    split: str
    patient: str = ""
    mask: Path | None = None
    ignore: Path | None = None
    labels: tuple = ()
    name: str = ""  # of the image, as the manifest or the command line has it


def find_records(folder: Path | str, seed: int = 77, problems: list | None = None, task: str = "seg",
                 needs_validation: bool = True) -> tuple[list, list]:
    """Return the records of a data folder, and lines that report how they were found and split.

    They come from the task's manifest or, without segmentation.csv, from inForm's file names or from pairs of files.
    Without validation rows, whole patients (or else images) of the training rows become validation, drawn by `seed`, if
    they are needed; a cross-validation does without. Without a manifest test rows are drawn in the same way. What is
    wrong with rows of the manifest is added to `problems`, or raised as InputError where that is None.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder (--data)")
    name, truth = MANIFESTS[task]
    manifest = folder / name
    drawn = ["validation"] if needs_validation else []
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
        if not records:
            records, lines = _paired_records(folder)
        drawn = ["test", *drawn]
    for split in drawn:
        counts = Counter(record.split for record in records)
        if not counts[split] and counts["train"] > 1:
            lines.append(move_rows(records, split, seed))
    return records, lines


def _read_manifest(manifest, truth):
    """The records of a manifest, and a line for each row of which there is none because something is wrong with it.

    truth: the column "mask" or "labels".
    """
    records = []
    problems = []
    lines = {}  # {image: its line}
    for line, row in read_csv(manifest, ("image", truth, "split"), f"image,{truth},split[,patient]"):
        try:
            record = _record(manifest.parent, row, truth)
            first = lines.setdefault(record.image, line)
            if first != line:
                raise InputError(f"image {row['image']!r} is in line {first} already; give it one row")
            records.append(record)
        except InputError as error:
            problems.append(f"{manifest}, line {line}: {error}")
    return records, problems


def _record(folder, row, truth):
    """The record of a manifest's row."""
    if row["split"] not in SPLIT_NAMES:
        raise InputError(f"split {row['split']!r} is none of {', '.join(SPLITS)}")
    split = SPLIT_NAMES[row["split"]]
    record = Record(_file(folder, row, "image"), split, row.get("patient", "").strip(), name=row["image"])
    if truth == "mask":
        record.mask = _file(folder, row, "mask")
        if row.get("ignore"):
            record.ignore = _file(folder, row, "ignore")
    else:
        labels = map(str.strip, row["labels"].split(";"))
        record.labels = tuple(dict.fromkeys(filter(None, labels)))
    return record


def _file(folder, row, column):
    """The path in a cell of a row, which must stay below the manifest's folder."""
    path = Path(row[column].replace("\\", "/"))  # as Windows writes paths
    if path.anchor or ".." in path.parts:
        raise InputError(f"{column} {row[column]!r} must be a path below the manifest's folder")
    if not (folder / path).is_file():
        raise InputError(f"{column} {row[column]!r} is not there")
    return folder / path


def read_csv(path, columns, first_line):
    """Return [(line number, {column: text})] of a CSV file that has these columns.

    Cells are separated by commas or, as some spreadsheets write, all by semicolons. Raises InputError.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        separator = max(",;", key=text.partition("\n")[0].count)
        reader = csv.DictReader(text.splitlines(), delimiter=separator, strict=True)
        rows = [(reader.line_num, row) for row in reader if any(row.values())]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: is not a CSV file in UTF-8 ({error}); spreadsheets save one as \"CSV UTF-8\""
                         ) from error
    if not rows:
        raise InputError(f"{path}: is empty; it needs a line {first_line} and one line an image")
    for column in columns:
        if reader.fieldnames.count(column) != 1:
            raise InputError(f"{path}: needs one column {column!r}: its first line is {first_line}")
    for line, row in rows:
        if None in row or None in row.values():  # so csv marks a cell too many, or too few
            raise InputError(f"{path}, line {line}: has not as many cells as the first line; put a cell that contains "
                             f"the separator in quotes")
    return rows


# ----------------------------------------------------------------------------------- folders without a manifest, splits
def _paired_records(folder):
    """Records of the images below a folder that have a mask of the same stem, in images/ and masks/ or beside it, maybe
    in folders named as splits; and lines that report them and the files left over."""
    files = defaultdict(dict)  # {(folders, stem): {"image", "mask", "ignore": path}}
    for path in sorted(folder.rglob("[!.]*.*")):
        parents = [parent.lower() for parent in path.relative_to(folder).parts[:-1]]
        predicted = path.with_name("predictions.csv").exists()  # by test.py
        if path.suffix.lower() in IMAGES and not predicted:
            stem, *ending = re.split(f"({'|'.join(ENDINGS)})$", path.stem)
            kind = ENDINGS[ending[0]] if ending else "mask" if "masks" in parents else "image"
            place = (*[parent for parent in parents if parent not in ("images", "masks")], stem)
            if kind in files[place]:
                raise InputError(f"{path}: {files[place][kind]} is its image's {kind} already; move one away")
            files[place][kind] = path
    records = []
    left = []
    for place, found in files.items():
        if found.keys() >= {"image", "mask"}:
            split = next((SPLIT_NAMES[parent] for parent in place[:-1] if parent in SPLIT_NAMES), "train")
            records.append(Record(**found, split=split, name=str(found["image"].relative_to(folder))))
        else:
            left += map(str, found.values())
    if not records:
        raise InputError(f"{folder}: holds neither segmentation.csv (image,mask,split[,patient][,ignore]), nor images "
                         f"with masks of the same names (images/a.png and masks/a.png, or a.tif and a_masks.tif), nor "
                         f"inForm files (*{COMPONENT} with masks)")
    partly = sum(record.ignore is not None for record in records)
    lines = [f"{folder}: {len(records)} images with masks, as {records[0].image} with {records[0].mask}; {partly} with "
             f"pixels to ignore"]
    if left:
        lines.append(f"left out, without a partner: {len(left)} files, {', '.join(left[:9])}")
    return records, lines


def _inform_records(folder):
    """Records of all component files below a folder that have a mask, beside them or alone of its name elsewhere, and a
    line that reports them."""
    files = defaultdict(list)
    for path in sorted(folder.rglob("*.tif")):
        files[path.name].append(path)
    images = [path for name in files if name.endswith(COMPONENT) for path in files[name]]
    records = []
    for image in images:
        masks = []
        for ending in INFORM_MASKS:
            found = files[image.name.replace(COMPONENT, ending)]
            masks += [path for path in found if len(found) == 1 or path.parent == image.parent]
        if masks:
            slide = re.sub(r"(_\[[\d.,]+\].*)?_component_data\.tif$", "", image.name)
            records.append(Record(image, PUBLISHED_SPLIT.get(slide, "train"), slide, masks[0], name=image.name))
    lines = [f"{folder}: {len(records)} of {len(images)} inForm component files have a mask; the paper's patients are "
             "split as in the paper"]
    return records, lines


def by_patient(records: list) -> list:
    """Return the records' indices, a list for each patient; an image without a patient stands for itself."""
    groups = defaultdict(list)
    for index, record in enumerate(records):
        groups[record.patient or index].append(index)
    return [groups[key] for key in sorted(groups, key=str)]


def move_rows(records, split, seed):
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
    """Return a line for each patient and each image, by its file's bytes, that is in several splits."""
    patients = _across_splits(records, lambda record: record.patient, "of the same patient")
    images = _across_splits(records, lambda record: hashlib.sha256(record.image.read_bytes()).digest(),
                            "the same image")
    return patients + images


def _across_splits(records, key, what):
    """A line for each key, if it is not empty, that records of several splits have; it names an image of each split."""
    images = defaultdict(dict)  # {key: {split: image}}
    for record in records:
        images[key(record)].setdefault(record.split, record.image)
    images.pop("", None)
    lines = []
    for of_split in images.values():
        if len(of_split) > 1:
            files = " and ".join(f"{image} ({split})" for split, image in of_split.items())
            lines.append(f"{files} are {what}: what is validated or tested was trained on")
    return lines


def class_names(records: list) -> list:
    """Return all labels of the records, sorted."""
    return sorted({label for record in records for label in record.labels})


# --------------------------------------------------------------------------------------------------------------- images
@dataclass
class Field:
    """One image with its nuclei.

    image: (C, H, W) as it is in the file. limits: what becomes 0 and 1. New images have no more. labels: (H, W) int32,
    see images/labels.py. labelled: whether the mask's file is a label image. known: (H, W) bool, False where nobody
    annotated, by the record's `ignore`.
    """
    record: Record
    image: np.ndarray
    channels: tuple
    limits: tuple
    labels: torch.Tensor | None = None
    labelled: bool = False
    known: torch.Tensor | None = None

    def __post_init__(self):
        if self.known is None:
            self.known = torch.ones((), dtype=torch.bool).expand(self.shape)  # takes no memory

    @property
    def mask(self) -> torch.Tensor:
        return self.labels > 0                            # (H, W)

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
    field = Field(record, image, names, find_limits(image))
    if record.mask:
        field.labels, field.labelled = as_labels(_read_equal(record.mask, field))
    if record.ignore:
        field.known = torch.from_numpy(_read_equal(record.ignore, field) == 0)
        if not field.known.any():
            raise InputError(f"{record.ignore}: ignores all pixels; leave this image out")
    return field


def _read_equal(file, field):
    """The values (H, W) of a mask, which must have the field's size."""
    mask = read_mask(file)
    if mask.shape != field.shape:
        raise InputError(f"{file}: the mask has {mask.shape} pixels, its image {field.record.image.name} "
                         f"{field.shape}; they must be equal")
    return mask


def inverted_masks(fields: list) -> list:
    """Return a line for each image whose nuclei cover more than half of it."""
    lines = []
    for field in fields:
        share = field.mask[field.known].float().mean()
        if share > 0.5:
            lines.append(f"{field.record.mask}: nuclei cover {share:.0%} of the pixels; is the mask inverted?")
    return lines
