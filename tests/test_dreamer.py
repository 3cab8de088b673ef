"""The front door: runs as a user starts them, what they leave behind, what they say when something is wrong."""

import ast
import contextlib
import dataclasses
import errno
import functools
import importlib.util
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import cloudpickle
import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from gymnasium import spaces
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import config as configuration
import dreamer
import envs
import tools
from distributions import OneHot
from dreamer import Dreamer, Trainer, cli, make_envs, play
from envs import Env, register_env, transition
from errors import UserError
from exploration import Random
from modalities import MODALITY_CONFIGS
from models import total_loss
from networks import features
from parallel import EnvError

ROOT = Path(__file__).resolve().parent.parent
DEBUG = "--configs debug --device cpu --threads 1".split()
# The least around the training loop: no evaluation, no pictures, no TensorBoard (whose import takes seconds).
BARE = [*DEBUG, *"--eval_every 0 --video_pred_log false --tensorboard false --imag_horizon 2".split()]
CARTPOLE = [*BARE, *"--task gym_CartPole-v1 --log_every 40 --save_every 40".split()]
WALKER = [
    *"--configs dmc_vision debug --device cpu --threads 1 --image_size 32 32 --dmc.fast_render true".split(),
    *"--log_every 80 --eval_every 1000 --save_every 80".split(),
]


needs_ale = pytest.mark.skipif(
    importlib.util.find_spec("ale_py") is None, reason="ale-py is not installed (requirements/atari.txt)"
)


# Environments


class Toy(Env):
    """Episodes of `length` steps. Observes a vector [3] (episode, step, 1) and, if asked, a frame; reward 1 a step.

    nan_at, raise_at: the step of the first episode at which the vector is NaN, or `step` raises.
    """

    def __init__(self, length=10, frame=None, nan_at=None, raise_at=None, act_space=None):
        self.length, self.frame, self.nan_at, self.raise_at = length, frame, nan_at, raise_at
        self.obs_space = {"vector": spaces.Box(-np.inf, np.inf, (3,), np.float32)}
        if frame:
            self.obs_space["image"] = spaces.Box(0, 255, (*frame, 3), np.uint8)
        self.act_space = act_space or spaces.Box(-1, 1, (2,), np.float32)
        self.episode = -1

    def reset(self):
        self.episode, self.count = self.episode + 1, 0
        return transition(self.observe(), first=True)

    def step(self, action):
        self.count += 1
        if self.count == self.raise_at:
            raise ZeroDivisionError("the toy broke")
        last = self.count == self.length
        return transition(self.observe(), 1.0, last=last, terminal=last)

    def observe(self):
        vector = np.array([self.episode, self.count, 1], np.float32)
        if self.count == self.nan_at:
            vector[1] = np.nan
        return {"vector": vector} | ({"image": np.full((*self.frame, 3), self.count, np.uint8)} if self.frame else {})


@pytest.fixture(autouse=True)
def leave_no_trace():
    """`cli` sets up the process; the next test finds it as it was."""
    root, registry = logging.getLogger(), dict(envs._registry)
    handlers, level = root.handlers[:], root.level
    yield
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    envs._registry.clear()
    envs._registry.update(registry)
    if torch.are_deterministic_algorithms_enabled():  # setting it imports a compiler
        torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)


# Running


