"""Grids with one distant reward, for exploration: `grid_halls`, five halls one behind the other; `grid_rooms`, nine
rooms; `grid_open`, without walls; and `grid_tv`, rooms with a screen in the first that shows noise.

The agent starts in one corner, knows where it stands and feels the walls next to it. The far corner is worth 1 and ends
the episode.
"""

import numpy as np
from gymnasium import spaces

from .wrappers import Env, TaskError, transition

MOVES = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))  # stay, and the four headings
GAP = 6  # cells, of the walls between halls
CHANNELS = 16  # of the screen


def load(config, mode: str, name: str, seed: int) -> Env:
    """config: grid.{size, steps}."""
    if name not in ("halls", "rooms", "open", "tv"):
        raise TaskError(f"grid_{name}: unknown; a task is grid_halls, grid_rooms, grid_open or grid_tv.")
    size = config.grid["size"]
    free = free_cells(size, "rooms" if name == "tv" else name)
    if not free[-1, -1]:
        raise TaskError(f"grid.size {size} puts a wall where the reward is: expected another one, such as {size + 1}.")
    return GridWorld(free, seed, screen=name == "tv", steps=config.grid["steps"])


def free_cells(size: int, layout: str) -> np.ndarray:
    """Where one can stand, bool [size, size].

    layout: open; rooms, with walls after every 6 cells and one door per room and wall; or halls, with a wall after
        every 3 rows and a gap of `GAP` cells, at one end and the other in turn.
    """
    free = np.ones((size, size), bool)
    if layout == "halls":
        for number, wall in enumerate(range(3, size - 1, 4)):
            free[wall] = False
            free[wall, slice(0, GAP) if number % 2 else slice(size - GAP, size)] = True
    if layout == "rooms":
        room = 6
        walls = range(room, size, room + 1)
        for wall in walls:
            free[wall, :] = free[:, wall] = False
        for number, wall in enumerate(walls):
            for first in range(0, size, room + 1):
                width = min(room, size - first)
                door = first + (width // 2 + 2 * number + first // (room + 1)) % width
                free[wall, door] = free[door, wall] = True
    return free


class GridWorld(Env):
    """Observes `position` (row and column, as categories), `walls` (for each of the four headings, 1 if a wall or the
    edge is next) and, with `screen`, also `screen`: noise of `CHANNELS` values in the room of the start, 0 elsewhere.
    Actions: stay, and one step in one of four directions.

    Args:
        free: where one can stand, bool [size, size]; the start is (0, 0), the reward in the opposite corner.
        steps: of an episode.

    `log_coverage`: share of the free cells that were visited since it was made; `log_visited`: their number;
    `log_first_reward`: steps until the first reward, NaN before it.
    """

    def __init__(self, free: np.ndarray, seed: int = 0, screen: bool = False, steps: int = 200):
        self._free, self._screen, self._steps = free, screen, steps
        self._rng = np.random.default_rng(seed)
        self.visits = np.zeros(free.shape, int)
        self._total, self._found = 0, np.nan
        self.obs_space = {"position": spaces.MultiDiscrete(free.shape)}
        self.obs_space["walls"] = spaces.MultiDiscrete([2] * len(MOVES[1:]))
        if screen:
            self.obs_space["screen"] = spaces.Discrete(CHANNELS)
        self.act_space = spaces.Discrete(len(MOVES))

    def reset(self):
        self._at, self._time = (0, 0), 0
        self.visits[self._at] += 1
        return transition(self._observe(), first=True)

    def step(self, action):
        self._at = self.after(self._at, int(action))
        self._time += 1
        self._total += 1
        self.visits[self._at] += 1
        won = self._at == tuple(n - 1 for n in self._free.shape)
        if won and np.isnan(self._found):
            self._found = self._total
        return transition(self._observe(), float(won), last=won or self._time >= self._steps, terminal=won)

    def after(self, cell: tuple[int, int], action: int) -> tuple[int, int]:
        """Where an action leads to."""
        to = cell[0] + MOVES[action][0], cell[1] + MOVES[action][1]
        inside = all(0 <= x < n for x, n in zip(to, self._free.shape, strict=True))
        return to if inside and self._free[to] else cell

    def render(self):
        """uint8 [16 size, 16 size, 3]: walls black, the agent blue, the reward green, visited cells darker."""
        grid = np.where(self._free[..., None], np.where((self.visits > 0)[..., None], 200, 245), 0).repeat(3, -1)
        grid[-1, -1], grid[self._at] = (60, 180, 75), (50, 90, 220)
        return grid.astype(np.uint8).repeat(16, 0).repeat(16, 1)

    def _observe(self):
        obs = {"position": np.array(self._at), "log_visited": np.float32((self.visits > 0).sum())}
        obs |= {"log_coverage": np.float32((self.visits > 0).sum() / self._free.sum())}
        obs |= {"log_first_reward": np.float32(self._found)}
        obs["walls"] = np.array([self.after(self._at, heading) == self._at for heading in range(1, len(MOVES))], int)
        if self._screen:
            near = max(self._at) < 6
            obs["screen"] = np.int64(self._rng.integers(1, CHANNELS)) if near else np.int64(0)
        return obs
