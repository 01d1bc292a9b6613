"""The course (COURSE.md): these check what you write into exercises.py beside the code.

A check says what was expected of which input, never how it is found. So no assert and no traceback
is shown here, and what is expected stands here as numbers.
"""

import dataclasses
import importlib.util
import inspect
import itertools
import json
import re
import runpy
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
from reward import Example
from support import data, domains, files, settings, thinking, toy
from test_dyme import Patch, Row

EXERCISES = ("explore_curve", "group_gradient", "right_for_wrong_reasons", "counting_row",
             "sum_loss", "twins", "clipped_loss", "hack", "mended", "will_learn")


# ---- How a check speaks --------------------------------------------------------------------------


def refuse(message: str) -> NoReturn:
    """Fail an exercise with this message alone."""
    pytest.fail(message, pytrace=False)


def place(error: BaseException) -> str:
    """What was raised, and at which line of exercises.py."""
    said = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    if isinstance(error, SyntaxError):
        return f"{said} (exercises.py line {error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if Path(f.filename).name == "exercises.py"]
    return f"{said} (exercises.py line {lines[-1]})" if lines else said


def attempt(name: str) -> Any:
    """What exercises.py calls `name`; without it the exercise is skipped."""
    file = Path(dyme.__file__).with_name("exercises.py")
    if not file.exists():
        pytest.skip("there is no exercises.py yet")
    spec = importlib.util.spec_from_file_location("exercises", file)
    module = importlib.util.module_from_spec(spec)
    failed = ""
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # noqa: BLE001 - a student's file may raise anything
        failed = place(error)
    if failed:
        refuse(f"exercises.py cannot be imported: {failed}")
    if not hasattr(module, name):
        pytest.skip(f"exercises.py has no {name} yet")
    return getattr(module, name)


def answer(function: Callable[..., Any], *args: Any, given: str) -> Any:
    """What a student's function returns; what it raises is told without the check around it."""
    failed = ""
    try:
        return function(*args)
    except Exception as error:  # noqa: BLE001 - a student's function may raise anything
        failed = place(error)
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


def expect_numbers(got: Any, expected: Any, tolerance: float, given: str) -> None:
    """Refuse unless `got`, in any container, holds the expected numbers, up to a share and 1e-6."""
    wanted = floats(expected)
    try:
        numbers = floats(got)
    except (TypeError, ValueError):
        numbers = []
    near = [abs(a - b) <= tolerance * abs(b) + 1e-6
            for a, b in zip(numbers, wanted, strict=False)]
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
        if pair[0] not in ("explore", "memorize"):
            refuse(form + repr(pair)[:200])
        if isinstance(pair[1], str) or pair[1] not in (True, False):
            refuse(form + repr(pair)[:200])
        mode = "explore" if explores else "memorize"
        right += pair[0] == mode and bool(pair[1]) == bool(gradient)
    if right < 5:
        refuse(f"MODES: {right} of 5 pairs are right. The first half of a pair is the mode of "
               "Eq. 6; the second says whether what the group adds to the loss of Eq. 8 in that "
               "mode has a gradient.")


def test_exercise_02_explore_with_more_samples() -> None:
    curve = attempt("explore_curve")
    cases = (([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]], [1, 2, 4],
              [(0.25, 0.25), (0.4375, 4 / 9), (175 / 256, 2 / 3)]),
             ([[0, 0, 1], [0, 0, 0]], [3, 2], [(91 / 216, 0.5), (11 / 36, 1 / 3)]),
             ([[1, 1], [1, 1]], [1, 2], [(1, 1), (1, 1)]))
    for correct, sizes, expected in cases:
        given = (f"explore_curve of r_a = {correct} with sizes {sizes}, as pairs (predicted, "
                 "measured)")
        got = answer(curve, torch.tensor(correct, dtype=torch.float), sizes, given=given)
        expect_numbers(got, expected, 2e-4, given)


