"""Returns against the textbook's mixture of n-step returns, the normaliser against numpy, and slow copies."""

import numpy as np
import pytest
import torch
from torch import nn

from returns import ReturnNormalizer, RootMeanSquare, SlowTarget, lambda_return


def textbook(reward, boot, live, lam):
    """R_t as the mixture of all n-step returns, each summed up by itself: Sutton & Barto, eq. 12.3, with discounts per
    step.
    """
    batch, time = reward.shape
    returns = np.zeros((batch, time))
    for b in range(batch):
        for t in range(time):
            remaining = 1.0  # probability that no shorter n-step return was chosen
            for n in range(1, time - t + 1):
                n_step, discount = 0.0, 1.0
                for k in range(n):
                    n_step += discount * reward[b, t + k]
                    discount *= live[b, t + k]
                n_step += discount * boot[b, t + n]
                last = n == time - t
                returns[b, t] += remaining * (1.0 if last else 1 - lam[b, t + n - 1]) * n_step
                remaining *= lam[b, t + n - 1]
    return returns


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    return {
        "reward": rng.normal(size=(3, 6)),
        "boot": rng.normal(size=(3, 7)),
        "live": rng.uniform(0.5, 1.0, size=(3, 6)),
    }


def ours(case, lam) -> np.ndarray:
    lam = torch.as_tensor(lam) if isinstance(lam, np.ndarray) else lam
    return lambda_return(*(torch.tensor(case[key]) for key in ("reward", "boot", "live")), lam).numpy()


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_lambda_return_is_the_mixture_of_n_step_returns(case, lam):
    np.testing.assert_allclose(ours(case, lam), textbook(**case, lam=np.full((3, 6), lam)), rtol=1e-12)


def test_lambda_of_each_step(case):
    lam = np.random.default_rng(1).uniform(size=(3, 6))
    lam[:, 2] = 0
    np.testing.assert_allclose(ours(case, lam), textbook(**case, lam=lam), rtol=1e-12)


def test_lambda_zero_bootstraps_one_step_ahead(case):
    expected = case["reward"] + case["live"] * case["boot"][:, 1:]
    np.testing.assert_allclose(ours(case, 0.0), expected, rtol=1e-12)


def test_lambda_one_is_the_discounted_sum(case):
    expected = np.zeros((3, 6))
    for b in range(3):
        for t in range(6):
            factors = np.concatenate([[1], np.cumprod(case["live"][b, t:])])
            expected[b, t] = (factors * np.append(case["reward"][b, t:], case["boot"][b, -1])).sum()
    np.testing.assert_allclose(ours(case, 1.0), expected, rtol=1e-12)


def test_nothing_counts_beyond_a_termination(case):
    case["live"][1, 3] = 0
    before = ours(case, 0.95)
    case["reward"][1, 4:] += 100
    case["boot"][1, 4:] -= 100
    after = ours(case, 0.95)
    np.testing.assert_array_equal(after[1, :4], before[1, :4])
    assert (after[1, 4:] != before[1, 4:]).all()
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])
    assert after[1, 3] == case["reward"][1, 3]


@pytest.mark.parametrize("rows", [2, 6, 7])  # also as many rows as steps, where a mixed-up axis has a fitting shape
def test_last_value_is_taken_along_time(rows):
    boot = torch.zeros(rows, 7, dtype=torch.float64)
    boot[:, -1] = torch.arange(rows) + 1.0
    zeros, half = torch.zeros(rows, 6, dtype=torch.float64), torch.full((rows, 6), 0.5, dtype=torch.float64)
    expected = (np.arange(rows) + 1)[:, None] * 0.5 ** np.arange(6, 0, -1)
    np.testing.assert_allclose(lambda_return(zeros, boot, half, 1.0), expected)


