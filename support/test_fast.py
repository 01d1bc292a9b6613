"""support/fast.py equals dyme.py: log-probs, gradients, samples, runs; four families, text."""

import contextlib
import copy
import dataclasses
import runpy
import signal
import timeit
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import dyme
from dyme import Policy, Response, Sequence
from reward import Example
from support import fast, parallel, settings, toy
from support.make_toy_base import new_policy
from test_dyme import (
    CONNECTOR,
    CORRECT,
    CPU,
    EACH_FAMILY,
    PROMPTS,
    SEQUENCES,
    TEXT,
    Capture,
    Inputs,
    Patch,
    assert_close,
    bare_policy,
    family_inputs,
    gradients,
    make_trainer,
    near,
    pad_batch,
    run,
    summed,
    tiny_family,
)

KINDS = [*EACH_FAMILY, "llama"]  # the last one is text only
half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def text_model(kind: str, **settings: Any) -> torch.nn.Module:
    """A random text-only model."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(TEXT | settings))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for p in model.parameters():
        if p.dim() > 1:  # as drawn they are so small that attention hardly matters
            torch.nn.init.normal_(p, std=0.3)
    return model


def make_model(kind: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    return text_model(kind).to(dtype) if kind == "llama" else tiny_family(kind, dtype)


def make_prompts(kind: str, dtype: torch.dtype = torch.float64) -> list[Inputs]:
    """Three prompts of different lengths."""
    if kind != "llama":
        return [family_inputs(kind, text, i, dtype) for i, text in enumerate(PROMPTS)]
    ids = [torch.tensor([text]) for text in PROMPTS]
    return [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids]


def both(kind: str) -> tuple[Policy, Policy]:
    """The same policy plain and sped up."""
    plain, faster = bare_policy(make_model(kind)), fast.speed_up(bare_policy(make_model(kind)))
    assert faster.logprobs is fast.sequence_logprobs
    return plain, faster


# ---- Log-probs and gradients ---------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [3, 2, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_its_gradient_are_the_plain_ones(kind: str, micro_batch: int) -> None:
    prompts, results = make_prompts(kind), []
    batches = [pad_batch(prompts[i:i + micro_batch]) for i in range(0, 3, micro_batch)]
    for policy in both(kind):
        results.append(summed(policy, batches, SEQUENCES, temperature=0.7))
    (loss, expected), (fast_loss, ours) = results
    assert fast_loss == pytest.approx(loss, abs=1e-6)
    assert len(ours) > 10
    assert_close(ours, expected, 1e-6)


@pytest.mark.parametrize("limit", [1024, 5, 0])  # a prompt's sequences in one row, or several
@pytest.mark.parametrize("kind", KINDS)
def test_packed_log_probs_and_their_gradients_are_the_plain_ones(
        kind: str, limit: int, monkeypatch: Patch) -> None:
    ids = torch.randint(10, 60, (5, 6), generator=torch.Generator().manual_seed(3))
    ids[3:, :3] = ids[2, :3]  # they begin alike
    owners, lengths, results, pack = [0, 0, 1, 1, 1], [6, 1, 4, 3, 6], [], fast.pack
    sequences = [Sequence(0, row[:n].tolist(), 0, True)
                 for row, n in zip(ids, lengths, strict=True)]
    monkeypatch.setattr(fast, "pack", lambda *args: pack(*args[:2], limit or args[2]))
    plain, faster = both(kind)
    inputs = pad_batch(make_prompts(kind)[:2])
    expected, mask = dyme.sequence_logprobs(plain, plain.model, inputs, owners, sequences, 0.7)
    ours, our_mask = fast.sequence_logprobs(faster, faster.model, inputs, owners, sequences, 0.7)
    assert torch.equal(mask, our_mask)
    assert mask.sum(1).tolist() == lengths
    for policy, logprobs in ((plain, expected), (faster, ours)):
        (logprobs * torch.linspace(-1, 1, 30).view(5, 6)).sum().backward()
        results.append(gradients(policy.model))
    assert torch.allclose(ours, expected, atol=1e-5)
    assert_close(*results, 1e-5)


def test_packing_by_hand() -> None:
    sequences = [[21, 22, 23], [11, 12, 13, 14], [11, 12, 15, 16], [31, 32, 33, 34, 35],
                 [31, 41], [51], [11, 12, 13, 19]]
    row_prompts, rows, states = fast.pack([0, 0, 0, 0, 2, 3, 0], sequences, limit=6)
    assert row_prompts == [0, 0, 2, 3]
    # 11 12 13 stand once; 15 follows 12; 21 is a tree of its own. Last tokens are not fed.
    assert rows == [
        ([11, 12, 13, 15, 21, 22], [0, 1, 2, 2, 0, 1], [4, 4, 3, 4, 6, 6]),
        ([31, 32, 33, 34], [0, 1, 2, 3], [4, 4, 4, 4]), ([31], [0], [1]), ([], [], [])]
    assert states == [(0, [0, 5, 6]), (0, [0, 1, 2, 3]), (0, [0, 1, 2, 4]), (1, [0, 1, 2, 3, 4]),
                      (2, [0, 1]), (3, [0]), (0, [0, 1, 2, 3])]
    long = [[*range(10)], [*range(1, 11)], [*range(5)]]  # longer than the limit: one in a row
    assert [len(ids) for ids, *_ in fast.pack([1, 1, 1], long, limit=5)[1]] == [9, 9]


def test_equal_beginnings_are_run_once_and_their_gradients_add_up() -> None:
    sampled = [[20, 21, 22, 23], [20, 21, 22, 23], [20, 21, 25], [20, 30, 31, 32], [20, 21, 22]]
    sequences = [Sequence(0, ids, 0, True) for ids in sampled]
    sequences += [Sequence(0, [20, 21, 22, 23], 0, False)]  # a target is scored at temperature 1
    inputs = pad_batch(make_prompts("idefics3")[:1])
    results, fed = [], []
    plain, faster = both("idefics3")
    for policy in (plain, faster):
        hook = policy.model.base_model.register_forward_pre_hook(
            lambda _, __, kwargs: fed.append(kwargs["input_ids"].numel()), with_kwargs=True)
        logprobs, mask = policy.logprobs(policy, policy.model, inputs, [0] * 6, sequences, 0.7)
        (logprobs * torch.linspace(-1, 2, 24).view(6, 4)).sum().backward()
        results.append([logprobs, mask, gradients(policy.model)])
        hook.remove()
    assert fed[1] == 6 * 3 and fed[3] == 5  # 20 21 22 and 30 31
    assert torch.equal(results[0][1], results[1][1])
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
    assert_close(results[0][2], results[1][2], 1e-5)


def test_chunked_log_probs_and_their_gradients_are_those_of_one_chunk(tiny: Policy) -> None:
    torch.manual_seed(0)
    hidden, ids = torch.randn(7, 96, requires_grad=True), torch.arange(7)
    temperature, results = torch.linspace(0.5, 1.5, 7), []
    for chunk in (7, 3):
        logprobs = fast.token_logprobs(tiny.model, hidden, ids, temperature, chunk)
        loss = (logprobs * torch.arange(7)).sum()
        results.append([logprobs, *torch.autograd.grad(loss, [hidden, tiny.model.lm_head.weight])])
    plain = (tiny.model.lm_head(hidden) / temperature[:, None]).log_softmax(1)[ids, ids]
    assert torch.allclose(results[0][0], plain, atol=1e-6)
    for one, several in zip(*results, strict=True):
        assert torch.allclose(one, several, atol=1e-5)


# ---- Sampling ------------------------------------------------------------------------------------


def assert_same(ours: list[Response], expected: list[Response]) -> None:
    assert [y.ids for y in ours] == [y.ids for y in expected]
    assert [y.finished for y in ours] == [y.finished for y in expected]
    assert [y.text for y in ours] == [y.text for y in expected]
    entropies = pytest.approx([y.entropy for y in expected], abs=1e-4)
    assert [y.entropy for y in ours] == entropies


@pytest.mark.parametrize("temperature", [0.7, 0.0])
@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_the_plain_ones(kind: str, temperature: float) -> None:
    prompts, results = make_prompts(kind), []
    batches = [pad_batch(prompts[:2]), prompts[2]]
    uniforms = dyme.keyed_uniforms(0, 0, range(3), 4, 40)
    for policy in both(kind):
        policy = dataclasses.replace(policy, end_ids=[2, *range(40, 44)])  # so that some end
        results.append(policy.rollout(policy, batches, uniforms, 4, temperature))
    expected, ours = results
    assert_same(ours, expected)
    if temperature:
        assert len({len(y.ids) for y in ours}) > 3


@pytest.mark.parametrize("kind", KINDS)
def test_attention_wider_than_the_tokens_so_far_samples_the_same(
        kind: str, monkeypatch: Patch) -> None:
    """As on a GPU, where it is widened by 128 tokens at a time: what is empty yet is not seen."""
    inputs, widen = pad_batch(make_prompts(kind)), fast.Decoder.widen
    uniforms = dyme.keyed_uniforms(0, 0, range(3), 4, 24)
    monkeypatch.setattr(fast.Decoder, "widen", lambda self, _: widen(self, 128))
    expected, ours = (p.rollout(p, [inputs], uniforms, 4, 1.0) for p in both(kind))
    assert_same(ours, expected)


def test_sampling_ends_with_the_last_response() -> None:
    inputs = pad_batch(make_prompts("llama"))
    for policy in both("llama"):
        policy, passes = dataclasses.replace(policy, end_ids=[*range(60)]), []
        base = policy.model.base_model
        base.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        responses = policy.rollout(policy, [inputs], torch.rand(6, 30), 2, 1.0)
        assert [len(y.ids) for y in responses] == [1] * 6
        assert len(passes) == 1  # that of the prompt


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_whose_responses_have_ended_are_left_out(kind: str) -> None:
    """So one that rambles on does not hold its batch; the samples stay the plain ones."""
    plain, faster = both(kind)
    inputs, rows = pad_batch(make_prompts(kind)), list[int]()
    uniforms = dyme.keyed_uniforms(0, 0, range(3), 2, 24)
    # All that the first prompt's responses do not say ends a response.
    endless = dataclasses.replace(plain, end_ids=[-1])
    said = plain.rollout(endless, [inputs], uniforms, 2, 1.0)
    size = plain.model.config.get_text_config().vocab_size
    ends = [i for i in range(size) if i not in said[0].ids + said[1].ids]
    plain, faster = (dataclasses.replace(p, end_ids=ends) for p in (plain, faster))
    faster.model.base_model.register_forward_pre_hook(
        lambda _, __, x: rows.append(len(x["input_ids"])), with_kwargs=True)
    expected = plain.rollout(plain, [inputs], uniforms, 2, 1.0)
    assert [len(y.ids) for y in expected][:2] == [24, 24]
    assert_same(faster.rollout(faster, [inputs], uniforms, 2, 1.0), expected)
    assert rows[1] == 3
    assert rows[-1] == 1


@pytest.mark.slow
def test_the_toy_samples_and_learns_as_plain(tiny: Policy, examples: list[Example]) -> None:
    dones, weights = [], []
    for plain in (True, False):
        trainer = make_trainer(tiny, CORRECT, plain=plain, micro_batch=3, temperature=0.8)
        for step in range(2):
            dones.append(dyme.train_step(trainer, examples[4 * step:4 * step + 4], step, 1e-3))
        weights.append({name: p.detach() for name, p in trainer.policy.model.named_parameters()})
    for expected, ours in zip(dones[:2], dones[2:], strict=True):
        for a, b in zip(ours.responses, expected.responses, strict=True):
            assert_same(a, b)
        assert ours.metrics["loss"] == pytest.approx(expected.metrics["loss"], abs=1e-5)
    assert_close(weights[1], weights[0], 2e-5)


def toy_rollouts(policy: Policy, examples: list[Example]) -> list[Response]:
    """Responses of four rollouts of other sizes, each with other weights, two greedy."""
    policy = dataclasses.replace(policy, model=copy.deepcopy(policy.model))
    policy, found = fast.speed_up(policy), []
    sizes = ((3, 4, 0.8), (8, 4, 0.8), (2, 4, 0.0), (8, 1, 0.0))
    for seed, (count, K, temperature) in enumerate(sizes):
        inputs = dyme.encode_prompts(policy, examples[seed:seed + count], room=24)
        uniforms = dyme.keyed_uniforms(seed, 0, range(count), K, 24)
        found += policy.rollout(policy, [inputs], uniforms, K, temperature)
        with torch.no_grad():
            for p in policy.model.parameters():
                p.mul_(1.02)
    assert all(p.requires_grad for p in policy.model.model.text_model.parameters())
    return found


def test_the_toys_step_is_recorded_once_and_samples_the_same(
        tiny: Policy, examples: list[Example], monkeypatch: Patch) -> None:
    steps, step = [], fast.Decoder.step
    monkeypatch.setattr(
        fast.Decoder, "step", lambda self: steps.append(weakref.ref(self)) or step(self))
    ours = toy_rollouts(tiny, examples)
    assert len(steps) == 3  # one for each K and temperature
    assert not any(decoder() for decoder in steps)  # nor is a recorded one's cache kept
    monkeypatch.setattr(fast, "without_python", lambda decoder: decoder.step)
    assert toy_rollouts(tiny, examples) == ours  # ids and entropies, bit for bit
    assert len({len(y.ids) for y in ours}) > 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_recorded_step_follows_the_weights(kind: str) -> None:
    policies = both(kind)
    for seed in range(3):
        inputs, uniforms = pad_batch(make_prompts(kind)), torch.rand(6, 24)
        expected, ours = (p.rollout(p, [inputs], uniforms, 2, 1.0) for p in policies)
        assert_same(ours, expected)
        for pair in zip(*(policy.model.parameters() for policy in policies), strict=True):
            values = pair[0] + 0.1 * torch.randn_like(pair[0])
            for p in pair:  # in place, as an optimiser does, or another tensor
                p.data = values.detach().clone() if seed else p.data.copy_(values)


def test_a_step_that_cannot_be_recorded_runs_as_it_is(
        tiny: Policy, examples: list[Example], monkeypatch: Patch) -> None:
    policy = fast.speed_up(dataclasses.replace(tiny, model=copy.deepcopy(tiny.model)))
    uniforms, draw = dyme.keyed_uniforms(0, 0, range(2), 4, 24), dyme.draw
    inputs = dyme.encode_prompts(policy, examples[:2], room=24)
    recorded = policy.rollout(policy, [inputs], uniforms, 4, 1.0)
    # A decision by a number, of which a recording would keep the first outcome: at 0.5 and above
    # the likeliest token, from now on.
    monkeypatch.setattr(dyme, "draw", lambda logits, uniform, temperature: draw(
        logits, uniform, temperature if uniform[0] < 0.5 else 0.0))
    ours = policy.rollout(policy, [inputs], uniforms, 4, 1.0)
    assert ours != recorded
    assert_same(ours, dyme.rollout(tiny, [inputs], uniforms, 4, 1.0))


def test_ctrl_c_waits_for_the_end_of_a_recording(
        tiny: Policy, examples: list[Example], monkeypatch: Patch) -> None:
    policy = fast.speed_up(dataclasses.replace(tiny, model=copy.deepcopy(tiny.model)))
    weights, step, recorded = [*policy.model.parameters()], fast.Decoder.step, []
    uniforms = dyme.keyed_uniforms(0, 0, range(2), 4, 24)
    inputs = dyme.encode_prompts(policy, examples[:2], room=24)

    def interrupted_step(decoder: fast.Decoder) -> None:
        signal.raise_signal(signal.SIGINT)
        step(decoder)
        recorded.append(True)

    monkeypatch.setattr(fast.Decoder, "step", interrupted_step)
    with pytest.raises(KeyboardInterrupt):
        policy.rollout(policy, [inputs], uniforms, 4, 1.0)
    assert recorded == [True]
    assert all(p is before for p, before in zip(policy.model.parameters(), weights, strict=True))
    ours = policy.rollout(policy, [inputs], uniforms, 4, 1.0)
    assert recorded == [True]  # the recording is whole, and is used
    assert_same(ours, dyme.rollout(tiny, [inputs], uniforms, 4, 1.0))


def test_a_copy_of_a_model_samples_by_its_own_weights(
        tiny: Policy, examples: list[Example]) -> None:
    policy = fast.speed_up(dataclasses.replace(tiny, model=copy.deepcopy(tiny.model)))
    uniforms = dyme.keyed_uniforms(0, 0, range(2), 4, 24)
    inputs = dyme.encode_prompts(policy, examples[:2], room=24)
    before = policy.rollout(policy, [inputs], uniforms, 4, 1.0)
    policy.model = copy.deepcopy(policy.model)
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(-1)
    after = policy.rollout(policy, [inputs], uniforms, 4, 1.0)
    assert after != before
    assert_same(after, dyme.rollout(policy, [inputs], uniforms, 4, 1.0))
    policy.end_ids = after[0].ids[3:4]  # and by its own end tokens
    assert_same(policy.rollout(policy, [inputs], uniforms, 4, 1.0),
                dyme.rollout(policy, [inputs], uniforms, 4, 1.0))
    policy.model.double()
    assert_same(policy.rollout(policy, [inputs], uniforms, 4, 1.0),
                dyme.rollout(policy, [inputs], uniforms, 4, 1.0))


def test_no_second_copy_of_the_prompts_cache_is_kept_while_decoding(
        tiny: Policy, examples: list[Example], monkeypatch: Patch) -> None:
    monkeypatch.setattr(fast, "without_python", lambda decoder: decoder.step)  # it calls no hooks
    policy = dataclasses.replace(tiny, model=copy.deepcopy(tiny.model), end_ids=[-1])
    policy = fast.speed_up(policy)
    batches = [dyme.encode_prompts(policy, examples[i:i + 2], room=8) for i in (0, 2)]
    with torch.no_grad():
        prefixes = [dyme.encode_prefix(policy.model, batch) for batch in batches]
    layers = [layer for prefix in prefixes for layer in prefix.cache.layers]
    copies, alive = [weakref.ref(x) for y in layers for x in (y.keys, y.values)], []
    policy.model.base_model.register_forward_pre_hook(
        lambda *_: alive.append(sum(copy() is not None for copy in copies)))
    with torch.no_grad():
        fast.Decoder(policy, prefixes, torch.rand(8, 8), 1.0).sample()
    assert len(copies) == 12
    assert alive == [0] * 7


def test_precision_is_what_is_asked_for(monkeypatch: Patch) -> None:
    def model(device: str, weights: float = 1e8) -> Any:
        return SimpleNamespace(device=torch.device(device), num_parameters=lambda: weights)

    resolve, cpu, cuda = parallel.resolve_precision, model("cpu"), model("cuda")
    for native, found in ((False, [torch.float32, torch.float16]), (True, [torch.bfloat16] * 2)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda native=native, **_: native)
        monkeypatch.setattr(parallel, "bf16_is_faster", lambda native=native: native)
        assert [resolve(cpu), resolve(cuda)] == found
        assert resolve(model("cpu", 1e6)) == torch.float32  # the toy's
        for asked in (cpu, cuda):
            assert resolve(asked, "float32") == torch.float32
            assert resolve(asked, "bf16") == torch.bfloat16
    # A run writes down what it found, and is resumed with that elsewhere.
    assert parallel.settle_precision(cpu, "auto") == "bf16"
    assert parallel.settle_precision(model("cpu", 1e6), "auto") == "float32"
    # Processes that find it otherwise take what the first one found.
    monkeypatch.setattr(parallel, "gather", lambda value: [torch.float32, value])
    assert parallel.settle_precision(cpu, "auto") == "float32"


@pytest.mark.parametrize("has, half, single, found", [
    (True, 1.0, 2.0, True), (True, 2.0, 1.0, False), (False, 1.0, 2.0, False)])
def test_bf16_is_taken_where_it_multiplies_faster(
        monkeypatch: Patch, has: bool, half: float, single: float, found: bool) -> None:
    """It takes twice the time on some processors that have it."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has}, raising=False)
    monkeypatch.setattr(timeit, "repeat", lambda product, **_: [
        9.0, half if product.args[0].dtype == torch.bfloat16 else single])
    assert parallel.bf16_is_faster.__wrapped__() == found


