"""Nuclei as objects: from a network's probabilities to label images, what is measured of each, and their files."""
import json
import math
import zipfile
from pathlib import Path

import numpy as np
import tifffile
import torch
import torch.nn.functional as F

import dedl
from images import reading
from images.labels import connected_parts
from running import process
from running.process import InputError

SMALLEST = 0.05  # of the training nuclei's median area; smaller ones are dropped
REACH = 0.2      # of their median diameter: seeds lie farther apart
DEEPEST = 10     # times REACH; deeper pixels count as if they lay so deep
DEEP = 0.6       # of a seed's depth; within so many pixels it must be the deepest
UNLIKE = 1.5     # times smaller or larger than in training: reported
ROWS = 512       # are looked at at a time, to save memory


# ------------------------------------------------------------------------------------------------------------ decoding
def mask_and_cores(probabilities: torch.Tensor) -> tuple:
    """Return the mask (H, W) in the probabilities (classes - 1, H, W) of all classes but the background, and in it the
    pixels that are likelier nucleus than border, the cores of nuclei; of two classes the mask again."""
    mask = torch.cat([part.sum(0) > 0.5 for part in probabilities.split(ROWS, 1)])
    if len(probabilities) == 1:
        return mask, mask
    nucleus, border = probabilities
    return mask, mask & (nucleus > border)


def separate(mask: torch.Tensor, cores: torch.Tensor, usual: dict, scale: float = 1.0) -> torch.Tensor:
    """Return the nuclei (H, W) int32 in a mask: the connected parts of the seeds, grown inside the cores, then inside
    the mask; without small ones.

    usual: the size of nuclei in training, see describe; scale: by which the image was enlarged.
    """
    reach = max(1, round(REACH * usual["median_diameter"] / scale))
    labels = grow(connected_parts(find_seeds(mask, cores, reach)), cores, mask)
    stays = labels.flatten().bincount() >= usual["smallest"] / scale ** 2
    stays[0] = False
    numbers = (stays.cumsum(0) * stays).int()                         # 1, 2, ... anew
    for rows in labels.split(ROWS):                                   # in place, to save memory
        rows.copy_(numbers[rows])
    return labels


