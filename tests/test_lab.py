"""A lab's first hour: folders without a manifest, partly annotated images, an earlier run to start from, several folds,
large files, and what comes out of them in a notebook and for other programs."""
import csv
import json
import shutil

import numpy as np
import pytest
import tifffile
import torch
from conftest import CLASSIFY, TRAIN, blobs
from PIL import Image

import data
import dedl
import models
import test
import train
from images import folders, manifests, reading
from running import figures, nuclei, prediction, runs
from running.compute import Compute
from running.process import InputError

CPU = Compute(torch.device("cpu"), "off")


def write_pairs(folder, *names, seed=0):
    """Images of blobs with their masks, each at a path (image, mask)."""
    rng = np.random.default_rng(seed)
    for image, mask in names:
        for name, pixels in zip((image, mask), blobs(rng, 50, 60)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".tif"):
                tifffile.imwrite(folder / name, pixels)
            else:
                Image.fromarray(pixels).save(folder / name)
    return folder


def table(file):
    with open(file, newline="") as handle:
        return list(csv.DictReader(handle))


# -------------------------------------------------------------------------------------------------------------- no CSV
@pytest.mark.parametrize("image, mask", [
    ("images/{}.png", "masks/{}.png"), ("images/{}.tif", "masks/{}_mask.png"), ("images/{}.png", "masks/{}_masks.tif"),
    ("images/{}.jpg", "masks/{}_labels.tif"), ("{}.tif", "{}_masks.tif"), ("P1/{}.png", "P1/{}_labels.png")])
def test_images_are_paired_with_their_masks(tmp_path, image, mask):
    write_pairs(tmp_path, *((image.format(stem), mask.format(stem)) for stem in "abcdefgh"))
    records, lines = manifests.find_records(tmp_path, seed=1)
    assert [(record.image, record.mask) for record in records] == [
        (tmp_path / image.format(stem), tmp_path / mask.format(stem)) for stem in "abcdefgh"]
    splits = [record.split for record in records]
    assert splits.count("test") == splits.count("validation") == 1
    assert "8 images with masks" in lines[0] and "no test rows: 1 of 8" in lines[1] and "no validation rows" in lines[2]
    again, _ = manifests.find_records(tmp_path, seed=1)
    assert [record.split for record in again] == splits


def test_folders_named_as_splits(tmp_path):
    write_pairs(tmp_path, *((f"{split}/images/a.png", f"{split}/masks/a.png") for split in ("train", "val", "test")),
                ("train/images/b.png", "train/masks/b.png"))
    records, lines = manifests.find_records(tmp_path)
    assert {(record.name, record.split) for record in records} == {
        ("train/images/a.png", "train"), ("train/images/b.png", "train"), ("val/images/a.png", "validation"),
        ("test/images/a.png", "test")}
    assert len(lines) == 1                                            # nothing is drawn


def test_a_manifest_is_asked_first_and_no_test_rows_are_drawn_then(tiny):
    rows = (tiny / "segmentation.csv").read_text().replace(",test", ",train").replace(",validation", ",val")
    (tiny / "segmentation.csv").write_text(rows)
    records, lines = manifests.find_records(tiny)
    assert [record.split for record in records].count("validation") == 2 and len(lines) == 1
    assert not [record for record in records if record.split == "test"]


def test_check_shows_pairs_and_what_is_left_over(tmp_path, script):
    write_pairs(tmp_path / "d", *((f"images/{stem}.png", f"masks/{stem}.png") for stem in "abcd"))
    (tmp_path / "d" / "masks" / "b.png").unlink()
    (tmp_path / "d" / "images" / "c.png").unlink()
    (tmp_path / "d" / "images" / "._a.png").write_bytes(b"as macOS leaves them")
    status, out, err = script(folders, "check", tmp_path / "d")
    assert status == 0, err
    assert f"2 images with masks, as {tmp_path / 'd/images/a.png'} with {tmp_path / 'd/masks/a.png'}" in out
    assert f"left out, without a partner: 2 files, {tmp_path / 'd/images/b.png'}, {tmp_path / 'd/masks/c.png'}\n" in out
    shutil.copy(tmp_path / "d/masks/a.png", tmp_path / "d/masks/a_labels.png")
    status, _, err = script(folders, "check", tmp_path / "d")
    assert status == 2 and "a_labels.png" in err and "is its image's mask already" in err and err.count("\n") == 1