def test_a_run_writes_down_the_precision_that_it_found(runs: Path) -> None:
    assert run(runs, "a", "--steps", "1", "--eval-every", "0", "--eval-rows", "1") == 0
    assert settings.read(runs / "a", dyme.Config)["precision"] == "float32"  # not auto


@pytest.mark.slow
def test_gradients_are_scaled_in_float16_alone(monkeypatch: Patch) -> None:
    half = {"auto": torch.float16}
    monkeypatch.setattr(parallel, "resolve_precision",
                        lambda model, wanted="auto": half.get(wanted, torch.float32))
    for precision, scaled in (("auto", True), ("float32", False)):
        trainer = dyme.make_trainer(dyme.Config(precision=precision, plain=True), new_policy(0))
        assert trainer.scaler.is_enabled() == scaled


@pytest.mark.slow
def test_bf16_gives_about_the_gradients_of_float32_and_keeps_float32_weights() -> None:
    def step(precision: str) -> dict[str, Tensor]:
        trainer = dyme.make_trainer(dyme.Config(precision=precision), new_policy(0))
        with Patch.context() as patch:
            patch.setattr(dyme, "apply_gradients", lambda *_: {})
            dyme.sft_step(trainer, toy.make_examples("train", "high")[:8], 0, 0.0)
        assert {p.dtype for p in trainer.policy.model.parameters()} == {torch.float32}
        return gradients(trainer.policy.model)

    exact, rounded = step("float32"), step("bf16")
    assert not all(torch.equal(exact[name], rounded[name]) for name in exact)
    a, b = (torch.cat([g.flatten() for g in grads.values()]) for grads in (exact, rounded))
    assert F.cosine_similarity(a, b, dim=0) > 0.999


