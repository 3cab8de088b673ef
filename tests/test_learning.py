"""The learning benchmark: statistics by hand, the grid, files, the reference's flags, and runs that stop and resume."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.append(str(FOLDER))  # behind the project, whose `replay.py` is another

import curves  # noqa: E402
import learning  # noqa: E402
import reference  # noqa: E402
import running  # noqa: E402
import statistics_of_runs as runs  # noqa: E402
from curves import Curve  # noqa: E402

import config as configuration  # noqa: E402
from errors import UserError  # noqa: E402

FAKE = """
import json, signal, sys, time
from pathlib import Path
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder, steps, seed = Path(flags["--logdir"]), int(flags["--steps"]), int(flags["--seed"])
stop = []
signal.signal(signal.SIGINT, lambda *_: stop.append(1))
state = folder / "state"
at = int(state.read_text()) if state.exists() else 0
print(f"begins at {at}", flush=True)
if flags["--opt.lr"] == "0.5" and seed == 1:
    sys.exit("the fake is broken")
while at < steps and not stop:
    at += 10
    with (folder / "metrics.jsonl").open("a") as file:
        row = {"step": at, "episode/return": at * float(flags["--opt.lr"]), "train/updates": at}
        file.write(json.dumps(row) + "\\n")
    time.sleep(0.2 if flags["--opt.lr"] == "0.25" else 0)
state.write_text(str(at))
print(f"{'Stopped' if stop else 'Finished'} at frame {at}")
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(running, "POLL", 0.01)
    monkeypatch.setattr(curves, "drawable", lambda: False)
    monkeypatch.setattr(learning, "drawable", lambda: False)


@pytest.fixture
def fake(tmp_path, monkeypatch) -> list[str]:
    """A program that takes dreamer.py's place: its returns are the frames times opt.lr; 0.5 fails for seed 1, and 0.25
    takes its time.
    """
    path = tmp_path / "fake.py"
    path.write_text(FAKE)
    monkeypatch.setattr(learning, "DREAMER", [sys.executable, str(path)])
    return learning.DREAMER


def flags(out: Path, *more: str, arms=("one=--opt.lr 1.0", "two=--opt.lr 2.0")) -> list[str]:
    words = ["--out", str(out), "--tasks", "dmc_finger_spin", "--seeds", "0", "1", "--steps", "200", "--jobs", "2"]
    return [*words, *(word for arm in arms for word in ("--arm", arm)), *more]


def records(out: Path) -> dict[str, dict]:
    return {str(path.relative_to(out)): record for path, record in running.records(out).items()}


# Statistics


def test_interquartile_mean():
    assert runs.iqm(np.array([100.0, 2, 3, -50])) == 2.5  # one of four is left out at either end
    assert runs.iqm(np.array([1.0, 2, 6])) == 3  # of three, none
    assert runs.iqm(np.arange(16.0).reshape(8, 2)).tolist() == [7, 8]


def test_interval_of_seeds():
    assert runs.interval([5.0]) is None
    assert runs.interval([3.0, 3, 3]) == (3, 3)
    low, high = runs.interval(np.random.default_rng(0).normal(10, 1, 400))
    assert 9.7 < low < 10 < high < 10.3
    low, high = runs.interval(np.stack([np.zeros(7), np.ones(7)]))
    assert low.shape == high.shape == (7,) and (low == 0).all() and (high == 1).all()


def test_probability_that_one_beats_the_other():
    assert runs.beats([([3, 4], [1, 2])]) == (1, (1, 1))
    assert runs.beats([([1, 2, 3], [2])]) == (0.5, None)  # one lower, one equal, one higher; a single seed
    value, (low, high) = runs.beats([([1, 4], [2, 3]), ([5, 6], [1, 2, 3])])
    assert value == 0.75 and low == 0.5 and high == 1  # the second task's is 1 in every resample


