"""What the decoders are built of, in fast forms: scSE gates, with the convolution behind them, and the convolution of
an upsampled map.

The textbook forms move the largest maps of the network through memory again and again. Here each block has a plain form
of a few lines (SCSE.plain, and in the docstrings) and a fast one with its gradient written by hand; the tests compare
the two in float64. torch.compile gets the plain forms: it fuses them itself, better than it does the fast ones.

Shapes: N images, C channels (C_i those of one map), H x W pixels, K classes. Inside, maps are (N, H, W, C), which is
how channels_last lies in memory.
scSE: Roy et al. 2018, arXiv 1803.02579. Sub-pixel convolution: Shi et al. 2016, arXiv 1609.05158 and 1609.07009.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


class SCSE(nn.Module):
    """Concurrent spatial and channel squeeze & excitation of v, a concatenation of maps: v * c + v * s.

    c (N, C, 1, 1) weighs the channels by what the whole map holds, s (N, 1, H, W) weighs the pixels.
    forward: one map (N, C, H, W) -> (N, C, H, W); or, with the kernel (O, C, 3, 3) and maybe the bias (O,) of a
             convolution that is done behind, maps (N, C_i, H, W), those of (N, C_i, H/2, W/2) to be upsampled (nearest)
             -> (N, O, H, W)
    """

    def __init__(self, channels, reduction=16):
        super().__init__()
        self.reduce = nn.Conv2d(channels, max(1, channels // reduction), 1)
        self.expand = nn.Conv2d(max(1, channels // reduction), channels, 1)
        self.spatial = nn.Conv2d(channels, 1, 1)

    def weights(self):
        """Of the three layers weight (out, in) and bias (out,) each."""
        layers = (self.reduce, self.expand, self.spatial)
        return [tensor for layer in layers for tensor in (layer.weight.flatten(1), layer.bias)]

    def forward(self, *maps, kernel=None, bias=None):
        if torch.compiler.is_compiling():  # the compiler fuses the plain form itself
            return self.plain(*maps) if kernel is None else F.conv2d(self.plain(*maps), kernel, bias, padding=1)
        return _Gate.apply(*self.weights(), kernel, bias, *maps)

    def plain(self, *maps):
        """The result (N, C, H, W) in the words of the paper (eq. 2 to 6). The last map is one of full size."""
        height, width = maps[-1].shape[2:]
        v = torch.cat([m if m.shape[2] == height else
                       m[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2).reshape(*m.shape[:2], height, width)
                       for m in maps], 1)
        c = torch.sigmoid(self.expand(F.relu(self.reduce(v.mean((2, 3), keepdim=True)))))     # (N, C, 1, 1)
        s = torch.sigmoid(self.spatial(v))                                                    # (N, 1, H, W)
        return v * c + v * s                                                                  # (N, C, H, W)


class _Gate(torch.autograd.Function):
    """SCSE.plain in few passes over memory: y = v * (c + s), where v = cat(up(x), skips) itself is never made.

    Means, 1x1 convolutions and products with c commute with nearest upsampling, and over a concatenation they are sums
    over its parts, so each part is read at its own resolution: as (N, h, 1, w, 1, C_i) it meets the 2 x 2 squares
    (N, h, 2, w, 2, C_i) of the result. So is the convolution behind a sum over the parts, which are made again in the
    backward pass in place of being kept.

    Backward, with g = dL/dy and the product p = v * g:
        dL/ds = sum of p over channels,   dL/dc = sum of p over pixels,
        dL/dv = g * (c + s) + dL/ds * s * (1 - s) * w_spatial + dL/dmean / (H * W),   dL/dx = its sum over the squares.

    Sums over channels and pixels are products with ones: these run at full speed and accumulate in float32.
    """

    @staticmethod
    def forward(ctx, w1, b1, w2, b2, w3, b3, kernel, bias, *maps):
        dtype = torch.get_autocast_dtype(w1.device.type) if torch.is_autocast_enabled(w1.device.type) else maps[0].dtype
        maps = [_rows(m.to(dtype)) for m in maps]                                             # (N, h, w, C_i)
        n, height, width, _ = max((m.shape for m in maps), key=lambda shape: shape[1])
        with torch.autocast(w1.device.type, enabled=False):
            mean = torch.cat([_sum_pixels(m) / (m.shape[1] * m.shape[2]) for m in maps], 1)
            mean, hidden, c = _channel_gate(mean, w1, b1, w2, b2)                             # (N, C)
            s = b3.to(dtype)
            for m, w in zip(maps, w3[0].to(dtype).split([m.shape[3] for m in maps])):
                logits = (m @ w)[:, :, None, :, None]                                         # (N, h, 1, w, 1)
                s = s + logits.expand(-1, -1, height // m.shape[1], -1, width // m.shape[2]).reshape(n, height, width)
            s = s.sigmoid()                                                                   # (N, H, W)
            parts = _Gate.parts(maps, c, s)
            if kernel is None:
                y, = parts
            else:
                kernel = kernel.to(dtype)
                kernels = kernel.split([m.shape[3] for m in maps], 1)
                y = F.conv2d(next(parts), kernels[0], None if bias is None else bias.to(dtype), padding=1)
                for part, k in zip(parts, kernels[1:]):
                    y += F.conv2d(part, k, padding=1)
        ctx.save_for_backward(w1, w2, w3, mean, hidden, c, s, kernel, *maps)
        return y

    @staticmethod
    def parts(maps, c, s):
        """The parts (N, C_i, H, W) of v * (c + s)."""
        for m, part_c in zip(maps, c.to(s.dtype).split([m.shape[3] for m in maps], 1)):
            y, x = m.new_empty(*s.shape, m.shape[3]), m[:, :, None, :, None]
            squares = torch.mul(x, _squares(s[..., None], m), out=_squares(y, m))
            squares.addcmul_(x, part_c[:, None, None, None, None])
            yield y.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        w1, w2, w3, mean, hidden, c, s, kernel, *maps = ctx.saved_tensors
        sizes, ds, dc, dkernel, gradients = [m.shape[3] for m in maps], 0, [], None, [_rows(g)]
        dbias = g.sum((0, 2, 3), dtype=w1.dtype) if ctx.needs_input_grad[7] else None
        if kernel is not None:
            kernels, gradients, dkernel = kernel.split(sizes, 1), [], []
            for part, k in zip(_Gate.parts(maps, c, s), kernels):
                dpart, dk, _ = torch.ops.aten.convolution_backward(
                    g, part, k, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False])
                gradients.append(_rows(dpart))                                                # (N, H, W, C_i)
                dkernel.append(dk)
            dkernel = torch.cat(dkernel, 1).to(w1.dtype)
        for m, g in zip(maps, gradients):
            p = (m[:, :, None, :, None] * _squares(g, m)).view(g.shape)
            ds = ds + p @ p.new_ones(p.shape[3])
            dc.append(_sum_pixels(p))
        d3 = ds * s * (1 - s)                                                                 # (N, H, W)
        dmean, *of_channel_gate = _channel_gate_backward(torch.cat(dc, 1), mean, hidden, c, w1, w2)
        by_part = [t.to(s.dtype).split(sizes, -1) for t in (w3[0], c, dmean / s[0].numel())]
        dw3, dmaps = [], []
        for m, g, w, part_c, part_mean in zip(maps, gradients, *by_part):
            step = g.shape[1] // m.shape[1]
            z = _sum_squares(d3[..., None], step)                                             # (N, h, w, 1)
            dw3.append(z.view(-1) @ m.view(-1, len(w)))
            dm = _sum_squares(g * s[..., None], step)                                         # (N, h, w, C_i)
            dm.addcmul_(_sum_squares(g, step), part_c[:, None, None])
            dm.view(-1, len(w)).addmm_(z.view(-1, 1), w[None])
            dmaps.append(dm.add_(part_mean[:, None, None], alpha=step ** 2).permute(0, 3, 1, 2))
        dw3, db3 = torch.cat(dw3)[None].to(w3.dtype), d3.sum(dtype=w3.dtype).view(1)
        return *of_channel_gate, dw3, db3, dkernel, dbias, *dmaps


class _GatedConv(torch.autograd.Function):
    """F.conv2d(v * (c + s), kernel, bias, padding=1) for few output channels K, without the gated map.

    A tap t of the kernel gives at each pixel  t . (v * (c + s)) = (t * c) . v + s * (t . v). So one matrix product of v
    with the rows t * c, t and w_spatial, 18 * K + 1 of them, holds all that is needed; what each of the nine taps gives
    is then added where it belongs. Backward is the same product transposed, with one more row for the mean.
    """

    @staticmethod
    def forward(ctx, w1, b1, w2, b2, w3, b3, kernel, bias, v):
        v = _rows(v)                                                                          # (N, H, W, C)
        n, height, width, channels = v.shape
        with torch.autocast(v.device.type, enabled=False):
            mean = _sum_pixels(v) / (height * width)
            mean, hidden, c = _channel_gate(mean, w1, b1, w2, b2)
            taps = kernel.permute(2, 3, 0, 1).reshape(-1, channels).to(c.dtype)               # (9K, C)
            rows = torch.cat([taps * c[:, None], taps.expand(n, -1, -1), w3.to(c.dtype).expand(n, -1, -1)], 1)
            by_c, by_s, z = (rows.to(v.dtype) @ v.view(n, -1, channels).mT).split([len(taps), len(taps), 1], 1)
            s = torch.sigmoid(z.to(c.dtype) + b3)                                             # (N, 1, HW)
            by_tap = by_c.addcmul_(by_s, s.to(v.dtype)).to(c.dtype).view(n, 3, 3, -1, height, width)
            logits = c.new_zeros(n, len(bias), height + 2, width + 2)  # with a border that taps beyond the map fall on
            for i in range(3):
                for j in range(3):
                    logits[:, :, 2 - i:2 - i + height, 2 - j:2 - j + width] += by_tap[:, i, j]
            logits = logits[:, :, 1:-1, 1:-1] + bias[:, None, None]
        ctx.save_for_backward(w1, w2, mean, hidden, c, s, taps, rows, by_s.contiguous(), v)
        return logits                                                                         # (N, K, H, W)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        w1, w2, mean, hidden, c, s, taps, rows, by_s, v = ctx.saved_tensors
        n, height, width, channels = v.shape
        u = F.unfold(g.to(v.dtype), 3, padding=1).unflatten(1, (-1, 9)).transpose(1, 2)       # (N, 9, K, HW)
        u = u.flip(1).flatten(1, 2)                                                           # (N, 9K, HW)
        d3 = (u * by_s).sum(1, keepdim=True, dtype=s.dtype) * s * (1 - s)                     # (N, 1, HW)
        u = torch.cat([u, u * s.to(u.dtype), d3.to(u.dtype), torch.ones_like(u[:, :1])], 1)   # (N, 18K + 2, HW)
        drows = (u[:, :-1] @ v.view(n, -1, channels)).to(c.dtype)                             # (N, 18K + 1, C)
        by_c, by_s, dw3 = drows.split([len(taps), len(taps), 1], 1)
        dmean, *of_channel_gate = _channel_gate_backward((by_c * taps).sum(1), mean, hidden, c, w1, w2)
        rows = torch.cat([rows, dmean[:, None] / (height * width)], 1)
        dv = (u.mT @ rows.to(v.dtype)).view(v.shape).permute(0, 3, 1, 2)
        dtaps = (by_c * c[:, None] + by_s).sum(0).view(3, 3, -1, channels).permute(2, 3, 0, 1)
        return *of_channel_gate, dw3.sum(0), d3.sum().view(1), dtaps, g.sum((0, 2, 3)), dv


def gated_conv(v, gate, conv):
    """conv(gate(v)) for an SCSE and a 3x3 convolution with bias and padding 1: (N, C, H, W) -> (N, K, H, W), in the
    weights' precision, under autocast too."""
    if torch.compiler.is_compiling():
        return conv(gate.plain(v)).to(conv.weight.dtype)
    return _GatedConv.apply(*gate.weights(), conv.weight, conv.bias, v)


