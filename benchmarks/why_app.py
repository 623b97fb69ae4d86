"""Why APP helps or does not: what its autoencoder has learnt, what its penalty weighs, and how its gradient compares to
the cross-entropy's while a network trains with it. Needs scipy.

    python benchmarks/why_app.py --data DIR
    python benchmarks/why_app.py --data DIR --app linear --limit-train 16 --seeds 1

1. Edits of validation masks, each of as many pixels as the tile's nucleus of median size has: the penalty of the conv
   form for an edit, and the plain distance of the embeddings, in ratio to that many scattered background pixels. For
   the cross-entropy all are alike. The autoencoder has learnt true masks of the training images alone.
2. A training (train.py's short recipe, two classes, batches of 8 tiles of 128), at some of its steps: the
   penalty's gradient at the logits, its norm in ratio to the cross-entropy's and the cosine between the two; of the
   conv form how many directions the embedding of true masks has (participation ratio of the covariance's eigenvalues)
   and the IoU of the truth's and of the prediction's reconstructions.
"""
import contextlib
import statistics
import sys
import tempfile
from pathlib import Path

import harness
import numpy as np
import torch
import torch.nn.functional as F

import data
import dedl
import train
from images import manifests
from running.compute import choose_compute

TILE, BATCH = 128, 8


def main(argv=None):
    parser = harness.argparse.ArgumentParser(description=__doc__,
                                             formatter_class=harness.argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, default=harness.DATA, help="data folder [%(default)s]")
    add("--app", choices=["conv", "linear"], default="conv", help="the form of part 2 [conv]")
    add("--limit-train", type=int, default=16, help="training images [16]")
    add("--steps", type=int, default=300, help="of the training [300]")
    add("--seeds", type=int, default=3, help="trainings, whose means are shown [3]")
    args = parser.parse_args(argv)
    compute = choose_compute()
    args.amp = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "off"}[compute.amp_dtype]
    print(f"`python {' '.join(harness.sys.argv)}`: {harness.machine(compute)}\n", flush=True)
    if args.app == "conv":
        weigh_edits(args)
    follow_training(args)


# ---------------------------------------------------------------------------------------------------- 1. edits of masks
def weigh_edits(args):
    from scipy import ndimage
    records, _ = manifests.find_records(args.data, 1)
    fields = {split: data.read_fields([r for r in records if r.split == split]) for split in ("train", "validation")}
    app, precision = taught(data.Crops(fields["train"], TILE), 400)
    rng, crops, found = np.random.default_rng(0), data.Crops(fields["validation"], TILE), {}
    for index in range(400):
        truth = crops[index][1]
        edits = edits_of(truth.numpy().astype(bool), ndimage, rng)
        if not edits:
            continue
        masks = torch.stack([truth, *(torch.from_numpy(mask).long() for mask in edits.values())])
        embedding = encode(app, masks).movedim(1, -1)                                     # (1 + edits, h, w, E)
        apart = embedding[1:] - embedding[0]
        penalty, plain = ((apart @ precision) * apart).mean((1, 2, 3)), (apart ** 2).mean((1, 2, 3))
        for number, name in enumerate(edits):
            found.setdefault(name, []).append((penalty[number] / penalty[-1], plain[number] / plain[-1]))
    print("An edit's penalty, in ratio to that of as many scattered pixels, median\n")
    harness.table(["edit", "penalty", "plain distance", "masks"],
                  [[name, *(f"{statistics.median(column):.1f}" for column in zip(*rows)), len(rows)]
                   for name, rows in found.items()])


def taught(crops, steps):
    """The conv form after learning from true masks, and the inverse covariance of its embeddings."""
    torch.manual_seed(0)
    app = dedl.ConvAPP()
    optimizer = dedl.app_optimizer(app)
    for step in range(steps):
        truth = torch.stack([crops[step * BATCH + i][1] for i in range(BATCH)])
        optimizer.zero_grad()
        F.cross_entropy(app.autoencoder(one_hot(truth)), truth).backward()
        optimizer.step()
        precision = app.precision(encode(app, truth))
    return app, precision


@torch.no_grad()
def encode(app, truth):
    return app.autoencoder.encode(one_hot(truth))


