"""Several environments as one: in this process, in threads, or in processes.

    vector = make_vector([functools.partial(make_env, config, 'train', i) for i in range(16)], 'process')
    batch = vector.reset()
    batch = vector.step(actions)      # or: vector.send(actions); ...; batch = vector.receive()

The three backends give the same batches, in the order of the environments. Worker processes import no torch.
"""

import atexit
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
import weakref
from concurrent.futures import ThreadPoolExecutor
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


def make_vector(fns, backend: str = "process", seeds=None) -> "VectorEnv":
    """Runs the environments that `fns` (functions without arguments) create, all with the same spaces.

    backend: 'process' (each spawned; the functions must be picklable, by cloudpickle where it is installed), 'thread',
    or 'serial'. seeds: of each worker process's global generators (`random`, `numpy.random`). Threads and this process
    have one of each, which all environments share.

    Errors: envs.TaskError as an environment raised it while being made; EnvError for anything else.
    """
    backends = {"process": ProcessVector, "thread": ThreadVector, "serial": SerialVector}
    if backend not in backends:
        raise ValueError(f"parallel is '{backend}', expected {', '.join(backends)}.")
    fns = list(fns)
    if not fns:
        raise ValueError("make_vector was given no environments, expected at least one.")
    if backend == "process":
        return ProcessVector(fns, seeds)
    return backends[backend](fns)


class VectorEnv:
    """E environments side by side.

    A batch is a dict of arrays [E, ...] that the caller may keep: the observations, `present/<key>` (bool; zeros stand
    in for an observation that is absent), reward, is_first, is_last, is_terminal, and the numeric `log_*` entries, NaN
    for an environment that gives none. After a step with is_last the next action of that environment is ignored and it
    resets.

    After an error, or a Ctrl-C that interrupts a call, the environments are closed.

    A subclass sets the spaces, calls `_allocate`, and implements `_command`, `_answers`, `_render` and `_stop`.
    """

    def __init__(self, num: int):
        self.num = num
        self._pending = False
        self._closed = False
        _open.add(self)

    def reset(self) -> dict:
        """Starts a new episode everywhere."""
        if self._pending:
            self.receive()
        self._check_open()
        self._issue("reset")
        return self.receive()

    def send(self, actions) -> None:
        """actions: float32 [E, A]. Returns at once; `receive` waits."""
        self._check_open()
        if self._pending:
            raise RuntimeError("send was called twice: call receive in between.")
        actions = np.asarray(actions, np.float32)
        if actions.shape != self._actions.shape:
            raise ValueError(f"actions have shape {actions.shape}, expected {self._actions.shape} (environments, A).")
        self._actions[:] = actions
        self._issue("step")

    def receive(self) -> dict:
        self._check_open()
        if not self._pending:
            raise RuntimeError("receive was called without send.")
        logs = self._answered(self._answers)
        self._pending = False
        return {**{key: rows.copy() for key, rows in self._rows.items()}, **_stack_logs(logs)}

    def step(self, actions) -> dict:
        self.send(actions)
        return self.receive()

    def render(self, index: int = 0):
        """A frame of one environment, uint8 [H, W, 3], or None. Not between send and receive."""
        self._check_open()
        if self._pending:
            raise RuntimeError("render was called between send and receive.")
        return self._answered(self._render, index)

    def close(self) -> None:
        """May be called more than once."""
        if not self._closed:
            self._closed = True
            _open.discard(self)
            self._rows = self._actions = None
            self._stop()

    def __del__(self):
        if not getattr(self, "_closed", True):
            self.close()

    def _issue(self, command):
        self._pending = True
        self._answered(self._command, command)

    def _answered(self, method, *args):
        try:
            return method(*args)
        except BaseException:  # Ctrl-C too: it may have left some environments a step ahead of the others
            self.close()
            raise

    def _check_open(self):
        if self._closed:
            raise RuntimeError("The environments are closed.")

    def _set_spaces(self, all_spaces):
        """all_spaces: (obs_space, act_space) of each environment; they must agree."""
        self.obs_space, self.act_space = all_spaces[0]
        for index, (obs_space, act_space) in enumerate(all_spaces):
            if obs_space != self.obs_space or act_space != self.act_space:
                raise EnvError(
                    f"environment {index} has the spaces {obs_space} and {act_space}, but environment 0 has "
                    f"{self.obs_space} and {self.act_space}: they must agree.",
                    index,
                )
        self._layout = _layout(self.obs_space, envs.action_size(self.act_space))

    def _allocate(self, buffer=None):
        arrays = _views(self._layout, self.num, buffer)
        self._actions = arrays.pop("action")
        self._rows = arrays


