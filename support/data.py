"""Rows of data: what `--data` names, what is held out, references that can be imitated.

Rows in files are read by row_files.py, domains.py and chartqa.py, loaded only where one is named.
"""

import hashlib
import importlib
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from reward import Example
from support import UserError, parallel, toy

if TYPE_CHECKING:
    from dyme import Policy

T = TypeVar("T")


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
            row_files = importlib.import_module("support.row_files")
            examples, groups, skipped = row_files.read_own(Path(data))
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
