"""The settings of a training: recipes, train.py's flags, and what may change when a run goes on."""
import argparse
import hashlib
import sys
from pathlib import Path

import dedl
import models
from running import process, runs
from running.process import InputError

# What a flag that is not given falls back to. paper: the published recipe. short: what worked best from random weights,
# one cycle to a large learning rate. Without --data and --recipe: short, with what the small synthetic set needs.
# steps 0: one pass over the tiles.
RECIPES = {
    "seg": {"paper": dict(lr=3.6e-4, weight_decay=1e-5, batch_size=16, epochs=50, patience=0, class_weights="auto",
                          tile=480, steps=0, depth=3),
            "short": dict(lr=2e-3, weight_decay=1e-2, batch_size=4, epochs=5, patience=0, class_weights="equal",
                          tile=256, steps=0, depth=5)},
    "cls": {"paper": dict(lr=3e-4, weight_decay=0.0, batch_size=16, epochs=20, patience=5, class_weights="auto",
                          image_size=384),
            "short": dict(lr=5e-4, weight_decay=1e-2, batch_size=8, epochs=60, patience=0, class_weights="equal",
                          image_size=160)}}
RECIPES["seg"]["synthetic"] = {**RECIPES["seg"]["short"], "lr": 1e-3, "batch_size": 8, "epochs": 3, "tile": 128,
                               "steps": 100}
RECIPES["cls"]["synthetic"] = {**RECIPES["cls"]["short"], "lr": 1e-3, "epochs": 30, "image_size": 128}
PLACE = ("out", "resume", "workers", "device", "amp", "deterministic", "fold")  # may be others when a run goes on
ONLY = {"seg": ("arch", "encoder", "depth", "app", "app_activation", "app_weight", "tile", "channel", "steps"),
        "cls": ("model", "image_size", "folds", "fold", "gamma", "swa")}  # flags of one task alone


def make_parser(description):
    """All flags of train.py."""
    def default(flag):
        return "[" + "; ".join(
            f"{task}: " + ", ".join(f"{name} {values[flag]}" for name, values in recipes.items())
            for task, recipes in RECIPES.items() if flag in recipes["paper"]) + "]"

    parser = process.Parser(description=description)
    add, number = parser.add_argument, process.number
    add("--task", choices=list(RECIPES), default="seg", help="seg: segment nuclei; cls: classify phenotypes [seg]")
    add("--data", type=Path, help="data folder (see README) [the built-in synthetic set, made on first use]")
    add("--out", type=Path, help="the run's folder [runs/<name that tells the setting>; to resume: the newest]")
    add("--recipe", choices=["paper", "short"], help="the optimizer, its schedule, the augmentation, of seg the loss's "
        "sum or mean, and defaults of the next flags [seg: short, cls: paper; without --data short, made shorter]")
    add("--epochs", type=number(int, 1), help=default("epochs"))
    add("--batch-size", type=number(int, 1), help=f"tiles or pictures a step {default('batch_size')}")
    add("--lr", type=number(float, 1e-12), help=f"largest learning rate {default('lr')}")
    add("--weight-decay", type=number(float, 0), help=f"of short: decoupled {default('weight_decay')}")
    add("--patience", type=number(int, 0), help="stop after so many epochs without a better validation IoU or F1; "
        f"0: never {default('patience')}")
    add("--class-weights", type=class_weights, metavar="auto|equal|published|W0,W1,...", help="of the classes in the "
        "loss; auto: by how frequent they are in training; published: the paper's; or numbers: background,nucleus for "
        f"seg, the classes in alphabetical order for cls {default('class_weights')}")
    add("--seed", type=process.SEED, default=77, help="[77]")
    add("--workers", type=number(int, 0, 256), help="loader processes [0 on a CPU, else up to 4]")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="[auto]")
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="mixed precision; auto: on a CPU bf16 "
        "if a convolution, timed at the start, is faster in it [auto]")
    add("--deterministic", action="store_true", help="let a GPU use only algorithms that give the same bits each "
        "time; slower: cuDNN's fastest are not among them (a CPU's always are)")
    add("--compile", action="store_true", help="compile the network with torch.compile; each epoch then leaves "
        "out the tiles or pictures that fill no whole batch")
    add("--weights", default="auto", metavar="auto|imagenet|none|FILE", help="the first weights of the encoder or the "
        "classifier; auto: ImageNet's if they can be had, else random ones [auto]")
    add("--limit-train", type=number(int, 1), metavar="N", help="use N training images, drawn by --seed")
    add("--resume", action="store_true", help="go on from the run's last.pt, with the settings it was started with")
    add = parser.add_argument_group("--task seg").add_argument
    add("--arch", choices=list(models.DECODERS), default="unet", help="[unet]")
    add("--encoder", default="resnet18", metavar="TIMM_NAME", help="[resnet18]")
    add("--depth", type=int, choices=[2, 3, 4, 5], help=f"encoder stages; deeper sees farther {default('depth')}")
    add("--app", choices=["conv", "linear", "none"], default="conv", help="autoencoder post-processing loss [conv]")
    add("--app-activation", choices=list(dedl.ACTIVATIONS), default="gelu", help="[gelu]")
    add("--app-weight", type=number(float, 0), default=1.0, help="factor of APP's penalty [1]")
    add("--tile", type=number(int, 16, 16384), help=f"side of a tile in pixels {default('tile')}")
    add("--steps", type=number(int, 0, 10 ** 6), metavar="N", help="training steps an epoch, from as many passes over "
        f"the tiles as that takes, or a part of one; 0: one pass {default('steps')}")
    add("--channel", default="DAPI", help="page of a multi-page TIFF by name, or several: DAPI,CD4 [DAPI]")
    add = parser.add_argument_group("--task cls").add_argument
    add("--model", default="resnet18", metavar="TIMM_NAME", help="[resnet18]")
    add("--image-size", type=number(int, 32, 4096), help=f"side of a picture in pixels {default('image_size')}")
    add("--folds", type=number(int, 1), default=6, help="of the cross-validation inside the training rows; 1: none, "
        "the validation rows validate [6]")
    add("--fold", type=number(int, 0), metavar="K", help="train fold K alone, 0 to folds - 1 [all, one after another]")
    add("--gamma", type=number(float, 0, 100), default=2.0, help="of the focal loss; 0: binary cross-entropy [2]")
    add("--swa", action="store_true", help="average the weights over the last quarter of the epochs")
    return parser


