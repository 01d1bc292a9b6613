"""Tests of dyme.py, eval.py and reward.py: numbers by hand, Eq. 1-8 as written, learning, runs.

On the CPU, offline. Where ../shared is present, with the real SmolVLM processor and real charts.
`python -m pytest -m "not slow"` leaves out what takes most of a second.
"""

import contextlib
import copy
import dataclasses
import itertools
import json
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

import dyme
import eval as evaluation
import reward
from dyme import Config, Policy, Response, Sequence, Step, Trainer
from reward import Example, verify
from support import DivergedError, UserError, data, files, thinking, toy
from support import runs as run_folders
from support.make_toy_base import new_policy

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "shared"
CPU = torch.device("cpu")
Inputs = dict[str, Tensor]
Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]
Row = dict[str, Any]

with warnings.catch_warnings():  # support/conftest.py registers it, but not for this file
    warnings.simplefilter("ignore")
    slow = pytest.mark.slow


# ---- Rewards -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction, target, right", [
    ("104", "100", True), ("105", "100", True), ("106", "100", False), ("95.1", "100", True),
    ("100", "104", True), ("100", "95", False),  # 5 % of the target, not of the prediction
    ("42%", "0.42", True), ("42%", "42", False), ("-3", "3", False), ("0", "0", True),
    ("0.0", "0", False),
    ("France", "france", True), ("Francs", "France", False), ("1,000", "1000", False),
    ("2010", "2009", True),
])
def test_relaxed_match_is_the_official_metric(prediction: str, target: str, right: bool) -> None:
    assert reward.relaxed_match(prediction, target) is right


@pytest.mark.parametrize("answer, target", [
    ("1,234", "1234"), ("$42", "42"), ("42 %", "42"), ("42%", "0.42"), ("0.42", "42%"),
    ("42.", "42"),
    ("12.50", "12.5"), ("Yes.", "yes"), ("**7**", "7"), ("-$1,000.5", "-1000.5"),
    ("cape  verde", "Cape Verde"),
    (".5", "0.5"), ("[Cape Verde, United Kingdom]", "[Cape Verde, United Kingdom]"),
    ("22, 35", "[22, 35]"),
    ("[22,35]", "[22, 35]"), ("[1,234, 5]", "[1234, 5]"), ("120, 130", "[120,130]"),
    ("Chain stores*", "Chain stores*"), ("a, b, and c", "[a, b, c]"), ("[5]", "5"),
    # TeX, typography, tags
    ("$14$", "14"), (r"\(14\)", "14"), (r"$\boxed{\text{Italy}}$", "Italy"), (r"42\%", "42%"),
    (r"-\frac{3}{4}", "-0.75"), (r"5\frac{1}{2}", "5.5"), (r"14\,000", "14000"),
    (r"60^\circ", "60"),
    ("\u22125", "-5"), ("–5", "-5"), ("2010–2015", "2010-2015"), ("“red”", "red"),
    ("Don’t know", "Don't know"),
    ("Co\u0302te", "Côte"), ("５％", "5%"), ("5。", "5"), ("5\u200b", "5"), ("(red)", "red"),
    ("<answer>5</answer>", "5"), ("5 </CONCLUSION>", "5"), ("** 42", "42"),  # after `**Answer:`
    # Numbers, and what stands around them
    ("1e3", "1000"), ("5e-05", "0.00005"), ("1 234", "1234"), ("12/4", "3"), ("3 1/2", "3.5"),
    ("three", "3"),
    ("1.2 million", "1200000"), ("42 percent", "42"), ("5 €", "5"), ("5 dollars", "$5"),
    ("20°C", "20°"),
    ("5 bars", "5"), ("the red bar", "red"), ("The answer is: 5.", "5"), ("= 5", "5"),
    ("about 5", "5"),
    ("Yes, it is.", "Yes"), ("No, it is not.", "No"), ("Red!", "Red"), ("true", "True"),
    ("$8{,}142$", "8142"), (r"900,\!000,\!000", "900000000"), ("5 of the bars", "5"),
    ("2:35 PM", "2:35 P.M."), ("2:35p.m.", "2:35 pm"),
])
def test_verify_forgives_formatting(answer: str, target: str) -> None:
    example = Example("Which bar of the bars?", target)
    assert verify(f"Some thinking.\nAnswer: {answer}", example).correct


@pytest.mark.parametrize("answer, target", [
    ("42", "43"), ("1,23", "123"), ("1.234", "1,234"), ("4200%", "42%"), ("42", "0.42"),
    ("5", "-5"), ("-5", "5"),
    ("42 43", "42"), ("42 million", "42"), ("Norway", "Sweden"), ("[35, 22]", "[22, 35]"),
    ("22", "[22, 35]"),
    ("1_000", "1000"), ("nan", "5"), ("5.0001", "5"), ("12", "1|2"), ("", "5"), ("1950", "2019"),
    ("500%", "5"), ("1000%", "10"), ("100%", "1"), ("1", "100%"), ("1,2", "12"),
    ("10 of 20", "10%"), ("5/6", "5"), ("±5", "5"),
    ("1，234", "1234"), ("5，6", "5"), ("5 or 6", "5"), ("5, 6", "5"), ("5 more bars", "5"),
    ("5 apples", "5"),
    ("more than 5", "5"), ("5€", "$5"), ("20°F", "20°C"), (r"\frac{1}{2x}", r"\frac{1}{2}x"),
    ("1234", "(1,234)"),
    ("12345678901234567891", "12345678901234567890"), ("1e1000", "1e999"), ("inf", "1e999"),
    ("**", "*"),
    ("not left", "Left"), ("left right", "Left"), ("Yes and no", "Yes"), ("Yes, but no", "Yes"),
    ("No idea", "No"),
    ("2:35 AM", "2:35 P.M."), ("2:35", "2:35 P.M."), ("5 pm", "5"),
    ("A negative", "negative"), ("<span>", "<div>"), ("Cote", "Côte"),
])
def test_verify_never_forgives_a_wrong_value(answer: str, target: str) -> None:
    assert not verify(f"Answer: {answer}", Example("Which of the bars?", target)).correct


def test_units_of_the_question_and_items_of_a_list_are_what_they_are() -> None:
    # A unit may be left out if the question names it, but not a word that is part of the number.
    assert not reward.answers_match("5 million", "5", question="Is it more than a million?")
    assert not reward.answers_match("3 n", "3", question="Find the least n.")  # a variable
    candy = "How many pieces of candy are there per bag?"
    assert reward.answers_match("14 pieces of candy per bag", "14", question=candy)
    assert not reward.answers_match("14 of 20 pieces", "14", question=candy)
    assert reward.answers_match("3.9 times", "3.9", question="By how many times did it grow?")
    assert not reward.answers_match("5 times 6", "5", question="By how many times did it grow?")
    # ChartQA's tolerance is for single numbers: as published, a list is compared as text.
    assert reward.answers_match("100, 5", "[100, 5]", 0.05)
    assert not reward.answers_match("2014, 2015", "[2014, 2016]", 0.05)


@pytest.mark.parametrize("question", [
    "What follows? (A) shortage (B) surplus", "Which?\nChoices:\nA. shortage\nB. surplus\n",
    "Which? A: shortage, B: surplus",
    "If B. Smith owns tangent C. Which?\nA. shortage\nB. surplus\nAnswer with the letter alone."])
def test_a_choice_that_the_question_lists_is_met_by_letter_or_text(question: str) -> None:
    for target in ("surplus", "B", "(B)", "B. surplus"):
        example = Example(question, target)
        for right in ("B", "(B)", "B.", "surplus", "(B) surplus", "B: surplus", "The answer is B",
                      "Option B"):
            assert verify(f"Answer: {right}", example).correct, (target, right)
        for wrong in ("A", "shortage", "(B) shortage", "(A) surplus", "A or B", "C", "B C", "b c"):
            assert not verify(f"Answer: {wrong}", example).correct, (target, wrong)


@pytest.mark.parametrize("question, target, answer", [
    ("Which?", "surplus", "B"), ("Is (B) a surplus?", "surplus", "B"),  # nothing is listed
    ("Which? (A) 5 (B) 7 (C) 9", "7", "C"), ("Which? (A) 5 (B) 7 (C) 9", "B", "9"),
    ("How much Vitamin C. is in A. and B.?", "5", "C"),
    ("Bars: A: 5, B: 7, C: 9. Which bar is 7?", "7", "B"),  # data
    ("A: 5, B: 7, C: 9. What is the value of B?", "7", "B"),
    ("Which? A. 50 B. 50%", "A", "50%"), ("Which? A. 50 B. 50%", "B", "50")])
