"""Tests of the report: what it keeps of a run, the story that it tells, and the page in a browser."""

import base64
import dataclasses
import itertools
import json
import re
import shutil
import subprocess
import urllib.parse
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import eval as evaluation
from dyme import Config
from reward import Example
from support import UserError, files, report, samples, settings, story, toy
from support import runs as run_folders
from test_dyme import Capture, Row, run

# ---- What a run keeps -----------------------------------------------------------------------------


def test_samples_follow_one_prompt_in_32_and_keep_what_r_t_compares_with() -> None:
    names = sorted((f"toy train row {i}" for i in range(2048)), key=lambda name: zlib.crc32(name.encode()))
    followed = [name for name in names if zlib.crc32(name.encode()) < 2**27]
    assert 40 < len(followed) < 90

    def kept(*batch: str) -> list[Row]:
        examples = [Example("Q", "7", trace=f"trace of {name}", source="sum", name=name) for name in batch]
        sequences = [SimpleNamespace(prompt=p, ids=[p], explore=False) for p in range(1, len(batch))]
        done = SimpleNamespace(examples=examples, groups=None, sequences=sequences,
                               explore=torch.tensor([True] + [False] * (len(batch) - 1)))
        return samples.describe(3, done, SimpleNamespace(decode=lambda ids, skip_special_tokens: f"target {ids} "))

    rows = kept(names[900], followed[5], names[901], followed[3])
    assert [row["name"] for row in rows] == [followed[5], followed[3]]  # each, whenever it returns
    assert [row["name"] for row in kept(names[902], names[900], names[901])] == [names[900]]  # else one
    assert rows[0]["trace"] == f"trace of {followed[5]}" and rows[0]["source"] == "sum" and rows[0]["target"] == "target [1]"
    explored = kept(followed[3], names[900])[0]
    assert explored["mode"] == "exploration" and explored["target"] is None and explored["trace"]


def test_older_samples_get_kind_and_trace_from_the_data(runs: Path) -> None:
    cfg = dataclasses.asdict(Config())
    examples = {example.name: example for example in toy.make_examples("train")}
    old = group_row(1, "toy train row 1", 2)
    shown = report.describe_group(cfg, old, examples)
    assert shown["source"] == "sum" and "".join(text for text, _ in shown["trace"]) == examples[old["name"]].trace
    assert report.describe_group(cfg, old, {})["trace"] is None  # data not at hand
    assert report.describe_group(cfg, old | {"trace": "red 4", "source": "x"}, examples)["trace"] == [["red ", ""], ["4", "yes"]]


# ---- The page -------------------------------------------------------------------------------------


