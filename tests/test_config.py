"""config.py: blocks, overrides, errors, continuation, help; and the files that set the project up."""

import fnmatch
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ruamel.yaml import YAML

import config as configuration
from config import ABSENT, Config, ConfigError, check_resume, difference, load, resolve_paths

ROOT = Path(configuration.__file__).parent
BLOCKS = [f"size{size}m" for size in (1, 12, 25, 50, 100, 200, 400)]
BLOCKS += ["defaults", "dmc_proprio", "dmc_proprio_2024", "dmc_proprio_fast", "dmc_vision", "dmc_vision_fast"]
BLOCKS += ["atari100k", "crafter", "cpu", "debug"]

SMALL = """
defaults:
  # First things
  steps: 100    # frames
  name: 'a # b' # a text
  path: null
  flag: false
  rate: 0.5
  sizes: [1, 2]
  inner: {units: 3, layers: 2}   # both
  outer:
    units: 4    # of outer
    deep: {units: 5}

# Kinds
big:            # more of it
  '*.units': 64
  outer: {units: 128}
small:
  '*.units': 1
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def error(*argv, file=configuration.CONFIGS) -> str:
    """The message of the mistake in a command line; always one line."""
    with pytest.raises(ConfigError) as caught:
        load(argv, file)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def python(*argv, **options):
    return subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, timeout=60, **options)


def front_door(*argv, **options):
    """What a program whose first act is `main_load` prints and returns for a command line."""
    return python("-c", "import config, sys; config.main_load(sys.argv[1:]); print('loaded')", *argv, **options)


# Blocks and overrides


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_loads(block):
    config = load(["--configs", block])
    assert set(config.flat()) == set(load([]).flat())


def test_hierarchical_goes_with_every_block():
    """It has what a hierarchy needs, whatever gradient and objective the block before it has."""
    for block in BLOCKS:
        config = load(["--configs", block, "hierarchical"])
        assert (config.imag_gradient, config.actor_objective) == ("reinforce", "ppo"), block
        assert config.imag_horizon % config.hier.every == 0, block


def test_blocks_stack_in_order():
    assert load(["--configs", "cpu", "size12m"]).dyn.deter == 2048
    assert load(["--configs", "size12m", "cpu"]).dyn.deter == 512
    assert load(["--configs", "cpu", "size12m"]).envs == load(["--configs", "cpu"]).envs == 4
    assert load(["--configs=cpu,size12m"]) == load(["--configs", "cpu", "size12m"])
    assert load(["--configs", "cpu", "--configs", "size12m"]) == load(["--configs", "cpu", "size12m"])
    assert load(["--configs", "cpu", "defaults"]) == load([])


def test_command_line_wins_wherever_it_stands():
    for argv in (["--envs", "7", "--configs", "cpu"], ["--configs", "cpu", "--envs", "7"]):
        assert load(argv).envs == 7
    assert load(["--envs", "7", "--envs", "8"]).envs == 8


def test_the_later_of_two_settings_of_a_block_wins(small):
    config = load(["--configs", "big"], small)
    assert (config.inner.units, config.outer.units, config.outer.deep.units) == (64, 128, 64)


def test_globs_on_the_command_line():
    config = load(["--*.units", "48", "--encoder.units", "96"])
    assert config.encoder.units == 96
    assert {config[part].units for part in ("decoder", "actor", "critic", "reward_head", "cont_head")} == {48}
    assert load(["--*_every=77"]).log_every == 77


@pytest.mark.parametrize(
    ("argv", "key", "value"),
    [
        (["--batch_length", "32"], "batch_length", 32),
        (["--encoder.units=128"], "encoder.units", 128),
        (["--dyn_discrete", "0"], "dyn.discrete", 0),
        (["--opt_actor_lr", "1e-4"], "opt.actor_lr", 1e-4),
        (["--opt.actor_lr", "none"], "opt.actor_lr", None),
        (["--steps", "1e5"], "steps", 100000),
        (["--steps", "2.0e2"], "steps", 200),
        (["--seed", "4294967295"], "seed", 4294967295),
        (["--kl_free", "2"], "kl_free", 2.0),
        (["--dmc.camera", "-1"], "dmc.camera", -1),
        (["--image_size", "96", "128"], "image_size", (96, 128)),
        (["--image_size", "[96,128]"], "image_size", (96, 128)),
        (["--image_size", "[96,", "128]"], "image_size", (96, 128)),
        (["--image_size", "96,128"], "image_size", (96, 128)),
        (["--image_size=96,128"], "image_size", (96, 128)),
        (["--encoder.mults", "4"], "encoder.mults", (4,)),
        (["--grad_heads", "decoder", "reward"], "grad_heads", ("decoder", "reward")),
        (["--grad_heads", "['decoder','cont']"], "grad_heads", ("decoder", "cont")),
        (["--grad_heads", "[]"], "grad_heads", ()),
        (["--traindir", "null"], "traindir", None),
        (["--traindir", "012"], "traindir", "012"),
        (["--task", "gym_CartPole-v1"], "task", "gym_CartPole-v1"),
        (["--logdir=a=b"], "logdir", "a=b"),
        (["--encoder.cnn_keys", "$^"], "encoder.cnn_keys", "$^"),
        (["--device", "cuda:1"], "device", "cuda:1"),
    ],
)
def test_override(argv, key, value):
    found = load(argv).flat()[key]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("word", ["true", "True", "yes", "1", "on"])
def test_true(word):
    assert load(["--force", word]).force is True


@pytest.mark.parametrize("word", ["false", "False", "no", "0", "off"])
def test_false(word):
    assert load(["--video_pred_log", word]).video_pred_log is False


def test_a_null_default_without_a_type_takes_what_yaml_reads(small):
    assert load(["--path", "x/y"], small).path == "x/y"
    assert load(["--path", "3"], small).path == 3
    assert load(["--path", "none"], small).path is None


def test_a_saved_configuration_is_a_block(tmp_path):
    config = load(["--configs", "debug", "--opt.eps", "1e-20", "--task", "none", "--offline_traindir", "yes"])
    config.save(tmp_path / "run" / "config.yaml")
    assert Config.read(tmp_path / "run" / "config.yaml") == config
    assert load(["--configs", str(tmp_path / "run" / "config.yaml")]) == config
    assert load([], tmp_path / "run" / "config.yaml") == config
    assert load(["--configs", str(tmp_path / "run" / "config.yaml"), "cpu"]).envs == 4
    assert os.listdir(tmp_path / "run") == ["config.yaml"]


# Errors


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--batchsize", "3"], ["unknown key --batchsize", "did you mean --batch_size?"]),
        (["--batch-size", "3"], ["did you mean --batch_size?"]),
        (["--encodr.units", "3"], ["did you mean --encoder.units?"]),
        (["--encoder.unit", "3"], ["did you mean --encoder.units"]),
        (["--discrete", "0"], ["did you mean --dyn.discrete?"]),
        (["--units", "3"], ["did you mean --", "--*.units for all 11"]),
        (["--*.unit", "3"], ["unknown key --*.unit", "--*.units"]),
        (["--qqqqqqq", "3"], ["unknown key --qqqqqqq", "--help"]),
        (["--configs", "cpus"], ["unknown block 'cpus'", "did you mean cpu?", "dmc_vision", "size400m"]),
        (["--configs", "cpu", "nowhere.yaml"], ["cannot read nowhere.yaml", "No such file"]),
        (["--envs", "1.5"], ["--envs 1.5", "a whole number", "such as 16"]),
        (["--envs", "many"], ["--envs many", "a whole number"]),
        (["--envs", "true"], ["--envs true", "a whole number"]),
        (["--steps", "inf"], ["a whole number"]),
        (["--kl_free", "x"], ["--kl_free x", "a number", "such as 1"]),
        (["--opt.lr", "nan"], ["must be finite"]),
        (["--opt.actor_lr", "fast"], ["--opt.actor_lr fast", "a number"]),
        (["--force", "maybe"], ["--force maybe", "true or false"]),
        (["--force", "2"], ["--force 2", "true or false"]),
        (["--seed", "none"], ["--seed none", "a whole number"]),
        (["--image_size", "a,b"], ["a list of whole numbers", "[64, 64]"]),
        (["--image_size", "96"], ["a list of whole numbers", "height and width"]),
        (["--envs", "3", "4"], ["expected one value, not 2"]),
        (["--encoder", "3"], ["--encoder is a section", "--encoder.mlp_keys"]),
        (["--batch_size.units", "3"], ["batch_size is a single value", "--batch_size"]),
        (["--envs"], ["--envs lacks its value"]),
        (["--envs", "--seed", "3"], ["--envs lacks its value"]),
        (["--configs", "--seed", "3"], ["--configs lacks the names of blocks"]),
        (["cpu", "--seed", "3"], ["'cpu' belongs to no key"]),
        (["--mode", "evaluate"], ["train or eval"]),
        (["--encoder.audio_keys", "aud("], ["encoder.audio_keys aud(", "not a regular expression"]),
        (["--precision", "fp16"], ["auto, float32, bfloat16 or float16"]),
        (["--imag_gradient", "dynamic"], ["did you mean dynamics?"]),
        (["--grad_heads", "decoder,rewrd"], ["did you mean reward?"]),
        (["--device", "gpu"], ["auto, cpu, cuda, cuda:1"]),
        (["--dyn.cell", "lstm"], ["block_gru or gru"]),
        (["--critic.dist", "twohot"], ["symexp_twohot"]),
        (["--opt.name", "sgd"], ["laprop or adam"]),
        (["--batch_size", "0"], ["--batch_size 0", ">= 1"]),
        (["--batch_length", "1"], [">= 2"]),
        (["--discount_lambda", "0"], ["> 0 and <= 1"]),
        (["--discount_lambda", "1.01"], ["> 0 and <= 1"]),
        (["--train_ratio", "-1"], ["--train_ratio -1", ">= 0"]),
        (["--envs", "0"], [">= 1"]),
        (["--image_size", "64", "0"], [">= 1"]),
        (["--*.units", "0"], [">= 1"]),
        (["--dyn.deter", "100"], ["dyn.deter is 100", "multiple of dyn.blocks, which is 8"]),
        (["--retnorm.low", "0.99"], ["less than retnorm.high"]),
        (["--dataset_size", "64"], ["more than batch_length"]),
        (["--task", "none"], ["--offline_traindir"]),
    ],
)
def test_mistake_on_the_command_line(argv, parts):
    message = error(*argv)
    for part in parts:
        assert part in message


def test_a_plain_gru_needs_no_blocks():
    assert load(["--dyn.cell", "gru", "--dyn.deter", "100"]).dyn.deter == 100


def test_an_ambiguous_name(tmp_path):
    path = tmp_path / "two.yaml"
    path.write_text("defaults: {a: {b_c: 1}, a_b: {c: 2}}")
    assert "a.b_c or a_b.c" in error("--a_b_c", "3", file=path)


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("outer: {units: 128}", "outer: {unit: 128}", ["block big of small.yaml", "outer.unit", "outer.units"]),
        ("outer: {units: 128}", "outer: 128", ["block big of small.yaml", "outer is a section"]),
        ("outer: {units: 128}", "steps: {units: 1}", ["block big of small.yaml", "steps is a single value"]),
        ("outer: {units: 128}", "steps: few", ["block big of small.yaml", "steps: few", "a whole number"]),
        ("outer: {units: 128}", "name: 3", ["block big of small.yaml", "name: 3", "a text"]),
        ("outer: {units: 128}", "sizes: 3", ["block big of small.yaml", "sizes: 3", "a list"]),
        ("outer: {units: 128}", "rate: 1\n  rate: 2", ["small.yaml, line 19", "block big", "duplicate key", "rate"]),
        ("outer: {units: 128}", "outer: {units: 128", ["small.yaml, line", "block"]),
        ("small:\n", "big:\n", ["duplicate key", "big"]),
        ("  '*.units': 1\n", "  '*.unit': 1\n", ["block small of small.yaml", "*.unit"]),
        ("  '*.units': 1\n", "  - 1\n", ["block small", "keys below it"]),
    ],
)
def test_mistake_in_the_file(small, old, new, parts):
    assert old in SMALL
    small.write_text(SMALL.replace(old, new))
    message = error(file=small)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("text", ["", "- 1", "just words", "1: 2"])
def test_a_file_that_holds_no_settings(small, text):
    small.write_text(text)
    assert "holds no settings" in error(file=small)
    with pytest.raises(ConfigError, match="holds no settings"):
        Config.read(small)


def test_a_key_that_cannot_be_an_attribute(small):
    small.write_text("defaults: {flat: 1}")
    assert "'flat' cannot be a key" in error(file=small)


def test_every_table_speaks_of_keys_that_exist():
    keys = load([]).flat()
    tables = [configuration.CHOICES, configuration.PATTERNS, configuration.RANGES]
    for pattern in [*(key for table in tables for key in table), *configuration.NULLABLE, *configuration.FREE]:
        assert fnmatch.filter(keys, pattern), f"{pattern} matches no key of configs.yaml"


def test_every_null_has_a_type():
    assert {key for key, value in load([]).flat().items() if value is None} <= set(configuration.NULLABLE)


def test_choices_of_activations_are_those_of_the_layers():
    layers = pytest.importorskip("layers")
    assert set(configuration.CHOICES["*.act"]) == set(layers.ACTIVATIONS)


# Config


def test_access():
    config = load([])
    assert config.encoder.units == config["encoder"]["units"] == config.flat()["encoder.units"] == 256
    assert dict(**config.dyn) == dict(config.dyn) and config.dyn.deter == dict(config.dyn)["deter"]
    assert config.image_size == (64, 64)
    assert config.get("nothing", 3) == 3 and "encoder" in config and "nothing" not in config
    with pytest.raises(AttributeError, match="did you mean 'batch_size'"):
        _ = config.batchsize
    assert not hasattr(config, "_private") and not hasattr(config, "__array__")


def test_frozen():
    config = load([])
    with pytest.raises(AttributeError, match="frozen"):
        config.steps = 3
    with pytest.raises(AttributeError, match="frozen"):
        del config.steps
    with pytest.raises(TypeError):
        config.encoder["units"] = 3


def test_pickle_and_equality():
    config = load(["--configs", "cpu"])
    copy = pickle.loads(pickle.dumps(config))
    assert copy == config and isinstance(copy.encoder, Config) and copy.encoder.units == 64
    assert config != load([]) and "units" in repr(config)


def test_replace():
    config = load([])
    other = config.replace(**{"encoder.units": 8, "*.depth": 2}, seed=3, decoder={"units": 9})
    assert (other.encoder.units, other.decoder.units, other.encoder.depth, other.seed) == (8, 9, 2, 3)
    assert config.encoder.units == 256
    assert other.replace(checkpoint=Path("a/b")).replace(checkpoint=None).checkpoint is None
    for changes, message in [({"encodr.units": 8}, "encoder.units"), ({"steps": "few"}, "whole number")]:
        with pytest.raises(ConfigError, match=message):
            config.replace(**changes)


def test_paths(tmp_path):
    config = resolve_paths(load(["--task", "gym_ALE/Pong-v5", "--logdir", f"{tmp_path}/{{task}}_{{seed}}_{{opt.lr}}"]))
    assert config.logdir == f"{tmp_path}/gym_ALE-Pong-v5_0_4e-05"
    assert config.traindir == f"{config.logdir}/train_eps" and config.evaldir == f"{config.logdir}/eval_eps"
    assert resolve_paths(config) == config
    assert resolve_paths(load(["--traindir", "elsewhere"])).traindir == "elsewhere"
    assert resolve_paths(load(["--logdir", "~/runs"])).logdir == str(Path("~/runs").expanduser())
    for wrong in ("{tusk}", "{", "{opt.l}", "{}"):
        with pytest.raises(ConfigError, match="logdir"):
            resolve_paths(load(["--logdir", wrong]))


# A run and its continuation


def test_difference():
    old, new = load([]), load(["--encoder.units", "8", "--steps", "5"])
    assert difference(old, old) == []
    assert difference(old, new) == [("steps", 1000000, 5), ("encoder.units", 256, 8)]
    assert difference(Config({"a": 1}), Config({"b": 2})) == [("a", 1, ABSENT), ("b", ABSENT, 2)]


def test_resume_with_harmless_changes(tmp_path):
    old = resolve_paths(load(["--logdir", str(tmp_path / "here")]))
    argv = ["--steps", "2e6", "--device", "cpu", "--log_every", "5", "--wandb", "yes", "--envs", "3"]
    new = resolve_paths(load([*argv, "--logdir", str(tmp_path / "moved")]))
    changed = {key for key, _, _ in check_resume(old, new)}
    assert {"steps", "device", "log_every", "wandb", "envs", "logdir", "traindir"} == changed - {"evaldir"}


def test_resume_of_another_configuration():
    old = resolve_paths(load([]))
    argv = ["--batch_size", "4", "--image_size", "32", "48", "--dmc.proprio", "true", "--traindir", "other"]
    with pytest.raises(ConfigError) as caught:
        check_resume(old, resolve_paths(load(argv)))
    message = str(caught.value)
    assert message.startswith("logdir/dmc_walker_walk belongs to another configuration: ")
    assert "batch_size was 16, is now 4" in message and "image_size was [64, 64], is now [32, 48]" in message
    assert "another --logdir" in message and "--force true" in message
    restore = re.search(r"its own values \((.*?)\)", message)[1].split()
    assert check_resume(old, resolve_paths(load([*argv, *restore]))) == []
    assert len(check_resume(old, resolve_paths(load([*argv, "--force", "true"])))) >= 4


def test_resume_of_a_run_that_an_older_version_began():
    """Keys that it did not know are no difference at their defaults, and are one elsewhere."""
    whole = resolve_paths(load([]))
    old = Config({key: value for key, value in whole.items() if key not in ("imag_last", "checkpointing")})
    assert {key for key, *_ in check_resume(old, resolve_paths(load([])))} == {"imag_last", "checkpointing"}
    with pytest.raises(ConfigError, match=r"imag_last was \(absent\), is now 4"):
        check_resume(old, resolve_paths(load(["--imag_last", "4"])))


def test_resume_with_many_differences_stays_readable():
    with pytest.raises(ConfigError, match="and [0-9]+ more.*the command that started it"):
        check_resume(load([]), load(["--configs", "debug"]))


# Help, and the program as a user meets it


def test_help_is_complete_quick_and_needs_no_torch():
    code = (
        "import sys, config\n"
        "try: config.main_load(['--help'])\n"
        "finally: assert not {'torch', 'numpy', 'gymnasium', 'mujoco'} & set(sys.modules), 'a slow import'"
    )
    start = time.monotonic()
    done = python("-c", code)
    assert time.monotonic() - start < 3
    assert done.returncode == 0 and not done.stderr
    assert "\033" not in done.stdout
    for key in load([]).flat():
        assert f"--{key} " in done.stdout
    for block in BLOCKS[:-7]:
        assert block in done.stdout
    lines = done.stdout.splitlines()
    assert any(re.fullmatch(r" +--batch_size +16 +windows per update", line) for line in lines)
    assert {"What to run", "Environments", "Data", "Logging", "Behaviour", "World model"} <= set(lines)


def test_the_front_door_itself_answers_quickly():
    if not (ROOT / "dreamer.py").exists() or "main_load" not in (ROOT / "dreamer.py").read_text():
        pytest.skip("dreamer.py does not read the command line yet")
    start = time.monotonic()
    done = python("dreamer.py", "--help")
    assert time.monotonic() - start < 3
    assert done.returncode == 0 and "--batch_size" in done.stdout
    done = python("dreamer.py", "--batchsize", "3")
    assert done.returncode == 2 and done.stderr == "error: unknown key --batchsize; did you mean --batch_size?\n"


def test_help_takes_its_words_from_the_file(small):
    text = configuration.help_text(small)
    assert re.search(r"^First things$", text, re.MULTILINE)
    assert re.search(r"--steps +100 +frames$", text, re.MULTILINE)
    assert re.search(r"--name +a # b +a text$", text, re.MULTILINE)
    assert re.search(r"--inner.units +3 +both$", text, re.MULTILINE)
    assert re.search(r"--inner.layers +2$", text, re.MULTILINE)
    assert re.search(r"--outer.units +4 +of outer$", text, re.MULTILINE)
    assert re.search(r"--outer.deep.units +5$", text, re.MULTILINE)
    blocks = configuration.blocks_text(small)
    assert re.search(r"Kinds\n +big +more of it\n +small +\*\.units 1$", blocks)


@pytest.mark.parametrize("width", [60, 80, 120, 160])
def test_help_fits_a_terminal(width):
    text = configuration.help_text(style=configuration._Style(colour=True, width=width))
    assert "\033[" in text
    plain = re.sub(r"\033\[\d+m", "", text)
    body = plain[plain.index("Blocks for") :].splitlines()
    longest = max(len(configuration._show(value)) for value in load([]).flat().values()) + 60  # a default is never cut
    assert all(len(line) <= max(width, longest if "--" in line else 0) for line in body)


def test_configs_without_a_value_lists_the_blocks():
    done = front_door("--configs")
    assert done.returncode == 0
    for block in set(BLOCKS) - {"defaults"}:
        assert re.search(rf"^  {block} ", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("argv", [["--batchsize", "3"], ["--configs", "nothing"], ["--envs"], ["--envs", "x"]])
def test_a_mistake_is_one_line_and_status_2(argv):
    done = front_door(*argv)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_help_into_a_closed_pipe():
    code = "import config; config.main_load(['--help'])"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f'"{sys.executable}" -c "{code}" | head -n 1'],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


# The files that set the project up


def test_the_requirements_and_the_constraints_agree():
    packaging = pytest.importorskip("packaging.requirements")
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pinned[name.lower().replace("_", "-")] = version
    assert pinned["torch"] == "2.13.0"
    for file in ("requirements.txt", "requirements/test.txt", "requirements/docs.txt"):
        for line in (ROOT / file).read_text().splitlines():
            line = line.partition("#")[0].strip()
            if line:
                requirement = packaging.Requirement(line)
                name = requirement.name.lower().replace("_", "-")
                assert requirement.specifier.contains(pinned[name]), f"{file} against constraints.txt: {name}"


def test_everything_the_dockerfile_copies_exists():
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    copies = [line.split()[1:-1] for line in text.splitlines() if line.startswith("COPY ")]
    assert len(copies) >= 3
    for source in (source for sources in copies for source in sources):
        assert (ROOT / source).exists(), f"the Dockerfile copies {source}"
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert not {source.rstrip("/") for sources in copies for source in sources} & set(ignored)


def make(*argv, **options):
    return subprocess.run(["make", *argv], cwd=ROOT, capture_output=True, text=True, timeout=60, **options)


needs_make = pytest.mark.skipif(not shutil.which("make"), reason="there is no make here")


@needs_make
def test_make_help_lists_the_commands():
    done = make("help")
    for name in ("train", "test", "test-slow", "lint", "tensorboard", "clean"):
        assert re.search(rf"make {name} ", done.stdout)


@pytest.fixture
def set_up(tmp_path):
    """A folder that looks set up, whose Python has no CUDA and prints the command it is given."""
    if not shutil.which("make"):
        pytest.skip("there is no make here")
    for path in ("Makefile", "scripts", "requirements", "requirements.txt", "constraints.txt"):
        source, target = ROOT / path, tmp_path / path
        shutil.copytree(source, target) if source.is_dir() else shutil.copy2(source, target)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    interpreter = tmp_path / ".venv/bin/python"
    interpreter.write_text('#!/bin/sh\n[ "$1" = -c ] && exit ${NO_CUDA:-1}\necho "RUN $MUJOCO_GL $*"\n')
    interpreter.chmod(0o755)
    for stamp in ("made", "installed", "render"):
        (tmp_path / ".venv" / stamp).write_text("osmesa\n")
    clean = {key: value for key, value in os.environ.items() if key not in ("MUJOCO_GL", "MAKEFLAGS", "MAKELEVEL")}

    def run(*argv, **environment):
        done = subprocess.run(
            ["make", "train", *argv], cwd=tmp_path, capture_output=True, text=True, timeout=60, env=clean | environment
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        ([], "--configs dmc_vision_fast"),
        (["TASK=dmc_cartpole_swingup"], "--configs dmc_vision_fast --task dmc_cartpole_swingup"),
        (["CONFIGS=dmc_proprio", "ARGS=--steps 1e5", "LOGDIR=a"], "--configs dmc_proprio_fast --logdir a --steps 1e5"),
        (["CONFIGS=dmc_proprio hierarchical"], "--configs dmc_proprio_fast hierarchical"),
        (["CONFIGS=dmc_proprio size1m"], "--configs dmc_proprio_fast size1m"),
        (["CONFIGS=dmc_proprio_2024"], "--configs dmc_proprio_2024 cpu"),
        (["CONFIGS=atari100k size1m"], "--configs atari100k cpu size1m"),
        (["CONFIGS=cpu dmc_proprio"], "--configs cpu dmc_proprio"),
        (["CONFIGS=dmc_vision_fast"], "--configs dmc_vision_fast"),
        (["CONFIGS=debug"], "--configs debug"),
        (["CONFIGS=exploration hierarchical pinpad"], "--configs exploration hierarchical pinpad"),
        (["NO_CPU_BLOCK=1"], "--configs dmc_vision"),
    ],
)
def test_make_train_without_cuda(set_up, argv, command):
    output = set_up(*argv)
    assert f"RUN osmesa dreamer.py {command}\n" in output
    asked = next((word.removeprefix("CONFIGS=") for word in argv if word.startswith("CONFIGS=")), "dmc_vision")
    remark = None
    if "_fast" in command and "_fast" not in asked:
        asked = asked.split()[0]
        remark = f"No CUDA: {asked}_fast takes the place of {asked} "
    elif " cpu" in command and "cpu" not in asked:
        remark = "No CUDA: the block cpu is added "
    assert (remark in output) if remark else ("No CUDA" not in output)


def test_make_knows_the_blocks_for_a_cpu():
    names = re.search(r"^SMALL = (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    blocks = YAML(typ="safe").load(ROOT / "configs.yaml")
    assert {"debug", *(name for name, block in blocks.items() if block.get("device") == "cpu")} == {*names}


def test_make_train_with_cuda(set_up):
    output = set_up(NO_CUDA="0", MUJOCO_GL="egl")
    assert "RUN egl dreamer.py --configs dmc_vision\n" in output and "No CUDA" not in output


@needs_make
def test_an_unsuitable_python_is_one_line(tmp_path):
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1 && exit\nexit 1\n')
    old.chmod(0o755)
    environment = {**os.environ, "VENV": str(tmp_path / "venv"), "PYTHON": str(old)}
    done = subprocess.run(
        [ROOT / "scripts/setup.sh", "venv"], cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "Python 3.11 or 3.12 is needed" in done.stderr and "Python 3.9.1" in done.stderr
