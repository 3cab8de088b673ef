"""Train DreamerV3: `python dreamer.py --configs dmc_vision --task dmc_walker_walk --logdir logdir/walker`.

`Dreamer` is the agent: it acts (`policy`) and learns (`train_step`). `Trainer` is the run: it steps environments, fills
the replay, lets the agent learn at the configured ratio, evaluates, logs, and saves; the same command resumes.

Counters: a *frame* is one step of the simulator, an *agent step* is one action (`action_repeat` frames), an *update* is
one optimizer step. The number of agent steps is the replay's: what it has ever stored, also of what is no longer kept.
"""

if __name__ == "__main__":  # before torch is imported, so that --help and typing errors answer at once
    import errors

    errors.end_quietly_on_interrupt()
    import config as configuration

    CONFIG = configuration.main_load()

import contextlib
import functools
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from gymnasium.spaces import Space
from torch import Tensor, nn

import execution
import ppo
import tools
from config import Config, check_resume, resolve_paths
from envs import env_seed, make_env
from episodes import infer_spaces
from errors import UserError, raise_on_interrupt
from exploration import Random, make_explorer, task_rewards
from feed import Feed
from files import disk_errors
from hierarchy import Hierarchy
from metagrad import OneStep
from modalities import ModalityConfig, vector
from models import Behavior, ImagBehavior, WorldModel, total_loss
from networks import features
from optim import Optimizer
from parallel import EnvError, VectorEnv, make_vector
from replay import Replay, ReplayError, episodes_begun
from storage import DeviceRows, HostRows

log = logging.getLogger("dreamer")
FORMAT = 1  # of checkpoints
OWN_METRICS = {"return", "return_std", "length", "episode"}  # of episodes and evaluations
USER_ERRORS = (UserError, ReplayError, EnvError)  # what the user can mend: shown as one line


