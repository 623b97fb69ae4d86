"""A run's folder: where it lies, its config.json, its checkpoints."""
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn

import data
import models
from images import folders
from networks import fast
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
        config["folds"], config["task"] == "cls" or config["nucleus"]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: is not what this version of train.py writes ({one_line(error, 100)})") from error
    return config


def save_json(values: dict, file: Path) -> None:
    """Write plain values and paths."""
    text = json.dumps(values, indent=2, default=str) + "\n"
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


def load_best(folder, build, compute):
    """Return the network in the best.pt of a run or a fold, in eval mode on the device. Raises InputError."""
    checkpoint = load_checkpoint(folder / "best.pt", "setting", "model")
    model = build(**checkpoint["setting"])
    model.load_state_dict(checkpoint["model"])
    return model.to(compute.device, memory_format=torch.channels_last).eval()


def fold_folders(run: Path) -> dict:
    """Return {number: folder} of the folds in a run's folder that have a best.pt; of a run without folds {0: run}."""
    folders = {-1: run} | {number: run / f"fold{number}" for number in range(1000)}
    found = {max(0, number): folder for number, folder in folders.items() if (folder / "best.pt").exists()}
    if not found:
        raise InputError(f"{run}: holds no best.pt; is it the folder of a run that has ended an epoch?")
    return found


def load_networks(run: Path, config: dict, compute: Compute) -> dict:
    """Return {fold: network} of a run, in eval mode, of several folds with their ensemble as the last."""
    segments = config["task"] == "seg"
    build = models.build_segmenter if segments else models.build_classifier
    networks = {f"fold{number}": fast.for_inference(load_best(folder, build, compute))
                for number, folder in fold_folders(run).items()}
    if len(networks) > 1:
        networks["ensemble"] = models.Ensemble(networks.values(), one_class=segments)
    return networks


# --------------------------------------------------------------------------------------------------------- fine-tuning
def start_of(weights: str) -> dict:
    """Return the config.json of the earlier run that a value of --weights names, {} where it names none. Its `channel`
    says by which names the stains are found in other files."""
    if not (Path(weights) / "config.json").is_file():
        return {}
    config = read_config(Path(weights))
    return config | {"channel": ",".join(data.stains(config))} if config["task"] == "seg" else config


def start_from(model: nn.Module, build: Callable, found: dict, earlier: dict) -> None:
    """Give a new network, of build(**found["setting"]), the weights of the best network of an earlier run, of the same
    fold if it has that. found and earlier: what config.json holds of each.

    The first convolution's weights are taken by the stains' names; for a stain that the run has not seen, the mean over
    its stains, so that the sum stays what it was (as timm does from RGB to grey). The head's are taken by the classes'
    names, those for others stay new.
    """
    folders = fold_folders(Path(found["weights_used"]))
    folder = folders.get(found["fold"], folders[min(folders)])
    saved = load_checkpoint(folder / "best.pt", "model")["model"]
    setting = found["setting"]
    more = {name: setting[name] + 3 for name in ("in_channels", "classes") if name in setting}
    # its shapes tell which weights depend on stains and classes; of 3 channels some encoders have other layers
    other = build(**setting | more).state_dict()
    state = model.state_dict()
    classes = [config.get("classes", range(config["setting"]["classes"])) for config in (found, earlier)]
    for name in state.keys() & saved.keys():
        own, given = state[name], saved[name]
        if other[name].shape == own.shape:
            own.copy_(given)
            continue
        wanted, known = classes
        axis = 0
        if len(other[name]) == len(own):  # the first convolution
            axis, wanted, known = 1, found["channels"], earlier["channels"]
            own[:] = given.sum(1, keepdim=True) / own.shape[1]
        for place, what in enumerate(wanted):
            if what in known:
                own.select(axis, place).copy_(given.select(axis, known.index(what)))
