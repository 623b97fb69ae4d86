"""U-Net and U-Net++ decoders with scSE attention over timm encoders, and timm's classifiers.

U-Net: Ronneberger et al. 2015, arXiv 1505.04597. U-Net++: Zhou et al. 2018, arXiv 1807.10165.
scSE: Roy et al. 2018, arXiv 1803.02579. Encoders: timm's `features_only` (networks/encoders.py).

Shapes: N images, C channels, H x W pixels. Lists of feature maps go from fine (stride 2) to coarse (stride 2**depth).
These are the textbook forms. networks/fast.py has faster ones of the same functions.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from networks.encoders import conv_bn_relu, create_classifier, create_encoder
from running.process import InputError


# ----------------------------------------------------------------------------------------------------------- decoders
class SCSE(nn.Module):
    """Concurrent spatial and channel squeeze & excitation: v * c + v * s (Roy et al. 2018, eq. 2 to 6).

    c weighs each channel by what the whole map holds, s weighs each pixel.
    forward: (N, C, H, W) -> (N, C, H, W)
    """

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        hidden = max(1, channels // reduction)
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.expand = nn.Conv2d(hidden, channels, 1)
        self.spatial = nn.Conv2d(channels, 1, 1)

    def forward(self, v):
        mean = v.mean((2, 3), keepdim=True)                                     # (N, C, 1, 1)
        c = torch.sigmoid(self.expand(F.relu(self.reduce(mean))))               # (N, C, 1, 1)
        s = torch.sigmoid(self.spatial(v))                                      # (N, 1, H, W)
        return v * c + v * s                                                    # (N, C, H, W)


class DecoderBlock(nn.Module):
    """Doubles the size of a map, joins the skips of that size to it, and mixes them by two convolutions.

    forward: x (N, in_channels, H, W), skips: maps (N, *, 2H, 2W) of skip_channels in all, or none
             -> (N, out_channels, 2H, 2W)
    """

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int):
        super().__init__()
        joined = in_channels + skip_channels
        self.scse1 = SCSE(joined) if skip_channels else nn.Identity()
        self.conv1 = conv_bn_relu(joined, out_channels)
        self.conv2 = conv_bn_relu(out_channels, out_channels)
        self.scse2 = SCSE(out_channels)

    def forward(self, x, skips=()):
        x = F.interpolate(x, scale_factor=2, mode="nearest")                    # (N, in_channels, 2H, 2W)
        x = torch.cat([x, *skips], dim=1)                                       # (N, in + skip channels, 2H, 2W)
        x = self.scse1(x)
        x = self.conv1(x)                                                       # (N, out_channels, 2H, 2W)
        x = self.conv2(x)
        return self.scse2(x)


class UnetDecoder(nn.Module):
    """Climbs from the coarsest map to full resolution. Each block takes the encoder's map of its size as skip; the last
    one has none.

    forward: maps (N, encoder_channels[i], H / 2**(i+1), W / 2**(i+1)) -> (N, decoder_channels[-1], H, W)
    """

    def __init__(self, encoder_channels: list[int], decoder_channels: list[int]):
        super().__init__()
        coarsest, *skip_channels = reversed(encoder_channels)
        inputs = [coarsest, *decoder_channels[:-1]]
        self.blocks = nn.ModuleList(map(DecoderBlock, inputs, [*skip_channels, 0], decoder_channels))

    def forward(self, features):
        x, *skips = reversed(features)
        *blocks, last = self.blocks
        for block, skip in zip(blocks, skips):
            x = block(x, [skip])
        return last(x)


class UnetPlusPlusDecoder(nn.Module):
    """The nested decoder. Node X(i, j) at level i (stride 2**(i+1)) joins X(i+1, j-1), upsampled, with all of
    X(i, 0..j-1). X(i, 0) are the encoder's maps. Of depth 3, with `final`, which doubles X(0, 2) to full resolution:

        X(0, 0)   X(0, 1)   X(0, 2)   final
        X(1, 0)   X(1, 1)
        X(2, 0)

    The last nodes, i + j = depth - 1, are the way to the output. They have the channels of decoder_channels, inner
    nodes those of their level's encoder map.
    forward: maps (N, encoder_channels[i], H / 2**(i+1), W / 2**(i+1)) -> (N, decoder_channels[-1], H, W)
    """

    def __init__(self, encoder_channels: list[int], decoder_channels: list[int]):
        super().__init__()
        self.depth = depth = len(encoder_channels)
        width = {(i, 0): channels for i, channels in enumerate(encoder_channels)}
        self.nodes = nn.ModuleDict()
        for j in range(1, depth):
            for i in range(depth - j):
                last = i + j == depth - 1
                width[i, j] = decoder_channels[j - 1] if last else encoder_channels[i]
                skip_channels = encoder_channels[i] * j  # j skips: a last node is nobody's skip
                self.nodes[f"{i}_{j}"] = DecoderBlock(width[i + 1, j - 1], skip_channels, width[i, j])
        self.final = DecoderBlock(width[0, depth - 1], 0, decoder_channels[-1])

    def forward(self, features):
        x = {(i, 0): feature for i, feature in enumerate(features)}
        for j in range(1, self.depth):
            for i in range(self.depth - j):
                skips = [x[i, k] for k in reversed(range(j))]  # newest first, as smp has them
                x[i, j] = self.nodes[f"{i}_{j}"](x[i + 1, j - 1], skips)
        return self.final(x[0, self.depth - 1])


# built with the channels of the encoder (fine to coarse) and of the decoder (coarse to fine); each gives a map of full
# resolution and decoder_channels[-1] channels
DECODERS = {"unet": UnetDecoder, "unetpp": UnetPlusPlusDecoder}


# ---------------------------------------------------------------------------------------------------------- segmenter
class Segmenter(nn.Module):
    """Encoder, decoder, and a 3x3 convolution as head.

    Sizes that the encoder does not take are padded by repeating the border, and the logits are cropped back.
    forward: image (N, in_channels, H, W), H and W from 16 up -> logits (N, classes, H, W)
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, head: nn.Module, in_channels: int):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.head = head
        self.in_channels = in_channels

    def forward(self, image):
        height, width = image.shape[-2:]
        multiple = self.encoder.multiple
        # right and below, up to the next multiple
        x = F.pad(image, (0, -width % multiple, 0, -height % multiple), mode="replicate")
        features = self.encoder(x)                                              # maps (N, C_i, H / 2**(i+1), ...)
        x = self.decoder(features)                                              # (N, decoder_channels[-1], H, W)
        return self.head(x)[..., :height, :width]                               # (N, classes, H, W)


