"""Trains a model on a data folder, or on the built-in synthetic set.

    python train.py --task seg                          the synthetic set, a few minutes on two CPU cores
    python train.py --task seg --data DIR               your data, the paper's recipe
    python train.py --task seg --data DIR --recipe short --depth 5
    python train.py --task cls --data DIR               phenotypes, several an image, in a cross-validation of 6 folds
    python train.py --task cls --data DIR --fold 2      one of these folds alone
    python train.py --resume                            go on with the newest run after an interruption
"""
import argparse
import csv
import math
import os
import platform
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch.optim import swa_utils
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import dedl
import models
import pictures
import runs

# What a flag that is not given falls back to. paper: the published recipe. short: one cycle to a large learning rate,
# for short runs from random weights. Without --data and --recipe: short, with what the small synthetic fields need.
RECIPES = {
    "seg": {"paper": dict(lr=3.6e-4, weight_decay=1e-5, batch_size=16, epochs=50, patience=5, class_weights="auto",
                          tile=480),
            "short": dict(lr=2e-3, weight_decay=1e-2, batch_size=4, epochs=5, patience=0, class_weights="equal",
                          tile=256)},
    "cls": {"paper": dict(lr=3e-4, weight_decay=0.0, batch_size=16, epochs=20, patience=5, class_weights="auto",
                          image_size=384),
            "short": dict(lr=5e-4, weight_decay=1e-2, batch_size=8, epochs=60, patience=0, class_weights="equal",
                          image_size=160)}}
RECIPES["seg"]["synthetic"] = {**RECIPES["seg"]["short"], "batch_size": 8, "epochs": 3, "tile": 128}
RECIPES["cls"]["synthetic"] = {**RECIPES["cls"]["short"], "lr": 1e-3, "epochs": 30, "image_size": 128}
PLACE = ("out", "resume", "workers", "device", "amp", "fold")  # what is of a machine, not of the training
ONLY = {"seg": ("arch", "encoder", "depth", "app", "app_activation", "app_weight", "tile", "channel"),
        "cls": ("model", "image_size", "folds", "fold", "gamma", "swa")}  # flags of one task alone
SWA_SHARE, SWA_RATE = 0.25, 0.25  # --swa averages over the last quarter of the epochs, at a quarter of the largest rate


def main(argv=None):
    args = parse_args(argv)
    compute = choose_compute(args)
    args.data = args.data or runs.synthetic_folder()
    (train_segmentation if args.task == "seg" else train_classification)(args, compute)


# ------------------------------------------------------------------------------------------------------------- settings
def make_parser():
    def default(flag):
        return "[" + "; ".join(
            f"{task}: " + ", ".join(f"{name} {values[flag]}" for name, values in recipes.items())
            for task, recipes in RECIPES.items() if flag in recipes["paper"]) + "]"

    parser = data.Parser(description=__doc__)
    add, number = parser.add_argument, data.number
    add("--task", choices=list(RECIPES), default="seg", help="seg: segment nuclei; cls: classify phenotypes [seg]")
    add("--data", type=Path, help="data folder (see README) [the built-in synthetic set, made on first use]")
    add("--out", type=Path, help="the run's folder [runs/<name that tells the setting>; to resume: the newest]")
    add("--recipe", choices=["paper", "short"], help="the optimizer, its schedule, of cls the augmentation, and "
        "defaults of the next flags [paper; without --data short, made shorter]")
    add("--epochs", type=number(int, 1), help=default("epochs"))
    add("--batch-size", type=number(int, 1), help=f"tiles or pictures a step {default('batch_size')}")
    add("--lr", type=number(float, 1e-12), help=f"largest learning rate {default('lr')}")
    add("--weight-decay", type=number(float, 0), help=f"of short: decoupled {default('weight_decay')}")
    add("--patience", type=number(int, 0), help="stop after so many epochs without a better validation IoU or F1; "
        f"0: never {default('patience')}")
    add("--class-weights", type=class_weights, metavar="auto|equal|published|W0,W1,...", help="of the classes in the "
        "loss; auto: by how frequent they are in training; published: the paper's; or numbers: background,nucleus for "
        f"seg, the classes in alphabetical order for cls {default('class_weights')}")
    add("--seed", type=data.SEED, default=77, help="[77]")
    add("--workers", type=number(int, 0), help="loader processes [0 on a CPU, else up to 4]")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="[auto]")
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="mixed precision [auto]")
    add("--compile", action="store_true", help="compile the network with torch.compile; each epoch then leaves "
        "out the tiles or pictures that fill no whole batch")
    add("--weights", default="auto", metavar="auto|imagenet|none|FILE", help="the first weights of the encoder or the "
        "classifier; auto: ImageNet's if they can be had, else random ones [auto]")
    add("--limit-train", type=number(int, 1), metavar="N", help="use N training images, drawn by --seed")
    add("--resume", action="store_true", help="go on from the run's last.pt, with the settings it was started with")
    add = parser.add_argument_group("--task seg").add_argument
    add("--arch", choices=list(models.DECODERS), default="unet", help="[unet]")
    add("--encoder", default="resnet18", metavar="TIMM_NAME", help="[resnet18]")
    add("--depth", type=int, choices=[2, 3, 4, 5], default=3, help="encoder stages; deeper sees farther around [3]")
    add("--app", choices=["conv", "linear", "none"], default="conv", help="autoencoder post-processing loss [conv]")
    add("--app-activation", choices=list(dedl.ACTIVATIONS), default="gelu", help="[gelu]")
    add("--app-weight", type=number(float, 0), default=1.0, help="factor of APP's penalty [1]")
    add("--tile", type=number(int, 16), help=f"side of a tile in pixels {default('tile')}")
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