@half
@pytest.mark.parametrize("family", EACH_FAMILY)
def test_half_precision_samples_and_trains(family: str, dtype: torch.dtype) -> None:
    """What CUDA does, tried on the CPU: under autocast keys and values come in two precisions."""
    policy = fast.speed_up(bare_policy(tiny_family(family, torch.float32)))
    model, inputs = policy.model, pad_batch(make_prompts(family, torch.float32))
    autocast = lambda: torch.autocast("cpu", dtype=dtype)  # noqa: E731
    with autocast(), torch.no_grad():
        merged = fast.merge([dyme.encode_prefix(model, inputs)], 4, torch.arange(2))
    for layer in merged.cache.layers:
        assert layer.keys.dtype == layer.values.dtype == dtype
    half_policy = dataclasses.replace(policy, autocast=autocast, end_ids=[])
    responses = half_policy.rollout(half_policy, [inputs], torch.rand(6, 6), 2, 1.0)
    sequences = [Sequence(i // 2, y.ids, 1.0, True) for i, y in enumerate(responses)]
    owners = [s.prompt for s in sequences]
    logprobs, mask = half_policy.logprobs(half_policy, model, inputs, owners, sequences, 1.0)
    logprobs.mean().backward()
    exact, _ = policy.logprobs(policy, model, inputs, owners, sequences, 1.0)
    assert logprobs.dtype == torch.float32
    assert mask.all()
    assert torch.allclose(logprobs, exact, atol=0.05)
    assert all(g.isfinite().all() for g in gradients(model).values())


# ---- Runs ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("first, then", [("False", "True"), ("True", "False")])
def test_a_run_goes_on_fast_after_plain_and_plain_after_fast(
        runs: Path, monkeypatch: Patch, first: str, then: str) -> None:
    flags = ["--steps", "4", "--save-every", "2", "--eval-every", "0", "--lr", "1e-3"]
    assert run(runs, "whole", *flags, "--plain", first) == 0
    real = dyme.take_step

    def killed(trainer: dyme.Trainer, step: int, *rest: Any) -> dyme.Step:
        if step == 3:
            raise SystemError
        return real(trainer, step, *rest)

    monkeypatch.setattr(dyme, "take_step", killed)
    with pytest.raises(SystemError):
        run(runs, "other", *flags, "--plain", first)
    monkeypatch.setattr(dyme, "take_step", real)
    assert run(runs, "other", "--resume", "--plain", then) == 0
    near(runs / "other", runs / "whole")


# ---- Models that it does not know ----------------------------------------------------------------

WINDOWS = {"sliding_window": 4}
LONG = {"sliding_window": 12}  # longer than the trial, shorter than prompt and response


@pytest.mark.parametrize("kind, settings, known", [
    ("llama", {}, True), ("qwen3", {}, True), ("mistral", {"sliding_window": None}, True),
    ("granite", {"attention_multiplier": 0.1}, True), ("mistral", WINDOWS, False),
    ("mistral", LONG, False), ("qwen2", LONG | {"use_sliding_window": True, "max_window_layers": 0},
                               False), ("gemma3_text", LONG, False), ("gpt_oss", LONG, False),
    ("gpt_oss", {"layer_types": ["full_attention"] * 2}, False)])
def test_models_are_sped_up_or_go_on_as_they_are(
        kind: str, settings: dict[str, Any], known: bool, capsys: Capture) -> None:
    model = text_model(kind, **settings)
    ids = torch.randint(10, 60, (1, 16), generator=torch.Generator().manual_seed(1))
    expected = model(ids).logits[:, 9:-1].log_softmax(-1).gather(2, ids[:, 10:, None]).squeeze(2)
    policy = bare_policy(model)
    faster = fast.speed_up(policy)
    said = capsys.readouterr()
    lines = (said.err + said.out).splitlines()
    assert (faster is not policy) == known
    assert [line.partition(": ")[0] for line in lines] == ["going on as with --plain"] * (not known)
    rows = {"input_ids": ids[:, :10], "attention_mask": torch.ones(1, 10, dtype=torch.long)}
    response = Sequence(0, ids[0, 10:].tolist(), 1.0, True)
    ours, _ = faster.logprobs(faster, model, rows, [0], [response], 1.0)
    assert torch.allclose(ours, expected, atol=1e-4)


def test_a_model_is_refused_for_what_is_not_known_and_not_for_rounding() -> None:
    def refused(model: torch.nn.Module) -> bool:
        try:
            dyme.check_model(model)
        except ValueError as error:
            assert "not known here" in str(error)
            return True
        return False

    def with_logits(change: Any) -> torch.nn.Module:
        model = text_model("llama")
        forward = model.forward

        def changed(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            out.logits = change(out.logits)
            return out

        model.forward = changed
        return model

    absolute = {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 64}
    assert refused(text_model("gpt2", **absolute))  # absolute positions: padding moves them
    assert refused(with_logits(lambda x: 1.1 * x))
    assert refused(with_logits(lambda x: 5 * torch.tanh(x / 5)))
    assert not refused(with_logits(lambda x: x))
    # Weights that have trained move logits from -10 to 30 by 2e-3: the model is the same.
    noise = lambda x: x + 1e-3 * (x.max() - x.min()) * torch.randn_like(x).clamp(-3, 3)  # noqa: E731
    assert not refused(with_logits(noise))


@pytest.mark.parametrize("kind, settings", [
    ("qwen2", {}), ("gemma2", {"final_logit_softcapping": 3.0}), ("cohere", {"logit_scale": 0.25}),
    ("granite", {"logits_scaling": 8.0})])
def test_logits_are_the_models_own(kind: str, settings: dict[str, Any]) -> None:
    """Some families scale or cap them after the head."""
    model, ids = text_model(kind, **settings), torch.arange(10, 20)[None]
    hidden = model.base_model(ids).last_hidden_state[0]
    assert torch.allclose(dyme.next_logits(model, hidden), model(ids).logits[0], atol=1e-5)


def test_a_model_is_sped_up_once(tiny: Policy) -> None:
    policy = dataclasses.replace(tiny, model=copy.deepcopy(tiny.model))
    hooks = policy.model.base_model._forward_pre_hooks
    assert fast.speed_up(policy).rollout is fast.rollout
    assert len(hooks) == 1
    assert fast.speed_up(policy).rollout is fast.rollout
    assert len(hooks) == 1


# ---- Attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", EACH_FAMILY)
def test_grouped_attention_is_transformers_own(family: str, dtype: torch.dtype | None) -> None:
    exact, results = torch.float64 if dtype is None else torch.float32, []
    inputs = pad_batch(make_prompts(family, exact))
    for grouped in (True, False):
        model = tiny_family(family, exact)
        if grouped:
            fast.use_grouped_attention(model)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            hidden = model.base_model(**inputs).last_hidden_state[inputs["attention_mask"] == 1]
        weights = torch.linspace(-1, 1, hidden.numel()).view_as(hidden)
        (hidden.float() * weights).sum().backward()
        gradient = torch.cat([g.flatten() for g in gradients(model).values()])
        results.append((hidden.detach().float(), gradient))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() < (1e-6 if dtype is None else 0.02) * theirs.norm()


HEADS = SimpleNamespace(num_attention_heads=6, num_key_value_heads=2)


def test_grouped_attention_by_hand() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, 5, 4), torch.randn(2, 2, 7, 4), torch.randn(2, 2, 7, 3)
    visible = torch.rand(2, 1, 5, 7) < 0.5
    visible[..., 0] = True
    keys, values = (x.repeat_interleave(3, dim=1) for x in (key, value))  # each serves three heads
    scores = (0.3 * query @ keys.mT).masked_fill(~visible, -torch.inf)  # (B, H, Q, S)
    expected = scores.softmax(-1) @ values
    mask = fast.additive_mask(visible, HEADS)
    out, _ = fast.grouped_attention(torch.nn.Module(), query, key, value, mask, scaling=0.3)
    assert torch.allclose(out, expected.transpose(1, 2), atol=1e-6)  # (B, Q, H, D)


def test_a_frozen_tower_attends_by_head_in_bf16_alone(monkeypatch: Patch) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 512, 8) for _ in range(3))  # (B, H, Q, D)
    expected, calls = ((0.3 * q @ k.mT).softmax(3) @ v).transpose(1, 2), []
    theirs = fast.sdpa_attention_forward
    monkeypatch.setattr(fast, "sdpa_attention_forward",
                        lambda *args, **known: calls.append(1) or theirs(*args, **known))
    tower = SimpleNamespace(is_causal=False)
    half = [x.bfloat16() for x in (q, k, v)]
    with torch.no_grad():
        by_head, _ = fast.attention_by_head(tower, *half, None, scaling=0.3)
        assert not calls
        exact, _ = fast.attention_by_head(tower, q, k, v, None, scaling=0.3)
        fast.attention_by_head(tower, *(x[:, :, :64] for x in half), None, scaling=0.3)  # a window
    fast.attention_by_head(tower, *half, None, scaling=0.3)  # a tower that trains
    assert len(calls) == 3
    assert by_head.shape == (2, 512, 3, 8)  # (B, Q, H, D)
    assert (by_head.float() - expected).norm() < 0.02 * expected.norm()
    assert torch.allclose(exact, expected, atol=1e-5)


