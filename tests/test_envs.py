"""Environments: the suites for real, adapters, wrappers, and what their errors say."""

import importlib.util
import re
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

import envs
from envs import Env, TaskError, make_env, register_env, transition
from envs.wrappers import ActionRepeat, CheckTypes, Frames, NormalizeAction, TimeLimit, resize

needs_atari = pytest.mark.skipif(
    importlib.util.find_spec("ale_py") is None, reason="ale-py is not installed (requirements/atari.txt)"
)
needs_crafter = pytest.mark.skipif(
    importlib.util.find_spec("crafter") is None, reason="crafter is not installed (requirements/crafter.txt)"
)
DOC = Path(__file__).parent.parent / "docs" / "environments.md"


def config(task, **changes):
    dmc = SimpleNamespace(
        **{"image": False, "proprio": True, "camera": -1, "fast_render": True, **changes.pop("dmc", {})}
    )
    atari = SimpleNamespace(
        **{
            "sticky": False,
            "gray": False,
            "noops": 30,
            "all_actions": False,
            "life_done": False,
            **changes.pop("atari", {}),
        }
    )
    values = {"task": task, "seed": 0, "action_repeat": 1, "time_limit": 0, "image_size": [64, 64]}
    values |= {"audio_dim": 0, "audio_noise_std": 0.1, "text": {"length": 8}, "cue": {}, **changes}
    return SimpleNamespace(**values, dmc=dmc, atari=atari)


@pytest.fixture(autouse=True)
def clean_registry():
    before = dict(envs._registry)
    yield
    envs._registry.clear()
    envs._registry.update(before)


def make(factory, **changes):
    register_env("toy", factory)
    return make_env(config("toy", **changes))


def one_hot(index, n):
    return np.eye(n, dtype=np.float32)[index]


# Toy environments


class Counter(Env):
    """Counts steps; the reward is the count, the end comes after `length` steps."""

    def __init__(self, length=10, terminal=True):
        self.obs_space = {"count": spaces.Box(0, np.inf, (1,), np.float32)}
        self.act_space = spaces.Box(-1, 1, (1,), np.float32)
        self.length, self.terminal = length, terminal

    def reset(self):
        self.count = 0
        return transition({"count": np.zeros(1, np.float32)}, first=True)

    def step(self, action):
        self.count += 1
        last = self.count >= self.length
        return transition(
            {"count": np.full(1, self.count, np.float32)}, self.count, last=last, terminal=last and self.terminal
        )


class Toy(gymnasium.Env):
    """A gymnasium environment of any spaces that remembers its actions."""

    def __init__(self, observation_space, action_space=None):
        self.observation_space = observation_space
        self.action_space = action_space or spaces.Discrete(2)
        self.actions = []

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        self.actions.append(action)
        return self.observation_space.sample(), 1.0, False, False, {}


class OldBox:
    """Stands for old gym's spaces: same attributes, another class."""

    def __init__(self, low, high, shape, dtype):
        self.low, self.high = np.full(shape, low, dtype), np.full(shape, high, dtype)
        self.shape, self.dtype = shape, np.dtype(dtype)


OldBox.__name__ = "Box"


class Old:
    """Old gym: `seed` method, reset gives the observation alone, step 4 values."""

    observation_space = OldBox(-1, 1, (3,), np.float64)
    action_space = OldBox(-2, 2, (1,), np.float32)

    def __init__(self, cut=False):
        self.cut, self.seeded = cut, None

    def seed(self, seed):
        self.seeded = seed

    def reset(self):
        self.count = 0
        return np.zeros(3)

    def step(self, action):
        self.count += 1
        done = self.count == 3
        info = {"TimeLimit.truncated": True} if done and self.cut else {}
        return np.full(3, float(action[0])), 0.5, done, info

    def render(self, mode="human"):
        return np.full((4, 5, 3), 7, np.uint8) if mode == "rgb_array" else None


# The suites


def test_dmc_both_walker():
    env = make_env(config("dmc_walker_walk", dmc={"image": True}, image_size=[32, 48], action_repeat=2))
    step = env.reset()
    assert step["image"].shape == (32, 48, 3) and step["image"].dtype == np.uint8 and step["image"].std() > 5
    shapes = {key: space.shape for key, space in env.obs_space.items()}
    assert shapes == {"image": (32, 48, 3), "orientations": (14,), "height": (1,), "velocity": (9,)}
    assert all(step[key].dtype == space.dtype for key, space in env.obs_space.items())
    assert env.act_space == spaces.Box(-1, 1, (6,), np.float32)
    assert step["is_first"] and step["reward"] == 0 and step["reward"].dtype == np.float32
    np.testing.assert_array_equal(env.render(), step["image"])
    env.close()


def test_dmc_action_repeat_against_a_hand_rolled_loop():
    from dm_control import suite

    env = make_env(config("dmc_walker_walk", action_repeat=2), "train", 3)
    reference = suite.load("walker", "walk", task_kwargs={"random": envs.env_seed(0, "train", 3)})
    first = reference.reset()
    np.testing.assert_array_equal(env.reset()["orientations"], first.observation["orientations"].astype(np.float32))
    rng = np.random.default_rng(0)
    for _ in range(20):
        action = rng.normal(size=6).astype(np.float32)  # unclipped, as the policy gives it
        times = [reference.step(np.clip(action, -1, 1)) for _ in range(2)]
        step = env.step(action)
        assert step["reward"] == pytest.approx(sum(x.reward for x in times), rel=1e-6)
        np.testing.assert_allclose(step["velocity"], times[-1].observation["velocity"], rtol=1e-6)
    env.close()


