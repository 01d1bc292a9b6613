"""Several processes train and evaluate as one; devices; threads that prepare inputs."""

import ctypes
import dataclasses
import functools
import os
import runpy
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import dyme
import eval as evaluation
from reward import Example
from support import UserError, fast, files, parallel, toy
from test_dyme import CPU, HERE, Capture, Patch, near, run, without_times

DRIVER = """
import dataclasses, os, sys
import dyme
from support import UserError, toy
toy.SPLITS = {"train": (0, 16), "val": (16, 7), "test": (24, 8)}
verify, policy_loss, calls = dyme.verify, dyme.policy_loss, []

def mixed(text, example, finished):  # so that some prompts explore and others memorize
    right = (len(text) + len(example.question)) % 4 == 0
    return dataclasses.replace(verify(text, example, finished), correct=right)

def breaking(*args):
    calls.append(1)
    if len(calls) == 5 and os.environ.get("RANK") == "1" and "breaks" in sys.argv:
        raise UserError("row 7: is broken")
    return policy_loss(*args)

dyme.verify, dyme.policy_loss = mixed, breaking
flags = "--steps 3 --prompts 5 --micro-batch 2 --generations 4 --max-new-tokens 12 --eval-every 2"
sys.argv[1:] = [*flags.split(), *sys.argv[1:]] if "--resume" not in sys.argv else sys.argv[1:]
sys.exit(dyme.main())
"""
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def in_two(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run the driver in two processes, by torchrun."""
    (folder / "driver.py").write_text(DRIVER)
    environment = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *TORCHRUN, "driver.py", *flags], cwd=folder,
                          env=environment, check=False, text=True, capture_output=True, timeout=120)


def alone(folder: Path, monkeypatch: Patch, *flags: str) -> None:
    """Run the driver in this process."""
    with monkeypatch.context() as patch:
        for place, name in ((dyme, "verify"), (dyme, "policy_loss"), (toy, "SPLITS")):
            patch.setattr(place, name, getattr(place, name))  # so that the driver's end with it
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["driver.py", *flags])
        (folder / "driver.py").write_text(DRIVER)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path("driver.py")
    assert not ended.value.code


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["dyme", "sft"])
def test_two_processes_train_as_one(tmp_path: Path, monkeypatch: Patch, mode: str) -> None:
    alone(tmp_path, monkeypatch, "--out", "one", "--mode", mode)
    done = in_two(tmp_path, "--out", "two", "--mode", mode)
    assert done.returncode == 0, done.stderr
    one, two = (without_times(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert len(one) == 3
    if mode == "dyme":
        assert 0 < np.mean([row["memorized"] for row in one]) < 1
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            close = pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            assert b[key] == close, key
    near(tmp_path / "one", tmp_path / "two")
    held_out = [(tmp_path / name / "held-out-3.jsonl").read_text() for name in ("one", "two")]
    assert held_out[0] == held_out[1]
    assert held_out[0].count("\n") == 8  # every row once, in order; one is of a new kind


@pytest.mark.slow
def test_two_processes_evaluate_as_one(
        tmp_path: Path, capsys: Capture) -> None:
    flags = ["tiny", "--limit", "7", "--samples", "2", "--device", "cpu", "--out"]
    evaluation.main([*flags, str(tmp_path / "one")])
    command = [sys.executable, *TORCHRUN, str(HERE / "eval.py"), *flags, str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (done.stdout.count("tiny"), capsys.readouterr().out.count("tiny")) == (1, 1)  # one table
    results = [(tmp_path / name / "predictions.jsonl").read_text() for name in ("one", "two")]
    assert results[0] == results[1]
    assert results[0].count("\n") == 8


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_and_another_number_of_them_resumes(
        tmp_path: Path, monkeypatch: Patch) -> None:
    broken = in_two(tmp_path, "--out", "breaks")
    assert broken.returncode == 1
    assert "error: row 7: is broken" in broken.stderr
    assert 0 < len(files.read_jsonl(tmp_path / "breaks" / "metrics.jsonl")) < 3
    alone(tmp_path, monkeypatch, "--out", "breaks", "--resume")
    alone(tmp_path, monkeypatch, "--out", "whole")
    near(tmp_path / "breaks", tmp_path / "whole")


def test_a_number_of_processes_alone_does_not_mean_torchrun(monkeypatch: Patch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")  # as some clusters do
    with parallel.processes("cpu"):
        assert parallel.count() == 1


def test_fewer_prompts_than_processes_are_refused(monkeypatch: Patch) -> None:
    parallel.check_share(1)
    monkeypatch.setattr(parallel, "count", lambda: 3)
    parallel.check_share(3)
    with pytest.raises(UserError, match="--prompts 2: fewer than the 3 processes"):
        parallel.check_share(2)


def test_processes_share_prompts(monkeypatch: Patch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        shares += [*dyme.share(8)]
        assert len(dyme.share(8)) in (2, 3)
    assert shares == [*range(8)]


def test_no_scaler_where_nothing_can_overflow() -> None:
    assert not parallel.gradient_scaler(dyme.load_policy("tiny", CPU).model, "bf16").is_enabled()


def test_processes_that_differ_in_flags_or_rows_are_refused(
        runs: Path, monkeypatch: Patch, capsys: Capture) -> None:
    def gather(value: Any) -> list[Any]:
        if isinstance(value, tuple):  # settings and rows; here, as if another process had others
            return [value, (dataclasses.replace(value[0], seed=7), value[1])]
        return [value]

    monkeypatch.setattr(parallel, "gather", gather)
    assert run(runs, "a", "--steps", "1") == 2
    assert "differ in their flags or rows" in capsys.readouterr().err
    assert not (runs / "a").exists()


def test_other_weights_than_those_of_other_processes_or_of_before_are_refused(
        tiny: dyme.Policy, monkeypatch: Patch) -> None:
    trainer = dyme.make_trainer(dyme.Config(beta=0.1, mode="grpo", plain=True), tiny)
    assert not any(p.requires_grad for p in dyme.load_reference(trainer, HERE, 0).parameters())
    dyme.load_reference(trainer, HERE, 0)
    trainer.kept["reference"][0] += 0.1
    with pytest.raises(UserError, match="tiny: has other weights than when the run began"):
        dyme.load_reference(trainer, HERE, 0)
    parallel.check_same(tiny.model)
    monkeypatch.setattr(parallel, "gather", lambda value: [value, value + 0.1])
    with pytest.raises(UserError, match="have loaded different weights"):
        parallel.check_same(tiny.model)


def test_a_gradient_that_no_process_has_stays_away(monkeypatch: Patch) -> None:
    ours, theirs, nobodys = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    ours.grad = torch.ones(2)
    monkeypatch.setattr(parallel, "gather", lambda used: [used, [False, True, False]])
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda gradient: gradient.add_(3))
    parallel.sum_gradients([ours, theirs, nobodys])
    assert torch.equal(ours.grad, torch.full((2,), 4.0))
    assert torch.equal(theirs.grad, torch.full((2,), 3.0))
    assert nobodys.grad is None  # else AdamW would decay it


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


def test_freed_memory_is_kept_and_onednn_keeps_few_shapes(monkeypatch: Patch) -> None:
    calls: list[tuple[int, int]] = []
    library = SimpleNamespace(mallopt=lambda *call: calls.append(call))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")  # whoever sets it has reasons
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    parallel.select_device("cpu")
    assert calls == [(-1, -1), (-4, 0)]  # M_TRIM_THRESHOLD: never; M_MMAP_MAX: none
    assert os.environ["LRU_CACHE_CAPACITY"] == "7"
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "16"
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    parallel.select_device("cpu")  # of another system's library nothing is asked


def test_inputs_for_a_gpu_are_pinned_and_images_in_half_precision(monkeypatch: Patch) -> None:
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x)
    mask = torch.ones(1, 4, 4, dtype=torch.int64)
    inputs = {"input_ids": torch.tensor([[1]]), "pixel_values": torch.rand(1, 3, 4, 4),
              "pixel_attention_mask": mask}
    assert parallel.for_device(inputs, torch.device("cpu"), torch.bfloat16) is inputs
    cuda = torch.device("cuda")
    assert parallel.for_device(inputs, cuda, None)["pixel_values"].dtype == torch.float32
    pinned.clear()
    ready = parallel.for_device(inputs, cuda, torch.bfloat16)
    assert ready["pixel_values"].dtype == torch.bfloat16
    assert ready["input_ids"].dtype == torch.int64
    assert ready["pixel_attention_mask"].dtype == torch.bool
    assert len(pinned) == 3


def test_inputs_are_prepared_without_dropping_the_casts_of_the_main_thread(
        examples: list[Example], monkeypatch: Patch) -> None:
    # What autocast has cast is kept for all threads, and dropped when any of them leaves it.
    policy, asked = dyme.load_policy("tiny", torch.device("cpu")), []
    policy = dataclasses.replace(
        policy, autocast=functools.partial(torch.autocast, "cpu", torch.bfloat16))
    monkeypatch.setattr(dyme.parallel, "for_device", lambda *given: asked.append(given) or given[0])
    layer, x = torch.nn.Linear(4, 4), torch.ones(1, 4)

    def casts() -> int:
        with torch.profiler.profile() as profile:
            layer(x)
        return sum(event.name == "aten::to" for event in profile.events())

    with policy.autocast():
        first, again = casts(), casts()
        list(parallel.in_threads(
            lambda rows, processor: dyme.encode_ahead(policy, rows, processor, 1),
            policy.processor, [examples[:1]], 1))
        assert asked[0][2] == torch.bfloat16
        assert first > again == casts()


def test_what_does_not_fit_is_tried_with_half_the_size() -> None:
    tried = []

    def work(size: int) -> str:
        tried.append(size)
        if size > 3:
            raise torch.OutOfMemoryError
        return f"done by {size}"

    assert parallel.while_it_fits(12, work) == "done by 3"
    assert tried == [12, 6, 3]
    with pytest.raises(torch.OutOfMemoryError):
        parallel.while_it_fits(1, lambda size: work(4))


def test_too_little_memory_is_not_taken_for_a_damaged_or_unknown_model(
        monkeypatch: Patch) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    policy = dyme.load_policy("tiny", torch.device("cpu"))
    monkeypatch.setattr(dyme, "load_pretrained", fail)
    monkeypatch.setattr(fast, "trial_logprobs", fail)
    with pytest.raises(torch.OutOfMemoryError):
        dyme.load_policy("tiny", policy.device)
    with pytest.raises(torch.OutOfMemoryError):
        fast.speed_up(policy)


def test_work_in_threads_comes_in_order_each_thread_with_its_own_processor(
        monkeypatch: Patch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "two")  # not torchrun's, for there is none
    processor, used, before, barrier = [], [], threading.active_count(), threading.Barrier(3)

    def work(job: int, own: list[int]) -> int:
        if job < 3:
            barrier.wait(20)  # all three threads are at work
        own.append(job)
        used.append(id(own))
        if job == 7:
            raise UserError("job 7")
        return job

    stream = parallel.in_threads(work, processor, range(9), ahead=3)
    assert [next(stream) for _ in range(7)] == [*range(7)]
    with pytest.raises(UserError, match="job 7"):
        next(stream)
    assert len({*used}) == 3  # one core of the four is left for the step itself
    assert processor == []
    assert threading.active_count() == before


def test_processes_of_a_machine_share_its_cores(monkeypatch: Patch) -> None:
    asked, real = [], parallel.ThreadPoolExecutor
    monkeypatch.setattr(parallel, "ThreadPoolExecutor", lambda n: asked.append(n) or real(n))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for joined in (True, False):
        monkeypatch.setattr(parallel.dist, "is_initialized", lambda joined=joined: joined)
        assert [*parallel.in_threads(lambda job, _: job, None, range(3), ahead=9)] == [0, 1, 2]
    assert asked == [3, 7]  # one core is kept for the step itself


def test_threads_end_with_their_reader() -> None:
    before, done = threading.active_count(), []
    stream = parallel.in_threads(lambda job, _: done.append(job), None, range(1000), ahead=2)
    next(stream)
    stream.close()
    assert threading.active_count() == before
    assert len(done) < 10


@pytest.mark.parametrize(("flags", "images", "size"), [
    ({}, True, 2), ({}, False, 1), ({"max_new_tokens": 32}, False, 3),
    ({"max_new_tokens": 8}, False, 8),  # no more than there are
    ({"mode": "sft", "max_new_tokens": 96}, False, 6), ({"mode": "sft", "prompts": 1}, False, 2)])
def test_a_cpu_takes_some_thousand_tokens_in_a_pass(
        flags: dict[str, Any], images: bool, size: int) -> None:
    cfg = dyme.Config(**({"prompts": 8, "max_new_tokens": 300} | flags))
    rows = [Example("q", "1"), Example("q", "1", image=str if images else None)]
    assert parallel.pass_size(torch.device("cpu"), cfg, rows) == size
