"""How held-out responses are judged: accuracy, and whether the thinking is valid.

Groundedness and `thinking_fault` tell thinking from pseudo thinking: fluent text whose values are
not in the image. They are for evaluation alone; nothing here is a reward.
"""

import ast
import math
import operator
import re
from calendar import month_abbr, month_name
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product
from typing import Any

import reward
from reward import NUMBER, SIGNED, Example, split_response, verify

# ---- Judging a response --------------------------------------------------------------------------


def judge(example: Example, response: str, finished: bool) -> dict[str, Any]:
    """Judge a held-out response; what needs visual facts, or cannot be judged, is None without."""
    verdict = verify(response, example, finished, example.tolerance)
    answer, facts = reward.final_answer(response), example.facts or ""
    scores = {name: score(answer) for name, score in example.scores.items()}
    official = scores.pop("official", reward.relaxed_match(answer, example.answer.rstrip(". ")))
    grounded, quoted = groundedness(split_response(response)[0], facts, example.question)
    fault = thinking_fault(response, example) if facts else None
    unknown = fault is None or verdict.correct and "not judged" in fault
    return {"name": example.name, "source": example.source, "question": example.question,
            "answer": example.answer, "response": response, "parsed": verdict.answer,
            "accuracy": verdict.correct, "official": official, "scores": scores,
            "any_format": verdict.correct or ends_in(response, example.answer),
            "in_format": verdict.in_format, "finished": finished, "thinking_fault": fault,
            "valid_thinking": None if unknown else verdict.correct and not fault,
            "grounded_numbers": grounded if facts else 0, "quoted_numbers": quoted if facts else 0}


def summarise(predictions: list[dict[str, Any]]) -> dict[str, Any]:
    """Average judged responses, over all and by source (kind of question, or part of the data)."""

    def mean(key: str, rows: list[dict[str, Any]]) -> float | None:
        values = [row[key] for row in rows if row.get(key) is not None]
        return sum(values) / len(values) if values else None

    every, sources = [row | row["scores"] for row in predictions], defaultdict(list)
    for row in every:
        sources[row["source"]].append(row)
    # Combinations that training never shows count in figures of their own.
    new = [row for row in every if is_new(row["source"])]
    rows = [row for row in every if not is_new(row["source"])] or new
    own = dict.fromkeys(name for row in predictions for name in row["scores"])  # of a data set
    keys = ("accuracy", "any_format", "official", *own, "valid_thinking", "in_format", "finished",
            "length")
    summary = {key: mean(key, rows) for key in keys}
    # The published scores of ChartQA and SLAKE are means over these parts, not over rows.
    if sources.keys() in ({"human", "augmented"}, {"open", "closed"}):
        parts = {f"official_{name}": mean("official", part) or 0.0
                 for name, part in sorted(sources.items())}
        summary |= parts | {"official": sum(parts.values()) / len(parts)}
    judged = [r["valid_thinking"] is not None for r in rows if r["thinking_fault"] is not None]
    summary["thinking_judged"] = sum(judged) / len(judged) if judged else None
    grounded, quoted = (sum(r[f"{key}_numbers"] for r in rows) for key in ("grounded", "quoted"))
    summary["groundedness"] = grounded / quoted if quoted else None
    for name, part in sources.items() if len(sources) > 1 else []:
        for key in ("accuracy", "any_format"):
            summary[f"{key}_{name}"] = mean(key, part)
    if new:
        summary |= {"accuracy_new": mean("accuracy", new),
                    "valid_thinking_new": mean("valid_thinking", new)}
    return summary | {"rows": len(rows)}


def is_new(source: str) -> bool:
    """Is this the source of tests on combinations that training never shows?"""
    return source.startswith("new_")


def one_line(summary: dict[str, Any]) -> str:
    """The averages that matter most, as text."""
    shown = {"held-out accuracy": "accuracy", "with valid thinking": "valid_thinking",
             "answers in the format": "in_format"}
    return ", ".join(f"{name} {summary[key]:.3f}" for name, key in shown.items()
                     if summary[key] is not None)


