"""Trains a model on a data folder, or on the built-in synthetic set.

    python train.py --task seg                          the synthetic set, a few minutes on two CPU cores
    python train.py --task seg --data DIR               your data
    python train.py --task seg --data DIR --recipe paper
    python train.py --task cls --data DIR               phenotypes, several an image, in a cross-validation of 6 folds
    python train.py --task cls --data DIR --fold 2      one of these folds alone
    python train.py --resume                            go on with the newest run after an interruption
    torchrun --nproc-per-node 4 train.py ...            the same job on 4 devices, which share each batch
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
from torch.optim import swa_utils
from torch.utils.data import DataLoader

import data
import dedl
import models
from images import manifests, reading
from running import figures, prediction, process, runs
from running.process import InputError
from running.settings import digest, how_to_go_on, parse_args, refuse_other_data, refuse_other_settings

SWA_SHARE, SWA_RATE = 0.25, 0.25  # --swa averages over the last quarter of the epochs, at a quarter of the largest rate
LESS_MEMORY = "lower --batch-size, then --tile or --image-size; or take a smaller --encoder or --model, --depth 5, " \
              "or --amp bf16"
BAD_STEPS = 4  # so many steps one after another without finite gradients, and the run stops
LEAST_SCALE = 2 ** -16  # of fp16's loss; a sum over a batch's pixels needs one below 1


def main(argv=None):
    args = parse_args(argv, __doc__)
    compute = choose_compute(args)
    try:
        args.data = args.data or process.from_first(runs.synthetic_folder)
        (train_segmentation if args.task == "seg" else train_classification)(args, compute)
    except KeyboardInterrupt as stop:
        raise type(stop)(how_to_go_on(args)) from None


# --------------------------------------------------------------------------------------------------------- segmentation
def train_segmentation(args, compute):
    # 1. folder of the run, data
    models.check_name("encoder", args.encoder)  # before much is read
    name = f"seg-{args.data.name}-{args.arch}-{args.encoder}-app_{args.app}-seed{args.seed}"
    args.out = out = args.out if args.resume else process.from_first(runs.new_run, args.out, name)
    records, said = manifests.find_records(args.data, args.seed)
    begun = process.from_first(lambda: runs.read_config(out)) if args.resume else None
    refuse_other_data(args, records, begun)
    code = runs.code_of(begun, out)
    print(*said, *notes(manifests.leaks(records)), sep="\n")
    train_fields, val_fields = load_splits(records, args)
    weights_of_classes = segmentation_weights(args.class_weights, train_fields)
    crops = data.Crops(train_fields, args.tile, args.seed, published=args.recipe == "paper")

    # 2. network, APP, optimizer
    torch.manual_seed(args.seed)
    setting = dict(arch=args.arch, encoder=args.encoder, in_channels=len(train_fields[0].image), classes=2,
                   depth=args.depth, decoder_channels=list(models.default_decoder_channels(args.depth)))
    # not if it was interrupted in its first epoch
    resumes = args.resume and process.from_first((out / "last.pt").is_file)
    model = models.build_segmenter(**setting, weights="none" if resumes else args.weights)
    weights_used = begun["weights_used"] if resumes else process.from_first(getattr, model, "weights_used")
    model = model.to(compute.device, memory_format=torch.channels_last)
    app = dedl.build_app(args.app, args.tile, activation=args.app_activation)
    app = app.to(compute.device) if app else None
    parts = {"model": model, "optimizer": make_optimizer(model.parameters(), args, compute), "scaler": compute.scaler()}
    if app:
        parts |= {"app": app, "app_optimizer": dedl.app_optimizer(app)}

    # 3. where the run stands
    state = resume(out, parts, setting) if resumes else begin(out, parts)
    config = save_config(args, compute, model, setting=setting, weights_used=weights_used,
                         class_weights_used=weights_of_classes, channels=train_fields[0].channels,
                         images={split: sum(r.split == split for r in records) for split in manifests.SPLITS},
                         rows=digest(records), train_images_used=len(train_fields), code=code)
    if args.compile:
        model.compile()
    print(f"{out}: {args.arch}/{args.encoder}, {config['parameters'] / 1e6:.2f} M parameters, APP {args.app}, "
          f"{len(train_fields)} training and {len(val_fields)} validation images, "
          f"{args.steps * args.batch_size if args.steps else len(crops)} tiles of {args.tile} an epoch, "
          f"{where(compute)}", flush=True)

    # 4. the loop
    weight = torch.tensor(weights_of_classes, device=compute.device)

    def losses_of(logits, truth):
        """The loss that is minimised; cross-entropy and penalty, to be shown."""
        cross_entropy = dedl.cross_entropy(logits, truth, weight)
        penalty, own = app(logits, truth, weight) if app else torch.zeros(2, device=logits.device)
        loss = cross_entropy + args.app_weight * penalty + own
        if args.recipe == "paper":  # the sum over pixels: to a mean Adam's weight decay would be a million times larger
            count = torch.tensor(len(truth), device=truth.device)
            share = count / process.total(count.clone())  # by which the processes' gradients are weighted
            loss = loss * weight[truth].sum() / share
        return loss, cross_entropy, penalty

    while unfinished(state, args):
        started = time.perf_counter()
        loader = make_loader(crops, args, compute, state["epoch"] + 1)
        (train_loss, penalty), speed = train_epoch(parts, loader, losses_of, compute, state["epoch"] + 1, args)
        counts, val_loss, masks = prediction.evaluate(model, val_fields, compute, weight)
        if process.rank() == 0:
            figures.save_samples(val_fields, masks, out / "samples.png")
        # best.pt: the network and what rebuilds it, nothing of its training: with or without APP it is the same
        state = end_epoch(out, state, parts, {"setting": setting, "model": model.state_dict()}, started, speed,
                          train_loss, val_loss, {"val_iou": dedl.segmentation_scores(counts)["iou"]},
                          {"app_penalty": penalty})
    finish(out, state)
    print(f"done: best validation IoU {state['best']:.4f}; now: python test.py {out}")


def load_splits(records, args):
    """Training and validation fields, read. Raises InputError where there are none."""
    train, validation = ([record for record in records if record.split == split] for split in ("train", "validation"))
    train = limit(train, args)
    refuse_too_few(train, validation, args)
    fields = data.read_fields(train + validation, reading.channel_names(args.channel), "training and validation images")
    for line in (*notes([f"{field.record.image}: the image is constant" for field in fields if not field.image.any()]),
                 *notes([f"{field.record.mask}: the mask is empty" for field in fields if not field.mask.any()]),
                 *notes(manifests.inverted_masks(fields))):
        print(line)
    return fields[:len(train)], fields[len(train):]


def segmentation_weights(wish, fields):
    """[background, nucleus] for the value of --class-weights. Raises InputError where the masks show but one class."""
    share = sum(int(f.mask.sum()) for f in fields) / sum(f.mask.numel() for f in fields)
    if share in (0, 1):
        raise InputError(f"--data: {'every' if share else 'no'} pixel of the {len(fields)} training masks is "
                            f"nucleus; there is nothing to tell apart; check the masks")
    if wish == "auto":
        return list(dedl.balanced_class_weights(share))
    if wish in ("equal", "published"):
        return list(dedl.PUBLISHED_CLASS_WEIGHTS) if wish == "published" else [1.0, 1.0]
    if len(wish) != 2:
        raise InputError(f"argument --class-weights: has {len(wish)} numbers; give background,nucleus")
    return wish


# ------------------------------------------------------------------------------------------------------- classification
def train_classification(args, compute):
    # 1. folder of the run, data
    name = f"cls-{args.data.name}-{args.model}-seed{args.seed}"
    args.out = out = args.out if args.resume else process.from_first(runs.new_run, args.out, name, args.fold)
    begun = process.from_first(lambda: runs.read_config(out) if (out / "config.json").is_file() else None)
    if begun and not args.resume:  # one more fold of a run that is there
        refuse_other_settings(args, begun)
    records, said = manifests.find_records(args.data, args.seed, task="cls", needs_validation=args.folds == 1)
    print(*said, *notes(manifests.leaks(records)), *notes(manifests.class_notes(records)), sep="\n")
    classes, images = manifests.class_names(records), {s: sum(r.split == s for r in records) for s in manifests.SPLITS}
    refuse_other_data(args, records, begun)
    known, folds = choose_folds(records, classes, args)
    labelled = data.read_labelled(known, classes, args.image_size, models.interpolation(args.model), "training images")
    if torch.is_tensor(labelled.pictures):
        flat = labelled.pictures.flatten(2)                                                   # (N, 3, S * S)
        constant = (flat.amin(2) == flat.amax(2)).all(1).tolist()
        for line in notes([f"{record.image}: the image is constant" for record, c in zip(known, constant) if c]):
            print(line)

    # 2. fold by fold
    setting = dict(model=args.model, classes=len(classes), image_size=args.image_size)
    weights, code = begun["weights_used"] if begun else args.weights, runs.code_of(begun, out)
    chosen = list(range(args.folds)) if args.fold is None else [args.fold]
    if begun and args.fold is None and begun.get("fold") is not None:  # begun fold by fold: go on with those there
        chosen = [fold for fold in chosen if (out / f"fold{fold}").is_dir()]
    scores = []
    for fold in chosen:
        folder = out / f"fold{fold}"
        if not args.resume and process.from_first(folder.exists):
            print(f"{out}, fold {fold}: another process has begun it by now; it is left to it")
            continue
        train, validation = folds[fold]
        torch.manual_seed(args.seed * 1000 + fold)
        resumes = args.resume and process.from_first((folder / "last.pt").is_file)
        model = models.build_classifier(**setting, weights="none" if resumes else weights)
        if not begun:
            weights = process.from_first(getattr, model, "weights_used")  # not by a try to download in each fold
        weights_of_classes = classification_weights(args.class_weights, classes, labelled.truth[train])
        config = save_config(args, compute, model, setting=setting, weights_used=weights, classes=classes,
                             images=images, rows=digest(records), code=code,
                             train_images_used=len(known) if args.folds > 1 else len(train),
                             **({"fold": begun.get("fold")} if begun else {}))
        if process.rank() == 0:  # after config.json: who finds the folder finds that too
            folder.mkdir(exist_ok=True)
        trained, validated = (labelled.truth[rows].any(0).tolist() for rows in (train, validation))
        unknown = [name for name, seen, asked in zip(classes, trained, validated) if asked and not seen]
        print(f"{out}, fold {fold}: {args.model}, {config['parameters'] / 1e6:.2f} M parameters, {len(train)} training "
              f"and {len(validation)} validation images of {args.image_size}, {where(compute)}; class weights "
              f"{', '.join(f'{n} {w:.2f}' for n, w in zip(classes, weights_of_classes))}"
              + (f"  NOTE: validates {', '.join(unknown)}, never trained on" if unknown else ""), flush=True)
        best = {"setting": setting, "fold": fold, "classes": classes, "weights_used": weights,
                "class_weights": weights_of_classes}
        scores.append(train_fold(folder, model, labelled, train, validation, best, compute, args, resumes))
    print(f"done: best validation micro-F1 {sum(scores) / max(1, len(scores)):.4f}, mean of {len(scores)} folds; now: "
          f"python test.py {out}")


def choose_folds(records, classes, args):
    """The records that training sees, and of each fold the indices among them that train and that validate.

    Without a cross-validation (--folds 1) the only fold validates on the validation rows; else these rows are left for
    test.py --split validation. Prints what stands out; raises InputError where there is nothing to learn.
    """
    train, validation = ([record for record in records if record.split == split] for split in ("train", "validation"))
    train = limit(train, args)
    refuse_too_few(train, validation or args.folds > 1, args)
    if len({frozenset(record.labels) for record in train}) == 1:
        what = f"the same label, {';'.join(train[0].labels)}" if train[0].labels else "no label"
        raise InputError(f"--data: all {len(train)} training images have {what}; there is nothing to tell apart")
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
            raise InputError(f"--class-weights published: are those of {', '.join(dedl.PUBLISHED_PHENOTYPE_WEIGHTS)}"
                                f"; the classes here are {', '.join(classes)}")
        return [dedl.PUBLISHED_PHENOTYPE_WEIGHTS[name] for name in classes]
    if len(wish) != len(classes):
        raise InputError(f"argument --class-weights: has {len(wish)} numbers; give one for each of "
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
    state = resume(out, parts, best["setting"], best["fold"]) if resumes else begin(out, parts)
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
                             drop_last=len(train) > args.batch_size and len(train) % args.batch_size == 1 and
                             process.world() == 1)
        (train_loss,), speed = train_epoch(parts, loader, losses_of, compute, state["epoch"] + 1, args)
        network = model
        if averages(state["epoch"], args):  # from here on the average is what is validated and kept
            if not averages(state["epoch"] - 1, args):  # the first of them
                average.n_averaged.zero_()
                state = {**state, "best": START["best"], "stale": 0}
            average.update_parameters(model)
            with compute.autocast(), data.naming_files(augmented):
                swa_utils.update_bn(process.progress(loader, "BatchNorm", "batch"), average, compute.device)
            process.combine(float_buffers({"model": average}), 1 / process.world())
            network = average.module
        logits = prediction.classify(network, labelled.pictures, compute, validation)
        probabilities = logits.sigmoid()
        scores = dedl.classification_scores(probabilities > 0.5, val_truth, classes)
        val_loss = focal(logits.to(compute.device), val_truth.to(compute.device).float()).item()
        # before best.pt: what an interruption in between leaves out is made again
        if process.rank() == 0 and is_better(state, scores["f1_micro"], val_loss):
            prediction.save_probabilities(out / "validation.csv", val_records, classes, probabilities, with_labels=True)
            figures.save_labels(val_records, probabilities.numpy(), val_truth.numpy(), classes, out / "samples.png")
        state = end_epoch(out, state, parts, {**best, "model": network.state_dict()}, started, speed, train_loss,
                          val_loss, {"val_f1_micro": scores["f1_micro"]}, {"val_f1_macro": scores["f1_macro"]})
    finish(out, state)
    return state["best"]


def averages(epoch, args):
    """Whether --swa averages the weights after the epoch that begins at `epoch`, counted from 0."""
    return args.task == "cls" and args.swa and epoch >= args.epochs - max(1, round(SWA_SHARE * args.epochs))


# --------------------------------------------------------------------------------------------- shared by both trainings
# of the loop; stale: epochs since the best one, history: the rows of metrics.csv. The learning rate, the batches, the
# augmentation and what else is drawn follow from epoch and seed: nothing else needs to be kept to go on.
START = {"epoch": 0, "best": -1.0, "best_loss": math.inf, "stale": 0, "history": []}


def choose_compute(args):
    """The device and precision; sets args.workers where it is not given."""
    device = runs.choose_device(args.device)
    process.join(device)
    compute = runs.choose_compute(device, args.amp)
    if args.workers is None:  # on a CPU, loader processes would take the cores from the network
        args.workers = 0 if device == "cpu" else min(4, os.cpu_count())
    if args.batch_size < process.world():
        raise InputError(f"--batch-size {args.batch_size}: a batch is shared by the {process.world()} processes; "
                            f"give at least as many, for BatchNorm better several times as many")
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True, warn_only=True)  # warns of operations that have no such form
        torch.utils.deterministic.fill_uninitialized_memory = False
    return compute


def where(compute):
    """Device and precision, to be shown."""
    several = f" in {process.world()} processes" if process.world() > 1 else ""
    return f"{compute.device}{several}, {compute.precision()}"


def notes(lines, most=5):
    """The lines as they are printed: marked, of many the first ones."""
    more = [f"... {len(lines) - most} more like that"] if len(lines) > most else []
    return [f"  NOTE: {line}" for line in lines[:most] + more]


def refuse_too_few(train, validation, args):
    """Raises InputError without images to train on, or to validate on: of two or more training ones some are drawn."""
    if not train:
        raise InputError(f"--data: {args.data} has no images of split train; training needs some")
    if not validation:
        raise InputError(f"--data: {args.data} has one training image and no validation rows; one image cannot be "
                            f"both; add another")


def limit(records, args):
    """The training records that --limit-train leaves, drawn by --seed."""
    if not args.limit_train:
        return records
    order = np.random.default_rng(args.seed).permutation(len(records))[:args.limit_train]
    return [records[i] for i in sorted(order)]


def save_config(args, compute, model, **found):
    """Writes config.json, and the folder for it: the settings and what they led to. Returns it as dict."""
    config = {**{k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}, **found,
              "device": str(compute.device), "amp": str(compute.amp_dtype or torch.float32).removeprefix("torch."),
              "parameters": sum(p.numel() for p in model.parameters()),
              "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__,
                           "numpy": np.__version__}, "threads": torch.get_num_threads(), "processes": process.world(),
              "machine": platform.machine()}
    if process.rank() == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        if args.task == "seg" and not args.resume and (args.out / "config.json").exists():
            raise InputError(f"--out {args.out}: another run has begun there meanwhile; start again")
        runs.save_json(config, args.out / "config.json")
    return config


def make_optimizer(parameters, args, compute):
    adam = torch.optim.Adam if args.recipe == "paper" else torch.optim.AdamW
    return adam(parameters, lr=args.lr, weight_decay=args.weight_decay, fused=compute.device.type != "mps")


def optimizers_of(parts):
    return [parts[name] for name in ("optimizer", "app_optimizer") if name in parts]


def weights_of(parts):
    """All tensors that are trained, the autoencoder's too."""
    return [weight for optimizer in optimizers_of(parts) for group in optimizer.param_groups
            for weight in group["params"]]


