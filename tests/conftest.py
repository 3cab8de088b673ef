"""Shared by all tests: the project on the path, shapes in type hints checked, MuJoCo headless, few threads."""

import os
import signal
import sys
from pathlib import Path

# Under nohup, or behind `&` in a script, these are ignored, and every process that a test starts would inherit that.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

os.environ.setdefault("MUJOCO_GL", "egl")
sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import pytest  # noqa: E402
import torch  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

torch.set_num_threads(1)  # the networks of tests are too small for more
# Every shape in these rooms' type hints is checked while the tests run.
install_import_hook(
    ["distributions", "returns", "optim", "layers", "modalities", "networks", "models"], "typecheck.checked"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is slow has half an hour, where it does not say otherwise."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(1800))
