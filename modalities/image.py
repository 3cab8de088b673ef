"""Images: uint8 [height, width, channels], of any size that can be halved once per stage.

Encoder: stages of (convolution, halving, norm, activation). Decoder: a start map from deter (block-linear over
channels) plus a net of stoch, then stages that double it. Several image keys are stacked along the channels.
"""

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from gymnasium import spaces as gs
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor, nn

from distributions import Normal, SquaredError, full_precision
from errors import UserError
from layers import ACTIVATIONS, BlockLinear, Conv, Dense, Linear, RMSNorm, in_pieces

# Frames that go through the convolutions together on a CPU: their maps fit its cache, their products fill its cores.
FRAMES = 16


def recognises(space: gs.Space) -> bool:
    """Boxes of uint8 with three axes."""
    return isinstance(space, gs.Box) and space.dtype == np.uint8 and len(space.shape) == 3


def open_loop_video(
    truth: Shaped[np.ndarray, "b t h w c"], predicted: Float[np.ndarray, "b t h w c"], context: int, edge: int = 2
) -> UInt8[np.ndarray, "t h2 w2 3"]:
    """A film of windows side by side; in each column truth, model and error (grey is none), one above the other.

    The frame around the model's picture is green while it is shown the truth (`context` steps), red while it imagines.
    """
    truth = truth.astype(np.float32) / 255
    rows = [truth, predicted.clip(0, 1), ((predicted - truth + 1) / 2).clip(0, 1)]
    seen = np.arange(truth.shape[1]) < context
    colour = np.where(seen[:, None], (0.1, 0.7, 0.2), (0.9, 0.2, 0.1))[None, :, None, None]
    framed = []
    for row, frame in zip(rows, (0.0, colour, 0.0), strict=True):
        batch, time, height, width, _ = row.shape
        picture = np.zeros((batch, time, height + 2 * edge, width + 2 * edge, 3), np.float32) + frame
        picture[:, :, edge:-edge, edge:-edge] = row.repeat(3, -1) if row.shape[-1] == 1 else row[..., :3]
        framed.append(picture)
    film = np.concatenate(framed, 2)
    return (np.concatenate(list(film), 2) * 255).round().astype(np.uint8)


def common_size(spaces: dict[str, gs.Space], stages: int) -> tuple[int, int]:
    """Height and width that all image keys share, or a UserError that says which sizes work."""
    sizes = {key: space.shape[:2] for key, space in spaces.items()}
    if len(set(sizes.values())) > 1:
        raise UserError(f"Images of different sizes cannot be stacked: {sizes}. Give them one size (image_size).")
    height, width = next(iter(sizes.values()))
    unit = 2**stages
    if height % unit or width % unit:
        near = [max(unit, unit * round(side / unit)) for side in (height, width)]
        raise UserError(
            f"An image of {height}x{width} cannot be halved {stages} times (mults has {stages} entries): "
            f"both sides must be multiples of {unit}. Nearest that works: --image_size {near[0]} {near[1]}"
        )
    return height, width


class ImageEncoder(nn.Module):
    """{key: uint8 [*b, H, W, C]} -> [*b, out_size]."""

    def __init__(
        self,
        spaces: dict,
        *,
        depth: int,
        mults: Sequence[int],
        kernel: int = 5,
        downsample: str = "pool",
        act: str = "silu",
        recompute: bool = False,
        **_,
    ):
        super().__init__()
        self.recompute = recompute
        self.keys = list(spaces)
        height, width = common_size(spaces, len(mults))
        depths = [sum(space.shape[-1] for space in spaces.values()), *(depth * m for m in mults)]
        self.stages = nn.Sequential(
            *(Conv(i, o, kernel, downsample, act=act) for i, o in zip(depths[:-1], depths[1:], strict=True))
        )
        self.out_size = (height >> len(mults)) * (width >> len(mults)) * depths[-1]

    def forward(self, obs: dict[str, Tensor], present: dict[str, Tensor]) -> Float[Tensor, "*b out"]:
        frames = []
        for key in self.keys:
            frame = self.scale(obs[key])
            frames.append(frame * present[key][..., None, None, None] if key in present else frame)
        x = torch.cat(frames, -1) if len(frames) > 1 else frames[0]
        lead = x.shape[:-3]
        return in_pieces(self._embed, x.reshape(-1, *x.shape[-3:]), FRAMES, self.recompute).reshape(*lead, -1)

    def scale(self, frame: Tensor) -> Float[Tensor, "*b h w c"]:
        dtype = self.stages[0].conv.weight.dtype
        return frame.to(dtype) / 255 - 0.5

    def _embed(self, x: Float[Tensor, "n h w c"]) -> Float[Tensor, "n out"]:
        return self.stages(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1)