def test_exercise_03_the_gradient_of_a_group() -> None:
    gradient = attempt("group_gradient")
    scores = torch.tensor([[1, 0, 2], [0, 1, -1], [3, -2, 0], [-1, 0.5, 1]]).double()
    cases = (([1.0, 0.0, 0.5, 1.7], [0.6363, -0.0994, -0.8352]),
             ([0.7, 0.701, 0.7, 0.702], [1.1435, -0.6390, 0.1345]),  # hardly any variance
             ([0.7, 0.7, 0.7, 0.7], [0.0, 0.0, 0.0]))
    for rewards, expected in cases:
        given = f"group_gradient of rewards {rewards} and scores {scores.tolist()}"
        group = torch.tensor(rewards, dtype=torch.float64)
        got = answer(gradient, group, scores.clone(), given=given)
        expect_numbers(got, expected, 2e-3, given)


RIGHT, FALSE = "red 3, blue 4. 3 + 4 = 7.", "red 3, blue 4. 3 - 4 = 7."
UNSURE = "red 3, blue 4. 3 + 4 = 7. 4 - 3 = 1. So it is 7."


def test_exercise_04_right_for_the_wrong_reasons(tmp_path: Path) -> None:
    shares = attempt("right_for_wrong_reasons")
    kinds = {"sum": [RIGHT, FALSE, "red 1, blue 6. 1 + 6 = 7.", "So be it.", UNSURE],
             "difference": [], "value": [RIGHT, RIGHT]}
    last = []
    for kind, right in kinds.items():
        example = Example("q", "7", facts="red 3, blue 4", source=kind)
        last += [thinking.judge(example, f"{thought}\nAnswer: 7", True) for thought in right]
        last += [thinking.judge(example, f"{thought}\nAnswer: 8", True)
                 for thought in (RIGHT, FALSE)]
    files.write_jsonl(tmp_path / "held-out-20.jsonl", last)
    files.write_jsonl(tmp_path / "held-out-3.jsonl", last[:1])
    given = ("right_for_wrong_reasons of a run whose last evaluation (step 20) has five right "
             "answers to sums, three of them with a fault (a false equation, numbers not in the "
             "image, nothing quoted) and one that the rules cannot judge, no right answer to "
             "differences, and two right answers to values, without fault")
    got = answer(shares, tmp_path, given=given)
    if not isinstance(got, dict) or got.keys() != kinds.keys() or got["difference"] is not None:
        refuse(f"{given}\n  expected {{'sum': 0.6, 'difference': None, 'value': 0.0}}\n"
               f"  got      {got!r}")
    expect_numbers([got["sum"], got["value"]], [0.6, 0.0], 1e-4, f"{given}\nsum and value")


COUNTS = (  # the count, an answer, and whether it is right
    (3, "3", True), (3, "three", True), (3, "Three.", True), (3, "THREE", True), (3, "3.", True),
    (3, "four", False), (3, "13", False), (3, "30", False), (3, "thirty three", False),
    (3, "threescore", False), (1, "one", True), (1, "ten", False), (1, "11", False),
    (10, "ten", True), (10, "10", True), (10, "1", False), (11, "11", True), (11, "1", False),
    (25, "25.", True), (40, "41", False), (4, "", False))


def test_exercise_05_a_domain_of_your_own(tmp_path: Path, monkeypatch: Patch) -> None:
    row_to_example = attempt("counting_row")
    counts = [count for count, _, _ in COUNTS]
    rows = [{"picture": "1.png", "ask": f"How many cats in {i}?", "count": count,
             "why": f"I see {count} cats."} for i, count in enumerate(counts)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.json").write_text(json.dumps(rows))
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8), "white").save(tmp_path / "pictures" / "1.png")
    domain = domains.Domain({"train": "train.json", "test": "test.json"}, row_to_example,
                            "https://example.org")
    monkeypatch.setitem(domains.DOMAINS, "counting", domain)
    given = f"counting_row, for rows such as {rows[0]},"
    examples = answer(data.load_data, f"counting:{tmp_path}", "test", given=given)
    if len(examples) != len(rows):
        refuse(f"{given} expected {len(rows)} examples, got {len(examples)}: the rest were skipped")
    for row, example, (count, said, right) in zip(rows, examples, COUNTS, strict=True):
        check_counting_example(example, row)
        given = f"a row with the count {count}, answered {said!r}:"
        judged = answer(thinking.judge, example, f"I think.\nAnswer: {said}", True, given=given)
        if judged["accuracy"] != right:
            refuse(f"{given} expected {'right' if right else 'wrong'} as a reward (`accepts`), "
                   "got the opposite")
        if judged["official"] != right:
            refuse(f"{given} expected the official score {float(right)} (`scores`), "
                   f"got {float(judged['official'])}")


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
    opens = callable(example.image)
    if not opens or answer(example.image, given=f"{given} its image").size != (8, 8):
        refuse(f"{given} expected a function that opens pictures/1.png as `image`, got "
               f"{example.image!r:.200}")
    reference = reward.reference_response(example)
    if not reward.verify(reference, example).correct:
        refuse(f"{given} its reference is {reference!r}, which the example takes as wrong")


