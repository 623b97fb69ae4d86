"""What train.py and test.py share about a run: its device and precision, its folder and checkpoints."""
import ast
import ctypes
import hashlib
import json
import os
import statistics
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from images import folders, manifests
from running import process
from running.process import InputError

RUNS = Path("runs")
SYNTHETIC = Path(__file__).parents[1] / "datasets" / "synthetic-v2"  # the number rises with other pictures
# the method, the networks, the data and the loop, by which code_digest tells runs apart
COMPUTES = ("dedl.py", "models.py", "data.py", "train.py", "networks/blocks.py", "networks/encoders.py",
            "images/reading.py", "images/manifests.py", "running/prediction.py")
BF16_GAIN = 1.15  # on a CPU bf16 must be this much faster than float32 to be taken
WRITTEN = ("best.pt", "last.pt", "metrics.csv", "samples.png", "curves.png", "validation.csv", "test.json", "test.png",
           "test.csv", "predictions.csv", "segmentation.csv", "classification.csv")  # where one lies, no run may begin
CONFIG = dict(task=str, data=str, seed=int, images=dict, setting=dict, weights_used=str)  # what others need of a config
CONFIG_OF = {"seg": dict(channel=str, channels=list), "cls": dict(model=str, image_size=int, folds=int, classes=list)}


# ------------------------------------------------------------------------------------------------- device and precision
@dataclass
class Compute:
    """Where a model runs and in which precision: autocast to amp_dtype, or float32 throughout if it is None. why: what
    decided on the precision, where that was measured."""
    device: torch.device
    amp_dtype: torch.dtype | None
    why: str = ""

    def precision(self):
        """To be shown."""
        return str(self.amp_dtype or torch.float32).removeprefix("torch.") + (f" ({self.why})" if self.why else "")

    def autocast(self):
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

    def scaler(self):
        """fp16 alone needs its gradients scaled: its smallest number is 6e-8, that of bf16 is float32's."""
        return torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype == torch.float16)

    def batch(self, images):
        return images.to(self.device, non_blocking=True, memory_format=torch.channels_last)


def devices():
    """The names of the devices that are here, the best first."""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [name for name, there in have.items() if there]


def choose_device(device="auto"):
    """The name of the device for the flag --device. Raises InputError for one that is not there."""
    device = devices()[0] if device == "auto" else device
    if device not in devices():
        raise InputError(f"--device {device}: there is none here; use {' or '.join(devices())}")
    return device


def choose_compute(device="auto", amp="auto", keep_memory=True):
    """Compute for the flags --device and --amp. auto: the best device there is; on a GPU bf16, fp16 on older ones; on a
    CPU what fastest_on_cpu finds. keep_memory: a CPU's freed memory is kept for the next step. Raises InputError for a
    device that is not there, and for fp16 on a CPU."""
    device = choose_device(device)
    if device == "cpu" and amp == "fp16":
        raise InputError("--amp fp16: takes a CPU many times as long as float32; use bf16, off or auto")
    if device == "cpu" and keep_memory:
        _keep_freed_memory()
        _limit_memory()
    why = ""
    if amp == "auto":
        if device == "cuda":
            amp = "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
        else:
            amp, why = process.from_first(fastest_on_cpu) if device == "cpu" else ("off", "")
    return Compute(torch.device(device), {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp], why)


def fastest_on_cpu():
    """"bf16" where a convolution is faster in it than in float32 by BF16_GAIN, else "off"; and why."""
    if not cpu_has_bf16():
        return "off", "this CPU has no bfloat16"
    gain = bf16_gain()
    return ("bf16" if gain >= BF16_GAIN else "off",
            f"a convolution runs {gain:.2f} times as fast in bfloat16 as in float32; {BF16_GAIN} is asked for")


