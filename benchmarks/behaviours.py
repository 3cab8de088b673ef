"""What a behaviour costs beside the flat actor-critic (greedy): updates of each, in turn, in one process.

    python benchmarks/behaviours.py --device cpu --threads 2 --repeats 6
    python benchmarks/behaviours.py --obs proprio --behaviours plan2explore hierarchical

A round is one update of each. The cost is the median over rounds of its time by that of greedy: a machine that changes
its pace does not change it. A hierarchy imagines 16 steps, a multiple of its 8, where the others imagine 15. Any key of
the configuration may follow.
"""

import statistics
from collections.abc import Sequence

import common
from measuring import count_flop
from report import emit, seconds, table

HIERARCHICAL = "--behavior hierarchical --imag_horizon 16"
FLAGS = {
    "greedy": "",
    "plan2explore": "--expl_behavior plan2explore",
    "icm": "--expl_behavior icm",
    "rnd": "--expl_behavior rnd",
    "empowerment": "--expl_behavior empowerment",
    "diayn": "--expl_behavior diayn",
    "icm stream": "--expl_streams icm:0.1",
    "ppo": "--actor_objective ppo",
    "hierarchical": f"{HIERARCHICAL} --actor_objective ppo",
    "hierarchical, reinforce": f"{HIERARCHICAL} --actor_objective reinforce",
    "hypergradient": "--metagrad hypergradient",
    "one_step": "--metagrad one_step",
}


def main(argv: Sequence[str] | None = None) -> dict:
    parser = common.parser(__doc__)
    parser.add_argument("--behaviours", nargs="+", choices=FLAGS, default=list(FLAGS), help="besides greedy")
    names = list(dict.fromkeys(["greedy", *common.parse(parser, argv).behaviours]))
    settings = {name: common.parse(parser, argv, *FLAGS[name].split()) for name in names}
    args = settings["greedy"]
    learners = {name: common.Learner(args.obs, own.config) for name, own in settings.items()}
    times = common.in_turn(learners, args.warmup, args.repeats)
    rows, found = [], {}
    for name, took in times.items():
        ratio = statistics.median(own / base for own, base in zip(took, times["greedy"], strict=True))
        flop = count_flop(common.Learner(args.obs, common.eager(settings[name].config)).update).flop
        params = common.parameters(learners[name].agent)
        found[name] = {"median_s": statistics.median(took), "ratio": ratio, "flop": flop, "params": params}
        rows.append((name, seconds(statistics.median(took)), f"{ratio:.2f}", f"{flop / 1e9:.0f} GFLOP", f"{params:,}"))
    agent = learners["greedy"].agent
    head = ("behaviour", "update", "by greedy's", "arithmetic", "parameters")
    table(f"{args.obs}, {args.size}, {args.repeats} rounds", head, rows)
    return emit(common.facts("behaviours", args, agent) | {"of": found})


if __name__ == "__main__":
    common.command(main)
