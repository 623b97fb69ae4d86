import pickle

import huggingface_hub.constants
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from conftest import ROOT, randomise_batchnorm
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import models
from networks import encoders, fast
from running.process import InputError

PAPER_ENCODERS = ["resnet18", "resnet34", "resnet50", "resnet101"] + [f"efficientnet_b{i}" for i in range(8)]
SMALLER = PAPER_ENCODERS[:-4] + [pytest.param(name, marks=pytest.mark.slow) for name in PAPER_ENCODERS[-4:]]


def reference(arch, encoder, depth=3, in_channels=1):
    torch.manual_seed(0)
    model = {"unet": smp.Unet, "unetpp": smp.UnetPlusPlus}[arch](
        encoder, encoder_weights=None, encoder_depth=depth, decoder_channels=models.default_decoder_channels(depth),
        decoder_attention_type="scse", in_channels=in_channels, classes=2)
    randomise_batchnorm(model)
    return model.eval()


@pytest.mark.parametrize("arch", ["unet", "unetpp"])
@pytest.mark.parametrize("encoder, depth", [
    ("resnet18", 3), ("resnet50", 3), ("tu-efficientnet_b3", 3), ("resnet18", 4), ("resnet18", 5), ("resnet18", 2)])
def test_logits_equal_the_reference(arch, encoder, depth):
    theirs = reference(arch, encoder, depth)
    ours = models.build_segmenter(arch, encoder.removeprefix("tu-"), depth=depth,
                                  decoder_channels=models.default_decoder_channels(depth))
    assert models.load_smp(ours, theirs.state_dict()) is ours
    image = torch.randn(2, 1, 64, 96)
    with torch.no_grad():
        expected, logits = theirs(image), ours.eval()(image)
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_load_smp_refuses_other_networks():
    weights = reference("unet", "resnet18").state_dict()
    for other in (models.build_segmenter("unetpp"), models.build_segmenter(encoder="resnet34"),
                  models.build_segmenter(in_channels=3)):
        with pytest.raises((KeyError, RuntimeError)):
            models.load_smp(other, weights)


@pytest.mark.parametrize("arch", ["unet", "unetpp"])
@pytest.mark.parametrize("size", [(16, 16), (17, 31), (33, 16), (50, 64)])
def test_any_size_goes_in_and_comes_out(arch, size):
    model = models.build_segmenter(arch, in_channels=3, classes=4).eval()
    image = torch.randn(2, 3, *size)
    padded = nn.functional.pad(image, (0, -size[1] % 8, 0, -size[0] % 8), mode="replicate")
    with torch.no_grad():
        logits = model(image)
        torch.testing.assert_close(logits, model(padded)[..., :size[0], :size[1]])
    assert logits.shape == (2, 4, *size)


def test_only_the_stages_that_are_needed_are_kept():
    count = sum(p.numel() for p in models.build_segmenter().parameters())
    assert count < 3_000_000
    for encoder in ("resnet18", "efficientnet_b0"):
        model = models.build_segmenter(encoder=encoder)
        model(torch.randn(2, 1, 32, 32)).sum().backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []  # none is there for nothing


@pytest.mark.parametrize("encoder", SMALLER)
def test_all_encoders_of_the_paper_train(encoder):
    for arch in ("unet", "unetpp"):
        model = models.build_segmenter(arch, encoder)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        before = model.encoder.state_dict()[next(iter(model.encoder.state_dict()))].clone()
        loss = nn.functional.cross_entropy(model(torch.randn(2, 1, 32, 32)), torch.randint(0, 2, (2, 32, 32)))
        loss.backward()
        optimizer.step()
        after = model.encoder.state_dict()[next(iter(model.encoder.state_dict()))]
        assert loss.isfinite() and after.isfinite().all() and not torch.equal(before, after)


