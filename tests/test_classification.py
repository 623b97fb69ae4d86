"""Training and testing of classifiers, as a user runs them."""
import csv
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import CLASSIFY, SHARED, needs, write_pictures
from PIL import Image

import data
import dedl
import models
import test
import train
from images import manifests
from networks import encoders
from running import figures, prediction, runs
from running.compute import Compute, choose_compute


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def metrics(folder):
    """The rows of a fold's metrics.csv, without the seconds."""
    header, *rows = read_csv(folder / "metrics.csv")
    return [{name: value for name, value in zip(header, row) if name != "seconds"} for row in rows]


def test_a_cross_validation_leaves_what_the_contract_names(cross_validated):
    run, folder = cross_validated
    config = json.loads((run / "config.json").read_text())
    assert config["task"] == "cls" and config["classes"] == ["blue", "green", "red"] and config["folds"] == 3
    setting = {"model": "test_resnet", "classes": 3, "image_size": 32, "recipe": "short"}
    assert config["setting"] == setting and "tile" not in config
    validated = []
    for fold in range(3):
        place = run / f"fold{fold}"
        header, *rows = read_csv(place / "metrics.csv")
        assert header[:4] == ["epoch", "train_loss", "val_loss", "val_f1_micro"] and len(rows) == 2
        assert {"lr", "seconds"} < set(header)
        for name in ("best.pt", "last.pt"):
            torch.load(place / name, weights_only=True)
        with Image.open(place / "samples.png") as figure:
            assert figure.size[0] > 500
        header, *rows = read_csv(place / "validation.csv")
        assert header == ["image", "labels", "labels_found", "blue", "green", "red"]
        validated += [row[0] for row in rows]
    records, _ = manifests.find_records(folder, task="cls", needs_validation=False)
    assert sorted(validated) == sorted(r.name for r in records if r.split == "train")  # each validates one fold


