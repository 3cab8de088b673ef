"""Layers: linear and block-linear maps, RMS norm, MLPs, convolution stages, and how all of them are initialised.

Convolutions run on channels-last memory: a frame comes in as [height, width, channels], the norm is over channels, and
flattening yields (height, width, channels), all without a copy.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distributions import Bernoulli, Joint, Normal, OneHot, SquaredError, TwoHot, full_precision, symexp_bins

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "elu": F.elu,
    "tanh": torch.tanh,
}
# Standard deviation of a unit normal cut at ±2 is 0.8796; this factor restores it to 1.
TRUNCATION = 1.1368


@torch.no_grad()
def init_weight(weight: Tensor, fan_in: int, scale: float = 1.0) -> None:
    """Truncated normal with standard deviation `scale / sqrt(fan_in)`, cut at two of the uncut normal's deviations."""
    std = TRUNCATION * scale / math.sqrt(fan_in)
    if std:
        nn.init.trunc_normal_(weight, 0.0, std, -2 * std, 2 * std)
    else:
        weight.zero_()


class Linear(nn.Linear):
    """`nn.Linear` with the reference's initialisation; `scale` 0 starts the output at exactly 0."""

    def __init__(self, inputs: int, outputs: int, scale: float = 1.0):
        self.scale = scale
        super().__init__(inputs, outputs)

    def reset_parameters(self) -> None:
        init_weight(self.weight, self.in_features, self.scale)
        nn.init.zeros_(self.bias)

    def padded(self, x: Float[Tensor, "*b in"], multiple: int = 8, void: float = -1e30) -> Float[Tensor, "*b wide"]:
        """The outputs, and as many of `void` behind them as make up a multiple. Products of an odd width are slow:
        with 255 columns twice as slow as with 256.
        """
        more = -self.out_features % multiple
        return F.linear(x, F.pad(self.weight, (0, 0, 0, more)), F.pad(self.bias, (0, more), value=void))


