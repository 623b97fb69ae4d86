"""Predicts whole images by tiles that overlap, and the labels of images."""
import csv
import math
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import dedl
from images.manifests import Field
from running import nuclei, process
from running.compute import Compute
from running.process import InputError, progress

# Images are predicted by larger tiles than they are trained by, most of them whole: at a tile's border the network sees
# less. Three networks trained by 256 on DSB2018 all did better so, on validation, than predicted by 256 too.
TILE = 1024
OVERLAP = 256         # of neighbouring tiles, at least; see benchmarks/seams.py


# -------------------------------------------------------------------------------------------------------- whole images
def tiles_along(size, tile=TILE, overlap=OVERLAP):
    """Return the tiles along an axis of `size` pixels and the weights of their pixels: as few tiles as cover it, of at
    most `tile` pixels, with neighbours that overlap by `overlap`.

    Each weight falls to 0 towards a border where another tile goes on; at each pixel they sum to 1.
    """
    count = max(1, math.ceil((size - overlap) / (tile - overlap)))
    side = math.ceil((size + (count - 1) * overlap) / count)
    depth = torch.arange(side) + 0.5                                  # pixels from the tile's border
    ramp = torch.minimum(depth, side - depth).clamp(max=max(1, overlap))
    whole = torch.zeros(size)
    tiles = []
    for start in torch.linspace(0, size - side, count).round().int().tolist():
        tiles.append(slice(start, start + side))
        whole[tiles[-1]] += ramp
    return [(place, ramp / whole[place]) for place in tiles]


@torch.inference_mode()
def predict(model: nn.Module, field: Field, compute: Compute, tta: bool = False, scale: float = 1.0,
            **tiles) -> torch.Tensor:
    """Return the probabilities (classes - 1, H, W), float32, of all classes but the background, by a network in eval
    mode. Where tiles overlap they are their weighted means.

    tta: of each tile the mean over its four turns, each as it is and mirrored (test-time augmentation).
    scale: the image is predicted enlarged by it; the probabilities are of its own size. tiles: see tiles_along.
    """
    height, width = field.shape
    if scale != 1:
        found = predict(model, enlarged(field, scale), compute, tta, **tiles)[None]
        return F.interpolate(found, (height, width), mode="bilinear", antialias=True)[0]
    found = None
    for rows, row_weights in tiles_along(height, **tiles):
        for columns, column_weights in tiles_along(width, **tiles):
            image = field.window(rows, columns)                                               # (C, h, w)
            ways = range(8) if tta else [0]
            mean = sum(one_way(model, image, compute, way) for way in ways) / len(ways)       # (classes - 1, h, w)
            if found is None:
                found = mean.new_zeros(len(mean), height, width)
            found[:, rows, columns] += mean * row_weights[:, None] * column_weights
    return found


def enlarged(field, scale):
    """Return an image, each side `scale` times as long."""
    size = [max(1, round(scale * side)) for side in field.shape]
    image = F.interpolate(field.window()[None], size, mode="bilinear", antialias=True)
    return Field(field.record, image[0].numpy(), field.channels, np.float32([0, 1]))


