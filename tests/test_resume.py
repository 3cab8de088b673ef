"""Runs that are interrupted: by kill -9 at random moments, by Ctrl-C, by SIGTERM; and runs that must be equal."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import config as configuration
import tools
from dreamer import Trainer
from replay import Replay

ROOT = Path(__file__).resolve().parent.parent
CARTPOLE = (
    "--configs debug --task gym_CartPole-v1 --device cpu --threads 1 --eval_every 0 --video_pred_log false".split()
)


def start(*flags: str, **kwargs) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "dreamer.py"), *map(str, flags)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=1500)  # pytest has a limit of its own
    assert process.returncode == 0, output[-3000:]
    return output


def wait_for(folder: Path, pattern: str, process: subprocess.Popen) -> None:
    """Until a file of that name is in the folder."""
    end = time.time() + 120
    while not any(folder.glob(pattern)):
        assert process.poll() is None and time.time() < end, process.communicate()[0][-3000:]
        time.sleep(0.02)


def metrics(logdir: Path) -> list[dict]:
    """All logged scalars but those that measure time."""
    rows = [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def leaves(value, path="") -> dict:
    """Every tensor and number of a nested checkpoint, by path."""
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in leaves(item, f"{path}/{key}").items()}
    return {path: value}


def assert_same(one: dict, two: dict) -> None:
    one, two = leaves(one), leaves(two)
    assert one.keys() == two.keys()
    for key, value in one.items():
        same = torch.equal(value, two[key]) if torch.is_tensor(value) else value == two[key]
        assert same, key


def stored(logdir: Path) -> list[tuple[str, int]]:
    """(piece, length) of every finished file; a temporary one is not finished."""
    return [
        (path.stem.rsplit("-", 1)[0], int(path.stem.rsplit("-", 1)[1])) for path in (logdir / "train_eps").glob("*.npz")
    ]


@pytest.fixture(scope="module")
def episodes(tmp_path_factory) -> Path:
    """Recorded episodes of a made-up task, two observation keys, 400 steps."""
    from gymnasium.spaces import Box

    folder = tmp_path_factory.mktemp("episodes")
    generator = np.random.default_rng(0)
    replay = Replay(folder, {"state": Box(-9, 9, (3,), np.float32)}, 2, capacity=1000, length=8, streams=1, seed=0)
    for step in range(400):
        flags = {"is_first": step % 50 == 0, "is_last": step % 50 == 49, "is_terminal": step % 100 == 99}
        observation = {"state": generator.normal(size=3).astype(np.float32), "reward": np.float32(step % 7)}
        replay.add(0, {**observation, **flags, "action": generator.uniform(-1, 1, 2).astype(np.float32)})
    replay.flush()
    return folder


EVERYTHING = (
    "--configs debug hierarchical --imag_horizon 8 --hier.every 4 --hier.goal.units 16 --metagrad hypergradient "
)
EVERYTHING += "--expl_behavior plan2explore --expl_streams icm:0.1,empowerment:0.1,rnd:0.1 --opt.warmup 0"


ONE_STEP = "--configs debug --metagrad one_step --expl_streams rnd:0.1 --opt.warmup 0"


@pytest.mark.parametrize(
    "own",
    ["--configs debug", *(pytest.param(flags, marks=pytest.mark.slow) for flags in (EVERYTHING, ONE_STEP))],
    ids=["plain", "every behaviour", "one-step meta-gradients"],
)
def test_offline_run_killed_and_resumed_equals_uninterrupted(own, episodes, tmp_path):
    flags = f"{own} --task none --device cpu --threads 1 --train_ratio 32 --steps 120 --log_every 20".split()
    flags += f"--save_every 30 --eval_every 40 --offline_traindir {episodes} --offline_evaldir {episodes}".split()
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(start(*flags, "--logdir", whole))
    generator = random.Random(1)
    for _ in range(2):
        process = start(*flags, "--logdir", broken)
        wait_for(broken, "latest.pt", process)
        time.sleep(generator.uniform(0, 2))
        process.kill()
        process.communicate()
    finish(start(*flags, "--logdir", broken))
    assert len(metrics(whole)) >= 6 and metrics(whole) == metrics(broken)
    one, two = (tools.load_checkpoint(logdir / "latest.pt") for logdir in (whole, broken))
    one.pop("config"), two.pop("config")
    assert one["counters"]["updates"] == 120
    assert_same(one, two)


def test_kill_9_loses_and_doubles_nothing(tmp_path):
    flags = [*CARTPOLE, "--steps", "2000", "--save_every", "50", "--logdir", tmp_path]
    generator = random.Random(0)
    before: dict[str, int] = {}
    for _ in range(3):
        process = start(*flags)
        wait_for(tmp_path, "latest.pt", process)
        time.sleep(generator.uniform(0, 3))
        process.kill()
        process.communicate()
        now = {}
        for piece, length in stored(tmp_path):
            now[piece] = max(length, now.get(piece, 0))
        assert all(now.get(piece, 0) >= length for piece, length in before.items()), "a finished piece is gone"
        before = now
        trainer = Trainer(configuration.load([str(flag) for flag in flags]))
        try:
            check_counters(trainer, now, tools.load_checkpoint(tmp_path / "latest.pt"))
        finally:
            trainer.close()
    steps = sum(length - piece.endswith("p000") for piece, length in before.items())
    assert 100 < steps < 2000
    assert "Finished at frame 2,00" in finish(start(*flags))  # two environments: 2,000 or one more
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)


def check_counters(trainer: Trainer, pieces: dict[str, int], checkpoint: dict) -> None:
    """What was read agrees with the files, and everything that was saved is back, bit for bit."""
    assert len(trainer.replay) == sum(pieces.values())
    assert trainer.frames == trainer.replay.steps == sum(n - piece.endswith("p000") for piece, n in pieces.items())
    assert trainer.replay.steps >= checkpoint["counters"]["agent_steps"]
    assert trainer.updates == checkpoint["counters"]["updates"]
    asked = (
        (trainer.replay.steps - checkpoint["counters"]["train_start"]) * 8 / 32
    )  # the debug block's train ratio and batch
    assert trainer.owed == max(0, int(asked) - trainer.updates)
    parts = ("world_model", "behavior", "optimizer", "generators")
    assert_same(trainer.agent.checkpoint(), {key: checkpoint[key] for key in parts})
    assert trainer.random.state() == checkpoint["random_actions"]
    assert json.loads(trainer.replay.state()["generator"]) == json.loads(checkpoint["replay"]["generator"])


def test_same_seed_same_run(tmp_path):
    """Bit for bit, and whether environments step here or in processes, beside the updates."""
    first, again, other = (deterministic_run(tmp_path / f"{n}", seed=seed) for n, seed in enumerate((3, 3, 4)))
    beside = deterministic_run(tmp_path / "processes", "--parallel", "process", seed=3)
    assert first[0] == again[0] == beside[0] and first[0] != other[0]
    assert_same(first[1], again[1])
    assert_same(first[1], beside[1])


@pytest.mark.slow
def test_same_seed_same_compiled_run(tmp_path):
    first, again = (deterministic_run(tmp_path / name, "--compile", "true", seed=3) for name in ("a", "b"))
    assert first[0] == again[0]
    assert_same(first[1], again[1])


def deterministic_run(logdir: Path, *flags: str, seed: int) -> tuple[list[dict], dict]:
    """Metrics and checkpoint."""
    keys = ("--steps", 200, "--seed", seed, "--deterministic_run", "true", "--logdir", logdir)
    finish(start(*CARTPOLE, *keys, *flags))
    checkpoint = tools.load_checkpoint(logdir / "latest.pt")
    checkpoint.pop("config")
    return metrics(logdir), checkpoint


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_signal_saves_and_exits_cleanly(number, tmp_path):
    flags = [*CARTPOLE, "--steps", "100000", "--parallel", "process", "--save_every", "100000", "--logdir", tmp_path]
    process = start(*flags, start_new_session=True)
    wait_for(tmp_path / "train_eps", "*.npz", process)
    os.killpg(process.pid, number)  # a terminal's Ctrl-C reaches the workers too
    output = finish(process)
    assert "Stopped at frame" in output and "Traceback" not in output
    checkpoint = tools.load_checkpoint(tmp_path / "latest.pt")
    steps = sum(length - piece.endswith("p000") for piece, length in stored(tmp_path))
    assert checkpoint["counters"]["agent_steps"] == steps
    finish(start(*flags, "--steps", str(steps + 20)))
