"""How fast the loader makes augmented tiles, how fast the network takes them, and what inForm's large images cost.

    python benchmarks/loader.py                        on dsb2018 in ../shared/data, or on the built-in synthetic set
    python benchmarks/loader.py --data DIR --workers 4
"""
import statistics
import tempfile
import time
from pathlib import Path

import harness
import numpy as np
import torch
from torch.utils.data import DataLoader

import data
from images import manifests, reading, synthetic
from running import runs


def main(argv=None):
    parser = harness.parser(__doc__)
    parser.add_argument("--data", type=Path, help="data folder")
    parser.add_argument("--component", type=Path, metavar="FILE", help="a component_data.tif [one of synthetic images]")
    parser.add_argument("--workers", type=int, default=0, help="loader processes [0]")
    args = parser.parse_args(argv)
    compute = harness.start(args)
    folder = args.data or (harness.DATA if harness.DATA.is_dir() else runs.synthetic_folder())
    rows = []

    # 1. small images: read once, then cropped and augmented
    train = [record for record in manifests.find_records(folder)[0] if record.split == "train"]
    started = time.perf_counter()
    fields = data.read_fields(train)
    rows.append([f"reading {len(fields)} images of {folder.name}, once", f"{time.perf_counter() - started:.2f} s", ""])
    crops = data.Crops(fields, args.tile)
    channels = len(fields[0].image)
    model = harness.our_network("unet", "resnet18", args.depth, compute, channels).train()
    images, truth = harness.batch(args, compute)
    images = images.expand(-1, channels, -1, -1)

    def load(crops):
        crops.epoch += 1
        for _ in DataLoader(crops, args.batch, shuffle=True, num_workers=args.workers):
            pass

    seconds = harness.in_turn({"loader": lambda: load(crops),
                               "model": lambda: harness.training_step(model, images, truth, compute)},
                              args.rounds, compute.device)
    rates = {"loader": len(crops) / statistics.median(seconds["loader"]),
             "model": args.batch / statistics.median(seconds["model"])}
    rows.append([f"tiles of {args.tile} of {folder.name}", f"{rates['loader']:.0f} tiles/s",
                 f"{rates['loader'] / rates['model']:.0f}x what the network takes"])
    rows.append(["the network's forward and backward pass", f"{rates['model']:.1f} tiles/s", ""])

    # 2. a component file of full size, 1408 x 1876
    with tempfile.TemporaryDirectory() as temporary:
        file = args.component or Path(temporary) / "S_[1,2]_component_data.tif"
        if not args.component:  # synthetic images side by side; their zlib decodes faster than inForm's LZW
            stains, _, _ = synthetic.draw_field(np.random.default_rng(0), np.random.default_rng(1))
            synthetic.write_inform(file, "S", {name: np.tile(stain, (9, 9))[:1408, :1876]
                                               for name, stain in stains.items()})
        decoded = harness.in_turn({"": lambda: reading.read_image(file)}, args.rounds, compute.device)[""]
        image = reading.read_image(file)[0]
        found = harness.in_turn({"": lambda: reading.find_limits(image)}, args.rounds, compute.device)[""]
        labels = torch.from_numpy(image[0] > 1).int()
        field = manifests.Field(None, image, ("DAPI",), reading.find_limits(image), labels)
        size = f"{image.shape[1]} x {image.shape[2]}, {file.stat().st_size / 2 ** 20:.0f} MB"
        rows.append([f"component_data.tif of {size}: DAPI decoded",
                     f"{statistics.median(decoded) * 1000:.0f} ms", "once a run"])
        rows.append(["its percentiles", f"{statistics.median(found) * 1000:.0f} ms", "once a run"])
        for tile in sorted({args.tile, 480}):
            crops = data.Crops([field] * 4, tile)
            seconds = harness.in_turn({"": lambda crops=crops: load(crops)}, 3, compute.device)[""]
            rate = len(crops) / statistics.median(seconds)
            rows.append([f"tiles of {tile} from such images", f"{rate:.0f} tiles/s", ""])
    print(f"Loader alone, {args.workers} workers, batch {args.batch}; U-Net/resnet18 of depth {args.depth}; median of "
          f"{args.rounds} rounds\n")
    harness.table(["what", "cost", "beside the network"], rows)


if __name__ == "__main__":
    harness.process.command(main)
