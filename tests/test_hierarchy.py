"""The hierarchy: chunks and returns against hand-written loops, goals that are kept and forgotten, the autoencoder."""

from types import SimpleNamespace

import numpy as np
import pytest
import test_ppo
import torch
from gymnasium import spaces
from test_intrinsic import make_agent, make_batch
from torch import nn

import ppo
from distributions import one_hot
from dreamer import Draw
from errors import UserError
from exploration import REWARDS, register_reward
from hierarchy import GoalAutoencoder, Hierarchy, chunk_starts, max_cosine, over_chunks
from models import Intrinsic, WorldModel, total_loss
from optim import Optimizer

HIERARCHY = ("--configs", "debug", "hierarchical", "--device", "cpu", "--hier.every", "3", "--imag_horizon", "6")
HIERARCHY += ("--hier.goal.units", "16", "--hier.goal.groups", "3", "--hier.goal.classes", "4")
SPACES = [spaces.Box(-1, 1, (2,), np.float32), spaces.MultiDiscrete([3, 2])]
K, H = 3, 6


def shaken(*flags: str, **options):
    """An agent whose heads do not start at zero, which would hide much."""
    return test_ppo.shaken(*HIERARCHY, *flags, **options)


# Chunks


def test_chunks_by_hand():
    """Decisions, rewards and ends of chunks, with episodes that end within them and goals of every age."""
    generator = torch.Generator().manual_seed(0)
    phase = torch.arange(2 * K) % K
    reward = torch.randn(2 * K, H, generator=generator)
    cont = torch.rand(2 * K, H + 1, generator=generator)
    cont[4, 4] = cont[0, 2] = 0.0
    starts, whole = chunk_starts(phase, H, K)
    means, goes_on = over_chunks(reward, cont, starts, K)
    for row in range(2 * K):
        expected = [t for t in range(H) if (t + int(phase[row])) % K == 0 and t + K <= H]
        assert starts[row][whole[row]].tolist() == expected
        for decision, start in enumerate(expected):
            alive, total, weights = 1.0, 0.0, 0.0
            for t in range(start, start + K):
                total, weights = total + alive * float(reward[row, t]), weights + alive
                alive *= float(cont[row, t + 1])
            assert float(means[row, decision]) == pytest.approx(total / weights, rel=1e-5, abs=1e-6)
            assert float(goes_on[row, decision]) == pytest.approx(alive, rel=1e-5, abs=1e-7)


def imagined(agent, seed: int = 0) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """A trajectory of its own policies, the ages of the first goals, and the probabilities of going on."""
    behavior, world = agent.behavior, agent.world_model
    kept = {}
    original = behavior.learn

    def spy(world_model, traj, phase):
        kept["traj"], kept["phase"] = traj, phase
        return original(world_model, traj, phase)

    behavior.learn = spy
    torch.manual_seed(seed)
    kept["losses"] = agent.losses(make_batch(agent), agent.draw_noise(4, 6))[0]
    behavior.learn = original
    cont = world.cont(kept["traj"]["feat"]).prob.detach()
    return kept["traj"] | {"losses": kept["losses"]}, kept["phase"], (cont / behavior.discount).clamp(max=1)


def test_goals_of_an_imagined_trajectory_change_when_they_are_due():
    agent = shaken()
    traj, phase, _ = imagined(agent)
    assert set(phase.tolist()) == set(range(K)) and (phase == 0).float().mean() > 0.5
    same = (traj["code"][:, 1:] == traj["code"][:, :-1]).all(-1)
    due = (torch.arange(1, H + 1) + phase.unsqueeze(1)) % K == 0
    assert same[~due].all() and same[due].float().mean() < 0.5
    torch.testing.assert_close(traj["goal"], agent.behavior.autoencoder.decode(traj["code"]))


