"""Kinds of observation: which keys belong to which, how they go in, how they come out and are scored."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium import spaces as gs
from torch import nn

from distributions import Joint, Normal, OneHot, SquaredError
from envs.text import Bytes, TokenSpace
from errors import UserError
from modalities import MODALITY_CONFIGS, ModalityConfig, active, audio, image, kinds_of, select, text, vector
from networks import MultiDecoder, MultiEncoder

ROOT = Path(__file__).resolve().parent.parent
IMAGE = gs.Box(0, 255, (16, 16, 3), np.uint8)
POSE = gs.Box(-np.inf, np.inf, (3,), np.float32)
SPACES = {"image": IMAGE, "pose": POSE, "lives": gs.Discrete(4), "ram": gs.Box(0, 255, (8,), np.uint8)}
CNN = {"depth": 2, "mults": [1, 2], "kernel": 5}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def frames(*lead: int, shape=(16, 16, 3)) -> torch.Tensor:
    return torch.randint(0, 256, (*lead, *shape), dtype=torch.uint8)


# Choosing keys


def test_kinds():
    def of(space):
        return kinds_of(space, MODALITY_CONFIGS)

    assert of(IMAGE) == ["image"]
    assert of(gs.Discrete(3)) == of(gs.MultiDiscrete([2, 3])) == of(gs.Box(0, 9, (2, 3, 4, 5))) == ["vector"]
    for space in (POSE, gs.Box(0, 1, (2, 2)), gs.Box(0, 1, (16, 16, 3), np.float32)):
        assert of(space) == ["vector", "audio"]
    assert of(gs.Box(0, 9, (5,), np.int32)) == ["vector", "text"]
    assert of(gs.Text(5)) == []


def test_select_sorts_keys_into_kinds():
    chosen = select(SPACES, MODALITY_CONFIGS, {"mlp_keys": ".*", "cnn_keys": ".*"}, "encoder")
    assert {kind: list(keys) for kind, keys in chosen.items()} == {
        "vector": ["lives", "pose", "ram"],
        "image": ["image"],
    }
    chosen = select(SPACES, MODALITY_CONFIGS, {"mlp_keys": "pose|lives", "cnn_keys": "$^"}, "encoder")
    assert {kind: list(keys) for kind, keys in chosen.items()} == {"vector": ["lives", "pose"]}
    # A pattern matches the whole key.
    options = {"mlp_keys": "pose", "cnn_keys": ""}
    assert list(select(SPACES | {"pose2": POSE}, MODALITY_CONFIGS, options, "encoder")["vector"]) == ["pose"]
    # `.*` may find nothing, as long as something else is there.
    assert list(select({"pose": POSE}, MODALITY_CONFIGS, {}, "encoder")) == ["vector"]


@pytest.mark.parametrize("patterns", [{"mlp_keys": "psoe", "cnn_keys": ".*"}, {"mlp_keys": ".*", "cnn_keys": "img"}])
@pytest.mark.parametrize("where", ["encoder", "decoder"])
def test_pattern_that_matches_nothing_is_an_error_that_lists_the_keys(patterns, where):
    with pytest.raises(UserError) as error:
        select(SPACES, MODALITY_CONFIGS, patterns, where)
    option, pattern = next((k, v) for k, v in patterns.items() if v != ".*")
    assert f"{where}.{option}" in str(error.value) and f"'{pattern}'" in str(error.value)
    assert all(key in str(error.value) for key in SPACES)


def test_nothing_chosen_at_all_is_an_error_that_lists_the_keys():
    with pytest.raises(UserError, match="pose"):
        select(SPACES, MODALITY_CONFIGS, {"mlp_keys": "", "cnn_keys": "$^"}, "encoder")
    with pytest.raises(UserError, match="speech"):
        select({"speech": gs.Text(5)}, MODALITY_CONFIGS, {}, "encoder")


# Images


def test_frames_are_scaled_once():
    """uint8 0..255 goes into the first layer as -0.5..0.5 and is scored as 0..1."""
    encoder = image.ImageEncoder({"image": IMAGE}, **CNN)
    seen = []
    encoder.stages[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    obs = frames(2, 5)
    obs[0, 0, 0, 0] = torch.tensor([0, 51, 255])
    kept = obs.clone()
    encoder({"image": obs}, {})
    assert seen[0].shape == (10, 3, 16, 16)
    expected = torch.from_numpy(obs.numpy() / 255 - 0.5).float()
    torch.testing.assert_close(seen[0].permute(0, 2, 3, 1).unflatten(0, (2, 5)), expected)
    torch.testing.assert_close(seen[0][0, :, 0, 0], torch.tensor([-0.5, -0.3, 0.5]))
    assert torch.equal(obs, kept), "the stored frames stay"
    decoder = image.ImageDecoder({"image": IMAGE}, 8, 6, units=8, blocks=2, **CNN)
    torch.testing.assert_close(decoder.target("image", obs), expected + 0.5)


@pytest.mark.parametrize("downsample, upsample", [("pool", "nearest"), ("stride", "transposed")])
@pytest.mark.parametrize("shape", [(16, 16, 3), (24, 40, 1), (8, 64, 4)])
@pytest.mark.parametrize("kernel", [4, 5])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_images_of_any_size_come_out_as_they_go_in(shape, kernel, downsample, upsample):
    spaces = {"image": gs.Box(0, 255, shape, np.uint8)}
    options = {"depth": 2, "mults": [1, 2, 2], "kernel": kernel}
    encoder = image.ImageEncoder(spaces, downsample=downsample, **options)
    embed = encoder({"image": frames(2, 3, shape=shape)}, {})
    assert embed.shape == (2, 3, encoder.out_size)
    assert encoder.out_size == shape[0] // 8 * (shape[1] // 8) * 4
    decoder = image.ImageDecoder(spaces, 8, 6, units=8, blocks=2, upsample=upsample, **options)
    dist = decoder(torch.randn(2, 3, 8), torch.randn(2, 3, 6))["image"]
    assert dist.mode().shape == (2, 3, *shape)
    assert dist.loss(decoder.target("image", frames(2, 3, shape=shape))).shape == (2, 3)


@pytest.mark.parametrize("size", [(60, 64), (64, 50), (3, 3), (100, 20)])
def test_size_that_cannot_be_halved_names_one_that_can(size):
    spaces, options = {"image": gs.Box(0, 255, (*size, 3), np.uint8)}, {"depth": 2, "mults": [1, 1, 1, 2]}
    messages = []
    for build in (
        lambda: image.ImageEncoder(spaces, **options),
        lambda: image.ImageDecoder(spaces, 8, 6, units=8, blocks=2, **options),
    ):
        with pytest.raises(UserError, match=rf"{size[0]}x{size[1]}.*4 times.*multiples of 16") as error:
            build()
        messages.append(str(error.value))
    named = [int(n) for n in re.search(r"--image_size (\d+) (\d+)", messages[0]).groups()]
    image.ImageEncoder({"image": gs.Box(0, 255, (*named, 3), np.uint8)}, **options)


def test_several_images_are_stacked_and_taken_apart():
    spaces = {"left": IMAGE, "mask": gs.Box(0, 255, (16, 16, 1), np.uint8)}
    encoder = image.ImageEncoder(spaces, **CNN)
    assert encoder.stages[0].conv.in_channels == 4
    obs = {"left": frames(2), "mask": frames(2, shape=(16, 16, 1))}
    assert encoder(obs, {}).shape == (2, encoder.out_size)
    decoder = image.ImageDecoder(spaces, 8, 6, units=8, blocks=2, **CNN)
    dists = decoder(torch.randn(2, 8), torch.randn(2, 6))
    assert {key: dist.mode().shape[1:] for key, dist in dists.items()} == {"left": (16, 16, 3), "mask": (16, 16, 1)}
    other = {"left": IMAGE, "right": gs.Box(0, 255, (16, 32, 3), np.uint8)}
    with pytest.raises(UserError, match="left.*right.*image_size"):
        image.ImageEncoder(other, **CNN)


def test_absent_image_does_not_matter():
    encoder = image.ImageEncoder({"image": IMAGE}, **CNN)
    present = {"image": torch.tensor([True, False])}
    one, two = frames(2), frames(2)
    two[0] = one[0]
    assert torch.equal(encoder({"image": one}, present), encoder({"image": two}, present))
    assert not torch.equal(encoder({"image": one}, {}), encoder({"image": two}, {}))


def test_image_loss_is_summed_over_pixels():
    decoder = image.ImageDecoder({"image": IMAGE}, 8, 6, units=8, blocks=2, **CNN)
    obs = frames(2, 3)
    dist = decoder(torch.randn(2, 3, 8), torch.randn(2, 3, 6))["image"]
    mode = dist.mode().detach().double().numpy()
    assert 0 < mode.min() and mode.max() < 1
    expected = ((mode - obs.double().numpy() / 255) ** 2).sum((-1, -2, -3))
    np.testing.assert_allclose(dist.loss(decoder.target("image", obs)).detach(), expected, rtol=1e-5)


@pytest.mark.parametrize("dist, kind", [("sigmoid_mse", SquaredError), ("mse", SquaredError), ("normal", Normal)])
def test_image_distributions_start_at_mid_grey(dist, kind):
    decoder = image.ImageDecoder({"image": IMAGE}, 8, 6, units=8, blocks=2, image_dist=dist, outscale=0.0, **CNN)
    out = decoder(torch.randn(2, 8), torch.randn(2, 6))["image"]
    assert isinstance(out, kind)
    torch.testing.assert_close(out.mode(), torch.full((2, 16, 16, 3), 0.5))


def test_decoder_blocks_must_divide():
    with pytest.raises(UserError, match="decoder.blocks is 3"):
        image.ImageDecoder({"image": IMAGE}, 8, 6, units=8, blocks=3, **CNN)


def test_decoder_sees_both_parts_of_the_state():
    decoder = image.ImageDecoder({"image": IMAGE}, 8, 6, units=8, blocks=2, **CNN)
    deter, stoch = torch.randn(1, 8, requires_grad=True), torch.randn(1, 6, requires_grad=True)
    grads = torch.autograd.grad(decoder(deter, stoch)["image"].mode().sum(), (deter, stoch))
    assert all((grad != 0).all() for grad in grads)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("lead", [(37,), (4, 9), (1, 1)], ids=str)
def test_many_frames_are_coded_as_each_alone(lead, recompute):
    """On a CPU frames go through in pieces: order and gradients are those of all together."""
    spaces = {"left": IMAGE, "mask": gs.Box(0, 255, (16, 16, 1), np.uint8)}
    encoder = image.ImageEncoder(spaces, recompute=recompute, **CNN).double()
    obs = {"left": frames(*lead), "mask": frames(*lead, shape=(16, 16, 1))}
    embed = encoder(obs, {})
    one = [encoder({key: value.flatten(0, -4)[n] for key, value in obs.items()}, {}) for n in range(np.prod(lead))]
    check_equal(embed, torch.stack(one).view(*lead, -1), encoder)

    decoder = image.ImageDecoder(spaces, 8, 6, units=8, blocks=2, recompute=recompute, **CNN).double()
    deter, stoch = torch.randn(*lead, 8).double(), torch.randn(*lead, 6).double()
    dists = decoder(deter, stoch)
    ones = [decoder(d, s) for d, s in zip(deter.flatten(0, -2), stoch.flatten(0, -2), strict=True)]
    for key in spaces:
        expected = torch.stack([dist[key].mode() for dist in ones]).view(*lead, *spaces[key].shape)
        check_equal(dists[key].mode(), expected, decoder)


def check_equal(found: torch.Tensor, expected: torch.Tensor, module: torch.nn.Module) -> None:
    """Values, and the gradients of every weight."""
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    weight = torch.randn_like(expected)
    grads = [
        torch.autograd.grad((out * weight).sum(), list(module.parameters()), retain_graph=True)
        for out in (found, expected)
    ]
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-9)


def test_image_decoder_upsamples_then_convolves():
    """The whole decoder against one that upsamples every map before its convolution, from the same weights."""
    decoder = image.ImageDecoder({"image": IMAGE}, 8, 6, units=8, blocks=2, **CNN).double()
    with torch.no_grad():
        for p in decoder.parameters():
            p.add_(0.1 * torch.randn_like(p))
    deter, stoch = torch.randn(20, 8).double(), torch.randn(20, 6).double()
    height, width, depth = decoder.start
    by_block = [
        (deter[:, 4 * g : 4 * g + 4] @ decoder.from_deter.weight[g] + decoder.from_deter.bias.chunk(2)[g])
        .view(20, height, width, depth // 2)
        for g in range(2)
    ]  # fmt: skip
    x = torch.cat(by_block, -1) + decoder.from_stoch(stoch).view(20, height, width, depth)
    x = F.silu(F.rms_norm(x, (depth,), decoder.norm.scale, 1e-4)).permute(0, 3, 1, 2)
    for stage in decoder.stages:
        large = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        x = F.conv2d(large, stage.conv.weight, stage.conv.bias, padding=2)
        if stage.norm is not None:
            x = F.rms_norm(x.permute(0, 2, 3, 1), x.shape[1:2], stage.norm.scale, 1e-4)
            x = F.silu(x).permute(0, 3, 1, 2)
    assert [stage.norm is None for stage in decoder.stages] == [False, True]
    check_equal(decoder(deter, stoch)["image"].mode(), torch.sigmoid(x).permute(0, 2, 3, 1), decoder)


def test_open_loop_video_marks_what_is_imagined():
    truth = frames(2, 5, shape=(8, 12, 3)).numpy()
    film = image.open_loop_video(truth / 255.0, truth / 255.0, context=3, edge=2)
    assert film.dtype == np.uint8 and film.shape == (5, 3 * 12, 2 * 16, 3)
    np.testing.assert_array_equal(film[:, 2:10, 2:14], truth[0])
    np.testing.assert_array_equal(film[:, 14:22, 18:30], truth[1])
    corner = film[:, 12, 0].astype(int)  # of the model's frame
    assert (corner[:3, 1] > corner[:3, 0]).all() and (corner[3:, 0] > corner[3:, 1]).all()
    assert (abs(film[:, 26:34, 2:14].astype(int) - 128) <= 1).all(), "no error is grey"


# Vectors


def test_numbers_are_squashed_and_discrete_readings_are_one_hot():
    spaces = {
        "kind": gs.Discrete(3, start=5),
        "multi": gs.MultiDiscrete([2, 3]),
        "pose": gs.Box(-1, 1, (2, 2)),
        "x": gs.Box(0, 9, ()),
    }
    encoder = vector.VectorEncoder(spaces, units=8, layers=1)
    seen = []
    encoder.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    obs = {
        "kind": torch.tensor([[5, 7]]),
        "multi": torch.tensor([[[0, 2], [1, 0]]]),
        "pose": torch.tensor([[[[0.0, 1.0], [-10.0, 0.5]], [[1e3, 0.0], [0.0, 0.0]]]]),
        "x": torch.tensor([[3, 0]]),
    }
    assert encoder(obs, {}).shape == (1, 2, 8)
    expected = [
        [1, 0, 0, 1, 0, 0, 0, 1, 0, np.log(2), -np.log(11), np.log(1.5), np.log(4)],
        [0, 0, 1, 0, 1, 1, 0, 0, np.log(1001), 0, 0, 0, 0],
    ]
    torch.testing.assert_close(seen[0], torch.tensor([expected], dtype=torch.float32))


def test_without_symlog_numbers_go_in_as_they_are():
    encoder = vector.VectorEncoder({"pose": POSE}, units=8, layers=0, symlog=False)
    x = torch.tensor([[1.0, -50.0, 3.0]])
    assert encoder.out_size == 3 and torch.equal(encoder({"pose": x}, {}), x)


def test_absent_vector_counts_as_zeros():
    spaces = {"lives": gs.Discrete(3, start=1), "pose": POSE}
    encoder = vector.VectorEncoder(spaces, units=8, layers=0)
    obs = {"lives": torch.tensor([0, 3]), "pose": torch.ones(2, 3)}  # an absent reading is stored as 0
    present = {"lives": torch.tensor([False, True]), "pose": torch.tensor([True, False])}
    one = np.log(2)
    expected = torch.tensor([[0, 0, 0, one, one, one], [0, 0, 1, 0, 0, 0]], dtype=torch.float32)
    torch.testing.assert_close(encoder(obs, present), expected)


def test_discrete_readings_come_out_as_categoricals():
    spaces = {"kind": gs.Discrete(3, start=5), "multi": gs.MultiDiscrete([2, 3]), "pose": POSE}
    decoder = vector.VectorDecoder(spaces, 8, 6, units=8, layers=1)
    dists = decoder(torch.randn(2, 4, 8), torch.randn(2, 4, 6))
    assert isinstance(dists["kind"], Joint) and dists["multi"].sizes == [2, 3]
    assert isinstance(dists["kind"].parts[0], OneHot) and isinstance(dists["pose"], SquaredError)
    index = torch.randint(5, 8, (2, 4))
    target = decoder.target("kind", index)
    assert torch.equal(target, torch.eye(3)[index - 5])
    log_probs = dists["kind"].parts[0].log_probs
    expected = -log_probs.gather(-1, (index - 5)[..., None])[..., 0]
    torch.testing.assert_close(dists["kind"].loss(target), expected)
    # Numbers are squashed by the distribution, once.
    pose = torch.randn(2, 4, 3) * 10
    assert torch.equal(decoder.target("pose", pose), pose)
    expected = (dists["pose"].pred - torch.sign(pose) * torch.log1p(pose.abs())).square().sum(-1)
    torch.testing.assert_close(dists["pose"].loss(pose), expected)


@pytest.mark.parametrize("dist, kind", [("symlog_mse", SquaredError), ("mse", SquaredError), ("normal", Normal)])
def test_vector_distributions(dist, kind):
    decoder = vector.VectorDecoder({"pose": POSE}, 8, 6, units=8, layers=1, vector_dist=dist)
    out = decoder(torch.randn(2, 8), torch.randn(2, 6))["pose"]
    assert isinstance(out, kind) and out.loss(torch.randn(2, 3)).shape == (2,)
    if kind is SquaredError:
        assert out.squash == (dist == "symlog_mse")


def test_keys_with_dots():
    decoder = vector.VectorDecoder({"arm.left": POSE}, 8, 6, units=8, layers=1)
    assert decoder(torch.randn(2, 8), torch.randn(2, 6))["arm.left"].mode().shape == (2, 3)


# Audio


AUDIO = {
    "audio": gs.Box(-np.inf, np.inf, (6,), np.float32),
    "audio_spectrogram": gs.Box(-np.inf, np.inf, (10, 9), np.float32),
    "audio_wave": gs.Box(-1, 1, (2, 400), np.float32),
}
SOUND = {"units": 8, "layers": 2, "audio_depth": 4, "audio_window": 64, "audio_hop": 32}


def sounds(*lead: int) -> dict[str, torch.Tensor]:
    return {key: torch.randn(*lead, *space.shape) for key, space in AUDIO.items()}


def test_forms_of_audio():
    shapes = {(64,): "features", (10, 9): "spectrogram", (2, 10, 9): "spectrogram", (100, 64): "spectrogram"}
    shapes |= {(1, 400): "waveform", (4, 1600): "waveform", (4, 100): "spectrogram", (1, 64): "waveform"}
    shapes |= {(8, 201): "spectrogram", (8, 513): "spectrogram", (16, 257): "spectrogram"}
    assert {shape: audio.form(shape) for shape in shapes} == shapes


def test_spectrogram_against_torch():
    """torch.stft with the same window, scaled; a sine of amplitude 1 has magnitude 0.5 in its bin."""
    net, wave = audio.LogSpectrogram(400, 64, 32).double(), torch.randn(3, 2, 400, dtype=torch.float64)
    hann = torch.hann_window(64, dtype=torch.float64)
    spectrum = torch.stft(wave.flatten(0, 1), 64, 32, window=hann, center=False, return_complex=True)
    expected = torch.log1p(1000 * spectrum.abs() / hann.sum()).transpose(1, 2).unflatten(0, (3, 2))
    assert net(wave).shape == (3, 2, net.frames, net.bins) == (3, 2, 11, 33)
    torch.testing.assert_close(net(wave), expected, rtol=1e-4, atol=2e-4)  # sines and cosines are kept in float32
    sine = torch.sin(2 * np.pi * 8 * torch.arange(400, dtype=torch.float64) / 64)
    magnitude = torch.expm1(net(sine)) / net.gain
    assert (magnitude.argmax(-1) == 8).all() and torch.allclose(magnitude[:, 8], torch.tensor(0.5).double(), rtol=1e-3)


def test_spectrogram_of_silence_has_a_gradient():
    net, wave = audio.LogSpectrogram(400, 64, 32), torch.zeros(1, 400, requires_grad=True)
    net(wave).sum().backward()
    assert (net(wave) < 0.01).all() and wave.grad.isfinite().all()


@pytest.mark.parametrize("front", ["spectrogram", "raw"])
def test_audio_of_every_form_goes_in_and_comes_out(front):
    encoder = audio.AudioEncoder(AUDIO, audio_front=front, **SOUND)
    decoder = audio.AudioDecoder(AUDIO, 8, 6, **SOUND)
    obs = sounds(2, 3)
    assert encoder(obs, {}).shape == (2, 3, encoder.out_size) == (2, 3, 24)
    dists = decoder(torch.randn(2, 3, 8), torch.randn(2, 3, 6))
    shapes = {"audio": (6,), "audio_spectrogram": (1, 10, 9), "audio_wave": (2, 11, 33)}
    for key, shape in shapes.items():
        target = decoder.target(key, obs[key])
        assert target.shape == dists[key].mode().shape == (2, 3, *shape)
        expected = dists[key].pred - (target if key != "audio" else torch.sign(target) * torch.log1p(target.abs()))
        torch.testing.assert_close(dists[key].loss(target), expected.square().flatten(2).sum(-1))
    sum(dist.loss(decoder.target(key, obs[key])).sum() for key, dist in dists.items()).backward()
    encoder(obs, {}).square().sum().backward()
    for net in (encoder, decoder):
        assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]


def test_absent_audio_does_not_matter():
    encoder, obs = audio.AudioEncoder(AUDIO, **SOUND), sounds(2)
    other = {key: torch.cat([value[:1], torch.randn_like(value[1:])]) for key, value in obs.items()}
    present = {key: torch.tensor([True, False]) for key in AUDIO}
    assert torch.equal(encoder(obs, present), encoder(other, present))


def test_a_waveform_shorter_than_the_window_is_an_error():
    with pytest.raises(UserError, match="100 samples.*audio_window"):
        audio.AudioEncoder({"audio": gs.Box(-1, 1, (1, 100))}, units=8, layers=1)


def test_sound_from_a_spectrogram():
    """Griffin-Lim gives a waveform with these magnitudes again: a tone comes back as that tone."""
    rate, steps, samples = 16_000, 5, 1600
    space = {"audio": gs.Box(-1, 1, (1, samples), np.float32)}
    decoder = audio.AudioDecoder(space, 8, 6, units=8, layers=1)
    wave = 0.5 * torch.sin(2 * np.pi * 1000 * torch.arange(steps * samples) / rate)
    truth = decoder.target("audio", wave.view(1, steps, 1, samples)).numpy()
    shown = audio.show(decoder, "audio", truth, truth, 2)
    sound, found_rate = shown["/model"][1]
    assert found_rate == rate and shown["/truth"][0] == "audio" and shown[""][0] == "image"
    assert abs(len(sound) - steps * samples) < samples / 4
    middle = sound[1600:-1600]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    assert abs(spectrum.argmax() * rate / len(middle) - 1000) < 10
    assert np.sqrt(np.mean(middle**2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.15)


# Text


MISSION = {"mission": gs.Box(0, 19, (7,), np.int32)}
READ = {"units": 8, "layers": 2, "text_units": 16, "text_layers": 2}


def sentences(*lead: int) -> torch.Tensor:
    ids = torch.randint(1, 20, (*lead, 7), dtype=torch.int32)
    return ids * (torch.arange(7) < torch.randint(1, 8, (*lead, 1)))


def test_padding_does_not_matter():
    """As many more padded places as one likes give the same embedding; no token at all gives zeros."""
    encoder, ids = text.TextEncoder(MISSION, **READ).double(), sentences(4, 5)
    ids[0, 0] = 0
    longer = torch.cat([ids, torch.zeros(4, 5, 6, dtype=torch.int32)], -1)
    found = encoder({"mission": ids}, {})
    torch.testing.assert_close(encoder({"mission": longer}, {}), found, rtol=1e-10, atol=1e-12)
    assert found.shape == (4, 5, 16) and not found[0, 0].any() and found[1:].any(-1).all()
    alone = encoder({"mission": ids[2, 3, : int((ids[2, 3] != 0).sum())]}, {})
    torch.testing.assert_close(alone, found[2, 3], rtol=1e-10, atol=1e-12)


def test_order_and_identity_of_words_matter():
    encoder = text.TextEncoder(MISSION, **READ)
    one, two, three = (torch.tensor([ids], dtype=torch.int32) for ids in ([3, 4, 5], [4, 3, 5], [3, 4, 6]))
    embeds = [encoder({"mission": ids}, {}) for ids in (one, two, three)]
    assert not torch.allclose(embeds[0], embeds[1]) and not torch.allclose(embeds[0], embeds[2])


def test_absent_text_counts_as_none():
    encoder, ids = text.TextEncoder(MISSION, **READ), sentences(3)
    found = encoder({"mission": ids}, {"mission": torch.tensor([True, False, True])})
    assert not found[1].any() and torch.equal(found[::2], encoder({"mission": ids}, {})[::2])


def test_text_loss_is_nats_per_token_that_is_there():
    decoder, ids = text.TextDecoder(MISSION, 8, 6, **READ), sentences(3, 4)
    ids[0, 0] = 0
    dist = decoder(torch.randn(3, 4, 8), torch.randn(3, 4, 6))["mission"]
    target = decoder.target("mission", ids)
    nats = F.cross_entropy(dist.logits.flatten(0, 2), target.flatten(), ignore_index=0, reduction="none").view(3, 4, 7)
    expected = nats.sum(-1) / (target != 0).sum(-1).clamp(min=1)
    torch.testing.assert_close(dist.loss(target), expected)
    assert dist.loss(target)[0, 0] == 0 and dist.mode().shape == (3, 4, 7)


# Choosing among all kinds


def test_keys_with_a_name_of_their_own_go_there():
    chosen = select(AUDIO | MISSION | SPACES, MODALITY_CONFIGS, {"audio_keys": "audio.*"}, "encoder")
    assert {kind: list(keys) for kind, keys in chosen.items()} == {
        "vector": ["lives", "pose", "ram"],
        "image": ["image"],
        "audio": ["audio", "audio_spectrogram", "audio_wave"],
        "text": ["mission"],
    }
    assert "audio" not in select(SPACES, MODALITY_CONFIGS, {}, "encoder")


@pytest.mark.parametrize(
    "spaces, options, told",
    [
        (AUDIO, {"mlp_keys": "aud.*", "audio_keys": "audio"}, "two kinds.*encoder.mlp_keys.*encoder.audio_keys"),
        ({"audio": IMAGE}, {"audio_keys": "audio"}, "'audio' is uint8.*the kind audio cannot take.*encoder.audio_keys"),
        ({"audio": IMAGE}, {}, "the kind audio cannot take.*ModalityConfig.'audio', keys="),
        ({"mission": POSE}, {}, "'mission' is float32.*text cannot take"),
        (SPACES, {"audio_keys": "sound"}, "encoder.audio_keys is 'sound'.*pose"),
    ],
)
def test_keys_that_fit_badly(spaces, options, told):
    with pytest.raises(UserError, match=told):
        select(spaces, MODALITY_CONFIGS, options, "encoder")


def test_active_kinds():
    assert list(active(())) == list(MODALITY_CONFIGS)
    assert list(active(["text", "image"])) == ["image", "text"]
    own = {"image": MODALITY_CONFIGS["image"]}
    assert active(own) == own
    with pytest.raises(UserError, match="'imaeg' is not a kind.*mean image"):
        active(["imaeg"])
    assert list(select(SPACES, active(["image"]), {}, "encoder")) == ["image"]
    heard = {"pose": POSE, "audio": POSE}
    chosen = select(heard, active(["vector"]), {"mlp_keys": ".*"}, "encoder")
    assert list(chosen["vector"]) == ["pose"], "what belongs to a kind that is not active goes to no other"
    assert list(select(heard | {"text": SPACES["image"]}, active(["vector"]), {}, "encoder")["vector"]) == ["pose"]


def test_tokenized_text_is_text_under_any_key():
    spaces = {"instruction": TokenSpace(Bytes(), 5), "ram": gs.Box(0, 9, (5,), np.int32)}
    chosen = select(spaces, MODALITY_CONFIGS, {}, "encoder")
    assert {kind: list(keys) for kind, keys in chosen.items()} == {"vector": ["ram"], "text": ["instruction"]}
    chosen = select(spaces, MODALITY_CONFIGS, {"mlp_keys": "instr.*"}, "encoder")
    assert list(chosen["vector"]) == ["instruction"], "a pattern that names it counts more"


def test_form_of_audio_as_told():
    assert audio.form((8, 513), "waveform") == "waveform" and audio.form((1, 64), "spectrogram") == "spectrogram"
    with pytest.raises(UserError, match=r"audio_form is features.*\[8, 513\]"):
        audio.form((8, 513), "features")
    space = {"audio": gs.Box(-1, 1, (8, 513), np.float32)}
    nets = [audio.AudioEncoder(space, units=8, layers=1, audio_form=told) for told in ("auto", "waveform")]
    assert [net.convs["audio"].front.spectrogram is None for net in nets] == [True, False]
    for net in nets:
        assert net({"audio": torch.zeros(2, 8, 513)}, {}).shape == (2, 8)
    decoder = audio.AudioDecoder(space, 4, 4, units=8, layers=1, audio_form="waveform")
    assert decoder(torch.zeros(2, 4), torch.zeros(2, 4))["audio"].mode().shape == (2, 8, 1, 201)


def test_units_and_layers_of_audio_are_its_own():
    space = {"audio": gs.Box(-1, 1, (1, 800), np.float32)}
    sizes = [
        sum(p.numel() for p in audio.AudioEncoder(space, units=8, layers=2, **options).parameters())
        for options in ({}, {"audio_layers": 2, "audio_units": 8}, {"audio_layers": 3}, {"audio_units": 16})
    ]
    assert sizes[0] == sizes[1] < sizes[2] < sizes[3]


def test_a_kind_that_is_not_predicted():
    kinds = {"vector": MODALITY_CONFIGS["vector"], "imu": ModalityConfig("imu", decoder_type=None)}
    spaces = {"pose": POSE, "imu": POSE}
    decoder = MultiDecoder(spaces, 4, 4, modalities=kinds, units=8, layers=1)
    encoder = MultiEncoder(spaces, modalities=kinds, units=8, layers=1)
    assert decoder.keys == ["pose"] and list(encoder.kinds) == [*kinds]
    with pytest.raises(UserError, match="None of the active kinds .imu. is predicted"):
        MultiDecoder({"imu": POSE}, 4, 4, modalities={"imu": kinds["imu"]}, units=8, layers=1)


def test_a_kind_that_is_named_and_not_there():
    with pytest.raises(UserError, match="modalities names audio.*pose"):
        MultiEncoder({"pose": POSE}, modalities=["vector", "audio"], units=8, layers=1)


@pytest.mark.parametrize("key", ["type", "keys", "a.b", "a_dot_b", "of_a", "training"])
def test_any_key_can_be_called_so(key):
    names = [vector.safe(name) for name in ("type", "keys", "a.b", "a_dot_b", "of_a", "training", "pose", "of_a_dot_b")]
    assert len(set(names)) == len(names) and vector.safe("pose") == "pose"
    decoder = MultiDecoder({key: POSE}, 4, 4, units=8, layers=1)
    assert decoder({"deter": torch.zeros(2, 4), "stoch": torch.zeros(2, 4)})[key].mode().shape == (2, 3)


def test_names_that_kinds_cannot_have():
    for name in ("type", "a.b", "two words"):
        with pytest.raises(UserError, match="cannot be called"):
            ModalityConfig(name)


def test_vocabularies_without_an_end_are_named():
    with pytest.raises(UserError, match="ids up to 2,147,483,646"):
        text.TextEncoder({"text": gs.Box(0, 2**31 - 2, (4,), np.int32)}, **READ)


def test_what_is_shown():
    """Of every kind: truth, model and error, or truth beside model; sound can be played."""
    rng, steps = np.random.default_rng(0), 6
    space = {"mission": TokenSpace(Bytes(), 6)}
    decoder = text.TextDecoder(space, 4, 4, **READ)
    ids = np.zeros((2, steps, 6), np.int64)
    ids[:, :, :3] = [3 + ord("a"), 3 + ord("|"), 2]
    (method, table) = text.show(decoder, "mission", ids, ids, 2)[""]
    lines = table.splitlines()
    assert method == "text" and lines[2] == "| 1 | a\\| | a\\| |" and len(lines) == 2 + 2 * 2

    shown = vector.show(nn.Identity(), "pose", rng.normal(size=(2, steps, 3)), rng.normal(size=(2, steps, 3)), 2)
    (method, picture) = shown[""]
    assert method == "image" and picture.ndim == 3 and picture.shape[-1] == 3 and picture.std() > 0

    space = {"audio": gs.Box(-1, 1, (1, 800), np.float32)}
    decoder = audio.AudioDecoder(space, 4, 4, units=8, layers=1)
    wave = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(steps * 800) / 16000).reshape(1, steps, 1, 800)
    truth = decoder.target("audio", torch.tensor(wave, dtype=torch.float32)).numpy()
    shown = audio.show(decoder, "audio", truth, np.zeros_like(truth), 2)
    assert {key: kind for key, (kind, _) in shown.items()} == {"": "image", "/truth": "audio", "/model": "audio"}
    sound, rate = shown["/truth"][1]
    assert rate == 16000 and abs(np.fft.rfft(sound)).argmax() * rate / len(sound) == pytest.approx(1000, abs=20)
    assert np.abs(shown["/model"][1][0]).max() < 1e-3 * np.abs(sound).max()


# Documentation


def test_the_example_of_the_documentation_runs(tmp_path):
    """As a file of its own, outside of the project, in at most 40 lines."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "modalities.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 40
    (tmp_path / "lidar.py").write_text(code.replace('"--logdir"', '"--steps", "120", "--logdir"'))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "lidar.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "logdir/walls/metrics.jsonl").read_text().splitlines()]
    learned = [line for line in lines if "world/nats_lidar" in line]
    assert learned and all(math.isfinite(line["world/recon_lidar"]) for line in learned)
