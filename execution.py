"""How the agent's steps are run: as they are written, compiled, or captured as CUDA graphs. The one place that decides.

The agent's steps are functions of tensors of static shapes, with every random number as an input, so all three give the
same numbers; model code does not know which it is. What each is worth is measured in docs/performance.md.
"""

import functools
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errors import UserError


def prepare(agent, compile: bool = False, graph: bool = False) -> None:
    """Replaces the agent's parts by compiled ones, its steps by captured ones.

    Raises UserError for a graph without CUDA.
    """
    if compile:
        world_model = agent.world_model
        # Each alone: the loops over time stay loops, as unrolled they would take minutes to compile.
        imagined = "img_step"
        if agent.device.type == "cpu":
            imagined = "_expect"  # a compiled loop over few classes is slow there: latents are drawn outside
            world_model.rssm.stride = 4  # calls cost more than the longer compilation
        parts = [(world_model.rssm, "_obs_steps"), (world_model.rssm, imagined), (world_model, "score")]
        parts += [(agent, "_act")] + ([(agent, "_act_exploring")] if agent.explorer else [])
        for behavior in agent.behaviors.values():  # of one class or another, alike in this
            parts += [(behavior, "_act_and_score"), (behavior, "learn")]
            parts += [(reward, "loss") for reward in behavior.intrinsic.values()]
        for owner, name in parts:
            setattr(owner, name, torch.compile(getattr(owner, name), dynamic=False))
    if graph:
        if agent.device.type != "cuda":
            raise UserError(f"graph: true captures CUDA graphs, and the device is {agent.device}: use --graph false")
        agent._lay_out = lambda: None  # inside of the graph, next to free, instead of copied to it at every act
        # What acting returns is carried on by its caller, while others act too; an update's results are read at once.
        agent._update, agent._act = Captured(agent._update), Captured(agent._act, copies=True)
        agent._act_exploring = Captured(agent._act_exploring, copies=True)


class Captured:
    """A function of (nested dicts of) tensors, run as a CUDA graph: one launch instead of thousands.

    For every signature (structure, shapes, types) there is one set of input tensors, which each call writes over. The
    first calls then run as written, on a side stream, so that kernels are compiled and workspaces exist; after them the
    function is captured, once, and every later call replays. The function must not read the device and must not draw
    random numbers.

    Args:
        copies: return copies of the outputs; otherwise they are the same tensors every time, and what is to be kept is
            copied, in this stream, before the next call.
    """

    def __init__(self, function: Callable, warmup: int = 3, copies: bool = False):
        self.function, self.warmup, self.copies = function, warmup, copies
        self.signatures: dict[tuple, Signature] = {}

    def __call__(self, *inputs: Any) -> Any:
        found = list(leaves(inputs))
        signature = tuple((path, x.shape, x.dtype) if isinstance(x, Tensor) else (path, x) for path, x in found)
        if signature not in self.signatures:
            self.signatures[signature] = Signature(mapped(inputs, torch.clone))
        state = self.signatures[signature]
        static = [leaf for _, leaf in leaves(state.inputs) if isinstance(leaf, Tensor)]
        torch._foreach_copy_(static, [leaf for _, leaf in found if isinstance(leaf, Tensor)])
        if state.calls < self.warmup:
            state.calls += 1
            return self.warm_up(state.inputs)
        if state.replay is None:
            state.replay, state.outputs = self.capture(state.inputs)
        state.replay()
        return mapped(state.outputs, torch.clone) if self.copies else state.outputs

    @functools.cached_property
    def stream(self):
        """One for all warm-ups and captures of this function, as libraries keep memory for every stream they meet."""
        return torch.cuda.Stream()

    def warm_up(self, inputs: tuple) -> Any:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            outputs = self.function(*inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return outputs

    def capture(self, inputs: tuple) -> tuple[Callable[[], None], Any]:
        """How to replay, and what that writes over. Capturing itself computes nothing."""
        gc.collect()  # a graph that is freed in the middle of a capture would spoil it
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            outputs = self.function(*inputs)
        return graph.replay, outputs


@dataclass
class Signature:
    """One way that a captured function is called."""

    inputs: tuple
    calls: int = 0
    replay: Callable[[], None] | None = None
    outputs: Any = None


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
