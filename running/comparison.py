"""The table that compares several runs: a line for each setting, mean and standard deviation over its seeds."""
import statistics
from pathlib import Path

from running import settings

COLUMNS = {"seg": {"iou": "IoU", "mean_image_iou": "mean image IoU", "dice": "Dice", "precision": "precision",
                   "recall": "recall"},
           "cls": {"f1_micro": "micro F1", "f1_macro": "macro F1", "precision_micro": "precision",
                   "recall_micro": "recall", "subset_accuracy": "all right"}}


def show(measured):
    """Prints a table for each task, the best setting first. measured: (folder, config, scores) of each run. Runs of the
    same code whose flags are the same but for the seed, the machine and the place are of one setting."""
    once = {run.resolve(): (run, config, scores) for run, config, scores in measured}
    for task, columns in COLUMNS.items():
        groups = {}
        for run, config, scores in once.values():
            if config["task"] == task:
                groups.setdefault(tuple(setting_of(config, scores).items()), []).append((run, config["seed"], scores))
        if groups:
            show_groups(columns, [(dict(setting), members) for setting, members in groups.items()])


def setting_of(config, scores):
    """{flag: value} of what makes a run's setting; of weights what was found, not what was asked for, of data the
    folder's name; and of a cross-validation how many folds were measured."""
    flags = vars(settings.make_parser("").parse_args([]))
    kept = {f"--{name.replace('_', '-')}": str(config.get(name)) for name in flags
            if name not in (*settings.PLACE, "seed")}
    return {**kept, "--weights": config["weights_used"], "--data": Path(config["data"]).name,
            "folds measured:": str(scores.get("folds", "")), "code:": str(config.get("code"))}


def show_groups(columns, groups):
    def by_seed(members, name):
        """The score of each seed; of several runs of one, their mean."""
        values = {}
        for _, seed, scores in members:
            values.setdefault(seed, []).append(scores[name])
        return [statistics.fmean(found) for found in values.values()]

    first = next(iter(columns))
    groups.sort(key=lambda group: -statistics.fmean(by_seed(group[1], first)))
    differ = [flag for flag in groups[0][0] if len({setting[flag] for setting, _ in groups}) > 1]
    print("\n" + "".join(f"{title:>18}" for title in columns.values()) + "  runs  setting")
    for setting, members in groups:
        cells = []
        for name in columns:
            values = by_seed(members, name)
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else " " * 9  # n - 1
            cells.append(f"{statistics.fmean(values):.4f}{spread}")
        flags = " ".join(f"{flag} {setting[flag]}" for flag in differ) or "the same for all"
        seeds = ", ".join(str(seed) for seed in sorted({seed for _, seed, _ in members}))
        names = f"{members[0][0]}" if len(members) == 1 else f"seeds {seeds}"
        print("".join(f"{cell:>18}" for cell in cells) + f"{len(members):6}  {flags} ({names})")
