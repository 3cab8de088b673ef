"""The networks of the world model: encoders of observations, the latent state's dynamics, decoders of observations.

`MultiEncoder` turns each kind of observation into one embedding with a presence flag, `RSSM` (recurrent state-space
model) keeps the latent state (by a cell of `recurrence.py`) and joins the embeddings (by a fusion of `fusion.py`),
`MultiDecoder` predicts observations from the state.

A latent state is a dict: `deter` [*b, deter], `stoch` [*b, stoch, classes] (one-hot; [*b, stoch] for Gaussian latents),
and the statistics it was drawn from: `logit` [*b, stoch, classes], or `mean` and `std` [*b, stoch].
Arrays are batch first, [batch, time, ...]. Randomness is an input: Gumbel noise [*b, stoch, classes] for categorical
latents, standard normal [*b, stoch] for Gaussian ones, zeros for the mode.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from distributions import Normal, OneHot, full_precision
from errors import UserError
from fusion import FUSIONS, Inputs, Tokens, product_of_experts
from layers import MLP, Linear, recomputed
from modalities import ModalityConfig, active, select
from recurrence import CELLS, Product, Weights, half, late, product

State = dict[str, Tensor]


class MultiEncoder(nn.Module):
    """One encoder per kind of observation. `sizes` maps each kind to the width of its embedding.

    Args:
        spaces: {observation key: gymnasium space}.
        modalities: the active kinds, see `modalities.active`.
        embed_dim: width of every kind's embedding; None: what its encoder gives.
        options: the rest of the encoder's section of the configuration, with `<kind>_keys` patterns; each kind takes
            what it knows.
    """

    def __init__(
        self,
        spaces: dict,
        *,
        modalities: Sequence[str] | Mapping[str, ModalityConfig] = (),
        embed_dim: int | None = None,
        **options,
    ):
        super().__init__()
        kinds = active(modalities)
        if embed_dim is not None:
            kinds = {name: dataclasses.replace(kind, embed_dim=embed_dim) for name, kind in kinds.items()}
        self.kinds = select(spaces, kinds, options, "encoder")
        lacking = [] if isinstance(modalities, Mapping) else [name for name in modalities if name not in self.kinds]
        if lacking:
            raise UserError(
                f"modalities names {', '.join(lacking)}, and the environment gives no such observation, only "
                f"{', '.join(spaces)}."
            )
        self.encoders = nn.ModuleDict({name: kinds[name].encoder(own, options) for name, own in self.kinds.items()})
        self.sizes = {kind: encoder.out_size for kind, encoder in self.encoders.items()}

    def forward(self, obs: dict[str, Tensor]) -> Tokens:
        """Embeds {key: [*b, ...]}. `present/<key>` [*b] flags say which were there; without a flag, all were."""
        present = {key[len("present/") :]: value for key, value in obs.items() if key.startswith("present/")}
        return {kind: (encoder(obs, present), self._any(kind, obs, present)) for kind, encoder in self.encoders.items()}

    def _any(self, kind: str, obs: dict[str, Tensor], present: dict[str, Tensor]) -> Bool[Tensor, "*b"]:
        """A kind is present where any of its keys is."""
        keys = list(self.kinds[kind])
        flags = [present[key].bool() for key in keys if key in present]
        if len(flags) < len(keys):
            first, space = obs[keys[0]], self.kinds[kind][keys[0]]
            return torch.ones(first.shape[: first.ndim - len(space.shape)], dtype=torch.bool, device=first.device)
        return torch.stack(flags).any(0)


class MultiDecoder(nn.Module):
    """One decoder per kind of observation; `forward` gives {key: distribution} and `targets` what they are scored on.

    Args:
        deter, stoch: widths of the deterministic and of the flattened stochastic state.
    """

    def __init__(
        self,
        spaces: dict,
        deter: int,
        stoch: int,
        *,
        modalities: Sequence[str] | Mapping[str, ModalityConfig] = (),
        **options,
    ):
        super().__init__()
        kinds = active(modalities)
        chosen = select(spaces, kinds, options, "decoder")
        self.kinds = {name: own for name, own in chosen.items() if kinds[name].decoder_type is not None}
        if not self.kinds:
            raise UserError(f"None of the active kinds ({', '.join(chosen)}) is predicted: one needs a decoder_type.")
        self.shows = {name: kinds[name].show for name in self.kinds}
        self.scales = {name: kinds[name].loss_scale for name in self.kinds}
        self.decoders = nn.ModuleDict(
            {name: kinds[name].decoder(own, deter, stoch, options) for name, own in self.kinds.items()}
        )

    @property
    def keys(self) -> list[str]:
        """The observation keys that are predicted."""
        return [key for chosen in self.kinds.values() for key in chosen]

    def forward(self, state: State) -> dict:
        """State [*b, ...] -> {key: distribution over [*b, ...]}."""
        stoch = flatten_stoch(state)
        return {k: dist for decoder in self.decoders.values() for k, dist in decoder(state["deter"], stoch).items()}

    def targets(self, obs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: self.decoders[kind].target(key, obs[key]) for kind, chosen in self.kinds.items() for key in chosen}


def flatten_stoch(state: State) -> Float[Tensor, "*b stoch"]:
    """[*b, stoch * classes], whether latents are categorical or Gaussian."""
    extra = state["stoch"].ndim - state["deter"].ndim
    return state["stoch"].flatten(-1 - extra)


def features(state: State) -> Float[Tensor, "*b feat"]:
    """What heads, actor and critic see: [deter, flattened stoch]."""
    return torch.cat([state["deter"], flatten_stoch(state)], -1)


class RSSM(nn.Module):
    """Recurrent state-space model: `deter` follows the past, `stoch` is what is seen (posterior) or expected (prior).

    Args:
        sizes: width of each kind's embedding (`MultiEncoder.sizes`).
        action: width of the action vector.
        cell: block_gru, or gru (2023).
        fusion: concat, attention or poe (product of experts; needs categorical latents).
        stoch, discrete: latent variables and classes of each; `discrete` 0 makes them Gaussian with deviations above
            `min_std`.
        obs_layers, img_layers, dyn_layers: hidden layers of posterior, prior and recurrence.
        unimix_ratio: share of the uniform distribution in every categorical.
        recompute: keep the states of a scan and what its products are given, but no other activations, which the
            backward pass computes again.
    """

    def __init__(
        self,
        sizes: dict[str, int],
        action: int,
        *,
        deter: int,
        hidden: int,
        stoch: int,
        discrete: int,
        blocks: int = 8,
        cell: str = "block_gru",
        fusion: str = "concat",
        dyn_layers: int = 1,
        obs_layers: int = 1,
        img_layers: int = 2,
        unimix_ratio: float = 0.01,
        min_std: float = 0.1,
        act: str = "silu",
        recompute: bool = False,
    ):
        super().__init__()
        self.recompute = recompute
        self.stride = 1  # steps of the posterior's scan that are run as one, see `execution.py`
        if cell == "block_gru" and deter % blocks:
            raise ValueError(f"deter ({deter}) must be a multiple of blocks ({blocks}).")
        self.deter, self.stoch, self.discrete = deter, stoch, discrete
        self.unimix, self.min_std = unimix_ratio, min_std
        self.stoch_size = stoch * max(1, discrete)
        self.feat_size = deter + self.stoch_size
        stats = stoch * (discrete or 2)
        self.core = CELLS[cell](
            deter, self.stoch_size, action, hidden=hidden, blocks=blocks, layers=dyn_layers, act=act
        )
        self.fusion = FUSIONS[fusion](deter, sizes, hidden=hidden, layers=obs_layers, act=act)
        if self.fusion.experts and not discrete:
            raise UserError("encoder.fusion: poe multiplies categoricals, and dyn.discrete is 0; use another fusion.")
        self.post_out = Linear(hidden, stats)
        self.prior_net = MLP(deter, hidden, img_layers, act)
        self.prior_out = Linear(self.prior_net.out_size, stats)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of the noise that one latent state is drawn with."""
        return (self.stoch, self.discrete) if self.discrete else (self.stoch,)

    def initial(self, batch: int) -> State:
        """The zero state that every episode starts from."""
        weight = self.post_out.weight
        zeros = {"deter": weight.new_zeros(batch, self.deter), "stoch": weight.new_zeros(batch, *self.noise_shape)}
        return zeros

    def observe(
        self,
        tokens: Tokens,
        action: Float[Tensor, "b t action"],
        is_first: Bool[Tensor, "b t"],
        state: State | None = None,
        noise: Float[Tensor, "b t ..."] | None = None,
    ) -> tuple[State, State]:
        """Posterior and prior states of a sequence, both [b, t, ...] (the prior has statistics only).

        Args:
            action: the action taken *before* each step, a_{t-1}.
            state: latent state before the first step; zeros if not given.
            noise: [b, t, *noise_shape]; without it every latent is the mode.
        """
        batch, time = is_first.shape
        state = state or self.initial(batch)
        products, weights = self.layout()
        inputs = self._inputs(action, is_first)
        fused, seen = self.fusion.prepare(tokens, weights)
        products, given = late(products | fused, batch, time)
        seen = list(zip(*(x.unbind(1) for x in seen), strict=True)) if seen else [()] * time
        noises = [None] * time if noise is None else noise.unbind(1)
        scan = recomputed(self._obs_steps) if self.recompute else self._obs_steps
        inputs = list(zip(*(x.unbind(1) for x in inputs), seen, noises, products, strict=True))
        steps = []
        for first in range(0, time, self.stride):
            states, used = scan(state, inputs[first : first + self.stride], weights)
            state = states[-1]
            steps += states
            for step in used:
                for name, x in step.items():
                    given[name].append(x.detach())
        post = {key: torch.stack([step[key] for step in steps], 1) for key in steps[0]}
        return post, {"logit": post.pop("prior")} if "prior" in post else self.prior(post["deter"])

    def imagine(
        self, action: Float[Tensor, "b t action"], state: State, noise: Float[Tensor, "b t ..."] | None = None
    ) -> State:
        """Open-loop prior states [b, t, ...] after each of the given actions."""
        layout = self.layout()
        noises = [None] * action.shape[1] if noise is None else noise.unbind(1)
        steps = []
        for act, noise in zip(action.unbind(1), noises, strict=True):
            state = self.img_step(state, act, noise, layout)
            steps.append(state)
        return {key: torch.stack([step[key] for step in steps], 1) for key in steps[0]}

    def obs_step(
        self,
        state: State,
        action: Float[Tensor, "b action"],
        tokens: Tokens,
        is_first: Bool[Tensor, " b"],
        noise: Tensor | None = None,
        layout: tuple[dict[str, Product], Weights] | None = None,
    ) -> State:
        """Posterior after one observation: state and previous action are zeroed where `is_first`.

        `layout`: that of the current weights, if it was made already.
        """
        products, weights = layout or self.layout()
        fused, seen = self.fusion.prepare(tokens, weights)
        inputs = self._inputs(action, is_first)
        state, _ = self._obs_step(state, *inputs, seen, noise, products | fused, weights)
        state.pop("prior", None)
        return state

    def img_step(
        self,
        state: State,
        action: Float[Tensor, "b action"],
        noise: Tensor | None = None,
        layout: tuple[dict[str, Product], Weights] | None = None,
    ) -> State:
        """Prior after one action. `layout`: that of the current weights, if it was made already."""
        deter, stats = self._expect(state, action, *(layout or self.layout()))
        return {"deter": deter, "stoch": self.draw(stats, noise), **stats}

    def layout(self) -> tuple[dict[str, Product], Weights]:
        """The weights as the steps of a scan read them. Made once per scan: slicing and joining them at every step
        would cost as much as the products do, and again in the backward pass.
        """
        products, weights = self.core.layout()
        weight, bias = half(self.post_out.weight).t(), self.post_out.bias
        if experts := self.fusion.experts:  # each of them reads its latents off by the same weights
            weight, bias = weight.expand(experts, *weight.shape), bias.expand(experts, 1, -1)
        products["post"] = (weight, bias)
        return products, weights | self.fusion.layout()

    def prior(self, deter: Float[Tensor, "*b deter"]) -> State:
        """Statistics of the stochastic state as expected from the deterministic one."""
        return self._stats(self.prior_out(self.prior_net(deter)))

    def dist(self, state: State) -> OneHot | Normal:
        """The distribution that a state's `stoch` was (or would be) drawn from."""
        return OneHot(state["logit"], self.unimix) if self.discrete else Normal(state["mean"], state["std"])

    def draw(self, stats: State, noise: Tensor | None) -> Tensor:
        dist = self.dist(stats)
        return (dist.mode() if noise is None else dist.sample(noise)).to(self.post_out.weight.dtype)

    def kl(self, post: State, prior: State) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
        """KL of each step in nats, summed over the latents: (dyn, rep) = KL(sg(post) ‖ prior), KL(post ‖ sg(prior))."""
        post, prior = self.dist(post), self.dist(prior)
        dyn, rep = post.detach().kl(prior), post.kl(prior.detach())
        return (dyn.sum(-1), rep.sum(-1)) if self.discrete else (dyn, rep)

    def entropy(self, state: State) -> Float[Tensor, "*b"]:
        """Entropy in nats, summed over the latents."""
        entropy = self.dist(state).entropy()
        return entropy.sum(-1) if self.discrete else entropy

    def _inputs(self, action: Float[Tensor, "*b action"], is_first: Bool[Tensor, "*b"]) -> tuple[Tensor, Tensor]:
        """The share of the actions, and where the state is kept [*b, 1]: they do not depend on the state."""
        keep = (~is_first).to(action.dtype).unsqueeze(-1)
        return self.core.prepare(bounded(action) * keep), keep

    def _obs_steps(
        self, state: State, inputs: list[tuple], weights: Weights
    ) -> tuple[list[State], list[dict[str, Tensor]]]:
        """`stride` steps of the posterior, run as one. `inputs`: what `_obs_step` takes at each of them."""
        states, used = [], []
        for step in inputs:
            state, given = self._obs_step(state, *step, weights)
            states.append(state)
            used.append(given)
        return states, used

    def _obs_step(
        self,
        state: State,
        action: Tensor,
        keep: Tensor,
        seen: Inputs,
        noise: Tensor | None,
        products: dict[str, Product],
        weights: Weights,
    ) -> tuple[State, dict[str, Tensor]]:
        """One step of the posterior, and what each product was given. `action` is prepared; the state is zeroed where
        `keep` [b, 1] is 0.
        """
        deter, given = self.core.step(state["deter"] * keep, flatten_stoch(state) * keep, action, products, weights)
        hidden, fused = self.fusion.step(deter, seen, products, weights)
        stats = self._stats(product(hidden, *products["post"]))
        if self.fusion.experts:
            prior = self.prior(deter)["logit"]
            stats = {"logit": product_of_experts(prior, stats["logit"], *seen), "prior": prior}
        state = {"deter": deter, "stoch": self.draw(stats, noise), **stats}
        return state, given | fused | {"post": hidden}

    def _expect(
        self, state: State, action: Tensor, products: dict[str, Product], weights: Weights
    ) -> tuple[Tensor, State]:
        """One step of the prior, as far as it is not random: `deter` and the statistics of `stoch`."""
        prepared = self.core.prepare(bounded(action))
        deter, _ = self.core.step(state["deter"], flatten_stoch(state), prepared, products, weights)
        return deter, self.prior(deter)

    def _stats(self, out: Float[Tensor, "*b stats"]) -> State:
        if self.discrete:
            return {"logit": out.unflatten(-1, (self.stoch, self.discrete))}
        mean, std = full_precision(out).chunk(2, -1)
        return {"mean": mean, "std": F.softplus(std) + self.min_std}


def bounded(action: Float[Tensor, "*b action"]) -> Float[Tensor, "*b action"]:
    """Actions beyond ±1 (policies are not squashed) count by their sign, each on its own."""
    return action / action.detach().abs().clamp(min=1.0)
