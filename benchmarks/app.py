"""What APP costs (the paper's supplement, section 1.2): a training step of our U-Net without it, with the conv form and
with the linear one, on the same batches, forward and backward pass and optimizer; what is saved, and what inference
takes.

    python benchmarks/app.py
    python benchmarks/app.py --tile 480 --batch 2 --device cuda
"""
import statistics
import tempfile
from pathlib import Path

import harness

import dedl
import models
from networks import fast
from running import runs
from running.muon import Muon

FORMS = ("none", "conv", "linear")


def main(argv=None):
    parser = harness.parser(__doc__)
    parser.add_argument("--arch", choices=list(models.DECODERS), default="unet", help="[unet]")
    parser.add_argument("--encoder", default="resnet18", help="[resnet18]")
    parser.add_argument("--steps", type=int, default=300, help="steps whose seconds are shown [300]")
    args = parser.parse_args(argv)
    compute = harness.start(args)
    images, truth = harness.batch(args, compute)
    training, inference, sides = {}, {}, {}
    for form in FORMS:
        sides[form] = side(form, args, compute)
        model, app, optimizers = sides[form]

        def step(model=model, app=app, optimizers=optimizers):
            harness.training_step(model.train(), images, truth, compute, app)
            with compute.autocast():
                for optimizer in optimizers:
                    optimizer.step()
        training[form] = step
    seconds = harness.in_turn(training, args.rounds, compute.device)
    for form in FORMS:
        folded = fast.for_inference(sides[form][0])

        def infer(folded=folded):
            with harness.torch.inference_mode(), compute.autocast():
                folded(images)
        inference[form] = infer
    of_inference = harness.in_turn(inference, args.rounds, compute.device)
    rows = []
    for form in FORMS:
        model, app, _ = sides[form]
        median = statistics.median(seconds[form])
        rows.append([f"`--app {form}`", f"{median * 1000:.0f} ms",
                     f"{(harness.ratio(seconds, form, 'none') - 1) * 100:+.1f} %", f"{median * args.steps:.0f} s",
                     f"{sum(p.numel() for p in app.parameters()) / 1e6 if app else 0:.2f} M",
                     f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M", f"{saved(model) / 1e6:.1f} MB",
                     f"{statistics.median(of_inference[form]) * 1000:.0f} ms"])
    print(f"{args.arch}/{args.encoder}, depth {args.depth}, batch {args.batch} at {args.tile} x {args.tile}, median of "
          f"{args.rounds} rounds\n")
    harness.table(["APP", "training step", "more than without", f"{args.steps} steps", "its weights, in training only",
                   "network", "best.pt", "inference"], rows)


def side(form, args, compute):
    """Network, APP module and their optimizers, of a training with this form."""
    harness.torch.manual_seed(0)
    model = harness.our_network(args.arch, args.encoder, args.depth, compute)
    app = dedl.build_app(form, args.tile)
    app = app.to(compute.device) if app else None
    optimizers = [Muon(model.parameters(), lr=1e-4), *([dedl.app_optimizer(app)] if app else [])]
    return model, app, optimizers


def saved(model):
    """Bytes of the network's checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "best.pt"
        runs.save_checkpoint({"model": model.state_dict()}, file)
        return file.stat().st_size


if __name__ == "__main__":
    harness.process.command(main)
