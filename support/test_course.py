"""The course (COURSE.md): these check what you write into exercises.py beside the code.

A check says what was expected of which input, never how it is found. So no assert and no traceback
is shown here, and what is expected stands here as numbers, or is asked of dyme.py. The cases are
drawn by the seed in COURSE_SEED [0]; grade.py gives another, and in COURSE_FILE another file.
"""

import dataclasses
import functools
import hashlib
import importlib.machinery
import importlib.util
import inspect
import itertools
import json
import os
import re
import runpy
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import dyme
import reward
from dyme import Response, Sequence, Step, group_advantages, policy_loss
from reward import Example
from support import data, domains, files, settings, starter, thinking, toy
from test_dyme import Patch, Row

EXERCISES = ("explore_curve", "group_gradient", "right_for_wrong_reasons", "counting_row",
             "sum_loss", "twins", "clipped_loss", "hack", "mended", "will_learn",
             "switch_above", "join_reference", "weigh_by_doubt")
FILE = Path(os.environ.get("COURSE_FILE") or Path(dyme.__file__).with_name("exercises.py"))
Rng = np.random.Generator


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> Rng:
    """What a check draws its cases from: the seed, and the exercise's number."""
    if FILE.exists():
        load(FILE)  # here, so that what hangs in the import is told from what hangs in an exercise
    numbers = re.findall(r"exercise_(\d+)", request.node.name)
    return np.random.default_rng([int(os.environ.get("COURSE_SEED") or 0), *map(int, numbers)])


# ---- How a check speaks --------------------------------------------------------------------------


def refuse(message: str) -> NoReturn:
    """Fail an exercise with this message alone."""
    pytest.fail(message, pytrace=False)


def place(error: BaseException) -> str:
    """What was raised, and at which line of the student's file."""
    said = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    if isinstance(error, SyntaxError):
        return f"{said} ({FILE.name} line {error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if f.filename == str(FILE)]
    return f"{said} ({FILE.name} line {lines[-1]})" if lines else said


def is_stub(error: BaseException) -> bool:
    """Does the student's own code say that it is not written yet?"""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, NotImplementedError) and frames[-1].filename == str(FILE)


@functools.cache
def load(file: Path) -> tuple[Any, str]:
    """A student's file as a module, and what it raised."""
    loader = importlib.machinery.SourceFileLoader("exercises", str(file))
    spec = importlib.util.spec_from_file_location("exercises", file, loader=loader)
    assert spec  # given a loader
    module = sys.modules["exercises"] = importlib.util.module_from_spec(spec)
    try:
        loader.exec_module(module)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - it may raise anything
        return module, place(error)
    return module, ""


def attempt(name: str) -> Any:
    """What the student's file calls `name`; without it the exercise is skipped."""
    if not FILE.exists():
        pytest.skip(f"there is no {FILE.name} yet")
    module, failed = load(FILE)
    if failed:
        refuse(f"{FILE.name} cannot be imported: {failed}")
    found = getattr(module, name, None)
    if found is None or isinstance(found, list | tuple) and not found:
        pytest.skip(f"{FILE.name} has no {name} yet")
    return found


def answer(function: Callable[..., Any], *args: Any, given: str) -> Any:
    """What a student's function returns; what it raises is told without the check around it."""
    failed, unwritten = "", False
    try:
        value = function(*args)
        return [*value] if inspect.isgenerator(value) else value
    except (Exception, SystemExit) as error:  # noqa: BLE001 - it may raise anything
        failed, unwritten = place(error), is_stub(error)
    if unwritten:
        pytest.skip("not written yet")
    refuse(f"{given} raised {failed}")


def floats(value: Any) -> list[float]:
    """All numbers of a value in order: number, tensor, array, lists of these. Raises TypeError."""
    if isinstance(value, Tensor):
        return floats(value.tolist())
    if isinstance(value, list | tuple | np.ndarray):
        return [number for part in value for number in floats(part)]
    if value is None or isinstance(value, str):
        raise TypeError(f"{value!r} is not a number")
    return [float(value)]


def numbers_of(value: Any) -> list[float]:
    """The same; of what does not consist of numbers, none."""
    try:
        return floats(value)
    except (TypeError, ValueError, OverflowError, RecursionError):
        return []


def expect_numbers(got: Any, expected: Any, tolerance: float, given: str) -> None:
    """Refuse unless `got`, in any container, holds the expected numbers.

    Up to a share of the largest: beside it, rounding may leave nothing of one near 0.
    """
    numbers, wanted = numbers_of(got), floats(expected)
    off = tolerance * max(map(abs, wanted)) + 1e-6
    near = [abs(a - b) <= off for a, b in zip(numbers, wanted, strict=False)]
    if len(numbers) != len(wanted) or not all(near):
        refuse(f"{given}\n  expected {shown(expected)}\n  got      {shown(got)}")


def shown(value: Any) -> str:
    """A value as a message shows it: four digits, tensors and arrays as lists."""
    if isinstance(value, Tensor | np.ndarray):
        return shown(value.tolist())
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else f"{value!r:.200}"


# ---- The exercises -------------------------------------------------------------------------------


@pytest.mark.usefixtures("rng")  # nothing to draw: the five groups stand in the course
def test_exercise_01_predict_the_mode() -> None:
    predicted = attempt("MODES")
    r_a = torch.tensor([[0] * 4, [0] * 4, [0, 1, 0, 0], [1] * 4, [1] * 4], dtype=torch.float)
    r_t = torch.tensor([[.2] * 4, [.9, .1, .1, .1], [.5] * 4, [.7] * 4, [.1, .9, .9, .9]])
    explore = dyme.any_correct(r_a, r_t)
    learns = ~explore | ~dyme.no_variance(r_a + r_t)
    right = 0
    form = ('MODES: expected five pairs such as ("explore", True), a mode and a truth value each; '
            "got ")
    if not isinstance(predicted, list | tuple) or len(predicted) != 5:
        refuse(form + repr(predicted)[:200])
    for pair, explores, gradient in zip(predicted, explore, learns, strict=True):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            refuse(form + repr(pair)[:200])
        if not isinstance(pair[0], str) or pair[0] not in ("explore", "memorize"):
            refuse(form + repr(pair)[:200])
        if numbers_of(pair[1]) not in ([0.0], [1.0]):
            refuse(form + repr(pair)[:200])
        mode = "explore" if explores else "memorize"
        right += pair[0] == mode and numbers_of(pair[1]) == [float(gradient)]
    if right < 5:
        refuse(f"MODES: {right} of 5 pairs are right. The first half of a pair is the mode of "
               "Eq. 6; the second says whether what the group adds to the loss of Eq. 8 in that "
               "mode has a gradient.")


