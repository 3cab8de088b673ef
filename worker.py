"""One environment and its row in the arrays of a vector (`Runner`), and one in a process of its own (`Worker`).

A worker process imports no torch, ends with its parent however that ends, and leaves nothing behind that it started.
"""

import contextlib
import logging
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import time
import traceback
import types
from multiprocessing import shared_memory

import numpy as np

import envs
from errors import UserError

FLAGS = ("is_first", "is_last", "is_terminal")
GRACE = 5.0  # seconds that all workers together have to close their environments


class EnvError(RuntimeError):
    """An environment failed. `index`: which one; the message ends with its own traceback, where it left one."""

    def __init__(self, message: str, index: int):
        super().__init__(message)
        self.index = index


class Runner:
    """One environment and its row in the arrays: does what the three backends have in common."""

    def __init__(self, env):
        self.env = env
        self._ended = True

    def attach(self, arrays, index):
        self._action = arrays["action"][index]
        self._rows = {key: rows[index : index + 1] for key, rows in arrays.items() if key != "action"}
        self._keys = list(self.env.obs_space)

    def detach(self):
        self._action = self._rows = None

    def spaces(self):
        return dict(self.env.obs_space), self.env.act_space

    def run(self, command):
        """command: 'reset', or 'step', which resets after the end of an episode. Writes the row; returns the logs."""
        if command == "reset" or self._ended:
            step = self.env.reset()
        else:
            step = self.env.step(self._action.copy())
        self._ended = bool(step["is_last"])
        for key in ("reward", *FLAGS):
            self._rows[key][0] = step[key]
        for key in self._keys:
            self._write(key, step.get(key))
        return {key: value for key, value in step.items() if key.startswith("log_") and _is_numeric(value)}

    def _write(self, key, value):
        row = self._rows[key]
        self._rows[f"present/{key}"][0] = value is not None
        if value is None:
            row[0] = 0
        elif np.shape(value) != row.shape[1:]:
            raise ValueError(f"observation '{key}' has shape {np.shape(value)}, but its space says {row.shape[1:]}.")
        else:
            row[0] = value


def _is_numeric(value):
    return np.asarray(value).dtype.kind in "biuf"


def layout_of(obs_space, size):
    """name -> (shape, dtype) of one environment's row in each array."""
    layout = {"action": ((size,), np.dtype(np.float32)), "reward": ((), np.dtype(np.float32))}
    layout.update({key: ((), np.dtype(bool)) for key in FLAGS})
    for key, space in obs_space.items():
        layout[key] = (tuple(space.shape), np.dtype(space.dtype))
        layout[f"present/{key}"] = ((), np.dtype(bool))
    return layout


def views(layout, num, buffer=None):
    """Arrays [num, ...] one behind the other in buffer, or in their own memory; None asks for new memory."""
    arrays, offset = {}, 0
    for key, (shape, dtype) in layout.items():
        if buffer is None:
            arrays[key] = np.zeros((num, *shape), dtype)
        else:
            arrays[key] = np.ndarray((num, *shape), dtype, buffer, offset)
            offset = _aligned(offset + arrays[key].nbytes)
    return arrays


def total_bytes(layout, num):
    return sum(_aligned(num * int(np.prod(shape)) * dtype.itemsize) for shape, dtype in layout.values())


