"""Nuclei of a mask: its connected parts."""
import torch
import torch.nn.functional as F


def connected_parts(mask: torch.Tensor) -> torch.Tensor:
    """Return a label image (H, W) int32 of a mask (H, W) bool: 0 outside, 1, 2, ... for its connected parts from top to
    bottom. Pixels that touch by a corner are connected (scipy.ndimage.label with a structure of ones).

    The stretches of True in a row are the nodes of a graph; stretches that touch in neighbouring rows are its edges.
    Each node then takes over the smallest number of its part.
    """
    height, width = mask.shape
    flat = F.pad(mask, (0, 1)).flatten()                              # a column of False after each row
    before = F.pad(flat, (1, 0))[:-1]
    starts = (flat & ~before).nonzero()[:, 0]
    ends = (before & ~flat).nonzero()[:, 0]                           # exclusive
    part = _smallest_connected(len(starts), *_touching(starts, ends, width + 1))
    _, number = part.unique(return_inverse=True)
    steps = torch.zeros(len(flat) + 1, dtype=torch.int32)             # up where a stretch begins, down where it ends
    steps[starts] = number.int() + 1
    steps[ends] -= number.int() + 1
    return steps.cumsum_(0)[:-1].view(height, width + 1)[:, :width]


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
