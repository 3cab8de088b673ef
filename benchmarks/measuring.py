"""Measuring: time among neighbours, memory, arithmetic, and the rate that the machine is capable of."""

import math
import os
import platform
import re
import resource
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

ENOUGH = 3  # quiet samples that make the noisy ones dispensable
NOISE = 0.2  # of a core that others may use while a sample is taken
TICK = 0.02  # seconds that the system's count of used CPU time may be off
SAMPLE = 0.25  # seconds that a sample lasts at least: shorter work is repeated, for ticks not to matter
MATMUL = {"cpu": (torch.float32, 2048), "cuda": (torch.bfloat16, 8192)}  # type and size of the reference product


# Time


class Clock:
    """Three times in seconds: wall-clock, CPU time of this process, CPU time of the whole machine."""

    def wall(self) -> float:
        return time.perf_counter()

    def own(self) -> float:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime

    def machine(self) -> float:
        """Where the system does not tell, as much as this process used: nothing is noise then."""
        try:
            with open("/proc/stat") as file:
                user, nice, system, _, _, irq, softirq, steal = map(int, file.readline().split()[1:9])
        except (OSError, ValueError):
            return self.own()
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


@dataclass
class Times:
    """Seconds per call of what was measured.

    quiet: samples during which other processes used next to nothing; noisy: the others; first: the very first call,
    with whatever is compiled or allocated there.
    """

    first: float
    quiet: list[float] = field(default_factory=list)
    noisy: list[float] = field(default_factory=list)

    @property
    def kept(self) -> list[float]:
        """The quiet samples, or all of them where too few were quiet."""
        wanted = min(ENOUGH, len(self.quiet) + len(self.noisy))
        return self.quiet if len(self.quiet) >= wanted else self.quiet + self.noisy

    @property
    def median(self) -> float:
        return statistics.median(self.kept)

    def summary(self) -> dict:
        """`samples` counts what the numbers are of, `noisy` what was taken beside busy neighbours."""
        low, high = min(self.kept), max(self.kept)
        counts = {"samples": len(self.kept), "noisy": len(self.noisy)}
        return {"median_s": self.median, "min_s": low, "max_s": high, **counts, "first_s": self.first}


def measure(
    work: Callable[[], object],
    *,
    repeats: int = 10,
    warmup: int = 2,
    finish: Callable[[], object] = lambda: None,
    clock: Clock | None = None,
    patience: int = 3,
) -> Times:
    """Times `work`: one first call, `warmup` calls, then samples until `repeats` of them were quiet.

    A sample is as many calls as take a quarter of a second, and `finish`, which waits for what was started (a device
    that works on its own, what is written later). At most `patience * repeats` samples are taken.
    """
    clock = clock or Clock()

    def sample(calls: int) -> tuple[float, float]:
        machine, own, start = clock.machine(), clock.own(), clock.wall()
        for _ in range(calls):
            work()
        finish()
        took, own = clock.wall() - start, clock.own() - own
        return took, clock.machine() - machine - own

    times = Times(sample(1)[0])
    about = min([times.first] + [sample(1)[0] for _ in range(warmup)])
    calls = max(1, math.ceil(SAMPLE / max(about, 1e-6)))
    for _ in range(patience * repeats):
        took, others = sample(calls)
        (times.quiet if others < NOISE * took + TICK else times.noisy).append(took / calls)
        if len(times.quiet) == repeats:
            break
    return times


class Phases:
    """Wall-clock seconds by part. Methods are wrapped; what runs inside another wrapped one is not counted twice.

    finish: waits for the device, at both ends of a part.
    """

    def __init__(self, finish: Callable[[], object] = lambda: None):
        self.seconds: Counter[str] = Counter()
        self.missing: list[str] = []
        self._finish = finish
        self._inner: list[float] = []  # of each part that is open: time of the parts inside it

    def wrap(self, root: object, path: str, label: str) -> None:
        """Counts the method `path` (such as `agent.optimizer.apply`) under `label`; notes it where there is none."""
        *owners, name = path.split(".")
        try:
            owner = reduce(getattr, owners, root)
            method = getattr(owner, name)
        except AttributeError:
            self.missing.append(path)
            return

        def timed(*args, **kwargs):
            with self.part(label):
                return method(*args, **kwargs)

        setattr(owner, name, timed)

    @contextmanager
    def part(self, label: str) -> Iterator[None]:
        self._finish()
        start = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            self._finish()
            took = time.perf_counter() - start
            self.seconds[label] += took - self._inner.pop()
            if self._inner:
                self._inner[-1] += took


# Memory


