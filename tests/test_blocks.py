"""The fast forms of blocks.py against autograd of the plain ones, in float64."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from networks import blocks

MAPS = [[(24, 5, 7), (10, 10, 14), (6, 10, 14)], [(5, 6, 5), (7, 6, 5)], [(8, 4, 3), (2, 8, 6)], [(9, 6, 5)]]


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def assert_same(fast, plain, inputs):
    """Values and gradients of both, where the gradient that comes in is random."""
    torch.testing.assert_close(fast, plain)
    incoming = torch.randn_like(plain)
    expected = torch.autograd.grad(plain, inputs, incoming)
    torch.testing.assert_close(torch.autograd.grad(fast, inputs, incoming), expected)


@pytest.mark.parametrize("sizes", MAPS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gate_with_a_convolution_behind(sizes, layout):
    channels = sum(size[0] for size in sizes)
    gate, kernel, bias = blocks.SCSE(channels).double(), randn(4, channels, 3, 3), randn(4)
    maps = [randn(2, *size) for size in sizes]
    given = [m.contiguous(memory_format=layout) for m in maps]
    assert_same(gate(*given, kernel=kernel, bias=bias), F.conv2d(gate.plain(*maps), kernel, bias, padding=1),
                [*maps, kernel, bias, *gate.parameters()])
    torch.testing.assert_close(gate(*maps, kernel=kernel), F.conv2d(gate.plain(*maps), kernel, padding=1))


def test_gate():
    gate, x = blocks.SCSE(40).double(), randn(3, 40, 6, 5)
    assert_same(gate(x), gate.plain(x), [x, *gate.parameters()])


def test_the_plain_gate_is_the_one_of_the_paper():
    gate, x, skip = blocks.SCSE(5).double(), randn(2, 3, 2, 3), randn(2, 2, 4, 6)
    v = torch.cat([F.interpolate(x, scale_factor=2, mode="nearest"), skip], 1)
    c = torch.sigmoid(gate.expand(F.relu(gate.reduce(F.adaptive_avg_pool2d(v, 1)))))
    torch.testing.assert_close(gate.plain(x, skip), v * c + v * torch.sigmoid(gate.spatial(v)))


@pytest.mark.parametrize("classes", [1, 3])
def test_gated_convolution_of_the_head(classes):
    gate, conv, v = blocks.SCSE(20).double(), nn.Conv2d(20, classes, 3, padding=1).double(), randn(2, 20, 6, 5)
    assert_same(blocks.gated_conv(v, gate, conv), conv(gate.plain(v)), [v, *gate.parameters(), *conv.parameters()])


@pytest.mark.parametrize("height, width", [(5, 7), (1, 1), (2, 9)])
def test_convolution_of_an_upsampled_map(height, width):
    x, weight, bias = randn(2, 3, height, width), randn(4, 3, 3, 3), randn(4)
    plain = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)
    assert_same(blocks.conv_of_upsampled(x, weight, bias), plain, [x, weight, bias])
    torch.testing.assert_close(blocks.conv_of_upsampled(x, weight), plain - bias[:, None, None])


def test_bf16_is_as_near_to_float32_as_the_plain_form_in_bf16():
    torch.manual_seed(0)
    gate, conv = blocks.SCSE(48), nn.Conv2d(48, 2, 3, padding=1)
    x, skip, kernel = torch.randn(2, 32, 16, 16), torch.randn(2, 16, 32, 32), torch.randn(48, 48, 3, 3) / 20

    def fast():
        return blocks.gated_conv(gate(x, skip, kernel=kernel), gate, conv)

    def plain():
        return conv(gate.plain(F.conv2d(gate.plain(x, skip), kernel, padding=1)))

    exact = plain()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = fast(), plain()
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().mean() < 1.3 * (theirs - exact).abs().mean()


def test_gradients_under_autocast_are_as_near_as_those_of_the_plain_form():
    torch.manual_seed(0)
    gate, conv = blocks.SCSE(48), nn.Conv2d(48, 2, 3, padding=1)
    x, skip = torch.randn(2, 32, 16, 16, requires_grad=True), torch.randn(2, 16, 32, 32, requires_grad=True)
    kernel, weights = torch.randn(48, 48, 3, 3) / 20, [*gate.parameters(), *conv.parameters()]

    def gradients(gated, head, amp):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = head(gated()).float().square().mean()
        return torch.autograd.grad(loss, [x, skip, *weights])

    fast = gradients(lambda: gate(x, skip, kernel=kernel), lambda v: blocks.gated_conv(v, gate, conv), True)
    plain = [gradients(lambda: F.conv2d(gate.plain(x, skip), kernel, padding=1), lambda v: conv(gate.plain(v)), amp)
             for amp in (True, False)]
    for ours, theirs, exact in zip(fast, *plain):
        assert ours.dtype == exact.dtype
        assert (ours - exact).norm() < 1.5 * (theirs - exact).norm() + 1e-3 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_network_trains_in_one_precision_and_with_parts_frozen(dtype):
    gate, conv = blocks.SCSE(12).to(dtype), nn.Conv2d(12, 2, 3, padding=1).to(dtype)
    x, skip = torch.randn(1, 8, 4, 4, dtype=dtype), torch.randn(1, 4, 8, 8, dtype=dtype)
    kernel = torch.randn(12, 12, 3, 3, dtype=dtype, requires_grad=True)
    gate.requires_grad_(False)
    blocks.gated_conv(gate(gate(x, skip, kernel=kernel)), gate, conv).sum().backward()
    assert kernel.grad.isfinite().all() and kernel.grad.dtype == dtype and gate.spatial.weight.grad is None


def test_means_of_large_values_do_not_overflow_in_float16():
    maps = torch.full((1, 1, 4, 1000), 100.0, dtype=torch.float16)
    assert blocks._sum_pixels(maps.permute(0, 2, 3, 1)).item() == pytest.approx(400_000, rel=1e-3)


def test_a_second_derivative_is_refused():
    gate, x = blocks.SCSE(4), torch.randn(1, 4, 4, 4, requires_grad=True)
    first, = torch.autograd.grad(gate(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        first.sum().backward()
