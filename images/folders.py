"""Data folders made and checked: the synthetic set, imports, and `python data.py check`. The commands of data.py live
here, so that data.py keeps to what training and testing read."""
import csv
import random
import re
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from images import manifests, synthetic
from images.reading import IMAGES, channel_names, channels_first, decode_picture, read_mask, read_picture
from running import process
from running.process import InputError


# -------------------------------------------------------------------------------------------------------------- writing
def write_synthetic(folder, seed=77):
    """Writes the synthetic set: inForm-style TIFFs of eight stains with an RGB thumbnail, masks of nucleus labels, more
    thumbnails without masks, segmentation.csv and classification.csv. The same seed gives the same bytes. Raises
    InputError."""
    folder = Path(folder).resolve()
    _refuse_filled(folder)
    work = folder.with_name(folder.name + ".part")  # renamed when whole, so that an interruption leaves no half set
    work.mkdir(parents=True, exist_ok=True)
    segmentation, classification = [], []
    jobs = [(split, patient, number) for split, patients in synthetic.PATIENTS.items() for patient in patients
            for number in range(synthetic.FIELDS_PER_PATIENT + synthetic.PICTURES_PER_PATIENT)]
    for split, patient, number in process.progress(jobs, "synthetic fields", "field"):
        stains, labels, phenotypes = synthetic.draw_field(np.random.default_rng((seed, patient)),
                                                          np.random.default_rng((seed, patient, 1 + number)))
        slide = f"SYN{patient:02d}"
        name = f"{slide}_[{9000 + 400 * number},{41000 + 350 * patient}]_component_data.tif"
        if number < synthetic.FIELDS_PER_PATIENT:
            synthetic.write_inform(work / name, slide, stains)
            tifffile.imwrite(work / f"{name}Mask.tif", labels, compression="zlib", metadata=None)
            segmentation.append((name, f"{name}Mask.tif", split, slide))
        else:
            name = name.replace("component_data.tif", "thumbnail.png")
            Image.fromarray(synthetic.thumbnail(stains)).save(work / name)
        classification.append((name, ";".join(phenotypes), split, slide))
    _write_csv(work / "segmentation.csv", ("image", "mask", "split", "patient"), segmentation)
    _write_csv(work / "classification.csv", ("image", "labels", "split", "patient"), classification)
    if folder.exists():
        folder.rmdir()
    work.rename(folder)


def import_dsb2018(source, folder, seed=77):
    """Writes a data folder from the Data Science Bowl 2018 download (stage1_train/ID/images, ID/masks): grey images,
    masks of nucleus labels, segmentation.csv with 70 % / 15 % / 15 % of the fields drawn by `seed`.

    Only fluorescence fields are taken: colourless, with a dark background. Returns lines that say what was done.
    """
    source, folder = Path(source), Path(folder)
    fields = sorted(path for path in source.glob("*") if (path / "images").is_dir() and (path / "masks").is_dir())
    if not fields:
        raise InputError(f"{source}: holds no folders ID/images and ID/masks; give the download's stage1_train")
    _refuse_filled(folder)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    taken = []
    for field in process.progress(fields, "importing", "field"):
        pictures = sorted((field / "images").glob("*.png"))
        if len(pictures) != 1:
            raise InputError(f"{field / 'images'}: holds {len(pictures)} PNG files; it must be one")
        image = channels_first(decode_picture(pictures[0]))                             # (1 or 3, H, W)
        if (image != image[:1]).any() or np.median(image) > 127:
            continue
        labels = np.zeros(image.shape[1:], np.uint16)
        for number, path in enumerate(sorted((field / "masks").glob("*.png")), 1):
            mask = read_mask(path)
            if mask.shape != labels.shape:
                raise InputError(f"{path}: is {manifests.size_of(mask)} pixels, its image "
                                 f"{manifests.size_of(labels)}; they must be equal")
            labels[mask] = number
        Image.fromarray(image[0]).save(folder / "images" / f"{field.name}.png")
        Image.fromarray(labels).save(folder / "masks" / f"{field.name}.png")
        taken.append(field.name)
    random.Random(seed).shuffle(taken)
    held = round(0.15 * len(taken))
    split = ["test"] * held + ["validation"] * held + ["train"] * (len(taken) - 2 * held)
    _write_csv(folder / "segmentation.csv", ("image", "mask", "split"),
               sorted((f"images/{name}.png", f"masks/{name}.png", s) for name, s in zip(taken, split)))
    left = len(fields) - len(taken)
    return [f"{folder}: {len(taken)} fluorescence fields; {left} coloured or bright-field ones left out"]