def test_returns_of_the_worker_by_hand():
    """At a chunk's end the state is worth what it is for the goal that was pursued."""
    agent = shaken()
    traj, phase, cont = imagined(agent)
    behavior, deter = agent.behavior, agent.world_model.rssm.deter
    stream, feat, goal = behavior.streams["worker"], traj["feat"], traj["goal"]
    rollout = behavior.rollouts[1]
    with torch.no_grad():
        for row in range(0, len(phase), 5):
            following, expected = None, [0.0] * H
            for t in reversed(range(H)):
                reward = max_cosine(goal[row, t], feat[row, t + 1, :deter])
                old = stream.critic(torch.cat([feat[row, t + 1], goal[row, t]])).mode()
                ended = t + 1 == H or (t + 1 + int(phase[row])) % K == 0
                after = old if ended else (1 - behavior.lam) * old + behavior.lam * following
                following = reward + stream.discount * cont[row, t + 1] * after
                expected[t] = float(following)
            assert rollout.targets["worker"][0][row].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
            reached = [float(cont[row, : t + 1].prod()) * stream.discount**t for t in range(H)]
            assert rollout.weight[row].tolist() == pytest.approx(reached, rel=1e-4)


def test_returns_of_the_manager_by_hand():
    agent = shaken()
    traj, phase, cont = imagined(agent)
    behavior, feat = agent.behavior, traj["feat"]
    stream, rollout = behavior.streams["extrinsic"], behavior.rollouts[0]
    reward = agent.world_model.reward(feat).mode().detach()[:, 1:]
    decisions = 0
    with torch.no_grad():
        for row in range(len(phase)):
            starts = [t for t in range(H) if (t + int(phase[row])) % K == 0 and t + K <= H]
            following = None
            for number in reversed(range(len(starts))):
                start = starts[number]
                alive, total, weights = 1.0, 0.0, 0.0
                for t in range(start, start + K):
                    total, weights = total + alive * float(reward[row, t]), weights + alive
                    alive *= float(cont[row, t + 1])
                value = float(stream.critic(feat[row, start + K]).mode())
                last = number == len(starts) - 1
                after = value if last else (1 - behavior.lam) * value + behavior.lam * following
                following = total / weights + stream.discount * alive * after
                assert float(rollout.targets["extrinsic"][0][row, number]) == pytest.approx(
                    following, rel=1e-4, abs=1e-5
                )
                reached = float(cont[row, : start + 1].prod())
                assert float(rollout.weight[row, number]) == pytest.approx(reached, rel=1e-4)
                assert torch.equal(rollout.action[row, number], traj["code"][row, start])
                decisions += 1
    assert (rollout.weight > 0).sum() == decisions  # and no other counts


def test_the_manager_may_have_an_entropy_bonus_of_its_own():
    agent, curious = shaken("--actor.entropy", "0.1"), shaken("--actor.entropy", "0.1", "--hier.manager_entropy", "0.6")
    (before, _, _), (after, _, _) = imagined(agent), imagined(curious)
    rollout = curious.behavior.rollouts[0]
    bonus = (rollout.weight * curious.behavior.manager(rollout.seen[:, :-1]).entropy()).mean()
    found = before["losses"]["policy/manager"].mean() - after["losses"]["policy/manager"].mean()
    assert bonus > 0.1 and found.item() == pytest.approx(0.5 * bonus.item(), rel=1e-4)
    torch.testing.assert_close(after["losses"]["policy/worker"], before["losses"]["policy/worker"])


@pytest.mark.parametrize("act_space", SPACES, ids=str)
def test_at_first_the_gradient_of_both_is_reinforces(act_space):
    agent = shaken("--hier.manager_entropy", "0.2", act_space=act_space)
    losses, _, _ = agent.losses(make_batch(agent), agent.draw_noise(4, 6))
    for who, rollout in zip(("manager", "worker"), agent.behavior.rollouts, strict=True):
        params = list(agent.behavior.actors[who].parameters())
        expected = torch.autograd.grad(losses[f"policy/{who}"].mean(), params, retain_graph=True)
        loss, kl, clipped = ppo.loss(rollout, {"policy": 1.0, "value": 0.0}, clip=0.2)
        assert max(g.abs().max() for g in expected) > 1e-4 and abs(kl) < 1e-6 and clipped == 0
        for one, two in zip(expected, torch.autograd.grad(loss, params), strict=True):
            torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5 * float(one.abs().max()))


# Goals


