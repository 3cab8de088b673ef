"""Cost of an update against batch, length and horizon: each is changed alone, from half to twice the workload's.

    python benchmarks/scaling.py --obs proprio --threads 2
    python benchmarks/scaling.py --factors 0.25 0.5 1 2 4 --plot scaling.png

A slope of 1 (of log time over log size) is a cost in proportion; under 1, some of it is fixed. `off line` is the
largest distance from a straight line a + b x: next to 0 where the cost grows linearly. In several `--rounds` every size
is measured once in each, so that a machine that changes its pace bends no curve. Any key of the configuration may
follow.
"""

import statistics
from collections.abc import Sequence

import common
import torch
from measuring import Times, deviation, loglog_slope, measure, peak_bytes
from report import emit, seconds, share, table

AXES = {"batch": "batch_size", "length": "batch_length", "horizon": "imag_horizon"}


def main(argv: Sequence[str] | None = None) -> dict:
    parser = common.parser(__doc__, repeats=5)
    parser.add_argument("--factors", type=float, nargs="+", default=[0.5, 1, 2], help="of the workload's own sizes")
    parser.add_argument("--plot", metavar="FILE.png", help="also draw the curves")
    parser.add_argument("--rounds", type=common.positive, default=1, help="times that every size is measured")
    args = common.parse(parser, argv)
    base = {key: args.config[key] for key in AXES.values()}
    axes = {key: sorted({max(2, round(size * factor)) for factor in args.factors}) for key, size in base.items()}
    points: dict[tuple, list[Times]] = {
        tuple((base | {key: value}).items()): [] for key, values in axes.items() for value in values
    }
    for _ in range(args.rounds):
        for sizes, times in points.items():
            times.append(update(args, args.config.replace(**dict(sizes))))
    curves = {}
    for axis, key in AXES.items():
        values, found = axes[key], [points[tuple((base | {key: value}).items())] for value in axes[key]]
        medians = [statistics.median(took for times in rounds for took in times.kept) for rounds in found]
        noisy = sum(len(times.noisy) for rounds in found for times in rounds)
        curves[axis] = {"values": values, "median_s": medians, "noisy": noisy}
        if len(values) > 1:
            curves[axis] |= {"slope": loglog_slope(values, medians), "off_line": deviation(values, medians)}
        show(axis, curves[axis])
    if args.plot:
        plot(curves, args.plot)
    agent = common.make_agent(args.obs, common.eager(args.config))
    facts = common.facts("scaling", args, agent) | base | {"peak_bytes": peak_bytes(agent.device)}
    return emit(facts | {"curves": curves})


def update(args, config: common.Config) -> Times:
    """Times whole updates of this configuration."""
    learner = common.Learner(args.obs, config)
    times = measure(learner.update, repeats=args.repeats, warmup=args.warmup, finish=learner.finish)
    torch.compiler.reset()  # compiled for other sizes, which may not be looked up for these
    return times


def show(axis: str, curve: dict) -> None:
    pairs = list(zip(curve["values"], curve["median_s"], strict=True))
    title = f"{axis}: "
    if "slope" in curve:
        title += f"log-log slope {curve['slope']:.2f}, off line {share(curve['off_line'])}"
    table(title, (axis, "update", "per unit"), [(value, seconds(took), seconds(took / value)) for value, took in pairs])


def plot(curves: dict, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(curves), figsize=(4 * len(curves), 3), sharey=True, layout="constrained")
    for panel, (axis, curve) in zip(panels, curves.items(), strict=True):
        panel.plot(curve["values"], curve["median_s"], "o-")
        panel.set(xlabel=axis, xlim=(0, None), ylim=(0, None))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("seconds per update")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    common.command(main)
