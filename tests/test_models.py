"""World model and behaviour: pairing, context, targets, and what every loss does and does not move.

The numbers of the behaviour are recomputed by loops in numpy from a toy world whose dynamics, rewards and ends are
known.
"""

import copy

import numpy as np
import pytest
import torch
from gymnasium import spaces as gs
from torch import nn

from distributions import Bernoulli, SquaredError
from models import ImagBehavior, WorldModel, frozen, total_loss
from networks import features
from optim import Optimizer

B, T, A, H = 3, 5, 2, 4
HORIZON = 10.0
VECTOR = {"pose": gs.Box(-np.inf, np.inf, (4,), np.float32)}
MIXED = VECTOR | {"image": gs.Box(0, 255, (8, 12, 3), np.uint8), "lives": gs.Discrete(3)}
CODER = {"units": 8, "layers": 1, "depth": 2, "mults": [1, 2]}
DYN = {"deter": 8, "hidden": 8, "stoch": 3, "discrete": 4, "blocks": 2}
REWARD = {"layers": 1, "units": 8, "dist": "symexp_twohot", "bins": 41, "outscale": 1.0}
CRITIC = REWARD | {"slow_regularizer": 1.0, "slow_target": False, "slow_target_update": 1, "slow_target_fraction": 0.02}
ACTOR = {
    "layers": 1,
    "units": 8,
    "unimix_ratio": 0.01,
    "min_std": 0.1,
    "max_std": 1.0,
    "entropy": 3e-4,
    "outscale": 1.0,
}
RETNORM = {"rate": 0.01, "limit": 1.0, "low": 0.05, "high": 0.95}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_world(spaces=VECTOR, **options) -> WorldModel:
    sections = {"encoder": CODER, "decoder": CODER | {"blocks": 2}, "dyn": DYN, "reward_head": REWARD}
    sections |= {"cont_head": {"layers": 1, "units": 8}, "horizon": HORIZON}
    for name, value in options.items():
        sections[name] = sections[name] | value if isinstance(value, dict) else value
    return WorldModel(spaces, A, **sections)


def make_behavior(feat_size: int, classes=(), **options) -> ImagBehavior:
    sections = {"actor": ACTOR, "critic": CRITIC, "retnorm": RETNORM, "imag_horizon": H, "horizon": HORIZON}
    for name, value in options.items():
        sections[name] = sections[name] | value if isinstance(value, dict) else value
    return ImagBehavior(feat_size, A, classes, **sections)


def make_batch(world: WorldModel | None = None, batch=B, time=T) -> dict:
    """A replayed batch of plausible values, with a latent before it and no flag set."""
    deter, noise_shape = (world.rssm.deter, world.rssm.noise_shape) if world else (2, (1,))
    discrete = bool(world and world.rssm.discrete)
    return {
        "pose": torch.randn(batch, time, 4),
        "image": torch.randint(0, 256, (batch, time, 8, 12, 3), dtype=torch.uint8),
        "lives": torch.randint(0, 3, (batch, time)),
        "action": torch.rand(batch, time, A) * 2 - 1,
        "reward": torch.randn(batch, time),
        "is_first": torch.zeros(batch, time, dtype=torch.bool),
        "is_last": torch.zeros(batch, time, dtype=torch.bool),
        "is_terminal": torch.zeros(batch, time, dtype=torch.bool),
        "context": {
            "deter": torch.randn(batch, deter).tanh().half(),
            "stoch": torch.randint(0, 4, (batch, noise_shape[0])).to(torch.uint8)
            if discrete
            else torch.randn(batch, *noise_shape).half(),
            "action": torch.rand(batch, A) * 2 - 1,
            "valid": torch.ones(batch, dtype=torch.bool),
        },
    }


def make_noise(world: WorldModel, behavior: ImagBehavior | None = None) -> dict:
    horizon = behavior.imag_horizon if behavior else H
    shape = world.rssm.noise_shape
    return {
        "post": torch.randn(B, T, *shape),
        "prior": torch.randn(horizon, B * T, *shape),
        "action": torch.randn(horizon + 1, B * T, A),
    }


def with_grad(module: nn.Module) -> set[str]:
    """Names of the parameters that a gradient other than zero has reached."""
    return {name for name, p in module.named_parameters() if p.grad is not None and (p.grad != 0).any()}


def clear(*modules: nn.Module) -> None:
    for module in modules:
        module.zero_grad(set_to_none=True)