def parse_args(argv=None, description=None):
    """The settings of a run; with --resume those it was started with. Ends the program where they make no sense."""
    parser = make_parser(description)
    args = parser.parse_args(argv)
    saved = None
    if args.resume:
        args.out = args.out or runs.newest_run("config.json")
        saved = runs.read_config(args.out)
        precision = {"bfloat16": "bf16", "float16": "fp16", "float32": "off"}.get(saved.get("amp"), "auto")
        device = saved.get("device") if saved.get("device") in runs.devices() else "auto"
        precision = "auto" if device == "auto" else precision  # another machine's may be slow here
        settings = as_flags({**{name: saved.get(name) for name in vars(args) if name not in PLACE}, "device": device,
                             "amp": precision, "deterministic": saved.get("deterministic")})
        parser.source = f"{args.out / 'config.json'}: "
        parser.parse_args(settings)
        parser.source = ""
        given = sys.argv[1:] if argv is None else argv
        args = parser.parse_args([*settings, *given], argparse.Namespace(out=args.out))
    for name in ONLY["cls" if args.task == "seg" else "seg"]:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"argument --{name.replace('_', '-')}: is not for --task {args.task}")
        delattr(args, name)
    recipes = RECIPES[args.task]
    usual = "short" if args.task == "seg" or not args.data else "paper"
    defaults = recipes[args.recipe or (usual if args.data else "synthetic")]
    args.recipe = args.recipe or usual
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.data:
        args.data = args.data.resolve()
    if Path(args.weights).is_file():
        args.weights = str(Path(args.weights).resolve())
    if saved:
        refuse_other_settings(args, saved, (*PLACE, "data", "epochs", "patience"))
    if args.task == "seg" and args.tile < 2 ** (args.depth + 1):
        parser.error(f"argument --tile: {args.tile} is too small for depth {args.depth}; take {2 ** (args.depth + 1)}")
    if args.task == "cls" and args.fold is not None and args.fold >= args.folds:
        parser.error(f"argument --fold: {args.fold} is not one of the {args.folds} folds, 0 to {args.folds - 1}")
    return args


def as_flags(settings):
    """The command line that gives these settings."""
    def text(value):
        return ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return [f"--{name.replace('_', '-')}" + ("" if value is True else f"={text(value)}")
            for name, value in settings.items() if value is not None and value is not False]


def how_to_go_on(args):
    """What an interruption says at the end."""
    if not args.out or not (args.out / "config.json").is_file():
        return "interrupted before the first epoch; nothing is saved"
    fold = "" if getattr(args, "fold", None) is None else f" --fold {args.fold}"
    return (f"interrupted; {args.out} holds what the finished epochs left; go on with: "
            f"python train.py --resume --out {args.out}{fold}")


def refuse_other_settings(args, saved, may_change=PLACE):
    """Raises InputError if the run in args.out was started with other settings, `saved`, than `args`."""
    for name, value in vars(args).items():
        was = saved.get(name)
        if name not in may_change and was != (str(value) if isinstance(value, Path) else value):
            raise InputError(f"argument --{name.replace('_', '-')}: the run of {args.out / 'config.json'} was "
                                f"started with {was}, not {value}")


def digest(records):
    """A hash of which images there are, with their splits and labels, wherever they lie."""
    rows = sorted(f"{r.name or r.image.name},{';'.join(r.labels)},{r.split}" for r in records)
    return hashlib.sha256("\n".join(rows).encode(errors="surrogateescape")).hexdigest()


def refuse_other_data(args, records, begun):
    """Raises InputError if the run with the config `begun`, if any, was started with other images, splits or labels."""
    if begun and begun.get("rows") != digest(records):
        raise InputError(f"--data {args.data}: its images, their splits or labels are not those that {args.out} was "
                            f"started with; train a new run")


def class_weights(text):
    """The type of --class-weights: auto, equal, published or a list of numbers."""
    if text in ("auto", "equal", "published"):
        return text
    return [process.number(float, 1e-12)(value) for value in text.split(",")]


class_weights.__name__ = "auto|equal|published|W0,W1,..."  # argparse shows it: invalid ... value
