"""Tests of run folders: how long a run is, what it refuses, and what it survives."""

import contextlib
import dataclasses
import errno
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers.hf_argparser import HfArg

import dyme
import eval as evaluation
from dyme import Config
from reward import Example
from support import DivergedError, UserError, data, files, parallel, settings, thinking, toy
from support import runs as run_folders
from test_dyme import Capture, Patch, Row, run, same_weights, without_times

STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU]
HERE = os.environ | {"PYTHONPATH": str(Path(dyme.__file__).parent)}


def at_step(monkeypatch: Patch, number: int, act: Callable[[], Any]) -> None:
    """Do something before a step is taken."""
    real = dyme.train_step

    def hooked(trainer: dyme.Trainer, examples: list[Any], *rest: Any, **named: Any) -> Any:
        if (named["step"] if "step" in named else rest[0]) == number:
            act()
        return real(trainer, examples, *rest, **named)
    monkeypatch.setattr(dyme, "train_step", hooked)


def fail(error: BaseException) -> None:
    raise error


def written(folder: Path) -> dict[str, bytes]:
    """What a folder holds."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file()}


def change_config(run_folder: Path, **changes: Any) -> None:
    saved = json.loads((run_folder / "config.json").read_text())
    (run_folder / "config.json").write_text(json.dumps(saved | changes))


def saved_step(run_folder: Path) -> int:
    state = torch.load(run_folder / "checkpoint" / "training_state.pt", weights_only=True)
    return state["step"]


# ---- How long a run is ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode, steps", [
    ("dyme", 100),  # 2 passes over 400 rows at 8 a step
    ("grpo", 100),
    ("sft", 25),  # at 8 x 4 a step
    ("two-stage", 13 + 48),  # one pass of SFT: 13 steps and 416 rows; 384 are left for GRPO
])
def test_epochs_are_passes_over_the_data_in_every_mode(mode: Any, steps: int) -> None:
    cfg = Config(mode=mode, epochs=2.0, sft_steps=0, prompts=8, generations=4)
    settings.settle_length(cfg, rows=400)
    assert cfg.steps == steps
    assert cfg.sft_steps == (13 if mode == "two-stage" else 0)
    seen = sum(len(dyme.step_rows(cfg, step, 400)) for step in range(cfg.steps))
    assert 800 <= seen < 800 + 32
    cfg.steps, cfg.resume = 7 * steps, True  # a run of before: it keeps its length
    settings.settle_length(cfg, rows=400)
    assert cfg.steps == 7 * steps


def test_a_long_reason_is_cut_between_words() -> None:
    with pytest.raises(UserError) as told, settings.loading("m", ["tiny"]):
        raise OSError("because of it " * 20 + "https://huggingface.co")
    assert "(because of it because" in str(told.value)
    assert "because of it ...); give" in str(told.value)


def test_a_model_without_what_is_asked_of_it_is_of_an_unknown_family() -> None:
    with pytest.raises(UserError, match="README.md has the families"), settings.loading("m", []):
        raise AttributeError("'Cache' object has no attribute 'layers'")


@pytest.mark.parametrize("flags, told", [
    (["--mode", "sft", "--sft-steps", "9"], ["--sft-steps has no effect with --mode sft"]),
    (["--mode", "sft", "--temperature", "0.5", "--thinking-weight", "2"],
     ["--temperature has no effect with --mode sft",
      "--thinking-weight has no effect with --mode sft"]),
    (["--model", str(toy.BASE), "--data", "a.jsonl", "--traces", "high"],
     ["--traces has no effect with --data a.jsonl"]),
    (["--data", "toy:withheld", "--traces", "high", "--temperature", "0.5"], []),
    (["--mode", "two-stage", "--sft-steps", "9"], [])])
def test_a_flag_without_effect_is_told(
        flags: list[str], told: list[str], capsys: Capture) -> None:
    dyme.parse_config(flags)
    assert capsys.readouterr().err.splitlines() == [f"warning: {line}" for line in told]
    settings.implied({"resume": True, "sft_steps": 9})  # its mode is that of the run
    assert not capsys.readouterr().err


def test_steps_are_what_they_say_and_real_two_stage_gets_one_pass_of_sft() -> None:
    cfg = dyme.parse_config(["--model", str(toy.BASE), "--data", "x.jsonl", "--mode", "two-stage",
                             "--steps", "90"])
    settings.settle_length(cfg, rows=2560)
    assert (cfg.steps, cfg.sft_steps) == (90, 10)
    cfg = dyme.parse_config(["--mode", "two-stage", "--epochs", "2"])
    with pytest.raises(UserError, match="--sft-steps 150: SFT takes all"):
        settings.settle_length(cfg, rows=2048)  # 150 x 64 rows are more than two passes


# ---- The reference of the KL ---------------------------------------------------------------------


@pytest.mark.slow
def test_the_kl_of_two_stage_is_to_the_model_after_sft_also_when_resumed(
        runs: Path, monkeypatch: Patch, capsys: Capture) -> None:
    flags = ["--mode", "two-stage", "--sft-steps", "2", "--steps", "5", "--beta", "0.5",
             "--lr", "0.01", "--save-every", "3"]
    assert run(runs, "whole", *flags) == 0
    kl = [row["kl"] for row in files.read_jsonl(runs / "whole" / "metrics.jsonl")]
    assert kl[:2] == [0, 0]
    assert kl[2] == pytest.approx(0, abs=1e-6)  # GRPO starts at its reference
    assert max(kl[3:]) > 1e-5  # AdamW begins anew: the first step of GRPO may be a small one
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: fail(SystemError()))
        with pytest.raises(SystemError):
            run(runs, "killed", *flags)
    assert run(runs, "killed", "--resume") == 0
    assert same_weights(runs / "whole", runs / "killed")
    logs = [without_times(runs / name / "metrics.jsonl") for name in ("whole", "killed")]
    assert logs[0] == logs[1]


# ---- Who may work in a folder, and on what -------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from support import files
with files.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Another process works in a folder; it is killed at the end."""
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], env=HERE,
                             stdout=subprocess.PIPE)
    assert other.stdout and other.stdout.readline() == b"held\n"
    try:
        yield
    finally:
        other.kill()
        other.wait()


