"""Predicts whole images by tiles that overlap, and the labels of images."""
import math
from pathlib import Path

import torch
import torch.nn as nn

import dedl
from running import process
from running.compute import Compute
from running.process import progress

# Images are predicted by larger tiles than they are trained by, most of them whole: at a tile's border the network sees
# less. Three networks trained by 256 on DSB2018 all did better so, on validation, than predicted by 256 too.
TILE = 1024
OVERLAP = 256         # of neighbouring tiles, at least; see benchmarks/seams.py
BATCH = 1 << 19       # pixels: small images of one size are predicted together, 8 of 256 x 256


# -------------------------------------------------------------------------------------------------------- whole images
def tiles_along(size: int, tile: int = TILE, overlap: int = OVERLAP) -> list:
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
def predict(
    model: nn.Module,
    fields: list,
    compute: Compute,
    tta: bool = False,
    tile: int = TILE,
    overlap: int = OVERLAP,
) -> torch.Tensor:
    """Return the probability of the nucleus (N, H, W), float32, of images of one size, by a network in eval mode. Where
    tiles overlap it is their weighted mean.

    tta: of each tile the mean over its four turns, each as it is and mirrored (test-time augmentation).
    """
    height, width = fields[0].shape
    found = torch.zeros(len(fields), height, width)
    for rows, row_weights in tiles_along(height, tile, overlap):
        for columns, column_weights in tiles_along(width, tile, overlap):
            images = torch.stack([field.window(rows, columns) for field in fields])           # (N, C, h, w)
            ways = range(8) if tta else [0]
            mean = sum(one_way(model, images, compute, way) for way in ways) / len(ways)      # (N, h, w)
            found[:, rows, columns] += mean * row_weights[:, None] * column_weights
    return found


def one_way(model: nn.Module, images: torch.Tensor, compute: Compute, way: int) -> torch.Tensor:
    """Return the probability (N, H, W) of images (N, C, H, W), predicted after way // 2 quarter turns and, where `way`
    is odd, a flip."""
    images = images.rot90(way // 2, (2, 3))
    images = images.flip(3) if way % 2 else images
    with compute.autocast():
        logits = model(compute.batch(images)).float()                                         # (N, classes, H, W)
    found = logits.softmax(1)[:, 1].cpu()
    found = found.flip(2) if way % 2 else found
    return found.rot90(-(way // 2), (1, 2))


def evaluate(
    model: nn.Module,
    fields: list,
    compute: Compute,
    class_weights: list = (1.0, 1.0),
    tta: bool = False,
) -> tuple:
    """Predict images that have a truth by a network in eval mode, those of equal size together. Return pixel counts
    (images, 4), the mean cross-entropy, and for each image the probability of the nucleus (H, W)."""
    probabilities = [None] * len(fields)
    for indices in progress(batches_of_one_size(fields), "predicting", "batch"):
        found = predict(model, [fields[i] for i in indices], compute, tta)
        for i, probability in zip(indices, found):
            probabilities[i] = probability
    counts = torch.stack([dedl.confusion(p > 0.5, field.mask) for p, field in zip(probabilities, fields)])
    loss = weight = 0.0
    for probability, field in zip(probabilities, fields):
        weights = torch.where(field.mask, class_weights[1], class_weights[0])                 # (H, W)
        of_truth = torch.where(field.mask, probability, 1 - probability).clamp(min=1e-7)
        loss -= (weights * of_truth.log()).sum().item()
        weight += weights.sum().item()
    return counts, loss / weight, probabilities


def batches_of_one_size(fields: list) -> list:
    """Return lists of the images' indices: images of equal size, of BATCH pixels together or one that is larger."""
    sizes = {}
    for i, field in enumerate(fields):
        sizes.setdefault(field.shape, []).append(i)
    batches = []
    for (height, width), indices in sizes.items():
        count = max(1, BATCH // (height * width))
        batches += [indices[i:i + count] for i in range(0, len(indices), count)]
    return batches


# --------------------------------------------------------------------------------------------------- labels of images
@torch.inference_mode()
def classify(model: nn.Module, images, compute: Compute, indices=None, flips: bool = False) -> torch.Tensor:
    """Return logits (N, classes), float32 on the CPU, of images uint8 (3, S, S) by index, all or those of `indices`.

    flips: the mean over the image as it is and mirrored along each side and both (test-time augmentation).
    """
    model.eval()
    indices = torch.arange(len(images)) if indices is None else torch.as_tensor(indices)
    ways = [(), (2,), (3,), (2, 3)] if flips else [()]
    found = []
    for batch in progress(indices.split(32), "predicting", "batch"):
        part = compute.batch(torch.stack([images[i] for i in batch.tolist()]))                # (N, 3, S, S)
        with compute.autocast():
            # forward, not the call: torch.compile would compile anew for each size of batch
            logits = [model.forward(part.flip(axes)).float() for axes in ways]
        found.append(torch.stack(logits).mean(0).cpu())
    return torch.cat(found)                                                                   # (N, classes)


def save_labels(file: Path, records: list, classes: list, probabilities: torch.Tensor) -> None:
    """Write a CSV of image, true labels joined by ';', and a column of probabilities a class."""
    rows = [[record.name, ";".join(record.labels), *(f"{p:.6f}" for p in row)]
            for record, row in zip(records, probabilities.tolist())]
    process.save_csv(file, ["image", "labels", *classes], rows)
