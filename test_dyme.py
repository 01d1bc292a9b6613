"""Tests of dyme.py, eval.py and reward.py: numbers by hand, every trick against its plain version, learning.

On the CPU, offline, in minutes. Where ../shared is present, with the real SmolVLM processor and real charts.
"""

import contextlib
import dataclasses
import inspect
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import dyme
import eval as evaluation
import reward
from dyme import Config, Policy, Sequence
from reward import Example, verify
from support import (
    DivergedError,
    UserError,
    ablations,
    attention,
    data,
    files,
    memory,
    metrics,
    samples,
    thinking,
    toy,
    vision,
)
from support import runs as run_folders
from support.make_toy_base import new_policy
from support.rows import spread

SHARED = Path(__file__).resolve().parent.parent / "shared"
CPU = torch.device("cpu")
Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]
Row = dict[str, Any]


# ---- Rewards --------------------------------------------------------------------------------------


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
    ("500%", "5"), ("1000%", "10"), ("100%", "1"), ("1,2", "12"), ("10 of 20", "10%"),
    ("5/6", "5"), ("±5", "5"),
    ("1，234", "1234"), ("5，6", "5"), ("5 or 6", "5"), ("5, 6", "5"), ("5 more bars", "5"),
    ("5 apples", "5"),
    ("more than 5", "5"), ("5€", "$5"), ("20°F", "20°C"), (r"\frac{1}{2x}", r"\frac{1}{2}x"),
    ("1234", "(1,234)"),
    ("12345678901234567891", "12345678901234567890"), ("1e1000", "1e999"), ("inf", "1e999"),
    ("**", "*"),
    ("not left", "Left"), ("left right", "Left"), ("Yes and no", "Yes"), ("Yes, but no", "Yes"),
    ("No idea", "No"),
    ("A negative", "negative"), ("<span>", "<div>"), ("Cote", "Côte"),
])
def test_verify_never_forgives_a_wrong_value(answer: str, target: str) -> None:
    assert not verify(f"Answer: {answer}", Example("Which of the bars?", target)).correct


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
    assert verify("Answer: 12 because 5 + 7", example) == reward.Verdict(False, "12 because 5 + 7", True)
    assert reward.final_answer("x Answer: 3 Answer: 4") == "4" and reward.final_answer("just 5") == "just 5"


def test_thinking_f1_by_hand() -> None:
    assert reward.thinking_f1("red is 3\nAnswer: 9", "red is 4") == pytest.approx(2 / 3)  # 2 of 3 tokens, both ways
    assert reward.thinking_f1("red red", "red blue green") == pytest.approx(2 * 1 / 5)
    assert reward.thinking_f1("Answer: red", "red") == 0  # the answer is not thinking
    assert reward.thinking_f1("1,234", "1,234.5") == 0
    assert reward.thinking_f1("8 + 3 = 5", "8 - 3 = 5") == pytest.approx(4 / 5)  # operators are tokens


# ---- Advantages, switch, loss ---------------------------------------------------------------------


def test_group_advantages_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.3, 0.3, 0.3, 0.3], [2.0, 1.0, 1.0, 0.0]])
    advantages = dyme.group_advantages(rewards, eps=0.0)
    assert torch.allclose(advantages[0], torch.tensor([1.0, -1.0, -1.0, 1.0]))
    assert (advantages[1] == 0).all()  # exactly, not up to rounding
    assert torch.allclose(advantages[2], torch.tensor([1.0, 0.0, 0.0, -1.0]) * math.sqrt(2))  # population std
    released = ablations.released_advantages(rewards, torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]), 0.0)
    assert released[0, 0] == pytest.approx(math.sqrt(3) / 2) and (released[1:] == 0).all()  # all right: dropped
    assert dyme.group_advantages(rewards)[0, 0] == pytest.approx(0.5 / 0.5001)
    assert dyme.no_variance(rewards).tolist() == [False, True, False]


def test_the_switch_explores_if_any_response_is_right() -> None:
    correct = torch.tensor([[0.0, 0, 0], [0, 1, 0], [1, 1, 1]])
    assert dyme.choose_mode(correct).tolist() == [False, True, True]


def test_policy_loss_by_hand() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, -9.0], [-1.0, -3.0, -5.0]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    weights, explore = torch.tensor([0.5, 0.25]), torch.tensor([True, False])
    loss = dyme.policy_loss(logprobs, mask, weights, explore)
    assert loss.item() == pytest.approx(-0.5 * 1 + 0.25 * 3)  # rho = 1 for the sampled one, mean 3 for the target
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


def test_kl_estimate_is_zero_for_equal_models_and_unbiased() -> None:
    p, q = torch.tensor([0.7, 0.2, 0.1]).log(), torch.tensor([0.3, 0.3, 0.4]).log()
    assert (dyme.kl_estimate(p, p) == 0).all() and (dyme.kl_estimate(p, q) > 0).all()
    assert (p.exp() * dyme.kl_estimate(p, q)).sum() == pytest.approx((p.exp() * (p - q)).sum().item())


# ---- Rollout: the clever way against the plain one ------------------------------------------------

IMAGE = 5
TEXT = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": 2}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
              "patch_size": 8}
FAMILIES = ("idefics3", "smolvlm", "llava_onevision", "qwen2_5_vl")