def edits_of(mask, ndimage, rng):
    """{name: mask (H, W) edited}, all by as many pixels; {} where the mask has no room for them."""
    labels, count = ndimage.label(mask)
    sizes = ndimage.sum(mask, labels, range(1, count + 1))
    if count < 2:
        return {}
    number = int(np.argsort(sizes)[count // 2]) + 1
    nucleus, pixels = labels == number, int(sizes[number - 1])
    places = {"nuclei's border pixels taken away": mask & ~ndimage.binary_erosion(mask, border_value=1),
              "pixels added around nuclei": ndimage.binary_dilation(mask) & ~mask,
              "pixels scattered over the background": ~mask}  # the last, for the ratios
    elsewhere = np.roll(nucleus, rng.integers(0, mask.shape), (0, 1))
    if pixels < 60 or (elsewhere & mask).any() or min(map(np.sum, places.values())) < pixels:
        return {}
    edits = {"a nucleus left out": mask & ~nucleus, "a nucleus invented": mask | elsewhere}
    for name, where in places.items():
        chosen = rng.permutation(np.flatnonzero(where))[:pixels]
        edits[name] = mask.copy()
        edits[name].flat[chosen] ^= True
    return edits


# --------------------------------------------------------------------------------------------- 2. gradients in training
def follow_training(args):
    at = sorted({round(args.steps * share) - 1 for share in (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.75, 1)} - {-1})
    rows = {}
    for seed in range(1, args.seeds + 1):
        seen = follow_one(args, seed, at)
        for step, row in seen.items():
            rows.setdefault(step, []).append(row)
    names = list(next(iter(rows.values()))[0])
    print(f"A training with --app {args.app} on {args.limit_train} images, mean of {args.seeds} seeds\n")
    harness.table(["step", *names], [[step + 1, *(f"{statistics.fmean(row[name] for row in found):.3f}"
                                                  for name in names)] for step, found in sorted(rows.items())])


def follow_one(args, seed, at):
    """{step: {what: value}} of one training."""
    seen, form = {}, {"conv": dedl.ConvAPP, "linear": dedl.LinearAPP}[args.app]
    build, count = dedl.build_app, iter(range(args.steps))

    class Watched(form):
        def forward(self, logits, truth, class_weights=None):
            penalty, own = super().forward(logits, truth, class_weights)
            if (step := next(count)) in at:
                seen[step] = look(self, logits, truth, penalty, class_weights)
            return penalty, own

    def watched(form, width, classes=2, activation="gelu"):
        return Watched(activation=activation, **({"width": width} if form == "linear" else {}))

    dedl.build_app = watched
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            train.main(["--data", str(args.data), "--out", f"{folder}/run", "--app", args.app, "--weights", "none",
                        "--recipe", "short", "--nuclei", "mask", "--tile", str(TILE),
                        "--batch-size", str(BATCH), "--amp", args.amp, "--epochs", "1", "--steps", str(args.steps),
                        "--limit-train", str(args.limit_train), "--seed", str(seed)])
    finally:
        dedl.build_app = build
    return seen


def look(app, logits, truth, penalty, class_weights):
    entropy = F.cross_entropy(logits, truth, class_weights)
    of_penalty, of_entropy = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (penalty, entropy))
    row = {"cross-entropy": entropy.item(), "penalty": penalty.item(),
           "gradient ratio": (of_penalty.norm() / of_entropy.norm()).item(),
           "cosine": F.cosine_similarity(of_penalty.flatten(), of_entropy.flatten(), 0).item()}
    with torch.no_grad():
        if isinstance(app, dedl.ConvAPP):
            embedding = app.autoencoder.encode(one_hot(truth)).float()
            flat = (embedding - embedding.mean((0, 2, 3), keepdim=True)).transpose(0, 1).flatten(1)
            with torch.autocast(flat.device.type, enabled=False):
                values = torch.linalg.eigvalsh(flat @ flat.T)
            row |= {"directions": (values.sum() ** 2 / (values ** 2).sum()).item(),
                    "IoU of truth again": iou(app.autoencoder(one_hot(truth)), truth),
                    "of prediction again": iou(app.autoencoder(logits.softmax(1)), truth)}
        else:
            row["IoU after the autoencoder"] = iou(app.autoencoder(logits), truth)
        return {**row, "of prediction": iou(logits, truth)}


def one_hot(truth):
    return F.one_hot(truth, 2).permute(0, 3, 1, 2).float()                                # (N, 2, H, W)


def iou(logits, truth):
    found = logits.argmax(1).bool()
    return dedl.image_iou(dedl.confusion(found, truth.bool()))


if __name__ == "__main__":
    harness.process.command(main)