@pytest.mark.slow
def test_one_process_at_a_time_and_a_killed_one_lets_go(runs: Path, capsys: Capture) -> None:
    assert run(runs, "a", "--steps", "1") == 0
    assert not (runs / "a" / files.LOCK).exists()
    a = str(runs / "a")
    with held(runs / "a"):
        before = written(runs / "a")
        for program in (lambda: run(runs, "a", "--resume"),
                        lambda: run(runs, "a", "--steps", "2", "--overwrite"),
                        lambda: run_folders.run_main(lambda: evaluation.main([a, "--limit", "1"]))):
            assert program() == 2
            assert "another process works in it" in capsys.readouterr().err
        elsewhere = [a, "--limit", "1", "--out", str(runs / "b")]  # reading is free
        assert run_folders.run_main(lambda: evaluation.main(elsewhere)) == 0
        assert written(runs / "a") == before
    assert (runs / "a" / files.LOCK).exists()
    assert run(runs, "a", "--resume") == 0


@pytest.mark.parametrize("change, says", [
    (lambda rows: [row for row in rows if " 5 " not in row["question"]], "rows: 18 then, 17 now"),
    (lambda rows: [row | {"answer": "blue"} for row in rows], "has changed"),
    (lambda rows: rows[::-1], "has changed"),
    (lambda rows: [row | {"trace": "Think."} for row in rows], "has changed"),
])
def test_a_run_does_not_go_on_with_other_rows(
        runs: Path, capsys: Capture, change: Callable[[list[Row]], list[Row]], says: str) -> None:
    rows = [{"question": f"Which bar {i} is the tallest?", "answer": "red"} for i in range(19)]
    (runs / "rows.json").write_text(json.dumps(rows))
    flags = ["--model", str(toy.BASE), "--data", str(runs / "rows.json")]
    assert run(runs, "a", *flags, "--steps", "1") == 0
    assert run(runs, "a", "--resume") == 0
    assert "it is finished" in capsys.readouterr().out
    (runs / "rows.json").write_text(json.dumps(change(rows)))
    before = written(runs / "a")
    assert run(runs, "a", "--resume") == 2
    assert says in capsys.readouterr().err
    assert written(runs / "a") == before
    assert run(runs, "a", "--resume", "--data", "toy") == 2
    assert "--data toy: has changed since the run began" in capsys.readouterr().err


def test_a_run_whose_trace_was_too_long_to_imitate_goes_on(runs: Path, capsys: Capture) -> None:
    rows = [{"question": f"Which bar {i} is the tallest?", "answer": "red", "trace": "red 3."}
            for i in range(9)]
    rows[3]["trace"] = "red 3 and blue 4. " * 300
    (runs / "rows.json").write_text(json.dumps(rows))
    flags = ["--model", str(toy.BASE), "--data", str(runs / "rows.json")]
    assert run(runs, "a", *flags, "--steps", "1") == 0
    assert "warning: 1 training rows" in capsys.readouterr().out
    assert run(runs, "a", "--resume") == 0


def test_a_run_is_tested_on_the_rows_that_it_held_back(runs: Path) -> None:
    rows = [{"question": f"Which bar {i} is the tallest?", "answer": "red"} for i in range(19)]
    path = runs / "rows.json"
    path.write_text(json.dumps(rows))
    assert run(runs, "a", "--model", str(toy.BASE), "--data", str(path), "--steps", "1") == 0
    saved = run_folders.read_config(runs / "a")
    tested = [e.name for e in evaluation.load_test(runs / "a", str(path), saved, 0)]
    assert tested == [e.name for e in data.load_data(str(path), "val")]
    path.unlink()
    with pytest.raises(UserError, match="No such file"):
        evaluation.load_test(runs / "a", str(path), saved, 0)


def test_other_facts_are_other_rows() -> None:
    hashes = [run_folders.describe_rows([Example("q", "a", facts=facts)], [])["hash"]
              for facts in ("red 4", "red 5", "red 4")]
    assert hashes[0] == hashes[2]
    assert hashes[0] != hashes[1]


# ---- A run that starts does not cost the one before ----------------------------------------------


def test_a_run_stopped_before_its_first_evaluation_is_started_again_by_the_same_command(
        runs: Path, monkeypatch: Patch, capsys: Capture) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dyme, "evaluate", stop)
        assert run(runs, "a", "--steps", "1") == 130
    assert (runs / "a" / "config.json").exists()
    assert run(runs, "a", "--steps", "1") == 0
    assert run(runs, "a", "--steps", "1") == 2
    assert "another --out lets it be" in capsys.readouterr().err


