"""What a run survives. Faults are provoked on real runs, one after the other, and what is left is checked.

    python benchmarks/faults.py                          # minutes
    python benchmarks/faults.py --full                   # an hour
    python benchmarks/faults.py --only kill9 disk        # some sections
    python benchmarks/faults.py --only growth --seconds 7200

Sections: kill9, signals, disk (needs root, for a small tmpfs), files, environments, learning, restart, growth.

A row is one fault. *tried*: how often. *survived*: how often the run went on, or ended with one line that says why and
status 1, and the same command took it up again. *lost*: steps that had been stored, or that a run held which could
still save, and that are gone, doubled or out of their order. Every step tells where it belongs (`faulty.py`). The exit
status is 1 unless all survived and nothing was lost.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import common
import faulty
import numpy as np
import psutil
from report import emit, table

import config as configuration
import envs
import replay
import tools
from dreamer import Trainer
from errors import UserError
from ledger import Ledger

SCRIPT = Path(__file__).with_name("faulty.py")
FLAGS = "--configs debug --device cpu --threads 1 --task faulty --image_size 16 16 --eval_episode_num 2"
FLAGS += " --prefill 40 --train_ratio 32 --log_every 50 --save_every 70 --eval_every 130"
MOMENTS = ("prefill", "update", "evaluation", "play", "piece", "compaction", "checkpoint", "metrics")
LIMIT = 120  # seconds that any of these runs may take
DISK = 24  # MiB of the tmpfs


@dataclasses.dataclass
class Row:
    section: str
    fault: str
    tried: int = 0
    survived: int = 0
    lost: int = 0
    what: str = ""
    problems: list[str] = dataclasses.field(default_factory=list)

    @property
    def good(self) -> bool:
        return self.survived == self.tried and not self.lost

    def add(self, problems: list[str], lost: int = 0) -> None:
        self.tried += 1
        self.survived += not problems
        self.lost += lost
        self.problems += [f"{self.tried}: {problem}" for problem in problems]


@dataclasses.dataclass
class Ended:
    """A run that ended: its status, or None if it had to be killed after `LIMIT` seconds."""

    status: int | None
    out: str
    err: str
    seconds: float

    @property
    def last(self) -> str:
        return ([line for line in self.err.splitlines() if line.strip()] or [""])[-1]

    def check(self, *statuses: int, shown: bool = False) -> list[str]:
        """What is wrong with how it ended. shown: a traceback of the environment's own is right."""
        found = []
        if self.status is None:
            found.append(f"it hung for {LIMIT} s")
        elif self.status not in statuses:
            found.append(f"status {self.status}, {self.last}")
        if "Traceback" in self.err and not self.err.startswith("Error: ") and not shown:
            found.append(f"a traceback: {self.last}")
        return found