def tiny_family(family: str) -> torch.nn.Module:
    """A random model of a family, in float64."""
    if family == "llava_onevision":
        settings = {"image_token_index": IMAGE, "image_grid_pinpoints": [[16, 16]], "vision_feature_layer": -1,
                        "vision_config": VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
                        "text_config": TEXT | {"model_type": "qwen2"}}
    elif family == "qwen2_5_vl":
        settings = {
            "image_token_id": IMAGE, "vision_start_token_id": 6, "vision_end_token_id": 7, "video_token_id": 8,
            "vision_config": {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32,
                               "patch_size": 8, "fullatt_block_indexes": [1], "window_size": 32},
            "text_config": TEXT | {"model_type": "qwen2_5_vl_text", "rope_parameters": {
                "rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}}
    else:
        settings = {"image_token_id": IMAGE, "scale_factor": 1, "vision_config": VISION,
                        "text_config": TEXT | {"model_type": "llama"}, "pad_token_id": 0}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **settings)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float64).eval()
    attention.use_grouped(model)
    return model


def family_inputs(family: str, text: list[int], seed: int) -> dict[str, Tensor]:
    """One prompt: an image, then text ids; what the family's processor would make of it."""
    generator = torch.Generator().manual_seed(seed)
    if family == "llava_onevision":
        pixels, count = {"pixel_values": (1, 2, 3, 16, 16)}, 10
    elif family == "qwen2_5_vl":
        pixels, count = {"pixel_values": (16, 3 * 2 * 8 * 8)}, 4
    else:
        pixels, count = {"pixel_values": (1, 1, 3, 16, 16)}, 4
    inputs = {k: torch.randn(shape, generator=generator, dtype=torch.float64) for k, shape in pixels.items()}
    marks = ([6], [7]) if family == "qwen2_5_vl" else ([], [])
    ids = torch.tensor([[9, *marks[0], *[IMAGE] * count, *marks[1], *text]])
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family == "llava_onevision":
        inputs["image_sizes"] = torch.tensor([[16, 16]])
    if family == "qwen2_5_vl":
        inputs |= {"image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": (ids == IMAGE).long()}
    return inputs


def pad_batch(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Batch prompts with padding on the left."""
    length = max(row["input_ids"].shape[1] for row in rows)
    return {key: torch.cat([F.pad(row[key], (length - row[key].shape[1], 0)) if key.endswith("ids") or "mask" in key
                            else row[key] for row in rows]) for key in rows[0]}


def plain_logprobs(model: torch.nn.Module, row: dict[str, Tensor], ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probs of one continuation by one forward pass over everything, without padding or cache."""
    length = row["input_ids"].shape[1]
    x = dict(row, input_ids=torch.cat([row["input_ids"], ids[None]], 1))
    x["attention_mask"] = torch.ones_like(x["input_ids"])
    if "mm_token_type_ids" in x:
        x["mm_token_type_ids"] = F.pad(x["mm_token_type_ids"], (0, len(ids)))
    config = model.config.get_text_config()
    config._attn_implementation = "sdpa"  # transformers' own attention
    logits = model(**x, use_cache=False).logits[0, length - 1:-1] / temperature
    config._attn_implementation = "grouped"
    return F.log_softmax(logits, -1).gather(1, ids[:, None]).squeeze(1)


def plain_loss(model: torch.nn.Module, prompts: list[dict[str, Tensor]], sequences: list[Sequence],
               temperature: float) -> Tensor:
    """The specification: Eq. 7-8 as written, a sequence at a time, without packing, cache or chunks."""
    loss = torch.zeros((), dtype=torch.float64)
    for sequence in sequences:
        prompt, ids = prompts[sequence.prompt], torch.tensor(sequence.ids)
        if sequence.explore:
            # Eq. 7: -E[rho A]; the ratio rho is 1, its gradient that of log p at the sampling temperature.
            logprobs = plain_logprobs(model, prompt, ids, temperature)
            rho = torch.exp(logprobs - logprobs.detach())
            loss = loss - sequence.weight * rho.mean()
        else:
            # Eq. 1: -E[log p(y | x)] of the target, at temperature 1.
            loss = loss - sequence.weight * plain_logprobs(model, prompt, ids).mean()
    return loss


@pytest.mark.parametrize("micro_batch", [3, 2, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_fast_loss_is_the_plain_one(family: str, micro_batch: int) -> None:
    model = tiny_family(family)
    prompts = [family_inputs(family, list(range(10, 13 + 2 * i)), i) for i in range(3)]
    sequences = [Sequence(0, [20, 21, 22, 2], 0.3, True), Sequence(0, [23, 24], -0.3, True),
                 Sequence(1, [25, 26, 27, 28, 29, 2], 1 / 3, False), Sequence(2, [30], 0.2, True)]
    policy = dyme.Policy(model, None, [2], 0, CPU)
    trainer = dyme.Trainer(Config(temperature=0.7), policy, None, torch.amp.GradScaler("cpu", enabled=False))
    batches = [pad_batch(prompts[i:i + micro_batch]) for i in range(0, 3, micro_batch)]
    loss = dyme.accumulate_gradients(trainer, batches, sequences)["loss"]
    fast = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected = plain_loss(model, prompts, sequences, 0.7)
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-6) and len(fast) > 20
    plain = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert fast.keys() == plain.keys() and all(torch.allclose(fast[n], plain[n], atol=1e-6) for n in fast)


@pytest.mark.parametrize("limit", [1024, 5, 0])  # a prompt's sequences in one packed row, or in several
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prompts_give_the_plain_logprobs_and_gradients(family: str, limit: int) -> None:
    model = tiny_family(family)
    rows = [family_inputs(family, [10, 11, 12], 1), family_inputs(family, [13, 14, 15, 16, 17, 18], 2)]
    ids = torch.randint(10, 60, (5, 6), generator=torch.Generator().manual_seed(3))
    owners, ones, lengths = [0, 0, 1, 1, 1], torch.ones(5, dtype=torch.float64), [6, 1, 4, 3, 6]
    sequences = [row[:n] for row, n in zip(ids.tolist(), lengths, strict=True)]
    prefix = dyme.encode_prefix(model, pad_batch(rows))
    shared, mask = dyme.completion_logprobs(model, prefix, owners, sequences, ones, limit)
    assert mask.sum(1).tolist() == lengths and not shared[mask == 0].any()
    shared = shared.double()  # logits are float32
    weights = torch.linspace(-1, 1, shared.numel(), dtype=torch.float64).view_as(shared)
    plain = torch.stack([F.pad(plain_logprobs(model, rows[p], torch.tensor(s)), (0, 6 - len(s)))
                         for p, s in zip(owners, sequences, strict=True)])
    assert torch.allclose(shared, plain, atol=1e-6)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad((x * weights).sum(), parameters, allow_unused=True) for x in (shared, plain)]
    pairs = [(a, b) for a, b in zip(*gradients, strict=True) if a is not None]
    assert len(pairs) > 20 and all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)


@pytest.mark.parametrize("family", FAMILIES)
def test_vision_once_changes_no_loss_and_no_connector_gradient(family: str) -> None:
    model = tiny_family(family)
    vision.freeze(model)
    batch = pad_batch([family_inputs(family, [10, 11], 1), family_inputs(family, [12, 13, 14], 2)])
    passes, results = [], []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
            module.register_forward_hook(lambda *_: passes.append(1))
    for context in (contextlib.nullcontext(), vision.once(model)):
        passes.clear()
        model.zero_grad()
        with context:
            with torch.no_grad():
                dyme.encode_prefix(model, batch)  # as for sampling
            loss = dyme.completion_logprobs(model, dyme.encode_prefix(model, batch), [0, 1],
                                            [[20, 21], [22, 23]], torch.ones(2))[0].sum()
            loss.backward()
        connector = [p.grad for n, p in model.named_parameters() if re.search("connector|projector|merger", n)]
        results.append((loss.item(), [g.clone() for g in connector if g is not None], len(passes)))
    (loss, grads, twice), (loss_once, grads_once, once) = results
    assert loss == loss_once and all(torch.equal(a, b) and a.abs().sum() > 0 for a, b in zip(grads, grads_once, strict=True))
    assert (twice, once) == (2, 2 if family == "qwen2_5_vl" else 1) and grads  # Qwen's connector is inside its tower
    assert not any("forward" in vars(tower) for tower in vision.towers(model))  # nothing is left behind


@pytest.mark.parametrize("family", FAMILIES)
def test_vision_cache_changes_no_logprob_and_encodes_an_image_once(family: str) -> None:
    model = tiny_family(family)
    vision.freeze(model)
    rows = [family_inputs(family, [10, 11], seed) for seed in range(3)]
    passes, store = [], {}
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
            module.register_forward_hook(lambda _, args, __: passes.append(len(args[0])))

    def logprobs(batch: list[int], *cache: Any) -> Tensor:
        with vision.once(model, *cache), torch.no_grad():
            prefix = dyme.encode_prefix(model, pad_batch([rows[i] for i in batch]))
            return dyme.completion_logprobs(model, prefix, [0, 1], [[20, 21], [22, 23]], torch.ones(2))[0]
    expected = [logprobs(batch) for batch in ([0, 1], [1, 2], [2, 0])]
    passes.clear()
    cached = [logprobs(batch, store, 1e-3) for batch in ([0, 1], [1, 2], [2, 0])]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(cached, expected, strict=True))
    tiles = passes[0] // 2  # of an image
    if family == "idefics3":
        assert passes == [2, 1] and len(store) == 3  # 0 and 1, then 2
    assert all(x.nbytes for x in store.values()) and tiles
    small = {}
    logprobs([0, 1], small, 1e-9)  # a budget too small for any image
    assert not small


@pytest.mark.parametrize("family", FAMILIES)
def test_one_step_trains_any_family_with_its_vision_tower_frozen(family: str) -> None:
    model = tiny_family(family).float()
    vision.freeze(model)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen and all("vision" in name or "visual" in name for name in frozen)
    assert any(re.search("connector|projector|merger", n) for n, p in model.named_parameters() if p.requires_grad)
    policy = dyme.Policy(model, None, [2], 0, CPU)
    batch = pad_batch([family_inputs(family, [10, 11], 1), family_inputs(family, [12, 13, 14], 2)])
    batch["pixel_values"] = batch["pixel_values"].float()
    rolled = dyme.rollout(policy, [batch], dyme.keyed_uniforms(0, 0, [0, 1], 3, 7), 1.0)
    responses = [ids[mask.bool()].tolist() for ids, mask in zip(rolled.ids, rolled.mask, strict=True)]
    sequences = [Sequence(0, ids, a / 6, True) for ids, a in zip(responses, (1.0, -2.0, 1.0), strict=False)]
    sequences.append(Sequence(1, [20, 21, 2], 0.5, False))
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    trainer = dyme.Trainer(Config(generations=3), policy, optimizer, torch.amp.GradScaler("cpu", enabled=False))
    result = dyme.accumulate_gradients(trainer, [batch], sequences)
    connector = [p.grad for n, p in model.named_parameters() if re.search("connector|projector|merger", n)]
    assert sum(g.abs().sum() for g in connector if g is not None) > 0
    assert dyme.apply_gradients(trainer, result["loss"], 0.01)["grad_norm"] > 0
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and not changed & frozen


