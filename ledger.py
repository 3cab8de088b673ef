"""What a folder of pieces has held and does not hold any more, so that no counter runs backwards when it is pruned."""

import dataclasses
import json
import logging
from pathlib import Path

from files import atomic_write

log = logging.getLogger(__name__)

NAME = "ledger.json"
VERSION = 1


@dataclasses.dataclass
class Removed:
    """Of one stream: what its removed pieces held, and the last of them. Pieces are removed oldest first."""

    entries: int = 0
    steps: int = 0
    episodes: int = 0
    episode: int = -1
    piece: int = -1

    def covers(self, episode: int, piece: int) -> bool:
        return (episode, piece) <= (self.episode, self.piece)

    def add(self, episode: int, piece: int, length: int) -> None:
        self.entries += length
        self.steps += length - (piece == 0)
        self.episodes += episode != self.episode
        self.episode, self.piece = episode, piece


class Ledger:
    """`removed`: {stream: Removed} of a directory; empty where nothing was removed. `lost`: steps that a checkpoint had
    seen, and whose pieces somebody took away.
    """

    def __init__(self, directory: Path):
        self.path = directory / NAME
        self.removed: dict[int, Removed] = {}
        self.lost = 0
        if self.path.exists():
            try:
                content = json.loads(self.path.read_text(encoding="utf-8"))
                if content["version"] != VERSION:
                    raise ValueError(f"version {content['version']}, expected {VERSION}")
                self.lost = int(content["lost"])
                self.removed = {int(ident): Removed(**values) for ident, values in content["streams"].items()}
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                log.warning("%s cannot be read (%s): what was removed is not counted.", self.path, error)

    def of(self, stream: int) -> Removed:
        return self.removed.get(stream, Removed())

    def add(self, stream: int, episode: int, piece: int, length: int) -> None:
        self.removed.setdefault(stream, Removed()).add(episode, piece, length)

    def write(self) -> None:
        """Before the pieces go: a crash in between leaves files that are counted once."""
        streams = {str(ident): dataclasses.asdict(removed) for ident, removed in sorted(self.removed.items())}
        with atomic_write(self.path) as file:
            file.write(json.dumps({"version": VERSION, "lost": self.lost, "streams": streams}).encode())
