"""The paper's tables on data of your own: trains every cell for several seeds, measures it, and writes Markdown.

    python benchmarks/tables.py segmentation --data DIR           U-Net and U-Net++ x 12 encoders, each with and without
                                                                  APP (conv, linear; GELU, ReLU), 5 seeds
    python benchmarks/tables.py classification --data DIR         29 models
    python benchmarks/tables.py efficiency --data DIR --plot F    IoU over the number of training images
    python benchmarks/tables.py segmentation --data DIR --vary app=none,conv --vary encoder=resnet18 -- --epochs 5
    python benchmarks/tables.py segmentation --data DIR --split validation --vary app=none --vary lr=1e-3,2e-3

Every cell and seed is a run of train.py, in a folder of its own below --out, named by all its settings and the data.
What this code has done is not done again: after a kill, or with more --seeds, the same command goes on (after kill -9
once the runs that it began, which still go on then, have ended). All cells get their first seed first. A table of what
there is is written at the end, also where --minutes end it or runs fail: mean ± standard deviation (n - 1) over the
seeds, and for each APP the difference to the run without it of the same seed, its mean with the 95 % interval of
Student's t.
"""
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import harness

import test
import train
from images import manifests
from networks import encoders
from running import process, runs, settings
from running.compute import choose_compute
from running.process import InputError

COMPUTES = ("dedl.py", "models.py", "data.py", "train.py", "networks/encoders.py", "networks/fast.py",
            "images/labels.py", "images/reading.py", "images/manifests.py", "running/nuclei.py",
            "running/muon.py", "running/prediction.py")
RESNETS = ["resnet18", "resnet34", "resnet50", "resnet101"]
EFFICIENTNETS = [f"efficientnet_b{n}" for n in range(8)]
APPS = ["none", "conv", "linear", "conv:relu", "linear:relu"]

# The figures of the paper's authors (github.com/pranavsinghps1/DEDL, RESULTS.md; arXiv 2207.06489, sections 5.1, 5.2
# and supplement): on the test part of their private set, "averaged over five runs", each with a deviation of 0.0001 to
# 0.0009. IoU without and with APP (GELU).
PAPER_IOU = {
    "unet": dict(zip(RESNETS + EFFICIENTNETS, (
        (0.4347, 0.4788), (0.4774, 0.4983), (0.3798, 0.3827), (0.3718, 0.4402), (0.3785, 0.4282), (0.3301, 0.4237),
        (0.2235, 0.3735), (0.3982, 0.2411), (0.3826, 0.3829), (0.4056, 0.4336), (0.4001, 0.4311), (0.3631, 0.3937)))),
    "unetpp": dict(zip(RESNETS + EFFICIENTNETS, (
        (0.5274, 0.4707), (0.3745, 0.4678), (0.4236, 0.4422), (0.4311, 0.4467), (0.3584, 0.3751), (0.4260, 0.4269),
        (0.3778, 0.3942), (0.3928, 0.4174), (0.4138, 0.4273), (0.3884, 0.3875), (0.4090, 0.4214), (0.3784, 0.4002))))}
PAPER_RECALL = {  # the published code calls it F1
    "resnet18": 0.8635, "resnet34": 0.8277, "resnet50": 0.8499, "resnet101": 0.8710, "efficientnet_b0": 0.8372,
    "efficientnet_b1": 0.8346, "efficientnet_b2": 0.8280, "efficientnet_b3": 0.8369, "efficientnet_b4": 0.8418,
    "efficientnet_b5": 0.8463, "efficientnet_b6": 0.8263, "efficientnet_b7": 0.8129, "dm_nfnet_f0": 0.8204,
    "dm_nfnet_f1": 0.8340, "dm_nfnet_f2": 0.8652, "dm_nfnet_f3": 0.8898, "dm_nfnet_f4": 0.8848, "dm_nfnet_f5": 0.8161,
    "dm_nfnet_f6": 0.8161, "convnext_tiny": 0.8136, "convnext_small": 0.8480, "convnext_base": 0.8068,
    "coatnet_0_rw_224": 0.8123, "swin_large_patch4_window12_384": 0.8839, "swin_base_patch4_window12_384": 0.8910,
    "vit_base_patch16_384": 0.8426, "vit_base_patch32_384": 0.8507, "vit_large_patch16_384": 0.8050,
    "vit_large_patch32_384": 0.8450}

