"""Exploration: intrinsic rewards, and how actions are chosen other than by the task policy.

An intrinsic reward is one class: what it learns from replayed states (`loss`), what it pays for imagined transitions
(`forward`). `--expl_behavior NAME` trains an explorer on it, beside the task policy, which it leaves as it is;
`--expl_streams NAME:SCALE,...` gives it a critic of its own within the policy that acts. `register_reward` adds one.

Alignment is that of `models.py`: what sees the action uses the states [:-1], what sees only the arrival uses [1:].
`Random` acts uniformly: it fills the replay before the first update (`prefill`) and is `expl_behavior: random`.
"""

import difflib
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from gymnasium import spaces
from jaxtyping import Float
from torch import Tensor, nn

from distributions import OneHot, full_precision, one_hot
from errors import UserError
from layers import MLP, Actor, Ensemble, Linear, ScalarHead
from models import Behavior, ImagBehavior, Intrinsic, Metrics, State, WorldModel, extrinsic_reward
from networks import bounded, features
from returns import RootMeanSquare


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


# Views of states and transitions


def width(world_model: WorldModel, name: str) -> int:
    """The width of a view (see `view`)."""
    rssm = world_model.rssm
    widths = {"stoch": rssm.stoch_size, "deter": rssm.deter, "feat": rssm.feat_size}
    return (widths | {"embed": sum(world_model.encoder.sizes.values())})[name]


def view(world_model: WorldModel, post: State, name: str) -> Float[Tensor, "b t width"]:
    """Replayed states as an intrinsic reward looks at them.

    name: embed (what the encoder saw), stoch (the posterior's probabilities; its means, if latents are Gaussian), deter
        or feat (deter and the sampled stoch). Of these, deter and feat know the action before.
    """
    match name:
        case "embed" | "deter":
            return full_precision(post[name])
        case "feat":
            return full_precision(features(post))
        case "stoch":
            return world_model.rssm.dist(post).probs.flatten(-2) if world_model.rssm.discrete else post["mean"]
    raise ValueError(name)


def going(batch: dict) -> Float[Tensor, "b t-1"]:
    """1 for the steps t and t+1 of one episode, 0 where t+1 begins another."""
    return (~batch["is_first"][:, 1:]).to(batch["reward"].dtype)


def together(state: Tensor, action: Tensor) -> Tensor:
    """[state, action], actions as the recurrence takes them."""
    return torch.cat([state, bounded(action).to(state.dtype)], -1)


# Intrinsic rewards


class Disagreement(Intrinsic):
    """Plan2Explore (Sekar et al. 2020, arXiv 2005.05960, eq. 5 and 6): where one-step predictions differ, there is
    something to learn; where what comes next is merely random, all of them predict its mean.

    Args:
        models: predictors, initialised each for itself.
        target: what of the next state they predict, see `view`.
        spread: std, the standard deviation, as the authors' later agents pay; or var, the variance, as the paper does
            (eq. 6): of many small deviations and few large ones it tells the large ones apart.
        log: pay the logarithm.
        action_cond: predict from state and action; otherwise from the state alone.
    """

    def __init__(
        self,
        world_model: WorldModel,
        action_size: int,
        classes: Sequence[int],
        *,
        models: int = 8,
        target: str = "stoch",
        spread: str = "std",
        log: bool = False,
        action_cond: bool = True,
        layers: int = 2,
        units: int = 256,
    ):
        super().__init__()
        self.target, self.spread, self.log, self.action_cond = target, spread, log, action_cond
        inputs = world_model.rssm.feat_size + (action_size if action_cond else 0)
        self.models = Ensemble(inputs, width(world_model, target), count=models, units=units, layers=layers)

    def loss(self, world_model: WorldModel, post: State, batch: dict, noise: dict) -> tuple[Tensor, Metrics]:
        target = view(world_model, post, self.target)[:, 1:]
        predicted = self._predict(features(post)[:, :-1], batch["action"][:, :-1])
        error = (full_precision(predicted) - target).square().mean(-1) * going(batch)
        return error.sum(0), {"plan2explore_loss": error.detach().mean()}

    def forward(self, world_model: WorldModel, traj: dict[str, Tensor]) -> Float[Tensor, "n h"]:
        predicted = full_precision(self._predict(traj["feat"][:, :-1], traj["action"][:, :-1]))
        disagreement = (std(predicted) if self.spread == "std" else var(predicted)).mean(-1)
        return torch.log(disagreement + 1e-8) if self.log else disagreement

    def _predict(self, feat: Tensor, action: Tensor) -> Float[Tensor, "models b t width"]:
        return self.models(together(feat, action) if self.action_cond else feat)


