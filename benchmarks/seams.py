"""How much the prediction of an image depends on where tiles fall.

    python benchmarks/seams.py RUN [--data DIR] [--tile 512] [--overlaps 0 32 64 128 256]

A trained run predicts the largest of its validation images, mirrored on to --side, several times: the grid of tiles is
moved by cutting some rows and columns off. If the tiles did not matter, the same pixels would get the same probability
each time. Shown is by how much they do not: the mean and the largest difference of the nucleus probability to the mean
over the grids, the share of pixels whose class changes with the grid, and the jump across the borders of tiles, as a
ratio to that between any two neighbouring pixels (1: no seam to be seen); and what overlapping costs, the pixels that
are predicted for each pixel of the image.
"""
import harness
import numpy as np
import torch

import data
import models
from images import manifests
from networks import fast
from running import prediction, runs
from running.compute import choose_compute


def enlarged(image, side):
    """The image (C, H, W) mirrored back and forth, side x side pixels."""
    while min(image.shape[1:]) < side:
        image = torch.cat([image, image.flip(1)], 1)
        image = torch.cat([image, image.flip(2)], 2)
    return image[:, :side, :side]


@torch.inference_mode()
def probabilities(model, image, compute, tile, overlap):
    limits = np.float32(0), np.float32(1)                             # the image is normalised already
    field = manifests.Field(None, image.numpy(), (), limits)
    return prediction.predict(model, field, compute, tile=tile, overlap=overlap).sum(0)           # (H, W)


def work(side, tile, overlap):
    return (sum(len(weights) for _, weights in prediction.tiles_along(side, tile, overlap)) / side) ** 2


def jumps(probability, tile, overlap):
    """Mean |difference| of neighbouring columns where a tile begins or ends, and of all columns."""
    size = probability.shape[1]
    tiles = prediction.tiles_along(size, tile, overlap)
    borders = sorted({edge for place, _ in tiles for edge in (place.start, place.stop) if 0 < edge < size})
    difference = probability.diff(dim=1).abs().mean(0)                                            # (W - 1,)
    return difference[[edge - 1 for edge in borders]].mean().item(), difference.mean().item()


def main(argv=None):
    parser = harness.argparse.ArgumentParser(description=__doc__,
                                             formatter_class=harness.argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", type=harness.Path, help="folder of a trained segmentation")
    add("--data", type=harness.Path, help="data folder [the run's own]")
    add("--fields", type=int, default=2, help="[%(default)s]")
    add("--side", type=int, default=1400, help="pixels [%(default)s]")
    add("--tile", type=int, default=512, help="[%(default)s]")
    add("--overlaps", type=int, nargs="+", default=[0, 32, 64, 128, 256], help="%(default)s")
    add("--shifts", type=int, default=4, help="grids [%(default)s]")
    args = parser.parse_args(argv)
    compute = choose_compute()
    print(f"`python benchmarks/seams.py {args.run.name} --side {args.side} --tile {args.tile}`: "
          f"{harness.machine(compute)}\n")
    config = runs.read_config(args.run)
    model = fast.for_inference(runs.load_best(args.run, models.build_segmenter, compute))
    records, _ = manifests.find_records(args.data or config["data"], config["seed"])
    channels = data.stains(config)
    fields = data.read_fields([record for record in records if record.split == "validation"], channels)
    fields.sort(key=lambda field: field.mask.numel())
    images = [enlarged(field.window(), args.side) for field in fields[-args.fields:]]
    most = args.side // 4                                             # rows and columns that are cut off
    margin = most + 64                                                # from here on all see as far
    print("| overlap | mean difference | largest | class changes | jump at borders | work |\n" + "|---" * 6 + "|")
    for overlap in args.overlaps:
        differences, changes, at_border, anywhere = [], [], 0.0, 0.0
        for image in images:
            found = []
            for number in range(args.shifts):
                cut = round(number * most / max(1, args.shifts - 1))
                whole = probabilities(model, image[:, cut:, cut:], compute, args.tile, overlap)
                border, other = jumps(whole, args.tile, overlap)
                at_border, anywhere = at_border + border, anywhere + other
                found.append(whole[margin - cut:, margin - cut:])
            found = torch.stack(found)                                                            # (grids, H, W)
            differences.append((found - found.mean(0)).abs())
            changes.append(((found > 0.5).any(0) & (found <= 0.5).any(0)).float().mean())
        differences = torch.stack(differences)
        print(f"| {overlap} | {differences.mean():.5f} | {differences.max():.3f} | "
              f"{100 * torch.stack(changes).mean():.3f} % | {at_border / anywhere:.2f} | "
              f"{work(args.side, args.tile, overlap):.2f} |", flush=True)


if __name__ == "__main__":
    harness.process.command(main)