class BlockLinear(nn.Module):
    """A linear map [.., blocks, inputs] -> [.., blocks * outputs] whose matrix is block-diagonal.

    `inputs`, `outputs` are per block; initialised by the fan-in of the whole layer (blocks * inputs).
    """

    def __init__(self, blocks: int, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(blocks * outputs))
        init_weight(self.weight, blocks * inputs)

    def forward(self, x: Float[Tensor, "*b blocks inputs"]) -> Float[Tensor, "*b outputs"]:
        lead = x.shape[:-2]
        out = torch.bmm(x.reshape(-1, *x.shape[-2:]).transpose(0, 1), self.weight)
        return out.transpose(0, 1).reshape(*lead, -1) + self.bias


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * scale over the last axis, in float32 whatever comes in; then `act`, if given."""

    def __init__(self, size: int, eps: float = 1e-4):
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(size))

    def forward(
        self, x: Float[Tensor, "*b size"], act: Callable[[Tensor], Tensor] | None = None
    ) -> Float[Tensor, "*b size"]:
        return rms_norm(x, self.scale, self.eps, act)


def rms_norm(
    x: Float[Tensor, "..."],
    scale: Float[Tensor, "..."],
    eps: float = 1e-4,
    act: Callable[[Tensor], Tensor] | None = None,
    axes: tuple[int, ...] = (-1,),
) -> Float[Tensor, "..."]:
    """act(x / sqrt(mean(x²) + eps) * scale) with the mean over `axes`; the norm in float32 whatever comes in.

    Args:
        scale: broadcast against x.
        act: activation, none if not given.
        axes: the last one, and others.
    """
    wide = x.to(scale.dtype)
    large = x.numel() >= PIECE and x.ndim > 1 and x.device.type == "cpu"
    if large and act in (None, F.silu) and not torch.compiler.is_compiling():
        return PiecewiseNorm.apply(wide, scale, eps, act is F.silu, axes).to(x.dtype)
    out = (wide * torch.rsqrt(wide.square().mean(axes, keepdim=True) + eps) * scale).to(x.dtype)
    return act(out) if act else out


PIECE = 2**18  # numbers that are gone through at a time: 1 MB, with its intermediate results in the cache


class PiecewiseNorm(torch.autograd.Function):
    """`rms_norm`, with or without SiLU, for a CPU: nothing fuses its steps there, and passes over memory are its cost.

    It goes through its input in pieces that fit the cache, and keeps only the input for the backward pass.
    """

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, eps: float, silu: bool, axes: tuple[int, ...]) -> Tensor:
        ctx.axes, ctx.silu, ctx.size = axes, silu, math.prod(x.shape[axis] for axis in axes)
        out, inverse = (
            torch.empty_like(x),
            x.new_empty([1 if n in axes or n - x.ndim in axes else x.shape[n] for n in range(x.ndim)]),
        )
        for x_, out_, inverse_ in in_cache(axes, x, out, inverse):
            squares = torch.linalg.vector_norm(x_, dim=-1, keepdim=True).square_()  # over more axes at once it is slow
            squares = squares if axes == (-1,) else squares.sum(axes, keepdim=True)
            torch.rsqrt(squares.mul_(1 / ctx.size).add_(eps), out=inverse_)
            torch.mul(x_, inverse_, out=out_).mul_(scale)
            if silu:
                F.silu(out_, inplace=True)
        ctx.save_for_backward(x, scale, inverse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, scale, inverse = ctx.saved_tensors
        grad_x, grad_scale = torch.empty_like(x), torch.zeros_like(scale)
        for grad_, x_, grad_x_, inverse_ in in_cache(ctx.axes, grad, x, grad_x, inverse):
            normed = x_ * inverse_
            if ctx.silu:
                grad_ = torch.ops.aten.silu_backward(grad_, normed * scale)
            product = grad_ * normed
            grad_scale += product.sum_to_size(scale.shape)
            along = product.mul_(scale).sum(ctx.axes, keepdim=True).mul_(-1 / ctx.size)
            torch.mul(grad_, scale, out=grad_x_).addcmul_(normed, along).mul_(inverse_)
        return grad_x, grad_scale, None, None, None


def in_cache(axes: tuple[int, ...], *tensors: Float[Tensor, "..."]) -> Iterator[tuple[Tensor, ...]]:
    """Views of all tensors, piece by piece along the first axis that is not among `axes`."""
    axis, first = int(0 in axes), tensors[0]
    size = max(1, PIECE * first.shape[axis] // first.numel())
    yield from zip(*(tensor.split(size, axis) for tensor in tensors), strict=True)


class Dense(nn.Module):
    """Linear -> RMSNorm -> activation."""

    def __init__(self, inputs: int, outputs: int, act: str = "silu"):
        super().__init__()
        self.linear = Linear(inputs, outputs)
        self.norm = RMSNorm(outputs)
        self.act = ACTIVATIONS[act]

    def forward(self, x: Float[Tensor, "*b in"]) -> Float[Tensor, "*b out"]:
        return self.norm(self.linear(x), self.act)


class MLP(nn.Sequential):
    """`layers` dense layers of `units`. `out_size` is the width of what comes out."""

    def __init__(self, inputs: int, units: int, layers: int, act: str = "silu"):
        super().__init__(*(Dense(inputs if i == 0 else units, units, act) for i in range(layers)))
        self.out_size = units if layers else inputs


class Ensemble(nn.Module):
    """`count` MLPs with a linear output, initialised each for itself and evaluated side by side."""

    def __init__(self, inputs: int, outputs: int, *, count: int, units: int, layers: int, act: str = "silu"):
        super().__init__()
        widths = [inputs] + [units] * layers + [outputs]
        self.count, self.act = count, ACTIVATIONS[act]
        self.weights = nn.ParameterList(torch.empty(count, a, b) for a, b in itertools.pairwise(widths))
        self.biases = nn.ParameterList(torch.zeros(count, 1, b) for b in widths[1:])
        self.scales = nn.ParameterList(torch.ones(count, units) for _ in range(layers))
        for member in (member for weight in self.weights for member in weight):
            init_weight(member, len(member))

    def forward(self, x: Float[Tensor, "*b inputs"]) -> Float[Tensor, "count *b outputs"]:
        lead, layers = x.shape[:-1], len(self.scales)
        x = x.reshape(1, -1, x.shape[-1]).expand(self.count, -1, -1)
        for weight, bias, scale in zip(self.weights, self.biases, self.scales, strict=False):
            x = torch.baddbmm(bias, x, weight)
            x = rms_norm(x.transpose(0, 1), scale, act=self.act).transpose(0, 1)
        with torch.autocast(
            x.device.type, enabled=False
        ):  # in half precision, members that nearly agree would be equal
            x = torch.baddbmm(self.biases[layers], full_precision(x), self.weights[layers])
        return x.unflatten(1, lead)


class Conv(nn.Module):
    """Convolution -> (2x2 max-pool) -> RMSNorm over channels -> activation, on [N, C, H, W] in channels-last memory.

    Args:
        resize: `same` keeps the size, `pool` and `stride` halve it, `nearest` (before the convolution) and `transposed`
            double it.
        norm: without it (an output layer) there is no activation either.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        resize: str = "same",
        *,
        act: str = "silu",
        norm: bool = True,
        scale: float = 1.0,
    ):
        super().__init__()
        edge = (kernel - 1) // 2
        if resize == "transposed":
            self.conv = nn.ConvTranspose2d(inputs, outputs, kernel, 2, edge, output_padding=kernel % 2)
        elif resize == "stride":
            self.conv = nn.Conv2d(inputs, outputs, kernel, 2, edge)
        else:
            self.conv = nn.Conv2d(inputs, outputs, kernel, padding="same")
        init_weight(self.conv.weight, inputs * kernel**2, scale)
        nn.init.zeros_(self.conv.bias)
        self.pool = nn.MaxPool2d(2) if resize == "pool" else nn.Identity()
        self.register_buffer("fold", phases(kernel) if resize == "nearest" else None, persistent=False)
        self.norm = RMSNorm(outputs) if norm else None
        self.act = ACTIVATIONS[act]

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c2 h2 w2"]:
        x = self.pool(self.conv(x) if self.fold is None else self._upsample(x))
        if self.norm is None:
            return x
        return self.norm(x.permute(0, 2, 3, 1), self.act).permute(0, 3, 1, 2)

    def _upsample(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c2 2*h 2*w"]:
        """Nearest-neighbour upsampling by 2, then the convolution, as one smaller convolution with four times the
        channels: exactly the same, with 9/25 of the arithmetic for a kernel of 5.
        """
        weight = torch.einsum("psk,qtl,oikl->pqoist", self.fold, self.fold, self.conv.weight).flatten(0, 2)
        x = F.conv2d(x, weight, self.conv.bias.repeat(4), padding=weight.shape[-1] // 2)
        # Channels (row, column, output) to their pixels, outputs last in memory (`pixel_shuffle` has them first).
        x = x.permute(0, 2, 3, 1).unflatten(-1, (2, 2, -1)).transpose(2, 3)
        return x.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def phases(kernel: int) -> Float[Tensor, "2 taps kernel"]:
    """Which taps of a kernel fall on which pixel of a map, for even and odd pixels of the map upsampled by 2.

    At pixel 2i + p of the large map, tap k of a centred kernel reads pixel i + floor((p + k - edge) / 2) of the small.
    """
    edge = (kernel - 1) // 2
    reads = torch.tensor([[(p + k - edge) // 2 for k in range(kernel)] for p in range(2)])
    reach = int(reads.abs().max())
    return (reads.unsqueeze(1) == torch.arange(-reach, reach + 1).view(1, -1, 1)).to(torch.get_default_dtype())


def in_pieces(
    function: Callable[[Tensor], Tensor], x: Float[Tensor, "n ..."], size: int, recompute: bool = False
) -> Float[Tensor, "n ..."]:
    """`function(x)` for a function that treats every entry of the first axis alone; on a CPU in pieces of `size`.

    A piece's intermediate results then stay in the processor's cache, where convolutions are faster, too. `recompute`
    keeps none of them for the backward pass.
    """
    size = size if x.device.type == "cpu" else max(size, 256) if recompute else len(x)
    run = recomputed(function) if recompute else function
    if len(x) <= size:
        return run(x)
    # Not a decorator: that imports the compiler, which takes as long as all else that a start imports without torch.
    loop = torch.compiler.disable(one_by_one) if torch.compiler.is_compiling() else one_by_one
    return loop(run, x, size)


def one_by_one(function: Callable[[Tensor], Tensor], x: Float[Tensor, "n ..."], size: int) -> Float[Tensor, "n ..."]:
    """Never compiled: compilers unroll the loop, and were not done with a decoder's 64 pieces after nine minutes."""
    return torch.cat([function(piece) for piece in x.split(size)])


def recomputed(function: Callable) -> Callable:
    """`function`, computed again in the backward pass instead of keeping what it needs (gradient checkpointing)."""

    def run(*args):
        if not torch.is_grad_enabled():
            return function(*args)
        # There is no random state to bring back: random numbers are inputs.
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)

    return run


class ScalarHead(nn.Module):
    """MLP -> distribution over one real number per state (reward, value).

    Args:
        dist: symexp_twohot | symlog_disc (two-hot over `bins` bins), symlog_mse | mse | normal (one output).
        outscale: scale of the output layer's initial weights; 0 predicts exactly 0 at first.
        rounding: exact | fused, of the two-hot mean; see `TwoHot`.
    """

    def __init__(
        self,
        inputs: int,
        *,
        layers: int,
        units: int,
        dist: str,
        bins: int,
        outscale: float,
        rounding: str = "exact",
        act: str = "silu",
    ):
        super().__init__()
        self.dist, self.rounding = dist, rounding
        self.twohot = dist in ("symexp_twohot", "symlog_disc")
        self.mlp = MLP(inputs, units, layers, act)
        self.out = Linear(self.mlp.out_size, bins if self.twohot else 1, outscale)
        if self.twohot:
            spaced = symexp_bins(bins) if dist == "symexp_twohot" else torch.linspace(-20, 20, bins)
            self.register_buffer("bins", spaced, persistent=False)

    def forward(self, feat: Float[Tensor, "*b feat"]) -> TwoHot | SquaredError | Normal:
        x = self.mlp(feat)
        if self.twohot:
            return TwoHot(self.out.padded(x), self.bins, self.dist == "symlog_disc", self.rounding)
        out = self.out(x)
        if self.dist == "normal":
            return Normal(out.squeeze(-1), dims=0)
        return SquaredError(out.squeeze(-1), dims=0, squash=self.dist == "symlog_mse")


class BinaryHead(nn.Module):
    """MLP -> Bernoulli (does the episode go on?)."""

    def __init__(self, inputs: int, *, layers: int, units: int, outscale: float = 1.0, act: str = "silu"):
        super().__init__()
        self.mlp = MLP(inputs, units, layers, act)
        self.out = Linear(self.mlp.out_size, 1, outscale)

    def forward(self, feat: Float[Tensor, "*b feat"]) -> Bernoulli:
        return Bernoulli(self.out(self.mlp(feat)).squeeze(-1))


class Actor(nn.Module):
    """MLP -> policy.

    Continuous: Normal(tanh(mean), (max_std - min_std) sigmoid(s + 2) + min_std), samples not squashed.
    Discrete: a categorical with `unimix_ratio` of uniform per group of actions, joined.

    Args:
        action_size: width of the action vector.
        classes: sizes of the discrete groups, which sum to `action_size`; empty for continuous actions.
    """

    def __init__(
        self,
        inputs: int,
        action_size: int,
        classes: Sequence[int],
        *,
        layers: int,
        units: int,
        unimix_ratio: float = 0.01,
        min_std: float = 0.1,
        max_std: float = 1.0,
        outscale: float = 0.01,
        act: str = "silu",
    ):
        super().__init__()
        self.unimix, self.min_std, self.max_std = unimix_ratio, min_std, max_std
        self.mlp = MLP(inputs, units, layers, act)
        width = self.mlp.out_size
        self.discrete = bool(classes)
        if self.discrete:
            self.logits = nn.ModuleList(Linear(width, n, outscale) for n in classes)
        else:
            self.mean, self.std = Linear(width, action_size, outscale), Linear(width, action_size, outscale)

    def forward(self, feat: Float[Tensor, "*b feat"]) -> Joint | Normal:
        x = self.mlp(feat)
        if self.discrete:
            return Joint([OneHot(layer(x), self.unimix) for layer in self.logits])
        spread = self.max_std - self.min_std
        return Normal(torch.tanh(self.mean(x)), spread * torch.sigmoid(self.std(x) + 2.0) + self.min_std)