def test_a_folder_without_pairs_says_what_it_could_hold(tmp_path):
    Image.new("L", (20, 20)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="images/a.png and masks/a.png, or a.tif and a_masks.tif"):
        manifests.find_records(tmp_path)


def test_names_of_splits_and_folders_may_have_capitals_and_predictions_are_no_data(tmp_path):
    write_pairs(tmp_path, *((f"{split}/Images/a.png", f"{split}/Masks/a_cp_masks.png") for split in
                            ("Train", "VAL", "Test")), ("pred/a.png", "pred/a_labels.tif"))
    (tmp_path / "pred" / "predictions.csv").write_text("image")
    assert [record.split for record in manifests.find_records(tmp_path)[0]] == ["test", "train", "validation"]
    assert len(manifests.find_records(tmp_path)[1]) == 1


def test_a_folder_that_grew_since_the_training_is_noted(tmp_path, script):
    names = [(f"images/{stem}.png", f"masks/{stem}.png") for stem in "abcdefgh"]
    folder = write_pairs(tmp_path / "d", *names[:7])
    assert script(train, "--data", folder, *TRAIN, "--out", tmp_path / "run")[0] == 0
    status, out, _ = script(test, tmp_path / "run")
    assert status == 0 and "have changed" not in out and "no test rows: 1 of 7" in out
    write_pairs(folder, names[7])
    status, out, _ = script(test, tmp_path / "run")
    assert status == 0 and "its images or their splits have changed since the training" in out


# ---------------------------------------------------------------------------------------------- partly annotated images
def hide(folder, ignored):
    """Add a column `ignore` to a manifest: {image's stem: pixels (H, W)}."""
    header, *rows = (folder / "segmentation.csv").read_text().splitlines()
    lines = [f"{header},ignore"]
    for row in rows:
        stem = row.partition(".")[0]
        if stem in ignored:
            Image.fromarray(ignored[stem].astype(np.uint8)).save(folder / f"{stem}_ignore.png")
        lines.append(f"{row},{stem}_ignore.png" if stem in ignored else f"{row},")
    (folder / "segmentation.csv").write_text("\n".join(lines))


