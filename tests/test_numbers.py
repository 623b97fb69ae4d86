"""Numbers that are none, and data with nothing in them: said, and nothing saved is lost."""
import csv
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
import dedl
import test
import train
from images import folders, reading
from running import prediction, runs
from running.process import InputError

bf16_gain = runs.bf16_gain  # which the tests' fixture replaces


def poison(monkeypatch, when):
    """Makes the tiles of field0.png NaN where when(epoch) says so."""
    whole = data.Crops.__getitem__

    def item(self, index):
        image, mask = whole(self, index)
        return (image * math.nan if when(self.epoch) and self.owner[index] == 0 else image), mask

    monkeypatch.setattr(data.Crops, "__getitem__", item)


def begin_scale(monkeypatch, scale):
    whole = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *place, **how: whole(*place, init_scale=float(scale), **how))


def half_precision(monkeypatch):
    """float16 with its scaler, which a CPU is refused: it emulates it."""
    monkeypatch.setattr(runs, "choose_compute", lambda *_: runs.Compute(torch.device("cpu"), torch.float16))


@pytest.mark.parametrize("precision", ["off", pytest.param("fp16", marks=pytest.mark.slow)])
def test_a_run_of_bad_steps_is_ended_with_epoch_batch_and_files(tiny, script, tmp_path, monkeypatch, precision):
    run = tmp_path / "run"
    settings = [*TRAIN, "--data", tiny, "--limit-train", 1, "--batch-size", "1", "--out", run]
    if precision == "fp16":
        half_precision(monkeypatch)
    poison(monkeypatch, lambda epoch: epoch == 2)  # all tiles, of the one field that is used
    monkeypatch.setattr(train, "limit", lambda records, _: records[:1])
    monkeypatch.setattr(train, "BAD_STEPS", 2)
    begin_scale(monkeypatch, 2)
    monkeypatch.setattr(prediction, "evaluate", lambda model, fields, *_: (  # a CPU is slow in fp16
        torch.ones(len(fields), 4), 1.0, [field.mask for field in fields]))
    status, _, err = script(train, *settings, "--epochs", 2)
    assert status == 2 and err.count("\n") == 1
    assert "is not finite in epoch 2, batches " in err and f"the first of {tiny / 'field0.png'})" in err
    assert "lower --lr" in err and "last.pt keeps the state after epoch 1" in err
    last = runs.load_checkpoint(run / "last.pt")
    assert last["state"]["epoch"] == 1 and all(tensor.isfinite().all() for tensor in last["model"].values())
    monkeypatch.undo()
    monkeypatch.setattr(train, "limit", lambda records, _: records[:1])
    assert script(train, "--resume", "--out", run, "--amp", "off")[0] == 0  # the cause is gone: it goes on


def test_single_bad_steps_are_left_out(tiny, script, tmp_path, monkeypatch):
    """The network, the optimizer and BatchNorm stay as if these steps had not been, and the figures are numbers."""
    poison(monkeypatch, lambda epoch: True)
    settings = [*TRAIN, "--epochs", 2, "--batch-size", 2, "--out", tmp_path / "run"]
    status, out, err = script(train, "--data", tiny, *settings)
    assert status == 0 and re.search("NOTE: [23] steps left out, since their gradients were not finite", out), err
    with open(tmp_path / "run" / "metrics.csv") as file:
        assert all(math.isfinite(float(value)) for row in csv.DictReader(file) for value in row.values())
    last = torch.load(tmp_path / "run" / "last.pt")
    assert all(tensor.isfinite().all() for name in ("model", "app") for tensor in last[name].values())


def test_a_learning_rate_that_explodes(tiny, script, tmp_path):
    status, _, err = script(train, "--data", tiny, *TRAIN, "--lr", "1e9", "--epochs", 30, "--out", tmp_path / "run")
    assert status == 2 and err.count("\n") == 1 and "not finite" in err and "lower --lr" in err


def test_a_validation_without_a_number_is_not_saved(tiny, script, tmp_path, monkeypatch):
    results, whole = iter([1.0, math.nan]), prediction.evaluate
    monkeypatch.setattr(prediction, "evaluate", lambda *inputs: (whole(*inputs)[0], next(results), whole(*inputs)[2]))
    status, _, err = script(train, "--data", tiny, *TRAIN, "--epochs", 3, "--out", tmp_path / "run")
    assert status == 2 and "the validation loss is not finite after epoch 2" in err
    assert torch.load(tmp_path / "run" / "last.pt")["state"]["epoch"] == 1