class Distilled(Intrinsic):
    """A reward that needs what was really seen: its signal is computed on the replay, and a head learns to predict it
    upon arrival at imagined states, in units of the signal's root mean square so far.

    Subclasses give `signal` and `name`. head: options of what predicts it, those of the reward head.
    """

    name, in_unit = "", True

    def __init__(self, world_model: WorldModel, action_size: int, classes: Sequence[int], *, head: Mapping):
        super().__init__()
        self.head = ScalarHead(world_model.rssm.feat_size, **head)
        self.unit = RootMeanSquare()

    def signal(
        self, world_model: WorldModel, post: State, batch: dict
    ) -> tuple[Float[Tensor, "b t-1"], Float[Tensor, "b t-1"], Metrics]:
        """The reward of every replayed transition, the loss that its networks learn by, and metrics."""
        raise NotImplementedError

    def loss(self, world_model: WorldModel, post: State, batch: dict, noise: dict) -> tuple[Tensor, Metrics]:
        signal, loss, metrics = self.signal(world_model, post, batch)
        signal, live = signal.detach(), going(batch)
        self.unit.update(signal, live)
        distilled = self.head(features(post)[:, 1:]).loss(signal / self.unit.value)
        metrics |= {
            f"{self.name}_loss": loss.detach().mean(),
            self.name: (signal * live).sum() / live.sum().clamp(min=1),
        }
        return (loss + distilled) * live, metrics

    def forward(self, world_model: WorldModel, traj: dict[str, Tensor]) -> Float[Tensor, "n h"]:
        return self.head(traj["feat"]).mode()[:, 1:]


