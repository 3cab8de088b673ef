"""One optimizer for the whole agent: LaProp with adaptive gradient clipping, in flat buffers.

All parameters of a part (world, actor, critic, intrinsic) lie side by side in one buffer, and so do their gradients and
moments: clipping, moments, the update and a future all-reduce are a few operations over whole parts instead of a few
per tensor.

Sources: LaProp (Ziyin et al. 2020, arXiv 2002.04839), AGC (Brock et al. 2021, arXiv 2102.06171), as combined in the
paper; learning rates that adapt themselves (Baydin et al. 2018, arXiv 1703.04782), in a form free of the loss's scale.
"""

import contextlib
import math
from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

Named = Iterable[tuple[str, nn.Parameter]]


def _wide(tensor: Tensor) -> torch.dtype:
    """Of counts of updates: double precision where the device has it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


class Group:
    """The parameters of one part of the agent, laid into one flat buffer, with what the optimizer keeps about them.

    Builds views: `parameter.data` and `parameter.grad` become slices of `data` and `grad`, so modules must be on their
    device before, and are not moved after.
    """

    def __init__(self, named: Named, lr: float, adapts: bool = False):
        self.names, self.params = zip(*named, strict=True)
        first = self.params[0]
        sizes = [p.numel() for p in self.params]
        self.data = torch.cat([p.data.reshape(-1) for p in self.params])
        self.grad = torch.zeros_like(self.data)
        self.second = torch.zeros_like(self.data)
        self.first = torch.zeros_like(self.data)
        self.lr = torch.tensor(lr, dtype=torch.float32, device=first.device)
        self.log_gain = torch.zeros((), device=first.device)  # what the rate has adapted by: ln of a factor
        self.last = torch.zeros_like(self.data) if adapts else None  # the last movement
        self.traces = None  # see `follow`
        self.extra = torch.zeros((), device=first.device)  # updates of this group alone, beyond those of all
        for p, data, grad in zip(self.params, self.data.split(sizes), self.grad.split(sizes), strict=True):
            p.data, p.grad = data.view(p.shape), grad.view(p.shape)

    def follow(self, count: int) -> None:
        """Keeps the last movement, and `count` rows of `traces`: changes of the gradient, which an update turns into
        the changes of its movement that they bring, with what gradients are multiplied by taken for constant.
        """
        self.last, self.traces = torch.zeros_like(self.data), self.data.new_zeros(count, len(self.data))

    @property
    def rate(self) -> Float[Tensor, ""]:
        """The learning rate as it has adapted by now, without warmup and decay."""
        return self.lr * self.log_gain.exp()

    def split(self, flat: Tensor) -> list[Tensor]:
        """Views of a flat buffer of this group, one per parameter and in its shape."""
        sizes = [p.numel() for p in self.params]
        return [v.view(p.shape) for v, p in zip(flat.split(sizes), self.params, strict=True)]


class Optimizer:
    """`step(loss)` does backward, clipping, moments and the update of every group.

    A loss or gradient that is not finite masks the whole update on the device (parameters, moments and the step counter
    stay as they are); `bad` counts such updates in a row and `bad_total` all of them, to be read when metrics are.

    Args:
        groups: name -> (named parameters, learning rate); empty groups are left out.
        name: laprop (second moment first, then momentum) or adam.
        agc: clip each tensor's gradient to `agc * max(pmin, ‖p‖)`; 0 turns it off.
        clip: clip each group's whole gradient to this norm; 0 turns it off.
        warmup: updates over which the rate rises linearly; the first update has rate 0.
        decay: the rate is divided by 1 + updates / decay, so that it is halved after so many; 0: it stays.
        hyper: κ of hypergradient rates, 0 for fixed ones: after the warmup each group's rate α moves by
            ln α += κ cos(g_t, u_{t-1}), where u is its last movement: up while the gradient agrees with it. Once per
            update of all groups: further steps on the same data (see `step`) would agree with each other, and are
            part of the movement.
        hyper_limit: a rate stays within this factor of where it started, up and down.
        scaled: multiply the loss before the backward pass, so that gradients do not vanish in half precision
            (float16): the factor halves after an update that is not finite and doubles after 2000 in a row that are.
    """

    def __init__(
        self,
        groups: dict[str, tuple[Named, float]],
        *,
        name: str = "laprop",
        agc: float = 0.3,
        pmin: float = 1e-3,
        clip: float = 0.0,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-20,
        warmup: int = 1000,
        decay: float = 0.0,
        hyper: float = 0.0,
        hyper_limit: float = 10.0,
        scaled: bool = False,
    ):
        listed = {key: (list(named), lr) for key, (named, lr) in groups.items()}
        self.groups = {key: Group(named, lr, bool(hyper)) for key, (named, lr) in listed.items() if named}
        self.laprop = {"laprop": True, "adam": False}[name]
        self.agc, self.pmin, self.clip = agc, pmin, clip
        self.beta1, self.beta2, self.eps, self.warmup, self.decay = beta1, beta2, eps, warmup, decay
        self.hyper, self.hyper_limit = hyper, math.log(hyper_limit)
        device = next(iter(self.groups.values())).data.device
        self.updates, self.bad, self.bad_total = (torch.zeros((), device=device) for _ in range(3))
        self.scaled, self.scale = scaled, torch.full((), 2.0**15 if scaled else 1.0, device=device)
        self.good = torch.zeros((), device=device)  # updates since the scale last changed
        self.unbroken = contextlib.nullcontext  # a block in which no signal may break off what is done

    def step(
        self, loss: Float[Tensor, ""], only: Iterable[str] | None = None, live: Bool[Tensor, ""] | None = None
    ) -> dict[str, Float[Tensor, ""]]:
        """One update. Returns `grad_norm` (before clipping), `update_rms` (of the weights' movement), `bad_updates`.

        Args:
            only: the groups that it is an update of, beyond those of all groups; the loss depends on no other.
            live: False for an update that is to change nothing.
        """
        self.backward(loss, only)
        return self.apply(torch.isfinite(loss.detach()), only, live)

    def backward(self, loss: Float[Tensor, ""], only: Iterable[str] | None = None) -> None:
        """Fills the gradient buffers. Gradients of several processes are to be reduced between this and `apply`."""
        for group in self._chosen(only):
            group.grad.zero_()
        (loss * self.scale if self.scaled else loss).backward()

    def _chosen(self, only: Iterable[str] | None) -> list[Group]:
        return [group for key, group in self.groups.items() if only is None or key in only]

    @torch.no_grad()
    def apply(
        self, finite: Bool[Tensor, ""], only: Iterable[str] | None = None, live: Bool[Tensor, ""] | None = None
    ) -> dict[str, Float[Tensor, ""]]:
        """Updates the weights from the gradients that lie in the groups' buffers (see `step`)."""
        with self.unbroken():
            return self._apply(self._chosen(only), finite, only, live)

    def _apply(self, groups, finite, only, live):
        if self.scaled:
            for group in groups:
                group.grad.div_(self.scale)
        norm = torch.stack([g.grad.norm() for g in groups]).norm()
        ok = finite & torch.isfinite(norm)
        if only is None:
            self.updates += ok
            self.bad.copy_(torch.where(ok, 0.0, self.bad + 1))
            self.bad_total += ~ok
            if self.scaled:
                self._rescale(ok)
        else:
            ok = ok if live is None else ok & live
            for group in groups:
                group.extra += ok
        squares = sum(self._update(group, ok, adapt=only is None) for group in groups)
        rms = (squares / sum(g.data.numel() for g in groups)).sqrt()
        return {"grad_norm": norm, "update_rms": rms, "bad_updates": self.bad_total.clone()}

    def _rescale(self, ok: Bool[Tensor, ""]) -> None:
        self.good.copy_(torch.where(ok, self.good + 1, 0.0))
        grow = self.good >= 2000
        self.scale.mul_(torch.where(ok, torch.where(grow, 2.0, 1.0), 0.5)).clamp_(1.0, 2.0**24)
        self.good.masked_fill_(grow, 0.0)

    def _update(self, group: Group, ok: Bool[Tensor, ""], adapt: bool) -> Float[Tensor, ""]:
        """Clips, updates the moments and the weights of one group, and its rate if `adapt`; returns the sum of squares
        of the movement.
        """
        grad = group.grad.masked_fill_(~ok, 0.0)  # a NaN would survive a product with 0
        if self.agc:
            self._clip_tensors(group)
        if self.clip:
            factor = (self.clip / grad.norm().clamp(min=self.clip)).to(grad.dtype)
            grad.mul_(factor)
            if group.traces is not None:
                group.traces.mul_(factor)
        live = ok.to(grad.dtype)
        count = (self.updates + group.extra).to(_wide(grad)).clamp(min=1)
        correct1, correct2 = ((1 - beta**count).to(grad.dtype) for beta in (self.beta1, self.beta2))
        if self.hyper and adapt:
            self._adapt(group, live)
        rate = (group.rate * self._schedule()).to(grad.dtype) * live
        group.second.lerp_(grad.square(), (1 - self.beta2) * live)
        scale = (group.second / correct2).sqrt_().add_(self.eps)
        if group.traces is not None:
            # No gradient moves a weight by more than this; a trace might, where gradients were 0 so far.
            most = (1 - self.beta2) ** -0.5
            moved = (group.traces / scale).clamp_(-most, most) * (rate * (1 - self.beta1) / correct1)
            group.traces.copy_(torch.where(ok, moved, 0.0))
        if self.laprop:
            group.first.lerp_(grad.div_(scale), (1 - self.beta1) * live)
            move = (group.first / correct1).mul_(rate)
        else:
            group.first.lerp_(grad, (1 - self.beta1) * live)
            move = (group.first / correct1).div_(scale).mul_(rate)
        group.data.sub_(move)
        if group.last is not None and adapt:
            group.last.copy_(torch.where(ok, move, group.last if group.traces is None else 0.0))
        elif group.last is not None:
            group.last.add_(move)
        return move.square_().sum()

    def _adapt(self, group: Group, live: Float[Tensor, ""]) -> None:
        """One step of the group's own learning rate, from the clipped gradient and the movement before."""
        product = torch.dot(group.grad, group.last)
        cosine = product / (group.grad.norm() * group.last.norm()).clamp(min=torch.finfo(group.grad.dtype).tiny)
        warm = (self.updates > self.warmup).to(live.dtype)
        group.log_gain.add_(self.hyper * cosine * live * warm).clamp_(-self.hyper_limit, self.hyper_limit)

    def rates(self) -> dict[str, Float[Tensor, ""]]:
        """Each group's learning rate as it has adapted by now, without warmup and decay."""
        return {key: group.rate for key, group in self.groups.items()}

    def _schedule(self) -> Float[Tensor, ""]:
        """The factor of all rates at this update."""
        done = (self.updates - 1).to(_wide(self.updates))
        factor = (done / self.warmup).clamp(0, 1) if self.warmup else torch.ones_like(done)
        return factor / (1 + done / self.decay) if self.decay else factor

    def _clip_tensors(self, group: Group) -> None:
        grads = group.split(group.grad)
        weights = torch.stack(torch._foreach_norm(group.split(group.data)))
        norms = torch.stack(torch._foreach_norm(grads))
        scales = 1 / (norms / (self.agc * weights.clamp(min=self.pmin))).clamp(min=1.0)
        scales = list(scales.unbind())
        torch._foreach_mul_(grads, scales)
        for row in () if group.traces is None else group.traces:
            torch._foreach_mul_(group.split(row), scales)

    def state_dict(self) -> dict:
        """Moments under the names of their parameters, so that a checkpoint reads like a table of contents."""

        def named(group: Group, flat: Tensor) -> dict[str, Tensor]:
            return {name: v.clone() for name, v in zip(group.names, group.split(flat), strict=True)}

        def adapted(group: Group) -> dict:
            if group.last is None:
                return {}
            rows = {} if group.traces is None else {"traces": [named(group, row) for row in group.traces]}
            return {"log_gain": group.log_gain.clone(), "last": named(group, group.last)} | rows

        return {
            "updates": self.updates.clone(),
            "bad": self.bad.clone(),
            "bad_total": self.bad_total.clone(),
            **({"scale": self.scale.clone(), "good": self.good.clone()} if self.scaled else {}),
            "groups": {
                key: {
                    "lr": g.lr.clone(),
                    "extra": g.extra.clone(),
                    **adapted(g),
                    "first": named(g, g.first),
                    "second": named(g, g.second),
                }
                for key, g in self.groups.items()
            },
        }

    def load_state_dict(self, state: dict, rates: bool = True) -> None:
        """Restores `state_dict()`. Without `rates` the learning rates given at construction stay.

        Raises KeyError if a group or parameter is missing in `state`."""
        for name in ("updates", "bad", "bad_total", *(("scale", "good") if self.scaled and "scale" in state else ())):
            getattr(self, name).copy_(state[name])
        for key, group in self.groups.items():
            saved = state["groups"][key]
            group.extra.copy_(saved.get("extra", 0.0))
            if rates:
                group.lr.copy_(saved["lr"])
            flats = [(group.first, saved["first"]), (group.second, saved["second"])]
            if group.last is not None and "last" in saved:
                group.log_gain.copy_(saved["log_gain"])
                flats.append((group.last, saved["last"]))
            if group.traces is not None and len(saved.get("traces", ())) == len(group.traces):
                flats += zip(group.traces, saved["traces"], strict=True)
            for flat, named in flats:
                for name, view in zip(group.names, group.split(flat), strict=True):
                    view.copy_(named[name])
