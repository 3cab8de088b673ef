"""Trains the author's JAX code (danijar/dreamerv3) from proprioception, on one CPU thread.

    PEERS=/peers /peers/venv/bin/python benchmarks/reference.py --task dmc_finger_spin --logdir ref0 ...

`$PEERS/dreamerv3` is a checkout of it, and the flags are those of its main.py. `learning.py --reference` starts this
program with the flags that `translate` makes of ours. `run.steps` counts agent steps; `step` in what it logs counts
frames. Rendering is left out.
"""

import fnmatch
import functools
import importlib
import math
import os
import sys
import types
from pathlib import Path

KEYS = {  # of our configuration: what they are called there
    "task": ["task"],
    "seed": ["seed"],
    "batch_size": ["batch_size"],
    "batch_length": ["batch_length"],
    "dataset_size": ["replay.size"],
    "envs": ["run.envs"],
    "train_ratio": ["run.train_ratio"],
    "action_repeat": ["env.dmc.repeat"],
    "imag_horizon": ["agent.imag_length"],
    "imag_last": ["agent.imag_last"],
    "horizon": ["agent.horizon"],
    "contdisc": ["agent.contdisc"],
    "discount_lambda": ["agent.imag_loss.lam", "agent.repl_loss.lam"],
    "retnorm.rate": ["agent.retnorm.rate"],
    "retnorm.limit": ["agent.retnorm.limit"],
    **{f"loss_scales.{x}": [f"agent.loss_scales.{x}"] for x in "rec rew con dyn rep policy value repval".split()},
    "kl_free": ["agent.dyn.rssm.free_nats"],
    **{f"dyn.{x}": [f"agent.dyn.rssm.{x}"] for x in "deter hidden stoch blocks act".split()},
    "dyn.discrete": ["agent.dyn.rssm.classes"],
    "dyn.dyn_layers": ["agent.dyn.rssm.dynlayers"],
    "dyn.obs_layers": ["agent.dyn.rssm.obslayers"],
    "dyn.img_layers": ["agent.dyn.rssm.imglayers"],
    "dyn.unimix_ratio": ["agent.dyn.rssm.unimix"],
    **{f"encoder.{x}": [f"agent.enc.simple.{x}"] for x in "units layers symlog act".split()},
    **{f"decoder.{x}": [f"agent.dec.simple.{x}"] for x in "units layers outscale act".split()},
    **{f"reward_head.{x}": [f"agent.rewhead.{x}"] for x in "units layers bins outscale act".split()},
    **{f"cont_head.{x}": [f"agent.conhead.{x}"] for x in "units layers outscale act".split()},
    **{f"actor.{x}": [f"agent.policy.{x}"] for x in "units layers outscale act".split()},
    "actor.min_std": ["agent.policy.minstd"],
    "actor.max_std": ["agent.policy.maxstd"],
    "actor.entropy": ["agent.imag_loss.actent"],
    **{f"critic.{x}": [f"agent.value.{x}"] for x in "units layers bins outscale act".split()},
    "critic.slow_regularizer": ["agent.imag_loss.slowreg", "agent.repl_loss.slowreg"],
    "critic.slow_target": ["agent.imag_loss.slowtar", "agent.repl_loss.slowtar"],
    "critic.slow_target_update": ["agent.slowvalue.every"],
    "critic.slow_target_fraction": ["agent.slowvalue.rate"],
    **{f"opt.{x}": [f"agent.opt.{x}"] for x in "lr agc eps beta1 beta2 warmup".split()},
}
SCALED = {  # the same, by a factor
    "retnorm.low": ("agent.retnorm.perclo", 100),
    "retnorm.high": ("agent.retnorm.perchi", 100),
}
OTHERWISE = ("steps", "prefill", "device", "precision", "time_limit", "dmc.image", "dmc.proprio")  # see `translate`
WITHOUT_EFFECT = (  # on learning from a vector, with the behaviour that stands to be the default
    *("mode", "logdir", "checkpoint", "episodes", "force", "deterministic_run", "compile", "graph", "checkpointing"),
    *("threads", "eval_*", "parallel", "image_size", "audio_noise_std", "traindir", "evaldir", "offline_evaldir"),
    *("replay_device", "log_*", "save_*", "video_pred_log", "tensorboard", "wandb*"),
    *("text.*", "sound.*", "cue.*", "grid.*", "pinpad.*", "babyai.*", "atari.*", "dmc.camera", "dmc.fast_render"),
    *("expl_until", "expl_intr_scale", "expl_extr_scale", "expl_horizon", "disag_*", "icm.*", "rnd.*"),
    *("empowerment.*", "diayn.*", "hier.*", "ppo.*", "meta.*", "imag_gradient_mix", "modality_scales.[!v]*"),
    *("loss_scales.intrinsic", "opt.intrinsic_lr", "opt.max_bad", "dyn.min_std", "actor.unimix_ratio"),
    *("*.cnn_keys", "*.depth", "*.mults", "*.kernel", "*.downsample", "*.upsample", "*.image_dist", "decoder.blocks"),
    *("*.audio_*", "*.text_*"),
    "*.rounding",  # of the two-hot mean: no setting there, XLA decides
)
FIXED = {  # how it is run
    "jax.platform": "cpu",
    "jax.prealloc": False,
    "agent.report": False,
    "run.debug": True,  # environments in the process itself
    "run.log_every": 60,  # seconds, and so the next two
    "run.report_every": 1_000_000_000,
    "run.save_every": 900,
    "logger.outputs": "jsonl",
    "env.dmc.image": False,
    "env.dmc.proprio": True,
}


