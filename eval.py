"""Score runs or models on the test split: greedy accuracy, format, groundedness, and pass@k.

    python eval.py --model runs/tiny-toy-dyme-s0                      # a run, on the test split of its data
    python eval.py --model runs/*-dyme-s? runs/*-grpo-s?              # a table, with mean over seeds
    python eval.py --model SmolVLM-256M --data chartqa --limit 100    # a base model
    python eval.py --model runs/tiny-toy-dyme-s0 --samples 8          # pass@8 and majority@8 as well

Two accuracies are reported. *official* is ChartQA's relaxed accuracy of the text behind the last `Answer:`,
or of the whole text without one; *strict* also wants the format: one flag, an answer, an end token.
"""

import argparse
import contextlib
import itertools
import json
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
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from dyme import (CHANGEABLE_ON_RESUME, Config, Groups, Policy, Prefix, Rollout, Sequence, encode_prefix,
                  encode_prompts, feed, half_precision, load_policy, load_rows, make_trainer, own_chunks,
                  peak_memory_gib, respond, score, select_device, sequence_logprobs, stage,
                  step_rows, tiny_policy, train_step, vision_once, vision_towers)
from reward import (Example, UserError, answers_match, append_row, is_main, load_data, one_line_parser,
                    read_config,                     run_main, share, spread, summarise, write_atomically)

