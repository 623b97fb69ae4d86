"""timm's encoders, and where a network's first weights come from."""
import difflib
import functools
import logging
import math
import os
import socket
import threading
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub.constants as hub  # comes with timm
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

from running.process import InputError

DOWNLOAD_SECONDS = 10  # how long weights="auto" waits for ImageNet weights
STEM_WIDTH = 32  # channels of level 2 where an encoder begins later
LEVEL_WIDTHS = (64, 64, 128, 256, 512)  # of maps brought to another level, at most; from fine to coarse, resnet18's
FREE_SIZE = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})  # what frees timm's models of one input size
SIZES = (64, 112, 224, 256, 384, 448)  # sides to try: multiples of common strides and windows
logging.getLogger("timm").setLevel(logging.ERROR)  # it warns of every weight that features_only leaves out


def create_encoder(name, in_channels, depth, weights):
    """An encoder of any timm model, and which weights it got.

    It gives of an image (N, in_channels, H, W) the maps (N, channels[i], H / 2**(i+1), W / 2**(i+1)), i < depth, for H
    and W that its `multiple`, itself one of 2**depth, divides, from `minimum` up. It is timm's own module where that
    does so by itself, or a Pyramid.
    """
    check_name("encoder", name)

    def create(**settings):
        return timm.create_model(name, features_only=True, **settings)

    plan, settings = None, {"in_chans": in_channels, "out_indices": tuple(range(depth))}
    if not _is_pyramid(create, settings, depth):
        plan = _plan(create, name, in_channels, depth)
        settings = plan.settings
    create = functools.partial(create, **settings)
    encoder, used = with_weights(create(), create, name, weights)
    if hasattr(encoder, "_stage_out_idx"):  # timm's EfficientNetFeatures keeps, and runs, all stages: drop the unused
        encoder.blocks = encoder.blocks[:max(encoder._stage_out_idx)]
    if plan and (plan.window or any(plan.lost) or plan.strides != [2 ** (i + 1) for i in range(depth)]
                 or settings["in_chans"] != in_channels or _is_channels_last(encoder)):
        return Pyramid(encoder, in_channels, plan), used
    encoder.channels = encoder.feature_info.channels()
    encoder.multiple, encoder.minimum = (plan.multiple, plan.minimum) if plan else (2 ** depth, 0)
    return encoder, used


@dataclass
class Plan:
    """How to get a pyramid of a timm network."""
    settings: dict  # what timm is to be told beside the model's name
    strides: list   # of the network's maps: pixels a cell
    channels: list  # of these maps
    lost: list      # of these maps: cells that convolutions which do not pad have lost on a side's two ends together
    levels: list    # from fine to coarse which map each is made of; None: of the image itself
    multiple: int   # of which the sides of the network's input are to be...
    minimum: int    # ...and the least that they may be
    window: int     # the one size of input that the network takes, or 0


