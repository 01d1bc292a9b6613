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
    cfg, policy, device = trainer.cfg, trainer.policy, trainer.policy.device
    most = min(len(parallel.share(cfg.prompts)), len(examples))
    if device.type != "cuda":
        return min(2, most)

    largest_rows = sorted(examples, key=lambda example: example.image is None)  # those with an image first

    def peak(prompts: int) -> int:
        torch.cuda.reset_peak_memory_stats(device)
        trial(trainer, largest_rows[:prompts])
        return torch.cuda.max_memory_allocated(device)

    peak(1)  # warms up: libraries take their workspace once
    later = later_bytes(cfg, policy.model, made=bool(trainer.optimizer.state), loaded=trainer.reference is not None)
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)  # other programs' part apart
    size = largest(peak, most, HEADROOM * free - later)
    size = min(parallel.gather(size))  # processes on smaller GPUs decide
    if parallel.is_main():
        print(f"--micro-batch {size}: measured")
    return size


def later_bytes(cfg: Any, model: torch.nn.Module, made: bool, loaded: bool) -> float:
    """What a run will hold beyond a trial: AdamW's moments if not `made`, the KL's reference if not `loaded`, images."""
    moments = 0 if made else sum(8 * p.numel() for p in model.parameters() if p.requires_grad)  # float32
    reference = sum(4 * p.numel() for p in model.parameters()) if cfg.beta and not loaded else 0
    return moments + reference + cfg.vision_cache * 2**30


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