def left_half(file):
    ignore = np.asarray(Image.open(file)) * 0
    ignore[:, :ignore.shape[1] // 2] = 1
    return ignore


def test_neither_training_nor_scores_see_ignored_pixels(tiny, tmp_path, script):
    numbers = (1, 4, 7)                                               # of train, validation and test
    hide(tiny, {f"field{number}": left_half(tiny / f"field{number}.png") for number in numbers})
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    for number in numbers:                                            # other nuclei where nobody annotated
        labels = np.array(Image.open(tiny / f"labels{number}.png"))
        ignore = left_half(tiny / f"field{number}.png") > 0
        labels[ignore & ~np.isin(labels, labels[~ignore])] = 0
        Image.fromarray(labels).save(tiny / f"labels{number}.png")
        labels[:8, :8][labels[:8, :8] == 0] = 9
        Image.fromarray(labels).save(other / f"labels{number}.png")
    found = []
    for folder in (tiny, other):
        run = tmp_path / f"run_{folder.name}"
        status, _, err = script(train, "--data", folder, *TRAIN, "--app", "conv", "--epochs", 2, "--out", run)
        assert status == 0, err
        assert script(test, run)[0] == 0
        scores = json.loads((run / "test.json").read_text())
        del scores["data"]
        found.append((torch.load(run / "best.pt")["model"], scores))
    (model, scores), (other_model, other_scores) = found
    assert all(torch.equal(model[name], other_model[name]) for name in model) and scores == other_scores


@pytest.mark.parametrize("form", ["conv", "linear"])
def test_app_does_not_see_ignored_pixels(form):
    torch.manual_seed(0)
    app = dedl.build_app(form, 32, 3)
    logits = torch.randn(2, 3, 32, 32, requires_grad=True)
    truth = torch.randint(3, (2, 32, 32))
    hidden = torch.rand(2, 32, 32) < 0.3
    results = []
    for filled in (truth.masked_fill(hidden, dedl.IGNORED), truth.clone().masked_fill_(hidden, dedl.IGNORED)):
        changed = torch.where(hidden[:, None], 5.0 * torch.randn_like(logits), logits) if form == "conv" else logits
        penalty, own = app(changed, filled, torch.ones(3))
        results.append((penalty.item(), own.item()))
    gradient, = torch.autograd.grad(app(logits, truth.masked_fill(hidden, dedl.IGNORED), torch.ones(3))[0], logits)
    if form == "conv":                                                # linear layers mix the pixels of a row
        assert gradient.movedim(1, -1)[hidden].abs().max() == 0
    assert gradient.movedim(1, -1)[~hidden].abs().max() > 0
    assert np.isfinite(results).all()


def test_nuclei_in_ignored_pixels_do_not_count():
    truth = torch.zeros(20, 30, dtype=torch.int32)
    truth[2:8, 2:8], truth[2:8, 12:18], truth[12:18, 22:28] = 1, 2, 3
    found = truth.clone()
    found[12:18, 22:28] = 0
    found[12:18, 2:8] = 4                                             # nobody annotated there
    known = torch.ones(20, 30, dtype=torch.bool)
    known[10:, :10] = False
    ious, found_number, true_number = dedl.match_nuclei(found, truth, known)
    assert (ious == 1).all() and (len(ious), found_number, true_number) == (2, 2, 3)
    known[:, 4:8] = False                                             # most of 1: in neither then
    assert dedl.match_nuclei(found, truth, known)[1:] == (1, 2)
    known[:, 13:15] = False                                           # a part of 2: the rest of it counts
    ious, *numbers = dedl.match_nuclei(found, truth, known)
    assert ious.tolist() == [1] and numbers == [1, 2]


@pytest.mark.parametrize("recipe", ["short", "paper"])
def test_each_tile_holds_annotated_pixels(recipe):
    rng = np.random.default_rng(0)
    image, labels = blobs(rng, 150, 200)
    known = torch.zeros(150, 200, dtype=torch.bool)
    known[100:140, 10:60] = True
    field = manifests.Field(None, image[None], ("grey",), reading.find_limits(image[None]),
                            torch.from_numpy(labels.astype(np.int32)), True, known)
    tiles = data.Crops([field], 32, recipe=recipe, passes=20, classes=3)
    assert len(tiles) == 20 * (2 if recipe == "short" else 4)
    shares = [(truth != dedl.IGNORED).float().mean().item() for _, truth in map(tiles.__getitem__, range(len(tiles)))]
    assert 0 < min(shares) < 0.7 < max(shares)


def test_ignored_pixels_are_hatched(tmp_path):
    labels = torch.zeros(64, 64, dtype=torch.int32)
    labels[10:30, 10:30] = 1
    for known in (torch.ones(64, 64, dtype=torch.bool), torch.arange(64).expand(64, 64) < 32):
        image = np.zeros((1, 64, 64), np.uint8)
        record = manifests.Record(tmp_path / "a.png", "test")
        field = manifests.Field(record, image, ("grey",), np.float32([0, 1]), labels, True, known)
        figures.save_samples([("", field, labels)], tmp_path / "s.png")
        drawn = np.asarray(Image.open(tmp_path / "s.png"))
        assert ((drawn == figures.SPLIT).all(-1).sum() > 1000) == (not known.all())


def test_an_ignore_file_of_another_size_is_refused(tiny, script, tmp_path):
    hide(tiny, {"field1": np.zeros((5, 5))})
    status, _, err = script(train, "--data", tiny, *TRAIN, "--out", tmp_path / "run")
    assert status == 2 and "field1_ignore.png" in err and err.count("\n") == 1


def test_an_image_that_is_ignored_as_a_whole_is_refused(tiny, script, tmp_path):
    hide(tiny, {"field4": np.ones(Image.open(tiny / "field4.png").size[::-1])})
    status, _, err = script(train, "--data", tiny, *TRAIN, "--out", tmp_path / "run")
    assert status == 2 and "field4_ignore.png: ignores all pixels; leave this image out" in err


def test_an_ignore_file_lies_beside_its_mask(tmp_path):
    write_pairs(tmp_path, ("images/a.png", "masks/a_mask.png"), ("images/b.png", "masks/b_mask.png"))
    Image.fromarray(left_half(tmp_path / "images" / "a.png")).save(tmp_path / "masks" / "a_ignore.png")
    (a, b), _ = manifests.find_records(tmp_path)
    assert a.ignore == tmp_path / "masks" / "a_ignore.png" and b.ignore is None
    known = manifests.read_field(a).known
    assert not known[:, :30].any() and known[:, 30:].all() and manifests.read_field(b).known.all()


# ---------------------------------------------------------------------------------------------------------- fine-tuning
def test_an_earlier_run_is_trained_further(finished, tmp_path, script, monkeypatch):
    run, folder = finished
    begun = {}

    def train_epoch(parts, *others):
        begun.update({name: value.clone() for name, value in parts["model"].state_dict().items()})
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "train_epoch", train_epoch)
    flags = ("--data", folder, "--device", "cpu", "--amp", "off", "--weights", run)
    assert script(train, *flags, "--out", tmp_path / "on")[0] == 130
    saved = torch.load(run / "best.pt")["model"]
    assert saved.keys() == begun.keys() and all(torch.equal(saved[name], begun[name]) for name in saved)
    config = runs.read_config(tmp_path / "on")
    assert config["weights_used"] == str(run) and config["depth"] == 2 and config["lr"] == pytest.approx(0.3 * 2e-3)
    assert script(train, *flags, "--lr", 1e-4, "--out", tmp_path / "rate")[0] == 130
    assert runs.read_config(tmp_path / "rate")["lr"] == 1e-4
    status, _, err = script(train, *flags, "--arch", "unetpp", "--out", tmp_path / "other")
    assert status == 2 and "argument --weights: " in err and "--arch unet" in err
    status, _, err = script(train, *flags, "--task", "cls", "--out", tmp_path / "other")
    assert status == 2 and "--task seg" in err


