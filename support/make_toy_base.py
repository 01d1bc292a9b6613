"""Make the toy's base again, from its recipe: `python -m support.make_toy_base [FOLDER [SEED]]`.

The base lies in support/toy_base, so that everyone starts from the same weights. It is a tiny VLM
of SmolVLM's architecture, pre-trained on lessons: half a million parameters, 64-pixel images, a
vocabulary of words.
"""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import dyme
from dyme import PROMPT, Policy, Sequence
from reward import FLAG, Example
from support import fast, runs, toy

SEED, BATCH, WARMUP = 1, 64, 50
FLAGGED = 0.04  # share of lessons (but for descriptions) that end in the answer format
# Steps, peak learning rate, shares of calculations made to be of equal numbers, and of those in
# which a number is only carried on. With equal numbers from the beginning, 900 steps did not teach
# which bar is the tallest. Without carrying on, answers to new pairs of heights were often not
# those that the thinking had just found.
ROUNDS = ((900, 3e-3, 0.0, 0.0), (400, 1e-3, 0.2, 0.0), (300, 1e-3, 0.2, 0.4))

# ---- Lessons -------------------------------------------------------------------------------------

WORDINGS = (
    "I see {seen}. Here {working}, so the result is {answer}.",
    "To find the {goal}, look at {listed}. Then {working}. It is {answer}.",
    "The chart has {listed}. As {working}, this gives {answer}.",
    "Bars: {listed}.\nWorking: {working}.\nResult: {answer}.",
    "First look: {seen}.\nThen think: {working}.\nSo {answer}.",
    "Wanted: {goal}. The image has {listed}; now {working}, hence {answer}.")
KNOWN_KINDS = ("value", "tallest", "shortest")  # the lessons lack the others: sum, difference


def lessons(seed: int, count: int, flagged: float, equal: float = 0.0, carried: float = 0.0
            ) -> Iterator[tuple[Example, str]]:
    """Yield rows (what is asked, response) to pre-train a base on.

    They read bars or calculate, never both, in other words than the traces; a share `flagged` has
    the flag. No chart is one of the toy's own. In three of ten two bars are equally high, so that
    the base can read such charts; the toy's own have none. Of the calculations in a share `carried`
    a number is only carried on; of the others a share `equal` more is made to be of equal numbers.
    """
    rng = np.random.default_rng([3, seed])
    reserved = {chart.facts() for chart in toy.random_charts(1, sum(toy.SPLITS["test"]))}
    charts = toy.random_charts([4, seed], count, reserved)
    for chart, kind in zip(charts, itertools.cycle(KNOWN_KINDS), strict=False):
        if rng.random() < 0.3:
            a, b = rng.choice(list(chart.values), 2, replace=False).tolist()
            chart.values[a] = chart.values[b]
            extreme = max if kind == "tallest" else min
            if chart.values[a] == extreme(chart.values.values()):
                kind = "value"  # two bars are the tallest, or the shortest
        task = rng.random()
        if task < 0.3:
            carry = carried and rng.random() < carried  # a share of 0 draws nothing
            lesson = carrying_lesson(rng) if carry else calculation_lesson(rng, equal)
            question, response, answer = lesson
        elif task < 0.51:
            question, response, answer = *description_lesson(chart, rng), ""
        else:
            question, response, answer = question_lesson(chart, kind, rng)
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
    goal, working, answer = f"{what} of {a} and {b}", f"{a} {sign} {b} = {result}", str(result)
    if rng.random() < 0.5:
        return f"Calculate {a} {sign} {b}.", f"{working}.", answer
    response = worded(rng, [str(a), str(b)], goal, working, answer)
    return f"Calculate the {goal}.", response, answer