# ---- Valid thinking ------------------------------------------------------------------------------


def groundedness(thinking: str, facts: str, question: str = "") -> tuple[int, int]:
    """Count the numbers that a trace quotes: (those among the facts or derived from them, all)."""
    found = [bool(grounded) for _, _, grounded in quoted_numbers(thinking, facts, question)]
    return sum(found), len(found)


def thinking_fault(response: str, example: Example) -> str:
    """What rules find wrong by the facts: "" if valid, "not judged: ..." if they cannot know."""
    (thinking, answers), facts = split_response(response), example.facts or ""
    found, quoted = equations(thinking), quoted_numbers(thinking, facts, example.question)
    for false in [e.text for e in found if e.true is False] + _false_comparisons(thinking):
        return f"{false} is false"
    for start, end in [(a, b) for a, b, grounded in quoted if grounded is False]:
        number, misread = thinking[start:end], " ".join(thinking[:end].split()[-3:])
        said = f"'{misread}'" if number in re.findall(NUMBER, facts) else number
        return f"{said} is not in the image"
    if not quoted and not found:
        return "nothing is quoted from the image"
    # A right answer may be written otherwise than the example's ("42 %" for "42").
    right = verify(response, example, tolerance=example.tolerance).correct
    accepted = [example.answer, *(answers[:1] if right else [])]
    if not any(concludes(thinking, answer, example.question) for answer in accepted):
        return f"it does not end in {example.answer}"
    unknown = [f"where {thinking[a:b]} comes from" for a, b, grounded in quoted if grounded is None]
    unknown += [e.text for e in found if e.true is None] + _unused(thinking, found, example.answer)
    cells, names = read_facts(facts)
    asked = {names[name] for name in re.findall(_any_of(names), _typed(example.question))}
    wanted = {abs(value) for labels, value in cells if asked & labels}
    if not unknown and wanted and wanted.isdisjoint(_values(thinking)):
        unquoted = f"no value of {' or '.join(sorted(asked))} is quoted"
        return unquoted if found else f"not judged: {unquoted}"
    return f"not judged: {unknown[0]}" if unknown else ""


def _unused(thinking: str, found: list["Equation"], answer: str) -> list[str]:
    """Equations whose result is neither used nor the answer: arithmetic for its own sake?"""
    wanted, unused = abs(reward.parse_number(answer) or 0.0), []
    counts = Counter(_values(thinking) + [x for e in found for x in e.operands])
    for e in found if wanted else []:  # in words, an answer need not follow from numbers alone
        size, percent = abs(e.result), round(abs(100 * e.result), 6)
        own = _values(e.text).count(size) + e.operands.count(size)
        if counts[size] <= own and not counts[percent] and wanted not in (size, percent):
            unused.append(f"what {e.text} is for")
    return unused


def _false_comparisons(thinking: str) -> list[str]:
    """Find `4 > 4`, also with names (`red 4 > blue 7`), and "4 is more than 7"."""
    # No part of a calculation: `4 + 7 > 9`.
    found = re.finditer(rf"(?<![\d.,])(?<![-+*/^] )(?<![-+*/^])({NUMBER})(?: [a-z]+)? ?"
                        rf"(>|<|is (?:{MORE}) than) {{0,2}}(?:[a-z]+ )?({NUMBER})(?! ?[-+*/])",
                        _typed(thinking))
    return [" ".join(m[0].split()) for m in found if (_value(m[1]) - _value(m[3])) * (
        -1 if re.search("<|less|few|short|low|small", m[2]) else 1) <= 0]