def cpu_has_bf16():
    """Whether the CPU claims to multiply bf16 in hardware. That alone does not make it faster than float32."""
    return any(getattr(torch.cpu, test, bool)() for test in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def bf16_gain():
    """How many times as fast as in float32 a 3x3 convolution like the decoder's is in bf16, with its gradients: median
    of rounds in turn, 0.1 to 0.4 s in all. No random numbers are drawn."""
    image, kernel = (torch.ones(*shape).contiguous(memory_format=torch.channels_last).requires_grad_()
                     for shape in ((2, 64, 64, 64), (64, 64, 3, 3)))

    def seconds(bf16):
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            result = F.conv2d(image, kernel, padding=1)
        torch.autograd.grad(result, (image, kernel), torch.ones_like(result))
        return time.perf_counter() - started

    ratios = [seconds(False) / seconds(True) for _ in range(11)]
    return statistics.median(ratios[2:])


def _keep_freed_memory():
    """Tells glibc to keep large freed blocks: else each step's tensors are mapped, zeroed and unmapped page by page.
    Elsewhere (macOS, Windows, musl) nothing is changed."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(-3, 1 << 30)        # M_MMAP_THRESHOLD: blocks up to 1 GiB come from the heap
    mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: the heap's free end stays


def _limit_memory():
    """Takes no more memory than the machine, or its container, has: then too much ends in an error that can be said;
    else the kernel kills the process."""
    try:
        import resource  # not on Windows
        have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
            found = Path(file).read_text().strip() if Path(file).is_file() else ""
            have = min(have, int(found)) if found.isdigit() else have
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if soft == resource.RLIM_INFINITY:
            resource.setrlimit(resource.RLIMIT_DATA, (have, hard))
    except (ImportError, OSError, ValueError):
        pass


# --------------------------------------------------------------------------------------------- a run's folder and files
def synthetic_folder():
    """The built-in synthetic set, made on first use."""
    if not (SYNTHETIC / "segmentation.csv").is_file():
        print(f"making the built-in synthetic set in {SYNTHETIC} ...", flush=True)
        folders.write_synthetic(SYNTHETIC)
    return SYNTHETIC.resolve()


def new_run(out, name, fold=None):
    """The folder of a run to start: `out`, or runs/NAME, runs/NAME-2, ..., the first that is free. It is not made yet.

    With `fold` one fold is to be trained alone: its run may be there, with other folds, but not this one.
    Raises InputError for a folder that has the run, or this fold of it, already.
    """
    def taken(folder):
        return (folder / f"fold{fold}").exists() if fold is not None else folder.exists()

    if out is None:
        out, number = RUNS / name, 2
        while taken(out):
            out, number = RUNS / f"{name}-{number}", number + 1
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file; give a folder")
    if fold is None and (out / "config.json").is_file():
        raise InputError(f"--out {out}: holds a run already; give another folder, or --resume to go on with it")
    for name in WRITTEN:
        if (out / name).exists() and not (out / "config.json").is_file():
            raise InputError(f"--out {out}: holds a {name}, which is of no run here; give another folder")
    if fold is not None and taken(out):
        raise InputError(f"--out {out}: holds fold {fold} already; give another folder, or --resume to go on with it")
    return out


def newest_run(file):
    """The run below runs/ whose `file`, its own or one of its folds', was last written."""
    found = sorted([*RUNS.glob(f"*/{file}"), *RUNS.glob(f"*/fold*/{file}")], key=lambda path: path.stat().st_mtime)
    if not found:
        raise InputError(f"there is no run with a {file} in {RUNS}/; train one (python train.py) or name a run")
    return RUNS / found[-1].relative_to(RUNS).parts[0]


def read_config(run):
    """A run's config.json as dict. Raises InputError."""
    manifests.refuse_special(run / "config.json")
    try:
        config = json.loads((run / "config.json").read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{run}: has no config.json; is it the folder of a run?") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{run / 'config.json'}: is not JSON") from error
    task = config.get("task") if isinstance(config, dict) else None
    for name, kind in {**CONFIG, **CONFIG_OF.get(task, {})}.items():
        if task not in CONFIG_OF or not isinstance(config.get(name), kind):
            raise InputError(f"{run / 'config.json'}: is not what train.py writes: it must hold "
                             f"{name}, {kind.__name__}")
    return config


def code_digest(folder=Path(__file__).parents[1]):
    """Eight digits that tell which code computes: of the syntax trees of COMPUTES, so that comments, docstrings and
    layout do not count."""
    trees = [_tree(ast.parse((folder / name).read_text(encoding="utf-8"))) for name in COMPUTES]
    return hashlib.sha256(repr(trees).encode()).hexdigest()[:8]


def _tree(node):
    """A syntax tree as lists, without places, docstrings and what is empty: the same in all versions of Python."""
    if isinstance(node, list):
        return [_tree(part) for part in node]
    if not isinstance(node, ast.AST):
        return node
    fields = dict(ast.iter_fields(node))
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
        fields["body"] = fields["body"][1:]
    return [type(node).__name__, *([name, _tree(value)] for name, value in fields.items() if value not in (None, []))]


def code_of(begun, out):
    """code_digest for the config.json of the run `out`; where other code has begun it, as its config `begun` says, both
    digests, and a NOTE is printed."""
    code = code_digest()
    before = str(begun.get("code")) if begun else code
    if before.split("+")[-1] == code:
        return before
    print(f"  NOTE: the code that trains has changed since {out} was begun ({before}, now {code}): it is of both")
    return f"{before}+{code}"


def save_json(values, file):
    with process.replacing(file, "w") as handle:
        handle.write(json.dumps(values, indent=2) + "\n")


def save_checkpoint(values, file):
    """Writes tensors and plain values; a crash or a full disk leaves the old file."""
    with process.replacing(file) as handle:
        try:
            torch.save(values, handle)
        except RuntimeError as error:  # of torch's writer, over what stopped it: a full disk, an interruption
            raise (error.__context__ or error) from None


def load_checkpoint(file, *keys):
    """What save_checkpoint wrote, a dict that has these keys. Code in the file is never run. Raises InputError."""
    if not file.is_file():
        raise InputError(f"{file}: no such file; is {file.parent} the folder of a run?")
    try:
        with zipfile.ZipFile(file) as whole:  # torch does not look at its checksums
            if damaged := whole.testzip():
                raise ValueError(f"{damaged} is damaged")
        values = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling and zip errors have no common kind
        if isinstance(error, PermissionError) or process.is_out_of_memory(error):
            raise
        raise InputError(f"{file}: is not a checkpoint, a file of tensors and plain values "
                       f"({process.one_line(error, 100)})") from error
    if not isinstance(values, dict) or not all(key in values for key in keys):
        raise InputError(f"{file}: is another file's checkpoint; it must hold {', '.join(keys)}")
    return values


def load_best(folder, build, compute, config):
    """The network that the best.pt of a run or a fold holds, made by `build`, in eval mode on the device. Raises
    InputError, also where the checkpoint is not of the run with this config."""
    file = folder / "best.pt"
    checkpoint = load_checkpoint(file, "setting", "model")
    same_setting(file, checkpoint, config)
    try:
        model = build(**checkpoint["setting"])
        model.load_state_dict(checkpoint.pop("model"))
    except (AttributeError, RuntimeError, TypeError) as error:
        raise InputError(f"{file}: its tensors do not fit its setting") from error
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise InputError(f"{file}: has weights that are NaN or infinite; its training has diverged")
    return model.to(compute.device, memory_format=torch.channels_last).eval()


def same_setting(file, checkpoint, config):
    """Raises InputError, with the first difference, where a checkpoint is not of the run with this config."""
    differences = [(name, checkpoint.get(name), config.get(name)) for name in ("classes", "weights_used")
                   if name in checkpoint]
    theirs, ours = checkpoint["setting"], config.get("setting")
    if isinstance(theirs, dict) and isinstance(ours, dict):
        differences += [(name, theirs.get(name), ours.get(name)) for name in {**theirs, **ours}]
    else:
        differences.append(("setting", theirs, ours))
    for name, there, here in differences:
        if there != here:
            raise InputError(f"{file}: is of another run than the config.json: {name} {there}, not {here}")


def fold_folders(run):
    """{number: folder} of the folds in a run's folder that have a best.pt. Raises InputError if there is none."""
    folders = {int(path.parent.name[4:]): path.parent for path in run.glob("fold*/best.pt")
               if path.parent.name[4:].isdecimal()}
    if not folders:
        raise InputError(f"{run}: holds no fold with a best.pt; is it the folder of a classification run?")
    return dict(sorted(folders.items()))
