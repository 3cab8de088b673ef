"""Kinds of observation. A file per kind says how it is recognised, encoded, decoded and scored; this registry names
them.

A kind is a `ModalityConfig`: adding one to `MODALITY_CONFIGS` makes every observation that it recognises part of the
world model. The order of the registry is the order in which embeddings are joined.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from gymnasium.spaces import Space
from torch import nn

from errors import UserError

from . import image, vector

ANYTHING, NOTHING = (".*",), ("", "$^")


@dataclass(frozen=True)
class ModalityConfig:
    """One kind of observation.

    Attributes:
        name: as it appears in logs and in the keys of the embedding.
        recognises: does an observation of this space belong to this kind?
        keys_option: the option of the encoder's and decoder's configuration that holds the regular expression over
            keys.
        encoder: (spaces, **options) -> module with `out_size`, mapping {key: [*b, ...]} to [*b, out_size].
        decoder: (spaces, deter, stoch, **options) -> module mapping deter, stoch to {key: distribution}.
    """

    name: str
    recognises: Callable[[Space], bool]
    keys_option: str
    encoder: Callable[..., nn.Module]
    decoder: Callable[..., nn.Module]


MODALITY_CONFIGS: dict[str, ModalityConfig] = {
    "vector": ModalityConfig("vector", vector.recognises, "mlp_keys", vector.VectorEncoder, vector.VectorDecoder),
    "image": ModalityConfig("image", image.recognises, "cnn_keys", image.ImageEncoder, image.ImageDecoder),
}


def select(spaces: dict[str, Space], patterns: dict[str, str], where: str) -> dict[str, dict[str, Space]]:
    """Which observation keys belong to which kind: {kind: {key: space}}, keys sorted, empty kinds left out.

    Args:
        patterns: the regular expression (full match) of each `keys_option`.
        where: `encoder` or `decoder`, for the message.
    Raises:
        UserError: a pattern other than `.*` that matches no key, or no key matched at all.
    """
    chosen = {}
    for name, kind in MODALITY_CONFIGS.items():
        own = {key: space for key, space in sorted(spaces.items()) if kind.recognises(space)}
        pattern = patterns[kind.keys_option]
        matched = {key: space for key, space in own.items() if pattern and re.fullmatch(pattern, key)}
        if not matched and pattern not in ANYTHING + NOTHING:
            listed = ", ".join(f"{k} ({'/'.join(kinds_of(s)) or 'no kind'})" for k, s in sorted(spaces.items()))
            raise UserError(
                f"{where}.{kind.keys_option} is '{pattern}', which matches none of the {name} observations. "
                f"The environment gives: {listed}"
            )
        if matched:
            chosen[name] = matched
    if not chosen:
        listed = ", ".join(f"{key} {space}" for key, space in sorted(spaces.items())) or "nothing"
        raise UserError(f"The {where}'s key patterns {patterns} match no observation. The environment gives: {listed}")
    return chosen


def kinds_of(space: Space) -> list[str]:
    """Names of the kinds that recognise an observation of this space."""
    return [name for name, kind in MODALITY_CONFIGS.items() if kind.recognises(space)]
