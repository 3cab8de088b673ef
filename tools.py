"""Tools of a run: counters, averages, checkpoints, seeds, signals, devices; and the names of `logger.py`, handed on.

python tools.py logdir/latest.pt      # what is in a checkpoint
"""

import contextlib
import ctypes
import errno
import fcntl
import io
import logging
import math
import os
import pickle
import random
import resource
import signal
import sys
import threading
import time
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from episodes import sample_episodes
from errors import UserError
from files import machine_failed
from logger import Film, Logger, Progress, atomic_write, disk_errors, format_duration, human, save_mp4, setup_logging
from replay import Replay

__all__ = [
    "Every",
    "Film",
    "Logger",
    "Metrics",
    "Overdue",
    "Progress",
    "Replay",
    "Shutdown",
    "UserError",
    "allow_many_files",
    "atomic_write",
    "describe_checkpoint",
    "enable_deterministic_run",
    "end_with_parent",
    "format_duration",
    "human",
    "load_checkpoint",
    "lock_folder",
    "out_of_memory_help",
    "parameter_table",
    "pick_device",
    "sample_episodes",
    "save_checkpoint",
    "save_mp4",
    "seed_everything",
    "set_threads",
    "setup_logging",
]

log = logging.getLogger(__name__)


# Counters (on frames, or whatever is counted)


class Every:
    """True when a multiple of `interval` was reached or passed since the last call; once, however many were passed.

    interval 0: never. start: where the run starts or resumes; nothing else has to be saved.
    """

    def __init__(self, interval: float, start: float = 0):
        if interval < 0:
            raise ValueError(f"Found interval {interval}, expected 0 (never) or more.")
        self.interval = interval
        self._passed = start // interval if interval else 0

    def __call__(self, step: float) -> bool:
        if not self.interval or step // self.interval <= self._passed:
            return False
        self._passed = step // self.interval
        return True


# Averages


class Metrics:
    """Averages of numbers between two log lines, kept on their device; reading them is the only synchronisation.

        metrics.add(losses)           # dict of 0-d tensors; any names at any time
        logger.scalars(metrics.result())

    Each name is averaged over the times it was given with a finite value. Where some were not finite, an entry
    `<name>_nonfinite` says how many; if none was finite, the average is NaN.
    """

    def __init__(self):
        self._groups: dict[tuple, list[torch.Tensor]] = {}  # (device, names) -> [sum, finite, given] of each name

    def add(self, values: Mapping[str, torch.Tensor | float]) -> None:
        """A few kernels for the whole dictionary, no synchronisation; the tensors may be overwritten afterwards."""
        by_device = defaultdict(dict)
        for name, value in values.items():
            value = torch.as_tensor(value).detach()
            if value.ndim:
                raise ValueError(f"Metric {name}: found shape {list(value.shape)}, expected []; average it.")
            by_device[value.device][name] = value if value.dtype == torch.float32 else value.float()
        for device, named in by_device.items():
            vector = torch.stack(list(named.values())).double()  # long sums of float32 would lose digits
            finite = vector.isfinite()
            terms = torch.stack([vector.where(finite, 0), finite.double(), torch.ones_like(vector)])
            key = (device, *named)
            if key in self._groups:
                self._groups[key] += terms
            else:
                self._groups[key] = terms

    def result(self) -> dict[str, float]:
        """The averages since the last call, in the order the names first came; one transfer per device."""
        totals = defaultdict(lambda: np.zeros(3))
        groups, self._groups = self._groups, {}
        for device in dict.fromkeys(key[0] for key in groups):
            here = [(key[1:], sums) for key, sums in groups.items() if key[0] == device]
            names = [name for key, _ in here for name in key]
            for name, terms in zip(names, torch.cat([sums for _, sums in here], 1).T.cpu().numpy(), strict=True):
                totals[name] += terms
        result = {}
        for name, (total, finite, given) in totals.items():
            result[name] = float(total / finite) if finite else math.nan
            if finite < given:
                result[f"{name}_nonfinite"] = float(given - finite)
        return result

    def state(self) -> list[dict]:
        """The sums so far, for a checkpoint."""
        return [{"names": list(key[1:]), "sums": sums.cpu().clone()} for key, sums in self._groups.items()]

    def load_state(self, state: list[dict], device: torch.device | str) -> None:
        """Go on from `state()`, with values that will come from `device`."""
        device = torch.device(device)
        self._groups = {(device, *group["names"]): group["sums"].to(device) for group in state}


