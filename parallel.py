"""Several environments as one: in this process, in threads, or in processes.

    vector = make_vector([functools.partial(make_env, config, 'train', i) for i in range(16)], 'process')
    batch = vector.reset()
    batch = vector.step(actions)      # or: vector.send(actions); ...; batch = vector.receive()

The three backends give the same batches, in the order of the environments. Worker processes import no torch.
"""

import atexit
import contextlib
import logging
import queue
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from multiprocessing import shared_memory

import numpy as np

import envs
from errors import UserError
from worker import GRACE, EnvError, Runner, Worker, close_env, end_workers, failure, layout_of, total_bytes, views

log = logging.getLogger(__name__)

CREATION = "its creation"  # takes as long as it takes
INTERVAL = 1.0  # seconds between two looks at what is waited for
PATIENCE = 20.0  # seconds until the log says which environment has not answered; then at twice the time, and so on


def make_vector(
    fns,
    backend: str = "process",
    seeds=None,
    *,
    again: Callable[[int, int], tuple] | None = None,
    restarts: int = 0,
    timeout: float = 0.0,
) -> "VectorEnv":
    """Runs the environments that `fns` (functions without arguments) create, all with the same spaces.

    backend: 'process' (each spawned; the functions must be picklable, by cloudpickle where it is installed), 'thread',
    or 'serial'. seeds: of each worker process's global generators (`random`, `numpy.random`). Threads and this process
    have one of each, which all environments share.

    restarts: how many times, all together, an environment may fail in `reset` or `step` (raise, die, or not answer in
    time) and be made anew; its episode ends where it was, and the batch has its row of a new `reset`. 0: a failure is
    an error. again: `again(index, attempt)` is (function, seed) of that environment for its attempt 1, 2, ...; None:
    those of the first one.
    timeout: seconds after which an environment that has not answered has failed; 0: never. A worker process is killed,
    a thread is left behind; 'serial' cannot end its environment and only logs that it waits.

    Errors: envs.TaskError as an environment raised it while being made; EnvError for anything else.
    """
    backends = {"process": ProcessVector, "thread": ThreadVector, "serial": SerialVector}
    if backend not in backends:
        raise ValueError(f"parallel is '{backend}', expected {', '.join(backends)}.")
    fns = list(fns)
    if not fns:
        raise ValueError("make_vector was given no environments, expected at least one.")
    seeds = [None] * len(fns) if seeds is None else list(seeds)
    again = again or (lambda index, _: (fns[index], seeds[index]))
    return backends[backend](fns, seeds, again, int(restarts), float(timeout))


class VectorEnv:
    """E environments side by side; `make_vector` makes one.

    A batch is a dict of arrays [E, ...] that the caller may keep: the observations, `present/<key>` (bool; zeros stand
    in for an observation that is absent), reward, is_first, is_last, is_terminal, and the numeric `log_*` entries, NaN
    for an environment that gives none. After a step with is_last the next action of that environment is ignored and it
    resets. is_first without is_last before it: the environment failed and was made anew.

    After an error, or a Ctrl-C that interrupts a call, the environments are closed.

    num: E. restarts: environments made anew so far.

    A subclass sets the spaces, calls `_allocate`, and implements `_command`, `_answer`, `_restart`, `_give_up`,
    `_render` and `_stop`.
    """

    def __init__(self, fns, again, restarts, timeout):
        self.num = len(fns)
        self.restarts = 0
        self._again, self._allowed, self._attempts = again, restarts, [0] * self.num
        self._pending = False
        self._closed = False
        self._awaited: tuple[int, str, float] | None = None  # which environment, what for, since when
        _open.add(self)
        threading.Thread(target=_watch, args=(weakref.ref(self), timeout), daemon=True).start()

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
        with self._await(index, "render"):
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
        self._doing = command
        self._answered(self._command, command)

    def _answered(self, method, *args):
        try:
            return method(*args)
        except BaseException:  # Ctrl-C too: it may have left some environments a step ahead of the others
            self.close()
            raise

    def _answers(self):
        logs, failed = [], {}
        try:
            for index in range(self.num):
                self._awaited = (index, self._doing, time.monotonic())
                try:
                    logs.append(self._answer(index))
                except EnvError as error:
                    if self.restarts + len(failed) >= self._allowed:
                        raise self._used_up(error) from error.__cause__
                    logs.append(None)
                    failed[index] = error
        finally:
            self._awaited = None
        for index, error in failed.items():
            logs[index] = self._make_anew(index, error)
        return logs

    def _make_anew(self, index, error):
        """The logs of the new environment's reset; the error of the last attempt where all fail."""
        pause = 0.0
        while self.restarts < self._allowed:
            self.restarts += 1
            self._attempts[index] += 1
            log.warning(
                f"{error}\nIt is made anew ({self.restarts} of {self._allowed} env_restarts); its episode ends there."
            )
            time.sleep(pause)
            pause = min(2 * pause + 1, 30.0)
            try:
                with self._await(index, "its reset after a restart"):
                    return self._restart(index, *self._again(index, self._attempts[index]))
            except EnvError as another:
                error = another
        raise self._used_up(error) from error.__cause__

    def _used_up(self, error):
        if not self._allowed:
            log.info("--env_restarts N lets environments fail N times and makes them anew.")
            return error
        return EnvError(f"All {self._allowed} restarts (env_restarts) are used up: {error}", error.index)

    @contextlib.contextmanager
    def _await(self, index, doing):
        """What is done in the block is waited for, which `_watch` looks at."""
        self._awaited = (index, doing, time.monotonic())
        try:
            yield
        finally:
            self._awaited = None

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
        self._layout = layout_of(self.obs_space, envs.action_size(self.act_space))

    def _check_spaces(self, index, spaces):
        """Of an environment that was made anew."""
        if spaces != (self.obs_space, self.act_space):
            raise EnvError(f"environment {index} has other spaces after a restart: {spaces[0]} and {spaces[1]}.", index)

    def _allocate(self, buffer=None):
        arrays = views(self._layout, self.num, buffer)
        self._actions = arrays.pop("action")
        self._rows = arrays


