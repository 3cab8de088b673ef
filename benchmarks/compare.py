"""Times two commands in turn (A, B, A, B, ...), so that whatever else the machine does meets both, and gives the ratio.

    python benchmarks/compare.py --ours "benchmarks/train_step.py --obs proprio --threads 2" \\
        --theirs "PEERS=/peers NT=2 /peers/venv/bin/python /drivers/drv_jax.py --work P" --rounds 3

A command may begin with VAR=value; one that begins with a Python file runs in this interpreter. Its last line of JSON
is read: `median_s` as our benchmarks print it, or `median` (seconds) on a line that begins with `RESULT `, as drivers
of other implementations do. Theirs runs in a temporary folder, as drivers leave files; paths in it are found from here.
"""

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from report import amount, emit, gibibytes, last_json, seconds, table


def main(argv: Sequence[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--ours", required=True, help="command of this project's benchmark")
    parser.add_argument("--theirs", required=True, help="command of the same protocol")
    parser.add_argument("--rounds", type=int, default=3, help="times that each is run")
    parser.add_argument("--limit", type=float, default=1800, help="seconds that a command may take")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: at least 1")
    runs: dict[str, list[dict]] = {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory() as folder:
        for index in range(args.rounds):
            for side, found in runs.items():
                folder_of = {"ours": None, "theirs": folder}[side]
                found.append(run(getattr(args, side), folder_of, args.limit))
                print(f"round {index + 1}, {side}: {seconds(found[-1]['median_s'])}", flush=True)
    both = {side: together(found) for side, found in runs.items()}
    ratios = [a["median_s"] / b["median_s"] for a, b in zip(runs["ours"], runs["theirs"], strict=True)]
    ratio = both["ours"]["median_s"] / both["theirs"]["median_s"]
    show(both, ratio, ratios)
    return emit({"bench": "compare", "rounds": args.rounds, **both, "ratio": ratio, "ratios": ratios})


def split(command: str) -> tuple[dict[str, str], list[str]]:
    """Environment variables and words of a command; paths become absolute, so that it runs in any folder."""
    words, variables = shlex.split(command), {}
    while words and words[0].partition("=")[0].isidentifier() and "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        variables[name] = absolute(value)
    if not words:
        raise SystemExit(f"compare: no command in {command!r}")
    if words[0].endswith(".py"):
        words.insert(0, sys.executable)
    return variables, [absolute(word) for word in words]


def absolute(word: str) -> str:
    return os.path.abspath(word) if os.sep in word and os.path.exists(word) else word


def run(command: str, folder: str | None, limit: float) -> dict:
    """Runs a command and returns its result, with `median_s` and `peak_bytes` under the names used here."""
    variables, words = split(command)
    try:
        done = subprocess.run(
            words, cwd=folder, env=os.environ | variables, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        raise SystemExit(f"compare: not done after {limit:.0f} s: {command}") from None
    except OSError as error:
        raise SystemExit(f"compare: {error.strerror}: {words[0]}") from None
    result = last_json(done.stdout)
    if done.returncode or result is None:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise SystemExit(f"compare: {command}\nended with status {done.returncode} and no result:\n{tail}")
    if "median" in result:
        result.setdefault("median_s", result["median"])
    if "peak_rss_gib" in result:
        result.setdefault("peak_bytes", round(result["peak_rss_gib"] * 2**30))
    if not isinstance(result.get("median_s"), int | float):
        raise SystemExit(f"compare: {command}\nits last line of JSON has neither median_s nor median")
    return result


def together(runs: list[dict]) -> dict:
    """The median over rounds, with the lowest and highest of them; parameters and memory where they are told."""
    medians = [run["median_s"] for run in runs]
    out = {"median_s": statistics.median(medians), "min_s": min(medians), "max_s": max(medians)}
    peaks = [run["peak_bytes"] for run in runs if run.get("peak_bytes")]
    noisy = [run.get("noisy", run.get("n_noisy")) for run in runs]
    return out | {
        "params": runs[0].get("params"),
        "peak_bytes": max(peaks) if peaks else None,
        "noisy": sum(noisy) if None not in noisy else None,
    }


def show(both: dict[str, dict], ratio: float, ratios: list[float]) -> None:
    def told(value: float | None, text) -> str:
        return "not told" if value is None else text(value)

    rows = [
        ("median of the rounds' medians", *(seconds(side["median_s"]) for side in both.values())),
        ("lowest to highest", *(f"{seconds(side['min_s'])} to {seconds(side['max_s'])}" for side in both.values())),
        ("samples beside busy neighbours", *(told(side["noisy"], str) for side in both.values())),
        ("parameters", *(told(side["params"], amount) for side in both.values())),
        ("peak memory", *(told(side["peak_bytes"], gibibytes) for side in both.values())),
    ]
    title = f"ours / theirs = {ratio:.3f} (by rounds: {', '.join(f'{r:.3f}' for r in ratios)})"
    table(title, ("", *both), rows)


if __name__ == "__main__":
    main()
