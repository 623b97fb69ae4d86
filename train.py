"""Trains a model on a data folder, or on the built-in synthetic set.

    python train.py --task seg                          the synthetic set, a few minutes on two CPU cores
    python train.py --task seg --data DIR               your data, the paper's recipe
    python train.py --task seg --data DIR --recipe short --depth 5
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
    "paper": dict(lr=3.6e-4, weight_decay=1e-5, batch_size=16, epochs=50, patience=5, class_weights="auto", tile=480),
    "short": dict(lr=2e-3, weight_decay=1e-2, batch_size=4, epochs=5, patience=0, class_weights=[1.0, 1.0], tile=256),
}
SYNTHETIC = {**RECIPES["short"], "batch_size": 8, "epochs": 3, "tile": 128}
COLUMNS = ("epoch", "train_loss", "val_loss", "val_iou", "lr", "seconds", "app_penalty")
MAY_CHANGE = ("out", "resume", "epochs", "patience", "workers", "device", "amp", "compile")  # when a run is resumed


def main(argv=None):
    train_segmentation(parse_args(argv))


# ------------------------------------------------------------------------------------------------------------- settings
def make_parser():
    def default(flag):
        return f"[paper {RECIPES['paper'][flag]}, short {RECIPES['short'][flag]}, synthetic {SYNTHETIC[flag]}]"

    parser = data.Parser(description=__doc__)
    add, number = parser.add_argument, data.number
    add("--task", choices=["seg"], default="seg", help="seg: segment nuclei [seg]")
    add("--data", type=Path, help="data folder (see README) [the built-in synthetic set, made on first use]")
    add("--out", type=Path, help="the run's folder [runs/<name that tells the setting>; to resume: the newest]")
    add("--recipe", choices=list(RECIPES), help="the optimizer, its schedule, and defaults of the next seven flags "
        "[paper; without --data short, made shorter]")
    add("--epochs", type=number(int, 1), help=default("epochs"))
    add("--batch-size", type=number(int, 1), help=f"tiles a step {default('batch_size')}")
    add("--lr", type=number(float, 1e-12), help=f"largest learning rate {default('lr')}")
    add("--weight-decay", type=number(float, 0), help=f"of short: decoupled {default('weight_decay')}")
    add("--patience", type=number(int, 0), help="stop after so many epochs without a better validation IoU; 0: never "
        + default("patience"))
    add("--class-weights", type=class_weights, metavar="auto|published|W0,W1", help="of background and nucleus in the "
        f"cross-entropy; auto: by their shares in training; published: 0.1479,0.8521 {default('class_weights')}")
    add("--tile", type=number(int, 16), help=f"side of a tile in pixels {default('tile')}")
    add("--seed", type=data.SEED, default=77, help="[77]")
    add("--workers", type=number(int, 0), help="loader processes [0 on a CPU, else up to 4]")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="[auto]")
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="mixed precision [auto]")
    add("--compile", action="store_true", help="compile the network with torch.compile")
    add("--weights", default="auto", metavar="auto|imagenet|none|FILE",
        help="the encoder's first weights; auto: ImageNet's if they can be had, else random ones [auto]")
    add("--limit-train", type=number(int, 1), metavar="N", help="use N training images, drawn by --seed")
    add("--resume", action="store_true", help="go on from the run's last.pt, with the settings it was started with")
    add("--arch", choices=list(models.DECODERS), default="unet", help="[unet]")
    add("--encoder", default="resnet18", metavar="TIMM_NAME", help="[resnet18]")
    add("--depth", type=int, choices=[2, 3, 4, 5], default=3, help="encoder stages; deeper sees farther around [3]")
    add("--app", choices=["conv", "linear", "none"], default="conv", help="autoencoder post-processing loss [conv]")
    add("--app-activation", choices=list(dedl.ACTIVATIONS), default="gelu", help="[gelu]")
    add("--app-weight", type=number(float, 0), default=1.0, help="factor of APP's penalty [1]")
    add("--channel", default="DAPI", help="page of a multi-page TIFF by name, or several: DAPI,CD4 [DAPI]")
    return parser


def parse_args(argv=None):
    """The settings of a run; with --resume those it was started with. Ends the program where they make no sense."""
    parser = make_parser()
    args = parser.parse_args(argv)
    saved = None
    if args.resume:
        args.out = args.out or runs.newest_run("last.pt")
        saved = runs.read_config(args.out)
        parser.set_defaults(**{name: saved[name] for name in vars(args) if name in saved and name not in
                               ("out", "resume", "workers", "device", "amp", "compile")})
        args = parser.parse_args(argv, argparse.Namespace(out=args.out))
    defaults = RECIPES[args.recipe] if args.recipe else RECIPES["paper"] if args.data else SYNTHETIC
    args.recipe = args.recipe or ("paper" if args.data else "short")
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.data:
        args.data = args.data.resolve()
    for name, value in vars(args).items():
        was = saved.get(name) if saved else None
        if saved and name not in MAY_CHANGE and was != (str(value) if isinstance(value, Path) else value):
            parser.error(f"argument --{name.replace('_', '-')}: {args.out} was started with {was}, not {value}")
    if args.tile < 2 ** (args.depth + 1):
        parser.error(f"argument --tile: {args.tile} is too small for depth {args.depth}; take {2 ** (args.depth + 1)}")
    return args


def class_weights(text):
    """The type of --class-weights: auto, published or [background, nucleus]."""
    if text in ("auto", "published"):
        return text
    background, nucleus = map(data.number(float, 1e-12), text.split(","))
    return [background, nucleus]


class_weights.__name__ = "auto|published|W0,W1"  # argparse shows it: invalid ... value


# --------------------------------------------------------------------------------------------------------- segmentation
def train_segmentation(args):
    # 1. device, folder of the run, data
    compute = runs.choose_compute(args.device, args.amp)
    if args.workers is None:  # on a CPU, loader processes would take the cores from the network
        args.workers = 0 if compute.device.type == "cpu" else min(4, os.cpu_count())
    folder = args.data or runs.synthetic_folder()
    name = f"seg-{folder.name}-{args.arch}-{args.encoder}-app_{args.app}-seed{args.seed}"
    out = args.out if args.resume else runs.new_run(args.out, name)
    records, said = data.find_records(folder, args.seed)
    print(*said, sep="\n")
    train_fields, val_fields = load_splits(records, args)
    weights_of_classes = choose_class_weights(args.class_weights, train_fields)
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
    parameters = [*model.parameters(), *(app.parameters() if app else ())]
    adam = torch.optim.Adam if args.recipe == "paper" else torch.optim.AdamW
    optimizer = adam(parameters, lr=args.lr, weight_decay=args.weight_decay, fused=compute.device.type != "mps")
    scaler = compute.scaler()

    # 3. where the run stands
    state = {"epoch": 0, "best_iou": -1.0, "stale": 0}
    if resumes:
        state = resume(out, setting, model, app, optimizer, scaler)
    config = {**{k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}, "data": str(folder),
              "setting": setting, "class_weights_used": weights_of_classes, "weights_used": weights_used,
              "channels": train_fields[0].channels, "device": str(compute.device),
              "amp": str(compute.amp_dtype or torch.float32).removeprefix("torch."),
              "images": {split: sum(r.split == split for r in records) for split in data.SPLITS},
              "train_images_used": len(train_fields), "parameters": sum(p.numel() for p in model.parameters()),
              "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__,
                           "numpy": np.__version__}, "threads": torch.get_num_threads(), "machine": platform.machine()}
    out.mkdir(parents=True, exist_ok=True)
    runs.save_json(config, out / "config.json")
    if args.compile:
        model.compile()
    print(f"{out}: {args.arch}/{args.encoder}, {config['parameters'] / 1e6:.2f} M parameters, APP {args.app}, "
          f"{len(train_fields)} training and {len(val_fields)} validation images, {len(crops)} tiles of {args.tile} an "
          f"epoch, {compute.device}, {config['amp']}", flush=True)

    # 4. the loop
    weight = torch.tensor(weights_of_classes, device=compute.device)
    while state["epoch"] < args.epochs and not (args.patience and state["stale"] >= args.patience):
        started = time.perf_counter()
        epoch = state["epoch"] + 1
        train_loss, penalty, speed = train_epoch(model, app, crops, optimizer, scaler, weight, compute, epoch, args)
        counts, val_loss, masks = runs.evaluate(model, val_fields, compute, weight)
        iou = dedl.segmentation_scores(counts)["iou"]
        better = iou > state["best_iou"]
        state = {"epoch": epoch, "best_iou": iou if better else state["best_iou"],
                 "stale": 0 if better else state["stale"] + 1}
        if better:  # the network and what rebuilds it, nothing of its training: with or without APP it is the same
            runs.save_checkpoint({"setting": setting, "model": model.state_dict(), "epoch": epoch, "val_iou": iou},
                                 out / "best.pt")
        runs.save_checkpoint({"setting": setting, "model": model.state_dict(), "app": app.state_dict() if app else {},
                              "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "state": state,
                              "rng": torch.get_rng_state()}, out / "last.pt")
        pictures.save_samples(val_fields, masks, out / "samples.png")
        seconds = time.perf_counter() - started
        lr = optimizer.param_groups[0]["lr"]
        add_row(out / "metrics.csv", dict(zip(COLUMNS, (epoch, train_loss, val_loss, iou, lr, seconds, penalty))))
        print(f"epoch {epoch:3d}  train loss {train_loss:.4f}  val loss {val_loss:.4f}  val IoU {iou:.4f}"
              f"{' *' if better else '  '}  {speed:.1f} images/s  {seconds:.0f} s", flush=True)
    print(f"done: best validation IoU {state['best_iou']:.4f}; now: python test.py {out}")


def train_epoch(model, app, crops, optimizer, scaler, weight, compute, epoch, args):
    """One pass over the crops. Returns the mean cross-entropy, APP's mean penalty and the speed in images/s."""
    model.train()
    crops.epoch = epoch
    loader = DataLoader(crops, args.batch_size, shuffle=True, num_workers=args.workers,
                        pin_memory=compute.device.type == "cuda",
                        generator=torch.Generator().manual_seed(args.seed * 1_000_003 + epoch))
    losses, penalties = torch.zeros(2, device=compute.device)  # summed there: reading them waits for the device
    started, seen = time.perf_counter(), 0
    bar = tqdm(loader, f"epoch {epoch}", unit="batch", leave=False, disable=None)
    for step, (images, truth) in enumerate(bar):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, epoch - 1 + step / len(loader))
        images, truth = compute.batch(images), truth.to(compute.device, non_blocking=True)
        with compute.autocast():
            logits = model(images).float()                                              # (N, 2, tile, tile)
            loss = F.cross_entropy(logits, truth, weight)
            losses += loss.detach() * len(images)
            if app:
                penalty, own = app(logits, truth, weight)
                loss = loss + args.app_weight * penalty + own
                penalties += penalty.detach() * len(images)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        seen += len(images)
        if step % 10 == 0 and not bar.disable:
            speed = seen / (time.perf_counter() - started)
            bar.set_postfix_str(f"loss {losses.item() / seen:.4f}, {speed:.1f} images/s")
    if not math.isfinite(losses.item()):
        raise runs.RunError(f"the loss is no longer finite in epoch {epoch}; lower --lr, or use --amp off")
    return losses.item() / seen, penalties.item() / seen, seen / (time.perf_counter() - started)


