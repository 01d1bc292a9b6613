"""How many prompts fit into a forward and backward pass."""

from collections.abc import Callable

import torch

from support import parallel

HEADROOM = 0.85  # share of the free memory to plan with: prompts differ in length, and memory gets fragmented


def choose_micro_batch(trial: Callable[[int], None], most: int, device: torch.device, kept: int) -> int:
    """Measure `trial(n)`, an update of n prompts, for 1 and 2 of them; the micro-batch for `--micro-batch 0`.

    `kept` bytes are needed beside it (the optimiser's state). On the CPU the answer is 2: more is no faster there.
    """
    if device.type != "cuda":
        return min(2, most)

    def peak(prompts: int) -> int:
        torch.cuda.reset_peak_memory_stats(device)
        trial(prompts)
        return torch.cuda.max_memory_allocated(device)

    trial(1)  # warms up: libraries take their workspace once
    size = largest(peak, most, HEADROOM * torch.cuda.mem_get_info(device)[1] - kept)
    return min(parallel.gather(size))  # processes on smaller GPUs decide


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
