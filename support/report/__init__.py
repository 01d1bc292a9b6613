"""The report: one self-contained page that shows runs think, made from their folders alone.

`records` reads a run, `story` says what happened, and here is what `page.html` shows of it.
"""

import base64
import contextlib
import functools
import html
import io
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from reward import FLAG, Example
from support import UserError, data, files, settings
from support.report import story
from support.report.records import MODE_NAMES, Row, Run, read_run
from support.thinking import quoted_numbers

POINTS, ANSWERS, KINDS, PAGE_BYTES = 500, 40, 12, 8e6  # at most of each on a page, about
Pictures = dict[str, Callable[[], Any]]  # what opens them, by their address
MARK = '<meta name="runs" content='  # in the head of a page, before the runs that it shows
HELD_OUT, KIND, SWITCH, OTHER = "Held-out rows", "Kinds of question", "Switch", "Optimisation"
CHARTS = (  # section, title, unit, key; axis: of a share from 0 to 1, "top" from the lowest to 1
    (HELD_OUT, "Accuracy", "share right and in the format", "accuracy", "share"),
    (HELD_OUT, "Valid thinking", "share right for the right reasons", "valid_thinking", "share"),
    (HELD_OUT, "Groundedness", "share of quoted numbers that are in the image; the axis does not "
     "start at 0", "groundedness", "top"),
    (HELD_OUT, "New combinations", "share right, of questions that training never asks",
     "accuracy_new", "share"),
    (SWITCH, "Share memorized (Fig. S2)", "prompts, SFT / (SFT + RL)", "memorized", "share"),
    (SWITCH, "Groups without a right response", "share of groups; no collapse of advantages yet, "
     "as long as their r_t differ", "none_correct", "share"),
    (SWITCH, "Groups without variance", "share of groups with all rewards alike: advantages "
     "collapse to 0", "no_variance", "share"),
    ("Rewards", "Training reward (Fig. 4)", "mean of r_a + w_t r_t", "reward", ""),
    ("Rewards", "Training accuracy", "share of responses right, mean r_a", "accuracy", "share"),
    ("Rewards", "Thinking reward", "mean r_t", "reward_thinking", "share"),
    ("Rewards", "In the format", "share of responses, mean r_f", "reward_format", "share"),
    (OTHER, "Entropy", "nats per sampled token", "entropy", ""),
    (OTHER, "Response length", "tokens", "response_length", ""),
    (OTHER, "Truncated", "share of responses cut off by the limit", "truncated", "share"),
    (OTHER, "Gradient norm", "before clipping to 1", "grad_norm", ""),
    (OTHER, "Learning rate", "as used in the step", "lr", ""),
    (OTHER, "KL", "to the reference policy, with --beta", "kl", ""),
    (OTHER, "Step time", "seconds", "seconds", ""))
STEP_KEYS = [key for section, _, _, key, _ in CHARTS if section != HELD_OUT]
SCORES = {"accuracy": "accuracy", "valid_thinking": "valid thinking",
          "thinking_judged": "thinking that rules can judge", "in_format": "in the format",
          "groundedness": "groundedness", "length": "length (tokens)"}


def write_page(argv: list[str]) -> None:
    """Write a page that shows what run folders hold. Raises UserError if none is one."""
    parser = settings.one_line_parser("Write one page about runs: modes, story, curves, answers.")
    parser.prog = "eval.py report"
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, finished or not")
    parser.add_argument("--out", default="", metavar="X", help="the page [report.html]")
    args = parser.parse_args(argv)
    folders, runs, notes = list(dict.fromkeys(map(Path, args.runs))), [], []
    alike = len({folder.name for folder in folders} - {""}) < len(folders)
    for folder in folders:
        try:
            runs.append(read_run(folder, str(folder) if alike else folder.name))
        except UserError as error:
            notes.append(f"left out: {error}")
    if not runs:
        raise UserError("none of these can be shown; " + "; ".join(notes))
    out = Path(args.out or "report.html")
    mark = MARK + f'"{html.escape(ascii(sorted(str(run.folder) for run in runs)))}">'
    check_out(out, mark, asked=bool(args.out))
    constants.HF_HUB_OFFLINE = True  # the page does without pictures that are not on the disk
    text = json.dumps(page_content(runs, notes), separators=(",", ":"), allow_nan=False)
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    # Within a script element only `<` could end it; JSON may write it as an escape.
    text = text.replace("<", "\\u003c")
    files.write_atomically(out, page.replace("DATA", text, 1).replace("RUNS", mark, 1))
    print(*notes, sep="\n", end="\n" * bool(notes), file=sys.stderr)
    print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB); open it in a browser")


def check_out(out: Path, mark: str, asked: bool) -> None:
    """Raise UserError rather than replace what is no page or, unasked, a page of other runs."""
    if out.is_symlink() or not out.is_file():
        return  # what is no file, `write_atomically` does not replace
    text = out.read_text(encoding="utf-8", errors="replace")
    if MARK not in text and (text or out.suffix != ".html"):
        raise UserError(f"--out {out}: holds something other than a report; name another file")
    if MARK in text and mark not in text and not asked:
        raise UserError(f"{out} shows other runs; name another page with --out, or this one")


