"""The world model, and the behaviour that is learned inside its imagination.

`WorldModel` predicts observations, rewards and the end of the episode from a latent state, and has their losses.
`ImagBehavior` rolls the latent state forward under its own policy and learns actor and critic from what it imagines.

Losses are a dictionary of arrays, one number per replayed step ([B, T]; `repval` [B, T-1]); `total_loss` scales and
adds their means. Adding a loss is one entry here and one in `loss_scales`. Alignment: step t holds the observation x_t,
the reward received on arriving at it, and the action chosen at it, so the model consumes the action of the step before.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distributions import full_precision, mixed_loss, one_hot
from errors import UserError
from layers import Actor, BinaryHead, ScalarHead
from modalities import ModalityConfig
from networks import RSSM, MultiDecoder, MultiEncoder, State, Tokens, features
from ppo import Rollout
from returns import ReturnNormalizer, RootMeanSquare, SlowTarget, lambda_return

Losses = dict[str, Tensor]
Metrics = dict[str, Tensor]
Policy = Callable[[Tensor, object, Tensor, Tensor], tuple[Tensor, object]]


class WorldModel(nn.Module):
    """Encoder, RSSM, decoder, reward head and continue head.

    Args:
        obs_space: {observation key: gymnasium space}.
        action: width of the action vector.
        encoder, decoder, dyn, reward_head, cont_head: their sections of the configuration.
        horizon: agent steps; with `contdisc` the continue head learns (1 - is_terminal)(1 - 1/horizon).
        kl_free: nats per step below which each KL term is not pushed.
        grad_heads: which of decoder, reward, cont send gradient into the latent state.
        checkpointing: recompute the activations of frames and of the scan over time in the backward pass.
        modalities: the active kinds of observation: names, none for all, or {name: ModalityConfig}.
        modality_dropout: probability that a kind is hidden from the encoder throughout a window. All that was observed
            is still predicted.
    """

    def __init__(
        self,
        obs_space: dict,
        action: int,
        *,
        encoder: Mapping,
        decoder: Mapping,
        dyn: Mapping,
        reward_head: Mapping,
        cont_head: Mapping,
        horizon: float = 333,
        contdisc: bool = True,
        kl_free: float = 1.0,
        grad_heads: Sequence[str] = ("decoder", "reward", "cont", "critic"),
        checkpointing: bool = False,
        modalities: Sequence[str] | Mapping[str, ModalityConfig] = (),
        modality_dropout: float = 0.0,
    ):
        super().__init__()
        again, encoder = {"recompute": checkpointing}, dict(encoder)
        fusion = encoder.pop("fusion", "concat")
        self.encoder = MultiEncoder(obs_space, modalities=modalities, **encoder, **again)
        self.rssm = RSSM(self.encoder.sizes, action, fusion=fusion, **dyn, **again)
        self.decoder = MultiDecoder(
            obs_space, self.rssm.deter, self.rssm.stoch_size, modalities=modalities, **decoder, **again
        )
        self.modality_dropout = modality_dropout
        self.reward = ScalarHead(self.rssm.feat_size, **reward_head)
        self.cont = BinaryHead(self.rssm.feat_size, **cont_head)
        self.discount = 1 - 1 / horizon
        self.contdisc, self.kl_free, self.grad_heads = contdisc, kl_free, tuple(grad_heads)

    def loss(
        self, batch: dict, noise: Float[Tensor, "b t ..."], drop: Float[Tensor, "b kinds"] | None = None
    ) -> tuple[Losses, State, Metrics]:
        """Losses [B, T] (`rec/<key>`, `rew`, `con`, `dyn`, `rep`), posterior states [B, T, ...] with gradient (and
        `embed`, what was seen, without), metrics.

        Args:
            batch: {key: [B, T, ...]} of observations, `action`, `reward`, `is_first`, `is_terminal`, and `context`:
                {deter, stoch, action, valid} of the step before (see `replay.py`).
            noise: what the posterior is drawn with.
            drop: uniform draws that decide which kinds are hidden (see `modality_dropout`).
        """
        tokens = self.encode(batch, drop)
        post, prior = self.observe(batch, noise, tokens)
        losses, metrics = self.score(post, prior, batch)
        embeds = [embed.detach() for embed, _ in tokens.values()]
        return losses, post | {"embed": embeds[0] if len(embeds) == 1 else torch.cat(embeds, -1)}, metrics

    def score(self, post: State, prior: State, batch: dict) -> tuple[Losses, Metrics]:
        """The losses of states that are known already, for all steps at once (see `loss`)."""
        feat = features(post)
        losses = {}
        present = {key: batch.get(f"present/{key}") for key in self.decoder.keys}
        decoded = self.decoder(self._stop(post, "decoder"))
        for key, target in self.decoder.targets(batch).items():
            loss = decoded[key].loss(target)
            losses[f"rec/{key}"] = loss if present[key] is None else loss * present[key]
        losses["rew"] = self.reward(self._stop(feat, "reward")).loss(batch["reward"])
        goes_on = (~batch["is_terminal"]).to(feat.dtype)
        losses["con"] = self.cont(self._stop(feat, "cont")).loss(goes_on * self.discount if self.contdisc else goes_on)
        dyn, rep = self.rssm.kl(post, prior)
        losses["dyn"], losses["rep"] = dyn.clamp(min=self.kl_free), rep.clamp(min=self.kl_free)
        return losses, self._metrics(losses, present, post, prior, dyn)

    def encode(self, batch: dict, drop: Float[Tensor, "b kinds"] | None = None) -> Tokens:
        """Embeddings of a replayed batch, and where they are there (see `loss`)."""
        tokens = self.encoder(batch)
        if drop is None:
            return tokens
        kept = (drop >= self.modality_dropout).unbind(-1)
        return {
            kind: (embed, present & keep[:, None])
            for (kind, (embed, present)), keep in zip(tokens.items(), kept, strict=True)
        }

    def observe(self, batch: dict, noise: Tensor | None = None, tokens: Tokens | None = None) -> tuple[State, State]:
        """Posterior and prior states [B, T, ...] of a replayed batch, from its stored context. `tokens`: its
        embeddings, if they are known.
        """
        context = batch["context"]
        # A window whose context has no stored latent starts like an episode does: zero state, zero previous action.
        is_first = torch.cat([batch["is_first"][:, :1] | ~context["valid"][:, None], batch["is_first"][:, 1:]], 1)
        prev_action = torch.cat([context["action"][:, None], batch["action"][:, :-1]], 1)
        state = self.unpack(context["deter"], context["stoch"])
        return self.rssm.observe(tokens or self.encode(batch), prev_action, is_first, state, noise)

    def unpack(self, deter: Tensor, stoch: Tensor) -> State:
        """Latents as stored (half precision, class indices) to a state."""
        dtype = self.rssm.post_out.weight.dtype
        if self.rssm.discrete:
            stoch = one_hot(stoch.long(), self.rssm.discrete, dtype)
        return {"deter": deter.to(dtype), "stoch": stoch.to(dtype)}

    def pack(self, state: State) -> tuple[Tensor, Tensor]:
        """A state to latents as stored: deter in half precision, stoch as one class index per variable."""
        stoch = state["stoch"].detach()
        return state["deter"].detach().half(), stoch.argmax(-1).to(torch.uint8) if self.rssm.discrete else stoch.half()

    def imagine(self, start: State, policy: Policy, carry: object, horizon: int, noise: dict) -> dict[str, Tensor]:
        """Rolls out `policy(feat, carry, is_first, noise) -> action, carry` in the prior.

        Args:
            start: states [N, ...].
            noise: `prior` [horizon, N, *noise_shape] and `action` [horizon + 1, N, action].
        Returns:
            `feat` [N, horizon + 1, feat] and `action` [N, horizon + 1, action]: one more action is chosen at the last
            state.
        """
        state, feats, actions = start, [features(start)], []
        is_first = torch.zeros(len(start["deter"]), dtype=torch.bool, device=start["deter"].device)
        layout = self.rssm.layout()
        for step in range(horizon + 1):
            action, carry = policy(feats[-1], carry, is_first, noise["action"][step])
            actions.append(action)
            if step < horizon:
                state = self.rssm.img_step(state, action, noise["prior"][step], layout)
                feats.append(features(state))
        return {"feat": torch.stack(feats, 1), "action": torch.stack(actions, 1)}

    @torch.no_grad()
    def predict(self, batch: dict, context: int) -> dict[str, Tensor]:
        """Open-loop prediction: posterior for `context` steps, then the prior under the recorded actions.

        Returns {key: [B, T, ...]} of the modes of all decoded observations (`MultiDecoder.targets` has the truth).
        """
        post, _ = self.observe(batch)
        last = {key: post[key][:, context - 1] for key in ("deter", "stoch")}
        prior = self.rssm.imagine(batch["action"][:, context - 1 : -1], last)
        state = {key: torch.cat([post[key][:, :context], prior[key]], 1) for key in ("deter", "stoch")}
        return {key: dist.mode() for key, dist in self.decoder(state).items()}

    def _stop(self, x, head: str):
        if head in self.grad_heads:
            return x
        return {key: value.detach() for key, value in x.items()} if isinstance(x, dict) else x.detach()

    @torch.no_grad()
    def _metrics(
        self, losses: Losses, present: dict[str, Tensor | None], post: State, prior: State, kl: Tensor
    ) -> Metrics:
        recon = {key[len("rec/") :]: loss.mean() for key, loss in losses.items() if key.startswith("rec/")}
        # The mean over steps that have it: what is absent counts 0 in the loss, and says nothing about the model.
        nats = {
            key: loss if present[key] is None else loss / present[key].to(loss.dtype).mean().clamp(min=1e-6)
            for key, loss in recon.items()
        }
        kinds = {kind: sum(nats[key] for key in keys) for kind, keys in self.decoder.kinds.items()}
        return {
            **{f"world/recon_{key}": loss for key, loss in recon.items()},
            "world/recon_loss": sum(recon.values()),  # last: an observation may be called loss
            **{f"world/nats_{kind}": loss for kind, loss in kinds.items()},
            "world/reward_loss": losses["rew"].mean(),
            "world/cont_loss": losses["con"].mean(),
            "world/kl_loss": kl.mean(),
            "world/dyn_loss": losses["dyn"].mean(),
            "world/rep_loss": losses["rep"].mean(),
            "world/prior_entropy": self.rssm.entropy(prior).mean(),
            "world/post_entropy": self.rssm.entropy(post).mean(),
        }


MultimodalWorldModel = WorldModel  # one class, whatever the number of kinds


class Intrinsic(nn.Module):
    """An intrinsic reward: what it learns from replayed posteriors, and what it pays for imagined transitions.

    Nothing that it learns reaches the world model. `exploration.py` has those that come with the project.
    """

    in_unit = False  # whether its rewards are of order one by themselves

    @property
    def learns(self) -> bool:
        """Whether it has a loss."""
        return type(self).loss is not Intrinsic.loss or type(self).imagined_loss is not Intrinsic.imagined_loss

    def noise(self, batch: int, time: int, draw) -> dict[str, Tensor]:
        """The random numbers of one `loss`; `draw` has `latent`, `action` and `uniform`, each of leading sizes."""
        return {}

    def loss(self, world_model: WorldModel, post: State, batch: dict, noise: dict) -> tuple[Tensor, Metrics] | None:
        """What is minimised on the replay, [B, ...], and metrics (`intrinsic/<name>`); None for nothing. `post`
        [B, T, ...] has no gradient, and an entry `embed`, what the encoder saw.
        """
        return None

    def imagined_loss(self, world_model: WorldModel, traj: dict[str, Tensor]) -> tuple[Tensor, Metrics] | None:
        """The same on imagined trajectories, [N, H], which have no gradient either. The world model is not held still
        here, as in `loss`: what is asked of it, under `torch.no_grad`.
        """
        return None

    def forward(self, world_model: WorldModel, traj: dict[str, Tensor]) -> Float[Tensor, "n h"]:
        """Rewards, entry t for the transition (s_t, a_t, s_{t+1}) of a trajectory of `WorldModel.imagine`."""
        raise NotImplementedError


class Stream(nn.Module):
    """One stream of rewards with its own critic, slow critic and return normaliser. An intrinsic reward is in units of
    its root mean square so far, unless it comes in one (`in_unit`): disagreement is about 1e-3, and a two-hot critic's
    bins are a hundred times as wide.

    Args:
        reward: (world_model, trajectory) -> [N, H], entry t for the transition (s_t, a_t, s_{t+1}); or an `Intrinsic`.
        scale: weight of this stream's advantage.
        discount: per agent step.
        critic: options of the value head; `slow_*` options say how the slow critic is used and moves.
        retnorm: options of the return normaliser, or None for none.
    """

    def __init__(
        self,
        reward: Callable,
        feat_size: int,
        *,
        scale: float,
        discount: float,
        critic: Mapping,
        retnorm: Mapping | None,
    ):
        super().__init__()
        critic = dict(critic)
        self.slow_regularizer = critic.pop("slow_regularizer")
        self.slow_target = critic.pop("slow_target")
        every, fraction = critic.pop("slow_target_update"), critic.pop("slow_target_fraction")
        self.reward, self.scale, self.discount = reward, scale, discount
        self.critic = ScalarHead(feat_size, **critic)
        self.slow_critic = SlowTarget(self.critic, fraction, every)
        # The floor that leaves small task returns small would silence intrinsic ones.
        floor = {"limit": 1e-8, "debias": True} if isinstance(reward, Intrinsic) else {}
        self.retnorm = ReturnNormalizer(**{**retnorm, **floor}) if retnorm else None
        self.unit = RootMeanSquare() if isinstance(reward, Intrinsic) and not reward.in_unit else None

    def rewards(self, world_model: WorldModel, traj: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The rewards [N, H] of a trajectory in their unit, which they join, and as they are."""
        reward = full_precision(self.reward(world_model, traj))
        if self.unit is None:
            return reward, reward
        self.unit.update(reward)
        return reward / self.unit.value, reward

    def slow_value(self, feat: Tensor) -> Float[Tensor, "b states"]:
        """The slow critic's values."""
        return self.slow_critic(feat.detach()).mode()

    def value_loss(self, dist, target: Float[Tensor, "b t"], slow: Float[Tensor, "b states"]) -> Float[Tensor, "b t+1"]:
        """Critic loss against the returns of all but the last state, and `slow_value`. The last entry is void."""
        padded = F.pad(target.detach(), (0, 1))
        return mixed_loss(dist, (padded, slow), (1.0, self.slow_regularizer))

    def target_value(self, feat: Tensor) -> Tensor:
        """Values that returns are bootstrapped with, with gradient to `feat`."""
        return (self.slow_critic.model if self.slow_target else self.critic)(feat).mode()

    def normalized(self, advantage: Tensor) -> Tensor:
        return advantage / self.retnorm.scale if self.retnorm else advantage


