"""PPO in imagination: the first epoch is REINFORCE, later ones clip and stop; what it moves and what it leaves."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium import spaces
from test_intrinsic import LEARN_FAST, likes, make_agent, make_batch, preference  # noqa: F401

import ppo
from errors import UserError
from models import total_loss
from optim import Optimizer

PPO = ("--actor_objective", "ppo")
SPACES = [spaces.Box(-1, 1, (2,), np.float32), spaces.MultiDiscrete([3, 2])]


def shaken(*flags: str, **options):
    """An agent whose heads do not start at zero, which would hide much."""
    agent = make_agent(*flags, **options)
    generator = torch.Generator().manual_seed(1)
    for parameter in agent.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return agent


def test_the_surrogate_by_hand():
    old, new = torch.log(torch.tensor([[0.5, 0.5, 0.5, 0.5, 0.2]])), torch.tensor([[0.6, 0.9, 0.9, 0.1, 0.3]])
    advantage, log_prob = torch.tensor([[1.0, 2.0, -2.0, -1.0, 1.0]]), new.log().requires_grad_()
    objective, ratio = ppo.surrogate(log_prob, old, advantage, clip=0.3)
    torch.testing.assert_close(ratio, torch.tensor([[1.2, 1.8, 1.8, 0.2, 1.5]]))
    # Gains stop at 1.3, losses at 0.7; what has become worse is never cut off.
    torch.testing.assert_close(objective, torch.tensor([[1.2, 2.6, -3.6, -0.7, 1.3]]))
    (gradient,) = torch.autograd.grad(objective.sum(), log_prob)
    torch.testing.assert_close(gradient, torch.tensor([[1.2, 0.0, -3.6, 0.0, 0.0]]))


@pytest.mark.parametrize("act_space", SPACES, ids=str)
def test_at_first_its_gradient_is_reinforces(act_space):
    agent = shaken(*PPO, act_space=act_space)
    batch, noise = make_batch(agent), agent.draw_noise(4, 6)
    losses, _, _ = agent.losses(batch, noise)
    named = [(n, p) for n, p in agent.behavior.named_parameters() if n.startswith("actor") and p.requires_grad]
    params = [p for _, p in named]
    expected = torch.autograd.grad(losses["policy"].mean() * agent.loss_scales["policy"], params)
    (rollout,) = agent.behavior.rollouts
    loss, kl, clipped = ppo.loss(rollout, agent.loss_scales | {"value": 0.0}, clip=0.2)
    found = torch.autograd.grad(loss, params)
    assert max(g.abs().max() for g in expected) > 1e-4
    for (name, _), one, two in zip(named, expected, found, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5 * float(one.abs().max()), msg=name)
    assert abs(kl) < 1e-7 and clipped == 0


def test_its_values_are_regressed_as_in_the_joint_update():
    agent = shaken(*PPO)
    losses, _, _ = agent.losses(make_batch(agent), agent.draw_noise(4, 6))
    params = list(agent.behavior.streams["extrinsic"].critic.parameters())
    expected = torch.autograd.grad(losses["value"].mean() * agent.loss_scales["value"], params)
    loss, _, _ = ppo.loss(agent.behavior.rollouts[0], agent.loss_scales, clip=0.2)
    for one, two in zip(expected, torch.autograd.grad(loss, params), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)


FAST = ("--opt.lr", "1e-3", "--opt.warmup", "0")


def test_later_epochs_move_the_policy_until_it_has_moved_enough():
    """Eight minibatches follow the first epoch; a small bound on the KL leaves fewer of them, and one of zero none."""
    outcome = {}
    for bound in ("1e9", "1e-3", "1e-12"):
        agent = shaken(*PPO, *FAST, "--ppo.kl", bound)
        batch = make_batch(agent)
        for _ in range(3):
            metrics, _ = agent.train_step(batch)
        outcome[bound] = {key: float(metrics[f"policy/ppo_{key}"]) for key in ("kl", "clipped", "steps")}
    assert outcome["1e9"]["steps"] == 8 and outcome["1e9"]["clipped"] > 0 and outcome["1e9"]["kl"] > 1e-3
    assert 0 < outcome["1e-3"]["steps"] < 8
    assert outcome["1e-12"]["steps"] == 0


def test_every_minibatch_sees_the_weights_of_its_time():
    """In half precision, too, where rounded weights are kept for as long as one autocast lasts."""
    moved = {}
    for precision in ("float32", "bfloat16"):
        agent = shaken(*PPO, "--opt.lr", "3e-3", "--opt.warmup", "0", "--ppo.kl", "1e9", "--precision", precision)
        batch, found = make_batch(agent), []
        for step in range(6):
            agent.generator.manual_seed(step)
            metrics, _ = agent.train_step(batch)
            found.append(float(metrics["policy/ppo_kl"]))
        moved[precision] = np.mean(found)
    assert moved["bfloat16"] > 0.5 * moved["float32"], moved


def test_without_later_epochs_it_is_the_plain_agent():
    """All of them stopped, the weights are those of REINFORCE, bit for bit; world model and rewards in any case."""
    plain, stopped, moving = (
        shaken(*FAST),
        make_agent(*PPO, *FAST, "--ppo.kl", "1e-30"),
        make_agent(*PPO, *FAST, "--ppo.kl", "1e9"),
    )
    for agent in (stopped, moving):
        agent.load_state_dict(plain.state_dict())
    batch = make_batch(plain)
    for step in range(2):
        for agent in (plain, stopped, moving):
            agent.generator.manual_seed(step)
            agent.train_step(batch)
        if step == 0:  # one joint update: the policy takes no part in what shapes the world model
            for key, value in plain.world_model.state_dict().items():
                assert torch.equal(moving.world_model.state_dict()[key], value), key
            assert not torch.equal(moving.behavior.actor.mean.weight, plain.behavior.actor.mean.weight)
    for key, value in plain.state_dict().items():
        assert torch.equal(stopped.state_dict()[key], value), key


def test_minibatches_go_through_all_trajectories_once(monkeypatch):
    seen = []

    class Stub:
        groups = {"actor": SimpleNamespace(extra=torch.zeros(()))}

        def step(self, loss, only, live):
            pass

    rollout = ppo.Rollout(None, {}, 0.0, torch.arange(10).view(10, 1, 1), *(torch.zeros(10, 1) for _ in range(4)), {})

    def loss(rows, scales, clip):
        seen.append(rows.seen.flatten())
        return torch.zeros(()), torch.zeros(()), torch.zeros(())

    monkeypatch.setattr(ppo, "loss", loss)
    ppo.improve([rollout], Stub(), torch.rand(2, 10), {}, minibatches=4, clip=0.2, kl=1.0)
    assert [len(rows) for rows in seen] == [3, 3, 3, 1] * 2
    for epoch in (seen[:4], seen[4:]):
        assert sorted(torch.cat(epoch).tolist()) == list(range(10))
    assert torch.cat(seen[:4]).tolist() != torch.cat(seen[4:]).tolist()


def test_an_update_of_some_groups_leaves_the_others():
    torch.manual_seed(0)
    params = {key: torch.nn.Parameter(torch.randn(3)) for key in ("world", "actor")}
    optimizer = Optimizer({key: ([(key, p)], 0.1) for key, p in params.items()}, warmup=0)

    def total():
        return sum((p**2).sum() for p in params.values())

    optimizer.step(total())
    world, actor = (p.detach().clone() for p in params.values())
    moments = copy.deepcopy(optimizer.state_dict())
    optimizer.step((params["actor"] ** 2).sum(), ("actor",), torch.tensor(False))
    optimizer.step((params["actor"] * torch.nan).sum(), ("actor",))
    assert torch.equal(params["actor"], actor) and torch.equal(params["world"], world)
    for key, value in optimizer.state_dict()["groups"]["actor"]["first"].items():
        assert torch.equal(value, moments["groups"]["actor"]["first"][key])
    optimizer.step((params["actor"] ** 2).sum(), ("actor",), torch.tensor(True))
    assert torch.equal(params["world"], world) and not torch.equal(params["actor"], actor)
    assert optimizer.updates == 1 and optimizer.groups["actor"].extra == 1 and optimizer.bad == 0
    # Its moments are debiased by all of its updates: an optimizer of the actor alone would have done the same.
    torch.manual_seed(0)
    torch.randn(3)
    alone = torch.nn.Parameter(torch.randn(3))
    single = Optimizer({"actor": ([("actor", alone)], 0.1)}, warmup=0)
    for _ in range(2):
        single.step((alone**2).sum())
    torch.testing.assert_close(alone, params["actor"])


def test_it_learns_what_pays(likes):  # noqa: F811
    agent = make_agent(*PPO, "--expl_streams", "likes:0.5", *LEARN_FAST, act_space=spaces.Discrete(4))
    batch = make_batch(agent) | {"reward": torch.zeros(4, 6)}
    for _ in range(50):
        agent.train_step(batch)
    assert preference(agent.behavior, agent) > 0.8


def test_a_checkpoint_brings_it_back():
    flags = (*PPO, "--expl_behavior", "plan2explore", "--opt.lr", "1e-3")
    agent, other = make_agent(*flags), make_agent(*flags, "--seed", "1")
    batch = make_batch(agent)
    for _ in range(3):
        agent.train_step(batch)
    other.restore(agent.checkpoint())
    for one in (agent, other):
        one.train_step(batch)
    for key, value in agent.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    assert agent.optimizer.groups["actor"].extra > 0


def test_gradients_through_the_model_do_not_go_with_it():
    with pytest.raises(UserError, match="imag_gradient is dynamics: give --imag_gradient reinforce"):
        make_agent(*PPO, "--imag_gradient", "dynamics")


def test_all_losses_have_their_scales():
    agent = make_agent(*PPO, "--expl_behavior", "icm")
    losses, _, _ = agent.losses(make_batch(agent))
    assert torch.isfinite(total_loss(losses, agent.loss_scales))
