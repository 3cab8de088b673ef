"""The environment interface, and small wrappers that bring any environment to it.

An environment is any object with the attributes of `Env`. `envs.make_env` stacks the wrappers here in one order:
environment -> ActionRepeat -> TimeLimit -> TokenizeText (`text.py`) -> AddAudio -> ConvertTypes -> ResizeImage ->
actions -> CheckSpaces.
"""

import math

import numpy as np
from gymnasium import spaces

from errors import UserError

FLAGS = ("is_first", "is_last", "is_terminal")
# Names that a step in the replay already uses: an observation cannot have them.
RESERVED = ("reward", "action", "discount", "deter", "stoch", *FLAGS)
# Bounds beyond this are placeholders for "no bound" (often the largest float32).
UNBOUNDED = 1e10


class TaskError(UserError):
    """The user's choice of task cannot be built: one line that says what to do (shown without a traceback)."""


class Env:
    """What the agent sees of an environment.

    obs_space: dict of gymnasium spaces, one per learned observation.
    act_space: gymnasium Box, Discrete or MultiDiscrete.
    action_repeat: frames that one `step` takes already (1 unless the environment repeats actions itself).
    time_limit: frames of the suite's own time limit where the environment does not enforce it itself; 0: none.

    `reset` and `step` return a dict: the observations, `reward` (float32, received on arriving here), `is_first`,
    `is_last` (the sequence ends), `is_terminal` (the task ended; False on a time limit) and any `log_*` entries.
    An observation that is missing from the dict is not present at this step.
    """

    obs_space: dict
    act_space: spaces.Space
    action_repeat = 1
    time_limit = 0

    def reset(self) -> dict:
        raise NotImplementedError

    def step(self, action) -> dict:
        raise NotImplementedError

    def render(self) -> np.ndarray | None:
        """A frame for videos, uint8 [H, W, 3], or None."""
        return None

    def close(self) -> None:
        pass


def transition(obs: dict, reward: float = 0.0, *, first=False, last=False, terminal=False) -> dict:
    """One step's dict. obs: observations and `log_*` entries; reward: received on arriving at obs."""
    return {
        **obs,
        "reward": np.float32(reward),
        "is_first": np.bool_(first),
        "is_last": np.bool_(last),
        "is_terminal": np.bool_(terminal),
    }


def action_size(space: spaces.Space) -> int:
    """Length A of the action vector of a space that `make_env` returns."""
    if isinstance(space, spaces.Discrete):
        return int(space.n)
    if isinstance(space, spaces.MultiDiscrete):
        return int(space.nvec.sum())
    return math.prod(space.shape)


def is_image(space) -> bool:
    """Whether a space holds frames: uint8, [height, width] or [height, width, channels]."""
    return isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) in (2, 3)


class Wrapper(Env):
    """Hands everything on to `env`; a subclass changes one thing."""

    def __init__(self, env):
        self.env = env
        self.obs_space = dict(env.obs_space)
        self.act_space = env.act_space
        self.action_repeat = getattr(env, "action_repeat", 1)
        self.time_limit = getattr(env, "time_limit", 0)
        self.vocabulary = getattr(env, "vocabulary", None)  # words of its texts, if they are known

    def reset(self):
        return self.env.reset()

    def step(self, action):
        return self.env.step(action)

    def render(self):
        return self.env.render() if hasattr(self.env, "render") else None

    def close(self):
        if hasattr(self.env, "close"):
            self.env.close()


class ActionRepeat(Wrapper):
    """Repeats each action for `repeat` frames: sums the rewards, stops early at the end of an episode."""

    def __init__(self, env, repeat: int):
        super().__init__(env)
        if self.action_repeat != 1:
            raise TaskError(
                f"The environment repeats actions {self.action_repeat} times itself: set action_repeat to "
                f"{self.action_repeat}, not {repeat}."
            )
        self.action_repeat = repeat

    def step(self, action):
        total = 0.0
        for _ in range(self.action_repeat):
            step = self.env.step(action)
            total += float(step["reward"])
            if step["is_last"]:
                break
        return {**step, "reward": np.float32(total)}


class TimeLimit(Wrapper):
    """Ends the sequence (`is_last`, not `is_terminal`) after `limit` frames, rounded up to whole agent steps."""

    def __init__(self, env, limit: int):
        super().__init__(env)
        self._limit = limit
        self._frames = 0

    def reset(self):
        self._frames = 0
        return self.env.reset()

    def step(self, action):
        step = self.env.step(action)
        self._frames += self.action_repeat
        if self._frames >= self._limit:
            step = {**step, "is_last": np.bool_(True)}
        return step