def extrinsic_reward(world_model: WorldModel, traj: dict[str, Tensor]) -> Float[Tensor, "n h"]:
    """The reward head's expectation. Here, once, the reward of *arriving* at s_{t+1} becomes entry t."""
    return world_model.reward(traj["feat"]).mode()[:, 1:]


class Behavior(nn.Module):
    """What is learned in imagination: policies, and `streams` of rewards with a critic each.

    Subclasses have `imag_horizon`, `imag_last`, `extra` (numbers that are drawn beside an action's), `actors`,
    `initial`, `policy` and `loss`, as `ImagBehavior`.
    """

    streams: nn.ModuleDict

    @property
    def intrinsic(self) -> dict[str, Intrinsic]:
        """The intrinsic rewards of the streams."""
        return {name: stream.reward for name, stream in self.streams.items() if isinstance(stream.reward, Intrinsic)}

    def draw_noise(self, batch: int, time: int, draw) -> dict:
        """The random numbers of one `loss`: `prior` [H, N, ...], `action` [H+1, N, action], and the intrinsic rewards'
        own. `draw`: see `Intrinsic.noise`.
        """
        starts = batch * self.starts(time)
        noise = {
            "prior": draw.latent(self.imag_horizon, starts),
            "action": draw.action(self.imag_horizon + 1, starts, extra=self.extra),
        }
        own = {name: reward.noise(batch, time, draw) for name, reward in self.intrinsic.items()}
        return noise | {name: numbers for name, numbers in own.items() if numbers}

    def starts(self, time: int) -> int:
        """How many states of a window of `time` steps are imagined from."""
        return min(self.imag_last or time, time)

    def after_step(self) -> None:
        """Call after every optimizer step: the slow critics follow."""
        for stream in self.streams.values():
            stream.slow_critic.update(stream.critic)


