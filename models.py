"""U-Net and U-Net++ decoders with scSE attention over timm encoders, and timm's classifiers.

U-Net: Ronneberger et al. 2015, arXiv 1505.04597. U-Net++: Zhou et al. 2018, arXiv 1807.10165.
scSE: Roy et al. 2018, arXiv 1803.02579 (in blocks.py). Encoders: timm, `features_only`.

Shapes: N images, C channels, H x W pixels; feature maps are listed from fine (stride 2) to coarse (stride 2**depth).
"""
import copy

import timm
import torch
import torch.nn as nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from networks.blocks import SCSE, conv_of_upsampled, gated_conv
from networks.encoders import check_name, conv_bn_relu, create_encoder, one_line, pad, with_weights
from running.process import InputError


# ----------------------------------------------------------------------------------------------------------- decoders
class DecoderBlock(nn.Module):
    """Doubles the size of a map, joins the skips of that size to it, and mixes them by two 3x3 convolutions.

    forward: x (N, in_channels, H, W), skips: maps (N, *, 2H, 2W) with skip_channels in all
             -> (N, out_channels, 2H, 2W)
    """

    def __init__(self, in_channels, skip_channels, out_channels):
        super().__init__()
        self.scse1 = SCSE(in_channels + skip_channels)
        self.conv1 = conv_bn_relu(in_channels + skip_channels, out_channels)
        self.conv2 = conv_bn_relu(out_channels, out_channels)
        self.scse2 = SCSE(out_channels)

    def forward(self, x, skips):
        conv, bn, relu = self.conv1
        x = self.scse1(x, *skips, kernel=conv.weight, bias=conv.bias)
        return self.scse2(self.conv2(relu(bn(x))))


class LastBlock(nn.Module):
    """The block that reaches full resolution, where no skip is. Its scSE gate is left to the head: see gated_conv.

    forward: (N, in_channels, H, W) -> (N, out_channels, 2H, 2W), the SCSE that is to weigh it
    """

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv1 = conv_bn_relu(in_channels, out_channels)
        self.conv2 = conv_bn_relu(out_channels, out_channels)
        self.scse2 = SCSE(out_channels)

    def forward(self, x):
        conv, bn, relu = self.conv1
        return self.conv2(relu(bn(conv_of_upsampled(x, conv.weight, conv.bias)))), self.scse2


class UnetDecoder(nn.Module):
    """Climbs from the coarsest map to full resolution; each block takes the encoder's map of its size as skip."""

    def __init__(self, encoder_channels, decoder_channels):
        super().__init__()
        coarse_first = list(encoder_channels)[::-1]
        inputs = [coarse_first[0], *decoder_channels[:-1]]
        self.blocks = nn.ModuleList(map(DecoderBlock, inputs[:-1], coarse_first[1:], decoder_channels[:-1]))
        self.blocks.append(LastBlock(inputs[-1], decoder_channels[-1]))

    def forward(self, features):
        coarse_first = features[::-1]
        x = coarse_first[0]
        for block, skip in zip(self.blocks[:-1], coarse_first[1:]):
            x = block(x, [skip])
        return self.blocks[-1](x)


class UnetPlusPlusDecoder(nn.Module):
    """The nested decoder: node X(i, j) at level i (stride 2**(i+1)) joins X(i+1, j-1), upsampled, with all of
    X(i, 0..j-1). X(i, 0) are the encoder's maps; the last node of each level is on the way to the output.

    Inner nodes have the channels of their level's encoder map, last nodes those of decoder_channels.
    """

    def __init__(self, encoder_channels, decoder_channels):
        super().__init__()
        self.depth = depth = len(encoder_channels)
        width = {(i, 0): channels for i, channels in enumerate(encoder_channels)}
        self.nodes = nn.ModuleDict()
        for j in range(1, depth):
            for i in range(depth - j):
                last = i + j == depth - 1
                width[i, j] = decoder_channels[j - 1] if last else encoder_channels[i]
                self.nodes[f"{i}_{j}"] = DecoderBlock(width[i + 1, j - 1], encoder_channels[i] * j, width[i, j])
        self.final = LastBlock(width[0, depth - 1], decoder_channels[-1])

    def forward(self, features):
        x = {(i, 0): feature for i, feature in enumerate(features)}
        for j in range(1, self.depth):
            for i in range(self.depth - j):
                skips = [x[i, k] for k in reversed(range(j))]  # newest first, as the reference orders them
                x[i, j] = self.nodes[f"{i}_{j}"](x[i + 1, j - 1], skips)
        return self.final(x[0, self.depth - 1])


DECODERS = {"unet": UnetDecoder, "unetpp": UnetPlusPlusDecoder}


