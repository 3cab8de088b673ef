"""The configuration: named blocks of `configs.yaml`, overrides from the command line, and errors that help.

    config = main_load(sys.argv[1:])        # the front door: prints help and errors, and exits
    config = load(['--configs', 'dmc_vision', 'cpu', '--encoder.units', '128'])   # raises ConfigError

`defaults` comes first, then the blocks in the order named, then the other flags in the order given; the later wins. A
default decides the type of its key. This module imports neither torch nor numpy, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import io
import math
import os
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from errors import UserError

CONFIGS = Path(__file__).parent / "configs.yaml"

# What a key may hold, beyond its type. Patterns with a star stand for every key they match.

CHOICES = {
    "mode": ("train", "eval"),
    "precision": ("auto", "float32", "bfloat16", "float16"),
    "parallel": ("process", "thread", "serial"),
    "replay_device": ("cpu", "cuda"),
    "log_level": ("debug", "info", "warning", "error"),
    "disag_target": ("stoch", "embed", "deter", "feat"),
    "disag_spread": ("std", "var"),
    "icm.target": ("stoch", "embed", "deter", "feat"),
    "rnd.target": ("stoch", "embed", "deter", "feat"),
    "empowerment.form": ("state", "action"),
    "behavior": ("actor_critic", "hierarchical"),
    "actor_objective": ("reinforce", "ppo"),
    "imag_gradient": ("reinforce", "dynamics", "both"),
    "grad_heads": ("decoder", "reward", "cont", "critic"),  # of each entry
    "dyn.cell": ("block_gru", "gru"),
    "encoder.downsample": ("pool", "stride"),
    "decoder.upsample": ("nearest", "transposed"),
    "decoder.image_dist": ("sigmoid_mse", "mse", "normal"),
    "decoder.vector_dist": ("symlog_mse", "mse", "normal"),
    "reward_head.dist": ("symexp_twohot", "symlog_disc", "symlog_mse", "mse", "normal"),
    "critic.dist": ("symexp_twohot", "symlog_disc", "symlog_mse", "mse", "normal"),
    "*.rounding": ("exact", "fused"),
    "encoder.fusion": ("concat", "attention", "poe"),
    "*.audio_form": ("auto", "features", "spectrogram", "waveform"),
    "encoder.audio_front": ("spectrogram", "raw"),
    "sound.observe": ("audio", "pose", "map", "image"),  # of each entry
    "sound.audio": ("waveform", "features"),
    "sound.view": ("top", "first"),
    "sound.actions": ("continuous", "headings"),
    "babyai.observe": ("image", "grid"),  # of each entry
    "babyai.actions": ("all", "moves"),
    "cue.absent": ("image", "audio", "text", "vector"),  # of each entry
    "*.act": ("silu", "gelu", "relu", "elu", "tanh"),
    "metagrad": ("off", "hypergradient", "one_step"),
    "opt.name": ("laprop", "adam"),
}

PATTERNS = {
    "device": (r"auto|cpu|cuda(:\d+)?", "auto, cpu, cuda, cuda:1, ..."),
}

RANGES = {
    "imag_last": ">= 0",
    "episodes": ">= 1",
    "steps": ">= 1",
    "seed": ">= 0, <= 4294967295",  # what every simulator takes
    "threads": ">= 0",
    "*envs": ">= 1",
    "action_repeat": ">= 1",
    "time_limit": ">= 0",
    "image_size": ">= 1",
    "dmc.camera": ">= -1",
    "atari.noops": ">= 0",
    "audio_dim": ">= 0",
    "audio_noise_std": ">= 0",
    "text.length": ">= 1",
    "sound.scale": ">= 0.25",  # a robot has to pass
    "sound.mics": ">= 1",
    "sound.step": ">= 0.01",
    "sound.steps": ">= 1",
    "sound.order": ">= 0",
    "sound.absorption": "> 0, <= 1",
    "sound.sources": ">= 1",
    "sound.distractors": ">= 0",
    "sound.speed": ">= 0",
    "grid.size": ">= 2",
    "grid.steps": ">= 1",
    "pinpad.size": ">= 6",
    "pinpad.steps": ">= 1",
    "babyai.view": ">= 3",
    "cue.delay": ">= 0",
    "cue.samples": ">= 1",
    "cue.missing": ">= 0, < 1",
    "modality_scales.*": ">= 0",
    "modality_dropout": ">= 0, < 1",
    "dataset_size": ">= 1",
    "keep_on_disk": ">= 0",
    "env_timeout": ">= 0",
    "env_restarts": ">= 0",
    "batch_size": ">= 1",
    "batch_length": ">= 2",
    "train_ratio": ">= 0",
    "prefill": ">= 0",
    "pretrain": ">= 0",
    "eval_every": ">= 0",
    "eval_episode_num": ">= 0",
    "log_every": ">= 1",
    "save_every": ">= 1",
    "expl_until": ">= 0",
    "expl_*_scale": ">= 0",
    "disag_models": ">= 2",  # of one there is no deviation
    "*.features": ">= 1",
    "icm.beta": ">= 0, <= 1",
    "empowerment.steps": ">= 1",
    "empowerment.starts": ">= 1",
    "empowerment.beta": "> 0",
    "diayn.skills": ">= 2",
    "hier.every": ">= 1",
    "hier.manager_horizon": "> 1",
    "hier.manager_entropy": ">= 0",
    "hier.novelty": ">= 0",
    "hier.phases": ">= 0, <= 1",
    "encoder.embed_dim": ">= 1",
    "*.groups": ">= 1",
    "*.classes": ">= 2",
    "*.nats": "> 0",
    "ppo.epochs": ">= 2",
    "ppo.minibatches": ">= 1",
    "ppo.clip": "> 0",
    "ppo.kl": "> 0",
    "imag_horizon": ">= 1",
    "imag_gradient_mix": ">= 0, <= 1",
    "horizon": "> 1",
    "expl_horizon": "> 1",
    "discount_lambda": "> 0, <= 1",
    "retnorm.rate": "> 0, <= 1",
    "retnorm.limit": "> 0",
    "retnorm.low": ">= 0, <= 1",
    "retnorm.high": ">= 0, <= 1",
    "kl_free": ">= 0",
    "loss_scales.*": ">= 0",
    "dyn.deter": ">= 1",
    "dyn.hidden": ">= 1",
    "dyn.stoch": ">= 1",
    "dyn.discrete": ">= 0, <= 256",  # a class index is stored in one byte
    "*.blocks": ">= 1",
    "dyn.dyn_layers": ">= 1",  # without one the state would not depend on the action
    "dyn.obs_layers": ">= 1",
    "*layers": ">= 0",
    "*units": ">= 1",
    "*depth": ">= 1",
    "*.audio_window": ">= 2",
    "*.audio_hop": ">= 1",
    "*.audio_rate": ">= 1",
    "*.mults": ">= 1",
    "*.kernel": ">= 1",
    "*.bins": ">= 3",
    "*.unimix_ratio": ">= 0, < 1",
    "*.min_std": "> 0",
    "*.max_std": "> 0",
    "*.outscale": ">= 0",
    "actor.entropy": ">= 0",
    "critic.slow_regularizer": ">= 0",
    "critic.slow_target_update": ">= 1",
    "critic.slow_target_fraction": "> 0, <= 1",
    "opt.*lr": "> 0",
    "meta.kappa": "> 0",
    "meta.limit": ">= 1",
    "meta.horizon": "> 1",
    "meta.discount_lambda": "> 0, <= 1",
    "opt.agc": ">= 0",
    "opt.pmin": "> 0",
    "opt.clip": ">= 0",
    "opt.beta*": ">= 0, < 1",
    "opt.eps": "> 0",
    "opt.warmup": ">= 0",
    "opt.decay": ">= 0",
    "opt.max_bad": ">= 1",
}

# Keys that may be null, with the type they have otherwise. (A null default that is not listed takes what YAML reads.)
NULLABLE = {
    "checkpoint": str,
    "traindir": str,
    "evaldir": str,
    "offline_traindir": str,
    "offline_evaldir": str,
    "encoder.text_pretrained": str,
    **{f"modality_scales.{kind}": float for kind in ("image", "vector", "audio", "text")},
    **{
        f"{net}.{kind}_{key}": int
        for net in ("encoder", "decoder")
        for kind in ("audio", "text")
        for key in ("layers", "units")
    },
    "opt.actor_lr": float,
    "opt.critic_lr": float,
    "opt.intrinsic_lr": float,
    "expl_horizon": float,
    "hier.manager_entropy": float,
    "meta.horizon": float,
    "meta.discount_lambda": float,
    "disag_units": int,
    "encoder.embed_dim": int,
}

# Keys that may differ between a run and its continuation: they change neither what is learned nor what is stored.
FREE = (
    *("mode", "checkpoint", "episodes", "logdir", "force", "steps"),
    *("device", "precision", "compile", "graph", "checkpointing", "threads", "deterministic_run"),
    *("envs", "eval_envs", "parallel", "env_timeout", "env_restarts"),
    *("dataset_size", "keep_on_disk", "replay_device", "evaldir", "offline_evaldir"),
    *("log_every", "eval_every", "eval_episode_num", "eval_sample", "save_every", "save_best", "video_pred_log"),
    *("tensorboard", "wandb", "wandb_project", "log_level"),
)

ABSENT = "(absent)"
SHOWN_DIFFERENCES = 8


class ConfigError(UserError):
    """A mistake in the configuration, told in one line: what was found, what was expected, what to do."""

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))


# The configuration itself


class Config(Mapping):
    """A frozen, nested mapping whose keys are attributes too; lists are tuples.

    `config.encoder.units`, `config['encoder']` and `RSSM(**config.dyn)` all work. It can be pickled and compared.
    `_given` are the names of the settings that were written on the command line.
    """

    __slots__ = ("_given", "_values")

    def __init__(self, values: Mapping[str, Any], _given: Collection[str] = ()):
        for key in values:
            if not key.isidentifier() or key.startswith("_") or hasattr(type(self), key):
                raise ConfigError(f"'{key}' cannot be a key: it is not a name, or the name of a method of Config")
        object.__setattr__(self, "_values", {key: _frozen(value) for key, value in values.items()})
        object.__setattr__(self, "_given", frozenset(_given))

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __getattr__(self, key: str) -> Any:
        if not key.startswith("_") and key in self._values:
            return self._values[key]
        close = difflib.get_close_matches(key, self._values, 1) if not key.startswith("_") else []
        raise AttributeError(f"no key '{key}' here" + (f"; did you mean '{close[0]}'?" if close else ""))

    def __setattr__(self, key: str, value: Any) -> None:
        raise AttributeError(f"a Config is frozen: config.replace(**{{'{key}': ...}}) returns a changed copy")

    def __delattr__(self, key: str) -> None:
        raise AttributeError("a Config is frozen")

    def __reduce__(self):
        return type(self), (self._values, self._given)

    def __dir__(self):
        return [*super().__dir__(), *self._values]

    def __repr__(self) -> str:
        return f"Config({self._values!r})"

    def flat(self) -> dict[str, Any]:
        """All settings by their dotted names: `{'encoder.units': 256, ...}`."""
        return flatten(self)

    def replace(self, /, **changes: Any) -> Config:
        """A copy with other values, checked as in `load`: `config.replace(**{'encoder.units': 64})`."""
        return Config(_nest({**self.flat(), **_Schema(self).settings(changes, "replace")}), self._given)

    def override(self, source: str = "override", /, **changes: Any) -> Config:
        """As `replace`, and these count as `given`. Errors begin with `source`."""
        settings = _Schema(self).settings(changes, source)
        return Config(_nest({**self.flat(), **settings}), self._given | settings.keys())

    def given(self) -> dict[str, Any]:
        """The settings that were written on the command line, by their dotted names (those of blocks are not)."""
        return {key: value for key, value in self.flat().items() if key in self._given}

    def save(self, path: str | os.PathLike) -> None:
        """Write YAML that `read`, and `--configs PATH`, read again. The file is complete or not there at all."""
        stream = io.StringIO()
        stream.write("# The configuration of a run. `--configs` with the path of this file starts another like it.\n")
        yaml = YAML(typ="safe", pure=True)
        yaml.default_flow_style = False
        yaml.sort_base_mapping_type_on_output = False
        yaml.dump(_plain(self), stream)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(stream.getvalue())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)  # there only if something failed, such as a full disk

    @classmethod
    def read(cls, path: str | os.PathLike) -> Config:
        """What `save` wrote. Raises ConfigError when the file is missing or is not a mapping of keys."""
        return cls(_read_yaml(Path(path)))


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return value if isinstance(value, Config) else Config(value)
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *sections, leaf = path.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = value
    return nested


# Reading


def load(argv: Sequence[str], file: str | os.PathLike = CONFIGS) -> Config:
    """The configuration that a command line asks for.

    `argv`: `--configs A B` (names of blocks, or paths of saved configurations) and `--key value` or `--key=value`, in
    any order. Raises ConfigError for every mistake, in the command line and in the file.
    """
    blocks = _read_blocks(Path(file))
    schema = _Schema(blocks["defaults"])
    stacked = {name: schema.settings(block, f"block {name} of {Path(file).name}") for name, block in blocks.items()}
    names, overrides = _split(argv)
    values, written = dict(stacked["defaults"]), {}
    for name in names:
        values.update(_block(name, stacked, schema))
    for key, given in overrides:
        written.update(schema.flag(key, given))
    values.update(written)
    _check_together(values)
    return Config(_nest(values), written)


def main_load(argv: Sequence[str] | None = None, file: str | os.PathLike = CONFIGS) -> Config:
    """`load` for a program: prints help where that is asked for, and a mistake as one line (exit status 2)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    with one_line_errors():
        if "--help" in argv or "-h" in argv:
            _print_and_exit(help_text(file, _Style.of(sys.stdout)))
        if argv and argv[-1] in ("--configs", "--configs="):
            _print_and_exit(blocks_text(file, _Style.of(sys.stdout)))
        return load(argv, file)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """A ConfigError raised inside ends the program with one line on stderr and exit status 2."""
    try:
        yield
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _print_and_exit(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `... --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(0)


def _read_yaml(path: Path) -> dict[str, Any]:
    """One YAML document that is a mapping with text keys; anything else is a ConfigError that says where."""
    text = ""
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte-order mark
        content = YAML(typ="safe").load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    except MarkedYAMLError as error:
        line = error.problem_mark.line if error.problem_mark else 0
        found = re.sub(r" with value .*", "", error.problem or str(error), flags=re.DOTALL)
        raise ConfigError(f"{path.name}, line {line + 1}{_block_at(text, line)}: {found}") from None
    except YAMLError as error:
        raise ConfigError(f"{path.name}: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"{path} holds no settings: expected lines such as `batch_size: 16`")
    return content


def _block_at(text: str, line: int) -> str:
    starts = [match[1] for match in map(re.compile(r"(\w+):").match, text.splitlines()[: line + 1]) if match]
    return f" (block {starts[-1]})" if starts else ""


def _read_blocks(path: Path) -> dict[str, dict]:
    """All blocks of a file; a file without `defaults` is a saved configuration, and all of it is the defaults."""
    content = _read_yaml(path)
    if "defaults" not in content:
        content = {"defaults": content}
    blocks = {name: {} if block is None else block for name, block in content.items()}
    for name, block in blocks.items():
        if not isinstance(block, dict):
            raise ConfigError(f"block {name} of {path.name} is {_show(block)}; expected keys below it, one a line")
    return blocks


def _block(name: str, stacked: Mapping[str, dict], schema: _Schema) -> dict[str, Any]:
    if name in stacked:
        return stacked[name]
    if name.endswith((".yaml", ".yml")):
        return schema.settings(_read_yaml(Path(name)), name)
    close = difflib.get_close_matches(name, stacked, 1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ConfigError(f"unknown block '{name}': {hint}the blocks are {', '.join(stacked)}")


def _split(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The names after `--configs`, and every other flag with its values."""
    flags: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            key, equals, value = word[2:].partition("=")
            flags.append((key, [value] if equals else []))
        elif flags:
            flags[-1][1].append(word)
        else:
            raise ConfigError(f"'{word}' belongs to no key; expected --key value (--help lists the keys)")
    names = [name for key, given in flags if key == "configs" for word in given for name in re.split(r"[,\s]+", word)]
    for key, given in flags:
        if not given:
            missing = "the names of blocks" if key == "configs" else "its value"
            raise ConfigError(f"--{key} lacks {missing}; expected --{key} {'A B' if key == 'configs' else 'VALUE'}")
    return [name for name in names if name], [flag for flag in flags if flag[0] != "configs"]


def _check_together(values: Mapping[str, Any]) -> None:
    """What two keys must agree on. (What a single key may hold is in the tables above.)"""

    def require(holds: bool, message: str) -> None:
        if not holds:
            raise ConfigError(message)

    def has(*keys: str) -> bool:
        return all(key in values for key in keys)

    if has("dyn.deter", "dyn.blocks", "dyn.cell") and values["dyn.cell"] == "block_gru":
        deter, blocks = values["dyn.deter"], values["dyn.blocks"]
        require(deter % blocks == 0, f"dyn.deter is {deter}; expected a multiple of dyn.blocks, which is {blocks}")
    if has("retnorm.low", "retnorm.high"):
        low, high = values["retnorm.low"], values["retnorm.high"]
        require(low < high, f"retnorm.low is {low}; expected less than retnorm.high, which is {high}")
    if has("actor.min_std", "actor.max_std"):
        low, high = values["actor.min_std"], values["actor.max_std"]
        require(low <= high, f"actor.min_std is {low}; expected at most actor.max_std, which is {high}")
    if has("dataset_size", "batch_length"):
        size, length = values["dataset_size"], values["batch_length"]
        require(size > length, f"dataset_size is {size}; expected more than batch_length, which is {length}")
    if has("train_ratio", "offline_traindir"):
        counted = values["train_ratio"] > 0 or values["offline_traindir"] is None
        require(counted, "train_ratio is 0; expected more where offline_traindir is set: updates are counted by it")
    if has("task", "offline_traindir", "mode") and values["task"] == "none":
        require(values["mode"] == "train", "mode eval needs a task to play; found --task none")
        require(values["offline_traindir"] is not None, "task none needs recorded episodes: --offline_traindir FOLDER")


# Keys and values


class _Schema:
    """The keys that `defaults` defines: finds them by what was written, and reads their values."""

    def __init__(self, defaults: Mapping[str, Any]):
        self.flat = flatten(defaults)
        self.sections = {path[:i] for path in self.flat for i, letter in enumerate(path) if letter == "."}

    def settings(self, block: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The settings of a (nested) block, by full name; its globs are expanded and its values checked."""
        settings = {}
        for name, value in flatten(block).items():
            try:
                for path in self.find(name, "{}"):
                    settings[path] = self.parse(path, value, f"{path}: {_show(value)}")
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from None
        return settings

    def flag(self, name: str, words: list[str]) -> dict[str, Any]:
        """The settings of one `--name words...` of the command line."""
        settings = {}
        for path in self.find(name, "--{}"):
            found, value = f"--{path} {' '.join(words)}", words[0]
            if _kind(path, self.flat[path])[1]:  # a list: `96 96`, `96,96` and `[96, 96]` are the same
                value = [word.strip("'\"") for word in re.split(r"[,\s]+", ",".join(words).strip("[]() ,")) if word]
            elif len(words) > 1:
                raise ConfigError(f"{found}: expected one value, not {len(words)}")
            settings[path] = self.parse(path, value, found)
        return settings

    def find(self, name: str, style: str) -> list[str]:
        """The keys that a name stands for: itself, those its star matches, or the one spelt with `_` for `.`."""
        if name in self.flat:
            return [name]
        if any(letter in name for letter in "*?["):
            found = [path for path in self.flat if fnmatch.fnmatchcase(path, name)]
        else:
            found = [path for path in self.flat if path.replace(".", "_") == name.replace(".", "_")]
            if len(found) > 1:
                raise ConfigError(f"{style.format(name)} may be {' or '.join(found)}; write the one you mean")
        if found:
            return found
        raise ConfigError(self._unknown(name, style))

    def _unknown(self, name: str, style: str) -> str:
        key = style.format(name)
        if name in self.sections:
            inside = next(path for path in self.flat if path.startswith(f"{name}."))
            return f"{key} is a section, not a single value; set the keys in it, such as {style.format(inside)}"
        above = [name[:i] for i, letter in enumerate(name) if letter == "." and name[:i] in self.flat]
        if above:
            return f"{key}: {above[0]} is a single value, not a section; set it as {style.format(above[0])}"
        guesses = self._guess(name)
        if not guesses:
            return f"unknown key {key}; --help lists all keys"
        leaf = guesses[0].rpartition(".")[2]
        several = f" (or {style.format('*.' + leaf)} for all {len(guesses)})" if len(guesses) > 1 else ""
        return f"unknown key {key}; did you mean {style.format(guesses[0])}{several}?"

    def _guess(self, name: str) -> list[str]:
        """The keys nearest to a misspelt name, best first; several only where they end in the same word."""

        def likeness(path: str) -> float:
            whole = difflib.SequenceMatcher(None, _loose(name), _loose(path)).ratio()
            ends = difflib.SequenceMatcher(None, _loose(name, -1), _loose(path, -1)).ratio()
            return max(whole, ends * (0.9 if "." in name else 0.99))  # a section that was written counts

        scores = {path: likeness(path) for path in self.flat}
        best = max(scores.values(), default=0)
        return [path for path, score in scores.items() if score == best] if best >= 0.65 else []

    def parse(self, path: str, value: Any, found: str) -> Any:
        """A value in the type of its key, checked against the tables. Text is read as that type."""
        default = self.flat[path]
        kind, is_list = _kind(path, default)
        expected, expected_many = _EXPECTED[kind]
        try:
            if path in NULLABLE and (value is None or str(value).lower() in ("none", "null", "~")):
                return None
            if is_list and not isinstance(value, list | tuple):
                raise _Unreadable
            result = tuple(_read(item, kind) for item in value) if is_list else _read(value, kind)
            if path == "image_size" and len(result) != 2:
                raise _Unreadable("height and width")
        except _Unreadable as error:
            such_as = f" (such as {_show(default)})" if default is not None else ""
            reason = f"; {error}" if str(error) else ""
            raise ConfigError(f"{found}: expected {expected_many if is_list else expected}{such_as}{reason}") from None
        _check(path, result, found)
        return result


class _Unreadable(Exception):
    pass


_EXPECTED = {  # a value of a type, a list of them
    bool: ("true or false", "a list of true and false"),
    int: ("a whole number", "a list of whole numbers"),
    float: ("a number", "a list of numbers"),
    str: ("a text", "a list of texts"),
    None: ("a single value", "a list"),
}
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def _kind(path: str, default: Any) -> tuple[type | None, bool]:
    """The type of a key's value (or of its entries), and whether it is a list."""
    if isinstance(default, list | tuple):
        return (type(default[0]) if default else str), True
    if path in NULLABLE:
        return NULLABLE[path], False
    return (None if default is None else type(default)), False


def _read(value: Any, kind: type | None) -> Any:
    """One value in the given type (None: as YAML types it). Raises _Unreadable, with a hint where there is one."""
    if isinstance(value, list | tuple | Mapping):
        raise _Unreadable
    if kind is None:
        return _read_untyped(value)
    if kind is str:
        if not isinstance(value, str | os.PathLike):
            raise _Unreadable("a null is not possible here" if value is None else "write it in quotes")
        return os.fspath(value)
    if kind is bool:
        if str(value).lower() not in _BOOLEANS:
            raise _Unreadable
        return _BOOLEANS[str(value).lower()]
    number = _read_number(value)
    if kind is int and number != int(number):
        raise _Unreadable
    return kind(number)


def _read_number(value: Any) -> int | float:
    if isinstance(value, str):  # an int first: a float does not hold every large one
        value = int(value) if re.fullmatch(r"\s*[-+]?\d[\d_]*\s*", value) else value
    if value is None or isinstance(value, bool):
        raise _Unreadable
    try:
        number = value if isinstance(value, int) else float(value)
    except (TypeError, ValueError):
        raise _Unreadable from None
    if not math.isfinite(number):
        raise _Unreadable("it must be finite")
    return number


def _read_untyped(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        scalar = None if value.lower() == "none" else YAML(typ="safe").load(value)
    except YAMLError:
        return value
    return value if isinstance(scalar, list | dict) else scalar


def _check(path: str, value: Any, found: str) -> None:
    items = value if isinstance(value, tuple) else () if value is None else (value,)
    choices, pattern, limits = (_look_up(table, path) for table in (CHOICES, PATTERNS, RANGES))
    for item in items:
        if choices and item not in choices:
            close = difflib.get_close_matches(str(item), choices, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{found}: expected {'one of ' if len(choices) > 2 else ''}{_or(choices)}{hint}")
        if path.endswith("_keys"):
            try:
                re.compile(item)
            except re.error as error:
                raise ConfigError(f"{found}: not a regular expression: {error}") from None
        if pattern and not re.fullmatch(pattern[0], item):
            raise ConfigError(f"{found}: expected {pattern[1]}")
        if limits and not all(_holds(item, limit) for limit in limits.split(",")):
            raise ConfigError(f"{found}: expected a number {limits.replace(',', ' and')}")


def _look_up(table: Mapping[str, Any], path: str) -> Any:
    return next((entry for pattern, entry in table.items() if fnmatch.fnmatchcase(path, pattern)), None)


def _holds(value: float, limit: str) -> bool:
    sign, bound = limit.split()
    return {
        ">": value > float(bound),
        ">=": value >= float(bound),
        "<": value < float(bound),
        "<=": value <= float(bound),
    }[sign]


def _loose(name: str, part: int | None = None) -> str:
    """A name as it is compared: small letters, without stars; only its last part where `part` is -1."""
    name = name.lower().replace("*", "").replace("-", "_")
    return name if part is None else name.split(".")[part]


def _or(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _show(value: Any) -> str:
    """A value as it is written on a command line or in YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_show, value))}]"
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def flags(settings: Mapping[str, Any]) -> str:
    """Settings by full name, as a command line for a shell."""
    words = []
    for path, value in settings.items():
        listed = value if isinstance(value, list | tuple) and value else (value,)
        words += [f"--{path}", *(shlex.quote(_show(item)) for item in listed)]
    return " ".join(words)


# Paths


def resolve_paths(config: Config) -> Config:
    """Fill in `logdir` (`{task}`, `{seed}` and any other key in it) and the folders of episodes that are left null."""
    task = config.task.replace("/", "-")  # gym_ALE/Pong-v5 is one folder
    try:
        logdir = config.logdir.format_map({**config, "task": task})
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise ConfigError(f"logdir {config.logdir}: no key {error} to fill in; expected one, as in {{task}}") from None
    logdir = Path(logdir).expanduser()
    return config.replace(
        logdir=logdir,
        traindir=Path(config.traindir).expanduser() if config.traindir else logdir / "train_eps",
        evaldir=Path(config.evaldir).expanduser() if config.evaldir else logdir / "eval_eps",
    )


# A run and its continuation


def difference(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """(key, old, new) for every setting that differs; `ABSENT` where one side does not know the key."""
    before, after = old.flat(), new.flat()
    both = [*before, *(key for key in after if key not in before)]
    pairs = [(key, before.get(key, ABSENT), after.get(key, ABSENT)) for key in both]
    return [(key, was, now) for key, was, now in pairs if was != now]


def check_resume(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """Whether a logdir that was written with `old` may be continued with `new`.

    Returns what differs, all of it harmless (FREE, or a key that `old` is too old to know, at its default) or let
    through by `force`. Raises ConfigError otherwise.
    """
    changed, defaults = difference(old, new), load([]).flat()

    def harmless(key: str, was: Any, now: Any) -> bool:
        # A key that came with a newer version does, at its default, what was done without it.
        return key in FREE or _same_place(key, old, new) or (was == ABSENT and now == defaults.get(key, ABSENT))

    grave = [change for change in changed if not harmless(*change)]
    if not grave or new.get("force"):
        return changed
    told = "; ".join(f"{key} was {_show(was)}, is now {_show(now)}" for key, was, now in grave[:SHOWN_DIFFERENCES])
    more = f"; and {len(grave) - SHOWN_DIFFERENCES} more" if len(grave) > SHOWN_DIFFERENCES else ""
    restore = flags({key: was for key, was, now in grave if ABSENT not in (was, now)})
    back = f"its own values ({restore})" if restore and not more else "the command that started it"
    raise ConfigError(
        f"{new.get('logdir', 'the logdir')} belongs to another configuration: {told}{more}. "
        f"Ways on: another --logdir; {back}; or --force true, to continue it with the new values"
    )


def _same_place(key: str, old: Config, new: Config) -> bool:
    """Whether a folder of episodes lies at the same place inside the logdir, which may have been moved."""
    return key == "traindir" and _inside(old) == _inside(new)


def _inside(config: Config) -> Path:
    folder = Path(config.traindir or Path(config.logdir) / "train_eps")
    return folder.relative_to(config.logdir) if folder.is_relative_to(config.logdir) else folder


# Help: what is written in configs.yaml, so that it is written once

_LINE = re.compile(
    r"(?P<indent> *)(?P<key>'[^']+'|[\w.*]+):"
    r"(?P<value>(?:[^#'\"]|'[^']*'|\"[^\"]*\")*)(?:# ?(?P<comment>.*))?$"  # a # in quotes is no comment
)


class _Style:
    """Colours and line width of the place that the help is printed to."""

    def __init__(self, colour: bool = False, width: int | None = None):
        self.colour, self.width = colour, width

    @classmethod
    def of(cls, stream) -> _Style:
        if not stream.isatty():
            return cls()
        return cls("NO_COLOR" not in os.environ, min(max(shutil.get_terminal_size().columns, 60), 160))

    def bold(self, text: str) -> str:
        return f"\033[1m{text}\033[0m" if self.colour else text

    def blue(self, text: str) -> str:
        return f"\033[36m{text}\033[0m" if self.colour else text

    def dim(self, text: str) -> str:
        return f"\033[2m{text}\033[0m" if self.colour else text

    def row(self, cells: Sequence[str], widths: Sequence[int], comment: str) -> str:
        """Columns and a comment beside them, which is wrapped where the width of the terminal is known."""
        left = "  " + "".join(f"{cell:<{width}}  " for cell, width in zip(cells, widths, strict=True))
        indent = 2 + sum(width + 2 for width in widths)
        painted = left.replace(cells[0], self.blue(cells[0]), 1)
        if self.width is None or not comment:
            return (painted + comment).rstrip()
        below = len(left) > indent or self.width - indent < 24  # no room beside it
        indent = 8 if below else indent
        lines = [self.dim(line) for line in textwrap.wrap(comment, self.width - indent)]
        return painted + (f"\n{' ' * indent}" if below else "") + f"\n{' ' * indent}".join(lines)


def help_text(file: str | os.PathLike = CONFIGS, style: _Style | None = None) -> str:
    """Usage, the blocks, and every key with its default and its comment."""
    style = style or _Style()
    defaults = flatten(_read_blocks(Path(file))["defaults"])
    groups = _key_comments(Path(file).read_text(encoding="utf-8"), defaults)
    widths = (max(len(path) for path in defaults) + 2, 18)
    lines = [
        style.bold("Train a DreamerV3 agent, or evaluate one."),
        "",
        f"  {style.bold('python dreamer.py')} [--configs BLOCK ...] [--KEY VALUE ...]",
        "",
        "`defaults` comes first, then the blocks in the order named, then the keys given; the later wins.",
        "A star sets every key it matches: --'*.units' 128. A list is written as --image_size 96 96.",
        "",
        style.bold("Examples"),
        "  python dreamer.py --configs dmc_vision --task dmc_walker_walk --logdir logdir/walker",
        "  python dreamer.py --configs dmc_proprio cpu --task dmc_cartpole_swingup --steps 1e5",
        "  python dreamer.py --configs debug --task gym_CartPole-v1",
        "  python dreamer.py --configs logdir/walker/config.yaml --mode eval --checkpoint logdir/walker/latest.pt",
        "",
        blocks_text(file, style),
    ]
    for title, keys in groups.items():
        lines += ["", style.bold(title)]
        lines += [style.row((f"--{path}", _show(defaults[path])), widths, comment) for path, comment in keys]
    return "\n".join(lines)


def blocks_text(file: str | os.PathLike = CONFIGS, style: _Style | None = None) -> str:
    """The blocks that `--configs` takes, each with its comment, or with what it sets."""
    style = style or _Style()
    blocks = _read_blocks(Path(file))
    groups = _block_comments(Path(file).read_text(encoding="utf-8"))
    width = max(map(len, blocks))
    lines = [style.bold("Blocks for --configs")]
    for title, comments in groups.items():
        lines += [f"  {style.dim(title)}"] if title else []
        for name, comment in comments.items():
            text = comment or ", ".join(f"{key} {_show(value)}" for key, value in flatten(blocks[name]).items())
            lines.append(style.row((name,), (width,), text))
    return "\n".join(lines)


def _block_comments(text: str) -> dict[str, dict[str, str]]:
    """{comment line above a group of blocks: {block: comment beside its name}}, without `defaults`."""
    groups: dict[str, dict[str, str]] = {}
    title = ""
    for line in text.splitlines():
        match = _LINE.fullmatch(line)
        if line.startswith("# "):
            title = line[2:].strip()
        elif match and not match["indent"] and match["key"] != "defaults":
            groups.setdefault(title, {})[match["key"]] = (match["comment"] or "").strip()
    return groups


def _key_comments(text: str, defaults: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """{comment line above a group of keys: [(key, comment beside it), ...]} of the block `defaults`."""
    groups: dict[str, list[tuple[str, str]]] = {}
    title, above = "Keys", []  # above: (indent, name) of the sections that the line is in
    body = re.split(r"^defaults:.*$", text, maxsplit=1, flags=re.MULTILINE)[-1]
    for line in re.split(r"^\S", body, maxsplit=1, flags=re.MULTILINE)[0].splitlines():
        match = _LINE.fullmatch(line)
        if match is None:
            title = line.strip(" #") or title if line.strip().startswith("#") else title
            continue
        indent = len(match["indent"])
        above = [entry for entry in above if entry[0] < indent]
        path = ".".join([*(name for _, name in above), match["key"]])
        comment = (match["comment"] or "").strip()
        keys = groups.setdefault(title, [])
        if path in defaults:
            keys.append((path, comment))
        elif match["value"].strip():  # a section in one line: its comment stands beside its first key
            inside = [key for key in defaults if key.startswith(f"{path}.")]
            keys += [(key, comment if i == 0 else "") for i, key in enumerate(inside)]
        else:
            above.append((indent, match["key"]))
    return groups
