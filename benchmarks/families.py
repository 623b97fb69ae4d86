"""Which of timm's encoders train: one small model of each of timm's families (some of two kinds), forward and backward.

    python benchmarks/families.py                         a table, and how many of them work
    python benchmarks/families.py vit_tiny_patch16_224    these models only

Beside it, whether segmentation_models_pytorch's network with the same encoder ("tu-...") does, where it is installed.
"""
import gc
import importlib.util
import statistics

import harness
import timm
import torch

import models
from networks.encoders import Pyramid, Windows
from running.process import one_line

ENCODERS = """
beit_base_patch16_224 halonet_h1 test_byobnet cait_xxs24_224 coat_tiny convit_tiny convmixer_1024_20_ks9_p14
test_convnext cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny deepseek_vit_412m
deit_tiny_patch16_224 densenet121 dla46x_c dpn68 edgenext_xx_small efficientformer_l1 efficientformerv2_s0
efficientnet_b0 efficientvim_m1 efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224 fasternet_t0 fastvit_s12
focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m ghostnet_050 hardcorenas_b hgnetv2_b0 hiera_tiny_224 sam2_hiera_tiny
hrnet_w18_small iformer_s inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_128s
levit_conv_128s lowformer_b0 test_mambaout test_coatnet test_maxvit poolformerv2_s12 gmlp_ti16_224 mixer_s32_224
mobilenetv3_small_050 mobilenetv5_base mobilevit_xxs mvitv2_tiny naflexvit_base_patch16_siglip nasnetalarge nest_tiny
nextvit_small test_nfnet pit_ti_224 pit_b_224 pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002
repghostnet_050 repvit_m0_9 res2net50_14w_8s resnest14d resnet18 test_resnet resnetv2_18 rexnet_100 selecsls42
legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224
swinv2_tiny_window16_256 swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11
visformer_tiny test_vit vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 test_vit_relpos samvit_base_patch16_224
vitamin_small_224 volo_d1_224 ese_vovnet19b_slim_dw legacy_xception xception41p xcit_nano_12_p8_224
""".split()


def main(argv=None):
    parser = harness.parser(__doc__, batch=2, tile=64, rounds=1)
    parser.add_argument("encoders", nargs="*", metavar="NAME", help="timm models [one of each family]")
    parser.add_argument("--arch", choices=list(models.DECODERS), default="unet", help="[unet]")
    args = parser.parse_args(argv)
    compute = harness.start(args)
    names = args.encoders or ENCODERS
    worked = {"ours": 0, "reference": 0} if importlib.util.find_spec("segmentation_models_pytorch") else {"ours": 0}
    print(f"{args.arch}, depth {args.depth}, batch {args.batch} at {args.tile} x {args.tile}, {args.rounds} rounds\n")
    harness.table(["encoder", "family", "timm's strides", "brought to a pyramid", "training step", *worked],
                  (row(name, args, compute, worked) for name in names))
    print(f"Of {len(names)} encoders work: " + ", ".join(f"{count} ({side})" for side, count in worked.items()))
    if not args.encoders:
        other_families(names)


def row(name, args, compute, worked):
    """A row of the table; adds to {side: how many work}."""
    found, said = ["", "", "", ""], []
    for side in worked:
        gc.collect()
        try:
            if side == "ours":
                model = harness.our_network(args.arch, name, args.depth, compute)
                found[:3] = family(name), ", ".join(map(str, strides(model.encoder))), how(model.encoder)
                found[3] = f"{step_time(model, args, compute) * 1000:.0f} ms"
            else:
                step_time(harness.reference(args.arch, name, args.depth), args, compute)
            said.append("ok")
            worked[side] += 1
        except Exception as error:  # whatever it is, it is what the table is to show
            said.append(one_line(error)[:60].replace("|", "/"))
    return [f"`{name}`", *found, *said]


def step_time(model, args, compute):
    """Seconds of a training step; raises if it fails."""
    model, batch = model.to(compute.device, memory_format=torch.channels_last).train(), harness.batch(args, compute)
    seconds = harness.in_turn({"": lambda: harness.training_step(model, *batch, compute)}, args.rounds,
                              compute.device, warmup=1)[""]
    if not all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None):
        raise ValueError("gradients are not finite")
    return statistics.median(seconds)


def family(name):
    return timm.models.model_entrypoint(name).__module__.split(".")[-1]


def strides(encoder):
    pyramid = getattr(encoder, "pyramid", encoder)
    network = getattr(pyramid, "network", pyramid)
    return sorted({info["reduction"] for info in network.feature_info.info})


def how(encoder):
    if isinstance(encoder, Windows):
        return f"windows of {encoder.size}"
    if isinstance(encoder, Pyramid):
        return f"resized, multiples of {encoder.multiple}"
    return "as it is"


def other_families(names):
    """Prints what timm says of the families that are not in the list."""
    families = {}
    for name in timm.list_models():
        families.setdefault(family(name), []).append(name)
    print(f"timm {timm.__version__} has {len(families)} families, {len({family(name) for name in names})} are above")
    for other in sorted(set(families) - {family(name) for name in names}):
        try:
            with torch.device("meta"):
                timm.create_model(families[other][0], features_only=True)
            print(f"- {other}: gives features, but is not in the list: {', '.join(families[other][:5])}")
        except Exception as error:
            print(f"- {other}: gives no features ({one_line(error)})")


if __name__ == "__main__":
    harness.process.command(main)
