"""A training run that something happens to, for `faults.py`: `python benchmarks/faulty.py FAULTS -- flags`.

FAULTS is JSON: `env` is what the environment does (`Faulty`), `hook` what is done to the run and when (`install`),
`spoil` which updates are spoiled (`spoil`). The flags are those of dreamer.py.
"""

import functools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from gymnasium import spaces

import envs
from envs import Env, transition

TASK = "faulty"
LEAK = 10 * 2**20  # bytes a step
LIMIT = 2 * 2**30  # address space of an environment that leaks


class Faulty(Env):
    """Numbers that tell where a step belongs: who made it, its episode, its step. Rewards are a hundredth of the step.

    fault: what happens, in a share `rate` of the steps. raise, reset, close: an error there; hang: a step that does
    not return; kill: its process is killed; leak: 10 MiB more are kept; nan, inf: in the observation; shape, dtype,
    missing, extra: the observation is not what its space says.
    """

    obs_space = {
        "where": spaces.Box(-np.inf, np.inf, (4,), np.float64),
        "image": spaces.Box(0, 255, (16, 16, 3), np.uint8),
    }
    act_space = spaces.Discrete(3)

    def __init__(self, fault: str = "", rate: float = 0.01, length: int = 40, seed: int | None = None):
        self.fault, self.rate, self.length = fault, rate, length
        self.rng = np.random.default_rng(seed)
        self.who = self.rng.integers(2**24, size=2)  # the replay keeps numbers in float32
        self.episode, self.leaked = -1, []
        if fault == "leak":
            resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))

    def reset(self):
        if self.fault == "reset" and self.rng.random() < 20 * self.rate and self.episode >= 0:
            raise RuntimeError("the simulator does not start")
        self.episode, self.count = self.episode + 1, 0
        return transition(self.observe(), first=True)

    def step(self, action):
        self.count += 1
        due = self.fault and self.rng.random() < self.rate
        if self.fault == "leak":
            self.leaked.append(np.ones(LEAK, np.uint8))
        if due and self.fault == "raise":
            raise RuntimeError("the simulator diverged")
        if due and self.fault == "hang":
            time.sleep(3600)
        if due and self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        obs = self.observe()
        if due and self.fault in ("nan", "inf"):
            obs["where"][3] = float(self.fault)
        if due and self.fault == "shape":
            obs["where"] = obs["where"][:2]
        if due and self.fault == "dtype":
            obs["image"] = obs["image"] / 255
        if due and self.fault == "missing":
            del obs["where"]
        if due and self.fault == "extra":
            obs["surprise"] = 1.0
        last = self.count == self.length
        return transition(obs, self.count / 100, last=last, terminal=last)

    def close(self):
        if self.fault == "close":
            raise RuntimeError("the simulator does not end")

    def observe(self):
        where = np.array([*self.who, self.episode, self.count], np.float64)
        return {"where": where, "image": np.full((16, 16, 3), self.count, np.uint8)}

    def render(self):
        return np.full((64, 64, 3), self.count, np.uint8)


def register(env: dict) -> None:
    """`fault` in evaluations too only if `both` is set: a run should be judged by what it collects."""
    options = {key: value for key, value in env.items() if key != "both"}

    def make(config, mode, index):
        return Faulty(**(options if mode == "train" or env.get("both") else {"length": options.get("length", 40)}))

    envs.register_env(TASK, make)


# What happens to the run


def hooks() -> dict:
    """Moment -> (owner, method): the n-th call of it is the moment."""
    import dreamer
    import logger
    import replay
    import tools

    return {
        "prefill": (dreamer.Trainer, "_store"),
        "update": (dreamer.Trainer, "_update"),
        "evaluation": (dreamer.Trainer, "evaluate"),
        "play": (dreamer, "add_frame"),
        "piece": (replay, "write_npz"),
        "compaction": (replay.Replay, "_prune"),
        "checkpoint": (tools, "save_checkpoint"),
        "metrics": (logger.Logger, "_write_metrics"),
        "tensorboard": (logger.Logger, "_write_tensorboard"),
        "film": (logger.Film, "add"),
        "config": (dreamer.Trainer, "_introduce"),
    }


def install(on: str, n: int, do: str, within: float = 0.0, logdir: str = "") -> None:
    """At the n-th call of the moment `on`, does `do`: a signal up to `within` seconds later, the others at once."""
    owner, name = hooks()[on]
    original, calls = getattr(owner, name), [0]

    @functools.wraps(original)
    def hooked(*args, **kwargs):
        calls[0] += 1
        if calls[0] == n:
            act(do, within, logdir)
        return original(*args, **kwargs)

    setattr(owner, name, hooked)


def act(do: str, within: float, logdir: str) -> None:
    if do.startswith("SIG"):
        later = threading.Timer(random.uniform(0, within), os.kill, (os.getpid(), getattr(signal, do)))
        later.daemon = True
        later.start()
    elif do == "fill":
        fill(Path(logdir).parent / "filler")
    elif do == "delete":
        shutil.rmtree(logdir)
    elif do == "readonly":
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", logdir], check=True)  # over it
    elif do == "memory":
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. (simulated)")
    else:
        raise ValueError(f"{do} is no action")


def fill(path: Path) -> None:
    """Fills the disk that `path` is on."""
    size = 2**20
    with open(path, "ab", buffering=0) as file:
        while size:
            try:
                file.write(b"x" * size)
            except OSError:
                size //= 2


def spoil(kind: str, first: int, last: int) -> None:
    """Updates `first` to `last` have a loss that is not finite (`loss`), or a batch with infinite rewards (`batch`)."""
    import dreamer

    step, calls = dreamer.Dreamer.train_step, [0]

    @functools.wraps(step)
    def spoiled(self, batch, noise=None):
        calls[0] += 1
        if not first <= calls[0] <= last:
            return step(self, batch, noise)
        if kind == "batch":
            return step(self, {**batch, "reward": batch["reward"] * float("inf")}, noise)
        before = dict(self.loss_scales)
        self.loss_scales.update(dict.fromkeys(before, float("nan")))
        try:
            return step(self, batch, noise)
        finally:
            self.loss_scales.update(before)

    dreamer.Dreamer.train_step = spoiled


def main() -> int:
    import errors

    errors.end_quietly_on_interrupt()
    import config as configuration

    split = sys.argv.index("--")
    faults, flags = json.loads(sys.argv[1]), sys.argv[split + 1 :]
    config = configuration.load(flags)
    register(faults.get("env", {}))
    import dreamer

    if faults.get("hook"):
        install(**faults["hook"], logdir=configuration.resolve_paths(config).logdir)
    if faults.get("spoil"):
        spoil(**faults["spoil"])
    return dreamer.cli(config)


if __name__ == "__main__":
    sys.exit(main())
