"""timm's encoders as pyramids of feature maps, and where a network's first weights come from.

A decoder wants maps of strides 2, 4, ..., 2**depth. Many timm networks give exactly these and stay as they are. The
others become a Pyramid; those that take one size of image only see Windows of the image.
"""
import difflib
import functools
import logging
import math

import huggingface_hub.constants as hub  # comes with timm
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub.utils import get_session

from running.process import InputError, one_line

FREE_SIZE = (  # what tells a timm network to take images of any size; most need not be told
    {"strict_img_size": False},  # first: older Swins take the next one too, and ignore it
    {"dynamic_img_size": True},
    {},
)
WIDTHS = (32, 64, 128, 256, 512)  # a Pyramid's maps have at most these channels, from fine to coarse
CONNECT_SECONDS = 3  # for each of the hub's addresses, of which there are about four
logging.getLogger("timm").setLevel(logging.CRITICAL)  # it warns of every weight that features_only leaves out


# ------------------------------------------------------------------------------------------------------------ encoders
def create_encoder(name: str, in_channels: int, depth: int, weights: str) -> tuple:
    """Return an encoder made from a timm network, and which weights it has.

    encoder: image (N, in_channels, H, W) -> `depth` maps (N, channels[i], H / 2**(i+1), W / 2**(i+1)).
    H and W must be multiples of its attribute `multiple`. weights: see with_weights.
    Raises InputError for networks that give no feature maps.
    """
    check_name("encoder", name)
    settings, sources = _choose_maps(name, in_channels, depth)
    create = functools.partial(timm.create_model, name, features_only=True, **settings)
    network, used = with_weights(create(), create, name, weights)
    if hasattr(network, "_stage_out_idx"):  # timm's EfficientNetFeatures keeps all stages: drop the unused ones
        network.blocks = network.blocks[:max(network._stage_out_idx)]

    multiple, maps = _try_sizes(network.eval(), settings["in_chans"], depth)
    network.train()
    network.multiple = multiple
    network.channels = network.feature_info.channels()
    heights = [x.shape[2] for x in maps]
    if heights == [multiple >> level for level in range(1, depth + 1)]:
        return network, used
    pyramid = Pyramid(network, settings["in_chans"], in_channels, sources)
    if maps:
        return pyramid, used
    return Windows(pyramid, network.pretrained_cfg["input_size"][-1]), used


def _choose_maps(name, in_channels, depth):
    """Return timm's settings for the network, and for each level which of its maps to use."""
    free, info = _feature_info(name)
    indices = info.out_indices
    if len(set(info.reduction())) == 1:  # a plain transformer, of which timm gives the last maps by default
        indices = range(len(info))
    strides = {k: info[k]["reduction"] for k in indices}
    levels = range(1, depth + 1)
    chosen = [_nearest(strides, level, depth) for level in levels]
    used = sorted(set(chosen))
    is_pyramid = [strides[k] for k in chosen] == [2 ** level for level in levels]
    settings = {
        "out_indices": used,
        "in_chans": in_channels if is_pyramid else 3,  # not all others take what is not RGB
        **free,
    }
    return settings, [used.index(k) for k in chosen]


def _feature_info(name):
    """Return what tells the network to take any size, and timm's list of its maps."""
    for free in FREE_SIZE:
        try:
            with torch.random.fork_rng([]):
                network = timm.create_model(name, features_only=True, **free)
            return free, network.feature_info
        except Exception as error:  # the setting is unknown, or at last the reason why there are no maps
            reason = one_line(error, 200)
    raise InputError(f"encoder {name!r} gives no feature maps ({reason}); take another timm model")


