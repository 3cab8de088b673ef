"""Proximal policy optimisation on imagined trajectories (Schulman et al. 2017, arXiv 1707.06347).

A trajectory is imagined once; its log-probabilities, advantages and returns stay what they were then. The agent's joint
update is the first epoch, over all of it: every ratio is 1 there, so its gradient is REINFORCE's. `improve` does the
epochs after it, in minibatches of trajectories, and stops them, on the device, once a policy has moved too far.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

Metrics = dict[str, Tensor]


@dataclass
class Rollout:
    """What a policy did in imagination, without gradient: N trajectories of S decisions.

    seen: [N, S + 1, ...] what actor and critics were given. action: [N, S, action], which had log_prob [N, S].
    weight: [N, S] what a decision counts, its probability of being reached.
    targets: {stream: ([N, S], [N, S + 1])} what the streams' critics learn: returns, and the slow critics' values.
    actor, streams, entropy: whose they are, and the scale of the entropy bonus.
    """

    actor: nn.Module
    streams: Mapping[str, nn.Module]
    entropy: float
    seen: Tensor
    action: Tensor
    log_prob: Tensor
    advantage: Tensor
    weight: Tensor
    targets: dict[str, tuple[Tensor, Tensor]]

    def rows(self, index: Tensor) -> "Rollout":
        """Some of the trajectories."""
        names = ("seen", "action", "log_prob", "advantage", "weight")
        targets = {name: (returns[index], slow[index]) for name, (returns, slow) in self.targets.items()}
        return replace(self, targets=targets, **{name: getattr(self, name)[index] for name in names})


def surrogate(
    log_prob: Float[Tensor, "n s"], old: Float[Tensor, "n s"], advantage: Float[Tensor, "n s"], clip: float
) -> tuple[Float[Tensor, "n s"], Float[Tensor, "n s"]]:
    """The clipped objective min(ρ A, clamp(ρ, 1 ± clip) A) (eq. 7), and ρ = π / π_old."""
    ratio = torch.exp(log_prob - old)
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage), ratio


def loss(
    rollout: Rollout, scales: Mapping[str, float], clip: float
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """Policy and value losses with their scales, the approximate KL to the old policy (mean of ρ - 1 - ln ρ), and the
    share of ratios that are clipped.
    """
    dist = rollout.actor(rollout.seen[:, :-1])
    log_prob = dist.log_prob(rollout.action)
    objective, ratio = surrogate(log_prob, rollout.log_prob, rollout.advantage, clip)
    total = -scales["policy"] * (rollout.weight * (objective + rollout.entropy * dist.entropy())).mean()
    for name, targets in rollout.targets.items():
        stream = rollout.streams[name]
        value_loss = stream.value_loss(stream.critic(rollout.seen), *targets)[:, :-1]
        total = total + scales["value"] * (rollout.weight * value_loss).mean()
    with torch.no_grad():
        decided = (rollout.weight > 0).to(ratio.dtype)
        count = decided.sum().clamp(min=1)
        kl = ((ratio - 1 - (log_prob - rollout.log_prob)) * decided).sum() / count
        clipped = (((ratio - 1).abs() > clip) * decided).sum() / count
    return total, kl, clipped


def improve(
    rollouts: Sequence[Rollout],
    optimizer,
    order: Float[Tensor, "epochs n"],
    scales: Mapping[str, float],
    *,
    minibatches: int,
    clip: float,
    kl: float,
    groups: Sequence[str] = ("actor", "critic"),
    autocast: Callable = contextlib.nullcontext,
) -> Metrics:
    """The epochs after the first, for all rollouts (of as many trajectories) at once. Returns the last minibatch's `kl`
    (of the policy that has moved most) and share of `clipped` ratios, and the `steps` that changed the weights.

    Args:
        order: uniform draws; their ranks are the order of the trajectories in each epoch.
        kl: once a minibatch's approximate KL is above it, that one and the remaining change nothing.
        groups: of the optimizer that move.
        autocast: entered anew for every minibatch, as it keeps the weights that it has rounded.
    """
    live = torch.ones((), dtype=torch.bool, device=order.device)
    before = optimizer.groups[groups[0]].extra.clone()
    for epoch in order.argsort(-1):
        for index in epoch.chunk(minibatches):
            with autocast():
                found = [loss(rollout.rows(index), scales, clip) for rollout in rollouts]
            totals, moved, clipped = zip(*found, strict=True)
            live = live & (torch.stack(moved).max() <= kl)
            optimizer.step(sum(totals), groups, live)
    steps = optimizer.groups[groups[0]].extra - before
    return {"kl": torch.stack(moved).max(), "clipped": torch.stack(clipped).mean(), "steps": steps}
