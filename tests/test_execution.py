"""The ways to run a step give the same numbers: as written, recomputed, captured; in half precision nearly so."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces

import config as configuration
import execution
from dreamer import Dreamer
from errors import UserError
from execution import Captured

ROOT = Path(__file__).resolve().parent.parent
OBS = {
    "image": spaces.Box(0, 255, (16, 16, 3), np.uint8),
    "vector": spaces.Box(-np.inf, np.inf, (5,), np.float32),
}
ACT = spaces.Box(-1, 1, (2,), np.float32)
B, T = 3, 6
SMALL = "--configs debug --device cpu --imag_horizon 3 --encoder.mults 1 2 --decoder.mults 1 2".split()


def make(*flags: str) -> Dreamer:
    torch.manual_seed(0)
    config = configuration.load([*SMALL, *flags])
    agent = Dreamer(OBS, ACT, config, config.device)
    generator = torch.Generator().manual_seed(1)
    for parameter in agent.parameters():  # zero-initialised heads would hide much
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(agent.device))
    return agent


def make_batch(agent: Dreamer, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    rssm = agent.world_model.rssm
    batch = {
        "image": rng.integers(0, 256, (B, T, 16, 16, 3), dtype=np.uint8),
        "vector": rng.normal(size=(B, T, 5)).astype(np.float32),
        "action": rng.normal(size=(B, T, 2)).astype(np.float32),
        "reward": rng.normal(size=(B, T)).astype(np.float32),
        **{key: rng.random((B, T)) < 0.2 for key in ("is_first", "is_last", "is_terminal")},
        "context": {
            "deter": rng.normal(size=(B, rssm.deter)).astype(np.float16),
            "stoch": rng.integers(0, rssm.discrete, (B, rssm.stoch), dtype=np.uint8),
            "action": rng.normal(size=(B, 2)).astype(np.float32),
            "valid": np.array([True, False, True]),
        },
    }
    return agent.to_device(batch)


def losses_and_gradients(agent: Dreamer) -> tuple[dict, dict]:
    torch.manual_seed(2)
    losses, _, _ = agent.losses(make_batch(agent), agent.draw_noise(B, T))
    agent.optimizer.backward(sum(loss.mean() for loss in losses.values()))
    grads = {name: p.grad.clone() for name, p in agent.named_parameters() if p.requires_grad}
    return {name: loss.detach() for name, loss in losses.items()}, grads


def test_checkpointing_changes_no_number_and_keeps_less():
    def kept(agent):
        """Bytes that autograd keeps for the backward pass."""
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        batch, noise = make_batch(agent), agent.draw_noise(B, T)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            agent.world_model.loss(batch, noise["post"])
        return sum(storages.values())

    plain, again = make(), make("--checkpointing", "true")
    for one, other in zip(losses_and_gradients(plain), losses_and_gradients(again), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert kept(again) < 0.6 * kept(plain)


@pytest.mark.parametrize("recompute", ["false", "true"], ids=["kept", "recomputed"])
@pytest.mark.parametrize("stride", [4, 6, 100])
def test_several_steps_of_the_scan_as_one_change_no_number(stride, recompute):
    assert T % 4, "the last call is to be a shorter one"
    plain, other = make(), make("--checkpointing", recompute)
    other.world_model.rssm.stride = stride
    for one, two in zip(losses_and_gradients(plain), losses_and_gradients(other), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_imag_last_is_the_behaviours_loss_on_the_last_states_alone():
    whole, last = make(), make("--imag_last", "2")
    batch = make_batch(whole)
    noise = whole.draw_noise(B, T)
    own = {key: value.unflatten(1, (B, T))[:, :, -2:].flatten(1, 2) for key, value in noise.items() if key != "post"}
    assert {key: value.shape for key, value in last.draw_noise(B, T).items() if key != "post"} == {
        key: value.shape for key, value in own.items()
    }
    for agent in (whole, last):  # a return normaliser that saw other returns would scale the advantages
        agent.behavior.streams["extrinsic"].retnorm.rate = 0.0
    expected, _, _ = whole.losses(batch, noise)
    found, _, metrics = last.losses(batch, {"post": noise["post"], **own})
    assert found["policy"].shape == found["value"].shape == (B, 2) and found["repval"].shape == (B, 1)
    for name in ("policy", "value"):
        torch.testing.assert_close(found[name], expected[name][:, -2:])
    torch.testing.assert_close(found["repval"], expected["repval"][:, -1:])
    for name in ("rew", "dyn", "rec/image"):
        torch.testing.assert_close(found[name], expected[name])
    assert all(torch.isfinite(value).all() for value in metrics.values())


@pytest.mark.parametrize("imag_last", [0, 2, 99])
def test_imag_last_trains(imag_last):
    agent = make("--imag_last", str(imag_last))
    metrics, (deter, stoch) = agent.train_step(make_batch(agent))
    assert deter.shape[:2] == stoch.shape[:2] == (B, T)
    assert float(metrics["opt/bad_updates"]) == 0


def test_half_precision_with_loss_scaling_is_near_full_precision():
    full, half = make(), make("--precision", "float16")
    assert half.optimizer.scaled and not full.optimizer.scaled
    half.optimizer.scale.fill_(64.0)
    (expected, grads), (found, scaled) = losses_and_gradients(full), losses_and_gradients(half)
    for name in expected:
        if name != "policy":  # advantages are small differences
            torch.testing.assert_close(found[name].mean(), expected[name].mean(), rtol=0.02, atol=0.02)
    flat = torch.cat([g.flatten() for n, g in grads.items() if "world_model" in n])
    near = torch.cat([scaled[n].flatten() / 64 for n in grads if "world_model" in n])
    assert torch.nn.functional.cosine_similarity(flat, near, dim=0) > 0.995
    assert 0.99 < near.norm() / flat.norm() < 1.01


def test_loss_scale_halves_until_gradients_are_finite_and_doubles_later():
    agent = make("--precision", "float16")
    optimizer, batch = agent.optimizer, make_batch(agent)
    optimizer.scale.fill_(2.0**23)
    scales = []
    for _ in range(24):
        agent.train_step(batch)
        scales.append(float(optimizer.scale))
        if not optimizer.bad:
            break
    assert len(scales) > 2 and scales[:-1] == [2.0 ** (22 - n) for n in range(len(scales) - 1)]
    assert scales[-1] == scales[-2] and float(optimizer.updates) == 1
    optimizer.scale.fill_(64.0)
    optimizer.good.fill_(1999)
    agent.train_step(batch)
    assert float(optimizer.scale) == 128.0 and float(optimizer.good) == 0
    other = make("--precision", "float16")
    other.restore(agent.checkpoint())
    assert float(other.optimizer.scale) == float(optimizer.scale)


# Captured: the machinery around a CUDA graph, rehearsed without one


class OnCPU(Captured):
    """Replays by calling the function again and writing its results over the earlier ones."""

    captures = 0

    def warm_up(self, inputs):
        return self.function(*inputs)

    def capture(self, inputs):
        self.captures += 1
        outputs = execution.mapped(self.function(*inputs), torch.zeros_like)

        def replay():
            new = self.function(*inputs)
            for (_, old), (_, value) in zip(execution.leaves(outputs), execution.leaves(new), strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(value)

        return replay, outputs


def test_captured_copies_inputs_and_reuses_outputs():
    calls = []

    def function(tree, scale):
        calls.append(1)
        return {"sum": tree["a"] + tree["rest"][0] * scale, "none": None}

    captured = OnCPU(function, warmup=2)
    results = [
        captured({"a": torch.full((2,), float(n)), "rest": [torch.ones(2)], "none": None}, torch.tensor(3.0))
        for n in range(5)
    ]
    assert captured.captures == 1
    assert results[0]["sum"].tolist() == [3.0, 3.0] and results[1]["sum"].tolist() == [4.0, 4.0]
    assert results[2]["sum"] is results[4]["sum"] and results[4]["sum"].tolist() == [7.0, 7.0]
    assert results[4]["none"] is None


def test_captured_keeps_signatures_apart():
    captured = OnCPU(lambda x, noise: {"y": x * 2 if noise is None else x + noise}, warmup=0)
    for _ in range(2):
        assert captured(torch.ones(2), None)["y"].tolist() == [2, 2]
        assert captured(torch.ones(2), torch.ones(2))["y"].tolist() == [2, 2]
        assert captured(torch.ones(3), None)["y"].tolist() == [2, 2, 2]
        assert captured(torch.ones(3, dtype=torch.int64), None)["y"].dtype == torch.int64
    assert captured.captures == 4


def test_captured_updates_and_acting_equal_plain_ones():
    plain, graph = make(), make()
    graph._update, graph._act = OnCPU(graph._update, warmup=1), OnCPU(graph._act, warmup=1, copies=True)
    graph._lay_out = lambda: None
    graph._update.capture = once_without_effect(graph, graph._update)
    states = {agent: [agent.initial(2), agent.initial(2)] for agent in (plain, graph)}
    for turn in range(4):
        batch = make_batch(plain, seed=turn)
        (expected, latents), (found, copies) = plain.train_step(batch), graph.train_step(batch)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        torch.testing.assert_close(copies, latents, rtol=0, atol=0)
        rng = np.random.default_rng(turn)
        for which in range(2):  # two that act in turn with states of the same size, as training and evaluation do
            obs = {"image": rng.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8), "reward": np.zeros(2, np.float32)}
            obs |= {"vector": rng.normal(size=(2, 5)).astype(np.float32), "is_first": rng.random(2) < 0.2}
            actions = []
            for agent in (plain, graph):
                action, states[agent][which] = agent.policy(obs, states[agent][which])
                actions.append(action)
            np.testing.assert_array_equal(*actions)
    assert graph._update.captures == 1 and graph._act.captures == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "compile, precision",
    [("false", "float32"), ("false", "bfloat16"), ("false", "float16"), ("true", "float32"), ("true", "bfloat16")],
)
def test_a_graph_learns_and_acts_like_what_it_was_captured_from(compile, precision):
    """In a process of its own: compilers do not look through the checking of shapes in these tests' type hints."""
    flags = ("--graph", "true", "--compile", compile)
    code = f"import test_execution as t; t.compare_ways(*{flags}, device='cuda', precision='{precision}')"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def test_ways_are_compared():
    """The comparison of the test above, on what is here: the same is the same, and a difference is one."""
    compare_ways("--checkpointing", "true", device="cpu", precision="float32")
    with pytest.raises(AssertionError):
        compare_ways("--kl_free", "0", device="cpu", precision="float32")


