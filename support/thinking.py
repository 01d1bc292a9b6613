"""How held-out responses are judged: accuracy, and whether the thinking is valid.

Groundedness and `thinking_fault` tell thinking from pseudo thinking: fluent text whose values are not in the image.
They are for evaluation alone; nothing here is a reward.
"""

import ast
import operator
import re
from dataclasses import dataclass
from typing import Any

import reward
from reward import NUMBER, SIGNED, Example, split_response, verify

# ---- Judging a response --------------------------------------------------------------------------


def judge(example: Example, response: str, finished: bool) -> dict[str, Any]:
    """Judge a held-out response.

    *accuracy* wants the format, *official* takes whatever stands last, *any_format* the last word or number.
    What needs visual facts is None without them.
    """
    verdict = verify(response, example, finished, tolerance=0.05)
    answer, (thinking, _) = reward.final_answer(response), split_response(response)
    scores = {name: score(answer) for name, score in example.scores.items()}
    official = scores.pop("official", reward.relaxed_match(answer, example.answer.rstrip(". ")))
    grounded, quoted = groundedness(thinking, example.facts or "", example.question)
    fault = thinking_fault(response, example) if example.facts else None
    return {"name": example.name, "source": example.source, "question": example.question,
            "answer": example.answer, "response": response, "parsed": verdict.answer,
            "accuracy": verdict.correct, "official": official, "scores": scores,
            "any_format": verdict.correct or ends_in(response, example.answer),
            "in_format": verdict.in_format, "finished": finished,
            "thinking_fault": fault,
            "valid_thinking": None if fault is None else verdict.correct and not fault,
            "grounded_numbers": grounded if example.facts else 0,
            "quoted_numbers": quoted if example.facts else 0}


# The published scores of ChartQA and SLAKE are means over these parts, not over rows.
PARTS = ({"human", "augmented"}, {"open", "closed"})


def summarise(predictions: list[dict[str, Any]]) -> dict[str, float | None]:
    """Average judged responses, over all and by source (kinds of question, or parts of the data)."""

    def mean(key: str, rows: list[dict[str, Any]]) -> float | None:
        values = [row[key] for row in rows if row[key] is not None]
        return sum(values) / len(values) if values else None

    sources: dict[str, list[dict[str, Any]]] = {}
    for row in predictions:
        sources.setdefault(row["source"], []).append(row)
    summary = {key: mean(key, predictions) for key in ("accuracy", "any_format", "official")}
    if any(sources.keys() <= part for part in PARTS):
        by_part = {f"official_{name}": mean("official", rows) for name, rows in sorted(sources.items())}
        summary["official"] = sum(by_part.values()) / len(by_part)
        summary |= by_part if len(by_part) > 1 else {}
    # A data set's own, such as multiple_choice; rows without choices have no such score.
    for name in dict.fromkeys(name for row in predictions for name in row["scores"]):
        summary[name] = mean(name, [row["scores"] for row in predictions if name in row["scores"]])
    for key in ("valid_thinking", "in_format", "finished", "length"):
        summary[key] = mean(key, predictions)
    quoted = sum(row["quoted_numbers"] for row in predictions)
    grounded = sum(row["grounded_numbers"] for row in predictions)
    summary["groundedness"] = grounded / quoted if quoted else None
    if len(sources) > 1:
        for name, rows in sources.items():
            summary[f"accuracy_{name}"] = mean("accuracy", rows)
            summary[f"any_format_{name}"] = mean("any_format", rows)
    return summary | {"rows": len(predictions)}


def one_line(summary: dict[str, Any]) -> str:
    """The averages that matter most, as text."""
    text = f"held-out accuracy {summary['accuracy']:.3f}"
    if summary["valid_thinking"] is not None:
        text += f", with valid thinking {summary['valid_thinking']:.3f}"
    return f"{text}, answers in the format {summary['in_format']:.3f}"


# ---- Valid thinking ------------------------------------------------------------------------------


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