def peak_bytes(device: torch.device) -> int:
    """The most memory that was in use at once: of the device if it is CUDA, otherwise of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
    except (OSError, TypeError):
        scale = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def resident_bytes() -> int:
    """Memory of this process that is in RAM now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def available_bytes() -> int:
    """Memory that can still be taken without swapping, by the machine's and by the container's count."""
    free = [int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024]
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        free += [int(limit) - int(used)] if limit != "max" else []
    except OSError:
        pass
    return min(free)


# Arithmetic


def _formulas() -> dict:
    """FLOP of the operations that multiply matrices: torch's own formulas, and what those leave out."""
    aten = torch.ops.aten
    return {
        **flop_registry,
        aten.addmm_: flop_registry[aten.addmm],
        aten._addmm_activation: flop_registry[aten.addmm],
        aten.baddbmm_: flop_registry[aten.baddbmm],
        aten.mv: lambda matrix, vector, **_: 2 * matrix.numel(),
        aten.addmv: lambda start, matrix, vector, **_: 2 * matrix.numel(),
        aten.dot: lambda first, second, **_: 2 * first.numel(),
    }


class FlopCounter(TorchDispatchMode):
    """Adds up the FLOP of matrix products and convolutions while it is on, forward and backward, as they are executed.

    A multiplication with an addition counts two; elementwise work is not counted. An operation of one's own counts by
    the formula given to `torch.utils.flop_counter.register_flop_formula`. `uncounted` names what looks like a product
    and has no formula.
    """

    PRODUCT = re.compile(r"mm|conv|linear|matmul|mv$|dot|gru|lstm|attention")

    def __init__(self):
        super().__init__()
        self.flop = 0
        self.uncounted: Counter[str] = Counter()
        self._formulas = _formulas()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, packet = kwargs or {}, func._overloadpacket
        if packet not in self._formulas:
            with self:  # in inference mode a `linear` or `matmul` arrives whole
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if packet in self._formulas:
            self.flop += self._formulas[packet](*args, **kwargs, out_val=result)
        elif func.namespace not in ("aten", "prim", "profiler") or self.PRODUCT.search(packet.__name__):
            self.uncounted[str(packet)] += 1
        return result


def count_flop(work: Callable[[], object]) -> FlopCounter:
    """FLOP of one call of `work`, which must not be compiled: fused code does not pass the counter."""
    with FlopCounter() as counter:
        work()
    return counter


def matmul_rate(device: torch.device, repeats: int = 8) -> float:
    """FLOP per second of a large square matrix product: float32 on the CPU, bfloat16 on CUDA. The best of `repeats`."""
    dtype, size = MATMUL[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    times = measure(lambda: torch.mm(left, right, out=out), repeats=repeats, finish=waiter(device))
    return 2 * size**3 / min(times.kept)


def kernels(work: Callable[[], object], device: torch.device, calls: int = 3) -> dict[str, float]:
    """Number and seconds of the kernels (and copies) that a call of `work` runs on a CUDA device; nothing elsewhere.

    What its time has beyond those seconds are gaps, in which the device waits for launches.
    """
    if device.type != "cuda":
        return {}
    finish = waiter(device)
    finish()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            work()
        finish()
    return kernel_sums(profile.key_averages(), calls)


def kernel_sums(events: Iterable, calls: int) -> dict[str, float]:
    """Of a profile of `calls` calls: per call, how many kernels ran and their seconds."""
    ran = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]
    spent = sum(e.self_device_time_total for e in ran) / 1e6
    return {"kernels": sum(e.count for e in ran) / calls, "kernel_s": spent / calls}


# The machine


def waiter(device: torch.device) -> Callable[[], object]:
    """A function that waits until the device is done."""
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)


def machine(device: torch.device) -> str:
    """Name of the processor that does the work; of a CPU with the number of its cores that this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        cores = len(os.sched_getaffinity(0))
    except (OSError, AttributeError):
        names, cores = [], os.cpu_count()
    return f"{names[0] if names else platform.machine()}, {cores} cores"


def loglog_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope of the straight line through (log x, log y): 1 where y grows in proportion to x."""
    log_x, log_y = [math.log(v) for v in x], [math.log(v) for v in y]
    return statistics.linear_regression(log_x, log_y).slope


def deviation(x: Sequence[float], y: Sequence[float]) -> float:
    """Largest distance from the best straight line a + b x, as a share of y: 0 where the cost grows linearly."""
    line = statistics.linear_regression(x, y)
    return max(abs(line.intercept + line.slope * a - b) / b for a, b in zip(x, y, strict=True))
