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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import constants

from reward import FLAG, Example
from support import UserError, data, files, rows, runs, settings, story
from support.thinking import quoted_numbers


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
    Chart("Result", "Held-out accuracy", "share right and in the format, greedy", "accuracy", True, "share"),
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
SCORES = {"accuracy": "accuracy", "valid_thinking": "valid thinking", "in_format": "in format",
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
    shelf = Shelf()
    shown = [describe_run(name, run, cfg, shelf.rows(cfg, "train"))
             for name, (run, cfg) in zip(names, found, strict=True)]
    stories = tell_stories(shown, found)
    answers = compare_answers(names, found, shelf)
    headline = story.headline(shown)
    for run in shown:
        del run["rows"]
    # Groups get what the other texts leave, and pictures the rest: those of the answers first.
    fixed = page_bytes([answers, stories, [{**run, "groups": []} for run in shown]])
    budget = PAGE_BYTES - fixed - fit_groups(shown, TEXT_BYTES - fixed)
    images: dict[str, str] = {}
    budget -= add_images(images, answers["rows"], shelf, budget / 3)
    for i, (run, cfg) in enumerate(found):
        budget -= add_images(images, by_interest(shown[i]["groups"]), shelf, budget / (len(found) - i))
        reason = shelf.missing.get(cfg["data"])
        shown[i]["pictures"] = "the run's data was not at hand" if reason else "the page would grow too large"
        if reason:
            print(f"{run}: shown without pictures, as its data is not at hand ({reason})", file=sys.stderr)
    summary = f"{len(found)} run{'s' * (len(found) > 1)}: " + ", ".join(str(run) for run, _ in found)
    return {"runs": shown, "images": images, "answers": answers, "stories": stories,
            "table": result_table(names, found, changeable), "charts": charts(shown),
            "headline": headline, "summary": summary}


class Shelf:
    """The data of runs, as far as it is at hand; each set is read once."""

    def __init__(self) -> None:
        self.sets: dict[str, dict[str, Example]] = {}
        self.pictures: dict[str, Callable[[], Any] | None] = {}  # what opens them, by `picture_address`
        self.missing: dict[str, str] = {}  # of data that could not be read: why

    def rows(self, cfg: dict[str, Any], split: str) -> dict[str, Example]:
        """A split of a run's data, by the names of its rows; empty if it is not at hand."""
        source = [cfg["data"], split, cfg["traces"], cfg["augmented"], cfg["hints"]]
        key = json.dumps(source)
        if key not in self.sets:
            self.sets[key] = {}
            try:
                with without_downloads():
                    self.sets[key] = {example.name: example for example in data.load_data(*source)}
            except (UserError, OSError) as error:
                self.missing[cfg["data"]] = str(error)
            for name, example in self.sets[key].items():
                self.pictures[picture_address(cfg, split, name)] = example.image
        return self.sets[key]


def picture_address(cfg: dict[str, Any], split: str, name: str) -> str:
    """Names the picture of a row, for all runs on its data."""
    return f"{cfg['data']} {split} {name}"


def charts(shown: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The charts for which any run has values, with one for each kind of question."""
    kinds = dict.fromkeys(kind for run in shown for kind in run["kinds"])
    skills = [Chart("Kinds of question", f"Accuracy: {kind}", "held-out, greedy", f"accuracy_{kind}", True, "share")
              for kind in kinds]
    place = next(i for i, chart in enumerate(CURVES) if chart.section != CURVES[0].section)
    return [chart._asdict() for chart in [*CURVES[:place], *skills, *CURVES[place:]]
            if any(chart.key in run["evaluations" if chart.evaluated else "metrics"] for run in shown)]


def describe_run(name: str, run: Path, cfg: dict[str, Any], examples: dict[str, Example]) -> dict[str, Any]:
    """A run's curves by column, and its groups; `switched` is the step at which an explored one was memorized."""
    metrics, evaluations = (files.read_jsonl(run / f"{file}.jsonl") for file in ("metrics", "evaluations"))
    for row in metrics:
        row["seconds"] = sum(value for key, value in row.items() if key.startswith("seconds_"))
        if not cfg["beta"]:
            row.pop("kl", None)
    groups = [describe_group(cfg, row, examples) for row in files.read_jsonl(run / "samples.jsonl")]
    memorized: dict[str, dict[str, Any]] = {}
    for group in groups:
        before = memorized.pop(group["name"], None)
        if group["mode"] == "memorization":
            memorized[group["name"]] = group
        elif group["mode"] == "exploration" and before:
            group["switched"], before["first"] = before["step"], True
    kinds = story.hardest_kinds(evaluations)
    held_out = [*(chart.key for chart in CURVES if chart.evaluated), *(f"accuracy_{kind}" for kind in kinds)]
    # The steps of an epoch, where each step takes as many rows as the others.
    epoch = len(examples) / cfg["prompts"] if examples and cfg["mode"] in ("dyme", "grpo") else None
    return {"name": name, "mode": cfg["mode"], "data": cfg["data"], "steps": cfg["steps"], "epoch": epoch,
            "compared": what_r_t_compares(cfg), "kinds": kinds,
            "groups": groups, "all_groups": len(groups), "metrics": columns(thin(metrics), STEP_KEYS),
            "rows": evaluations, "evaluations": columns(evaluations, held_out)}


def tell_stories(shown: list[dict[str, Any]], found: list[tuple[Path, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The story of each run that has one, those of the paper's method first; their groups are marked to be kept."""
    told = []
    for i, (run, (_, cfg)) in enumerate(zip(shown, found, strict=True)):
        text = story.tell(cfg, run["groups"], run["rows"])
        if text:
            told.append(text | {"run": i, "elsewhere": story.elsewhere(text["name"], shown, run)})
            for group in run["groups"]:
                if group["name"] == text["name"]:
                    group["told"] = True
    return sorted(told, key=lambda text: shown[text["run"]]["mode"] != "dyme")


def by_interest(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups of the story first, then those of a switch; of the others every first part is spread over the run."""
    golden = (math.sqrt(5) - 1) / 2
    order = sorted(enumerate(groups), key=lambda x: (
        "told" not in x[1], not (x[1].keys() & {"switched", "first"}), x[0] * golden % 1))
    return [group for _, group in order]


def page_bytes(content: Any) -> int:
    """What some content takes on the page."""
    text = json.dumps(content, separators=(",", ":"))
    return len(text) + 5 * text.count("<")  # each is written as six characters


def fit_groups(shown: list[dict[str, Any]], budget: float) -> float:
    """Keep of each run's groups what fits `budget` bytes in all; what a short run leaves, the others get."""
    whole, used = [sum(map(page_bytes, run["groups"])) for run in shown], 0.0
    for i, n in enumerate(sorted(range(len(shown)), key=whole.__getitem__)):
        allowed, run = (budget - used) / (len(shown) - i), shown[n]
        sizes = itertools.accumulate(map(page_bytes, by_interest(run["groups"])))
        kept = [group for group, end in zip(by_interest(run["groups"]), sizes, strict=True) if end <= allowed]
        run["groups"] = sorted(kept, key=lambda group: group["step"])
        used += sum(map(page_bytes, kept))
    return used


def thin(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Average runs of neighbouring rows, so that at most POINTS are left."""
    size = math.ceil(len(rows) / POINTS)
    parts = [rows[i:i + size] for i in range(0, len(rows), size)] if size > 1 else []
    return [{"step": part[-1]["step"]} | {
        key: sum(values) / len(values) for key in STEP_KEYS
        if (values := [row[key] for row in part if row.get(key) is not None])} for part in parts] or rows


def columns(rows: list[dict[str, Any]], keys: list[str]) -> dict[str, list[Any]]:
    """Rows as columns, for the keys that any of them has; numbers to six digits."""
    present = [key for key in keys if any(row.get(key) is not None for row in rows)]
    return {"step": [row["step"] for row in rows]} | {
        key: [None if row.get(key) is None else float(f"{row[key]:.6g}") for row in rows] for key in present}


def describe_group(cfg: dict[str, Any], group: dict[str, Any], examples: dict[str, Example]) -> dict[str, Any]:
    """A row of `samples.jsonl`, with its texts marked and the choice of mode explained."""
    facts, question = group["facts"], group["question"]
    known = examples.get(group["name"])  # older runs do not hold kind and trace themselves
    trace = group["trace"] if "trace" in group else known and known.trace
    source = group["source"] if "source" in group else known.source if known else ""
    responses = [r | {"text": mark(r["text"], facts, question)} for r in group["responses"]]
    return group | {"responses": responses, "source": source, "why": explain_mode(cfg, group),
                    "trace": trace and mark(trace, facts, question),
                    "target": group["target"] and mark(group["target"], facts, question),
                    "image": picture_address(cfg, "train", group["name"])}


def what_r_t_compares(cfg: dict[str, Any]) -> str:
    """What the reference trace of an explored group was for."""
    if story.helper_rates(cfg):
        return "Reference trace (here a helper rated the thinking, by the visual facts)"
    if not cfg["thinking_weight"]:
        return "Reference trace that r_t compares with (r_t is not rewarded in this run)"
    return "Reference trace that r_t compares with"


def mark(text: str, facts: str | None, question: str) -> list[list[str]]:
    """A text in parts: (text, "yes" or "no" if it is a number of its thinking, grounded or not, else "")."""
    if not facts:
        return [[text, ""]]
    parts, end, thinking = [], 0, re.split(re.escape(FLAG), text, flags=re.IGNORECASE)[0]
    for start, stop, grounded in quoted_numbers(thinking, facts, question):
        parts += [[text[end:start], ""], [text[start:stop], "yes" if grounded else "no"]]
        end = stop
    return [part for part in [*parts, [text[end:], ""]] if part[0]]


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


def add_images(images: dict[str, str], shown: list[dict[str, Any]], shelf: Shelf, budget: float) -> int:
    """Add the pictures of groups or rows, as data addresses, that are at hand and fit; the bytes used."""
    used = 0
    for one in shown:
        address = one["image"]
        if address not in shelf.pictures or address in images:
            continue
        opener = shelf.pictures[address]
        if opener is None:
            one["image"] = None
        elif used < budget:
            with contextlib.suppress(UserError, OSError):
                text = image_text(opener())
                if (used := used + len(text)) <= budget:
                    images[address] = text
    return used


def image_text(picture: Any) -> str:
    """A picture as a data address, of at most 480 pixels."""
    file, image = io.BytesIO(), rows.shrink(picture, 480).convert("RGB")
    kind = "PNG" if max(image.size) <= 128 else "JPEG"
    image.save(file, kind, optimize=True)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


# ---- Before and after ----------------------------------------------------------------------------


def held_out(run: Path, step: int) -> dict[tuple[str, str], dict[str, Any]]:
    """A run's held-out answers at a step, by row and question."""
    return {(row["name"], row["question"]): row for row in files.read_jsonl(run / f"held-out-{step}.jsonl")}


def compare_answers(names: list[str], found: list[tuple[Path, dict[str, Any]]], shelf: Shelf) -> dict[str, Any]:
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
    table = []
    for key in chosen_rows(columns):
        answers = [column["answers"].get(key) for column in columns]
        known = next(filter(None, answers))
        facts, image = row_at_hand(key, found, shelf)
        table.append({"question": key[1], "answer": known["answer"], "kind": known.get("source", ""), "image": image,
                      "cells": [answer and answer_cell(answer, facts) for answer in answers]})
    heads = [{"name": column["name"], "before": column["before"]} for column in columns]
    return {"columns": heads, "rows": table}


def chosen_rows(columns: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """At most ANSWERS rows: three in four of those that changed, if there are so many; kinds side by side."""
    keys = shared_rows([column["answers"] for column in columns])

    def verdicts(key: tuple[str, str]) -> set[bool]:
        return {bool(column["answers"][key]["accuracy"]) for column in columns if key in column["answers"]}

    changed = rows.spread([key for key in keys if len(verdicts(key)) > 1], ANSWERS * 3 // 4)
    alike = rows.spread([key for key in keys if len(verdicts(key)) == 1], ANSWERS - len(changed))
    chosen = {*changed, *alike}
    if len(chosen) < ANSWERS:  # all changed
        chosen |= {*rows.spread([key for key in keys if key not in chosen], ANSWERS - len(chosen))}
    return [key for key in keys if key in chosen]


def row_at_hand(key: tuple[str, str], found: list[tuple[Path, dict[str, Any]]],
                shelf: Shelf) -> tuple[str | None, str | None]:
    """The visual facts of a held-out row, and the address of its picture, if any run's data is at hand."""
    name, question = key
    for _, cfg in found:
        example = shelf.rows(cfg, "val").get(name)
        if example and example.question == question:
            return example.facts, picture_address(cfg, "val", name)
    return None, None


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


def answer_cell(answer: dict[str, Any], facts: str | None) -> dict[str, Any]:
    """A held-out answer as the page shows it."""
    return {"text": mark(answer["response"][:3000], facts, answer["question"]), "r_a": answer["accuracy"],
            "r_f": answer["in_format"], "finished": answer["finished"], "fault": answer.get("thinking_fault")}


# ---- The table -----------------------------------------------------------------------------------


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
