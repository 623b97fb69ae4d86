"""The settings of a training: recipes, train.py's flags, and what may change when a run goes on."""
import hashlib
from argparse import Namespace
from pathlib import Path

import dedl
import models
from running import runs
from running.compute import add_compute
from running.process import SEED, InputError, Parser, number

# What a flag that is not given falls back to. paper: the published recipe. short: what worked best from random weights,
# one cycle of the learning rate and an average of the weights. synthetic: without --data and --recipe, short with what
# the small synthetic set needs.
RECIPES = ("paper", "short", "synthetic")
DEFAULTS = {
    "seg": {
        "lr": (3.6e-4, 2e-3, 2e-3),
        "weight_decay": (1e-5, 1e-2, 1e-2),
        "batch_size": (16, 4, 8),
        "epochs": (50, 6, 3),
        "patience": (0, 0, 0),
        "class_weights": ("auto", "equal", "equal"),
        "tile": (480, 256, 128),
        "steps": (0, 120, 100),
        "depth": (3, 4, 4),
        "nuclei": ("mask", "auto", "auto"),
        "folds": (1, 1, 1),
    },
    "cls": {
        "lr": (3e-4, 5e-4, 1e-3),
        "weight_decay": (0.0, 1e-2, 1e-2),
        "batch_size": (16, 8, 8),
        "epochs": (20, 60, 30),
        "patience": (5, 0, 0),
        "class_weights": ("auto", "equal", "equal"),
        "image_size": (384, 160, 128),
        "folds": (6, 6, 6),
    },
}

# settings that an earlier run, given as --weights, brings along
OF_NETWORK = ("task", "arch", "encoder", "depth", "model", "image_size")
FINE_TUNE = 0.3  # times the recipe's learning rate, where --weights is an earlier run
PLACE = ("out", "resume", "workers", "device", "amp", "fold")  # may differ when a run goes on


def make_parser(description, tasks=DEFAULTS):
    """Return the parser of train.py's flags: the common ones and those of the tasks."""
    parser = Parser(description=description)
    _add_common(parser.add_argument)
    _add_more(parser.add_argument_group("finer settings").add_argument)
    if "seg" in tasks:
        _add_segmentation(parser.add_argument_group("--task seg").add_argument)
    if "cls" in tasks:
        _add_classification(parser.add_argument_group("--task cls").add_argument)
    return parser


def _default(flag):
    """What the recipes have for a flag, for --help."""
    tasks = [f"{task} {defaults[flag]}" for task, defaults in DEFAULTS.items() if flag in defaults]
    return f"[{', '.join(RECIPES)}: {'; '.join(tasks)}]"


def _add_common(add):
    add("--task", choices=list(DEFAULTS), help="seg: segment nuclei; cls: classify phenotypes [seg]")
    add("--data", type=Path, help="data folder [the built-in synthetic set, made on first use]")
    add("--out", type=Path, help="the run's folder [runs/<name that tells the setting>; to resume: the newest]")
    add("--epochs", type=number(int, 1), help=_default("epochs"))
    add("--weights", default="auto", metavar="auto|imagenet|none|FILE|RUN",
        help="the first weights of the encoder or the classifier; auto: ImageNet's if they can be had, else random "
             "ones; RUN: the whole network of an earlier run, its folder, to train on [auto]")
    add("--folds", type=number(int, 1),
        help="of a cross-validation inside the training rows; 1: none, the validation rows validate [seg 1, cls 6]")
    add("--resume", action="store_true", help="go on from the run's last.pt, with the settings it was started with")


def _add_more(add):
    add("--recipe", choices=["paper", "short"],
        help="the optimizer, its schedule, the augmentation, of seg the loss and the average of weights, and defaults "
             "of other flags [seg: short, cls: paper; without --data short, made shorter]")
    add("--batch-size", type=number(int, 1), help=f"tiles or images a step {_default('batch_size')}")
    add("--lr", type=number(float, 1e-12),
        help=f"largest learning rate; with --weights RUN {FINE_TUNE} of it {_default('lr')}")
    add("--weight-decay", type=number(float, 0), help=f"of short: decoupled {_default('weight_decay')}")
    add("--patience", type=number(int, 0),
        help=f"stop after this many epochs without a better validation score; 0: never {_default('patience')}")
    add("--class-weights", type=class_weights, metavar="auto|equal|published|W0,W1,...",
        help="of the classes in the loss; auto: by their frequency in training; published: the paper's; or numbers: "
             "background,nucleus[,border] for seg, the classes in alphabetical order for cls "
             + _default("class_weights"))
    add("--fold", type=number(int, 0), help="train this fold alone, 0 to folds - 1 [all, one after another]")
    add("--limit-train", type=number(int, 1), help="use so many training images, drawn by --seed")
    add("--seed", type=SEED, default=77, help="[77]")
    add("--workers", type=number(int, 0, 256), help="loader processes [0 on a CPU, else up to 4]")
    add("--compile", action="store_true",
        help="compile the network with torch.compile; each epoch then leaves out what fills no whole batch")
    add_compute(add)


