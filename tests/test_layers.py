"""Layers against formulas, dense equivalents, and the statistics of their initial weights."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import layers
from layers import (
    ACTIVATIONS,
    MLP,
    Actor,
    BinaryHead,
    BlockLinear,
    Conv,
    Dense,
    Linear,
    PiecewiseNorm,
    RMSNorm,
    ScalarHead,
    in_pieces,
    init_weight,
)

ROOT = Path(__file__).resolve().parent.parent
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


@pytest.mark.parametrize("outputs, wide", [(255, 256), (256, 256), (3, 8)])
def test_outputs_are_padded_with_a_void(outputs, wide):
    layer = Linear(5, outputs)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 7, 5)
    out = layer.padded(x)
    assert out.shape == (2, 7, wide)
    torch.testing.assert_close(out[..., :outputs], layer(x))
    assert (out[..., outputs:] == -1e30).all()
    out.exp().sum().backward()
    assert layer.weight.grad.shape == (outputs, 5) and layer.weight.grad.isfinite().all()


def test_block_linear_init_uses_the_fan_in_of_the_whole_layer():
    layer = BlockLinear(8, 64, 200)
    check_init(layer.weight, 1 / math.sqrt(8 * 64))
    assert (layer.bias == 0).all()


@pytest.mark.parametrize("resize", ["same", "pool", "stride", "nearest", "transposed"])
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


# The norm in pieces: (shape of x, shape of the scale, axes of the mean)
NORMS = {
    "matrix": ((5, 7), (7,), (-1,)),
    "sequence": ((6, 3, 5, 7), (7,), (-1,)),
    "one row": ((1, 7), (7,), (-1,)),
    "a scale per row": ((5, 3, 7), (3, 7), (-1,)),
    "one of them": ((1, 3, 7), (3, 7), (-1,)),
    "blocks": ((3, 5, 4), (3, 1, 4), (0, -1)),
    "blocks of one row, of the scale's own shape": ((3, 1, 4), (3, 1, 4), (0, -1)),
    "one block": ((1, 5, 4), (1, 1, 4), (0, -1)),
}
norms = pytest.mark.parametrize("shape, scale_shape, axes", NORMS.values(), ids=NORMS)
pieces = pytest.mark.parametrize("pieces", [1, 2, 100])  # about as many, at most one per row
activated = pytest.mark.parametrize("act", [None, F.silu], ids=["plain", "silu"])


def torch_norm(x, scale, act=None, axes=(-1,), eps=1e-4):
    """torch's own RMS norm and activation. Over axes (0, -1), those two are laid side by side first."""
    if axes == (-1,):
        out = F.rms_norm(x, x.shape[-1:], None, eps) * scale
    else:
        flat = x.transpose(0, 1).flatten(1)
        out = F.rms_norm(flat, flat.shape[-1:], scale.flatten(), eps).unflatten(1, x.shape[::2]).transpose(0, 1)
    return act(out) if act else out


def norm_inputs(shape, scale_shape, dtype=torch.float64):
    """Rows of many sizes; the smallest are ruled by eps."""
    size = 10.0 ** torch.linspace(1, -3, shape[-2] if len(shape) > 1 else 1, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64) * (size.unsqueeze(-1) if len(shape) > 1 else size)
    scale = torch.rand(scale_shape, dtype=torch.float64) + 0.5
    return x.to(dtype).requires_grad_(), scale.to(dtype).requires_grad_()


def check_norm(found, expected, *inputs, rtol=1e-10, atol=1e-12):
    """Values and gradients."""
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
    weight = torch.randn_like(expected)
    pairs = [torch.autograd.grad((out * weight).sum(), inputs) for out in (found, expected)]
    for one, two in zip(*pairs, strict=True):
        torch.testing.assert_close(one, two, rtol=100 * rtol, atol=100 * atol)


