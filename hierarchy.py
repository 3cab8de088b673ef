"""A manager that sets goals and a worker that reaches them, both learned in imagination (Director, Hafner et al. 2022,
arXiv 2206.04114), optimised as `actor_objective` says: by PPO in the block `hierarchical`.

Every `every` steps the manager chooses a code of `groups` categoricals; the goal autoencoder turns it into a recurrent
state, and the worker is paid for coming near that state, whatever the task. The manager is paid the task's reward, for
reaching what the autoencoder does not know yet, and any intrinsic rewards. The goal is decoded anew at every step, as
what a code means drifts while the world model learns; only the code is carried on.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from distributions import OneHot, full_precision
from errors import UserError
from layers import MLP, Actor, Linear
from models import Behavior, Intrinsic, Losses, Metrics, Stream, WorldModel, extrinsic_reward, imagined, replayed
from networks import State
from ppo import Rollout
from returns import lambda_return


class GoalAutoencoder(Intrinsic):
    """Recurrent states as codes of `groups` categoricals of `classes`, and back. As a reward: the error of doing so.

    Minimises ‖decode(z) - sg(deter)‖² + β KL(encode(deter) ‖ uniform). β grows by a tenth at every update whose KL is
    above `nats`, and falls by as much otherwise.
    """

    def __init__(
        self,
        deter: int,
        *,
        groups: int = 8,
        classes: int = 8,
        nats: float = 10.0,
        units: int = 256,
        layers: int = 2,
        act: str = "silu",
    ):
        super().__init__()
        self.deter, self.groups, self.classes, self.nats = deter, groups, classes, nats
        self.size = groups * classes
        encoder, decoder = MLP(deter, units, layers, act), MLP(self.size, units, layers, act)
        self.encoder = nn.Sequential(encoder, Linear(encoder.out_size, self.size))
        self.decoder = nn.Sequential(decoder, Linear(decoder.out_size, deter))
        self.register_buffer("beta", torch.ones(()))

    def encode(self, deter: Float[Tensor, "*b deter"]) -> OneHot:
        """The distribution of the code of a state, [*b, groups, classes]."""
        return OneHot(self.encoder(deter).unflatten(-1, (self.groups, self.classes)))

    def decode(self, code: Float[Tensor, "*b size"]) -> Float[Tensor, "*b deter"]:
        return full_precision(self.decoder(code))

    def noise(self, batch: int, time: int, draw) -> dict[str, Tensor]:
        # β of this update comes from outside, too: compiled, a backward pass that reads a buffer which its forward pass
        # has moved on finds the new value there.
        return {"code": draw.gumbel(batch, time, self.groups, self.classes), "beta": self.beta.clone()}

    def loss(self, world_model: WorldModel, post: State, batch: dict, noise: dict) -> tuple[Tensor, Metrics]:
        deter = full_precision(post["deter"])
        code = self.encode(deter)
        error = (self.decode(code.sample(noise["code"]).flatten(-2)) - deter).square().sum(-1)
        kl = (code.probs * (code.log_probs + math.log(self.classes))).sum((-2, -1))
        loss = error + noise["beta"] * kl
        with torch.no_grad():
            mean = kl.mean()
            grown = torch.where(mean > self.nats, self.beta * 1.1, self.beta / 1.1).clamp(1e-6, 1e6)
            self.beta.copy_(torch.where(torch.isfinite(mean), grown, self.beta))
        return loss, {"goal_error": error.detach().mean(), "goal_kl": mean, "goal_beta": self.beta.clone()}

    def forward(self, world_model: WorldModel, traj: dict[str, Tensor]) -> Float[Tensor, "n h"]:
        deter = full_precision(traj["feat"][:, 1:, : self.deter])
        return (self.decode(self.encode(deter).mode().flatten(-2)) - deter).square().mean(-1)


def max_cosine(goal: Float[Tensor, "*b deter"], state: Float[Tensor, "*b deter"]) -> Float[Tensor, "*b"]:
    """gᵀh / max(‖g‖, ‖h‖)²: the cosine, less where the lengths differ."""
    largest = torch.maximum(goal.norm(dim=-1), state.norm(dim=-1)).clamp(min=1e-8)
    return ((goal / largest.unsqueeze(-1)) * (state / largest.unsqueeze(-1))).sum(-1)


def goal_reward(world_model: WorldModel, traj: dict[str, Tensor]) -> Float[Tensor, "n h"]:
    """What the worker is paid: how near to step t's goal the state is that its action led to."""
    goal = traj["goal"]
    return max_cosine(goal[:, :-1], full_precision(traj["feat"][:, 1:, : goal.shape[-1]]))


