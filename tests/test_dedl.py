import math

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


def test_conv_penalty_is_least_at_the_truth_and_has_neither_scale_nor_axes():
    torch.manual_seed(0)
    app, truth = dedl.ConvAPP(), masks()

    def settled(other):
        """The penalty of predicting `other`, when the running covariance has come to rest."""
        return [app(logits_of(other, 20), truth)[0].item() for _ in range(250)][-1]

    assert settled(truth) < 1e-6
    wrong = settled(truth.roll(1, 0))
    assert 0.5 < wrong < 4
    turn = torch.linalg.qr(torch.randn(16, 16))[0]
    with torch.no_grad():  # the same embedding in another unit, along other axes
        for p in app.autoencoder.encoder[-1].parameters():
            p.copy_((10 * turn @ p.flatten(1)).view_as(p) if p.dim() > 1 else 10 * turn @ p)
    assert settled(truth.roll(1, 0)) == pytest.approx(wrong, rel=0.01)


def test_conv_penalty_weighs_each_direction_of_the_embedding_alike():
    """One standard deviation costs as much along a direction in which the embeddings hardly vary."""
    torch.manual_seed(0)
    app = dedl.ConvAPP()
    scale = torch.ones(16)
    scale[1:] = 0.1
    for _ in range(100):
        precision = app.precision(torch.randn(8, 16, 16, 16) * scale[:, None, None])
    assert torch.allclose(precision.diagonal() * scale ** 2, torch.ones(16), atol=0.1)


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
    x = logits
    for layer in [m for m in small.layers if isinstance(m, nn.Linear)]:
        x = layer(x).relu()                                       # after the last layer too
    assert torch.equal(small(logits), x)
    changed = logits.clone()
    changed[0, 0, 3] += 1
    rows = (small(logits) != small(changed)).any(-1)
    assert rows.nonzero().tolist() == [[0, 0, 3]]  # each row of each class by itself


def test_linear_form_trains_both():
    app = dedl.build_app("linear", width=16)
    logits = torch.randn(2, 2, 16, 16, requires_grad=True)
    penalty, own = app(logits, torch.randint(0, 2, (2, 16, 16)), torch.tensor([0.2, 0.8]))
    (penalty + own).backward()
    assert own == 0 and logits.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in app.parameters())
    assert dedl.build_app("none", 16) is None


def test_dice_loss():
    truth = torch.tensor([[[0, 0, 1, 2], [0, 0, 1, dedl.IGNORED]], [[0, 0, 0, 0], [0, 0, 0, 0]]])      # (2, 2, 4)
    one_hot = nn.functional.one_hot(truth.clamp(max=2), 3).movedim(-1, 1).float()                      # (2, 3, 2, 4)
    assert dedl.dice_loss(200 * one_hot, truth) == pytest.approx(1 / 3)  # the second image lacks two of the classes
    half = dedl.dice_loss(torch.zeros(1, 3, 2, 4), truth[:1])  # 1/3 each, of 7 pixels, and the ignored one background
    p = 7 / 3
    assert half == pytest.approx(1 - 2 / 3 * ((4 / 3 + 1) / (p + 1 + 5) + (2 / 3) / (p + 2) + (1 / 3) / (p + 1)))
    logits = torch.randn(2, 3, 2, 4, requires_grad=True)
    dedl.dice_loss(logits, truth).backward()
    assert (logits.grad[0, :, 1, 3] == 0).all() and logits.grad[0, :, 0].abs().min() > 0
    assert torch.isfinite(logits.grad).all()
    together = dedl.dice_loss(logits, truth)
    apart = [dedl.dice_loss(logits[i:i + 1], truth[i:i + 1]) for i in range(2)]
    torch.testing.assert_close(together, sum(apart) / 2)  # so processes may share a batch


def test_class_weights():
    assert dedl.balanced_class_weights(0.1479) == pytest.approx(list(dedl.PUBLISHED_CLASS_WEIGHTS.values()))


def test_metrics_by_hand():
    truth = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    found = torch.tensor([[1, 0, 1, 0], [1, 0, 0, 0]]).bool()
    counts = dedl.confusion(found, truth)
    assert counts.tolist() == [2, 1, 1, 4]
    other = torch.tensor([0, 0, 4, 4])  # an image in which nothing was found
    scores = dedl.segmentation_scores(torch.stack([counts, other]))
    assert scores == {"iou": 2 / 8, "dice": 4 / 10, "pixel_accuracy": 10 / 16, "precision": 2 / 3, "recall": 2 / 7,
                      "mean_image_iou": (0.5 + 0) / 2, "images": 2}


