"""Encoder, recurrent state-space model and decoder: what the latent state depends on, and when."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium import spaces as gs
from torch import distributions as td

import layers
from errors import UserError
from fusion import ConcatFusion
from networks import RSSM, MultiDecoder, MultiEncoder, features, flatten_stoch
from recurrence import GRU, BlockGRU, blend

SIZES = {"vector": 5, "image": 7}
DYN = {"deter": 8, "hidden": 6, "stoch": 3, "discrete": 4, "blocks": 2}
VARIANTS = {
    "default": {},
    "gaussian": {"discrete": 0},
    "gru": {"cell": "gru"},
    "gaussian gru": {"discrete": 0, "cell": "gru"},
    "deep": {"dyn_layers": 2, "obs_layers": 2, "img_layers": 1},
    "attention": {"fusion": "attention"},
    "experts": {"fusion": "poe"},
    "deep experts": {"fusion": "poe", "obs_layers": 2, "cell": "gru"},
    "gaussian attention": {"fusion": "attention", "discrete": 0, "obs_layers": 2},
}
B, T, A = 3, 6, 2


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=VARIANTS)
def rssm(request) -> RSSM:
    return RSSM(SIZES, A, **(DYN | VARIANTS[request.param]))


def make_tokens(*lead: int) -> dict:
    return {kind: (torch.randn(*lead, size), torch.ones(*lead, dtype=torch.bool)) for kind, size in SIZES.items()}


def make_noise(rssm: RSSM, *lead: int) -> torch.Tensor:
    return torch.randn(*lead, *rssm.noise_shape)


def make_state(rssm: RSSM, *lead: int) -> dict:
    stoch = torch.randn(*lead, *rssm.noise_shape)
    if rssm.discrete:
        stoch = torch.eye(rssm.discrete)[stoch.argmax(-1)]
    return {"deter": torch.tanh(torch.randn(*lead, rssm.deter)), "stoch": stoch}


def at(tokens: dict, t: int) -> dict:
    return {kind: (embed[:, t], present[:, t]) for kind, (embed, present) in tokens.items()}


def flags(*first: tuple[int, int]) -> torch.Tensor:
    is_first = torch.zeros(B, T, dtype=torch.bool)
    for b, t in first:
        is_first[b, t] = True
    return is_first


def equal(a: dict, b: dict, rows=slice(None)) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[key][rows], b[key][rows]) for key in a)


# Shapes and ways to run


def test_shapes(rssm):
    post, prior = rssm.observe(make_tokens(B, T), torch.randn(B, T, A), flags())
    statistics = ["logit"] if rssm.discrete else ["mean", "std"]
    assert list(post) == ["deter", "stoch", *statistics] and list(prior) == statistics
    assert post["deter"].shape == (B, T, 8) and post["stoch"].shape == (B, T, *rssm.noise_shape)
    for key in statistics:
        assert post[key].shape == prior[key].shape == post["stoch"].shape
    assert features(post).shape == (B, T, rssm.feat_size) and flatten_stoch(post).shape == (B, T, rssm.stoch_size)
    assert torch.equal(features(post)[..., 8:], post["stoch"].reshape(B, T, -1))
    if rssm.discrete:
        assert torch.equal(post["stoch"].sort(-1).values[..., -1], torch.ones(B, T, 3))
    else:
        assert (post["std"] > rssm.min_std).all() and (prior["std"] > rssm.min_std).all()


def test_observe_is_obs_step_repeated(rssm):
    tokens, action, is_first = make_tokens(B, T), torch.randn(B, T, A), flags((0, 0), (1, 3))
    noise, state = make_noise(rssm, B, T), make_state(rssm, B)
    post, prior = rssm.observe(tokens, action, is_first, state, noise)
    for t in range(T):
        state = rssm.obs_step(state, action[:, t], at(tokens, t), is_first[:, t], noise[:, t])
        for key in state:
            torch.testing.assert_close(state[key], post[key][:, t], msg=f"{key} at {t}")
        for key, value in rssm.prior(state["deter"]).items():
            torch.testing.assert_close(value, prior[key][:, t])


def test_imagine_is_img_step_repeated(rssm):
    action, noise, state = torch.randn(B, T, A), make_noise(rssm, B, T), make_state(rssm, B)
    prior = rssm.imagine(action, state, noise)
    for t in range(T):
        state = rssm.img_step(state, action[:, t], noise[:, t])
        assert equal(state, {key: value[:, t] for key, value in prior.items()})


def test_posterior_and_prior_share_the_recurrence(rssm):
    state, action = make_state(rssm, B), torch.randn(B, A)
    tokens, no = make_tokens(B), torch.zeros(B, dtype=torch.bool)
    post, prior = rssm.obs_step(state, action, tokens, no), rssm.img_step(state, action)
    assert torch.equal(post["deter"], prior["deter"])
    name = "logit" if rssm.discrete else "mean"
    assert not torch.equal(post[name], prior[name])


def test_without_state_or_noise(rssm):
    tokens, action = make_tokens(B, T), torch.randn(B, T, A)
    zero_noise = torch.zeros(B, T, *rssm.noise_shape)
    given, _ = rssm.observe(tokens, action, flags(), rssm.initial(B), zero_noise)
    post, _ = rssm.observe(tokens, action, flags())
    assert equal(given, post), "no noise is the mode, no state is zeros"
    assert all((value == 0).all() for value in rssm.initial(B).values())


def test_noise_decides_the_sample(rssm):
    stats = rssm.prior(torch.randn(200, 8))
    noise = make_noise(rssm, 200)
    drawn = rssm.draw(stats, noise)
    if rssm.discrete:
        probs = 0.99 * torch.softmax(stats["logit"], -1) + 0.01 / 4
        assert torch.equal(drawn.argmax(-1), (probs.log() + noise).argmax(-1))
    else:
        torch.testing.assert_close(drawn, stats["mean"] + stats["std"] * noise)


# Trap 2 and 3: resets and pairing


def test_the_past_is_forgotten_at_is_first(rssm):
    """Two sequences with different pasts (state and previous action) agree exactly from is_first on."""
    k = 3
    tokens, action, noise = make_tokens(B, T), torch.randn(B, T, A), make_noise(rssm, B, T)
    others = {kind: (embed.clone(), present) for kind, (embed, present) in tokens.items()}
    for embed, _ in others.values():
        embed[:, :k] = torch.randn_like(embed[:, :k])
    other_action = action.clone()
    other_action[:, : k + 1] = torch.randn(B, k + 1, A)  # also the action that led into the first step
    is_first = flags((0, k), (2, k))
    one, one_prior = rssm.observe(tokens, action, is_first, make_state(rssm, B), noise)
    two, two_prior = rssm.observe(others, other_action, is_first, make_state(rssm, B), noise)
    for state, other in ((one, two), (one_prior, two_prior)):
        for key in state:
            assert torch.equal(state[key][[0, 2], k:], other[key][[0, 2], k:]), key
    assert not torch.equal(one["deter"][:, :k], two["deter"][:, :k])
    assert (one["deter"][1, k:] != two["deter"][1, k:]).any(), "without the flag the past stays"


def test_reset_is_a_zero_state_and_a_zero_action(rssm):
    tokens, no, yes = make_tokens(B), torch.zeros(B, dtype=torch.bool), torch.ones(B, dtype=torch.bool)
    reset = rssm.obs_step(make_state(rssm, B), torch.randn(B, A), tokens, yes)
    assert equal(reset, rssm.obs_step(rssm.initial(B), torch.zeros(B, A), tokens, no))


def test_terminal_states_are_not_blanked(rssm):
    """What comes before is_first is as if the flag were not there."""
    k = 3
    tokens, action, noise, state = make_tokens(B, T), torch.randn(B, T, A), make_noise(rssm, B, T), make_state(rssm, B)
    with_flag, _ = rssm.observe(tokens, action, flags((0, k), (1, k), (2, k)), state, noise)
    without, _ = rssm.observe(tokens, action, flags(), state, noise)
    for key in with_flag:
        assert torch.equal(with_flag[key][:, :k], without[key][:, :k])
    assert not torch.equal(with_flag["deter"][:, k], without["deter"][:, k])


def test_reset_does_not_touch_its_inputs(rssm):
    tokens, action, state = make_tokens(B, T), torch.randn(B, T, A), make_state(rssm, B)
    kept, kept_action = {key: value.clone() for key, value in state.items()}, action.clone()
    rssm.observe(tokens, action, torch.ones(B, T, dtype=torch.bool), state, make_noise(rssm, B, T))
    assert equal(state, kept) and torch.equal(action, kept_action)


def test_each_step_consumes_the_action_before_it(rssm):
    """`action[:, t]` is the one taken before step t: state t depends on it and on none that comes later."""
    action = torch.randn(B, T, A, requires_grad=True)
    post, _ = rssm.observe(make_tokens(B, T), action, flags((1, 2)), noise=make_noise(rssm, B, T))
    for t in range(T):
        (grad,) = torch.autograd.grad(post["deter"][:, t].sum(), action, retain_graph=True)
        used = (grad != 0).any(-1)
        assert used[0].tolist() == [s <= t for s in range(T)]
        assert used[1].tolist() == [s <= t and (t < 2 or s > 2) for s in range(T)]


def test_observation_reaches_its_own_step(rssm):
    embed = torch.randn(B, T, 5, requires_grad=True)
    tokens = make_tokens(B, T) | {"vector": (embed, torch.ones(B, T, dtype=torch.bool))}
    post, _ = rssm.observe(tokens, torch.randn(B, T, A), flags(), noise=make_noise(rssm, B, T))
    name = "logit" if rssm.discrete else "mean"
    for t in range(T):
        (grad,) = torch.autograd.grad(post[name][:, t].sum(), embed, retain_graph=True)
        assert (grad != 0).any(-1)[0].tolist() == [s <= t for s in range(T)]
        (grad,) = torch.autograd.grad(post["deter"][:, t].sum(), embed, retain_graph=True, allow_unused=True)
        used = [False] * T if grad is None else (grad != 0).any(-1)[0].tolist()
        assert used == [s < t for s in range(T)], "deter knows what was seen before"


# Actions beyond ±1


def test_actions_beyond_one_count_by_their_sign_each_on_its_own(rssm):
    state = make_state(rssm, B)
    large, small = (
        torch.tensor([[3.0, -0.5], [-10.0, 0.1], [1.0, -1.0]]),
        torch.tensor([[1.0, -0.5], [-1.0, 0.1], [1.0, -1.0]]),
    )
    assert equal(rssm.img_step(state, large), rssm.img_step(state, small))


def test_gradient_of_a_large_action_is_divided_by_its_size(rssm):
    state, grads = make_state(rssm, B), []
    for size in (1.0, 4.0):
        action = torch.full((B, A), size, requires_grad=True)
        weight = torch.linspace(-1, 1, 8)
        grads.append(torch.autograd.grad((rssm.img_step(state, action)["deter"] * weight).sum(), action)[0])
    torch.testing.assert_close(grads[1], grads[0] / 4)
    assert (grads[0] != 0).all()


# KL


def test_kl_of_categoricals_against_torch():
    rssm = RSSM(SIZES, A, **DYN, unimix_ratio=0.1)
    post, prior = {"logit": torch.randn(B, T, 3, 4) * 2}, {"logit": torch.randn(B, T, 3, 4) * 2}

    def reference(state):
        return td.Categorical(probs=0.9 * torch.softmax(state["logit"], -1) + 0.1 / 4)

    expected = td.kl_divergence(reference(post), reference(prior)).sum(-1)
    for kl in rssm.kl(post, prior):
        torch.testing.assert_close(kl, expected)
    torch.testing.assert_close(rssm.entropy(post), reference(post).entropy().sum(-1))


def test_kl_of_gaussians_against_torch():
    rssm = RSSM(SIZES, A, **(DYN | {"discrete": 0}))
    post, prior = ({"mean": torch.randn(B, T, 3), "std": torch.rand(B, T, 3) + 0.1} for _ in range(2))
    p, q = (td.Independent(td.Normal(s["mean"], s["std"]), 1) for s in (post, prior))
    for kl in rssm.kl(post, prior):
        torch.testing.assert_close(kl, td.kl_divergence(p, q))
    torch.testing.assert_close(rssm.entropy(post), p.entropy())


def test_each_half_of_the_kl_moves_its_own_side(rssm):
    names = ["logit"] if rssm.discrete else ["mean", "std"]
    shape = (B, T, *rssm.noise_shape)
    post, prior = ({n: (torch.randn(shape).exp()).requires_grad_() for n in names} for _ in range(2))
    for index, (moved, still) in enumerate(((prior, post), (post, prior))):
        loss = rssm.kl(post, prior)[index].sum()
        for value in moved.values():
            (grad,) = torch.autograd.grad(loss, value, retain_graph=True)
            assert (grad != 0).any()
        for value in still.values():
            assert torch.autograd.grad(loss, value, retain_graph=True, allow_unused=True)[0] is None


# Recurrence and fusion


def advance(core: BlockGRU | GRU, deter: torch.Tensor, stoch: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """One step of a recurrence, its three parts in a row."""
    return core.step(deter, stoch, core.prepare(action), *core.layout())[0]


def gated(reset: torch.Tensor, cand: torch.Tensor, update: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    update = torch.sigmoid(update)
    return update * torch.tanh(torch.sigmoid(reset) * cand) + (1 - update) * old


def norm_silu(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return F.silu(F.rms_norm(x, scale.shape, scale, 1e-4))


def plain_block_gru(core: BlockGRU, deter: torch.Tensor, stoch: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """The recurrence, a block at a time, each with its own copy of what all of them share."""
    blocks, width = core.blocks, deter.shape[-1] // core.blocks
    inputs = [
        norm_silu(F.linear(x, layer.linear.weight, layer.linear.bias), layer.norm.scale)
        for x, layer in ((deter, core.from_deter), (stoch, core.from_stoch), (action, core.from_action))
    ]
    old = list(deter.split(width, -1))
    x = [torch.cat([own, *inputs], -1) for own in old]
    for layer, norm in zip(core.hidden, core.norms, strict=True):
        biases = layer.bias.split(width)
        x = [x[g] @ layer.weight[g] + biases[g] for g in range(blocks)]
        x = norm_silu(torch.cat(x, -1), norm.scale).split(width, -1)  # over all blocks together
    new, biases = [], core.gates.bias.split(3 * width)
    for g in range(blocks):
        reset, cand, update = (x[g] @ core.gates.weight[g] + biases[g]).split(width, -1)
        new.append(gated(reset, cand, update - 1, old[g]))
    return torch.cat(new, -1)


def plain_gru(core: GRU, deter: torch.Tensor, stoch: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    x = torch.cat([stoch, action], -1)
    for layer in core.mlp:
        x = norm_silu(F.linear(x, layer.linear.weight, layer.linear.bias), layer.norm.scale)
    x = F.linear(torch.cat([x, deter], -1), core.gates.weight, core.gates.bias)
    reset, cand, update = F.rms_norm(x, x.shape[-1:], core.norm.scale, 1e-4).split(deter.shape[-1], -1)
    return gated(reset, cand, update - 1, deter)


def shaken(module: torch.nn.Module) -> torch.nn.Module:
    """In float64, and no bias 0 and no scale 1, whose misuse would not show."""
    module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return module


def check_equal(found: torch.Tensor, expected: torch.Tensor, *inputs: torch.Tensor) -> None:
    """Values, and the gradients of every input of a weighted sum of them."""
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    weight = torch.randn_like(expected)
    pairs = zip(
        torch.autograd.grad((found * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    )
    for one, two in pairs:
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("cell", [BlockGRU, GRU])
def test_recurrence_keeps_most_of_the_state_by_default(cell):
    core = cell(8, 5, 2, hidden=6, blocks=2)
    with torch.no_grad():
        for p in core.gates.parameters():
            p.zero_()
    deter = torch.randn(B, 8)
    update = 1 / (1 + np.e)  # sigmoid(-1); the candidate is 0
    torch.testing.assert_close(advance(core, deter, torch.randn(B, 5), torch.randn(B, 2)), (1 - update) * deter)


@pytest.mark.parametrize("batch", [B, 1])
@pytest.mark.parametrize(
    "cell, plain, options",
    [
        (BlockGRU, plain_block_gru, {"blocks": 2}),
        (BlockGRU, plain_block_gru, {"blocks": 1}),
        (BlockGRU, plain_block_gru, {"blocks": 4, "layers": 3}),
        (BlockGRU, plain_block_gru, {"blocks": 8, "layers": 2}),
        (GRU, plain_gru, {}),
        (GRU, plain_gru, {"layers": 2}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else value.__name__,
)
def test_recurrence_against_one_written_out(cell, plain, options, batch):
    core = shaken(cell(8, 5, 2, hidden=6, **options))
    inputs = [torch.randn(batch, size, dtype=torch.float64, requires_grad=True) for size in (8, 5, 2)]
    check_equal(advance(core, *inputs), plain(core, *inputs), *inputs, *core.parameters())
    with torch.no_grad():
        torch.testing.assert_close(advance(core, *inputs), plain(core, *inputs), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("cell, plain", [(BlockGRU, plain_block_gru), (GRU, plain_gru)], ids=["block_gru", "gru"])
def test_recurrence_of_many_states(cell, plain, monkeypatch):
    """Norms of many numbers go through them in pieces."""
    core = shaken(cell(8, 5, 2, hidden=6, blocks=2))
    inputs = [torch.randn(B, size, dtype=torch.float64, requires_grad=True) for size in (8, 5, 2)]
    expected = plain(core, *inputs)
    monkeypatch.setattr(layers, "PIECE", 1)
    check_equal(advance(core, *inputs), expected, *inputs, *core.parameters())


def test_layout_splits_off_what_all_blocks_share():
    """One product with the shared inputs is what every block makes of its own copy of them."""
    core = shaken(BlockGRU(8, 5, 2, hidden=6, blocks=4))
    own, shared = (torch.randn(B, *shape, dtype=torch.float64) for shape in ((4, 2), (18,)))
    products, weights = core.layout()
    weight, bias = products["shared"]
    found = torch.einsum("bgi,gio->bgo", own, weights["own"]).flatten(1) + shared @ weight + bias
    joined = torch.stack([torch.cat([own[:, g], shared], -1) for g in range(4)], 1)
    torch.testing.assert_close(found, core.hidden[0](joined))


def test_layout_made_once_gives_the_gradients_of_one_per_step(rssm):
    """Laid out once per scan, the weights gather the gradients of all its steps (in float64: a product of experts sums
    what nearly cancels).
    """
    rssm = rssm.double()
    tokens = {kind: (embed.double(), present) for kind, (embed, present) in make_tokens(B, T).items()}
    action, is_first = torch.randn(B, T, A, dtype=torch.float64), flags((0, 0), (1, 3))
    noise, start = make_noise(rssm, B, T).double(), {key: x.double() for key, x in make_state(rssm, B).items()}
    weight = torch.randn(B, T, 8, dtype=torch.float64)

    def gradients(deter):
        (grads,) = [torch.autograd.grad((deter * weight).sum(), list(rssm.parameters()), allow_unused=True)]
        return {name: g for (name, _), g in zip(rssm.named_parameters(), grads, strict=True) if g is not None}

    def stepped(function) -> dict:
        state, deters = start, []
        for t in range(T):
            state = function(state, t)
            deters.append(state["deter"])
        return gradients(torch.stack(deters, 1))

    scans = {
        "observe": (
            gradients(rssm.observe(tokens, action, is_first, start, noise)[0]["deter"]),
            stepped(lambda s, t: rssm.obs_step(s, action[:, t], at(tokens, t), is_first[:, t], noise[:, t])),
        ),
        "imagine": (
            gradients(rssm.imagine(action, start, noise)["deter"]),
            stepped(lambda s, t: rssm.img_step(s, action[:, t], noise[:, t])),
        ),
    }
    for name, (found, expected) in scans.items():
        assert found.keys() == expected.keys() and any(key.startswith("core") for key in found), name
        for key in found:
            torch.testing.assert_close(found[key], expected[key], msg=f"{name}: {key}")


def gates() -> list[torch.Tensor]:
    return [torch.randn(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(4)]


def test_blend_against_the_formula():
    inputs = gates()
    with torch.no_grad():
        inputs[0][0], inputs[1][0], inputs[2][0] = 30.0, -30.0, 30.0  # saturated
        inputs[2][1], inputs[1][2] = -30.0, 0.0
    check_equal(blend(*inputs), gated(*inputs), *inputs)
    torch.testing.assert_close(blend(*inputs)[0], torch.full((5,), -1.0, dtype=torch.float64))
    torch.testing.assert_close(blend(*inputs)[1], inputs[3][1])


def test_blend_gradcheck():
    assert torch.autograd.gradcheck(blend, gates())


def test_blend_without_gradient():
    """In place: the gates may be overwritten, candidate and state may not."""
    inputs = [value.detach() for value in gates()]
    kept, expected = [value.clone() for value in inputs], gated(*inputs)
    with torch.no_grad():
        torch.testing.assert_close(blend(*inputs), expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(inputs[1], kept[1]) and torch.equal(inputs[3], kept[3])


def test_blend_in_float32_is_exact_to_rounding():
    """tanh is had from a sigmoid: its error is that of numbers about 1, also where it is small."""
    inputs = [value.detach().float() * 3 for value in gates()]
    expected = gated(*(value.double() for value in inputs))
    with torch.no_grad():
        torch.testing.assert_close(blend(*inputs).double(), expected, rtol=0, atol=5e-7)


def test_blocks_must_divide_deter():
    with pytest.raises(ValueError, match="multiple of blocks"):
        RSSM(SIZES, A, **(DYN | {"blocks": 3}))


@pytest.mark.parametrize("layers", [1, 3])
def test_fusion_in_parts_is_dense_layers_on_everything(layers):
    fusion = shaken(ConcatFusion(8, SIZES, hidden=6, layers=layers))
    deter = torch.randn(B, T, 8, dtype=torch.float64, requires_grad=True)
    embeds = {kind: torch.randn(B, T, size, dtype=torch.float64, requires_grad=True) for kind, size in SIZES.items()}
    tokens = {kind: (embed, torch.rand(B, T) < 0.7) for kind, embed in embeds.items()}
    x = torch.cat([deter, *(embed * present.unsqueeze(-1) for embed, present in tokens.values())], -1)
    for layer in (fusion.first, *fusion.rest):
        x = norm_silu(F.linear(x, layer.linear.weight, layer.linear.bias), layer.norm.scale)
    weights = fusion.layout()
    products, rest = fusion.prepare(tokens, weights)
    weight, shares = products["fusion"]
    found = [fusion.step(deter[:, t], rest, {"fusion": (weight, shares[:, t])}, weights)[0] for t in range(T)]
    found = torch.stack(found, 1)
    check_equal(found, x, deter, *embeds.values(), *fusion.parameters())


def test_what_an_absent_kind_holds_does_not_matter(rssm):
    tokens, state, action = make_tokens(B), make_state(rssm, B), torch.randn(B, A)
    no, present = torch.zeros(B, dtype=torch.bool), torch.tensor([False, True, False])
    image = tokens["image"][0]
    other = torch.where(present[:, None], image, torch.randn(B, 7))
    found, expected = (rssm.obs_step(state, action, tokens | {"image": (x, present)}, no) for x in (image, other))
    assert equal(found, expected)
    there = rssm.obs_step(state, action, tokens, no)
    assert not torch.equal(
        found["logit" if rssm.discrete else "mean"][0], there["logit" if rssm.discrete else "mean"][0]
    )


@pytest.mark.parametrize("rssm", ["default", "gaussian gru"], indirect=True)
def test_joined_by_concatenation_an_absent_kind_counts_as_zeros(rssm):
    tokens, state, action = make_tokens(B), make_state(rssm, B), torch.randn(B, A)
    no, present = torch.zeros(B, dtype=torch.bool), torch.tensor([False, True, False])
    zeros = tokens["image"][0] * present[:, None]
    absent, zeroed = (tokens | {"image": one} for one in ((tokens["image"][0], present), (zeros, ~no)))
    assert equal(rssm.obs_step(state, action, absent, no), rssm.obs_step(state, action, zeroed, no))


# Encoder and decoder

SPACES = {
    "image": gs.Box(0, 255, (16, 24, 3), np.uint8),
    "pose": gs.Box(-np.inf, np.inf, (3,), np.float32),
    "lives": gs.Discrete(4),
}
OPTIONS = {"units": 8, "layers": 1, "depth": 2, "mults": [1, 2]}


def make_obs(*lead: int) -> dict:
    return {
        "image": torch.randint(0, 256, (*lead, 16, 24, 3), dtype=torch.uint8),
        "pose": torch.randn(*lead, 3),
        "lives": torch.randint(0, 4, lead),
    }


def test_encoder_gives_an_embedding_and_a_flag_per_kind():
    encoder = MultiEncoder(SPACES, **OPTIONS)
    tokens = encoder(make_obs(B, T))
    assert list(tokens) == list(encoder.sizes) == ["vector", "image"]
    for kind, (embed, present) in tokens.items():
        assert embed.shape == (B, T, encoder.sizes[kind])
        assert present.dtype == torch.bool and present.shape == (B, T) and present.all()


def test_a_kind_is_present_where_any_of_its_keys_is():
    encoder, obs = MultiEncoder(SPACES, **OPTIONS), make_obs(4)
    obs["present/pose"] = torch.tensor([True, True, False, False])
    obs["present/lives"] = torch.tensor([True, False, True, False])
    obs["present/image"] = torch.tensor([False, True, True, True])
    tokens = encoder(obs)
    assert tokens["vector"][1].tolist() == [True, True, True, False]
    assert tokens["image"][1].tolist() == [False, True, True, True]
    del obs["present/lives"]  # a key without a flag was there
    assert encoder(obs)["vector"][1].all()


def test_absent_observations_do_not_reach_the_posterior():
    encoder = MultiEncoder(SPACES, **OPTIONS)
    rssm = RSSM(encoder.sizes, A, **DYN)
    state, action, is_first = make_state(rssm, 2), torch.randn(2, A), torch.zeros(2, dtype=torch.bool)
    present = {"present/image": torch.tensor([True, False]), "present/pose": torch.tensor([False, False])}
    one = make_obs(2)
    two = {"image": one["image"].clone(), "pose": torch.randn(2, 3), "lives": one["lives"]}
    two["image"][1] = 255 - two["image"][1]
    posts = [rssm.obs_step(state, action, encoder(obs | present), is_first) for obs in (one, two)]
    assert equal(*posts)


@pytest.mark.parametrize("build", [MultiEncoder, lambda spaces, **kw: MultiDecoder(spaces, 8, 12, blocks=2, **kw)])
def test_patterns_that_match_nothing_are_an_error(build):
    with pytest.raises(UserError, match="camera.*image.*lives.*pose"):
        build(SPACES, cnn_keys="camera", **OPTIONS)
    with pytest.raises(UserError, match="match no observation.*pose"):
        build(SPACES, cnn_keys="", mlp_keys="", **OPTIONS)


def test_patterns_choose_the_keys():
    assert list(MultiEncoder(SPACES, cnn_keys="", **OPTIONS).sizes) == ["vector"]
    decoder = MultiDecoder(SPACES, 8, 12, blocks=2, mlp_keys="pose", **OPTIONS)
    assert decoder.keys == ["pose", "image"]


def test_decoder_predicts_and_scores_every_key():
    decoder, obs = MultiDecoder(SPACES, 8, 12, blocks=2, **OPTIONS), make_obs(B, T)
    state = {"deter": torch.randn(B, T, 8), "stoch": torch.randn(B, T, 3, 4)}
    dists, targets = decoder(state), decoder.targets(obs)
    assert dists.keys() == targets.keys() == SPACES.keys()
    for key, dist in dists.items():
        assert dist.loss(targets[key]).shape == (B, T)
        assert dist.mode().shape == targets[key].shape
