"""Training runs in processes of their own, several at a time, stopped gracefully, and resumed by the same command."""

import contextlib
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import time
from collections import deque
from pathlib import Path

from curves import Curve, read_run

from config import Config, check_resume, resolve_paths
from errors import UserError
from files import atomic_write
from sweep import last_line
from tools import Shutdown

POLL = 0.2  # seconds
NOTED = 60  # seconds after which the time that a run has used is written down, so that a crash loses no more
GRACE = 600  # seconds to save and end
TAIL = 8  # lines of a failed run's output that are shown
STOPPED = (0, 130, -signal.SIGINT)  # exit codes of a run of ours after a Ctrl-C, also of one at its very start


@dataclasses.dataclass
class Run:
    """One run. `flags` are its arm's; `settings` what they were translated to, if they were."""

    arm: str
    task: str
    seed: int
    folder: Path
    flags: list[str]
    steps: int
    config: Config
    reference: bool = False
    threads: int = 1
    settings: list[str] = dataclasses.field(default_factory=list)
    command: list[str] = dataclasses.field(default_factory=list)
    variables: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        names = ("arm", "task", "seed", "reference", "flags", "steps")
        self.record = {name: getattr(self, name) for name in names}
        self.record |= {"status": "not run", "wall_s": 0.0, "cpu_s": 0.0, "sessions": 0}

    @property
    def name(self) -> str:
        return f"{self.arm} {self.task} seed {self.seed}"

    def check(self) -> None:
        """Takes over what is recorded of it. UserError if that was with other flags."""
        known = read_record(self.folder)
        if known is None:
            return
        if (known["flags"], known["reference"]) != (self.flags, self.reference):
            was, now = (shlex.join(flags) or "no flags" for flags in (known["flags"], self.flags))
            raise UserError(
                f"{self.folder} was run with {was}, and the arm {self.arm} has {now} now: use another name or --out."
            )
        if self._lasting(known.get("settings", [])) != self._lasting(self.settings):
            raise UserError(
                f"{self.folder} was run with other settings of the reference: the blocks of {shlex.join(self.flags)} "
                "have changed since; use another name or --out."
            )
        saved = self.folder / "config.yaml"
        if not self.reference and saved.exists():
            check_resume(resolve_paths(Config.read(saved)), resolve_paths(self.config))
        done = known["status"] == "finished" and known["steps"] >= self.steps
        status = known["status"] if done or known["status"] != "finished" else "to be continued"
        self.record |= known | {"steps": max(known["steps"], self.steps) if done else self.steps, "status": status}

    @staticmethod
    def _lasting(settings: list[str]) -> dict[str, str]:
        """Without how long it is to run, and where."""
        pairs = dict(zip(settings[::2], settings[1::2], strict=True))
        return {key: value for key, value in pairs.items() if key not in ("--run.steps", "--logdir")}

    def over(self, hours: float | None, seconds: float = 0.0) -> bool:
        """Whether it has used its time, with so many seconds more."""
        return hours is not None and self.record["wall_s"] + seconds >= 3600 * hours

    def save(self, **changes) -> None:
        self.record |= changes | ({"settings": self.settings} if self.settings else {})
        with atomic_write(self.folder / "run.json") as file:
            file.write(json.dumps(self.record, indent=2).encode())

    def progress(self) -> str:
        curve = Curve(self.task, self.arm, self.seed, read_run(self.folder, self.reference))
        last = curve.last("return")
        told = "no return yet" if last is None else f"last return {last:.4g}"
        return f"{curve.reached:,} frames, {told}, {self.record['wall_s'] / 3600:.2f} h"


def read_record(folder: Path) -> dict | None:
    path = folder / "run.json"
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except ValueError as error:
        raise UserError(f"{path}: {error}; expected what learning.py wrote: remove the folder of this run.") from None


def records(out: Path) -> dict[Path, dict]:
    """Of all runs in a folder, by where they are."""
    return {path.parent: read_record(path.parent) for path in sorted(out.glob("*/*/*/run.json"))}