class Folder:
    """A logdir, and what was stored in it when it was last looked at."""

    def __init__(self, path: Path, *flags: str):
        self.path = path
        self.flags = [*FLAGS.split(), "--logdir", str(path), *flags]
        self.before: dict[tuple[int, int, int], int] = {}

    def run(self, *flags: str, limit: float = LIMIT, **faults) -> Ended:
        command = [sys.executable, str(SCRIPT), json.dumps(faults), "--", *self.flags, *flags]
        begun = time.monotonic()
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = subprocess.Popen(command, stdout=out, stderr=err, start_new_session=True)
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                status = None
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            seconds = time.monotonic() - begun
            out.seek(0)
            err.seek(0)
            return Ended(status, out.read(), err.read(), seconds)

    def check(self) -> tuple[list[str], int]:
        """Problems, and steps lost since the last call: of the files, and of a trainer that takes the run up again."""
        problems, lost, pieces = [], 0, {}
        ledger = Ledger(self.path / "train_eps")
        for path in sorted((self.path / "train_eps").glob("s*.npz")):
            stream, episode, piece, length = map(int, replay.NAME.fullmatch(path.name).groups())
            try:
                with np.load(path, allow_pickle=False) as file:
                    rows = file["where"], file["reward"], file["is_terminal"], file["is_last"]
                    rows += (file["present/where"] if "present/where" in file else np.ones(len(rows[0]), bool),)
            except Exception as error:
                problems.append(f"{path.name} cannot be read: {error}")
                continue
            if len(rows[0]) != length:
                problems.append(f"{path.name} holds {len(rows[0])} steps")
            if length >= len(pieces.get((stream, episode, piece), ([],))[0]):
                pieces[stream, episode, piece] = rows
        for place, length in self.before.items():
            if not ledger.of(place[0]).covers(*place[1:]):
                lost += max(0, length - len(pieces.get(place, ([],))[0]))
        self.before = {place: len(rows[0]) for place, rows in pieces.items()}
        lost += out_of_order(pieces)
        kept = sum(len(rows[0]) - (place[2] == 0) for place, rows in pieces.items())
        kept += sum(removed.steps for removed in ledger.removed.values()) + ledger.lost
        if (self.path / "latest.pt").exists():
            problems += self._compare(kept)
        return problems, lost

    def _compare(self, kept: int) -> list[str]:
        """Opens the run as its next start would."""
        problems = []
        try:
            saved = tools.load_checkpoint(self.path / "latest.pt")["counters"]
            trainer = Trainer(configuration.load([*self.flags, "--parallel", "serial"]))
        except Exception as error:
            return [f"it cannot be taken up again: {type(error).__name__}: {error}"]
        with contextlib.closing(trainer):
            if trainer.replay.steps != kept:
                problems.append(f"the counter says {trainer.replay.steps} steps, the files {kept}")
            if saved["agent_steps"] > kept or saved["updates"] != trainer.updates:
                problems.append(f"the checkpoint counts {saved['agent_steps']} steps of {kept}")
        steps = [json.loads(line)["step"] for line in open(self.path / "metrics.jsonl") if line.strip()]
        if steps != sorted(steps):
            problems.append("metrics.jsonl is not in order")
        return problems


def out_of_order(pieces: dict) -> int:
    """Steps that are doubled, or do not follow the one before them in their episode."""
    wrong, seen, last = 0, set(), {}
    for stream, episode, piece in sorted(pieces):
        where, reward, terminal, is_last, present = pieces[stream, episode, piece]
        expected = 0 if piece == 0 else last.get((stream, episode, piece - 1), 0) + 1
        for index, (*who, count) in enumerate(where.tolist()):
            fits = count == expected + index and abs(reward[index] - count / 100) < 1e-6
            fits &= not terminal[index] or bool(is_last[index])
            wrong += bool(present[index]) and (not fits or (*who, count) in seen)
            seen.add((*who, count))
        last[stream, episode, piece] = expected + len(where) - 1
    return wrong


