"""Score runs or models on the test split: accuracy, valid thinking, format, pass@k.

    python eval.py runs/tiny-toy-dyme-s0                      # a run, on the test split of its data
    python eval.py runs/*-dyme-s? runs/*-grpo-s? --best       # a table; the best weights by val
    python eval.py tiny                                       # the toy's base, before any training
    python eval.py SmolVLM-256M --data chartqa --prompt direct  # a base model, not asked to think
    python eval.py runs/tiny-toy-dyme-s0 --samples 8          # pass@8 and majority@8 as well
    python eval.py report runs/*                              # a page that shows them think
    torchrun --nproc_per_node=4 eval.py runs/NAME             # on four GPUs

*accuracy* accuracy wants the format: one flag, an answer, an end token. *official* is the data set's published
score of the text after the last `Answer:`; *any_format* counts the last word or number of the response.
*valid_thinking* is right for the right reasons (see the README).
"""

import argparse
import contextlib
import importlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from dyme import PROMPT, Config, load_policy, respond
from support import UserError, data, files, models, parallel, rows, runs, settings, thinking

COLUMNS = ("accuracy", "any_format", "official", "valid_thinking", "in_format", "groundedness", "length")
# The base rows of the paper's main table are asked for the answer alone.
PROMPTS = {"think": PROMPT, "direct": "{question}\nAnswer with nothing but a word, a number or a short phrase."}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = settings.one_line_parser(__doc__)

    def add(flag: str, default: Any, text: str, **options: Any) -> None:
        parser.add_argument(flag, type=type(default), default=default, metavar="X", help=text, **options)

    parser.add_argument("models", nargs="*", metavar="MODEL",
                        help="run folders, model directories, hub ids, short names, tiny")
    parser.add_argument("--model", nargs="+", default=[], metavar="X", help="the same")
    parser.add_argument("--best", action="store_true", help="a run's best weights by val, not its last")
    add("--data", "", "as for dyme.py [a run's own data, else toy]")
    parser.add_argument("--prompt", choices=PROMPTS, default="think",
                        help="ask for thinking and the format [think], or for the answer alone: read `official` then")
    add("--samples", 0, "k: also sample k responses, for pass@k and majority@k")
    add("--limit", 0, "rows to score, spread over the split [all]")
    add("--max-new-tokens", 0, "length limit [a toy run's own, else 1024]")
    add("--temperature", 1.0, "of --samples [1.0]")
    add("--batch", 0, "prompts per forward pass [64 for toy; else 32 on a GPU, 8 on a CPU]")
    add("--image-edge", 0, "as for dyme.py [a run's own]")
    add("--seed", 0, "of --samples [0]")
    add("--out", "", "folder for predictions.jsonl [the run folder, else runs/eval-MODEL]")
    add("--device", "auto", "auto, cpu, cuda or cuda:N")
    args = parser.parse_intermixed_args(argv)
    args.model += args.models
    if not args.model:
        raise UserError("name a run folder or a model to score (--help shows all flags)")
    for name in ("samples", "limit", "max_new_tokens", "batch", "image_edge", "seed"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must not be negative")
    if not 0 < args.temperature <= settings.HIGHEST:
        raise UserError(f"--temperature {args.temperature}: must be above 0 and at most {settings.HIGHEST:g}")
    for name in args.model:
        settings.check_model_name(name, {"tiny", *models.NAMES})
    if args.out and len(args.model) > 1:
        raise UserError("--out names one folder; with several models, leave it out")
    return args


def evaluate_model(name: str, args: argparse.Namespace, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Answer the test split with one model, write predictions.jsonl, and return the averages.

    Other processes are kept out of the folder until the stack ends.
    """
    is_run = (Path(name) / "config.json").exists() and (Path(name) / "metrics.jsonl").exists()
    weights = "best" if args.best else "checkpoint"
    if is_run and not (Path(name) / weights).is_dir():
        raise UserError(f"--model {name}: this run has no {weights} yet (see --save-every, --eval-every)")
    saved = settings.read(Path(name), Config) if is_run else {}
    source = args.data or saved.get("data", "toy")
    toy = source == "toy"
    examples = load_test(name, source, saved.get("data"), args.limit)
    image_edge = args.image_edge or saved.get("image_edge", 0)
    source_of_weights = str(Path(name) / weights) if is_run else name
    device = parallel.select_device(args.device)
    policy = load_policy(source_of_weights, device, image_edge)
    out = open_folder(Path(args.out or (name if is_run else f"runs/eval-{Path(name).name}")), stack)

    max_new_tokens = 1024
    if toy:
        max_new_tokens = saved.get("max_new_tokens", Config.max_new_tokens)
    max_new_tokens = args.max_new_tokens or max_new_tokens
    batch = args.batch or (64 if toy else 32 if device.type == "cuda" else 8)
    prompt = PROMPTS[args.prompt]
    predictions = respond(policy, examples, max_new_tokens, batch, prompt=prompt)
    about = {"model": name, "weights": weights, "data": source, "prompt": args.prompt}
    summary = about | thinking.summarise(predictions)
    if args.samples:
        k = args.samples
        drawn = respond(policy, examples, max_new_tokens, max(1, batch // k), k, args.temperature, args.seed, prompt)
        groups = list(parallel.chunks(drawn, k))
        summary |= vote(groups)
        for prediction, group in zip(predictions, groups, strict=True):
            keys = ("response", "parsed", "accuracy")
            prediction["samples"] = [{key: sample[key] for key in keys} for sample in group]
    if parallel.is_main():
        files.write_jsonl(out / "predictions.jsonl", predictions)
        files.write_atomically(out / "evaluation.json", json.dumps(summary, indent=2) + "\n")
        print(f"wrote {out / 'predictions.jsonl'}", file=sys.stderr)
    setting = runs.pooling_key(Path(name), saved, settings.CHANGEABLE_ON_RESUME) if saved else name
    return summary | {"setting": setting, "mode": saved.get("mode", "base"), "seed": saved.get("seed", "-")}


def load_test(name: str, source: str, trained_on: str | None, limit: int) -> list[Any]:
    """The rows to test a model on; of your own rows, a run on them is tested on the tenth held back."""
    own_rows = source.endswith((".json", ".jsonl"))
    held_back = own_rows and trained_on and Path(source).resolve() == Path(trained_on).resolve()
    examples = data.load_data(source, "val" if held_back else "test")
    if own_rows and not held_back and parallel.is_main():
        print(f"{name}: tested on all {len(examples)} rows of {source}", file=sys.stderr)
    return rows.spread(examples, limit or len(examples))


def open_folder(out: Path, stack: contextlib.ExitStack) -> Path:
    """Make and lock the folder for predictions, to know that it can be written before the work is done."""
    with parallel.errors_shared():
        try:
            if parallel.is_main():
                out.mkdir(parents=True, exist_ok=True)
                stack.enter_context(files.locked(out))
                (out / "predictions.jsonl").open("a").close()
        except OSError as error:
            raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
    return out


def vote(groups: list[list[dict[str, Any]]]) -> dict[str, float]:
    """pass@k (any of k samples is right) and majority@k (the commonest answer in the format is right)."""
    passed, majority, k = 0, 0, len(groups[0])
    for group in groups:
        said = [((p["parsed"] or "").lower().rstrip(".").replace(",", ""), p["accuracy"]) for p in group]
        commonest = Counter(answer for answer, _ in said if answer).most_common(1)
        passed += any(right for _, right in said)
        majority += any(right for answer, right in said if commonest and answer == commonest[0][0])
    return {f"pass@{k}": passed / len(groups), f"majority@{k}": majority / len(groups)}


def print_table(table: list[dict[str, Any]]) -> None:
    """Print a line per model, then mean and range over the seeds of each setting that has several."""
    starts = ("official_", "accuracy_", "any_match", "multiple_choice", "pass@", "majority@")
    extra = dict.fromkeys(key for row in table for key in row if key.startswith(starts))
    columns = [*COLUMNS, *extra]
    width = max(len(row["model"]) for row in table)
    heads = " ".join(f"{column:>12}" for column in columns)
    print(f"{'model':{width}} {'mode':9} seed  rows {heads}")
    for row in table:
        cells = []
        for column in columns:
            value = row.get(column)
            shown = f"{value:.3f}" if isinstance(value, float) else "-"
            cells.append(f"{shown:>{max(12, len(column))}}")
        print(f"{row['model']:{width}} {row['mode']:9} {row['seed']:>4} {row['rows']:5} {' '.join(cells)}")
    for setting in dict.fromkeys(row["setting"] for row in table):
        # By seed, so that a copy of a run does not count as another one.
        seeds = {row["seed"]: row for row in table if row["setting"] == setting}
        if len(seeds) > 1:
            print_seeds([*seeds.values()])


def print_seeds(seeds: list[dict[str, Any]]) -> None:
    """Print mean and range over seeds."""
    for column in ("accuracy", "official", "valid_thinking"):
        scores = [row[column] for row in seeds if row.get(column) is not None]
        if not scores:
            continue
        mean = sum(scores) / len(scores)
        print(f"{seeds[0]['mode']}, {column}, {len(seeds)} seeds: mean {mean:.3f} "
              f"(from {min(scores):.3f} to {max(scores):.3f})")


def main(argv: list[str] | None = None) -> None:
    """Evaluate every model named, then print one table; or write a report."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["report"]:
        return importlib.import_module("support.report").write_page(argv[1:])
    args = parse_arguments(argv)
    table = []
    with parallel.processes(args.device):
        for name in args.model:
            with contextlib.ExitStack() as stack:
                table.append(evaluate_model(name, args, stack))
        if parallel.is_main():
            print_table(table)


if __name__ == "__main__":
    sys.exit(runs.run_main(main))
