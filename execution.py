"""How the agent's steps are run: as they are written, compiled, or captured as CUDA graphs. The one place that decides.

The agent's steps are functions of tensors of static shapes, with every random number as an input, so all three give the
same numbers; model code does not know which it is. What each is worth is measured in docs/performance.md.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from errors import UserError


def prepare(agent, compile: bool = False, graph: bool = False) -> None:
    """Replaces the agent's parts by compiled ones, its steps by captured ones.

    Raises UserError for a graph without CUDA.
    """
    if compile:
        world_model, behavior = agent.world_model, agent.behavior
        # Each alone: the loops over time stay loops, as unrolled they would take minutes to compile.
        # A compiled loop over few classes is slow on a CPU, so there latents are drawn outside.
        imagined = "_expect" if agent.device.type == "cpu" else "img_step"
        parts = [(world_model.rssm, "_obs_step"), (world_model.rssm, imagined), (behavior, "_act_and_score")]
        for owner, name in [*parts, (world_model, "score"), (behavior, "learn"), (agent, "_act")]:
            setattr(owner, name, torch.compile(getattr(owner, name), dynamic=False))
    if graph:
        if agent.device.type != "cuda":
            raise UserError(f"graph: true captures CUDA graphs, and the device is {agent.device}: use --graph false")
        agent._update, agent._act = Captured(agent._update), Captured(agent._act)


class Captured:
    """A function of (nested dicts of) tensors, run as a CUDA graph: one launch instead of thousands.

    For every signature (structure, shapes, types) the first calls run as written, on a side stream, so that kernels are
    compiled and workspaces exist; then the function is captured, once. From then on a call copies its inputs over the
    captured ones and replays. The outputs are the same tensors every time: what is to be kept is copied, in this
    stream, before the next call. The function must not read the device and must not draw random numbers.
    """

    def __init__(self, function: Callable, warmup: int = 3):
        self.function, self.warmup = function, warmup
        self.calls: Counter = Counter()
        self.captured: dict[tuple, tuple] = {}

    def __call__(self, *inputs: Any) -> Any:
        found = list(leaves(inputs))
        signature = tuple(
            (path, leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else (path, leaf) for path, leaf in found
        )
        if signature not in self.captured:
            self.calls[signature] += 1
            if self.calls[signature] <= self.warmup:
                return self.warm_up(inputs)
            self.captured[signature] = self.capture(inputs)
        replay, static, outputs = self.captured[signature]
        torch._foreach_copy_(static, [leaf for _, leaf in found if isinstance(leaf, Tensor)])
        replay()
        return outputs

    def warm_up(self, inputs: tuple) -> Any:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            outputs = self.function(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        return outputs

    def capture(self, inputs: tuple) -> tuple[Callable[[], None], list[Tensor], Any]:
        """How to replay, the tensors that it reads, the tensors that it writes. Capturing itself computes nothing."""
        static = mapped(inputs, torch.clone)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self.function(*static)
        return graph.replay, [leaf for _, leaf in leaves(static) if isinstance(leaf, Tensor)], outputs


def leaves(tree: Any, path: tuple = ()):
    """(path, leaf) of nested dicts, lists and tuples, in order."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, (*path, key))
    elif isinstance(tree, (list, tuple)):
        for index, value in enumerate(tree):
            yield from leaves(value, (*path, index))
    else:
        yield path, tree


def mapped(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with `function` applied to its tensors."""
    if isinstance(tree, dict):
        return {key: mapped(value, function) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(mapped(value, function) for value in tree)
    return function(tree) if isinstance(tree, Tensor) else tree