# task, the scores that are shown, the flags of train.py that vary, each with its values: a cell for each combination
TABLES = {
    "segmentation": ("seg", ["iou", "mean_image_iou", "ap50"], {"arch": ["unet", "unetpp"],
                                                                "encoder": RESNETS + EFFICIENTNETS, "app": APPS}),
    "classification": ("cls", ["f1_micro", "f1_macro", "recall_micro"], {"model": list(PAPER_RECALL)}),
    "efficiency": ("seg", ["iou", "mean_image_iou", "ap50"], {"limit-train": ["8", "16", "32", "64", "128", "all"],
                                                              "app": ["none", "conv", "linear"]})}
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")  # Okabe & Ito
TITLES = {"iou": "IoU", "mean_image_iou": "mean image IoU", "ap50": "AP@0.5", "f1_micro": "micro-F1",
          "f1_macro": "macro-F1", "recall_micro": "micro recall"}

OWN = ("task", "data", "out", "seed", "resume", "device", "fold")  # flags that this script sets
# quantiles 0.975 of Student's t with 1, 2, ... degrees of freedom
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
     2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


def main(argv=None):
    args = parse_args(argv)
    jobs = plan(args)
    waiting = [job for job in jobs if not job.done(args.split)]
    if args.show or not waiting:
        failed = []
    else:
        print(f"{len(jobs)} runs, {len(jobs) - len(waiting)} of them done", flush=True)
        failed = work(waiting, args)
    for job in jobs:
        if job.done(args.split) and not args.keep_weights:
            job.drop_weights()
    text = markdown(jobs, args)
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    with process.replacing(args.out / f"{args.table}-{args.split}.md", "w", encoding="utf-8") as handle:
        handle.write(text)
    if args.plot:
        plot(jobs, args)
    if failed:
        raise InputError(f"{len(failed)} runs failed; the first: {failed[0]}")


# ------------------------------------------------------------------------------------------------------------ the plan
@dataclass
class Job:
    """A run of train.py: `cell` {flag: value} of what varies in the table, its seed, its flags, its folder."""
    cell: dict
    seed: int
    flags: list
    folder: Path

    def done(self, split):
        return (self.folder / f"{split}.json").is_file()

    def score(self, split, name):
        """The score, of a cross-validation the mean over its folds; None where the run is not done, or has it not, as
        AP@0.5 where masks are no label images."""
        if not self.done(split):
            return None
        scores = json.loads((self.folder / f"{split}.json").read_text())
        return scores.get("mean", scores).get(name)

    def config(self):
        return json.loads((self.folder / "config.json").read_text())

    def drop_weights(self):
        """Of 12 encoders and 5 seeds they would take 20 GB. A run chosen by validation keeps its best.pt until it is
        measured on the test split too."""
        for file in [*self.folder.glob("*.pt"), *self.folder.glob("fold*/*.pt")]:
            if file.name == "last.pt" or self.done("test"):
                file.unlink()


def parse_args(argv):
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = process.Parser(description=__doc__)
    add, number = parser.add_argument, process.number
    add("table", choices=list(TABLES))
    add("--data", type=Path, default=harness.DATA, help="data folder [%(default)s]")
    add("--out", type=Path, default=Path("runs/tables"), help="the runs' folders, and TABLE.md [%(default)s]")
    add("--vary", action="append", default=[], metavar="FLAG=A,B", help="values of a flag of train.py, in place of the "
        "table's own or as a further axis; app: none, conv, linear, with :relu for ReLU; limit-train: all for no limit")
    add("--seeds", type=number(int, 1, len(T) + 1), default=5, help="as many seeds [5]")
    add("--first-seed", type=number(int, 1), default=1, help="and those that follow it [1]")
    add("--split", choices=["test", "validation"], default="test", help="choose settings by validation alone [test]")
    add("--minutes", type=number(float, 0.01), help="begin no run that would not end in this time; at its end stop "
        "those that still go on: the next call resumes them")
    add("--jobs", type=number(int, 1), help="runs at a time, which share devices and cores [one a device]")
    add("--devices", type=lambda text: text.split(","), metavar="0,1,...", help="CUDA devices to use; or cpu, or mps "
        "[all that CUDA has, else cpu]")
    add("--keep-weights", action="store_true", help="leave best.pt and last.pt in the folders of finished runs")
    add("--show", action="store_true", help="train nothing: the table of what is there")
    add("--plot", type=Path, metavar="FILE", help="with an axis of whole numbers: the scores over it, as PNG "
        "(needs matplotlib)")
    args = parser.parse_args(argv[:cut])
    args.flags = argv[cut + 1:]
    args.task, args.scores, axes = TABLES[args.table]
    args.axes = dict(axes)
    known = {name.replace("_", "-") for name in vars(settings.make_parser("").parse_args([]))}
    for text in args.vary:
        name, _, values = text.partition("=")
        if not values or name not in known or name in OWN:
            parser.error(f"argument --vary: {text} is not of the form FLAG=A,B, with a flag of train.py but "
                         f"{', '.join(OWN)}")
        args.axes[name] = values.split(",")
    if "app" in args.axes:  # what the others are compared with is the first
        args.axes["app"] = sorted(args.axes["app"], key=lambda app: app != "none")
    for flag in args.flags:
        name = flag[2:].partition("=")[0]
        if flag.startswith("--") and (name not in known or name in args.axes or name in OWN):
            parser.error(f"{flag}: behind -- take flags of train.py, but {', '.join([*args.axes, *OWN])}")
    if args.plot:
        if not any(map(is_numbers, args.axes.values())):
            parser.error("argument --plot: no flag varies over whole numbers from 1")
        try:
            import matplotlib.figure  # noqa: F401
        except ImportError:
            parser.error("argument --plot: needs matplotlib; pip install matplotlib")
    if args.devices is None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(harness.torch.cuda.device_count())))
        args.devices = visible.split(",") if harness.torch.cuda.is_available() else ["cpu"]
    args.jobs = args.jobs or len(args.devices)
    return args


