"""Devices, the processes that torchrun starts, and threads that prepare inputs."""

import collections
import contextlib
import copy
import ctypes
import functools
import gc
import itertools
import math
import os
import resource
import sys
import timeit
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from support import UserError

if TYPE_CHECKING:
    from dyme import Config
    from reward import Example

T = TypeVar("T")
Job = TypeVar("Job")
ALL_THREADS = torch.get_num_threads()
TINY = 2e6  # weights; on a CPU a model with fewer keeps one thread, and float32, as the toy does

# ---- Devices -------------------------------------------------------------------------------------


def select_device(name: str) -> torch.device:
    """Resolve `--device`; torchrun gives each process a GPU. Raises UserError if there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: give auto, cpu, cuda or cuda:N; no other was ever tried")
    device = f"cuda:{dist.get_node_local_rank(0)}" if name == "cuda" else name
    try:
        if device == "cpu":
            keep_freed_memory()
        torch.ones(1, device=device).cpu()
        if name.startswith("cuda"):
            torch.cuda.set_device(device)
            # On Hopper PyTorch prefers cuDNN's attention. With a mask its gradients can be NaN
            # (pytorch#196678), and it plans anew, for up to a second, at every new length.
            torch.backends.cuda.enable_cudnn_sdp(False)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None


def keep_freed_memory() -> None:
    """Have glibc reuse large blocks: fresh pages took up to half of an update."""
    # oneDNN keeps what it prepares for each shape, a thousand times by default. Laid among blocks
    # that are used again, it would let memory grow as long as responses of new lengths come. Both
    # numbers are read at its first product: afterwards, with a model loaded, it would be too late.
    for cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "16")
    trim_threshold, mmap_max = -1, -4
    with contextlib.suppress(OSError, AttributeError):  # other systems manage memory otherwise
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(trim_threshold, -1)
        libc.mallopt(mmap_max, 0)


def resolve_precision(model: Any, wanted: str = "auto") -> torch.dtype:
    """The precision of a model's forward passes; `auto`: half where the hardware has it."""
    if wanted == "auto" and model.device.type == "cuda":  # older ones lack bfloat16, or emulate it
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if wanted == "auto" and model.device.type == "cpu" and model.num_parameters() >= TINY:
        return torch.bfloat16 if bf16_is_faster() else torch.float32
    return torch.bfloat16 if wanted == "bf16" else torch.float32


@functools.cache
def bf16_is_faster() -> bool:
    """Does this CPU multiply faster in bf16? Tried out, where it says that it has it."""
    # Of two that do, an AMD EPYC took half the time, an Intel Xeon without AMX twice the time.
    if not getattr(torch.cpu, "get_capabilities", dict[str, bool])().get("avx512_bf16"):
        return False
    seconds, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for whatever else is running
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.ones(512, 512, dtype=dtype)
        product = functools.partial(torch.nn.functional.linear, a, a)
        seconds.append(min(timeit.repeat(product, number=1, repeat=20)))
    torch.set_num_threads(threads)
    return seconds[0] < seconds[1]


def settle_precision(model: Any, wanted: str) -> Literal["auto", "float32", "bf16"]:
    """What `auto` means here, by name: a run goes on as it began, on any machine."""
    dtype = gather(resolve_precision(model, wanted))[0]  # the same for all processes
    # A GPU without bfloat16 is left `auto`: float16 is not for asking.
    return "bf16" if dtype == torch.bfloat16 else "float32" if dtype == torch.float32 else "auto"


def autocast(model: Any, wanted: str = "auto"
             ) -> Callable[[], contextlib.AbstractContextManager]:
    """What makes the context of forward passes. The weights stay float32 in any case."""
    # In bf16 a step of 1e-5 would be lost in rounding.
    dtype = resolve_precision(model, wanted)
    if dtype == torch.float32:
        return contextlib.nullcontext
    return functools.partial(torch.autocast, model.device.type, dtype)


def gradient_scaler(model: Any, wanted: str = "auto") -> torch.amp.GradScaler:
    """A scaler, which does something only where gradients are made in float16."""
    needed = resolve_precision(model, wanted) == torch.float16
    return torch.amp.GradScaler(model.device.type, enabled=needed)


def set_threads(parameters: int) -> None:
    """Let a tiny model run on one thread: two gain little, and beside a busy process they wait."""
    torch.set_num_threads(1 if parameters < TINY else ALL_THREADS)


