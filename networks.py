"""The networks of the world model: encoders of observations, the latent state's dynamics, decoders of observations.

`MultiEncoder` turns each kind of observation into one embedding with a presence flag, `RSSM` (recurrent state-space
model) keeps the latent state and owns the fusion of the embeddings, `MultiDecoder` predicts observations from the
state.

A latent state is a dict: `deter` [*b, deter], `stoch` [*b, stoch, classes] (one-hot; [*b, stoch] for Gaussian latents),
and the statistics it was drawn from: `logit` [*b, stoch, classes], or `mean` and `std` [*b, stoch].
Arrays are batch first, [batch, time, ...]. Randomness is an input: Gumbel noise [*b, stoch, classes] for categorical
latents, standard normal [*b, stoch] for Gaussian ones, zeros for the mode.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from distributions import Normal, OneHot, full_precision
from layers import ACTIVATIONS, MLP, BlockLinear, Dense, Linear, RMSNorm, recomputed, rms_norm
from modalities import MODALITY_CONFIGS, select

State = dict[str, Tensor]
Tokens = dict[str, tuple[Tensor, Tensor]]  # kind of observation -> (embedding [*b, size], present [*b])
Weights = dict  # parameters as the steps of a scan read them, by name
Product = tuple[Tensor, Tensor]  # x @ weight + added; in a scan `added` is one step's own (see `late`)


class MultiEncoder(nn.Module):
    """One encoder per kind of observation. `sizes` maps each kind to the width of its embedding.

    Args:
        spaces: {observation key: gymnasium space}.
        mlp_keys, cnn_keys: regular expressions that choose the keys of vectors and images.
        options: the encoder's section of the configuration; each kind takes what it knows.
    """

    def __init__(self, spaces: dict, *, mlp_keys: str = ".*", cnn_keys: str = ".*", **options):
        super().__init__()
        self.kinds = select(spaces, {"mlp_keys": mlp_keys, "cnn_keys": cnn_keys}, "encoder")
        self.encoders = nn.ModuleDict(
            {kind: MODALITY_CONFIGS[kind].encoder(chosen, **options) for kind, chosen in self.kinds.items()}
        )
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

    def __init__(self, spaces: dict, deter: int, stoch: int, *, mlp_keys: str = ".*", cnn_keys: str = ".*", **options):
        super().__init__()
        self.kinds = select(spaces, {"mlp_keys": mlp_keys, "cnn_keys": cnn_keys}, "decoder")
        self.decoders = nn.ModuleDict(
            {
                kind: MODALITY_CONFIGS[kind].decoder(chosen, deter, stoch, **options)
                for kind, chosen in self.kinds.items()
            }
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


class BlockGRU(nn.Module):
    """The recurrence h_t = f(h_{t-1}, z_{t-1}, a_{t-1}) with block-diagonal weights (paper, "Network architecture").

    Each input goes through its own dense layer; every block sees its slice of `deter` and all three results. The gates
    are split inside each block into reset, candidate, update; the update gate is biased towards keeping the state.

    In parts, so that a scan over time repeats only what needs the recurrent state: `layout` lays the weights out as
    the products read them (once per scan), `prepare` is the share of the actions (for all steps at once), `step` the
    rest.
    """

    def __init__(
        self, deter: int, stoch: int, action: int, *, hidden: int, blocks: int, layers: int = 1, act: str = "silu"
    ):
        super().__init__()
        self.blocks, self.act = blocks, ACTIVATIONS[act]
        block = deter // blocks
        self.from_deter = Dense(deter, hidden, act)
        self.from_stoch = Dense(stoch, hidden, act)
        self.from_action = Dense(action, hidden, act)
        self.hidden = nn.ModuleList(
            BlockLinear(blocks, block + 3 * hidden if n == 0 else block, block) for n in range(layers)
        )
        self.norms = nn.ModuleList(RMSNorm(deter) for _ in range(layers))
        self.gates = BlockLinear(blocks, block, 3 * block)

    def layout(self) -> tuple[dict[str, Product], Weights]:
        """Products and other weights. All blocks see the same results of the dense layers: one product, not one per
        block.
        """
        first, dense = self.hidden[0], (self.from_deter, self.from_stoch, self.from_action)
        own, shared = first.weight.split([first.weight.shape[2], first.weight.shape[1] - first.weight.shape[2]], 1)
        gate_bias = self.gates.bias.unflatten(0, (self.blocks, 3, -1)) - gate_offset(self.gates.bias)
        products = {
            "deter": (self.from_deter.linear.weight.t(), self.from_deter.linear.bias),
            "stoch": (self.from_stoch.linear.weight.t(), self.from_stoch.linear.bias),
            "shared": (shared.transpose(0, 1).flatten(1), first.bias),
            **{f"hidden{n}": (layer.weight, self._blocks(layer.bias)) for n, layer in enumerate(self.hidden) if n},
            "gates": (self.gates.weight, gate_bias.flatten(1).unsqueeze(1)),
        }
        return {name: (half(weight), bias) for name, (weight, bias) in products.items()}, {
            "own": half(own),
            "dense_scale": torch.stack([layer.norm.scale for layer in dense]),
            "scales": [self._blocks(norm.scale) for norm in self.norms],
        }

    def prepare(self, action: Float[Tensor, "*b action"]) -> Float[Tensor, "*b hidden"]:
        return self.from_action.linear(action)

    def step(
        self,
        deter: Float[Tensor, "b deter"],
        stoch: Float[Tensor, "b stoch"],
        prepared: Float[Tensor, "b hidden"],
        products: dict[str, Product],
        weights: Weights,
    ) -> tuple[Float[Tensor, "b deter"], dict[str, Tensor]]:
        """The next `deter`, and what each product was given."""
        given = {"deter": deter, "stoch": stoch}
        inputs = torch.stack([product(deter, *products["deter"]), product(stoch, *products["stoch"]), prepared], 1)
        given["shared"] = rms_norm(inputs, weights["dense_scale"], act=self.act).flatten(1)
        shared = self._by_block(product(given["shared"], *products["shared"]))
        # From here on [blocks, b, width]: what a batched product takes and gives, without a copy in between.
        blockwise = self._by_block(deter)
        x = product(blockwise.to(shared.dtype), weights["own"], shared)
        names = [*(name for name in products if name.startswith("hidden")), "gates"]
        for name, scale in zip(names, weights["scales"], strict=True):
            given[name] = rms_norm(x, scale, act=self.act, axes=(0, -1))
            x = product(given[name], *products[name])
        return blend(*x.to(deter.dtype).chunk(3, -1), blockwise).transpose(0, 1).flatten(1), given

    def _blocks(self, vector: Float[Tensor, " size"]) -> Float[Tensor, "blocks 1 own"]:
        return vector.unflatten(0, (self.blocks, 1, -1))

    def _by_block(self, x: Float[Tensor, "b deter"]) -> Float[Tensor, "blocks b own"]:
        return x.unflatten(-1, (self.blocks, -1)).transpose(0, 1)


class GRU(nn.Module):
    """The recurrence of the 2023 version: a dense layer of [stoch, action], then a GRU with one norm on its gates."""

    def __init__(
        self, deter: int, stoch: int, action: int, *, hidden: int, blocks: int = 1, layers: int = 1, act: str = "silu"
    ):
        super().__init__()
        self.mlp = MLP(stoch + action, hidden, layers, act)
        self.gates = Linear(self.mlp.out_size + deter, 3 * deter)
        self.norm = RMSNorm(3 * deter)

    def layout(self) -> tuple[dict[str, Product], Weights]:
        return {}, {}

    def prepare(self, action: Float[Tensor, "*b action"]) -> Float[Tensor, "*b action"]:
        return action

    def step(
        self,
        deter: Float[Tensor, "b deter"],
        stoch: Float[Tensor, "b stoch"],
        prepared: Float[Tensor, "b action"],
        products: dict[str, Product],
        weights: Weights,
    ) -> tuple[Float[Tensor, "b deter"], dict[str, Tensor]]:
        x = self.mlp(torch.cat([stoch, prepared], -1))
        gates = self.norm(self.gates(torch.cat([x, deter.to(x.dtype)], -1))).to(deter.dtype)
        return blend(*(gates.unflatten(-1, (3, -1)) - gate_offset(gates)).unbind(-2), deter), {}


def half(weight: Tensor) -> Tensor:
    """A weight in the precision that autocast gives to products: once per scan, not at every step."""
    kind = weight.device.type
    return weight.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else weight


def product(x: Float[Tensor, "*g b in"], weight: Float[Tensor, "*g in out"], added: Tensor) -> Tensor:
    """x @ weight + added. Batched, adding in place is cheaper than `baddbmm`, which copies what it adds first."""
    return torch.addmm(added, x, weight) if x.ndim == 2 else torch.bmm(x, weight).add_(added)


class LateGradient(torch.autograd.Function):
    """Hands on what the steps of a scan add to a product with the same weight, whose gradient is then one product of
    all steps' inputs and gradients, instead of a small one per step and their sum.

    `given` is the list of what the steps gave the product, filled by the time the backward pass comes here.
    """

    @staticmethod
    def forward(ctx, weight: Tensor, given: list[Tensor], *added: Tensor) -> tuple[Tensor, ...]:
        ctx.given, ctx.dtype = given, weight.dtype
        return tuple(x.view_as(x) for x in added)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, inputs = (torch.cat(steps, -2).to(ctx.dtype) for steps in (grads, ctx.given))
        return inputs.transpose(-2, -1) @ grad, None, *grads


def late(
    products: dict[str, Product], batch: int, time: int
) -> tuple[list[dict[str, Product]], dict[str, list[Tensor]]]:
    """The products of each of `time` steps, and where what they are given is to be kept: weights get `LateGradient`."""
    given, steps = {name: [] for name in products}, [{} for _ in range(time)]
    for name, (weight, added) in products.items():
        each = added.unbind(1) if added.ndim == 3 and weight.ndim == 2 else _repeated(added, batch, time)
        for step, own in zip(steps, LateGradient.apply(weight, given[name], *each), strict=True):
            step[name] = (weight.detach(), own)
    return steps, given


def _repeated(bias: Tensor, batch: int, time: int) -> tuple[Tensor, ...]:
    """A bias [out] or [blocks, 1, out] for each step: [batch, out] or [blocks, batch, out]."""
    return bias.expand(time, *bias.shape[:-2], batch, bias.shape[-1]).unbind(0)


def gate_offset(like: Tensor) -> Float[Tensor, "3 1"]:
    """What is taken off reset, candidate, update before their sigmoids: the update gate is biased to keep the state."""
    return (torch.arange(3, device=like.device) == 2).to(like.dtype).unsqueeze(-1)


def blend(reset: Tensor, cand: Tensor, update: Tensor, deter: Tensor) -> Tensor:
    """The gated update of `deter`: u tanh(sigmoid(reset) cand) + (1 - u) deter, with u = sigmoid(update).

    Without gradient, reset and update may be overwritten.
    """
    if torch.is_grad_enabled() or deter.device.type != "cpu":
        return torch.lerp(deter, torch.tanh(torch.sigmoid(reset) * cand), torch.sigmoid(update))
    # With tanh(x) = 2 sigmoid(2x) - 1: on a CPU `torch.tanh` takes four times as long as a sigmoid.
    if torch.compiler.is_compiling():
        return deter + torch.sigmoid(update) * (2 * torch.sigmoid(2 * torch.sigmoid(reset) * cand) - 1 - deter)
    # In place, as nothing fuses the steps here; compiled, writing to parts of an array would be slow.
    new = reset.sigmoid_().mul_(cand).mul_(2).sigmoid_().mul_(2).sub_(1)
    return torch.lerp(deter, new, update.sigmoid_())


CELLS = {"block_gru": BlockGRU, "gru": GRU}


class ConcatFusion(nn.Module):
    """First part of the posterior: joins [deter, embeddings] and maps them through dense layers.

    In two parts, so that a scan over time repeats only what needs the recurrent state: `prepare` multiplies the
    embeddings of all steps with their part of the first layer's weights, `step` adds the part of `deter`. An absent
    kind counts as zeros.
    """

    def __init__(self, deter: int, sizes: dict[str, int], *, hidden: int, layers: int = 1, act: str = "silu"):
        super().__init__()
        self.deter = deter
        self.first = Dense(deter + sum(sizes.values()), hidden, act)
        self.rest = MLP(hidden, hidden, layers - 1, act)

    def layout(self) -> Weights:
        """The first layer's weights by what they multiply."""
        deter, embed = self.first.linear.weight.split([self.deter, self.first.linear.in_features - self.deter], 1)
        return {"fusion_deter": half(deter).t(), "fusion_embed": half(embed)}

    def prepare(self, tokens: Tokens, weights: Weights) -> Product:
        """The first layer as a product of `deter`, to which the embeddings' share [*b, hidden] is added."""
        embed = torch.cat([embed * present.unsqueeze(-1) for embed, present in tokens.values()], -1)
        return weights["fusion_deter"], F.linear(embed, weights["fusion_embed"], self.first.linear.bias)

    def step(self, deter: Float[Tensor, "b deter"], first: Product) -> Float[Tensor, "b hidden"]:
        return self.rest(self.first.norm(product(deter, *first), self.first.act))


