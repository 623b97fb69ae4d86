"""A run's folder: where it lies, its config.json, its checkpoints."""
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

from images import folders
from running import process
from running.compute import Compute
from running.process import InputError, one_line

ROOT = Path(__file__).parents[1]
RUNS = Path("runs")
SYNTHETIC = ROOT / "datasets" / "synthetic-v5"  # the number rises when other images are made


def synthetic_folder() -> Path:
    """Return the folder of the built-in synthetic set, made on first use."""
    if not (SYNTHETIC / "segmentation.csv").is_file():
        print(f"making the built-in synthetic set in {SYNTHETIC} ...")
        folders.write_synthetic(SYNTHETIC)
    return SYNTHETIC.resolve()


def new_run(out: Path | None, name: str, fold: int | None = None) -> Path:
    """Return the folder of a run to start, which is not made yet: `out`, or the first of runs/NAME, runs/NAME-2, ...
    that is free.

    With `fold`, one fold is trained alone: its run may exist, with other folds, but not this one.
    Raises InputError for a folder that holds files, or this fold, already.
    """
    part = "" if fold is None else f"fold{fold}"
    if out is None:
        out = RUNS / name
        number = 1
        while (out / part).exists():
            number += 1
            out = RUNS / f"{name}-{number}"
    elif any((out / part).glob("[!.]*")):
        raise InputError(f"--out {out}: contains {part or 'files'} already; choose another folder, or go on with the "
                         f"run in it by --resume")
    return out


def newest_run(file: str) -> Path:
    """Return the run in runs/ whose `file`, its own or one of its folds', was written last."""
    found = list(RUNS.rglob(file))
    if not found:
        raise InputError(f"there is no run with a {file} in {RUNS}/; train one (python train.py) or name a run")
    newest = max(found, key=os.path.getmtime)
    return RUNS / newest.relative_to(RUNS).parts[0]


def read_config(run: Path) -> dict:
    """Return a run's config.json. Raises OSError where there is none, InputError where it is of something else."""
    file = run / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        config["task"] == "cls" or config["nucleus"]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: is not what this version of train.py writes ({one_line(error, 100)})") from error
    return config


def save_json(values: dict, file: Path) -> None:
    text = json.dumps(values, indent=2) + "\n"
    with process.replacing(file) as handle:
        handle.write(text.encode())


# ---------------------------------------------------------------------------------------------------------- checkpoints
def save_checkpoint(values: dict, file: Path) -> None:
    """Write tensors and plain values. A crash or a full disk leaves the old file."""
    with process.replacing(file) as handle:
        try:
            torch.save(values, handle)
        except RuntimeError as error:  # torch's writer raises it over what stopped it, as a full disk
            raise (error.__context__ or error) from None


def load_checkpoint(file: Path, *keys: str) -> dict:
    """Return what save_checkpoint wrote, a dict with these keys. Code in the file never runs. Raises OSError where
    there is no such file, InputError where it is of another kind or cut off."""
    try:
        values = torch.load(file, map_location="cpu", weights_only=True)
        for key in keys:
            values[key]
    except OSError:
        raise
    except Exception as error:  # unpickling and zip errors have no common kind
        raise InputError(f"{file}: is not a checkpoint of this version of train.py ({one_line(error, 100)})") from error
    return values


def load_best(folder: Path, build: Callable, compute: Compute) -> torch.nn.Module:
    """Return the network in the best.pt of a run or a fold, in eval mode on the device. Raises InputError."""
    checkpoint = load_checkpoint(folder / "best.pt", "setting", "model")
    model = build(**checkpoint["setting"])
    model.load_state_dict(checkpoint["model"])
    return model.to(compute.device, memory_format=torch.channels_last).eval()


def fold_folders(run: Path) -> dict:
    """Return {number: folder} of the folds in a run's folder that have a best.pt."""
    folders = {number: run / f"fold{number}" for number in range(1000)}
    found = {number: folder for number, folder in folders.items() if (folder / "best.pt").is_file()}
    if not found:
        raise InputError(f"{run}: has no fold with a best.pt; is it the folder of a classification run?")
    return found
