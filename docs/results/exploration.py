"""Several behaviours in one small world: a table of a metric, by default a grid's coverage, and curves as a PNG.

    python docs/results/exploration.py --out docs/results/exploration.png docs/results/runs/exploration_*.jsonl

Each file is one seed, named `<world>_<behaviour>_seed<number>.jsonl`, or a logdir `<behaviour>-<number>`.
"""

import argparse
import re
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from plot import read_run, save  # noqa: E402


def behaviour(path: Path) -> str:
    """The name of what a run explores by."""
    return re.sub(r"^(exploration|pinpad)_|(_seed|-)\d+$", "", path.stem)


def first_reward(path: Path) -> float | None:
    """The step of the first reward, or of the line that tells of it; None if there was none."""
    try:
        return read_run(path, "episode/first_reward")[1][-1]
    except SystemExit:
        rewarded = (step for step, value in zip(*read_run(path, "episode/return"), strict=True) if value)
        return next(rewarded, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--metric", default="episode/coverage")
    parser.add_argument("--label", default="share of cells visited")
    parser.add_argument("--at", nargs="+", type=int, default=[500, 1000, 1500, 2000], help="the table's columns")
    parser.add_argument("--out", type=Path, default=Path("exploration.png"))
    args = parser.parse_args()
    groups: dict[str, list[Path]] = {}
    for path in sorted(args.runs):
        groups.setdefault(behaviour(path), []).append(path)
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    metric = args.metric.split("/")[-1]
    print(f"| behaviour | seeds | {' | '.join(f'{metric} at {at:,}' for at in args.at)} | first reward |")
    print("|---" * (len(args.at) + 3) + "|")
    for name, paths in groups.items():
        curves = [dict(zip(*read_run(path, args.metric), strict=True)) for path in paths]
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        mean = [statistics.mean(curve[step] for curve in curves) for step in steps]
        (line,) = axes.plot(steps, mean, label=name)
        low, high = ([pick(curve[step] for curve in curves) for step in steps] for pick in (min, max))
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2)
        cells = []
        for at in args.at:
            found = [curve[at] for curve in curves if at in curve]
            each = f" ({', '.join(f'{x:.2f}' for x in found)})" if len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.2f}{each}" if found else "-")
        firsts = [first_reward(path) for path in paths]
        rewards = ", ".join("never" if first is None else f"{first:,.0f}" for first in firsts)
        print(f"| {name} | {len(paths)} | {' | '.join(cells)} | {rewards} |")
    axes.set(xlabel="environment steps", ylabel=args.label)
    axes.set_ylim(0, 1 if args.metric == "episode/coverage" else None)
    save(figure, axes, args.out)


if __name__ == "__main__":
    main()