COLUMNS = ("strict", "official", "in_format", "groundedness", "length")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = one_line_parser(__doc__)

    def add(flag: str, default: Any, text: str, **options: Any) -> None:
        parser.add_argument(flag, type=type(default), default=default, metavar="X", help=text, **options)

    add("--model", "", "run folders, model directories, hub ids, short names", nargs="+", required=True)
    add("--data", "", "as for dyme.py [a run's own data, else toy]")
    add("--samples", 0, "k: also sample k responses, for pass@k and majority@k")
    add("--limit", 0, "rows to score, spread over the split [all]")
    add("--max-new-tokens", 0, "length limit [a toy run's own, else 1024]")
    add("--temperature", 1.0, "of --samples [1.0]")
    add("--batch", 0, "prompts per forward pass [64 for toy, else 8]")
    add("--image-edge", 0, "as for dyme.py [a run's own]")
    add("--seed", 0, "of --samples [0]")
    add("--out", "", "folder for predictions.jsonl [the run folder, else runs/eval-MODEL]")
    add("--device", "auto", "auto, cpu, cuda or cuda:N")
    args = parser.parse_args(argv)
    for name in ("samples", "limit", "max_new_tokens", "batch", "image_edge", "seed"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must not be negative")
    if args.temperature <= 0:
        raise UserError(f"--temperature {args.temperature}: must be above 0")
    if args.out and len(args.model) > 1:
        raise UserError("--out names one folder; with several models, leave it out")
    return args


def evaluate_model(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Answer the test split with one model, write predictions.jsonl, and return the averages."""
    is_run = (Path(name) / "config.json").exists() and (Path(name) / "checkpoint").is_dir()
    saved = read_config(Path(name), Config) if is_run else {}
    data = args.data or saved.get("data", "toy")
    toy, own = data == "toy", data == saved.get("data") and data.endswith((".json", ".jsonl"))
    examples = load_data(data, "val" if own else "test")  # of your own rows, the tenth that was held back
    examples = spread(examples, args.limit or len(examples))
    out = Path(args.out or (name if is_run else f"runs/eval-{Path(name).name}"))
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "predictions.jsonl", "")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
    policy = load_policy(name, select_device(args.device), args.image_edge or saved.get("image_edge", 0))
    limit = args.max_new_tokens or (saved.get("max_new_tokens", Config.max_new_tokens) if toy else 1024)
    batch = args.batch or (64 if toy else 8)
    predictions = list(respond(policy, examples, limit, batch))
    summary = {"model": name, "data": data} | summarise(predictions)
    if args.samples:
        draws = list(respond(policy, examples, limit, max(1, batch // args.samples), args.samples,
                             args.temperature, args.seed))
        groups = [draws[i:i + args.samples] for i in range(0, len(draws), args.samples)]
        summary |= vote(examples, groups)
        for prediction, group in zip(predictions, groups, strict=True):
            prediction["samples"] = [{key: p[key] for key in ("response", "parsed", "strict")} for p in group]
    for prediction in predictions:
        append_row(out / "predictions.jsonl", prediction)
    write_atomically(out / "evaluation.json", json.dumps(summary, indent=2) + "\n")
    print(f"wrote {out / 'predictions.jsonl'}", file=sys.stderr)
    setting = {key: value for key, value in saved.items() if key not in CHANGEABLE_ON_RESUME | {"seed"}}
    return summary | {"setting": json.dumps(setting) if saved else name, "mode": saved.get("mode", "base"),
                      "seed": saved.get("seed", "-")}


def vote(examples: list[Example], groups: list[list[dict[str, Any]]]) -> dict[str, float]:
    """pass@k (any of k samples is right) and majority@k (the commonest answer in the format is right)."""
    passed, majority, k = 0, 0, len(groups[0])
    for example, group in zip(examples, groups, strict=True):
        answers = Counter(p["parsed"].lower().rstrip(".").replace(",", "") for p in group if p["parsed"])
        passed += any(p["strict"] for p in group)
        majority += bool(answers) and answers_match(answers.most_common(1)[0][0], example.answer, 0.05)
    return {f"pass@{k}": passed / len(groups), f"majority@{k}": majority / len(groups)}


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print a line per model, then mean and range over the seeds of each setting that has several."""
    extra = [key for key in rows[0] if key.startswith(("official_", "pass@", "majority@"))]
    columns = [*COLUMNS, *extra]
    width = max(len(row["model"]) for row in rows)
    print(" ".join([f"{'model':{width}} {'mode':9} seed  rows", *(f"{column:>12.18}" for column in columns)]))
    for row in rows:
        shown = [f"{row[c]:12.3f}" if isinstance(row.get(c), float) else f"{'-':>12}" for c in columns]
        print(" ".join([f"{row['model']:{width}} {row['mode']:9} {row['seed']:>4} {row['rows']:5}", *shown]))
    for setting in dict.fromkeys(row["setting"] for row in rows):
        seeds = [row for row in rows if row["setting"] == setting]
        if len({row["seed"] for row in seeds}) > 1:
            for column in ("strict", "official"):
                scores = [row[column] for row in seeds]
                mean = sum(scores) / len(scores)
                print(f"{seeds[0]['mode']}, {column}, {len(seeds)} seeds: mean {mean:.3f} "
                      f"(from {min(scores):.3f} to {max(scores):.3f})")


# ---- Benchmark: where a step's time goes, and what the hardware would allow -----------------------


def benchmark(cfg: Config) -> None:
    """Time `--benchmark` steps of training after one of warm-up; every group explores, nothing is saved."""
    device, (rows, _) = select_device(cfg.device), load_rows(cfg)
    policy = tiny_policy(0) if cfg.model == "tiny" else load_policy(cfg.model, device, cfg.image_edge)
    policy = replace(policy, model=policy.model.to(device), device=device, end_ids=[-1])  # none ever ends
    trainer = make_trainer(cfg, policy, cfg.model)
    trainer.score = coin_flips
    spent, stream, records = time_sampling(policy), feed(trainer, rows, range(cfg.benchmark + 1)), []
    with contextlib.closing(stream):
        for step in tqdm(range(cfg.benchmark + 1), "benchmark", ncols=80, disable=not is_main()):
            spent.clear()
            examples = [rows[i] for i in step_rows(cfg, step, len(rows))]
            inputs = itertools.islice(stream, len(own_chunks(len(examples), cfg.micro_batch)))
            start = time.perf_counter()
            with vision_once(policy.model, trainer.features, cfg.vision_cache * 2**30):
                metrics, _ = train_step(trainer, examples, step, stage(cfg, step)[0], 0.0, inputs)
            record = {name: metrics[f"seconds_{name}"] for name in ("feed", "scoring", "update")}
            record |= {"vision": spent["vision"], "prompt": spent["prompt"] - spent["vision"]}
            record |= {"decode": metrics["seconds_sampling"] - spent["prompt"]}
            records.append(record | {"step": time.perf_counter() - start, "tokens": metrics["tokens"]})
    if is_main():
        median = {name: float(np.median([r[name] for r in records[1:]])) for name in records[0]}
        print_benchmark(cfg, policy, median, *step_floor(cfg, policy, examples))


def coin_flips(policy: Policy, rolled: Rollout, examples: list[Example], *weights: float) -> Groups:
    """Score as always, then let coins decide what is right, though one of each group is and one is not."""
    groups = score(policy, rolled, examples, *weights)
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
            if not torch.is_grad_enabled() and "past_key_values" not in kwargs:  # else update, or decoding
                spent[name] += sign * seconds(policy.device)
        return count

    towers = [("vision", tower) for tower in vision_towers(policy.model)]
    for name, module in [("prompt", policy.model.base_model), *towers]:
        module.register_forward_pre_hook(hook(name, -1), with_kwargs=True)
        module.register_forward_hook(hook(name, +1), with_kwargs=True)
    return spent


def step_floor(cfg: Config, policy: Policy, examples: list[Example]) -> tuple[dict[str, float], float, float]:
    """Seconds that a step's parts must take here, the FLOP/s of matrix products and the bytes/s of copies.

    Decoding reads weights and cache once per token; the rest makes its matrix products.
    """
    model, chunk = policy.model, examples[:own_chunks(len(examples), cfg.micro_batch)[0].stop]
    inputs = encode_prompts(policy, chunk, cfg.max_new_tokens)
    rows = [p for p in range(len(chunk)) for _ in range(cfg.generations)]

    def flops(work: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops()

    def prompt() -> Prefix:
        with torch.no_grad(), policy.autocast():
            return encode_prefix(model, inputs)

    def update() -> None:
        sequences = [Sequence(p, [0] * cfg.max_new_tokens, 1.0, True) for p in rows]
        sequence_logprobs(policy, model, inputs, rows, sequences, 1.0)[0].sum().backward()

    with vision_once(model):
        work = {"vision": flops(prompt), "prompt": flops(prompt), "update": flops(update)}
        work["vision"] -= work["prompt"]  # the second pass found the images encoded
        cache = sum(x.keys.numel() + x.values.numel() for x in prompt().cache.layers)
    flops_rate, copy_rate = machine_rates(policy.device)
    scale, size = len(share(len(examples))) / len(chunk), 2 if policy.device.type == "cuda" else 4
    towers = {id(p) for tower in vision_towers(model) for p in tower.parameters()}
    weights = sum(p.numel() for p in model.parameters() if id(p) not in towers)
    responses = cache / inputs["input_ids"].numel() * len(rows) * cfg.max_new_tokens / 2  # on average
    floor = {name: scale * x / flops_rate for name, x in work.items()}
    floor["decode"] = size * cfg.max_new_tokens * (weights + scale * (cache + responses)) / copy_rate
    return floor, flops_rate, copy_rate


def machine_rates(device: torch.device) -> tuple[float, float]:
    """FLOP/s of a large matrix product in the precision of training, bytes/s read and written by a copy."""
    n, dtype = (8192, half_precision()) if device.type == "cuda" else (2048, torch.float32)
    a = torch.randn(n, n, device=device).to(dtype)
    block = torch.zeros(2**28, dtype=torch.uint8, device=device)
    product, other = torch.empty_like(a), torch.empty_like(block)

    def fastest(work: Callable[[], Any]) -> float:
        times = []
        for _ in range(8):
            start = seconds(device)
            work()
            times.append(seconds(device) - start)
        return min(times)

    return (2 * n**3 / fastest(lambda: torch.mm(a, a, out=product)),
            2 * block.numel() / fastest(lambda: other.copy_(block)))


def print_benchmark(cfg: Config, policy: Policy, median: dict[str, float], floor: dict[str, float],
                    flops_rate: float, copy_rate: float) -> None:
    """Print the parts of a step beside their floor; the last line is the median step."""
    print(f"{cfg.model}, {cfg.mode}, {cfg.prompts} prompts x {cfg.generations} responses x "
          f"{cfg.max_new_tokens} tokens, micro-batch {cfg.micro_batch}, {policy.device}; "
          f"medians of {cfg.benchmark} steps")
    print(f"{'':10}{'seconds':>9}{'floor':>9}")
    for name in ("feed", "vision", "prompt", "decode", "scoring", "update"):
        print(f"{name:10}{median[name]:9.3f}{floor.get(name, 0.0):9.3f}")
    print(f"{'step':10}{median['step']:9.3f}{sum(floor.values()):9.3f}\n"
          f"floor: {flops_rate / 1e12:.2f} TFLOP/s of matrix products, {copy_rate / 1e9:.0f} GB/s of copies\n"
          f"{median['tokens'] / median['step']:.0f} sampled tokens/s, peak memory "
          f"{peak_memory_gib(policy.device) or math.nan:.2f} GiB\n"
          f"whole run: {cfg.steps} steps, {median['step'] * cfg.steps / 3600:.2f} hours without evaluations\n"
          f"median {median['step']:.3f} s/step")


# ---- The program ---------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Evaluate every model named, then print one table."""
    args = parse_arguments(argv)
    print_table([evaluate_model(name, args) for name in args.model])


if __name__ == "__main__":
    sys.exit(run_main(main))