def test_the_first_convolution_goes_by_the_names_of_stains(tmp_path):
    setting = {"encoder": "test_resnet", "in_channels": 2, "depth": 2, "decoder_channels": [8, 8], "classes": 3}
    earlier = models.build_segmenter(**setting)
    runs.save_json({"task": "seg", "folds": 1, "nucleus": {}, "setting": setting}, tmp_path / "config.json")
    runs.save_checkpoint({"model": earlier.state_dict()}, tmp_path / "best.pt")
    config = {"setting": setting, "channels": ["DAPI", "CD4"]}
    first = next(name for name, value in earlier.state_dict().items() if value.ndim == 4)
    old = earlier.state_dict()[first]
    for channels, expected in {
        ("CD4", "DAPI"): [old[:, 1], old[:, 0]],
        ("CD4",): [old[:, 1]],
        ("CD8", "CD4", "PD1"): [old.sum(1) / 3, old[:, 1], old.sum(1) / 3],
        ("grey",): [old.sum(1)],
    }.items():
        new = models.build_segmenter(**setting | {"in_channels": len(channels)})
        found = {"setting": setting | {"in_channels": len(channels)}, "channels": channels, "fold": 3,
                 "weights_used": str(tmp_path)}
        runs.start_from(new, models.build_segmenter, found, config)
        torch.testing.assert_close(new.state_dict()[first], torch.stack(expected, 1))
        assert torch.equal(new.head.weight, earlier.head.weight)


def test_the_head_goes_by_the_names_of_classes(cross_validated, tmp_path):
    run, _ = cross_validated
    earlier = runs.read_config(run)
    for number in (1, 7):                                             # of fold 7, which is not there, fold 0
        setting = earlier["setting"] | {"classes": 4}
        found = {"setting": setting, "classes": ["blue", "pink", "red", "green"], "fold": number,
                 "weights_used": str(run)}
        new = models.build_classifier(**setting)
        before = new.network.get_classifier().weight.clone()
        runs.start_from(new, models.build_classifier, found, earlier)
        old = torch.load(run / f"fold{1 if number == 1 else 0}" / "best.pt")["model"]
        old_head = next(value for name, value in reversed(old.items()) if value.shape[:1] == (3,) and value.ndim > 1)
        head = new.network.get_classifier().weight
        assert torch.equal(head[[0, 2, 3]], old_head[[0, 2, 1]]) and torch.equal(head[1], before[1])
        own = new.state_dict()
        same = [torch.equal(own[name], value) for name, value in old.items() if own[name].shape == value.shape]
        assert all(same) and len(same) > 10


