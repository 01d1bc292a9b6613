"""Devices, and the processes that torchrun starts: each takes its share of a step's prompts."""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from support import UserError

T = TypeVar("T")

# ---- Devices -------------------------------------------------------------------------------------


def select_device(name: str) -> torch.device:
    """Resolve `--device`; torchrun's processes get a GPU each. Raises UserError if there is none such."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("mps"):
        raise UserError(f"--device {name}: was never tested, so it is not offered; use cpu")
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" else name
    try:
        torch.ones(1, device=device).cpu()
        if name.startswith("cuda"):
            torch.cuda.set_device(device)
            # On Hopper PyTorch prefers cuDNN's attention. With a mask its gradients can be NaN
            # (pytorch#196678), and it plans anew, for up to a second, at every new length: here, every batch.
            torch.backends.cuda.enable_cudnn_sdp(False)
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None


def half_precision() -> torch.dtype:
    """bfloat16 where the GPU computes in it, float16 (with a gradient scaler) on older ones."""
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def gradient_scaler(device: torch.device) -> torch.amp.GradScaler:
    """A scaler, which does something only where gradients are made in float16."""
    needed = device.type == "cuda" and half_precision() == torch.float16
    return torch.amp.GradScaler(device.type, enabled=needed)


def limit_threads(parameters: int) -> None:
    """Let a tiny model run on one thread: two gain little, and beside a busy process wait for each other."""
    if parameters < 2e6:
        torch.set_num_threads(1)


def peak_memory_gib(device: torch.device) -> float | None:
    """Peak memory so far: the allocator's on CUDA, the process's elsewhere (None on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    with contextlib.suppress(ImportError):
        import resource
        unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, kilobytes elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return None


# ---- Processes -----------------------------------------------------------------------------------


@contextlib.contextmanager
def processes(device: str) -> Iterator[None]:
    """Join the processes that torchrun started, if it did; `device` as in `select_device`."""
    cuda = select_device(device).type == "cuda"
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():  # a cluster may set one of them by itself
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield
        if dist.is_initialized():
            dist.barrier()  # one that leaves early can take the others' connections down with it
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Is this the process that writes and prints?"""
    return not dist.is_initialized() or dist.get_rank() == 0


def share(total: int) -> range:
    """This process's share of `total` things: all of them, if it is alone."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return range(rank * total // count(), (rank + 1) * total // count())


def check_share(prompts: int) -> None:
    """Raise UserError if a process would have no prompt of a step."""
    if prompts < count():
        raise UserError(f"--prompts {prompts}: fewer than the {count()} processes")


def chunks(things: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Cut a list or range into pieces of `size`; the last one may be shorter."""
    for start in range(0, len(things), size):
        yield things[start:start + size]


def gather(value: T) -> list[T]:
    """The values of all processes, in every process."""
    values = [value] * count()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def errors_shared() -> Iterator[None]:
    """Run a block; the UserError that one process meets is raised in all, so that none waits for ever."""
    found: UserError | None = None
    try:
        yield
    except UserError as error:
        found = error
    for error in gather(found):
        if error is not None:
            raise error


def sum_numbers(numbers: dict[str, Any]) -> dict[str, float]:
    """Add up the numbers of all processes, which must have the same keys."""
    if not dist.is_initialized():
        return numbers
    total = torch.tensor([float(number) for number in numbers.values()], dtype=torch.float64)
    dist.all_reduce(total)
    return dict(zip(numbers, total.tolist(), strict=True))


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Add up the gradients of all processes, in one all-reduce."""
    # No further averaging: the weights of the sequences hold the step's own denominators.
    if not dist.is_initialized():
        return
    trained = [p for p in parameters if p.requires_grad]
    # A parameter without a gradient in any process must stay without one, or AdamW would decay it.
    used = torch.tensor([float(p.grad is not None) for p in trained], device=trained[0].device)
    gradients = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained]
    flat = torch.cat([used, *gradients])
    dist.all_reduce(flat)
    used, *gradients = flat.split([len(trained), *(p.numel() for p in trained)])
    for p, anywhere, gradient in zip(trained, used.tolist(), gradients, strict=True):
        p.grad = gradient.view_as(p) if anywhere else None
