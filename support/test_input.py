"""Bad input is one clear line and exit code 2, and nothing that exists is lost."""

import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import dyme
from support import files, toy
from support import runs as run_folders
from test_dyme import Capture, Patch, evaluate, run


@pytest.mark.parametrize("flags, says", [
    ("--bogus", "--bogus"), ("--model SmolVLM-256M", "--model SmolVLM-256M: say with --data"),
    ("--mode ppo", "invalid choice: 'ppo'"), ("--generations 1", "at least 2"),
    ("--generations 9999999999", "at most 1e+09"), ("--data nowhere", "--data nowhere"),
    ("--data missing.json --model BASE", "missing.json"),
    ("--data chartqa --model SmolVLM-265M", "--model SmolVLM-265M: no such folder"),
    ("--steps 0", "--steps 0"), ("--lr nan", "--lr nan"), ("--beta 0.1", "--beta"),
    ("--hints x", "--hints"), ("--no-checker", "--helper-url"),
    ("--helper-url localhost:1 --helper-model m", "must begin with http"),
    ("--switch budget:7", "--prompts 8"), ("--resume", "is not a run folder"),
    ("--device cuda:99", "--device cuda:99"), ("--prompts x", "--prompts"),
    ("--mode two-stage --sft-steps 9 --steps 9", "--sft-steps 9"),
    ("--model tiny --data chartqa", "--data chartqa"), ("--temperature 0", "--temperature"),
    ("--model nowhere/nothing --data toy --steps 1", "python -m support.smollm2 FOLDER"),
    ("--model a/model.gguf --data sums", "python -m support.smollm2 FOLDER a/model.gguf"),
    ("--model BASE --data sums:new", "sums:new is for eval.py alone"),
    ("--model BASE --data sums:old", "give sums"),
    ("--data charts", "python -m support.smollm2 FOLDER --sight makes"),
    ("--data toy:old", "give toy or toy:withheld"),
    ("--model EMPTY --data toy", "it is neither a run nor a model"),
])
def test_bad_input_is_one_line_and_exit_code_2(
        runs: Path, flags: str, says: str, capsys: Capture, monkeypatch: Patch) -> None:
    # No waiting for a network.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    flags = flags.replace("BASE", str(toy.BASE)).replace("EMPTY", str(runs))
    argv = ["--out", str(runs / "x"), *flags.split()]
    code = run_folders.run_main(lambda: dyme.train(dyme.parse_config(argv)))
    error = capsys.readouterr().err.strip()
    assert code == 2
    assert error.startswith("error: ")
    assert says in error
    assert "\n" not in error


@pytest.mark.slow
def test_an_existing_run_is_not_touched_unless_asked(runs: Path, capsys: Capture) -> None:
    def refused(says: str, *flags: str) -> bool:
        code = run(runs, "a", *flags)
        return code == 2 and says in capsys.readouterr().err

    assert run(runs, "a", "--steps", "1") == 0
    before = (runs / "a" / "metrics.jsonl").read_text()
    assert refused("--overwrite", "--steps", "1")
    assert refused("leave out --overwrite", "--resume", "--overwrite")
    assert refused("--lr 0.5", "--resume", "--lr", "0.5")
    assert (runs / "a" / "metrics.jsonl").read_text() == before
    assert run(runs, "a", "--steps", "2", "--overwrite") == 0
    assert run(runs, "a", "--resume") == 0
    (runs / "a" / "my-rows.jsonl").write_text("{}")
    shutil.rmtree(runs / "a" / "checkpoint")  # nothing to go on from: nothing may be lost
    metrics = (runs / "a" / "metrics.jsonl").read_text()
    assert refused("has no checkpoint to go on from", "--resume")
    assert (runs / "a" / "metrics.jsonl").read_text() == metrics
    assert run(runs, "a", "--steps", "1", "--overwrite") == 0
    assert (runs / "a" / "my-rows.jsonl").exists()


def test_what_is_not_a_run_is_not_touched_at_all(runs: Path) -> None:
    (runs / "mine").mkdir()
    (runs / "mine" / "thesis.txt").write_text("years of work")
    assert run(runs, "mine", "--overwrite") == 2
    assert (runs / "mine" / "thesis.txt").exists()
    shutil.copytree(toy.BASE, runs / "base")
    base = (runs / "base" / "config.json").read_text()  # a model directory is not a run
    assert run(runs, "base", "--overwrite") == 2
    assert run(runs, "base", "--resume") == 2
    assert (runs / "base" / "config.json").read_text() == base
    (runs / "file").write_text("")
    assert run(runs, "file") == 2


