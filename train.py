"""Trains a model on a data folder, or on the built-in synthetic set.

    python train.py --task seg                          the synthetic set, a minute on two CPU cores
    python train.py --task seg --data DIR               your data
    python train.py --task seg --data DIR --recipe paper
    python train.py --task cls --data DIR               phenotypes, several an image, in a cross-validation of 6 folds
    python train.py --task cls --data DIR --fold 2      one of these folds alone
    python train.py --resume                            go on with the newest run after an interruption
    torchrun --nproc-per-node 4 train.py ...            the same job on 4 devices, which share each batch
"""
import math
import os
import platform
import time
from collections import Counter
from datetime import timedelta
from functools import partial

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch.optim import swa_utils
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

import data
import dedl
import models
from images import manifests, reading
from networks import encoders, fast
from running import figures, nuclei, prediction, process, runs
from running.compute import choose_compute
from running.muon import Muon
from running.process import InputError, note, progress
from running.settings import digest, how_to_go_on, parse_args, refuse_other_data, refuse_other_settings

DECAY = 0.99  # of the average of the weights, a step
LESS_MEMORY = "lower --batch-size, then --tile or --image-size; or take a smaller --encoder or --model, " \
              "or --amp bf16"
# of the loop; stale: epochs since the best one, history: the rows of metrics.csv, later: folds to come. The learning
# rate, the batches, the augmentation and what else is drawn follow from epoch and seed: that is all to go on with.
START = {"epoch": 0, "best": -1.0, "best_loss": math.inf, "stale": 0, "history": []}


def main(argv: list | None = None) -> None:
    args = parse_args(argv, __doc__)
    process.join(args.device)
    compute = choose_compute(args.device, args.amp)
    if args.batch_size < process.world():
        raise InputError(f"--batch-size {args.batch_size}: a batch is shared by the {process.world()} processes; give "
                         f"at least as many, for BatchNorm better several times as many")
    if args.workers is None:  # on a CPU, loader processes would take the cores from the network
        args.workers = 0 if compute.device.type == "cpu" else min(4, os.cpu_count())
    try:
        args.data = args.data or process.from_first(runs.synthetic_folder)
        (train_segmentation if args.task == "seg" else train_classification)(args, compute)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(how_to_go_on(args)) from None


# --------------------------------------------------------------------------------------------------------- segmentation
def train_segmentation(args, compute):
    name = f"seg-{args.data.name}-{args.arch}-{args.encoder}-app_{args.app}-seed{args.seed}"
    records, found = find_run(args, name)
    known, folds = choose_folds(records, args)
    fields = data.read_fields(known, reading.channel_names(args.channel), "training and validation images")
    note(manifests.inverted_masks(fields))
    training = [field for field in fields if field.record.split == "train"]
    classes = choose_classes(args.nuclei, training)
    setting = {
        "arch": args.arch,
        "encoder": args.encoder,
        "in_channels": len(fields[0].image),
        "classes": classes,
        "depth": args.depth,
        "decoder_channels": list(models.default_decoder_channels(args.depth)),
    }
    usual = nuclei.describe(training)
    found |= {"setting": setting, "channels": fields[0].channels, "train_images_used": len(training), "nucleus": usual}
    score = "val_mean_image_iou"  # by which the best epoch is chosen: the pooled IoU hangs on few images, AP on chance

    # 2. fold by fold; without a cross-validation there is one
    best = []
    for number, (train, validation) in folds.items():
        own = [fields[i] for i in train]
        val_fields = [fields[i] for i in validation]
        class_weights = segmentation_weights(args.class_weights, own, classes)
        tiles = data.Crops(own, args.tile, args.seed, args.recipe, classes=classes)
        tiles_an_epoch = args.steps * args.batch_size or len(tiles)
        tiles.passes = math.ceil(tiles_an_epoch / len(tiles))
        found |= {"fold": number, "class_weights_used": class_weights}
        losses = partial(segmentation_losses, torch.tensor(class_weights, device=compute.device), args)
        validate = partial(validate_fields, val_fields, class_weights, usual, compute)
        text = (f"{args.arch}/{args.encoder}, APP {args.app}, {classes} classes, {len(own)} training and "
                f"{len(val_fields)} validation images, {tiles_an_epoch} tiles of {args.tile} an epoch")
        best.append(train_fold(models.build_segmenter, found, tiles, tiles_an_epoch, losses, validate, score, text,
                               records, args, compute))
    print_end(args, best, score)


