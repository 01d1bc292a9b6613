"""Where the time of a step goes, and what the hardware would allow.

    python -m support.benchmark --steps 10 --model SmolVLM-256M --data chartqa --prompts 4

Times steps of the run that the other flags of dyme.py describe; its responses have full length, and
every group explores. A part's floor is what its matrix products must take on this machine, or in
decoding its reads of weights and cache if these take longer. Nothing is saved; the last line is
the median step.
"""

import contextlib
import copy
import math
import statistics
import sys
import time
import timeit
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import dyme
from dyme import Config, Policy, Response, Sequence, Trainer
from reward import Example
from support import data, fast, parallel, runs, settings

# Floating-point operations of `fast.product`, where torch has it (not on a Mac), from the shapes.
FLOPS = {operation: lambda a, b, *_, **__: 2 * math.prod(a) * b[0]
         for operation in [getattr(torch.ops.mkldnn, "_linear_pointwise", None)] if operation}


def make_trainer(cfg: Config) -> Trainer:
    """A trainer whose responses never end, and which changes no weight."""
    examples = data.load_data(cfg.data, "train", cfg.traces, cfg.augmented, cfg.hints)
    settings.settle_length(cfg, len(examples))
    parallel.check_share(cfg.prompts)
    device = parallel.select_device(cfg.device)
    policy = dyme.load_policy(cfg.model, device, cfg.image_edge)
    micro_batch = cfg.micro_batch or parallel.pass_size(device, cfg, examples)
    cfg = replace(cfg, lr=0.0, helper_url="", micro_batch=micro_batch)
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


def time_steps(trainer: Trainer, steps: int) -> dict[str, float]:
    """Median seconds of a step's parts, and its tokens; the first step warms up."""
    device, spent, records = trainer.policy.device, time_sampling(trainer.policy), []
    with contextlib.closing(dyme.feed_prompts(trainer, range(steps + 1))) as stream:
        for step in tqdm(range(steps + 1), "benchmark", ncols=80, disable=not parallel.is_main()):
            spent.clear()
            start = now(device)
            done = dyme.take_step(trainer, step, Path(), stream).metrics
            records.append({
                "feed": done["seconds_feed"], "vision": spent["vision"],
                "prompt": spent["prompt"] - spent["vision"],
                "decode": done["seconds_sampling"] - spent["prompt"],
                "scoring": done["seconds_scoring"], "update": done["seconds_update"],
                "step": now(device) - start, "tokens": done["tokens"]})
    return {name: statistics.median(r[name] for r in records[1:]) for name in records[0]}


