"""What the benchmarks share: both sides of a comparison in one process, timed in turn, medians, Markdown tables."""
import argparse
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

import models  # noqa: E402
from networks import fast  # noqa: E402
from running import process  # noqa: E402, F401
from running.compute import Compute, choose_compute, cpu_has_bf16, devices  # noqa: E402
from running.process import InputError  # noqa: E402

DATA = ROOT.parent / "shared" / "data" / "dsb2018"


def parser(description, **defaults):
    """The flags that all benchmarks have; defaults: those of batch and tile, or rounds."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--batch", type=int, default=defaults.get("batch", 4), help="images a step [%(default)s]")
    add("--tile", type=int, default=defaults.get("tile", 256), help="pixels a side [%(default)s]")
    add("--depth", type=int, default=3, help="encoder stages [%(default)s]")
    add("--rounds", type=int, default=defaults.get("rounds", 7), help="timed rounds [%(default)s]")
    add("--threads", type=int, default=0, help="of a CPU [all that this process may use]")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="[auto]")
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="of both sides; auto: on a CPU that "
        "in which the reference's training step is fastest [auto]")
    add("--plain-memory", action="store_true", help="on a CPU leave glibc's settings as they are, as in a process that "
        "only imports the models; train.py has it keep freed memory, by which the reference gains more than we do")
    return made


def start(args, quiet=False):
    """Return the Compute for the flags; print the command and the machine. Sets what auto chose in args."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "auto":
        args.device = devices()[0]
    kept = 0 if args.plain_memory else 1 << 30
    if args.device == "cpu" and args.amp == "auto":
        choose_compute("cpu", "off", keep_memory=kept)
        args.amp = fastest_of_reference(args)
    compute = choose_compute(args.device, args.amp, keep_memory=kept)
    if not quiet:
        print(f"`python {' '.join([os.path.relpath(sys.argv[0]), *sys.argv[1:]])}`: {machine(compute)}\n", flush=True)
    return compute


def fastest_of_reference(args):
    """"bf16" or "off", in which the reference's U-Net trains faster on this CPU: so a comparison flatters no side."""
    if not cpu_has_bf16():
        return "off"
    model, sides = reference("unet", depth=args.depth).to(memory_format=torch.channels_last).train(), {}
    for amp in ("off", "bf16"):
        compute = Compute(torch.device("cpu"), amp)
        sides[amp] = partial(training_step, model, *batch(args, compute), compute)
    seconds = in_turn(sides, 3, torch.device("cpu"), warmup=1)
    return min(seconds, key=lambda amp: statistics.median(seconds[amp]))


def machine(compute):
    if compute.device.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        cpu = Path("/proc/cpuinfo")
        found = [line.split(":")[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")] \
            if cpu.is_file() else []
        has = [name for name, test in (("AVX512-BF16", "_is_avx512_bf16_supported"), ("AMX", "_is_amx_tile_supported"))
               if getattr(torch.cpu, test, bool)()]
        name = f"{torch.get_num_threads()} threads of {' with '.join([*(found or [platform.machine()])[:1], *has])}"
    precision = str(compute.amp_dtype or torch.float32).removeprefix("torch.")
    return f"{name}, {precision}, torch {torch.__version__}"


def wait(device):
    """Until the device has done all that it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def in_turn(sides, rounds, device, warmup=2):
    """Seconds {name: [one a round]} of functions {name: function}, called one after the other in each round, so that a
    machine that changes its speed changes it for all. Every other round goes the other way round."""
    seconds = {name: [] for name in sides}
    for turn in range(warmup + rounds):
        for name in list(sides)[::1 if turn % 2 else -1]:
            function = sides[name]
            wait(device)
            started = time.perf_counter()
            function()
            wait(device)
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(seconds, slow, fast):
    """How many times faster `fast` is than `slow`: the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast]))


def table(header, rows):
    """Prints a Markdown table, each row when it comes."""
    for row in itertools.chain((header, ["---"] * len(header)), rows):
        print("| " + " | ".join(map(str, row)) + " |", flush=True)
    print(flush=True)


def pair(arch, encoder, depth, compute):
    """Return segmentation_models_pytorch's network and ours, with the same weights, on the device in channels_last."""
    theirs = reference(arch, encoder, depth)
    ours = our_network(arch, encoder, depth, compute)
    models.load_smp(ours, theirs.state_dict())
    return theirs.to(compute.device, memory_format=torch.channels_last), ours


def our_network(arch, encoder, depth, compute, in_channels=1):
    """Return our network as train.py trains it, on the device in channels_last."""
    channels = models.default_decoder_channels(depth)
    model = models.build_segmenter(arch, encoder, in_channels, depth=depth, decoder_channels=channels)
    return fast.speed_up(model.to(compute.device, memory_format=torch.channels_last))


def reference(arch, encoder="resnet18", depth=3, attention="scse"):
    try:
        import segmentation_models_pytorch as smp
    except ImportError as error:
        raise InputError("the benchmarks compare with segmentation-models-pytorch: pip install -r "
                         "tests/requirements.txt") from error
    known = encoder in smp.encoders.encoders
    return {"unet": smp.Unet, "unetpp": smp.UnetPlusPlus}[arch](
        encoder if known else f"tu-{encoder}", encoder_weights=None, encoder_depth=depth, in_channels=1, classes=2,
        decoder_channels=models.default_decoder_channels(depth), decoder_attention_type=attention)


def batch(args, compute):
    """Random images (N, 1, tile, tile) and truth (N, tile, tile) on the device."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(args.batch, 1, args.tile, args.tile, generator=generator)
    truth = torch.randint(0, 2, (args.batch, args.tile, args.tile), generator=generator)
    return compute.batch(images), truth.to(compute.device)


def training_step(model, images, truth, compute, app=None):
    """Forward and backward pass of a network in train mode, with cross-entropy and APP alone."""
    with compute.autocast():
        logits = model(images).float()
        loss = F.cross_entropy(logits, truth)
        if app:
            penalty, own = app(logits, truth)
            loss = loss + penalty + own
    for module in (model, app):
        if module:
            module.zero_grad(set_to_none=True)
    loss.backward()


def peak_memory(model, images, truth, compute):
    """Bytes of the tensors that a training step holds at its peak, gradients included, beside weights and batch. On a
    CPU from the profiler's record of each allocation, on a GPU from torch's own count."""
    model.train()
    training_step(model, images, truth, compute)
    model.zero_grad(set_to_none=True)
    if compute.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        training_step(model, images, truth, compute)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        training_step(model, images, truth, compute)
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        events = [event["args"] for event in json.loads(Path(file.name).read_text())["traceEvents"]
                  if event["name"] == "[memory]"]
    held = [event["Total Allocated"] for event in events]
    return max(held) - (held[0] - events[0]["Bytes"])


def resident_memory(model, images, truth, compute, steps=5):
    """Bytes that the process holds at its peak over some training steps, of a CPU; what the allocator keeps for itself
    included."""
    model.train()
    for _ in range(steps):
        training_step(model, images, truth, compute)
    status = Path("/proc/self/status")  # getrusage's maximum begins with that of the parent process
    if status.is_file():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def in_process_of_its_own(script, *arguments):
    """The last line that a script prints."""
    done = subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{Path(script).name} {' '.join(map(str, arguments))}: {done.stderr.strip()[-300:]}")
    return done.stdout.strip().splitlines()[-1]
