"""What `--data` names: the toy, ChartQA, another domain, or your own rows."""

import zipfile
from pathlib import Path

from reward import Example
from support import UserError, chartqa, domains, references, rows, toy


def load_data(data: str, split: str, traces: str = "low", augmented: bool = False,
              hints: str = "") -> list[Example]:
    """Load a split (train, val or test) of what `data` names; `hints` are traces for train.

    Raises UserError if it cannot be used.
    """
    try:
        examples = read(data, split, traces, augmented)
    except (OSError, zipfile.BadZipFile) as error:  # no permission, say
        raise UserError(f"--data {data}: cannot be read ({error})") from None
    return references.join(examples, hints) if hints and split == "train" else examples


def read(data: str, split: str, traces: str, augmented: bool) -> list[Example]:
    """Read a split of the toy, a domain, own rows or ChartQA."""
    path = Path(data)
    if data == "toy":
        return toy.make_examples(split, traces)
    if data.partition(":")[0] in domains.DOMAINS:
        return domains.read(data, split)
    if path.suffix in (".json", ".jsonl"):
        return rows.read_rows(path, split)
    examples = chartqa.read(chartqa.find(data), split, augmented)
    if not examples:
        raise UserError(f"--data {data}: the split {split} has no usable row")
    return examples


def name_of(data: str) -> str:
    """A short name of what `data` names, for the run folder."""
    name = data.partition(":")[0]
    return name if name in domains.DOMAINS else Path(data).stem
