"""The second front door: `python run_dreamer.py --config configs/default.json` trains what a JSON file describes.

A key of the file is one of `configs.yaml`, nested or dotted, or one of `ALIASES`; `configs` lists blocks. A list in the
place of a value is a sweep: every combination runs in a folder of its own, and a table of the results ends it.
Checkpoints are in `checkpoints/`: `latest.pt`, which the same command resumes, and `best_model.pt`, of the best
evaluation.
"""

import argparse
import importlib.util
import itertools
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import config as configuration
import dreamer
from config import Config
from dreamer import DreamerV3Trainer
from envs import register_env
from errors import UserError
from modalities.vector import width
from models import MultimodalWorldModel
from replay import SequenceReplayBuffer

__all__ = ["DreamerV3Trainer", "MultimodalWorldModel", "SequenceReplayBuffer", "main", "translate"]

ALIASES = {
    "seq_len": ["batch_length"],
    "embed_dim": ["encoder.embed_dim"],
    "world_lr": ["opt.lr"],
    "actor_lr": ["opt.actor_lr", "opt.critic_lr"],
    "critic_lr": ["opt.critic_lr"],
    "free_nats": ["kl_free"],
    "clip_ratio": ["ppo.clip"],
    "use_wandb": ["wandb"],
}
OWN = ("configs", "kl_scale", "obs_dim", "action_dim")  # mean more than another name for a key


def main(argv: list[str] | None = None) -> int:
    """Exit status, as of `dreamer.cli`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(Path(__file__).parent / "configs" / "default.json"), help="a JSON file")
    parser.add_argument("--multimodal", action="store_true", help="all kinds of observation: the block multimodal")
    parser.add_argument("--checkpoint", help="go on from this one; with a --logdir elsewhere, from its weights alone")
    parser.add_argument("--logdir", help="checkpoints, or where --checkpoint is")
    parser.add_argument("--device")
    parser.add_argument("--steps", type=float, help="frames")
    parser.add_argument("--env", help="a task, or custom")
    parser.add_argument("--env_file", help="a file that registers the task, or defines create_custom_env()")
    parser.add_argument("--log-level", choices=["DEBUG", "INFO", "WARNING", "ERROR"])
    parser.add_argument("--parallel_trials", type=int, default=1, help="runs of a sweep at a time")
    args = parser.parse_args(argv)
    try:
        settings = read(args.config)
        settings |= overrides(args, settings)
        if args.env_file:
            register(Path(args.env_file))
        trials = expand(settings)
        if len(trials) == 1:
            return dreamer.guarded(train, *trials, advice="or start from --config configs/small_batch.json")
        return sweep(trials, args)
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1


def read(path: str) -> dict:
    """A JSON file's settings by their dotted names."""
    try:
        return configuration.flatten(json.loads(Path(path).read_text()))
    except (OSError, json.JSONDecodeError, AttributeError) as error:
        raise UserError(f"--config {path}: {error}; expected a JSON object of settings.") from error


def overrides(args: argparse.Namespace, settings: dict) -> dict:
    """What the flags say about a file's settings."""
    beside = str(Path(args.checkpoint).parent) if args.checkpoint else settings.get("logdir", "checkpoints")
    values = {"device": args.device, "steps": args.steps, "task": args.env, "checkpoint": args.checkpoint}
    values |= {"log_level": args.log_level and args.log_level.lower()}
    values |= {"logdir": args.logdir or beside}
    if args.multimodal:
        values |= {"configs": [*settings.get("configs", []), "multimodal"], "task": args.env or "cue_all"}
    return {key: value for key, value in values.items() if value is not None}


def register(path: Path) -> None:
    """Runs a file that registers its environments. `create_custom_env` in it makes the task `custom`."""
    if not path.exists():
        raise UserError(f"--env_file {path} does not exist.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if hasattr(module, "create_custom_env"):
        register_env("custom", module.create_custom_env)


def expand(settings: dict) -> list[dict]:
    """Every combination of the values of lists. What is a list by itself, as image_size, is swept by one of lists."""
    defaults = configuration.load([]).flat()

    def choices(key: str, value) -> list:
        plain = key == "configs" or isinstance(defaults.get(key), (list, tuple))
        listed = isinstance(value, list) and (not plain or (value and isinstance(value[0], list)))
        return value if listed else [value]

    options = {key: choices(key, value) for key, value in settings.items()}
    for key, values in options.items():
        if not values:
            raise UserError(f"{key} is an empty list: a sweep needs at least one value.")
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


def translate(settings: dict) -> Config:
    """The configuration that settings stand for. UserError for a key that does not exist."""
    config = configuration.load(["--configs", *settings["configs"]] if settings.get("configs") else [])
    changes = {"save_best": True}
    # What is said more exactly wins: critic_lr over actor_lr, which is also the critic's, and a key over its alias.
    for key in sorted(settings, key=lambda key: (key not in ALIASES, key == "critic_lr")):
        if key not in OWN:
            changes |= dict.fromkeys(ALIASES.get(key, [key]), settings[key])
    for term in ("dyn", "rep"):
        scale = f"loss_scales.{term}"
        changes[scale] = changes.get(scale, config.loss_scales[term]) * settings.get("kl_scale", 1)
    return config.replace(**changes)


def train(settings: dict) -> None:
    """One run."""
    config = translate(settings)
    if config.mode == "eval":
        dreamer.main(config)
        return
    dreamer.prepare(config)
    trainer = DreamerV3Trainer(config)
    try:
        vector = trainer.agent.world_model.encoder.kinds.get("vector", {})
        sizes = {"obs_dim": sum(width(space) for space in vector.values())}
        sizes |= {"action_dim": trainer.agent.action_size}
        for name, size in sizes.items():
            if settings.get(name, size) != size:
                raise UserError(f"{name} is {settings[name]}, and {config.task} has {size}: leave it out to read it.")
        trainer.run()
    finally:
        trainer.close()


def sweep(trials: list[dict], args: argparse.Namespace) -> int:
    """All trials, `parallel_trials` at a time, each in a process and a folder of its own; then the table."""
    swept = [key for key in trials[0] if len({json.dumps(trial[key]) for trial in trials}) > 1]
    folders = [Path(trial["logdir"]) / f"trial{number:03}" for number, trial in enumerate(trials)]

    def run(number: int) -> int:
        folder = folders[number]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.json").write_text(json.dumps(trials[number], indent=2))
        command = [sys.executable, __file__, "--config", folder / "settings.json", "--logdir", folder]
        command += ["--env_file", args.env_file] if args.env_file else []
        with (folder / "output.txt").open("w") as output:
            return subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode

    with ThreadPoolExecutor(args.parallel_trials) as pool:
        codes = list(pool.map(run, range(len(trials))))
    rows = [["trial", *swept, "best eval", "last eval", "last episode", ""]]
    for folder, trial, code in zip(folders, trials, codes, strict=True):
        evals, episodes = (logged(folder / "metrics.jsonl", key) for key in ("eval/return", "episode/return"))
        results = [max(evals, default=None), *(values[-1] if values else None for values in (evals, episodes))]
        failed = f"failed: {folder / 'output.txt'}" if code else ""
        numbers = ["-" if value is None else f"{value:.4g}" for value in results]
        rows.append([folder.name, *(str(trial[key]) for key in swept), *numbers, failed])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print("\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows))
    return int(any(codes))


def logged(path: Path, key: str) -> list[float]:
    """The values of a metric."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [row[key] for row in map(json.loads, lines) if row.get(key) is not None]


if __name__ == "__main__":
    sys.exit(main())
