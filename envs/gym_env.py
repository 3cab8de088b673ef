"""gymnasium environments by id, and an adapter for objects that follow gymnasium's or the old gym's interface."""

import importlib.util
import inspect
import logging

import gymnasium
import numpy as np
from gymnasium import spaces

from .wrappers import Env, TaskError, transition

log = logging.getLogger(__name__)


def load(config, mode: str, name: str, seed: int) -> Env:
    """The environment with gymnasium id `name`, e.g. CartPole-v1 or package:Name-v0.

    Its registered time limit holds (as a truncation) unless config.time_limit replaces it.
    """
    if name.startswith("ALE/") and importlib.util.find_spec("ale_py"):
        import ale_py

        gymnasium.register_envs(ale_py)
    limit = -1 if config.time_limit else None  # -1: without the registered limit
    try:
        env = _make(name, max_episode_steps=limit)
    except (gymnasium.error.UnregisteredEnv, ModuleNotFoundError) as error:
        env = _old_gym(name, error)
    except (gymnasium.error.Error, ImportError) as error:  # deprecated, moved, without what it needs, ...
        raise TaskError(f"gym_{name}: {_one_line(error)}") from error
    return GymEnv(env, seed, f"gym_{name}")


def _make(name, **options):
    """With rendering to arrays if it can: some only know windows, some take no render_mode."""
    # Our own checks (CheckTypes) replace the passive checker, which slows every step.
    options["disable_env_checker"] = True
    try:
        return gymnasium.make(name, render_mode="rgb_array", **options)
    except gymnasium.error.UnregisteredEnv:
        raise
    except Exception:  # what an environment does with a mode that it lacks is its own; any other error comes again
        return gymnasium.make(name, **options)


def _old_gym(name, error):
    if importlib.util.find_spec("gym") is None:
        raise TaskError(
            f"gym_{name}: {_one_line(error)} (gymnasium.envs.registry lists the ids; `package:Name-v0` "
            "imports the package that registers an id)"
        ) from error
    import gym

    try:
        # The checker of gym 0.26 fails on numpy 2 (np.bool8 is gone).
        return gym.make(name, disable_env_checker=True)
    except gym.error.Error as old:
        raise TaskError(f"gym_{name}: neither gymnasium nor gym has it: {_one_line(error)}") from old


def _one_line(error):
    return " ".join(str(error).split())