class RSSM(nn.Module):
    """Recurrent state-space model: `deter` follows the past, `stoch` is what is seen (posterior) or expected (prior).

    Args:
        sizes: width of each kind's embedding (`MultiEncoder.sizes`).
        action: width of the action vector.
        cell: block_gru, or gru (2023).
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
        self.fusion = ConcatFusion(deter, sizes, hidden=hidden, layers=obs_layers, act=act)
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
        products, given = late(products | {"fusion": self.fusion.prepare(tokens, weights)}, batch, time)
        noises = [None] * time if noise is None else noise.unbind(1)
        scan = recomputed(self._obs_steps) if self.recompute else self._obs_steps
        inputs = list(zip(*(x.unbind(1) for x in inputs), noises, products, strict=True))
        steps = []
        for first in range(0, time, self.stride):
            states, used = scan(state, inputs[first : first + self.stride], weights)
            state = states[-1]
            steps += states
            for step in used:
                for name, x in step.items():
                    given[name].append(x.detach())
        post = {key: torch.stack([step[key] for step in steps], 1) for key in steps[0]}
        return post, self.prior(post["deter"])

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
        products = products | {"fusion": self.fusion.prepare(tokens, weights)}
        return self._obs_step(state, *self._inputs(action, is_first), noise, products, weights)[0]

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
        products["post"] = (half(self.post_out.weight).t(), self.post_out.bias)
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
        noise: Tensor | None,
        products: dict[str, Product],
        weights: Weights,
    ) -> tuple[State, dict[str, Tensor]]:
        """One step of the posterior, and what each product was given. `action` is prepared; the state is zeroed where
        `keep` [b, 1] is 0.
        """
        products = dict(products)
        fusion, out = products.pop("fusion"), products.pop("post")
        deter, given = self.core.step(state["deter"] * keep, flatten_stoch(state) * keep, action, products, weights)
        hidden = self.fusion.step(deter, fusion)
        stats = self._stats(product(hidden, *out))
        return {"deter": deter, "stoch": self.draw(stats, noise), **stats}, given | {"fusion": deter, "post": hidden}

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
