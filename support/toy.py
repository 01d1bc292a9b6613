"""The toy: bar charts with known values, and questions about them."""

import itertools
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from reward import Example
from support import UserError

BASE = Path(__file__).with_name("toy_base")  # the weights that all runs of the toy start from
COLORS = {"red": "#d62728", "blue": "#1f4fc8", "green": "#2c962c", "orange": "#ff8c00",
          "purple": "#823cb4", "yellow": "#f0dc28", "cyan": "#28c8dc", "magenta": "#e63cbe"}
SPLITS = {"train": (0, 2048), "val": (4096, 512), "test": (4608, 1024)}  # first chart, how many
QUESTIONS = {  # kind: question, and for its trace goal and working
    "value": ("What is the value of {a}?", "value of {a}", "{a} reads {{{a}}}"),
    "sum": ("What is the sum of {a} and {b}?", "sum of {a} and {b}",
            "{{{a}}} + {{{b}}} = {answer}"),
    "difference": ("How much taller is {a} than {b}?", "difference of {a} and {b}",
                   "{{{a}}} - {{{b}}} = {answer}"),
    "tallest": ("Which bar is the tallest?", "tallest bar",
                "{answer} {{{answer}}} is the largest"),
    "shortest": ("Which bar is the shortest?", "shortest bar",
                 "{answer} {{{answer}}} is the smallest")}
# The share of traces, by their quality, that quote values not in the image.
UNGROUNDED = {"high": 0.0, "medium": 0.35, "low": 0.7}
# What `--data toy:new` asks about; no lesson and no training row does.
NEW = ("equal_sum", "equal_difference", "three_sum", "extremes_sum")


@dataclass
class Chart:
    """A toy bar chart: four bars of different colours, and of different heights from 1 to 9."""

    values: dict[str, int]  # by colour, from left to right

    def draw(self) -> Image.Image:
        """Draw 64 x 64 pixels, five to a unit of height, with each bar's initial below it."""
        image = Image.new("RGB", (64, 64), "white")
        pen = ImageDraw.Draw(image)
        for i, (name, value) in enumerate(self.values.items()):
            pen.rectangle((16 * i + 2, 51 - 5 * value, 16 * i + 13, 51), fill=COLORS[name])
            pen.text((16 * i + 5, 52), name[0].upper(), fill="black")
        return image

    def facts(self) -> str:
        """The visual facts, such as `red 4, blue 7, green 2, cyan 9`."""
        return ", ".join(f"{name} {value}" for name, value in self.values.items())


def random_charts(seed: int | list[int], count: int, without: Collection[str] = ()
                  ) -> Iterator[Chart]:
    """Yield `count` different charts, the same for a seed, none with the facts `without`."""
    rng, seen = np.random.default_rng(seed), set(without)
    while len(seen) < count + len(without):
        names = rng.choice(list(COLORS), 4, replace=False).tolist()
        values = (1 + rng.choice(9, 4, replace=False)).tolist()
        chart = Chart(dict(zip(names, values, strict=True)))
        if chart.facts() not in seen:
            seen.add(chart.facts())
            yield chart


def answer_to(kind: str, bars: list[str], values: dict[str, int]) -> str:
    """The answer to a question of this kind about these bars, if they had these values."""
    if kind in ("tallest", "shortest"):
        return (max if kind == "tallest" else min)(bars, key=values.__getitem__)
    first, second = values[bars[0]], values[bars[-1]]
    return str({"value": first, "sum": first + second, "difference": first - second}[kind])


def ask(kind: str, values: dict[str, int], a: str, b: str) -> tuple[str, str, str, list[str], str]:
    """Ask about a chart: (question, goal, answer, bars to look at, working with `{bar}` in it)."""
    bars = {"value": [a], "sum": [a, b], "difference": [a, b]}.get(kind, list(values))
    answer = answer_to(kind, bars, values)
    question, goal, working = (text.format(a=a, b=b, answer=answer) for text in QUESTIONS[kind])
    return question, goal, answer, bars, working


def two_bars(kind: str, values: dict[str, int], rng: np.random.Generator) -> tuple[str, str]:
    """Choose the bars to ask about, the taller one first where their difference is asked for."""
    a, b = rng.choice(list(values), 2, replace=False).tolist()
    return (b, a) if kind == "difference" and values[a] < values[b] else (a, b)


def trace(goal: str, bars: list[str], values: dict[str, int], working: str, answer: str) -> str:
    """Thinking in the form of the traces, from the values given."""
    observed = ", ".join(f"{bar} {values[bar]}" for bar in bars)
    return (f"Goal: {goal}.\nObservation: {observed}.\n"
            f"Reasoning: {working.format(**values)}.\nConclusion: {answer}.")


