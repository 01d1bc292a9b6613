"""Rows of data: what `--data` names, your own rows, pictures, and references that can be imitated.

Published data sets, and traces for them, stand above this file, in domains.py and chartqa.py: they
are loaded only where `--data` names one.
"""

import contextlib
import hashlib
import importlib
import json
import math
import re
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL import Image, ImageOps

import reward
from reward import Example
from support import UserError, parallel, toy

if TYPE_CHECKING:
    from dyme import Policy

T = TypeVar("T")
# Examples; what is held back together (empty if there is a val split); what is skipped, and why.
Rows = tuple[list[Example], list[str], list[str]]


def load_data(data: str, split: str, traces: str = "low", augmented: bool = False,
              hints: str = "") -> list[Example]:
    """Load a split (train, val or test) of what `data` names; `hints` are traces for train.

    Says what is skipped. Raises UserError if nothing can be used, or one of your own rows cannot.
    """
    own = Path(data).suffix in (".json", ".jsonl")
    if hints and (own or data == "toy"):
        raise UserError("--hints belongs to published data; your own rows have a field `trace`")
    if data == "toy":
        return toy.make_examples(split, traces)
    try:
        read = read_own(Path(data), split) if own else read_published(data, split, augmented)
    except (OSError, zipfile.BadZipFile) as error:  # no permission, say
        raise UserError(f"--data {data}: cannot be read ({error})") from None
    examples, groups, skipped = read
    if not examples:
        first = f"; the first is skipped: {skipped[0]}" if skipped else ""
        raise UserError(f"--data {data}: the split {split} has no usable row{first}")
    if groups and split != "test":
        examples = hold_back(examples, groups, split, data)
    told = groups and split == "val"  # with train
    notes = [f"{len(skipped)} skipped (the first: {skipped[0]})"] if skipped and not told else []
    without = sum(not example.trace for example in examples)
    if without and split == "train" and not hints:
        notes.append(f"{without} without a trace, whose answer line alone can be memorized")
    if parallel.is_main() and (notes or not own):
        print("; ".join([f"{name_of(data)} {split}: {len(examples)} rows", *notes]))
    if hints and split == "train":
        return importlib.import_module("support.domains").join(examples, hints)
    return examples


def name_of(data: str) -> str:
    """A short name of what `data` names, for the run folder."""
    domain = re.match(r"(\w\w+):", data)
    return domain[1] if domain else Path(data).stem


def read_published(data: str, split: str, augmented: bool) -> Rows:
    """Read a split of a domain, or of ChartQA. Raises UserError if it is not there."""
    domains = importlib.import_module("support.domains")
    if data.partition(":")[0] not in domains.DOMAINS:
        return importlib.import_module("support.chartqa").read(data, split, augmented)
    if augmented:
        raise UserError("--augmented belongs to ChartQA data")
    return domains.read(data, split)