def test_a_letter_is_no_answer_where_it_stands_for_another(
        question: str, target: str, answer: str) -> None:
    assert not verify(f"Answer: {answer}", Example(question, target)).correct


@pytest.mark.parametrize("answer", [
    "5e-05", "1e+22", "True", "nan", "-inf", "1e999", "[x]", "(5)", "...", "*", "C\nD"])
def test_any_answer_is_met_by_its_own_reference(answer: str) -> None:
    example = Example("Q?", answer)
    assert verify(reward.reference_response(example), example).correct


def test_an_answer_of_invisible_characters_is_empty() -> None:
    assert reward.strip_answer("\u200b\ufeff \u00ad") == ""


@pytest.mark.skipif(not (SHARED / "cases").exists(), reason="needs ../shared/cases")
@pytest.mark.parametrize("verdict", ["right", "wrong"])
def test_verify_decides_as_a_person_would(verdict: str) -> None:
    for target, answer in json.loads((SHARED / "cases" / "answers.json").read_text())[verdict]:
        example = Example("How many bars are there?", target)
        correct = verify(f"Answer: {answer}", example).correct
        assert correct is (verdict == "right"), (target, answer)


def test_verify_wants_one_flag_and_an_end() -> None:
    example = Example("Q?", "12")
    assert verify("So it is 12.\nanswer: 12", example) == reward.Verdict(True, "12", True)
    assert verify("12", example) == reward.Verdict(False, None, False)
    assert verify("Answer: 12\nAnswer: 12", example) == reward.Verdict(False, None, False)
    assert verify("Answer: 12", example, finished=False) == reward.Verdict(False, None, False)
    because = verify("Answer: 12 because 5 + 7", example)
    assert because == reward.Verdict(False, "12 because 5 + 7", True)
    assert reward.final_answer("x Answer: 3 Answer: 4") == "4"
    assert reward.final_answer("just 5") == "just 5"


def test_thinking_f1_by_hand() -> None:
    assert reward.thinking_f1("red is 3\nAnswer: 9", "red is 4") == pytest.approx(2 / 3)  # 2 of 3
    assert reward.thinking_f1("red red", "red blue green") == pytest.approx(2 * 1 / 5)
    assert reward.thinking_f1("Answer: red", "red") == 0  # the answer is not thinking
    assert reward.thinking_f1("1,234", "1,234.5") == 0
    assert reward.thinking_f1("Red is THREE", "red is three") == 1
    assert reward.thinking_f1("8 + 3 = 5", "8 - 3 = 5") == pytest.approx(4 / 5)  # operators count


# ---- Advantages, switch, loss: by hand -----------------------------------------------------------


def test_group_advantages_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.3, 0.3, 0.3, 0.3], [2.0, 1.0, 1.0, 0.0]])
    advantages = dyme.group_advantages(rewards, eps=0.0)
    assert torch.allclose(advantages[0], torch.tensor([1.0, -1.0, -1.0, 1.0]))
    assert (advantages[1] == 0).all()  # exactly, not up to rounding
    population = torch.tensor([1.0, 0.0, 0.0, -1.0]) * math.sqrt(2)
    assert torch.allclose(advantages[2], population)
    assert dyme.group_advantages(rewards)[0, 0] == pytest.approx(0.5 / 0.5001)
    assert dyme.no_variance(rewards).tolist() == [False, True, False]


def test_rewards_that_differ_by_little_have_not_collapsed() -> None:
    close = torch.tensor([[0.5, 0.501]])
    assert dyme.group_advantages(close, eps=0.0)[0].tolist() == pytest.approx([-1, 1], abs=1e-3)


def test_the_switch_explores_if_any_response_is_right_and_asks_nothing_else() -> None:
    r_a = torch.tensor([[0.0, 0, 0], [0, 1, 0], [1, 1, 1]])
    for r_t in (torch.zeros(3, 3), torch.ones(3, 3)):
        assert dyme.any_correct(r_a, r_t).tolist() == [False, True, True]
    assert dyme.always_explore(r_a, r_a).tolist() == [True, True, True]


def test_policy_loss_by_hand() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, -9.0], [-1.0, -3.0, -5.0]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    weights, explore = torch.tensor([0.5, 0.25]), torch.tensor([True, False])
    loss = dyme.policy_loss(logprobs, mask, weights, explore)
    # rho = 1 for the sampled one, the mean -log p of the target is 3.
    assert loss.item() == pytest.approx(-0.5 * 1 + 0.25 * 3)
    loss.backward()
    expected = torch.tensor([[-0.25, -0.25, 0.0], [-0.25 / 3] * 3])
    assert torch.allclose(logprobs.grad, expected)


def test_memorizing_is_exploring_one_sample_with_advantage_one() -> None:  # Eq. 4-5
    logprobs, grads = torch.randn(2, 5).log_softmax(1), []
    for explore in (True, False):
        x = logprobs.clone().requires_grad_()
        dyme.policy_loss(x, torch.ones(2, 5), torch.ones(2), torch.full((2,), explore)).backward()
        grads.append(x.grad)
    assert torch.allclose(*grads)


def test_factors_of_tokens_by_hand() -> None:
    """Such as CHORD's p (1 - p): least where the policy is sure, either way."""
    logprobs = torch.tensor([[0.5, 0.8, 1.0], [0.25, 0.5, 0.1]]).log()
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    chord = Sequence(0, [1, 2], 0.5, False, per_token=lambda row: row.exp() * (1 - row.exp()))
    factors = dyme.token_factors([chord, Sequence(1, [3, 4, 5], 0.5, False)], logprobs)
    assert torch.allclose(factors, torch.tensor([[0.25, 0.16, 0.0], [1, 1, 1]]))
    weights, explore = torch.full((2,), 0.5), torch.tensor([False, False])
    loss = dyme.policy_loss(logprobs, mask, weights, explore, factors)
    first = (0.25 * math.log(0.5) + 0.16 * math.log(0.8)) / 2
    second = (math.log(0.25) + math.log(0.5) + math.log(0.1)) / 3
    assert loss.item() == pytest.approx(-0.5 * (first + second))


def test_kl_estimate_is_zero_for_equal_models_and_unbiased() -> None:
    p, q = torch.tensor([0.7, 0.2, 0.1]).log(), torch.tensor([0.3, 0.3, 0.4]).log()
    assert (dyme.kl_estimate(p, p) == 0).all()
    assert (dyme.kl_estimate(p, q) > 0).all()
    exact = (p.exp() * (p - q)).sum().item()
    assert (p.exp() * dyme.kl_estimate(p, q)).sum() == pytest.approx(exact)


# ---- The specification: Eq. 1, 7 and 8 by one forward pass over everything -----------------------

IMAGE = 5
TEXT = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
LLAVA = {"image_token_index": IMAGE, "image_grid_pinpoints": [[16, 16]], "vision_feature_layer": -1,
         "vision_config": VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
         "text_config": TEXT | {"model_type": "qwen2"}}
QWEN_VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4,
               "out_hidden_size": 32, "patch_size": 8, "fullatt_block_indexes": [1],
               "window_size": 32}
QWEN_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
QWEN = {"image_token_id": IMAGE, "vision_start_token_id": 6, "vision_end_token_id": 7,
        "video_token_id": 8, "vision_config": QWEN_VISION,
        "text_config": TEXT | {"model_type": "qwen2_5_vl_text", "rope_parameters": QWEN_ROPE}}
SMOL = {"image_token_id": IMAGE, "scale_factor": 1, "vision_config": VISION,
        "text_config": TEXT | {"model_type": "llama"}, "pad_token_id": 0}
INTERN = {"image_token_id": IMAGE, "image_seq_length": 1,
          "vision_config": VISION | {"image_size": [16, 16], "patch_size": [8, 8]},
          "text_config": TEXT | {"model_type": "qwen2"}}
SETTINGS = {"idefics3": SMOL, "smolvlm": SMOL, "llava_onevision": LLAVA, "qwen2_5_vl": QWEN,
            "internvl": INTERN}
FAMILIES = [*SETTINGS]
# The first is enough while working on something else.
EACH_FAMILY = [FAMILIES[0], *(pytest.param(family, marks=slow) for family in FAMILIES[1:])]
CONNECTOR = "connector|projector|merger"