def _aligned(size):
    return -(-size // 64) * 64  # so that no two arrays share a cache line


def failure(index, doing, text):
    return EnvError(f"environment {index} failed in {doing}:\n{text.rstrip()}", index)


def close_env(env):
    """Errors in close are printed, not raised: they must not hide the reason for closing."""
    try:
        if hasattr(env, "close"):
            env.close()
    except Exception:
        traceback.print_exc()


class Worker:
    """Starts the process; its first answer are the spaces.

    index: number of the environment. fn: makes it. factories: of `envs.registered`. seed: of the global generators.

    Commands are 'reset', 'step' and 'render', ('attach', name, layout, number of environments) for shared memory, and
    'close'. All but the last are answered.
    """

    def __init__(self, index: int, fn, factories, seed: int | None):
        self.index, self.overdue, self.ended = index, 0.0, False
        try:
            payload = envs.dumps((factories, fn, seed, logging.getLogger().level))
        except Exception as error:
            raise EnvError(
                f"environment {index}: its function cannot be pickled for a worker process ({error}): "
                "install cloudpickle, or use parallel: thread.",
                index,
            ) from error
        self.pipe, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        # Not daemonic: a daemon may not have children, and simulators often are some. `end_workers` ends it.
        self.process = context.Process(target=_work, args=(index, theirs, payload), name=f"env-{index}", daemon=False)
        with _bare_start():
            self.process.start()
        theirs.close()  # so that the worker holds the only copy, and its death closes the pipe

    def send(self, command) -> None:
        """A worker that is dead does not take it; `receive` then tells."""
        with contextlib.suppress(OSError):
            self.pipe.send(command)

    def receive(self, doing: str):
        """The answer to the last command. Errors: envs.TaskError; EnvError, for which `doing` says what was asked."""
        try:
            while _log(message := self.pipe.recv()):
                pass
            kind, content = message
        except (EOFError, OSError):
            raise self._death(doing) from None
        if kind == "task error":
            raise envs.TaskError(content)
        if kind == "error":
            raise failure(self.index, doing, content)
        return content

    def give_up(self, waited: float) -> None:
        """Kills the worker, which has not answered for so many seconds; whoever waits for it is told by `receive`."""
        self.overdue = waited
        with contextlib.suppress(ValueError):  # closed meanwhile
            _signal_group(self.process.pid, signal.SIGKILL)
            self.process.kill()

    def _death(self, doing):
        process = self.process
        process.join(GRACE)
        if self.overdue:
            return EnvError(
                f"environment {self.index}: its worker process (pid {process.pid}) had not answered for "
                f"{self.overdue:.0f} s in {doing}, and was killed (env_timeout).",
                self.index,
            )
        code = process.exitcode
        name = ""
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                name = f" ({signal.Signals(-code).name})"
        hint = {
            -signal.SIGKILL: " The system may have run out of memory.",
            -signal.SIGBUS: " /dev/shm may be too small (docker run --shm-size=1g).",
        }.get(code, "")
        return EnvError(
            f"environment {self.index}: its worker process (pid {process.pid}) died without a word in {doing}, exit "
            f"code {code}{name}.{hint}",
            self.index,
        )


def end_workers(workers: list[Worker]) -> None:
    """Closes their environments and ends the processes, and whatever these started."""
    workers = [worker for worker in workers if not worker.ended]
    for worker in workers:
        worker.send("close")
    deadline = time.monotonic() + GRACE
    for worker in workers:  # what they log at their ends; a full pipe would keep them from it
        with contextlib.suppress(EOFError, OSError):
            while worker.pipe.poll(max(0.0, deadline - time.monotonic())):
                _log(worker.pipe.recv())
    groups = [worker.process.pid for worker in workers]
    for worker in workers:
        worker.process.join(max(0.0, deadline - time.monotonic()))
        if worker.process.exitcode is None:
            worker.process.kill()
            worker.process.join()
        worker.process.close()
    _end_groups(groups)
    for worker in workers:
        worker.pipe.close()
        worker.ended = True


def _log(message):
    """Logs a worker's message (kind, content) if that is what it is for; False for any other."""
    kind, content = message
    if kind == "log":
        logging.getLogger(content[0]).log(*content[1:])
    return kind == "log"


def _end_groups(groups):
    """Ends what workers have started and left behind: each leads a process group, which its children belong to."""
    left = [group for group in groups if _signal_group(group, signal.SIGTERM)]
    deadline = time.monotonic() + 1
    while left and time.monotonic() < deadline:
        time.sleep(0.01)
        left = [group for group in left if _signal_group(group, 0)]
    for group in left:
        _signal_group(group, signal.SIGKILL)


def _signal_group(group, number):
    """Whether there was anyone to receive it."""
    try:
        os.killpg(group, number)
    except (AttributeError, ProcessLookupError, PermissionError):  # not on Windows; nothing left; nothing of ours
        return False
    return True


@contextlib.contextmanager
def _bare_start():
    """A spawned process imports the program's main module, and torch with it: seconds and hundreds of megabytes per
    worker. What it needs comes by value (cloudpickle), so the main module is out of sight while it starts.

    SIGINT is blocked meanwhile, and in the worker until it has handlers of its own: Ctrl-C is for the parent, even
    during start-up.
    """
    main = sys.modules["__main__"]
    hide = _has_cloudpickle()
    block = hasattr(signal, "pthread_sigmask")
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if block else None
    try:
        if hide:
            sys.modules["__main__"] = types.ModuleType("__main__")
        yield
    finally:
        sys.modules["__main__"] = main
        if block:
            signal.pthread_sigmask(signal.SIG_SETMASK, old)


def _has_cloudpickle():
    try:
        import cloudpickle  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


def _work(index, pipe, payload):
    """The life of a worker process."""
    _stay_when_told()
    pipe = _Pipe(pipe)
    logging.getLogger().addHandler(_ToParent(pipe))
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    env = memory = runner = None
    orphaned = False
    try:
        factories, fn, seed, level = pickle.loads(payload)
        logging.getLogger().setLevel(level)
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed)
        envs.restore_registered(*factories)
        env = fn()
        runner = Runner(env)
        pipe.send(("spaces", runner.spaces()))
        while (command := pipe.recv()) != "close":
            if isinstance(command, tuple):  # again where another environment is made anew
                _, name, layout, num = command
                before, memory = memory, shared_memory.SharedMemory(name)
                runner.attach(views(layout, num, memory.buf), index)
                if before is not None:
                    before.close()
                pipe.send(("ready", None))
            elif command == "render":
                pipe.send(("frame", env.render()))
            else:
                pipe.send(("logs", runner.run(command)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        orphaned = True
    except UserError as error:
        _report(pipe, "task error", str(error))
    except BaseException:
        _report(pipe, "error", traceback.format_exc())
    finally:
        if env is not None:
            close_env(env)
        if memory is not None:
            runner.detach()
            memory.close()
        if orphaned:
            _end_own_group()


def _stay_when_told():
    """The parent decides when to stop: a signal to all processes (Ctrl-C, a job scheduler's SIGTERM) would otherwise
    take the environments away while it is still saving.

    Handlers, not SIG_IGN and no mask: those would pass on to every program that the environment starts, which could
    then not be ended. A group of its own keeps Ctrl-C from these programs, and lets all of them be ended.
    """
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


class _Pipe:
    """A worker's end of the pipe. Several threads may send: an environment may log from any."""

    def __init__(self, pipe):
        self._pipe, self._lock = pipe, threading.Lock()
        self.recv = pipe.recv

    def send(self, message):
        with self._lock:
            self._pipe.send(message)


class _ToParent(logging.Handler):
    """Hands a worker's log on to the parent's."""

    def __init__(self, pipe):
        super().__init__()
        self._pipe = pipe

    def emit(self, record):
        try:
            self._pipe.send(("log", (record.name, record.levelno, "%s", self.format(record))))
        except OSError:
            pass  # the parent is gone
        except Exception:
            self.handleError(record)


def _report(pipe, kind, text):
    with contextlib.suppress(OSError):
        pipe.send((kind, text))


def _exit_with_parent():
    """Ends this process with its parent even in the middle of a long step, and what it has started."""
    multiprocessing.parent_process().join()
    time.sleep(GRACE)  # for an environment that can be closed in the ordinary way
    _end_own_group()
    os._exit(1)


def _end_own_group():
    if hasattr(os, "killpg") and os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
