"""How held-out responses are judged, and their averages."""

from typing import Any

import reward
from reward import Example


def judge(example: Example, response: str, finished: bool) -> dict[str, Any]:
    """Judge a held-out response.

    *accuracy* wants the format, *official* takes whatever stands last, *any_format* the last word or number.
    What needs visual facts is None without them.
    """
    verdict = reward.verify(response, example, finished, tolerance=0.05)
    answer, (thinking, _) = reward.final_answer(response), reward.split_response(response)
    scores = {name: score(answer) for name, score in example.scores.items()}
    official = scores.pop("official", reward.relaxed_match(answer, example.answer.rstrip(". ")))
    grounded, quoted = reward.groundedness(thinking, example.facts or "", example.question)
    fault = reward.thinking_fault(response, example) if example.facts else None
    return {"name": example.name, "source": example.source, "question": example.question,
            "answer": example.answer, "response": response, "parsed": verdict.answer,
            "accuracy": verdict.correct, "official": official, "scores": scores,
            "any_format": verdict.correct or reward.ends_in(response, example.answer),
            "in_format": verdict.in_format, "finished": finished,
            "thinking_fault": fault,
            "valid_thinking": None if fault is None else verdict.correct and not fault,
            "grounded_numbers": grounded if example.facts else 0,
            "quoted_numbers": quoted if example.facts else 0}


# The published scores of ChartQA and SLAKE are means over these parts, not over rows.
PARTS = ({"human", "augmented"}, {"open", "closed"})


def summarise(predictions: list[dict[str, Any]]) -> dict[str, float | None]:
    """Average judged responses, over all and by source (kinds of question, or parts of the data)."""

    def mean(key: str, rows: list[dict[str, Any]]) -> float | None:
        values = [row[key] for row in rows if row[key] is not None]
        return sum(values) / len(values) if values else None

    sources: dict[str, list[dict[str, Any]]] = {}
    for row in predictions:
        sources.setdefault(row["source"], []).append(row)
    summary = {key: mean(key, predictions) for key in ("accuracy", "any_format", "official")}
    if any(sources.keys() <= part for part in PARTS):
        by_part = {f"official_{name}": mean("official", rows) for name, rows in sorted(sources.items())}
        summary["official"] = sum(by_part.values()) / len(by_part)
        summary |= by_part if len(by_part) > 1 else {}
    # A data set's own, such as multiple_choice; rows without choices have no such score.
    for name in dict.fromkeys(name for row in predictions for name in row["scores"]):
        summary[name] = mean(name, [row["scores"] for row in predictions if name in row["scores"]])
    for key in ("valid_thinking", "in_format", "finished", "length"):
        summary[key] = mean(key, predictions)
    quoted = sum(row["quoted_numbers"] for row in predictions)
    grounded = sum(row["grounded_numbers"] for row in predictions)
    summary["groundedness"] = grounded / quoted if quoted else None
    if len(sources) > 1:
        for name, rows in sources.items():
            summary[f"accuracy_{name}"] = mean("accuracy", rows)
            summary[f"any_format_{name}"] = mean("any_format", rows)
    return summary | {"rows": len(predictions)}


def one_line(summary: dict[str, Any]) -> str:
    """The averages that matter most, as text."""
    text = f"held-out accuracy {summary['accuracy']:.3f}"
    if summary["valid_thinking"] is not None:
        text += f", with valid thinking {summary['valid_thinking']:.3f}"
    return f"{text}, answers in the format {summary['in_format']:.3f}"