class Dreamer(nn.Module):
    """World model, behaviour and optimizer, tied into `policy(obs, state)` and `train_step(batch)`.

    Args:
        obs_space: {observation key: gymnasium space}.
        act_space: Box, Discrete or MultiDiscrete; actions are vectors (one-hot for discrete spaces).
        config: the whole configuration; only here it is taken apart.
        modalities: the active kinds of observation, those that the configuration names if not given.
    """

    def __init__(
        self,
        obs_space: dict,
        act_space: Space,
        config: Config,
        device: torch.device | str = "cpu",
        modalities: Mapping[str, ModalityConfig] | None = None,
    ):
        super().__init__()
        self.device = torch.device(device)
        if self.device.type == "cuda":
            if self.device.index is None:
                self.device = torch.device("cuda", torch.cuda.current_device())
            torch.cuda.set_device(self.device)  # streams, events and graphs belong to the current one
        self.action_size, self.classes = vector.width(act_space), vector.classes(act_space)
        shared = {"horizon": config.horizon, "contdisc": config.contdisc}
        sections = ("encoder", "decoder", "dyn", "reward_head", "cont_head", "kl_free", "grad_heads", "checkpointing")
        sections += ("modality_dropout",)
        kinds = tuple(config.modalities) if modalities is None else modalities
        self.world_model = WorldModel(
            obs_space, self.action_size, modalities=kinds, **shared, **{k: config[k] for k in sections}
        )
        self.observed = {key: space for own in self.world_model.encoder.kinds.values() for key, space in own.items()}
        sections = ("actor", "critic", "retnorm", "imag_horizon", "imag_last", "imag_gradient", "imag_gradient_mix")
        sections += ("discount_lambda", "reward_EMA", "actor_objective")
        sizes = (self.world_model.rssm.feat_size, self.action_size, self.classes)
        options = shared | {key: config[key] for key in sections}

        def behave(kind: type[ImagBehavior] = ImagBehavior, **streams) -> Behavior:
            if config.behavior == "actor_critic":
                return kind(*sizes, **options, **streams)
            if kind is not ImagBehavior:
                raise UserError("expl_behavior: diayn's skills and a hierarchy's goals exclude each other.")
            if config.imag_gradient != "reinforce":
                raise UserError(
                    f"behavior: hierarchical goes by reinforce or ppo; imag_gradient is {config.imag_gradient}: "
                    "give --imag_gradient reinforce."
                )
            unused = ("imag_gradient", "imag_gradient_mix")
            own = {key: value for key, value in options.items() if key not in unused}
            return Hierarchy(*sizes, deter=self.world_model.rssm.deter, **own, **config.hier, **streams)

        self.behavior = behave(rewards=task_rewards(self.world_model, self.action_size, self.classes, config))
        self.explorer = make_explorer(behave, self.world_model, self.action_size, self.classes, config)
        self.ppo = dict(config.ppo) if config.actor_objective == "ppo" else {}
        self.epochs = self.ppo.pop("epochs", 1)
        self.loss_scales = self._loss_scales(config.loss_scales, config.modality_scales)
        self.layout = None  # the recurrence's weights as acting reads them; None: they have changed since
        self.to(self.device)
        half = tools.half_precision(config.precision, self.device)
        self.adapts = config.metagrad == "hypergradient"
        hyper = {"hyper": config.meta.kappa, "hyper_limit": config.meta.limit} if self.adapts else {}
        self.optimizer = self._optimizer(**config.opt, **hyper, scaled=half == torch.float16)
        one_step = config.metagrad == "one_step"
        self.meta = OneStep(self.behavior, self.optimizer, self.loss_scales, **config.meta) if one_step else None
        self.generator = torch.Generator(self.device).manual_seed(config.seed)  # noise of updates
        self.policy_generator = torch.Generator(self.device).manual_seed(config.seed + 1)  # noise of acting
        self.explorer_generator = torch.Generator(self.device).manual_seed(config.seed + 6)  # of the explorer's updates
        self.autocast = functools.partial(torch.autocast, self.device.type, half or torch.bfloat16, enabled=bool(half))
        execution.prepare(self, config.compile, config.graph)

    def _optimizer(
        self,
        lr: float,
        actor_lr: float | None,
        critic_lr: float | None,
        intrinsic_lr: float | None,
        max_bad: int,
        **options,
    ) -> Optimizer:
        def of(prefix: str, module: nn.Module) -> list:
            return [(f"{prefix}.{name}", p) for name, p in module.named_parameters() if p.requires_grad]

        world, actors, critics, rewards = of("world_model", self.world_model), [], [], []
        for prefix, behavior in self.behaviors.items():
            for name, actor in behavior.actors.items():
                actors += of(f"{prefix}{name}", actor)
            for name, stream in behavior.streams.items():
                critics += of(f"{prefix}streams.{name}.critic", stream.critic)
            for name, reward in behavior.intrinsic.items():
                rewards += of(f"{prefix}streams.{name}.reward", reward)
        groups = {
            "world": (world, lr),
            "actor": (actors, actor_lr or lr),
            "critic": (critics, critic_lr or lr),
            "intrinsic": (rewards, intrinsic_lr or lr),
        }
        return Optimizer(groups, **options)

    def _loss_scales(self, scales: dict[str, float], of_kinds: dict[str, float]) -> dict[str, float]:
        """With a scale of its own for every key whose kind does not count as the others do."""
        decoder, scales = self.world_model.decoder, dict(scales)
        for kind, keys in decoder.kinds.items():
            scale = decoder.scales[kind] if of_kinds.get(kind) is None else of_kinds[kind]
            if scale != 1:
                scales |= {f"rec/{key}": scales["rec"] * scale for key in keys}
        if all(f"rec/{key}" in scales for key in decoder.keys):
            del scales["rec"]
        if not any(reward.learns for behavior in self.behaviors.values() for reward in behavior.intrinsic.values()):
            del scales["intrinsic"]
        if not any(isinstance(behavior, ImagBehavior) for behavior in self.behaviors.values()):
            del scales["repval"]  # a manager's values are of chunks, a worker's of goals: neither is on the replay
        return scales

    @property
    def behaviors(self) -> dict[str, Behavior]:
        """The task's behaviour, and the explorer, if there is one, by what stands before the names of their parts."""
        return {"": self.behavior} | ({"explorer.": self.explorer} if self.explorer else {})

    # Acting

    def initial(self, num: int) -> dict:
        """What `policy` carries for `num` environments: latent, previous action, and the behaviour's own."""
        return {
            "latent": self.world_model.rssm.initial(num),
            "action": torch.zeros(num, self.action_size, device=self.device),
            "carry": {name: behavior.initial(num) for name, behavior in self.behaviors.items()},
        }

    @torch.inference_mode()
    def policy(
        self,
        obs: dict[str, np.ndarray],
        state: dict,
        sample: bool = True,
        generator: torch.Generator | None = None,
        explore: bool = False,
    ) -> tuple[np.ndarray, dict]:
        """Action [E, action] for a batch of observations [E, ...] and the state that it leads to.

        State and previous action are reset where `is_first`. Actions are sampled, or the mode; latents are always
        sampled. What the encoder reads and `obs` lacks is absent. With `explore` the explorer acts, if there is one.
        """
        if self.observed.keys() - obs.keys():
            obs = self._absent(len(obs["is_first"]), lacking=obs) | obs
        tensors = {k: self._tensor(v) for k, v in obs.items() if not k.startswith("log_")}
        draw, num = self._draw(generator or self.policy_generator), len(obs["is_first"])
        explore = explore and self.explorer is not None
        behavior, act = (self.explorer, self._act_exploring) if explore else (self.behavior, self._act)
        noise = {"post": draw.latent(num), "action": draw.action(num, extra=behavior.extra) if sample else None}
        state = act(tensors, state, noise, self._lay_out())
        return state["action"].cpu().numpy(), state

    def _absent(self, num: int, lacking: dict) -> dict[str, np.ndarray]:
        """Observations [E, ...] that `lacking` does not hold, flagged as absent."""
        lost = {key: space for key, space in self.observed.items() if key not in lacking}
        flags = {f"present/{key}": np.zeros(num, bool) for key in lost}
        return flags | {key: np.zeros((num, *space.shape), space.dtype) for key, space in lost.items()}

    def _lay_out(self) -> tuple[dict, dict]:
        """The recurrence's weights as its steps read them: made once per update, not at every act."""
        if self.layout is None:
            with self.autocast():
                self.layout = self.world_model.rssm.layout()
        return self.layout

    def weights_changed(self) -> None:
        """To be called when weights were written by anything but `train_step` and `restore`."""
        self.layout = None

    def _act(self, obs: dict[str, Tensor], state: dict, noise: dict, layout: tuple[dict, dict] | None) -> dict:
        """The state that an observation leads to, its action included: tensors in, tensors out.

        All other weights are read where they are: acting is queued behind the update before it and ahead of the next,
        so that they are never half updated, and no copy of them is needed.
        """
        return self._act_as("", obs, state, noise, layout)

    def _act_exploring(self, obs: dict, state: dict, noise: dict, layout: tuple[dict, dict] | None) -> dict:
        """As `_act`, but the explorer decides."""
        return self._act_as("explorer.", obs, state, noise, layout)

    def _act_as(self, name: str, obs: dict, state: dict, noise: dict, layout: tuple[dict, dict] | None) -> dict:
        rssm, is_first = self.world_model.rssm, obs["is_first"]
        with self.autocast():
            tokens = self.world_model.encoder(obs)
            latent = rssm.obs_step(state["latent"], state["action"], tokens, is_first, noise["post"], layout)
            behavior, carry = self.behaviors[name], state["carry"]
            action, carried = behavior.policy(features(latent), carry[name], is_first, noise["action"])
        latent = {key: latent[key] for key in ("deter", "stoch")}
        return {"latent": latent, "action": action.float(), "carry": carry | {name: carried}}

    def latents(self, state: dict) -> tuple[np.ndarray, np.ndarray]:
        """The latents of a policy state as the replay keeps them: deter [E, deter], stoch [E, stoch]."""
        deter, stoch = self.world_model.pack(state["latent"])
        return deter.cpu().numpy(), stoch.cpu().numpy()

    # Learning

    def train_step(self, batch: dict, noise: dict | None = None) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
        """One update on a batch on the device. Returns metrics (0-d tensors) and the refreshed latents as stored.

        `noise` is drawn unless given (see `draw_noise`). What is returned may be overwritten by the next update.
        """
        metrics, latents = self._update(batch, noise or self.draw_noise(*batch["reward"].shape))
        self.weights_changed()
        return metrics, latents

    def _update(self, batch: dict, noise: dict) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
        """`train_step` as a function of tensors in static shapes: no read of the device, no random number drawn."""
        losses, post, metrics = self.losses(batch, noise)
        loss = total_loss(losses, self.loss_scales)
        if self.meta:
            self.meta.look()
        optimized = self.optimizer.step(loss)
        if self.meta:
            metrics |= self.meta.step()
        if self.ppo:
            rollouts = [rollout for behavior in self.behaviors.values() for rollout in behavior.rollouts]
            options = self.ppo | {"autocast": self.autocast}
            moved = ppo.improve(rollouts, self.optimizer, noise["order"], self.loss_scales, **options)
            metrics |= {f"policy/ppo_{key}": value for key, value in moved.items()}
        if self.adapts:
            metrics |= {
                f"meta/lr{'' if key == 'world' else f'_{key}'}": rate for key, rate in self.optimizer.rates().items()
            }
        for behavior in self.behaviors.values():
            behavior.after_step()
        metrics |= {"world/loss": loss.detach()} | {f"opt/{k}": v for k, v in optimized.items()}
        return metrics, self.world_model.pack(post)

    def losses(self, batch: dict, noise: dict | None = None) -> tuple[dict[str, Tensor], dict, dict[str, Tensor]]:
        """All losses [B, T], the posterior states, and metrics. `noise` is drawn unless given (see `draw_noise`)."""
        noise = noise or self.draw_noise(*batch["reward"].shape)
        with self.autocast():
            losses, post, metrics = self.world_model.loss(batch, noise["post"], noise.get("drop"))
            more, more_metrics = self.behavior.loss(self.world_model, post, batch, noise)
            if self.explorer:
                # The task alone shapes the world model, so the explorer's replayed states have no gradient.
                still = {key: value.detach() for key, value in post.items()}
                own, own_metrics = self.explorer.loss(self.world_model, still, batch, noise["explorer"])
                more |= {aside(key): value for key, value in own.items()}
                own_metrics = {key.replace("policy/", "explorer/"): value for key, value in own_metrics.items()}
                # A hierarchy's autoencoder learns here and there.
                both = more_metrics.keys() & own_metrics.keys()
                more_metrics |= {f"explorer/{key}" if key in both else key: x for key, x in own_metrics.items()}
        return losses | more, post, metrics | more_metrics

    def draw_noise(self, batch: int, time: int) -> dict:
        """Every random number of one update: `post` [B, T, ...], `prior` [H, N, ...], `action` [H+1, N, action], what
        intrinsic rewards ask for, with `modality_dropout` also `drop` [B, kinds], with PPO `order` [epochs - 1, N], and
        with an explorer its own.
        """
        draw = self._draw(self.generator)
        noise = {"post": draw.latent(batch, time)} | self.behavior.draw_noise(batch, time, draw)
        if self.world_model.modality_dropout:
            noise["drop"] = draw.uniform(batch, len(self.world_model.encoder.kinds))
        if self.ppo:
            noise["order"] = draw.uniform(self.epochs - 1, batch * self.behavior.starts(time))
        if self.explorer:
            noise["explorer"] = self.explorer.draw_noise(batch, time, self._draw(self.explorer_generator))
        return noise

    def _draw(self, generator: torch.Generator) -> "Draw":
        rssm = self.world_model.rssm
        return Draw(generator, rssm.noise_shape, bool(rssm.discrete), self.action_size, bool(self.classes))

    def to_device(self, batch: dict) -> dict:
        """Numpy arrays of a replayed batch to tensors on the device; frames stay uint8."""
        return {k: self.to_device(v) if isinstance(v, dict) else self._tensor(v) for k, v in batch.items()}

    def to_host(self, *tensors: Tensor) -> Callable[[], list[np.ndarray]]:
        """Starts copying to the host; the result waits for that, and for nothing queued after it, and gives arrays."""
        if self.device.type != "cuda":
            return lambda: [tensor.cpu().numpy() for tensor in tensors]
        copies = [torch.empty_like(t, device="cpu", pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
        done = torch.cuda.Event()
        done.record()

        def wait() -> list[np.ndarray]:
            done.synchronize()
            return [copy.numpy() for copy in copies]

        return wait

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.as_tensor(array).to(self.device, non_blocking=True)

    # Keeping

    def checkpoint(self) -> dict:
        """Everything that the next update depends on, except the replay: weights, optimizer, generators."""
        return {
            "world_model": self.world_model.state_dict(),
            "behavior": self.behavior.state_dict(),
            **({"explorer": self.explorer.state_dict()} if self.explorer else {}),
            "optimizer": self.optimizer.state_dict(),
            **({"metagrad": self.meta.state_dict()} if self.meta else {}),
            "generators": {name: generator.get_state() for name, generator in self._generators().items()},
        }

    def _generators(self) -> dict[str, torch.Generator]:
        own = {"update": self.generator, "policy": self.policy_generator}
        return own | ({"explorer": self.explorer_generator} if self.explorer else {})

    def restore(self, state: dict, weights_only: bool = False) -> None:
        """Loads `checkpoint()`. With `weights_only` the optimizer and the generators stay as they are.

        Raises UserError if the weights belong to networks of other sizes, or parts are missing."""
        try:
            self.world_model.load_state_dict(state["world_model"])
            self.behavior.load_state_dict(state["behavior"])
            if self.explorer and (not weights_only or "explorer" in state):
                self.explorer.load_state_dict(state["explorer"])
            self.weights_changed()
            if not weights_only:
                # The rates are the configuration's, which a resumed run may change (--force true --opt.lr ...).
                self.optimizer.load_state_dict(state["optimizer"], rates=False)
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
            raise UserError(f"The checkpoint's networks differ from the configured ones: {reason}") from error
        except KeyError as error:
            raise UserError(
                f"The checkpoint has nothing of {error}, which was not trained then: start another --logdir with "
                "--checkpoint, whose weights it begins with."
            ) from error
        if not weights_only:
            if self.meta and "metagrad" in state:
                self.meta.load_state_dict(state["metagrad"])
            for key, generator in self._generators().items():
                try:
                    generator.set_state(state["generators"][key].cpu())
                except RuntimeError:
                    log.warning("The checkpoint's random state is of another kind of device: drawing from a new one.")


def aside(loss: str) -> str:
    """The name of a loss of the explorer beside that of the task: policy to policy/explorer."""
    head, *rest = loss.split("/")
    return "/".join((head, "explorer", *rest))


class Draw:
    """Draws random numbers of the kinds that an agent needs, each of given leading sizes.

    Args:
        latent, action: sizes of what one latent state and one action are drawn with; each Gumbel or normal noise.
    """

    def __init__(
        self, generator: torch.Generator, latent: tuple[int, ...], latent_gumbel: bool, action: int, action_gumbel: bool
    ):
        self.generator, self._latent, self._action = generator, latent, action
        self._gumbel = {"latent": latent_gumbel, "action": action_gumbel}

    def latent(self, *lead: int) -> Tensor:
        return self._noise((*lead, *self._latent), self._gumbel["latent"])

    def action(self, *lead: int, extra: int = 0) -> Tensor:
        """`extra` numbers of the same noise join each action's."""
        return self._noise((*lead, self._action + extra), self._gumbel["action"])

    def gumbel(self, *shape: int) -> Tensor:
        return self._noise(shape, True)

    def uniform(self, *shape: int) -> Tensor:
        return torch.empty(shape, device=self.generator.device).uniform_(generator=self.generator)

    def _noise(self, shape: tuple[int, ...], gumbel: bool) -> Tensor:
        if not gumbel:
            return torch.empty(shape, device=self.generator.device).normal_(generator=self.generator)
        noise = self.uniform(*shape)
        tiny = torch.finfo(noise.dtype).tiny  # a uniform draw may be 0
        return noise.clamp_(min=tiny).log_().neg_().log_().neg_()


class Trainer:
    """One run: environments, replay, agent, evaluation, logs and checkpoints of one logdir.

    Builds everything, and resumes if the logdir holds a checkpoint or data. `run()` trains until `steps` frames.
    """

    def __init__(self, config: Config, modalities: Mapping[str, ModalityConfig] | None = None):
        self.config = resolve_paths(config)
        self.logdir = Path(self.config.logdir)
        self.envs, self.eval_envs, self.locks = None, None, []
        try:
            self._build(modalities)
        except BaseException:  # a notebook goes on: the folders must be free again
            self.close()
            raise

    # Building

    def _build(self, modalities: Mapping[str, ModalityConfig] | None) -> None:
        config = self.config
        self._lock_folders()
        self._compare_config()
        self.device = tools.pick_device(config.device)
        # Tells the starts of a run apart: with the same random numbers, it would collect the same episodes again.
        self.begun = 0 if self.offline else episodes_begun(Path(config.traindir))
        if self.begun:
            tools.seed_everything(env_seed(config.seed, "train", 0, self.begun))
        self.obs_space, self.act_space = self._make_envs()
        self.agent = Dreamer(self.obs_space, self.act_space, config, self.device, modalities)
        seed = config.seed + 2
        self.random = Random(self.act_space, seed=env_seed(seed, "train", 0, self.begun) if self.begun else seed)
        self.replay = self._make_replay()
        self.eval_replay = self._make_eval_replay()
        self.updates, self.episodes, self.saved_at = 0, 0, 0
        # Agent steps from which updates are owed; what an earlier session stored counts from the end of the prefill.
        self.train_start = config.prefill if self.replay.steps >= config.prefill else None
        self.last_return, self.evaluated_at, self.told_short = None, None, False
        self.best = -math.inf  # of the evaluations' mean returns
        self.metrics, self.episode_metrics = tools.Metrics(), tools.Metrics()
        self.pending = None  # latents of the latest update, written back while the device works on the next
        self.shutdown = tools.Shutdown(stuck=self._save_data)
        self.agent.optimizer.unbroken = functools.partial(self.shutdown.breakable, False)
        self.writing = threading.Lock()  # of the data: it may be saved while this thread hangs
        resumed = self._resume()
        with disk_errors(self.logdir / "config.yaml"):
            # Only now: what could not be built leaves nothing to disagree with.
            config.save(self.logdir / "config.yaml")
        self.logger = self._make_logger()
        self.should_log, self.should_save = (
            tools.Every(interval, self.frames) for interval in (config.log_every, config.save_every)
        )
        # From the last one that was complete: one that was interrupted is made up for.
        self.should_eval = tools.Every(config.eval_every, self.evaluated_at or 0)
        self.kept = self._progress()  # as of the start, or of the last save
        self._introduce(resumed)

    def _lock_folders(self) -> None:
        """The logdir and every folder that the run writes pieces to belong to one process at a time."""
        folders = [self.logdir]
        if not self.offline:
            folders.append(Path(self.config.traindir))
        if self.evaluates and not self.config.offline_evaldir:
            folders.append(Path(self.config.evaldir))
        for folder in dict.fromkeys(folder.resolve() for folder in folders):
            self.locks.append(tools.lock_folder(folder))

    def _compare_config(self) -> None:
        """A logdir belongs to one configuration: a differing one is an error that says what differs, unless `force`."""
        saved = self.logdir / "config.yaml"
        begun = (self.logdir / "latest.pt").exists() or any(Path(self.config.traindir).glob("*.npz"))
        if saved.exists() and begun and not self.config.force:
            check_resume(resolve_paths(Config.read(saved)), self.config)

    @property
    def offline(self) -> bool:
        return self.config.offline_traindir is not None

    @property
    def evaluates(self) -> bool:
        return self.config.task != "none" and self.config.eval_every > 0 and self.config.eval_episode_num > 0

    def _make_envs(self) -> tuple[dict, Space]:
        """Starts the environments that this run needs and returns what they observe and how they act."""
        config = self.config
        if config.task == "none":
            return infer_spaces(config.offline_traindir)
        if not self.offline:
            self.envs = make_envs(config, "train", config.envs, self.begun)
        if self.evaluates or self.offline:
            self.eval_envs = make_envs(config, "eval", config.eval_envs, self.begun)
        envs = self.envs or self.eval_envs
        return envs.obs_space, envs.act_space

    def _replay_options(self, seed: int) -> dict:
        dyn = self.config.dyn
        return {
            "spaces": self.obs_space,
            "action_size": self.agent.action_size,
            "latent": {"deter": dyn.deter, "stoch": dyn.stoch, "classes": dyn.discrete},
            "length": self.config.batch_length,
            "action_repeat": self.config.action_repeat,
            "seed": seed,
        }

    def _make_replay(self) -> Replay:
        config, options = self.config, self._replay_options(self.config.seed + 3)
        options["frames"] = self._frames()
        if self.offline:
            return Replay.offline(config.offline_traindir, capacity=config.dataset_size, **options)
        with disk_errors(Path(config.traindir)):
            options |= {"capacity": config.dataset_size, "streams": config.envs, "keep": config.keep_on_disk}
            return Replay(Path(config.traindir), **options)

    def _frames(self) -> Callable:
        """Where the replay keeps images, see `replay_device`."""
        if self.config.replay_device == "cpu":
            return HostRows
        if self.device.type != "cuda":
            raise UserError(f"replay_device is cuda, but the run is on {self.device}: use --replay_device cpu")
        return functools.partial(DeviceRows, device=self.device)

    @functools.cached_property
    def feed(self) -> Feed:
        return Feed.to(self.device, self.replay, self.config.batch_size)

    def _make_eval_replay(self) -> Replay | None:
        """Held-out data for open-loop predictions: recorded episodes, or those of evaluations."""
        config, options = self.config, self._replay_options(self.config.seed + 4)
        capacity = max(4 * (config.batch_length + 1) * config.eval_envs, config.dataset_size // 50)
        if config.offline_evaldir:
            return Replay.offline(config.offline_evaldir, capacity=capacity, **options)
        if not self.evaluates:
            return None
        with disk_errors(Path(config.evaldir)):
            options |= {"capacity": capacity, "streams": config.eval_envs, "keep": config.keep_on_disk}
            return Replay(Path(config.evaldir), online=False, **options)

    def _make_logger(self) -> tools.Logger:
        config = self.config
        wandb = {"project": config.wandb_project, "name": self.logdir.name} if config.wandb else None
        logger = tools.Logger(
            self.logdir, self.frames, tensorboard=config.tensorboard, wandb=wandb, config=config.flat()
        )
        logger.drop_after(self.frames)  # lines of what was lost with the process, and is about to be repeated
        return logger

    def _introduce(self, resumed: bool) -> None:
        config, agent = self.config, self.agent
        sees = ", ".join(f"{key} {'x'.join(map(str, s.shape)) or s}" for key, s in self.obs_space.items())
        acts = "+".join(map(str, agent.classes)) + " discrete" if agent.classes else f"{agent.action_size} continuous"
        source = f"recorded episodes in {config.offline_traindir}" if self.offline else f"{config.envs} environments"
        log.info(f"Training {config.task} on {self.device} from {source}: observes {sees}; acts {acts}")
        modules = {"encoder": agent.world_model.encoder, "rssm": agent.world_model.rssm}
        modules |= {"decoder": agent.world_model.decoder, "reward": agent.world_model.reward}
        modules |= {"cont": agent.world_model.cont}
        for prefix, behavior in agent.behaviors.items():
            modules |= {f"{prefix}{name}": actor for name, actor in behavior.actors.items()}
            modules |= {f"{prefix}critic ({name})": stream.critic for name, stream in behavior.streams.items()}
            modules |= {f"{prefix}reward ({name})": reward for name, reward in behavior.intrinsic.items()}
        log.info("Parameters:\n" + tools.parameter_table(modules))
        steps = self.replay.stats()["entries"] if self.offline else config.dataset_size
        steps = min(steps, max(1, math.ceil(config.steps / config.action_repeat))) if not self.offline else steps
        memory = "memory" if self._frames() is HostRows else f"memory, frames on {self.device}"
        log.info(
            f"Replay: up to {steps:,} agent steps in {self.replay.estimate_bytes(steps) / 1e9:.2g} GB of {memory}; "
            f"{self.replay.steps:,} stored so far"
        )
        if resumed:
            log.info(f"Resuming at frame {self.frames:,}, update {self.updates:,}")
        if self.device.type == "cpu" and config.encoder.units > 128:
            log.warning("These networks are sized for a GPU and slow on a CPU: add the block cpu (--configs ... cpu)")
        if config.tensorboard:
            log.info(f"Watch: tensorboard --logdir {self.logdir}")

    # Counting

    @property
    def frames(self) -> int:
        """Frames so far. An offline run counts those that its updates stand for at the configured train ratio."""
        if not self.offline:
            return self.replay.steps * self.config.action_repeat
        return int(self.updates * self.trained_steps / self.config.train_ratio * self.config.action_repeat)

    @property
    def trained_steps(self) -> int:
        """Replayed steps per update."""
        return self.config.batch_size * self.config.batch_length

    @property
    def owed(self) -> int:
        """Updates that the train ratio asks for by now. None before the prefill is complete."""
        config = self.config
        if self.offline:
            return 1 if self.frames < config.steps else 0
        if self.replay.steps < config.prefill or self.replay.windows < config.batch_size:
            return 0
        if self.train_start is None:
            self.train_start = self.replay.steps
        trained = (self.replay.steps - self.train_start) * config.train_ratio / self.trained_steps
        return max(0, config.pretrain + int(trained) - self.updates)

    # Running

    def run(self) -> None:
        """Trains until `steps` frames, or until asked to stop; saves at the end either way."""
        with self.shutdown, tools.Progress(self.config.steps) as self.progress:
            try:
                if self.offline:
                    self._run_offline()
                else:
                    self._run_online()
                self._check_finite()
            except tools.Overdue:
                log.warning("What was under way when the stop was asked for did not end; it is broken off.")
            except Exception as error:
                self._rescue(error)
                raise
            saved = self.save()
            if self.evaluates and not self.shutdown.requested and self.evaluated_at != self.frames:
                self.evaluate()
                saved = self.save()
        self.logger.flush()
        ended = "Stopped" if self.shutdown.requested else "Finished"
        if not saved:
            raise UserError(f"{ended} at frame {self.frames:,}, but its weights are not saved: see the warning above.")
        log.info(f"{ended} at frame {self.frames:,}; saved in {self.logdir}")

    def _rescue(self, error: Exception) -> None:
        """Saves before an error ends the run: the data, and the checkpoint where the weights are not in doubt."""
        if self._progress() == self.kept:
            return  # nothing is new, and a run that has not begun is not bound to its settings
        try:
            if isinstance(error, USER_ERRORS):
                saved = self.save()
            else:
                saved = False
                if self.offline:
                    return
                self._flush()
        except Exception as second:
            log.warning(f"Nothing could be saved any more: {second}")
        else:
            what = "the run" if saved else "the data"
            log.info(f"An error ends the run at frame {self.frames:,}; {what} is saved in {self.logdir}")

    def _save_data(self) -> None:
        """From another thread, while this one hangs outside of Python; see `tools.Shutdown`."""
        self._flush()
        log.warning(
            f"The run hangs. Its data up to frame {self.frames:,} is saved; its weights are those of latest.pt."
        )

    def _flush(self) -> None:
        if not self.offline:
            with self.writing:
                self.replay.flush()

    def _progress(self) -> tuple[int, int]:
        return self.replay.steps, self.updates

    def _run_online(self) -> None:
        with self.shutdown.breakable():
            obs = self.envs.reset()
        state = self.agent.initial(self.envs.num)
        returns, lengths = np.zeros(self.envs.num), np.zeros(self.envs.num, int)
        self.train()  # updates that an earlier session owed run before new data comes in
        while self.frames < self.config.steps and not self.shutdown.requested:
            action, state, latents = self._act(obs, state)
            self._store(self.replay, obs, action, latents)
            self.envs.send(action)
            self.train()  # while the environments step
            self._periodic()
            with self.shutdown.breakable():
                obs = self.envs.receive()
            returns = np.where(obs["is_first"], 0, returns + obs["reward"])
            lengths = np.where(obs["is_first"], 0, lengths + 1)
            for env in np.flatnonzero(obs["is_last"]):
                self._episode_done(returns[env], lengths[env], logged(obs, env))
        self._store_last(obs)

    def _run_offline(self) -> None:
        if self.replay.windows == 0:
            raise UserError(
                f"offline_traindir ({self.config.offline_traindir}) holds {len(self.replay)} steps, too few for one "
                f"window of batch_length + 1 = {self.config.batch_length + 1}."
            )
        while self.owed and not self.shutdown.requested:
            self._update()
            self._periodic()

    def _act(self, obs: dict, state: dict) -> tuple[np.ndarray, dict, tuple | None]:
        """Actions [E, A], the policy's state, and its latents; random actions have none, as the policy did not look."""
        explores = not 0 < self.config.expl_until <= self.frames
        prefills = self.train_start is None or self.replay.steps < self.config.prefill
        if prefills or (explores and self.config.expl_behavior == "random"):
            action = self.random.policy(self.envs.num)
            state = self.agent.initial(self.envs.num) | {"action": torch.as_tensor(action, device=self.device)}
            return action, state, None
        action, state = self.agent.policy(obs, state, explore=explores)
        return action, state, self.agent.latents(state)

    def _store(self, replay: Replay, obs: dict, action: np.ndarray, latents: tuple | None) -> None:
        with self.shutdown.breakable(False):
            replay.add_all(obs | {"action": action}, latents)

    def _store_last(self, obs: dict) -> None:
        """The observations that were received and not acted on: of interest where they end an episode."""
        zeros = np.zeros((self.envs.num, self.agent.action_size), np.float32)
        for env in np.flatnonzero(obs["is_last"]):
            step = {key: value[env] for key, value in obs.items() if not key.startswith("log_")}
            self.replay.add(env, step | {"action": zeros[env]}, None)

    def _episode_done(self, ret: float, length: int, entries: dict[str, float]) -> None:
        self.episodes += 1
        self.last_return = float(ret)
        own = {f"episode/{name}": value for name, value in entries.items()}
        self.episode_metrics.add({"episode/return": float(ret), "episode/length": float(length), **own})
        log.info(f"Episode return: {ret:.1f}, length: {length}")

    def _periodic(self) -> None:
        """What happens every so many frames. An evaluation comes before the checkpoint that follows it."""
        self.progress.update(self.frames, self.updates, self.last_return)
        if self.should_eval(self.frames):
            self.evaluate()
        if self.should_log(self.frames):
            self.log_scalars()
        if self.should_save(self.frames):
            self.save()

    # Learning

    def train(self) -> None:
        """Runs the updates that are owed."""
        config = self.config
        often = config.save_every / config.action_repeat * config.train_ratio / self.trained_steps
        while self.owed and not self.shutdown.requested:
            self._update()
            self.progress.update(self.frames, self.updates, self.last_return)
            if self.updates - self.saved_at > 2 * often + 10:
                self.save()  # many updates were owed at once: no frame passes meanwhile

    def _update(self) -> None:
        batch, where = self.feed.next()
        with self.shutdown.breakable():  # except where the optimizer moves weights
            metrics, latents = self.agent.train_step(batch)
        self._write_latents()
        self.pending = (where, self.agent.to_host(*latents))
        self.updates += 1
        self.metrics.add(metrics)
        if self.updates % 100 == 0:
            self._check_finite()

    def _write_latents(self) -> None:
        if self.pending is not None:
            where, latents = self.pending
            self.replay.write_latents(where, *latents())
            self.pending = None

    def _check_finite(self) -> None:
        """Reads the device's count of masked updates in a row; every hundredth update, so that none waits for it."""
        bad = int(self.agent.optimizer.bad)
        if bad >= self.config.opt.max_bad:
            raise UserError(
                f"The loss or a gradient was not finite in the last {bad} updates (up to update {self.updates}); they "
                f"changed nothing, and {self.logdir / 'latest.pt'} is as it was. Look for extreme observations or "
                "rewards, or lower opt.lr."
            )

    # Evaluating, logging, saving

    def evaluate(self) -> None:
        """Plays episodes, and predicts held-out ones open loop."""
        config = self.config
        if not self.evaluates:
            self.evaluated_at = self.frames
        else:
            generator = torch.Generator(self.device).manual_seed(config.seed + 5 + self.frames)

            def store(obs: dict, action: np.ndarray) -> None:
                self._store(self.eval_replay, obs, action, None)

            with self.logger.new_film("eval/episode", self.frames) as film, self.shutdown.breakable():
                returns, lengths, entries = play(
                    self.agent, self.eval_envs, config.eval_episode_num, config.eval_sample, generator,
                    film=film if config.video_pred_log else None,
                    on_step=store if config.offline_evaldir is None else None,
                    stop=lambda: self.shutdown.requested,
                )  # fmt: skip
                if not self.shutdown.requested:
                    self.logger.film("eval/episode", film)
            if returns and not self.shutdown.requested:  # cut short, it would favour short episodes
                self.evaluated_at = self.frames
                self._log_evaluation(returns, lengths, entries)
        if config.video_pred_log and self.eval_replay and self.eval_replay.windows and not self.shutdown.requested:
            with self.shutdown.breakable():
                self._log_predictions()
        elif config.video_pred_log and self.eval_replay and not self.shutdown.requested and not self.told_short:
            self.told_short = True
            log.info(
                f"No open-loop prediction yet: the evaluations so far are shorter than a window (batch_length "
                f"{config.batch_length}) in every environment. More of eval_episode_num shows one sooner."
            )
        if self.evaluates or config.video_pred_log:
            self.logger.write(self.frames)

    def _log_evaluation(self, returns: list[float], lengths: list[int], entries: dict[str, list[float]]) -> None:
        mean, std = np.mean(returns), np.std(returns)
        log.info(f"Evaluation return: {mean:.1f} ± {std:.1f} over {len(returns)} episodes")
        log.debug(f"Returns: {', '.join(f'{ret:.4g}' for ret in returns)}; lengths: {lengths}")
        self.logger.scalars({"eval/return": mean, "eval/return_std": std, "eval/length": np.mean(lengths)})
        self.logger.scalars({f"eval/{name}": np.mean(values) for name, values in entries.items()})
        if self.config.save_best and mean > self.best:
            before, self.best = self.best, float(mean)
            if not self.save("best_model.pt"):
                self.best = before

    def _log_predictions(self, count: int = 6) -> None:
        """Open-loop predictions of every kind: the model sees the first part of each window and imagines the rest."""
        batch = self.eval_replay.sample(count)
        context = max(1, self.config.batch_length // 3)
        tensors = self.agent.to_device({**batch, "context": batch.context})
        tensors["context"]["valid"].zero_()  # whatever is stored belongs to older weights
        model = self.agent.world_model
        with self.agent.autocast(), torch.no_grad():
            predicted, truth = model.predict(tensors, context), model.decoder.targets(tensors)
        for kind, keys in model.decoder.kinds.items():
            for key in keys if model.decoder.shows[kind] else ():
                arrays = (value[key].cpu().numpy() for value in (truth, predicted))
                arrays = (array.astype(np.float32) if array.dtype.kind == "f" else array for array in arrays)
                shown = model.decoder.shows[kind](model.decoder.decoders[kind], key, *arrays, context)
                for suffix, (method, value) in shown.items():
                    getattr(self.logger, method)(f"open_loop/{key}{suffix}", value)

    def log_scalars(self) -> None:
        self._check_finite()
        scalars = {**self.metrics.result(), **self.episode_metrics.result()}
        scalars |= {"train/updates": self.updates, "train/episodes": self.episodes}
        if self.config.env_restarts:
            scalars["train/env_restarts"] = sum(envs.restarts for envs in (self.envs, self.eval_envs) if envs)
        scalars |= {f"replay/{key}": value for key, value in self.replay.stats().items()}
        self.metrics, self.episode_metrics = tools.Metrics(), tools.Metrics()
        log.debug(f"At update {self.updates}: " + ", ".join(f"{key} {value:.4g}" for key, value in scalars.items()))
        self.logger.scalars(scalars)
        self.logger.write(self.frames, fps=True)

    def save(self, name: str = "latest.pt") -> bool:
        """Data first, then the checkpoint, so that it is never ahead of the data that it counts. False: not saved."""
        self._write_latents()
        self._flush()
        if self.eval_replay is not None and self.config.offline_evaldir is None:
            self.eval_replay.flush()
        if int(self.agent.optimizer.bad) and not self.agent.optimizer.scaled:  # there overflows now and then are normal
            log.warning("The latest updates were not finite: no checkpoint is written, an earlier one is kept.")
            return False
        if self.offline:
            # Latents are not saved: a resumed run computes them anew, and so does this one, to stay equal to it.
            self.replay.forget_latents()
        counters = {"frames": self.frames, "agent_steps": self.replay.steps, "updates": self.updates}
        counters |= {"episodes": self.episodes, "train_start": self.train_start, "evaluated_at": self.evaluated_at}
        counters |= {"last_return": self.last_return, "best": self.best}
        tools.save_checkpoint(
            self.logdir / name,
            {
                "format": FORMAT,
                "config": self.config.flat(),
                "counters": counters,
                **self.agent.checkpoint(),
                "random_actions": self.random.state(),
                "replay": self.replay.state(),
                "eval_replay": self.eval_replay.state() if self.eval_replay else None,
                "metrics": {"updates": self.metrics.state(), "episodes": self.episode_metrics.state()},
            },
            keep="previous.pt" if name == "latest.pt" else "",
        )
        self.saved_at, self.kept = self.updates, self._progress()
        log.debug(f"Saved {self.logdir / name} at frame {self.frames}, update {self.updates}")
        return True

    def _resume(self) -> bool:
        """Restores `latest.pt`, or else the weights of `checkpoint`, if given. True if anything here goes on."""
        path, given = self.logdir / "latest.pt", self.config.checkpoint and Path(self.config.checkpoint)
        if given and given.exists() and given.parent.resolve() == self.logdir.resolve():
            path, given = given, None  # one of its own, such as the best
        if path.exists() and given:
            log.warning(f"{path} is resumed; checkpoint ({self.config.checkpoint}) only starts a new logdir.")
        if not path.exists() and path.with_name("previous.pt").exists():
            path = path.with_name("previous.pt")
        if not path.exists():
            if self.config.checkpoint:
                weights = load_run(self.config.checkpoint)
                with readable(self.config.checkpoint):
                    self.agent.restore(weights, weights_only=True)
                log.info(f"Weights from {self.config.checkpoint}")
            return bool(self.replay.steps) and not self.offline
        path, state = self._load_latest(path)
        if path.name not in ("latest.pt", "previous.pt") and self.frames >= self.config.steps:
            raise UserError(
                f"{path}: the run is at frame {self.frames:,} of {self.config.steps:,.0f}, so that nothing would be "
                "trained, and its older weights would replace latest.pt: raise --steps."
            )
        with readable(path):
            self._restore(state, older=path.name not in ("latest.pt", "previous.pt"))
        return True

    def _load_latest(self, path: Path) -> tuple[Path, dict]:
        """A checkpoint and what it holds. Where the latest is damaged, the one before takes its place."""
        previous = path.with_name("previous.pt")
        try:
            return path, load_run(path)
        except tools.Damaged as error:
            if path.name != "latest.pt" or not previous.exists():
                raise
            state = load_run(previous)
            aside = path.with_name("damaged.pt")
            log.warning(
                f"{error} It is {aside.name} now; the run goes on from {previous.name}, of frame "
                f"{state['counters']['frames']:,}, and makes up for the updates since."
            )
            os.replace(path, aside)
            return previous, state

    def _restore(self, state: dict, older: bool) -> None:
        """older: the weights are not the newest; what was learned since then is not caught up on."""
        self.agent.restore(state)
        counters = state["counters"]
        self.updates = counters["updates"]
        self.episodes = counters["episodes"] + (0 if self.offline else self.replay.ended_since(state["replay"]))
        self.saved_at, self.last_return = self.updates, counters["last_return"]
        self.evaluated_at = counters["evaluated_at"]
        best = self.logdir / "best_model.pt"
        known = [counters.get("best", -math.inf)]
        known += [load_run(best)["counters"]["best"]] if self.config.save_best and best.exists() else []
        self.best = max(known)  # the best may be newer than the latest
        self.metrics.load_state(state["metrics"]["updates"], self.device)
        self.episode_metrics.load_state(state["metrics"]["episodes"], "cpu")
        self.random.load_state(state.get("random_actions") or state["exploration"])  # as it was called once
        self.replay.load_state(state["replay"])
        if counters["train_start"] is not None:  # else the checkpoint is from the prefill: what came after it counts
            self.train_start = self._started(counters["train_start"], state["config"], older)
        if self.eval_replay and state["eval_replay"]:
            self.eval_replay.load_state(state["eval_replay"])

    def _started(self, start: int, trained: dict, older: bool) -> int:
        """`train_start` of a resumed run. trained: the checkpoint's configuration.

        Updates are owed for all steps since `start`; where they were to be of another number until now, or are not to
        be caught up on, the start moves so that none are owed now.
        """
        keys = ("batch_size", "batch_length", "train_ratio")
        changed = [key for key in keys if trained.get(key) != self.config[key]]
        if changed and not older:
            log.warning(f"{', '.join(changed)} changed: updates are owed for new steps alone, at the new ratio.")
        if not (changed or older) or not self.config.train_ratio:
            return start
        done = (self.updates - self.config.pretrain) * self.trained_steps / self.config.train_ratio
        return self.replay.steps - math.ceil(done)

    def close(self) -> None:
        for envs in (self.envs, self.eval_envs):
            if envs is not None:
                envs.close()
        if hasattr(self, "logger"):
            self.logger.close()
        for lock in self.locks:
            lock.close()
        self.locks = []


DreamerV3Trainer = Trainer


def load_run(path: str | Path) -> dict:
    """A checkpoint that `Trainer.save` wrote; UserError for any other file."""
    state = tools.load_checkpoint(path)
    missing = {"config", "counters", "world_model", "behavior", "optimizer"} - state.keys()
    if missing:
        raise UserError(
            f"{path}: found the entries {', '.join(map(str, state)) or 'none'}, expected a checkpoint of this program, "
            f"with {', '.join(sorted(missing))} too. Give the latest.pt of a run."
        )
    if state.get("format", FORMAT) != FORMAT:
        raise UserError(f"{path}: found format {state['format']}, expected {FORMAT}: it is of another release.")
    return state


@contextlib.contextmanager
def readable(path: Path | str) -> Iterator[None]:
    """UserError where a checkpoint lacks a part, or a part is not what it was saved as."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be used: {error}"
        raise UserError(f"{path}: {what}. It is damaged, or of another release; give another one.") from error


def make_envs(config: Config, mode: str, count: int, start: int = 0) -> VectorEnv:
    """`count` environments side by side; `mode` is train or eval; `start`: see `make_env`."""

    def maker(index: int, attempt: int = 0) -> tuple[Callable, int]:
        where = (mode, index, start, attempt)
        return functools.partial(make_env, config, *where), env_seed(config.seed, *where)

    fns, seeds = zip(*(maker(index) for index in range(count)), strict=True)
    limits = {"restarts": config.env_restarts, "timeout": config.env_timeout}
    return make_vector(fns, config.parallel, seeds, again=maker, **limits)


def play(
    agent: Dreamer,
    envs: VectorEnv,
    episodes: int,
    sample: bool,
    generator: torch.Generator,
    film: tools.Film | None = None,
    on_step=None,
    stop=lambda: False,
) -> tuple[list[float], list[int], dict[str, list[float]]]:
    """Plays `episodes` episodes with the policy. Returns their returns, lengths (agent steps), and the environment's
    own entries (`log_*`) at their ends. `film` gets the frames of the first.

    Each environment plays its share (some one more), whatever the episodes' lengths: counting the first to finish would
    favour short ones.
    """
    quota = np.array([len(range(env, episodes, envs.num)) for env in range(envs.num)])
    obs, state = envs.reset(), agent.initial(envs.num)
    total, length = np.zeros(envs.num), np.zeros(envs.num, int)
    returns, lengths, entries = [], [], {}
    filming, patience = film is not None, Patience()
    while (quota > 0).any() and not stop():
        patience.check(returns)
        action, state = agent.policy(obs, state, sample, generator)
        if on_step:
            on_step(obs, action)
        if filming:
            frame = obs["image"][0] if is_frame(obs.get("image")) else envs.render(0)
            filming = frame is not None and add_frame(film, frame)
        obs = envs.step(action)
        total = np.where(obs["is_first"], 0, total + obs["reward"])
        length = np.where(obs["is_first"], 0, length + 1)
        for env in np.flatnonzero(obs["is_last"] & (quota > 0)):
            quota[env] -= 1
            returns.append(float(total[env]))
            lengths.append(int(length[env]))
            for name, value in logged(obs, env).items():
                entries.setdefault(name, []).append(value)
            filming = filming and env != 0
        if on_step and not (quota > 0).any():
            on_step(obs, np.zeros_like(action))  # nothing acts on the steps that end the last episodes
    return returns, lengths, entries


def add_frame(film: tools.Film, frame: np.ndarray) -> bool:
    """False where the film cannot go on: the run matters more."""
    try:
        film.add(frame)
    except (UserError, ValueError) as error:  # of the disk, of the frame
        log.warning(f"No film of this evaluation: {error}")
        film.discard()
        return False
    return True


def is_frame(images: np.ndarray | None) -> bool:
    """Whether observations [E, ...] called `image` are what a film can show."""
    return images is not None and images.dtype == np.uint8 and images.ndim == 4 and images.shape[-1] in (1, 3)


class Patience:
    """Says once that evaluation episodes do not end, which may be meant or not."""

    def __init__(self, steps: int = 2_000, seconds: float = 15.0):
        self.steps, self.seconds, self.taken, self.started = steps, seconds, 0, time.monotonic()

    def check(self, ended: list) -> None:
        """To be called once per step; `ended` grows by every episode that ends."""
        self.taken += 1
        if self.taken >= self.steps and not ended and time.monotonic() - self.started > self.seconds:
            self.steps = math.inf
            log.warning(
                f"No episode of this evaluation has ended after {self.taken:,} steps. If the task does not end "
                "episodes itself, give --time_limit FRAMES, or --eval_every 0 to train without evaluations."
            )


def _check_finite(obs: dict[str, np.ndarray], action: np.ndarray) -> None:
    """For steps that are not stored: the replay checks those that are."""
    for key, value in obs.items():
        if value.dtype.kind == "f" and not key.startswith("log_") and not np.isfinite(value).all():
            raise UserError(f"The observation '{key}' holds NaN or infinity: mend it in the environment.")


def logged(obs: dict[str, np.ndarray], env: int) -> dict[str, float]:
    """The numbers that the environment wants logged at this step (`log_*`), without the prefix unless a metric of the
    run has that name.
    """
    found = {key: value[env] for key, value in obs.items() if key.startswith("log_")}
    found = {key: float(value) for key, value in found.items() if value.size == 1 and not np.isnan(value)}
    return {key if key[4:] in OWN_METRICS else key[4:]: value for key, value in found.items()}


def evaluate_checkpoint(config: Config, modalities: Mapping[str, ModalityConfig] | None = None) -> None:
    """`--mode eval`: plays `episodes` episodes with a checkpoint's weights, and films the first.

    The configuration is the checkpoint's, except for how to evaluate and for what is written on the command line.
    """
    path = Path(config.checkpoint or Path(resolve_paths(config).logdir) / "latest.pt")
    device = tools.pick_device(config.device)
    state = load_run(path)
    own = ("mode", "checkpoint", "episodes", "seed", "device", "precision", "compile", "graph", "threads")
    own += ("eval_sample", "eval_envs", "parallel", "env_timeout", "env_restarts")
    trained = config.replace(**state["config"])
    config = trained.replace(**({key: config[key] for key in own} | config.given()))
    module = config.task.removeprefix("gym_").partition(":")[0] if ":" in config.task else None
    if module and "task" not in config.given():
        raise UserError(
            f"{path} is of the task {config.task}, which imports the module {module}: if you trust where the file is "
            f"from, give --task {config.task}"
        )
    if config.task == "none":
        raise UserError(f"{path} was trained on recorded episodes alone: --task NAME says where to play.")
    envs = make_envs(config, "eval", min(config.eval_envs, config.episodes))
    try:
        before, now = trained.flat(), config.given()
        changed = any(now[key] != before.get(key) for key in now if key not in (*own, "logdir"))
        space = _observed_in_training(trained, envs) if changed else envs.obs_space
        agent = Dreamer(space, envs.act_space, config, device, modalities)
        agent.restore(state, weights_only=True)
        generator = torch.Generator(device).manual_seed(config.seed)
        frames = state["counters"]["frames"]
        with tools.Shutdown() as shutdown, tools.Film(path.parent / f"eval-{frames}.mp4", fps=30) as film:
            returns, lengths, _ = play(
                agent,
                envs,
                config.episodes,
                config.eval_sample,
                generator,
                film=film,
                on_step=_check_finite,
                stop=lambda: shutdown.requested,
            )
            if not returns:
                raise UserError("Stopped before an episode was complete.")
            how = "sampled actions" if config.eval_sample else "mode"
            print(f"{path} (frame {frames:,}) on {config.task}, {how}:")
            mean, std, length = np.mean(returns), np.std(returns), np.mean(lengths)
            print(f"return {mean:.1f} ± {std:.1f} over {len(returns)} episodes (mean length {length:.0f})")
            if len(film) and not shutdown.requested:
                print(f"film of the first: {film.keep()}")
    finally:
        envs.close()


def _observed_in_training(trained: Config, envs: VectorEnv) -> dict:
    """The observation space that a checkpoint's networks are for. What `envs` do not have of it counts as absent."""
    if trained.task == "none":
        return envs.obs_space
    env = make_env(trained, "eval", 0)
    try:
        space, actions = env.obs_space, env.act_space
    finally:
        env.close()
    if vector.width(actions) != vector.width(envs.act_space):
        raise UserError(f"The action space is {envs.act_space} here, and was {actions} in training.")
    for key, was in space.items():
        if key in envs.obs_space and envs.obs_space[key].shape != was.shape:
            raise UserError(f"'{key}' has the shape {envs.obs_space[key].shape} here, and had {was.shape} in training.")
        if key in envs.obs_space and hasattr(was, "same_words") and not was.same_words(envs.obs_space[key]):
            raise UserError(
                f"The ids of '{key}' mean other words here than in training: keep text.tokenizer as it was."
            )
    lost = sorted(space.keys() - envs.obs_space.keys())
    if lost:
        log.warning(f"Observed in training and not here, so that it counts as absent: {', '.join(lost)}")
    return space


def prepare(config: Config) -> None:
    """What concerns the process as a whole: its log, seeds, threads and memory."""
    tools.end_with_parent()
    tools.setup_logging(config.log_level, None if config.mode == "eval" else resolve_paths(config).logdir)
    tools.seed_everything(config.seed)
    tools.set_threads(config.threads)
    tools.keep_freed_memory()
    tools.allow_many_files()
    if config.deterministic_run:
        tools.enable_deterministic_run()


def main(config: Config, modalities: Mapping[str, ModalityConfig] | None = None) -> None:
    """Trains, or evaluates. `modalities`: see `Dreamer`; for what a program in Python selects."""
    prepare(config)
    if config.mode == "eval":
        evaluate_checkpoint(config, modalities)
        return
    trainer = Trainer(config, modalities)
    try:
        trainer.run()
    finally:
        trainer.close()


def cli(config: Config) -> int:
    """The front door, past its flags."""
    return guarded(main, config)


def guarded(function: Callable, *args, advice: str = "") -> int:
    """Runs a front door. Exit status: 0, or 1 with one line that says what is wrong; `advice` joins that on memory."""
    try:
        raise_on_interrupt()
        function(*args)
    except USER_ERRORS as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `--mode eval | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (RuntimeError, MemoryError, OSError) as error:
        found = tools.too_many_files_help(error) or tools.out_of_memory_help(error)
        if found is None:
            raise
        print(f"Error: {found} {advice}".rstrip(), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(cli(CONFIG))
