"""Score runs or models on the test split: greedy accuracy, format, groundedness, and pass@k.

    python eval.py --model runs/tiny-toy-dyme-s0                      # a run, on the test split of its data
    python eval.py --model runs/*-dyme-s? runs/*-grpo-s?              # a table, with mean over seeds
    python eval.py --model SmolVLM-256M --data chartqa --limit 100    # a base model
    python eval.py --model runs/tiny-toy-dyme-s0 --samples 8          # pass@8 and majority@8 as well

Two accuracies are reported. *official* is ChartQA's relaxed accuracy of the text behind the last `Answer:`,
or of the whole text without one; *strict* also wants the format: one flag, an answer, an end token.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from dyme import (CHANGEABLE_ON_RESUME, Config, load_policy, one_line_parser, read_config, respond, run_main,
                  select_device)
from reward import (Example, UserError, answers_match, append_row, load_data, spread, summarise,
                    write_atomically)

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
    add("--device", "auto", "auto, cpu, cuda, cuda:N or mps")
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
    saved = read_config(Path(name)) if is_run else {}
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


def main(argv: list[str] | None = None) -> None:
    """Evaluate every model named, then print one table."""
    args = parse_arguments(argv)
    print_table([evaluate_model(name, args) for name in args.model])


if __name__ == "__main__":
    sys.exit(run_main(main))
