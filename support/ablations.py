"""What the paper compares DyME with: the other switching rules of Table 1b, and the release's deviations."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from reward import Example
from support import parallel


def choose_mode(rule: str, rewards: Tensor, highest: float) -> Tensor:
    """Which prompts explore by a rule of Table 1b, (p,) bool, from this process's rewards r, (p, K).

    `highest` is the largest reward there can be: a threshold tests the batch's mean reward on a scale from
    0 to 1.
    """
    everyone = torch.ones(len(rewards), dtype=torch.bool)
    name, _, value = rule.partition(":")
    if name == "memorize":
        return ~everyone
    if name == "threshold":  # the whole batch, that of all processes, explores once its mean reward passes
        batch = parallel.sum_numbers({"reward": rewards.sum().item(), "count": rewards.numel()})
        return everyone & (batch["reward"] / batch["count"] / highest >= float(value))
    # explore: always. anneal: always, with targets beside (`adjust_for_ablations` of dyme.py). budget: always, while failures
    # wait in a buffer (`memorize_failures`).
    return everyone


def released_advantages(rewards: Tensor, correct: Tensor, eps: float = 1e-4) -> Tensor:
    """Advantages (p, K) as in the release: sample standard deviation, and zero where all are correct."""
    std = rewards.std(1, keepdim=True)  # divides by K - 1
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (std + eps)
    zero = (rewards.amax(1) == rewards.amin(1)) | (correct.amin(1) == 1)
    return advantages.masked_fill(zero[:, None], 0.0)


def released_weights(sequences: list[Any], generations: int) -> list[Any]:
    """Targets weigh 1/K of a prompt, as in the release, which puts them in the place of one response."""
    return [s if s.explore else replace(s, weight=s.weight / generations) for s in sequences]


def anneal_weight(progress: float) -> float:
    """Weight of the SFT loss beside exploration: a cosine from 1 to 0 over `progress` in [0, 1]."""
    return (1 + math.cos(math.pi * progress)) / 2


def memorize_failures(buffer: list[Example], done: Any, rule: str,
                      imitate: Callable[[list[Example]], dict[str, Any]]) -> dict[str, Any]:
    """`--switch budget:N`: prompts that failed wait in `buffer`, for an SFT step on N of them."""
    size = int(rule.removeprefix("budget:"))
    right = (done.groups.correct == 1).any(dim=1)
    failed = [example for example, found in zip(done.examples, right, strict=True) if not found]
    for examples in parallel.gather(failed):  # every process keeps the same buffer
        buffer += examples
    if len(buffer) < size:
        return {}
    batch, buffer[:] = buffer[:size], buffer[size:]
    target_length = imitate(batch)["target_length"]
    explored = parallel.sum_numbers({"prompts": len(done.examples)})["prompts"]
    return {"memorized": size / (size + explored), "target_length": target_length}
