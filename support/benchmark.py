"""Where the time of a step goes, and what the hardware would allow.

    python -m support.benchmark --steps 10 --model SmolVLM-256M --data chartqa --prompts 4

Times steps of the run that the other flags of dyme.py describe (`--plain` among them), with
responses of full length and coin-flip rewards, so that every group explores. Nothing is saved. A
part's floor is what its matrix products, or in decoding its reads of weights and cache, must take
on this machine. The last line is the median step.
"""

import contextlib
import copy
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import dyme
from dyme import Config, Policy, Response, Sequence, Trainer
from reward import Example
from support import data, fast, parallel, runs, settings

PARTS = ("feed", "vision", "prompt", "decode", "scoring", "update")
# Floating-point operations of `fast.product`, from the shapes of its factors. A torch without
# oneDNN, as on a Mac, has no such operation.
FLOPS = {operation: lambda a, b, *_, **__: 2 * math.prod(a) * b[0]
         for operation in [getattr(torch.ops.mkldnn, "_linear_pointwise", None)] if operation}


def split_steps(argv: list[str]) -> tuple[int, list[str]]:
    """Take `--steps N`, which means timed steps here, out of the flags; [10]."""
    for i, flag in enumerate(argv):
        if flag == "--steps" or flag.startswith("--steps="):
            given = flag.partition("=")[2] or "".join(argv[i + 1:i + 2])
            cfg = dyme.parse_config(["--steps", given])  # the same errors
            return cfg.steps, argv[:i] + argv[i + 1 + ("=" not in flag):]
    return 10, argv


def benchmark(cfg: Config, steps: int) -> None:
    """Time so many steps of training, after one of warm-up."""
    examples = data.load_data(cfg.data, "train", cfg.traces, cfg.augmented, cfg.hints)
    settings.settle_length(cfg, len(examples))
    parallel.check_share(cfg.prompts)
    trainer = make_trainer(cfg, examples)
    cfg = trainer.cfg
    records = time_steps(trainer, steps)
    if parallel.is_main():
        median = {name: float(np.median([r[name] for r in records[1:]])) for name in records[0]}
        batch = [examples[i] for i in dyme.step_rows(cfg, steps, len(examples))]
        print_figures(cfg, trainer.policy, steps, median, *step_floor(cfg, trainer.policy, batch))


def make_trainer(cfg: Config, examples: list[Example]) -> Trainer:
    """A trainer whose responses never end, and which changes no weight."""
    device = parallel.select_device(cfg.device)
    policy = dyme.load_policy(cfg.model, device, cfg.image_edge)
    most = len(dyme.share(cfg.prompts))
    cfg = replace(cfg, lr=0.0, helper_url="",
                  micro_batch=cfg.micro_batch or (most if device.type == "cuda" else min(2, most)))
    trainer = dyme.make_trainer(cfg, replace(policy, end_ids=[]))
    trainer.judge, trainer.rows = coin_flips, examples
    if cfg.beta:
        trainer.reference = copy.deepcopy(trainer.policy.model).requires_grad_(False)
    return trainer


def coin_flips(responses: list[list[Response]], examples: list[Example]) -> tuple[Tensor, Tensor]:
    """Judge as always, then let coins decide what is right, though one is and one is not."""
    r_a, r_t = dyme.judge(responses, examples)
    coins = torch.randint(2, r_a.shape, generator=torch.Generator().manual_seed(0)).float()
    coins[:, :2] = torch.tensor([1.0, 0.0])
    return coins, torch.zeros_like(r_t)


def time_steps(trainer: Trainer, steps: int) -> list[dict[str, float]]:
    """Seconds of the parts of each step, the first of which warms up."""
    spent, records = time_sampling(trainer.policy), []
    stream = dyme.feed_prompts(trainer, range(steps + 1))
    with contextlib.closing(stream):
        for step in tqdm(range(steps + 1), "benchmark", ncols=80, disable=not parallel.is_main()):
            spent.clear()
            start = now(trainer.policy.device)
            done = dyme.take_step(trainer, step, Path(), stream).metrics
            taken = now(trainer.policy.device) - start
            parts = {name: done[f"seconds_{name}"] for name in ("feed", "scoring", "update")}
            parts |= {"vision": spent["vision"], "prompt": spent["prompt"] - spent["vision"],
                      "decode": done["seconds_sampling"] - spent["prompt"]}
            records.append(parts | {"step": taken, "tokens": done["tokens"]})
    return records