@pytest.mark.parametrize("lam", [0.0, 0.95])
def test_what_each_return_depends_on(case, lam):
    tensors = {key: torch.tensor(value, requires_grad=True) for key, value in case.items()}
    returns = lambda_return(tensors["reward"], tensors["boot"], tensors["live"], lam)
    for t in range(6):
        grads = torch.autograd.grad(returns[1, t], list(tensors.values()), retain_graph=True)
        for grad in grads:
            assert (grad[[0, 2]] == 0).all(), "rows of a batch must not mix"
        reward, boot, live = (grad[1] for grad in grads)
        end = t + 1 if lam == 0 else 6  # with lambda 0 one transition counts
        assert torch.equal(reward != 0, (torch.arange(6) >= t) & (torch.arange(6) < end))
        assert torch.equal(live != 0, (torch.arange(6) >= t) & (torch.arange(6) < end))
        assert torch.equal(boot != 0, (torch.arange(7) > t) & (torch.arange(7) <= end))


# Normaliser


def test_normalizer_against_numpy():
    normalizer, rng = ReturnNormalizer(rate=0.1, limit=1.0).double(), np.random.default_rng(0)
    lo = hi = 0.0
    assert normalizer.lo == 0 and normalizer.hi == 0 and normalizer.scale == 1
    for scale in (1.0, 50.0, 3.0, 0.01):
        returns = rng.normal(1.0, scale, size=(13, 7))
        normalizer.update(torch.tensor(returns))
        lo += 0.1 * (np.percentile(returns, 5, method="linear") - lo)
        hi += 0.1 * (np.percentile(returns, 95, method="linear") - hi)
        np.testing.assert_allclose([normalizer.lo, normalizer.hi], [lo, hi], rtol=1e-6)
        np.testing.assert_allclose(normalizer.scale, max(1.0, hi - lo), rtol=1e-6)


def test_normalizer_starts_at_zero_and_is_not_debiased():
    normalizer = ReturnNormalizer(rate=0.01)
    normalizer.update(torch.linspace(-1000, 1000, 2001).reshape(3, 667))
    torch.testing.assert_close(normalizer.hi, torch.tensor(9.0))  # a hundredth of the 95th percentile, 900
    torch.testing.assert_close(normalizer.lo, torch.tensor(-9.0))
    torch.testing.assert_close(normalizer.scale, torch.tensor(18.0))


def test_percentiles_are_taken_over_everything():
    # Within each time step all returns are equal: a range per time step would be 0.
    normalizer = ReturnNormalizer(rate=1.0)
    normalizer.update(torch.arange(101.0).expand(10, 101))
    torch.testing.assert_close(normalizer.scale, torch.tensor(90.0))
    normalizer.update(torch.arange(101.0)[:, None].expand(101, 10))
    torch.testing.assert_close(normalizer.scale, torch.tensor(90.0))
    assert normalizer.lo.shape == normalizer.hi.shape == ()


