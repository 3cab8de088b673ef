"""A world in which one thing has to be noticed: a cue that tells which action is right, in chosen modalities only.

`cue_audio` has it in a tone's pitch, `cue_text` in a word, `cue_image` in a colour, `cue_vector` in a number;
`cue_audio_image` in both, `cue_all` in all four. Everywhere else there is noise, or a blank.

An episode: at step 0 the cue, `cue.delay` blank steps, at the last of which the action counts, and a step that reveals
in every modality what was right. A right action is worth 1, `log_success` tells.
"""

import numpy as np
from gymnasium import spaces

from .wrappers import Env, TaskError, transition

KINDS = ("image", "audio", "text", "vector")
COLOURS = np.array([[220, 40, 40], [40, 180, 60], [50, 80, 220], [230, 200, 40]], np.float64)
GREY = 110  # of what is behind a colour
WORDS = ("north", "east", "south", "west")
PITCHES = (400, 800, 1600, 3200)  # Hz
RATE = 16_000  # samples per second


def load(config, mode: str, name: str, seed: int) -> Env:
    """config: image_size, cue.{delay, samples, missing, absent}."""
    kinds = KINDS if name == "all" else tuple(name.split("_"))
    if not set(kinds) <= set(KINDS):
        raise TaskError(f"cue_{name}: unknown; a task is cue_all, or cue_ and some of {', '.join(KINDS)}.")
    if not set(config.cue.get("absent", ())) <= set(KINDS):
        raise TaskError(f"cue.absent is {list(config.cue['absent'])}, expected some of {', '.join(KINDS)}.")
    return CueWorld(kinds, config.image_size, seed, **config.cue)


class CueWorld(Env):
    """Observes `image`, `audio` (a waveform of one channel), `text` and `vector`.

    Args:
        kinds: modalities that have the cue.
        delay: steps from the cue to the action that counts, at least 0.
        samples: of the waveform, each step.
        missing: probability that a modality is not there, for each modality and step.
        absent: modalities that are never there.
    """

    vocabulary = WORDS
    classes = len(WORDS)

    def __init__(
        self,
        kinds,
        size=(64, 64),
        seed: int = 0,
        delay: int = 1,
        samples: int = 400,
        missing: float = 0.0,
        absent=(),
    ):
        self._kinds, self._size, self._delay = kinds, tuple(size), delay
        self._samples, self._missing, self._absent = samples, missing, frozenset(absent)
        self._rng = np.random.default_rng(seed)
        self.obs_space = {
            "image": spaces.Box(0, 255, (*self._size, 3), np.uint8),
            "audio": spaces.Box(-1, 1, (1, samples), np.float32),
            "text": spaces.Text(16),
            "vector": spaces.Box(-1, 1, (2,), np.float32),
        }
        self.act_space = spaces.Discrete(self.classes)

    def reset(self):
        self._class, self._time = int(self._rng.integers(self.classes)), 0
        return transition({**self._observe(self._kinds), "log_success": np.float32(0)}, first=True)

    def step(self, action):
        self._time += 1
        if self._time <= self._delay:
            return transition({**self._observe(()), "log_success": np.float32(0)})
        right = float(action == self._class)
        return transition({**self._observe(KINDS), "log_success": np.float32(right)}, right, last=True, terminal=True)

    def render(self):
        return self._image(True)

    def _observe(self, kinds) -> dict:
        """All modalities, with the cue in some; those that are missing at this step left out."""
        obs = {kind: getattr(self, f"_{kind}")(kind in kinds) for kind in KINDS}
        if self._missing:
            obs = {kind: value for kind, value in obs.items() if self._rng.random() >= self._missing}
        return {kind: value for kind, value in obs.items() if kind not in self._absent}

    def _image(self, cue: bool):
        """A coloured square on grey noise, somewhere."""
        height, width = self._size
        image = self._rng.normal(GREY, 12, (height, width, 3))
        if cue:
            side = height // 2
            top, left = self._rng.integers(0, height - side + 1), self._rng.integers(0, width - side + 1)
            image[top : top + side, left : left + side] = COLOURS[self._class]
        return image.clip(0, 255).astype(np.uint8)

    def _audio(self, cue: bool):
        """A tone of any phase in noise."""
        wave = self._rng.normal(0, 0.02, self._samples)
        if cue:
            phase = self._rng.uniform(0, 2 * np.pi)
            wave += 0.3 * np.sin(2 * np.pi * PITCHES[self._class] * np.arange(self._samples) / RATE + phase)
        return wave.clip(-1, 1).astype(np.float32)[None]

    def _text(self, cue: bool):
        return WORDS[self._class] if cue else ""

    def _vector(self, cue: bool):
        """Is there a cue, and which."""
        noise = self._rng.normal(0, 0.02, 2)
        value = [1.0, 2 * self._class / (self.classes - 1) - 1] if cue else [0.0, 0.0]
        return (value + noise).clip(-1, 1).astype(np.float32)