def parse_args(argv=None):
    """The settings of a run; with --resume those it was started with. Ends the program where they make no sense."""
    parser = make_parser()
    args = parser.parse_args(argv)
    saved = None
    if args.resume:
        args.out = args.out or runs.newest_run("config.json")
        saved = runs.read_config(args.out)
        parser.set_defaults(**{name: saved[name] for name in vars(args) if name in saved and name not in PLACE})
        args = parser.parse_args(argv, argparse.Namespace(out=args.out))
    for name in ONLY["cls" if args.task == "seg" else "seg"]:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"argument --{name.replace('_', '-')}: is not for --task {args.task}")
        delattr(args, name)
    recipes = RECIPES[args.task]
    defaults = recipes[args.recipe] if args.recipe else recipes["paper"] if args.data else recipes["synthetic"]
    args.recipe = args.recipe or ("paper" if args.data else "short")
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.data:
        args.data = args.data.resolve()
    if saved:
        refuse_other_settings(args, saved, (*PLACE, "epochs", "patience"))
    if args.task == "seg" and args.tile < 2 ** (args.depth + 1):
        parser.error(f"argument --tile: {args.tile} is too small for depth {args.depth}; take {2 ** (args.depth + 1)}")
    if args.task == "cls" and args.fold is not None and args.fold >= args.folds:
        parser.error(f"argument --fold: {args.fold} is not one of the {args.folds} folds, 0 to {args.folds - 1}")
    return args


def refuse_other_settings(args, saved, may_change=PLACE):
    """Raises RunError if the run in args.out was started with other settings, `saved`, than `args`."""
    for name, value in vars(args).items():
        was = saved.get(name)
        if name not in may_change and was != (str(value) if isinstance(value, Path) else value):
            raise runs.RunError(f"argument --{name.replace('_', '-')}: {args.out} was started with {was}, not {value}")


def class_weights(text):
    """The type of --class-weights: auto, equal, published or a list of numbers."""
    if text in ("auto", "equal", "published"):
        return text
    return [data.number(float, 1e-12)(value) for value in text.split(",")]


class_weights.__name__ = "auto|equal|published|W0,W1,..."  # argparse shows it: invalid ... value