# ---------------------------------------------------------------------------------------------------------- segmenter
class Segmenter(nn.Module):
    """Encoder, decoder and a 3x3 convolution as head: image (N, in_channels, H, W) -> logits (N, classes, H, W), H and
    W >= 16.

    Sizes that the encoder does not take are padded by repeating the border, and the logits cropped back.
    """

    def __init__(self, encoder, decoder, in_channels, head_channels, classes, depth):
        super().__init__()
        self.encoder, self.decoder, self.in_channels, self.depth = encoder, decoder, in_channels, depth
        self.head = nn.Conv2d(head_channels, classes, 3, padding=1)

    def forward(self, image):
        height, width = image.shape[-2:]
        multiple, least = self.encoder.multiple, self.encoder.minimum
        sides = [side + -side % multiple for side in (height, width)]
        x = pad(image, *([max(side, least) for side in sides] if least > multiple else sides))
        x, gate = self.decoder(self.encoder(x))
        return gated_conv(x, gate, self.head)[..., :height, :width]


def build_segmenter(arch="unet", encoder="resnet18", in_channels=1, classes=2, depth=3,
                    decoder_channels=(256, 128, 64), weights="none"):
    """A segmentation network: float (N, in_channels, H, W) -> logits (N, classes, H, W), any H and W from 16 up.

    arch: "unet" or "unetpp". encoder: any timm model that gives feature maps; where they are not
    of strides 2, 4, 8, ... they are brought to them (encoders.Pyramid).
    depth: 2 to 5, how many maps are used, coarsest stride 2**depth; stages past it are left out where timm lets them.
    decoder_channels: channels of the decoder's outputs from coarse to fine, one per depth.
    weights: "none" (random), "imagenet" (timm's pretrained ones, an error if they can't be had), "auto" (the same, but
    random ones if they can't be had within DOWNLOAD_SECONDS), or a file with the encoder's weights (timm's format).
    What was used stands in the result's attribute `weights_used`: "none", "imagenet" or the file.
    Raises InputError with one clear line for anything that cannot be built.
    """
    if arch not in DECODERS:
        raise InputError(f"arch {arch!r} is not known; choose one of {', '.join(DECODERS)}")
    if depth not in range(2, 6):
        raise InputError(f"depth {depth} is not possible; choose 2, 3, 4 or 5")
    if len(decoder_channels) != depth:
        raise InputError(f"depth {depth} needs {depth} decoder channels, got {tuple(decoder_channels)}")
    encoder, used = create_encoder(encoder, in_channels, depth, weights)
    decoder = DECODERS[arch](encoder.channels, tuple(decoder_channels))
    model = Segmenter(encoder, decoder, in_channels, decoder_channels[-1], classes, depth)
    for module in model.decoder.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    model.weights_used = used
    return model


def default_decoder_channels(depth):
    """(256, 128, 64) at the paper's depth 3; every further step down brings one narrower block at full resolution."""
    return (256, 128, 64, 32, 16)[:depth]