@pytest.mark.parametrize("limit, steps", [(0, 500), (30, 15), (31, 16), (1200, 600)])
def test_dmc_time_limit_is_no_termination(limit, steps):
    env = make_env(config("dmc_cartpole_swingup", action_repeat=2, time_limit=limit))
    env.reset()
    for _ in range(steps - 1):
        assert not env.step(np.zeros(1, np.float32))["is_last"]
    step = env.step(np.zeros(1, np.float32))
    assert step["is_last"] and not step["is_terminal"]
    assert env.reset()["is_first"]
    assert env.render().shape == (192, 192, 3)  # for videos, though the agent sees no image
    env.close()


def test_dmc_names():
    from envs import dmc

    for task in ("ball_in_cup_catch", "point_mass_easy"):
        env = make_env(config(f"dmc_{task}"))
        assert set(env.reset()) >= {"position", "velocity"}
        env.close()
    assert dmc.CAMERAS["quadruped"] == 2
    with pytest.raises(TaskError, match="did you mean dmc_walker_walk") as error:
        make_env(config("dmc_walker_wlak"))
    assert "\n" not in str(error.value)
    with pytest.raises(TaskError, match="cameras 0 to 1"):
        make_env(config("dmc_walker_walk", dmc={"camera": 9}))
    with pytest.raises(TaskError, match="would see nothing"):
        make_env(config("dmc_walker_walk", dmc={"proprio": False}))


def test_dmc_termination():
    """A discount of 0 is a termination; the suite's tasks hardly ever give one."""
    import dm_env

    from envs.dmc import DMCEnv

    class Ends:
        def observation_spec(self):
            return {"x": dm_env.specs.Array((), np.float64, "x")}

        def action_spec(self):
            return dm_env.specs.BoundedArray((1,), np.float64, -1, 1)

        def reset(self):
            return dm_env.restart({"x": 1.0})

        def step(self, action):
            return dm_env.termination(2.0, {"x": 3.0})

    env = DMCEnv(Ends(), image=False, proprio=True, size=(8, 8), camera=0, repeat=4)
    np.testing.assert_array_equal(env.reset()["x"], np.ones(1, np.float32))
    step = env.step(np.zeros(1))
    assert step["is_last"] and step["is_terminal"] and step["reward"] == 2.0  # the repeat stopped


def test_cartpole():
    env = make_env(config("gym_CartPole-v1"))
    assert env.act_space == spaces.Discrete(2) and env.obs_space["vector"].shape == (4,)
    first = env.reset()["vector"]
    np.testing.assert_array_equal(first, make_env(config("gym_CartPole-v1")).reset()["vector"])  # same seed
    others = [make_env(config("gym_CartPole-v1"), mode, i).reset()["vector"] for mode, i in [("train", 1), ("eval", 0)]]
    assert all((first != other).any() for other in others)
    left = env.step(one_hot(0, 2))
    env = make_env(config("gym_CartPole-v1"))
    env.reset()
    np.testing.assert_array_equal(left["vector"], env.step(0)["vector"])  # an index does the same
    while not (step := env.step(0))["is_last"]:
        pass
    assert step["is_terminal"]


def test_pendulum_limits_and_bounds():
    env = make_env(config("gym_Pendulum-v1"))
    env.reset()
    for _ in range(199):
        assert not env.step(np.zeros(1))["is_last"]
    step = env.step(np.zeros(1))
    assert step["is_last"] and not step["is_terminal"]  # the registered limit truncates
    env = make_env(config("gym_Pendulum-v1", time_limit=300, action_repeat=2))  # replaces the registered 200
    env.reset()
    assert [bool(env.step(np.zeros(1))["is_last"]) for _ in range(150)] == [False] * 149 + [True]
    ours, theirs = make_env(config("gym_Pendulum-v1")), gymnasium.make("Pendulum-v1")
    ours.reset()
    theirs.reset(seed=envs.env_seed(0, "train", 0))
    obs = theirs.step(np.array([2.0], np.float32))[0]
    np.testing.assert_array_equal(ours.step(np.array([1.7], np.float32))["vector"], obs)  # clipped to 1, scaled to 2


def test_gym_unknown():
    with pytest.raises(TaskError, match="CartPole") as error:
        make_env(config("gym_CartPoul-v1"))
    assert "\n" not in str(error.value)
    with pytest.raises(TaskError):
        make_env(config("gym_no_such_package:Env-v0"))


def test_old_gym_by_id(monkeypatch):
    """An id that only the old gym knows."""
    module = types.ModuleType("gym")
    module.__spec__ = importlib.util.spec_from_loader("gym", None)
    module.make = lambda name, **_: Old()
    module.error = SimpleNamespace(Error=KeyError)
    monkeypatch.setitem(sys.modules, "gym", module)
    assert make_env(config("gym_OnlyOld-v0")).reset()["vector"].shape == (3,)


