"""The sound room: its geometry against closed forms, its acoustics against physics, and what policies reach in it."""

import wave
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.io import wavfile

from envs import TaskError, make_env
from envs import sound as module
from envs.sound import LAYOUTS, RATE, Floor, SoundRoom, read_wav

pra = pytest.importorskip("pyroomacoustics", reason="needs requirements/sound.txt")


def floor(layout: str) -> Floor:
    return Floor(*LAYOUTS[layout], 1.0)


# Geometry


def test_what_is_inside():
    points = np.array([(1, 1), (4, 1), (4, 4), (1, 4.9), (-0.1, 1), (6.1, 1), (5.9, 2.4), (3.1, 2.6)])
    assert floor("l").inside(points).tolist() == [True, True, False, True, False, False, True, False]
    points = np.array([(2.5, 2), (2, 2), (3, 2), (2.5, 1.5), (4.9, 3.9)])
    assert floor("pillar").inside(points).tolist() == [False, True, True, True, True]


def test_the_robot_keeps_its_distance_from_walls():
    room = floor("pillar")
    assert room.free(np.array([1.0, 1.0]), 0.15) and not room.free(np.array([0.1, 1.0]), 0.15)
    assert not room.free(np.array([2.0, 2.0]), 0.15) and room.free(np.array([1.9, 2.0]), 0.15)


def test_lines_of_sight():
    assert not floor("l").sees(np.array([5.0, 1.0]), np.array([1.0, 4.5]))
    assert floor("l").sees(np.array([5.0, 1.0]), np.array([1.0, 1.5]))
    assert not floor("pillar").sees(np.array([1.0, 2.0]), np.array([4.0, 2.0]))
    assert floor("pillar").sees(np.array([1.0, 1.0]), np.array([4.0, 1.0]))


def test_distances_are_of_the_shortest_way():
    """Straight where it can be seen; around the corner of the L about the two straight parts."""
    one, two = np.array([5.0, 1.0]), np.array([1.0, 1.5])
    assert floor("l").distance(one, two) == pytest.approx(np.hypot(4, 0.5))
    goal = np.array([1.5, 4.5])
    shortest = np.hypot(2.0, 1.5) + np.hypot(1.5, 2.0)  # through (3, 2.5)
    assert shortest < floor("l").distance(one, goal) < 1.15 * shortest


def test_depth_ahead():
    ways = np.array([(1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0)])
    assert floor("rectangle").ahead(np.array([2.0, 1.0]), ways).tolist() == pytest.approx([3, 3, 2, 1])


# Acoustics


def still(room: SoundRoom, place, source, heading: float = 0.0) -> np.ndarray:
    """What is heard while nothing moves, after what is on its way has arrived: [mics, samples] of a second."""
    room.reset()
    room._place, room._heading = np.array(place, float), heading
    room._sources[0].place = np.array(source, float)
    return np.concatenate([room._audio() for _ in range(15)][5:], 1)


def test_sound_arrives_late_and_weaker_by_distance():
    """Without reflections: 1/r, and r/c later; the nearer microphone hears it first."""
    room = SoundRoom("rectangle", order=0, mics=2, seed=1)
    near, far = (still(room, (1.0, 2.0), (x, 2.0)) for x in (2.0, 4.0))
    height = module.SOURCE_HEIGHT - module.MIC_HEIGHT
    expected = np.hypot(2.9, height) / np.hypot(0.9, height)
    assert near[0].std() / far[0].std() == pytest.approx(expected, rel=0.1)
    first, second = near  # at x = 1.1 and 0.9
    lags = np.arange(-30, 31)
    score = [np.dot(np.roll(first, lag)[50:-50], second[50:-50]) for lag in lags]
    delay = (np.hypot(1.1, height) - np.hypot(0.9, height)) / 343 * RATE
    assert lags[np.argmax(score)] == pytest.approx(delay, abs=1)


def test_reflections_add_sound():
    dry, wet = (still(SoundRoom("rectangle", order=n, seed=1), (1.0, 2.0), (4.0, 2.0)).std() for n in (0, 3))
    assert wet > 1.1 * dry


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_heard_does_not_depend_on_where_the_robot_was(layout):
    """The simulator keeps nothing of earlier steps, and takes every open place for inside of the room."""
    room, rng, places = SoundRoom(layout, order=2, mics=2, seed=1), np.random.default_rng(0), floor(layout)
    room.reset()
    for _ in range(20):
        room._place = places.sample(rng)
        room._audio()
    mics = room._place[:, None] + room._array
    fresh = SoundRoom(layout, order=2, mics=2, seed=1)
    (found,), (expected,) = (one._acoustics.responses(room._sources, mics) for one in (room, fresh))
    assert len(room._acoustics._room.room_engine.microphones) == 2
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("layout, place, source", [("l", (5, 1), (1, 4.5)), ("pillar", (1, 2), (4, 2))])
def test_what_is_behind_a_corner_is_heard_by_its_reflections(layout, place, source):
    direct = still(SoundRoom(layout, order=0, seed=1), place, source).std()
    reflected = still(SoundRoom(layout, order=2, seed=1), place, source).std()
    assert direct < 1e-6 < reflected


