"""Rewards: text in, numbers out.

A response is judged in two ways. Rule-based verification says whether its answer is right (r_a of
Eq. 6), and the thinking reward says how its thinking compares with the reference trace (r_t of
Eq. 7). They are added up in `train_step` of dyme.py: to change the reward, change it there.
"""

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
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
    accepts: Callable[[str, float], bool] | None = None  # a domain's check of (answer, tolerance)
    scores: dict[str, Callable[[str], float]] = field(default_factory=dict)  # a domain's own
    tolerance: float = 0.0  # relative error that evaluation forgives (ChartQA: 0.05), not r_a


# ---- Parsing a response --------------------------------------------------------------------------

FLAG = "Answer:"
NUMBER = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+"
SIGNED = rf"(?:(?<![\w)%])(?<![\d)%][^\S\n])-)?(?:{NUMBER})"  # with its minus sign


@dataclass
class Verdict:
    """What rule-based verification says of one response."""

    correct: bool  # r_a of Eq. 6: parsed, ended by an end token, and equal to the example's answer
    answer: str | None  # the parsed answer, None if the response is not in the format
    in_format: bool  # exactly one flag, something after it, and an end token


def split_response(text: str) -> tuple[str, list[str]]:
    """Cut a response at its `Answer:` flags (any case): the thinking, and the text after each."""
    thinking, *answers = re.split(re.escape(FLAG), text, flags=re.IGNORECASE)
    return thinking.strip(), [answer.strip() for answer in answers]


def verify(text: str, example: Example, finished: bool = True, tolerance: float = 0.0) -> Verdict:
    """Judge a response (without its end token) against the example's answer, by rules alone.

    Formatting is forgiven (`answers_match`), a wrong value never. `finished`: by an end token?
    """
    _, answers = split_response(text)
    # Exactly one flag counts: a response that lists several answers would be right by trying.
    in_format = len(answers) == 1 and bool(answers[0])
    # Cut off by the length limit is wrong, even with the answer in it: `Answer: 1` may have been
    # on its way to 12, and the policy would be paid for rambling on until the limit.
    if not in_format or not finished:
        return Verdict(correct=False, answer=None, in_format=False)
    if example.accepts:
        correct = example.accepts(answers[0], tolerance)
    else:
        correct = answers_match(answers[0], str(example.answer), tolerance, example.question)
    return Verdict(correct, answers[0], in_format=True)


def reference_response(example: Example) -> str:
    """What is memorized (Eq. 1): trace and answer line; without a trace the answer line alone."""
    thinking, _ = split_response(example.trace or "")  # a trace may hold a flag of its own
    return f"{thinking}\n{FLAG} {example.answer}".lstrip("\n")


def final_answer(text: str) -> str:
    """The text after the last flag, else all of it, less a full stop (as released): *official*."""
    thinking, answers = split_response(text)
    return (answers[-1] if answers else thinking).rstrip(". ")


# ---- Comparing answers ---------------------------------------------------------------------------


