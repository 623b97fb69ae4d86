"""What the tests share: a tiny data folder, a way to run the scripts in this process, where the real data lie."""
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHARED = ROOT.parent / "shared" / "data"
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2  # pytest -n 2: each of the two tests at a time has a core
os.environ["OMP_NUM_THREADS"] = str(THREADS)               # the scripts that tests start, too
torch.set_num_threads(THREADS)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests of large models too (6 GB of memory)")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long or much memory; run with --slow")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow; run it with --slow"))


def needs(*parts):
    """A mark: the test is skipped, visibly, where this part of the real data is not there."""
    path = SHARED.joinpath(*parts)
    return pytest.mark.skipif(not path.exists(), reason=f"no real data at {Path('../shared/data').joinpath(*parts)}")


def blobs(rng, height, width):
    """A grey image uint8 (H, W) of bright discs on noise, and its mask of labels uint16 (H, W)."""
    y, x = np.mgrid[:height, :width]
    labels = np.zeros((height, width), np.uint16)
    for number in range(1, 5):
        radius = rng.integers(5, 10)
        labels[np.hypot(y - rng.integers(height), x - rng.integers(width)) < radius] = number
    return ((labels > 0) * 150 + rng.integers(0, 60, (height, width))).astype(np.uint8), labels


def write_folder(folder, splits=("train",) * 4 + ("validation",) * 2 + ("test",) * 3, seed=0):
    """A data folder of small PNG images, no two of one size."""
    rng = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    rows = ["image,mask,split"]
    for i, split in enumerate(splits):
        image, labels = blobs(rng, 40 + 5 * i, 67 - 3 * i)
        Image.fromarray(image).save(folder / f"field{i}.png")
        Image.fromarray(labels).save(folder / f"labels{i}.png")
        rows.append(f"field{i}.png,labels{i}.png,{split}")
    (folder / "segmentation.csv").write_text("\n".join(rows) + "\n")
    return folder


def randomise_batchnorm(model):
    """Statistics and factors that are not the neutral ones: a swapped or forgotten one shows in the logits."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)


COLOURS = {"red": 0, "green": 1, "blue": 2}


def write_pictures(folder, count=18, tests=6, patients=0, seed=0):
    """A data folder of small RGB images, no two of one size, with one to three discs each in the colours that are its
    labels."""
    rng = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    rows = ["image,labels,split" + (",patient" if patients else "")]
    for i in range(count + tests):
        height, width = 40 + i, 60 - i
        picture = rng.integers(0, 50, (height, width, 3)).astype(np.uint8)
        y, x = np.mgrid[:height, :width]
        labels = [name for bit, name in enumerate(COLOURS) if (i % 7 + 1) >> bit & 1]
        for name in labels:
            disc = np.hypot(y - rng.integers(8, height - 8), x - rng.integers(8, width - 8)) < 9
            picture[disc, COLOURS[name]] = 230
        Image.fromarray(picture).save(folder / f"picture{i}.png")
        split = "train" if i < count else "test"
        rows.append(f"picture{i}.png,{';'.join(labels)},{split}" + (f",P{i % patients}" if patients else ""))
    (folder / "classification.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(autouse=True)
def same_precision_everywhere(monkeypatch):
    """--amp auto is float32 in the tests, on every machine, and nothing is timed."""
    from running import compute
    monkeypatch.setattr(compute, "bf16_gain", lambda: 1.0)


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """They take half a second a training, more than the rest of it. The runs of a session have theirs."""
    from running import figures
    monkeypatch.setattr(figures, "save_curves", lambda *_: "")


@pytest.fixture
def coloured(tmp_path):
    return write_pictures(tmp_path / "coloured")


@pytest.fixture
def tiny(tmp_path):
    return write_folder(tmp_path / "tiny")


@pytest.fixture
def script(capfd, tmp_path, monkeypatch):
    """script(module, *arguments) -> (exit status, stdout, stderr); runs/ and the synthetic set lie below tmp_path."""
    from running import process, runs
    monkeypatch.setattr(runs, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(runs, "SYNTHETIC", tmp_path / "synthetic")

    def call(module, *arguments):
        capfd.readouterr()
        try:
            more = {"less_memory": module.LESS_MEMORY} if hasattr(module, "LESS_MEMORY") else {}
            process.command(module.main, [str(argument) for argument in arguments], **more)
            status = 0
        except SystemExit as end:
            status = end.code or 0
        return (status, *capfd.readouterr())
    return call


TRAIN = ("--task", "seg", "--recipe", "short", "--tile", "32", "--epochs", "1", "--steps", "0", "--depth", "2",
         "--weights", "none", "--device", "cpu", "--amp", "off")


# timm has test_resnet for tests: 0.4 M weights
CLASSIFY = ("--task", "cls", "--recipe", "short", "--model", "test_resnet", "--image-size", "32", "--epochs", "2",
            "--folds", "3", "--weights", "none", "--device", "cpu", "--amp", "off")


@pytest.fixture(scope="session")
def cross_validated(tmp_path_factory):
    """(run, data folder) of a finished tiny cross-validation of three folds; not to be changed by tests."""
    import train
    folder = write_pictures(tmp_path_factory.mktemp("cross_validated") / "coloured")
    run = folder.parent / "run"
    train.main(["--data", str(folder), "--out", str(run), *CLASSIFY])
    return run, folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """(run, data folder) of a finished tiny run, made once; not to be changed by tests."""
    import train
    folder = write_folder(tmp_path_factory.mktemp("finished") / "tiny")
    run = folder.parent / "run"
    train.main(["--data", str(folder), "--out", str(run), *TRAIN])
    return run, folder
