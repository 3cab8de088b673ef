"""The scripts of docs/results that make pictures of runs, on runs of seconds."""

import csv
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import config as configuration
import dreamer
import tools

RESULTS = Path(configuration.__file__).parent / "docs/results"


def script(name: str):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(f"results_{name}", RESULTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, *argv) -> None:
    module = script(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, argv)])
        module.main()


def test_open_loop_shows_the_recorded_frames(tmp_path):
    flags = (
        "--configs cues debug --steps 200 --eval_every 100 --eval_episode_num 8 --tensorboard false --batch_length 4"
    )
    dreamer.main(configuration.load([*flags.split(), "--logdir", str(tmp_path)]))
    out = tmp_path / "open_loop.png"
    run("open_loop", tmp_path, "--out", out, "--context", 1, "--steps", 3, "--every", 1, "--windows", 2)
    picture, (size, edge, scale) = np.asarray(Image.open(out)), (16, 2, 8)
    cell = (size + 2 * edge) * scale
    assert picture.shape == (2 * 3 * cell, 3 * cell, 3)  # windows of truth, model, error; three steps
    recorded = np.concatenate([np.load(path)["image"] for path in (tmp_path / "eval_eps").glob("**/*.npz")])
    for window in range(2):
        for step in range(3):
            top, left = window * 3 * cell, step * cell
            frame = picture[top : top + cell, left : left + cell][::scale, ::scale][edge:-edge, edge:-edge]
            assert (recorded == frame).all((1, 2, 3)).any()


def test_a_strip_has_the_frames_that_were_asked_for(tmp_path):
    levels = 10 * np.arange(20, dtype=np.uint8)
    tools.save_mp4(tmp_path / "film.mp4", np.tile(levels[:, None, None, None], (1, 64, 64, 3)), fps=30)
    run(
        "film",
        tmp_path / "film.mp4",
        "--out",
        tmp_path / "a.png",
        "--from",
        3,
        "--frames",
        4,
        "--every",
        5,
        "--height",
        32,
    )
    strip = np.asarray(Image.open(tmp_path / "a.png")).astype(int)
    assert strip.shape == (32, 4 * 32, 3)
    assert np.abs(strip[16, 16::32] - np.array([30, 80, 130, 180])[:, None]).max() < 8  # films lose a little
    run("film", tmp_path / "film.mp4", "--out", tmp_path / "a.gif", "--frames", 6, "--every", 2)
    assert Image.open(tmp_path / "a.gif").n_frames == 6
    with pytest.raises(SystemExit, match="has 20 frames; .* ask for 22"):
        run("film", tmp_path / "film.mp4", "--out", tmp_path / "a.png", "--frames", 8, "--every", 3)


def test_published_curves_say_which_agent_made_them():
    with (RESULTS / "paper.csv").open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    agents = {
        suite: {row["agent"] for row in rows if row["suite"] == suite} for suite in {row["suite"] for row in rows}
    }
    assert agents == {"dmc_proprio": {"2023"}, "dmc_vision": {"2024"}, "atari100k": {"2024"}}
    pytest.importorskip("matplotlib", reason="matplotlib draws the curves (requirements/docs.txt)")
    plot = script("plot")
    curve = plot.read_paper("dmc_vision", "dmc_finger_spin")
    assert curve[1]["agent"] == "2024" and (curve[1]["env_steps"], round(curve[1]["mean"])) == (40_000, 349)
    with pytest.raises(SystemExit, match="No curve of dmc_nothing"):
        plot.read_paper("dmc_vision", "dmc_nothing")


def test_a_curve_tells_what_it_was_trained_with(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib draws the curves (requirements/docs.txt)")
    plot = script("plot")
    assert plot.settings(tmp_path) == ""
    configuration.load(["--configs", "dmc_proprio_2024", "--envs", "3", "--seed", "7"]).save(tmp_path / "config.yaml")
    assert plot.settings(tmp_path) == (
        "deter 2048, 256 units, ratio 512, windows 16 x 64, action repeat 2, 3 environments, seed 7"
    )
