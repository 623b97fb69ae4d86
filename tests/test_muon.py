"""running/muon.py: which weights move how, and that a run goes on as if it had not been interrupted."""
import copy

import pytest
import torch
from conftest import TRAIN
from torch import nn

import train
from running.muon import Muon, orthogonal

SETTING = {"lr": 0.02, "weight_decay": 0.1}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 24, 3, bias=False), nn.BatchNorm2d(24), nn.Conv2d(24, 10, 3), nn.ReLU(),
                         nn.Conv2d(10, 40, 1))


def learn(model, optimizer, seeds, scaler=None):
    """A step on an image drawn by each seed."""
    for seed in seeds:
        image = torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        loss = model(image).square().mean()
        if scaler:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        else:
            loss.backward()
            optimizer.step()


def assert_same(model, other):
    """Each weight went the same way, up to rounding: torch multiplies in bfloat16."""
    for (name, weight), expected, start in zip(model.named_parameters(), other.parameters(), network().parameters()):
        assert (weight - expected).norm() < 0.05 * (expected - start).norm(), name


@pytest.mark.parametrize("shape", [(20, 45), (12, 90), (90, 12)])
def test_orthogonal_keeps_the_directions_and_levels_their_sizes(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape) * torch.logspace(0, -1, shape[1])
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inside = left.T @ orthogonal(matrix) @ right.T                     # diagonal, if directions are the same
    sizes = inside.diagonal()
    assert 0.6 < sizes.min() and sizes.max() < 1.3, sizes
    assert (inside - sizes.diag()).abs().max() < 0.05
    torch.testing.assert_close(orthogonal(1e-6 * matrix), orthogonal(matrix), atol=0.06, rtol=0)  # whatever their size


def test_convolutions_move_as_by_torch_and_the_rest_as_by_adamw():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch has no Muon before 2.9")
    ours, theirs = network(), network()
    learn(ours, Muon(ours.parameters(), **SETTING), range(5))
    kernels = [weight for weight in theirs.parameters() if weight.ndim == 4]
    matrices = [nn.Parameter(weight.detach().flatten(1)) for weight in kernels]            # they share their memory
    muon = torch.optim.Muon(matrices, **SETTING, adjust_lr_fn="match_rms_adamw", ns_steps=3)
    adamw = torch.optim.AdamW([weight for weight in theirs.parameters() if weight.ndim < 4], **SETTING)
    for seed in range(5):
        theirs.zero_grad()
        theirs(torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
        for weight, matrix in zip(kernels, matrices):
            matrix.grad = weight.grad.flatten(1)
        muon.step()
        adamw.step()
    assert_same(ours, theirs)


def test_it_goes_on_from_its_state_and_does_not_care_for_the_layout():
    whole, parted = network(), network().to(memory_format=torch.channels_last)
    learn(whole, Muon(whole.parameters(), **SETTING), range(6))
    first = Muon(parted.parameters(), **SETTING)
    learn(parted, first, range(3))
    second = Muon(parted.parameters(), **SETTING)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    learn(parted, second, range(3, 6))
    assert_same(parted, whole)


def test_scaled_gradients_are_scaled_back():
    plain, scaled = network(), network()
    learn(plain, Muon(plain.parameters(), **SETTING), range(3))
    learn(scaled, Muon(scaled.parameters(), **SETTING), range(3), torch.amp.GradScaler("cpu", init_scale=2.0 ** 14))
    assert_same(scaled, plain)


def test_frozen_weights_stay():
    model = network()
    model[2].requires_grad_(False)
    learn(model, Muon(model.parameters(), **SETTING), range(2))
    assert torch.equal(model[2].weight, network()[2].weight) and not torch.equal(model[4].weight, network()[4].weight)


@pytest.mark.parametrize("recipe, has_muon", [("short", True), ("paper", False)])
def test_segmentations_of_the_short_recipe_have_it(tiny, tmp_path, recipe, has_muon):
    tile = ["--tile", "64"] if recipe == "short" else []
    train.main(["--data", str(tiny), *TRAIN, "--recipe", recipe, *tile, "--out", str(tmp_path / "run")])
    state = torch.load(tmp_path / "run" / "last.pt")["optimizer"]["state"]
    moments = [set(own) for own in state.values()]
    assert ({"step", "exp_avg"} in moments) == has_muon                        # no second moment
    assert {"step", "exp_avg", "exp_avg_sq"} in moments