# Of N samples so many are right: the share of all choices of 1, 2, ... of them with a right one.
MEASURED: dict[int, list[list[float]]] = {
    4: [[0, 0, 0, 0], [1/4, 1/2, 3/4, 1], [1/2, 5/6, 1, 1], [3/4, 1, 1, 1], [1] * 4],
    6: [[0] * 6, [1/6, 1/3, 1/2, 2/3, 5/6, 1], [1/3, 3/5, 4/5, 14/15, 1, 1],
        [1/2, 4/5, 19/20, 1, 1, 1], [2/3, 14/15, 1, 1, 1, 1], [5/6, 1, 1, 1, 1, 1], [1] * 6],
    64: [[0] * 64, [K / 64 for K in range(1, 65)]]}


def test_exercise_02_explore_with_more_samples(rng: Rng) -> None:
    curve = attempt("explore_curve")
    for N, prompts in ((4, 3), (6, 2), (4, 4), (64, 3)):
        many = [0, 1] if N == 64 else range(N + 1)
        counts = [int(c) for c in rng.permutation([*many] * 2)[:prompts - 1]] + [1]
        sizes = [int(K) for K in rng.permutation(N)[:3] + 1] if N < 64 else [32, 1, 64]
        correct = right_so_often(rng, N, counts)
        p = sum(counts) / (N * prompts)
        expected = [(1 - (1 - p) ** K, sum(MEASURED[N][c][K - 1] for c in counts) / prompts)
                    for K in sizes]
        r_a = f"= {shown(correct)}" if N < 64 else f"of 64 samples each, of which {counts} right,"
        given = f"explore_curve of r_a {r_a} with sizes {sizes}, as pairs (predicted, measured)"
        got = answer(curve, correct.clone(), [*sizes], given=given)
        expect_numbers(got, expected, 2e-4, given)


def test_exercise_03_the_gradient_of_a_group(rng: Rng) -> None:
    gradient = attempt("group_gradient")
    K, D = (int(n) for n in rng.integers(4, 6, 2))
    scores = torch.from_numpy(rng.integers(-8, 9, (K, D)) / 4)
    base = int(rng.integers(2, 8)) / 8  # whose mean has no rounding
    healthy = rng.permutation([1.0, 0.0] + (rng.integers(1, 190, K - 2) / 100).tolist())
    hardly = base + rng.permutation([0, 1] + rng.integers(0, 4, K - 2).tolist()) / 1000
    for rewards in (healthy.tolist(), hardly.tolist(), [base] * K):
        given = f"group_gradient of rewards {shown(rewards)} and scores {shown(scores)}"
        group = torch.tensor(rewards, dtype=torch.float64)
        theta = torch.zeros(D, dtype=torch.float64, requires_grad=True)
        loss = policy_loss((scores @ theta)[:, None], torch.ones(K, 1),
                           group_advantages(group[None])[0] / K, torch.ones(K, dtype=torch.bool))
        expected, = torch.autograd.grad(loss, theta)
        with torch.no_grad():  # to be found without
            got = answer(gradient, group, scores.clone(), given=given)
        expect_numbers(got, expected, 2e-3, given)


def thoughts(rng: Rng) -> tuple[str, str, list[str], list[str], list[str]]:
    """Facts, an answer, and texts of thinking: valid, with a fault, and not to be judged."""
    bars = [str(x) for x in rng.permutation([*toy.COLORS])[:2]]
    a, b, c, d = CHOICES[rng.integers(len(CHOICES))]
    see, see_not = (f"{bars[0]} {x}, {bars[1]} {y}." for x, y in ((a, b), (c, d)))
    valid = [f"{see} {a} + {b} = {a + b}.", f"{see} {b} + {a} = {a + b}."]
    faults = [f"{see} {a} - {b} = {a + b}.", f"{see_not} {c} + {d} = {a + b}.", "So be it."]
    unsure = f"{see} {a} + {b} = {a + b}. {a} - {b} = {a - b}. So it is {a + b}."
    return f"{bars[0]} {a}, {bars[1]} {b}", str(a + b), valid, faults, [unsure]


