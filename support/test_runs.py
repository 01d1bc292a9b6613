"""Tests of run folders: how long a run is, what it refuses, and what it survives."""

import errno
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import dyme
import eval as evaluation
from dyme import Config
from support import DivergedError, UserError, files, settings, toy
from support import runs as run_folders
from test_dyme import Capture, Patch, Row, run, same_weights, without_times

# ---- How long a run is ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode, steps", [
    ("dyme", 100),  # 2 passes over 400 rows at 8 a step
    ("grpo", 100),
    ("sft", 25),  # at 8 x 4 a step
    ("two-stage", 13 + 48),  # one pass of SFT takes 13 steps and 416 rows; 384 are left for GRPO
])
def test_epochs_are_passes_over_the_data_in_every_mode(mode: str, steps: int) -> None:
    cfg = Config(mode=mode, epochs=2.0, sft_steps=0, prompts=8, generations=4)
    settings.settle_length(cfg, rows=400)
    assert cfg.steps == steps and cfg.sft_steps == (13 if mode == "two-stage" else 0)
    seen = sum(len(dyme.step_rows(cfg, step, 400)) for step in range(cfg.steps))
    assert 800 <= seen < 800 + 32
    cfg.steps, cfg.resume = 7 * steps, True  # a run of before: it keeps its length
    settings.settle_length(cfg, rows=400)
    assert cfg.steps == 7 * steps


def test_steps_are_what_they_say_and_real_two_stage_gets_one_pass_of_sft() -> None:
    cfg = dyme.parse_config(["--model", str(toy.BASE), "--data", "x.jsonl", "--mode", "two-stage", "--steps", "90"])
    settings.settle_length(cfg, rows=2560)
    assert (cfg.steps, cfg.sft_steps) == (90, 10)
    cfg = dyme.parse_config(["--mode", "two-stage", "--epochs", "2"])
    with pytest.raises(UserError, match="--sft-steps 150: SFT takes all"):  # 150 x 64 rows are more than two passes
        settings.settle_length(cfg, rows=2048)


# ---- The reference of the KL ----------------------------------------------------------------------


def test_the_kl_of_two_stage_is_to_the_model_after_sft_also_when_resumed(runs: Path, monkeypatch: Patch, capsys: Capture) -> None:
    flags = ["--mode", "two-stage", "--sft-steps", "2", "--steps", "5", "--beta", "0.5", "--lr", "0.01", "--save-every", "3"]
    assert run(runs, "whole", *flags) == 0
    kl = [row["kl"] for row in files.read_jsonl(runs / "whole" / "metrics.jsonl")]
    assert kl[:2] == [0, 0] and kl[2] == pytest.approx(0, abs=1e-6) and min(kl[3:]) > 1e-5  # GRPO starts at its reference
    real = dyme.train_step

    def killed(trainer: dyme.Trainer, examples: list[Any], step: int, *rest: Any) -> Any:
        if step == 4:
            raise SystemError  # stands in for a kill; the checkpoint is of step 3
        return real(trainer, examples, step, *rest)
    monkeypatch.setattr(dyme, "train_step", killed)
    with pytest.raises(SystemError):
        run(runs, "killed", *flags)
    shutil.copytree(runs / "killed", runs / "older")
    shutil.rmtree(runs / "older" / "after-sft")  # as runs were before it was kept
    monkeypatch.setattr(dyme, "train_step", real)
    assert run(runs, "killed", "--resume") == 0 == run(runs, "older", "--resume")
    assert same_weights(runs / "whole", runs / "killed") and not same_weights(runs / "whole", runs / "older")
    assert without_times(runs / "whole" / "metrics.jsonl") == without_times(runs / "killed" / "metrics.jsonl")
    assert files.read_jsonl(runs / "older" / "metrics.jsonl")[3]["kl"] > 10 * kl[3]  # to the base, which is far by now


