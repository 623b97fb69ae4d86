"""StarDist and nnU-Net after so many minutes of training from random weights, on the images that minutes.py has.

Each tool has an environment of its own, in which this file runs:

    python benchmarks/other_tools.py prepare FOLDER             ours: the images, as the tools read them

    python -m venv stardist && stardist/bin/pip install stardist tensorflow-cpu tifffile
    stardist/bin/python benchmarks/other_tools.py stardist FOLDER --minutes 8

    python -m venv nnunet && nnunet/bin/pip install nnunetv2
    nnunet/bin/python benchmarks/other_tools.py nnunet FOLDER --minutes 8

    python benchmarks/other_tools.py score FOLDER               ours again: measures what they found

stardist: StarDist 2D as its example trains it (32 rays, grid 2, tiles of 256, batch 4, Adam 3e-4; flips, turns, changes
of intensity), its thresholds then optimised on the validation images.
nnunet: nnU-Net v2's 2D network, preprocessing, augmentation, loss and SGD, its poly schedule over the minutes instead
of 250,000 steps; batches of 4 tiles of 256 where it plans 18 for a GPU. It learns our three classes, as its authors
advise to tell objects apart, and our code takes them apart.

Only training counts, with the drawing of tiles: not reading, preprocessing, validation or prediction. Images are those
that train.py sees, with intensities in [0, 1] by the percentiles 1 and 99.8, as StarDist's example has them.
"""
import argparse
import json
import os
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
SPLITS = ("train", "validation", "test")
NNUNET = "Dataset001_nuclei"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=["prepare", "stardist", "nnunet", "score"])
    add("folder", type=Path)
    add("--data", type=Path, default=HERE.parents[1] / "shared" / "data" / "dsb2018", help="to prepare [%(default)s]")
    add("--minutes", type=float, default=8, help="[8]")
    add("--seed", type=int, default=1, help="[1]")
    args = parser.parse_args()
    {"prepare": prepare, "stardist": stardist, "nnunet": nnunet, "score": score}[args.what](args)


# ------------------------------------------------------------------------------------------------- in our environment
def read(data_folder):
    """Return {split: fields} of a data folder."""
    import harness  # noqa: F401, finds the project

    import data
    from images import manifests
    records, _ = manifests.find_records(data_folder)
    return {split: data.read_fields([record for record in records if record.split == split]) for split in SPLITS}


