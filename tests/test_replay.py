"""The replay, against an environment-like stream in which every number tells where it belongs."""

import errno
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from gymnasium import spaces

import replay as module
import storage
from episodes import infer_spaces
from replay import Replay, ReplayError, StorageError

ROOT = Path(__file__).resolve().parent.parent
SPACES = {"code": spaces.Box(-np.inf, np.inf, (3,), np.float64), "image": spaces.Box(0, 255, (4, 4, 3), np.uint8)}
LATENT = {"deter": 6, "stoch": 4, "classes": 5}


def make(directory=None, **changes) -> Replay:
    options = {"latent": LATENT, "capacity": 4000, "length": 8, "streams": 2, "seed": 0, "online": False} | changes
    return Replay(directory, SPACES, 2, **options)


def step(stream: int, episode: int, t: int, last: bool, terminal: bool = False) -> dict:
    """Observation (stream, episode, t); reward t; action (t, episode), chosen here."""
    return {
        "code": np.array([stream, episode, t], np.float64),
        "image": np.full((4, 4, 3), t % 256, np.uint8),
        "reward": np.float32(t),
        "is_first": t == 0,
        "is_last": last,
        "is_terminal": terminal,
        "log_x": 1.0,
        "action": np.array([t + 1, episode + 1], np.float32),
    }


def fill(replay: Replay, lengths, stream: int = 0, latent: bool = False, first: int = 0) -> None:
    for episode, length in enumerate(lengths, first):
        for t in range(length):
            state = (np.full(6, t / 100), np.full(4, t % 5)) if latent else None
            replay.add(stream, step(stream, episode, t, t == length - 1), state)


def check_window(batch, row: int, lengths: dict | list) -> None:
    """Every step follows the one before it; `lengths[episode]` tells where episodes end."""
    code, action = batch["code"][row].astype(int), batch["action"][row]
    assert len(set(code[:, 0])) == 1, "never across streams"
    for now, then in itertools.pairwise(range(len(code))):
        (_, episode, t), (_, next_episode, next_t) = code[now], code[then]
        ends = t == lengths[episode] - 1
        assert (next_episode, next_t) == ((episode + 1, 0) if ends else (episode, t + 1))
    for k, (_, episode, t) in enumerate(code):
        last = t == lengths[episode] - 1
        assert batch["is_first"][row, k] == (t == 0) and batch["is_last"][row, k] == last
        assert batch["reward"][row, k] == t and (batch["image"][row, k] == t % 256).all()
        assert np.array_equal(action[k], [0, 0] if last else [t + 1, episode + 1])
    # the context step is the one before: its action led to the first trained step
    _, episode, t = code[0]
    expected = [0, 0] if t == 0 else [t, episode + 1]
    assert np.array_equal(batch.context["action"][row], expected)


def contents(replay: Replay, stream: int = 0) -> dict[str, np.ndarray]:
    held = replay._streams[stream]
    return {key: held.read(key, held.begin, held.end) for key in replay._schema} if len(held) else {}


def names(directory) -> list[str]:
    return sorted(path.name for path in Path(directory).iterdir() if path.is_file())


# Windows


def test_windows_pair_steps_and_cross_episodes():
    replay = make(length=8)
    lengths = {0: [3, 20, 1, 2, 50, 5, 40], 1: [60, 2, 2, 30]}
    for stream, each in lengths.items():
        fill(replay, each, stream)
    assert replay.windows == sum(sum(each) - 8 for each in lengths.values())
    crossed, starts = 0, set()
    for _ in range(200):
        batch = replay.sample(4)
        for row in range(4):
            check_window(batch, row, lengths[int(batch["code"][row, 0, 0])])
            crossed += len(set(batch["code"][row, :, 1])) > 1
            starts.add((int(batch.where.streams[row]), int(batch.where.starts[row])))
    assert crossed > 100 and (0, 0) in starts and (0, sum(lengths[0]) - 9) in starts and (1, 0) in starts
    assert batch["image"].dtype == np.uint8 and batch["image"].shape == (4, 8, 4, 4, 3)
    assert batch["code"].dtype == np.float32
    assert all(batch[f"present/{key}"].all() for key in SPACES)


@pytest.mark.parametrize("large", [1, 10**6], ids=["runs of rows", "single rows"])
def test_windows_cross_slots(monkeypatch, large):
    monkeypatch.setattr(module, "SLOT", 5)
    monkeypatch.setattr(storage, "LARGE", large)
    replay = make(length=12)
    lengths = [9] * 12
    fill(replay, lengths, latent=True)
    for _ in range(40):
        batch = replay.sample(4)
        for row in range(4):
            check_window(batch, row, lengths)
            before = (int(batch["code"][row, 0, 2]) - 1) % 9
            assert batch.context["valid"][row] and np.all(batch.context["deter"][row] == np.float16(before / 100))
            assert (batch.context["stoch"][row] == before % 5).all()


