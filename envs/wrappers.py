"""The environment interface, and small wrappers that bring any environment to it.

An environment is any object with the attributes of `Env`. `envs.make_env` stacks the wrappers here in one order:
environment -> ActionRepeat -> TimeLimit -> TokenizeText (`text.py`) -> AddAudio -> CheckTypes -> Frames -> actions ->
CheckSteps.
"""

import math
import weakref
from typing import NamedTuple

import numpy as np
from gymnasium import spaces

from errors import UserError

FLAGS = ("is_first", "is_last", "is_terminal")
# Names that a step in the replay already uses: an observation cannot have them.
RESERVED = ("reward", "action", "discount", "deter", "stoch", *FLAGS)
# Bounds beyond this are placeholders for "no bound" (often the largest float32).
UNBOUNDED = 1e10
IDS = 4096  # numbers that a grid of ids may take as one-hot vectors; beyond that it is read as a frame


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


class Exclusive(Wrapper):
    """Refuses an environment that is in use: the steps of two users would be mixed without a word.

    An environment is in use from here until `close`, or until nothing refers to it any more. What counts is what the
    factory returned, and what that unwraps to.
    """

    _users = weakref.WeakValueDictionary()  # id of an environment -> the wrapper around it

    def __init__(self, env, task: str):
        super().__init__(env)
        core = getattr(env, "adapted", env)
        self._parts = (core, getattr(core, "unwrapped", core))  # kept, so that their ids stay theirs
        if any(id(part) in self._users for part in self._parts):
            raise TaskError(
                f"{task}: its factory returned an environment that is in use already. It must make a new one each time."
            )
        for part in self._parts:
            self._users[id(part)] = self

    def close(self):
        for part in self._parts:
            self._users.pop(id(part), None)
        self._parts = ()
        super().close()


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


class CheckTypes(Wrapper):
    """Compares every observation with its space at every step, and brings it to one of few types.

    Floats and bools become float32, scalars get shape (1,), other integers keep their type, and ids count from 0 even
    where their space starts elsewhere. Lists, and integers of another type, are converted if nothing is lost. Bools
    become floats, not uint8, so that a grid of bools is never taken for an image. (NaN is found when a step is stored.)

    Errors: TaskError that names the observation, what was found and what its space says.
    """

    def __init__(self, env, name: str = "environment"):
        super().__init__(env)
        self._name = name
        for key, space in self.obs_space.items():
            if not math.prod(space.shape):
                raise TaskError(f"{name}: observation '{key}' has the shape {list(space.shape)}: it holds nothing.")
        self._given = {key: _Given.of(space) for key, space in self.obs_space.items()}
        self.obs_space = {key: self._space(space) for key, space in self.obs_space.items()}

    def reset(self):
        return self._convert(self.env.reset())

    def step(self, action):
        return self._convert(self.env.step(action))

    @staticmethod
    def _space(space):
        if isinstance(space, spaces.Discrete):
            return spaces.Discrete(int(space.n))
        if isinstance(space, spaces.MultiDiscrete):
            return spaces.MultiDiscrete(np.asarray(space.nvec))
        if isinstance(space, spaces.MultiBinary):
            return spaces.Box(0, 1, space.shape or (1,), np.float32)
        if not isinstance(space, spaces.Box) or (space.dtype.kind not in "fb" and space.shape):
            return space
        shape = space.shape or (1,)
        dtype = np.float32 if space.dtype.kind in "fb" else space.dtype
        with np.errstate(over="ignore"):  # the largest float64 becomes inf, which is what it means
            low, high = (np.broadcast_to(np.asarray(x, dtype), shape) for x in (space.low, space.high))
        return spaces.Box(low, high, shape, dtype)

    def _convert(self, step):
        step = dict(step)
        for key, given in self._given.items():
            value = step.get(key)
            if value is not None:
                step[key] = self._value(key, value, given)
        return step

    def _value(self, key, value, given):
        try:
            value = np.asarray(value)
        except ValueError:  # a ragged list
            raise self._disagree(key, type(value).__name__, "of parts that differ in shape", given) from None
        if value.shape != given.shape:
            if given.shape not in ((), (1,)) or value.shape not in ((), (1,)):
                raise self._disagree(key, value.dtype, list(value.shape), given)
            value = value.reshape(given.shape)
        if value.dtype.kind not in given.kinds:
            raise self._disagree(key, value.dtype, list(value.shape), given)
        if given.bounded or (given.range and value.dtype != given.dtype):
            self._check_range(key, value, *given.range)
        if given.start is not None:
            value = value - given.start
        with np.errstate(over="ignore"):
            value = value.astype(given.kept, copy=False)
        return value if value.shape or given.is_id else value.reshape(1)

    def _check_range(self, key, value, low, high):
        outside = (value < low) | (value > high)
        if outside.any():
            limits = [np.broadcast_to(x, value.shape)[outside][0] for x in (low, high)]
            raise TaskError(
                f"{self._name}: '{key}' holds {value[outside][0]}, but its space says {limits[0]} to {limits[1]}."
            )

    def _disagree(self, key, kind, shape, given):
        return TaskError(
            f"{self._name}: observation '{key}' is {kind} {shape}, but its space says {given.dtype} "
            f"{list(given.shape)}: make the space and the values agree."
        )