class ImagBehavior(Behavior):
    """Actor and critic learned from imagined trajectories that start at every replayed state.

    Args:
        feat_size, action_size, classes: widths of state and action; sizes of the discrete groups, empty for continuous.
        imag_horizon: imagined steps.
        imag_last: imagine from the last states of each window only, 0 for all; `repval` then counts for these alone.
        imag_gradient: reinforce, dynamics (gradient of the return through model and sampled actions), or both.
        imag_gradient_mix: share of dynamics in both.
        horizon, contdisc: the discount is 1 - 1/horizon, inside the continue head's prediction if `contdisc`.
        reward_EMA: scale advantages by the moving range of returns.
        actor_objective: reinforce, or ppo: `rollouts` then has what `ppo.improve` goes on with.
        rewards: {stream: (its reward, see `Stream`, the weight of its advantage, and its horizon in agent steps, None
            for `horizon`)}; none for the task's alone.
        extra: numbers that actor and critics are given beyond the state (see `see`); as many join an action's noise.
    """

    def __init__(
        self,
        feat_size: int,
        action_size: int,
        classes: Sequence[int],
        *,
        actor: Mapping,
        critic: Mapping,
        retnorm: Mapping,
        imag_horizon: int = 15,
        imag_last: int = 0,
        imag_gradient: str = "reinforce",
        imag_gradient_mix: float = 0.1,
        horizon: float = 333,
        contdisc: bool = True,
        discount_lambda: float = 0.95,
        reward_EMA: bool = True,
        actor_objective: str = "reinforce",
        rewards: Mapping[str, tuple[Callable, float, float | None]] | None = None,
        extra: int = 0,
    ):
        super().__init__()
        self.extra = extra
        actor = dict(actor)
        self.entropy_scale = actor.pop("entropy")
        self.action_size = action_size
        self.actor = Actor(feat_size + self.extra, action_size, classes, **actor)
        self.discount, self.contdisc, self.lam = 1 - 1 / horizon, contdisc, discount_lambda
        if imag_last == 1:
            raise UserError(
                "imag_last: 1 leaves no transition for the replay value loss; expected 0 (all) or at least 2."
            )
        if actor_objective == "ppo" and imag_gradient != "reinforce":
            raise UserError(
                f"actor_objective: ppo scores actions by their probability; imag_gradient is {imag_gradient}: "
                "give --imag_gradient reinforce."
            )
        self.ppo, self.rollouts = actor_objective == "ppo", []
        self.weight_discount = self.discount  # what later states count less by in all losses
        self.keeps, self.imagined = False, {}  # whether the last trajectory is kept for meta-gradients, and it
        self.imag_horizon, self.imag_last = imag_horizon, imag_last
        self.dynamics_share = {"reinforce": 0.0, "dynamics": 1.0, "both": imag_gradient_mix}[imag_gradient]
        options = {"critic": critic, "retnorm": retnorm if reward_EMA else None}
        self.streams = nn.ModuleDict(
            {
                name: Stream(reward, feat_size + self.extra, scale=scale, discount=1 - 1 / (own or horizon), **options)
                for name, (reward, scale, own) in (rewards or {"extrinsic": (extrinsic_reward, 1.0, None)}).items()
            }
        )

    @property
    def actors(self) -> dict[str, Actor]:
        return {"actor": self.actor}

    def initial(self, batch: int) -> None:
        """The flat policy carries nothing between steps."""
        return None

    def see(self, feat: Tensor, carry, is_first: Tensor, noise: Tensor | None) -> tuple[Tensor, object]:
        """What actor and critics are given at a state, [*b, feat + extra], and what is carried on from there."""
        return feat, carry

    def policy(self, feat: Tensor, carry, is_first: Tensor, noise: Tensor | None) -> tuple[Tensor, object]:
        """Action [*b, action] drawn with `noise` [*b, action + extra] (the mode if None)."""
        seen, carry = self.see(feat, carry, is_first, noise)
        dist = self.actor(seen)
        return (dist.mode() if noise is None else dist.sample(noise[..., : self.action_size])), carry

    def loss(self, world_model: WorldModel, post: State, batch: dict, noise: dict) -> tuple[Losses, Metrics]:
        """Losses `policy`, `value` [B, T] (means over the horizon) and `repval` [B, T-1]; T is `imag_last`, if set. The
        task's stream has these names, another one's value loss is `value/<stream>`, and what an intrinsic reward learns
        by is `intrinsic/<stream>`.

        Args:
            post: posterior states [B, T, ...]: starts of imagination without gradient, the replay value loss with it.
            noise: as in `WorldModel.imagine`.
        """
        losses, metrics = replayed(self.intrinsic, world_model, post, batch, noise)
        starts = self.starts(batch["reward"].shape[1])
        post = {key: post[key][:, -starts:] for key in ("deter", "stoch")}
        batch = {key: batch[key][:, -starts:] for key in ("reward", "is_last", "is_terminal")}
        start = {key: value.detach().flatten(0, 1) for key, value in post.items()}
        backprop = self.dynamics_share > 0
        with frozen(world_model) if backprop else torch.no_grad():
            seen, scores = [], []
            policy, carry = self._rollout_policy(seen, scores), self.initial(len(start["deter"]))
            traj = world_model.imagine(start, policy, carry, self.imag_horizon, noise)
            traj["seen"] = torch.stack(seen, 1) if self.extra else traj["feat"]
        log_prob, entropy = (torch.stack(steps[:-1], 1) for steps in zip(*scores, strict=True))
        traj |= {"log_prob": log_prob, "entropy": entropy}
        more, found, kept = self.learn(world_model, traj, post, batch)
        given = {"seen": traj["seen"].detach(), "action": traj["action"][:, :-1].detach()}
        if self.ppo:
            given |= {"log_prob": log_prob.detach(), "advantage": kept["advantage"], "weight": kept["weight"]}
            targets = {name: (of["return"], of["slow"]) for name, of in kept["streams"].items()}
            self.rollouts = [Rollout(self.actor, self.streams, self.entropy_scale, targets=targets, **given)]
        if self.keeps:
            self.imagined = kept | given | {"replay": batch | {key: x.detach() for key, x in post.items()}}
        return losses | more, metrics | found

    def learn(
        self, world_model: WorldModel, traj: dict[str, Tensor], post: State, batch: dict
    ) -> tuple[Losses, Metrics, dict]:
        """The losses of a trajectory that was imagined already, for all steps at once (see `loss`); metrics; and what
        they were made of: `advantage`, `weight` [N, H], `cont` [N, H+1], and `streams` {stream: `reward`, `return`,
        `value` [N, H], `boot`, `slow` [N, H+1]}.

        `traj` is `WorldModel.imagine`'s, what actor and critics saw there, `seen`, and `log_prob`, `entropy` [N, H] of
        its actions, with gradient to the actor.
        """
        shape, backprop = batch["reward"].shape, self.dynamics_share > 0
        with frozen(world_model) if backprop else torch.no_grad():
            cont = world_model.cont(traj["feat"]).prob
        seen, entropy = traj["seen"].detach(), traj["entropy"]
        weight = self._weight(cont).detach()[:, :-1]

        losses, metrics, streams, advantage = {}, {}, {}, 0.0
        for name, stream in self.streams.items():
            dist = stream.critic(seen)
            value = baseline = dist.mode().detach()
            with frozen(world_model, stream) if backprop else torch.no_grad():
                if backprop or stream.slow_target:
                    value = stream.target_value(traj["seen"])
                reward, raw = stream.rewards(world_model, traj)
                ret = lambda_return(reward, value, self.live(cont, stream.discount)[:, 1:], self.lam)
            kept = {"reward": reward, "boot": value, "value": baseline[:, :-1], "return": ret}
            kept |= {"slow": stream.slow_value(seen)}
            streams[name] = {key: x.detach() for key, x in kept.items()}
            if stream.retnorm:
                stream.retnorm.update(ret)
            advantage = advantage + stream.scale * stream.normalized(ret - baseline[:, :-1])
            suffix = "" if name == "extrinsic" else f"/{name}"
            value_loss = (weight * stream.value_loss(dist, ret, kept["slow"])[:, :-1]).mean(1)
            losses[f"value{suffix}"] = value_loss.unflatten(0, shape)
            metrics[f"policy/value_loss{suffix}"] = value_loss.detach().mean()
            if stream.reward is extrinsic_reward and not self.extra:  # what was seen beyond the state is not replayed
                boot = ret[:, 0].detach().unflatten(0, shape)
                losses["repval"] = self._replay_value_loss(stream, world_model, post, batch, boot)
                metrics["policy/repval_loss"] = losses["repval"].detach().mean()
            metrics |= self._stream_metrics(suffix, ret, baseline, raw)

        more, found = imagined(self.intrinsic, world_model, traj)
        losses, metrics = losses | more, metrics | found
        objective = self._objective(traj["log_prob"], advantage)
        losses["policy"] = -(weight * (objective + self.entropy_scale * entropy)).mean(1).unflatten(0, shape)
        metrics |= {
            "policy/policy_loss": losses["policy"].detach().mean(),
            "policy/entropy": entropy.detach().mean(),
            "policy/advantage": advantage.detach().mean(),
            "policy/advantage_std": advantage.detach().std(),
            "policy/cont": cont.detach().mean(),
        }
        kept = {"advantage": advantage.detach(), "weight": weight, "cont": cont.detach(), "streams": streams}
        return losses, metrics, kept

    def _rollout_policy(self, seen: list[Tensor], scores: list[tuple[Tensor, Tensor]]) -> Policy:
        """The policy in imagination. What it sees joins `seen`; the log-probabilities and entropies of what it does,
        with gradient to the actor, join `scores`: the actor is evaluated once per state, to act and to learn.
        """

        def policy(feat: Tensor, carry, is_first: Tensor, noise: Tensor) -> tuple[Tensor, object]:
            given, carry = self.see(feat, carry, is_first, noise)
            action, *score = self._act_and_score(given, noise[..., : self.action_size])
            seen.append(given)
            scores.append(score)
            return (action if torch.is_grad_enabled() else action.detach()), carry

        return policy

    @torch.enable_grad()
    def _act_and_score(self, feat: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sampled actions [N, action], their log-probability and the policy's entropy [N].

        Gradient reaches the actor through its actions' consequences, not through the states it has looked at."""
        dist = self.actor(feat.detach())
        action = dist.sample(noise)
        return action, dist.log_prob(action.detach()), dist.entropy()

    def live(self, cont: Tensor, discount: float | Tensor) -> Tensor:
        """Discount times probability of going on; `cont` already holds the task's discount if `contdisc`. Another one
        may be above the task's, so that the probability alone is kept below 1.
        """
        if not self.contdisc:
            return cont * discount
        if not isinstance(discount, Tensor) and discount == self.discount:
            return cont
        return (cont / self.discount).clamp(max=1) * discount

    def _weight(self, cont: Float[Tensor, "n states"]) -> Float[Tensor, "n states"]:
        """Discounted probability of being in each state, before its action's outcome: cumprod(disc cont) / disc."""
        discount = self.weight_discount / self.discount if self.contdisc else self.weight_discount
        return torch.cumprod(self.live(cont, self.weight_discount), 1) / discount

    def _objective(self, log_prob: Float[Tensor, "n h"], advantage: Float[Tensor, "n h"]) -> Float[Tensor, "n h"]:
        reinforce = log_prob * advantage.detach()
        share = self.dynamics_share
        return reinforce if not share else share * advantage + (1 - share) * reinforce

    def _replay_value_loss(
        self, stream: Stream, world_model: WorldModel, post: State, batch: dict, boot: Float[Tensor, "b t"]
    ) -> Float[Tensor, "b t-1"]:
        """Critic loss on the replayed states and rewards; `boot` is the imagined return of each state.

        R_t = r_{t+1} + disc (1 - is_terminal_{t+1}) ((1 - λ_t) boot_{t+1} + λ_t R_{t+1}), λ_t = λ (1 - is_last_{t+1}).
        """
        feat = features(post)
        feat = feat if "critic" in world_model.grad_heads else feat.detach()
        last, terminal = (batch[key].to(boot.dtype)[:, 1:] for key in ("is_last", "is_terminal"))
        ret = lambda_return(batch["reward"][:, 1:], boot, stream.discount * (1 - terminal), self.lam * (1 - last))
        loss = stream.value_loss(stream.critic(feat), ret, stream.slow_value(feat))[:, :-1]
        return loss * (~batch["is_last"][:, :-1]).to(loss.dtype)

    @torch.no_grad()
    def _stream_metrics(self, suffix: str, ret: Tensor, value: Tensor, reward: Tensor) -> Metrics:
        return {
            f"policy/return{suffix}": ret.mean(),
            f"policy/value{suffix}": value.mean(),
            f"policy/reward{suffix}": reward.mean(),
        }


def replayed(
    rewards: Mapping[str, Intrinsic], world_model: WorldModel, post: State, batch: dict, noise: dict
) -> tuple[Losses, Metrics]:
    """What intrinsic rewards learn from replayed states: losses `intrinsic/<name>` [B, ...], and metrics."""
    losses, metrics = {}, {}
    still = {key: value.detach() for key, value in post.items()}
    for name, reward in rewards.items():
        with frozen(world_model):
            found = reward.loss(world_model, still, batch, noise.get(name, {}))
        if found is not None:
            losses[f"intrinsic/{name}"] = found[0]
            metrics |= {f"intrinsic/{key}": value for key, value in found[1].items()}
    return losses, metrics


def imagined(
    rewards: Mapping[str, Intrinsic], world_model: WorldModel, traj: dict[str, Tensor]
) -> tuple[Losses, Metrics]:
    """What they learn from imagined trajectories: losses `intrinsic/<name>/imagined` [N, H], and metrics."""
    losses, metrics = {}, {}
    still = {key: value.detach() for key, value in traj.items()}
    for name, reward in rewards.items():
        if (found := reward.imagined_loss(world_model, still)) is not None:
            losses[f"intrinsic/{name}/imagined"] = found[0]
            metrics |= {f"intrinsic/{key}": value for key, value in found[1].items()}
    return losses, metrics


def total_loss(losses: Losses, scales: Mapping[str, float]) -> Float[Tensor, ""]:
    """Sum of the scaled means. `rec/<key>` takes the scale `rec`, unless it has one of its own.

    Raises KeyError for a loss without a scale or a scale without a loss.
    """
    used = {name: name if name in scales else name.split("/")[0] for name in losses}
    missing, unused = set(used.values()) - set(scales), set(scales) - set(used.values())
    if missing or unused:
        raise KeyError(f"Losses without a scale: {sorted(missing)}; scales without a loss: {sorted(unused)}")
    return sum(loss.mean() * scales[used[name]] for name, loss in losses.items())


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Gradient flows through these modules, but not into their parameters."""
    params = [p for module in modules for p in module.parameters() if p.requires_grad]
    for p in params:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in params:
            p.requires_grad_(True)