def test_an_additive_mask_has_a_row_for_each_head_of_a_group_and_aligned_rows() -> None:
    visible = torch.tensor([[True, False, True], [True, True, False]])[None, None]  # (1, 1, 2, 3)
    mask = fast.additive_mask(visible, HEADS)
    assert mask.shape == (1, 1, 6, 3)  # H/G = 3 times both rows
    assert mask.stride(2) == 8
    assert torch.equal(mask[0, 0] == 0, visible[0, 0].repeat(3, 1))
    assert mask.min() == torch.finfo(torch.float32).min


# ---- Images --------------------------------------------------------------------------------------


def encode_twice(model: torch.nn.Module, batch: Inputs) -> tuple[int, dict[str, Tensor]]:
    """Sample from a batch, then score: passes of the vision tower, and gradients."""
    policy, passes, handles = bare_policy(model), [], []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
            handles.append(module.register_forward_hook(lambda *_: passes.append(1)))
    dyme.rollout(policy, [batch], torch.rand(3, 2), 1, 1.0)
    sequences = [Sequence(i, [20, 21], 1.0, True) for i in range(3)]
    logprobs, _ = dyme.sequence_logprobs(policy, model, batch, [0, 1, 2], sequences, 1.0)
    logprobs.sum().backward()
    for handle in handles:
        handle.remove()
    return len(passes), {"logprobs": logprobs.detach()} | gradients(model)


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_images_are_encoded_once_and_change_no_gradient(family: str) -> None:
    model, batch = tiny_family(family), pad_batch(make_prompts(family))
    dyme.freeze_vision(model)
    twice, expected = encode_twice(model, batch)
    fast.encode_images_once(model)
    once, ours = encode_twice(model, batch)
    # Qwen's connector, which trains, is inside its tower.
    assert (twice, once) == (2, 2 if family == "qwen2_5_vl" else 1)
    assert_close(ours, expected, 0.0)
    connector = [name for name in ours if any(part in name for part in CONNECTOR.split("|"))]
    assert connector
    assert all(ours[name].abs().sum() > 0 for name in connector)
    other = batch | {"pixel_values": batch["pixel_values"] + 1}
    _, changed = encode_twice(model, other)
    assert not torch.allclose(changed["logprobs"], ours["logprobs"])  # other images are encoded


