"""The table that compares several runs."""
import math

COLUMNS = {
    "seg": ("iou", "mean_image_iou", "ap50", "ap50_mean_image", "count_ratio"),
    "cls": ("f1_micro", "f1_macro", "precision_micro", "recall_micro", "subset_accuracy"),
}


def show(measured: list) -> None:
    """Print a table for each task, a line for each run, the best first. measured: (folder, config, scores) of each."""
    for task, columns in COLUMNS.items():
        lines = []
        for run, config, scores in measured:
            if config["task"] == task:
                cells = [f"{scores.get(name, math.nan):16.4f}" for name in columns]  # not all masks are label images
                lines.append(f"{''.join(cells)}  {run}")
        if lines:
            print("\n" + "".join(f"{name:>16}" for name in columns) + "  run")
            print(*sorted(lines, reverse=True), sep="\n")  # a line begins with the score that decides