def tiny_family(family: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """A random model of a family."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SETTINGS[family])
    return AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()


def bare_policy(model: torch.nn.Module) -> Policy:
    """A policy without a processor; its responses read as their ids."""
    tokenizer = SimpleNamespace(decode=lambda ids, **_: " ".join(map(str, ids)))
    return Policy(model, None, tokenizer, [2], 0, CPU, 256, contextlib.nullcontext,
                  dyme.rollout, dyme.sequence_logprobs)


def family_inputs(family: str, text: list[int], seed: int,
                  dtype: torch.dtype = torch.float64) -> Inputs:
    """One prompt: an image, then text ids; what the family's processor would make of it."""
    shape, count, before, after = (1, 1, 3, 16, 16), 4, [], []
    if family == "llava_onevision":
        shape, count = (1, 2, 3, 16, 16), 10
    if family == "qwen2_5_vl":
        shape, before, after = (16, 3 * 2 * 8 * 8), [6], [7]
    if family == "internvl":
        shape, count = (1, 3, 16, 16), 1
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    ids = torch.tensor([[9, *before, *[IMAGE] * count, *after, *text]])
    inputs = {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family == "llava_onevision":
        inputs["image_sizes"] = torch.tensor([[16, 16]])
    if family == "qwen2_5_vl":
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]])
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    return inputs


def pad_batch(rows: list[Inputs]) -> Inputs:
    """Batch prompts with padding on the left."""
    length, batch = max(row["input_ids"].shape[1] for row in rows), {}
    for key in rows[0]:
        parts = [row[key] for row in rows]
        if key.endswith("ids") or "mask" in key:
            parts = [F.pad(part, (length - part.shape[1], 0)) for part in parts]
        batch[key] = torch.cat(parts)
    return batch


def plain_logits(model: torch.nn.Module, prompt: Inputs, ids: list[int]) -> Tensor:
    """Logits (T, V) before each token of a sequence, without padding, batch or cache."""
    length = prompt["input_ids"].shape[1]
    x = dict(prompt, input_ids=torch.cat([prompt["input_ids"], torch.tensor([ids])], 1))
    x["attention_mask"] = torch.ones_like(x["input_ids"])
    if "mm_token_type_ids" in x:
        x["mm_token_type_ids"] = F.pad(x["mm_token_type_ids"], (0, len(ids)))
    return model(**x, use_cache=False).logits[0, length - 1:-1]


def plain_logprobs(model: torch.nn.Module, prompt: Inputs, sequence: Sequence,
                   temperature: float) -> Tensor:
    """Log-probs (T,) of a sequence: sampled ones at the temperature, targets at 1."""
    at = temperature if sequence.explore else 1.0
    logits = plain_logits(model, prompt, sequence.ids) / at
    return logits.log_softmax(-1).gather(1, torch.tensor(sequence.ids)[:, None]).squeeze(1)


def plain_loss(model: torch.nn.Module, prompts: list[Inputs], sequences: list[Sequence],
               temperature: float) -> Tensor:
    """Eq. 7-8 as written, a sequence at a time."""
    loss = torch.zeros(())
    for s in sequences:
        logprobs = plain_logprobs(model, prompts[s.prompt], s, temperature)
        # Eq. 7: -E[rho A]; the ratio rho is 1, its gradient that of log p. Eq. 1: -E[log p].
        ratio = torch.exp(logprobs - logprobs.detach())
        loss = loss - s.weight * (ratio if s.explore else logprobs).mean()
    return loss


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """The gradients that there are, taken away from the model."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], atol: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=1e-5, atol=atol), name


PROMPTS = [list(range(10, 13 + 2 * i)) for i in range(3)]  # text ids of three lengths
SEQUENCES = [Sequence(0, [20, 21, 22, 2], 0.3, True), Sequence(0, [23, 24], -0.3, True),
             Sequence(1, [25, 26, 27, 28, 29, 2], 1 / 3, False), Sequence(2, [30], 0.2, True)]


def summed(policy: Policy, batches: list[Inputs], sequences: list[Sequence],
           **settings: Any) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of `update`, before the optimiser's step."""
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.0)
    trainer = Trainer(Config(**settings), policy, optimizer, torch.amp.GradScaler(enabled=False))
    done = Step(0, [], batches, torch.zeros(3, dtype=torch.bool), sequences)
    with Patch.context() as patch:
        patch.setattr(dyme, "apply_gradients", lambda *_: {})
        dyme.update(trainer, done, 0.0, [0.0] * 4)
    return done.metrics["loss"], gradients(policy.model)


