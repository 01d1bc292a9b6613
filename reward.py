"""Rewards: text in, numbers out.

A response is judged in two ways. Rule-based verification says whether its answer is right (r_a of Eq. 6), and
the thinking reward says how its thinking compares with the reference trace (r_t of Eq. 7). They are added up
in `score` of dyme.py: to change the reward, change it there. Groundedness and `thinking_fault`, for evaluation
only, tell thinking from pseudo thinking: fluent text whose values are not in the image.
"""

import ast
import operator
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


def groundedness(thinking: str, facts: str, question: str = "") -> tuple[int, int]:
    """Count the numbers a trace quotes: (those among the visual facts or derived from them, all)."""
    found = [grounded for _, _, grounded in quoted_numbers(thinking, facts, question)]
    return sum(found), len(found)


def quoted_numbers(thinking: str, facts: str, question: str = "") -> list[tuple[int, int, bool]]:
    """Find the numbers a trace quotes: where each begins and ends, and whether it is grounded.

    A number is grounded if it is among the visual facts, or derived: the trace writes correct arithmetic on
    grounded numbers, such as `3 + 4 = 7`. Numbers that the question gives are not quoted from the image.
    """
    known = {_value(n) for n in re.findall(NUMBER, facts)}
    given = {_value(n) for n in re.findall(NUMBER, question)} - known
    known |= _derived(thinking, known | given)
    quoted = [(match.span(), _value(match[0])) for match in re.finditer(NUMBER, thinking)]
    return [(*span, value in known) for span, value in quoted if value not in given]


def thinking_fault(response: str, example: Example) -> str:
    """What is wrong with a response's thinking, by rules alone; empty if it is valid.

    Valid thinking quotes numbers of the image or derives them, all its equations are true, at least one
    number or equation is there, and it ends in the answer. Needs the example's facts.
    """
    thinking, answers = split_response(response)
    for equation in equations(thinking):
        if not equation.true:
            return f"{equation.text} is false"
    quoted = quoted_numbers(thinking, example.facts or "", example.question)
    for start, end, grounded in quoted:
        if not grounded:
            return f"{thinking[start:end]} is not in the image"
    if not quoted and not equations(thinking):
        return "nothing is quoted from the image"
    # A right answer may be written otherwise than the example's ("42 %" for "42").
    written = answers[:1] if verify(response, example, tolerance=0.05).correct else []
    if not any(ends_in(thinking, answer) for answer in [example.answer, *written]):
        return f"it does not end in {example.answer}"
    return ""


def ends_in(text: str, answer: str) -> bool:
    """Are the last words or numbers of a text the answer, formatting aside?"""
    found, wanted = (re.findall(rf"{SIGNED}|\w+", _plain_signs(part.lower())) for part in (text, answer))
    return bool(wanted) and " ".join(found[-len(wanted):]).replace(",", "") == " ".join(wanted).replace(",", "")


def _plain_signs(text: str) -> str:
    text = re.sub(r"= ?-\s(?=\.?\d)", "= -", re.sub("[$€£¥]", "", text.replace("−", "-")))
    return re.sub(r"\n[ \t]{0,9}[-*](?=\s)", "\n;", text)  # a list's dash is no minus


def _value(text: str) -> float:
    return round(float(text.replace(",", "")), 6)


# ---- Equations in a trace ------------------------------------------------------------------------


@dataclass
class Equation:
    """Arithmetic that a trace writes down, such as `(3 + 4) / 2 = 3.5`."""

    text: str
    operands: list[float]  # of its left side, without signs and divisors: an average divides by a count
    result: float  # its right side
    true: bool  # is the left side worth the right side, within 1 % or its last digit?


def equations(thinking: str) -> list[Equation]:
    """Find `expression = number` in a trace, in the order written; linear in its length."""
    tokens = re.findall(rf"{SIGNED}|[-+*/×÷()=%]|[^\s\d]", _plain_signs(thinking))
    found = []
    for i, (token, right) in enumerate(zip(tokens, tokens[1:], strict=False)):
        after = "".join(tokens[i + 2:i + 4])  # the right side of `3 + 9 = 24 / 2` is not read
        if token != "=" or not right[-1].isdecimal() or re.match(r"[-+*/×÷].*\d", after):
            continue
        left = _expression_before(tokens, i)
        value = _arithmetic(" ".join(left))
        if value is None or not set(left) & set("+-*/"):  # `sales (2018) = 41` states a value
            continue
        pairs, result = zip(["", *left], left, strict=False), _value(right)
        operands = [abs(_value(t)) for before, t in pairs if t[-1].isdecimal() and before != "/"]
        slack = 0.99 * 10.0 ** -len(right.partition(".")[2]) if "." in right else 0.005  # rounded, or cut off
        values = [value] + [100 * value] * (after[:1] == "%")  # 20 / 50 = 40 %
        true = any(abs(v - result) <= max(0.01 * abs(v), slack) for v in values)
        is_range = re.fullmatch(r"\d\d+ - \d\d+", " ".join(left)) and operands[0] < operands[1]
        if true or not is_range:  # `ages 18-29 = 42` states a value
            found.append(Equation(f"{' '.join(left)} = {result:g}", operands, result, true))
    return found


def _expression_before(tokens: list[str], end: int) -> list[str]:
    """The numbers, operators and brackets that stand directly before token `end`."""
    left: list[str] = []
    for token in reversed(tokens[max(0, end - 100):end]):
        is_number = token[-1].isdecimal()
        if not (is_number or token in "-+*/×÷()%"):
            break
        if is_number and left and left[-1][-1].isdecimal():  # "in 2010 3 + 4 = 7": the year is not in it
            break
        if token != "%":
            left.append(token.translate(str.maketrans("×÷", "*/", ",")))
    left.reverse()
    while left and left[0] in "-+*/)":  # a list's dash
        del left[0]
    return left


def _derived(thinking: str, known: set[float]) -> set[float]:
    """Results of the true equations in a trace whose operands are known, or derived before."""
    derived: set[float] = set()
    for equation in equations(thinking):
        if equation.true and all(x in known or x in derived for x in equation.operands):
            count = len(equation.operands)  # by which an average divides, and which is in no image
            derived |= {abs(equation.result)} | ({count} if f") / {count} =" in equation.text else set())
    return derived


def _arithmetic(expression: str) -> float | None:
    """Value of `+ - * /` on plain numbers, else None; the text is parsed, never executed."""
    operators = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}

    def value(node: ast.AST) -> float:
        if isinstance(node, ast.BinOp) and type(node.op) in operators:
            return operators[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            return float(node.value)
        raise ValueError("not arithmetic")

    try:
        return value(ast.parse(expression, mode="eval").body)
    except (ValueError, SyntaxError, ArithmeticError, RecursionError, MemoryError):
        return None
