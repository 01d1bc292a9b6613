"""How held-out responses are judged, and their averages."""

from typing import Any

import reward
from reward import Example


def judge(example: Example, response: str, finished: bool) -> dict[str, Any]:
    """Judge a held-out response: *strict* wants the format, *official* takes whatever stands last."""
    verdict = reward.verify(response, example, finished, tolerance=0.05)
    answer, (thinking, _) = reward.final_answer(response), reward.split_response(response)
    scores = {name: score(answer) for name, score in example.scores.items()}
    official = scores.pop("official", reward.relaxed_match(answer, example.answer))
    grounded, quoted = reward.groundedness(thinking, example.facts or "", example.question)
    if not example.facts:  # nothing to tell grounded numbers by
        grounded, quoted = 0, 0
    return {"name": example.name, "source": example.source, "question": example.question,
            "answer": example.answer, "response": response, "parsed": verdict.answer,
            "strict": verdict.correct, "official": official, "scores": scores,
            "in_format": verdict.in_format, "finished": finished,
            "grounded_numbers": grounded, "quoted_numbers": quoted}


def summarise(predictions: list[dict[str, Any]]) -> dict[str, float | None]:
    """Average judged responses; `official` is the mean over sources (ChartQA: human and augmented)."""

    def mean(key: str, rows: list[dict[str, Any]]) -> float:
        return sum(row[key] for row in rows) / len(rows)

    summary = {"strict": mean("strict", predictions)}
    sources = sorted({row["source"] for row in predictions})
    by_source = {f"official_{source}": mean("official", [p for p in predictions if p["source"] == source])
                 for source in sources}
    summary["official"] = sum(by_source.values()) / len(sources)
    if len(sources) > 1:
        summary |= by_source
    for name in predictions[0]["scores"]:  # a data set's own, such as multiple_choice
        summary[name] = mean(name, [row["scores"] for row in predictions])
    for key in ("in_format", "finished", "length"):
        summary[key] = mean(key, predictions)
    quoted = sum(row["quoted_numbers"] for row in predictions)
    grounded = sum(row["grounded_numbers"] for row in predictions)
    return summary | {"groundedness": grounded / quoted if quoted else None, "rows": len(predictions)}