def test_sampling_is_uniform_over_start_positions():
    replay = make(length=4)
    fill(replay, [2, 3, 30, 1, 10], 0)
    fill(replay, [25], 1)
    counts = np.zeros((2, 64))
    draws = 400 * replay.windows
    where = [replay._choose(100) for _ in range(draws // 100)]
    for each in where:
        np.add.at(counts, (each.streams, each.starts), 1)
    seen = counts[counts > 0]
    assert len(seen) == replay.windows == (46 - 4) + (25 - 4)
    chi = ((seen - draws / replay.windows) ** 2 / (draws / replay.windows)).sum()
    freedom = replay.windows - 1
    assert abs(chi - freedom) < 4.5 * np.sqrt(2 * freedom)


def test_no_window_is_an_error_and_the_smallest_has_one():
    replay = make(length=8)
    fill(replay, [8])
    with pytest.raises(ReplayError, match="found 8 steps.*expected at least 9"):
        replay.sample(1)
    fill(replay, [1], first=1)
    assert replay.windows == 1
    check_window(replay.sample(3), 2, [8, 1])


def test_out_is_filled_in_place_and_batches_are_fresh():
    replay = make()
    fill(replay, [40], latent=True)
    out = replay.empty(3)
    image, deter = out["image"], out.context["deter"]
    filled = replay.sample(3, out=out)
    assert filled is out and filled["image"] is image and filled.context["deter"] is deter
    check_window(out, 0, [40])
    first = replay.sample(2)
    kept = first["code"].copy()
    first["action"][:] = 99  # the caller may write
    replay.sample(2)
    assert np.array_equal(first["code"], kept) and not (contents(replay)["action"] == 99).any()
    with pytest.raises(ReplayError, match="expected 2"):
        replay.sample(2, out=out)


def test_steps_of_all_environments_at_once_are_those_one_by_one():
    """Also where some are not present, or end; what one cannot store, none stores."""
    one, all_at_once = make(), make()
    for t in range(30):
        steps = [step(stream, t // (9 + stream), t % (9 + stream), t % (9 + stream) == 8 + stream) for stream in (0, 1)]
        steps[1] |= {"present/image": t % 3 > 0}
        for stream in (0, 1):
            one.add(stream, steps[stream], (np.full(6, t), np.full(4, t % 5)))
        together = {key: np.stack([np.asarray(each.get(key, True)) for each in steps]) for key in steps[1]}
        all_at_once.add_all(together, (np.full((2, 6), t), np.full((2, 4), t % 5)))
    for stream in (0, 1):
        first, second = contents(one, stream), contents(all_at_once, stream)
        assert all(np.array_equal(value, second[key]) for key, value in first.items())
    assert one.stats() == all_at_once.stats() and same(one.sample(9), all_at_once.sample(9))
    together["code"][1, 2] = np.nan
    together |= {"is_first": np.ones(2, bool)}
    with pytest.raises(ReplayError, match=r"observation 'code' from stream 1 .*found nan at index \(2,\)"):
        all_at_once.add_all(together)
    with pytest.raises(ReplayError, match=r"'code' from all environments: found shape \(3, 3\)"):
        all_at_once.add_all(together | {"code": np.zeros((3, 3))})
    assert len(all_at_once) == 60


def test_missing_observation_means_not_present(tmp_path):
    replay = make(tmp_path, length=4)
    for t in range(12):
        given = step(0, 0, t, t == 11)
        if t in (3, 4):
            del given["image"]
        if t == 6:
            given |= {"present/code": False, "code": np.full(3, np.nan)}
        replay.add(0, given)
    for source in (replay, make(tmp_path, length=4)):
        held = contents(source)
        assert np.flatnonzero(~held["present/image"]).tolist() == [3, 4] and not held["image"][3:5].any()
        assert np.flatnonzero(~held["present/code"]).tolist() == [6] and not held["code"][6].any()
    with np.load(tmp_path / "s000-e000000-p000-0012.npz", allow_pickle=False) as file:
        assert {"present/image", "present/code"} < set(file.files)


# Latents


def test_latents_are_written_back_and_forgotten():
    replay = make(length=8)
    fill(replay, [100])
    batch = replay.sample(2)
    assert not batch.context["valid"].any() and not batch.context["deter"].any() and not batch.context["stoch"].any()
    t = batch["code"][..., 2].astype(int)
    replay.write_latents(batch.where, np.repeat(t[..., None] / 100, 6, -1), np.repeat(t[..., None] % 5, 4, -1))
    written, held = set(t.ravel().tolist()), contents(replay)
    assert set(np.flatnonzero(held[module.VALID]).tolist()) == written
    assert replay.stats()["latents_valid"] == len(written) / 100
    for position in written:
        assert (held[module.DETER][position] == np.float16(position / 100)).all()
        assert (held[module.STOCH][position] == position % 5).all() and held[module.STOCH].dtype == np.uint8
    fill(replay, [50], first=1)  # more steps do not disturb them
    assert contents(replay)[module.VALID].sum() == len(written)
    replay.forget_latents()
    assert replay.stats()["latents_valid"] == 0
    assert not replay.sample(50).context["deter"].any()


def test_bad_latents_are_counted_not_written():
    replay = make(length=8)
    fill(replay, [40])
    batch = replay.sample(3)
    deter = np.zeros((3, 8, 6), np.float32)
    deter[1, 3, 2], deter[2, 0, 0] = np.nan, 1e6  # the second overflows float16
    replay.write_latents(batch.where, deter, np.zeros((3, 8, 4), np.int64))
    start = int(batch.where.starts[0])
    valid = np.flatnonzero(contents(replay)[module.VALID])
    assert valid.tolist() == list(range(start + 1, start + 9)) and replay.stats()["latents_rejected"] == 2
    with pytest.raises(ReplayError, match="expected class indices"):
        replay.write_latents(batch.where, deter, np.zeros((3, 8, 4), np.float32))
    with pytest.raises(ReplayError, match=r"expected \(3, 8, 4\)"):
        replay.write_latents(batch.where, deter, np.zeros((3, 8, 4, 5), np.int64))


def test_gaussian_latents_and_none():
    replay = make(latent={"deter": 6, "stoch": 4, "classes": 0})
    for t in range(20):
        replay.add(0, step(0, 0, t, False), (np.zeros(6, np.float32), np.full(4, t / 8)))
    batch = replay.sample(4)
    assert batch.context["stoch"].dtype == np.float16
    assert np.array_equal(batch.context["stoch"][:, 0], (batch["code"][:, 0, 2] - 1) / 8)
    plain = make(latent=None)
    fill(plain, [20])
    assert set(plain.sample(2).context) == {"action", "valid"} and plain.bytes_per_step == 4 * 3 + 48 + 2 + 4 + 3 + 8


def test_latents_of_evicted_steps_are_dropped():
    replay = make(length=8, capacity=80, streams=1)
    fill(replay, [60])
    where = module.Where(np.array([0, 0]), np.array([0, 30]))
    fill(replay, [70], first=1)
    begin = replay._streams[0].begin
    assert begin > 38
    where = module.Where(np.array([0, 0]), np.array([0, begin - 4]))
    replay.write_latents(where, np.ones((2, 8, 6)), np.ones((2, 8, 4), int))
    assert np.flatnonzero(contents(replay)[module.VALID]).tolist() == [0, 1, 2, 3, 4]


# Capacity


@pytest.mark.parametrize("on_disk", [False, True])
def test_capacity_bounds_steps_and_bytes(tmp_path, on_disk):
    replay = make(tmp_path if on_disk else None, capacity=200, length=8)
    counter = [0, 0]
    rng = np.random.default_rng(0)
    for _ in range(1500):  # the first stream is much faster; episodes are longer than the memory
        stream = int(rng.random() < 0.05)
        t = counter[stream] % 700
        replay.add(stream, step(stream, counter[stream] // 700, t, t == 699))
        counter[stream] += 1
        assert len(replay) <= 200
    assert replay.stats()["bytes"] <= replay.estimate_bytes(200 + 2 * 25)
    assert replay._streams[1].end == counter[1] and len(replay) > 140
    for _ in range(20):
        batch = replay.sample(2)
        check_window(batch, 0, [700] * 3)
    if on_disk:  # everything that left the memory is on disk, in order
        replay.flush()
        everything = make(tmp_path, capacity=10000)
        assert len(everything) == 1500
        assert np.array_equal(contents(everything)["code"][:, 2], np.arange(counter[0]) % 700)
        assert replay.steps == everything.steps


def test_steps_that_are_not_written_yet_never_leave_the_memory(tmp_path):
    for stream in range(10):
        fill(make(tmp_path, streams=10), [40], stream)
    replay = make(tmp_path, capacity=100, streams=1)  # the others only lose steps
    for t in range(120):
        replay.add(0, step(0, 1, t, t == 119))
        assert len(replay) <= 100
    assert contents(make(tmp_path, capacity=1000))["code"][:, 2].tolist() == [*range(40), *range(120)]


def test_short_streams_stay_small():
    replay = make(capacity=1_000_000)
    fill(replay, [20])
    assert replay.stats()["bytes"] <= 32 * replay.bytes_per_step
    assert replay.estimate_bytes() == 1_000_000 * replay.bytes_per_step


def test_a_million_frames_fit_in_17_gb():
    """64x64x3 images with the latents of size12m: by the closed form, and by the arrays, of which none is touched."""
    space = {"image": spaces.Box(0, 255, (64, 64, 3), np.uint8)}
    latent = {"deter": 2048, "stoch": 32, "classes": 16}
    replay = Replay(None, space, 6, latent=latent, capacity=10**6, length=64, streams=16, seed=0)
    frame, state, action, reward, flags = 64 * 64 * 3, 2 * 2048 + 32 + 1, 4 * 6, 4, 3 + 1
    assert replay.bytes_per_step == frame + state + action + reward + flags == 16_449
    assert replay.estimate_bytes() == 16_449_000_000
    assert sum(rows.array.nbytes for rows in replay._memory.keys.values()) < 1.02 * replay.estimate_bytes() < 17e9


MEMORY = """
import json, sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import numpy as np
from gymnasium import spaces
from replay import Replay, Where

def resident(what):
    return int(next(line for line in open('/proc/self/status') if line.startswith(what)).split()[1]) * 1024

def make(**changes):
    space = {{'image': spaces.Box(0, 255, (32, 32, 3), np.uint8)}}
    latent = {{'deter': 1024, 'stoch': 32, 'classes': 16}}
    options = {{'latent': latent, 'length': 64, 'streams': 4, 'seed': 0, 'online': False}}
    return Replay({folder!r}, space, 6, **options | changes)

load, stored, grown = {load}, 20_000, {{}}
if not load:  # everything that only happens once, on a replay that stays small
    warm = make(capacity=1000)
start = resident('VmRSS')
replay = make(capacity=1_000_000)
grown['reserved'] = resident('VmRSS') - start if not load else 0
zeros = lambda *shape, kind=np.float32: np.zeros((4, *shape), kind)
steps = {{'image': zeros(32, 32, 3, kind=np.uint8) + 7, 'reward': zeros(), 'action': zeros(6), 'is_terminal': zeros()}}
for t in range(0 if load else stored // 4):
    steps |= {{'is_first': zeros() + (t % 500 == 0), 'is_last': zeros() + (t % 500 == 499)}}
    replay.add_all(steps, (zeros(1024) + 0.5, zeros(32, kind=np.uint8)))
assert len(replay) == stored
grown |= {{'stored': resident('VmRSS') - start, 'peak': resident('VmHWM') - start}}
grown |= {{'estimate': replay.estimate_bytes(stored), 'latents': stored * (2 * 1024 + 32 + 1)}}
print(json.dumps(grown))
"""


def test_memory_is_what_was_estimated_and_taken_as_steps_come(tmp_path):
    """Collected, and read from disk: nothing is held twice, not even for a moment; what is reserved is not taken."""

    def measure(load: bool) -> dict:
        code = MEMORY.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(tmp_path), load=load)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    collected = measure(load=False)
    assert collected["reserved"] < 5e6
    assert collected["stored"] == pytest.approx(collected["estimate"], rel=0.1)
    loaded = measure(load=True)
    expected = loaded["estimate"] - loaded["latents"]  # not known after a restart, so they take nothing yet
    assert loaded["stored"] == pytest.approx(expected, rel=0.1)
    for grown, size in ((collected, collected["estimate"]), (loaded, expected)):
        assert grown["peak"] < 1.1 * size + 10e6, "a piece of each stream on its way to or from the disk, not more"


def test_capacity_too_small_is_an_error():
    with pytest.raises(ReplayError, match="expected at least 36"):
        make(capacity=20)


# Online queue


def test_online_queue_serves_each_new_step_once_in_order():
    replay = make(online=True, length=8)
    for t in range(50):
        for stream in (0, 1):
            replay.add(stream, step(stream, 0, t, False))
    served = [replay.sample(1) for _ in range(12)]
    for number, batch in enumerate(served):
        stream, window = number % 2, number // 2
        assert batch["code"][0, :, 0].tolist() == [stream] * 8
        assert batch["code"][0, :, 2].tolist() == list(range(8 * window + 1, 8 * window + 9))
    assert replay.stats()["online_waiting"] == 0 and replay.stats()["online_served"] == 12
    replay.add(0, step(0, 0, 50, False))
    assert replay.sample(1).where.starts.tolist() != [48]  # one new step is no window: uniform
    for t in range(51, 57):
        replay.add(0, step(0, 0, t, False))
    mixed = replay.sample(3)
    assert (mixed.where.streams[0], mixed.where.starts[0]) == (0, 48) and replay.stats()["online_served"] == 13


def test_online_windows_that_left_the_memory_are_dropped():
    replay = make(online=True, length=8, capacity=60, streams=1)
    fill(replay, [200])
    stats = replay.stats()
    assert stats["online_dropped"] > 10 and stats["online_waiting"] <= 60 // 8
    assert replay.sample(1).where.starts[0] >= replay._streams[0].begin


# Bad steps


@pytest.mark.parametrize(
    "key, value, text",
    [
        (
            "code",
            np.array([0, np.nan, 1]),
            r"observation 'code' from stream 1 \(environment 1\), step 5 .*episode 0: found "
            r"nan at index \(1,\).*1 of 3",
        ),
        ("code", np.array([0, np.inf, 1]), "found inf"),
        ("code", np.array([0, 1e300, 1]), "found inf"),  # float32 cannot hold it
        ("code", np.zeros(4), r"found shape \(4,\), expected \(3,\)"),
        ("image", np.zeros((4, 4, 3), np.float32), "found float32, expected uint8"),
        ("reward", np.float32("nan"), "reward from stream 1"),
        ("action", np.array([np.nan, 0]), "action from stream 1"),
        ("action", np.zeros(3), r"expected \(2,\)"),
    ],
)
def test_bad_steps_name_key_stream_and_step_and_are_not_stored(key, value, text):
    replay = make()
    for t in range(5):
        replay.add(1, step(1, 0, t, False))
    with pytest.raises(ReplayError, match=text):
        replay.add(1, step(1, 0, 5, False) | {key: value})
    assert len(replay) == 5
    replay.add(1, step(1, 0, 5, False))
    assert len(replay) == 6


def test_other_mistakes_are_told():
    replay = make()
    with pytest.raises(ReplayError, match="expected 0 to 1"):
        replay.add(2, step(0, 0, 0, False))
    with pytest.raises(ReplayError, match="without is_first"):
        replay.add(0, step(0, 0, 3, False))
    with pytest.raises(ReplayError, match="reward missing"):
        replay.add(0, {key: value for key, value in step(0, 0, 0, False).items() if key != "reward"})
    with pytest.raises(ReplayError, match="rename"):
        Replay(None, {"reward": SPACES["code"]}, 2, capacity=100, length=4, streams=1, seed=0)
    with pytest.raises(ReplayError, match="tokenize"):
        Replay(None, {"text": spaces.Text(5)}, 2, capacity=100, length=4, streams=1, seed=0)


def test_last_action_is_zero_and_needs_not_be_given():
    replay = make()
    given = step(0, 0, 1, True)
    del given["action"]
    replay.add(0, step(0, 0, 0, False))
    replay.add(0, given)
    assert contents(replay)["action"].tolist() == [[1, 1], [0, 0]]


def test_abandoned_episode_is_closed(tmp_path):
    replay = make(tmp_path)
    for t in range(5):
        replay.add(0, step(0, 0, t, False))
    replay.flush()  # the unfinished piece has the length of the finished one
    fill(replay, [4], first=1)
    for source in (replay, make(tmp_path)):
        held = contents(source)
        assert np.flatnonzero(held["is_last"]).tolist() == [4, 8]
        assert np.flatnonzero(held["is_first"]).tolist() == [0, 5]
        assert not held["action"][4].any() and not held["is_terminal"].any() and source.steps == 7
    assert names(tmp_path) == ["s000-e000000-p000-0005.npz", "s000-e000001-p000-0004.npz"]


# Disk


def test_pieces_hold_one_episode_each(tmp_path):
    replay = make(tmp_path, capacity=100_000)
    fill(replay, [1024, 3, 1025, 2])
    assert names(tmp_path) == [
        "s000-e000000-p000-1024.npz",
        "s000-e000001-p000-0003.npz",
        "s000-e000002-p000-1024.npz",
        "s000-e000002-p001-0001.npz",
        "s000-e000003-p000-0002.npz",
    ]
    with np.load(tmp_path / "s000-e000002-p000-1024.npz", allow_pickle=False) as file:
        assert set(file.files) == {"is_first", "is_last", "is_terminal", "discount", "action", "reward", *SPACES}
        assert file["discount"].dtype == np.float32 and file["image"].dtype == np.uint8
        assert np.array_equal(file["code"][:, 2], np.arange(1024)) and (file["code"][:, 1] == 2).all()
    again = make(tmp_path, capacity=100_000)
    assert again.steps == replay.steps == 2054 - 4 and len(again) == 2054
    for key, value in contents(again).items():
        if not key.startswith("latent/"):
            assert np.array_equal(value, contents(replay)[key]), key
    assert not contents(again)[module.VALID].any() and again.stats()["episodes"] == 4


def test_discount_is_zero_only_at_termination(tmp_path):
    replay = make(tmp_path)
    replay.add(0, step(0, 0, 0, False))
    replay.add(0, step(0, 0, 1, True, terminal=True))
    with np.load(tmp_path / "s000-e000000-p000-0002.npz", allow_pickle=False) as file:
        assert file["discount"].tolist() == [1, 0]


def test_streams_and_episodes_go_on_after_a_restart(tmp_path):
    fill(make(tmp_path), [5, 6], stream=1)
    replay = make(tmp_path, streams=1)  # fewer environments: the other stream stays as data
    fill(replay, [4], stream=0)
    assert replay.stats()["streams"] == 2 and len(replay) == 15
    replay = make(tmp_path, streams=2)
    fill(replay, [7], stream=1, first=2)
    assert replay._streams[1].begin == 0 and replay._streams[1].end == 18
    assert "s001-e000002-p000-0007.npz" in names(tmp_path) and replay.steps == 22 - 4


def test_only_the_newest_steps_are_read(tmp_path):
    replay = make(tmp_path, capacity=100_000, piece=32)
    fill(replay, [100] * 5, 0)
    fill(replay, [30], 1)
    small = make(tmp_path, capacity=170, piece=32)
    assert len(small) == 170 and small.steps == replay.steps == 530 - 6
    assert len(small._streams[1]) == 30 and small._streams[0].begin == 360 and small._streams[0].end == 500
    assert contents(small)["code"][:, 2].tolist() == [*range(60, 100), *range(100)]
    assert not contents(small)["is_first"][0]
    assert small.stats()["bytes"] <= small.estimate_bytes(170 + 2 * 21)


def test_flush_grows_a_piece_and_nothing_is_loaded_twice(tmp_path):
    replay = make(tmp_path)
    for t in range(10):
        replay.add(0, step(0, 0, t, False))
        if t == 4:
            replay.flush()
            replay.flush()
            assert names(tmp_path) == ["s000-e000000-p000-0005.npz"]
            shutil.copy(tmp_path / names(tmp_path)[0], tmp_path / "kept")
    replay.flush()
    assert names(tmp_path) == ["kept", "s000-e000000-p000-0010.npz"]
    # a crash between the rename and the removal of the shorter file; and one while writing
    (tmp_path / "kept").rename(tmp_path / "s000-e000000-p000-0005.npz")
    (tmp_path / "s000-e000000-p000-0012.npz.tmp").write_bytes(b"half")
    for _ in range(2):
        again = make(tmp_path)
        assert names(tmp_path) == ["s000-e000000-p000-0010.npz"] and len(again) == 10 and again.steps == 9
        held = contents(again)
        assert held["code"][:, 2].tolist() == list(range(10))
        assert held["is_last"].tolist() == [False] * 9 + [True] and not held["action"][-1].any()  # abandoned
    fill(again, [4], first=1)
    assert names(tmp_path) == ["s000-e000000-p000-0010.npz", "s000-e000001-p000-0004.npz"]


def test_a_damaged_longer_version_leaves_the_shorter(tmp_path):
    replay = make(tmp_path)
    for t in range(5):
        replay.add(0, step(0, 0, t, False))
    replay.flush()
    (tmp_path / "s000-e000000-p000-0008.npz").write_bytes(b"PK not really")
    again = make(tmp_path)
    assert len(again) == 5 and again.stats()["corrupt"] == 1
    assert names(tmp_path) == ["s000-e000000-p000-0005.npz"]
    assert names(tmp_path / "corrupt") == ["s000-e000000-p000-0008.npz"]


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "flipped":
        at = len(data) // 2
        path.write_bytes(data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "pickle":
        np.savez(path, reward=np.array([{}] * 8, dtype=object), action=np.zeros((8, 2)))
    elif how == "length":
        with np.load(path) as file:
            np.savez(path, **{key: file[key][:-1] for key in file.files})
    elif how == "nan":
        with np.load(path) as file:
            np.savez(path, **{key: file[key] * np.float32("nan") if key == "code" else file[key] for key in file.files})


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), OSError(errno.EMFILE, "Too many open files"), MemoryError()]
)
@pytest.mark.parametrize("older", [False, True])
def test_a_failure_of_the_machine_sets_no_file_aside(tmp_path, monkeypatch, error, older):
    fill(make(tmp_path, piece=8), [30, 5])
    if older:
        for path in list(tmp_path.glob("*.npz")):
            path.rename(path.with_name(f"older-{path.name}"))
    before = names(tmp_path)

    def fail(path, *args, **kwargs):
        raise error

    monkeypatch.setattr(module, "read_npz", fail)
    with pytest.raises(StorageError, match="Could not read .*npz.*left as it is"):
        make(tmp_path, piece=8)
    monkeypatch.undo()
    assert names(tmp_path) == before and not (tmp_path / "corrupt").exists()
    assert make(tmp_path, piece=8).stats()["corrupt"] == 0


def test_a_size_that_is_not_true_is_damage_not_a_lack_of_memory(tmp_path):
    """One flipped bit in a header asks for a petabyte."""
    fill(make(tmp_path), [8, 5])
    bad = tmp_path / "s000-e000000-p000-0008.npz"
    data = bad.read_bytes()
    assert data.count(b"'shape': (8,") > 1
    bad.write_bytes(data.replace(b"'shape': (8, ", b"'shape': (8" + b"0" * 14 + b", ").ljust(len(data)))
    again = make(tmp_path)
    assert again.stats()["corrupt"] == 1 and names(tmp_path / "corrupt") == [bad.name]


@pytest.mark.parametrize("how", ["truncated", "flipped", "empty", "pickle", "length", "nan"])
def test_damaged_piece_is_set_aside_and_not_bridged(tmp_path, caplog, how):
    replay = make(tmp_path, piece=8)
    fill(replay, [30, 5])
    bad = tmp_path / "s000-e000000-p001-0008.npz"
    damage(bad, how)
    reader = make(tmp_path, read_only=True, streams=0)
    assert bad.exists() and reader.stats()["corrupt"] == 1 and len(reader) == 27
    for trial in range(2):  # the second start knows the gap from the names alone
        caplog.clear()
        again = make(tmp_path)
        held = contents(again)
        assert held["code"][:, 2].tolist() == [*range(8), *range(16, 30), *range(5)]
        assert np.flatnonzero(held["is_last"]).tolist() == [7, 21, 26]
        assert np.flatnonzero(held["is_first"]).tolist() == [0, 8, 22]
        assert not held["action"][7].any() and held["reward"][8] == 16 and not held["is_terminal"].any()
        assert again.steps == 27 - 2 and again.stats()["gaps"] == 1
        assert again.stats()["corrupt"] == (trial == 0) == (bad.name in caplog.text)
        assert names(tmp_path / "corrupt") == [bad.name] and not bad.exists()


def test_random_damage_never_stops_the_start(tmp_path):
    rng = np.random.default_rng(0)
    original = tmp_path / "original"
    fill(make(original, piece=8), [8])
    data = (original / "s000-e000000-p000-0008.npz").read_bytes()
    for trial in range(60):
        folder = tmp_path / str(trial)
        folder.mkdir()
        changed = bytearray(data)
        for at in rng.integers(len(data), size=3):
            changed[at] = rng.integers(256)
        (folder / "s000-e000000-p000-0008.npz").write_bytes(bytes(changed))
        try:
            replay = make(folder)
        except ReplayError as error:  # a key's name was hit: told with the file's name
            assert "s000-e000000-p000-0008.npz" in str(error)
        else:
            assert (len(replay), replay.stats()["corrupt"]) in ((8, 0), (0, 1))


def test_files_that_do_not_fit_are_named(tmp_path):
    fill(make(tmp_path), [5])
    other = {"code": SPACES["code"], "depth": SPACES["code"]}
    text = r"p000-0005.npz lacks depth. Found the keys \['action', 'code'.*expected \['action', 'code', 'depth'"
    with pytest.raises(ReplayError, match=text):
        Replay(tmp_path, other, 2, capacity=100, length=4, streams=1, seed=0)
    with pytest.raises(ReplayError, match=r"p000-0005.npz: found shape \(5, 3\), expected \(5, 7\)"):
        Replay(tmp_path, {"code": spaces.Box(0, 1, (7,))}, 2, capacity=100, length=4, streams=1, seed=0)
    with pytest.raises(ReplayError, match=r"action from .*p000-0005.npz: found shape \(5, 2\), expected \(5, 3\)"):
        Replay(tmp_path, SPACES, 3, capacity=100, length=4, streams=1, seed=0)
    fewer = Replay(tmp_path, {"code": SPACES["code"]}, 2, capacity=100, length=4, streams=1, seed=0)
    assert len(fewer) == 5 and fewer.stats()["corrupt"] == 0


def test_full_disk_is_told_and_retried(tmp_path, monkeypatch):
    replay = make(tmp_path)
    sync, full = os.fsync, True

    def fsync(handle):
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    monkeypatch.setattr(module.os, "fsync", fsync)
    for t in range(4):
        replay.add(0, step(0, 0, t, False))
    text = rf"{re.escape(str(tmp_path))}: the disk is full \(0.00 MiB needed, .*Free some space"
    for _ in range(2):
        with pytest.raises(StorageError, match=text):
            replay.flush()
    with pytest.raises(StorageError):
        replay.add(0, step(0, 0, 4, True))
    assert len(replay) == 5 and names(tmp_path) == [] and replay.stats()["unwritten_pieces"] == 1
    full = False
    fill(replay, [3], first=1)
    assert names(tmp_path) == ["s000-e000000-p000-0005.npz", "s000-e000001-p000-0003.npz"]
    assert contents(make(tmp_path))["code"][:, 2].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]


def test_full_disk_never_costs_steps(tmp_path, monkeypatch):
    replay = make(tmp_path, capacity=100, streams=1)

    def fsync(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "fsync", fsync)
        for t in range(300):  # a caller who does not give up: the memory holds more than it should
            try:
                replay.add(0, step(0, 0, t, False))
            except StorageError:
                pass
    assert len(replay) == 300
    replay.add(0, step(0, 0, 300, True))
    assert len(replay) <= 100
    assert contents(make(tmp_path, capacity=1000))["code"][:, 2].tolist() == list(range(301))


FULL_DISK = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import test_replay as t
replay = t.make({folder!r})
try:
    t.fill(replay, [200] * 40)
except t.StorageError as error:
    print(error)
    count = len(replay)
    files = t.names({folder!r})
    assert not any(name.endswith('.tmp') for name in files)
    assert len(t.make({folder!r})) == 200 * len(files) == count - 200, (count, files)
    print('consistent')
"""


def test_full_disk_for_real(tmp_path):
    code = FULL_DISK.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(tmp_path))
    mount = f'mount -t tmpfs -o size=128k none {tmp_path} && exec {sys.executable} -c "$0"'
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", mount, code]
    if not shutil.which("unshare"):
        pytest.skip("unshare is not installed")
    done = subprocess.run(command, capture_output=True, text=True)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("no small file system can be mounted here")
    assert "the disk is full" in done.stdout and "consistent" in done.stdout, done.stderr


WRITER = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import test_replay as t
replay = t.make({folder!r}, capacity=500, piece=16)
episode = [s.episode + 1 for s in replay._streams.values()]
position = [0, 0]
length = 45
count = 0
print('ready', flush=True)
while True:
    for s in (0, 1):
        replay.add(s, t.step(s, episode[s], position[s], position[s] == length - 1))
        position[s] += 1
        if position[s] % 16 == 0 or position[s] == length:
            print(s, episode[s], position[s], flush=True)  # promised to be on disk
        if position[s] == length:
            episode[s], position[s] = episode[s] + 1, 0
    count += 1
    if count % 7 == 0:
        replay.flush()
"""


def test_kill_at_random_moments_loses_and_doubles_nothing(tmp_path):
    folder = tmp_path / "eps"
    folder.mkdir()
    code = WRITER.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(folder))
    rng = np.random.default_rng(0)
    promised: set[tuple] = set()
    for _ in range(5):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "ready\n"
            lines = [process.stdout.readline().strip() for _ in range(rng.integers(4, 9))]
            time.sleep(rng.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
            lines += process.stdout.read().split("\n")[:-1]  # without what the kill cut
        promised |= {tuple(map(int, line.split())) for line in lines}
        replay = make(folder, capacity=1_000_000, piece=16)
        assert replay.stats()["corrupt"] == 0 and replay.stats()["gaps"] == 0
        assert not any(name.endswith(".tmp") for name in names(folder))
        stored, entries, firsts = set(), 0, 0
        for stream in (0, 1):
            held = contents(replay, stream)
            code_held = held["code"].astype(int)
            assert (code_held[:, 0] == stream).all()
            assert np.array_equal(held["is_first"], code_held[:, 2] == 0)
            assert np.array_equal(np.unique(code_held[:, 1]), np.arange(code_held[-1, 1] + 1))  # no episode is missing
            follows = (code_held[1:, 2] == code_held[:-1, 2] + 1) & (code_held[1:, 1] == code_held[:-1, 1])
            begins = (code_held[1:, 2] == 0) & (code_held[1:, 1] == code_held[:-1, 1] + 1)
            assert (follows ^ begins).all() and np.array_equal(held["is_last"][:-1], begins)
            stored |= {tuple(row) for row in code_held.tolist()}
            entries, firsts = entries + len(code_held), firsts + held["is_first"].sum()
        assert len(stored) == entries == len(replay) and replay.steps == entries - firsts
        assert all((stream, episode, count - 1) in stored for stream, episode, count in promised)
    assert len(promised) >= 20


def test_read_only_changes_nothing(tmp_path):
    fill(make(tmp_path), [20, 20])
    damage(tmp_path / "s000-e000001-p000-0020.npz", "truncated")
    (tmp_path / "s000-e000002-p000-0020.npz.tmp").write_bytes(b"x")
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    replay = Replay.offline(tmp_path, SPACES, 2, capacity=1000, length=8, seed=0, latent=LATENT)
    replay.flush()
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before
    assert not (tmp_path / "corrupt").exists()
    assert len(replay) == 20 and replay.stats()["corrupt"] == 1
    check_window(replay.sample(2), 1, [20])
    with pytest.raises(ReplayError, match="read only"):
        replay.add(0, step(0, 0, 0, False))
    with pytest.raises(ReplayError, match="not a directory"):
        Replay.offline(tmp_path / "none", SPACES, 2, capacity=1000, length=8, seed=0)
    (tmp_path / "none").mkdir()
    with pytest.raises(ReplayError, match="no usable"):
        Replay.offline(tmp_path / "none", SPACES, 2, capacity=1000, length=8, seed=0)


# Episodes of older ports


def older_episode(folder: Path, name: str, count: int, episode: int = 0, **changes) -> None:
    """As those ports write it: the action of a row led to it."""
    t = np.arange(count)
    arrays = {
        "code": np.stack([t * 0, t * 0 + episode, t], 1).astype(np.float32),
        "image": np.broadcast_to(t[:, None, None, None], (count, 4, 4, 3)).astype(np.uint8),
        "action": np.stack([t, np.where(t > 0, episode + 1, 0)], 1).astype(np.float32),
        "reward": t.astype(np.float32),
        "discount": np.where(t == count - 1, 0, 1).astype(np.float32),
        "is_first": t == 0,
        "is_terminal": t == count - 1,
        "logprob": t.astype(np.float32),
    } | changes
    np.savez_compressed(folder / name, **{key: value for key, value in arrays.items() if value is not None})


def test_older_episodes_load_with_shifted_actions(tmp_path, caplog):
    caplog.set_level("INFO", logger="replay")
    older_episode(tmp_path, "20230101T000000-abcdef-11.npz", 12, 0)
    older_episode(tmp_path, "20230101T000100-abcdef-20.npz", 20, 1, is_terminal=None, is_first=None)
    before = names(tmp_path)
    replay = make(tmp_path)
    assert replay.steps == 32 - 2 and len(replay) == 32 and replay.stats()["episodes"] == 2
    for _ in range(20):
        batch = replay.sample(2)
        check_window(batch, 0, [12, 20])
    held = contents(replay, module.OLDER)
    assert np.flatnonzero(held["is_terminal"]).tolist() == [11, 31] == np.flatnonzero(held["is_last"]).tolist()
    assert sum("logprob" in record.message for record in caplog.records) == 1
    fill(replay, [6])  # new data stands beside it
    again = make(tmp_path)
    assert len(again) == 38 and again.steps == 30 + 5 and set(before) < set(names(tmp_path))
    assert len(make(tmp_path, capacity=36)) == 36  # the oldest of the older goes first
    assert len(make(tmp_path, capacity=36)._streams[module.OLDER]) == 30


def test_older_actions_are_taken_as_they_are_where_they_do_not_lead(tmp_path):
    chosen = np.stack([np.arange(1, 9)] * 2, 1).astype(np.float32)
    older_episode(tmp_path, "a.npz", 8, action=chosen)
    older_episode(tmp_path, "b.npz", 8, action=np.zeros((8, 2), np.float32))
    older_episode(tmp_path, "c.npz", 8, is_last=np.arange(8) == 7)
    held = contents(make(tmp_path), module.OLDER)["action"]
    assert np.array_equal(held[:7], chosen[:7]) and not held[7].any() and not held[8:16].any()
    assert held[16:23, 0].tolist() == list(range(7))


def test_older_index_actions_become_one_hot(tmp_path):
    index = np.array([0, 2, 1, 2, 0, 1], np.int64)  # the first stands for none
    older_episode(tmp_path, "a.npz", 6, action=index)
    replay = Replay(tmp_path, SPACES, 3, capacity=100, length=4, streams=1, seed=0)
    held = contents(replay, module.OLDER)["action"]
    assert np.array_equal(held, np.concatenate([np.eye(3)[index[1:]], np.zeros((1, 3))]))


def test_older_damage_and_missing_keys(tmp_path):
    older_episode(tmp_path, "a-10.npz", 10)
    older_episode(tmp_path, "b-10.npz", 10, reward=np.full(10, np.nan, np.float32))
    (tmp_path / "c-10.npz").write_bytes((tmp_path / "a-10.npz").read_bytes()[:-100])
    replay = make(tmp_path)
    assert len(replay) == 10 and replay.steps == 9 and names(tmp_path / "corrupt") == ["b-10.npz", "c-10.npz"]
    older_episode(tmp_path, "d-10.npz", 10, image=None)
    with pytest.raises(ReplayError, match=r"d-10.npz lacks image. Found the keys \[.*expected"):
        make(tmp_path)
    os.remove(tmp_path / "d-10.npz")
    np.savez(tmp_path / "weights.npz", w=np.zeros(3))
    with pytest.raises(ReplayError, match="weights.npz has no reward"):
        make(tmp_path)


def test_infer_spaces(tmp_path):
    fill(make(tmp_path), [5, 6])
    obs, act = infer_spaces(tmp_path)
    assert set(obs) == {"code", "image"} and obs["image"] == spaces.Box(0, 255, (4, 4, 3), np.uint8)
    assert obs["code"].dtype == np.float32 and obs["code"].shape == (3,) and act == spaces.Box(-1, 1, (2,), np.float32)
    Replay.offline(tmp_path, obs, 2, capacity=100, length=4, seed=0)
    folder = tmp_path / "discrete"
    folder.mkdir()
    older_episode(folder, "a.npz", 4, action=np.eye(3, dtype=np.float32)[[0, 1, 1, 2]] * [[0], [1], [1], [1]])
    assert infer_spaces(folder)[1] == spaces.Discrete(3)
    older_episode(folder, "b.npz", 4, action=np.full((4, 3), 0.5, np.float32))
    assert infer_spaces(folder)[1] == spaces.Box(-1, 1, (3,), np.float32)
    older_episode(folder, "c.npz", 4, extra=np.zeros(4))
    with pytest.raises(ReplayError, match="different observations"):
        infer_spaces(folder)
    texts = tmp_path / "texts"
    texts.mkdir()
    older_episode(texts, "a.npz", 3, text=np.array([[3, 17, 2]] * 3, np.int32))
    older_episode(texts, "b.npz", 3, text=np.array([[5, 2, 0]] * 3, np.int32))
    assert infer_spaces(texts)[0]["text"] == spaces.Box(0, 17, (3,), np.int32), "a row for every id that was recorded"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReplayError, match="no file"):
        infer_spaces(tmp_path / "empty")


# Saving


def save_and_load(state: dict, path: Path) -> dict:
    import torch  # here: the writers that are killed import this file and start faster without

    torch.save(state, path)
    return torch.load(path, weights_only=True)


def same(a, b) -> bool:
    pairs = [(a[key], b[key]) for key in a] + [(a.context[key], b.context[key]) for key in a.context]
    return a.keys() == b.keys() and all(np.array_equal(x, y) for x, y in [*pairs, *zip(a.where, b.where, strict=True)])


def test_sampling_is_deterministic_and_resumes_bit_for_bit(tmp_path):
    replay = make(tmp_path / "eps", online=True)
    for t in range(60):
        for stream in (0, 1):
            replay.add(stream, step(stream, t // 30, t % 30, t % 30 == 29), (np.full(6, t / 100), np.full(4, t % 5)))
    for _ in range(3):
        replay.sample(3)
    replay.flush()
    replay.forget_latents()
    state = save_and_load(replay.state(), tmp_path / "state.pt")
    assert state == replay.state() and state["steps"] == replay.steps
    json.dumps(state)
    again = make(tmp_path / "eps", online=True, seed=5)
    again.load_state(state)
    assert again.state() == state
    assert same(replay.sample(20), again.sample(20)) and not same(replay.sample(20), replay.sample(20))


def test_offline_resume_is_bit_identical_with_latents(tmp_path):
    fill(make(tmp_path), [50, 60])

    def train(replay, updates):
        seen = []
        for _ in range(updates):
            batch = replay.sample(4)
            seen.append(batch)
            latent = np.cumsum(batch["code"][..., :1] / 50, 1) + batch.context["deter"][:, None, :1]
            replay.write_latents(batch.where, np.tanh(np.repeat(latent, 6, -1)), np.zeros((4, 8, 4), int))
        return seen

    def offline(seed):
        return Replay.offline(tmp_path, SPACES, 2, capacity=1000, length=8, seed=seed, latent=LATENT)

    whole = offline(0)
    train(whole, 10)
    state = whole.state()
    whole.forget_latents()
    resumed = offline(1)
    resumed.load_state(state)
    first, second = train(whole, 10), train(resumed, 10)
    assert all(same(a, b) for a, b in zip(first, second, strict=True)) and first[-1].context["valid"].any()


def test_state_meets_longer_and_shorter_data(tmp_path):
    replay = make(tmp_path, online=True, piece=16, streams=1)
    fill(replay, [16, 16])
    state = replay.state()
    assert state["queue"] == [[0, 0], [0, 8], [0, 16]]
    fill(replay, [16], first=2)  # after the checkpoint
    longer = make(tmp_path, online=True, piece=16, streams=1)
    longer.load_state(state)
    assert list(longer._queue) == [(0, 0), (0, 8), (0, 16), (0, 24), (0, 32)] and longer.steps == 45
    assert longer.stats()["online_dropped"] == 0
    for name in names(tmp_path)[1:]:
        os.remove(tmp_path / name)
    shorter = make(tmp_path, online=True, piece=16, streams=1)
    shorter.load_state(state)
    assert list(shorter._queue) == [(0, 0)] and shorter.stats()["online_dropped"] == 2
    assert shorter.steps == 30  # what the checkpoint has seen
    fill(shorter, [20], first=1)  # goes on with what is new
    assert list(shorter._queue) == [(0, 0), (0, 15), (0, 23)]
    for batch in (shorter.sample(1) for _ in range(3)):
        check_window(batch, 0, [16, 20])
    started = make(tmp_path, online=True, streams=1)  # without a checkpoint: what was there before is not new
    assert not started._queue
    fill(started, [9], first=2)
    assert list(started._queue) == [(0, 35)]
    with pytest.raises(ReplayError, match="version 7"):
        shorter.load_state(state | {"version": 7})


def test_generators_are_not_global():
    replay, twin = make(), make()
    fill(replay, [60])
    fill(twin, [60])
    first = replay.sample(5)
    np.random.seed(3)
    assert same(first, twin.sample(5)) and not same(first, twin.sample(5))


def test_no_torch_is_needed():
    code = textwrap.dedent("""
        import sys
        import replay
        assert 'torch' not in sys.modules and 'gymnasium' not in sys.modules
    """)
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# What is removed


def on_disk(directory) -> int:
    return sum(int(module.NAME.fullmatch(name)[4]) for name in names(directory) if module.NAME.fullmatch(name))


@pytest.mark.parametrize("lengths", [[20] * 60, [7, 300, 11, 150, 90, 2, 33] * 3], ids=["short", "long"])
def test_the_folder_holds_no_more_than_asked_and_the_counters_hold(tmp_path, lengths):
    """Beside a replay that keeps everything: the same counts, positions and newest steps, also after restarts."""
    options = {"piece": 64, "capacity": 400}
    pruned, whole = make(tmp_path / "a", keep=500, **options), make(tmp_path / "b", **options)
    for episode, length in enumerate(lengths):
        for stream in range(2):
            for replay in (pruned, whole):
                fill(replay, [length], stream, first=episode)
        assert on_disk(tmp_path / "a") <= 500
        if episode % 7 == 6:
            pruned.flush(), whole.flush()
            state = pruned.state()
            pruned, whole = make(tmp_path / "a", keep=500, **options), make(tmp_path / "b", **options)
            ends = [{key: value["end"] for key, value in s["streams"].items()} for s in (state, pruned.state())]
            assert ends[0] == ends[1] == {key: value["end"] for key, value in whole.state()["streams"].items()}
        counts = [{key: replay.stats()[key] for key in ("steps", "episodes", "gaps")} for replay in (pruned, whole)]
        assert counts[0] == counts[1]
    assert on_disk(tmp_path / "a") > 400 and on_disk(tmp_path / "b") == 2 * sum(lengths)
    for stream in range(2):
        one, two = contents(pruned, stream), contents(whole, stream)
        count = min(len(one["reward"]), len(two["reward"]))
        assert count > 100 and all(np.array_equal(one[key][-count:], two[key][-count:]) for key in one)


def test_a_crash_while_pieces_are_removed_counts_each_once(tmp_path, monkeypatch):
    replay = make(tmp_path, piece=16, keep=200)

    def crash(path, missing_ok=False):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "unlink", crash)
    with pytest.raises(KeyboardInterrupt):
        fill(replay, [20] * 30)
    monkeypatch.undo()
    steps = replay.steps
    assert on_disk(tmp_path) > 200
    again = make(tmp_path, piece=16, keep=200)
    assert on_disk(tmp_path) <= 200 and again.steps == steps and again.stats()["gaps"] == 0


def test_a_stream_whose_pieces_are_all_gone_goes_on(tmp_path):
    fill(make(tmp_path, keep=160, piece=16), [20] * 12)
    for path in tmp_path.glob("*.npz"):
        path.unlink()
    again = make(tmp_path, keep=160, piece=16)
    fill(again, [20], first=12)
    assert not any(
        again._ledger.of(0).covers(*map(int, module.NAME.fullmatch(name).groups()[1:3])) for name in names(tmp_path)[1:]
    )
    reader = make(tmp_path, keep=160, piece=16)
    assert reader.steps == again.steps and contents(reader)["code"][:, 1].tolist() == [12] * 20


@pytest.mark.parametrize("restart", [False, True])
def test_counters_go_on_where_pieces_were_taken_away(tmp_path, caplog, restart):
    replay = make(tmp_path)
    fill(replay, [20] * 10)
    replay.flush()
    state = replay.state()
    for name in names(tmp_path)[:5]:
        (tmp_path / name).unlink()
    again = make(tmp_path)
    again.load_state(state)
    assert again.steps == replay.steps == 190 and "were taken away" in caplog.text
    fill(again, [20] * 2, first=10)
    if restart:  # killed: no newer checkpoint
        again = make(tmp_path)
        again.load_state(state)
    assert again.steps == 190 + 38


def test_a_folder_that_could_not_hold_what_is_sampled_is_refused(tmp_path):
    with pytest.raises(ReplayError, match="keep_on_disk 35, expected 0 .all. or at least 36"):
        make(tmp_path, keep=35)


def test_a_ledger_that_is_damaged_is_said(tmp_path, caplog):
    fill(make(tmp_path, piece=16, keep=200), [20] * 30)
    (tmp_path / "ledger.json").write_text('{"version": 1, "str')
    assert make(tmp_path, piece=16, keep=200).steps > 0 and "ledger.json cannot be read" in caplog.text


@pytest.mark.parametrize(
    ("was", "now", "wrong"),
    [
        (spaces.Discrete(9), spaces.Discrete(5), True),
        (spaces.Discrete(5), spaces.Discrete(9), False),
        (spaces.MultiDiscrete([9, 9]), spaces.MultiDiscrete([9, 5]), True),
    ],
)
def test_ids_in_files_are_compared_with_the_space(tmp_path, was, now, wrong):
    """Not set aside: it may be the environment that is wrong now."""

    def over(space):
        return Replay(tmp_path, {"cell": space}, 2, capacity=100, length=4, streams=1, seed=0)

    replay = over(was)
    for t in range(8):
        cell = np.full(was.shape, min(t, int(np.min(getattr(was, "n", 9))) - 1))
        replay.add(0, {**step(0, 0, t, t == 7), "cell": cell})
    replay.flush()
    before = names(tmp_path)
    if wrong:
        with pytest.raises(ReplayError, match="'cell' holds ids outside of its space .0 to "):
            over(now)
    else:
        assert len(over(now)) == 8
    assert names(tmp_path) == before