class Batches:
    """The indices of each batch of an epoch, in an order drawn from `seed`. Of several processes each gets its part of
    every batch; a rest too small to give each of them two images joins the batch before it.

    drop_last: without a smaller batch at the end. steps: so many batches, 0 for one pass; the n-th pass has the indices
    from n * count on. whole: the batches as all processes share them.
    """

    def __init__(self, count, size, seed, drop_last=False, steps=0):
        generator = torch.Generator().manual_seed(seed)
        torch.empty((), dtype=torch.int64).random_(generator=generator)  # README's figures are of the order after this
        wanted = steps * size if steps else count
        order = [start + i for start in range(0, wanted, count)
                 for i in torch.randperm(count, generator=generator).tolist()][:wanted]
        count = len(order)
        self.whole = [order[start:start + size] for start in range(0, count, size)]
        rest = self.whole.pop() if count > size and count % size else []
        if rest and not drop_last and process.world() > 1 and len(rest) < 2 * process.world():
            self.whole[-1] += rest
        elif rest and not drop_last:
            self.whole.append(rest)

    def __len__(self):
        return len(self.whole)

    def __iter__(self):
        return (batch[process.rank()::process.world()] for batch in self.whole)


def make_loader(dataset, args, compute, epoch, drop_last=False):
    """Batches of one epoch, in an order drawn from (seed, epoch). drop_last: without a smaller one at the end."""
    if len(dataset) < process.world():
        raise InputError(f"--nproc-per-node: there are {len(dataset)} tiles or pictures to train on, for "
                            f"{process.world()} processes; take fewer")
    dataset.epoch = epoch
    dataset.noted = torch.zeros(args.workers, 2, dtype=torch.int64).share_memory_()
    drop_last = drop_last or (args.compile and len(dataset) > args.batch_size)  # another size would be compiled anew
    batches = Batches(len(dataset), args.batch_size, args.seed * 1_000_003 + epoch, drop_last,
                      args.steps if args.task == "seg" else 0)
    return DataLoader(dataset, batch_sampler=batches, num_workers=args.workers, generator=torch.Generator(),
                      pin_memory=compute.device.type == "cuda")