def concludes(thinking: str, answer: str, question: str = "") -> bool:
    """Does the end of a text say the answer, or for yes and no at least not the other one?"""
    sentences = re.split(r"(?<=[.!?])\s+|\n+|;", _typed(thinking).strip())
    answer, last = reward.plain(answer), reward.plain(sentences[-1])
    if reward.parse_number(answer) is not None:
        last = next((s for s in reversed(sentences) if re.search(r"\d", s)), "")
        last = re.split(r"\b(?:where|because|since)\b", last)[0]
        _, *said = re.split(r"\b(?:so|thus|hence|therefore|answer|conclusion)\b", last)
        numbers = re.findall(rf"(?<!\w)(?:{SIGNED}) ?%?", said[-1] if said else last)
        # The question's may follow: "Sales were 12 in 2015".
        asked = re.findall(NUMBER, question)
        new = [n for n in numbers if not {*re.findall(NUMBER, n)} & {*asked}]
        numbers = numbers if said else numbers[-1:] + new[-1:]
        return any(reward.answers_match(n, answer) for n in numbers) or ends_in(thinking, answer)
    if answer in ("yes", "no"):
        return not re.search(r"\bno\b" if answer == "yes" else r"\byes\b", last)
    items = answer.strip("[]").split(",") if reward.is_list(answer) else [answer]
    return all(re.search(rf"(?<!\w){re.escape(reward.plain(item))}(?!\w)", last) for item in items)


def ends_in(text: str, answer: str) -> bool:
    """Are the last words or numbers of a text the answer, formatting aside?"""

    def words(text: str) -> list[str]:
        text = re.sub(r"= ?-\s(?=\.?\d)", "= -", _typed(re.sub("[$€£¥]", "", text)))
        return [word.replace(",", "") for word in re.findall(rf"{SIGNED}|\w+", text)]

    wanted = words(answer)
    return bool(wanted) and words(text)[-len(wanted):] == wanted


# ---- Numbers that a trace quotes -----------------------------------------------------------------

MARKS = r"(?m)</?[A-Za-z]\w*>|[$€£¥]|\*\*|^[ \t]{0,9}[-*](?=\s)"  # tags, currency, bold, dashes
MORE = "more|less|fewer|taller|shorter|higher|lower|greater|larger|smaller|bigger"
# Between a name and its value: "In 2015 the value is 12", "January's, at -3.5", "(red) = 4".
LINK = (r"(?:\s|[:=()']|,(?= (?:at|with) )|\b(?:is|was|are|has|have|had|reads?|shows?|with|at|an?"
        r"|the|of|in|it|its|s|values?|heights?|bars?|years?|there|about|only|\w{2,5}est|m\w+imum)\b)")
# After a number that is not read off: "3 more than", "50 % of", "2 times", "4 + 7 = 11".
RELATIVE = rf"\s?%?\s?(?:(?:[a-z]+ )?(?:{MORE}|times|than|above|below|of)\b|[-+*/])"
OTHER = r"[^\d\s%)]\s*(?:\band|\bor|\bthan|\bto|[-+*/,])\s+(?:the )?$"  # "the sum of red and"
# Words that derive a number: "Together they are 11".
CUES = (rf"\b(?:{MORE}|together|total|sum|altogether|combined|differ\w*|gap|twice|double|half|third"
        r"|quarter|average|mean|median|ratio|percent\w*|share|r[io]se|fell|gr[eo]w\w*|\w+creased?"
        r"|change\w*|product|squared?|times|much)\b")
# Number (between the bars) of a step, an ordinal, or a count of things.
STEP = r"\b(?:step|part|no\.?) \||#\||\|(?:st|nd|rd|th)\b|(?:^|\n) *\|[.)] \S"
COUNT = (rf"\| (?!(?:and|or|so|is|are|was|from|with|for|to|in|as|at|which|because|but|{MORE}"
         r"|plus|minus|times|divided|multiplied|equals|percent|\w+illion|thousand)\b)[a-z]{3}")
WORTH = {"half": 2.0, "twice": 2.0, "double": 2.0, "third": 3.0, "triple": 3.0, "quarter": 4.0,
         "dozen": 12.0}
MONTHS = dict(zip(map(str.lower, [*month_abbr, *month_name]),
                  map(str.lower, [*month_name, *month_abbr]), strict=True))


