"""Distributions against closed forms, `torch.distributions`, and explicit constructions."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import distributions as td

from distributions import (
    Bernoulli,
    Joint,
    Normal,
    OneHot,
    SquaredError,
    StraightThrough,
    TwoHot,
    mixed_loss,
    softmax,
    symexp,
    symexp_bins,
    symlog,
)


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def gumbel(*shape: int, seed: int = 0) -> torch.Tensor:
    noise = torch.empty(*shape).exponential_(generator=torch.Generator().manual_seed(seed))
    return -noise.clamp(min=1e-30).log()


def two_hot(target: float, bins: np.ndarray) -> np.ndarray:
    """The two-hot vector of one number, by looking through the bins."""
    vector = np.zeros(len(bins))
    if target <= bins[0]:
        vector[0] = 1
    elif target >= bins[-1]:
        vector[-1] = 1
    else:
        k = max(i for i in range(len(bins) - 1) if bins[i] <= target)
        vector[k + 1] = (target - bins[k]) / (bins[k + 1] - bins[k])
        vector[k] = 1 - vector[k + 1]
    return vector


# Squashing


def test_symlog_values_and_inverse():
    x = torch.tensor([-1e6, -10.0, -1.0, -1e-4, 0.0, 1e-4, 1.0, 10.0, 1e6], dtype=torch.float64)
    expected = [np.sign(v) * np.log(1 + abs(v)) for v in x.tolist()]
    np.testing.assert_allclose(symlog(x).numpy(), expected, rtol=1e-9)
    torch.testing.assert_close(symexp(symlog(x)), x)
    y = torch.linspace(-15, 15, 31, dtype=torch.float64)
    torch.testing.assert_close(symlog(symexp(y)), y)


@pytest.mark.parametrize("count", [255, 41, 40, 3])
def test_bins_are_mirrored_and_ascend(count):
    bins = symexp_bins(count)
    assert bins.shape == (count,) and bins.dtype == torch.get_default_dtype()
    assert torch.equal(bins, -bins.flip(0))
    assert (bins.diff() >= 0).all()
    np.testing.assert_allclose(bins[-1], np.expm1(20.0), rtol=1e-6)


def test_bins_are_spaced_as_in_the_paper():
    bins = symexp_bins(255, dtype=torch.float64)
    np.testing.assert_allclose(symlog(bins), np.linspace(-20, 20, 255), atol=1e-8)
    assert bins[127] == 0
    np.testing.assert_allclose(bins[128], np.expm1(20 / 127), rtol=1e-12)


# Two-hot


@pytest.mark.parametrize("squash", [False, True])
def test_two_hot_loss_by_construction(squash):
    bins = torch.linspace(-20, 20, 41) if squash else symexp_bins(41)
    targets = [0.0, 0.3, -0.3, 1.0, -7.5, 123.4, -9999.0, 1e12, -1e12]
    if not squash:
        targets += bins[[0, 5, 20, 33, 40]].tolist()  # exactly on bins
    logits = draw(len(targets), 41, scale=2.0)
    log_probs = torch.log_softmax(logits.double(), -1).numpy()
    squashed = [np.sign(t) * np.log1p(abs(t)) if squash else t for t in targets]
    expected = [-(two_hot(t, bins.double().numpy()) * lp).sum() for t, lp in zip(squashed, log_probs, strict=True)]
    dist = TwoHot(logits, bins, squash)
    np.testing.assert_allclose(dist.loss(torch.tensor(targets)), expected, rtol=2e-5)
    np.testing.assert_allclose(dist.log_prob(torch.tensor(targets)), -np.array(expected), rtol=2e-5)


@pytest.mark.parametrize("squash", [False, True])
def test_mode_reads_back_what_the_two_hot_target_says(squash):
    bins = torch.linspace(-20, 20, 255) if squash else symexp_bins(255)
    targets = np.array([0.0, 0.01, -0.5, 3.0, -77.7, 5000.0])
    inner = np.sign(targets) * np.log1p(abs(targets)) if squash else targets
    probs = np.stack([two_hot(t, bins.double().numpy()) for t in inner])
    dist = TwoHot(torch.log(torch.tensor(probs, dtype=torch.float32)), bins, squash)
    np.testing.assert_allclose(dist.mode(), targets, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [255, 40])
@pytest.mark.parametrize("squash", [False, True])
def test_symmetric_logits_predict_exactly_zero(count, squash):
    bins = torch.linspace(-20, 20, count) if squash else symexp_bins(count)
    assert (TwoHot(torch.zeros(7, count), bins, squash).mode() == 0).all()
    logits = draw(7, count, scale=3.0)
    assert (TwoHot(logits + logits.flip(-1), bins, squash).mode() == 0).all()


def symmetric_logits() -> torch.Tensor:
    """[5, 255]: four waves, mirrored, and all zeros."""
    k, phase = np.arange(128), np.arange(4)[:, None]
    half = 0.3 * np.sin((phase + 1) * k * 0.37 + phase)
    return torch.tensor(np.concatenate([np.concatenate([half[:, :0:-1], half], 1), np.zeros((1, 255))]))


def test_fused_rounding_is_that_of_xla():
    # jax 0.4.33 on a CPU: jit of (p2 b2).sum() + ((p1 b1)[::-1] + p3 b3).sum(), whose exact value is 0. What is left of
    # the tolerance is the order of the last sum.
    expected = [-0.0853479356, -0.1810134053, 0.0797433481, 0.0284779202, -0.1752154529]
    half = symexp(torch.linspace(-20, 0, 128))  # bins in float32 throughout, as there: noise depends on every last bit
    found = TwoHot(symmetric_logits(), torch.cat([half, -half[:-1].flip(0)]), rounding="fused")
    found.probs = torch.softmax(symmetric_logits(), -1).float()
    np.testing.assert_allclose(found.mode(), expected, atol=2e-3)


def test_fused_rounding_fades_as_the_outer_bins_lose_their_mass():
    noise = []
    for sharpness in (0.0, 0.5, 1.0):
        logits = draw(200, 255, scale=0.1)
        logits = logits + logits.flip(-1) - sharpness * torch.linspace(-127, 127, 255).abs()
        exact, fused = (TwoHot(logits, symexp_bins(255), rounding=kind).mode() for kind in ("exact", "fused"))
        assert (exact == 0).all()
        noise.append(fused.std().item())
    assert 0.05 < noise[0] < 0.2 and noise[1] < 1e-3 and noise[2] < 1e-5


def test_fused_rounding_leaves_the_gradient_as_it_is():
    gradients = []
    for kind in ("exact", "fused"):
        logits = draw(3, 255).requires_grad_()
        TwoHot(logits, symexp_bins(255), rounding=kind).mode().sum().backward()
        gradients.append(logits.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5 * gradients[0].abs().max().item())


def test_two_hot_mode_is_the_expected_bin():
    logits, bins = draw(9, 255, scale=0.5), symexp_bins(255, limit=5.0)
    expected = torch.softmax(logits.double(), -1) @ bins.double()
    np.testing.assert_allclose(TwoHot(logits, bins).mode(), expected, rtol=1e-4, atol=1e-4)


def test_gradient_of_two_hot_loss_is_probs_minus_target():
    logits, bins = draw(4, 41).requires_grad_(), symexp_bins(41)
    targets = torch.tensor([0.0, -1.3, 250.0, 1e15], requires_grad=True)
    TwoHot(logits, bins).loss(targets).sum().backward()
    vectors = np.stack([two_hot(t, bins.double().numpy()) for t in targets.tolist()])
    np.testing.assert_allclose(logits.grad.numpy(), torch.softmax(logits.detach(), -1).numpy() - vectors, atol=1e-6)
    assert targets.grad is None


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_two_hot_loss_of_several_targets_is_the_sum_of_their_losses(count, squash):
    bins = torch.linspace(-20, 20, 41, dtype=torch.float64) if squash else symexp_bins(41, dtype=torch.float64)
    logits = draw(3, 4, 41, scale=2.0).double().requires_grad_()
    targets = [draw(3, 4, seed=10 + n, scale=10.0**n).double().requires_grad_() for n in range(count)]
    targets[0].data[0] = torch.tensor([1e12, -1e12, 0.0, bins[3] if not squash else 1.0])
    found = TwoHot(logits, bins, squash).loss(*targets)
    expected = sum(TwoHot(logits, bins, squash).loss(target) for target in targets)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    by_hand = torch.stack(
        [
            torch.from_numpy(two_hot(float(symlog(t) if squash else t), bins.numpy()))
            for target in targets
            for t in target.detach().flatten()
        ]
    ).view(count, 3, 4, 41)
    torch.testing.assert_close(found, -(by_hand.sum(0) * torch.log_softmax(logits, -1)).sum(-1), rtol=1e-9, atol=1e-9)
    weight = draw(3, 4, seed=5).double()
    grads = [
        torch.autograd.grad((loss * weight).sum(), (logits, *targets), allow_unused=True) for loss in (found, expected)
    ]
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=1e-10, atol=1e-12)
    assert grads[0][1:] == (None,) * count, "targets are held"


def test_scales_of_several_targets():
    logits, bins = draw(5, 41, scale=2.0), symexp_bins(41)
    first, second = draw(5, seed=1), draw(5, seed=2, scale=50.0)
    dist = TwoHot(logits, bins)
    expected = dist.loss(first) + 0.25 * dist.loss(second)
    torch.testing.assert_close(dist.loss(first, second, scales=(1.0, 0.25)), expected)
    torch.testing.assert_close(mixed_loss(dist, (first, second), (1.0, 0.25)), expected)
    other = SquaredError(draw(5, seed=3), dims=0)
    torch.testing.assert_close(
        mixed_loss(other, (first, second), (1.0, 0.25)), other.loss(first) + 0.25 * other.loss(second)
    )


@pytest.mark.parametrize("void", [-1e30, -math.inf])
def test_padded_logits_change_nothing(void):
    logits, bins, target = draw(6, 41, scale=2.0).requires_grad_(), symexp_bins(41), draw(6, seed=1, scale=9.0)
    padded = F.pad(logits.detach(), (0, 7), value=void).requires_grad_()
    plain, wide = TwoHot(logits, bins), TwoHot(padded, bins)
    torch.testing.assert_close(wide.mode(), plain.mode(), rtol=1e-6, atol=0)
    torch.testing.assert_close(wide.loss(target), plain.loss(target))
    for dist in (plain, wide):
        (dist.loss(target) + dist.mode() * 1e-6).sum().backward()
    torch.testing.assert_close(padded.grad[:, :41], logits.grad)
    assert (padded.grad[:, 41:] == 0).all()


def test_two_hot_loss_where_probabilities_underflow():
    """Logits 300 apart: the unlikely bin's probability is 0 in float32, and its log still 300 below."""
    bins = torch.linspace(-20, 20, 41)
    logits = torch.zeros(1, 41)
    logits[0, 0] = 300.0
    logits.requires_grad_()
    loss = TwoHot(logits, bins).loss(torch.tensor([5.0]))
    np.testing.assert_allclose(loss.detach(), [300.0], rtol=1e-6)
    loss.backward()
    expected = np.zeros(41)
    expected[0], expected[25] = 1.0, -1.0
    np.testing.assert_allclose(logits.grad[0], expected, atol=1e-6)