# --------------------------------------------------------------------------------------------------------- segmentation
def train_segmentation(args, compute):
    # 1. folder of the run, data
    name = f"seg-{args.data.name}-{args.arch}-{args.encoder}-app_{args.app}-seed{args.seed}"
    args.out = out = args.out if args.resume else runs.new_run(args.out, name)
    records, said = data.find_records(args.data, args.seed)
    print(*said, sep="\n")
    train_fields, val_fields = load_splits(records, args)
    weights_of_classes = segmentation_weights(args.class_weights, train_fields)
    crops = data.Crops(train_fields, args.tile, args.seed)

    # 2. network, APP, optimizer
    torch.manual_seed(args.seed)
    setting = dict(arch=args.arch, encoder=args.encoder, in_channels=len(train_fields[0].image), classes=2,
                   depth=args.depth, decoder_channels=list(models.default_decoder_channels(args.depth)))
    resumes = args.resume and (out / "last.pt").is_file()  # not if it was interrupted in its first epoch
    model = models.build_segmenter(**setting, weights="none" if resumes else args.weights)
    weights_used = runs.read_config(out)["weights_used"] if resumes else model.weights_used
    model = model.to(compute.device, memory_format=torch.channels_last)
    app = dedl.build_app(args.app, args.tile, activation=args.app_activation)
    app = app.to(compute.device) if app else None
    optimizer = make_optimizer([*model.parameters(), *(app.parameters() if app else ())], args, compute)
    parts = {"model": model, "optimizer": optimizer, "scaler": compute.scaler(), **({"app": app} if app else {})}

    # 3. where the run stands
    state = resume(out, parts) if resumes else dict(START)
    out.mkdir(parents=True, exist_ok=True)
    config = save_config(args, compute, model, setting=setting, weights_used=weights_used,
                         class_weights_used=weights_of_classes, channels=train_fields[0].channels,
                         images={split: sum(r.split == split for r in records) for split in data.SPLITS},
                         train_images_used=len(train_fields))
    if args.compile:
        model.compile()
    print(f"{out}: {args.arch}/{args.encoder}, {config['parameters'] / 1e6:.2f} M parameters, APP {args.app}, "
          f"{len(train_fields)} training and {len(val_fields)} validation images, {len(crops)} tiles of {args.tile} an "
          f"epoch, {compute.device}, {config['amp']}", flush=True)

    # 4. the loop
    weight = torch.tensor(weights_of_classes, device=compute.device)

    def losses_of(logits, truth):
        """The loss that is minimised; cross-entropy and penalty, to be shown."""
        cross_entropy = F.cross_entropy(logits, truth, weight)
        if not app:
            return cross_entropy, cross_entropy, torch.zeros_like(cross_entropy)
        penalty, own = app(logits, truth, weight)
        return cross_entropy + args.app_weight * penalty + own, cross_entropy, penalty

    while unfinished(state, args):
        started = time.perf_counter()
        loader = make_loader(crops, args, compute, state["epoch"] + 1)
        (train_loss, penalty), speed = train_epoch(parts, loader, losses_of, compute, state["epoch"] + 1, args)
        counts, val_loss, masks = runs.evaluate(model, val_fields, compute, weight)
        # best.pt: the network and what rebuilds it, nothing of its training: with or without APP it is the same
        state = end_epoch(out, state, parts, {"setting": setting, "model": model.state_dict()}, started, speed,
                          train_loss, val_loss, {"val_iou": dedl.segmentation_scores(counts)["iou"]},
                          {"app_penalty": penalty})
        pictures.save_samples(val_fields, masks, out / "samples.png")
    print(f"done: best validation IoU {state['best']:.4f}; now: python test.py {out}")


def load_splits(records, args):
    """Training and validation fields, read. Raises RunError where there are none."""
    train, validation = ([record for record in records if record.split == split] for split in ("train", "validation"))
    train = limit(train, args)
    for split, found in (("train", train), ("validation", validation)):
        if not found:
            raise runs.RunError(f"--data: {args.data} has no images of split {split}; training needs some")
    fields = data.read_fields(train + validation, data.channel_names(args.channel), "training and validation images")
    return fields[:len(train)], fields[len(train):]


def segmentation_weights(wish, fields):
    """[background, nucleus] for the value of --class-weights. Raises RunError where auto has but one class to weigh."""
    if wish in ("equal", "published"):
        return list(dedl.PUBLISHED_CLASS_WEIGHTS) if wish == "published" else [1.0, 1.0]
    if wish != "auto":
        if len(wish) != 2:
            raise runs.RunError(f"argument --class-weights: has {len(wish)} numbers; give background,nucleus")
        return wish
    share = sum(int(f.mask.sum()) for f in fields) / sum(f.mask.numel() for f in fields)
    try:
        return list(dedl.balanced_class_weights(share))
    except ValueError as error:
        raise runs.RunError(f"--class-weights auto: {error}; check the masks, or give W0,W1") from error


