"""What APP costs: a training step of our U-Net without it, with the conv form and with the linear one, on the same
batches, forward and backward pass without the optimizer. Inference is the same network in all three: there is nothing
of APP left to be timed.

    python benchmarks/app.py
    python benchmarks/app.py --tile 480 --batch 2 --device cuda
"""
import statistics

import harness

import dedl
import models


def main(argv=None):
    parser = harness.parser(__doc__)
    args = parser.parse_args(argv)
    compute = harness.start(args)
    images, truth = harness.batch(args, compute)
    channels = models.default_decoder_channels(args.depth)
    model = models.build_segmenter(depth=args.depth, decoder_channels=channels).train()
    model = model.to(compute.device, memory_format=harness.torch.channels_last)
    sides = {}
    for form in ("none", "conv", "linear"):
        app = dedl.build_app(form, args.tile)
        app = app.to(compute.device) if app else None
        sides[form] = lambda app=app: harness.training_step(model, images, truth, compute, app)
    seconds = harness.in_turn(sides, args.rounds, compute.device)
    rows = []
    for form in sides:
        app = dedl.build_app(form, args.tile)
        weights = sum(p.numel() for p in app.parameters()) if app else 0
        rows.append([f"`--app {form}`", f"{statistics.median(seconds[form]) * 1000:.0f} ms",
                     f"{(harness.ratio(seconds, form, 'none') - 1) * 100:+.1f} %", f"{weights / 1e6:.2f} M"])
    print(f"U-Net/resnet18, depth {args.depth}, batch {args.batch} at {args.tile} x {args.tile}, forward and backward "
          f"pass, median of {args.rounds} rounds\n")
    harness.table(["APP", "training step", "more than without", "weights, in training only"], rows)


if __name__ == "__main__":
    harness.runs.command(main)
