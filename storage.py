"""Where the replay's numbers lie: rows of one array per key, in RAM or on the training device.

Both kinds answer to the same three calls: `write(rows, values)`, `gather(rows)` for a batch, and `read(rows)`, which
gives numpy arrays, for the files. This module alone knows which memory it is; torch is imported where it is needed.
"""

import errno
import itertools
import mmap
import sys

import numpy as np

from errors import UserError

NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)  # has a name from Python 3.13 on
LARGE = 1024  # bytes of a row from which runs of rows are copied as one: several times faster for a window of frames
STAGED = 512  # rows that wait to be sent to the device, at most


class ReplayMemoryError(UserError):
    """There is not enough memory for what was asked for."""


class HostRows:
    """[rows, *shape] in RAM, as `array`.

    The address space is reserved at once and the memory is taken page by page as rows are written: a short run stays
    small, and nothing is ever moved.
    """

    def __init__(self, rows: int, shape: tuple, dtype: np.dtype):
        size = rows * int(np.prod(shape)) * dtype.itemsize
        try:
            pages = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            raise ReplayMemoryError(_too_large(rows, size, "RAM") + "lower dataset_size.") from error
        self.array = np.ndarray((rows, *shape), dtype, buffer=pages)  # of zeros

    def write(self, rows: np.ndarray | slice, values: np.ndarray) -> None:
        self.array[rows] = values

    def gather(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """[*rows.shape, *shape]; `out` (contiguous) is filled if given."""
        if self.array[:1].nbytes < LARGE:
            return self.array.take(rows, axis=0, out=out, mode="clip")  # other modes fill `out` through a copy
        if out is None:
            out = np.empty((*rows.shape, *self.array.shape[1:]), self.array.dtype)
        flat, target = rows.ravel(), out.reshape(-1, *self.array.shape[1:])
        borders = [0, *(np.flatnonzero(np.diff(flat) != 1) + 1).tolist(), len(flat)]
        for start, stop in itertools.pairwise(borders):
            first = int(flat[start])
            target[start:stop] = self.array[first : first + stop - start]
        return out

    read = gather

    def grow(self, rows: int) -> None:
        larger = HostRows(rows, self.array.shape[1:], self.array.dtype).array
        larger[: len(self.array)] = self.array
        self.array = larger


class DeviceRows:
    """[rows, *shape] on a torch device, all of it allocated at once, so that what does not fit is known at the start.

    Written rows wait in RAM and are sent together before they are read. Everything happens on the device's current
    stream: what reads a row is queued behind what wrote it.
    """

    def __init__(self, rows: int, shape: tuple, dtype: np.dtype, device):
        import torch

        self._torch, self.device, self.dtype = torch, torch.device(device), dtype
        size = rows * int(np.prod(shape)) * dtype.itemsize
        try:
            self.data = torch.empty((rows, *shape), dtype=torch.from_numpy(np.empty(0, dtype)).dtype, device=device)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if "memory" not in str(error).lower():
                raise
            advice = "lower dataset_size, or keep the frames in RAM (replay_device: cpu)."
            raise ReplayMemoryError(_too_large(rows, size, f"memory of {self.device}") + advice) from error
        self._staged: dict[int, np.ndarray] = {}  # row -> its latest value

    def write(self, rows: np.ndarray | slice, values: np.ndarray) -> None:
        values = np.array(values, self.dtype)  # a copy: the caller's array may be used again
        rows = range(rows.start, rows.stop) if isinstance(rows, slice) else rows.tolist()
        self._staged.update(zip(rows, values, strict=True))
        if len(self._staged) >= STAGED:
            self._send()

    def gather(self, rows: np.ndarray, out=None):
        """A tensor [*rows.shape, *shape] on the device. `out` is there for the sake of the other kind."""
        self._send()
        return self.data.index_select(0, self._to_device(rows.ravel())).view(*rows.shape, *self.data.shape[1:])

    def read(self, rows: np.ndarray) -> np.ndarray:
        return self.gather(rows).cpu().numpy()

    def grow(self, rows: int) -> None:
        self._send()
        larger = DeviceRows(rows, tuple(self.data.shape[1:]), self.dtype, self.device).data
        larger[: len(self.data)] = self.data
        self.data = larger

    def _send(self) -> None:
        if self._staged:
            rows, values = np.fromiter(self._staged, np.int64), np.stack(list(self._staged.values()))
            self.data.index_copy_(0, self._to_device(rows), self._to_device(values))
            self._staged.clear()

    def _to_device(self, array: np.ndarray):
        # Not pinned: then the call returns only when the array has been read, and may not be waited for otherwise.
        return self._torch.from_numpy(array).to(self.device, non_blocking=True)


def _too_large(rows: int, size: int, where: str) -> str:
    return f"The replay needs {size:,} bytes ({size / 1e9:.3g} GB) of {where} for one key of {rows:,} steps: "