@pytest.mark.parametrize("micro_batch", [3, 2, 1])
@pytest.mark.parametrize("family", EACH_FAMILY)
def test_the_loss_and_its_gradient_are_the_specifications(family: str, micro_batch: int) -> None:
    model = tiny_family(family)
    prompts = [family_inputs(family, text, i) for i, text in enumerate(PROMPTS)]
    batches = [pad_batch(prompts[i:i + micro_batch]) for i in range(0, 3, micro_batch)]
    loss, ours = summed(bare_policy(model), batches, SEQUENCES, temperature=0.7)
    expected = plain_loss(model, prompts, SEQUENCES, 0.7)
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-6)
    assert len(ours) > 20
    assert_close(ours, gradients(model), 1e-6)


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_log_probs_are_those_of_one_forward_pass(family: str) -> None:
    model = tiny_family(family)
    prompts = [family_inputs(family, text, i) for i, text in enumerate(PROMPTS)]
    owners = [s.prompt for s in SEQUENCES]
    policy = bare_policy(model)
    inputs = pad_batch(prompts)
    logprobs, mask = dyme.sequence_logprobs(policy, model, inputs, owners, SEQUENCES, 0.7)
    assert mask.sum(1).tolist() == [4, 2, 6, 1]
    assert not logprobs[mask == 0].any()
    for s, row in zip(SEQUENCES, logprobs.double(), strict=True):
        expected = plain_logprobs(model, prompts[s.prompt], s, 0.7)
        assert torch.allclose(row[:len(s.ids)], expected, atol=1e-6)


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_sampled_ids_and_entropies_are_those_of_one_forward_pass(family: str) -> None:
    model = tiny_family(family)
    prompts = [family_inputs(family, text, i) for i, text in enumerate(PROMPTS)]
    uniforms = dyme.keyed_uniforms(0, 0, range(3), 2, 6)
    uniforms = 0.2 + 0.8 * uniforms  # the plain way cannot read a sampled image token, of low id
    responses = dyme.rollout(bare_policy(model), [pad_batch(prompts)], uniforms, 2, 0.7)
    for n, response in enumerate(responses):
        logits = plain_logits(model, prompts[n // 2], response.ids).float()
        ids, entropy = dyme.draw(logits, uniforms[n, :len(response.ids)], 0.7)
        assert ids.tolist() == response.ids
        assert response.entropy == pytest.approx(entropy.sum().item(), abs=1e-4)
        assert response.finished == (response.ids[-1] == 2)


@pytest.fixture(scope="module")
def tiny() -> Policy:
    """The toy's model and processor with random weights."""
    return new_policy(0)


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return toy.make_examples("train", "high")


# ---- Rollout -------------------------------------------------------------------------------------


@slow
def test_greedy_sampling_is_generate(tiny: Policy, examples: list[Example]) -> None:
    inputs, pad = dyme.encode_prompts(tiny, examples[:6], 20), tiny.pad_id

    def greedy(ends: list[int]) -> dyme.Samples:
        prefix = dyme.encode_prefix(tiny.model, inputs)
        return dyme.sample(tiny.model, prefix, torch.zeros(6, 20), ends, pad, temperature=0.0)

    # More end tokens, so that responses end, at all lengths.
    ends = [*tiny.end_ids, *greedy(tiny.end_ids).ids[[0, 1], [4, 9]].tolist()]
    samples = greedy(ends)
    assert 0 < samples.finished.sum() <= 6
    assert samples.mask.sum(1).unique().numel() > 1
    expected = tiny.model.generate(**inputs, do_sample=False, max_new_tokens=20,
                                   eos_token_id=ends, pad_token_id=pad)
    expected = expected[:, inputs["input_ids"].shape[1]:]
    width = samples.ids.shape[1]
    assert torch.equal(samples.ids, F.pad(expected, (0, width - expected.shape[1])))
    for ids, mask, finished in zip(*(x.tolist() for x in (
            samples.ids, samples.mask, samples.finished)), strict=True):
        last = next((i for i, token in enumerate(ids) if token in ends), None)
        assert finished == (last is not None)
        assert sum(mask) == (last + 1 if finished else 20)  # the end is trained


def test_draws_follow_the_distribution_and_depend_on_their_key_alone() -> None:
    logits = torch.tensor([0.5, 0.2, 0.3, 0.0]).log().expand(4, 4)
    tokens, entropy = dyme.draw(logits, torch.tensor([0.0, 0.49, 0.51, 0.9999999]), 1.0)
    # By the sums 0.5, 0.7, 1.0; never the impossible token.
    assert tokens.tolist() == [0, 0, 1, 2]
    assert entropy[0].item() == pytest.approx(-sum(p * math.log(p) for p in (0.5, 0.2, 0.3)))
    assert dyme.draw(logits[:1], torch.tensor([0.99]), 0.0)[0].item() == 0
    uniforms = dyme.keyed_uniforms(1, 2, [0, 1, 2], 4, 10)
    assert torch.equal(uniforms[4:8], dyme.keyed_uniforms(1, 2, [1], 4, 10))
    assert uniforms.unique().numel() == uniforms.numel()
    for other in (dyme.keyed_uniforms(1, 3, [0, 1, 2], 4, 10),
                  dyme.keyed_uniforms(2, 2, [0, 1, 2], 4, 10)):
        assert not torch.equal(uniforms, other)


def test_a_draw_is_of_the_sharpened_distribution() -> None:
    logits = torch.tensor([[0.5, 0.2, 0.3]]).log()  # at 0.5 they are 0.66, 0.11, 0.24
    token, entropy = dyme.draw(logits, torch.tensor([0.6]), 0.5)
    assert token.item() == 0
    assert dyme.draw(logits, torch.tensor([0.6]), 1.0)[0].item() == 1
    p = np.array([0.25, 0.04, 0.09]) / 0.38
    assert entropy.item() == pytest.approx(-(p * np.log(p)).sum(), rel=1e-5)


def test_no_draw_is_an_impossible_token() -> None:
    first = torch.tensor([[-math.inf, 0.0, 0.0]])
    assert dyme.draw(first, torch.zeros(1), 1.0)[0].item() == 1
    last = torch.zeros(1, 1000)  # whose probabilities add up to a little less than 1
    last[:, -10:] = -math.inf
    assert dyme.draw(last, torch.tensor([1 - 2**-24]), 1.0)[0].item() < 990
    broken = torch.full((1, 5), math.nan)
    assert dyme.draw(broken, torch.tensor([0.5]), 1.0)[0].item() < 5


def test_shuffling_and_sampling_share_no_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds, make = [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: seeds.append(seed) or make(seed))
    dyme.step_rows(Config(prompts=8, seed=3), 0, 4)  # epochs 0 and 1
    dyme.keyed_uniforms(3, 0, [0], 1, 4)
    dyme.keyed_uniforms(3, 1, [0], 1, 4)
    first = [make(seed).random() for seed in seeds]
    assert len(first) == 4 == len({*first})


def test_samples_do_not_depend_on_the_batch(tiny: Policy, examples: list[Example]) -> None:
    def responses(chunks: list[list[int]]) -> list[list[int]]:
        inputs = [dyme.encode_prompts(tiny, [examples[i] for i in rows], 16) for rows in chunks]
        uniforms = dyme.keyed_uniforms(0, 5, [*itertools.chain(*chunks)], 4, 16)
        return [y.ids for y in dyme.rollout(tiny, inputs, uniforms, 4, 1.0)]

    together = responses([[0, 1, 2, 3]])
    assert together == responses([[0], [1, 2], [3]])  # encoded in chunks
    assert together == responses([[0]]) + responses([[1, 2]]) + responses([[3]])


def test_draws_for_equal_prompts_differ_by_row_and_by_seed(
        tiny: Policy, examples: list[Example]) -> None:
    drawn = [dyme.respond(tiny, [examples[0]] * 4, 8, 2, draws=2, seed=seed) for seed in (0, 0, 1)]
    texts = [[row["response"] for row in rows] for rows in drawn]
    assert len({*texts[0]}) > 4
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    assert all(row["name"] == examples[0].name for row in drawn[0])
    greedy = [dyme.respond(tiny, examples[:2], 8, 2, seed=seed) for seed in (0, 1)]
    assert greedy[0] == greedy[1]


# ---- Prompts and targets -------------------------------------------------------------------------


def check_target(policy: Policy, example: Example) -> None:
    """Prompt and target together are the template's rendering of both, up to the end token."""
    prompt = dyme.encode_prompts(policy, [example], room=0)["input_ids"][0].tolist()
    question = dyme.PROMPT.format(question=example.question)
    response, target = reward.reference_response(example), dyme.target_ids(policy, example)
    text = dyme.render(policy.processor, question, True, response)
    full = policy.processor(text=[text], images=[[example.image()]], add_special_tokens=False)
    full, length = list(full.input_ids[0]), len(prompt) + len(target)
    assert prompt + target == full[:length]
    assert target[-1] in policy.end_ids
    assert not {*target[:-1]} & {*policy.end_ids}
    assert policy.tokenizer.decode(full[length:]).strip() == ""
    assert policy.tokenizer.decode(target, skip_special_tokens=True).strip() == response


def test_prompt_and_target_are_the_templates_full_rendering(
        tiny: Policy, examples: list[Example]) -> None:
    for example in examples[:10]:
        check_target(tiny, example)
    for example in examples[:500]:
        assert tiny.tokenizer.unk_token_id not in dyme.target_ids(tiny, example)


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
def test_the_real_smolvlm_processor(examples: list[Example]) -> None:
    source = SHARED / "smolvlm-256m-instruct"
    model = SimpleNamespace(
        name_or_path="SmolVLM", config=AutoConfig.from_pretrained(source), eval=lambda: model,
        generation_config=SimpleNamespace(eos_token_id=49279), device=CPU,
        num_parameters=lambda: 256e6)
    processor = AutoProcessor.from_pretrained(source)
    policy = dyme.make_policy(model, processor, CPU, image_edge=512)
    assert policy.end_ids == [policy.tokenizer.convert_tokens_to_ids("<end_of_utterance>")]
    check_target(policy, examples[0])
    charts = data.load_data(str(SHARED / "chartqa-sample"), "train")[:2]
    inputs = dyme.encode_prompts(policy, charts, room=0)
    assert inputs["pixel_values"].shape[:2] == (2, 1)  # --image-edge 512 is one tile
    assert (inputs["attention_mask"][:, -1] == 1).all()
    assert inputs["input_ids"][0, -1] == inputs["input_ids"][1, -1]


@slow
def test_an_image_edge_bounds_the_tiles_of_internvl() -> None:
    # Its image processor alone: the whole processor cannot be made without torchvision.
    wide, model = Image.new("RGB", (1600, 800)), tiny_family("internvl")
    for edge, tiles in ((0, 9), (1344, 9), (896, 3), (448, 1)):  # 4 x 2, 2 x 1; and a thumbnail
        processor = new_policy(0).processor
        processor.image_processor = images = GotOcr2ImageProcessorPil(crop_to_patches=True)
        images.size = {"height": 448, "width": 448}
        dyme.make_policy(model, processor, CPU, edge)
        assert len(images(wide).pixel_values) == tiles


def test_an_image_edge_bounds_any_picture(tiny: Policy, examples: list[Example]) -> None:
    wide = Image.new("RGB", (200, 100))
    example = dataclasses.replace(examples[0], image=lambda: wide)
    dyme.encode_prompts(dataclasses.replace(tiny, image_edge=50), [example], 0)
    assert wide.size == (50, 25)


@slow
def test_an_end_that_the_template_alone_names_ends_a_response() -> None:
    model, processor = new_policy(0).model, new_policy(0).processor
    model.generation_config.eos_token_id = None
    processor.tokenizer.eos_token = "<unk>"
    end = processor.tokenizer.convert_tokens_to_ids("<end_of_utterance>")
    assert end in dyme.make_policy(model, processor, CPU).end_ids


@slow
def test_a_tokenizer_without_a_pad_token_pads_all_the_same(examples: list[Example]) -> None:
    model, processor = new_policy(0).model, new_policy(0).processor
    expected = dyme.encode_prompts(dyme.make_policy(model, processor, CPU), examples[:4], 0)
    processor.tokenizer.pad_token = None
    policy = dyme.make_policy(model, processor, CPU)
    inputs = dyme.encode_prompts(policy, examples[:4], 0)
    assert policy.pad_id == policy.end_ids[0]
    assert torch.equal(inputs["attention_mask"], expected["attention_mask"])
    assert (inputs["attention_mask"] == 0).any()  # the prompts differ in length


@slow
def test_a_template_that_opens_the_thinking_itself_is_named(
        tiny: Policy, examples: list[Example]) -> None:
    processor = new_policy(0).processor
    processor.chat_template = processor.chat_template.replace("Assistant:", "Assistant: <think>")
    with pytest.raises(UserError, match="does not continue its own prompt.* <think>'"):
        dyme.target_ids(dataclasses.replace(tiny, processor=processor), examples[0])


def test_a_prompt_longer_than_the_context_is_named(tiny: Policy, examples: list[Example]) -> None:
    with pytest.raises(UserError, match="toy train row 0: .* context of 512"):
        dyme.encode_prompts(tiny, examples[:1], room=500)


def test_a_trace_with_a_flag_of_its_own_still_gives_a_verifiable_target() -> None:
    example = Example("q", "7", trace="It is 7. Answer: 7")
    assert reward.reference_response(example) == "It is 7.\nAnswer: 7"
    assert verify(reward.reference_response(example), example).correct


def test_a_folder_that_is_missing_is_no_hub_id(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="runs/nope: no such folder"):
        dyme.load_policy("runs/nope", CPU)
    with pytest.raises(UserError, match="runs/nope: no such folder"):
        evaluation.main(["--model", "runs/nope"])


@slow
def test_a_missing_template_and_a_missing_package_are_one_line(
        tiny: Policy, monkeypatch: Patch) -> None:
    processor = new_policy(0).processor
    processor.chat_template = processor.tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        dyme.make_policy(tiny.model, processor, CPU)

    def fail(*_: Any, **__: Any) -> None:
        raise ImportError("Processor requires the Torchvision library")

    monkeypatch.setattr(dyme, "load_pretrained", fail)
    with pytest.raises(UserError, match=r"pip install -r requirements.txt torchvision\)?$"):
        dyme.load_policy("Qwen2.5-VL-3B", CPU)


def test_requirements_ask_for_the_transformers_that_all_families_need() -> None:
    """5.24 is the first release whose caches have the name used here."""
    required = (HERE / "requirements.txt").read_text()
    assert "transformers>=5.24,<6" in required
    assert "torch>=2.11," in required
    for family in FAMILIES:
        out = tiny_family(family).base_model(**family_inputs(family, [10], 1), use_cache=True)
        assert hasattr(out.cache, "reorder_cache")


# ---- A training step -----------------------------------------------------------------------------

CORRECT = [[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]]


def judged_as(r_a: list[list[int]], r_t: list[list[float]] | None = None) -> Callable[..., Any]:
    """A judge that says so, whatever it is shown."""
    marks = torch.tensor(r_a, dtype=torch.float32)
    return lambda *_: (marks, torch.tensor(r_t) if r_t else torch.zeros_like(marks))


def make_trainer(policy: Policy, correct: list[list[int]] | None = None,
                 **settings: Any) -> Trainer:
    """A plain trainer of a copy of the model; `correct`: which responses are right, r_t being 0."""
    defaults = {"lr": 1e-3, "prompts": 4, "generations": 4, "max_new_tokens": 20, "plain": True}
    policy = dataclasses.replace(policy, model=copy.deepcopy(policy.model))
    trainer = dyme.make_trainer(Config(**(defaults | settings)), policy)
    if correct:
        trainer.judge = judged_as(correct)
    return trainer


@pytest.fixture
def no_update(monkeypatch: Patch) -> None:
    """Leave gradients as they are, and weights too."""
    monkeypatch.setattr(dyme, "apply_gradients", lambda *_: {})


@pytest.fixture
def readable(tiny: Policy, monkeypatch: Patch) -> None:
    """Never sample the image token, which the specification cannot read."""
    draw, image = dyme.draw, torch.tensor([tiny.model.config.image_token_id])
    monkeypatch.setattr(dyme, "draw", lambda logits, *rest: draw(
        logits.index_fill(1, image, -math.inf), *rest))


def test_a_function_put_in_the_place_of_one_of_the_module_is_the_trainers(
        tiny: Policy, monkeypatch: Patch) -> None:
    for name, field in (("judge", "judge"), ("any_correct", "switch"),
                        ("group_advantages", "advantages")):
        def mine(*_: Any) -> None: ...

        monkeypatch.setattr(dyme, name, mine)
        assert getattr(make_trainer(tiny), field) is mine


def test_a_dyme_step_is_eq_8_computed_the_plain_way(
        tiny: Policy, examples: list[Example], no_update: None, readable: None) -> None:
    trainer = make_trainer(tiny, CORRECT, temperature=0.7, micro_batch=3)
    model, sequences = trainer.policy.model, []
    done = dyme.train_step(trainer, examples[:4], 0, 1e-3)
    ours = gradients(model)
    assert done.explore.tolist() == [True, False, True, True]
    for p, row in enumerate(CORRECT):
        rewards = np.array(row, dtype=float)
        for k, response in enumerate(done.responses[p]):
            advantage = (rewards[k] - rewards.mean()) / (rewards.std() + 1e-4)
            if any(row):
                sequences.append(Sequence(p, response.ids, advantage / (4 * 4), True))
        if not any(row):  # at full weight, as heavy as four responses
            target = dyme.target_ids(trainer.policy, examples[p])
            sequences.append(Sequence(p, target, 1 / 4, False))
    prompts = [dyme.encode_prompts(trainer.policy, [example], 40) for example in examples[:4]]
    loss = plain_loss(model, prompts, sequences, temperature=0.7)
    loss.backward()
    assert done.metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)
    expected = {name: g for name, g in gradients(model).items() if name in ours}
    assert_close(ours, expected, 1e-5)


def test_micro_batches_give_the_gradient_of_one_batch(
        tiny: Policy, examples: list[Example], no_update: None) -> None:
    found, losses = [], []
    for micro_batch in (4, 3, 1):
        trainer = make_trainer(tiny, CORRECT, micro_batch=micro_batch)
        metrics = dyme.train_step(trainer, examples[:4], 0, 1e-3).metrics
        found.append(gradients(trainer.policy.model))
        losses.append(metrics["loss"])
        parts = ("memorized", "no_variance", "none_correct")
        assert [metrics[part] for part in parts] == [0.25, 0.5, 0.25]
    for other in found[1:]:
        assert_close(found[0], other, 1e-6)
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)


