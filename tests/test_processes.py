"""Several processes: torchrun's, which share each batch, and the loader's, which may die."""
import csv
import errno
import multiprocessing.resource_sharer
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from conftest import CLASSIFY, ROOT, TRAIN

import data
import dedl
import models
import train
from images import manifests, reading
from running import prediction, process, runs


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
    assert "cpu in 2 processes" in ended.stdout and ended.stdout.count("epoch   3") == 1  # one of them speaks
    one, two = (metrics(tmp_path / name / "fold0") for name in ("one", "two"))
    assert len(two) == 3
    for a, b in zip(one, two):
        for name in set(a) - {"seconds"}:
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-4), name
    a, b = (torch.load(tmp_path / name / "fold0" / "last.pt")["model"] for name in ("one", "two"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_segmentation_changes_its_number_of_processes(tiny, script, tmp_path):
    """One process, then two, then one; what two measure is what one measures with the same weights."""
    run, settings = tmp_path / "run", ["--amp", "off", "--recipe", "paper", "--epochs"]
    assert script(train, "--data", tiny, *TRAIN, *settings, 1, "--out", run)[0] == 0
    ended = torchrun("train.py", "--resume", "--out", run, "--epochs", 3)
    assert ended.returncode == 0 and "going on after epoch 1" in ended.stdout, ended.stderr
    rows, last = metrics(run), torch.load(run / "last.pt")
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    model = models.build_segmenter(**last["setting"])
    model.load_state_dict(last["model"])
    records = [record for record in manifests.find_records(tiny)[0] if record.split == "validation"]
    weights = torch.tensor(runs.read_config(run)["class_weights_used"])
    counts, loss, _ = prediction.evaluate(model, data.read_fields(records), runs.choose_compute("cpu", "off"), weights)
    assert float(rows[-1]["val_iou"]) == pytest.approx(dedl.segmentation_scores(counts)["iou"], abs=1e-6)
    assert float(rows[-1]["val_loss"]) == pytest.approx(loss, rel=1e-5)
    assert runs.read_config(run)["processes"] == 2 and (run / "samples.png").is_file()
    status, out, _ = script(train, "--resume", "--out", run, "--epochs", 4)
    assert status == 0 and "going on after epoch 3" in out and len(metrics(run)) == 4


def test_one_failing_process_ends_all_with_its_message(tiny, tmp_path):
    failing = tmp_path / "failing.py"
    failing.write_text(f"""import sys
sys.path.insert(0, {str(ROOT)!r})
import train
from running import prediction, process
from running.process import InputError
whole = prediction.evaluate
def evaluate(*inputs):
    if process.rank() == 1:
        raise InputError("the second process has a reason")
    return whole(*inputs)
prediction.evaluate = evaluate
process.command(train.main)
""")
    ended = torchrun(failing, "--data", tiny, *TRAIN, "--out", tmp_path / "run")
    assert ended.returncode != 0 and ended.stderr.count("error: ") == 1, ended.stderr
    assert "error: the second process has a reason\n" in ended.stderr and "train.py\", line" not in ended.stderr


@pytest.mark.slow
def test_what_is_wrong_is_said_once(tiny, tmp_path):
    (tiny / "field1.png").write_bytes(b"x")
    ended = torchrun("train.py", "--data", tiny, *TRAIN, "--out", tmp_path / "run")
    assert ended.returncode != 0 and ended.stderr.count("error: ") == 1, ended.stderr
    assert f"error: {tiny / 'field1.png'}: cannot be read" in ended.stderr


@pytest.mark.parametrize("count, size, world", [(13, 4, 1), (13, 4, 2), (13, 4, 4), (16, 16, 3), (17, 8, 4), (3, 16, 2),
                                                (4, 4, 4)])
def test_each_image_goes_once_to_one_process(monkeypatch, count, size, world):
    monkeypatch.setattr(process, "world", lambda: world)
    shares = []
    for own in range(world):
        monkeypatch.setattr(process, "rank", lambda own=own: own)
        batches = train.Batches(count, size, seed=0)
        shares.append(list(batches))
        assert len(shares[-1]) == len(batches)
    assert sorted(index for share in shares for batch in share for index in batch) == list(range(count))
    for step, whole in enumerate(batches.whole):  # in each step each has work, and about as much as the others
        sizes = [len(share[step]) for share in shares]
        assert sum(sizes) == len(whole) and min(sizes) >= 1 and max(sizes) - min(sizes) <= 1


def test_steps_are_made_of_whole_passes():
    whole = train.Batches(7, 4, seed=3, steps=5).whole
    order = [index for batch in whole for index in batch]
    assert [len(batch) for batch in whole] == [4] * 5
    assert sorted(order[:7]) == list(range(7)) and sorted(order[7:14]) == list(range(7, 14))
    assert all(14 <= index < 21 for index in order[14:]) and len(set(order)) == 20  # no crop is drawn twice
    assert train.Batches(7, 2, seed=3, steps=2).whole == train.Batches(7, 2, seed=3).whole[:2]


def test_the_first_process_decides_on_the_precision(monkeypatch):
    """The others, which time the convolution beside it, might find another one faster."""
    monkeypatch.setattr(process, "from_first", lambda make: make is runs.fastest_on_cpu and ("bf16", "it is"))
    monkeypatch.setattr(runs, "cpu_has_bf16", lambda: False)
    assert runs.choose_compute("cpu").amp_dtype is torch.bfloat16


# ---------------------------------------------------------------------------------------------------- loader processes
@pytest.mark.parametrize("task", ["seg", "cls"])
def test_the_number_of_workers_changes_no_figure(tiny, coloured, script, tmp_path, task):
    arguments = {"seg": ["--data", tiny, *TRAIN], "cls": ["--data", coloured, *CLASSIFY, "--fold", "1"]}[task]
    rows = []
    for workers in (0, 3):
        out = tmp_path / str(workers)
        assert script(train, *arguments, "--workers", workers, "--out", out)[0] == 0
        rows.append([{**row, "seconds": 0} for row in metrics(out / "fold1" if task == "cls" else out)])
    assert rows[0] == rows[1]


def test_an_error_of_ours_in_a_loader_process_stays_one(coloured, script, tmp_path, monkeypatch):
    def wrong(path):
        raise RuntimeError("a bug of ours")
    monkeypatch.setattr(data, "read_picture", wrong)
    monkeypatch.setattr(data, "PICTURE_MEMORY", 0)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        script(train, "--data", coloured, *CLASSIFY, "--workers", 1, "--out", tmp_path / "run")


@pytest.mark.parametrize("how", ["killed", "broken"])
def test_a_loader_process_that_ends_names_its_file(coloured, script, tmp_path, monkeypatch, how):
    read = reading.read_picture

    def dying(path):
        if path.name == "picture7.png" and torch.utils.data.get_worker_info():
            if how == "broken":
                path.write_bytes(b"x")
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return read(path)

    monkeypatch.setattr(data, "read_picture", dying)
    monkeypatch.setattr(data, "PICTURE_MEMORY", 0)
    status, _, err = script(train, "--data", coloured, *CLASSIFY, "--workers", 1, "--out", tmp_path / "run")
    assert status == 2 and err.startswith(f"error: {coloured / 'picture7.png'}: ") and err.count("\n") == 1, err
    assert ("died while it read this" if how == "killed" else "cannot be read") in err


def test_a_loader_process_that_dies_while_it_hands_over_names_its_file(coloured, script, tmp_path, monkeypatch):
    """The parent, which fetches a batch from it, finds the connection gone before it hears of the death."""
    parent, sharer = os.getpid(), multiprocessing.resource_sharer._resource_sharer
    connect = sharer.get_connection

    def get_connection(ident):
        if os.getpid() != parent:
            return connect(ident)
        child = multiprocessing.active_children()[0].pid
        threading.Timer(0.5, os.kill, (child, signal.SIGKILL)).start()
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    monkeypatch.setattr(sharer, "get_connection", get_connection)
    status, _, err = script(train, "--data", coloured, *CLASSIFY, "--workers", 1, "--out", tmp_path / "run")
    assert status == 2 and err.startswith(f"error: {coloured / 'picture'}") and err.count("\n") == 1, err
    assert "died while it read this" in err