class ConvertTypes(Wrapper):
    """Observations in few types: floats and bools become float32, scalars get shape (1,); integers stay.

    Bools become floats, not uint8, so that a grid of bools is never taken for an image.
    """

    def __init__(self, env):
        super().__init__(env)
        self._float = [k for k, s in self.obs_space.items() if isinstance(s, spaces.Box) and s.dtype.kind in "fb"]
        self._float += [k for k, s in self.obs_space.items() if isinstance(s, spaces.MultiBinary)]
        self._scalar = [k for k, s in self.obs_space.items() if isinstance(s, spaces.Box) and s.shape == ()]
        self.obs_space = {key: self._space(key, space) for key, space in self.obs_space.items()}

    def reset(self):
        return self._convert(self.env.reset())

    def step(self, action):
        return self._convert(self.env.step(action))

    def _space(self, key, space):
        if key not in self._float and key not in self._scalar:
            return space
        shape = space.shape or (1,)
        dtype = np.float32 if key in self._float else space.dtype
        low, high = (0, 1) if isinstance(space, spaces.MultiBinary) else (space.low, space.high)
        with np.errstate(over="ignore"):  # the largest float64 becomes inf, which is what it means
            low, high = (np.broadcast_to(np.asarray(x, dtype), shape) for x in (low, high))
        return spaces.Box(low, high, shape, dtype)

    def _convert(self, step):
        step = dict(step)
        for key in self._float:
            if key in step:
                step[key] = np.asarray(step[key], np.float32)
        for key in self._scalar:
            if key in step:
                step[key] = np.reshape(step[key], (1,)) if np.ndim(step[key]) == 0 else step[key]
        return step


class AddAudio(Wrapper):
    """A dummy observation `audio`, float32 [dim]: zeros and normal noise, to try a pipeline that hears."""

    def __init__(self, env, dim: int, std: float, seed: int):
        super().__init__(env)
        if "audio" in self.obs_space:
            raise TaskError("The environment observes `audio` itself: audio_dim must be 0.")
        self._shape, self._std, self._rng = (dim,), std, np.random.default_rng(seed)
        self.obs_space["audio"] = spaces.Box(-np.inf, np.inf, self._shape, np.float32)

    def reset(self):
        return self._add(self.env.reset())

    def step(self, action):
        return self._add(self.env.step(action))

    def _add(self, step):
        return {**step, "audio": self._std * self._rng.standard_normal(self._shape, np.float32)}


class ResizeImage(Wrapper):
    """Images of any size to [height, width, channels] of `size`, by area averaging (OpenCV's INTER_AREA)."""

    def __init__(self, env, size: tuple[int, int]):
        super().__init__(env)
        self._size = tuple(int(x) for x in size)
        self._keys = [
            k for k, s in self.obs_space.items() if is_image(s) and (len(s.shape) == 2 or s.shape[:2] != self._size)
        ]
        for key in self._keys:
            shape = self.obs_space[key].shape
            channels = shape[2] if len(shape) == 3 else 1
            self.obs_space[key] = spaces.Box(0, 255, (*self._size, channels), np.uint8)

    def reset(self):
        return self._resize(self.env.reset())

    def step(self, action):
        return self._resize(self.env.step(action))

    def _resize(self, step):
        for key in self._keys:
            if key in step:
                step = {**step, key: resize(step[key], self._size)}
        return step


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """image [H, W] or [H, W, C] of any dtype that OpenCV knows -> [*size, C] of the same dtype."""
    import cv2

    cv2.setNumThreads(0)  # many environments run side by side: OpenCV's own threads would only get in their way
    image = np.ascontiguousarray(image)
    channels = image.shape[2] if image.ndim == 3 else 1
    if image.shape[:2] != tuple(size):
        image = cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_AREA)
    return image.reshape(*size, channels)  # OpenCV drops a single channel


class NormalizeAction(Wrapper):
    """A Box of any shape and bounds as a vector [A] in [-1, 1]: clips, rescales, reshapes.

    An entry without two finite bounds passes through in the environment's own units (clipped to a bound it has).
    """

    def __init__(self, env):
        super().__init__(env)
        space = env.act_space
        low, high = (np.asarray(x, np.float64).reshape(-1) for x in (space.low, space.high))
        self._low, self._high = low, high
        self._finite = (low > -UNBOUNDED) & (high < UNBOUNDED)
        self._shape, self._dtype = space.shape, space.dtype
        self._size = low.size
        self.act_space = spaces.Box(-1.0, 1.0, (low.size,), np.float32)

    def step(self, action):
        action = np.asarray(action, np.float64).reshape(-1)
        if action.size != self._size:
            raise ValueError(f"Action has {action.size} entries, expected {self._size} for a Box of {self._shape}.")
        with np.errstate(over="ignore", invalid="ignore"):  # in the entries that np.where drops
            scaled = self._low + (np.clip(action, -1, 1) + 1) / 2 * (self._high - self._low)
        action = np.clip(np.where(self._finite, scaled, action), self._low, self._high)
        if self._dtype.kind in "iu":
            action = np.rint(action)
        return self.env.step(action.reshape(self._shape).astype(self._dtype))


