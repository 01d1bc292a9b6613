"""Threads that prepare the next step's inputs while this one runs."""

import collections
import copy
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


def in_threads(work: Callable[[Job, Any], Result], processor: Any, jobs: Iterable[Job],
               ahead: int) -> Iterator[Result]:
    """Yield `work(job, processor)` of each job, in order; up to `ahead` jobs are done before they are asked for.

    Each thread has a copy of the processor, because a tokenizer cannot serve two.
    """
    threads = max(1, min(4, (os.cpu_count() or 1) // 2))
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
