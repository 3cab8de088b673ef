"""The small worlds of `envs/grid.py` and `envs/pinpad.py`: where one can go, and what is paid for."""

from collections import deque

import numpy as np
import pytest

import config as configuration
from envs import TaskError, make_env
from envs.grid import MOVES, GridWorld, free_cells
from envs.pinpad import COUNTS, PinPad


def load(task: str, *flags: str):
    return make_env(configuration.load(["--configs", "debug", "--task", task, *flags]), "train", 0)


def distances(free: np.ndarray, start: tuple[int, int]) -> dict[tuple[int, int], int]:
    """Steps to every cell that can be reached."""
    found, queue = {start: 0}, deque([start])
    while queue:
        at = queue.popleft()
        for row, column in MOVES[1:]:
            to = at[0] + row, at[1] + column
            if all(0 <= x < n for x, n in zip(to, free.shape, strict=True)) and free[to] and to not in found:
                found[to] = found[at] + 1
                queue.append(to)
    return found


def way(free: np.ndarray, start: tuple[int, int], goal: tuple[int, int]) -> list[int]:
    """Actions that lead from one cell to another."""
    left, actions = distances(free, goal), []
    while start != goal:
        action = min(range(1, 5), key=lambda a: left.get(tuple(np.add(start, MOVES[a])), 10**9))
        start = tuple(int(x) for x in np.add(start, MOVES[action]))
        actions.append(action)
    return actions


@pytest.mark.parametrize("layout, far", [("open", 38), ("rooms", 38), ("halls", 74)])
def test_every_cell_can_be_reached_and_the_reward_is_far(layout, far):
    free = free_cells(20, layout)
    found = distances(free, (0, 0))
    assert len(found) == free.sum() and found[19, 19] == far
    assert max(found.values()) < 200  # within an episode


def test_the_only_reward_is_in_the_far_corner():
    env = GridWorld(free_cells(20, "halls"), steps=200)
    env.reset()
    steps = [env.step(action) for action in way(free_cells(20, "halls"), (0, 0), (19, 19))]
    assert [step["reward"] for step in steps] == [0.0] * 73 + [1.0]
    assert steps[-1]["is_terminal"] and steps[-1]["is_last"] and not any(step["is_last"] for step in steps[:-1])
    assert steps[-1]["log_first_reward"] == 74 and np.isnan(steps[-2]["log_first_reward"])
    assert steps[-1]["log_visited"] == 75 and steps[-1]["log_coverage"] == pytest.approx(75 / 344)
    first = env.reset()
    assert first["is_first"] and tuple(first["position"]) == (0, 0)
    steps = [env.step(0) for _ in range(200)]
    assert steps[-1]["is_last"] and not steps[-1]["is_terminal"] and steps[-1]["log_visited"] == 75


def test_walls_hold_and_are_felt():
    """Down, up, right, left: what is next to the agent, the edge included."""
    env = GridWorld(free_cells(20, "halls"))
    assert env.reset()["walls"].tolist() == [0, 1, 0, 1]
    for action in (1, 1, 1, 1):
        obs = env.step(action)
    assert tuple(obs["position"]) == (2, 0), "the wall is in row 3"
    assert obs["walls"].tolist() == [1, 0, 0, 1] and env.obs_space["walls"].contains(obs["walls"])
    for action in [3] * 14 + [1]:
        obs = env.step(action)
    assert tuple(obs["position"]) == (3, 14), "the gap is as wide as 6 cells"
    assert obs["walls"].tolist() == [0, 0, 0, 1]


def test_a_screen_shows_noise_in_the_first_room_alone():
    env = load("grid_tv")
    stay = np.eye(5, dtype=np.float32)[0]
    seen = {int(obs["screen"]) for obs in (env.reset(), *(env.step(stay) for _ in range(50)))}
    assert len(seen) > 5 and 0 not in seen


@pytest.mark.parametrize("name", COUNTS)
def test_pads_pay_in_their_order_again_and_again(name):
    count = COUNTS[name]
    env = PinPad(count, size=8, steps=200)
    everywhere, at = np.ones((8, 8), bool), tuple(int(x) for x in env.reset()["position"])
    assert env._pads[at] == 0
    rewards = []
    for _ in range(2):
        for pad in range(1, count + 1):
            # Around the other pads: what is stepped on counts.
            free = everywhere & np.isin(env._pads, (0, pad, env._pads[at]))
            goal = min((tuple(map(int, cell)) for cell in np.argwhere(env._pads == pad)), key=distances(free, at).get)
            for action in way(free, at, goal):
                obs = env.step(action)
                rewards.append(obs["reward"])
            at = goal
        assert not obs["pads"].any() and obs["log_success"] == 1
    assert sum(rewards) == 2 and rewards[-1] == 1


def test_pads_in_another_order_pay_nothing():
    env = PinPad(3, size=8, steps=10**6)
    env.reset()
    assert env.obs_space["pads"].nvec.tolist() == [4, 4, 4]
    rng, last = np.random.default_rng(0), (0, 0, 0)
    for _ in range(40_000):
        obs = env.step(rng.integers(5))
        pads = tuple(int(x) for x in obs["pads"])
        assert obs["reward"] == (pads == (0, 0, 0) and last[1:] == (1, 2)), (last, pads)
        last = pads
    assert obs["log_success"] == 1  # at random it was solved, too


def test_mistakes_are_told():
    for task in ("grid_maze", "pinpad_two"):
        with pytest.raises(TaskError, match="unknown; a task is"):
            load(task)
    with pytest.raises(TaskError, match="puts a wall where the reward is"):
        load("grid_rooms", "--grid.size", "7")


@pytest.mark.parametrize("task", ["grid_halls", "grid_open", "grid_tv", "pinpad_four"])
def test_they_are_drawn_and_pass_the_checks_of_every_environment(task):
    env = load(task)
    obs = env.reset()
    for action in range(5):
        obs = env.step(np.eye(5, dtype=np.float32)[action])
    assert obs.keys() >= env.obs_space.keys()
    base = env
    while not hasattr(base, "render") or hasattr(base, "env"):
        base = base.env
    picture = base.render()
    assert picture.dtype == np.uint8 and picture.shape[-1] == 3 and len(np.unique(picture.reshape(-1, 3), axis=0)) >= 3
