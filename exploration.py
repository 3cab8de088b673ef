"""Exploration: how actions are chosen other than by the task policy.

`Random` acts uniformly: it fills the replay before the first update (`prefill`) and is `expl_behavior: random`.
Intrinsic rewards and the explorers built on them belong in this room too.
"""

import json

import numpy as np
from gymnasium import spaces

from errors import UserError


class Random:
    """Uniform actions in the form that environments take: float32 vectors `[A]`.

    act_space: Box (uniform in [-1, 1]; the environment's wrapper rescales), Discrete (a one-hot), or MultiDiscrete
        (one-hots side by side, one per entry). Any other space is a UserError.
    seed: of this policy's own numpy Generator, or such a Generator to draw from.
    """

    def __init__(self, act_space: spaces.Space, seed: int | np.random.Generator = 0):
        self.generator = np.random.default_rng(seed)
        match act_space:
            case spaces.Box():
                self.sizes, self.size = None, int(np.prod(act_space.shape))
            case spaces.Discrete():
                self.sizes = [int(act_space.n)]
            case spaces.MultiDiscrete():
                self.sizes = [int(n) for n in act_space.nvec.flatten()]
            case _:
                raise UserError(
                    f"Found the action space {act_space}, expected Box, Discrete or MultiDiscrete; "
                    "convert it in a wrapper of the environment."
                )
        if self.sizes is not None:
            self.size = sum(self.sizes)

    def policy(self, num: int) -> np.ndarray:
        """Actions for `num` environments: float32 `[num, A]`."""
        if self.sizes is None:
            return self.generator.uniform(-1, 1, (num, self.size)).astype(np.float32)
        one_hots = [np.eye(n, dtype=np.float32)[self.generator.integers(n, size=num)] for n in self.sizes]
        return np.concatenate(one_hots, axis=1)

    def state(self) -> str:
        """The generator's state as JSON, for a checkpoint."""
        return json.dumps(self.generator.bit_generator.state, default=np.ndarray.tolist)

    def load_state(self, state: str) -> None:
        """Continue exactly where `state()` was taken."""
        self.generator.bit_generator.state = json.loads(state)
