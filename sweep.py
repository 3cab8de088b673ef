"""Several runs of one JSON file: every combination of the values of its lists, and the table of their results."""

import fnmatch
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import config as configuration
from errors import UserError
from tools import Shutdown


def expand(settings: dict) -> list[dict]:
    """Every combination of the values of lists. What is a list by itself, as image_size, is swept by one of lists."""
    defaults = configuration.load([]).flat()

    def choices(key: str, value) -> list:
        plain = key == "configs" or any(isinstance(defaults[x], (list, tuple)) for x in fnmatch.filter(defaults, key))
        listed = isinstance(value, list) and (not plain or (value and isinstance(value[0], list)))
        return value if listed else [value]

    options = {key: choices(key, value) for key, value in settings.items()}
    for key, values in options.items():
        if not values:
            raise UserError(f"{key} is an empty list: a sweep needs at least one value.")
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


def run_all(trials: list[dict], program: Path, flags: Sequence[str], parallel: int) -> int:
    """`program --config ... flags` for all trials, `parallel` at a time, each in a process and a folder of its own.

    Ends with the table. Ctrl-C and SIGTERM let those that run save and end, and start no other. Exit status: 1 if one
    has failed or was not run.
    """
    swept = [key for key in trials[0] if len({json.dumps(trial[key]) for trial in trials}) > 1]
    folders = [Path(trial["logdir"]) / f"trial{number:03}" for number, trial in enumerate(trials)]

    def run(number: int) -> int | None:
        if shutdown.requested:
            return None
        folder, told = folders[number], False
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.json").write_text(json.dumps(trials[number], indent=2))
        command = [sys.executable, program, "--config", folder / "settings.json", "--logdir", folder, *flags]
        values = ", ".join(f"{key} {trials[number][key]}" for key in swept)
        # With its end of line in one piece: threads write here.
        print(f"{folder.name} of {len(trials)} begins ({values}): {folder / 'output.txt'}\n", end="", flush=True)
        with (folder / "output.txt").open("w") as output:
            # It ends when this end of its stdin closes: with this program, however that ends.
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"DREAMER_PARENT": "1"},
            )
            with process.stdin:
                while True:
                    try:
                        return process.wait(0.2)
                    except subprocess.TimeoutExpired:
                        if shutdown.requested and not told:
                            process.terminate()
                            told = True

    with Shutdown() as shutdown, ThreadPoolExecutor(parallel) as pool:
        codes = list(pool.map(run, range(len(trials))))
    rows = [["trial", *swept, "best eval", "last eval", "last episode", ""]]
    for folder, trial, code in zip(folders, trials, codes, strict=True):
        evals, episodes = (
            logged(folder / "metrics.jsonl", key) if code == 0 else []  # there may be those of an earlier sweep
            for key in ("eval/return", "episode/return")
        )
        results = [max(evals, default=None), *(values[-1] if values else None for values in (evals, episodes))]
        failed = "not run" if code is None else f"failed: {last_line(folder / 'output.txt')}" if code else ""
        numbers = ["-" if value is None else f"{value:.4g}" for value in results]
        rows.append([folder.name, *(str(trial[key]) for key in swept), *numbers, failed])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print("\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows))
    return int(any(code != 0 for code in codes))


def last_line(path: Path) -> str:
    """Of a program's output, and where it is."""
    lines = path.read_text(errors="replace").split("\n")
    return f"{next((line for line in reversed(lines) if line.strip()), '')} ({path})"


def logged(path: Path, key: str) -> list[float]:
    """The values of a metric."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [row[key] for row in map(json.loads, lines) if row.get(key) is not None]
