"""Where a training step of the default goes, part by part: train.py's own parts on DSB2018's tiles, timed one after the
other in each round, medians.

    python benchmarks/step.py                  on dsb2018 in ../shared/data
    python benchmarks/step.py --rounds 100

The way back is timed in parts: first from each loss to the logits, then from their sum through the network.
"""
import collections
import copy
import statistics
import time
from pathlib import Path

import harness
import torch
import torch.nn.functional as F

import data
import dedl
import models
import train
from images import manifests
from running import process
from running.compute import add_compute, choose_compute
from running.process import number


def main(argv=None):
    parser = process.Parser(description=__doc__)
    parser.add_argument("--data", type=Path, default=harness.DATA, help="data folder [%(default)s]")
    parser.add_argument("--rounds", type=number(int, 1), default=30, help="[30]")
    add_compute(parser.add_argument)
    args = parser.parse_args(argv)
    compute = choose_compute(args.device, args.amp)
    settings = train.parse_args(["--data", str(args.data), "--weights", "none"])
    records, _ = manifests.find_records(args.data)
    fields = data.read_fields([record for record in records if record.split == "train"])
    classes = train.choose_classes(settings.nuclei, fields)
    model = models.build_segmenter(settings.arch, settings.encoder, len(fields[0].image), classes, settings.depth,
                                   models.default_decoder_channels(settings.depth))
    app, _ = train.segmentation_losses(torch.ones(classes, device=compute.device), settings)
    parts = train.make_parts(model, app, settings, compute)
    other = copy.deepcopy(model)
    adamw = torch.optim.AdamW(other.parameters(), lr=settings.lr, fused=True)
    tiles = data.Crops(fields, settings.tile, classes=classes)
    seconds = collections.defaultdict(list)

    def timed(what, function):
        harness.wait(compute.device)
        started = time.perf_counter()
        result = function()
        harness.wait(compute.device)
        seconds[what].append(time.perf_counter() - started)
        return result

    def draw(turn):
        batch = [tiles[(turn * settings.batch_size + i) % len(tiles)] for i in range(settings.batch_size)]
        return [torch.stack(part) for part in zip(*batch)]

    def forward(images):
        with compute.autocast():
            return model(images).float()

    def gradient(loss_of, logits, truth):
        leaf = logits.detach().requires_grad_()
        with compute.autocast():
            loss = loss_of(leaf, truth)
        loss.backward()
        return leaf.grad

    for turn in range(args.rounds + 2):
        images, truth = timed("tiles drawn and changed", lambda turn=turn: draw(turn))
        images, truth = compute.batch(images), truth.to(compute.device)
        parts["optimizer"].zero_grad()
        parts["app_optimizer"].zero_grad()
        logits = timed("network, forward", lambda images=images: forward(images))
        both = [timed(what, lambda loss_of=loss_of, logits=logits, truth=truth: gradient(loss_of, logits, truth))
                for what, loss_of in (("cross-entropy and Dice", usual_loss), ("APP", lambda z, y: sum(app(z, y))))]
        timed("network, backward", lambda logits=logits, both=both: logits.backward(sum(both)))
        for weight, own in zip(other.parameters(), model.parameters()):
            weight.grad = own.grad
        timed("(AdamW in its place)", adamw.step)
        with compute.autocast():
            timed("optimizer", parts["optimizer"].step)
        timed("APP's optimizer", parts["app_optimizer"].step)
        timed("average of the weights", lambda: parts["average"].update_parameters(model))
    medians = {what: statistics.median(own[2:]) for what, own in seconds.items()}
    whole = sum(value for what, value in medians.items() if not what.startswith("("))
    print(f"{harness.machine(compute)}, {args.data.name}, {settings.arch}/{settings.encoder}, depth {settings.depth}, "
          f"{settings.batch_size} tiles of {settings.tile}, medians of {args.rounds} rounds\n")
    rows = [(what, f"{1000 * value:.1f} ms", f"{value / whole:.1%}") for what, value in medians.items()]
    harness.table(["part of a step", "time", "share"], [*rows, ("sum", f"{1000 * whole:.1f} ms", "")])


def usual_loss(logits, truth):
    return F.cross_entropy(logits, truth, ignore_index=dedl.IGNORED) + dedl.dice_loss(logits, truth)


if __name__ == "__main__":
    process.command(main)