def _padded(pattern: str, sign: str, text: str) -> str:
    """Put a sign for what matches, and spaces before it: all else stays in its place."""
    return re.sub(pattern, lambda match: match.expand(sign).rjust(len(match[0])), text)


def _typed(text: str) -> str:
    """Lower case and plain signs, without marks; of the same length."""
    text = text.replace("İ", "I").lower()  # the one letter that is two in lower case
    return _padded(MARKS, " ", text.translate(str.maketrans("−–×·÷’≈", "--**/'=")))


def _value(text: str) -> float:
    return round(float(text.replace(",", "")), 6)


def _values(text: str, pattern: str = NUMBER) -> list[float]:
    return [_value(number) for number in re.findall(pattern, text)]


def read_facts(facts: str) -> tuple[list[tuple[set[str], float]], dict[str, str]]:
    """Read `red 4, blue 7`, `Peru: Share = 45%, ...` or CSV: [(names, value)], and all names.

    These as a dictionary, from what a trace may write (Jan, January) to what the facts do.
    """
    cells: list[tuple[set[str], float]] = []
    header: list[str] = []
    # Runs of spaces, as of a table that is set in columns, would take their cube in time.
    for line in re.split(r"[;\n]", re.sub(r"[^\S\n]+", " ", _typed(facts))):
        row, _, rest = line.partition(": ") if re.search(": .*=", line) else ("", "", line)
        parts = [part.strip() for part in re.split(r",\s+", rest)]
        pairs = [re.fullmatch(rf"(.*?)\s*[=:]?\s*({SIGNED})\D{{0,3}}", part) for part in parts]
        header = header if any(pairs) else parts
        is_table = len(pairs) > 1 and all(pair and not pair[1] for pair in pairs[1:])
        for i, pair in enumerate(pairs):
            if pair and not (is_table and i == 0):
                labels = {parts[0], *header[i:i + 1]} if is_table else {row.strip(), pair[1]}
                cells.append((labels - {""}, _value(pair[2])))
    names = {name: name for labels, _ in cells for name in labels}
    return cells, {MONTHS[name]: name for name in names if name in MONTHS} | names


def _any_of(names: dict[str, str]) -> str:
    words = sorted((n for n in names if not re.fullmatch(r"\d?\d", n)), key=len, reverse=True)
    return rf"(?<!\w)(?:{'|'.join(map(re.escape, words)) or '(?!)'})(?!\w)"


def _readings(text: str, facts: str) -> dict[int, bool]:
    """Numbers that stand beside names of the facts: {their end: is it a value of these names?}."""
    cells, names = read_facts(facts)
    name, found = f"({_any_of(names)})", {}
    named = (rf"(?:{name}(?:\s|[()']|\b(?:in|of|for|the|s)\b){{1,4}})?"
             rf"{name}({LINK}{{0,12}}?)({SIGNED})")
    for m in re.finditer(rf"{named}|(?<![\d.,])({SIGNED}) ?\({name}\)", text):
        number, end, link = m[4] or m[5], m.end(4) if m[4] else m.end(5), m[3] or ""
        before = text[max(0, m.start() - 30):m.start()]
        # The sum of two bars, or what one has more than another, is no bar's height.
        states = re.search(r"[=:]|\b(?:is|was|are|has|have|had|reads?|shows?)\b", link)
        if link.endswith("in ") or states and (
                re.match(RELATIVE, text[end:end + 30]) or re.search(OTHER, before)
                or re.search(rf"{CUES}\W+(?:\w+ ){{0,4}}$", before)):
            continue
        labels, nearest = {names[n] for n in (m[1], m[2], m[6]) if n}, {names[m[2] or m[6]]}
        values = ([v for own, v in cells if labels <= own]
                  or [v for own, v in cells if nearest <= own])
        right = any(_value(number) in (v, round(v, len(number.partition(".")[2]))) for v in values)
        if right or number not in names:  # "in 2015 and 2017"
            found[end] = right
    return found