class GymEnv(Env):
    """Adapts an object with `observation_space`, `action_space`, `reset` and `step`.

    It may return 5 values from `step` (terminated, truncated) or 4 (done; `TimeLimit.truncated` in the info marks a
    time limit), and the observation with or without an info dict from `reset`. Spaces are recognised by class name,
    so that those of the old gym work without importing it. Nested observations are flattened: {'a': {'b': x}} is
    `a/b`. An observation that is not a dict is `image` if it is one, else `vector`. Entries of the info dict whose
    name starts with `log_` are handed on. Texts become token ids later (`TokenizeText`), by the environment's attribute
    `vocabulary` if it has one.

    Errors: TaskError for a space that is not supported.
    """

    def __init__(self, env, seed: int | None = None, name: str = "environment"):
        self.adapted = env
        self._name = name
        self._seed = seed
        self.obs_space = self._observation_spaces(env.observation_space)
        self.act_space = self._action_space(env.action_space)
        words = getattr(getattr(env, "unwrapped", env), "vocabulary", None)
        if words is not None:
            self.vocabulary = words  # of its texts
        self._no_render = False

    def reset(self):
        result = self.adapted.reset(**self._seed_once())
        if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict):
            obs, info = result
        else:
            obs, info = result, {}
        return transition(self._observe(obs, info), first=True)

    def step(self, action):
        result = self.adapted.step(action)
        if len(result) == 5:
            obs, reward, terminated, truncated, info = result
        elif len(result) == 4:
            obs, reward, done, info = result
            truncated = bool(done and info.get("TimeLimit.truncated", False))
            terminated = bool(done) and not truncated
        else:
            raise ValueError(
                f"{self._name}: step returned {len(result)} values, expected 5 (observation, reward, "
                "terminated, truncated, info) or 4 (observation, reward, done, info)."
            )
        obs = self._observe(obs, info)
        return transition(obs, _scalar(reward), last=terminated or truncated, terminal=terminated)

    def render(self):
        return None if self._no_render else self._render()

    def close(self):
        if hasattr(self.adapted, "close"):
            self.adapted.close()

    def _render(self):
        if not hasattr(self.adapted, "render"):
            return None
        try:
            frame = self.adapted.render(**self._render_arguments())
        except (gymnasium.error.DependencyNotInstalled, NotImplementedError) as error:
            log.warning("%s: nothing is rendered: %s", self._name, _one_line(error) or "render is not implemented")
            self._no_render = True
            return None
        frame = frame[-1] if isinstance(frame, list) and frame else frame
        return frame if isinstance(frame, np.ndarray) and frame.ndim == 3 else None

    def _render_arguments(self):
        core = getattr(self.adapted, "unwrapped", self.adapted)
        return {"mode": "rgb_array"} if "mode" in inspect.signature(core.render).parameters else {}

    def _seed_once(self):
        """The seed goes to the first reset, or to the old `seed` method; later episodes follow from it."""
        seed, self._seed = self._seed, None
        if seed is None:
            return {}
        core = getattr(self.adapted, "unwrapped", self.adapted)
        parameters = inspect.signature(core.reset).parameters.values()
        if any(p.name == "seed" or p.kind is p.VAR_KEYWORD for p in parameters):
            return {"seed": seed}
        if callable(getattr(core, "seed", None)):
            self.adapted.seed(seed)
        return {}

    def _observation_spaces(self, space):
        self._space = space
        kind = _kind(space)
        self._single = None
        if kind not in ("Dict", "Tuple"):
            frame = kind == "Box" and space.dtype == np.uint8 and len(space.shape) in (2, 3)
            self._single = "image" if frame else "text" if kind == "Text" else "vector"
        result = {}
        for key, leaf in self._leaves(space):
            if key in result:
                raise TaskError(f"{self._name}: two observations are called '{key}' once nested names are joined.")
            if not key.startswith("log_"):
                result[key] = self._leaf(key, leaf)
        return result

    def _leaf(self, key, space):
        kind = _kind(space)
        if kind in CONVERT:
            return CONVERT[kind](space)
        raise TaskError(
            f"{self._name}: observation '{key}' has a {type(space).__name__} space; "
            f"supported are {', '.join(CONVERT)}, Dict and Tuple."
        )

    def _action_space(self, space):
        kind = _kind(space)
        if kind in ("Box", "Discrete", "MultiDiscrete"):
            return CONVERT[kind](space)
        raise TaskError(
            f"{self._name}: the action space is a {type(space).__name__}; supported are Box, Discrete and "
            "MultiDiscrete: flatten it in a wrapper."
        )

    def _leaves(self, space, prefix=""):
        """(name, space) of what a space is made of, names joined by '/'."""
        if _kind(space) not in ("Dict", "Tuple"):
            yield prefix or self._single, space
            return
        for key, child in _children(space):
            yield from self._leaves(child, f"{prefix}/{key}" if prefix else str(key))

    def _values(self, value, space, prefix=""):
        """(name, value), likewise. The space tells what is a part and what is a value: both may be tuples."""
        name = prefix or self._single
        if value is None:
            return  # absent at this step
        kind = _kind(space) if space is not None else "Dict" if isinstance(value, dict) else "Box"
        if kind not in ("Dict", "Tuple") and not isinstance(value, dict):
            yield name, value
        elif isinstance(value, dict) and kind == "Dict" or isinstance(value, (tuple, list)) and kind == "Tuple":
            of = {} if space is None else dict(_children(space))
            for key, child in value.items() if kind == "Dict" else enumerate(value):
                yield from self._values(child, of.get(key), f"{prefix}/{key}" if prefix else str(key))
        else:
            where = f"observation '{name}'" if name else "the observation"
            raise TaskError(f"{self._name}: {where} is a {type(value).__name__}, but its space is a {kind}.")

    def _observe(self, obs, info):
        result = dict(self._values(obs, self._space))
        result.update({key: value for key, value in (info or {}).items() if key.startswith("log_")})
        return result


def _scalar(reward):
    value = np.asarray(reward, np.float32)
    if value.size != 1:
        raise ValueError(f"The reward has shape {value.shape}, expected one number.")
    return value.reshape(())


def _kind(space) -> str:
    """The space's class name, looking through subclasses: old and new gym agree on these names. A space of strings that
    is none of them (such as minigrid's missions) counts as Text.
    """
    known = ("Box", "Discrete", "MultiDiscrete", "MultiBinary", "Dict", "Tuple", "Text", "Graph", "Sequence")
    name = next((cls.__name__ for cls in type(space).__mro__ if cls.__name__ in known), type(space).__name__)
    strings = name not in known and getattr(space, "dtype", None) is not None and np.dtype(space.dtype).kind == "U"
    return "Text" if strings else name


def _children(space):
    """(key, space) of the parts of a Dict or Tuple space."""
    return space.spaces.items() if _kind(space) == "Dict" else enumerate(space.spaces)


# gymnasium's own spaces, from those of either library.
CONVERT = {
    "Box": lambda space: spaces.Box(space.low, space.high, space.shape, space.dtype),
    "Discrete": lambda space: spaces.Discrete(int(space.n), start=int(getattr(space, "start", 0))),
    "MultiDiscrete": lambda space: spaces.MultiDiscrete(
        np.asarray(space.nvec), start=np.broadcast_to(np.asarray(getattr(space, "start", 0)), np.shape(space.nvec))
    ),
    "MultiBinary": lambda space: spaces.MultiBinary(space.shape),
    "Text": lambda space: spaces.Text(int(getattr(space, "max_length", 256))),
}