def for_inference(model):
    """A copy of a Segmenter or Classifier to predict with, in eval mode and without gradients: each BatchNorm behind a
    convolution is folded into it, w' = w * gamma / sigma and b' = beta - mu * gamma / sigma. In float32 the logits stay
    the same to 1e-4.

    Which convolution a BatchNorm of the encoder follows is seen in a trial run. Where folding changes what comes out
    (some networks use what lies between for something else too) the encoder keeps its BatchNorms.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    if isinstance(model, Segmenter):
        for block in model.decoder.modules():
            if isinstance(block, (DecoderBlock, LastBlock)):
                for layers in (block.conv1, block.conv2):
                    layers[0], layers[1] = fuse_conv_bn_eval(layers[0], layers[1]), nn.Identity()
        multiple, least = model.encoder.multiple, model.encoder.minimum
        model.encoder = _folded(model.encoder, model.in_channels, max(64 + -64 % multiple, least))
    elif isinstance(model, Classifier):
        model.network = _folded(model.network, 3, model.image_size)
    return model


def _folded(network, channels, size):
    """`network`, or a copy with its BatchNorms folded, where nothing else changes by that."""
    if not any(isinstance(layer, nn.BatchNorm2d) for layer in network.modules()):
        return network
    folded = copy.deepcopy(network)
    parents = {child: (parent, name) for parent in folded.modules() for name, child in parent.named_children()}
    made_by, pairs = {}, []

    def see(layer, inputs, output):
        if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None and id(inputs[0]) in made_by:
            pairs.append((*made_by[id(inputs[0])], layer))
        elif isinstance(layer, nn.Conv2d):
            made_by[id(output)] = layer, output  # the output is kept, so that its id is its own

    hooks = [layer.register_forward_hook(see, prepend=True) for layer in parents]
    image = torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(0))  # training draws its own
    image = image.to(next(network.parameters()))
    with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
        before = folded(image)
        for hook in hooks:
            hook.remove()
        for conv, _, bn in pairs:
            for layer, new in ((conv, fuse_conv_bn_eval(conv, bn)), (bn, getattr(bn, "act", nn.Identity()))):
                parent, name = parents[layer]
                setattr(parent, name, new)
        after = folded(image)
    same = all((a - b).norm() <= 0.01 * b.norm() for a, b in zip(after, before))  # a GPU may round to TF32
    return folded if same else network


# --------------------------------------------------------------------------------------------------------- classifier
class Classifier(nn.Module):
    """A timm classifier that normalises its input itself: image (N, 3, S, S), float in [0, 1] or uint8 in [0, 255]
    -> logits (N, classes).

    S is image_size; models without fixed positions also take other sizes. mean and std are those of the model's timm
    config.
    """

    def __init__(self, network, image_size):
        super().__init__()
        config = network.pretrained_cfg
        self.network, self.image_size = network, image_size
        self.register_buffer("mean", torch.tensor(config["mean"])[:, None, None])
        self.register_buffer("std", torch.tensor(config["std"])[:, None, None])

    def forward(self, image):
        image = image / 255 if image.dtype == torch.uint8 else image
        return self.network((image - self.mean) / self.std)


def interpolation(model):
    """How the pictures of a timm model are resized, from its config: "bicubic", "bilinear", ... Raises InputError."""
    check_name("model", model)
    return timm.get_pretrained_cfg(model).interpolation


def build_classifier(model, classes, image_size=384, weights="none"):
    """A classifier of RGB images (N, 3, image_size, image_size), float in [0, 1] or uint8 -> logits (N, classes).

    model: any timm classifier's name. weights: as for build_segmenter; a file holds the network as timm saves it, its
    head is replaced by a new one. `weights_used` of the result says what was used.
    Raises InputError with one clear line, also where the model cannot take images of this size.
    """
    check_name("model", model)
    if classes < 1:
        raise InputError(f"a classifier needs at least 1 class, got {classes}")
    own_size = timm.get_pretrained_cfg(model).input_size[-1]
    # transformers must know the size when they are built, CNNs do not want to be told
    sized = {} if own_size == image_size else {"img_size": image_size}

    def create(**pretrained):
        try:
            return timm.create_model(model, num_classes=classes, **sized, **pretrained)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            sized.clear()
            return timm.create_model(model, num_classes=classes, **pretrained)

    try:
        network = create()
        with torch.no_grad():
            shape = tuple(network.eval()(torch.zeros(1, 3, image_size, image_size)).shape)
        if shape != (1, classes):
            raise ValueError(f"its output has the shape {shape}")
        patch = getattr(getattr(network, "patch_embed", None), "patch_size", 1)
        patch = patch if isinstance(patch, int) else patch[0]
        if image_size % patch:
            raise ValueError(f"they are no multiple of its patches of {patch}: the rest would be left out")
    except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"model {model!r} cannot classify images of {image_size} x {image_size} ({one_line(error)}); "
                         f"its own size is {own_size}") from error
    network, used = with_weights(network.train(), create, model, weights)
    classifier = Classifier(network, image_size)
    classifier.weights_used = used
    return classifier


# ------------------------------------------------------------------------------------------------------------ load_smp
def load_smp(model, state_dict):
    """Loads the weights of segmentation_models_pytorch's Unet or UnetPlusPlus into `model` and returns it.

    The reference must have decoder_attention_type="scse", the same encoder (its "resnet18" or its "tu-" names),
    depth and channels: then both are the same function. What the reference keeps but never uses (encoder stages past
    the depth, the attention of blocks without skip) is left out. Raises InputError for weights of another network.
    """
    own, renamed = model.state_dict(), {}
    for name, tensor in state_dict.items():
        renamed[_own_name(name, model.depth)] = tensor
    missing = [name for name in own if name not in renamed]
    if missing:
        raise InputError(f"these weights are of another network: they lack {missing[0]} and {len(missing) - 1} more")
    for name, tensor in own.items():
        if renamed[name].shape != tensor.shape:
            raise InputError(f"these weights are of another network: {name} is {tuple(renamed[name].shape)} there, "
                             f"{tuple(tensor.shape)} here")
    model.load_state_dict({name: renamed[name] for name in own})
    return model


def _own_name(name, depth):
    """smp's name of a weight -> ours."""
    for theirs, ours in (("encoder.model.", "encoder."), ("segmentation_head.0.", "head."),
                         ("attention1.attention.", "scse1."), ("attention2.attention.", "scse2."),
                         ("cSE.1.", "reduce."), ("cSE.3.", "expand."), ("sSE.0.", "spatial.")):
        name = name.replace(theirs, ours)
    if name.startswith("decoder.blocks.x_"):  # U-Net++: x_{d}_{l} is node (depth - 2 - l, l - d + 1), or the last block
        _, _, node, rest = name.split(".", 3)
        d, layer = map(int, node.split("_")[1:])
        node = "final" if layer == depth - 1 else f"nodes.{depth - 2 - layer}_{layer - d + 1}"
        name = f"decoder.{node}.{rest}"
    return name