# Checkpoints


_PLAIN = (str, int, float, bool, type(None), bytes)  # exactly: numpy's float64 is a float, but is pickled as an object


def _leaves(value, path: str = "") -> Iterator[tuple[str, object]]:
    """Everything in nested dictionaries, lists and tuples that is none of them, each with its path `a/b/0`."""
    if type(value) in (dict, OrderedDict):
        pairs = value.items()
    elif type(value) in (list, tuple):
        pairs = enumerate(value)
    else:
        yield path, value
        return
    for key, inner in pairs:
        yield from _leaves(inner, f"{path}/{key}" if path else str(key))


def save_checkpoint(path: str | Path, content: dict, keep: str = "") -> None:
    """Writes nested dictionaries, lists and tuples of tensors and plain values, so that `path` is always a whole file.

    keep: the name beside it that an earlier file goes on under.

    Raises TypeError for what `load_checkpoint` could not read back (found now, not at the resume), and UserError where
    it cannot be written (a full disk); the earlier file is intact then.
    """
    storages = {}
    for key, leaf in _leaves(content):
        if isinstance(leaf, torch.Tensor):
            storage = leaf.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif type(leaf) not in _PLAIN:
            raise TypeError(f"Checkpoint entry {key} is a {type(leaf).__name__}, expected a tensor or a plain value.")
    with atomic_write(path, sum(storages.values()), keep) as file:
        watched = _Watched(file)
        try:
            torch.save(content, watched)
        except RuntimeError as error:
            raise watched.error or error from None  # torch hides the reason behind an error of its own


class Damaged(UserError):
    """A checkpoint whose bytes are wrong."""


class _Watched:
    """A file that remembers the error of a write."""

    def __init__(self, file):
        self._file, self.error = file, None
        self.flush = file.flush

    def write(self, data) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise


