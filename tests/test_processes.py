"""Several processes: torchrun's, which share each batch, and the loader's."""
import csv
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import CLASSIFY, ROOT, TRAIN

import data
import models
import train
from images import manifests
from networks import fast
from running import compute, prediction, process, runs


def torchrun(script, *arguments, processes=2):
    """Runs a script by torchrun; returns the finished process with its output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, script]
    return subprocess.run([str(part) for part in (*command, *arguments)], cwd=ROOT, capture_output=True, text=True,
                          timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})


def metrics(folder):
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


def test_two_processes_train_a_network_without_batchnorm_as_one_does(coloured, script, tmp_path):
    """Where no layer looks at the whole batch, sharing it changes nothing but rounding: the same images, augmented
    alike, in the same batches, each once; gradients averaged over the batch, figures over all images."""
    arguments = ["--data", coloured, *CLASSIFY, "--model", "test_vit", "--fold", "0", "--amp", "off", "--epochs", "3",
                 "--batch-size", "3", "--swa"]
    assert script(train, *arguments, "--out", tmp_path / "one")[0] == 0
    ended = torchrun("train.py", *arguments, "--out", tmp_path / "two")
    assert ended.returncode == 0, ended.stderr
    assert "cpu, " in ended.stdout and ended.stdout.count("epoch   3") == 1  # one of them speaks
    one, two = (metrics(tmp_path / name / "fold0") for name in ("one", "two"))
    assert len(two) == 3
    for a, b in zip(one, two):
        for name in set(a) - {"seconds"}:
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-4), name
    a, b = (torch.load(tmp_path / name / "fold0" / "last.pt")["model"] for name in ("one", "two"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


def test_a_segmentation_goes_on_in_two_processes(tiny, script, tmp_path):
    """What two measure is what one measures with the same weights."""
    run = tmp_path / "run"
    assert script(train, "--data", tiny, *TRAIN, "--encoder", "test_resnet", "--out", run)[0] == 0
    ended = torchrun("train.py", "--resume", "--out", run, "--epochs", 2)
    assert ended.returncode == 0 and "going on after epoch 1" in ended.stdout, ended.stderr
    rows = metrics(run)
    last = torch.load(run / "last.pt")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    config = runs.read_config(run)
    model = models.build_segmenter(**config["setting"])
    model.load_state_dict({name: last["average"][f"module.{name}"] for name in model.state_dict()})
    records = [record for record in manifests.find_records(tiny)[0] if record.split == "validation"]
    fields = data.read_fields(records)
    measured = prediction.measure(fast.for_inference(model), fields, config["nucleus"],
                                  compute.choose_compute("cpu", "off"), config["class_weights_used"])
    assert float(rows[-1]["val_iou"]) == pytest.approx(measured.scores["iou"], abs=1e-6)
    assert float(rows[-1]["val_loss"]) == pytest.approx(measured.loss, rel=1e-5)
    assert config["processes"] == 2 and (run / "samples.png").is_file()


def test_one_failing_process_ends_all_with_its_message(tiny, tmp_path):
    failing = tmp_path / "failing.py"
    failing.write_text(f"""import sys
sys.path.insert(0, {str(ROOT)!r})
import train
from running import prediction, process
from running.process import InputError
whole = prediction.measure
def measure(*inputs):
    if process.rank() == 1:
        raise InputError("the second process has a reason")
    return whole(*inputs)
prediction.measure = measure
process.command(train.main)
""")
    ended = torchrun(failing, "--data", tiny, *TRAIN, "--encoder", "test_resnet", "--out", tmp_path / "run")
    assert ended.returncode != 0 and "error: the second process has a reason\n" in ended.stderr, ended.stderr


class Numbers(torch.utils.data.Dataset):
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return index


def batches_of(count, size, epoch=1, compile=False):
    """The batches of an epoch over the numbers below `count`, of this process."""
    args = SimpleNamespace(seed=0, batch_size=size, workers=0, compile=compile)
    cpu = compute.Compute(torch.device("cpu"), "off")
    return [batch.tolist() for batch in train.make_loader(Numbers(count), count, args, cpu, {"epoch": epoch})]


@pytest.mark.parametrize("count, size, world, left_out", [
    (13, 4, 1, 1), (14, 4, 1, 0), (13, 4, 2, 1), (16, 16, 3, 0), (17, 8, 4, 1), (3, 16, 2, 0), (4, 4, 4, 0)])
def test_each_image_goes_once_to_one_process(monkeypatch, count, size, world, left_out):
    monkeypatch.setattr(process, "world", lambda: world)
    shares = []
    for own in range(world):
        monkeypatch.setattr(process, "rank", lambda own=own: own)
        shares.append(batches_of(count, size))
    seen = [index for batches in shares for batch in batches for index in batch]
    assert len(set(seen)) == len(seen) == count - left_out
    for step in zip(*shares, strict=True):  # in each step each has work, and about as much as the others
        sizes = [len(batch) for batch in step]
        assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1 and sum(sizes) <= size


def test_each_epoch_has_its_own_order():
    assert batches_of(16, 4, epoch=1) == batches_of(16, 4, epoch=1) != batches_of(16, 4, epoch=2)
    assert [len(batch) for batch in batches_of(15, 4, compile=True)] == [4, 4, 4]  # no smaller one to compile for


def test_the_first_process_decides_on_the_precision(monkeypatch):
    """The others, which time the convolution beside it, might find another one faster."""
    monkeypatch.setattr(process, "from_first", lambda make: True)
    monkeypatch.setattr(compute, "cpu_has_bf16", lambda: False)
    assert compute.choose_compute("cpu").amp_dtype is torch.bfloat16


# ---------------------------------------------------------------------------------------------------- loader processes
@pytest.mark.parametrize("task", ["seg", "cls"])
def test_the_number_of_workers_changes_no_figure(tiny, coloured, script, tmp_path, task):
    arguments = {"seg": ["--data", tiny, *TRAIN], "cls": ["--data", coloured, *CLASSIFY, "--fold", "1"]}[task]
    rows = []
    for workers in (0, 2):
        out = tmp_path / str(workers)
        assert script(train, *arguments, "--workers", workers, "--out", out)[0] == 0
        rows.append([{**row, "seconds": 0} for row in metrics(out / "fold1" if task == "cls" else out)])
    assert rows[0] == rows[1]
