"""How time and memory of a training step and of inference grow: over tile, batch, encoder, decoder, depth and threads.

    python benchmarks/scaling.py                  a table, and scaling.png where matplotlib is installed
    python benchmarks/scaling.py --only encoder --device cuda

Each row is measured in a process of its own, since memory once taken is not seen to be given back.
"""
import json
import os
import statistics
from pathlib import Path

import harness
import torch

import models
from networks import fast

ENCODERS = ["resnet18", "resnet34", "resnet50", "resnet101", *(f"efficientnet_b{i}" for i in range(8))]
SWEEPS = {"tile": [128, 192, 256, 384, 512], "batch": [1, 2, 4, 8], "encoder": ENCODERS, "arch": ["unet", "unetpp"],
          "depth": [2, 3, 4, 5], "threads": [1, 2, 4, 8, 16]}


def main(argv=None):
    parser = harness.parser(__doc__, rounds=3)
    parser.add_argument("--only", choices=list(SWEEPS), nargs="+", default=list(SWEEPS), help="[all]")
    parser.add_argument("--plot", type=Path, default=Path("scaling.png"), help="[%(default)s]")
    parser.add_argument("--arch", choices=list(models.DECODERS), default="unet", help="[unet]")
    parser.add_argument("--encoder", default="resnet18", help="[resnet18]")
    parser.add_argument("--one", action="store_true", help="measure this one setting and print it as JSON")
    args = parser.parse_args(argv)
    compute = harness.start(args, quiet=args.one)
    if args.one:
        return print(json.dumps(measure(args, compute)))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    base = {"tile": args.tile, "batch": args.batch, "encoder": args.encoder, "arch": args.arch, "depth": args.depth,
            "threads": args.threads or torch.get_num_threads()}
    found = {}
    for sweep in args.only:
        if sweep == "threads" and compute.device.type != "cpu":
            continue
        rows = []
        for value in SWEEPS[sweep]:
            if sweep == "threads" and value > cores:
                continue
            flags = [text for name, at in {**base, sweep: value}.items() for text in (f"--{name}", at)]
            row = json.loads(harness.in_process_of_its_own(
                __file__, "--one", *flags, "--rounds", args.rounds, "--device", args.device, "--amp", args.amp,
                *(["--plain-memory"] if args.plain_memory else [])))
            found.setdefault(sweep, []).append((value, row))
            rows.append([value, f"{row['training'] * 1000:.0f} ms", f"{row['images'] / row['training']:.2f}",
                         f"{row['inference'] * 1000:.0f} ms", f"{row['images'] / row['inference']:.2f}",
                         f"{row['memory'] / 2 ** 20:.0f} MB", f"{row['parameters'] / 1e6:.2f} M"])
        said = ", ".join(f"{name} {value}" for name, value in base.items() if name != sweep)
        print(f"Over {sweep}; {said}; median of {args.rounds} rounds\n")
        harness.table([sweep, "training step", "images/s", "inference", "images/s", "peak memory of training",
                       "weights"], rows)
    if found:
        plot(found, args.plot)


def measure(args, compute):
    model = harness.our_network(args.arch, args.encoder, args.depth, compute)
    images, truth = harness.batch(args, compute)
    memory = harness.peak_memory(model, images, truth, compute)
    folded = fast.for_inference(model)

    @torch.inference_mode()
    def predict():
        with compute.autocast():
            folded(images)

    seconds = harness.in_turn({"training": lambda: harness.training_step(model.train(), images, truth, compute),
                               "inference": predict}, args.rounds, compute.device, warmup=1)
    return {**{name: statistics.median(values) for name, values in seconds.items()}, "memory": memory,
            "images": args.batch, "parameters": sum(p.numel() for p in model.parameters())}


def plot(found, file):
    try:
        import matplotlib
    except ImportError:
        return print("no plot: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(2, len(found), figsize=(3.2 * len(found), 5.5), squeeze=False)
    for column, (sweep, points) in enumerate(found.items()):
        names = [str(value).replace("efficientnet_", "").replace("resnet", "r") for value, _ in points]
        x = [value for value, _ in points] if sweep in ("tile", "batch", "depth", "threads") else range(len(points))
        upper, lower = axes[:, column]
        for kind in ("training", "inference"):
            upper.plot(x, [row[kind] * 1000 / row["images"] for _, row in points], "o-", label=kind)
        lower.plot(x, [row["memory"] / 2 ** 20 for _, row in points], "o-", color="tab:green")
        for axis in (upper, lower):
            axis.set_ylim(0)
            axis.set_xticks(list(x), names, rotation=60 if len(names) > 5 else 0, fontsize=8)
        lower.set_xlabel(sweep)
    axes[0][0].set_ylabel("ms an image")
    axes[0][0].legend()
    axes[1][0].set_ylabel("peak memory of training, MB")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    print(f"plot: {file}")


if __name__ == "__main__":
    harness.process.command(main)
