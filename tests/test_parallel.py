"""Vectors of environments: the three backends agree, fail clearly, and leave nothing behind."""

import functools
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import psutil
import pytest
from gymnasium import spaces

import envs
import parallel
from envs import Env, TaskError, make_env, register_env, transition
from parallel import EnvError, make_vector

ROOT = Path(__file__).parent.parent
BACKENDS = ["serial", "thread", "process"]


def config(task, **changes):
    dmc = SimpleNamespace(image=True, proprio=True, camera=-1, fast_render=True)
    return SimpleNamespace(
        **{
            "task": task,
            "seed": 0,
            "audio_dim": 0,
            "action_repeat": 1,
            "time_limit": 0,
            "image_size": [64, 64],
            "dmc": dmc,
            **changes,
        }
    )


class Count(Env):
    """Episodes of 3 + index steps. Shows its count and the last action; `touch` drops out at odd counts."""

    def __init__(self, index=0):
        self.index = index
        self.episode = -1
        self.obs_space = {
            "count": spaces.Box(0, 99, (1,), np.float32),
            "room": spaces.Discrete(100),
            "touch": spaces.Box(0, 255, (2, 2, 1), np.uint8),
        }
        self.act_space = spaces.Box(-1, 1, (2,), np.float32)

    def reset(self):
        self.count = 0
        self.episode += 1
        return transition(self.observe(np.zeros(2)), first=True)

    def step(self, action):
        self.count += 1
        last = self.count == 3 + self.index
        return transition(self.observe(action), float(np.sum(action)), last=last, terminal=last and self.index % 2)

    def observe(self, action):
        touch = {} if self.count % 2 else {"touch": np.full((2, 2, 1), self.count + 1, np.uint8)}
        return {
            "count": np.full(1, self.count, np.float32),
            "room": self.index,
            "log_episode": self.episode,
            "log_action": np.asarray(action, np.float32),
            "log_name": "text",
            **touch,
            **({"log_first_only": 1} if self.index == 0 else {}),
        }

    def render(self):
        return np.full((4, 4, 3), self.index, np.uint8)


class Breaks(Count):
    def step(self, action):
        if self.index == 1 and self.count == 1:
            raise ZeroDivisionError("the motor is broken")
        return super().step(action)


class Dies(Count):
    def step(self, action):
        if self.index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


class Modules(Count):
    def observe(self, action):
        return {**super().observe(action), "log_torch": "torch" in sys.modules, "log_pid": os.getpid()}


class Sleeps(Modules):
    def step(self, action):
        time.sleep(60)


class WrongShape(Count):
    def observe(self, action):
        return {**super().observe(action), "count": np.zeros(1 + (self.count > 0))}


def fail_to_start():
    raise FileNotFoundError("no such robot")


def user_error():
    raise TaskError("one line")


def vector(kind, backend, num=3):
    return make_vector([functools.partial(kind, i) for i in range(num)], backend)


def actions_of(num, size, steps, seed=0):
    return np.random.default_rng(seed).normal(size=(steps, num, size)).astype(np.float32)


@pytest.fixture(autouse=True)
def nothing_left_behind():
    names = set(os.listdir("/dev/shm"))
    registry = dict(envs._registry)
    yield
    envs._registry.clear()
    envs._registry.update(registry)
    wait_until(lambda: set(os.listdir("/dev/shm")) <= names)  # another process may have some for a moment


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_and_reset_alignment(backend):
    vec = vector(Count, backend)
    assert vec.num == 3 and set(vec.obs_space) == {"count", "touch", "room"} and vec.act_space.shape == (2,)
    batch = vec.reset()
    assert batch["is_first"].all() and not batch["is_last"].any() and (batch["reward"] == 0).all()
    dtypes = {"count": np.float32, "touch": np.uint8, "room": np.int64, "reward": np.float32, "present/touch": bool}
    assert all(batch[key].dtype == dtype for key, dtype in dtypes.items())
    counts, previous = np.zeros(3), batch
    for actions in actions_of(3, 2, 20):
        kept = {key: value.copy() for key, value in previous.items()}
        batch = vec.step(actions)
        ended = previous["is_last"]
        counts = np.where(ended, 0, counts + 1)
        np.testing.assert_array_equal(batch["count"][:, 0], counts)
        np.testing.assert_array_equal(batch["is_first"], ended)
        np.testing.assert_array_equal(batch["is_last"], counts == [3, 4, 5])
        np.testing.assert_array_equal(batch["is_terminal"], (counts == [3, 4, 5]) & [False, True, False])
        np.testing.assert_array_equal(batch["log_action"], np.where(ended[:, None], 0, actions))  # ignored at resets
        np.testing.assert_allclose(batch["reward"], np.where(ended, 0, actions.sum(1)), rtol=1e-6)
        np.testing.assert_array_equal(batch["present/touch"], counts % 2 == 0)
        expected = np.where(counts % 2 == 0, counts + 1, 0)
        np.testing.assert_array_equal(batch["touch"], np.broadcast_to(expected[:, None, None, None], (3, 2, 2, 1)))
        assert batch["present/count"].all() and batch["room"].tolist() == [0, 1, 2]
        assert "log_name" not in batch
        np.testing.assert_array_equal(batch["log_first_only"], [1, np.nan, np.nan])  # NaN where nothing is told
        for key, value in kept.items():  # the caller may keep a batch
            np.testing.assert_array_equal(previous[key], value)
        previous = batch
    assert batch["log_episode"].tolist() == [5, 4, 3]
    assert vec.render(2)[0, 0, 0] == 2
    assert vec.reset()["is_first"].all()
    vec.close()
    vec.close()
    with pytest.raises(RuntimeError, match="closed"):
        vec.step(np.zeros((3, 2)))