def import_dedl_csv(csv_file, images, folder, seed=77, test_csv=None):
    """Writes a data folder from the paper's csv: columns file and label, labels like [0, 3] by place in PAPER_CLASSES.

    The files are looked for by name, with or without extension, below `images`. Those below `folder` already stay where
    they are, of others the picture that is classified is written there as PNG. The rows of `test_csv` are the test;
    without it a fifth is drawn by `seed`, whole patients (slides, in inForm's names) where there are several.
    Returns lines that say what was done.
    """
    images, folder = Path(images), Path(folder)
    if not images.is_dir():
        raise InputError(f"{images}: no such folder; give the one that holds the pictures")
    if (folder / "classification.csv").exists():
        raise InputError(f"{folder / 'classification.csv'}: is there already; give another folder")
    names, stems = {}, {}
    for path in sorted(path for path in images.rglob("*") if path.suffix.lower() in IMAGES):
        names.setdefault(path.name, []).append(path)
        stems.setdefault(path.stem, []).append(path)
    records, taken = [], set()
    for file, split in ((csv_file, "train"), (test_csv, "test")):
        for line, row in manifests.read_csv(Path(file), ("file", "label"), "file,label") if file else ():
            name = Path((row["file"]).replace("\\", "/")).name
            found = names.get(name) or stems.get(name, [])
            if len(found) != 1:
                raise InputError(f"{file}, line {line}: {len(found)} images below {images} are named {name!r}; there "
                                f"must be one")
            if not re.fullmatch(r"\s*\[\s*(\d+\s*(,\s*\d+\s*)*)?\]\s*", row["label"]):
                raise InputError(f"{file}, line {line}: label {row['label']!r} is not a list of numbers like [0, 3]")
            numbers = sorted({int(number) for number in re.findall(r"\d+", row["label"])})
            if numbers and numbers[-1] >= len(manifests.PAPER_CLASSES):
                raise InputError(f"{file}, line {line}: label {row['label']} has a number above "
                                 f"{len(manifests.PAPER_CLASSES) - 1}; the classes are "
                                 f"{', '.join(manifests.PAPER_CLASSES)}")
            if found[0] in taken:
                raise InputError(f"{file}, line {line}: file {name!r} has a row already; give it one")
            taken.add(found[0])
            labels = tuple(manifests.PAPER_CLASSES[n] for n in numbers)
            records.append(manifests.Record(found[0], split, manifests.slide_of(found[0]), labels=labels))
    said = [] if test_csv or len(records) < 2 else [manifests.move_rows(records, "test", seed)]
    if not any(record.patient for record in records):
        said.append("no patient is told by the names (SLIDE_[x,y]...): images of one patient may be in train and test")
    for record in process.progress(records, "importing"):
        if not record.image.resolve().is_relative_to(folder.resolve()):
            picture = Image.fromarray(np.moveaxis(read_picture(record.image), 0, -1))
            record.image = folder / "images" / f"{record.image.name}.png"
            record.image.parent.mkdir(parents=True, exist_ok=True)
            picture.save(record.image)
    _write_csv(folder / "classification.csv", ("image", "labels", "split", "patient"),
               [(record.image.resolve().relative_to(folder.resolve()).as_posix(), ";".join(record.labels), record.split,
                 record.patient) for record in records])
    return [f"{folder}: {len(records)} images", *said]


def _refuse_filled(folder):
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: is there already; give a new or empty folder")