def test_rewards_weigh_thinking_and_format_and_the_switch_looks_at_neither(
        tiny: Policy, examples: list[Example], no_update: None) -> None:
    trainer = make_trainer(tiny, thinking_weight=0.5, format_weight=0.25, generations=2)
    marks, thought = torch.tensor([[1.0, 0], [0, 0]]), torch.tensor([[0.2, 0.4], [1.0, 0.9]])

    def judge(responses: list[list[Response]], _: list[Example]) -> tuple[Tensor, Tensor]:
        responses[0][1].in_format = True
        return marks, thought

    trainer.judge = judge
    done = dyme.train_step(trainer, examples[:2], 0, 1e-3)
    assert torch.allclose(done.rewards, torch.tensor([[1.1, 0.2 + 0.25], [0.5, 0.45]]))
    assert torch.equal(done.advantages, dyme.group_advantages(done.rewards))
    assert done.explore.tolist() == [True, False]  # nothing right in the second, however it thinks


def test_a_judge_reads_answers_and_traces(examples: list[Example]) -> None:
    said = [f"red red\nAnswer: {examples[0].answer}", "nothing"]
    rows = [dataclasses.replace(examples[0], trace="red blue"), dataclasses.replace(
        examples[0], trace=None)]
    groups = [[Response([1], text, True, 0.0) for text in said] for _ in rows]
    groups[1][0].finished = False
    r_a, r_t = dyme.judge(groups, rows)
    assert r_a.tolist() == [[1, 0], [0, 0]]  # cut off is wrong
    assert r_t.tolist() == [[0.5, 0], [0, 0]]  # without a trace, 0
    assert [y.in_format for y in groups[0]] == [True, False]


def test_a_judge_forgives_no_value_and_rates_wrong_responses_too() -> None:
    near = Example("Q?", "100", trace="red blue", tolerance=0.05)  # which evaluation forgives
    for text, r_t in (("red red\nAnswer: 104", 0.5), ("Answer: 104", 0.0)):
        found = dyme.judge([[Response([1], text, True, 0.0)]], [near])
        assert [rewards.tolist() for rewards in found] == [[[0]], [[r_t]]]


