"""The scripts as a user runs them: what they write, what they print, how they end."""
import csv
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED, TRAIN, needs
from PIL import Image

import data
import dedl
import test
import train
from images import manifests, reading
from running import prediction, runs
from running.compute import Compute

SMALL = (*TRAIN, "--encoder", "test_resnet")

def test_a_run_leaves_what_the_contract_names(finished):
    run, folder = finished
    config = json.loads((run / "config.json").read_text())
    assert config["seed"] == 77 and config["weights_used"] == "none" and config["data"] == str(folder)
    assert config["images"] == {"train": 4, "validation": 2, "test": 3} and config["versions"]["torch"]
    with open(run / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1 and list(rows[0])[:6] == ["epoch", "train_loss", "val_loss", "val_iou", "lr", "seconds"]
    for name in ("best.pt", "last.pt"):
        torch.load(run / name, weights_only=True)
    with Image.open(run / "samples.png") as sheet:
        assert sheet.size[0] > 150


def test_measured_iou_is_that_of_the_saved_masks(finished, script, tmp_path):
    run, folder = finished
    status, out, _ = script(test, run, "--save-masks", tmp_path / "masks", "--device", "cpu")
    assert status == 0
    scores = json.loads((run / "test.json").read_text())
    counts = []
    for record in manifests.find_records(folder)[0]:
        if record.split == "test":
            found = np.asarray(Image.open(tmp_path / "masks" / f"{record.image.stem}.png"))
            truth = reading.read_mask(record.mask) > 0
            assert found.shape == truth.shape and found.dtype == np.uint8 and set(np.unique(found)) <= {0, 255}
            counts.append([(found.astype(bool) & truth).sum(), (found.astype(bool) & ~truth).sum(),
                           (~found.astype(bool) & truth).sum(), (~found.astype(bool) & ~truth).sum()])
    tp, fp, fn, _ = np.sum(counts, 0)
    assert scores["iou"] == pytest.approx(tp / (tp + fp + fn), abs=1e-4)
    assert scores["mean_image_iou"] == pytest.approx(np.mean([c[0] / sum(c[:3]) for c in counts]), abs=1e-4)
    assert scores["images"] == len(counts) == len(list((tmp_path / "masks").glob("*_labels.tif"))) == 3
    for name in ("iou", "dice", "pixel_accuracy", "precision", "recall", "mean_image_iou"):
        assert f"{scores[name]:.4f}" in out
    assert (run / "test.png").is_file()
    assert script(test, run, "--split", "validation")[0] == 0 and (run / "validation.json").is_file()


def test_app_is_nowhere_in_the_saved_network(finished, tiny, tmp_path):
    run, _ = finished
    sizes, names = {(run / "best.pt").stat().st_size}, {tuple(torch.load(run / "best.pt")["model"])}
    for app in ("none", "linear"):
        train.main(["--data", str(tiny), "--out", str(tmp_path / app), *TRAIN, "--app", app])
        sizes.add((tmp_path / app / "best.pt").stat().st_size)
        names.add(tuple(torch.load(tmp_path / app / "best.pt")["model"]))
    assert len(sizes) == len(names) == 1


def test_best_is_the_epoch_with_the_best_mean_image_iou(tiny, tmp_path, monkeypatch):
    ious = iter([0.5, 0.9, 0.1, 0.8, 0.7])

    def measure(model, fields, *_):
        iou = next(ious)
        of_large = 1 - iou / 4                                        # which alone decides the pooled IoU
        labels = [field.labels for field in fields]
        matched = [dedl.match_nuclei(own, own) for own in labels]
        counts = torch.tensor([[iou, 1 - iou, 0, 0], [1000 * of_large, 1000 * (1 - of_large), 0, 0]])
        return prediction.Measured(counts, [], labels, matched, 1.0)

    monkeypatch.setattr(prediction, "measure", measure)
    train.main(["--data", str(tiny), "--out", str(tmp_path / "run"), *SMALL, "--nuclei", "mask", "--epochs", "9",
                "--patience", "2"])
    best, last = (torch.load(tmp_path / "run" / name) for name in ("best.pt", "last.pt"))
    score = "val_mean_image_iou"
    assert best["epoch"] == 2 and best[score] == pytest.approx(0.8375)
    pooled = [row["val_iou"] for row in last["state"]["history"]]
    assert len(pooled) == 4 and max(pooled) == pooled[2]
    assert last["state"]["best"] == best[score] and last["state"]["stale"] == 2
    assert not torch.equal(best["model"]["head.weight"], last["model"]["head.weight"])


def test_weights_of_the_loss_reach_the_network(tiny, tmp_path):
    heads = []
    for i, flags in enumerate([(), ("--app-weight", "0"), ("--class-weights", "1,9")]):
        train.main(["--data", str(tiny), "--out", str(tmp_path / str(i)), *SMALL, *flags])
        heads.append(torch.load(tmp_path / str(i) / "last.pt")["model"]["head.weight"])
    assert not torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_the_paper_recipe_and_its_schedule():
    args = train.parse_args(["--data", "x", "--recipe", "paper"])
    assert (args.recipe, args.lr, args.weight_decay, args.batch_size, args.epochs, args.patience, args.class_weights,
            args.tile, args.steps, args.depth, args.app) == (
                "paper", 3.6e-4, 1e-5, 16, 50, 0, "auto", 480, 0, 3, "conv")
    rates = [train.learning_rate(args, epoch) for epoch in (0, 0.9, 25, 50, 80)]
    assert rates == pytest.approx([3.6e-4, 3.6e-4, 3.5e-4, 3.4e-4, 3.4e-4])
    short = train.parse_args(["--data", "x", "--epochs", "10"])
    rates = [train.learning_rate(short, epoch / 100) for epoch in range(1001)]
    assert max(rates) == pytest.approx(2e-3, rel=0.01) and rates.index(max(rates)) == pytest.approx(50, abs=2)
    assert rates[0] < 4e-4 and rates[-1] < 1e-6 and np.abs(np.diff(rates)).max() < 2e-4
    assert (short.tile, short.steps, short.depth, short.batch_size, short.recipe) == (256, 120, 4, 4, "short")
    assert train.parse_args([]).steps == 100 and train.parse_args(["--recipe", "short"]).tile == 256


def read_metrics(run):
    with open(run / "metrics.csv") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def test_resume_in_other_states(tiny, script, tmp_path):
    run = tmp_path / "run"
    assert script(train, "--data", tiny, "--out", run, *SMALL, "--limit-train", 1)[0] == 0
    config = json.loads((run / "config.json").read_text())
    for name in ("last.pt", "best.pt", "metrics.csv"):
        (run / name).unlink()  # as after an interruption in the first epoch
    assert script(train, "--out", run, "--resume")[0] == 0 and len(read_metrics(run)) == 1
    assert json.loads((run / "config.json").read_text())["recipe"] == config["recipe"]
    assert script(train, "--out", run, "--resume", "--epochs", 2, "--amp", "bf16")[0] == 0  # as on another machine
    assert len(read_metrics(run)) == 2


def test_runs_are_named_numbered_and_found(tiny, script):
    for _ in range(2):
        assert script(train, "--data", tiny, *SMALL)[0] == 0
    names = sorted(path.name for path in runs.RUNS.iterdir())
    assert names == ["seg-tiny-unet-test_resnet-app_conv-seed77", "seg-tiny-unet-test_resnet-app_conv-seed77-2"]
    assert f"{runs.RUNS / names[1]} on the test split" in script(test)[1]


def test_training_learns(tiny, script, tmp_path):
    """Enough steps at a small size to find bright discs: a broken loss, mask or schedule does not get there."""
    status, _, _ = script(train, "--data", tiny, *SMALL, "--epochs", 20, "--lr", 1e-2, "--out", tmp_path / "run")
    assert status == 0
    script(test, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "test.json").read_text())["iou"] > 0.75


