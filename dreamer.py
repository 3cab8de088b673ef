import functools
import logging
import numpy as np
import torch
from gymnasium.spaces import Space
from torch import Tensor, nn
from config import Config
from errors import UserError
from modalities import vector
from models import ImagBehavior, WorldModel, total_loss
from networks import features
from optim import Optimizer
log = logging.getLogger(__name__)

class Dreamer(nn.Module):
    """World model, behaviour and optimizer, tied into `policy(obs, state)` and `train_step(batch)`.

    Args:
        obs_space: {observation key: gymnasium space}.
        act_space: Box, Discrete or MultiDiscrete; actions are vectors (one-hot for discrete spaces).
        config: the whole configuration; only here it is taken apart.
    """

    def __init__(self, obs_space: dict, act_space: Space, config: Config, device: torch.device | str = "cpu"):
        super().__init__()
        self.device = torch.device(device)
        self.action_size, self.classes = vector.width(act_space), vector.classes(act_space)
        shared = {"horizon": config.horizon, "contdisc": config.contdisc}
        sections = ("encoder", "decoder", "dyn", "reward_head", "cont_head", "kl_free", "grad_heads")
        self.world_model = WorldModel(obs_space, self.action_size, **shared, **{k: config[k] for k in sections})
        sections = ("actor", "critic", "retnorm", "imag_horizon", "imag_gradient", "imag_gradient_mix")
        self.behavior = ImagBehavior(
            self.world_model.rssm.feat_size,
            self.action_size,
            self.classes,
            discount_lambda=config.discount_lambda,
            reward_EMA=config.reward_EMA,
            **shared,
            **{k: config[k] for k in sections},
        )
        self.loss_scales = dict(config.loss_scales)
        self.to(self.device)
        self.optimizer = self._optimizer(**config.opt)
        self.generator = torch.Generator(self.device).manual_seed(config.seed)  # noise of updates
        self.policy_generator = torch.Generator(self.device).manual_seed(config.seed + 1)  # noise of acting
        half = config.precision == "bfloat16" or (config.precision == "auto" and self.device.type == "cuda")
        self.autocast = functools.partial(torch.autocast, self.device.type, torch.bfloat16, enabled=half)
        if config.compile:
            rssm = self.world_model.rssm
            rssm._obs_step, rssm.img_step = torch.compile(rssm._obs_step), torch.compile(rssm.img_step)

    def _optimizer(self, lr: float, actor_lr: float | None, critic_lr: float | None, max_bad: int, **options) -> Optimizer:
        def of(prefix: str, module: nn.Module) -> list:
            return [(f"{prefix}.{name}", p) for name, p in module.named_parameters() if p.requires_grad]

        critics = [p for name, s in self.behavior.streams.items() for p in of(f"streams.{name}.critic", s.critic)]
        groups = {
            "world": (of("world_model", self.world_model), lr),
            "actor": (of("actor", self.behavior.actor), actor_lr or lr),
            "critic": (critics, critic_lr or lr),
        }
        return Optimizer(groups, **options)

    # Acting

    def initial(self, num: int) -> dict:
        """The state that `policy` carries for `num` environments: latent, previous action, and what the behaviour carries."""
        return {
            "latent": self.world_model.rssm.initial(num),
            "action": torch.zeros(num, self.action_size, device=self.device),
            "carry": self.behavior.initial(num),
        }

    @torch.no_grad()
    def policy(self, obs: dict[str, np.ndarray], state: dict, sample: bool = True) -> tuple[np.ndarray, dict]:
        """Action [E, action] for a batch of observations [E, ...] and the state that it leads to.

        State and previous action are reset where `is_first`. Actions are sampled, or the mode; latents are always sampled.
        """
        obs = {k: self._tensor(v) for k, v in obs.items() if not k.startswith("log_")}
        is_first = obs["is_first"]
        with self.autocast():
            tokens = self.world_model.encoder(obs)
            noise = self._latent_noise(len(is_first), generator=self.policy_generator)
            latent = self.world_model.rssm.obs_step(state["latent"], state["action"], tokens, is_first, noise)
            noise = self._action_noise(len(is_first), generator=self.policy_generator) if sample else None
            action, carry = self.behavior.policy(features(latent), state["carry"], is_first, noise)
        action = action.float()
        state = {"latent": {k: latent[k] for k in ("deter", "stoch")}, "action": action, "carry": carry}
        return action.cpu().numpy(), state

    def latents(self, state: dict) -> tuple[np.ndarray, np.ndarray]:
        """The latents of a policy state as the replay keeps them: deter [E, deter], stoch [E, stoch]."""
        deter, stoch = self.world_model.pack(state["latent"])
        return deter.cpu().numpy(), stoch.cpu().numpy()

    # Learning

    def train_step(self, batch: dict, noise: dict | None = None) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
        """One update on a batch of tensors on the device. Returns metrics (0-d tensors) and the refreshed latents as stored."""
        losses, post, metrics = self.losses(batch, noise)
        loss = total_loss(losses, self.loss_scales)
        optimized = self.optimizer.step(loss)
        self.behavior.after_step()
        metrics |= {"world/loss": loss.detach()} | {f"opt/{k}": v for k, v in optimized.items()}
        return metrics, self.world_model.pack(post)

    def losses(self, batch: dict, noise: dict | None = None) -> tuple[dict[str, Tensor], dict, dict[str, Tensor]]:
        """All losses [B, T], the posterior states, and metrics. `noise` is drawn unless given (see `draw_noise`)."""
        noise = noise or self.draw_noise(*batch["reward"].shape)
        with self.autocast():
            losses, post, metrics = self.world_model.loss(batch, noise["post"])
            more, more_metrics = self.behavior.loss(self.world_model, post, batch, noise)
        return losses | more, post, metrics | more_metrics

    def draw_noise(self, batch: int, time: int) -> dict[str, Tensor]:
        """Every random number of one update: `post` [B, T, ...], `prior` [H, B*T, ...], `action` [H+1, B*T, action]."""
        horizon, starts = self.behavior.imag_horizon, batch * time
        return {
            "post": self._latent_noise(batch, time),
            "prior": self._latent_noise(horizon, starts),
            "action": self._action_noise(horizon + 1, starts),
        }

    def to_device(self, batch: dict) -> dict:
        """Numpy arrays of a replayed batch to tensors on the device; frames stay uint8."""
        return {k: self.to_device(v) if isinstance(v, dict) else self._tensor(v) for k, v in batch.items()}

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.as_tensor(array).to(self.device, non_blocking=True)

    def _latent_noise(self, *lead: int, generator: torch.Generator | None = None) -> Tensor:
        rssm = self.world_model.rssm
        return self._noise((*lead, *rssm.noise_shape), bool(rssm.discrete), generator or self.generator)

    def _action_noise(self, *lead: int, generator: torch.Generator | None = None) -> Tensor:
        return self._noise((*lead, self.action_size), bool(self.classes), generator or self.generator)

    def _noise(self, shape: tuple[int, ...], gumbel: bool, generator: torch.Generator) -> Tensor:
        noise = torch.empty(shape, device=self.device)
        if not gumbel:
            return noise.normal_(generator=generator)
        tiny = torch.finfo(noise.dtype).tiny  # an exponential draw may round to 0
        return noise.exponential_(generator=generator).clamp_(min=tiny).log_().neg_()

    # Keeping

    def checkpoint(self) -> dict:
        """Everything that the next update depends on, except the replay: weights, optimizer, generators."""
        return {
            "world_model": self.world_model.state_dict(),
            "behavior": self.behavior.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generators": {"update": self.generator.get_state(), "policy": self.policy_generator.get_state()},
        }

    def restore(self, state: dict, weights_only: bool = False) -> None:
        """Loads `checkpoint()`. With `weights_only` the optimizer and the generators stay as they are.

        Raises UserError if the weights belong to networks of other sizes."""
        try:
            self.world_model.load_state_dict(state["world_model"])
            self.behavior.load_state_dict(state["behavior"])
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
            raise UserError(f"The checkpoint's networks differ from the configured ones: {reason}") from error
        if not weights_only:
            self.optimizer.load_state_dict(state["optimizer"])
            for generator, key in ((self.generator, "update"), (self.policy_generator, "policy")):
                try:
                    generator.set_state(state["generators"][key].cpu())
                except RuntimeError:
                    log.warning("The checkpoint's random state is of another kind of device: drawing from a new one.")
