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
KINDS = (11, 6, 3)  # of objects, colours and states (open, closed, locked)
MOVES = 3  # the first actions: turn left, turn right, go forward
TILE = 16  # pixels of a tile, before the image is resized


def load(config, mode: str, name: str, seed: int) -> Env:
    """config: babyai.{observe, view, actions, strict}."""
    observe, view, actions, strict = (config.babyai[key] for key in ("observe", "view", "actions", "strict"))
    if not observe or not set(observe) <= set(OBSERVABLE):
        raise TaskError(f"babyai.observe is {list(observe)}, expected some of {', '.join(OBSERVABLE)}.")
    if view < 3 or view % 2 == 0:
        raise TaskError(f"babyai.view is {view}, expected an odd number of tiles, at least 3.")
    try:
        import gymnasium
        import minigrid  # registers its environments
        from minigrid.envs.babyai.core import roomgrid_level
        from minigrid.envs.babyai.core.verifier import GoToInstr
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
    if strict:
        env.reset(seed=seed)
        goal = getattr(env.unwrapped, "instrs", None)
        if not isinstance(goal, GoToInstr) or goal.desc.type == "door":
            raise TaskError(f"babyai.strict is for levels whose mission is to go to one object, not for babyai_{name}.")
    return BabyAI(env, seed, observe, view, actions == "moves", bool(blank), strict)


class BabyAI(Env):
    """Observes `mission`, text, and some of `OBSERVABLE`: `image`, uint8 [H, W, 3], and `grid`, the same view without
    pixels: each tile's object, colour and state, categories [view, view, 3]. `strict` ends an episode, without reward,
    before the first object that is not the one to go to: BabyAI itself lets one try them all.

    `log_success`: 1 at the step that ends it well.
    """

    vocabulary = VOCABULARY

    def __init__(self, env, seed, observe=("image",), view=7, moves=False, blank=False, strict=False):
        self._env, self._seed, self._blank, self._strict = env, seed, blank, strict
        env.unwrapped.agent_view_size = view
        every = {
            "image": spaces.Box(0, 255, (TILE * view, TILE * view, 3), np.uint8),
            "grid": spaces.MultiDiscrete(np.broadcast_to(KINDS, (view, view, 3))),
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
        out = {"mission": "" if self._blank else str(obs["mission"])}
        if "image" in self.obs_space:
            out["image"] = self._env.unwrapped.get_frame(tile_size=TILE, agent_pov=True)
        if "grid" in self.obs_space:
            out["grid"] = obs["image"].astype(np.int64)
        return out