def _nearest(strides, level, depth):
    """Return which map has the stride nearest to 2**level. Of several alike, early ones serve fine levels."""
    distances = {k: abs(math.log2(stride) - level) for k, stride in strides.items()}
    nearest = [k for k in strides if distances[k] == min(distances.values())]
    return nearest[(len(nearest) * level - 1) // depth]


@torch.no_grad()
def _try_sizes(network, channels, depth):
    """Return the least side whose multiples the network takes, and its maps of an image of 1 x 2 sides.

    Returns 0 and no maps for a network that takes one size only.
    """
    step = math.lcm(2 ** depth, *network.feature_info.reduction())
    own_size = network.pretrained_cfg["input_size"][-1]
    for side in range(step, max(step, own_size) + 1, step):
        image = torch.zeros(1, channels, side, 2 * side)
        try:
            maps = network(image)
            maps_of_half = network(image[..., :side])
        except Exception:  # each of timm's networks has its own kind
            continue
        if maps[0].numel() > maps_of_half[0].numel():  # not so where a network resizes what it gets, as CrossViT does
            return side, maps
    return 0, []


class Pyramid(nn.Module):
    """A timm network whose maps are brought to the strides 2, 4, ..., 2**depth.

    The finest level is a small convolution of the image, because few of these networks have a map of stride 2. Every
    other level is a map of the network, projected to fewer channels and resized.
    """

    def __init__(self, network, colours, in_channels, sources):
        super().__init__()
        self.network = network
        self.multiple = network.multiple
        self.sources = sources
        self.colours = nn.Identity()
        if colours != in_channels:
            self.colours = nn.Conv2d(in_channels, colours, 1, bias=False)
            nn.init.constant_(self.colours.weight, 1 / in_channels)
        self.stem = conv_bn_relu(in_channels, WIDTHS[0], stride=2)
        self.channels = [WIDTHS[0]]
        self.projections = nn.ModuleList()
        for source, width in zip(sources[1:], WIDTHS[1:]):
            channels = network.channels[source]
            self.channels.append(min(channels, width))
            self.projections.append(conv_bn_relu(channels, self.channels[-1], 1))

    def forward(self, image):
        height, width = image.shape[2:]
        maps = self.network(self.colours(image))
        if getattr(self.network, "output_fmt", "") == "NHWC":
            maps = [x.permute(0, 3, 1, 2) for x in maps]
        levels = [self.stem(image)]
        for level, project in enumerate(self.projections, 2):
            x = project(maps[self.sources[level - 1]])
            x = F.interpolate(x, (height >> level, width >> level), mode="bilinear")
            levels.append(x)                                                    # (N, C, H / 2**level, W / 2**level)
        return levels


class Windows(nn.Module):
    """A Pyramid for a network that takes images of size x size only.

    Cuts the image into windows of `multiple` pixels a side, which is `size` or somewhat less, and joins their maps.
    """

    def __init__(self, pyramid, size):
        super().__init__()
        self.pyramid = pyramid
        self.size = size
        self.channels = pyramid.channels
        self.multiple = size - size % 2 ** len(self.channels)

    def forward(self, image):
        number, channels, height, width = image.shape
        side = self.multiple
        windows = F.unfold(image, side, stride=side)                            # (N, C * side * side, windows)
        windows = windows.transpose(1, 2).reshape(-1, channels, side, side)     # (N * windows, C, side, side)
        windows = F.interpolate(windows, self.size, mode="bilinear")
        levels = []
        for level, x in enumerate(self.pyramid(windows), 1):
            cells = side >> level
            x = F.interpolate(x, cells, mode="bilinear")
            x = x.reshape(number, -1, x[0].numel())
            x = x.transpose(1, 2)                                               # (N, C * cells * cells, windows)
            x = F.fold(x, (height >> level, width >> level), cells, stride=cells)
            levels.append(x)                                                    # (N, C, H / 2**level, W / 2**level)
        return levels


def conv_bn_relu(in_channels: int, out_channels: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    """Return a convolution that keeps H and W (divided by the stride), BatchNorm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


# --------------------------------------------------------------------------------------------------------- classifiers
def create_classifier(name: str, classes: int, image_size: int, weights: str) -> tuple:
    """Return a timm classifier of RGB images of this size, and which weights it has.

    weights: see with_weights. Raises InputError, also where the network cannot take images of this size.
    """
    check_name("model", name)
    config = timm.get_pretrained_cfg(name)
    # transformers must know the size when they are built
    size = image_size if config.fixed_input_size else None
    create = functools.partial(timm.create_model, name, num_classes=classes, img_size=size)
    try:
        network = create().eval()
        with torch.no_grad():
            network(torch.zeros(1, 3, image_size, image_size))
    except Exception as error:  # each of timm's networks has its own kind
        raise InputError(f"model {name!r} cannot classify images of {image_size} x {image_size} "
                         f"({one_line(error, 200)}); its own size is {config.input_size[-1]}") from error
    return with_weights(network.train(), create, name, weights)


def interpolation(name: str, recipe: str) -> str:
    """Return how images are resized for a timm model: "bicubic", "bilinear", ...; paper: always bilinear."""
    check_name("model", name)
    return "bilinear" if recipe == "paper" else timm.get_pretrained_cfg(name).interpolation


# ------------------------------------------------------------------------------------------------------- first weights
def check_name(what, name):
    """Raise InputError, which shows similar names, unless timm has this model (with these weights: model.weights)."""
    known = timm.list_models() + timm.list_pretrained()
    if name not in known:
        similar = difflib.get_close_matches(name, known, cutoff=0)
        raise InputError(f"{what} {name!r} is not a timm model; near it: {', '.join(similar)}")


def with_weights(network, create, name, weights):
    """Return a network with the weights asked for, and which these are: "none", "imagenet" or the file.

    network: has random weights. create: makes another one, with timm's settings that it gets.
    weights: "none" (random), "imagenet" (timm's pretrained ones, or InputError if they can't be had), "auto" (the same,
    or random ones with a warning), or a file of timm's weights.
    """
    if weights == "none":
        return network, "none"
    if weights not in ("auto", "imagenet"):
        return _from_file(create, name, weights), str(weights)
    try:
        get_session().head(hub.ENDPOINT, timeout=CONNECT_SECONDS)
    except Exception:  # of a kind that changes with the hub's version
        hub.HF_HUB_OFFLINE = True  # now it looks into its cache only; otherwise it would retry for a minute
    try:
        return create(pretrained=True), "imagenet"
    except Exception as error:
        reason = "no network, and none in the cache" if hub.HF_HUB_OFFLINE else one_line(error, 200)
    if weights == "imagenet":
        raise InputError(f"ImageNet weights for {name!r} can't be had ({reason}); use --weights none or a file")
    print(f"WARNING: no ImageNet weights for {name} ({reason}); it starts random")
    return network, "none"


def _from_file(create, name, file):
    """Return the network with the weights in a file: tensors by timm's names (.pth, .pt or .safetensors)."""
    try:
        state = timm.models.load_state_dict(str(file), weights_only=True)
        # a feature extractor takes what it knows, whatever that is, and names it otherwise than the whole network
        if state.keys().isdisjoint(timm.create_model(name).state_dict()):
            raise ValueError("none of its names is one of the network's")
        return create(pretrained=True, pretrained_cfg_overlay={"state_dict": state})
    except Exception as error:  # unpickling, safetensors and shape errors have no common kind
        raise InputError(f"--weights {file}: no weights for this network ({one_line(error, 200)}); give a file of "
                         "timm's weights for it, a run's folder, auto, imagenet or none") from error