class Campaign:
    """Rows of one section after the other, printed as they come."""

    def __init__(self, work: Path, full: bool, seed: int, seconds: float):
        self.work, self.full, self.seconds = work, full, seconds
        self.rng = random.Random(seed)
        self.rows: list[Row] = []
        self.count = 0

    def folder(self, *flags: str, at: Path | None = None) -> Folder:
        self.count += 1
        return Folder((at or self.work) / f"run{self.count}", *flags)

    def row(self, section: str, fault: str, what: str = "") -> Row:
        self.rows.append(Row(section, fault, what=what))
        return self.rows[-1]

    def tell(self) -> None:
        row = self.rows[-1]
        print(f"{row.section}: {row.fault}: {row.survived} of {row.tried} survived, {row.lost} steps lost. {row.what}")
        for problem in row.problems[:5]:
            print(f"    {problem[:300]}", flush=True)

    # Kills and signals

    def kill9(self) -> None:
        """At random moments of one run: each start takes up what the kill before it left."""
        arms = [("serial", []), ("process", ["--expl_behavior", "plan2explore"])]
        for backend, flags in arms:
            fault = f"kill -9, {backend}" + (", with an explorer" if flags else "")
            row = self.row("kill9", fault, "pieces load, counters agree, workers are gone, the next start goes on")
            keep = ["--keep_on_disk", "400", "--dataset_size", "400", "--steps", "100000"]
            folder = self.folder("--parallel", backend, *flags, *keep)
            for index in range(100 if self.full else 12):
                moment = MOMENTS[index % len(MOMENTS)]
                several = {"evaluation": 1, "checkpoint": 2, "metrics": 2}.get(moment, 12)
                hook = {"on": moment, "n": self.rng.randint(1, several), "do": "SIGKILL", "within": 0.05}
                ended = folder.run(hook=hook)
                problems = ended.check(-signal.SIGKILL) + self.left_behind(folder)
                more, lost = folder.check()
                row.add([f"{moment}: {problem}" for problem in problems + more], lost)
            self.tell()

    def signals(self) -> None:
        """Status 0 within 20 seconds, everything saved, and the next start goes on from there."""
        for name in ("SIGTERM", "SIGINT", "SIGHUP"):
            row = self.row("signals", name, "status 0 within 20 s, all saved; the next start goes on")
            folder = self.folder("--parallel", "process", "--steps", "100000")
            moments = ("prefill", "update", "play", "film", "piece", "checkpoint", "metrics")
            for moment in moments * (4 if self.full else 1):
                several = 2 if moment in ("checkpoint", "metrics") else 10
                hook = {"on": moment, "n": self.rng.randint(1, several), "do": name, "within": 0.03}
                ended = folder.run(hook=hook)
                problems = ended.check(0) + self.left_behind(folder)
                if not problems and f"Stopped at frame {latest(folder)['frames']:,};" not in ended.out:
                    problems.append("not all is saved")
                more, lost = folder.check()
                row.add([f"{moment}: {problem}" for problem in problems + more], lost)
            self.tell()
        row = self.row("signals", "SIGTERM, a step that does not return", "saved within 20 s")
        for backend in ("serial", "thread", "process"):
            folder = self.folder("--parallel", backend, "--steps", "100000", "--envs", "1", "--eval_every", "0")
            hook = {"on": "update", "n": 30, "do": "SIGTERM", "within": 0.3}
            ended = folder.run(
                env={"fault": "hang", "rate": 1.0, "length": 100}, hook={**hook, "on": "prefill", "n": 1}
            )
            problems = ended.check(0)
            if ended.seconds > 40:
                problems.append(f"{ended.seconds:.0f} s")
            more, lost = folder.check()
            row.add([f"{backend}: {problem}" for problem in problems + more], lost)
        self.tell()

    def left_behind(self, folder: Folder) -> list[str]:
        """Worker processes of a run that are still there some seconds after it."""
        name, end = str(folder.path), time.monotonic() + 8
        while time.monotonic() < end:
            found = [p for p in psutil.process_iter(["cmdline", "environ"]) if self._of(p, name)]
            if not found:
                return []
            time.sleep(0.1)
        return [f"{len(found)} processes are left"]

    @staticmethod
    def _of(process: psutil.Process, name: str) -> bool:
        with contextlib.suppress(psutil.Error):
            return process.status() != psutil.STATUS_ZOMBIE and name in " ".join(process.info["cmdline"] or [])
        return False

    # The disk

    def disk(self) -> None:
        if os.geteuid() != 0:
            self.row("disk", "full disk, read-only logdir", "skipped: a tmpfs can be mounted by root alone")
            return
        for moment in ("config", "piece", "checkpoint", "metrics", "tensorboard", "film"):
            row = self.row(
                "disk", f"the disk is full at a {moment}", "one line or it goes on; with space again it does"
            )
            for n in (1, 2, 5) if self.full else (2,):
                with self.tmpfs() as place:
                    folder = self.folder("--steps", "300", at=place)
                    ended = folder.run(hook={"on": moment, "n": 1 if moment == "config" else n, "do": "fill"})
                    problems = ended.check(0, 1)
                    (place / "filler").unlink(missing_ok=True)
                    row.add(problems + self.goes_on(folder), folder.check()[1])
            self.tell()
        row = self.row("disk", "the logdir becomes read-only", "one line; writable again, it goes on")
        folder = self.folder("--steps", "300")
        ended = folder.run(hook={"on": "update", "n": 40, "do": "readonly"})
        subprocess.run(["umount", "-l", str(folder.path)], check=True)
        row.add(ended.check(1) + self.goes_on(folder), folder.check()[1])
        self.tell()
        row = self.row("disk", "the logdir is deleted", "one line; made again with what was in memory, it goes on")
        folder = self.folder("--steps", "300")
        ended = folder.run(hook={"on": "update", "n": 40, "do": "delete"})
        problems = ended.check(1)
        if not (folder.path / "latest.pt").exists():
            problems.append("nothing was saved")
        problems += folder.run("--steps", "400").check(0)
        if latest(folder)["frames"] < 400:
            problems.append("it began anew")
        row.add(problems)
        self.tell()

    @contextlib.contextmanager
    def tmpfs(self) -> Iterator[Path]:
        place = self.work / "tmpfs"
        place.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "tmpfs", str(place)], check=True)
        try:
            yield place
        finally:
            subprocess.run(["umount", "-l", str(place)], check=True)

    def goes_on(self, folder: Folder, *flags: str) -> list[str]:
        problems = folder.check()[0]
        ended = folder.run("--steps", "400", *flags)
        return problems + ended.check(0) + folder.check()[0]

    # Files

    def files(self) -> None:
        good = self.folder("--steps", "300")
        good.run()
        good.check()
        damages: dict[str, tuple[str, Callable[[Path], None], str]] = {
            "latest.pt, truncated": ("latest.pt", truncate, "previous.pt takes over, by itself"),
            "latest.pt, bits flipped": ("latest.pt", flip, "previous.pt takes over, by itself"),
            "latest.pt, gone": ("latest.pt", Path.unlink, "previous.pt takes over, by itself"),
            "metrics.jsonl, truncated": ("metrics.jsonl", truncate, "the rest stays"),
            "metrics.jsonl, bits flipped": ("metrics.jsonl", flip, "the rest stays"),
            "config.yaml, truncated": ("config.yaml", truncate, "one line, or the run goes on"),
            "config.yaml, bits flipped": ("config.yaml", flip, "one line, or the run goes on"),
            "a piece, truncated": ("piece", truncate, "set aside, named and counted; the rest stays"),
            "a piece, bits flipped": ("piece", flip, "set aside, named and counted; the rest stays"),
            "a piece, gone": ("piece", Path.unlink, "the rest stays; counters do not run backwards"),
        }
        for fault, (name, damage, what) in damages.items():
            row = self.row("files", fault, what)
            for _ in range(10 if self.full else 2):
                folder = self.folder("--steps", "300")
                shutil.copytree(good.path, folder.path)
                folder.before = dict(good.before)
                path = folder.path / name
                if name == "piece":
                    path = self.rng.choice(sorted((folder.path / "train_eps").glob("*.npz")))
                    place = tuple(map(int, replay.NAME.fullmatch(path.name).groups()))[:3]
                    del folder.before[place]  # the damage is ours; all others are to stay
                damage(path, *([self.rng] if damage is not Path.unlink else []))
                frames = latest(good)["frames"]
                ended = folder.run("--steps", str(frames + 50), "--log_level", "warning")
                problems = ended.check(*((0, 1) if name == "config.yaml" else (0,)))
                if name == "config.yaml" and ended.status == 1:
                    row.add(problems, 0)
                    continue
                more, lost = folder.check()
                if latest(folder)["frames"] < frames + 50:
                    more.append(f"only {latest(folder)['frames']} frames")
                row.add(problems + [problem for problem in more if "the files" not in problem], lost)
            self.tell()

    # Environments

    def environments(self) -> None:
        """(fault, share of steps, the status that is right, what happens)."""
        again = "made anew; its episode is cut, no step is lost"
        told = "one line that names it; all before it is saved"
        cases = [
            ("raise", 0.01, "process", 0, again),
            ("raise", 0.1, "process", 0, again),
            ("raise", 0.1, "serial", 0, again),
            ("raise", 0.1, "thread", 0, again),
            ("reset", 0.01, "process", 0, again),
            ("close", 0.01, "process", 0, "its traceback is shown"),
            ("hang", 0.01, "process", 0, f"killed after env_timeout, {again}"),
            ("kill", 0.01, "process", 0, again),
            ("leak", 0.0, "process", 0, f"fails at a limit of its own, {again}"),
            ("nan", 0.01, "process", 1, told),
            ("inf", 0.01, "process", 1, told),
            ("shape", 0.01, "process", 1, told),
            ("dtype", 0.01, "process", 1, told),
            ("missing", 0.01, "process", 0, "absent at that step (present/<key>)"),
            ("extra", 0.01, "process", 1, told),
        ]
        for fault, rate, backend, status, what in cases:
            row = self.row("environments", f"{fault}, {rate:.0%} of steps, {backend}", what)
            for _ in range(3 if self.full else 1):
                limits = ["--env_restarts", "100000", "--env_timeout", "3", "--eval_every", "0"]
                steps = {"leak": 1200, "raise": 200}.get(fault, 400)
                folder = self.folder("--parallel", backend, "--steps", str(steps), *limits)
                env = {"fault": fault, "rate": rate, "length": 400 if fault == "leak" else 40}
                ended = folder.run(env=env, limit=10 * LIMIT)
                problems = ended.check(status, shown=fault == "close")
                more, lost = folder.check()
                if status == 0 and latest(folder)["frames"] < steps:
                    more.append(f"only {latest(folder)['frames']} frames")
                row.add(problems + more, lost)
            self.tell()
        row = self.row("environments", "raise, env_restarts used up", told)
        folder = self.folder("--parallel", "process", "--steps", "400", "--env_restarts", "2")
        ended = folder.run(env={"fault": "raise", "rate": 0.1})
        problems = ended.check(1)
        if "All 2 restarts (env_restarts) are used up" not in ended.err:
            problems.append(ended.last)
        more, lost = folder.check()
        row.add(problems + more, lost)
        self.tell()

    # Learning

    def learning(self) -> None:
        cases = [
            ("a loss that is not finite, once", {"spoil": {"kind": "loss", "first": 20, "last": 20}}, 0,
             "masked: nothing changes, the next is good"),
            ("a poisoned batch, once", {"spoil": {"kind": "batch", "first": 20, "last": 20}}, 0,
             "masked: nothing changes, the next is good"),
            ("losses that stay not finite", {"spoil": {"kind": "loss", "first": 60, "last": 10**9}}, 1,
             "one line; the data is saved, the last good checkpoint stays"),
            ("out of memory", {"hook": {"on": "update", "n": 60, "do": "memory"}}, 1,
             "one line with the keys that help; the data is saved"),
        ]  # fmt: skip
        for fault, faults, status, what in cases:
            row = self.row("learning", fault, what)
            folder = self.folder("--steps", "600", "--opt.max_bad", "20")
            ended = folder.run(**faults)
            row.add(ended.check(status) + folder.check()[0])
            if status:
                goes = folder.run("--steps", "700")
                more, lost = folder.check()
                row.add(goes.check(0) + more, lost)
            self.tell()

    # Size

    def restart(self) -> None:
        count = 50_000 if self.full else 5_000
        row = self.row("restart", f"a start on {count:,} pieces")
        folder = self.folder("--parallel", "serial", "--eval_every", "0")
        write_pieces(folder.path / "train_eps", count)
        frames = count * 20
        ended = folder.run("--steps", str(frames + 50), "--dataset_size", "2e6", limit=600)
        row.what = f"{ended.seconds:.0f} s, of which most to read; a line tells how far"
        problems = ended.check(0)
        if ended.seconds > 75 or latest(folder)["frames"] < frames:
            problems.append(f"{ended.seconds:.0f} s, {latest(folder)['frames']} frames")
        row.add(problems)
        self.tell()

    def growth(self) -> None:
        """A trivial environment and a tiny network at full speed."""
        row = self.row("growth", f"{self.seconds / 60:.0f} minutes at full speed")
        folder = self.folder(
            *"--parallel serial --envs 16 --steps 1e9 --train_ratio 0.05 --dataset_size 20000 --prefill 1000".split(),
            *"--keep_on_disk 50000 --log_every 20000 --eval_every 100000 --save_every 50000".split(),
            *"--video_pred_log false --log_level warning".split(),
        )
        command = [sys.executable, str(SCRIPT), "{}", "--", *folder.flags]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        samples = watch(process, folder.path, self.seconds)
        process.send_signal(signal.SIGTERM)
        status = process.wait(60)
        problems, lost = folder.check()
        if status:
            problems.append(f"status {status}")
        told = []
        for name in ("memory", "files", "threads", "seconds"):
            early, late = (np.median([x[name] for x in part]) for part in halves(samples))
            told.append(f"{name} {early:.4g} to {late:.4g}")
            if late > early * 1.05 + (name in ("files", "threads")):
                problems.append(told[-1])
        held = sum(path.stat().st_size for path in (folder.path / "train_eps").glob("*.npz")) / 2**20
        row.what = f"{samples[-1]['steps']:,} steps; medians of two halves: {', '.join(told)}; {held:.0f} MiB of pieces"
        row.add(problems, lost)
        self.tell()