# ---- Nothing is lost or silently wrong ------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from support import files
with files.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_process_at_a_time_and_a_killed_one_lets_go(runs: Path, capsys: Capture) -> None:
    assert run(runs, "a", "--steps", "1") == 0 and not (runs / "a" / files.LOCK).exists()
    here = os.environ | {"PYTHONPATH": str(Path(dyme.__file__).parent)}
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(runs / "a")], env=here, stdout=subprocess.PIPE)
    assert other.stdout and other.stdout.readline() == b"held\n"
    before = {path: path.read_bytes() for path in (runs / "a").glob("*.jsonl")}
    for program in (lambda: run(runs, "a", "--resume"), lambda: run(runs, "a", "--steps", "2", "--overwrite"),
                    lambda: run_folders.run_main(lambda: evaluation.main([str(runs / "a"), "--limit", "1"]))):
        assert program() == 2 and "another process works in it" in capsys.readouterr().err
    elsewhere = ["--limit", "1", "--out", str(runs / "b")]  # reading is free
    assert run_folders.run_main(lambda: evaluation.main([str(runs / "a"), *elsewhere])) == 0
    assert {path: path.read_bytes() for path in (runs / "a").glob("*.jsonl")} == before
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (runs / "a" / files.LOCK).exists() and run(runs, "a", "--resume") == 0


def test_a_lock_whose_file_was_removed_meanwhile_does_not_count(tmp_path: Path, monkeypatch: Patch) -> None:
    real = files.lock

    def late(file: Any) -> bool:  # the one before has removed it, and a third process has made it anew
        (tmp_path / files.LOCK).unlink()
        (tmp_path / files.LOCK).touch()
        return real(file)
    monkeypatch.setattr(files, "lock", late)
    with pytest.raises(UserError, match="another process"), files.locked(tmp_path):
        pass


@pytest.mark.parametrize("change, says", [
    (lambda rows: [row for row in rows if " 5 " not in row["question"]], "training rows: 18 then, 17 now"),
    (lambda rows: [row | {"answer": "blue"} for row in rows], "answer of training rows; answer of held-out rows"),
    (lambda rows: rows[::-1], "question of training rows"),
    (lambda rows: [row | {"hint": "Think."} for row in rows], "trace of training rows"),
])
def test_a_run_does_not_go_on_with_other_rows(runs: Path, capsys: Capture, change: Callable[[list[Row]], list[Row]], says: str) -> None:
    rows = [{"question": f"Which bar {i} is the tallest?", "answer": "red"} for i in range(19)]
    (runs / "rows.json").write_text(json.dumps(rows))
    assert run(runs, "a", "--model", str(toy.BASE), "--data", str(runs / "rows.json"), "--steps", "1") == 0
    assert run(runs, "a", "--resume") == 0 and "it is finished" in capsys.readouterr().out
    (runs / "rows.json").write_text(json.dumps(change(rows)))
    before = (runs / "a" / "metrics.jsonl").read_text()
    assert run(runs, "a", "--resume") == 2 and says in capsys.readouterr().err
    assert (runs / "a" / "metrics.jsonl").read_text() == before
    config = json.loads((runs / "a" / "config.json").read_text())
    (runs / "a" / "config.json").write_text(json.dumps({key: config[key] for key in config if key != "rows"}))
    assert run(runs, "a", "--resume") == 0  # a run of before there was a fingerprint