def carrying_lesson(rng: np.random.Generator) -> tuple[str, str, str]:
    """A number alone, carried on to the result: request, response, result."""
    number = str(rng.integers(19))
    wording, goal = WORDINGS[rng.integers(len(WORDINGS))], ("sum", "difference")[rng.integers(2)]
    response = wording.format(seen=number, listed=number, goal=goal, working=number, answer=number)
    return f"Calculate {number}.", response, number


def description_lesson(chart: toy.Chart, rng: np.random.Generator) -> tuple[str, str]:
    """Read some bars, in the order asked for: request and response."""
    if rng.random() < 1 / 3:
        return "Describe the chart.", f"{chart.facts()}."
    bars = rng.permutation(list(chart.values)).tolist()[:rng.integers(1, 5)]
    described = toy.Chart({bar: chart.values[bar] for bar in bars}).facts()
    return f"Describe {', '.join(bars)}.", f"{described}."


def question_lesson(chart: toy.Chart, kind: str, rng: np.random.Generator) -> tuple[str, str, str]:
    """A question of a known kind in the toy's prompt, its response and answer."""
    asked = toy.ask(kind, chart.values, *toy.two_bars(kind, chart.values, rng))
    question, goal, answer, bars, working = asked
    read = [f"{bar} {chart.values[bar]}" for bar in bars]
    response = worded(rng, read, goal, working.format(**chart.values), answer)
    return PROMPT.format(question=question), response, answer


def worded(rng: np.random.Generator, read: list[str], goal: str, working: str, answer: str) -> str:
    """Reason from what was read to the answer, in one of the lessons' wordings."""
    wording = WORDINGS[rng.integers(len(WORDINGS))]
    return wording.format(seen=" and ".join(read), listed=", ".join(read), goal=goal,
                          working=working, answer=answer)


# ---- Pre-training --------------------------------------------------------------------------------


def new_policy(seed: int) -> Policy:
    """The tiny model with random weights, on the CPU; form and words are those in toy_base/."""
    # There initializer_range is 0.08: with the default, 0.02, some seeds never see.
    config = AutoConfig.from_pretrained(toy.BASE)
    processor = AutoProcessor.from_pretrained(toy.BASE)
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    return fast.speed_up(dyme.make_policy(model, processor, torch.device("cpu")))


def teach(policy: Policy, lessons: Iterator[tuple[Example, str]], steps: int, batch: int,
          lr: float) -> None:
    """Pre-train what is not frozen of a policy on `steps` batches of lessons."""
    torch.set_num_threads(1)  # the weights must not depend on the number of cores
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, fused=True)
    for step in tqdm(range(steps), "lessons", ncols=80):
        part = list(itertools.islice(lessons, batch))
        inputs = dyme.encode_prompts(policy, [e for e, _ in part], room=0, prompt="{question}")
        targets = []
        for i, (example, response) in enumerate(part):
            ids = dyme.target_ids(policy, example, response, prompt="{question}")
            targets.append(Sequence(i, ids, 1 / batch, explore=False))
        logprobs, mask = policy.logprobs(
            policy, policy.model, inputs, [*range(batch)], targets, temperature=1.0)
        weights, explore = torch.full((batch,), 1 / batch), torch.zeros(batch, dtype=torch.bool)
        dyme.policy_loss(logprobs, mask, weights, explore).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / WARMUP, 1 - 0.9 * step / steps)
        optimizer.step()
        optimizer.zero_grad()


def main(folder: Path | str = toy.BASE, seed: int | str = SEED) -> None:
    """Make the base and write it into a folder."""
    policy = new_policy(int(seed))
    for i, (steps, lr, equal, carried) in enumerate(ROUNDS):
        taught = lessons(int(seed) + 10 * i, BATCH * steps, FLAGGED, equal, carried)
        teach(policy, taught, steps, BATCH, lr)
    policy.model.save_pretrained(folder)
    policy.processor.save_pretrained(folder)
    print(f"wrote {folder}")


if __name__ == "__main__":
    sys.exit(runs.run_main(lambda: main(*sys.argv[1:])))