# ------------------------------------------------------------------------------------------------------- classification
def train_classification(args, compute):
    # 1. folder of the run, data
    name = f"cls-{args.data.name}-{args.model}-seed{args.seed}"
    args.out = out = args.out if args.resume else runs.new_run(args.out, name, args.fold)
    begun = runs.read_config(out) if (out / "config.json").is_file() else None
    if begun and not args.resume:  # one more fold of a run that is there
        refuse_other_settings(args, begun)
    records, said = data.find_records(args.data, args.seed, task="cls", needs_validation=args.folds == 1)
    print(*said, sep="\n")
    classes, images = data.class_names(records), {s: sum(r.split == s for r in records) for s in data.SPLITS}
    if begun and (begun["classes"], begun["images"]) != (classes, images):
        raise runs.RunError(f"{args.data / 'classification.csv'}: its classes or numbers of images are not those that "
                            f"{out} was started with; train a new run")
    known, folds = choose_folds(records, classes, args)
    labelled = data.read_labelled(known, classes, args.image_size, models.interpolation(args.model), "training images")

    # 2. fold by fold
    setting = dict(model=args.model, classes=len(classes), image_size=args.image_size)
    weights = begun["weights_used"] if begun else args.weights
    chosen = list(range(args.folds)) if args.fold is None else [args.fold]
    if begun and args.fold is None and begun["fold"] is not None:  # begun fold by fold: go on with those that are there
        chosen = [fold for fold in chosen if (out / f"fold{fold}").is_dir()]
    scores = []
    for fold in chosen:
        if not args.resume and (out / f"fold{fold}").exists():
            print(f"{out}, fold {fold}: another process has begun it by now; it is left to it")
            continue
        train, validation = folds[fold]
        torch.manual_seed(args.seed * 1000 + fold)
        resumes = args.resume and (out / f"fold{fold}" / "last.pt").is_file()
        model = models.build_classifier(**setting, weights="none" if resumes else weights)
        if not begun:
            weights = model.weights_used  # decided once, not by a try to download in each fold
        weights_of_classes = classification_weights(args.class_weights, classes, labelled.truth[train])
        (out / f"fold{fold}").mkdir(parents=True, exist_ok=True)
        config = save_config(args, compute, model, setting=setting, weights_used=weights, classes=classes,
                             images=images, train_images_used=len(known) if args.folds > 1 else len(train),
                             **({"fold": begun["fold"]} if begun else {}))
        print(f"{out}, fold {fold}: {args.model}, {config['parameters'] / 1e6:.2f} M parameters, {len(train)} training "
              f"and {len(validation)} validation images of {args.image_size}, {compute.device}, {config['amp']}; class "
              f"weights {', '.join(f'{n} {w:.2f}' for n, w in zip(classes, weights_of_classes))}", flush=True)
        best = {"setting": setting, "classes": classes, "weights_used": weights, "class_weights": weights_of_classes}
        scores.append(train_fold(out / f"fold{fold}", model, labelled, train, validation, best, compute, args, resumes))
    print(f"done: best validation micro-F1 {sum(scores) / max(1, len(scores)):.4f}, mean of {len(scores)} folds; now: "
          f"python test.py {out}")


