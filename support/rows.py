"""Reading rows and images from files, and your own rows."""

import contextlib
import hashlib
import json
import re
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageOps

from reward import Example
from support import UserError, parallel

T = TypeVar("T")

# What reading a file raises, on disk or in a zip: there, encryption is a RuntimeError.
UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error)


def read_text(file: Any, errors: str = "strict") -> str:
    """The text of a UTF-8 file, on disk or in a zip. Raises UserError naming it."""
    try:
        return file.read_bytes().decode("utf-8-sig", errors)
    except UNREADABLE as error:
        raise UserError(f"{file}: cannot be read ({error})") from None


def parse_rows(file: Any) -> list[Any]:
    """The rows of a .json list or a .jsonl file, on disk or in a zip.

    Raises UserError naming the file, and the line of a .jsonl.
    """
    where, text = "", read_text(file)
    try:
        if PurePosixPath(file.name).suffix == ".jsonl":
            rows = []
            # Not splitlines(), which also splits at other separators that JSON strings may hold.
            for number, line in enumerate(text.split("\n"), 1):
                where = f"line {number}: "
                if line.strip():
                    rows.append(json.loads(line))
        else:
            rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({where}{error})") from None
    if not isinstance(rows, list):
        raise UserError(f"{file}: holds no list of rows")
    if re.search(r"\\u[dD][89a-fA-F]", text):  # else no row can hold a half character
        rows = mend_rows(rows, file)
    return rows


def mend_rows(rows: list[Any], file: Any) -> list[Any]:
    """Replace half characters (lone surrogates), which no tokenizer takes and no file can hold, by U+FFFD."""

    def mend(value: Any) -> Any:
        if isinstance(value, str):
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if isinstance(value, list):
            return [mend(item) for item in value]
        if isinstance(value, dict):
            return {mend(key): mend(item) for key, item in value.items()}
        return value

    mended = mend(rows)
    changed = [i for i, (old, new) in enumerate(zip(rows, mended, strict=True), 1) if old != new]
    if changed and parallel.is_main():
        print(f"{file}: {len(changed)} rows hold half a character (a lone surrogate), which is read as U+FFFD; "
              f"the first is row {changed[0]}")
    return mended


def read_rows(path: Path, split: str) -> list[Example]:
    """Read your own rows {question, answer, image?, trace?, facts?}: a tenth is held back as val, test is all.

    Raises UserError naming the file and the row that cannot be used.
    """
    found = parse_rows(path)
    if not found:
        raise UserError(f"{path}: holds no list of rows {{question, answer, image?, trace?, facts?}}")
    examples, groups = [], []
    for i, row in enumerate(found, 1):
        name = f"{path} row {i}"
        examples.append(own_row(row if isinstance(row, dict) else {}, path.parent, name))
        groups.append(row.get("image") or str(row["question"]))
    if split == "test":
        return examples
    return hold_back(examples, groups, split, str(path))


# Unknown fields are ignored, but for those that are likely to stand for one that is read.
SLIPS = {"img": "image", "images": "image", "picture": "image", "image_path": "image", "hints": "trace",
         "fact": "facts"}


def own_row(row: dict[str, Any], folder: Path, name: str) -> Example:
    """One of your own rows. Raises UserError naming it if it cannot be used."""
    question, answer, image = row.get("question"), row.get("answer"), row.get("image")
    for value in (question, answer):
        if not isinstance(value, str | int | float) or not str(value).strip():
            raise UserError(f"{name}: needs a non-empty `question` and `answer`")
    if not all(isinstance(row.get(key), str | None) for key in ("image", "trace", "hint", "facts")):
        raise UserError(f"{name}: `image`, `trace` (or `hint`) and `facts` must be text where given")
    for slip, key in SLIPS.items():
        if slip in row and key not in row:
            raise UserError(f"{name}: `{slip}` is not read; did you mean `{key}`?")
    opener = image_opener(folder / image, name) if image else None
    return Example(str(question), str(answer).strip(), opener, row.get("trace") or row.get("hint") or None, row.get("facts"),
                   name=name)


def image_opener(path: Any, name: str) -> Callable[[], Image.Image]:
    """Return what decodes an image, on disk or in a zip, as RGB, after a look at its header.

    Raises UserError naming the row, now or when it is decoded.
    """

    def open_image(header_only: bool = False) -> Image.Image:
        try:
            with path.open("rb") as file:
                image = Image.open(file)
                return image if header_only else to_rgb(image)
        except Exception as error:  # noqa: BLE001 - decoders raise many kinds, all alike to the user
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            raise UserError(f"{name}: the image {path.name} is missing or unreadable ({reason})") from None

    open_image(header_only=True)
    return open_image


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture as a viewer shows it: upright, on white where it is transparent, with 8 bits a channel."""
    image.load()
    with contextlib.suppress(Exception):  # broken notes raise many kinds; the picture itself is whole
        image = ImageOps.exif_transpose(image)  # cameras note how they were held
    if image.mode.startswith(("I", "F")):
        # 16 and 32 bits or floats: convert() would cut off what is above 255.
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        # White is 65535 for 16 bits; else it is not written down, but one of these is usual.
        whites = (65535,) if image.mode.startswith("I;16") else (1, 255, 65535)
        white = next((w for w in whites if values.max() <= w), values.max())
        image = Image.fromarray((values / white * 255).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def shrink(image: Image.Image, longest_edge: int) -> Image.Image:
    """Limit the longest edge to that many pixels (0: leave it as it is)."""
    image.thumbnail((longest_edge or image.width, longest_edge or image.height))
    return image


def spread(things: list[T], count: int) -> list[T]:
    """At most `count` things, evenly spread over all of them."""
    count = min(count, len(things))
    return [things[i * len(things) // count] for i in range(count)]


def hold_back(examples: list[Example], groups: list[str], split: str, source: str) -> list[Example]:
    """Split off a tenth of the groups as val, where a data set has none; rows of one image stay together."""
    # In the order of a hash, so that the same rows are held back in every run.
    order = sorted(set(groups), key=lambda group: hashlib.sha256(group.encode()).digest())
    if len(order) < 2:
        raise UserError(f"--data {source}: needs two different images or questions, one to be held out")
    val = set(order[:max(1, len(order) // 10)])
    return [e for e, group in zip(examples, groups, strict=True) if (group in val) == (split == "val")]