def test_pooled_over_tasks():
    value, (low, high) = runs.pooled_iqm([[0.0, 0], [1, 1]])
    assert value == low == high == 0.5  # seeds are drawn within a task
    assert runs.pooled_iqm([[0.0], [1, 1]])[1] is None


def test_permutation_of_separated_sets():
    assert runs.permutation_p([([6, 7, 8, 9, 10], [1, 2, 3, 4, 5])]) == pytest.approx(2 / 252)
    assert runs.permutation_p([([1, 2], [3, 4]), ([1, 2], [3, 4])]) == pytest.approx(2 / 36)
    assert runs.permutation_p([([1.0], [3, 4])]) is None
    assert runs.permutation_p([([1, 1], [1, 1])]) == 1
    assert runs.permutation_p([(np.arange(12) + 100, np.arange(12))]) < 1e-3  # 2.7 million ways: sampled


def test_permutation_agrees_with_scipy():
    rng = np.random.default_rng(1)
    x, y = rng.normal(0, 1, 5), rng.normal(0.7, 1, 4)
    theirs = stats.permutation_test((x, y), lambda a, b, axis: a.mean(axis) - b.mean(axis), vectorized=True)
    assert runs.permutation_p([(x, y)]) == pytest.approx(theirs.pvalue)


# The grid


def test_grid_means_and_interpolates():
    points = [(10, 1.0), (20, 3.0), (90, 10.0), (100, 20.0), (150, 7.0)]
    values = curves.on_grid(points, 100, 4)  # bins to 25, 50, 75, 100
    slope = (10 - 3) / 70
    np.testing.assert_allclose(values, [2, 3 + slope * 17.5, 3 + slope * 42.5, 15])
    np.testing.assert_allclose(curves.on_grid([(25, 1.0), (26, 3.0)], 100, 4), [1, 3, 3, 3])  # upper edges are inside
    np.testing.assert_allclose(curves.on_grid([(60, 4.0), (60, 6.0)], 100, 4), [5, 5, 5, 5])


@pytest.mark.parametrize("every", [1, 10, 500])
def test_area_under_a_straight_line(every):
    points = [(frames, 0.3 * frames) for frames in range(0, 1001, every)]
    assert curves.area(curves.on_grid(points, 1000, 20)) == pytest.approx(150, rel=0.04)


def test_tail_and_threshold():
    values = np.array([1.0, 5, 3, 9])
    assert curves.tail(values) == 9 and curves.tail(np.arange(20.0)) == 18.5
    assert curves.first_frame(values, 400, 4) == 200 and curves.first_frame(values, 400, 10) == np.inf


# Files


def test_csv_round_trip(tmp_path):
    points = {"return": [(10, 1.5), (10, 2.0), (20, 3.0)], "hours": [(20, 0.25)]}
    made = [Curve("dmc_a", "one", 0, points), Curve("dmc_b", "two, three", 1, {"eval_return": [(5, -1.0)]})]
    curves.write_csv(tmp_path / "curves.csv", made)
    assert curves.read_csv(tmp_path / "curves.csv") == made
    assert made[0].reached == 20 and made[0].last("return") == 3 and made[1].last("return") is None


def test_csv_without_task(tmp_path):
    path = tmp_path / "recorded.csv"
    path.write_text("arm,seed,frames,name,value\na,0,4002,return,0.0\na,0,4002,return,4.0\na,0,3000,entropy,1e-1\n")
    curve = Curve("dmc_finger_spin", "a", 0, {"return": [(4002, 0), (4002, 4)], "entropy": [(3000, 0.1)]})
    assert curves.recorded_curves([f"dmc_finger_spin={path}"]) == [curve]
    with pytest.raises(UserError, match="no column task: name it"):
        curves.recorded_curves([str(path)])
    path.write_text("arm,seed,frames,value\n")
    with pytest.raises(UserError, match="no column name"):
        curves.recorded_curves([f"dmc_finger_spin={path}"])
    path.write_text("arm,seed,frames,name,value\na,0,1,return,nan\na,0,1,return,good\n")
    with pytest.raises(UserError, match="row 3: could not convert"):
        curves.recorded_curves([f"dmc_finger_spin={path}"])


