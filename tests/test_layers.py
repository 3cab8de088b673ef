"""Layers against formulas, dense equivalents, and the statistics of their initial weights."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from layers import MLP, Actor, BinaryHead, BlockLinear, Conv, Dense, Linear, RMSNorm, ScalarHead, init_weight

TRUNCATION = 1.1368  # restores the deviation of a normal that is cut at two deviations (ALGORITHM.md, Optimizer)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# Initialisation


def check_init(weight: torch.Tensor, std: float) -> None:
    assert weight.numel() >= 50_000, "too few weights to tell"
    np.testing.assert_allclose(weight.std().item(), std, rtol=0.01)
    np.testing.assert_allclose(weight.mean().item(), 0, atol=0.02 * std)
    cut = 2 * TRUNCATION * std
    assert 0.97 * cut < weight.abs().max() <= cut * (1 + 1e-6)
    # Inside of one deviation lie 0.6827 of a normal, and 0.6827 / 0.9545 of one that is cut at two.
    inside = (weight.abs() < TRUNCATION * std).float().mean().item()
    np.testing.assert_allclose(inside, 0.7152, atol=0.01)


def test_truncation_factor():
    # Variance of a unit normal cut at ±2: 1 - 2 * 2 φ(2) / (Φ(2) - Φ(-2)).
    density, mass = math.exp(-2) / math.sqrt(2 * math.pi), math.erf(math.sqrt(2))
    np.testing.assert_allclose(TRUNCATION, 1 / math.sqrt(1 - 4 * density / mass), rtol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_linear_init(scale):
    layer = Linear(400, 250, scale)
    check_init(layer.weight, scale / math.sqrt(400))
    assert (layer.bias == 0).all()


def test_outscale_zero():
    layer = Linear(40, 25, 0.0)
    assert (layer.weight == 0).all() and (layer.bias == 0).all()


def test_block_linear_init_uses_the_fan_in_of_the_whole_layer():
    layer = BlockLinear(8, 64, 200)
    check_init(layer.weight, 1 / math.sqrt(8 * 64))
    assert (layer.bias == 0).all()


@pytest.mark.parametrize("resize", ["same", "pool", "stride", "transposed"])
def test_conv_init(resize):
    layer = Conv(32, 80, 5, resize)
    check_init(layer.conv.weight, 1 / math.sqrt(32 * 5 * 5))
    assert (layer.conv.bias == 0).all() and (layer.norm.scale == 1).all()
    assert (Conv(8, 3, 5, resize, norm=False, scale=0.0).conv.weight == 0).all()


def test_every_linear_layer_of_mlps_and_heads_has_the_same_init():
    check_init(MLP(300, 200, 2)[0].linear.weight, 1 / math.sqrt(300))
    dense = Dense(300, 200)
    check_init(dense.linear.weight, 1 / math.sqrt(300))
    assert (dense.linear.bias == 0).all() and (dense.norm.scale == 1).all()
    actor = Actor(10, 400, (), layers=1, units=200, outscale=0.01)
    for layer in (actor.mean, actor.std):
        check_init(layer.weight, 0.01 / math.sqrt(200))
    check_init(Actor(10, 400, [400], layers=1, units=200, outscale=0.01).logits[0].weight, 0.01 / math.sqrt(200))


def test_init_weight_works_in_place():
    weight = torch.full((300, 300), 7.0)
    init_weight(weight, 100)
    check_init(weight, 0.1)


# Maps


def test_block_linear_is_a_block_diagonal_matrix():
    layer = BlockLinear(3, 4, 5)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 7, 3, 4)
    dense = torch.block_diag(*layer.weight.detach())
    assert dense.shape == (12, 15) and (dense == 0).sum() >= 12 * 15 - 3 * 4 * 5
    expected = x.reshape(2, 7, 12) @ dense + layer.bias
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x[0, 0]), expected[0, 0])


def test_block_linear_with_inputs_that_all_blocks_share():
    layer = BlockLinear(3, 4 + 2, 5)
    nn.init.normal_(layer.bias)
    own, shared = torch.randn(7, 3, 4), torch.randn(7, 2)
    joined = torch.stack([torch.cat([own[:, g], shared], -1) for g in range(3)], 1)
    torch.testing.assert_close(layer(own, shared), layer(joined))


def rms_norm(x, scale=1.0, eps=1e-4) -> np.ndarray:
    x = x.double().numpy()
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * np.asarray(scale, dtype=np.float64)


def test_rms_norm_formula():
    norm = RMSNorm(16)
    nn.init.uniform_(norm.scale, 0.5, 2.0)
    for size in (100.0, 1.0, 1e-2, 1e-4):  # the smallest are ruled by eps
        x = torch.randn(3, 5, 16) * size + size  # not centred: the mean stays in
        np.testing.assert_allclose(norm(x).detach().numpy(), rms_norm(x, norm.scale.detach()), rtol=2e-6)
    assert [name for name, _ in norm.named_parameters()] == ["scale"], "no offset"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rms_norm_of_half_precision_is_computed_in_float32(dtype):
    norm = RMSNorm(4096)
    nn.init.uniform_(norm.scale, 0.5, 2.0)
    x = (torch.randn(4, 4096) + 1).to(dtype)
    assert norm(x).dtype == dtype
    # Only the result is rounded, not what it is made of.
    torch.testing.assert_close(norm(x), norm(x.float()).to(dtype), rtol=0, atol=0)
    np.testing.assert_allclose(norm(x).detach().double(), rms_norm(x, norm.scale.detach()), rtol=2.0**-8)


def test_rms_norm_of_large_half_precision_numbers():
    # 300² is beyond float16: a mean of squares in half precision is infinite, and the output 0.
    torch.testing.assert_close(RMSNorm(64)(torch.full((2, 64), 300.0).half()), torch.ones(2, 64).half())


def test_rms_norm_under_autocast():
    norm, x = RMSNorm(512), torch.randn(4, 512) + 1
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(norm(x), norm.forward(x.double().float()), rtol=0, atol=0)
        np.testing.assert_allclose(norm(x).detach(), rms_norm(x), rtol=1e-5)


def test_dense_is_linear_norm_activation():
    layer, x = Dense(6, 9), torch.randn(4, 6)
    nn.init.normal_(layer.linear.bias)
    normed = rms_norm(x @ layer.linear.weight.T.detach() + layer.linear.bias.detach())
    np.testing.assert_allclose(layer(x).detach(), normed / (1 + np.exp(-normed)), rtol=1e-4, atol=1e-6)


def test_mlp_sizes():
    assert MLP(5, 7, 3).out_size == 7 and MLP(5, 7, 3)(torch.zeros(2, 5)).shape == (2, 7)
    assert MLP(5, 7, 0).out_size == 5 and MLP(5, 7, 0)(torch.zeros(2, 5)).shape == (2, 5)


# Convolutions


@pytest.mark.parametrize("kernel", [3, 4, 5])
@pytest.mark.parametrize("resize, factor", [("same", 1), ("pool", 0.5), ("stride", 0.5), ("transposed", 2)])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_conv_sizes(kernel, resize, factor):
    for height, width in ((8, 8), (6, 10), (2, 4)):
        out = Conv(3, 5, kernel, resize)(torch.randn(2, 3, height, width))
        assert out.shape == (2, 5, int(height * factor), int(width * factor))


def test_conv_pools_then_normalises_over_channels():
    layer, x = Conv(3, 6, 5, "pool"), torch.randn(2, 3, 8, 12)
    nn.init.normal_(layer.conv.bias)
    nn.init.uniform_(layer.norm.scale, 0.5, 2.0)
    with torch.no_grad():
        convolved = F.conv2d(F.pad(x, (2, 2, 2, 2)), layer.conv.weight, layer.conv.bias)
        assert convolved.shape[-2:] == (8, 12)
        pooled = torch.stack([convolved[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]).amax(0)
        normed = torch.from_numpy(rms_norm(pooled.permute(0, 2, 3, 1), layer.norm.scale)).permute(0, 3, 1, 2)
        torch.testing.assert_close(layer(x).double(), normed * torch.sigmoid(normed), rtol=1e-4, atol=1e-5)


def test_output_convolution_has_neither_norm_nor_activation():
    layer, x = Conv(4, 3, 5, norm=False), torch.randn(2, 4, 6, 6)
    assert layer.norm is None
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.conv.weight, layer.conv.bias, padding=2))


# Heads


@pytest.mark.parametrize("dist", ["symexp_twohot", "symlog_disc", "symlog_mse", "mse", "normal"])
def test_scalar_heads(dist):
    head = ScalarHead(6, layers=1, units=8, dist=dist, bins=255, outscale=0.0)
    feat, target = torch.randn(4, 3, 6), torch.randn(4, 3)
    out = head(feat)
    assert (out.mode() == 0).all() and out.mode().shape == (4, 3)
    loss = out.loss(target)
    assert loss.shape == (4, 3)
    if "mse" in dist:
        scored = torch.sign(target) * torch.log1p(target.abs()) if dist == "symlog_mse" else target
        torch.testing.assert_close(loss, scored**2)
    elif dist == "normal":
        torch.testing.assert_close(loss, 0.5 * target**2 + 0.5 * math.log(2 * math.pi))
    else:
        torch.testing.assert_close(loss, torch.full((4, 3), math.log(255)))  # uniform over the bins
    assert set(head.state_dict()) == {n for n, _ in head.named_parameters()}, "bins are not saved"


def test_binary_head():
    head = BinaryHead(6, layers=1, units=8, outscale=0.0)
    torch.testing.assert_close(head(torch.randn(2, 3, 6)).prob, torch.full((2, 3), 0.5))


def test_continuous_actor_bounds():
    actor = Actor(6, 3, (), layers=1, units=8, outscale=0.0)
    dist = actor(torch.randn(5, 6))
    assert (dist.mode() == 0).all()
    torch.testing.assert_close(dist.std, torch.full((5, 3), 0.9 / (1 + math.exp(-2)) + 0.1))
    for bias, mean, std in ((50.0, 1.0, 0.8), (-50.0, -1.0, 0.2)):
        actor = Actor(6, 3, (), layers=1, units=8, outscale=0.0, min_std=0.2, max_std=0.8)
        for layer in (actor.mean, actor.std):
            nn.init.constant_(layer.bias, bias)
        dist = actor(torch.randn(5, 6))
        torch.testing.assert_close(dist.mode(), torch.full((5, 3), mean))
        torch.testing.assert_close(dist.std, torch.full((5, 3), std))
        # Samples are not squashed.
        torch.testing.assert_close(dist.sample(torch.full((5, 3), 2.0)), torch.full((5, 3), mean + 2 * std))


def test_discrete_actor_mixes_a_uniform_share_into_each_group():
    actor = Actor(6, 5, [2, 3], layers=1, units=8, unimix_ratio=0.1)
    for layer in actor.logits:
        with torch.no_grad():
            layer.bias[0] = 1e4
    dist = actor(torch.randn(4, 6))
    assert dist.mode().tolist() == [[1, 0, 1, 0, 0]] * 4
    torch.testing.assert_close(dist.parts[0].probs, torch.tensor([[0.95, 0.05]]).expand(4, 2))
    torch.testing.assert_close(dist.parts[1].probs, torch.tensor([[0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3]]).expand(4, 3))