def segmentation_losses(class_weights, args):
    """Return APP's module, None without it, and a function that gives a step's losses: first the one to minimise, then
    cross-entropy and penalty, which are only shown: train_loss and val_loss are the cross-entropy."""
    app = dedl.build_app(args.app, args.tile, len(class_weights), args.app_activation)

    def losses_of(logits, truth, share):
        cross_entropy = F.cross_entropy(logits, truth, class_weights, ignore_index=dedl.IGNORED)
        penalty = own = torch.zeros_like(cross_entropy)
        if app:
            penalty, own = app(logits, truth, class_weights)
        loss = cross_entropy + args.app_weight * penalty + own
        if args.recipe == "short":
            loss = loss + dedl.dice_loss(logits, truth)
        else:  # the sum over pixels, since to their mean Adam's weight decay would be a million times larger
            total = class_weights[truth[truth != dedl.IGNORED]].sum()
            loss = loss * total / share  # gradients are weighted by their process's share
        return loss, cross_entropy, penalty
    return app, losses_of


def validate_fields(fields, class_weights, usual, compute, model, out):
    """Measure a network on the fields. Return the scores for metrics.csv, what a cross-validation needs of them to be
    measured as a whole, and a function that draws samples.png in `out`. usual: see nuclei.describe."""
    measured = prediction.measure(fast.for_inference(model), fields, usual, compute, class_weights)
    shown = [("validation", field, labels) for field, labels in zip(fields, measured.found)]
    draw = partial(figures.save_samples, figures.evenly(shown, most=4), out / "samples.png")
    names = ("iou", "mean_image_iou", "ap50", "ap50_mean_image")
    scores = measured.scores
    row = {"val_loss": measured.loss} | {f"val_{name}": scores[name] for name in names}
    return row, {"counts": measured.counts, "matched": measured.matched}, draw


def choose_classes(wish, fields):
    """Return how many classes the value of --nuclei takes: 2, or 3 to separate nuclei that touch. Print what is unusual
    in the masks. Raises InputError where they are empty."""
    if not any((field.mask & field.known).any() for field in fields):
        raise InputError(f"--data: none of the {len(fields)} training masks holds a nucleus; check them")
    binary = [field for field in fields if not field.labelled and field.labels.max() > 1]
    if wish == "mask" or wish == "auto" and len(binary) >= sum(field.labelled for field in fields):
        return 2
    if binary:
        note([f"{len(binary)} of {len(fields)} training masks are no label images, as {binary[0].record.mask}: their "
              f"connected parts count as nuclei"])
    return 3


def segmentation_weights(wish, fields, classes):
    """Return a weight a class for the value of --class-weights; where it has none for the border, the nucleus's."""
    inside = sum((field.mask & field.known).sum().item() for field in fields)
    share = inside / sum(field.known.sum().item() for field in fields)
    if len(wish) == classes:  # numbers
        return wish
    published = dedl.PUBLISHED_CLASS_WEIGHTS
    background, nucleus = choose_weights(wish, list(published), published, dedl.balanced_class_weights(share))
    return [background, nucleus, nucleus][:classes]


