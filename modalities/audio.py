"""Audio: features of a few dozen numbers, spectrograms, or waveforms.

Which of them an observation is, `audio_form` tells, or else its shape: [numbers] are features, [channels, samples] of
one channel or with a hundred times more samples than channels a waveform, anything else with two axes a spectrogram
[frames, bins], with three [channels, frames, bins].

Features go through a symlog MLP, as vectors do. A waveform is turned into a log-magnitude spectrogram, on the device,
and spectrograms go through convolutions over their frames. Phase cannot be predicted, so the decoder of a waveform
predicts its spectrogram, too. With `audio_front` raw the encoder convolves the waveform itself.
"""

import math
from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from gymnasium import spaces as gs
from jaxtyping import Float
from torch import Tensor, nn

from distributions import SquaredError, symlog
from errors import UserError
from layers import ACTIVATIONS, MLP, Dense, Linear, RMSNorm, init_weight

from . import image
from .vector import safe

FORMS = {"features": (1,), "waveform": (2,), "spectrogram": (2, 3)}  # and how many axes they have
LONG = 100  # a waveform of several channels has at least so many times more samples than channels
KERNEL, STEM, STRIDE = 5, 25, 5  # taps of a convolution; taps and stride of the first one on a raw waveform
SHORT = 4  # frames that convolutions leave


def recognises(space: gs.Space) -> bool:
    """Boxes of floats with one to three axes."""
    return isinstance(space, gs.Box) and space.dtype.kind == "f" and 1 <= len(space.shape) <= 3


def form(shape: Sequence[int], told: str = "auto") -> str:
    """features, waveform or spectrogram: what was told, or what the shape looks like (auto)."""
    if told != "auto":
        if len(shape) not in FORMS[told]:
            raise UserError(f"audio_form is {told}, but the audio has the shape {list(shape)}.")
        return told
    if len(shape) == 1:
        return "features"
    long = len(shape) == 2 and (shape[0] == 1 or shape[1] >= LONG * shape[0])
    return "waveform" if long else "spectrogram"


class LogSpectrogram(nn.Module):
    """[*b, samples] -> log(1 + gain * magnitude) [*b, frames, window // 2 + 1].

    Frames of `window` samples, every `hop`, under a Hann window whose sum is 1: a sine of amplitude 1 at the centre of
    a bin has magnitude 0.5. It is a product with sines and cosines, which every device and compiler knows.
    """

    def __init__(self, samples: int, window: int, hop: int, gain: float = 1000.0):
        super().__init__()
        if samples < window:
            raise UserError(
                f"An audio waveform of {samples} samples is shorter than audio_window ({window}): lower it, or let "
                "audio_form be spectrogram if it is one (for both: --'*.audio_window' N)."
            )
        self.window, self.hop, self.gain = window, hop, gain
        self.frames, self.bins = (samples - window) // hop + 1, window // 2 + 1
        phase = 2 * math.pi / window * (torch.arange(window)[:, None] * torch.arange(self.bins)).double()
        hann = torch.hann_window(window, dtype=torch.float64)[:, None]
        basis = torch.cat([phase.cos(), phase.sin()], 1) * hann / hann.sum()
        self.register_buffer("basis", basis.to(torch.get_default_dtype()), persistent=False)

    def forward(self, wave: Float[Tensor, "*b samples"]) -> Float[Tensor, "*b frames bins"]:
        with torch.autocast(wave.device.type, enabled=False):
            frames = wave.to(self.basis.dtype).unfold(-1, self.window, self.hop)
            real, imaginary = (frames @ self.basis).chunk(2, -1)
            return torch.log1p(self.gain * torch.sqrt(real.square() + imaginary.square() + 1e-12))