def test_sound_goes_on_across_steps():
    """A pure tone stays one: no clicks where one step follows another."""
    room = SoundRoom("rectangle", order=1, seed=1, mics=1)
    time = 0

    def tone(samples):
        nonlocal time
        time += samples
        return np.sin(2 * np.pi * 500 * (time - samples + np.arange(samples)) / RATE)

    room._target = lambda rng: tone
    heard = still(room, (1.0, 2.0), (3.0, 2.0))[0]
    spectrum = np.abs(np.fft.rfft(heard * np.hanning(len(heard)))) ** 2
    peak = spectrum.argmax()
    assert abs(peak * RATE / len(heard) - 500) < 2 and spectrum[peak - 5 : peak + 6].sum() > 0.999 * spectrum.sum()


# The task


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("actions", ["continuous", "headings"])
def test_the_oracle_finds_every_source(layout, actions):
    room = SoundRoom(layout, actions=actions, observe=["pose"], sources=2, seed=3, steps=400)
    for _ in range(5):
        room.reset()
        start, total = room._measure(), 0.0
        for _ in range(400):
            step = room.step(room.oracle())
            total += step["reward"]
            if step["is_last"]:
                break
        assert step["is_terminal"] and step["log_success"] == 1
        assert total > 2 * module.ARRIVAL - 400 * module.TIME and start > 0


def test_the_reward_is_progress_arrival_contact_and_time():
    room = SoundRoom("rectangle", observe=["pose"], seed=0)
    room.reset()
    room._place, room._heading = np.array([1.0, 2.0]), 0.0
    room._sources[0].place, room._distance = np.array([1.48, 2.0]), 0.48
    step = room.step([1.0, 0.0])
    progress = module.SPEED * 0.1
    assert step["reward"] == pytest.approx(progress - module.TIME, abs=1e-6) and not step["is_last"]
    step = room.step([1.0, 0.0])
    assert step["reward"] == pytest.approx(progress - module.TIME + module.ARRIVAL, abs=1e-6) and step["is_terminal"]
    room.reset()
    room._place, room._heading = np.array([0.16, 2.0]), np.pi
    room._distance = room._measure()
    assert room.step([1.0, 0.0])["reward"] == pytest.approx(-module.CONTACT - module.TIME, abs=1e-6)


def test_observations_fit_their_spaces():
    room = SoundRoom("pillar", observe=["audio", "pose", "map", "image"], view="first", audio="features", distractors=1)
    for step in (room.reset(), room.step([0.3, 1.0])):
        for key, space in room.obs_space.items():
            assert space.contains(step[key]), key
    assert SoundRoom("l", mics=2, step=0.05).obs_space["audio"].shape == (2, 800)


def test_seeds_decide():
    def play(seed):
        room, rng = SoundRoom("rectangle", seed=seed, speed=0.3), np.random.default_rng(0)
        steps = [room.reset(), *(room.step(rng.uniform(-1, 1, 2)) for _ in range(5))]
        return np.stack([step["audio"] for step in steps])

    assert np.array_equal(play(1), play(1)) and not np.array_equal(play(1), play(2))


def test_the_deaf_hear_nothing():
    room = SoundRoom("rectangle", deaf=True)
    assert not room.reset()["audio"].any() and room.step([1.0, 0.0])["audio"].shape == (4, 1600)


def test_sources_are_seen_only_where_nothing_is_in_the_way():
    room = SoundRoom("pillar", observe=["image"], seed=0)
    room.reset()
    room._place, room._heading = np.array([1.0, 2.0]), 0.0
    red = []
    for source in ((1.6, 2.0), (4.0, 2.0)):
        room._sources[0].place = np.array(source)
        for view in ("top", "first"):
            red.append((room._picture((64, 64), view) == module.COLOURS[True]).all(-1).any())
    assert red == [True, True, False, False]


# Mistakes