def compare_ways(*flags: str, device: str, precision: str) -> None:
    """Updates and acting of an agent with `flags` beside one without, in turn; both act first."""
    keys = ("--device", device, "--precision", precision, "--opt.warmup", "0", "--opt.lr", "1e-4")
    plain, other = make(*keys), make(*keys, *flags)
    near = {"rtol": 1e-3, "atol": 1e-4} if precision == "float32" else {"rtol": 0.05, "atol": 0.05}
    for agent in (plain, other):
        agent.optimizer.scale.clamp_(max=64.0)  # of float16, which overflows at first until its scale has come down
    start = [p.detach().clone() for p in plain.parameters()]
    states = {agent: agent.initial(2) for agent in (plain, other)}
    rng = np.random.default_rng(0)
    for turn in range(8):
        obs = {"image": rng.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8), "reward": np.zeros(2, np.float32)}
        obs |= {"vector": rng.normal(size=(2, 5)).astype(np.float32), "is_first": np.ones(2, bool)}
        actions = []
        for agent in (plain, other):
            action, states[agent] = agent.policy(obs, states[agent], sample=False)
            actions.append(action)
        np.testing.assert_allclose(*actions, **near)
        if turn < 2:
            continue
        batch, noise = make_batch(plain, seed=turn), plain.draw_noise(B, T)
        (expected, latents), (found, copies) = plain.train_step(batch, noise), other.train_step(batch, noise)
        for name in ("world/loss", "world/recon_loss", "opt/bad_updates"):
            torch.testing.assert_close(found[name], expected[name], **near)
        torch.testing.assert_close(copies[0], latents[0], **near)
    moved, moved_too = (
        torch.cat([(p - before).flatten() for p, before in zip(agent.parameters(), start, strict=True)])
        for agent in (plain, other)
    )
    assert torch.nn.functional.cosine_similarity(moved, moved_too, dim=0) > (0.99 if precision == "float32" else 0.9)


