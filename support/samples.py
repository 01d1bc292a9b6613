"""Groups of a step in full, for `samples.jsonl`: what the report shows and a person reads."""

import zlib
from typing import Any

MODES = {(True, False): "exploration", (False, True): "memorization", (True, True): "both"}
FOLLOWED = 2**32 // 32  # hashes below: one prompt in 32 is kept whenever it returns, so that it has a history


def describe(done: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """Rows of a step (`dyme.Step`): the prompts that are followed, or one; responses, rewards, trace, target."""
    # Chosen by a hash of the name, not at random: prompts return in each epoch, and every run keeps the same.
    hashes = [zlib.crc32(example.name.encode()) for example in done.examples]
    kept = [p for p, value in enumerate(hashes) if value < FOLLOWED]
    return [_group(done, tokenizer, p) for p in kept or [hashes.index(min(hashes))]]


def _group(done: Any, tokenizer: Any, p: int) -> dict[str, Any]:
    """The row of prompt `p`: its `trace` is the reference that r_t compares with, its `target` what was imitated."""
    example = done.examples[p]
    targets = [s.ids for s in done.sequences if s.prompt == p and not s.explore]
    target = None
    if targets:
        target = tokenizer.decode(targets[0], skip_special_tokens=True).strip()
    # Neither explored nor memorized: it waits in the buffer of `--switch budget`.
    mode = MODES.get((bool(done.explore[p]), bool(targets)), "buffered")
    return {"step": done.step, "name": example.name, "source": example.source, "question": example.question,
            "answer": example.answer, "facts": example.facts, "mode": mode, "trace": example.trace,
            "target": target, "responses": _responses(done, p)}


def _responses(done: Any, p: int) -> list[dict[str, Any]]:
    """Text, rewards and advantage of each response to prompt `p`; none in SFT."""
    if not done.responses:
        return []
    parts = {"r_a": done.r_a, "r_t": done.r_t, "reward": done.rewards, "advantage": done.advantages}
    rows = []
    for k, response in enumerate(done.responses[p]):
        row = {"text": response.text, "finished": response.finished, "r_f": float(response.in_format)}
        for name, values in parts.items():
            row[name] = round(values[p, k].item(), 4)
        rows.append(row)
    return rows