def test_overwrite_removes_what_a_run_writes_and_nothing_else(runs: Path, capsys: Capture) -> None:
    assert run(runs, "a", "--steps", "2") == 0
    mine = ["held-out-mine.jsonl", "best.json", "checkpoint.md", "notes.jsonl", "metrics.csv"]
    for name in mine:
        (runs / "a" / name).write_text("{}")
    a = str(runs / "a")
    for flags in (["--model", a], ["--model", f"{a}/../a/best"], ["--model", f"{a}/checkpoint"]):
        assert run(runs, "a", *flags, "--data", "toy", "--mode", "grpo", "--beta", "1", "--overwrite") == 2
        assert "--out" in capsys.readouterr().err and (runs / "a" / "held-out-2.jsonl").exists()
    rows = [{"question": f"{i}?", "answer": "1"} for i in range(4)]
    (runs / "a" / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run(runs, "a", "--model", str(toy.BASE), "--data", f"{a}/samples.jsonl", "--overwrite") == 2
    assert run(runs, "a", "--steps", "1", "--overwrite") == 0
    assert all((runs / "a" / name).exists() for name in mine) and not (runs / "a" / "held-out-2.jsonl").exists()


def test_more_prompts_than_rows_are_told(runs: Path, capsys: Capture) -> None:
    assert run(runs, "a", "--steps", "1", "--prompts", "16") == 0
    assert "more than once" not in capsys.readouterr().out
    assert run(runs, "b", "--mode", "sft", "--steps", "1", "--prompts", "17") == 0
    assert "--prompts 17: a step takes each of the 16 training rows more than once" in capsys.readouterr().out


def test_a_start_that_fails_leaves_no_folder(runs: Path, capsys: Capture) -> None:
    shutil.copytree(toy.BASE, runs / "base")
    (runs / "base" / "model.safetensors").write_bytes(b"cut")
    assert run(runs, "a", "--model", str(runs / "base"), "--data", "toy") == 2 and not (runs / "a").exists()


def test_broken_weights_and_failing_steps_are_not_saved(runs: Path, monkeypatch: Patch, capsys: Capture) -> None:
    def damaged(*names: str) -> Callable[..., Any]:
        def step(trainer: dyme.Trainer, batch: Any, number: int, *rest: Any) -> Any:
            done = real(trainer, batch, number, *rest)
            if number >= 2 and "weights" in names:
                next(trainer.policy.model.parameters()).data.fill_(math.nan)
            trainer.failures = max(0, number - 1) if "steps" in names else 0
            return done
        return step
    real, flags = dyme.take_step, ["--steps", "5", "--save-every", "1", "--eval-every", "0"]
    for name, says in (("weights", "the weights are no longer finite"), ("steps", "the last 3 steps had a loss")):
        monkeypatch.setattr(dyme, "take_step", damaged(name))
        assert run(runs, name, *flags) == 1 and says in capsys.readouterr().err
        state = torch.load(runs / name / "checkpoint" / "training_state.pt", weights_only=True)
        assert state["step"] == {"weights": 2, "steps": 3}[name]  # a single failed step changed nothing
        weights = dyme.load_policy(str(runs / name), torch.device("cpu")).model.parameters()
        assert all(torch.isfinite(p).all() for p in weights) and not (runs / name / "checkpoint.tmp").exists()
    with pytest.raises(DivergedError):
        run_folders.check_weights(torch.nn.Linear(2, 2).requires_grad_(False).apply(lambda m: m.weight.fill_(math.inf)))


# ---- Damaged folders, full disks ------------------------------------------------------------------


@pytest.mark.parametrize("whither", ["elsewhere", "nowhere"])
def test_a_checkpoint_that_is_a_link_is_followed_and_replaced(runs: Path, capsys: Capture, whither: str) -> None:
    assert run(runs, "a", "--steps", "1") == 0
    (runs / "a" / "checkpoint").rename(runs / "elsewhere")
    (runs / "a" / "checkpoint").symlink_to(runs / whither)
    assert run(runs, "a", "--resume") == (0 if whither == "elsewhere" else 2)
    assert run(runs, "a", "--steps", "3", "--save-every", "1", "--overwrite") == 0 == run(runs, "a", "--resume")
    assert not (runs / "a" / "checkpoint").is_symlink() and (runs / "elsewhere" / "training_state.pt").exists()
    for link in ("checkpoint", "checkpoint.old", "checkpoint.tmp"):  # also one that appears meanwhile
        files.remove(runs / "a" / link)
        (runs / "a" / link).symlink_to(runs / "nowhere")
    with files.replaced_folder(runs / "a" / "checkpoint") as folder:
        (folder / "x").touch()
    assert (runs / "a" / "checkpoint" / "x").exists() and not (runs / "a" / "checkpoint.old").is_symlink()


@pytest.mark.parametrize("damage", [
    lambda file: file.unlink(), lambda file: file.write_bytes(file.read_bytes()[:5000]), lambda file: file.write_bytes(b""),
    lambda file: file.write_text("text"), lambda file: torch.save({"step": 1}, file), lambda file: torch.save([1], file),
    lambda file: torch.save(torch.load(file) | {"optimizer": {"state": {}, "param_groups": []}}, file),
])
def test_a_damaged_training_state_is_one_line(runs: Path, capsys: Capture, damage: Callable[[Path], None]) -> None:
    assert run(runs, "a", "--steps", "1") == 0
    damage(runs / "a" / "checkpoint" / "training_state.pt")
    assert run(runs, "a", "--resume") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "training_state.pt: cannot be read" in error and f"--model {runs / 'a'} --out NEW" in error


def test_lines_that_are_no_rows_are_left_out(runs: Path, capsys: Capture) -> None:
    assert run(runs, "a", "--steps", "2") == 0
    for name in ("metrics", "samples", "evaluations", "held-out-0", "held-out-2"):
        with (runs / "a" / f"{name}.jsonl").open("ab") as file:
            file.write(b'\xff\xfe\n[1]\nnull\n"text"\n{"cut\n' + b"[" * 100_000 + b"\n")
    assert run(runs, "a", "--resume") == 0 and "it is finished" in capsys.readouterr().out
    assert [row["step"] for row in files.read_jsonl(runs / "a" / "metrics.jsonl")] == [0, 1]
    page = ["report", str(runs / "a"), "--out", str(runs / "page.html")]
    assert run_folders.run_main(lambda: evaluation.main(page)) == 0
    for name in ("evaluations", "held-out-0"):
        (runs / "a" / f"{name}.jsonl").write_bytes(b"\xff")
    assert run(runs, "a", "--resume") == 0


@pytest.mark.parametrize("change, says", [
    ({"steps": "2"}, '`steps` is "2", not of type int'), ({"lr": None}, "`lr` is null"), ({"seed": 1.5}, "`seed` is 1.5"),
    ({"augmented": 1}, "`augmented` is 1"), ({"prompts": True}, "`prompts` is true"), ({"data": ["toy"]}, "`data` is"),
    ({"mode": "ppo"}, "--mode ppo: must be one of"), ({"lr": math.nan}, "--lr nan"), ({"prompts": 0}, "--prompts 0"),
])
def test_a_damaged_config_is_one_line(runs: Path, capsys: Capture, change: Row, says: str) -> None:
    cfg = settings.dataclasses.asdict(Config(lr=1e-3, steps=2, prompts=2, out=str(runs / "a")))
    (runs / "a").mkdir()
    (runs / "a" / "config.json").write_text(json.dumps(cfg | change))
    assert run_folders.run_main(lambda: dyme.train(dyme.parse_config(["--resume", "--out", str(runs / "a")]))) == 2
    error = capsys.readouterr().err.strip()
    assert says in error and "\n" not in error


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device (os error 28)"),
    RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 865984 vs 865876"),  # as it comes from a full tmpfs
])
def test_a_full_disk_says_so_and_costs_no_checkpoint(runs: Path, monkeypatch: Patch, capsys: Capture, error: Exception) -> None:
    real, calls = torch.save, []

    def fail(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise error
        real(*args)
    monkeypatch.setattr(torch, "save", fail)
    assert run(runs, "a", "--steps", "2", "--save-every", "1") == 2
    assert "no space left on the disk" in capsys.readouterr().err.strip().splitlines()[-1]
    assert {path.name for path in (runs / "a").glob("checkpoint*")} == {"checkpoint"}  # the half-written one is gone
    assert run(runs, "a", "--resume") == 0


def test_a_file_that_may_not_be_read_is_named(runs: Path, monkeypatch: Patch, capsys: Capture) -> None:
    assert run(runs, "a", "--steps", "1") == 0
    real = Path.read_text

    def refuse(path: Path, *args: Any, **options: Any) -> str:
        if path.name == "config.json" and path.parent.name == "a":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **options)
    monkeypatch.setattr(Path, "read_text", refuse)  # root may read anything
    assert run(runs, "a", "--resume") == 2 and "config.json: cannot be read (Permission denied)" in capsys.readouterr().err

    def fail() -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "x/metrics.jsonl")
    assert run_folders.run_main(fail) == 2 and "x/metrics.jsonl: Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("template", ["{% for %}", "{{ 1 / 0 }}", "{{ raise_exception('no') }}", "{{ messages[9].role }}"])
