"""What a kind of observation costs beside an image or numbers: updates with and without it, in turn, in one process.

    python benchmarks/kinds.py --device cpu --threads 2 --repeats 6
    python benchmarks/kinds.py --obs proprio --kinds audio text

A round is one update of each. The cost is the median over rounds of its time by that of the update without, less one:
a machine that changes its pace does not change it. Any key of the configuration may follow.
"""

import statistics
from collections.abc import Sequence

import common
from measuring import count_flop, peak_bytes
from report import emit, seconds, share, table


def main(argv: Sequence[str] | None = None) -> dict:
    parser = common.parser(__doc__)
    parser.add_argument(
        "--kinds", nargs="+", choices=common.ALSO, default=list(common.ALSO), help="each is added alone"
    )
    args = common.parse(parser, argv)
    loads = [args.obs, *(f"{args.obs}+{kind}" for kind in args.kinds)]
    learners = {load: common.Learner(load, args.config) for load in loads}
    times = common.in_turn(learners, args.warmup, args.repeats)
    rows, found = [], {}
    plain = times[args.obs]
    for load, took in times.items():
        counted = common.Learner(load, common.eager(args.config))
        extra = statistics.median(own / base for own, base in zip(took, plain, strict=True)) - 1
        flop = count_flop(counted.update).flop
        params = common.parameters(learners[load].agent)
        found[load] = {"median_s": statistics.median(took), "cost": extra, "flop": flop, "params": params}
        rows.append((load, seconds(statistics.median(took)), share(extra), f"{flop / 1e9:.0f} GFLOP", f"{params:,}"))
    agent = learners[args.obs].agent
    table(f"{args.size}, {args.repeats} rounds", ("observed", "update", "cost", "arithmetic", "parameters"), rows)
    facts = common.facts("kinds", args, agent)
    return emit(facts | {"loads": found, "peak_bytes": peak_bytes(agent.device)})


if __name__ == "__main__":
    common.command(main)
