"""The replay: what was experienced, kept in memory for sampling and mirrored on disk.

One *stream* of steps per environment. A step holds what the environment gave, the action chosen there, and the latent
state the agent had there:

    stream 3   position  0    1    2    3    4    5    6    7    8    9  ...   counted since the stream began
               episode   |------ 0 -------|  |--------- 1 --------|  |--- 2
               is_first  x                   x                        x
               is_last                  x                        x
               reward    0    r1   r2   r3   0    r5   r6   r7   r8   0        received on arriving at the step
               action    a0   a1   a2   0    a4   a5   a6   a7   0    a9       chosen at the step; zero at is_last
               latent    hz   hz   hz   hz   hz   hz   hz   hz   hz   hz       in memory only, each with a validity flag

    window, T = 4             ctx [---- trained ----]   of ctx: its latent and action (`Batch.context`);
                                                        of the others: everything but latents, which are written back
    memory     [ slot: 1024 rows ][ slot: 1024 rows ][ slot, filling ]         borders have nothing to do with episodes
    disk       s003-e000000-p000-0004.npz, s003-e000001-p000-0005.npz, ...     pieces of an episode, at most 1024 steps

In memory there is one array per key for all streams, of as many rows as the capacity needs (`storage.py`; RAM is taken
only as rows are written). Streams are given slots of it, and give the oldest back. A batch is one gather per key.

Sampling is uniform over the start positions of complete windows (one context step, then T trained steps) of all
streams, across episode borders; the newest data is served once first, from the online queue. The first trained step
keeps its own `is_first`. If that is not set and the context holds no latent (`valid` is False: after a restart, or
where none was given), the consumer starts from its initial state there.

A piece on disk holds `is_first, is_last, is_terminal, discount, action, reward` (discount: 1 - is_terminal), the
observation keys, and `present/<key>` only where some step lacked that observation. It is written to a temporary name,
synced and renamed, when 1024 steps are full or the episode ends; `flush` writes unfinished pieces too. Latents are not
on disk: they belong to weights that have moved on.

When a directory is read again:
- The longest file of a (stream, episode, piece) counts; shorter ones, left by a crash while a piece grew, are removed.
- An episode that stops without `is_last` was abandoned: its last step is marked `is_last` (not terminal), its action is
  zeroed.
- A damaged file is named in the log, moved to `corrupt/` and counted. The steps around a missing piece are not
  neighbours, and nothing may learn a transition between them: the step before the gap is marked `is_last` (not
  terminal) with zero action, as an abandoned episode, and the step after it `is_first`, so that the recurrent state is
  reset there. Its reward stays as recorded.
- Only the newest `capacity` steps are read. Of what is older the names tell the counts, and of what was removed
  (`keep`) the ledger does (`ledger.py`). Nothing is counted twice, and no counter is less than the checkpoint's.
- A file that cannot be read for another reason than its content (no memory, a failing disk) stays, and is an error.
- Files with other names are episodes of older ports: one more stream (id -1), in the order of their names. There the
  action of a row is the one that *led to* it; it is shifted by one (see `align_actions`).
"""

import errno
import json
import logging
import os
import re
import shutil
import time
import zipfile
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from episodes import (
    FLAGS,
    RESERVED,
    ReplayError,
    align_actions,
    as_vectors,
    header_shape,
    read_flags,
    read_npz,
    write_npz,
)
from files import machine_failed
from ledger import Ledger
from storage import HostRows

log = logging.getLogger(__name__)

SLOT = 1024  # rows of a slot
OLDER = -1  # id of the stream of episodes that older ports recorded
SAVED = ("online_served", "online_dropped", "latents_rejected")  # counts of the whole run; others are found in files
DETER, STOCH, VALID = "latent/deter", "latent/stoch", "latent/valid"
NAME = re.compile(r"s(\d{3,})-e(\d{6,})-p(\d{3,})-(\d{4,})\.npz")


class StorageError(ReplayError):
    """A piece could not be written. Its steps are stored in memory; the next `add` or `flush` tries again."""


class _Damaged(Exception):
    """A file that cannot be used as it is: it is set aside."""


class Where(NamedTuple):
    """Which windows a batch holds, for `Replay.write_latents`."""

    streams: np.ndarray  # [B] int64, stream ids
    starts: np.ndarray  # [B] int64, positions of the context steps; the trained steps are the T after each


class Batch(dict):
    """Windows. The dictionary holds the trained steps, each [B, T, ...]: the observation keys, `present/<key>`,
    `reward`, `is_first`, `is_last`, `is_terminal`, `action`.

    context: of the step before each window: `deter` [B, D] float16 and `stoch` [B, S] (zeros where not valid), `valid`
        [B] bool (was a latent stored there), `action` [B, A] (the action chosen there).
    where: handles for `Replay.write_latents`.
    """

    def __init__(self, arrays: dict, context: dict, where: Where | None = None):
        super().__init__(arrays)
        self.context = context
        self.where = where


class _Stored(NamedTuple):
    """A file on disk."""

    path: Path
    stream: int
    episode: int
    piece: int
    length: int

    @property
    def steps(self) -> int:
        return self.length - (self.piece == 0)


class _Piece(NamedTuple):
    """A finished piece that waits to be written: positions start to stop of its stream."""

    episode: int
    piece: int
    start: int
    stop: int
    replaces: str | None  # the shorter file that an earlier flush left

    def name(self, stream: int) -> str:
        return f"s{stream:03d}-e{self.episode:06d}-p{self.piece:03d}-{self.stop - self.start:04d}.npz"


