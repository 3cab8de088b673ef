"""Latency of acting for a few environments: `policy` and `latents`, from observations to actions and what is stored.

    python benchmarks/policy.py --envs 4                    # workload V
    python benchmarks/policy.py --obs proprio --threads 2   # workload P

Any key of the configuration may follow.
"""

import itertools
from collections.abc import Callable, Sequence

import common
import numpy as np
from measuring import measure, peak_bytes, waiter
from report import amount, emit, gibibytes, seconds, table

from dreamer import Dreamer


def main(argv: Sequence[str] | None = None) -> dict:
    parser = common.parser(__doc__, warmup=10)
    parser.add_argument("--envs", type=int, default=4, help="environments that are acted for at once")
    args = common.parse(parser, argv)
    agent = common.make_agent(args.obs, args.config)
    times = measure(
        actor(agent, args.obs, args.config, args.envs),
        repeats=args.repeats,
        warmup=args.warmup,
        finish=waiter(agent.device),
    )
    summary = times.summary()
    facts = common.facts("policy", args, agent) | {"envs": args.envs}
    result = facts | summary | {"median_ms": 1e3 * times.median, "peak_bytes": peak_bytes(agent.device)}
    rows = [
        ("actions of all environments, median", seconds(result["median_s"])),
        ("min to max", f"{seconds(result['min_s'])} to {seconds(result['max_s'])}"),
        ("samples (taken beside busy neighbours)", f"{result['samples']} ({result['noisy']})"),
        ("first time", seconds(result["first_s"])),
        ("parameters", amount(result["params"])),
        ("peak memory", gibibytes(result["peak_bytes"])),
    ]
    title = f"{args.obs}, {args.size}, {args.envs} environments, {result['precision']}, {result['machine']}"
    table(title, ("policy and latents", ""), rows)
    return emit(result)


def actor(agent: Dreamer, obs: str, config: common.Config, envs: int) -> Callable[[], object]:
    """A function that acts once, on the next of a few random observations, and carries the state on."""
    rng = np.random.default_rng(config.seed)
    obs_space, _ = common.spaces(obs, config)
    flags = {key: np.zeros(envs, bool) for key in ("is_first", "is_last", "is_terminal")}
    flags["reward"] = np.zeros(envs, np.float32)
    seen = [{key: common.draw(space, rng, envs) for key, space in obs_space.items()} | flags for _ in range(4)]
    upcoming, state = itertools.cycle(seen), agent.initial(envs)

    def act() -> object:
        nonlocal state
        action, state = agent.policy(next(upcoming), state)
        return action, agent.latents(state)

    return act


if __name__ == "__main__":
    main()