def test_metrics_of_empty_images():
    left_empty = dedl.segmentation_scores(torch.tensor([[0, 0, 0, 9]]))
    assert left_empty["iou"] == left_empty["precision"] == left_empty["recall"] == left_empty["mean_image_iou"] == 1
    missed = dedl.segmentation_scores(torch.tensor([[0, 0, 5, 4]]))
    invented = dedl.segmentation_scores(torch.tensor([[0, 5, 0, 4]]))
    assert missed["precision"] == missed["iou"] == 0 and invented["recall"] == invented["iou"] == 0


# ------------------------------------------------------------------------------------------------------ classification
def test_focal_loss_is_binary_cross_entropy_at_gamma_0():
    logits, truth = torch.randn(7, 5) * 4, (torch.rand(7, 5) > 0.5).float()
    weights = [0.9, 0.4, 0.5, 0.2, 1.0]
    bce = nn.functional.binary_cross_entropy_with_logits
    torch.testing.assert_close(dedl.FocalLoss(gamma=0)(logits, truth), bce(logits, truth))
    torch.testing.assert_close(dedl.FocalLoss(0.25, 0, weights)(logits, truth),
                               0.25 * bce(logits, truth, torch.tensor(weights)))


def test_focal_loss_by_its_definition():
    logits, truth = torch.tensor([[0.0, 2.0, -1.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    p = [0.5, 1 / (1 + math.exp(-2)), 1 - 1 / (1 + math.exp(1))]  # of the true answer
    expected = sum(w * (1 - q) ** 2 * -math.log(q) for w, q in zip((1, 0.5, 0.2), p)) / 3
    assert dedl.FocalLoss(1, 2, [1, 0.5, 0.2])(logits, truth).item() == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_is_finite_where_logits_are_large(dtype, gamma):
    for size in (60, 1000):
        logits = torch.tensor([[size, -size, size, -size, 0]], dtype=dtype, requires_grad=True)
        truth = torch.tensor([[1, 1, 0, 0, 1.0]])
        loss = dedl.FocalLoss(gamma=gamma)(logits, truth)
        loss.backward()
        assert loss.dtype == torch.float32 and loss.isfinite() and logits.grad.isfinite().all()
        assert loss.item() == pytest.approx((2 * size + 0.5 ** gamma * math.log(2)) / 5, rel=1e-3)
        assert logits.grad[0, 1] < 0 < logits.grad[0, 2]  # still pulled towards the truth


def test_focal_loss_gradient():
    logits = (torch.randn(4, 3, dtype=torch.float64) * 3).requires_grad_()
    truth = (torch.rand(4, 3) > 0.5).double()
    for gamma in (0.0, 0.7, 2.0):
        loss = dedl.FocalLoss(gamma=gamma, class_weights=[0.2, 1.0, 0.5]).double()
        assert torch.autograd.gradcheck(lambda z, loss=loss: loss(z, truth), logits)


def test_inverse_frequency_weights():
    assert dedl.inverse_frequency_weights([10, 20, 40]) == pytest.approx([1, 0.2 + 0.8 / 3, 0.2])
    assert dedl.inverse_frequency_weights([5, 5]) == [1, 1] and dedl.inverse_frequency_weights([5]) == [1]
    assert dedl.inverse_frequency_weights([0, 10, 0, 20]) == pytest.approx([1, 1, 1, 0.2])  # no image: no part in it
    published = dedl.PUBLISHED_PHENOTYPE_WEIGHTS.values()  # from the notebook's frequencies, relative to the rarest
    counts = [1 / v for v in (0.944, 0.4595, 0.4696, 0.1464, 1)]
    assert dedl.inverse_frequency_weights(counts) == pytest.approx(list(published), abs=1e-4)


def test_classification_scores_by_hand():
    names = ["a", "b", "c", "d"]        # c: no image has it, and none is said to; d: none has it, one is said to
    truth = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    found = [[1, 0, 0, 0], [1, 0, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    scores = dedl.classification_scores(torch.tensor(found).bool(), torch.tensor(truth).bool(), names)
    # a: tp 2 fp 1 fn 1, b: tp 1 fp 0 fn 1, c: nothing, d: fp 1; together tp 3, fp 2, fn 2
    assert scores["per_class"] == {
        "a": {"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "support": 3},
        "b": {"precision": 1.0, "recall": 0.5, "f1": 2 / 3, "support": 2},
        "c": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0},
        "d": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}}
    del scores["per_class"]
    assert scores == pytest.approx({
        "f1_micro": 6 / 10, "precision_micro": 3 / 5, "recall_micro": 3 / 5, "f1_macro": 4 / 3 / 4,
        "precision_macro": 5 / 3 / 4, "recall_macro": 7 / 6 / 4, "subset_accuracy": 2 / 5,
        "images": 5})


def test_classification_scores_where_nothing_is():
    nothing = dedl.classification_scores(torch.zeros(3, 2) > 0, torch.zeros(3, 2) > 0, ["a", "b"])
    assert nothing["f1_micro"] == nothing["f1_macro"] == 0
    assert nothing["subset_accuracy"] == 1


