"""Score runs or models on the test split: greedy accuracy, format, groundedness, and pass@k.

    python eval.py --model runs/tiny-toy-dyme-s0                      # a run, on the test split of its data
    python eval.py --model runs/*-dyme-s? runs/*-grpo-s?              # a table, with mean over seeds
    python eval.py --model SmolVLM-256M --data chartqa --limit 100    # a base model
    python eval.py --model runs/tiny-toy-dyme-s0 --samples 8          # pass@8 and majority@8 as well
    python eval.py report runs/*                                      # a page that shows them think

Two accuracies are reported. *official* is ChartQA's relaxed accuracy of the text behind the last `Answer:`,
or of the whole text without one; *strict* also wants the format: one flag, an answer, an end token.
"""

import argparse  # noqa: I001, which would give every name below a line
import base64
import contextlib
import copy
import io
import itertools
import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import constants
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from dyme import (CHANGEABLE_ON_RESUME, MODELS, Config, Groups, Policy, Prefix, Rollout, Sequence,
                  encode_prefix, encode_prompts, feed, half_precision, load_policy, load_rows, make_trainer,
                  own_chunks, peak_memory_gib, respond, score, select_device, sequence_logprobs, stage,
                  step_rows, tiny_policy, train_step, vision_once, vision_towers)
from reward import (FLAG, Example, UserError, check_model_name, is_main, load_data, one_line_parser, quoted_numbers,
                    read_config, read_jsonl, run_main, share, shrink, spread, summarise, write_atomically,
                    write_jsonl)

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
    for name in args.model:
        check_model_name(name, MODELS)
    if args.out and len(args.model) > 1:
        raise UserError("--out names one folder; with several models, leave it out")
    return args


def evaluate_model(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Answer the test split with one model, write predictions.jsonl, and return the averages."""
    is_run = (Path(name) / "config.json").exists() and (Path(name) / "metrics.jsonl").exists()
    if is_run and not (Path(name) / "checkpoint").is_dir():
        raise UserError(f"--model {name}: this run has no checkpoint yet (see --save-every)")
    saved = read_config(Path(name), Config) if is_run else {}
    data = args.data or saved.get("data", "toy")
    toy, rows = data == "toy", data.endswith((".json", ".jsonl"))
    own = rows and is_run and Path(data).resolve() == Path(saved["data"]).resolve()
    examples = load_data(data, "val" if own else "test")  # of your own rows, the tenth that was held back
    if rows and not own:
        print(f"{name}: tested on all {len(examples)} rows of {data}", file=sys.stderr)
    examples = spread(examples, args.limit or len(examples))
    policy = load_policy(name, select_device(args.device), args.image_edge or saved.get("image_edge", 0))
    out = Path(args.out or (name if is_run else f"runs/eval-{Path(name).name}"))
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "predictions.jsonl").open("a").close()  # to know before the work is done
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
    limit = args.max_new_tokens or (saved.get("max_new_tokens", Config.max_new_tokens) if toy else 1024)
    batch = args.batch or (64 if toy else 8)
    predictions = list(respond(policy, examples, limit, batch))
    summary = {"model": name, "data": data} | summarise(predictions)
    if args.samples:
        draws = list(respond(policy, examples, limit, max(1, batch // args.samples), args.samples,
                             args.temperature, args.seed))
        groups = [draws[i:i + args.samples] for i in range(0, len(draws), args.samples)]
        summary |= vote(groups)
        for prediction, group in zip(predictions, groups, strict=True):
            prediction["samples"] = [{key: p[key] for key in ("response", "parsed", "strict")} for p in group]
    write_jsonl(out / "predictions.jsonl", predictions)
    write_atomically(out / "evaluation.json", json.dumps(summary, indent=2) + "\n")
    print(f"wrote {out / 'predictions.jsonl'}", file=sys.stderr)
    return summary | {"setting": pooling_key(Path(name), saved) if saved else name, "mode": saved.get("mode", "base"),
                      "seed": saved.get("seed", "-")}


def vote(groups: list[list[dict[str, Any]]]) -> dict[str, float]:
    """pass@k (any of k samples is right) and majority@k (the commonest answer in the format is right)."""
    passed, majority, k = 0, 0, len(groups[0])
    for group in groups:
        said = [((p["parsed"] or "").lower().rstrip(".").replace(",", ""), p["strict"]) for p in group]
        commonest = Counter(answer for answer, _ in said if answer).most_common(1)
        passed += any(right for _, right in said)
        majority += any(right for answer, right in said if commonest and answer == commonest[0][0])
    return {f"pass@{k}": passed / len(groups), f"majority@{k}": majority / len(groups)}


def pooling_key(run: Path, cfg: dict[str, Any]) -> str:
    """What runs have in common that differ in nothing but the seed; the toy's base lies beside its runs."""
    setting = {key: value for key, value in cfg.items() if key not in CHANGEABLE_ON_RESUME | {"seed"}}
    base = str(run.resolve().parent) if cfg["model"] == "tiny" else ""
    return json.dumps([len(read_jsonl(run / "metrics.jsonl")), base, setting])


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
        seeds = [*{row["seed"]: row for row in rows if row["setting"] == setting}.values()]
        if len(seeds) > 1:
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
    trainer = make_trainer(replace(cfg, beta=0.0), policy, "")
    trainer.cfg, trainer.score = cfg, coin_flips
    if cfg.beta:
        trainer.reference = copy.deepcopy(policy.model).requires_grad_(False)
    if trainer.helper:
        trainer.helper.file = None
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


# ---- The report: a page that shows runs think ------------------------------------------------------

CURVES = (  # title, unit, key, of evaluations, a share
    ("Held-out accuracy", "share right and in the format, greedy", "strict", True, True),
    ("Training accuracy", "share of sampled responses right (mean r_a)", "accuracy", False, True),
    ("Share memorized (Fig. S2)", "prompts, SFT / (SFT + RL)", "memorized", False, True),
    ("Groups without a right response", "share of groups", "none_correct", False, True),
    ("Groups without variance", "share of groups with all rewards alike", "no_variance", False, True),
    ("Training reward (Fig. 4)", "mean of r_a + w_t r_t + w_f r_f", "reward", False, False),
    ("Thinking reward", "mean r_t", "reward_thinking", False, True),
    ("In the format", "share of sampled responses (r_f)", "reward_format", False, True),
    ("Groundedness", "held-out: share of quoted numbers that are in the image", "groundedness", True, True),
    ("Response length", "tokens", "response_length", False, False),
    ("Truncated", "share cut off by the length limit", "truncated", False, True),
    ("Step time", "seconds", "seconds", False, False),
)
POINTS, ANSWERS, PAGE_BYTES, TEXT_BYTES = 500, 40, 9e6, 7e6  # what keeps a page under 10 MB


def report(argv: list[str]) -> None:
    """Write a page that shows what run folders hold. Raises UserError if one is not a run folder."""
    parser = one_line_parser("Write one self-contained page about runs: curves, groups, answers, a table.")
    parser.prog = "eval.py report"
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, finished or not")
    parser.add_argument("--out", default="report.html", metavar="X", help="the page [report.html]")
    args = parser.parse_args(argv)
    runs = []
    for run in dict.fromkeys(map(Path, args.runs)):
        try:
            runs.append((run, read_config(run, Config)))
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)
    if not runs:
        raise UserError("none of these is a run folder")
    names = [run.name for run, _ in runs]  # if they tell the runs apart
    names = names if all(names) and len(set(names)) == len(names) else [str(run) for run, _ in runs]
    shown = [describe_run(name, run, cfg) for name, (run, cfg) in zip(names, runs, strict=True)]
    budget = PAGE_BYTES - fit_groups(shown, TEXT_BYTES)
    images: dict[str, str] = {}
    for i, (run, cfg) in enumerate(runs):
        budget -= add_images(images, run, cfg, shown[i], budget / (len(runs) - i))
    content = {
        "runs": shown, "images": images, "answers": compare_answers(names, runs),
        "table": result_table(names, runs),
        "charts": [dict(zip(("title", "unit", "key", "evaluated", "share"), c, strict=True)) for c in CURVES],
        "summary": f"{len(runs)} run{'s' * (len(runs) > 1)}: " + ", ".join(str(run) for run, _ in runs)}
    # Within a script element only `<` could end it; JSON may write it as an escape.
    text = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
    try:
        write_atomically(Path(args.out), PAGE.replace("DATA", text, 1))
    except (OSError, ValueError) as error:
        raise UserError(f"--out {args.out}: cannot be written ({error})") from None
    print(f"wrote {args.out} ({Path(args.out).stat().st_size / 1e6:.1f} MB); open it in a browser")