def pass_size(device: torch.device, cfg: "Config", examples: Iterable["Example"]) -> int:
    """How many prompts to take in a pass where --micro-batch is 0."""
    if device.type == "cuda":
        return -(-cfg.prompts // count())  # this process's share; halved until they fit
    # Some 1,000 tokens keep a CPU busy; more take memory, and fewer write all gradients often.
    responses = 1 if cfg.mode == "sft" else cfg.generations
    of_text = max(1, 1024 // (responses * cfg.max_new_tokens + 64))  # prompts of text are short
    most = 2 if any(example.image for example in examples) else of_text
    return min(most, cfg.prompts * cfg.generations // responses)


def while_it_fits(size: int, work: Callable[[int], T]) -> T:
    """`work(size)`; where a GPU's memory does not suffice, again with half the size."""
    while True:
        try:
            return work(size)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        size //= 2
        free_memory()  # after the handler, which holds what the failed try had made


def free_memory() -> None:
    """Give back what nobody uses: the recording of a CUDA graph can take it from nowhere else."""
    gc.collect()
    torch.cuda.empty_cache()


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far: the allocator's on CUDA, the process's elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# ---- Processes -----------------------------------------------------------------------------------


@contextlib.contextmanager
def processes(device: str) -> Iterator[None]:
    """Join the processes that torchrun started, if it did; `device` as in `select_device`."""
    cuda = select_device(device).type == "cuda"
    if dist.is_torchelastic_launched():
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
            if cuda:  # NCCL takes its memory at its first use, and by then a GPU may be full
                dist.all_reduce(torch.zeros(1, device="cuda"))
        except (ValueError, RuntimeError) as error:
            raise UserError(f"torchrun's environment: {str(error).splitlines()[0]}") from None
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


def check_share(prompts: int) -> None:
    """Raise UserError if a process would have no prompt of a step."""
    if prompts < count():
        raise UserError(f"--prompts {prompts}: fewer than the {count()} processes")


def sum_weights(model: torch.nn.Module) -> float:
    """The sum of all weights, which tells models apart."""
    return sum(p.detach().double().sum().item() for p in model.parameters())


def check_same(model: torch.nn.Module) -> None:
    """Raise UserError if the processes have loaded different weights."""
    total = sum_weights(model)
    if not all(math.isclose(total, other, rel_tol=1e-6) for other in gather(total)):
        raise UserError("the processes of this run have loaded different weights")


def gather(value: T) -> list[T]:
    """The values of all processes, in every process."""
    values = [value] * count()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def errors_shared() -> Iterator[None]:
    """Run a block; what one process raises is raised in all, so that none waits for ever."""
    found: Exception | None = None
    try:
        yield
    except (UserError, torch.OutOfMemoryError) as error:
        found = error
    for shared in gather(found):
        if shared is not None:
            raise shared


def sum_numbers(numbers: dict[str, Any]) -> dict[str, float]:
    """Add up the numbers of all processes, which must have the same keys."""
    parts = gather(numbers)
    return {name: sum(part[name] for part in parts) for name in numbers}


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Add up the gradients of all processes."""
    # No further averaging: the weights of the sequences hold the step's own denominators.
    trained = [p for p in parameters if p.requires_grad]
    used = gather([p.grad is not None for p in trained])
    for p, *anywhere in zip(trained, *used, strict=True):
        if any(anywhere):  # else it must stay without a gradient, or AdamW would decay it
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)


# ---- Threads -------------------------------------------------------------------------------------


def for_device(inputs: dict[str, Tensor], device: torch.device,
               half: torch.dtype | None) -> dict[str, Tensor]:
    """Inputs made small and ready to be copied to a GPU while it works; as they are for a CPU.

    `half` is the precision of passes, if it is not float32.
    """
    if device.type != "cuda":
        return inputs
    # The tower would round the pixels too. Their mask is nearly as large as they are, as int64.
    smaller = {"pixel_values": half or torch.float32, "pixel_attention_mask": torch.bool}
    # Pinned, because another copy makes the CPU wait.
    return {name: x.to(smaller.get(name, x.dtype)).pin_memory() for name, x in inputs.items()}


def in_threads(work: Callable[[Job, Any], T], processor: Any, jobs: Iterable[Job],
               ahead: int) -> Generator[T]:
    """Yield `work(job, processor)` of each job, in order; `ahead` may be done before their turn."""
    # This process's part of the cores, one kept for the step itself.
    here = int(os.environ["LOCAL_WORLD_SIZE"]) if dist.is_initialized() else 1
    cores = (os.cpu_count() or 1) // here
    threads = max(1, min(16, cores - 1, ahead))
    free = [copy.deepcopy(processor) for _ in range(threads)]  # a tokenizer cannot serve two

    def run(job: Job) -> T:
        own = free.pop()
        try:
            return work(job, own)
        finally:
            free.append(own)

    pool = ThreadPoolExecutor(threads)
    submitted = (pool.submit(run, job) for job in jobs)
    try:
        waiting = collections.deque(itertools.islice(submitted, ahead))
        while waiting:
            waiting.extend(itertools.islice(submitted, 1))
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
