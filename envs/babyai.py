"""BabyAI (Chevalier-Boisvert et al. 2019) and other tasks of minigrid, by the end of their ids: `babyai_GoToLocal-v0`.

The agent sees what lies before it, as an image or as a grid, and reads its mission. `babyai_GoToLocal-v0/blank` blanks
the mission, to tell what reading it is worth.
"""

import difflib

import numpy as np
from gymnasium import spaces

from .wrappers import Env, TaskError, transition

VOCABULARY = (
    "go to the a an pick up open put next and then after you on your left right in front of behind door ball box key "
    "red green blue purple yellow grey object near , use fetch get traverse rooms goal square matching color end "
    "avoid lava find opening must reach from room unlock at hallway"
).split()
OBSERVABLE = ("image", "grid")
KINDS = (11, 6, 4)  # of objects, colours and states (of a door: open, closed, locked; of the agent: where it looks)
AGENT = 10  # among objects
MOVES = 3  # the first actions: turn left, turn right, go forward
TILE = 16  # pixels of a tile, before the image is resized


def load(config, mode: str, name: str, seed: int) -> Env:
    """config: babyai.{observe, view, actions, strict}."""
    observe, view, actions, strict = (config.babyai[key] for key in ("observe", "view", "actions", "strict"))
    if not observe or not set(observe) <= set(OBSERVABLE):
        raise TaskError(f"babyai.observe is {list(observe)}, expected some of {', '.join(OBSERVABLE)}.")
    if view and (view < 3 or view % 2 == 0):
        raise TaskError(
            f"babyai.view is {view}, expected an odd number of tiles, at least 3, or 0 for the whole level."
        )
    try:
        import gymnasium
        import minigrid  # registers its environments
        from minigrid.envs.babyai.core import roomgrid_level
    except ModuleNotFoundError as error:
        raise TaskError("minigrid is not installed: pip install -r requirements/babyai.txt") from error
    gymnasium.register_envs(minigrid)
    roomgrid_level.print = lambda *_: None  # it tells of every room that it has to draw again
    name, _, blank = name.partition("/")
    if blank not in ("", "blank"):
        raise TaskError(f"babyai_{name}/{blank}: only /blank may follow a name.")
    ids = [key for key in gymnasium.registry if key.startswith(("BabyAI-", "MiniGrid-"))]
    found = next((key for key in (f"BabyAI-{name}", f"MiniGrid-{name}") if key in ids), None)
    if found is None:
        short = {key.partition("-")[2] for key in ids}
        close = difflib.get_close_matches(name, short, n=1)
        raise TaskError(f"babyai_{name}: unknown{f'; did you mean babyai_{close[0]}?' if close else ''}")
    env = gymnasium.make(found, render_mode="rgb_array", disable_env_checker=True)
    if strict and "GoTo" not in name:
        raise TaskError(f"babyai.strict is for levels whose mission is to go somewhere, not for babyai_{name}.")
    return BabyAI(env, seed, observe, view, actions == "moves", bool(blank), strict)


class BabyAI(Env):
    """Observes `mission`, text, and some of `OBSERVABLE`: `image`, uint8 [H, W, 3], and `grid`, the same view without
    pixels [view, view, 21]: one-hots of each tile's object, colour and state. With a `view` of 0 both are of the whole
    level from above, the agent in it. `strict` ends an episode, without reward, before the first object that is not the
    one to go to: BabyAI itself lets one try them all.

    `log_success`: 1 at the step that ends it well.
    """

    vocabulary = VOCABULARY

    def __init__(self, env, seed, observe=("image",), view=7, moves=False, blank=False, strict=False):
        self._env, self._seed, self._blank, self._strict = env, seed, blank, strict
        core = env.unwrapped
        core.agent_view_size, self._whole = view or core.agent_view_size, not view
        rows, columns = (view, view) if view else (core.height, core.width)
        every = {
            "image": spaces.Box(0, 255, (TILE * rows, TILE * columns, 3), np.uint8),
            "grid": spaces.Box(0, 1, (columns, rows, sum(KINDS)), np.float32),
        }
        self.obs_space = {key: every[key] for key in observe} | {"mission": spaces.Text(256)}
        self.act_space = spaces.Discrete(MOVES if moves else int(env.action_space.n))

    def reset(self):
        obs, _ = self._env.reset(seed=self._seed)
        self._seed = None  # only the first time: later episodes go on from there
        return transition({**self._observe(obs), "log_success": np.float32(0)}, first=True)

    def step(self, action):
        obs, reward, terminated, truncated, _ = self._env.step(int(action))
        if self._strict and not terminated:
            terminated = self._before_an_object()
        obs = {**self._observe(obs), "log_success": np.float32(reward > 0)}
        return transition(obs, reward, last=terminated or truncated, terminal=terminated)

    def render(self):
        return self._env.unwrapped.render()

    def close(self):
        self._env.close()

    def _before_an_object(self):
        ahead = self._env.unwrapped.grid.get(*self._env.unwrapped.front_pos)
        return ahead is not None and ahead.type in ("key", "ball", "box")

    def _observe(self, obs):
        out, core = {"mission": "" if self._blank else str(obs["mission"])}, self._env.unwrapped
        if "image" in self.obs_space:
            out["image"] = core.get_frame(highlight=False, tile_size=TILE, agent_pov=not self._whole)
        if "grid" in self.obs_space:
            codes = obs["image"]
            if self._whole:
                codes = core.grid.encode()
                codes[tuple(core.agent_pos)] = AGENT, 0, core.agent_dir
            out["grid"] = np.concatenate([np.eye(n, dtype=np.float32)[codes[..., i]] for i, n in enumerate(KINDS)], -1)
        return out