def test_an_image_that_breaks_mid_run_costs_no_finished_step(
        runs: Path, capsys: Capture) -> None:
    rows = []
    for i in range(12):
        image = io.BytesIO()
        toy.make_examples("train")[i].image().save(image, "PNG")
        cut = -60 if i == 3 else None  # its header is fine
        (runs / f"{i}.png").write_bytes(image.getvalue()[:cut])
        rows.append({"question": f"Which is tallest? {i}", "answer": "red", "image": f"{i}.png"})
    (runs / "rows.json").write_text(json.dumps(rows))
    flags = ["--model", str(toy.BASE), "--data", str(runs / "rows.json"), "--steps", "8"]
    assert run(runs, "a", *flags, "--micro-batch", "2") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "rows.json row 4: the image 3.png is missing or unreadable" in error
    done = len(files.read_jsonl(runs / "a" / "metrics.jsonl"))
    state = torch.load(runs / "a" / "checkpoint" / "training_state.pt", weights_only=True)
    assert state["step"] == done


def test_running_out_of_memory_says_which_flags_lower_it(capsys: Capture) -> None:
    def fail() -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 B")

    assert run_folders.run_main(fail) == 2
    assert "--micro-batch" in capsys.readouterr().err


@pytest.mark.slow
def test_a_line_separator_in_a_question_breaks_no_file(runs: Path, capsys: Capture) -> None:
    questions = [f"Which bar\u2028 is the tallest? {i}" for i in range(12)]
    rows = [json.dumps({"question": q, "answer": "red"}, ensure_ascii=False) for q in questions]
    (runs / "rows.jsonl").write_text("\n".join(rows))
    flags = ["--model", str(toy.BASE), "--data", str(runs / "rows.jsonl"), "--steps", "2"]
    assert run(runs, "a", *flags) == 0
    assert len(files.read_jsonl(runs / "a" / "samples.jsonl")) == 2
    assert run(runs, "a", "--resume") == 0
    score = ["--model", str(runs / "a"), "--max-new-tokens", "8"]
    assert evaluate(*score) == 0
    # The held-back tenth, not the training rows; nor under another name.
    assert len(files.read_jsonl(runs / "a" / "predictions.jsonl")) == 1
    again = [*score, "--data", str(runs / "a" / ".." / "rows.jsonl")]
    capsys.readouterr()
    assert evaluate(*again) == 0
    assert "tested on all" not in capsys.readouterr().err
    assert len(files.read_jsonl(runs / "a" / "predictions.jsonl")) == 1
    assert evaluate(str(runs / "a")) == 0  # as the run says: 1,024 tokens would be too many
    latin = runs / os.fsdecode(b"caf\xe9.jsonl")
    latin.write_text("\n".join(rows))
    assert run(runs, "b", *flags[:2], "--data", str(latin), "--steps", "1") == 0
    # The rows are known by their hash, wherever they lie, and refused once they have changed.
    (runs / "moved").mkdir()
    moved = (runs / "rows.jsonl").rename(runs / "moved" / "rows.jsonl")
    assert evaluate(*score, "--data", str(moved)) == 0
    assert len(files.read_jsonl(runs / "a" / "predictions.jsonl")) == 1
    assert run(runs, "a", "--resume", "--data", str(moved)) == 0
    assert evaluate(*score) == 0
    moved.write_text("\n".join([*rows, json.dumps({"question": "New?", "answer": "red"})]))
    assert evaluate(*score) == 2
    assert "has changed since" in capsys.readouterr().err
    others = moved.with_name("others.jsonl")
    others.write_text(rows[0])
    assert evaluate(*score, "--data", str(others)) == 0
    assert "tested on all 1 rows" in capsys.readouterr().err
    again = [*score, "--data", str(others)]
    shutil.rmtree(runs / "a" / "checkpoint")
    assert evaluate(*again) == 2
    assert "has no checkpoint yet" in capsys.readouterr().err