@pytest.fixture(scope="module")
def tiny() -> Policy:
    """The toy's model and processor with random weights."""
    return new_policy(0)


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return toy.make_examples("train", "high")


def test_greedy_sampling_is_generate(tiny: Policy, examples: list[Example]) -> None:
    inputs = dyme.encode_prompts(tiny, examples[:6], room=20)

    def greedy(ends: list[int]) -> dyme.Rollout:
        return dyme.sample(tiny.model, [dyme.encode_prefix(tiny.model, inputs)], torch.zeros(6, 20), ends, tiny.pad_id, temperature=0.0)

    ends = [*tiny.end_ids, *greedy(tiny.end_ids).ids[[0, 1], [4, 9]].tolist()]  # so that responses end, at all lengths
    rolled = greedy(ends)
    assert 0 < rolled.finished.sum() <= 6 and rolled.mask.sum(1).unique().numel() > 1
    expected = tiny.model.generate(**inputs, do_sample=False, max_new_tokens=20, eos_token_id=ends, pad_token_id=tiny.pad_id)
    expected = expected[:, inputs["input_ids"].shape[1]:]
    assert torch.equal(rolled.ids, F.pad(expected, (0, rolled.ids.shape[1] - expected.shape[1])))
    for ids, mask, finished in zip(rolled.ids.tolist(), rolled.mask.tolist(), rolled.finished.tolist(), strict=True):
        last = next((i for i, token in enumerate(ids) if token in ends), None)
        assert finished == (last is not None) and sum(mask) == (last + 1 if finished else 20)  # the end is trained