def quoted_numbers(thinking: str, facts: str,
                   question: str = "") -> list[tuple[int, int, bool | None]]:
    """Find the numbers a trace quotes: where each begins and ends, and whether it is grounded.

    Beside a name of the facts it must be that name's; else among the facts, or derived in signs or
    words; None if it may follow but no word says so. The question's, steps and counts do not count.
    """
    text, written = _typed(thinking), equations(thinking)
    readings, many = _readings(text, facts), len(read_facts(facts)[0])
    known = {round(value, digits) for value in _values(_typed(facts), SIGNED)
             for digits in (0, 1, 2, 6)}
    named = {n for word, n in WORTH.items() if word in question.lower()}  # half is / 2
    given = ({*_values(question)} | named) - {abs(value) for value in known}
    percent = _values(_typed(f"{facts} {question}"), rf"({NUMBER}) ?%")
    known |= {round(value / 100, 6) for value in percent}  # 30 % is 0.3
    known |= _derived(written, {abs(value) for value in known} | given, many)
    places = {i: e for e in written for i in range(*e.span)}
    found: list[tuple[int, int, bool | None]] = []
    recent: tuple[float, ...] = ()
    for m in re.finditer(SIGNED, text):
        number, end, place, value = m[0].lstrip("-"), m.end(), places.get(m.start()), _value(m[0])
        around = f"{text[max(0, m.start() - 9):m.start()]}|{text[end:end + 20]}"
        is_count = number.isdecimal() and value <= many and (
            "how many" in question.lower() or re.search(COUNT, around))
        grounded = readings.get(end)
        if grounded is not None:
            pass
        elif abs(value) in given or not place and (is_count or re.search(STEP, around)):
            continue
        elif value in known or (place or value > 0) and {-value, abs(value)} & known:
            grounded = True
        elif place and place.true is not None or not any(
                _rounds(x, number) for x in _one_step(recent)):
            grounded = False
        elif re.search(CUES, question.lower() + text[max(0, m.start() - 60):end + 30]):
            grounded = True
        if grounded and abs(value) not in recent:
            recent = (abs(value), *recent[:5])
        found.append((end - len(number), end, grounded))
    return found


@lru_cache(maxsize=64)
def _one_step(known: tuple[float, ...]) -> list[float]:
    """What follows from one, two or all of these numbers by a step of arithmetic."""
    results = [sum(known), sum(known) / max(1, len(known)), 50, 100 / 3, 25]  # "a third is 33 %"
    for a in known:
        results += [2 * a, a / 2, 3 * a, a / 3, a * a, 100 - a, 100 * a]
    for a, b in product(known, known):
        results += [a + b, abs(a - b), a * b, (a + b) / 2]
        results += [a / b, 100 * a / b, 100 * abs(a - b) / b] if b else []
    return results


# ---- Equations in a trace ------------------------------------------------------------------------


@dataclass
class Equation:
    """Arithmetic that a trace writes down, such as `(3 + 4) / 2 = 3.5`."""

    text: str
    operands: list[float]  # of the side that calculates, without divisors and exponents
    divisors: list[float]  # these: an average divides by a count, which is in no image
    others: list[float]  # numbers of the other side, such as 7 in `(3 + 4) / 2 = 7 / 2`
    result: float  # what the other side is worth
    true: bool | None  # are the sides equal, or rounded to the digits written? None: cannot be read
    span: tuple[int, int]


# What makes text calculation: operators as signs, no units; apart are list commas and full stops.
UNIT = (r"(?:/ ?[a-z]{2,}| \([a-z ]{1,30}\)"
        r"| (?!(?:and|so|of|because|which|that|if|or|as|is|are|gives|per ?cent)\b)"
        r"[a-z]{2,})")
