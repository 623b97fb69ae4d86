"""networks/fast.py against the textbook forms of models.py: gradients in float64, precision, folded BatchNorms."""
import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise_batchnorm
from torch import nn

import models
from networks import encoders, fast

ARCHS = ["unet", "unetpp"]


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def assert_same(fast, plain, fast_inputs, plain_inputs=None):
    """Values and gradients of both, where the gradient that comes in is random."""
    torch.testing.assert_close(fast, plain)
    incoming = torch.randn_like(plain)
    expected = torch.autograd.grad(plain, plain_inputs or fast_inputs, incoming)
    torch.testing.assert_close(torch.autograd.grad(fast, fast_inputs, incoming), expected)


def upsampled(x):
    return F.interpolate(x, scale_factor=2, mode="nearest")


def small_segmenter(arch):
    """A network whose BatchNorms are not neutral: one that is swapped or forgotten shows in the logits."""
    torch.manual_seed(0)
    model = models.build_segmenter(arch, "test_efficientnet", depth=3, decoder_channels=(16, 12, 8))
    randomise_batchnorm(model)
    return model


def assert_same_logits(model, other, size=(50, 64)):
    """Equal to 1e-4, in eval mode."""
    image = torch.rand(2, 1, *size)
    with torch.no_grad():
        expected, logits = model.eval()(image), other.eval()(image)
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