def test_samples_follow_the_seed_and_the_step(
        tiny: Policy, examples: list[Example], no_update: None) -> None:
    said = []
    for seed, step in ((0, 0), (0, 0), (1, 0), (0, 1)):
        trainer = make_trainer(tiny, seed=seed, max_new_tokens=8)
        done = dyme.train_step(trainer, examples[:2], step, 1e-3)
        said.append([y.ids for group in done.responses for y in group])
    assert said[0] == said[1]
    assert said[0] != said[2]
    assert said[0] != said[3]


def test_sequences_without_weight_cost_no_forward_pass(
        tiny: Policy, examples: list[Example]) -> None:
    trainer, calls = make_trainer(tiny, [[1] * 4] * 4, micro_batch=2), []
    trainer.policy.logprobs = lambda *_: calls.append(1)
    before = [p.clone() for p in trainer.policy.model.parameters()]
    metrics = dyme.train_step(trainer, examples[:4], 0, 1e-3).metrics
    assert not calls
    assert metrics["empty_steps"] == 1
    assert metrics["no_variance"] == 1
    for a, b in zip(before, trainer.policy.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not trainer.optimizer.state  # no optimiser step was made


def test_a_step_of_sft_imitates_every_prompt(
        tiny: Policy, examples: list[Example], no_update: None) -> None:
    trainer = make_trainer(tiny, micro_batch=2)
    done = dyme.sft_step(trainer, examples[:3], 0, 1e-3)
    ours = gradients(trainer.policy.model)
    assert done.metrics["memorized"] == 1
    assert done.metrics["target_length"] == np.mean([len(s.ids) for s in done.sequences])
    assert "reward" not in done.metrics
    prompts = [dyme.encode_prompts(trainer.policy, [example], 40) for example in examples[:3]]
    targets = [Sequence(i, dyme.target_ids(tiny, examples[i]), 1 / 3, False) for i in range(3)]
    plain_loss(trainer.policy.model, prompts, targets, 1.0).backward()
    expected = {name: g for name, g in gradients(trainer.policy.model).items() if name in ours}
    assert_close(ours, expected, 1e-5)


def test_grpo_explores_where_nothing_is_right(
        tiny: Policy, examples: list[Example], no_update: None) -> None:
    trainer = make_trainer(tiny, mode="grpo")
    trainer.judge = judged_as([[0] * 4] * 2, [[0.1, 0.2, 0.3, 0.4]] * 2)
    done = dyme.train_step(trainer, examples[:2], 0, 1e-3)
    assert done.metrics["memorized"] == 0
    assert all(s.explore for s in done.sequences)
    json.dumps(done.metrics)


def test_kl_pulls_towards_the_reference(tiny: Policy, examples: list[Example]) -> None:
    trainer = make_trainer(tiny, mode="grpo", beta=0.5, temperature=0.5)  # both at this one
    trainer.reference = tiny.model
    metrics = dyme.train_step(trainer, examples[:2], 0, 1e-2).metrics
    assert metrics["kl"] == pytest.approx(0, abs=1e-6)  # the first step starts at the reference
    metrics = dyme.train_step(trainer, examples[:2], 1, 1e-2).metrics
    assert metrics["kl"] > 0
    assert metrics["loss"] == pytest.approx(0.5 * metrics["kl"], abs=1e-5)  # the rest sums to 0


def test_the_kl_penalty_by_hand(tiny: Policy, examples: list[Example]) -> None:
    trainer = make_trainer(tiny, mode="grpo", beta=0.5)
    trainer.reference = copy.deepcopy(tiny.model)
    torch.nn.init.normal_(trainer.reference.lm_head.weight, std=0.1)
    policy, inputs = trainer.policy, dyme.encode_prompts(trainer.policy, examples[:2], 40)
    # beta / (K P), with K = 4 and P = 2
    sequences = [Sequence(0, [20, 21, 22], 0.0, True, 0.5 / 8),
                 Sequence(1, [23, 24], 0.0, True, 0.5 / 8)]
    ours, mask = dyme.sequence_logprobs(policy, policy.model, inputs, [0, 1], sequences, 1.0)
    frozen, _ = dyme.sequence_logprobs(policy, trainer.reference, inputs, [0, 1], sequences, 1.0)
    k3 = dyme.kl_estimate(ours, frozen)
    penalty = dyme.kl_penalty(trainer, inputs, [0, 1], sequences, ours, mask)
    expected = 0.5 / 8 * (k3[0].sum() / 3 + k3[1, :2].sum() / 2)
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-5)
    assert penalty.requires_grad


def test_the_gradient_is_clipped_and_the_learning_rate_is_the_steps(
        tiny: Policy, examples: list[Example]) -> None:
    trainer = make_trainer(tiny)
    trainer.optimizer = torch.optim.SGD(trainer.policy.model.parameters(), lr=1.0)
    before = [p.detach().clone() for p in trainer.policy.model.parameters()]
    metrics = dyme.sft_step(trainer, examples[:2], 0, 0.25).metrics
    moved = [a - b for a, b in zip(before, trainer.policy.model.parameters(), strict=True)]
    assert metrics["grad_norm"] > 1
    length = torch.stack([m.norm() for m in moved]).norm().item()
    assert length == pytest.approx(0.25, rel=1e-3)


def test_weight_decay_is_a_hundredth_of_the_learning_rate(tiny: Policy) -> None:
    trainer = make_trainer(tiny, lr=0.1)
    weight = trainer.policy.model.lm_head.weight
    before, weight.grad = weight.detach().clone(), torch.zeros_like(weight)
    trainer.optimizer.step()
    assert torch.allclose(weight, before * (1 - 0.1 * 0.01), rtol=1e-6)


def test_a_gradient_that_is_not_finite_changes_nothing_and_ten_end_the_run(
        tiny: Policy, examples: list[Example], monkeypatch: Patch) -> None:
    trainer = make_trainer(tiny)
    before = [p.clone() for p in trainer.policy.model.parameters()]
    monkeypatch.setattr(dyme, "policy_loss", lambda logprobs, *_: logprobs.sum() * math.nan)
    for step in range(9):
        assert dyme.sft_step(trainer, examples[:2], step, 1e-3).metrics["skipped_steps"] == 1
    for a, b in zip(before, trainer.policy.model.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(DivergedError, match="ten steps in a row"):
        dyme.sft_step(trainer, examples[:2], 9, 1e-3)


def test_a_loss_that_is_not_finite_changes_nothing_whatever_its_gradient(tiny: Policy) -> None:
    trainer = make_trainer(tiny)
    weight = trainer.policy.model.lm_head.weight
    before, weight.grad = weight.detach().clone(), torch.ones_like(weight)
    assert dyme.apply_gradients(trainer, math.nan, 1e-3)["skipped_steps"] == 1
    assert torch.equal(weight, before)


def test_a_good_step_ends_a_row_of_failures(tiny: Policy, examples: list[Example]) -> None:
    trainer = make_trainer(tiny)
    trainer.failures = 9
    dyme.sft_step(trainer, examples[:2], 0, 1e-3)
    assert trainer.failures == 0


def test_a_scaler_changes_no_gradient(tiny: Policy, examples: list[Example]) -> None:
    norms = []
    for enabled in (False, True):
        trainer = make_trainer(tiny)
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        norms.append([dyme.sft_step(trainer, examples[:2], step, 1e-3).metrics["grad_norm"]
                      for step in range(2)])
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_step_metrics_by_hand() -> None:
    sampled = [[Response([1, 2], "a", True, 2.0, True), Response([3], "a", False, 1.0)],
               [Response([4, 5, 6], "a", False, 0.5), Response([7, 8], "a", False, 0.5)]]
    r_a, r_t = torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([[0.2, 0.4], [0.5, 0.5]])
    target = Sequence(1, [1, 2, 3], 0.5, False)
    done = Step(0, [], (), torch.tensor([True, False]), [target], sampled, r_a, r_t, r_a + r_t)
    step = dyme.step_metrics(done, [target], {"loss": 0.5, "kl": 0.0, "helper_calls": 3})
    assert (step["truncated"], step["entropy"], step["response_length"]) == (0.75, 0.5, 2.0)
    assert (step["accuracy"], step["reward_format"]) == (0.5, 0.25)
    assert (step["reward"], step["reward_thinking"]) == pytest.approx((0.9, 0.4))
    # Neither group varies in r_a; the first one does in rewards, so that only one has collapsed.
    assert (step["none_correct"], step["no_variance"]) == (0.5, 0.5)
    assert (step["memorized"], step["target_length"], step["tokens"]) == (0.5, 3.0, 8)
    assert (step["loss"], step["helper_calls"], step["empty_steps"]) == (0.5, 3, 0)


# ---- What trains ---------------------------------------------------------------------------------


def test_a_trainer_freezes_the_vision_tower_unless_asked(tiny: Policy) -> None:
    model = make_trainer(tiny).policy.model
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if "vision_model" in name}
    assert frozen
    trainer = make_trainer(tiny, train_vision=True)
    assert all(p.requires_grad for p in trainer.policy.model.parameters())


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_one_step_trains_any_family_with_its_vision_tower_frozen(family: str) -> None:
    model = tiny_family(family, torch.float32)
    trainer = dyme.make_trainer(Config(generations=3, plain=True), bare_policy(model))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen
    assert all("vision" in name or "visual" in name for name in frozen)
    prompts = [family_inputs(family, text, i, torch.float32) for i, text in enumerate(PROMPTS[:2])]
    uniforms = dyme.keyed_uniforms(0, 0, [0], 3, 7)
    responses = dyme.rollout(trainer.policy, [prompts[0]], uniforms, 3, 1.0)
    sequences = [Sequence(0, y.ids, a / 6, True)
                 for y, a in zip(responses, (1.0, -2.0, 1.0), strict=True)]
    sequences.append(Sequence(1, [20, 21, 2], 0.5, False))
    before = {name: p.clone() for name, p in model.named_parameters()}
    done = Step(0, [], [pad_batch(prompts)], torch.tensor([True, False]), sequences)
    dyme.update(trainer, done, 0.01, [0.0] * 4)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert not changed & frozen
    assert any(re.search(CONNECTOR, name) for name in changed)


