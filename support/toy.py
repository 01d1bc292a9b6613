"""The toy: bar charts with known values, questions about them, and a tiny VLM to answer them."""

import itertools
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from reward import FLAG, Example, reference_response
from support import UserError

BASE = Path(__file__).with_name("toy_base")  # the weights that all runs of the toy start from
COLORS = {"red": "#d62728", "blue": "#1f4fc8", "green": "#2c962c", "orange": "#ff8c00",
          "purple": "#823cb4", "yellow": "#f0dc28", "cyan": "#28c8dc", "magenta": "#e63cbe"}
SPLITS = {"train": (0, 2048), "val": (4096, 512), "test": (4608, 1024)}  # first chart, how many
QUESTIONS = {  # kind: question, goal in a trace
    "value": ("What is the value of {a}?", "value of {a}"),
    "sum": ("What is the sum of {a} and {b}?", "sum of {a} and {b}"),
    "difference": ("How much taller is {a} than {b}?", "difference of {a} and {b}"),
    "tallest": ("Which bar is the tallest?", "tallest bar"),
    "shortest": ("Which bar is the shortest?", "shortest bar")}
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
    question, goal = (text.format(a=a, b=b) for text in QUESTIONS[kind])
    bars = {"value": [a], "sum": [a, b], "difference": [a, b]}.get(kind, list(values))
    answer = answer_to(kind, bars, values)
    working = {"value": f"{a} reads {{{a}}}",
               "sum": f"{{{a}}} + {{{b}}} = {answer}",
               "difference": f"{{{a}}} - {{{b}}} = {answer}",
               "tallest": f"{answer} {{{answer}}} is the largest",
               "shortest": f"{answer} {{{answer}}} is the smallest"}[kind]
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
    """The rows of `toy`, or for tests alone of `toy:new` and `toy:skills`. Raises UserError."""
    if data == "toy":
        return make_examples(split, traces)
    if split != "test" or data not in ("toy:new", "toy:skills"):
        raise UserError(f"--data {data}: give toy; toy:new and toy:skills are for eval.py alone")
    return make_new() if data == "toy:new" else make_skills()


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
    what = kind.rpartition("_")[2]
    if kind.startswith("equal"):
        values = values | {a: values[b]}
    if what == "difference" and values[a] < values[b]:
        a, b = b, a
    question, _, answer, *_ = ask(what, values, a, b)
    if kind == "three_sum":
        question = f"What is the sum of {a}, {b} and {c}?"
        answer = str(values[a] + values[b] + values[c])
    if kind == "extremes_sum":
        question = "What is the sum of the tallest and the shortest?"
        answer = str(max(values.values()) + min(values.values()))
    chart = Chart(values)
    # The vocabulary has no number above 18.
    return None if int(answer) > 18 else Example(
        question, answer, chart.draw, None, chart.facts(), f"new_{kind}")


def make_skills() -> list[Example]:
    """What the base could do before training: 72 sums of two numbers, 128 charts to describe."""
    charts = random_charts(7, 200)
    sums = [(f"Calculate {a} + {b}.", str(a + b), "calculate")
            for a, b in itertools.permutations(range(1, 10), 2)]
    examples = [Example(question, answer, next(charts).draw, source=source)
                for question, answer, source in sums]
    examples += [Example("Describe the chart.", chart.facts(), chart.draw, source="describe")
                 for chart in charts]
    return [replace(e, name=f"toy skills row {i}") for i, e in enumerate(examples)]


LESSONS = (
    "I see {and}. Here {working}, so the result is {answer}.",
    "To find the {goal}, look at {list}. Then {working}. It is {answer}.",
    "The chart has {list}. As {working}, this gives {answer}.",
    "Bars: {list}.\nWorking: {working}.\nResult: {answer}.",
    "First look: {and}.\nThen think: {working}.\nSo {answer}.",
    "Wanted: {goal}. The image has {list}; now {working}, hence {answer}.")
KNOWN_KINDS = ("value", "tallest", "shortest")  # the lessons lack the others: sum, difference


def lessons(seed: int, count: int, flagged: float, prompt: str, equal: float = 0.0
            ) -> Iterator[tuple[Example, str]]:
    """Yield rows (prompt, response) to pre-train a base on; the questions are put into `prompt`.

    They read bars or calculate, never both, in other words than the traces; a share `flagged` has
    the flag. No chart is one of the toy's own. In three of ten two bars are equally high, so that
    the base can read such charts; the toy's own have none. Of the calculations a share `equal`
    more is made to be of equal numbers.
    """
    rng = np.random.default_rng([3, seed])
    reserved = {chart.facts() for chart in random_charts(1, sum(SPLITS["test"]))}
    charts = random_charts([4, seed], count, reserved)
    for chart, kind in zip(charts, itertools.cycle(KNOWN_KINDS), strict=False):
        if rng.random() < 0.3:
            a, b = rng.choice(list(chart.values), 2, replace=False).tolist()
            chart.values[a] = chart.values[b]
            extreme = max if kind == "tallest" else min
            if chart.values[a] == extreme(chart.values.values()):
                kind = "value"  # two bars are the tallest, or the shortest
        task = rng.random()
        if task < 0.3:
            question, response, answer = calculation_lesson(rng, equal)
        elif task < 0.51:
            question, response, answer = *description_lesson(chart, rng), ""
        else:
            question, response, answer = question_lesson(chart, kind, rng)
            question = prompt.format(question=question)
        if answer and rng.random() < flagged:
            response += f"\n{FLAG} {answer}"
        yield Example(question, answer, chart.draw), response


