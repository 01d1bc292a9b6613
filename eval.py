"""Score runs or models on the test split: accuracy, valid thinking, format, pass@k.

    python eval.py runs/tiny-toy-dyme-s0                      # a run, on the test split of its data
    python eval.py runs/*-dyme-s? runs/*-grpo-s? --best       # a table; the best weights by val
    python eval.py tiny --samples 8                           # the toy's base; with pass@8
    python eval.py SmolVLM-256M --data chartqa --prompt direct  # a base model, not asked to think
    python eval.py report runs/*                              # a page that shows them think

*accuracy* wants the format: one flag, an answer, an end token. *official*, the data set's score,
takes the text after the last flag, *any_format* the last word (more in support/DETAILS.md).
"""

import argparse
import contextlib
import importlib
import io
import json
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dyme import NAMES, PRESETS, PROMPT, Config, load_policy, respond
from reward import Example, is_list
from support import UserError, data, files, parallel, runs, settings, thinking

# The table's columns, by how they are headed; all other scores stand below it.
COLUMNS = {"accuracy": "accuracy", "any_format": "any_format", "official": "official",
           "valid_thinking": "valid", "in_format": "in_format", "groundedness": "grounded",
           "length": "length"}
OTHERS = ("official_", "any_match", "multiple_choice", "pass@", "majority@")
PROMPTS = {"think": PROMPT, "bare": "{question}",
           # The base rows of the paper's main table are asked so.
           "direct": "{question}\nAnswer with nothing but a word, a number or a short phrase."}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line. Raises UserError."""
    parser = settings.one_line_parser(__doc__)

    def add(flag: str, default: int | float | str, text: str) -> None:
        parser.add_argument(flag, type=type(default), default=default, metavar="X", help=text)

    parser.add_argument("models", nargs="*", metavar="MODEL", help="run, directory, hub id, tiny")
    parser.add_argument("--model", nargs="+", default=[], metavar="X", help="the same")
    parser.add_argument("--best", action="store_true", help="a run's best weights by val, not last")
    add("--data", "", "as for dyme.py [a run's own data, else toy]")
    parser.add_argument("--prompt", choices=PROMPTS, default="think",
                        help="ask for thinking and the format, as it is, or for the answer [think]")
    add("--samples", 0, "k: also sample k responses, for pass@k and majority@k")
    add("--limit", 0, "rows to score, spread over the split [all]")
    add("--max-new-tokens", 0, "length limit [toy, sums, charts: a run's own, else 1024]")
    add("--temperature", 1.0, "of --samples [1.0]")
    add("--batch", 0, "prompts in a pass [toy, sums, charts: 64; images on a CPU: 8; else 32]")
    add("--image-edge", 0, "as for dyme.py [a run's own]")
    add("--seed", 0, "of --samples [0]")
    add("--out", "", "folder for predictions.jsonl [the run folder, else runs/eval-MODEL]")
    add("--device", "auto", "auto, cpu, cuda or cuda:N")
    parser.add_argument("--precision", choices=("auto", "float32", "bf16"),
                        help="of passes [a run's own, else auto]")
    parser.add_argument("--plain", action="store_true", help="without what makes it fast")
    args = parser.parse_intermixed_args(argv)
    args.model += args.models
    if not args.model:
        raise UserError("name a run folder or a model to score (--help shows all flags)")
    for name in ("samples", "limit", "max_new_tokens", "batch", "image_edge", "seed"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name.replace('_', '-')}: must not be negative")
    if not 0 < args.temperature <= settings.HIGHEST:
        raise UserError(f"--temperature: must be above 0 and at most {settings.HIGHEST:g}")
    for name in args.model:
        settings.check_model_name(name, {"tiny", *NAMES})
    if args.out and len(args.model) > 1:
        raise UserError("--out names one folder; with several models, leave it out")
    return args


def evaluate_model(name: str, args: argparse.Namespace, stack: contextlib.ExitStack) -> dict:
    """Answer the test split in a folder that is locked until the stack ends; the averages."""
    folder, weights = Path(name), "best" if args.best else "checkpoint"
    suffix = "-best" if args.best else ""
    try:
        saved = settings.read(folder, Config)
    except UserError:
        if args.best or (folder / "metrics.jsonl").exists():
            raise
        saved = {}  # it is a model, not a run
    if saved and not (folder / weights).is_dir():
        raise UserError(f"{name}: has no {weights} yet (see --save-every, --eval-every)")
    source = args.data or saved.get("data", "toy")
    examples = load_test(folder, source, saved, args.limit)
    device = parallel.select_device(args.device)
    policy = load_policy(str(folder / weights) if saved else name, device,
                         args.image_edge or saved.get("image_edge", 0))
    precision = args.precision or saved.get("precision", "auto")
    policy = replace(policy, autocast=parallel.autocast(policy.model, precision))
    if not args.plain:
        policy = importlib.import_module("support.fast").speed_up(policy)
    # By a model's whole name: a/model and b/model are two.
    default = name if saved else f"runs/eval-{str(folder).replace('/', '--')}"
    if args.out and Path(args.out) != folder and (Path(args.out) / "metrics.jsonl").exists():
        raise UserError(f"--out {args.out}: holds another run; name a folder of its own")
    predicted = Path(args.out or default) / f"predictions{suffix}.jsonl"
    open_for_writing(predicted, stack)
    made, prompt, k = data.is_made(source), PROMPTS[args.prompt], args.samples
    few = device.type == "cpu" and examples[0].image  # a tower takes much memory
    batch = args.batch or (64 if made else 8 if few else 32)
    own = {"max_new_tokens": Config.max_new_tokens} | PRESETS.get(data.name_of(source), {}) | saved
    longest = args.max_new_tokens or (
        own["max_new_tokens"] if made else int(min(1024, policy.context / 2)))
    predictions = parallel.while_it_fits(batch, lambda size: respond(
        policy, examples, longest, size, prompt=prompt))
    summary = {"model": name, "weights": weights, "data": source, "prompt": args.prompt}
    summary |= thinking.summarise(predictions)
    if k:
        drawn = parallel.while_it_fits(max(1, batch // k), lambda size: respond(
            policy, examples, longest, size, k, args.temperature, args.seed, prompt))
        groups = [drawn[i:i + k] for i in range(0, len(drawn), k)]
        kept = ("response", "parsed", "accuracy")
        standard = [g for g in groups if not thinking.is_new(g[0]["source"])]
        summary |= vote(standard or groups)  # the rows that accuracy counts
        for prediction, group in zip(predictions, groups, strict=True):
            prediction["samples"] = [{key: sample[key] for key in kept} for sample in group]
    if parallel.is_main():
        files.write_jsonl(predicted, predictions)
        averages = predicted.with_name(f"evaluation{suffix}.json")
        files.write_atomically(averages, json.dumps(summary, indent=2) + "\n")
        print(f"wrote {predicted}", file=sys.stderr)
    setting = pooling_key(folder, saved) if saved else name
    return {"mode": "base", "seed": "-"} | saved | summary | {"setting": setting}


def load_test(run: Path, source: str, saved: dict[str, Any], limit: int) -> list[Example]:
    """The rows to test on; of your own rows, a run on them is tested on the tenth held back."""
    own_rows = source.endswith((".json", ".jsonl"))
    kept = held_back(run, source, saved) if own_rows else []
    rows = kept or data.load_data(source, "test")
    if own_rows and not kept and parallel.is_main():
        print(f"{run}: tested on all {len(rows)} rows of {source}", file=sys.stderr)
    return data.held_out(source, rows, limit or len(rows))


def held_back(run: Path, source: str, saved: dict[str, Any]) -> list[Example]:
    """The rows of a file that a run on it held back. Raises UserError if the file has changed."""
    if not (saved.get("data", "").endswith((".json", ".jsonl")) and Path(source).is_file()):
        return []
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(UserError):
        train, val = (data.load_data(source, split) for split in ("train", "val"))
        now = runs.describe_rows(train, data.held_out(source, val, saved["eval_rows"]))
        if now == runs.read_config(run).get("rows"):
            return val
    if Path(source).resolve() == Path(saved["data"]).resolve():
        raise UserError(f"{source}: has changed since {run} trained on some of its rows; name "
                        "other rows by --data, or bring the old ones back")
    return []


def open_for_writing(file: Path, stack: contextlib.ExitStack) -> None:
    """Make and lock the folder for predictions, to know before the work that it can be written."""
    out = file.parent
    with parallel.errors_shared():
        try:
            if parallel.is_main():
                out.mkdir(parents=True, exist_ok=True)
                stack.enter_context(files.locked(out))
                file.open("a").close()
        except OSError as error:
            raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None


def pooling_key(run: Path, saved: dict[str, Any]) -> str:
    """What runs have in common that differ in nothing but the seed."""
    free = settings.CHANGEABLE_ON_RESUME | {"seed"}
    setting = {key: value for key, value in saved.items() if key not in free}
    return json.dumps([len(files.read_jsonl(run / "metrics.jsonl")), setting])


def vote(groups: Sequence[Sequence[dict[str, Any]]]) -> dict[str, float]:
    """pass@k: any of k samples is right. majority@k: the commonest answer in the format is."""
    passed, majority, k = 0, 0, len(groups[0])
    for group in groups:
        said = [(one_form(p["parsed"] or ""), p["accuracy"]) for p in group]
        commonest = Counter(answer for answer, _ in said if answer).most_common(1)
        passed += any(right for _, right in said)
        majority += any(right for answer, right in said if commonest and answer == commonest[0][0])
    return {f"pass@{k}": passed / len(groups), f"majority@{k}": majority / len(groups)}


def one_form(answer: str) -> str:
    """An answer without case and full stop; a list without spaces, all else without commas."""
    answer = answer.lower().rstrip(".")
    return answer.replace(" ", "") if is_list(answer) else answer.replace(",", "")


def print_table(table: list[dict[str, Any]]) -> None:
    """Print a line of at most 100 columns per model; below, other scores, and means over seeds."""
    print(f"{'model':18} mode      seed  rows {' '.join(COLUMNS.values())}")
    for row in table:
        name = Path(row["model"]).name + " (best)" * (row.get("weights") == "best")
        name = name if len(name) <= 18 else f"…{name[-17:]}"
        cells = [f"{shown(row.get(key)):>{len(head)}}" for key, head in COLUMNS.items()]
        print(f"{name:18} {row['mode']:9} {row['seed']:>4} {row['rows']:5} {' '.join(cells)}")
    for row in table:
        kinds = "accuracy_" if row["prompt"] == "think" else "any_format_"  # no format is asked
        below = [f"{key} {shown(row[key])}" for key in row if key.startswith((kinds, *OTHERS))]
        if (row.get("thinking_judged") or 1.0) < 1:
            below.append(f"rules can judge the thinking of {shown(row['thinking_judged'])}")
        if below:
            name = f"{row['model']}: " if len(table) > 1 else ""
            print(textwrap.fill(name + ", ".join(below), 100, subsequent_indent="  "))
    for setting in dict.fromkeys(row["setting"] for row in table):
        # By seed, so that a copy of a run does not count as another one.
        seeds = [*{row["seed"]: row for row in table if row["setting"] == setting}.values()]
        for key in ("accuracy", "official", "valid_thinking") if len(seeds) > 1 else ():
            if scores := [row[key] for row in seeds if row.get(key) is not None]:
                mean, low, high = sum(scores) / len(scores), min(scores), max(scores)
                print(f"{seeds[0]['mode']}, {key}, {len(seeds)} seeds: mean {mean:.3f} "
                      f"(from {low:.3f} to {high:.3f})")


def shown(value: float | None) -> str:
    """A score as the table shows it."""
    return "-" if value is None else f"{value:.{3 if value < 2 else 1}f}"


def main(argv: list[str] | None = None) -> None:
    """Evaluate every model named, then print one table; or write a report."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["report"]:
        return importlib.import_module("support.report").write_page(argv[1:])
    args, table = parse_arguments(argv), []
    with parallel.processes(args.device):
        try:
            for name in args.model:
                with contextlib.ExitStack() as stack:
                    table.append(evaluate_model(name, args, stack))
        finally:  # an error costs no figures of the models before
            if table and parallel.is_main():
                print_table(table)


if __name__ == "__main__":
    sys.exit(runs.run_main(main))
