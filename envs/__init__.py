"""Environments: `make_env(config, mode, index)` is the one way in, `register_env(name, factory)` adds one.

Nothing here imports torch, so that worker processes start fast; a suite's package is imported when a task needs it.
"""

import dataclasses
import difflib
import importlib
import inspect
import logging
import os
import pickle
import sys

import gymnasium
import numpy as np
from gymnasium import spaces

from .gym_env import GymEnv
from .text import TokenizeText
from .wrappers import (
    ActionRepeat,
    AddAudio,
    CheckSteps,
    CheckTypes,
    Env,
    Exclusive,
    Frames,
    MultiOneHotAction,
    NormalizeAction,
    OneHotAction,
    TaskError,
    TimeLimit,
    action_size,
    transition,
)

__all__ = [
    "Env",
    "TaskError",
    "action_size",
    "make_env",
    "register_env",
    "registered",
    "restore_registered",
    "transition",
]

log = logging.getLogger(__name__)

MODES = ("train", "eval")
# First word of a task -> module with `load(config, mode, name, seed)`.
SUITES = {"dmc": "dmc", "gym": "gym_env", "atari": "atari", "crafter": "crafter"}
SUITES |= {"babyai": "babyai", "cue": "cues", "grid": "grid", "pinpad": "pinpad", "sound": "sound"}
ARGUMENTS = ("config", "mode", "index")
# Modules of gymnasium's ids that come with an installed package.
PACKAGED = {"gymnasium", "ale_py", "shimmy", "minigrid"}

_registry = {}  # name -> factory, or its pickle in a worker process
_specs = {}  # in a worker process: task -> pickle of what the program has registered with gymnasium


def register_env(name: str, factory) -> None:
    """Makes `name` a task. `factory(config, mode, index)` returns an `Env`, a gymnasium or an old gym environment.

    It is given the arguments it asks for: those among its parameters called config, mode and index by name;
    otherwise as many, in this order, as it has parameters without a default (a class that needs none is a factory).
    Call this before the environments are made; worker processes are told.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"register_env: the name is {name!r}, expected a word.")
    if not callable(factory):
        raise TypeError(f"register_env('{name}'): the factory is a {type(factory).__name__}, expected a callable.")
    _registry[name] = factory


def make_env(config, mode: str = "train", index: int = 0, start: int = 0, attempt: int = 0) -> Env:
    """The environment of `config.task` with every wrapper applied.

    config: has task, seed, action_repeat, time_limit (frames), image_size and the sections of the suites.
    mode: 'train' or 'eval'. index: number of this environment. start: what tells the starts of one run apart. attempt:
    how often this environment failed since the start. Seed, mode, index, start and attempt decide its randomness.
    Its `step` takes one vector [A] (see wrappers.NormalizeAction, OneHotAction, MultiOneHotAction).

    Errors: TaskError, one line, for a task that does not exist or whose package is missing.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, expected 'train' or 'eval'.")
    if sys.platform.startswith("linux"):
        # MuJoCo picks a windowed renderer unless told; without a screen that fails, EGL renders on GPU and CPU alike.
        os.environ.setdefault("MUJOCO_GL", "egl")
    seed = env_seed(config.seed, mode, index, start, attempt)
    env = Exclusive(_create(config, mode, index, seed), config.task)
    try:
        return _wrap(env, config, seed, speaks=mode == "train" and index == 0)
    except Exception:
        env.close()
        raise


def env_seed(seed: int, mode: str, index: int, start: int = 0, attempt: int = 0) -> int:
    """One seed (31 bits) per environment: those of neighbouring seeds, modes, indices, starts and attempts are
    unrelated.
    """
    later = [int(start), int(attempt)] if attempt else [int(start)] if start else []
    sequence = np.random.SeedSequence([int(seed), MODES.index(mode), int(index), *later])
    return int(sequence.generate_state(1)[0] >> 1)


def registered() -> tuple[dict[str, bytes], dict[str, bytes]]:
    """What another process has to know, which calls `restore_registered` with it: the registered factories, and what
    this program has registered with gymnasium, by the names of the tasks.

    Instead of a factory that cannot be pickled goes one that says so if a task needs it.
    """
    return tuple({name: _pickled(name, x) for name, x in found.items()} for found in (_registry, _gymnasium_specs()))


def restore_registered(factories: dict[str, bytes], specs: dict[str, bytes]) -> None:
    """Takes what `registered` gave in another process; each is unpickled when a task needs it."""
    _registry.update(factories)
    _specs.update(specs)


def _pickled(name, value):
    try:
        return value if isinstance(value, bytes) else dumps(value)
    except Exception as error:
        return pickle.dumps(Unpicklable(name, f"{type(error).__name__}: {error}"))


