"""Distributions that heads put out, and the squashings around them.

Every distribution here has `log_prob(x)`, `loss(x) = -log_prob(x)` and `mode()`; the ones that are sampled have
`sample(noise)`, where the noise is an input (Gumbel for categoricals, standard normal otherwise): zero Gumbel noise is
the arg max, zero normal noise is the mean. The last axes, which make up one event, are summed over.
Everything is computed in float32 (or wider), whatever the precision of the network that put out the logits.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["symlog", "symexp", "symexp_bins", "one_hot"]
__all__ += ["OneHot", "Joint", "Normal", "SquaredError", "TwoHot", "Bernoulli", "mixed_loss"]


def symlog(x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """sign(x) ln(1 + |x|): compresses large values of either sign, identity around zero (paper, eq. 9)."""
    return torch.sign(x) * torch.log1p(torch.abs(x))


def symexp(x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """Inverse of `symlog`: sign(x) (exp|x| - 1)."""
    return torch.sign(x) * torch.expm1(torch.abs(x))


def softmax(logits: Float[Tensor, "*b classes"], few: int = 8) -> Float[Tensor, "*b classes"]:
    """Over the last axis. On a CPU `few` neighbouring numbers take six times as long as the outermost axis does."""
    if logits.shape[-1] > few or logits.device.type != "cpu":
        return torch.softmax(logits, -1)
    return torch.softmax(logits.movedim(-1, 0).contiguous(), 0).movedim(0, -1)


def one_hot(index: Int[Tensor, "*b"], classes: int, dtype: torch.dtype) -> Float[Tensor, "*b classes"]:
    """A row lookup: a fraction of the time of `F.one_hot`, which goes through int64 and, on a CPU, reads its input."""
    return F.embedding(index, torch.eye(classes, dtype=dtype, device=index.device))


def full_precision(x: Tensor) -> Tensor:
    """float32 for half-precision tensors; float32 and float64 pass."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def symexp_bins(count: int, limit: float = 20.0, **kwargs) -> Float[Tensor, " count"]:
    """`count` bin centres that are exponentially spaced in ±symexp(limit) and exactly mirrored around zero.

    Mirroring (instead of one symexp(linspace)) makes the bins cancel exactly in a symmetric sum.
    """
    half = symexp(torch.linspace(-limit, 0, count // 2 + count % 2, dtype=torch.float64))
    mirrored = -half.flip(0)
    return torch.cat([half, mirrored[count % 2 :]]).to(**{"dtype": torch.get_default_dtype(), **kwargs})


def sum_event(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Sum over `axes`. No axes leave x as it is, where `Tensor.sum(())` would sum over everything."""
    return x.sum(axes) if axes else x


class OneHot:
    """Categorical whose samples are one-hot vectors [..., classes], with straight-through gradients.

    `unimix` mixes that share of a uniform distribution into the probabilities (paper: 1 %), so that no class dies out
    and KL terms stay bounded; sampling, straight-through gradient, entropy and KL all see the mixed probabilities.
    """

    def __init__(self, logits: Float[Tensor, "*b classes"], unimix: float = 0.0):
        logits = full_precision(logits)
        if unimix:
            self.probs = (1 - unimix) * softmax(logits) + unimix / logits.shape[-1]
            self.log_probs = torch.log(self.probs)
        else:
            self.log_probs = torch.log_softmax(logits, -1)
            self.probs = self.log_probs.exp()

    def mode(self) -> Float[Tensor, "*b classes"]:
        return self._one_hot(self.log_probs)

    def sample(self, gumbel: Float[Tensor, "*b classes"]) -> Float[Tensor, "*b classes"]:
        """Gumbel-max sample, with the gradient of the probabilities."""
        return StraightThrough.apply(self.probs, self._one_hot(self.log_probs.detach() + gumbel))

    def log_prob(self, onehot: Float[Tensor, "*b classes"]) -> Float[Tensor, "*b"]:
        return (onehot * self.log_probs).sum(-1)

    def loss(self, onehot: Float[Tensor, "*b classes"]) -> Float[Tensor, "*b"]:
        return -self.log_prob(onehot)

    def entropy(self) -> Float[Tensor, "*b"]:
        return -(self.probs * self.log_probs).sum(-1)

    def kl(self, other: "OneHot") -> Float[Tensor, "*b"]:
        """KL(self ‖ other) per categorical."""
        return (self.probs * (self.log_probs - other.log_probs)).sum(-1)

    def detach(self) -> "OneHot":
        copy = object.__new__(OneHot)
        copy.probs, copy.log_probs = self.probs.detach(), self.log_probs.detach()
        return copy

    def _one_hot(self, scores: Tensor) -> Tensor:
        return one_hot(scores.max(-1).indices, scores.shape[-1], self.probs.dtype)


class StraightThrough(torch.autograd.Function):
    """`sample` forwards; backwards its gradient is that of `probs`."""

    @staticmethod
    def forward(ctx, probs: Tensor, sample: Tensor) -> Tensor:
        return sample.view_as(sample)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Joint:
    """Independent categoricals of different sizes whose one-hot vectors are concatenated: [..., sum of sizes]."""

    def __init__(self, parts: list[OneHot]):
        self.parts = parts
        self.sizes = [part.probs.shape[-1] for part in parts]

    def mode(self) -> Float[Tensor, "*b size"]:
        return torch.cat([part.mode() for part in self.parts], -1)

    def sample(self, gumbel: Float[Tensor, "*b size"]) -> Float[Tensor, "*b size"]:
        return torch.cat([p.sample(g) for p, g in zip(self.parts, gumbel.split(self.sizes, -1), strict=True)], -1)

    def log_prob(self, x: Float[Tensor, "*b size"]) -> Float[Tensor, "*b"]:
        return sum(p.log_prob(v) for p, v in zip(self.parts, x.split(self.sizes, -1), strict=True))

    def loss(self, x: Float[Tensor, "*b size"]) -> Float[Tensor, "*b"]:
        return -self.log_prob(x)

    def entropy(self) -> Float[Tensor, "*b"]:
        return sum(part.entropy() for part in self.parts)


class Normal:
    """Diagonal normal over the last `dims` axes."""

    def __init__(self, mean: Float[Tensor, "*s"], std: Float[Tensor, "*s"] | float = 1.0, dims: int = 1):
        self.mean = full_precision(mean)
        std = std if torch.is_tensor(std) else torch.full_like(self.mean, std)
        self.std = full_precision(std)
        self.axes = tuple(range(-dims, 0))

    def mode(self) -> Float[Tensor, "*s"]:
        return self.mean

    def sample(self, normal: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        return self.mean + self.std * normal

    def log_prob(self, x: Float[Tensor, "*s"]) -> Float[Tensor, "*b"]:
        z = (x - self.mean) / self.std
        return sum_event(-0.5 * z.square() - self.std.log() - 0.5 * math.log(2 * math.pi), self.axes)

    def loss(self, x: Float[Tensor, "*s"]) -> Float[Tensor, "*b"]:
        return -self.log_prob(x)

    def slope(self, target: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """How the loss changes with the target, as a function of the distribution."""
        return (target - self.mean) / self.std.square()

    def entropy(self) -> Float[Tensor, "*b"]:
        return sum_event(self.std.log() + 0.5 * math.log(2 * math.pi * math.e), self.axes)

    def kl(self, other: "Normal") -> Float[Tensor, "*b"]:
        """KL(self ‖ other), summed over the event."""
        ratio = (self.std / other.std).square()
        distance = ((self.mean - other.mean) / other.std).square()
        return 0.5 * sum_event(ratio + distance - 1 - ratio.log(), self.axes)

    def detach(self) -> "Normal":
        return Normal(self.mean.detach(), self.std.detach(), len(self.axes))


class SquaredError:
    """A point prediction scored by the squared error, summed over the last `dims` axes.

    `squash` (symlog) applies to the target, its inverse to the prediction that is read off (paper, eq. 9).
    """

    def __init__(self, pred: Float[Tensor, "*s"], dims: int = 1, squash: bool = False):
        self.pred = full_precision(pred)
        self.axes = tuple(range(-dims, 0))
        self.squash = squash

    def mode(self) -> Float[Tensor, "*s"]:
        return symexp(self.pred) if self.squash else self.pred

    def loss(self, target: Float[Tensor, "*s"]) -> Float[Tensor, "*b"]:
        target = symlog(target) if self.squash else target
        return sum_event((self.pred - target.detach()).square(), self.axes)

    def slope(self, target: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """How the loss changes with the target, as a function of the prediction."""
        error = (symlog(target) if self.squash else target) - self.pred
        return 2 * error / (1 + target.abs()) if self.squash else 2 * error

    def log_prob(self, target: Float[Tensor, "*s"]) -> Float[Tensor, "*b"]:
        return -self.loss(target)


class TwoHot:
    """A scalar as a categorical over bins: the target's mass is split between its two neighbouring bins (paper, eq.
    10).

    With `squash` (`symlog_disc`, the 2023 version) the bins are evenly spaced in symlog space and the prediction is the
    symexp of the expected bin; without it (`symexp_twohot`) the bins themselves are exponentially spaced.
    There may be more logits than bins: the last ones are padding and must be so low that their share is 0.

    `rounding` says how the expected bin is summed. exact: mirrored bins' shares are subtracted before they are weighed,
    so that symmetric logits give 0. fused: `fma(low, -bin, round(high * bin))`, which is what XLA makes of the author's
    code on a CPU. The rounding of one product remains, and the outermost bins are 4.9e8: while their shares are near
    1/255, as in a new head, the prediction is off by about 0.1.
    """

    def __init__(
        self,
        logits: Float[Tensor, "*b wide"],
        bins: Float[Tensor, " bins"],
        squash: bool = False,
        rounding: str = "exact",
    ):
        self.wide = full_precision(logits)
        self.probs = torch.softmax(self.wide, -1)
        self.bins = bins
        self.squash = squash
        self.rounding = rounding

    @property
    def logits(self) -> Float[Tensor, "*b bins"]:
        return self.wide[..., : self.bins.shape[0]]

    def mode(self) -> Float[Tensor, "*b"]:
        """Expected bin; see `rounding`."""
        half, odd = divmod(self.bins.shape[0], 2)
        # Split, not sliced: of a slice that is flipped, torch 2.13 compiles a wrong gradient.
        low, _, high, _ = self.probs.split([half, odd, half, self.wide.shape[-1] - self.bins.shape[0]], -1)
        low, bins = low.flip(-1), self.bins[-half:]
        # Not a matrix product: autocast would round values and rewards to half precision.
        if self.rounding == "exact":
            mean = ((high - low) * bins).sum(-1)
        else:  # A product of two float32 numbers is exact in float64.
            fused = (high * bins).double() - low.double() * bins.double()
            mean = fused.to(bins.dtype).sum(-1)
        return symexp(mean) if self.squash else mean

    def loss(self, *targets: Float[Tensor, "*b"], scales: Sequence[float] = ()) -> Float[Tensor, "*b"]:
        """Cross entropy with the two-hot target; targets beyond the outermost bins count as those.

        The losses of several targets are added up, each times its scale, at the cost of one.
        """
        target, below, above = self._between(torch.stack(targets).detach())
        low, high = self.bins[below], self.bins[above]
        share = ((target - low) / (high - low)).clamp(0, 1)
        # Two bins per target are looked up; no dense [..., bins] target is made.
        picks, shares = torch.cat([below, above]), torch.cat([1 - share, share])
        if scales:
            shares = torch.stack([scale * x for scale, x in zip(2 * list(scales), shares, strict=True)])
        return CrossEntropy.apply(self.wide, self.probs, picks.movedim(0, -1), shares.movedim(0, -1))

    def slope(self, target: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """How the loss changes with the target, as a function of the logits: 0 beyond the outermost bins."""
        inside, below, above = self._between(target)
        width = self.bins[above] - self.bins[below]
        within = ((inside >= self.bins[0]) & (inside <= self.bins[-1])).to(width.dtype)
        below, above = (self.logits.gather(-1, index.unsqueeze(-1)).squeeze(-1) for index in (below, above))
        return (below - above) / width * within / (1 + target.abs() if self.squash else 1)

    def _between(self, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A target among the bins, and the indices of the bins below and above it."""
        target = full_precision(target)
        target = symlog(target) if self.squash else target
        above = torch.searchsorted(self.bins, target.contiguous(), right=True).clamp(1, self.bins.shape[0] - 1)
        return target, above - 1, above

    def log_prob(self, target: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return -self.loss(target)


class CrossEntropy(torch.autograd.Function):
    """-sum(shares * log_softmax(logits)[picks]) over the last axis, from probabilities that are known already.

    Neither forwards nor backwards is there a dense array beside those and the gradient. The gradient is itself
    differentiable, through `probs`.
    """

    @staticmethod
    def forward(
        ctx,
        logits: Float[Tensor, "*b classes"],
        probs: Float[Tensor, "*b classes"],
        picks: Int[Tensor, "*b n"],
        shares: Float[Tensor, "*b n"],
    ) -> Float[Tensor, "*b"]:
        ctx.save_for_backward(probs, picks, shares)
        # The largest probability, at least 1/classes, tells the normaliser exactly; small ones may have underflowed.
        normaliser = logits.amax(-1, keepdim=True) - probs.amax(-1, keepdim=True).log()
        return (shares * (normaliser - logits.gather(-1, picks))).sum(-1)

    @staticmethod
    def backward(ctx, grad: Float[Tensor, "*b"]) -> tuple[Tensor, None, None, None]:
        probs, picks, shares = ctx.saved_tensors
        shares = shares * grad.unsqueeze(-1)
        return (probs * shares.sum(-1, keepdim=True)).scatter_add_(-1, picks, -shares), None, None, None


def mixed_loss(dist, targets: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """The losses of several targets, each times its scale, added up."""
    if isinstance(dist, TwoHot):
        return dist.loss(*targets, scales=scales)
    return sum(scale * dist.loss(target) for scale, target in zip(scales, targets, strict=True))


class Bernoulli:
    """A yes or no, whose target may be any probability."""

    def __init__(self, logit: Float[Tensor, "*b"]):
        self.logit = full_precision(logit)

    @property
    def prob(self) -> Float[Tensor, "*b"]:
        return torch.sigmoid(self.logit)

    def mode(self) -> Bool[Tensor, "*b"]:
        return self.logit > 0

    def loss(self, target: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return F.binary_cross_entropy_with_logits(self.logit, target.detach(), reduction="none")

    def log_prob(self, target: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return -self.loss(target)
