"""A learning benchmark: tasks x seeds x arms, several runs at a time, and what their curves tell.

    python benchmarks/learning.py --tasks dmc_finger_spin dmc_cartpole_swingup --seeds 0 1 2 \\
        --arm fast="--configs dmc_proprio --opt.lr 1e-4" --arm slow="--configs dmc_proprio" \\
        --steps 24000 --out logdir/learning

An arm is a named set of flags of dreamer.py. Every run is a process with a logdir of its own, OUT/ARM/TASK/SEED. The
same command goes on where it was: what is finished stays, what was interrupted resumes. Ctrl-C and SIGTERM let the runs
save and end. The report is of all runs in OUT, and of recorded `--curves`; `--report-only` runs nothing.

Curves are put on a common grid of frames, from 0 to the last frame that all runs of a task reached (see
`curves.on_grid`). `last` is the mean over the last tenth of the grid, `area` the mean over all of it.
"""

import argparse
import dataclasses
import fcntl
import itertools
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import common
import numpy as np
import reference
from curves import TITLES, Curve, Grid, area, common_grid, draw, drawable, first_frame, read_run, recorded_curves, tail
from curves import write_csv as write_curves
from report import emit, table
from running import Run, records, run_all
from statistics_of_runs import beats, interval, iqm, permutation_p, pooled_iqm

import config as configuration
from errors import UserError

DREAMER = [sys.executable, str(common.ROOT / "dreamer.py")]
RETURNS = {"dmc_": 1000.0}  # the highest return of a suite's tasks, for scores across tasks
ALL = "all tasks"
FEW = 5  # seeds


@dataclasses.dataclass
class Arm:
    name: str
    flags: list[str]
    reference: bool = False


# Arguments


def main(argv: Sequence[str] | None = None) -> dict:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    code = 0
    if not args.report_only:
        runs = plan(args)
        with (args.out / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"Another learning.py runs in {args.out}: wait for it, or use another --out.") from None
            code = run_all(runs, args.jobs, args.hours)
        if code == 130:
            print("Interrupted. The same command goes on from here.", file=sys.stderr, flush=True)
            return {"bench": "learning", "status": code}
    return report(args) | {"status": code}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of all runs, curves.csv and curves.png")
    add("--tasks", nargs="+", default=[], metavar="TASK", help="to run; and of these alone is the report")
    add("--seeds", nargs="+", type=common.natural, default=[0], metavar="S")
    add("--arm", type=named, action="append", default=[], metavar='NAME="FLAGS"', help="flags of dreamer.py")
    add(
        "--reference", type=named, action="append", default=[], metavar='NAME="FLAGS"',
        help="the same flags, translated for the author's code in $PEERS/dreamerv3 (see README.md)",
    )  # fmt: skip
    add("--reference-python", type=Path, metavar="FILE", help="its interpreter; $PEERS/venv/bin/python if not given")
    add("--steps", type=common.positive, help="frames of a run; those of the arm's flags if not given")
    add("--jobs", type=common.positive, default=len(os.sched_getaffinity(0)), help="runs at a time; as many as cores")
    add("--threads", type=common.positive, default=1, help="CPU threads of a run")
    add("--hours", type=float, help="wall-clock hours after which a run is stopped, all its sessions together")
    add("--report-only", action="store_true", help="run nothing")
    add("--curves", nargs="+", default=[], metavar="[TASK=]FILE", help="recorded curves (CSV)")
    add("--metric", choices=list(TITLES), default="return", help="what the report is of")
    add("--grid", type=common.positive, default=20, metavar="BINS", help="of the common grid of frames")
    add("--last", type=common.positive, metavar="FRAMES", help="end of the grid; runs that are not there are left out")
    add("--threshold", nargs="+", type=valued, default=[], metavar="TASK=RETURN", help="tell the first frame there")
    add("--scale", nargs="+", type=valued, default=[], metavar="TASK=RETURN", help="that is a score of 1 across tasks")
    add("--picture", type=Path, metavar="FILE.png", help="OUT/curves.png if not given")
    args = parser.parse_args(argv)
    args.arms = [Arm(*arm) for arm in args.arm] + [Arm(*arm, reference=True) for arm in args.reference]
    names = [arm.name for arm in args.arms]
    if len(set(names)) < len(names):
        parser.error(f"arms are called {', '.join(names)}: every one needs a name of its own")
    if not args.report_only and not (args.tasks and args.arms):
        parser.error("expected --tasks and at least one --arm, or --report-only")
    if args.picture and not drawable():
        parser.error("--picture needs matplotlib: pip install -r requirements/docs.txt")
    return args


