"""Images: uint8 [height, width, channels], of any size that can be halved once per stage.

Encoder: stages of (convolution, halving, norm, activation). Decoder: a start map from deter (block-linear over
channels) plus a net of stoch, then stages that double it. Several image keys are stacked along the channels.
"""

from collections.abc import Sequence
from math import prod

import cv2
import numpy as np
import torch
from gymnasium import spaces as gs
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from distributions import Normal, SquaredError, full_precision
from errors import UserError
from layers import ACTIVATIONS, BlockLinear, Conv, Dense, Linear, RMSNorm, in_pieces

# Pixels of the frames that go through the convolutions together on a CPU: their maps fit its cache, their products fill
# its cores.
PIXELS = 16 * 64 * 64


def recognises(space: gs.Space) -> bool:
    """Boxes of uint8 with three axes."""
    return isinstance(space, gs.Box) and space.dtype == np.uint8 and len(space.shape) == 3


SEEN, IMAGINED = (0.1, 0.7, 0.2), (0.9, 0.2, 0.1)  # colours of what the model was shown, and of what it imagined


def show(
    decoder: nn.Module,
    key: str,
    truth: Float[np.ndarray, "b t h w c"],
    predicted: Float[np.ndarray, "b t h w c"],
    context: int,
) -> dict[str, tuple[str, object]]:
    """An open-loop prediction, for people: {suffix of its name: (method of the logger, its argument)}.

    Every kind has such a function (`ModalityConfig.display`).

    Args:
        decoder: the kind's own.
        truth: what the decoder's `target` made of the observations of `key`.
        predicted: the modes of its distributions.
        context: how many of the steps the model was shown.
    """
    return {"": ("video", open_loop_video(truth, predicted, context))}


def open_loop_video(
    truth: Float[np.ndarray, "b t h w c"], predicted: Float[np.ndarray, "b t h w c"], context: int, edge: int = 2
) -> UInt8[np.ndarray, "t h2 w2 3"]:
    """A film of windows side by side; in each column truth, model and error (grey is none), one above the other.

    The frame around the model's picture is green while it is shown the truth (`context` steps), red while it imagines.
    """
    rows = [truth, predicted.clip(0, 1), ((predicted - truth + 1) / 2).clip(0, 1)]
    seen = np.arange(truth.shape[1]) < context
    colour = np.where(seen[:, None], SEEN, IMAGINED)[None, :, None, None]
    framed = []
    for row, frame in zip(rows, (0.0, colour, 0.0), strict=True):
        batch, time, height, width, _ = row.shape
        picture = np.zeros((batch, time, height + 2 * edge, width + 2 * edge, 3), np.float32) + frame
        picture[:, :, edge:-edge, edge:-edge] = row.repeat(3, -1) if row.shape[-1] == 1 else row[..., :3]
        framed.append(picture)
    film = np.concatenate(framed, 2)
    return (np.concatenate(list(film), 2) * 255).round().astype(np.uint8)


def heatmap(
    truth: Float[np.ndarray, "rows t"], predicted: Float[np.ndarray, "rows t"], context: float, least: int = 96
) -> UInt8[np.ndarray, "h w 3"]:
    """Truth, model and error, one above the other, time from left to right. A bar above the model's picture is green
    for the share `context` of the time in which it was shown the truth, and red where it imagines.
    """
    low, high = float(np.nanmin(truth)), float(np.nanmax(truth))
    scale = max(high - low, 1e-8)
    error = np.abs(predicted - truth) / scale
    panels = [(truth - low) / scale, (predicted - low) / scale, error]
    repeat = [max(1, -(-least // size)) for size in truth.shape]
    bar = np.where(np.arange(truth.shape[1])[:, None] < context * truth.shape[1], SEEN, IMAGINED)[None]
    rows = []
    for number, panel in enumerate(panels):
        grey = np.nan_to_num(panel).clip(0, 1)[..., None].repeat(3, -1)
        rows.append((bar if number == 1 else np.ones_like(bar)).repeat(4, 0).repeat(repeat[1], 1))
        rows.append(grey.repeat(repeat[0], 0).repeat(repeat[1], 1))
    return (np.concatenate(rows, 0) * 255).round().astype(np.uint8)


def plot(
    truth: Float[np.ndarray, " t"], predicted: Float[np.ndarray, " t"], context: int, size: tuple[int, int] = (80, 160)
) -> UInt8[np.ndarray, "h w 3"]:
    """Two curves: truth in black, the model green while it is shown the truth, red while it imagines."""
    both = np.concatenate([truth, predicted])
    both = both[np.isfinite(both)]
    low, high = (both.min(), both.max()) if both.size else (0.0, 1.0)
    canvas, (height, width) = np.full((*size, 3), 255, np.uint8), size
    x = np.linspace(4, width - 5, len(truth))

    def curve(values: np.ndarray, steps: slice, colour: tuple) -> None:
        y = (height - 5) - np.nan_to_num((values - low) / max(high - low, 1e-8)) * (height - 10)
        points = np.stack([x, y], -1)[steps].round().astype(np.int32)
        cv2.polylines(canvas, [points], False, [round(255 * c) for c in colour], 1, cv2.LINE_AA)

    curve(truth, slice(None), (0.0, 0.0, 0.0))
    curve(predicted, slice(context), SEEN)
    curve(predicted, slice(context - 1, None), IMAGINED)
    cv2.rectangle(canvas, (0, 0), (width - 1, height - 1), (200, 200, 200))
    return canvas


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
        self.piece = max(1, PIXELS // (height * width))

    def forward(self, obs: dict[str, Tensor], present: dict[str, Tensor]) -> Float[Tensor, "*b out"]:
        frames = []
        for key in self.keys:
            frame = self.scale(obs[key])
            frames.append(frame * present[key][..., None, None, None] if key in present else frame)
        x = torch.cat(frames, -1) if len(frames) > 1 else frames[0]
        lead = x.shape[:-3]
        return in_pieces(self._embed, x.reshape(-1, *x.shape[-3:]), self.piece, self.recompute).reshape(*lead, -1)

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
        self.piece = max(1, PIXELS // (height * width))
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
        x = in_pieces(self._paint, x, self.piece, self.recompute)
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