def test_the_workers_reward():
    goal = torch.randn(5, 8)
    torch.testing.assert_close(max_cosine(goal, goal), torch.ones(5))
    torch.testing.assert_close(max_cosine(goal, -goal), -torch.ones(5))
    torch.testing.assert_close(max_cosine(goal, 4 * goal), torch.full((5,), 0.25))
    torch.testing.assert_close(max_cosine(4 * goal, goal), torch.full((5,), 0.25))
    assert (max_cosine(torch.zeros(5, 8), torch.zeros(5, 8)) == 0).all()


def test_a_goal_is_kept_for_its_time_and_never_across_episodes():
    behavior = shaken().behavior
    feat, carry = torch.randn(4, behavior.streams["extrinsic"].critic.mlp[0].linear.in_features), behavior.initial(4)
    codes, firsts = [], torch.zeros(8, 4, dtype=torch.bool)
    firsts[0], firsts[4, 1], firsts[5, 2] = True, True, True
    for first in firsts:
        _, carry = behavior.choose(feat, carry, first, torch.randn(4, 2 + behavior.extra))
        codes.append(carry["code"])
    same = torch.stack([(one == two).all(-1) for one, two in zip(codes[1:], codes[:-1], strict=True)])
    assert same[:, 0].tolist() == [True, True, False, True, True, False, True]
    assert not same[3, 1] and same[4, 1] and same[5, 1] and not same[6, 1]  # anew at step 4, and 3 steps later
    assert not same[4, 2] and same[5, 2] and same[6, 2]


def test_noise_of_continuous_actions_serves_the_manager():
    """Normal noise as Gumbel noise: codes are drawn by their probabilities."""
    behavior = make_agent(*HIERARCHY).behavior
    gumbel = behavior._gumbel(torch.randn(200_000, generator=torch.Generator().manual_seed(0)))
    assert gumbel.mean() == pytest.approx(0.5772, abs=0.01) and gumbel.var() == pytest.approx(np.pi**2 / 6, rel=0.02)
    assert torch.isfinite(behavior._gumbel(torch.tensor([-40.0, 40.0]))).all()


def test_the_autoencoder_keeps_as_much_as_it_may():
    """Codes of states of 16 kinds: they are told apart, within the information that is allowed."""
    torch.manual_seed(0)
    kinds = torch.randn(16, 12)
    autoencoder = GoalAutoencoder(12, groups=4, classes=4, nats=2.5, units=32)
    optimizer = torch.optim.Adam(autoencoder.parameters(), 3e-3)
    nats = []
    for _ in range(600):
        deter = kinds[torch.randint(16, (8, 16))]
        gumbel = -torch.log(-torch.log(torch.rand(8, 16, 4, 4).clamp(1e-9, 1 - 1e-7)))
        loss, metrics = autoencoder.loss(None, {"deter": deter}, {}, {"code": gumbel, "beta": autoencoder.beta.clone()})
        nats.append(metrics["goal_kl"].item())
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    assert np.mean(nats[-200:]) == pytest.approx(2.5, abs=0.25)
    error = (autoencoder.decode(autoencoder.encode(kinds).mode().flatten(-2)) - kinds).square().sum(-1).mean()
    assert error < 0.4 * kinds.square().sum(-1).mean()
    # As a reward it pays for what it cannot code.
    feat = torch.stack([torch.cat([kinds[:2], 3 * torch.randn(2, 12)])] * 2, 1)
    known, unknown = autoencoder(None, {"feat": feat}).squeeze(1).view(2, 2).mean(1)
    assert unknown > 2 * known


# In a ring of states


