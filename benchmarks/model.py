"""Training step, inference and memory of our networks against segmentation_models_pytorch's: the same weights,
precision and memory layout (channels_last).

    python benchmarks/model.py                     training step, inference, peak memory
    python benchmarks/model.py --compile           the training step with torch.compile too (minutes of compiling)
    python benchmarks/model.py --profile           where a training step spends its time, by operator
    python benchmarks/model.py --device cuda

"of peak": the network's multiplications and additions, as the textbook form has them, over the time, as a share of what
a 4096 x 4096 x 4096 matrix product of this precision reaches on the same device. Our sub-pixel form does fewer.
"""
import statistics

import harness
import torch
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from networks import fast

NAMES = {"unet": "U-Net", "unetpp": "U-Net++"}
ROUNDS = 5  # profiled steps


def main(argv=None):
    parser = harness.parser(__doc__)
    parser.add_argument("--arch", nargs="+", choices=list(NAMES), default=list(NAMES), help="[both]")
    parser.add_argument("--encoder", default="resnet18", help="[resnet18]")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--resident", choices=["reference", "ours"], help="only print the memory that a process holds "
                        "which trains this side")
    args = parser.parse_args(argv)
    if args.resident:
        return print(resident(args))
    compute = harness.start(args)
    images, truth = harness.batch(args, compute)
    if args.profile:
        return print_profile(args, images, truth, compute)
    peak = matrix_peak(compute)
    rows = []
    for arch in args.arch:
        theirs, ours = harness.pair(arch, args.encoder, args.depth, compute)
        with FlopCounterMode(display=False) as counter:
            harness.training_step(theirs.train(), images, truth, compute)
        training_flops = counter.get_total_flops()

        # 1. training step
        sides = {"reference": theirs.train(), "ours": ours.train()}
        if args.compile:
            for name, model in zip(("reference compiled", "ours compiled"), harness.pair(arch, args.encoder, args.depth,
                                                                                      compute)):
                model.train().compile()
                sides[name] = model
        seconds = harness.in_turn({name: lambda model=model: harness.training_step(model, images, truth, compute)
                                   for name, model in sides.items()}, args.rounds, compute.device)
        pairs = [("reference", "ours")]
        if args.compile:
            pairs += [("reference", "ours compiled"), ("reference compiled", "ours compiled")]
        for one, other in pairs:
            rows.append(row(arch, f"training step, {one} : {other}", seconds, one, other, training_flops / peak))

        # 2. inference
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            theirs.eval()(images[:, :, :64, :64])
        scale = images[0, 0].numel() / 64 ** 2
        folded = fast.for_inference(ours)

        @torch.inference_mode()
        def predict(model):
            with compute.autocast():
                model(images)

        seconds = harness.in_turn({name: lambda model=model: predict(model) for name, model in
                                   (("reference", theirs.eval()), ("ours", folded))}, args.rounds, compute.device)
        rows.append(row(arch, "inference, ours with BatchNorm folded", seconds, "reference", "ours",
                        counter.get_total_flops() * scale / peak))

        # 3. memory: of the tensors; on a CPU of the process too, each side in processes of its own
        used = [harness.peak_memory(model, images, truth, compute) / 2 ** 20 for model in (theirs, ours)]
        rows.append([NAMES[arch], "training step, tensors at its peak", *(f"{m:.0f} MB" for m in used),
                     f"{used[1] / used[0]:.2f} of it", ""])
        if compute.device.type != "cpu":
            continue
        flags = ["--arch", arch, "--encoder", args.encoder, "--batch", args.batch, "--tile", args.tile, "--depth",
                 args.depth, "--device", compute.device.type, "--amp", args.amp, "--threads", torch.get_num_threads(),
                 *(["--plain-memory"] if args.plain_memory else [])]
        used = [statistics.median(int(harness.in_process_of_its_own(__file__, *flags, "--resident", side))
                                  for _ in range(3)) / 2 ** 20 for side in ("reference", "ours")]
        rows.append([NAMES[arch], "five steps, whole process", *(f"{m:.0f} MB" for m in used),
                     f"{used[1] / used[0]:.2f} of it", ""])
    print(f"{args.encoder}, depth {args.depth}, batch {args.batch} at {args.tile} x {args.tile}, median of "
          f"{args.rounds} rounds; matrix peak {peak / 1e12:.2f} TFLOP/s\n")
    harness.table(["network", "what", "reference", "ours", "gain", "of peak"], rows)


def print_profile(args, images, truth, compute):
    """The operators that take most of a training step, themselves, without what they call. The second column is of the
    reference as its users have it, without attention."""
    for arch in args.arch:
        theirs, ours = harness.pair(arch, args.encoder, args.depth, compute)
        plain = harness.reference(arch, args.encoder, args.depth, attention=None)
        sides = [theirs, plain.to(compute.device, memory_format=torch.channels_last), ours]
        columns = [milliseconds(model.train(), images, truth, compute) for model in sides]
        names = sorted(set().union(*columns), key=lambda name: -max(column.get(name, 0) for column in columns))
        rows = [[name, *(f"{column.get(name, 0):.0f}" for column in columns)] for name in names[:16]]
        rows.append(["others", *(f"{sum(column.get(name, 0) for name in names[16:]):.0f}" for column in columns)])
        rows.append(["sum", *(f"{sum(column.values()):.0f}" for column in columns)])
        print(f"{NAMES[arch]}, {args.encoder}, depth {args.depth}, batch {args.batch} at {args.tile} x {args.tile}; ms "
              f"a step, means of {ROUNDS}\n")
        harness.table(["operator", "reference", "reference without attention", "ours"], rows)


def milliseconds(model, images, truth, compute):
    """{operator: ms a step}."""
    for _ in range(2):
        harness.training_step(model, images, truth, compute)
    with profile(acc_events=True) as profiler:
        for _ in range(ROUNDS):
            harness.training_step(model, images, truth, compute)
    of_gpu = compute.device.type == "cuda"
    return {event.key.removeprefix("aten::"):
            (event.self_device_time_total if of_gpu else event.self_cpu_time_total) / 1000 / ROUNDS
            for event in profiler.key_averages()}


def row(arch, what, seconds, one, other, seconds_at_peak):
    medians = [statistics.median(seconds[name]) for name in (one, other)]
    return [NAMES[arch], what, *(f"{m * 1000:.0f} ms" for m in medians), f"{harness.ratio(seconds, one, other):.2f}x",
            " : ".join(f"{seconds_at_peak / m:.0%}" for m in medians)]


def matrix_peak(compute):
    a = torch.randn(4096, 4096, device=compute.device, dtype=compute.amp_dtype or torch.float32)
    return 2 * 4096 ** 3 / min(harness.in_turn({"": lambda: a @ a}, 5, compute.device)[""])


def resident(args):
    compute = harness.start(args, quiet=True)
    theirs, ours = harness.pair(args.arch[0], args.encoder, args.depth, compute)
    model = theirs if args.resident == "reference" else ours
    return harness.resident_memory(model, *harness.batch(args, compute), compute)


if __name__ == "__main__":
    harness.process.command(main)