def brief(value):
    """A flag's value in a table or a legend: of a file its name."""
    return Path(value).stem if "/" in value else value


def is_numbers(values):
    return all(value == "all" or value.isdecimal() and int(value) for value in values)


def seeds_of(args):
    return range(args.first_seed, args.first_seed + args.seeds)


def code_digest():
    """Eight digits that tell which code computes."""
    code = b"".join((harness.ROOT / name).read_bytes() for name in COMPUTES)
    return hashlib.sha256(code).hexdigest()[:8]


def plan(args):
    """All jobs of the table, the first seeds of all cells first. The name of a job's folder tells the network, and
    by a hash all of its settings, defaults too, the images and the code. Ends the program where a run would end by its
    flags."""
    for name in ("encoder", "model"):
        for value in args.axes.get(name, ()):
            encoders.check_name(name, value)
    records, _ = manifests.find_records(args.data, 1, task=args.task, needs_validation=args.task == "seg")
    if args.split not in {record.split for record in records}:
        raise InputError(f"--data {args.data}: has no images of split {args.split}")
    images, code, cells = settings.digest(records), code_digest(), []
    for values in itertools.product(*args.axes.values()):
        cell = dict(zip(args.axes, values))
        flags = [f"--task={args.task}", f"--data={args.data}", *args.flags]
        for name, value in cell.items():
            if name == "app":
                form, _, activation = value.partition(":")
                flags += [f"--app={form}", *([f"--app-activation={activation}"] if activation else [])]
            elif (name, value) != ("limit-train", "all"):
                flags.append(f"--{name}={value}")
        parsed = {flag: str(v) for flag, v in sorted(vars(settings.parse_args(flags)).items())
                  if flag not in (*OWN, "workers")}
        digest = hashlib.sha256(f"{parsed} {images} {code}".encode()).hexdigest()[:8]
        told = [parsed.get(flag, "None") for flag in ("arch", "encoder", "app", "model", "limit_train")]
        name = "-".join(re.sub(r"\W", "_", value) for value in told if value != "None")
        cells.append((cell, flags, f"{name}-{digest}"))  # tables share the runs that they have in common
    return [Job(cell, seed, [*flags, f"--seed={seed}"], args.out / f"{name}-seed{seed}")
            for seed in seeds_of(args) for cell, flags, name in cells]


# ------------------------------------------------------------------------------------------------------------ the work
def work(waiting, args):
    """Runs the jobs, some at a time, each in a process of its own. Returns what failed."""
    started, usual, going, failed, count = time.monotonic(), [], {}, [], len(waiting)
    # timed once: runs beside each other might find different ones
    timed = "cpu" in args.devices and settings.parse_args(waiting[0].flags).amp == "auto" and "amp" not in args.axes
    args.precision = ["--amp", choose_compute("cpu").amp] if timed else []
    ends = started + args.minutes * 60 if args.minutes else math.inf
    free = [args.devices[i % len(args.devices)] for i in range(args.jobs)]
    bar = process.progress(None, args.table, "run", total=count)
    try:
        while waiting or going:
            longest = max(usual, default=0)
            while waiting and free and time.monotonic() + longest < ends:
                job, device = waiting.pop(0), free.pop(0)
                going[start(job, device, args)] = job, device, time.monotonic()
            if not going:
                break
            time.sleep(0.2)
            for child in [child for child in going if child.poll() is not None]:
                job, device, since = going.pop(child)
                free.append(device)
                bar.update(1)
                if child.returncode:
                    said = (args.out / f"{job.folder.name}.log").read_text(errors="replace").splitlines()
                    how = f"killed by signal {-child.returncode}" if child.returncode < 0 else said[-1:]
                    failed.append(f"{job.folder}: {how}")
                    print(failed[-1], flush=True)
                else:
                    usual.append(time.monotonic() - since)
                    if not args.keep_weights:
                        job.drop_weights()
                    shown = ", ".join(f"{TITLES[name]} {score:.4f}" for name in args.scores
                                      if (score := job.score(args.split, name)) is not None)
                    print(f"{job.folder.name}: {shown}, {usual[-1]:.0f} s", flush=True)
            if time.monotonic() > ends:
                break
    finally:
        for child in going:
            child.send_signal(signal.SIGTERM)
        for child in going:
            child.wait()
        bar.close()
    return failed