# ------------------------------------------------------------------------------------------------------- classification
def train_classification(args, compute):
    # 1. the run's folder, the images
    records, found = find_run(args, f"cls-{args.data.name}-{args.model}-seed{args.seed}")
    classes = manifests.class_names(records)
    if not classes:
        raise InputError(f"--data: none of the {len(records)} images has a label; there is nothing to tell apart")
    known, folds = choose_folds(records, args)
    training = [record for record in known if record.split == "train"]
    learnt = manifests.class_names(training)
    note([f"class {name} has no training image: it cannot be learnt and counts as missed"
          for name in classes if name not in learnt])
    note([f"{record.image}: has no label; it counts as of none of the classes"
          for record in training if not record.labels])
    interpolation = encoders.interpolation(args.model, args.recipe)
    labelled = data.read_labelled(known, classes, args.image_size, interpolation, "training images")
    setting = {"model": args.model, "classes": len(classes), "image_size": args.image_size, "recipe": args.recipe}
    found |= {"setting": setting, "classes": classes, "train_images_used": len(training)}

    # 2. fold by fold
    best = []
    for number, (train, validation) in folds.items():
        counts = labelled.truth[train].sum(0).tolist()
        class_weights = choose_weights(args.class_weights, classes, dedl.PUBLISHED_PHENOTYPE_WEIGHTS,
                                       dedl.inverse_frequency_weights(counts))
        found |= {"fold": number, "class_weights_used": class_weights}
        focal = dedl.FocalLoss(gamma=args.gamma, class_weights=class_weights).to(compute.device)
        images = data.AugmentedImages(labelled, train, args.seed, args.recipe)
        validate = partial(validate_images, labelled, validation, focal, compute)
        text = f"{args.model}, {len(train)} training and {len(validation)} validation images of {args.image_size}"
        best.append(train_fold(models.build_classifier, found, images, len(images),
                               partial(classification_losses, focal), validate, "val_f1_micro", text, records, args,
                               compute))
    print_end(args, best, "val_f1_micro")


def classification_losses(focal):
    """Return the same as segmentation_losses. The loss that is minimised is the one that is shown."""
    def losses_of(logits, truth, share):
        loss = focal(logits, truth)
        return loss, loss
    return None, losses_of


def validate_images(labelled, indices, focal, compute, model, out):
    """Measure a network on the images of these indices. Return the same as validate_fields; what is drawn goes
    together with a table, validation.csv."""
    logits = prediction.classify(model, labelled.images[indices], compute)
    truth = labelled.truth[indices]
    probabilities = logits.sigmoid()
    scores = dedl.classification_scores(probabilities > 0.5, truth, labelled.classes)
    row = {
        "val_loss": focal(logits.to(compute.device), truth.to(compute.device).float()).item(),
        "val_f1_micro": scores["f1_micro"],
        "val_f1_macro": scores["f1_macro"],
    }

    def save():
        records = [labelled.records[i] for i in indices]
        prediction.save_labels(out / "validation.csv", records, labelled.classes, probabilities)
        figures.save_labels(records, probabilities.numpy(), truth.numpy(), labelled.classes, out / "samples.png")
    return row, {"probabilities": probabilities, "truth": truth}, save


# --------------------------------------------------------------------------------------------- shared by both trainings
def find_run(args, name):
    """Set args.out where it is not given. Return the records of the data folder, and what is found so far of the run's
    settings: the first weights. Raises InputError where a run that goes on, or gets one more fold, was another's."""
    def find():
        out = args.out if args.resume else runs.new_run(args.out, name, args.fold)
        there = args.resume or (out / "config.json").is_file()
        return out, runs.read_config(out) if there else None

    args.out, begun = process.from_first(find)
    if begun and not args.resume:
        refuse_other_settings(args, begun)
    records, lines = manifests.find_records(args.data, args.seed, task=args.task, needs_validation=args.folds == 1)
    refuse_other_data(args, records, begun)
    print(*lines, sep="\n")
    note(manifests.leaks(records))
    return records, {"weights_used": begun["weights_used"] if begun else args.weights}


def choose_folds(records, args):
    """Return the records that training sees, and {number: (indices among them that train, that validate)} of the folds.

    Of the training records those that --limit-train leaves, drawn by --seed. Without a cross-validation (--folds 1) the
    only fold validates on the validation rows; else these rows are left for test.py --split validation. Raises
    InputError where records are missing.
    """
    train = [record for record in records if record.split == "train"]
    validation = [record for record in records if record.split == "validation"]
    if not train:
        raise InputError(f"--data: {args.data} has no images of split train; training needs some")
    if args.limit_train:
        order = np.random.default_rng(args.seed).permutation(len(train))[:args.limit_train]
        train = [train[i] for i in sorted(order)]
    everyone = np.arange(len(train))
    if args.folds == 1:
        if not validation:  # of two or more training images some were drawn
            raise InputError(f"--data: {args.data} has one training image and no validation rows; one image cannot be "
                             f"both; add another")
        return train + validation, {0: (everyone, len(train) + np.arange(len(validation)))}
    folds = data.make_folds(train, args.folds, args.seed)
    chosen = range(args.folds) if args.fold is None else [args.fold]
    return train, {number: (np.setdiff1d(everyone, folds[number]), np.array(folds[number])) for number in chosen}