def loss_of(function: Callable[..., Any], logprobs: Tensor, *args: Any,
            given: str) -> tuple[float, list[list[float]]]:
    """A student's loss and its gradient to `logprobs: (N, T)`."""
    x = logprobs.clone().requires_grad_()
    loss = answer(function, x, *args, given=given)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        refuse(f"{given}\n  expected a tensor with one number that depends on the log-probs\n"
               f"  got      {loss!r:.200}")
    gradient = torch.autograd.grad(loss.sum(), x, allow_unused=True)[0]
    return loss.item(), (torch.zeros_like(x) if gradient is None else gradient).tolist()


def test_exercise_06_token_mean_against_sum() -> None:
    loss_function = attempt("sum_loss")
    logprobs = torch.tensor([[-1.0, -2.0, -9.0], [-1.0, -3.0, -5.0], [-2.0, -0.5, -1.0],
                             [-1.5, -0.5, -3.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]])
    weights = torch.tensor([0.5, -0.25, -0.25, 0.25])
    explore = torch.tensor([True, True, True, False])
    expected = [[-0.5, -0.5, 0.0], [0.25, 0.25, 0.25], [0.25, 0.0, 0.0], [-0.25, -0.25, 0.0]]
    given = (f"the gradient of sum_loss to log-probs {shown(logprobs)}, with mask {shown(mask)}, "
             f"weights {shown(weights)}, explore {shown(explore)} and the factor 1.0")
    _, gradient = loss_of(loss_function, logprobs, mask, weights, explore, 1.0, given=given)
    expect_numbers(gradient, expected, 1e-4, given)


def blind_f1(trace: str, reference: str) -> float:
    """`reward.thinking_f1`, but operators are no tokens: for exercise 7, and to train with."""
    without = [re.sub(r"[-+*/=×÷−]", " ", text) for text in (trace, reference)]
    return reward.thinking_f1(*without)


GROUPS = (  # facts, answer, thinking of the responses
    ("red 8, blue 3", "5", ["red 8, blue 3. 8 - 3 = 5.", "red 8, blue 3. 8 + 3 = 5.",
                            "red 8, blue 3. 3 - 8 = 5.", "blue 3, red 8. 8 - 3 = 5.",
                            "red 9, blue 4. 9 - 4 = 5.", ""]),
    # None is valid; both are; no facts, so nobody knows; a step of SFT.
    ("red 8, blue 4", "4", ["red 8, blue 4. 4 + 8 = 4.", "red 8, blue 4. 8 + 4 = 4."]),
    ("red 9, blue 2", "11", ["red 9, blue 2. 9 + 2 = 11.", "red 9, blue 2. 2 + 9 = 11."]),
    (None, "5", ["red 8, blue 3. 8 - 3 = 5.", "red 8, blue 3. 8 + 3 = 5."]),
    ("red 8, blue 3", "5", []))
ASKED = "How much taller is red than blue?"
BLIND, SEEING = [(0, 0, 1), (0, 0, 2), (0, 3, 1), (0, 3, 2)], [(0, 0, 2), (0, 3, 2)]