def griffin_lim(
    magnitude: Float[np.ndarray, "frames bins"], window: int, hop: int, rounds: int = 32
) -> Float[np.ndarray, " samples"]:
    """A waveform of about these magnitudes of `LogSpectrogram` (Griffin and Lim 1984): phases that agree with each
    other are found by going back and forth.
    """
    hann = np.hanning(window + 1)[:-1]
    places = np.arange(len(magnitude))[:, None] * hop + np.arange(window)

    def overlapped(frames: np.ndarray) -> np.ndarray:
        out = np.zeros(places[-1, -1] + 1)
        for place, frame in zip(places, frames, strict=True):
            out[place] += frame
        return out

    weight = overlapped(np.broadcast_to(hann**2, places.shape))
    weight = np.maximum(weight, 0.1 * weight.max())

    def to_wave(spectrum: np.ndarray) -> np.ndarray:
        return overlapped(np.fft.irfft(spectrum, window) * hann) / weight

    magnitude = magnitude * hann.sum()
    phase = np.exp(2j * np.pi * np.random.default_rng(0).random(magnitude.shape))
    for _ in range(rounds):
        spectrum = np.fft.rfft(to_wave(magnitude * phase)[places] * hann)
        phase = spectrum / np.maximum(np.abs(spectrum), 1e-12)
    return to_wave(magnitude * phase).astype(np.float32)


def show(decoder: nn.Module, key: str, truth: np.ndarray, predicted: np.ndarray, context: int) -> dict:
    """A picture of truth, model and error over time, and sound where the observation is a waveform (of its first
    channel, of the first window). Arguments as in `image.show`.
    """
    if getattr(decoder, "forms", {}).get(key, "features") == "features":
        return {"": ("image", image.heatmap(truth[0].T, predicted[0].T, context / truth.shape[1]))}
    front = decoder.fronts[decoder.keys[key]]
    strips = [np.concatenate(list(window[0, :, 0]), 0).T for window in (truth, predicted)]  # [bins, steps * frames]
    shown = {"": ("image", image.heatmap(strips[0][::-1], strips[1][::-1], context / truth.shape[1]))}
    if front.spectrogram is not None:
        for suffix, window in (("/truth", truth), ("/model", predicted)):
            shown[suffix] = ("audio", (front.to_wave(window[0, :, 0]), decoder.rate))
    return shown


class Front(nn.Module):
    """An observation as the spectrogram [*b, channels, frames, bins] that is encoded and predicted."""

    def __init__(self, shape: Sequence[int], waveform: bool, window: int, hop: int):
        super().__init__()
        self.axes = len(shape)
        self.spectrogram = LogSpectrogram(shape[1], window, hop) if waveform else None
        if self.spectrogram is not None:
            self.samples = shape[1]
            self.shape = (shape[0], self.spectrogram.frames, self.spectrogram.bins)
        else:
            self.shape = (1, *shape)[-3:]

    def forward(self, value: Float[Tensor, "..."]) -> Float[Tensor, "*b channels frames bins"]:
        if self.spectrogram is not None:
            return self.spectrogram(value)
        return value if self.axes == 3 else value.unsqueeze(-3)

    def to_wave(self, spectrograms: Float[np.ndarray, "t frames bins"]) -> Float[np.ndarray, " samples"]:
        """The sound of consecutive steps. Between the last frame of a step and the first of the next lie some that
        nobody saw: they are interpolated.
        """
        steps, frames, bins = spectrograms.shape
        hop, magnitude = self.spectrogram.hop, np.expm1(spectrograms).clip(0) / self.spectrogram.gain
        seen = (np.arange(steps)[:, None] * self.samples + np.arange(frames) * hop).ravel()
        wanted = np.arange(0, seen[-1] + 1, hop)
        rows = [np.interp(wanted, seen, column) for column in magnitude.reshape(-1, bins).T]
        return griffin_lim(np.stack(rows, 1), self.spectrogram.window, hop)


