"""Tests of support/: data, domains, other rules, the benchmark, what a GPU needs, the README."""

import contextlib
import copy
import dataclasses
import json
import os
import re
import runpy
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

import dyme
import eval as evaluation
import reward
import test_dyme
from dyme import Config, Policy
from reward import Example, verify
from support import (
    UserError,
    ablations,
    attention,
    benchmark,
    domains,
    feed,
    files,
    full_dyme,
    gpu_check,
    graphs,
    make_toy_base,
    onednn,
    parallel,
    settings,
    test_course,
    thinking,
    toy,
)
from support import runs as run_folders
from support.make_toy_base import new_policy
from test_dyme import CORRECT, CPU, TEXT, Capture, Patch, make_trainer, run, take

# ---- The toy -------------------------------------------------------------------------------------


def test_toy_is_deterministic_and_splits_do_not_overlap() -> None:
    train, val, test = (toy.make_examples(split) for split in ("train", "val", "test"))
    assert len(train) == 2048 and len(val) == 512 and len(test) == 1024
    assert [e.trace for e in train] == [e.trace for e in toy.make_examples("train")]
    facts = [{e.facts for e in split} for split in (train, val, test)]
    assert [len(f) for f in facts] == [len(train), len(val), len(test)] and len(set.union(*facts)) == sum(map(len, facts))
    lessons = list(toy.lessons(0, 3400, 0.0, dyme.PROMPT))
    assert not any(re.search("sum of|taller", e.question) for e, _ in lessons)
    charts = {e.image.__self__.facts() for e, _ in lessons}
    assert len(charts) == 3400 and charts.isdisjoint(set.union(*facts))  # nor has the base seen any
    assert not {c.facts() for c in toy.random_charts([4, 0], 3400)}.isdisjoint(set.union(*facts))  # left to chance


def test_the_base_sees_and_calculates_but_lacks_two_skills(examples: list[Example]) -> None:
    size = sum(file.stat().st_size for file in toy.BASE.iterdir())
    policy = dyme.load_policy("tiny", CPU)
    assert size < 2.5e6 and torch.get_num_threads() == 1
    summary = thinking.summarise(dyme.respond(policy, examples[:100], 48, 100))
    known = [summary[f"any_format_{kind}"] for kind in toy.KNOWN_KINDS]
    lacking = [summary[f"any_format_{kind}"] for kind in ("sum", "difference")]
    assert min(known) >= 0.95 and max(lacking) <= 0.1 and summary["accuracy"] <= 0.1


def test_a_base_can_be_made_from_its_recipe(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setattr(make_toy_base, "STEPS", 3)
    monkeypatch.setattr(make_toy_base, "BATCH", 8)
    make_toy_base.main(tmp_path / "a")
    make_toy_base.main(tmp_path / "b")
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert a == b and dyme.load_policy(str(tmp_path / "a"), CPU).end_ids
    fresh = [*new_policy(0).model.parameters()]
    taught = [*dyme.load_policy(str(tmp_path / "a"), CPU).model.parameters()]
    assert not all(torch.equal(x, y) for x, y in zip(fresh, taught, strict=True))


@pytest.mark.parametrize("traces, share", [("high", 0.0), ("medium", 0.35), ("low", 0.7)])
def test_toy_traces_are_fluent_and_ungrounded_as_often_as_said(traces: str, share: float) -> None:
    examples = toy.make_examples("train", traces)
    pseudo = sum(thinking.groundedness(e.trace, e.facts)[0] < thinking.groundedness(e.trace, e.facts)[1] for e in examples)
    assert pseudo / len(examples) == pytest.approx(share, abs=0.06)
    assert all(verify(reward.reference_response(e), e).correct for e in examples)


def test_toy_bars_can_be_read_off_the_picture() -> None:
    chart = toy.Chart({"red": 3, "blue": 9, "green": 1, "cyan": 5})
    pixels = np.array(chart.draw())
    for i, (name, value) in enumerate(chart.values.items()):
        column = pixels[:, 16 * i + 7]
        color = [int(toy.COLORS[name][j:j + 2], 16) for j in (1, 3, 5)]
        assert (column[:52] == color).all(1).sum() == 5 * value + 1


def test_a_text_only_policy_takes_the_same_path(tmp_path: Path, examples: list[Example]) -> None:
    tokenizer = new_policy(0).tokenizer
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}<end_of_utterance>\n" \
                              "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
    torch.manual_seed(0)
    settings = TEXT | {"model_type": "llama", "vocab_size": len(tokenizer), "eos_token_id": 3, "pad_token_id": 0}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    rows = [{"question": e.question, "answer": e.answer, "hint": e.trace} for e in examples[:12]]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    flags = ["--model", str(tmp_path / "llm"), "--data", str(tmp_path / "rows.json"), "--steps", "2", "--prompts", "2",
             "--generations", "2", "--max-new-tokens", "6", "--out", str(tmp_path / "run")]
    assert run_folders.run_main(lambda: dyme.train(dyme.parse_config(flags))) == 0
    assert files.read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]["grad_norm"] > 0
    policy = dyme.load_policy(str(tmp_path / "run"), CPU)
    with pytest.raises(UserError, match="cannot see"):
        dyme.encode_prompts(policy, examples[:1], room=0)


