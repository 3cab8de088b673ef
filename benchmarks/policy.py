"""Latency of acting for a few environments: `policy` and `latents`, from observations to actions and what is stored.

    python benchmarks/policy.py --envs 4                    # workload V
    python benchmarks/policy.py --obs proprio --threads 2   # workload P

`--fresh` lays the weights out at every act, as a run does after every update. Any key of the configuration may follow.
"""

import itertools
from collections.abc import Callable, Sequence

import common
import numpy as np
from measuring import count_flop, matmul_rate, measure, peak_bytes, waiter
from report import amount, emit, gibibytes, seconds, share, table

from dreamer import Dreamer


def main(argv: Sequence[str] | None = None) -> dict:
    parser = common.parser(__doc__, warmup=10)
    parser.add_argument("--envs", type=common.positive, default=4, help="environments that are acted for at once")
    parser.add_argument("--fresh", action="store_true", help="weights that changed since the act before")
    args = common.parse(parser, argv)
    agent = common.make_agent(args.obs, args.config)
    times = measure(
        actor(agent, args.obs, args.config, args.envs, args.fresh),
        repeats=args.repeats,
        warmup=args.warmup,
        finish=waiter(agent.device),
    )
    peak = peak_bytes(agent.device)
    plain = common.make_agent(args.obs, common.eager(args.config))
    flop = count_flop(actor(plain, args.obs, args.config, args.envs)).flop
    rate, best = flop / times.median, matmul_rate(agent.device)
    facts = common.facts("policy", args, agent) | {"envs": args.envs, "fresh": args.fresh}
    arithmetic = {"flop": flop, "flop_per_s": rate, "matmul_flop_per_s": best, "share": rate / best}
    result = facts | times.summary() | {"median_ms": 1e3 * times.median} | arithmetic | {"peak_bytes": peak}
    rows = [
        ("actions of all environments, median", seconds(result["median_s"])),
        ("min to max", f"{seconds(result['min_s'])} to {seconds(result['max_s'])}"),
        ("samples (taken beside busy neighbours)", f"{result['samples']} ({result['noisy']})"),
        ("first time", seconds(result["first_s"])),
        ("parameters", amount(result["params"])),
        ("arithmetic", amount(flop, "FLOP")),
        ("share of a matrix product's rate", share(result["share"])),
        ("peak memory", gibibytes(result["peak_bytes"])),
    ]
    title = f"{args.obs}, {args.size}, {args.envs} environments, {result['precision']}, {result['machine']}"
    table(title, ("policy and latents", ""), rows)
    return emit(result)


def actor(agent: Dreamer, obs: str, config: common.Config, envs: int, fresh: bool = False) -> Callable[[], object]:
    """A function that acts once, on the next of a few random observations, and carries the state on.

    fresh: as if the weights had changed since.
    """
    rng = np.random.default_rng(config.seed)
    obs_space, _ = common.spaces(obs, config)
    flags = {key: np.zeros(envs, bool) for key in ("is_first", "is_last", "is_terminal")}
    flags["reward"] = np.zeros(envs, np.float32)
    seen = [{key: common.draw(space, rng, envs) for key, space in obs_space.items()} | flags for _ in range(4)]
    upcoming, state = itertools.cycle(seen), agent.initial(envs)

    def act() -> object:
        nonlocal state
        if fresh:
            agent.weights_changed()
        action, state = agent.policy(next(upcoming), state)
        return action, agent.latents(state)

    return act


if __name__ == "__main__":
    common.command(main)