def named(text: str) -> tuple[str, list[str]]:
    """NAME="FLAGS"."""
    name, equals, flags = text.partition("=")
    if not equals or not re.fullmatch(r"\w[\w.+-]*", name):
        raise argparse.ArgumentTypeError(f'{text!r}: expected NAME="FLAGS", and a NAME of letters, digits, _ . + -')
    return name, shlex.split(flags)


def valued(text: str) -> tuple[str, float]:
    """TASK=NUMBER."""
    task, _, value = text.rpartition("=")
    try:
        return task, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected TASK=NUMBER, as dmc_finger_spin=450") from None


# Runs


def plan(args: argparse.Namespace) -> list[Run]:
    """All runs, in the order in which they begin: complete sets of arms and tasks come in seed by seed."""
    configs = {arm.name: load(arm, args) for arm in args.arms}
    order = itertools.product(dict.fromkeys(args.seeds), dict.fromkeys(args.tasks), args.arms)
    runs = [make_run(args, arm, configs[arm.name], task, seed) for seed, task, arm in order]
    for run in runs:
        run.check()
    return runs


def load(arm: Arm, args: argparse.Namespace) -> configuration.Config:
    """An arm's configuration. UserError for flags that are wrong, or that the benchmark gives itself."""
    try:
        config = configuration.load(["--threads", str(args.threads), *arm.flags])
    except configuration.ConfigError as error:
        raise UserError(f"arm {arm.name}: {error}") from None
    taken = [key for key in ("task", "seed", "logdir", "steps", "mode") if key in config.given()]
    if taken and (taken != ["steps"] or args.steps):
        raise UserError(f"arm {arm.name}: --{taken[0]} is set by the benchmark: leave it out of the flags.")
    return config


def make_run(args: argparse.Namespace, arm: Arm, config: configuration.Config, task: str, seed: int) -> Run:
    logdir = args.out / arm.name / task.replace("/", "-") / str(seed)
    own = {"task": task, "seed": seed, "steps": args.steps or config.steps, "logdir": str(logdir)}
    config = config.replace(**own)
    run = Run(arm.name, task, seed, logdir, arm.flags, int(config.steps), config, arm.reference, args.threads)
    if arm.reference:
        python, peers = reference.program(args.reference_python)
        run.settings = reference.translate(config, logdir)
        run.command = [str(python), reference.__file__, *run.settings]
        run.variables = {"PEERS": str(peers)}
    else:
        words = [word for key, value in own.items() for word in (f"--{key}", str(value))]
        run.command = [*DREAMER, "--threads", str(args.threads), *arm.flags, *words]
    return run


# The report


