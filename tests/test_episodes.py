"""Windows out of episodes, against the counts that a uniform draw gives. (Files: `test_replay.py`.)"""

import itertools
import zipfile

import numpy as np
import pytest

from episodes import ReplayError, read_npz, sample_episodes, write_npz


def test_sample_episodes():
    episodes = {
        str(e): {
            "code": np.stack([np.full(n, e), np.arange(n)], 1),
            "is_first": np.arange(n) == 0,
            "log_x": np.zeros(n),
        }
        for e, n in enumerate([3, 40, 10])
    }
    counts = np.zeros(53)
    generator = sample_episodes(episodes, 12, seed=1)
    for window in itertools.islice(generator, 4000):
        assert set(window) == {"code", "is_first"} and len(window["code"]) == 12 and window["is_first"][0]
        code, is_first = window["code"], window["is_first"]
        for (episode, t), (after, then), first in zip(code[:-1], code[1:], is_first[1:], strict=True):
            ends = t == [3, 40, 10][episode] - 1
            assert first == ends and (then == 0 if ends else (after, then) == (episode, t + 1))
        episode, t = window["code"][0]
        counts[[0, 3, 43][episode] + t] += 1
    chi = ((counts - 4000 / 53) ** 2 / (4000 / 53)).sum()
    assert abs(chi - 52) < 4.5 * np.sqrt(104)
    assert not episodes["1"]["is_first"][1:].any()  # the given arrays are left alone
    again = next(sample_episodes(episodes, 12, seed=1))
    assert np.array_equal(again["code"], next(sample_episodes(episodes, 12, seed=1))["code"])
    with pytest.raises(ReplayError, match="no steps"):
        next(sample_episodes({}, 4))


@pytest.mark.parametrize("how", ["write_npz", "savez", "savez_compressed", "commented"])
def test_a_file_reads_as_np_load_reads_it(tmp_path, how, monkeypatch):
    rng = np.random.default_rng(0)
    arrays = {
        "image": rng.integers(0, 255, (7, 4, 4, 3), np.uint8),
        "is_first": np.arange(7) == 0,
        "reward": rng.normal(size=7).astype(np.float32),
        "deep/key": rng.normal(size=(7, 2)),
        "transposed": np.asfortranarray(rng.normal(size=(7, 3))),
        "none": np.zeros((0, 3)),
    }
    path = tmp_path / "piece.npz"
    write = {"savez": np.savez, "savez_compressed": np.savez_compressed}.get(how)
    write(path, **arrays) if write else write_npz(path, arrays)
    if how == "commented":
        with zipfile.ZipFile(path, "a") as archive:
            archive.comment = b"a comment"
    loaded, load = [], np.load
    monkeypatch.setattr(np, "load", lambda *args, **kwargs: loaded.append(args) or load(*args, **kwargs))
    names, found = read_npz(path, set(arrays) - {"image"})
    assert names == sorted(arrays) and found.keys() == arrays.keys() - {"image"}
    for key, value in found.items():
        assert value.dtype == arrays[key].dtype and np.array_equal(value, arrays[key])
    assert bool(loaded) == (how in ("savez", "savez_compressed", "commented"))  # savez keeps the transposed order


def test_every_flipped_byte_is_found_or_changes_nothing(tmp_path):
    """Bytes of the archive's own bookkeeping may not matter; those of the arrays do, and have checksums."""
    path = tmp_path / "piece.npz"
    write_npz(path, {"reward": np.arange(5, dtype=np.float32), "is_last": np.arange(5) == 4})
    whole, found = path.read_bytes(), 0
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            names, arrays = read_npz(path, {"reward", "is_last"})
        except Exception:
            found += 1
            continue
        if names == ["is_last", "reward"]:
            assert arrays["reward"].tolist() == [0, 1, 2, 3, 4] and arrays["is_last"].tolist() == [False] * 4 + [True]
    assert found > len(whole) / 3


def test_no_pickle_is_read(tmp_path):
    path = tmp_path / "piece.npz"
    np.savez(path, reward=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="pickle"):
        read_npz(path, {"reward"})