def unfinished(state, args):
    stopped = args.patience and state["stale"] >= args.patience
    if args.task == "cls" and args.swa and not averages(state["epoch"] - 1, args):
        stopped = False  # there is no average yet
    return state["epoch"] < args.epochs and not stopped


def train_epoch(parts, loader, losses_of, compute, epoch, args):
    """One pass over the loader. losses_of(logits, truth) gives the loss that is minimised and the losses to be shown.
    Returns the means of the latter and the speed in images/s. A step without finite gradients is left out; InputError
    is raised after BAD_STEPS of them."""
    # dropout and its like draw anew in each epoch, so that a resumed run draws the same
    torch.manual_seed(int(np.random.default_rng((args.seed, epoch, process.rank())).integers(2 ** 63)))
    model, scaler = parts["model"].train(), parts["scaler"]
    optimizers, weights = optimizers_of(parts), weights_of(parts)
    statistics = float_buffers(parts)
    kept = [buffer.clone() for buffer in statistics]
    sums = torch.zeros(0)  # of the losses; summed on the device: reading them waits for it
    seen, bad, left_out = 0, 0, 0
    started = time.perf_counter()
    bar = process.progress(loader, f"epoch {epoch}", "batch")
    with data.naming_files(loader.dataset):
        for step, (images, truth) in enumerate(bar):
            process.heed_signals()
            for group in parts["optimizer"].param_groups:
                group["lr"] = learning_rate(args, epoch - 1 + step / len(loader))
            images, truth = compute.batch(images), truth.to(compute.device, non_blocking=True)
            torch._foreach_copy_(kept, statistics)
            try:
                with compute.autocast():
                    logits = model(images).float()                  # (N, 2, tile, tile) or (N, classes)
                    loss, *shown = losses_of(logits, truth)
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise InputError(f"--batch-size {args.batch_size}: a batch of {len(images)} has no variance for "
                                    f"BatchNorm; take larger batches, or more images") from error
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            process.combine(gradients, len(images) / len(loader.batch_sampler.whole[step]))
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            # not finite where one of the gradients, or a process's loss, is not
            if (torch.nn.utils.get_total_norm(gradients) + process.total(loss.detach().clone())).isfinite():
                for optimizer in optimizers:
                    scaler.step(optimizer)
                sums = torch.stack(shown).detach() * len(images) + (sums if seen else 0)
                seen, bad = seen + len(images), 0
            else:
                torch._foreach_copy_(statistics, kept)  # BatchNorm has seen the batch: it would never forget a NaN
                bad, left_out = bad + 1, left_out + 1
                # fp16 finds its scale by such steps; below LEAST_SCALE it is not the scale
                if bad >= BAD_STEPS and (not scaler.is_enabled() or scaler.get_scale() < LEAST_SCALE):
                    raise not_finite(loader, step - bad + 1, step, epoch, args)
            scaler.update()
            if step % 10 == 0 and not bar.disable and seen:
                speed = seen / (time.perf_counter() - started)
                bar.set_postfix_str(f"loss {sums[0].item() / seen:.4f}, {speed:.1f} images/s")
    if not seen:
        if scaler.is_enabled() and scaler.get_scale() >= LEAST_SCALE:  # an epoch of few steps, all used up to find it
            return train_epoch(parts, loader, losses_of, compute, epoch, args)
        raise not_finite(loader, 0, left_out - 1, epoch, args)
    if left_out:
        print(*notes([f"{left_out} steps left out, since their gradients were not finite"]))
    process.combine(statistics, 1 / process.world())
    *sums, seen = process.total(torch.cat([sums, sums.new_tensor([seen])])).tolist()
    return [value / seen for value in sums], seen / (time.perf_counter() - started)


