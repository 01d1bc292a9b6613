"""The order of the rows, and threads that prepare the next step's inputs while this one runs."""

import collections
import copy
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from support import parallel

Job = TypeVar("Job")
Result = TypeVar("Result")


def shuffled_rows(seed: int, count: int, places: range) -> list[int]:
    """Which of `count` rows stand at these places, of all epochs in a row, each shuffled by (seed, epoch)."""
    orders = {}
    for epoch in range(places[0] // count, places[-1] // count + 1):
        orders[epoch] = np.random.default_rng([seed, epoch]).permutation(count)
    return [int(orders[i // count][i % count]) for i in places]


def worker_threads() -> int:
    """How many threads prepare inputs: this process's part of the cores, one kept for the step itself."""
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(16, cores - 1))


def for_device(inputs: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Inputs made small and ready to be copied to a GPU while it works; as they are for a CPU."""
    if device.type != "cuda":
        return inputs
    ready = {}
    for name, tensor in inputs.items():
        if name == "pixel_values":  # the tower computes in half precision: it would round them itself
            tensor = tensor.to(parallel.half_precision())
        if name == "pixel_attention_mask":  # as int64 it is nearly as large as the images
            tensor = tensor.bool()
        # From memory that is not pinned, a copy makes the CPU wait.
        ready[name] = tensor.pin_memory()
    return ready


def to_device(inputs: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Copy inputs to the device; from pinned memory this takes none of the CPU's time."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}


def in_threads(work: Callable[[Job, Any], Result], processor: Any, jobs: Iterable[Job],
               ahead: int) -> Iterator[Result]:
    """Yield `work(job, processor)` of each job, in order; up to `ahead` jobs are done before they are asked for.

    Each thread has a copy of the processor, because a tokenizer cannot serve two.
    """
    threads = min(worker_threads(), ahead)
    free, local = [copy.deepcopy(processor) for _ in range(threads)], threading.local()

    def take_processor() -> None:
        local.processor = free.pop()

    def run(job: Job) -> Result:
        return work(job, local.processor)

    waiting: collections.deque[Future[Result]] = collections.deque()
    pool = ThreadPoolExecutor(threads, initializer=take_processor)
    try:
        for job in jobs:
            waiting.append(pool.submit(run, job))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