@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
def test_a_towers_patches_are_laid_out_in_order(family: str) -> None:
    """Transposed, as the convolution leaves them, every norm would copy them."""
    outputs: list[Tensor] = []
    for policy in both(family):
        tower = dyme.vision_towers(policy.model)[0]
        tower.embeddings.register_forward_hook(lambda _, __, out: outputs.append(out))
        dyme.encode_prefix(policy.model, pad_batch(make_prompts(family)))
    assert torch.equal(*outputs)
    assert [out.is_contiguous() for out in outputs] == [False, True]


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_what_comes_after_the_tower_is_not_kept(family: str) -> None:
    """Or the graph of the connector would stay in memory with the pixels."""
    model, batch, made = tiny_family(family), pad_batch(make_prompts(family)), []
    dyme.freeze_vision(model)
    fast.encode_images_once(model)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("connector", "multi_modal_projector", "merger"):
            module.register_forward_hook(lambda *args: made.append(weakref.ref(args[-1])))
    encode_twice(model, batch)
    assert len(made) == 2
    assert [output() for output in made] == [None, None]


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_a_tower_that_trains_runs_every_time(family: str) -> None:
    model, batch = tiny_family(family), pad_batch(make_prompts(family))
    fast.encode_images_once(model)
    passes, found = encode_twice(model, batch)
    assert passes == 2
    assert any("vision" in name or "visual" in name for name in found)


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_nothing_of_an_image_is_kept_once_its_pixels_are_gone(family: str) -> None:
    model, batch, outputs = tiny_family(family), pad_batch(make_prompts(family)), []
    model.requires_grad_(False)
    fast.encode_images_once(model)
    for tower in dyme.vision_towers(model):
        tower.register_forward_hook(
            lambda *args: outputs.append(weakref.ref(args[-1].last_hidden_state)))
    policy = bare_policy(model)
    for _ in range(2):
        dyme.rollout(policy, [batch], torch.rand(3, 2), 1, 1.0)
    assert len(outputs) == 2
    assert outputs[0]() is outputs[1]() is not None
    del batch
    assert outputs[0]() is None


