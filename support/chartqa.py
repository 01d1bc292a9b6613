"""ChartQA, and thinking traces made from its charts' tables."""

import csv
import functools
import itertools
import math
import re
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import reward
from reward import Example
from support import UserError, domains, row_files

HUB = ("ahmed-masry/ChartQA", "ChartQA Dataset.zip")  # 875 MB
REVISION = "af8b6f5c08c95085271561c2a3f9d15f2b5a9031"


def read(name: str, split: str, augmented: bool) -> row_files.Rows:
    """Read a ChartQA split, with facts and trace from each chart's table. Raises UserError."""
    root = find(name)
    held_back = split != "test" and not (root / "val").is_dir()  # a tenth of train, by image
    part = root / ("train" if held_back else split)
    pairs, skipped = [], []
    for kind in ("human", "augmented") if augmented or part.name != "train" else ("human",):
        file = part / f"{part.name}_{kind}.json"
        if file.exists():
            make = functools.partial(chart_example, part, kind)
            found, unusable = domains.read_usable(file, make)
            pairs += found
            skipped += unusable
    images = [row["imgname"] for row, _ in pairs] if held_back else []
    return [example for _, example in pairs], images, skipped


def find(name: str) -> Any:
    """Find the folder that holds train/, val/ and test/: downloaded, local, or inside a zip."""
    path = Path(name)
    if name == "chartqa":
        advice = f"get it from https://huggingface.co/datasets/{HUB[0]} and give its path"
        path = domains.download(name, HUB, advice, REVISION) / HUB[1]
    root: Any = zipfile.Path(path) if path.is_file() else path
    for candidate in (root, root / "ChartQA Dataset"):
        if any((candidate / split).is_dir() for split in ("train", "val", "test")):
            return candidate
    raise UserError(f"--data {name}: not found; give toy, chartqa, {', '.join(domains.DOMAINS)}, a "
                    ".json/.jsonl file, or a folder or zip with train/, val/, test/ as in ChartQA")


def chart_example(part: Any, kind: str, row: dict[str, Any], name: str) -> Example:
    """One question about a chart. Raises ValueError or UserError if it cannot be used."""
    image, question, answer = row["imgname"], row["query"].strip(), row["label"].strip()
    if PurePosixPath(image).name != image or "\\" in image:
        raise ValueError(f"the image name {image!r} points outside its folder")
    opener = row_files.image_opener(part / "png" / image, name)
    table = read_table(part / "tables" / f"{Path(image).stem}.csv")
    return Example(question, answer, opener, chart_trace(table, question, answer),
                   table_facts(table) or None, kind, name, tolerance=0.05)


# ---- Thinking traces from a chart's table --------------------------------------------------------


def read_table(path: Any) -> list[list[str]]:
    """Read a chart's CSV table; empty if there is none, or none with values. Raises UserError."""
    lines = row_files.read_text(path, errors="replace").splitlines(True) if path.exists() else []
    return [[cell.strip() for cell in line] for line in csv.reader(lines) if len(line) > 1]


def table_facts(table: list[list[str]]) -> str:
    """Write a table as visual facts I_c, a line per row: `Finland: Trust in news = 62%, ...`."""
    facts = []
    for label, *cells in table[1:]:
        pairs = zip(table[0][1:], cells, strict=False)
        facts.append(f"{label}: {', '.join(map(' = '.join, pairs))}")
    return "\n".join(facts)


def named(labels: list[str], question: str) -> list[int]:
    """Which labels have half of their words in the question; all, if none has."""
    asked = set(re.findall(r"\w+", question.lower()))
    words = [set(re.findall(r"\w+", label.lower())) for label in labels]
    found = [i for i, label in enumerate(words) if label and 2 * len(asked & label) >= len(label)]
    return found or [*range(len(labels))]


def chart_trace(table: list[list[str]], question: str, answer: str) -> str | None:
    """Make a Goal / Observation / Reasoning / Conclusion trace from cells that the question names.

    At most eight, those that hold the answer first; None without any.
    """
    (_, *columns), *rows = table or [[""]]
    cells = [(rows[r][0], columns[c], rows[r][c + 1])
             for r in named([row[0] for row in rows], question) for c in named(columns, question)
             if rows[r][c + 1:] and rows[r][c + 1] not in ("", "-", "nan")]
    holding = [cell for cell in cells if any(reward.answers_match(part, answer) for part in cell)]
    chosen = sorted(cells, key=lambda cell: cell not in holding)[:8]
    cells = [cell for cell in cells if cell in chosen]
    if not cells:
        return None
    if holding:
        row, column, value = holding[0]
        reasoning = f"Among these, {row} ({column}) with {value} is the one asked for."
    else:
        reasoning = explain(cells, question, answer)
    observed = ", ".join(f"{row} ({column}) = {value}" for row, column, value in cells)
    return (f"Goal: {question}\nObservation: The chart shows {observed}.\n"
            f"Reasoning: {reasoning}\nConclusion: The answer is {answer}.")


def explain(cells: list[tuple[str, str, str]], question: str, answer: str) -> str:
    """How the answer follows from cells (row, column, value): one arithmetic step, or compared."""
    wanted = reward.parse_number(answer)
    numbers = [(text.rstrip("%"), value) for _, _, text in cells
               if (value := reward.parse_number(text)) is not None]
    # Without a cue in the question, arithmetic that fits is mostly a coincidence.
    cued = numbers and wanted is not None and re.search(
        "sum|total|add|differ|average|mean|median|ratio|times|divid|more|less|change|combined|"
        "together|increase|decrease|higher|lower|gap|subtract", question.lower())
    for group in (numbers, *itertools.permutations(numbers, 2)) if cued else ():
        texts, values = zip(*group, strict=True)
        terms, total = " + ".join(texts), sum(values)
        steps = {terms: total, f"({terms}) / {len(group)}": total / len(group)}
        if len(group) == 2:
            steps |= {" - ".join(texts): values[0] - values[1],
                      " / ".join(texts): values[0] / (values[1] or math.inf)}
        for working, result in steps.items():
            if abs(result - wanted) <= 0.005 * abs(wanted):
                return f"{working} = {answer}."
    return "Comparing these values gives the answer."
