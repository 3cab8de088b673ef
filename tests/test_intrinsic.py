"""Intrinsic rewards, held against what is known: visit counts, noise, linear probes, channel capacities.

Most run in a toy world whose latent state is known: `ToyWorld` has the cell of a grid as its stochastic state.
"""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium import spaces

import config as configuration
from dreamer import Draw, Dreamer, main
from envs.grid import MOVES, GridWorld, free_cells
from errors import UserError
from exploration import (
    ICM,
    REWARDS,
    RND,
    Disagreement,
    Distilled,
    Diversity,
    Empowerment,
    Random,
    SkillBehavior,
    register_reward,
    view,
)
from models import Intrinsic
from returns import lambda_return

ROOT = Path(__file__).resolve().parent.parent
HEAD = {"layers": 1, "units": 32, "dist": "symexp_twohot", "bins": 255, "outscale": 0.0}
ACTIONS = len(MOVES)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class ToyWorld:
    """A world model of a grid that knows it all: `stoch` is the cell [*b, 1, cells], `deter` a constant.

    slip: probability that a uniformly drawn action is carried out instead.
    """

    def __init__(self, env: GridWorld, slip: float = 0.0):
        size = env._free.shape[0]
        self.cells = size * size
        after = [[env.after((c // size, c % size), a) for a in range(ACTIONS)] for c in range(self.cells)]
        to = torch.tensor([[r * size + c for r, c in row] for row in after])
        moves = torch.nn.functional.one_hot(to, self.cells).float()  # [cell, action, cell]
        self.moves = (1 - slip) * moves + slip * moves.mean(1, keepdim=True)
        self.rssm = SimpleNamespace(deter=1, stoch_size=self.cells, feat_size=self.cells + 1, discrete=self.cells)
        self.rssm.dist = lambda state: SimpleNamespace(probs=state["stoch"])
        self.rssm.layout, self.rssm.img_step = lambda: None, self.img_step
        self.encoder = SimpleNamespace(sizes={"vector": self.cells})

    def state(self, cell: torch.Tensor) -> dict:
        stoch = torch.nn.functional.one_hot(cell, self.cells).float().unsqueeze(-2)
        return {"deter": torch.zeros(*cell.shape, 1), "stoch": stoch}

    def img_step(self, state: dict, action: torch.Tensor, noise: torch.Tensor, layout) -> dict:
        probs = torch.einsum("nc,na,nad->nd", state["stoch"].squeeze(-2), action, self.moves[state_cell(state)])
        return self.state((torch.log(probs) + noise.squeeze(-2)).argmax(-1))

    def draw(self) -> Draw:
        return Draw(torch.Generator().manual_seed(1), (1, self.cells), True, ACTIONS, True)


def state_cell(state: dict) -> torch.Tensor:
    return state["stoch"].squeeze(-2).argmax(-1)


def walk(env: GridWorld, episodes: int, steps: int, seed: int = 0) -> tuple[dict, torch.Tensor]:
    """Replayed states [B, T, ...] of a random walk, as rewards are given them, and its cells."""
    rng, world = np.random.default_rng(seed), ToyWorld(env)
    cells, actions = np.zeros((episodes, steps), int), rng.integers(ACTIONS, size=(episodes, steps))
    for episode in range(episodes):
        env.reset()
        for step in range(steps):
            cells[episode, step] = env._at[0] * env._free.shape[1] + env._at[1]
            env.step(actions[episode, step])
    batch = {
        "action": torch.nn.functional.one_hot(torch.tensor(actions), ACTIONS).float(),
        "is_first": torch.arange(steps).expand(episodes, steps) == 0,
        "reward": torch.zeros(episodes, steps),
    }
    return world.state(torch.tensor(cells)) | batch, torch.tensor(cells)


def fit(reward: Intrinsic, world, data: dict, updates: int, batch: int = 16, lr: float = 3e-3) -> dict:
    """Trains an intrinsic reward on replayed states. Returns the last metrics."""
    optimizer = torch.optim.Adam((p for p in reward.parameters() if p.requires_grad), lr)
    generator = torch.Generator().manual_seed(0)
    for _ in range(updates):
        rows = torch.randint(len(data["reward"]), (batch,), generator=generator)
        part = {key: value[rows] for key, value in data.items()}
        loss, metrics = reward.loss(world, part, part, {})
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    return metrics


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation; ranks of ties are averaged."""

    def ranks(values):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    return np.corrcoef(ranks(x), ranks(y))[0, 1]


def rewards_of_all(reward: Intrinsic, world: ToyWorld) -> torch.Tensor:
    """What every transition (cell, action) pays, [cells, actions]."""
    cells = torch.arange(world.cells).repeat_interleave(ACTIONS)
    actions = torch.eye(ACTIONS).repeat(world.cells, 1)
    feat = torch.cat([torch.zeros(len(cells), 1), torch.eye(world.cells)[cells]], -1)
    after = torch.cat([torch.zeros(len(cells), 1), world.moves[cells, actions.argmax(-1)]], -1)
    traj = {"feat": torch.stack([feat, after], 1), "action": actions.unsqueeze(1).expand(-1, 2, -1)}
    with torch.no_grad():
        return reward(world, traj).reshape(world.cells, ACTIONS)


# Plan2Explore


def test_disagreement_falls_with_visits():
    env = GridWorld(free_cells(10, "open"), steps=10**9)
    data, _ = walk(env, episodes=40, steps=40)
    world = ToyWorld(env)
    reward = Disagreement(world, ACTIONS, (ACTIONS,), units=64)
    fit(reward, world, data, 300)
    disagreement = rewards_of_all(reward, world).mean(1).numpy()
    assert spearman(disagreement, env.visits.flatten()) < -0.7


@pytest.mark.parametrize("spread", ["std", "var"])
def test_disagreement_is_the_mean_deviation_of_the_models(spread):
    world = ToyWorld(GridWorld(free_cells(4, "open")))
    reward = Disagreement(world, ACTIONS, (ACTIONS,), models=5, units=8, spread=spread)
    feat, action = torch.randn(3, 4, world.rssm.feat_size), torch.rand(3, 4, ACTIONS)
    members = reward.models(torch.cat([feat, action], -1)[:, :-1])
    expected = torch.stack([getattr(members[:, b, t], spread)(0).mean() for b in range(3) for t in range(3)]).view(3, 3)
    torch.testing.assert_close(reward(world, {"feat": feat, "action": action}), expected)
    # One member alone is a plain MLP of its own weights.
    x = torch.cat([feat, action], -1)[:, :-1]
    for layer, (weight, bias) in enumerate(zip(reward.models.weights, reward.models.biases, strict=True)):
        x = x @ weight[2] + bias[2]
        if layer < 2:
            x = torch.nn.functional.silu(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-4))
    torch.testing.assert_close(x, members[2])


def test_a_noisy_television_does_not_dominate():
    """Cell 0 shows noise that no model can predict: they agree on its mean, and places that were not seen pay more."""
    env = GridWorld(free_cells(8, "open"), steps=10**9)
    data, cells = walk(env, episodes=40, steps=30)
    world = ToyWorld(env)
    data["embed"] = torch.cat([data["stoch"].squeeze(-2), torch.zeros(*cells.shape, 16)], -1)
    world.encoder.sizes["screen"] = 16
    noise = torch.randn(*cells.shape, 16, generator=torch.Generator().manual_seed(0))
    data["embed"][..., -16:] = torch.where((cells == 0).unsqueeze(-1), noise, 0.0)
    reward = Disagreement(world, ACTIONS, (ACTIONS,), target="embed", units=64)
    fit(reward, world, data, 1000)
    pays = rewards_of_all(reward, world)
    unseen = torch.tensor(env.visits.flatten() == 0)
    assert unseen.sum() > 5 and pays[0, 0] < pays[unseen].mean()  # action 0 stays before the screen


def test_the_step_across_an_episodes_end_teaches_nothing():
    env = GridWorld(free_cells(4, "open"), steps=10**9)
    data, _ = walk(env, 4, 10)
    world = ToyWorld(env)
    data["is_first"][:, 5] = True
    data["embed"] = data["stoch"].squeeze(-2).clone()
    for kind in (Disagreement, ICM, RND):
        options = {} if kind is Disagreement else {"head": HEAD}
        reward = kind(world, ACTIONS, (ACTIONS,), units=8, **options)
        loss, _ = reward.loss(world, data, data, {})
        assert loss.shape[-2:] == (4, 9)
        assert (loss[:, 4] == 0).all() and (loss[:, 3] > 0).all()


# ICM


def controlled_and_noise(count: int, steps: int, seed: int = 0) -> dict:
    """`embed` has two numbers that actions move and eight of noise, all of unit size."""
    rng = np.random.default_rng(seed)
    moves = np.array([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]]) * 0.3
    actions = rng.integers(ACTIONS, size=(count, steps))
    position = rng.uniform(-1.5, 1.5, (count, 1, 2)) + np.cumsum(moves[actions], 1) - moves[actions]
    noise = rng.normal(size=(count, steps, 8))
    return {
        "embed": torch.tensor(np.concatenate([position, noise], -1), dtype=torch.float32),
        "deter": torch.zeros(count, steps, 1),
        "stoch": torch.tensor(position, dtype=torch.float32).unsqueeze(-1),
        "action": torch.nn.functional.one_hot(torch.tensor(actions), ACTIONS).float(),
        "is_first": torch.zeros(count, steps, dtype=torch.bool),
        "reward": torch.zeros(count, steps),
    }


def toy(embed: int) -> SimpleNamespace:
    rssm = SimpleNamespace(deter=1, stoch_size=2, feat_size=3, discrete=0)
    return SimpleNamespace(rssm=rssm, encoder=SimpleNamespace(sizes={"vector": embed}))


def probe(phi: torch.Tensor, target: torch.Tensor) -> float:
    """R² of a linear readout on the half that it was not fitted to."""
    phi = torch.cat([phi, torch.ones(len(phi), 1)], -1).double()
    half, target = len(phi) // 2, target.double()
    weight = torch.linalg.lstsq(
        phi[:half].T @ phi[:half] + 1e-6 * torch.eye(phi.shape[1]), phi[:half].T @ target[:half]
    )
    rest = target[half:] - phi[half:] @ weight.solution
    return float(1 - rest.square().sum() / (target[half:] - target[half:].mean(0)).square().sum())


@pytest.mark.slow
def test_icm_features_hold_what_actions_change_and_not_the_noise():
    data, world = controlled_and_noise(400, 10), toy(10)
    reward = ICM(world, ACTIONS, (ACTIONS,), head=HEAD, features=4, units=64, layers=2)
    metrics = fit(reward, world, data, 1500, batch=64)
    with torch.no_grad():
        phi = reward.represent(data["embed"]).flatten(0, 1)
    assert probe(phi, data["embed"][..., :2].flatten(0, 1)) > 0.9
    assert probe(phi, data["embed"][..., 2:].flatten(0, 1)) < 0.2
    assert metrics["icm_inverse"] > 0.9  # 1/5 is chance


@pytest.mark.slow
def test_icm_pays_less_and_less_for_what_was_seen_and_more_for_what_was_not():
    env = GridWorld(free_cells(8, "open"), steps=10**9)
    data, cells = walk(env, episodes=30, steps=20)
    world = ToyWorld(env)
    data["embed"] = data["stoch"].squeeze(-2)
    reward = ICM(world, ACTIONS, (ACTIONS,), head=HEAD, features=16, units=64)
    fit(reward, world, data, 5)
    early = reward.signal(world, data, data)[0].mean()
    fit(reward, world, data, 1500)
    late = reward.signal(world, data, data)[0].mean()
    assert late < early / 5
    far = [c for c in range(world.cells) if env.visits.flatten()[c] == 0]
    assert len(far) > 5
    unseen = torch.tensor([[c, int(world.moves[c, 2].argmax())] for c in far])  # one row up
    state = world.state(unseen) | {"embed": torch.eye(world.cells)[unseen], "reward": torch.zeros(len(far), 2)}
    state |= {"action": torch.eye(ACTIONS)[2].expand(len(far), 2, -1), "is_first": torch.zeros(len(far), 2) > 0}
    assert reward.signal(world, state, state)[0].mean() > 2 * late


def coverage_at_random(seed: int, steps: int, episode: int) -> float:
    """Share of the cells of grid_halls that uniform actions visit."""
    env, actor = GridWorld(free_cells(20, "halls"), seed, steps=episode), Random(spaces.Discrete(ACTIONS), seed)
    over = True
    for _ in range(steps):
        over = env.reset()["is_last"] if over else over
        over = env.step(actor.policy(1)[0].argmax())["is_last"]
    return float((env.visits > 0).sum() / env._free.sum())


@pytest.mark.slow
def test_plan2explore_sees_more_than_chance(tmp_path):
    """The whole agent, from nothing, within 1,000 steps."""
    flags = ("--configs", "exploration", "--expl_behavior", "plan2explore", "--steps", "1000", "--eval_every", "0")
    config = configuration.load([*flags, "--logdir", str(tmp_path)])
    main(config)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    seen = max(row["episode/coverage"] for row in rows if "episode/coverage" in row)
    chance = [coverage_at_random(seed, 1000, config.grid["steps"]) for seed in range(10)]
    assert 0.02 < min(chance) and seen > 1.5 * np.mean(chance)


@pytest.mark.parametrize("classes", [(), (2, 3)], ids=["continuous", "multi-discrete"])
def test_icm_takes_every_kind_of_action(classes):
    world, size = toy(10), 5
    data = controlled_and_noise(20, 6)
    if not classes:
        data["action"] = data["action"][..., :size] * 0.7
    reward = ICM(world, size, classes, head=HEAD, units=16)
    if classes:
        data["action"] = torch.cat(
            [torch.eye(2)[torch.randint(2, (20, 6))], torch.eye(3)[torch.randint(3, (20, 6))]], -1
        )
    start, _ = reward.loss(world, data, data, {})
    fit(reward, world, data, 50)
    end, _ = reward.loss(world, data, data, {})
    assert end.mean() < start.mean()


def test_distilled_rewards_are_predicted_upon_arrival_in_their_own_unit():
    """The signal of a cell is its index: what the head then pays for imagined arrivals is the index over its RMS."""

    class Index(RND):
        def signal(self, world_model, post, batch):
            value = state_cell(post)[:, 1:].float() * 1e-3
            return value, torch.zeros_like(value), {}

    env = GridWorld(free_cells(4, "open"), steps=10**9)
    data, cells = walk(env, 40, 20)
    world = ToyWorld(env)
    reward = Index(world, ACTIONS, (ACTIONS,), head=HEAD)
    fit(reward, world, data, 1000)
    rms = (cells[:, 1:].float() * 1e-3).square().mean().sqrt()
    assert reward.unit.value.item() == pytest.approx(rms.item(), rel=0.1)
    paid = rewards_of_all(reward, world)
    arrived = world.moves.argmax(-1)
    seen = torch.tensor(env.visits.flatten())[arrived] > 5
    torch.testing.assert_close(paid[seen], (arrived * 1e-3 / rms)[seen], atol=0.2, rtol=0.1)


def test_what_lies_between_two_episodes_is_not_a_transition():
    class Jump(RND):
        def signal(self, world_model, post, batch):
            value = torch.where(batch["is_first"][:, 1:], 1e6, 2.0)
            return value, value, {}

    env = GridWorld(free_cells(4, "open"), steps=10**9)
    data, _ = walk(env, 4, 6)
    data["is_first"][:, 3] = True
    reward = Jump(ToyWorld(env), ACTIONS, (ACTIONS,), head=HEAD)
    loss, metrics = reward.loss(None, data, data, {})
    assert reward.unit.value == pytest.approx(2.0) and metrics["rnd"] == pytest.approx(2.0)
    assert (loss[:, 2] == 0).all() and (loss[:, [0, 1, 3, 4]] > 0).all()


# Empowerment


def capacity(channel: torch.Tensor, rounds: int = 2000) -> float:
    """Blahut-Arimoto: the capacity in nats of p(y | x), [X, Y]."""
    channel, source = channel.double(), torch.full((len(channel),), 1 / len(channel), dtype=torch.float64)
    for _ in range(rounds):
        joint = source @ channel
        gain = torch.exp((channel * torch.log((channel / joint.clamp(min=1e-300)).clamp(min=1e-300))).sum(1))
        source = source * gain / (source * gain).sum()
    return float((source * torch.log(gain)).sum())


def channel(world: ToyWorld, cell: int, steps: int) -> torch.Tensor:
    """p(cell after `steps` actions | the actions), [sequences, cells]."""
    reached = torch.eye(world.cells)[cell].unsqueeze(0)
    for _ in range(steps):
        reached = torch.einsum("sc,cad->sad", reached, world.moves).flatten(0, 1)
    return reached


def train_empowerment(world: ToyWorld, cell: int, steps: int, updates: int = 700) -> tuple[float, float]:
    """The learned bound at a cell, from fresh rollouts, and what is paid on arriving there."""
    reward = Empowerment(world, ACTIONS, (ACTIONS,), steps=steps, starts=256, units=64, layers=1)
    draw, start = world.draw(), world.state(torch.full((1, 256), cell))
    batch = {"is_first": torch.zeros(1, 256, dtype=torch.bool)}
    optimizer = torch.optim.Adam(reward.parameters(), 3e-3)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, 2 * (1 - update / updates))
        loss, _ = reward.loss(world, start, batch, reward.noise(1, 256, draw))
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    with torch.no_grad():
        bounds = [reward.loss(world, start, batch, reward.noise(1, 256, draw))[1]["empowerment"] for _ in range(20)]
        feat = torch.cat([torch.zeros(1, 1), torch.eye(world.cells)[cell].unsqueeze(0)], -1)
        return float(torch.stack(bounds).mean()), float(reward(world, {"feat": torch.stack([feat, feat], 1)}).item())


@pytest.mark.parametrize(
    ("cell", "steps", "reachable"),
    [((3, 3), 1, 5), ((3, 3), 2, 13), pytest.param((3, 3), 3, 25, marks=pytest.mark.slow), ((0, 0), 1, 3)],
    ids=["one step", "two", "three", "corner"],
)
def test_empowerment_is_the_log_of_the_cells_within_reach(cell, steps, reachable):
    env = GridWorld(free_cells(7, "open"))
    world, index = ToyWorld(env), cell[0] * 7 + cell[1]
    exact = capacity(channel(world, index, steps))
    assert exact == pytest.approx(math.log(reachable), abs=1e-3)
    bound, paid = train_empowerment(world, index, steps)
    assert 0.95 * exact < bound < 1.005 * exact, (bound, exact)
    assert paid == pytest.approx(exact, rel=0.06)


@pytest.mark.slow
def test_empowerment_of_a_slippery_grid_is_its_channels_capacity():
    world = ToyWorld(GridWorld(free_cells(5, "open")), slip=0.4)
    exact = capacity(channel(world, 12, 1))
    assert 0.3 < exact < 1.0
    bound, paid = train_empowerment(world, 12, 1)
    assert 0.95 * exact < bound < 1.05 * exact, (bound, exact)  # of 5120 rollouts: their noise is 2 %
    assert paid == pytest.approx(exact, rel=0.08)


def test_the_planner_does_not_see_deter():
    """The recurrent state holds the last action: q would read it off."""
    world = ToyWorld(GridWorld(free_cells(4, "open")))
    for form in ("state", "action"):
        reward = Empowerment(world, ACTIONS, (ACTIONS,), form=form, units=8)
        start, end = torch.randn(2, 3, world.rssm.feat_size)
        ends, other = (reward._ends(world, start, torch.cat([x, end[:, 1:]], -1)) for x in torch.randn(2, 3, 1))
        assert torch.equal(ends, other)


def test_action_information_pays_what_the_outcome_tells_about_the_action():
    """On arrival in another cell the action is known, so a uniform policy is paid ln 5; staying at a corner is one of
    three actions that lead there.
    """
    env = GridWorld(free_cells(5, "open"), steps=10**9)
    data, _ = walk(env, 60, 30)
    world = ToyWorld(env)
    reward = Empowerment(world, ACTIONS, (ACTIONS,), form="action", units=64)
    assert reward.noise(4, 5, None) == {}
    fit(reward, world, data, 1000)
    for cell, action, expected in ((12, 1, math.log(5)), (0, 0, math.log(5 / 3))):
        feat = torch.cat(
            [torch.zeros(2, 1), torch.eye(world.cells)[[cell, int(world.moves[cell, action].argmax())]]], -1
        )
        traj = {"feat": feat.unsqueeze(0), "action": torch.eye(ACTIONS)[action].expand(1, 2, -1)}
        paid = reward(world, traj | {"log_prob": torch.full((1, 1), -math.log(5))})
        assert paid.item() == pytest.approx(expected, abs=0.15)


# DIAYN


def test_skills_are_drawn_at_an_episodes_start_and_kept():
    behavior = make_agent("--expl_behavior", "diayn", "--diayn.skills", "4").explorer
    assert isinstance(behavior, SkillBehavior)
    feat, carry, first = (
        torch.zeros(6, behavior.actor.mlp[0].linear.in_features - 4),
        behavior.initial(6),
        torch.zeros(6) > 1,
    )
    noise = torch.randn(6, 2 + 4)
    seen, carry = behavior.see(feat, carry, first, noise)
    assert torch.equal(carry.argmax(-1), noise[:, -4:].argmax(-1)) and torch.equal(seen[:, -4:], carry)
    kept = behavior.see(feat, carry, first, torch.randn(6, 6))[1]
    assert torch.equal(kept, carry)
    first[2] = True
    again = torch.randn(6, 6)
    again[2, -4:] = -carry[2]
    changed = behavior.see(feat, carry, first, again)[1]
    assert torch.equal(changed[[0, 1, 3, 4, 5]], carry[[0, 1, 3, 4, 5]]) and changed[2].argmax() != carry[2].argmax()


def test_skills_pay_at_most_the_log_of_their_number():
    world = ToyWorld(GridWorld(free_cells(4, "open")))
    reward = Diversity(world, ACTIONS, (ACTIONS,), skills=4, units=16)
    cells = torch.arange(4).repeat(8)
    feat = torch.cat([torch.zeros(32, 1), torch.eye(16)[cells]], -1).unsqueeze(1).expand(-1, 3, -1)
    seen = torch.cat([feat, torch.eye(4)[cells].unsqueeze(1).expand(-1, 3, -1)], -1)
    traj = {"feat": feat, "seen": seen}
    optimizer = torch.optim.Adam(reward.parameters(), 1e-2)
    assert reward(world, traj).abs().mean() < 1
    for _ in range(300):
        loss, _ = reward.imagined_loss(world, traj)
        assert (reward(world, traj) <= math.log(4)).all()
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    assert reward(world, traj).mean() > 0.97 * math.log(4)


# In the agent

OBS = {"vector": spaces.Box(-1, 1, (3,), np.float32)}
SMALL = "--configs debug --device cpu --imag_horizon 3".split()
EXPLORERS = ("plan2explore", "icm", "rnd", "surprise", "empowerment", "diayn")


def make_agent(*flags: str, act_space=None) -> Dreamer:
    torch.manual_seed(0)
    config = configuration.load([*SMALL, *flags])
    return Dreamer(OBS, act_space or spaces.Box(-1, 1, (2,), np.float32), config, "cpu")


def make_batch(agent: Dreamer, batch: int = 4, time: int = 6) -> dict:
    rng, rssm = np.random.default_rng(0), agent.world_model.rssm
    actions = rng.uniform(-1, 1, (batch, time, agent.action_size)).astype(np.float32)
    if agent.classes:
        actions = np.eye(agent.action_size, dtype=np.float32)[actions.argmax(-1)]
    context = {"deter": np.zeros((batch, rssm.deter), np.float16), "action": actions[:, 0]}
    context |= {"stoch": np.zeros((batch, rssm.stoch), np.uint8), "valid": np.zeros(batch, bool)}
    obs = {"vector": rng.normal(size=(batch, time, 3)).astype(np.float32), "action": actions, "context": context}
    obs |= {"reward": rng.normal(size=(batch, time)).astype(np.float32)}
    return agent.to_device(obs | {key: np.zeros((batch, time), bool) for key in ("is_first", "is_last", "is_terminal")})


@pytest.mark.parametrize("act_space", [spaces.Box(-1, 1, (2,), np.float32), spaces.MultiDiscrete([3, 2])], ids=str)
@pytest.mark.parametrize("name", EXPLORERS)
def test_explorers_learn_beside_the_task_and_leave_it_alone(name, act_space):
    """With the same noise, world model and task policy move exactly as without the explorer."""
    plain, agent = make_agent(act_space=act_space), make_agent("--expl_behavior", name, act_space=act_space)
    agent.world_model.load_state_dict(plain.world_model.state_dict())
    agent.behavior.load_state_dict(plain.behavior.state_dict())
    before = {key: value.clone() for key, value in agent.explorer.state_dict().items()}
    for _ in range(8):
        for one in (plain, agent):
            metrics, _ = one.train_step(make_batch(one))
    for part in ("world_model", "behavior"):
        for key, value in getattr(plain, part).state_dict().items():
            torch.testing.assert_close(
                getattr(agent, part).state_dict()[key], value, rtol=0, atol=0, msg=f"{part} {key}"
            )
    moved = {key for key, value in agent.explorer.state_dict().items() if not torch.equal(value, before[key])}
    assert any(key.startswith("actor") for key in moved) and any(".critic" in key for key in moved)
    assert any(".reward." in key for key in moved)
    assert all(torch.isfinite(value) for value in metrics.values())
    assert f"intrinsic/{name}_loss" in metrics and f"explorer/reward/{name}" in metrics


class Likes(Intrinsic):
    """Pays for the first action, whatever comes of it: no parameters, no loss."""

    def __init__(self, world_model, action_size, classes):
        super().__init__()

    def forward(self, world_model, traj):
        return traj["action"][:, :-1, 0]


@pytest.fixture
def likes():
    register_reward("likes", Likes)
    yield
    REWARDS.pop("likes")


LEARN_FAST = ("--opt.lr", "1e-2", "--opt.warmup", "0", "--actor.entropy", "1e-3")


def preference(behavior, agent) -> float:
    with torch.no_grad():
        return float(behavior.actor(torch.zeros(1, agent.world_model.rssm.feat_size)).parts[0].probs[0, 0])


def test_what_is_paid_changes_what_the_explorer_does_and_not_what_the_task_policy_does(likes):
    agent = make_agent("--expl_behavior", "likes", *LEARN_FAST, act_space=spaces.Discrete(4))
    batch = make_batch(agent) | {"reward": torch.zeros(4, 6)}
    for _ in range(40):
        agent.train_step(batch)
    assert preference(agent.explorer, agent) > 0.8
    assert preference(agent.behavior, agent) < 0.5
    obs = {"vector": np.zeros((50, 3), np.float32), "is_first": np.ones(50, bool)}
    explored, _ = agent.policy(obs, agent.initial(50), explore=True)
    played, _ = agent.policy(obs, agent.initial(50))
    assert explored[:, 0].mean() > 0.7 > 0.6 > played[:, 0].mean()


def test_a_stream_joins_the_task_policy_with_a_critic_of_its_own(likes):
    shares = []
    for streams in ("", "likes:0.5"):
        agent = make_agent("--expl_streams", streams, *LEARN_FAST, act_space=spaces.Discrete(4))
        batch = make_batch(agent) | {"reward": torch.zeros(4, 6)}
        for _ in range(40):
            metrics, _ = agent.train_step(batch)
        shares.append(preference(agent.behavior, agent))
    assert shares[1] > 0.8 > 0.5 > shares[0]
    assert list(agent.behavior.streams) == ["extrinsic", "likes"] and agent.explorer is None
    assert metrics["policy/reward/likes"] > 0.7 and metrics["policy/return/likes"] > metrics["policy/return"]


def test_the_task_joins_the_explorer_if_asked(likes):
    agent = make_agent("--expl_behavior", "likes", "--expl_extr_scale", "2.0", "--expl_streams", "rnd:0.25")
    scales = {name: stream.scale for name, stream in agent.explorer.streams.items()}
    assert scales == {"likes": 1.0, "rnd": 0.25, "extrinsic": 2.0}
    assert list(agent.behavior.streams) == ["extrinsic"]
    metrics, _ = agent.train_step(make_batch(agent))
    assert {"explorer/repval_loss", "policy/repval_loss", "explorer/return", "explorer/return/rnd"} <= metrics.keys()


def test_a_stream_may_look_as_far_ahead_as_it_likes(likes):
    """A constant reward of 1 is worth its horizon, and the task's critic keeps its own."""
    agent = make_agent("--expl_streams", "likes:0.5:5,rnd:0.1", "--horizon", "100")
    discounts = {name: stream.discount for name, stream in agent.behavior.streams.items()}
    assert discounts == pytest.approx({"extrinsic": 0.99, "likes": 0.8, "rnd": 0.99})
    agent = make_agent("--expl_behavior", "likes", "--expl_horizon", "20", "--expl_streams", "rnd:0.1:5")
    assert {n: s.discount for n, s in agent.explorer.streams.items()} == pytest.approx({"likes": 0.95, "rnd": 0.8})
    assert agent.behavior.streams["extrinsic"].discount == pytest.approx(1 - 1 / 333)
    states, ones = torch.ones(3, 201), torch.ones(3, 200)
    returns = lambda_return(ones, states, agent.explorer.live(states * agent.explorer.discount, 0.8)[:, 1:], 1.0)
    assert returns[:, 0].tolist() == pytest.approx([5.0] * 3, rel=1e-4)
    # Farther than the task: a head that is sure of going on does not make the future grow.
    assert agent.explorer.live(torch.ones(3), 0.999).tolist() == pytest.approx([0.999] * 3)


class Own(Distilled):
    """Pays for what the first number of the embedding is."""

    name = "own"

    def signal(self, world_model, post, batch):
        signal = view(world_model, post, "embed")[:, 1:, 0]
        return signal, torch.zeros_like(signal), {}


class OwnHead(Own):
    def __init__(self, world_model, action_size, classes):
        super().__init__(world_model, action_size, classes, head=HEAD)


@pytest.mark.parametrize("kind", [Own, OwnHead])
def test_a_distilled_reward_of_ones_own(kind):
    register_reward("own", kind)
    try:
        agent = make_agent("--expl_behavior", "own")
        metrics, _ = agent.train_step(make_batch(agent))
    finally:
        REWARDS.pop("own")
    assert {"intrinsic/own", "explorer/reward/own"} <= metrics.keys()


def test_small_intrinsic_rewards_are_not_silenced():
    """Their normaliser has no floor and no bias: returns of 1e-4 count like those of 1 from the first update on."""
    agent = make_agent("--expl_behavior", "plan2explore")
    normalizer = agent.explorer.streams["plan2explore"].retnorm
    returns = torch.linspace(0, 1, 101)
    for size in (1e-4, 1.0):
        normalizer.load_state_dict({key: torch.zeros(()) for key in ("lo", "hi", "weight")})
        for _ in range(3):
            normalizer.update(returns * size)
            assert normalizer.scale.item() == pytest.approx(0.9 * size, rel=1e-3)


HIERARCHICAL = ("--behavior", "hierarchical", "--imag_horizon", "4", "--hier.every", "2", "--hier.goal.units", "8")


@pytest.mark.parametrize("size", [2.0**-13])  # a power of two, that rounding is the same
@pytest.mark.parametrize("flags", [(), ("--imag_gradient", "both"), HIERARCHICAL], ids=["flat", "both", "hierarchy"])
def test_the_size_of_an_intrinsic_reward_changes_nothing(size, flags):
    """Critics see it in its own unit: rewards of disagreement's size lie within one bin of a two-hot head."""

    class Sized(Likes):
        def forward(self, world_model, traj):
            return super().forward(world_model, traj) * paid_by[-1]

    register_reward("likes", Sized)
    learned, paid, paid_by = [], [], []
    try:
        for by in (1.0, size):
            paid_by.append(by)
            agent = make_agent("--expl_behavior", "likes", *LEARN_FAST, *flags, act_space=spaces.Discrete(4))
            batch = make_batch(agent)
            for _ in range(6):
                metrics, _ = agent.train_step(batch)
            learned.append({key: x for key, x in agent.explorer.state_dict().items() if ".unit." not in key})
            paid.append(metrics["explorer/reward/likes"])
    finally:
        REWARDS.pop("likes")
    for key, value in learned[0].items():
        torch.testing.assert_close(learned[1][key], value, rtol=1e-5, atol=1e-6, msg=key)
    critic = agent.explorer.streams["likes"].critic(torch.ones(1, agent.world_model.rssm.feat_size))
    assert abs(float(critic.mode())) > 1e-3
    torch.testing.assert_close(paid[1], paid[0] * size, rtol=1e-5, atol=0)  # what is logged is as it was paid


def test_a_checkpoint_brings_the_explorer_back():
    agent = make_agent("--expl_behavior", "icm")
    batch = make_batch(agent)
    for _ in range(3):
        agent.train_step(batch)
    other = make_agent("--expl_behavior", "icm", "--seed", "1")
    other.restore(agent.checkpoint())
    for one in (agent, other):
        one.train_step(batch)
    for key, value in agent.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    make_agent().restore(make_agent("--expl_behavior", "icm").checkpoint(), weights_only=True)
    with pytest.raises(UserError, match="nothing of 'explorer'.*--checkpoint"):
        other.restore(make_agent().checkpoint())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--expl_behavior", "plan2explor"), "did you mean plan2explore"),
        (("--expl_behavior", "nothing"), "expected one of plan2explore, icm"),
        (("--expl_streams", "icm"), "expected name:scale"),
        (("--expl_streams", "icm:0.1:0.5"), "expected name:scale or name:scale:horizon"),
        (("--expl_streams", "icm:0.1:5:5"), "expected name:scale or name:scale:horizon"),
        (("--expl_streams", "icm:0.1:5", "--metagrad", "one_step"), "gives icm"),
        (("--expl_streams", "icm:nan"), "expected name:scale"),
        (("--expl_streams", "icm:-1"), "expected name:scale"),
        (("--expl_streams", "icm:1:inf"), "expected name:scale"),
        (("--expl_streams", "icm:0.1,icm:0.2"), "'icm' is there already"),
        (("--expl_streams", "diayn:1"), "--expl_behavior diayn"),
        (("--expl_streams", "curiosity:1"), "'curiosity' is no intrinsic reward"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_mistakes_are_told(flags, message):
    with pytest.raises(UserError, match=message):
        make_agent(*flags)


def test_the_example_of_the_documentation_runs(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "behaviours.md").read_text(), re.DOTALL)
    assert len(code[code.index("class ") : code.index("register_reward(")].splitlines()) <= 50
    file = tmp_path / "novelty.py"
    file.write_text(code.replace("logdir/novelty", str(tmp_path / "run")))
    done = subprocess.run(
        [sys.executable, file],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    last = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("intrinsic/novelty" in row and "explorer/reward/unknown" in row for row in last)
