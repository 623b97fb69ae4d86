"""A run's folder: where it lies, its config.json, its checkpoints, and what the code was that made it."""
import ast
import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from images import folders
from running import process
from running.compute import Compute
from running.process import InputError, one_line

ROOT = Path(__file__).parents[1]
RUNS = Path("runs")
SYNTHETIC = ROOT / "datasets" / "synthetic-v3"  # the number rises when other images are made
COMPUTES = ("dedl.py", "models.py", "data.py", "train.py", "networks/encoders.py", "networks/fast.py",
            "images/reading.py", "images/manifests.py", "running/prediction.py")  # code that figures depend on
COMMON = {"data": str, "seed": int, "recipe": str, "rows": str, "setting": dict, "weights_used": str, "device": str,
          "amp": str}
CONFIG = {  # what is needed of a config.json
    "seg": COMMON | {"channel": str, "channels": list},
    "cls": COMMON | {"model": str, "image_size": int, "folds": int, "classes": list},
}


def synthetic_folder() -> Path:
    """Return the folder of the built-in synthetic set, made on first use."""
    if not (SYNTHETIC / "segmentation.csv").is_file():
        print(f"making the built-in synthetic set in {SYNTHETIC} ...", flush=True)
        folders.write_synthetic(SYNTHETIC)
    return SYNTHETIC.resolve()


def new_run(out: Path | None, name: str, fold: int | None = None) -> Path:
    """Return the folder of a run to start, which is not made yet: `out`, or the first of runs/NAME, runs/NAME-2, ...
    that is free.

    With `fold`, one fold is trained alone: its run may exist, with other folds, but not this one.
    Raises InputError for a folder that has files of a run, or this fold, already.
    """
    def taken(folder):
        return folder.exists() if fold is None else (folder / f"fold{fold}").exists()

    if out is None:
        out, number = RUNS / name, 2
        while taken(out):
            out, number = RUNS / f"{name}-{number}", number + 1
    elif out.is_file():
        raise InputError(f"--out {out}: is a file; give a folder")
    elif fold is not None and taken(out):
        raise InputError(f"--out {out}: contains fold {fold}; choose another folder, or go on with it by --resume")
    elif fold is None and (out / "config.json").exists():
        raise InputError(f"--out {out}: contains a run; choose another folder, or go on with it by --resume")
    elif any(out.glob("[!.]*")) and not (out / "config.json").exists():
        raise InputError(f"--out {out}: contains files but no run; choose an empty folder")
    return out


def newest_run(file: str) -> Path:
    """Return the run in runs/ whose `file`, its own or one of its folds', was written last."""
    found = [*RUNS.glob(f"*/{file}"), *RUNS.glob(f"*/fold*/{file}")]
    if not found:
        raise InputError(f"there is no run with a {file} in {RUNS}/; train one (python train.py) or name a run")
    newest = max(found, key=lambda path: path.stat().st_mtime)
    return RUNS / newest.relative_to(RUNS).parts[0]


def read_config(run: Path) -> dict:
    """Return a run's config.json. Raises InputError."""
    file = run / "config.json"
    if not file.is_file():
        raise InputError(f"{run}: has no config.json; is it the folder of a run?")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        needed = CONFIG[config["task"]]
        if not all(isinstance(config[name], kind) for name, kind in needed.items()):
            raise ValueError
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: is not what train.py writes ({one_line(error, 100)})") from error
    return config


def save_json(values: dict, file: Path) -> None:
    with process.replacing(file, "w") as handle:
        handle.write(json.dumps(values, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------------- checkpoints
def save_checkpoint(values: dict, file: Path) -> None:
    """Write tensors and plain values. A crash or a full disk leaves the old file."""
    with process.replacing(file) as handle:
        try:
            torch.save(values, handle)
        except RuntimeError as error:  # torch's writer raises it over what stopped it, as a full disk
            raise (error.__context__ or error) from None


def load_checkpoint(file: Path, *keys: str) -> dict:
    """Return what save_checkpoint wrote, a dict with these keys. Code in the file never runs."""
    if not file.is_file():
        raise InputError(f"{file}: no such file; is {file.parent} the folder of a run?")
    try:
        with zipfile.ZipFile(file) as whole:  # torch does not look at its checksums
            if damaged := whole.testzip():
                raise ValueError(f"{damaged} is damaged")
        values = torch.load(file, map_location="cpu", weights_only=True)
        for key in keys:
            values[key]
    except Exception as error:  # unpickling and zip errors have no common kind
        if isinstance(error, PermissionError) or process.is_out_of_memory(error):
            raise
        raise InputError(f"{file}: is not a checkpoint of train.py ({one_line(error, 100)})") from error
    return values


def load_best(folder: Path, build: Callable, compute: Compute, config: dict) -> torch.nn.Module:
    """Return the network in the best.pt of a run or a fold, in eval mode on the device. Raises InputError, also where
    the checkpoint is not of the run with this config."""
    file = folder / "best.pt"
    checkpoint = load_checkpoint(file, "setting", "model")
    names = {"setting", "classes", "weights_used"} & set(config)
    check_setting(file, checkpoint, {name: config[name] for name in names})
    try:
        model = build(**checkpoint["setting"])
        model.load_state_dict(checkpoint["model"])
    except (AttributeError, RuntimeError, TypeError) as error:
        raise InputError(f"{file}: does not fit this version of the project ({one_line(error, 100)})") from error
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise InputError(f"{file}: has weights that are NaN or infinite; its training has diverged")
    return model.to(compute.device, memory_format=torch.channels_last).eval()


def check_setting(file: Path, checkpoint: dict, expected: dict) -> None:
    """Raise InputError where a checkpoint has other values than expected: it is of another run."""
    for name, value in expected.items():
        found = checkpoint.get(name, value)
        if found != value:
            raise InputError(f"{file}: is of another run than the config.json: {name} {found}, not {value}")


def fold_folders(run: Path) -> dict[int, Path]:
    """Return {number: folder} of the folds in a run's folder that have a best.pt."""
    found = {}
    for path in run.glob("fold*/best.pt"):
        number = path.parent.name.removeprefix("fold")
        if number.isdecimal():
            found[int(number)] = path.parent
    if not found:
        raise InputError(f"{run}: has no fold with a best.pt; is it the folder of a classification run?")
    return dict(sorted(found.items()))


# ------------------------------------------------------------------------------------------------------------- the code
def code_digest(folder: Path = ROOT) -> str:
    """Return eight digits that tell which code computes. Comments, docstrings and layout do not count."""
    digest = hashlib.sha256()
    for name in COMPUTES:
        tree = ast.parse((folder / name).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value.value = ""  # a docstring
        digest.update(ast.unparse(tree).encode())
    return digest.hexdigest()[:8]


def code_of(begun: dict | None, out: Path) -> str:
    """Return the code_digest for a run's config.json. Where other code began the run, whose config is `begun`, return
    both digests and print a NOTE."""
    code = code_digest()
    before = str(begun.get("code")) if begun else code
    if before.split("+")[-1] == code:
        return before
    print(f"  NOTE: the code that trains has changed since {out} was begun ({before}, now {code}): it is of both")
    return f"{before}+{code}"
