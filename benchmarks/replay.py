"""Sampling time of the replay against the number of stored steps, speed of adding, and memory per step.

    python benchmarks/replay.py                                # vectors, size1m's latents, 1e4 to 1e6 steps
    python benchmarks/replay.py --obs vision --stored 1e4 1e5  # 64x64x3 images, size12m's latents

If sampling does not depend on what is stored, its column stays the same from the first row to the last. Sizes that
would not fit in memory are left out and named. The line of JSON tells the times of the largest, and of all as `points`.
Any key of the configuration may follow.
"""

import time
from collections.abc import Sequence

import common
import numpy as np
import torch
from measuring import available_bytes, loglog_slope, measure, peak_bytes, resident_bytes
from report import amount, emit, gibibytes, seconds, table

from replay import Replay

SPARE = 0.8  # of the memory that is available: more is not taken
POOL = 64  # random steps that are added again and again, so that drawing them does not count as adding


def main(argv: Sequence[str] | None = None) -> dict:
    parser = common.parser(__doc__, repeats=20)
    parser.add_argument("--stored", type=float, nargs="+", default=[1e4, 1e5, 1e6], help="steps stored")
    parser.set_defaults(obs="proprio")
    args = common.parse(parser, argv)
    config = args.config
    least = config.envs * (config.batch_length + 1)
    if min(args.stored) < least:
        parser.error(f"--stored {min(args.stored):g}: a window in each of {config.envs} streams takes {least} steps")
    obs_space, act_space = common.spaces(args.obs, config)

    def make(capacity: int) -> Replay:
        return Replay(
            None,
            obs_space,
            act_space.shape[0],
            latent={"deter": config.dyn.deter, "stoch": config.dyn.stoch, "classes": config.dyn.discrete},
            capacity=2 * capacity,
            length=config.batch_length,
            streams=config.envs,
            seed=config.seed,
            online=False,  # all windows are drawn
        )

    replay = make(least)
    fits, rest = affordable(replay, sorted(map(int, args.stored)))
    replay = make(max([least, *fits]))
    for stored in rest:
        print(f"Left out: {stored:,} steps would take {gibibytes(replay.estimate_bytes(stored))}")
    pool = steps(replay, obs_space, np.random.default_rng(config.seed))
    points = []
    for stored in fits:
        before, resident, start = len(replay), resident_bytes(), time.perf_counter()
        add(replay, pool, stored)
        took, grown, added = time.perf_counter() - start, resident_bytes() - resident, stored - before
        batch = replay.empty(config.batch_size)
        times = measure(lambda out=batch: replay.sample(config.batch_size, out), repeats=args.repeats)
        growth = {"add_s": took / added, "resident_bytes_per_step": grown / added}
        points.append({"stored": stored, **times.summary(), **growth})
    estimate, cpu = replay.bytes_per_step, torch.device("cpu")
    facts = {"bench": "replay", "size": args.size, "obs": args.obs} | common.setting(config, cpu)
    facts |= {"batch": config.batch_size, "length": config.batch_length, "streams": config.envs, "left_out": rest}
    facts |= {"bytes_per_step": estimate, "peak_bytes": peak_bytes(cpu), "points": points}
    facts |= points[-1] if points else {}
    if len(points) > 1:
        facts["slope"] = loglog_slope([p["stored"] for p in points], [p["median_s"] for p in points])
    title = f"batches of {config.batch_size} x {config.batch_length}, {args.obs}, latents of {args.size}"
    head = ("stored steps", "sampling", "min to max", "adding a step", "added per s", "RSS per step", "estimated")
    table(title, head, [row(point, estimate) for point in points])
    if "slope" in facts:
        print(f"Sampling time grows with (stored steps) ^ {facts['slope']:.2f}; 0 is: not at all.")
    return emit(facts)


def affordable(replay: Replay, wanted: list[int]) -> tuple[list[int], list[int]]:
    """Which sizes fit in memory, and which do not."""
    room = SPARE * available_bytes()
    fits = [stored for stored in wanted if replay.estimate_bytes(stored) <= room]
    return fits, wanted[len(fits) :]


def steps(replay: Replay, obs_space: dict, rng: np.random.Generator) -> list[tuple[dict, tuple]]:
    """Random steps of all environments, with their latents."""
    pool, count = [], replay.streams
    for _ in range(POOL):
        step = {key: common.draw(space, rng, count) for key, space in obs_space.items()}
        step |= {"reward": np.full(count, 0.5, np.float32), "is_terminal": np.zeros(count, bool)}
        step |= {"action": np.zeros((count, replay.action_size), np.float32)}
        deter = rng.uniform(-1, 1, (count, replay.latent["deter"])).astype(np.float16)
        pool.append((step, (deter, np.zeros((count, replay.latent["stoch"]), np.uint8))))
    return pool


def add(replay: Replay, pool: list[tuple[dict, tuple]], until: int) -> None:
    """Adds steps to all streams at once until there are so many, or up to one per stream more."""
    every = np.ones(replay.streams, bool)
    for turn in range(len(replay) // replay.streams, -(-until // replay.streams)):
        step, latents = pool[turn % len(pool)]
        phase = turn % common.EPISODE
        flags = {"is_first": every & (phase == 0), "is_last": every & (phase == common.EPISODE - 1)}
        replay.add_all(step | flags, latents)


def row(point: dict, estimate: int) -> tuple:
    return (
        f"{point['stored']:,}",
        seconds(point["median_s"]),
        f"{seconds(point['min_s'])} to {seconds(point['max_s'])}",
        seconds(point["add_s"]),
        amount(1 / point["add_s"]),
        f"{point['resident_bytes_per_step']:,.0f} B",
        f"{estimate:,} B",
    )


if __name__ == "__main__":
    common.command(main)
