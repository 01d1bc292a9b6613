"""Rows and pictures in files: JSON, your own rows. Loaded where --data names such files."""

import contextlib
import json
import math
import re
import unicodedata
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from reward import FLAG, Example, answers_match, split_response
from support import UserError, parallel

# Examples; what is held back together (empty if there is a val split); what is skipped, and why.
Rows = tuple[list[Example], list[str], list[str]]

# ---- Files of rows -------------------------------------------------------------------------------


def read_text(file: Any, errors: str = "strict") -> str:
    """The text of a UTF-8 file, on disk or in a zip. Raises UserError naming it."""
    try:
        return file.read_bytes().decode("utf-8-sig", errors)
    except Exception as error:  # noqa: BLE001 - zips raise many kinds, alike to the user
        raise UserError(f"{file}: cannot be read ({error})") from None


def parse_json(text: str) -> Any:
    """What a JSON text holds; half a character, which no tokenizer takes, becomes U+FFFD."""
    # Written again, pairs are joined: only halves are left.
    text = json.dumps(json.loads(text), ensure_ascii=False)
    return json.loads(re.sub("[\ud800-\udfff]", "\ufffd", text))


def parse_rows(file: Any) -> list[tuple[str, Any]]:
    """A .json list's or .jsonl's rows, each with its place: row 3, line 7. Raises UserError."""
    text, where = read_text(file), ""
    try:
        if PurePosixPath(file.name).suffix != ".jsonl":
            found = parse_json(text)
            if not isinstance(found, list):
                raise ValueError("it holds no list of rows")
            return [(f"row {number}", row) for number, row in enumerate(found, 1)]
        rows = []
        for number, line in enumerate(text.split("\n"), 1):  # strings may hold other separators
            where = f"line {number}: "
            rows += [(where[:-2], parse_json(line))] if line.strip() else []
        return rows
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({where}{error})") from None


def visible(text: Any) -> bool:
    """Is it a text that shows anything? Spaces, marks of direction and half characters do not."""
    blank = "\u115f\u1160\u2800\u3164\uffa0\ufffd"  # letters and symbols without ink
    return isinstance(text, str) and any(
        unicodedata.category(c)[0] in "LNPS" and c not in blank for c in text)


# ---- Your own rows -------------------------------------------------------------------------------

# Unknown fields are ignored, but for those that are likely to stand for one that is read.
SLIPS = {"img": "image", "images": "image", "picture": "image", "image_path": "image",
         "hints": "trace", "fact": "facts"}
LIKE_A_TRACE = "(?i)rationale|reason|cot|chain|solution|think|thought|trace|expla|steps|analy"


def read_own(path: Path) -> Rows:
    """Read your own rows; those of an image stay together. Raises UserError naming a bad row."""
    found = parse_rows(path)
    examples = [own_row(row, path.parent, f"{path} {place}") for place, row in found]
    unread = {key for _, row in found if not (row.get("trace") or row.get("hint"))
              for key in row if re.match(LIKE_A_TRACE, key)} - {"trace", "hint"}
    said = [(e, split_response(e.trace or "")[1]) for e in examples]
    cut = [e.name for e, answers in said  # a trace may end in its answer line
           if len(answers) > 1 or answers and not answers_match(answers[0], e.answer)]
    if unread and parallel.is_main():
        print(f"{path}: not read: {', '.join(sorted(unread))}; a trace is called `trace`")
    if cut and parallel.is_main():
        print(f"{path}: {len(cut)} traces are cut at a first {FLAG!r} that is not their end; "
              f"the first: {cut[0]}")
    return examples, [row.get("image") or str(row["question"]) for _, row in found], []


def own_row(row: Any, folder: Path, name: str) -> Example:
    """One of your own rows. Raises UserError naming it if it cannot be used."""
    if not isinstance(row, dict):
        raise UserError(f"{name}: is no object {{question, answer, image?, trace?, facts?}}")
    question, answer = (own_text(row, key, name) for key in ("question", "answer"))
    image, trace, hint, facts = (row.get(key) for key in ("image", "trace", "hint", "facts"))
    if not all(isinstance(value, str | None) for value in (image, trace, hint, facts)):
        raise UserError(f"{name}: `image`, `trace`, `hint` and `facts` must be text where given")
    for slip, key in SLIPS.items():
        if slip in row and key not in row:
            raise UserError(f"{name}: `{slip}` is not read; did you mean `{key}`?")
    opener = image_opener(folder / image, name) if image else None
    if split_response(answer)[1]:
        raise UserError(f"{name}: `answer` holds {FLAG!r}, which the format puts before it")
    trace = trace or hint or ""
    return Example(question, answer, opener, trace if visible(trace) else None, facts, name=name)


def own_text(row: dict[str, Any], key: str, name: str) -> str:
    """A row's question or answer. Raises UserError naming the row if nobody could answer it."""
    value = row.get(key)
    if isinstance(value, float) and math.isfinite(value):
        value = format(Decimal(repr(value)), "f")  # as it is said: 0.00005, not 5e-05
    if isinstance(value, bool) or not isinstance(value, str | int):
        kinds = {bool: "true or false", float: "not a number", list: "a list", dict: "an object"}
        kind = kinds.get(type(value), "missing")
        raise UserError(f"{name}: `{key}` is {kind}; give text or a number")
    if not visible(str(value)):
        raise UserError(f"{name}: `{key}` is empty, or shows nothing")
    return str(value).strip()


# ---- Pictures ------------------------------------------------------------------------------------


def image_opener(path: Any, name: str) -> Callable[[], Image.Image]:
    """What decodes an image, on disk or in a zip, as RGB. Raises UserError, now or then."""
    def open_image(header_only: bool = False) -> Image.Image:
        try:
            with path.open("rb") as file:
                image = Image.open(file)
                return image if header_only else to_rgb(image)
        except Exception as error:  # noqa: BLE001 - decoders raise many kinds, alike to the user
            why = f"{type(error).__name__}: {error}"[:160]
            text = f"{name}: the image {path.name[:80]} is missing or unreadable ({why})"
            raise UserError(" ".join(text.split())) from None

    open_image(header_only=True)
    return open_image


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture as a viewer shows it: upright, 8 bits a channel, on white where transparent."""
    image.load()
    with contextlib.suppress(Exception):  # broken notes raise many kinds; the picture is whole
        image = ImageOps.exif_transpose(image)  # cameras note how they were held
    if image.mode.startswith(("I", "F")):  # 16 and 32 bits or floats: convert() cuts off at 255
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        white = next((w for w in (1, 255, 65535) if values.max() <= w), values.max())
        image = Image.fromarray((values / white * 255).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
