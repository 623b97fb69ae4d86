"""Trains a model on a data folder, or on the built-in synthetic set.

    python train.py --task seg                          the synthetic set, a few minutes on two CPU cores
    python train.py --task seg --data DIR               your data, the paper's recipe
    python train.py --task seg --data DIR --recipe short --tile 256 --epochs 8
    python train.py --task seg --data DIR --resume      go on after an interruption
"""
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
import runs

# What a flag that is not given falls back to. paper: the published recipe. short: one cycle to a large learning rate,
# for short runs from random weights; the default on the synthetic set, whose fields are small.
RECIPES = {
    "paper": dict(lr=3.6e-4, weight_decay=1e-5, batch_size=16, epochs=50, patience=5, class_weights="auto", tile=480),
    "short": dict(lr=2e-3, weight_decay=1e-2, batch_size=8, epochs=6, patience=0, class_weights="1,1", tile=256),
}
SYNTHETIC = dict(tile=128, epochs=4)  # these small fields need no more
COLUMNS = ("epoch", "train_loss", "val_loss", "val_iou", "lr", "seconds", "app_penalty")


def main(argv=None):
    train_segmentation(parse_args(argv))


# ------------------------------------------------------------------------------------------------------------- settings
def parse_args(argv=None):
    parser = data.Parser(description=__doc__)
    add = parser.add_argument
    add("--task", choices=["seg"], default="seg", help="seg: segment nuclei [seg]")
    add("--data", type=Path, help="data folder (see README) [the built-in synthetic set, made on first use]")
    add("--out", type=Path, help="the run's folder [runs/<name that tells the setting>]")
    add("--recipe", choices=list(RECIPES), help="defaults of --lr --weight-decay --batch-size --epochs --patience "
        "--class-weights --tile and the schedule [paper; short without --data]")
    add("--epochs", type=positive(int), help="[paper 50, short 6; 4 on the synthetic set]")
    add("--batch-size", type=positive(int), help="tiles a step [paper 16, short 8]")
    add("--lr", type=positive(float), help="largest learning rate [paper 3.6e-4, short 2e-3]")
    add("--weight-decay", type=positive(float, zero=True), help="[paper 1e-5; short 1e-2, decoupled]")
    add("--patience", type=positive(int, zero=True),
        help="stop after so many epochs without a better validation IoU; 0: never [paper 5, short 0]")
    add("--seed", type=positive(int, zero=True), default=77, help="[77]")
    add("--workers", type=positive(int, zero=True), help="loader processes [0 on a CPU, else 4 or the cores there are]")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="[auto]")
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="mixed precision [auto]")
    add("--compile", action="store_true", help="compile the network with torch.compile")
    add("--weights", default="auto", metavar="auto|imagenet|none|FILE",
        help="the encoder's first weights; auto: ImageNet's if they can be had, else random ones [auto]")
    add("--limit-train", type=positive(int), metavar="N", help="use N training images, drawn by --seed")
    add("--resume", action="store_true", help="go on from the run's last.pt")
    add("--arch", choices=list(models.DECODERS), default="unet", help="[unet]")
    add("--encoder", default="resnet18", metavar="TIMM_NAME", help="[resnet18]")
    add("--depth", type=int, choices=[2, 3, 4, 5], default=3, help="encoder stages; deeper sees farther around [3]")
    add("--app", choices=["conv", "linear", "none"], default="conv", help="autoencoder post-processing loss [conv]")
    add("--app-activation", choices=list(dedl.ACTIVATIONS), default="gelu", help="[gelu]")
    add("--app-weight", type=positive(float, zero=True), default=1.0, help="factor of APP's penalty [1]")
    add("--tile", type=positive(int), help="side of a tile in pixels [paper 480, short 256; 128 on the synthetic set]")
    add("--channel", default="DAPI", help="page of a multi-page TIFF by name, or several: DAPI,CD4 [DAPI]")
    add("--class-weights", metavar="auto|published|W0,W1", help="of the cross-entropy's background and nucleus pixels; "
        "auto: by their share in training; published: 0.1479,0.8521 [paper auto, short 1,1]")
    args = parser.parse_args(argv)
    if args.recipe is None:
        args.recipe = "paper" if args.data else "short"
    for name, value in RECIPES[args.recipe].items():
        if getattr(args, name) is None:
            setattr(args, name, value if args.data else SYNTHETIC.get(name, value))
    if args.tile < 16:
        parser.error(f"argument --tile: {args.tile} is too small; 16 is the least")
    if args.class_weights not in ("auto", "published"):
        try:
            background, nucleus = map(positive(float), args.class_weights.split(","))
        except ValueError:
            parser.error(f"argument --class-weights: {args.class_weights!r} must be auto, published or two positive "
                         f"numbers W0,W1")
        args.class_weights = [background, nucleus]
    return args


def positive(kind, zero=False):
    """A type for argparse: a finite number over 0, or from 0 up."""
    def number(text):
        value = kind(text)
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            raise ValueError
        return value
    number.__name__ = f"{'non-negative' if zero else 'positive'} {kind.__name__}"  # argparse shows it
    return number


