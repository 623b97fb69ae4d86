"""The table that compares several runs: a line for each setting, mean and standard deviation over its runs."""
import statistics
from pathlib import Path

from running import settings

COLUMNS = {
    "seg": ("iou", "mean_image_iou", "dice", "precision", "recall"),
    "cls": ("f1_micro", "f1_macro", "precision_micro", "recall_micro", "subset_accuracy"),
}


def show(measured: list) -> None:
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
    setting = {f"--{name}": config.get(name) for name in vars(flags) if name not in (*settings.PLACE, "seed")}
    setting["--weights"] = config["weights_used"]
    setting["--data"] = Path(config["data"]).name
    setting["folds"] = scores.get("folds")
    setting["code"] = config.get("code")
    return tuple((flag.replace("_", "-"), str(value)) for flag, value in setting.items())


def show_table(columns, groups):
    """Print a line for each setting. groups: {setting: [(folder, seed, scores)]}."""
    common = set.intersection(*map(set, groups))
    lines = []
    for setting, runs in groups.items():
        flags = [f"{flag} {value}" for flag, value in setting if (flag, value) not in common]
        seeds = sorted({seed for _, seed, _ in runs})
        place = runs[0][0] if len(runs) == 1 else f"seeds {', '.join(map(str, seeds))}"
        cells = [f"{cell(runs, name):>18}" for name in columns]
        lines.append(f"{''.join(cells)}{len(runs):6}  {' '.join(flags) or 'the same for all'} ({place})")
    print("\n" + "".join(f"{name:>18}" for name in columns) + "  runs  setting")
    print(*sorted(lines, reverse=True), sep="\n")  # a line begins with the score that decides


def cell(runs, name):
    """Return the mean of a score over runs ± its standard deviation."""
    values = [scores[name] for _, _, scores in runs]
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""  # n - 1
    return f"{statistics.fmean(values):.4f}{spread:9}"