def test_exercise_07_what_a_thinking_reward_cannot_see() -> None:
    twins = attempt("twins")
    for name, r_t, expected in (("without operators", blind_f1, BLIND),
                                ("with operators", reward.thinking_f1, SEEING)):
        rows = []
        trace = "red 8, blue 3. 8 - 3 = 5."
        for step, (facts, right, texts) in enumerate(GROUPS):
            responses = [{"text": f"{text}\nAnswer: {right}".strip(), "finished": True, "r_a": 1.0,
                          "r_t": round(r_t(text, trace), 4)} for text in texts]
            rows.append({"step": step, "name": "row", "question": ASKED, "answer": right,
                         "facts": facts, "mode": "exploration", "trace": trace, "target": None,
                         "responses": responses})
        shown = "\n".join(f"  step {i}, facts {facts}, answer {right}: {texts}"
                          for i, (facts, right, texts) in enumerate(GROUPS))
        given = f"twins of these groups, with an r_t {name}:\n{shown}"
        got = answer(twins, rows, given=given)
        try:
            found = sorted(tuple(map(int, triple)) for triple in got)
        except (TypeError, ValueError):
            refuse(f"{given}\n  expected triples (step, i, j)\n  got      {got!r:.200}")
        if found != expected:
            refuse(f"{given}\n  expected {expected}\n  got      {found}")


def test_exercise_08_two_updates_then_a_clip() -> None:
    loss_function = attempt("clipped_loss")
    ratios = torch.tensor([[1, 1.5, 0.5, 1.1], [1, 1.5, 0.5, 0.9], [1.5, 0.5, 1, 1]])
    old = torch.tensor([[-1, -2, -3, -1], [-1, -2, -0.9, -2], [-1, -0.9, -7, -7]])
    logprobs = old + ratios.log()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]])
    weights, explore = torch.tensor([0.4, -0.4, 0.2]), torch.tensor([True, True, False])
    given = (f"clipped_loss of log-probs {shown(logprobs)}, old {shown(old)} (so that rho is "
             f"{shown(ratios)}), mask {shown(mask)}, weights {shown(weights)}, explore "
             f"{shown(explore)} and clip 0.2")
    loss, gradient = loss_of(loss_function, logprobs, old, mask, weights, explore, 0.2, given=given)
    expected = [[-0.1, 0.0, -0.05, -0.11], [0.1, 0.15, 0.0, 0.09], [-0.1, -0.1, 0.0, 0.0]]
    expect_numbers(gradient, expected, 1e-3, f"{given}\nits gradient to the log-probs")
    expect_numbers(loss, 0.2588, 1e-3, f"{given}\nits value")


def test_exercise_09_hack_the_thinking_reward() -> None:
    hack = attempt("hack")
    rewards = []
    for example in toy.make_examples("train", "low")[:200]:
        text = answer(hack, example.question, given=f"hack({example.question!r})")
        if not isinstance(text, str):
            refuse(f"hack({example.question!r}): expected a text, got {text!r:.200}")
        rewards.append((reward.thinking_f1(text, example.trace), example.question, text))
    mean = sum(r for r, _, _ in rewards) / len(rewards)
    if mean < 0.65:
        r, question, text = min(rewards)
        refuse("the mean r_t of hack(question) over 200 toy questions: expected at least 0.65, got "
               f"{mean:.3f}\n  the least, {r:.3f}, is that of {question!r}: {text!r}")


def fresh_rows(count: int) -> tuple[list[Example], list[Example]]:
    """Charts that no split holds, each with a trace of other heights, and with the true trace."""
    low, true = [], []
    charts = toy.random_charts([5, 1], count, {e.facts for e in toy.make_examples("train")})
    rng = np.random.default_rng(5)
    for chart, kind in zip(charts, itertools.cycle(toy.QUESTIONS), strict=False):
        values = chart.values
        asked = toy.ask(kind, values, *toy.two_bars(kind, values, rng))
        question, goal, right, bars, working = asked
        others = [v for v in range(1, 10) if v not in values.values()]
        for rows, seen in ((low, dict(zip(values, others, strict=False))), (true, values)):
            written = toy.trace(goal, bars, seen, working, right)
            rows.append(Example(question, right, chart.draw, written, chart.facts(), kind, "a row"))
    return low, true