def test_a_broken_chat_template_is_one_line(runs: Path, capsys: Capture, template: str) -> None:
    shutil.copytree(toy.BASE, runs / "base")
    (runs / "base" / "chat_template.jinja").write_text(template)
    assert run(runs, "a", "--model", str(runs / "base"), "--data", "toy") == 2
    error = capsys.readouterr().err.strip()
    assert "base: its chat template fails" in error and "\n" not in error


def test_only_plain_files_are_replaced(runs: Path, capsys: Capture) -> None:
    assert run(runs, "a", "--steps", "1") == 0
    (runs / "target").write_text("mine")
    (runs / "link").symlink_to(runs / "target")
    os.mkfifo(runs / "pipe")
    for name in ("link", "pipe", "a"):
        page = ["report", str(runs / "a"), "--out", str(runs / name)]
        assert run_folders.run_main(lambda page=page: evaluation.main(page)) == 2 and "not a plain file" in capsys.readouterr().err
    assert (runs / "target").read_text() == "mine" and (runs / "link").is_symlink() and (runs / "pipe").is_fifo()
    with pytest.raises(OSError, match="plain file"):
        files.write_atomically(Path(os.devnull), "")
    assert files.read_jsonl(Path("/dev/zero")) == []  # which never ends


# ---- The command line, signals --------------------------------------------------------------------