def test_nothing_is_compiled_any_more_when_a_graph_is_captured():
    """Compiling reads the device, which a capture does not survive."""
    compiled, counts = [], []

    def backend(module, inputs):
        compiled.append(module)
        return module.forward

    captured = OnCPU(torch.compile(lambda tree: tree["x"] @ tree["weight"] + tree["bias"], backend=backend), warmup=2)
    weight = torch.nn.Parameter(torch.randn(4, 3))  # laid out as a parameter's view, as the policy's weights are
    for _ in range(4):
        with torch.inference_mode():
            captured({"x": torch.ones(2, 3), "weight": weight.t(), "bias": torch.zeros(1, 4).expand(2, 4)})
        counts.append(len(compiled))
    assert counts[1] == counts[3] > 0


def once_without_effect(agent, captured):
    """Capturing records and computes nothing; here the function runs, so what it changes is put back."""
    capture = captured.capture

    def wrapped(inputs):
        before = {name: value.clone() for name, value in agent.state_dict().items()}
        optimizer = agent.optimizer.state_dict()
        out = capture(inputs)
        for name, value in agent.state_dict().items():
            value.copy_(before[name])
        agent.optimizer.load_state_dict(optimizer)
        return out

    return wrapped


def test_late_gradients_are_computed_in_the_precision_of_the_products():
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
                seen.append({x.dtype for x in args})
            return function(*args, **(kwargs or {}))

    agent = make("--precision", "bfloat16")
    losses, _, _ = agent.losses(make_batch(agent))
    with Watch():
        agent.optimizer.backward(sum(loss.mean() for loss in losses.values()))
    assert len(seen) > 50 and all(dtypes == {torch.bfloat16} for dtypes in seen)
    agent.policy(
        {
            "image": np.zeros((1, 16, 16, 3), np.uint8),
            "vector": np.ones((1, 5), np.float32),
            "is_first": np.ones(1, bool),
        },
        agent.initial(1),
    )
    assert {weight.dtype for weight, _ in agent.layout[0].values()} == {torch.bfloat16}


def test_resuming_in_another_precision_keeps_the_loss_scale():
    full, half = make(), make("--precision", "float16")
    half.restore(full.checkpoint())
    assert float(half.optimizer.scale) == 2**15
    full.restore(half.checkpoint())
    assert float(full.optimizer.scale) == 1


def test_imag_last_of_one_leaves_no_transition():
    with pytest.raises(UserError, match="imag_last"):
        make("--imag_last", "1")


def test_graph_without_cuda_is_an_error_that_says_so():
    with pytest.raises(UserError, match="graph.*cpu"):
        make("--graph", "true")