def choose_folds(records, classes, args):
    """The records that training sees, and of each fold the indices among them that train and that validate.

    Without a cross-validation (--folds 1) the only fold validates on the validation rows; else these rows are left for
    test.py --split validation. Prints what stands out; raises RunError where there is nothing to learn.
    """
    train, validation = ([record for record in records if record.split == split] for split in ("train", "validation"))
    train = limit(train, args)
    if not train or (args.folds == 1 and not validation):
        raise runs.RunError(f"--data: {args.data} has no images of split {'validation' if train else 'train'}; "
                            f"training needs some")
    if len({frozenset(record.labels) for record in train}) == 1:
        what = f"the same label, {';'.join(train[0].labels)}" if train[0].labels else "no label"
        raise runs.RunError(f"--data: all {len(train)} training images have {what}; there is nothing to tell apart")
    for name in classes:
        counts = {split: sum(name in r.labels for r in rows) for split, rows in
                  (("train", train), *((s, [r for r in records if r.split == s]) for s in ("validation", "test")))}
        print(f"  {name}: " + ", ".join(f"{count} {split}" for split, count in counts.items())
              + ("  NOTE: without a training image it cannot be learnt and counts as missed" if not counts["train"]
                 else ""))
    unlabelled = sum(not record.labels for record in train)
    if unlabelled:
        print(f"  NOTE: {unlabelled} training images have no label: they are taken as of none of the classes")
    if args.folds == 1:
        return train + validation, [(np.arange(len(train)), len(train) + np.arange(len(validation)))]
    folds = data.make_folds(train, args.folds, args.seed)
    everyone = np.arange(len(train))
    return train, [(np.setdiff1d(everyone, fold), np.array(fold)) for fold in folds]


def classification_weights(wish, classes, truth):
    """A weight a class for the value of --class-weights. truth: labels of the training images (N, classes)."""
    if wish == "auto":
        return dedl.inverse_frequency_weights(truth.sum(0).tolist())
    if wish == "equal":
        return [1.0] * len(classes)
    if wish == "published":
        if set(classes) != set(dedl.PUBLISHED_PHENOTYPE_WEIGHTS):
            raise runs.RunError(f"--class-weights published: are those of {', '.join(dedl.PUBLISHED_PHENOTYPE_WEIGHTS)}"
                                f"; the classes here are {', '.join(classes)}")
        return [dedl.PUBLISHED_PHENOTYPE_WEIGHTS[name] for name in classes]
    if len(wish) != len(classes):
        raise runs.RunError(f"argument --class-weights: has {len(wish)} numbers; give one for each of "
                            f"{', '.join(classes)}")
    return wish


def train_fold(out, model, labelled, train, validation, best, compute, args, resumes):
    """Trains one fold into its folder: `train` and `validation` are its indices in `labelled`, `best` is what best.pt
    holds beside the network. Returns its best validation micro-F1."""
    # 1. network, optimizer, where the fold stands
    model = model.to(compute.device, memory_format=torch.channels_last)
    average = swa_utils.AveragedModel(model) if args.swa else None
    parts = {"model": model, "optimizer": make_optimizer(model.parameters(), args, compute),
             "scaler": compute.scaler(), **({"average": average} if args.swa else {})}
    state = resume(out, parts) if resumes else dict(START)
    focal = dedl.FocalLoss(gamma=args.gamma, class_weights=best["class_weights"]).to(compute.device)
    augmented = data.AugmentedPictures(labelled, train, args.seed, data.AUGMENTATIONS[args.recipe])
    val_records, val_truth = [labelled.records[i] for i in validation], labelled.truth[validation]
    classes = labelled.classes
    if args.compile:
        model.compile()

    def losses_of(logits, truth):
        loss = focal(logits, truth)
        return loss, loss

    # 2. the loop
    while unfinished(state, args):
        started = time.perf_counter()
        # a last batch of one picture has no variance for BatchNorm to learn from
        loader = make_loader(augmented, args, compute, state["epoch"] + 1,
                             drop_last=len(train) > args.batch_size and len(train) % args.batch_size == 1)
        (train_loss,), speed = train_epoch(parts, loader, losses_of, compute, state["epoch"] + 1, args)
        network = model
        if averages(state["epoch"], args):  # from here on the average is what is validated and kept
            if not averages(state["epoch"] - 1, args):  # the first of them
                average.n_averaged.zero_()
                state = {**state, "best": START["best"], "stale": 0}
            average.update_parameters(model)
            with compute.autocast():
                swa_utils.update_bn(tqdm(loader, "BatchNorm", leave=False, disable=None), average, compute.device)
            network = average.module
        logits = runs.classify(network, labelled.pictures, compute, validation)
        probabilities = logits.sigmoid()
        scores = dedl.classification_scores(probabilities > 0.5, val_truth, classes)
        val_loss = focal(logits.to(compute.device), val_truth.to(compute.device).float()).item()
        if is_better(state, scores["f1_micro"], val_loss):  # before best.pt: an interruption in between is made up for
            runs.save_probabilities(out / "validation.csv", val_records, classes, probabilities, with_labels=True)
            pictures.save_labels(val_records, probabilities.numpy(), val_truth.numpy(), classes, out / "samples.png")
        state = end_epoch(out, state, parts, {**best, "model": network.state_dict()}, started, speed, train_loss,
                          val_loss, {"val_f1_micro": scores["f1_micro"]}, {"val_f1_macro": scores["f1_macro"]})
    return state["best"]