def test_runs_are_pooled_if_only_their_seeds_differ(runs: Path, capsys: Capture) -> None:
    assert run(runs, "a", "--steps", "2") == 0 and run(runs, "b", "--steps", "2", "--seed", "1") == 0
    shutil.copytree(runs / "a", runs / "copy")
    shutil.copytree(runs / "b", runs / "shorter")
    (runs / "shorter" / "metrics.jsonl").write_text((runs / "b" / "metrics.jsonl").read_text().splitlines()[0] + "\n")
    for folder, score, spent in (("a", 0.2, 60), ("b", 0.6, 120)):
        (runs / folder / "evaluations.jsonl").write_text(json.dumps({"step": 2, "accuracy": score, "rows": 8}) + "\n")
        rows = [{"step": step, "seconds_update": spent} for step in range(2)]
        (runs / folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = ["a", "copy", "b", "shorter"]
    found = [(runs / name, settings.read(runs / name, Config)) for name in names]
    assert len({run_folders.pooling_key(*each, settings.CHANGEABLE_ON_RESUME) for each in found}) == 2
    chosen = [0, 2, 3]
    table = report.result_table([names[i] for i in chosen], [found[i] for i in chosen], settings.CHANGEABLE_ON_RESUME)["rows"]
    assert table[0][:2] == ["a", "0.200"] and table[0][6:] == ["2.000", "dyme", "0", "2", "2", "8"] and len(table) == 4
    assert table[3][0].endswith("2 seeds like a") and table[3][1] == "0.400 (0.200 – 0.600)"
    assert table[3][6] == "3.000 (2.000 – 4.000)" and table[3][2] == "–"
    evaluation.print_table([{"model": n, "mode": "dyme", "seed": cfg["seed"], "rows": 8, "accuracy": i / 10, "official": 0.5,
                             "setting": run_folders.pooling_key(path, cfg, settings.CHANGEABLE_ON_RESUME)} for i, (n, (path, cfg)) in
                            enumerate(zip(names, found, strict=True))])
    out = capsys.readouterr().out
    assert "accuracy, 2 seeds: mean 0.150 (from 0.100 to 0.200)" in out and out.count("accuracy, ") == 1  # the copy for a


PROBE = """<script>{
const out = {}, change = (id, value) => { $(id).value = value; $(id).dispatchEvent(new Event("change")); };
const texts = selector => [...document.querySelectorAll(selector)].map(e => e.textContent);
out.begin = $("answered").textContent; out.headline = $("headline").textContent; out.story = $("story").textContent;
out.titles = texts("#story h3, #story h4"); out.equations = texts("#story .equation");
document.querySelectorAll("#story button")[1].click(); out.opened = $("place").textContent;
out.focused = document.activeElement.id;
out.charts = texts("#charts h4"); out.values = $("charts").textContent;
change("mode", "memorization"); out.memorized = $("place").textContent; out.why = $("group").textContent;
change("mode", "exploration"); out.explored = $("place").textContent;
change("mode", ""); change("verdict", "some"); out.some = $("place").textContent;
out.used = $("group").textContent;
change("verdict", ""); out.kept = $("place").textContent; $("next").click(); out.next = $("place").textContent;
out.trace = $("group").textContent; out.history = texts("#history button");
out.current = texts("#history [aria-current]");
$("history").querySelector("button").click(); out.back = $("place").textContent;
out.lanes = texts("#strip > span"); out.blocks = document.querySelectorAll("#strip .lane rect").length;
const lane = $("strip").querySelectorAll(".lane")[1], area = lane.getBoundingClientRect();
lane.dispatchEvent(new MouseEvent("click", {clientX: area.right})); out.clicked = $("place").textContent;
change("mode", ""); $("which").value = 0; $("which").dispatchEvent(new Event("input"));
$("switched").click(); out.switched = $("place").textContent;
out.elements = document.querySelectorAll("#story script, #story b, #group script, #group b, #compared script, #compared b").length;
change("changed", ""); out.all = $("answered").textContent;
out.pictures = document.querySelectorAll("#compared img").length; out.marks = document.querySelectorAll("#compared mark").length;
change("changed", "wrong"); out.wrong = $("answered").textContent;
change("of", data.answers.columns.findIndex(c => c.name.startsWith("b at"))); change("changed", "");
out.columns = [...$("compared").querySelector(".cells").children].map(e => e.firstChild.textContent).join();
const many = data.answers;
while (many.columns.length < 5) {
  many.columns.push({name: "one more", before: 0});
  for (const row of many.rows) row.cells.push(row.cells[1]);
}
change("of", "");
const cells = [...$("compared").querySelector(".cells").children].map(e => e.getBoundingClientRect());
out.cells = cells.length; out.rows = new Set(cells.map(cell => cell.top)).size;
out.past = cells.filter(cell => cell.right > innerWidth).length;
$("step").value = 0; $("step").dispatchEvent(new Event("input")); out.at = $("at").textContent;
const box = document.querySelector("#charts svg[role]").getBoundingClientRect();
document.querySelector("#charts svg[role]").dispatchEvent(
  new PointerEvent("pointerdown", {clientX: box.left + box.width * (42 + 290 / 2) / 350}));
out.tapped = $("at").textContent;
for (const part of document.querySelectorAll("details")) part.open = true;
out.focus = [...document.querySelectorAll("a, button, input, select, summary, [tabindex]")].filter(
  e => { e.focus(); return !e.disabled && e.offsetParent && document.activeElement !== e; }).length;
out.unnamed = [...document.querySelectorAll("input, select")].filter(e => !e.labels.length).length;
out.unnamed += [...document.querySelectorAll("img")].filter(e => !e.alt).length;
out.wider = document.documentElement.scrollWidth - innerWidth;
out.errors = errors;
document.body.replaceChildren("!OUT!" + btoa(encodeURIComponent(JSON.stringify(out))) + "!OUT!");
}</script></body>"""


def group_row(step: int, name: str, right: int, **more: Any) -> Row:
    """A row of samples.jsonl with four responses, of which some are right."""
    responses = [{"text": f"<b>red 4</b> and blue 9 </script><script>throw 1</script>\nAnswer: {k}", "finished": True,
                  "r_a": float(k < right), "r_t": 0.5, "r_f": 1.0, "reward": 0.5 + (k < right),
                  "advantage": 0.0 if right == 4 else 1.0 if k < right else -1.0} for k in range(4)]
    return {"step": step, "name": name, "question": "Q <b>?", "answer": "0", "facts": "red 4, blue 7",
            "mode": "exploration" if right else "memorization", "target": None if right else "Goal: red 4.\nAnswer: 0",
            "responses": responses} | more


@pytest.fixture
def reported(runs: Path, capsys: Capture) -> Path:
    """A report of a run whose records hold markup, a broken last line and a prompt seen in both modes."""
    assert run(runs, "<i>a", "--steps", "2") == 0 and run(runs, "b", "--steps", "1", "--seed", "1", "--mode", "sft") == 0
    first, second = visits("x", "sum", (0, 0), (2, 1))
    rows = [first, group_row(1, "y", 2), second | {"trace": "red 4, blue <b>9"}, group_row(3, "y", 4)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (runs / "<i>a" / "samples.jsonl").write_text(text + '{"step": 4, "na')
    with open(runs / "<i>a" / "metrics.jsonl", "a") as file:
        file.write('{"step": 2')
    page = runs / "page.html"
    assert run_folders.run_main(lambda: evaluation.main(["report", str(runs / "<i>a"), str(runs / "b"), "--out", str(page)])) == 0
    return page


def test_the_report_holds_the_runs_and_no_markup_of_theirs(reported: Path) -> None:
    page = reported.read_text()
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]
    content = json.loads(text)
    spaces = r"http://www\.w3\.org/(2000/svg|1998/Math/MathML)"  # names of elements, never asked for
    assert "<" not in text and "http" not in re.sub(spaces, "", page)
    a, b = content["runs"]
    assert a["metrics"]["step"] == [0, 1] and len(a["metrics"]["accuracy"]) == 2 and "accuracy" not in b["metrics"]
    assert [len(r["groups"]) for r in (a, b)] == [4, 1] and "rows" not in a
    text = a["groups"][0]["responses"][0]["text"]
    assert text[1:4:2] == [["4", "yes"], ["9", "no"]] and text[-1][0].endswith("Answer: 0")  # an answer is no thinking
    assert "None of 4" in a["groups"][0]["why"] and "2 of 4" in a["groups"][1]["why"] and "SFT" in b["groups"][0]["why"]
    assert "no gradient" in a["groups"][3]["why"] and a["all_groups"] == 4
    answers = content["answers"]["rows"]
    assert len(answers) == 8 and all(len(row["cells"]) == 3 for row in answers)
    assert {row["image"] for row in answers} | {b["groups"][0]["image"]} <= content["images"].keys()
    assert "yes" in {kind for row in answers for cell in row["cells"] for _, kind in cell["text"]}
    charts = {chart["title"]: chart for chart in content["charts"]}
    assert {"Accuracy: sum", "Accuracy: tallest", "Entropy", "Gradient norm", "Learning rate"} <= charts.keys()
    assert "KL" not in charts  # without --beta there is none
    assert [chart["key"] for chart in content["charts"] if chart["relative"]] == ["memorized", "reward"]
    assert charts["Groundedness"]["axis"] == "top"


def test_a_big_report_is_thinned(runs: Path, capsys: Capture) -> None:
    assert run(runs, "a", "--steps", "1") == 0
    metrics = files.read_jsonl(runs / "a" / "metrics.jsonl")[0]
    rows = [group_row(step, f"row {step}", 1) for step in range(3000)]
    (runs / "a" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (runs / "a" / "metrics.jsonl").write_text("".join(
        json.dumps(metrics | {"step": step, "accuracy": step % 2}) + "\n" for step in range(3000)))
    page = runs / "page.html"
    for name in "bcdef":
        shutil.copytree(runs / "a", runs / name)
    evaluation.main(["report", *[str(runs / name) for name in "abcdef"], str(runs), "--out", str(page)])
    assert "left out" in capsys.readouterr().err  # the folder of runs is none itself
    with pytest.raises(UserError, match="none of these"):
        evaluation.main(["report", str(runs)])
    assert 2e6 < page.stat().st_size < 10e6
    shown = [report.describe_run(name, runs / name, dataclasses.asdict(Config()), {}) for name in "ab"]
    assert shown[0]["metrics"]["step"][:2] == [5, 11] and set(shown[0]["metrics"]["accuracy"]) == {0.5}
    shown[0]["groups"], third = shown[0]["groups"][:1], len(json.dumps(shown[1]["groups"])) / 3
    assert third * 0.8 < report.fit_groups(shown, third) < third  # what the short run leaves, the other gets
    steps = [group["step"] for group in shown[1]["groups"]]
    assert 900 < len(steps) < 1100 and max(b - a for a, b in itertools.pairwise(steps)) < 9  # spread over the run


def test_the_report_keeps_the_groups_that_switch(runs: Path, capsys: Capture) -> None:
    assert run(runs, "a", "--steps", "1") == 0
    rows = [group_row(step, "x" if step in (500, 501) else f"row {step}", step == 501) for step in range(1000)]
    (runs / "a" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = report.describe_run("a", runs / "a", dataclasses.asdict(Config()), {})
    report.fit_groups([shown], 20_000)
    assert {500, 501} < {group["step"] for group in shown["groups"]}
    assert [group["switched"] for group in shown["groups"] if "switched" in group] == [500]
    shown = report.describe_run("a", runs / "a", dataclasses.asdict(Config()), {})
    shown["groups"][901]["told"] = True
    report.fit_groups([shown], 3_000)
    assert 901 in {group["step"] for group in shown["groups"]} and len(shown["groups"]) < 4  # the story's go first


@pytest.mark.parametrize("switch, right, mode, why", [
    ("threshold:0.8", 1, "memorization", "reaches 0.8: it did not."), ("threshold:0.8", 1, "exploration", "it did."),
    ("anneal", 0, "both", "does both"), ("budget:9", 0, "buffered", "when 9 prompts have failed"),
    ("budget:9", 2, "exploration", "compared with each other"), ("explore", 0, "exploration", "in any case"),
    ("memorize", 2, "memorization", "imitates the reference"), ("any-correct", 4, "exploration", "no gradient")])
def test_the_report_gives_the_reason_of_each_rule(switch: str, right: int, mode: str, why: str) -> None:
    assert why in report.explain_mode(dataclasses.asdict(Config(switch=switch)), group_row(0, "x", right, mode=mode))


def test_before_and_after_shows_what_changed_first() -> None:
    def column(right: set[int]) -> Row:
        return {"answers": {(f"row {i}", "Q"): {"accuracy": i in right} for i in range(200)}}

    changed = {*range(100, 180)}
    chosen = [int(name.split()[1]) for name, _ in report.chosen_rows([column(set()), column(changed)])]
    assert len(chosen) == 40 and len(changed & {*chosen}) == 30 and chosen == sorted(chosen)
    assert len({*report.chosen_rows([column(set()), column({*range(200)})])}) == 40  # all changed
    few = [int(name.split()[1]) for name, _ in report.chosen_rows([column({1}), column({1, 9})])]
    assert 9 in few and len(few) == 40


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium here")
@pytest.mark.parametrize("width", [1280, 500])  # a window of Chromium's is no narrower
def test_the_report_works_in_a_browser(reported: Path, width: int) -> None:
    page = reported.read_text().replace("<head>", "<head><script>const errors = []; onerror = e => errors.push(e);</script>")
    (reported.parent / "probe.html").write_text(page.replace("</body>", PROBE))
    shown = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", f"--user-data-dir={reported.parent / 'browser'}",
         f"--window-size={width},900", "--virtual-time-budget=3000", "--dump-dom", (reported.parent / "probe.html").as_uri()],
        capture_output=True, text=True, timeout=60, check=True).stdout
    out = json.loads(urllib.parse.unquote(base64.b64decode(shown.split("!OUT!")[1]).decode()))
    assert out["errors"] == [] and out["elements"] == out["focus"] == out["unnamed"] == 0 and out["wider"] <= 0
    assert out["headline"].startswith("Of 2 runs") and "“Q <b>?”: none of 4 right at step 0, 1 of 4 at step 2" in out["titles"]
    assert out["equations"][0] == "Eq. 6: max ra = max(0, 0, 0, 0) = 0, so memorize" and "y1" in out["equations"][3]
    assert out["equations"][2] == "Eq. 6: max ra = max(1, 0, 0, 0) = 1, so explore" and "says 9 (not" not in out["story"]
    assert out["opened"].startswith("Step 2; group 3 of 4") and out["focused"] == "which"
    assert "<i>a" in out["values"] and out["at"] == "0" and "Accuracy: sum" in out["charts"] and "KL" not in out["charts"]
    assert out["memorized"] == "Step 0; group 1 of 1" and "None of 4 responses is right" in out["why"]
    assert out["explored"] == out["some"] == "Step 1; group 1 of 3"
    assert out["kept"] == "Step 1; group 2 of 4" and out["next"] == "Step 2; group 3 of 4; memorized before, at step 0"
    assert "Reference trace that r_t compares withred 4, blue <b>9 (not in the image)" in out["trace"]
    assert out["history"] == ["epoch 1, step 0: memorization, 0 of 4 right", "epoch 1, step 2: exploration, 1 of 4 right"]
    assert out["current"] == out["history"][1:] and out["back"] == "Step 0; group 1 of 4"
    assert out["lanes"] == ["all prompts", "sum", "kept prompts"] and out["blocks"] >= 2 + 4
    assert out["clicked"] == "Step 2; group 3 of 4; memorized before, at step 0"  # the last of its lane
    assert out["switched"] == out["next"] and "not used" in out["why"] and "not used" not in out["used"]
    assert out["begin"] == out["all"] == "8 of 8 rows" and out["pictures"] == 8 and out["marks"] > 0
    assert re.fullmatch(r"\d of 8 rows", out["wrong"]) and out["columns"] == "before: <i>a at step 0,b at step 1"
    assert out["tapped"] == "1"
    assert out["cells"] == 5 and out["past"] == 0 and (out["rows"] == 1) is (width == 1280)  # five fit beside each other


# ---- The story ------------------------------------------------------------------------------------


def told(*groups: Row, mode: str = "dyme", **more: Any) -> Row | None:
    """The story of a run of such groups, whose base was worst at sums, then at differences."""
    cfg = dataclasses.asdict(Config(mode=mode, **more))
    rows = [{"step": 0, "accuracy_sum": 0.0, "any_format_sum": 0.0, "accuracy_tallest": 0.0, "any_format_tallest": 0.9,
             "accuracy_difference": 0.0, "any_format_difference": 0.25},
            {"step": 9, "accuracy_sum": 0.5, "accuracy_tallest": 1.0, "accuracy_difference": 1.0}]
    return story.tell(cfg, [report.describe_group(cfg, group, {}) for group in groups], rows)


def visits(name: str, source: str, *right: tuple[int, int]) -> list[Row]:
    """Groups of a prompt: (step, how many of 4 are right); r is r_a + 0.5, the advantages by Eq. 2."""
    rows = []
    for step, count in right:
        row = group_row(step, name, count, source=source, trace="red 4, blue 9")
        mean, deviation = 0.5 + count / 4, (count / 4 * (1 - count / 4)) ** 0.5
        for response in row["responses"]:
            response["advantage"] = round((response["reward"] - mean) / (deviation + 1e-4), 4)
        rows.append(row)
    return rows


def test_the_story_is_of_the_hardest_kind_that_was_explored_after_all() -> None:
    easy, seldom = visits("t", "tallest", (0, 0), (2, 4)), visits("d", "difference", (0, 0), (3, 1))
    never, once = visits("s", "sum", (1, 0), (4, 0)), visits("u", "sum", (5, 0))
    assert told(*never, *once, *easy)["name"] == "t"
    assert told(*never, *easy, *seldom)["name"] == "d"
    longer = visits("v", "difference", (0, 0), (3, 1), (6, 1))
    assert told(*seldom, *longer)["name"] == "v" and told(*seldom, *visits("w", "difference", (0, 0), (9, 3)))["name"] == "w"
    # A run that does not switch is not shown by the prompts that suit it.
    assert told(*never, *easy, mode="grpo", thinking_weight=0.0)["name"] == "s"
    assert told(*once, *visits("x", "sum", (1, 1), (2, 0))) is None  # seen once; right from the start
    closing = told(*seldom, *longer, *visits("y", "difference", (0, 0), (9, 0)))["closing"]
    assert closing[0].endswith("0.00 at step 0, 1.00 at step 9.")
    assert "came back: 3." in closing[1] and "with a right response: 2." in closing[1]


def test_the_story_goes_from_collapse_over_memorization_to_the_last_visit() -> None:
    tale = told(*visits("s", "sum", (2, 0), (4, 0), (7, 1), (9, 4)))
    assert tale["title"] == "“Q <b>?”: none of 4 right at step 2, 4 of 4 at step 9"
    assert "Of 3 kinds of question, “sum” was the hardest for the base: 0.00 of" in tale["lead"]
    assert "If none is, the reference trace is imitated" in tale["lead"]
    assert [visit["right"] for visit in tale["visits"]] == [0, 0, 1, 4] and tale["curve"] == {"step": [0, 9], "value": [0.0, 0.5]}
    first, imitated, explored, last = tale["chapters"]
    assert first["title"] == "1. Step 2: the first visit, none of 4 right" and first["equations"] == [{"kind": "switch"}]
    assert first["before"] == ["The first visit on record. Of 4 responses none is right; 4 are wrong in the answer."]
    assert imitated["part"] == "target" and imitated["equations"] == [{"kind": "imitate", "prompts": 8}]
    assert imitated["after"] == ["All numbers in its thinking are in the image, or follow from such."]
    assert explored["title"].startswith("3. Step 7: the first right answer, 1 of 4") and explored["part"] == "trace"
    assert explored["before"][0].startswith("Before, at step 4, none was right again. 3 steps after the last visit")
    switch, eq_2 = explored["equations"]  # by hand: (1.5 - 0.75) / 0.4330 = 1.73
    assert (eq_2["k"], eq_2["reward"], eq_2["mean"]) == (0, 1.5, 0.75) and eq_2["deviation"] == pytest.approx(0.433, abs=1e-3)
    assert eq_2["advantage"] == pytest.approx(1.7317, abs=1e-3) and "y1 is pushed up most (+1.73)" in explored["after"][0]
    assert explored["after"][1].endswith("0 of 1.")  # it says blue 9, where blue is 7
    assert explored["aside"][0].startswith("This trace itself says 9,") and explored["aside"][0].endswith("number: 1 of 1.")
    assert last["title"] == "4. Step 9: the last visit, 4 of 4 right" and "no gradient" in last["decision"]
    assert last["equations"][1:] == [{"kind": "alike", "reward": 1.5}]


def test_the_story_says_only_what_a_run_did() -> None:
    collapsed = visits("s", "sum", (2, 0), (4, 0))
    for row in collapsed:
        row["mode"], row["target"] = "exploration", None
    tale = told(*collapsed, mode="grpo", thinking_weight=0.0)
    first, last = tale["chapters"]
    assert "compared with each other in any case" in tale["lead"]
    assert first["equations"] == [{"kind": "alike", "reward": 0.5}] and "GRPO compares" in first["decision"]
    assert first["aside"] == [] and last["title"].startswith("2.")  # r_t was not rewarded: no word of its trace
    tempting = visits("s", "sum", (2, 0), (4, 1))
    for k, advantage in enumerate((-1.0, 1.7, -0.4, -0.3)):
        tempting[0]["responses"][k]["advantage"] = advantage
    tempting[0]["target"] = "red 3.\nAnswer: 0"
    chapters = told(*tempting)["chapters"]
    assert chapters[0]["after"][0].startswith("Had they been compared all the same, y2 would have won, with an advantage of +1.70")
    assert "its thinking says 3, which the visual facts do not" in chapters[1]["after"][0]
    tempting[1]["responses"][0]["advantage"] = 5.0  # not by Eq. 2, as with --released-code
    assert told(*tempting)["chapters"][2]["equations"] == [{"kind": "switch"}]
    assert told(*tempting, switch="memorize")["chapters"][0]["equations"] == []  # Eq. 6 did not decide
    helped = told(*tempting, helper_url="http://x")
    assert "a helper rates" in helped["lead"] and helped["chapters"][2]["aside"] == []


def test_the_story_looks_at_the_same_prompt_in_other_runs() -> None:
    mine, other = visits("s", "sum", (2, 0), (4, 1)), visits("s", "sum", (3, 0), (8, 2))
    imitated = other[0] | {"responses": [], "mode": "memorization"}
    runs = [{"name": name, "mode": mode, "data": data, "groups": groups} for name, mode, data, groups in (
        ("a", "dyme", "toy", mine), ("g", "grpo", "toy", other), ("t", "sft", "toy", [imitated]),
        ("elsewhere", "dyme", "chartqa", other), ("never", "dyme", "toy", visits("r", "sum", (1, 1))))]
    assert story.elsewhere("s", runs, runs[0]) == [
        "g (GRPO): step 3, 0 of 4 right, memorization; step 8, 2 of 4 right, exploration.", "t (SFT): step 3, memorization."]


def test_the_headline_is_what_happened() -> None:
    def shown(name: str, mode: str, *strict: float) -> Row:
        rows = [{"step": 75 * i, "accuracy": value, "any_format": 0.6, "valid_thinking": value / 2, "accuracy_sum": value / 4,
                 "any_format_sum": 0.1, "accuracy_value": 1.0, "any_format_value": 1.0} for i, value in enumerate(strict)]
        return {"name": name, "mode": mode, "rows": rows, "metrics": {"memorized": [0.8, 0.6] + [0.5] * 16 + [0.2, 0.0]}}

    assert "not been evaluated" not in story.headline([shown("a", "dyme", 0.0, 0.8)])
    assert story.headline([shown("a", "dyme", 0.0, 0.8)]) == (
        "In 75 steps of DyME, accuracy on held-out questions went from 0.00 to 0.80; on “sum”, where its base was worst, from "
        "0.00 to 0.20. (Counting the last word of whatever it says, the base was right in 0.60.) Right with valid thinking: "
        "0.40. The share of prompts memorized went from 0.70 (first tenth of the run) to 0.10 (last tenth).")
    several = story.headline([shown("g", "grpo", 0.0, 0.4), shown("a", "dyme", 0.0, 0.8), shown("new", "sft", 0.0)])
    assert several.startswith("Of 2 runs, a ends highest: in 75 steps of DyME, accuracy") and "(lowest: g, 0.40)" in several
    assert "(g: 0.10)" in several
    assert story.headline([shown("new", "sft", 0.0)]) == "No run has been evaluated after its start yet."
