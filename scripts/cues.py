"""What an agent gets out of each kind of observation: the table of docs/results/README.md, from the world of cues.

    python scripts/cues.py --out cues.jsonl [--jobs 2] [--only NAME ...] [configuration keys]

A run (`--configs cues`, five minutes on a core) trains where the cue is in some kinds only, and is then judged in 200
episodes: with all kinds, and with some of them never there. Chance is 0.25. Where sound and image tell the same, the
model hears the cue, sees nothing, and predicts the image that comes after: is it of the right colour?
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import config as configuration  # noqa: E402
from dreamer import Dreamer, load_run, make_envs, play  # noqa: E402
from envs.cues import COLOURS, GREY, KINDS, PITCHES, RATE  # noqa: E402
from fusion import FUSIONS  # noqa: E402

EPISODES = 200


def runs() -> dict[str, list[str]]:
    """{name: arguments of dreamer.py}."""
    found = {}
    for fusion in FUSIONS:
        found[f"all, {fusion}"] = ["--task", "cue_all", "--encoder.fusion", fusion]
    for kind in KINDS:
        others = [other for other in KINDS if other != kind]
        found[f"{kind}, all kinds"] = ["--task", f"cue_{kind}"]
        found[f"{kind}, alone"] = ["--task", f"cue_{kind}", "--modalities", kind, "--modality_dropout", "0"]
        found[f"{kind}, without it"] = ["--task", f"cue_{kind}", "--modalities", *others]
    for fusion in ("attention", "poe"):
        found[f"audio, all kinds, {fusion}"] = ["--task", "cue_audio", "--encoder.fusion", fusion]
    return found


def judge(logdir: Path) -> dict[str, float]:
    """Shares of episodes won, with all kinds and without some, and of images of the right colour."""
    state = load_run(logdir / "latest.pt")
    config = configuration.load(["--configs", "cues"]).replace(**state["config"] | {"device": "cpu"})
    absences = {"success": ()}
    if config.task == "cue_all":
        absences |= {f"success without {kind}": (kind,) for kind in KINDS}
        absences |= {f"success with {kind} alone": tuple(k for k in KINDS if k != kind) for kind in KINDS}
        absences["success without any"] = KINDS
    out, agent = {}, None
    for name, absent in absences.items():
        envs = make_envs(config.replace(cue={**config.cue, "absent": list(absent)}), "eval", config.eval_envs)
        try:
            if agent is None:
                agent = Dreamer(envs.obs_space, envs.act_space, config, "cpu")
                agent.restore(state, weights_only=True)
            generator, steps = torch.Generator().manual_seed(1), []
            returns, *_ = play(
                agent, envs, EPISODES, False, generator, on_step=lambda *step, kept=steps: kept.append(step)
            )
        finally:
            envs.close()
        out[name] = float(np.mean(returns))
        if name == "success with audio alone":
            out["image from audio"] = painted(agent, steps, config.cue["delay"] + 2)
    return out


def painted(agent: Dreamer, steps: list[tuple[dict, np.ndarray]], length: int) -> float:
    """Share of episodes in which the image that reveals the cue, predicted from the first step on, has its colour."""
    right = []
    for first in range(0, len(steps) - length, length):
        window = steps[first : first + length]
        batch = {
            key: np.stack([obs[key] for obs, _ in window], 1) for key in window[0][0] if not key.startswith("log_")
        }
        batch["action"] = np.stack([action for _, action in window], 1)
        assert batch["is_first"][:, 0].all() and batch["is_last"][:, -1].all()
        spectrum = np.abs(np.fft.rfft(batch["audio"][:, 0, 0]))
        pitch = spectrum.argmax(-1, keepdims=True) * RATE / batch["audio"].shape[-1]
        told = np.abs(np.array(PITCHES) - pitch).argmin(-1)
        none = np.zeros((len(told), agent.world_model.rssm.deter), np.float16)
        stoch = np.zeros((len(told), *agent.latents(agent.initial(len(told)))[1].shape[1:]), np.uint8)
        batch["context"] = {
            "deter": none,
            "stoch": stoch,
            "action": batch["action"][:, 0],
            "valid": np.zeros(len(told), bool),
        }
        with torch.no_grad():
            image = agent.world_model.predict(agent.to_device(batch), 1)["image"][:, -1].numpy()
        tint = (255 * image - GREY).mean((1, 2))
        shades = COLOURS - GREY
        shades /= np.linalg.norm(shades, axis=-1, keepdims=True)
        right.append((tint @ shades.T).argmax(-1) == told)
    return float(np.mean(right))


def run(name: str, keys: Sequence[str], folder: Path, more: Sequence[str]) -> dict:
    """Trains and judges one; a finished run is not trained again."""
    logdir = folder / name.replace(", ", "-").replace(" ", "_")
    command = [sys.executable, str(ROOT / "dreamer.py"), "--configs", "cues", *keys, *more, "--logdir", str(logdir)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr.strip()[-2000:]}")
    curve = [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]
    curve = [(line["step"], line["eval/return"]) for line in curve if "eval/return" in line]
    return {"run": name, "keys": " ".join([*keys, *more]), "evaluations": curve, **judge(logdir)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=Path("cues.jsonl"), help="a line per run")
    parser.add_argument("--folder", type=Path, default=Path("logdir/cues"), help="of the runs' logdirs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a core each")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=runs(), help="some of: " + "; ".join(runs()))
    args, more = parser.parse_known_args(argv)
    chosen = {name: keys for name, keys in runs().items() if not args.only or name in args.only}
    torch.set_num_threads(1)
    with ThreadPoolExecutor(args.jobs) as pool, args.out.open("a") as out:
        for found in pool.map(lambda item: run(*item, args.folder, more), chosen.items()):
            print(found, flush=True)
            out.write(json.dumps(found) + "\n")
            out.flush()


if __name__ == "__main__":
    main()