def now(device: torch.device) -> float:
    """Seconds, with the work handed to the device done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_sampling(policy: Policy) -> dict[str, float]:
    """Count the seconds that prompts, and images in them, take in sampling from now on."""
    spent: dict[str, float] = defaultdict(float)

    def count(name: str, sign: int, _: Any, __: Any, kwargs: dict[str, Any], *___: Any) -> None:
        if not torch.is_grad_enabled() and "cache" not in kwargs:  # else update, or decoding
            spent[name] += sign * now(policy.device)

    towers = [("vision", tower) for tower in dyme.vision_towers(policy.model)]
    for name, module in [("prompt", policy.model.base_model), *towers]:
        module.register_forward_pre_hook(partial(count, name, -1), with_kwargs=True)
        module.register_forward_hook(partial(count, name, +1), with_kwargs=True)
    return spent


def step_floor(cfg: Config, policy: Policy, examples: list[Example], K: int, T: int,
               flops_rate: float, number_rate: float) -> dict[str, float]:
    """Seconds that a step's parts must take at these rates: FLOP/s, and numbers read a second.

    Each example has K sequences of T tokens; K is 0 in SFT, which samples none and trains on one.
    """
    share = len(dyme.share(len(examples)))
    model, chunk = policy.model, examples[:min(cfg.micro_batch, share)]
    inputs = dyme.encode_prompts(policy, chunk, T)
    # They all differ from their first token on: the fast path runs what they share once.
    sequences = [Sequence(p, [k] * T, 1.0, True) for p in range(len(chunk)) for k in range(K or 1)]
    prompts = [s.prompt for s in sequences]
    count = partial(FlopCounterMode, display=False, custom_mapping=FLOPS)
    with torch.no_grad(), policy.autocast():
        with count() as with_images:
            prefix = dyme.encode_prefix(model, inputs)
        with count() as prompt:  # the fast path encodes images once: now they cost nothing
            dyme.encode_prefix(model, inputs)
    with count() as update:
        logprobs, _ = policy.logprobs(policy, model, inputs, prompts, sequences, 1.0)
        logprobs.sum().backward()
    scale = share / len(chunk)
    floor = {name: scale * counter.get_total_flops() / flops_rate for name, counter in (
        ("vision", with_images), ("prompt", prompt), ("update", update))}
    floor["vision"] -= floor["prompt"]
    if not K:
        return {"update": floor["update"] + floor["vision"]}
    towers = sum(p.numel() for tower in dyme.vision_towers(model) for p in tower.parameters())
    weights = model.num_parameters() - towers
    cache = sum(x.keys.numel() + x.values.numel() for x in prefix.cache.layers)
    responses = cache / inputs["input_ids"].numel() * len(sequences) * T / 2  # on average
    # For each token decoding reads weights and cache once, and multiplies all rows by the weights.
    read = weights + scale * (cache + responses)
    products = 2 * weights * scale * len(sequences)
    return floor | {"decode": T * max(read / number_rate, products / flops_rate)}


def machine_rates(policy: Policy) -> tuple[float, float, int]:
    """FLOP/s of a large product as the policy makes it, bytes/s of a copy, bytes of a number."""
    device = policy.device
    n = 8192 if device.type == "cuda" else 2048
    block = torch.zeros(2**28, dtype=torch.uint8, device=device)
    other = torch.empty_like(block)
    with torch.no_grad(), policy.autocast():
        # Multiplied, it has the precision that passes have.
        a = torch.randn(n, n, device=device) @ torch.eye(n, device=device)
        by_onednn = a.dtype == torch.float32 and any(
            isinstance(m, fast.Linear) for m in policy.model.modules())
        product = fast.product if by_onednn else torch.mm
        repeat = partial(timeit.repeat, timer=partial(now, device), repeat=8, number=1)
        multiplying, copying = repeat(lambda: product(a, a)), repeat(lambda: other.copy_(block))
    return 2 * n**3 / min(multiplying), 2 * block.numel() / min(copying), a.element_size()


def print_figures(trainer: Trainer, steps: int, median: dict[str, float]) -> None:
    """Print the parts of a step beside their floor; the last line is the median step."""
    cfg, policy = trainer.cfg, trainer.policy
    batch = [trainer.rows[i] for i in dyme.step_rows(cfg, steps, len(trainer.rows))]
    flops_rate, copy_rate, size = machine_rates(policy)
    K = cfg.generations if median["decode"] else 0
    T = round(median["tokens"] / (len(batch) * max(K, 1)))
    floor = step_floor(cfg, policy, batch, K, T, flops_rate, copy_rate / size)
    floor["step"] = sum(floor.values())
    path = "plain" if policy.rollout is dyme.rollout else "fast"
    print(f"{cfg.model}, {cfg.mode}, {path}, {cfg.prompts} prompts x {cfg.generations} responses x "
          f"{cfg.max_new_tokens} tokens, micro-batch {cfg.micro_batch}, {policy.device}, "
          f"{steps} steps\n{'':10}{'seconds':>9}{'floor':>9}{'ratio':>7}")
    for name in [*median][:-1]:  # all but the tokens
        least = floor.get(name, 0.0)
        ratio = f"{median[name] / least:7.1f}" if least else ""
        print(f"{name:10}{median[name]:9.3f}{least:9.3f}{ratio}")
    memory = parallel.peak_memory_gib(policy.device)
    print(f"{flops_rate / 1e12:.2f} TFLOP/s of products, {copy_rate / 1e9:.0f} GB/s of copies\n"
          f"{median['tokens'] / median['step']:.0f} tokens/s, peak memory {memory:.2f} GiB; "
          f"{cfg.steps} steps take {median['step'] * cfg.steps / 3600:.2f} hours and evaluations\n"
          f"median {median['step']:.3f} s/step")


def main() -> None:
    """Read the flags, join other processes if there are any, and time."""
    parser = settings.one_line_parser("Time steps of the run that flags of dyme.py describe.")
    parser.add_argument("--steps", type=int, default=10, help="steps to time [10]")
    args, flags = parser.parse_known_args()
    if args.steps < 1:
        parser.error(f"--steps {args.steps}: must be at least 1")
    cfg = dyme.parse_config(flags)
    with parallel.processes(cfg.device):
        trainer = make_trainer(cfg)
        median = time_steps(trainer, args.steps)
        if parallel.is_main():
            print_figures(trainer, args.steps, median)


if __name__ == "__main__":
    sys.exit(runs.run_main(main))
