"""A real run, end to end: environment steps and updates per second, and what the wall-clock time goes to.

    python benchmarks/training.py --configs cpu --task gym_CartPole-v1
    python benchmarks/training.py --configs dmc_vision --task dmc_walker_walk --frames 4000

The arguments are those of dreamer.py. The run lives in a temporary folder and does not evaluate; it is measured from
the `--warmup`-th update on, for `--frames` frames or `--seconds`.

`busy` is the share of the time that the device works on updates. On CUDA that is the seconds of an update's kernels, by
a profile of a few updates after the run, times the updates per second; `in_updates`, between events around each update,
also has the gaps between its kernels. On a CPU both are the time inside of updates. `median_s` is from one update's end
to the next one's, environments and all.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence

import common
import torch
from measuring import Phases, count_flop, kernels, peak_bytes, waiter
from report import amount, emit, gibibytes, seconds, share, table

import tools
from dreamer import Dreamer, Trainer

PARTS = (
    ("_act", "policy"),
    ("_store", "storing"),
    ("envs.send", "environments"),
    ("envs.receive", "environments"),
    ("_update", "updates"),
    ("_periodic", "logs, checkpoints"),
)
# What would be measured beside the training: evaluations, films and checkpoints.
ALONE = ("--eval_every", "0", "--video_pred_log", "false", "--tensorboard", "false", "--save_every", "1000000000")
ENDLESS = ("--steps", "1000000000")


class Busy:
    """Seconds that the device works on updates, by events around each on the device's own time."""

    def __init__(self, trainer: Trainer):
        self._events: list[tuple] = []
        step = trainer.agent.train_step

        def timed(*args, **kwargs):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            result = step(*args, **kwargs)
            end.record()
            self._events.append((start, end))
            return result

        trainer.agent.train_step = timed

    def clear(self) -> None:
        self._events.clear()

    def seconds(self) -> float:
        return sum(start.elapsed_time(end) for start, end in self._events) / 1e3


class Watch:
    """Looks at a run at every step of its environments: starts when it is warm, and stops it when enough was seen.

    Attributes, once it has stopped (`took` is 0 before):
        took, seen, updates: seconds, frames and updates that were measured.
        seconds: by part of the run.
        in_updates: seconds that the device spent in updates.
        ends: times at which updates were done, or on CUDA queued.
    """

    def __init__(self, trainer: Trainer, warmup: int, frames: int, limit: float):
        self.trainer, self.warmup, self.frames, self.limit = trainer, warmup, frames, limit
        self.parts = Phases()
        for path, label in PARTS:
            self.parts.wrap(trainer, path, label)
        self.busy = Busy(trainer) if trainer.device.type == "cuda" else None
        self.ends: list[float] = []
        update = trainer._update

        def noted() -> None:
            update()
            self.ends.append(time.perf_counter())

        trainer._update = noted
        self.begun: tuple[float, int, int] | None = None
        self.took = self.seen = self.updates = 0
        self._wait = waiter(trainer.device)
        periodic = trainer._periodic

        def look() -> None:
            periodic()
            self._look()

        trainer._periodic = look

    def _look(self) -> None:
        trainer, now = self.trainer, time.perf_counter()
        if self.begun is None:
            if trainer.updates >= self.warmup:
                self._wait()
                self.parts.seconds.clear()
                self.ends.clear()
                if self.busy:
                    self.busy.clear()
                self.begun = (time.perf_counter(), trainer.frames, trainer.updates)
            return
        start, frames, updates = self.begun
        if trainer.shutdown.requested:
            return
        self.seen, self.updates = trainer.frames - frames, trainer.updates - updates
        if self.seen >= self.frames or now - start >= self.limit:
            self._wait()
            self.took = time.perf_counter() - start
            self.seconds = dict(self.parts.seconds)
            self.in_updates = self.busy.seconds() if self.busy else self.seconds.get("updates", 0.0)
            trainer.shutdown.requested = True  # the run saves and ends, as after Ctrl-C


def main(argv: Sequence[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--frames", type=common.positive, default=4000, help="frames to measure")
    parser.add_argument("--seconds", type=float, default=300, help="longest time to measure")
    parser.add_argument("--warmup", type=common.natural, default=20, help="updates before that")
    args, keys = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        config = common.load(*keys, *ALONE, *ENDLESS, "--logdir", folder)
        tools.setup_logging("warning")
        trainer = Trainer(config)
        try:
            watch = Watch(trainer, args.warmup, args.frames, args.seconds)
            trainer.run()
        finally:
            trainer.close()
    if not watch.took:
        raise SystemExit(f"The run ended after {trainer.updates} updates, before {args.frames} frames were measured.")
    return report(watch, config)


def arithmetic(trainer: Trainer) -> dict[str, float]:
    """FLOP of an update of this run, and on CUDA its kernels (see `measuring.kernels`)."""
    batch = trainer.replay.sample(trainer.config.batch_size)
    batch = trainer.agent.to_device({**batch, "context": batch.context})
    ran = kernels(lambda: trainer.agent.train_step(batch), trainer.device)
    plain = Dreamer(trainer.obs_space, trainer.act_space, common.eager(trainer.config), trainer.device)
    return ran | {"flop": count_flop(lambda: plain.train_step(batch)).flop}


def report(watch: Watch, config: common.Config) -> dict:
    agent, device, took = watch.trainer.agent, watch.trainer.device, watch.took
    peak, counted = peak_bytes(device), arithmetic(watch.trainer)
    between = [end - start for start, end in zip(watch.ends, watch.ends[1:], strict=False)] or [took]
    in_updates = watch.in_updates / took
    shares = {label: spent / took for label, spent in sorted(watch.seconds.items(), key=lambda item: -item[1])}
    shares["other"] = 1 - sum(shares.values())
    result = {
        "bench": "training",
        "task": config.task,
        **common.setting(config, device),
        "params": common.parameters(agent),
        "envs": config.envs,
        "train_ratio": config.train_ratio,
        "batch": config.batch_size,
        "length": config.batch_length,
        "frames": watch.seen,
        "updates": watch.updates,
        "seconds": took,
        "frames_per_s": watch.seen / took,
        "agent_steps_per_s": watch.seen / config.action_repeat / took,
        "updates_per_s": watch.updates / took,
        "median_s": statistics.median(between),
        "min_s": min(between),
        "busy": counted["kernel_s"] * watch.updates / took if "kernel_s" in counted else in_updates,
        "in_updates": in_updates,
        **counted,
        "flop_per_s": counted["flop"] * watch.updates / took,
        "shares": shares,
        "peak_bytes": peak,
    }
    rows = [
        ("measured", f"{watch.seen:,} frames, {watch.updates:,} updates in {seconds(took)}"),
        ("frames per second", f"{result['frames_per_s']:.1f}"),
        ("agent steps per second", f"{result['agent_steps_per_s']:.1f}"),
        ("updates per second", f"{result['updates_per_s']:.2f}"),
        ("arithmetic of updates", amount(result["flop_per_s"], "FLOP/s")),
        ("device busy with updates", share(result["busy"])),
        ("gaps between their kernels included", share(result["in_updates"])),
        *((f"time in: {label}", share(spent)) for label, spent in shares.items()),
        ("peak memory", gibibytes(result["peak_bytes"])),
    ]
    title = f"{config.task}, {config.envs} environments, train ratio {config.train_ratio:g}, {result['machine']}"
    table(title, ("training", ""), rows)
    return emit(result)


if __name__ == "__main__":
    common.command(main)