@pytest.mark.parametrize("encoder", SMALLER)
def test_for_inference_folds_and_changes_nothing(encoder):
    for arch in ("unet", "unetpp"):
        model = models.build_segmenter(arch, encoder)
        randomise_batchnorm(model)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        image = torch.rand(2, 1, 50, 64)
        quick = fast.for_inference(model)
        with torch.no_grad():
            expected, logits = model.eval()(image), quick(image)
        assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert not any(isinstance(layer, nn.BatchNorm2d) for layer in quick.modules()) and not quick.training
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# strides from 4; (N, H, W, C); all 16; all 14; one size of input only; and strides from 1; multiples of a window;
# three colours only and strides from 8; convolutions without padding
OTHER_ENCODERS = ["test_convnext", "test_mambaout", "test_vit", "test_vit2", "levit_128s",
                  *(pytest.param(name, marks=pytest.mark.slow)
                    for name in ("dla46x_c", "test_maxvit", "csatv2", "inception_v3"))]


@pytest.fixture
def patches_of_14(monkeypatch):
    """timm's test_vit2 gets patches of 14 pixels, as larger ones of its transformers have."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **settings: create(
        name, **settings, **({"patch_size": 14} if name == "test_vit2" else {})))


@pytest.mark.parametrize("encoder", OTHER_ENCODERS)
def test_encoders_of_all_kinds(encoder, patches_of_14):
    torch.manual_seed(0)
    depth, channels = {"test_mambaout": (2, 1), "test_convnext": (5, 5), "test_vit": (4, 3)}.get(encoder, (3, 1))
    model = models.build_segmenter(["unetpp", "unet"][depth % 2], encoder, channels, depth=depth,
                                   decoder_channels=(32, 16, 8, 8, 8)[:depth])
    side = model.encoder.multiple
    shapes = [tuple(level.shape) for level in model.encoder(torch.rand(2, channels, side, 2 * side))]
    assert shapes == [(2, c, side >> i + 1, side >> i) for i, c in enumerate(model.encoder.channels)]

    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.rand(2, channels, 64, 64))
    logits.float().square().mean().backward()
    for part in (model.encoder, model.decoder):
        gradients = [p.grad for p in part.parameters() if p.grad is not None]
        assert gradients and all(g.isfinite().all() for g in gradients) and any(g.any() for g in gradients)

    randomise_batchnorm(model)
    quick = fast.for_inference(model)
    with torch.no_grad():
        for size in ((16, 16), (33, 50)):
            image = torch.rand(1, channels, *size)
            logits = model.eval()(image)
            assert logits.shape == (1, 2, *size) and logits.isfinite().all()
            assert (quick(image) - logits).abs().max() <= 1e-4 * logits.abs().max()


@pytest.mark.parametrize("encoder", ["test_convnext", "test_vit2", "levit_128s", "inception_v3"])
def test_maps_are_where_the_image_is(encoder, patches_of_14):
    """What a square in the image changes lies around it in the maps: its centre of mass is where the square is."""
    torch.manual_seed(0)
    model = models.build_segmenter(encoder=encoder, depth=3, decoder_channels=(8, 8, 8)).eval()
    side = 256 + -256 % model.encoder.multiple
    plain = torch.zeros(1, 1, side, side)
    for top, left in ((32, 160), (160, 64)):
        image = plain.clone()
        image[..., top:top + 32, left:left + 32] = 1
        with torch.no_grad():
            for level, other in zip(model.encoder(image), model.encoder(plain)):
                change = (level - other).square().sum((0, 1))
                cells = (torch.arange(len(change)) + 0.5) * side / len(change)
                for axis, start in ((1, top), (0, left)):
                    centre = (change.sum(axis) * cells).sum() / change.sum()
                    assert abs(centre - start - 16) < 24, (tuple(level.shape), centre, start + 16)


def test_a_network_that_takes_larger_multiples_stays_timms_own():
    model = models.build_segmenter(encoder="hrnet_w18_small", depth=3).eval()
    assert type(model.encoder).__module__.startswith("timm.") and model.encoder.multiple == 32
    with torch.no_grad():
        assert model(torch.rand(1, 1, 40, 72)).shape == (1, 2, 40, 72)


@pytest.mark.parametrize("encoder, depth, side", [("levit_128s", 3, 224), ("crossvit_tiny_240", 5, 224)])
def test_windows_are_put_together_again(encoder, depth, side):
    """A network of one size sees the image in windows of that size, or resized to it where 2**depth does not divide it.
    CrossViT takes any size, but only because it resizes the image itself."""
    network = encoders.create_encoder(encoder, 1, depth, "none")[0].eval()
    assert network.multiple == side
    image = torch.rand(2, 1, side, 2 * side)
    with torch.no_grad():
        whole, part = network(image), network(image[..., side:])
    assert [tuple(level.shape[2:]) for level in whole] == [(side >> i, 2 * side >> i) for i in range(1, depth + 1)]
    for level, other in zip(whole, part):
        torch.testing.assert_close(level[..., other.shape[3]:], other)


def test_encoder_of_no_maps(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("features_only not implemented")
    monkeypatch.setattr(timm, "create_model", fails)
    with pytest.raises(InputError, match="'resnet18' gives no feature maps .features_only not implemented"):
        models.build_segmenter()


@pytest.mark.parametrize("encoder", ["resnet18", "test_convnext"])
def test_finding_out_about_an_encoder_uses_up_no_random_numbers(encoder):
    torch.manual_seed(0)
    expected = timm.create_model(encoder, features_only=True, out_indices=(0, 1, 2))
    torch.manual_seed(0)
    network = models.build_segmenter(encoder=encoder, in_channels=3).encoder
    network = getattr(network, "network", network)
    first = next(iter(expected.state_dict()))
    torch.testing.assert_close(network.state_dict()[first], expected.state_dict()[first])


class UsedTwice(nn.Module):
    """An encoder in which what goes into a BatchNorm is used beside it too: folding would change it."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.conv, self.bn = encoder, nn.Conv2d(1, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64)
        self.multiple = encoder.multiple

    def forward(self, image):
        x = self.conv(image)
        first, *others = self.encoder(image)
        return [first + x + self.bn(x), *others]


