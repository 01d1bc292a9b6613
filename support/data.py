"""Rows of data: what `--data` names, your own rows, pictures, references that can be imitated.

Published data sets stand above, in domains.py and chartqa.py, loaded only where one is named.
"""

import contextlib
import hashlib
import importlib
import json
import math
import re
import unicodedata
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL import Image, ImageOps

from reward import FLAG, Example, answers_match, split_response
from support import UserError, parallel, toy

if TYPE_CHECKING:
    from dyme import Policy

T = TypeVar("T")
# Examples; what is held back together (empty if there is a val split); what is skipped, and why.
Rows = tuple[list[Example], list[str], list[str]]


def load_data(data: str, split: str, traces: str = "low", augmented: bool = False,
              hints: str = "") -> list[Example]:
    """Load a split (train, val, test) and say what is skipped. Raises UserError."""
    own = Path(data).suffix in (".json", ".jsonl")
    if Path(data).is_file() and not own and Path(data).suffix != ".zip":
        raise UserError(f"--data {data}: rows are in a file that ends in .json or .jsonl")
    if (hints or augmented) and (own or is_made(data)):
        raise UserError(f"--{'hints' if hints else 'augmented'} belongs to published data")
    if data.partition(":")[0] == "toy":
        return toy.load(data, split, traces)
    if is_made(data):
        made = importlib.import_module(f"support.{data.partition(':')[0]}")
        return made.make_examples(data, split, traces)
    try:
        if own:
            examples, groups, skipped = read_own(Path(data))
        else:
            domains = importlib.import_module("support.domains")
            examples, groups, skipped = domains.read(data, split, augmented)
    except (OSError, zipfile.BadZipFile) as error:  # no permission, say
        raise UserError(f"--data {data}: cannot be read ({error})") from None
    if not examples:
        first = f"; the first is skipped: {skipped[0]}" if skipped else ""
        raise UserError(f"--data {data}: the split {split} has no usable row{first}")
    if groups and split != "test":
        examples = hold_back(examples, groups, split, data)
    notes = []
    if skipped and not (groups and split == "val"):  # then told with train
        notes.append(f"{len(skipped)} skipped (the first: {skipped[0]})")
    without = sum(not example.trace for example in examples)
    if without and split == "train" and not hints:
        notes.append(f"{without} without a `trace`, whose answer line alone can be memorized")
    if parallel.is_main() and (notes or not own):
        print("; ".join([f"{name_of(data)} {split}: {len(examples)} rows", *notes]))
    if hints and split == "train":
        return importlib.import_module("support.domains").join(examples, hints)
    return examples


def held_out(data: str, examples: list[Example], count: int) -> list[Example]:
    """Rows to evaluate on: `count` spread over a split; on the toy also combinations new to it."""
    rows = spread(examples, count)
    return rows + (spread(toy.make_new(), len(rows) // 4) if data == "toy" else [])


def is_made(data: str) -> bool:
    """Are the rows made here: those of the toy, of sums, of charts?"""
    return data.partition(":")[0] in ("toy", "sums", "charts")


def name_of(data: str) -> str:
    """A short name of what `data` names, for the run folder."""
    domain = re.match(r"(\w\w+):", data)
    return domain[1] if domain else Path(data).stem


def hold_back(examples: list[Example], groups: list[str], split: str, data: str) -> list[Example]:
    """Split off a tenth of the groups, the same in every run, as val; a group stays together."""
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


def check_references(examples: list[Example], policy: "Policy",
                     length: Callable[[Example], int]) -> list[Example]:
    """The rows, less traces too long to imitate, by `length` in tokens. Raises UserError."""
    limit, kept, short = policy.context, list[Example](), list[str]()
    picture = getattr(policy.processor, "image_token", None)
    for example in examples:
        if example.image and not hasattr(policy.processor, "image_processor"):
            raise UserError(f"{example.name}: has an image, and this model reads text alone")
        if picture and picture in example.question:
            raise UserError(f"{example.name}: its question holds {picture!r}, which the model "
                            "takes for a picture")
        # To measure takes time, and few texts have more bytes than half of a context has tokens.
        long = len(f"{example.trace or ''}{example.answer}".encode()) > limit / 2
        if long and length(example) > limit:
            example = replace(example, trace=None)
            short.append(example.name)
            if length(example) > limit:
                raise UserError(f"{example.name}: question and answer exceed the model's context "
                                f"of {limit} tokens")
        kept.append(example)
    if short and parallel.is_main():
        print(f"warning: {len(short)} training rows have a trace too long for the context of "
              f"{limit} tokens, and keep their answer; the first is {short[0]}")
    return kept
