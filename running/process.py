"""How a script starts and ends: its flags, errors in one line, interruptions, files that are written whole, and the
several processes of one training (torchrun)."""
import argparse
import errno
import os
import re
import signal
import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist
from tqdm import tqdm


class InputError(ValueError):
    """What the user gave cannot be used; the message is one line that names the file or flag and says what would be
    right."""


# --------------------------------------------------------------------------------------------------------------- flags
def number(kind, low, high=10 ** 9):
    """A type for argparse: an int or float from `low` to `high`."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise ValueError
        return value
    parse.__name__ = f"{kind.__name__} (from {low} to {high})"  # argparse shows it: invalid ... value
    return parse


SEED = number(int, 0, 2 ** 31)


class Parser(argparse.ArgumentParser):
    """argparse with defaults in --help and errors of one line. source: where the arguments are from, if not typed."""

    source = ""

    def __init__(self, **settings):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message):
        fail(f"{self.source}{message}{'' if self.source else ' (see --help)'}")


def progress(items, what, unit="image", total=None):
    """`items` with a bar on stderr while they are gone through, if that is a terminal and this the first process;
    without items a bar whose `update` tells how many more of `total` are done."""
    return tqdm(items, what, total, unit=unit, unit_scale=unit == "px", leave=False,
                disable=True if rank() or sys.stderr is None else None)


# -------------------------------------------------------------------------------------------------------------- endings
_asked_to_end = None  # the exception of the signal that came


class Terminated(KeyboardInterrupt):
    """SIGTERM, taken as Ctrl-C is."""


def heed_signals():
    """Raises what SIGTERM or Ctrl-C has raised already, for it may have come where Python ignores exceptions, as while
    it forks or removes an object."""
    if _asked_to_end:
        raise _asked_to_end


def command(main, argv=None, memory="take smaller images, or --amp bf16"):
    """Runs a script's main. What one can mend (InputError, OSError, too little memory: `memory` says what to lower)
    ends by fail, an interruption with the line that it carries and the status that shells know; without traceback."""
    def end(number, _):
        global _asked_to_end
        _asked_to_end = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        raise _asked_to_end
    global _store, _asked_to_end
    _asked_to_end = None
    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)
              if signal.getsignal(number) != signal.SIG_IGN}  # as nohup and shells' background jobs have it
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no text
    try:
        try:
            if dist.is_torchelastic_launched():
                _store, _, _ = next(dist.rendezvous("env://"))
            main(argv)
            if dist.is_initialized():
                dist.destroy_process_group()
        except BaseException:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is ending; torchrun may ask for that at this very time
            raise
    except InputError as error:
        fail(one_line(error))
    except (MemoryError, OSError, RuntimeError) as error:
        if is_out_of_memory(error):
            fail(f"out of memory; {memory} ({one_line(error, 150)})")
        if isinstance(error, OSError):
            fail(f"{error.filename or 'standard output'}: {error.strerror or error}")
        if "Symlink loop" in str(error):
            fail(one_line(error))
        lost = isinstance(error, dist.DistError) or re.search("onnection|Broken pipe|gloo|NCCL", str(error))
        if _store is None or not (lost or _others_spoke()):
            raise
        fail("another process of this training ended; if it said nothing it was killed, perhaps for memory")
    except KeyboardInterrupt as error:
        _last_words(one_line(error) if str(error) else "interrupted", 143 if isinstance(error, Terminated) else 130)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        while _held:
            _held.pop().close()


def fail(message):
    """Ends the program as every script here ends on bad input: one line on stderr, exit status 2."""
    _last_words(f"error: {message}", 2)


def one_line(error, length=1000):
    return " ".join(str(error).split())[:length] or type(error).__name__


def is_out_of_memory(error):
    """Whether an exception says that the device or the machine has too little memory, or allows no more processes."""
    said = "out of memory|annot allocate memory|can't allocate memory|not enough memory|could not create a memory|" \
           "bad_alloc|ALLOC_FAILED|can't start new thread"
    return (isinstance(error, (MemoryError, torch.OutOfMemoryError)) or bool(re.search(said, str(error)))
            or isinstance(error, OSError) and error.errno in (errno.ENOMEM, errno.EAGAIN))


def _others_spoke(own=0):
    """Whether another process has had its last words; own: 1 to have them oneself."""
    try:
        return _store.add("last words", own) > own
    except RuntimeError:  # torchrun, which keeps the store, is ending too
        return rank() > 0


def _last_words(message, status):
    """Of several processes that end, the first alone speaks: the others end because it did, or for the same reason."""
    if _store is None or not _others_spoke(own=1):
        print(message, file=sys.stderr, flush=True)
    if _store is not None:
        os._exit(status)  # an orderly exit would wait for the others
    raise SystemExit(status)


# ---------------------------------------------------------------------------------------------------------------- files
@contextmanager
def replacing(file, mode="wb", **how):
    """A handle to write `file` by. The old file stays until the new one is whole and on the disk: a crash, a kill or a
    full disk leaves the old one."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")  # its own: folds of a run may be trained side by side
    if "b" not in mode:
        how = {"encoding": "utf-8", "errors": "surrogateescape", **how}
    try:
        with open(temporary, mode, **how) as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, file)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, f"cannot be written: {error.strerror or error}", str(file)) from error
        raise


_held = []  # open files, whose locks end with them


def hold(folder):
    """Whether this process alone may write into a folder until it, or `command`, ends; True too where files cannot be
    locked."""
    try:
        import fcntl  # not on Windows
        _held.append(open(folder / ".lock", "w"))
        fcntl.lockf(_held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which loader processes would share
    except (ImportError, OSError) as error:
        return not isinstance(error, (BlockingIOError, PermissionError))
    return True


# ---------------------------------------------------------------------------------------- several processes (torchrun)
_store = None  # what the processes share beside their tensors


def join(device):
    """Joins the processes of this training, if torchrun started several; device: "cpu", "cuda" or "mps". All but the
    first fall silent."""
    if _store is None:
        return
    own, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    beside = int(os.environ["LOCAL_WORLD_SIZE"])
    if device == "mps":
        fail("--device mps: torchrun's processes can share a batch on a CPU or on several CUDA GPUs; give --device cpu")
    if device == "cuda":
        if beside > torch.cuda.device_count():
            fail(f"--nproc-per-node {beside}: there are {torch.cuda.device_count()} GPUs here; take at most as many")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:  # torchrun gives each process one thread
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // beside))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", store=_store, rank=own,
                            world_size=count)
    if own:
        sys.stdout = open(os.devnull, "w")


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def from_first(make, *arguments):
    """What make(*arguments) gives in the first process, in all of them; in the others it is not called."""
    values = [make(*arguments) if rank() == 0 else None]
    if world() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def gather(value):
    """The processes' values, in each of them, in their order."""
    values = [value]
    if world() > 1:
        values *= world()
        dist.all_gather_object(values, value)
    return values


def total(tensor):
    """The sum of the processes' tensors."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def combine(tensors, share):
    """Sets the tensors, in all processes, to the sum over the processes of `share` times theirs."""
    if world() > 1 and tensors:
        whole = total(torch.cat([tensor.flatten() for tensor in tensors]) * share)  # one message for all
        for tensor, part in zip(tensors, whole.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(part.view_as(tensor))