def test_for_inference_keeps_batchnorms_that_cannot_be_folded():
    model = models.build_segmenter()
    model.encoder = UsedTwice(model.encoder)
    randomise_batchnorm(model)
    image, quick = torch.rand(1, 1, 32, 32), fast.for_inference(model)
    with torch.no_grad():
        torch.testing.assert_close(quick(image), model.eval()(image), rtol=1e-4, atol=1e-4)
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in quick.encoder.modules())


def test_for_inference_of_classifiers():
    for name in ("resnet18", "efficientnet_b0", "vit_tiny_patch16_224"):
        model = models.build_classifier(name, 3, 64)
        randomise_batchnorm(model)
        image, quick = torch.rand(2, 3, 64, 64), fast.for_inference(model)
        with torch.no_grad():
            expected, logits = model.eval()(image), quick(image)
        assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert not any(isinstance(layer, nn.BatchNorm2d) for layer in quick.modules())


@pytest.mark.parametrize("encoder", ["resnet18", *(pytest.param(name, marks=pytest.mark.slow)
                                                   for name in PAPER_ENCODERS[1:])])
@pytest.mark.parametrize("arch", ["unet", "unetpp"])
def test_compiles_as_one_graph_and_once(arch, encoder):
    torch._dynamo.reset()
    graphs, model = CompileCounterWithBackend("aot_eager"), models.build_segmenter(arch, encoder)
    image = torch.randn(2, 1, 64, 64)
    eager = model(image)
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for _ in range(3):
        model.zero_grad()
        logits = compiled(image)
        logits.square().sum().backward()
    assert graphs.frame_count == 1
    assert (logits - eager).abs().max() <= 1e-4 * eager.abs().max()
    assert all(p.grad is not None for p in model.parameters())


