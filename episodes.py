"""Episodes as `.npz` files: how one is written, what older ports wrote differently, and what spaces they tell of.

`replay.py` keeps pieces of episodes in such files; here is what does not depend on the replay.
"""

import contextlib
import functools
import io
import logging
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from files import sync_folder

log = logging.getLogger(__name__)

FLAGS = ("is_first", "is_last", "is_terminal")
RESERVED = {*FLAGS, "action", "reward", "discount"}


class ReplayError(ValueError):
    """Data or settings that do not fit the replay; what was given with them is not stored."""


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Like np.savez, for any key, and so that the file is either complete or not there (OSError: nothing is left)."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # someone may have deleted it
        with open(temporary, "wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                for key, value in arrays.items():
                    with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, np.ascontiguousarray(value), allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # not even that on a disk that fails
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def read_npz(path: Path, wanted: set[str]) -> tuple[list[str], dict[str, np.ndarray]]:
    """Names of a file's arrays, and those of them that are wanted. Errors as of np.load; never a pickle.

    Files as `write_npz` writes them are read in a fifth of np.load's time, which matters for 50,000 pieces: that one
    opens every array as a file. Anything else, and anything that is damaged, is left to np.load.
    """
    data = path.read_bytes()
    try:
        members = _stored_members(data)
        arrays = {name: _array(data, *place) for name, place in members.items() if name in wanted}
        return sorted(members), arrays
    except (_Foreign, struct.error, IndexError, ValueError, UnicodeDecodeError):
        pass
    with np.load(path, allow_pickle=False) as file:
        names = sorted(file.files)
        return names, {key: file[key] for key in names if key in wanted}


class _Foreign(Exception):
    """Not as `write_npz` writes it."""


def _stored_members(data: bytes) -> dict[str, tuple[int, int]]:
    """{name: (start, stop)} of the uncompressed members of a zip archive without a comment, checksums compared."""
    signature, *_, count, _, at, _ = struct.unpack_from("<4s4H2LH", data, len(data) - 22)
    if signature != b"PK\5\6":
        raise _Foreign
    members = {}
    for _ in range(count):
        signature, _, _, flags, method, _, _, crc, packed, size, length, extra, comment, _, _, _, offset = (
            struct.unpack_from("<4s6H3L5H2L", data, at)
        )
        name = data[at + 46 : at + 46 + length].decode()
        at += 46 + length + extra + comment
        local, length, extra = struct.unpack_from("<4s22x2H", data, offset)
        start = offset + 30 + length + extra
        if signature != b"PK\1\2" or local != b"PK\3\4" or flags & 1 or method or packed != size:
            raise _Foreign
        if not name.endswith(".npy") or zlib.crc32(memoryview(data)[start : start + size]) != crc:
            raise _Foreign
        members[name.removesuffix(".npy")] = (start, start + size)
    return members


def _array(data: bytes, start: int, stop: int) -> np.ndarray:
    if data[start : start + 8] != b"\x93NUMPY\1\0":
        raise _Foreign
    begin = start + 10 + int.from_bytes(data[start + 8 : start + 10], "little")
    dtype, shape, fortran = _header(data[start:begin])
    count = math.prod(shape)
    if fortran or dtype.hasobject or begin + count * dtype.itemsize != stop:
        raise _Foreign
    return np.frombuffer(data, dtype, count, begin).reshape(shape)


@functools.lru_cache(1024)
def _header(header: bytes) -> tuple[np.dtype, tuple, bool]:
    """Few headers stand in many files, and evaluating one takes longer than all the rest."""
    file = io.BytesIO(header)
    np.lib.format.read_magic(file)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    return dtype, shape, fortran


def header_shape(file) -> tuple:
    """Shape of the array of an open .npy file, without reading the array."""
    major, _ = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    return read(file)[0]


def read_flags(raw: dict[str, np.ndarray], count: int, older: bool) -> dict[str, np.ndarray]:
    """is_first, is_last, is_terminal [N] bool of a file; what an older port did not write follows from the rest."""
    rows = {key: raw[key].reshape(count).astype(bool) if key in raw else np.zeros(count, bool) for key in FLAGS}
    if "is_terminal" not in raw and "discount" in raw:
        rows["is_terminal"] = raw["discount"].reshape(count) == 0
    if older:
        rows["is_first"][0] = True
    if "is_last" not in raw:
        rows["is_last"][-1] = True
    rows["is_last"][:-1] |= rows["is_first"][1:]
    return rows


def as_vectors(action: np.ndarray, size: int, name: Callable[[], str]) -> np.ndarray:
    """Recorded actions as [N, A]: indices become one-hot."""
    flat = action.reshape(len(action), -1)
    if flat.shape[1] == size:
        return flat
    index = flat[:, 0]
    if flat.shape[1] != 1 or not (
        np.isfinite(index).all() and (index == np.floor(index)).all() and (index >= 0).all() and (index < size).all()
    ):
        raise ReplayError(
            f"action from {name()}: found shape {action.shape}, expected {(len(action), size)}, or "
            f"indices below {size}; make the action space and the recorded data agree."
        )
    return np.eye(size, dtype=np.float32)[index.astype(np.int64)]


def align_actions(recorded: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Actions [N, A] chosen *at* each row, from a file of an older port (one without is_last).

    Those ports keep in row t the action that led to row t, so row 0 is zero. That is how they are told: if row 0 is
    zero and another row is not, action[t] = recorded[t + 1] and the last is zero. Otherwise the actions are taken as
    they are.
    """
    if recorded[0].any() or not recorded.any():
        return vectors
    return np.concatenate([vectors[1:], np.zeros_like(vectors[:1])])


def infer_spaces(directory: Path | str) -> tuple[dict, object]:
    """Observation spaces and action space from recorded files, to train without an environment.

    Observations are the keys beside flags, action, reward, `present/*`, `log_*` and `logprob`: Box of the recorded
    shape and dtype: 0 to 255 for uint8, from 0 or the lowest to the highest for other integers (a text has as many ids
    as were recorded), unbounded for floats. The action space is Discrete(n) if every action of every
    file is one-hot or zero, or a whole number; otherwise Box(-1, 1). Several one-hots side by side (MultiDiscrete)
    cannot be told apart and give a Box. Damaged files are passed over. Raises ReplayError if nothing can be read, or
    two files differ in keys or shapes.
    """
    from gymnasium import spaces  # here, and below: the replay does without

    if not Path(directory).is_dir():
        raise ReplayError(f"{directory} is not a directory; give offline_traindir a folder of .npz episodes.")
    found, first, widths, highest, discrete, chosen = None, None, set(), 0, True, False
    wide, bounds = set(), {}  # integers that may be ids, and the range of those that were recorded
    for path in sorted(Path(directory).glob("*.npz")):
        try:
            with np.load(path, allow_pickle=False) as file:
                action = file["action"]
                whole = found is None
                names = {
                    key
                    for key in file.files
                    if key not in RESERVED | {"logprob"} and not key.startswith(("present/", "log_"))
                }
                arrays = {key: file[key] for key in (sorted(names) if whole else wide & names)}
        except PermissionError:
            raise
        except Exception as error:  # a damaged archive can raise nearly anything
            log.warning("%s cannot be read (%s: %s): its spaces are not known.", path, type(error).__name__, error)
            continue
        if whole:
            found, first = {key: (value.shape[1:], value.dtype) for key, value in arrays.items()}, path
            wide = {key for key, (_, dtype) in found.items() if dtype.kind in "iu" and dtype.itemsize > 1}
        elif names != set(found):
            raise ReplayError(
                f"{path} and {first} hold different observations: {sorted(names)} and {sorted(found)}; "
                "keep one kind of episode per directory."
            )
        for key in wide:
            low, high = bounds.get(key, (0, 1))
            bounds[key] = min(low, int(arrays[key].min(initial=0))), max(high, int(arrays[key].max(initial=0)))
        flat = action.reshape(len(action), -1)
        widths.add(flat.shape[1])
        if flat.shape[1] == 1 and action.dtype.kind in "iu":
            highest, chosen = max(highest, int(flat.max(initial=0))), True
        else:
            discrete &= flat.shape[1] > 1 and bool(np.isin(flat, (0, 1)).all() and (flat.sum(1) <= 1).all())
            chosen |= bool(flat.any())
    if found is None or len(widths) != 1:
        problem = "no file with an action could be read" if found is None else f"actions of lengths {sorted(widths)}"
        raise ReplayError(f"{directory}: {problem}; expected .npz episodes of one environment.")
    width = widths.pop()
    act_space = spaces.Box(-1, 1, (width,), np.float32)
    if discrete and chosen:  # all zero tells nothing
        act_space = spaces.Discrete(highest + 1 if width == 1 else width)
    return {key: _infer_box(shape, dtype, *bounds.get(key, ())) for key, (shape, dtype) in found.items()}, act_space


def _infer_box(shape: tuple, dtype: np.dtype, low: int | None = None, high: int | None = None):
    from gymnasium import spaces

    if dtype.kind == "f":
        return spaces.Box(-np.inf, np.inf, shape, np.float32)
    if dtype.kind == "b":
        return spaces.Box(0, 1, shape, np.uint8)
    limits = np.iinfo(dtype)
    return spaces.Box(limits.min if low is None else low, limits.max if high is None else high, shape, dtype)


def sample_episodes(
    episodes: dict[str, dict[str, np.ndarray]], length: int, seed: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """Yield windows of exactly `length` steps, for ever, as dictionaries of fresh arrays [length, ...].

    episodes: name -> key -> [steps, ...]; it may grow or shrink meanwhile. A window starts at a step drawn uniformly
    from all steps of all episodes (short ones are not favoured). Where the episode ends before the window does, another
    one, drawn in proportion to its length, follows from its beginning. `is_first` is set at the window's start and at
    each such border. `log_*` is left out. Raises ReplayError if there is no step.
    """
    rng = np.random.default_rng(seed)
    while True:
        parts, size = [], 0
        while size < length:
            held = list(episodes.values())
            bounds = np.cumsum([len(next(iter(episode.values()))) for episode in held])
            if not len(bounds) or not bounds[-1]:
                raise ReplayError("There are no steps in the episodes to sample from; record or load some first.")
            draw = int(rng.integers(bounds[-1]))
            index = int(np.searchsorted(bounds, draw, side="right"))
            episode = held[index]
            start = 0 if parts else draw - int(bounds[index - 1] if index else 0)
            part = {
                key: value[start : start + length - size]
                for key, value in episode.items()
                if not key.startswith("log_")
            }
            if "is_first" in part:
                part["is_first"] = part["is_first"].copy()
                part["is_first"][0] = True
            parts.append(part)
            size += len(next(iter(part.values())))
        yield {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