def cheats(i: int, low: list[Example], true: list[Example],
           hack: Callable[[str], str]) -> Iterable[tuple[str, str]]:
    """Traces for chart `i` that are no thinking: what is wrong with each, and the text."""
    trace, answer_line = true[i].trace, true[i].trace.splitlines()[-1]
    yield "nothing", ""
    yield "the answer alone", answer_line
    yield "the words backwards", " ".join(trace.split()[::-1])
    yield "the same three times over", "\n".join([trace] * 3)
    if low[i].trace != trace:
        yield "the reference, whose values are not in the image", low[i].trace
    swapped = re.sub(r"(\d) ([-+]) (\d)",
                     lambda m: f"{m[1]} {'-' if m[2] == '+' else '+'} {m[3]}", trace)
    if swapped != trace:
        yield "a false equation", swapped
    other = next(e for e in itertools.islice(itertools.cycle(true), i + 1, None)
                 if e.source == true[i].source and e.answer != true[i].answer)
    yield "another chart's thinking", other.trace
    read = dict(re.findall(r"(\w+) (\d)", trace.split("Reasoning")[0]))
    if len(read) > 1:
        turned = dict(zip(read, [*read.values()][1:] + [*read.values()][:1], strict=True))
        head, _, tail = trace.partition("Reasoning")
        yield "heights of other bars", "Reasoning".join([
            re.sub(r"(\w+) \d", lambda m: f"{m[1]} {turned.get(m[1], 0)}", head), tail])
    yield "your own hack", answer(hack, true[i].question, given=f"hack({true[i].question!r})")


def test_exercise_09_mend_the_thinking_reward() -> None:
    mended = attempt("mended")
    hack = attempt("hack")
    low, true = fresh_rows(60)  # looked up nowhere
    for i, example in enumerate(low):
        chart = f"the chart {example.facts} and {example.question!r}"
        best = answer(mended, true[i].trace, example, given=f"mended, for {chart},")
        for fault, trace in cheats(i, low, true, hack):
            found = thinking.thinking_fault(f"{trace}\nAnswer: {example.answer}", example)
            if fault == "your own hack" and (not found or "not judged" in found):
                continue  # it happens to be true of this chart, as far as rules can tell
            got = answer(mended, trace, example,
                         given=f"mended, for {chart} and the trace {trace!r},")
            if not all(isinstance(x, int | float) and 0 <= x <= 1 for x in (best, got)):
                refuse(f"mended, for {chart}: expected numbers from 0 to 1, got {best!r} and "
                       f"{got!r}")
            if got > best - 0.2:
                refuse(f"mended, for {chart}: the true trace gets {best:.3f}; expected at least "
                       f"0.2 less, got {got:.3f} for this trace ({fault}):\n{trace!r}")


KINDS = ("value", "sum", "difference", "tallest", "shortest")
BASES = {  # any_format, in_format and right of each kind; then the kinds that GRPO brought to 0.9
    "without flags": (
        {"value": (1.0, 0.0003, 0.0), "sum": (0.52, 0.0013, 0.0), "difference": (1.0, 0.0006, 0.0),
         "tallest": (1.0, 0.0, 0.0), "shortest": (1.0, 0.0009, 0.0003)}, set()),
    "with sums": (
        {"value": (1.0, 0.0453, 0.0409), "sum": (0.22, 0.0322, 0.0019),
         "difference": (0.039, 0.129, 0.0012), "tallest": (1.0, 0.0265, 0.0185),
         "shortest": (1.0, 0.0247, 0.0206)}, {"value", "sum", "tallest", "shortest"}),
    "with more flags": (
        {"value": (1.0, 0.2653, 0.2625), "sum": (0.0, 0.2447, 0.0),
         "difference": (0.039, 0.2653, 0.0006), "tallest": (0.98, 0.2302, 0.2216),
         "shortest": (1.0, 0.2272, 0.2178)}, {"value", "tallest", "shortest"}),
}