def test_sampled_logprobs_and_entropy_are_a_fresh_forwards(tiny: Policy, examples: list[Example]) -> None:
    inputs = dyme.encode_prompts(tiny, examples[:3], room=12)
    rolled = dyme.rollout(tiny, [inputs], dyme.keyed_uniforms(0, 0, [0, 1, 2], 4, 12), 0.7)
    ids = [response.ids for response in dyme.decode(tiny, rolled)]
    plain = [(i, row) for i, row in enumerate(ids) if tiny.model.config.image_token_id not in row]
    assert len(plain) > 6  # the plain way cannot read a sampled <image>
    for i, row in plain:
        x = dyme.encode_prompts(tiny, [examples[i // 4]], room=12)
        length, sampled = x["input_ids"].shape[1], torch.tensor([row])
        x |= {"input_ids": torch.cat([x["input_ids"], sampled], 1), "attention_mask": torch.ones(1, length + len(row))}
        logits = tiny.model(**x).logits[0, length - 1:-1] / 0.7
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        assert torch.allclose(rolled.entropy[i, :len(row)], entropy, atol=1e-4)
        logprobs, _ = dyme.completion_logprobs(tiny.model, dyme.encode_prefix(tiny.model, inputs), [i // 4], [row],
                                               torch.tensor([0.7]))
        assert torch.allclose(logprobs[0], logits.log_softmax(-1).gather(1, sampled.T).squeeze(1), atol=1e-4)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_grouped_attention_is_transformers_own(family: str, dtype: torch.dtype | None) -> None:
    results = []
    for implementation in ("grouped", "sdpa"):
        model = tiny_family(family)
        model = model if dtype is None else model.float()
        rows = [family_inputs(family, [10, 11, 12], 1), family_inputs(family, [13, 14, 15, 16, 17, 18], 2)]
        inputs = {k: x.to(model.dtype) if x.is_floating_point() else x for k, x in pad_batch(rows).items()}
        model.config.get_text_config()._attn_implementation = implementation
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            hidden = model.base_model(**inputs).last_hidden_state[inputs["attention_mask"] == 1]
        (hidden.float() * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        results.append((hidden.detach().float().flatten(), torch.cat(gradients)))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() < (1e-6 if dtype is None else 0.02) * theirs.norm()


def test_requirements_ask_for_the_transformers_that_all_families_need() -> None:
    """5.24 is the first release whose caches have the name used here; from 5.23 on LLaVA's tower keeps one state."""
    required = (Path(dyme.__file__).parent / "requirements.txt").read_text()
    assert "transformers>=5.24,<6" in required and "torch>=2.11," in required
    for family in FAMILIES:
        model = tiny_family(family)
        assert "cache" in inspect.signature(model.base_model.forward).parameters
    model, kept = tiny_family("llava_onevision"), []
    tower = vision.towers(model)[0]
    tower.register_forward_hook(lambda *args: kept.extend(args[-1].hidden_states or ()))
    model.base_model(**family_inputs("llava_onevision", [10], 1))
    assert len({id(state) for state in kept if state is not None}) <= 1


def test_grouped_attention_by_hand() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, 5, 4), torch.randn(2, 2, 7, 4), torch.randn(2, 2, 7, 3)
    visible = torch.rand(2, 1, 5, 7) < 0.5
    visible[..., 0] = True
    scores = 0.3 * query @ key.repeat_interleave(3, dim=1).mT  # (B, H, Q, S): each key serves three heads
    expected = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value.repeat_interleave(3, dim=1)
    mask = attention.additive_mask(visible, SimpleNamespace(num_attention_heads=6, num_key_value_heads=2))
    out, _ = attention.grouped_attention(torch.nn.Module(), query, key, value, mask, scaling=0.3)
    assert torch.allclose(out, expected.transpose(1, 2), atol=1e-6)  # (B, Q, H, D)


def test_an_additive_mask_has_a_row_for_each_head_of_a_group_and_aligned_rows() -> None:
    visible = torch.tensor([[True, False, True], [True, True, False]])[None, None]  # (1, 1, Q = 2, S = 3)
    mask = attention.additive_mask(visible, SimpleNamespace(num_attention_heads=6, num_key_value_heads=2))
    assert mask.shape == (1, 1, 6, 3) and mask.stride(2) == 8  # H/G = 3 times both rows
    assert torch.equal(mask[0, 0] == 0, visible[0, 0].repeat(3, 1)) and mask.min() == torch.finfo(torch.float32).min


def test_no_second_copy_of_the_prompts_cache_is_kept_while_decoding(tiny: Policy, examples: list[Example]) -> None:
    batches = [dyme.encode_prompts(tiny, examples[i:i + 2], room=8) for i in (0, 2)]
    with torch.no_grad():
        prefixes = [dyme.encode_prefix(tiny.model, batch) for batch in batches]
    copies = [weakref.ref(x) for p in prefixes for layer in p.cache.layers for x in (layer.keys, layer.values)]
    alive = []

    def count(*_: Any) -> None:
        alive.append(sum(copy() is not None for copy in copies))

    hook = tiny.model.base_model.register_forward_pre_hook(count)
    with torch.no_grad():
        dyme.sample(tiny.model, prefixes, torch.rand(8, 8), [-1], 0, 1.0)
    hook.remove()
    assert len(copies) == 12 and alive == [0] * 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_samples_and_trains(family: str, dtype: torch.dtype) -> None:
    """What CUDA does, tried on the CPU: under autocast keys and values come in different precisions."""
    model = tiny_family(family).float()
    rows = [family_inputs(family, [10, 11, 12], 1), family_inputs(family, [13, 14], 2)]
    inputs = {k: x.float() if x.is_floating_point() else x for k, x in pad_batch(rows).items()}
    with torch.autocast("cpu", dtype=dtype):
        with torch.no_grad():
            merged = dyme.merge([dyme.encode_prefix(model, inputs)], 4, torch.arange(2))
            assert all(layer.keys.dtype == layer.values.dtype == dtype for layer in merged.cache.layers)
        rolled = dyme.sample(model, [dyme.encode_prefix(model, inputs)], torch.rand(4, 6), [-1], 0, 1.0)
        logprobs, mask = dyme.completion_logprobs(model, dyme.encode_prefix(model, inputs), [0, 0, 1, 1],
                                                  rolled.ids.tolist(), torch.ones(4))
    logprobs.mean().backward()
    exact, _ = dyme.completion_logprobs(model, dyme.encode_prefix(model, inputs), [0, 0, 1, 1], rolled.ids.tolist(),
                                        torch.ones(4))
    assert logprobs.dtype == torch.float32 and mask.all() and torch.allclose(logprobs, exact, atol=0.05)


def test_packing_by_hand() -> None:
    assert dyme.pack([0, 0, 0, 2], [3, 2, 3, 0], limit=5) == ([0, 0, 2], [0, 0, 1, 2], [0, 3, 0, 0])
    assert dyme.pack([1, 1], [9, 9], limit=5) == ([1, 1], [0, 1], [0, 0])  # too long for any row


def test_chunked_logprobs_and_their_gradients_are_those_of_one_chunk(tiny: Policy) -> None:
    torch.manual_seed(0)
    hidden, ids, temperature = torch.randn(7, 96, requires_grad=True), torch.arange(7), torch.linspace(0.5, 1.5, 7)
    results = []
    for chunk in (7, 3):
        logprobs = dyme.token_logprobs(tiny.model, hidden, ids, temperature, chunk)
        loss = (logprobs * torch.arange(7)).sum()
        results.append([logprobs, *torch.autograd.grad(loss, [hidden, tiny.model.lm_head.weight])])
    plain = (tiny.model.lm_head(hidden) / temperature[:, None]).log_softmax(1)[ids, ids]
    assert torch.allclose(results[0][0], plain, atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results, strict=True))


def test_draws_follow_the_distribution_and_depend_on_their_key_alone() -> None:
    logits = torch.tensor([0.5, 0.2, 0.3, 0.0]).log().expand(4, 4)
    tokens, entropy = dyme.draw(logits, torch.tensor([0.0, 0.49, 0.51, 0.9999999]), 1.0)
    assert tokens.tolist() == [0, 0, 1, 2]  # by the cumulated 0.5, 0.7, 1.0; never the impossible token
    assert entropy[0].item() == pytest.approx(-sum(p * math.log(p) for p in (0.5, 0.2, 0.3)))
    assert dyme.draw(logits[:1], torch.tensor([0.99]), 0.0)[0].item() == 0
    uniforms = dyme.keyed_uniforms(1, 2, [0, 1, 2], 4, 10)
    assert torch.equal(uniforms[4:8], dyme.keyed_uniforms(1, 2, [1], 4, 10))
    assert uniforms.unique().numel() == uniforms.numel()
    assert not torch.equal(uniforms, dyme.keyed_uniforms(1, 3, [0, 1, 2], 4, 10))


def test_samples_do_not_depend_on_the_batch(tiny: Policy, examples: list[Example]) -> None:
    def responses(chunks: list[list[int]]) -> list[list[int]]:
        inputs = [dyme.encode_prompts(tiny, [examples[i] for i in chunk], room=16) for chunk in chunks]
        uniforms = dyme.keyed_uniforms(0, 5, [*itertools.chain(*chunks)], 4, 16)
        return [response.ids for response in dyme.decode(tiny, dyme.rollout(tiny, inputs, uniforms, 1.0))]
    together = responses([[0, 1, 2, 3]])
    assert together == responses([[0], [1, 2], [3]])  # encoded in chunks
    assert together == responses([[0]]) + responses([[1, 2]]) + responses([[3]])


# ---- Prompts and targets --------------------------------------------------------------------------


def check_target(policy: Policy, example: Example) -> None:
    inputs = dyme.encode_prompts(policy, [example], room=0)
    prompt, response = dyme.PROMPT.format(question=example.question), reward.reference_response(example)
    target = dyme.target_ids(policy, example)
    full = policy.processor(text=[dyme.render(policy.processor, prompt, True, response)], images=[[example.image()]],
                            add_special_tokens=False).input_ids[0]
    assert inputs["input_ids"][0].tolist() + target == list(full)[:inputs["input_ids"].shape[1] + len(target)]
    assert target[-1] in policy.end_ids and not set(target[:-1]) & set(policy.end_ids)
    assert policy.tokenizer.decode(full[inputs["input_ids"].shape[1] + len(target):]).strip() == ""
    assert policy.tokenizer.decode(target, skip_special_tokens=True).strip() == response


def test_prompt_and_target_are_the_templates_full_rendering(tiny: Policy, examples: list[Example]) -> None:
    for example in examples[:10]:
        check_target(tiny, example)
    assert all(tiny.tokenizer.unk_token_id not in dyme.target_ids(tiny, e)
               for e in examples)


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
def test_the_real_smolvlm_processor(tmp_path: Path, examples: list[Example]) -> None:
    source = SHARED / "smolvlm-256m-instruct"
    model = SimpleNamespace(name_or_path="SmolVLM", config=AutoConfig.from_pretrained(source), eval=lambda: model,
                            generation_config=SimpleNamespace(eos_token_id=49279))
    policy = dyme.make_policy(model, AutoProcessor.from_pretrained(source), CPU, image_edge=512)
    assert policy.end_ids == [policy.tokenizer.convert_tokens_to_ids("<end_of_utterance>")]
    check_target(policy, examples[0])
    charts = data.load_data(str(SHARED / "chartqa-sample"), "train")[:2]
    inputs = dyme.encode_prompts(policy, charts, room=0)
    assert inputs["pixel_values"].shape[:2] == (2, 1)  # --image-edge 512 is one tile
    assert (inputs["attention_mask"][:, -1] == 1).all() and inputs["input_ids"][0, -1] == inputs["input_ids"][1, -1]


def test_a_prompt_longer_than_the_context_is_named(tiny: Policy, examples: list[Example]) -> None:
    with pytest.raises(UserError, match="toy train row 0: .* context of 512"):
        dyme.encode_prompts(tiny, examples[:1], room=500)


def test_a_trace_with_a_flag_of_its_own_still_gives_a_verifiable_target() -> None:
    example = Example("q", "7", trace="It is 7. Answer: 7")
    assert reward.reference_response(example) == "It is 7.\nAnswer: 7"
    assert verify(reward.reference_response(example), example).correct


def test_spread_takes_rows_from_all_over() -> None:
    assert spread(list(range(10)), 4) == [0, 2, 5, 7] and spread([1, 2], 5) == [1, 2]


def test_missing_template_and_missing_package_are_one_line(tiny: Policy, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="runs/nope: no such folder"):  # and not a hub id
        dyme.load_policy("runs/nope", CPU)
    with pytest.raises(UserError, match="runs/nope: no such folder"):
        evaluation.main(["--model", "runs/nope"])
    processor = new_policy(0).processor
    processor.chat_template = processor.tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        dyme.make_policy(tiny.model, processor, CPU)

    def fail(*_: Any, **__: Any) -> None:
        raise ImportError("Processor requires the Torchvision library")
    monkeypatch.setattr(AutoProcessor, "from_pretrained", fail)
    monkeypatch.setattr("support.hub.silence", lambda: "")  # no waiting for a network
    with pytest.raises(UserError, match="pip install torchvision$"):
        dyme.load_policy("Qwen2.5-VL-3B", CPU)


# ---- A training step ------------------------------------------------------------------------------


def take(trainer: dyme.Trainer, examples: list[Example], step: int, method: str, lr: float) -> tuple[Row, Row]:
    """A step by a method; its metrics and its row of samples.jsonl."""
    done = dyme.take_step(trainer, examples, step, method, lr)
    return done.metrics, samples.describe(step, done, trainer.policy.tokenizer)[0]


def make_trainer(policy: Policy, correct: list[list[int]] | None = None, **settings: Any) -> dyme.Trainer:
    """A trainer of a new tiny model; `correct` says which responses are right, r_t is then 0."""
    cfg = Config(lr=1e-3, prompts=4, generations=4, max_new_tokens=40, **settings)
    model = new_policy(0).model
    policy = dataclasses.replace(policy, model=model.eval())
    trainer = dyme.make_trainer(cfg, policy)

    def score(*args: Any) -> dyme.Groups:
        marks = torch.tensor(correct, dtype=torch.float32)
        return dataclasses.replace(dyme.score(*args), correct=marks, rewards=marks)
    if correct:
        trainer.score = score
    return trainer


CORRECT = [[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]]


def test_micro_batches_give_the_gradient_of_one_batch(tiny: Policy, examples: list[Example], monkeypatch: Patch) -> None:
    gradients, losses = [], []
    for micro_batch in (4, 3, 1):
        trainer = make_trainer(tiny, CORRECT, micro_batch=micro_batch)
        monkeypatch.setattr(trainer.optimizer, "zero_grad", lambda: None)
        metrics, _ = take(trainer, examples[:4], 0, "dyme", 1e-3)
        gradients.append([p.grad.clone() for p in trainer.policy.model.parameters() if p.grad is not None])
        losses.append(metrics["loss"])
        assert metrics["memorized"] == 0.25 and metrics["no_variance"] == 0.5 and metrics["none_correct"] == 0.25
    for other in gradients[1:]:
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients[0], other, strict=True))
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)


