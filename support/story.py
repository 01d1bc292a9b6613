"""One prompt's way through a run, told from the run's own records: the story at the top of the report."""

from typing import Any

MODE_NAMES = {"dyme": "DyME", "grpo": "GRPO", "sft": "SFT", "two-stage": "SFT, then GRPO"}
Group = dict[str, Any]  # a row of samples.jsonl, as `report.describe_group` returns it


# ---- What happened, in a sentence ----------------------------------------------------------------


def headline(shown: list[dict[str, Any]]) -> str:
    """Say what happened in runs (of `report.describe_run`): from where to where, and which kind was hardest."""
    done = [run for run in shown if len(run["rows"]) > 1 and run["rows"][-1].get("accuracy") is not None]
    if not done:
        return "No run has been evaluated after its start yet."
    done.sort(key=lambda run: -run["rows"][-1]["accuracy"])
    best, lowest = done[0], done[-1]
    kind = next(iter(hardest_kinds(best["rows"])), None)
    first, last = best["rows"][0], best["rows"][-1]
    text = (f"In {last['step']} steps of {MODE_NAMES[best['mode']]}, accuracy on held-out questions went from "
            f"{first['accuracy']:.2f} to {last['accuracy']:.2f}")
    if best is not lowest:
        text = f"Of {len(done)} runs, {best['name']} ends highest: " + text[0].lower() + text[1:]
        text += f" (lowest: {lowest['name']}, {lowest['rows'][-1]['accuracy']:.2f})"
    if kind:
        key = f"accuracy_{kind}"
        text += f"; on “{kind}”, where its base was worst, from {first[key]:.2f} to {last[key]:.2f}"
        if best is not lowest and lowest["rows"][-1].get(key) is not None:
            text += f" ({lowest['name']}: {lowest['rows'][-1][key]:.2f})"
    text += "."
    if first.get("any_format") is not None and first["any_format"] - first["accuracy"] > 0.01:
        text += f" (Counting the last word of whatever it says, the base was right in {first['any_format']:.2f}.)"
    if last.get("valid_thinking") is not None:
        text += f" Right with valid thinking: {last['valid_thinking']:.2f}."
    return f"{text} {memorizing(best)}".strip()


