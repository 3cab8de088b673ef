"""Compare this project with numbers that the reference implementation computed.

    python tests/golden.py FILE.npz [--horizon 333] [--lam 0.95] [--imag_horizon 15] [--dump OUT.npz]
                           [--device cpu] [--compile]

The file holds weights, four batches, and what the reference made of them: losses, posterior, return normaliser,
gradients, and the weights after four optimizer steps (format: `tests/golden/README.md`). Network sizes and the kinds of
observation and action are inferred from its arrays; the weights are loaded into this project's own modules, sampling is
fixed as in the reference (mode of categoricals, mean + 0.5 std of normals), and the largest relative errors are
printed. Exit status 0 only if all are within tolerance: losses, posterior, normaliser and gradients 1e-4 of the
tensor's norm, weights' movements 3e-3.
"""

import argparse
import re
import sys
from pathlib import Path

import numpy as np
import torch
from gymnasium import spaces as gs

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import config as configuration  # noqa: E402
from dreamer import Dreamer  # noqa: E402
from modalities.vector import safe  # noqa: E402
from models import total_loss  # noqa: E402

FLAGS = ("reward", "is_first", "is_last", "is_terminal", "action")
TOLERANCE = {"loss": 1e-4, "posterior": 1e-4, "normaliser": 1e-4, "gradient": 1e-4, "movement": 3e-3}