def calculation_lesson(rng: np.random.Generator, equal: float) -> tuple[str, str, str]:
    """Arithmetic alone, the chart beside it ignored: request, response, result."""
    a, b = (1 + rng.integers(9, size=2)).tolist()
    if equal and rng.random() < equal:  # a share of 0 draws nothing: the first round stays itself
        b = a
    sign, what, result = "+", "sum", a + b
    if rng.random() < 0.5:
        a, b = max(a, b), min(a, b)
        sign, what, result = "-", "difference", a - b
    working, goal = f"{a} {sign} {b} = {result}", f"{what} of {a} and {b}"
    if rng.random() < 0.5:
        return f"Calculate {a} {sign} {b}.", f"{working}.", str(result)
    parts = {"and": f"{a} and {b}", "list": f"{a}, {b}", "goal": goal, "working": working,
             "answer": str(result)}
    wording = LESSONS[rng.integers(len(LESSONS))]
    return f"Calculate the {goal}.", wording.format(**parts), str(result)


def description_lesson(chart: Chart, rng: np.random.Generator) -> tuple[str, str]:
    """Read some bars, in the order asked for: request and response."""
    if rng.random() < 1 / 3:
        return "Describe the chart.", f"{chart.facts()}."
    bars = rng.permutation(list(chart.values)).tolist()[:rng.integers(1, 5)]
    described = Chart({bar: chart.values[bar] for bar in bars}).facts()
    return f"Describe {', '.join(bars)}.", f"{described}."


def question_lesson(chart: Chart, kind: str, rng: np.random.Generator) -> tuple[str, str, str]:
    """A question of a known kind, reasoned through in one of the lessons' wordings."""
    asked = ask(kind, chart.values, *two_bars(kind, chart.values, rng))
    question, goal, answer, bars, working = asked
    read = [f"{bar} {chart.values[bar]}" for bar in bars]
    parts = {"and": " and ".join(read), "list": ", ".join(read), "goal": goal, "answer": answer,
             "working": working.format(**chart.values)}
    return question, LESSONS[rng.integers(len(LESSONS))].format(**parts), answer


# ---- The toy's model: a tiny VLM of SmolVLM's architecture ---------------------------------------

SPECIAL_TOKENS = ["<pad>", "<unk>", "<|im_start|>", "<end_of_utterance>",
                  "<fake_token_around_image>", "<image>", "<global-img>"]
WORD = r" ?\w+| ?[^\w\s]|\s"  # a word takes the space before it along: decoding is joining


def vocabulary(prompt: str) -> list[str]:
    """All words of the toy's questions in `prompt`, lessons and traces."""
    texts = ["User:", "Assistant:", prompt.format(question=""), *COLORS, *map(str, range(19))]
    rows = [(e, reference_response(e)) for e in make_examples("train", "high")[:50]]
    for example, response in itertools.chain(rows, lessons(0, 500, 0.5, prompt)):
        texts += [example.question, response]
    words = {word for text in texts for word in re.findall(WORD, f"{text}\n {text}")}
    return SPECIAL_TOKENS + sorted(words)


def build_model(seed: int, words: list[str]) -> Any:
    """Make an Idefics3, the architecture of SmolVLM, with half a million random parameters."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    # The default initializer_range of 0.02 is too small for such widths: some seeds never see.
    both = {"num_attention_heads": 4, "initializer_range": 0.08}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}  # places in SPECIAL_TOKENS
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
              "image_size": 64, "patch_size": 16, **both}
    text = {"model_type": "llama", "vocab_size": len(words), "hidden_size": 96,
            "intermediate_size": 256, "num_hidden_layers": 3, "num_key_value_heads": 4,
            "head_dim": 24, "max_position_embeddings": 512, "tie_word_embeddings": True,
            **both, **ids}
    torch.manual_seed(seed)
    return AutoModelForImageTextToText.from_config(AutoConfig.for_model(
        "idefics3", image_token_id=5, scale_factor=1, tie_word_embeddings=True,
        vision_config=vision, text_config=text, **ids), dtype=torch.float32)


def build_processor(words: list[str]) -> Any:
    """Make SmolVLM's processor for 64-pixel images and a word-level vocabulary."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.models.idefics3 import Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>",
        eos_token="<end_of_utterance>", additional_special_tokens=SPECIAL_TOKENS[2:])
    images = Idefics3ImageProcessorPil(
        do_image_splitting=False, size={"longest_edge": 64}, max_image_size={"longest_edge": 64})
    template = (
        "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}"
        " {{ part['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}")
    return Idefics3Processor(images, tokenizer, image_seq_len=16, chat_template=template)
