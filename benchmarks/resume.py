"""A training run that is stopped in the middle and resumed by the same command: what it learned, and that it went on.

    python benchmarks/resume.py --seconds 240 --logdir /tmp/walker -- --configs dmc_vision --task dmc_walker_walk

Twice `dreamer.py` gets `--seconds`, then Ctrl-C. The exit status is 1 unless the second half began where the first
ended and went further. The first half starts a new folder; one that holds a run already is an error.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import common
from report import emit, table

import tools

GRACE = 90  # seconds to save and end


def main(argv: Sequence[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seconds", type=float, default=240, help="length of each half")
    parser.add_argument("--logdir", type=Path, required=True)
    parser.add_argument("keys", nargs="+", help="arguments of dreamer.py, after --")
    args = parser.parse_args(argv)
    if (args.logdir / "latest.pt").exists():
        raise SystemExit(f"{args.logdir} holds a run already: give another --logdir")
    halves = [half(args.keys, args.logdir, args.seconds) for _ in range(2)]
    before, after = (found["counters"] for found in halves)
    resumed = f"Resuming at frame {before['frames']:,}, update {before['updates']:,}" in halves[1]["output"]
    went_on = resumed and after["updates"] > before["updates"] and after["frames"] >= before["frames"]
    returns = read_returns(args.logdir / "metrics.jsonl")
    result = {
        "bench": "resume",
        "frames": [before["frames"], after["frames"]],
        "updates": [before["updates"], after["updates"]],
        "seconds": [found["seconds"] for found in halves],
        "returns": returns,
        "went_on": went_on,
    }
    rows = [
        (name, f"{counters['frames']:,}", f"{counters['updates']:,}", f"{found['seconds']:.0f} s")
        for name, counters, found in zip(("first", "second"), (before, after), halves, strict=True)
    ]
    table(f"resumed: {'yes' if went_on else 'NO'}", ("half", "frames", "updates", "wall-clock"), rows)
    print("evaluations (frame, return): " + (", ".join(f"{f:,}: {r:.0f}" for f, r in returns) or "none"))
    return emit(result)


def half(keys: list[str], logdir: Path, limit: float) -> dict:
    """Runs for so long, then interrupts as Ctrl-C does and waits for the checkpoint."""
    command = [sys.executable, str(common.ROOT / "dreamer.py"), *keys, "--logdir", str(logdir)]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            output, _ = process.communicate(timeout=GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            raise SystemExit(f"resume: no end {GRACE} s after Ctrl-C") from None
    if process.returncode or not (logdir / "latest.pt").exists():
        raise SystemExit("\n".join([*output.splitlines()[-15:], f"resume: status {process.returncode}, no checkpoint"]))
    seconds = time.perf_counter() - start
    return {"counters": tools.load_checkpoint(logdir / "latest.pt")["counters"], "output": output, "seconds": seconds}


def read_returns(path: Path) -> list[tuple[int, float]]:
    """Frame and return of each evaluation."""
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return [(line["step"], line["eval/return"]) for line in lines if "eval/return" in line]


if __name__ == "__main__":
    sys.exit(not common.command(main)["went_on"])