def _watch(reference, timeout):
    """Says which environment is waited for when that takes long, and ends the waiting after `timeout` seconds. In a
    thread of its own, since the one that waits cannot.
    """
    last, told, warn = None, None, PATIENCE
    while True:
        time.sleep(INTERVAL)
        vector = reference()
        if vector is None or vector._closed:
            return
        awaited = vector._awaited
        if awaited is not last:
            if told:
                log.warning(f"environment {told[0]} has answered.")
            last, told, warn = awaited, None, PATIENCE
        if awaited is not None:
            index, doing, since = awaited
            waited = time.monotonic() - since
            if waited >= (warn if doing != CREATION else 3 * warn):
                told, warn = awaited, 2 * warn
                remedy = vector._told(timeout) if doing != CREATION else ""
                log.warning(f"environment {index} has not answered for {waited:.0f} s in {doing}. {remedy}".rstrip())
            if timeout and waited >= timeout and doing != CREATION and vector._awaited is awaited:
                vector._give_up(index, doing, waited)
                told = None
        del vector


def _close_all():
    for vector in list(_open):
        vector.close()


_open = weakref.WeakSet()
# Before the thread pools stop, OpenGL contexts are freed (from a thread that is not theirs) and multiprocessing waits
# for its children. Plain atexit comes too late for the first two, and does where Python has no such hook.
getattr(threading, "_register_atexit", atexit.register)(_close_all)


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


class SerialVector(VectorEnv):
    """One after the other in this process; the work is done in `receive`."""

    def __init__(self, fns, seeds, again, restarts, timeout):
        self._runners = []  # before anything can be interrupted: `close` looks at them
        super().__init__(fns, again, restarts, timeout)
        try:
            for index, fn in enumerate(fns):
                with self._await(index, CREATION):
                    self._runners.append(self._make(index, fn))
            self._set_spaces([runner.spaces() for runner in self._runners])
        except BaseException:
            self.close()
            raise
        self._allocate()
        for index in range(self.num):
            self._attach(index)

    def _make(self, index, fn):
        return self._guard(index, CREATION, lambda: Runner(fn()))

    def _attach(self, index):
        self._runners[index].attach({**self._rows, "action": self._actions}, index)

    def _guard(self, index, doing, function, *args):
        """Calls function; an error becomes an EnvError. The thread backend calls it in the environment's thread."""
        try:
            return function(*args)
        except UserError:
            raise
        except Exception as error:
            raise failure(index, doing, traceback.format_exc()) from error

    def _command(self, command):
        pass

    def _answer(self, index):
        return self._guard(index, self._doing, self._runners[index].run, self._doing)

    def _restart(self, index, fn, seed):
        runner, self._runners[index] = self._runners[index], None
        if runner is not None:
            self._guard(index, "close", close_env, runner.env)
        self._runners[index] = self._make(index, fn)
        self._check_spaces(index, self._runners[index].spaces())
        self._attach(index)
        return self._guard(index, "reset", self._runners[index].run, "reset")

    def _give_up(self, index, doing, waited):
        pass

    def _told(self, timeout):
        return "It runs in the training process, which cannot end it: --parallel process can (env_timeout)."

    def _render(self, index):
        return self._guard(index, "render", self._runners[index].env.render)

    def _stop(self):
        for runner in filter(None, self._runners):
            close_env(runner.env)