def test_constant_images_and_empty_masks_are_said_and_trained(tiny, script, tmp_path):
    Image.new("L", (64, 45), 77).save(tiny / "field1.png")  # field1 and its mask have this size
    Image.new("L", (61, 50)).save(tiny / "labels2.png")
    status, out, err = script(train, "--data", tiny, *TRAIN, "--out", tmp_path / "run")
    assert status == 0 and f"  NOTE: {tiny / 'field1.png'}: the image is constant\n" in out, err
    assert f"  NOTE: {tiny / 'labels2.png'}: the mask is empty\n" in out and out.count("NOTE") == 2
    Image.new("L", (46, 75)).save(tiny / "labels7.png")  # of the test
    assert script(test, tmp_path / "run")[0] == 0
    scores = json.loads((tmp_path / "run" / "test.json").read_text())
    assert all(math.isfinite(value) for value in scores.values() if isinstance(value, float))


def test_masks_that_may_be_inverted_are_said(tiny, script, tmp_path):
    with Image.open(tiny / "labels1.png") as mask:
        Image.fromarray(np.asarray(mask) == 0).save(tiny / "labels1.png")
    mask = re.escape(str(tiny / "labels1.png"))
    said = re.compile(rf"NOTE:? {mask}: nuclei cover \d\d% of the pixels; is the mask inverted\?")
    status, out, err = script(train, "--data", tiny, *TRAIN, "--out", tmp_path / "run")
    assert status == 0 and said.search(out), err
    status, out, err = script(folders, "check", tiny)
    assert status == 0 and said.search(out) and out.count("NOTE") == 1, err


