"""The world of cues: where the cue is, where it is not, and what a policy without it reaches."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from envs import TaskError, make_env
from envs.cues import COLOURS, KINDS, PITCHES, RATE, WORDS, CueWorld


def read(obs: dict) -> dict:
    """The class that each modality tells; None where it tells none."""
    image = obs["image"].astype(float)
    coloured = image[np.ptp(image, axis=-1) > 90]
    spectrum = np.abs(np.fft.rfft(obs["audio"][0]))
    pitch = spectrum.argmax() * RATE / obs["audio"].shape[-1]
    loud = spectrum.max() > 5 * np.median(spectrum) + 10
    return {
        "image": int(np.square(COLOURS - coloured.mean(0)).sum(-1).argmin()) if len(coloured) > 50 else None,
        "audio": int(np.abs(np.array(PITCHES) - pitch).argmin()) if loud else None,
        "text": WORDS.index(obs["text"]) if obs["text"] else None,
        "vector": round((float(obs["vector"][1]) + 1) / 2 * 3) if obs["vector"][0] > 0.5 else None,
    }


@pytest.mark.parametrize("kinds", [*((kind,) for kind in KINDS), ("audio", "image"), KINDS])
def test_the_cue_is_where_it_should_be(kinds):
    env = CueWorld(kinds, seed=1, delay=2)
    for _ in range(20):
        told = read(env.reset())
        assert {kind for kind, value in told.items() if value is not None} == set(kinds)
        (answer,) = {value for value in told.values() if value is not None}
        for _ in range(2):
            step = env.step(0)
            assert set(read(step).values()) == {None} and not step["is_last"]
        last = env.step(answer)
        assert set(read(last).values()) == {answer}, "all modalities reveal it"
        assert last["reward"] == last["log_success"] == 1 and last["is_last"] and last["is_terminal"]


def test_guessing_is_right_by_chance():
    env, rng, won = CueWorld(("text",), seed=2, delay=0), np.random.default_rng(0), []
    for _ in range(600):
        env.reset()
        won.append(env.step(int(rng.integers(4)))["reward"])
    assert np.mean(won) == pytest.approx(0.25, abs=0.06)


def test_missing_modalities_are_left_out():
    env = CueWorld(KINDS, seed=3, missing=0.3)
    there = np.array([[kind in env.reset() for kind in KINDS] for _ in range(300)])
    assert there.mean(0) == pytest.approx(0.7, abs=0.1) and not there.all(1).all()


def test_as_a_task():
    config = SimpleNamespace(task="cue_audio_image", seed=0, action_repeat=1, time_limit=0, image_size=[32, 32])
    config.cue, config.audio_dim, config.text = {"delay": 1, "samples": 200}, 0, {"length": 4}
    env = make_env(config)
    step = env.reset()
    assert env.obs_space["text"].tokenizer.size == 3 + len(WORDS), "words, not bytes"
    assert step["audio"].shape == (1, 200) and step["image"].shape == (32, 32, 3) and step["text"].tolist() == [0] * 4
    assert all(env.obs_space[key].contains(step[key]) for key in env.obs_space)
    with pytest.raises(TaskError, match="cue_smell.*image, audio, text, vector"):
        make_env(SimpleNamespace(**{**vars(config), "task": "cue_smell"}))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_an_agent_learns_from_each_kind_and_does_without(tmp_path):
    """Trains for five minutes. Chance is 0.25."""
    script = Path(__file__).resolve().parent.parent / "scripts" / "cues.py"
    flags = ["--out", tmp_path / "out.jsonl", "--folder", tmp_path, "--steps", "6000", "--only", "all, concat"]
    done = subprocess.run([sys.executable, script, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert found["success"] > 0.95 and found["success without any"] < 0.4
    for kind in KINDS:
        assert found[f"success without {kind}"] > found["success"] - 0.05, kind
    assert found["image from audio"] > 0.9