def train_fold(build, found, images, count, losses, validate, score, text, records, args, compute):
    """Train a network, build(**setting, weights), by `count` images an epoch; best.pt is the epoch of the best `score`,
    which is returned.

    found: what is to be recorded; weights_used, as asked for at first, is set. losses: a function that returns what
    segmentation_losses does; validate: one of the network and the folder that returns what validate_fields does. text:
    printed.
    """
    # 1. the network, its first weights, config.json
    number = found["fold"]
    out = args.out / f"fold{number}" if args.task == "cls" or args.folds > 1 else args.out
    torch.manual_seed(args.seed * 1000 + number if args.folds > 1 else args.seed)
    resumes = (out / "last.pt").is_file()  # not if a run was interrupted in its first epoch
    earlier = runs.start_of(found["weights_used"])
    model = build(**found["setting"], weights="none" if resumes or earlier else found["weights_used"])
    if earlier and not resumes:
        runs.start_from(model, build, found, earlier)
    elif not resumes:
        found["weights_used"] = model.weights_used  # further folds take the same, without a try to download
    app, losses_of = losses()
    parts = make_parts(model, app, args, compute)
    size = save_config(args, compute, parts, records, **found)["parameters"]
    print(f"{out}: {size / 1e6:.2f} M parameters, {text}, {compute}")

    # 2. the loop
    state = begin_or_resume(out, parts) | {"later": args.folds - 1 - number if args.fold is None else 0}
    while state["epoch"] < args.epochs and state["stale"] < (args.patience or math.inf):
        started = time.perf_counter()
        loader = make_loader(images, count, args, compute, state)
        means = train_epoch(parts, loader, losses_of, compute, state, args)
        network = parts["average"].module if "average" in parts else model
        row, validation, save = validate(network, out)
        row = {"train_loss": means[0]} | row | dict(zip(["train_loss", "app_penalty"], means))
        best = found | {"model": network.state_dict(), "validation": validation}
        state = end_epoch(out, state, parts, best, save, row, score, started, args)
    if process.rank() == 0:
        figures.save_curves(state["history"], out / "curves.png")
    return state["best"]


def print_end(args, best, score):
    of_folds = f", mean of {len(best)} folds" if args.folds > 1 else ""
    print(f"done: best {score} {sum(best) / len(best):.4f}{of_folds}; now: python test.py {args.out}")


def choose_weights(wish, classes, published, automatic):
    """Return a weight a class for the value of --class-weights. published: {class: weight}; automatic: for auto."""
    weights = {
        "auto": automatic,
        "equal": [1.0] * len(classes),
        "published": [published[name] for name in classes if name in published],
    }.get(str(wish), wish)
    if len(weights) != len(classes):
        raise InputError(f"argument --class-weights {wish}: gives {len(weights)} weights for {', '.join(classes)}; it "
                         f"must be one for each")
    return weights


def save_config(args, compute, parts, records, **found):
    """Write config.json, and the folder for it: the settings and what they led to. Return it."""
    rows_of = Counter(record.split for record in records)
    config = vars(args) | found | {
        "device": compute.device.type,
        "amp": compute.amp,
        "parameters": sum(weight.numel() for weight in parts["model"].parameters()),
        "images": {split: rows_of[split] for split in manifests.SPLITS},
        "rows": digest(records),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "numpy": np.__version__,
        },
        "processes": process.world(),
    }
    if process.rank() == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        runs.save_json(config, args.out / "config.json")
    return config


