"""Tests of the benchmark."""

import re
import sys
from pathlib import Path

import pytest

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
