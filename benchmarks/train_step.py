"""Time, memory and arithmetic of one full update: sample, both losses, backward, optimizer, latents written back.

    python benchmarks/train_step.py                                    # workload V: 64x64x3 image, size12m
    python benchmarks/train_step.py --obs proprio --threads 2          # workload P: 24 numbers, size1m
    python benchmarks/train_step.py --size size200m --compile true
    python benchmarks/train_step.py --phases                           # where the time goes

Any key of the configuration may follow, such as --precision bfloat16 or --batch_length 128.
"""

import argparse
import gc
from collections.abc import Sequence

import common
import torch
from measuring import Phases, count_flop, kernels, matmul_rate, measure, peak_bytes, waiter
from report import amount, emit, gibibytes, seconds, share, table

# Methods of the learner and what their time counts as. A method inside another one's time counts for itself.
PARTS = (
    ("replay.sample", "sample, to device"),
    ("feed.next", "sample, to device"),
    ("agent.draw_noise", "noise"),
    ("agent.world_model.encoder.forward", "encoder"),
    ("agent.world_model.rssm.observe", "observe"),
    ("agent.world_model.decoder.forward", "decoder"),
    ("agent.world_model.reward.forward", "reward, continue"),
    ("agent.world_model.cont.forward", "reward, continue"),
    ("agent.world_model.loss", "model losses"),
    ("agent.world_model.imagine", "imagination"),
    ("agent.behavior.loss", "actor-critic losses"),
    ("agent.optimizer.backward", "backward"),
    ("agent.optimizer.apply", "optimizer"),
    ("agent.behavior.after_step", "optimizer"),
    ("agent.world_model.pack", "write back"),
    ("agent.to_host", "write back"),
    ("_write_latents", "write back"),
)


def main(argv: Sequence[str] | None = None) -> dict:
    parser = common.parser(__doc__)
    parser.add_argument("--phases", action="store_true", help="time each part instead, not compiled")
    parser.add_argument("--profile", action="store_true", help="also print torch's profile of one update")
    args = common.parse(parser, argv)
    return phases(args) if args.phases else update(args)


def update(args: argparse.Namespace) -> dict:
    """Measures whole updates."""
    config = args.config
    learner = common.Learner(args.obs, config)
    facts = head("train_step", args, learner)
    times = measure(learner.update, repeats=args.repeats, warmup=args.warmup, finish=learner.finish)
    peak = peak_bytes(learner.device)
    ran = kernels(learner.update, learner.device)
    if args.profile:
        profile(learner)
    if common.eager(config) != config:
        device, learner = learner.device, None  # one at a time in memory
        gc.collect()  # a captured agent refers to itself
        if device.type == "cuda":
            torch.cuda.empty_cache()
        learner = common.Learner(args.obs, common.eager(config))
    batch = learner.batch()
    counter = count_flop(lambda: learner.agent.train_step(batch))
    if counter.uncounted:
        print(f"Without a formula, so not in the FLOP: {', '.join(counter.uncounted)}")
    rate, best = counter.flop / times.median, matmul_rate(learner.device)
    arithmetic = {"flop": counter.flop, "flop_per_s": rate, "matmul_flop_per_s": best, "share": rate / best}
    result = facts | times.summary() | arithmetic | {"peak_bytes": peak} | ran
    show(result)
    return emit(result)


def head(bench: str, args: argparse.Namespace, learner: common.Learner) -> dict:
    config = learner.config
    shape = {"batch": config.batch_size, "length": config.batch_length, "horizon": config.imag_horizon}
    return common.facts(bench, args, learner.agent) | shape


def title(result: dict) -> str:
    return (
        f"{result['obs']}, {result['size']}, batch {result['batch']} x {result['length']}, imagination "
        f"{result['horizon']}, {result['precision']}, compile {result['compile']}, {result['machine']}"
    )


def show(result: dict) -> None:
    rows = [
        ("update, median", seconds(result["median_s"])),
        ("min to max", f"{seconds(result['min_s'])} to {seconds(result['max_s'])}"),
        ("samples (taken beside busy neighbours)", f"{result['samples']} ({result['noisy']})"),
        ("first update", seconds(result["first_s"])),
        ("parameters", amount(result["params"])),
        ("arithmetic of one update", amount(result["flop"], "FLOP")),
        ("rate", amount(result["flop_per_s"], "FLOP/s")),
        ("a matrix product's rate here", amount(result["matmul_flop_per_s"], "FLOP/s")),
        ("share of it", share(result["share"])),
        ("peak memory", gibibytes(result["peak_bytes"])),
    ]
    if "kernels" in result:
        rows.append(("kernels", f"{result['kernels']:,.0f}, which take {seconds(result['kernel_s'])}"))
    table(title(result), ("one full update", ""), rows)


def phases(args: argparse.Namespace) -> dict:
    """Time of each part. They may add up to more than an update: the device is waited for at both ends of each."""
    learner = common.Learner(args.obs, common.eager(args.config))
    result = head("train_step_phases", args, learner) | {"compile": False}
    for _ in range(1 + args.warmup):
        learner.update()
    learner.finish()
    parts = Phases(waiter(learner.device))
    for path, label in PARTS:
        parts.wrap(learner, path, label)
    for _ in range(args.repeats):
        with parts.part("other"):
            learner.update()
    if parts.missing:
        print(f"Not there, so counted elsewhere: {', '.join(parts.missing)}")
    mean = {label: total / args.repeats for label, total in parts.seconds.most_common()}
    whole = sum(mean.values())
    table(title(result), ("part", "per update", "share"), [(k, seconds(v), share(v / whole)) for k, v in mean.items()])
    return emit(result | {"samples": args.repeats, "mean_s": whole, "phases_s": mean})


def profile(learner: common.Learner) -> None:
    cuda = learner.device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=kinds) as prof:
        learner.update()
        learner.finish()
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    print(prof.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60))


if __name__ == "__main__":
    common.command(main)