def build_segmenter(arch: str = "unet", encoder: str = "resnet18", in_channels: int = 1, classes: int = 2,
                    depth: int = 3, decoder_channels=(256, 128, 64), weights: str = "none") -> Segmenter:
    """Build a network: float image (N, in_channels, H, W) -> logits (N, classes, H, W), any H and W from 16 up.

    arch: a name in DECODERS. encoder: any timm model that gives feature maps. depth: how many of them are used, 2 to 5.
    decoder_channels: of the decoder's outputs from coarse to fine, one per depth.
    weights of the encoder: "none" (random), "imagenet" (timm's), "auto" (the same, or random ones with a warning where
    they cannot be had), or a file of timm's. The result's `weights_used` is "none", "imagenet" or the file.
    Raises InputError for what cannot be built.
    """
    if arch not in DECODERS:
        raise InputError(f"arch {arch!r} is not known; choose one of {', '.join(DECODERS)}")
    if depth not in range(2, 6) or len(decoder_channels) != depth:
        raise InputError(f"depth {depth} with decoder channels {tuple(decoder_channels)}: choose a depth from 2 to 5 "
                         f"and as many channels")
    encoder, used = create_encoder(encoder, in_channels, depth, weights)
    decoder = DECODERS[arch](encoder.channels, decoder_channels)
    head = nn.Conv2d(decoder_channels[-1], classes, 3, padding=1)
    for layer in decoder.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    nn.init.xavier_uniform_(head.weight)
    nn.init.zeros_(head.bias)
    model = Segmenter(encoder, decoder, head, in_channels)
    model.weights_used = used
    return model


