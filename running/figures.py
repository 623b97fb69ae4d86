"""The figures in a run's folder, as PNG: images beside truth and prediction, and the curves of the training."""
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

from images import reading
from running import process

SIDE = 512     # pixels, at most; of larger images the middle is shown
CAPTION = 40   # pixels, two lines
# Okabe and Ito's colours, which colour-blind people tell apart
TRUTH = (86, 180, 233)
PREDICTED = (230, 159, 0)
BOTH = (255, 255, 255)


def save_samples(rows: list, file: Path) -> None:
    """Save image | truth | prediction | the contours of both, of the middle of each image.

    rows: (caption, Field, predicted mask (H, W) bool).
    """
    cells = []
    for caption, field, mask in rows:
        height, width = field.shape
        top = max(0, (height - SIDE) // 2)
        left = max(0, (width - SIDE) // 2)
        middle = slice(top, top + SIDE), slice(left, left + SIDE)
        image = draw(field.window(*middle))
        truth = draw(field.mask[middle][None])
        prediction = draw(mask[middle][None])
        channels = ", ".join(field.channels[:3])
        cells += [
            (f"{caption}  {field.record.image.stem}\nmiddle of {height} x {width} pixels, {channels}", image),
            ("truth", truth),
            ("prediction", prediction),
            ("contours\nblue truth, orange prediction, white both", draw_contours(image, truth, prediction)),
        ]
    save_table(cells, file)


def save_labels(records: list, probabilities: np.ndarray, truth: np.ndarray, classes: list, file: Path) -> None:
    """Save up to twelve images, evenly taken from the best to the worst classified (by likelihood).

    Captions: the true labels, and those found (above 0.5) with their probabilities. probabilities and truth (bool):
    (N, classes).
    """
    of_labels = np.where(truth, probabilities, 1 - probabilities)
    likelihood = np.log(of_labels.clip(1e-9)).sum(1)
    best_first = np.argsort(-likelihood)
    cells = []
    for i in evenly(best_first, most=12):
        pixels = np.moveaxis(reading.read_rgb(records[i].image), 0, -1)                            # (H, W, 3)
        image = ImageOps.contain(Image.fromarray(pixels), (SIDE, SIDE))
        true = [name for name, is_true in zip(classes, truth[i]) if is_true]
        found = [f"{name} {p:.2f}" for name, p in zip(classes, probabilities[i]) if p > 0.5]
        cells.append((f"truth: {', '.join(true) or 'none'}\nfound: {', '.join(found) or 'none'}", image))
    save_table(cells, file)


def save_curves(history: list, file: Path) -> None:
    """Save each column of metrics.csv by epoch: losses, scores, learning rate. Needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("  NOTE: no curves.png: pip install matplotlib to have it drawn")
        return
    columns = [name for name in history[0] if name not in ("epoch", "seconds")]
    figure = Figure((4 * len(columns), 3.5), dpi=110, layout="constrained")
    for axes, column in zip(figure.subplots(1, len(columns)), columns):
        axes.plot([row["epoch"] for row in history], [row[column] for row in history], marker=".")
        axes.set_title(column)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    with process.replacing(file) as handle:
        figure.savefig(handle, format="png")


def evenly(items: list, most: int) -> list:
    """Return up to `most` of the items, evenly spaced."""
    places = np.linspace(0, len(items) - 1, min(most, len(items)))
    return [items[round(place)] for place in places]


def draw(pixels):
    """Draw (C, h, w) in [0, 1]: one channel in grey, of several the first three as red, green and blue. Small images
    are enlarged by a whole number."""
    if len(pixels) == 1:
        pixels = pixels.expand(3, -1, -1)
    black = torch.zeros_like(pixels)
    rgb = torch.cat([pixels, black])[:3] * 255.0
    image = Image.fromarray(rgb.round().byte().permute(1, 2, 0).numpy())
    zoom = SIDE // max(image.size)
    return ImageOps.scale(image, zoom, Image.Resampling.NEAREST)


def draw_contours(image, truth, prediction):
    """Draw the outlines of two masks on an image in grey: all three are PIL images."""
    true = outline(truth)
    predicted = outline(prediction)
    contours = image.convert("L").convert("RGB")  # all three colours are seen on grey
    contours.paste(TRUTH, mask=true)
    contours.paste(PREDICTED, mask=predicted)
    contours.paste(BOTH, mask=ImageChops.multiply(true, predicted))
    return contours


def outline(mask):
    """Return the pixels of a mask that touch its outside."""
    mask = mask.convert("L")
    inner = mask.filter(ImageFilter.MinFilter(3))
    return ImageChops.subtract(mask, inner)


def save_table(cells, file):
    """Save a PNG of (caption, PIL image), four a row. Captions are cut off where their cell ends."""
    width, height = np.max([image.size for _, image in cells], 0) + (6, CAPTION)  # with a gap
    rows = -(-len(cells) // 4)
    table = Image.new("RGB", (4 * width, rows * height), "#181818")
    for i, (caption, image) in enumerate(cells):
        cell = Image.new("RGB", (width, height), "#181818")
        ImageDraw.Draw(cell).text((2, 2), caption, font_size=12)
        cell.paste(image, (0, CAPTION))
        row, column = divmod(i, 4)
        table.paste(cell, (column * width, row * height))
    with process.replacing(file) as handle:  # whoever looks at the old file sees it whole
        table.save(handle, "PNG")
