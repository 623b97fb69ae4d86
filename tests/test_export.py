"""test.py --export: what is written works in a process without this project, at every size and batch."""
import subprocess
import sys

import pytest
import torch

import models
import test
from networks import fast
from running import runs
from running.compute import Compute

CPU = Compute(torch.device("cpu"), "off")
SHAPES = [(1, 16, 16), (3, 37, 53), (1, 64, 96), (2, 17, 130)]
LOAD = """
import sys, torch
file, images = sys.argv[1:]
exported = torch.export.load(file).module()
torch.save([exported(image) for image in torch.load(images)], images)
assert not {"models", "blocks", "timm"} & set(sys.modules)
"""


def untrained(folder, arch, depth, encoder="test_efficientnet", channels=1):
    """A segmentation run of random weights, with statistics in its BatchNorms that are no 0 and 1."""
    torch.manual_seed(0)
    setting = dict(arch=arch, encoder=encoder, in_channels=channels, classes=2, depth=depth,
                   decoder_channels=[16, 12, 8, 8, 8][:depth])
    model = models.build_segmenter(**setting)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
    folder.mkdir()
    runs.save_checkpoint({"setting": setting, "model": model.state_dict()}, folder / "best.pt")
    runs.save_json(dict(task="seg", folds=1, data="x", seed=1, recipe="short", rows="", device="cpu", amp="off",
                        setting=setting, weights_used="none", channel="DAPI", channels=["DAPI", "CD4"][:channels],
                        nucleus=["any"]),
                   folder / "config.json")
    return folder


def network(run):
    return fast.for_inference(runs.load_best(run, models.build_segmenter, CPU))


def elsewhere(file, images, folder):
    """The logits that a plain Python gives for images, which knows of torch and the file alone."""
    torch.save(images, folder / "images.pt")
    done = subprocess.run([sys.executable, "-I", "-c", LOAD, file.resolve(), folder / "images.pt"], cwd=folder,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "images.pt")


def assert_same(found, expected):
    for ours, own in zip(found, expected):
        assert ours.shape == own.shape and (ours - own).abs().max() <= 1e-4 * max(1, own.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("arch, depth, encoder", [
    pytest.param("unet", 3, "test_efficientnet", marks=pytest.mark.slow), ("unetpp", 2, "test_vit")])
def test_a_segmentation_works_without_the_project(arch, depth, encoder, script, tmp_path):
    """A transformer's maps are resampled, of 16 x 16 pixels they are one cell."""
    run, file = untrained(tmp_path / "run", arch, depth, encoder, channels=2), tmp_path / "model.pt2"
    status, out, _ = script(test, run, "--export", file, "--device", "cpu")
    assert status == 0 and "(N, 2, H, W)" in out and "channels DAPI, CD4" in out and "percentiles 1 and 99.8" in out
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["model.pt2"]
    images, own = [torch.rand(n, 2, height, width) for n, height, width in SHAPES], network(run)
    if arch == "unet":
        found = elsewhere(file, images, tmp_path)
    else:  # quicker
        exported = torch.export.load(file).module()
        found = [exported(image) for image in images]
        with pytest.raises((AssertionError, RuntimeError), match="16"):
            exported(torch.rand(1, 2, 15, 20))
    assert_same(found, map(own, images))


@torch.no_grad()
def test_folds_become_one_network(cross_validated, script, tmp_path):
    run, _ = cross_validated
    status, out, _ = script(test, run, "--export", tmp_path / "model.pt2", "--device", "cpu")
    assert status == 0 and "(N, 3, 32, 32), RGB in [0, 1]" in out and "mean of the folds" in out
    images = [torch.rand(n, 3, 32, 32) for n in (1, 4)]
    found = map(torch.export.load(tmp_path / "model.pt2").module(), images)
    folds = [runs.load_best(folder, models.build_classifier, CPU)
             for folder in runs.fold_folders(run).values()]
    for image, logits in zip(images, found):
        mean = torch.stack([fold(image).double().sigmoid() for fold in folds]).mean(0)
        assert (logits - mean.logit()).abs().max() <= 1e-4 and logits.shape == (len(image), 3)


def test_an_ensemble_is_sure_without_overflow_and_one_fold_is_itself():
    class Constant(torch.nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, image):
            return image[:, 0, 0, :1] * 0 + self.value

    def of(*values):
        return models.Ensemble([Constant(value) for value in values])(torch.rand(1, 3, 4, 4)).item()
    assert of(40.0, 40.0) == pytest.approx(40) and of(-200.0, -200.0) == pytest.approx(-200)
    assert of(0.3) == pytest.approx(0.3) and of(-1.0, 1.0) == pytest.approx(0, abs=1e-6)


def test_what_cannot_be_exported_is_said(finished, script, tmp_path):
    run, _ = finished

    def refused(*arguments):
        status, out, err = script(test, *arguments, "--device", "cpu")
        assert status == 2 and out == "" and err.startswith("error: ") and "--export" in err and err.count("\n") == 1
        return err
    assert "must be named .pt2" in refused(run, "--export", tmp_path / "model.pth")
    assert "takes one run" in refused(run, run, "--export", tmp_path / "model.pt2")
    for more in (("--tta",), ("--data", tmp_path), ("--save-masks", tmp_path), ("--images", tmp_path)):
        assert "leave --images" in refused(run, "--export", tmp_path / "model.pt2", *more)
    assert not list(tmp_path.iterdir())


def test_where_the_exporter_fails_the_old_file_stays(finished, script, tmp_path, monkeypatch):
    run, file = finished[0], tmp_path / "model.pt2"
    file.write_text("the old file")
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: torch.zeros(1)[2:].item())
    status, _, err = script(test, run, "--export", file, "--device", "cpu")
    assert status == 2 and "cannot export this network" in err and err.count("\n") == 1
    assert file.read_text() == "the old file" and [path.name for path in tmp_path.iterdir()] == ["model.pt2"]