class _Memory:
    """One array of rows per key, which streams are given in slots of `size` rows."""

    def __init__(self, schema: dict, size: int, slots: int, streams: int, frames: Callable):
        self.size, self.slots = size, slots
        self.keys = {}
        for key, kind in schema.items():
            make = frames if _is_frame(*kind) else HostRows
            self.keys[key] = make(slots * size, *kind)
        self.table = np.zeros((streams, slots), np.int64)  # slots of each stream, oldest first
        self.free: list[int] = []
        self.touched = 0  # slots from here on were never given

    def give(self, stream: int, place: int) -> None:
        """A slot to that stream, behind its first `place` ones."""
        if not self.free and self.touched == self.slots:
            self._grow()
        slot = self.free.pop() if self.free else self.touched
        self.touched = max(self.touched, slot + 1)
        self.table[stream, place] = slot

    def take_oldest(self, stream: int) -> None:
        slot = int(self.table[stream, 0])
        self.table[stream, :-1] = self.table[stream, 1:]
        self.free.append(slot)
        self.valid[slot * self.size : (slot + 1) * self.size] = False

    @property
    def valid(self) -> np.ndarray:
        """Whether a latent is known, of all rows that were ever used."""
        array = self.keys[VALID].array if VALID in self.keys else np.zeros(0, bool)
        return array[: self.touched * self.size]

    def _grow(self) -> None:
        """Beyond the capacity; only when a full disk holds steps back."""
        self.slots += max(1, self.slots // 2)
        for rows in self.keys.values():
            rows.grow(self.slots * self.size)
        self.table = np.pad(self.table, ((0, 0), (0, self.slots - self.table.shape[1])))

    def rows(self, streams: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """Rows of the steps that are `offsets` after the oldest ones in memory of those streams (broadcast)."""
        place, rest = np.divmod(offsets, self.size)
        return self.table[streams, place] * self.size + rest


class _Stream:
    """The steps of one environment: positions `begin` to `end` are in memory; `index` is its line in the table."""

    def __init__(self, ident: int, index: int, memory: _Memory):
        self.id, self.index, self.memory = ident, index, memory
        self.begin = self.end = 0
        self.next_online = 0  # context position of the next window for the online queue
        self.episode = -1  # number of the episode that runs, or ran last
        self.running = False  # the last step was not is_last
        self.piece = 0  # number within the episode of the piece that fills
        self.piece_start = 0
        self.partial: str | None = None  # file in which a flush put the piece that fills
        self.partial_stop = 0
        self.pending: list[_Piece] = []  # finished, not on disk yet
        self.cut: set[int] = set()  # positions that end an episode because nothing follows

    def __len__(self) -> int:
        return self.end - self.begin

    @property
    def unwritten(self) -> int:
        """First position that is still needed to write a piece."""
        return self.pending[0].start if self.pending else self.piece_start

    def resume_at(self, position: int) -> None:
        """Say, of an empty stream, that its steps before `position` exist but are not in memory."""
        self.begin = self.end = self.piece_start = position

    def row(self, position: int) -> int:
        place, rest = divmod(position - self.begin, self.memory.size)
        return int(self.memory.table[self.index, place]) * self.memory.size + rest

    def advance(self, most: int = 1) -> slice:
        """Makes room for up to `most` steps that lie side by side; where to write them."""
        place, rest = divmod(len(self), self.memory.size)
        if not rest:
            self.memory.give(self.index, place)
        count, row = min(most, self.memory.size - rest), self.row(self.end)
        self.end += count
        return slice(row, row + count)

    def extend(self, values: dict[str, np.ndarray]) -> None:
        """Append arrays [N, ...]; their latents are not known."""
        total, done = len(values["reward"]), 0
        while done < total:
            rows = self.advance(total - done)
            count = rows.stop - rows.start
            for key, value in values.items():
                self.memory.keys[key].write(rows, value[done : done + count])
            done += count

    def read(self, key: str, start: int, stop: int) -> np.ndarray:
        return self.memory.keys[key].read(self.memory.rows(self.index, np.arange(start, stop) - self.begin))

    def abandon(self) -> bool:
        """Mark the last step is_last if it is not; True if that was needed."""
        if not len(self):
            return False
        row, keys = self.row(self.end - 1), self.memory.keys
        if keys["is_last"].array[row]:
            return False
        keys["is_last"].array[row], keys["action"].array[row] = True, 0
        self.cut.add(self.end - 1)
        return True

    def finish_piece(self) -> None:
        if self.end > self.piece_start:
            self.pending.append(_Piece(self.episode, self.piece, self.piece_start, self.end, self.partial))
        self.piece, self.piece_start, self.partial, self.partial_stop = self.piece + 1, self.end, None, 0

    def drop_oldest(self) -> int:
        count = min(len(self), self.memory.size)
        self.memory.take_oldest(self.index)
        self.begin += count
        return count


class Replay:
    """Steps in memory and on disk, and windows of them. The head of this file draws the layout.

    directory: where pieces are written, and read at construction; None: memory only.
    spaces: observation key -> gymnasium space (its shape and dtype). uint8 stays uint8, float64 is kept as float32.
    action_size: A, length of the action vectors.
    latent: {'deter': D, 'stoch': S, 'classes': C}; C = 0: Gaussian latents. None: no latents.
    capacity: agent steps in memory, all streams together; the oldest slot of the longest stream goes first.
    length: T, trained steps of a window.
    streams: environments that add steps. Streams with higher ids found on disk are sampled too.
    seed: of the draws.
    action_repeat: frames per agent step, for `frames`.
    online: serve new windows once first.
    piece: steps of a file, at most (fewer if the memory is very small).
    keep: steps that the directory may hold, the oldest pieces are removed beyond; 0: all. What other ports recorded
        stays, and counts for nothing here.
    read_only: never write to the directory; damaged files are skipped and counted.
    frames: where images (uint8 [H, W, C]) are kept, `frames(rows, shape, dtype)`: `storage.HostRows`, or DeviceRows on
        some device; batches then hold tensors there.
    Raises ReplayMemoryError where memory lacks; ReplayError where files in the directory do not fit the spaces, or the
    capacity is too small.
    """

    def __init__(
        self,
        directory: Path | str | None,
        spaces: dict,
        action_size: int,
        *,
        latent: dict | None = None,
        capacity: int,
        length: int,
        streams: int,
        seed: int,
        action_repeat: int = 1,
        online: bool = True,
        piece: int = 1024,
        keep: int = 0,
        read_only: bool = False,
        frames: Callable = HostRows,
    ):
        least = 2 * (length + 1) * max(1, streams)  # twice: a stream loses whole slots and must still hold a window
        if capacity < least:
            raise ReplayError(
                f"Found a replay of {capacity} steps (dataset_size), expected at least {least} for "
                f"{max(1, streams)} stream(s) and windows of {length} + 1 steps; raise dataset_size, or "
                "lower batch_length or envs."
            )
        if 0 < keep < least:
            raise ReplayError(f"Found keep_on_disk {keep}, expected 0 (all) or at least {least}, as for dataset_size.")
        self.directory = Path(directory) if directory is not None else None
        self.capacity, self.length, self.streams = int(capacity), int(length), int(streams)
        self.action_size, self.action_repeat = int(action_size), int(action_repeat)
        self.online, self.read_only, self.latent, self.keep = online, read_only, latent, int(keep)
        self._obs = {key: _kept(key, space) for key, space in spaces.items()}
        self._ids = {key: found for key, space in spaces.items() if (found := _id_range(space))}
        self._schema = self._make_schema()
        # A slot is a quarter of a stream's share at most. A stream whose oldest slot is not written yet then holds
        # two slots at most, half of its share: when the memory is full there always is a slot that may go.
        size = min(SLOT, max(1, self.capacity // (4 * max(1, self.streams))))
        self._piece = min(int(piece), size)
        self._rng = np.random.default_rng(seed)
        self._queue: deque[tuple[int, int]] = deque()  # (stream, context position)
        self._entries = self._steps = self._episodes = 0
        self._ignored: set[str] = set()  # keys of files that are not learned from
        self._counts = dict.fromkeys((*SAVED, "corrupt", "gaps", "abandoned"), 0)
        if self.directory is not None and not read_only:
            self.directory.mkdir(parents=True, exist_ok=True)
        self._files: dict[int, deque[_Stored]] = {}  # of each stream, whole pieces, oldest first
        self._filed = 0  # steps that they hold
        self._ledger = Ledger(self.directory) if self.directory is not None else None
        stored = self._scan() if self.directory is not None else {}
        ids = list(dict.fromkeys([*range(self.streams), *sorted(stored)]))
        most = self.capacity + self.streams  # a step of every stream is stored before old ones go
        if read_only:
            most = min(most, sum(piece.length for pieces in stored.values() for piece in pieces))
        # Every stream may have one slot that is not full.
        self._memory = _Memory(self._schema, size, -(-most // size) + len(ids), len(ids), frames)
        self._streams = {ident: _Stream(ident, index, self._memory) for index, ident in enumerate(ids)}
        self._load(stored)

    @classmethod
    def offline(
        cls,
        directory: Path | str,
        spaces: dict,
        action_size: int,
        *,
        capacity: int,
        length: int,
        seed: int,
        latent: dict | None = None,
        action_repeat: int = 1,
        frames: Callable = HostRows,
    ) -> "Replay":
        """Recorded episodes alone: nothing is ever written to the directory, and there is no online queue.

        Raises ReplayError if the directory is missing or holds no usable file. Damaged files are skipped and counted.
        """
        if not Path(directory).is_dir():
            raise ReplayError(f"{directory} is not a directory; give offline_traindir a folder of .npz episodes.")
        replay = cls(
            directory,
            spaces,
            action_size,
            latent=latent,
            capacity=capacity,
            length=length,
            streams=0,
            seed=seed,
            action_repeat=action_repeat,
            online=False,
            read_only=True,
            frames=frames,
        )
        if not len(replay):
            raise ReplayError(
                f"{directory} holds no usable .npz episode ({replay._counts['corrupt']} damaged); give "
                "offline_traindir a folder of recorded episodes."
            )
        return replay

    # Counts

    def __len__(self) -> int:
        """Entries in memory."""
        return self._entries

    @property
    def steps(self) -> int:
        """Agent steps ever stored, in memory and on disk: entries that do not begin an episode."""
        return self._steps

    @property
    def frames(self) -> int:
        """Environment steps ever stored."""
        return self._steps * self.action_repeat

    @property
    def windows(self) -> int:
        """Complete windows that can be sampled."""
        return sum(max(0, len(stream) - self.length) for stream in self._streams.values())

    @property
    def bytes_per_step(self) -> int:
        """Bytes in memory of one step, with its latent."""
        return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in self._schema.values())

    def estimate_bytes(self, capacity: int | None = None) -> int:
        """Bytes in memory of `capacity` steps (default: this replay's own)."""
        return self.bytes_per_step * (self.capacity if capacity is None else capacity)

    def stats(self) -> dict[str, int | float]:
        """Counts for the log. `bytes`: of the entries; `latents_valid`: share of the entries that hold a latent."""
        valid = int(self._memory.valid.sum())
        return {
            "steps": self._steps,
            "entries": self._entries,
            "episodes": self._episodes,
            "windows": self.windows,
            "streams": sum(len(stream) > 0 for stream in self._streams.values()),
            "bytes": self.estimate_bytes(self._entries),
            "online_waiting": len(self._queue),
            "latents_valid": valid / max(1, self._entries),
            "unwritten_pieces": sum(len(stream.pending) for stream in self._streams.values()),
            **self._counts,
        }

    # Adding

    def add(self, stream: int, step: dict, latent: tuple | None = None) -> None:
        """Store a step of environment `stream`.

        step: the observation keys ([*space.shape]; a missing key means that it was not present at this step), optional
            `present/<key>`, `reward`, `is_first`, `is_last`, `is_terminal`, `action` [A], chosen here (ignored at
            is_last). Other keys (`log_*`) are ignored.
        latent: (deter [D], stoch [S]: class indices, or floats) of the agent at this step; None: not known.
        Raises ReplayError, and stores nothing, where the data does not fit or is not finite; StorageError where a
        finished piece cannot be written: the step itself **is** stored, and the piece is tried again at the next `add`
        or `flush`.
        """
        steps = {key: np.asarray(value)[None] for key, value in step.items() if not key.startswith("log_")}
        self._store([stream], steps, latent and tuple(np.asarray(part)[None] for part in latent))

    def add_all(self, steps: dict, latents: tuple | None = None) -> None:
        """Store a step of each environment: as `add`, with a leading axis for the environments; all of them or none."""
        self._store(range(len(steps["is_first"])), steps, latents)

    def _store(self, ids: Sequence[int], steps: dict, latents: tuple | None) -> None:
        if self.read_only:
            raise ReplayError(f"{self.directory} was opened to be read only; steps cannot be added.")
        for ident in ids:
            if not 0 <= ident < self.streams:
                raise ReplayError(f"Found stream {ident}, expected 0 to {self.streams - 1}; raise `streams` (envs).")
        streams = [self._streams[ident] for ident in ids]
        values = self._check_steps(streams, steps) | self._check_latents(len(streams), latents)
        flags = list(zip(streams, values["is_first"].tolist(), values["is_last"].tolist(), strict=True))
        for stream, is_first, _ in flags:
            if is_first:
                self._begin_episode(stream)
        rows = np.array([stream.advance().start for stream in streams])
        for key, value in values.items():
            self._memory.keys[key].write(rows, value)
        for stream, is_first, is_last in flags:
            stream.running = not is_last
            self._entries += 1
            self._steps += not is_first
            if is_last or stream.end - stream.piece_start >= self._piece:
                stream.finish_piece()
            self._enqueue(stream)
        for stream in streams:
            self._write_pending(stream)
        self._evict()

    def _check_steps(self, streams: list[_Stream], steps: dict) -> dict[str, np.ndarray]:
        """The steps in the form in which they are kept, [N, ...]."""
        count = len(streams)

        def name(index: int) -> str:
            stream = streams[index]
            episode = stream.episode + bool(steps["is_first"][index])
            return f"stream {stream.id} (environment {stream.id}), step {stream.end} of the stream, episode {episode}"

        absent = [key for key in (*FLAGS, "reward") if key not in steps]
        if absent or ("action" not in steps and not np.all(steps["is_last"])):
            raise ReplayError(
                f"stream {streams[0].id}, step {streams[0].end} of the stream: {', '.join(absent or ['action'])} "
                f"missing. Found {sorted(steps)}; expected the observation keys and {sorted(RESERVED - {'discount'})}."
            )
        values = {key: np.asarray(steps[key]).reshape(count).astype(bool) for key in FLAGS}
        for index, (stream, is_first) in enumerate(zip(streams, values["is_first"].tolist(), strict=True)):
            if not is_first and not stream.running:
                raise ReplayError(
                    f"{name(index)}: found a step without is_first where an episode must begin (after is_last, or "
                    "at the start); reset the environment and store what reset() gives first."
                )
        values["reward"] = _fit_rows("reward", steps["reward"], np.ones(count, bool), *self._schema["reward"], name)
        for key, kind in self._obs.items():
            present = np.zeros(count, bool)
            if key in steps:
                present[:] = np.asarray(steps.get(f"present/{key}", True)).astype(bool)
            values[f"present/{key}"] = present
            values[key] = _fit_rows(f"observation {key!r}", steps.get(key), present, *kind, name)
        # Last: an action that is not finite mostly comes of an observation that is not, and that one is to be named.
        acts = ~values["is_last"]
        values["action"] = _fit_rows("action", steps.get("action"), acts, *self._schema["action"], name)
        return values

    def _check_latents(self, count: int, latents: tuple | None) -> dict[str, np.ndarray]:
        if not self.latent:
            return {}
        if latents is None:
            return {VALID: np.zeros(count, bool)}
        deter, stoch = self._cast_latents(*latents, lead=(count,))
        valid = _finite_rows(deter) & _finite_rows(stoch)
        self._counts["latents_rejected"] += count - int(valid.sum())
        return {DETER: deter, STOCH: stoch, VALID: valid}

    def _begin_episode(self, stream: _Stream) -> None:
        if stream.running:  # the environment was reset without is_last
            self._counts["abandoned"] += stream.abandon()
            stream.finish_piece()
        stream.episode += 1
        stream.piece, stream.piece_start = 0, stream.end
        self._episodes += 1

    def _evict(self) -> None:
        """Drop the oldest slots of the longest streams until the capacity holds; none that a piece still needs."""
        while self._entries > self.capacity:
            candidates = [stream for stream in self._streams.values() if self._may_drop(stream)]
            if not candidates:  # only when a full disk holds pieces back: better too much memory than lost steps
                return
            self._entries -= max(candidates, key=len).drop_oldest()
        while self._queue and not self._has_window(*self._queue[0]):
            self._queue.popleft()
            self._counts["online_dropped"] += 1

    def _may_drop(self, stream: _Stream) -> bool:
        if stream.id not in range(self.streams):  # nothing is added there any more
            return len(stream) > 0
        written = self.directory is None or stream.begin + self._memory.size <= stream.unwritten
        return len(stream) >= self._memory.size and written

    # Sampling

    def empty(self, batch: int, allocate: Callable[[tuple, np.dtype], np.ndarray] = np.empty) -> Batch:
        """A Batch of arrays for `sample(batch, out=...)`; `allocate(shape, dtype)` may give pinned memory.

        What is kept on a device is left out: a batch of it is a new tensor there.
        """

        def array(key: str, *lead: int) -> np.ndarray:
            shape, dtype = self._schema[key]
            return allocate((*lead, *shape), dtype)

        trained, context = self._batch_keys()
        on_host = [key for key in trained if isinstance(self._memory.keys[key], HostRows)]
        out = Batch(
            {key: array(key, batch, self.length) for key in on_host},
            {name: array(key, batch) for name, key in context.items()},
        )
        if not self.latent:
            out.context["valid"] = allocate((batch,), np.dtype(bool))
        return out

    def _batch_keys(self) -> tuple[list[str], dict[str, str]]:
        """Keys of the trained steps, and of the context by their names there."""
        latent = {"valid": VALID, "deter": DETER, "stoch": STOCH} if self.latent else {}
        return [key for key in self._schema if key not in latent.values()], {"action": "action", **latent}

    def sample(self, batch: int, out: Batch | None = None) -> Batch:
        """`batch` windows: what waits in the online queue, then uniform draws. `out` (from `empty`) is filled if given.

        Raises ReplayError while no stream holds a complete window.
        """
        where = self._choose(batch)
        out = self.empty(batch) if out is None else out
        if len(out["reward"]) != batch:
            raise ReplayError(f"`out`: found {len(out['reward'])} windows, expected {batch}; use empty({batch}).")
        rows, _ = self._locate(where, np.arange(self.length + 1))
        trained, context = self._batch_keys()
        for key in trained:
            out[key] = self._memory.keys[key].gather(rows[:, 1:], out.get(key))
        for name, key in context.items():
            self._memory.keys[key].gather(rows[:, 0], out.context[name])
        if not self.latent:
            out.context["valid"][:] = False
        elif not out.context["valid"].all():  # zeros, not what is left of older steps, where there is none
            unknown = ~out.context["valid"]
            out.context["deter"][unknown] = out.context["stoch"][unknown] = 0
        out.where = where
        return out

    def _locate(self, where: Where, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the steps that are `offsets` [N] after each start, and whether they are still in memory, [B, N]."""
        streams = [self._streams[ident] for ident in where.streams.tolist()]
        begin = np.array([stream.begin for stream in streams])
        past = (where.starts - begin)[:, None] + offsets
        index = np.array([stream.index for stream in streams])
        return self._memory.rows(index[:, None], past.clip(0)), past >= 0

    def _choose(self, batch: int) -> Where:
        chosen = []
        while self._queue and len(chosen) < batch:
            window = self._queue.popleft()
            if self._has_window(*window):
                chosen.append(window)
                self._counts["online_served"] += 1
            else:
                self._counts["online_dropped"] += 1
        online = np.array(chosen, np.int64).reshape(-1, 2)
        streams = [stream for stream in self._streams.values() if len(stream) > self.length]
        if not streams:
            raise ReplayError(
                f"The replay holds no window yet: found {self._entries} steps in all streams together, "
                f"expected at least {self.length + 1} (batch_length + 1) in one of them; collect more "
                "(prefill) or lower batch_length."
            )
        bounds = np.cumsum([len(stream) - self.length for stream in streams])
        draws = self._rng.integers(bounds[-1], size=batch - len(online))
        index = np.searchsorted(bounds, draws, side="right")
        ids = np.array([stream.id for stream in streams], np.int64)
        ends = np.array([stream.end - self.length for stream in streams], np.int64)
        starts = draws - bounds[index] + ends[index]  # bounds: where the stream's own positions end among the draws
        return Where(np.concatenate([online[:, 0], ids[index]]), np.concatenate([online[:, 1], starts]))

    def _has_window(self, stream: int, start: int) -> bool:
        held = self._streams.get(stream)
        return held is not None and held.begin <= start and start + self.length < held.end

    def _enqueue(self, stream: _Stream) -> None:
        while self.online and stream.next_online + self.length < stream.end:
            self._queue.append((stream.id, stream.next_online))
            stream.next_online += self.length

    # Latents

    def write_latents(self, where: Where, deter: np.ndarray, stoch: np.ndarray) -> None:
        """Store the refreshed latents of the trained steps of a batch, as far as they are still in memory.

        where: `Batch.where`; deter [B, T, D] float; stoch [B, T, S] class indices (or floats if Gaussian). float16 and
        uint8, as they are kept, are the quickest. A window with a value that is not finite in float16 is not written,
        and counted.
        """
        if not self.latent:
            raise ReplayError("This replay was made without latents; give `latent` the sizes to store them.")
        deter, stoch = self._cast_latents(deter, stoch, lead=(len(where.starts), self.length))
        finite = _finite_rows(deter) & _finite_rows(stoch)
        self._counts["latents_rejected"] += int((~finite).sum())
        rows, held = self._locate(where, np.arange(1, self.length + 1))
        held &= finite[:, None]
        # Where windows overlap, the last one counts.
        keep = slice(None) if held.all() else held
        for key, value in ((DETER, deter), (STOCH, stoch), (VALID, held)):
            self._memory.keys[key].write(rows[keep], value[keep])

    def forget_latents(self) -> None:
        """Mark every latent as not known, so that a run goes on from here as one that starts from the files does."""
        self._memory.valid[:] = False

    def _cast_latents(self, deter: np.ndarray, stoch: np.ndarray, lead: tuple) -> tuple[np.ndarray, np.ndarray]:
        """To the kept dtypes; what float16 cannot hold becomes infinite and is rejected by the caller."""
        deter, stoch = np.asarray(deter), np.asarray(stoch)
        for name, value, key in (("deter", deter, DETER), ("stoch", stoch, STOCH)):
            if value.shape != lead + self._schema[key][0]:
                raise ReplayError(f"latent {name}: found shape {value.shape}, expected {lead + self._schema[key][0]}.")
        if self.latent["classes"] and stoch.dtype.kind not in "iu":
            raise ReplayError(
                f"latent stoch: found {stoch.dtype}, expected class indices (integers); take the argmax of the one-hot."
            )
        with np.errstate(over="ignore"):
            return deter.astype(np.float16, copy=False), stoch.astype(self._schema[STOCH][1], copy=False)

    # Writing

    def flush(self) -> None:
        """Write every step to disk, unfinished pieces too (each is replaced when it has grown). Raises StorageError."""
        if self.directory is None or self.read_only:
            return
        for stream in self._streams.values():
            self._write_pending(stream)
            if stream.end > max(stream.piece_start, stream.partial_stop):
                piece = _Piece(stream.episode, stream.piece, stream.piece_start, stream.end, stream.partial)
                self._write(stream, piece)
                stream.partial, stream.partial_stop = piece.name(stream.id), stream.end

    def _write_pending(self, stream: _Stream) -> None:
        if self.directory is None:
            stream.pending.clear()
        while stream.pending:  # a piece leaves the list only once it is safe
            piece = stream.pending[0]
            self._write(stream, piece)
            stream.pending.pop(0)
            self._filed += piece.stop - piece.start
            path = self.directory / piece.name(stream.id)
            stored = _Stored(path, stream.id, piece.episode, piece.piece, piece.stop - piece.start)
            self._files.setdefault(stream.id, deque()).append(stored)
            self._prune()

    def _prune(self) -> None:
        """Removes the oldest pieces of the streams that have most of them, many at once: the ledger is synced."""
        if not self.keep or self._filed <= self.keep:
            return
        held = {ident: sum(piece.length for piece in files) for ident, files in self._files.items()}
        old = []
        while self._filed > self.keep - min(self.keep // 20, 10 * SLOT):
            ident = max(held, key=held.__getitem__)
            piece = self._files[ident].popleft()
            held[ident] -= piece.length
            self._filed -= piece.length
            self._ledger.add(ident, piece.episode, piece.piece, piece.length)
            old.append(piece.path)
        self._ledger.write()
        for path in old:
            path.unlink(missing_ok=True)

    def _write(self, stream: _Stream, piece: _Piece) -> None:
        arrays = self._piece_arrays(stream, piece)
        path = self.directory / piece.name(stream.id)
        try:
            write_npz(path, arrays)
            if piece.replaces and piece.replaces != path.name:
                (self.directory / piece.replaces).unlink(missing_ok=True)
        except OSError as error:
            raise self._storage_error(path, sum(array.nbytes for array in arrays.values()), error) from error

    def _piece_arrays(self, stream: _Stream, piece: _Piece) -> dict[str, np.ndarray]:
        arrays = {key: stream.read(key, piece.start, piece.stop) for key in (*FLAGS, "action", "reward", *self._obs)}
        arrays["discount"] = 1 - arrays["is_terminal"].astype(np.float32)
        for key in self._obs:
            present = stream.read(f"present/{key}", piece.start, piece.stop)
            if not present.all():
                arrays[f"present/{key}"] = present
        return arrays

    def _storage_error(self, path: Path, needed: int, error: OSError) -> StorageError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        found = "the disk is full" if full else f"{error.strerror or error}"
        try:
            free = f"{shutil.disk_usage(self.directory).free / 2**20:.2f} MiB are free"
        except OSError:
            free = "the directory cannot be read"
        advice = "Free some space there" if full else "Make the directory writable"
        return StorageError(
            f"Could not write {path.name} in {self.directory}: {found} ({needed / 2**20:.2f} MiB "
            f"needed, {free}). {advice}, or move it elsewhere and set traindir; what is there is whole, and the same "
            "command goes on from it."
        )

    # Reading

    def _load(self, stored: dict[int, list[_Stored]]) -> None:
        """Read the newest `capacity` steps of these files; count the rest."""
        own = [ident for ident in sorted(stored) if ident != OLDER]
        self._reading = _Reading(self.directory, sum(map(len, stored.values())))
        lengths = {ident: sum(piece.length for piece in stored[ident]) for ident in stored}
        rows = dict(zip(own, _share([lengths[ident] for ident in own], self.capacity), strict=True))
        if OLDER in stored:  # what another port recorded came before what this one did
            rows[OLDER] = min(lengths[OLDER], self.capacity - sum(rows.values()))
        for ident in sorted(stored):
            stream = self._streams[ident]
            kept = self._load_stream(stream, stored[ident], rows[ident])
            self._entries += len(stream)
            removed = self._ledger.of(ident)
            self._steps += sum(piece.steps for piece in kept) + removed.steps
            self._episodes += len({piece.episode for piece in kept} - {removed.episode}) + removed.episodes
            stream.episode = max(piece.episode for piece in stored[ident])
            if ident != OLDER:
                self._files[ident] = deque(kept)
                self._filed += sum(piece.length for piece in kept)
            stream.piece_start = stream.end
            stream.next_online = max(stream.begin, stream.end - 1)
        self._steps += self._ledger.lost if self._ledger else 0
        for ident, removed in self._ledger.removed.items() if self._ledger else ():
            if ident not in stored:  # nothing of it is left
                self._steps += removed.steps
                self._episodes += removed.episodes
                if ident in self._streams:
                    self._streams[ident].resume_at(removed.entries)
                    self._streams[ident].episode = removed.episode
        if self._ignored:
            log.info("Keys in %s that are not learned from: %s", self.directory, ", ".join(sorted(self._ignored)))
        if stored:
            log.info(
                "Read %d steps from %s (%d agent steps stored, %d damaged files)",
                self._entries,
                self.directory,
                self._steps,
                self._counts["corrupt"],
            )

    def _scan(self) -> dict[int, list[_Stored]]:
        """The files of each stream, in order, one per piece."""
        pieces: dict[tuple, list[_Stored]] = {}
        older = []
        for path in sorted(self.directory.glob("*.npz*")):
            if path.name.endswith(".npz.tmp") and NAME.fullmatch(path.name[:-4]):
                if not self.read_only:
                    path.unlink()  # of a write that did not end; what it held is not counted anywhere
            elif match := NAME.fullmatch(path.name):
                piece = _Stored(path, *map(int, match.groups()))
                if self._ledger.of(piece.stream).covers(piece.episode, piece.piece):
                    if not self.read_only:
                        path.unlink()  # a crash left it
                    continue
                pieces.setdefault(piece[1:4], []).append(piece)
            elif path.suffix == ".npz":
                older.append(path)
        stored: dict[int, list[_Stored]] = {}
        for _, versions in sorted(pieces.items()):
            if piece := self._longest(versions):
                stored.setdefault(piece.stream, []).append(piece)
        for number, path in enumerate(older):
            if length := self._stored_length(path):
                stored.setdefault(OLDER, []).append(_Stored(path, OLDER, number, 0, length))
        return stored

    def _longest(self, versions: list[_Stored]) -> _Stored | None:
        """Of the files of one piece the longest that can be read; the shorter ones, which it contains, are removed."""
        if len(versions) == 1:
            return versions[0]
        ordered = sorted(versions, key=lambda piece: -piece.length)
        best = next((piece for piece in ordered if self._read(piece) is not None), None)
        for piece in ordered:
            if best and piece.length < best.length and not self.read_only:
                piece.path.unlink()
        return best

    def _stored_length(self, path: Path) -> int:
        """Rows of an older port's file, from the header of its rewards (names count steps or rows); 0 if damaged."""
        try:
            with zipfile.ZipFile(path) as archive:
                names = sorted(name.removesuffix(".npy") for name in archive.namelist())
                if "reward" in names:
                    with archive.open("reward.npy") as file:
                        if length := header_shape(file)[0]:
                            return length
                        raise _Damaged("no rows")
        except Exception as error:  # a damaged archive can raise nearly anything
            _raise_unless_damaged(path, error)
            self._set_aside(path, error)
            return 0
        raise ReplayError(
            f"{path} has no reward. Found the keys {names}; expected "
            f"{sorted([*self._obs, 'action', 'reward'])}. Move files that are not episodes elsewhere."
        )

    def _load_stream(self, stream: _Stream, stored: list[_Stored], rows: int) -> list[_Stored]:
        """Append the last `rows` rows of these files; returns the files that are not damaged."""
        skip = sum(piece.length for piece in stored) - rows
        longest: dict[int, int] = {}
        for piece in stored:
            longest[piece.episode] = max(piece.length, longest.get(piece.episode, 0))
        kept: list[_Stored] = []
        removed = self._ledger.of(stream.id)
        previous, position = None, removed.entries
        for piece in stored:
            self._reading.one_more()
            if skip < piece.length:
                data = self._read(piece)
                if data is None:
                    previous, skip = None, 0
                    continue
                if not len(stream):
                    stream.resume_at(position + skip)
                # Pieces of an episode are full but the last: a shorter one in the middle lost its end.
                joined = (
                    previous is not None
                    and previous.episode == piece.episode
                    and previous.piece + 1 == piece.piece
                    and previous.length == longest[piece.episode]
                )
                if not joined:
                    follows = (piece.episode, piece.piece) == (removed.episode, removed.piece + 1)
                    self._counts["gaps"] += piece.piece > 0 and not follows
                    self._counts["abandoned"] += stream.abandon()
                    data["is_first"][0] = True
                stream.extend({key: value[skip:] for key, value in data.items()})
            skip = max(0, skip - piece.length)
            position += piece.length
            previous = piece
            kept.append(piece)
        if not len(stream):
            stream.resume_at(position)
        self._counts["abandoned"] += stream.abandon()
        return kept

    def _read(self, piece: _Stored) -> dict[str, np.ndarray] | None:
        """The rows of a file in the form in which they are kept, or None for a damaged one, which is set aside."""
        wanted = {*self._obs, *(f"present/{key}" for key in self._obs), *RESERVED}
        try:
            names, raw = read_npz(piece.path, wanted)
        except Exception as error:  # a damaged archive can raise nearly anything
            _raise_unless_damaged(piece.path, error)
            return self._set_aside(piece.path, error)
        missing = [key for key in (*self._obs, "action", "reward") if key not in raw]
        if missing:
            raise ReplayError(
                f"{piece.path} lacks {', '.join(missing)}. Found the keys {names}; expected "
                f"{sorted([*self._obs, 'action', 'reward'])}. Choose other observation keys or another "
                "directory."
            )
        self._ignored.update(set(names) - wanted)
        try:
            return self._convert(raw, piece)
        except _Damaged as error:
            return self._set_aside(piece.path, error)

    def _convert(self, raw: dict[str, np.ndarray], piece: _Stored) -> dict[str, np.ndarray]:
        count = piece.length
        short = {key: value.shape for key, value in raw.items() if value.shape[:1] != (count,)}
        if short or not count:
            raise _Damaged(f"expected {count} rows, found {short}")
        rows = read_flags(raw, count, older=piece.stream == OLDER)

        def name() -> str:
            return str(piece.path)

        try:
            reward = raw["reward"].reshape(count) if raw["reward"].size == count else raw["reward"]  # also [N, 1]
            rows["reward"] = _fit("reward", reward, (count,), np.dtype(np.float32), name)
            action = as_vectors(raw["action"], self.action_size, name)
            action = _fit("action", action, (count, self.action_size), np.dtype(np.float32), name)
            for key, (shape, dtype) in self._obs.items():
                rows[key] = _fit(f"observation {key!r}", raw[key], (count, *shape), dtype, name)
                rows[f"present/{key}"] = raw.get(f"present/{key}", np.ones(count, bool)).astype(bool)
            for key, (low, high) in self._ids.items():
                held = rows[key][rows[f"present/{key}"]]
                if ((held < low) | (held > high)).any():
                    raise ReplayError(
                        f"{name()}: '{key}' holds ids outside of its space ({np.min(low)} to {np.max(high)}), as of an "
                        "environment that has changed since. Move the file away, or use another folder."
                    )
        except _NotFinite as error:  # of the file, not of the configuration
            raise _Damaged(str(error)) from error
        if piece.stream == OLDER and "is_last" not in raw:
            action = align_actions(raw["action"], action)
        rows["action"] = np.where(rows["is_last"][:, None], np.float32(0), action)
        return rows

    def _set_aside(self, path: Path, error: Exception) -> None:
        """Never delete: move a damaged file to `corrupt/`, or only leave it out where nothing may be written."""
        self._counts["corrupt"] += 1
        reason = f"{type(error).__name__}: {error}".removeprefix("_Damaged: ")
        if self.read_only:
            log.warning("%s is damaged (%s) and is left out.", path, reason)
            return
        folder = path.parent / "corrupt"
        folder.mkdir(exist_ok=True)
        target, number = folder / path.name, 1
        while target.exists():
            target, number = folder / f"{path.name}.{number}", number + 1
        os.replace(path, target)
        log.warning("%s is damaged (%s); moved to %s and left out.", path, reason, target)

    # Saving

    def state(self) -> dict:
        """What a checkpoint must hold besides the files: generator, online queue, position of each stream, counters.

        Only dictionaries, lists, strings and numbers, so that `torch.load(weights_only=True)` takes it. Call `flush`
        first: the positions count what is on disk. `steps` tells what the checkpoint has seen.
        """
        return {
            "version": 1,
            "generator": json.dumps(self._rng.bit_generator.state),
            "steps": int(self._steps),
            "streams": {
                str(stream.id): {"end": int(stream.end), "next_online": int(stream.next_online)}
                for stream in self._streams.values()
            },
            "queue": [[int(stream), int(start)] for stream, start in self._queue],
            "counts": {key: int(self._counts[key]) for key in SAVED},
        }

    def ended_since(self, state: dict) -> int:
        """Episodes that ended in steps that are newer than `state`, without those that were cut."""
        ended = 0
        for ident, stream in self._streams.items():
            since = max(stream.begin, state["streams"].get(str(ident), {"end": 0})["end"])
            last = np.flatnonzero(stream.read("is_last", since, stream.end)) + since if since < stream.end else ()
            ended += sum(int(position) not in stream.cut for position in last)
        return ended

    def load_state(self, state: dict) -> None:
        """Continue as the replay that gave `state`.

        Steps stored after the checkpoint are kept and join the online queue; windows of the queue that no longer exist
        are dropped and counted. What the files said (steps, episodes, damage) is not overruled. Raises ReplayError for
        an unknown version.
        """
        if state.get("version") != 1:
            raise ReplayError(
                f"Found replay state of version {state.get('version')}, expected 1; this checkpoint is "
                "of another release."
            )
        self._rng.bit_generator.state = json.loads(state["generator"])
        self._counts.update({key: state["counts"][key] for key in SAVED})
        if self._steps < state["steps"]:
            log.warning(
                "%s holds %d agent steps, and the checkpoint has seen %d: pieces are damaged or were taken away. The "
                "counters go on from the checkpoint's. (To bound what the folder holds, give --keep_on_disk STEPS.)",
                self.directory,
                self._steps,
                state["steps"],
            )
            if self._ledger and not self.read_only:
                self._ledger.lost += state["steps"] - self._steps
                self._ledger.write()
            self._steps = state["steps"]
        elif self._steps > state["steps"]:
            log.info("The replay holds %d agent steps, the checkpoint has seen %d.", self._steps, state["steps"])
        if not self.online:
            return
        saved = [tuple(item) for item in state["queue"]]
        self._queue = deque(item for item in saved if self._has_window(*item))
        self._counts["online_dropped"] += len(saved) - len(self._queue)
        newer = []
        for ident, stream in self._streams.items():
            if str(ident) not in state["streams"]:
                continue
            begin = state["streams"][str(ident)]["next_online"]
            stream.next_online = min(max(begin, stream.begin), max(stream.begin, stream.end - 1))
            while stream.next_online + self.length < stream.end:
                newer.append((stream.next_online - begin, ident, stream.next_online))
                stream.next_online += self.length
        self._queue.extend((ident, start) for _, ident, start in sorted(newer))  # side by side, as they were collected

    def _make_schema(self) -> dict[str, tuple[tuple, np.dtype]]:
        schema = dict(self._obs)
        schema |= {f"present/{key}": ((), np.dtype(bool)) for key in self._obs}
        schema |= {"reward": ((), np.dtype(np.float32)), **{key: ((), np.dtype(bool)) for key in FLAGS}}
        schema["action"] = ((self.action_size,), np.dtype(np.float32))
        if self.latent:
            classes = self.latent["classes"]
            kind = np.float16 if not classes else np.uint8 if classes <= 256 else np.uint16
            schema[DETER] = ((self.latent["deter"],), np.dtype(np.float16))
            schema[STOCH] = ((self.latent["stoch"],), np.dtype(kind))
            schema[VALID] = ((), np.dtype(bool))
        return schema


class _Reading:
    """Says how far a long reading of many files has come."""

    def __init__(self, directory: Path | None, total: int, seconds: float = 5.0):
        self._directory, self._total, self._seconds = directory, total, seconds
        self._done, self._next = 0, time.monotonic() + seconds

    def one_more(self) -> None:
        self._done += 1
        if time.monotonic() > self._next:
            self._next = time.monotonic() + self._seconds
            log.info("Reading %s: %d of %d files", self._directory, self._done, self._total)


def episodes_begun(directory: Path) -> int:
    """Episodes that streams have begun in a directory, by the names of its files and by its ledger; grows with every
    one that is stored.
    """
    if not directory.is_dir():
        return 0
    last = {stream: removed.episode for stream, removed in Ledger(directory).removed.items()}
    for name in os.listdir(directory):
        if match := NAME.fullmatch(name):
            stream, episode = int(match[1]), int(match[2])
            last[stream] = max(episode, last.get(stream, -1))
    return sum(episode + 1 for episode in last.values())


def _raise_unless_damaged(path: Path, error: Exception) -> None:
    """StorageError for a failure of the machine: no memory, no more open files, a disk or a network that fails.

    Only a file that is wrong itself may be set aside. A size in it that is not true looks like a lack of memory.
    """
    if machine_failed(error) or (isinstance(error, MemoryError) and _intact(path)):
        reason = getattr(error, "strerror", None) or str(error) or "not enough memory"
        raise StorageError(
            f"Could not read {path}: {reason}. It is left as it is. Once that is mended, the same command goes on."
        ) from error


def _intact(path: Path) -> bool:
    """Whether the checksums of an archive are right; reads it in small parts."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, ValueError, EOFError):
        return False
    except MemoryError:
        return True


def _is_frame(shape: tuple, dtype: np.dtype) -> bool:
    return dtype == np.uint8 and len(shape) == 3


class _NotFinite(ReplayError):
    """NaN or infinity."""


def _id_range(space) -> tuple[np.ndarray, np.ndarray] | None:
    """Lowest and highest id of a discrete space; the networks have rows for these alone. None for any other."""
    count = getattr(space, "n", getattr(space, "nvec", None))
    if count is None or np.dtype(space.dtype).kind not in "iu" or not hasattr(space, "start"):
        return None
    start = np.asarray(space.start)
    return start, start + np.asarray(count) - 1


def _kept(key: str, space) -> tuple[tuple, np.dtype]:
    """Shape and dtype in which an observation is kept."""
    if key in RESERVED or key.startswith(("present/", "latent/", "log_")):
        raise ReplayError(f"The observation key {key!r} has a meaning of its own here; rename it in the environment.")
    if space.shape is None or space.dtype is None or np.dtype(space.dtype).kind not in "biuf":
        raise ReplayError(
            f"The observation {key!r} is a {type(space).__name__}; expected numbers of one shape. "
            "Flatten or tokenize it."
        )
    dtype = np.dtype(space.dtype)
    return tuple(space.shape), np.dtype(np.float32) if dtype == np.float64 else dtype


def _fit(what: str, value, shape: tuple, dtype: np.dtype, name: Callable[[], str]) -> np.ndarray:
    """`value` as an array of that shape and dtype; ReplayError if it does not fit, or is not finite."""
    value = np.asarray(value)
    if value.shape != shape:
        raise ReplayError(
            f"{what} from {name()}: found shape {value.shape}, expected {shape}; make space and data agree."
        )
    if not np.can_cast(value.dtype, dtype, "same_kind"):
        raise ReplayError(f"{what} from {name()}: found {value.dtype}, expected {dtype}; make space and data agree.")
    with np.errstate(over="ignore"):
        value = value.astype(dtype, copy=False)
    if dtype.kind == "f" and not np.isfinite(value).all():
        bad = np.argwhere(~np.isfinite(value))
        at = f" at index {tuple(bad[0].tolist())}" if value.ndim else ""
        raise _NotFinite(
            f"{what} from {name()}: found {value[tuple(bad[0])]}{at} ({len(bad)} of {value.size} numbers "
            "are not finite), expected finite numbers; look for the cause in the environment."
        )
    return value


def _fit_rows(
    what: str, values, given: np.ndarray, shape: tuple, dtype: np.dtype, name: Callable[[int], str]
) -> np.ndarray:
    """`values` of N steps, each as `_fit` makes it; zeros where not `given` [N] (there they are not looked at)."""
    if given.all():
        values = np.asarray(values)
        try:  # all at once
            return _fit(what, values, (len(given), *shape), dtype, lambda: "all environments")
        except ReplayError:
            if values.shape[:1] != given.shape:
                raise
    rows = np.zeros((len(given), *shape), dtype)
    for index in np.flatnonzero(given).tolist():  # one by one, to say which
        rows[index] = _fit(what, values[index], shape, dtype, lambda index=index: name(index))
    return rows


def _finite_rows(value: np.ndarray) -> np.ndarray:
    """Whether value[i] is finite throughout, [B] bool; float16 (what is kept) or integers."""
    if value.dtype != np.float16:
        return np.ones(len(value), bool)
    bits = value.reshape(len(value), -1).view(np.uint16)  # a tenth of the time of np.isfinite on float16
    return (bits & 0x7FFF).max(1, initial=0) < 0x7C00  # beyond sign: infinity and all NaN


def _share(lengths: list[int], room: int) -> list[int]:
    """How many of its newest rows each stream keeps: equal parts of `room`; what short streams leave, others take."""
    shares = [0] * len(lengths)
    for done, index in enumerate(sorted(range(len(lengths)), key=lengths.__getitem__)):
        shares[index] = min(lengths[index], room // (len(lengths) - done))
        room -= shares[index]
    return shares


SequenceReplayBuffer = Replay