def make_parts(model, app, args, compute):
    """Return what a training consists of, on the device: all that last.pt keeps."""
    fast.speed_up(model.to(compute.device, memory_format=torch.channels_last))
    short = Muon if args.task == "seg" else torch.optim.AdamW
    optimizer = torch.optim.Adam if args.recipe == "paper" else short
    parts = {
        "model": model,
        "optimizer": optimizer(model.parameters(), lr=args.lr, weight_decay=args.weight_decay,
                               fused=optimizer is not Muon),
        "scaler": compute.scaler(),
    }
    if app:
        parts["app"] = app.to(compute.device)
        parts["app_optimizer"] = dedl.app_optimizer(app)
    if vars(args).get("swa", args.recipe == "short"):
        parts["average"] = swa_utils.AveragedModel(model, multi_avg_fn=moving_average, use_buffers=True)
    if args.compile:
        model.compile()
    return parts


def moving_average(average, weights, steps):
    """Move the average, a list of tensors, towards the weights; quickly in the first of so many steps."""
    decay = min(DECAY, 1 - 9 / (10 + steps.item()))
    swa_utils.get_ema_multi_avg_fn(decay)(average, weights, steps)


def trained(parts):
    """Return the network, of a segmentation the autoencoder, and the average of the network."""
    return torch.nn.ModuleList([parts[name] for name in ("model", "app", "average") if name in parts])


def make_loader(dataset, count, args, compute, state):
    """Return the batches of the next epoch, of `count` images in all, in an order drawn from seed and epoch. Of several
    processes each gets its part of every batch. A last batch of less than two images a process is left out, since
    BatchNorm needs two; with --compile any smaller one, for which the network would be compiled anew."""
    dataset.epoch = state["epoch"] + 1
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + dataset.epoch)
    sampler = RandomSampler(dataset, num_samples=count, generator=generator)
    drop_last = count > args.batch_size and (args.compile or count % args.batch_size < 2 * process.world())
    batches = BatchSampler(sampler, args.batch_size, drop_last)
    own = [batch[process.rank()::process.world()] for batch in batches]
    return DataLoader(dataset, batch_sampler=own, num_workers=args.workers, generator=generator,
                      pin_memory=compute.device.type == "cuda")


def train_epoch(parts, loader, losses_of, compute, state, args):
    """Go once over the loader. losses_of(logits, truth, share) gives the loss that is minimised and the losses to be
    shown. Return the means of the latter. Raises InputError where a loss is not finite."""
    # dropout and its like draw anew in each epoch, so that a resumed run draws the same
    epoch = state["epoch"]
    torch.manual_seed(args.seed * 1_000_003 + epoch * 1000 + process.rank())
    parts["model"].train()
    sums = 0  # of the losses shown, and the number of images
    before = epoch * len(loader)
    whole = before + epochs_left(state, args) * len(loader)  # so that the bar tells the time left of the run
    bar = progress(loader, f"epoch {epoch + 1}/{args.epochs}", "tile" if args.task == "seg" else "image", total=whole,
                   initial=before, unit_scale=args.batch_size)
    for step, batch in enumerate(bar):
        rate = learning_rate(args, epoch + step / len(loader))
        loss, *shown = train_step(parts, batch, losses_of, rate, compute)
        if not loss.isfinite():
            raise InputError(f"the loss is not finite in epoch {epoch + 1}, batch {step + 1}; lower --lr or use --amp "
                             f"off; finished epochs are saved")
        sums = sums + torch.stack([*shown, torch.ones_like(loss)]).detach() * len(batch[0])
        bar.set_postfix_str(f"loss {sums[0] / sums[-1]:.4f}", refresh=False)
    process.combine(trained(parts).buffers(), 1 / process.world())  # each process has BatchNorm statistics of its own
    *sums, seen = process.total(sums).tolist()
    return [value / seen for value in sums]


def train_step(parts, batch, losses_of, rate, compute):
    """Learn from a batch, images and truth, at this learning rate. Return what losses_of gave."""
    model = parts["model"]
    scaler = parts["scaler"]
    optimizers = [parts[name] for name in ("optimizer", "app_optimizer") if name in parts]
    for group in parts["optimizer"].param_groups:
        group["lr"] = rate
    images, truth = batch
    images = compute.batch(images)                                  # (N, C, tile, tile) or (N, 3, S, S)
    truth = truth.to(compute.device, non_blocking=True)             # (N, tile, tile) or (N, classes)
    share = len(images) / process.total(torch.tensor(len(images))).item()  # of the batch, this process's
    with compute.autocast():
        logits = model(images).float()                              # (N, classes, tile, tile) or (N, classes)
        losses = losses_of(logits, truth, share)
    for optimizer in optimizers:
        optimizer.zero_grad()
    scaler.scale(losses[0]).backward()
    process.combine([weight.grad for weight in trained(parts).parameters() if weight.grad is not None], share)
    with compute.autocast():  # for Muon's products
        for optimizer in optimizers:
            scaler.step(optimizer)
    scaler.update()
    if "average" in parts:
        parts["average"].update_parameters(model)
    return losses