class Crops(torch.nn.Module):
    """Encodes an image whole and then its crop, as DeepSeek-OCR-2 and Step3-VL do."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_tower = torch.nn.Linear(2, 2).requires_grad_(False)

    def forward(self, pixel_values: Tensor, crop: Tensor) -> tuple[Tensor, Tensor]:
        return self.vision_tower(pixel_values), self.vision_tower(crop)


def test_each_pass_of_a_tower_over_the_same_batch_has_its_own_output() -> None:
    base, pixels, crop = Crops(), torch.randn(3, 2), torch.randn(3, 2)
    expected = base(pixels, crop)
    fast.encode_images_once(SimpleNamespace(base_model=base))
    for _ in range(2):
        for ours, theirs in zip(base(pixel_values=pixels, crop=crop), expected, strict=True):
            assert torch.equal(ours, theirs)


# ---- CUDA graphs ---------------------------------------------------------------------------------


class FailingGraph:
    """A recording that fails when it ends, as it does after an error in the step."""

    def capture_begin(self, **_: Any) -> None:
        pass

    def capture_end(self) -> None:
        raise RuntimeError("operation failed due to a previous error during capture")


@pytest.mark.parametrize("error", [
    RuntimeError("cudaErrorStreamCaptureUnsupported: in aten::item"),
    torch.OutOfMemoryError("CUDA out of memory")])
def test_a_failed_capture_says_its_first_cause_and_decoding_goes_on(
        error: Exception, monkeypatch: Patch, capsys: Capture) -> None:
    stream = SimpleNamespace(wait_stream=lambda other: None)
    fakes = {"current_device": lambda: 0, "current_stream": lambda: stream,
             "graph_pool_handle": object, "stream": lambda s: contextlib.nullcontext(),
             "Stream": lambda device: stream, "CUDAGraph": FailingGraph}
    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, value)
    fast.recorder.cache_clear()
    model, tries = torch.nn.Module(), []

    def step() -> None:
        tries.append(1)
        raise error

    if isinstance(error, torch.OutOfMemoryError):
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            fast.capture(model, step)
        assert not hasattr(model, "uncapturable")  # memory may be there the next time
        return
    assert fast.capture(model, step) is step
    assert fast.capture(model, step) is step
    assert len(tries) == 1  # not tried again
    said = "".join(capsys.readouterr())
    assert "cudaErrorStreamCaptureUnsupported" in said
    assert "previous error" not in said


# ---- oneDNN --------------------------------------------------------------------------------------


@pytest.fixture
def by_onednn(tiny: Policy) -> torch.nn.Module:
    model = copy.deepcopy(tiny.model)
    fast.use_onednn(model, least=0)
    if not any(isinstance(module, fast.Linear) for module in model.modules()):
        pytest.skip("for x86 processors")
    return model


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_by_onednn_is_a_linear_layer(
        bias: bool, by_onednn: torch.nn.Module, monkeypatch: Patch) -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(24, 40, bias=bias)
    ours, calls, product = copy.deepcopy(plain), [], fast.product
    ours.__class__ = fast.Linear
    monkeypatch.setattr(fast, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(fast, "product", lambda a, b: calls.append(1) or product(a, b))
    for shape in ((24,), (7, 24), (2, 7, 24), (2, 3, 7, 24), (0, 24)):
        x = torch.randn(*shape).requires_grad_()
        y = x.detach().clone().requires_grad_()
        a, b = plain(x), ours(y)
        a.square().sum().backward()
        b.square().sum().backward()
        assert a.shape == b.shape
        assert torch.allclose(a, b, atol=1e-6)
        assert torch.allclose(x.grad, y.grad, atol=1e-5)
    assert len(calls) == 3 * 4  # forward and both gradients; nothing is multiplied by nothing
    assert_close(gradients(plain), gradients(ours), 1e-4)


@pytest.mark.parametrize("vendor, capability, expected", [
    ("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False),
    ("GenuineIntel", "AVX512", False)])
def test_onednn_multiplies_many_rows_where_it_is_faster_than_mkl(
        monkeypatch: Patch, vendor: str, capability: str, expected: bool) -> None:
    monkeypatch.setattr(Path, "exists", lambda _: True)
    monkeypatch.setattr(Path, "read_text", lambda _: f"vendor_id : {vendor}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert fast.onednn_is_faster.__wrapped__() == expected


def test_onednn_leaves_frozen_weights_and_other_precisions_alone(
        by_onednn: torch.nn.Module) -> None:
    ours, x = copy.deepcopy(by_onednn.lm_head), torch.randn(3, 96, requires_grad=True)
    assert type(ours) is fast.Linear
    ours.weight.requires_grad_(False)
    ours(x).sum().backward()
    assert ours.weight.grad is None
    assert torch.allclose(x.grad, ours.weight.sum(0).expand(3, -1), atol=1e-5)
    expected = F.linear(x.double(), ours.weight.double())
    assert torch.equal(ours.double()(x.double()), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours.float()(x).dtype == torch.bfloat16


def test_a_model_by_onednn_has_the_same_loss_and_gradients(
        tiny: Policy, by_onednn: torch.nn.Module, examples: list[Example]) -> None:
    results = []
    targets = [Sequence(i, dyme.target_ids(tiny, examples[i]), 0.5, False) for i in range(2)]
    batches = [dyme.encode_prompts(tiny, examples[:2], room=48)]
    for model in (copy.deepcopy(tiny.model), by_onednn, copy.deepcopy(by_onednn)):
        results.append(summed(dataclasses.replace(tiny, model=model), batches, targets))
    for loss, found in results[1:]:
        assert loss == pytest.approx(results[0][0], abs=1e-5)
        assert_close(found, results[0][1], 1e-4)


@pytest.mark.parametrize("recorded", [True, False])
def test_packed_weights_sample_the_same_and_are_given_back(
        tiny: Policy, by_onednn: torch.nn.Module, examples: list[Example], recorded: bool,
        monkeypatch: Patch) -> None:
    if not recorded:
        monkeypatch.setattr(fast, "without_python", lambda decoder: decoder.step)
    inputs, uniforms, packed = dyme.encode_prompts(tiny, examples[:2], 12), torch.rand(4, 12), []
    layers = [m for m in by_onednn.modules() if isinstance(m, fast.Linear)]
    by_onednn.base_model.register_forward_pre_hook(
        lambda *_: packed.append(sum(layer.packed is not None for layer in layers)))
    policy = dataclasses.replace(tiny, model=by_onednn, end_ids=[])
    for _ in range(2):  # the second time with other weights
        plain = dataclasses.replace(tiny, model=copy.deepcopy(tiny.model), end_ids=[])
        plain.model.load_state_dict(by_onednn.state_dict())
        expected = dyme.rollout(plain, [inputs], uniforms, 2, 1.0)
        assert_same(fast.rollout(policy, [inputs], uniforms, 2, 1.0), expected)
        with torch.no_grad():
            by_onednn.lm_head.weight.mul_(-1)
    in_language_model = 3 * 7 + 1 + 1  # three layers, the connector, the head
    # Of eleven steps one is recorded, in the first rollout.
    steps = [[in_language_model], []] if recorded else [[in_language_model] * 11] * 2
    assert packed == [0, *steps[0], 0, *steps[1]]
    assert all(layer.packed is None for layer in layers)


@pytest.mark.parametrize("bias, has_bf16", [(True, True), (False, True), (True, False)])
def test_packed_weights_are_cast_to_the_precision_of_decoding(
        monkeypatch: Patch, bias: bool, has_bf16: bool) -> None:
    torch.manual_seed(0)
    if not has_bf16:  # a processor with AVX2 alone
        lacks = SimpleNamespace(_is_mkldnn_bf16_supported=lambda: False)
        monkeypatch.setattr(torch.ops, "mkldnn", lacks)
    elif not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no bf16")
    model, x = torch.nn.Module(), torch.randn(3, 24)
    model.base_model = torch.nn.Linear(24, 40, bias=bias)
    layer = model.base_model
    layer.__class__ = fast.Linear
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = F.linear(x, layer.weight, layer.bias)
        with fast.packed_weights(model, 3):
            if has_bf16:
                assert layer.packed.dtype == torch.bfloat16
            found = layer(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert torch.allclose(found, expected, atol=0.01)
    assert layer.weight.dtype == torch.float32


def test_a_torch_without_onednn_works(monkeypatch: Patch, tiny: Policy) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())  # as on a Mac
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    module, model = runpy.run_path(fast.__file__), copy.deepcopy(tiny.model)
    module["use_onednn"](model, least=0)
    assert all(type(m).__module__ != "<run_path>" for m in model.modules())


def test_the_toy_does_not_multiply_by_onednn() -> None:
    policy = fast.speed_up(dyme.load_policy("tiny", CPU))
    assert not any(isinstance(module, fast.Linear) for module in policy.model.modules())


# ---- On a GPU ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_and_the_update_ask_the_device_nothing(kind: str, monkeypatch: Patch) -> None:
    # As a GPU stands in "meta", a device without values: whatever waits for one, or mixes in a
    # tensor of the CPU, raises. Prompts are left to the models, whose masks do look at values.
    policy, prompts = both(kind)[1], make_prompts(kind)
    with torch.no_grad():
        prefixes = [dyme.encode_prefix(policy.model, x) for x in prompts]

    def moved() -> list[dyme.Prefix]:
        copies = copy.deepcopy(prefixes)
        for prefix in copies:
            for layer in prefix.cache.layers:
                layer.keys, layer.values = layer.keys.to("meta"), layer.values.to("meta")
            prefix.hidden, prefix.mask = prefix.hidden.to("meta"), prefix.mask.to("meta")
            prefix.position = prefix.position.to("meta")
        return copies

    model, device = policy.model.to("meta"), torch.device("meta")
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # it knows no meta
    policy = dataclasses.replace(policy, end_ids=[2, 3], device=device)
    decoder = fast.Decoder(policy, moved(), torch.rand(6, 9, device=device), 0.7)
    decoder.widen(8)
    decoder.choose(torch.rand(6, model.config.get_text_config().vocab_size, device=device))
    for _ in range(8):
        decoder.step()
    assert decoder.ids.is_meta
    inputs = {"input_ids": prompts[0]["input_ids"].to(device)}
    sequences = [Sequence(0, [5] * 7, 1, True)]
    for logprobs_of in (dyme.sequence_logprobs, fast.sequence_logprobs):
        start = moved()[0]
        monkeypatch.setattr(dyme, "encode_prefix", lambda *_, start=start: start)
        logprobs, mask = logprobs_of(policy, model, inputs, [0], sequences, 0.7)
        ones = torch.ones(1, device=device)
        dyme.policy_loss(logprobs, mask, ones, ones.bool()).backward()
        assert next(p.grad for p in model.parameters() if p.grad is not None).is_meta


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def cuda_policy() -> Policy:
    """The toy's random model on a GPU, with responses of full length."""
    policy = new_policy(0)
    device = torch.device("cuda")
    policy = dyme.make_policy(policy.model.to(device), policy.processor, device)
    return dataclasses.replace(fast.speed_up(policy), end_ids=[])