def not_finite(loader, first, last, epoch, args):
    """The InputError for batches, counted from 0, whose loss or gradients are not finite."""
    files = list(dict.fromkeys(loader.dataset.file_of(index) for index in loader.batch_sampler.whole[first]))
    names = ", ".join(map(str, files[:8])) + (f" and {len(files) - 8} more" if len(files) > 8 else "")
    kept = f"last.pt keeps the state after epoch {epoch - 1}" if epoch > 1 else "nothing was saved yet"
    return InputError(f"the loss or its gradient is not finite in epoch {epoch}, batches {first + 1} to {last + 1} "
                         f"(the first of {names}); lower --lr, use --amp off, or check these images; {kept}")


def float_buffers(parts):
    """BatchNorm's statistics and the like, of which each process has its own."""
    return [buffer for name in ("model", "app") if name in parts for buffer in parts[name].buffers()
            if buffer.is_floating_point()]


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
    """Saves what an epoch leaves: best.pt where it is the best so far, last.pt, metrics.csv. score: {name: value},
    more: further columns. Returns the new state. Raises InputError, and saves nothing, if the validation has failed."""
    (name, value), = score.items()
    if not math.isfinite(val_loss):
        raise InputError(f"the validation loss is not finite after epoch {state['epoch'] + 1}, though training was; "
                            f"lower --lr or use --amp off; nothing of this epoch was saved")
    better = is_better(state, value, val_loss)
    seconds, lr = time.perf_counter() - started, parts["optimizer"].param_groups[0]["lr"]
    row = {"epoch": state["epoch"] + 1, "train_loss": train_loss, "val_loss": val_loss, **score, "lr": lr,
           "seconds": seconds, **more}
    state = {**state, "epoch": state["epoch"] + 1, "stale": 0 if better else state["stale"] + 1,
             "history": [*state["history"], row], **({"best": value, "best_loss": val_loss} if better else {})}
    if process.rank() == 0:  # in this order: whatever a kill leaves out, resuming from last.pt makes again
        if better:
            runs.save_checkpoint({**best, "epoch": state["epoch"], **score}, out / "best.pt")
        runs.save_checkpoint({**{part: object.state_dict() for part, object in parts.items()}, "state": state,
                              "setting": best["setting"], "fold": best.get("fold")}, out / "last.pt")
        save_metrics(state, out / "metrics.csv")
    print(f"epoch {state['epoch']:3d}  train loss {train_loss:.4f}  val loss {val_loss:.4f}  {name} {value:.4f}"
          f"{' *' if better else '  '}  {speed:.1f} images/s  {seconds:.0f} s", flush=True)
    return state