@needs_atari
def test_atari_pong():
    env = make_env(config("atari_pong", action_repeat=4, atari={"noops": 0}))
    assert env.act_space == spaces.Discrete(6)

    def paddle(action):
        env.reset()
        for _ in range(12):
            env.step(one_hot(0, 6))
        for _ in range(6):
            env.step(one_hot(action, 6))
        green = (env.render()[34:194, 140:144].astype(int) * [-1, 1, -1]).sum(-1) > 0
        return np.nonzero(green.any(1))[0].mean()

    assert paddle(3) - paddle(2) > 20  # RIGHT is up and LEFT down, in pixels
    step = env.reset()
    assert step["image"].shape == (64, 64, 3) and step["image"].dtype == np.uint8
    env = make_env(config("atari_pong", action_repeat=4, time_limit=20, atari={"gray": True, "all_actions": True}))
    assert env.reset()["image"].shape == (64, 64, 1) and env.act_space.n == 18
    flags = [env.step(one_hot(0, 18)) for _ in range(5)]
    assert [bool(x["is_last"]) for x in flags] == [False] * 4 + [True] and not flags[-1]["is_terminal"]
    assert make_env(config("atari_james_bond")).reset()["is_first"]
    with pytest.raises(TaskError, match="did you mean atari_pong"):
        make_env(config("atari_ponng"))


@needs_atari
def test_atari_lives():
    """life_done: a lost life is terminal in training, and the next episode goes on in the same game."""
    options = {"action_repeat": 4, "atari": {"life_done": True, "noops": 0}}
    train, play = make_env(config("atari_breakout", **options)), make_env(config("atari_breakout", **options), "eval")

    def first_end(env):
        env.reset()
        for count in range(1, 400):
            step = env.step(1)  # FIRE: serves, and the paddle stays
            if step["is_last"]:
                return count, bool(step["is_terminal"])

    (one, terminal), (whole, _) = first_end(train), first_end(play)
    assert terminal and whole > 3 * one
    total = one
    for _ in range(4):
        total += first_end(train)[0]
    assert abs(total - whole) <= 20


@needs_crafter
def test_crafter():
    env = make_env(config("crafter_reward", image_size=[48, 64], time_limit=100))
    other = make_env(config("crafter_noreward", image_size=[48, 64]))
    step = env.reset()
    assert step["image"].shape == (48, 64, 3) and env.act_space.n == 17
    np.testing.assert_array_equal(step["image"], other.reset()["image"])
    rewards, actions = [], np.random.default_rng(0).integers(17, size=100)
    for action in actions:
        assert not step["is_last"]
        step, same = env.step(one_hot(action, 17)), other.step(one_hot(action, 17))
        np.testing.assert_array_equal(step["image"], same["image"])
        assert same["reward"] == 0
        rewards.append(float(step["reward"]))
    assert any(rewards) and step["log_achievement_wake_up"].dtype == np.float32
    assert step["is_last"] and not step["is_terminal"]
    with pytest.raises(TaskError, match="crafter_reward or crafter_noreward"):
        make_env(config("crafter_foo"))


