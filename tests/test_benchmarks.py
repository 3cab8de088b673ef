"""The benchmarks: that they count and time right, and that each prints what it promises."""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.append(str(FOLDER))  # behind the project, whose `replay.py` is another

import behaviours  # noqa: E402
import bf16  # noqa: E402
import common  # noqa: E402
import compare  # noqa: E402
import kinds  # noqa: E402
import measuring  # noqa: E402
import policy  # noqa: E402
import report  # noqa: E402
import resume  # noqa: E402
import scaling  # noqa: E402
import train_step  # noqa: E402
import training  # noqa: E402
from torch.autograd import DeviceType  # noqa: E402

from layers import BlockLinear, Linear  # noqa: E402

TINY = ("--obs", "proprio", "--size", "debug", "--device", "cpu", "--repeats", "1", "--warmup", "0")
MACHINE = {"device", "machine", "torch", "precision", "compile", "threads", "params", "peak_bytes"}
TIMES = {"median_s", "min_s", "max_s", "samples", "noisy", "first_s"}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(measuring, "SAMPLE", 0.0)
    monkeypatch.setitem(measuring.MATMUL, "cpu", (torch.float32, 128))


def last_line(capsys) -> dict:
    line = capsys.readouterr().out.splitlines()[-1]
    return json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


# Arithmetic


def flop(work) -> int:
    counter = measuring.count_flop(work)
    assert not counter.uncounted
    return counter.flop


def test_flop_of_linear():
    layer, x = Linear(10, 5), torch.randn(32, 7, 10, requires_grad=True)
    once = 2 * 32 * 7 * 10 * 5
    assert flop(lambda: layer(x)) == once
    assert flop(lambda: layer(x).sum().backward()) == 3 * once
    with torch.inference_mode():
        assert flop(lambda: layer(x)) == once


@pytest.mark.parametrize("transposed", [False, True])
def test_flop_of_convolution(transposed):
    kind, resize = (nn.ConvTranspose2d, {"stride": 2, "output_padding": 1}) if transposed else (nn.Conv2d, {})
    layer = kind(3, 8, 5, padding=2, **resize)
    x = torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last)
    once = 2 * 2 * 16 * 16 * 8 * 3 * 25  # a tap for every pixel of the smaller side, edges included
    assert flop(lambda: layer(x)) == once
    assert flop(lambda: layer(x).sum().backward()) == 2 * once  # a frame needs no gradient
    assert flop(lambda: layer(x.clone().requires_grad_()).sum().backward()) == 3 * once


def test_flop_of_block_linear():
    layer = BlockLinear(4, 6, 5)
    x = torch.randn(9, 4, 6, requires_grad=True)
    assert flop(lambda: layer(x).sum().backward()) == 3 * 2 * 9 * 4 * 6 * 5


def test_flop_of_other_products():
    a, b, c = torch.ones(2, 4, 3), torch.ones(2, 3, 5), torch.ones(2, 4, 5)
    assert flop(lambda: torch.baddbmm(c, a, b)) == flop(lambda: c.clone().baddbmm_(a, b)) == 2 * 2 * 4 * 3 * 5
    assert flop(lambda: torch.einsum("bij,bjk->bik", a, b)) == 2 * 2 * 4 * 3 * 5
    assert flop(lambda: c[0].clone().addmm_(a[0], b[0])) == 2 * 4 * 3 * 5
    assert flop(lambda: torch.mm(a[0], b[0], out=torch.empty(4, 5))) == 2 * 4 * 3 * 5
    assert flop(lambda: a[0] @ b[0, :, 0]) == 2 * 4 * 3
    assert flop(lambda: F.embedding(torch.tensor([1, 2]), a[0])) == 0  # a row that is looked up costs nothing


def test_a_product_without_formula_is_named():
    counter = measuring.count_flop(lambda: torch.addbmm(torch.ones(4, 5), torch.ones(2, 4, 3), torch.ones(2, 3, 5)))
    assert counter.flop == 0 and list(counter.uncounted) == ["aten.addbmm"]