def test_weights_from_a_file(tmp_path):
    for encoder in ("resnet18", "efficientnet_b0"):
        whole = timm.create_model(encoder)
        torch.save(whole.state_dict(), tmp_path / "weights.pth")
        model = models.build_segmenter(encoder=encoder, weights=tmp_path / "weights.pth")
        theirs, ours = whole.state_dict(), model.encoder.state_dict()
        stem = next(iter(ours))
        torch.testing.assert_close(ours[stem], theirs[stem].sum(1, keepdim=True))  # three colours become one grey
        assert all(torch.equal(ours[name], theirs[name]) for name in ours if name != stem)
        assert model.weights_used == str(tmp_path / "weights.pth")


@pytest.mark.parametrize("encoder", ["test_vit", "test_convnext"])
def test_weights_from_a_file_for_wrapped_encoders(encoder, tmp_path):
    whole = timm.create_model(encoder).state_dict()
    torch.save(whole, tmp_path / "weights.pth")
    model = models.build_segmenter(encoder=encoder, in_channels=3, weights=tmp_path / "weights.pth")
    values = {tuple(t.shape): [] for t in whole.values()}
    for tensor in whole.values():
        values[tuple(tensor.shape)].append(tensor)
    for name, tensor in model.encoder.network.named_parameters():  # timm's extractors have names of their own
        assert any(torch.equal(tensor, other) for other in values[tuple(tensor.shape)]), name
    torch.save({"a.weight": torch.zeros(3)}, tmp_path / "weights.pth")
    with pytest.raises(InputError, match="no weights for this network"):
        models.build_segmenter(encoder=encoder, weights=tmp_path / "weights.pth")


class Bomb:
    def __reduce__(self):
        return (print, ("the code in the file ran",))


def test_files_that_are_not_weights_are_refused(tmp_path, capfd):
    torch.save(timm.create_model("resnet34").state_dict(), tmp_path / "other.pth")
    torch.save({"something": torch.zeros(3)}, tmp_path / "unrelated.pth")
    (tmp_path / "code.pth").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "short.pth").write_bytes((tmp_path / "other.pth").read_bytes()[:5000])
    for name in ("missing.pth", "unrelated.pth", "code.pth", "short.pth"):
        with pytest.raises(InputError, match=name):
            models.build_segmenter(weights=tmp_path / name)
    with pytest.raises(InputError, match="other.pth"):
        models.build_segmenter(encoder="resnet50", weights=tmp_path / "other.pth")
    assert "the code in the file ran" not in capfd.readouterr().out


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """Neither the hub nor a cache has weights."""
    def fails():
        raise ConnectionError
    monkeypatch.setattr(encoders, "get_session", fails)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # set by the code; put back after the test
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))


def test_without_network_auto_warns_and_imagenet_fails(no_network, capsys):
    model = models.build_segmenter(weights="auto")
    assert "WARNING" in capsys.readouterr().out and model.weights_used == "none"
    with pytest.raises(InputError, match="ImageNet weights"):
        models.build_segmenter(weights="imagenet")


@pytest.mark.parametrize("wrong, said", [
    ({"arch": "segnet"}, "unet, unetpp"), ({"encoder": "resnet81"}, "near it: resnet18"),
    ({"depth": 4}, "as many channels"), ({"depth": 1, "decoder_channels": (64,)}, "depth 1"),
    ({"depth": 6, "decoder_channels": (64,) * 6}, "depth 6")])
def test_what_cannot_be_built_is_said(wrong, said):
    with pytest.raises(InputError, match=said):
        models.build_segmenter(**wrong)


# --------------------------------------------------------------------------------------------------------- classifiers
# the paper's 29, under timm's names; a few of each family run by default
QUICK = ["resnet18", "resnet50", "efficientnet_b0", "efficientnet_b3", "dm_nfnet_f0", "convnext_tiny",
         "vit_base_patch16_384", "vit_base_patch32_384", "swin_base_patch4_window12_384", "coatnet_0_rw_224"]