class ICM(Distilled):
    """Intrinsic curiosity (Pathak et al. 2017, arXiv 1705.05363): how badly the next features are predicted, features
    that have learned what the actions change and nothing else.

    Minimises (1 - β) inverse + β/2 ‖φ̂(s') - sg(φ(s'))‖² and pays ½‖φ̂(s') - φ(s')‖², with φ of unit root mean square.
    The paper's η is not there: rewards are in their own unit.

    Args:
        target: what φ is made of, see `view`. deter and feat already hold the action, so that no feature is needed to
            tell it.
        features: width of φ.
        log: pay ln(1 + ‖φ̂ - φ‖²) instead.
    """

    name = "icm"

    def __init__(
        self,
        world_model: WorldModel,
        action_size: int,
        classes: Sequence[int],
        *,
        head: Mapping,
        target: str = "embed",
        features: int = 32,
        beta: float = 0.2,
        log: bool = False,
        layers: int = 1,
        units: int = 256,
    ):
        super().__init__(world_model, action_size, classes, head=head)
        self.target, self.beta, self.log = target, beta, log
        self.classes = tuple(classes)
        self.phi = mlp(width(world_model, target), features, units, layers)
        self.inverse = mlp(2 * features, action_size, units, layers)
        self.model = mlp(features + action_size, features, units, layers)

    def signal(self, world_model: WorldModel, post: State, batch: dict) -> tuple[Tensor, Tensor, Metrics]:
        phi, action = self.represent(view(world_model, post, self.target)), batch["action"][:, :-1]
        before, after = phi[:, :-1], phi[:, 1:]
        inverse, right = self._inverse(full_precision(self.inverse(torch.cat([before, after], -1))), action)
        error = (full_precision(self.model(together(before, action))) - after.detach()).square().sum(-1)
        loss = (1 - self.beta) * inverse + self.beta / 2 * error
        live = going(batch)
        metrics = {"icm_inverse": ((right.detach() * live).sum() / live.sum().clamp(min=1))}
        return torch.log1p(error) if self.log else error / 2, loss, metrics

    def represent(self, seen: Float[Tensor, "b t width"]) -> Float[Tensor, "b t features"]:
        """φ, of root mean square 1: the inverse model gains by features that grow, and with them grew the errors."""
        phi = full_precision(self.phi(seen))
        return phi * torch.rsqrt(phi.square().mean(-1, keepdim=True) + 1e-6)

    def _inverse(self, out: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of the inverse model, and what it has right: the share of actions, or minus their squared error."""
        if not self.classes:
            error = (torch.tanh(out) - bounded(action)).square().sum(-1)
            return error, -error
        logits, taken = out.split(self.classes, -1), action.split(self.classes, -1)
        loss = sum(OneHot(x).loss(a) for x, a in zip(logits, taken, strict=True))
        right = [(x.argmax(-1) == a.argmax(-1)).to(out.dtype) for x, a in zip(logits, taken, strict=True)]
        return loss, sum(right) / len(right)


class RND(Distilled):
    """Random-network distillation (Burda et al. 2018, arXiv 1810.12894): how badly a network that learns predicts one
    that does not, of what was seen.
    """

    name = "rnd"

    def __init__(
        self,
        world_model: WorldModel,
        action_size: int,
        classes: Sequence[int],
        *,
        head: Mapping,
        target: str = "embed",
        features: int = 64,
        layers: int = 2,
        units: int = 256,
    ):
        super().__init__(world_model, action_size, classes, head=head)
        self.target = target
        self.fixed, self.model = (mlp(width(world_model, target), features, units, layers) for _ in range(2))
        self.fixed.requires_grad_(False)

    def signal(self, world_model: WorldModel, post: State, batch: dict) -> tuple[Tensor, Tensor, Metrics]:
        seen = view(world_model, post, self.target)[:, 1:]
        error = (full_precision(self.model(seen)) - full_precision(self.fixed(seen))).square().mean(-1)
        return error, error, {}


class Surprise(Distilled):
    """Bayesian surprise: KL(posterior ‖ prior) of a step, what seeing it told the world model."""

    name = "surprise"

    def signal(self, world_model: WorldModel, post: State, batch: dict) -> tuple[Tensor, Tensor, Metrics]:
        surprise, _ = world_model.rssm.kl(post, world_model.rssm.prior(post["deter"]))
        surprise = surprise[:, 1:].detach()
        return surprise, torch.zeros_like(surprise), {}


class Empowerment(Intrinsic):
    """Variational empowerment (Mohamed and Rezende 2015, arXiv 1509.08731): how much the agent's next `steps` actions
    decide about where it is then, in nats.

    E(s) = max_ω I(a; s') ≥ E[ln q(a | s, s') - ln ω(a | s)]. The planner q learns by maximum likelihood on rollouts of
    the model; the source h and the normaliser ψ by (β ln q - ln h - ψ)². What is paid on arrival at s is ψ(s)/β.

    Args:
        steps: actions that are looked ahead, K. Both q and h choose them one after the other.
        form: state as above; action pays ln q(a | s, s') - ln π(a | s) for the action taken (Bharadhwaj et al. 2022,
            arXiv 2204.08585): one step, no rollouts.
        starts: rollouts per update.
        beta: inverse temperature of the source.

    q reads off only the stochastic part of s': the deterministic part holds the actions themselves.
    """

    def __init__(
        self,
        world_model: WorldModel,
        action_size: int,
        classes: Sequence[int],
        *,
        steps: int = 2,
        form: str = "state",
        starts: int = 256,
        beta: float = 1.0,
        layers: int = 2,
        units: int = 256,
    ):
        super().__init__()
        rssm, self.steps, self.form = world_model.rssm, steps if form == "state" else 1, form
        self.starts, self.beta, self.action_size = starts, beta, action_size
        sizes = {"layers": layers, "units": units, "unimix_ratio": 1e-3, "outscale": 1.0}
        before = self.steps * (action_size + 1)
        self.planner = Actor(rssm.feat_size + rssm.stoch_size + before, action_size, classes, **sizes)
        if form == "state":
            self.source = Actor(rssm.feat_size + before, action_size, classes, **sizes)
            self.normalizer = mlp(rssm.feat_size, 1, units, layers)

    def noise(self, batch: int, time: int, draw) -> dict[str, Tensor]:
        if self.form == "action":
            return {}
        starts = min(self.starts, batch * time)
        return {"action": draw.action(self.steps, starts), "latent": draw.latent(self.steps, starts)}

    def loss(self, world_model: WorldModel, post: State, batch: dict, noise: dict) -> tuple[Tensor, Metrics]:
        if self.form == "action":
            feat, action = features(post), batch["action"][:, :-1, None]
            log_q = self._log_prob(self.planner, self._ends(world_model, feat[:, :-1], feat[:, 1:]), action)
            return -log_q * going(batch), {"empowerment_loss": -(log_q * going(batch)).detach().mean()}
        every = max(1, post["deter"].shape[:2].numel() // noise["action"].shape[1])
        start = {key: post[key].flatten(0, 1)[::every][: noise["action"].shape[1]] for key in ("deter", "stoch")}
        with torch.no_grad():
            end, actions = self._roll_out(world_model, start, noise)
        feat = features(start)
        log_q = self._log_prob(self.planner, self._ends(world_model, feat, features(end)), actions)
        log_h = self._log_prob(self.source, feat, actions)
        psi = full_precision(self.normalizer(feat)).squeeze(-1)
        residual = (self.beta * log_q.detach() - log_h - psi).square()
        metrics = {"empowerment": (log_q - log_h).mean(), "empowerment_loss": residual.mean() - log_q.mean()}
        return residual - log_q, {key: value.detach() for key, value in metrics.items()}

    def forward(self, world_model: WorldModel, traj: dict[str, Tensor]) -> Float[Tensor, "n h"]:
        feat = traj["feat"]
        if self.form == "state":
            return full_precision(self.normalizer(feat[:, 1:])).squeeze(-1) / self.beta
        ends = self._ends(world_model, feat[:, :-1], feat[:, 1:])
        return self._log_prob(self.planner, ends, traj["action"][:, :-1, None]) - traj["log_prob"].detach()

    def _roll_out(
        self, world_model: WorldModel, state: State, noise: dict
    ) -> tuple[State, Float[Tensor, "n k action"]]:
        """Where `steps` actions of the source lead."""
        feat, rssm = features(state), world_model.rssm
        layout, actions = rssm.layout(), feat.new_zeros(len(feat), self.steps, self.action_size)
        for step in range(self.steps):
            action = self.source(self._given(feat, actions)[:, step]).sample(noise["action"][step])
            actions[:, step] = action
            state = rssm.img_step(state, action, noise["latent"][step], layout)
        return state, actions

    def _ends(self, world_model: WorldModel, start: Tensor, end: Tensor) -> Tensor:
        """What q looks at."""
        return torch.cat([start, end[..., world_model.rssm.deter :]], -1)

    def _given(self, x: Float[Tensor, "*b x"], actions: Float[Tensor, "*b k action"]) -> Float[Tensor, "*b k all"]:
        """For each of the K actions: x, the actions before it, and which it is."""
        count = self.steps
        before = torch.ones(count, count, device=x.device, dtype=x.dtype).tril(-1)
        past = (bounded(actions).to(x.dtype).unsqueeze(-3) * before.unsqueeze(-1)).flatten(-2)
        which = torch.eye(count, device=x.device, dtype=x.dtype).expand(*x.shape[:-1], count, count)
        return torch.cat([x.unsqueeze(-2).expand(*x.shape[:-1], count, x.shape[-1]), past, which], -1)

    def _log_prob(self, actor: Actor, x: Tensor, actions: Tensor) -> Tensor:
        return actor(self._given(x, actions)).log_prob(actions).sum(-1)


class Diversity(Intrinsic):
    """Diversity is all you need (Eysenbach et al. 2019, arXiv 1802.06070): skills, each drawn for an episode, that are
    told apart by where they lead: ln q(z | s') - ln p(z), at most ln N. For `SkillBehavior`.

    q sees the stochastic part of the state, and learns from what is imagined, where the skill is known.
    """

    def __init__(
        self,
        world_model: WorldModel,
        action_size: int,
        classes: Sequence[int],
        *,
        skills: int = 16,
        layers: int = 2,
        units: int = 256,
    ):
        super().__init__()
        self.skills = skills
        self.discriminator = mlp(world_model.rssm.stoch_size, skills, units, layers)

    def imagined_loss(self, world_model: WorldModel, traj: dict[str, Tensor]) -> tuple[Tensor, Metrics]:
        told = self._told(world_model, traj)
        return -told, {"diayn_loss": -told.detach().mean()}

    def forward(self, world_model: WorldModel, traj: dict[str, Tensor]) -> Float[Tensor, "n h"]:
        return self._told(world_model, traj) + math.log(self.skills)

    def _told(self, world_model: WorldModel, traj: dict[str, Tensor]) -> Float[Tensor, "n h"]:
        skill = traj["seen"][:, 1:, -self.skills :].detach()
        return OneHot(self.discriminator(traj["feat"][:, 1:, world_model.rssm.deter :])).log_prob(skill)


def var(x: Float[Tensor, "models b t width"]) -> Float[Tensor, "b t width"]:
    """Variance over the first axis, over which `Tensor.var` takes four times as long on a CPU."""
    return (x - x.mean(0)).square().sum(0) / (len(x) - 1)


def std(x: Float[Tensor, "models b t width"]) -> Float[Tensor, "b t width"]:
    """Standard deviation over the first axis."""
    return var(x).clamp(min=torch.finfo(x.dtype).tiny).sqrt()


def mlp(inputs: int, outputs: int, units: int, layers: int) -> nn.Sequential:
    """An MLP with a linear output."""
    hidden = MLP(inputs, units, layers)
    return nn.Sequential(hidden, Linear(hidden.out_size, outputs))


# Explorers


class SkillBehavior(ImagBehavior):
    """An actor-critic that is given a skill, one of `extra`, drawn uniformly where an episode or imagination begins."""

    def initial(self, batch: int) -> Tensor:
        """No skill yet: one is drawn at the next step."""
        return next(self.parameters()).new_zeros(batch, self.extra)

    def see(self, feat: Tensor, carry: Tensor, is_first: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        draws = feat.new_zeros(*feat.shape[:-1], self.extra) if noise is None else noise[..., -self.extra :]
        fresh = is_first | (carry == 0).all(-1)
        skill = torch.where(fresh.unsqueeze(-1), one_hot(draws.argmax(-1), self.extra, carry.dtype), carry)
        return torch.cat([feat, skill.to(feat.dtype)], -1), skill


DISAG = ("models", "target", "spread", "log", "action_cond", "layers", "units")
# Name -> class, and the sections of the configuration that it takes. `disag` are the keys that begin with disag_.
REWARDS: dict[str, tuple[Callable, str | None]] = {
    "plan2explore": (Disagreement, "disag"),
    "icm": (ICM, "icm"),
    "rnd": (RND, "rnd"),
    "surprise": (Surprise, None),
    "empowerment": (Empowerment, "empowerment"),
    "diayn": (Diversity, "diayn"),
}


def register_reward(name: str, reward: Callable) -> None:
    """Makes `name` an intrinsic reward: `reward(world_model, action_size, classes)` gives an `Intrinsic`.

    One with a parameter `head`, such as `Distilled`, is given the options of the reward head, too.
    """
    REWARDS[name] = (reward, None)


def make_reward(name: str, world_model: WorldModel, action_size: int, classes: Sequence[int], config) -> Intrinsic:
    """The intrinsic reward of that name with its options. UserError for one that does not exist."""
    if name not in REWARDS:
        close = difflib.get_close_matches(name, REWARDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else f"; expected one of {', '.join(REWARDS)}."
        raise UserError(f"'{name}' is no intrinsic reward{hint}")
    kind, section = REWARDS[name]
    if section == "disag":
        options = {key: config[f"disag_{key}"] for key in DISAG}
        options["units"] = options["units"] or config.actor["units"]
    else:
        options = dict(config[section]) if section else {}
    if "head" in inspect.signature(kind).parameters:
        options["head"] = config.reward_head
    return kind(world_model, action_size, classes, **options)


def task_rewards(world_model: WorldModel, action_size: int, classes: Sequence[int], config) -> dict:
    """The streams of the task's behaviour, {name: (reward, scale, horizon)}; with `expl_streams` unless an explorer has
    them.
    """
    own = {"extrinsic": (extrinsic_reward, 1.0, None)}
    return own if explorer_of(config) else own | _streams(world_model, action_size, classes, config)


def make_explorer(
    behave: Callable[..., Behavior], world_model: WorldModel, action_size: int, classes: Sequence[int], config
) -> Behavior | None:
    """The explorer that `expl_behavior` names, or None: `behave(kind, rewards=, extra=)` builds it."""
    name = explorer_of(config)
    if name is None:
        return None
    reward = make_reward(name, world_model, action_size, classes, config)
    rewards = {name: (reward, config.expl_intr_scale, config.expl_horizon)}
    rewards |= _streams(world_model, action_size, classes, config)
    if config.expl_extr_scale:
        rewards["extrinsic"] = (extrinsic_reward, config.expl_extr_scale, None)
    if isinstance(reward, Diversity):
        return behave(SkillBehavior, rewards=rewards, extra=reward.skills)
    return behave(ImagBehavior, rewards=rewards)


def explorer_of(config) -> str | None:
    """The intrinsic reward that an explorer of its own is trained on."""
    return None if config.expl_behavior in ("greedy", "random") else config.expl_behavior


def _streams(world_model: WorldModel, action_size: int, classes: Sequence[int], config) -> dict:
    """`expl_streams`, "name:scale,name:scale:horizon", as {name: (reward, scale, horizon)}, that of the task None."""
    found = {}
    for entry in filter(None, (part.strip() for part in config.expl_streams.split(","))):
        name, *numbers = entry.split(":")
        try:
            scale, horizon = [*map(float, numbers), *[None] * (2 - len(numbers))]
            if scale is None or not 0 <= scale < math.inf or (horizon is not None and not 1 < horizon < math.inf):
                raise ValueError
        except ValueError:
            raise UserError(
                f"expl_streams: found '{entry}', expected name:scale or name:scale:horizon, such as icm:0.1:50"
            ) from None
        if name == "diayn":
            raise UserError("expl_streams: diayn needs a policy that is given its skill: use --expl_behavior diayn")
        if name in found or name == explorer_of(config):
            raise UserError(f"expl_streams: '{name}' is there already.")
        found[name] = (make_reward(name, world_model, action_size, classes, config), scale, horizon)
    return found