def test_measured_scores_are_those_of_the_written_probabilities(cross_validated, script):
    run, folder = cross_validated
    status, out, err = script(test, run, "--device", "cpu")
    assert status == 0, err
    scores = json.loads((run / "test.json").read_text())
    header, *rows = read_csv(run / "test.csv")
    assert header == ["image", "labels", "labels_found", "blue", "green", "red"] and len(rows) == scores["images"] == 6
    tp = fp = fn = right = 0
    per_class = {name: [0, 0, 0] for name in header[3:]}
    for row in rows:
        truth = set(row[1].split(";"))
        found = {name for name, p in zip(header[3:], row[3:]) if float(p) > 0.5}
        assert set(filter(None, row[2].split(";"))) == found
        tp, fp, fn, right = (tp + len(truth & found), fp + len(found - truth), fn + len(truth - found),
                             right + (truth == found))
        for name in per_class:
            per_class[name][0] += name in truth & found
            per_class[name][1] += name in found
            per_class[name][2] += name in truth
    assert scores["f1_micro"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert scores["recall_micro"] == pytest.approx(tp / (tp + fn))
    assert scores["precision_micro"] == pytest.approx(tp / max(1, tp + fp))
    assert scores["subset_accuracy"] == pytest.approx(right / 6)
    for name, (hit, found, support) in per_class.items():
        assert scores["per_class"][name]["support"] == support
        assert scores["per_class"][name]["f1"] == pytest.approx(2 * hit / (found + support))
    f1s = [scores["folds"][f"fold{k}"]["f1_micro"] for k in range(3)]
    assert scores["mean"]["f1_micro"] == pytest.approx(np.mean(f1s))
    assert scores["std"]["f1_micro"] == pytest.approx(np.std(f1s, ddof=1))
    assert scores["ensemble"]["f1_micro"] == scores["f1_micro"]
    for value in (scores["f1_micro"], scores["mean"]["f1_macro"]):
        assert f"{value:.4f}" in out
    with Image.open(run / "test.png") as figure:
        assert figure.size[0] > 900


def test_the_ensemble_is_the_mean_probability(cross_validated):
    run, folder = cross_validated
    compute = choose_compute("cpu", "off")
    records = [r for r in manifests.find_records(folder, task="cls")[0] if r.split == "test"]
    way = encoders.interpolation("test_resnet", "short")
    shown = data.read_labelled(records, ["blue", "green", "red"], 32, way).images
    networks = [runs.load_best(run / f"fold{k}", models.build_classifier, compute) for k in range(3)]
    of_fold = [prediction.classify(network, shown, compute).sigmoid() for network in networks]
    test.main([str(run), "--device", "cpu", "--amp", "off"])
    written = torch.tensor([[float(p) for p in row[3:]] for row in read_csv(run / "test.csv")[1:]])
    assert len(of_fold) == 3 and not torch.allclose(of_fold[0], of_fold[1], atol=1e-4)
    torch.testing.assert_close(written, sum(of_fold) / 3, atol=1e-5, rtol=0)


def test_flips_are_averaged():
    class Corner(torch.nn.Module):
        def forward(self, images):
            return images[:, 0, :1, 0].float()

    image = torch.arange(48, dtype=torch.uint8).reshape(1, 3, 4, 4)
    compute = Compute(torch.device("cpu"), "off")
    assert prediction.classify(Corner(), image, compute).item() == 0
    assert prediction.classify(Corner(), image, compute, flips=True).item() == (0 + 3 + 12 + 15) / 4


def test_the_sheet_shows_narrow_images_and_many_classes(tmp_path):
    records = []
    for i, size in enumerate([(3000, 30), (30, 3000), (40, 40)]):
        Image.new("RGB", size, (200, 60, 60)).save(tmp_path / f"{i}.png")
        records.append(manifests.Record(tmp_path / f"{i}.png", "test"))
    classes, truth = [f"class {c}" for c in range(200)], np.zeros((3, 200), bool)
    probabilities = np.full((3, 200), 0.99)
    probabilities[1, :100] = 0.2                                     # all wrong, this one least
    figures.save_labels(records, probabilities, truth, classes, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size[1] < 700 and sheet.getpixel((2, 500))[0] > 150  # the tall one stands first


def test_tta_of_a_classification(cross_validated, script):
    status, out, _ = script(test, cross_validated[0], "--tta", "--split", "train")
    assert status == 0 and "with --tta" in out
    assert json.loads((cross_validated[0] / "train.json").read_text())["tta"] is True


def test_new_images_get_probabilities(cross_validated, script, tmp_path):
    run, folder = cross_validated
    (tmp_path / "new").mkdir()
    for i in range(3):
        shutil.copy(folder / f"picture{i + 18}.png", tmp_path / "new" / f"{i}.png")
    status, out, _ = script(test, run, "--images", tmp_path / "new", folder / "picture21.png", "--amp", "off")
    assert status == 0 and "4 images" in out
    header, *rows = read_csv(run / "predictions.csv")
    assert header == ["image", "labels_found", "blue", "green", "red"]
    for row in rows:
        assert row[1].split(";") == [name for name, p in zip(header[2:], row[2:]) if float(p) > 0.5] or row[1] == ""
    assert [row[0][-5:] for row in rows[:3]] == ["0.png", "1.png", "2.png"]
    assert script(test, run, "--amp", "off")[0] == 0
    tested = [[float(p) for p in row[3:]] for row in read_csv(run / "test.csv")[1:5]]
    assert [[float(p) for p in row[2:]] for row in rows] == [pytest.approx(row, abs=1e-5) for row in tested]
    (tmp_path / "new" / "broken.png").write_bytes(b"x")
    status, out, err = script(test, run, "--images", tmp_path / "new")
    assert status == 2 and err.count("\n") == 1 and "1 of 4 cannot be predicted" in err and "broken.png" in err
    assert read_csv(run / "predictions.csv")[1] == rows[3] and len(read_csv(run / "predictions.csv")) == 5  # it adds


def test_folds_can_be_trained_one_by_one_and_gathered(coloured, script, tmp_path):
    arguments = ["--data", coloured, *CLASSIFY]
    assert script(train, *arguments, "--out", tmp_path / "whole")[0] == 0
    assert script(train, *arguments, "--out", tmp_path / "one", "--fold", 2)[0] == 0
    assert script(train, *arguments, "--out", tmp_path / "one", "--fold", 0)[0] == 0  # beside the first
    assert script(train, *arguments, "--out", tmp_path / "two", "--fold", 1)[0] == 0  # another machine
    status, _, err = script(train, *arguments, "--out", tmp_path / "one", "--fold", 0)
    assert status == 2 and "contains fold0 already; choose another folder" in err
    status, _, err = script(train, *arguments, "--out", tmp_path / "one", "--fold", 1, "--lr", 0.1)
    assert status == 2 and "argument --lr: " in err and "was started with 0.0005, not 0.1" in err
    status, _, err = script(train, *arguments, "--out", tmp_path / "one", "--fold", 1, "--epochs", 3)
    assert status == 2 and "argument --epochs: " in err
    status, out, _ = script(train, "--resume", "--out", tmp_path / "one", "--fold", 2)
    assert status == 0 and "mean of 1 folds" in out and not (tmp_path / "one" / "fold1").exists()
    status, out, _ = script(test, tmp_path / "one")
    assert status == 0 and "2 of 3 folds" in out
    shutil.copytree(tmp_path / "two" / "fold1", tmp_path / "one" / "fold1")
    assert script(test, tmp_path / "one")[0] == script(test, tmp_path / "whole")[0] == 0
    a, b = (json.loads((tmp_path / name / "test.json").read_text()) for name in ("one", "whole"))
    assert a == b  # a fold alone is the fold of the whole run
    names = [path.name for _ in range(2) if script(train, *arguments, "--fold", 0)[0] == 0
             for path in sorted(runs.RUNS.iterdir())]
    assert names == ["cls-coloured-test_resnet-seed77"] * 2 + ["cls-coloured-test_resnet-seed77-2"]


def test_a_fold_added_to_a_whole_run_does_not_narrow_it(coloured, script, tmp_path):
    arguments = ["--data", coloured, *CLASSIFY, "--epochs", 1, "--out", tmp_path / "run"]
    assert script(train, *arguments)[0] == 0
    shutil.rmtree(tmp_path / "run" / "fold1")
    shutil.rmtree(tmp_path / "run" / "fold2")
    assert script(train, *arguments, "--fold", 2)[0] == 0
    status, out, _ = script(train, "--resume", "--out", tmp_path / "run")
    assert status == 0 and "mean of 3 folds" in out and (tmp_path / "run" / "fold1" / "best.pt").is_file()


def test_a_run_is_not_mixed_with_other_data(coloured, script, tmp_path):
    arguments = ["--data", coloured, *CLASSIFY, "--out", tmp_path / "run"]
    assert script(train, *arguments, "--fold", 0)[0] == 0
    before = (tmp_path / "run" / "config.json").read_text()
    rewrite(coloured, lambda rows: [*rows[:-1], [rows[-1][0], "violet", "test"]])
    for more in (["--resume", "--out", tmp_path / "run"], [*arguments, "--fold", 1]):
        status, _, err = script(train, *more)
        assert status == 2 and "its images, their splits or labels are not those that" in err
    assert (tmp_path / "run" / "config.json").read_text() == before
    assert script(test, tmp_path / "run", "--split", "train")[0] == 0


def test_one_fold_alone_has_no_deviation(coloured, script, tmp_path):
    assert script(train, "--data", coloured, *CLASSIFY, "--out", tmp_path / "run", "--fold", 1)[0] == 0
    assert script(test, tmp_path / "run")[0] == 0
    assert json.loads((tmp_path / "run" / "test.json").read_text())["std"] is None


@pytest.mark.parametrize("swa", [pytest.param((), marks=pytest.mark.slow), ("--swa",)])
def test_a_resumed_cross_validation_equals_one_never_stopped(coloured, script, tmp_path, swa):
    arguments = ["--data", coloured, *CLASSIFY, "--epochs", 4, *swa]
    assert script(train, *arguments, "--out", tmp_path / "whole")[0] == 0
    epochs = iter(range(100))

    def interrupted(*inputs, **more):
        if next(epochs) == 6:  # in the third epoch of the second fold
            raise KeyboardInterrupt
        return whole(*inputs, **more)

    whole, train.train_epoch = train.train_epoch, interrupted
    try:
        assert script(train, *arguments, "--out", tmp_path / "parts")[0] == 130
    finally:
        train.train_epoch = whole
    status, out, err = script(train, "--resume", "--out", tmp_path / "parts")
    assert status == 0 and "fold0: going on after epoch 4" in out and "fold1: going on after epoch 2" in out, err
    for fold in range(3):
        a, b = (metrics(tmp_path / name / f"fold{fold}") for name in ("whole", "parts"))
        assert a == b and len(a) == 4
        a, b = (torch.load(tmp_path / name / f"fold{fold}" / "best.pt")["model"] for name in ("whole", "parts"))
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_swa_keeps_a_moving_average(coloured, script, tmp_path, monkeypatch):
    """Of weights and of BatchNorm's statistics, over all steps, the first of which it soon forgets."""
    after = []

    def remember(parts, *inputs):
        losses = train_step(parts, *inputs)
        after.append({name: value.clone() for name, value in parts["model"].state_dict().items()})
        return losses

    train_step = train.train_step
    monkeypatch.setattr(train, "train_step", remember)
    monkeypatch.setattr(train, "DECAY", 0.6)
    monkeypatch.setattr(dedl, "classification_scores", lambda *_: {"f1_micro": len(after) / 100, "f1_macro": 0.0})
    flags = ("--data", coloured, *CLASSIFY, "--epochs", 3, "--fold", 0, "--batch-size", 4)
    assert script(train, *flags, "--swa", "--out", tmp_path / "run")[0] == 0
    best = torch.load(tmp_path / "run" / "fold0" / "best.pt")
    for name in ("network.layer1.0.conv1.weight", "network.layer1.0.bn1.running_mean"):
        average = after[0][name]
        for steps, weights in enumerate(after[1:], 1):
            decay = min(0.6, (1 + steps) / (10 + steps))
            average = decay * average + (1 - decay) * weights[name]
        torch.testing.assert_close(best["model"][name], average)
        assert not torch.equal(average, after[-1][name])
    assert len(after) > 8 and best["epoch"] == 3


def test_without_folds_the_validation_rows_validate(coloured, script, tmp_path):
    text = (coloured / "classification.csv").read_text().splitlines()
    text[1:4] = [row.replace("train", "validation") for row in text[1:4]]
    (coloured / "classification.csv").write_text("\n".join(text))
    assert script(train, "--data", coloured, *CLASSIFY, "--folds", 1, "--out", tmp_path / "one")[0] == 0
    assert [row[0] for row in read_csv(tmp_path / "one" / "fold0" / "validation.csv")[1:]] == [
        "picture0.png", "picture1.png", "picture2.png"]
    assert script(test, tmp_path / "one")[0] == 0
    assert script(train, "--data", coloured, *CLASSIFY, "--out", tmp_path / "three")[0] == 0  # else they are left alone
    held = {row[0] for fold in range(3) for row in read_csv(tmp_path / "three" / f"fold{fold}" / "validation.csv")[1:]}
    assert len(held) == 15 and "picture0.png" not in held
    status, out, _ = script(test, tmp_path / "three", "--split", "validation")
    assert status == 0 and "3 images" in out


def test_training_learns_colours(coloured, script, tmp_path):
    status, _, _ = script(train, "--data", coloured, *CLASSIFY, "--epochs", 30, "--fold", 0, "--out", tmp_path / "run",
                          "--batch-size", 4, "--lr", 3e-3)
    assert status == 0 and script(test, tmp_path / "run")[0] == 0
    assert json.loads((tmp_path / "run" / "test.json").read_text())["f1_micro"] > 0.85


def test_the_papers_recipe_for_classification():
    args = train.parse_args(["--task", "cls", "--data", "x"])
    assert (args.recipe, args.lr, args.weight_decay, args.batch_size, args.epochs, args.class_weights, args.image_size,
            args.folds, args.gamma, args.seed) == ("paper", 3e-4, 0, 16, 20, "auto", 384, 6, 2, 77)
    rates = [train.learning_rate(args, epoch) for epoch in (0, 0.9, 8, 16, 32)]
    assert rates == pytest.approx([3e-4, 3e-4, (3e-4 + 1e-6) / 2, 1e-6, 3e-4])


def test_best_is_the_epoch_with_the_best_micro_f1_and_the_lower_loss(coloured, script, tmp_path, monkeypatch):
    f1s, losses = iter([0.5, 0.9, 0.9, 0.1, 0.9]), iter([1.0, 3.0, 2.0, 0.1, 2.5])
    monkeypatch.setattr(dedl, "classification_scores", lambda *_: {"f1_micro": next(f1s), "f1_macro": 0.0})
    whole = dedl.FocalLoss.forward

    def forward(self, logits, truth):
        loss = whole(self, logits, truth)
        return loss if loss.requires_grad else torch.tensor(next(losses))

    monkeypatch.setattr(dedl.FocalLoss, "forward", forward)
    assert script(train, "--data", coloured, *CLASSIFY, "--epochs", 5, "--fold", 0, "--out", tmp_path / "run")[0] == 0
    best, last = (torch.load(tmp_path / "run" / "fold0" / name) for name in ("best.pt", "last.pt"))
    assert best["epoch"] == 3 and len(last["state"].pop("history")) == 5
    assert last["state"] == {"epoch": 5, "best": 0.9, "best_loss": 2.0, "stale": 2, "later": 0}


def test_class_weights_of_a_fold_follow_its_training_rows(coloured, script, tmp_path):
    assert script(train, "--data", coloured, *CLASSIFY, "--class-weights", "auto", "--out", tmp_path / "run")[0] == 0
    records = [r for r in manifests.find_records(coloured, task="cls", needs_validation=False)[0] if r.split == "train"]
    for fold in range(3):
        held = {row[0] for row in read_csv(tmp_path / "run" / f"fold{fold}" / "validation.csv")[1:]}
        counts = [sum(name in r.labels for r in records if r.name not in held) for name in ("blue", "green", "red")]
        used = torch.load(tmp_path / "run" / f"fold{fold}" / "best.pt")["class_weights_used"]
        assert used == pytest.approx(dedl.inverse_frequency_weights(counts))
    names, published = ["b", "other", "tfh"], dedl.PUBLISHED_PHENOTYPE_WEIGHTS
    for wish, weights in (("auto", [1, 2, 3]), ("equal", [1, 1, 1]), ("published", [0.9475, 1.0, 0.4934]),
                          ([3.0, 2.0, 1.0], [3, 2, 1])):
        assert train.choose_weights(wish, names, published, [1, 2, 3]) == weights


def rows_with(file, label):
    return sum(label in row[1].split(";") for row in read_csv(file)[1:])


@pytest.mark.parametrize("flags", [("--model", "efficientnet_b0"), ("--model", "vit_tiny_patch16_224"),
                                   ("--gamma", "0"), ("--class-weights", "auto"), ("--class-weights", "1,2,3"),
                                   ("--amp", "bf16"), ("--amp", "auto"), ("--recipe", "paper"), ("--workers", "2"),
                                   ("--limit-train", "9"), ("--batch-size", "11")])  # 11 of 12, and one alone
def test_flags_train_classifiers(coloured, script, tmp_path, flags):
    status, _, err = script(train, "--data", coloured, *CLASSIFY, "--epochs", 1, "--fold", 0, *flags, "--out",
                            tmp_path / "run")
    assert status == 0, err
    assert script(test, tmp_path / "run")[0] == 0


def test_flags_reach_the_training(coloured, script, tmp_path):
    weights = []
    for i, flags in enumerate([(), ("--gamma", 0), ("--class-weights", "1,9,9"), ("--seed", 5)]):
        assert script(train, "--data", coloured, *CLASSIFY, "--fold", 0, *flags, "--out", tmp_path / str(i))[0] == 0
        weights.append(torch.load(tmp_path / str(i) / "fold0" / "last.pt")["model"]["network.fc.weight"])
    assert all(not torch.equal(weights[0], other) for other in weights[1:])


def test_the_synthetic_set_is_the_default(script, monkeypatch):
    from images import synthetic
    monkeypatch.setattr(synthetic, "FIELDS_PER_PATIENT", 1)
    monkeypatch.setattr(synthetic, "PICTURES_PER_PATIENT", 1)
    arguments = ["--task", "cls", "--epochs", 1, "--weights", "none", "--folds", 2, "--image-size", 32, "--fold"]
    assert script(train, *arguments, 0)[0] == script(train, *arguments, 1)[0] == 0  # the second beside the first
    assert len(list(runs.RUNS.iterdir())) == 1
    status, out, _ = script(test)
    assert status == 0 and "of 4 images by 2 of 2 folds" in out


@needs("bccd")
def test_real_blood_cells_train_and_test(script, tmp_path):
    run = tmp_path / "run"
    status, out, err = script(train, "--data", SHARED / "bccd", "--out", run, *CLASSIFY, "--fold", 1, "--epochs", 1)
    assert status == 0, err
    assert script(test, run)[0] == 0
    scores = json.loads((run / "test.json").read_text())
    assert scores["images"] == 56 and scores["per_class"]["BASOPHIL"]["support"] == 0


# -------------------------------------------------------------------------------------------------- labels of all kinds
def rewrite(folder, change):
    """Changes the manifest's rows, each a list of its cells."""
    header, *rows = read_csv(folder / "classification.csv")
    rows = change(rows)
    (folder / "classification.csv").write_text("\n".join(",".join(row) for row in [header, *rows]) + "\n")


def test_labels_that_cannot_be_learnt_or_are_none_are_said(coloured, script, tmp_path):
    rewrite(coloured, lambda rows: [[rows[0][0], "", "train"], *rows[1:-1], [rows[-1][0], "red;violet", "test"]])
    status, out, _ = script(train, "--data", coloured, *CLASSIFY, "--fold", 0, "--out", tmp_path / "run")
    assert status == 0
    assert "NOTE: class violet has no training image: it cannot be learnt" in out
    assert "has no label; it counts as of none of the classes" in out
    assert script(test, tmp_path / "run")[0] == 0
    assert json.loads((tmp_path / "run" / "test.json").read_text())["per_class"]["violet"]["support"] == 1


def test_one_class_and_images_without_it(coloured, script, tmp_path):
    rewrite(coloured, lambda rows: [[row[0], "red" if "red" in row[1] else "", row[2]] for row in rows])
    assert script(train, "--data", coloured, *CLASSIFY, "--fold", 0, "--out", tmp_path / "run")[0] == 0
    assert script(test, tmp_path / "run")[0] == 0
    assert list(json.loads((tmp_path / "run" / "test.json").read_text())["per_class"]) == ["red"]


def test_pictures_fixture_has_every_colour_in_every_split(tmp_path):
    records, _ = manifests.find_records(write_pictures(tmp_path / "x"), task="cls")
    for split in ("train", "test"):
        assert len({label for r in records if r.split == split for label in r.labels}) == 3