def save_metrics(state, file):
    with process.replacing(file, "w", newline="") as handle:
        writer = csv.DictWriter(handle, state["history"][0])
        writer.writeheader()
        writer.writerows(state["history"])


def finish(out, state):
    """Draws what the training was like."""
    if process.rank() == 0 and (hint := figures.save_curves(state["history"], out / "curves.png")):
        print(*notes([hint]))


def claim(out):
    """Keeps the folder of a run or a fold for this process, and removes what a kill has left half written there. Raises
    InputError if another process is training into it."""
    if process.rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        if not process.hold(out):
            raise InputError(f"--out {out}: another process is training into it; wait, or give another")
        for name in ("config.json", *runs.WRITTEN[:6]):
            for file in out.glob(f"{name}.[0-9]*.tmp"):
                file.unlink()


def begin(out, parts):
    """The state of a new loop; all processes get the first one's weights."""
    claim(out)
    weights = [weight.data for weight in weights_of(parts)]
    process.combine([*weights, *float_buffers(parts)], float(process.rank() == 0))
    return dict(START)


def resume(out, parts, setting, fold=None):
    """Puts everything where last.pt left it; returns the state of the loop."""
    claim(out)
    file = out / "last.pt"
    last = runs.load_checkpoint(file, *parts, "state", "setting")
    runs.same_setting(file, last, {"setting": setting})
    if last.get("fold") != fold:
        raise InputError(f"{file}: is of fold {last.get('fold')}, not {fold}; were folders of folds exchanged?")
    try:
        if set(last["state"]) != set(START) or not last["state"]["history"]:
            raise ValueError
        for name, part in parts.items():
            if name != "scaler":
                part.load_state_dict(last[name])
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{file}: does not fit the settings in config.json beside it") from error
    if last["scaler"] and parts["scaler"].is_enabled():  # only fp16 has a scale, and the precision may change
        parts["scaler"].load_state_dict(last["scaler"])
    if process.rank() == 0:
        save_metrics(last["state"], out / "metrics.csv")
    print(f"{out}: going on after epoch {last['state']['epoch']}")
    return last["state"]


if __name__ == "__main__":
    process.command(main, memory=LESS_MEMORY)
