"""Shared by the benchmarks: arguments, workloads, and the learner that is measured.

The two workloads: **V** (`--obs vision`) is a 64x64x3 image with the networks of size12m, **P** (`--obs proprio`) a
vector of 24 numbers with those of size1m. Both have 6 continuous actions, batches of 16 x 64 steps, and imagine 15
steps from all 1,024 states.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from gymnasium import spaces as gs

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # before this folder, whose `replay.py` is another

from measuring import machine, waiter  # noqa: E402

import config as configuration  # noqa: E402
import tools  # noqa: E402
from config import Config  # noqa: E402
from dreamer import USER_ERRORS, Dreamer, Trainer  # noqa: E402
from replay import Replay  # noqa: E402

ACTIONS, NUMBERS = 6, 24
SIZES = {"vision": "size12m", "proprio": "size1m"}
ALSO = {  # what a workload may observe beside its own: 64 numbers, 0.1 s at 16 kHz, 32 tokens
    "audio": gs.Box(-np.inf, np.inf, (64,), np.float32),
    "waveform": gs.Box(-np.inf, np.inf, (1, 1600), np.float32),
    "text": gs.Box(0, 999, (32,), np.int32),
}
STREAMS = 4  # environments that the synthetic data seems to come from
EPISODE = 500  # steps


# Arguments


def command(main: Callable[[], dict]) -> dict:
    """`main()` of a script. What its user got wrong is one line and exit status 1."""
    try:
        return main()
    except USER_ERRORS as error:
        raise SystemExit(f"Error: {error}") from None


def positive(text: str) -> int:
    """A number of things, at least one."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return int(text)


def natural(text: str) -> int:
    """A number of things that may be none."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return int(text)


def workload(text: str) -> str:
    """`vision` or `proprio`, followed by any of `ALSO`, joined by +."""
    own, *also = text.split("+")
    if own not in SIZES or not set(also) <= set(ALSO):
        raise argparse.ArgumentTypeError(
            f"{text} is none of {', '.join(SIZES)}, followed by any of {', '.join(f'+{kind}' for kind in ALSO)}"
        )
    return text


def parser(doc: str, repeats: int = 10, warmup: int = 3) -> argparse.ArgumentParser:
    """Arguments of the benchmarks that measure an agent. Whatever it does not know is a key of the configuration."""
    out = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="Any other --key value goes to the configuration (python dreamer.py --help), such as --device, "
        "--precision, --compile, --threads, --batch_size, --batch_length.",
    )
    out.add_argument(
        "--obs", type=workload, default="vision", metavar="W[+KIND]",
        help=f"what is observed: vision (64x64x3) or proprio (24 numbers), and also {', '.join(ALSO)}, as vision+audio",
    )  # fmt: skip
    out.add_argument("--size", help="block of the configuration; size12m for vision, size1m for proprio")
    out.add_argument("--horizon", type=positive, help="imagined steps, 15 if not given")
    out.add_argument("--repeats", type=positive, default=repeats, help="samples to take")
    out.add_argument("--warmup", type=natural, default=warmup, help="calls between the first one and the samples")
    return out


def parse(out: argparse.ArgumentParser, argv: Sequence[str] | None = None, *own: str) -> argparse.Namespace:
    """The arguments, with the configuration that they make as `config`; `own` are the benchmark's settings for it.

    A mistake ends the program with one line.
    """
    args, keys = out.parse_known_args(argv)
    args.size = args.size or SIZES[args.obs.partition("+")[0]]
    horizon = [] if args.horizon is None else ["--imag_horizon", str(args.horizon)]
    args.config = load("--configs", args.size, *own, *horizon, *keys)
    return args


def load(*keys: str) -> Config:
    """The configuration, and what a run does with it before anything else."""
    with configuration.one_line_errors():
        config = configuration.load(keys)
    tools.seed_everything(config.seed)
    tools.set_threads(config.threads)
    tools.keep_freed_memory()
    if config.deterministic_run:
        tools.enable_deterministic_run()
    return config


def eager(config: Config) -> Config:
    """The same, neither compiled nor captured: so that parts can be timed, and arithmetic counted."""
    return config.replace(compile=False, graph=False)


# What is measured


def spaces(obs: str, config: Config) -> tuple[dict[str, gs.Space], gs.Space]:
    """Observations and actions of a workload."""
    own, *also = obs.split("+")
    if own == "vision":
        seen = {"image": gs.Box(0, 255, (*config.image_size, 3), np.uint8)}
    else:
        seen = {"vector": gs.Box(-np.inf, np.inf, (NUMBERS,), np.float32)}
    seen |= {"audio" if kind == "waveform" else kind: ALSO[kind] for kind in also}
    return seen, gs.Box(-1.0, 1.0, (ACTIONS,), np.float32)


def make_agent(obs: str, config: Config) -> Dreamer:
    return Dreamer(*spaces(obs, config), config, tools.pick_device(config.device))


class Learner(Trainer):
    """A run without environments, files and logs. What is left is its update, on synthetic steps in a real replay.

    stored: steps in the replay.
    """

    def __init__(self, obs: str, config: Config, stored: int = 4096):
        self.config, self.device = config, tools.pick_device(config.device)
        self.obs_space, self.act_space = spaces(obs, config)
        self.agent = Dreamer(self.obs_space, self.act_space, config, self.device)
        stored = max(stored, 4 * STREAMS * (config.batch_length + 1))
        options = self._replay_options(config.seed)
        self.replay = Replay(None, capacity=2 * stored, streams=STREAMS, frames=self._frames(), **options)
        fill(self.replay, self.obs_space, stored, np.random.default_rng(config.seed))
        self.logdir, self.updates, self.pending, self.metrics = Path(), 0, None, tools.Metrics()
        self._wait, self.shutdown = waiter(self.device), tools.Shutdown()

    def update(self) -> None:
        """A full update: sample, to the device, both losses, backward, optimizer, the former one's latents written."""
        self._update()

    def finish(self) -> None:
        """Writes the latest latents back and waits for the device."""
        self._write_latents()
        self._wait()

    def batch(self) -> dict:
        """A batch on the device, as `train_step` takes it."""
        batch = self.replay.sample(self.config.batch_size)
        return self.agent.to_device({**batch, "context": batch.context})