def learning_rate(args, epoch):
    """paper: cosine from lr to 0.944 lr (3.4e-4 for 3.6e-4) over 50 epochs, set once an epoch. short: one cycle, up in
    the first fifth of the run, then cosine to 0, set at each step. `epoch` counts from 0, with its fraction."""
    if args.recipe == "paper":
        low = args.lr * 3.4 / 3.6
        return low + (args.lr - low) * (1 + math.cos(math.pi * min(1, int(epoch) / 50))) / 2
    done = epoch / args.epochs
    return args.lr * (done + 0.01) / 0.21 if done < 0.2 else args.lr * (1 + math.cos(math.pi * (done - 0.2) / 0.8)) / 2


def load_splits(records, args):
    """Training and validation fields, read. Raises RunError where there are none."""
    train, validation = ([record for record in records if record.split == split] for split in ("train", "validation"))
    if args.limit_train:
        order = np.random.default_rng(args.seed).permutation(len(train))[:args.limit_train]
        train = [train[i] for i in sorted(order)]
    for split, found in (("train", train), ("validation", validation)):
        if not found:
            raise runs.RunError(f"--data: {args.data} has no images of split {split}; training needs some")
    fields = data.read_fields(train + validation, data.channel_names(args.channel), "training and validation images")
    return fields[:len(train)], fields[len(train):]


