"""Memory and time that test.py takes for one large image.

    python benchmarks/large_field.py RUN [--side 20000] [--kind uint8|uint16|float32] [--tiled] [--tta]
        [--probabilities]

Images of the run's data, put side by side in a single-page TIFF in a temporary folder (deflate; float32 uncompressed;
--tiled: deflate in tiles of 512), are predicted by `python test.py RUN --images`, in a process of its own. Shown is how
much memory it has at most, and how much of a file's pages mapped into memory, which the system takes back when it needs
to.
"""
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness
import numpy as np
import tifffile

from images import manifests, reading
from running import runs
from running.compute import choose_compute


def main(argv=None):
    parser = harness.argparse.ArgumentParser(description=__doc__,
                                             formatter_class=harness.argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", type=Path, help="folder of a trained segmentation of one channel")
    add("--side", type=int, default=20000, help="pixels [%(default)s]")
    add("--kind", choices=["uint8", "uint16", "float32"], default="uint8", help="of its pixels [%(default)s]")
    add("--tiled", action="store_true", help="deflate in tiles of 512 x 512")
    add("--tta", action="store_true")
    add("--probabilities", action="store_true", help="write the probability map too")
    args = parser.parse_args(argv)
    config = runs.read_config(args.run)
    records, _ = manifests.find_records(config["data"], config["seed"])
    images = [reading.read_image(record.image)[0][0] for record in records[:200]]
    side = min(min(image.shape) for image in images)
    rng = np.random.default_rng(0)
    field = np.empty((args.side, args.side), args.kind)
    for y in range(0, args.side, side):
        for x in range(0, args.side, side):
            target = field[y:y + side, x:x + side]
            target[:] = images[rng.integers(len(images))][:target.shape[0], :target.shape[1]]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        plain = args.kind == "float32" and not args.tiled
        tifffile.imwrite(folder / "large.tif", field, compression=None if plain else "zlib",
                         tile=(512, 512) if args.tiled else None)
        del field
        shutil.copytree(args.run, folder / "run", ignore=shutil.ignore_patterns("last.pt"))
        flags = (["--tta"] if args.tta else []) + (["--save-probabilities", folder / "p"] if args.probabilities else [])
        started = time.perf_counter()
        test = subprocess.Popen([sys.executable, harness.ROOT / "test.py", folder / "run", "--images",
                                 folder / "large.tif", *flags])
        peak = {"RssAnon": 0, "RssFile": 0}
        while test.poll() is None:
            now = dict(re.findall(r"(Rss\w+):\s+(\d+) kB", Path(f"/proc/{test.pid}/status").read_text()))
            peak = {name: max(most, int(now.get(name, 0))) for name, most in peak.items()}
            time.sleep(0.2)
        seconds = time.perf_counter() - started
        print((folder / "run" / "predictions" / "predictions.csv").read_text())
    print(f"`python {' '.join(['benchmarks/large_field.py', args.run.name, *sys.argv[2:]])}`: "
          f"{harness.machine(choose_compute())}\n"
          f"{args.side} x {args.side} {args.kind}: at most {peak['RssAnon'] / 2 ** 20:.2f} GiB of memory, and "
          f"{peak['RssFile'] / 2 ** 20:.2f} GiB of mapped files, {seconds / 60:.1f} min")


if __name__ == "__main__":
    harness.process.command(main)
