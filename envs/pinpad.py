"""Pads that have to be stepped on in the right order: `pinpad_three` to `pinpad_six`, after PinPad of Director (Hafner
et al. 2022, arXiv 2206.04114), small enough for a CPU.

The agent starts anywhere in a room, whose pads lie in its corners, then in the middle of two of its sides. It observes
where it stands and which pads it has stepped on last. Once these are all of them in their order, that is worth 1, and
they are forgotten, so that it can do so again until the episode's end. Any other order is worth nothing.
"""

import numpy as np
from gymnasium import spaces

from .grid import MOVES
from .wrappers import Env, TaskError, transition

COUNTS = {"three": 3, "four": 4, "five": 5, "six": 6}
PLACES = ((0, 0), (1, 1), (0, 1), (1, 0), (0, 0.5), (1, 0.5))  # of pads in their order, in sides of the room
SIDE = 2  # cells of a pad


def load(config, mode: str, name: str, seed: int) -> Env:
    """config: pinpad.{size, steps}."""
    if name not in COUNTS:
        raise TaskError(f"pinpad_{name}: unknown; a task is pinpad_ and one of {', '.join(COUNTS)}.")
    return PinPad(COUNTS[name], seed, **config.pinpad)


class PinPad(Env):
    """Observes `position` (row and column) and `pads` (the last ones, the latest at the end, 0 for none yet), as
    categories. Actions: stay, and one step in one of four directions. `log_success`: whether it was solved so far.

    Args:
        pads: their number.
        size: cells a side of the room.
        steps: of an episode.
    """

    def __init__(self, pads: int, seed: int = 0, size: int = 8, steps: int = 100):
        self._count, self._size, self._steps = pads, size, steps
        self._rng = np.random.default_rng(seed)
        self._pads = np.zeros((size, size), int)
        for number, place in enumerate(PLACES[:pads], start=1):
            row, column = (round(x * (size - SIDE)) for x in place)
            self._pads[row : row + SIDE, column : column + SIDE] = number
        self.obs_space = {
            "position": spaces.MultiDiscrete([size, size]),
            "pads": spaces.MultiDiscrete([pads + 1] * pads),
        }
        self.act_space = spaces.Discrete(len(MOVES))

    def reset(self):
        floor = np.argwhere(self._pads == 0)
        self._at = tuple(int(x) for x in floor[self._rng.integers(len(floor))])
        self._last, self._time, self._solved = [0] * self._count, 0, 0
        return transition(self._observe(), first=True)

    def step(self, action):
        row, column = (x + move for x, move in zip(self._at, MOVES[int(action)], strict=True))
        self._at = min(max(row, 0), self._size - 1), min(max(column, 0), self._size - 1)
        self._time += 1
        pad = int(self._pads[self._at])
        if pad and pad != self._last[-1]:
            self._last = [*self._last[1:], pad]
        won = self._last == list(range(1, self._count + 1))
        if won:
            self._last, self._solved = [0] * self._count, self._solved + 1
        return transition(self._observe(), float(won), last=self._time >= self._steps)

    def render(self):
        """uint8 [16 size, 16 size, 3]: pads in colours, darker once they are among the last, the agent black."""
        colours = np.array([[245] * 3, [220, 60, 60], [60, 160, 60], [60, 90, 220], [220, 180, 40], [160, 60, 200]])
        colours = np.vstack([colours, [[60, 180, 190]]])
        colours[[pad for pad in self._last if pad]] //= 2
        room = colours[self._pads]
        room[self._at] = 0
        return room.astype(np.uint8).repeat(16, 0).repeat(16, 1)

    def _observe(self):
        obs = {"position": np.array(self._at), "pads": np.array(self._last)}
        return obs | {"log_success": np.float32(self._solved > 0)}