def choose_class_weights(wish, fields):
    """[background, nucleus] for the value of --class-weights. Raises RunError where auto has but one class to weigh."""
    if wish == "published":
        return list(dedl.PUBLISHED_CLASS_WEIGHTS)
    if wish != "auto":
        return wish
    share = sum(int(f.mask.sum()) for f in fields) / sum(f.mask.numel() for f in fields)
    try:
        return list(dedl.balanced_class_weights(share))
    except ValueError as error:
        raise runs.RunError(f"--class-weights auto: {error}; check the masks, or give W0,W1") from error


def resume(out, setting, model, app, optimizer, scaler):
    """Puts everything where last.pt left it; returns the state of the loop."""
    last = runs.load_checkpoint(out / "last.pt", "setting", "model", "app", "optimizer", "scaler", "state", "rng")
    try:
        model.load_state_dict(last["model"])
        if app:
            app.load_state_dict(last["app"])
        optimizer.load_state_dict(last["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise runs.RunError(f"{out / 'last.pt'}: does not fit the settings in config.json beside it") from error
    if last["scaler"] and scaler.is_enabled():  # only fp16 has a scale, and the precision may change
        scaler.load_state_dict(last["scaler"])
    torch.set_rng_state(last["rng"])
    print(f"going on after epoch {last['state']['epoch']}")
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