@pytest.mark.slow
def test_overwrite_removes_what_a_run_writes_and_nothing_else(runs: Path, capsys: Capture) -> None:
    assert run(runs, "a", "--steps", "2") == 0
    mine = ["held-out-mine.jsonl", "best.json", "checkpoint.md", "notes.jsonl", "helper.jsonl"]
    for name in mine:
        (runs / "a" / name).write_text("{}")
    a = str(runs / "a")
    grpo = ["--mode", "grpo", "--beta", "1", "--data", "toy", "--overwrite"]
    for model in (a, f"{a}/../a/best", f"{a}/checkpoint"):
        assert run(runs, "a", "--model", model, *grpo) == 2
        assert "--out" in capsys.readouterr().err
    rows = [{"question": f"{i}?", "answer": "1"} for i in range(4)]
    (runs / "a" / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = f"{a}/samples.jsonl"
    assert run(runs, "a", "--model", str(toy.BASE), "--data", data, "--overwrite") == 2
    assert (runs / "a" / "held-out-2.jsonl").exists()
    assert run(runs, "a", "--steps", "1", "--overwrite") == 0
    left = {path.name for path in (runs / "a").iterdir()}
    assert left >= {*mine, "held-out-1.jsonl", "checkpoint"}
    assert not left & {"held-out-2.jsonl", run_folders.ASIDE}


@pytest.mark.slow
@pytest.mark.parametrize("error", [
    lambda: fail(UserError("a picture is broken")), lambda: fail(DivergedError("NaN")),
    lambda: fail(KeyError("a bug")), *[lambda number=number: os.kill(os.getpid(), number)
                                       for number in STOP_SIGNALS]])
def test_a_run_that_ends_before_it_saves_brings_the_one_before_back(
        runs: Path, monkeypatch: Patch, capsys: Capture, error: Callable[[], Any]) -> None:
    assert run(runs, "a", "--steps", "2") == 0
    (runs / "a" / "mine.txt").write_text("mine")
    before = written(runs / "a")
    monkeypatch.setattr(dyme, "evaluate", lambda *args: error())  # the first evaluation
    with contextlib.suppress(KeyError):
        assert run(runs, "a", "--steps", "1", "--overwrite") in (1, 2, 130)
    assert written(runs / "a") == before
    assert "the run that was there before is back" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_was_killed_before_it_saved_keeps_the_one_before_aside(
        runs: Path, monkeypatch: Patch, capsys: Capture) -> None:
    assert run(runs, "a", "--steps", "2") == 0
    before = written(runs / "a")
    with monkeypatch.context() as patch:
        patch.setattr(run_folders, "restore", lambda run: None)  # as if killed
        patch.setattr(dyme, "evaluate", lambda *args: fail(KeyboardInterrupt()))
        assert run(runs, "a", "--steps", "1", "--overwrite") == 130
    shutil.copytree(runs / "a", runs / "b")
    assert written(runs / "a" / run_folders.ASIDE) == before
    with monkeypatch.context() as patch:  # once more, and it fails in the ordinary way
        patch.setattr(dyme, "evaluate", lambda *args: fail(UserError("no")))
        assert run(runs, "a", "--steps", "1", "--overwrite") == 2
    assert written(runs / "a") == before
    assert run(runs, "b", "--resume") == 0
    assert "nothing was saved, starting at step 0 of 1" in capsys.readouterr().out
    assert not (runs / "b" / run_folders.ASIDE).exists()


@pytest.mark.slow
@pytest.mark.parametrize("moved", [["checkpoint"], ["checkpoint", "best", "metrics.jsonl"],
                                   ["checkpoint", "samples.jsonl", "evaluations.jsonl"]])
def test_a_kill_among_the_moves_loses_nothing(
        runs: Path, capsys: Capture, moved: list[str]) -> None:
    assert run(runs, "a", "--steps", "2") == 0
    before = written(runs / "a")
    (runs / "a" / run_folders.ASIDE).mkdir()
    for path in filter(Path.exists, [runs / "a" / name for name in moved]):
        path.rename(runs / "a" / run_folders.ASIDE / path.name)
    assert run(runs, "a", "--resume") == 0
    assert written(runs / "a").keys() == before.keys()


@pytest.mark.slow
def test_a_run_that_never_saved_starts_again_and_one_that_has_saved_does_not(
        runs: Path, capsys: Capture) -> None:
    assert run(runs, "a", "--steps", "1") == 0
    (runs / "a" / "metrics.jsonl").unlink()
    (runs / "a" / "checkpoint").rename(runs / "elsewhere")
    before = written(runs / "a")
    assert run(runs, "a", "--resume") == 2
    assert "has no checkpoint to go on from" in capsys.readouterr().err
    assert written(runs / "a") == before
    change_config(runs / "a", saved=False)
    assert run(runs, "a", "--resume") == 0
    assert "nothing was saved, starting at step 0 of 1" in capsys.readouterr().out


def test_a_start_that_fails_leaves_no_folder(runs: Path, capsys: Capture) -> None:
    shutil.copytree(toy.BASE, runs / "base")
    (runs / "base" / "model.safetensors").write_bytes(b"cut")
    assert run(runs, "a", "--model", str(runs / "base"), "--data", "toy") == 2
    assert not (runs / "a").exists()


# ---- What is saved -------------------------------------------------------------------------------


@pytest.mark.slow
def test_broken_weights_and_failing_steps_are_not_saved(
        runs: Path, monkeypatch: Patch, capsys: Capture) -> None:
    def damaged(*names: str) -> Callable[..., Any]:
        def step(trainer: dyme.Trainer, number: int, *rest: Any) -> Any:
            done = real(trainer, number, *rest)
            if number >= 2 and "weights" in names:
                next(trainer.policy.model.parameters()).data.fill_(math.nan)
            trainer.failures = max(0, number - 1) if "steps" in names else 0
            return done
        return step
    real, flags = dyme.take_step, ["--steps", "5", "--save-every", "1", "--eval-every", "0"]
    # A single failed step changes nothing.
    for name, says, last in (("weights", "the weights are not finite", 2),
                             ("steps", "the last 3 steps had no finite loss", 3)):
        monkeypatch.setattr(dyme, "take_step", damaged(name))
        assert run(runs, name, *flags) == 1
        assert says in capsys.readouterr().err
        assert saved_step(runs / name) == last
        weights = dyme.load_policy(str(runs / name), torch.device("cpu")).model.parameters()
        assert all(torch.isfinite(p).all() for p in weights)
        assert not (runs / name / "checkpoint.tmp").exists()
    frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    frozen.weight.fill_(math.inf)
    with pytest.raises(DivergedError):
        run_folders.check_weights(frozen)


@pytest.mark.slow
@pytest.mark.parametrize("whither", ["elsewhere", "nowhere"])
def test_a_checkpoint_that_is_a_link_is_followed_and_replaced(
        runs: Path, capsys: Capture, whither: str) -> None:
    assert run(runs, "a", "--steps", "1") == 0
    checkpoint = runs / "a" / "checkpoint"
    checkpoint.rename(runs / "elsewhere")
    checkpoint.symlink_to(runs / whither)
    assert run(runs, "a", "--resume") == (0 if whither == "elsewhere" else 2)
    assert run(runs, "a", "--steps", "3", "--save-every", "1", "--overwrite") == 0
    assert run(runs, "a", "--resume") == 0
    assert not checkpoint.is_symlink()
    assert (runs / "elsewhere" / "training_state.pt").exists()
    for link in ("checkpoint", "checkpoint.old", "checkpoint.tmp"):  # also one that appears
        files.remove(runs / "a" / link)
        (runs / "a" / link).symlink_to(runs / "nowhere")
    with files.replaced_folder(checkpoint) as folder:
        (folder / "x").touch()
    assert (checkpoint / "x").exists()
    assert not (runs / "a" / "checkpoint.old").is_symlink()


def test_a_checkpoint_of_another_run_or_of_a_later_step_is_refused(
        runs: Path, capsys: Capture) -> None:
    for name in "ab":
        assert run(runs, name, "--steps", "2", "--seed", str(ord(name))) == 0
    (runs / "a" / "checkpoint" / "._model.safetensors").write_bytes(b"as a Mac leaves in a copy")
    assert run(runs, "a", "--resume") == 0
    change_config(runs / "a", warmup=7)  # told, and no other run for that: also if it is killed
    for _ in range(2):  # before it saves again
        shutil.copytree(runs / "a" / "checkpoint", runs / "before", dirs_exist_ok=True)
        assert run(runs, "a", "--resume") == 0
        shutil.rmtree(runs / "a" / "checkpoint")
        (runs / "before").rename(runs / "a" / "checkpoint")
    (runs / "a" / "checkpoint").rename(runs / "kept")
    shutil.copytree(runs / "b" / "checkpoint", runs / "a" / "checkpoint")
    before = written(runs / "a")
    assert run(runs, "a", "--resume") == 2
    assert "it was saved by a run with other settings" in capsys.readouterr().err
    assert written(runs / "a") == before
    shutil.rmtree(runs / "a" / "checkpoint")
    (runs / "kept").rename(runs / "a" / "checkpoint")
    change_config(runs / "a", steps=1)
    assert run(runs, "a", "--resume") == 2
    assert "it is at step 2 of a run of 1" in capsys.readouterr().err
    with (runs / "a" / "checkpoint" / "tokenizer.json").open("a") as file:
        file.write("\n")
    assert run(runs, "a", "--resume") == 2
    assert "other weights or files than those beside it" in capsys.readouterr().err


def test_the_best_weights_are_written_again_if_a_copy_lacks_them(
        runs: Path, tiny: dyme.Policy, examples: list[Example]) -> None:
    trainer = dyme.make_trainer(Config(max_new_tokens=2), tiny)
    trainer.best = 1.0
    dyme.evaluate(trainer, examples[:1], runs, 0, None)
    assert not (runs / "best").exists()  # the base's are not kept
    dyme.evaluate(trainer, examples[:1], runs, 150, None)
    (runs / "best" / "model.safetensors").unlink()
    trainer.best = 1.0
    dyme.evaluate(trainer, examples[:1], runs, 300, None)
    assert not (runs / "best" / "model.safetensors").exists()  # no better: they stay as they are


def test_the_best_weights_are_the_first_of_the_highest_accuracy(
        runs: Path, tiny: dyme.Policy, examples: list[Example], monkeypatch: Patch) -> None:
    trainer, scores = dyme.make_trainer(Config(max_new_tokens=2), tiny), iter((0.2, 0.3, 0.3))
    monkeypatch.setattr(thinking, "summarise", lambda _: {
        "accuracy": next(scores), "any_format": 0.5, "valid_thinking": 0.1, "in_format": 0.9})
    for step in (150, 300):
        dyme.evaluate(trainer, examples[:1], runs, step, None)
    assert trainer.best == 0.3
    (runs / "best" / "model.safetensors").unlink()
    dyme.evaluate(trainer, examples[:1], runs, 450, None)  # as good: the earlier ones stay
    assert not (runs / "best" / "model.safetensors").exists()


def test_a_scaler_goes_on_where_it_was(tiny: dyme.Policy, tmp_path: Path) -> None:
    trainers = [dyme.make_trainer(Config(plain=True), tiny) for _ in range(2)]
    for trainer, scale in zip(trainers, (8.0, 2.0), strict=True):
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    trainers[0].scaler.scale(torch.ones(1))  # which makes its scale
    dyme.save_checkpoint(tmp_path, trainers[0], 3)
    assert dyme.load_checkpoint(tmp_path, trainers[1]) == 3
    assert trainers[1].scaler.state_dict()["scale"] == 8.0


def test_the_summary_pairs_answers_by_name_and_needs_no_first_evaluation(
        runs: Path, capsys: Capture) -> None:
    def row(name: str, question: str, said: str, source: str = "sum") -> Row:
        return {"name": name, "question": question, "answer": "4", "response": said,
                "source": source, "in_format": True, "accuracy": False}

    before = [row("x", "X?", "3"), {"name": "y"}, row("z", "Z?", "5"),
              row("n", "N?", "6", "new_three_sum")]
    after = [row("z", "Z?", "7"), row("y", "Y?", "8"), row("x", "X?", "9"),
             row("n", "N?", "4", "new_three_sum")]
    for step, rows in ((0, before), (4, after)):
        files.write_jsonl(runs / f"held-out-{step}.jsonl", rows)
    files.write_jsonl(runs / "evaluations.jsonl", [
        {"step": step, "accuracy": 0.0, "accuracy_new": new, "rows": 3}
        for step, new in ((0, 0.0), (4, 1.0))])
    run_folders.print_summary(runs, "sft", 4)
    told = capsys.readouterr().out
    assert re.findall(r"(?m)^(?:    )?(\w)(?:\?.*)?$", told) == [*"X39Z57"]
    assert "3 held-out rows, greedy, at steps 0 and 4 of sft" in told
    assert "on combinations it never met    0.000 -> 1.000" in told
    files.write_jsonl(runs / "evaluations.jsonl", [{"step": 4, "accuracy": 0.5, "rows": 3}])
    run_folders.print_summary(runs, "sft", 4)
    assert "at steps 4 and 4 of sft" in capsys.readouterr().out


@pytest.mark.parametrize("act", [
    lambda run: run.rename(run.with_name("b")), lambda run: (run / "config.json").write_text(""),
    lambda run: (run / "config.json").write_text("[1]")])
def test_a_run_whose_folder_moved_or_whose_config_is_damaged_saves_and_says_so(
        runs: Path, monkeypatch: Patch, capsys: Capture, act: Callable[[Path], None]) -> None:
    monkeypatch.setattr(run_folders, "TOLD", set())
    at_step(monkeypatch, 1, lambda: act(runs / "a"))
    assert run(runs, "a", "--steps", "2") == 0
    assert f"{runs / 'a'}: has no config.json that can be read any more" in capsys.readouterr().err
    assert saved_step(runs / "a") == 2


@pytest.mark.parametrize("name, damage", [
    ("held-out-2", {"response": 5}), ("held-out-2", {"thinking_fault": 5}),
    ("held-out-2", {"question": None}), ("evaluations", {"accuracy": "high"}),
    ("evaluations", {"rows": None}), ("metrics", {"truncated": "x"})])
def test_a_run_ends_well_though_its_records_were_edited(
        runs: Path, monkeypatch: Patch, capsys: Capture, name: str, damage: Row) -> None:
    monkeypatch.setattr(run_folders, "TOLD", set())
    assert run(runs, "a", "--steps", "2") == 0
    file = runs / "a" / f"{name}.jsonl"
    files.write_jsonl(file, [row | damage for row in files.read_jsonl(file)])
    assert run(runs, "a", "--resume") == 0
    run_folders.warn(10 * files.read_jsonl(runs / "a" / "metrics.jsonl"))
    told = "the run's records are not as it wrote them" in capsys.readouterr().err
    assert told == (damage not in ({"question": None}, {"rows": None}))  # these are printed so


@pytest.mark.slow
@pytest.mark.parametrize("damage", [
    lambda file: file.unlink(), lambda file: file.write_bytes(file.read_bytes()[:5000]),
    lambda file: file.write_bytes(b""), lambda file: file.write_text("text"),
    lambda file: torch.save({"step": 1}, file), lambda file: torch.save([1], file),
    lambda file: torch.save(torch.load(file) | {"optimizer": {"state": {}, "param_groups": []}},
                            file),
    lambda file: torch.save({k: v for k, v in torch.load(file).items() if k != "kept"}, file),
])
def test_a_damaged_training_state_is_one_line(
        runs: Path, capsys: Capture, damage: Callable[[Path], None]) -> None:
    assert run(runs, "a", "--steps", "1") == 0
    damage(runs / "a" / "checkpoint" / "training_state.pt")
    assert run(runs, "a", "--resume") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "training_state.pt: cannot be read" in error
    assert f"--model {runs / 'a'} --out NEW" in error


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1_000_000, 2_200_000])  # within the weights; within the state
def test_a_failing_disk_is_one_line_and_costs_no_checkpoint(
        runs: Path, monkeypatch: Patch, capsys: Capture, limit: int) -> None:
    def shrink(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    assert run(runs, "first", "--steps", "1") == 0
    for name, flags in (("first", ["--overwrite"]), ("second", ["--save-every", "1"])):
        with monkeypatch.context() as patch:
            at_step(patch, len(flags) - 1, lambda: shrink(limit))
            try:
                assert run(runs, name, "--steps", "2", *flags) == 2
            finally:
                shrink(resource.RLIM_INFINITY)
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "cannot be written" in error
        assert "File too large" in error
        assert {path.name for path in (runs / name).glob("checkpoint*")} == {"checkpoint"}
        assert saved_step(runs / name) == 1
        assert run(runs, name, "--resume") == 0


# ---- What is written, printed and read -----------------------------------------------------------


@pytest.mark.slow
def test_a_log_that_cannot_be_written_ends_no_run(
        runs: Path, monkeypatch: Patch, capsys: Capture) -> None:
    def block() -> None:
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            (runs / "a" / name).unlink()
            (runs / "a" / name).mkdir()
    at_step(monkeypatch, 1, block)
    assert run(runs, "a", "--steps", "4") == 2  # the summary cannot be read
    log = capsys.readouterr().err
    assert log.count("metrics.jsonl: cannot be written") == 1
    assert log.count("evaluations.jsonl: cannot be written") == 1
    assert saved_step(runs / "a") == 4


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_closed_terminal_or_a_full_log_ends_no_run(
        runs: Path, monkeypatch: Patch, capsys: Capture, stream: str) -> None:
    run_folders.TOLD.clear()
    monkeypatch.setattr(sys, stream, open("/dev/full", "w"))
    assert run(runs, "a", "--steps", "2") == 0
    if stream == "stdout":
        assert capsys.readouterr().err.count("warning: stdout: cannot be written") == 1


def test_letters_that_the_terminal_lacks_end_no_run(monkeypatch: Patch) -> None:
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii", write_through=True))
    assert run_folders.run_main(lambda: print("Größe \u2028")) == 0
    assert b"Gr\\xf6\\xdfe" in out.getvalue()


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    row = {"loss": math.nan, "responses": [{"advantage": math.inf}]}
    files.append_row(tmp_path / "a", row)
    assert files.read_jsonl(tmp_path / "a") == [{"loss": None, "responses": [{"advantage": None}]}]


@pytest.mark.slow
def test_lines_that_are_no_rows_are_left_out(runs: Path, capsys: Capture) -> None:
    assert run(runs, "a", "--steps", "2") == 0
    for name in ("metrics", "samples", "evaluations", "held-out-0", "held-out-2"):
        with (runs / "a" / f"{name}.jsonl").open("ab") as file:
            file.write(b'\xff\xfe\n[1]\nnull\n"text"\n{"cut\n' + b"[" * 100_000 + b"\n")
    assert run(runs, "a", "--resume") == 0
    assert "it is finished" in capsys.readouterr().out
    assert [row["step"] for row in files.read_jsonl(runs / "a" / "metrics.jsonl")] == [0, 1]
    page = ["report", str(runs / "a"), "--out", str(runs / "page.html")]
    assert run_folders.run_main(lambda: evaluation.main(page)) == 0
    for name in ("evaluations", "held-out-0"):
        (runs / "a" / f"{name}.jsonl").write_bytes(b"\xff")
    assert run(runs, "a", "--resume") == 0


@pytest.mark.parametrize("change, says", [
    ({"steps": "2"}, '`steps` is "2", not of type int'), ({"lr": None}, "`lr` is null"),
    ({"seed": 1.5}, "`seed` is 1.5"), ({"augmented": 1}, "`augmented` is 1"),
    ({"prompts": True}, "`prompts` is true"), ({"data": ["toy"]}, "`data` is"),
    ({"mode": "ppo"}, "--mode ppo: must be one of"), ({"lr": math.nan}, "--lr nan"),
    ({"prompts": 0}, "--prompts 0"), ({"rows": {"training rows": 3}}, "rows: 3 then, 16 now"),
    ({"rows": None}, "rows: None then, 16 now"), ({"rows": [1]}, "rows: None then, 16 now"),
])
def test_a_damaged_config_is_one_line(
        runs: Path, capsys: Capture, change: Row, says: str) -> None:
    cfg = dataclasses.asdict(Config(lr=1e-3, steps=2, prompts=2, out=str(runs / "a")))
    (runs / "a").mkdir()
    (runs / "a" / "config.json").write_text(json.dumps(cfg | change))
    flags = ["--resume", "--out", str(runs / "a")]
    assert run_folders.run_main(lambda: dyme.train(dyme.parse_config(flags))) == 2
    error = capsys.readouterr().err.strip()
    assert says in error
    assert "\n" not in error


def test_a_read_only_folder_of_ours_is_removed(tmp_path: Path, monkeypatch: Patch) -> None:
    folder, real = tmp_path / "checkpoint.old", shutil.rmtree
    folder.mkdir(0o500)

    def as_no_root(path: Path, ignore_errors: bool) -> None:  # who may write anywhere
        if path.stat().st_mode & 0o200:
            real(path)
    monkeypatch.setattr(shutil, "rmtree", as_no_root)
    files.remove(folder)
    assert not folder.exists()


def test_a_file_that_may_not_be_read_is_named(
        runs: Path, monkeypatch: Patch, capsys: Capture) -> None:
    assert run(runs, "a", "--steps", "1") == 0
    real = Path.read_text

    def refuse(path: Path, *args: Any, **options: Any) -> str:
        if path.name == "config.json" and path.parent.name == "a":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **options)
    monkeypatch.setattr(Path, "read_text", refuse)  # root may read anything
    assert run(runs, "a", "--resume") == 2
    assert "Permission denied" in capsys.readouterr().err
    error = PermissionError(13, "Permission denied", "x/metrics.jsonl")
    assert run_folders.run_main(lambda: fail(error)) == 2
    assert "x/metrics.jsonl: Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("template", ["{% for %}", "{{ 1 / 0 }}", "{{ raise_exception('no') }}",
                                      "{{ messages[9].role }}"])