def latest(folder: Folder) -> dict:
    return tools.load_checkpoint(folder.path / "latest.pt")["counters"]


def truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def flip(path: Path, rng: random.Random) -> None:
    """Bits of eight bytes that lie side by side."""
    with open(path, "r+b") as file:
        at = rng.randrange(max(1, path.stat().st_size - 8))
        file.seek(at)
        turned = bytes(byte ^ 255 for byte in file.read(8))
        file.seek(at)
        file.write(turned)


def write_pieces(folder: Path, count: int) -> None:
    """Episodes of 20 steps, as a run of short episodes leaves them."""
    env = faulty.Faulty(length=20, seed=0)
    config = configuration.load(FLAGS.split())
    faulty.register({})
    spaces = envs.make_env(config, "train").obs_space
    store = replay.Replay(folder, spaces, 3, capacity=10**4, length=8, streams=4, seed=0)
    fsync, os.fsync = os.fsync, lambda _: None
    try:
        for index in range(count):
            for n in range(21):
                step = env.reset() if n == 0 else env.step(0)
                store.add(index % 4, {**step, "action": np.eye(3, dtype=np.float32)[0]})
    finally:
        os.fsync = fsync


def watch(process: subprocess.Popen, logdir: Path, seconds: float) -> list[dict]:
    """What the process takes, at each new line of its metrics."""
    samples, end, seen = [], time.monotonic() + seconds, 0
    own = psutil.Process(process.pid)
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.2)
        path = logdir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [row for row in map(json.loads, lines) if "replay/steps" in row]
        if len(rows) <= seen:
            continue
        cpu, steps = sum(own.cpu_times()[:2]), rows[-1]["replay/steps"]
        if samples:
            before = samples[-1]
            per = (cpu - before["cpu"]) / max(1, steps - before["steps"]) * 1000
        else:
            per = float("nan")
        taken = {"memory": own.memory_info().rss / 2**20, "files": own.num_fds(), "threads": own.num_threads()}
        samples.append({**taken, "seconds": per, "steps": steps, "cpu": cpu})
        seen = len(rows)
    return samples


