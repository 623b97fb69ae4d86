"""timm's encoders, and where a network's first weights come from."""
import difflib
import logging
import os
import socket
import threading
import urllib.parse
import urllib.request
from pathlib import Path

import huggingface_hub.constants as hub  # comes with timm
import timm
import torch

DOWNLOAD_SECONDS = 10  # how long weights="auto" waits for ImageNet weights
logging.getLogger("timm").setLevel(logging.ERROR)  # it warns of every weight that features_only leaves out


class ModelError(ValueError):
    """What the user asked of a model cannot be built; the message is one line, fit to be shown."""


def create_encoder(name, in_channels, depth, weights):
    """timm's feature extractor for `name`, cut behind stage `depth`, and which weights it got."""
    check_name("encoder", name)

    def create(**pretrained):
        return timm.create_model(name, features_only=True, in_chans=in_channels, out_indices=tuple(range(depth)),
                                 **pretrained)

    try:
        encoder = create()
        with torch.no_grad():  # what a map's stride is, only the map itself tells: some encoders crop their borders
            strides = [64 / feature.shape[-1] for feature in encoder.eval()(torch.zeros(1, in_channels, 64, 64))]
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"encoder {name!r} gives no {depth} feature maps ({one_line(error)})") from error
    if strides != [2 ** (i + 1) for i in range(depth)]:
        raise ModelError(f"encoder {name!r} gives maps at strides {', '.join(f'{s:.3g}' for s in strides)}; "
                         f"it must give 2, 4, 8, ..., as resnets and efficientnets do")
    encoder, used = with_weights(encoder.train(), create, name, weights)
    if hasattr(encoder, "_stage_out_idx"):  # timm's EfficientNetFeatures keeps, and runs, all stages: drop the unused
        encoder.blocks = encoder.blocks[:max(encoder._stage_out_idx)]
    return encoder, used


def check_name(what, name):
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3) or timm.list_models("resnet*")[:3]
        raise ModelError(f"{what} {name!r} is not a timm model; near it: {', '.join(near)}")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = ", ".join(timm.list_pretrained(f"{name.split('.')[0]}.*")) or "none"
        raise ModelError(f"{what} {name!r}: timm has no such weights; it has {tags}") from error


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
        raise ModelError(f"ImageNet weights for {name!r} can't be had ({reason}); use --weights none or a file")
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
        raise ModelError(f"--weights {file}: no such file; give auto, imagenet, none or a file of timm weights")
    try:
        state = timm.models.load_state_dict(os.fspath(file), weights_only=True)
        if not any(name in state for name in names):
            raise ValueError("none of its names is one of the network's")
        return create(pretrained=True, pretrained_cfg_overlay=dict(state_dict=state))
    except Exception as error:  # unpickling, safetensors and shape errors have no common kind
        raise ModelError(f"--weights {file}: not weights for this network ({one_line(error)})") from error


def one_line(error):
    return " ".join(str(error).split())[:200] or type(error).__name__