def start(job, device, args):
    """The process of a job, by `one` below. Its output goes to a file beside the folder."""
    environment = dict(os.environ)
    if device == "cpu":
        environment["OMP_NUM_THREADS"] = str(max(1, harness.torch.get_num_threads() // args.jobs))
    elif device != "mps":
        environment["CUDA_VISIBLE_DEVICES"], device = device, "cuda"
    args.out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "one", str(job.folder), args.split, device, *job.flags, *args.precision]
    with open(args.out / f"{job.folder.name}.log", "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def one(argv):
    """Trains a run, or goes on with it, and measures it: `tables.py one FOLDER SPLIT DEVICE flags...`."""
    folder, split, device, *flags = argv
    if not any((Path(folder) / f"{name}.json").is_file() for name in manifests.SPLITS):  # else its training has ended
        if (Path(folder) / "config.json").is_file():
            flags = [*(flag for flag in flags if not flag.startswith("--amp=")), "--resume"]  # it keeps its precision
        train.main([*flags, "--device", device, "--out", folder])
    test.main([folder, "--split", split, "--device", device, "--amp", runs.read_config(Path(folder))["amp"]])


# ------------------------------------------------------------------------------------------------------------ the table
def mean_and_interval(values):
    """The mean, and what the 95 % interval of Student's t goes beyond it to both sides; nan for one value."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return mean, math.nan
    return mean, T[n - 2] * statistics.stdev(values) / math.sqrt(n)


def markdown(jobs, args):
    """What made the tables, which versions and machines; a table for each score."""
    found = [name for name in args.scores if any(job.score(args.split, name) is not None for job in jobs)]
    tables = [line for name in found or args.scores[:1] for line in ("", *table(jobs, args, name))]
    return "\n".join([*about(jobs, args), *tables]) + "\n"


def table(jobs, args, name):
    """The lines of a score's table: one for each cell that is done, those that differ in APP alone together, and at the
    end the mean over the cells. Beside the paper's own score what the paper has."""
    seeds = seeds_of(args)
    scores = {(*sorted(job.cell.items()), job.seed): score for job in jobs
              if (score := job.score(args.split, name)) is not None}
    base, *others = apps = args.axes.get("app", [None])
    rest = {flag: values for flag, values in args.axes.items() if flag != "app"}
    done = {tuple(job.cell[flag] for flag in rest) for job in jobs if job.done(args.split)}
    cells = [dict(zip(rest, values)) for values in itertools.product(*rest.values()) if values in done]

    def by_seed(cell, app):
        key = sorted({**cell, **({"app": app} if app else {})}.items())
        return {seed: scores[*key, seed] for seed in seeds if (*key, seed) in scores}

    def spread(values):
        values = list(values)
        if not values:
            return ""
        return f"{statistics.fmean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")

    def difference(differences):
        if not differences:
            return ""
        mean, beyond = mean_and_interval(differences)
        return f"{mean:+.4f}" + ("" if math.isnan(beyond) else f" [{mean - beyond:+.4f}, {mean + beyond:+.4f}]")

    def pairs(cell, app):
        with_app, without = by_seed(cell, app), by_seed(cell, base)
        return {seed: value - without[seed] for seed, value in with_app.items() if seed in without}

    varied = [flag for flag, values in rest.items() if len(values) > 1] or list(rest)[:1]
    if base is None:
        header = [*varied, TITLES[name], "seeds"]
    else:
        header = [*varied, f"{TITLES[name]}, APP {base}", *itertools.chain.from_iterable(
            (f"APP {app}", f"{app} - {base}, 95 %") for app in others), "seeds"]
    paper = PAPER_IOU if name == "iou" and base == "none" and others and "limit-train" not in rest else \
        PAPER_RECALL if name == "recall_micro" else {}
    theirs = ["*paper, private set: without*", "*with APP (GELU)*", "*difference*"] if paper is PAPER_IOU else \
        ["*paper, private set: its \"F1\"*"] if paper else []
    rows = []
    for cell in cells:
        found = [by_seed(cell, app) for app in apps]
        row = [*(brief(cell[flag]) for flag in varied), spread(found[0].values())]
        for app, values in zip(others, found[1:]):
            row += [spread(values.values()), difference(list(pairs(cell, app).values()))]
        counts = [str(len(values)) for values in found]
        row.append(counts[0] if len(set(counts)) == 1 else "/".join(counts))
        if paper is PAPER_IOU:
            was = PAPER_IOU.get(cell.get("arch", "unet"), {}).get(cell.get("encoder", "resnet18"))
            row += [f"*{was[0]:.4f}*", f"*{was[1]:.4f}*", f"*{was[1] - was[0]:+.4f}*"] if was else [""] * 3
        elif paper:
            was = PAPER_RECALL.get(cell.get("model"))
            row.append(f"*{was:.4f}*" if was else "")
        rows.append(row)
    if others and len(cells) > 1:  # of each seed the mean over the cells, as far as all of them have it
        row = ["mean over lines", *[""] * (len(varied) - 1), ""]
        for app in others:
            of_cells = [pair for cell in cells if (pair := pairs(cell, app))]
            whole = [seed for seed in seeds if of_cells and all(seed in pair for pair in of_cells)]
            row += [f"of {len(of_cells)}", difference([statistics.fmean(pair[seed] for pair in of_cells)
                                                       for seed in whole])]
        rows.append([*row, "", *[""] * len(theirs)])
    return ["| " + " | ".join(row) + " |" for row in ([*header, *theirs], ["---"] * len(header + theirs), *rows)]


def about(jobs, args):
    """What made the tables: the command, and where the runs were made."""
    made = {}
    for job in jobs:
        if job.done(args.split):
            config = job.config()
            versions = ", ".join(f"{name} {version}" for name, version in config["versions"].items())
            where = (f"{config['device']}, {config['amp']}, first weights {config['weights_used']}, "
                     f"code {config.get('code')}; {versions}")
            made[where] = made.get(where, 0) + 1
    return [f"`python benchmarks/tables.py {shlex.join(sys.argv[1:])}`", "",
            f"{sum(made.values())} of {len(jobs)} runs, measured on the {args.split} split of {args.data.name}.",
            *(f"{number} runs on {where}." for where, number in made.items())]


def plot(jobs, args):
    """A panel for each score: each seed's score over the axis of numbers, and a line through their means, for each
    combination of the other axes' values."""
    from matplotlib.figure import Figure
    axis = next(name for name, values in args.axes.items() if is_numbers(values))
    figure = Figure((4 * len(args.scores), 4), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(args.scores), squeeze=False)[0]
    for score, panel in zip(args.scores, panels):
        plot_score(jobs, args, score, axis, panel)
    lines, names = panels[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=2, frameon=False)
    args.plot.parent.mkdir(parents=True, exist_ok=True)
    with process.replacing(args.plot) as handle:
        figure.savefig(handle, format="png")


def plot_score(jobs, args, score, axis, panel):
    from matplotlib.ticker import NullLocator
    lines, used = {}, {}
    for job in jobs:
        found = job.score(args.split, score)
        if found is not None:
            value = job.cell[axis]
            used[value] = job.config()["train_images_used"] if axis == "limit-train" else int(value)
            others = [flag for flag, values in args.axes.items() if flag != axis and len(values) > 1]
            name = ", ".join(f"{flag} {brief(job.cell[flag])}" for flag in others)
            lines.setdefault(name, {}).setdefault(used[value], []).append(found)
    for place, (name, points) in enumerate(lines.items()):
        colour = COLOURS[place % len(COLOURS)]
        shift = 1.05 ** (place - (len(lines) - 1) / 2)  # dots lie side by side
        where = sorted(points)
        panel.plot(where, [statistics.fmean(points[x]) for x in where], color=colour, linewidth=1.5, label=name)
        for x in where:
            panel.plot([x * shift] * len(points[x]), points[x], "o", color=colour, markersize=4, alpha=0.7)
    ticks = sorted(set(used.values()))
    panel.set_xscale("log")
    panel.set_xticks(ticks, map(str, ticks))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xlabel("training images" if axis == "limit-train" else axis)
    panel.set_title(f"{args.split} {TITLES[score]}", fontsize="medium")
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        process.command(lambda _: one(sys.argv[2:]), less_memory=train.LESS_MEMORY)
    else:
        process.command(main)
