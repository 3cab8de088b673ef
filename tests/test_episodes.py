"""Windows out of episodes, against the counts that a uniform draw gives. (Files: `test_replay.py`.)"""

import itertools

import numpy as np
import pytest

from episodes import ReplayError, sample_episodes


def test_sample_episodes():
    episodes = {
        str(e): {
            "code": np.stack([np.full(n, e), np.arange(n)], 1),
            "is_first": np.arange(n) == 0,
            "log_x": np.zeros(n),
        }
        for e, n in enumerate([3, 40, 10])
    }
    counts = np.zeros(53)
    generator = sample_episodes(episodes, 12, seed=1)
    for window in itertools.islice(generator, 4000):
        assert set(window) == {"code", "is_first"} and len(window["code"]) == 12 and window["is_first"][0]
        code, is_first = window["code"], window["is_first"]
        for (episode, t), (after, then), first in zip(code[:-1], code[1:], is_first[1:], strict=True):
            ends = t == [3, 40, 10][episode] - 1
            assert first == ends and (then == 0 if ends else (after, then) == (episode, t + 1))
        episode, t = window["code"][0]
        counts[[0, 3, 43][episode] + t] += 1
    chi = ((counts - 4000 / 53) ** 2 / (4000 / 53)).sum()
    assert abs(chi - 52) < 4.5 * np.sqrt(104)
    assert not episodes["1"]["is_first"][1:].any()  # the given arrays are left alone
    again = next(sample_episodes(episodes, 12, seed=1))
    assert np.array_equal(again["code"], next(sample_episodes(episodes, 12, seed=1))["code"])
    with pytest.raises(ReplayError, match="no steps"):
        next(sample_episodes({}, 4))
