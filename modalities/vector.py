"""Vectors: joint positions, measurements, discrete readings.

Numbers are squashed by symlog and discrete entries turned into one-hot vectors, all joined into one MLP. The decoder
predicts every key: numbers by the squared error in symlog space, discrete entries by a categorical.
"""

import numpy as np
import torch
from gymnasium import spaces as gs
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from distributions import Joint, Normal, OneHot, SquaredError, one_hot, symlog
from layers import MLP, Linear

from . import image

TAKEN = frozenset(dir(nn.ModuleDict()))  # names that a module cannot have inside of a ModuleDict


def recognises(space: gs.Space) -> bool:
    """Discrete spaces, and boxes of any shape that are not images."""
    if isinstance(space, (gs.Discrete, gs.MultiDiscrete)):
        return True
    return isinstance(space, gs.Box) and not image.recognises(space)


def classes(space: gs.Space) -> list[int]:
    """Sizes of a discrete space's categoricals; empty for a box."""
    if isinstance(space, gs.Discrete):
        return [int(space.n)]
    if isinstance(space, gs.MultiDiscrete):
        return [int(n) for n in space.nvec.flatten()]
    return []


def width(space: gs.Space) -> int:
    """Numbers that an observation of this space takes as a vector."""
    return sum(classes(space)) or int(np.prod(space.shape))


def show(
    decoder: nn.Module,
    key: str,
    truth: Float[np.ndarray, "b t n"],
    predicted: Float[np.ndarray, "b t n"],
    context: int,
    most: int = 16,
) -> dict[str, tuple[str, object]]:
    """A plot of the first window: truth in black, the model in the colours of `image.open_loop_video`; a panel per
    number, the first `most` of them.
    """
    truth, predicted = truth[0, :, :most], predicted[0, :, :most]
    panels = [image.plot(one, two, context) for one, two in zip(truth.T, predicted.T, strict=True)]
    panels += [np.full_like(panels[0], 255)] * (-len(panels) % 4)
    rows = [np.concatenate(panels[n : n + 4], 1) for n in range(0, len(panels), 4)]
    return {"": ("image", np.concatenate(rows, 0))}


class AsVector:
    """Observations of a space as vectors: flattened after the leading axes; one-hot for discrete spaces, symlog for
    numbers if asked. The space is read once, here: what is compiled sees plain numbers.
    """

    def __init__(self, space: gs.Space, symlogged: bool):
        self.axes, self.sizes, self.symlogged = len(space.shape), classes(space), symlogged
        starts = np.asarray(getattr(space, "start", 0)).reshape(-1)
        self.starts = np.broadcast_to(starts, len(self.sizes)).tolist()

    def __call__(self, value: Shaped[Tensor, "..."]) -> Float[Tensor, "*b width"]:
        value = value.reshape(*value.shape[: value.ndim - self.axes], -1)
        if self.sizes:
            columns = zip(value.long().unbind(-1), self.starts, self.sizes, strict=True)
            return torch.cat([self._one_hot(index, start, n) for index, start, n in columns], -1)
        value = value if value.is_floating_point() else value.float()
        return symlog(value) if self.symlogged else value

    @staticmethod
    def _one_hot(index: Int[Tensor, "*b"], start: int, size: int) -> Float[Tensor, "*b size"]:
        index = index - start
        # An absent reading is stored as 0, which lies below a later start.
        return one_hot(index.clamp(min=0) if start > 0 else index, size, torch.float32)


class VectorEncoder(nn.Module):
    """All vector keys, joined in sorted order, through one MLP: {key: [*b, ...]} -> [*b, units]."""

    def __init__(self, spaces: dict, *, units: int, layers: int, symlog: bool = True, act: str = "silu", **_):
        super().__init__()
        self.vectors = {key: AsVector(space, symlog) for key, space in spaces.items()}
        self.mlp = MLP(sum(width(space) for space in spaces.values()), units, layers, act)
        self.out_size = self.mlp.out_size

    def forward(self, obs: dict[str, Tensor], present: dict[str, Tensor]) -> Float[Tensor, "*b out"]:
        parts = []
        for key, as_vector in self.vectors.items():
            part = as_vector(obs[key])
            parts.append(part * present[key].unsqueeze(-1) if key in present else part)
        return self.mlp(
            torch.cat(parts, -1).to(self.mlp[0].linear.weight.dtype) if len(self.mlp) else torch.cat(parts, -1)
        )


class VectorDecoder(nn.Module):
    """One MLP on [deter, stoch], then an output layer per number key and per categorical of a discrete key."""

    def __init__(
        self,
        spaces: dict,
        deter: int,
        stoch: int,
        *,
        units: int,
        layers: int,
        vector_dist: str = "symlog_mse",
        outscale: float = 1.0,
        act: str = "silu",
        **_,
    ):
        super().__init__()
        self.discrete, self.dist = {key: bool(classes(space)) for key, space in spaces.items()}, vector_dist
        self.vectors = {key: AsVector(space, symlogged=False) for key, space in spaces.items()}
        self.mlp = MLP(deter + stoch, units, layers, act)
        self.out = nn.ModuleDict(
            {
                safe(key): nn.ModuleList(
                    Linear(self.mlp.out_size, n, outscale) for n in classes(space) or [width(space)]
                )
                for key, space in spaces.items()
            }
        )

    def forward(
        self, deter: Float[Tensor, "*b deter"], stoch: Float[Tensor, "*b stoch"]
    ) -> dict[str, Joint | Normal | SquaredError]:
        x = self.mlp(torch.cat([deter, stoch], -1))
        return {
            key: self._dist([layer(x) for layer in self.out[safe(key)]], discrete)
            for key, discrete in self.discrete.items()
        }

    def target(self, key: str, value: Tensor) -> Float[Tensor, "*b width"]:
        """What the distribution of `key` is scored on."""
        return self.vectors[key](value)

    def _dist(self, outs: list[Tensor], discrete: bool) -> Joint | Normal | SquaredError:
        if discrete:
            return Joint([OneHot(logits) for logits in outs])
        if self.dist == "normal":
            return Normal(outs[0])
        return SquaredError(outs[0], squash=self.dist == "symlog_mse")


def safe(key: str) -> str:
    """A module's name, another one for every key: it may hold no dot, and its parent no attribute of that name."""
    if "." in key or key in TAKEN or key.startswith("of_"):
        return "of_" + key.replace("_", "__").replace(".", "_dot_")
    return key
