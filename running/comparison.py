"""The table that compares several runs: a line for each setting, mean and standard deviation over its seeds."""
import statistics
from pathlib import Path

from running import settings

COLUMNS = {
    "seg": {
        "iou": "IoU",
        "mean_image_iou": "mean image IoU",
        "dice": "Dice",
        "precision": "precision",
        "recall": "recall",
    },
    "cls": {
        "f1_micro": "micro F1",
        "f1_macro": "macro F1",
        "precision_micro": "precision",
        "recall_micro": "recall",
        "subset_accuracy": "all right",
    },
}


def show(measured: list[tuple[Path, dict, dict]]) -> None:
    """Print a table for each task, the best setting first.

    measured: (folder, config, scores) of each run. Runs of the same code belong to one setting where their flags differ
    in nothing but the seed, the machine and the place.
    """
    for task, columns in COLUMNS.items():
        groups = {}
        for run, config, scores in measured:
            if config["task"] == task:
                setting = setting_of(config, scores)
                groups.setdefault(setting, []).append((run, config["seed"], scores))
        if groups:
            show_table(columns, groups)


def setting_of(config, scores):
    """Return what makes a run's setting, as pairs of flag and value.

    Weights are those that were found; data is the folder's name; a cross-validation counts the folds measured.
    """
    flags = settings.make_parser("").parse_args([])
    setting = {}
    for name in vars(flags):
        if name not in (*settings.PLACE, "seed"):
            flag = name.replace("_", "-")
            setting[f"--{flag}"] = str(config.get(name))
    setting["--weights"] = config["weights_used"]
    setting["--data"] = Path(config["data"]).name
    setting["folds measured:"] = str(scores.get("folds", ""))
    setting["code:"] = str(config.get("code"))
    return tuple(setting.items())


def show_table(columns, groups):
    """Print a line for each setting. groups: {setting: [(folder, seed, scores)]}."""
    common = set.intersection(*map(set, groups))
    lines = []
    for setting, runs in groups.items():
        cells = [cell(runs, name) for name in columns]
        flags = [f"{flag} {value}" for flag, value in setting if (flag, value) not in common]
        seeds = sorted({seed for _, seed, _ in runs})
        place = runs[0][0] if len(runs) == 1 else f"seeds {', '.join(map(str, seeds))}"
        lines.append(f"{align(cells)}{len(runs):6}  {' '.join(flags) or 'the same for all'} ({place})")
    print(f"\n{align(columns.values())}  runs  setting")
    print(*sorted(lines, reverse=True), sep="\n")  # a line begins with the score that decides


def align(cells):
    return "".join(f"{text:>18}" for text in cells)


def cell(runs, name):
    """Return the mean of a score over the seeds ± its standard deviation; runs of one seed count as one, their mean."""
    by_seed = {}
    for _, seed, scores in runs:
        by_seed.setdefault(seed, []).append(scores[name])
    values = [statistics.fmean(found) for found in by_seed.values()]
    spread = ""
    if len(values) > 1:
        spread = f" ± {statistics.stdev(values):.4f}"  # n - 1
    return f"{statistics.fmean(values):.4f}{spread:9}"
