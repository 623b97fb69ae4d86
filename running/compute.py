"""Where a model runs and in which precision."""
import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from running import process
from running.process import InputError

BF16_GAIN = 1.15  # on a CPU bfloat16 must be this much faster than float32 to be taken
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}


@dataclass
class Compute:
    """A device and a precision, a name in PRECISIONS: autocast to its type, or float32 throughout where it is off."""
    device: torch.device
    amp: str

    @property
    def amp_dtype(self) -> torch.dtype | None:
        return PRECISIONS[self.amp]

    def __str__(self):
        return f"{self.device}, amp {self.amp}"

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

    def scaler(self) -> torch.amp.GradScaler:
        """Return a GradScaler that works for float16 alone: its smallest number is 6e-8, bfloat16's is float32's."""
        return torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype == torch.float16)

    def batch(self, images: torch.Tensor) -> torch.Tensor:
        """Return images (N, C, H, W) on the device, in the layout in which convolutions are fast."""
        return images.to(self.device, non_blocking=True, memory_format=torch.channels_last)


def devices():
    """Return the names of the devices that are here, the best first."""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [name for name, there in have.items() if there]


def add_compute(add: Callable) -> None:
    """Add the flags of choose_compute to a parser; add: its add_argument."""
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="[auto]")
    add("--amp", choices=["auto", *PRECISIONS], default="auto",
        help="mixed precision; auto: on a CPU bf16 if a convolution, timed at the start, is faster in it [auto]")


def choose_compute(device: str = "auto", amp: str = "auto", keep_memory: int = 1 << 30) -> Compute:
    """Return the Compute for the flags --device and --amp.

    auto: the best device; on a GPU bfloat16, float16 on older ones; on a CPU bfloat16 where a convolution is
    faster in it than in float32 by BF16_GAIN.
    keep_memory: on a CPU, freed blocks of up to so many bytes are kept for the next step.
    Raises InputError for a device that is not there, and for float16 on a CPU.
    """
    device = devices()[0] if device == "auto" else device
    if device not in devices():
        raise InputError(f"--device {device}: there is none here; use {' or '.join(devices())}")
    if device == "cpu":
        if amp == "fp16":
            raise InputError("--amp fp16: takes a CPU many times as long as float32; use bf16, off or auto")
        if keep_memory:
            _keep_freed_memory(keep_memory)
        if amp == "auto":
            bf16_pays = process.from_first(lambda: cpu_has_bf16() and bf16_gain() >= BF16_GAIN)
            amp = "bf16" if bf16_pays else "off"
    elif amp == "auto":
        amp = "off" if device == "mps" else "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    return Compute(torch.device(device), amp)


def cpu_has_bf16():
    """Return whether the CPU claims to multiply bfloat16 in hardware. That alone does not make it faster."""
    tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, test, bool)() for test in tests)


def bf16_gain():
    """Return how many times as fast as in float32 a 3x3 convolution like the decoder's is in bfloat16, gradients
    included: median of 11 rounds, 0.1 to 0.4 s in all. No random numbers are drawn."""
    def ones(*shape):
        return torch.ones(shape).contiguous(memory_format=torch.channels_last).requires_grad_()

    image = ones(2, 64, 64, 64)
    kernel = ones(64, 64, 3, 3)

    def seconds(bf16):
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            result = F.conv2d(image, kernel, padding=1)
        torch.autograd.grad(result, (image, kernel), torch.ones_like(result))
        return time.perf_counter() - started

    return statistics.median(seconds(False) / seconds(True) for _ in range(11))


def _keep_freed_memory(largest):
    """Tell glibc to keep large freed blocks: else each step's tensors are mapped, zeroed and unmapped page by page.
    Elsewhere (macOS, Windows, musl) nothing changes."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except OSError:
        return
    mallopt(-3, largest)        # M_MMAP_THRESHOLD: blocks up to this size come from the heap
    mallopt(-1, 2 * largest - 1)  # M_TRIM_THRESHOLD: so much of the heap's free end stays