def test_a_broken_chat_template_is_one_line(runs: Path, capsys: Capture, template: str) -> None:
    shutil.copytree(toy.BASE, runs / "base")
    (runs / "base" / "chat_template.jinja").write_text(template)
    assert run(runs, "a", "--model", str(runs / "base"), "--data", "toy") == 2
    error = capsys.readouterr().err.strip()
    assert "base: its chat template fails" in error
    assert "cannot be loaded" not in error  # its files can
    assert "\n" not in error


def test_the_last_checkpoint_outlives_one_failure_after_another(
        tmp_path: Path, monkeypatch: Patch) -> None:
    real = Path.rename

    def over_quota(path: Path, target: Path) -> Path:
        if path.suffix == ".tmp":
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        return real(path, target)

    def save(text: str) -> None:
        with files.replaced_folder(tmp_path / "checkpoint") as folder:
            (folder / "weights").write_text(text)

    save("step 2")
    monkeypatch.setattr(Path, "rename", over_quota)
    for _ in range(2):
        with pytest.raises(UserError, match="Disk quota exceeded.*; what was there is kept"):
            save("step 4")
        assert written(tmp_path) == {"checkpoint/weights": b"step 2"}
    monkeypatch.setattr(Path, "rename", real)
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.old")  # a kill between the two moves
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: fail(OSError(errno.EIO, "Input/output")))
    with pytest.raises(UserError, match="Input/output"):
        save("step 4")
    assert written(tmp_path) == {"checkpoint/weights": b"step 2"}


