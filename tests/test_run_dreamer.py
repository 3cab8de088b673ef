"""The second front door: what a JSON file's keys set, sweeps, environments of the user's own, checkpoints."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import config as configuration
import run_dreamer
from errors import UserError
from run_dreamer import expand, read, translate

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted((ROOT / "configs").glob("*.json"))
DEBUG = {"configs": ["debug"], "task": "gym_CartPole-v1", "device": "cpu", "steps": 150, "eval_every": 70}
DEBUG |= {"video_pred_log": False, "threads": 1}


def run(folder: Path, settings: dict, *flags: str, status: int = 0) -> subprocess.CompletedProcess:
    file = folder / "settings.json"
    file.write_text(json.dumps(settings))
    command = [sys.executable, str(ROOT / "run_dreamer.py"), "--config", str(file), *map(str, flags)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-2000:]
    return done


def rows(logdir: Path) -> list[dict]:
    return [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]


def test_keys_and_what_they_set():
    settings = {"batch_size": 3, "seq_len": 20, "world_lr": 1e-3, "actor_lr": 2e-3, "kl_scale": 2, "free_nats": 0.5}
    config = translate(
        settings | {"clip_ratio": 0.1, "use_wandb": True, "dyn.deter": 64, "horizon": 99} | {"logdir": "somewhere"}
    )
    assert (config.batch_size, config.batch_length, config.kl_free, config.ppo.clip) == (3, 20, 0.5, 0.1)
    assert (config.opt.lr, config.opt.actor_lr, config.opt.critic_lr) == (1e-3, 2e-3, 2e-3)
    assert (config.loss_scales.dyn, config.loss_scales.rep) == (2.0, 0.2)
    assert config.wandb and config.save_best and config.logdir == "somewhere"
    assert (config.dyn.deter, config.horizon) == (64, 99)
    for order in (1, -1):
        both = dict([("critic_lr", 4e-3), ("actor_lr", 2e-3)][::order])
        assert translate(both).opt.critic_lr == 4e-3
        exact = dict([("opt.critic_lr", 4e-3), ("actor_lr", 2e-3)][::order])
        assert translate(exact).opt.critic_lr == 4e-3
    assert translate({"kl_scale": 3, "loss_scales.dyn": 0.5}).loss_scales.dyn == 1.5
    assert translate({"obs_dim": None, "kl_scale": None}) == translate({})


def test_nested_and_dotted_keys_are_the_same(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"dyn": {"deter": 64, "hidden": 8}, "opt.lr": 1e-3}')
    assert read(str(file)) == {"dyn.deter": 64, "dyn.hidden": 8, "opt.lr": 1e-3}


@pytest.mark.parametrize("text", ["{", "[1]", "3", None], ids=["broken", "a list", "a number", "missing"])
def test_files_that_are_none(text, tmp_path):
    file = tmp_path / "a.json"
    if text:
        file.write_text(text)
    with pytest.raises(UserError, match="expected a JSON object") as error:
        read(str(file))
    assert "attribute" not in str(error.value)


def test_an_empty_sweep_is_told():
    with pytest.raises(UserError, match="seed is an empty list"):
        expand({"seed": []})


def test_a_misspelt_key_is_named():
    with pytest.raises(UserError, match="batch_sise"):
        translate({"batch_sise": 3})


def test_lists_are_sweeps_but_where_a_list_is_the_value():
    settings = {"seed": [0, 1], "opt.lr": [1e-3, 1e-4, 1e-5], "configs": ["debug"], "image_size": [16, 16]}
    trials = expand(settings)
    assert len(trials) == 6 and all(trial["configs"] == ["debug"] for trial in trials)
    assert {(trial["seed"], trial["opt.lr"]) for trial in trials} == {
        (s, r) for s in (0, 1) for r in (1e-3, 1e-4, 1e-5)
    }
    assert all(trial["image_size"] == [16, 16] for trial in trials)
    assert len(expand({"*.mults": [2, 3, 4, 4]})) == 1 and len(expand({"*.units": [16, 32]})) == 2
    assert [trial["image_size"] for trial in expand({"image_size": [[16, 16], [32, 32]]})] == [[16, 16], [32, 32]]


@pytest.mark.parametrize("file", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_are_valid(file):
    trials = expand(read(str(file)))
    for trial in trials:
        assert isinstance(translate(trial), configuration.Config)
        assert not {"obs_dim", "action_dim"} & trial.keys()
    assert len(trials) == (9 if file.stem == "experiment" else 1)


def test_the_default_is_the_whole_system():
    assert [path.stem for path in SHIPPED] == ["default", "experiment", "small_batch"]
    config = translate(read(str(ROOT / "configs" / "default.json")))
    assert config.task == "dmc_cartpole_swingup" and config.dmc.proprio and not config.dmc.image
    assert config.behavior == "hierarchical" and config.actor_objective == "ppo"
    assert "icm" in config.expl_streams and "empowerment" in config.expl_streams
    assert config.metagrad == "hypergradient"


def test_the_whole_system_trains_saves_and_resumes(tmp_path):
    """In debug size; `embed_dim` is the width of what each kind's encoder gives."""
    settings = json.loads((ROOT / "configs" / "default.json").read_text())
    settings["configs"] += ["debug"]
    settings |= {"task": "gym_CartPole-v1", "device": "cpu", "steps": 150, "eval_every": 70, "embed_dim": 20}
    settings |= {"batch_size": 4, "seq_len": 8, "imag_horizon": 8, "video_pred_log": False, "threads": 1}
    settings |= {"action_repeat": 1, "log_every": 40, "log_level": "debug"}
    run(tmp_path, settings)
    logdir = tmp_path / "checkpoints"
    latest, best = (torch.load(logdir / name, weights_only=True) for name in ("latest.pt", "best_model.pt"))
    assert {"config", "counters", "world_model", "behavior", "optimizer"} <= latest.keys()
    assert any(value.shape[-1] == 20 for key, value in latest["world_model"].items() if "encoder" in key)
    evals = {row["step"]: row["eval/return"] for row in rows(logdir) if "eval/return" in row}
    assert best["counters"]["best"] == max(evals.values()) == latest["counters"]["best"]
    logged = set().union(*rows(logdir))
    assert {"episode/return", "episode/length", "world/recon_loss", "world/kl_loss", "policy/policy_loss"} <= logged
    assert {"intrinsic/icm_loss", "intrinsic/empowerment", "meta/lr", "meta/lr_actor"} <= logged
    before = (logdir / "latest.pt").read_bytes()
    done = run(tmp_path, settings, "--checkpoint", "checkpoints/best_model.pt", status=1)
    assert "raise --steps" in done.stderr and (logdir / "latest.pt").read_bytes() == before
    done = run(tmp_path, settings, "--checkpoint", "checkpoints/best_model.pt", "--steps", 200)
    assert f"update {best['counters']['updates']}" in done.stdout + done.stderr
    text = (logdir / "log.txt").read_text()
    assert "Saved " in text and re.search(r"At update \d+: .*intrinsic/empowerment", text)
    again = torch.load(logdir / "latest.pt", weights_only=True)
    assert again["counters"]["frames"] >= 200
    # Updates for the new frames alone: those that an older checkpoint lacks are not caught up on.
    per_frame = 8 / 32
    assert again["counters"]["updates"] - best["counters"]["updates"] <= per_frame * (200 - 140) + 3


