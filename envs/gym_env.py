"""gymnasium environments by id, and an adapter for objects that follow gymnasium's or the old gym's interface."""

import importlib.util
import inspect
import logging

import gymnasium
import numpy as np
from gymnasium import spaces

from .wrappers import Env, TaskError, is_image, transition

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
        # Our own checks (CheckSpaces) replace the passive checker, which slows every step.
        options = dict(max_episode_steps=limit, disable_env_checker=True)
        try:
            env = gymnasium.make(name, render_mode="rgb_array", **options)
        except TypeError:  # the environment takes no render_mode
            env = gymnasium.make(name, **options)
    except (gymnasium.error.UnregisteredEnv, ModuleNotFoundError) as error:
        env = _old_gym(name, error)
    except gymnasium.error.DependencyNotInstalled as error:
        raise TaskError(f"gym_{name}: {error}") from error
    return GymEnv(env, seed, f"gym_{name}")


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
    `vocabulary` if it has one. Discrete values are counted from 0 even where the space starts elsewhere.

    Errors: TaskError for a space that is not supported.
    """

    def __init__(self, env, seed: int | None = None, name: str = "environment"):
        self._env = env
        self._name = name
        self._seed = seed
        self._starts, self._transposed = {}, set()
        self.obs_space = self._observation_spaces(env.observation_space)
        self.act_space, self._action_start = self._action_space(env.action_space)
        words = getattr(getattr(env, "unwrapped", env), "vocabulary", None)
        if words is not None:
            self.vocabulary = words  # of its texts
        self._image = next((key for key, space in self.obs_space.items() if is_image(space)), None)
        self._last_image = None
        self._no_render = False

    def reset(self):
        result = self._env.reset(**self._seed_once())
        if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict):
            obs, info = result
        else:
            obs, info = result, {}
        return transition(self._observe(obs, info), first=True)

    def step(self, action):
        if self._action_start is not None:
            action = action + self._action_start
        result = self._env.step(action)
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
        frame = None if self._no_render else self._render()
        if frame is None and self._last_image is not None and self._last_image.shape[-1:] == (3,):
            frame = self._last_image
        return frame

    def close(self):
        if hasattr(self._env, "close"):
            self._env.close()

    def _render(self):
        if not hasattr(self._env, "render"):
            return None
        try:
            frame = self._env.render(**self._render_arguments())
        except (gymnasium.error.DependencyNotInstalled, NotImplementedError) as error:
            log.warning("%s: no videos: %s", self._name, _one_line(error) or "render is not implemented")
            self._no_render = True
            return None
        frame = frame[-1] if isinstance(frame, list) and frame else frame
        return frame if isinstance(frame, np.ndarray) and frame.ndim == 3 else None

    def _render_arguments(self):
        core = getattr(self._env, "unwrapped", self._env)
        return {"mode": "rgb_array"} if "mode" in inspect.signature(core.render).parameters else {}

    def _seed_once(self):
        """The seed goes to the first reset, or to the old `seed` method; later episodes follow from it."""
        seed, self._seed = self._seed, None
        if seed is None:
            return {}
        core = getattr(self._env, "unwrapped", self._env)
        parameters = inspect.signature(core.reset).parameters.values()
        if any(p.name == "seed" or p.kind is p.VAR_KEYWORD for p in parameters):
            return {"seed": seed}
        if callable(getattr(core, "seed", None)):
            self._env.seed(seed)
        return {}

    def _observation_spaces(self, space):
        kind = _kind(space)
        if kind not in ("Dict", "Tuple"):
            frame = kind == "Box" and space.dtype == np.uint8 and len(space.shape) in (2, 3)
            self._single = "image" if frame else "text" if kind == "Text" else "vector"
            return {self._single: self._leaf(self._single, space)}
        self._single = None
        result = {}
        for key, leaf in _flatten(space, _children):
            if key in result:
                raise TaskError(f"{self._name}: two observations are called '{key}' once nested names are joined.")
            if not key.startswith("log_"):
                result[key] = self._leaf(key, leaf)
        return result

    def _leaf(self, key, space):
        kind = _kind(space)
        if kind == "Box":
            low, high, shape = space.low, space.high, space.shape
            box = spaces.Box(low, high, shape, space.dtype)
            if is_image(box) and len(shape) == 3 and shape[0] in (1, 3, 4) and shape[2] > 4:
                self._transposed.add(key)  # channels first, as for PyTorch
                box = spaces.Box(0, 255, (*shape[1:], shape[0]), np.uint8)
            return box
        if kind == "Discrete":
            self._starts[key] = int(getattr(space, "start", 0))
            return spaces.Discrete(int(space.n))
        if kind == "MultiDiscrete":
            self._starts[key] = np.asarray(getattr(space, "start", 0))
            return spaces.MultiDiscrete(np.asarray(space.nvec))
        if kind == "MultiBinary":
            return spaces.MultiBinary(space.shape)
        if kind == "Text":
            return spaces.Text(int(getattr(space, "max_length", 256)))
        raise TaskError(
            f"{self._name}: observation '{key}' has a {type(space).__name__} space; "
            "supported are Box, Discrete, MultiDiscrete, MultiBinary, Text, Dict and Tuple."
        )

    def _action_space(self, space):
        kind = _kind(space)
        if kind == "Box":
            return spaces.Box(space.low, space.high, space.shape, space.dtype), None
        if kind == "Discrete":
            return spaces.Discrete(int(space.n)), int(getattr(space, "start", 0)) or None
        if kind == "MultiDiscrete":
            start = np.asarray(getattr(space, "start", 0))
            return spaces.MultiDiscrete(np.asarray(space.nvec)), start if start.any() else None
        raise TaskError(
            f"{self._name}: the action space is a {type(space).__name__}; supported are Box, Discrete and "
            "MultiDiscrete: flatten it in a wrapper."
        )

    def _observe(self, obs, info):
        if self._single is not None:
            result = {self._single: obs}
        else:
            result = {key: value for key, value in _flatten(obs, _values) if value is not None}
        for key, value in result.items():
            if isinstance(value, str):
                continue  # it becomes ids in `TokenizeText`
            result[key] = value = np.asarray(value)
            if key in self._starts:
                result[key] = (value - self._starts[key]).astype(np.int64)
            if key in self._transposed:
                result[key] = np.moveaxis(value, 0, -1)
        self._last_image = result.get(self._image)
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
    kind = _kind(space)
    if kind == "Dict":
        return space.spaces.items()
    return enumerate(space.spaces) if kind == "Tuple" else None


def _values(value):
    if isinstance(value, dict):
        return value.items()
    return enumerate(value) if isinstance(value, tuple) else None


def _flatten(tree, children, prefix=""):
    """(name, leaf) pairs of a tree, names joined by '/'."""
    for key, child in children(tree):
        name = f"{prefix}{key}"
        if children(child) is None:
            yield name, child
        else:
            yield from _flatten(child, children, f"{name}/")
