"""Data folders made and checked: the synthetic set, imports, `python data.py check`, the command line of data.py."""
import random
from collections import Counter
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from images import manifests, synthetic
from images.reading import channel_names, read_image, read_mask, read_rgb
from running.process import SEED, InputError, Parser, progress, save_csv


# -------------------------------------------------------------------------------------------------------------- writing
def write_synthetic(folder: Path, seed: int = 77) -> None:
    """Write the synthetic set: the same seed gives the same bytes. Raises InputError.

    It has inForm-style TIFFs of eight stains with an RGB thumbnail, label images as masks, more thumbnails without
    masks, segmentation.csv and classification.csv.
    """
    _prepare(folder / "segmentation.csv")
    segmentation = []
    classification = []
    for patient, split in enumerate(progress(synthetic.PATIENTS, "synthetic patients"), 1):
        slide = f"SYN{patient:02d}"
        for number in range(synthetic.FIELDS_PER_PATIENT + synthetic.PICTURES_PER_PATIENT):
            stains, labels, phenotypes = synthetic.draw_field(
                np.random.default_rng((seed, patient)),
                np.random.default_rng((seed, patient, 1 + number))
            )
            stem = f"{slide}_[{9000 + 400 * number},{41000 + 350 * patient}]"
            if number < synthetic.FIELDS_PER_PATIENT:
                name = f"{stem}_component_data.tif"
                mask = f"{name}Mask.tif"
                synthetic.write_inform(folder / name, slide, stains)
                tifffile.imwrite(folder / mask, labels, compression="zlib", metadata=None)
                segmentation.append((name, mask, split, slide))
            else:
                name = f"{stem}_thumbnail.png"
                _save_png(synthetic.thumbnail(stains), folder / name)
            classification.append((name, ";".join(phenotypes), split, slide))
    save_csv(folder / "classification.csv", ["image", "labels", "split", "patient"], classification)
    save_csv(folder / "segmentation.csv", ["image", "mask", "split", "patient"], segmentation)


def import_dsb2018(source, folder, seed=77):
    """Write a data folder from the Data Science Bowl 2018 download, and print what was done. Raises InputError.

    Of stage1_train/ID/images/ID.png and ID/masks it makes grey images, label images and segmentation.csv: 70 % train,
    15 % validation, 15 % test, drawn by `seed`. Only fluorescence is taken: colourless, with a dark background.
    """
    manifest = folder / "segmentation.csv"
    sources = sorted(path.parent for path in source.glob("*/masks"))
    if not sources:
        raise InputError(f"{source}: holds no folders ID/images and ID/masks; give the download's stage1_train")
    _prepare(manifest)
    taken = []
    for path in progress(sources, "importing"):
        image, _ = read_image(path / "images" / f"{path.name}.png")             # (1 or 3, H, W)
        if (image != image[:1]).any() or np.median(image) > 127:
            continue
        labels = np.zeros(image.shape[1:], np.uint16)
        for number, file in enumerate(sorted(path.glob("masks/*.png")), 1):
            mask = read_mask(file)
            if mask.shape != labels.shape:
                raise InputError(f"{file}: must have the size of its image, {labels.shape} pixels")
            labels[mask != 0] = number
        name = f"{path.name}.png"
        _save_png(image[0], folder / "images" / name)
        _save_png(labels, folder / "masks" / name)
        taken.append(name)
    random.Random(seed).shuffle(taken)
    held = round(0.15 * len(taken))
    splits = ["test"] * held + ["validation"] * held + ["train"] * len(taken)
    rows = [(f"images/{name}", f"masks/{name}", split) for name, split in zip(taken, splits)]
    save_csv(manifest, ["image", "mask", "split"], sorted(rows))
    print(f"{folder}: {len(taken)} fluorescence images of {len(sources)}; coloured or bright-field ones are left out")


def _prepare(manifest):
    """Makes the folder of a manifest, which is written last: an interrupted command can be given again."""
    if manifest.exists():
        raise InputError(f"{manifest}: is there already; give another folder")
    manifest.parent.mkdir(parents=True, exist_ok=True)


def _save_png(array, path):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(array).save(path)


# ------------------------------------------------------------------------------------------------------------- checking
def check(folder, channels=("DAPI",)):
    """Print what a data folder holds. Raises InputError after it has printed problems."""
    tasks = [task for task, (name, _) in manifests.MANIFESTS.items() if (folder / name).is_file()]
    problems = []
    try:
        for task in tasks or ["seg"]:
            _check_task(folder, task, channels, problems)
    finally:
        for problem in problems:
            print("PROBLEM", problem)
    if problems:
        raise InputError(f"{folder}: {len(problems)} problems, listed above")
    print("no problems found")


def _check_task(folder, task, channels, problems):
    """Prints what a data folder holds for one task, and adds to the problems."""
    records, lines = manifests.find_records(folder, problems=problems, task=task, needs_validation=task == "seg")
    print(*lines, sep="\n")
    problems += manifests.leaks(records)
    shapes = {}  # {(channels, H, W): the first image of this shape}
    for split in manifests.SPLITS:
        rows = [record for record in records if record.split == split]
        patients = {record.patient for record in rows if record.patient}
        print(f"{split}: {len(rows)} images, {len(patients)} patients")
        if task == "cls":
            counts = Counter(label for record in rows for label in record.labels)
            print(" ", ", ".join(f"{name} {counts[name]}" for name in manifests.class_names(records)))
        labelled = 0
        for record in progress(rows, "reading"):
            try:
                shape, has_labels = _check_image(record, channels, problems)
                shapes.setdefault(shape, record.image)
                labelled += has_labels
            except InputError as error:
                problems.append(error)
        if task == "seg":
            print(f"  {labelled} of {len(rows)} masks are label images")
    if shapes:
        least = min(shapes)
        most = max(shapes)
        print(f"shapes (channels, height, width) from {least} to {most}")
        if least[0] != most[0]:
            problems.append(f"{shapes[most]}: has {most[0]} channels, {shapes[least].name} has {least[0]}; a network "
                            f"takes one number")


def _check_image(record, channels, problems):
    """Reads an image and its mask, and adds to the problems. Returns the image's shape and whether it has labels."""
    labelled = False
    if record.mask:
        field = manifests.read_field(record, channels)
        image = field.image
        labelled = field.labelled
        if not field.mask.any():
            problems.append(f"{record.mask}: the mask is empty; is there really no nucleus in this image?")
    else:
        image = read_rgb(record.image)
    if np.ptp(image) == 0:
        problems.append(f"{record.image}: the image is constant; nothing can be seen in it")
    return image.shape, labelled


# --------------------------------------------------------------------------------------------------------- command line
def main(argv: list | None = None, description: str | None = None) -> None:
    """Run a command of data.py."""
    parser = Parser(description=description)
    parser.add_argument("command")
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--seed", type=SEED, default=77, help="of what is drawn by chance [77]")
    parser.add_argument("--channel", default="DAPI", help="check: pages of multi-page TIFFs, by name [DAPI]")
    args = parser.parse_args(argv)
    match args.command, *args.paths:
        case "synthetic", out:
            write_synthetic(out, args.seed)
            print(f"{out}: written; look at it with: python data.py check {out}")
        case "dsb2018", source, out:
            import_dsb2018(source, out, args.seed)
        case "check", folder:
            check(folder, channel_names(args.channel))
        case _:
            parser.error(f"there is no command {args.command} of {len(args.paths)} files and folders")
