"""What is read is never run: a walk over the source. docs/reliability.md says what is read from where."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Unpickled from a pipe to a process that this program started itself, never from a file.
PIPES = {("worker.py", "pickle.loads"): 1, ("envs/__init__.py", "pickle.loads"): 2}
RUNS = {"eval", "exec", "compile", "os.system", "os.popen", "marshal.loads", "marshal.load", "shelve.open"}
RUNS |= {f"{module}.{name}" for module in ("pickle", "cloudpickle", "dill") for name in ("load", "loads", "Unpickler")}
OPENS = {"socket", "socketserver", "http.server", "xmlrpc.server", "asyncio", "flask", "fastapi", "zmq", "grpc"}


def sources():
    skipped = {".venv", "tests", "logdir", "runs", "checkpoints"}
    found = [path.relative_to(ROOT) for path in ROOT.rglob("*.py")]
    return [path for path in found if not skipped & set(path.parts)]


def dangers(text: str) -> list[str]:
    """What a module calls that may run what it reads, and what it imports that opens a port."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [name for name in module if name in OPENS]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in RUNS or given.get("shell") == "True":
            found.append(name)
        if name == "torch.load" and given.get("weights_only") != "True":
            found.append(name)
        if name in ("np.load", "numpy.load", "np.lib.format.read_array") and given.get("allow_pickle") != "False":
            found.append(name)
        if name.rpartition(".")[2] == "YAML" and given.get("typ") != "'safe'":
            found.append(name)
        if name.startswith("yaml.") and "load" in name and "safe" not in name:
            found.append(name)
    return found


def test_nothing_that_is_read_is_run():
    paths = sources()
    assert {Path("dreamer.py"), Path("envs/__init__.py"), Path("benchmarks/faults.py")} <= set(paths)
    for path in paths:
        found = dangers((ROOT / path).read_text(encoding="utf-8"))
        for name in set(found):
            allowed = PIPES.get((path.as_posix(), name), 0)
            assert found.count(name) <= allowed, f"{path} calls {name} {found.count(name)} times"


@pytest.mark.parametrize(
    "line",
    [
        "pickle.load(file)",
        "eval(text)",
        "exec(text)",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "np.load(path)",
        "YAML()",
        "YAML(typ='unsafe')",
        "yaml.load(text)",
        "import http.server",
        "from socketserver import TCPServer",
    ],
)
def test_the_walk_sees(line):
    assert len(dangers(line)) == 1


def test_containers_publish_no_port_to_other_machines():
    published = re.findall(r"-p\s+(\d\S+)", (ROOT / "Dockerfile").read_text() + (ROOT / "README.md").read_text())
    assert published and all(port.startswith("127.0.0.1:") for port in published)
