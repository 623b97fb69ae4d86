"""How a script starts and ends: its flags, errors in one line, files that are written whole; and the processes that
torchrun starts for one training."""
import argparse
import csv
import os
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm


class InputError(ValueError):
    """What the user gave cannot be used. The message is one line that names the file or flag and says what would be
    right."""


# --------------------------------------------------------------------------------------------------------------- flags
def number(kind: type, low: float, high: float = 10 ** 9) -> Callable:
    """Return a type for argparse: an int or float from `low` to `high`."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise ValueError
        return value
    parse.__name__ = f"{kind.__name__} (from {low} to {high})"  # argparse shows it: invalid ... value
    return parse


SEED = number(int, 0, 2 ** 31)


class Parser(argparse.ArgumentParser):
    """argparse with the module's docstring in --help, in place of a list of all flags, and errors of one line."""

    def __init__(self, **settings):
        super().__init__(usage="see below", formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message):
        fail(f"{message} (see --help)")


def progress(items: Iterable, what: str, unit: str = "image", **settings) -> tqdm:
    """Return the items with a progress bar on stderr, if that is a terminal and this is the first process. settings:
    further arguments of tqdm."""
    return tqdm(items, what, unit=unit, leave=False, disable=True if rank() else None, **settings)


def note(lines: list) -> None:
    """Print the lines marked as notes, of many the first ones."""
    for line in lines[:5]:
        print(f"  NOTE: {line}")
    if len(lines) > 5:
        print(f"  NOTE: ... {len(lines) - 5} more like that")


# -------------------------------------------------------------------------------------------------------------- endings
def command(main: Callable, argv: list | None = None, less_memory: str = "take smaller images") -> None:
    """Run a script's main. What the user can mend ends in one line on stderr and exit status 2, Ctrl-C and SIGTERM in
    one line and status 130. less_memory: what to lower where memory is too small."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)  # a file's name may be no text
    try:
        main(argv)
    except InputError as error:
        fail(one_line(error))
    except OSError as error:
        fail(f"{error.filename or 'standard output'}: {error.strerror or error}")
    except KeyboardInterrupt as error:
        print(str(error) or "interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "allocate" in str(error):  # in torch's messages, on a CPU and on a GPU
            fail(f"out of memory; {less_memory} ({one_line(error, 150)})")
        if world() == 1:
            raise
        fail(f"process {rank()}: {one_line(error, 300)}")  # most often because another one ended


def fail(message):
    """End the program as every script here ends on bad input: one line on stderr, exit status 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def one_line(error: Exception, length: int = 1000) -> str:
    """Return an exception's message in one line, or its type where it has none."""
    return " ".join(str(error).split())[:length] or type(error).__name__


# ---------------------------------------------------------------------------------------------------------------- files
@contextmanager
def replacing(file: Path, mode: str = "wb", **text):
    """Open `file` to be written as a whole: the old file stays until the new one is complete and on the disk. text:
    further arguments of open."""
    temporary = file.with_name(f".{file.name}.tmp")  # what a kill leaves of it, the next one overwrites
    try:
        with open(temporary, mode, **text) as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, file)
    except OSError as error:
        raise OSError(error.errno, f"cannot be written: {error.strerror or error}", str(file)) from error
    finally:
        temporary.unlink(missing_ok=True)


def save_csv(file: Path, header: list, rows: Iterable) -> None:
    """Write a table as a whole, see replacing."""
    with replacing(file, "w", newline="", encoding="utf-8", errors="surrogateescape") as handle:
        csv.writer(handle).writerows([header, *rows])


# ---------------------------------------------------------------------------------------- several processes (torchrun)
def join(device: str) -> None:
    """Join the processes of this training, if torchrun started it; device: the value of --device. All but the first
    fall silent."""
    if not dist.is_torchelastic_launched():
        return
    if device in ("auto", "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        # torchrun gives each process one thread
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ["LOCAL_WORLD_SIZE"])))
        dist.init_process_group("gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")


def rank() -> int:
    """Return this process's number, 0 for the first."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def from_first(make: Callable):
    """Return in all processes what make() gives in the first one, which alone calls it."""
    values = [make() if rank() == 0 else None]
    if world() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def total(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over the processes, in place."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def combine(tensors: Iterable[torch.Tensor], share: float) -> None:
    """Set the tensors of floats, in all processes, to the sum over the processes of `share` times theirs."""
    tensors = [tensor for tensor in tensors if tensor.is_floating_point()]
    if world() > 1:
        whole = total(torch.cat([tensor.flatten() for tensor in tensors]) * share)  # one message for all
        for tensor, part in zip(tensors, whole.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(part.view_as(tensor))
