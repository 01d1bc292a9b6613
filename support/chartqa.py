"""ChartQA, and thinking traces made from its charts' tables."""

import csv
import io
import itertools
import math
import re
import zipfile
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

import reward
from reward import Example
from support import UserError, hub, parallel, rows

HUB = "ahmed-masry/ChartQA"
FILE = "ChartQA Dataset.zip"
REVISION = "af8b6f5c08c95085271561c2a3f9d15f2b5a9031"


def find(data: str) -> Any:
    """Find the folder that holds train/, val/ and test/: downloaded (875 MB), local, or inside a zip."""
    if data == "chartqa":
        advice = f"get it from https://huggingface.co/datasets/{HUB} and give its path with --data"
        data = hub.download(data, HUB, FILE, advice, REVISION)
    try:
        root = zipfile.Path(data) if Path(data).is_file() else Path(data)
    except zipfile.BadZipFile:
        raise UserError(f"--data {data}: is not a zip, nor a .json/.jsonl file, nor a folder") from None
    for candidate in (root, root / "ChartQA Dataset"):
        if any((candidate / split).is_dir() for split in ("train", "val", "test")):
            return candidate
    raise UserError(f"--data {data}: not found; give toy, chartqa, a .json/.jsonl file, or a folder or zip "
                    "that holds train/, val/ and test/ as ChartQA does")


def read(root: Any, split: str, augmented: bool) -> list[Example]:
    """Read a ChartQA split, with facts and trace from each chart's table; say what cannot be used."""
    notes: Counter[str] = Counter()
    examples, images = [], []
    # Without a val folder a tenth of train is held back.
    held_back = split in ("train", "val") and not (root / "val").is_dir()
    part = root / ("train" if held_back else split)
    training = split == "train" or held_back
    for kind in ("human", "augmented") if augmented or not training else ("human",):
        file = part / f"{part.name}_{kind}.json"
        for i, entry in enumerate(rows.parse_rows(file) if file.exists() else [], 1):
            name = f"{file.name} row {i}"
            example = read_entry(part, entry, kind, name)
            if example is None:
                notes[f"skipped for an empty question or answer (the first: {name})"] += 1
                continue
            if not example.trace:
                notes["without a trace, which can be explored but only memorized as an answer line"] += 1
            examples.append(example)
            images.append(entry["imgname"])
    if held_back:
        examples = rows.hold_back(examples, images, split, str(root))
    if parallel.is_main():
        said = "".join(f"; {count} {what}" for what, count in notes.items())
        print(f"chartqa {split}: {len(examples)} rows{said}")
    return examples


def read_entry(part: Any, entry: Any, kind: str, name: str) -> Example | None:
    """One question about a chart; None if question or answer is empty. Raises UserError naming it."""
    entry = entry if isinstance(entry, dict) else {}
    if not all(isinstance(entry.get(key), str) for key in ("imgname", "query", "label")):
        raise UserError(f"{name}: needs `imgname`, `query` and `label` as text")
    image, question, answer = entry["imgname"], entry["query"].strip(), entry["label"].strip()
    if PurePosixPath(image).name != image or "\\" in image:
        raise UserError(f"{name}: the image name {image!r} points outside its folder")
    if not question or not answer:
        return None
    table = read_table(part / "tables" / f"{Path(image).stem}.csv")
    opener = rows.image_opener(part / "png" / image, name)
    return Example(question, answer, opener, chart_trace(table, question, answer), table_facts(table) or None,
                   kind, name)


# ---- Thinking traces from a chart's table --------------------------------------------------------


def read_table(path: Any) -> list[list[str]]:
    """Read a chart's CSV table; empty if there is none or it has no values. Raises UserError."""
    if not path.exists():
        return []
    try:
        lines = list(csv.reader(io.StringIO(rows.read_text(path, errors="replace"))))
    except csv.Error:
        return []
    return [[cell.strip() for cell in line] for line in lines if len(line) > 1]


