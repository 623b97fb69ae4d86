"""The parts of a decoder in their fast forms (blocks.py) against their plain ones: forward and backward pass of each,
at the sizes that it has in U-Net/resnet18 of depth 3.

    python benchmarks/parts.py
"""
import statistics

import harness
import torch
import torch.nn.functional as F

from networks import blocks


def main(argv=None):
    args = harness.parser(__doc__).parse_args(argv)
    compute = harness.start(args)
    rows = []
    for what, (fast, plain, inputs) in cases(args, compute).items():
        seconds = harness.in_turn({"plain": lambda plain=plain, inputs=inputs: step(plain, inputs, compute),
                                   "fast": lambda fast=fast, inputs=inputs: step(fast, inputs, compute)},
                                  args.rounds, compute.device)
        rows.append([what, *(f"{statistics.median(seconds[side]) * 1000:.0f} ms" for side in ("plain", "fast")),
                     f"{harness.ratio(seconds, 'plain', 'fast'):.1f}x"])
    print(f"Forward and backward pass, batch {args.batch}, tiles of {args.tile}, median of {args.rounds} rounds\n")
    harness.table(["block", "plain", "fast", "gain"], rows)


def step(function, inputs, compute):
    with compute.autocast():
        result = function()
    torch.autograd.grad(result, inputs, torch.ones_like(result))


def cases(args, compute):
    """{what: (fast form, plain form, what they are differentiated by)}"""
    def random(*shape):
        made = torch.randn(*shape, device=compute.device).to(memory_format=torch.channels_last) / 8
        return made.to(compute.amp_dtype or torch.float32).requires_grad_()

    half, full = args.tile // 2, args.tile
    x, skip, low = random(args.batch, 256, half // 2, half // 2), random(args.batch, 64, half, half), \
        random(args.batch, 128, half, half)
    last, kernel = random(args.batch, 64, full, full), random(128, 320, 3, 3).detach().float().requires_grad_()
    upsampling = random(64, 128, 3, 3).detach().float().requires_grad_()
    join, gate, final = (blocks.SCSE(channels).to(compute.device) for channels in (320, 128, 64))
    head = torch.nn.Conv2d(64, 2, 3, padding=1).to(compute.device, memory_format=torch.channels_last)

    def plain_join():
        return F.conv2d(join.plain(torch.cat([F.interpolate(x, scale_factor=2), skip], 1)), kernel, padding=1)

    def conv_of_upsampled():
        return F.conv2d(F.interpolate(low, scale_factor=2), upsampling, padding=1)

    return {
        f"join of 256 upsampled and 64 skip channels at {half}, gate, convolution to 128":
            (lambda: join(x, skip, kernel=kernel), plain_join, [x, skip, kernel, *join.parameters()]),
        f"gate of 128 channels at {half}": (lambda: gate(low), lambda: gate.plain(low), [low, *gate.parameters()]),
        f"128 channels upsampled to {full}, convolution to 64":
            (lambda: blocks.conv_of_upsampled(low, upsampling), conv_of_upsampled, [low, upsampling]),
        f"gate of 64 channels at {full}, head":
            (lambda: blocks.gated_conv(last, final, head), lambda: head(final.plain(last)),
             [last, *final.parameters(), *head.parameters()])}


if __name__ == "__main__":
    harness.process.command(main)