def averages(epoch, args):
    """Whether --swa averages the weights after the epoch that begins at `epoch`, counted from 0."""
    return args.task == "cls" and args.swa and epoch >= args.epochs - max(1, round(SWA_SHARE * args.epochs))


# --------------------------------------------------------------------------------------------- shared by both trainings
START = {"epoch": 0, "best": -1.0, "best_loss": math.inf, "stale": 0}  # of the loop; stale: epochs since the best one


def choose_compute(args):
    """The device and precision; sets args.workers where it is not given."""
    compute = runs.choose_compute(args.device, args.amp)
    if args.workers is None:  # on a CPU, loader processes would take the cores from the network
        args.workers = 0 if compute.device.type == "cpu" else min(4, os.cpu_count())
    return compute


def limit(records, args):
    """The training records that --limit-train leaves, drawn by --seed."""
    if not args.limit_train:
        return records
    order = np.random.default_rng(args.seed).permutation(len(records))[:args.limit_train]
    return [records[i] for i in sorted(order)]


def save_config(args, compute, model, **found):
    """Writes config.json: the settings and what they led to. Returns it as dict."""
    config = {**{k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}, **found,
              "device": str(compute.device), "amp": str(compute.amp_dtype or torch.float32).removeprefix("torch."),
              "parameters": sum(p.numel() for p in model.parameters()),
              "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__,
                           "numpy": np.__version__}, "threads": torch.get_num_threads(), "machine": platform.machine()}
    runs.save_json(config, args.out / "config.json")
    return config


def make_optimizer(parameters, args, compute):
    adam = torch.optim.Adam if args.recipe == "paper" else torch.optim.AdamW
    return adam(parameters, lr=args.lr, weight_decay=args.weight_decay, fused=compute.device.type != "mps")


def make_loader(dataset, args, compute, epoch, drop_last=False):
    """Batches of one epoch, in an order drawn from (seed, epoch). drop_last: without a smaller one at the end."""
    dataset.epoch = epoch
    drop_last = drop_last or (args.compile and len(dataset) > args.batch_size)  # another size would be compiled anew
    return DataLoader(dataset, args.batch_size, shuffle=True, num_workers=args.workers, drop_last=drop_last,
                      pin_memory=compute.device.type == "cuda",
                      generator=torch.Generator().manual_seed(args.seed * 1_000_003 + epoch))


def unfinished(state, args):
    stopped = args.patience and state["stale"] >= args.patience
    if args.task == "cls" and args.swa and not averages(state["epoch"] - 1, args):
        stopped = False  # there is no average yet
    return state["epoch"] < args.epochs and not stopped


def train_epoch(parts, loader, losses_of, compute, epoch, args):
    """One pass over the loader. losses_of(logits, truth) gives the loss that is minimised and the losses to be shown.
    Returns the means of the latter and the speed in images/s. Raises RunError if a loss is not finite."""
    model, optimizer, scaler = parts["model"].train(), parts["optimizer"], parts["scaler"]
    sums, seen = 0, 0  # summed on the device: reading them waits for it
    started = time.perf_counter()
    bar = tqdm(loader, f"epoch {epoch}", unit="batch", leave=False, disable=None)
    for step, (images, truth) in enumerate(bar):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, epoch - 1 + step / len(loader))
        images, truth = compute.batch(images), truth.to(compute.device, non_blocking=True)
        try:
            with compute.autocast():
                logits = model(images).float()                      # (N, 2, tile, tile) or (N, classes)
                loss, *shown = losses_of(logits, truth)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise runs.RunError(f"--batch-size {args.batch_size}: a batch of {len(images)} has no variance for "
                                f"BatchNorm; take larger batches, or more images") from error
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        sums = sums + torch.stack(shown).detach() * len(images)
        seen += len(images)
        if step % 10 == 0 and not bar.disable:
            speed = seen / (time.perf_counter() - started)
            bar.set_postfix_str(f"loss {sums[0].item() / seen:.4f}, {speed:.1f} images/s")
    means = (sums / seen).tolist()
    if not math.isfinite(sum(means)):
        raise runs.RunError(f"the loss is no longer finite in epoch {epoch}; lower --lr, or use --amp off")
    return means, seen / (time.perf_counter() - started)


