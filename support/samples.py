"""One group of every step in full, for `samples.jsonl`: what the report shows and a person reads."""

import zlib
from typing import Any

MODES = {(True, False): "exploration", (False, True): "memorization", (True, True): "both"}


def describe(step: int, done: Any, tokenizer: Any) -> dict[str, Any]:
    """The row of a step (`dyme.Step`): one of its prompts, its responses with their rewards, its target."""
    # The prompt of least hash is taken, so that many prompts return in each epoch.
    names = [example.name for example in done.examples]
    p = min(range(len(names)), key=lambda i: zlib.crc32(names[i].encode()))
    example = done.examples[p]

    targets = [s.ids for s in done.sequences if s.prompt == p and not s.explore]
    target = None
    if targets:
        target = tokenizer.decode(targets[0], skip_special_tokens=True).strip()
    # Neither explored nor memorized: it waits in the buffer of `--switch budget`.
    mode = MODES.get((bool(done.explore[p]), bool(targets)), "buffered")
    return {"step": step, "name": example.name, "question": example.question, "answer": example.answer,
            "facts": example.facts, "mode": mode, "target": target, "responses": _responses(done, p)}


def _responses(done: Any, p: int) -> list[dict[str, Any]]:
    """Text, rewards and advantage of each response to prompt `p`; none in SFT."""
    if done.groups is None:
        return []
    parts = {"r_a": done.groups.correct, "r_t": done.groups.thinking, "r_f": done.groups.in_format,
             "reward": done.groups.rewards, "advantage": done.advantages}
    rows = []
    for k, response in enumerate(done.groups.responses[p]):
        row = {"text": response.text, "finished": response.finished}
        for name, values in parts.items():
            row[name] = round(values[p, k].item(), 4)
        rows.append(row)
    return rows