def flags_to_config(*flags: str, file: Path = ROOT / "configs" / "default.json") -> configuration.Config:
    """What `main` trains."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_dreamer, "train", lambda settings: found.append(translate(settings)))
        assert run_dreamer.main(["--config", str(file), *flags]) == 0
    return found[0]


def test_what_is_for_dm_control_does_not_reach_other_tasks(tmp_path):
    """Each of them would see every second step alone."""
    assert flags_to_config().action_repeat == 2 == flags_to_config("--env", "dmc_cheetah_run").action_repeat
    assert flags_to_config("--env", "gym_CartPole-v1").action_repeat == 1
    config = flags_to_config("--multimodal", "--steps", "5e4")
    block = configuration.load(["--configs", "multimodal"])
    assert (config.task, config.action_repeat, config.steps) == ("cue_all", 1, 50_000)
    for key in ("batch_length", "train_ratio", "modality_dropout", "text"):
        assert config[key] == block[key], key
    assert config.behavior == "hierarchical" and config.metagrad == "hypergradient"
    for blocks, repeat in ((["atari100k"], 4), (["dmc_proprio"], 1)):
        file = tmp_path / "a.json"
        file.write_text(json.dumps({"configs": blocks}))
        assert flags_to_config("--env", "atari_breakout", file=file).action_repeat == repeat
    config = flags_to_config("--multimodal", "--env", "sound_room")
    assert config.task == "sound_room" and config.modality_dropout == block.modality_dropout


def test_multimodal_joins_every_combination_of_blocks(tmp_path, monkeypatch):
    file, found = tmp_path / "a.json", []
    file.write_text(json.dumps({"configs": [["cpu"], ["debug"]]}))
    monkeypatch.setattr(run_dreamer, "run_all", lambda trials, *_: found.extend(trials) or 0)
    assert run_dreamer.main(["--config", str(file), "--multimodal"]) == 0
    assert [trial["configs"] for trial in found] == [["cpu", "multimodal"], ["debug", "multimodal"]]


def test_flags_win_over_the_checkpoint_that_is_evaluated():
    config = translate({"mode": "eval", "task": "gym_Acrobot-v1", "seq_len": 12})
    assert config.given()["task"] == "gym_Acrobot-v1" and config.given()["batch_length"] == 12


@pytest.mark.parametrize(
    ("settings", "flags", "message"),
    [
        ({"kl_scale": "2"}, (), "kl_scale is '2', expected a number"),
        ({"kl_scale": True}, (), "kl_scale is True, expected a number"),
        ({"env": "grid_halls"}, (), "env is no key of the file, but a flag: --env, or the key task"),
        ({"kl_scale": [1, 2], "kl_scal": 3}, (), "did you mean kl_scale"),
        ({"opt.lr": [1e-4, -1]}, (), "opt.lr"),
        ({"configs": "debug"}, (), "configs is 'debug', expected a list of blocks"),
        ({"configs": [3]}, (), "expected names of blocks"),
        ({"kl_scale": 1.5, "loss_scales.dyn": "much"}, (), "settings: loss_scales.dyn"),
        ({"batch_sise": 2}, (), "Error: settings: unknown key batch_sise; did you mean batch_size"),
        ({"kl_scal": 2}, (), "did you mean kl_scale"),
        ({"sed_len": 2}, (), "did you mean seq_len"),
        ({}, ("--env", "custom"), "create_custom_env.*not given"),
        ({}, ("--env", "custom", "--env_file", "empty.py"), "create_custom_env.*empty.py"),
        ({}, ("--env_file", "broken.py"), "broken.py: ModuleNotFoundError"),
        ({}, ("--checkpoint", "nowhere/x.pt"), "nowhere/x.pt does not exist"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(settings, flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "broken.py").write_text("import no_such_package\n")
    (tmp_path / "a.json").write_text(json.dumps(settings))
    assert run_dreamer.main(["--config", "a.json", *flags]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Error: ") and re.search(message, line)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "broken.py", "empty.py"]


def test_no_trials_at_a_time(capsys):
    with pytest.raises(SystemExit):
        run_dreamer.main(["--parallel_trials", "0"])
    assert "expected at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(("key", "found"), [("obs_dim", 4), ("action_dim", 2)])
def test_sizes_that_the_environment_does_not_have(key, found, tmp_path):
    done = run(tmp_path, DEBUG | {key: 7}, status=1)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error")]
    assert f"{key} is 7" in line and f"has {found}" in line


def test_a_sweep_ends_in_a_table(tmp_path):
    done = run(tmp_path, DEBUG | {"world_lr": [1e-4, 1e-3], "obs_dim": [4, 7]}, "--parallel_trials", 2, status=1)
    *begun, head, _, _, _, _ = lines = done.stdout.strip().splitlines()
    assert len(begun) == 4 and all(re.match(r"trial00\d of 4 begins \(.*world_lr.*output.txt$", line) for line in begun)
    assert set(head.split()[:3]) == {"trial", "world_lr", "obs_dim"}
    table = lines[-4:]
    for number, line in enumerate(table):
        logdir = tmp_path / "checkpoints" / f"trial{number:03}"
        trial = json.loads((logdir / "settings.json").read_text())
        assert str(trial["world_lr"]) in line
        if trial["obs_dim"] == 4:
            best = max(row["eval/return"] for row in rows(logdir) if "eval/return" in row)
            assert f"{best:.4g}" in re.split(r"\s{2,}", line)
        else:
            assert "failed: Error: obs_dim is 7" in line and "output.txt" in line


def test_a_sweep_that_is_stopped_ends_what_runs_and_starts_no_more(tmp_path):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(DEBUG | {"steps": 100_000, "eval_every": 0, "seed": [0, 1]}))
    command = [sys.executable, str(ROOT / "run_dreamer.py"), "--config", str(file)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    first, end = tmp_path / "checkpoints" / "trial000", time.time() + 200
    while not any(first.glob("train_eps/*.npz")):
        assert process.poll() is None and time.time() < end
        time.sleep(0.05)
    process.terminate()
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 1, output
    assert (first / "latest.pt").exists() and "Stopped at frame" in (first / "output.txt").read_text()
    assert output.strip().endswith("not run") and not (tmp_path / "checkpoints" / "trial001").exists()


def test_the_trials_of_a_sweep_that_is_killed_save_and_end(tmp_path):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(DEBUG | {"steps": 100_000, "eval_every": 0, "seed": [0, 1]}))
    command = [sys.executable, str(ROOT / "run_dreamer.py"), "--config", str(file)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    trial, end = tmp_path / "checkpoints" / "trial000", time.time() + 200
    while not any(trial.glob("train_eps/*.npz")):
        assert process.poll() is None and time.time() < end
        time.sleep(0.05)
    process.kill()
    process.wait()
    while "Stopped at frame" not in (trial / "output.txt").read_text():
        assert time.time() < end
        time.sleep(0.05)
    assert (trial / "latest.pt").exists()


def test_an_environment_of_ones_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import gymnasium\n\ndef create_custom_env():\n    return gymnasium.make('CartPole-v1')\n")
    # In processes of their own, which have to be told what the file defines.
    run(tmp_path, DEBUG | {"parallel": "process"}, "--env", "custom", "--env_file", file, "--logdir", "own")
    assert any("eval/return" in row for row in rows(tmp_path / "own"))
    file.write_text(
        "import gymnasium\nfrom envs import register_env\nregister_env('pole', lambda: gymnasium.make('CartPole-v1'))\n"
    )
    run(tmp_path, DEBUG, "--env", "pole", "--env_file", file, "--logdir", "named", "--log-level", "WARNING")
    assert any("eval/return" in row for row in rows(tmp_path / "named"))


def test_running_out_of_memory_names_the_small_file(monkeypatch, capsys):
    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(run_dreamer, "train", fails)
    assert run_dreamer.main(["--config", str(ROOT / "configs" / "small_batch.json")]) == 1
    assert "configs/small_batch.json" in capsys.readouterr().err


def test_names_are_those_of_the_parts():
    from dreamer import Trainer
    from models import WorldModel
    from replay import Replay

    assert run_dreamer.DreamerV3Trainer is Trainer
    assert run_dreamer.SequenceReplayBuffer is Replay and run_dreamer.MultimodalWorldModel is WorldModel