@pytest.mark.parametrize(
    "task, size, changes",
    [("dmc_cartpole_swingup", 1, {"action_repeat": 2, "time_limit": 20}), ("gym_CartPole-v1", 2, {})],
)
def test_backends_agree(task, size, changes):
    results = []
    for backend in BACKENDS:
        vec = make_vector([functools.partial(make_env, config(task, **changes), "train", i) for i in range(2)], backend)
        results.append([vec.reset()] + [vec.step(x) for x in actions_of(2, size, 25)])
        frame = vec.render(1)
        if task.startswith("dmc"):
            np.testing.assert_array_equal(frame, results[-1][-1]["image"][1])
        vec.close()
    assert sum(step["is_last"].sum() for step in results[0]) >= 2
    first = {key for key in results[0][0] if not key.startswith("present/")}
    assert (
        results[0][0]["vector" if "vector" in first else "position"][0]
        != results[0][0]["vector" if "vector" in first else "position"][1]
    ).any()
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            assert ours.keys() == theirs.keys()
            for key in ours:
                np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)


def test_workers_without_torch_each_in_its_process():
    vec = vector(Modules, "process")
    batch = vec.reset()
    assert not batch["log_torch"].any() and len(set(batch["log_pid"]) | {os.getpid()}) == 4
    pids = [int(x) for x in batch["log_pid"]]
    vec.close()
    assert not any(running(pid) for pid in pids)


def test_registered_environments_reach_workers():
    length = 4
    register_env("local", lambda index: Count(length + index))  # not importable anywhere
    lock = threading.Lock()
    register_env("cannot be sent", lambda: lock)  # and no task needs it
    vec = make_vector([functools.partial(make_env, config("local"), "train", i) for i in range(2)], "process")
    assert vec.reset()["room"].tolist() == [4, 5]
    vec.close()
    with pytest.raises(TaskError, match="cannot be sent to a worker process"):
        make_vector([functools.partial(make_env, config("cannot be sent"), "train", 0)], "process")