def update_flop(batch_size: int) -> int:
    config = common.load("--configs", "debug", "--device", "cpu", "--batch_size", str(batch_size))
    learner = common.Learner("vision", config, stored=0)
    batch = learner.batch()
    return flop(lambda: learner.agent.train_step(batch))


def test_flop_of_an_update_double_with_the_batch():
    small, large = update_flop(2), update_flop(4)
    assert small > 1e6
    assert large == pytest.approx(2 * small, rel=1e-3)


# Time


class FakeClock(measuring.Clock):
    """Time passes only when work is done; `others` is the CPU time that neighbours use at each call."""

    def __init__(self, costs, others=()):
        self.costs, self.others = iter(costs), iter(others)
        self.now = self.mine = self.all = 0.0

    def work(self):
        cost = next(self.costs)
        self.now, self.mine, self.all = self.now + cost, self.mine + cost, self.all + cost + next(self.others, 0.0)

    wall, own, machine = (lambda self: self.now), (lambda self: self.mine), (lambda self: self.all)


def test_statistics_of_quiet_samples():
    clock = FakeClock([9.0, 5.0, 1.0, 3.0, 2.0])
    times = measuring.measure(clock.work, repeats=3, warmup=1, clock=clock)
    assert times.summary() == {
        "median_s": 2.0, "min_s": 1.0, "max_s": 3.0, "samples": 3, "noisy": 0, "first_s": 9.0
    }  # fmt: skip


def test_samples_beside_busy_neighbours_are_replaced():
    clock = FakeClock([1.0] * 2 + [1.0, 7.0, 1.2, 8.0, 1.1], others=[0] * 2 + [0, 5.0, 0, 5.0, 0.1])
    times = measuring.measure(clock.work, repeats=3, warmup=1, clock=clock)
    assert times.summary()["median_s"] == pytest.approx(1.1)
    assert len(times.quiet) == 3 and len(times.noisy) == 2


def test_noisy_samples_count_where_nothing_was_quiet():
    clock = FakeClock([1.0] * 20, others=[1.0] * 20)
    times = measuring.measure(clock.work, repeats=2, warmup=0, clock=clock, patience=3)
    assert times.summary()["samples"] == times.summary()["noisy"] == 6


def test_short_work_is_repeated(monkeypatch):
    monkeypatch.setattr(measuring, "SAMPLE", 0.25)
    calls, finished = [], []
    clock = FakeClock([0.0625] * 1000)

    def work():
        calls.append(1)
        clock.work()

    times = measuring.measure(work, repeats=2, warmup=1, clock=clock, finish=lambda: finished.append(len(calls)))
    assert finished == [1, 2, 6, 10] and times.median == 0.0625


def test_a_part_inside_another_counts_once():
    class Work:
        def outer(self):
            self.inner()

        def inner(self):
            pass

    clock = iter([0.0, 1.0, 4.0, 6.0])
    parts, work = measuring.Phases(), Work()
    parts.wrap(work, "outer", "a")
    parts.wrap(work, "inner", "b")
    parts.wrap(work, "gone", "c")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring.time, "perf_counter", lambda: next(clock))
        work.outer()
    assert parts.seconds == {"a": 3.0, "b": 3.0} and parts.missing == ["gone"]


def test_slopes():
    assert measuring.loglog_slope([1, 2, 4], [3, 6, 12]) == pytest.approx(1)
    assert measuring.loglog_slope([1, 2, 4], [3, 3, 3]) == pytest.approx(0)
    assert measuring.deviation([1, 2, 4], [12, 13, 15]) == pytest.approx(0)
    assert measuring.deviation([1, 2, 4], [1, 4, 16]) > 0.1


def test_numbers_are_readable():
    assert [report.seconds(v) for v in (2.5, 0.0251, 3.2e-5, 3e-9)] == ["2.5 s", "25.1 ms", "32 µs", "3 ns"]
    assert [report.amount(v) for v in (10_500_000, 640_867, 12)] == ["10.5 M", "641 k", "12"]


# Comparison


def fake(folder: Path, name: str, line: str, status: int = 0) -> str:
    path = folder / f"{name}.py"
    path.write_text(
        f"import os, sys\nprint('about to')\nprint({line!r} % os.environ.get('X', '2'))\nsys.exit({status})\n"
    )
    return str(path)