def test_a_process_that_is_lost_and_a_bad_environment_are_one_line(
        monkeypatch: Patch, capsys: Capture) -> None:
    assert run_folders.run_main(lambda: fail(RuntimeError(
        "[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]"))) == 1
    assert capsys.readouterr().err == (
        "error: another process of this run has ended; --resume goes on\n")
    with pytest.raises(RuntimeError):  # a fault of ours
        run_folders.run_main(lambda: fail(RuntimeError("shapes do not fit")))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "two")
    with (pytest.raises(UserError, match="torchrun's environment: .*two"),
          parallel.processes("cpu")):
        pass
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "")
    assert [*parallel.in_threads(lambda job, _: job + 1, None, [1, 2], 1)] == [2, 3]


def test_only_plain_files_are_replaced(runs: Path, capsys: Capture) -> None:
    (runs / "target").write_text("mine")
    (runs / "link").symlink_to(runs / "target")
    os.mkfifo(runs / "pipe")
    (runs / "folder").mkdir()
    for path in (runs / "link", runs / "pipe", runs / "folder", Path(os.devnull)):
        with pytest.raises(OSError, match="plain file"):
            files.write_atomically(path, "")
    assert (runs / "target").read_text() == "mine"
    assert (runs / "link").is_symlink()
    assert (runs / "pipe").is_fifo()


