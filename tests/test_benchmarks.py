"""The benchmarks run and print their tables. What they measure is not tested: machines differ."""
import re
import runpy
import sys

import pytest
import timm
import torch
from conftest import ROOT, write_folder

SCRIPTS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if path.stem != "harness")
SMALL = ["--tile", "32", "--batch", "2", "--rounds", "1", "--device", "cpu", "--amp", "off"]


@pytest.fixture
def benchmark(monkeypatch, capfd):
    """benchmark(name, *flags) -> exit status, stdout, stderr of a script in benchmarks/."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")

    def call(name, *flags):
        monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / f"{name}.py"), *map(str, flags)])
        capfd.readouterr()
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code or 0
        return status, *capfd.readouterr()
    return call


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(benchmark, name):
    status, out, _ = benchmark(name, "--help")
    assert status == 0 and f"python benchmarks/{name}.py" in out


def test_app(benchmark):
    status, out, _ = benchmark("app", *SMALL)
    assert status == 0 and len(re.findall(r"^\| `--app (none|conv|linear)` \| \d+ ms \|", out, re.M)) == 3


def test_epoch(benchmark, tiny):
    status, out, _ = benchmark("epoch", *SMALL, "--data", tiny, "--limit", 2, "--published-tile", 32)
    assert status == 0 and len(re.findall(r"^\| (ours|published recipe), .*x? +\|$", out, re.M)) == 5


def test_profile(benchmark):
    status, out, _ = benchmark("model", *SMALL, "--profile", "--arch", "unet")
    assert status == 0 and re.search(r"^\| convolution_backward \| \d+ \| \d+ \| \d+ \|$", out, re.M)


def test_step(benchmark, tiny):
    status, out, _ = benchmark("step", "--data", tiny, "--rounds", 1, "--device", "cpu", "--amp", "off")
    assert status == 0 and len(re.findall(r"^\| [^|]+ \| \d+\.\d ms \| \d+\.\d% \|$", out, re.M)) == 9


def test_minutes(benchmark, tiny, tmp_path):
    flags = ("--data", tiny, "--minutes", 0.01, "--seeds", 2, "--splits", "validation,test", "--out", tmp_path, "--amp",
             "off")
    status, out, _ = benchmark("minutes", *flags, "--sides", "ours,smp")
    rows = re.findall(r"^\| 0.01 \| (?:ours|smp) \| [\d.]+ \|(?: 0\.\d+ \(0\.\d+ to 0\.\d+\) \|){4}$", out, re.M)
    assert status == 0 and len(rows) == 4
    status, again, _ = benchmark("minutes", *flags, "--sides", "ours")  # whose results are kept
    assert status == 0 and "ours, 0.01 minutes" not in again and rows[0] in again and rows[1] not in again


def test_parts(benchmark):
    status, out, _ = benchmark("parts", *SMALL)
    assert status == 0 and len(re.findall(r"^\| .* \| \d+ ms \| \d+ ms \| [\d.]+x \|$", out, re.M)) == 5


def test_seams(benchmark, finished):
    status, out, _ = benchmark("seams", finished[0], "--fields", 1, "--side", 96, "--tile", 48, "--overlaps", 0, 16)
    assert status == 0 and len(re.findall(r"^\| (0|16) \| 0\.\d+ \|", out, re.M)) == 2


def test_targets_of_nuclei(benchmark, tiny):
    names = ["two", "touching:1:5", "border:2:1", "core:0.5:1", "distance:1", "offset:0.1"]
    status, out, _ = benchmark("nuclei", "targets", *names, "--data", tiny, "--steps", 1, "--amp", "off")
    assert status == 0 and all(re.search(rf"^\| {name} \| 0\.\d+ \|", out, re.M) for name in names)


@pytest.mark.slow
def test_cost_of_nuclei(benchmark):
    status, out, _ = benchmark("nuclei", "cost", "--rounds", 1, "--amp", "off")
    assert status == 0 and re.search(r"^\| training step \| \d+ ms \| \d+ ms \| [+-]", out, re.M)


def test_decoders_of_nuclei(benchmark, finished):
    pytest.importorskip("skimage")
    status, out, _ = benchmark("nuclei", "decoders", finished[0], "--amp", "off")
    assert status == 0 and len(re.findall(r"^\| .* \| \d\.\d+ \|.* \d+ \|$", out, re.M)) == 4


def test_nuclei_in_empty_images(benchmark, finished):
    status, out, _ = benchmark("nuclei", "empty", finished[0], "--images", 1, "--amp", "off")
    assert status == 0 and len(re.findall(r"^\| .* \| \d+\.\d \| \d+ \| [01] of 1 \|$", out, re.M)) == 7


@pytest.mark.slow
def test_what_few_images_want_instead(benchmark, tmp_path):
    folder = write_folder(tmp_path / "nine", ("train",) * 9 + ("validation", "test"))
    weights = tmp_path / "lite0.pth"
    torch.save(timm.create_model("tf_efficientnet_lite0").state_dict(), weights)
    flags = ("--data", folder, "--out", tmp_path / "runs", "--seed-list", "5,6", "--", "--steps", 1, "--epochs", 1,
             "--tile", 32, "--amp", "off")
    status, out, _ = benchmark("few_images", "instead", weights, *flags)
    chosen = re.search("^chosen: (.*)$", out, re.M)[1].split(", ")
    assert status == 0 and len(re.findall(r"^\| [^|]+ \|(?: \d+\.\d{3}[^|]*\|){5}$", out, re.M)) == 10
    assert len(set(chosen)) == 4 and {row.name for row in (tmp_path / "runs/chosen/images").glob("*")} >= set(chosen)
    assert len(list((tmp_path / "runs").glob("*/measured_eight_views.json"))) == 10


def test_one_setting_of_scaling(benchmark):
    status, out, _ = benchmark("scaling", *SMALL, "--one")
    assert status == 0 and '"memory": ' in out and float(re.search(r'"training": ([\d.]+)', out)[1]) > 0


def test_both_sides_take_the_precision_in_which_the_reference_is_fastest(benchmark, monkeypatch):
    import harness
    monkeypatch.setattr(harness, "cpu_has_bf16", lambda: True)
    for fastest in ("off", "bf16"):
        monkeypatch.setattr(harness, "in_turn", lambda sides, *_, fastest=fastest, **how: {
            amp: [1.0 + (amp != fastest)] for amp in sides})
        args = harness.parser("").parse_args(["--tile", "32", "--batch", "2", "--device", "cpu"])
        assert harness.start(args).amp_dtype == {"off": None, "bf16": torch.bfloat16}[fastest] and args.amp == fastest


def test_a_device_that_is_not_there_is_refused(benchmark):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    status, _, err = benchmark("model", "--device", "cuda")
    assert status == 2 and err.strip().splitlines()[-1].startswith("error: --device cuda")