def relaxed_match(prediction: str, target: str, tolerance: float = 0.05) -> bool:
    """ChartQA's official relaxed accuracy (Masry et al., 2022, after Methani et al., 2020).

    Two numbers match within `tolerance` of the *target*; a percent string stands for its fraction
    (`42%` is 0.42). A target of zero, and all else, must be equal as text, apart from case.
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


def answers_match(prediction: str, target: str, tolerance: float = 0.0, question: str = "") -> bool:
    """Would a person call the answer right? Forgives formatting, never a value.

    A target such as "[Cape Verde, 5]" is a list: the prediction, with or without brackets, must
    have the same elements in the same order, without tolerance. The question says which unit may be
    named ("5 bars"), and what letters stand for.
    """
    prediction, target = strip_answer(prediction), strip_answer(target)
    if not target or prediction.lower() == target.lower():
        return bool(target)  # an empty target matches nothing, not even an empty answer
    prediction = strip_answer(re.sub(LEAD_IN, "", prediction, flags=re.IGNORECASE))
    if is_list(target):
        wanted = _list_items(target)[0]
        return any(len(given) == len(wanted) and all(
            answers_match(g, w, 0.0, question) for g, w in zip(given, wanted, strict=True))
            for given in _list_items(prediction))
    if is_list(prediction) and "," not in prediction:
        prediction = strip_answer(prediction[1:-1])
    asked = {_stem(w) for w in re.findall(r"[^\W\d_]+", question.lower())} - VALUE_WORDS
    numbers = []
    for text in (prediction, target):
        words = text.split(" ")
        while len(words) > 1 and _stem(words[-1].lower()) in asked:  # "5 bars", if asked for bars
            words.pop()
        numbers.append(read_number(" ".join(words)))
    p, t = numbers
    if p and t:
        return _same_number(*p, *t, Fraction(tolerance))
    said, right = (_plain_words(text, question) for text in (prediction, target))
    if right in CONTRARY and re.match(rf"{right}[,;:.!] [^\W\d]", said):  # "Yes, it is."
        return not re.search(CONTRARY[right], said)
    return said == right or choice(prediction, question) == choice(target, question) != ""


CHOICE = re.compile(r"(?m)(?:^|\s)\(?([A-J])[).:][^\S\n]+(.+?)(?=[,;]?\s+\(?[A-J][).:]\s|\s*$)")


def choice(answer: str, question: str) -> str:
    """The letter that an answer means among "(A) rise (B) fall" of a question, or ""."""
    *_, question = re.split(r"(?m)(?=(?:^|\s)\(?A[).:]\s)", question)  # from the last A on
    listed = dict(CHOICE.findall(question))
    if len(listed) < 2 or "?" in question or not "ABCDEFGHIJ".startswith("".join(listed)):
        return ""  # "A: 5, B: 7. Which is 7?" gives data
    both = re.fullmatch(r"(?:[Oo]ption )?\(?([A-J])\b[).:,]{0,2}(?: +(.+))?", answer)
    if both and answers_match(both[2] or listed.get(both[1], ""), listed.get(both[1], "")):
        return both[1]
    alike = [letter for letter in listed if plain(answer) == plain(listed[letter])]
    return next(iter(alike or [x for x in listed if answers_match(answer, listed[x])]), "")


is_list = re.compile(r"\[.*\]", re.DOTALL).fullmatch  # is it written in square brackets?
# What may stand before an answer: "The answer is 5", "= 5", "about 5".
LEAD_IN = (r"^(?:(?:so|thus|hence|therefore),? )?(?:(?:the )?(?:final |correct |right )?"
           r"(?:answer|result|value) (?:is|equals|=)|it is|it's)?[:=≈~ ]*"
           r"(?:(?:about|around|approximately|roughly|exactly) )?(?=\S)")
CONTRARY = {"yes": r"\b(?:no|not|never|neither|nor|but|false|wrong|cannot)\b|n't",
            "no": r"\b(?:yes|but|true)\b"}  # "Yes, but no" is neither
EDGES = " \"'`*"
AS_TYPED = str.maketrans(  # typography and full-width forms, as they are typed on a keyboard
    {0xFEE0 + i: i for i in range(33, 127)} | {ord("。"): "."}
    | dict.fromkeys(map(ord, "，、"), ", ")  # with a space: never part of a number
    | dict.fromkeys(map(ord, "‐‑‒–—―−﹣"), "-")
    | dict.fromkeys(map(ord, "‘’‚′"), "'") | dict.fromkeys(map(ord, "“”„″«»"), '"'))
TEX = [(r"\\!", ""), (r"(?<=\d)\{,\}(?=\d)", ","), (r"\\[,;: ]|\\quad\b|~", " "),
       (r"\\([%$&#])", r"\1"), (r"\\[()\[\]]|\\(?:left|right|displaystyle)\b", ""),
       (r"\^ ?(?:\\circ\b|\{ ?\\circ ?\})|\\degree\b", "°"),
       (r"\\[dt]?frac ?\{(\d+)\} ?\{(\d+)\}", r" \1/\2"),
       *[(r"\\(?:f?box(?:ed)?|text\w*|math\w+) ?\{([^{}]*)\}", r"\1")] * 3]  # \boxed{\text{red}}


def strip_answer(text: str) -> str:
    """Drop what surrounds an answer: spaces, quotes, Markdown, TeX, brackets, tags, a full stop.

    Empty if nothing can be seen in it; an answer of nothing but such marks stays as it is.
    """
    text = unicodedata.normalize("NFC", text).translate(AS_TYPED)
    text = "".join(c for c in text if unicodedata.category(c) != "Cf")  # invisible characters
    for pattern, typed in TEX if re.search(r"\\|\d\{,\}\d", text) else []:
        text = re.sub(pattern, typed, text)
    # Single spaces inside too, or the patterns below would take quadratic time on many.
    text = " ".join(text.split())
    for _ in range(6):  # one wrapping inside another
        inside = re.sub(r"^</?[A-Za-z]\w*>|</?[A-Za-z]\w*>$", "", text.strip(EDGES))
        inside = inside.rstrip(".,;:!" + EDGES)
        if re.fullmatch(r"\$+[^$]+\$+|\([^(),]+\)", inside):
            inside = inside.strip("$") if inside[0] == "$" else inside[1:-1]
        text = inside or text
    return text


def plain(text: str) -> str:
    """An answer in lower case, with single spaces and no punctuation around."""
    return strip_answer(text).lower()


def _plain_words(text: str, question: str) -> str:
    """Lower case, without an article or the noun asked for: "the red bar" after "Which bar"."""
    asked = re.search(r"\b(?:which|what) (\w+)", question.lower())
    text = text.lower().removesuffix(f" {asked[1]}" if asked else "").removeprefix("the ")
    text = re.sub(r"(?<=\d) ?([ap])\.? ?m\b\.?", r" \1m", text)  # 2:35 P.M.
    return re.sub(r"(?<=\d) ?(?:-|to) ?(?=\d)", "-", text)  # a range


def _list_items(text: str) -> tuple[list[str], list[str]]:
    """Split "[a, b]" or "a, b" at its commas, and also at "and" and semicolons ("a, b and c")."""
    text = text.strip("[]()")
    commas = text.split(", " if ", " in text else ",")  # "1,234, 5" are two
    return commas, re.split(r", (?:and )?|; ?| and | & ", text)


NAMED = "zero one two three four five six seven eight nine ten eleven twelve".split()
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9,
          "trillion": 10**12, "": 1}
UNITS = {"percent": "%", "per cent": "%", "percentage points": "%", "dollars": "$", "usd": "$",
         "euros": "€", "eur": "€", "degrees": "°"}  # other units must be in the question
NUMBER_TEXT = re.compile(
    r"([-+]?) ?([$€£¥]?) ?([-+]?)((?:\d+ )?\d+/0*[1-9]\d*|\d{1,3}(?: \d{3})+|"
    rf"(?:{NUMBER})(?:e[-+]?\d\d?)?) ?({'|'.join(SCALES)}) ?(%|°[cf]?|[$€£¥]|{'|'.join(UNITS)}|)")
_stem = functools.partial(re.sub, "(?:ies|es|e|y|s)$", "")
# These change the number before them ("5 or 6", "5 more", "5 million"), so they are no units.
VALUE_WORDS = set(map(_stem, [*SCALES, *NAMED, *(
    "and or to not no more less fewer than over under above below by half minus plus "
    "dozen percent from between b k n q x z".split())]))


def read_number(text: str) -> tuple[Fraction, str] | None:
    """Read "-$1,234.5", "42 %", "1e3" or "3 1/2" as (exact value, unit); None if not one number."""
    text = strip_answer(text).lower()
    if text in NAMED:
        return Fraction(NAMED.index(text)), ""
    match = NUMBER_TEXT.fullmatch(text) if len(text) < 80 else None
    if not match or match[1] and match[3] or match[2] and match[6]:
        return None
    sign, currency, inner, digits, scale, unit = match.groups()
    parts = digits.split(" ") if "/" in digits else [re.sub("[, ]", "", digits)]
    value = sum(map(Fraction, parts), Fraction()) * SCALES[scale]
    return -value if "-" in sign + inner else value, currency or UNITS.get(unit, unit)


def _same_number(p: Fraction, p_unit: str, t: Fraction, t_unit: str, tolerance: Fraction) -> bool:
    # A unit may be left out, not changed: "42 %" for "42" is formatting (a chart's axis gives it).
    alike = p_unit.startswith(t_unit) or t_unit.startswith(p_unit)  # ° and °C
    pairs = [(p, t)] if alike else []
    # "42%" is also 0.42; but "500%" for "5" would pay a wrong value.
    if (p_unit, t_unit) == ("%", "") and abs(t) < 1:
        pairs.append((p / 100, t))
    if (p_unit, t_unit) == ("", "%") and abs(p) < 1:
        pairs.append((p, t / 100))
    return any(abs(given - wanted) <= tolerance * abs(wanted) for given, wanted in pairs)


def parse_number(text: str) -> float | None:
    """Value of a text that is one number, however formatted ("$1,234", "42 %" as 42), else None."""
    number = read_number(text)
    return number and float(number[0])


# ---- Scoring the thinking ------------------------------------------------------------------------


def thinking_f1(response: str, trace: str) -> float:
    """r_t of Pure DyME: token F1 of response and trace, each up to its first flag, if any."""
    # Operators are tokens too: without them `8 + 3 = 5` would be as good as `8 - 3 = 5`.
    token = rf"{NUMBER}|\w+|[-+*/=×÷−]"
    given, wanted = (Counter(re.findall(token, split_response(text)[0].lower()))
                     for text in (response, trace))
    overlap = (given & wanted).total()
    if not overlap:
        return 0.0
    # Harmonic mean of precision (overlap / given) and recall (overlap / wanted).
    return 2 * overlap / (given.total() + wanted.total())