def test_freezing_finds_towers_and_the_connectors_inside_them() -> None:
    qwen = {"image_token_id": IMAGE, "text_config": QWEN["text_config"] | {
        "model_type": "qwen3_vl_text"}, "vision_config": QWEN_VISION | {
        "deepstack_visual_indexes": [0], "num_position_embeddings": 16}}
    pixtral = VISION | {"model_type": "pixtral", "head_dim": 8}
    lighton = {"image_token_id": IMAGE, "vision_config": pixtral,
               "text_config": TEXT | {"model_type": "qwen3"}}
    docling = {"image_token_id": IMAGE, "vision_config": VISION | {
        "out_hidden_size": 32, "scale_factor": 2, "deepstack_visual_indexes": [0]},
        "text_config": TEXT | {"model_type": "granite_docling_text"}}
    known, trained = {"qwen3_vl": qwen, "lighton_ocr": lighton, "granite_docling": docling}, []
    for family, settings in known.items():
        config = AutoConfig.for_model(family, **settings)
        model = AutoModelForImageTextToText.from_config(config)
        dyme.freeze_vision(model)
        names = [name.split(".") for name, p in model.named_parameters() if p.requires_grad]
        trained.append({".".join(name[1:3]) if "vis" in name[1] else name[1] for name in names})
    assert trained == [
        {"language_model", "weight", "visual.merger", "visual.deepstack_merger_list"},
        {"language_model", *(f"vision_projection.{x}" for x in (
            "norm", "patch_merger", "linear_1", "linear_2"))},
        {"text_model", "vision_model.connector"}]
    base: Any = SimpleNamespace(vision_model=1, high_res_vision_model=2)  # as in DeepSeek-VL
    model = SimpleNamespace(base_model=base)
    assert dyme.vision_towers(model) == [1, 2]


# ---- Stages and rows -----------------------------------------------------------------------------


def test_learning_rate_and_stages_by_hand() -> None:
    cfg = Config(mode="dyme", lr=1.0, steps=12, warmup=2)
    rates = [round(dyme.schedule(cfg, step)[1], 4) for step in (0, 1, 2, 7, 11)]
    assert rates == [0.3333, 0.6667, 1.0, 0.5, 0.1]
    cfg = Config(mode="dyme", lr=1.0, steps=4, warmup=10)  # of a short stage half is warm-up
    rates = [round(dyme.schedule(cfg, step)[1], 4) for step in range(4)]
    assert rates == [0.3333, 0.6667, 1.0, 0.5]
    cfg = Config(mode="two-stage", lr=1.0, steps=10, sft_steps=4, warmup=0)
    stages = [dyme.schedule(cfg, step) for step in (0, 3, 4, 9)]
    assert stages == [("sft", 1.0), ("sft", 0.25), ("grpo", 1.0), ("grpo", 1 / 6)]


def test_grpo_after_sft_begins_without_its_momentum(
        tiny: Policy, examples: list[Example], tmp_path: Path) -> None:
    trainer = make_trainer(tiny, CORRECT, mode="two-stage", sft_steps=1, steps=3)
    trainer.rows = examples[:16]
    for step in range(2):
        dyme.take_step(trainer, step, tmp_path, dyme.feed_prompts(trainer, range(step, 3)))
    # AdamW has counted one step: that of GRPO.
    assert {state["step"].item() for state in trainer.optimizer.state.values()} == {1.0}


@pytest.mark.parametrize("mode, sizes", [
    ("dyme", [3] * 8), ("sft", [12] * 8), ("two-stage", [12, 12, *[3] * 6])])
def test_every_row_is_seen_once_an_epoch(mode: str, sizes: list[int]) -> None:
    cfg = Config(mode=mode, prompts=3, generations=4, steps=8, sft_steps=2)
    batches = [dyme.step_rows(cfg, step, count=7) for step in range(8)]
    assert [len(batch) for batch in batches] == sizes
    order = [*itertools.chain(*batches)]
    for first in range(0, len(order) - 6, 7):
        assert sorted(order[first:first + 7]) == [*range(7)]
    assert order[:7] != order[7:14]


def test_the_order_of_rows_follows_the_seed() -> None:
    orders = [[dyme.step_rows(Config(seed=seed), step, 100) for step in range(3)]
              for seed in (0, 0, 1)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


def test_the_baselines_are_rewarded_by_r_a_alone_unless_asked() -> None:
    for mode, weight in (("dyme", 1), ("grpo", 0), ("two-stage", 0)):
        assert dyme.parse_config(["--mode", mode]).thinking_weight == weight
    assert dyme.parse_config(["--mode", "grpo", "--thinking-weight", "1"]).thinking_weight == 1
    assert dyme.parse_config(["--released-code"]).format_weight == 1


def test_prompts_are_prepared_in_the_order_of_the_steps(
        tiny: Policy, examples: list[Example]) -> None:
    trainer = make_trainer(tiny, micro_batch=3, steps=3)
    trainer.rows = examples[:10]
    chunks = [*dyme.feed_prompts(trainer, range(1, 3))]
    assert [len(x["input_ids"]) for x in chunks] == [3, 1, 3, 1]
    rows = dyme.step_rows(trainer.cfg, 2, 10)
    expected = dyme.encode_prompts(tiny, [examples[i] for i in rows[:3]], room=0)
    for key in expected:
        assert torch.equal(chunks[2][key], expected[key])


# ---- Learning ------------------------------------------------------------------------------------


def accuracy(policy: Policy, examples: list[Example]) -> float:
    return thinking.summarise(dyme.respond(policy, examples, 40, 64))["accuracy"]


@slow
def test_dyme_learns_by_memorizing_and_then_exploring(
        tiny: Policy, examples: list[Example]) -> None:
    """From random weights on eight rows: targets bring the first right answers."""
    cfg = Config(lr=4e-3, prompts=8, generations=4, max_new_tokens=40, steps=60, warmup=2,
                 train_vision=True)
    policy = dataclasses.replace(tiny, model=new_policy(1).model)
    trainer, rows = dyme.make_trainer(cfg, policy), examples[:8]
    before, log = accuracy(policy, rows), []
    for step in range(cfg.steps):
        log.append(dyme.train_step(trainer, rows, step, dyme.schedule(cfg, step)[1]).metrics)
    assert before == 0
    assert accuracy(policy, rows) >= 0.75
    assert log[0]["memorized"] == 1
    assert np.mean([row["memorized"] for row in log[-10:]]) < 0.4
    assert np.mean([row["accuracy"] for row in log[-10:]]) > 0.35


@slow
def test_exploration_alone_raises_accuracy(tiny: Policy, examples: list[Example]) -> None:
    """GRPO on a policy that is right now and then: no targets, only rewards."""
    cfg = Config(mode="grpo", lr=3e-4, generations=8, max_new_tokens=40, train_vision=True,
                 thinking_weight=0.0)
    policy = dataclasses.replace(tiny, model=new_policy(1).model)
    trainer, rows = dyme.make_trainer(cfg, policy), examples[:8]
    for step in range(25):
        dyme.sft_step(trainer, rows, step, 2e-3)
    log: list[float] = []
    while len(log) < 20 or len(log) < 80 and np.mean(log[-10:]) < np.mean(log[:10]) + 0.12:
        log.append(dyme.train_step(trainer, rows, len(log), 3e-4).metrics["accuracy"])
    start, end = np.mean(log[:10]), np.mean(log[-10:])
    assert 0.1 < start < 0.6
    assert end >= start + 0.12, len(log)


# ---- The run folder ------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: Patch) -> Path:
    """A folder for runs, and a small toy."""
    monkeypatch.setattr(toy, "SPLITS", {"train": (0, 16), "val": (16, 8), "test": (24, 8)})
    return tmp_path


def run(runs: Path, name: str, *flags: str) -> int:
    """Run dyme.py in this process; its exit code."""
    small = ["--prompts", "2", "--generations", "2", "--max-new-tokens", "8"]
    flags = ["--out", str(runs / name), *small, *flags]
    return run_folders.run_main(lambda: dyme.train(dyme.parse_config(flags)))


def without_times(path: Path) -> list[Row]:
    """The rows of a file, less what differs between runs of the same settings."""
    timed = ("seconds", "tokens_per_s", "peak")
    rows = files.read_jsonl(path)
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "checkpoint" / "model.safetensors")