@pytest.mark.parametrize("task, package", [("atari_pong", "ale_py"), ("crafter_reward", "crafter")])
def test_missing_package(monkeypatch, task, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(TaskError, match=f"pip install -r requirements/{task.split('_')[0]}.txt"):
        make_env(config(task))


def test_unknown_suite():
    with pytest.raises(TaskError, match="did you mean dmc_<domain>_<task>.*crafter_reward") as error:
        make_env(config("dm_walker_walk"))
    assert "\n" not in str(error.value)
    register_env("corridor", Counter)
    with pytest.raises(TaskError, match="did you mean corridor"):
        make_env(config("coridor"))
    with pytest.raises(ValueError, match="'train' or 'eval'"):
        make_env(config("gym_CartPole-v1"), "test")


# Adapters and spaces


def test_dict_observations():
    space = spaces.Dict(
        {
            "camera": spaces.Box(0, 255, (30, 40, 3), np.uint8),
            "depth": spaces.Box(0, 255, (30, 40), np.uint8),
            "body": spaces.Dict({"joints": spaces.Box(-1, 1, (2, 3), np.float64), "fast": spaces.MultiBinary(4)}),
            "speed": spaces.Box(0, 1, (), np.float32),
            "room": spaces.Discrete(5, start=2),
            "keys": spaces.MultiDiscrete([3, 4]),
            "pair": spaces.Tuple((spaces.Discrete(2), spaces.Box(0, 9, (1,), np.int64))),
        }
    )
    env = make(lambda: Toy(space, spaces.MultiDiscrete([2, 3])))
    expected = {
        "camera": spaces.Box(0, 255, (64, 64, 3), np.uint8),
        "depth": spaces.Box(0, 255, (64, 64, 1), np.uint8),
        "body/joints": spaces.Box(-1, 1, (2, 3), np.float32),
        "body/fast": spaces.Box(0, 1, (4,), np.float32),
        "speed": spaces.Box(0, 1, (1,), np.float32),
        "room": spaces.Discrete(5),
        "keys": spaces.MultiDiscrete([3, 4]),
        "pair/0": spaces.Discrete(2),
        "pair/1": spaces.Box(0, 9, (1,), np.int64),
    }
    assert env.obs_space == expected
    for step in [env.reset()] + [env.step(np.array([0, 1, 0, 0, 1], np.float32)) for _ in range(20)]:
        for key, space in expected.items():
            assert np.asarray(step[key]).dtype == space.dtype, key
            assert space.contains(np.asarray(step[key]).astype(space.dtype)), key


def test_multi_discrete_actions():
    toy = Toy(spaces.Box(-1, 1, (2,)), spaces.MultiDiscrete([2, 3], start=[0, 5]))
    env = make(lambda: toy)
    assert env.act_space == spaces.MultiDiscrete([2, 3]) and envs.action_size(env.act_space) == 5
    env.reset()
    env.step(np.array([0, 1, 0, 0, 1], np.float32))
    env.step(np.array([1, 2]))
    assert [x.tolist() for x in toy.actions] == [[1, 7], [1, 7]]
    with pytest.raises(ValueError, match="expected 5"):
        env.step(np.zeros(4))


def test_discrete_start_and_bad_indices():
    toy = Toy(spaces.Discrete(3, start=10), spaces.Discrete(3, start=-1))
    env = make(lambda: toy)
    assert 0 <= env.reset()["vector"] < 3
    env.step(one_hot(2, 3))
    env.step(np.array([0]))
    assert toy.actions == [1, -1]
    with pytest.raises(ValueError, match="out of range"):
        env.step(3)
    with pytest.raises(ValueError, match="one-hot"):
        env.step(np.zeros(4, np.float32))


@pytest.mark.parametrize(
    "shape, expected", [((20, 30, 3), (64, 64, 3)), ((20, 30), (64, 64, 1)), ((3, 20, 30), (64, 64, 3))]
)
def test_single_image(shape, expected):
    env = make(lambda: Toy(spaces.Box(0, 255, shape, np.uint8)))
    assert env.reset()["image"].shape == env.obs_space["image"].shape == expected


def test_texts_of_gymnasium_become_ids():
    class Reads(Toy):
        vocabulary = ["go", "left"]

        def reset(self, seed=None, options=None):
            return {"pose": np.zeros(1, np.float32), "order": "go left"}, {}

    class Strings(gymnasium.Space):  # as minigrid's missions
        def __init__(self):
            super().__init__(dtype=str)

    for space in (spaces.Text(9), Strings()):
        env = make(lambda space=space: Reads(spaces.Dict({"pose": spaces.Box(0, 1, (1,)), "order": space})))
        assert env.obs_space["order"].tokenizer.size == 3 + 2, "the environment's own words"
        assert env.obs_space["order"].decode(env.reset()["order"]) == "go left"
    env = make(lambda: Toy(spaces.Text(5)))
    assert list(env.obs_space) == ["text"] and env.reset()["text"].dtype == np.int32


@pytest.mark.parametrize("value, dtype", [(20, np.uint8), (20, np.int64), (-1, np.int32)])
def test_an_id_outside_of_its_space_is_named(value, dtype):
    class Odd(Toy):
        def step(self, action):
            return {"text": np.array([1, value, 2], np.int64).astype(dtype)}, 0.0, False, False, {}

    low = -1 if value == 20 and dtype == np.int64 else 0
    env = make(lambda: Odd(spaces.Dict({"text": spaces.Box(low, 19, (3,), dtype)})))
    env.reset()
    with pytest.raises(TaskError, match=rf"'text' holds {value}, but its space says {low} to 19"):
        env.step(0)


def test_unsupported_spaces():
    with pytest.raises(TaskError, match="'graph' has a Graph space"):
        make(lambda: Toy(spaces.Dict({"graph": spaces.Graph(spaces.Box(0, 1, (1,)), None)})))
    with pytest.raises(TaskError, match="action space is a Dict"):
        make(lambda: Toy(spaces.Box(0, 1, (1,)), spaces.Dict({"a": spaces.Discrete(2)})))


@pytest.mark.parametrize("cut", [False, True])
def test_old_gym(cut):
    old = Old(cut)
    env = make(lambda: old)
    step = env.reset()
    assert old.seeded == envs.env_seed(0, "train", 0)
    assert step["vector"].dtype == np.float32 and env.act_space == spaces.Box(-1, 1, (1,), np.float32)
    steps = [env.step(np.array([0.5], np.float32)) for _ in range(3)]
    np.testing.assert_array_equal(steps[0]["vector"], np.ones(3, np.float32))
    assert [bool(x["is_last"]) for x in steps] == [False, False, True]
    assert bool(steps[-1]["is_terminal"]) is not cut
    assert env.render().shape == (4, 5, 3)


def test_step_of_another_length():
    class Odd(Old):
        def step(self, action):
            return np.zeros(3), 0.0, False

    env = make(Odd)
    env.reset()
    with pytest.raises(ValueError, match="3 values, expected 5"):
        env.step(np.zeros(1))


def test_gymnasium_reset_without_info():
    class Mixed(Toy):
        def reset(self, seed=None):
            return self.observation_space.sample()

    env = make(lambda: Mixed(spaces.Box(-1, 1, (2,))))
    assert env.reset()["vector"].shape == (2,)


@pytest.mark.parametrize(
    "factory, expected",
    [
        (lambda config, mode, index: ("toy", "eval", 4), (config, "eval", 4)),
        (lambda c, m, i: (c.task, m, i), None),
        (lambda *args: (args[0].task, *args[1:]), None),
        (lambda index, mode: ("toy", mode, index), None),
        (lambda config: (config.task, "eval", 4), None),
        (lambda size=3: ("toy", "eval", 4) if size == 3 else None, None),
        (lambda: ("toy", "eval", 4), None),
    ],
)
def test_factory_arguments(factory, expected):
    assert envs._call(factory, (config("toy"), "eval", 4)) == ("toy", "eval", 4)


def test_factory_errors():
    with pytest.raises(TypeError, match="at most 3"):
        envs._call(lambda a, b, c, d: None, (1, 2, 3))
    with pytest.raises(TypeError, match="returned a int, expected an environment"):
        make(lambda: 5)
    with pytest.raises(TypeError, match="expected a callable"):
        register_env("x", 5)


def test_spaces_and_values_are_compared():
    class Wrong(Toy):
        def reset(self, seed=None, options=None):
            return np.zeros(3, np.float32), {}

    env = make(lambda: Wrong(spaces.Box(-1, 1, (2,))))
    with pytest.raises(TaskError, match=r"toy: observation 'vector' is float32 \[3\], but its space says .*\[2\]"):
        env.reset()

    class Extra(Counter):
        def reset(self):
            return {**super().reset(), "more": 1, "log_more": 2}

    with pytest.raises(TaskError, match="'more' has no space"):
        make(Extra).reset()
    with pytest.raises(TaskError, match="cannot be named 'reward'"):
        make(lambda: Toy(spaces.Dict({"reward": spaces.Discrete(2)})))

    class NoReward(Counter):
        def reset(self):
            return {"count": np.zeros(1, np.float32)}

    with pytest.raises(TaskError, match="lacks reward, is_first"):
        make(NoReward).reset()


# Wrappers


def test_action_repeat_and_limits():
    env = ActionRepeat(Counter(10), 4)
    env.reset()
    rewards = [float(env.step(None)["reward"]) for _ in range(2)]
    step = env.step(None)
    assert rewards == [1 + 2 + 3 + 4, 5 + 6 + 7 + 8] and step["reward"] == 9 + 10
    assert step["is_last"] and step["is_terminal"] and step["count"] == 10
    env = make(Counter, action_repeat=2, time_limit=6)
    env.reset()
    steps = [env.step(np.zeros(1)) for _ in range(3)]
    assert [bool(x["is_last"]) for x in steps] == [False, False, True]
    assert not steps[-1]["is_terminal"] and steps[-1]["count"] == 6
    env = TimeLimit(Counter(3), 3)  # both at once: the task did end
    env.reset()
    steps = [env.step(None) for _ in range(3)]
    assert steps[-1]["is_last"] and steps[-1]["is_terminal"]


def test_own_action_repeat_is_not_repeated():
    class Repeats(Counter):
        action_repeat = 4

    env = make(Repeats, action_repeat=4, time_limit=8)
    env.reset()
    assert env.step(np.zeros(1))["count"] == 1 and env.step(np.zeros(1))["is_last"]
    with pytest.raises(TaskError, match="set action_repeat to 4"):
        make(Repeats, action_repeat=2)


def test_normalize_action():
    class Echo(Counter):
        def __init__(self):
            super().__init__()
            low = np.array([[-2, 0, -np.inf], [10, -np.inf, -3.4e38]], np.float32)
            high = np.array([[2, 1, np.inf], [30, 5, 3.4e38]], np.float32)
            self.act_space = spaces.Box(low, high)

        def step(self, action):
            self.action = action
            return super().step(action)

    echo = Echo()
    env = NormalizeAction(echo)
    assert env.act_space == spaces.Box(-1, 1, (6,), np.float32)
    env.reset()
    for action, expected in [
        ([-9, -9, -9, -9, -9, -9], [[-2, 0, -9], [10, -9, -9]]),
        ([9, 9, 9, 9, 9, 9], [[2, 1, 9], [30, 5, 9]]),
        ([0, 0, 0, 0, 0, 0], [[0, 0.5, 0], [20, 0, 0]]),
    ]:
        env.step(np.array(action, np.float32))
        np.testing.assert_array_equal(echo.action, np.array(expected, np.float32))
        assert echo.action.dtype == np.float32
    with pytest.raises(ValueError, match="expected 6"):
        env.step(np.zeros(5))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_resize_averages(channels, dtype):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (6, 8, channels)).astype(dtype)
    small = resize(image, (3, 4))
    assert small.shape == (3, 4, channels) and small.dtype == dtype
    mean = image.reshape(3, 2, 4, 2, channels).astype(float).mean((1, 3))
    assert np.abs(small - mean).max() <= 0.5001
    assert resize(image, (12, 10)).shape == (12, 10, channels)
    np.testing.assert_array_equal(resize(image, (6, 8)), image)