def halves(samples: list[dict]) -> tuple[list[dict], list[dict]]:
    """Without the first tenth."""
    rest = samples[max(1, len(samples) // 10) :]
    return rest[: len(rest) // 2], rest[len(rest) // 2 :]


SECTIONS = ("kill9", "signals", "disk", "files", "environments", "learning", "restart", "growth")


def markdown(rows: Sequence[Row]) -> str:
    lines = ["| section | fault | tried | survived | steps lost | what happens |", "|---|---|---|---|---|---|"]
    lines += [f"| {r.section} | {r.fault} | {r.tried} | {r.survived} | {r.lost} | {r.what} |" for r in rows]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--full", action="store_true", help="an hour instead of minutes")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION")
    parser.add_argument("--seconds", type=float, help="of growth; 60, or 1,200 with --full")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--markdown", type=Path, help="file for the table")
    parser.add_argument("--work", type=Path, help="folder for the runs, which stay there")
    args = parser.parse_args(argv)
    faulty.register({})
    with contextlib.ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-")))
        work.mkdir(parents=True, exist_ok=True)
        campaign = Campaign(work.resolve(), args.full, args.seed, args.seconds or (1200 if args.full else 60))
        for section in args.only:
            try:
                getattr(campaign, section)()
            except UserError as error:
                campaign.row(section, "the section itself").add([str(error)])
    rows = campaign.rows
    head = ("section", "fault", "tried", "survived", "lost", "what happens")
    table("faults", head, [(r.section, r.fault, r.tried, r.survived, r.lost, r.what) for r in rows])
    if args.markdown:
        args.markdown.write_text(markdown(rows))
    good = all(row.good for row in rows)
    result = {"bench": "faults", "good": good, "rows": [dataclasses.asdict(row) for row in rows]}
    return emit(result)


if __name__ == "__main__":
    sys.exit(0 if common.command(main)["good"] else 1)