class Pyramid(nn.Module):
    """A timm network whose maps are brought to the strides 2, 4, ..., 2**depth that the decoders climb.

    Its input is cut into windows if the network takes one size only. A level whose stride the network has gets that
    map. Level 2 of a network that begins later is a small convolution of the image. Other levels get a map of the
    nearest stride, projected to few channels first and resampled then; where many maps share a stride, as a plain
    transformer's do, early ones serve fine levels.

    forward: (N, in_channels, H, W), H and W multiples of `multiple`, not below `minimum`
             -> maps (N, channels[i], H / 2**(i+1), W / 2**(i+1))
    """

    def __init__(self, network, in_channels, plan):
        super().__init__()
        self.network, self.plan = network, plan
        own = 1 if plan.window else plan.multiple
        self.multiple, self.minimum = math.lcm(2 ** len(plan.levels), own), 0 if plan.window else plan.minimum
        self.colours = None
        if plan.settings["in_chans"] != in_channels:  # the network takes RGB only; at first it gets what is grey
            self.colours = nn.Conv2d(in_channels, plan.settings["in_chans"], 1, bias=False)
            nn.init.constant_(self.colours.weight, 1 / in_channels)
        self.stem, self.layers, self.channels = None, nn.ModuleList(), []
        for i, k in enumerate(plan.levels):
            if k is None:
                self.stem = conv_bn_relu(in_channels, STEM_WIDTH, 3, stride=2)
                self.channels.append(STEM_WIDTH)
                continue
            used = sum(j is not None and plan.strides[j] == plan.strides[k] for j in plan.levels)
            own = used == 1 and plan.strides[k] == 2 ** (i + 1)
            self.channels.append(plan.channels[k] if own else min(plan.channels[k], LEVEL_WIDTHS[i]))
            self.layers.append(nn.Identity() if own else conv_bn_relu(plan.channels[k], self.channels[-1], 1))

    def forward(self, image):
        window = self.plan.window
        maps = self._of_windows(image, window - window % 2 ** len(self.channels)) if window else self._of_one(image)
        return maps if self.stem is None else [self.stem(image), *maps]

    def _of_one(self, image):
        """The levels of an image, but for the stem's."""
        maps, levels = _maps(self.network, self.colours(image) if self.colours else image), []
        first = len(self.channels) - len(self.layers)
        for i, layer in enumerate(self.layers, first):
            k = self.plan.levels[i]
            x, factor, lost = layer(maps[k]), self.plan.strides[k] / 2 ** (i + 1), self.plan.lost[k]
            if lost:
                x = F.pad(x, (lost // 2, lost - lost // 2) * 2, mode="replicate")
            if factor < 1 and (1 / factor).is_integer():
                x = F.avg_pool2d(x, int(1 / factor))
            elif factor != 1 and self.plan.window:
                x = F.interpolate(x, scale_factor=factor * (1 + 1e-9), mode="bilinear")  # sizes are rounded down
            elif factor != 1:
                x = F.interpolate(x, [side // 2 ** (i + 1) for side in image.shape[2:]], mode="bilinear")
            levels.append(x)
        return levels

    def _of_windows(self, image, step):
        """The same from windows of the network's size, of which each gives the maps of its first `step` pixels."""
        (height, width), size, depth = image.shape[-2:], self.plan.window, len(self.channels)
        rows, columns = -(-height // step), -(-width // step)
        windows = pad(image, (rows - 1) * step + size, (columns - 1) * step + size)
        windows = windows.unfold(2, size, step).unfold(3, size, step)           # (N, C, rows, columns, size, size)
        windows = windows.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)               # (N * rows * columns, C, size, size)
        levels = []
        for i, x in enumerate(self._of_one(windows), depth - len(self.layers)):
            cells = step >> i + 1
            x = x[..., :cells, :cells].unflatten(0, (-1, rows, columns)).permute(0, 3, 1, 4, 2, 5)
            levels.append(x.flatten(4).flatten(2, 3)[..., :height >> i + 1, :width >> i + 1])  # (N, C_i, h, w)
        return levels


def conv_bn_relu(in_channels, out_channels, size=3, stride=1):
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False),
                         nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


def pad(image, height, width):
    """The image (N, C, H, W) with its last row and column repeated up to this size."""
    down, right = height - image.shape[-2], width - image.shape[-1]
    return F.pad(image, (0, right, 0, down), mode="replicate") if down or right else image


def _maps(network, image):
    """The maps (N, C, H, W) of timm's feature extractors; some give (N, H, W, C)."""
    maps = network(image)
    return [x.permute(0, 3, 1, 2) for x in maps] if _is_channels_last(network) else maps


def _is_channels_last(network):
    return getattr(network, "output_fmt", "") == "NHWC"


def _is_pyramid(create, settings, depth):
    """Whether the network gives the maps wanted by itself, of images of any size."""
    strides, least = [2 ** (i + 1) for i in range(depth)], max(16, 2 ** depth)
    with torch.random.fork_rng([]), torch.device("meta"):
        try:
            network = create(**settings).eval()
        except Exception:  # each of timm's models has its own kind
            return False
        return (network.feature_info.reduction() == strides and not _is_channels_last(network)
                and _strides(network, settings, 2 ** depth, least // 2 ** depth) == strides
                and [h for _, h, _ in _shapes(network, settings, least, least)] == [least // s for s in strides])


def _plan(create, name, in_channels, depth):
    """The Plan for the networks that `create` makes. What they take and give, only trying tells: on the meta device,
    that is without computing, or where a network needs to, on the CPU. No random numbers are used up."""
    failed = None
    for device in ("meta", "cpu"):
        for channels in dict.fromkeys((in_channels, 3)):
            for settings, own_size in (*((free, False) for free in FREE_SIZE), ({}, True)):
                with torch.random.fork_rng([]), torch.device(device):
                    try:
                        plan = _plan_with(create, {"in_chans": channels, **settings}, depth, own_size)
                    except MemoryError:
                        raise
                    except Exception as error:
                        failed = failed or (None if settings else error)  # not that a setting is unknown
                        continue
                if plan:
                    return plan
    raise InputError(f"encoder {name!r} gives no feature maps ({one_line(failed)}); take another timm model")


def _plan_with(create, settings, depth, own_size):
    """The Plan for networks with these settings: None if they don't take images of any size, but for `own_size`."""
    usual = create(**settings)
    own, indices = usual.pretrained_cfg["input_size"][-1], tuple(range(len(usual.feature_info)))
    try:
        network = create(**settings, out_indices=indices).eval()
    except AssertionError:  # not all maps that are listed can be had
        indices = usual.feature_info.out_indices
        network = create(**settings, out_indices=indices).eval()

    # 1. which maps there are, and which of them the levels need
    if own_size:
        size, strides = own, [own / h for _, h, _ in _shapes(network, settings, own, own)]
    else:
        tries = ((size, _strides(network, settings, size)) for size in (*SIZES, own))
        size, strides = next((found for found in tries if found[1]), (0, None))
        if not size:
            return None
    levels = _levels(strides, depth)
    used = sorted({k for k in levels if k is not None})
    settings = {**settings, "out_indices": tuple(indices[k] for k in used)}
    strides, levels = [strides[k] for k in used], [None if k is None else used.index(k) for k in levels]

    # 2. which sizes give these; without its last stages the network may take more
    network, least = create(**settings).eval(), 1
    if own_size:
        multiple = size
    else:
        coarsest = math.lcm(2 ** depth, *strides)
        multiple, least = next((multiple, times * multiple) for multiple in range(coarsest, size + 1, coarsest)
                               if size % multiple == 0 for times in (1, 2, 4, 8, 16) if times * multiple <= size
                               and _strides(network, settings, multiple, times) == strides)
    side = max(multiple, least)
    shapes = _shapes(network, settings, side, side)
    lost = [round(side / stride) - height for stride, (_, height, _) in zip(strides, shapes)]
    return Plan(settings, strides, [channels for channels, _, _ in shapes], lost, levels, multiple, least,
                own if own_size else 0)


def _strides(network, settings, multiple, times=1):
    """The maps' strides, if the network takes sides of `times` this multiple and of more; else None."""
    def sizes(rows, columns):
        return [shape[1:] for shape in _shapes(network, settings, rows * multiple, columns * multiple)]

    try:
        near = sizes(times, times + 1)
        steps = [width - height for height, width in near]  # cells in a multiple, whatever is lost at the borders
        if min(steps) < 1 or any(multiple % step for step in steps):
            return None
        far = [(height + 4 * times * step, height) for (height, _), step in zip(near, steps)]
        return [multiple // step for step in steps] if sizes(5 * times, times) == far else None
    except Exception:
        return None


@torch.no_grad()
def _shapes(network, settings, height, width):
    """(C, h, w) of the maps of an image of this size."""
    return [tuple(x.shape[1:]) for x in _maps(network, torch.zeros(1, settings["in_chans"], height, width))]


def _levels(strides, depth):
    """For each level which of the maps with these strides it is made of, None: of the image.

    Levels that are nearest to the same stride share its maps evenly, the last level gets the last."""
    nearest = [min(strides, key=lambda stride: abs(math.log2(stride) - level)) for level in range(1, depth + 1)]
    if nearest[0] >= 4:
        nearest[0] = None
    levels = []
    for level, stride in enumerate(nearest):
        maps = [k for k, other in enumerate(strides) if other == stride]
        before, users = nearest[:level].count(stride) + 1, nearest.count(stride)
        levels.append(maps[-(-before * len(maps) // users) - 1] if stride else None)
    return levels


def check_name(what, name):
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3) or timm.list_models("resnet*")[:3]
        raise InputError(f"{what} {name!r} is not a timm model; near it: {', '.join(near)}")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = ", ".join(timm.list_pretrained(f"{name.split('.')[0]}.*")) or "none"
        raise InputError(f"{what} {name!r}: timm has no such weights; it has {tags}") from error


def with_weights(network, create, name, weights):
    """(network, which weights it has): `network`, random as it is, or one that `create` makes with the weights asked
    for ("none", "auto", "imagenet" or a file; see build_segmenter)."""
    if weights == "none":
        return network, "none"
    if weights not in ("auto", "imagenet"):
        return _from_file(create, weights, network.state_dict().keys()), str(weights)
    pretrained, reason = _pretrained(create, DOWNLOAD_SECONDS if weights == "auto" else None)
    if pretrained is not None:
        return pretrained, "imagenet"
    if weights == "imagenet":
        raise InputError(f"ImageNet weights for {name!r} can't be had ({reason}); use --weights none or a file")
    print(f"WARNING: no ImageNet weights for {name} ({reason}); it starts random", flush=True)
    return network, "none"


def _pretrained(create, seconds):
    """(network with ImageNet weights, "") or (None, why not). A download that takes longer goes on in the background,
    for the next run to find in the cache."""
    result = {}

    def fetch():
        if not _hub_reachable():
            hub.HF_HUB_OFFLINE = True  # then the cache answers at once, without retries
        try:
            result["network"] = create(pretrained=True)
        except Exception as error:  # the hub raises its own kinds for no network, no such file, no disk...
            result["reason"] = "no network, and none in the cache" if hub.HF_HUB_OFFLINE else one_line(error)

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(seconds)
    return result.get("network"), result.get("reason", f"not there within {seconds} s")


def _hub_reachable():
    if urllib.request.getproxies():
        return True  # a proxy does the connecting: only the download itself can tell
    url = urllib.parse.urlparse(hub.ENDPOINT)
    try:
        socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), timeout=3).close()
    except OSError:
        return False
    return True


def _from_file(create, file, names):
    """The network with the weights in `file`: a timm state dict (.pth, .pt: tensors only; or .safetensors)."""
    if not Path(file).is_file():
        raise InputError(f"--weights {file}: no such file; give auto, imagenet, none or a file of timm weights")
    try:
        state = timm.models.load_state_dict(os.fspath(file), weights_only=True)
        if not {_plain(name) for name in names} & {_plain(name) for name in state}:
            raise ValueError("none of its names is one of the network's")
        return create(pretrained=True, pretrained_cfg_overlay=dict(state_dict=state))
    except Exception as error:  # unpickling, safetensors and shape errors have no common kind
        raise InputError(f"--weights {file}: not weights for this network ({one_line(error)})") from error


def _plain(name):
    """A weight's name, whether timm's feature extractors changed it or not: model.a or body.a for a, a_0 for a.0."""
    return name.removeprefix("model.").removeprefix("body.").replace("_", ".")


def one_line(error):
    return " ".join(str(error).split())[:200] or type(error).__name__
