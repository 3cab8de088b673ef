"""Text: a fixed number of token ids per step, filled up with padding (id 0). One token per step is text as a stream.

Encoder: embeddings, pre-norm transformer layers, the mean over the tokens that are there. Decoder: the logits of every
token, scored by their cross-entropy over the tokens that are there, divided by their number. How words become ids is
decided in the environment's wrapper (`envs/text.py`).
"""

import math
from pathlib import Path

import numpy as np
import torch
from gymnasium import spaces as gs
from jaxtyping import Float, Int
from torch import Tensor, nn

from distributions import full_precision
from errors import UserError
from layers import ACTIVATIONS, MLP, Dense, Linear, RMSNorm, init_weight

from .vector import safe

PAD = 0
SPECIAL = 3  # ids before a tokenizer's own (`envs/text.py`): padding, unknown, end
HEADS = 4
LARGEST = 10_000_000  # ids of a vocabulary; above that, a bound was forgotten


def recognises(space: gs.Space) -> bool:
    """Boxes of integers with one axis and none below 0: token ids up to the space's upper bound."""
    return (
        isinstance(space, gs.Box)
        and space.dtype.kind in "iu"
        and len(space.shape) == 1
        and bool((space.low >= 0).all())
    )


def tokenized(space: gs.Space) -> bool:
    """What `envs/text.py` made of a text, however it is called."""
    return hasattr(space, "tokenizer")


def vocabulary(space: gs.Space) -> int:
    """Number of ids, padding included."""
    size = int(space.high.max()) + 1
    if size > LARGEST:
        raise UserError(
            f"A text has ids up to {size - 1:,}: let its space's upper bound be the vocabulary's largest id."
        )
    return size


def show(
    decoder: nn.Module, key: str, truth: np.ndarray, predicted: np.ndarray, context: int, windows: int = 3
) -> dict:
    """Sentences of the first windows, the true ones next to those that the model expects: where it was last shown the
    truth, and at the end. Arguments as in `image.show`.
    """
    rows = [f"| step | truth | model, after seeing {context} steps |", "|---|---|---|"]
    for window in range(min(windows, len(truth))):
        for step in sorted({context - 1, truth.shape[1] - 1}):
            true, model = (decoder.words[key].text(ids[window, step]) for ids in (truth, predicted))
            rows.append(f"| {step} | {_cell(true)} | {_cell(model)} |")
    return {"": ("text", "\n".join(rows))}


def _cell(text: str) -> str:
    """As a table of Markdown can hold it."""
    return " ".join(text.replace("|", "\\|").split())


class Words:
    """Ids to text: by the vocabulary that the observation's space brings along (`envs/text.py`), or as numbers."""

    def __init__(self, space: gs.Space):
        self.decode = getattr(space, "decode", None)

    def text(self, ids: Int[np.ndarray, " length"]) -> str:
        ids = [int(n) for n in ids]
        return self.decode(ids) if self.decode else " ".join(map(str, ids))


class Tokens:
    """A categorical per token. Targets are ids, of which padding does not count."""

    def __init__(self, logits: Float[Tensor, "*b length vocabulary"]):
        self.logits = full_precision(logits)

    def mode(self) -> Int[Tensor, "*b length"]:
        return self.logits.argmax(-1)

    def loss(self, target: Int[Tensor, "*b length"]) -> Float[Tensor, "*b"]:
        """Nats per token that is there; 0 where none is."""
        nats = -torch.log_softmax(self.logits, -1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
        valid = (target != PAD).to(nats.dtype)
        return (nats * valid).sum(-1) / valid.sum(-1).clamp(min=1)

    def log_prob(self, target: Int[Tensor, "*b length"]) -> Float[Tensor, "*b"]:
        return -self.loss(target)


class TransformerLayer(nn.Module):
    """Pre-norm self-attention among the tokens that are there, and a pre-norm MLP of four times the width."""

    def __init__(self, width: int, act: str):
        super().__init__()
        self.heads, self.act = math.gcd(HEADS, width), ACTIVATIONS[act]
        self.norm, self.norm_mlp = RMSNorm(width), RMSNorm(width)
        self.qkv, self.out = Linear(width, 3 * width), Linear(width, width)
        self.wide, self.narrow = Linear(width, 4 * width), Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "n length width"], bias: Float[Tensor, "n 1 1 length"]) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
        seen = torch.softmax(full_precision(scores) + bias, -1).to(value.dtype) @ value
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.narrow(self.act(self.wide(self.norm_mlp(x))))


class Transformer(nn.Module):
    """Token ids [n, length] -> [n, width], whatever the padding: zeros where no token is there."""

    def __init__(self, vocabulary: int, width: int, layers: int, act: str):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        init_weight(self.embedding.weight, 1)
        self.layers = nn.ModuleList(TransformerLayer(width, act) for _ in range(layers))
        self.norm = RMSNorm(width)

    def forward(self, ids: Int[Tensor, "n length"]) -> Float[Tensor, "n width"]:
        valid = ids != PAD
        x = self.embedding(ids)
        x = x + positions(ids.shape[-1], x)
        bias = torch.where(valid, 0.0, -1e9)[:, None, None]  # finite: a row without tokens stays a number
        for layer in self.layers:
            x = layer(x, bias)
        x = self.norm(x) * valid.unsqueeze(-1)
        return x.sum(1) / valid.sum(1, keepdim=True).clamp(min=1).to(x.dtype)


