"""The figures in a run's folder, as PNG: images beside truth and prediction, and the curves of the training."""
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

from images import reading
from images.manifests import Field, Record
from running import process

SIDE = 320     # pixels that are shown of an image, at most; no column is narrower
CAPTION = 40   # pixels, two lines
GAP = 6        # pixels between columns
FRAME = 4      # pixels
BACKGROUND = (24, 24, 24)
# Okabe and Ito's colours, which colour-blind people tell apart
TRUTH = (86, 180, 233)
PREDICTED = (230, 159, 0)
BOTH = (255, 255, 255)


def save_samples(fields: list[Field], masks: list[torch.Tensor], file: Path) -> None:
    """Save input | truth | prediction of up to four images, evenly taken: the middle of each.

    masks: predicted, bool (H, W).
    """
    cells = []
    for field, mask in evenly(list(zip(fields, masks)), most=4):
        middle = middle_of(field.shape)
        image = draw_image(field, middle, SIDE)
        truth = draw_mask(field.mask[middle], SIDE)
        prediction = draw_mask(mask[middle], SIDE)
        cells += [
            (describe(field), image),
            ("truth", truth),
            ("prediction", prediction),
        ]
    save_table(cells, 3, file)


def save_sheet(shown: list[tuple[str, Field, torch.Tensor]], file: Path) -> None:
    """Save the middle of each image, and on it the contours of truth and prediction.

    shown: (caption, image, predicted mask, bool (H, W)).
    """
    cells = []
    side = 2 * SIDE  # so that contours are thin
    for caption, field, mask in shown:
        middle = middle_of(field.shape)
        image = draw_image(field, middle, side)
        truth = outline(draw_mask(field.mask[middle], side))
        predicted = outline(draw_mask(mask[middle], side))
        contours = image.convert("L").convert("RGB")  # all three colours are seen on grey
        contours.paste(TRUTH, mask=truth)
        contours.paste(PREDICTED, mask=predicted)
        contours.paste(BOTH, mask=ImageChops.multiply(truth, predicted))
        cells += [
            (f"{caption}  {describe(field)}", image),
            ("contours\nblue truth, orange prediction, white both", contours),
        ]
    save_table(cells, 2, file)


def save_labels(
    records: list[Record],
    probabilities: np.ndarray,
    truth: np.ndarray,
    classes: list[str],
    file: Path,
) -> None:
    """Save up to twelve images, evenly taken from the best to the worst classified (by likelihood).

    Captions: the true labels, and those found (above 0.5) with their probabilities. Frame: blue where all labels are
    right, orange where not. probabilities and truth (bool): (N, classes).
    """
    of_labels = np.where(truth, probabilities, 1 - probabilities)
    likelihood = np.log(of_labels.clip(1e-9)).sum(1)
    best_first = np.argsort(-likelihood)
    cells = []
    for i in evenly(best_first, most=12):
        pixels = np.moveaxis(reading.read_rgb(records[i].image), 0, -1)                            # (H, W, 3)
        image = Image.fromarray(pixels)
        height = SIDE * image.height // image.width
        height = np.clip(height, SIDE // 8, 2 * SIDE)  # strips stay legible
        image = image.resize((SIDE - 2 * FRAME, height))
        right = np.array_equal(probabilities[i] > 0.5, truth[i])
        colour = TRUTH if right else PREDICTED
        true = [name for name, is_true in zip(classes, truth[i]) if is_true]
        found = [f"{name} {p:.2f}" for name, p in zip(classes, probabilities[i]) if p > 0.5]
        cells.append((
            f"truth: {', '.join(true) or 'none'}\nfound: {', '.join(found) or 'none'}",
            ImageOps.expand(image, FRAME, colour),
        ))
    save_table(cells, 4, file)


def save_curves(history: list[dict], file: Path) -> None:
    """Save losses, scores and learning rate by epoch, from the rows of metrics.csv. Needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("  NOTE: no curves.png: pip install matplotlib to have it drawn")
        return
    scores = [name for name in history[0] if name.startswith(("val_iou", "val_f1"))]
    score = scores[0]
    best = max(history, key=lambda row: row[score])
    panels = [["train_loss", "val_loss"], scores, ["lr"]]
    figure = Figure((11, 3.5), dpi=110, layout="constrained")
    figure.suptitle(f"best {score}: {best[score]:.4f} in epoch {best['epoch']}")
    epochs = [row["epoch"] for row in history]
    for axes, columns in zip(figure.subplots(1, 3), panels):
        for column in columns:
            values = [row[column] for row in history]
            axes.plot(epochs, values, marker=".", label=column)
        axes.set_xlabel("epoch")
        axes.locator_params(axis="x", integer=True, min_n_ticks=1)
        axes.grid(alpha=0.3)
        axes.legend()
    axes.set_ylim(0)  # of the learning rate
    with process.replacing(file) as handle:
        figure.savefig(handle, format="png")


def evenly(items, most):
    """Return up to `most` of the items, evenly spaced."""
    places = np.linspace(0, len(items) - 1, min(most, len(items)))
    return [items[round(place)] for place in places]


def middle_of(shape):
    """Return the slices that cut up to SIDE x SIDE pixels from the middle of an image."""
    starts = [max(0, (size - SIDE) // 2) for size in shape]
    return tuple(slice(start, start + SIDE) for start in starts)


def draw_image(field, window, side):
    """Draw a window of an image: one channel in grey, of several the first three in red, green and blue."""
    image = field.window(*window)
    if len(image) == 1:
        image = image.expand(3, -1, -1)
    black = torch.zeros_like(image[:1])
    image = torch.cat([image, black])[:3]
    pixels = (image * 255).round().byte()
    return enlarge(pixels.permute(1, 2, 0), side)


def draw_mask(mask, side):
    return enlarge(mask.byte() * 255, side)


def enlarge(pixels, side):
    """Return uint8 pixels as a PIL image, enlarged by a whole number until its longer side is nearly `side`."""
    image = Image.fromarray(pixels.numpy())
    zoom = side // max(image.size)
    return ImageOps.scale(image, zoom, Image.Resampling.NEAREST)


def outline(mask):
    """Return the pixels of a mask, a PIL image, that touch its outside."""
    inner = mask.filter(ImageFilter.MinFilter(3))
    return ImageChops.subtract(mask, inner)


def describe(field):
    """Return an image's name and, in a second line, what is shown of it."""
    height, width = field.shape
    channels = ", ".join(field.channels[:3])
    if len(field.channels) > 1:
        channels += " as red, green, blue"
    return f"{field.record.image.stem}\nmiddle of {height} x {width} pixels, {channels}"


def save_table(cells, columns, file):
    """Save a PNG of (caption, PIL image), row by row. Captions are cut off where their column ends."""
    width = max(SIDE, *(image.width for _, image in cells))
    rows = [cells[i:i + columns] for i in range(0, len(cells), columns)]
    heights = [CAPTION + max(image.height for _, image in row) for row in rows]
    table = Image.new("RGB", (columns * (width + GAP), sum(heights)), BACKGROUND)
    y = 0
    for row, height in zip(rows, heights):
        x = 0
        for caption, image in row:
            cell = Image.new("RGB", (width, height), BACKGROUND)
            ImageDraw.Draw(cell).text((2, 2), caption, font_size=12)
            cell.paste(image, (0, CAPTION))
            table.paste(cell, (x, y))
            x += width + GAP
        y += height
    with process.replacing(file) as handle:  # whoever looks at the old file sees it whole
        table.save(handle, "PNG")