def test_compare_reads_both_protocols(tmp_path, capsys):
    ours = fake(tmp_path, "ours", '{"median_s": 1.0, "params": 7, "peak_bytes": 100, "noisy": 1, "x": "%s"}')
    theirs = fake(tmp_path, "theirs", 'RESULT {"median": %s, "peak_rss_gib": 0.5}')
    compare.main(["--ours", ours, "--theirs", f"X=4 {sys.executable} {theirs}", "--rounds", "2"])
    found = last_line(capsys)
    assert found["ratio"] == 0.25 and found["ratios"] == [0.25, 0.25]
    assert found["ours"] | {"params": 7, "peak_bytes": 100, "noisy": 2} == found["ours"]
    assert found["theirs"]["peak_bytes"] == 2**29 and found["theirs"]["params"] is None


def test_compare_keeps_paths_and_variables(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)  # of a virtual environment: not to be resolved
    variables, words = compare.split("PEERS=./bin NT=2 bin/python 'my driver.py' --work=V V")
    assert variables == {"PEERS": str(tmp_path / "bin"), "NT": "2"}
    assert words == [str(tmp_path / "bin/python"), "my driver.py", "--work=V", "V"]
    assert compare.split("benchmarks/x.py --a b")[1] == [sys.executable, "benchmarks/x.py", "--a", "b"]


@pytest.mark.parametrize("line, status", [("no result %s", 0), ('{"median_s": %s}', 3), ('{"other": %s}', 0)])
def test_compare_says_what_failed(tmp_path, line, status):
    bad = fake(tmp_path, "bad", line, status)
    with pytest.raises(SystemExit, match="bad.py"):
        compare.main(["--ours", bad, "--theirs", bad])


def test_last_line_of_json():
    assert report.last_json('{"a": 1}\nRESULT {"a": 2}\n{broken\nend') == {"a": 2}
    assert report.last_json("nothing") is None


# Kernels


class Kernel:
    """An entry of a profile."""

    def __init__(self, count, microseconds, device_type=DeviceType.CUDA, is_user_annotation=False):
        self.count, self.self_device_time_total, self.device_type = count, microseconds, device_type
        self.is_user_annotation = is_user_annotation


def test_kernels_are_those_that_run_on_the_device():
    ran, launched = [Kernel(30, 600.0), Kernel(3, 150.0)], Kernel(9, 0.0, DeviceType.CPU)
    events = [*ran, launched, Kernel(3, 9e6, is_user_annotation=True)]
    found = measuring.kernel_sums(events, calls=3)
    assert found == {"kernels": 11, "kernel_s": pytest.approx(250e-6)}
    assert measuring.kernels(lambda: None, torch.device("cpu")) == {}


def test_time_of_updates_on_the_device(monkeypatch):
    """By events around each, with a clock in the place of the device's."""
    now = iter([0.0, 2.0, 10.0, 13.0, 20.0, 21.0])

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(now)

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    class Run:
        class agent:  # noqa: N801
            train_step = staticmethod(lambda batch: 2 * batch)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    busy = training.Busy(Run)
    assert [Run.agent.train_step(n) for n in (1, 2)] == [2, 4] and busy.seconds() == 5
    busy.clear()
    assert Run.agent.train_step(3) == 6 and busy.seconds() == 1


# The scripts