def prepare(args):
    """Write each image and its label image as TIFF by a number, and its classes and a table of the images for
    nnU-Net."""
    found = read(args.data)
    import tifffile

    import dedl
    raw = args.folder / "nnunet_raw" / NNUNET
    folders = {name: args.folder / name for name in ("images", "labels")}
    folders |= {name: raw / name for name in ("imagesTr", "labelsTr")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    names = {}
    for split, fields in found.items():
        names[split] = [f"{split}{i:03d}" for i in range(len(fields))]
        for name, field in zip(names[split], fields):
            image = field.window()[0].numpy()
            tifffile.imwrite(folders["images"] / f"{name}.tif", image)
            tifffile.imwrite(folders["labels"] / f"{name}.tif", field.labels.numpy().astype(np.int32))
            if split != "test":
                tifffile.imwrite(folders["imagesTr"] / f"{name}_0000.tif", image)
                tifffile.imwrite(folders["labelsTr"] / f"{name}.tif", dedl.nucleus_classes(field.labels).numpy())
    (args.folder / "data.json").write_text(json.dumps({"data": str(args.data), "names": names}))
    (raw / "dataset.json").write_text(json.dumps({
        "channel_names": {"0": "DAPI"},
        "labels": {"background": 0, "nucleus": 1, "border": 2},
        "numTraining": len(names["train"]) + len(names["validation"]),
        "file_ending": ".tif",
    }))


def score(args):
    """Print how well the nuclei are found that the tools wrote in FOLDER/<tool>, a label image or classes an image."""
    import harness

    import dedl
    from running import nuclei
    written = json.loads((args.folder / "data.json").read_text())
    found = read(Path(written["data"]))
    import tifffile
    import torch
    usual = nuclei.describe(found["train"])
    rows = []
    for tool in sorted(path.parent.name for path in args.folder.glob("*/steps.txt")):
        for split in ("validation", "test"):
            counts, matched = [], []
            for name, field in zip(written["names"][split], found[split]):
                labels = torch.from_numpy(tifffile.imread(args.folder / tool / f"{name}.tif").astype(np.int32))
                if tool.startswith("nnunet"):
                    labels = nuclei.separate(labels > 0, labels == 1, usual)
                counts.append(dedl.confusion((labels > 0)[field.known], field.mask[field.known]))
                matched.append(dedl.match_nuclei(labels, field.labels, field.known))
            scores = dedl.segmentation_scores(torch.stack(counts)) | dedl.nucleus_scores(matched)
            steps = (args.folder / tool / "steps.txt").read_text()
            shown = ("iou", "mean_image_iou", "ap50", "ap50_mean_image")
            rows.append([tool, split, steps, *(f"{scores[key]:.3f}" for key in shown)])
    harness.table(["", "images", "steps of 4 tiles", "IoU", "mean image IoU", "AP@0.5", "AP@0.5, mean image"], rows)


# ------------------------------------------------------------------------------------------------------- in the tools'
def load(args):
    """Return {split: (images, label images)}, and the images' names."""
    import tifffile
    names = json.loads((args.folder / "data.json").read_text())["names"]
    kinds = ("images", "labels")
    return {split: tuple([tifffile.imread(args.folder / kind / f"{name}.tif") for name in names[split]]
                         for kind in kinds) for split in SPLITS}, names


def save(args, tool, names, found, steps):
    """Write what a tool found of images, an array each, and how many steps it trained."""
    import tifffile
    folder = args.folder / f"{tool}-{args.minutes:g}min-seed{args.seed}"
    folder.mkdir(exist_ok=True)
    for name, labels in zip(names, found):
        tifffile.imwrite(folder / f"{name}.tif", labels)
    (folder / "steps.txt").write_text(str(steps))


def stardist(args):
    import keras
    from stardist.models import Config2D, StarDist2D

    class Minutes(keras.callbacks.Callback):
        """Counts the time of training batches but the first, which builds the graph, with the drawing of their tiles,
        and ends training after args.minutes."""
        seconds = 0.0
        steps = 0

        def on_epoch_begin(self, epoch, logs=None):
            self.started = time.perf_counter()

        def on_train_batch_end(self, batch, logs=None):
            now = time.perf_counter()
            if self.steps:
                self.seconds += now - self.started
            self.started = now
            self.steps += 1
            self.model.stop_training = self.seconds > 60 * args.minutes

    def augment(image, labels):
        turns, mirrored = random.integers(4), random.random() < 0.5
        image, labels = np.rot90(image, turns), np.rot90(labels, turns)
        if mirrored:
            image, labels = image[::-1], labels[::-1]
        image = image * random.uniform(0.6, 2) + random.uniform(-0.2, 0.2)
        return image + 0.02 * random.uniform(0, 1) * random.normal(0, 1, image.shape), labels

    held, names = load(args)
    random = np.random.default_rng(args.seed)
    keras.utils.set_random_seed(args.seed)
    config = Config2D(n_rays=32, grid=(2, 2), n_channel_in=1, train_tensorboard=False)
    model = StarDist2D(config, name=f"model-{args.minutes:g}min-seed{args.seed}", basedir=str(args.folder / "stardist"))
    model.prepare_for_training()
    clock = Minutes()
    model.callbacks.append(clock)
    model.train(*held["train"], held["validation"], augmenter=augment, seed=args.seed, epochs=10 ** 4)
    model.optimize_thresholds(*held["validation"])
    found = [model.predict_instances(image)[0].astype(np.int32)
             for split in ("validation", "test") for image in held[split][0]]
    save(args, "stardist", names["validation"] + names["test"], found, clock.steps)


def nnunet(args):
    for kind in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{kind}"] = str((args.folder / f"nnunet_{kind}").resolve())
    import torch
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    class MinutesTrainer(nnUNetTrainer):
        def do_split(self):
            return names["train"], names["validation"]

        def run_training(self):
            self.on_train_start()
            self.network.train()
            seconds = self.steps = 0
            while seconds < 60 * args.minutes:
                started = time.perf_counter()
                done = seconds / 60 / args.minutes
                self.optimizer.param_groups[0]["lr"] = self.initial_lr * (1 - done) ** 0.9
                self.train_step(next(self.dataloader_train))
                seconds += time.perf_counter() - started
                self.steps += 1

    held, names = load(args)
    torch.manual_seed(args.seed)
    np.random.seed(args.seed)
    preprocessed = Path(os.environ["nnUNet_preprocessed"]) / NNUNET
    plans_file = preprocessed / "nnUNetPlans.json"
    if not plans_file.is_file():
        extract_fingerprints([1], num_processes=2)
        plan_experiments([1])
        preprocess([1], configurations=("2d",), num_processes=(2,))
    plans = json.loads(plans_file.read_text())
    print("planned:", {name: plans["configurations"]["2d"][name] for name in ("batch_size", "patch_size")})
    plans["configurations"]["2d"] |= {"batch_size": 4, "patch_size": [256, 256]}
    plans["continue_training"] = False
    trainer = MinutesTrainer(plans, "2d", 0, json.loads((preprocessed / "dataset.json").read_text()),
                             torch.device("cpu"))
    os.environ["nnUNet_n_proc_DA"] = "0"  # tiles are drawn in the process that trains, as ours are
    trainer.run_training()
    trainer.set_deep_supervision_enabled(False)
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    predictor.manual_initialization(trainer.network, trainer.plans_manager, trainer.configuration_manager,
                                    [trainer.network.state_dict()], trainer.dataset_json, "MinutesTrainer",
                                    trainer.inference_allowed_mirroring_axes)
    found = [predictor.predict_single_npy_array(image[None, None], {"spacing": (999, 1, 1)})[0].astype(np.uint8)
             for split in ("validation", "test") for image in held[split][0]]
    save(args, "nnunet", names["validation"] + names["test"], found, trainer.steps)


if __name__ == "__main__":
    main()
