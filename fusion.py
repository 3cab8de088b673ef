"""How the posterior joins the kinds of observation: concatenated, by attention, or as a product of experts.

A fusion is in parts, so that a scan over time repeats only what needs the recurrent state: `layout` lays its weights
out (once per scan), `prepare` does what the embeddings alone decide (for all steps at once), `step` the rest. Absent
kinds count as zeros (concat), as a learned token (attention), or not at all (experts).
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from distributions import full_precision
from layers import ACTIVATIONS, MLP, Dense, Linear, RMSNorm, init_weight, rms_norm
from recurrence import Product, Weights, half, product

Tokens = dict[str, tuple[Tensor, Tensor]]  # kind of observation -> (embedding [*b, size], present [*b])
Inputs = tuple[Tensor, ...]  # what `step` needs of one step's embeddings, beside its products
HEADS = 4  # of attention


class ConcatFusion(nn.Module):
    """Joins [deter, embeddings] and maps them through dense layers (the reference's way)."""

    experts = 0  # kinds that vote on the latents on their own

    def __init__(self, deter: int, sizes: dict[str, int], *, hidden: int, layers: int = 1, act: str = "silu"):
        super().__init__()
        self.deter = deter
        self.first = Dense(deter + sum(sizes.values()), hidden, act)
        self.rest = MLP(hidden, hidden, layers - 1, act)

    def layout(self) -> Weights:
        """The first layer's weights by what they multiply."""
        deter, embed = self.first.linear.weight.split([self.deter, self.first.linear.in_features - self.deter], 1)
        return {"fusion_deter": half(deter).t(), "fusion_embed": half(embed)}

    def prepare(self, tokens: Tokens, weights: Weights) -> tuple[dict[str, Product], Inputs]:
        """The first layer as a product of `deter`, to which the embeddings' share [*b, hidden] is added."""
        embed = torch.cat([embed * present.unsqueeze(-1) for embed, present in tokens.values()], -1)
        share = F.linear(embed, weights["fusion_embed"], self.first.linear.bias)
        return {"fusion": (weights["fusion_deter"], share)}, ()

    def step(
        self, deter: Float[Tensor, "b deter"], inputs: Inputs, products: dict[str, Product], weights: Weights
    ) -> tuple[Float[Tensor, "b hidden"], dict[str, Tensor]]:
        """What the posterior is read off, and what each product was given."""
        x = product(deter, *products["fusion"])
        return self.rest(self.first.norm(x, self.first.act)), {"fusion": deter}


class AttentionFusion(nn.Module):
    """One token per kind, attended to by a query from the recurrent state; then dense layers of [deter, result].

    A kind's token is its embedding, or a learned one where it is absent, plus a vector that tells the kind. The order
    of the kinds does not matter.
    """

    experts = 0

    def __init__(self, deter: int, sizes: dict[str, int], *, hidden: int, layers: int = 1, act: str = "silu"):
        super().__init__()
        self.heads = math.gcd(HEADS, hidden)
        self.tokens = nn.ModuleDict({kind: Dense(size, hidden, act) for kind, size in sizes.items()})
        self.kinds = nn.ParameterDict({kind: nn.Parameter(torch.empty(hidden)) for kind in sizes})
        self.missing = nn.Parameter(torch.empty(hidden))
        for vector in (*self.kinds.values(), self.missing):
            init_weight(vector, hidden)
        self.key_value = Linear(hidden, 2 * hidden)
        self.query = Linear(deter, hidden)
        self.first = Dense(deter + hidden, hidden, act)
        self.rest = MLP(hidden, hidden, layers - 1, act)

    def layout(self) -> Weights:
        return {"query": half(self.query.weight).t(), "fusion": half(self.first.linear.weight).t()}

    def prepare(self, tokens: Tokens, weights: Weights) -> tuple[dict[str, Product], Inputs]:
        """Keys and values [*b, kinds, heads, size]."""
        rows = []
        for kind, (embed, present) in tokens.items():
            token = self.tokens[kind](embed)
            token = torch.where(present.unsqueeze(-1), token, self.missing.to(token.dtype))
            rows.append(token + self.kinds[kind].to(token.dtype))
        keys, values = self.key_value(torch.stack(rows, -2)).chunk(2, -1)
        products = {"query": (weights["query"], self.query.bias), "fusion": (weights["fusion"], self.first.linear.bias)}
        return products, tuple(x.unflatten(-1, (self.heads, -1)) for x in (keys, values))

    def step(
        self, deter: Float[Tensor, "b deter"], inputs: Inputs, products: dict[str, Product], weights: Weights
    ) -> tuple[Float[Tensor, "b hidden"], dict[str, Tensor]]:
        keys, values = inputs
        query = product(deter, *products["query"]).unflatten(-1, (self.heads, 1, -1))
        scores = full_precision(query * keys.transpose(-3, -2)).sum(-1) / math.sqrt(keys.shape[-1])
        share = torch.softmax(scores, -1).to(values.dtype).unsqueeze(-1)
        seen = (share * values.transpose(-3, -2)).sum(-2).flatten(-2)
        joined = torch.cat([deter.to(seen.dtype), seen], -1)
        x = product(joined, *products["fusion"])
        return self.rest(self.first.norm(x, self.first.act)), {"query": deter, "fusion": joined}


class ExpertFusion(nn.Module):
    """Each kind has a say on the latents, and the posterior is the product of what they say (Hinton 2002).

    log q = log p + sum over present kinds of (log q_kind - log p), renormalised, with p the prior: where nothing is
    present, the posterior is the prior. An expert sees [deter, its embedding]; all share the posterior's output layer.
    """

    def __init__(self, deter: int, sizes: dict[str, int], *, hidden: int, layers: int = 1, act: str = "silu"):
        super().__init__()
        self.experts, self.deter, self.act = len(sizes), deter, ACTIVATIONS[act]
        self.first = nn.ModuleDict({kind: Linear(deter + size, hidden) for kind, size in sizes.items()})
        self.norms = nn.ModuleDict({kind: RMSNorm(hidden) for kind in sizes})
        self.rest = nn.ModuleDict({kind: MLP(hidden, hidden, layers - 1, act) for kind in sizes})

    def layout(self) -> Weights:
        weights = {"fusion_deter": [], "expert_scale": []}
        for kind, first in self.first.items():
            deter, embed = half(first.weight).split([self.deter, first.in_features - self.deter], 1)
            weights["fusion_deter"].append(deter.t())
            weights["expert_scale"].append(self.norms[kind].scale.unsqueeze(0))
            weights[f"fusion_{kind}"] = embed
        return weights | {name: torch.stack(weights[name]) for name in ("fusion_deter", "expert_scale")}

    def prepare(self, tokens: Tokens, weights: Weights) -> tuple[dict[str, Product], Inputs]:
        """The experts' first layers [experts, *b, hidden], and which of them are present [*b, experts]."""
        shares = [
            F.linear(tokens[kind][0], weights[f"fusion_{kind}"], first.bias) for kind, first in self.first.items()
        ]
        present = torch.stack([tokens[kind][1] for kind in self.first], -1)
        return {"fusion": (weights["fusion_deter"], torch.stack(shares))}, (present,)

    def step(
        self, deter: Float[Tensor, "b deter"], inputs: Inputs, products: dict[str, Product], weights: Weights
    ) -> tuple[Float[Tensor, "experts b hidden"], dict[str, Tensor]]:
        given = deter.expand(self.experts, *deter.shape)
        x = product(given.to(products["fusion"][0].dtype), *products["fusion"])
        x = rms_norm(x, weights["expert_scale"], act=self.act)
        x = torch.stack([rest(one) for rest, one in zip(self.rest.values(), x.unbind(0), strict=True)])
        return x, {"fusion": given}


def product_of_experts(
    prior: Float[Tensor, "b s c"], experts: Float[Tensor, "experts b s c"], present: Bool[Tensor, "b experts"]
) -> Float[Tensor, "b s c"]:
    """Logits of the product of all present experts, each relative to the prior; exactly the prior's if none is."""
    prior = full_precision(prior)
    gains = torch.where(present.t()[..., None, None], full_precision(experts) - prior, 0.0)
    return prior + gains.sum(0)


FUSIONS = {"concat": ConcatFusion, "attention": AttentionFusion, "poe": ExpertFusion}