def test_a_dyme_step_is_eq_8_computed_the_plain_way(tiny: Policy, examples: list[Example], monkeypatch: Patch) -> None:
    trainer = make_trainer(tiny, CORRECT, temperature=0.7)
    model = trainer.policy.model
    monkeypatch.setattr(dyme, "apply_gradients", lambda *_: {})
    draw, image_id = dyme.draw, model.config.image_token_id
    monkeypatch.setattr(dyme, "draw", lambda logits, *a: draw(  # the plain way cannot read a sampled <image>
        logits.index_fill(1, torch.tensor([image_id]), -math.inf), *a))
    done = dyme.train_step(trainer, examples[:4], 0, 1e-3)
    got = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    assert done.explore.tolist() == [True, False, True, True]
    sequences = []
    for p, row in enumerate(CORRECT):
        rewards = np.array(row, dtype=float)
        for k, response in enumerate(done.groups.responses[p]):
            advantage = (rewards[k] - rewards.mean()) / (rewards.std() + 1e-4)
            if any(row):
                sequences.append(Sequence(p, response.ids, advantage / (4 * 4), True))
        if not any(row):
            sequences.append(Sequence(p, dyme.target_ids(trainer.policy, examples[p]), 1 / 4, False))  # full weight
    prompts = [dyme.encode_prompts(trainer.policy, [example], room=40) for example in examples[:4]]
    total = plain_loss(model, prompts, sequences, temperature=0.7)
    total.backward()
    expected = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, expected, strict=True))


def test_sequences_without_weight_cost_no_forward_pass(tiny: Policy, examples: list[Example], monkeypatch: Patch) -> None:
    trainer = make_trainer(tiny, [[1] * 4] * 4, micro_batch=2)
    calls = []
    monkeypatch.setattr(dyme, "completion_logprobs", lambda *a: calls.append(a))
    before = [p.clone() for p in trainer.policy.model.parameters()]
    metrics, group = take(trainer, examples[:4], 0, "dyme", 1e-3)
    assert not calls and metrics["empty_steps"] == 1 and metrics["no_variance"] == 1 and group["target"] is None
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.policy.model.parameters(), strict=True))
    assert not trainer.optimizer.state  # no optimiser step was made


def test_released_code_departs_as_documented(tiny: Policy, examples: list[Example], monkeypatch: Patch) -> None:
    weights, rewards = {}, np.array([0.0, 1.1, 1.2, 0.3])

    def score(*args: Any) -> dyme.Groups:
        marks = torch.tensor(CORRECT, dtype=torch.float32)
        rewards = marks + torch.tensor([0.0, 0.1, 0.2, 0.3])  # r_t varies, also where all are right
        return dataclasses.replace(dyme.score(*args), correct=marks, rewards=rewards)
    for released in (False, True):
        trainer = make_trainer(tiny, released_code=released)
        trainer.score = score
        monkeypatch.setattr(dyme, "accumulate_gradients", lambda t, i, s: weights.update(x=s) or {"loss": 0.0, "kl": 0.0})
        monkeypatch.setattr(dyme, "apply_gradients", lambda *_: {})
        take(trainer, examples[:4], 0, "dyme", 1e-3)
        target = [s.weight for s in weights["x"] if not s.explore]
        assert target == [0.25 / (4 if released else 1)]
        advantage = (rewards[0] - rewards.mean()) / (rewards.std(ddof=int(released)) + 1e-4)
        assert weights["x"][0].weight == pytest.approx(advantage / 16)
        assert {s.prompt for s in weights["x"]} == ({0, 1, 3} if released else {0, 1, 2, 3})  # all right: dropped
    assert dyme.parse_config(["--released-code"]).format_weight == 1
    # The baselines are rewarded by r_a alone, unless asked otherwise.
    for mode, weight in (("dyme", 1), ("grpo", 0), ("two-stage", 0)):
        assert dyme.parse_config(["--mode", mode]).thinking_weight == weight
    assert dyme.parse_config(["--mode", "grpo", "--thinking-weight", "1"]).thinking_weight == 1


def test_step_of_each_method(tiny: Policy, examples: list[Example]) -> None:
    for method, memorized in (("sft", 1.0), ("grpo", 0.0)):
        trainer = make_trainer(tiny)
        metrics, group = take(trainer, examples[:4], 0, method, 1e-3)
        assert metrics["memorized"] == memorized and math.isfinite(metrics["loss"])
        assert (method == "sft") == ("reward" not in metrics) and bool(group["responses"]) == (method == "grpo")
        json.dumps([metrics, group])


def test_kl_pulls_towards_the_reference(tiny: Policy, examples: list[Example]) -> None:
    trainer = make_trainer(tiny, mode="grpo", beta=0.0)
    trainer.cfg.beta, trainer.reference = 0.5, new_policy(0).model
    metrics, _ = take(trainer, examples[:2], 0, "grpo", 1e-2)
    assert metrics["kl"] == pytest.approx(0, abs=1e-6)  # the first step starts at the reference
    metrics, _ = take(trainer, examples[:2], 1, "grpo", 1e-2)
    assert metrics["kl"] > 0 and metrics["loss"] == pytest.approx(0.5 * metrics["kl"], abs=1e-5)  # the rest sums to 0
    inputs, sampled = dyme.encode_prompts(trainer.policy, examples[:2], room=40), [[20, 21, 22], [23, 24]]
    sequences = [Sequence(i, ids, 0.0, True, 0.5 / (4 * 2)) for i, ids in enumerate(sampled)]  # beta / (K P)
    ours, frozen = (dyme.sequence_logprobs(trainer.policy, model, inputs, [0, 1], sequences, 1.0)[0].detach()
                    for model in (trainer.policy.model, trainer.reference))
    k3 = dyme.kl_estimate(ours, frozen)
    total = dyme.accumulate_gradients(trainer, [inputs], sequences)
    assert total["kl"] == pytest.approx((k3[0].sum() / 3 + k3[1, :2].sum() / 2).item() / (4 * 2), rel=1e-5)  # K = 4


def test_the_gradient_is_clipped_and_the_learning_rate_is_the_steps(tiny: Policy, examples: list[Example]) -> None:
    trainer = make_trainer(tiny)
    trainer.optimizer = torch.optim.SGD(trainer.policy.model.parameters(), lr=1.0)
    before = [p.detach().clone() for p in trainer.policy.model.parameters()]
    metrics, _ = take(trainer, examples[:2], 0, "sft", 0.25)
    moved = [a - b for a, b in zip(before, trainer.policy.model.parameters(), strict=True)]
    assert metrics["grad_norm"] > 1 and torch.stack([m.norm() for m in moved]).norm().item() == pytest.approx(0.25, rel=1e-3)


def test_the_micro_batch_that_fits_by_hand(monkeypatch: Patch) -> None:
    asked = []

    def peak(prompts: int) -> float:  # 3 and 2 for each prompt
        asked.append(prompts)
        return 3.0 + 2.0 * prompts

    assert memory.largest(peak, most=32, available=19.0) == 8 and asked == [1, 2]  # 3 + 16 fits, 3 + 32 does not
    assert memory.largest(peak, 32, 18.9) == 4 and memory.largest(peak, 5, 1e9) == 4 and memory.largest(peak, 8, 0) == 1

    def too_much(prompts: int) -> float:
        if prompts > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1.0

    assert memory.largest(too_much, 32, 100.0) == 1


