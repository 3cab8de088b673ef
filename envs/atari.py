"""Atari games on ale-py: `atari_<game>`, e.g. atari_pong or atari_ms_pacman."""

import difflib

import numpy as np
from gymnasium import spaces

from .wrappers import Env, TaskError, transition

FRAMES = 108_000  # half an hour at 60 frames a second, the benchmark's time limit


def load(config, mode: str, name: str, seed: int) -> Env:
    """The game `name`. config: action_repeat and the section atari. Lives end episodes in training only."""
    try:
        import ale_py
        from ale_py import roms
    except ModuleNotFoundError as error:
        raise TaskError("ale-py is not installed: pip install -r requirements/atari.txt") from error
    games = {rom.replace("_", ""): rom for rom in roms.get_all_rom_ids()}
    key = name.replace("_", "")  # the literature writes jamesbond and james_bond
    if key not in games:
        close = difflib.get_close_matches(name, games.values(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join('atari_' + x for x in close)}?" if close else f"{len(games)} games exist"
        raise TaskError(f"atari_{name}: ale-py has no such game; {hint}")
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner from each worker
    options = config.atari
    return AtariEnv(
        ale_py.ALEInterface(),
        roms.get_rom_path(games[key]),
        seed=seed,
        repeat=config.action_repeat,
        sticky=options.sticky,
        gray=options.gray,
        noops=options.noops,
        all_actions=options.all_actions,
        life_done=options.life_done and mode == "train",
    )


class AtariEnv(Env):
    """One game. Observes `image`, uint8 [210, 160, 3 or 1]: the maximum of the last two frames (games draw some
    objects in every second frame only).

    repeat: frames per action. sticky: the emulator repeats the previous action with probability 0.25. gray: one
    channel. noops: up to so many frames without action start an episode. all_actions: 18 actions instead of the
    game's own. life_done: losing a life is terminal; the next reset goes on in the same game.
    """

    time_limit = FRAMES

    def __init__(
        self,
        ale,
        rom,
        *,
        seed: int,
        repeat: int = 4,
        sticky=False,
        gray=False,
        noops: int = 30,
        all_actions=False,
        life_done=False,
    ):
        ale.setInt("random_seed", seed % 2**31)
        ale.setFloat("repeat_action_probability", 0.25 if sticky else 0.0)
        ale.loadROM(rom)
        self._ale = ale
        self._rng = np.random.default_rng(seed)
        self._noops, self._life_done = noops, life_done
        self._actions = ale.getLegalActionSet() if all_actions else ale.getMinimalActionSet()
        self._grab = ale.getScreenGrayscale if gray else ale.getScreenRGB
        shape = (*ale.getScreenDims(), 1 if gray else 3)
        self._screens = np.zeros((2, *shape[:2]) if gray else (2, *shape), np.uint8)
        self._lives = 0
        self._reset_game = True
        self.action_repeat = repeat
        self.obs_space = {"image": spaces.Box(0, 255, shape, np.uint8)}
        self.act_space = spaces.Discrete(len(self._actions))

    def reset(self):
        # After a lost life the game goes on, unless it is over or a time limit cut it.
        if self._reset_game or self._ale.game_over():
            self._ale.reset_game()
            for _ in range(int(self._rng.integers(self._noops + 1))):
                self._ale.act(0)
                if self._ale.game_over():
                    self._ale.reset_game()
        self._reset_game = True
        self._lives = self._ale.lives()
        self._grab(self._screens[0])
        self._screens[1] = self._screens[0]
        return transition(self._observe(), first=True)

    def step(self, action):
        reward = 0.0
        for _ in range(self.action_repeat):
            reward += self._ale.act(self._actions[action])
            over = self._ale.game_over()
            self._screens[1] = self._screens[0]
            self._grab(self._screens[0])
            if over:
                break
        lost = self._life_done and self._ale.lives() < self._lives
        self._lives = self._ale.lives()
        self._reset_game = not lost
        return transition(self._observe(), reward, last=over or lost, terminal=over or lost)

    def render(self):
        return self._ale.getScreenRGB()

    def _observe(self):
        return {"image": self._screens.max(0).reshape(self.obs_space["image"].shape)}
