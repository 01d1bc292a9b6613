"""The report: one self-contained page that shows runs think, made from their folders alone."""

import base64
import contextlib
import io
import itertools
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from reward import FLAG, quoted_numbers
from support import data, files, rows, runs, settings
from support.errors import UserError


class Chart(NamedTuple):
    """A chart of the page: what it draws of every run."""

    section: str
    title: str
    unit: str
    key: str
    evaluated: bool = False  # of evaluations on held-out rows, else of the training steps
    axis: str = ""  # share: from 0 to 1; top: from the lowest value to 1, where 0.91 and 1.00 differ
    relative: bool = False  # to the mean of the first 10 steps


CURVES = (
    Chart("Result", "Held-out accuracy", "share right and in the format, greedy", "strict", True, "share"),
    Chart("Result", "Valid thinking", "held-out: share right for the right reasons", "valid_thinking", True, "share"),
    Chart("Result", "Groundedness", "held-out: share of quoted numbers that are in the image; the axis does not "
          "start at 0", "groundedness", True, "top"),
    Chart("Switch and collapse", "Share memorized (Fig. S2)", "prompts, SFT / (SFT + RL)", "memorized", axis="share"),
    Chart("Switch and collapse", "Share memorized, relative (Fig. S2)", "to the mean of the first 10 steps",
          "memorized", relative=True),
    Chart("Switch and collapse", "Groups without a right response", "share of groups", "none_correct", axis="share"),
    Chart("Switch and collapse", "Groups without variance", "share of groups with all rewards alike", "no_variance",
          axis="share"),
    Chart("Rewards", "Training reward (Fig. 4)", "mean of r_a + w_t r_t + w_f r_f", "reward"),
    Chart("Rewards", "Training reward, relative (Fig. 4)", "to the mean of the first 10 steps", "reward",
          relative=True),
    Chart("Rewards", "Training accuracy", "share of sampled responses right (mean r_a)", "accuracy", axis="share"),
    Chart("Rewards", "Thinking reward", "mean r_t", "reward_thinking", axis="share"),
    Chart("Rewards", "In the format", "share of sampled responses (r_f)", "reward_format", axis="share"),
    Chart("Responses and optimisation", "Entropy", "nats per sampled token", "entropy"),
    Chart("Responses and optimisation", "Response length", "tokens", "response_length"),
    Chart("Responses and optimisation", "Truncated", "share cut off by the length limit", "truncated", axis="share"),
    Chart("Responses and optimisation", "Gradient norm", "before clipping to 1", "grad_norm"),
    Chart("Responses and optimisation", "Learning rate", "as used in the step", "lr"),
    Chart("Responses and optimisation", "KL", "to the reference policy, with --beta", "kl"),
    Chart("Responses and optimisation", "Step time", "seconds", "seconds"),
)
STEP_KEYS = list(dict.fromkeys(chart.key for chart in CURVES if not chart.evaluated))
SCORES = {"strict": "accuracy", "valid_thinking": "valid thinking", "in_format": "in format",
          "groundedness": "groundedness",
          "length": "length (tokens)"}
POINTS, ANSWERS, PAGE_BYTES, TEXT_BYTES = 500, 40, 9e6, 7e6  # what keeps a page under 10 MB


def write_page(argv: list[str], config: type, changeable: set[str]) -> None:
    """Write a page that shows what run folders hold. Raises UserError if one is not a run folder.

    `config` is the class of a run's settings, `changeable` those that do not tell runs apart.
    """
    parser = settings.one_line_parser("Write one page about runs: curves, groups, answers, a table.")
    parser.prog = "eval.py report"
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, finished or not")
    parser.add_argument("--out", default="report.html", metavar="X", help="the page [report.html]")
    args = parser.parse_args(argv)
    found = []
    for run in dict.fromkeys(map(Path, args.runs)):
        try:
            found.append((run, settings.read(run, config)))
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)
    if not found:
        raise UserError("none of these is a run folder")
    text = json.dumps(page_content(found, changeable), separators=(",", ":"))
    # Within a script element only `<` could end it; JSON may write it as an escape.
    text = text.replace("<", "\\u003c")
    page = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    try:
        files.write_atomically(Path(args.out), page.replace("DATA", text, 1))
    except (OSError, ValueError) as error:
        raise UserError(f"--out {args.out}: cannot be written ({error})") from None
    size = Path(args.out).stat().st_size / 1e6
    print(f"wrote {args.out} ({size:.1f} MB); open it in a browser")


