"""The decoder's functions in fewer passes over memory, and networks ready to predict with.

    speed_up(model)        the same model; its blocks get their fast forward, on the same weights
    for_inference(model)   a copy in eval mode with its BatchNorms folded into the convolutions before them

The textbook forms in models.py move the largest maps through memory again and again. The tests compare both in float64.
torch.compile and torch.export get the textbook forms.
Inside, maps are (N, H, W, C): that is how channels_last lies in memory.
"""
import copy

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.utils.fusion import fuse_conv_bn_eval

import models


# ------------------------------------------------------------------------------------------------------------ training
def speed_up(model: nn.Module) -> nn.Module:
    """Give each SCSE and DecoderBlock in a model its fast forward: the same logits, gradients and state_dict."""
    return _exchange(model, {models.SCSE: FastSCSE, models.DecoderBlock: FastDecoderBlock})


def slow_down(model: nn.Module) -> nn.Module:
    """Undo speed_up."""
    return _exchange(model, {FastSCSE: models.SCSE, FastDecoderBlock: models.DecoderBlock})


def _exchange(model, classes):
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))
    return model


class FastSCSE(models.SCSE):
    """SCSE with its gradient written by hand."""

    def forward(self, v):
        if torch.compiler.is_compiling():
            return super().forward(v)
        layers = (self.reduce, self.expand, self.spatial)
        weights = [tensor for layer in layers for tensor in (layer.weight.flatten(1), layer.bias)]
        return _Gate.apply(v, *weights)


class FastDecoderBlock(models.DecoderBlock):
    """DecoderBlock that never makes its upsampled map where there are no skips."""

    def forward(self, x, skips=()):
        if skips or torch.compiler.is_compiling():
            return super().forward(x, skips)
        conv, *rest = self.conv1
        x = conv_of_upsampled(x, conv.weight, conv.bias)
        for layer in rest:
            x = layer(x)
        return self.scse2(self.conv2(x))


class _Gate(torch.autograd.Function):
    """y = v * (c + s), see SCSE, in few passes over v.

    Backward, with g = dL/dy and the product p = v * g:
        dL/ds = sum of p over channels,   dL/dc = sum of p over pixels,
        dL/dv = g * (c + s) + dL/ds * s * (1 - s) * w_spatial + dL/dmean / (H * W)
    """

    @staticmethod
    def forward(ctx, v, w1, b1, w2, b2, w3, b3):
        v = v.permute(0, 2, 3, 1).contiguous()                            # (N, H, W, C), no copy if channels_last
        with torch.autocast(v.device.type, enabled=False):
            rows = v.sum(1) / v.shape[1]  # far faster in bfloat16 than a mean; all at once might overflow float16
            mean = rows.mean(1).to(w1.dtype)                              # (N, C)
            hidden = F.relu(F.linear(mean, w1, b1))
            c = torch.sigmoid(F.linear(hidden, w2, b2))                   # (N, C)
            s = torch.sigmoid(F.linear(v, w3.to(v.dtype), b3.to(v.dtype)))  # (N, H, W, 1)
            y = (v * s).addcmul_(v, c.to(v.dtype)[:, None, None])         # (N, H, W, C)
        ctx.save_for_backward(v, w1, w2, w3, mean, hidden, c, s)
        return y.permute(0, 3, 1, 2)                                      # (N, C, H, W)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        v, w1, w2, w3, mean, hidden, c, s = ctx.saved_tensors
        g = g.permute(0, 2, 3, 1).contiguous()                            # (N, H, W, C)
        p = v * g
        ds = p.sum(3, keepdim=True)                                       # (N, H, W, 1)
        d3 = ds * s * (1 - s)                                             # (N, H, W, 1)
        d2 = p.sum((1, 2)).to(c.dtype) * c * (1 - c)                      # (N, C)
        d1 = (d2 @ w2) * (hidden > 0)
        dmean = (d1 @ w1) / v[0, ..., 0].numel()                          # (N, C)
        dw3 = d3.flatten()[None] @ v.flatten(0, 2)                        # (1, C)
        dv = torch.mul(g, s, out=p)                                       # (N, H, W, C)
        dv.addcmul_(g, c.to(g.dtype)[:, None, None])
        of_pixels = torch.cat([d3, torch.ones_like(d3)], 3)               # (N, H, W, 2)
        of_channels = torch.stack([w3.expand_as(dmean), dmean], 1)        # (N, 2, C)
        dv.flatten(1, 2).baddbmm_(of_pixels.flatten(1, 2), of_channels.to(g.dtype))
        db3 = d3.sum(dtype=w3.dtype).view(1)
        return dv.permute(0, 3, 1, 2), d1.T @ mean, d1.sum(0), d2.T @ hidden, d2.sum(0), dw3.to(w3.dtype), db3


