"""Files that a crash at any point leaves whole."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from support import UserError

LOCK = "lock"  # the file that is locked while a process works in its folder


def write_atomically(path: Path, text: str) -> None:
    """Replace a plain file in one move: a crash leaves the old one or the new. Raises OSError."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise OSError(errno.EINVAL, "is a link, a folder or a device, not a plain file", str(path))
    new = path.with_name(path.name + ".tmp")
    try:
        new.write_text(text, encoding="utf-8")
        os.replace(new, path)
    except OSError as error:  # a full disk names no file
        remove(new)
        raise OSError(error.errno, error.strerror, str(path)) from None


def remove(path: Path) -> None:
    """Remove a file, a folder or a link (not what it points to), if it is there."""
    if path.is_dir() and not path.is_symlink():
        with contextlib.suppress(OSError):
            path.chmod(0o700)  # one that is read-only could not be emptied
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced_folder(final: Path) -> Iterator[Path]:
    """Give a folder to fill that then replaces `final`; a UserError leaves `final` as it was."""
    new, old = final.with_name(final.name + ".tmp"), final.with_name(final.name + ".old")
    try:
        restore_folder(final)  # after a failure `old` may be the only one
        remove(new)
        remove(old)
        new.mkdir(parents=True)  # also if someone has renamed the run's folder meanwhile
        yield new
        if os.path.lexists(final):  # also a link that leads nowhere
            final.rename(old)
        new.rename(final)
    except (OSError, SafetensorError) as error:
        remove(new)
        with contextlib.suppress(OSError):
            restore_folder(final)
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{final}: cannot be written ({reason}); what was there is kept") from None
    remove(old)


def restore_folder(final: Path) -> None:
    """Undo the first of the two moves of `replaced_folder`, if a crash fell between them."""
    old = final.with_name(final.name + ".old")
    if old.exists() and not os.path.lexists(final):
        old.rename(final)


def to_line(row: dict[str, Any]) -> str:
    """Turn a row into a JSON line; numbers that are not finite, which JSON lacks, become null."""
    finite = json.loads(json.dumps(row), parse_constant=lambda name: None)
    return json.dumps(finite) + "\n"


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append a JSON line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(to_line(row))


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace a file by rows as JSON lines."""
    write_atomically(path, "".join(map(to_line, rows)))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of JSON lines, less what a crash cut off; a missing file is empty."""
    rows = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line.decode()))
    return [row for row in rows if isinstance(row, dict)]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder, which goes if it stays empty. Raises UserError."""
    lock = FileLock(folder / LOCK)  # the system lets go of it when a process dies
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(f"--out {folder}: another process works in it; "
                        "wait for it or name another folder") from None
    try:
        yield
    finally:
        remove(folder / LOCK)
        lock.release()
        with contextlib.suppress(OSError):  # as it is not empty
            folder.rmdir()