class Conv1d(nn.Module):
    """Convolution over the last axis -> RMSNorm over channels -> activation, on [n, channels, frames]."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, act: str, transposed: bool = False):
        super().__init__()
        kind = nn.ConvTranspose1d if transposed else nn.Conv1d
        more = {"output_padding": stride - 1} if transposed else {}
        self.conv = kind(inputs, outputs, kernel, stride, kernel // 2, **more)
        init_weight(self.conv.weight, inputs * kernel)
        nn.init.zeros_(self.conv.bias)
        self.norm, self.act = RMSNorm(outputs), ACTIVATIONS[act]

    def forward(self, x: Float[Tensor, "n c t"]) -> Float[Tensor, "n c2 t2"]:
        return self.norm(self.conv(x).transpose(1, 2), self.act).transpose(1, 2)


class Convolutions(nn.Module):
    """Spectrogram or raw waveform -> embedding: convolutions that shorten it to a few frames, then dense layers."""

    def __init__(self, front: Front | None, shape: Sequence[int], units: int, layers: int, depth: int, act: str):
        super().__init__()
        self.front, self.axes = front, len(shape)
        stages = []
        if front is None:
            width, length = shape
            stages, width, length = [Conv1d(width, depth, STEM, STRIDE, act)], depth, -(-length // STRIDE)
        else:
            width, length = front.shape[0] * front.shape[2], front.shape[1]
        while length > SHORT or not stages:
            stride = 4 if length > 16 * SHORT else 2 if length > 1 else 1
            stages.append(Conv1d(width, depth, KERNEL, stride, act))
            width, length = depth, -(-length // stride)
        self.stages = nn.Sequential(*stages)
        self.out = MLP(width * length, units, max(1, layers), act)

    def forward(self, value: Float[Tensor, "..."]) -> Float[Tensor, "*b units"]:
        lead = value.shape[: value.ndim - self.axes]
        x = value.reshape(-1, *value.shape[value.ndim - self.axes :])
        if self.front is not None:
            x = self.front(x).transpose(-2, -1).flatten(1, 2)  # [n, channels * bins, frames]
        x = self.stages(x.to(self.out[0].linear.weight.dtype))
        return self.out(x.flatten(1)).reshape(*lead, -1)


class AudioEncoder(nn.Module):
    """{key: [*b, ...]} -> [*b, out_size]: all features through one MLP, every other key through its convolutions.

    Args:
        audio_units, audio_layers: of the MLP, and of the dense layers after convolutions (at least one); those of
            vectors if not given.
        audio_form: auto, features, waveform or spectrogram, see `form`.
        audio_depth: channels of the convolutions.
        audio_front: what is made of a waveform, spectrogram or raw.
        audio_window, audio_hop: samples of a spectrogram's frame and between two of them.
    """

    def __init__(
        self,
        spaces: dict,
        *,
        units: int,
        layers: int,
        audio_units: int | None = None,
        audio_layers: int | None = None,
        audio_form: str = "auto",
        audio_depth: int = 64,
        audio_front: str = "spectrogram",
        audio_window: int = 400,
        audio_hop: int = 160,
        symlog: bool = True,
        act: str = "silu",
        **_,
    ):
        super().__init__()
        units, layers = audio_units or units, layers if audio_layers is None else audio_layers
        self.symlog = symlog
        forms = {key: form(space.shape, audio_form) for key, space in spaces.items()}
        self.features = [key for key in spaces if forms[key] == "features"]
        width = sum(spaces[key].shape[0] for key in self.features)
        self.mlp = MLP(width, units, layers, act) if self.features else None
        self.convs = nn.ModuleDict()
        for key, space in spaces.items():
            if key not in self.features:
                waveform = forms[key] == "waveform"
                raw = audio_front == "raw" and waveform
                front = None if raw else Front(space.shape, waveform, audio_window, audio_hop)
                self.convs[safe(key)] = Convolutions(front, space.shape, units, layers, audio_depth, act)
        self.keys = {key: safe(key) for key in spaces if key not in self.features}
        self.out_size = (self.mlp.out_size if self.features else 0) + units * len(self.keys)

    def forward(self, obs: dict[str, Tensor], present: dict[str, Tensor]) -> Float[Tensor, "*b out"]:
        def given(key: str, value: Tensor) -> Tensor:
            return value * present[key].unsqueeze(-1) if key in present else value

        parts = []
        if self.features:
            values = [given(key, symlog(obs[key]) if self.symlog else obs[key]) for key in self.features]
            parts.append(self.mlp(torch.cat(values, -1)))
        parts += [given(key, self.convs[name](obs[key])) for key, name in self.keys.items()]
        return torch.cat(parts, -1)


class AudioDecoder(nn.Module):
    """[deter, stoch] -> MLP -> features, and a spectrogram [channels, frames, bins] for every other key.

    The loss is the squared error, summed over numbers; of features in symlog space. `audio_rate` (Hz) is only for those
    who listen to what is predicted.
    """

    def __init__(
        self,
        spaces: dict,
        deter: int,
        stoch: int,
        *,
        units: int,
        layers: int,
        audio_units: int | None = None,
        audio_layers: int | None = None,
        audio_form: str = "auto",
        audio_depth: int = 64,
        audio_window: int = 400,
        audio_hop: int = 160,
        audio_rate: int = 16000,
        outscale: float = 1.0,
        act: str = "silu",
        **_,
    ):
        super().__init__()
        units, layers = audio_units or units, layers if audio_layers is None else audio_layers
        self.mlp = MLP(deter + stoch, units, layers, act)
        self.keys, self.rate = {key: safe(key) for key in spaces}, audio_rate
        self.forms = {key: form(space.shape, audio_form) for key, space in spaces.items()}
        self.fronts, self.outs = nn.ModuleDict(), nn.ModuleDict()
        for key, name in self.keys.items():
            shape = spaces[key].shape
            if self.forms[key] == "features":
                self.outs[name] = Linear(self.mlp.out_size, shape[0], outscale)
            else:
                self.fronts[name] = Front(shape, self.forms[key] == "waveform", audio_window, audio_hop)
                self.outs[name] = Spectrogram(self.mlp.out_size, self.fronts[name].shape, audio_depth, outscale, act)

    def forward(self, deter: Float[Tensor, "*b deter"], stoch: Float[Tensor, "*b stoch"]) -> dict[str, SquaredError]:
        x = self.mlp(torch.cat([deter, stoch], -1))
        return {
            key: SquaredError(self.outs[name](x), dims=3)
            if name in self.fronts
            else SquaredError(self.outs[name](x), squash=True)
            for key, name in self.keys.items()
        }

    def target(self, key: str, value: Tensor) -> Float[Tensor, "..."]:
        """What the distribution of `key` is scored on."""
        name = self.keys[key]
        return self.fronts[name](value) if name in self.fronts else value


class Spectrogram(nn.Module):
    """[*b, inputs] -> [*b, channels, frames, bins]: a few frames that convolutions double until there are enough."""

    def __init__(self, inputs: int, shape: tuple[int, int, int], depth: int, outscale: float, act: str):
        super().__init__()
        self.shape, self.depth = shape, depth
        doublings = max(0, math.ceil(math.log2(shape[1] / SHORT)))
        self.start = -(-shape[1] // 2**doublings)
        self.first = Dense(inputs, self.start * depth, act)
        self.stages = nn.Sequential(*(Conv1d(depth, depth, KERNEL, 2, act, transposed=True) for _ in range(doublings)))
        self.out = Linear(depth, shape[0] * shape[2], outscale)

    def forward(self, x: Float[Tensor, "*b inputs"]) -> Float[Tensor, "*b channels frames bins"]:
        lead, (channels, frames, bins) = x.shape[:-1], self.shape
        x = self.first(x).reshape(prod(lead), self.depth, self.start)
        x = self.out(self.stages(x)[..., :frames].transpose(1, 2))  # [n, frames, channels * bins]
        return x.reshape(*lead, frames, channels, bins).transpose(-3, -2)
