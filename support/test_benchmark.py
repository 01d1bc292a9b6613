"""Tests of the benchmark."""

import re
import sys
from pathlib import Path

import pytest

import dyme
from dyme import Response
from reward import Example
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


def test_coins_let_every_prompt_explore_with_rewards_that_differ() -> None:
    groups = [[Response([1], "Answer: 5", True, 0.0) for _ in range(4)] for _ in range(3)]
    r_a, r_t = benchmark.coin_flips(groups, [Example("q", "6", trace="5")] * 3)
    assert r_a[:, :2].tolist() == [[1, 0]] * 3
    assert dyme.any_correct(r_a, r_t).all()
    assert not dyme.no_variance(r_a + r_t).any()