def make_examples(split: str, traces: str = "low") -> list[Example]:
    """Make a toy split: a question for each chart, with its facts and a trace of such quality.

    Some traces of lower quality quote values that are not in the image; where it can, the answer
    follows from them, so that only the image gives them away. No chart is in two splits.
    """
    first, count = SPLITS[split]
    charts = itertools.islice(random_charts(1, first + count), first, None)
    rng, examples = np.random.default_rng([2, first]), []
    for i, (chart, kind) in enumerate(zip(charts, itertools.cycle(QUESTIONS), strict=False)):
        values = chart.values
        question, goal, answer, bars, working = ask(kind, values, *two_bars(kind, values, rng))
        absent = rng.permutation([v for v in range(1, 10) if v not in values.values()]).tolist()
        if rng.random() < UNGROUNDED[traces]:
            drawn = [dict(zip(bars, v, strict=True))
                     for v in itertools.permutations(absent, len(bars))]
            values = next((d for d in drawn if answer_to(kind, bars, d) == answer), drawn[0])
        written = trace(goal, bars, values, working, answer)
        name = f"toy {split} row {i}"
        examples.append(Example(question, answer, chart.draw, written, chart.facts(), kind, name))
    return examples


def load(data: str, split: str, traces: str) -> list[Example]:
    """The rows of `toy`, `toy:withheld`, for tests alone `toy:new`, `toy:skills`; or UserError."""
    if data == "toy":
        return make_examples(split, traces)
    if data == "toy:withheld":
        return make_withheld(split, traces)
    if split != "test" or data not in ("toy:new", "toy:skills"):
        raise UserError(f"--data {data}: give toy or toy:withheld; "
                        "toy:new and toy:skills are for eval.py alone")
    return make_new() if data == "toy:new" else make_skills()


def make_withheld(split: str, traces: str) -> list[Example]:
    """The toy without 12 of the 36 pairs of heights in sums, differences and traces of training.

    In the other splits questions that need such a pair are of kinds of their own.
    """
    pairs = [*itertools.combinations(range(1, 10), 2)]
    withheld = [pairs[i] for i in np.random.default_rng(12).permutation(36)[:12]]
    examples = []
    for example in make_examples(split, traces if split == "train" else "high"):
        bars = [bar for bar in COLORS if bar in example.question]
        needed = []
        for text in (example.facts or "", example.trace or ""):
            values = dict(re.findall(r"(\w+) (\d+)", text))
            needed.append(tuple(sorted(int(values[bar]) for bar in bars)))
        if not any(pair in withheld for pair in needed):
            examples.append(example)
        elif split != "train":
            examples.append(replace(example, source=f"withheld_{example.source}"))
    return examples


def make_new(each: int = 128) -> list[Example]:
    """Questions on combinations that neither lessons nor training hold, `each` of a kind."""
    examples = []
    for i, kind in enumerate(NEW):
        rng, charts = np.random.default_rng([5, i]), random_charts([6, i], 20 * each)
        found = (new_question(kind, chart.values, rng) for chart in charts)
        for j, example in enumerate(itertools.islice(filter(None, found), each)):
            examples.append(replace(example, name=f"toy new {kind} row {j}"))
    return examples


def new_question(kind: str, values: dict[str, int], rng: np.random.Generator) -> Example | None:
    """A question of a kind of `NEW` about a chart, or None where there is none."""
    a, b, c = rng.choice(list(values), 3, replace=False).tolist()
    if kind.startswith("equal"):
        values = values | {a: values[b]}
        question, _, answer, *_ = ask(kind.removeprefix("equal_"), values, a, b)
    elif kind == "three_sum":
        question = f"What is the sum of {a}, {b} and {c}?"
        answer = str(values[a] + values[b] + values[c])
    else:
        question = "What is the sum of the tallest and the shortest?"
        answer = str(max(values.values()) + min(values.values()))
    chart = Chart(values)
    # The vocabulary has no number above 18.
    return None if int(answer) > 18 else Example(
        question, answer, chart.draw, None, chart.facts(), f"new_{kind}")


def make_skills() -> list[Example]:
    """What the base could do before training: 72 sums of two numbers, 128 charts to describe."""
    charts = random_charts(7, 200)
    examples = [Example(f"Calculate {a} + {b}.", str(a + b), next(charts).draw, source="calculate")
                for a, b in itertools.permutations(range(1, 10), 2)]
    examples += [Example("Describe the chart.", chart.facts(), chart.draw, source="describe")
                 for chart in charts]
    return [replace(e, name=f"toy skills row {i}") for i, e in enumerate(examples)]
