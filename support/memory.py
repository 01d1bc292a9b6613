"""How many prompts fit into a forward and backward pass."""

from collections.abc import Callable
from typing import Any

import torch

from reward import Example
from support import parallel

HEADROOM = 0.85  # share of the free memory to plan with: prompts differ in length, and memory gets fragmented


def choose_micro_batch(trial: Callable[[Any, list[Example]], None], trainer: Any, examples: list[Example]) -> int:
    """For `--micro-batch 0`: how many prompts' updates the device holds, measured by `trial(trainer, examples)`.

    On the CPU the answer is 2: more is no faster there.
    """
    policy, device = trainer.policy, trainer.policy.device
    most = min(len(parallel.share(trainer.cfg.prompts)), len(examples))
    if device.type != "cuda":
        return min(2, most)

    def peak(prompts: int) -> int:
        torch.cuda.reset_peak_memory_stats(device)
        trial(trainer, examples[:prompts])
        return torch.cuda.max_memory_allocated(device)

    peak(1)  # warms up: libraries take their workspace once
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    moments = sum(8 * p.numel() for p in trained)  # of AdamW, in float32: made in the first step
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)  # other programs' part apart
    size = largest(peak, most, HEADROOM * free - moments)
    size = min(parallel.gather(size))  # processes on smaller GPUs decide
    if parallel.is_main():
        print(f"--micro-batch {size}: measured")
    return size


def largest(peak: Callable[[int], float], most: int, available: float) -> int:
    """The largest power of two, up to `most`, of prompts whose update should fit into `available` bytes.

    Memory grows linearly with the prompts: `peak(n)`, in bytes, is asked for n = 1 and 2 only.
    """
    one = peak(1)
    try:
        each = peak(2) - one
    except torch.OutOfMemoryError:
        return 1
    size = 1
    while 2 * size <= most and one + (2 * size - 1) * each <= available:
        size *= 2
    return size
