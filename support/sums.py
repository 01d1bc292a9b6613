"""Word problems of two or three steps, with traces of three qualities: `--data sums`.

For a small pretrained language model (support/smollm2.py). As on the toy, traces of lower quality
may calculate with numbers that are not in the question; the answer is always right, and follows
from them where it can. `--data sums:new`, for tests alone, has orders that training never has.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from reward import Example
from support import UserError
from support.toy import UNGROUNDED

SPLITS = {"train": (0, 2048), "val": (2048, 512), "test": (2560, 512)}  # first problem, how many
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack")
THINGS = ("apples", "books", "coins", "stamps", "shells", "cards", "pens", "stones", "plums")
STEPS = {  # sign: wordings of a step in a question, as (text, its name in the facts)
    "+": (("{name} finds {n} more.", "finds"), ("{name} buys {n} more.", "buys"),
          ("A friend gives {name} {n}.", "gets")),
    "-": (("{name} loses {n}.", "loses"), ("{name} sells {n}.", "sells"),
          ("{name} gives away {n}.", "gives away")),
    "*": (("Soon {name} has {n} times as many.", "times"),)}
# Orders of steps that are kept for `sums:new`, alone or as part of a longer story.
NEW = (("*", "+"), ("-", "-"))


@dataclass(frozen=True)
class Problem:
    """A start and the steps from it, such as (7, (("+", 5), ("-", 4)))."""

    start: int
    steps: tuple[tuple[str, int], ...]

    def results(self) -> list[int]:
        """The result of every step."""
        value, found = self.start, []
        for sign, n in self.steps:
            value = {"+": value + n, "-": value - n, "*": value * n}[sign]
            found.append(value)
        return found

    def numbers(self) -> list[int]:
        """The numbers that the question gives."""
        return [self.start, *(n for _, n in self.steps)]

    def is_sound(self) -> bool:
        """Are all results between 1 and 99, and no number there twice?"""
        return len({*self.numbers()}) == len(self.numbers()) and all(
            0 < x < 100 for x in [self.start, *self.results()])


def draw(rng: np.random.Generator, signs: tuple[str, ...], result: int = 0) -> Problem | None:
    """Try to find a problem with these steps, and with this last result if one is given."""
    steps = [(sign, int(rng.integers(2, 6 if sign == "*" else 13))) for sign in signs]
    start = float(result or rng.integers(3, 21))
    for sign, n in reversed(steps) if result else ():  # back from the result
        start = {"+": start - n, "-": start + n, "*": start / n}[sign]
    problem = Problem(int(start), tuple(steps))
    return problem if start == int(start) and problem.is_sound() else None


def problems(new: bool) -> Iterator[Problem]:
    """Problems without end, no two alike; of them two in three have two steps."""
    orders = [order for length in (2, 3) for order in itertools.product(STEPS, repeat=length)
              if order.count("*") < 2
              and new == any(pair in NEW for pair in itertools.pairwise(order))]
    rng, seen = np.random.default_rng([7, new]), set()
    while True:
        length = 3 if rng.random() < 1 / 3 else 2
        choices = [order for order in orders if len(order) == length]
        problem = draw(rng, choices[rng.integers(len(choices))])
        if problem and problem not in seen:
            seen.add(problem)
            yield problem


def tell(problem: Problem, rng: np.random.Generator) -> tuple[str, str, list[str]]:
    """The question in words, what it asks for, and what each of its numbers is called."""
    name, things = NAMES[rng.integers(len(NAMES))], THINGS[rng.integers(len(THINGS))]
    question, called = f"{name} has {problem.start} {things}. ", ["start"]
    for sign, n in problem.steps:
        text, word = STEPS[sign][rng.integers(len(STEPS[sign]))]
        question += text.format(name=name, n=n) + " "
        called.append(word)
    goal = f"{things} that {name} has now"
    return f"{question}How many {things} does {name} have now?", goal, called


def invented(problem: Problem, rng: np.random.Generator) -> Problem:
    """The same steps from numbers that are not in the question; if it can be, with its result."""
    signs = tuple(sign for sign, _ in problem.steps)
    for result in [problem.results()[-1]] * 500 + [0] * 500:
        other = draw(rng, signs, result)
        if other and not {*other.numbers()} & {*problem.numbers()}:
            return other
    return problem  # one in a thousand has no such form


def make_examples(data: str, split: str, traces: str) -> list[Example]:
    """Make a split of `sums`, or of `sums:new`, which has a test split alone. Raises UserError."""
    new = data == "sums:new"
    if new and split != "test" or data not in ("sums", "sums:new"):
        raise UserError(f"--data {data}: give sums; sums:new is for eval.py alone")
    first, count = (0, 512) if new else SPLITS[split]
    rng, examples = np.random.default_rng([8, first, new]), []
    for i, problem in enumerate(itertools.islice(problems(new), first, first + count)):
        question, goal, called = tell(problem, rng)
        shown = invented(problem, rng) if rng.random() < UNGROUNDED[traces] else problem
        facts = ", ".join(f"{word} {n}" for word, n in zip(called, problem.numbers(), strict=True))
        quoted = ", ".join(f"{word} {n}" for word, n in zip(called, shown.numbers(), strict=True))
        values, answer = [shown.start, *shown.results()], str(problem.results()[-1])
        working = [f"{values[j]} {sign} {n} = {values[j + 1]}"
                   for j, (sign, n) in enumerate(shown.steps)]
        trace = (f"Goal: {goal}.\nObservation: {quoted}.\nReasoning: {', '.join(working)}.\n"
                 f"Conclusion: {answer}.")
        examples.append(Example(question, answer, None, trace, facts,
                                f"{len(problem.steps)}-step", f"{data} {split} row {i}"))
    return examples