def now(device: torch.device) -> float:
    """Seconds, with the work handed to the device done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_sampling(policy: Policy) -> Counter[str]:
    """Count the seconds that prompts, and images in them, take in sampling from now on."""
    spent: Counter[str] = Counter()

    def hook(name: str, sign: int) -> Callable[..., None]:
        def count(_: Any, __: Any, kwargs: dict[str, Any], *___: Any) -> None:
            if not torch.is_grad_enabled() and "cache" not in kwargs:  # else update, or decoding
                spent[name] += sign * now(policy.device)
        return count

    towers = [("vision", tower) for tower in dyme.vision_towers(policy.model)]
    for name, module in [("prompt", policy.model.base_model), *towers]:
        module.register_forward_pre_hook(hook(name, -1), with_kwargs=True)
        module.register_forward_hook(hook(name, +1), with_kwargs=True)
    return spent


def step_floor(cfg: Config, policy: Policy,
               examples: list[Example]) -> tuple[dict[str, float], float, float]:
    """Seconds that a step's parts must take here, FLOP/s of matrix products, bytes/s of copies.

    Decoding reads weights and cache once per token; the rest makes its matrix products.
    """
    share = len(dyme.share(len(examples)))
    model, chunk = policy.model, examples[:min(cfg.micro_batch, share)]
    inputs = dyme.encode_prompts(policy, chunk, cfg.max_new_tokens)
    rows = [p for p in range(len(chunk)) for _ in range(cfg.generations)]
    sequences = [Sequence(p, [0] * cfg.max_new_tokens, 1.0, True) for p in rows]
    work, caches = dict[str, float](), []
    for part in ("with images", "prompt", "update"):
        with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
            if part == "update":
                policy.logprobs(policy, model, inputs, rows, sequences, 1.0)[0].sum().backward()
            else:  # the fast path encodes images once: the second time they cost nothing
                with torch.no_grad(), policy.autocast():
                    caches.append(dyme.encode_prefix(model, inputs).cache)
        work[part] = counter.get_total_flops()
    work["vision"] = work.pop("with images") - work["prompt"]
    cache = sum(x.keys.numel() + x.values.numel() for x in caches[0].layers)
    flops_rate, copy_rate, size = machine_rates(policy)
    towers = {id(p) for tower in dyme.vision_towers(model) for p in tower.parameters()}
    weights = sum(p.numel() for p in model.parameters() if id(p) not in towers)
    responses = cache / inputs["input_ids"].numel() * len(rows) * cfg.max_new_tokens / 2  # average
    scale = share / len(chunk)
    floor = {name: scale * x / flops_rate for name, x in work.items()}
    read = weights + scale * (cache + responses)  # numbers, for every token
    floor["decode"] = size * cfg.max_new_tokens * read / copy_rate
    return floor, flops_rate, copy_rate


def machine_rates(policy: Policy) -> tuple[float, float, int]:
    """FLOP/s of a large product as the policy makes it, bytes/s of a copy, bytes of a number."""
    device = policy.device
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device)
    block = torch.zeros(2**28, dtype=torch.uint8, device=device)
    other = torch.empty_like(block)
    with torch.no_grad(), policy.autocast():
        half = torch.is_autocast_enabled(device.type)
        a = a.to(torch.get_autocast_dtype(device.type)) if half else a
        by_onednn = any(isinstance(m, fast.Linear) for m in policy.model.modules()) and not half
        product = fast.product if by_onednn else torch.mm
        times: dict[str, list[float]] = {"product": [], "copy": []}
        jobs = {"product": lambda: product(a, a), "copy": lambda: other.copy_(block)}
        for _ in range(8):
            for name, job in jobs.items():
                start = now(device)
                job()
                times[name].append(now(device) - start)
    rates = 2 * n**3 / min(times["product"]), 2 * block.numel() / min(times["copy"])
    return *rates, a.element_size()


def print_figures(cfg: Config, policy: Policy, steps: int, median: dict[str, float],
                  floor: dict[str, float], flops_rate: float, copy_rate: float) -> None:
    """Print the parts of a step beside their floor; the last line is the median step."""
    path = "plain" if policy.rollout is dyme.rollout else "fast"
    print(f"{cfg.model}, {cfg.mode}, {path}, {cfg.prompts} prompts x {cfg.generations} responses x "
          f"{cfg.max_new_tokens} tokens, micro-batch {cfg.micro_batch}, {policy.device}, "
          f"{steps} steps")
    print(f"{'':10}{'seconds':>9}{'floor':>9}{'ratio':>7}")
    floor |= {"step": sum(floor.values())}
    for name in (*PARTS, "step"):
        least = floor.get(name, 0.0)
        ratio = f"{median[name] / least:7.1f}" if least else ""
        print(f"{name:10}{median[name]:9.3f}{least:9.3f}{ratio}")
    memory = parallel.peak_memory_gib(policy.device) or math.nan
    print(f"{flops_rate / 1e12:.2f} TFLOP/s of products, {copy_rate / 1e9:.0f} GB/s of copies")
    print(f"{median['tokens'] / median['step']:.0f} tokens/s, peak memory {memory:.2f} GiB; "
          f"{cfg.steps} steps take {median['step'] * cfg.steps / 3600:.2f} hours and evaluations")
    print(f"median {median['step']:.3f} s/step")


def main() -> None:
    """Read the flags, join the other processes if there are any, and time."""
    steps, argv = split_steps(sys.argv[1:])
    cfg = dyme.parse_config(argv)
    with parallel.processes(cfg.device):
        benchmark(cfg, steps)


if __name__ == "__main__":
    sys.exit(runs.run_main(main))