@pieces
@activated
@norms
def test_norm_in_pieces_against_torch(shape, scale_shape, axes, act, pieces, monkeypatch):
    x, scale = norm_inputs(shape, scale_shape)
    monkeypatch.setattr(layers, "PIECE", max(1, x.numel() // pieces))
    expected = torch_norm(x, scale, act, axes)
    found = layers.rms_norm(x, scale, act=act, axes=axes)
    assert type(found.grad_fn).__name__ == "PiecewiseNormBackward"
    check_norm(found, expected, x, scale)
    with torch.no_grad():
        torch.testing.assert_close(layers.rms_norm(x, scale, act=act, axes=axes), expected, rtol=1e-10, atol=1e-12)
    # What comes in transposed is not mistaken for what lies in order.
    order = list(reversed(range(len(shape))))
    scattered = x.detach().permute(order).contiguous().permute(order).requires_grad_()
    check_norm(
        layers.rms_norm(scattered, scale, act=act, axes=axes), torch_norm(scattered, scale, act, axes), scattered
    )


@pieces
@activated
@norms
def test_norm_in_pieces_gradcheck(shape, scale_shape, axes, act, pieces, monkeypatch):
    monkeypatch.setattr(layers, "PIECE", max(1, math.prod(shape) // pieces))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    scale = (torch.rand(scale_shape, dtype=torch.float64) + 0.5).requires_grad_()

    def norm(x, scale):
        return PiecewiseNorm.apply(x, scale, 1e-4, act is F.silu, axes)

    assert torch.autograd.gradcheck(norm, (x, scale))
    assert torch.autograd.gradcheck(lambda x: norm(x, scale.detach()), (x,)), "frozen scale"
    assert torch.autograd.gradcheck(lambda scale: norm(x.detach(), scale), (scale,)), "frozen input"
    assert torch.autograd.gradcheck(lambda x: norm(x, scale.detach()), (torch.zeros_like(x, requires_grad=True),))


@activated
@norms
def test_norm_in_pieces_leaves_its_inputs_and_can_be_gone_back_through_twice(
    shape, scale_shape, axes, act, monkeypatch
):
    monkeypatch.setattr(layers, "PIECE", 10)
    x, scale = norm_inputs(shape, scale_shape)
    kept, kept_scale, grad = x.detach().clone(), scale.detach().clone(), torch.randn(shape, dtype=torch.float64)
    kept_grad = grad.clone()
    out = layers.rms_norm(x, scale, act=act, axes=axes)
    first, second = (torch.autograd.grad(out, (x, scale), grad, retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert torch.equal(x, kept) and torch.equal(scale, kept_scale) and torch.equal(grad, kept_grad)


@activated
@norms
def test_norm_as_it_is_compiled(shape, scale_shape, axes, act, monkeypatch):
    """Where a compiler or a GPU fuses operations, or there is little to compute, the norm is written plainly."""
    monkeypatch.setattr(layers, "PIECE", 1)
    x, scale = norm_inputs(shape, scale_shape)
    few = layers.rms_norm(x, scale, act=act, axes=axes)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    plain = layers.rms_norm(x, scale, act=act, axes=axes)
    assert type(plain.grad_fn) is not type(few.grad_fn)
    check_norm(few, plain, x, scale)
    check_norm(layers.rms_norm(x, scale, act=act, axes=axes), torch_norm(x, scale, act, axes), x, scale)


@pytest.mark.parametrize("piece", [1, 2**18])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_norm_with_any_activation(act, piece, monkeypatch):
    monkeypatch.setattr(layers, "PIECE", piece)
    x, scale = norm_inputs((5, 7), (7,))
    function = ACTIVATIONS[act]
    check_norm(layers.rms_norm(x, scale, act=function), torch_norm(x, scale, function), x, scale)


@activated
@pytest.mark.parametrize("piece", [2**8, 2**18], ids=["pieces", "plain"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norm_of_half_precision(dtype, piece, act, monkeypatch):
    """float32 inside, gradients included; what comes out, and the input's gradient, are rounded."""
    x, scale = norm_inputs((64, 48), (48,), torch.float32)
    x = (x.detach().clamp(min=-100, max=100) + 0.5).to(dtype).requires_grad_()
    weight = torch.randn(64, 48)
    monkeypatch.setattr(layers, "PIECE", piece)
    found = layers.rms_norm(x, scale, act=act)
    expected = torch_norm(x.double(), scale.double(), act)
    assert found.dtype == dtype
    close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": torch.finfo(dtype).eps}
    torch.testing.assert_close(found.double(), expected, **close)
    for out in ((found.float() * weight).sum(), (expected * weight).sum()):
        out.backward()
        if out.dtype == torch.float32:
            x_grad, scale_grad, x.grad, scale.grad = x.grad, scale.grad, None, None
    assert x_grad.dtype == dtype and scale_grad.dtype == torch.float32
    # Where rows are small, gradients are large: errors are those of a row's whole gradient.
    error = (x_grad.double() - x.grad.double()).norm(dim=-1) / x.grad.double().norm(dim=-1)
    assert error.max() < 3 * torch.finfo(dtype).eps
    assert (scale_grad - scale.grad).norm() / scale.grad.norm() < torch.finfo(dtype).eps


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
@pytest.mark.parametrize(
    "resize, factor", [("same", 1), ("pool", 0.5), ("stride", 0.5), ("nearest", 2), ("transposed", 2)]
)
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


def same_padded(x, weight, bias):
    """Centred convolution that keeps the size, for even kernels too, as `padding="same"` has it."""
    kernel = weight.shape[-1]
    before = (kernel - 1) // 2
    return F.conv2d(F.pad(x, (before, kernel - 1 - before) * 2), weight, bias)


@pytest.mark.parametrize("norm", [False, True], ids=["output", "norm"])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (2, 7), (8, 4)], ids=str)
@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5, 7])
def test_folded_upsampling_is_upsampling_then_convolution(kernel, size, norm):
    """Values and all gradients, also at the borders, and for kernels larger than the map."""
    layer = Conv(3, 4, kernel, "nearest", norm=norm).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    expected = same_padded(nn.Upsample(scale_factor=2, mode="nearest")(x), layer.conv.weight, layer.conv.bias)
    if norm:
        expected = torch_norm(expected.permute(0, 2, 3, 1), layer.norm.scale, F.silu).permute(0, 3, 1, 2)
    found = layer(x)
    assert found.shape == (2, 4, 2 * size[0], 2 * size[1])
    check_norm(found, expected, x, *layer.parameters())


def test_folding_leaves_the_stored_weights_as_they_are():
    layer = Conv(3, 4, 5, "nearest")
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "conv.weight": (4, 3, 5, 5),
        "conv.bias": (4,),
        "norm.scale": (4,),
    }
    # Of a kernel of 5 no more than 3 pixels of the small map are read per axis, each tap by one of them.
    fold = layer.fold
    assert fold.shape == (2, 3, 5) and (fold.sum(1) == 1).all()


def test_folded_upsampling_gradcheck():
    layer = Conv(2, 2, 5, "nearest", norm=False).double()
    x = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    weight, bias = (p.detach().clone().requires_grad_() for p in layer.parameters())

    def run(x, weight, bias):
        return torch.func.functional_call(layer, {"conv.weight": weight, "conv.bias": bias}, (x,))

    assert torch.autograd.gradcheck(run, (x, weight, bias))


def test_pieces_are_not_unrolled_by_a_compiler():
    """However many there are, what is compiled stays as large. In a process without the checks of shapes."""
    done = subprocess.run([sys.executable, "-c", UNROLLED], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    few, many = map(int, done.stdout.split())
    assert 0 < few == many


UNROLLED = """
import torch
from layers import in_pieces

layer, nodes = torch.nn.Linear(3, 2), []

def backend(module, inputs):
    nodes.extend(module.graph.nodes)
    return module.forward

compiled = torch.compile(lambda x: 2 * in_pieces(layer, x + 1, 4), backend=backend, dynamic=False)
for pieces in (5, 50):
    nodes.clear()
    x = torch.randn(4 * pieces, 3)
    torch.testing.assert_close(compiled(x), 2 * layer(x + 1))
    print(len(nodes))
"""


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("count, size", [(11, 1), (11, 4), (12, 4), (11, 11), (11, 100), (1, 4)])
def test_pieces_make_the_whole(count, size, recompute):
    """Values and gradients, for a last piece of another size too, and each piece as large as it was asked to be."""
    function = nn.Sequential(Conv(3, 4, 5, "pool"), Conv(4, 2, 3, "nearest"), Conv(2, 2, 3, "stride")).double()
    x = torch.randn(count, 3, 8, 4, dtype=torch.float64, requires_grad=True)
    seen = []

    def watched(piece):
        seen.append(len(piece))
        return function(piece)

    found = in_pieces(watched, x, size, recompute)
    assert sum(seen) == count and max(seen) <= size and len(seen) == math.ceil(count / size)
    check_norm(found, function(x), x, *function.parameters())
    with torch.no_grad():
        torch.testing.assert_close(in_pieces(function, x, size, recompute), function(x))


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