class Ring(WorldModel):
    """A world model that knows it all: places in a ring, each a recurrent state, and steps to either side."""

    grad_heads = ()

    def __init__(self, places: int = 12, deter: int = 6):
        nn.Module.__init__(self)
        angle = torch.arange(places) * 2 * torch.pi / places
        wave = torch.stack([torch.cos(angle), torch.sin(angle)], -1)
        self.deter = wave @ torch.linalg.qr(torch.randn(deter, deter))[0][:2]  # a circle somewhere in that space
        self.rssm = SimpleNamespace(layout=lambda: None, img_step=self.step, feat_size=deter + 1, deter=deter)

    def state(self, place: torch.Tensor) -> dict:
        return {"deter": self.deter[place], "stoch": torch.zeros(*place.shape, 1, 1)}

    def step(self, state: dict, action: torch.Tensor, noise, layout) -> dict:
        place = (state["deter"] @ self.deter.T).argmax(-1)
        return self.state((place + torch.where(action[:, 1] > 0, 1, -1)) % len(self.deter))

    def cont(self, feat: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(prob=torch.ones(feat.shape[:-1]))

    def reward(self, feat: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(mode=lambda: torch.zeros(feat.shape[:-1]))


def near(world: Ring, act, steps: int = 8) -> float:
    """The worker's mean reward on the way from every place to every place, as replayed goals."""
    place, goal = (x.flatten() for x in torch.meshgrid(*[torch.arange(len(world.deter))] * 2, indexing="ij"))
    state, goal, rewards = world.state(place), world.deter[goal], []
    for _ in range(steps):
        state = world.step(state, act(torch.cat([state["deter"], state["stoch"].flatten(1), goal], -1)), None, None)
        rewards.append(max_cosine(goal, state["deter"]))
    return float(torch.stack(rewards).mean())


@pytest.mark.slow
def test_the_worker_comes_near_replayed_goals():
    torch.manual_seed(0)
    world, sizes = Ring(), {"layers": 1, "units": 32}
    critic = {"dist": "symexp_twohot", "bins": 255, "outscale": 0.0, "slow_regularizer": 1.0, "slow_target": False}
    critic |= {"slow_target_update": 1, "slow_target_fraction": 0.02}
    behavior = Hierarchy(
        world.rssm.feat_size, 2, (2,), deter=world.rssm.deter, actor=sizes | {"entropy": 1e-2}, critic=sizes | critic,
        retnorm={}, goal={"groups": 4, "classes": 4, "nats": 10.0, "layers": 1, "units": 32}, contdisc=False,
    )  # fmt: skip
    parts = {
        "actor": nn.ModuleList(behavior.actors.values()),
        "critic": nn.ModuleList(stream.critic for stream in behavior.streams.values()),
        "intrinsic": behavior.autoencoder,
    }
    named = {key: [(f"{key}.{n}", p) for n, p in part.named_parameters()] for key, part in parts.items()}
    optimizer = Optimizer({key: (params, 3e-3) for key, params in named.items()}, warmup=0)
    scales = {"policy": 1.0, "value": 1.0, "intrinsic": 1.0}
    draw = Draw(torch.Generator().manual_seed(0), (1,), True, 2, True)

    def trained(feat):
        with torch.no_grad():
            return behavior.worker(feat).sample(draw.action(len(feat)))

    def uniform(feat):
        return one_hot(torch.randint(2, (len(feat),)), 2, torch.float32)

    start = near(world, trained)
    for _ in range(120):
        post, batch = world.state(torch.randint(12, (16, 4))), {"reward": torch.zeros(16, 4)}
        noise = behavior.draw_noise(16, 4, draw)
        losses, _ = behavior.loss(world, post, batch, noise)
        optimizer.step(total_loss(losses, scales))
        ppo.improve(behavior.rollouts, optimizer, draw.uniform(2, 64), scales, minibatches=4, clip=0.2, kl=0.03)
        behavior.after_step()
    random, end = near(world, uniform), near(world, trained)
    assert abs(start) < 0.2 and abs(random) < 0.1
    assert end > 0.5, (start, end)  # the best that can be is 0.79


# The agent


@pytest.mark.parametrize("act_space", SPACES, ids=str)
def test_it_trains_and_acts(act_space):
    agent = make_agent(*HIERARCHY, "--expl_streams", "icm:0.1,plan2explore:0.1", act_space=act_space)
    before = {key: value.clone() for key, value in agent.behavior.state_dict().items()}
    batch = make_batch(agent)
    for _ in range(15):
        metrics, _ = agent.train_step(batch)
    assert all(torch.isfinite(value) for value in metrics.values())
    moved = {key for key, value in agent.behavior.state_dict().items() if not torch.equal(value, before[key])}
    for part in ("manager.", "worker.", "streams.novelty.reward.encoder", "streams.novelty.reward.decoder"):
        assert any(key.startswith(part) for key in moved), part
    for stream in ("extrinsic", "novelty", "worker", "icm", "plan2explore"):
        assert any(key.startswith(f"streams.{stream}.critic") for key in moved), stream
        assert (f"streams.{stream}.unit.square" in moved) == (stream in ("novelty", "plan2explore"))
        logged = "" if stream == "extrinsic" else f"/{stream}"  # the task's by the names of the flat agent's
        assert {f"policy/return{logged}", f"policy/reward{logged}"} <= metrics.keys()
    obs = {"vector": np.zeros((3, 3), np.float32), "is_first": np.ones(3, bool)}
    action, state = agent.policy(obs, agent.initial(3))
    action, state = agent.policy(obs | {"is_first": np.zeros(3, bool)}, state, sample=False)
    assert action.shape == (3, agent.action_size) and state["carry"][""]["age"].tolist() == [2, 2, 2]


def test_a_stream_of_the_manager_counts_its_horizon_in_agent_steps():
    """And the others in decisions."""
    behavior = make_agent(*HIERARCHY, "--expl_streams", "icm:0.1:10,rnd:0.1").behavior
    discounts = {name: stream.discount for name, stream in behavior.streams.items()}
    assert discounts["icm"] == pytest.approx(0.9**behavior.every)
    assert discounts["rnd"] == discounts["extrinsic"] == discounts["novelty"] == pytest.approx(1 - 1 / 50)


class Dreamt(Intrinsic):
    """Learns in imagination alone: the mean of the features."""

    def __init__(self, world_model, action_size, classes):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(world_model.rssm.feat_size))

    def imagined_loss(self, world_model, traj):
        assert not traj["feat"].requires_grad
        error = (traj["feat"][:, 1:] - self.mean).square().mean(-1)
        return error, {"dreamt_loss": error.detach().mean()}

    def forward(self, world_model, traj):
        return (traj["feat"][:, 1:] - self.mean).square().mean(-1)


@pytest.mark.parametrize("flags", [HIERARCHY, ("--imag_gradient", "both")], ids=["hierarchy", "flat"])
def test_a_reward_may_learn_in_imagination(flags):
    register_reward("dreamt", Dreamt)
    try:
        agent = make_agent(*flags, "--expl_streams", "dreamt:1")
    finally:
        REWARDS.pop("dreamt")
    batch = make_batch(agent)
    for _ in range(2):
        metrics, _ = agent.train_step(batch)
    assert "intrinsic/dreamt_loss" in metrics and agent.behavior.streams["dreamt"].reward.mean.abs().max() > 0


def test_an_explorer_may_be_one_too():
    agent = make_agent(*HIERARCHY, "--expl_behavior", "plan2explore")
    assert list(agent.explorer.streams) == ["plan2explore", "novelty", "worker"]
    before = {key: value.clone() for key, value in agent.state_dict().items()}
    for _ in range(3):
        metrics, _ = agent.train_step(make_batch(agent))
    assert torch.isfinite(metrics["explorer/return/plan2explore"])
    assert "explorer/intrinsic/goal_error" in metrics and "intrinsic/goal_error" in metrics
    for part in ("behavior", "explorer"):  # each has an autoencoder that learns
        name = f"{part}.streams.novelty.reward.encoder.1.weight"
        assert not torch.equal(agent.state_dict()[name], before[name]), part


def test_a_checkpoint_brings_it_back():
    agent, other = make_agent(*HIERARCHY), make_agent(*HIERARCHY, "--seed", "1")
    batch = make_batch(agent)
    for _ in range(3):
        agent.train_step(batch)
    other.restore(agent.checkpoint())
    for one in (agent, other):
        one.train_step(batch)
    for key, value in agent.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_mistakes_are_told():
    with pytest.raises(UserError, match="multiple of hier.every"):
        make_agent(*HIERARCHY, "--imag_horizon", "7")
    with pytest.raises(UserError, match="imag_gradient is dynamics: give --imag_gradient reinforce"):
        make_agent(*HIERARCHY, "--actor_objective", "reinforce", "--imag_gradient", "dynamics")
    with pytest.raises(UserError, match="exclude each other"):
        make_agent(*HIERARCHY, "--expl_behavior", "diayn")
