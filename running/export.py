"""Writes a run's best network as one file that runs where only torch is installed: `python test.py RUN --export FILE`,
then torch.export.load(FILE).module()(image).

segmentation:   image (N, C, H, W) -> logits (N, classes, H, W), any N and any H and W from 16 up
classification: image (N, 3, S, S) -> logits (N, classes), any N; of several folds their ensemble, as one network
"""
import contextlib
import io
from pathlib import Path

import torch
import torch.nn as nn
from torch.export import Dim

from networks import encoders
from running import process, runs
from running.compute import Compute
from running.process import InputError


class AnySize(nn.Module):
    """A Segmenter, or an ensemble of some, for the exporter: it pads and crops in a form that holds for all sizes."""

    def __init__(self, segmenter):
        super().__init__()
        self.segmenter = segmenter
        self.multiple = next(layer.multiple for layer in segmenter.modules() if hasattr(layer, "multiple"))

    def forward(self, image):
        multiple = self.multiple
        x = image
        for axis in (2, 3):
            size = image.shape[axis]
            # The exporter takes what `item` returns as a new number. So all sizes inside are plain multiples of it,
            # which can be compared, and none is one of the example's or set apart because it may be 1.
            steps = torch.full((), (size + multiple - 1) // multiple).item()
            torch._check(steps >= 1)
            torch._check(steps * multiple >= size)
            places = torch.arange(steps * multiple).clamp(max=size - 1)  # repeats the border
            x = x.index_select(axis, places)
        return self.segmenter(x)[..., :image.shape[2], :image.shape[3]]


def export_run(run: Path, config: dict, file: Path) -> None:
    """Write the network of a run, or the ensemble of all folds in its folder, and print what it takes and gives."""
    if file.suffix != ".pt2":
        raise InputError(f"--export {file}: must be named .pt2")
    *_, network = runs.load_networks(run, config, Compute(torch.device("cpu"), "off")).values()
    # channels_last weights would make the exporter ask which sizes are 1
    network.to(memory_format=torch.contiguous_format)
    free = {0: Dim("batch", min=1)}  # the axes of any size
    if config["task"] == "seg":
        channels = config["setting"]["in_channels"]
        network = AnySize(network)
        free |= {2: Dim("height", min=16), 3: Dim("width", min=16)}
        shape = (2, channels, 93, 155)
        text = (
            f"input   image, float32 (N, {channels}, H, W), H and W from 16 up; channels "
            f"{', '.join(config['channels'])}, each brought to [0, 1] by its percentiles 1 and 99.8 in the image\n"
            f"output  logits (N, {config['setting']['classes']}, H, W); softmax over axis 1 gives probabilities;"
            " nuclei are where that of class 0, background, is below 0.5"
        )
    else:
        size = config["image_size"]
        shape = (2, 3, size, size)
        text = (
            f"input   image, float32 (N, 3, {size}, {size}), RGB in [0, 1]; stretch images to this size,"
            f" {encoders.interpolation(config['model'], config['recipe'])}\n"
            f"output  logits (N, classes) of {', '.join(config['classes'])}; sigmoid gives probabilities, the mean of "
            "the folds"
        )
    content = export(network, free, shape)
    print(text)
    with process.replacing(file) as handle:
        handle.write(content)
    print(f"{file}: {len(content) / 1e6:.1f} MB")


def export(network, free, shape):
    """Return the content of the file, bytes. free: {axis: Dim}; shape: an example's."""
    buffer = io.BytesIO()  # on a full disk torch's own writer would abort the process
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # where the exporter fails it writes thousands of lines
            program = torch.export.export(network, (torch.rand(shape),), dynamic_shapes=(free,), strict=False)
            torch.export.save(program, buffer)
    except Exception as error:  # torch's exporter has no kind of its own
        raise InputError(f"--export: torch cannot export this network: {process.one_line(error, 200)}") from error
    return buffer.getvalue()
