"""Draw learning curves of runs beside published ones: a PNG.

    python docs/results/plot.py --suite dmc_proprio --task dmc_cartpole_balance --out curve.png logdir/a logdir/b

Each LOGDIR is one seed; its `metrics.jsonl` is read, and the settings in its `config.yaml` stand below the curves.
Without a --suite only the runs are drawn. Published curves show returns of training episodes: `episode/return`, the
default of --metric. The legend says which agent made them: that of 2023 (the preprint) or that of 2024 (the Nature
paper).
"""

import argparse
import csv
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from config import Config  # noqa: E402

PAPER = Path(__file__).with_name("paper.csv")
RETURNS = {"episode/return": "training return", "eval/return": "evaluation return"}


def read_run(logdir: Path, metric: str) -> tuple[list[int], list[float]]:
    """Frames and values of a metric, from a logdir or directly from a `.jsonl` file."""
    path = logdir if logdir.suffix == ".jsonl" else logdir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    points = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
    if not points:
        raise SystemExit(f"{path} has no {metric}; it has: {', '.join(sorted({key for row in rows for key in row}))}")
    return tuple(zip(*points, strict=True))


def settings(logdir: Path) -> str:
    """What a run was trained with, in a line; empty without its `config.yaml`."""
    if not (logdir / "config.yaml").exists():
        return ""
    config = Config.read(logdir / "config.yaml")
    network = f"deter {config.dyn.deter}, {config.actor.units} units"
    updates = f"ratio {config.train_ratio:g}, windows {config.batch_size} x {config.batch_length}"
    return f"{network}, {updates}, action repeat {config.action_repeat}, {config.envs} environments, seed {config.seed}"


def read_paper(suite: str, task: str) -> list[dict]:
    """Rows of a published curve: `agent` (2023 or 2024), `env_steps` (frames), `mean`, `std`, `seeds`."""
    with PAPER.open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    found = [row for row in rows if (row["suite"], row["task"]) == (suite, task)]
    if not found:
        tasks = sorted({row["task"] for row in rows if row["suite"] == suite})
        raise SystemExit(f"No curve of {task} in {suite} is published. {'Tasks: ' + ', '.join(tasks) if tasks else ''}")
    return [row | {key: float(row[key]) for key in ("env_steps", "mean", "std")} for row in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logdirs", nargs="+", type=Path, metavar="LOGDIR")
    parser.add_argument("--suite", choices=["dmc_proprio", "dmc_vision", "atari100k"])
    parser.add_argument("--task", default="")
    parser.add_argument("--metric", nargs="+", default=["episode/return"])
    parser.add_argument("--out", type=Path, default=Path("curve.png"))
    args = parser.parse_args()
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    last = 0
    for logdir in args.logdirs:
        for metric in args.metric:
            frames, values = read_run(logdir, metric)
            last = max(last, frames[-1])
            axes.plot(frames, values, marker=".", markersize=4, label=f"{logdir.stem}: {RETURNS.get(metric, metric)}")
    if args.suite:
        rows = [row for row in read_paper(args.suite, args.task) if row["env_steps"] <= 1.25 * last + 10_000]
        frames, mean, std = ([row[key] for row in rows] for key in ("env_steps", "mean", "std"))
        low, high = ([m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1))
        name = f"published ({rows[0]['agent']}, {rows[0]['seeds']} seeds): training return"
        axes.plot(frames, mean, color="black", label=name)
        axes.fill_between(frames, low, high, color="black", alpha=0.15, label="± one standard deviation")
    axes.set(
        xlabel="environment steps (frames)",
        ylabel="return" if RETURNS.keys() >= {*args.metric} else ", ".join(args.metric),
        title=args.task,
    )
    captions = {logdir.stem: settings(logdir) for logdir in args.logdirs}
    figure.supxlabel("\n".join(f"{name}: {own}" for name, own in captions.items() if own), fontsize=7)
    save(figure, axes, args.out)


def save(figure: plt.Figure, axes: plt.Axes, out: Path) -> None:
    """Finishes curves over steps from 0 on, and tells where they are."""
    axes.set_xlim(0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(out, dpi=150)
    print(out)


if __name__ == "__main__":
    main()