# ----------------------------------------------------------------------------------------------------------- gradients
@pytest.mark.parametrize("size", [(40, 10, 14), (5, 6, 5), (9, 1, 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gate(size, layout):
    scse, v = models.SCSE(size[0]).double(), randn(2, *size)
    plain = scse(v)
    assert_same(fast.speed_up(scse)(v.contiguous(memory_format=layout)), plain, [v, *scse.parameters()])


@pytest.mark.parametrize("height, width", [(5, 7), (1, 1), (2, 9)])
def test_convolution_of_an_upsampled_map(height, width):
    x, weight, bias = randn(2, 3, height, width), randn(4, 3, 3, 3), randn(4)
    plain = F.conv2d(upsampled(x), weight, bias, padding=1)
    assert_same(fast.conv_of_upsampled(x, weight, bias), plain, [x, weight, bias])
    torch.testing.assert_close(fast.conv_of_upsampled(x, weight), plain - bias[:, None, None])


@pytest.mark.parametrize("skips", [(), (6,), (3, 4)])
def test_decoder_block(skips):
    plain = models.DecoderBlock(5, sum(skips), 4).double()
    quick = fast.speed_up(copy.deepcopy(plain))
    assert type(quick) is not type(plain) and type(quick.scse2) is not type(plain.scse2)
    x, maps = randn(2, 5, 3, 4), [randn(2, channels, 6, 8) for channels in skips]
    assert_same(quick(x, maps), plain(x, maps), [x, *maps, *quick.parameters()], [x, *maps, *plain.parameters()])
    for name, statistic in plain.named_buffers():
        torch.testing.assert_close(quick.get_buffer(name), statistic)


def test_bf16_is_as_near_to_float32_as_the_plain_form_in_bf16():
    torch.manual_seed(0)
    x, skip = torch.randn(2, 32, 16, 16, requires_grad=True), torch.randn(2, 16, 32, 32, requires_grad=True)
    plain = nn.ModuleList([models.DecoderBlock(32, 16, 24), models.DecoderBlock(24, 0, 8)])
    quick = fast.speed_up(copy.deepcopy(plain))

    def result_and_gradients(blocks, amp):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            y = blocks[1](blocks[0](x, [skip])).float()
        return y, *torch.autograd.grad(y.square().mean(), [x, skip, *blocks.parameters()])

    three = result_and_gradients(quick, True), result_and_gradients(plain, True), result_and_gradients(plain, False)
    for ours, theirs, exact in zip(*three):
        assert ours.dtype == exact.dtype
        if exact.numel() > 1:  # the rounding error of one number is chance
            assert (ours - exact).norm() < 1.5 * (theirs - exact).norm() + 1e-3 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_network_trains_in_one_precision_and_with_parts_frozen(dtype):
    first, last = fast.speed_up(nn.ModuleList([models.DecoderBlock(8, 4, 8), models.DecoderBlock(8, 0, 8)])).to(dtype)
    first.scse1.requires_grad_(False)
    x, skip = torch.randn(1, 8, 4, 4, dtype=dtype), torch.randn(1, 4, 8, 8, dtype=dtype)
    last(first(x, [skip])).sum().backward()
    kernel = first.conv1[0].weight
    assert kernel.grad.isfinite().all() and kernel.grad.dtype == dtype and first.scse1.spatial.weight.grad is None


def test_a_second_derivative_is_refused():
    scse, x = fast.speed_up(models.SCSE(4)), torch.randn(1, 4, 4, 4, requires_grad=True)
    first, = torch.autograd.grad(scse(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        first.sum().backward()


# ------------------------------------------------------------------------------------------------------------ speed_up
@pytest.mark.parametrize("arch", ARCHS)
def test_speed_up_keeps_weights_copies_and_logits(arch):
    model = small_segmenter(arch)
    quick = fast.speed_up(copy.deepcopy(model))
    blocks = [layer for layer in quick.modules() if isinstance(layer, (models.DecoderBlock, models.SCSE))]
    assert {type(block) for block in blocks} == {fast.FastDecoderBlock, fast.FastSCSE}
    assert list(quick.state_dict()) == list(model.state_dict())
    assert all(torch.equal(quick.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert list(map(type, copy.deepcopy(quick).modules())) == list(map(type, quick.modules()))
    assert_same_logits(model, quick)
    assert list(map(type, fast.slow_down(quick).modules())) == list(map(type, model.modules()))


def test_the_compiler_gets_the_textbook_forms(monkeypatch):
    """It fuses them itself, and cannot look into the others."""
    model = fast.speed_up(small_segmenter("unet"))
    for name in ("_Gate", "conv_of_upsampled"):
        monkeypatch.setattr(fast, name, None)
    with pytest.raises((AttributeError, TypeError)):
        model(torch.rand(1, 1, 32, 32))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert model(torch.rand(1, 1, 32, 32)).isfinite().all()


# ------------------------------------------------------------------------------------------------------- for_inference
class FPNDecoder(nn.Module):
    """A decoder as somebody might add it: 1x1 convolutions of the maps, summed from coarse to fine."""

    def __init__(self, encoder_channels, decoder_channels):
        super().__init__()
        width = decoder_channels[-1]
        self.lateral = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, width, 1), nn.BatchNorm2d(width)) for channels in encoder_channels)
        self.smooth = encoders.conv_bn_relu(width, width)

    def forward(self, features):
        x = torch.zeros(())
        for layer, feature in reversed(list(zip(self.lateral, features))):
            y = layer(feature)
            x = y + F.interpolate(x, y.shape[2:]) if x.dim() else y
        return upsampled(self.smooth(x))


def not_folded(model):
    return [name for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)]


@pytest.mark.parametrize("arch", [*ARCHS, "fpn"])
def test_for_inference_folds_every_decoder(arch, monkeypatch):
    monkeypatch.setitem(models.DECODERS, "fpn", FPNDecoder)
    model = small_segmenter(arch).train()
    before, drawn = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    ready = fast.for_inference(model)
    assert not not_folded(ready)
    assert arch == "fpn" or any(isinstance(layer, fast.FastDecoderBlock) for layer in ready.modules())
    assert not ready.training and not any(p.requires_grad for p in ready.parameters())
    # the model itself goes on training as if nothing had been
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert_same_logits(model, ready)


class Unfoldable(nn.Module):
    """Of its BatchNorms bn1 and bn2 can be folded; with `reuse` what lies before bn2 is used for something else too."""
    in_channels = 1

    def __init__(self, reuse):
        super().__init__()
        self.reuse = reuse
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.bn4, self.conv4 = nn.BatchNorm2d(8), nn.Conv2d(8, 2, 3)

    def forward(self, image):
        x = self.bn1(self.conv1(image)).relu()
        y = self.conv2(x)
        x = y * self.reuse + self.bn2(y)
        x = self.bn3(self.conv3(self.conv3(x)))  # the convolution is used twice
        return self.conv4(self.bn4(x.relu()))    # there is no convolution before


def test_for_inference_keeps_what_it_cannot_fold():
    torch.manual_seed(0)
    for reuse, kept in ((0, ["bn3", "bn4"]), (1, ["bn1", "bn2", "bn3", "bn4"])):
        model = Unfoldable(reuse)
        randomise_batchnorm(model)
        ready = fast.for_inference(model)
        assert not_folded(ready) == kept
        assert_same_logits(model, ready)
