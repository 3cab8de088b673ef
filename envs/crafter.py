"""Crafter: `crafter_reward`, and `crafter_noreward` (always 0, for exploration without a task)."""

import numpy as np
from gymnasium import spaces

from .wrappers import Env, TaskError, transition

FRAMES = 10_000  # Crafter's own time limit


def load(config, mode: str, name: str, seed: int) -> Env:
    """config: image_size, time_limit (0: Crafter's own 10,000 steps)."""
    if name not in ("reward", "noreward"):
        raise TaskError(f"crafter_{name}: unknown task; did you mean crafter_reward or crafter_noreward?")
    try:
        import crafter
    except ModuleNotFoundError as error:
        raise TaskError("Crafter is not installed: pip install -r requirements/crafter.txt") from error

    class Ordered(crafter.Env):
        """Crafter picks creatures from sets, whose order depends on memory addresses: sort them, so that a seed
        gives the same world in every process."""

        def _balance_chunk(self, chunk, objs):
            super()._balance_chunk(chunk, sorted(objs, key=lambda obj: tuple(obj.pos)))

    height, width = config.image_size
    # No length: the TimeLimit wrapper counts, so that a time limit is no termination.
    return CrafterEnv(Ordered(size=(width, height), reward=name == "reward", length=None, seed=seed), (height, width))


class CrafterEnv(Env):
    """Observes `image`, uint8 [H, W, 3]. Each step logs how often each achievement was unlocked in this episode, as
    `log_achievement_<name>`."""

    time_limit = FRAMES

    def __init__(self, env, size):
        import crafter

        self._env = env
        self._names = crafter.constants.achievements
        self.obs_space = {"image": spaces.Box(0, 255, (*size, 3), np.uint8)}
        self.act_space = spaces.Discrete(env.action_space.n)

    def reset(self):
        return transition(self._observe(self._env.reset(), {}), first=True)

    def step(self, action):
        image, reward, done, info = self._env.step(action)
        # Without a length only death ends an episode.
        return transition(self._observe(image, info["achievements"]), reward, last=done, terminal=done)

    def render(self):
        return np.ascontiguousarray(self._env.render((256, 256)))

    def _observe(self, image, counts):
        logs = {f"log_achievement_{name}": np.float32(counts.get(name, 0)) for name in self._names}
        return {"image": np.ascontiguousarray(image), **logs}
