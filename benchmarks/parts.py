"""The parts of a decoder in their fast forms (networks/fast.py) against the textbook ones (models.py): forward and
backward pass of each, at the sizes that it has in U-Net/resnet18 of depth 3. Then what each form brings to the whole
training step of U-Net, and its inference, against segmentation_models_pytorch.

    python benchmarks/parts.py
    python benchmarks/parts.py --depth 5
    python benchmarks/parts.py --before CHECKOUT        beside the U-Net of an older checkout of this project
"""
import copy
import importlib
import statistics
import sys
from functools import partial
from pathlib import Path

import harness
import torch
import torch.nn.functional as F

import models
from networks import fast


def main(argv=None):
    parser = harness.parser(__doc__)
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="folder of an older checkout")
    args = parser.parse_args(argv)
    compute = harness.start(args)
    rows = []
    for what, maps, *forms in cases(args, compute):
        sides = {}
        for side, (function, weights) in zip(("textbook", "fast"), forms):
            sides[side] = partial(step, function, maps, weights, compute)
        seconds = harness.in_turn(sides, args.rounds, compute.device)
        times = [f"{statistics.median(seconds[side]) * 1000:.0f} ms" for side in sides]
        rows.append([what, *times, f"{harness.ratio(seconds, 'textbook', 'fast'):.1f}x"])
    print(f"Forward and backward pass, batch {args.batch}, tiles of {args.tile}, median of {args.rounds} rounds\n")
    harness.table(["part", "textbook", "fast", "gain"], rows)
    whole_steps(args, compute)


def whole_steps(args, compute):
    """Print the training step of U-Net in each form, as a ratio to the reference's."""
    textbook = fast.slow_down(harness.our_network("unet", "resnet18", args.depth, compute))
    gate, convolution, both = (copy.deepcopy(textbook) for _ in range(3))
    for module in gate.modules():
        if type(module) is models.SCSE:
            module.__class__ = fast.FastSCSE
    for module in convolution.modules():
        if type(module) is models.DecoderBlock:
            module.__class__ = fast.FastDecoderBlock
    networks = {
        "reference": harness.reference("unet", depth=args.depth),
        "textbook": textbook,
        "gate alone": gate,
        "sub-pixel convolution alone": convolution,
        "both": fast.speed_up(both),
    }
    folded = {"reference": networks["reference"], "ours": fast.for_inference(textbook)}
    if args.before:
        networks["before"], folded["before"] = of_checkout(args.before, args.depth)
    images = harness.batch(args, compute)
    sides = {}
    for name, network in networks.items():
        network.to(compute.device, memory_format=torch.channels_last).train()
        sides[name] = partial(harness.training_step, network, *images, compute)
    show(f"U-Net's training step, depth {args.depth}", sides, args.rounds, compute)
    sides = {}
    for name, network in folded.items():
        network.to(compute.device, memory_format=torch.channels_last).eval()
        sides[name] = partial(predict, network, images[0], compute)
    show("inference, BatchNorms folded but in the reference", sides, 3 * args.rounds, compute)


def show(what, sides, rounds, compute):
    seconds = harness.in_turn(sides, rounds, compute.device)
    rows = [[name, f"{statistics.median(seconds[name]) * 1000:.0f} ms",
             f"{harness.ratio(seconds, 'reference', name):.2f}x"] for name in sides]
    harness.table([what, "time", "against the reference"], rows)


@torch.inference_mode()
def predict(network, images, compute):
    with compute.autocast():
        network(images)


def of_checkout(folder, depth):
    """Return the U-Net of another checkout, to train and to predict; its modules stand in place of ours meanwhile."""
    ours = {name: module for name, module in sys.modules.items()
            if Path(getattr(module, "__file__", None) or "/").is_relative_to(harness.ROOT)}
    for name in ours:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        other = importlib.import_module("models")
        network = other.build_segmenter(depth=depth, decoder_channels=models.default_decoder_channels(depth))
        folds = other if hasattr(other, "for_inference") else importlib.import_module("networks.fast")
        return network, folds.for_inference(network)
    finally:
        sys.path.remove(str(folder))
        for name, module in list(sys.modules.items()):
            if Path(getattr(module, "__file__", None) or "/").is_relative_to(folder.resolve()):
                del sys.modules[name]
        sys.modules.update(ours)


def step(function, maps, weights, compute):
    with compute.autocast():
        result = function(*maps)
    torch.autograd.grad(result, [*maps, *weights], torch.ones_like(result))


def cases(args, compute):
    """Yield (what, maps, textbook, fast), each form a function of the maps and its weights."""
    half, full = args.tile // 2, args.tile
    coarse = random_map(256, half // 2, args, compute)
    skip = random_map(64, half, args, compute)
    middle = random_map(128, half, args, compute)
    last = random_map(64, full, args, compute)

    for channels, side, v in ((128, half, middle), (64, full, last)):
        plain = models.SCSE(channels).to(compute.device)
        quick = fast.speed_up(copy.deepcopy(plain))
        yield (f"gate of {channels} channels at {side}", [v],
               (plain, list(plain.parameters())), (quick, list(quick.parameters())))

    kernel = torch.randn(64, 128, 3, 3, device=compute.device, requires_grad=True)
    yield (f"128 channels upsampled to {full}, convolution to 64", [middle],
           (lambda x: F.conv2d(upsampled(x), kernel, padding=1), [kernel]),
           (lambda x: fast.conv_of_upsampled(x, kernel), [kernel]))

    for skips, outputs, side, maps in ((64, 128, half, [coarse, skip]), (0, 64, full, [middle])):
        plain = models.DecoderBlock(maps[0].shape[1], skips, outputs)
        plain = plain.to(compute.device, memory_format=torch.channels_last)
        quick = fast.speed_up(copy.deepcopy(plain))
        forms = [(partial(of_maps, block), list(block.parameters())) for block in (plain, quick)]
        yield f"whole block to {outputs} channels at {side}, {skips} skip channels", maps, *forms


def of_maps(block, x, *skips):
    return block(x, skips)


def random_map(channels, side, args, compute):
    made = torch.randn(args.batch, channels, side, side, device=compute.device) / 8
    made = made.to(compute.amp_dtype or torch.float32, memory_format=torch.channels_last)
    return made.requires_grad_()


def upsampled(x):
    return F.interpolate(x, scale_factor=2, mode="nearest")


if __name__ == "__main__":
    harness.process.command(main)
