"""Files that are either whole or not there, and errors of the disk as lines for the user."""

import contextlib
import errno
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from errors import UserError


@contextlib.contextmanager
def disk_errors(path: Path, needed: int = 0, earlier: str = "") -> Iterator[None]:
    """Turns an OSError while `path` is written into a UserError that names it.

    needed: bytes to be written, where known. earlier: what to say about an earlier file of that name.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error).partition("\n")[0]
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"Could not write {path}: {reason}. {earlier}"
                "Check the folder, its permissions and its space, or choose another --logdir."
            ) from error
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        size = f"{needed / 2**20:.1f} MiB needed, " if needed else ""
        free = f"{shutil.disk_usage(folder).free / 2**20:.1f} MiB free"
        raise UserError(
            f"Could not write {path}: {reason} ({size}{free}). {earlier}Free some space and run the same command again."
        ) from error


def machine_failed(error: Exception) -> bool:
    """Whether a file could not be read for another reason than its bytes: no more open files, a disk or network that
    fails. Bytes can cause EINVAL, for a place that does not exist.
    """
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)


@contextlib.contextmanager
def atomic_write(path: str | Path, needed: int = 0, keep: str = "") -> Iterator[io.BufferedWriter]:
    """A binary file that takes the place of `path` when the block ends well; otherwise `path` stays as it was.

    keep: the name, in the same folder, that the earlier file goes on under.

    Written beside it under a temporary name, synced, renamed, and the folder synced. The name is always the same, so
    that what a killed process left behind is overwritten and never piles up. A failure is a UserError.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_errors(path, needed, "The earlier file is intact. " if path.exists() else ""):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if keep:
                _keep_as(path, path.with_name(keep))
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def _keep_as(path: Path, kept: Path) -> None:
    """Gives `path`, if it is there, a second name, so that no moment is without it."""
    if not path.exists():
        return
    second = kept.with_name(f".{kept.name}.tmp")
    try:
        second.unlink(missing_ok=True)
        os.link(path, second)
        os.replace(second, kept)
    except OSError:  # no links there: for a moment, the kept name is the only one
        os.replace(path, kept)


def sync_folder(path: Path) -> None:
    """Makes names that were changed in a folder last, where its file system can (SMB and some others cannot)."""
    try:
        folder = os.open(path, os.O_RDONLY)
    except OSError:
        return
    with contextlib.suppress(OSError):
        os.fsync(folder)
    os.close(folder)