def learning_rate(args, epoch):
    """paper: a cosine, set once an epoch: seg from lr to 0.944 lr (3.4e-4 for 3.6e-4) over 50 epochs, cls from lr to
    lr / 300 (1e-6 for 3e-4) and back over 16 and 16. short: one cycle, up in the first fifth of the run, then cosine to
    0, set at each step. While --swa averages: constant. `epoch` counts from 0, with its fraction."""
    if averages(int(epoch), args):
        return args.lr * SWA_RATE
    if args.recipe == "paper":
        low, period = (args.lr * 3.4 / 3.6, 50) if args.task == "seg" else (args.lr / 300, 16)
        done = min(1, int(epoch) / period) if args.task == "seg" else int(epoch) / period
        return low + (args.lr - low) * (1 + math.cos(math.pi * done)) / 2
    done = epoch / args.epochs
    return args.lr * (done + 0.01) / 0.21 if done < 0.2 else args.lr * (1 + math.cos(math.pi * (done - 0.2) / 0.8)) / 2


def is_better(state, value, val_loss):
    """Whether an epoch is the best so far; of equal scores the lower validation loss decides."""
    return (value, -val_loss) > (state["best"], -state["best_loss"])


def end_epoch(out, state, parts, best, started, speed, train_loss, val_loss, score, more):
    """Saves what an epoch leaves: best.pt where it is the best so far, last.pt, a row of metrics.csv. score:
    {name: value}, more: further columns. Returns the new state."""
    (name, value), = score.items()
    better = is_better(state, value, val_loss)
    state = {**state, "epoch": state["epoch"] + 1, "stale": 0 if better else state["stale"] + 1}
    if better:
        state.update(best=value, best_loss=val_loss)
        runs.save_checkpoint({**best, "epoch": state["epoch"], **score}, out / "best.pt")
    runs.save_checkpoint({**{part: object.state_dict() for part, object in parts.items()}, "state": state,
                          "rng": torch.get_rng_state()}, out / "last.pt")
    seconds, lr = time.perf_counter() - started, parts["optimizer"].param_groups[0]["lr"]
    add_row(out / "metrics.csv", {"epoch": state["epoch"], "train_loss": train_loss, "val_loss": val_loss, **score,
                                  "lr": lr, "seconds": seconds, **more})
    print(f"epoch {state['epoch']:3d}  train loss {train_loss:.4f}  val loss {val_loss:.4f}  {name} {value:.4f}"
          f"{' *' if better else '  '}  {speed:.1f} images/s  {seconds:.0f} s", flush=True)
    return state


def resume(out, parts):
    """Puts everything where last.pt left it; returns the state of the loop."""
    last = runs.load_checkpoint(out / "last.pt", *parts, "state", "rng")
    try:
        for name, part in parts.items():
            if name != "scaler":
                part.load_state_dict(last[name])
    except (RuntimeError, ValueError) as error:
        raise runs.RunError(f"{out / 'last.pt'}: does not fit the settings in config.json beside it") from error
    if last["scaler"] and parts["scaler"].is_enabled():  # only fp16 has a scale, and the precision may change
        parts["scaler"].load_state_dict(last["scaler"])
    torch.set_rng_state(last["rng"])
    print(f"{out}: going on after epoch {last['state']['epoch']}")
    return last["state"]


def add_row(file, row):
    new = not file.exists()
    with open(file, "a", newline="") as handle:
        writer = csv.DictWriter(handle, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    runs.command(main)
