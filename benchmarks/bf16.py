"""Losses in bfloat16 beside float32: the same weights, batch and noise.

    python benchmarks/bf16.py                              # workload V
    python benchmarks/bf16.py --obs proprio --updates 100

The networks first learn `--updates` updates in float32, fast: fresh heads spread their probability over bins of up to
±5e8, which cancel in the mean, and of what is left after that no precision tells much (`policy` is made of it). A loss
differs by the difference of the two means over the mean size of its entries, so that one that may have either sign has
a scale too. The exit status is 1 if any differs by more than `--tolerance`. Any key of the configuration may follow.
"""

import sys
from collections.abc import Sequence

import common
import torch
from report import emit, share, table
from torch import Tensor

from models import total_loss


def main(argv: Sequence[str] | None = None) -> dict:
    parser = common.parser(__doc__)
    parser.add_argument("--updates", type=int, default=100, help="updates in float32 before the comparison")
    parser.add_argument("--batches", type=int, default=4, help="batches to average over")
    parser.add_argument("--tolerance", type=float, default=0.02)
    args = common.parse(parser, argv, "--opt.lr", "1e-3", "--opt.warmup", "0")
    torch.backends.cudnn.allow_tf32 = False  # float32 that is what it says
    args.config = common.eager(args.config).replace(precision="float32")
    learner = common.Learner(args.obs, args.config)
    for _ in range(args.updates):
        learner.update()
    learner.finish()
    half = common.make_agent(args.obs, args.config.replace(precision="bfloat16"))
    half.world_model.load_state_dict(learner.agent.world_model.state_dict())
    half.behavior.load_state_dict(learner.agent.behavior.state_dict())
    found = [losses(learner, half) for _ in range(args.batches)]
    wide, narrow = ({name: torch.cat([pair[i][name] for pair in found]) for name in found[0][i]} for i in (0, 1))
    errors = {name: difference(wide[name], narrow[name]) for name in wide}
    totals = [float(total_loss(each, learner.agent.loss_scales)) for each in (wide, narrow)]
    errors["total"] = abs(totals[0] - totals[1]) / abs(totals[0])
    means = {name: (float(wide[name].mean()), float(narrow[name].mean())) for name in wide} | {"total": totals}
    rows = [(name, *(f"{mean:.5g}" for mean in means[name]), share(error)) for name, error in errors.items()]
    within = all(error <= args.tolerance for error in errors.values())
    table(f"{args.obs}, {args.size}", ("loss", "float32", "bfloat16", "difference"), rows)
    facts = common.facts("bf16", args, half) | {"precision": "bfloat16", "updates": args.updates}
    return emit(facts | {"differences": errors, "largest": max(errors.values()), "within": within})


@torch.no_grad()
def losses(learner: common.Learner, half) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All losses [B, T] of one batch in both precisions, in float32."""
    batch = learner.batch()
    noise = learner.agent.draw_noise(*batch["reward"].shape)
    both = (agent.losses(batch, noise)[0] for agent in (learner.agent, half))
    return tuple({name: loss.detach().float() for name, loss in each.items()} for each in both)


def difference(wide: Tensor, narrow: Tensor) -> float:
    return float((wide.mean() - narrow.mean()).abs() / wide.abs().mean().clamp(min=1e-8))


if __name__ == "__main__":
    sys.exit(not main()["within"])