class _Given(NamedTuple):
    """How the environment's values of one space look, and what becomes of them."""

    shape: tuple
    dtype: np.dtype
    kinds: str  # of types that are taken, as `dtype.kind`
    kept: np.dtype  # the type that they get
    range: tuple | None = None  # lowest and highest; None: any
    bounded: bool = True  # False: values of the right type are all within the range
    start: np.ndarray | None = None  # the first id, where that is not 0
    is_id: bool = False

    @classmethod
    def of(cls, space):
        shape, dtype, float32 = tuple(space.shape), np.dtype(space.dtype), np.dtype(np.float32)
        if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
            count = space.n if isinstance(space, spaces.Discrete) else space.nvec
            start = np.asarray(getattr(space, "start", 0))
            limits = (start, start + count - 1)
            return cls(shape, dtype, "iub", dtype, limits, start=start if start.any() else None, is_id=True)
        if isinstance(space, spaces.MultiBinary) or dtype.kind == "b":
            return cls(shape, dtype, "fiub", float32, (0, 1))
        if dtype.kind == "f":
            return cls(shape, dtype, "fiub", float32, bounded=False)
        most = np.iinfo(dtype)
        limits = (space.low.min(), space.high.max())  # the world model has as many rows as the highest id of all says
        bounded = limits[0] > most.min or limits[1] < most.max
        return cls(shape, dtype, "iub", dtype, limits, bounded)


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