@pytest.mark.parametrize("fault, said", [
    (None, "answer right"), ("", "answer right; thinking valid"),
    ("red is 3, not 4", "answer right; thinking false: red is 3, not 4"),
    ("not judged: 2 + 7 = ?", "answer right; thinking not judged: 2 + 7 = ?"),
])
def test_thinking_that_is_not_judged_is_not_called_false(fault: str | None, said: str) -> None:
    judged = {"in_format": True, "accuracy": True, "thinking_fault": fault}
    assert run_folders.verdict(judged) == said
    # True numbers under a wrong answer are no valid thinking.
    assert "valid" not in run_folders.verdict(judged | {"accuracy": False})


# ---- The command line ----------------------------------------------------------------------------


@dataclasses.dataclass
class Few:
    """Settings to read."""

    top_steps: int = HfArg(default=3, help="how many, in %")
    mode: Literal["one", "two"] = HfArg(default="one", help="which")
    fast: bool = HfArg(default=False, help="at once")


def test_flags_that_are_given_are_read_in_both_spellings() -> None:
    assert settings.read_flags(Few, "", []) == {}
    assert settings.read_flags(Few, "", ["--top-steps", "3", "--fast"]) == {"top_steps": 3,
                                                                           "fast": True}
    assert settings.read_flags(Few, "", ["--top_steps", "4"]) == {"top_steps": 4}