def one_way(model, image, compute, way):
    """Return the probabilities (classes - 1, H, W) of an image (C, H, W), predicted after way // 2 quarter turns and,
    where `way` is odd, a flip."""
    image = image.rot90(way // 2, (1, 2))
    image = image.flip(2) if way % 2 else image
    with compute.autocast():
        logits = model(compute.batch(image[None]))[0].float()                                 # (classes, H, W)
    found = logits.softmax(0)[1:].cpu()
    found = found.flip(2) if way % 2 else found
    return found.rot90(-(way // 2), (1, 2))


@dataclass
class Measured:
    """What a network finds in images that have a truth. Of each image: pixel counts (images, 4) of its mask, the
    probabilities (classes - 1, H, W), the nuclei (H, W), and what dedl.match_nuclei says of these. loss: the mean
    cross-entropy, where class weights were given."""
    counts: torch.Tensor
    probabilities: list
    found: list
    matched: list
    loss: float | None

    @property
    def scores(self) -> dict:
        return dedl.segmentation_scores(self.counts) | dedl.nucleus_scores(self.matched)


def measure(model: nn.Module, fields: list, usual: dict, compute: Compute, class_weights: list | None = None,
            tta: bool = False, scale: float = 1.0) -> Measured:
    """Predict images that have a truth by a network in eval mode, and measure it. usual: see nuclei.describe."""
    counts = []
    probabilities = []
    loss = weight = 0.0
    for field in progress(fields, "predicting"):
        own = predict(model, field, compute, tta, scale)
        probabilities.append(own)
        nucleus = own.sum(0, keepdim=True)                                                    # (1, H, W)
        counts.append(dedl.confusion(nucleus[0][field.known] > 0.5, field.mask[field.known]))
        if class_weights:
            weights = torch.tensor(class_weights)
            truth = dedl.nucleus_classes(field.labels, len(weights)).long()[field.known]      # (pixels,)
            log = torch.cat([1 - nucleus, own]).clamp(min=1e-7).log()                         # (classes, H, W)
            loss += F.nll_loss(log[:, field.known].T, truth, weights, reduction="sum").item()
            weight += weights[truth].sum().item()
    found = [nuclei.separate(*nuclei.mask_and_cores(own), usual, scale) for own in probabilities]
    matched = [dedl.match_nuclei(labels, field.labels, field.known) for labels, field in zip(found, fields)]
    return Measured(torch.stack(counts), probabilities, found, matched, loss / weight if class_weights else None)


# --------------------------------------------------------------------------------------------------- labels of images
@torch.inference_mode()
def classify(model: nn.Module, images: torch.Tensor, compute: Compute, flips: bool = False) -> torch.Tensor:
    """Return logits (N, classes), float32 on the CPU, of images uint8 (N, 3, S, S).

    flips: the mean over the image as it is and mirrored along each side and both (test-time augmentation).
    """
    model.eval()
    ways = [(), (2,), (3,), (2, 3)] if flips else [()]
    found = []
    for batch in progress(images.split(32), "predicting", "batch"):
        part = compute.batch(batch)                                                           # (n, 3, S, S)
        with compute.autocast():
            # forward, not the call: torch.compile would compile anew for each size of batch
            logits = [model.forward(part.flip(axes)).float() for axes in ways]
        found.append(torch.stack(logits).mean(0).cpu())
    return torch.cat(found)                                                                   # (N, classes)


def save_labels(file: Path, records: list, classes: list, probabilities: torch.Tensor) -> None:
    """Write a CSV of image, true labels, labels found, both joined by ';', and a column of probabilities a class."""
    rows = [[record.name, ";".join(record.labels), labels_found(row, classes), *(f"{p:.6f}" for p in row)]
            for record, row in zip(records, probabilities.tolist())]
    process.save_csv(file, ["image", "labels", "labels_found", *classes], rows)


def labels_found(probabilities: list, classes: list) -> str:
    """Return the names of the classes above 0.5, joined by ';'."""
    return ";".join(name for name, p in zip(classes, probabilities) if p > 0.5)


def save_rows(file: Path, measured: dict) -> None:
    """Write a CSV of {image: {column: values}}, a row a value, after the rows that earlier calls wrote of other images;
    images need not have the same columns."""
    earlier = [row for row in earlier_rows(file) if row["image"] not in measured]
    header = list(dict.fromkeys(chain(["image"], *earlier[:1], *measured.values())))
    rows = [[row.get(name, "") for name in header] for row in earlier]
    for image, columns in measured.items():
        count = len(next(iter(columns.values())))
        cells = [columns.get(name, [math.nan] * count) for name in header[1:]]
        rows += [[image, *(cell if isinstance(cell, str) else f"{cell:.10g}" for cell in row)] for row in zip(*cells)]
    process.save_csv(file, header, rows)


def earlier_rows(file: Path) -> list:
    """Return the rows of a table that save_rows wrote, [{column: text}]. Raises InputError for other tables."""
    if not file.is_file():
        return []
    with open(file, newline="", encoding="utf-8", errors="surrogateescape") as handle:
        table = csv.DictReader(handle)
        if "image" not in (table.fieldnames or ()):
            raise InputError(f"{file}: has no column image; move it away")
        return list(table)