def test_read_runs(tmp_path):
    lines = [{"step": 10, "episode/return": 1, "train/updates": 0}, {"step": 20, "episode/return": None}]
    lines += [{"step": 20, "eval/return": 5.5}, {"step": 30, "episode/return": 3, "train/updates": 8}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 4')  # torn
    found = curves.read_run(tmp_path)
    assert found == {"return": [(10, 1), (30, 3)], "updates": [(10, 0), (30, 8)], "eval_return": [(20, 5.5)]}


def test_read_runs_of_the_reference(tmp_path):
    steps = [2000, 2002, 4000, 4002, 2004, 4008]  # it died after frame 4002, and went on from a checkpoint at 2002
    lines = [json.dumps({"step": step, "episode/score": float(step), "episode/length": 501}) for step in steps]
    (tmp_path / "scores.jsonl").write_text("\n".join(lines))
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 3000, "train/opt/updates": 7.0, "train/loss": 1.0}))
    found = curves.read_run(tmp_path, reference=True)
    assert found["updates"] == [(3000, 7)]
    assert found["return"] == [(step, step) for step in (2000, 2002, 2004, 4008)]


# The reference


PROPRIO = "--configs dmc_proprio size1m --action_repeat 2 --task dmc_finger_spin".split()
PROPRIO += "--batch_size 8 --batch_length 32 --envs 4 --prefill 384".split()


def test_flags_of_the_reference():
    keys = "--seed 3 --steps 24001 --train_ratio 128 --opt.lr 1.6e-4 --imag_last 4 --imag_horizon 12".split()
    config = configuration.load([*PROPRIO, *keys])
    expected = """
        --task dmc_finger_spin --seed 3 --batch_size 8 --batch_length 32 --replay.size 1000000 --run.envs 4
        --run.train_ratio 128 --env.dmc.repeat 2 --agent.imag_length 12 --agent.imag_last 4 --agent.horizon 333
        --agent.contdisc True --agent.imag_loss.lam 0.95 --agent.repl_loss.lam 0.95
        --agent.retnorm.rate 0.01 --agent.retnorm.limit 1.0
        --agent.loss_scales.rec 1.0 --agent.loss_scales.rew 1.0 --agent.loss_scales.con 1.0 --agent.loss_scales.dyn 1.0
        --agent.loss_scales.rep 0.1 --agent.loss_scales.policy 1.0 --agent.loss_scales.value 1.0
        --agent.loss_scales.repval 0.3
        --agent.dyn.rssm.free_nats 1.0 --agent.dyn.rssm.deter 512 --agent.dyn.rssm.hidden 64 --agent.dyn.rssm.stoch 32
        --agent.dyn.rssm.blocks 8 --agent.dyn.rssm.act silu --agent.dyn.rssm.classes 4 --agent.dyn.rssm.dynlayers 1
        --agent.dyn.rssm.obslayers 1 --agent.dyn.rssm.imglayers 2 --agent.dyn.rssm.unimix 0.01
        --agent.enc.simple.units 64 --agent.enc.simple.layers 3 --agent.enc.simple.symlog True
        --agent.enc.simple.act silu --agent.dec.simple.units 64 --agent.dec.simple.layers 3
        --agent.dec.simple.outscale 1.0 --agent.dec.simple.act silu
        --agent.rewhead.units 64 --agent.rewhead.layers 1 --agent.rewhead.bins 255 --agent.rewhead.outscale 0.0
        --agent.rewhead.act silu --agent.conhead.units 64 --agent.conhead.layers 1 --agent.conhead.outscale 1.0
        --agent.conhead.act silu --agent.policy.units 64 --agent.policy.layers 3 --agent.policy.outscale 0.01
        --agent.policy.act silu --agent.policy.minstd 0.1 --agent.policy.maxstd 1.0 --agent.imag_loss.actent 0.0003
        --agent.value.units 64 --agent.value.layers 3 --agent.value.bins 255 --agent.value.outscale 0.0
        --agent.value.act silu --agent.imag_loss.slowreg 1.0 --agent.repl_loss.slowreg 1.0
        --agent.imag_loss.slowtar False --agent.repl_loss.slowtar False --agent.slowvalue.every 1
        --agent.slowvalue.rate 0.02 --agent.opt.lr 0.00016 --agent.opt.agc 0.3 --agent.opt.eps 1e-20
        --agent.opt.beta1 0.9 --agent.opt.beta2 0.999 --agent.opt.warmup 1000
        --agent.retnorm.perclo 5.0 --agent.retnorm.perchi 95.0
        --run.steps 12001 --report_length 16 --jax.compute_dtype float32 --logdir /runs/0
        --jax.platform cpu --jax.prealloc False --agent.report False --run.debug True --run.log_every 60
        --run.report_every 1000000000 --run.save_every 900 --logger.outputs jsonl
        --env.dmc.image False --env.dmc.proprio True
    """
    assert reference.translate(config, Path("/runs/0")) == expected.split()


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ("--prefill 1280", "prefill is 1280; the reference begins to learn after .* = 384 .*give --prefill 384"),
        ("--opt.actor_lr 1e-4", "opt.actor_lr is 0.0001; the reference has only what null stands for"),
        ("--opt.name adam", "opt.name is adam; the reference has only what laprop"),
        ("--dyn.cell gru", "dyn.cell is gru"),
        ("--expl_behavior icm", "expl_behavior is icm; the reference has only what greedy"),
        ("--pretrain 5", "pretrain is 5"),
        ("--dmc.image true", "dmc.image is true; .*use dmc_proprio"),
        ("--task gym_CartPole-v1", "task is gym_CartPole-v1; .*name a dmc_ task"),
        ("--time_limit 100", "time_limit is 100"),
        ("--precision float16", "precision is float16"),
        ("--device cuda", "device is cuda"),
        ("--dyn.discrete 0", "dyn.discrete is 0"),
        ("--loss_scales.rec 2 --modality_scales.vector 2", "modality_scales.vector is 2"),
    ],
)
def test_what_the_reference_cannot_do_is_refused(keys, told):
    with pytest.raises(UserError, match=told) as error:
        reference.translate(configuration.load([*PROPRIO, *keys.split()]), Path("/runs/0"))
    assert "\n" not in str(error.value)