def default_decoder_channels(depth: int) -> tuple[int, ...]:
    """Return (256, 128, 64) for the paper's depth 3; deeper ones end in 16 channels at full resolution."""
    return (256, 128, 64)[:depth] if depth < 4 else (256, 128, 64, 32, 16)[-depth:]


# --------------------------------------------------------------------------------------------------------- classifier
class Classifier(nn.Module):
    """A timm classifier that normalises its input by a mean (3,) and a deviation (3,).

    forward: image (N, 3, S, S), float in [0, 1] or uint8, S as in image_size -> logits (N, classes)
    """

    def __init__(self, network: nn.Module, image_size: int, mean, std):
        super().__init__()
        self.network = network
        self.image_size = image_size
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, image):
        image = image / 255 if image.dtype == torch.uint8 else image
        return self.network((image - self.mean) / self.std)


def build_classifier(model: str, classes: int, image_size: int = 384, weights: str = "none",
                     recipe: str = "short") -> Classifier:
    """Build a classifier of RGB images (N, 3, image_size, image_size), float in [0, 1] or uint8 -> logits (N, classes).

    model: any timm classifier. weights: as for build_segmenter; the head is always new. recipe: its input is normalised
    as its timm config has it; of "paper" by ImageNet's mean and deviation, whatever the model (notebooks of the paper).
    Raises InputError, also where the model cannot take images of this size.
    """
    network, used = create_classifier(model, classes, image_size, weights)
    config = network.pretrained_cfg
    mean, std = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if recipe == "paper" else (config["mean"], config["std"])
    classifier = Classifier(network, image_size, mean, std)
    classifier.weights_used = used
    return classifier


class Ensemble(nn.Module):
    """Networks as one: image -> logits (N, classes, ...), whose probabilities are the mean of theirs.

    one_class: a place has one class, so probabilities are a softmax, not sigmoids.
    """

    def __init__(self, networks, one_class: bool = False):
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.one_class = one_class

    def forward(self, image):
        logits = torch.stack([network(image).float() for network in self.networks])  # (networks, N, classes, ...)
        if self.one_class:
            return logits.log_softmax(2).logsumexp(0)
        # logit(mean p) = log(sum p) - log(sum (1 - p)), where float32 cannot round p to 1
        return F.logsigmoid(logits).logsumexp(0) - F.logsigmoid(-logits).logsumexp(0)


# ------------------------------------------------------------------------------------------------------------ load_smp
SMP_NAMES = {
    "encoder.model.": "encoder.",
    "segmentation_head.0.": "head.",
    "attention1.attention.": "scse1.",
    "attention2.attention.": "scse2.",
    "cSE.1.": "reduce.",
    "cSE.3.": "expand.",
    "sSE.0.": "spatial.",
}


def load_smp(model: Segmenter, state_dict: dict) -> Segmenter:
    """Load the weights of segmentation_models_pytorch's Unet or UnetPlusPlus, and return the model.

    The reference must have decoder_attention_type="scse" and the same encoder (its "resnet18" or its "tu-" names),
    depth and channels: then both are the same function. What the reference keeps but never uses (encoder stages past
    the depth, the attention of blocks without a skip) is left out. Raises KeyError or RuntimeError for weights of
    another network.
    """
    own = model.state_dict()
    depth = len(model.encoder.channels)
    renamed = {_own_name(name, depth): tensor for name, tensor in state_dict.items()}
    model.load_state_dict({name: renamed[name] for name in own})
    return model


def _own_name(name, depth):
    """Our name of a weight of smp."""
    for theirs, ours in SMP_NAMES.items():
        name = name.replace(theirs, ours)
    # U-Net++: x_{d}_{l} is node (depth - 2 - l, l - d + 1), or the last block. Of depth 4 x_0_0 is X(2, 1), x_0_3 final
    if name.startswith("decoder.blocks.x_"):
        _, _, node, rest = name.split(".", 3)
        d, level = map(int, node.split("_")[1:])
        node = "final" if level == depth - 1 else f"nodes.{depth - 2 - level}_{level - d + 1}"
        name = f"decoder.{node}.{rest}"
    return name
