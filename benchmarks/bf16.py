"""Losses and gradients in half precision beside float32: the same weights, batches and noise.

    python benchmarks/bf16.py                              # workload V
    python benchmarks/bf16.py --obs proprio --updates 100
    python benchmarks/bf16.py --precision float16          # with its scaled loss

The networks first learn `--updates` updates in float32, and fast: fresh heads spread their probability over bins of up
to ±5e8, which cancel in the mean, and little of what is left is exact in any precision.

A loss differs by the difference of the two means over the mean size of its entries. The exit status is 1 if one differs
by more than `--tolerance`, or their scaled sum does. Of `policy` alone this is told and not judged: it is a sum of
advantages, small differences of large numbers, that averages to about zero, so that only its gradient has a meaning.
`actor` says how well that agrees: the cosine between the two precisions' gradients.
"""

import sys
from collections.abc import Sequence

import common
import torch
import torch.nn.functional as F
from report import emit, share, table
from torch import Tensor

from dreamer import Dreamer
from models import total_loss

TOLD = ("policy",)  # and not judged


def main(argv: Sequence[str] | None = None) -> dict:
    parser = common.parser(__doc__)
    parser.add_argument("--updates", type=common.natural, default=100, help="updates in float32 before the comparison")
    parser.add_argument("--batches", type=common.positive, default=4, help="batches to average over")
    parser.add_argument("--tolerance", type=float, default=0.02, help="of the losses")
    args = common.parse(parser, argv, "--opt.lr", "1e-3", "--opt.warmup", "0")
    torch.backends.cudnn.allow_tf32 = False  # float32 that is what it says
    args.precision = args.config.precision if args.config.precision == "float16" else "bfloat16"
    args.config = common.eager(args.config).replace(precision="float32")
    learner = common.Learner(args.obs, args.config)
    for _ in range(args.updates):
        learner.update()
    learner.finish()
    narrow = common.make_agent(args.obs, args.config.replace(precision=args.precision))
    narrow.world_model.load_state_dict(learner.agent.world_model.state_dict())
    narrow.behavior.load_state_dict(learner.agent.behavior.state_dict())
    found: tuple[list, list] = ([], [])
    for _ in range(args.batches):
        batch = learner.batch()
        noise = learner.agent.draw_noise(*batch["reward"].shape)
        for agent, results in zip((learner.agent, narrow), found, strict=True):
            results.append(backward(agent, batch, noise))
    losses, gradients = zip(*map(together, found), strict=True)
    return report(args, narrow, losses, gradients)


def backward(agent: Dreamer, batch: dict, noise: dict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All losses, [B, T], and the gradient of each part of the agent.

    The loss scale of float16 is halved until no gradient overflows, as it is in training.
    """
    optimizer = agent.optimizer
    while True:
        losses, _, _ = agent.losses(batch, noise)
        optimizer.backward(total_loss(losses, agent.loss_scales))
        gradients = {name: group.grad / optimizer.scale for name, group in optimizer.groups.items()}
        if not optimizer.scaled or all(grad.isfinite().all() for grad in gradients.values()):
            break
        optimizer.scale.mul_(0.5)
    return {name: loss.detach().float() for name, loss in losses.items()}, gradients


def together(results: list) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses of all batches, joined, and the sum of their gradients."""
    losses, gradients = zip(*results, strict=True)
    joined = {name: torch.cat([each[name] for each in losses]) for name in losses[0]}
    return joined, {name: sum(each[name] for each in gradients) for name in gradients[0]}


def report(args, agent: Dreamer, losses: Sequence[dict], gradients: Sequence[dict]) -> dict:
    means = {name: [float(each[name].mean()) for each in losses] for name in losses[0]}
    sizes = {name: float(losses[0][name].abs().mean()) for name in means}
    means["total"] = [float(total_loss(each, agent.loss_scales)) for each in losses]
    sizes["total"] = abs(means["total"][0])
    errors = {name: abs(wide - narrow) / max(sizes[name], 1e-8) for name, (wide, narrow) in means.items()}
    cosines = {name: float(F.cosine_similarity(*(each[name] for each in gradients), dim=0)) for name in gradients[0]}
    largest = max(error for name, error in errors.items() if name not in TOLD)
    rows = [(name, *(f"{mean:.5g}" for mean in means[name]), share(error)) for name, error in errors.items()]
    title = f"{args.obs}, {args.size}, after {args.updates} updates"
    table(title, ("loss", "float32", args.precision, "difference"), rows)
    table("gradients", ("part", "cosine"), [(name, f"{value:.5f}") for name, value in cosines.items()])
    result = common.facts("bf16", args, agent) | {"precision": args.precision, "updates": args.updates}
    result |= {"differences": errors, "largest": largest, "gradient_cosines": cosines}
    return emit(result | {"within": largest <= args.tolerance})


if __name__ == "__main__":
    sys.exit(not common.command(main)["within"])