@pytest.mark.parametrize(
    "options, told",
    [
        ({"observe": ["smell"]}, "observe"),
        ({"audio": "loud"}, "waveform or features"),
        ({"view": "below"}, "top or first"),
        ({"actions": "jump"}, "headings"),
        ({"signal": "nowhere"}, "noise, tones"),
    ],
)
def test_mistakes_are_named(options, told):
    with pytest.raises(TaskError, match=told):
        SoundRoom("rectangle", **options)


def test_recordings(tmp_path):
    """A wav file at another rate is brought to ours; what is none is named."""
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(2), file.setsampwidth(2), file.setframerate(8000)
        left = (np.sin(2 * np.pi * 100 * np.arange(8000) / 8000) * 16000).astype("<i2")
        file.writeframes(np.stack([left, 0 * left], 1).tobytes())
    samples = read_wav(tmp_path / "a.wav")
    assert len(samples) == RATE and np.abs(samples).max() == pytest.approx(16000 / 32768, rel=1e-3)
    assert abs(np.fft.rfft(samples)).argmax() == 100
    assert SoundRoom("rectangle", signal=str(tmp_path)).reset()["audio"].any()
    whole = (tmp_path / "a.wav").read_bytes()
    for damaged in (b"RIFF", whole[:43], whole[:24] + bytes(4) + whole[28:], b""):  # the third has a rate of 0
        (tmp_path / "b.wav").write_bytes(damaged)
        with pytest.raises(TaskError, match="b.wav cannot be read"):
            SoundRoom("rectangle", signal=str(tmp_path))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32])
def test_recordings_of_any_width(dtype, tmp_path):
    wave_ = 0.5 * np.sin(2 * np.pi * 440 * np.arange(44100) / 44100)
    info = None if dtype == np.float32 else np.iinfo(dtype)
    values = wave_ if info is None else np.rint(wave_ * (info.max - info.min) / 2 + (info.max + info.min + 1) / 2)
    wavfile.write(tmp_path / "A.WAV", 44100, values.astype(dtype))
    samples = read_wav(tmp_path / "A.WAV")
    assert len(samples) == RATE and abs(np.fft.rfft(samples)).argmax() == 440
    assert np.abs(samples[100:-100]).max() == pytest.approx(0.5, rel=0.02)
    assert SoundRoom("rectangle", signal=str(tmp_path)).reset()["audio"].any()


def test_recordings_do_not_alias(tmp_path):
    """What half of our rate cannot hold is silent, not another tone."""
    wavfile.write(tmp_path / "a.wav", 44100, np.sin(2 * np.pi * 12000 * np.arange(44100) / 44100).astype(np.float32))
    assert np.abs(read_wav(tmp_path / "a.wav")[200:-200]).max() < 0.02


def test_success_and_contacts_are_told_at_every_step():
    room = SoundRoom("rectangle", steps=300, speed=0.0, observe=["pose"], actions="headings")
    step = room.reset()
    assert step["log_success"] == step["log_contacts"] == 0
    while not step["is_last"]:
        step = room.step(room.oracle())
        assert step["log_success"] == step["is_last"]
    room.reset()
    steps = [room.step(0) for _ in range(60)]  # to the east, and into the wall
    assert [float(s["log_contacts"]) for s in steps[-2:]] == [float(steps[-3]["log_contacts"]) + n for n in (1, 2)]


def test_a_room_in_two_parts_is_one_of_them():
    """The pillar of a small room leaves no way past it: robot and sources are on the same side."""
    for scale in (0.3, 0.25):
        floor_ = Floor(*LAYOUTS["pillar"], scale)
        rng = np.random.default_rng(0)
        assert all(np.isfinite(floor_.distance(floor_.sample(rng), floor_.sample(rng))) for _ in range(50))
    with pytest.raises(TaskError, match="no place to stand"):
        Floor(*LAYOUTS["pillar"], 0.1)


def test_as_a_task():
    section = {"observe": ["audio", "pose"], "steps": 3}
    config = SimpleNamespace(task="sound_l", seed=0, action_repeat=1, time_limit=0, image_size=[64, 64], sound=section)
    config.audio_dim, config.text = 0, {"length": 8}
    env = make_env(config)
    steps = [env.reset(), *(env.step(np.zeros(2)) for _ in range(3))]
    assert [bool(step["is_last"]) for step in steps] == [False, False, False, True]
    assert not steps[-1]["is_terminal"] and steps[-1]["log_success"] == 0
    with pytest.raises(TaskError, match="sound_attic.*sound_pillar"):
        make_env(SimpleNamespace(**{**vars(config), "task": "sound_attic"}))
