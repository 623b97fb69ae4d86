"""What separates nuclei that touch: targets to learn, tried in short trainings, and ways to decode one prediction.

    python benchmarks/nuclei.py targets [NAME ...] [--data DIR] [--steps 400] [--seeds 1]
    python benchmarks/nuclei.py decoders RUN ... [--split validation]
    python benchmarks/nuclei.py empty RUN ...
    python benchmarks/nuclei.py cost

targets: each NAME is trained for a few steps on the training images and measured on the validation images. Names are
    two               background and nucleus; the connected parts are the nuclei
    touching:2:3      a third class for pixels within 2 pixels of another nucleus, which weighs 3 in the cross-entropy
    border:2:2        a third class for all pixels within 2 pixels of what is not their nucleus; weighs 2
    core:0.5:1        a third class for the outer 0.5 of a nucleus's depth (as dedl.nucleus_classes); weighs 1
    distance:1        two classes, and the depth in parts of the nucleus's largest: smooth L1, weighs 1; seeds above 0.4
    offset:0.1        two classes, and the way to the nucleus's centre: smooth L1, weighs 0.1; seeds within 3 pixels
What a network predicts is decoded in two ways: its seeds (of classes the cores, of two the mask) are the nuclei, grown
inside the mask; and as test.py does, with these seeds as the cores.

decoders: the predictions of runs' best networks by connected parts of the mask, by distance transform and watershed
(scikit-image), by cores that are grown, and as test.py decodes them. All without the parts that test.py drops.

empty: how many nuclei runs find in images that hold none, of each kind as many as --images says, 512 pixels a side.

cost: a training step (U-Net, depth 4, APP conv, optimizers, 4 tiles of 256) and the prediction of the 4 tiles, with
three classes and with two.
"""
import math
import statistics
import time
from pathlib import Path

import harness
import numpy as np
import torch
import torch.nn.functional as F

import data
import dedl
import models
from images import manifests, reading
from images.labels import connected_parts
from networks import fast
from running import nuclei, prediction, runs
from running.compute import choose_compute

NAMES = ["two", "touching:1:5", "touching:2:3", "border:1:2", "border:2:1", "border:2:2", "border:3:1", "core:0.3:1",
         "core:0.4:1", "core:0.5:1", "core:0.6:1", "core:0.7:1", "core:0.5:2", "distance:1", "distance:3", "offset:0.1"]
TILE, BATCH, RATE = 128, 8, 2e-3
SCORES = ("ap50_mean_image", "ap50", "pq", "count_ratio")