def table_facts(table: list[list[str]]) -> str:
    """Write a table as visual facts I_c, a line per row: `Finland: Trust in news = 62%, ...`."""
    facts = []
    for line in table[1:]:
        cells = [f"{column} = {cell}" for column, cell in zip(table[0][1:], line[1:], strict=False)]
        facts.append(f"{line[0]}: {', '.join(cells)}")
    return "\n".join(facts)


def relevant_cells(table: list[list[str]], question: str, answer: str,
                   most: int = 8) -> list[tuple[str, str, str]]:
    """Pick cells (row, column, value) whose labels the question names, those that hold the answer first."""
    words = set(re.findall(r"\w+", question.lower()))

    def named(labels: list[str]) -> list[int]:
        found = []
        for i, label in enumerate(labels, 1):
            label_words = set(re.findall(r"\w+", label.lower()))
            if label_words and len(words & label_words) >= len(label_words) / 2:
                found.append(i)
        return found or list(range(1, len(labels) + 1))

    cells = []
    named_columns = named(table[0][1:])
    for r in named([line[0] for line in table[1:]]):
        for c in named_columns:
            if c < len(table[r]) and table[r][c] not in ("", "-", "nan"):
                cells.append((table[r][0], table[0][c], table[r][c]))
    hold_answer = [any(reward.answers_match(part, answer) for part in cell) for cell in cells]
    chosen = sorted(range(len(cells)), key=lambda i: not hold_answer[i])[:most]
    return [cells[i] for i in sorted(chosen)]


def chart_trace(table: list[list[str]], question: str, answer: str) -> str | None:
    """Make a Goal / Observation / Reasoning / Conclusion trace quoting relevant cells; None without any."""
    cells = relevant_cells(table, question, answer) if len(table) > 1 else []
    if not cells:
        return None
    observed = ", ".join(f"{row} ({column}) = {value}" for row, column, value in cells)
    return (f"Goal: {question}\nObservation: The chart shows {observed}.\n"
            f"Reasoning: {explain(cells, question, answer)}\nConclusion: The answer is {answer}.")


CUES = ("sum|total|add|differ|average|mean|median|ratio|times|divid|more|less|change|combined|together|"
        "increase|decrease|higher|lower|gap|subtract")


def explain(cells: list[tuple[str, str, str]], question: str, answer: str) -> str:
    """Say how the answer follows from the cells: read off, one arithmetic step, or a comparison."""
    for row, column, value in cells:
        if any(reward.answers_match(part, answer) for part in (value, row, column)):
            return f"Among these, {row} ({column}) with {value} is the one asked for."
    wanted = reward.parse_number(answer)
    # Without a cue in the question, arithmetic that fits is mostly a coincidence.
    if wanted is not None and re.search(CUES, question.lower()):
        for working, value in arithmetic_steps(cells):
            if abs(value - wanted) <= 0.005 * abs(wanted):
                return f"{working} = {answer}."
    return "Comparing these values gives the answer."


def arithmetic_steps(cells: list[tuple[str, str, str]]) -> list[tuple[str, float]]:
    """What one step of arithmetic can make of the cells' numbers: (working, value), the simplest first."""
    numbers = []
    for _, _, text in cells:
        value = reward.parse_number(text)
        if value is not None:
            numbers.append((text.rstrip("%"), value))
    if not numbers:
        return []
    total = " + ".join(text for text, _ in numbers)
    value = sum(value for _, value in numbers)
    steps = [(total, value), (f"({total}) / {len(numbers)}", value / len(numbers))]
    for (a, x), (b, y) in itertools.permutations(numbers, 2):
        steps += [(f"{a} + {b}", x + y), (f"{a} - {b}", x - y)]
        steps += [(f"{a} / {b}", x / y if y else math.nan), (f"({a} + {b}) / 2", (x + y) / 2)]
    return steps
