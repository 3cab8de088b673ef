"""Text observations: into token ids and back, cut, padded, streamed."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces

from envs import Env, TaskError, transition
from envs.text import END, PAD, SPECIAL, UNKNOWN, Bytes, Pieces, TokenizeText, TokenSpace, Words, make_tokenizer
from errors import UserError
from modalities.text import TextEncoder

ROOT = Path(__file__).resolve().parent.parent
WORDS = ["go", "to", "the", "Red", "ball", ","]


class Says(Env):
    """Says one text after the other; None is silence that counts as not there."""

    def __init__(self, texts, vocabulary=None):
        self.obs_space = {"mission": spaces.Text(64), "pose": spaces.Box(-1, 1, (1,), np.float32)}
        self.act_space = spaces.Discrete(2)
        self.texts, self.vocabulary = texts, vocabulary

    def reset(self):
        self.left = iter(self.texts)
        return transition(self.say(), first=True)

    def step(self, action):
        return transition(self.say())

    def say(self):
        text = next(self.left)
        obs = {"pose": np.zeros(1, np.float32)}
        return obs if text is None else obs | {"mission": text}


def ids(env) -> list:
    steps = [env.reset()]
    steps += [env.step(0) for _ in env.env.texts[1:]]
    return [step["mission"].tolist() if "mission" in step else None for step in steps]


def test_words():
    words = Words(WORDS)
    assert words.size == SPECIAL + 6
    assert words.encode("Go to the red, red BALL") == [3, 4, 5, 6, 8, 6, 7]
    assert words.encode("go home") == [3, UNKNOWN] and words.encode("") == []
    assert words.decode([3, UNKNOWN, 7]) == "go ? ball"


@pytest.mark.parametrize("text", ["go to the ball", "größe 😀", ""])
def test_bytes_come_back(text):
    assert Bytes().decode(Bytes().encode(text)) == text and max(Bytes().encode(text), default=0) < Bytes().size


def test_text_is_cut_padded_and_ended():
    env = TokenizeText(Says(["go to", "go to the red ball", "", None], WORDS), length=4)
    assert ids(env) == [[3, 4, END, PAD], [3, 4, 5, 6], [PAD] * 4, None]
    space = env.obs_space["mission"]
    assert isinstance(space, TokenSpace) and space.shape == (4,) and space.high.max() == SPECIAL + 5
    assert space.decode([3, 4, END, 9]) == "go to" and space.decode([PAD] * 4) == ""
    env.reset()
    assert env.step(0)["log_text_cut"] == 1
    for ids_ in ids(env)[:3]:
        assert space.contains(np.array(ids_, np.int32))


def test_a_stream_says_one_token_each_step():
    env = TokenizeText(Says(["go to", "go to", "go to", "go to", "the", "the", ""], WORDS), length=4, stream=True)
    assert ids(env) == [[3], [4], [END], [PAD], [5], [END], [PAD]]
    assert env.obs_space["mission"].shape == (1,)
    assert env.reset()["mission"].tolist() == [3], "a new episode begins its text again"


def test_which_tokenizer():
    assert isinstance(make_tokenizer("auto", None), Bytes) and isinstance(make_tokenizer("auto", WORDS), Words)
    assert isinstance(make_tokenizer("bytes", WORDS), Bytes)
    with pytest.raises(TaskError, match="no vocabulary"):
        make_tokenizer("words", None)
    with pytest.raises(TaskError, match="expected auto, bytes, words"):
        make_tokenizer("sentences", WORDS)


def test_what_is_no_text_is_named():
    env = TokenizeText(Says([5], WORDS), length=4)
    with pytest.raises(TaskError, match="'mission' is a int.*text"):
        env.reset()


def test_cut_and_unknown_are_those_of_all_texts():
    env = Says(["go to the ball", "go", "no"], WORDS)
    env.obs_space["order"] = spaces.Text(64)
    say = env.say
    env.say = lambda: {"order": "go", **say()}
    env = TokenizeText(env, length=3)
    steps = [env.reset(), env.step(0), env.step(0)]
    assert [step["log_text_cut"] for step in steps] == [1, 0, 0]
    assert [step["log_text_unknown"] for step in steps] == [0, 0, 1]


def test_same_words():
    one, other = TokenSpace(Words(WORDS), 4), TokenSpace(Words(WORDS[::-1]), 4)
    assert one.same_words(TokenSpace(Words(WORDS), 4)) and not one.same_words(other)
    assert not one.same_words(TokenSpace(Bytes(), 4)) and not one.same_words(spaces.Box(0, 8, (4,), np.int32))


def test_spaces_travel_to_other_processes():
    space = TokenizeText(Says(["go"], WORDS), length=4).obs_space["mission"]
    again = pickle.loads(pickle.dumps(space))
    assert again == space and again.decode([3, 4, END]) == "go to"


def test_byte_pairs(tmp_path):
    """Trained by the command, saved, read, and sent to another process."""
    pytest.importorskip("tokenizers", reason="needs requirements/text.txt")
    (tmp_path / "corpus.txt").write_text("go to the red ball\n" * 50 + "pick up the blue key\n" * 50)
    out = tmp_path / "pairs.json"
    command = [sys.executable, "-m", "envs.text", "--train", tmp_path / "corpus.txt", "--size", "300", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pieces = pickle.loads(pickle.dumps(Pieces(str(out))))
    found = pieces.encode("go to the blue ball")
    assert len(found) < len("go to the blue ball") / 2 and max(found) < pieces.size
    assert pieces.decode(found) == "go to the blue ball"
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(TaskError, match="broken.json cannot be read"):
        Pieces(str(tmp_path / "broken.json"))


@pytest.fixture
def bert(tmp_path):
    """A folder as `save_pretrained` writes it: a small model that nobody trained, and its tokenizer."""
    transformers = pytest.importorskip("transformers", reason="needs requirements/pretrained.txt")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[UNK]", "go", "to", "red", "ball"]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **sizes)).save_pretrained(tmp_path)
    return tmp_path


def test_a_pretrained_model_reads(bert):
    """The mean over a text's own tokens, as the package gives it without padding; only what follows is trained."""
    from transformers import AutoModel

    space = TokenizeText(Says(["go to ball"], WORDS), length=6, tokenizer=str(bert / "tokenizer.json")).obs_space
    encoder = TextEncoder({"mission": space["mission"]}, units=8, layers=1, text_pretrained=str(bert)).train()
    ids = torch.tensor([[4, 5, 7, END, 0, 0], [4, 6, END, 0, 0, 0], [0] * 6])
    found = encoder({"mission": ids}, {})
    (net,) = encoder.nets.values()
    model = AutoModel.from_pretrained(bert).eval()
    for row, own in zip(found, ([1, 2, 4], [1, 3]), strict=False):
        hidden = model(torch.tensor([own])).last_hidden_state.mean(1)
        torch.testing.assert_close(row, net.out(hidden)[0], rtol=1e-4, atol=1e-5)
    assert not found[2].any()
    found.sum().backward()
    trained = {name for name, p in encoder.named_parameters() if p.grad is not None}
    assert trained and all(".out." in name for name in trained)


def test_a_pretrained_model_that_does_not_fit_is_named(bert, tmp_path):
    space = {"mission": spaces.Box(0, 200, (6,), np.int32)}
    with pytest.raises(UserError, match="knows 5 tokens.*198.*tokenizer.json"):
        TextEncoder(space, units=8, layers=1, text_pretrained=str(bert))
    with pytest.raises(UserError, match="nowhere is not a folder"):
        TextEncoder(space, units=8, layers=1, text_pretrained=str(tmp_path / "nowhere"))
