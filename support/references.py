"""Reference traces: those of the release joined to rows, and which cannot be imitated as they are."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import reward
from reward import Example
from support import UserError, parallel, rows


@dataclass(frozen=True)
class Trace:
    """A row of a trace file, but for its question and answer."""

    trace: str
    facts: str | None  # A-OKVQA's `visual_fact`


def read(file: str) -> dict[tuple[str, str], set[Trace]]:
    """Read a trace file of the DyME release as {(question, answer): traces}. Raises UserError."""
    traces: dict[tuple[str, str], set[Trace]] = {}
    for i, row in enumerate(rows.parse_rows(Path(file)), 1):
        try:
            # GSM8K's marks for a calculator, and its answer line.
            hint = re.sub(r"<<.*?>>", "", row["hint"] or "").partition("####")[0].strip()
            facts = row.get("visual_fact")
            trace = Trace(hint, facts if isinstance(facts, str) and facts else None)
            if hint:
                traces.setdefault(key(row["question"], str(row["answer"])), set()).add(trace)
        except (TypeError, KeyError, AttributeError) as error:
            raise UserError(f"--hints {file} row {i}: is not {{question, answer, hint}} ({error!r})") from None
    return traces


def key(question: str, answer: str) -> tuple[str, str]:
    """What a row and its trace have in common: formatting apart, question and answer."""
    return question.strip(), reward.plain(answer).replace(",", "")


def join(examples: list[Example], file: str) -> list[Example]:
    """The rows that have a trace in a file, with it (Table S1: the paper trains on these). Raises UserError.

    Of several traces for one question and answer, a row takes the one that it has itself, or none: the files
    do not say which image they belong to.
    """
    traces = read(file)
    joined = []
    for example in examples:
        found = traces.get(key(example.question, example.answer), set())
        if len(found) > 1:
            found = {trace for trace in found if trace.trace == (example.trace or "").strip()}
        if len(found) == 1:
            trace = next(iter(found))
            joined.append(replace(example, trace=trace.trace, facts=trace.facts or example.facts))
    if not joined:
        raise UserError(f"--hints {file}: has no trace for any row of --data (nor question and answer alike)")
    if parallel.is_main():
        print(f"--hints {file}: {len(joined)} training rows have a trace; the other {len(examples) - len(joined)} "
              "are left out")
    return joined


def check(examples: list[Example], policy: Any, length: Callable[[Example], int]) -> list[Example]:
    """The rows, less traces too long to imitate; says which, and what holds a flag or an end token.

    `length` is that of a row's prompt and reference in tokens.
    """
    ends = [policy.tokenizer.decode([token]) for token in policy.end_ids]
    limit = getattr(policy.model.config.get_text_config(), "max_position_embeddings", 1e9)
    kept, notes = [], {}
    for example in examples:
        texts = f"{example.trace or ''}\n{example.answer}".lower()
        for mark in filter(str.strip, (reward.FLAG, *ends)):
            if mark.lower() in texts:
                what = f"hold {mark!r} in hint or answer, which ends a trace or a response early"
                notes.setdefault(what, []).append(example.name)
        # To measure takes time, and few traces have more bytes than half of a context has tokens.
        if len((example.trace or "").encode()) > limit / 2 and length(example) > limit:
            what = f"have a trace that the context of {limit} tokens cannot hold, and keep their answer line alone"
            notes.setdefault(what, []).append(example.name)
            example = replace(example, trace=None)
        kept.append(example)
    for what, names in notes.items():
        if parallel.is_main():
            print(f"warning: {len(names)} training rows {what}; the first is {names[0]}")
    return kept
