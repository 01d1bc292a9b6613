"""What a step logs: sums over each process's groups and sequences, and their averages."""

from typing import Any

import torch
from torch import Tensor

from support import parallel


def group_totals(groups: Any, explore: Tensor, no_variance: Tensor) -> dict[str, float]:
    """Sums over a process's groups of sampled responses (`dyme.Groups`); `explore, no_variance: (p,)` bool."""
    # Sampled responses only, never mixed with the targets that stood in for them.
    responses = [response for group in groups.responses for response in group]
    none_correct = (groups.correct < 1).all(dim=1)
    return {
        "groups": len(groups.responses),
        "explored": explore.sum().item(),
        # The two forms of collapse: nothing right to reinforce, and nothing to tell responses apart.
        "none_correct": none_correct.sum().item(),
        "no_variance": no_variance.sum().item(),
        "responses": len(responses),
        "response_tokens": sum(len(response.ids) for response in responses),
        "truncated": sum(not response.finished for response in responses),
        "reward": groups.rewards.sum().item(),
        "reward_thinking": groups.thinking.sum().item(),
        "reward_format": groups.in_format.sum().item(),
        "accuracy": groups.correct.sum().item(),
        "entropy": groups.entropy.sum().item(),
    }


def target_totals(sequences: list[Any]) -> dict[str, float]:
    """Sums over a process's sequences (`dyme.Sequence`): how many there are, and the targets among them."""
    targets = [len(s.ids) for s in sequences if not s.explore]
    return {"sequences": len(sequences), "targets": len(targets), "target_tokens": sum(targets)}


def averages(totals: dict[str, float]) -> dict[str, Any]:
    """A step's metrics, from the sums over all processes (glossary in support/README.md)."""
    targets, explored = totals["targets"], totals.get("explored", 0)
    metrics: dict[str, Any] = {
        "empty_steps": int(not totals["sequences"]),
        "loss": totals["loss"],
        "kl": totals["kl"],
        "memorized": targets / max(1, targets + explored),
        "tokens": totals["target_tokens"],
        "target_length": totals["target_tokens"] / targets if targets else None,
    }
    if "responses" in totals:
        for name in ("reward", "reward_thinking", "reward_format", "accuracy", "truncated"):
            metrics[name] = totals[name] / totals["responses"]
        for name in ("none_correct", "no_variance"):
            metrics[name] = totals[name] / totals["groups"]
        metrics["entropy"] = totals["entropy"] / totals["response_tokens"]
        metrics["response_length"] = totals["response_tokens"] / totals["responses"]
        metrics["tokens"] = totals["response_tokens"]
    for name in ("helper_calls", "helper_failures"):
        if name in totals:
            metrics[name] = totals[name]
    return metrics


def speed(logged: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Tokens per second of the whole step, and memory, to log beside its metrics."""
    parts = ("seconds_feed", "seconds_sampling", "seconds_scoring", "seconds_update")
    seconds = {name: logged.get(name, 0.0) for name in parts}  # SFT has only an update
    tokens_per_s = logged["tokens"] / sum(seconds.values())
    peak = parallel.peak_memory_gib(device)
    return seconds | {"tokens_per_s": tokens_per_s, "peak_memory_gib": peak}
