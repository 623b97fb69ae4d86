"""benchmarks/tables.py: which runs it plans, that it goes on where it stopped, and what it makes of their scores."""
import json
import re
import subprocess
import sys
import time

import pytest
from conftest import ROOT, TRAIN

SMALL = ["--encoder", "test_resnet", *TRAIN[2:-4]]


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import tables
    return tables


def pretend(job, split="test", **scores):
    """Writes what a finished run leaves."""
    job.folder.mkdir(parents=True)
    config = {"device": "cpu", "amp": "float32", "versions": {"torch": "2"}, "weights_used": "none"}
    (job.folder / "config.json").write_text(json.dumps(config))
    (job.folder / f"{split}.json").write_text(json.dumps(scores))


def test_paper_tables_are_planned_whole(tables, tiny, coloured, tmp_path):
    args = tables.parse_args(["segmentation", "--data", str(tiny), "--out", str(tmp_path)])
    jobs = tables.plan(args)
    assert len(jobs) == 2 * 12 * 5 * 5 and len({job.folder for job in jobs}) == len(jobs)
    assert [job.seed for job in jobs] == sorted(job.seed for job in jobs)  # each cell has a seed before one has two
    relu = [job for job in jobs if job.cell["app"] == "linear:relu"]
    assert len(relu) == 2 * 12 * 5 and all({"--app=linear", "--app-activation=relu"} < set(job.flags) for job in relu)
    args = tables.parse_args(["classification", "--data", str(coloured), "--seeds", "1"])
    assert len(tables.plan(args)) == 29
    assert len(tables.PAPER_IOU["unet"]) == len(tables.PAPER_IOU["unetpp"]) == 12


def test_runs_of_other_flags_have_other_folders(tables, tiny, tmp_path):
    def folders(*flags):
        return {job.folder for job in tables.plan(tables.parse_args(
            ["efficiency", "--data", str(tiny), "--out", str(tmp_path), *flags]))}
    assert len(folders()) == 6 * 3 * 5
    assert folders("--seeds", "2") < folders()                       # more seeds, or values, go on with what is there
    assert folders("--vary", "limit-train=8,all") < folders()
    assert not folders("--", "--lr", "4e-3") & folders()
    assert folders("--", "--lr=0.001") == folders("--", "--lr", "1e-3")
    assert not folders("--", "--epochs", "5", "--batch-size", "8") & folders("--", "--epochs", "8", "--batch-size", "5")
    before = folders()
    rows = (tiny / "segmentation.csv").read_text().splitlines()
    (tiny / "segmentation.csv").write_text("\n".join(rows[:1] + rows[2:]))
    assert not before & folders()                                    # other images, though in a folder of that name


@pytest.mark.parametrize("flags,said", [(("--vary", "lr"), "--vary: lr is not"), (("--", "--lr", "x"), "--lr"),
                                        (("--vary", "app=cnov"), "--app"),
                                        (("--vary", "limit-train=all,8", "--plot", "x", "--vary", "limit-train=a"),
                                         "--plot"),
                                        (("--vary", "enc=resnet18"), "--vary"), (("--vary", "seed=1,2"), "--vary"),
                                        (("--", "--app", "none"), "--app: behind"),
                                        (("--vary", "encoder=resnet18,resnt34"), "resnt34")])
def test_bad_flags_end_before_the_first_run(tables, tiny, tmp_path, capsys, flags, said):
    with pytest.raises(SystemExit) as end:
        tables.process.command(tables.main, ["efficiency", "--data", str(tiny), "--out", str(tmp_path / "out"), *flags])
    assert end.value.code == 2 and said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_intervals(tables):
    # scipy.stats.t.interval(0.95, 2, 2, 1 / 3 ** 0.5)
    mean, beyond = tables.mean_and_interval([1, 2, 3])
    assert mean == 2 and beyond == pytest.approx(2.48414, abs=1e-3)
    assert tables.mean_and_interval([0.0, 1.0] * 15 + [0.5])[1] == pytest.approx(2.042 * 0.25 ** 0.5 / 31 ** 0.5)


def test_means_and_paired_differences(tables, tiny, tmp_path):
    args = tables.parse_args(["segmentation", "--data", str(tiny), "--out", str(tmp_path), "--seeds", "3", "--vary",
                              "app=none,conv", "--vary", "encoder=resnet18,resnet34", "--vary", "arch=unet"])
    args.scores = ["iou"]
    iou = {"none": (0.50, 0.60, 0.70), "conv": (0.51, 0.62, 0.73)}
    for job in tables.plan(args):
        if (job.cell["encoder"], job.seed) != ("resnet34", 3):       # this seed is not done yet
            pretend(job, iou=iou[job.cell["app"]][job.seed - 1])
    found = tables.markdown(tables.plan(args), args)
    lines = {line.split(" | ")[0].strip("| "): line for line in found.splitlines() if line.startswith("| ")}
    assert "10 of 12 runs" in found
    assert lines["resnet18"] == ("| resnet18 | 0.6000 ± 0.1000 | 0.6200 ± 0.1100 | +0.0200 [-0.0048, +0.0448] | 3 | "
                                 "*0.4347* | *0.4788* | *+0.0441* |")
    assert "| 0.5500 ± 0.0707 | 0.5650 ± 0.0778 | +0.0150 [-0.0485, +0.0785] | 2 |" in lines["resnet34"]
    assert "+0.0150 [-0.0485, +0.0785]" in lines["mean over lines"]   # over the two seeds that all cells have


def test_what_is_done_is_not_done_again(tables, tiny, tmp_path, capfd):
    flags = ["efficiency", "--data", str(tiny), "--out", str(tmp_path), "--seeds", "1", "--vary", "limit-train=2,all",
             "--vary", "app=conv", "--devices", "cpu", "--plot", str(tmp_path / "plot.png"), "--", *SMALL]
    for job in tables.plan(tables.parse_args(flags)):
        tables.one([str(job.folder), "test", "cpu", *job.flags])
    assert len(list(tmp_path.glob("*/best.pt"))) == 2
    capfd.readouterr()
    tables.main(flags)                                                # without a further process
    said = capfd.readouterr().out
    assert "of them done" not in said and "2 of 2 runs, measured on the test split" in said
    assert len(re.findall(r"^\| (?:2|all) \| [\d.]+ \| 1 \|", said, re.M)) == 6  # IoU, mean image IoU, AP@0.5
    assert (tmp_path / "plot.png").is_file() and not list(tmp_path.glob("*/*.pt"))


@pytest.mark.slow
def test_goes_on_after_a_kill(tiny, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "efficiency", "--data", str(tiny), "--out",
               str(out), "--seeds", "1", "--vary", "limit-train=2", "--vary", "app=conv", "--plot",
               str(tmp_path / "plot.png"), "--devices", "cpu", "--", *SMALL, "--epochs=8"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not list(out.glob("*/last.pt")):
        assert first.poll() is None, first.stdout.read()
        time.sleep(0.05)
    first.terminate()
    first.communicate()
    assert first.returncode and not list(out.glob("*/test.json"))
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert "1 runs, 0 of them done" in second.stdout and "1 of 1 runs, measured on the test split" in second.stdout
    assert len(re.findall(r"^\| 2 \| [\d.]+ \| 1 \|", second.stdout, re.M)) == 3   # IoU, mean image IoU, AP@0.5
    assert all("going on after epoch" in log.read_text() for log in out.glob("*.log"))
    assert (tmp_path / "plot.png").is_file() and not list(out.glob("*/*.pt"))