# Heights a > b, and others with the same sum, all different, their difference too.
CHOICES = [(a, b, c, s - c) for s in range(6, 15) for a in range(s // 2 + 1, min(9, s - 1) + 1)
           for c in range(1, min(9, s - 1) + 1) for b in [s - a]
           if s - c < 10 and len({a, b, a - b, c, s - c, s}) == 6]


def test_exercise_04_right_for_the_wrong_reasons(rng: Rng, tmp_path: Path) -> None:
    shares = attempt("right_for_wrong_reasons")
    facts, right, valid, faults, unsure = thoughts(rng)
    wrong, sound = int(rng.integers(1, 4)), int(rng.integers(1, 3))
    texts, share = faults[:wrong] + valid[:sound] + unsure, wrong / (wrong + sound + 1)
    names = [str(x) for x in rng.permutation([*toy.QUESTIONS])[:4]]
    kinds = dict(zip(names, [texts, [], valid, faults[1:]], strict=True))
    expected = dict(zip(names, [share, None, 0.0, 1.0], strict=True))
    last = []
    for kind, thinkings in kinds.items():
        example = Example("q", right, facts=facts, source=kind)
        last += [thinking.judge(example, f"{text}\nAnswer: {right}", True) for text in thinkings]
        last += [thinking.judge(example, f"{text}\nAnswer: {right}1", True)
                 for text in (valid[0], faults[0], faults[2])]
    last = [last[i] for i in rng.permutation(len(last))]
    steps = [int(rng.integers(2, 10)), int(rng.integers(30, 100)), int(rng.integers(100, 300))]
    before = [row for row in last if row["source"] == names[3]]
    for step, rows in zip(steps, (before, before, last), strict=True):
        files.write_jsonl(tmp_path / f"held-out-{step}.jsonl", rows)
    listed = "; ".join(f"to {kind} {texts or 'none'}" for kind, texts in kinds.items())
    given = (f"right_for_wrong_reasons of a run evaluated at steps {steps}; the facts are {facts}, "
             f"and the right answers ({right}) of the last evaluation think, {listed}")
    got = answer(shares, tmp_path, given=given)
    told = f"{given}\n  expected {shown(expected)}\n  got      {shown(got)}"
    if not isinstance(got, dict) or got.keys() != kinds.keys() or got[names[1]] is not None:
        refuse(told)
    for kind, value in expected.items():
        if value is not None and [round(x, 3) for x in numbers_of(got[kind])] != [round(value, 3)]:
            refuse(told)


WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def count_cases(rng: Rng) -> list[tuple[int, str, bool]]:
    """Counts, answers to them, and whether these are right."""
    cases = [(10, "ten", True), (10, "1", False), (1, "ten", False), (1, "11", False),
             (11, "eleven", False), (12, "twelve", False)]
    for n in (int(x) for x in rng.permutation(10)[:4] + 1):
        word, other = WORDS[n - 1], WORDS[(n + int(rng.integers(1, 9))) % 10 - 1]
        how = [word, word.title(), word.upper(), f"{word.title()}.", f"{n}", f"{n}."]
        cases += [(n, said, True) for said in how]
        cases += [(n, said, False) for said in (
            other, f"1{n}", f"{n}0", f"thirty {word}", f"{word}score", f"{n + 1}", "", f"{n} cats",
            f"{n}.0", f"0{n}", f"+{n}", f"about {n}", f"${n}")]
    for n in (int(x) for x in rng.integers(20, 90, 2)):
        cases += [(n, f"{n}", True), (n, f"{n}.", True), (n, f"{n + 1}", False),
                  (n, str(n)[0], False)]
    return [cases[i] for i in rng.permutation(len(cases))]


def test_exercise_05_a_domain_of_your_own(rng: Rng, tmp_path: Path, monkeypatch: Patch) -> None:
    row_to_example, cases = attempt("counting_row"), count_cases(rng)
    rows = [{"picture": f"{1 + i % 2}.png", "ask": f"How many cats in {i}?", "count": count,
             "why": f"I see {count} cats."} for i, (count, _, _) in enumerate(cases)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.json").write_text(json.dumps(rows))
    (tmp_path / "pictures").mkdir()
    for width in (1, 2):
        Image.new("RGB", (width, 8), "white").save(tmp_path / "pictures" / f"{width}.png")
    domain = domains.Domain({"train": "train.json", "test": "test.json"}, row_to_example,
                            "https://example.org")
    monkeypatch.setitem(domains.DOMAINS, "counting", domain)
    given = f"counting_row, for rows such as {rows[0]},"
    examples = answer(data.load_data, f"counting:{tmp_path}", "test", given=given)
    if len(examples) != len(rows):
        refuse(f"{given} expected {len(rows)} examples, got {len(examples)}: the rest were skipped")
    for row, example, (count, said, right) in zip(rows, examples, cases, strict=True):
        check_counting_example(example, row)
        given = f"a row with the count {count}, answered {said!r}:"
        judged = answer(thinking.judge, example, f"I think.\nAnswer: {said}", True, given=given)
        if judged["accuracy"] != right:
            refuse(f"{given} expected {'right' if right else 'wrong'} as a reward (`accepts`), "
                   "got the opposite")
        if numbers_of(judged["official"]) != [float(right)]:
            refuse(f"{given} expected the official score {float(right)} (`scores`), "
                   f"got {shown(judged['official'])}")


def check_counting_example(example: Any, row: Row) -> None:
    """Refuse an example that does not hold what its row does."""
    given = f"counting_row of {row}:"
    if not isinstance(example, Example):
        refuse(f"{given} expected an Example, got {example!r:.200}")
    if not isinstance(example.answer, str):
        refuse(f"{given} expected a string as answer, got {example.answer!r}")
    if (example.question, example.trace) != (row["ask"], row["why"]):
        refuse(f"{given} expected its question and its trace, got {example.question!r} and "
               f"{example.trace!r}")
    picture = None
    if callable(example.image):
        picture = answer(example.image, given=f"{given} its image")
    if getattr(picture, "size", None) != (int(row["picture"][0]), 8):
        refuse(f"{given} expected a function that opens pictures/{row['picture']} as `image`, got "
               f"{example.image!r:.200}")
    reference = reward.reference_response(example)
    if not answer(reward.verify, reference, example, given=given).correct:
        refuse(f"{given} its reference is {reference!r}, which the example takes as wrong")


def loss_of(function: Callable[..., Any], logprobs: Tensor, *args: Any,
            given: str) -> tuple[float, list[list[float]]]:
    """A student's loss and its gradient to `logprobs: (N, T)`."""
    x = logprobs.clone().requires_grad_()

    def loss_and_gradient() -> tuple[Any, Any]:
        loss = function(x * 1, *args)  # no leaf: it may be written in place, as in training
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            return loss, None
        return loss.item(), torch.autograd.grad(loss.sum(), x, allow_unused=True)

    loss, found = answer(loss_and_gradient, given=given)
    if found is None:
        refuse(f"{given}\n  expected a tensor with one number that depends on the log-probs\n"
               f"  got      {loss!r:.200}")
    return loss, (torch.zeros_like(x) if found[0] is None else found[0]).tolist()


def test_exercise_06_token_mean_against_sum(rng: Rng) -> None:
    loss_function = attempt("sum_loss")
    lengths = [int(n) for n in rng.permutation([1, 2, 3, 4])] + [int(rng.integers(2, 4))]
    mask = torch.tensor([[1] * n + [0] * (4 - n) for n in lengths])
    logprobs = torch.from_numpy(rng.integers(-18, 0, (5, 4)) / 4).float()
    explore = torch.tensor([True, lengths[1] > 2, lengths[1] < 3, True, False])
    sizes = rng.permutation([1, 2, 3, 4, 5]) / 8
    weights = [float(-w if x and i % 3 == 0 else w) for i, (w, x) in
               enumerate(zip(sizes, explore, strict=True))]
    expected = [[-w] * n + [0.0] * (4 - n) for w, n in zip(weights, lengths, strict=True)]
    given = (f"the gradient of sum_loss to log-probs {shown(logprobs)}, with mask {shown(mask)}, "
             f"weights {shown(weights)}, explore {shown(explore)} and the factor 1.0")
    _, gradient = loss_of(loss_function, logprobs, mask, torch.tensor(weights), explore, 1.0,
                          given=given)
    expect_numbers(gradient, expected, 1e-4, given)


def blind_f1(trace: str, reference: str) -> float:
    """`reward.thinking_f1`, but operators are no tokens: for exercise 7, and to train with."""
    without = [re.sub(r"[-+*/=×÷−]", " ", text) for text in (trace, reference)]
    return reward.thinking_f1(*without)


Group = tuple[str | None, str, list[str]]  # facts, answer, thinking of the responses
BLIND, SEEING = {(0, 1), (0, 2), (3, 1), (3, 2)}, {(0, 2), (3, 2)}  # twins of the first group


def drawn_groups(rng: Rng) -> tuple[str, list[Group], list[list[int]]]:
    """The trace; groups of which only the first has twins; its responses' places, shuffled."""
    x, y = (str(bar) for bar in rng.permutation([*toy.COLORS])[:2])
    a, b, c, d = DIFFERENCES[rng.integers(len(DIFFERENCES))]
    see, right, total = f"{x} {a}, {y} {b}", f"{a - b}", f"{a + b}"
    # Nobody knows what the last equation is for: neither valid nor a fault.
    unsure = f"{see}. {a} - {b} = {right}. {a} + {b} = {total}. So it is {right}."
    trace = f"{see}. {a} - {b} = {right}."
    groups: list[Group] = [
        (see, right, [trace, f"{see}. {a} + {b} = {right}.", f"{see}. {b} - {a} = {right}.",
                      f"{y} {b}, {x} {a}. {a} - {b} = {right}.",
                      f"{x} {c}, {y} {d}. {c} - {d} = {right}.", ""]),
        # None is valid; both are; no facts, so nobody knows; a step of SFT.
        (see, right, [f"{see}. {b} + {a} = {right}.", f"{see}. {a} + {b} = {right}."]),
        (see, total, [f"{see}. {a} + {b} = {total}.", f"{see}. {b} + {a} = {total}."]),
        (see, right, [trace, unsure]), (see, right, [unsure, f"{see}. {a} + {b} = {right}."]),
        (None, right, [trace, f"{see}. {a} + {b} = {right}."]),
        (see, right, [])]
    orders = [rng.permutation(len(texts)).tolist() for _, _, texts in groups]
    while not min(map(orders[0].index, (0, 3))) < orders[0].index(2) < max(
            map(orders[0].index, (0, 3))):  # a twin may come before or after the valid one
        orders[0] = rng.permutation(6).tolist()
    return trace, groups, orders


# Heights a > b, and others with the same difference, all different, the difference too.
DIFFERENCES = [(a, b, c, c - a + b) for a, b, c in itertools.product(range(2, 10), repeat=3)
               if a > b and c - a + b > 0 and len({a, b, a - b, c, c - a + b}) == 5]


def test_exercise_07_what_a_thinking_reward_cannot_see(rng: Rng) -> None:
    twins = attempt("twins")
    for name, r_t, pairs in (("without operators", blind_f1, BLIND),
                             ("with operators", reward.thinking_f1, SEEING)):
        trace, groups, orders = drawn_groups(rng)
        x, y = (part.split()[0] for part in trace.split(","))
        first, rows, said, expected = int(rng.integers(2, 50)), [], "", []
        for place_in_run, g in enumerate(rng.permutation(len(groups)).tolist()):
            facts, right, texts = groups[g]
            step, texts = first + place_in_run // 2, [texts[i] for i in orders[g]]
            if g == 0:
                expected = sorted((step, orders[0].index(i), orders[0].index(j)) for i, j in pairs)
            fixed = {"finished": True, "r_f": 1.0, "r_a": 1.0, "advantage": 0.0, "reward": 2.0}
            responses = [{"text": f"{text}\nAnswer: {right}".strip()} | fixed
                         | {"r_t": 0.5 if "So it is" in "".join(texts)  # alike, but not judged
                            else round(r_t(text, trace), 4)} for text in texts]
            rows.append({"step": step, "name": f"row {g}", "answer": right, "facts": facts,
                         "question": f"How much taller is {x} than {y}?", "mode": "exploration",
                         "trace": trace, "target": None, "source": "difference",
                         "responses": responses})
            said += f"\n  step {step}, facts {facts}, answer {right}: {texts}"
        given = f"twins of these groups, with an r_t {name}:{said}"
        got = answer(twins, rows, given=given)
        triples = [[int(n) for n in numbers_of(t)] for t in got] if is_many(got) else []
        found = sorted(tuple(triple) for triple in triples)
        if not is_many(got) or any(len(triple) != 3 for triple in found):
            refuse(f"{given}\n  expected triples (step, i, j)\n  got      {shown(got)}")
        if found != expected:
            refuse(f"{given}\n  expected {expected}\n  got      {found}")


def is_many(value: Any) -> bool:
    """Is it one of the containers that are taken?"""
    return (isinstance(value, list | tuple | set | frozenset)
            or isinstance(value, Tensor | np.ndarray) and value.ndim > 0)


def test_exercise_08_two_updates_then_a_clip(rng: Rng) -> None:
    loss_function, clip = attempt("clipped_loss"), float(rng.choice([0.3, 0.35, 0.4]))
    # rho: what a token adds to the objective, and its gradient, for A = 1 and for A = -1
    by_hand = {0.5: (0.5, 0.5, clip - 1, 0.0), 0.9: (0.9, 0.9, -0.9, -0.9),
               1.0: (1.0, 1.0, -1.0, -1.0), 1.1: (1.1, 1.1, -1.1, -1.1),
               1.5: (1 + clip, 0.0, -1.5, -1.5)}
    lengths = [5, 5, int(rng.integers(1, 4)), int(rng.integers(2, 5))]
    ratios = np.stack([rng.permutation([*by_hand]) for _ in range(4)])
    old = torch.from_numpy(-rng.integers(4, 20, (4, 5)) / 4).float()
    logprobs, mask = old + torch.from_numpy(ratios).log().float(), torch.zeros(4, 5).long()
    sizes, loss = rng.permutation([1, 2, 3, 4]) / 10, 0.0
    weights, explore = sizes * [1, -1, 1, -1 if lengths[3] > 2 else 1], [True, True, False, True]
    expected = torch.zeros(4, 5)
    for n, (length, w) in enumerate(zip(lengths, weights, strict=True)):
        mask[n, :length] = 1
        for t in range(length):
            value, slope = by_hand[ratios[n, t]][:2] if w > 0 else by_hand[ratios[n, t]][2:]
            if not explore[n]:  # a target
                value, slope = logprobs[n, t].item(), 1.0
            expected[n, t] = -abs(w) / length * slope
            loss -= abs(w) / length * value
    given = (f"clipped_loss of log-probs {shown(logprobs)}, old {shown(old)} (so that rho is "
             f"{shown(ratios)}), mask {shown(mask)}, weights {shown(weights)}, explore "
             f"{explore} and clip {clip}")
    got, gradient = loss_of(loss_function, logprobs, old.clone(), mask.clone(),
                            torch.from_numpy(weights).float(), torch.tensor(explore), clip,
                            given=given)
    expect_numbers(gradient, expected, 1e-3, f"{given}\nits gradient to the log-probs")
    expect_numbers(got, loss, 1e-3, f"{given}\nits value")


@functools.cache
def training_rows() -> list[Example]:
    """The toy's rows to train on."""
    return toy.make_examples("train", "low")


def test_exercise_09_hack_the_thinking_reward(rng: Rng) -> None:
    hack, first = attempt("hack"), 5 * int(rng.integers(200))  # as many of each kind of question
    rewards = []
    for example in training_rows()[first:first + 1000]:
        text = answer(hack, example.question, given=f"hack({example.question!r})")
        if not isinstance(text, str):
            refuse(f"hack({example.question!r}): expected a text, got {text!r:.200}")
        rewards.append((reward.thinking_f1(text, example.trace or ""), example.question, text))
    mean = sum(r for r, _, _ in rewards) / len(rewards)
    if mean < 0.65:
        r, question, text = min(rewards)
        refuse("the mean r_t of hack(question) over 1,000 toy questions: expected at least 0.65, "
               f"got {mean:.3f}\n  the least, {r:.3f}, is that of {question!r}: {text!r}")


@functools.cache
def charts_of_the_splits() -> set[str]:
    """The facts of all charts that the toy's splits hold."""
    return {chart.facts() for chart in toy.random_charts(1, sum(toy.SPLITS["test"]))}


def fresh_rows(count: int, rng: Rng) -> tuple[list[Example], list[Example]]:
    """Charts that no split holds, each with a trace of other heights, and with the true trace."""
    low: list[Example] = []
    true: list[Example] = []
    charts = toy.random_charts([5, int(rng.integers(2**31))], count, charts_of_the_splits())
    for chart, kind in zip(charts, itertools.cycle(toy.QUESTIONS), strict=False):
        values = chart.values
        asked = toy.ask(kind, values, *toy.two_bars(kind, values, rng))
        question, goal, right, bars, working = asked
        others = [v for v in range(1, 10) if v not in values.values()]
        for rows, seen in ((low, dict(zip(values, others, strict=False))), (true, values)):
            written = toy.trace(goal, bars, seen, working, right)
            rows.append(Example(question, right, chart.draw, written, chart.facts(), kind, "a row"))
    return low, true


def cheats(i: int, low: list[str], true: list[str], rows: list[Example],
           hack: Callable[[str], str]) -> Iterable[tuple[str, str]]:
    """Traces for chart `i` that are no thinking: what is wrong with each, and the text."""
    trace, answer_line = true[i], true[i].splitlines()[-1]
    yield "nothing", ""
    yield "the answer alone", answer_line
    yield "the words backwards", " ".join(trace.split()[::-1])
    yield "the same three times over", "\n".join([trace] * 3)
    if low[i] != trace:
        yield "the reference, whose values are not in the image", low[i]
    swapped = re.sub(r"(\d) ([-+]) (\d)",
                     lambda m: f"{m[1]} {'-' if m[2] == '+' else '+'} {m[3]}", trace)
    if swapped != trace:
        yield "a false equation", swapped
    yield "another chart's thinking", next(
        true[j % len(true)] for j in range(i + 1, i + len(true))
        if rows[j % len(true)].source == rows[i].source
        and rows[j % len(true)].answer != rows[i].answer)
    read = dict(re.findall(r"(\w+) (\d)", trace.split("Reasoning")[0]))
    if len(read) > 1:
        turned = dict(zip(read, [*read.values()][1:] + [*read.values()][:1], strict=True))
        head, _, tail = trace.partition("Reasoning")
        yield "heights of other bars", "Reasoning".join([
            re.sub(r"(\w+) \d", lambda m: f"{m[1]} {turned.get(m[1], 0)}", head), tail])
    text = answer(hack, rows[i].question, given=f"hack({rows[i].question!r})")
    if not isinstance(text, str):
        refuse(f"hack({rows[i].question!r}): expected a text, got {text!r:.200}")
    yield "your own hack", text


def test_exercise_09_mend_the_thinking_reward(rng: Rng) -> None:
    mended, hack = attempt("mended"), attempt("hack")
    rows, fresh = fresh_rows(60, rng)  # looked up nowhere
    low, true = ([e.trace or "" for e in examples] for examples in (rows, fresh))
    for i, example in enumerate(rows):
        chart = f"the chart {example.facts} and {example.question!r}"
        best = answer(mended, true[i], example, given=f"mended, for {chart},")
        for fault, trace in cheats(i, low, true, rows, hack):
            found = thinking.thinking_fault(f"{trace}\nAnswer: {example.answer}", example)
            if fault == "your own hack" and (not found or "not judged" in found):
                continue  # it happens to be true of this chart, as far as rules can tell
            got = answer(mended, trace, example,
                         given=f"mended, for {chart} and the trace {trace!r},")
            pair = numbers_of([best, got])
            if len(pair) != 2 or not all(0 <= x <= 1 for x in pair):
                refuse(f"mended, for {chart}: expected numbers from 0 to 1, got {best!r:.200} and "
                       f"{got!r:.200}")
            if pair[1] > pair[0] - 0.2:
                refuse(f"mended, for {chart}: the true trace gets {pair[0]:.3f}, and the following "
                       f"({fault}) {pair[1]:.3f}; expected a gap of at least 0.2:\n{trace!r}")
        other = in_other_words(example)
        pair = numbers_of([answer(mended, text, example, given=f"mended, for {chart},")
                           for text in (other, "")])
        if len(pair) != 2 or pair[0] < pair[1] + 0.1:
            refuse(f"mended, for {chart}: a true trace in other words gets {shown(pair[0])}, and "
                   f"the empty text {shown(pair[1])}; expected a gap of at least 0.1:\n{other!r}")


def in_other_words(example: Example) -> str:
    """Valid thinking about a row of the toy that is not worded as its traces."""
    read = dict(re.findall(r"(\w+) (\d)", example.facts or ""))
    bars = [bar for bar in re.findall(r"\w+", example.question) if bar in read] or [*read]
    seen, (a, b) = ", ".join(f"{bar} {read[bar]}" for bar in bars), [*map(read.get, bars), ""][:2]
    right, most = example.answer, "largest" if example.source == "tallest" else "smallest"
    working = {"sum": f"{a} + {b} = {right}", "difference": f"{a} - {b} = {right}",
               "value": f"{bars[0]} reads {a}"}.get(
                   example.source, f"{right} {read.get(right)} is the {most}")
    return f"I see {seen}. Then {working}. Conclusion: {right}."


KINDS = ("value", "sum", "difference", "tallest", "shortest")
BASES: dict[str, tuple[dict[str, tuple[float, float, float]], str]] = {
    # any_format, in_format and right of each kind; then what GRPO brought to 0.9, as `sealed` says
    "without flags": (
        {"value": (1.0, 0.0003, 0.0), "sum": (0.52, 0.0013, 0.0), "difference": (1.0, 0.0006, 0.0),
         "tallest": (1.0, 0.0, 0.0), "shortest": (1.0, 0.0009, 0.0003)}, "c3011b0d34961316"),
    "with sums": (
        {"value": (1.0, 0.0453, 0.0409), "sum": (0.22, 0.0322, 0.0019),
         "difference": (0.039, 0.129, 0.0012), "tallest": (1.0, 0.0265, 0.0185),
         "shortest": (1.0, 0.0247, 0.0206)}, "7e26c5e63d1dd983"),
    "with more flags": (
        {"value": (1.0, 0.2653, 0.2625), "sum": (0.0, 0.2447, 0.0),
         "difference": (0.039, 0.2653, 0.0006), "tallest": (0.98, 0.2302, 0.2216),
         "shortest": (1.0, 0.2272, 0.2178)}, "ace918c740015cd0"),
}


def sealed(name: str, kinds: Iterable[str]) -> str:
    """A list of kinds, so that one can compare it and a glance does not tell it."""
    told = f"what GRPO learned from the base {name}: {sorted(kinds)}"
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def test_exercise_10_which_skills_grpo_will_learn(rng: Rng) -> None:
    will_learn, right = attempt("will_learn"), 0
    for name in rng.permutation([*BASES]).tolist():
        names, (measured, learned) = ("any_format", "in_format", "right"), BASES[name]
        base = {kind: dict(zip(names, measured[kind], strict=True))
                for kind in rng.permutation(KINDS).tolist()}
        got = answer(will_learn, base, given="will_learn of a base")
        kinds = [str(kind) for kind in got] if is_many(got) else [""]
        if set(kinds) - set(KINDS):
            refuse(f"will_learn: expected a list of some of {[*KINDS]}, got {shown(got)}")
        # Where four and six samples of 3,200 were right nobody could have told.
        open_ = {kind for kind in KINDS if 0.001 < base[kind]["right"] < 0.003}
        right += sealed(name, set(kinds) - open_) == learned
    if right < len(BASES):
        refuse(f"will_learn: of {right} of {len(BASES)} bases it says which kinds of question GRPO "
               "learned, neither more nor fewer")


def right_so_often(rng: Rng, K: int, counts: list[int]) -> Tensor:
    """r_a of groups, (P, K), of which so many responses are right."""
    rows = [rng.permutation([1.0] * count + [0.0] * (K - count)) for count in counts]
    return torch.from_numpy(np.stack(rows)).float()


def test_exercise_11_explore_where_more_are_right(rng: Rng) -> None:
    switch_above, K = attempt("switch_above"), int(rng.integers(4, 9))
    least = [0, *rng.permutation(np.arange(1, K))[:2].tolist()]
    switches = [answer(switch_above, G, given=f"switch_above({G})") for G in least]
    for G, switch in zip(least, switches, strict=True):
        counts = rng.permutation([0, K, G, G + 1, int(rng.integers(K + 1))]).tolist()
        r_a = right_so_often(rng, K, counts)
        r_t = torch.from_numpy(rng.permutation(np.linspace(0, 1, 5 * K)).round(1)).view(5, K)
        r_t[counts.index(0)] = 1.0
        r_a[r_a == 0] = 0.5 if G else 0.0  # only 1 is right
        given = f"switch_above({G}) of r_a {shown(r_a)}, which has {counts} right of {K},"
        if not callable(switch):
            refuse(f"switch_above({G}): expected a switch (r_a, r_t) -> (P,), got {switch!r:.200}")
        got = answer(switch, r_a.clone(), r_t.float(), given=given)
        flat = is_many(got) and len(got) == 5 and all(len(numbers_of(x)) == 1 for x in got)
        if not flat or getattr(got, "shape", (5,)) != (5,):
            refuse(f"{given} expected 5 truth values, one for a prompt, got {shown(got)}")
        if numbers_of(got) != [float(count > G) for count in counts]:
            refuse(f"{given}\n  expected {[count > G for count in counts]}\n"
                   f"  got      {shown(got)}")


# Of n rewards so many are the higher of two: the advantages of the higher and of the lower.
TWO_VALUES = {4: [(1.7321, -0.5774), (1.0, -1.0), (0.5774, -1.7321), (0.0, 0.0)],
              5: [(2.0, -0.5), (1.2247, -0.8165), (0.8165, -1.2247), (0.5, -2.0), (0.0, 0.0)]}


def drawn_step(rng: Rng, K: int, counts: list[int], w_t: float) -> Step:
    """A step of groups of which so many responses are right, thinking as the trace; others not."""
    P, low = len(counts), (1 + rng.permutation(6)[:len(counts)]) / 10
    r_a = right_so_often(rng, K, counts)
    r_t = torch.where(r_a == 1, 1.0, torch.from_numpy(low).float()[:, None])
    ids = (7 + rng.permutation(2 * P * K)).tolist()
    responses = [[Response([ids.pop() for _ in range(1 + k % 2)] + [3], f"{p}, {k}", True, 0.0)
                  for k in range(K)] for p in range(P)]
    rewards = r_a + w_t * r_t
    advantages = group_advantages(rewards)
    sequences = [Sequence(p, y.ids, advantages[p, k].item() / (K * P), True)
                 for p, group in enumerate(responses) for k, y in enumerate(group)]
    examples = [Example(f"q {p}", "7", trace="red 7.", name=f"row {p}") for p in range(P)]
    return Step(int(rng.integers(100)), examples, (), torch.ones(P, dtype=torch.bool), sequences,
                responses, r_a, r_t, rewards, advantages)


def test_exercise_12_the_reference_joins_the_group(rng: Rng) -> None:
    join_reference = attempt("join_reference")
    for w_t in (0.0, 1.0, float(rng.choice([0.5, 2.0]))):
        K = int(rng.integers(3, 5))
        counts = rng.permutation([0, K, int(rng.integers(1, K))]).tolist()
        record, P = drawn_step(rng, K, counts, w_t), len(counts)
        targets = [[90 + p, 91 + p, int(rng.integers(50, 90)), 3] for p in range(P)]
        expected: dict[tuple[int, tuple[int, ...]], float] = {}
        for p, c in enumerate(counts):
            high, low = (a / ((K + 1) * P) for a in TWO_VALUES[K + 1][c])
            for k, y in enumerate(record.responses[p]):
                expected[p, tuple(y.ids)] = high if record.r_a[p, k] == 1 else low
            expected[p, tuple(targets[p])] = high
        given = (f"join_reference of a step with rewards {shown(record.rewards)}, and "
                 f"{1 + w_t} as the reward of a reference,")
        copy = dataclasses.replace(record, sequences=[*record.sequences])
        got = answer(join_reference, copy, [[*t] for t in targets], 1 + w_t, given=given)
        expect_sequences(got, expected, given)


def expect_sequences(got: Any, expected: dict[tuple[int, tuple[int, ...]], float],
                     given: str) -> None:
    """Refuse unless the sequences, in any order, add up to these weights; zeros may be left out."""
    if not is_many(got) or not all(isinstance(s, Sequence) for s in got):
        refuse(f"{given} expected a list of Sequence, got {got!r:.200}")
    found = dict.fromkeys(expected, 0.0)
    for s in got:
        key = int(s.prompt), tuple(int(token) for token in numbers_of(s.ids))
        if key not in found:
            refuse(f"{given} expected each response and each reference once, with its prompt's "
                   f"index; got prompt {s.prompt!r} with the ids {shown(s.ids)}")
        weight = numbers_of(s.weight)
        found[key] += weight[0] if len(weight) == 1 else float("nan")
    for p in sorted({p for p, _ in expected}):
        keys = [key for key in expected if key[0] == p]
        expect_numbers([found[key] for key in keys], [expected[key] for key in keys], 2e-3,
                       f"{given} the weights of prompt {p}'s sequences:")


# p of a token, and p (1 - p)
DOUBT = {0.01: 0.0099, 0.1: 0.09, 0.2: 0.16, 0.5: 0.25, 0.7: 0.21, 0.9: 0.09, 0.99: 0.0099}


def test_exercise_13_targets_weighted_by_doubt(rng: Rng) -> None:
    weigh_by_doubt, K = attempt("weigh_by_doubt"), 3
    record = drawn_step(rng, K, [1, 2], 1.0)
    targets = [Sequence(p, [40 + p, int(rng.integers(50, 90)), 3], 1 / 4, False) for p in (2, 3)]
    mixed = record.sequences + targets
    mixed = [mixed[i] for i in rng.permutation(len(mixed))]
    record.examples += [Example("q", "7", name=f"row {p}") for p in (2, 3)]
    record.explore = torch.tensor([True, True, False, False])
    record.sequences = [dataclasses.replace(s) for s in mixed]
    given = "weigh_by_doubt of a step with six sampled responses and two targets:"
    got = answer(weigh_by_doubt, record, given=given)
    expected = {(s.prompt, tuple(s.ids)): s.weight for s in mixed}
    expect_sequences(got, expected, given)
    p = rng.choice([*DOUBT], (len(got), 3))
    logprobs = torch.from_numpy(p).log().float()
    factors = answer(dyme.token_factors, [*got], logprobs, given=f"{given} per_token")
    for s, row, factor in zip(got, p.tolist(), factors, strict=True):
        kind = "sampled response" if s.prompt < 2 else "target"
        if s.explore != (s.prompt < 2):
            refuse(f"{given} expected explore to stay {s.prompt < 2} in a {kind}, got {s.explore}")
        wanted = [1.0] * 3 if s.prompt < 2 else [DOUBT[x] for x in row]
        expect_numbers(factor, wanted, 1e-4, f"{given} the factors of a {kind}'s tokens whose p "
                       f"are {row}")


# ---- The checks themselves, and the text ---------------------------------------------------------


def wrong_row(row: Row, _: Path, name: str) -> Example:
    return Example(row["ask"], row["count"], name=name)


def broken(*_: Any) -> None:
    raise KeyError("r_t")


WRONG = {  # what is at hand and does not solve the exercise, and a word of the message
    "explore_curve": (lambda correct, sizes: [(0.25, 0.25)] * len(sizes), "expected"),
    "group_gradient": (broken, r"group_gradient of rewards \[.* raised KeyError: 'r_t'$"),
    "right_for_wrong_reasons": (
        lambda run: dict.fromkeys(toy.QUESTIONS, 0.5), "None"),
    "counting_row": (wrong_row, r"expected a string as answer, got \d+"),
    "sum_loss": (policy_loss, "expected .*\n  got"),
    "twins": (lambda rows: [], r"expected \[\(\d+, \d, \d\), "),
    "clipped_loss": (lambda x, old, mask, weights, explore, clip: policy_loss(
        x, mask, weights, explore), "gradient"),
    "hack": (lambda question: question, "at least 0.65, got"),
    "mended": (
        lambda trace, example: reward.thinking_f1(trace, example.trace), "a gap of at least 0.2"),
    "will_learn": (
        lambda base: [k for k in base if base[k]["any_format"] > 0.9], r"of \d of 3 bases"),
    "switch_above": (
        lambda G: lambda r_a, r_t: (r_a == 1).sum(1) >= G, r"expected \[.*\n  got"),
    "join_reference": (lambda record, targets, reward: record.sequences, r"weights of prompt \d"),
    "weigh_by_doubt": (lambda record: record.sequences, "factors of a target's tokens"),
}


def check_of(name: str) -> Callable[..., None]:
    """The check of what an exercise asks to write."""
    return next(test for title, test in globals().items()
                if title.startswith("test_exercise")
                and re.search(rf'= attempt\("{name}"\)', inspect.getsource(test)))


def run_check(name: str, seed: int, folder: Path, monkeypatch: Patch) -> None:
    """Run it with the cases that a seed draws."""
    folder.mkdir(parents=True)
    given = {"tmp_path": folder, "monkeypatch": monkeypatch, "rng": np.random.default_rng(seed)}
    check = check_of(name)
    check(**{key: given[key] for key in inspect.signature(check).parameters})


@pytest.mark.parametrize("name", EXERCISES)
def test_a_check_refuses_and_shows_only_its_message(
        name: str, tmp_path: Path, monkeypatch: Patch) -> None:
    wrong, said = WRONG[name]
    tries = {"hack": lambda question: question} | {name: wrong}
    monkeypatch.setitem(globals(), "attempt", tries.__getitem__)
    for seed in range(3):
        with pytest.raises(pytest.fail.Exception, match=said) as failure:
            run_check(name, seed, tmp_path / str(seed), monkeypatch)
        assert failure.value.pytrace is False


NONSENSE: tuple[Any, ...] = (
    None, 1, -1.5, "text", [], {}, [None], [[1, [2, "3"]]], {"sum": "x"}, (1, 2), torch.zeros(()),
    torch.ones(2, 3), np.array(["a"]), float("nan"), len, object(), [{"a": 1}], 10**400)


@pytest.mark.parametrize("name", EXERCISES)
def test_a_check_refuses_nonsense_in_its_own_words(
        name: str, tmp_path: Path, monkeypatch: Patch) -> None:
    nonsense: Any = None
    tries = {"hack": lambda question: "red 1."} | {name: lambda *args: nonsense}
    monkeypatch.setitem(globals(), "attempt", tries.__getitem__)
    for i, nonsense in enumerate(NONSENSE):  # noqa: B007 - the function returns it
        with pytest.raises(pytest.fail.Exception) as failure:
            run_check(name, 0, tmp_path / str(i), monkeypatch)
        assert failure.value.pytrace is False


@pytest.mark.parametrize("name", [n for n in EXERCISES if n != "will_learn"])
def test_another_seed_draws_other_cases(name: str, tmp_path: Path, monkeypatch: Patch) -> None:
    runs: list[list[str]] = []

    def spy(*args: Any) -> NoReturn:
        told = [*args[:1]] if name == "counting_row" else [*args]  # the others name the folder
        if isinstance(args[0], Path):
            told = [file.read_text() for file in sorted(args[0].iterdir())]
        if isinstance(args[0], Step):
            told = [args[0].rewards, args[0].sequences]
        runs[-1].append(f"{told}")
        raise KeyError

    tries = {name: (lambda G: spy) if name == "switch_above" else spy}
    tries |= {"hack": lambda question: question} if name == "mended" else {}
    monkeypatch.setitem(globals(), "attempt", tries.__getitem__)
    for i, seed in enumerate((1, 1, 3)):
        runs.append([])
        with pytest.raises(pytest.fail.Exception):
            run_check(name, seed, tmp_path / str(i), monkeypatch)
    assert runs[0] == runs[1] != runs[2]


def test_a_stub_is_skipped_and_an_error_is_told(tmp_path: Path, monkeypatch: Patch) -> None:
    for name in ("MODES", *EXERCISES):
        monkeypatch.setitem(globals(), "FILE", Path(starter.__file__))
        (tmp_path / name).mkdir()
        with pytest.raises(pytest.skip.Exception):
            run_check(name, 0, tmp_path / name / "1", monkeypatch)
    for text, said in (("def sum_loss(*args):\n    return int('x')", "ValueError: .*line 2"),
                       ("import nowhere", "cannot be imported: ModuleNotFoundError.*line 1"),
                       ("x = (", "cannot be imported: SyntaxError.*line 1"),
                       ("exit()", "cannot be imported: SystemExit")):
        monkeypatch.setitem(globals(), "FILE", tmp_path / f"{len(said)}.txt")
        FILE.write_text(text)
        with pytest.raises(pytest.fail.Exception, match=said):
            run_check("sum_loss", 0, tmp_path / said[:5] / text[:3], monkeypatch)


@pytest.mark.slow
def test_grade_scores_a_file_whatever_it_does(tmp_path: Path) -> None:
    """One that is wrong, one that hangs and catches everything, one that ends the process."""

    def graded(text: str, *flags: str) -> tuple[int, list[str]]:
        (tmp_path / "mine.py").write_text(text)
        done = subprocess.run(
            [sys.executable, "-m", "support.grade", *(flags or [str(tmp_path / "mine.py")]),
             "--seed", "3", "--limit", "4"], cwd=COURSE.parents[1], capture_output=True, text=True)
        return done.returncode, (done.stdout + done.stderr).splitlines()

    code, lines = graded("import os\n"
                         "from dyme import policy_loss as sum_loss\n"
                         "def switch_above(G):\n"
                         "    return lambda r_a, r_t: (r_a == 1).sum(1) > G\n"
                         "def hack(question):\n"
                         "    while True:\n"
                         "        try:\n"
                         "            hack(question)\n"
                         "        except BaseException:\n"
                         "            pass\n"
                         "def will_learn(base):\n"
                         "    os._exit(0)\n")
    assert code == 0
    verdicts = {line[:2] + line[44:51].strip(): line for line in lines if line[:2].strip()}
    assert {" 6wrong", " 9wrong", "10wrong", "11right", "12missing"} <= set(verdicts)
    assert "more than 4 s" in verdicts[" 9wrong"]
    assert "ends the process" in verdicts["10wrong"]
    assert lines[-1] == "14 checks, seed 3: 1 right, 3 wrong, 10 missing"
    code, lines = graded("x = 1", str(tmp_path / "mine.py"), "--only", "12", "6")
    assert [line[:2] for line in lines[:-1]] == [" 6", "12"]
    assert lines[-1] == "2 checks, seed 3: 0 right, 0 wrong, 2 missing"
    for text, flags, said in (("x = (", [], "mine.py cannot be imported: SyntaxError"),
                              ("", ["nowhere.py"], "error: nowhere.py: no such file"),
                              ("", [__file__, "--only", "99"], "--only 99: no such")):
        code, lines = graded(text, *flags)
        assert (code, len(lines)) == (2, 1)
        assert said in lines[0]


def test_numbers_are_taken_from_any_container() -> None:
    value: Any
    for value in ([(1, 2.5)], (torch.tensor(1), np.float64(2.5)), torch.tensor([[1], [2.5]]),
                  np.array([1, 2.5])):
        expect_numbers(value, [1, 2.5], 1e-6, "f")
    for value in ([1], [1, 2.6], None, "1, 2.5", [1, None], [1, float("nan")], {"a": 1}):
        with pytest.raises(pytest.fail.Exception, match="expected"):
            expect_numbers(value, [1, 2.5], 1e-6, "f")


COURSE = Path(dyme.__file__).parent / "support" / "COURSE.md"


def test_the_course_names_what_exists() -> None:
    course = COURSE.read_text()
    written = {*re.findall(r"`([a-z]+_[a-z_0-9]+)`", course), *re.findall(r"`([a-z_]+)\(", course)}
    pages = [COURSE.with_name(name).read_text() for name in ("README.md", "DETAILS.md")]
    readme = set(re.findall(r"`(\w+)`", "".join(pages)))
    judged = thinking.judge(Example("q", "7", facts="red 7"), "Answer: 7", True)
    known = {*judged, *EXERCISES, *readme, "blind_f1", "r_t"}
    places = (dyme, reward, domains, thinking, toy)
    assert set(EXERCISES) <= written
    assert [n for n in written - known if not any(hasattr(p, n) for p in places)] == []


def test_the_course_has_its_exercises_and_no_flag_that_is_not_there() -> None:
    course, code = COURSE.read_text(), (COURSE.parents[1] / "eval.py").read_text()
    flags = {settings.flag(field.name) for field in dataclasses.fields(dyme.Config)}
    named = {*re.findall(r"--[a-z][a-z-]+", course)}
    assert [f for f in named - flags if f'"{f}"' not in code and f'"{f[2:]}"' not in code] == []
    assert len(re.findall(r"^\*\*\d+\. ", course, re.MULTILINE)) == 13
    assert "TODO" not in course


def test_the_courses_recipe_trains_with_a_function_of_ones_own(
        tmp_path: Path, monkeypatch: Patch) -> None:
    trained: list[dyme.Config] = []
    recipe, *_ = re.findall(r"```python\n(.*?)```", COURSE.read_text(), re.DOTALL)
    command, = re.findall(r"`python (exercises.py --steps .*?)`", COURSE.read_text())
    monkeypatch.setattr(sys, "argv", command.split())
    monkeypatch.setattr(dyme, "policy_loss", dyme.policy_loss)
    monkeypatch.setattr(dyme, "train", trained.append)
    (tmp_path / "exercises.py").write_text(f"import dyme\nsum_loss = 'mine'\n{recipe}")
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(tmp_path / "exercises.py"), run_name="__main__")
    assert dyme.policy_loss == "mine"
    assert trained[0].steps == 200
