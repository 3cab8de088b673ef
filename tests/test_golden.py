"""The reference's own numbers, and that the comparison would notice a difference."""

import subprocess
import sys
from pathlib import Path

import golden
import numpy as np
import pytest
import torch

FILES = sorted((Path(__file__).parent / "golden").glob("*.npz"))


def test_both_files_are_here():
    assert [path.stem for path in FILES] == ["image_discrete", "vector_continuous"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_agrees_with_reference(path):
    errors, _ = golden.check(str(path))
    assert golden.within(errors), {kind: max(rows.values()) for kind, rows in errors.items()}
    assert len(errors["gradient"]) > 60 and len(errors["movement"]) > 60 and len(errors["loss"]) >= 20


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_command_line_and_dump(path, tmp_path):
    out = tmp_path / "dump.npz"
    run = subprocess.run(
        [sys.executable, golden.__file__, str(path), "--dump", str(out)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    expected, dumped = np.load(path), np.load(out)
    compared = [k for k in expected.files if k.startswith(("out:loss", "out:post/", "grad:", "after:"))]
    assert compared and set(compared) <= set(dumped.files)
    assert all(dumped[k].shape == expected[k].shape for k in compared)


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_agrees_with_reference_when_compiled(path):
    command = [sys.executable, golden.__file__, str(path), "--compile", "--device", "cpu"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("flags", [(), ("--compile",)], ids=["written", "compiled"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_agrees_with_reference_on_a_gpu(path, flags):
    command = [sys.executable, golden.__file__, str(path), "--device", "cuda", *flags]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("change", [{"horizon": 100}, {"lam": 0.9}, {"imag_horizon": 14}], ids=str)
def test_other_settings_disagree(change):
    errors, _ = golden.check(str(FILES[1]), **change)
    assert not golden.within(errors)


@pytest.mark.parametrize(
    "key", ["param:dyn/dyngru/kernel", "out:post/deter", "grad:enc/mlp0/kernel", "after:val/head/logits/bias"]
)
def test_a_changed_number_is_noticed(key, tmp_path):
    arrays = dict(np.load(FILES[1]))
    arrays[key] = arrays[key] * 1.02
    np.savez(tmp_path / "changed.npz", **arrays)
    errors, _ = golden.check(str(tmp_path / "changed.npz"))
    assert not golden.within(errors)


def test_image_and_vector_together(tmp_path):
    """A file with both kinds of observation, other sizes and another batch shape, is understood: written here, read
    back.
    """
    import config as configuration
    from dreamer import Dreamer

    spaces = {"image": golden.gs.Box(0, 255, (32, 16, 1), np.uint8), "state": golden.gs.Box(-9, 9, (3,), np.float32)}
    flags = (
        "--dyn.deter 24 --dyn.hidden 10 --dyn.stoch 3 --dyn.discrete 5 --dyn.blocks 3 --*.units 8 --encoder.depth 1 "
        "--decoder.depth 1 --encoder.mults 3,6 --decoder.mults 3,6 --decoder.blocks 3 --*.bins 21 --encoder.layers 2 "
        "--decoder.layers 2 --actor.layers 2 --reward_head.layers 2 --device cpu"
    )
    agent = Dreamer(spaces, golden.gs.Box(-1, 1, (2,), np.float32), configuration.load(flags.split()))
    generator = np.random.default_rng(0)
    names = golden.Names(agent)
    arrays = {}
    for tensor, name, _, to_reference in names.pairs:
        arrays[f"param:{name}"] = to_reference(tensor.detach().numpy()) + generator.normal(0, 0.1, 1).astype(np.float32)
    for n in range(3):
        prefix = f"in{n or ''}:"
        arrays |= {
            f"{prefix}image": generator.integers(0, 256, (3, 4, 32, 16, 1), dtype=np.uint8),
            f"{prefix}state": generator.normal(size=(3, 4, 3)).astype(np.float32),
            f"{prefix}reward": generator.normal(size=(3, 4)).astype(np.float32),
            f"{prefix}action": generator.normal(size=(3, 4, 2)).astype(np.float32),
            **{f"{prefix}{flag}": generator.random((3, 4)) < 0.2 for flag in ("is_first", "is_last", "is_terminal")},
        }
    arrays |= {"out:post/logit": np.zeros((3, 4, 3, 5), np.float32)}
    np.savez(tmp_path / "a.npz", **arrays)
    reference = golden.Reference(str(tmp_path / "a.npz"))
    found = golden.compute(reference, *golden.build(reference, 50, 0.9, 3))
    np.savez(tmp_path / "b.npz", **{**arrays, **found})
    errors, _ = golden.check(str(tmp_path / "b.npz"), 50, 0.9, 3)
    assert golden.within(errors) and len(errors["gradient"]) > 90