def test_a_classification_is_trained_further(cross_validated, tmp_path, script):
    run, folder = cross_validated
    status, out, err = script(train, "--data", folder, "--recipe", "short", "--weights", run, "--folds", 3, "--fold", 1,
                              "--epochs", 1, "--device", "cpu", "--amp", "off", "--out", tmp_path / "on")
    assert status == 0, err
    config = runs.read_config(tmp_path / "on")
    assert config["model"] == "test_resnet" and config["image_size"] == 32 and config["weights_used"] == str(run)


# ---------------------------------------------------------------------------------------------------------- in Python
def test_segment_gives_what_test_py_writes(finished, tmp_path, script):
    run, folder = finished
    assert script(test, run, "--save-masks", tmp_path, "--device", "cpu", "--amp", "off")[0] == 0
    loaded = test.load(run, "cpu", "off")
    for record in manifests.find_records(folder)[0]:
        if record.split == "test":
            image = np.asarray(Image.open(record.image))
            labels = test.segment(loaded, image)
            assert labels.dtype == np.int32 and labels.shape == image.shape
            assert (labels == tifffile.imread(tmp_path / f"{record.image.stem}_labels.tif")).all()
            for same in (image[None], image[..., None], image.astype(float) * 3 + 7):
                assert (test.segment(loaded, same) == labels).mean() > 0.99
    assert (test.segment(str(run), image) == labels).mean() > 0.99    # a folder will do
    with pytest.raises(InputError, match="3 channels; the run was trained on 1"):
        test.segment(loaded, np.zeros((40, 50, 3), np.uint8))


def test_classify_gives_what_test_py_writes(cross_validated, script):
    run, folder = cross_validated
    assert script(test, run, "--device", "cpu", "--amp", "off")[0] == 0
    loaded = test.load(run, "cpu", "off")
    for row in table(run / "test.csv"):
        image = np.asarray(Image.open(folder / row["image"]))
        found = test.classify(loaded, image)
        assert found == pytest.approx({name: float(row[name]) for name in ("blue", "green", "red")}, abs=1e-5)
        assert test.classify(loaded, np.moveaxis(image, 2, 0)) == found
        assert row["labels_found"].split(";") == ([name for name, p in found.items() if p > 0.5] or [""])


# ----------------------------------------------------------------------------------------------- what is told meanwhile
def test_a_row_an_image_the_worst_first(finished, script):
    run, _ = finished
    assert script(test, run)[0] == 0
    rows = table(run / "test.csv")
    ious = [float(row["iou"]) for row in rows]
    scores = json.loads((run / "test.json").read_text())
    assert ious == sorted(ious) and np.mean(ious) == pytest.approx(scores["mean_image_iou"], abs=1e-4)
    assert np.mean([float(row["ap50"]) for row in rows]) == pytest.approx(scores["ap50_mean_image"], abs=1e-4)
    assert sum(int(row["nuclei"]) for row in rows) == scores["nuclei"] and {row["image"] for row in rows} == {
        "field6.png", "field7.png", "field8.png"}


def test_the_time_left_is_that_of_the_whole_run(coloured, script, tmp_path, monkeypatch):
    bars = []
    progress = train.progress

    def remember(items, what, unit="image", **settings):
        bars.append((what, unit, settings))
        return progress(items, what, unit, **settings)
    monkeypatch.setattr(train, "progress", remember)
    status, out, _ = script(train, "--data", coloured, *CLASSIFY, "--out", tmp_path / "run")
    lines = [line for line in out.splitlines() if line.startswith("epoch")]
    assert status == 0 and len(lines) == 6 and all(line.endswith(" left") for line in lines)
    assert lines[-1].endswith("0:00:00 left") and lines[0].startswith("epoch   1/2")
    whats, units, settings = zip(*bars)
    assert whats[:2] == ("epoch 1/2", "epoch 2/2") and set(units) == {"image"}
    batches = settings[0]["total"] // 6                               # three folds of two epochs
    assert [own["total"] - own["initial"] for own in settings] == [6 * batches, 5 * batches, 4 * batches, 3 * batches,
                                                                   2 * batches, batches]