def test_second_derivatives_of_the_two_hot_loss():
    logits, bins = draw(3, 9).double().requires_grad_(), symexp_bins(9, limit=2.0, dtype=torch.float64)
    targets = draw(3, seed=1).double()
    assert torch.autograd.gradgradcheck(lambda x: TwoHot(x, bins).loss(targets), logits)


def test_a_mode_that_was_read_without_gradient_leaves_the_loss_its_own():
    logits = draw(4, 41).requires_grad_()
    dist = TwoHot(logits, symexp_bins(41))
    with torch.no_grad():
        dist.mode()
    assert dist.loss(torch.zeros(4)).requires_grad


# Categoricals


@pytest.mark.parametrize("shape", [(5,), (1, 1), (6, 2), (3, 4, 8), (3, 4, 9), (2, 3, 4, 5), (0, 3)], ids=str)
def test_softmax_against_torch(shape):
    """Few classes take another way than many; both are over the last axis."""
    logits = (draw(*shape, scale=30.0)).double().requires_grad_()
    found, expected = softmax(logits), torch.softmax(logits, -1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-300)
    weight = draw(*shape, seed=1).double()
    grads = [torch.autograd.grad((out * weight).sum(), logits)[0] for out in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-14)
    if logits.numel():
        assert torch.autograd.gradcheck(softmax, (draw(*shape).double().requires_grad_(),))
    turned = draw(*shape).double().permute(*reversed(range(len(shape))))  # classes do not lie side by side
    torch.testing.assert_close(softmax(turned, few=100), torch.softmax(turned, -1))


