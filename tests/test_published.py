"""As published: what `--recipe paper` and the linear form of APP do, held against the authors' notebooks."""
import pytest
import torch
from conftest import TRAIN

import train


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
