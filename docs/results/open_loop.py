"""Draw what a checkpoint imagines, as a film strip: truth, model, error. It sees the green steps, imagines the red.

    python docs/results/open_loop.py LOGDIR --out open_loop.png [--context 10] [--steps 40] [--every 4] [--windows 2]

Windows are drawn from the evaluation episodes of the run, which it has not been trained on, or from its training
episodes with --data train_eps.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import tools  # noqa: E402
from config import Config, resolve_paths  # noqa: E402
from dreamer import Dreamer  # noqa: E402
from envs import make_env  # noqa: E402
from modalities.image import open_loop_video  # noqa: E402
from replay import Replay  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logdir", type=Path)
    parser.add_argument("--out", type=Path, default=Path("open_loop.png"))
    parser.add_argument("--context", type=int, default=10, help="steps that the model sees")
    parser.add_argument("--steps", type=int, default=40, help="steps in all")
    parser.add_argument("--every", type=int, default=4, help="show every so many steps")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--data", choices=["eval_eps", "train_eps"], default="eval_eps")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = resolve_paths(Config.read(args.logdir / "config.yaml").replace(logdir=str(args.logdir), device="cpu"))
    env = make_env(config, "eval", 0)
    agent = Dreamer(env.obs_space, env.act_space, config)
    env.close()
    agent.restore(tools.load_checkpoint(args.logdir / "latest.pt"), weights_only=True)
    latent = {"deter": config.dyn.deter, "stoch": config.dyn.stoch, "classes": config.dyn.discrete}
    replay = Replay.offline(
        args.logdir / args.data, env.obs_space, agent.action_size,
        capacity=100_000, length=args.steps, seed=args.seed, latent=latent,
    )  # fmt: skip
    batch = replay.sample(args.windows)
    tensors = agent.to_device({**batch, "context": batch.context})
    truth, predicted = agent.world_model.decoder.targets(tensors), agent.world_model.predict(tensors, args.context)
    film = open_loop_video(truth["image"].numpy(), predicted["image"].numpy(), args.context)
    frames = [np.concatenate(list(column[:: args.every]), 1) for column in np.split(film, args.windows, 2)]
    picture = Image.fromarray(np.concatenate(frames, 0))
    scale = max(1, round(128 / batch["image"].shape[-2]))
    picture.resize((scale * picture.width, scale * picture.height), Image.Resampling.NEAREST).save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