CALCULATION = {
    r"\\(?:times|cdot)\b": "*", r"\\div\b": "/",
    r"(?<=\d)\\[dt]?frac ?{(\d+)} ?{(\d+)}": r" \1/\2",
    r"\\[dt]?frac ?{([^{}]{1,30})} ?{([^{}]{1,30})}": r"((\1)/(\2))",
    r"\bplus\b": "+", r"\bminus\b": "-", r"\bdivided by\b": "/", r"\bequals\b": "=",
    r"\b(?:times|multiplied by)\b|(?<![a-z])x(?= {0,3}[\d(.])": "*",
    r"\b(?:about|roughly|only|exactly)\b": "",
    r"(?<=[a-z])/(?=\d)": "@", rf"(?<=[\d)%]){UNIT}{{1,4}}(?= {{0,3}}[-+*/=)])": "",
    r"(?<=\d) and +(?=\d+/\d)": "",  # 1 and 1/3
    r"(?<=[\d)%]) (?:is|are|makes?|gives?)(?= +-?[\d.])": "≡", r"(?<=[=≡]) ?- (?=[\d.])": "-",
    r"(?<=\d) (?=\d{3}(?!\d|\.\d))(?<!\d{4} )": ",",  # 350 000
    r",(?!\d{3}(?!\d))|\.(?!\d)": ";"}
OPERAND = rf"(?:\( ?){{0,4}}-?(?:\d{{1,3}} {{1,12}}\d/\d+|{NUMBER})%?(?: ?\)){{0,4}}"
EXPRESSION = rf"(?:(?<![\w)%])-)?{OPERAND}(?:(?: *[-+*/^] *-?|(?=\()){OPERAND})*"
OPERATOR = r"[\d)%] *[-+*/^]|\d\("
# Before an expression that began earlier: V + 15, his 25 + his 1, 1/2 (68), 13,2000, 6:00 + 18, W1.
BEFORE = r"(?:[\w)%] *- *(?:[a-z]+ )?|[*/+^@][ ;]*(?:[a-z]+ )?|\d[:;]|\) +).$|\d \($|[a-z]\d$"


@lru_cache(maxsize=4)  # judging one response asks for them three times
def equations(thinking: str) -> list[Equation]:
    """Find `expression = number` in a trace; linear in its length."""
    text, found, in_chain = _typed(thinking), [], False
    for pattern, sign in CALCULATION.items():
        text = _padded(pattern, sign, text)
    for a, b in pairwise(re.finditer(rf"{EXPRESSION}|\Z", text)):
        link = text[a.end():b.start()].strip()
        # Without a bracket that is closed elsewhere: `(3 + 4 = 7)`.
        left, right = (re.sub(r"^\(([^()]*)$|^([^()]*)\)$", r"\1\2", side[0]) for side in (a, b))
        by_left, by_right = re.search(OPERATOR, left), re.search(OPERATOR, right)
        in_chain = bool(in_chain or by_left or by_right) and link in ("=", "≡")
        if not in_chain and not (by_left and link.startswith("=")):
            continue
        side, number = (right, left) if by_right and not by_left else (left, right)
        after = text[b.end():b.end() + 5]
        unread = (not in_chain  # `4 + 7 = eleven`, `V + 15 = 141`, `3 + 4 = 7x`, `7 / 2 = 3 r1`
                  or re.search(BEFORE, text[max(0, a.start() - 9):a.start()] + left[:1])
                  or re.match(r"\(?[a-z](?![a-z])| ?[-+*/^] ?\(?[a-z]| r(?:em| ?\d)|;;", after))
        true = None if unread else _equal(side, number, after)
        # `ages 18-29 = 42`, `half of 60 is 60 / 2`, `2 hours = 120 minutes`, `1/2 dozen = 6` state
        # values.
        bounds = re.fullmatch(r"(\d\d+)-(\d\d+)", side)
        if true is False and (not by_left or link == "≡" and by_right
                              or bounds and int(bounds[1]) < int(bounds[2])
                              or re.fullmatch(r"(?:\d+ +)?\d+/\d+", side)
                              and re.search("[a-z]", _typed(thinking)[a.end():b.start()])):
            continue
        said = f"{left} = {right if in_chain else '?'}".replace(",", "")
        said = " ".join(re.findall(rf"{NUMBER}|\S", said))
        divisors = _values(side.replace("/ ", "/").replace("^ ", "^"), rf"(?<=[/^])(?:{NUMBER})")
        operands = [*(Counter(_values(side)) - Counter(divisors)).elements()]
        result = round(max(_worth(number), default=0.0), 6)
        found.append(Equation(said, operands, divisors, _values(number), result, true,
                              (a.start(), b.end())))
    return found


