"""Where the time of a step goes, and what the hardware would allow.

    python -m support.benchmark --steps 10 --model SmolVLM-256M --data chartqa --prompts 4

Times steps of the run that the other flags of dyme.py describe, with responses of full length and coin-flip
rewards, so that every group explores. Nothing is saved. The last line is the median step.
"""

import contextlib
import copy
import itertools
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import dyme
from dyme import Config, Groups, Policy, Prefix, Rollout, Sequence
from reward import Example
from support import data, memory, onednn, parallel, runs, settings, vision


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
    device = parallel.select_device(cfg.device)
    policy = dyme.load_policy(cfg.model, device, cfg.image_edge)
    policy = replace(policy, end_ids=[])  # no response ever ends
    trainer = dyme.make_trainer(replace(cfg, beta=0.0), policy)
    trainer.cfg, trainer.score = cfg, coin_flips
    if cfg.beta:
        trainer.reference = copy.deepcopy(policy.model).requires_grad_(False)
    if trainer.helper:
        trainer.helper.file, trainer.helper.known = None, {}
    if not cfg.micro_batch:
        cfg.micro_batch = memory.choose_micro_batch(dyme.trial_update, trainer, examples)
    records = time_steps(trainer, examples, steps)
    if parallel.is_main():
        median = {name: float(np.median([r[name] for r in records[1:]])) for name in records[0]}
        batch = [examples[i] for i in dyme.step_rows(cfg, steps, len(examples))]
        print_figures(cfg, policy, steps, median, *step_floor(cfg, policy, batch))


def time_steps(trainer: dyme.Trainer, examples: list[Example], steps: int) -> list[dict[str, float]]:
    """Seconds of the parts of each step, the first of which warms up."""
    cfg, spent = trainer.cfg, time_sampling(trainer.policy)
    records = []
    stream = dyme.feed_prompts(trainer, examples, range(steps + 1))
    bar = tqdm(range(steps + 1), "benchmark", ncols=80, disable=not parallel.is_main())
    with contextlib.closing(stream), trainer.helper or contextlib.nullcontext():
        for step in bar:
            spent.clear()
            batch = [examples[i] for i in dyme.step_rows(cfg, step, len(examples))]
            inputs = itertools.islice(stream, dyme.micro_batches(cfg, len(batch)))
            start = time.perf_counter()
            with vision.once(trainer.policy.model, trainer.features, cfg.vision_cache):
                done = dyme.take_step(trainer, batch, step, dyme.schedule(cfg, step)[0], 0.0, inputs)
            taken = time.perf_counter() - start
            parts = {name: done.metrics.get(f"seconds_{name}", 0.0)
                     for name in ("feed", "scoring", "update")}
            decoding = done.metrics.get("seconds_sampling", 0.0) - spent["prompt"]
            records.append(parts | {"vision": spent["vision"], "prompt": spent["prompt"] - spent["vision"],
                                    "decode": decoding, "step": taken, "tokens": done.metrics["tokens"]})
    return records


def coin_flips(policy: Policy, rolled: Rollout, examples: list[Example], *weights: float) -> Groups:
    """Score as always, then let coins decide what is right, though one of each group is and one is not."""
    groups = dyme.score(policy, rolled, examples, *weights)
    coins = torch.randint(2, groups.correct.shape, generator=torch.Generator().manual_seed(0)).float()
    coins[:, :2] = torch.tensor([1.0, 0.0])
    return replace(groups, correct=coins, rewards=coins)