@pytest.mark.parametrize("argv, says", [
    (["--top-step", "3"], "did you mean --top-steps?"), (["--top", "3"], "--top"),
    (["--mode", "three"], "argument --mode: invalid choice: 'three'"),
    (["--top_steps", "x"], "argument --top-steps: invalid int value: 'x'"),
])
def test_flags_that_do_not_exist_are_one_line(argv: list[str], says: str) -> None:
    with pytest.raises(UserError) as raised:
        settings.read_flags(Few, "", argv)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_help_shows_flags_and_defaults_in_80_columns(capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        settings.read_flags(Few, "About it.", ["--help"])
    shown = capsys.readouterr().out
    assert "--top-steps N" in shown
    assert "how many, in % [3]" in shown
    assert "--mode {one,two}" in shown
    assert "top_steps" not in shown
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize("flags", [
    ["--temperature", "nan"], ["--temperature", "inf"], ["--thinking-weight", "1e39"],
    ["--format-weight", "-1"], ["--beta", "nan", "--mode", "grpo"], ["--epochs", "inf"],
    ["--steps", "3", "--epochs", "2"], ["--switch", "budget:x"], ["--switch", "budget:1"],
    ["--switch", "threshold:2"], ["--switch", "threshold:1.5"],
])
def test_numbers_that_cannot_be_are_refused(
        runs: Path, capsys: Capture, flags: list[str]) -> None:
    assert run(runs, "a", *flags) == 2
    assert flags[0] in capsys.readouterr().err
    assert not (runs / "a").exists()
    if flags[0] == "--temperature":
        assert run_folders.run_main(lambda: evaluation.main(["tiny", *flags])) == 2


def test_a_folder_whose_name_is_not_utf8_is_refused_before_the_first_step(
        runs: Path, capsys: Capture) -> None:
    assert run(runs, "caf\udce9", "--steps", "1") == 2
    assert "its name is not UTF-8" in capsys.readouterr().err
    assert not any(runs.iterdir())
    settings.check(Config(out="café", lr=1.0), {"tiny"})


def test_a_password_in_a_url_is_not_printed(runs: Path, capsys: Capture) -> None:
    with pytest.raises(UserError, match="--helper-ulr http://...@host; did you mean --helper-url"):
        dyme.parse_config(["--helper-ulr", "http://me:s3cret@host"])
    assert run(runs, "a", "--helper-url", "me:secret@host", "--helper-model", "m") == 2
    assert "secret" not in capsys.readouterr().err


# ---- Signals -------------------------------------------------------------------------------------

HANG = """
import sys, threading, time
from support import runs

def program():
    with runs.finish_step_on_interrupt():
        threading.Thread(target=time.sleep, args=[60]).start()  # as a helper that does not answer
        print("ready", flush=True)
        time.sleep(60)

sys.exit(runs.run_main(program))
"""


@pytest.mark.slow
def test_a_second_signal_ends_the_process_whatever_its_threads_do() -> None:
    hanging = subprocess.Popen([sys.executable, "-c", HANG], env=HERE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    assert hanging.stdout and hanging.stderr
    assert hanging.stdout.readline() == "ready\n"
    hanging.send_signal(signal.SIGINT)
    assert "stopping after this step" in hanging.stderr.readline()
    hanging.send_signal(signal.SIGINT)
    assert hanging.wait(timeout=10) == 130


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_to_stop_lets_the_step_end_and_saves(
        runs: Path, monkeypatch: Patch, capsys: Capture, number: int) -> None:
    at_step(monkeypatch, 1, lambda: os.kill(os.getpid(), number))
    assert run(runs, "a", "--steps", "4", "--save-every", "0") == 130
    assert saved_step(runs / "a") == 2
    assert f"--resume --out {runs / 'a'}" in capsys.readouterr().out


def test_what_repeats_is_no_second_ctrl_c_and_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
    try:
        with run_folders.finish_step_on_interrupt() as received:
            for number in (signal.SIGXCPU, signal.SIGXCPU, signal.SIGHUP):
                os.kill(os.getpid(), number)
            assert received == [signal.SIGXCPU, signal.SIGXCPU]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_printed_command_names_any_folder() -> None:
    named = {"runs/a": "runs/a", "my run": "'my run'", "-x": "./-x", "-x y": "'./-x y'"}
    assert {name: run_folders.argument(Path(name)) for name in named} == named


@pytest.mark.slow
def test_what_goes_wrong_is_told_once(runs: Path, capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setattr(run_folders, "TOLD", set())
    step = {"accuracy": 0.0, "truncated": 0.75}
    run_folders.warn([step] * 19)  # too early, or a resumed run
    run_folders.warn([{"mode": "sft"}] * 20)
    assert capsys.readouterr().err == ""
    run_folders.warn([step] * 20)
    said = capsys.readouterr().err
    assert "no response of the last 20 steps was right" in said
    assert "most responses of the last 20 steps were cut off" in said
    run_folders.warn([step] * 20)
    run_folders.warn([step] * 19 + [{"accuracy": 0.1, "truncated": 0.0}])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(run_folders, "TOLD", set())
    run_folders.warn([{"accuracy": 0.0, "truncated": 0.5}] * 19 + [{"accuracy": 0.1}])
    assert capsys.readouterr().err == ""
    flags = ["--steps", "20", "--warmup", "10", "--lr", "1e-9", "--generations", "2"]
    assert run(runs, "a", *flags, "--max-new-tokens", "1") == 0  # none can end
    said = capsys.readouterr().err
    assert "--warmup 10: half of the 20 steps" in said
    assert said.count("was right: exploration has nothing") == 1