def _gymnasium_specs():
    """task -> spec of the ids that no package registers when it is imported, so that another process lacks them."""
    own = {}
    for name, spec in gymnasium.registry.items():
        entry = spec.entry_point
        if isinstance(entry, str) and entry.startswith("__main__:"):
            entry = getattr(sys.modules["__main__"], entry.partition(":")[2], entry)
        module = entry.partition(":")[0] if isinstance(entry, str) else getattr(entry, "__module__", None) or ""
        if entry is not None and module.partition(".")[0] not in PACKAGED:
            own[f"gym_{name}"] = dataclasses.replace(spec, entry_point=entry)
    return own


def dumps(value) -> bytes:
    """Pickles by cloudpickle where it is installed (lambdas and functions of scripts work), else by pickle."""
    try:
        import cloudpickle
    except ModuleNotFoundError:
        return pickle.dumps(value)
    return cloudpickle.dumps(value)


class Unpicklable:
    """Stands for a factory that could not be sent to this process."""

    def __init__(self, name, reason):
        self.name, self.reason = name, reason

    def __call__(self):
        raise TaskError(
            f"The factory of '{self.name}' cannot be sent to a worker process ({self.reason}): define it "
            "at the top level of a module, or use --parallel thread."
        )


def _create(config, mode, index, seed):
    task = config.task
    if task in _registry:
        factory = _registry[task]
        factory = pickle.loads(factory) if isinstance(factory, bytes) else factory
        return _adapt(_call(factory, (config, mode, index)), seed, task)
    if task in _specs:
        spec = pickle.loads(_specs[task])
        if isinstance(spec, Unpicklable):
            spec()
        gymnasium.registry.setdefault(spec.id, spec)
    suite, _, name = task.partition("_")
    if suite not in SUITES or not name:
        raise TaskError(_unknown(task))
    return importlib.import_module(f".{SUITES[suite]}", __name__).load(config, mode, name, seed)


def _unknown(task):
    suite = task.partition("_")[0]
    examples = {"dmc": "dmc_<domain>_<task>", "gym": "gym_<id>", "atari": "atari_<game>", "crafter": "crafter_reward"}
    examples |= {"babyai": "babyai_<level>", "cue": "cue_<modality>", "grid": "grid_rooms", "sound": "sound_<layout>"}
    examples |= {"pinpad": "pinpad_three"}
    close = difflib.get_close_matches(task, _registry, n=1)
    close += [examples[x] for x in difflib.get_close_matches(suite, SUITES, n=1, cutoff=0.5)]
    hint = f" did you mean {close[0]}?" if close else ""
    names = ", ".join([*examples.values(), "crafter_noreward", *_registry])
    return f"Unknown task '{task}':{hint} Tasks: {names}; register_env adds others."


def _call(factory, values):
    """Calls factory with as many of (config, mode, index) as `register_env` promises."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError:  # some classes written in C have no signature
        return factory()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return factory(*values)
    named = {p.name for p in parameters if p.name in ARGUMENTS and p.kind is not p.POSITIONAL_ONLY}
    if named:
        return factory(**{key: value for key, value in zip(ARGUMENTS, values, strict=True) if key in named})
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(needed) > len(values):
        raise TypeError(f"The factory needs {len(needed)} arguments, expected at most 3: (config, mode, index).")
    return factory(*values[: len(needed)])


def _adapt(env, seed, name):
    if all(hasattr(env, key) for key in ("obs_space", "act_space", "reset", "step")):
        return env
    if all(hasattr(env, key) for key in ("observation_space", "action_space", "reset", "step")):
        return GymEnv(env, seed, name)
    raise TypeError(
        f"The factory of '{name}' returned a {type(env).__name__}, expected an environment: obs_space and "
        "act_space, or observation_space and action_space; reset and step."
    )


def _wrap(env, config, seed, speaks):
    if getattr(env, "action_repeat", 1) != config.action_repeat:
        env = ActionRepeat(env, config.action_repeat)
    limit = config.time_limit or getattr(env, "time_limit", 0)
    if limit:
        env = TimeLimit(env, limit)
    if any(isinstance(space, spaces.Text) for space in env.obs_space.values()):
        env = TokenizeText(env, **config.text)
    if config.audio_dim:
        env = AddAudio(env, config.audio_dim, config.audio_noise_std, seed)
    env = Frames(CheckTypes(env, config.task), config.image_size, config.task)
    for note in env.notes if speaks else ():
        log.warning(note)
    return CheckSteps(_wrap_action(env, config.task), config.task)


def _wrap_action(env, name):
    space = env.act_space
    if isinstance(space, spaces.Box):
        return NormalizeAction(env)
    if isinstance(space, spaces.Discrete):
        return OneHotAction(env)
    if isinstance(space, spaces.MultiDiscrete):
        return MultiOneHotAction(env)
    raise TaskError(
        f"{name}: the action space is a {type(space).__name__}; supported are Box, Discrete and "
        "MultiDiscrete: flatten it in a wrapper."
    )