def hold_back(examples: list[Example], groups: list[str], split: str, data: str) -> list[Example]:
    """Split off a tenth of the groups as val; rows of one group (an image, say) stay together."""
    # In the order of a hash, so that the same rows are held back in every run.
    order = sorted(set(groups), key=lambda group: hashlib.sha256(group.encode()).digest())
    if len(order) < 2:
        raise UserError(f"--data {data}: needs two different images or questions, to hold one out")
    val = set(order[:max(1, len(order) // 10)])
    pairs = zip(examples, groups, strict=True)
    return [example for example, group in pairs if (group in val) == (split == "val")]


def spread(things: Sequence[T], count: int) -> list[T]:
    """At most `count` things, evenly spread over all of them."""
    count = min(count, len(things))
    return [things[i * len(things) // count] for i in range(count)]


# ---- Files of rows -------------------------------------------------------------------------------


def read_text(file: Any, errors: str = "strict") -> str:
    """The text of a UTF-8 file, on disk or in a zip. Raises UserError naming it."""
    try:
        return file.read_bytes().decode("utf-8-sig", errors)
    # In a zip, encryption is a RuntimeError.
    except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None


# No tokenizer takes half a character (a lone surrogate), and no file can hold it. The pattern first
# meets what is to stay: a backslash that stands for itself, and two halves of one character.
HALVES = r"\\\\|\\u[dD][89abAB]\w\w\\u[dD][c-fC-F]\w\w|\\u[dD][89a-fA-F]\w\w"


def parse_rows(file: Any) -> list[tuple[str, Any]]:
    """The rows of a .json list or .jsonl file, also in a zip, each with its place: row 3, line 7.

    Raises UserError naming the file, and the line of a .jsonl.
    """
    text, where, rows = read_text(file), "", []
    mended = re.sub(HALVES, lambda m: r"\ufffd" if len(m[0]) == 6 else m[0], text)
    try:
        if PurePosixPath(file.name).suffix == ".jsonl":
            # Not splitlines(), which also splits at separators that JSON strings may hold.
            for number, line in enumerate(mended.split("\n"), 1):
                where = f"line {number}"
                if line.strip():
                    rows.append((where, json.loads(line)))
        else:
            found = json.loads(mended)
            if not isinstance(found, list):
                raise ValueError("it holds no list of rows")
            rows = [(f"row {number}", row) for number, row in enumerate(found, 1)]
        broken = [place for place, row in rows if "\ufffd" in str(row)] if mended != text else []
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({where}: {error})".replace("(: ", "(")) from None
    if broken and parallel.is_main():
        print(f"{file}: {len(broken)} rows hold half a character (a lone surrogate), which is read "
              f"as U+FFFD; the first is {broken[0]}")
    return rows


def visible(text: Any) -> bool:
    """Is it a text that shows anything? Spaces, marks of direction and half characters do not."""
    blank = "\u115f\u1160\u2800\u3164\uffa0\ufffd"  # letters and symbols without ink
    return isinstance(text, str) and any(
        unicodedata.category(c)[0] in "LNPS" and c not in blank for c in text)


# ---- Your own rows -------------------------------------------------------------------------------

# Unknown fields are ignored, but for those that are likely to stand for one that is read.
SLIPS = {"img": "image", "images": "image", "picture": "image", "image_path": "image",
         "hints": "trace", "fact": "facts"}
LIKE_A_TRACE = r"(?i)(rationale|reason|cot|chain|solution|think|thought|trace|expla|step|analy)\w*"


def read_own(path: Path, split: str) -> Rows:
    """Read your own rows; those of an image stay together. Raises UserError naming a bad row."""
    found = parse_rows(path)
    if not found:
        raise UserError(f"{path}: holds no list of rows")
    examples = [own_row(row, path.parent, f"{path} {place}") for place, row in found]
    unread = {key for _, row in found if not (row.get("trace") or row.get("hint"))
              for key in row if re.fullmatch(LIKE_A_TRACE, key) and key not in ("trace", "hint")}
    if unread and split == "train" and parallel.is_main():
        fields = ", ".join(sorted(unread))
        print(f"{path}: what looks like a trace is not read: {fields}; name it `trace`")
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
    """Return what decodes an image, on disk or in a zip, as RGB, after a look at its header.

    Raises UserError naming the row, now or when it is decoded.
    """

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


# ---- References ----------------------------------------------------------------------------------


def check_references(examples: list[Example], policy: "Policy",
                     length: Callable[[Example], int]) -> list[Example]:
    """The rows, less traces too long to imitate; says which, and what holds a flag or end token.

    `length` is that of prompt and reference in tokens. Raises UserError if an answer is too long.
    """
    ends = [policy.tokenizer.decode([token]) for token in policy.end_ids]
    limit, kept = policy.context, list[Example]()
    notes: dict[str, list[str]] = {}
    for example in examples:
        texts = f"{example.trace or ''}\n{example.answer}".lower()
        for mark in filter(str.strip, (reward.FLAG, *ends)):
            if mark.lower() in texts:
                what = f"hold {mark!r} in trace or answer, which ends a trace or a response early"
                notes.setdefault(what, []).append(example.name)
        # To measure takes time, and few texts have more bytes than half of a context has tokens.
        long = len(texts.encode()) > limit / 2 and length(example) > limit
        if long and example.trace:
            what = f"have a trace too long for the context of {limit} tokens, and keep their answer"
            notes.setdefault(what, []).append(example.name)
            example = replace(example, trace=None)
            long = length(example) > limit
        if long:
            raise UserError(f"{example.name}: question and answer exceed the model's context of "
                            f"{limit} tokens")
        kept.append(example)
    for what, names in notes.items():
        if parallel.is_main():
            print(f"warning: {len(names)} training rows {what}; the first is {names[0]}")
    return kept