def conv_of_upsampled(x, weight, bias=None):
    """Return F.conv2d(upsampled x, weight, bias, padding=1) in sub-pixel form (Shi et al. 2016, arXiv 1609.07009):
    x (N, C, H, W), weight (O, C, 3, 3) -> (N, O, 2H, 2W).

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
    bias = None if bias is None else bias.repeat(4)
    y = F.conv2d(x, kernels, bias, padding=1).permute(0, 2, 3, 1)                               # (N, H + 1, W + 1, 4O)
    even, odd = slice(None, -1), slice(1, None)
    a, b, c, d = y.chunk(4, -1)
    upper = torch.stack([a[:, even, even], b[:, even, odd]], 3)                                 # (N, H, W, 2, O)
    lower = torch.stack([c[:, odd, even], d[:, odd, odd]], 3)
    squares = torch.stack([upper, lower], 2)                                                    # (N, H, 2, W, 2, O)
    return squares.flatten(1, 2).flatten(2, 3).permute(0, 3, 1, 2)                              # (N, O, 2H, 2W)


# ----------------------------------------------------------------------------------------------------------- inference
def for_inference(model: nn.Module) -> nn.Module:
    """Return a copy of a Segmenter or Classifier to predict with, in eval mode and without gradients, its BatchNorms
    folded: w' = w * gamma / sigma, b' = beta + (b - mu) * gamma / sigma. In float32 the logits stay equal to 1e-4.

    Which convolution comes before a BatchNorm is seen in a trial run. Where there is none the BatchNorm stays. All stay
    where folding changes what comes out: some networks use what lies between for something else too.
    """
    model = slow_down(copy.deepcopy(model)).eval().requires_grad_(False)
    folded = copy.deepcopy(model)
    weight = next(model.parameters())
    size = getattr(model, "image_size", 64)
    generator = torch.Generator().manual_seed(0)  # training draws from torch's own
    image = torch.rand(2, getattr(model, "in_channels", 3), size, size, generator=generator).to(weight)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        names = {layer: name for name, layer in folded.named_modules()}
        for conv, bn in _pairs(folded, image):
            folded.set_submodule(names[conv], fuse_conv_bn_eval(conv, bn))
            # timm's BatchNormAct2d holds its activation
            folded.set_submodule(names[bn], getattr(bn, "act", nn.Identity()))
        expected = model(image)
        if (folded(image) - expected).norm() <= 0.01 * expected.norm():  # a GPU may round to TF32
            model = folded
    return speed_up(model)


def _pairs(model, image):
    """[(convolution, BatchNorm)] of a model where the second takes what the first gives, each used once."""
    made_by, pairs, used = {}, [], []

    def see(layer, inputs, output):
        used.append(layer)
        if isinstance(layer, nn.BatchNorm2d) and id(inputs[0]) in made_by:
            pairs.append((made_by[id(inputs[0])][0], layer))
        elif isinstance(layer, nn.Conv2d):
            made_by[id(output)] = layer, output  # the output is kept, so that its id stays its own

    hooks = [layer.register_forward_hook(see, prepend=True) for layer in model.modules()]
    model(image)
    for hook in hooks:
        hook.remove()
    return [(conv, bn) for conv, bn in pairs if used.count(conv) == used.count(bn) == 1]
