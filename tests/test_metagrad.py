"""One-step meta-gradients against finite differences, and what they do where it is known what they should."""

import copy
from types import SimpleNamespace

import pytest
import torch
from test_intrinsic import make_agent, make_batch
from test_ppo import shaken
from torch import nn

from distributions import one_hot
from dreamer import Draw
from errors import UserError
from metagrad import OneStep
from models import ImagBehavior, Intrinsic, WorldModel, extrinsic_reward, total_loss
from optim import Optimizer

ONE_STEP = ("--metagrad", "one_step", "--opt.warmup", "0")


# Against finite differences


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def precise(batch: dict) -> dict:
    return {
        key: precise(x) if isinstance(x, dict) else x.double() if x.is_floating_point() else x
        for key, x in batch.items()
    }


def multiplier(optimizer: Optimizer, key: str) -> tuple[torch.Tensor, float]:
    """What a group's last gradient was multiplied by on its way to the weights, by the formulas of LaProp and AGC, and
    how far a weight moves at most.
    """
    group, count = optimizer.groups[key], float(optimizer.updates)
    factors = []
    for weight, grad in zip(group.split(group.before), group.split(group.raw), strict=True):
        limit = optimizer.agc * max(optimizer.pmin, float(weight.norm()))
        factors.append(torch.full((weight.numel(),), min(1.0, limit / max(float(grad.norm()), 1e-300))))
    factors, second = torch.cat(factors), group.second / (1 - optimizer.beta2**count)
    if optimizer.clip:
        clipped = torch.cat([grad.flatten() for grad in group.split(group.raw)]) * factors
        factors = factors * min(1.0, optimizer.clip / float(clipped.norm()))
    rate = float(group.lr * group.log_gain.exp()) * (1 - optimizer.beta1) / (1 - optimizer.beta1**count)
    return factors * rate / (second.sqrt() + optimizer.eps), rate / (1 - optimizer.beta2) ** 0.5


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--critic.dist symlog_mse --critic.slow_target true",
        "--contdisc false --opt.clip 0.1 --opt.name adam --meta.horizon 50",
    ],
)
def test_finite_differences(double, flags):
    """Of a real update of the whole agent, all losses included, for every entry of η. (Without the normalisers, whose
    scales count as constant.)
    """
    streams = ("--expl_streams", "rnd:0.3,surprise:0.2", "--reward_EMA", "false", "--actor.entropy", "0.3")
    agent = shaken(*ONE_STEP, *streams, *flags.split())
    batch = precise(make_batch(agent))
    batch["is_last"][:, 3] = batch["is_terminal"][0, 3] = True
    batch["is_first"][:, 4] = True
    meta, optimizer = agent.meta, agent.optimizer
    meta.eta.copy_(torch.linspace(-0.5, 0.5, len(meta.eta)))
    meta.write()
    for _ in range(3):
        agent.train_step(batch)
    groups = [optimizer.groups[key] for key in meta.groups]
    noises = [agent.draw_noise(4, 6) for _ in range(2)]
    start, entries = copy.deepcopy(agent.checkpoint()), meta.eta.clone()

    def gradients(eta: torch.Tensor) -> list[torch.Tensor]:
        agent.restore(start)
        meta.eta.copy_(eta)
        meta.write()
        losses, _, _ = agent.losses(batch, noises[0])
        optimizer.backward(total_loss(losses, agent.loss_scales))
        return [group.grad.clone() for group in groups]

    before = [group.data.clone() for group in groups]
    raw = gradients(entries)
    agent.restore(start)
    agent.train_step(batch, noises[0])
    after, traces = ([x.clone() for x in xs] for xs in zip(*((g.data, g.traces) for g in groups), strict=True))
    for group, weights, grad in zip(groups, before, raw, strict=True):
        group.before, group.raw = weights, grad
    meta.eta.copy_(entries)
    meta.write()
    factors, most = zip(*(multiplier(optimizer, key) for key in meta.groups), strict=True)
    agent.losses(batch, noises[1])
    imagined = agent.behavior.imagined
    meta.look()
    found = meta.grad.clone()

    def outer(weights: list[torch.Tensor]) -> float:
        agent.behavior.imagined = imagined
        for group, flat in zip(groups, weights, strict=True):
            group.data.copy_(flat)
        with torch.no_grad():
            return float(meta.outer_loss())

    expected = []
    for entry, name in enumerate(meta.names):
        if name.startswith("lr_"):
            which = meta.groups.index(name.removeprefix("lr_"))
            moves = [(b - a) * (g == which) for g, (b, a) in enumerate(zip(before, after, strict=True))]
        else:
            step = torch.zeros_like(entries)
            step[entry] = 1e-3
            up, down = gradients(entries + step), gradients(entries - step)
            changes = [(u - d) / 2e-3 for u, d in zip(up, down, strict=True)]
            moves = [(f * x).clamp(-m, m) for f, x, m in zip(factors, changes, most, strict=True)]
            for trace, factor, change, m in zip(traces, factors, changes, most, strict=True):
                inside = (factor * change).abs() < 0.99 * m
                close = {"rtol": 1e-4, "atol": 1e-5 * float(change.abs().max()) + 1e-7}
                torch.testing.assert_close((trace[entry] / factor)[inside], change[inside], **close)
                assert inside.float().mean() > 0.9 and trace[entry].abs().max() <= 1.001 * m
        eps = 1e-5 / max(float(move.abs().max()) for move in moves)
        high, low = ([a - sign * eps * move for a, move in zip(after, moves, strict=True)] for sign in (1, -1))
        expected.append((outer(high) - outer(low)) / (2 * eps))
    assert min(abs(x) for x in expected) > 1e-8
    for name, one, two in zip(meta.names, found.tolist(), expected, strict=True):
        assert one == pytest.approx(two, rel=1e-4), name