def program(python: Path | None) -> tuple[Path, Path]:
    """The reference's interpreter (`python`, or the one in $PEERS/venv), and the folder PEERS."""
    from errors import UserError

    peers = os.environ.get("PEERS")
    if not peers or not (Path(peers) / "dreamerv3").is_dir():
        raise UserError(
            f"--reference: PEERS is {peers or 'not set'}; set it to a folder with a checkout of danijar/dreamerv3, "
            "called dreamerv3, and its environment in venv (or --reference-python)."
        )
    python = python or Path(peers) / "venv" / "bin" / "python"
    if not python.exists():
        raise UserError(f"--reference: {python} does not exist: give the interpreter with JAX as --reference-python.")
    return python.absolute(), Path(peers).resolve()


# Our settings in its words


def translate(config, logdir: Path) -> list[str]:
    """The reference's flags for a configuration of ours. Every setting that matters is given, whatever its defaults.

    Raises UserError for a setting that it does not have: equal settings are promised, so none is left out.
    """
    from errors import UserError

    def require(holds: bool, key: str, expected: str) -> None:
        if not holds:
            raise UserError(f"--reference: {key} is {config_value(ours[key])}; the reference {expected}.")

    ours, defaults = config.flat(), default_settings()
    known = {*KEYS, *SCALED, *OTHERWISE}
    for key, value in ours.items():
        if key not in known and not any(fnmatch.fnmatchcase(key, pattern) for pattern in WITHOUT_EFFECT):
            require(value == defaults[key], key, f"has only what {config_value(defaults[key])} stands for")
    require(config.task.startswith("dmc_"), "task", "is run here on DM Control alone: name a dmc_ task")
    require(config.dmc.proprio and not config.dmc.image, "dmc.image", "is run here on numbers alone: use dmc_proprio")
    require(config.time_limit == 0, "time_limit", "keeps to the suite's own limit: leave it at 0")
    require(config.device in ("auto", "cpu"), "device", "is run here on a CPU: give --device cpu")
    require(config.precision != "float16", "precision", "computes in float32 or bfloat16")
    require(config.dyn.discrete > 0, "dyn.discrete", "has categorical latents alone")
    start = config.batch_size * config.batch_length + config.envs * config.batch_length
    require(
        config.prefill == start, "prefill",
        f"begins to learn after (batch_size + envs) * batch_length = {start} agent steps: give --prefill {start}",
    )  # fmt: skip
    told = {there: ours[key] for key, names in KEYS.items() for there in names}
    told |= {there: round(ours[key] * factor, 9) for key, (there, factor) in SCALED.items()}
    told["task"] = config.task.replace("dmc_ball_in_cup_", "dmc_cup_")
    told["run.steps"] = math.ceil(config.steps / config.action_repeat)
    told["report_length"] = max(1, config.batch_length // 2)
    told["jax.compute_dtype"] = "bfloat16" if config.precision == "bfloat16" else "float32"
    told |= {"logdir": str(logdir)} | FIXED
    return [word for key, value in told.items() for word in (f"--{key}", str(value))]


@functools.cache
def default_settings() -> dict:
    from config import load

    return load([]).flat()


def config_value(value) -> str:
    """As it is written in YAML."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


# The driver, in the reference's own environment


def prepare(peers: Path) -> None:
    """Imports what the reference needs, and takes out what a CPU without packages for rendering cannot do."""
    os.environ.setdefault("MUJOCO_GL", "disable")
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path[0] = str(peers / "dreamerv3")  # in place of this folder, whose modules have names of their own
    control = importlib.import_module("dm_control")
    for name in ("locomotion", "locomotion.examples", "manipulation"):  # imported there, and not used by the suite
        sys.modules[f"dm_control.{name}"] = types.ModuleType(f"dm_control.{name}")
    sys.modules["dm_control.locomotion.examples"].basic_rodent_2020 = None
    control.manipulation = sys.modules["dm_control.manipulation"]
    agent, internal = (importlib.import_module(f"embodied.jax.{name}") for name in ("agent", "internal"))
    on_one_thread(agent.Options, internal)
    without_rendering(importlib.import_module("embodied.envs.dmc").DMC)


def without_rendering(env: type) -> None:
    """Its environment draws a picture at every step, even if nobody looks at it."""
    env.step = lambda self, action: self._env.step(action)
    env.obs_space = functools.cached_property(lambda self: self._env.obs_space.copy())
    env.obs_space.__set_name__(env, "obs_space")


def on_one_thread(options: type, internal: types.ModuleType) -> None:
    """XLA on one thread, without a profile of the first updates."""
    make, setup = options.__init__, internal.setup

    def without_profile(self, *args, **kwargs):
        make(self, *args, **kwargs)
        self.profiler = False

    def single(**kwargs):
        setup(**kwargs)
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

    options.__init__, internal.setup = without_profile, single


def main() -> None:
    peers = os.environ.get("PEERS")
    if not peers or not (Path(peers) / "dreamerv3").is_dir():
        raise SystemExit(f"Error: PEERS is {peers or 'not set'}; expected a folder with a checkout `dreamerv3` in it.")
    prepare(Path(peers).resolve())
    importlib.import_module("dreamerv3.main").main(sys.argv[1:])


if __name__ == "__main__":
    main()
