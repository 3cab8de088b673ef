"""Meta-gradients: what actor and critic are trained with learns, by what it does to them in one step (Xu et al. 2018,
arXiv 1805.09801; Zahavy et al. 2020, arXiv 2002.12928). `optim.py` has the other form, hypergradient rates.

An update moves actor and critic to θ' = θ - m(η), where η are the discount, λ, the scales of entropy and of reward
streams, and both learning rates. The update after it imagines a fresh batch with θ', on which an outer loss of fixed
discount and λ, without entropy bonus and without other streams, has the gradient v. So dL/dη = -v · ∂m/∂η, where
∂m/∂η = P ∂∇L(θ; η)/∂η, and what the optimizer multiplies gradients by, P, and the range that returns are normalised by
count as constant. ∂∇L/∂η is the gradient of ∂L/∂η, which is written down here: nothing is differentiated twice, and
nothing is imagined twice.
"""

import copy
import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from errors import UserError
from models import ImagBehavior, Stream
from networks import features
from optim import Group, Optimizer
from returns import lambda_return

Seen = tuple[Tensor, Tensor, dict]  # see `OneStep._evaluate`


class OneStep:
    """Adapts a behaviour's hyperparameters η. Its floats become numbers on the device, which are written over.

    The entries of η are 0 at the start: they are added to the logits of discount and λ, which all streams share, and to
    the logarithms of all else, so that a scale of 0 stays 0. Adam moves them, by about `kappa` where gradients agree.
    What states count in the losses goes by the outer discount, which does not change.

    Args:
        scales: of the losses.
        limit: the factor of its start (for discount and λ: of 1/(1 - x) - 1) within which an entry stays.
        horizon, discount_lambda: the outer loss's; None for those of the behaviour at the start.
    """

    groups = ("actor", "critic")

    def __init__(
        self,
        behavior: ImagBehavior,
        optimizer: Optimizer,
        scales: Mapping[str, float],
        *,
        kappa: float,
        limit: float,
        horizon: float | None = None,
        discount_lambda: float | None = None,
    ):
        flat = isinstance(behavior, ImagBehavior)
        if not flat or behavior.ppo or behavior.dynamics_share:
            found = "actor_objective: ppo" if flat and behavior.ppo else "imag_gradient: dynamics or both"
            raise UserError(
                f"metagrad: one_step found {found if flat else 'behavior: hierarchical'}, expected actor_critic by "
                "REINFORCE (--imag_gradient reinforce); --metagrad hypergradient goes with all."
            )
        own = [name for name, stream in behavior.streams.items() if stream.discount != behavior.discount]
        if own:
            raise UserError(
                f"metagrad: one_step moves one discount for all streams: expl_streams gives {own[0]} its own."
            )
        self.behavior, self.optimizer, self.scales = behavior, optimizer, scales
        self.kappa, self.limit = kappa, math.log(limit)
        others = [name for name in behavior.streams if name != "extrinsic"]
        self.knobs = ["discount", "lambda", "entropy", *(f"scale/{name}" for name in others)]
        self.names = [*self.knobs, *(f"lr_{key}" for key in self.groups)]
        like = next(behavior.parameters())
        # One entry per name: η, Adam's moments, and dL/dη of the update before.
        self.eta, self.first, self.second, self.grad = (like.new_zeros(len(self.names)) for _ in range(4))
        self.count = like.new_zeros(())
        for key in self.groups:
            optimizer.groups[key].follow(len(self.knobs))

        self.outer_discount = like.new_tensor(behavior.discount if horizon is None else 1 - 1 / horizon)
        self.normalizer = copy.deepcopy(behavior.streams["extrinsic"].retnorm)  # of the outer loss's returns
        self.outer_lam = behavior.lam if discount_lambda is None else discount_lambda
        behavior.weight_discount = self.outer_discount
        behavior.keeps = True
        start = [behavior.discount, behavior.lam, behavior.entropy_scale]
        self.start = like.new_tensor([*start, *(behavior.streams[name].scale for name in others)])
        behavior.lam, behavior.entropy_scale = like.new_tensor(start[1]), like.new_tensor(start[2])
        for name, stream in behavior.streams.items():
            stream.discount = like.new_tensor(start[0])
            if name != "extrinsic":
                stream.scale = like.new_tensor(stream.scale)

    def values(self) -> dict[str, Float[Tensor, ""]]:
        """What the knobs stand at."""
        near_one = torch.sigmoid(torch.logit(self.start[:2], eps=1e-6) + self.eta[:2])
        scales = self.start[2:] * self.eta[2 : len(self.knobs)].exp()
        return dict(zip(self.knobs, [*near_one, *scales], strict=True))

    def write(self) -> None:
        """Gives η's values to those whose they are."""
        values, behavior = self.values(), self.behavior
        behavior.lam.copy_(values["lambda"])
        behavior.entropy_scale.copy_(values["entropy"])
        for name, stream in behavior.streams.items():
            stream.discount.copy_(values["discount"])
            if name != "extrinsic":
                stream.scale.copy_(values[f"scale/{name}"])
        for key, entry in zip(self.groups, self.eta[len(self.knobs) :], strict=True):
            self.optimizer.groups[key].log_gain.copy_(entry)

    def look(self) -> None:
        """Between a batch's losses and its update: what the update before has done (`grad`), and, into the groups'
        `traces`, how the gradients of this one depend on η.
        """
        groups = [self.optimizer.groups[key] for key in self.groups]
        params = [p for group in groups for p in group.params]
        if self.normalizer:
            self.normalizer.update(self._outer_return())
        with torch.enable_grad(), torch.autocast(self.eta.device.type, enabled=False):
            seen = self._evaluate()
            losses = [self.outer_loss(seen), *self._slopes(seen).values()]
        found = [
            _flat(torch.autograd.grad(x, params, allow_unused=True, retain_graph=x is not losses[-1]), groups)
            for x in losses
        ]
        with torch.no_grad():
            outer, rows = found[0], found[1:]
            knobs = -sum(group.traces @ vector for group, vector in zip(groups, outer, strict=True))
            rates = [-torch.dot(group.last, vector) for group, vector in zip(groups, outer, strict=True)]
            self.grad.copy_(torch.cat([knobs, torch.stack(rates)]))
            for group, *vectors in zip(groups, *rows, strict=True):
                group.traces.copy_(torch.stack(vectors))
        self.behavior.imagined = {}

    @torch.no_grad()
    def step(self) -> dict[str, Tensor]:
        """Moves η by `grad`, once the learning rates are warm, and unless the update was a bad one. Returns metrics."""
        optimizer, finite = self.optimizer, torch.isfinite(self.grad).all()
        ok = finite & (self.grad != 0).any() & (optimizer.bad == 0) & (optimizer.updates > optimizer.warmup)
        grad, live = torch.where(ok, self.grad, 0.0), ok.to(self.eta.dtype)
        self.count += live
        count = self.count.clamp(min=1)
        self.first.lerp_(grad, 0.1 * live)
        self.second.lerp_(grad.square(), 0.01 * live)
        scale = (self.second / (1 - 0.99**count)).sqrt()
        move = torch.where(scale > 0, self.first / (1 - 0.9**count) / scale, 0.0)
        self.eta.sub_(self.kappa * live * move).clamp_(-self.limit, self.limit)
        self.write()
        rates = optimizer.rates()
        found = (
            self.values() | {f"lr_{key}": rates[key] for key in self.groups} | {"skipped": 1 - finite.to(grad.dtype)}
        )
        return {f"meta/{name}": value for name, value in found.items()}

    def outer_loss(self, seen: Seen | None = None) -> Float[Tensor, ""]:
        """What η is to make small: policy and value loss of the task alone, of fixed discount and λ, on what was
        imagined last, with the present weights.
        """
        log_prob, _, critics = seen or self._evaluate()
        of, weight = self.behavior.imagined["streams"]["extrinsic"], self.behavior.imagined["weight"]
        target = self._outer_return()
        advantage = (target - of["value"]) / (self.normalizer.scale if self.normalizer else 1.0)
        policy = self.scales["policy"] * advantage * log_prob
        return (weight * (self._scale("value") * critics["extrinsic"].loss(target) - policy)).mean()

    def _outer_return(self) -> Float[Tensor, "n h"]:
        of = self.behavior.imagined["streams"]["extrinsic"]
        live = self.behavior.live(self.behavior.imagined["cont"], self.outer_discount)[:, 1:]
        return lambda_return(of["reward"], of["boot"], live, self.outer_lam)

    def _evaluate(self) -> Seen:
        """Log-probabilities and entropies of the policy, and the critics' distributions, in the imagined states."""
        behavior, states = self.behavior, self.behavior.imagined["seen"][:, :-1]
        dist = behavior.actor(states)
        critics = {name: stream.critic(states) for name, stream in behavior.streams.items()}
        return dist.log_prob(behavior.imagined["action"]), dist.entropy(), critics

    def _slopes(self, seen: Seen) -> dict[str, Float[Tensor, ""]]:
        """{knob: ∂L/∂η}, as functions of the weights: their gradients are how the gradient of the loss depends on η."""
        behavior, values, (log_prob, entropy, critics) = self.behavior, self.values(), seen
        imagined, weight = behavior.imagined, behavior.imagined["weight"]
        policy = -self.scales["policy"] * weight
        found = {"discount": 0.0, "lambda": 0.0, "entropy": (policy * values["entropy"] * entropy).mean()}
        for name, stream in behavior.streams.items():
            of, of_stream = imagined["streams"][name], stream.scale * policy * log_prob
            if name != "extrinsic":
                found[f"scale/{name}"] = (of_stream * stream.normalized(of["return"] - of["value"])).mean()
            live = behavior.live(imagined["cont"], stream.discount)[:, 1:]
            by = _sensitivity(of["reward"], of["boot"], of["return"], live, stream.discount, behavior.lam)
            value = self._scale("value" if name == "extrinsic" else f"value/{name}")
            slope = value * weight * critics[name].slope(of["return"])
            replay = self._replay_slopes(stream, by) if name == "extrinsic" else {}
            for knob, change in by.items():
                inner = (of_stream * stream.normalized(change) + slope * change).mean()
                # Of a logit: its value changes by x (1 - x).
                changed = values[knob] * (1 - values[knob])
                found[knob] = found[knob] + (inner + replay.get(knob, 0.0)) * changed
        return found

    def _replay_slopes(self, stream: Stream, by: Mapping[str, Float[Tensor, "n h"]]) -> dict[str, Float[Tensor, ""]]:
        """The replay value loss's, whose bootstrap are the imagined returns, which change by `by`."""
        behavior, replay = self.behavior, self.behavior.imagined["replay"]
        shape = replay["reward"].shape
        boot = behavior.imagined["streams"]["extrinsic"]["return"][:, 0].unflatten(0, shape)
        boots = {knob: change[:, 0].unflatten(0, shape) for knob, change in by.items()}
        last, terminal = (replay[key].to(boot.dtype)[:, 1:] for key in ("is_last", "is_terminal"))
        live, reward, goes_on = stream.discount * (1 - terminal), replay["reward"][:, 1:], 1 - last
        target = lambda_return(reward, boot, live, behavior.lam * goes_on)
        changes = _sensitivity(reward, boot, target, live, stream.discount, behavior.lam, goes_on, boots)
        slope = stream.critic(features(replay)[:, :-1]).slope(target)
        counts = self._scale("repval") * (~replay["is_last"][:, :-1]).to(slope.dtype)
        return {knob: (counts * slope * change).mean() for knob, change in changes.items()}

    def _scale(self, loss: str) -> float:
        return self.scales[loss if loss in self.scales else loss.split("/")[0]]

    def state_dict(self) -> dict:
        kept = {name: getattr(self, name).clone() for name in ("eta", "first", "second", "count")}
        return kept | {"normalizer": self.normalizer.state_dict() if self.normalizer else {}}

    def load_state_dict(self, state: dict) -> None:
        """Restores `state_dict()`, of the same streams."""
        for name in ("eta", "first", "second", "count"):
            getattr(self, name).copy_(state[name])
        if self.normalizer:
            self.normalizer.load_state_dict(state["normalizer"])
        self.write()