def test_right_size_is_not_touched():
    toy = Toy(spaces.Box(0, 255, (64, 64, 3), np.uint8))
    wrapped = Frames(envs.GymEnv(toy), (64, 64))
    assert wrapped._steps == {}


def test_convert_types():
    class Types(Counter):
        def __init__(self):
            super().__init__()
            self.obs_space = {
                "f": spaces.Box(-1.7e308, np.inf, (2,), np.float64),
                "b": spaces.Box(0, 1, (2, 2), bool),
                "i": spaces.Box(0, 9, (), np.int32),
            }

        def reset(self):
            return transition({"f": np.ones(2), "b": np.eye(2, dtype=bool), "i": np.int32(3)}, first=True)

    env = CheckTypes(Types())
    assert {k: (s.shape, s.dtype.name) for k, s in env.obs_space.items()} == {
        "f": ((2,), "float32"),
        "b": ((2, 2), "float32"),
        "i": ((1,), "int32"),
    }
    step = env.reset()
    assert step["f"].dtype == step["b"].dtype == np.float32 and step["i"].tolist() == [3]


def test_dummy_audio():
    """Zeros and normal noise, of its own random numbers; everything else as without."""
    plain, noisy, same = (make_env(config("gym_CartPole-v1", audio_dim=n, audio_noise_std=0.3)) for n in (0, 64, 64))
    heard, steps = [], [env.reset() for env in (plain, noisy, same)]
    for n in range(12):
        assert "audio" not in steps[0] and np.array_equal(steps[1]["audio"], steps[2]["audio"])
        assert steps[1]["audio"].shape == (64,) and steps[1]["audio"].dtype == np.float32
        heard.append(steps[1].pop("audio"))
        assert all(np.array_equal(value, steps[1][key]) for key, value in steps[0].items())
        steps = [env.step(one_hot(n % 2, 2)) for env in (plain, noisy, same)]
    heard = np.stack(heard)
    assert abs(heard.mean()) < 0.05 and heard.std() == pytest.approx(0.3, rel=0.1)
    assert len(np.unique(heard[:, 0])) == len(heard)
    register_env("hears", lambda: Hears())
    with pytest.raises(TaskError, match="audio_dim must be 0"):
        make_env(config("hears", audio_dim=4))


