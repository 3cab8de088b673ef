"""Text observations as token ids: a fixed number of them each step, filled up with padding.

Id 0 is padding, 1 a word that is not in the vocabulary, 2 the end of the text. What comes after depends on the
tokenizer:

    bytes               the text's UTF-8 bytes; needs no vocabulary, and no word is unknown
    words               the environment's own word list (its attribute `vocabulary`)
    FILE.json           a tokenizer of the package `tokenizers` (pip install -r requirements/text.txt), such as pairs:
                        python -m envs.text --train corpus.txt --size 1000 FILE.json

With `stream` there is one token each step, as in Dynalang (Lin et al. 2023): a new text begins when it changes.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from gymnasium import spaces

from .wrappers import TaskError, Wrapper

PAD, UNKNOWN, END = range(3)
SPECIAL = 3  # ids before the vocabulary's


class Bytes:
    """UTF-8 bytes."""

    size = SPECIAL + 256

    def encode(self, text: str) -> list[int]:
        return [SPECIAL + byte for byte in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(n - SPECIAL for n in ids if n >= SPECIAL).decode(errors="replace")


class Words:
    """Words and punctuation of a list, in lower case."""

    def __init__(self, vocabulary: Sequence[str]):
        self._words = list(dict.fromkeys(word.lower() for word in vocabulary))
        self._ids = {word: SPECIAL + n for n, word in enumerate(self._words)}
        self.size = SPECIAL + len(self._words)

    def encode(self, text: str) -> list[int]:
        return [self._ids.get(word, UNKNOWN) for word in re.findall(r"\w+|[^\w\s]", text.lower())]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join("?" if n < SPECIAL else self._words[n - SPECIAL] for n in ids)


class Pieces:
    """A tokenizer that the package `tokenizers` saved."""

    def __init__(self, path: str):
        try:
            import tokenizers
        except ModuleNotFoundError as error:
            raise TaskError(f"text.tokenizer {path} needs tokenizers: pip install -r requirements/text.txt") from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(path)
        except Exception as error:  # the package raises its own base class
            raise TaskError(f"text.tokenizer {path} cannot be read: {' '.join(str(error).split())}") from error
        self._path = path
        self.size = SPECIAL + self._tokenizer.get_vocab_size()

    def __reduce__(self):
        return Pieces, (self._path,)

    def encode(self, text: str) -> list[int]:
        return [SPECIAL + n for n in self._tokenizer.encode(text).ids]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([n - SPECIAL for n in ids if n >= SPECIAL])


class TokenSpace(spaces.Box):
    """Ids [length] of a tokenizer, which comes along so that what a model predicts can be read."""

    def __init__(self, tokenizer, length: int):
        super().__init__(0, tokenizer.size - 1, (length,), np.int32)
        self.tokenizer = tokenizer

    def same_words(self, other) -> bool:
        """Does every id mean the same there?"""
        if self.tokenizer.size != getattr(getattr(other, "tokenizer", None), "size", None):
            return False
        ids = range(SPECIAL, self.tokenizer.size)
        return all(self.tokenizer.decode([n]) == other.tokenizer.decode([n]) for n in ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text up to its end; padding left out."""
        ids = [int(n) for n in ids]
        ids = ids[: ids.index(END)] if END in ids else ids
        return self.tokenizer.decode([n for n in ids if n != PAD])


def make_tokenizer(name: str, vocabulary: Sequence[str] | None):
    """auto is words for an environment with a vocabulary, bytes for others."""
    if name == "bytes" or name == "auto" and vocabulary is None:
        return Bytes()
    if name in ("auto", "words"):
        if vocabulary is None:
            raise TaskError("text.tokenizer is words, but the environment has no vocabulary: use bytes, or a file.")
        return Words(vocabulary)
    if not name.endswith(".json"):
        raise TaskError(f"text.tokenizer is '{name}', expected auto, bytes, words, or a file that ends in .json.")
    return Pieces(name)


class TokenizeText(Wrapper):
    """Turns every observation with a `Text` space into token ids.

    Args:
        length: ids per step; a longer text is cut (and logged as `log_text_cut`, 1 where it was; `log_text_unknown`
            is the number of unknown words).
        tokenizer: see the top of this file.
        stream: one id each step instead.
    """

    def __init__(self, env, length: int, tokenizer: str = "auto", stream: bool = False):
        super().__init__(env)
        self._length, self._stream = length, stream
        self._keys = [key for key, space in self.obs_space.items() if isinstance(space, spaces.Text)]
        self._tokenizer = make_tokenizer(tokenizer, getattr(env, "vocabulary", None)) if self._keys else None
        for key in self._keys:
            self.obs_space[key] = TokenSpace(self._tokenizer, 1 if stream else length)
        self._said = {key: ("", 0) for key in self._keys}  # text, and how much of it has been streamed

    def reset(self):
        self._said = {key: ("", 0) for key in self._keys}
        return self._convert(self.env.reset())

    def step(self, action):
        return self._convert(self.env.step(action))

    def _convert(self, step):
        step, cut, unknown = dict(step), False, 0
        for key in self._keys:
            if step.get(key) is not None:
                text = step[key]
                if not isinstance(text, str):
                    raise TaskError(f"observation '{key}' is a {type(text).__name__}, but its space says text.")
                ids = [*self._tokenizer.encode(text), END] if text else []
                step[key] = self._next(key, text, ids) if self._stream else self._whole(ids)
                cut, unknown = cut or len(ids) > self._length, unknown + ids.count(UNKNOWN)
        logs = {"log_text_unknown": np.float32(unknown)} | ({} if self._stream else {"log_text_cut": np.float32(cut)})
        return step | logs

    def _whole(self, ids):
        out = np.full(self._length, PAD, np.int32)
        out[: min(len(ids), self._length)] = ids[: self._length]
        return out

    def _next(self, key, text, ids):
        said, place = self._said[key]
        place = place if said == text else 0
        self._said[key] = (text, place + 1)
        return np.array([ids[place] if place < len(ids) else PAD], np.int32)


def train(corpus: str, size: int, out: str) -> None:
    """Byte pairs of a text file (Sennrich et al. 2016)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train([corpus], trainer)
    tokenizer.save(out)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train a byte-pair tokenizer on a text file.")
    parser.add_argument("--train", metavar="CORPUS.txt", required=True)
    parser.add_argument("--size", type=int, default=1000, help="size of the vocabulary, at least 256")
    parser.add_argument("out", metavar="OUT.json")
    args = parser.parse_args(argv)
    if not Path(args.train).is_file():
        parser.error(f"{args.train} is not a file")
    if not Path(args.out).absolute().parent.is_dir():
        parser.error(f"{Path(args.out).parent} is not a folder")
    try:
        train(args.train, max(256, args.size), args.out)
    except ModuleNotFoundError:
        parser.error("needs tokenizers: pip install -r requirements/text.txt")
    print(f"{args.out}: {Pieces(args.out).size - SPECIAL} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