def test_every_setting_is_translated_fixed_or_without_effect():
    defaults = configuration.load([]).flat()
    assert {*reference.KEYS, *reference.SCALED, *reference.OTHERWISE} <= defaults.keys()
    for pattern in reference.WITHOUT_EFFECT:
        assert any(reference.fnmatch.fnmatchcase(key, pattern) for key in defaults) or pattern == "*.rounding", pattern


def test_reference_needs_a_checkout(tmp_path, monkeypatch):
    arm = ["--reference", f"jax={' '.join(PROPRIO).replace('--task dmc_finger_spin ', '')}"]
    words = ["--out", str(tmp_path / "out"), "--tasks", "dmc_finger_spin", "--steps", "200", *arm]
    monkeypatch.delenv("PEERS", raising=False)
    with pytest.raises(UserError, match="PEERS is not set; set it to a folder with a checkout of danijar/dreamerv3"):
        learning.main(words)
    (tmp_path / "dreamerv3").mkdir()
    monkeypatch.setenv("PEERS", str(tmp_path))
    with pytest.raises(UserError, match="venv/bin/python does not exist"):
        learning.main(words)
    args = learning.parse([*words, "--reference-python", sys.executable])
    (run,) = learning.plan(args)
    assert run.command[:2] == [sys.executable, str(FOLDER / "reference.py")] and run.variables["PEERS"] == str(tmp_path)
    assert run.command[2:] == run.settings and "--agent.opt.lr" in run.settings