class Pretrained(nn.Module):
    """Token ids [n, length] -> [n, width] by a frozen model of the package `transformers`: the mean over its last
    layer's tokens, and a dense layer that is trained.

    `path` is a folder as `save_pretrained` writes it. Its own `tokenizer.json` must have made the ids, of which the
    first three are ours (`envs/text.py`).
    """

    def __init__(self, path: str, vocabulary: int, length: int, width: int, act: str):
        super().__init__()
        try:
            from transformers import AutoModel
        except ModuleNotFoundError as error:
            raise UserError(
                "encoder.text_pretrained needs transformers: pip install -r requirements/pretrained.txt"
            ) from error
        if not Path(path).is_dir():
            raise UserError(f"encoder.text_pretrained: {path} is not a folder; nothing is downloaded.")
        try:
            self.model = AutoModel.from_pretrained(path, local_files_only=True).float()
        except Exception as error:  # the packages raise errors of their own
            reason = " ".join(str(error).split())
            raise UserError(f"encoder.text_pretrained: {path} holds no model that can be read: {reason}") from error
        known = self.model.get_input_embeddings().num_embeddings
        if vocabulary - SPECIAL > known:
            raise UserError(
                f"encoder.text_pretrained: {path} knows {known} tokens, and the observation has "
                f"{vocabulary - SPECIAL}: let text.tokenizer be its own tokenizer.json."
            )
        self.model.requires_grad_(False)
        try:
            self._read(torch.full((1, length), SPECIAL))
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"encoder.text_pretrained: {path} cannot encode {length} tokens (text.length) by itself: {reason}"
            ) from error
        self.out = Dense(self.model.config.hidden_size, width, act)

    def train(self, mode: bool = True):
        """Frozen: no dropout, ever."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, ids: Int[Tensor, "n length"]) -> Float[Tensor, "n width"]:
        return self.out(self._read(ids)) * (ids >= SPECIAL).any(1, keepdim=True)

    @torch.no_grad()
    def _read(self, ids: Int[Tensor, "n length"]) -> Float[Tensor, "n hidden"]:
        valid = ids >= SPECIAL
        hidden = self.model(input_ids=(ids - SPECIAL).clamp(min=0), attention_mask=valid.long()).last_hidden_state
        return (hidden * valid.unsqueeze(-1)).sum(1) / valid.sum(1, keepdim=True).clamp(min=1).to(hidden.dtype)


def positions(length: int, like: Tensor) -> Float[Tensor, "length width"]:
    """Sines and cosines (Vaswani et al. 2017), for any length."""
    width = like.shape[-1]
    rate = torch.exp(-math.log(10000.0) * torch.arange(0, width, 2, device=like.device) / width)
    angle = torch.arange(length, device=like.device)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :width].to(like.dtype)


class TextEncoder(nn.Module):
    """{key: ids [*b, length]} -> [*b, out_size], each key by a transformer of its own.

    Args:
        text_units, text_layers: width and number of the transformer's layers; those of the vectors' MLP if not given.
        text_pretrained: folder of a model that reads the text instead (see `Pretrained`).
    """

    def __init__(
        self,
        spaces: dict,
        *,
        units: int,
        layers: int,
        text_units: int | None = None,
        text_layers: int | None = None,
        text_pretrained: str | None = None,
        act: str = "silu",
        **_,
    ):
        super().__init__()
        units, layers = text_units or units, layers if text_layers is None else text_layers
        self.keys = {key: safe(key) for key in spaces}

        def net(size: int, length: int) -> nn.Module:
            if text_pretrained:
                return Pretrained(text_pretrained, size, length, units, act)
            return Transformer(size, units, layers, act)

        self.nets = nn.ModuleDict({safe(key): net(vocabulary(space), *space.shape) for key, space in spaces.items()})
        self.out_size = units * len(spaces)

    def forward(self, obs: dict[str, Tensor], present: dict[str, Tensor]) -> Float[Tensor, "*b out"]:
        parts = []
        for key, name in self.keys.items():
            ids = obs[key].long()
            if key in present:
                ids = ids * present[key].unsqueeze(-1)
            parts.append(self.nets[name](ids.reshape(-1, ids.shape[-1])).reshape(*ids.shape[:-1], -1))
        return torch.cat(parts, -1)


class TextDecoder(nn.Module):
    """[deter, stoch] -> MLP -> a vector per token -> logits [*b, length, vocabulary]."""

    def __init__(
        self,
        spaces: dict,
        deter: int,
        stoch: int,
        *,
        units: int,
        layers: int,
        text_units: int | None = None,
        text_layers: int | None = None,
        outscale: float = 1.0,
        act: str = "silu",
        **_,
    ):
        super().__init__()
        units, layers = text_units or units, layers if text_layers is None else text_layers
        self.keys = {key: safe(key) for key in spaces}
        self.words = {key: Words(space) for key, space in spaces.items()}
        self.mlp = MLP(deter + stoch, units, layers, act)
        self.tokens = nn.ModuleDict(
            {safe(k): Dense(self.mlp.out_size, space.shape[0] * units, act) for k, space in spaces.items()}
        )
        self.outs = nn.ModuleDict(
            {safe(key): Linear(units, vocabulary(space), outscale) for key, space in spaces.items()}
        )

    def forward(self, deter: Float[Tensor, "*b deter"], stoch: Float[Tensor, "*b stoch"]) -> dict[str, Tokens]:
        x = self.mlp(torch.cat([deter, stoch], -1))
        out = {}
        for key, name in self.keys.items():
            width = self.outs[name].in_features
            out[key] = Tokens(self.outs[name](self.tokens[name](x).unflatten(-1, (-1, width))))
        return out

    def target(self, key: str, value: Tensor) -> Int[Tensor, "*b length"]:
        """What the distribution of `key` is scored on."""
        return value.long()
