"""Files that a crash at any point leaves whole."""

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from support import UserError

try:
    import fcntl
except ImportError:  # Windows, where files are locked in another way
    fcntl = None

LOCK = "lock"  # the file that is locked

# ---- Writing -------------------------------------------------------------------------------------


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one move: a crash leaves the old one or the new one.

    Raises OSError if the path is not a regular file: a device or a link would be gone.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise OSError(errno.EINVAL, "is a link, a folder or a device, not a plain file", str(path))
    new = path.with_name(path.name + ".tmp")
    with removed_on_error(new):
        new.write_text(text, encoding="utf-8")
        os.replace(new, path)


@contextlib.contextmanager
def removed_on_error(path: Path) -> Iterator[None]:
    """Take away what an error, such as a full disk, has left half written."""
    try:
        yield
    except BaseException:
        remove(path)
        raise


def remove(path: Path) -> None:
    """Remove a file, a folder or a link (not what it points to), if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced_folder(final: Path) -> Iterator[Path]:
    """A new folder to fill, which then takes the place of `final`; the old one goes last."""
    new, old = final.with_name(final.name + ".tmp"), final.with_name(final.name + ".old")
    for folder in (new, old):
        remove(folder)
    new.mkdir()
    with removed_on_error(new):
        yield new
    if os.path.lexists(final):  # also if it is a link that leads nowhere
        final.rename(old)
    new.rename(final)
    remove(old)


def restore_folder(final: Path) -> None:
    """Undo the first of the two moves of `replaced_folder`, if a crash fell between them."""
    old = final.with_name(final.name + ".old")
    if old.exists() and not os.path.lexists(final):
        old.rename(final)


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append one JSON line; numbers that are not finite become null."""
    finite = {}
    for key, value in row.items():
        broken = isinstance(value, float) and not math.isfinite(value)
        finite[key] = None if broken else value
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read the objects of JSON lines; a line that holds none is left out, such as one that a crash cut short.

    A missing file is empty, and so is a device, which might never end.
    """
    rows = []
    if path.is_dir() or path.is_file():  # a folder is an error
        for line in path.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError, RecursionError):
                rows.append(json.loads(line.decode()))
    return [row for row in rows if isinstance(row, dict)]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON lines, at one stroke."""
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


# ---- One process at a time -----------------------------------------------------------------------


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder. Raises UserError if one is in it.

    The system itself lets go of the lock when a process dies, however that happens.
    """
    path = folder / LOCK
    with path.open("a+") as file:
        # The one that held the lock may have removed the file since it was opened.
        if not (lock(file) and path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))):
            raise UserError(f"--out {folder}: another process works in it; wait for it or name another folder")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows keeps open files
                path.unlink()


def lock(file: IO[str]) -> bool:
    """Lock an open file for this process, if no other has; where locks are unknown, it counts as locked."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt
            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        # Some network file systems have no locks.
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK)
    return True