SLOW = ["resnet34", "resnet101", "efficientnet_b1", "efficientnet_b2", "efficientnet_b4", "efficientnet_b5",
        "efficientnet_b6", "efficientnet_b7", "dm_nfnet_f1", "dm_nfnet_f2", "dm_nfnet_f3", "dm_nfnet_f4", "dm_nfnet_f5",
        "dm_nfnet_f6", "convnext_small", "convnext_base", "swin_large_patch4_window12_384", "vit_large_patch16_384",
        "vit_large_patch32_384"]
PAPER_MODELS = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def test_the_manual_names_the_models_of_the_paper():
    manual = (ROOT / "docs" / "manual.md").read_text()
    assert len(set(QUICK + SLOW)) == 29 and all(f"`{name}`" in manual for name in QUICK + SLOW)


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_all_models_of_the_paper_train(name):
    model = models.build_classifier(name, 5, image_size=64)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    first = next(model.parameters()).detach().clone()
    logits = model(torch.rand(2, 3, 64, 64))
    loss = nn.functional.binary_cross_entropy_with_logits(logits, torch.ones(2, 5))
    loss.backward()
    optimizer.step()
    assert logits.shape == (2, 5) and loss.isfinite() and next(model.parameters()).isfinite().all()
    assert not torch.equal(first, next(model.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "vit_base_patch32_384", "swin_base_patch4_window12_384"])
def test_models_at_the_size_of_the_paper(name):
    assert models.build_classifier(name, 5)(torch.rand(2, 3, 384, 384)).shape == (2, 5)


def test_a_classifier_normalises_as_its_timm_config_says():
    model = models.build_classifier("vit_base_patch32_384", 3, image_size=32).eval()
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        expected = model.network((image / 255 - 0.5) / 0.5)
        torch.testing.assert_close(model(image), expected)
        torch.testing.assert_close(model(image / 255), expected)
    assert encoders.interpolation("resnet18", "short") == "bicubic"
    assert encoders.interpolation("test_resnet", "short") == "bilinear"


def test_classifier_weights_from_a_file(tmp_path):
    for name, size in (("resnet18", 64), ("vit_tiny_patch16_224", 96)):
        whole = timm.create_model(name)
        torch.save(whole.state_dict(), tmp_path / "weights.pth")
        model = models.build_classifier(name, 5, size, weights=tmp_path / "weights.pth")
        theirs, ours = whole.state_dict(), model.network.state_dict()
        resized = {"pos_embed"}  # a transformer's positions are interpolated to another image size
        same = [key for key in ours if key not in resized and not key.startswith(("fc.", "head."))]
        assert len(same) > 50 and all(torch.equal(ours[key], theirs[key]) for key in same)
        assert model(torch.rand(1, 3, size, size)).shape == (1, 5)
        assert model.weights_used == str(tmp_path / "weights.pth")
    with pytest.raises(InputError, match="no weights for this network"):
        models.build_classifier("resnet18", 5, 64, weights=tmp_path / "weights.pth")


@pytest.mark.parametrize("wrong, said", [
    (("resnet81", 5), "model 'resnet81' is not a timm model; near it: resnet18"),
    (("coatnet_0_rw_224", 5, 100), "cannot classify images of 100 x 100"),
    (("vit_base_patch16_384", 5, 10), "its own size is 384")])
def test_classifiers_that_cannot_be_built(wrong, said):
    with pytest.raises(InputError, match=said):
        models.build_classifier(*wrong)


def test_classifiers_without_network(no_network, capsys):
    assert models.build_classifier("resnet18", 2, 64, "auto").weights_used == "none"
    assert "WARNING" in capsys.readouterr().out
    with pytest.raises(InputError, match="ImageNet weights"):
        models.build_classifier("resnet18", 2, 64, "imagenet")
