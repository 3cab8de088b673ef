"""DM Control suite: `dmc_<domain>_<task>`."""

import difflib
import os

import numpy as np
from gymnasium import spaces

from .wrappers import Env, TaskError, transition

CAMERAS = {"quadruped": 2}  # its camera 0 stands still; 2 follows the body
NO_RENDERING = ("disable", "disabled", "off", "false", "0")  # values of MUJOCO_GL
VIDEO_SIZE = (192, 192)  # of frames for people, where the agent itself sees none


def load(config, mode: str, name: str, seed: int) -> Env:
    """The task `name`, e.g. walker_walk. config: image_size, action_repeat, time_limit and the section dmc."""
    suite = _import_suite()
    tasks = {f"{domain}_{task}": (domain, task) for domain, task in suite.ALL_TASKS}
    if name not in tasks:
        close = difflib.get_close_matches(name, tasks, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join('dmc_' + x for x in close)}?" if close else f"tasks: {', '.join(tasks)}"
        raise TaskError(f"dmc_{name}: DM Control has no such task; {hint}")
    domain, task = tasks[name]
    options = {"random": seed}
    if config.time_limit:
        options["time_limit"] = float("inf")  # the TimeLimit wrapper counts instead
    env = suite.load(domain, task, task_kwargs=options)
    camera = CAMERAS.get(domain, 0) if config.dmc.camera < 0 else config.dmc.camera
    if camera >= env.physics.model.ncam:
        raise TaskError(
            f"dmc_{name}: dmc.camera is {camera}, but the task has cameras 0 to {env.physics.model.ncam - 1}."
        )
    return DMCEnv(
        env,
        image=config.dmc.image,
        proprio=config.dmc.proprio,
        size=tuple(config.image_size),
        camera=camera,
        repeat=config.action_repeat,
        fast_render=config.dmc.fast_render,
    )


def _import_suite():
    try:
        from dm_control import suite

        return suite
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] in ("dm_control", "mujoco"):
            raise TaskError("DM Control is not installed: pip install -r requirements.txt") from error
        raise
    except (ImportError, AttributeError, RuntimeError) as error:  # what a missing or failing libEGL looks like
        raise TaskError(
            f"MuJoCo cannot render without a screen ({type(error).__name__}: {error}): apt-get install libegl1 libgl1, "
            "or set MUJOCO_GL=osmesa (apt-get install libosmesa6), or MUJOCO_GL=disable with --dmc.image false "
            "--dmc.proprio true --video_pred_log false"
        ) from error


class DMCEnv(Env):
    """A dm_control environment.

    image: observe `image`, uint8 [*size, 3], rendered at that size; proprio: observe the task's own numbers, float32,
    under its own names (scalars have shape (1,)). size: (height, width) in pixels. repeat: frames per step; repeating
    in here renders only the last of them. fast_render: no shadows and no multisampling.
    """

    def __init__(self, env, *, image: bool, proprio: bool, size, camera: int, repeat: int, fast_render: bool = False):
        self._renders = os.environ.get("MUJOCO_GL", "").lower() not in NO_RENDERING
        if image and not self._renders:
            raise TaskError(
                "MUJOCO_GL turns rendering off, but dmc.image is true: set MUJOCO_GL=egl, or --dmc.image false."
            )
        if not image and not proprio:
            raise TaskError("dmc.image and dmc.proprio are both false: the agent would see nothing; set one of them.")
        self._env = env
        self._image, self._proprio = image, proprio
        self._size, self._camera = size, camera
        self._frame = None
        self.action_repeat = repeat
        if fast_render:
            # The renderer reads these when it is created, at the first frame.
            env.physics.model.vis.quality.shadowsize = 0
            env.physics.model.vis.quality.offsamples = 0
        self.obs_space = self._spaces(env.observation_spec())
        spec = env.action_spec()
        low, high = (np.broadcast_to(x, spec.shape).astype(np.float32) for x in (spec.minimum, spec.maximum))
        self.act_space = spaces.Box(low, high, dtype=np.float32)

    def reset(self):
        return transition(self._observe(self._env.reset()), first=True)

    def step(self, action):
        reward = 0.0
        for _ in range(self.action_repeat):
            time_step = self._env.step(action)
            reward += time_step.reward or 0.0
            if time_step.last():
                break
        terminal = time_step.last() and time_step.discount == 0  # a time limit keeps discount 1
        return transition(self._observe(time_step), reward, last=time_step.last(), terminal=terminal)

    def render(self):
        if self._image:
            return self._frame.copy()
        return self._render(VIDEO_SIZE) if self._renders else None

    def close(self):
        self._env.close()
        self._env.physics.free()  # here and not when collected: an OpenGL context must be freed in its own thread

    def _spaces(self, spec):
        result = {}
        if self._image:
            result["image"] = spaces.Box(0, 255, (*self._size, 3), np.uint8)
        if self._proprio:
            for key, value in spec.items():
                result[key] = spaces.Box(-np.inf, np.inf, value.shape or (1,), np.float32)
        return result

    def _observe(self, time_step):
        obs = {}
        if self._image:
            self._frame = obs["image"] = self._render(self._size)
        if self._proprio:
            for key, value in time_step.observation.items():
                obs[key] = np.asarray(value, np.float32).reshape(self.obs_space[key].shape)
        return obs

    def _render(self, size):
        return self._env.physics.render(*size, camera_id=self._camera)
