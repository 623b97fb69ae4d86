"""The prediction of whole fields, by tiles that overlap, and of pictures' labels; what comes of it is counted."""
import csv
import math

import torch
import torch.nn.functional as F

import dedl
import models
from images import manifests
from running import process
from running.process import InputError

# Fields are predicted by larger tiles than they are trained by, most of them whole: at a tile's border the network sees
# less. Three networks trained by 256 on DSB2018 all did better so, on validation, than predicted by 256 too.
TILE = 1024
OVERLAP = 256         # of neighbouring tiles, at least; see benchmarks/seams.py
BATCH = 1 << 19       # pixels: small fields of one size are predicted together, 8 of 256 x 256


# ------------------------------------------------------------------------------------------------------- whole fields
def tile_weights(size, most=TILE, overlap=OVERLAP):
    """[(start, weights)] of the tiles along an axis of `size` pixels: as few as cover it, of at most `most` pixels,
    with neighbours that overlap by `overlap`; one of the whole size if that is not more than `most`.

    Each weight falls smoothly to 0 towards a border where another tile goes on; at each pixel they sum to 1.
    """
    if size <= most:
        return [(0, torch.ones(size))]
    overlap = min(overlap, most - 1)
    count = math.ceil((size - overlap) / (most - overlap))
    tile = math.ceil((size + (count - 1) * overlap) / count)
    starts = [round(i * (size - tile) / (count - 1)) for i in range(count)]
    depth = torch.arange(tile) + 0.5                                  # pixels from the tile's border
    ramp = (torch.minimum(depth, tile - depth) / max(1, overlap)).clamp(max=1)
    ramp = ramp * ramp * (3 - 2 * ramp)
    whole = torch.zeros(size)
    for start in starts:
        whole[start:start + tile] += ramp
    return [(start, ramp / whole[start:start + tile]) for start in starts]


def predict(model, fields, compute, tta=False, tile=TILE, overlap=OVERLAP):
    """Predicts fields of one size by overlapping tiles, from top to bottom: yields (rows, logits (N, classes, rows, W)
    float32), a slice of finished rows each. Only as many rows as a tile has are held.

    tta: of each tile the mean logits over its four turns, each as it is and mirrored (test-time augmentation).
    """
    height, width = fields[0].shape
    bands, columns = ([(start, start + len(weights), weights.to(compute.device))
                       for start, weights in tile_weights(size, tile, overlap)] for size in (height, width))
    waiting = None                                                    # logits of rows that the next tiles add to
    for number, (top, bottom, row_weights) in enumerate(bands):
        total = None
        for left, right, column_weights in columns:
            tiles = torch.stack([field.window(slice(top, bottom), slice(left, right)) for field in fields])
            logits = eight_ways(model, tiles, compute) if tta else forward(model, tiles, compute)
            if total is None:
                total = logits.new_zeros(*logits.shape[:3], width)
            total[..., left:right] += logits * (row_weights[:, None] * column_weights)
        if waiting is not None:
            total[:, :, :waiting.shape[2]] += waiting
        end = bands[number + 1][0] if number + 1 < len(bands) else height
        yield slice(top, end), total[:, :, :end - top]
        waiting = total[:, :, end - top:].clone()


def forward(model, images, compute):
    """The logits, float32, of images (N, C, H, W)."""
    with compute.autocast():
        return model(compute.batch(images)).float()                                           # (N, classes, H, W)


def eight_ways(model, images, compute):
    total = 0
    for turns in range(4):
        for flip in (False, True):
            turned = images.rot90(turns, (2, 3))
            logits = forward(model, turned.flip(3) if flip else turned, compute)
            total = total + (logits.flip(3) if flip else logits).rot90(-turns, (2, 3))
    return total / 8


@torch.inference_mode()
def evaluate(model, fields, compute, class_weights=None, tta=False, seen=lambda indices, rows, logits: None):
    """Predicts all fields: pixel counts (fields, 4), the mean cross-entropy, and the predicted masks (H, W) bool. Of
    new images, which have no truth, the masks alone. `seen` is called with the logits (N, classes, rows, W) of some
    rows of the fields `indices`, as they are finished.

    Of several processes each predicts a part of the fields. Counts and loss are of all fields in each of them, the
    masks of the others' fields are None.
    """
    model = models.for_inference(model)
    counts, masks = torch.zeros(len(fields), 4, dtype=torch.int64), [None] * len(fields)
    loss = weight = 0.0
    for indices in batches_of_one_size(fields)[process.rank()::process.world()]:
        for i in indices:
            masks[i] = torch.empty(fields[i].shape, dtype=torch.bool)
        for rows, logits in predict(model, [fields[i] for i in indices], compute, tta):
            found = logits.argmax(1).bool()                                                   # (N, rows, W)
            for i, mask in zip(indices, found):
                masks[i][rows] = mask.cpu()
            seen(indices, rows, logits)
            if fields[indices[0]].mask is None:
                continue
            truth = torch.stack([fields[i].mask[rows] for i in indices]).to(logits.device)
            # not reduction="sum": a GPU adds in the order in which its threads come
            loss += F.cross_entropy(logits, truth.long(), class_weights, reduction="none").sum().item()
            weight += truth.numel() if class_weights is None else class_weights[truth.long()].sum().item()
            for i, mask, true in zip(indices, found, truth):
                counts[i] += dedl.confusion(mask, true).cpu()
    loss, weight = process.total(torch.tensor([loss, weight], dtype=torch.float64)).tolist()
    return process.total(counts), loss / weight if weight else math.nan, masks


