"""Learning curves: read from runs and from CSV files, written to CSV, put on a common grid of frames, and drawn.

Names of what a curve holds: `return` (training episodes), `eval_return`, `updates`, `hours` and `cpu_hours`; a file may
hold others. Points are (frames, value), by frames.
"""

import csv
import dataclasses
import importlib.util
import io
import itertools
import json
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from statistics_of_runs import interval, iqm

from errors import UserError
from files import atomic_write

COLUMNS = ("task", "arm", "seed", "frames", "name", "value")
OURS = {"episode/return": "return", "eval/return": "eval_return", "train/updates": "updates"}
REFERENCES = {"train/opt/updates": "updates"}
TITLES = {"return": "training returns", "eval_return": "evaluation returns"}

Points = list[tuple[int, float]]
Grid = dict[str, dict[str, np.ndarray]]  # task, arm: values [seeds, bins]


@dataclasses.dataclass
class Curve:
    """What one run has logged."""

    task: str
    arm: str
    seed: int
    points: dict[str, Points]

    @property
    def reached(self) -> int:
        """Frames."""
        return max((points[-1][0] for points in self.points.values() if points), default=0)

    def last(self, name: str) -> float | None:
        points = self.points.get(name)
        return points[-1][1] if points else None


# Runs


def read_run(folder: Path, reference: bool = False) -> dict[str, Points]:
    """A logdir's curves. `return` of a line of ours is the mean over the episodes that ended since the line before;
    of the reference's, one training episode.
    """
    if not reference:
        return _read_lines(folder / "metrics.jsonl", OURS)
    episodes = _read_lines(folder / "scores.jsonl", {"episode/score": "return"})
    return episodes | _read_lines(folder / "metrics.jsonl", REFERENCES)


def _read_lines(path: Path, names: Mapping[str, str]) -> dict[str, Points]:
    """Damaged lines are skipped; what was logged before a crash and again after it counts once, as it was later."""
    found: dict[str, Points] = {}
    last = 0
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            step = int(row["step"])
        except (ValueError, KeyError, TypeError):
            continue
        if step < last:
            found = {name: [point for point in points if point[0] < step] for name, points in found.items()}
        last = step
        for key, name in names.items():
            if row.get(key) is not None and math.isfinite(row[key]):
                found.setdefault(name, []).append((step, row[key]))
    return found


# CSV