def page_content(found: list[tuple[Path, dict[str, Any]]], changeable: set[str]) -> dict[str, Any]:
    """All that the page shows of runs: (folder, settings)."""
    names = [run.name for run, _ in found]  # if they tell the runs apart
    if not all(names) or len(set(names)) < len(names):
        names = [str(run) for run, _ in found]
    shown = [describe_run(name, run, cfg) for name, (run, cfg) in zip(names, found, strict=True)]
    budget = PAGE_BYTES - fit_groups(shown, TEXT_BYTES)
    images: dict[str, str] = {}
    for i, (run, cfg) in enumerate(found):
        budget -= add_images(images, run, cfg, shown[i], budget / (len(found) - i))
    charts = [dict(zip(("title", "unit", "key", "evaluated", "share"), c, strict=True)) for c in CURVES]
    summary = f"{len(found)} run{'s' * (len(found) > 1)}: " + ", ".join(str(run) for run, _ in found)
    return {"runs": shown, "images": images, "answers": compare_answers(names, found),
            "table": result_table(names, found, changeable), "charts": charts, "summary": summary}


def describe_run(name: str, run: Path, cfg: dict[str, Any]) -> dict[str, Any]:
    """A run's curves by column, and its groups; `switched` is the step at which an explored one was memorized."""
    metrics = files.read_jsonl(run / "metrics.jsonl")
    for row in metrics:
        row["seconds"] = sum(value for key, value in row.items() if key.startswith("seconds_"))
    groups, memorized = [describe_group(cfg, row) for row in files.read_jsonl(run / "samples.jsonl")], {}
    for group in groups:
        before = memorized.pop(group["name"], None)
        if group["mode"] == "memorization":
            memorized[group["name"]] = group
        elif group["mode"] == "exploration" and before:
            group["switched"], before["first"] = before["step"], True
    return {"name": name, "groups": groups, "all_groups": len(groups),
            "metrics": columns(thin(metrics), [key for *_, key, evaluated, _ in CURVES if not evaluated]),
            "evaluations": columns(files.read_jsonl(run / "evaluations.jsonl"),
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


def training_rows(cfg: dict[str, Any]) -> list[Any]:
    """The rows that a run trained on."""
    return data.load_data(cfg["data"], "train", cfg["traces"], cfg["augmented"], cfg["hints"])


def add_images(images: dict[str, str], run: Path, cfg: dict[str, Any], described: dict[str, Any],
               budget: float) -> int:
    """Add pictures of a run's groups, as data addresses, if its data is at hand and they fit; the bytes used."""
    described["pictures"], used = "the page would grow too large", 0
    if all(group["image"] in images for group in described["groups"]):
        return 0
    try:
        with without_downloads():
            examples = {example.name: example for example in training_rows(cfg)}
    except (UserError, OSError) as error:
        print(f"{run}: shown without pictures, as its data is not at hand ({error})", file=sys.stderr)
        described["pictures"] = "the run's data was not at hand"
        return 0
    for group in by_interest(described["groups"]):
        opener = examples[group["name"]].image if group["name"] in examples else None
        if opener is None:
            group["image"] = None
        elif group["image"] not in images and used < budget:
            with contextlib.suppress(UserError, OSError):
                file, image = io.BytesIO(), rows.shrink(opener(), 480).convert("RGB")
                kind = "PNG" if max(image.size) <= 128 else "JPEG"
                image.save(file, kind, optimize=True)
                address = f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
                if (used := used + len(address)) <= budget:
                    images[group["image"]] = address
    return used


def held_out(run: Path, step: int) -> dict[tuple[str, str], dict[str, Any]]:
    """A run's held-out answers at a step, by row and question."""
    return {(row["name"], row["question"]): row for row in files.read_jsonl(run / f"held-out-{step}.jsonl")}


def compare_answers(names: list[str], found: list[tuple[Path, dict[str, Any]]]) -> dict[str, Any]:
    """Answers to the same held-out rows, by each base and by each run at its last evaluation."""
    columns: list[dict[str, Any]] = []
    for name, (run, _) in zip(names, found, strict=True):
        steps = [row["step"] for row in files.read_jsonl(run / "evaluations.jsonl")]
        base = held_out(run, 0)
        before = next((i for i, column in enumerate(columns) if is_same_base(column, base)), None)
        if before is None and base:
            before = len(columns)
            columns.append({"name": f"before: {name} at step 0", "before": None, "answers": base})
        if steps and steps[-1] > 0:
            columns.append({"name": f"{name} at step {steps[-1]}", "before": before,
                            "answers": held_out(run, steps[-1])})
    keys = shared_rows([column["answers"] for column in columns])
    table = []
    for name_and_question in rows.spread(keys, ANSWERS):
        answers = [column["answers"].get(name_and_question) for column in columns]
        known = next(filter(None, answers))
        table.append({"question": name_and_question[1], "answer": known["answer"],
                      "cells": [answer and answer_cell(answer) for answer in answers]})
    heads = [{"name": column["name"], "before": column["before"]} for column in columns]
    return {"columns": heads, "rows": table}


def is_same_base(column: dict[str, Any], base: dict[tuple[str, str], Any]) -> bool:
    """Is a column a base that answers as `base` does, where both were asked?"""
    both = column["answers"].keys() & base
    alike = all(column["answers"][key]["response"] == base[key]["response"] for key in both)
    return column["before"] is None and bool(both) and alike


def shared_rows(answers: list[dict[tuple[str, str], Any]]) -> list[tuple[str, str]]:
    """The rows that most columns have, of each column."""
    counts = Counter(key for column in answers for key in column)
    shared = set()
    for column in answers:
        most = max((counts[key] for key in column), default=0)
        shared |= {key for key in column if counts[key] == most}
    return [key for key in counts if key in shared]


def answer_cell(answer: dict[str, Any]) -> dict[str, Any]:
    """A held-out answer as the page shows it."""
    return {"text": [[answer["response"][:3000], ""]], "r_a": answer["strict"], "r_f": answer["in_format"],
            "finished": answer["finished"], "quoted": answer["quoted_numbers"],
            "grounded": answer["grounded_numbers"]}


def result_table(names: list[str], found: list[tuple[Path, dict[str, Any]]],
                 changeable: set[str]) -> dict[str, Any]:
    """Last evaluation and time of each run; mean and spread over the seeds of settings that have several."""
    table, pooled = [], {}
    for name, (run, cfg) in zip(names, found, strict=True):
        metrics = files.read_jsonl(run / "metrics.jsonl")
        last = ([{}] + files.read_jsonl(run / "evaluations.jsonl"))[-1]
        seconds = sum(v for row in metrics for k, v in row.items() if k.startswith("seconds_"))
        scores = [*(last.get(key) for key in SCORES), seconds / 60]
        size = [str(len(metrics)), str(last.get("step", "–")), str(last.get("rows", "–"))]
        table.append([name, *map(rounded, scores), cfg["mode"], str(cfg["seed"]), *size])
        key = (runs.pooling_key(run, cfg, changeable), *size)
        pooled.setdefault(key, {})[cfg["seed"]] = (table[-1], scores)
    for seeds in pooled.values():
        if len(seeds) > 1:
            table.append(seeds_row([row for row, _ in seeds.values()], [s for _, s in seeds.values()]))
    return {"columns": ["run", *SCORES.values(), "minutes in steps", "mode", "seed", "steps",
                        "evaluated at step", "rows evaluated"], "rows": table}


def seeds_row(likes: list[list[str]], scores: list[list[float | None]]) -> list[str]:
    """The row for several seeds of a setting: mean and range of each score."""
    cells = []
    for column in zip(*scores, strict=True):
        values = [value for value in column if value is not None]
        cell = "–"
        if values:
            mean = rounded(sum(values) / len(values))
            cell = f"{mean} ({rounded(min(values))} – {rounded(max(values))})"
        cells.append(cell)
    mode = len(cells) + 1  # its place after the name and the scores
    return [f"mean (from – to) of {len(likes)} seeds like {likes[0][0]}", *cells, likes[0][mode], "",
            *likes[0][mode + 2:]]


def rounded(value: float | None) -> str:
    """A number as the page shows it."""
    if value is None:
        return "–"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
