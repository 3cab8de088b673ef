"""The second front door: `python run_dreamer.py --config configs/default.json` trains what a JSON file describes.

A key of the file is one of `configs.yaml`, nested or dotted, or one of `ALIASES`; `configs` lists blocks. A list in the
place of a value is a sweep: every combination runs in a folder of its own, and a table of the results ends it.
Checkpoints are in `checkpoints/`: `latest.pt`, which the same command resumes, and `best_model.pt`, of the best
evaluation.
"""

if __name__ == "__main__":
    import errors

    errors.end_quietly_on_interrupt()

import argparse
import difflib
import importlib.util
import json
import sys
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
from sweep import expand, run_all

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
OWN = {"configs": list, "kl_scale": (int, float), "obs_dim": int, "action_dim": int}  # more than a key's other name
FLAGS = {"env": "--env, or the key task", "env_file": "--env_file", "parallel_trials": "--parallel_trials"}
FLAGS |= {"multimodal": "--multimodal, or the block of that name in configs"}


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
    parser.add_argument("--parallel_trials", type=int, default=1, metavar="N", help="runs of a sweep at a time")
    args = parser.parse_args(argv)
    if args.parallel_trials < 1:
        parser.error(f"--parallel_trials is {args.parallel_trials}, expected at least 1")
    try:
        settings = override(args, read(args.config))
        defined = args.env_file and register(Path(args.env_file))
        if args.env == "custom" and not defined:
            raise UserError(f"--env custom needs a create_custom_env() in --env_file ({args.env_file or 'not given'}).")
        trials = expand(settings)
        if len(trials) == 1:
            return dreamer.guarded(train, *trials, advice="or start from --config configs/small_batch.json")
        for trial in trials:
            translate(trial)
        flags = ["--env_file", args.env_file] if args.env_file else []
        return run_all(trials, Path(__file__), flags, args.parallel_trials)
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


def read(path: str) -> dict:
    """A JSON file's settings by their dotted names."""
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8-sig"))  # with or without a byte-order mark
    except (OSError, ValueError) as error:
        raise UserError(f"--config {path}: {error}; expected a JSON object of settings.") from error
    if not isinstance(settings, dict):
        raise UserError(f"--config {path} is a {type(settings).__name__}; expected a JSON object of settings.")
    return configuration.flatten(settings)


def override(args: argparse.Namespace, settings: dict) -> dict:
    """A file's settings with what the flags say. What the block `multimodal` sets wins over the file; and as DM
    Control's blocks repeat actions, another task that is named by a flag does not, unless the file says so itself.
    """
    if args.checkpoint and not Path(args.checkpoint).exists():
        raise UserError(f"--checkpoint {args.checkpoint} does not exist.")
    beside = str(Path(args.checkpoint).parent) if args.checkpoint else settings.get("logdir", "checkpoints")
    values = {"device": args.device, "steps": args.steps, "task": args.env, "checkpoint": args.checkpoint}
    values |= {"log_level": args.log_level and args.log_level.lower()}
    values |= {"logdir": args.logdir or beside}
    if args.multimodal:
        defaults, block = (configuration.load(flags).flat() for flags in ([], ["--configs", "multimodal"]))
        ours = {key for key in block if block[key] != defaults[key]}
        kept = {key: value for key, value in settings.items() if not ours & {*ALIASES.get(key, [key])}}
        if kept != settings:
            print(f"--multimodal sets, in place of {args.config}: {', '.join(sorted(settings.keys() - kept.keys()))}")
        settings = kept
        blocks = settings.get("configs", [])
        swept = bool(blocks) and isinstance(blocks[0], list)
        values |= {"configs": [[*own, "multimodal"] for own in blocks] if swept else [*blocks, "multimodal"]}
    for_dmc = "dmc_" in json.dumps([settings.get("task"), settings.get("configs")])
    if for_dmc and (args.multimodal or args.env) and not (args.env or "").startswith("dmc_"):
        settings = {"action_repeat": 1} | settings
    return settings | {key: value for key, value in values.items() if value is not None}


def register(path: Path) -> bool:
    """Runs a file that registers its environments. `create_custom_env` in it makes the task `custom`: True if it is
    there.
    """
    if not path.exists():
        raise UserError(f"--env_file {path} does not exist.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"--env_file {path}: {type(error).__name__}: {error}") from error
    defined = hasattr(module, "create_custom_env")
    if defined:
        register_env("custom", module.create_custom_env)
    return defined


def translate(settings: dict) -> Config:
    """The configuration that settings stand for. UserError for a key that does not exist."""
    known = [*ALIASES, *OWN]
    settings = {key: value for key, value in settings.items() if key not in OWN or value is not None}
    for key, value in settings.items():
        if key in FLAGS:
            raise UserError(f"{key} is no key of the file, but a flag: {FLAGS[key]}.")
        close = difflib.get_close_matches(key, known, 1, 0.8)
        if close and key not in known and key not in configuration.load([]).flat():
            raise UserError(f"unknown key {key}; did you mean {close[0]}?")
        if not isinstance(value, OWN.get(key, object)) or (key in OWN and isinstance(value, bool)):
            raise UserError(f"{key} is {value!r}, expected {'a list of blocks' if key == 'configs' else 'a number'}.")
    if not all(isinstance(block, str) for block in settings.get("configs", [])):
        raise UserError(f"configs is {settings['configs']}, expected names of blocks.")
    config = configuration.load(["--configs", *settings["configs"]] if settings.get("configs") else [])
    changes = {"save_best": True}
    # What is said more exactly wins: critic_lr over actor_lr, which is also the critic's, and a key over its alias.
    for key in sorted(settings, key=lambda key: (key not in ALIASES, key == "critic_lr")):
        if key not in OWN:
            changes |= dict.fromkeys(ALIASES.get(key, [key]), settings[key])
    config = config.override("settings", **changes)
    scales = {term: config.loss_scales[term] * settings.get("kl_scale", 1) for term in ("dyn", "rep")}
    return config.override(**{f"loss_scales.{term}": scale for term, scale in scales.items()})


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
            if settings.get(name) not in (None, size):
                raise UserError(f"{name} is {settings[name]}, and {config.task} has {size}: leave it out to read it.")
        trainer.run()
    finally:
        trainer.close()


if __name__ == "__main__":
    sys.exit(main())