# In a corridor


class Corridor(WorldModel):
    """A world model that knows it all: cells in a row, steps to the left and to the right, and a reward of 1 for coming
    to the last cell, where the episode ends.
    """

    grad_heads = ()

    def __init__(self, cells: int = 7):
        nn.Module.__init__(self)
        self.cells = cells
        self.rssm = SimpleNamespace(layout=lambda: None, img_step=self.step, feat_size=cells + 1)

    def state(self, cell: torch.Tensor) -> dict:
        return {"deter": torch.zeros(*cell.shape, 1), "stoch": one_hot(cell, self.cells, torch.float32).unsqueeze(-2)}

    def step(self, state: dict, action: torch.Tensor, noise, layout) -> dict:
        cell = state["stoch"].squeeze(-2).argmax(-1)
        return self.state(torch.where(action[:, 1] > 0, cell + 1, cell - 1).clamp(0, self.cells - 1))

    def cont(self, feat: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(prob=1 - feat[..., -1])

    def reward(self, feat: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(mode=lambda: feat[..., -1])


def walk(world: Corridor, episodes: int = 16, steps: int = 8) -> tuple[dict, dict]:
    """Replayed states [B, T, ...] of a random walk from anywhere, and what was received there."""
    cell = torch.randint(world.cells - 1, (episodes,))
    cells, ended = [cell], [torch.zeros(episodes, dtype=torch.bool)]
    for _ in range(steps - 1):
        moved = (cell + 2 * torch.randint(2, (episodes,)) - 1).clamp(0, world.cells - 1)
        cell = torch.where(ended[-1], torch.randint(world.cells - 1, (episodes,)), moved)
        cells.append(cell)
        ended.append(cell == world.cells - 1)
    cells, ended = torch.stack(cells, 1), torch.stack(ended, 1)
    return world.state(cells), {"reward": ended.float(), "is_last": ended, "is_terminal": ended}


class Pays(Intrinsic):
    """Pays what a table of cells and actions says."""

    def __init__(self, table: torch.Tensor):
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, world_model, traj):
        return torch.einsum("ntc,nta,ca->nt", traj["feat"][:, :-1, 1:], traj["action"][:, :-1], self.table)


def train(
    updates: int,
    rewards: dict | None = None,
    horizon: float = 100,
    entropy: float = 0.01,
    outer: float = 100,
    kappa: float = 0.02,
) -> tuple[ImagBehavior, dict[str, float]]:
    """An actor-critic in the corridor, with its meta-gradients."""
    torch.manual_seed(0)
    world = Corridor()
    sizes = {"layers": 1, "units": 32}
    critic = {"dist": "symexp_twohot", "bins": 255, "outscale": 0.0, "slow_regularizer": 1.0, "slow_target": False}
    critic |= {"slow_target_update": 1, "slow_target_fraction": 0.02}
    behavior = ImagBehavior(
        world.rssm.feat_size,
        2,
        (2,),
        actor=sizes | {"entropy": entropy},
        critic=sizes | critic,
        retnorm={},
        horizon=horizon,
        contdisc=False,
        rewards=rewards and {"extrinsic": (extrinsic_reward, 1.0, None)} | rewards,
    )
    parts = {"actor": behavior.actor, "critic": nn.ModuleList(s.critic for s in behavior.streams.values())}
    named = {key: ((f"{key}.{n}", p) for n, p in part.named_parameters()) for key, part in parts.items()}
    optimizer = Optimizer({key: (params, 3e-3) for key, params in named.items()}, warmup=0)
    scales = {"policy": 1.0, "value": 1.0, "repval": 0.3}
    adapts = OneStep(behavior, optimizer, scales, horizon=outer, kappa=kappa, limit=1000.0)
    draw = Draw(torch.Generator().manual_seed(0), (1,), True, 2, True)
    for _ in range(updates):
        post, batch = walk(world)
        losses, _ = behavior.loss(world, post, batch, behavior.draw_noise(16, 8, draw))
        adapts.look()
        optimizer.step(total_loss(losses, scales))
        metrics = adapts.step()
        behavior.after_step()
    return behavior, {key: float(value) for key, value in metrics.items()}


@pytest.mark.slow
def test_the_discount_rises_where_the_reward_is_far():
    """Started at 0.5, the reward counts a sixty-fourth at the corridor's other end."""
    behavior, metrics = train(150, horizon=2, kappa=0.05)
    assert metrics["meta/discount"] > 0.9
    assert behavior.streams["extrinsic"].discount == pytest.approx(metrics["meta/discount"])


@pytest.mark.slow
def test_the_weight_of_planted_noise_falls_and_that_of_a_hint_rises():
    """Noise: a random number per cell and action, scaled up to unit range like every intrinsic reward."""
    generator = torch.Generator().manual_seed(3)
    noise, hint = torch.randn(7, 2, generator=generator), torch.zeros(7, 2)
    hint[5, 1] = 1.0  # the step to the goal, as the task has it
    scales = {}
    for name, table in (("noise", noise), ("hint", hint)):
        behavior, metrics = train(80, rewards={name: (Pays(table), 0.2, None)}, entropy=0.05, kappa=0.03)
        scales[name] = metrics[f"meta/scale/{name}"]
        assert behavior.streams[name].scale == pytest.approx(scales[name])
    assert scales["noise"] < 0.16 and scales["hint"] > 0.25


# In the agent


def test_a_checkpoint_brings_it_back():
    flags = (*ONE_STEP, "--expl_streams", "rnd:0.3")
    agent = make_agent(*flags)
    batch = make_batch(agent)
    for _ in range(4):
        agent.train_step(batch)
    other = make_agent(*flags, "--seed", "1")
    other.restore(agent.checkpoint())
    for _ in range(2):
        found = [one.train_step(batch)[0] for one in (agent, other)]
    assert {key: float(x) for key, x in found[0].items()} == {key: float(x) for key, x in found[1].items()}
    for key, value in agent.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    assert {"meta/discount", "meta/lambda", "meta/entropy", "meta/scale/rnd", "meta/lr_actor"} <= found[0].keys()


def test_at_the_start_it_is_the_plain_agent():
    """Until learning rates are warm nothing adapts, and nothing else differs either."""
    plain, agent = shaken("--opt.warmup", "5"), shaken("--metagrad", "one_step", "--opt.warmup", "5")
    for _ in range(4):
        for one in (plain, agent):
            one.train_step(make_batch(one))
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(agent.state_dict()[key], value, msg=key)
    assert not agent.meta.eta.any() and agent.meta.grad.any()
    for _ in range(3):
        agent.train_step(make_batch(agent))
    assert agent.meta.eta.all()


def test_states_count_as_the_outer_loss_discounts_them():
    for contdisc in ("true", "false"):
        agent = make_agent(*ONE_STEP, "--horizon", "10", "--meta.horizon", "100", "--contdisc", contdisc)
        inside = 0.9 if contdisc == "true" else 1.0  # the discount that the continue head has learned
        cont = inside * torch.rand(5, 4)
        cont[0] = 1.0  # above what is possible: an error of the head
        going = (cont / inside).clamp(max=1)
        torch.testing.assert_close(agent.behavior._weight(cont), torch.cumprod(0.99 * going, 1) / 0.99 * inside)
        assert agent.behavior.live(cont, agent.behavior.streams["extrinsic"].discount).max() <= 0.9001


def test_a_bad_update_leaves_it_alone():
    agent = make_agent(*ONE_STEP)
    batch = make_batch(agent)
    for _ in range(3):
        agent.train_step(batch)
    before = agent.meta.eta.clone()
    agent.train_step(batch | {"reward": batch["reward"] * torch.nan})
    assert torch.equal(agent.meta.eta, before)
    groups = [agent.optimizer.groups[key] for key in agent.meta.groups]
    assert not any(group.traces.any() or group.last.any() for group in groups)
    agent.train_step(batch)
    assert torch.equal(agent.meta.eta, before), "the weights did not move, so nothing is known"
    agent.train_step(batch)
    assert torch.isfinite(agent.meta.eta).all() and not torch.equal(agent.meta.eta, before)


def test_half_precision_and_tiny_gradients_make_no_leaps():
    """A weight whose gradient was 0 so far has a trace that nothing bounds, but what a gradient could do does."""
    agent = shaken(*ONE_STEP, "--precision", "bfloat16")
    batch = make_batch(agent)
    for _ in range(4):
        metrics, _ = agent.train_step(batch)
    for key in agent.meta.groups:
        group = agent.optimizer.groups[key]
        assert 0 < group.traces.abs().max() <= float(group.rate) * 32
    assert metrics["meta/skipped"] == 0 and agent.meta.eta.abs().max() < 0.1
    agent.meta.second.zero_()
    agent.meta.first.zero_()
    agent.meta.grad.fill_(1e-30)  # whose square is 0
    agent.meta.step()
    assert agent.meta.eta.abs().max() < 0.1


def test_an_explorer_beside_it_shares_the_rates_alone():
    agent = make_agent(*ONE_STEP, "--expl_behavior", "plan2explore")
    for _ in range(4):
        agent.train_step(make_batch(agent))
    assert isinstance(agent.explorer.streams["plan2explore"].discount, float) and not agent.explorer.keeps
    assert agent.explorer.entropy_scale == pytest.approx(3e-4) and agent.meta.eta.all()


@pytest.mark.parametrize(
    "flags",
    [
        ("--configs", "debug", "hierarchical", "--imag_horizon", "8", "--hier.every", "4"),
        ("--actor_objective", "ppo"),
        ("--imag_gradient", "dynamics"),
    ],
    ids=str,
)
def test_what_it_does_not_go_with(flags):
    with pytest.raises(UserError, match="hypergradient goes with all"):
        make_agent(*ONE_STEP, *flags)