def test_help_names_the_flags_that_matter_first(script):
    _, out, _ = script(train, "--help")
    few, more = out.split("finer settings:")
    for flag in ("--task", "--data", "--epochs", "--weights", "--folds", "--resume"):
        assert f"  {flag} " in few, flag
    assert "  --lr " in more and "  --lr " not in few
    assert "usage: see below" in out


# -------------------------------------------------------------------------------------- segmentation, several folds
@pytest.fixture(scope="module")
def folded(tmp_path_factory):
    """(run, data folder) of a segmentation of two folds, of three patients."""
    from conftest import write_folder
    folder = write_folder(tmp_path_factory.mktemp("folded") / "tiny")
    header, *rows = (folder / "segmentation.csv").read_text().splitlines()
    patients = [f"{row},P{i % 3}" if ",train" in row else f"{row},Q{i}" for i, row in enumerate(rows)]
    (folder / "segmentation.csv").write_text("\n".join([f"{header},patient", *patients]))
    run = folder.parent / "run"
    train.main(["--data", str(folder), *TRAIN, "--folds", "2", "--out", str(run)])
    return run, folder


def test_segmentation_in_folds(folded, script, tmp_path):
    run, folder = folded
    for fold in ("fold0", "fold1"):
        assert {"best.pt", "last.pt", "metrics.csv", "samples.png"} <= {file.name for file in (run / fold).iterdir()}
    status, out, err = script(test, run, "--device", "cpu", "--amp", "off", "--save-probabilities", tmp_path)
    assert status == 0 and " ± " in out, err
    scores = json.loads((run / "test.json").read_text())
    assert scores["folds"].keys() == {"fold0", "fold1"} and scores["ensemble"]["iou"] == scores["iou"]
    ious = [scores["folds"][fold]["iou"] for fold in ("fold0", "fold1")]
    assert scores["mean"]["iou"] == pytest.approx(np.mean(ious))
    assert scores["std"]["iou"] == pytest.approx(np.std(ious, ddof=1))
    networks = [runs.load_best(run / fold, models.build_segmenter, CPU) for fold in ("fold0", "fold1")]
    for record in manifests.find_records(folder)[0]:
        if record.split == "test":
            field = manifests.read_field(record)
            mean = sum(prediction.predict(network, field, CPU) for network in networks) / 2
            written = np.asarray(Image.open(tmp_path / f"{record.image.stem}.png")) / 65535
            assert np.abs(written - mean.sum(0).numpy()).max() < 1e-4
    image = np.asarray(Image.open(folder / "field7.png"))
    assert script(test, run, "--images", folder / "field7.png", "--device", "cpu", "--amp", "off")[0] == 0
    labels = tifffile.imread(run / "predictions" / "field7_labels.tif")
    assert (test.segment(test.load(run, "cpu", "off"), image) == labels).all()


def test_folds_keep_patients_whole_and_are_compared_by_their_parts(folded, script, tmp_path):
    run, folder = folded
    parts = [torch.load(run / fold / "best.pt")["validation"] for fold in ("fold0", "fold1")]
    assert sorted(len(part["counts"]) for part in parts) == [1, 3] or sorted(
        len(part["counts"]) for part in parts) == [2, 2]
    status, out, err = script(test, run, run)
    whole = dedl.segmentation_scores(torch.cat([part["counts"] for part in parts]))
    assert status == 0 and f"{run} on the validation parts of its 2 folds: iou {whole['iou']:.4f}\n" in out, err
    for number in (0, 1):
        one = ("--folds", 2, "--fold", number, "--out", tmp_path / "one")
        assert script(train, "--data", folder, *TRAIN, *one)[0] == 0
        own, of_all = (torch.load(place / f"fold{number}" / "best.pt")["model"] for place in (tmp_path / "one", run))
        assert all(torch.equal(own[name], of_all[name]) for name in own)
    status, _, err = script(train, "--data", folder, *TRAIN, "--fold", 0, "--out", tmp_path / "no")
    assert status == 2 and "argument --fold: 0 is not one of several folds" in err


