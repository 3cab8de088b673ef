"""Kinds of observation. A file per kind says how it is recognised, encoded, decoded, scored and shown; this registry
names them.

A kind is a `ModalityConfig`: adding one to `MODALITY_CONFIGS` makes every observation that belongs to it part of the
world model. The order of the registry is the order in which embeddings are joined.
"""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gymnasium.spaces import Space
from jaxtyping import Float
from torch import Tensor, nn

from errors import UserError
from layers import Linear

from . import audio, image, text, vector

ANYTHING, NOTHING = (".*",), ("", "$^")

ENCODERS = {
    "mlp": vector.VectorEncoder,
    "cnn": image.ImageEncoder,
    "audio": audio.AudioEncoder,
    "text": text.TextEncoder,
}
DECODERS = {
    "mlp": vector.VectorDecoder,
    "cnn": image.ImageDecoder,
    "audio": audio.AudioDecoder,
    "text": text.TextDecoder,
}
DISPLAYS = {"mlp": vector.show, "cnn": image.show, "audio": audio.show, "text": text.show}


@dataclass(frozen=True)
class ModalityConfig:
    """One kind of observation.

    Attributes:
        name: as it appears in logs and in the keys of the embedding.
        input_shape: which spaces it takes: sizes of the axes, None for any size; or a function of the space. None: all.
        embed_dim: width of its embedding; None: what its encoder gives.
        encoder_type: a name in `ENCODERS`, or a class: (spaces, **options) -> module with `out_size`, mapping
            {key: [*b, ...]} and presence flags {key: [*b]} to [*b, out_size].
        decoder_type: a name in `DECODERS`, or a class: (spaces, deter, stoch, **options) -> module mapping deter, stoch
            to {key: distribution}, with `target(key, value)`. None: not predicted.
        options: of its encoder and decoder, before those of the configuration.
        loss_scale: of its keys' losses, where the configuration's `modality_scales` do not name it.
        display: a name in `DISPLAYS` (the decoder's type, if not given), or a function: see `image.show`.
        keys: regular expression over observation keys (full match), the name if not given. '.*' takes what no other
            kind names.
        keys_option: the key of the configuration's encoder and decoder that replaces `keys`.
        claims: a function of the space: true where an observation is of this kind, whatever it is called.
    """

    name: str
    input_shape: tuple[int | None, ...] | Callable[[Space], bool] | None = None
    embed_dim: int | None = None
    encoder_type: str | Callable[..., nn.Module] = "mlp"
    decoder_type: str | Callable[..., nn.Module] | None = "mlp"
    options: Mapping | None = None
    loss_scale: float = 1.0
    display: str | Callable | None = None
    keys: str | None = None
    keys_option: str | None = None
    claims: Callable[[Space], bool] | None = None

    def __post_init__(self):
        if not self.name.isidentifier() or self.name != vector.safe(self.name):
            raise UserError(f"A modality cannot be called '{self.name}': it names a module; take another word.")

    def recognises(self, space: Space) -> bool:
        """Does an observation of this space belong to this kind, as far as its shape tells?"""
        if self.input_shape is None or callable(self.input_shape):
            return self.input_shape is None or self.input_shape(space)
        shape = space.shape or ()
        sizes = zip(shape, self.input_shape, strict=False)
        return len(shape) == len(self.input_shape) and all(wanted in (None, size) for size, wanted in sizes)

    def pattern(self, options: Mapping) -> str:
        return options.get(self.keys_option or f"{self.name}_keys", self.default_keys)

    @property
    def default_keys(self) -> str:
        return re.escape(self.name) if self.keys is None else self.keys

    def encoder(self, spaces: dict[str, Space], options: Mapping) -> nn.Module:
        net = _named(ENCODERS, self.encoder_type)(spaces, **{**options, **(self.options or {})})
        return net if self.embed_dim in (None, net.out_size) else Projected(net, self.embed_dim)

    def decoder(self, spaces: dict[str, Space], deter: int, stoch: int, options: Mapping) -> nn.Module:
        return _named(DECODERS, self.decoder_type)(spaces, deter, stoch, **{**options, **(self.options or {})})

    @property
    def show(self) -> Callable | None:
        display = self.display or (self.decoder_type if isinstance(self.decoder_type, str) else None)
        return _named(DISPLAYS, display) if display else None


def _named(table: dict, value):
    if not isinstance(value, str):
        return value
    if value not in table:
        raise UserError(f"A modality's type is '{value}'; expected {', '.join(table)}, or a class.")
    return table[value]


class Projected(nn.Module):
    """An encoder, and a linear map to the width that its kind asks for."""

    def __init__(self, encoder: nn.Module, size: int):
        super().__init__()
        self.encoder, self.out = encoder, Linear(encoder.out_size, size)
        self.out_size = size

    def forward(self, obs: dict[str, Tensor], present: dict[str, Tensor]) -> Float[Tensor, "*b out"]:
        return self.out(self.encoder(obs, present))