def test_train_step_as_a_command():
    command = [sys.executable, str(FOLDER / "train_step.py"), *TINY, "--horizon", "2", "--batch_size", "2"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    shape = {"bench": "train_step", "size": "debug", "obs": "proprio", "batch": 2, "length": 8, "horizon": 2}
    assert found | shape == found
    assert MACHINE | TIMES | {"flop", "flop_per_s", "matmul_flop_per_s", "share"} <= found.keys()
    assert found["flop_per_s"] == pytest.approx(found["flop"] / found["median_s"])
    assert found["peak_bytes"] > 2**26 and found["params"] > 1000 and found["device"] == "cpu"


def test_phases(capsys):
    train_step.main([*TINY, "--phases"])
    found = last_line(capsys)
    parts = {"encoder", "observe", "decoder", "imagination", "actor-critic losses", "backward", "optimizer"}
    assert parts | {"sample, to device", "write back"} <= found["phases_s"].keys()
    assert sum(found["phases_s"].values()) == pytest.approx(found["mean_s"])


def test_profile(capsys):
    train_step.main([*TINY, "--profile"])
    assert "Self CPU" in capsys.readouterr().out


def test_policy(capsys):
    policy.main([*TINY, "--envs", "3"])
    found = last_line(capsys)
    assert MACHINE | TIMES | {"flop", "share"} <= found.keys() and found["envs"] == 3
    assert policy.main([*TINY, "--envs", "3", "--fresh"])["flop"] == found["flop"]
    assert found["median_ms"] == pytest.approx(1e3 * found["median_s"])


def test_replay(capsys, monkeypatch):
    spec = importlib.util.spec_from_file_location("replay_benchmark", FOLDER / "replay.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "available_bytes", lambda: 10**8)
    module.main([*TINY, "--stored", "300", "1000", "1e9"])
    found = last_line(capsys)
    assert [point["stored"] for point in found["points"]] == [300, 1000] and found["left_out"] == [10**9]
    assert (MACHINE - {"params"}) | TIMES <= found.keys() and found["median_s"] == found["points"][-1]["median_s"]
    assert TIMES | {"add_s", "resident_bytes_per_step"} <= found["points"][0].keys()
    assert found["bytes_per_step"] > 24 * 4 and "slope" in found


def test_scaling(capsys):
    scaling.main([*TINY, "--factors", "0.5", "1", "--batch_length", "4", "--rounds", "2"])
    found = last_line(capsys)
    assert MACHINE <= found.keys() and (found["batch_size"], found["batch_length"], found["imag_horizon"]) == (4, 4, 4)
    curves = found["curves"]
    assert {axis: curve["values"] for axis, curve in curves.items()} == {
        "batch": [2, 4],
        "length": [2, 4],
        "horizon": [2, 4],
    }
    assert all({"median_s", "slope", "off_line"} <= curve.keys() for curve in curves.values())


def test_scaling_draws(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install matplotlib)")
    scaling.main([*TINY, "--factors", "0.5", "1", "--batch_length", "4", "--plot", str(tmp_path / "plot.png")])
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_training(capsys, monkeypatch):
    monkeypatch.setattr(training.tools, "setup_logging", lambda level: None)  # pytest has its own
    keys = ("--configs", "debug", "--task", "gym_CartPole-v1", "--device", "cpu", "--batch_size", "2")
    training.main(["--frames", "20", "--warmup", "2", *keys])
    found = last_line(capsys)
    assert MACHINE | {"flop", "flop_per_s"} <= found.keys() and found["frames"] >= 20 and found["updates"] > 0
    assert 0 < found["min_s"] <= found["median_s"] < found["seconds"] and found["busy"] == found["in_updates"]
    assert 0 < found["busy"] <= 1 and {"policy", "environments", "storing", "updates"} <= found["shares"].keys()
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert found["agent_steps_per_s"] == pytest.approx(found["frames"] / found["seconds"])


def test_bf16(capsys):
    """A fresh critic's `value` is a sum of huge bins that cancel: all else is near float32 from the first update on."""
    for precision in ("bfloat16", "float16"):
        command = [*TINY, "--updates", "1", "--batches", "1", "--precision", precision]
        found = bf16.main([*command, "--tolerance", "10"])
        assert last_line(capsys) == found and found["precision"] == precision
        conditioned = {name: e for name, e in found["differences"].items() if name not in ("policy", "value", "repval")}
        assert conditioned.keys() > {"rec/vector", "dyn", "rep", "rew", "con"} and 0 < max(conditioned.values()) < 0.02
        assert found["gradient_cosines"].keys() == {"world", "actor", "critic"}
        assert found["gradient_cosines"]["world"] > 0.99
        assert found["within"] and not bf16.main([*command, "--tolerance", "0"])["within"]


def test_resume(capsys, tmp_path, monkeypatch):
    """With a program in the place of dreamer.py that works until Ctrl-C."""
    (tmp_path / "dreamer.py").write_text(PROGRAM)
    monkeypatch.setattr(common, "ROOT", tmp_path)
    command = ["--seconds", "4", "--logdir", str(tmp_path / "run"), "--", "--key", "value"]
    found = resume.main(command)
    assert found["went_on"] and all(3.5 < seconds < 30 for seconds in found["seconds"])
    found = last_line(capsys)
    assert found["updates"] == [3, 6] and found["returns"] == [[5, 1.5], [10, 1.5]]
    with pytest.raises(SystemExit, match="holds a run already"):
        resume.main(command)


PROGRAM = """
import json, sys, pathlib, time
try:
    time.sleep(60)
except KeyboardInterrupt:
    pass
import torch
logdir = pathlib.Path(sys.argv[-1])
logdir.mkdir(exist_ok=True)
path, counters = logdir / "latest.pt", {"frames": 0, "updates": 0}
if path.exists():
    counters = torch.load(path)["counters"]
    print(f"Resuming at frame {counters['frames']:,}, update {counters['updates']:,}")
counters = {"frames": counters["frames"] + 5, "updates": counters["updates"] + 3}
torch.save({"counters": counters}, path)
with open(logdir / "metrics.jsonl", "a") as file:
    file.write(json.dumps({"step": counters["frames"], "eval/return": 1.5}) + "\\n")
"""


@pytest.mark.parametrize(
    "main, flags, told",
    [
        (train_step.main, "--batchsize 3", "batch_size"),
        (train_step.main, "--graph true", "graph"),
        (train_step.main, "--repeats 0", "--repeats"),
        (train_step.main, "--warmup -1", "--warmup"),
        (policy.main, "--envs 0", "--envs"),
        (policy.main, "--replay_device cuda --device nothing", "nothing"),
        (scaling.main, "--replay_device cuda", "replay_device"),
    ],
)
def test_a_mistake_is_one_line(main, flags, told, capsys):
    with pytest.raises(SystemExit) as error:
        common.command(lambda: main([*TINY, *flags.split()]))
    message = capsys.readouterr().err or str(error.value)
    assert told in message.splitlines()[-1], message


def test_gpu_script_names_its_stages():
    run = subprocess.run([FOLDER / "gpu.sh", "wrong"], capture_output=True, text=True)
    assert run.returncode == 2 and all(
        name in run.stdout for name in ("check", "vision", "large", "train", "proprio", "tests", "all", "DEVICE")
    )


# Kinds of observation


def test_workloads_with_other_kinds():
    spaces, _ = common.spaces("vision+waveform+text", SimpleNamespace(image_size=(64, 64)))
    assert {key: space.shape for key, space in spaces.items()} == {
        "image": (64, 64, 3),
        "audio": (1, 1600),
        "text": (32,),
    }
    for wrong in ("audio", "vision+smell", "vision+"):
        with pytest.raises(argparse.ArgumentTypeError, match="none of vision, proprio"):
            common.workload(wrong)


def test_cost_of_behaviours(capsys):
    behaviours.main([*TINY, "--repeats", "2", "--behaviours", "plan2explore", "hierarchical", "one_step"])
    line = last_line(capsys)["of"]
    assert list(line) == ["greedy", "plan2explore", "hierarchical", "one_step"]
    assert line["greedy"]["ratio"] == 1 and all(of["median_s"] > 0 for of in line.values())
    assert line["one_step"]["flop"] > line["greedy"]["flop"]
    for name in ("plan2explore", "hierarchical"):
        assert line[name]["flop"] > line["greedy"]["flop"] and line[name]["params"] > line["greedy"]["params"]


def test_cost_of_kinds(capsys):
    kinds.main([*TINY, "--repeats", "2", "--kinds", "audio"])
    line = last_line(capsys)
    plain, audio = (line["loads"][load] for load in ("proprio", "proprio+audio"))
    assert plain["cost"] == 0 < plain["flop"] < audio["flop"]
    assert plain["params"] < audio["params"] and all(load["median_s"] > 0 for load in line["loads"].values())