def load_checkpoint(path: str | Path, map_location="cpu") -> dict:
    """What `save_checkpoint` wrote. Raises UserError where the file is missing or cannot be read, Damaged where it is
    damaged, or not such a file.

    Nothing in the file is run (weights_only), and its checksums are compared, which torch alone does not do.
    """
    path = Path(path)
    advice = "Give another file with --checkpoint, or move this one away to start without it."
    if not path.is_file():
        beside = sorted(file.name for file in path.parent.glob("*.pt")) if path.parent.is_dir() else []
        raise UserError(
            f"{path}: found no such checkpoint, expected a file that a run has saved. "
            + (f"Beside it: {', '.join(beside)}." if beside else "Check the path.")
        )
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        content = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise Damaged(
            f"{path}: holds other things than tensors and plain values, which are not loaded because "
            f"they could run code. {advice}"
        ) from error
    except (zipfile.BadZipFile, RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        if out_of_memory_help(error):
            raise
        reason = str(error).partition("\n")[0]
        if machine_failed(error):
            raise UserError(f"{path} could not be read ({reason}). It may be whole: try again.") from error
        raise Damaged(f"{path}: damaged, truncated or not a checkpoint ({reason}). {advice}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a dictionary. {advice}")
    return content


def describe_checkpoint(path: str | Path) -> None:
    """Prints the keys of a checkpoint like a table of contents, with the shapes of tensors."""

    def show(key: str, value, depth: int) -> None:
        left = "  " * depth + str(key)
        if isinstance(value, dict | list | tuple) and value:
            tensors = [leaf for _, leaf in _leaves(value) if isinstance(leaf, torch.Tensor)]
            size = f", {human(sum(tensor.numel() for tensor in tensors))} numbers" if tensors else ""
            print(f"{left}  ({len(value)} entries{size})")
            for inner, item in value.items() if isinstance(value, dict) else enumerate(value):
                show(inner, item, depth + 1)
            return
        if isinstance(value, torch.Tensor):
            shown = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        else:
            shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
        print(f"{left:<48}  {shown}")

    content = load_checkpoint(path)
    print(f"{path}  ({Path(path).stat().st_size / 2**20:.1f} MiB)")
    for key, value in content.items():
        show(key, value, 1)


# Randomness


def seed_everything(seed: int) -> None:
    """Seeds the global generators of Python, numpy and torch: for initial weights, and for libraries that use them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def enable_deterministic_run() -> None:
    """Only deterministic kernels from now on. Call it before CUDA starts."""
    if torch.cuda.is_initialized() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ:
        raise RuntimeError(
            "enable_deterministic_run was called after CUDA had started, expected before; "
            "call it first, or set CUBLAS_WORKSPACE_CONFIG=:4096:8 outside."
        )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.backends.cudnn.benchmark = False  # would choose kernels by their speed of the day
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True)


def half_precision(precision: str, device: torch.device) -> torch.dtype | None:
    """The type of the products: None for float32; `auto` is bfloat16 on CUDA."""
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" else "float32"
    return {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]


def keep_freed_memory() -> None:
    """Has glibc keep freed memory for the next use, instead of handing it back to the system and having every page
    faulted in and zeroed again: a tenth of an update on a CPU. Other systems' allocators are left as they are.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 64 * 2**20)


def set_threads(n: int) -> None:
    """CPU threads of torch; 0: its own choice."""
    if n:
        torch.set_num_threads(n)


# Signals


class Overdue(KeyboardInterrupt):
    """What was under way when a stop was asked for did not end in time: it is broken off."""


class Shutdown:
    """While the block runs, SIGINT, SIGTERM and SIGHUP (a closed terminal) only set `requested`, so that the loop can
    save and end by itself. SIGTERM or SIGHUP that is ignored already, as under nohup, stays so. SIGINT does not: shells
    ignore it for what they start in the background, and benchmarks/learning.py stops its runs by it.

    Ctrl-C after that raises KeyboardInterrupt at once. The earlier handlers are back after the block. Outside the main
    thread, where Python allows no handlers, it does nothing.

    Job schedulers wait some 30 seconds between SIGTERM and SIGKILL; an environment may hang for longer than that, and a
    compilation may last longer. A block `breakable()` therefore ends in `Overdue` if it has not ended `grace` seconds
    after the signal. Python cannot break off a call of a library that does not return: `stuck()` is then called in
    another thread, `2 * grace` seconds after the signal.
    """

    def __init__(self, grace: float = 6.0, stuck: Callable[[], None] | None = None):
        self.requested = False
        self._grace, self._stuck = grace, stuck
        self._breakable = False
        self._earlier = {}
        self._timer, self._alarm, self._broken = None, (0.0, 0.0), -math.inf

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                    self._earlier[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception):
        if self._timer is not None:
            signal.setitimer(signal.ITIMER_REAL, *self._alarm)
            self._timer.cancel()
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        self._earlier.clear()

    @contextlib.contextmanager
    def breakable(self, allowed: bool = True) -> Iterator[None]:
        """A block that may be broken off at any point; with `allowed` False, a part of such a block that may not."""
        before, self._breakable = self._breakable, allowed
        try:
            yield
        finally:
            self._breakable = before

    def _handle(self, number: int, frame) -> None:
        if self.requested:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.requested = True
        self._earlier[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._break)
        self._alarm = signal.setitimer(signal.ITIMER_REAL, self._grace, 0.2)
        self._timer = threading.Timer(2 * self._grace, self._help)
        self._timer.daemon = True
        self._timer.start()
        # Not print: the signal may have interrupted a print, which cannot be entered twice.
        with contextlib.suppress(OSError):
            os.write(2, b"\nsaving, press Ctrl-C again to stop at once\n")

    def _break(self, number: int, frame) -> None:
        # Once, and not while that is on its way out, closing environments; again where a library made nothing of it.
        if self._breakable and time.monotonic() - self._broken > 10:
            self._broken = time.monotonic()
            raise Overdue

    def _help(self) -> None:
        if self._breakable and self._stuck is not None:
            self._stuck()


def end_with_parent() -> None:
    """Ends this run, as SIGTERM does, when the program that started it is gone, however that ended.

    Such a program sets DREAMER_PARENT and holds the other end of stdin. Elsewhere this does nothing.
    """
    if os.environ.pop("DREAMER_PARENT", None) is None:
        return

    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 1):  # not sys.stdin: its lock would be held when Python ends
                pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def lock_folder(folder: Path) -> io.TextIOBase:
    """Claims a folder for this process, until the returned file is closed or the process ends, however it ends.

    Errors: UserError if another process has it, or for a folder that cannot be written. On a file system without locks
    it warns.
    """
    path = folder / ".lock"
    with disk_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        # Never through a symbolic link: the file that it names would be another's.
        lock = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644), "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UserError(f"Another process is training in {folder}: stop it, or use another --logdir") from None
    except OSError as error:
        log.warning(f"{folder} is on a file system without locks ({error.strerror}): start no second run there.")
    return lock