@on_gpu
def test_a_cuda_graph_samples_what_plain_steps_do(
        examples: list[Example], monkeypatch: Patch) -> None:
    policy, results, captured, capture = cuda_policy(), [], [], fast.capture
    inputs, uniforms = dyme.encode_prompts(policy, examples[:3], 24), torch.rand(12, 24)
    for replaced in (lambda *args: captured.append(capture(*args)) or captured[-1],
                     lambda _, step: step):
        monkeypatch.setattr(fast, "capture", replaced)
        for _ in range(2):
            responses = policy.rollout(policy, [inputs], uniforms, 4, 1.0)
        results.append(torch.tensor([y.ids for y in responses]))
    # They were graphs, in both rollouts.
    assert [step.__name__ for step in captured] == ["replay", "replay"]
    assert (results[0] == results[1]).float().mean() > 0.95


@on_gpu
@pytest.mark.parametrize("length", [64, 192, 320])  # where cuDNN's backward gave NaN: L % 128 == 64
def test_cuda_attention_with_a_mask_and_very_negative_scores_has_finite_gradients(
        length: int) -> None:
    dyme.parallel.select_device("cuda")
    torch.manual_seed(0)
    q = torch.randn(1, 4, length, 64, device="cuda", dtype=torch.bfloat16)
    k = (-20 * q + torch.randn_like(q)).requires_grad_()  # a logsumexp far below -88.7
    q.requires_grad_()
    visible = torch.ones(1, 1, length, length, dtype=torch.bool, device="cuda").tril()
    heads = SimpleNamespace(num_attention_heads=4, num_key_value_heads=4)
    mask = fast.additive_mask(visible, heads, q.dtype)
    F.scaled_dot_product_attention(q, k, torch.ones_like(q), attn_mask=mask).sum().backward()
    assert q.grad.isfinite().all()
    assert k.grad.isfinite().all()


@on_gpu
def test_packed_sequences_use_a_fast_attention_kernel_and_train_on_cuda(
        examples: list[Example]) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    cfg = dyme.Config(lr=1e-3, generations=4, max_new_tokens=24)
    trainer = dyme.make_trainer(cfg, cuda_policy())
    marks = torch.tensor(CORRECT, dtype=torch.float32)
    trainer.judge = lambda *_: (marks, torch.zeros_like(marks))
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):  # or an error
        metrics = dyme.train_step(trainer, examples[:4], 0, 1e-3).metrics
    assert metrics["grad_norm"] > 0
    assert metrics["skipped_steps"] == 0