def report(args: argparse.Namespace) -> dict:
    """Prints tables, writes curves.csv and the picture, and emits the result."""
    found = records(args.out)
    own = [Curve(r["task"], r["arm"], r["seed"], read_run(path, r["reference"])) for path, r in found.items()]
    for curve, record in zip(own, found.values(), strict=True):
        for name, spent in (("hours", "wall_s"), ("cpu_hours", "cpu_s")):
            curve.points[name] = [(curve.reached, record[spent] / 3600)]
    write_curves(args.out / "curves.csv", own)
    curves = own + recorded_curves(args.curves)
    curves = [curve for curve in curves if not args.tasks or curve.task in args.tasks]
    keys = [(curve.task, curve.arm, curve.seed) for curve in curves]
    for key in sorted({key for key in keys if keys.count(key) > 1}):
        raise UserError(f"two curves of {' '.join(map(str, key))}: rename an arm in --curves, or leave the file out.")
    if not curves:
        raise UserError(f"{args.out} holds no runs of these tasks, and there are no --curves: nothing to report.")
    order = [arm.name for arm in args.arms]
    curves.sort(key=lambda c: (c.task, order.index(c.arm) if c.arm in order else len(order), c.arm, c.seed))
    grids, lasts, notes = common_grid(curves, args.metric, args.grid, args.last)
    hours = spent_hours(curves)
    tasks = {task: tell_task(task, arms, lasts[task], hours, args) for task, arms in grids.items()}
    scored = scores(grids, dict(args.scale), notes)
    pairs = [pair for task, arms in grids.items() for pair in compare({task: arms}, task)]
    across = tell_across(scored) if len(scored) > 1 else {}
    pairs += compare(scored, ALL) if len(scored) > 1 else []
    show_pairs(pairs)
    notes += unfinished(found)
    if any(1 < len(values) < FEW for arms in grids.values() for values in arms.values()):
        notes.append(f"With fewer than {FEW} seeds, bootstrap intervals are too narrow: compare the seeds themselves.")
    if grids:
        caption = [f"{arm}: {flags}" for arm, flags in {r["arm"]: flags_of(r) for r in found.values()}.items()]
        path, panels = args.picture or args.out / "curves.png", {task: (lasts[task], grids[task]) for task in grids}
        notes.append(f"Drawn: {path}" if drawable() else f"Not drawn, without matplotlib: {path}")
        if drawable():
            draw(path, panels, args.metric, caption)
    for note in notes:
        print(note)
    statuses = {"/".join((r["arm"], r["task"], str(r["seed"]))): r["status"] for r in found.values()}
    result = {"bench": "learning", "metric": args.metric, "bins": args.grid, "tasks": tasks, "across": across}
    return emit(result | {"pairs": pairs, "runs": statuses, "notes": notes})


def spent_hours(curves: list[Curve]) -> dict[tuple[str, str, str], float]:
    """Mean hours of a run, by task, arm, and `hours` or `cpu_hours`; what is not known is left out."""
    hours: dict[tuple, list[float]] = {}
    for curve in curves:
        for name in ("hours", "cpu_hours"):
            if curve.last(name) is not None:
                hours.setdefault((curve.task, curve.arm, name), []).append(curve.last(name))
    return {key: float(np.mean(values)) for key, values in hours.items()}


def tell_task(task: str, arms: dict[str, np.ndarray], last: float, hours: dict, args: argparse.Namespace) -> dict:
    """Prints a task's table and returns its numbers."""
    threshold, told, rows = dict(args.threshold).get(task), {}, []
    for arm, values in arms.items():
        frames = [first_frame(values_, last, threshold) for values_ in values] if threshold is not None else []
        median = float(np.median(frames)) if frames else np.inf  # of all seeds: a late majority has none
        told[arm] = own = summary(values) | {name: hours.get((task, arm, name)) for name in ("hours", "cpu_hours")}
        if frames:
            reached = int(np.isfinite(frames).sum())
            own |= {"first_frame": median if np.isfinite(median) else None, "reached": reached}
        at = f"{number(own.get('first_frame'), ',.0f')} ({own['reached']} of {own['seeds']})" if frames else "-"
        spent = f"{number(own['hours'], '.2f')} ({number(own['cpu_hours'], '.2f')})"
        rows.append((arm, *cells(own), at, spent))
    first = "first frame" if threshold is None else f"first frame at {threshold:g}"
    head = ("arm", "seeds", "last: IQM [95 %]", "mean", "area: IQM [95 %]", first, "hours (CPU)")
    table(f"{task}: {TITLES[args.metric]} to frame {last:,.0f}", head, rows)
    return {"last_frame": last, "threshold": threshold, "arms": told}


def summary(values: np.ndarray) -> dict:
    """Of curves [seeds, bins]."""
    last, areas = tail(values), area(values)
    return {
        "seeds": len(values),
        **{"mean": float(last.mean()), "iqm": float(iqm(last)), "interval": interval(last), "last": last.tolist()},
        **{"area": float(iqm(areas)), "area_interval": interval(areas), "areas": areas.tolist()},
    }