def page_content(runs: list[Run], notes: list[str]) -> Row:
    """All that the page shows of runs; to `notes` is added what was left out, and why."""
    pictures: Pictures = {}
    shown = [describe_run(run, pictures, ANSWERS // len(runs) + 1) for run in runs]
    stories = [*filter(None, (story.tell(run, shown, i) for i, run in enumerate(runs)))]
    stories.sort(key=lambda told: shown[told["run"]]["mode"] != "dyme")  # the paper's method first
    notes += [f"{run.name}: damaged records are left out: "
              + ", ".join(f"{count} of {file}" for file, count in run.lost.items() if count)
              for run in runs if run.lost.total()]
    content = {"summary": f"Runs: {', '.join(str(run.folder) for run in runs)}", "notes": notes,
               "headline": story.headline(runs), "stories": stories, "charts": charts(runs, shown),
               "table": result_table(runs), "runs": shown}
    return content | {"images": fit(content, pictures)}


@functools.cache
def read_rows(*source: Any) -> dict[str, Example]:
    """A split of data, by the names of its rows; empty if it is not at hand."""
    with contextlib.suppress(Exception):  # of any kind: the page can do without
        return {one.name: one for one in data.load_data(*source)}
    return {}


def look_up(cfg: Row, split: str, row: Row, pictures: Pictures) -> tuple[str | None, str | None]:
    """The visual facts of a row, if it is at hand, and the address of its picture, if any."""
    known = read_rows(cfg["data"], split, cfg["traces"], cfg["augmented"], cfg["hints"])
    example, address = known.get(row["name"]), f"{cfg['data']} {split} {row['name']}"
    if not example or example.question != row["question"]:
        return None, address
    if example.image:
        pictures[address] = example.image
    return example.facts, address if example.image else None


def describe_run(run: Run, pictures: Pictures, most: int) -> Row:
    """What is shown of a run; `switched` of an explored group: when its prompt was memorized."""
    cfg, groups = run.cfg, [describe_group(run.cfg, group, pictures) for group in run.groups]
    memorized: dict[str, Row] = {}
    for group in groups:
        before = memorized.pop(group["name"], None)
        if group["mode"] == "memorization":
            memorized[group["name"]] = group
        elif group["mode"] == "exploration" and before:
            group["switched"], before["first"] = before["step"], True
    kinds = story.hardest_kinds(run.evaluations)[:KINDS]
    held_out = [chart[3] for chart in CHARTS if chart[0] == HELD_OUT]
    # The steps of an epoch, where each step takes as many rows as the others.
    rows = read_rows(cfg["data"], "train", cfg["traces"], cfg["augmented"], cfg["hints"])
    steps = cfg["mode"] in ("dyme", "grpo") and len(rows) / cfg["prompts"]
    compared = "which r_t compares with" if not cfg["helper_rates"] else "r_t is a helper's here"
    return {"name": run.name, "mode": cfg["mode"], "steps": cfg["steps"], "epoch": steps,
            "compared": f"Reference trace, {compared}", "kinds": kinds,
            "weights": [cfg["thinking_weight"], cfg["format_weight"]],
            "groups": groups, "all_groups": len(groups), "answers": answers(run, pictures, most),
            "metrics": columns(run.metrics, STEP_KEYS),
            "evaluations": columns(run.evaluations, held_out + [f"accuracy_{k}" for k in kinds])}


def describe_group(cfg: Row, group: Row, pictures: Pictures) -> Row:
    """A row of `samples.jsonl`, with its texts marked, and what the story says of it."""
    known = (group["facts"], group["question"])
    group = group | {
        "responses": [r | {"text": mark(r["text"], *known)} for r in group["responses"]],
        "trace": mark(group["trace"], *known), "target": mark(group["target"], *known),
        "image": look_up(cfg, "train", group, pictures)[1]}
    return group | {"why": story.explain_mode(cfg, group), "remarks": story.remarks(cfg, group),
                    "equations": story.equations(cfg, group), "telling": story.telling(group)}


def mark(text: str | None, facts: str | None, question: str) -> list[list[str]]:
    """A text in parts: (text, kind); kind is yes or no for numbers of its thinking, true or not."""
    text, parts, end = text or "", [], 0
    thinking = re.split(re.escape(FLAG), text, flags=re.IGNORECASE)[0]
    for start, stop, grounded in quoted_numbers(thinking, facts, question) if facts else ():
        kind = {True: "yes", False: "no", None: ""}[grounded]  # None: not judged
        parts += [[text[end:start], ""], [text[start:stop], kind]]
        end = stop
    return [part for part in [*parts, [text[end:], ""]] if part[0]]


def answers(run: Run, pictures: Pictures, most: int) -> list[Row]:
    """At most so many held-out responses, of the base and of the end; those that changed first."""
    base = {row["name"]: row for row in run.before}
    pairs = [(base[row["name"]], row) for row in run.after if row["name"] in base]
    changed = [(old, new) for old, new in pairs if old["accuracy"] != new["accuracy"]]
    alike = [(old, new) for old, new in pairs if old["accuracy"] == new["accuracy"]]
    changed = data.spread(changed, most * 3 // 4 + 1)
    found = []
    for pair in changed + data.spread(alike, most - len(changed)):
        facts, image = look_up(run.cfg, "val", pair[1], pictures)
        cells = [{"text": mark(row["response"][:3000], facts, row["question"]),
                  "r_a": row["accuracy"], "r_f": row["in_format"], "finished": row["finished"],
                  "fault": row["thinking_fault"]} for row in pair]
        about = {key: pair[1][key] for key in ("question", "answer", "source")}
        found.append(about | {"image": image, "cells": cells})
    return found


def columns(found: list[Row], keys: list[str]) -> Row:
    """Rows as columns, for keys that any of them has: at most POINTS means over neighbours."""
    size = max(1, math.ceil(len(found) / POINTS))
    parts = [found[i:i + size] for i in range(0, len(found), size)]
    table: Row = {"step": [part[-1]["step"] for part in parts]}
    for key in keys:
        known = [[row[key] for row in part if key in row] for part in parts]
        if any(known):
            table[key] = [float(f"{sum(v) / len(v):.6g}") if v else None for v in known]
    return table


def charts(runs: list[Run], shown: list[Row]) -> list[Row]:
    """The charts that have values, one for each kind of question; none twice of one run."""
    kinds = dict.fromkeys(kind for one in shown for kind in one["kinds"])
    by_kind = [(KIND, f"Accuracy: {kind}", "of held-out rows", f"accuracy_{kind}", "share")
               for kind in kinds]
    with_format, found, seen = any(run.cfg["format_weight"] for run in runs), [], []
    for section, title, unit, key, axis in [*CHARTS[:4], *by_kind, *CHARTS[4:]]:
        evaluated = section in (HELD_OUT, KIND)
        curves = [one["evaluations" if evaluated else "metrics"].get(key, []) for one in shown]
        values = {value for curve in curves for value in curve if value is not None}
        unused = key == "kl" or (key == "reward_format" and not with_format)
        twin = len(runs) == 1 and not evaluated and curves in seen
        if not values or twin or (unused and len(values) == 1):
            continue
        seen.append(curves)
        unit += " + w_f r_f" if key == "reward" and with_format else ""
        found.append({"section": section, "title": title, "unit": unit, "key": key, "axis": axis,
                      "evaluated": evaluated, "relative": False})
        if "(Fig." in title and len(runs) > 1:  # whose starts differ
            found.append(found[-1] | {"title": f"{title}, relative", "axis": "", "relative": True,
                                      "unit": "to the mean of the first 10 steps"})
    return found


def result_table(runs: list[Run]) -> Row:
    """Last evaluation and time of each run."""
    last = [run.evaluations[-1] if run.evaluations else {} for run in runs]
    keys = [key for key in SCORES
            if key != "thinking_judged" or any(row.get(key, 1) < 1 for row in last)]
    table = []
    for run, row in zip(runs, last, strict=True):
        minutes = sum(step["seconds"] for step in run.metrics) / 60
        counts = [run.cfg["seed"], len(run.metrics), row.get("step", "–"), row.get("rows", "–")]
        table.append([run.name, *map(row.get, keys), minutes, MODE_NAMES[run.cfg["mode"]],
                      *map(str, counts)])
    return {"columns": ["run", *(SCORES[key] for key in keys), "minutes in steps", "trained by",
                        "seed", "steps", "evaluated at step", "rows evaluated"], "rows": table}


def fit(content: Row, pictures: Pictures) -> dict[str, str]:
    """Keep of the runs' groups those that fit on the page; their pictures as data URLs."""
    shown, golden = content["runs"], (math.sqrt(5) - 1) / 2
    told = {(one["run"], one["name"]) for one in content["stories"]}
    # The runs in turns; of each, groups of its story, those of a switch, then others all over it.
    order = sorted(((n, group["name"]) not in told, not group.keys() & {"switched", "first"},
                    i * golden % 1 * len(one["groups"]), n, i)
                   for n, one in enumerate(shown) for i, group in enumerate(one["groups"]))
    wanted = [row for one in shown for row in one["answers"]]
    wanted += [shown[n]["groups"][i] for *_, n, i in order]
    images, budget, kept = {}, PAGE_BYTES, set()
    for row in wanted:
        if budget < 0:
            break
        budget -= len(json.dumps(row))
        kept.add(id(row))
        address = row["image"]
        if address in pictures and address not in images:
            with contextlib.suppress(UserError, OSError):
                file, image = io.BytesIO(), pictures[address]()
                image.thumbnail((480, 480))
                kind = "png" if max(image.size) <= 128 else "jpeg"
                image.convert("RGB").save(file, kind, optimize=True)
                text = base64.b64encode(file.getvalue()).decode()
                images[address] = f"data:image/{kind};base64,{text}"
                budget -= len(text)
    for one in shown:
        one["groups"] = [group for group in one["groups"] if id(group) in kept]
    return images