# ---- Switching rules ------------------------------------------------------------------------------


@pytest.mark.parametrize("rule, explore", [
    ("threshold:0.28", [0, 0, 0]), ("threshold:0.27", [1, 1, 1]), ("anneal", [1, 1, 1]), ("budget:8", [1, 1, 1]),
    ("explore", [1, 1, 1]), ("memorize", [0, 0, 0])])
def test_switching_rules_by_hand(rule: str, explore: list[int]) -> None:
    correct = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    rewards = correct + torch.tensor([[0.0, 0.1], [0.1, 0.2], [0.0, -0.1]])  # mean 0.55, of at most 2
    assert ablations.choose_mode(rule, rewards, highest=2.0).tolist() == [bool(x) for x in explore]
    assert ablations.anneal_weight(1 / 3) == pytest.approx(0.75)  # (1 + cos 60 degrees) / 2


def test_anneal_adds_the_targets_to_exploration(tiny: Policy, examples: list[Example]) -> None:
    trainer = make_trainer(tiny, CORRECT, switch="anneal", steps=4)
    seen = []
    accumulate = dyme.accumulate_gradients
    dyme_accumulate = lambda t, i, sequences: seen.append(sequences) or accumulate(t, i, sequences)
    with Patch.context() as patch:
        patch.setattr(dyme, "accumulate_gradients", dyme_accumulate)
        metrics, group = take(trainer, examples[:4], 2, "dyme", 1e-3)
    targets = [x.weight for x in seen[0] if not x.explore]
    assert targets == pytest.approx([0.5 / 4] * 4) and any(x.explore for x in seen[0])
    assert metrics["memorized"] == 0.5 and group["mode"] == "both"  # as many prompts explore


def test_budget_explores_and_memorizes_failures_when_there_are_enough(
        tiny: Policy, examples: list[Example], tmp_path: Path) -> None:
    trainer = make_trainer(tiny, CORRECT, switch="budget:2")  # of four prompts one fails
    for step, memorized, waiting in ((0, 0, 1), (1, 2 / 6, 0), (2, 0, 1)):
        logged, group = take(trainer, examples[4 * step:4 * step + 4], step, "dyme", 1e-3)
        assert logged["memorized"] == memorized and len(trainer.buffer) == waiting
        assert group["mode"] == "exploration"  # failed groups explore as well
    assert trainer.buffer[0].name == examples[9].name
    trainer.buffer[0] = dataclasses.replace(trainer.buffer[0], trace="refined")
    trainer.failures, trainer.helper = 1, SimpleNamespace(examples=["pool"])
    dyme.save_checkpoint(tmp_path, trainer, 3)
    again = make_trainer(tiny, CORRECT, switch="budget:2")
    again.helper = SimpleNamespace(examples=[])
    assert dyme.load_checkpoint(tmp_path, again, examples) == 3 and again.buffer == trainer.buffer
    assert again.failures == 1 and again.helper.examples == ["pool"]