STANDINS = {  # for what the reference needs, as far as the driver touches it
    "dm_control/__init__.py": "",
    "embodied/__init__.py": "",
    "embodied/envs/__init__.py": "",
    "embodied/envs/dmc.py": """
from dm_control import manipulation
from dm_control.locomotion.examples import basic_rodent_2020
class Inner:
    obs_space = {"position": 3}
    def step(self, action): return "undrawn"
class DMC:
    def __init__(self): self._env = Inner()
    obs_space = {"image": 1}
    def step(self, action): raise RuntimeError("no renderer")
""",
    "embodied/jax/__init__.py": "",
    "embodied/jax/agent.py": """
class Options:
    def __init__(self, lr): self.lr, self.profiler = lr, True
""",
    "embodied/jax/internal.py": """
import os
def setup(platform): os.environ["XLA_FLAGS"] = f"--for={platform}"
""",
    "dreamerv3/__init__.py": "",
    "dreamerv3/main.py": """
import json, os
from embodied.envs import dmc
from embodied.jax import agent, internal
def main(argv):
    env, options = dmc.DMC(), agent.Options(3)
    internal.setup(platform="cpu")
    print(json.dumps([argv, env.step(0), env.obs_space, options.lr, options.profiler, os.environ["XLA_FLAGS"]]))
""",
}