class ImageDecoder(nn.Module):
    """deter, stoch -> {key: distribution over [*b, H, W, C] in 0..1}."""

    def __init__(
        self,
        spaces: dict,
        deter: int,
        stoch: int,
        *,
        units: int,
        depth: int,
        mults: Sequence[int],
        kernel: int = 5,
        blocks: int = 8,
        upsample: str = "nearest",
        image_dist: str = "sigmoid_mse",
        outscale: float = 1.0,
        act: str = "silu",
        recompute: bool = False,
        **_,
    ):
        super().__init__()
        self.recompute = recompute
        height, width = common_size(spaces, len(mults))
        self.channels = {key: space.shape[-1] for key, space in spaces.items()}
        self.dist, self.blocks, self.act = image_dist, blocks, ACTIVATIONS[act]
        depths = [depth * m for m in mults]
        self.start = (height >> len(mults), width >> len(mults), depths[-1])
        if deter % blocks or depths[-1] % blocks:
            raise UserError(
                f"decoder.blocks is {blocks}, which must divide deter ({deter}) and the start map's channels "
                f"({depths[-1]})."
            )
        self.from_deter = BlockLinear(blocks, deter // blocks, prod(self.start) // blocks)
        self.from_stoch = nn.Sequential(Dense(stoch, 2 * units, act), Linear(2 * units, prod(self.start)))
        self.norm = RMSNorm(depths[-1])
        widths = [*reversed(depths), sum(self.channels.values())]
        last = len(mults) - 1
        self.stages = nn.Sequential(
            *(
                Conv(i, o, kernel, upsample, act=act, norm=n < last, scale=outscale if n == last else 1.0)
                for n, (i, o) in enumerate(zip(widths[:-1], widths[1:], strict=True))
            )
        )

    def forward(
        self, deter: Float[Tensor, "*b deter"], stoch: Float[Tensor, "*b stoch"]
    ) -> dict[str, SquaredError | Normal]:
        lead = deter.shape[:-1]
        height, width, depth = self.start
        by_block = self.from_deter(deter.unflatten(-1, (self.blocks, -1)))
        by_block = by_block.reshape(-1, self.blocks, height, width, depth // self.blocks)
        x = by_block.permute(0, 2, 3, 1, 4).reshape(-1, height, width, depth)
        x = x + self.from_stoch(stoch).reshape(-1, height, width, depth)
        x = in_pieces(self._paint, x, FRAMES, self.recompute)
        x = x.reshape(*lead, *x.shape[1:])
        parts = x.split(list(self.channels.values()), -1)
        return {key: self._dist(part) for key, part in zip(self.channels, parts, strict=True)}

    def _paint(self, x: Float[Tensor, "n h w depth"]) -> Float[Tensor, "n h2 w2 c"]:
        return self.stages(self.norm(x, self.act).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def target(self, key: str, value: Tensor) -> Float[Tensor, "*b h w c"]:
        """What the distribution of `key` is scored on."""
        return value.to(self.norm.scale.dtype) / 255

    def _dist(self, x: Tensor) -> SquaredError | Normal:
        if self.dist == "sigmoid_mse":
            return SquaredError(torch.sigmoid(full_precision(x)), dims=3)
        if self.dist == "mse":
            return SquaredError(x + 0.5, dims=3)
        return Normal(x + 0.5, dims=3)