def _close_all():
    for vector in list(_open):
        vector.close()


_open = weakref.WeakSet()
# Before the thread pools stop, OpenGL contexts are freed (from a thread that is not theirs) and multiprocessing waits
# for its children. Plain atexit comes too late for the first two, and does where Python has no such hook.
getattr(threading, "_register_atexit", atexit.register)(_close_all)


def _layout(obs_space, size):
    """name -> (shape, dtype) of one environment's row in each array."""
    layout = {"action": ((size,), np.dtype(np.float32)), "reward": ((), np.dtype(np.float32))}
    layout.update({key: ((), np.dtype(bool)) for key in FLAGS})
    for key, space in obs_space.items():
        layout[key] = (tuple(space.shape), np.dtype(space.dtype))
        layout[f"present/{key}"] = ((), np.dtype(bool))
    return layout


def _views(layout, num, buffer=None):
    """Arrays [num, ...] one behind the other in buffer, or in their own memory; None asks for new memory."""
    arrays, offset = {}, 0
    for key, (shape, dtype) in layout.items():
        if buffer is None:
            arrays[key] = np.zeros((num, *shape), dtype)
        else:
            arrays[key] = np.ndarray((num, *shape), dtype, buffer, offset)
            offset = _aligned(offset + arrays[key].nbytes)
    return arrays


def _total_bytes(layout, num):
    return sum(_aligned(num * int(np.prod(shape)) * dtype.itemsize) for shape, dtype in layout.values())