def test_straight_through_is_the_sample_with_the_gradient_of_the_probabilities():
    probs, sample = draw(3, 4).requires_grad_(), torch.eye(4)[:3].requires_grad_()
    grad = draw(3, 4, seed=1)
    out = StraightThrough.apply(probs, sample)
    assert torch.equal(out, sample)
    found, unused = torch.autograd.grad(out, (probs, sample), grad, allow_unused=True)
    assert torch.equal(found, grad) and unused is None


@pytest.mark.parametrize("classes", [2, 8, 40])
@pytest.mark.parametrize("unimix", [0.0, 0.01])
def test_samples_are_exactly_one_hot_and_their_noise_gets_no_gradient(classes, unimix):
    """probs + (sample - probs) would be one only to rounding."""
    logits = draw(50, classes, scale=3.0).requires_grad_()
    noise = gumbel(50, classes, seed=1).requires_grad_()
    sample = OneHot(logits, unimix).sample(noise)
    probs = (1 - unimix) * torch.softmax(logits, -1) + unimix / classes
    assert torch.equal(sample, torch.eye(classes)[(probs.log() + noise).argmax(-1)])
    grads = torch.autograd.grad((sample * draw(50, classes, seed=2)).sum(), (logits, noise), allow_unused=True)
    assert (grads[0] != 0).any() and grads[1] is None