def test_the_memory_that_a_run_takes_later_by_hand() -> None:
    model = torch.nn.Linear(3, 2)  # 8 weights, of which the bias is frozen
    model.bias.requires_grad_(False)
    cfg = Config(mode="grpo", beta=0.1, vision_cache=1.0)
    assert memory.later_bytes(cfg, model, made=False, loaded=False) == 6 * 8 + 8 * 4 + 2**30
    assert memory.later_bytes(cfg, model, made=True, loaded=True) == 2**30
    assert memory.later_bytes(Config(), model, made=False, loaded=False) == 48


def test_rows_with_an_image_are_measured(tiny: Policy, examples: list[Example], monkeypatch: Patch) -> None:
    for name, value in (("reset_peak_memory_stats", None), ("max_memory_allocated", 1), ("mem_get_info", (2**40, 2**40)),
                        ("memory_reserved", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    trainer = make_trainer(tiny)
    trainer.policy = dataclasses.replace(tiny, device=torch.device("cuda"))
    text, tried = dataclasses.replace(examples[0], image=None), []
    size = memory.choose_micro_batch(lambda _, some: tried.append(some), trainer, [text, text, examples[1], examples[2]])
    assert size == 4 and tried[-1] == [examples[1], examples[2]]


def test_a_measured_micro_batch_is_kept_and_changes_no_result(runs: Path, monkeypatch: Patch) -> None:
    for size in (0, 2):
        trials = []

        def choose(trial: Any, trainer: dyme.Trainer, examples: list[Example]) -> int:
            trial(trainer, examples[:2])
            assert all(p.grad is None for p in trainer.policy.model.parameters())  # nor a zero one, for AdamW to decay
            trials.append(len(examples))
            return 2

        monkeypatch.setattr(memory, "choose_micro_batch", choose)
        out = f"m{size}"
        assert run(runs, out, "--steps", "2", "--prompts", "4", "--micro-batch", str(size)) == 0
        assert trials == ([16] if size == 0 else [])
        assert json.loads((runs / out / "config.json").read_text())["micro_batch"] == 2
    assert same_weights(runs / "m0", runs / "m2")  # the trials left nothing behind


def test_step_metrics_by_hand() -> None:
    zeros, correct = torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    sampled = [[dyme.Response([1, 2], "a", True), dyme.Response([3], "a", False)],
               [dyme.Response([4, 5, 6], "a", False), dyme.Response([7, 8], "a", False)]]
    groups = dyme.Groups(sampled, correct, zeros, zeros, correct, torch.tensor([[2.0, 1.0], [0.5, 0.5]]))
    totals = metrics.group_totals(groups, dyme.choose_mode(correct), dyme.no_variance(groups.rewards))
    totals |= metrics.target_totals([Sequence(1, [1, 2, 3], 0.5, False)]) | {"loss": 0.0, "kl": 0.0}
    step = metrics.averages(totals)
    assert (step["truncated"], step["entropy"], step["response_length"]) == (0.75, 0.5, 2.0)
    assert (step["accuracy"], step["none_correct"], step["no_variance"]) == (0.25, 0.5, 0.5)
    assert (step["memorized"], step["target_length"], step["tokens"]) == (0.5, 3.0, 8)


def test_ctrl_c_twice_ends_the_process_at_once_but_a_sigterm_after_it_does_not(monkeypatch: Patch, capsys: Capture) -> None:
    def leave(code: int) -> None:
        raise SystemExit(code)
    monkeypatch.setattr(os, "_exit", leave)  # which waits for no thread
    with run_folders.finish_step_on_interrupt() as received:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # as torchrun passes it on
        assert received == [signal.SIGINT, signal.SIGTERM]
        with pytest.raises(SystemExit, match="130"):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_draws_for_equal_prompts_differ_by_row(tiny: Policy, examples: list[Example]) -> None:
    drawn = dyme.respond(tiny, [examples[0]] * 4, 8, 2, draws=2)
    assert len({p["response"] for p in drawn}) > 4 and all(p["name"] == examples[0].name for p in drawn)


def test_a_gradient_that_is_not_finite_changes_nothing_and_ten_end_the_run(tiny: Policy, examples: list[Example], monkeypatch: Patch) -> None:
    trainer = make_trainer(tiny)
    before = [p.clone() for p in trainer.policy.model.parameters()]
    monkeypatch.setattr(dyme, "policy_loss", lambda logprobs, *_: logprobs.sum() * math.nan)
    for step in range(9):
        assert take(trainer, examples[:2], step, "sft", 1e-3)[0]["skipped_steps"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.policy.model.parameters(), strict=True))
    with pytest.raises(DivergedError, match="ten steps in a row"):
        take(trainer, examples[:2], 9, "sft", 1e-3)


def test_learning_rate_and_stages_by_hand() -> None:
    cfg = Config(mode="dyme", lr=1.0, steps=12, warmup=2)
    assert [round(dyme.schedule(cfg, s)[1], 4) for s in (0, 1, 2, 7, 11)] == [0.3333, 0.6667, 1.0, 0.5, 0.1]
    cfg = Config(mode="two-stage", lr=1.0, steps=10, sft_steps=4, warmup=0)
    assert [dyme.schedule(cfg, s) for s in (0, 3, 4, 9)] == [("sft", 1.0), ("sft", 0.25), ("grpo", 1.0), ("grpo", 1 / 6)]


@pytest.mark.parametrize("mode, sizes", [("dyme", [3] * 8), ("sft", [12] * 8), ("two-stage", [12, 12, *[3] * 6])])
def test_every_row_is_seen_once_an_epoch(mode: str, sizes: list[int]) -> None:
    cfg = Config(mode=mode, prompts=3, generations=4, steps=8, sft_steps=2)
    batches = [dyme.step_rows(cfg, step, count=7) for step in range(8)]
    assert [len(b) for b in batches] == sizes
    order = list(itertools.chain(*batches))
    for epoch in range(len(order) // 7):
        assert sorted(order[7 * epoch:7 * epoch + 7]) == list(range(7))
    assert order[:7] != order[7:14]


# ---- Learning -------------------------------------------------------------------------------------


def accuracy(policy: Policy, examples: list[Example]) -> float:
    return thinking.summarise(dyme.respond(policy, examples, 40, 64))["accuracy"]


def test_dyme_learns_by_memorizing_and_then_exploring(tiny: Policy, examples: list[Example]) -> None:
    """From random weights on eight rows: targets bring the first right answers, exploration takes over."""
    cfg = Config(lr=4e-3, prompts=8, generations=4, max_new_tokens=40, steps=60, warmup=2, train_vision=True)
    policy = dataclasses.replace(tiny, model=new_policy(1).model)
    trainer, rows = dyme.make_trainer(cfg, policy), examples[:8]
    before, log = accuracy(policy, rows), []
    for step in range(cfg.steps):
        log.append(take(trainer, rows, step, *dyme.schedule(cfg, step))[0])
    assert before == 0 and accuracy(policy, rows) >= 0.75
    late = {key: sum(row[key] for row in log[-10:]) / 10 for key in ("memorized", "accuracy")}
    assert log[0]["memorized"] == 1 and late["memorized"] < 0.4 and late["accuracy"] > 0.35


def test_exploration_alone_raises_accuracy(tiny: Policy, examples: list[Example]) -> None:
    """GRPO on a policy that is right now and then: no targets, only rewards."""
    cfg = Config(lr=3e-4, generations=8, max_new_tokens=40, train_vision=True, thinking_weight=0.0)
    policy = dataclasses.replace(tiny, model=new_policy(1).model)
    trainer, rows = dyme.make_trainer(cfg, policy), examples[:8]
    for step in range(25):
        take(trainer, rows, step, "sft", 2e-3)
    log = [take(trainer, rows, step, "grpo", 3e-4)[0]["accuracy"] for step in range(80)]
    start, end = sum(log[:10]) / 10, sum(log[-10:]) / 10
    assert 0.1 < start < 0.6 and end > start + 0.08


# ---- The run folder -------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: Patch) -> Path:
    """A folder for runs, and a small toy."""
    monkeypatch.setattr(toy, "SPLITS", {"train": (0, 16), "val": (16, 8), "test": (24, 8)})
    return tmp_path


def run(runs: Path, name: str, *flags: str) -> int:
    """Run dyme.py in this process; its exit code."""
    flags = ["--out", str(runs / name), "--prompts", "2", "--generations", "2", "--max-new-tokens", "8", *flags]
    return run_folders.run_main(lambda: dyme.train(dyme.parse_config(flags)))


def without_times(path: Path) -> list[Row]:
    rows = files.read_jsonl(path)
    return [{k: v for k, v in r.items() if not k.startswith(("seconds", "tokens_per_s", "peak"))} for r in rows]


def same_weights(a: Path, b: Path) -> bool:
    from safetensors.torch import load_file
    x, y = (load_file(run / "checkpoint" / "model.safetensors") for run in (a, b))
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


@pytest.mark.parametrize("mode", ["dyme", "two-stage"])
def test_a_killed_run_resumes_bit_exactly(runs: Path, monkeypatch: Patch, mode: str, capsys: Capture) -> None:
    flags = ["--mode", mode, "--sft-steps", "3", "--steps", "6", "--save-every", "2", "--eval-every", "2"]
    assert run(runs, "whole", *flags) == 0
    real = dyme.train_step

    def killed(trainer: dyme.Trainer, examples: list[Example], step: int, *rest: Any) -> tuple[Row, Row]:
        if step == 5:
            raise SystemError  # stands in for a kill: step 4 is logged, the checkpoint is of step 4
        return real(trainer, examples, step, *rest)
    monkeypatch.setattr(dyme, "train_step", killed)
    with pytest.raises(SystemError):
        run(runs, "killed", *flags)
    with (runs / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # and a line cut short
    monkeypatch.setattr(dyme, "train_step", real)
    assert run(runs, "killed", "--resume") == 0
    assert same_weights(runs / "whole", runs / "killed")
    for file in ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl"):
        assert without_times(runs / "whole" / file) == without_times(runs / "killed" / file)
    assert [r["step"] for r in files.read_jsonl(runs / "killed" / "metrics.jsonl")] == list(range(6))
    assert run(runs, "killed", "--resume") == 0  # a finished run has nothing left to do


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(runs: Path, monkeypatch: Patch, capsys: Capture) -> None:
    flags = ["--steps", "4", "--eval-every", "0", "--save-every", "0"]
    assert run(runs, "whole", *flags) == 0
    real = dyme.train_step

    def interrupted(trainer: dyme.Trainer, examples: list[Example], step: int, *rest: Any) -> tuple[Row, Row]:
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(trainer, examples, step, *rest)
    monkeypatch.setattr(dyme, "train_step", interrupted)
    assert run(runs, "stopped", *flags) == 130
    assert f"--resume --out {runs / 'stopped'}" in capsys.readouterr().out
    assert len(files.read_jsonl(runs / "stopped" / "metrics.jsonl")) == 2
    monkeypatch.setattr(dyme, "train_step", real)
    assert run(runs, "stopped", "--resume") == 0 and same_weights(runs / "whole", runs / "stopped")


def test_a_crash_between_the_two_moves_of_a_save_loses_nothing(runs: Path, capsys: Capture) -> None:
    assert run(runs, "a", "--steps", "2") == 0
    (runs / "a" / "checkpoint").rename(runs / "a" / "checkpoint.old")
    assert run(runs, "a", "--resume") == 0
    assert (runs / "a" / "checkpoint" / "training_state.pt").exists()


def test_a_run_folder_holds_what_it_says_and_evaluates(runs: Path, capsys: Capture) -> None:
    assert run(runs, "a", "--steps", "3") == 0
    out, log = capsys.readouterr()
    lines = [line for line in log.splitlines() if line.startswith("dyme ")]  # one per step, as it is no terminal
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"] and all(len(line) <= 80 for line in lines)
    assert "before" in out and f"python eval.py {runs / 'a'}" in out
    metrics, samples = (files.read_jsonl(runs / "a" / f"{name}.jsonl") for name in ("metrics", "samples"))
    wanted = {"loss", "reward", "reward_thinking", "reward_format", "accuracy", "truncated", "memorized", "no_variance",
              "entropy", "grad_norm", "lr", "response_length", "seconds_sampling", "seconds_scoring", "seconds_update",
              "tokens_per_s", "peak_memory_gib"}
    assert wanted <= metrics[0].keys() and len(metrics) == len(samples) == 3
    assert {"text", "r_a", "r_t", "advantage"} <= samples[0]["responses"][0].keys() and samples[0]["target"]
    assert AutoModelForImageTextToText.from_pretrained(runs / "a" / "checkpoint") is not None
    assert run(runs, "b", "--steps", "3", "--seed", "1") == 0
    assert run_folders.run_main(lambda: evaluation.main(["--model", str(runs / "a"), str(runs / "b"), "--samples", "2"])) == 0
    table = capsys.readouterr().out
    assert "2 seeds: mean" in table and "pass@2" in table and "valid_thinking" in table and "accuracy_sum" in table
    assert len(files.read_jsonl(runs / "a" / "predictions.jsonl")) == 8
    assert run_folders.run_main(lambda: evaluation.main([str(runs / "a"), "--best", "--limit", "2"])) == 0
    assert json.loads((runs / "a" / "evaluation.json").read_text())["weights"] == "best"


# ---- Several processes ----------------------------------------------------------------------------

DRIVER = """
import dataclasses, os, sys
import dyme
from support import runs, toy
from support import UserError
toy.SPLITS = {"train": (0, 16), "val": (16, 7), "test": (24, 8)}
verify, accumulate, calls = dyme.verify, dyme.accumulate_gradients, []

def mixed(text, example, finished):  # so that some prompts explore and others memorize
    return dataclasses.replace(verify(text, example, finished), correct=(len(text) + len(example.question)) % 4 == 0)

def breaking(*args):
    calls.append(1)
    if len(calls) == 3 and os.environ.get("RANK") == "1" and "breaks" in sys.argv:
        raise UserError("row 7: is broken")
    return accumulate(*args)

dyme.verify, dyme.accumulate_gradients = mixed, breaking
flags = "--steps 3 --prompts 5 --micro-batch 2 --generations 4 --max-new-tokens 12 --eval-every 2".split()
sys.argv[1:] = [*flags, *sys.argv[1:]] if "--resume" not in sys.argv else sys.argv[1:]
sys.exit(runs.run_main(dyme.main))
"""


def start(runs: Path, processes: int, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run the driver in one process, or in several by torchrun; the finished process."""
    (runs / "driver.py").write_text(DRIVER)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    here = {"PYTHONPATH": str(Path(dyme.__file__).parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *launch, "driver.py", *flags], cwd=runs, env=os.environ | here, text=True,
                          capture_output=True, timeout=120, check=False)


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "checkpoint" / "model.safetensors")


@pytest.mark.parametrize("mode", ["dyme", "sft"])
def test_two_processes_train_as_one(tmp_path: Path, mode: str) -> None:
    for name, processes in (("one", 1), ("two", 2)):
        assert start(tmp_path, processes, "--out", name, "--mode", mode).returncode == 0
    one, two = (files.read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 3
    if mode == "dyme":
        assert 0 < np.mean([row["memorized"] for row in one]) < 1
    for a, b in zip(one, two, strict=True):
        assert {key for key in a if a[key] is None} == {key for key in b if b[key] is None}
        compared = [key for key in a if not key.startswith(("seconds", "tokens_per_s", "peak", "method")) and a[key] is not None]
        assert [b[key] for key in compared] == pytest.approx([a[key] for key in compared], rel=1e-4)
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert a.keys() == b.keys() and all(torch.allclose(a[name], b[name], rtol=0, atol=5e-5) for name in a)
    held_out = [(tmp_path / name / "held-out-3.jsonl").read_text() for name in ("one", "two")]
    assert held_out[0] == held_out[1] and held_out[0].count("\n") == 7  # every row once, in order


def test_two_processes_evaluate_as_one(tmp_path: Path) -> None:
    program = [str(Path(evaluation.__file__)), "tiny", "--limit", "7", "--samples", "2", "--device", "cpu", "--out"]
    results = []
    for name, launcher in (("one", []), ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"])):
        done = subprocess.run([sys.executable, *launcher, *program, str(tmp_path / name)], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.count("tiny") == 1, done.stderr  # one table
        results.append((tmp_path / name / "predictions.jsonl").read_text())
    assert results[0] == results[1] and results[0].count("\n") == 7


def test_an_error_in_one_process_ends_all_and_another_number_of_them_resumes(tmp_path: Path) -> None:
    broken = start(tmp_path, 2, "--out", "breaks")
    assert broken.returncode == 1 and "error: row 7: is broken" in broken.stderr and "Traceback" not in broken.stdout
    assert len(files.read_jsonl(tmp_path / "breaks" / "metrics.jsonl")) == 2
    assert start(tmp_path, 1, "--out", "breaks", "--resume").returncode == 0
    assert start(tmp_path, 1, "--out", "whole").returncode == 0
    a, b = weights(tmp_path / "breaks"), weights(tmp_path / "whole")
    assert all(torch.allclose(a[name], b[name], rtol=0, atol=5e-5) for name in a)


# ---- Evaluation and bad input ---------------------------------------------------------------------
def test_vote_by_hand() -> None:
    def prediction(parsed: str | None, strict: bool) -> Row:
        return {"parsed": parsed, "accuracy": strict}
    groups = [[prediction("4", True), prediction("5", False), prediction("5", False)],
              [prediction("7", True), prediction(None, False), prediction("7", True)]]
    assert evaluation.vote(groups) == {"pass@3": 1.0, "majority@3": 0.5}
    for forms in (("B", "b", "C"), ("[22, 35]", "[22,35]", "[35, 22]"), ("Cape Verde, 5", "Cape Verde, 5.", "5")):
        group = [prediction(form, right) for form, right in zip(forms, (True, True, False), strict=True)]
        assert evaluation.vote([group]) == {"pass@3": 1.0, "majority@3": 1.0}


@pytest.mark.parametrize("flags, says", [
    (["--bogus"], "--bogus"), (["--temperatur", "1"], "did you mean --temperature?"),
    (["--model", "SmolVLM-256M"], "--model SmolVLM-256M: say with --data"), (["--mode", "ppo"], "invalid choice: 'ppo'"),
    (["--generations", "1"], "at least 2"), (["--generations", "9999999999"], "tokens a step"),
    (["--data", "nowhere"], "--data nowhere"), (["--data", "missing.json", "--model", str(toy.BASE)], "missing.json"),
    (["--data", "chartqa", "--model", "SmolVLM-265M"], "--model SmolVLM-265M: no such folder"),
    (["--steps", "0"], "--steps 0"), (["--lr", "nan"], "--lr nan"), (["--beta", "0.1"], "--beta"),
    (["--hints", "x"], "--hints"), (["--no-checker"], "--helper-url"),
    (["--helper-url", "localhost:1", "--helper-model", "m"], "must begin with http"), (["--switch", "budget:7"], "--prompts 8"),
    (["--resume"], "is not a run folder"), (["--device", "cuda:99"], "--device cuda:99"),
    (["--mode", "two-stage", "--sft-steps", "9", "--steps", "9"], "--sft-steps 9"), (["--prompts", "x"], "--prompts"),
    (["--model", "tiny", "--data", "chartqa"], "--data chartqa"), (["--temperature", "0"], "--temperature"),
    (["--model", "nowhere/nothing", "--data", "toy", "--steps", "1"], "--model nowhere/nothing"),
])
def test_bad_input_is_one_line_and_exit_code_2(runs: Path, flags: list[str], says: str, capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no waiting for a network
    code = run_folders.run_main(lambda: dyme.train(dyme.parse_config(["--out", str(runs / "x"), *flags])))
    error = capsys.readouterr().err.strip()
    assert code == 2 and says in error and error.startswith("error: ") and "\n" not in error


def test_an_existing_run_is_not_touched_unless_asked(runs: Path, capsys: Capture) -> None:
    assert run(runs, "a", "--steps", "1") == 0
    before = (runs / "a" / "metrics.jsonl").read_text()
    assert run(runs, "a", "--steps", "1") == 2 and "--overwrite" in capsys.readouterr().err
    assert run(runs, "a", "--resume", "--overwrite") == 2 and "leave out --overwrite" in capsys.readouterr().err
    assert run(runs, "a", "--resume", "--lr", "0.5") == 2 and "--lr 0.5" in capsys.readouterr().err
    assert (runs / "a" / "metrics.jsonl").read_text() == before
    assert run(runs, "a", "--steps", "2", "--overwrite") == 0 == run(runs, "a", "--resume")
    (runs / "a" / "my-rows.jsonl").write_text("{}")
    shutil.rmtree(runs / "a" / "checkpoint")  # nothing to go on from: nothing may be lost
    metrics = (runs / "a" / "metrics.jsonl").read_text()
    assert run(runs, "a", "--resume") == 2 and "has no checkpoint to go on from" in capsys.readouterr().err
    assert (runs / "a" / "metrics.jsonl").read_text() == metrics
    assert run(runs, "a", "--steps", "1", "--overwrite") == 0 and (runs / "a" / "my-rows.jsonl").exists()
    (runs / "mine").mkdir()
    (runs / "mine" / "thesis.txt").write_text("years of work")
    assert run(runs, "mine", "--overwrite") == 2 and (runs / "mine" / "thesis.txt").exists()
    shutil.copytree(toy.BASE, runs / "base")
    base = (runs / "base" / "config.json").read_text()  # a model directory is not a run
    assert run(runs, "base", "--overwrite") == 2 == run(runs, "base", "--resume")
    assert (runs / "base" / "config.json").read_text() == base
    (runs / "file").write_text("")
    assert run(runs, "file") == 2


def test_an_image_that_breaks_mid_run_costs_no_finished_step(runs: Path, monkeypatch: Patch, capsys: Capture) -> None:
    rows = []
    for i in range(12):
        image = io.BytesIO()
        toy.make_examples("train")[i].image().save(image, "PNG")
        (runs / f"{i}.png").write_bytes(image.getvalue()[:-60] if i == 3 else image.getvalue())  # header is fine
        rows.append({"question": f"Which bar is the tallest? {i}", "answer": "red", "image": f"{i}.png"})
    (runs / "rows.json").write_text(json.dumps(rows))
    base = toy.BASE
    flags = ["--model", str(base), "--data", str(runs / "rows.json"), "--steps", "8", "--micro-batch", "2"]
    assert run(runs, "a", *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "rows.json row 4: the image 3.png is missing or unreadable" in error
    done = len(files.read_jsonl(runs / "a" / "metrics.jsonl"))
    state = torch.load(runs / "a" / "checkpoint" / "training_state.pt", weights_only=True)
    assert state["step"] == done


def test_running_out_of_memory_says_which_flags_lower_it(capsys: Capture) -> None:
    def fail() -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    assert run_folders.run_main(fail) == 2 and "--micro-batch" in capsys.readouterr().err


def test_a_line_separator_in_a_question_breaks_no_file(runs: Path, capsys: Capture) -> None:
    row = {"question": "Which bar\u2028 is the tallest?", "answer": "red"}
    (runs / "rows.jsonl").write_text("\n".join(json.dumps(row | {"question": f"{row['question']} {i}"}, ensure_ascii=False)
                                               for i in range(12)))
    base = toy.BASE
    assert run(runs, "a", "--model", str(base), "--data", str(runs / "rows.jsonl"), "--steps", "2") == 0
    assert len(files.read_jsonl(runs / "a" / "samples.jsonl")) == 2 and run(runs, "a", "--resume") == 0
    assert run_folders.run_main(lambda: evaluation.main(["--model", str(runs / "a"), "--max-new-tokens", "8"])) == 0
    assert len(files.read_jsonl(runs / "a" / "predictions.jsonl")) == 1  # the held-back tenth, not the training rows
    again = ["--model", str(runs / "a"), "--max-new-tokens", "8", "--data", str(runs / "a" / ".." / "rows.jsonl")]
    assert run_folders.run_main(lambda: evaluation.main(again)) == 0 and "tested on all" not in capsys.readouterr().err
    assert len(files.read_jsonl(runs / "a" / "predictions.jsonl")) == 1  # nor under another name
    shutil.rmtree(runs / "a" / "checkpoint")
    assert run_folders.run_main(lambda: evaluation.main(again)) == 2 and "has no checkpoint yet" in capsys.readouterr().err