def _aligned(size):
    return -(-size // 64) * 64  # so that no two arrays share a cache line


def _stack_logs(logs):
    """The `log_*` numbers of all environments; NaN for those that give none at this step."""
    result = {}
    for key in dict.fromkeys(key for log in logs for key in log):
        values = [np.asarray(log.get(key, np.nan)) for log in logs]
        shapes = {np.shape(log[key]) for log in logs if key in log}
        if len(shapes) == 1:
            (shape,) = shapes
            result[key] = np.stack([np.broadcast_to(value, shape) for value in values])
    return result


class _Runner:
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


def _failure(index, doing, text):
    return EnvError(f"environment {index} failed in {doing}:\n{text.rstrip()}", index)


class SerialVector(VectorEnv):
    """One after the other in this process; the work is done in `receive`."""

    def __init__(self, fns):
        super().__init__(len(fns))
        self._runners = []
        try:
            for index, fn in enumerate(fns):
                self._runners.append(self._guard(index, "its creation", lambda fn=fn: _Runner(fn())))
            self._set_spaces([(dict(x.env.obs_space), x.env.act_space) for x in self._runners])
        except BaseException:
            self.close()
            raise
        self._allocate()
        for index, runner in enumerate(self._runners):
            runner.attach({**self._rows, "action": self._actions}, index)

    def _guard(self, index, doing, function, *args):
        """Calls function; an error becomes an EnvError. The thread backend calls it in the environment's thread."""
        try:
            return function(*args)
        except UserError:
            raise
        except Exception as error:
            raise _failure(index, doing, traceback.format_exc()) from error

    def _command(self, command):
        self._current = command

    def _answers(self):
        return [self._guard(i, self._current, x.run, self._current) for i, x in enumerate(self._runners)]

    def _render(self, index):
        return self._guard(index, "render", self._runners[index].env.render)

    def _stop(self):
        for runner in self._runners:
            _close_env(runner.env)


class ThreadVector(SerialVector):
    """Each environment in a thread of its own from its creation to its end: an OpenGL context belongs to a thread."""

    def __init__(self, fns):
        self._threads = [ThreadPoolExecutor(1, f"env-{i}") for i in range(len(fns))]
        self._futures = []
        super().__init__(fns)

    def _guard(self, index, doing, function, *args):
        return self._threads[index].submit(super()._guard, index, doing, function, *args).result()

    def _command(self, command):
        guard = super()._guard
        self._futures = [
            thread.submit(guard, i, command, runner.run, command)
            for i, (thread, runner) in enumerate(zip(self._threads, self._runners, strict=True))
        ]

    def _answers(self):
        return [future.result() for future in self._futures]

    def _stop(self):
        for thread, runner in zip(self._threads, self._runners, strict=False):
            thread.submit(_close_env, runner.env)
        for thread in self._threads:
            thread.shutdown()


def _close_env(env):
    """Errors in close are printed, not raised: they must not hide the reason for closing."""
    try:
        if hasattr(env, "close"):
            env.close()
    except Exception:
        traceback.print_exc()


class ProcessVector(VectorEnv):
    """Each environment in a spawned process (forking after MuJoCo has rendered hangs).

    Arrays, frames among them, go through one block of shared memory; commands, `log_*` numbers and the frames of
    `render` through a pipe. A process that dies is noticed because its end of the pipe closes.
    """

    def __init__(self, fns, seeds=None):
        super().__init__(len(fns))
        self._pipes, self._processes = [], []
        self._memory, self._named = None, True
        try:
            factories = envs.registered()
            for index, fn in enumerate(fns):
                self._start(index, fn, factories, None if seeds is None else seeds[index])
            self._doing = "its creation"
            self._set_spaces([self._receive_from(i) for i in range(self.num)])
            self._share_memory()
        except BaseException:
            self.close()
            raise

    def _start(self, index, fn, factories, seed):
        try:
            payload = envs.dumps((factories, fn, seed, logging.getLogger().level))
        except Exception as error:
            raise EnvError(
                f"environment {index}: its function cannot be pickled for a worker process ({error}): "
                "install cloudpickle, or use parallel: thread.",
                index,
            ) from error
        ours, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        # Not daemonic: a daemon may not have children, and simulators often are some. `_close_all` ends it.
        process = context.Process(target=_work, args=(index, theirs, payload), name=f"env-{index}", daemon=False)
        with _bare_start():
            process.start()
        theirs.close()  # so that the worker holds the only copy, and its death closes the pipe
        self._pipes.append(ours)
        self._processes.append(process)

    def _share_memory(self):
        self._memory = shared_memory.SharedMemory(create=True, size=_total_bytes(self._layout, self.num))
        self._allocate(self._memory.buf)
        self._command((self._memory.name, self._layout, self.num))
        self._answers()
        self._memory.unlink()  # every worker has it open: without a name it ends with its users, however they end
        self._named = False

    def _command(self, command):
        self._doing = command if isinstance(command, str) else "its creation"
        for index in range(self.num):
            self._send_to(index, command)

    def _answers(self):
        return [self._receive_from(index) for index in range(self.num)]

    def _render(self, index):
        self._doing = "render"
        self._send_to(index, "render")
        return self._receive_from(index)

    def _send_to(self, index, message):
        try:
            self._pipes[index].send(message)
        except OSError:
            raise self._death(index) from None

    def _receive_from(self, index):
        try:
            while _log(message := self._pipes[index].recv()):
                pass
            kind, content = message
        except (EOFError, OSError):
            raise self._death(index) from None
        if kind == "task error":
            raise envs.TaskError(content)
        if kind == "error":
            raise _failure(index, self._doing, content)
        return content

    def _death(self, index):
        process = self._processes[index]
        process.join(GRACE)
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
            f"environment {index}: its worker process (pid {process.pid}) died without a word in "
            f"{self._doing}, exit code {code}{name}.{hint}",
            index,
        )

    def _stop(self):
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send("close")
        deadline = time.monotonic() + GRACE
        for pipe in self._pipes:  # what they log at their ends; a full pipe would keep them from it
            with contextlib.suppress(EOFError, OSError):
                while pipe.poll(max(0.0, deadline - time.monotonic())):
                    _log(pipe.recv())
        groups = [process.pid for process in self._processes]
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                process.kill()
                process.join()
            process.close()
        _end_groups(groups)
        for pipe in self._pipes:
            pipe.close()
        if self._memory is not None:
            self._memory.close()
            if self._named:
                self._memory.unlink()


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
        runner = _Runner(env)
        pipe.send(("spaces", (dict(env.obs_space), env.act_space)))
        while (command := pipe.recv()) != "close":
            if isinstance(command, tuple):
                name, layout, num = command
                memory = shared_memory.SharedMemory(name)
                runner.attach(_views(layout, num, memory.buf), index)
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
            _close_env(env)
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