class Reference:
    """A golden file: arrays by name, and the sizes that they imply."""

    def __init__(self, path: str):
        try:
            self.arrays = dict(np.load(path, allow_pickle=False))
        except (OSError, ValueError) as error:
            raise SystemExit(f"{path} cannot be read as an .npz file: {error}") from error
        self.weights = {k[len("param:") :]: v for k, v in self.arrays.items() if k.startswith("param:")}
        self.batches = [self.group(f"in{n or ''}:") for n in range(10) if f"in{n or ''}:reward" in self.arrays]
        self.retnorm = {k: float(self.batches[0].get(f"retnorm/{k}", 0)) for k in ("lo", "hi")}
        self.keys = sorted(k for k in self.batches[0] if k not in FLAGS and not k.startswith("retnorm/"))
        self.keys = [k for k in self.keys if not k.startswith("log_")]
        self.images = [k for k in self.keys if self.batches[0][k].dtype == np.uint8 and self.batches[0][k].ndim == 5]
        self.vectors = [k for k in self.keys if k not in self.images]

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        return {k[len(prefix) :]: v for k, v in self.arrays.items() if k.startswith(prefix)}

    def shape(self, name: str) -> tuple[int, ...]:
        return self.weights[f"{name}/kernel"].shape

    def count(self, pattern: str) -> int:
        """How many layers are called so, e.g. `enc/mlp#`."""
        return sum(re.fullmatch(re.escape(pattern).replace("\\#", r"\d+"), k) is not None for k in self.layers())

    def layers(self) -> list[str]:
        return [k[: -len("/kernel")] for k in self.weights if k.endswith("/kernel")]

    def obs_space(self) -> dict[str, gs.Space]:
        spaces = {}
        for key in self.keys:
            value = self.batches[0][key]
            if np.issubdtype(value.dtype, np.integer) and key in self.vectors:
                classes = self.shape(self.vector_head(key))[-1] // int(np.prod(value.shape[2:]))
                spaces[key] = gs.MultiDiscrete([classes] * value.shape[2]) if value.ndim > 2 else gs.Discrete(classes)
            elif key in self.images:
                spaces[key] = gs.Box(0, 255, value.shape[2:], np.uint8)
            else:
                spaces[key] = gs.Box(-np.inf, np.inf, value.shape[2:], np.float32)
        return spaces

    def act_space(self) -> gs.Space:
        size = self.shape("dyn/dynin2")[0]
        return gs.Discrete(size) if "pol/head/action/logits/kernel" in self.weights else gs.Box(-1, 1, (size,))

    def frame_size(self) -> tuple[int, int]:
        return self.batches[0][self.images[0]].shape[2:4]

    def vector_head(self, key: str) -> str:
        return next(k for k in self.layers() if re.fullmatch(f"dec/vec/{re.escape(key)}/[^/]+", k))

    def settings(
        self, horizon: float, lam: float, imag_horizon: int, device: str = "cpu", compile: bool = False
    ) -> dict:
        """The project's configuration for networks of this file's sizes and the training settings of its README."""
        blocks, _, block = self.shape("dyn/dyngru")
        deter = blocks * block // 3
        hidden = self.shape("dyn/dynin0")[1]
        stats = self.shape("dyn/priorlogit")[1]
        logit = self.arrays["out:post/logit"].shape
        assert logit[-1] * logit[-2] == stats, (logit, stats)
        settings = {
            "horizon": horizon,
            "discount_lambda": lam,
            "imag_horizon": imag_horizon,
            "dyn.deter": deter,
            "dyn.hidden": hidden,
            "dyn.blocks": blocks,
            "dyn.stoch": logit[-2],
            "dyn.discrete": logit[-1],
            "dyn.dyn_layers": self.count("dyn/dynhid#"),
            "dyn.obs_layers": self.count("dyn/obs#"),
            "dyn.img_layers": self.count("dyn/prior#"),
            "actor.unimix_ratio": 0.0,
            "opt.lr": 1e-3,
            "opt.warmup": 2,
            "opt.eps": 1e-8,
            "precision": "float32",
            "device": device,
            "compile": compile,
        }
        if self.images:
            kernels = [self.shape(f"enc/cnn{n}") for n in range(self.count("enc/cnn#"))]
            up = [self.shape(f"dec/conv{n}")[-1] for n in range(self.count("dec/conv#"))]
            settings |= {"encoder.depth": 1, "decoder.depth": 1, "image_size": list(self.frame_size())}
            settings |= {"encoder.kernel": kernels[0][0], "encoder.mults": [kernel[-1] for kernel in kernels]}
            settings |= {"decoder.kernel": self.shape("dec/imgout")[0]}
            settings |= {"decoder.mults": [*up, len(self.weights["dec/spnorm/scale"])]}
            settings |= {"decoder.blocks": self.shape("dec/sp0")[0], "decoder.units": self.shape("dec/sp1")[1] // 2}
        parts = {"enc/mlp": "encoder", "dec/mlp/linear": "decoder", "rew/mlp/linear": "reward_head"}
        parts |= {"con/mlp/linear": "cont_head", "pol/mlp/linear": "actor", "val/mlp/linear": "critic"}
        for part, ours in parts.items():
            settings[f"{ours}.layers"] = self.count(f"{part}#")
            if self.count(f"{part}#"):
                settings[f"{ours}.units"] = self.shape(f"{part}0")[1]
        for part, ours in (("rew", "reward_head"), ("val", "critic")):
            settings[f"{ours}.bins"] = self.shape(f"{part}/head/logits")[1]
        return settings


class Names:
    """Which of our parameters is which of the reference's arrays, and how their layouts differ.

    `pairs` lists (our tensor, the reference's name, to_ours, to_reference); `vector_head` names a vector's output
    layer.
    """

    def __init__(self, agent: Dreamer, vector_head=lambda key: f"dec/vec/{key}/pred"):
        self.vector_head = vector_head
        self.pairs: list[tuple[torch.nn.Parameter, str, object, object]] = []
        model, behavior = agent.world_model, agent.behavior
        self._encoder(model)
        self._rssm(model.rssm)
        self._decoder(model)
        stream = behavior.streams["extrinsic"]
        heads = {"rew": model.reward, "con": model.cont, "val": stream.critic, "slowval": stream.slow_critic.model}
        for name, head in heads.items():
            self._mlp(f"{name}/mlp", head.mlp)
            self._linear(f"{name}/head/{'logit' if name == 'con' else 'logits'}", head.out)
        self._mlp("pol/mlp", behavior.actor.mlp)
        if agent.classes:
            self._linear("pol/head/action/logits", behavior.actor.logits[0])
        else:
            self._linear("pol/head/action/mean", behavior.actor.mean)
            self._linear("pol/head/action/stddev", behavior.actor.std)

    def load(self, weights: dict[str, np.ndarray]) -> None:
        """Copies the reference's weights into ours. SystemExit if either side has a weight that the other lacks."""
        unmatched = {name for _, name, _, _ in self.pairs} ^ set(weights)
        if unmatched:
            raise SystemExit(f"Weights without a counterpart: {sorted(unmatched)}")
        with torch.no_grad():
            for tensor, name, to_ours, _ in self.pairs:
                tensor.copy_(torch.from_numpy(np.ascontiguousarray(to_ours(weights[name]))))

    def _add(self, tensor, name, to_ours=lambda x: x, to_reference=lambda x: x) -> None:
        self.pairs.append((tensor, name, to_ours, to_reference))

    def _linear(self, name: str, layer, swap: tuple[int, int] | None = None) -> None:
        """`swap` (first, second) when the reference's input is [second part, first part] of ours, by widths."""
        if swap is None:
            self._add(layer.weight, f"{name}/kernel", np.transpose, np.transpose)
        else:
            first, second = swap
            self._add(
                layer.weight,
                f"{name}/kernel",
                lambda x: np.concatenate([x[second:], x[:second]]).T,
                lambda x: np.concatenate([x.T[first:], x.T[:first]]),
            )
        self._add(layer.bias, f"{name}/bias")

    def _dense(self, name: str, norm: str, layer, swap=None) -> None:
        self._linear(name, layer.linear, swap)
        self._add(layer.norm.scale, f"{norm}/scale")

    def _mlp(self, name: str, mlp, swap=None) -> None:
        for n, layer in enumerate(mlp):
            self._dense(f"{name}/linear{n}", f"{name}/norm{n}", layer, swap if n == 0 else None)

    def _conv(self, name: str, stage, norm: bool = True) -> None:
        self._add(
            stage.conv.weight, f"{name}/kernel", lambda x: x.transpose(3, 2, 0, 1), lambda x: x.transpose(2, 3, 1, 0)
        )
        self._add(stage.conv.bias, f"{name}/bias")
        if norm:
            self._add(stage.norm.scale, f"{name}norm/scale")

    def _encoder(self, model) -> None:
        if "vector" in model.encoder.encoders:
            for n, layer in enumerate(model.encoder.encoders["vector"].mlp):
                self._dense(f"enc/mlp{n}", f"enc/mlp{n}norm", layer)
        if "image" in model.encoder.encoders:
            for n, stage in enumerate(model.encoder.encoders["image"].stages):
                self._conv(f"enc/cnn{n}", stage)

    def _rssm(self, rssm) -> None:
        core = rssm.core
        for n, layer in enumerate((core.from_deter, core.from_stoch, core.from_action)):
            self._dense(f"dyn/dynin{n}", f"dyn/dynin{n}norm", layer)
        for n, (layer, norm) in enumerate(zip(core.hidden, core.norms, strict=True)):
            self._add(layer.weight, f"dyn/dynhid{n}/kernel")
            self._add(layer.bias, f"dyn/dynhid{n}/bias")
            self._add(norm.scale, f"dyn/dynhid{n}norm/scale")
        self._add(core.gates.weight, "dyn/dyngru/kernel")
        self._add(core.gates.bias, "dyn/dyngru/bias")
        for n, layer in enumerate([rssm.fusion.first, *rssm.fusion.rest]):
            self._dense(f"dyn/obs{n}", f"dyn/obs{n}norm", layer)
        self._linear("dyn/obslogit", rssm.post_out)
        for n, layer in enumerate(rssm.prior_net):
            self._dense(f"dyn/prior{n}", f"dyn/prior{n}norm", layer)
        self._linear("dyn/priorlogit", rssm.prior_out)

    def _decoder(self, model) -> None:
        rssm = model.rssm
        if "vector" in model.decoder.decoders:
            decoder = model.decoder.decoders["vector"]
            self._mlp("dec/mlp", decoder.mlp, swap=(rssm.deter, rssm.stoch_size))
            for key in decoder.vectors:
                head = decoder.out[safe(key)]
                if len(head) > 1:  # one tensor there, several here: their gradients would be clipped differently
                    raise SystemExit(f"{key}: discrete vectors of several entries cannot be compared")
                self._linear(self.vector_head(key), head[0])
        if "image" in model.decoder.decoders:
            decoder = model.decoder.decoders["image"]
            self._add(decoder.from_deter.weight, "dec/sp0/kernel")
            self._add(decoder.from_deter.bias, "dec/sp0/bias")
            self._dense("dec/sp1", "dec/sp1norm", decoder.from_stoch[0])
            self._linear("dec/sp2", decoder.from_stoch[1])
            self._add(decoder.norm.scale, "dec/spnorm/scale")
            *stages, last = decoder.stages
            for n, stage in zip(reversed(range(len(stages))), stages, strict=True):
                self._conv(f"dec/conv{n}", stage)
            self._conv("dec/imgout", last, norm=False)


def build(
    reference: Reference, horizon: float, lam: float, imag_horizon: int, device: str = "cpu", compile: bool = False
) -> tuple[Dreamer, Names]:
    settings = reference.settings(horizon, lam, imag_horizon, device, compile)
    config = configuration.load([]).replace(**settings)
    agent = Dreamer(reference.obs_space(), reference.act_space(), config, device)
    names = Names(agent, reference.vector_head)
    names.load(reference.weights)
    retnorm = agent.behavior.streams["extrinsic"].retnorm
    retnorm.lo.fill_(reference.retnorm["lo"])
    retnorm.hi.fill_(reference.retnorm["hi"])
    return agent, names


def to_batch(agent: Dreamer, arrays: dict[str, np.ndarray]) -> dict:
    """A golden batch in this project's format: one-hot actions, and a context that says: no latent is stored."""
    rssm = agent.world_model.rssm
    arrays = {key: value for key, value in arrays.items() if not key.startswith("retnorm/")}
    arrays = {k: v.astype(np.float32) if np.issubdtype(v.dtype, np.floating) else v for k, v in arrays.items()}
    arrays |= {key: arrays[key].astype(bool) for key in ("is_first", "is_last", "is_terminal")}
    arrays["reward"] = arrays["reward"].astype(np.float32)
    size = len(arrays["reward"])
    if agent.classes and arrays["action"].ndim == 2:  # as indices
        arrays["action"] = np.eye(agent.classes[0], dtype=np.float32)[arrays["action"].astype(int)]
    arrays["action"] = arrays["action"].astype(np.float32).reshape(*arrays["reward"].shape, -1)
    context = {
        "deter": np.zeros((size, rssm.deter), np.float16),
        "stoch": np.zeros((size, rssm.stoch), np.uint8),
        "action": np.zeros((size, agent.action_size), np.float32),
        "valid": np.zeros(size, bool),
    }
    return agent.to_device({**arrays, "context": context})


def fixed_noise(agent: Dreamer, batch: dict) -> dict[str, torch.Tensor]:
    """Zero Gumbel noise is the arg max; 0.5 normal noise is mean + 0.5 std."""
    noise = agent.draw_noise(*batch["reward"].shape)
    noise = {key: torch.zeros_like(value) for key, value in noise.items()}
    if not agent.classes:
        noise["action"].fill_(0.5)
    return noise


def compute(reference: Reference, agent: Dreamer, names: Names) -> dict[str, np.ndarray]:
    """What this project makes of the file's weights and batches, under the file's own key names."""
    out: dict[str, np.ndarray] = {}
    retnorm = agent.behavior.streams["extrinsic"].retnorm
    for step, arrays in enumerate(reference.batches):
        batch = to_batch(agent, arrays)
        losses, post, _ = agent.losses(batch, fixed_noise(agent, batch))
        loss = total_loss(losses, agent.loss_scales)
        agent.optimizer.backward(loss)
        if step == 0:
            out["out:loss"] = loss
            out |= {f"out:loss/{name.removeprefix('rec/')}": value for name, value in losses.items()}
            out |= {f"out:post/{key}": post[key] for key in ("deter", "stoch", "logit")}
            out |= {f"out:retnorm/{key}/value": getattr(retnorm, key).clone() for key in ("lo", "hi")}
            for tensor, name, _, to_reference in names.pairs:
                if tensor.grad is not None and not name.startswith("slowval/"):
                    out[f"grad:{name}"] = to_reference(to_numpy(tensor.grad.clone()))
        metrics = agent.optimizer.apply(torch.isfinite(loss.detach()))
        agent.behavior.after_step()
        out[f"out:opt/{step}/loss"] = loss
        out |= {f"out:opt/{step}/{key}": metrics[key] for key in ("grad_norm", "update_rms")}
    for tensor, name, _, to_reference in names.pairs:
        out[f"after:{name}"] = to_reference(to_numpy(tensor))
    out |= {f"after:retnorm/{key}/value": getattr(retnorm, key) for key in ("lo", "hi")}
    return {key: np.array(to_numpy(v) if torch.is_tensor(v) else v, np.float32) for key, v in out.items()}


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """‖found - expected‖ / ‖expected‖; absolute where the expected norm is under 1e-6."""
    if found.shape != expected.shape:
        return float("inf")
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    norm = np.linalg.norm(expected)
    return float(np.linalg.norm(found - expected) / (norm if norm >= 1e-6 else 1.0))


def compare(reference: Reference, found: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Errors by kind (a key of TOLERANCE) and name. Whatever the file holds and we did not compute is an infinite
    error.
    """
    errors: dict[str, dict[str, float]] = {kind: {} for kind in TOLERANCE}
    for key, expected in reference.arrays.items():
        name = key.split(":", 1)[1]
        if key.startswith("out:loss") or re.fullmatch(r"out:opt/\d+/.*", key):
            kind = "loss"
        elif key.startswith("out:post/"):
            kind = "posterior"
        elif key.startswith(("out:retnorm/", "after:retnorm/")):
            kind = "normaliser"
        elif key.startswith("grad:"):
            kind = "gradient"
        elif key.startswith("after:"):
            kind = "movement"
        else:
            continue
        if key not in found:
            errors[kind][name] = float("inf")
            continue
        before = reference.weights[name] if kind == "movement" else 0.0
        errors[kind][name] = relative(found[key] - before, np.asarray(expected) - before)
    return errors


def check(
    path: str,
    horizon: float = 333,
    lam: float = 0.95,
    imag_horizon: int = 15,
    device: str = "cpu",
    compile: bool = False,
) -> tuple[dict, dict]:
    """Errors by kind and name, and everything that was computed."""
    reference = Reference(path)
    # float32 is what is compared: TF32 keeps 10 bits of it.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    agent, names = build(reference, horizon, lam, imag_horizon, device, compile)
    found = compute(reference, agent, names)
    return compare(reference, found), found


def within(errors: dict[str, dict[str, float]]) -> bool:
    """Every kind has something to compare, and nothing is out of tolerance. (NaN is.)"""
    return all(rows and all(e <= TOLERANCE[kind] for e in rows.values()) for kind, rows in errors.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--horizon", type=float, default=333)
    parser.add_argument("--lam", type=float, default=0.95)
    parser.add_argument("--imag_horizon", type=int, default=15)
    parser.add_argument("--dump", metavar="OUT.npz", help="write what was computed, under the file's key names")
    parser.add_argument("--device", default="cpu", help="where this project computes: cpu, cuda, ...")
    parser.add_argument("--compile", action="store_true", help="compile what training compiles (takes minutes)")
    args = parser.parse_args()
    errors, found = check(args.file, args.horizon, args.lam, args.imag_horizon, args.device, args.compile)
    if args.dump:
        np.savez(args.dump, **found)
    for kind, rows in errors.items():
        print(f"{kind} (at most {TOLERANCE[kind]:.0e})")
        for name, error in rows.items():
            print(f"  {'ok  ' if error <= TOLERANCE[kind] else 'FAIL'} {error:9.2e}  {name}")
    print(
        "largest relative error: " + ", ".join(f"{k} {max(v.values(), default=np.nan):.1e}" for k, v in errors.items())
    )
    good = within(errors)
    print("agrees with the reference" if good else "DOES NOT AGREE with the reference")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
