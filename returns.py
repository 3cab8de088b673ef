"""Returns: the lambda-return, normalisers of returns and rewards, and the slow copy that values are regularised to."""

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn


def lambda_return(
    reward: Float[Tensor, "batch time"],
    boot: Float[Tensor, "batch time+1"],
    live: Float[Tensor, "batch time"],
    lam: float | Float[Tensor, ""] | Float[Tensor, "batch time"],
) -> Float[Tensor, "batch time"]:
    """R_t = r_{t+1} + live_{t+1} ((1 - λ_t) boot_{t+1} + λ_t R_{t+1}), from the end, where R_T = boot_T (paper, eq. 7).

    `reward[:, t]` and `live[:, t]` belong to the transition from state t to t+1: the reward received on arriving at
    t+1, and the discount times the probability of going on from there. `boot[:, t]` values state t; `boot[:, 0]` is not
    used.
    """
    blend = reward + live * (1 - lam) * boot[:, 1:]
    decay = live * lam
    returns = [boot[:, -1]]
    for t in reversed(range(reward.shape[1])):
        returns.append(blend[:, t] + decay[:, t] * returns[-1])
    return torch.stack(returns[:0:-1], 1)


class ReturnNormalizer(nn.Module):
    """Moving average of the 5th and 95th percentile of all returns of a batch; `scale` = max(limit, hi - lo).

    Each percentile is averaged exponentially from 0, without debiasing (paper, eq. 12; `limit` 1 leaves small returns
    small). Kept in float32, in buffers that are updated in place. A batch that is not finite leaves them as they are.

    `debias` divides by the weight that the average has by now: without the limit, the first averages, which start at 0,
    would be a hundredth of what they should be.
    """

    def __init__(
        self, rate: float = 0.01, limit: float = 1.0, low: float = 0.05, high: float = 0.95, debias: bool = False
    ):
        super().__init__()
        self.rate, self.limit = rate, limit
        self.register_buffer("weight", torch.zeros(()) if debias else None)
        self.register_buffer("quantiles", torch.tensor([low, high]), persistent=False)
        self.register_buffer("lo", torch.zeros(()))
        self.register_buffer("hi", torch.zeros(()))

    @torch.no_grad()
    def update(self, returns: Float[Tensor, "*s"]) -> None:
        flat = returns.detach().to(self.lo.dtype).flatten()
        lo, hi = torch.quantile(flat, self.quantiles.to(flat.dtype))
        finite = torch.isfinite(flat).all()
        averages = [(self.lo, lo), (self.hi, hi)]
        if self.weight is not None:
            averages.append((self.weight, torch.ones_like(self.weight)))
        for average, new in averages:
            average.copy_(torch.where(finite, average + self.rate * (new - average), average))

    @property
    def scale(self) -> Float[Tensor, ""]:
        width = self.hi - self.lo
        return (width if self.weight is None else width / self.weight.clamp(min=self.rate)).clamp(min=self.limit)


class RootMeanSquare(nn.Module):
    """Of a signal, averaged over updates: a unit in which it is of order one. `value` is 1 before the first update.

    Averaged exponentially and debiased, in buffers that are updated in place. A batch that is not finite leaves them as
    they are.
    """

    def __init__(self, rate: float = 0.01):
        super().__init__()
        self.rate = rate
        self.register_buffer("square", torch.zeros(()))
        self.register_buffer("weight", torch.zeros(()))

    @torch.no_grad()
    def update(self, signal: Float[Tensor, "*s"], live: Float[Tensor, "*s"] | None = None) -> None:
        """live: 1 where the signal counts, 0 elsewhere; None for everywhere."""
        square = signal.detach().to(self.square.dtype).square()
        live = torch.ones_like(square) if live is None else live
        mean = (square * live).sum() / live.sum()  # not a number if none counts
        finite = torch.isfinite(mean)
        for average, new in ((self.square, mean), (self.weight, torch.ones_like(mean))):
            average.copy_(torch.where(finite, average.lerp(new, self.rate), average))

    @property
    def value(self) -> Float[Tensor, ""]:
        mean = self.square / self.weight.clamp(min=self.rate)
        return torch.where(self.weight > 0, mean.sqrt().clamp(min=1e-8), torch.ones_like(mean))


class SlowTarget(nn.Module):
    """A copy of `source` that starts equal and moves by `fraction` of the way every `every` updates."""

    def __init__(self, source: nn.Module, fraction: float = 0.02, every: int = 1):
        super().__init__()
        self.model = copy.deepcopy(source).requires_grad_(False)
        self.fraction, self.every = fraction, every
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def forward(self, *args):
        return self.model(*args)

    @torch.no_grad()
    def update(self, source: nn.Module) -> None:
        """Call once after every optimizer step. The rate is a tensor, so that no host test decides."""
        self.updates += 1
        rate = self.fraction * (self.updates % self.every == 0)
        slow, fast = list(self.model.parameters()), list(source.parameters())
        torch._foreach_lerp_(slow, fast, [rate.to(p.dtype) for p in slow])