class Frames(Wrapper):
    """Frames (see `is_image`) of any size as uint8 [*size, channels] of 0 to 255.

    - Channels that come first are moved to the end, where the first axis is plainly theirs (see `channels_first`).
    - A space that ends below 255 is stretched to it if it holds a picture, or becomes categories if it holds a small
      grid of ids (at most `IDS` numbers as one-hot vectors).
    - Frames of another size are resized by area averaging (OpenCV's INTER_AREA).

    `notes` says in one line each what was decided by looks.
    """

    def __init__(self, env, size: tuple[int, int], name: str = "environment"):
        super().__init__(env)
        self._size = tuple(int(x) for x in size)
        self._steps = {}  # key -> what is done to its frames, in turn
        self._shown = None  # the latest frame in colour
        self.notes = [*getattr(env, "notes", [])]
        for key, space in self.obs_space.items():
            if is_image(space):
                self._prepare(key, space, f"{name}: observation '{key}', {_described(space)},")
        self._coloured = [key for key, space in self.obs_space.items() if is_image(space) and space.shape[2:] == (3,)]
        looks = (_looks_like_frames(name, key, space) for key, space in self.obs_space.items())
        self.notes += [note for note in looks if note]

    def _prepare(self, key, space, subject):
        low, high = int(space.low.min()), int(space.high.max())
        if high < 255 and space.low.size * (high + 1) <= IDS:
            self.obs_space[key] = spaces.MultiDiscrete(np.full(space.shape, high + 1))
            self.notes.append(f"{subject} is taken as a grid of ids. Give it the bounds 0 and 255 if it is a frame.")
            self._steps[key] = [lambda value: value.astype(np.int64)]
            return
        steps, shape = [], space.shape if len(space.shape) == 3 else (*space.shape, 1)
        if channels_first(space.shape):
            shape = (*shape[1:], shape[0])
            steps.append(lambda value: np.moveaxis(value, 0, -1))
        elif len(space.shape) == 3 and not shape[2] < min(shape[:2]):
            self.notes.append(f"{subject} is taken as [height, width, channels]. Move its channels to the end if not.")
        if high < 255 and high > low:
            steps.append(lambda value: ((value.astype(np.uint16) - low) * 255 // (high - low)).astype(np.uint8))
            self.notes.append(f"{subject} is taken as a frame and stretched to 0 to 255.")
        if len(space.shape) == 2 or shape[:2] != self._size:
            steps.append(lambda value: resize(value, self._size))
        if steps:
            self._steps[key] = steps
            self.obs_space[key] = spaces.Box(0, 255, (*self._size, shape[2]), np.uint8)

    def reset(self):
        return self._convert(self.env.reset())

    def step(self, action):
        return self._convert(self.env.step(action))

    def _convert(self, step):
        for key, steps in self._steps.items():
            value = step.get(key)
            if value is not None:
                for change in steps:
                    value = change(value)
                step = {**step, key: value}
        self._shown = next((step[key] for key in self._coloured if step.get(key) is not None), None)
        return step

    def render(self):
        """What the environment renders, or else what it shows."""
        frame = super().render()
        return self._shown if frame is None else frame


def channels_first(shape: tuple[int, ...]) -> bool:
    """Whether the first of three axes is plainly the channels': the shortest by far of a picture, or 1, 3 or 4."""
    if len(shape) != 3 or shape[0] >= min(shape[1:]):
        return False
    picture = min(shape[1:]) >= 16 and 2 * shape[0] <= min(shape[1:])
    return picture or (shape[0] in (1, 3, 4) and shape[2] > 4)


def _described(space):
    return f"{space.dtype} {list(space.shape)} from {space.low.min()} to {space.high.max()}"


def _looks_like_frames(name, key, space):
    """One line on an array that the networks read as a vector, though it has the shape of frames; or None."""
    if not isinstance(space, spaces.Box) or len(space.shape) < 3 or math.prod(space.shape) < 1000 or is_image(space):
        return None
    frames = len(space.shape) == 3 and min(space.shape[0], space.shape[-1]) <= 16
    stacked = len(space.shape) == 4 and space.shape[-1] <= 4
    if not frames and not stacked:
        return None
    how = "move the stack into the channels" if stacked else "make it uint8, 0 to 255"
    return (
        f"{name}: observation '{key}', {space.dtype} {list(space.shape)}, is read as a vector of "
        f"{math.prod(space.shape):,} numbers. If it holds frames, {how} in a wrapper."
    )


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """image [H, W] or [H, W, C] of any dtype that OpenCV knows -> [*size, C] of the same dtype."""
    import cv2

    cv2.setNumThreads(0)  # many environments run side by side: OpenCV's own threads would only get in their way
    image = np.ascontiguousarray(image)
    image = image if image.ndim == 3 else image[..., None]
    if image.shape[:2] == tuple(size):
        return image
    whole = (size[1], size[0])
    fours = [image[..., n : n + 4] for n in range(0, image.shape[2], 4)]  # OpenCV knows no more channels than that
    parts = [cv2.resize(np.ascontiguousarray(part), whole, interpolation=cv2.INTER_AREA) for part in fours]
    parts = [part.reshape(*size, -1) for part in parts]  # it drops a single channel
    return parts[0] if len(parts) == 1 else np.concatenate(parts, -1)


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
    """Discrete(n): takes a one-hot vector [n] (the largest entry counts), or an index from 0; the environment gets the
    action that its space means, which may start elsewhere.
    """

    def __init__(self, env):
        super().__init__(env)
        self._start = int(getattr(env.act_space, "start", 0))
        self.act_space = spaces.Discrete(int(env.act_space.n))

    def step(self, action):
        return self.env.step(self._start + _index(np.asarray(action), int(self.act_space.n)))


class MultiOneHotAction(Wrapper):
    """MultiDiscrete([n1, n2, ...]): takes the concatenated one-hots [n1 + n2 + ...], or a vector of indices from 0."""

    def __init__(self, env):
        super().__init__(env)
        self._start = np.asarray(getattr(env.act_space, "start", 0))
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
        return self.env.step(np.array(indices, np.int64).reshape(self._shape) + self._start)


def _index(action: np.ndarray, n: int) -> int:
    if action.shape == (n,):
        return int(action.argmax())
    if action.size == 1 and (action.dtype.kind in "iu" or action.ndim == 0):
        index = int(action.reshape(()))
        if 0 <= index < n:
            return index
        raise ValueError(f"Action {index} is out of range, expected 0 to {n - 1}.")
    raise ValueError(f"Action has shape {action.shape}, expected a one-hot vector ({n},) or an integer index.")


class CheckSteps(Wrapper):
    """Compares names with the spaces', and brings reward and flags to numpy types. (Values: `CheckTypes`.)"""

    def __init__(self, env, name: str = "environment"):
        super().__init__(env)
        self._name = name
        if not self.obs_space:
            raise TaskError(f"{name}: the observation space is empty; the agent needs at least one observation.")
        for key in self.obs_space:
            if key in RESERVED or key.startswith("log_"):
                raise TaskError(f"{name}: an observation cannot be named '{key}' (used by the replay): rename it.")

    def reset(self):
        return self._check(self.env.reset())

    def step(self, action):
        return self._check(self.env.step(action))

    def _check(self, step):
        missing = [key for key in ("reward", *FLAGS) if key not in step]
        if missing:
            raise TaskError(f"{self._name}: the step lacks {', '.join(missing)}; it has {', '.join(step)}.")
        for key in step:
            if key not in self.obs_space and key not in ("reward", *FLAGS) and not key.startswith("log_"):
                raise TaskError(
                    f"{self._name}: observation '{key}' has no space (spaces: {', '.join(self.obs_space)}): add one, "
                    f"or name it 'log_{key}' to log it only."
                )
        return {**step, "reward": np.float32(step["reward"]), **{key: np.bool_(step[key]) for key in FLAGS}}
