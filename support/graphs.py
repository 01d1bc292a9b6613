"""CUDA graphs: a step of decoding is recorded once and replayed, instead of launching every kernel."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm


def capture(model: Any, step: Callable[[], None]) -> Callable[[], None]:
    """Record a step, which must read and write fixed tensors alone; what to call in its place."""
    if hasattr(model, "uncapturable"):  # it failed before, and would fail again
        return step
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads, which prepare the next step's images, go on meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
    except RuntimeError as error:
        # The failed capture's stream is still in use.
        torch.cuda.set_stream(torch.cuda.default_stream())
        model.uncapturable = True
        cause = str(error).splitlines()[0]
        tqdm.write(f"decoding without a CUDA graph, slowly: {cause}", file=sys.stderr)
        return step
    return graph.replay