def test_small_returns_stay_small():
    normalizer = ReturnNormalizer(rate=1.0, limit=1.0)
    normalizer.update(torch.linspace(0, 1e-3, 50))
    assert normalizer.scale == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_normalizer_ignores_a_batch_that_is_not_finite(bad):
    normalizer = ReturnNormalizer(rate=0.5)
    normalizer.update(torch.linspace(-10, 10, 100))
    before = normalizer.lo.clone(), normalizer.hi.clone()
    returns = torch.linspace(-10, 10, 100)
    returns[::3] = bad
    normalizer.update(returns)
    assert torch.equal(normalizer.lo, before[0]) and torch.equal(normalizer.hi, before[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_root_mean_square_against_numpy(bad):
    unit, rng = RootMeanSquare(rate=0.1), np.random.default_rng(0)
    assert unit.value == 1  # of nothing yet
    square = weight = 0.0
    for size in (1e-3, 5.0, 0.2):
        signal, live = rng.normal(0, size, (7, 5)).astype(np.float32), rng.integers(0, 2, (7, 5)).astype(np.float32)
        unit.update(torch.tensor(signal), torch.tensor(live))
        square += 0.1 * ((signal**2 * live).sum() / live.sum() - square)
        weight += 0.1 * (1 - weight)
        np.testing.assert_allclose(unit.value, np.sqrt(square / weight), rtol=1e-5)
    unit.update(torch.tensor([1.0, bad]))
    unit.update(torch.tensor([1.0, 2.0]), torch.zeros(2))  # none counts
    np.testing.assert_allclose(unit.value, np.sqrt(square / weight), rtol=1e-5)
    unit = RootMeanSquare(rate=0.01)
    unit.update(torch.full((3,), -2e-3))
    np.testing.assert_allclose(unit.value, 2e-3, rtol=1e-5)  # debiased
    unit = RootMeanSquare(rate=1.0)
    unit.update(torch.zeros(3))
    assert unit.value > 0  # to be divided by


def test_normalizer_state_is_float32_and_in_place():
    normalizer = ReturnNormalizer(rate=1e-3)
    places = [buffer.data_ptr() for buffer in normalizer.buffers()]
    normalizer.update(torch.linspace(-1, 1, 64, dtype=torch.bfloat16))
    assert normalizer.lo.dtype == normalizer.hi.dtype == normalizer.scale.dtype == torch.float32
    # Half precision would swallow this small a step.
    high = np.percentile(torch.linspace(-1, 1, 64, dtype=torch.bfloat16).float(), 95)
    normalizer.hi.fill_(100.0)
    normalizer.update(torch.linspace(-1, 1, 64, dtype=torch.bfloat16))
    np.testing.assert_allclose(normalizer.hi, 100 + 1e-3 * (high - 100), rtol=1e-6)
    assert places == [buffer.data_ptr() for buffer in normalizer.buffers()]
    assert set(normalizer.state_dict()) == {"lo", "hi"}


# Slow copies


def moved(source: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in source.parameters():
            p.add_(1.0)
    return source


def test_slow_target_starts_as_a_copy_of_its_own():
    source = nn.Linear(3, 2)
    slow = SlowTarget(source)
    x = torch.randn(5, 3)
    assert torch.equal(slow(x), source(x))
    kept = slow(x)
    moved(source)
    assert torch.equal(slow(x), kept) and not torch.equal(source(x), kept)


def test_slow_target_moves_by_its_fraction():
    source = nn.Linear(3, 2)
    slow = SlowTarget(source, fraction=0.1)
    start = slow.model.weight.clone()
    moved(source)
    for n in range(1, 5):
        slow.update(source)
        torch.testing.assert_close(slow.model.weight, start + 1 - 0.9**n)
        torch.testing.assert_close(slow.model.bias, source.bias - 0.9**n)


def test_slow_target_moves_at_its_interval():
    source = nn.Linear(3, 2)
    slow = SlowTarget(source, fraction=1.0, every=3)
    start = slow.model.weight.clone()
    moved(source)
    for n in range(1, 7):
        moved(source)
        slow.update(source)
        assert torch.equal(slow.model.weight, source.weight) == (n % 3 == 0)
        if n < 3:
            assert torch.equal(slow.model.weight, start)


def test_slow_target_has_no_gradient():
    source = nn.Linear(3, 2)
    slow = SlowTarget(source)
    assert not any(p.requires_grad for p in slow.parameters())
    x = torch.randn(5, 3, requires_grad=True)
    assert not slow(x).requires_grad
    # The values themselves may be differentiated with respect to the features.
    assert torch.autograd.grad(slow.model(x).sum(), x)[0].abs().sum() > 0


def test_slow_target_is_saved_with_its_counter():
    source = nn.Linear(3, 2)
    slow, again = SlowTarget(source, every=2), SlowTarget(nn.Linear(3, 2), every=2)
    moved(source)
    slow.update(source)
    again.load_state_dict(slow.state_dict())
    for each in (slow, again):
        each.update(source)
    assert torch.equal(slow.model.weight, again.model.weight) and slow.updates == again.updates == 2
