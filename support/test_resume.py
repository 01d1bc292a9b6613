"""A run that is killed, stopped, or out of memory: no finished step is lost, no result changes."""

import itertools
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dyme
from dyme import Step, Trainer
from reward import Example
from support import files
from support import runs as run_folders
from test_dyme import Capture, Patch, near, run, same_weights, without_times


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["dyme", "two-stage"])
def test_a_killed_run_resumes_bit_exactly(runs: Path, monkeypatch: Patch, mode: str) -> None:
    flags = ["--mode", mode, "--sft-steps", "3", "--steps", "6", "--save-every", "2",
             "--eval-every", "2"]
    assert run(runs, "whole", *flags) == 0
    real, save = dyme.train_step, dyme.save_checkpoint

    def killed(trainer: Trainer, examples: list[Example], step: int, *rest: Any) -> Step:
        if step == 5:  # stands in for a kill: step 4 is logged, the checkpoint is of step 4
            monkeypatch.setattr(dyme, "save_checkpoint", lambda *_: None)
            raise SystemError
        return real(trainer, examples, step, *rest)

    monkeypatch.setattr(dyme, "train_step", killed)
    with pytest.raises(SystemError):
        run(runs, "killed", *flags)
    with (runs / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # and a line cut short
    monkeypatch.setattr(dyme, "train_step", real)
    monkeypatch.setattr(dyme, "save_checkpoint", save)
    assert torch.load(runs / "killed" / "checkpoint" / "training_state.pt")["step"] == 4
    assert run(runs, "killed", "--resume") == 0
    assert same_weights(runs / "whole", runs / "killed")
    for file in ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl"):
        assert without_times(runs / "whole" / file) == without_times(runs / "killed" / file)
    steps = [row["step"] for row in files.read_jsonl(runs / "killed" / "metrics.jsonl")]
    assert steps == [*range(6)]
    assert run(runs, "killed", "--resume") == 0  # a finished run has nothing left to do


@pytest.mark.slow
def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(
        runs: Path, monkeypatch: Patch, capsys: Capture) -> None:
    flags = ["--steps", "4", "--eval-every", "0", "--save-every", "0",
             "--precision", "bf16"]  # exact within a precision
    assert run(runs, "whole", *flags) == 0
    real = dyme.train_step

    def interrupted(trainer: Trainer, examples: list[Example], step: int, *rest: Any) -> Step:
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(trainer, examples, step, *rest)

    monkeypatch.setattr(dyme, "train_step", interrupted)
    assert run(runs, "stopped", *flags) == 130
    assert f"--resume --out {runs / 'stopped'}" in capsys.readouterr().out
    assert len(files.read_jsonl(runs / "stopped" / "metrics.jsonl")) == 2
    monkeypatch.setattr(dyme, "train_step", real)
    assert run(runs, "stopped", "--resume") == 0
    assert same_weights(runs / "whole", runs / "stopped")


def test_ctrl_c_twice_ends_the_process_at_once_but_a_sigterm_after_it_does_not(
        monkeypatch: Patch) -> None:
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


def out_of_memory_once(monkeypatch: Patch, call: int) -> None:
    """Let the loss run out of memory in its `call`th call."""
    calls, real = itertools.count(1), dyme.policy_loss

    def failing(*args: Any) -> Tensor:
        if next(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args)

    monkeypatch.setattr(dyme, "policy_loss", failing)


@pytest.mark.slow
def test_out_of_memory_halves_the_micro_batch_and_changes_no_result(
        runs: Path, monkeypatch: Patch, capsys: Capture) -> None:
    flags = ["--steps", "2", "--prompts", "4", "--eval-every", "0"]
    assert run(runs, "small", *flags, "--micro-batch", "1") == 0
    # Of the two halves of the first step one is done: its gradient must not be counted twice.
    out_of_memory_once(monkeypatch, call=2)
    assert run(runs, "halved", *flags, "--micro-batch", "2") == 0
    assert "out of memory: --micro-batch 1 from now on" in "".join(capsys.readouterr())
    assert same_weights(runs / "small", runs / "halved")
    names = ("metrics.jsonl", "samples.jsonl")
    for name in names:
        assert without_times(runs / "small" / name) == without_times(runs / "halved" / name)


@pytest.mark.slow
@pytest.mark.parametrize("call", [2, 4])  # in the first step, and in the second
def test_a_step_that_is_taken_again_buffers_its_failures_once(
        call: int, runs: Path, monkeypatch: Patch) -> None:
    flags = ["--steps", "3", "--prompts", "4", "--eval-every", "0", "--switch", "budget:12"]
    assert run(runs, "whole", *flags, "--micro-batch", "2") == 0
    out_of_memory_once(monkeypatch, call)
    assert run(runs, "halved", *flags, "--micro-batch", "2") == 0
    memorized = [[row["memorized"] for row in files.read_jsonl(runs / name / "metrics.jsonl")]
                 for name in ("whole", "halved")]
    assert memorized == [[0, 0, 1]] * 2
    near(runs / "whole", runs / "halved")


@pytest.mark.slow
def test_an_evaluation_that_does_not_fit_is_made_with_fewer_rows_at_a_time(
        runs: Path, monkeypatch: Patch) -> None:
    sizes, real = [], dyme.respond

    def respond(policy: Any, rows: Any, longest: int, batch: int) -> list[dict[str, Any]]:
        sizes.append(batch)
        if batch > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(policy, rows, longest, batch)

    monkeypatch.setattr(dyme, "respond", respond)
    assert run(runs, "a", "--steps", "1") == 0
    assert sizes[0] > 20 >= sizes[-1]
    assert len(files.read_jsonl(runs / "a" / "evaluations.jsonl")) == 2


@pytest.mark.slow
def test_out_of_memory_while_the_weights_change_is_not_tried_again(
        runs: Path, monkeypatch: Patch, capsys: Capture) -> None:
    def fail(*_: Any, **__: Any) -> None:  # AdamW may have made half of its state by then
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    assert run(runs, "a", "--steps", "2", "--micro-batch", "2", "--eval-every", "0") == 2
    assert "from now on" not in "".join(capsys.readouterr())


@pytest.mark.slow
def test_out_of_memory_with_one_prompt_ends_the_run_and_keeps_finished_steps(
        runs: Path, monkeypatch: Patch, capsys: Capture) -> None:
    out_of_memory_once(monkeypatch, call=4)
    flags = ["--steps", "3", "--eval-every", "0", "--save-every", "0", "--micro-batch", "1"]
    assert run(runs, "a", *flags) == 2
    assert "--micro-batch" in capsys.readouterr().err
    assert len(files.read_jsonl(runs / "a" / "metrics.jsonl")) == 1
    assert run(runs, "a", "--resume") == 0


@pytest.mark.slow
def test_a_crash_between_the_two_moves_of_a_save_loses_nothing(runs: Path) -> None:
    assert run(runs, "a", "--steps", "2") == 0
    (runs / "a" / "checkpoint").rename(runs / "a" / "checkpoint.old")
    assert run(runs, "a", "--resume") == 0
    assert (runs / "a" / "checkpoint" / "training_state.pt").exists()
