"""Numbers that are none, and data with nothing in them: reported, and nothing saved is lost."""
import json
import math
import re

import numpy as np
import pytest
import tifffile
import torch
from conftest import CLASSIFY, TRAIN
from PIL import Image

import data
import test
import train
from images import folders, reading
from running import compute
from running.compute import Compute
from running.process import InputError

bf16_gain = compute.bf16_gain  # which the tests' fixture replaces
SMALL = (*TRAIN, "--encoder", "test_resnet")


def test_a_loss_that_is_no_number_ends_the_run_with_epoch_and_batch(tiny, script, tmp_path, monkeypatch):
    run = tmp_path / "run"
    whole = data.Crops.__getitem__

    def item(self, index):
        image, mask = whole(self, index)
        bad = self.epoch == 2 and index == 0
        return image * math.nan if bad else image, mask

    with monkeypatch.context() as patch:
        patch.setattr(data.Crops, "__getitem__", item)
        status, _, err = script(train, *SMALL, "--data", tiny, "--epochs", 2, "--out", run)
    assert status == 2 and err.count("\n") == 1
    assert re.search(r"the loss is not finite in epoch 2, batch \d; lower --lr", err), err
    last = torch.load(run / "last.pt")
    assert last["state"]["epoch"] == 1 and all(tensor.isfinite().all() for tensor in last["model"].values())
    assert script(train, "--resume", "--out", run)[0] == 0  # the cause is gone: it goes on


def test_a_learning_rate_that_explodes(tiny, script, tmp_path):
    status, _, err = script(train, "--data", tiny, *SMALL, "--lr", "1e9", "--epochs", 30, "--out", tmp_path / "run")
    assert status == 2 and err.count("\n") == 1 and "not finite" in err and "lower --lr" in err


def test_images_and_masks_to_look_at_are_reported_and_trained(tiny, script, tmp_path):
    Image.new("L", (64, 45), 77).save(tiny / "field1.png")  # field1 and its mask have this size
    Image.new("L", (61, 50)).save(tiny / "labels2.png")
    with Image.open(tiny / "labels3.png") as mask:
        Image.fromarray(np.asarray(mask) == 0).save(tiny / "labels3.png")
    inverted = rf"NOTE:? {re.escape(str(tiny))}/labels3.png: nuclei cover \d\d% of the pixels; is the mask inverted\?"
    status, out, err = script(train, "--data", tiny, *SMALL, "--out", tmp_path / "run")
    assert status == 0 and re.search(inverted, out) and out.count("NOTE") == 1, err
    status, out, _ = script(folders, "check", tiny)
    assert status == 2
    assert "field1.png: the image is constant" in out and "labels2.png: the mask is empty" in out
    Image.new("L", (46, 75)).save(tiny / "labels7.png")  # of the test
    assert script(test, tmp_path / "run")[0] == 0
    scores = json.loads((tmp_path / "run" / "test.json").read_text())
    assert all(math.isfinite(value) for value in scores.values() if isinstance(value, float))


def test_images_of_a_few_pixels(tiny, script, tmp_path):
    """Narrower than any caption of the sheets."""
    for i in range(4, 9):
        Image.fromarray(np.arange(50, dtype=np.uint8)[:, None].repeat(i // 4, 1)).save(tiny / f"field{i}.png")
        Image.fromarray((np.arange(50) > 25)[:, None].repeat(i // 4, 1)).save(tiny / f"labels{i}.png")
    assert script(train, "--data", tiny, *SMALL, "--out", tmp_path / "run")[0] == 0
    assert script(test, tmp_path / "run")[0] == 0


def test_half_precision_lowers_its_scale_until_the_gradients_fit(coloured, script, tmp_path, monkeypatch):
    """Only a GPU is given float16; a CPU, which emulates it, stands in for one."""
    monkeypatch.setattr(train, "choose_compute", lambda *_: Compute(torch.device("cpu"), "fp16"))
    monkeypatch.setattr(Compute, "scaler", lambda self: torch.amp.GradScaler("cpu", init_scale=2.0 ** 30))
    settings = [*CLASSIFY, "--fold", 0, "--epochs", 3, "--batch-size", 64, "--out", tmp_path / "run"]
    status, _, err = script(train, "--data", coloured, *settings)
    last = torch.load(tmp_path / "run" / "fold0" / "last.pt")
    assert status == 0 and last["scaler"]["scale"] == 2 ** 27, err
    assert all(tensor.isfinite().all() for tensor in last["model"].values())


def test_a_class_of_the_validation_rows_alone(coloured, script, tmp_path):
    rows = (coloured / "classification.csv").read_text().splitlines()
    rows[1] = "picture0.png,red;rare,validation"
    (coloured / "classification.csv").write_text("\n".join(rows) + "\n")
    status, out, err = script(train, "--data", coloured, *CLASSIFY, "--folds", 1, "--out", tmp_path / "run")
    assert status == 0 and "NOTE: class rare has no training image" in out, err
    assert script(test, tmp_path / "run")[0] == 0
    scores = json.loads((tmp_path / "run" / "test.json").read_text())
    assert scores["per_class"]["rare"]["support"] == 0 and math.isfinite(scores["f1_macro"])


@pytest.mark.parametrize("values, message", [((math.nan, 1), "NaN or infinite"), ((math.inf, 1), "NaN or infinite"),
                                          ((-3e38, 3e38), "NaN or infinite"), ((-9e36, 9e36), ""),
                                          ((1e-40, 2e-40), ""), ((5, 5), "")])
def test_floats_at_the_edge(tmp_path, values, message):
    image = np.linspace(0, 1, 600).reshape(20, 30).astype(np.float32)
    image[:10], image[10:] = values
    tifffile.imwrite(tmp_path / "edge.tif", image)
    if message:
        with pytest.raises(InputError, match=f"edge.tif: holds pixels that are {message}"):
            reading.read_mask(tmp_path / "edge.tif")
        with pytest.raises(InputError, match=f"edge.tif: holds pixels that are {message}"):
            reading.read_image(tmp_path / "edge.tif")
        return
    image, _ = reading.read_image(tmp_path / "edge.tif")
    found = reading.normalise(image, reading.find_limits(image))
    assert np.isfinite(found).all() and set(np.unique(found)) == ({0.0} if values[0] == values[1] else {0.0, 1.0})


# ------------------------------------------------------------------------------------------------------------ precision
@pytest.mark.parametrize("has, gain, taken", [(True, 0.67, None), (True, 1.1, None), (True, 1.2, torch.bfloat16),
                                              (False, None, None)])
def test_a_cpu_takes_bfloat16_only_where_it_is_faster(monkeypatch, has, gain, taken):
    monkeypatch.setattr(compute, "cpu_has_bf16", lambda: has)
    monkeypatch.setattr(compute, "bf16_gain", lambda: gain)
    assert compute.choose_compute("cpu", "auto").amp_dtype is taken
    assert str(compute.choose_compute("cpu", "bf16")) == "cpu, amp bf16"  # what is asked for is not timed


def test_timing_draws_no_random_numbers():
    before = torch.get_rng_state()
    assert bf16_gain() > 0 and torch.equal(torch.get_rng_state(), before)


def test_float16_is_refused_on_a_cpu(tiny, finished, script, tmp_path):
    for arguments in ((train, "--data", tiny, *SMALL, "--out", tmp_path / "run"), (test, finished[0])):
        status, _, err = script(*arguments, "--device", "cpu", "--amp", "fp16")
        assert status == 2 and err.startswith("error: --amp fp16: ") and "bf16, off or auto" in err
    assert not (tmp_path / "run").exists()
