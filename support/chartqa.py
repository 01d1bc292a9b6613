"""ChartQA, and thinking traces made from its charts' tables."""

import csv
import functools
import io
import itertools
import re
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import reward
from reward import Example
from support import UserError, data, domains

HUB = ("ahmed-masry/ChartQA", "ChartQA Dataset.zip")  # 875 MB
REVISION = "af8b6f5c08c95085271561c2a3f9d15f2b5a9031"


def read(name: str, split: str, augmented: bool) -> data.Rows:
    """Read a ChartQA split, with facts and trace from each chart's table. Raises UserError."""
    root = find(name)
    # Without a val folder a tenth of train is held back, by image.
    held_back = split in ("train", "val") and not (root / "val").is_dir()
    part = root / ("train" if held_back else split)
    examples, images, skipped = [], [], []
    for kind in ("human", "augmented") if augmented or part.name != "train" else ("human",):
        file = part / f"{part.name}_{kind}.json"
        if file.exists():
            make = functools.partial(chart_example, part, kind)
            pairs, unusable = domains.read_usable(file, make)
            examples += [example for _, example in pairs]
            images += [row["imgname"] for row, _ in pairs]
            skipped += unusable
    return examples, images if held_back else [], skipped


def find(name: str) -> Any:
    """Find the folder that holds train/, val/ and test/: downloaded, local, or inside a zip."""
    advice = f"get it from https://huggingface.co/datasets/{HUB[0]} and give its path with --data"
    path = domains.download(name, HUB, advice, REVISION) if name == "chartqa" else Path(name)
    try:
        root: Any = zipfile.Path(path) if path.is_file() else path
    except zipfile.BadZipFile:
        raise UserError(f"--data {name}: is no zip, .json or .jsonl file, nor a folder") from None
    for candidate in (root, root / "ChartQA Dataset"):
        if any((candidate / split).is_dir() for split in ("train", "val", "test")):
            return candidate
    raise UserError(f"--data {name}: not found; give toy, chartqa, {', '.join(domains.DOMAINS)}, a "
                    ".json/.jsonl file, or a folder or zip with train/, val/, test/ as in ChartQA")


def chart_example(part: Any, kind: str, row: dict[str, Any], name: str) -> Example:
    """One question about a chart. Raises ValueError or UserError if it cannot be used."""
    image, question, answer = (row[key] for key in ("imgname", "query", "label"))
    if PurePosixPath(image).name != image or "\\" in image:
        raise ValueError(f"the image name {image!r} points outside its folder")
    question, answer = question.strip(), answer.strip()
    opener = data.image_opener(part / "png" / image, name)
    table = read_table(part / "tables" / f"{Path(image).stem}.csv")
    return Example(question, answer, opener, chart_trace(table, question, answer),
                   table_facts(table) or None, kind, name, tolerance=0.05)


# ---- Thinking traces from a chart's table --------------------------------------------------------


def read_table(path: Any) -> list[list[str]]:
    """Read a chart's CSV table; empty if there is none, or none with values. Raises UserError."""
    if not path.exists():
        return []
    try:
        lines = list(csv.reader(io.StringIO(data.read_text(path, errors="replace"))))
    except csv.Error:
        return []
    return [[cell.strip() for cell in line] for line in lines if len(line) > 1]


def table_facts(table: list[list[str]]) -> str:
    """Write a table as visual facts I_c, a line per row: `Finland: Trust in news = 62%, ...`."""
    facts = []
    for line in table[1:]:
        pairs = zip(table[0][1:], line[1:], strict=False)
        facts.append(f"{line[0]}: {', '.join(f'{column} = {cell}' for column, cell in pairs)}")
    return "\n".join(facts)


Cell = tuple[str, str, str]  # row, column, value


def relevant_cells(table: list[list[str]], question: str, answer: str, most: int = 8) -> list[Cell]:
    """Pick the cells whose labels the question names, those that hold the answer first."""
    words = set(re.findall(r"\w+", question.lower()))

    def named(labels: list[str]) -> list[int]:
        found = []
        for i, label in enumerate(labels, 1):
            label_words = set(re.findall(r"\w+", label.lower()))
            if label_words and len(words & label_words) >= len(label_words) / 2:
                found.append(i)
        return found or list(range(1, len(labels) + 1))

    columns = named(table[0][1:])
    cells = [(table[r][0], table[0][c], table[r][c])
             for r in named([line[0] for line in table[1:]]) for c in columns
             if c < len(table[r]) and table[r][c] not in ("", "-", "nan")]
    holds = [any(reward.answers_match(part, answer) for part in cell) for cell in cells]
    chosen = sorted(range(len(cells)), key=lambda i: not holds[i])[:most]
    return [cells[i] for i in sorted(chosen)]


def chart_trace(table: list[list[str]], question: str, answer: str) -> str | None:
    """Make a Goal / Observation / Reasoning / Conclusion trace from relevant cells, if any."""
    cells = relevant_cells(table, question, answer) if len(table) > 1 else []
    if not cells:
        return None
    observed = ", ".join(f"{row} ({column}) = {value}" for row, column, value in cells)
    return (f"Goal: {question}\nObservation: The chart shows {observed}.\n"
            f"Reasoning: {explain(cells, question, answer)}\nConclusion: The answer is {answer}.")


CUES = ("sum|total|add|differ|average|mean|median|ratio|times|divid|more|less|change|combined|"
        "together|increase|decrease|higher|lower|gap|subtract")


def explain(cells: list[Cell], question: str, answer: str) -> str:
    """Say how the answer follows from the cells: read off, one arithmetic step, or compared."""
    for row, column, value in cells:
        if any(reward.answers_match(part, answer) for part in (value, row, column)):
            return f"Among these, {row} ({column}) with {value} is the one asked for."
    wanted = reward.parse_number(answer)
    # Without a cue in the question, arithmetic that fits is mostly a coincidence.
    if wanted is not None and re.search(CUES, question.lower()):
        for working, result in arithmetic_steps(cells):
            if abs(result - wanted) <= 0.005 * abs(wanted):
                return f"{working} = {answer}."
    return "Comparing these values gives the answer."


def arithmetic_steps(cells: list[Cell]) -> list[tuple[str, float]]:
    """What one step of arithmetic makes of the cells' numbers: (working, value), simplest first."""
    numbers = [(text.rstrip("%"), value) for _, _, text in cells
               if (value := reward.parse_number(text)) is not None]
    if not numbers:
        return []
    total, sum_ = " + ".join(text for text, _ in numbers), sum(value for _, value in numbers)
    steps = [(total, sum_), (f"({total}) / {len(numbers)}", sum_ / len(numbers))]
    for (a, x), (b, y) in itertools.permutations(numbers, 2):
        steps += [(f"{a} + {b}", x + y), (f"{a} - {b}", x - y)]
        steps += [(f"{a} / {b}", x / y)] if y else []
        steps += [(f"({a} + {b}) / 2", (x + y) / 2)]
    return steps
