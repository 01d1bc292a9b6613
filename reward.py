"""Rewards: text in, numbers out.

A response is judged in two ways. Rule-based verification says whether its answer is right (r_a of Eq. 6), and
the thinking reward says how its thinking compares with the reference trace (r_t of Eq. 7). They are added up
in `score` of dyme.py: to change the reward, change it there.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Example:
    """One row of data: a question with its answer, and what else is known about it."""

    question: str
    answer: str
    image: Callable[[], Any] | None = None  # returns the decoded picture; None for text alone
    trace: str | None = None  # the reference thinking trace
    facts: str | None = None  # the visual facts I_c as text
    source: str = ""  # a part of the data that is also scored alone: human or augmented questions
    name: str = ""  # for messages: the file and row it came from
    accepts: Callable[[str, float], bool] | None = None  # a domain's own check of (answer, tolerance)
    scores: dict[str, Callable[[str], float]] = field(default_factory=dict)  # a domain's own scores
    tolerance: float = 0.0  # relative error that evaluation forgives (ChartQA: 0.05), not r_a


# ---- Parsing a response --------------------------------------------------------------------------

FLAG = "Answer:"
NUMBER = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+"
SIGNED = rf"(?:(?<![\w)%])(?<![\d)%][^\S\n])-)?(?:{NUMBER})"  # a minus belongs to it, unless it subtracts


@dataclass
class Verdict:
    """What rule-based verification says of one response."""

    correct: bool  # r_a of Eq. 6: parsed, ended by an end token, and equal to the example's answer
    answer: str | None  # the parsed answer, None if the response is not in the format
    in_format: bool  # exactly one flag, something after it, and an end token


def split_response(text: str) -> tuple[str, list[str]]:
    """Cut a response at its `Answer:` flags (any case): the thinking, and the text after each flag."""
    thinking, *answers = re.split(re.escape(FLAG), text, flags=re.IGNORECASE)
    return thinking.strip(), [answer.strip() for answer in answers]


def verify(completion: str, example: Example, finished: bool = True, tolerance: float = 0.0) -> Verdict:
    """Judge a response (without its end token) against the example's answer, by rules alone.

    Formatting is forgiven (`answers_match`), a wrong value never (as released). `finished`: by an end token?
    """
    _, answers = split_response(completion)
    # Exactly one flag counts: a response that lists several answers would be right by trying.
    in_format = len(answers) == 1 and bool(answers[0])
    # Cut off by the length limit is wrong, even with the answer in it: `Answer: 1` may have been on its
    # way to 12, and the policy would be paid for rambling on until the limit.
    if not in_format or not finished:
        return Verdict(correct=False, answer=None, in_format=False)
    if example.accepts:
        correct = example.accepts(answers[0], tolerance)
    else:
        correct = answers_match(answers[0], str(example.answer), tolerance)
    return Verdict(correct, answers[0], in_format=True)


def reference_response(example: Example) -> str:
    """What is memorized (Eq. 1): trace and answer line, or the answer line alone without a trace."""
    thinking, _ = split_response(example.trace or "")  # a trace may hold a flag of its own
    return f"{thinking}\n{FLAG} {example.answer}".lstrip("\n")


def final_answer(completion: str) -> str:
    """The text after the last flag, else all of it, less a full stop (as in the release): for *official*."""
    thinking, answers = split_response(completion)
    return (answers[-1] if answers else thinking).rstrip(". ")


# ---- Comparing answers ---------------------------------------------------------------------------


def relaxed_match(prediction: str, target: str, tolerance: float = 0.05) -> bool:
    """ChartQA's official relaxed accuracy (Masry et al., 2022, after Methani et al., 2020).

    Two numbers match within `tolerance` of the *target*; a percent string stands for its fraction (`42%`
    is 0.42). A target of zero, and all else, must be equal as text, apart from case.
    """

    def number(text: str) -> float | None:
        try:
            return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
        except ValueError:
            return None

    prediction, target = prediction.strip(), target.strip()
    p, t = number(prediction), number(target)
    if p is not None and t:
        return abs(p - t) <= tolerance * abs(t)
    return prediction.lower() == target.lower()


def answers_match(prediction: str, target: str, tolerance: float = 0.0) -> bool:
    """Equality that forgives formatting ("1,234", "$42", "42 %", a final full stop), never a value.

    A target such as "[Cape Verde, 5]" is a list: the prediction, with or without brackets, must have the
    same elements in the same order.
    """
    prediction, target = strip_answer(prediction), strip_answer(target)
    if target.startswith("[") and target.endswith("]"):
        wanted, given = _list_items(target), _list_items(prediction)
        same = (answers_match(g, w, tolerance) for g, w in zip(given, wanted, strict=False))
        return len(wanted) == len(given) and all(same)
    p, t = _number(prediction), _number(target)
    if p is None or t is None:
        return prediction.lower() == target.lower()
    # "42 %" for "42" is formatting (a chart gives the unit on its axis); "42%" is also 0.42.
    fractions = [value / 100 if percent else value for value, percent in (p, t)]
    return _close(p[0], t[0], tolerance) or _close(*fractions, tolerance)


def _close(prediction: float, target: float, tolerance: float) -> bool:
    return abs(prediction - target) <= max(tolerance, 1e-9) * abs(target)


def strip_answer(text: str) -> str:
    """Drop what surrounds an answer: spaces, quotes, Markdown emphasis, a final full stop."""
    text = text.replace("\u2212", "-")  # the typographic minus
    # Single spaces inside too, or the patterns below would take quadratic time on many.
    text = " ".join(text.split()).strip(" \"'`*")
    return text.removesuffix(".").rstrip(" \"'`*")


def plain(text: str) -> str:
    """An answer in lower case, with single spaces and no punctuation around."""
    return strip_answer(text).lower()


def _number(text: str) -> tuple[float, bool] | None:
    """Read "-$1,234.5 %" as (-1234.5, is a percentage); None if the text is not one number."""
    match = re.fullmatch(rf"([-+]?) ?[$€£¥]? ?([-+]?)({NUMBER}) ?(%?)", text)
    if not match or (match[1] and match[2]):
        return None
    sign = -1 if "-" in (match[1], match[2]) else 1
    return sign * float(match[3].replace(",", "")), bool(match[4])


def parse_number(text: str) -> float | None:
    """Value of a text that is one number, however formatted ("$1,234", "42 %" as 42), else None."""
    number = _number(strip_answer(text))
    return number and number[0]


def _list_items(text: str) -> list[str]:
    """Split "[a, b]" or "a, b"; commas without a space separate only if none has one ("1,234, 5")."""
    text = text.removeprefix("[").removesuffix("]")
    return text.split(", ") if ", " in text else text.split(",")


# ---- Scoring the thinking ------------------------------------------------------------------------


def thinking_f1(response: str, reference: str) -> float:
    """r_t of Pure DyME: F1 of the bags of tokens of a response and a reference trace, up to their flags, in [0, 1]."""
    given, wanted = _tokens(response), _tokens(reference)
    overlap = (given & wanted).total()
    if not overlap:
        return 0.0
    # Harmonic mean of precision (overlap / given) and recall (overlap / wanted).
    return 2 * overlap / (given.total() + wanted.total())


def _tokens(response: str) -> Counter[str]:
    # Operators are tokens too: without them `8 + 3 = 5` would be as good as `8 - 3 = 5`.
    return Counter(re.findall(rf"{NUMBER}|\w+|[-+*/=×÷−]", split_response(response)[0].lower()))