def _write_csv(path, columns, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


# ------------------------------------------------------------------------------------------------------------- checking
def check(folder, channels=("DAPI",)):
    """What is in a data folder: (lines that describe it, some of them with a NOTE; a line for each thing that is
    wrong)."""
    folder, lines, problems = Path(folder), [], []
    for task in [task for task, (file, _) in manifests.MANIFESTS.items() if (folder / file).is_file()] or ["seg"]:
        _check_task(folder, task, channels, lines, problems)
    return lines, list(dict.fromkeys(problems))


def _check_task(folder, task, channels, lines, problems):
    """Adds to lines and problems what a data folder holds for one task."""
    records, said = manifests.find_records(folder, problems=problems, task=task, needs_validation=task == "seg")
    lines += said
    problems += manifests.leaks(records)
    lines += [f"NOTE {line}" for line in manifests.class_notes(records)]
    classes, kinds, images = manifests.class_names(records), {}, {}  # {names of channels: sizes}, {number: files}
    for split in manifests.SPLITS:
        rows = [record for record in records if record.split == split]
        patients = sorted({record.patient for record in rows if record.patient})
        lines.append(f"{split}: {len(rows)} images" + (f" of {len(patients)} patients" if patients else ""))
        train_rows = sum(record.split == "train" for record in records)
        if not rows and split == "train":
            problems.append("there are no rows of split train")
        elif not rows and (task, split) == ("seg", "validation") and train_rows == 1:  # of more some are drawn
            problems.append("there are no rows of split validation; one image cannot train and validate")
        elif not rows and (task, split) != ("cls", "validation"):
            lines.append(f"NOTE there are no rows of split {split}")
        counts = {name: sum(name in record.labels for record in rows) for name in classes}
        if task == "cls":
            lines.append("  " + ", ".join(f"{name} {count}" for name, count in counts.items()) +
                         f"; {sum(not record.labels for record in rows)} without any label")
        if split == "train":
            problems += [f"label {name!r} has no training image: it cannot be learnt" for name in classes
                         if not counts[name]]
        nuclei = pixels = 0
        for record in process.progress(rows, f"reading {split}"):
            try:
                field = manifests.read_field(record, channels) if task == "seg" else None
                image = field.image if field else read_picture(record.image)
            except InputError as error:
                problems.append(str(error))
                continue
            kinds.setdefault(field.channels if field else ("RGB",), set()).add(manifests.size_of(image))
            images.setdefault(len(image), []).append(record.image)
            if image.min() == image.max():
                problems.append(f"{record.image}: the image is constant; nothing can be seen in it")
            if field:
                lines += [f"NOTE {line}" for line in manifests.inverted_masks([field])]
                nuclei, pixels = nuclei + int(field.mask.sum()), pixels + field.mask.numel()
                if not field.mask.any():
                    problems.append(f"{record.mask}: the mask is empty; is there really no nucleus in this field?")
        if pixels:
            lines.append(f"  {nuclei / pixels:.1%} of the pixels are nucleus")
    for names, sizes in kinds.items():
        lines.append(f"channels {', '.join(names)}; sizes {', '.join(sorted(sizes)[:8])}"
                     f"{' ...' if len(sizes) > 8 else ''}")
    usual = max(images, key=lambda number: len(images[number]), default=None)
    problems += [f"{files[0]}: has {number} channels, most images have {usual}; a network takes one number"
                 for number, files in images.items() if number != usual]


# --------------------------------------------------------------------------------------------------------- command line
def main(argv=None, description=None):
    parser = process.Parser(description=description)
    commands = parser.add_subparsers(dest="command", required=True)
    built_in = commands.add_parser("synthetic", description="Writes the built-in synthetic set to a new folder.")
    built_in.add_argument("out", metavar="OUT", type=Path)
    dsb2018 = commands.add_parser("dsb2018", description="Imports the Data Science Bowl 2018 download.")
    dsb2018.add_argument("source", metavar="STAGE1_TRAIN", type=Path)
    dsb2018.add_argument("out", metavar="OUT", type=Path)
    dedl_csv = commands.add_parser("dedl-csv", description="Imports the paper's csv: file,label; labels like [0, 3].")
    dedl_csv.add_argument("csv", metavar="CSV", type=Path)
    dedl_csv.add_argument("images", metavar="IMAGES", type=Path, nargs="?", help="where its files lie [beside the csv]")
    dedl_csv.add_argument("out", metavar="OUT", type=Path)
    dedl_csv.add_argument("--test", metavar="CSV", type=Path, help="the csv of the test images [a fifth is drawn]")
    for command in (built_in, dsb2018, dedl_csv):
        command.add_argument("--seed", type=process.SEED, default=77, help="[77]")
    checks = commands.add_parser("check", description="Says what is found in a data folder, and what is wrong with it.")
    checks.add_argument("dir", metavar="DIR", type=Path)
    checks.add_argument("--channel", default="DAPI", help="pages of multi-page TIFFs, by name [DAPI]")
    args = parser.parse_args(argv)
    if args.command == "synthetic":
        write_synthetic(args.out, args.seed)
        print(f"{args.out}: written; look at it with: python data.py check {args.out}")
    elif args.command == "dsb2018":
        print(*import_dsb2018(args.source, args.out, args.seed), sep="\n")
    elif args.command == "dedl-csv":
        print(*import_dedl_csv(args.csv, args.images or args.csv.parent, args.out, args.seed, args.test), sep="\n")
    else:
        lines, problems = check(args.dir, channel_names(args.channel))
        print(*lines, *(f"PROBLEM {problem}" for problem in problems), sep="\n")
        if problems:
            process.fail(f"{args.dir}: {len(problems)} problems, listed above")
        print("no problems found")
