import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from errors import UserError
from exploration import Random


def test_box_actions_are_uniform_in_the_unit_box():
    actions = Random(spaces.Box(-1, 1, (3,)), seed=1).policy(20000)
    assert actions.shape == (20000, 3) and actions.dtype == np.float32
    assert np.abs(actions).max() <= 1
    counts = np.histogram(actions, bins=10, range=(-1, 1))[0]
    assert np.abs(counts / counts.sum() - 0.1).max() < 0.01
    assert np.abs(np.corrcoef(actions.T) - np.eye(3)).max() < 0.03


def test_discrete_actions_are_uniform_one_hots():
    actions = Random(spaces.Discrete(4), seed=1).policy(20000)
    assert actions.shape == (20000, 4) and actions.dtype == np.float32
    assert set(np.unique(actions)) == {0, 1} and (actions.sum(1) == 1).all()
    assert np.abs(actions.mean(0) - 0.25).max() < 0.02


def test_multi_discrete_actions_are_one_hots_side_by_side():
    actions = Random(spaces.MultiDiscrete([2, 5]), seed=1).policy(20000)
    assert actions.shape == (20000, 7)
    assert (actions[:, :2].sum(1) == 1).all() and (actions[:, 2:].sum(1) == 1).all()
    joint = actions[:, :2].T @ actions[:, 2:] / len(actions)  # the two parts are independent
    assert np.abs(joint - 0.1).max() < 0.01


def test_a_saved_state_continues_the_same_actions():
    space = spaces.MultiDiscrete([3, 3])
    one, other = Random(space, seed=7), Random(space, seed=8)
    one.policy(5)
    other.load_state(one.state())
    assert (one.policy(50) == other.policy(50)).all()
    assert (Random(space, seed=7).policy(50) == Random(space, seed=7).policy(50)).all()


def test_a_given_generator_is_drawn_from():
    generator = np.random.default_rng(3)
    Random(spaces.Box(-1, 1, (2,)), generator).policy(4)
    assert generator.bit_generator.state != np.random.default_rng(3).bit_generator.state


def test_other_spaces_are_a_clear_error():
    with pytest.raises(UserError, match="MultiBinary.*expected Box, Discrete or MultiDiscrete"):
        Random(spaces.MultiBinary(3))


def test_it_drives_a_real_environment():
    env = gymnasium.make("CartPole-v1")
    policy = Random(env.action_space, seed=0)
    env.reset(seed=0)
    steps, over = 0, False
    while not over:
        _, _, terminated, truncated, _ = env.step(int(policy.policy(1)[0].argmax()))
        steps, over = steps + 1, terminated or truncated
    assert 5 < steps < 200
