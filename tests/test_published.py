"""As published: what `--recipe paper` and the linear form of APP do, held against the authors' notebooks."""
import copy
import math

import numpy as np
import pytest
import torch
from conftest import TRAIN
from torch import nn
from torchvision.transforms import v2

import data
import test
import train
from images import manifests
from running import runs


@pytest.mark.parametrize("recipe", ["paper", "short"])
def test_the_autoencoder_has_its_own_optimizer(tiny, tmp_path, recipe):
    run = tmp_path / "run"
    train.main(["--data", str(tiny), "--out", str(run), *TRAIN, "--recipe", recipe, "--weight-decay", "0.1"])
    last = torch.load(run / "last.pt")
    own, = last["app_optimizer"]["param_groups"]
    assert (own["lr"], own["weight_decay"], len(own["params"])) == (1e-3, 0, len(last["app"]) - 1)  # one is a buffer
    of_network, = last["optimizer"]["param_groups"]
    assert of_network["lr"] != 1e-3 and of_network["weight_decay"] == 0.1
    assert len(last["app_optimizer"]["state"]) == len(own["params"])  # Adam's moments, to go on with


@pytest.mark.parametrize("app, activation", [("linear", "relu"), ("linear", "gelu"), ("none", "relu")])
def test_a_training_step_is_the_published_one(tiny, tmp_path, monkeypatch, app, activation):
    """Network, autoencoder and both optimizers, after an epoch of one batch, against the lines of the notebook."""
    def published_step(model, autoencoder, images, masks, weights):
        optimizer = torch.optim.Adam(model.parameters(), lr=3.6e-4, weight_decay=1e-5)
        optimizer_ae = torch.optim.Adam(autoencoder.parameters(), lr=1e-3) if autoencoder else None
        criterion = nn.CrossEntropyLoss(reduction="sum", weight=torch.tensor(weights))
        outputs = model(images)
        loss = criterion(outputs, masks)
        if autoencoder:
            loss = loss + criterion(autoencoder(outputs), masks)
        loss.backward()
        optimizer.step()
        if autoencoder:
            optimizer_ae.step()

    def epoch(parts, loader, *inputs):
        seen.update(batches=list(loader), before=copy.deepcopy(parts["model"].train()),
                    app_before=copy.deepcopy(parts.get("app")), after=parts["model"], app_after=parts.get("app"))
        return train_epoch(parts, loader, *inputs)

    seen, train_epoch = {}, train.train_epoch
    monkeypatch.setattr(train, "train_epoch", epoch)
    run = tmp_path / "run"
    train.main(["--data", str(tiny), "--out", str(run), *TRAIN, "--recipe", "paper", "--batch-size", "64", "--app", app,
                "--app-activation", activation, "--amp", "off"])
    (images, masks), = seen["batches"]
    model, autoencoder = seen["before"], None
    if app == "linear":
        layers = [layer for layer in seen["app_before"].modules() if isinstance(layer, nn.Linear)]
        between = {"relu": nn.ReLU, "gelu": nn.GELU}[activation]
        autoencoder = nn.Sequential(*[part for layer in layers for part in (layer, between())])
    published_step(model, autoencoder, images, masks, runs.read_config(run)["class_weights_used"])
    pairs = list(zip(model.parameters(), seen["after"].parameters()))
    if autoencoder:  # but for two biases whose gradients are 0 but for rounding, as both classes' errors sum to 0
        pairs += list(zip(autoencoder.parameters(), seen["app_after"].parameters()))
        del pairs[-1], pairs[-2]
    for published, own in pairs:
        assert ((own - published).abs() > 5e-6).float().mean() < 0.02  # Adam's step of a rounding error has any sign
    assert len(pairs) == len(list(model.parameters())) + 20 * bool(autoencoder)


@pytest.mark.parametrize("recipe", ["paper", "short"])
def test_published_classifiers_get_imagenets_input(coloured, tmp_path, recipe):
    """Mean and deviation of ImageNet and bilinear resize, though this model's own are 0.5 and bicubic."""
    run = tmp_path / "run"
    train.main(["--task", "cls", "--data", str(coloured), "--out", str(run), "--recipe", recipe, "--model", "test_vit",
                "--image-size", "32", "--epochs", "1", "--folds", "2", "--fold", "0", "--device", "cpu", "--weights",
                "none"])
    loaded = test.load(run, "cpu", "off")
    seen = []
    loaded.network.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    rgb = np.random.default_rng(0).integers(0, 256, (3, 90, 70), np.uint8)
    test.classify(loaded, rgb)
    way = v2.InterpolationMode.BILINEAR if recipe == "paper" else v2.InterpolationMode.BICUBIC
    image = v2.functional.resize(torch.from_numpy(rgb), [32, 32], way, antialias=True) / 255
    mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if recipe == "paper" else ((0.5,) * 3, (0.5,) * 3)
    torch.testing.assert_close(seen[0][0], v2.functional.normalize(image, mean, std))


def test_published_tiles_are_a_grid_padded_with_zeros():
    ones = np.ones((1, 50, 70), np.float32)
    field = manifests.Field(None, ones, ("grey",), np.float32([0, 1]), torch.from_numpy(ones[0]).int())
    crops = data.Crops([field, field], 32, recipe="paper")
    assert len(crops) == 2 * 2 * 3                                    # 1408 x 1876 by 480: 12, as in the notebooks
    filled = [crops[i][1].float().mean().item() for i in range(6)]
    expected = [h * w / 32 ** 2 for h in (32, 18) for w in (32, 32, 6)]
    assert filled == pytest.approx(expected, abs=0.04)                # turned by 3 degrees at most


def test_published_tiles_are_turned_a_little_and_flipped():
    """Each tile is turned by its own angle within 3 degrees, and the four ways of the flips come alike often."""
    y, x = np.mgrid[:64, :64].astype(np.float32)
    field = manifests.Field(None, np.stack([x, y]), ("x", "y"), np.float32([0, 63]), torch.from_numpy(x > 31).int())
    crops = data.Crops([field], 64, seed=1, recipe="paper")
    angles, ways, steps = [], [], torch.arange(56.0) - 27.5
    for index in range(200):
        image, mask = crops[index]
        inner = 63 * image[:, 4:60, 4:60]                             # without what is 0 now
        right, down = ((inner * step).mean((1, 2)) / (steps ** 2).mean() for step in (steps, steps[:, None]))  # slopes
        assert abs(right[0]) > 0.98 and abs(right[1]) < 0.07          # no quarter turns
        angles.append(math.degrees(math.atan2(right[1], abs(right[0]))))
        ways.append((bool(right[0] > 0), bool(down[1] > 0)))
        assert torch.equal(inner[0] > 31, mask[4:60, 4:60].bool())    # the mask alike
    assert max(map(abs, angles)) < 3.3 and np.std(angles) == pytest.approx(3 / 3 ** 0.5, abs=0.3)
    assert len(set(np.round(angles, 2))) > 80                         # less than a degree moves no pixel
    assert all(35 < ways.count(way) < 65 for way in set(ways)) and len(set(ways)) == 4