def batches_of_one_size(fields):
    """Lists of the fields' indices: fields of equal size, of BATCH pixels together or one that is larger."""
    sizes = {}
    for i, field in enumerate(fields):
        sizes.setdefault(field.shape, []).append(i)
    batches = []
    for (height, width), indices in sizes.items():
        count = max(1, BATCH // (height * width))
        batches += [indices[i:i + count] for i in range(0, len(indices), count)]
    return batches


def count_nuclei(mask):
    """The number of nuclei in a mask (H, W) bool: of its connected parts, also those that touch by a corner. By scipy
    where it is installed, else by _count_parts."""
    try:
        from scipy import ndimage
    except ImportError:
        return _count_parts(mask)
    return ndimage.label(mask.numpy(), torch.ones(3, 3).numpy())[1]


def _count_parts(mask):
    """The connected parts of a mask (H, W) bool. Its runs, the stretches of True in a row, are the nodes of a graph,
    runs that touch in neighbouring rows its edges; then each node takes over the smallest number of its part."""
    width = mask.shape[1] + 1
    flat = F.pad(mask, (0, 1)).flatten()                              # a column of False behind each row
    before = F.pad(flat, (1, 0))[:-1]
    starts = (flat & ~before).nonzero()[:, 0]
    ends = (before & ~flat).nonzero()[:, 0] - 1                       # inclusive
    # the runs in the next row that a run, with one pixel on each side, touches: one behind the other
    first = torch.searchsorted(ends, starts - 1 + width)
    count = (torch.searchsorted(starts, ends + 1 + width, right=True) - first).clamp(min=0)
    upper = torch.repeat_interleave(torch.arange(len(starts)), count)
    lower = torch.arange(len(upper)) - (count.cumsum(0) - count)[upper] + first[upper]
    part = torch.arange(len(starts))
    while True:
        a, b = part[upper], part[lower]
        if torch.equal(a, b):
            return len(part.unique())
        part.scatter_reduce_(0, torch.maximum(a, b), torch.minimum(a, b), "amin")
        while not torch.equal(part, part[part]):
            part = part[part]


# ------------------------------------------------------------------------------------------- labels of pictures
@torch.inference_mode()
def classify(model, pictures, compute, indices=None, flips=False, batch=32, progress=iter):
    """Logits (pictures, classes), float32 on the CPU, of pictures uint8 (3, S, S) by index. flips: the mean over the
    picture as it is and mirrored along each side and both (test-time augmentation): four times the work. Of several
    processes each computes a part, and all get the whole."""
    model.eval()
    indices = range(len(pictures)) if indices is None else indices
    own, found = indices[process.rank()::process.world()], []
    for start in progress(range(0, len(own), batch)):
        images = compute.batch(torch.stack([pictures[i] for i in own[start:start + batch]]))         # (N, 3, S, S)
        with compute.autocast():
            # forward, not the call: torch.compile would compile anew for each size of batch
            ways = [model.forward(images.flip(axes) if axes else images).float()
                    for axes in ([(), (2,), (3,), (2, 3)] if flips else [()])]
        found.append(torch.stack(ways).mean(0).cpu())
    parts = process.gather(torch.cat(found) if found else None)
    logits = parts[0].new_empty(len(indices), parts[0].shape[1])
    for number, part in enumerate(parts):
        if part is not None:
            logits[number::process.world()] = part
    return logits                                                                                       # (N, classes)


def save_probabilities(file, records, classes, probabilities, with_labels=False, earlier=None):
    """A CSV of image, with_labels the true labels joined by ';', and a column of probabilities a class. earlier:
    {image: row} that stay in front, but for these images'."""
    with process.replacing(file, "w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["image", *(["labels"] if with_labels else []), *classes])
        again = {record.name for record in records}
        writer.writerows(row for image, row in (earlier or {}).items() if image not in again)
        for record, row in zip(records, probabilities.tolist()):
            writer.writerow([record.name, *([";".join(record.labels)] if with_labels else []),
                             *(f"{p:.6f}" for p in row)])


def load_probabilities(file, classes):
    """What save_probabilities wrote with labels: images, probabilities (N, classes), truth (N, classes) bool. Raises
    InputError."""
    manifests.refuse_special(file)
    try:
        with open(file, newline="", encoding="utf-8", errors="surrogateescape") as handle:
            header, *rows = csv.reader(handle)
        if header != ["image", "labels", *classes]:
            raise ValueError
        if not rows or any(len(row) != len(header) for row in rows):
            raise ValueError
        probabilities = torch.tensor([[float(p) for p in row[2:]] for row in rows])
        if not ((probabilities >= 0) & (probabilities <= 1)).all():
            raise ValueError
    except (ValueError, csv.Error) as error:
        raise InputError(f"{file}: is not what train.py writes for the classes {', '.join(classes)}") from error
    truth = torch.tensor([[name in row[1].split(";") for name in classes] for row in rows])
    return [row[0] for row in rows], probabilities, truth