def start(*flags, timeout=280) -> subprocess.CompletedProcess:
    """`python dreamer.py` as from a shell."""
    command = [sys.executable, str(ROOT / "dreamer.py"), *map(str, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


def run(*flags) -> tuple[int, str, str]:
    """The same in this process: exit status, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli(configuration.load([str(flag) for flag in flags]))
    return status, out.getvalue(), err.getvalue()


def succeed(*flags) -> str:
    status, out, err = run(*flags)
    assert status == 0, out[-2000:] + err
    return out


def fail(*flags) -> str:
    """The one line that a run ends with."""
    status, _, err = run(*flags)
    assert status == 1 and err.startswith("Error: ") and err.count("\n") == 1, err
    return err.strip()


def metrics(logdir: Path) -> list[dict]:
    return [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def weights(agent: Dreamer) -> dict[str, torch.Tensor]:
    """What the optimizer moves."""
    return {
        key: value.clone()
        for part in ("world_model", "behavior")
        for key, value in agent.checkpoint()[part].items()
        if "slow_critic" not in key and "retnorm" not in key
    }


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.fixture(scope="module")
def walker(tmp_path_factory) -> tuple[Path, str]:
    """A finished run of dmc_vision, started from a shell: its logdir and what it printed."""
    logdir = tmp_path_factory.mktemp("walker")
    done = start(*WALKER, "--steps", 240, "--logdir", logdir)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    return logdir, done.stdout


@pytest.fixture(scope="module")
def cartpole(tmp_path_factory) -> Path:
    """A finished run of CartPole, 120 frames; not to be written to."""
    logdir = tmp_path_factory.mktemp("cartpole")
    succeed(*CARTPOLE, "--steps", 120, "--logdir", logdir)
    return logdir


@pytest.fixture
def begun(cartpole, tmp_path) -> Path:
    """A copy of that run, to go on with."""
    return Path(shutil.copytree(cartpole, tmp_path / "begun"))


# 1. A run from its beginning to its end


def test_a_vision_run_shows_what_it_does(walker):
    logdir, out = walker
    assert (
        "INFO - Training dmc_walker_walk on cpu from 2 environments: observes image 32x32x3; acts 6 continuous" in out
    )
    for module in ("encoder", "rssm", "decoder", "reward", "cont", "actor", "critic (extrinsic)", "total"):
        assert re.search(rf"^{re.escape(module)} +\d+\.\d{{3}} M$", out, re.M), module
    assert re.search(r"INFO - Replay: up to 120 agent steps in \S+ GB of memory; 0 stored so far", out)
    assert f"INFO - Watch: tensorboard --logdir {logdir}\n" in out
    assert re.search(r"Progress: 240/240 frames \| \S+ frames/s \| 14 updates \| return [\d.]+ \| 0s left", out)
    assert "0 updates | return - |" in out  # not nan
    returns = re.findall(r"^INFO - Episode return: (-?\d+\.\d), length: (\d+)$", out, re.M)
    assert [length for _, length in returns] == ["30"] * 4  # time_limit 60 frames, 2 a step
    lines = re.findall(r"^INFO - Step (\d+): (\{.*\})$", out, re.M)
    assert [int(step) for step, _ in lines] == [80, 160, 240, 240]
    assert ast.literal_eval(lines[-1][1]).keys() == {"eval/return", "eval/length"}
    shown = ast.literal_eval(lines[-2][1])
    assert {"world/recon_loss", "world/kl_loss", "policy/policy_loss", "time/fps"} <= shown.keys()
    assert f"INFO - Finished at frame 240; saved in {logdir}\n" in out
    assert "Traceback" not in out


def test_a_vision_run_leaves_everything_in_its_logdir(walker):
    logdir, _ = walker
    found = {re.sub(r"events\.out\.tfevents.*", "events", path.name) for path in logdir.iterdir()}
    expected = {
        "previous.pt",
        "config.yaml",
        "latest.pt",
        "log.txt",
        "metrics.jsonl",
        "events",
        "train_eps",
        "eval_eps",
        "videos",
    }
    expected.add(".lock")
    assert found - {f for f in found if f.startswith("eval-")} == expected
    saved = configuration.Config.read(logdir / "config.yaml")
    assert saved == configuration.resolve_paths(
        configuration.load([*WALKER, "--steps", "240", "--logdir", str(logdir)])
    )
    text = (logdir / "metrics.jsonl").read_text()
    assert all(line.startswith('{"step": ') for line in text.splitlines())
    rows = metrics(logdir)
    names = set().union(*rows)
    assert {"episode/return", "episode/length", "eval/return", "eval/length", "world/recon_loss"} <= names
    assert {"world/kl_loss", "policy/policy_loss", "opt/grad_norm", "replay/steps", "time/fps"} <= names
    assert all(value is not None for row in rows for value in row.values())  # null would be a NaN
    assert [row["step"] for row in rows] == [80, 160, 240, 240]
    assert rows[-2]["replay/steps"] == 120 and rows[-2]["train/updates"] == 14 and rows[-1]["eval/length"] == 30


def test_tensorboard_has_scalars_videos_and_predictions(walker):
    logdir, _ = walker
    events = EventAccumulator(str(logdir), size_guidance={"images": 0, "scalars": 0}).Reload()
    names = set().union(*metrics(logdir)) - {"step"}
    assert set(events.Tags()["scalars"]) == names
    assert [event.step for event in events.Scalars("eval/return")] == [240]
    films = {}
    for tag in ("open_loop/image", "eval/episode"):
        (event,) = events.Images(tag)
        with Image.open(io.BytesIO(event.encoded_image_string)) as film:
            assert film.format == "GIF"
            films[tag] = (film.size, film.n_frames)
    assert films["open_loop/image"] == ((6 * 36, 3 * 36), 8)  # six windows; truth, model, error; framed
    assert films["eval/episode"][0] == (32, 32) and 25 <= films["eval/episode"][1] <= 31
    for name in ("open_loop_image", "eval_episode"):
        assert len(imageio.mimread(logdir / "videos" / f"{name}-000000240.mp4", memtest=False)) >= 8


def test_evaluation_of_a_checkpoint(walker):
    logdir, _ = walker
    before = files(logdir)
    done = start("--mode", "eval", "--checkpoint", logdir / "latest.pt", "--episodes", 3, "--eval_envs", 1)
    assert done.returncode == 0, done.stderr
    assert f"{logdir / 'latest.pt'} (frame 240) on dmc_walker_walk, mode:\n" in done.stdout
    assert re.search(r"^return \d+\.\d ± \d+\.\d over 3 episodes \(mean length 30\)$", done.stdout, re.M), done.stdout
    film = Path(re.search(r"film of the first: (.*\.mp4)", done.stdout)[1])
    frames = imageio.mimread(film, memtest=False)
    assert len(frames) >= 30 and frames[0].shape == (256, 256, 3)
    assert {**files(logdir), film.name: b""} == {**before, film.name: b""}  # nothing else was touched


def test_evaluation_elsewhere_than_in_training(tmp_path):
    succeed(*CARTPOLE, "--steps", 100, "--audio_dim", 16, "--logdir", tmp_path)
    play = ["--mode", "eval", "--checkpoint", tmp_path / "latest.pt", "--episodes", 2, "--parallel", "serial"]
    assert "absent" not in succeed(*play)
    assert "Observed in training and not here, so that it counts as absent: audio" in succeed(*play, "--audio_dim", 0)
    assert "on gym_CartPole-v0" in succeed(*play, "--task", "gym_CartPole-v0")
    assert "'audio' has the shape (8,) here, and had (16,) in training" in fail(*play, "--audio_dim", 8)
    assert "action space is Box(-1.0, 1.0, (1,), float32) here, and was Discrete(2) in training" in fail(
        *play, "--task", "gym_Pendulum-v1"
    )
    assert "networks differ" in fail(*play, "--dyn.deter", 64)


def test_the_same_command_after_the_end_and_with_more_steps(walker, tmp_path):
    logdir = Path(shutil.copytree(walker[0], tmp_path / "moved"))
    before = tools.load_checkpoint(logdir / "latest.pt")
    stored = files(logdir / "train_eps")
    out = succeed(*WALKER, "--steps", 240, "--logdir", logdir)
    assert "Resuming at frame 240, update 14" in out and "Finished at frame 240" in out
    after = tools.load_checkpoint(logdir / "latest.pt")
    for part in ("world_model", "behavior"):
        assert same(before[part], after[part])
    assert after["counters"] == before["counters"] and files(logdir / "train_eps") == stored
    assert len(metrics(logdir)) == len(metrics(walker[0]))
    out = succeed(*WALKER, "--steps", 300, "--logdir", logdir)
    assert "Finished at frame 300" in out
    counters = tools.load_checkpoint(logdir / "latest.pt")["counters"]
    assert counters["agent_steps"] == 150 and counters["updates"] == int((150 - 64) * 8 / 32)
    assert files(logdir / "train_eps").items() >= stored.items() - {
        item for item in stored.items() if not item[0].endswith("-0031.npz")
    }
    steps = [row["step"] for row in metrics(logdir)]
    assert steps == sorted(steps) and steps[-1] == 300


def test_cartpole_with_processes_and_proprio(tmp_path):
    done = start(*DEBUG, *"--task gym_CartPole-v1 --parallel process --steps 160 --log_every 80".split(),
                 "--logdir", tmp_path / "{task}")  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "observes vector 4; acts 2 discrete" in done.stdout
    logdir = tmp_path / "gym_CartPole-v1"
    names = set().union(*metrics(logdir))
    assert {"episode/return", "eval/return", "world/recon_loss", "world/recon_vector"} <= names
    assert len(list((logdir / "eval_eps").glob("*.npz"))) == 2  # of eval_episode_num


def test_proprio_run(tmp_path):
    flags = (
        "--configs dmc_proprio debug --device cpu --threads 1 --steps 160 --tensorboard false --log_every 80".split()
    )
    out = succeed(*flags, "--logdir", tmp_path)
    assert "observes orientations 14, height 1, velocity 9; acts 6 continuous" in out
    rows = metrics(tmp_path)
    assert {"world/recon_height", "world/recon_orientations", "eval/return"} <= set().union(*rows)
    assert [path.name for path in (tmp_path / "videos").iterdir()] == ["eval_episode-000000160.mp4"]


# 2. What is wrong, in one line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_asked_for_and_absent(tmp_path):
    text = fail(*CARTPOLE, "--device", "cuda", "--logdir", tmp_path)
    assert re.fullmatch(r"Error: --device cuda: torch .*Use --device cpu, or --configs \.\.\. cpu.*", text)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
    ],
    ids=["cuda", "host"],
)
def test_out_of_memory_names_the_keys_that_help(error, tmp_path, monkeypatch):
    def train_step(*args):
        raise error

    monkeypatch.setattr(Dreamer, "train_step", train_step)
    text = fail(*CARTPOLE, "--logdir", tmp_path)
    assert "batch_size" in text and "batch_length" in text and "size12m" in text
    assert ("dataset_size" in text) == isinstance(error, RuntimeError) * ("CPU" in str(error))


def test_a_logdir_of_another_configuration(begun):
    checkpoint, saved = (begun / "latest.pt").read_bytes(), (begun / "config.yaml").read_bytes()
    flags = [*CARTPOLE, "--logdir", begun]
    text = fail(*flags, "--steps", 130, "--batch_size", 5)
    assert f"{begun} belongs to another configuration: batch_size was 4, is now 5." in text
    assert "another --logdir" in text and "--batch_size 4" in text and "--force true" in text
    text = fail(*flags, "--steps", 130, "--encoder.units", 24, "--force", "true")
    assert "The checkpoint's networks differ from the configured ones: " in text and "size mismatch" in text
    text = fail(*flags, "--steps", 130, "--expl_behavior", "icm", "--force", "true")
    assert "The checkpoint has nothing of 'explorer'" in text and "--checkpoint" in text
    assert (begun / "latest.pt").read_bytes() == checkpoint and (begun / "config.yaml").read_bytes() == saved
    succeed(*flags, "--steps", 130)
    succeed(*flags, "--steps", 140, "--batch_size", 5, "--force", "true")
    assert configuration.Config.read(begun / "config.yaml").batch_size == 5
    succeed(*flags, "--steps", 150, "--batch_size", 5)  # now it is this run's own


def test_a_logdir_in_which_another_process_trains(begun):
    flags = [*CARTPOLE, "--steps", 130, "--logdir", begun]
    with contextlib.closing(Trainer(configuration.load([str(flag) for flag in flags]))):
        assert f"Another process is training in {begun}" in fail(*flags)
    succeed(*flags)


def test_a_mistake_leaves_a_logdir_that_can_be_used(tmp_path):
    fail(*CARTPOLE, "--task", "gym_CartPoll-v1", "--logdir", tmp_path)
    fail(*CARTPOLE, "--encoder.mlp_keys", "position", "--logdir", tmp_path)
    succeed(*CARTPOLE, "--steps", 20, "--logdir", tmp_path)


def test_damaged_pieces_are_set_aside_and_the_run_goes_on(begun):
    noise, cut = (next((begun / "train_eps").glob(f"{stream}-e000000-p000-*.npz")) for stream in ("s000", "s001"))
    noise.write_bytes(np.random.default_rng(0).bytes(500))
    cut.write_bytes(cut.read_bytes()[:-300])
    damaged = {path.name: path.read_bytes() for path in (noise, cut)}
    out = succeed(*CARTPOLE, "--steps", 200, "--logdir", begun)
    for path in (noise, cut):
        assert re.search(rf"WARNING - {path} is damaged \(.*\); moved to {begun}/train_eps/corrupt/{path.name}", out)
    assert files(begun / "train_eps" / "corrupt") == damaged
    rows = [row for row in metrics(begun) if "replay/corrupt" in row]
    assert rows[0]["replay/corrupt"] == 0 and rows[-1]["replay/corrupt"] == 2
    assert "Finished at frame 20" in out


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    for flag in ("--logdir", "--traindir"):
        text = fail(*CARTPOLE, "--logdir", tmp_path / "run", flag, tmp_path / "file" / "below")
        assert f"Could not write {tmp_path / 'file' / 'below'}" in text and "Not a directory" in text


def test_a_damaged_checkpoint_without_an_earlier_one_is_one_line(begun):
    (begun / "previous.pt").unlink(missing_ok=True)
    path = begun / "latest.pt"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    text = fail(*CARTPOLE, "--logdir", begun)
    assert str(path) in text and "truncated" in text and "move this one away" in text
    assert path.stat().st_size == len(content) // 2
    assert str(path) in fail("--mode", "eval", "--checkpoint", path)
    assert "found no such checkpoint" in fail("--mode", "eval", "--checkpoint", begun / "best.pt")
    path.rename(begun / "aside.pt")
    out = succeed(*CARTPOLE, "--steps", 130, "--logdir", begun)  # its data is used, its updates are owed
    assert re.search(r"Resuming at frame 12\d, update 0", out)
    assert tools.load_checkpoint(path)["counters"]["updates"] == int((129 - 64) * 8 / 32)


def test_a_file_that_is_no_checkpoint_of_this_program(tmp_path):
    tools.save_checkpoint(tmp_path / "other.pt", {"weights": torch.zeros(3)})
    assert "other.pt" in fail("--mode", "eval", "--checkpoint", tmp_path / "other.pt", "--device", "cpu")
    assert "other.pt" in fail(*CARTPOLE, "--checkpoint", tmp_path / "other.pt", "--logdir", tmp_path / "run")


@pytest.mark.parametrize(
    "flags, parts",
    [
        (
            ["--encoder.mlp_keys", "position"],
            ["encoder.mlp_keys is 'position'", "vector (vector/audio)", "image (image)"],
        ),
        (["--decoder.cnn_keys", "camera.*"], ["decoder.cnn_keys is 'camera.*'", "none of the image observations"]),
        (["--encoder.*_keys", "$^"], ["match no observation", "vector", "image"]),
        (["--image_size", 30, 32], ["30x32 cannot be halved 4 times", "multiples of 16", "--image_size 32 32"]),
    ],
)
def test_observations_that_the_networks_cannot_take(flags, parts, tmp_path):
    register_env("toy", lambda config: Toy(frame=tuple(config.image_size)))
    text = fail(*BARE, "--task", "toy", "--image_size", 32, 32, *flags, "--logdir", tmp_path)
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    "task, parts",
    [
        ("dmc_walker_wlk", ["dmc_walker_wlk", "did you mean dmc_walker_walk"]),
        ("dcm_walker_walk", ["Unknown task 'dcm_walker_walk'", "did you mean dmc_<domain>_<task>"]),
        ("gym_CartPoll-v1", ["gym_CartPoll-v1", "CartPole"]),
        pytest.param("atari_pongg", ["atari_pongg"], marks=needs_ale),
        ("crafter_rewrd", ["did you mean crafter_reward"]),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_unknown_tasks(task, parts, tmp_path):
    text = fail(*BARE, "--task", task, "--logdir", tmp_path)
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    "task, package, file",
    [("crafter_reward", "crafter", "crafter"), ("atari_pong", "ale_py", "atari")],
)
def test_missing_packages(task, package, file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    assert f"pip install -r requirements/{file}.txt" in fail(*BARE, "--task", task, "--logdir", tmp_path)


def test_an_environment_that_raises_shows_its_own_traceback(tmp_path):
    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)  # so that the workers do not import torch with this file
    register_env("toy", broken)
    flags = [*BARE, *"--task toy --envs 1 --parallel process --steps 100 --logdir".split(), tmp_path]
    try:
        status, _, err = run(*flags)
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    assert status == 1
    assert err.startswith("Error: environment 0 failed in step:\nTraceback")
    assert "ZeroDivisionError: the toy broke" in err and "in step" in err


def broken():
    """An environment of plain numpy, pickled by value."""
    import gymnasium
    import numpy

    class Broken(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-1, 1, (2,), numpy.float32)
        action_space = gymnasium.spaces.Discrete(2)
        count = 0

        def reset(self, seed=None, options=None):
            return numpy.zeros(2, numpy.float32), {}

        def step(self, action):
            self.count += 1
            if self.count == 7:
                raise ZeroDivisionError("the toy broke")
            return numpy.zeros(2, numpy.float32), 0.0, False, False, {}

    return Broken()


def test_nan_in_an_observation_is_found_when_it_is_stored(tmp_path):
    register_env("toy", lambda config, mode, index: Toy(nan_at=4 if index == 1 else None))
    text = fail(*BARE, "--task", "toy", "--logdir", tmp_path)
    assert "observation 'vector' from stream 1 (environment 1), step 4 of the stream, episode 0: found nan" in text


# What a resumed run finds

POLE = [*BARE, *"--task gym_CartPole-v1 --train_ratio 8 --log_every 50 --save_every 50".split()]


def test_a_damaged_checkpoint_is_replaced_by_the_one_before(tmp_path):
    succeed(*POLE, "--steps", 200, "--logdir", tmp_path)
    before = tools.load_checkpoint(tmp_path / "previous.pt")["counters"]
    os.truncate(tmp_path / "latest.pt", 1000)
    out = succeed(*POLE, "--steps", 250, "--logdir", tmp_path)
    said = next(line for line in out.splitlines() if "damaged.pt" in line)
    assert "latest.pt: damaged" in said and f"goes on from previous.pt, of frame {before['frames']:,}" in said
    assert os.path.getsize(tmp_path / "damaged.pt") == 1000
    now = tools.load_checkpoint(tmp_path / "latest.pt")["counters"]
    assert now["updates"] == max(row["train/updates"] for row in metrics(tmp_path)) > before["updates"]
    (tmp_path / "latest.pt").unlink()  # as a crash between two renames would leave it
    assert f"Resuming at frame {now['frames']}" in succeed(*POLE, "--steps", 300, "--logdir", tmp_path)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), PermissionError(errno.EACCES, "Denied")])
def test_a_checkpoint_that_cannot_be_read_now_stays_the_latest(tmp_path, monkeypatch, error):
    succeed(*POLE, "--steps", 120, "--logdir", tmp_path)
    content = (tmp_path / "latest.pt").read_bytes()

    def broken(path, *args, real=tools.zipfile.ZipFile, **kwargs):
        if str(path).endswith("latest.pt"):
            raise error
        return real(path, *args, **kwargs)

    monkeypatch.setattr(tools.zipfile, "ZipFile", broken)
    assert "latest.pt could not be read" in fail(*POLE, "--steps", 200, "--logdir", tmp_path)
    assert (tmp_path / "latest.pt").read_bytes() == content and not (tmp_path / "damaged.pt").exists()


def test_no_moment_is_without_a_checkpoint(tmp_path, monkeypatch):
    """Whichever rename or link a crash comes before: one of the two is whole."""
    path = tmp_path / "latest.pt"
    tools.save_checkpoint(path, {"n": 1}, keep="previous.pt")
    tools.save_checkpoint(path, {"n": 2}, keep="previous.pt")
    assert [tools.load_checkpoint(tmp_path / name)["n"] for name in ("latest.pt", "previous.pt")] == [2, 1]

    class Crash(BaseException):
        pass

    calls = []

    def crash(*args, real=os.replace):
        if len(calls) == crash.at:
            raise Crash
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(os, "replace", crash)
    for crash.at in (0, 1):
        calls.clear()
        with pytest.raises(Crash):
            tools.save_checkpoint(path, {"n": 3}, keep="previous.pt")
        assert tools.load_checkpoint(path)["n"] == 2
    crash.at = -1
    monkeypatch.setattr(os, "link", lambda *_: exec("raise OSError('no links here')"))
    tools.save_checkpoint(path, {"n": 4}, keep="previous.pt")
    assert [tools.load_checkpoint(tmp_path / name)["n"] for name in ("latest.pt", "previous.pt")] == [4, 2]


@pytest.mark.parametrize(("key", "value", "per_100"), [("batch_size", 8, 12.5), ("train_ratio", 2, 6.25)])
def test_another_ratio_owes_updates_for_new_steps_alone(tmp_path, key, value, per_100):
    flags = [*POLE, "--batch_size", 4, "--batch_length", 8]
    succeed(*flags, "--steps", 150, "--logdir", tmp_path)
    before = metrics(tmp_path)[-1]
    out = succeed(*flags, f"--{key}", value, "--force", "true", "--steps", 300, "--logdir", tmp_path)
    assert f"WARNING - {key} changed: updates are owed for new steps alone" in out
    rows = [row for row in metrics(tmp_path) if row["step"] > before["step"]]
    for row in rows:
        expected = before["train/updates"] + (row["step"] - before["step"]) * per_100 / 100
        assert row["train/updates"] == pytest.approx(expected, abs=2)
    assert len(rows) >= 3


def test_another_ratio_owes_nothing_for_what_is_gone_either(tmp_path):
    succeed(*POLE, "--steps", 200, "--logdir", tmp_path)
    for path in sorted((tmp_path / "train_eps").glob("*.npz"))[::2]:
        path.unlink()
    flags = ["--task", "gym_CartPole-v1", "--force", "true", "--steps", 300]
    for ratio in (16, 0):  # 0: to collect only
        with contextlib.closing(make_trainer(tmp_path, *flags, "--train_ratio", ratio)) as trainer:
            assert trainer.owed == 0 and trainer.frames == 200


def test_an_interrupted_evaluation_is_made_up(tmp_path):
    register_env("toy", lambda: Toy(length=10))
    flags = ["--task", "toy", "--eval_every", 40, "--eval_episode_num", 2, "--eval_envs", 1, "--steps", 100]
    with contextlib.closing(make_trainer(tmp_path, *flags)) as trainer:
        act = trainer.agent.policy

        def policy(*args, **kwargs):
            if trainer.evaluated_at is None and trainer.frames >= 40:
                trainer.shutdown.requested = True
            return act(*args, **kwargs)

        trainer.agent.policy = policy
        trainer.run()
        assert trainer.evaluated_at is None and 40 <= trainer.frames < 60
        stopped = trainer.frames
    with contextlib.closing(make_trainer(tmp_path, *flags)) as trainer:
        trainer.run()
    evaluated = [row["step"] for row in metrics(tmp_path) if "eval/return" in row]
    assert len(evaluated) == 3 and stopped <= evaluated[0] < stopped + 5 and 80 <= evaluated[1] < 85


def test_starts_of_a_run_do_not_repeat_each_other(tmp_path):
    first = {}
    for steps in (60, 120, 180):
        succeed(*POLE, "--prefill", 1000, "--steps", steps, "--save_every", 10_000, "--logdir", tmp_path)
        (tmp_path / "latest.pt").unlink()  # as if each had been killed: nothing of the generators is left
        (tmp_path / "previous.pt").unlink(missing_ok=True)
        for path in (tmp_path / "train_eps").glob("*.npz"):
            with np.load(path) as piece:
                first.setdefault(path.name, piece["vector"][0].tobytes() + piece["action"][0].tobytes())
    assert len(first) > 6 and len(set(first.values())) == len(first)


def test_episodes_that_ended_after_the_checkpoint_are_counted(tmp_path):
    register_env("toy", lambda: Toy(length=10))
    flags = ["--task", "toy", "--prefill", 40, "--train_ratio", 4]
    with contextlib.closing(make_trainer(tmp_path, *flags, "--steps", 55)) as trainer:
        trainer.run()
        assert trainer.episodes == 2 * 2
    checkpoint = (tmp_path / "latest.pt").read_bytes()
    with contextlib.closing(make_trainer(tmp_path, *flags, "--steps", 120)) as trainer:
        trainer.run()
        episodes = trainer.episodes
    (tmp_path / "latest.pt").write_bytes(checkpoint)  # it was killed before it saved, its pieces are there
    with contextlib.closing(make_trainer(tmp_path, *flags, "--steps", 200)) as trainer:
        assert trainer.episodes == episodes > 4


def test_a_checkpoint_of_a_task_that_imports_is_not_played_unasked(tmp_path):
    succeed(*POLE, "--steps", 60, "--logdir", tmp_path)
    state = tools.load_checkpoint(tmp_path / "latest.pt")
    state["config"]["task"] = "gym_antigravity:CartPole-v1"
    tools.save_checkpoint(tmp_path / "other.pt", state)
    sys.modules.pop("antigravity", None)
    text = fail("--mode", "eval", "--checkpoint", tmp_path / "other.pt", "--parallel", "serial")
    assert "imports the module antigravity" in text and "--task gym_antigravity:CartPole-v1" in text
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    ("part", "found"),
    [("config", "config"), ("counters/updates", "updates"), ("generators", "generators"), ("replay/queue", "queue")],
)
def test_a_checkpoint_without_a_part_is_one_line(tmp_path, part, found):
    succeed(*POLE, "--steps", 60, "--logdir", tmp_path)
    state = tools.load_checkpoint(tmp_path / "latest.pt")
    *path, last = part.split("/")
    holder = state
    for key in path:
        holder = holder[key]
    del holder[last]
    tools.save_checkpoint(tmp_path / "latest.pt", state)
    (tmp_path / "previous.pt").unlink(missing_ok=True)
    assert found in fail(*POLE, "--steps", 100, "--logdir", tmp_path)


def test_a_checkpoint_of_another_format_is_one_line(tmp_path):
    succeed(*POLE, "--steps", 60, "--logdir", tmp_path)
    state = tools.load_checkpoint(tmp_path / "latest.pt")
    tools.save_checkpoint(tmp_path / "latest.pt", state | {"format": 7})
    (tmp_path / "previous.pt").unlink(missing_ok=True)
    assert "found format 7, expected 1" in fail(*POLE, "--steps", 100, "--logdir", tmp_path)


@pytest.mark.parametrize("how", ["raises", "nan", "killed"])
def test_whatever_ends_a_run_saves_first(tmp_path, how):
    options = {"raises": {"raise_at": 25}, "nan": {"nan_at": 25}, "killed": {"raise_at": 25}}[how]

    def fail_in(config, mode, index):
        toy = Toy(length=60, **options)
        if how == "killed":
            toy.count = 0
            toy.raise_at = None
            step = toy.step
            toy.step = lambda action: os.kill(os.getpid(), signal.SIGKILL) if toy.count == 24 else step(action)
        return toy

    register_env("toy", fail_in)
    backend = ["--parallel", "process"] if how == "killed" else []
    status, _, err = run(*BARE, "--task", "toy", "--steps", 400, "--save_every", 1000, *backend, "--logdir", tmp_path)
    assert status == 1 and err.startswith("Error: ")
    assert "An error ends the run at frame" in (tmp_path / "log.txt").read_text()
    assert (tmp_path / "latest.pt").exists()
    stored = [np.load(path) for path in sorted((tmp_path / "train_eps").glob("*.npz"))]
    assert [len(piece["reward"]) for piece in stored] == [25, 25]  # the reset, and 24 good steps
    assert not any(piece["is_terminal"].any() for piece in stored)


class HangsOnce(Toy):
    """Asks the run to stop and hangs, in the 25th step."""

    def step(self, action):
        if self.episode == 0 and self.count == 24:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return super().step(action)


def hang(*_, **__):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


@pytest.mark.parametrize("where", ["step", "evaluation", "film", "prediction", "update", "compilation"])
def test_a_stop_breaks_off_what_does_not_end_and_saves(tmp_path, where, monkeypatch, caplog):
    monkeypatch.setattr(tools, "Shutdown", functools.partial(tools.Shutdown, grace=0.3))
    register_env("toy", functools.partial(*((HangsOnce, 30) if where == "step" else (Toy, 20))))
    if where == "evaluation":
        register_env("toy", lambda mode: HangsOnce(30) if mode == "eval" else Toy(20))
    flags = ["--task", "toy", "--steps", 400, "--save_every", 1000, "--video_pred_log", "true", "--batch_length", 8]
    flags += ["--eval_every", 0 if where == "step" else 40, "--eval_envs", 1, "--eval_episode_num", 2]
    with contextlib.closing(make_trainer(tmp_path, *flags)) as trainer:
        if where == "film":
            monkeypatch.setattr(trainer.logger, "film", hang)
        if where == "prediction":
            monkeypatch.setattr(trainer.agent.world_model, "predict", hang)
        if where == "update":
            monkeypatch.setattr(trainer.agent.behavior, "loss", hang)
        if where == "compilation":
            monkeypatch.setattr(dreamer, "total_loss", torch.compile(dreamer.total_loss, backend=hang))
        begun = time.monotonic()
        trainer.run()
        assert time.monotonic() - begun < 30 and "it is broken off" in caplog.text
        frames, entries = trainer.frames, len(trainer.replay)
    assert tools.load_checkpoint(tmp_path / "latest.pt")["counters"]["frames"] == frames > 20
    stored = [np.load(path) for path in (tmp_path / "train_eps").glob("*.npz")]
    assert sum(len(piece["reward"]) for piece in stored) == entries
    monkeypatch.undo()
    with contextlib.closing(make_trainer(tmp_path, *flags, "--steps", frames + 20)) as trainer:
        assert trainer.frames == frames
        trainer.run()


def test_data_is_saved_while_the_run_hangs_outside_of_python(tmp_path, monkeypatch, caplog):
    """Its thread gets no signal there, as in a call of a library that does not return."""

    class Hangs(Toy):
        def step(self, action):
            if self.count == 24:
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)
                end = time.monotonic() + 20
                while time.monotonic() < end and not list((tmp_path / "train_eps").glob("*.npz")):
                    time.sleep(0.05)
                found.extend(np.load(path) for path in (tmp_path / "train_eps").glob("*.npz"))
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
            return super().step(action)

    found = []
    monkeypatch.setattr(tools, "Shutdown", functools.partial(tools.Shutdown, grace=0.2))
    monkeypatch.setattr(tools.Shutdown.func, "_break", lambda *_: None)
    register_env("toy", lambda: Hangs(100))
    with contextlib.closing(make_trainer(tmp_path, "--task", "toy", "--envs", 1, "--save_every", 1000)) as trainer:
        trainer.run()
    assert len(found) == 1 and len(found[0]["reward"]) == 25 and "The run hangs" in caplog.text
    assert (tmp_path / "latest.pt").exists()  # once it came back


def test_environments_that_fail_are_made_anew(tmp_path):
    """Nothing of their episodes is lost, each is marked as cut, and the new ones differ from those before."""

    class Breaks(Toy):
        def observe(self):
            return super().observe() | {"vector": rng.normal(size=3).astype(np.float32)}

        def step(self, action):
            if rng.random() < 0.1:
                raise ZeroDivisionError("the simulator diverged")
            return super().step(action)

    rng = np.random.default_rng(0)
    register_env("toy", lambda: Breaks(30))
    flags = ["--task", "toy", "--steps", 200, "--log_every", 50, "--env_restarts", 1000, "--logdir", tmp_path]
    succeed(*BARE, *flags)
    pieces = [np.load(path) for path in (tmp_path / "train_eps").glob("*.npz")]
    assert sum(len(piece["reward"]) - 1 for piece in pieces) in (200, 201)  # frames; two environments
    cut = [piece for piece in pieces if not piece["is_terminal"][-1]]
    assert len(cut) >= 10 and all(not piece["is_terminal"].any() for piece in cut)
    rows = metrics(tmp_path)
    assert 10 <= rows[-1]["train/env_restarts"] <= len(cut) + 2
    log = (tmp_path / "log.txt").read_text()
    assert "the simulator diverged" in log and "made anew (1 of 1000 env_restarts)" in log
    status, _, err = run(*BARE, *flags, "--steps", 400, "--env_restarts", 2)
    assert status == 1 and "All 2 restarts (env_restarts) are used up" in err
    assert "An error ends the run at frame" in (tmp_path / "log.txt").read_text()


def test_an_environment_that_was_made_anew_does_not_repeat_itself():
    seeds = {envs.env_seed(0, "train", 1, start, attempt) for start in range(5) for attempt in range(5)}
    assert len(seeds) == 25 and envs.env_seed(0, "train", 1, 3) in seeds


def test_a_run_that_fails_at_once_is_not_bound_to_its_settings(tmp_path):
    class Fails(Toy):
        def reset(self):
            raise ZeroDivisionError("no display")

    register_env("toy", Fails)
    status, _, err = run(*BARE, "--task", "toy", "--logdir", tmp_path)
    assert status == 1 and "no display" in err and not (tmp_path / "latest.pt").exists()
    register_env("toy", Toy)
    succeed(*BARE, "--task", "toy", "--seed", 5, "--steps", 20, "--logdir", tmp_path)


def test_data_is_saved_where_updates_are_found_bad_at_the_end(tmp_path):
    register_env("toy", lambda: Toy(length=100))
    with contextlib.closing(make_trainer(tmp_path, "--task", "toy", "--steps", 60, "--opt.max_bad", 3)) as trainer:
        store, bad = trainer._store_last, trainer.agent.optimizer.bad

        def last(obs):
            store(obs)
            bad.fill_(3)

        trainer._store_last = last
        with pytest.raises(UserError, match="not finite in the last 3 updates"):
            trainer.run()
    assert sum(len(np.load(path)["reward"]) for path in (tmp_path / "train_eps").glob("*.npz")) >= 60
    assert not (tmp_path / "latest.pt").exists()


@pytest.mark.parametrize("shape", [(16, 16, 4), None])
def test_a_frame_that_cannot_be_filmed_ends_the_film_alone(tmp_path, shape):
    """Four channels, or another size at each step."""

    class Renders(Toy):
        def render(self):
            return np.zeros(shape or (16 + self.count, 16, 3), np.uint8)

    register_env("toy", Renders)
    flags = [*BARE, "--task", "toy", "--steps", 40, "--eval_every", 20, "--video_pred_log", "true"]
    out = succeed(*flags, "--logdir", tmp_path)
    assert "No film of this evaluation" in out and any("eval/return" in row for row in metrics(tmp_path))
    assert not list((tmp_path / "videos").glob("eval*"))


def test_an_evaluation_is_told_before_its_film_is_finished(tmp_path, monkeypatch):
    register_env("toy", lambda: Toy(frame=(16, 16)))
    flags = [*BARE, *"--task toy --image_size 16 16 --*.mults 2 4 --steps 20 --eval_every 0".split()]
    succeed(*flags, "--logdir", tmp_path)

    def full(_):
        raise UserError("the disk is full")

    monkeypatch.setattr(tools.Film, "keep", full)
    status, out, err = run("--mode", "eval", "--checkpoint", tmp_path / "latest.pt", "--parallel", "serial")
    assert status == 1 and "return 10.0 ± 0.0" in out and "the disk is full" in err


def test_a_trainer_that_cannot_be_built_leaves_the_logdir_free(tmp_path):
    """As in a notebook, where the process goes on."""
    register_env("toy", Toy)
    (tmp_path / "latest.pt").write_bytes(b"nothing")
    with pytest.raises(UserError, match="latest.pt"):
        make_trainer(tmp_path, "--task", "toy")
    (tmp_path / "latest.pt").unlink()
    make_trainer(tmp_path, "--task", "toy").close()


def test_folders_that_are_written_belong_to_one_run(tmp_path):
    register_env("toy", Toy)
    shared = ["--task", "toy", "--traindir", tmp_path / "shared"]
    with contextlib.closing(make_trainer(tmp_path / "one", *shared)):
        with pytest.raises(UserError, match=f"Another process is training in {tmp_path / 'shared'}"):
            make_trainer(tmp_path / "two", *shared)
    make_trainer(tmp_path / "two", *shared).close()


def test_a_lock_is_not_written_through_a_link(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "thesis.txt")
    register_env("toy", Toy)
    with pytest.raises(UserError, match=r"Could not write .*\.lock"):
        make_trainer(tmp_path / "run", "--task", "toy")
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_the_runs_own_metrics_keep_their_names(tmp_path):
    class Logging(Toy):
        def step(self, action):
            return super().step(action) | {f"log_{name}": np.float32(-777) for name in ("return", "length", "other")}

    register_env("toy", lambda config, mode, index: Logging(length=7))
    flags = "--task toy --steps 60 --prefill 50 --log_every 20 --eval_every 40 --eval_envs 1 --eval_episode_num 1"
    with contextlib.closing(make_trainer(tmp_path, *flags.split())) as trainer:
        trainer.run()
    rows = {name: value for row in metrics(tmp_path) for name, value in row.items()}
    for kind in ("episode", "eval"):
        assert rows[f"{kind}/return"] == rows[f"{kind}/length"] == 7
        assert rows[f"{kind}/log_return"] == rows[f"{kind}/log_length"] == rows[f"{kind}/other"] == -777


def test_a_float_observation_called_image_is_no_film(tmp_path):
    class Measured(Toy):
        def __init__(self):
            super().__init__()
            self.obs_space = {"image": spaces.Box(0, 1, (8, 8, 3), np.float32)}

        def observe(self):
            return {"image": np.full((8, 8, 3), 0.5, np.float32)}

    register_env("toy", Measured)
    flags = [*BARE, "--task", "toy", "--steps", 40, "--eval_every", 20, "--video_pred_log", "true"]
    succeed(*flags, "--logdir", tmp_path)


def test_an_evaluation_that_does_not_end_is_said(tmp_path, caplog, monkeypatch):
    register_env("toy", lambda: Toy(length=10**9))
    monkeypatch.setattr(dreamer, "Patience", functools.partial(dreamer.Patience, steps=20, seconds=0))
    with contextlib.closing(make_trainer(tmp_path, "--task", "toy", "--eval_every", 100)) as trainer:
        played = 0

        def policy(*args, act=trainer.agent.policy, **kwargs):
            nonlocal played
            played += 1
            trainer.shutdown.requested = played == 50
            return act(*args, **kwargs)

        trainer.agent.policy = policy
        trainer.evaluate()
    assert [record.message for record in caplog.records if "--time_limit" in record.message] == [
        "No episode of this evaluation has ended after 20 steps. If the task does not end episodes itself, give "
        "--time_limit FRAMES, or --eval_every 0 to train without evaluations."
    ]


def test_nan_in_mode_eval_is_found(tmp_path):
    register_env("toy", lambda config, mode, index: Toy(nan_at=4 if mode == "eval" else None))
    succeed(*BARE, "--task", "toy", "--steps", 40, "--eval_every", 0, "--logdir", tmp_path)
    text = fail("--mode", "eval", "--checkpoint", tmp_path / "latest.pt", "--parallel", "serial")
    assert "observation 'vector' holds NaN or infinity" in text


def test_recorded_texts_are_learned_from_without_their_environment(tmp_path):
    flags = [*BARE, *"--*.mults 1 2 --image_size 16 16 --batch_length 4 --train_ratio 4 --text.length 3".split()]
    succeed(*flags, "--task", "cue_text", "--steps", 60, "--eval_every", 0, "--logdir", tmp_path / "played")
    played = ["--task", "none", "--steps", 20, "--offline_traindir", tmp_path / "played" / "train_eps"]
    succeed(*flags, *played, "--log_every", 10, "--logdir", tmp_path / "run")
    assert any("world/nats_text" in row for row in metrics(tmp_path / "run"))


def test_nan_that_the_policy_has_seen_is_still_the_observation_s(tmp_path):
    """Its action is NaN as well; the message names the cause."""
    register_env("toy", lambda config, mode, index: Toy(length=60, nan_at=50))
    text = fail(*BARE, "--task", "toy", "--prefill", "40", "--batch_size", "2", "--logdir", tmp_path)
    assert "observation 'vector' from stream" in text and "found nan" in text


# 3. Updates that are not finite


def poison(batch, key="reward"):
    batch[key][:, 1] = np.nan
    return batch


def test_updates_that_stay_bad_stop_the_run_and_leave_the_checkpoint(tmp_path):
    flags = "--batch_size 2 --batch_length 4 --imag_horizon 1 --train_ratio 32 --opt.max_bad 60".split()
    flags += "--steps 2000 --save_every 70 --log_every 10".split()  # saved at 70, after about 20 updates
    trainer = make_trainer(tmp_path, "--task", "gym_CartPole-v1", *flags)
    sample, seen = trainer.replay.sample, {}

    def poisoned(size):
        if trainer.updates == 35:
            seen.update(weights(trainer.agent))
        batch = sample(size)
        return poison(batch) if trainer.updates >= 35 else batch

    trainer.replay.sample = poisoned
    with contextlib.closing(trainer), pytest.raises(UserError) as raised:
        trainer.run()
    assert "not finite in the last 65 updates (up to update 100)" in str(raised.value)
    assert str(tmp_path / "latest.pt") in str(raised.value) and "\n" not in str(raised.value)
    assert same(weights(trainer.agent), seen)
    assert int(trainer.agent.optimizer.bad) == int(trainer.agent.optimizer.bad_total) == 65
    kept = tools.load_checkpoint(tmp_path / "latest.pt")
    assert 0 < kept["counters"]["updates"] <= 35
    assert all(value.isfinite().all() for value in kept["world_model"].values())
    counted = [row["opt/bad_updates"] for row in metrics(tmp_path) if "opt/bad_updates" in row]
    assert counted[0] == 0 and counted[-1] > 5  # averages since the line before
    with contextlib.closing(make_trainer(tmp_path, "--task", "gym_CartPole-v1", *flags)) as resumed:
        assert resumed.updates == kept["counters"]["updates"]


@pytest.mark.parametrize("key", ["reward", "vector", "action", "context"])
def test_one_bad_update_changes_nothing_and_the_next_is_good(key):
    agent = make_agent("--opt.warmup", 0)
    agent.train_step(random_batch(agent))
    before, batch = weights(agent), random_batch(agent)
    place = batch["context"]["deter"] if key == "context" else batch[key]
    place[1] = np.nan
    agent.train_step(batch)
    assert same(weights(agent), before)
    assert int(agent.optimizer.bad) == 1
    metrics, _ = agent.train_step(random_batch(agent))
    assert all(value.isfinite() for value in metrics.values())
    assert not same(weights(agent), before)
    assert int(agent.optimizer.bad) == 0 and int(metrics["opt/bad_updates"]) == 1


# 4. A full disk

FULL = """
mount -t tmpfs -o size=2m none "$1" && cp -r "$2"/. "$1" && shift 2
dd if=/dev/zero of="$LOGDIR/filler" bs=1k count=$(($(df -k --output=avail "$LOGDIR" | tail -1) - $ROOM)) 2> /dev/null
"$@"
echo "status $?"
cp "$LOGDIR"/* "$RESULT" 2> /dev/null
ls -A "$LOGDIR" "$LOGDIR/train_eps"
"""


def test_a_full_disk_is_one_line_and_keeps_the_checkpoint(cartpole, tmp_path):
    mounted, result = tmp_path / "mounted", tmp_path / "result"
    mounted.mkdir(), result.mkdir()
    command = [sys.executable, str(ROOT / "dreamer.py"), *CARTPOLE, "--steps", "100000", "--logdir", str(mounted)]
    shell = ["unshare", "--mount", "--map-root-user", "sh", "-c", FULL, "sh", str(mounted), str(cartpole), *command]
    if not shutil.which("unshare"):
        pytest.skip("unshare is not installed")
    environment = os.environ | {"LOGDIR": str(mounted), "RESULT": str(result), "ROOM": "200"}
    done = subprocess.run(shell, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=280)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("no small file system can be mounted here")
    assert "status 1\n" in done.stdout and "Traceback" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert re.search(r"Could not write .*(No space left on device|the disk is full)", line), line
    assert "Free some space" in line
    kept = tools.load_checkpoint(result / "latest.pt")
    assert kept["counters"] == tools.load_checkpoint(cartpole / "latest.pt")["counters"]
    assert ".tmp" not in done.stdout.partition("status")[2]


def test_a_disk_that_is_full_from_the_start(begun, monkeypatch):
    before = files(begun)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    text = fail(*CARTPOLE, "--steps", 200, "--logdir", begun)
    assert f"Could not write {begun / 'config.yaml'}: No space left on device" in text and "Free some space" in text
    assert {**files(begun), "log.txt": b""} == {**before, "log.txt": b""}


# 5. Recorded episodes


def write_older_episodes(folder: Path, lengths: list[int]) -> None:
    """As older ports record: no is_last, no latents; the action of a row led to it."""
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    for number, length in enumerate(lengths):
        action = np.eye(3, dtype=np.float32)[generator.integers(3, size=length)]
        action[0] = 0
        first, terminal = np.zeros((2, length), bool)
        first[0], terminal[-1] = True, number % 2
        np.savez_compressed(
            folder / f"2023010{number}T120000-{number}-{length}.npz",
            **{"image": generator.integers(256, size=(length, 16, 16, 3), dtype=np.uint8), "action": action},
            **{"reward": generator.normal(size=length).astype(np.float32), "discount": 1 - terminal.astype(np.float32)},
            **{"is_first": first, "is_terminal": terminal, "logprob": np.zeros(length, np.float32)},
        )


def test_offline_from_episodes_of_older_ports(tmp_path):
    write_older_episodes(tmp_path / "eps", [30, 25, 40])
    flags = [*DEBUG, *"--task none --steps 60 --log_every 20 --eval_every 30".split()]
    flags += ["--offline_traindir", tmp_path / "eps", "--offline_evaldir", tmp_path / "eps"]
    before = files(tmp_path / "eps")
    out = succeed(*flags, *"--*.mults 2 4 --logdir".split(), tmp_path / "run")
    assert "observes image 16x16x3; acts 3 discrete" in out
    assert f"Training none on cpu from recorded episodes in {tmp_path / 'eps'}" in out
    rows = metrics(tmp_path / "run")
    assert rows[-1]["train/updates"] == 15 and rows[-1]["step"] == 60  # 8 steps trained on per frame, 32 an update
    assert all(np.isfinite(row["world/recon_image"]) for row in rows)
    assert files(tmp_path / "eps") == before
    assert (tmp_path / "run" / "videos" / "open_loop_image-000000032.mp4").exists()


def test_too_few_recorded_steps(tmp_path):
    write_older_episodes(tmp_path / "eps", [6])
    text = fail(
        *DEBUG, "--task", "none", "--*.mults", 2, 4, "--offline_traindir", tmp_path / "eps", "--logdir", tmp_path
    )
    assert "holds 6 steps, too few for one window of batch_length + 1 = 9" in text
    (tmp_path / "none").mkdir()
    text = fail(*DEBUG, "--task", "none", "--offline_traindir", tmp_path / "none", "--logdir", tmp_path)
    assert str(tmp_path / "none") in text and ".npz" in text


def test_offline_needs_a_train_ratio_to_count_by():
    with pytest.raises(configuration.ConfigError, match="train_ratio is 0; expected more where offline_traindir is"):
        configuration.load([*DEBUG, *"--task none --offline_traindir eps --train_ratio 0".split()])


def test_offline_with_a_task_to_evaluate_on(cartpole, tmp_path):
    flags = [*DEBUG, *"--task gym_CartPole-v1 --steps 20 --log_every 10 --tensorboard false".split()]
    succeed(*flags, "--offline_traindir", cartpole / "train_eps", "--logdir", tmp_path)
    rows = metrics(tmp_path)
    assert any("eval/return" in row for row in rows) and not list(tmp_path.glob("train_eps/*.npz"))
    kept = tools.load_checkpoint(tmp_path / "latest.pt")
    assert kept["counters"]["updates"] == 5  # 20 frames at 8 steps each, 32 an update


# 6. Options of learning


SPACES = {
    "image": spaces.Box(0, 255, (16, 24, 3), np.uint8),
    "vector": spaces.Box(-np.inf, np.inf, (5,), np.float32),
    "room": spaces.Discrete(4, start=1),
}
CONTINUOUS = spaces.Box(-1, 1, (2,), np.float32)


def make_agent(*flags, act_space=CONTINUOUS) -> Dreamer:
    torch.manual_seed(0)
    flags = ["--configs", "debug", "--*.mults", 2, 4, "--opt.warmup", 2, *flags]
    return Dreamer(SPACES, act_space, configuration.load([str(flag) for flag in flags]))


def test_how_much_a_kind_counts():
    agent = make_agent("--modality_scales.image", 0.5)
    assert {k: v for k, v in agent.loss_scales.items() if "rec" in k} == {"rec": 1.0, "rec/image": 0.5}
    kinds = MODALITY_CONFIGS | {"image": dataclasses.replace(MODALITY_CONFIGS["image"], loss_scale=0.1)}
    config = configuration.load(["--configs", "debug", "--*.mults", "2", "4"])
    assert Dreamer(SPACES, CONTINUOUS, config, modalities=kinds).loss_scales["rec/image"] == 0.1
    assert "rec/image" not in make_agent().loss_scales


def test_kinds_that_a_program_selects():
    config = configuration.load(["--configs", "debug", "--*.mults", "2", "4"])
    active_modalities = {"image": MODALITY_CONFIGS["image"]}
    agent = Dreamer(SPACES, CONTINUOUS, config, modalities=active_modalities)
    assert list(agent.world_model.encoder.kinds) == agent.world_model.decoder.keys == ["image"]
    with pytest.raises(UserError, match="match no observation"):
        Dreamer(SPACES, CONTINUOUS, config, modalities={})


def random_batch(agent: Dreamer, batch=3, time=5, seed=0) -> dict:
    """As the replay gives: frames uint8, an episode's end and beginning inside, one context without a latent."""
    generator = np.random.default_rng(seed)
    rssm, lead = agent.world_model.rssm, (batch, time)
    first, last = np.zeros((2, *lead), bool)
    last[0, 2], first[0, 3] = True, True
    if agent.classes:
        one_hots = [np.eye(n, dtype=np.float32)[generator.integers(n, size=(batch, time + 1))] for n in agent.classes]
        action = np.concatenate(one_hots, -1)
    else:
        action = generator.normal(size=(batch, time + 1, agent.action_size)).astype(np.float32)
    if rssm.discrete:
        stoch = generator.integers(rssm.discrete, size=(batch, rssm.stoch)).astype(np.uint8)
    else:
        stoch = generator.normal(size=(batch, rssm.stoch)).astype(np.float16)
    context = {"deter": generator.uniform(-1, 1, (batch, rssm.deter)).astype(np.float16), "stoch": stoch}
    context |= {"action": action[:, 0], "valid": np.arange(batch) != 1}
    return agent.to_device(
        {
            "image": generator.integers(256, size=(*lead, 16, 24, 3), dtype=np.uint8),
            "vector": generator.normal(size=(*lead, 5)).astype(np.float32),
            "room": generator.integers(1, 5, size=lead),
            **{f"present/{key}": generator.random(lead) < 0.9 for key in SPACES},
            "reward": generator.normal(size=lead).astype(np.float32),
            **{"is_first": first, "is_last": last, "is_terminal": last},
            "action": np.where(last[..., None], 0, action[:, 1:]).astype(np.float32),
            "context": context,
        }
    )


OPTIONS = [
    "",
    "--imag_gradient dynamics",
    "--imag_gradient both",
    "--imag_gradient dynamics --critic.slow_target true",
    "--dyn.discrete 0",
    "--dyn.discrete 0 --imag_gradient both",
    "--dyn.cell gru",
    "--dyn.dyn_layers 2 --dyn.obs_layers 2 --dyn.img_layers 1",
    "--encoder.downsample stride --decoder.upsample transposed",
    "--decoder.image_dist mse --decoder.vector_dist mse",
    "--decoder.image_dist normal --decoder.vector_dist normal",
    "--reward_head.dist symlog_disc --critic.dist symlog_disc",
    "--reward_head.dist symlog_mse --critic.dist mse",
    "--reward_head.dist normal --critic.dist normal",
    "--reward_EMA false",
    "--contdisc false",
    "--grad_heads decoder",
    "--grad_heads reward cont",
    "--opt.name adam --opt.agc 0 --opt.clip 1000 --opt.eps 1e-8 --opt.actor_lr 3e-5 --opt.critic_lr 3e-5",
    "--precision bfloat16",
    "--precision float16",
    "--checkpointing true --imag_last 2",
    "--critic.slow_target true --critic.slow_target_update 2 --critic.slow_target_fraction 1",
    "--critic.slow_regularizer 0",
    "--encoder.symlog false --*.act elu",
    "--encoder.cnn_keys $^ --decoder.cnn_keys $^",
    "--*.rounding fused",
]
# Where gradient flows through actions, both kinds of action; elsewhere they take turns.
CASES = [
    (flags, kind)
    for number, flags in enumerate(OPTIONS)
    for kind in ("continuous", "discrete")
    if "imag_gradient" in flags or (kind == "discrete") == number % 2
]


@pytest.mark.parametrize("flags, kind", CASES)
def test_every_option_learns(flags, kind):
    check_learns(make_agent(*flags.split(), act_space=CONTINUOUS if kind == "continuous" else spaces.Discrete(3)))


def test_several_discrete_actions_learn():
    agent = make_agent(act_space=spaces.MultiDiscrete([2, 3]))
    assert agent.classes == [2, 3] and agent.action_size == 5
    check_learns(agent)


def check_learns(agent: Dreamer) -> None:
    """Three updates: finite, every part moves, latents come back as they are stored."""
    agent.optimizer.scale.clamp_(max=64.0)  # of float16, which overflows at first until its scale has come down
    before = weights(agent)
    for seed in range(3):
        metrics, (deter, stoch) = agent.train_step(random_batch(agent, seed=seed))
        assert all(value.ndim == 0 and value.isfinite() for value in metrics.values()), metrics
    assert int(agent.optimizer.updates) == 3 and int(agent.optimizer.bad_total) == 0
    rssm, after = agent.world_model.rssm, weights(agent)
    assert deter.shape == (3, 5, rssm.deter) and deter.dtype == torch.float16
    assert stoch.shape == (3, 5, rssm.stoch) and stoch.dtype == (torch.uint8 if rssm.discrete else torch.float16)
    moved = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert moved == {"encoder", "rssm", "decoder", "reward", "cont", "actor", "streams"}
    obs = {key: value[:, 0].numpy() for key, value in random_batch(agent).items() if key in SPACES}
    action, state = agent.policy({**obs, "is_first": np.ones(3, bool)}, agent.initial(3))
    assert action.shape == (3, agent.action_size) and np.isfinite(action).all()
    assert [value.dtype for value in agent.latents(state)] == [np.float16, np.uint8 if rssm.discrete else np.float16]


@pytest.mark.slow
def test_compiled_run(tmp_path):
    done = start(*CARTPOLE, "--steps", 80, "--compile", "true", "--logdir", tmp_path, timeout=1700)
    assert done.returncode == 0, done.stderr[-2000:]
    assert metrics(tmp_path)[-1]["opt/bad_updates"] == 0


def shaken(agent: Dreamer) -> Dreamer:
    """No output layer zero, behind which differences would not show.

    Two-hot heads are peaked at bins near zero: spread over all of them they sum 1e8 and -1e8 into returns of 1e4, whose
    rounding is then all that differs.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in agent.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
        for head in agent.modules():
            if getattr(head, "twohot", False):
                head.out.bias.sub_(2 * torch.linspace(-20, 20, len(head.out.bias)).abs())
    return agent


def losses_and_gradients(agent: Dreamer) -> tuple[dict, dict]:
    batch = random_batch(agent)
    losses, post, _ = agent.losses(batch, agent.draw_noise(*batch["reward"].shape))
    agent.optimizer.backward(total_loss(losses, agent.loss_scales))
    grads = {name: p.grad.clone() for name, p in agent.named_parameters() if p.requires_grad}
    return {name: value.detach() for name, value in (losses | post).items()}, grads


def compare_compiled(*flags: str, discrete: bool = False) -> None:
    """Losses, latents and gradients of a compiled agent against those of the same agent as written; then acting.

    The largest error is relative to its tensor's norm, or absolute where that is smaller than 1.
    """
    act_space = spaces.Discrete(3) if discrete else CONTINUOUS
    options = ["--imag_horizon", 3, *flags]
    plain, compiled = (
        shaken(make_agent(*options, "--compile", value, act_space=act_space)) for value in ("false", "true")
    )
    errors = {}
    for expected, found in zip(losses_and_gradients(plain), losses_and_gradients(compiled), strict=True):
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            errors[key] = ((found[key] - value).norm() / value.norm().clamp(min=1)).item()
    obs = {key: value[:, 0].numpy() for key, value in random_batch(plain).items() if key in SPACES}
    obs["is_first"] = np.ones(3, bool)
    actions = [agent.policy(obs, agent.initial(3))[0] for agent in (plain, compiled)]
    errors["action"] = abs(actions[0] - actions[1]).max()
    worst = max(errors, key=errors.get)
    print(f"largest error: {errors[worst]:.1e} ({worst}), of {len(errors)}")
    breaks = dict(torch._dynamo.utils.counters["graph_break"])
    assert not breaks, f"not compiled as one: {breaks}"
    assert len(errors) > 100 and errors[worst] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, discrete",
    [
        ("", False),
        ("--imag_gradient dynamics", True),
        ("--dyn.discrete 0 --dyn.cell gru", False),
        ("--checkpointing true", True),
        ("--expl_behavior plan2explore --expl_streams icm:0.1,rnd:0.1,surprise:0.1,empowerment:0.1", False),
        ("--behavior hierarchical --actor_objective ppo --hier.every 3 --hier.goal.units 16", True),
        ("--metagrad one_step --opt.warmup 0 --expl_streams rnd:0.1", False),
    ],
)
def test_compiled_steps_give_the_same_numbers(flags, discrete):
    """In a process of its own: compilers do not look through the checking of shapes in these tests' type hints."""
    code = f"import test_dreamer as t; t.compare_compiled(*{flags.split()!r}, discrete={discrete})"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


# 7. No read of the device


READS = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2", "allclose"}
# A tensor made of numbers of the host is copied to the device from memory that is not pinned: that waits, too.
HOST = {"tensor", "as_tensor", "asarray"}
HOST |= {"item", "tolist", "numpy", "cpu", "__array__", "__bool__", "__int__", "__float__", "__index__", "__repr__"}


class Reads(TorchDispatchMode):
    """Notes every operation that would make the host wait for a device, as (name, line of this project).

    A value that the host needs, or a shape that depends on values. On a CPU some are never dispatched (`tolist`,
    `numpy`): `HostReads` sees those.
    """

    def __init__(self):
        super().__init__()
        self.found = []

    def note(self, name: str) -> None:
        lines = [
            frame for frame in traceback.extract_stack() if Path(frame.filename).parent in (ROOT, ROOT / "modalities")
        ]
        at = f"{Path(lines[-1].filename).name}:{lines[-1].lineno} {lines[-1].line}" if lines else "outside"
        self.found.append((name, at))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if name in ("index", "index_put", "index_put_"):  # rows by number are as many as there are numbers
            read = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        else:
            read = bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))
        if read or name in READS:
            self.note(name)
        return func(*args, **(kwargs or {}))


class HostReads(TorchFunctionMode):
    def __init__(self, reads: Reads):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in HOST:
            self.reads.note(func.__name__)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def reads_of_the_device():
    with Reads() as reads, HostReads(reads):
        yield reads.found


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: float(x[0]),
        lambda x: int(x[0]),
        lambda x: bool((x > 0).all()),
        lambda x: 1 if x[0] > 0 else 2,
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: np.asarray(x),
        lambda x: x.cpu(),
        lambda x: str(x),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0),
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: torch.allclose(x, x),
        lambda x: torch.repeat_interleave(x, torch.tensor([1, 2, 3])),
        lambda x: torch.zeros(3).index_put_((x > 0,), x.sum()),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
        lambda x: x + torch.as_tensor(np.ones(3), device=x.device),
    ],
)
def test_reads_are_seen(read):
    x = torch.arange(3.0)
    with reads_of_the_device() as found:
        read(x)
    assert found


def test_what_reads_nothing_is_not_seen():
    x, index = torch.arange(3.0, requires_grad=True), torch.tensor([2, 0])
    with reads_of_the_device() as found:
        y = torch.where(x > 1, x, 0.0)[index]
        y.masked_fill(~torch.isfinite(y), 0.0).sum().backward()
        assert x.shape[0] == 3 and x.grad.is_floating_point() and len(x) == 3
    assert not found


BEHAVIOURS = (
    "--expl_behavior plan2explore --expl_extr_scale 0.5 --expl_streams icm:0.1,rnd:0.1,surprise:0.1,empowerment:0.1",
    "--expl_behavior diayn --actor_objective ppo --metagrad hypergradient",
    "--behavior hierarchical --actor_objective ppo --imag_horizon 4 --hier.every 2 --expl_streams empowerment:0.1",
    "--metagrad one_step --opt.warmup 0 --expl_streams rnd:0.1",
)


@pytest.mark.parametrize("flags, kind", [*CASES, *((flags, "continuous") for flags in BEHAVIOURS)])
def test_no_step_of_training_reads_the_device(flags, kind):
    """Not forwards, not backwards, not in the optimizer: the host runs ahead of the device and never waits for it."""
    agent = make_agent(*flags.split(), act_space=CONTINUOUS if kind == "continuous" else spaces.MultiDiscrete([2, 3]))
    for seed in range(2):  # what only a first step does is found, too
        batch = random_batch(agent, seed=seed)
        with reads_of_the_device() as found:
            agent.train_step(batch)
        assert not found, "\n".join(f"{name} at {line}" for name, line in dict.fromkeys(found))


def test_acting_reads_the_device_once():
    agent = make_agent()
    obs = {key: value[:, 0].numpy() for key, value in random_batch(agent).items() if key in SPACES}
    obs["is_first"], state = np.ones(3, bool), agent.initial(3)
    for _ in range(2):
        with reads_of_the_device() as found:
            _, state = agent.policy(obs, state)
        assert [name for name, _ in found if name != "as_tensor"] == ["cpu", "numpy"], found  # after the inputs


# 8. Noise


def test_gumbel_noise_follows_its_law():
    agent, count = make_agent(), 1_000_000
    noise = agent._draw(torch.Generator().manual_seed(3))._noise((count // 10, 10), True).flatten().double()
    variance = np.pi**2 / 6
    # Five deviations of the sample's mean and variance (a Gumbel's kurtosis is 5.4).
    assert abs(noise.mean() - 0.577216) < 5 * np.sqrt(variance / count)
    assert abs(noise.var() - variance) < 5 * variance * np.sqrt(4.4 / count)
    ordered = noise.sort().values
    law = torch.exp(-torch.exp(-ordered))
    distance = (law - (torch.arange(count) + 0.5) / count).abs().max()  # Kolmogorov-Smirnov
    assert distance < 2.2 / np.sqrt(count)
    assert abs(torch.corrcoef(noise.view(-1, 2).T)[0, 1]) < 5 / np.sqrt(count / 2)


@pytest.mark.parametrize("classes", [3, 10])  # few and many take different ways through the softmax
@pytest.mark.parametrize("unimix", [0.0, 0.01])
def test_sampled_classes_follow_their_probabilities(classes, unimix):
    agent, count = make_agent(), 200_000
    logits = torch.linspace(-3, 2, classes)
    noise = agent._draw(torch.Generator().manual_seed(4))._noise((count, classes), True)
    drawn = OneHot(logits.expand(count, classes), unimix).sample(noise).double().sum(0)
    expected = ((1 - unimix) * torch.softmax(logits.double(), -1) + unimix / classes) * count
    chi_square = ((drawn - expected) ** 2 / expected).sum()
    assert chi_square < {2: 13.8, 9: 27.9}[classes - 1]  # 99.9 %


@pytest.mark.parametrize("draw", [0.0, 1e-45, 2.0**-24, 0.5, 1 - 2.0**-24])
def test_gumbel_noise_is_finite_for_every_draw(draw, monkeypatch):
    agent = make_agent()
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, *_, generator=None: self.fill_(draw))
    noise = agent._draw(agent.generator)._noise((4,), True)
    assert noise.isfinite().all() and (-5 < noise).all() and (noise < 17).all()
    if draw > 1e-30:
        torch.testing.assert_close(
            noise.double(), torch.full((4,), -np.log(-np.log(draw))).double(), rtol=1e-3, atol=1e-6
        )


def test_noise_belongs_to_its_generator():
    agent, other = make_agent(), make_agent()
    one, two = agent.draw_noise(2, 3), other.draw_noise(2, 3)
    assert all(torch.equal(one[key], two[key]) for key in one)
    again = agent.draw_noise(2, 3)
    assert not any(torch.equal(one[key], again[key]) for key in one)
    normal = agent._draw(agent.generator)._noise((100_000,), False)
    assert abs(normal.mean()) < 5 / np.sqrt(1e5) and abs(normal.std() - 1) < 5 / np.sqrt(2e5)


# 9. Acting


def test_acting_sees_the_latest_weights():
    """The policy's own layout of the weights is made anew after an update and after a restart."""
    agent, fresh = make_agent("--opt.warmup", 0, "--opt.lr", 0.01), make_agent()
    obs = {key: value[:, 0].numpy() for key, value in random_batch(agent).items() if key in SPACES}
    obs["is_first"] = np.zeros(3, bool)
    state = agent.initial(3)
    state["latent"]["deter"].uniform_(-1, 1, generator=torch.Generator().manual_seed(0))

    def act(agent: Dreamer) -> torch.Tensor:
        return agent.policy(obs, state, sample=False, generator=torch.Generator().manual_seed(0))[1]["latent"]["deter"]

    before = act(agent)
    assert torch.equal(act(agent), before) and torch.equal(act(fresh), before)
    agent.train_step(random_batch(agent))
    after = act(agent)
    assert not torch.allclose(after, before)
    agent.weights_changed()
    assert torch.equal(act(agent), after)
    fresh.restore(agent.checkpoint())
    assert torch.equal(act(fresh), after)


def test_what_an_observation_lacks_is_absent():
    agent = make_agent()
    vector = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)
    obs = {"vector": vector, "room": np.ones(2, int), "is_first": np.ones(2, bool)}

    def act(obs: dict) -> np.ndarray:
        return agent.policy(obs, agent.initial(2), False, torch.Generator().manual_seed(0))[1]["latent"][
            "stoch"
        ].numpy()

    there = obs | {"image": np.zeros((2, 16, 24, 3), np.uint8)}
    absent = there | {"present/image": np.zeros(2, bool)}
    assert np.array_equal(act(obs), act(absent)) and not np.array_equal(act(obs), act(there))


def test_acting_sees_what_learning_sees():
    """Frames are scaled once in both: the same data and noise give the same posterior, through an episode's border."""
    agent, time, count = make_agent(), 6, 2
    generator = np.random.default_rng(0)
    obs = {
        "image": generator.integers(256, size=(count, time, 16, 24, 3), dtype=np.uint8),
        "vector": generator.normal(size=(count, time, 5)).astype(np.float32),
        "room": generator.integers(1, 5, size=(count, time)),
        "present/vector": generator.random((count, time)) < 0.7,
        "is_first": np.zeros((count, time), bool),
    }
    obs["is_first"][:, 0] = obs["is_first"][1, 3] = True
    noise = torch.Generator().manual_seed(5)
    state, acted, actions = agent.initial(count), [], []
    for t in range(time):
        step = {key: value[:, t] for key, value in obs.items()} | {"log_x": np.zeros(count)}
        action, state = agent.policy(step, state, sample=False, generator=noise)
        acted.append(state["latent"]), actions.append(action)
        features_now = features(state["latent"])
        assert np.array_equal(action, agent.behavior.actor(features_now).mode().detach().numpy())
    again = torch.Generator().manual_seed(5)
    latent_noise = torch.stack([agent._draw(again).latent(count) for _ in range(time)], 1)
    zeros = agent.to_device({"deter": np.zeros((count, 32), np.float16), "stoch": np.zeros((count, 4), np.uint8)})
    zeros |= agent.to_device({"action": np.ones((count, 2), np.float32), "valid": np.zeros(count, bool)})
    batch = agent.to_device({**obs, "action": np.stack(actions, 1)}) | {"context": zeros}
    post, _ = agent.world_model.observe(batch, latent_noise)
    for key in ("deter", "stoch"):
        assert torch.allclose(torch.stack([latent[key] for latent in acted], 1), post[key], atol=1e-6), key


def test_sampled_actions_differ_and_the_mode_does_not():
    agent = make_agent()
    obs = {key: value[:, 0].numpy() for key, value in random_batch(agent).items() if key in SPACES}
    obs["is_first"] = np.ones(3, bool)

    def act(sample, seed):
        return agent.policy(obs, agent.initial(3), sample, torch.Generator().manual_seed(seed))[0]

    assert np.array_equal(act(True, 1), act(True, 1)) and not np.array_equal(act(True, 1), act(True, 2))
    assert act(True, 1).std() > 0.3 and np.abs(act(False, 1)).max() < 0.3  # a new actor: mean about 0, deviation 0.9


# 10. The training loop's accounts


def make_trainer(logdir, *flags) -> Trainer:
    return Trainer(configuration.load([str(flag) for flag in (*BARE, "--logdir", logdir, *flags)]))


def test_updates_follow_the_agent_steps(tmp_path):
    """After a random prefill `pretrain` updates, then exactly train_ratio / (batch_size * batch_length) a step."""
    register_env("toy", lambda config, mode, index: Toy(length=7 + index))
    flags = "--task toy --envs 3 --steps 240 --action_repeat 2 --prefill 50 --pretrain 5 --train_ratio 12".split()
    trainer = make_trainer(tmp_path, *flags, "--time_limit", 0)
    trace, sent, chosen, order = [], [], [], []
    train, send, policy = trainer.train, trainer.envs.send, trainer.agent.policy
    receive = trainer.envs.receive

    def traced_train():
        train()
        trace.append((trainer.replay.steps, trainer.updates))
        order.append("train")

    def traced_send(action):
        sent.append(action.copy())
        order.append("send")
        send(action)

    def traced_receive():
        order.append("receive")
        return receive()

    def traced_policy(*args, **kwargs):
        chosen.append(trainer.replay.steps)
        return policy(*args, **kwargs)

    trainer.train, trainer.envs.send, trainer.agent.policy = traced_train, traced_send, traced_policy
    trainer.envs.receive = traced_receive
    with contextlib.closing(trainer):
        trainer.run()
    # The reset is received; then environments step while the agent learns.
    assert order == ["receive", "train"] + ["send", "train", "receive"] * len(sent)
    begin = next(steps for steps, _ in trace if steps >= 50)
    assert begin < 53 and trainer.frames == 2 * trainer.replay.steps >= 240
    for steps, updates in trace:
        assert updates == (0 if steps < 50 else 5 + int((steps - begin) * 12 / 32)), steps
    assert trace[-1][1] > 5 + 20
    random = Random(trainer.act_space, seed=trainer.config.seed + 2)
    prefilled = len(sent) - len(chosen)
    assert chosen[0] == begin
    assert all(np.array_equal(action, random.policy(3)) for action in sent[:prefilled])
    stored = np.concatenate([np.load(path)["action"] for path in (tmp_path / "train_eps").glob("*-e000000-*.npz")])
    assert stored.min() < -0.5 and stored.max() > 0.5 and np.abs(stored).max() <= 1


@pytest.mark.parametrize("behavior", ["random", "rnd"])
def test_who_acts(behavior, tmp_path):
    """After the prefill the explorer or uniform actions, until `expl_until`; then, and in evaluations, the task."""
    register_env("toy", lambda config, mode, index: Toy(length=9))
    flags = "--task toy --steps 100 --prefill 20 --eval_every 50 --eval_episode_num 1 --envs 1 --expl_until 60".split()
    trainer = make_trainer(tmp_path, *flags, "--expl_behavior", behavior)
    trace, policy, uniform = [], trainer.agent.policy, trainer.random.policy

    def traced_policy(*args, explore=False, **kwargs):
        trace.append((trainer.frames, "explorer" if explore and trainer.agent.explorer else "task"))
        return policy(*args, explore=explore, **kwargs)

    def traced_uniform(num):
        trace.append((trainer.frames, "random"))
        return uniform(num)

    evaluate = trainer.evaluate

    def traced_evaluate():
        before = len(trace)
        result = evaluate()
        assert len(trace) > before and {who for _, who in trace[before:]} == {"task"}
        del trace[before:]
        trace.append((trainer.frames, "evaluated"))
        return result

    trainer.agent.policy, trainer.random.policy, trainer.evaluate = traced_policy, traced_uniform, traced_evaluate
    with contextlib.closing(trainer):
        trainer.run()
    assert "evaluated" in {who for _, who in trace}
    for frames, who in trace:
        explores = "random" if behavior == "random" else "explorer"
        if who != "evaluated":
            assert who == ("random" if frames < 20 else explores if frames < 60 else "task"), frames


def test_a_checkpoint_of_the_prefill_keeps_what_is_owed(tmp_path):
    """Stopped in the prefill, gone on, killed before the next checkpoint: the updates for what was stored are owed."""
    register_env("toy", lambda config, mode, index: Toy(length=7))
    flags = "--task toy --envs 2 --prefill 50 --save_every 100000 --train_ratio 8".split()
    for steps in (30, 130):
        with contextlib.closing(make_trainer(tmp_path, *flags, "--steps", steps)) as trainer:
            trainer.run()
        if steps == 30:
            early = (tmp_path / "latest.pt").read_bytes()
    (tmp_path / "latest.pt").write_bytes(early)
    with contextlib.closing(make_trainer(tmp_path, *flags, "--steps", 130)) as trainer:
        assert trainer.updates == 0 and trainer.replay.steps >= 130
        assert trainer.owed == int((trainer.replay.steps - 50) * 8 / 32) >= 20


def test_a_stop_during_the_last_evaluation_keeps_the_run(tmp_path, monkeypatch):
    register_env("toy", lambda config, mode, index: Toy(length=7))
    flags = "--task toy --steps 90 --prefill 50 --save_every 100000 --eval_every 1000 --eval_episode_num 1".split()
    trainer = make_trainer(tmp_path, *flags)
    monkeypatch.setattr(trainer, "evaluate", lambda: 1 / 0)  # stands for a kill -9 in the middle of it
    with contextlib.closing(trainer), pytest.raises(ZeroDivisionError):
        trainer.run()
    assert tools.load_checkpoint(tmp_path / "latest.pt")["counters"]["updates"] == trainer.updates > 0


def test_a_changed_rate_counts_when_forced(tmp_path):
    register_env("toy", lambda config, mode, index: Toy(length=7))
    flags = "--task toy --steps 60 --prefill 50".split()
    with contextlib.closing(make_trainer(tmp_path, *flags)) as trainer:
        trainer.run()
    with contextlib.closing(make_trainer(tmp_path, *flags, "--force", "true", "--opt.lr", "1e-2")) as trainer:
        assert {name: round(float(g.lr), 6) for name, g in trainer.agent.optimizer.groups.items()} == {
            "world": 0.01, "actor": 0.01, "critic": 0.01,
        }  # fmt: skip


def test_what_the_environment_logs_is_logged(tmp_path):
    class Logging(Toy):
        def step(self, action):
            step = {**super().step(action), "log_count": np.float32(self.count), "log_place": np.zeros(2)}
            step |= {"log_success": np.float32(1)} if step["is_last"] else {}  # only then
            return step | ({"log_first": np.float32(1)} if self.length == 7 else {})  # only there

        def reset(self):
            return {**super().reset(), "log_count": np.float32(0)}

    register_env("toy", lambda config, mode, index: Logging(length=7 + 2 * index))
    flags = "--task toy --steps 60 --prefill 50 --log_every 20 --eval_every 40 --eval_envs 2 --eval_episode_num 2"
    with contextlib.closing(make_trainer(tmp_path, *flags.split(), "--envs", 2)) as trainer:
        trainer.run()
    rows = metrics(tmp_path)
    for name, low, high in (
        ("episode/count", 7, 9),
        ("episode/success", 1, 1),
        ("eval/count", 8, 8),
        ("eval/success", 1, 1),
        ("eval/first", 1, 1),
    ):
        values = [row[name] for row in rows if name in row]
        assert values and all(low <= value <= high for value in values), name


@pytest.mark.parametrize("sample", [False, True])
def test_evaluation_plays_whole_episodes_with_the_mode(sample, tmp_path):
    register_env("toy", lambda config, mode, index: Toy(length=5 + 4 * index, frame=(16, 16)))
    flags = "--task toy --image_size 16 16 --*.mults 2 4 --eval_every 1000 --eval_envs 2 --eval_episode_num 3".split()
    trainer = make_trainer(tmp_path, *flags, "--eval_sample", sample, "--steps", 30)
    used, policy = [], trainer.agent.policy

    def traced_policy(obs, state, sample, generator):
        used.append(sample)
        return policy(obs, state, sample, generator)

    trainer.agent.policy = traced_policy
    with contextlib.closing(trainer):
        trainer.evaluate()
    assert set(used) == {sample}
    (row,) = metrics(tmp_path)
    assert row["eval/return"] == row["eval/length"] == pytest.approx((5 + 5 + 9) / 3)  # two episodes there, one here
    trainer.eval_replay.flush()
    episodes = [np.load(path) for path in sorted((tmp_path / "eval_eps").glob("*.npz"))]
    whole = [len(episode["reward"]) for episode in episodes if episode["is_last"][-1] and episode["is_terminal"][-1]]
    assert whole == [6, 6, 10]  # the last step is there too


def test_play_films_the_first_episode(tmp_path):
    register_env("toy", lambda config, mode, index: Toy(length=5, frame=(16, 16)))
    config = configuration.load([*BARE, *"--task toy --image_size 16 16 --*.mults 2 4".split()])
    vector = make_envs(config, "eval", 2)
    with contextlib.closing(vector), tools.Film(tmp_path / "film.mp4", fps=20) as film:
        agent = Dreamer(vector.obs_space, vector.act_space, config)
        returns, lengths, _ = play(agent, vector, 5, False, torch.Generator().manual_seed(0), film=film)
        assert len(film) == len(film.preview) <= 6 and film.keep().exists()
    assert returns == [5.0] * 5 and lengths == [5] * 5
    assert [frame[0, 0, 0] for frame in film.preview[:5]] == [0, 1, 2, 3, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["film.mp4"]


def test_evaluating_more_often_changes_nothing_in_training(tmp_path):
    rows = []
    for every in (30, 70):
        flags = [*BARE, *"--task gym_CartPole-v1 --steps 120 --log_every 20 --deterministic_run true".split()]
        logdir = tmp_path / str(every)
        succeed(*flags, "--eval_every", every, "--video_pred_log", "true", "--logdir", logdir)
        rows.append([row for row in metrics(logdir) if "eval/return" not in row])
        for row in rows[-1]:
            row.pop("time/fps", None)
        assert len(metrics(logdir)) - len(rows[-1]) == {30: 4, 70: 2}[every]
    assert len(rows[0]) == 6 and rows[0] == rows[1]


def test_audio_that_is_not_listened_to_changes_nothing(tmp_path):
    """`audio_dim` draws none of a run's random numbers: without an active kind for it, all else stays as it is."""
    rows = []
    for name, more in {"none": [], "deaf": ["--audio_dim", 8, "--modalities", "vector"]}.items():
        flags = [*BARE, *"--task gym_CartPole-v1 --steps 120 --log_every 20 --deterministic_run true".split()]
        succeed(*flags, *more, "--logdir", tmp_path / name)
        rows.append(metrics(tmp_path / name))
        for row in rows[-1]:
            row.pop("time/fps", None), row.pop("replay/bytes", None)
    assert len(rows[0]) >= 6 and rows[0] == rows[1]


def test_dummy_audio_is_learned_from(tmp_path):
    flags = [*BARE, *"--task gym_CartPole-v1 --steps 120 --log_every 20".split(), "--audio_dim", 8]
    succeed(*flags, "--audio_noise_std", 0.5, "--logdir", tmp_path)
    losses = [row["world/recon_audio"] for row in metrics(tmp_path) if "world/recon_audio" in row]
    assert losses and all(row["world/nats_audio"] > 0 for row in metrics(tmp_path) if "world/nats_audio" in row)


def test_failures_close_the_environments(tmp_path):
    """Nothing is left running where a run cannot begin or ends by an error."""
    closed = []

    class Closing(Toy):
        def close(self):
            closed.append(self)

    register_env("toy", lambda config: Closing(raise_at=3))
    with contextlib.closing(make_trainer(tmp_path, "--task", "toy", "--steps", 100)) as trainer:
        with pytest.raises(EnvError, match="the toy broke"):
            trainer.run()
    assert len(closed) == 2
    (tmp_path / "latest.pt").write_bytes(b"nothing")
    with pytest.raises(UserError, match="latest.pt"):
        make_trainer(tmp_path, "--task", "toy", "--steps", 100)
    assert len(closed) == 4