def scores(grids: Grid, scales: dict[str, float], notes: list[str]) -> Grid:
    """Returns over the highest that the tasks have; tasks for which that is not known are left out."""
    for task in grids:
        scale = next((value for suite, value in RETURNS.items() if task.startswith(suite)), None)
        if task not in scales and scale:
            scales[task] = scale
        elif task not in scales and len(grids) > 1:
            notes.append(f"Across tasks without {task}: --scale {task}=RETURN tells what a score of 1 is.")
    return {t: {a: v / scales[t] for a, v in arms.items()} for t, arms in grids.items() if t in scales}


def tell_across(scored: Grid) -> dict:
    """Prints and returns the scores over all tasks, of the arms that have them all."""
    told = {}
    for arm in dict.fromkeys(arm for arms in scored.values() for arm in arms):
        if all(arm in arms for arms in scored.values()):
            lasts, areas = ([of(arms[arm]) for arms in scored.values()] for of in (tail, area))
            (last, spread), (under, breadth) = pooled_iqm(lasts), pooled_iqm(areas)
            told[arm] = {"seeds": sum(map(len, lasts)), "mean": float(np.mean([x.mean() for x in lasts])), "iqm": last}
            told[arm] |= {"interval": spread, "area": under, "area_interval": breadth}
    if not told:
        return told
    head = ("arm", "runs", "last: IQM [95 %]", "mean", "area: IQM [95 %]")
    table(f"{ALL} ({', '.join(scored)}): scores", head, [(arm, *cells(own, ".3f")) for arm, own in told.items()])
    return told


def compare(grids: Grid, scope: str) -> list[dict]:
    """Every two arms on the tasks that both have; of several tasks, where they share at least two."""
    told = []
    for a, b in itertools.combinations(dict.fromkeys(arm for arms in grids.values() for arm in arms), 2):
        both = [(arms[a], arms[b]) for arms in grids.values() if a in arms and b in arms]
        if len(both) < min(2, len(grids)):
            continue
        lasts, areas = ([(of(x), of(y)) for x, y in both] for of in (tail, area))
        (last, spread), (under, breadth) = beats(lasts), beats(areas)
        difference = float(np.mean([x.mean() - y.mean() for x, y in areas]))
        own = {"scope": scope, "arms": [a, b], "tasks": len(both), "beats": last, "beats_interval": spread}
        own |= {"beats_area": under, "beats_area_interval": breadth, "area_difference": difference}
        told.append(own | {"p": permutation_p(areas)})
    return told


def show_pairs(pairs: list[dict]) -> None:
    rows = [
        (
            f"{pair['arms'][0]} > {pair['arms'][1]}", pair["scope"],
            f"{pair['beats']:.2f} {bounds(pair['beats_interval'], '.2f')}",
            f"{pair['beats_area']:.2f} {bounds(pair['beats_area_interval'], '.2f')}",
            f"{pair['area_difference']:.3g}", number(pair["p"], ".3g"),
        )
        for pair in pairs
    ]  # fmt: skip
    if rows:
        head = ("arms", "task", "P(last) [95 %]", "P(area) [95 %]", "difference of area", "p (permutation)")
        table("Probability that a run of the one beats one of the other", head, rows)


def cells(own: dict, form: str = ".1f") -> tuple:
    """Columns that every table of arms has."""
    paired = (("iqm", "interval"), ("area", "area_interval"))
    last, under = (f"{own[key]:{form}} {bounds(own[more], form)}" for key, more in paired)
    return own["seeds"], last, f"{own['mean']:{form}}", under


def bounds(spread: tuple[float, float] | None, form: str) -> str:
    return "[-]" if spread is None else f"[{spread[0]:{form}}, {spread[1]:{form}}]"


def number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def flags_of(record: dict) -> str:
    return ("the reference with " if record["reference"] else "") + (shlex.join(record["flags"]) or "defaults")


def unfinished(found: dict[Path, dict]) -> list[str]:
    open_runs = [record["status"] for record in found.values() if record["status"] != "finished"]
    counts = ", ".join(f"{open_runs.count(status)} {status}" for status in dict.fromkeys(open_runs))
    return [f"Not finished: {len(open_runs)} of {len(found)} runs ({counts})."] if open_runs else []


if __name__ == "__main__":
    sys.exit(common.command(main)["status"])