def chunk_starts(phase: Int[Tensor, " n"], horizon: int, every: int) -> tuple[Int[Tensor, "n d"], Bool[Tensor, "n d"]]:
    """When the manager decides within the horizon, and which of these decisions are seen to their end.

    phase: steps that the goal at the start of imagination is old.
    """
    first = (every - phase) % every
    starts = first.unsqueeze(1) + every * torch.arange(horizon // every, device=phase.device)
    return starts.clamp(max=horizon - every), starts + every <= horizon


def over_chunks(
    reward: Float[Tensor, "n h"], cont: Float[Tensor, "n states"], starts: Int[Tensor, "n d"], every: int
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
    """Of each chunk: the mean of its rewards, each with the probability that the episode has come to it, and the
    probability that the episode goes on after it. `cont[:, t]`: that it goes on from state t.
    """
    index = (starts.unsqueeze(-1) + torch.arange(every, device=starts.device)).flatten(1)
    shape = (*starts.shape, every)
    rewards, goes_on = reward.gather(1, index).view(shape), cont[:, 1:].gather(1, index).view(shape)
    reached = torch.cumprod(torch.cat([torch.ones_like(goes_on[..., :1]), goes_on[..., :-1]], -1), -1)
    return (reached * rewards).sum(-1) / reached.sum(-1), goes_on.prod(-1)


class Hierarchy(Behavior):
    """Manager, worker and goal autoencoder: a behaviour in the place of `models.ImagBehavior`.

    Args:
        deter: width of the recurrent state, which comes first in the features.
        actor, critic, retnorm: options of both policies and of all critics.
        rewards: {stream: (reward, scale, horizon)} of the manager, the horizon in agent steps, None for the manager's;
            none for the task's alone.
        every: steps between two decisions of the manager; `imag_horizon` is a multiple.
        goal: options of the autoencoder. novelty: scale of its error as a reward of the manager.
        manager_horizon: decisions; the manager's discount is 1 - 1/manager_horizon for each.
        manager_entropy: scale of the entropy bonus of its choices, None for the actor's, which is the worker's.
        phases: share of imagined trajectories that start with a goal of random age. The manager learns from decisions
            whose chunks are whole, of which these have fewer.
    """

    def __init__(
        self,
        feat_size: int,
        action_size: int,
        classes: Sequence[int],
        *,
        deter: int,
        actor: Mapping,
        critic: Mapping,
        retnorm: Mapping,
        goal: Mapping,
        imag_horizon: int = 16,
        imag_last: int = 0,
        every: int = 8,
        novelty: float = 0.1,
        manager_horizon: float = 50,
        manager_entropy: float | None = None,
        phases: float = 0.5,
        horizon: float = 333,
        contdisc: bool = True,
        discount_lambda: float = 0.95,
        reward_EMA: bool = True,
        actor_objective: str = "ppo",
        rewards: Mapping[str, tuple[Callable, float, float | None]] | None = None,
    ):
        super().__init__()
        taken = {"novelty", "worker"} & dict(rewards or {}).keys()
        if taken:
            raise UserError(
                f"A hierarchy has a stream '{taken.pop()}' of its own: register the reward by another name."
            )
        if imag_horizon % every:
            raise UserError(f"imag_horizon is {imag_horizon}, expected a multiple of hier.every ({every}).")
        actor = dict(actor)
        entropy = actor.pop("entropy")
        self.entropy_scales = {"manager": entropy if manager_entropy is None else manager_entropy, "worker": entropy}
        self.deter, self.action_size, self.every = deter, action_size, every
        self.phases = phases if imag_horizon > every else 0.0  # else no chunk would be whole
        self.gumbel = bool(classes)  # whether an action's noise is
        self.imag_horizon, self.imag_last = imag_horizon, imag_last
        self.discount, self.contdisc, self.lam = 1 - 1 / horizon, contdisc, discount_lambda
        self.ppo, self.rollouts = actor_objective == "ppo", []
        autoencoder = GoalAutoencoder(deter, **goal)
        self.extra = autoencoder.size
        self.manager = Actor(feat_size, autoencoder.size, (autoencoder.classes,) * autoencoder.groups, **actor)
        self.worker = Actor(feat_size + deter, action_size, classes, **actor)
        options = {"critic": critic, "retnorm": retnorm if reward_EMA else None}
        rewards = dict(rewards or {"extrinsic": (extrinsic_reward, 1.0, None)})
        rewards |= {"novelty": (autoencoder, novelty, None)}
        discounts = {
            name: (1 - 1 / own) ** every if own else 1 - 1 / manager_horizon for name, (_, _, own) in rewards.items()
        }
        self.streams = nn.ModuleDict(
            {
                name: Stream(reward, feat_size, scale=scale, discount=discounts[name], **options)
                for name, (reward, scale, _) in rewards.items()
            }
        )
        self.streams["worker"] = Stream(goal_reward, feat_size + deter, scale=1.0, discount=self.discount, **options)

    @property
    def actors(self) -> dict[str, Actor]:
        return {"manager": self.manager, "worker": self.worker}

    @property
    def autoencoder(self) -> GoalAutoencoder:
        return self.streams["novelty"].reward

    def initial(self, batch: int) -> dict[str, Tensor]:
        """No goal yet: one is chosen at the next step."""
        code = next(self.parameters()).new_zeros(batch, self.extra)
        return {"code": code, "age": torch.zeros(batch, dtype=torch.int64, device=code.device)}

    def draw_noise(self, batch: int, time: int, draw) -> dict:
        """As any behaviour's (the manager's codes share the actions' noise), and `phase` [N]."""
        noise = super().draw_noise(batch, time, draw)
        return noise | {"phase": draw.uniform(batch * self.starts(time))}

    def choose(
        self, feat: Tensor, carry: dict[str, Tensor], is_first: Tensor, noise: Tensor | None
    ) -> tuple[Float[Tensor, "*b deter"], dict[str, Tensor]]:
        """The goal at a state, and what is carried on: a new one where an episode begins or the old one is up."""
        age = torch.where(is_first, 0, carry["age"])
        fresh = (age == 0) | (carry["code"] == 0).all(-1)
        with torch.no_grad():
            dist = self.manager(feat)
            code = dist.mode() if noise is None else dist.sample(self._gumbel(noise[..., self.action_size :]))
            code = torch.where(fresh.unsqueeze(-1), code.to(carry["code"].dtype), carry["code"])
            return self.autoencoder.decode(code), {"code": code, "age": (age + 1) % self.every}

    def policy(self, feat: Tensor, carry: dict, is_first: Tensor, noise: Tensor | None) -> tuple[Tensor, dict]:
        """Action [*b, action] drawn with `noise` [*b, action + extra] (the modes if None)."""
        goal, carry = self.choose(feat, carry, is_first, noise)
        dist = self.worker(torch.cat([feat, goal.to(feat.dtype)], -1))
        return (dist.mode() if noise is None else dist.sample(noise[..., : self.action_size])), carry

    def loss(self, world_model: WorldModel, post: State, batch: dict, noise: dict) -> tuple[Losses, Metrics]:
        """Losses `policy/manager`, `policy/worker`, `value/<stream>` [B, T] and those of intrinsic rewards, the goal
        autoencoder among them. `noise`: see `draw_noise`.
        """
        losses, metrics = replayed(self.intrinsic, world_model, post, batch, noise)
        shape = (len(batch["reward"]), self.starts(batch["reward"].shape[1]))
        start = {key: post[key][:, -shape[1] :].detach().flatten(0, 1) for key in ("deter", "stoch")}
        phase = self._phase(noise["phase"])
        with torch.no_grad():
            goals, codes, scores = [], [], []

            def policy(feat: Tensor, carry: dict, is_first: Tensor, noise: Tensor) -> tuple[Tensor, dict]:
                goal, carry = self.choose(feat, carry, is_first, noise)
                action, *score = self._act_and_score(feat, goal, noise[..., : self.action_size])
                goals.append(goal)
                codes.append(carry["code"])
                scores.append(score)
                return action.detach(), carry

            carry = self.initial(len(phase)) | {"age": phase}
            traj = world_model.imagine(start, policy, carry, self.imag_horizon, noise)
        traj |= {"goal": torch.stack(goals, 1), "code": torch.stack(codes, 1)}
        traj["log_prob"], traj["entropy"] = (torch.stack(steps[:-1], 1) for steps in zip(*scores, strict=True))
        more, found, kept = self.learn(world_model, traj, phase)
        if self.ppo:
            whose = {
                "manager": (self.manager, {n: s for n, s in self.streams.items() if n != "worker"}),
                "worker": (self.worker, {"worker": self.streams["worker"]}),
            }
            scales = self.entropy_scales
            self.rollouts = [Rollout(*whose[who], scales[who], **given) for who, given in kept.items()]
        return losses | {name: value.unflatten(0, shape) for name, value in more.items()}, metrics | found

    def learn(
        self, world_model: WorldModel, traj: dict[str, Tensor], phase: Int[Tensor, " n"]
    ) -> tuple[Losses, Metrics, dict]:
        """The losses [N] of a trajectory that was imagined already (see `loss`), metrics, and what PPO goes on with."""
        with torch.no_grad():
            cont = full_precision(world_model.cont(traj["feat"]).prob)
            going = (cont / self.discount if self.contdisc else cont).clamp(max=1)  # the probability alone
        losses, metrics, manager = self._manage(world_model, traj, phase, going)
        more, found, worker = self._work(world_model, traj, phase, going)
        own, told = imagined(self.intrinsic, world_model, traj)
        return losses | more | own, metrics | found | told, {"manager": manager, "worker": worker}

    def _manage(
        self, world_model: WorldModel, traj: dict[str, Tensor], phase: Tensor, going: Float[Tensor, "n states"]
    ) -> tuple[Losses, Metrics, dict]:
        """What the manager learns: one decision per chunk, whose reward is the chunk's."""
        starts, whole = chunk_starts(phase, self.imag_horizon, self.every)
        bounds = torch.cat([starts[:, :1], starts + self.every], 1)  # each chunk's end is the start of the next
        # Where the next decision is not whole, the chunk before it ends the trajectory.
        lam = self.lam * torch.cat([whole[:, 1:], torch.zeros_like(whole[:, :1])], 1).to(going.dtype)
        seen = _at(traj["feat"], bounds).detach()
        code = _at(traj["code"], starts)
        weight = whole * torch.cumprod(going, 1).gather(1, starts)
        losses, metrics, targets, advantage = {}, {}, {}, 0.0
        for name, stream in self.streams.items():
            if name == "worker":
                continue
            dist = stream.critic(seen)
            value = dist.mode().detach()
            with torch.no_grad():
                boot = stream.target_value(seen) if stream.slow_target else value
                steps, raw = stream.rewards(world_model, traj)
                reward, goes_on = over_chunks(steps, going, starts, self.every)
                returns = lambda_return(reward, boot, stream.discount * goes_on, lam)
                targets[name] = returns, stream.slow_value(seen)
                if stream.retnorm:  # the first decision stands for those that are not whole
                    stream.retnorm.update(torch.where(whole, returns, returns[:, :1]))
                advantage = advantage + stream.scale * stream.normalized(returns - value[:, :-1])
                suffix = "" if name == "extrinsic" else f"/{name}"
                metrics |= {f"policy/return{suffix}": returns.mean(), f"policy/reward{suffix}": raw.mean()}
            value_loss = weight * stream.value_loss(dist, *targets[name])[:, :-1]
            losses[f"value/{name}"] = value_loss.mean(1)
        dist = self.manager(seen[:, :-1])
        log_prob, entropy = dist.log_prob(code), dist.entropy()
        objective = log_prob * advantage + self.entropy_scales["manager"] * entropy
        losses["policy/manager"] = -(weight * objective).mean(1)
        metrics |= {"policy/manager_entropy": entropy.detach().mean()}
        metrics |= {"policy/manager_loss": losses["policy/manager"].detach().mean()}
        kept = {"seen": seen, "action": code, "log_prob": log_prob.detach(), "advantage": advantage}
        return losses, metrics, kept | {"weight": weight, "targets": targets}

    def _work(
        self, world_model: WorldModel, traj: dict[str, Tensor], phase: Tensor, going: Float[Tensor, "n states"]
    ) -> tuple[Losses, Metrics, dict]:
        """What the worker learns: within a chunk; the state that ends it has the value that it has for the old goal."""
        stream, feat, goal = self.streams["worker"], traj["feat"], traj["goal"].to(traj["feat"].dtype)
        seen, after = torch.cat([feat, goal], -1).detach(), torch.cat([feat[:, 1:], goal[:, :-1]], -1).detach()
        dist = stream.critic(seen)
        with torch.no_grad():
            critic = stream.target_value if stream.slow_target else lambda x: stream.critic(x).mode()
            boot = F.pad(critic(after), (1, 0))  # entry t + 1: the value of s_{t+1} for the goal of step t
            steps = torch.arange(1, self.imag_horizon + 1, device=phase.device)
            ends = (steps + phase.unsqueeze(1)) % self.every == 0
            reward, _ = stream.rewards(world_model, traj)
            ret = lambda_return(reward, boot, stream.discount * going[:, 1:], self.lam * (~ends).to(going.dtype))
            if stream.retnorm:
                stream.retnorm.update(ret)
            advantage = stream.normalized(ret - dist.mode()[:, :-1])
            target = ret, stream.slow_value(seen)
            weight = torch.cumprod(stream.discount * going, 1)[:, :-1] / stream.discount
        entropy = traj["entropy"]
        objective = traj["log_prob"] * advantage + self.entropy_scales["worker"] * entropy
        losses = {
            "policy/worker": -(weight * objective).mean(1),
            "value/worker": (weight * stream.value_loss(dist, *target)[:, :-1]).mean(1),
        }
        metrics = {
            "policy/policy_loss": losses["policy/worker"].detach().mean(),
            "policy/value_loss": losses["value/worker"].detach().mean(),
            "policy/entropy": entropy.detach().mean(),
            "policy/reward/worker": reward.mean(),
            "policy/return/worker": ret.mean(),
            "policy/cont": going.mean(),
        }
        kept = {"seen": seen, "action": traj["action"][:, :-1], "log_prob": traj["log_prob"].detach()}
        return losses, metrics, kept | {"advantage": advantage, "weight": weight, "targets": {"worker": target}}

    @torch.enable_grad()
    def _act_and_score(self, feat: Tensor, goal: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sampled actions of the worker, their log-probability and the policy's entropy [N]."""
        dist = self.worker(torch.cat([feat, goal.to(feat.dtype)], -1).detach())
        action = dist.sample(noise)
        return action, dist.log_prob(action.detach()), dist.entropy()

    def _phase(self, draws: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
        """How old the first goal is: 0, or for a share of `phases` any age below `every`."""
        age = (draws / max(self.phases, 1e-8) * self.every).long()
        return torch.where(age < self.every, age, 0)

    def _gumbel(self, noise: Tensor) -> Tensor:
        """Gumbel noise of what the actions are drawn with."""
        if self.gumbel:
            return noise
        uniform = torch.special.ndtr(noise).clamp(1e-7, 1 - 1e-7)
        return -torch.log(-torch.log(uniform))


def _at(x: Float[Tensor, "n t size"], index: Int[Tensor, "n d"]) -> Float[Tensor, "n d size"]:
    """The steps `index` of each row."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