def memorizing(run: dict[str, Any]) -> str:
    """How the share memorized changed, of a run that switches."""
    shares = [share for share in run["metrics"].get("memorized", []) if share is not None]
    if run["mode"] != "dyme" or not shares:
        return ""
    tenth = max(1, len(shares) // 10)
    first, last = (sum(part) / tenth for part in (shares[:tenth], shares[-tenth:]))
    return f"The share of prompts memorized went from {first:.2f} (first tenth of the run) to {last:.2f} (last tenth)."


def hardest_kinds(evaluations: list[dict[str, Any]]) -> list[str]:
    """The kinds of question (sources), the one that the base was worst at first."""
    first = evaluations[0] if evaluations else {}
    kinds = [key.removeprefix("accuracy_") for key, value in first.items()
             if key.startswith("accuracy_") and value is not None]
    # In any format, where that is known: a base may be wrong in its form alone.
    return sorted(kinds, key=lambda kind: first.get(f"any_format_{kind}", first[f"accuracy_{kind}"]))


# ---- The prompt ----------------------------------------------------------------------------------


def right(group: Group) -> int:
    """How many responses of a group are right."""
    return sum(response["r_a"] > 0 for response in group["responses"])


def choose_prompt(groups: list[Group], kinds: list[str], switches: bool) -> tuple[list[Group], str]:
    """The visits to the prompt that shows a run best, and how it was chosen; no visits if no prompt came back.

    Of the hardest kind at hand, and in a run that `switches` one that was explored after all.
    """
    visits: dict[str, list[Group]] = {}
    for group in groups:
        if group["responses"]:
            visits.setdefault(group["name"], []).append(group)
    again = [seen for seen in visits.values() if len(seen) > 1 and not right(seen[0])]
    if not again:
        return [], ""
    rank = {kind: i for i, kind in enumerate(kinds)}

    def order(seen: list[Group]) -> tuple[Any, ...]:
        explored = first_exploration(seen)
        return (switches and explored is None, rank.get(seen[0]["source"], len(rank)), -len(seen), -right(seen[-1]),
                right(explored) if explored else 0, seen[0]["step"])

    chosen = min(again, key=order)
    like = [seen for seen in again if seen[0]["source"] == chosen[0]["source"]]
    later = sum(first_exploration(seen) is not None for seen in like)
    kind = f" of the kind “{chosen[0]['source']}”" if chosen[0]["source"] else ""
    return chosen, (
        f"One prompt is no proof. Kept prompts{kind} that had no right response at the first visit and came back: "
        f"{len(like)}. Of these, later explored with a right response: {later}. Shown is the one of "
        f"{'the latter' if switches and later else 'them'} with the most visits, and among equals with the most right "
        "responses at the last.")


def first_exploration(visits: list[Group]) -> Group | None:
    """The first visit that explores with a right response."""
    return next((group for group in visits if group["mode"] in ("exploration", "both") and right(group)), None)


# ---- The telling ---------------------------------------------------------------------------------


def tell(cfg: dict[str, Any], groups: list[Group], evaluations: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The story of a run's prompt: title, lead, chapters, closing; None if no prompt came back."""
    kinds = hardest_kinds(evaluations)
    visits, choice = choose_prompt(groups, kinds, cfg["mode"] == "dyme")
    if not visits:
        return None
    chapters: list[dict[str, Any]] = []
    for group in worth_telling(visits):
        chapters += tell_visit(cfg, group, visits)
    for number, chapter in enumerate(chapters, 1):
        chapter["title"] = f"{number}. {chapter['title']}"
    kind, closing = visits[0]["source"], [choice]
    curve = [(row["step"], row[f"accuracy_{kind}"]) for row in evaluations if row.get(f"accuracy_{kind}") is not None]
    if len(curve) > 1:
        values = ", ".join(f"{value:.2f} at step {step}" for step, value in curve)
        closing.insert(0, f"Accuracy on held-out questions of this kind, in the course of the run: {values}.")
    return {"name": visits[0]["name"], "title": title(visits), "lead": lead(cfg, visits, evaluations),
            "visits": [{"step": group["step"], "mode": group["mode"], "right": right(group), "of": len(group["responses"])}
                       for group in visits],
            "curve": {"step": [step for step, _ in curve], "value": [value for _, value in curve]}, "kind": kind,
            "chapters": chapters, "closing": closing}


def title(visits: list[Group]) -> str:
    """The question and what became of it."""
    first, last = visits[0], visits[-1]
    return (f"“{visits[0]['question'][:200]}”: {right(first) or 'none'} of {len(first['responses'])} right at step "
            f"{first['step']}, {right(last) or 'none'} of {len(last['responses'])} at step {last['step']}")


def lead(cfg: dict[str, Any], visits: list[Group], evaluations: list[dict[str, Any]]) -> str:
    """What a reader must know before the first visit."""
    group, kinds = visits[0], hardest_kinds(evaluations)
    text = ""
    if group["source"] in kinds:
        base = evaluations[0]
        value = base.get(f"any_format_{group['source']}", base[f"accuracy_{group['source']}"])
        place = kinds.index(group["source"]) + 1
        hard = "the hardest" if place == 1 else f"number {place} by difficulty"
        text = (f"Of {len(kinds)} kinds of question, “{group['source']}” was {hard} for the base: {value:.2f} of the "
                "held-out ones right, whatever the form of the answer. ")
    thinking = "how much of the thinking is in a reference trace"
    if helper_rates(cfg):
        thinking = "how a helper rates the thinking"
    rule = "All are compared with each other in any case."
    if by_eq_6(cfg):
        rule = ("If any is right, they are compared with each other: exploration. If none is, the reference trace is "
                "imitated in their place: memorization.")
    elif cfg["mode"] == "dyme":
        rule = f"Which prompts are explored and which memorized is decided by --switch {cfg['switch']}."
    return text + ("Here is what training did with one prompt. At each visit the model samples "
                   f"{len(group['responses'])} responses. Rules say whether the answer is right (r_a, 1 or 0); r_t, from "
                   f"0 to 1, says {thinking}. {rule}")


def worth_telling(visits: list[Group]) -> list[Group]:
    """The first visit, the first exploration with a right response, and the last."""
    chosen = [visits[0], first_exploration(visits), visits[-1]]
    return [group for group in visits if any(group is one for one in chosen)]


def tell_visit(cfg: dict[str, Any], group: Group, visits: list[Group]) -> list[dict[str, Any]]:
    """The chapters of a visit: what was sampled, what decided, and what was imitated if anything was."""
    count, of = right(group), len(group["responses"])
    place = next(i for i, visit in enumerate(visits) if visit is group)
    if place == 0:
        text = f"The first visit on record. {faults(group)}"
        heading = "the first visit"
    else:
        since = group["step"] - visits[place - 1]["step"]
        text = f"{since} steps after the last visit the question is back. {faults(group)}"
        heading = "the last visit" if group is visits[-1] else "back again"
        if group is first_exploration(visits):
            heading = "the first right answer" if count == 1 else "the first right answers"
            text = between(visits[:place]) + text
    explored = group["mode"] in ("exploration", "both")
    chapter = {"title": f"Step {group['step']}: {heading}, {count or 'none'} of {of} right", "step": group["step"],
               "before": [text], "shown": shown(group), "decision": group["why"],
               "equations": [{"kind": "switch"}] if by_eq_6(cfg) else [], "part": "", "after": [], "aside": []}
    if explored:
        chapter["equations"] += advantages_by_eq_2(group)
        chapter["after"] = compared(group)
        chapter["part"], chapter["aside"] = ("trace", what_the_trace_says(cfg, group)) if group["trace"] else ("", [])
    else:
        chapter["after"] = tempting(cfg, group)
    return [chapter] + ([imitated(cfg, group)] if group["target"] else [])


def by_eq_6(cfg: dict[str, Any]) -> bool:
    """Does the paper's rule switch this run?"""
    return cfg["mode"] == "dyme" and cfg["switch"] == "any-correct"


def helper_rates(cfg: dict[str, Any]) -> bool:
    """Does a helper give r_t, in place of the comparison with a trace?"""
    return bool(cfg["helper_url"]) and not cfg["no_checker"]


def faults(group: Group) -> str:
    """How the responses of a group fail."""
    count, of = right(group), len(group["responses"])
    wrong = [r for r in group["responses"] if not r["r_a"] > 0]
    if not wrong:
        return f"Now all {of} responses are right."
    kinds = [(sum(not r["finished"] for r in wrong), "cut off"),
             (sum(r["finished"] and not r["r_f"] > 0 for r in wrong), "not in the format (one “Answer:” and no more)"),
             (sum(bool(r["finished"] and r["r_f"] > 0) for r in wrong), "wrong in the answer")]
    parts = ", ".join(f"{number} {'is' if number == 1 else 'are'} {words}" for number, words in kinds if number)
    return f"Of {of} responses {count or 'none'} {'is' if count < 2 else 'are'} right; {parts}."


def between(visits: list[Group]) -> str:
    """The visits that are left out between two chapters."""
    steps = [str(group["step"]) for group in visits[1:]]
    if not steps:
        return ""
    return f"Before, at step{'s' if len(steps) > 1 else ''} {' and '.join(steps)}, none was right again. "


def tempting(cfg: dict[str, Any], group: Group) -> list[str]:
    """What would have won, had a group without a right response been explored."""
    advantages = [response["advantage"] for response in group["responses"]]
    if right(group) or not any(advantages):
        return []
    k = advantages.index(max(advantages))
    text = (f"Had they been compared all the same, y{k + 1} would have won, with an advantage of "
            f"{signed(advantages[k])}, though it is wrong.")
    return [f"{text} That is why the switch looks at right answers only." if by_eq_6(cfg) else text]


def imitated(cfg: dict[str, Any], group: Group) -> dict[str, Any]:
    """The chapter on a group's target."""
    wrong = misread(group, group["target"])
    text = []
    if group["facts"]:
        text = ["All numbers in its thinking are in the image, or follow from such." if not wrong else
                f"Its answer is the true one, but its thinking says {listed(wrong)}, which the visual facts do not: "
                "what is imitated here is pseudo thinking."]
    return {"title": "Same step: the reference is imitated", "step": group["step"], "before": [], "shown": [],
            "decision": "", "part": "target", "after": text, "aside": [],
            "equations": [{"kind": "imitate", "prompts": cfg["prompts"]}] if cfg["mode"] == "dyme" else []}


def compared(group: Group) -> list[str]:
    """Which of the right responses rest on the image, and which response is pushed where."""
    text, responses = [], group["responses"]
    advantages = [response["advantage"] for response in responses]
    if any(advantages):
        up, down = advantages.index(max(advantages)), advantages.index(min(advantages))
        text.append(f"y{up + 1} is pushed up most ({signed(advantages[up])}), y{down + 1} down most "
                    f"({signed(advantages[down])}).")
    sound = [response for response in responses if response["r_a"] > 0]
    if any(advantages) and len(sound) == len(responses):
        text.append("As all are right, only their thinking tells them apart.")
    if group["facts"] and sound:
        grounded = sum(not ungrounded(response["text"]) for response in sound)
        text.append("Right responses that quote only what is in the image or follows from it: "
                    f"{grounded} of {len(sound)}.")
    return text


def what_the_trace_says(cfg: dict[str, Any], group: Group) -> list[str]:
    """Whether the trace that r_t compares with is itself in the image."""
    wrong = misread(group, group["trace"])
    if not (wrong and cfg["thinking_weight"]) or helper_rates(cfg):
        return []
    text = f"This trace itself says {listed(wrong)}, which the visual facts do not; r_t goes by it all the same."
    if by_eq_6(cfg):
        text += " r_a, and so the switch, does not look at it."
    sound = [response for response in group["responses"] if response["r_a"] > 0]
    taken = sum(bool({*wrong} & {*ungrounded(response["text"])}) for response in sound)
    return [f"{text} Right responses that repeat such a number: {taken} of {len(sound)}."] if sound else [text]


def advantages_by_eq_2(group: Group) -> list[dict[str, Any]]:
    """The numbers of Eq. 2 for the response of most advantage, or why all are 0; nothing if another rule was used."""
    rewards = [response["reward"] for response in group["responses"]]
    advantages = [response["advantage"] for response in group["responses"]]
    if not any(advantages):
        return [{"kind": "alike", "reward": rewards[0]}] if len({*rewards}) == 1 else []
    mean = sum(rewards) / len(rewards)
    deviation = (sum((reward - mean) ** 2 for reward in rewards) / len(rewards)) ** 0.5
    k = advantages.index(max(advantages))
    # Rewards are kept to four digits, which a small deviation magnifies; --released-code has other advantages.
    if abs((rewards[k] - mean) / (deviation + 1e-4) - advantages[k]) > 0.02:
        return []
    return [{"kind": "advantage", "k": k, "reward": rewards[k], "mean": mean, "deviation": deviation,
             "advantage": advantages[k]}]


def shown(group: Group) -> list[int]:
    """Up to three responses that tell most: the best and the worst, and one right, or in the format."""
    responses = group["responses"]
    order = sorted(range(len(responses)), key=lambda k: -responses[k]["reward"])
    chosen: dict[str, int] = {}  # by text: alike responses are told once
    middle = [k for k in order[1:-1] if responses[k]["r_a"] > 0] or [k for k in order[1:-1] if responses[k]["r_f"] > 0]
    for k in [order[0], order[-1], *middle]:
        chosen.setdefault("".join(text for text, _ in responses[k]["text"]), k)
    return sorted([*chosen.values()][:3])


def ungrounded(parts: list[list[str]]) -> list[str]:
    """The numbers of a marked text that are not in the image."""
    return list(dict.fromkeys(text for text, kind in parts if kind == "no"))


def misread(group: Group, parts: list[list[str]]) -> list[str]:
    """What a trace says that is not in the image; its result, the true answer, only if it is all there is."""
    wrong = ungrounded(parts)
    return [text for text in wrong if text != group["answer"]] or wrong


def listed(words: list[str]) -> str:
    """Words as a list: a, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def signed(value: float) -> str:
    """A number with its sign."""
    return f"{value:+.2f}".replace("-", "−")


def elsewhere(name: str, shown: list[dict[str, Any]], teller: dict[str, Any]) -> list[str]:
    """What the other runs on the same data made of a prompt."""
    lines = []
    for run in shown:
        visits = [group for group in run["groups"] if group["name"] == name]
        if run is not teller and run["data"] == teller["data"] and visits:
            seen = []
            for group in visits:
                result = f", {right(group)} of {len(group['responses'])} right" if group["responses"] else ""
                seen.append(f"step {group['step']}{result}, {group['mode']}")
            lines.append(f"{run['name']} ({MODE_NAMES[run['mode']]}): {'; '.join(seen)}.")
    return lines