def _equal(side: str, number: str, after: str) -> bool | None:
    """Is the side worth the number, or as much as another calculation? None: cannot be read."""
    values, others = _worth(side), _worth(number)
    if not values or not others:
        return None
    if number.endswith("%") or after.strip().startswith("cent"):
        values |= {100 * value for value in values}
    if re.fullmatch(rf"-?(?:{NUMBER})%?", number):
        return any(_rounds(value, number, bool(re.search("[*/^%]", side))) for value in values)
    others |= _worth(re.split("[-+*/^]", number)[0])  # 100 / 5 = 20 * 2 = 40 goes on from 20
    return any(abs(a - b) <= 1e-6 * max(1, abs(a)) for a in values for b in others)


def _worth(side: str) -> set[float]:
    """What an expression may be worth: 20 % as 0.2, as 20, or of what it is added to; 50/ 1/2."""
    if len(side) > 300:
        return set()
    plain = re.sub(r"(\d+) +(\d+/\d+)", r"(\1+\2)", side.replace(",", "").replace("^", "**"))
    plain = re.sub(r"(?<=[\d)])\(", "*(", plain)  # 2(3 + 4)
    forms = {plain.replace("%", ""), re.sub(r"([\d.]+)%", r"(\1/100)", plain),
             re.sub(r"([-+]) ?([\d.]+)%", r"* (1 \1 \2/100)", plain),
             re.sub(r"(?<![\d.)/])(\d+/\d+)(?![\d.])", r"(\1)", plain.replace("%", ""))}
    return {value for form in forms if (value := _arithmetic(form)) is not None}


def _rounds(value: float, number: str, rough: bool = True) -> bool:
    """Is it the number, or rounded or cut off to its digits? Sums of whole numbers are exact."""
    written, digits = _value(number.rstrip("%")), len(number.rstrip("%").partition(".")[2])
    if math.isclose(value, written, rel_tol=1e-6, abs_tol=1e-6):
        return True
    if value * written < 0 or abs(round(value, digits) - value) < 1e-9 or not (digits or rough):
        return False
    off, unit = abs(value) - abs(written), 10.0 ** -digits
    return -unit / 2 <= off < unit and (digits > 0 or abs(off) <= 0.06 * abs(value))


def _derived(found: list[Equation], known: set[float], many: int) -> set[float]:
    """Results of true equations whose operands are known or derived; and counts they divide by."""
    derived, counts = set(), {float(many), *(float(len(e.operands)) for e in found)}
    for e in [e for e in found if e.true] * 2:  # a total may be used before it is written down
        if all(x in known or x in derived or x == 100 for x in e.operands):
            derived |= {e.result, abs(e.result), round(100 * e.result, 6), 100.0, *e.others}
            if ") /" in e.text or len(e.operands) == 1:
                derived |= counts & {*e.divisors}
    return derived


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv, ast.Pow: math.pow}


def _arithmetic(expression: str) -> float | None:
    """Value of `+ - * / **` on plain numbers, else None; the text is parsed, never executed."""

    def value(node: ast.AST) -> float:
        match node:
            case ast.BinOp(left, op, right):
                return OPERATORS[type(op)](value(left), value(right))
            case ast.UnaryOp(ast.USub(), operand):
                return -value(operand)
            case ast.Constant(int() | float() as number):
                return float(number)
        raise ValueError("not arithmetic")

    try:
        return value(ast.parse(expression.strip(), mode="eval").body)
    except (ValueError, LookupError, SyntaxError, ArithmeticError, RecursionError, MemoryError):
        return None