def find_seeds(mask, cores, reach):
    """Return the seeds (H, W), bool: pixels of the cores that lie deepest within `reach` pixels around them. The uneven
    outline of a large nucleus would make several; so those that lie deep (DEEP) must be the deepest within 2 or 4 times
    as many. Parts of the mask without a seed are seeds as a whole.

    Depth is that in the mask plus that in the cores, 0 outside of cores, smoothed by two boxes `reach` wide.
    """
    seeds = torch.zeros_like(mask)
    most = DEEPEST * reach
    margin = 2 * most                                                 # more than what the pixels of a band depend on
    for top in range(0, len(mask), ROWS):
        start = max(0, top - margin)
        rows = slice(start, top + ROWS + margin)
        inside = cores[rows]
        depth = inside * (dedl.rings(mask[rows], most) + dedl.rings(inside, most))
        depth = _over_windows(torch.mean, _over_windows(torch.mean, depth, reach // 2), reach // 2)
        highest = _over_windows(torch.amax, depth, reach)
        found = inside & (depth == highest)
        for step in (reach, 2 * reach):                               # from half as far to twice that
            highest = _over_windows(torch.amax, highest, step, step)
            found &= (depth == highest) | (DEEP * depth < 2 * step)
        seeds[top:top + ROWS] = found[top - start:][:ROWS]
    return seeds | mask & (grow(seeds.byte(), mask) == 0)


def _over_windows(reduce, values, reach, step=1):
    """Return torch.mean or torch.amax of the values (H, W) in a square of `reach` pixels to each side, taking every
    `step`th one; beyond the border they are 0."""
    values = F.pad(values, 4 * [reach])
    for axis in (0, 1):
        values = reduce(values.unfold(axis, 2 * reach + 1, 1)[..., ::step], -1)
    return values


def grow(labels, *masks, rings=math.inf):
    """Return labels (H, W) that have grown into a mask (H, W), then into the next one, ring by ring of pixels, by up to
    `rings` in all. Where two meet, a neighbour by a side is preferred to one by a corner."""
    width = labels.shape[1] + 2
    labels = F.pad(labels, (1, 1, 1, 1))                              # so that all neighbours of a pixel are there
    flat = labels.flatten()
    for mask in masks:
        free = F.pad(mask, (1, 1, 1, 1)).flatten() & (flat == 0)
        edge = flat.nonzero()[:, 0]
        while len(edge) and rings > 0:
            reached = []
            for step in (-width, -1, 1, width, -width - 1, -width + 1, width - 1, width + 1):
                start = edge[free[edge + step]]
                flat[start + step] = flat[start]
                free[start + step] = False
                reached.append(start + step)
            edge = torch.cat(reached)
            rings -= 1
    return labels[1:-1, 1:-1]


# ----------------------------------------------------------------------------------------------------------- measuring
def describe(fields: list) -> dict:
    """Return what config.json keeps of the training nuclei: median area and diameter in pixels, the smallest area that
    counts, and the width of a pixel in micrometres, None where the first image's file does not have it."""
    areas = torch.cat([field.labels.flatten().bincount()[1:] for field in fields])
    median = areas[areas > 0].median().item()
    return {
        "median_area": median,
        "median_diameter": 2 * math.sqrt(median / math.pi),
        "smallest": SMALLEST * median,
        "pixel_size": reading.pixel_size(fields[0].record.image),
    }


def unlike_training(measured: dict, usual: dict, scale: float) -> list:
    """Return a line for nuclei and for pixels of another size than in training. measured: {image: columns}, see
    measure; usual: see describe; scale: by which images were enlarged."""
    wanted = {}
    areas = np.concatenate([columns["Area"] for columns in measured.values()])
    if len(areas):
        diameter = 2 * math.sqrt(np.median(areas) / math.pi)
        wanted[f"nuclei are {diameter:.0f} pixels wide in median"] = usual["median_diameter"] / diameter
    for image in measured:
        size = reading.pixel_size(image)
        if size and usual["pixel_size"]:
            wanted[f"{image}: pixels are {size:.3g} micrometres wide"] = size / usual["pixel_size"]
    return [f"{what}, far from those in training; try --scale {own:.2f}"
            for what, own in wanted.items() if not 1 / UNLIKE < own / scale < UNLIKE]


def measure(labels: torch.Tensor, file: Path, ring: int = 0) -> dict:
    """Return the columns of nuclei.csv for the nuclei (H, W) of an image, a value each: number, centroid and area in
    pixels, and the mean of each page of the file, RGB as three.

    ring: also the means within `ring` pixels around a nucleus, outside of all nuclei; NaN where no such pixel is.
    """
    count = labels.max().item()
    height, width = labels.shape
    columns = {
        "CellID": range(1, count + 1),
        "X_centroid": means(labels, np.arange(width)[None], count),
        "Y_centroid": means(labels, np.arange(height)[:, None], count),
        "Area": labels.flatten().bincount()[1:].numpy(),
    }
    if ring:
        outside = labels == 0
        around = grow(labels, outside, rings=ring) * outside
    for name in reading.stain_names(file):
        image, channels = reading.read_image(file, (name,))
        for channel, page in zip(channels, image):
            columns[channel] = means(labels, page, count)
            if ring:
                columns[f"{channel}_ring"] = means(around, page, count)
    return columns


def means(labels, values, count):
    """Return the means (count,) of values (H, W) over the pixels of each of the labels 1 to `count` (H, W)."""
    labels = labels.numpy()
    values = np.broadcast_to(values, labels.shape)
    sums = np.zeros((2, count + 1))
    for top in range(0, len(labels), ROWS):
        part = labels[top:top + ROWS].ravel()
        sums[0] += np.bincount(part, values[top:top + ROWS].ravel(), count + 1)
        sums[1] += np.bincount(part, minlength=count + 1)
    with np.errstate(invalid="ignore"):
        return (sums[0] / sums[1])[1:]


# --------------------------------------------------------------------------------------------------------------- files
def save_labels(labels: torch.Tensor, file: Path, pixel_size: float | None) -> None:
    """Write a label image (H, W) as a TIFF with the width of a pixel in micrometres: uint16 in ImageJ's form or, of
    more nuclei, uint32, which that has not."""
    large = labels.max() > 65535
    values = labels.numpy().astype(np.uint32 if large else np.uint16)
    tag, unit, pixels = ("MICROMETER", "um", 1 / pixel_size) if pixel_size else ("NONE", "pixel", 1)
    if large and pixel_size:  # plain TIFF knows no micrometres
        tag, pixels = "CENTIMETER", 1e4 * pixels
    with process.replacing(file) as handle:
        tifffile.imwrite(handle, values, imagej=not large, metadata={"unit": unit}, compression="zlib",
                         resolution=(pixels, pixels), resolutionunit=tag)


def save_rois(labels: torch.Tensor, file: Path) -> None:
    """Write the outlines of nuclei as ImageJ's RoiSet.zip. Needs roifile."""
    try:
        from roifile import ImagejRoi
    except ImportError as error:
        raise InputError("--rois: needs a package; pip install roifile") from error
    with process.replacing(file) as handle, zipfile.ZipFile(handle, "w", zipfile.ZIP_DEFLATED) as rois:
        for number, corners in outlines(labels).items():
            rois.writestr(f"{number}.roi", ImagejRoi.frompoints(corners, name=str(number)).tobytes())


def save_geojson(labels: torch.Tensor, file: Path) -> None:
    """Write the outlines of nuclei (H, W) as a GeoJSON of QuPath's detections, in pixels."""
    features = []
    for number, corners in outlines(labels).items():
        features.append({
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [[*corners, corners[0]]]},
            "properties": {"objectType": "detection", "name": str(number)},
        })
    with process.replacing(file, "w") as handle:
        json.dump({"type": "FeatureCollection", "features": features}, handle)


def outlines(labels):
    """Return {number: corners [(x, y)]} of the outline of each nucleus (H, W), clockwise along the borders of its
    pixels, from its first pixel on. Holes, and parts that touch it nowhere, are left out."""
    wide = F.pad(labels, (1, 1, 1, 1)).numpy()
    numbers, firsts = np.unique(wide, return_index=True)
    found = {}
    for number, first in zip(numbers[1:].tolist(), firsts[1:].tolist()):
        y, x = divmod(first, wide.shape[1])
        dx, dy = 1, 0                                                 # along its upper side, the nucleus on the right
        corners = [(x - 1, y - 1)]                                    # in the image that is not padded
        while True:
            x, y = x + dx, y + dy
            if wide[y + (dy - dx - 1) // 2, x + (dx + dy - 1) // 2] == number:    # ahead on the left
                dx, dy = dy, -dx
            elif wide[y + (dx + dy - 1) // 2, x + (dx - dy - 1) // 2] != number:  # ahead on the right
                dx, dy = -dy, dx
            else:
                continue
            if (x - 1, y - 1) == corners[0]:
                break
            corners.append((x - 1, y - 1))
        found[number] = corners
    return found