MODALITY_CONFIGS: dict[str, ModalityConfig] = {
    "vector": ModalityConfig("vector", vector.recognises, keys=".*", keys_option="mlp_keys"),
    "image": ModalityConfig(
        "image", image.recognises, encoder_type="cnn", decoder_type="cnn", keys=".*", keys_option="cnn_keys"
    ),
    "audio": ModalityConfig("audio", audio.recognises, encoder_type="audio", decoder_type="audio"),
    "text": ModalityConfig(
        "text", text.recognises, encoder_type="text", decoder_type="text", keys="text|mission", claims=text.tokenized
    ),
}


def active(modalities: Sequence[str] | Mapping[str, ModalityConfig]) -> dict[str, ModalityConfig]:
    """The kinds that count: a mapping as it is, names looked up in the registry; none named are all of them."""
    if isinstance(modalities, Mapping):
        return dict(modalities)
    for name in modalities:
        if name not in MODALITY_CONFIGS:
            close = difflib.get_close_matches(name, MODALITY_CONFIGS, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise UserError(f"modalities: '{name}' is not a kind; there are {', '.join(MODALITY_CONFIGS)}.{hint}")
    return {name: kind for name, kind in MODALITY_CONFIGS.items() if not modalities or name in modalities}


def select(
    spaces: dict[str, Space], kinds: Mapping[str, ModalityConfig], options: Mapping, where: str
) -> dict[str, dict[str, Space]]:
    """Which observation keys belong to which kind: {kind: {key: space}}, keys sorted, empty kinds left out.

    A kind takes the keys that its pattern names, then those whose space it claims; '.*' takes those that no other kind
    does, active or not. Keys that no active kind takes are not learned from.

    Args:
        kinds: the active ones.
        options: of the encoder or decoder, with the patterns that replace a kind's own.
        where: `encoder` or `decoder`, for the message.
    Raises:
        UserError: a key that two kinds take, a key that a kind names and cannot take, a pattern that was set and
            matches no key, or no key taken at all.
    """
    everyone = MODALITY_CONFIGS | dict(kinds)  # what belongs to a kind that is not active belongs to none
    patterns = {name: kind.pattern(options) for name, kind in everyone.items()}
    chosen: dict[str, dict[str, Space]] = {name: {} for name in kinds}
    for key, space in sorted(spaces.items()):
        able = [name for name, kind in everyone.items() if kind.recognises(space)]
        naming = [name for name, p in patterns.items() if p not in ANYTHING + NOTHING and re.fullmatch(p, key)]
        takers = [name for name in naming if name in able] or [
            n for n in able if everyone[n].claims and everyone[n].claims(space)
        ]
        takers = takers or [name for name in able if patterns[name] in ANYTHING]
        unable = [name for name in naming if name in kinds and name not in able]
        if unable and not set(naming) & set(able):
            raise UserError(
                f"The observation '{key}' is {_told(space)}, which the kind {unable[0]} cannot take. Change its shape, "
                f"or rename it (or let {_option(kinds[unable[0]], options, where)} match something else)."
            )
        if len(takers) > 1 and set(takers) & set(kinds):
            told = (f"{_option(everyone[name], options, where)} ('{patterns[name]}')" for name in takers)
            options_ = " and ".join(told)
            raise UserError(f"The observation '{key}' matches two kinds, {options_}: make one of them more specific.")
        if takers and takers[0] in kinds:
            chosen[takers[0]][key] = space
    listed = ", ".join(f"{k} ({'/'.join(kinds_of(s, kinds)) or 'no kind'})" for k, s in sorted(spaces.items()))
    for name, kind in kinds.items():
        if not chosen[name] and patterns[name] not in (*ANYTHING, *NOTHING, kind.default_keys):
            raise UserError(
                f"{_option(kind, options, where)} is '{patterns[name]}', which matches none of the {name} "
                f"observations. The environment gives: {listed or 'nothing'}"
            )
    chosen = {name: taken for name, taken in chosen.items() if taken}
    if not chosen:
        own = {name: patterns[name] for name in kinds}
        raise UserError(
            f"The {where}'s kinds and key patterns {own} match no observation. The environment gives: "
            f"{', '.join(f'{key} {space}' for key, space in sorted(spaces.items())) or 'nothing'}"
        )
    return chosen


def kinds_of(space: Space, kinds: Mapping[str, ModalityConfig]) -> list[str]:
    """Names of the kinds that recognise an observation of this space."""
    return [name for name, kind in kinds.items() if kind.recognises(space)]


def _option(kind: ModalityConfig, options: Mapping, where: str) -> str:
    """Where the pattern of a kind's keys is set: the configuration, if it knows the kind, or its definition."""
    key = kind.keys_option or f"{kind.name}_keys"
    return f"{where}.{key}" if key in options else f"ModalityConfig('{kind.name}', keys=...)"


def _told(space: Space) -> str:
    return f"{getattr(space, 'dtype', type(space).__name__)} {list(space.shape or ())}"
