"""Batches from the replay on the training device, as `train_step` takes them.

    host      sample(n) -> set A      sample(n+1) -> set B      sample(n+2) -> set A (its copy is done by then)
    side            copy A                  copy B                    copy A            streams of the device
    main      ... update n-1 ...  update n          update n+1                 update n+2

A batch is sampled right before its update, from all that is known by then, so that runs are exact. The host is ahead of
the device nonetheless, as it only queues an update's work: sampling and copying for the next one go on beside it.
"""

import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from replay import Batch, Replay, Where


class Feed:
    """`next()` gives a batch of `size` windows on the device, with `context` in it, and where it is from.

    pipe: how host arrays get to the device; None: they are where they are needed, and nothing is copied.
    """

    def __init__(self, replay: Replay, size: int, pipe: "Pipe | None" = None):
        self._replay, self._size, self._pipe = replay, size, pipe
        self._sets = itertools.cycle([_Set(replay.empty(size, pipe.pinned)) for _ in range(2)]) if pipe else None

    @classmethod
    def to(cls, device: torch.device, replay: Replay, size: int) -> "Feed":
        return cls(replay, size, Pipe(device) if device.type == "cuda" else None)

    def next(self) -> tuple[dict, Where]:
        if self._pipe is None:
            batch = self._replay.sample(self._size)
            return _map(torch.as_tensor, batch), batch.where
        pinned = next(self._sets)
        pinned.wait()
        # Only what is in the set is overwritten; frames on the device come as new tensors, which the set must not keep.
        batch = self._replay.sample(self._size, out=Batch(dict(pinned.batch), pinned.batch.context))
        tensors, pinned.wait = self._pipe.copy(_map(torch.as_tensor, batch))
        return tensors, batch.where


class _Set:
    """Host arrays of one batch, and what to wait for before they may be overwritten."""

    def __init__(self, batch: Batch):
        self.batch, self.wait = batch, lambda: None


class Pipe:
    """From pinned host memory to a CUDA device on a stream of its own: the one place that knows about streams."""

    def __init__(self, device: torch.device):
        self._device, self._side = device, torch.cuda.Stream(device)

    def pinned(self, shape: tuple, dtype: np.dtype) -> np.ndarray:
        return torch.empty(shape, dtype=torch.from_numpy(np.empty(0, dtype)).dtype, pin_memory=True).numpy()

    def copy(self, batch: dict) -> tuple[dict, Callable[[], None]]:
        """The batch on the device, for what is queued on the current stream from now on; and a function that returns
        when the host's arrays have been read. Tensors that are on the device stay as they are.
        """
        done, main = torch.cuda.Event(), torch.cuda.current_stream(self._device)

        def move(tensor: Tensor) -> Tensor:
            if tensor.device.type == self._device.type:
                return tensor
            moved = tensor.to(self._device, non_blocking=True)
            moved.record_stream(main)  # made on the side stream: its memory is not given away before main has used it
            return moved

        with torch.cuda.stream(self._side):
            batch = _map(move, batch)
            done.record(self._side)
        main.wait_event(done)
        return batch, done.synchronize


def _map(function: Callable, batch: dict) -> dict:
    """`function` of each array of a batch and, as the entry `context`, of its context."""
    parts = {**batch, "context": batch.context} if isinstance(batch, Batch) else batch
    return {key: _map(function, value) if isinstance(value, dict) else function(value) for key, value in parts.items()}