def _sensitivity(
    reward: Float[Tensor, "n h"],
    boot: Float[Tensor, "n states"],
    returns: Float[Tensor, "n h"],
    live: Float[Tensor, "n h"],
    discount: Tensor,
    lam: Tensor,
    goes_on: Float[Tensor, "n h"] | float = 1.0,
    boots: Mapping[str, Float[Tensor, "n states"]] | None = None,
) -> dict[str, Float[Tensor, "n h"]]:
    """How `returns` = lambda_return(reward, boot, live, lam * goes_on) change with the discount, of which `live` is a
    multiple, and with λ, if the bootstraps change by `boots`: λ-returns themselves.
    """
    boots = boots or dict.fromkeys(("discount", "lambda"), torch.zeros_like(boot))
    after = torch.cat([returns[:, 1:], boot[:, -1:]], 1)
    direct = {"discount": (returns - reward) / discount, "lambda": live * goes_on * (after - boot[:, 1:])}
    return {knob: lambda_return(change, boots[knob], live, lam * goes_on) for knob, change in direct.items()}


def _flat(grads: Sequence[Tensor | None], groups: Sequence[Group]) -> list[Float[Tensor, " size"]]:
    """Gradients of all parameters of some groups, None for 0, as one vector per group."""
    rest = list(grads)
    vectors = []
    for group in groups:
        own, rest = rest[: len(group.params)], rest[len(group.params) :]
        own = [torch.zeros_like(p) if g is None else g for p, g in zip(group.params, own, strict=True)]
        vectors.append(torch.cat([g.flatten() for g in own]))
    return vectors