@pytest.mark.parametrize("flags", [("--arch", "unetpp", "--depth", "4"), ("--encoder", "efficientnet_b0"),
                                   ("--app", "linear", "--app-activation", "relu"), ("--amp", "bf16")])
def test_flags_train(tiny, script, tmp_path, flags):
    status, _, _ = script(train, "--data", tiny, "--out", tmp_path / "run", *TRAIN, *flags)
    assert status == 0 and script(test, tmp_path / "run")[0] == 0


def test_limit_train_uses_so_many(tiny, script, tmp_path):
    script(train, "--data", tiny, "--out", tmp_path / "run", *SMALL, "--limit-train", 2)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train_images_used"] == 2


def test_early_stopping(tiny, script, tmp_path):
    status, _, _ = script(train, "--data", tiny, "--out", tmp_path / "run", *SMALL, "--epochs", 9, "--patience", 1,
                          "--lr", 1e-12)
    assert status == 0 and len(read_metrics(tmp_path / "run")) < 9


@pytest.mark.slow
@needs("inform")
def test_real_tissue_trains_and_tests(script, tmp_path):
    run = tmp_path / "run"
    status, _, _ = script(train, "--data", SHARED / "inform", "--out", run, *TRAIN, "--tile", 256, "--limit-train", 1,
                          "--encoder", "test_resnet", "--depth", 5)
    assert status == 0 and json.loads((run / "config.json").read_text())["setting"]["in_channels"] == 3
    assert script(test, run, "--split", "validation")[0] == 0
    assert json.loads((run / "validation.json").read_text())["images"] == 1


