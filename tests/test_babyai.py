"""BabyAI: what is seen and read, and mistakes."""

from types import SimpleNamespace

import numpy as np
import pytest

from envs import TaskError, make_env

pytest.importorskip("minigrid", reason="needs requirements/babyai.txt")


def make(task: str, seed: int = 0, **options):
    options = {"observe": ["image"], "view": 7, "actions": "all", "strict": False} | options
    config = SimpleNamespace(task=task, seed=seed, action_repeat=1, time_limit=0, image_size=[64, 64], audio_dim=0)
    return make_env(SimpleNamespace(**vars(config), text={"length": 16}, babyai=options))


def test_missions_are_read_and_views_seen():
    env, missions = make("babyai_GoToLocal-v0"), set()
    for _ in range(8):
        step = env.reset()
        mission = env.obs_space["mission"].decode(step["mission"])
        assert mission.startswith("go to") and "?" not in mission and step["log_text_cut"] == 0
        assert len(np.flatnonzero(step["mission"])) == len(mission.split()) + 1, (
            "a word is one token, and the end is one"
        )
        missions.add(mission)
        assert step["image"].shape == (64, 64, 3) and step["image"].std() > 5
    assert len(missions) > 2


def test_seeds_decide():
    one, same, other = (make("babyai_GoToLocal-v0", seed).reset() for seed in (0, 0, 1))
    assert np.array_equal(one["image"], same["image"]) and np.array_equal(one["mission"], same["mission"])
    assert not np.array_equal(one["image"], other["image"])


def test_a_blank_mission_is_the_same_task_without_words():
    seeing, blank = make("babyai_GoToLocal-v0"), make("babyai_GoToLocal-v0/blank")
    one, two = seeing.reset(), blank.reset()
    assert np.array_equal(one["image"], two["image"]) and not two["mission"].any() and one["mission"].any()


def test_episodes_end_at_the_limit():
    env = make("babyai_GoToRedBallGrey-v0")
    step, count = env.reset(), 0
    while not step["is_last"]:
        step, count = env.step(0), count + 1  # turning on the spot
    assert not step["is_terminal"] and step["log_success"] == 0 and count > 10


def test_a_smaller_view_and_moves_alone():
    wide, near = make("babyai_GoToLocal-v0"), make("babyai_GoToLocal-v0", view=3, actions="moves")
    assert (wide.act_space.n, near.act_space.n) == (7, 3)
    wide, near = wide.reset()["image"], near.reset()["image"]
    tile = 64 // 7 + 1  # the agent is at the middle of the lower side: so is what it sees, only larger
    middle = slice(32 - tile // 2, 32 + tile // 2)
    assert np.abs(near[-20:, 22:42].mean((0, 1)) - wide[-tile:, middle].mean((0, 1))).max() < 40
    assert not np.array_equal(wide, near)
    with pytest.raises(TaskError, match="babyai.view is 4"):
        make("babyai_GoToLocal-v0", view=4)


def test_the_grid_is_what_the_image_shows():
    env = make("babyai_GoToLocal-v0", observe=["image", "grid"], view=5)
    step = env.reset()
    grid = step["grid"]
    assert env.obs_space["grid"].contains(grid) and grid.shape == (5, 5, 3)
    from minigrid.core.constants import IDX_TO_OBJECT

    objects = [IDX_TO_OBJECT[n] for n in grid[..., 0].ravel()]
    assert set(objects) <= {"unseen", "empty", "wall", "key", "ball", "box"} and "empty" in objects
    alone = make("babyai_GoToLocal-v0", observe=["grid"], view=5)
    assert set(alone.obs_space) == {"grid", "mission"} and np.array_equal(alone.reset()["grid"], step["grid"])
    with pytest.raises(TaskError, match="babyai.observe is"):
        make("babyai_GoToLocal-v0", observe=["smell"])


def test_the_strict_end_before_another_object():
    env, core = make("babyai_GoToLocalS5N2-v0", strict=True, actions="moves"), None
    rng, ended = np.random.default_rng(0), {True: 0, False: 0}
    for _ in range(60):
        step = env.reset()
        while not step["is_last"]:
            step = env.step(int(rng.integers(3)))
            core = env
            while hasattr(core, "env"):
                core = core.env
            core = core._env.unwrapped
            ahead = core.grid.get(*core.front_pos)
            faces = ahead is not None and ahead.type in ("key", "ball", "box")
            assert step["is_terminal"] == faces
        if step["is_terminal"]:
            wanted = core.instrs.desc
            right = (ahead.type, ahead.color) == (wanted.type or ahead.type, wanted.color or ahead.color)
            assert right == (step["reward"] > 0) == bool(step["log_success"])
            ended[bool(right)] += 1
    assert min(ended.values()) > 5
    with pytest.raises(TaskError, match="babyai.strict is for"):
        make("babyai_PickupLoc-v0", strict=True)


def test_unknown_levels():
    with pytest.raises(TaskError, match="babyai_GoToLocl-v0.*GoToLocal"):
        make("babyai_GoToLocl-v0")
    with pytest.raises(TaskError, match="only /blank"):
        make("babyai_GoToLocal-v0/black")