class Hears(Env):
    obs_space, act_space = {"audio": spaces.Box(-1, 1, (4,), np.float32)}, spaces.Discrete(2)


def test_a_missing_key_is_absent_not_an_error():
    class Drops(Toy):
        def step(self, action):
            obs, *rest = super().step(action)
            del obs["touch"]
            return obs, *rest

    env = make(lambda: Drops(spaces.Dict({"touch": spaces.Box(0, 1, (2,)), "eye": spaces.Box(0, 1, (2,))})))
    assert "touch" in env.reset()
    assert "touch" not in env.step(0) and "touch" in env.obs_space


def test_the_example_of_the_documentation_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)
    example = next(block for block in blocks if "register_env(" in block)
    assert len(example.splitlines()) <= 30
    exec(compile(example, str(DOC), "exec"), {"__name__": "__main__"})
    assert "episode return" in capsys.readouterr().out


# What environments really return


class Shows(Toy):
    """Returns one value after another, whatever its space says."""

    def __init__(self, space, *values):
        super().__init__(space)
        self.values = iter(values)

    def reset(self, seed=None, options=None):
        return next(self.values), {}

    def step(self, action):
        return next(self.values), 1.0, False, False, {}


class Plain(Env):
    """The project's own interface, of any spaces; shows one value after another and keeps its actions."""

    def __init__(self, key, space, *values, act=None):
        self.obs_space, self.act_space = {key: space}, act or spaces.Discrete(2)
        self.key, self.values, self.actions = key, iter(values), []

    def reset(self):
        return transition({self.key: next(self.values)}, first=True)

    def step(self, action):
        self.actions.append(action)
        return transition({self.key: next(self.values)})


FRAME = spaces.Box(0, 255, (64, 64, 3), np.uint8)


@pytest.mark.parametrize("wrap", [lambda *a: Shows(*a), lambda *a: Plain("image", *a)], ids=["gymnasium", "own"])
@pytest.mark.parametrize(
    ("shape", "axis", "kept"),
    [
        ((3, 84, 84), 0, (64, 64, 3)),
        ((9, 84, 96), 0, (64, 64, 9)),
        ((1, 10, 12), 0, (64, 64, 1)),
        ((84, 84, 12), 2, (64, 64, 12)),
        ((64, 64, 9), 2, (64, 64, 9)),
        ((5, 7, 3), 2, (64, 64, 3)),
    ],
)
def test_channels_are_moved_to_the_end_where_they_plainly_come_first(wrap, shape, axis, kept):
    frame = np.zeros(shape, np.uint8)
    np.moveaxis(frame, axis, -1)[...] = np.arange(shape[axis]) * 20
    env = make(lambda: wrap(spaces.Box(0, 255, shape, np.uint8), frame))
    assert env.obs_space["image"].shape == kept
    image = env.reset()["image"]
    assert image.dtype == np.uint8 and (image == np.arange(shape[axis]) * 20).all()