def read_csv(path: Path, task: str | None = None) -> list[Curve]:
    """The curves of a file with the columns arm, seed, frames, name, value, and task, or else they are of `task`."""
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(line for line in file if not line.startswith("#"))
            rows, columns = list(reader), set(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--curves {path}: {error}; expected a CSV file.") from None
    missing = set(COLUMNS) - columns - {"task"}
    if missing:
        raise UserError(f"--curves {path}: no column {', '.join(sorted(missing))}; expected {', '.join(COLUMNS)}.")
    if "task" not in columns and task is None:
        raise UserError(f"--curves {path} has no column task: name it, as in --curves dmc_finger_spin={path}.")
    if "task" in columns and task is not None:
        raise UserError(f"--curves {task}={path}: the file names its tasks itself: give it as --curves {path}.")
    curves: dict[tuple, Curve] = {}
    for number, row in enumerate(rows, 2):
        try:
            key = (row.get("task", task), row["arm"], int(row["seed"]))
            point = (int(float(row["frames"])), float(row["value"]))
        except (TypeError, ValueError) as error:
            raise UserError(f"--curves {path}, row {number}: {error}; expected numbers.") from None
        if math.isfinite(point[1]):
            curves.setdefault(key, Curve(*key, {})).points.setdefault(row["name"], []).append(point)
    for curve in curves.values():
        for points in curve.points.values():
            points.sort(key=lambda point: point[0])
    return list(curves.values())


def recorded_curves(files: Sequence[str]) -> list[Curve]:
    """Of each FILE, or TASK=FILE."""
    curves = []
    for text in files:
        task, equals, path = text.partition("=")
        named = bool(equals) and not Path(text).exists()
        curves += read_csv(Path(path), task) if named else read_csv(Path(text))
    return curves


def write_csv(path: Path, curves: Iterable[Curve]) -> None:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for curve in curves:
        for name, points in curve.points.items():
            writer.writerows((curve.task, curve.arm, curve.seed, at, name, f"{value:.7g}") for at, value in points)
    with atomic_write(path) as out:
        out.write(file.getvalue().encode())


# A common grid


def on_grid(points: Points, last: float, bins: int) -> np.ndarray:
    """Values [bins] of one curve: frames from 0 to `last` in equal bins, each with the mean of the points in it.

    A bin without any has the value, at its middle, of the line between the points before and after it; ahead of the
    first point and behind the last one, that point's value.
    """
    frames, values = (np.array(column, float) for column in zip(*points, strict=True))
    where, inverse = np.unique(frames, return_inverse=True)
    together = np.bincount(inverse, values) / np.bincount(inverse)  # one value for episodes that end at the same frame
    out = np.interp(middles(last, bins), where, together)
    index = np.searchsorted(edges(last, bins), frames, side="left") - 1  # a bin holds its upper edge
    index[frames == 0] = 0
    inside = index < bins
    counts = np.bincount(index[inside], minlength=bins)
    sums = np.bincount(index[inside], values[inside], minlength=bins)
    return np.where(counts > 0, sums / np.maximum(counts, 1), out)


def common_grid(
    curves: Iterable[Curve], metric: str, bins: int, last: float | None = None
) -> tuple[Grid, dict[str, float], list[str]]:
    """Curves, sorted by task and arm, on the grid of their task; the last frame of each; and what was left out.

    The grid ends at `last`, and leaves out runs that have nothing in its last bin; or at the last frame that all runs
    of the task have reached.
    """
    grids, lasts, notes = {}, {}, []
    for task, group in itertools.groupby(curves, key=lambda curve: curve.task):
        ready, least = [], last * (1 - 1 / bins) if last else 0
        for curve in group:
            there = bool(curve.points.get(metric))
            if there and curve.reached > least:
                ready.append(curve)
            else:
                why = f"only {curve.reached:,} frames" if there else f"no {metric} yet"
                notes.append(f"Left out: {curve.arm} {task} seed {curve.seed}, {why}.")
        if ready:
            end = lasts[task] = last or min(curve.reached for curve in ready)
            grids[task] = {
                arm: np.stack([on_grid(curve.points[metric], end, bins) for curve in some])
                for arm, some in itertools.groupby(ready, key=lambda curve: curve.arm)
            }
    return grids, lasts, notes


def edges(last: float, bins: int) -> np.ndarray:
    return np.linspace(0, last, bins + 1)


def middles(last: float, bins: int) -> np.ndarray:
    return (np.arange(bins) + 0.5) * last / bins


def area(values: np.ndarray) -> np.ndarray:
    """Area under curves [..., bins] over frames, divided by the frames: the mean return along the way."""
    return values.mean(-1)


def tail(values: np.ndarray) -> np.ndarray:
    """Mean of curves [..., bins] over the last tenth of their bins, at least one."""
    return values[..., -max(1, values.shape[-1] // 10) :].mean(-1)


def first_frame(values: np.ndarray, last: float, threshold: float) -> float:
    """End of the first bin at or above the threshold, in frames; infinity if there is none."""
    above = np.flatnonzero(values >= threshold)
    return float(edges(last, len(values))[above[0] + 1]) if len(above) else np.inf


# A picture


def drawable() -> bool:
    """Whether matplotlib is there, which requirements/docs.txt names."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(
    path: Path, tasks: Mapping[str, tuple[float, Mapping[str, np.ndarray]]], metric: str, caption: Sequence[str]
) -> None:
    """One panel per task. `tasks`: {task: (last frame, {arm: values [seeds, bins]})}."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {arm: f"C{index}" for index, arm in enumerate(dict.fromkeys(a for _, own in tasks.values() for a in own))}
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    size = (max(6, 4.5 * columns), 3.8 * rows + 0.16 * len(caption))
    figure, panels = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for panel in panels.flat[len(tasks) :]:
        panel.remove()
    for panel, (task, (last, arms)) in zip(panels.flat, tasks.items(), strict=False):
        for arm, values in arms.items():
            frames = middles(last, values.shape[1])
            seeds = f"{len(values)} seed{'s' if len(values) > 1 else ''}"
            panel.plot(frames, iqm(values), color=colours[arm], linewidth=2, label=f"{arm}: {seeds}")
            if len(values) > 1:
                panel.plot(frames, values.T, color=colours[arm], linewidth=0.5, alpha=0.5)
                panel.fill_between(frames, *interval(values), color=colours[arm], alpha=0.15, linewidth=0)
        panel.set(title=f"{task}: {TITLES.get(metric, metric)}", xlabel="frames", ylabel="return", xlim=(0, last))
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    told = ["Lines: interquartile mean over seeds; bands: its 95 % bootstrap interval; thin: each seed.", *caption]
    lines = [line for text in told for line in textwrap.wrap(text, int(size[0] * 17), subsequent_indent="    ")]
    figure.supxlabel("\n".join(lines), fontsize=7, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