@pytest.mark.parametrize("unimix", [0.0, 0.01, 0.3])
def test_one_hot_against_torch(unimix):
    logits, others = draw(5, 3, 6, seed=1), draw(5, 3, 6, seed=2)

    def reference(x):
        return td.Categorical(probs=(1 - unimix) * torch.softmax(x, -1) + unimix / 6)

    ours, p, q = OneHot(logits, unimix), reference(logits), reference(others)
    index = torch.randint(6, (5, 3), generator=torch.Generator().manual_seed(3))
    onehot = torch.eye(6)[index]
    torch.testing.assert_close(ours.log_prob(onehot), p.log_prob(index))
    torch.testing.assert_close(ours.loss(onehot), -p.log_prob(index))
    torch.testing.assert_close(ours.entropy(), p.entropy())
    torch.testing.assert_close(ours.kl(OneHot(others, unimix)), td.kl_divergence(p, q))
    assert torch.equal(ours.mode(), torch.eye(6)[logits.argmax(-1)])


def test_unimix_keeps_every_class_alive():
    logits = torch.tensor([[1e4, 0.0, -1e4, 0.0]])
    dist = OneHot(logits, 0.01)
    torch.testing.assert_close(dist.probs, torch.tensor([[0.9925, 0.0025, 0.0025, 0.0025]]))
    # The worst that can happen: all mass on a class that the other gives only its floor.
    worst = OneHot(logits, 0.01).kl(OneHot(-logits, 0.01))
    assert worst.item() < np.log(1 / 0.0025)


def test_straight_through_gradient_is_that_of_the_probabilities():
    weight, noise = draw(8, 5, seed=5), gumbel(8, 5)
    logits = draw(8, 5, seed=4).requires_grad_()
    sample = OneHot(logits, 0.1).sample(noise)
    assert torch.equal(sample.detach().sort(-1).values, torch.eye(5)[-1].expand(8, 5))
    (grad,) = torch.autograd.grad((sample * weight).sum(), logits)
    mixed = 0.9 * torch.softmax(logits, -1) + 0.1 / 5
    (expected,) = torch.autograd.grad((mixed * weight).sum(), logits)
    torch.testing.assert_close(grad, expected)


def test_sampling_follows_the_mixed_probabilities():
    logits, count = torch.tensor([2.0, 0.0, -1.0, -8.0, 1.0]), 20_000
    samples = OneHot(logits.expand(count, 5), 0.3).sample(gumbel(count, 5, seed=7))
    expected = (0.7 * torch.softmax(logits.double(), -1) + 0.3 / 5) * count
    chi_square = ((samples.double().sum(0) - expected) ** 2 / expected).sum()
    assert chi_square < 18.5  # 99.9 % of a chi-square with 4 degrees of freedom


def test_no_gumbel_noise_is_the_arg_max():
    logits = draw(20, 7)
    dist = OneHot(logits, 0.01)
    assert torch.equal(dist.sample(torch.zeros(20, 7)), dist.mode())