class ThreadVector(SerialVector):
    """Each environment in a thread of its own from its creation to its end: an OpenGL context belongs to a thread."""

    def __init__(self, fns, seeds, again, restarts, timeout):
        self._threads = [_Thread(f"env-{i}") for i in range(len(fns))]
        self._futures: list[Future | None] = [None] * len(fns)
        super().__init__(fns, seeds, again, restarts, timeout)

    def _guard(self, index, doing, function, *args):
        self._futures[index] = self._threads[index].submit(super()._guard, index, doing, function, *args)
        return self._futures[index].result()

    def _command(self, command):
        guard = super()._guard
        for index, (thread, runner) in enumerate(zip(self._threads, self._runners, strict=True)):
            self._futures[index] = thread.submit(guard, index, command, runner.run, command)

    def _answer(self, index):
        return self._futures[index].result()

    def _restart(self, index, fn, seed):
        if self._threads[index].abandoned:  # it may still hang, and its environment with it
            self._threads[index], self._runners[index] = _Thread(f"env-{index}"), None
        return super()._restart(index, fn, seed)

    def _give_up(self, index, doing, waited):
        message = f"environment {index}: its thread had not answered for {waited:.0f} s in {doing} (env_timeout)."
        self._threads[index].abandoned = True
        _settle(self._futures[index].set_exception, EnvError(message, index))

    def _told(self, timeout):
        return f"It fails after {timeout:.0f} s (env_timeout)." if timeout else "--env_timeout SECONDS would end that."

    def _stop(self):
        closing = [
            thread.submit(close_env, runner.env)
            for thread, runner in zip(self._threads, self._runners, strict=False)
            if runner is not None and not thread.abandoned
        ]
        deadline = time.monotonic() + GRACE
        for future in closing:
            with contextlib.suppress(TimeoutError):  # it hangs, and is left behind
                future.result(max(0.0, deadline - time.monotonic()))
        for thread in self._threads:
            thread.end(max(0.0, deadline - time.monotonic()))


class _Thread:
    """Runs functions one after the other in one thread. One that hangs does not keep the program from ending, as those
    of concurrent.futures do.
    """

    def __init__(self, name):
        self.abandoned = False
        self._jobs = queue.SimpleQueue()
        self._thread = threading.Thread(target=_run_jobs, args=(self._jobs,), name=name, daemon=True)
        self._thread.start()

    def submit(self, function, *args) -> Future:
        future = Future()
        self._jobs.put((future, function, args))
        return future

    def end(self, wait):
        self._jobs.put(None)
        self._thread.join(0 if self.abandoned else wait)


def _run_jobs(jobs):
    while (job := jobs.get()) is not None:
        future, function, args = job
        try:
            result = function(*args)
        except BaseException as error:
            _settle(future.set_exception, error)
        else:
            _settle(future.set_result, result)
        del job, future, function, args


def _settle(settle, value):
    with contextlib.suppress(InvalidStateError):  # nobody waits any more
        settle(value)


class ProcessVector(VectorEnv):
    """Each environment in a spawned process (forking after MuJoCo has rendered hangs).

    Arrays, frames among them, go through one block of shared memory; commands, `log_*` numbers and the frames of
    `render` through a pipe. A process that dies is noticed because its end of the pipe closes.
    """

    def __init__(self, fns, seeds, again, restarts, timeout):
        self._workers: list[Worker] = []
        self._memory, self._named = None, False
        super().__init__(fns, again, restarts, timeout)
        try:
            self._factories = envs.registered()
            for index, fn in enumerate(fns):
                self._workers.append(Worker(index, fn, self._factories, seeds[index]))
            self._set_spaces([self._spaces(worker) for worker in self._workers])
            self._share_memory()
        except BaseException:
            self.close()
            raise

    def _spaces(self, worker):
        with self._await(worker.index, CREATION):
            return worker.receive(CREATION)

    def _share_memory(self, restarted=None):
        """Without a name, from the moment that every worker has it open: it ends with its users, however they end.

        restarted: the environment that it is done for; one of the others that dies meanwhile is found at the next step.
        """
        before = self._memory
        self._memory = shared_memory.SharedMemory(create=True, size=total_bytes(self._layout, self.num))
        self._named = True
        self._allocate(self._memory.buf)
        for worker in self._workers:
            worker.send(("attach", self._memory.name, self._layout, self.num))
        for worker in self._workers:
            try:
                worker.receive(CREATION)
            except EnvError:
                if restarted in (None, worker.index):
                    raise
        self._memory.unlink()
        self._named = False
        if before is not None:
            before.close()

    def _command(self, command):
        for worker in self._workers:
            worker.send(command)

    def _answer(self, index):
        return self._workers[index].receive(self._doing)

    def _restart(self, index, fn, seed):
        """All others have answered: they move to a new block of memory, since the old one has no name to open it by."""
        end_workers([self._workers[index]])
        self._workers[index] = Worker(index, fn, self._factories, seed)
        self._check_spaces(index, self._workers[index].receive(CREATION))
        rows = {key: value.copy() for key, value in self._rows.items()}
        self._share_memory(index)
        for key, value in rows.items():
            self._rows[key][:] = value
        self._workers[index].send("reset")
        return self._workers[index].receive("reset")

    def _give_up(self, index, doing, waited):
        self._workers[index].give_up(waited)

    def _told(self, timeout):
        return (
            f"It is killed after {timeout:.0f} s (env_timeout)." if timeout else "--env_timeout SECONDS would kill it."
        )

    def _render(self, index):
        self._workers[index].send("render")
        return self._workers[index].receive("render")

    def _stop(self):
        end_workers(self._workers)
        if self._memory is not None:
            self._memory.close()
            if self._named:
                self._memory.unlink()