def test_folds_are_exported_as_one_network(folded, script, tmp_path):
    run, _ = folded
    assert script(test, run, "--export", tmp_path / "model.pt2")[0] == 0
    network = torch.export.load(tmp_path / "model.pt2").module()
    image = torch.rand(1, 1, 50, 70)
    folds = [runs.load_best(run / fold, models.build_segmenter, CPU) for fold in ("fold0", "fold1")]
    with torch.no_grad():
        mean = sum(fold(image).softmax(1) for fold in folds) / 2
        assert (network(image).softmax(1) - mean).abs().max() < 1e-5


# --------------------------------------------------------------------------------------------------------- large images
@pytest.mark.parametrize("how", [{}, {"compression": "zlib", "tile": (64, 64)}, {"compression": "zlib"}])
def test_large_pages_stay_on_the_disk(tmp_path, monkeypatch, how):
    values = np.random.default_rng(0).integers(0, 60000, (2, 300, 200)).astype(np.uint16)
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as tiff:
        tiff.write(values, metadata={"axes": "CYX", "Channel": {"Name": ["DAPI", "CD4"]}}, **how)
    small, _ = reading.read_image(tmp_path / "a.ome.tif", ("DAPI",))
    assert not isinstance(small, np.memmap)
    monkeypatch.setattr(reading, "LARGE", 1000)
    for channels in (("DAPI",), ("CD4", "DAPI")):
        image, names = reading.read_image(tmp_path / "a.ome.tif", channels)
        mapped = image
        while mapped is not None and not isinstance(mapped, np.memmap):
            mapped = mapped.base
        assert mapped is not None and names == channels
        assert (image == values[[0] if len(channels) == 1 else [1, 0]]).all()
    limits = reading.find_limits(image)
    window = manifests.Field(None, image, names, limits).window(slice(10, 50), slice(20, 90))
    torch.testing.assert_close(window, torch.from_numpy(reading.normalise(values[[1, 0]], limits)[:, 10:50, 20:90]))


def test_of_a_pyramid_the_full_level_is_taken(tmp_path):
    values = np.random.default_rng(0).integers(0, 60000, (2, 256, 192)).astype(np.uint16)
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as tiff:
        tiff.write(values, subifds=2, tile=(64, 64), metadata={"axes": "CYX", "Channel": {"Name": ["DAPI", "CD4"]}})
        for step in (2, 4):
            tiff.write(values[:, ::step, ::step], subfiletype=1, tile=(64, 64))
    image, _ = reading.read_image(tmp_path / "a.ome.tif", ("CD4",))
    assert (image[0] == values[1]).all()


# --------------------------------------------------------------------------------------------------------------- QuPath
def test_geojson_has_a_polygon_a_nucleus(finished, script, tmp_path):
    labels = torch.zeros(40, 50, dtype=torch.int32)
    y, x = np.mgrid[:40, :50]
    labels[torch.from_numpy(np.hypot(y - 20, x - 30) < 9)] = 7
    labels[3, 3] = 2
    nuclei.save_geojson(labels, tmp_path / "a.geojson")
    written = json.loads((tmp_path / "a.geojson").read_text())
    assert written["type"] == "FeatureCollection"
    for feature, number in zip(written["features"], (2, 7), strict=True):
        (ring,), properties = feature["geometry"]["coordinates"], feature["properties"]
        assert feature["geometry"]["type"] == "Polygon" and ring[0] == ring[-1]
        assert properties == {"objectType": "detection", "name": str(number)}
        (x0, y0), (x1, y1) = np.min(ring, 0), np.max(ring, 0)
        inside = (labels == number).nonzero()
        assert (y0, x0) == tuple(inside.amin(0).tolist()) and (y1 - 1, x1 - 1) == tuple(inside.amax(0).tolist())
        ends = np.array(ring)
        area = abs(np.sum(ends[:-1, 0] * ends[1:, 1] - ends[1:, 0] * ends[:-1, 1])) / 2
        assert area == len(inside)
    run, folder = finished
    assert script(test, run, "--images", folder / "field1.png", "--geojson", "--save-masks", tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "field1.geojson").is_file()
    assert script(test, run, "--geojson", "--save-masks", tmp_path / "m")[0] == 0
    assert len(list((tmp_path / "m").glob("*.geojson"))) == 3