@pytest.mark.parametrize("shape", [(64, 64, 64), (16, 20, 30), (20, 16, 30)])
def test_axes_that_tell_nothing_are_said_once(shape, caplog):
    space = spaces.Box(0, 255, shape, np.uint8)
    register_env("toy", lambda: Shows(space))
    for index in range(2):
        assert make_env(config("toy"), "train", index).obs_space["image"].shape == (64, 64, shape[2])
    (message,) = caplog.messages
    assert "toy: observation 'image'" in message and "[height, width, channels]" in message


@pytest.mark.parametrize(
    ("space", "first", "later", "found"),
    [
        (FRAME, np.full((64, 64, 3), 9, np.uint8), np.full((64, 64, 3), 0.5, np.float32), "'image' is float32"),
        (FRAME, np.full((64, 64, 3), 9, np.uint8), np.full((64, 64, 3), 300), "'image' holds 300, .* 0 to 255"),
        (
            FRAME,
            np.full((64, 64, 3), 9, np.uint8),
            np.full((60, 64, 3), 9, np.uint8),
            r"'image' is uint8 \[60, 64, 3\]",
        ),
        (FRAME, np.full((64, 64, 3), 9, np.uint8), {"image": 3}, "'image' is a dict"),
        (spaces.Box(-1, 1, (2,)), np.zeros(2), [[0.0], [1.0, 2.0]], "'vector' is list"),
        (spaces.Box(-1, 1, (2,)), np.zeros(2), np.array(["a", "b"]), "'vector' is <U1"),
        (spaces.Discrete(5, start=1), 1, 0, "'vector' holds 0, .* 1 to 5"),
        (spaces.Discrete(5), np.int64(4), np.int64(5), "'vector' holds 5, .* 0 to 4"),
        (spaces.Discrete(5), 4, 2.0, "'vector' is float64"),
        (spaces.MultiDiscrete([2, 3]), np.array([1, 2]), np.array([2, 0]), "'vector' holds 2, .* 0 to 1"),
        (spaces.MultiBinary(2), np.array([1, 0]), np.array([1, 2]), "'vector' holds 2, .* 0 to 1"),
        (spaces.Box(0, 7, (2,), np.int32), np.zeros(2, np.int32), np.array([8, 0]), "'vector' holds 8, .* 0 to 7"),
    ],
)
def test_every_step_is_compared_with_the_space(space, first, later, found):
    env = make(lambda: Shows(space, first, first, later))
    env.reset()
    env.step(0)
    with pytest.raises(TaskError, match=found):
        env.step(0)


@pytest.mark.parametrize(
    ("space", "value", "kept"),
    [
        (FRAME, np.full((64, 64, 3), 7, np.int64), np.full((64, 64, 3), 7, np.uint8)),
        (FRAME, np.full((64, 64, 3), 7).tolist(), np.full((64, 64, 3), 7, np.uint8)),
        (spaces.Box(0, 255, (84, 84, 3), np.uint8), np.full((84, 84, 3), 7), np.full((64, 64, 3), 7, np.uint8)),
        (spaces.Box(-1, 1, (2,)), (1, 0), np.array([1, 0], np.float32)),
        (spaces.Box(-1, 1, (2,), np.float64), [True, False], np.array([1, 0], np.float32)),
        (spaces.Discrete(5, start=-2), -2, np.int64(0)),
        (spaces.MultiDiscrete([2, 3], start=[1, 5]), [2, 5], np.array([1, 0])),
        (spaces.MultiBinary(3), [True, False, True], np.array([1, 0, 1], np.float32)),
        (spaces.MultiBinary(3), np.array([0.0, 1.0, 0.0], np.float32), np.array([0, 1, 0], np.float32)),
        (spaces.Box(0, 1, (3,), bool), np.array([0, 1, 0], np.uint8), np.array([0, 1, 0], np.float32)),
        (spaces.Box(0, 9, (), np.int32), 3, np.array([3], np.int32)),
    ],
)
def test_values_of_another_type_are_converted_where_nothing_is_lost(space, value, kept):
    env = make(lambda: Shows(space, value))
    found = next(v for k, v in env.reset().items() if k in env.obs_space)
    assert found.dtype == kept.dtype and np.array_equal(found, kept)


@pytest.mark.parametrize("wrap", [Toy, lambda *a: Plain("x", spaces.Discrete(2), 0, 0, 0, act=a[1])])
def test_actions_start_where_their_space_does(wrap):
    for space, actions, given in (
        (spaces.Discrete(3, start=5), [one_hot(0, 3), one_hot(2, 3)], [5, 7]),
        (spaces.MultiDiscrete([2, 3], start=[10, 20]), [np.eye(5)[[0, 4]].sum(0)] * 2, [[10, 22]] * 2),
    ):
        toy = wrap(spaces.Discrete(2), space)
        env = make(lambda toy=toy: toy)
        env.reset()
        for action in actions:
            env.step(action.astype(np.float32))
        assert [np.asarray(x).tolist() for x in toy.actions] == given
        env.close()


