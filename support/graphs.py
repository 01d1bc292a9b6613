"""CUDA graphs: a step of decoding is recorded once and replayed, instead of launching every kernel."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm


class Recorder:
    """A device's stream for recording, and the memory pool that its graphs share."""

    # torch.cuda.graph() would wait for the device and empty the allocator's cache at every recording.
    def __init__(self, device: int) -> None:
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self.latest: Any = None  # kept: without a graph alive the pool could never be recorded into again


recorder = functools.cache(Recorder)  # one for each device


def capture(model: Any, step: Callable[[], None]) -> Callable[[], None]:
    """Record a step, which must read and write fixed tensors alone; what to call in its place.

    If that fails, the step itself, now and ever after. Raises torch.OutOfMemoryError as such.
    """
    if hasattr(model, "uncapturable"):  # it failed before, and would fail again
        return step
    graph, own = torch.cuda.CUDAGraph(), recorder(torch.cuda.current_device())
    own.stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(own.stream):
            # Other threads, which prepare the next step's images, go on meanwhile.
            graph.capture_begin(pool=own.pool, capture_error_mode="thread_local")
            try:
                step()
            finally:
                graph.capture_end()
    except RuntimeError as error:
        # Where the step fails, ending the recording fails too: the first error is the cause.
        cause = error.__context__ or error
        recorder.cache_clear()  # its pool may be left open
        if isinstance(cause, torch.OutOfMemoryError):
            raise cause from None  # a matter of memory, not of graphs
        model.uncapturable = True
        reason = f"{type(cause).__name__}: {str(cause).splitlines()[0]}"
        tqdm.write(f"decoding without a CUDA graph, slowly: {reason}", file=sys.stderr)
        return step
    torch.cuda.current_stream().wait_stream(own.stream)
    own.latest = graph
    return graph.replay
