"""The benchmark, and the page of checks for a GPU."""

import re
import sys
from pathlib import Path

import pytest

import dyme
from support import benchmark
from support import runs as run_folders
from test_dyme import Capture, Patch


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", "--plain", "--mode grpo --beta 0.1", "--mode sft"])
def test_benchmark_ends_with_the_median_and_leaves_nothing_behind(
        more: str, runs: Path, monkeypatch: Patch, capsys: Capture) -> None:
    flags = ("--steps 2 --prompts 2 --generations 3 --max-new-tokens 5 --micro-batch 1 "
             f"--out {runs / 'a'} {more}")
    monkeypatch.setattr(sys, "argv", ["benchmark", *flags.split()])
    assert run_folders.run_main(benchmark.main) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"median \d+\.\d{3} s/step", lines[-1])
    assert not any(runs.iterdir())


@pytest.mark.slow



def test_the_gpu_checks_commands_are_commands() -> None:
    commands = gpu_check.commands("tiny", "toy", [["SmolLM2-135M", "gsm8k:folder"]], "runs")
    assert sum("gsm8k:folder" in words for words in commands) == 1
    for words in commands:
        if "dyme.py" in words and "--resume" not in words:
            assert dyme.parse_config(words[words.index("dyme.py") + 1:]).steps == 20
        if "support.benchmark" in words:
            dyme.parse_config(benchmark.split_steps(words[2:])[1])