def _add_segmentation(add):
    add("--arch", choices=list(models.DECODERS), default="unet", help="[unet]")
    add("--encoder", default="resnet18", help="a timm model [resnet18]")
    add("--depth", type=int, choices=[2, 3, 4, 5], help=f"encoder stages; deeper sees farther {_default('depth')}")
    add("--app", choices=["conv", "linear", "none"], default="conv", help="autoencoder post-processing loss [conv]")
    add("--app-activation", choices=list(dedl.ACTIVATIONS), default="gelu", help="[gelu]")
    add("--app-weight", type=number(float, 0), default=1.0, help="factor of APP's penalty [1]")
    add("--tile", type=number(int, 16, 16384), help=f"side of a tile in pixels {_default('tile')}")
    add("--steps", type=number(int, 0, 10 ** 6),
        help=f"training steps an epoch; 0: one pass over the tiles {_default('steps')}")
    add("--nuclei", choices=["auto", "mask", "instances"],
        help="mask: background and nucleus; instances: nuclei that touch are separated; auto: instances where the "
             f"training masks are label images {_default('nuclei')}")
    add("--channel", default="DAPI", help="page of a multi-page TIFF by name, or several: DAPI,CD4 [DAPI]")


def _add_classification(add):
    add("--model", default="resnet18", help="a timm model [resnet18]")
    add("--image-size", type=number(int, 32, 4096), help=f"side of an image in pixels {_default('image_size')}")
    add("--gamma", type=number(float, 0, 100), default=2.0, help="of the focal loss; 0: binary cross-entropy [2]")
    add("--swa", action="store_true", help="keep a moving average of the weights")


def class_weights(text):
    """Return the value of --class-weights: auto, equal, published or a list of numbers."""
    if text in ("auto", "equal", "published"):
        return text
    positive = number(float, 1e-12)
    return [positive(value) for value in text.split(",")]


def parse_args(argv: list | None = None, description: str | None = None) -> Namespace:
    """Return the settings of a run; with --resume those it was started with are the defaults. End the program where
    they make no sense."""
    args = make_parser(description).parse_args(argv)
    saved = {}
    if args.resume:
        args.out = args.out or runs.newest_run("config.json")
        saved = runs.read_config(args.out)
    start = {} if args.resume else runs.start_of(args.weights)
    task = args.task or (saved or start).get("task", "seg")
    parser = make_parser(description, [task])  # it knows no flag of the other task
    kept = vars(args).keys() & saved.keys() - {"workers", "fold"}
    parser.set_defaults(**{name: saved[name] for name in kept})
    parser.set_defaults(**{name: start[name] for name in (*OF_NETWORK, "channel") if name in start})
    parser.set_defaults(out=args.out, task=task)
    args = parser.parse_args(argv)
    lowers = start and args.lr is None
    _fill_in_recipe(args)
    if lowers:
        args.lr *= FINE_TUNE
    for name in OF_NETWORK:
        if start and vars(args).get(name) != start.get(name):
            parser.error(f"argument --weights: {args.weights} was trained with --{name.replace('_', '-')} "
                         f"{start.get(name)}")
    if args.data:
        args.data = args.data.resolve()
    if start:
        args.weights = str(Path(args.weights).resolve())
    if saved:
        refuse_other_settings(args, saved, (*PLACE, "data", "epochs", "patience"))
    if args.task == "seg" and args.tile < 2 ** (args.depth + 1):
        parser.error(f"argument --tile: {args.tile} is too small for depth {args.depth}; take {2 ** (args.depth + 1)}")
    if args.fold is not None and (args.folds == 1 or args.fold >= args.folds):
        parser.error(f"argument --fold: {args.fold} is not one of several folds, 0 to {args.folds - 1} (--folds)")
    return args


def _fill_in_recipe(args):
    usual = "short" if args.task == "seg" or not args.data else "paper"
    recipe = args.recipe or (usual if args.data else "synthetic")
    for name, values in DEFAULTS[args.task].items():
        if getattr(args, name) is None:
            setattr(args, name, values[RECIPES.index(recipe)])
    args.recipe = args.recipe or usual


# ---------------------------------------------------------------------------------------------------------- to go on
def refuse_other_settings(args: Namespace, saved: dict, may_change: tuple = PLACE) -> None:
    """Raise InputError if the run in args.out was started with other settings, `saved`, than `args`."""
    for name, value in vars(args).items():
        if name not in may_change and str(saved.get(name)) != str(value):  # a Path is saved as a string
            raise InputError(f"argument --{name.replace('_', '-')}: the run of {args.out / 'config.json'} was started "
                             f"with {saved.get(name)}, not {value}")


def digest(records: list) -> str:
    """Return a hash of which images there are, with their splits and labels, wherever they lie."""
    rows = sorted(f"{record.name},{record.labels},{record.split}" for record in records)
    return hashlib.sha256("\n".join(rows).encode(errors="surrogateescape")).hexdigest()


def refuse_other_data(args: Namespace, records: list, begun: dict | None) -> None:
    """Raise InputError if the run whose config is `begun` was started with other images, splits or labels."""
    if begun and begun["rows"] != digest(records):
        raise InputError(f"--data {args.data}: its images, their splits or labels are not those that {args.out} was "
                         f"started with; train a new run")


def how_to_go_on(args: Namespace) -> str:
    """Return what an interruption prints at the end."""
    if not args.out or not (args.out / "config.json").is_file():
        return "interrupted before the first epoch; nothing is saved"
    fold = "" if args.fold is None else f" --fold {args.fold}"
    return f"interrupted; finished epochs are saved; go on with: python train.py --resume --out {args.out}{fold}"