class OneHotAction(Wrapper):
    """Discrete(n): takes a one-hot vector [n] (the largest entry counts), or an integer index."""

    def step(self, action):
        return self.env.step(_index(np.asarray(action), int(self.act_space.n)))


class MultiOneHotAction(Wrapper):
    """MultiDiscrete([n1, n2, ...]): takes the concatenated one-hots [n1 + n2 + ...], or a vector of indices."""

    def __init__(self, env):
        super().__init__(env)
        self._shape = env.act_space.nvec.shape
        self._sizes = [int(n) for n in env.act_space.nvec.reshape(-1)]
        self._splits = np.cumsum(self._sizes)[:-1]
        self.act_space = spaces.MultiDiscrete(self._sizes)

    def step(self, action):
        action = np.asarray(action).reshape(-1)
        if action.size == sum(self._sizes):
            parts = np.split(action, self._splits)
        elif action.size == len(self._sizes):
            parts = np.rint(action).astype(np.int64)
        else:
            raise ValueError(
                f"Action has {action.size} entries, expected {sum(self._sizes)} (one-hots of sizes "
                f"{self._sizes}) or {len(self._sizes)} (indices)."
            )
        indices = [_index(part, n) for part, n in zip(parts, self._sizes, strict=True)]
        return self.env.step(np.array(indices, np.int64).reshape(self._shape))


def _index(action: np.ndarray, n: int) -> int:
    if action.shape == (n,):
        return int(action.argmax())
    if action.size == 1 and (action.dtype.kind in "iu" or action.ndim == 0):
        index = int(action.reshape(()))
        if 0 <= index < n:
            return index
        raise ValueError(f"Action {index} is out of range, expected 0 to {n - 1}.")
    raise ValueError(f"Action has shape {action.shape}, expected a one-hot vector ({n},) or an integer index.")


class CheckSpaces(Wrapper):
    """Compares spaces and values at each reset, and brings reward and flags to numpy types.

    Ids are compared at every step: one outside of its vocabulary would do harm where nobody could tell any more where
    it came from. (NaN is found when a step is stored.)

    Raises ValueError (TaskError for ids) naming the key, what was found and what its space says.
    """

    def __init__(self, env, name: str = "environment"):
        super().__init__(env)
        self._name = name
        if not self.obs_space:
            raise ValueError(f"{name}: the observation space is empty; the agent needs at least one observation.")
        for key in self.obs_space:
            if key in RESERVED or key.startswith("log_"):
                raise ValueError(f"{name}: an observation cannot be named '{key}' (used by the replay): rename it.")
        boxes = {key: space for key, space in self.obs_space.items() if isinstance(space, spaces.Box)}
        # The largest id is what the world model has a row for; whole bytes cannot lie outside.
        whole = {key for key, space in boxes.items() if space.dtype == np.uint8 and space.high.min() == 255}
        self._highest = {k: s.high.max() for k, s in boxes.items() if s.dtype.kind in "iu" and k not in whole}

    def reset(self):
        step = self._complete(self.env.reset())
        self._check(step)
        self._check_ids(step)
        return step

    def step(self, action):
        step = self._complete(self.env.step(action))
        self._check_ids(step)
        return step

    def _check_ids(self, step):
        for key, highest in self._highest.items():
            value = step.get(key)
            if value is not None and (np.max(value) > highest or np.min(value) < 0 <= self.obs_space[key].low.min()):
                low, found = self.obs_space[key].low.min(), np.ravel(value)
                outside = found[(found > highest) | (found < low)][0]
                raise TaskError(f"{self._name}: '{key}' holds {outside}, but its space says {low} to {highest}.")

    def _complete(self, step):
        missing = [key for key in ("reward", *FLAGS) if key not in step]
        if missing:
            raise ValueError(f"{self._name}: the step lacks {', '.join(missing)}; it has {', '.join(step)}.")
        return {**step, "reward": np.float32(step["reward"]), **{key: np.bool_(step[key]) for key in FLAGS}}

    def _check(self, step):
        for key, value in step.items():
            if key in ("reward", *FLAGS) or key.startswith("log_"):
                continue
            if key not in self.obs_space:
                raise ValueError(
                    f"{self._name}: observation '{key}' has no space (spaces: "
                    f"{', '.join(self.obs_space)}): add one, or name it 'log_{key}' to log it only."
                )
            self._check_value(key, np.asarray(value), self.obs_space[key])

    def _check_value(self, key, value, space):
        if value.shape != space.shape or not np.can_cast(value.dtype, space.dtype, "same_kind"):
            raise ValueError(
                f"{self._name}: observation '{key}' is {value.dtype} {list(value.shape)}, but its space "
                f"says {space.dtype} {list(space.shape)}: make the space and the values agree."
            )
        if isinstance(space, spaces.Discrete | spaces.MultiDiscrete) and not space.contains(value.astype(space.dtype)):
            raise ValueError(f"{self._name}: observation '{key}' is {value}, outside its space {space}.")