def near(a: Path, b: Path) -> None:
    """Two runs have the same weights, up to rounding."""
    x, y = weights(a), weights(b)
    assert x.keys() == y.keys()
    for name in x:
        assert torch.allclose(x[name], y[name], rtol=0, atol=5e-5), name


def same_weights(a: Path, b: Path) -> bool:
    x, y = weights(a), weights(b)
    return x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)


WRITTEN = {"loss", "reward", "reward_thinking", "reward_format", "accuracy", "truncated",
           "memorized", "no_variance", "none_correct", "entropy", "grad_norm", "lr", "tokens",
           "target_length", "response_length", "seconds_sampling", "seconds_scoring",
           "seconds_update", "tokens_per_s", "peak_memory_gib"}


def test_a_run_folder_holds_what_it_says_and_evaluates(runs: Path, capsys: Capture) -> None:
    assert run(runs, "a", "--steps", "3") == 0
    out, log = capsys.readouterr()
    lines = [line for line in log.splitlines() if line.startswith("dyme ")]  # as it is no terminal
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    assert all(len(line) <= 80 for line in lines)
    assert "before" in out
    assert f"python eval.py {runs / 'a'}" in out
    metrics, samples = (files.read_jsonl(runs / "a" / f"{name}.jsonl")
                        for name in ("metrics", "samples"))
    assert len(metrics) == len(samples) == 3
    assert metrics[0].keys() >= WRITTEN
    assert samples[0]["responses"][0].keys() >= {"text", "r_a", "r_t", "advantage"}
    assert samples[0]["target"]
    assert AutoModelForImageTextToText.from_pretrained(runs / "a" / "checkpoint") is not None
    assert dyme.load_policy(str(runs / "a"), CPU).end_ids


# ---- Evaluation ----------------------------------------------------------------------------------


def test_vote_by_hand() -> None:
    def prediction(parsed: str | None, right: bool) -> Row:
        return {"parsed": parsed, "accuracy": right}

    groups = [[prediction("4", True), prediction("5", False), prediction("5", False)],
              [prediction("7", True), prediction(None, False), prediction("7", True)]]
    assert evaluation.vote(groups) == {"pass@3": 1.0, "majority@3": 0.5}
    for forms in (("B", "b", "C"), ("[22, 35]", "[22,35]", "[35, 22]"),
                  ("Cape Verde, 5", "Cape Verde, 5.", "5"), ("1,234", "1234", "5"),
                  ("[22,350]", "[22, 350]", "[22350]")):
        forms, marks = forms[::-1], (False, True, True)  # the wrong one first, where a tie goes
        group = [prediction(form, right) for form, right in zip(forms, marks, strict=True)]
        assert evaluation.vote([group]) == {"pass@3": 1.0, "majority@3": 1.0}


def test_samples_are_drawn_as_asked_and_of_the_test_split(
        tmp_path: Path, monkeypatch: Patch) -> None:
    asked: list[Any] = []

    def respond(policy: Policy, rows: list[Example], tokens: int, batch: int,
                *rest: Any, **_: Any) -> list[Row]:
        asked.append((rows[0].name, *rest))
        # A standard row that is wrong, and a new combination that is right.
        kinds = ["value", "new_equal_sum"]
        return [{"response": "", "parsed": "7", "accuracy": kind != "value", "source": kind}
                for kind in kinds for _ in range(rest[0] if rest else 1)]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "respond", respond)
    monkeypatch.setattr(evaluation.thinking, "summarise", lambda _: {"rows": 1})
    evaluation.main(["tiny", "--plain", "--samples", "2", "--temperature", "0.5", "--seed", "3",
                     "--limit", "1"])
    assert asked == [("toy test row 0",), ("toy test row 0", 2, 0.5, 3, dyme.PROMPT)]
    saved = json.loads((tmp_path / "runs" / "eval-tiny" / "evaluation.json").read_text())
    assert (saved["pass@2"], saved["majority@2"]) == (0, 0)  # of the rows that accuracy counts


def test_a_model_without_a_context_length_answers_in_1024_tokens(
        tmp_path: Path, monkeypatch: Patch, tiny: Policy) -> None:
    asked: list[int] = []

    def respond(policy: Policy, rows: list[Example], tokens: int, *_: Any, **__: Any) -> list[Row]:
        asked.append(tokens)
        return [thinking.judge(row, "Answer: 1", True) | {"length": 3} for row in rows]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "respond", respond)
    endless = dataclasses.replace(tiny, context=math.inf)
    monkeypatch.setattr(evaluation, "load_policy", lambda *_: endless)
    Path("rows.jsonl").write_text('{"question": "q", "answer": "1"}')
    evaluation.main(["tiny", "--plain", "--data", "rows.jsonl"])
    assert asked == [1024]


def evaluate(*arguments: str) -> int:
    """Run eval.py in this process; its exit code."""
    return run_folders.run_main(lambda: evaluation.main([*arguments]))


def test_figures_of_models_before_an_error_are_printed(
        tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_folders.run_main(lambda: evaluation.main(["runs", "--limit", "1"])) == 2
    assert capsys.readouterr().out == ""
    (tmp_path / "empty").mkdir()
    assert evaluate("tiny", "empty", "--limit", "1", "--max-new-tokens", "2") == 2
    out, err = capsys.readouterr()
    assert out.splitlines()[1].split()[:2] == ["tiny", "base"]
    assert "--model empty: cannot be loaded" in err
    assert "it has no config.json: it is neither a run nor a model" in err
    (tmp_path / "empty" / "metrics.jsonl").touch()
    assert evaluate("tiny", "--out", "empty") == 2
    assert "--out empty: holds another run" in capsys.readouterr().err


@slow
def test_several_runs_are_evaluated_in_a_table(runs: Path, capsys: Capture) -> None:
    for seed in ("0", "1"):
        assert run(runs, f"s{seed}", "--steps", "3", "--seed", seed) == 0
    assert evaluate("--model", str(runs / "s0"), str(runs / "s1"), "--samples", "2") == 0
    table = capsys.readouterr().out
    for words in ("2 seeds: mean", "pass@2", "valid_thinking", "accuracy_sum"):
        assert words in table
    rows = files.read_jsonl(runs / "s0" / "predictions.jsonl")
    assert [row["source"].startswith("new_") for row in rows] == [False] * 8 + [True] * 2
    last = (runs / "s0" / "predictions.jsonl").read_text()
    assert evaluate(str(runs / "s0"), "--best", "--limit", "2") == 0
    assert "s0 (best)" in capsys.readouterr().out
    assert (runs / "s0" / "predictions.jsonl").read_text() == last
    assert len(files.read_jsonl(runs / "s0" / "predictions-best.jsonl")) == 2
    best, final = (json.loads((runs / "s0" / f"evaluation{end}.json").read_text())["weights"]
                   for end in ("-best", ""))
    assert (best, final) == ("best", "checkpoint")