def test_driver_of_the_reference(tmp_path):
    for name, text in STANDINS.items():
        path = tmp_path / "dreamerv3" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    command = [sys.executable, str(FOLDER / "reference.py"), "--task", "dmc_finger_spin"]
    environment = {**os.environ, "PEERS": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    xla = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    assert json.loads(done.stdout) == [command[2:], "undrawn", {"position": 3}, 3, False, xla]
    done = subprocess.run(command, env=environment | {"PEERS": ""}, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("Error: PEERS is not set") and done.stderr.count("\n") == 1


# Runs


def test_runs_once_and_reports(tmp_path, fake, capsys):
    out = tmp_path / "out"
    result = learning.main(flags(out, "--threshold", "dmc_finger_spin=150", "--grid", "10"))
    told = capsys.readouterr().out
    assert result["status"] == 0 and json.loads(told.splitlines()[-1])["bench"] == "learning"
    assert {name: record["status"] for name, record in records(out).items()} == dict.fromkeys(records(out), "finished")
    begun = [line.split(" begins")[0] for line in told.splitlines() if " begins" in line]
    assert begun == [f"{arm} dmc_finger_spin seed {seed}" for seed in (0, 1) for arm in ("one", "two")]
    arms = result["tasks"]["dmc_finger_spin"]["arms"]
    assert arms["one"]["seeds"] == 2 and arms["one"]["last"] == [195, 195] and arms["two"]["iqm"] == 390
    assert arms["one"]["area"] == 105 and arms["two"]["first_frame"] == 80 and arms["one"]["first_frame"] == 160
    (pair,) = result["pairs"]
    assert pair["beats"] == 0 and pair["area_difference"] == -105 and pair["p"] == pytest.approx(1 / 3)
    assert arms["one"]["hours"] > 0 and arms["one"]["cpu_hours"] > 0
    assert records(out)["one/dmc_finger_spin/0"]["flags"] == ["--opt.lr", "1.0"]
    read = {curve.arm: curve for curve in curves.read_csv(out / "curves.csv")}
    assert read["two"].last("return") == 400 and read["two"].last("updates") == 200 and read["two"].last("hours") > 0

    before = records(out)
    assert learning.main(flags(out))["tasks"]["dmc_finger_spin"]["last_frame"] == 200
    assert records(out) == before and "4 runs: 4 done, 0 to run" in capsys.readouterr().out
    learning.main(flags(out, "--steps", "300"))  # more of them: they go on
    assert (out / "one/dmc_finger_spin/0/output.txt").read_text().split("\n")[2] == "begins at 200"
    assert {record["sessions"] for record in records(out).values()} == {2}


def test_other_flags_are_refused(tmp_path, fake):
    out = tmp_path / "out"
    learning.main(flags(out))
    with pytest.raises(UserError, match="was run with --opt.lr 1.0, and the arm one has --opt.lr 3.0 now") as error:
        learning.main(flags(out, arms=["one=--opt.lr 3.0"]))
    assert "\n" not in str(error.value)
    for arm, told in [("x=--opt.lr fast", "arm x: .*opt.lr"), ("x=--seed 2", "--seed is set by the bench")]:
        with pytest.raises(UserError, match=told):
            learning.main(flags(out, arms=[arm]))


def test_a_failed_run_lets_the_others_go_on(tmp_path, fake, capsys):
    out = tmp_path / "out"
    result = learning.main(flags(out, arms=["bad=--opt.lr 0.5", "good=--opt.lr 1.0"]))
    told = capsys.readouterr().out
    assert result["status"] == 1 and "the fake is broken" in told and "Not finished: 1 of 4 runs (1 failed)." in told
    assert "Left out: bad dmc_finger_spin seed 1, no return yet." in told
    assert result["tasks"]["dmc_finger_spin"]["arms"]["bad"]["interval"] is None
    assert result["pairs"][0]["p"] is None and result["pairs"][0]["beats_interval"] is None
    again = learning.main(flags(out, arms=["bad=--opt.lr 0.5", "good=--opt.lr 1.0"]))
    assert again["status"] == 1 and records(out)["bad/dmc_finger_spin/1"]["sessions"] == 2


def test_hours_stop_a_run(tmp_path, fake):
    out = tmp_path / "out"
    slow = flags(out, "--hours", str(1 / 3600), "--steps", "1000", arms=["slow=--opt.lr 0.25"])
    assert learning.main(slow)["runs"] == dict.fromkeys(
        [f"slow/dmc_finger_spin/{seed}" for seed in (0, 1)], "out of hours"
    )
    before = records(out)
    assert all(1 <= record["wall_s"] < 3 for record in before.values())
    learning.main(slow)
    assert records(out) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_saves_and_resumes(tmp_path, fake, number, capsys):
    out = tmp_path / "out"
    metrics = [out / f"slow/dmc_finger_spin/{seed}/metrics.jsonl" for seed in (0, 1)]

    def interrupt() -> None:
        while not all(path.exists() for path in metrics):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt, daemon=True).start()
    assert learning.main(flags(out, arms=["slow=--opt.lr 0.25"]))["status"] == 130
    assert "The same command goes on" in capsys.readouterr().err
    assert {record["status"] for record in records(out).values()} == {"stopped"}
    saved = {name: int((out / name / "state").read_text()) for name in records(out)}
    assert all(10 <= at < 200 for at in saved.values())  # it was let save
    first = records(out)

    learning.main(flags(out, "--steps", "60", arms=["slow=--opt.lr 0.25"]))
    for name, record in records(out).items():
        assert f"begins at {saved[name]}" in (out / name / "output.txt").read_text()
        assert record["status"] == "finished" and record["wall_s"] > first[name]["wall_s"] and record["sessions"] == 2


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    child = tmp_path / "child.txt"
    program = tmp_path / "parent.py"
    program.write_text(
        "import subprocess, sys\n"
        "process = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(child)!r}, 'w').write(str(process.pid))\n"
    )
    monkeypatch.setattr(learning, "DREAMER", [sys.executable, str(program)])
    monkeypatch.setattr(running.Session._clear, "__defaults__", (0.1,))
    learning.main(flags(tmp_path / "out", "--seeds", "0", arms=["one=--opt.lr 1.0"]))
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(int(child.read_text()), 0)
            time.sleep(0.02)


def test_one_at_a_time_in_a_folder(tmp_path, fake):
    out = tmp_path / "out"
    out.mkdir()
    with (out / ".lock").open("w") as lock:
        learning.fcntl.flock(lock, learning.fcntl.LOCK_EX)
        with pytest.raises(UserError, match="Another learning.py runs"):
            learning.main(flags(out))


# The report


def test_report_of_recorded_curves(tmp_path, capsys):
    path = tmp_path / "recorded.csv"
    rows = ["task,arm,seed,frames,name,value"]
    for task, best in (("dmc_a", 500), ("dmc_b", 1000), ("other", 7)):
        for arm, share, seeds in (("x", 1.0, 2), ("y", 0.5, 3)):
            rows += [
                f"{task},{arm},{s},{f},return,{best * share * f / 100}" for s in range(seeds) for f in range(0, 101, 5)
            ]
    path.write_text("\n".join([*rows, "dmc_a,x,9,20,return,3"]))
    words = ["--report-only", "--out", str(tmp_path / "out"), "--curves", str(path), "--last", "100"]
    result = learning.main(words)
    told = capsys.readouterr().out
    assert "Left out: x dmc_a seed 9, only 20 frames." in told and "--scale other=RETURN" in told
    assert "With fewer than 5 seeds" in told
    assert {task: own["arms"]["x"]["seeds"] for task, own in result["tasks"].items()} == {
        "dmc_a": 2,
        "dmc_b": 2,
        "other": 2,
    }
    assert result["across"]["x"]["mean"] == pytest.approx((0.4875 + 0.975) / 2)
    everywhere = result["pairs"][-1]
    assert everywhere["scope"] == "all tasks" and everywhere["tasks"] == 2 and everywhere["beats"] == 1
    assert everywhere["p"] == pytest.approx(2 / 100)
    scaled = learning.main([*words, "--scale", "other=7"])
    assert scaled["pairs"][-1]["tasks"] == 3
    with pytest.raises(UserError, match="two curves of dmc_a x 0"):
        learning.main([*words, str(path)][:5] + [str(path), str(path)])
    with pytest.raises(UserError, match="nothing to report"):
        learning.main(words[:3])


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    values = np.random.default_rng(0).normal(size=(3, 20)).cumsum(1)
    tasks = {"dmc_a": (100.0, {"x": values, "y": values[:1] - 1}), "dmc_b": (50.0, {"y": values})}
    curves.draw(tmp_path / "curves.png", tasks, "return", ["x: --configs dmc_proprio", "y: defaults"])
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--tasks", "dmc_a"], "at least one --arm"),
        (["--arm", "no flags"], "expected NAME="),
        (["--report-only", "--threshold", "dmc_a"], "expected TASK=NUMBER"),
        (["--tasks", "a", "--arm", "x=", "--arm", "x=--seed 1"], "a name of its own"),
        (["--report-only", "--picture", "a.png"], "needs matplotlib"),
    ],
)
def test_wrong_arguments(words, told, capsys):
    with pytest.raises(SystemExit):
        learning.main(["--out", "nowhere", *words])
    assert told in capsys.readouterr().err


def test_a_real_run(tmp_path, capsys):
    arm = "small=--configs debug --device cpu --tensorboard false --video_pred_log false --eval_every 0 --log_every 50"
    words = ["--out", str(tmp_path), "--tasks", "gym_CartPole-v1", "--arm", arm, "--steps", "150"]
    result = learning.main(words)
    arms = result["tasks"]["gym_CartPole-v1"]["arms"]
    assert result["status"] == 0 and arms["small"]["seeds"] == 1 and arms["small"]["mean"] > 5
    assert arms["small"]["interval"] is None and (tmp_path / "small/gym_CartPole-v1/0/latest.pt").exists()
    before = records(tmp_path)
    assert learning.main(words)["status"] == 0
    assert records(tmp_path) == before and "1 runs: 1 done, 0 to run" in capsys.readouterr().out
    with pytest.raises(UserError, match="opt.lr"):  # the same flags, but what they stand for has changed
        saved = tmp_path / "small/gym_CartPole-v1/0/config.yaml"
        saved.write_text(saved.read_text().replace("lr: 4.0e-05", "lr: 5.0e-05").replace("lr: 4e-05", "lr: 5e-05"))
        learning.main(words)