def describe_run(name: str, run: Path, cfg: dict[str, Any]) -> dict[str, Any]:
    """A run's curves by column, and its groups; `switched` is the step at which an explored one was memorized."""
    metrics = read_jsonl(run / "metrics.jsonl")
    for row in metrics:
        row["seconds"] = sum(value for key, value in row.items() if key.startswith("seconds_"))
    groups, memorized = [describe_group(cfg, row) for row in read_jsonl(run / "samples.jsonl")], {}
    for group in groups:
        before = memorized.pop(group["name"], None)
        if group["mode"] == "memorization":
            memorized[group["name"]] = group
        elif group["mode"] == "exploration" and before:
            group["switched"], before["first"] = before["step"], True
    return {"name": name, "groups": groups, "all_groups": len(groups),
            "metrics": columns(thin(metrics), [key for *_, key, evaluated, _ in CURVES if not evaluated]),
            "evaluations": columns(read_jsonl(run / "evaluations.jsonl"),
                                   [key for *_, key, evaluated, _ in CURVES if evaluated])}


def by_interest(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups that show a switch first; then the others, of which every first part is spread over the run."""
    golden = (math.sqrt(5) - 1) / 2
    order = sorted(enumerate(groups), key=lambda x: (not (x[1].keys() & {"switched", "first"}), x[0] * golden % 1))
    return [group for _, group in order]


def fit_groups(shown: list[dict[str, Any]], budget: float) -> float:
    """Keep of each run's groups what fits `budget` bytes in all; what a short run leaves, the others get."""
    def size(group: dict[str, Any]) -> int:
        text = json.dumps(group, separators=(",", ":"))
        return len(text) + 5 * text.count("<")  # each is written as six characters

    whole, used = [sum(map(size, run["groups"])) for run in shown], 0.0
    for i, n in enumerate(sorted(range(len(shown)), key=whole.__getitem__)):
        allowed, run = (budget - used) / (len(shown) - i), shown[n]
        sizes = itertools.accumulate(map(size, by_interest(run["groups"])))
        kept = [group for group, end in zip(by_interest(run["groups"]), sizes, strict=True) if end <= allowed]
        run["groups"] = sorted(kept, key=lambda group: group["step"])
        used += sum(map(size, kept))
    return used


def thin(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Average runs of neighbouring rows, so that at most POINTS are left."""
    size = math.ceil(len(rows) / POINTS)
    parts = [rows[i:i + size] for i in range(0, len(rows), size)] if size > 1 else []
    return [{"step": part[-1]["step"]} | {
        key: sum(values) / len(values) for *_, key, _, _ in CURVES
        if (values := [row[key] for row in part if row.get(key) is not None])} for part in parts] or rows


def columns(rows: list[dict[str, Any]], keys: list[str]) -> dict[str, list[Any]]:
    """Rows as columns, for the keys that any of them has; numbers to six digits."""
    present = [key for key in keys if any(row.get(key) is not None for row in rows)]
    return {"step": [row["step"] for row in rows]} | {
        key: [None if row.get(key) is None else float(f"{row[key]:.6g}") for row in rows] for key in present}


def describe_group(cfg: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    """A row of `samples.jsonl`, with its texts marked and the choice of mode explained."""
    def mark(text: str) -> list[list[str]]:
        parts, end, thinking = [], 0, re.split(re.escape(FLAG), text, flags=re.IGNORECASE)[0]
        for start, stop, grounded in quoted_numbers(thinking, group["facts"] or "", group["question"]):
            parts += [[text[end:start], ""], [text[start:stop], "yes" if grounded else "no"]]
            end = stop
        return [part for part in [*parts, [text[end:], ""]] if part[0]] if group["facts"] else [[text, ""]]

    responses = [r | {"text": mark(r["text"])} for r in group["responses"]]
    return group | {"responses": responses, "target": group["target"] and mark(group["target"]),
                    "why": explain_mode(cfg, group), "image": f"{cfg['data']} {group['name']}"}


def explain_mode(cfg: dict[str, Any], group: dict[str, Any]) -> str:
    """Say in a sentence why a group was used as it was."""
    right, all_of = sum(r["r_a"] > 0 for r in group["responses"]), len(group["responses"])
    counted = f"{right or 'None'} of {all_of} responses {'is' if right < 2 else 'are'} right"
    still = not cfg["beta"] and not any(r["advantage"] for r in group["responses"])
    idle = ", but all advantages are zero, so there is no gradient." if still else "."
    if not all_of:
        return "SFT imitates the reference, whatever the model would say."
    rule, _, value = ("grpo" if cfg["mode"] != "dyme" else cfg["switch"]).partition(":")
    explored = group["mode"] in ("exploration", "both")
    reason = {"grpo": "GRPO compares the responses in any case",
              "explore": "this rule compares the responses in any case",
              "memorize": "this rule imitates the reference in any case",
              "anneal": "this rule does both at every step, and imitates less and less",
              "threshold": f"the whole batch explores once its mean reward reaches {value}: it "
                           f"{'did' if explored else 'did not'}"}.get(rule)
    if reason:
        return f"{counted}; {reason}{idle if explored else '.'}"
    if right:
        return f"{counted}: the responses are compared with each other (Eq. 6){idle}"
    if rule == "budget":
        return f"{counted}: it waits in the buffer, to be imitated when {value} prompts have failed."
    return f"{counted}: nothing right to reinforce, so the reference is imitated (Eq. 6)."


@contextlib.contextmanager
def without_downloads() -> Iterator[None]:
    """Keep the hub's client to what it has on disk."""
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def add_images(images: dict[str, str], run: Path, cfg: dict[str, Any], described: dict[str, Any],
               budget: float) -> int:
    """Add pictures of a run's groups, as data addresses, if its data is at hand and they fit; the bytes used."""
    described["pictures"], used = "the page would grow too large", 0
    if all(group["image"] in images for group in described["groups"]):
        return 0
    try:
        with without_downloads():
            rows = {row.name: row for row in load_rows(argparse.Namespace(**cfg))[0]}
    except (UserError, OSError) as error:
        print(f"{run}: shown without pictures, as its data is not at hand ({error})", file=sys.stderr)
        described["pictures"] = "the run's data was not at hand"
        return 0
    for group in by_interest(described["groups"]):
        opener = rows[group["name"]].image if group["name"] in rows else None
        if opener is None:
            group["image"] = None
        elif group["image"] not in images and used < budget:
            with contextlib.suppress(UserError, OSError):
                file, image = io.BytesIO(), shrink(opener(), 480).convert("RGB")
                kind = "PNG" if max(image.size) <= 128 else "JPEG"
                image.save(file, kind, optimize=True)
                address = f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
                if (used := used + len(address)) <= budget:
                    images[group["image"]] = address
    return used


def held_out(run: Path, step: int) -> dict[tuple[str, str], dict[str, Any]]:
    """A run's held-out answers at a step, by row and question."""
    return {(row["name"], row["question"]): row for row in read_jsonl(run / f"held-out-{step}.jsonl")}


def compare_answers(names: list[str], runs: list[tuple[Path, dict[str, Any]]]) -> dict[str, Any]:
    """Answers to the same held-out rows, by each base and by each run at its last evaluation."""
    columns: list[dict[str, Any]] = []
    for name, (run, _) in zip(names, runs, strict=True):
        base, steps = held_out(run, 0), [row["step"] for row in read_jsonl(run / "evaluations.jsonl")]
        before = next((i for i, c in enumerate(columns) if c["before"] is None and c["answers"].keys() & base and all(
            c["answers"][key]["response"] == base[key]["response"] for key in c["answers"].keys() & base)), None)
        if before is None and base:
            before = len(columns)
            columns.append({"name": f"before: {name} at step 0", "before": None, "answers": base})
        if steps and steps[-1] > 0:
            after = {"name": f"{name} at step {steps[-1]}", "before": before}
            columns.append(after | {"answers": held_out(run, steps[-1])})
    counts = Counter(key for column in columns for key in column["answers"])
    most = [max((counts[key] for key in column["answers"]), default=0) for column in columns]  # that share a row
    keys = spread([key for key in counts if any(
        key in c["answers"] and counts[key] == n for c, n in zip(columns, most, strict=True))], ANSWERS)
    found = [[column["answers"].get(key) for column in columns] for key in keys]
    return {"columns": [{"name": c["name"], "before": c["before"]} for c in columns], "rows": [
        {"question": key[1], "answer": next(filter(None, rows))["answer"], "cells": [row and {
            "text": [[row["response"][:3000], ""]], "r_a": row["strict"], "r_f": row["in_format"],
            "finished": row["finished"], "quoted": row["quoted_numbers"], "grounded": row["grounded_numbers"]}
            for row in rows]} for key, rows in zip(keys, found, strict=True)]}


def result_table(names: list[str], runs: list[tuple[Path, dict[str, Any]]]) -> dict[str, Any]:
    """Last evaluation and time of each run; mean and spread over the seeds of settings that have several."""
    keys, rows, settings = ("strict", "in_format", "groundedness", "length"), [], {}
    for name, (run, cfg) in zip(names, runs, strict=True):
        evaluations, metrics = (read_jsonl(run / f"{kind}.jsonl") for kind in ("evaluations", "metrics"))
        last = (evaluations or [{}])[-1]
        seconds = sum(v for row in metrics for k, v in row.items() if k.startswith("seconds_"))
        scores = [*(last.get(key) for key in keys), seconds / 60]
        size = [str(len(metrics)), str(last.get("step", "–")), str(last.get("rows", "–"))]
        rows.append([name, *map(rounded, scores), cfg["mode"], str(cfg["seed"]), *size])
        settings.setdefault((pooling_key(run, cfg), *size), {})[cfg["seed"]] = (rows[-1], scores)
    for seeds in settings.values():
        if len(seeds) > 1:
            likes, columns = zip(*seeds.values(), strict=True)
            values = [[v for v in column if v is not None] for column in zip(*columns, strict=True)]
            spreads = [[*map(rounded, (sum(v) / len(v), min(v), max(v)))] if v else None for v in values]
            rows.append([f"mean (from – to) of {len(seeds)} seeds like {likes[0][0]}",
                         *(s and f"{s[0]} ({s[1]} – {s[2]})" or "–" for s in spreads),
                         likes[0][6], "", *likes[0][8:]])
    return {"columns": ["run", "accuracy", "in format", "groundedness", "length (tokens)", "minutes in steps", "mode",
                        "seed", "steps", "evaluated at step", "rows evaluated"], "rows": rows}


def rounded(value: float | None) -> str:
    """A number as the page shows it."""
    return "–" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


# The page itself: no network, no framework.
PAGE = r'''<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>DyME report</title>
<style>
:root { color-scheme: light dark; --bg: #fff; --fg: #1d2330; --soft: #596273; --line: #d5dae3; --card: #f5f7fa;
  --good: #0b6b36; --goodbg: #d8f3e2; --bad: #a32020; --badbg: #fbe0de; --accent: #1f55c0; }
@media (prefers-color-scheme: dark) { :root { --bg: #14171d; --fg: #e6e9ef; --soft: #a3acbb; --line: #39414f;
  --card: #1c2129; --good: #7fdca3; --goodbg: #123d26; --bad: #ff9d96; --badbg: #4d1c1a; --accent: #8db4ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--bg); color: var(--fg);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { margin: 0; } h2 { margin: 2.5rem 0 .5rem; border-bottom: 1px solid var(--line); }
h3 { margin: 0; font-size: 1rem; }
a { color: var(--accent); } p { max-width: 48rem; overflow-wrap: anywhere; } .soft { color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: 1rem; margin: .5rem 0; }
.controls { display: flex; flex-wrap: wrap; gap: .5rem 1.25rem; align-items: center; margin: .75rem 0; }
.controls label { display: inline-flex; gap: .4rem; align-items: center; max-width: 100%; overflow-wrap: anywhere; }
button, select { font: inherit; max-width: 100%; min-width: 0; min-height: 2.25rem; padding: .2rem .7rem;
  color: inherit; background: var(--card); border: 1px solid var(--soft); border-radius: .4rem; }
button[aria-disabled=true] { color: var(--soft); border-style: dotted; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
#charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .75rem; min-width: 0; }
.card > svg { width: 100%; height: auto; display: block; touch-action: pan-y; }
.card svg text { fill: var(--soft); font-size: 11px; }
.legend { list-style: none; margin: .25rem 0 0; padding: 0; font-size: .85rem; }
.legend li { display: flex; gap: .4rem; align-items: center; } .legend svg, #shown svg { flex: none; }
.legend span { overflow-wrap: anywhere; } .legend .at { margin-left: auto; } .legend b { margin-left: auto; }
.legend b { font-variant-numeric: tabular-nums; } .legend .at + b { margin-left: 0; }
#group { display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); gap: 1rem; }
#group img { width: 100%; image-rendering: auto; background: #fff; border: 1px solid var(--line); }
#group.small { grid-template-columns: minmax(0, 16rem) minmax(0, 1fr); }
#group.small img { image-rendering: pixelated; max-width: 16rem; }
@media (max-width: 45rem) { #group, #group.small { grid-template-columns: minmax(0, 1fr); } }
dl { margin: 0; } dt { font-size: .8rem; color: var(--soft); } dd { margin: 0 0 .5rem; overflow-wrap: anywhere; }
.why { border-left: 4px solid var(--accent); padding-left: .75rem; margin: 0 0 .75rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font: .9rem/1.45 ui-monospace, monospace; margin: .25rem 0; }
.response { border-top: 1px solid var(--line); padding: .5rem 0; }
.facts { display: flex; flex-wrap: wrap; gap: .25rem 1rem; font-size: .85rem; align-items: center;
  font-variant-numeric: tabular-nums; } .facts .right, .facts .wrong { min-width: 9.5rem; }
.right { color: var(--good); font-weight: 600; } .wrong { color: var(--bad); font-weight: 600; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
mark { color: inherit; border-radius: .2rem; padding: 0 .15rem; }
mark.yes { background: var(--goodbg); border-bottom: 2px solid var(--good); }
mark.no { background: var(--badbg); border: 2px dashed var(--bad); }
.bar { position: relative; width: 9rem; height: .8rem; border: 1px solid var(--soft); }
.bar i { position: absolute; top: 0; bottom: 0; } .unused { opacity: .45; }
.bar::after { content: ""; position: absolute; left: 50%; top: -2px; bottom: -2px; border-left: 1px solid; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem; border-bottom: 1px solid var(--line); }
th[scope=row] { position: sticky; left: 0; min-width: 7.5rem; max-width: 40vw; background: var(--bg);
  overflow-wrap: anywhere; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; } td.number { white-space: nowrap; }
td .text { min-width: 14rem; }
</style>
</head>
<body>
<header>
<h1>DyME report</h1>
<p id="summary"></p>
<nav aria-label="Sections"><a href="#curves">Curves</a><a href="#viewer">Groups</a>
<a href="#numbers">Table</a><a href="#answers">Before and after</a></nav>
</header>
<main>
<section id="curves" aria-labelledby="h-curves">
<h2 id="h-curves">Curves</h2>
<p class="soft">Point at or tap a chart, or move the slider, to read all of them at one step: below each chart are the
means of the last steps, as smoothed, or the last evaluation until then. Evaluations are on held-out rows; the rest is
over the prompts of each step.</p>
<div class="controls">
<label>Smooth over <select id="smooth"><option value="1">1 step</option><option value="10">10 steps</option>
<option value="25" selected>25 steps</option><option value="50">50 steps</option></select></label>
<label><input type="checkbox" id="normalise"> share memorized relative to its first 10 steps</label>
<label>Step <input type="range" id="step" min="0" value="0"> <span id="at"></span></label>
</div>
<div class="controls" id="shown" role="group" aria-label="Runs shown"></div>
<div id="charts"></div>
</section>
<section id="viewer" aria-labelledby="h-viewer">
<h2 id="h-viewer">Groups</h2>
<p class="soft">One prompt of a step, with all its sampled responses. Numbers of a trace that are in the image, or
rightly computed from such, look like <mark class="yes">7</mark>, even if it says them of the wrong thing; numbers that
are not look like <mark class="no">4</mark>: that is pseudo thinking. Without visual facts none is marked.</p>
<div class="controls">
<label>Run <select id="run"></select></label>
<label>Mode <select id="mode"><option value="">any</option><option>exploration</option>
<option>memorization</option><option>both</option><option>buffered</option></select></label>
<label>Responses <select id="verdict"><option value="">any</option><option value="some">some right</option>
<option value="none">none right</option><option value="all">all right</option></select></label>
</div>
<div class="controls">
<button id="previous" type="button">Previous</button>
<button id="next" type="button">Next</button>
<label>Group <input type="range" id="which" min="0" value="0"></label>
<button id="switched" type="button">First exploration of a prompt once memorized</button>
<span id="place" role="status"></span>
</div>
<div id="group"></div>
</section>
<section id="numbers" aria-labelledby="h-numbers">
<h2 id="h-numbers">Table</h2>
<p class="soft">Last evaluation on held-out rows, greedy. Spread is the range over seeds of the same settings.</p>
<div class="scroll" role="region" aria-label="Results" tabindex="0"><table id="results"></table></div>
</section>
<section id="answers" aria-labelledby="h-answers">
<h2 id="h-answers">Before and after</h2>
<div class="controls"><label>Run <select id="of"></select></label>
<label>Show <select id="changed"><option value="">all</option>
<option value="mended">wrong before, right after</option>
<option value="broken">right before, wrong after</option><option value="wrong">wrong after</option></select></label>
<span id="answered" role="status"></span></div>
<div class="scroll" role="region" aria-label="Answers" tabindex="0"><table id="compared"></table></div>
</section>
</main>
<script type="application/json" id="data">DATA</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent),
  runs = data.runs;
const $ = id => document.getElementById(id);
const colors = ["#3b78e7", "#d9661f", "#2a9d5c", "#c044a0", "#8c7a1a", "#7c62e0", "#d04545", "#1797ab"];
const dashes = ["", "6 3", "2 3", "9 3 2 3"];
const hidden = new Set();
const show = x =>
  x == null ? "–" : x.toFixed(Math.abs(x) >= 100 ? 0 : Math.abs(x) >= 10 ? 1 : 3).replace(/^-(0\.0*)$/, "$1");

// Every text goes through textContent: nothing that a model wrote becomes markup.
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "text", "g", "circle", "rect"].includes(tag);
  const node = svg
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) if (value != null) node.setAttribute(key, value);
  node.append(...children.filter(child => child != null));
  return node;
}
function marked(parts) {
  const node = make("div", {class: "text"});
  for (const [text, kind] of parts) {
    if (!kind) node.append(text);
    else if (kind === "yes") node.append(make("mark", {class: "yes", title: "in the image"}, text));
    else {
      const spoken = make("span", {class: "unseen"}, " (not in the image)");
      node.append(make("mark", {class: "no", title: "not in the image"}, text, spoken));
    }
  }
  return node;
}
const stroke = i => ({
  stroke: colors[i % colors.length],
  "stroke-dasharray": dashes[(Math.floor(i / 2) + Math.floor(i / colors.length)) % dashes.length],
});
const sample = i =>
  make(
    "svg",
    {viewBox: "0 0 30 8", width: 30, height: 8, "aria-hidden": "true"},
    make("line", {x1: 0, y1: 4, x2: 30, y2: 4, "stroke-width": 3, ...stroke(i)}),
  );

// ---- Curves
const last = Math.max(1, ...runs.flatMap(run => [...run.metrics.step, ...run.evaluations.step]));
let cursor = last;
function smoothed(xs, ys, width) {
  const out = [];
  for (let i = 0, start = 0, sum = 0, n = 0; i < xs.length; i++) {
    if (ys[i] != null) {
      sum += ys[i];
      n++;
    }
    for (; xs[start] <= xs[i] - width; start++)
      if (ys[start] != null) {
        sum -= ys[start];
        n--;
      }
    out.push(n ? sum / n : null);
  }
  return out;
}
function series(chart, run) {
  const source = chart.evaluated ? run.evaluations : run.metrics;
  let raw = source[chart.key] || source.step.map(() => null);
  if (chart.key === "memorized" && $("normalise").checked) {
    const start = raw.filter((y, j) => y != null && source.step[j] < source.step[0] + 10);
    const scale = start.reduce((a, b) => a + b, 0) / start.length;
    raw = raw.map(y => (y == null || !scale ? null : y / scale));
  }
  const width = Number($("smooth").value);
  const smooth = chart.evaluated || width === 1 ? raw : smoothed(source.step, raw, width);
  return {xs: source.step, raw, smooth};
}
function path(xs, ys, x, y) {
  let d = "",
    pen = "M";
  xs.forEach((step, i) => {
    if (ys[i] == null) {
      pen = "M";
    } else {
      d += `${pen}${x(step).toFixed(1)} ${y(ys[i]).toFixed(1)}`;
      pen = "L";
    }
  });
  return d;
}
function ticks(low, high) {
  const step = 10 ** Math.floor(Math.log10((high - low) / 2 || 1)),
    size = [1, 2, 5].map(f => f * step).find(s => (high - low) / s <= 5) || 10 * step;
  const out = [];
  for (let t = Math.ceil(low / size - 1e-9) * size; t <= high + size * 1e-9; t += size)
    out.push(Number(t.toPrecision(6)));
  return out;
}
function draw() {
  $("charts").replaceChildren(
    ...data.charts.map((chart, number) => {
      const curves = runs.map((run, i) => (hidden.has(i) ? null : series(chart, run)));
      const values = curves.flatMap(c => (c ? [...c.smooth, ...c.raw] : [])).filter(v => v != null);
      const unit =
        chart.key === "memorized" && $("normalise").checked
          ? "relative to the mean of the first 10 steps"
          : chart.unit;
      const title = [make("h3", {id: `chart-${number}`}, chart.title), make("div", {class: "soft"}, unit)];
      if (!values.length) {
        const none = make(
          "div",
          {class: "card"},
          ...title,
          make("p", {}, `The runs shown ${unit === chart.unit ? "have no values here yet" : "start at 0"}.`),
        );
        none.move = () => {};
        return none;
      }
      const low = Math.min(0, ...values),
        top = Math.max(...values),
        high = chart.share && top <= 1 && low >= 0 ? 1 : top * 1.05 || 1;
      const x = s => 42 + (290 * s) / last,
        y = v => 168 - (156 * (v - low)) / (high - low);
      const svg = make("svg", {
        viewBox: "0 0 350 204",
        role: "img",
        "aria-label": `${chart.title} by step; values are listed below`,
      });
      for (const t of ticks(low, high))
        svg.append(
          make("line", {x1: 42, x2: 332, y1: y(t), y2: y(t), stroke: "var(--line)"}),
          make("text", {x: 37, y: y(t) + 4, "text-anchor": "end"}, String(t)),
        );
      for (const t of ticks(0, last).filter(Number.isInteger))
        svg.append(make("text", {x: x(t), y: 183, "text-anchor": "middle"}, String(t)));
      svg.append(make("text", {x: 187, y: 199, "text-anchor": "middle"}, "optimisation step"));
      curves.forEach((c, i) => {
        if (!c) return;
        if (c.raw !== c.smooth)
          svg.append(
            make("path", {
              d: path(c.xs, c.raw, x, y),
              fill: "none",
              "stroke-width": 1,
              opacity: 0.22,
              ...stroke(i),
            }),
          );
        svg.append(
          make("path", {d: path(c.xs, c.smooth, x, y), fill: "none", "stroke-width": 2, ...stroke(i)}),
        );
        if (c.xs.length <= 12)
          c.xs.forEach(
            (s, j) =>
              c.smooth[j] == null ||
              svg.append(make("circle", {cx: x(s), cy: y(c.smooth[j]), r: 3, fill: stroke(i).stroke})),
          );
      });
      const line = make("line", {
        y1: 12,
        y2: 168,
        stroke: "var(--fg)",
        "stroke-dasharray": "2 2",
        class: "cursor",
      });
      svg.append(line);
      for (const kind of ["pointerdown", "pointermove"])
        svg.addEventListener(kind, event => {
          const box = svg.getBoundingClientRect();
          point(((((event.clientX - box.left) / box.width) * 350 - 42) / 290) * last);
        });
      const list = make("ul", {class: "legend"});
      const card = make("div", {class: "card"}, ...title, svg, list);
      card.move = () => {
        line.setAttribute("x1", x(cursor));
        line.setAttribute("x2", x(cursor));
        list.replaceChildren(
          ...curves
            .map((c, i) => {
              if (!c) return "";
              let k = -1;
              c.xs.forEach((s, j) => {
                if (s <= cursor && c.smooth[j] != null) k = j;
              });
              return make(
                "li",
                {},
                sample(i),
                make("span", {}, runs[i].name),
                chart.evaluated && k >= 0 ? make("span", {class: "soft at"}, `step ${c.xs[k]}`) : null,
                make("b", {}, show(c.smooth[k])),
              );
            })
            .filter(Boolean),
        );
      };
      return card;
    }),
  );
  point(cursor);
}
function point(step) {
  cursor = Math.min(last, Math.max(0, Math.round(step)));
  $("step").value = cursor;
  $("at").textContent = cursor;
  for (const card of $("charts").children) card.move();
}

// ---- Groups
let groups = [],
  place = 0;
function filter() {
  const run = runs[$("run").value],
    step = groups[place] ? groups[place].step : 0;
  const found = new Set(run.groups.map(g => g.mode));
  for (const option of $("mode").options)
    option.disabled = option.value && option.value !== $("mode").value && !found.has(option.value);
  groups = run.groups.filter(g => {
    const right = g.responses.filter(r => r.r_a > 0).length,
      all = g.responses.length,
      mode = $("mode").value,
      verdict = $("verdict").value;
    const fits = {none: right === 0, some: right > 0, all: right === all};
    return (!mode || g.mode === mode) && (!verdict || (all > 0 && fits[verdict]));
  });
  $("which").max = Math.max(0, groups.length - 1);
  const next = groups.findIndex(g => g.step >= step);
  go(next < 0 ? groups.length - 1 : next);
}
function jump() {
  $("mode").value = $("verdict").value = "";
  const step = groups[place] ? groups[place].step : -1;
  filter();
  const found = groups.filter(g => g.switched != null);
  const next = found.find(g => g.step > step) || found[0];
  if (next) go(groups.indexOf(next));
  else $("place").textContent = "No prompt of this run was seen memorized and then explored.";
}
function go(to) {
  place = Math.min(groups.length - 1, Math.max(0, to));
  $("which").value = Math.max(0, place);
  $("previous").setAttribute("aria-disabled", place <= 0);
  $("next").setAttribute("aria-disabled", place >= groups.length - 1);
  if (!groups.length) {
    $("place").textContent = runs[$("run").value].groups.length
      ? "No group fits."
      : "This run has no groups yet.";
    $("group").replaceChildren();
    return;
  }
  const g = groups[place],
    image = data.images[g.image];
  const run = runs[$("run").value],
    filtered = groups.length < run.groups.length,
    left =
      run.all_groups > run.groups.length && !filtered
        ? ` (of the run's ${run.all_groups}; more would not fit)`
        : "";
  const since = g.switched == null ? "" : `; memorized before, at step ${g.switched}`;
  $("place").textContent = `Step ${g.step}; group ${place + 1} of ${groups.length}${left}${since}`;
  const term = (name, ...value) => [make("dt", {}, name), make("dd", {}, ...value)];
  const picture = image
    ? make("img", {src: image, alt: "Image of this question"})
    : g.image && make("p", {class: "soft"}, `Picture left out: ${run.pictures}.`);
  $("group").classList.toggle("small", !image);
  if (image)
    picture.addEventListener("load", () => $("group").classList.toggle("small", picture.naturalWidth < 200));
  const used = g.mode === "exploration" || g.mode === "both"; // else only the target enters the loss
  const top = Math.max(0.01, ...g.responses.map(r => Math.abs(r.advantage)));
  $("group").replaceChildren(
    make(
      "div",
      {},
      picture,
      make(
        "dl",
        {},
        ...term("Row", g.name),
        ...term("Question", g.question),
        ...term("True answer", g.answer),
        ...(g.facts ? term("Visual facts", g.facts) : []),
      ),
    ),
    make(
      "div",
      {},
      make("p", {class: "why"}, make("strong", {}, g.mode[0].toUpperCase() + g.mode.slice(1)), `. ${g.why}`),
      g.target ? make("div", {class: "card"}, make("h3", {}, "Imitated"), marked(g.target)) : null,
      ...g.responses.map((r, k) =>
        make(
          "div",
          {class: "response"},
          make(
            "div",
            {class: "facts"},
            make("strong", {}, `y${k + 1}`),
            make("span", {class: r.r_a > 0 ? "right" : "wrong"}, verdict(r)),
            bar(r.advantage / top, used),
            make(
              "span",
              {},
              `advantage ${r.advantage < 0 ? "" : "+"}${show(r.advantage)}${used ? "" : ", not used"}`,
            ),
            make("span", {}, `r_a ${show(r.r_a)}`),
            make("span", {}, `r_t ${show(r.r_t)}`),
            make("span", {}, `r_f ${show(r.r_f)}`),
            make("span", {}, `r ${show(r.reward)}`),
          ),
          marked(r.text),
        ),
      ),
    ),
  );
}
function verdict(r) {
  if (r.r_a > 0) return "✓ right";
  return !r.finished ? "✗ cut off" : r.r_f > 0 ? "✗ wrong" : "✗ not in the format";
}
function bar(share, used) {
  const fill = make("i");
  fill.style.left = `${Math.min(50, 50 + 50 * share)}%`;
  fill.style.width = `${50 * Math.abs(share)}%`;
  fill.style.background = `var(${share < 0 ? "--bad" : "--good"})`;
  return make("div", {class: used ? "bar" : "bar unused", "aria-hidden": "true"}, fill);
}

// ---- Before and after, and the table
function compare() {
  const chosen = $("of").value === "" ? null : Number($("of").value),
    want = $("changed").value;
  const columns = data.answers.columns.map((column, i) => ({...column, i}));
  const after = columns.filter(c => c.before != null && (chosen === null || c.i === chosen));
  const kept = columns.filter(c => chosen === null || c.i === chosen || after.some(a => a.before === c.i));
  const rows = data.answers.rows.filter(row =>
    after.some(column => {
      const old = row.cells[column.before],
        now = row.cells[column.i];
      if (!want || !now) return !want;
      return want === "wrong"
        ? !now.r_a
        : old && !!now.r_a === (want === "mended") && !!old.r_a !== !!now.r_a;
    }),
  );
  $("answered").textContent = after.length
    ? `${rows.length} of ${data.answers.rows.length} rows`
    : "No run has been evaluated after its start yet.";
  const head = ["Question", ...kept.map(column => column.name)].map(name => make("th", {scope: "col"}, name));
  $("compared").replaceChildren(
    make("thead", {}, make("tr", {}, ...head)),
    make(
      "tbody",
      {},
      ...rows.map(row =>
        make(
          "tr",
          {},
          make("th", {scope: "row"}, row.question, make("div", {class: "soft"}, `answer: ${row.answer}`)),
          ...kept.map(({i}) => {
            const cell = row.cells[i];
            if (!cell) return make("td", {}, "–");
            const numbers = cell.quoted ? ` ${cell.grounded} of ${cell.quoted} numbers in the image` : "";
            return make(
              "td",
              {},
              make("span", {class: cell.r_a ? "right" : "wrong"}, verdict(cell)),
              make("span", {class: "soft"}, numbers),
              marked(cell.text),
            );
          }),
        ),
      ),
    ),
  );
}
function fill(node, {columns, rows}) {
  const cell = (value, i) =>
    i === 0 ? make("th", {scope: "row"}, value) : make("td", {class: "number"}, value);
  node.replaceChildren(
    make(
      "thead",
      {},
      make(
        "tr",
        {},
        ...columns.map((name, i) => make("th", {scope: "col", class: i ? "number" : null}, name)),
      ),
    ),
    make("tbody", {}, ...rows.map(row => make("tr", {}, ...row.map(cell)))),
  );
}

$("summary").textContent = data.summary;
$("of").append(make("option", {value: ""}, "any"));
data.answers.columns.forEach((column, i) => {
  if (column.before != null) $("of").append(make("option", {value: i}, column.name));
});
runs.forEach((run, i) => {
  const box = make("input", {type: "checkbox", checked: ""});
  box.addEventListener("change", () => {
    if (box.checked) hidden.delete(i);
    else hidden.add(i);
    draw();
  });
  $("shown").append(make("label", {}, box, sample(i), run.name));
  $("run").append(make("option", {value: i}, run.name));
});
$("step").max = last;
$("step").addEventListener("input", () => point(Number($("step").value)));
for (const id of ["smooth", "normalise"]) $(id).addEventListener("change", draw);
for (const id of ["run", "mode", "verdict"]) $(id).addEventListener("change", filter);
$("which").addEventListener("input", () => go(Number($("which").value)));
$("previous").addEventListener("click", () => go(place - 1));
$("next").addEventListener("click", () => go(place + 1));
$("switched").addEventListener("click", jump);
for (const id of ["of", "changed"]) $(id).addEventListener("change", compare);
draw();
filter();
compare();
fill($("results"), data.table);
</script>
</body>
</html>
'''


# ---- The program ---------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Evaluate every model named, then print one table; or write a report."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["report"]:
        return report(argv[1:])
    args = parse_arguments(argv)
    print_table([evaluate_model(name, args) for name in args.model])


if __name__ == "__main__":
    sys.exit(run_main(main))