def seconds(device: torch.device) -> float:
    """Now, with the work handed to the device done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_sampling(policy: Policy) -> Counter[str]:
    """Count the seconds that prompts (images included) and images take when sampling, from now on."""
    spent: Counter[str] = Counter()

    def hook(name: str, sign: int) -> Callable[..., None]:
        def count(_: Any, __: Any, kwargs: dict[str, Any], *___: Any) -> None:
            if not torch.is_grad_enabled() and "cache" not in kwargs:  # else update, or decoding
                spent[name] += sign * seconds(policy.device)
        return count

    towers = [("vision", tower) for tower in vision.towers(policy.model)]
    for name, module in [("prompt", policy.model.base_model), *towers]:
        module.register_forward_pre_hook(hook(name, -1), with_kwargs=True)
        module.register_forward_hook(hook(name, +1), with_kwargs=True)
    return spent


def step_floor(cfg: Config, policy: Policy, examples: list[Example]) -> tuple[dict[str, float], float, float]:
    """Seconds that a step's parts must take here, the FLOP/s of matrix products and the bytes/s of copies.

    Decoding reads weights and cache once per token; the rest makes its matrix products.
    """
    model, chunk = policy.model, examples[:min(cfg.micro_batch, len(parallel.share(len(examples))))]
    inputs = dyme.encode_prompts(policy, chunk, cfg.max_new_tokens)
    rows = [p for p in range(len(chunk)) for _ in range(cfg.generations)]

    def flops(work: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False, custom_mapping=onednn.FLOPS) as counter:
            work()
        return counter.get_total_flops()

    def prompt() -> Prefix:
        with torch.no_grad(), policy.autocast():
            return dyme.encode_prefix(model, inputs)

    def update() -> None:
        sequences = [Sequence(p, [0] * cfg.max_new_tokens, 1.0, True) for p in rows]
        dyme.sequence_logprobs(policy, model, inputs, rows, sequences, 1.0)[0].sum().backward()

    with vision.once(model):
        work = {"vision": flops(prompt), "prompt": flops(prompt), "update": flops(update)}
        work["vision"] -= work["prompt"]  # the second pass found the images encoded
        cache = sum(x.keys.numel() + x.values.numel() for x in prompt().cache.layers)
    by_onednn = any(isinstance(module, onednn.Linear) for module in model.modules())
    flops_rate, copy_rate = machine_rates(policy.device, onednn.product if by_onednn else torch.mm)
    scale, size = len(parallel.share(len(examples))) / len(chunk), 2 if policy.device.type == "cuda" else 4
    towers = {id(p) for tower in vision.towers(model) for p in tower.parameters()}
    weights = sum(p.numel() for p in model.parameters() if id(p) not in towers)
    responses = cache / inputs["input_ids"].numel() * len(rows) * cfg.max_new_tokens / 2  # on average
    floor = {name: scale * x / flops_rate for name, x in work.items()}
    floor["decode"] = size * cfg.max_new_tokens * (weights + scale * (cache + responses)) / copy_rate
    return floor, flops_rate, copy_rate


def machine_rates(device: torch.device, product: Callable[[Tensor, Tensor], Tensor]) -> tuple[float, float]:
    """FLOP/s of a large matrix `product` in the precision of training, bytes/s read and written by a copy."""
    n, dtype = (8192, parallel.half_precision()) if device.type == "cuda" else (2048, torch.float32)
    a = torch.randn(n, n, device=device).to(dtype)
    block = torch.zeros(2**28, dtype=torch.uint8, device=device)
    other = torch.empty_like(block)

    def fastest(work: Callable[[], Any]) -> float:
        times = []
        for _ in range(8):
            start = seconds(device)
            work()
            times.append(seconds(device) - start)
        return min(times)

    return (2 * n**3 / fastest(lambda: product(a, a)),
            2 * block.numel() / fastest(lambda: other.copy_(block)))


def print_figures(cfg: Config, policy: Policy, steps: int, median: dict[str, float],
                  floor: dict[str, float], flops_rate: float, copy_rate: float) -> None:
    """Print the parts of a step beside their floor; the last line is the median step."""
    print(f"{cfg.model}, {cfg.mode}, {cfg.prompts} prompts x {cfg.generations} responses x "
          f"{cfg.max_new_tokens} tokens, micro-batch {cfg.micro_batch}, {policy.device}; "
          f"medians of {steps} steps")
    print(f"{'':10}{'seconds':>9}{'floor':>9}")
    for name in ("feed", "vision", "prompt", "decode", "scoring", "update"):
        print(f"{name:10}{median[name]:9.3f}{floor.get(name, 0.0):9.3f}")
    memory = parallel.peak_memory_gib(policy.device) or math.nan
    print(f"{'step':10}{median['step']:9.3f}{sum(floor.values()):9.3f}")
    print(f"floor: {flops_rate / 1e12:.2f} TFLOP/s of matrix products, {copy_rate / 1e9:.0f} GB/s of copies")
    print(f"{median['tokens'] / median['step']:.0f} sampled tokens/s, peak memory {memory:.2f} GiB")
    print(f"whole run: {cfg.steps} steps, {median['step'] * cfg.steps / 3600:.2f} hours without evaluations")
    print(f"median {median['step']:.3f} s/step")


def main() -> None:
    """Read the flags, join the other processes if there are any, and time."""
    steps, argv = split_steps(sys.argv[1:])
    cfg = dyme.parse_config(argv)
    with parallel.processes(cfg.device):
        benchmark(cfg, steps)


if __name__ == "__main__":
    sys.exit(runs.run_main(main))