def main(argv=None):
    parser = harness.argparse.ArgumentParser(description=__doc__,
                                             formatter_class=harness.argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("part", choices=["targets", "decoders", "empty", "cost"])
    add("names", nargs="*", help="targets, or folders of runs")
    add("--data", type=Path, default=harness.DATA, help="data folder [the shared DSB2018]")
    add("--split", choices=manifests.SPLITS, default="validation", help="that decoders is measured on [validation]")
    add("--steps", type=int, default=400, help="[400]")
    add("--seeds", type=int, default=1, help="trainings of each target, whose means are shown [1]")
    add("--images", type=int, default=8, help="of each kind, of empty [8]")
    add("--rounds", type=int, default=15, help="of cost [15]")
    add("--amp", choices=["auto", "bf16", "off"], default="auto", help="[auto]")
    args = parser.parse_args(argv)
    compute = choose_compute(amp=args.amp)
    print(f"`python {' '.join(harness.sys.argv)}`: {harness.machine(compute)}\n", flush=True)
    parts = {"targets": try_targets, "decoders": try_decoders, "empty": count_in_empty, "cost": show_cost}
    parts[args.part](args, compute)


def fields_of(folder, split):
    records, _ = manifests.find_records(folder)
    return data.read_fields([record for record in records if record.split == split])


# ------------------------------------------------------------------------------------------------------------- targets
def try_targets(args, compute):
    fields, val_fields = fields_of(args.data, "train"), fields_of(args.data, "validation")

    def rows():
        for name in args.names or NAMES:
            found = [train(name, seed, fields, val_fields, args.steps, compute) for seed in range(1, args.seeds + 1)]
            means = {key: statistics.fmean(scores[key] for scores in found) for key in found[0]}
            cells = [f"{means[key]:.3f}" for key in means if key != "seconds"]
            yield [name, *cells, f"{means['seconds']:.0f}"]

    print(f"{args.steps} steps of {BATCH} tiles of {TILE}, {args.seeds} seeds, {len(val_fields)} validation images\n")
    both = [f"{score}, {way}" for way in ("grown", "test.py") for score in ("AP@0.5 mean image", "AP@0.5", "count")]
    harness.table(["target", "IoU", "mean image IoU", *both, "seconds"], rows())


def train(name, seed, fields, val_fields, steps, compute):
    """The scores on the validation images after a short training on a target."""
    kind, *numbers = name.split(":")
    numbers = [float(number) for number in numbers]
    outputs = {"two": 2, "offset": 4}.get(kind, 3)
    torch.manual_seed(seed)
    model = network(outputs, compute)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=1e-2, fused=True)
    crops = data.Crops(fields, TILE, seed)
    if kind == "core":
        dedl.BORDER = numbers[0]
        crops.truths = [dedl.nucleus_classes(field.labels) for field in fields]
    else:                                                             # the target is made of the cropped labels
        crops.truths = [field.labels for field in fields]
    order = torch.Generator().manual_seed(seed)
    started = time.perf_counter()
    for step in range(steps):
        done = step / steps
        rate = (done + 0.01) / 0.21 if done < 0.2 else (1 + math.cos(math.pi * (done - 0.2) / 0.8)) / 2
        optimizer.param_groups[0]["lr"] = RATE * rate
        crops.epoch = step
        chosen = torch.randint(len(crops), (BATCH,), generator=order).tolist()
        images, truth = (torch.stack(parts) for parts in zip(*(crops[index] for index in chosen)))
        with compute.autocast():
            logits = model(compute.batch(images)).float()
        loss = loss_of(kind, numbers, logits, truth.to(compute.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - started
    model = fast.for_inference(model)
    usual = nuclei.describe(fields)
    found, counts = {grown: [], nuclei.separate: []}, []
    for field in val_fields:
        with torch.inference_mode(), compute.autocast():
            output = model(compute.batch(field.window()[None])).float()[0].cpu()
        mask, seeds = mask_and_seeds(kind, output)
        for decode, labels in found.items():
            labels.append(decode(mask, seeds, usual))
        counts.append(dedl.confusion(mask, field.mask))
    scores = dedl.segmentation_scores(torch.stack(counts))
    shown = {"seconds": seconds, "iou": scores["iou"], "mean_image_iou": scores["mean_image_iou"]}
    for decode, labels in found.items():
        of_nuclei = scores_of(labels, val_fields)
        shown |= {f"{key} {decode.__name__}": of_nuclei[key] for key in ("ap50_mean_image", "ap50", "count_ratio")}
    return shown


def scores_of(found, fields):
    """The scores of nuclei as objects, of label images (H, W)."""
    return dedl.nucleus_scores([dedl.match_nuclei(own, field.labels) for own, field in zip(found, fields)])


def loss_of(kind, numbers, logits, truth):
    """truth: the classes of core, else labels (N, H, W)."""
    if kind == "core":
        return F.cross_entropy(logits, truth, torch.tensor([1, 1, numbers[1]], device=logits.device))
    mask = (truth > 0).long()
    if kind == "two":
        return F.cross_entropy(logits, mask)
    if kind in ("touching", "border"):
        near = unlike(truth, int(numbers[0]), kind == "touching")
        return F.cross_entropy(logits, mask + mask * near, torch.tensor([1, 1, numbers[1]], device=logits.device))
    loss = F.cross_entropy(logits[:, :2], mask)
    if kind == "distance":
        return loss + numbers[0] * F.smooth_l1_loss(logits[:, 2], relative_depth(truth), beta=0.1)
    apart = F.smooth_l1_loss(logits[:, 2:], offsets(truth) / 8, reduction="none") * mask[:, None]
    return loss + numbers[0] * apart.sum() / mask.sum().clamp(min=1)


def mask_and_seeds(kind, output):
    if kind not in ("distance", "offset"):
        return nuclei.mask_and_cores(output.softmax(0)[1:])
    mask = output[1] > output[0]
    return mask, mask & (output[2] > 0.4 if kind == "distance" else (8 * output[2:]).norm(dim=0) < 3)


def unlike(labels, reach, nuclei_alone):
    """The pixels (N, H, W) within `reach` of another label, background included or not."""
    numbers = labels[:, None].float()
    lowest = torch.where(numbers > 0, numbers, torch.inf) if nuclei_alone else numbers
    largest = F.max_pool2d(numbers, 2 * reach + 1, 1, reach)
    smallest = -F.max_pool2d(-lowest, 2 * reach + 1, 1, reach)
    return ((largest > numbers) | (smallest < numbers))[:, 0]


def relative_depth(labels):
    """How deep each pixel (N, H, W) lies in its nucleus, as a part of the deepest, in rings of pixels."""
    numbers, depth = labels.float()[:, None], torch.zeros(labels.shape)
    while numbers.any():
        depth += numbers[:, 0] > 0
        largest, smallest = F.max_pool2d(numbers, 3, 1, 1), -F.max_pool2d(-numbers, 3, 1, 1)
        numbers = torch.where(largest == smallest, numbers, 0)
    key = labels + (labels.max() + 1) * torch.arange(len(labels))[:, None, None]
    deepest = torch.zeros(int(key.max()) + 1).scatter_reduce(0, key.flatten(), depth.flatten(), "amax")
    return depth / deepest[key].clamp(min=1)


def offsets(labels):
    """The way (N, 2, H, W) from each pixel of a nucleus to its centre, in pixels."""
    key = (labels + (labels.max() + 1) * torch.arange(len(labels))[:, None, None]).flatten()
    count = key.bincount().clamp(min=1)
    ways = []
    for place in torch.meshgrid(torch.arange(labels.shape[1]), torch.arange(labels.shape[2]), indexing="ij"):
        place = place.expand(labels.shape).flatten().double()
        ways.append(((key.bincount(place) / count)[key] - place).view(labels.shape))
    return torch.stack(ways, 1).float() * (labels > 0)[:, None]


# ------------------------------------------------------------------------------------------------------------ decoders
def try_decoders(args, compute):
    ways = {
        "connected parts": lambda mask, cores, usual: without_small(connected_parts(mask), usual),
        "distance transform, watershed": lambda mask, cores, usual: without_small(watershed(mask), usual),
        "cores, grown": grown,
        "test.py": nuclei.separate,
    }
    found = {name: [] for name in ways}                               # of each run, its scores
    for run in map(Path, args.names):
        config = runs.read_config(run)
        fields = fields_of(args.data if args.data != harness.DATA else config["data"], args.split)
        model = fast.for_inference(runs.load_best(run, models.build_segmenter, compute))
        both = [nuclei.mask_and_cores(prediction.predict(model, field, compute)) for field in fields]
        for name, decode in ways.items():
            started = time.perf_counter()
            labels = [decode(*own, config["nucleus"]) for own in both]
            milliseconds = 1000 * (time.perf_counter() - started) / len(fields)
            found[name].append(scores_of(labels, fields) | {"ms": milliseconds})

    def rows():
        for name, scores in found.items():
            means = {key: statistics.fmean(own[key] for own in scores) for key in scores[0]}
            yield [name, *(f"{means[key]:.3f}" for key in (*SCORES, "ap")), f"{means['ms']:.0f}"]

    print(f"{args.split}: {len(fields)} images, means of {len(args.names)} runs\n")
    harness.table(["decoder", "AP@0.5, mean image", "AP@0.5", "PQ", "count ratio", "AP 0.5 to 0.95", "ms an image"],
                  rows())


def watershed(mask):
    from scipy import ndimage
    from skimage import feature, segmentation
    depth = ndimage.gaussian_filter(ndimage.distance_transform_edt(mask.numpy()), 1)
    peaks = feature.peak_local_max(depth, min_distance=5, labels=mask.numpy().astype(int), exclude_border=False)
    markers = np.zeros(mask.shape, int)
    markers[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    return torch.from_numpy(segmentation.watershed(-depth, markers, mask=mask.numpy())).int()


def grown(mask, seeds, usual):
    """The connected parts of the seeds, grown inside the mask, and the parts of the mask without a seed."""
    labels = nuclei.grow(connected_parts(seeds), mask)
    others = mask & (labels == 0)
    labels[others] = connected_parts(others)[others] + labels.max()
    return without_small(labels, usual)


def without_small(labels, usual):
    return torch.where((labels.flatten().bincount() >= usual["smallest"])[labels], labels, 0)


# --------------------------------------------------------------------------------------------------------------- empty
def empty_images(rng, side=512):
    """{kind: an image (side, side) in which there is no nucleus}."""
    from scipy import ndimage
    down, right = np.mgrid[:side, :side] / side
    ramp = 10 + 20 * down + 10 * right ** 2
    noise = rng.normal(0, 1, (side, side))
    return {
        "one value": np.full((side, side), 10.0),
        "Gaussian noise": 10 + 2 * noise,
        "counted photons, 5 a pixel": rng.poisson(5, (side, side)),
        "noise, blurred by 1 pixel": 10 + ndimage.gaussian_filter(noise, 1),
        "noise, blurred by 3 pixels": 10 + ndimage.gaussian_filter(noise, 3),
        "gradient": ramp,
        "gradient and noise": ramp + 2 * noise,
    }


def count_in_empty(args, compute):
    rng = np.random.default_rng(0)
    images = [empty_images(rng) for _ in range(args.images)]
    found = {kind: [] for kind in images[0]}
    for run in map(Path, args.names):
        config = runs.read_config(run)
        model = fast.for_inference(runs.load_best(run, models.build_segmenter, compute))
        for image in images:
            for kind, pixels in image.items():
                own = np.float32(pixels)[None].repeat(config["setting"]["in_channels"], 0)
                field = manifests.Field(None, own, (), reading.find_limits(own))
                mask, cores = nuclei.mask_and_cores(prediction.predict(model, field, compute))
                found[kind].append(nuclei.separate(mask, cores, config["nucleus"]).max().item())
    print(f"{args.images} images of 512 x 512 pixels of each kind, {len(args.names)} runs\n")
    harness.table(["image", "nuclei found, mean", "most", "images with none"],
                  [[kind, f"{statistics.fmean(numbers):.1f}", max(numbers), f"{numbers.count(0)} of {len(numbers)}"]
                   for kind, numbers in found.items()])


# ---------------------------------------------------------------------------------------------------------------- cost
def show_cost(args, compute):
    images = compute.batch(torch.rand(4, 1, 256, 256))
    training, inference = {}, {}
    for classes in (2, 3):
        model = network(classes, compute)
        app = dedl.build_app("conv", 256, classes).to(compute.device)
        truth = torch.randint(0, classes, (4, 256, 256), device=compute.device)
        optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), dedl.app_optimizer(app)]
        ready = fast.for_inference(model)

        def step(model=model, app=app, truth=truth, optimizers=optimizers):
            harness.training_step(model, images, truth, compute, app)
            for optimizer in optimizers:
                optimizer.step()

        def predict(ready=ready):
            with torch.inference_mode(), compute.autocast():
                ready(images).float().softmax(1)

        training[classes] = step
        inference[classes] = predict
    rows = []
    for name, sides in (("training step", training), ("prediction", inference)):
        seconds = harness.in_turn(sides, args.rounds, compute.device)
        times = [f"{1000 * statistics.median(seconds[classes]):.0f} ms" for classes in sides]
        rows.append([name, *times, f"{100 * (harness.ratio(seconds, 3, 2) - 1):+.1f} %"])
    print(f"medians of {args.rounds} rounds\n")
    harness.table(["", "two classes", "three", "more"], rows)


def network(outputs, compute):
    """A U-Net of the default's depth, to be trained."""
    model = models.build_segmenter(classes=outputs, depth=4, decoder_channels=models.default_decoder_channels(4))
    return fast.speed_up(model.to(compute.device, memory_format=torch.channels_last))


if __name__ == "__main__":
    harness.process.command(main)
