"""Draw a picture from runs on charts: one of them, what models say of it, their accuracy.

    python -m support.picture support/picture.png runs/tiny-toy-{dyme,sft,grpo,two-stage}-s0

The first run's question is shown, as answered by the base, by the first run and by the second.
"""

import re
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from dyme import Config
from reward import Example
from support import UserError, data, files, report, runs, settings
from support.report.records import Row

SIZE, LEFT, MIDDLE, RIGHT = (1600, 600), 40, 430, 1010  # pixels; where three columns begin
LINES = ("#1f4fc8", "#d62728", "#2c962c", "#ff8c00", "#823cb4")
NAMES = {"dyme": "DyME", "sft": "SFT", "grpo": "GRPO"}
TRUE, FALSE, TEXT, GREY = "#1c7c34", "#d62728", "#222222", "#888888"
COLOURS = {"yes": TRUE, "no": FALSE, "": TEXT}  # of the kinds of text in the report
font = ImageFont.load_default  # Pillow's own, of a size


def held_out(run: Path, first: bool) -> dict[str, Row]:
    """A run's judged answers of its first or last evaluation, by row."""
    step = files.read_jsonl(run / "evaluations.jsonl")[0 if first else -1]["step"]
    return {row["name"]: row for row in files.read_jsonl(run / f"held-out-{step}.jsonl")}


def choose(base: dict[str, Row], ours: dict[str, Row], other: dict[str, Row],
           examples: dict[str, Example]) -> str:
    """A sum that the base has wrong, the first run right with valid thinking, the second not."""
    for name, row in ours.items():
        others_right = base[name]["any_format"] or other[name]["any_format"]
        if row["source"] == "sum" and row["valid_thinking"] and not others_right:
            # If a bar were as high as the sum, the answer could have been read off.
            if row["answer"] not in re.findall(r"\d+", examples[name].facts or ""):
                return name
    raise UserError("no sum that the base and the second run have wrong and the first has right")


def marks(text: str, facts: str, question: str) -> list[tuple[str, str]]:
    """A response in pieces, each with its colour: numbers by whether they are in the chart."""
    return [(part, COLOURS[kind]) for part, kind in report.mark(text, facts, question)]


def write(pen: ImageDraw.ImageDraw, place: tuple[int, int], pieces: list[tuple[str, str]],
          width: int, size: int = 20) -> int:
    """Write coloured pieces of text, wrapped to a width; the height where they end."""
    letters, (x, y) = font(size), place
    for text, colour in pieces:
        for word in re.findall(r"\n|\S+ ?| ", text):
            if word == "\n" or x + pen.textlength(word.rstrip(), letters) > place[0] + width:
                x, y = place[0], y + size + 6
            if word != "\n":
                pen.text((x, y), word, colour, letters)
                x += int(pen.textlength(word, letters))
    return y + size + 6


def draw_curves(pen: ImageDraw.ImageDraw, curves: dict[str, list[tuple[int, float]]],
                base: float) -> None:
    """Held-out accuracy over steps, a line for each mode; dashed, the base's by its last word."""
    width, height, top = 430, 440, 90
    last = max(points[-1][0] for points in curves.values())
    pen.text((RIGHT, 30), "held-out accuracy over steps", TEXT, font(22))
    for share in (0.0, 0.5, 1.0):
        y = top + height - height * share
        pen.line((RIGHT, y, RIGHT + width, y), "#dddddd")
        pen.text((RIGHT - 36, y - 10), f"{share:.1f}", GREY, font(16))
    for step in (0, last):
        pen.text((RIGHT + width * step / last - 10, top + height + 8), str(step), GREY, font(16))
    y = top + height - height * base
    for x in range(RIGHT, RIGHT + width, 16):
        pen.line((x, y, x + 8, y), GREY, 2)
    pen.text((RIGHT + 150, y + 6), "the base, by its last word", GREY, font(16))
    ends = list[float]()
    for (mode, points), colour in zip(curves.items(), LINES, strict=False):
        places = [(RIGHT + width * s / last, top + height - height * a) for s, a in points]
        pen.line(places, colour, 4)
        for x, y in places:
            pen.ellipse((x - 5, y - 5, x + 5, y + 5), colour)
        y = places[-1][1]
        while any(abs(y - other) < 22 for other in ends):  # names stay apart
            y += 4
        ends.append(y)
        pen.text((places[-1][0] + 10, y - 11), mode, colour, font(20))


def draw(folders: list[Path]) -> Image.Image:
    """The picture of these runs. Raises UserError."""
    base, ours = (held_out(folders[0], first) for first in (True, False))
    other = held_out(folders[1], first=False)
    saved = [settings.read(run, Config) for run in folders]
    examples = {e.name: e for e in data.load_data(saved[0]["data"], "val")}
    example = examples[name := choose(base, ours, other, examples)]
    modes = [NAMES.get(row["mode"], row["mode"]) for row in saved]
    image = Image.new("RGB", SIZE, "white")
    pen = ImageDraw.Draw(image)
    assert example.image
    chart = example.image()
    # Enlarged by a whole number its pixels may be seen.
    how = Image.Resampling.LANCZOS if 320 % chart.width else Image.Resampling.NEAREST
    image.paste(chart.resize((320, 320), how), (LEFT, 90))
    pen.rectangle((LEFT, 90, LEFT + 320, 410), outline="#bbbbbb")
    pen.text((LEFT, 30), "a chart", TEXT, font(22))
    y = write(pen, (LEFT, 430), [(example.question, TEXT)], 330, 22)
    y = write(pen, (LEFT, y + 6), [(f"({example.facts})", GREY)], 350, 18)
    write(pen, (LEFT, y), [("numbers: ", GREY), ("shown or derived", TRUE), (", ", GREY),
                           ("false", FALSE)], 350, 18)
    y = 30
    for title, row in (("the base", base[name]), (f"after {modes[1]}", other[name]),
                       (f"after {modes[0]}", ours[name])):
        pen.text((MIDDLE, y), title, GREY, font(22))
        pieces = marks(row["response"], example.facts or "", example.question)
        y = write(pen, (MIDDLE, y + 34), pieces, 500) + 24
    curves = {}
    for mode, run in zip(modes, folders, strict=True):
        rows = files.read_jsonl(run / "evaluations.jsonl")
        curves[mode] = [(row["step"], row["accuracy"]) for row in rows]
    first = files.read_jsonl(folders[0] / "evaluations.jsonl")[0]
    draw_curves(pen, curves, first["any_format"])
    return image


def main() -> None:
    """Read the command line, draw, write the file."""
    parser = settings.one_line_parser(__doc__ or "")
    parser.add_argument("out", metavar="FILE.png", type=Path)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+")
    args = parser.parse_args()
    if len(args.runs) < 2:
        raise UserError("name two runs or more")
    draw(args.runs).quantize(64).save(args.out, optimize=True)
    print(f"wrote {args.out}, {args.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    sys.exit(runs.run_main(main))