def test_more_channels_than_opencv_knows_are_resized():
    frame = np.random.default_rng(0).integers(0, 256, (90, 120, 11), np.uint8)
    one_by_one = np.concatenate([resize(frame[..., n], (30, 40)) for n in range(11)], -1)
    assert np.array_equal(resize(frame, (30, 40)), one_by_one)
    assert np.abs(one_by_one - frame.reshape(30, 3, 40, 3, 11).mean((1, 3))).max() <= 0.5 + 1e-6


def test_uint8_that_ends_below_255_is_stretched_or_a_grid_of_ids(caplog):
    planes = np.random.default_rng(0).integers(0, 2, (64, 64, 4), np.uint8)
    env = make(lambda: Shows(spaces.Box(0, 1, (64, 64, 4), np.uint8), planes))
    assert np.array_equal(env.reset()["image"], planes * 255)
    assert "stretched to 0 to 255" in caplog.messages.pop()
    ids = np.random.default_rng(0).integers(0, 11, (7, 7, 3), np.uint8)
    env = make(lambda: Shows(spaces.Box(0, 10, (7, 7, 3), np.uint8), ids))
    assert env.obs_space["image"] == spaces.MultiDiscrete(np.full((7, 7, 3), 11))
    assert np.array_equal(env.reset()["image"], ids) and "grid of ids" in caplog.messages[-1]


@pytest.mark.parametrize(
    ("space", "advice"),
    [
        (spaces.Box(0, 1, (84, 84, 3)), "21,168 numbers. If it holds frames, make it uint8"),
        (spaces.Box(0, 255, (4, 64, 64, 3), np.uint8), "49,152 numbers. If it holds frames, move the stack"),
        (spaces.Box(0, 1, (3, 84, 84)), "21,168 numbers"),
    ],
)
def test_frames_that_are_read_as_vectors_are_said(space, advice, caplog):
    assert make(lambda: Shows(space)).obs_space["vector"].shape == space.shape
    assert advice in caplog.messages[0] and len(caplog.messages) == 1


@pytest.mark.parametrize("space", [spaces.Box(-1, 1, (300,)), spaces.Box(-1, 1, (40, 40)), spaces.Box(0, 9, (5, 5, 5))])
def test_vectors_are_not_taken_for_frames(space, caplog):
    make(lambda: Shows(space))
    assert not caplog.messages


def test_parts_follow_the_space_whatever_holds_them():
    space = spaces.Dict(
        {"a": spaces.Tuple([spaces.Discrete(3), spaces.Box(-1, 1, (2,))]), "b": spaces.Box(-1, 1, (2,))}
    )
    env = make(lambda: Shows(space, {"a": [1, (0.5, 0.25)], "b": (0.0, 1.0)}))
    step = env.reset()
    assert step["a/0"] == 1 and step["a/1"].tolist() == [0.5, 0.25] and step["b"].tolist() == [0, 1]
    env = make(lambda: Shows(space, {"a": 3, "b": (0.0, 1.0)}))
    with pytest.raises(TaskError, match="'a' is a int, but its space is a Tuple"):
        env.reset()


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.uint8])
def test_an_observation_that_holds_nothing_is_refused(dtype):
    with pytest.raises(TaskError, match=r"'vector' has the shape \[0\]"):
        make(lambda: Shows(spaces.Box(0, 1, (0,), dtype)))


def test_what_is_seen_is_shown_where_nothing_is_rendered():
    space = spaces.Dict({"rgb": spaces.Box(0, 255, (3, 32, 32), np.uint8), "depth": spaces.Box(0, 1, (4,))})
    frame = np.full((3, 32, 32), 9, np.uint8)
    env = make(lambda: Shows(space, {"rgb": frame, "depth": np.zeros(4)}))
    env.reset()
    assert env.render().shape == (64, 64, 3) and (env.render() == 9).all()


def test_one_environment_belongs_to_one_user():
    one = Toy(spaces.Discrete(3))
    register_env("toy", lambda: gymnasium.Wrapper(one))
    first = make_env(config("toy"))
    with pytest.raises(TaskError, match="in use already"):
        make_env(config("toy"), "eval")
    first.reset()
    first.close()
    again = make_env(config("toy"))  # closed, so that another may have it
    del again
    make_env(config("toy")).close()  # and so when nobody has it any more


def test_an_environment_that_only_knows_windows(monkeypatch):
    class Window(Toy):
        metadata = {"render_modes": ["human"], "render_fps": 10}

        def __init__(self, render_mode=None):
            assert render_mode in (None, "human")
            super().__init__(spaces.Box(-1, 1, (2,)))
            self.render_mode = render_mode

        def render(self):
            return None

    monkeypatch.setitem(gymnasium.registry, "Window-v0", gymnasium.envs.registration.EnvSpec("Window-v0", Window))
    env = make_env(config("gym_Window-v0"))
    env.reset()
    assert env.render() is None


@pytest.mark.parametrize("name", ["LunarLander-v2", "CartPole-v9", "HalfCheetah-v2", "NoSuchTask-v0"])
def test_an_id_that_is_not_there_is_one_line(name):
    with pytest.raises(TaskError, match=f"gym_{name}") as error:
        make_env(config(f"gym_{name}"))
    assert "\n" not in str(error.value)
