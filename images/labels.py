"""Label images: (H, W) int32, 0 background, one number a nucleus."""
import numpy as np
import torch
import torch.nn.functional as F

FEW = 0.1  # of a label image's numbers, at most, may have a second part


def as_labels(values: np.ndarray) -> tuple[torch.Tensor, bool]:
    """Return the label image of a mask's stored values (H, W), and whether the mask is one.

    It is one where it has several numbers that are, all but FEW, one connected part each; these stay nuclei. Else, as
    in a binary mask, its connected parts are the nuclei.
    """
    inside = values != 0
    numbers, places = np.unique(values[inside], return_inverse=True)
    labels = torch.zeros(values.shape, dtype=torch.int32)
    labels[torch.from_numpy(inside)] = torch.from_numpy(places).int() + 1
    if len(numbers) > 1 and connected_parts(labels).max() <= (1 + FEW) * len(numbers):
        return labels, True
    return connected_parts(labels > 0), False


def connected_parts(labels: torch.Tensor) -> torch.Tensor:
    """Return the connected parts of a mask or a label image (H, W), numbered 1, 2, ... from top to bottom.

    Pixels of one value that touch, also by a corner, are connected (scipy.ndimage.label with a structure of ones).
    The stretches of one value in a row are the nodes of a graph; those of the same value that touch in neighbouring
    rows are its edges. Each node then takes over the smallest number of its part.
    """
    height, width = labels.shape
    flat = F.pad(labels, (0, 1)).flatten()                            # a column of 0 after each row
    starts = F.pad(flat[1:] != flat[:-1], (1, 0), value=True).nonzero()[:, 0]  # of all stretches, those of 0 too
    ends = F.pad(starts[1:], (0, 1), value=len(flat))
    values = flat[starts]
    inside = values != 0
    upper, lower = _touching(starts[inside], ends[inside], width + 1)
    alike = values[inside][upper] == values[inside][lower]
    part = _smallest_connected(inside.sum(), upper[alike], lower[alike])
    numbers = torch.zeros(len(starts), dtype=torch.int32)
    numbers[inside] = part.unique(return_inverse=True)[1].int() + 1
    steps = torch.zeros(len(flat), dtype=torch.int32)                 # from each pixel's number to the next one's
    steps[starts] = F.pad(numbers, (1, 0)).diff()
    return steps.cumsum_(0).view(height, width + 1)[:, :width]


def _touching(starts, ends, width):
    """Pairs (upper, lower) of stretches in neighbouring rows that touch, also by a corner: two tensors of indices."""
    first = torch.searchsorted(ends, starts + width)                  # the first that ends at or after the start
    last = torch.searchsorted(starts, ends + width, right=True)
    count = (last - first).clamp(min=0)
    upper = torch.repeat_interleave(torch.arange(len(starts)), count)
    nth = torch.arange(len(upper)) - (count.cumsum(0) - count)[upper]
    return upper, first[upper] + nth


def _smallest_connected(count, upper, lower):
    """For each of `count` nodes the smallest node that edges lead to."""
    part = torch.arange(count)
    while True:
        a, b = part[upper], part[lower]
        if torch.equal(a, b):
            return part
        part.scatter_reduce_(0, torch.maximum(a, b), torch.minimum(a, b), "amin")
        while not torch.equal(part, part[part]):
            part = part[part]