class Session:
    """A run's process, in a process group of its own, so that a Ctrl-C in the terminal does not reach it twice."""

    def __init__(self, run: Run):
        self.run, self.told, self.why = run, None, "stopped"
        run.folder.mkdir(parents=True, exist_ok=True)
        self.before = run.record["wall_s"]
        self.output = run.folder / "output.txt"
        variables = {"OMP_NUM_THREADS": str(run.threads), "DREAMER_PARENT": "1"} | run.variables
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                run.command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT,
                env=os.environ | variables, start_new_session=True,
            )  # fmt: skip
        self.start = self.noted = time.monotonic()
        run.save(status="running", sessions=run.record["sessions"] + 1)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def stop(self, why: str) -> None:
        """Lets it save and end; what has not ended after a long while is killed."""
        if self.told is None:
            self.told, self.why = time.monotonic(), why
            self.process.send_signal(signal.SIGINT)
        elif time.monotonic() - self.told > GRACE:
            self.kill()

    def kill(self) -> None:
        """The process and what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def ended(self) -> bool:
        """Looks whether it has ended, and writes down what it used."""
        pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
        if pid == 0:
            if time.monotonic() - self.noted > NOTED:
                self.noted = time.monotonic()
                self.run.save(wall_s=self.before + self.seconds)
            return False
        code = self.process.returncode = os.waitstatus_to_exitcode(status)
        self.process.stdin.close()
        self._clear()
        cpu = self.run.record["cpu_s"] + usage.ru_utime + usage.ru_stime
        self.run.save(wall_s=self.before + self.seconds, cpu_s=cpu, status=self._status(code), code=code)
        return True

    def _status(self, code: int) -> str:
        if self.told is not None and (code in STOPPED or self.run.reference):
            return self.why
        if code == 0:
            return "stopped" if "Stopped at frame" in last_line(self.output) else "finished"
        return "failed"

    def _clear(self, seconds: float = 2.0) -> None:
        """Ends what it has left behind, after a moment in which that may end by itself."""
        end = time.monotonic() + seconds
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < end:
                os.killpg(self.process.pid, 0)
                time.sleep(0.02)
            self.kill()

    def tail(self) -> str:
        lines = [line for line in self.output.read_text(errors="replace").splitlines() if line.strip()]
        return "\n".join(f"    {line}" for line in lines[-TAIL:])


def run_all(runs: list[Run], jobs: int, hours: float | None) -> int:
    """Runs what is not finished, `jobs` at a time. Exit status: 130 after Ctrl-C or SIGTERM, 1 if a run has failed."""
    waiting = deque(run for run in runs if run.record["status"] != "finished" and not run.over(hours))
    print(f"{len(runs)} runs: {len(runs) - len(waiting)} done, {len(waiting)} to run, {jobs} at a time", flush=True)
    running: list[Session] = []
    failed = False
    with Shutdown() as shutdown:
        try:
            while running or (waiting and not shutdown.requested):
                while waiting and len(running) < jobs and not shutdown.requested:
                    running.append(begin(waiting.popleft()))
                for session in [*running]:
                    if shutdown.requested or session.told is not None:
                        session.stop(session.why)
                    elif hours is not None and session.before + session.seconds >= 3600 * hours:
                        session.stop("out of hours")
                    if session.ended():
                        running.remove(session)
                        failed |= end(session)
                if running:
                    time.sleep(POLL)
        except KeyboardInterrupt:  # a second Ctrl-C
            return 130
        finally:
            for session in running:
                session.kill()
                session.process.wait()
                session.run.save(status="killed", wall_s=session.before + session.seconds)
    return 130 if shutdown.requested else int(failed)


def begin(run: Run) -> Session:
    how = "goes on" if run.record["sessions"] else "begins"
    print(f"{run.name} {how}: {run.progress()}; {run.folder / 'output.txt'}", flush=True)
    return Session(run)


def end(session: Session) -> bool:
    """Tells how a run ended. True if it failed."""
    run = session.run
    status = run.record["status"]
    print(f"{run.name} {status}: {run.progress()} ({run.record['cpu_s'] / 3600:.2f} h of CPU)", flush=True)
    if status == "failed":
        print(f"  exit code {run.record['code']}, the end of {session.output}:\n{session.tail()}", flush=True)
    return status == "failed"