def test_fields_of_a_few_pixels(tiny, script, tmp_path):
    """Narrower than any caption of the sheets."""
    for i in range(4, 9):
        Image.fromarray(np.arange(50, dtype=np.uint8)[:, None].repeat(i // 4, 1)).save(tiny / f"field{i}.png")
        Image.fromarray((np.arange(50) > 25)[:, None].repeat(i // 4, 1)).save(tiny / f"labels{i}.png")
    assert script(train, "--data", tiny, *TRAIN, "--out", tmp_path / "run")[0] == 0
    assert script(test, tmp_path / "run")[0] == 0


def test_constant_pictures_are_said(coloured, script, tmp_path):
    Image.new("RGB", (60, 40), (9, 70, 200)).save(coloured / "picture0.png")
    status, out, err = script(train, "--data", coloured, *CLASSIFY, "--fold", 0, "--out", tmp_path / "run")
    assert status == 0 and f"  NOTE: {coloured / 'picture0.png'}: the image is constant\n" in out, err


def test_half_precision_finds_its_scale_in_epochs_of_one_step(coloured, script, tmp_path, monkeypatch):
    """Each step of an epoch may be left out until the scale fits; the epoch is gone through until one is not."""
    begin_scale(monkeypatch, 2 ** 30)
    half_precision(monkeypatch)
    settings = [*CLASSIFY, "--fold", 0, "--epochs", 1, "--batch-size", 64, "--out", tmp_path / "run"]
    status, out, err = script(train, "--data", coloured, *settings)
    assert status == 0 and 1 < torch.load(tmp_path / "run" / "fold0" / "last.pt")["scaler"]["scale"] < 2 ** 29, err


def test_predictions_that_are_no_numbers_are_said(finished, cross_validated, script, tmp_path, monkeypatch):
    whole_forward, whole_classify = prediction.forward, prediction.classify
    monkeypatch.setattr(prediction, "forward", lambda *a: whole_forward(*a) * math.nan)
    monkeypatch.setattr(prediction, "classify", lambda *a, **k: whole_classify(*a, **k) * math.nan)
    for run, _ in (finished, cross_validated):
        status, _, err = script(test, run)
        assert status == 2 and "its network gives no numbers for" in err and "--amp off" in err


def test_a_class_of_the_validation_rows_alone(coloured, script, tmp_path):
    rows = (coloured / "classification.csv").read_text().splitlines()
    rows[1] = "picture0.png,red;rare,validation"
    (coloured / "classification.csv").write_text("\n".join(rows) + "\n")
    status, out, err = script(train, "--data", coloured, *CLASSIFY, "--folds", 1, "--out", tmp_path / "run")
    assert status == 0 and "rare: 0 train, 1 validation, 0 test  NOTE: without a training image" in out, err
    assert script(test, tmp_path / "run")[0] == 0
    scores = json.loads((tmp_path / "run" / "test.json").read_text())
    assert scores["per_class"]["rare"]["support"] == 0 and math.isfinite(scores["f1_macro"])


@pytest.mark.parametrize("values, said", [((math.nan, 1), "NaN or infinite"), ((math.inf, 1), "NaN or infinite"),
                                          ((-3e38, 3e38), ""), ((1e-40, 2e-40), ""), ((5, 5), "")])
def test_floats_at_the_edge(tmp_path, values, said):
    image = np.linspace(0, 1, 600).reshape(20, 30).astype(np.float32)
    image[:10], image[10:] = values
    tifffile.imwrite(tmp_path / "edge.tif", image)
    if said:
        with pytest.raises(InputError, match=f"edge.tif: holds pixels that are {said}"):
            reading.read_mask(tmp_path / "edge.tif")
        with pytest.raises(InputError, match=f"edge.tif: holds pixels that are {said}"):
            reading.read_image(tmp_path / "edge.tif")
        return
    found = reading.normalise(reading.read_image(tmp_path / "edge.tif")[0])
    assert np.isfinite(found).all() and set(np.unique(found)) == ({0.0} if values[0] == values[1] else {0.0, 1.0})


def test_deterministic_sums_are_the_same_loss():
    logits, truth = torch.randn(2, 2, 9, 7, requires_grad=True), torch.randint(2, (2, 9, 7))
    for weights in (None, torch.tensor([0.3, 0.7])):
        plain, = torch.autograd.grad(dedl.cross_entropy(logits, truth, weights), logits)
        torch.use_deterministic_algorithms(True)
        try:
            summed = dedl.cross_entropy(logits, truth, weights)
        finally:
            torch.use_deterministic_algorithms(False)
        torch.testing.assert_close(summed, dedl.cross_entropy(logits, truth, weights))
        torch.testing.assert_close(torch.autograd.grad(summed, logits)[0], plain)


def test_deterministic_is_a_flag_that_is_heard(tiny, script, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *wish, **how: asked.append(wish))
    assert script(train, "--data", tiny, *TRAIN, "--deterministic", "--out", tmp_path / "run")[0] == 0
    assert asked == [(True,)] and json.loads((tmp_path / "run" / "config.json").read_text())["deterministic"] is True


# ------------------------------------------------------------------------------------------------------------ precision
@pytest.mark.parametrize("has, gain, taken, said", [
    (True, 0.67, None, "float32 (a convolution runs 0.67 times as fast in bfloat16"), (True, 1.1, None, "float32 (a "),
    (True, 1.2, torch.bfloat16, "bfloat16 (a convolution runs 1.20 times as fast in bfloat16"),
    (False, None, None, "float32 (this CPU has no bfloat16)")])
def test_a_cpu_takes_bfloat16_only_where_it_is_faster(monkeypatch, has, gain, taken, said):
    monkeypatch.setattr(runs, "cpu_has_bf16", lambda: has)
    monkeypatch.setattr(runs, "bf16_gain", lambda: gain)
    compute = runs.choose_compute("cpu", "auto")
    assert compute.amp_dtype is taken and compute.precision().startswith(said)
    assert runs.choose_compute("cpu", "bf16").precision() == "bfloat16"  # what is asked for is not timed


def test_the_precision_and_why_are_printed(tiny, script, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "cpu_has_bf16", lambda: True)
    said = "cpu, float32 (a convolution runs 1.00 times as fast in bfloat16 as in float32; 1.15 is asked for)"
    assert said in script(train, "--data", tiny, *TRAIN, "--amp", "auto", "--out", tmp_path / "run")[1]
    assert script(test, tmp_path / "run", "--device", "cpu")[1].startswith(f"{said}\n")


def test_timing_draws_no_random_numbers():
    before = torch.get_rng_state()
    assert bf16_gain() > 0 and torch.equal(torch.get_rng_state(), before)


def test_float16_is_refused_on_a_cpu(tiny, finished, script, tmp_path):
    for arguments in ((train, "--data", tiny, *TRAIN, "--out", tmp_path / "run"), (test, finished[0])):
        status, _, err = script(*arguments, "--device", "cpu", "--amp", "fp16")
        assert status == 2 and err.startswith("error: --amp fp16: ") and "bf16, off or auto" in err
    assert not (tmp_path / "run").exists()
