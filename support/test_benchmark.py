"""Tests of the benchmark."""

import re
import sys
from pathlib import Path

import pytest

import dyme
from dyme import Policy, Response
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
    parts = {line.split()[0]: line.split()[1:] for line in lines[2:10]}
    assert (parts["decode"] == ["0.000", "0.000"]) == (more == "--mode sft")


def test_a_floor_is_what_the_rows_must_take(tiny: Policy, examples: list[Example]) -> None:
    cfg = dyme.parse_config(["--micro-batch", "1"])
    weights = sum(p.numel() for name, p in tiny.model.named_parameters() if "vision_" not in name)

    def decode(flops_rate: float, number_rate: float) -> float:
        floor = benchmark.step_floor(cfg, tiny, examples[:2], 3, 5, flops_rate, number_rate)
        return floor["decode"]

    assert decode(1.0, 1e30) == 5 * 2 * weights * 2 * 3  # 5 tokens of 2 x 3 responses
    assert 5 * weights < decode(1e30, 1.0) < 5 * 2 * weights  # and the cache, once a token
    sft = benchmark.step_floor(cfg, tiny, examples[:2], 0, 5, 1.0, 1e30)
    assert [*sft] == ["update"]
    assert sft["update"] > 3 * 2 * weights * 2 * 5


def test_coins_let_every_prompt_explore_with_rewards_that_differ() -> None:
    groups = [[Response([1], "Answer: 5", True, 0.0) for _ in range(4)] for _ in range(3)]
    r_a, r_t = benchmark.coin_flips(groups, [Example("q", "6", trace="5")] * 3)
    assert r_a[:, :2].tolist() == [[1, 0]] * 3
    assert dyme.any_correct(r_a, r_t).all()
    assert not dyme.no_variance(r_a + r_t).any()
