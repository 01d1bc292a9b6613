"""Files that a crash at any point leaves whole."""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one move: a crash leaves the old one or the new one."""
    new = path.with_name(path.name + ".tmp")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


@contextlib.contextmanager
def replaced_folder(final: Path) -> Iterator[Path]:
    """A new folder to fill, which then takes the place of `final`; the old one goes last."""
    new, old = final.with_name(final.name + ".tmp"), final.with_name(final.name + ".old")
    for folder in (new, old):
        shutil.rmtree(folder, ignore_errors=True)
    new.mkdir()
    yield new
    if final.exists():
        final.rename(old)
    new.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def restore_folder(final: Path) -> None:
    """Undo the first of the two moves of `replaced_folder`, if a crash fell between them."""
    old = final.with_name(final.name + ".old")
    if old.exists() and not final.exists():
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
    """Read JSON lines; a line cut short by a crash is left out, a missing file is empty."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").split("\n"):
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON lines, at one stroke."""
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
