"""How benchmarks report: a table for people, and one last line of JSON for programs."""

import json
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table


def table(title: str, head: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Prints a table: the first column is text, the others are aligned as numbers."""
    out = Table()
    for index, name in enumerate(head):
        out.add_column(name, justify="right" if index else "left")
    for row in rows:
        out.add_row(*map(str, row))
    console = Console(markup=False, highlight=False)
    console.width = max(console.width, 120)  # a pipe is 80 wide, which would cut the numbers
    console.print(title, style="bold")
    console.print(out)


def emit(result: Mapping) -> dict:
    """Prints the last line, which `compare.py` and `gpu.sh` read, and returns what it holds."""
    print(json.dumps(result, allow_nan=False), flush=True)
    return dict(result)


def last_json(text: str) -> dict | None:
    """What the last line of JSON in a program's output holds; a line may begin with `RESULT `."""
    for line in reversed(text.splitlines()):
        start = line.removeprefix("RESULT ").strip()
        if start.startswith("{"):
            try:
                return json.loads(start)
            except json.JSONDecodeError:
                continue
    return None


def seconds(value: float) -> str:
    """Three digits with the unit that suits."""
    for unit, scale in (("s", 1), ("ms", 1e3), ("µs", 1e6)):
        if value * scale >= 1:
            return f"{value * scale:.3g} {unit}" if value * scale < 100 else f"{value * scale:.0f} {unit}"
    return f"{value * 1e9:.3g} ns"


def amount(value: float, unit: str = "") -> str:
    """Three digits with a decimal prefix: 1.23 G."""
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def gibibytes(value: float) -> str:
    return f"{value / 2**30:.2f} GiB"


def share(value: float) -> str:
    return f"{100 * value:.1f} %"
