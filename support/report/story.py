"""What happened in runs, told from their records: in a sentence, and by one prompt's visits."""

from support.report.records import MODE_NAMES, Row, Run


def headline(runs: list[Run]) -> str:
    """Say how far the best run came, and how on the kind of question that its base was worst at."""
    scored = [(run, [row for row in run.evaluations if "accuracy" in row]) for run in runs]
    done = sorted((x for x in scored if len(x[1]) > 1), key=lambda x: -x[1][-1]["accuracy"])
    if not done:
        return "No run has been evaluated after its start yet."
    (best, rows), (lowest, others) = done[0], done[-1]
    first, last = rows[0], rows[-1]
    text = (f"n {last['step']} steps of {MODE_NAMES[best.cfg['mode']]}, accuracy on held-out rows "
            + moved(first["accuracy"], last["accuracy"]))
    end, least = f"{last['accuracy']:.2f}", f"{others[-1]['accuracy']:.2f}"
    text = f"I{text}" if best is lowest else (
        f"All {len(done)} runs end alike; {best.name}: i{text}" if end == least else
        f"Of {len(done)} runs, {best.name} ends highest: i{text} (lowest: {lowest.name}, {least})")
    for kind in hardest_kinds(rows)[:1]:
        if (key := f"accuracy_{kind}") in last:
            text += f"; on “{kind}”, where its base was worst, it {moved(first[key], last[key])}"
    text += "."
    if first.get("any_format", 0) - first["accuracy"] > 0.01:
        text += (" (Counting the last word of whatever it responds, the base was right in "
                 f"{first['any_format']:.2f}.)")
    if "valid_thinking" in last:
        text += f" Right with valid thinking: {last['valid_thinking']:.2f}."
    if last.get("thinking_judged", 1) < 1:
        text += f" Rules can judge the thinking of {last['thinking_judged']:.2f}."
    shares = [row["memorized"] for row in best.metrics if "memorized" in row]
    if best.cfg["mode"] == "dyme" and shares:
        tenth = max(1, len(shares) // 10)
        means = [sum(part) / tenth for part in (shares[:tenth], shares[-tenth:])]
        text += f" The share of prompts memorized {moved(*means)} (first and last tenth)."
    return text


def moved(first: float, last: float) -> str:
    """From where to where a share went, to two digits."""
    old, new = f"{first:.2f}", f"{last:.2f}"
    return f"stayed at {new}" if old == new else f"went from {old} to {new}"


def hardest_kinds(evaluations: list[Row]) -> list[str]:
    """The kinds of question (sources), the one that the base was worst at first."""
    first = evaluations[0] if evaluations else {}
    kinds = [key.removeprefix("accuracy_") for key in first
             if key.startswith("accuracy_") and not key.startswith("accuracy_new")]
    # In any format, where that is known: a base may be wrong in its form alone.
    return sorted(kinds, key=lambda k: first.get(f"any_format_{k}") or first[f"accuracy_{k}"])


# ---- A group: why it is in its mode, and what it shows -------------------------------------------


def explain_mode(cfg: Row, group: Row) -> str:
    """Say in a sentence why a group is in its mode."""
    count, of = group["right"], len(group["responses"])
    if not of:
        return "SFT imitates the reference, whatever the model would respond."
    counted = f"{count or 'None'} of {of} responses {'is' if count < 2 else 'are'} right"
    idle = group["explores"] and not cfg["beta"] and not any(
        response["advantage"] for response in group["responses"])
    if cfg["mode"] != "dyme":
        why = "; GRPO compares the responses in any case"
    elif not cfg["by_eq_6"]:
        why = ("; a switch of its own decides" if cfg["switch"] == "any-correct" else
               f"; --switch {cfg['switch']} decides")
    elif count:
        why = ": the responses are compared with each other (Eq. 6)"
    else:
        why = ": nothing right to reinforce, so the reference is imitated (Eq. 6)"
    return counted + why + ", but all advantages are zero, so there is no gradient" * idle + "."


def remarks(cfg: Row, group: Row) -> list[str]:
    """What the responses of a group, and its trace or target, show beyond that."""
    said, responses = [], group["responses"]
    sound = [response for response in responses if response["r_a"] > 0]
    advantages = [response["advantage"] for response in responses]
    if any(advantages):
        up, down = advantages.index(max(advantages)), advantages.index(min(advantages))
        high, low = (f"{advantages[k]:+.2f}".replace("-", "−") for k in (up, down))
        if group["explores"]:
            said.append(f"y{up + 1} is pushed up most ({high}), y{down + 1} down most ({low})."
                        + " As all are right, only r_t tells them apart." * (sound == responses))
        elif not sound:
            said.append(f"Had they been compared all the same, y{up + 1} would have won, with an "
                        f"advantage of {high}, though it is wrong."
                        + " That is why the switch looks at right answers only." * cfg["by_eq_6"])
    if group["facts"] and sound:
        count = sum(not misread(response["text"]) for response in sound)
        said.append(f"Right responses where rules find no false number: {count} of {len(sound)}.")
    if group["facts"] and group["target"]:
        wrong = misread(group["target"], group["answer"])
        said.append(f"The reference has the true answer, but says {' and '.join(wrong)}, which the "
                    "image does not show: what is imitated here is pseudo thinking." if wrong else
                    "Rules find no false number in the reference's trace.")
    wrong = misread(group["trace"], group["answer"])
    if wrong and group["explores"] and cfg["thinking_weight"] and not cfg["helper_rates"]:
        taken = sum({*wrong} <= {*misread(response["text"])} for response in sound)
        said.append(f"The trace that r_t compares with itself says {' and '.join(wrong)}, which "
                    f"the image does not show; of {len(sound)} right responses {taken} repeat it."
                    + " r_a, and so the switch, does not look at it." * cfg["by_eq_6"])
    return said


def misread(parts: list[list[str]], answer: str = "") -> list[str]:
    """The numbers of a marked text that are not in the image; the answer only if that is all."""
    wrong = list(dict.fromkeys(text for text, kind in parts if kind == "no"))
    return [text for text in wrong if text != answer] or wrong


def equations(cfg: Row, group: Row) -> list[Row]:
    """A group's numbers in Eq. 6 and Eq. 1, where they apply, and in Eq. 2 for its best one."""
    found: list[Row] = [{"kind": "switch"}] if cfg["by_eq_6"] else []
    if cfg["mode"] == "dyme" and group["target"]:
        found.append({"kind": "imitate", "prompts": cfg["prompts"]})
    if not group["explores"] or not group["responses"]:
        return found
    rewards = [response["reward"] for response in group["responses"]]
    best = max(group["responses"], key=lambda response: response["advantage"])
    mean = sum(rewards) / len(rewards)
    deviation = (sum((reward - mean) ** 2 for reward in rewards) / len(rewards)) ** 0.5
    if len({*rewards}) == 1:
        found.append({"kind": "alike", "reward": rewards[0]})
    # Rewards are kept to four digits, which a small deviation magnifies; a release has its own.
    elif abs((best["reward"] - mean) / (deviation + 1e-4) - best["advantage"]) < 0.02:
        found.append({"kind": "advantage", "k": group["responses"].index(best), "mean": mean,
                      "reward": best["reward"], "deviation": deviation,
                      "advantage": best["advantage"]})
    return found


def telling(group: Row) -> list[int]:
    """The responses to show first: of most and least reward, and one right, or in the format."""
    responses = group["responses"]
    order = sorted(range(len(responses)), key=lambda k: -responses[k]["reward"])
    middle = sorted(order[1:-1], key=lambda k: (-responses[k]["r_a"], -responses[k]["r_f"]))
    return sorted({*order[:1], *middle[:1], *order[-1:]})


# ---- One prompt's visits -------------------------------------------------------------------------


def tell(run: Run, shown: list[Row], number: int) -> Row | None:
    """The story of one prompt in run `number` of those shown; None if no failed one came back."""
    mine, kinds = shown[number]["groups"], hardest_kinds(run.evaluations)
    visits, closing = choose_prompt(mine, kinds, run.cfg["mode"] == "dyme")
    if not visits:
        return None
    first, last = visits[0], visits[-1]

    def at(group: Row) -> str:
        of = len(group["responses"])
        return f"step {group['step']}" + f", {group['right'] or 'none'} of {of} right" * bool(of)

    turn = first_exploration(visits) or first
    headings = {last["step"]: "The last visit", turn["step"]: "The first right responses",
                first["step"]: "The first visit"}  # the last word on a step counts
    chapters = [{"step": group["step"], "title": f"{i}. {headings[group['step']]}: {at(group)}"}
                for i, group in enumerate((g for g in visits if g["step"] in headings), 1)]
    elsewhere = []
    for other in shown[:number] + shown[number + 1:]:
        own = [group for group in other["groups"]
               if group["name"] == first["name"] and group["question"] == first["question"]]
        in_sft = [group["step"] for group in own if not group["responses"]]  # with nothing to tell
        seen = [f"visits in SFT: {len(in_sft)}, the last at step {in_sft[-1]}"] if in_sft else []
        seen += [f"{at(group)}, {group['mode']}" for group in own if group["responses"]]
        if seen:
            elsewhere.append(f"{other['name']} ({MODE_NAMES[other['mode']]}): {'; '.join(seen)}.")
    rated = ("how a helper rates the thinking" if run.cfg["helper_rates"] else
             "how near the thinking is to a reference trace")
    rule = "All are compared with each other." if run.cfg["mode"] != "dyme" else ""
    if run.cfg["by_eq_6"]:
        rule = ("If any is right, they are compared with each other: exploration. If none is, the "
                "reference is imitated in their place: memorization.")
    lead = ("Here is what training did with one prompt. At each visit the model samples "
            f"{len(first['responses'])} responses. Rules say whether the answer is right (r_a, 1 "
            f"or 0); r_t, from 0 to 1, says {rated}. {rule}")
    return {"run": number, "name": first["name"], "kind": first["source"], "lead": lead,
            "title": f"“{first['question'][:200]}”: {at(first)}; {at(last)}",
            "chapters": chapters, "closing": closing, "elsewhere": elsewhere}


def choose_prompt(groups: list[Row], kinds: list[str], switches: bool) -> tuple[list[Row], str]:
    """The visits to one failed prompt of the hardest kind that came back, and how it was chosen."""
    visits: dict[str, list[Row]] = {}
    for group in groups:
        if group["responses"]:
            visits.setdefault(group["name"], []).append(group)
    again = [seen for seen in visits.values() if len(seen) > 1 and not seen[0]["right"]]
    if not again:
        return [], ""

    def order(seen: list[Row]) -> tuple:  # in a run that switches, explored ones are first
        kind = [*kinds, seen[0]["source"]].index(seen[0]["source"])
        return (switches and not first_exploration(seen), kind, -len(seen), -seen[-1]["right"],
                seen[0]["step"])

    chosen = min(again, key=order)
    like = [seen for seen in again if seen[0]["source"] == chosen[0]["source"]]
    later = sum(first_exploration(seen) is not None for seen in like)
    return chosen, (
        f"One prompt is no proof. Of {len(like)} kept prompts of this kind that had no right "
        f"response at first and came back, {later} were explored later with a right one. Shown is "
        f"the one {'of these ' if switches and later else ''}with the most visits, and then with "
        "the most right responses at the last.")


def first_exploration(visits: list[Row]) -> Row | None:
    """The first visit that explores with a right response."""
    return next((group for group in visits if group["explores"] and group["right"]), None)
