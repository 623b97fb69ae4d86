"""Whatever ends a run, going on gives what a run never ended gives: kills at every point, interruptions, full disks."""
import csv
import multiprocessing
import os
import pickle
import re
import resource
import signal
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from conftest import CLASSIFY, THREADS, TRAIN

import data
import test
import train
from running import prediction, process, runs

# forks of a fresh process, which has imported everything but started no thread: a second less for each
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train"])


# -------------------------------------------------------------------------------------- what happens in another process
class DyingHandle:
    """A file whose process is killed in the middle of what it writes."""

    def __init__(self, handle):
        self.handle = handle

    def write(self, content):
        self.handle.write(content[:len(content) // 2])
        self.handle.flush()
        die()

    def __getattr__(self, name):
        return getattr(self.handle, name)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(arguments, when, name, number):
    """Runs train.py and kills it before, within or after writing the `number`th file of this name; name "step" or
    "validation": at the `number`th of these."""
    torch.set_num_threads(THREADS)
    seen, whole, combine, evaluate = [], process.replacing, process.combine, prediction.measure

    def count(event):
        seen.append(event)
        return event == name and seen.count(name) == number

    @contextmanager
    def replacing(file, *rest, **how):
        hit = count(f"{file.parent.name}/{file.name}" if "fold" in name else file.name)
        if hit and when == "before":
            die()
        with whole(file, *rest, **how) as handle:
            yield DyingHandle(handle) if hit and when == "within" else handle
        if hit:
            die()

    def at(event, function):
        def call(*inputs, **more):
            return die() if count(event) else function(*inputs, **more)
        return call

    process.replacing, process.combine = replacing, at("step", combine)
    prediction.measure = at("validation", evaluate)
    process.command(train.main, arguments, less_memory=train.LESS_MEMORY)


def train_on(arguments, log):
    """Runs train.py with what it prints in a file."""
    torch.set_num_threads(THREADS)
    multiprocessing.set_start_method("fork", force=True)  # of loader processes, as where nothing is tested
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in a shell's background
    for number in (1, 2):
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    process.command(train.main, arguments, less_memory=train.LESS_MEMORY)


def train_on_a_small_disk(arguments, log, most):
    """A limit on the size of files, in place of a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    train_on(arguments, log)


def train_in_little_memory(arguments, log, most):
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[5]) * resource.getpagesize()  # data and stack
    resource.setrlimit(resource.RLIMIT_DATA, (used + most, used + most))
    train_on(arguments, log)


def ended(target, *arguments, seconds=60):
    """The exit code of a process that runs target(*arguments)."""
    child = FORKS.Process(target=target, args=arguments)
    child.start()
    child.join(seconds)
    assert child.exitcode is not None, "it does not end"
    return child.exitcode


# -------------------------------------------------------------------------------------------------------------- kill -9
def metrics(folder):
    with open(folder / "metrics.csv") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def same_runs(whole, parts):
    """Whether two folders of a run, or a fold, hold the same figures and the same tensors."""
    assert metrics(parts) == metrics(whole)
    for name in ("best.pt", "last.pt"):
        a, b = (torch.load(folder / name) for folder in (whole, parts))
        assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
        assert a.get("epoch") == b.get("epoch")
    assert not list(parts.glob("*.tmp")), "something half written is left"


EPOCHS = ("--epochs", "4", "--recipe", "paper", "--batch-size", "8", "--lr", "2e-3", "--encoder", "test_resnet")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(data folder, run) of a segmentation that nothing ended."""
    from conftest import write_folder
    folder = write_folder(tmp_path_factory.mktemp("whole") / "tiny", ("train", "train", "validation"))
    train.main(["--data", str(folder), *TRAIN, *EPOCHS, "--out", str(folder.parent / "run")])
    return folder, folder.parent / "run"


@pytest.mark.parametrize("when, name, number", [
    ("within", "config.json", 1), ("within", "last.pt", 1), ("at", "step", 9), ("after", "best.pt", 1),
    ("after", "last.pt", 3), ("within", "metrics.csv", 2), *(pytest.param(*place, marks=pytest.mark.slow) for place in (
        ("at", "step", 2), ("at", "validation", 1), ("within", "best.pt", 1), ("within", "last.pt", 3),
        ("before", "samples.png", 4)))])
def test_a_killed_run_goes_on_as_if_it_had_not_been(whole, script, tmp_path, when, name, number):
    folder, uninterrupted = whole
    arguments = ["--data", str(folder), *TRAIN, *EPOCHS, "--out", str(tmp_path / "run")]
    assert ended(train_and_die, arguments, when, name, number) == -signal.SIGKILL
    for file in tmp_path.glob("run/*.pt"):
        runs.load_checkpoint(file)  # whole, whatever happened
    if (tmp_path / "run" / "config.json").exists():
        arguments = ["--resume", "--out", str(tmp_path / "run")]
    status, _, err = script(train, *arguments)
    assert status == 0, err
    same_runs(uninterrupted, tmp_path / "run")
    assert (tmp_path / "run" / "samples.png").is_file()


@pytest.mark.parametrize("when, name, number", [
    ("within", "fold1/last.pt", 1), ("after", "fold1/validation.csv", 1), ("before", "fold1/best.pt", 1)])
def test_a_killed_cross_validation_goes_on_at_its_fold(cross_validated, script, tmp_path, when, name, number):
    whole, folder = cross_validated
    arguments = ["--data", str(folder), *CLASSIFY, "--out", str(tmp_path / "run")]
    assert ended(train_and_die, arguments, when, name, number) == -signal.SIGKILL
    before = (tmp_path / "run" / "fold0" / "last.pt").stat().st_mtime_ns
    status, out, err = script(train, "--resume", "--out", tmp_path / "run")
    assert status == 0 and "fold0: going on after epoch 2" in out, err
    for fold in ("fold0", "fold1", "fold2"):
        same_runs(whole / fold, tmp_path / "run" / fold)
        assert (whole / fold / "validation.csv").read_text() == (tmp_path / "run" / fold / "validation.csv").read_text()
    assert (tmp_path / "run" / "fold0" / "last.pt").stat().st_mtime_ns == before


# ------------------------------------------------------------------------------------------------ Ctrl-C, SIGTERM, disk
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_tells_how_to_go_on(whole, script, tmp_path, number):
    folder, uninterrupted = whole
    log = tmp_path / "log"
    arguments = ["--data", str(folder), *TRAIN, *EPOCHS, "--epochs", "500", "--patience", "0", "--out",
                 str(tmp_path / "run")]
    child = FORKS.Process(target=train_on, args=(arguments, str(log)))
    child.start()
    deadline = time.monotonic() + 60
    while "epoch   2" not in (log.read_text() if log.exists() else "") and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(child.pid, number)
    child.join(30)
    *_, last = log.read_text().splitlines()
    assert child.exitcode == 130, log.read_text()
    assert last == (f"interrupted; finished epochs are saved; go on with: python train.py --resume "
                    f"--out {tmp_path / 'run'}")
    done = len(metrics(tmp_path / "run"))
    assert done == torch.load(tmp_path / "run" / "last.pt")["state"]["epoch"] >= 2
    assert not list((tmp_path / "run").glob("*.tmp"))
    assert script(train, "--resume", "--out", tmp_path / "run", "--epochs", max(4, done))[0] == 0
    assert metrics(tmp_path / "run")[:4] == metrics(uninterrupted)


def test_a_cross_validation_killed_before_its_settings_were_saved_begins_anew(coloured, script, tmp_path):
    arguments = ["--data", str(coloured), *CLASSIFY, "--fold", "0", "--out", str(tmp_path / "run")]
    assert ended(train_and_die, arguments, "within", "config.json", 1) == -signal.SIGKILL
    assert script(train, *arguments)[0] == 0 and len(metrics(tmp_path / "run" / "fold0")) == 2


def test_going_on_where_the_data_have_moved(tiny, script, tmp_path):
    run = tmp_path / "run"
    assert script(train, "--data", tiny, *TRAIN, "--out", run)[0] == 0
    tiny.rename(tmp_path / "moved")
    assert script(train, "--resume", "--out", run, "--data", tmp_path / "moved", "--epochs", 2)[0] == 0
    assert len(metrics(run)) == 2 and runs.read_config(run)["data"] == str(tmp_path / "moved")


def test_going_on_keeps_precision_and_device(tiny, script, tmp_path):
    run = tmp_path / "run"
    assert script(train, "--data", tiny, *TRAIN, "--amp", "off", "--out", run)[0] == 0
    args = train.parse_args(["--resume", "--out", str(run)])
    assert (args.amp, args.device) == ("off", "cpu")
    assert train.parse_args(["--resume", "--out", str(run), "--amp", "bf16"]).amp == "bf16"


def test_interrupted_before_anything_is_saved(tiny, script, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(data, "read_fields", interrupted)
    status, _, err = script(train, "--data", tiny, *TRAIN, "--out", tmp_path / "run")
    assert status == 130 and err == "interrupted before the first epoch; nothing is saved\n"


def test_a_full_disk_costs_nothing_that_was_saved(whole, script, tmp_path):
    """last.pt, with its optimizer, does not fit any more; what is there stays, and the run goes on once it fits."""
    folder, uninterrupted = whole
    run = tmp_path / "run"
    assert script(train, "--data", folder, *TRAIN, *EPOCHS, "--epochs", "2", "--out", run)[0] == 0
    before = (run / "last.pt").read_bytes()
    status = ended(train_on_a_small_disk, ["--resume", "--out", str(run), "--epochs", "4"], tmp_path / "log",
                   len(before) // 2)
    *_, last = (tmp_path / "log").read_text().splitlines()
    assert status == 2 and re.fullmatch(f"error: {run}/last.pt: cannot be written: .*large", last)
    assert (run / "last.pt").read_bytes() == before and not list(run.glob("*.tmp"))
    assert script(train, "--resume", "--out", run, "--epochs", 4)[0] == 0
    same_runs(uninterrupted, run)


# ---------------------------------------------------------------------------------------------------------- checkpoints
class Code:
    """What a pickle with code in it holds: it would write a file when it is loaded."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (os.system, (f"touch {self.file}",))


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_checkpoint_is_refused_and_never_runs(finished, script, tmp_path, tiny, legacy):
    run, sign = tmp_path / "run", tmp_path / "it-ran"
    run.mkdir()
    (run / "config.json").write_text((finished[0] / "config.json").read_text())
    for name in ("best.pt", "last.pt"):
        torch.save({"model": Code(sign), "setting": {}}, run / name, _use_new_zipfile_serialization=not legacy)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Code(sign)))
    for module, *arguments in ((test, run), (train, "--resume", "--out", run),
                               (train, "--data", tiny, *TRAIN, "--weights", run / "best.pt"),
                               (train, "--data", tiny, *TRAIN, "--weights", tmp_path / "plain.pt")):
        status, _, err = script(module, *arguments)
        assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and ".pt: " in err, err
    assert not sign.exists()


# --------------------------------------------------------------------------------------------------------------- memory
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and a limit on memory")
def test_too_little_memory_ends_in_a_line_that_says_what_to_lower(whole, tmp_path):
    folder, _ = whole
    arguments = ["--data", str(folder), *TRAIN, "--tile", "2048", "--out", str(tmp_path / "run")]
    status = ended(train_in_little_memory, arguments, tmp_path / "log", 300 << 20)
    text = (tmp_path / "log").read_text()
    assert status == 2 and "Traceback" not in text and text.count("error: ") == 1
    assert "error: out of memory; lower --batch-size, then --tile" in text.splitlines()[-1]


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ..."), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory")])
def test_any_kind_of_out_of_memory(capfd, error):
    def main(_):
        raise error
    with pytest.raises(SystemExit) as end:
        process.command(main, [], less_memory="lower --tile")
    err = capfd.readouterr().err
    assert end.value.code == 2 and err.startswith("error: out of memory; lower --tile (") and err.count("\n") == 1


@pytest.mark.slow
def test_memory_stays_flat_over_100_epochs(whole, tmp_path, monkeypatch):
    used = []

    def end_epoch(*arguments):
        with open("/proc/self/statm") as file:
            used.append(int(file.read().split()[1]) * resource.getpagesize() >> 20)
        return saves(*arguments)

    saves = train.end_epoch
    monkeypatch.setattr(train, "end_epoch", end_epoch)
    train.main(["--data", str(whole[0]), *TRAIN, *EPOCHS, "--epochs", "100", "--out", str(tmp_path / "run")])
    print(f"resident memory after epochs 1, 20, 50, 100: {[used[i - 1] for i in (1, 20, 50, 100)]} MB")
    assert len(used) == 100 and max(used[50:]) < 1.02 * max(used[10:50])
