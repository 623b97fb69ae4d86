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
import torch.nn.functional as F
from torch.export import Dim

import models
from networks import encoders, fast
from running import process, runs
from running.compute import Compute
from running.process import InputError


class AnySize(nn.Module):
    """A Segmenter for the exporter: its padding and cropping in a form that holds for every size."""

    def __init__(self, segmenter):
        super().__init__()
        self.segmenter = segmenter

    def forward(self, image):
        multiple = self.segmenter.encoder.multiple
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


class Ensemble(nn.Module):
    """Classifiers as one: image (N, 3, S, S) -> logits (N, classes), whose sigmoid is the mean of theirs."""

    def __init__(self, classifiers):
        super().__init__()
        self.classifiers = nn.ModuleList(classifiers)

    def forward(self, image):
        logits = torch.stack([classifier(image) for classifier in self.classifiers])          # (folds, N, classes)
        # logit(mean p) = log(sum p) - log(sum (1 - p)), where float32 cannot round p to 1
        return F.logsigmoid(logits).logsumexp(0) - F.logsigmoid(-logits).logsumexp(0)


def export_run(run: Path, config: dict, file: Path) -> None:
    """Write the network of a run, or of all folds in its folder, and print what it takes and gives."""
    if file.suffix != ".pt2":
        raise InputError(f"--export {file}: must be named .pt2")
    find = segmentation if config["task"] == "seg" else classification
    network, free, shape, text = find(run, config)
    content = export(network, free, shape)
    print(text)
    with process.replacing(file) as handle:
        handle.write(content)
    print(f"{file}: {len(content) / 1e6:.1f} MB")


def segmentation(run, config):
    """Return the network for the exporter, the axes of free size, an example's shape, and a text on input and
    output."""
    network = AnySize(best(run, models.build_segmenter))
    channels = config["setting"]["in_channels"]
    free = {0: Dim("batch", min=1), 2: Dim("height", min=16), 3: Dim("width", min=16)}
    text = (
        f"input   image, float32 (N, {channels}, H, W), H and W from 16 up; channels {', '.join(config['channels'])},"
        " each brought to [0, 1] by its percentiles 1 and 99.8 in the whole image\n"
        f"output  logits (N, {config['setting']['classes']}, H, W); softmax over axis 1 gives probabilities;"
        " nuclei are where that of class 0, background, is below 0.5"
    )
    return network, free, (2, channels, 93, 155), text


def classification(run, config):
    """Return the same of a classification, all folds as one network."""
    folders = runs.fold_folders(run).values()
    network = Ensemble([best(folder, models.build_classifier) for folder in folders])
    size = config["image_size"]
    text = (
        f"input   image, float32 (N, 3, {size}, {size}), RGB in [0, 1]; stretch images to this size,"
        f" {encoders.interpolation(config['model'])}\n"
        f"output  logits (N, classes) of {', '.join(config['classes'])}; sigmoid gives probabilities,"
        f" the mean of {len(folders)} folds"
    )
    return network, {0: Dim("batch", min=1)}, (2, 3, size, size), text


def best(folder, build):
    """Return the best network of a run or a fold, on the CPU in float32, its BatchNorms folded."""
    model = runs.load_best(folder, build, Compute(torch.device("cpu"), "off"))
    # channels_last weights would make the exporter ask which sizes are 1
    return fast.for_inference(model).to(memory_format=torch.contiguous_format)


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