def test_tensorboard_gets_every_number_or_says_what_is_missing(runs: Path, monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert run(runs, "a", "--steps", "2", "--tensorboard") == 2 and "pip install tensorboard" in capsys.readouterr().err
    written = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            assert folder == runs / "b" / "tensorboard" and purge_step == 0

        def add_scalar(self, *point: Any) -> None:
            written.append(point)

        def flush(self) -> None:
            pass

    monkeypatch.setitem(sys.modules, "tensorboard", SimpleNamespace(__spec__="found"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    assert run(runs, "b", "--steps", "2", "--tensorboard") == 0
    rows = files.read_jsonl(runs / "b" / "metrics.jsonl")
    assert ("metrics/loss", rows[1]["loss"], 1) in written and ("evaluations/accuracy", 0.0, 2) in written
    assert not any(name.endswith(("method", "step")) for name, *_ in written)


# ---- Speed: the feed, the benchmark, and what only a GPU can show ---------------------------------


def test_the_feed_gives_what_each_step_needs_in_order(tiny: Policy, examples: list[Example]) -> None:
    trainer = make_trainer(tiny, micro_batch=3)
    trainer.cfg.steps, asked = 3, []
    trainer.helper = SimpleNamespace(fetch_facts=asked.extend)
    chunks = list(dyme.feed_prompts(trainer, examples[:10], range(1, 3)))
    assert {e.name for e in asked} == {examples[i].name for step in (1, 2) for i in dyme.step_rows(trainer.cfg, step, 10)}
    assert [len(x["input_ids"]) for x in chunks] == [3, 1, 3, 1]
    rows = dyme.step_rows(trainer.cfg, 2, 10)
    expected = dyme.encode_prompts(tiny, [examples[i] for i in rows[:3]], room=0)
    assert all(torch.equal(chunks[2][key], expected[key]) for key in expected)
    assert threading.active_count() < 20  # it has ended its threads


def test_benchmark_ends_with_the_median_and_leaves_nothing_behind(runs: Path, monkeypatch: Patch, capsys: Capture) -> None:
    flags = ["--steps", "2", "--prompts", "2", "--generations", "3", "--max-new-tokens", "5", "--micro-batch", "1"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *flags, "--out", str(runs / "a")])
    assert run_folders.run_main(benchmark.main) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"median \d+\.\d{3} s/step", lines[-1]) and not any(runs.iterdir())
    table = {line.split()[0]: [float(x) for x in line.split()[1:]] for line in lines[2:9]}
    assert list(table) == ["feed", "vision", "prompt", "decode", "scoring", "update", "step"]
    assert all(table[part][1] >= 0 for part in table) and table["step"][0] == float(lines[-1].split()[1])
    monkeypatch.setattr(sys, "argv", ["benchmark", *flags, "--mode", "grpo", "--beta", "0.1"])  # with a reference
    assert run_folders.run_main(benchmark.main) == 0
    monkeypatch.setattr(sys, "argv", ["benchmark", *flags, "--mode", "sft"])  # with targets
    assert run_folders.run_main(benchmark.main) == 0


def test_coin_flips_explore_every_group_and_responses_have_full_length(tiny: Policy, examples: list[Example]) -> None:
    policy = dataclasses.replace(tiny, end_ids=[])
    inputs = dyme.encode_prompts(policy, examples[:2], room=9)
    rolled = dyme.rollout(policy, [inputs], dyme.keyed_uniforms(0, 0, [0, 1], 4, 9), 1.0)
    groups = benchmark.coin_flips(policy, rolled, examples[:2], 1.0, 0.0)
    assert dyme.choose_mode(groups.correct).all() and not dyme.no_variance(groups.rewards).any()
    assert groups.correct[:, :2].tolist() == [[1, 0], [1, 0]] and torch.equal(groups.correct, groups.rewards)
    assert [len(r.ids) for group in groups.responses for r in group] == [9] * 8


@pytest.fixture
def by_onednn(tiny: Policy) -> torch.nn.Module:
    model = copy.deepcopy(tiny.model)
    onednn.use_onednn(model, least=0)
    if not any(isinstance(module, onednn.Linear) for module in model.modules()):
        pytest.skip("for x86 processors")
    return model


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_by_onednn_is_a_linear_layer(bias: bool, by_onednn: torch.nn.Module) -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(24, 40, bias=bias)
    ours = copy.deepcopy(plain)
    ours.__class__ = onednn.Linear
    calls, product = [], onednn.product
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onednn, "product", lambda a, b: calls.append(1) or product(a, b))
        for shape in ((24,), (7, 24), (2, 7, 24), (2, 3, 7, 24), (0, 24)):
            x = torch.randn(*shape).requires_grad_()
            y = x.detach().clone().requires_grad_()
            a, b = plain(x), ours(y)
            a.square().sum().backward(), b.square().sum().backward()
            assert a.shape == b.shape and torch.allclose(a, b, atol=1e-6) and torch.allclose(x.grad, y.grad, atol=1e-5)
    assert len(calls) == 3 * 4  # forward and both gradients; nothing is multiplied by nothing
    for one, two in zip(plain.parameters(), ours.parameters(), strict=True):
        assert torch.allclose(one.grad, two.grad, atol=1e-4)
    ours.weight.requires_grad_(False)
    before = ours.weight.grad.clone()
    ours(x).sum().backward()
    assert torch.equal(ours.weight.grad, before)
    assert torch.equal(ours.double()(x.double()), copy.deepcopy(plain).double()(x.double()))
    with torch.autocast("cpu", torch.bfloat16):
        assert ours.float()(torch.randn(3, 24)).dtype == torch.bfloat16