def in_turn(learners: Mapping[str, Learner], warmup: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of each one's updates, all of them in turn, so that what slows the machine slows them alike.

    The first update and `warmup` more are not counted.
    """
    times = {name: [] for name in learners}
    for turn in range(1 + warmup + repeats):
        for name, learner in learners.items():
            start = time.perf_counter()
            learner.update()
            learner.finish()
            if turn > warmup:
                times[name].append(time.perf_counter() - start)
    return times


def fill(replay: Replay, obs_space: dict[str, gs.Space], steps: int, rng: np.random.Generator) -> None:
    """Adds `steps` random steps with latents, a share to each stream, in episodes."""
    latent = replay.latent
    for index in range(steps):
        time, stream = divmod(index, replay.streams)
        flags = {"is_first": time % EPISODE == 0, "is_last": time % EPISODE == EPISODE - 1, "is_terminal": False}
        seen = {key: draw(space, rng) for key, space in obs_space.items()}
        action = rng.uniform(-1, 1, replay.action_size).astype(np.float32)
        deter = rng.uniform(-1, 1, latent["deter"]).astype(np.float16)
        stoch = rng.integers(0, max(1, latent["classes"]), latent["stoch"], dtype=np.uint8)
        replay.add(stream, {**seen, **flags, "reward": rng.normal(), "action": action}, (deter, stoch))


def draw(space: gs.Space, rng: np.random.Generator, *lead: int) -> np.ndarray:
    """Random observations: any pixel, any token, or numbers of about one."""
    shape = (*lead, *space.shape)
    if space.dtype == np.uint8:
        return rng.integers(0, 256, shape, dtype=np.uint8)
    if space.dtype.kind in "iu":
        return rng.integers(1, int(space.high.max()) + 1, shape, dtype=space.dtype)
    return rng.standard_normal(shape, dtype=np.float32)


def parameters(agent: Dreamer) -> int:
    """Trained parameters, without copies such as the slow critic."""
    return sum(group.data.numel() for group in agent.optimizer.groups.values())


def precision(config: Config, device: torch.device) -> str:
    """What `auto` stands for on this device."""
    if config.precision == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    return config.precision


def facts(bench: str, args: argparse.Namespace, agent: Dreamer) -> dict:
    """What was measured and on what: the head of a result."""
    what = {"bench": bench, "size": args.size, "obs": args.obs}
    return what | setting(args.config, agent.device) | {"params": parameters(agent)}


def setting(config: Config, device: torch.device) -> dict:
    """Where and how something runs."""
    return {
        "device": device.type,
        "machine": machine(device),
        "torch": torch.__version__,
        "precision": precision(config, device),
        **{key: config[key] for key in ("compile", "graph", "checkpointing")},
        "threads": torch.get_num_threads(),
    }