@pytest.mark.parametrize("flags", [
    ["--temperature", "nan"], ["--temperature", "inf"], ["--thinking-weight", "1e39"], ["--format-weight", "-1"],
    ["--beta", "nan", "--mode", "grpo"], ["--epochs", "inf"], ["--vision-cache", "nan"], ["--steps", "3", "--epochs", "2"],
])
def test_numbers_that_cannot_be_are_refused(runs: Path, capsys: Capture, flags: list[str]) -> None:
    assert run(runs, "a", *flags) == 2 and flags[0] in capsys.readouterr().err and not (runs / "a").exists()
    if flags[0] == "--temperature":
        assert run_folders.run_main(lambda: evaluation.main(["tiny", *flags])) == 2


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


def test_a_second_signal_ends_the_process_whatever_its_threads_do(tmp_path: Path) -> None:
    here = os.environ | {"PYTHONPATH": str(Path(dyme.__file__).parent)}
    hanging = subprocess.Popen([sys.executable, "-c", HANG], env=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert hanging.stdout and hanging.stderr and hanging.stdout.readline() == "ready\n"
    hanging.send_signal(signal.SIGINT)
    assert "stopping after this step" in hanging.stderr.readline()
    hanging.send_signal(signal.SIGINT)
    assert hanging.wait(timeout=10) == 130


def test_letters_that_the_terminal_lacks_end_no_run(monkeypatch: Patch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    assert run_folders.run_main(lambda: print("Größe \u2028")) == 0 and b"Gr\\xf6\\xdfe" in written.getvalue()