# --------------------------------------------------------------------------------------------------------- segmentation
def train_segmentation(args):
    # 1. device, folder of the run, data
    compute = runs.choose_compute(args.device, args.amp)
    if args.workers is None:  # on a CPU, loader processes would take the cores from the network
        args.workers = 0 if compute.device.type == "cpu" else min(4, os.cpu_count())
    folder = args.data or runs.synthetic_folder()
    name = f"seg-{folder.resolve().name}-{args.arch}-{args.encoder}-app_{args.app}-seed{args.seed}"
    out = runs.open_run(args.out, name, args.resume)
    records, said = data.find_records(folder, args.seed)
    print(*said, sep="\n")
    train_fields, val_fields = load_splits(records, args)
    class_weights = choose_class_weights(args.class_weights, train_fields)
    crops = data.Crops(train_fields, args.tile, args.seed)

    # 2. network, APP, optimizer
    torch.manual_seed(args.seed)
    setting = dict(arch=args.arch, encoder=args.encoder, in_channels=len(train_fields[0].image), classes=2,
                   depth=args.depth, decoder_channels=models.default_decoder_channels(args.depth))
    model = models.build_segmenter(**setting, weights=args.weights)
    weights_used = model.weights_used
    model = model.to(compute.device, memory_format=torch.channels_last)
    app = dedl.build_app(args.app, args.tile, activation=args.app_activation)
    app = app.to(compute.device) if app else None
    parameters = [*model.parameters(), *(app.parameters() if app else ())]
    adam = torch.optim.Adam if args.recipe == "paper" else torch.optim.AdamW
    optimizer = adam(parameters, lr=args.lr, weight_decay=args.weight_decay, fused=compute.device.type != "mps")
    scaler = compute.scaler()

    # 3. where the run stands
    state = {"epoch": 0, "best_iou": -1.0, "stale": 0}
    if args.resume:
        state = resume(out, setting, model, app, optimizer, scaler)
    config = {**{k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}, "data": str(folder.resolve()),
              "setting": setting, "class_weights": class_weights, "weights_used": weights_used,
              "channels": train_fields[0].channels, "device": str(compute.device), "amp": str(compute.amp_dtype),
              "images": {split: sum(r.split == split for r in records) for split in data.SPLITS},
              "train_images_used": len(train_fields), "parameters": sum(p.numel() for p in model.parameters()),
              "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__,
                           "numpy": np.__version__}, "threads": torch.get_num_threads(), "machine": platform.machine()}
    runs.write_config(config, out)
    if args.compile:
        model.compile()
    print(f"{out}: {args.arch}/{args.encoder}, {config['parameters'] / 1e6:.2f} M parameters, APP {args.app}, "
          f"{len(train_fields)} training and {len(val_fields)} validation images, {len(crops)} tiles of {args.tile} an "
          f"epoch, {compute.device}, {compute.amp_dtype or 'float32'}", flush=True)

    # 4. the loop
    weight = torch.tensor(class_weights, device=compute.device)
    while state["epoch"] < args.epochs and not (args.patience and state["stale"] >= args.patience):
        started = time.perf_counter()
        epoch = state["epoch"] + 1
        train_loss, penalty, speed = train_epoch(model, app, crops, optimizer, scaler, weight, compute, epoch, args)
        counts, val_loss, masks = runs.evaluate(model, val_fields, args.tile, args.batch_size, compute, weight)
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
        runs.save_samples(val_fields, masks, out / "samples.png")
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
    channels = data.channel_names(args.channel)
    train = [record for record in records if record.split == "train"]
    if args.limit_train:
        order = np.random.default_rng(args.seed).permutation(len(train))[:args.limit_train]
        train = [train[i] for i in sorted(order)]
    validation = [record for record in records if record.split == "validation"]
    fields = data.read_fields(train + validation, channels, "training and validation images")
    return fields[:len(train)], fields[len(train):]


def choose_class_weights(wish, fields):
    if wish == "published":
        return list(dedl.PUBLISHED_CLASS_WEIGHTS)
    if wish != "auto":
        return wish
    share = sum(int(f.mask.sum()) for f in fields) / sum(f.mask.numel() for f in fields)
    return list(dedl.balanced_class_weights(share))


def resume(out, setting, model, app, optimizer, scaler):
    last = runs.load_checkpoint(out / "last.pt")
    if last["setting"] != setting:
        differing = next(name for name in setting if setting[name] != last["setting"].get(name))
        raise runs.RunError(f"--resume: {out} was trained with {differing} {last['setting'].get(differing)}, "
                            f"not {setting[differing]}")
    model.load_state_dict(last["model"])
    try:
        if app:
            app.load_state_dict(last["app"])
        optimizer.load_state_dict(last["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise runs.RunError(f"--resume: {out} was trained with other --app, --app-activation or --tile") from error
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
