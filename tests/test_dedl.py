import pytest
import torch
from torch import nn

import dedl


def masks(count=4, size=64):
    """Truth (N, H, W) int64: discs."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    centres = torch.randint(10, size - 10, (count, 2))
    return torch.stack([((y - cy) ** 2 + (x - cx) ** 2 < 80) for cy, cx in centres]).long()


def logits_of(truth, sureness):
    return torch.stack([-(truth * 2.0 - 1), truth * 2.0 - 1], 1) * sureness


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_conv_penalty_trains_the_network_alone(activation):
    torch.manual_seed(0)
    app, truth = dedl.ConvAPP(activation=activation), masks()
    logits = torch.randn(4, 2, 64, 64, requires_grad=True)
    penalty, own = app(logits, truth)
    penalty.backward(retain_graph=True)
    assert logits.grad.abs().sum() > 0
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in app.parameters())
    logits.grad = None
    own.backward()
    assert logits.grad is None
    assert all(p.grad.abs().sum() > 0 for p in app.parameters())  # and `own` trains all of the autoencoder


def test_conv_penalty_under_autocast_has_the_same_gradients():
    torch.manual_seed(0)
    app, truth = dedl.ConvAPP(), masks()
    with torch.autocast("cpu", torch.bfloat16):
        penalty, own = app(torch.randn(4, 2, 64, 64, requires_grad=True), truth)
    penalty.backward(retain_graph=True)
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in app.parameters())
    own.backward()
    assert all(p.grad.abs().sum() > 0 for p in app.parameters())


def test_conv_penalty_is_least_at_the_truth_and_has_no_scale():
    torch.manual_seed(0)
    app, truth = dedl.ConvAPP(), masks()

    def settled(other):
        """The penalty of predicting `other`, when the running variance has come to rest."""
        return [app(logits_of(other, 20), truth)[0].item() for _ in range(150)][-1]

    assert settled(truth) < 1e-6
    wrong = settled(truth.roll(1, 0))
    assert 0.5 < wrong < 4
    with torch.no_grad():  # the same embedding in another unit
        for p in app.autoencoder.encoder[-1].parameters():
            p.mul_(10)
    assert settled(truth.roll(1, 0)) == pytest.approx(wrong, rel=0.01)


def test_conv_autoencoder_learns_masks_and_does_not_collapse():
    torch.manual_seed(0)
    app = dedl.ConvAPP()
    optimizer = torch.optim.Adam(app.parameters(), 3e-3)
    first = None
    for _ in range(80):
        truth = masks(8)
        penalty, own = app(logits_of(truth.roll(1, 0), 3), truth)
        first = first or own.item()
        optimizer.zero_grad()
        (penalty + own).backward()
        optimizer.step()
    assert own.item() < 0.3 * first
    assert 0.5 < penalty.item() < 4  # masks of other images stay about twice the variance away


def test_conv_penalty_survives_empty_masks():
    app = dedl.ConvAPP()
    for _ in range(300):
        penalty, own = app(torch.randn(2, 2, 32, 32), torch.zeros(2, 32, 32, dtype=torch.long))
        assert penalty.isfinite() and own.isfinite()


@pytest.mark.parametrize("size", [(16, 16), (30, 45)])
def test_conv_autoencoder_keeps_any_size(size):
    assert dedl.ConvAutoencoder()(torch.rand(2, 2, *size)).shape == (2, 2, *size)


def test_row_autoencoder_is_the_published_one():
    linear = [m for m in dedl.RowAutoencoder().layers if isinstance(m, nn.Linear)]
    sizes = [linear[0].in_features] + [m.out_features for m in linear]
    assert sizes == [480, 15360, 256, 128, 64, 32, 16, 32, 64, 128, 256, 480]
    small = dedl.RowAutoencoder(16, "relu")
    logits = torch.randn(2, 2, 8, 16)
    changed = logits.clone()
    changed[0, 0, 3] += 1
    rows = (small(logits) != small(changed)).any(-1)
    assert rows.nonzero().tolist() == [[0, 0, 3]]  # each row of each class by itself
    with pytest.raises(ValueError, match="width 16, got 20"):
        small(torch.randn(1, 2, 4, 20))


def test_linear_form_trains_both():
    app = dedl.build_app("linear", width=16)
    logits = torch.randn(2, 2, 16, 16, requires_grad=True)
    penalty, own = app(logits, torch.randint(0, 2, (2, 16, 16)), torch.tensor([0.2, 0.8]))
    (penalty + own).backward()
    assert own == 0 and logits.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in app.parameters())
    assert dedl.build_app("none", 16) is None


def test_class_weights():
    assert dedl.balanced_class_weights(0.1479) == pytest.approx(dedl.PUBLISHED_CLASS_WEIGHTS)
    with pytest.raises(ValueError, match="both classes"):
        dedl.balanced_class_weights(0.0)


def test_metrics_by_hand():
    truth = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    found = torch.tensor([[1, 0, 1, 0], [1, 0, 0, 0]]).bool()
    counts = dedl.confusion(found, truth)
    assert counts.tolist() == [2, 1, 1, 4]
    other = torch.tensor([0, 0, 4, 4])  # an image in which nothing was found
    scores = dedl.segmentation_scores(torch.stack([counts, other]))
    assert scores == {"iou": 2 / 8, "dice": 4 / 10, "pixel_accuracy": 10 / 16, "precision": 2 / 3, "recall": 2 / 7,
                      "mean_image_iou": (0.5 + 0) / 2, "images": 2}


def test_metrics_of_empty_fields():
    left_empty = dedl.segmentation_scores([[0, 0, 0, 9]])
    assert left_empty["iou"] == left_empty["precision"] == left_empty["recall"] == left_empty["mean_image_iou"] == 1
    missed, invented = dedl.segmentation_scores([[0, 0, 5, 4]]), dedl.segmentation_scores([[0, 5, 0, 4]])
    assert missed["precision"] == missed["iou"] == 0 and invented["recall"] == invented["iou"] == 0