def test_detached_one_hot_stops_the_gradient_and_keeps_the_values():
    dist = OneHot(draw(3, 4).requires_grad_(), 0.01)
    copy = dist.detach()
    assert not copy.probs.requires_grad and not copy.log_probs.requires_grad
    assert torch.equal(copy.probs, dist.probs) and torch.equal(copy.entropy(), dist.entropy())


def test_joint_is_the_product_of_its_parts():
    logits = [draw(6, 2, seed=1), draw(6, 5, seed=2)]
    joint = Joint([OneHot(x, 0.01) for x in logits])
    references = [td.Categorical(probs=0.99 * torch.softmax(x, -1) + 0.01 / x.shape[-1]) for x in logits]
    index = [torch.tensor([0, 1, 1, 0, 1, 0]), torch.tensor([4, 3, 2, 1, 0, 0])]
    x = torch.cat([torch.eye(2)[index[0]], torch.eye(5)[index[1]]], -1)
    torch.testing.assert_close(joint.log_prob(x), sum(p.log_prob(i) for p, i in zip(references, index, strict=True)))
    torch.testing.assert_close(joint.loss(x), -joint.log_prob(x))
    torch.testing.assert_close(joint.entropy(), sum(p.entropy() for p in references))
    modes = torch.cat([torch.eye(2)[logits[0].argmax(-1)], torch.eye(5)[logits[1].argmax(-1)]], -1)
    assert torch.equal(joint.mode(), modes) and torch.equal(joint.sample(torch.zeros(6, 7)), modes)
    # Each part sees its own columns of the noise.
    noise = torch.zeros(6, 7)
    noise[:, 1], noise[:, 2 + 3] = 100, 100
    assert torch.equal(joint.sample(noise).argmax(-1), torch.ones(6, dtype=torch.long))
    assert torch.equal(joint.sample(noise)[:, 2:].argmax(-1), torch.full((6,), 3))


# Normal, squared error, Bernoulli


@pytest.mark.parametrize("dims", [0, 1, 3])
def test_normal_against_torch(dims):
    mean, other, x = (draw(2, 3, 4, 5, seed=s) for s in (1, 2, 3))
    std, other_std = draw(2, 3, 4, 5, seed=4).exp(), draw(2, 3, 4, 5, seed=5).exp()
    ours = Normal(mean, std, dims)
    p = td.Independent(td.Normal(mean, std), dims)
    q = td.Independent(td.Normal(other, other_std), dims)
    torch.testing.assert_close(ours.log_prob(x), p.log_prob(x))
    torch.testing.assert_close(ours.loss(x), -p.log_prob(x))
    torch.testing.assert_close(ours.entropy(), p.entropy())
    torch.testing.assert_close(ours.kl(Normal(other, other_std, dims)), td.kl_divergence(p, q))
    torch.testing.assert_close(
        Normal(mean, 0.7, dims).log_prob(x), td.Independent(td.Normal(mean, 0.7), dims).log_prob(x)
    )
    assert ours.detach().entropy().shape == p.entropy().shape


def test_normal_sample_is_reparameterised():
    mean, std = draw(4, 2).requires_grad_(), draw(4, 2, seed=1).exp().requires_grad_()
    noise = draw(4, 2, seed=2)
    dist = Normal(mean, std)
    assert torch.equal(dist.sample(torch.zeros(4, 2)), dist.mode()) and torch.equal(dist.mode(), mean)
    torch.testing.assert_close(dist.sample(torch.full((4, 2), 0.5)), mean + 0.5 * std)
    dist.sample(noise).sum().backward()
    assert torch.equal(mean.grad, torch.ones(4, 2))
    torch.testing.assert_close(std.grad, noise)
    assert not dist.detach().mean.requires_grad and not dist.detach().std.requires_grad


def test_squared_error_sums_over_the_event():
    pred, target = draw(2, 3, 4, 5, 6), draw(2, 3, 4, 5, 6, seed=1)
    expected = ((pred - target).double().numpy() ** 2).sum((2, 3, 4))
    np.testing.assert_allclose(SquaredError(pred, dims=3).loss(target), expected, rtol=1e-5)
    assert SquaredError(pred, dims=0).loss(target).shape == pred.shape
    torch.testing.assert_close(SquaredError(pred, dims=3).log_prob(target), -SquaredError(pred, dims=3).loss(target))