def test_exercise_10_which_skills_grpo_will_learn() -> None:
    will_learn = attempt("will_learn")
    for name, (measured, learned) in BASES.items():
        names = ("any_format", "in_format", "right")
        base = {kind: dict(zip(names, measured[kind], strict=True)) for kind in KINDS}
        given = f"will_learn of the base {name}, {base}"
        got = answer(will_learn, base, given=given)
        if not isinstance(got, list | tuple | set | frozenset) or set(got) - set(KINDS):
            refuse(f"{given}\n  expected a list of kinds of question\n  got      {shown(got)}")
        if set(got) != learned:
            refuse(f"{given}\n  predicted {sorted(got)}: of {len(KINDS)} kinds "
                   f"{len(set(got) ^ learned)} are not as GRPO learned them")


# ---- The checks themselves, and the text ---------------------------------------------------------


def wrong_row(row: Row, _: Path, name: str) -> Example:
    return Example(row["ask"], row["count"], name=name)


def broken(*_: Any) -> None:
    raise KeyError("r_t")


WRONG = {  # what is at hand and does not solve the exercise, and a word of the message
    "explore_curve": (lambda correct, sizes: [(0.25, 0.25)] * len(sizes), "expected"),
    "group_gradient": (broken, r"group_gradient of rewards \[1.0, .* raised KeyError: 'r_t'$"),
    "right_for_wrong_reasons": (
        lambda run: {"sum": 0.6, "difference": 0.0, "value": 0.0}, "no right answer"),
    "counting_row": (wrong_row, "expected a string as answer, got 3"),
    "sum_loss": (dyme.policy_loss, "expected .*\n  got"),
    "twins": (lambda rows: [], r"expected \[\(0, 0, 1\)"),
    "clipped_loss": (lambda x, old, mask, weights, explore, clip: dyme.policy_loss(
        x, mask, weights, explore), "gradient"),
    "hack": (lambda question: question, "at least 0.65, got"),
    "mended": (
        lambda trace, example: reward.thinking_f1(trace, example.trace), "at least 0.2 less"),
    "will_learn": (
        lambda base: [kind for kind in base if base[kind]["any_format"] > 0.9], "GRPO learned"),
}


@pytest.mark.parametrize("name", EXERCISES)
def test_a_check_refuses_and_shows_only_its_message(
        name: str, tmp_path: Path, monkeypatch: Patch) -> None:
    wrong, said = WRONG[name]
    tries = {"hack": lambda question: question} | {name: wrong}
    monkeypatch.setitem(globals(), "attempt", tries.__getitem__)
    check = next(test for title, test in globals().items()
                 if title.startswith("test_exercise")
                 and f'attempt("{name}")\n' in inspect.getsource(test))
    arguments = {"tmp_path": tmp_path, "monkeypatch": monkeypatch}
    with pytest.raises(pytest.fail.Exception, match=said) as failure:
        check(**{key: arguments[key] for key in inspect.signature(check).parameters})
    assert failure.value.pytrace is False


def test_numbers_are_taken_from_any_container() -> None:
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


def test_the_course_has_ten_exercises_and_no_flag_that_is_not_there() -> None:
    course, code = COURSE.read_text(), (COURSE.parents[1] / "eval.py").read_text()
    flags = {settings.flag(field.name) for field in dataclasses.fields(dyme.Config)}
    named = {*re.findall(r"--[a-z][a-z-]+", course)}
    assert [f for f in named - flags if f'"{f}"' not in code and f'"{f[2:]}"' not in code] == []
    assert len(re.findall(r"^\*\*\d+\. ", course, re.MULTILINE)) == 10
    assert "TODO" not in course


def test_the_courses_recipe_trains_with_a_function_of_ones_own(
        tmp_path: Path, monkeypatch: Patch) -> None:
    recipe, trained = re.search(r"```python\n(.*?)```", COURSE.read_text(), re.DOTALL)[1], []
    monkeypatch.setattr(dyme, "policy_loss", dyme.policy_loss)
    monkeypatch.setattr(dyme, "train", trained.append)
    (tmp_path / "exercises.py").write_text(f"import dyme\nsum_loss = 'mine'\n{recipe}")
    runpy.run_path(str(tmp_path / "exercises.py"), run_name="__main__")
    assert dyme.policy_loss == "mine"
    assert trained[0].steps == 200