def test_a_model_by_onednn_has_the_same_loss_and_gradients(tiny: Policy, by_onednn: torch.nn.Module,
                                                           examples: list[Example]) -> None:
    results = []
    for model in (copy.deepcopy(tiny.model), by_onednn, copy.deepcopy(by_onednn)):
        policy = dataclasses.replace(tiny, model=model)
        sequences = [dyme.Sequence(i, dyme.target_ids(policy, examples[i]), 0.5, False) for i in range(2)]
        inputs = dyme.encode_prompts(policy, examples[:2], room=48)
        logprobs, mask, _ = dyme.sequence_logprobs(policy, model, inputs, [0, 1], sequences, 1.0)
        (logprobs * mask).sum().backward()
        results.append((logprobs * mask, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    for logprobs, gradient in results[1:]:
        assert torch.allclose(results[0][0], logprobs, atol=1e-5)
        assert torch.allclose(results[0][1], gradient, atol=1e-4 * gradient.abs().max().item())


def test_a_torch_without_onednn_works(monkeypatch: Patch, tiny: Policy) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())  # as on a Mac
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    module = runpy.run_path(onednn.__file__)
    model = copy.deepcopy(tiny.model)
    module["use_onednn"](model, least=0)
    assert module["FLOPS"] == {} and all(type(m).__module__ != "<run_path>" for m in model.modules())


def test_the_toy_does_not_multiply_by_onednn() -> None:
    policy = dyme.load_policy("tiny", CPU)
    assert not any(isinstance(module, onednn.Linear) for module in policy.model.modules())


def test_cudnn_attention_is_off_on_a_gpu(monkeypatch: Patch) -> None:
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        parallel.select_device("cpu")
        assert torch.backends.cuda.cudnn_sdp_enabled()
        assert parallel.select_device("cuda:0") == torch.device("cuda:0")
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_the_gpu_check_prints_a_page_whatever_fails(tiny: Policy, examples: list[Example], capsys: Capture) -> None:
    policy = dataclasses.replace(tiny, end_ids=[])
    checks = [check for check in gpu_check.CHECKS if check not in (
        gpu_check.versions, gpu_check.attention_kernels, gpu_check.graph, gpu_check.varied_shapes)]
    for check in [*checks, gpu_check.graph]:  # the last one cannot work here
        gpu_check.report(check.__doc__, lambda check=check: check(policy, examples))
    page = capsys.readouterr().out
    assert "gradients differ by 0.00%" in page and "differ by 0.0000 on average" in page and "0 of 10 steps" in page
    assert ("FAILED" in page) != torch.cuda.is_available()
    commands = gpu_check.commands("tiny", "toy", [["SmolLM2-135M", "gsm8k:folder"]], "runs")
    assert sum("gsm8k:folder" in words for words in commands) == 1
    for words in commands:
        if "dyme.py" in words and "--resume" not in words:
            assert dyme.parse_config(words[words.index("dyme.py") + 1:]).steps == 20
        if "support.benchmark" in words:
            dyme.parse_config(benchmark.split_steps(words[2:])[1])


class FailingGraph:
    """A recording that fails when it ends, as it does after an error in the step."""

    def capture_begin(self, **_: Any) -> None:
        pass

    def capture_end(self) -> None:
        raise RuntimeError("operation failed due to a previous error during capture")


class PooledGraph:
    """A recording, with what CUDA's allocator asks of its pool: new, or in use by another graph."""

    users: ClassVar[dict[object, int]] = {}

    def capture_begin(self, pool: object, **_: Any) -> None:
        assert self.users.get(pool, 1) > 0, "use_count > 0 INTERNAL ASSERT FAILED"
        self.pool = pool
        self.users[pool] = self.users.get(pool, 0) + 1

    def capture_end(self) -> None:
        pass

    def replay(self) -> None:
        pass

    def __del__(self) -> None:
        self.users[self.pool] -= 1


@pytest.fixture
def fake_cuda(monkeypatch: Patch) -> Iterator[None]:
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in (("current_device", lambda: 0), ("current_stream", lambda: stream), ("graph_pool_handle", object),
                        ("stream", lambda s: contextlib.nullcontext()), ("Stream", lambda device: stream)):
        monkeypatch.setattr(torch.cuda, name, value)
    graphs.recorder.cache_clear()
    yield
    graphs.recorder.cache_clear()


def test_every_rollout_can_record_though_the_graphs_of_the_last_one_are_gone(fake_cuda: None, monkeypatch: Patch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", PooledGraph)
    model = torch.nn.Module()
    for _ in range(3):
        assert graphs.capture(model, lambda: None).__name__ == "replay"  # dropped at once
    assert not hasattr(model, "uncapturable") and len(PooledGraph.users) == 1


@pytest.mark.parametrize("error", [RuntimeError("cudaErrorStreamCaptureUnsupported: in aten::item"),
                                   torch.OutOfMemoryError("CUDA out of memory")])
def test_a_failed_capture_says_its_first_cause_and_decoding_goes_on(
        error: Exception, fake_cuda: None, monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FailingGraph)
    model, tries = torch.nn.Module(), []

    def step() -> None:
        tries.append(1)
        raise error

    if isinstance(error, torch.OutOfMemoryError):
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            graphs.capture(model, step)
        assert not hasattr(model, "uncapturable")  # memory may be there the next time
        return
    assert graphs.capture(model, step) is step and graphs.capture(model, step) is step
    assert len(tries) == 1  # not tried again
    said = capsys.readouterr().err
    assert "cudaErrorStreamCaptureUnsupported" in said and "previous error" not in said


def test_inputs_for_a_gpu_are_pinned_and_images_in_half_precision(monkeypatch: Patch) -> None:
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x)
    monkeypatch.setattr(parallel, "half_precision", lambda: torch.bfloat16)
    inputs = {"input_ids": torch.tensor([[1]]), "pixel_values": torch.rand(1, 3, 4, 4),
              "pixel_attention_mask": torch.ones(1, 4, 4, dtype=torch.int64)}
    assert feed.for_device(inputs, torch.device("cpu")) is inputs
    ready = feed.for_device(inputs, torch.device("cuda"))
    assert ready["pixel_values"].dtype == torch.bfloat16 and ready["input_ids"].dtype == torch.int64
    assert ready["pixel_attention_mask"].dtype == torch.bool and len(pinned) == 3
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert feed.worker_threads() == 15
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert feed.worker_threads() == 3


def test_a_number_of_processes_alone_does_not_mean_torchrun(monkeypatch: Patch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")  # as some clusters do
    with parallel.processes("cpu"):
        assert parallel.count() == 1


def cuda_policy() -> Policy:
    policy = new_policy(0)
    return dataclasses.replace(policy, model=policy.model.to("cuda"), device=torch.device("cuda"), end_ids=[])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_samples_what_plain_steps_do(examples: list[Example], monkeypatch: Patch) -> None:
    policy, results, captured = cuda_policy(), [], []
    capture = graphs.capture
    for wrapper in (lambda *args: captured.append(capture(*args)) or captured[-1], lambda _, step: step):
        monkeypatch.setattr(graphs, "capture", wrapper)
        inputs = dyme.encode_prompts(policy, examples[:3], room=24)
        for _ in range(2):
            rolled = dyme.rollout(policy, [inputs], dyme.keyed_uniforms(0, 0, range(3), 4, 24), 1.0)
        results.append(rolled)
    assert [step.__name__ for step in captured] == ["replay", "replay"]  # they were graphs, in both rollouts
    assert (results[0].ids == results[1].ids).float().mean() > 0.95


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("length", [64, 192, 320])  # L % 128 == 64: where cuDNN's backward gave NaN (pytorch#196678)
def test_cuda_attention_with_a_mask_and_very_negative_scores_has_finite_gradients(length: int) -> None:
    parallel.select_device("cuda")
    torch.manual_seed(0)
    q = torch.randn(1, 4, length, 64, device="cuda", dtype=torch.bfloat16)
    k = -20 * q + torch.randn_like(q)  # a logsumexp far below -88.7
    visible = torch.ones(1, 1, length, length, dtype=torch.bool, device="cuda").tril()
    mask = attention.additive_mask(visible, SimpleNamespace(num_attention_heads=4, num_key_value_heads=4), q.dtype)
    q.requires_grad_(), k.requires_grad_()
    F.scaled_dot_product_attention(q, k, torch.ones_like(q), attn_mask=mask).sum().backward()
    assert q.grad.isfinite().all() and k.grad.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_shared_prompts_use_a_fast_attention_kernel_and_train_on_a_gpu(examples: list[Example]) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    policy = cuda_policy()
    trainer = dyme.make_trainer(Config(lr=1e-3, generations=4, max_new_tokens=24), policy)
    trainer.score = benchmark.coin_flips
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):  # or an error
        metrics, _ = take(trainer, examples[:4], 0, "dyme", 1e-3)
    assert metrics["grad_norm"] > 0 and metrics["skipped_steps"] == 0


# ---- The README -----------------------------------------------------------------------------------


def test_help_knows_every_flag_and_the_readmes_name_nothing_else(runs: Path, capsys: Capture) -> None:
    here = Path(dyme.__file__).parent
    readme = (here / "README.md").read_text() + (here / "support" / "README.md").read_text()
    flags = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(Config)}
    with pytest.raises(SystemExit):
        dyme.parse_config(["--help"])
    shown = capsys.readouterr().out
    assert all(f"{flag} " in shown for flag in flags)
    assert run(runs, "a", "--steps", "1") == 0
    assert all(f"`{key}`" in readme for key in files.read_jsonl(runs / "a" / "metrics.jsonl")[0])  # the glossary
    assert {"accuracy", "any_format", "valid_thinking", "in_format", "groundedness", "accuracy_sum"} <= set(
        files.read_jsonl(runs / "a" / "evaluations.jsonl")[0])
    mentioned = set(re.findall(r"--[a-z][a-z-]+", readme)) - {"--help", "--nproc", "--logdir"}  # of other programs
    code = (here / "eval.py").read_text() + (here / "support" / "make_facts.py").read_text()
    assert not [flag for flag in mentioned if flag not in flags and f'"{flag}"' not in code]
    # Functions and metrics that the READMEs name exist.
    names = set(re.findall(r"`([a-z]+_[a-z_]+)`", readme))
    modules = [dyme, reward, evaluation, ablations, full_dyme, settings, run_folders, domains, parallel, files, onednn]
    known = [*modules, Config(), test_dyme, test_course, torch.nn.Module(), dyme.Policy]
    written = [files.read_jsonl(runs / "a" / name)[0] for name in ("metrics.jsonl", "held-out-1.jsonl",
                                                                  "evaluations.jsonl")]
    others = set().union(*written) | set(test_course.EXERCISES) | {"any_match", "multiple_choice", "visual_fact", "helper_calls",
                                                                     "helper_failures"}
    assert len(names) > 30 and not [n for n in names - others if not any(hasattr(place, n) for place in known)]


def test_a_setting_without_a_comment_is_still_a_flag() -> None:
    @dataclasses.dataclass
    class Settings:
        steps: int = 3
        # A title
        name: str = "x"  # what it is called

    given = settings.build_parser(Settings, "", {}, {}).parse_args(["--steps", "4", "--name", "y"])
    assert vars(given) == {"steps": 4, "name": "y"}


def test_the_readmes_walk_through_runs_as_printed(
        tiny: Policy, tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    readme = (Path(dyme.__file__).parent / "README.md").read_text()
    code = re.search(r"```python\n(import torch\n.*?)```", readme, re.DOTALL)[1]
    monkeypatch.setattr(dyme, "load_policy", lambda *_: tiny)
    (tmp_path / "walk.py").write_text(code)
    runpy.run_path(str(tmp_path / "walk.py"))
    assert "grad_fn" in capsys.readouterr().out
