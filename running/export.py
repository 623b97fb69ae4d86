"""Writes a run's best network as one file that runs without this project: `python test.py RUN --export FILE`.

    .pt2     torch.export.load(FILE).module()(image), where only torch is installed
    .onnx    ONNX, for onnxruntime and others; written where onnx and onnxscript are installed

segmentation:   image (N, C, H, W) -> logits (N, 2, H, W), any N and any H and W from 16 up
classification: image (N, 3, S, S) -> logits (N, classes), any N; of several folds their ensemble, as one network

The file is read again, and kept only if its logits are those of the project's own network.
"""
import contextlib
import importlib.util
import io
import logging
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.export import Dim

import models
from running import process, runs
from running.process import InputError

TOLERANCE = 1e-4  # of the largest logit where that is above 1


class AnySize(nn.Module):
    """A Segmenter for the exporter: its padding and cropping in a form that holds for every size."""

    def __init__(self, segmenter):
        super().__init__()
        self.segmenter = segmenter

    def forward(self, image):
        step, least, x = self.segmenter.encoder.multiple, self.segmenter.encoder.minimum, image
        for axis in (2, 3):
            size = image.shape[axis]
            # From here on the exporter takes `steps` as a number of its own. So all sizes inside are plain multiples of
            # it, which it can compare, and none is one of the example's or set apart because it may be 1.
            steps = torch.full((), torch.sym_max((size + step - 1) // step, max(1, least // step))).item()
            torch._check(steps >= max(1, least // step))
            torch._check(steps * step >= size)
            x = x.index_select(axis, torch.arange(steps * step).clamp(max=size - 1))  # repeats the border
        return self.segmenter(x)[..., :image.shape[2], :image.shape[3]]


class Ensemble(nn.Module):
    """Classifiers as one: image (N, 3, S, S) -> logits (N, classes), whose sigmoid is the mean of theirs."""

    def __init__(self, classifiers):
        super().__init__()
        self.classifiers = nn.ModuleList(classifiers)

    def forward(self, image):
        logits = [classifier(image) for classifier in self.classifiers]
        if len(logits) == 1:
            return logits[0]
        z = torch.stack(logits)                                                               # (folds, N, classes)
        # logit(mean p) = log(sum p) - log(sum (1 - p)), where float32 cannot round p to 1
        return F.logsigmoid(z).logsumexp(0) - F.logsigmoid(-z).logsumexp(0)


def check_file(file):
    """Raises InputError where no file of this name can be written."""
    if file.suffix not in (".pt2", ".onnx"):
        raise InputError(f"--export {file}: is to be named .pt2 (PyTorch) or .onnx")
    if not file.absolute().parent.is_dir():
        raise InputError(f"--export {file}: there is no folder {file.parent}")
    missing = [name for name in ("onnx", "onnxscript") if not importlib.util.find_spec(name)]
    if file.suffix == ".onnx" and missing:
        raise InputError(f"--export {file}: needs {' and '.join(missing)} here: pip install onnx onnxscript "
                            "onnxruntime; or export to .pt2")


def export_run(run, config, file):
    """Writes the network of a run, or of all folds in its folder, and says what it takes. Raises InputError."""
    check_file(file)
    if config["task"] == "seg":
        own = best(run, models.build_segmenter, config)
        channels, step, network = config["setting"]["in_channels"], max(8, own.encoder.multiple), AnySize(own)
        free = {0: Dim("batch", min=1), 2: Dim("height", min=16), 3: Dim("width", min=16)}
        example, others = (2, channels, 3 * step - 3, 5 * step - 5), [(1, channels, 16, 16), (3, channels, 37, 53)]
        names = ", ".join(map(str, config.get("channels", [])))
        what = f"encoder {config['setting'].get('encoder')}"
        takes = f"(N, {channels}, H, W), H and W from 16 up; channels{' ' + names if names else ''}, each brought to " \
                "[0, 1] by its percentiles 1 and 99.8 in the whole image"
        gives = "(N, 2, H, W), background and nucleus; softmax over axis 1 gives probabilities"
    else:
        folders, size = runs.fold_folders(run), config["image_size"]
        network = own = Ensemble([best(folder, models.build_classifier, config) for folder in folders.values()])
        free, example, others = {0: Dim("batch", min=1)}, (2, 3, size, size), [(1, 3, size, size), (3, 3, size, size)]
        what = f"model {config['model']}"
        takes = f"(N, 3, {size}, {size}), RGB in [0, 1]; pictures are stretched to this size, " \
                f"{models.interpolation(config['model'])}"
        gives = f"(N, {len(config['classes'])}) of {', '.join(config['classes'])}; sigmoid gives probabilities" + \
                (f", the mean of {len(folders)} folds" if len(folders) > 1 else "")
    difference = write(network, own, torch.rand(example), free, others, file, what)
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB\n  input   image, float32 {takes}\n  output  logits {gives}")
    print("  not checked: onnxruntime is not installed" if difference is None else
          f"  checked on {' and '.join(' x '.join(map(str, shape)) for shape in others)}: logits differ from the run's "
          f"by {difference:.1e} at most")


def best(folder, build, config):
    """The network that the best.pt of a run or a fold holds, on the CPU in float32, its BatchNorms folded. Raises
    InputError."""
    model = runs.load_best(folder, build, runs.Compute(torch.device("cpu"), None), config)
    # channels_last weights would make the exporter ask which sizes are 1
    return models.for_inference(model).to(memory_format=torch.contiguous_format)


@torch.no_grad()
def write(network, own, example, free, others, file, what):
    """Exports `network` with free sizes {axis: Dim} and compares it with `own` on random images of the `others` shapes:
    the largest difference of the logits, None where it cannot be run here. Raises InputError and writes no file."""
    with quiet():
        try:
            program = torch.export.export(network.eval(), (example,), dynamic_shapes=(free,), strict=False)
            if file.suffix == ".onnx":
                program = torch.onnx.export(program, dynamo=True, verbose=False, input_names=["image"],
                                            output_names=["logits"])
        except Exception as error:  # torch's exporters have no common kind
            if process.is_out_of_memory(error):
                raise
            raise InputError(f"--export: torch {torch.__version__} cannot export {what} for all sizes "
                                f"({process.one_line(error, 200)})") from error
        with process.replacing(file) as handle:
            if file.suffix == ".onnx":
                handle.write(program.model_proto.SerializeToString())  # weights and all, up to 2 GB
            else:
                whole = io.BytesIO()  # on a full disk torch's own writer aborts the process
                torch.export.save(program, whole)
                handle.write(whole.getbuffer())
            handle.flush()
            exported, worst = load(handle.name, file.suffix), None
            for shape in others if exported else ():
                image = torch.rand(shape)
                logits, expected = exported(image), own(image)
                worst = max(worst or 0.0, (logits - expected).abs().max().item())
                if not worst <= TOLERANCE * max(1, expected.abs().max().item()):
                    raise InputError(f"--export {file}: not written, for its logits differ from the run's by "
                                        f"{worst:.1e} on an image of {' x '.join(map(str, shape))}")
    return worst


@contextlib.contextmanager
def quiet():
    """Keeps the exporters' own words back, hundreds of lines where they fail; what is raised says enough."""
    said = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)


def load(name, suffix):
    """The network in a file as a function of image, None for ONNX where onnxruntime is not installed."""
    if suffix == ".pt2":
        with open(name, "rb") as handle:
            return torch.export.load(handle).module()
    if not importlib.util.find_spec("onnxruntime"):
        return None
    import onnxruntime
    session = onnxruntime.InferenceSession(name, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0])
