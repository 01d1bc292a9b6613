"""What the paper compares DyME with: switching rules of Table 1b, and the release's deviations."""

import functools
import math
from dataclasses import replace

import torch
from torch import Tensor

import dyme
from dyme import Sequence, Step, Trainer
from reward import Example
from support import parallel


def attach(trainer: Trainer) -> None:
    """Give a trainer the switch of `--switch`, and the weights of `--released-code`."""
    cfg = trainer.cfg
    rule, _, value = cfg.switch.partition(":")
    if rule in ("explore", "anneal", "budget"):
        trainer.switch = dyme.always_explore
    if rule == "budget":
        trainer.kept["buffer"] = []  # what a step that runs out of memory adds is taken back
    if rule == "memorize":
        trainer.switch = lambda r_a, r_t: torch.zeros(len(r_a), dtype=torch.bool)
    if rule == "threshold":
        trainer.switch = functools.partial(threshold, float(value), cfg.thinking_weight)
    if cfg.released_code:
        trainer.advantages = released_advantages

    def weigh(record: Step) -> list[Sequence]:
        if rule == "anneal":
            record.sequences += anneal(trainer, record)
        if rule == "budget":
            memorize_failures(trainer, record, int(value))
        if cfg.released_code:
            weigh_as_released(record, cfg.generations)
        return record.sequences

    trainer.weigh = weigh


def threshold(least: float, thinking_weight: float, r_a: Tensor, r_t: Tensor) -> Tensor:
    """`--switch threshold:T`: explore once the batch's mean reward, from 0 to 1, is at least T."""
    rewards = (r_a + thinking_weight * r_t) / (1 + thinking_weight)
    # Of all processes: they must decide alike.
    batch = parallel.sum_numbers({"reward": rewards.sum().item(), "count": rewards.numel()})
    return torch.full((len(r_a),), batch["reward"] / batch["count"] >= least)


def targets(trainer: Trainer, examples: list[Example], weight: float) -> list[Sequence]:
    """What is memorized of each example."""
    return [Sequence(i, dyme.target_ids(trainer.policy, example), weight, False)
            for i, example in enumerate(examples)]


def anneal(trainer: Trainer, record: Step) -> list[Sequence]:
    """`--switch anneal`: beside exploration every target, weighted by a cosine from 1 to 0."""
    weight = (1 + math.cos(math.pi * record.step / trainer.cfg.steps)) / 2 / trainer.cfg.prompts
    examples = [replace(example, trace=trainer.trace(example)) for example in record.examples]
    return targets(trainer, examples, weight)


def memorize_failures(trainer: Trainer, record: Step, size: int) -> None:
    """`--switch budget:N`: prompts that failed are buffered; N of them replace a step's own."""
    buffer = trainer.kept["buffer"]
    right = (record.r_a == 1).any(dim=1)
    failed = [example.name for i, example in enumerate(record.examples) if not right[i]]
    for names in parallel.gather(failed):  # every process keeps the same buffer
        buffer += names
    if len(buffer) < size:
        return
    rows, own = {example.name: example for example in trainer.rows}, dyme.share(size)
    batch = [rows[name] for name in buffer[:size]][own.start:own.stop]
    del buffer[:size]
    # From here on it is a step of SFT on other prompts.
    record.examples, record.inputs = batch, dyme.encoded(trainer, batch, None)
    record.explore = torch.zeros(len(batch), dtype=torch.bool)
    record.responses = []
    record.sequences = targets(trainer, batch, 1 / size)


def released_advantages(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """Advantages (p, K) as in the release: by the sample standard deviation (divide by K - 1)."""
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + eps)
    return advantages.masked_fill(dyme.no_variance(rewards)[:, None], 0.0)


def weigh_as_released(record: Step, generations: int) -> None:
    """Drop groups that are all right; a target, which replaces one of K responses, weighs 1/K."""
    for s in record.sequences:
        if not s.explore:
            s.weight /= generations
        elif (record.r_a[s.prompt] == 1).all():
            s.weight = 0.0
