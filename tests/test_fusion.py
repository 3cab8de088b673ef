"""How kinds of observation are joined: against closed forms, whatever their order, with any of them missing."""

import pytest
import torch
from torch import nn

from distributions import OneHot
from errors import UserError
from fusion import FUSIONS, AttentionFusion, product_of_experts
from networks import RSSM

SIZES = {"vector": 5, "image": 7, "audio": 3}
DYN = {"deter": 8, "hidden": 6, "stoch": 3, "discrete": 4, "blocks": 2}
B, T, A = 3, 5, 2


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make(fusion: str, sizes: dict = SIZES, **options) -> RSSM:
    rssm = RSSM(sizes, A, fusion=fusion, **(DYN | options)).double()
    with torch.no_grad():
        for parameter in rssm.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return rssm


def make_inputs(present: float = 1.0) -> tuple[dict, torch.Tensor, torch.Tensor]:
    tokens = {
        kind: (torch.randn(B, T, size, dtype=torch.float64), torch.rand(B, T) < present) for kind, size in SIZES.items()
    }
    return tokens, torch.randn(B, T, A, dtype=torch.float64), torch.zeros(B, T, dtype=torch.bool)


def test_product_of_experts_is_the_product():
    """q = p prod (q_m / p), renormalised, over those that are present."""
    prior, experts = torch.randn(B, 2, 4), torch.randn(3, B, 2, 4)
    present = torch.tensor([[True, True, False], [False, False, False], [True, True, True]])
    p, ratio = prior.softmax(-1), experts.softmax(-1) / prior.softmax(-1)
    expected = p * torch.where(present.t()[..., None, None], ratio, 1.0).prod(0)
    expected = expected / expected.sum(-1, keepdim=True)
    found = product_of_experts(prior, experts, present)
    torch.testing.assert_close(found.softmax(-1), expected)
    assert torch.equal(found[1], prior[1])


@pytest.mark.parametrize("unimix", [0.0, 0.01])
def test_nothing_seen_is_nothing_learned(unimix):
    """The posterior is the prior, bit for bit, and their divergence 0."""
    rssm = make("poe", unimix_ratio=unimix).float()
    tokens, action, is_first = make_inputs()
    tokens = {kind: (embed.float(), present) for kind, (embed, present) in tokens.items()}
    for _, present in tokens.values():
        present[:, 2:4] = False
    noise = torch.randn(B, T, *rssm.noise_shape)
    post, prior = rssm.observe(tokens, action.float(), is_first, noise=noise)
    assert torch.equal(post["logit"][:, 2:4], prior["logit"][:, 2:4])
    assert not torch.isclose(post["logit"][:, :2], prior["logit"][:, :2]).all(-1).any()
    for kl in rssm.kl(post, prior):
        assert (kl[:, 2:4] == 0).all() and (kl[:, :2] > 0).all() and (kl[:, 4] > 0).all()


@pytest.mark.parametrize("fusion", FUSIONS)
def test_what_is_absent_does_not_matter(fusion):
    """Where a kind is absent nothing of its embedding gets through; where it is present it does."""
    rssm, (tokens, action, is_first) = make(fusion), make_inputs(0.6)
    other = {
        kind: (torch.where(present[..., None], embed, torch.randn_like(embed)), present)
        for kind, (embed, present) in tokens.items()
    }
    one, two = (rssm.observe(given, action, is_first)[0] for given in (tokens, other))
    assert torch.equal(one["logit"], two["logit"])
    present = {kind: (embed, torch.ones_like(there)) for kind, (embed, there) in other.items()}
    assert not torch.allclose(rssm.observe(present, action, is_first)[0]["logit"], one["logit"])


@pytest.mark.parametrize("fusion", ["attention", "poe"])
def test_the_order_of_kinds_does_not_matter(fusion):
    rssm, (tokens, action, is_first) = make(fusion), make_inputs(0.7)
    turned = RSSM(dict(reversed(SIZES.items())), A, fusion=fusion, **DYN).double()
    assert turned.state_dict().keys() == rssm.state_dict().keys()
    turned.load_state_dict(rssm.state_dict())
    expected = rssm.observe(tokens, action, is_first)[0]
    found = turned.observe(dict(reversed(tokens.items())), action, is_first)[0]
    for key in expected:
        torch.testing.assert_close(found[key], expected[key])


def test_attention_against_torch():
    """The result of the attention, by torch's own function."""
    fusion = AttentionFusion(8, SIZES, hidden=8).double()
    for parameter in fusion.parameters():
        nn.init.normal_(parameter, std=0.5)
    deter = torch.randn(B, 8, dtype=torch.float64)
    tokens = {k: (torch.randn(B, n, dtype=torch.float64), torch.rand(B) < 0.7) for k, n in SIZES.items()}
    weights = fusion.layout()
    products, inputs = fusion.prepare(tokens, weights)
    _, given = fusion.step(deter, inputs, products, weights)
    rows = [
        torch.where(present[:, None], fusion.tokens[k](embed), fusion.missing) + fusion.kinds[k]
        for k, (embed, present) in tokens.items()
    ]
    key, value = fusion.key_value(torch.stack(rows, 1)).chunk(2, -1)
    heads = [x.unflatten(-1, (4, 2)).transpose(1, 2) for x in (fusion.query(deter)[:, None], key, value)]
    expected = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(1)
    torch.testing.assert_close(given["fusion"], torch.cat([deter, expected], -1))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_gradients_reach_every_weight(fusion):
    rssm, (tokens, action, is_first) = make(fusion), make_inputs(0.7)
    post, prior = rssm.observe(tokens, action, is_first)
    sum((value * torch.randn_like(value)).sum() for value in (post["logit"], prior["logit"])).backward()
    without = [name for name, p in rssm.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


def test_experts_need_categoricals():
    with pytest.raises(UserError, match="poe.*dyn.discrete"):
        make("poe", discrete=0)


def test_a_single_expert_is_the_posterior():
    """With one kind that is always there the prior cancels."""
    rssm = make("poe", {"vector": 5})
    tokens = {"vector": (torch.randn(B, T, 5, dtype=torch.float64), torch.ones(B, T, dtype=torch.bool))}
    action = torch.randn(B, T, A, dtype=torch.float64)
    post, _ = rssm.observe(tokens, action, torch.zeros(B, T, dtype=torch.bool))
    with torch.no_grad():
        for parameter in [*rssm.prior_net.parameters(), *rssm.prior_out.parameters()]:
            parameter.mul_(-1)
    again, _ = rssm.observe(tokens, action, torch.zeros(B, T, dtype=torch.bool))
    torch.testing.assert_close(OneHot(post["logit"]).probs, OneHot(again["logit"]).probs)