def test_squared_error_in_symlog_space():
    pred = torch.tensor([[np.log(11.0), -np.log(3.0)]], dtype=torch.float32)
    dist = SquaredError(pred, squash=True)
    torch.testing.assert_close(dist.mode(), torch.tensor([[10.0, -2.0]]))
    torch.testing.assert_close(dist.loss(torch.tensor([[10.0, -2.0]])), torch.zeros(1), atol=1e-6, rtol=0)
    torch.testing.assert_close(dist.loss(torch.zeros(1, 2)), pred.square().sum(-1))


def test_bernoulli_with_soft_targets():
    logit = torch.tensor([-30.0, -1.0, 0.0, 0.5, 3.0], requires_grad=True)
    target = torch.tensor([0.0, 0.997, 0.3, 1.0, 0.997])
    dist, p = Bernoulli(logit), torch.sigmoid(logit.detach()).double()
    expected = -(target * p.log() + (1 - target) * torch.log1p(-p))
    torch.testing.assert_close(dist.loss(target).double(), expected.double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dist.log_prob(target), -dist.loss(target))
    dist.loss(target).sum().backward()
    torch.testing.assert_close(logit.grad, p.float() - target)  # least where the probability is the target
    assert dist.mode().tolist() == [False, False, False, True, True]
    torch.testing.assert_close(dist.prob, torch.sigmoid(logit))


# Precision

HEADS = {
    "one_hot": (
        lambda x: OneHot(x, 0.01),
        lambda d, t: (d.log_prob(t), d.entropy(), d.kl(OneHot(t, 0.01)), d.sample(t)),
    ),
    "normal": (lambda x: Normal(x, x.abs() + 1), lambda d, t: (d.log_prob(t), d.entropy(), d.sample(t))),
    "squared_error": (lambda x: SquaredError(x, squash=True), lambda d, t: (d.loss(t), d.mode())),
    "two_hot": (lambda x: TwoHot(x, symexp_bins(8)), lambda d, t: (d.loss(t[:, 0]), d.mode())),
    "bernoulli": (lambda x: Bernoulli(x), lambda d, t: (d.loss(torch.sigmoid(t)), d.prob)),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", HEADS)
def test_half_precision_is_computed_in_float32(name, dtype):
    make, read = HEADS[name]
    logits, target = draw(16, 8, scale=3.0).to(dtype), draw(16, 8, seed=1)
    for ours, expected in zip(read(make(logits), target), read(make(logits.float()), target), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(
            ours, expected, rtol=2e-2 if name == "normal" else 0, atol=2e-2 if name == "normal" else 0
        )


def test_double_precision_stays():
    assert OneHot(draw(2, 3).double()).entropy().dtype == torch.float64
    assert Normal(draw(2, 3).double()).entropy().dtype == torch.float64


def test_predictions_stay_in_full_precision_under_autocast():
    """Values and rewards, and what is computed of them, are never rounded to half precision (trap 10)."""
    logits = torch.randn(4, 255, generator=torch.Generator().manual_seed(0))
    exact = TwoHot(logits, symexp_bins(255)).mode()
    with torch.autocast("cpu", torch.bfloat16):
        mode = TwoHot(logits, symexp_bins(255)).mode()
    assert mode.dtype == torch.float32 and torch.equal(mode, exact)


@pytest.mark.parametrize("kind", ["symexp_twohot", "symlog_disc", "symlog_mse", "mse", "normal"])
def test_slopes_are_how_losses_change_with_their_targets(kind):
    from layers import ScalarHead

    torch.manual_seed(0)
    head = ScalarHead(3, layers=1, units=8, dist=kind, bins=41, outscale=1.0).double()
    if head.twohot:
        head.bins = head.bins.double() * (2 / head.bins[-1])  # so that some targets lie beyond the outermost ones
    dist, target = head(torch.randn(200, 3, dtype=torch.float64)), 8 * torch.randn(200, dtype=torch.float64)
    high, low = (dist.loss(target + sign * 1e-6) for sign in (1, -1))
    torch.testing.assert_close(dist.slope(target), (high - low) / 2e-6, rtol=1e-4, atol=1e-6)
    (grad,) = torch.autograd.grad(dist.slope(target).sum(), head.out.bias)
    assert grad.abs().sum() > 0