def learning_rate(args, epoch):
    """Return the learning rate at `epoch`, counted from 0, with its fraction.

    paper: a cosine, set once an epoch: seg from lr to 0.944 lr (3.4e-4 for 3.6e-4) over 50 epochs, cls from lr to
    lr / 300 (1e-6 for 3e-4) and back over 16 and 16. short: one cycle, up in the first part of the run (seg: a
    twentieth, cls: a fifth), then cosine to 0, set at each step.
    """
    done = epoch / args.epochs
    rise = 0.05 if args.task == "seg" else 0.2
    if args.recipe == "paper":
        low = args.lr * 3.4 / 3.6 if args.task == "seg" else args.lr / 300
        turns = min(1, int(epoch) / 50) if args.task == "seg" else int(epoch) / 16
    elif done < rise:
        return args.lr * (done + 0.01) / (rise + 0.01)
    else:
        low = 0
        turns = (done - rise) / (1 - rise)
    return low + (args.lr - low) * (1 + math.cos(math.pi * turns)) / 2


def epochs_left(state, args):
    """Return how many epochs the run needs, this fold's and later ones'."""
    return args.epochs * (1 + state["later"]) - state["epoch"]


def end_epoch(out, state, parts, best, save, measured, score, started, args):
    """Save what an epoch leaves: where its `score` is the best so far, of equal ones that with the lower validation
    loss, best.pt and what `save` draws; metrics.csv, last.pt. Return the new state."""
    epoch = state["epoch"] + 1
    better = (measured[score], -measured["val_loss"]) > (state["best"], -state["best_loss"])
    first = dict(list(measured.items())[:3])  # losses, and the score that all tables have
    row = {
        "epoch": epoch,
        **first,
        "lr": parts["optimizer"].param_groups[0]["lr"],
        "seconds": time.perf_counter() - started,
        **measured,
    }
    state = state | {"epoch": epoch, "stale": state["stale"] + 1, "history": [*state["history"], row]}
    if better:
        state |= {"best": row[score], "best_loss": row["val_loss"], "stale": 0}
    if process.rank() == 0:  # in this order: whatever a kill leaves out, resuming from last.pt makes again
        if better:
            save()
            runs.save_checkpoint({**best, "epoch": epoch, **measured}, out / "best.pt")
        last = {name: part.state_dict() for name, part in parts.items()}
        last["state"] = state
        process.save_csv(out / "metrics.csv", list(row), [values.values() for values in state["history"]])
        runs.save_checkpoint(last, out / "last.pt")
    shown = "  ".join(f"{name} {row[name]:.4f}" for name in first | {score: 0})
    left = timedelta(seconds=round(row["seconds"] * epochs_left(state, args)))
    print(f"epoch {epoch:3d}/{args.epochs}  {shown}{' *' if better else '  '}  {row['seconds']:.0f} s, {left} left")
    return state


def begin_or_resume(out, parts):
    """Return the state of the loop, a new one or, with everything put where last.pt left it, of one that goes on."""
    if process.rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
    file = out / "last.pt"
    if not file.is_file():
        process.combine(trained(parts).state_dict().values(), float(process.rank() == 0))  # all get the first one's
        return START
    last = runs.load_checkpoint(file, *parts, "state")
    for name, part in parts.items():
        if last[name]:  # only fp16 has a scale, and the precision may change
            part.load_state_dict(last[name])
    print(f"{out}: going on after epoch {last['state']['epoch']}")
    return last["state"]


if __name__ == "__main__":
    process.command(main, less_memory=LESS_MEMORY)