@pytest.mark.parametrize("backend", BACKENDS)
def test_errors_show_their_own_traceback(backend):
    vec = vector(Breaks, backend)
    vec.reset()
    vec.step(np.zeros((3, 2)))
    with pytest.raises(EnvError, match="the motor is broken") as error:
        vec.step(np.zeros((3, 2)))
    text = str(error.value)
    assert text.startswith("environment 1 failed in step") and error.value.index == 1
    assert "in step" in text and "test_parallel.py" in text and "ZeroDivisionError" in text
    with pytest.raises(RuntimeError, match="closed"):
        vec.reset()
    with pytest.raises(EnvError, match="(?s)environment 1 failed in its creation.*no such robot"):
        make_vector([functools.partial(Count, 0), fail_to_start], backend)
    with pytest.raises(TaskError, match="^one line$"):
        make_vector([user_error, user_error], backend)
    vec = vector(WrongShape, backend)
    vec.reset()
    with pytest.raises(EnvError, match=r"'count' has shape \(2,\), but its space says \(1,\)"):
        vec.step(np.zeros((3, 2)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_misuse(backend):
    with vectors(vector(Count, backend, 2)) as vec:
        vec.reset()
        with pytest.raises(ValueError, match=r"shape \(2, 3\), expected \(2, 2\)"):
            vec.step(np.zeros((2, 3)))
        with pytest.raises(RuntimeError, match="without send"):
            vec.receive()
        actions = np.ones((2, 2), np.float32)
        vec.send(actions)
        actions[:] = 0  # sent already
        with pytest.raises(RuntimeError, match="twice"):
            vec.send(actions)
        with pytest.raises(RuntimeError, match="between"):
            vec.render()
        np.testing.assert_array_equal(vec.receive()["reward"], [2, 2])
    with pytest.raises(EnvError, match="environment 1 has the spaces"):
        make_vector([Count, functools.partial(make_env, config("gym_CartPole-v1"))], backend)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="'fork', expected process, thread, serial"):
        make_vector([Count], "fork")
    with pytest.raises(ValueError, match="at least one"):
        make_vector([], "serial")
    with pytest.raises(EnvError, match="cannot be pickled"):
        make_vector([functools.partial(Count, threading.Lock())], "process")


def test_a_killed_worker_is_named():
    vec = vector(Dies, "process")
    vec.reset()
    start = time.time()
    with pytest.raises(EnvError, match=r"environment 1: .* exit code -9 \(SIGKILL\)") as error:
        vec.step(np.zeros((3, 2)))
    assert error.value.index == 1 and time.time() - start < 4


def test_forgotten_vectors_are_closed():
    vec = vector(Modules, "process", 1)
    pid = int(vec.reset()["log_pid"][0])
    del vec
    assert not running(pid)


SCRIPT = """
    import sys, time, functools
    sys.path[:0] = [{root!r}, {tests!r}]
    import numpy as np
    import parallel
    from test_parallel import {kind}

    class Here({kind}):  # of the main module, which has no `if __name__ == '__main__'`
        pass

    vec = parallel.make_vector([functools.partial(Here, i) for i in range(2)], 'process')
    print(*vec.reset()['log_pid'], flush=True)

"""


HANDLER = """
import signal
stop = []
signal.signal(signal.SIGINT, lambda *_: stop.append(1))
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
print('ready', flush=True)
while not stop:
    vec.step(np.zeros((2, 2)))
print('saved', vec.step(np.zeros((2, 2)))['count'].shape)  # the workers are still there
"""

INTERRUPT = """
try:
    print('ready', flush=True)
    while True:
        vec.step(np.zeros((2, 2)))
except KeyboardInterrupt:
    print('saved')
"""


def start_script(loop, kind="Modules"):
    code = textwrap.dedent(SCRIPT).format(root=str(ROOT), tests=str(ROOT / "tests"), kind=kind).rstrip() + loop
    process = subprocess.Popen(
        [sys.executable, "-c", code], text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    pids = [int(x) for x in process.stdout.readline().split()]
    assert process.stdout.readline() == "ready\n"
    return process, pids


@pytest.mark.parametrize("kind", ["Modules", "Sleeps"])
def test_workers_end_with_a_killed_parent(kind):
    process, pids = start_script(HANDLER, kind)
    assert len(pids) == 2 and all(running(pid) for pid in pids)
    process.kill()
    process.wait()
    wait_until(lambda: not any(running(pid) for pid in pids))
    process.stdout.close()
    process.stderr.close()


@pytest.mark.parametrize(
    "loop, number, expected",
    [
        (HANDLER, signal.SIGINT, "saved (2, 1)"),
        (HANDLER, signal.SIGTERM, "saved (2, 1)"),
        (INTERRUPT, signal.SIGINT, "saved"),
    ],
)
def test_a_signal_to_the_group_leaves_the_workers_to_the_parent(loop, number, expected):
    process, pids = start_script(loop)
    time.sleep(0.1)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=20)
    assert out.strip() == expected and process.returncode == 0 and err == ""
    assert not any(running(pid) for pid in pids)  # closed at the end of the program, though nobody called close


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_program_that_forgets_to_close_ends_quietly(backend):
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import functools, test_parallel
task = test_parallel.config("dmc_cartpole_swingup")
vec = test_parallel.make_vector([functools.partial(test_parallel.make_env, task)], {backend!r})
vec.reset()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    errors = [line for line in result.stderr.splitlines() if not line.startswith("WARNING")]  # dm_control's own
    assert result.returncode == 0 and errors == []


class Simulated(Count):
    """Starts two programs: one that close() ends, one that is left."""

    def __init__(self, index=0):
        super().__init__(index)
        self.programs = [subprocess.Popen(["sleep", "600"]) for _ in range(2)]

    def observe(self, action):
        found = {f"log_program{n}": program.pid for n, program in enumerate(self.programs)}
        return super().observe(action) | found | {"log_pid": os.getpid()}

    def close(self):
        self.programs[0].terminate()
        self.programs[0].wait()


class Parent(Count):
    """Works in a process of its own."""

    def __init__(self, index=0):
        super().__init__(index)
        context = multiprocessing.get_context("spawn")
        child = context.Process(target=os.getpid)
        child.start()
        child.join()
        self.code = child.exitcode

    def observe(self, action):
        return super().observe(action) | {"log_code": self.code}


class Draws(Count):
    """From the generators of the whole process."""

    def observe(self, action):
        return super().observe(action) | {"log_numbers": np.array([random.random(), np.random.rand()])}


class Talks(Count):
    def reset(self):
        logging.getLogger("robot").info("battery at %d %%", 20 + self.index)
        logging.getLogger("robot").info("%d", "no number")  # a mistake in a log line is no reason to end
        return super().reset()

    def close(self):
        logging.getLogger("robot").info("goodbye")


class Fails(Count):
    """Environment 1 fails in its third step, each time that it is made until `attempt` is `until`."""

    def __init__(self, index=0, attempt=0, until=99, how="raise"):
        super().__init__(index)
        self.attempt, self.until, self.how = attempt, until, how
        if how == "creation" and attempt in (1, 2):
            raise OSError("the port is in use")
        if how == "spaces" and attempt:
            self.act_space = spaces.Box(-1, 1, (3,), np.float32)

    def step(self, action):
        if self.index == 1 and self.count == 2 and self.attempt < self.until:
            if self.how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "hang":
                time.sleep(60)
            raise ZeroDivisionError("the simulator diverged")
        return super().step(action)

    def reset(self):
        if self.how == "reset" and self.attempt == 1:
            raise ZeroDivisionError("nothing to start from")
        return super().reset()

    def observe(self, action):
        return super().observe(action) | {"log_attempt": self.attempt}


def restarted(backend, num=3, restarts=0, timeout=0.0, **options):
    def again(index, attempt):
        return functools.partial(Fails, index, attempt, **options), None

    fns = [functools.partial(Fails, index, **options) for index in range(num)]
    return make_vector(fns, backend, again=again, restarts=restarts, timeout=timeout)


PROGRAMS = ("log_program0", "log_program1")


def test_nothing_that_an_environment_started_is_left():
    vec = vector(Simulated, "process", 2)
    batch = vec.reset()
    programs = [int(pid) for key in PROGRAMS for pid in batch[key]]
    assert len(programs) == 4 and all(running(pid) for pid in programs)
    vec.close()
    assert not any(running(pid) for pid in programs)


def test_nothing_is_left_by_a_worker_that_was_killed():
    vec = vector(Simulated, "process", 2)
    batch = vec.reset()
    programs = [int(pid) for key in PROGRAMS for pid in batch[key]]
    os.kill(int(batch["log_pid"][1]), signal.SIGKILL)
    with pytest.raises(EnvError, match="environment 1"):
        vec.step(np.zeros((2, 2)))
    assert not any(running(pid) for pid in programs)


PROGRAM_LOOP = """
import signal
batch = vec.step(np.zeros((2, 2)))
print(*batch['log_program0'], *batch['log_program1'])
print('ready', flush=True)
while True:
    vec.step(np.zeros((2, 2)))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_by_a_program_that_was_ended(number):
    code = textwrap.dedent(SCRIPT).format(root=str(ROOT), tests=str(ROOT / "tests"), kind="Simulated").rstrip()
    process = subprocess.Popen(
        [sys.executable, "-c", code + PROGRAM_LOOP], text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    workers, programs = ([int(float(x)) for x in process.stdout.readline().split()] for _ in range(2))
    assert process.stdout.readline() == "ready\n" and len(programs) == 4
    assert all(running(pid) for pid in workers + programs)
    process.send_signal(number)
    process.wait()
    wait_until(lambda: not any(running(pid) for pid in workers + programs))
    process.stdout.close()


@pytest.mark.parametrize(
    "backend, how",
    [*((backend, "raise") for backend in BACKENDS), ("thread", "hang"), ("process", "hang"), ("process", "die")],
)
def test_an_environment_that_fails_is_made_anew(backend, how, caplog, monkeypatch):
    """Its episode is over without an end, a new one begins; the others go on; after two restarts it is an error."""
    monkeypatch.setattr(parallel, "INTERVAL", 0.1)
    monkeypatch.setattr(parallel, "GRACE", 0.5)
    patience = {"thread": 1.0, "process": 4.0}[backend] if how == "hang" else 0  # a process takes a while to start
    with vectors(restarted(backend, restarts=2, timeout=patience, how=how)) as vec:
        vec.reset()
        seen = [vec.step(np.full((3, 2), n, np.float32)) for n in range(6)]
        assert [batch["count"][1, 0] for batch in seen] == [1, 2, 0, 1, 2, 0] and vec.restarts == 2
        assert [batch["is_first"][1] for batch in seen] == [False, False, True] * 2
        assert not any(batch["is_last"][1] for batch in seen)
        assert [batch["log_attempt"][1] for batch in seen] == [0, 0, 1, 1, 1, 2]
        assert [batch["count"][2, 0] for batch in seen] == [1, 2, 3, 4, 5, 0]  # an episode of its own length
        assert [batch["reward"][2] for batch in seen] == [0, 2, 4, 6, 8, 0]
        np.testing.assert_array_equal(seen[2]["touch"][2], seen[2]["touch"][0] * 0)  # absent at odd counts
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warnings) == 2 and "made anew (1 of 2 env_restarts)" in warnings[0]
        reason = {
            "raise": "the simulator diverged",
            "hang": f"had not answered for {patience:.0f} s in step",
            "die": "SIGKILL",
        }[how]
        assert all(reason in text and "environment 1" in text for text in warnings)
        vec.step(np.zeros((3, 2)))
        vec.step(np.zeros((3, 2)))
        with pytest.raises(EnvError, match=r"(?s)All 2 restarts \(env_restarts\) are used up: environment 1"):
            vec.step(np.zeros((3, 2)))


@pytest.mark.parametrize("backend", ["serial", "process"])
def test_a_restart_may_fail_too(backend, monkeypatch):
    monkeypatch.setattr(parallel.time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.05)))
    for how, reason, most in [("creation", "the port is in use", 3), ("reset", "nothing to start from", 2)]:
        for restarts in (most, most - 1) if backend == "serial" else (most,):
            with vectors(restarted(backend, 2, restarts, until=1, how=how)) as vec:
                vec.reset()
                for _ in range(2):
                    vec.step(np.zeros((2, 2)))
                if restarts < most:
                    with pytest.raises(EnvError, match=f"(?s)environment 1.*{reason}"):
                        vec.step(np.zeros((2, 2)))
                else:
                    assert vec.step(np.zeros((2, 2)))["log_attempt"].tolist() == [0, most] and vec.restarts == most
                    assert vec.step(np.zeros((2, 2)))["count"].tolist() == [[0], [1]]
    with vectors(restarted(backend, 2, 1, how="spaces")) as vec:
        vec.reset()
        with pytest.raises(EnvError, match="environment 1 has other spaces after a restart"):
            for _ in range(3):
                vec.step(np.zeros((2, 2)))


def test_a_dead_worker_is_made_anew_wherever_it_died():
    """Between two steps too; and nothing that it had started is left."""
    fns = [functools.partial(Simulated, index) for index in range(2)]
    with vectors(make_vector(fns, "process", restarts=1)) as vec:
        batch = vec.reset()
        programs = [int(batch[key][1]) for key in PROGRAMS]
        os.kill(int(batch["log_pid"][1]), signal.SIGKILL)
        wait_until(lambda: not running(int(batch["log_pid"][1])))
        after = vec.step(np.zeros((2, 2)))
        assert after["is_first"].tolist() == [False, True] and after["log_pid"][1] != batch["log_pid"][1]
        assert not any(running(pid) for pid in programs)


def test_two_workers_that_die_at_once_are_made_anew():
    with vectors(make_vector([functools.partial(Modules, index) for index in range(3)], "process", restarts=2)) as vec:
        pids = [int(pid) for pid in vec.reset()["log_pid"]]
        for pid in pids[:2]:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(running(pid) for pid in pids[:2]))
        batch = vec.step(np.zeros((3, 2)))
        assert batch["is_first"].tolist() == [True, True, False] and vec.restarts == 2
        assert batch["count"][:, 0].tolist() == [0, 0, 1]
        assert vec.step(np.zeros((3, 2)))["count"][:, 0].tolist() == [1, 1, 2]


@pytest.mark.parametrize("backend", ["thread", "process"])
def test_an_environment_that_hangs_is_an_error_after_a_while(backend, monkeypatch):
    monkeypatch.setattr(parallel, "INTERVAL", 0.1)
    with vectors(restarted(backend, 2, timeout=0.5, how="hang")) as vec:
        vec.reset()
        vec.step(np.zeros((2, 2)))
        vec.step(np.zeros((2, 2)))
        with pytest.raises(EnvError, match=r"environment 1: .* had not answered for \d s in step.*env_timeout"):
            vec.step(np.zeros((2, 2)))


class Slow(Count):
    def step(self, action):
        time.sleep(1.0 * self.index)
        return super().step(action)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_log_names_an_environment_that_is_waited_for(backend, caplog, monkeypatch):
    with vectors(vector(Slow, backend, 2)) as vec:
        monkeypatch.setattr(parallel, "PATIENCE", 0.4)
        monkeypatch.setattr(parallel, "INTERVAL", 0.1)
        vec.reset()
        time.sleep(1.1)  # the watch is at its usual interval
        vec.step(np.zeros((2, 2)))
        time.sleep(0.5)
    warnings = [record.getMessage() for record in caplog.records]
    assert warnings[0].startswith("environment 1 has not answered for ") and " in step." in warnings[0]
    assert "env_timeout" in warnings[0] and warnings[-1] == "environment 1 has answered."


def test_a_thread_that_hangs_does_not_keep_the_program():
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import numpy as np, parallel, test_parallel
parallel.GRACE = 0.2
vec = test_parallel.restarted("thread", timeout=1.0, how="hang")
vec.reset()
for _ in range(3):
    vec.step(np.zeros((3, 2)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert result.returncode == 1 and "had not answered" in result.stderr


def test_environments_may_start_processes():
    with vectors(vector(Parent, "process", 1)) as vec:
        assert vec.reset()["log_code"].tolist() == [0]


def test_global_generators_of_workers_are_seeded():
    """The same seeds give the same numbers, others do not."""
    drawn = []
    for seeds in ([3, 4], [3, 5], None):
        with vectors(make_vector([functools.partial(Draws, i) for i in range(2)], "process", seeds=seeds)) as vec:
            drawn.append(vec.reset()["log_numbers"])
    assert np.array_equal(drawn[0][0], drawn[1][0])
    assert len({row.tobytes() for rows in drawn for row in rows}) == 5


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_environments_log_is_in_the_log(backend, caplog, monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", False)
    caplog.set_level(logging.INFO)
    caplog.handler.handleError = lambda record: None
    with vectors(vector(Talks, backend, 2)) as vec:
        vec.reset()
    said = [record.getMessage() for record in caplog.records if record.args != ("no number",)]
    assert sorted(said) == ["battery at 20 %", "battery at 21 %", "goodbye", "goodbye"]
    assert {record.name for record in caplog.records} == {"robot"}


def test_ids_that_the_program_registers_with_gymnasium_are_known_to_workers(monkeypatch):
    class Mine(gymnasium.Env):
        observation_space, action_space = spaces.Box(-1, 1, (2,)), spaces.Discrete(2)

        def reset(self, seed=None, options=None):
            return np.full(2, 0.5, np.float32), {}

    spec = gymnasium.envs.registration.EnvSpec("Mine-v3", Mine, max_episode_steps=7)
    monkeypatch.setitem(gymnasium.registry, "Mine-v3", spec)
    fns = [functools.partial(make_env, config("gym_Mine-v3"), "train", 0)]
    with vectors(make_vector(fns, "process")) as vec:
        assert vec.reset()["vector"].tolist() == [[0.5, 0.5]]


def test_only_what_the_program_registered_itself_is_sent(monkeypatch):
    """By the package's name: minigrid's ids are registered in a worker too, those of minigrid_mine are not."""
    for name, entry in {"Mine-v0": "minigrid_mine.envs:E", "Theirs-v0": "minigrid.envs:E", "Retired-v0": None}.items():
        monkeypatch.setitem(gymnasium.registry, name, gymnasium.envs.registration.EnvSpec(name, entry))
    assert list(envs.registered()[1]) == ["gym_Mine-v0"]


def running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition, seconds=10):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "it did not happen in time"
        time.sleep(0.05)


class vectors:
    """Closes a vector at the end of a block."""

    def __init__(self, vec):
        self.vec = vec

    def __enter__(self):
        return self.vec

    def __exit__(self, *_):
        self.vec.close()
