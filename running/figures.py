"""The figures in a run's folder, as PNG: images beside truth and prediction, and the curves of the training."""
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

import dedl
from images import reading
from images.manifests import Field
from running import process

SIDE = 512     # pixels, at most; of larger images the middle is shown
OVERLAY = 2048  # pixels, at most, of an overlay's side
CAPTION = 40   # pixels, two lines
# Okabe and Ito's colours, which colour-blind people tell apart
TRUTH = (86, 180, 233)
PREDICTED = (230, 159, 0)
BOTH = (255, 255, 255)
MERGED = (214, 39, 40)
SPLIT = (204, 121, 167)
HATCH = 8      # pixels from stripe to stripe


def save_samples(rows: list, file: Path) -> None:
    """Save image | truth | prediction | the outlines of both, of the middle of each image; hatched where it is ignored.

    rows: (caption, Field, found nuclei (H, W)).
    """
    cells = []
    for caption, field, found in rows:
        height, width = field.shape
        top = max(0, (height - SIDE) // 2)
        left = max(0, (width - SIDE) // 2)
        middle = slice(top, top + SIDE), slice(left, left + SIDE)
        image = field.window(*middle)
        zoom = max(1, SIDE // max(image.shape[1:]))
        truth = enlarged(field.labels[middle], zoom)
        found = enlarged(found[middle], zoom)
        known = enlarged(field.known[middle], zoom)
        merged, split = mistakes(found * known, truth * known)
        outlined = draw_outlines(draw(image, zoom), found, truth, merged, split)
        cells += [
            (f"{caption}  {field.record.image.stem}\n"
             f"middle of {height} x {width} pixels, {', '.join(field.channels[:3])}", draw(image, zoom)),
            (f"truth\n{truth.unique().count_nonzero()} nuclei", hatched(Image.fromarray(colour(truth)), known)),
            (f"prediction\n{found.unique().count_nonzero()} nuclei", Image.fromarray(colour(found))),
            (f"outlines: blue truth, orange prediction, white both\nfilled: {len(merged)} found as one (red), "
             f"{len(split)} found in parts (pink)", hatched(outlined, known)),
        ]
    save_table(cells, file)


def overview(field: Field) -> torch.Tensor:
    """Return an image (C, h, w) in [0, 1] of at most OVERLAY pixels a side: every second, third, ... pixel."""
    every = slice(None, None, -(-max(field.shape) // OVERLAY))
    return field.window(every, every)


def overlay(view: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """Draw the outlines of nuclei (H, W), in colours, on what overview gave: (h, w, 3)."""
    step = -(-max(labels.shape) // OVERLAY)
    small = labels[::step, ::step]
    pixels = np.array(draw(view))
    edge = dedl.outline(small)
    pixels[edge] = colour(small)[edge]
    return pixels


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
        process.note(["no curves.png: pip install matplotlib to have it drawn"])
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


def draw(pixels, zoom=1):
    """Draw (C, h, w) in [0, 1]: one channel in grey, of several the first three as red, green and blue."""
    if len(pixels) == 1:
        pixels = pixels.expand(3, -1, -1)
    black = torch.zeros_like(pixels)
    rgb = torch.cat([pixels, black])[:3] * 255.0
    image = Image.fromarray(rgb.round().byte().permute(1, 2, 0).numpy())
    return ImageOps.scale(image, zoom, Image.Resampling.NEAREST)


def draw_outlines(image, found, truth, merged, split):
    """Draw the outlines of nuclei (H, W) on a PIL image in grey, those found as one or in parts filled."""
    pixels = np.array(image.convert("L").convert("RGB"))  # all colours are seen on grey
    for numbers, tint in ((merged, MERGED), (split, SPLIT)):
        filled = torch.isin(truth, numbers)
        pixels[filled] = pixels[filled] // 2 + np.uint8(tint) // 2
    true = dedl.outline(truth)
    predicted = dedl.outline(found)
    pixels[true] = TRUTH
    pixels[predicted] = PREDICTED
    pixels[true & predicted] = BOTH
    return Image.fromarray(pixels)


def hatched(image, known):
    """Return a PIL image with stripes where pixels are not known (H, W)."""
    pixels = np.array(image)
    rows, columns = np.indices(known.shape)
    pixels[~known.numpy() & ((rows + columns) % HATCH == 0)] = SPLIT
    return Image.fromarray(pixels)


def mistakes(found, truth):
    """Return the numbers of the true nuclei (H, W) that lie, by half or more, in one found nucleus with others, and of
    those in which several found nuclei lie by half or more."""
    numbers, true_numbers, shared, areas, true_areas = dedl.overlaps(found, truth)
    inside = 2 * shared >= true_areas[true_numbers]
    holders = numbers[inside]
    merged = true_numbers[inside][holders.bincount()[holders] > 1]
    owners, parts = true_numbers[2 * shared >= areas[numbers]].unique(return_counts=True)
    return merged, owners[parts > 1]


def colour(labels):
    """Return nuclei (H, W) in colours (H, W, 3) drawn by chance, always the same for a number."""
    colours = np.random.default_rng(0).integers(64, 256, (int(labels.max()) + 1, 3), np.uint8)
    colours[0] = 0
    return colours[labels]


def enlarged(labels, zoom):
    """Return (H, W) with each pixel repeated along both axes."""
    return labels.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)


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