# Devices and sizes


def pick_device(name: str) -> torch.device:
    """auto (CUDA if there is one), cpu, cuda, or cuda:N. Raises UserError for what is not there; starts no CUDA."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()) or name.endswith(":"):
        raise UserError(f"--device {name}: not a device; expected auto, cpu, cuda, or cuda:1 (any number).")
    if kind == "cpu":
        return torch.device("cpu")
    if not count:
        if torch.version.cuda is None:
            seen = f"torch {torch.__version__} is built without CUDA"
        else:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            masked = "" if visible is None else f", CUDA_VISIBLE_DEVICES={visible!r}"
            seen = f"torch {torch.__version__} (CUDA {torch.version.cuda}) sees no device{masked}; see nvidia-smi"
        raise UserError(f"--device {name}: {seen}. Use --device cpu, or --configs ... cpu for a lighter set-up.")
    if int(index or 0) >= count:
        raise UserError(
            f"--device {name}: torch sees {count} device(s), cuda:0 to cuda:{count - 1}. "
            "Use one of these, or --device cpu."
        )
    return torch.device("cuda", int(index or 0))


def out_of_memory_help(error: BaseException) -> str | None:
    """One line on what to make smaller where `error` is a lack of memory (CUDA or host), otherwise None."""
    text = str(error)
    signs = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "alloc_failed")
    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not any(sign in text.lower() for sign in signs):
        return None
    reason = text.partition(" GPU ")[0].partition("\n")[0].strip().rstrip(".") or "Out of memory"
    host = isinstance(error, MemoryError) or "DefaultCPUAllocator" in text
    data = ", dataset_size (steps in memory)" if host else ""
    frames = "" if host else ", --replay_device cpu (frames in RAM)"
    return (
        f"{reason}. Make one of these smaller: batch_size, batch_length, imag_horizon, envs{data}, or the network "
        f"(a block such as --configs ... size12m); or --precision bfloat16, --checkpointing true{frames}."
    )


def allow_many_files() -> None:
    """Raises this process's limit of open files as far as the system lets it: every environment process takes a few."""
    with contextlib.suppress(OSError, ValueError):
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def too_many_files_help(error: BaseException) -> str | None:
    """One line on what to do where `error` is a lack of open files, otherwise None."""
    if getattr(error, "errno", None) not in (errno.EMFILE, errno.ENFILE):
        return None
    return (
        f"Too many open files; the limit is {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}. Raise it (ulimit -n 4096) "
        "or lower envs and eval_envs (or use --parallel thread): every environment process takes a few."
    )


def parameter_table(modules: Mapping[str, nn.Module]) -> str:
    """Names and parameters in millions, and their total; what two modules share counts once there."""
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
    shared = {id(p): p.numel() for module in modules.values() for p in module.parameters()}
    rows = [*counts.items(), ("total", sum(shared.values()))]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {count / 1e6:9.3f} M" for name, count in rows)


if __name__ == "__main__":
    try:
        if len(sys.argv) != 2:
            raise UserError("usage: python tools.py CHECKPOINT")
        describe_checkpoint(sys.argv[1])
    except UserError as error:
        sys.exit(str(error))
