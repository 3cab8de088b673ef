"""The recurrences of the world model, and the products of a scan over time.

A cell is in parts, so that a scan over time repeats only what needs the recurrent state: `layout` lays the weights out
as the products read them (once per scan), `prepare` is the share of the actions (for all steps at once), `step` the
rest.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from layers import ACTIVATIONS, MLP, BlockLinear, Dense, Linear, RMSNorm, rms_norm

Weights = dict  # parameters as the steps of a scan read them, by name
Product = tuple[Tensor, Tensor]  # x @ weight + added; in a scan `added` is one step's own (see `late`)


class BlockGRU(nn.Module):
    """The recurrence h_t = f(h_{t-1}, z_{t-1}, a_{t-1}) with block-diagonal weights (paper, "Network architecture").

    Each input goes through its own dense layer; every block sees its slice of `deter` and all three results. The gates
    are split inside each block into reset, candidate, update; the update gate is biased towards keeping the state.
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
        each = added.unbind(-2) if added.ndim == weight.ndim + 1 else _repeated(added, batch, time)
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