def rooms(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def changed(one: torch.Tensor, two: torch.Tensor) -> list[list[bool]]:
    return (one != two).tolist()


def only(*places: tuple[int, int], time=T) -> list[list[bool]]:
    return [[(b, t) in places for t in range(time)] for b in range(B)]


# World model: pairing and context (traps 1, 2, 3)


def test_losses_have_one_number_per_step():
    world = make_world(MIXED)
    losses, post, metrics = world.loss(make_batch(world), make_noise(world)["post"])
    assert set(losses) == {"rec/pose", "rec/image", "rec/lives", "rew", "con", "dyn", "rep"}
    assert all(loss.shape == (B, T) for loss in losses.values())
    assert post["deter"].shape == (B, T, 8) and post["deter"].requires_grad
    assert all(value.shape == () and not value.requires_grad for value in metrics.values())
    np.testing.assert_allclose(
        metrics["world/recon_loss"], sum(losses[f"rec/{key}"].mean().item() for key in MIXED), rtol=1e-5
    )


def test_each_step_consumes_the_stored_action_of_the_step_before():
    world = make_world()
    batch = make_batch(world)
    batch["action"].requires_grad_()
    batch["context"]["action"].requires_grad_()
    post, _ = world.observe(batch, make_noise(world)["post"])
    for t in range(T):
        grads = torch.autograd.grad(
            post["deter"][:, t].sum(),
            (batch["action"], batch["context"]["action"]),
            retain_graph=True,
            allow_unused=True,
        )
        used = [False] * T if grads[0] is None else (grads[0] != 0).any(-1)[0].tolist()
        assert used == [s < t for s in range(T)], "a state knows the actions before it, not its own"
        assert (grads[1] != 0).all()


def test_targets_belong_to_their_own_step():
    world = make_world(MIXED)
    batch, noise = make_batch(world), make_noise(world)["post"]
    before, _, _ = world.loss(batch, noise)
    batch["reward"][1, 2] += 1.0
    batch["is_terminal"][2, 3] = True
    after, _, _ = world.loss(batch, noise)
    assert changed(before["rew"], after["rew"]) == only((1, 2))
    assert changed(before["con"], after["con"]) == only((2, 3))
    for key in ("rec/pose", "rec/image", "rec/lives", "dyn", "rep"):
        assert torch.equal(before[key], after[key])


def test_model_learns_what_an_action_did_in_its_place():
    """In this world the next observation *is* the action: only a right pairing can predict it open loop."""
    world = make_world({"pose": gs.Box(-1, 1, (A,), np.float32)}, kl_free=0.0, decoder={"vector_dist": "mse"})
    optimizer = torch.optim.Adam(world.parameters(), 2e-2)

    def sample(batch: int, time: int) -> dict:
        stream = torch.where(torch.rand(batch, time + 1, A) > 0.5, 0.7, -0.7)
        full = make_batch(world, batch, time)
        full["action"], full["context"]["action"] = stream[:, 1:], stream[:, 0]
        full["pose"] = stream[:, :-1].clone()  # step t shows the action of step t - 1
        return full

    for _ in range(100):
        losses, _, _ = world.loss(sample(64, 2), torch.zeros(64, 2, 3, 4))
        optimizer.zero_grad()
        (losses["rec/pose"] + losses["dyn"] + 0.1 * losses["rep"]).mean().backward()
        optimizer.step()
    test = sample(64, 5)
    predicted = world.predict(test, context=2)["pose"][:, 2:]
    share = {
        shift: ((predicted > 0) == (test["action"][:, 1 + shift : 4 + shift] > 0)).float().mean() for shift in (0, 1)
    }
    assert share[0] > 0.8, f"predicts the action before in {share[0]:.0%}"
    assert 0.35 < share[1] < 0.65, "and knows nothing of the one to come"


def test_first_trained_step_continues_from_the_context():
    """State and action of the step before the window go into the first step; its own flag says whether they count."""
    world = make_world()
    batch, noise = make_batch(world), make_noise(world)["post"]
    context = batch["context"]
    state = {"deter": context["deter"].float(), "stoch": torch.eye(4)[context["stoch"].long()]}
    tokens = {kind: (embed[:, 0], flag[:, 0]) for kind, (embed, flag) in world.encoder(batch).items()}
    expected = world.rssm.obs_step(state, context["action"], tokens, torch.zeros(B, dtype=torch.bool), noise[:, 0])
    post, _ = world.observe(batch, noise)
    for key, value in expected.items():
        torch.testing.assert_close(post[key][:, 0], value)


@pytest.mark.parametrize("how", ["invalid", "is_first"])
def test_context_that_does_not_count_is_a_zero_state_and_action(how):
    world = make_world()
    batch, noise = make_batch(world), make_noise(world)["post"]
    kept, _ = world.observe(batch, noise)
    if how == "invalid":
        batch["context"]["valid"][1] = False
    else:
        batch["is_first"][1, 0] = True
    post, _ = world.observe(batch, noise)
    assert torch.equal(post["deter"][[0, 2]], kept["deter"][[0, 2]]), "the others keep their context"
    tokens = {kind: (embed[:, 0], flag[:, 0]) for kind, (embed, flag) in world.encoder(batch).items()}
    no = torch.zeros(B, dtype=torch.bool)
    zero = world.rssm.obs_step(world.rssm.initial(B), torch.zeros(B, A), tokens, no, noise[:, 0])
    torch.testing.assert_close(post["deter"][1, 0], zero["deter"][1])
    assert not torch.equal(post["deter"][1], kept["deter"][1])
    # Whatever the unused context holds.
    batch["context"]["deter"][1], batch["context"]["action"][1] = 3.0, 1.0
    batch["context"]["stoch"][1] = 0
    again, _ = world.observe(batch, noise)
    assert torch.equal(again["deter"], post["deter"]) and torch.equal(again["logit"], post["logit"])


@pytest.mark.parametrize("discrete", [4, 0])
def test_latents_survive_the_replay(discrete):
    world = make_world(dyn={"discrete": discrete})
    batch, noise = make_batch(world), make_noise(world)["post"]
    post, _ = world.observe(batch, noise)
    deter, stoch = world.pack(post)
    assert deter.dtype == torch.float16 and deter.shape == (B, T, 8)
    assert stoch.dtype == (torch.uint8 if discrete else torch.float16) and stoch.shape == (B, T, 3)
    again = world.unpack(deter, stoch)
    assert again["deter"].dtype == torch.float32 and again["stoch"].shape == post["stoch"].shape
    torch.testing.assert_close(again["deter"], post["deter"], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(
        again["stoch"], post["stoch"], atol=0 if discrete else 1e-3, rtol=0 if discrete else 1e-3
    )


def test_a_window_can_be_continued_from_its_refreshed_latents():
    world = make_world()
    batch, noise = make_batch(world), make_noise(world)["post"]
    post, _ = world.observe(batch, noise)
    deter, stoch = world.pack(post)
    later = {key: value[:, 2:] for key, value in batch.items() if key != "context"}
    later["context"] = {"deter": deter[:, 1], "stoch": stoch[:, 1], "action": batch["action"][:, 1]}
    later["context"]["valid"] = torch.ones(B, dtype=torch.bool)
    continued, _ = world.observe(later, noise[:, 2:])
    torch.testing.assert_close(continued["deter"], post["deter"][:, 2:], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("imag_gradient", ["reinforce", "both"])
def test_losses_do_not_write_into_the_batch(imag_gradient):
    world = make_world(MIXED)
    behavior = make_behavior(world.rssm.feat_size, imag_gradient=imag_gradient)
    batch, noise = make_batch(world), make_noise(world, behavior)
    batch["is_first"][0, 0] = batch["is_first"][1, 3] = batch["is_last"][1, 2] = batch["is_terminal"][1, 2] = True
    batch["context"]["valid"][2] = False
    batch["action"] *= 5
    kept, kept_noise = copy.deepcopy(batch), copy.deepcopy(noise)
    losses, post, _ = world.loss(batch, noise["post"])
    more, _ = behavior.loss(world, post, batch, noise)
    sum(loss.mean() for loss in (losses | more).values()).backward()
    for now, then in ((batch, kept), (batch["context"], kept["context"]), (noise, kept_noise)):
        for key, value in now.items():
            if not isinstance(value, dict):
                assert torch.equal(value, then[key]), key


def test_absent_observations_are_not_scored():
    world = make_world(MIXED)
    batch, noise = make_batch(world), make_noise(world)["post"]
    batch["present/pose"] = torch.ones(B, T, dtype=torch.bool)
    batch["present/pose"][1, 2] = False
    losses, _, _ = world.loss(batch, noise)
    assert (losses["rec/pose"] == 0).tolist() == only((1, 2))
    assert (losses["rec/image"] > 0).all()


def test_nats_are_those_of_steps_that_have_the_observation():
    world = make_world(MIXED)
    batch, noise = make_batch(world), make_noise(world)["post"]
    whole = world.loss(batch, noise)[2]
    batch["present/pose"] = torch.zeros(B, T, dtype=torch.bool)
    batch["present/pose"][:, 2] = True
    losses, _, metrics = world.loss(batch, noise)
    found = losses["rec/pose"][:, 2].mean() + losses["rec/lives"].mean()
    torch.testing.assert_close(metrics["world/nats_vector"], found)
    torch.testing.assert_close(metrics["world/recon_pose"], losses["rec/pose"].mean())
    torch.testing.assert_close(whole["world/nats_image"], whole["world/recon_image"])


def test_a_kind_that_is_dropped_is_absent_to_the_encoder_and_predicted_nonetheless():
    world = make_world(MIXED, modality_dropout=0.3)
    batch, noise = make_batch(world), make_noise(world)["post"]
    kinds = list(world.encoder.kinds)
    drop = torch.full((B, len(kinds)), 0.31)
    drop[1, kinds.index("image")] = 0.29  # of the second window alone
    losses, dropped, _ = world.loss(batch, noise, drop)
    _, whole, _ = world.loss(batch, noise)
    absent = torch.ones(B, T, dtype=torch.bool)
    absent[1] = False
    _, flagged, _ = world.loss(batch | {"present/image": absent}, noise)
    torch.testing.assert_close(dropped["logit"], flagged["logit"])
    torch.testing.assert_close(dropped["logit"][::2], whole["logit"][::2])
    assert not torch.allclose(dropped["logit"][1], whole["logit"][1])
    assert (losses["rec/image"] > 0).all()


# World model: targets and KL (trap 5)


def test_free_nats_are_granted_per_step_after_the_sum():
    world = make_world(kl_free=1.0)
    # Step 0: three categoricals of a little each, more than 1 together. Step 1: nothing. Step 2: far apart.
    post = {"logit": torch.zeros(1, 3, 3, 4)}
    post["logit"][0, 0, :, 0], post["logit"][0, 2, :, 0] = 1.8, 6.0
    prior = {"logit": torch.zeros(1, 3, 3, 4)}
    p = 0.99 * torch.softmax(post["logit"], -1) + 0.01 / 4
    each = (p * (p * 4).log()).sum(-1)[0]
    assert (each[0] < 1).all() and each[0].sum() > 1, "clipping per categorical would give 3"
    assert each.sum(-1).mean() > 1, "clipping the mean would leave step 1 at 0"
    expected = torch.stack([each[0].sum(), torch.tensor(1.0), each[2].sum()])
    world.observe = lambda batch, noise, drop: (post | {"deter": torch.zeros(1, 3, 8), "stoch": post["logit"]}, prior)
    batch = make_batch(world, 1, 3)
    losses, _, metrics = world.loss(batch, torch.zeros(1, 3, 3, 4))
    for key in ("dyn", "rep"):
        torch.testing.assert_close(losses[key][0], expected)
    torch.testing.assert_close(metrics["world/kl_loss"], each.sum(-1).mean())


def test_each_kl_loss_moves_its_own_side():
    world = make_world(kl_free=0.0)
    for key, moved, still in (("dyn", "prior", "post"), ("rep", "post", "prior")):
        world = make_world(kl_free=0.0)
        losses, _, _ = world.loss(make_batch(world), make_noise(world)["post"])
        losses[key].sum().backward()
        names = with_grad(world.rssm)
        assert any(name.startswith(f"{moved}_out") for name in names), names
        assert not any(name.startswith(f"{still}_out") for name in names) or key == "dyn"
    # With one step, samples of the posterior cannot reach the prior through the recurrence.
    world = make_world(kl_free=0.0)
    losses, _, _ = world.loss(make_batch(world, B, 1), torch.randn(B, 1, 3, 4))
    losses["dyn"].sum().backward()
    assert not any(name.startswith(("post_out", "fusion")) for name in with_grad(world.rssm))
    assert "encoder" not in rooms(with_grad(world))


def test_within_the_free_nats_nothing_is_pushed():
    world = make_world(kl_free=1e3)
    losses, _, _ = world.loss(make_batch(world), make_noise(world)["post"])
    (losses["dyn"] + losses["rep"]).sum().backward()
    assert (losses["dyn"] == 1e3).all() and not with_grad(world)


@pytest.mark.parametrize("contdisc", [True, False])
def test_continue_target(contdisc):
    world = make_world(contdisc=contdisc, cont_head={"outscale": 0.0})
    with torch.no_grad():
        world.cont.out.bias.fill_(0.4)
    batch = make_batch(world)
    batch["is_terminal"][1, 2] = batch["is_last"][1, 2] = True
    batch["is_last"][2, 3] = True  # a time limit: the task goes on
    losses, _, _ = world.loss(batch, make_noise(world)["post"])
    p = 1 / (1 + np.exp(-0.4))
    goes_on = 1 - 1 / HORIZON if contdisc else 1.0
    expected = np.full((B, T), -(goes_on * np.log(p) + (1 - goes_on) * np.log(1 - p)))
    expected[1, 2] = -np.log(1 - p)
    np.testing.assert_allclose(losses["con"].detach(), expected, rtol=1e-5)


# World model: which heads move it


@pytest.mark.parametrize("heads", [("decoder", "reward", "cont"), ("reward",), ("cont",), ("decoder",), ()])
def test_grad_heads(heads):
    world = make_world(grad_heads=heads)
    for key, head, module in (("rec/pose", "decoder", "decoder"), ("rew", "reward", "reward"), ("con", "cont", "cont")):
        losses, _, _ = world.loss(make_batch(world), make_noise(world)["post"])
        clear(world)
        losses[key].mean().backward()
        moved = rooms(with_grad(world))
        assert moved == ({module, "rssm", "encoder"} if head in heads else {module})


def test_critic_moves_the_world_model_only_if_asked():
    for heads in (("critic",), ("decoder", "reward", "cont")):
        world = make_world(grad_heads=heads)
        behavior = make_behavior(world.rssm.feat_size)
        batch, noise = make_batch(world), make_noise(world, behavior)
        _, post, _ = world.loss(batch, noise["post"])
        losses, _ = behavior.loss(world, post, batch, noise)
        losses["repval"].mean().backward()
        assert rooms(with_grad(world)) == ({"rssm", "encoder"} if "critic" in heads else set())
        assert {name.split(".")[2] for name in with_grad(behavior)} == {"critic"}


def test_open_loop_prediction_ignores_what_comes_after_the_context():
    world = make_world(MIXED)
    batch = make_batch(world)
    kept = copy.deepcopy(batch)
    out = world.predict(batch, context=2)
    assert out.keys() == MIXED.keys()
    assert out["image"].shape == (B, T, 8, 12, 3) and out["pose"].shape == (B, T, 4) and out["lives"].shape == (B, T, 3)
    assert not any(value.requires_grad for value in out.values())
    for key in MIXED:
        batch[key][:, 2:] = make_batch(world)[key][:, 2:]
    batch["action"][:, -1] = 1.0  # chosen at the last step: nothing comes of it
    after = world.predict(batch, context=2)
    assert all(torch.equal(out[key], after[key]) for key in MIXED)
    for t, first in ((1, 2), (2, 3)):  # the action chosen at t shows from t + 1 on
        batch = copy.deepcopy(kept)
        batch["action"][:, t] = -batch["action"][:, t]
        moved = (world.predict(batch, context=2)["pose"] != out["pose"]).any(-1).any(0).tolist()
        assert moved == [s >= first for s in range(T)]
    batch = copy.deepcopy(kept)
    batch["pose"][:, 1] += 1
    moved = (world.predict(batch, context=2)["pose"] != out["pose"]).any(-1).any(0).tolist()
    assert moved[0] is False and all(moved[1:])


def test_first_imagined_steps_are_the_prior_under_recorded_actions():
    world = make_world()
    batch = make_batch(world)
    post, _ = world.observe(batch)
    state = {key: post[key][:, 1] for key in ("deter", "stoch")}
    out = world.predict(batch, context=2)["pose"]
    torch.testing.assert_close(out[:, 1], world.decoder(state)["pose"].mode())
    for t in (2, 3):
        state = world.rssm.img_step(state, batch["action"][:, t - 1])
        torch.testing.assert_close(out[:, t], world.decoder(state)["pose"].mode())


# Options of the seeds' generation

OPTIONS = {
    "default": ({}, {}),
    "gaussian": ({"dyn": {"discrete": 0}}, {}),
    "gru": ({"dyn": {"cell": "gru"}}, {}),
    "strided": (
        {"encoder": {"downsample": "stride", "kernel": 4}, "decoder": {"upsample": "transposed", "kernel": 4}},
        {},
    ),
    "plain mse": (
        {"decoder": {"image_dist": "mse", "vector_dist": "mse"}, "reward_head": {"dist": "mse"}},
        {"critic": {"dist": "mse"}},
    ),
    "normal": (
        {"decoder": {"image_dist": "normal", "vector_dist": "normal"}, "reward_head": {"dist": "normal"}},
        {"critic": {"dist": "normal"}},
    ),
    "symlog_disc": ({"reward_head": {"dist": "symlog_disc"}}, {"critic": {"dist": "symlog_disc"}}),
    "symlog_mse": ({"reward_head": {"dist": "symlog_mse"}}, {"critic": {"dist": "symlog_mse"}}),
    "contdisc off": ({"contdisc": False}, {"contdisc": False}),
    "slow target": ({}, {"critic": {"slow_target": True}}),
    "no reward_EMA": ({}, {"reward_EMA": False}),
    "dynamics": ({}, {"imag_gradient": "dynamics"}),
    "both, slow target": ({"dyn": {"discrete": 0}}, {"imag_gradient": "both", "critic": {"slow_target": True}}),
}
SCALES = {"rec": 1.0, "rew": 1.0, "con": 1.0, "dyn": 1.0, "rep": 0.1, "policy": 1.0, "value": 1.0, "repval": 0.3}


@pytest.mark.parametrize("classes", [(), (2,)], ids=["continuous", "discrete"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_run_and_every_weight_learns(name, classes):
    of_world, of_behavior = OPTIONS[name]
    world = make_world(MIXED, kl_free=0.0, **of_world)
    behavior = make_behavior(world.rssm.feat_size, classes, **of_behavior)
    batch, noise = make_batch(world), make_noise(world, behavior)
    losses, post, metrics = world.loss(batch, noise["post"])
    more, more_metrics = behavior.loss(world, post, batch, noise)
    assert more["policy"].shape == more["value"].shape == (B, T) and more["repval"].shape == (B, T - 1)
    assert all(loss.shape == (B, T) for loss in losses.values())
    loss = total_loss(losses | more, SCALES)
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(v) and v.shape == () for v in (metrics | more_metrics).values())
    for module in (world, behavior):
        trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        assert all(torch.isfinite(p.grad).all() for p in trained.values() if p.grad is not None)
        silent = set(trained) - with_grad(module)
        # A norm hides the bias before it only where there is a single channel; nothing else may stay silent.
        assert not silent, silent
    assert not any("slow_critic" in n for n, p in behavior.named_parameters() if p.requires_grad)


# Behaviour: imagination


@pytest.mark.parametrize("imag_gradient", ["reinforce", "both"])
def test_losses_in_two_parts_are_those_in_one(imag_gradient):
    """`observe` and `imagine` are the scans, `score` and `learn` all the rest, which can be compiled alone."""
    world = make_world(MIXED)
    behavior = make_behavior(world.rssm.feat_size, imag_gradient=imag_gradient)
    batch, noise = make_batch(world), make_noise(world, behavior)
    batch["is_first"][1, 3] = batch["is_last"][1, 2] = True
    retnorm = copy.deepcopy(behavior.streams["extrinsic"].retnorm.state_dict())

    def gradients(losses):
        clear(world, behavior)
        sum(loss.mean() for loss in losses.values()).backward()
        return {n: p.grad.clone() for m in (world, behavior) for n, p in m.named_parameters() if p.grad is not None}

    losses, post, metrics = world.loss(batch, noise["post"])
    more, more_metrics = behavior.loss(world, post, batch, noise)
    whole, whole_grads = losses | more, gradients(losses | more)

    behavior.streams["extrinsic"].retnorm.load_state_dict(retnorm)
    post, prior = world.observe(batch, noise["post"])
    losses, parts_metrics = world.score(post, prior, batch)
    start = {key: post[key].detach().flatten(0, 1) for key in ("deter", "stoch")}
    with frozen(world) if imag_gradient == "both" else torch.no_grad():
        traj = world.imagine(start, behavior._rollout_policy([], []), behavior.initial(B * T), H, noise)
    dist = behavior.actor(traj["feat"][:, :-1].detach())  # evaluated again, for all steps at once
    traj |= {
        "seen": traj["feat"],
        "log_prob": dist.log_prob(traj["action"][:, :-1].detach()),
        "entropy": dist.entropy(),
    }
    more, more_parts_metrics, _ = behavior.learn(world, traj, post, batch)
    parts = losses | more
    grads = gradients(parts)
    assert len(grads) > 40
    for one, two in (
        (parts, whole),
        (grads, whole_grads),
        (parts_metrics, metrics),
        (more_parts_metrics, more_metrics),
    ):
        assert one.keys() == two.keys()
        for key in one:
            torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-6, msg=key)


def test_imagination_has_one_more_state_and_action_than_steps():
    world = make_world()
    behavior = make_behavior(world.rssm.feat_size)
    post, _ = world.observe(make_batch(world))
    start = {key: post[key].detach().flatten(0, 1) for key in ("deter", "stoch")}
    noise = make_noise(world, behavior)
    seen = []

    def policy(feat, carry, is_first, noise):
        assert not is_first.any()
        seen.append(feat)
        return behavior.policy(feat, None, is_first, noise)[0], carry + 1

    traj = world.imagine(start, policy, 0, H, noise)
    assert traj["feat"].shape == (B * T, H + 1, world.rssm.feat_size) and traj["action"].shape == (B * T, H + 1, A)
    state = start
    for t in range(H + 1):
        assert torch.equal(traj["feat"][:, t], features(state)) and torch.equal(seen[t], traj["feat"][:, t])
        dist = behavior.actor(features(state))
        action = dist.mean + dist.std * noise["action"][t]
        assert torch.equal(traj["action"][:, t], action)
        if t < H:
            state = world.rssm.img_step(state, action, noise["prior"][t])
    with_mode, _ = behavior.policy(traj["feat"][:, 0], None, torch.zeros(B * T, dtype=torch.bool), None)
    assert torch.equal(with_mode, behavior.actor(traj["feat"][:, 0]).mode())


class Rssm(nn.Module):
    """s' = tanh(W [s, a] + b), without noise: the recurrence of the toy world."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2 + A, 2)

    def layout(self):
        return {}

    def img_step(self, state, action, noise=None, weights=None):
        deter = torch.tanh(self.linear(torch.cat([state["deter"], action], -1)))
        return {"deter": deter, "stoch": torch.zeros_like(state["stoch"])}


class ToyWorld(WorldModel):
    """A world model of single layers, whose numbers a loop can recompute. `imagine` is the real one."""

    def __init__(self, grad_heads=("critic",)):
        nn.Module.__init__(self)
        self.rssm = Rssm()
        self.reward_layer, self.cont_layer = nn.Linear(3, 1), nn.Linear(3, 1)
        self.grad_heads = grad_heads

    def reward(self, feat):
        return SquaredError(3 * self.reward_layer(feat).squeeze(-1), dims=0)

    def cont(self, feat):
        return Bernoulli(self.cont_layer(feat).squeeze(-1) + 1)


def toy(classes=(), **options):
    """A toy world, a behaviour, and what its loss takes. Values are of the size of the rewards."""
    options["critic"] = {"bins": 255} | options.get("critic", {})
    options["retnorm"] = {"rate": 0.5, "limit": 0.1}
    world, behavior = ToyWorld(), make_behavior(3, classes, **options)
    stream = behavior.streams["extrinsic"]
    with torch.no_grad():
        for n, head in enumerate((stream.critic, stream.slow_critic.model)):
            # Peaked around bins near zero, the slow critic elsewhere, so that mixing them up shows.
            head.out.bias.sub_(0.02 * (torch.arange(255) - 131 + 5 * n).float().square())
    batch = make_batch()
    batch["reward"] *= 3
    batch["is_last"][0, 2] = batch["is_terminal"][0, 2] = True
    batch["is_last"][1, 1] = True  # a time limit
    batch["is_last"][2, -1] = True
    post = {"deter": torch.randn(B, T, 2, requires_grad=True), "stoch": torch.zeros(B, T, 1)}
    noise = {"prior": torch.zeros(H, B * T, 1), "action": torch.randn(H + 1, B * T, A)}
    return world, behavior, post, batch, noise


def value_of(head, feat) -> np.ndarray:
    """Expected bin of a two-hot head, in double precision."""
    logits = head(feat).logits.detach().double()
    return (torch.softmax(logits, -1) * head.bins.double()).sum(-1).numpy()


def two_hot_loss(head, feat, targets: np.ndarray) -> np.ndarray:
    """Cross entropy with two-hot targets [...], by interpolation between log-probabilities of the bins."""
    log_probs = torch.log_softmax(head(feat).logits.detach().double(), -1).numpy()
    bins, out = head.bins.double().numpy(), np.zeros(targets.shape)
    for index, target in np.ndenumerate(targets):
        k = int(np.clip(np.searchsorted(bins, target), 1, len(bins) - 1))
        share = np.clip((target - bins[k - 1]) / (bins[k] - bins[k - 1]), 0, 1)
        out[index] = -(1 - share) * log_probs[index][k - 1] - share * log_probs[index][k]
    return out


def by_hand(world, behavior, post, batch, noise, *, contdisc=True, slow_target=False, ema=True, classes=()) -> dict:
    """All losses of a behaviour from ALGORITHM.md's equations, one number at a time."""
    stream, lam, gamma, count = behavior.streams["extrinsic"], 0.95, 1 - 1 / HORIZON, B * T
    critic, slow = stream.critic, stream.slow_critic.model
    with torch.no_grad():
        state = {key: value.flatten(0, 1) for key, value in post.items()}
        feats, log_prob, entropy = [], np.zeros((count, H + 1)), np.zeros((count, H + 1))
        for t in range(H + 1):
            feat = torch.cat([state["deter"], state["stoch"]], -1)
            feats.append(feat)
            hidden = behavior.actor.mlp(feat)
            if classes:
                logits = behavior.actor.logits[0](hidden).double()
                probs = 0.99 * torch.softmax(logits, -1) + 0.01 / A
                chosen = (probs.log() + noise["action"][t]).argmax(-1)
                action = torch.eye(A)[chosen]
                log_prob[:, t] = probs.log().gather(-1, chosen[:, None])[:, 0]
                entropy[:, t] = -(probs * probs.log()).sum(-1)
            else:
                mean = torch.tanh(behavior.actor.mean(hidden))
                std = 0.9 * torch.sigmoid(behavior.actor.std(hidden) + 2) + 0.1
                action = mean + std * noise["action"][t]
                normal = torch.distributions.Normal(mean.double(), std.double())
                log_prob[:, t], entropy[:, t] = normal.log_prob(action).sum(-1), normal.entropy().sum(-1)
            state = world.rssm.img_step(state, action)
        feat = torch.stack(feats, 1)
        reward = (3 * world.reward_layer(feat)[..., 0]).double().numpy()
        cont = torch.sigmoid(world.cont_layer(feat)[..., 0] + 1).double().numpy()
        value, slow_value = value_of(critic, feat), value_of(slow, feat)
        boot = slow_value if slow_target else value
        disc = 1.0 if contdisc else gamma
        ret, weight = np.zeros((count, H)), np.zeros((count, H))
        for n in range(count):
            following = boot[n, H]
            for t in reversed(range(H)):
                live = disc * cont[n, t + 1]
                following = reward[n, t + 1] + live * ((1 - lam) * boot[n, t + 1] + lam * following)
                ret[n, t] = following
            for t in range(H):
                weight[n, t] = np.prod(disc * cont[n, : t + 1]) / disc
        lo, hi = (0.5 * np.percentile(ret, q) for q in (5, 95))
        scale = max(0.1, hi - lo) if ema else 1.0
        advantage = (ret - value[:, :-1]) / scale
        policy = -(weight * (log_prob[:, :-1] * advantage + 3e-4 * entropy[:, :-1]))
        values = two_hot_loss(critic, feat[:, :-1], ret) + two_hot_loss(critic, feat[:, :-1], slow_value[:, :-1])

        replayed = torch.cat([post["deter"], post["stoch"]], -1)
        first, slow_value = ret[:, 0].reshape(B, T), value_of(slow, replayed)
        last, terminal, reward = (batch[key].double().numpy() for key in ("is_last", "is_terminal", "reward"))
        ret_replay = np.zeros((B, T - 1))
        for b in range(B):
            following = first[b, T - 1]
            for t in reversed(range(T - 1)):
                lam_t = lam * (1 - last[b, t + 1])
                following = reward[b, t + 1] + gamma * (1 - terminal[b, t + 1]) * (
                    (1 - lam_t) * first[b, t + 1] + lam_t * following
                )
                ret_replay[b, t] = following
        repval = two_hot_loss(critic, replayed[:, :-1], ret_replay)
        repval = (repval + two_hot_loss(critic, replayed[:, :-1], slow_value[:, :-1])) * (1 - last[:, :-1])
    return {
        "policy": policy.mean(1).reshape(B, T),
        "value": (weight * values).mean(1).reshape(B, T),
        "repval": repval,
        "quantiles": (lo, hi),
    }


@pytest.mark.parametrize("contdisc", [True, False])
@pytest.mark.parametrize(
    "slow_target, ema, classes", [(False, True, ()), (True, True, ()), (False, False, ()), (False, True, (A,))]
)
def test_losses_of_the_behaviour_by_hand(contdisc, slow_target, ema, classes):
    world, behavior, *inputs = toy(classes, contdisc=contdisc, critic={"slow_target": slow_target}, reward_EMA=ema)
    options = {"contdisc": contdisc, "slow_target": slow_target, "ema": ema, "classes": classes}
    expected = by_hand(world, behavior, *inputs, **options)
    losses, _ = behavior.loss(world, *inputs)
    assert losses.keys() == {"policy", "value", "repval"}
    for key, loss in losses.items():
        np.testing.assert_allclose(loss.detach(), expected[key], rtol=1e-3, atol=1e-4, err_msg=key)
    if ema:  # and they were updated before they scaled the advantage: at 0 the scale would have been its floor
        retnorm = behavior.streams["extrinsic"].retnorm
        np.testing.assert_allclose([retnorm.lo, retnorm.hi], expected["quantiles"], rtol=1e-4)
        assert retnorm.scale > 2 * retnorm.limit


@pytest.mark.parametrize("contdisc", [True, False])
def test_first_weight_holds_the_chance_that_the_start_is_no_end(contdisc):
    behavior = make_behavior(3, contdisc=contdisc)
    cont = torch.tensor([[0.9, 0.5, 1.0], [0.0, 1.0, 1.0]])
    gamma = 1.0 if contdisc else 1 - 1 / HORIZON
    expected = torch.tensor([[0.9, 0.45 * gamma, 0.45 * gamma**2], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(behavior._weight(cont), expected)


def test_weight_leaves_out_the_outcome_of_the_action():
    """Whether the imagined task ends in step t + 1 changes what action t earned, not how much it counts."""
    behavior = make_behavior(3)
    cont = torch.full((1, 4), 0.9)
    ended = cont.clone()
    ended[0, 2] = 0
    same = behavior._weight(cont)[0] == behavior._weight(ended)[0]
    assert same.tolist() == [True, True, False, False]


# Behaviour: gradients


def policy_gradient(behavior: ImagBehavior) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in behavior.actor.parameters()])


@pytest.mark.parametrize("imag_gradient", ["reinforce", "dynamics", "both"])
@pytest.mark.parametrize("classes", [(), (A,)], ids=["continuous", "discrete"])
def test_what_each_loss_of_the_behaviour_moves(imag_gradient, classes):
    world = make_world()
    behavior = make_behavior(world.rssm.feat_size, classes, imag_gradient=imag_gradient)
    batch, noise = make_batch(world), make_noise(world, behavior)
    owners = {"policy": {"actor"}, "value": {"critic"}, "repval": {"critic"}}
    for key, owner in owners.items():
        clear(world, behavior)
        _, post, _ = world.loss(batch, noise["post"])
        losses, _ = behavior.loss(world, post, batch, noise)
        losses[key].mean().backward()
        names = with_grad(behavior)
        assert {"actor" if name.startswith("actor") else name.split(".")[2] for name in names} == owner
        assert rooms(with_grad(world)) == ({"rssm", "encoder"} if key == "repval" else set()), key
    assert all(p.requires_grad for p in world.parameters()), "what was frozen is thawed"
    assert all(p.requires_grad for p in behavior.streams["extrinsic"].critic.parameters())


@pytest.mark.parametrize("imag_gradient", ["reinforce", "dynamics"])
def test_imagination_starts_without_gradient(imag_gradient):
    world, behavior, post, batch, noise = toy(imag_gradient=imag_gradient)
    losses, _ = behavior.loss(world, post, batch, noise)
    for key in ("policy", "value"):
        assert torch.autograd.grad(losses[key].sum(), post["deter"], retain_graph=True, allow_unused=True)[0] is None
    (grad,) = torch.autograd.grad(losses["repval"].sum(), post["deter"])
    used = (grad != 0).any(-1)
    assert used[1].tolist() == [True, False, True, True, False], "not where the episode is over, not at the last step"


def test_reinforce_gradient_is_that_of_the_log_probabilities():
    """Actions, advantages and weights are held: only the log-probabilities move."""
    world, behavior, *inputs = toy(imag_gradient="reinforce", actor={"entropy": 0.0})
    losses, _ = behavior.loss(world, *inputs)
    losses["policy"].mean().backward()
    start = {key: value.detach().flatten(0, 1) for key, value in inputs[0].items()}
    with torch.no_grad():
        traj = world.imagine(start, behavior._rollout_policy([], []), None, H, inputs[2])
        factor = -losses["policy"].flatten()  # weighted mean of log π times advantage, at the weights as they are
        base = behavior.actor(traj["feat"]).log_prob(traj["action"])[:, :-1]
        cont = world.cont(traj["feat"]).prob
        stream = behavior.streams["extrinsic"]
        value = stream.critic(traj["feat"]).mode()
        ret = torch.zeros(B * T, H)
        following = value[:, -1]
        reward = world.reward(traj["feat"]).mode()
        for t in reversed(range(H)):
            following = reward[:, t + 1] + cont[:, t + 1] * (0.05 * value[:, t + 1] + 0.95 * following)
            ret[:, t] = following
        held = torch.cumprod(cont, 1)[:, :-1] * (ret - value[:, :-1]) / stream.retnorm.scale
        torch.testing.assert_close((held * base).mean(1), factor, rtol=1e-3, atol=1e-4)
    loss = -(held * behavior.actor(traj["feat"]).log_prob(traj["action"])[:, :-1]).mean()
    for p in behavior.actor.parameters():
        (expected,) = torch.autograd.grad(loss, p, retain_graph=True)
        torch.testing.assert_close(p.grad, expected, rtol=1e-3, atol=1e-5)


def open_loop_policy(behavior: ImagBehavior) -> None:
    """Takes the state out of the policy: its actions depend on the output layers' biases alone."""
    with torch.no_grad():
        behavior.actor.mean.weight.zero_()
        behavior.actor.std.weight.zero_()
        behavior.actor.mean.bias.copy_(torch.tensor([0.3, -0.4]))


@pytest.mark.parametrize("slow_target", [False, True])
def test_dynamics_gradient_against_finite_differences(double, slow_target):
    """d(return)/d(actor) through dynamics, reward and value of the toy world, whose ends are constant."""
    world, behavior, *inputs = toy(
        imag_gradient="dynamics", actor={"entropy": 0.0}, critic={"slow_target": slow_target}
    )
    with torch.no_grad():
        world.cont_layer.weight.zero_()  # so that the discount in the return does not depend on the actions either
    open_loop_policy(behavior)
    losses, _ = behavior.loss(world, *inputs)
    losses["policy"].mean().backward()
    stream = behavior.streams["extrinsic"]
    critic, scale = stream.slow_critic.model if slow_target else stream.critic, stream.retnorm.scale.item()
    cont = 1 / (1 + np.exp(-1 - world.cont_layer.bias.item()))
    noise, post = inputs[2]["action"], inputs[0]

    def objective() -> float:
        """Mean of weighted returns: the surrogate loss without its baseline, which does not depend on the actor."""
        with torch.no_grad():
            state = {key: value.flatten(0, 1) for key, value in post.items()}
            feats = []
            for t in range(H + 1):
                feats.append(torch.cat([state["deter"], state["stoch"]], -1))
                mean = torch.tanh(behavior.actor.mean.bias)
                std = 0.9 * torch.sigmoid(behavior.actor.std.bias + 2) + 0.1
                state = world.rssm.img_step(state, mean + std * noise[t])
            feat = torch.stack(feats, 1)
            reward, value = 3 * world.reward_layer(feat)[..., 0], torch.from_numpy(value_of(critic, feat))
        total, following = 0.0, value[:, H]
        for t in reversed(range(H)):
            following = reward[:, t + 1] + cont * (0.05 * value[:, t + 1] + 0.95 * following)
            total -= (cont ** (t + 1) * following / scale).mean().item() / H
        return total

    step = 1e-5
    for layer in (behavior.actor.mean, behavior.actor.std):
        for i in range(A):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    layer.bias[i] += sign * step
                    ends.append(objective())
                    layer.bias[i] -= sign * step
            numeric = (ends[0] - ends[1]) / (2 * step)
            np.testing.assert_allclose(layer.bias.grad[i].item(), numeric, rtol=1e-4, atol=1e-9)
            assert abs(numeric) > 1e-4
    assert not with_grad(world) and not with_grad(stream)


def test_dynamics_gradient_goes_through_actions_not_through_what_the_policy_saw():
    behavior, feat = make_behavior(3), torch.randn(4, 3, requires_grad=True)
    scores = []
    policy = behavior._rollout_policy([], scores)
    action, _ = policy(feat, None, torch.zeros(4, dtype=torch.bool), torch.zeros(4, A))
    assert action.requires_grad
    for value in (action, *scores[0]):
        assert torch.autograd.grad(value.sum(), feat, allow_unused=True, retain_graph=True)[0] is None
    # What is scored is the action that was taken, and the log-probability does not move it.
    dist = behavior.actor(feat.detach())
    assert torch.equal(scores[0][0], dist.log_prob(action)) and torch.equal(scores[0][1], dist.entropy())
    found, moved = (
        torch.autograd.grad(log_prob.sum(), behavior.actor.mean.bias)[0]
        for log_prob in (scores[0][0], dist.log_prob(action.detach()))
    )
    assert torch.equal(found, moved)
    with torch.no_grad():
        action, _ = policy(feat, None, torch.zeros(4, dtype=torch.bool), torch.zeros(4, A))
    assert not action.requires_grad and all(value.requires_grad for value in scores[1])


@pytest.mark.parametrize("classes", [(), (A,)], ids=["continuous", "discrete"])
def test_both_mixes_dynamics_into_reinforce(classes):
    parts = {}
    for name in ("reinforce", "dynamics", "both"):
        torch.manual_seed(0)
        world, behavior, *inputs = toy(classes, imag_gradient=name, imag_gradient_mix=0.3)
        losses, _ = behavior.loss(world, *inputs)
        losses["policy"].mean().backward()
        parts[name] = losses["policy"].detach(), policy_gradient(behavior)
    for both, dynamics, reinforce in zip(parts["both"], parts["dynamics"], parts["reinforce"], strict=True):
        torch.testing.assert_close(both, 0.3 * dynamics + 0.7 * reinforce, rtol=1e-4, atol=1e-5)
    assert (parts["dynamics"][1] - parts["reinforce"][1]).abs().max() > 1e-3


def test_entropy_is_sought():
    world, behavior, *inputs = toy(actor={"entropy": 1e3, "outscale": 0.01})
    losses, _ = behavior.loss(world, *inputs)
    losses["policy"].mean().backward()
    assert (behavior.actor.std.bias.grad < 0).all(), "a step down the gradient widens the policy"


# Replay value loss: time limit against termination


def replay_targets(is_last: bool, is_terminal: bool) -> tuple[torch.Tensor, ...]:
    """(imagined returns [B, T], replay returns [B, T-1], repval, rewards) with these flags at step 2 of row 0."""
    world, behavior, post, batch, noise = toy()
    batch["is_last"].zero_()
    batch["is_terminal"].zero_()
    batch["is_last"][0, 2], batch["is_terminal"][0, 2] = is_last, is_terminal
    stream, seen = behavior.streams["extrinsic"], []
    original = stream.value_loss
    stream.value_loss = lambda dist, target, slow: seen.append(target) or original(dist, target, slow)
    losses, _ = behavior.loss(world, post, batch, noise)
    imagined, replayed = seen
    return imagined[:, 0].reshape(B, T), replayed, losses["repval"], batch["reward"]


def test_time_limit_bootstraps_and_termination_does_not():
    gamma = 1 - 1 / HORIZON
    boot, target, loss, reward = replay_targets(is_last=True, is_terminal=True)
    torch.testing.assert_close(target[0, 1], reward[0, 2])  # nothing follows a termination
    assert loss[0, 2] == 0 and loss[0, 1] > 0
    boot, target, loss, reward = replay_targets(is_last=True, is_terminal=False)
    torch.testing.assert_close(target[0, 1], reward[0, 2] + gamma * boot[0, 2])  # a time limit hides what follows
    assert loss[0, 2] == 0 and loss[0, 1] > 0
    boot, target, loss, reward = replay_targets(is_last=False, is_terminal=False)
    torch.testing.assert_close(target[0, 1], reward[0, 2] + gamma * (0.05 * boot[0, 2] + 0.95 * target[0, 2]))
    assert loss[0, 2] > 0
    torch.testing.assert_close(target[:, -1], reward[:, -1] + gamma * boot[:, -1])  # the last step only bootstraps


# Slow critic, scales, freezing


def test_slow_critic_starts_equal_and_follows():
    behavior = make_behavior(3)
    stream = behavior.streams["extrinsic"]
    feat = torch.randn(4, 3)
    assert torch.equal(stream.critic(feat).mode(), stream.slow_critic(feat).mode())
    before = stream.slow_critic.model.out.bias.clone()
    with torch.no_grad():
        stream.critic.out.bias.add_(1.0)
    behavior.after_step()
    torch.testing.assert_close(stream.slow_critic.model.out.bias, before + 0.02)


def test_slow_critic_follows_weights_that_an_optimizer_holds():
    behavior = make_behavior(3)
    stream = behavior.streams["extrinsic"]
    optimizer = Optimizer({"critic": (stream.critic.named_parameters(), 0.1)}, warmup=0)
    start = stream.critic.out.weight.detach().clone()
    optimizer.step(stream.critic(torch.randn(4, 3)).loss(torch.ones(4)).mean())
    assert torch.equal(stream.slow_critic.model.out.weight, start)
    behavior.after_step()
    torch.testing.assert_close(stream.slow_critic.model.out.weight, start + 0.02 * (stream.critic.out.weight - start))


def test_total_loss_is_the_sum_of_scaled_means():
    losses = {"rec/a": torch.full((B, T), 2.0), "rec/b": torch.full((B, T), 3.0), "repval": torch.full((B, T - 1), 5.0)}
    torch.testing.assert_close(total_loss(losses, {"rec": 0.5, "repval": 0.3}), torch.tensor(1.0 + 1.5 + 1.5))
    torch.testing.assert_close(total_loss(losses, {"rec": 0.5, "rec/b": 2.0, "repval": 0.0}), torch.tensor(1.0 + 6.0))


def test_loss_without_a_scale_and_scale_without_a_loss_are_errors():
    losses = {"rec/a": torch.ones(B, T), "rew": torch.ones(B, T)}
    with pytest.raises(KeyError, match="without a scale.*rew"):
        total_loss(losses, {"rec": 1.0})
    with pytest.raises(KeyError, match="without a loss.*curiosity"):
        total_loss(losses, {"rec": 1.0, "rew": 1.0, "curiosity": 1.0})


def test_frozen_lets_gradient_through_and_thaws_even_after_an_error():
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    x = torch.randn(4, 3, requires_grad=True)
    with pytest.raises(ZeroDivisionError), frozen(layer):
        layer(x).sum().backward()
        raise ZeroDivisionError
    assert layer.weight.grad is None and (x.grad != 0).any()
    assert layer.weight.requires_grad and not layer.bias.requires_grad, "what was frozen before stays so"