# -------------------------------------------------------------------------------------------------------------- tiles
@pytest.mark.parametrize("overlap", [0, 5, 8, 12])
@pytest.mark.parametrize("size, tile", [(10, 16), (16, 16), (17, 16), (100, 32), (1408, 480), (1876, 480)])
def test_tiles_cover_the_image_and_their_weights_sum_to_one(size, tile, overlap):
    tiles = prediction.tiles_along(size, tile, overlap)
    total = torch.zeros(size)
    for place, weights in tiles:
        assert 0 <= place.start and place.stop <= size and len(weights) == place.stop - place.start <= tile
        total[place] += weights
    torch.testing.assert_close(total, torch.ones(size))
    for (place, weights), (following, _) in zip(tiles, tiles[1:]):
        assert place.start < following.start <= place.stop - overlap
        if overlap:  # no step where the next tile begins
            assert weights.diff().abs().max() <= 2.1 / overlap and weights[-1] < 0.2
    assert len(tiles) == (1 if size <= tile else -(-(size - overlap) // (tile - overlap)))


def field_of(*shape):
    """An image of values in [0, 1], which are not normalised any further, with a mask."""
    limits = np.zeros((shape[0], 1, 1), np.float32), np.ones((shape[0], 1, 1), np.float32)
    image = np.random.default_rng(shape).random(shape, np.float32)
    mask = torch.rand(shape[1:]) > 0.5
    return manifests.Field(None, image, ("grey",), limits, mask.int())


CPU = Compute(torch.device("cpu"), "off")


def probability(field, model, **how):
    return prediction.predict(model, field, CPU, **how)[0]


class Logit(torch.nn.Module):
    """A network whose probability of the nucleus is the image."""

    def forward(self, image):
        return torch.cat([torch.zeros_like(image), image.logit(1e-6)], 1)


def test_prediction_puts_tiles_where_they_belong():
    field = field_of(1, 70, 91)
    image = field.window()[0]
    for tile, overlap in ((16, 0), (16, 5), (32, 20), (80, 8), (128, 8)):
        for tta in (False, True):
            found = probability(field, Logit(), tile=tile, overlap=overlap, tta=tta)
            torch.testing.assert_close(found, image, atol=1e-5, rtol=0)


def test_tiles_are_blended_without_seams():
    class Number(torch.nn.Module):
        """Each tile gives something else: the worst that tiles can do."""
        count = 0

        def forward(self, image):
            self.count += 1
            return torch.cat([0 * image, 0 * image + 40 * (-1) ** self.count], 1)

    found = probability(field_of(1, 64, 200), Number(), tile=64, overlap=32)
    assert found.min() < 1e-6 and found.max() > 1 - 1e-6 and found.diff(dim=1).abs().max() < 1.6 / 32


def test_tta_puts_the_eight_ways_back():
    class Ramp(torch.nn.Module):
        """Half of the image, brighter to the right: the ramps of all eight ways together are level."""

        def forward(self, image):
            return Logit()(image / 2 + torch.linspace(0, 0.5, image.shape[-1]))

    field = field_of(1, 24, 31)
    torch.testing.assert_close(probability(field, Ramp(), tta=True), field.window()[0] / 2 + 0.25, atol=1e-5, rtol=0)


def test_scores_of_images_of_several_sizes():
    fields = [field_of(1, *size) for size in [(16, 20), (24, 20), (16, 20)]]

    class Threshold(torch.nn.Module):
        def forward(self, images):
            return torch.cat([1 - images, images], 1)

    measured = prediction.measure(Threshold(), fields, {"median_diameter": 5, "smallest": 1}, CPU, [1.0, 1.0])
    sums = 0
    for field, probability, count in zip(fields, measured.probabilities, measured.counts, strict=True):
        image = field.window()
        torch.testing.assert_close(probability, torch.sigmoid(2 * image - 1))
        assert torch.equal(count, dedl.confusion(image[0] > 0.5, field.mask))
        logits = torch.cat([1 - image, image])[None]
        sums += torch.nn.functional.cross_entropy(logits, field.mask[None].long(), reduction="sum").item()
    assert measured.loss == pytest.approx(sums / sum(field.mask.numel() for field in fields), rel=1e-4)


def test_tta_is_reported_and_recorded(finished, script, tmp_path):
    status, out, _ = script(test, finished[0], "--tta", "--save-masks", tmp_path / "masks")
    assert status == 0 and "with --tta" in out and json.loads((finished[0] / "test.json").read_text())["tta"] is True
    assert len(list((tmp_path / "masks").iterdir())) == 9


# ------------------------------------------------------------------------------------------------------- the project
def test_the_commands_as_processes(finished):
    """Help with defaults, and the one line on stderr, from the shell."""
    def run(*command):
        return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True,
                              env={**os.environ, "COLUMNS": "200"})
    help_text = run("train.py", "--help")
    assert help_text.returncode == 0 and "[resnet18]" in help_text.stdout
    wrong = run("train.py", "--data", "/nowhere/at/all")
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr == "error: /nowhere/at/all: no such folder (--data)\n"


def test_readme_and_ci_name_the_same_commands():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    command = "-r requirements.txt -r tests/requirements.txt && python -m pytest tests"
    assert command in readme and command in ci
    assert "pip install -r requirements.txt && python train.py --task seg" in readme
    assert not re.search("SYN_|DSB_|CLS_", readme)  # no figure is still to be filled in


def test_class_weights_follow_the_data(tiny):
    fields = data.read_fields([r for r in manifests.find_records(tiny)[0] if r.split == "train"])
    share = np.mean(np.concatenate([f.mask.numpy().ravel() for f in fields]))
    assert train.segmentation_weights("auto", fields, 2) == pytest.approx([share, 1 - share])
    assert train.segmentation_weights("published", fields, 2) == list(dedl.PUBLISHED_CLASS_WEIGHTS.values())
    assert train.segmentation_weights("equal", fields, 2) == [1, 1]
    assert train.segmentation_weights([1, 2], fields, 3) == [1, 2, 2]
    assert train.segmentation_weights([1, 2, 3], fields, 3) == [1, 2, 3]