def _channel_gate(mean, w1, b1, w2, b2):
    """Mean of the channels (N, C) -> it in the layers' precision, the hidden layer, c (N, C)."""
    mean = mean.to(w1.dtype)
    hidden = F.relu(F.linear(mean, w1, b1))
    return mean, hidden, torch.sigmoid(F.linear(hidden, w2, b2))


def _channel_gate_backward(dc, mean, hidden, c, w1, w2):
    """dL/dc (N, C) -> the gradients of _channel_gate's arguments."""
    d2 = dc.to(c.dtype) * c * (1 - c)
    d1 = (d2 @ w2) * (hidden > 0)
    return d1 @ w1, d1.T @ mean, d1.sum(0), d2.T @ hidden, d2.sum(0)


def _rows(t):
    """(N, C, H, W) -> (N, H, W, C), without a copy if it is channels_last."""
    return t.permute(0, 2, 3, 1).contiguous()


def _squares(t, m):
    """t (N, H, W, C) as the squares (N, h, H / h, w, W / w, C) of the pixels of m (N, h, w, *)."""
    return t.view(len(t), m.shape[1], -1, m.shape[2], t.shape[2] // m.shape[2], t.shape[3])


def _sum_pixels(t):
    """(N, H, W, C) -> (N, C), in float32 at least. A power of 2 keeps sums of rows within float16, without rounding."""
    scale = 2 ** math.ceil(math.log2(t.shape[2]))
    rows = t.new_full((1, t.shape[2]), 1 / scale) @ t                                         # (N, H, 1, C)
    return rows.sum((1, 2), dtype=torch.promote_types(t.dtype, torch.float32)) * scale


def _sum_squares(t, step):
    """(N, H, W, C) -> (N, H / step, W / step, C)."""
    return t if step == 1 else F.avg_pool2d(t.permute(0, 3, 1, 2), step, divisor_override=1).permute(0, 2, 3, 1)


def conv_of_upsampled(x, weight, bias=None):
    """F.conv2d(upsampled x, weight, bias, padding=1) in sub-pixel form: x (N, C, H, W), weight (O, C, 3, 3)
    -> (N, O, 2H, 2W).

    Of nearest upsampled rows, the taps t0, t1, t2 of an even row 2i meet rows i - 1, i, i of x: two taps t0, t1 + t2.
    Those of an odd row 2i + 1 meet i, i, i + 1: t0 + t1, t2. With columns alike, four 2x2 kernels give the four pixels
    of each square, borders included (both forms pad by zeros): 16 products in place of 36, and no upsampled map. As one
    convolution of 4 * O channels, padded by 1, the kernels give H + 1 rows, of which even ones need the first H and odd
    ones the last.
    """
    def halves(weight, axis):
        t0, t1, t2 = weight.unbind(axis)
        return [torch.stack([t0, t1 + t2], axis), torch.stack([t0 + t1, t2], axis)]

    kernels = torch.cat([kernel for rows in halves(weight, 2) for kernel in halves(rows, 3)])   # (4 * O, C, 2, 2)
    y = F.conv2d(x, kernels, None if bias is None else bias.repeat(4), padding=1)
    if torch.compiler.is_compiling():
        n, _, height, width = y.shape
        pixels = [part[:, a:height - 1 + a, b:width - 1 + b] for part, a, b in
                  zip(y.permute(0, 2, 3, 1).chunk(4, -1), (0, 0, 1, 1), (0, 1, 0, 1))]
        squares = torch.stack([torch.stack(pixels[:2], 3), torch.stack(pixels[2:], 3)], 2)    # (N, H, 2, W, 2, O)
        return squares.reshape(n, 2 * height - 2, 2 * width - 2, -1).permute(0, 3, 1, 2)
    return _Interleave.apply(y)


class _Interleave(torch.autograd.Function):
    """The four pixels of each square, (N, 4 * O, H + 1, W + 1) -> (N, O, 2H, 2W); that of row a and column b begins at
    (a, b). Backward is the same copying the other way."""

    @staticmethod
    def forward(ctx, y):
        n, channels, height, width = y.shape
        out = y.new_empty(n, 2 * height - 2, 2 * width - 2, channels // 4)
        _Interleave.copy(y.permute(0, 2, 3, 1), out, back=False)
        return out.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        n, channels, height, width = g.shape
        dy = g.new_zeros(n, height // 2 + 1, width // 2 + 1, 4 * channels)
        _Interleave.copy(dy, g.permute(0, 2, 3, 1), back=True)
        return dy.permute(0, 3, 1, 2)

    @staticmethod
    def copy(y, out, back):
        height, width = y.shape[1] - 1, y.shape[2] - 1
        for (a, b), part in zip(((0, 0), (0, 1), (1, 0), (1, 1)), y.chunk(4, -1)):
            part, pixels = part[:, a:a + height, b:b + width], out[:, a::2, b::2]
            part.copy_(pixels) if back else pixels.copy_(part)
