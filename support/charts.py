"""Bar charts as a person draws them, and the toy's five kinds of question: `--data charts`.

For SmolLM2 with eyes (support/sight.py). As on the toy, traces of lower quality quote heights that
no bar has; the answer is always right, and follows from them where it can.
"""

import itertools
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from reward import Example
from support import UserError, toy

# Names that are one token to SmolLM2, which the eyes count on.
COLORS = {"red": "#d62728", "blue": "#1f4fc8", "green": "#2c962c", "orange": "#ff8c00",
          "purple": "#823cb4", "yellow": "#f0dc28", "brown": "#8c4a1e", "pink": "#f59ac8"}
TOP = 50  # the highest bar, and the end of the axis
SPLITS = {"train": (0, 2048), "val": (2048, 512), "test": (2560, 512)}  # first chart, how many
EDGE, LEFT, RIGHT, UPPER, LOWER = 192, 20, 189, 22, 172  # the picture and its axes, in pixels


class Chart(toy.Chart):
    """Four to six bars of different colours, and of different heights from 1 to 50."""

    def draw(self) -> Image.Image:
        """Draw 192 x 192 pixels, three to a unit of height: a title, an axis, named bars."""
        image = Image.new("RGB", (EDGE, EDGE), "white")
        pen, font = ImageDraw.Draw(image), ImageFont.load_default(9)
        pen.text((EDGE / 2, 9), "Sales by colour", fill="black", anchor="mm", font=font)
        unit, slot = (LOWER - UPPER) // TOP, (RIGHT - LEFT - 1) / len(self.values)
        for mark in range(0, TOP + 1, 10):
            pen.line((LEFT, LOWER - unit * mark, RIGHT, LOWER - unit * mark), fill="#cccccc")
            pen.text((LEFT - 3, LOWER - unit * mark), str(mark), "black", font, "rm")
        for i, (name, value) in enumerate(self.values.items()):
            x = LEFT + 1 + slot * i
            box = (round(x + 0.15 * slot), LOWER - unit * value, round(x + 0.85 * slot), LOWER)
            pen.rectangle(box, fill=COLORS[name])
            pen.text((round(x + slot / 2), LOWER + 9), name, "black", font, "mm")
        pen.line((LEFT, UPPER - 4, LEFT, LOWER, RIGHT, LOWER), fill="black")
        return image


def random_chart(rng: np.random.Generator) -> Chart:
    """Draw one chart at random."""
    bars = int(rng.integers(4, 7))
    names = rng.choice(list(COLORS), bars, replace=False).tolist()
    return Chart(dict(zip(names, (1 + rng.choice(TOP, bars, replace=False)).tolist(), strict=True)))


def random_charts() -> Iterator[Chart]:
    """Yield charts without end, no two alike, always the same."""
    rng, seen = np.random.default_rng([9, 0]), set[str]()
    while True:
        chart = random_chart(rng)
        if chart.facts() not in seen:
            seen.add(chart.facts())
            yield chart


def invented(kind: str, bars: list[str], chart: Chart, rng: np.random.Generator) -> dict[str, int]:
    """Heights for `bars` that no bar of the chart has; if they can, they give its answer."""
    absent = [v for v in range(1, TOP + 1) if v not in chart.values.values()]
    answer, values = toy.answer_to(kind, bars, chart.values), dict[str, int]()
    for _ in range(1 if kind == "value" else 1000):
        values = dict(zip(bars, rng.choice(absent, len(bars), False).tolist(), strict=True))
        if toy.answer_to(kind, bars, values) == answer:
            break
    return values


def make_examples(data: str, split: str, traces: str) -> list[Example]:
    """Make a split: a question for each chart, with its facts and a trace. Raises UserError."""
    if data != "charts":
        raise UserError(f"--data {data}: give charts")
    first, count = SPLITS[split]
    rng, examples = np.random.default_rng([10, first]), []
    charts = itertools.islice(random_charts(), first, first + count)
    for i, (chart, kind) in enumerate(zip(charts, itertools.cycle(toy.QUESTIONS), strict=False)):
        asked = toy.ask(kind, chart.values, *toy.two_bars(kind, chart.values, rng))
        question, goal, answer, bars, working = asked
        false = rng.random() < toy.UNGROUNDED[traces]
        quoted = invented(kind, bars, chart, rng) if false else chart.values
        written = toy.trace(goal, bars, quoted, working, answer)
        examples.append(Example(question, answer, chart.draw, written, chart.facts(), kind,
                                f"charts {split} row {i}"))
    return examples
