"""Tests of the report and of eval.py's table: records, the story, the page in a browser."""

import base64
import contextlib
import dataclasses
import functools
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
from dyme import Config, Policy, load_policy
from reward import Example
from support import UserError, data, parallel, report, settings, toy
from support import runs as run_folders
from support.report import records, story

Capture, Patch = pytest.CaptureFixture[str], pytest.MonkeyPatch
Row = dict[str, Any]

# ---- Runs to show --------------------------------------------------------------------------------

toy_rows = functools.cache(data.load_data)
held_out_rows = functools.cache(lambda: toy.make_examples("val")[:8])


@pytest.fixture(autouse=True)
def read_the_toy_once(monkeypatch: Patch) -> None:
    """All tests share the toy's rows, and whether the hub is asked stays as it was."""
    monkeypatch.setattr(data, "load_data", toy_rows)
    monkeypatch.setattr(report.constants, "HF_HUB_OFFLINE", report.constants.HF_HUB_OFFLINE)


def group_row(step: int, name: str, right: int, **more: Any) -> Row:
    """A row of samples.jsonl with four responses, some right; advantages by Eq. 2, r_t is 0.5."""
    mean, deviation = 0.5 + right / 4, (right / 4 * (1 - right / 4)) ** 0.5
    responses = []
    for k in range(4):
        reward = 0.5 + (k < right)
        responses.append({
            "text": f"<b>red 4</b> and blue 9 </script><script>throw 1</script>\nAnswer: {k}",
            "finished": True, "r_a": float(k < right), "r_t": 0.5, "r_f": 1.0, "reward": reward,
            "advantage": round((reward - mean) / (deviation + 1e-4), 4)})
    return {"step": step, "name": name, "source": "sum", "question": "Q <b>?", "answer": "0",
            "facts": "red 4, blue 7", "trace": "red 4, blue <b>9",
            "mode": "exploration" if right else "memorization",
            "target": None if right else "Goal: red 4.\nAnswer: 0", "responses": responses} | more


def visits(name: str, source: str, *right: tuple[int, int]) -> list[Row]:
    """Groups of a prompt: (step, how many of 4 are right)."""
    return [group_row(step, name, count, source=source) for step, count in right]


def metrics_row(step: int, **more: Any) -> Row:
    """A row of metrics.jsonl."""
    return {"step": step, "mode": "dyme", "memorized": 0.5, "none_correct": 0.5, "lr": 0.1,
            "reward": 1.0 + step, "no_variance": 0.0, "accuracy": 0.5 * (step % 2), "kl": 0.0,
            "reward_thinking": 0.5, "reward_format": 1.0, "seconds_update": 60} | more


def held_out(right: set[int]) -> list[Row]:
    """Answers to the first eight held-out rows of the toy."""
    return [{"name": e.name, "source": e.source, "question": e.question, "answer": e.answer,
             "response": f"<b>{e.facts}</b>\nAnswer: {i in right}", "accuracy": i in right,
             "in_format": True, "finished": True, "thinking_fault": None if i else ""}
            for i, e in enumerate(held_out_rows())]


EVALUATIONS = [{"step": 0, "accuracy": 0.0, "accuracy_sum": 0.0, "any_format": 0.6, "rows": 8,
                "accuracy_new": 0.0, "accuracy_new_sum": 0.0},
               {"step": 4, "accuracy": 0.5, "accuracy_sum": 0.25, "valid_thinking": 0.4, "rows": 8,
                "accuracy_new": 0.25, "accuracy_new_sum": 0.25}]


def write_run(folder: Path, groups: list[Row], **settings: Any) -> Path:
    """A run folder of four steps with these groups."""
    folder.mkdir()
    cfg = dataclasses.asdict(Config(**({"steps": 4, "lr": 1e-3, "out": str(folder)} | settings)))
    (folder / "config.json").write_text(json.dumps(cfg))
    parts = {"metrics": [metrics_row(step) for step in range(4)], "evaluations": EVALUATIONS,
             "samples": groups, "held-out-0": held_out({1}), "held-out-4": held_out({1, 2, 3})}
    for name, rows in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def page_of(*runs: Path) -> Row:
    """What the page of runs holds; no number in it is NaN, which JSON has not."""
    out = runs[0].parent / "page.html"
    report.write_page([*map(str, runs), "--out", str(out)])
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', out.read_text(),
                     re.DOTALL)[1]
    return json.loads(text, parse_constant=pytest.fail)


def told(*groups: Row, **settings: Any) -> Row | None:
    """The story of a run of such groups, whose base was worst at sums, then at differences."""
    cfg = dataclasses.asdict(Config(**settings)) | {"helper_rates": False, "by_eq_6": True}
    first = {f"accuracy_{kind}": 0.0 for kind in ("sum", "tallest", "difference")}
    first |= {"any_format_sum": 0.0, "any_format_tallest": 0.9, "any_format_difference": 0.25}
    run = SimpleNamespace(cfg=cfg, evaluations=[first])
    shown = [{"groups": [described(cfg, group) for group in groups]}]
    return story.tell(run, shown, 0)


def described(cfg: Row, group: Row) -> Row:
    """A group as the page shows it."""
    right = sum(response["r_a"] > 0 for response in group["responses"])
    group = group | {"right": right, "explores": group["mode"] in ("exploration", "both")}
    return report.describe_group(cfg, group, {})


# ---- What a run keeps ----------------------------------------------------------------------------


def test_samples_follow_one_prompt_in_32_and_keep_what_r_t_compares_with() -> None:
    names = [f"toy train row {i}" for i in range(2048)]
    names.sort(key=lambda name: zlib.crc32(name.encode()))
    followed = [name for name in names if zlib.crc32(name.encode()) < 2**27]
    assert 40 < len(followed) < 90

    def kept(*batch: str) -> list[Row]:
        examples = [Example("Q", "7", trace=f"trace of {name}", name=name) for name in batch]
        sequences = [SimpleNamespace(prompt=p, ids=[p], explore=False)
                     for p in range(1, len(batch))]
        done = SimpleNamespace(step=3, examples=examples, responses=[], sequences=sequences,
                               explore=torch.tensor([True] + [False] * (len(batch) - 1)))
        decode = SimpleNamespace(decode=lambda ids, skip_special_tokens: f"target {ids} ")
        return run_folders.describe_groups(done, decode)

    rows = kept(names[900], followed[5], names[901], followed[3])
    assert [row["name"] for row in rows] == [followed[5], followed[3]]  # each, whenever it returns
    one = kept(names[902], names[900], names[901])
    assert [row["name"] for row in one] == [names[900]]  # if none of these is followed
    assert rows[0]["trace"] == f"trace of {followed[5]}"
    assert rows[0]["target"] == "target [1]"
    explored = kept(followed[3], names[900])[0]
    assert (explored["mode"], explored["target"]) == ("exploration", None)


# ---- Records -------------------------------------------------------------------------------------


def change(**more: Any) -> Any:
    """Damage: other values in a file's last row."""
    return lambda file, rows: file.write_text("".join(
        json.dumps(row) + "\n" for row in [*rows[:-1], rows[-1] | more]))


def replace_by(data: bytes) -> Any:
    """Damage: a file of these bytes."""
    return lambda file, _: file.write_bytes(data)


def make_folder(file: Path, _: Any) -> None:
    """Damage: a folder in the file's place."""
    file.unlink()
    file.mkdir()


def in_response(**more: Any) -> Any:
    """Damage: other values in one of a group's responses."""
    return change(responses=[group_row(0, "x", 0)["responses"][0] | more])


@pytest.mark.parametrize("name, damage, lost", [
    ("metrics", change(reward=float("nan")), 1), ("metrics", change(lr="high", entropy=[1]), 2),
    ("metrics", change(step=None), 1), ("metrics", change(grad_norm=10**400), 1),
    ("metrics", replace_by(b'{"step": 0}\n{"step": 1, "re'), 1), ("metrics", make_folder, 1),
    ("samples", change(step="1"), 1), ("samples", change(question=None), 1),
    ("samples", change(mode="asleep"), 1), ("samples", change(responses=[None]), 1),
    ("samples", change(name="x" * 10**6), 1), ("samples", in_response(advantage=float("nan")), 1),
    ("samples", in_response(text=7), 1), ("samples", in_response(kl=float("nan")), 0),
    ("samples", replace_by(b"[" * 10**5 + b'\nnull\n"x"\n7\n[]\n'), 5),
    ("evaluations", change(accuracy=float("inf")), 1), ("evaluations", change(accuracy_sum={}), 1),
    ("evaluations", change(step=-1), 1), ("evaluations", replace_by(b"\xff\xfe\0\n"), 1),
    ("held-out-4", change(response=None), 1), ("held-out-4", change(accuracy="yes"), 1),
    ("held-out-4", replace_by(b""), 0)])
def test_a_damaged_record_is_left_out_and_counted(
        tmp_path: Path, name: str, damage: Any, lost: int, capsys: Capture) -> None:
    whole = write_run(tmp_path / "whole", [group_row(0, "y", 1)])
    run = write_run(tmp_path / "a", [group_row(1, "x", 2), group_row(2, "y", 0)])
    file = run / f"{name}.jsonl"
    damage(file, [json.loads(line) for line in file.read_text().splitlines()])
    content = page_of(run, whole)
    notes = [f"a: damaged records are left out: {lost} of {name}.jsonl"] * bool(lost)
    assert content["notes"] == notes
    assert capsys.readouterr().err.splitlines() == notes
    assert [len(one["groups"]) for one in content["runs"]][1] == 1  # the other run is whole


@pytest.mark.parametrize("key, value", [
    ("mode", "x"), ("steps", -1), ("prompts", 0), ("thinking_weight", float("nan"))])
def test_a_run_with_damaged_settings_is_left_out(tmp_path: Path, key: str, value: Any) -> None:
    for name in "ab":
        write_run(tmp_path / name, [])
    cfg = json.loads((tmp_path / "a" / "config.json").read_text()) | {key: value}
    (tmp_path / "a" / "config.json").write_text(json.dumps(cfg))
    content = page_of(tmp_path / "a", tmp_path / "b", tmp_path)
    assert [run["name"] for run in content["runs"]] == ["b"]
    assert f"config.json: {settings.flag(key)} " in content["notes"][0]
    assert "is not a run folder" in content["notes"][1]
    with pytest.raises(UserError, match=f"none of these can be shown; .*{settings.flag(key)} "):
        page_of(tmp_path / "a")


def test_a_page_replaces_only_pages_and_unasked_only_its_own(
        tmp_path: Path, monkeypatch: Patch) -> None:
    a, b = (write_run(tmp_path / name, []) for name in "ab")
    monkeypatch.chdir(tmp_path)
    for file in (a / "metrics.jsonl", b / "config.json"):
        before = file.read_text()
        with pytest.raises(UserError, match="something other than a report"):
            report.write_page([str(a), "--out", str(file)])
        assert file.read_text() == before
    report.write_page(["a"])
    report.write_page(["a"])
    page = Path("report.html").read_text()
    with pytest.raises(UserError, match="shows other runs"):
        report.write_page(["a", "b"])
    assert Path("report.html").read_text() == page
    report.write_page(["b", "--out", "report.html"])  # asked for
    assert Path("report.html").read_text() != page


# ---- The page ------------------------------------------------------------------------------------


@pytest.fixture
def reported(tmp_path: Path) -> Path:
    """The page of a run whose records hold markup and a prompt in both modes, and of one of SFT."""
    first, second = visits("x", "sum", (0, 0), (2, 1))
    a = write_run(tmp_path / "<i>a", [first, group_row(1, "y", 2), second, group_row(3, "y", 4)])
    b = write_run(tmp_path / "b", [group_row(1, "z", 0, responses=[])], mode="sft")
    page_of(a, b)
    return tmp_path / "page.html"


def test_the_page_holds_the_runs_and_no_markup_of_theirs(reported: Path) -> None:
    page = reported.read_text()
    text = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1]
    assert "<" not in text
    spaces = r"http://www\.w3\.org/(2000/svg|1998/Math/MathML)"  # names, never asked for
    assert "http" not in re.sub(spaces, "", page)
    content = json.loads(text)
    a, b = content["runs"]
    assert a["metrics"]["accuracy"] == [0.0, 0.5, 0.0, 0.5]
    text = a["groups"][0]["responses"][0]["text"]
    assert text[1:4:2] == [["4", "yes"], ["9", "no"]]
    assert text[-1][0].endswith("Answer: 0")  # an answer is no thinking
    assert [group["why"].split(" of ")[0] for group in a["groups"]] == ["None", "2", "1", "4"]
    assert "no gradient" in a["groups"][3]["why"]
    assert b["groups"][0]["why"].startswith("SFT imitates")
    assert [run["answers"][0]["cells"][1]["r_a"] for run in (a, b)] == [True, True]  # what changed
    assert {row["image"] for row in a["answers"]} <= content["images"].keys()
    assert "yes" in {kind for _, kind in a["answers"][0]["cells"][0]["text"]}
    assert content["table"]["rows"][0][1:3] == [0.5, 0.4]
    assert content["table"]["rows"][0][6:] == [4.0, "DyME", "0", "4", "4", "8"]


def test_charts_are_those_that_say_something(tmp_path: Path) -> None:
    a, b = (write_run(tmp_path / name, []) for name in "ab")
    one, two = (page_of(a)["charts"], page_of(a, b)["charts"])
    titles = [chart["title"] for chart in one]
    assert titles[0] == "Accuracy"
    assert [title for title in titles if "Accuracy: " in title] == ["Accuracy: sum"]
    assert "New combinations" in titles
    assert not {"KL", "In the format"} & {*titles}  # never used, never varying
    assert "Groups without a right response" not in titles  # the share memorized again
    assert [chart["key"] for chart in one if chart["relative"]] == []
    assert [chart["key"] for chart in two if chart["relative"]] == ["memorized", "reward"]


@pytest.mark.slow
def test_a_big_page_is_thinned(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(report, "PAGE_BYTES", 5e5)
    rows = [group_row(step, f"row {step % 370}", step >= 370) for step in range(400)]
    runs = [write_run(tmp_path / name, rows) for name in "ab"]
    short = write_run(tmp_path / "c", rows[:9])
    lines = [json.dumps(metrics_row(step)) for step in range(3000)]
    (runs[0] / "metrics.jsonl").write_text("\n".join(lines))
    content = page_of(*runs, short)
    assert 4e5 < (tmp_path / "page.html").stat().st_size < 8e5
    metrics = content["runs"][0]["metrics"]
    assert (metrics["step"][:2], set(metrics["accuracy"])) == ([5, 11], {0.25})
    steps = [[group["step"] for group in run["groups"]] for run in content["runs"]]
    assert len(steps[2]) == 9  # runs take turns
    assert {*range(370, 400), *range(30)} <= {*steps[0]}  # those that switched
    assert len(steps[0]) < 200
    gaps = [y - x for x, y in zip(steps[0], steps[0][1:], strict=False)]
    assert max(gaps) < 10  # the rest all over the run


@pytest.mark.parametrize("settings, right, mode, why", [
    ({"switch": "threshold:0.8"}, 1, "memorization", "--switch threshold:0.8 decides."),
    ({}, 1, "memorization", "a switch of its own decides."),  # replaced in Python
    ({"mode": "grpo"}, 0, "exploration", "GRPO compares the responses in any case, but all"),
    ({}, 2, "exploration", "compared with each other (Eq. 6)."),
    ({}, 4, "exploration", "no gradient"),
    ({}, 0, "memorization", "the reference is imitated (Eq. 6).")])
def test_the_page_says_why_a_group_is_in_its_mode(
        tmp_path: Path, settings: Row, right: int, mode: str, why: str) -> None:
    run = write_run(tmp_path / "a", [group_row(0, "x", right, mode=mode)], **settings)
    assert why in page_of(run)["runs"][0]["groups"][0]["why"]


PROBE = """<script>{
const out = {};
const change = (id, value) => { $(id).value = value; $(id).dispatchEvent(new Event("change")); };
const all = selector => [...document.querySelectorAll(selector)];
const count = selector => all(selector).length;
const texts = selector => all(selector).map(e => e.textContent);
out.begin = $("answered").textContent; out.headline = $("headline").textContent;
out.titles = texts("#story h3, #story h4"); out.equations = texts("#story .equation");
document.querySelectorAll("#story button")[1].click(); out.opened = $("place").textContent;
out.focused = document.activeElement.id; out.lanes = texts("#strip > button, #strip > span");
out.first = document.querySelector("main section").id;
out.imitated = all("#strip .lane").pop().querySelectorAll('rect[fill="var(--mem)"]').length;
out.charts = texts("#charts h4");
change("mode", "memorization"); out.memorized = $("place").textContent;
out.why = $("group").textContent;
change("mode", "exploration"); out.explored = $("place").textContent;
change("mode", ""); change("verdict", "some"); out.some = $("place").textContent;
out.response = document.querySelector("#group .facts").textContent;
change("verdict", ""); $("next").click(); out.next = $("place").textContent;
out.trace = $("group").textContent; out.history = texts("#history button");
$("history").querySelector("button").click(); out.back = $("place").textContent;
const lane = $("strip").querySelectorAll(".lane")[2], area = lane.getBoundingClientRect();
lane.dispatchEvent(new MouseEvent("click", {clientX: area.right}));
out.clicked = $("place").textContent;
$("which").value = 0; $("which").dispatchEvent(new Event("input"));
$("switched").click(); out.switched = $("place").textContent;
out.elements = count("#story b, #group script, #group b, #compared script, #compared b");
change("changed", ""); out.all = $("answered").textContent;
out.pictures = count("#compared img"); out.marks = count("#compared mark");
change("changed", "wrong"); out.wrong = $("answered").textContent;
$("step").value = 0; $("step").dispatchEvent(new Event("input")); out.at = $("at").textContent;
const svg = document.querySelectorAll("#charts svg[role]")[1], box = svg.getBoundingClientRect();
const middle = box.left + box.width * (42 + 290 / 2) / 350;
svg.dispatchEvent(new PointerEvent("pointerdown", {clientX: middle}));
out.tapped = $("at").textContent;
for (const part of document.querySelectorAll("details")) part.open = true;
out.focus = all("a, button, input, select, summary, [tabindex]").filter(
  e => { e.focus(); return !e.disabled && e.offsetParent && document.activeElement !== e; }).length;
out.unnamed = all("input, select").filter(e => !e.labels.length).length;
out.unnamed += all("img").filter(e => !e.alt).length;
out.wider = document.documentElement.scrollWidth - innerWidth;
change("run", 1); out.none = $("story").textContent; out.sft = $("group").textContent;
out.errors = errors;
document.body.replaceChildren("!OUT!" + btoa(encodeURIComponent(JSON.stringify(out))) + "!OUT!");
}</script></body>"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium here")
@pytest.mark.parametrize("width", [1280, 500])  # a window of Chromium's is no narrower
def test_the_page_works_in_a_browser(reported: Path, width: int) -> None:
    catch = "<head><script>const errors = []; onerror = e => errors.push(e);</script>"
    page = reported.read_text().replace("<head>", catch).replace("</body>", PROBE)
    (reported.parent / "probe.html").write_text(page)
    shown = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         f"--user-data-dir={reported.parent / 'browser'}", f"--window-size={width},900",
         "--virtual-time-budget=3000", "--dump-dom", (reported.parent / "probe.html").as_uri()],
        capture_output=True, text=True, timeout=60, check=True).stdout
    out = json.loads(urllib.parse.unquote(base64.b64decode(shown.split("!OUT!")[1]).decode()))
    assert out["errors"] == []
    assert (out["elements"], out["focus"], out["unnamed"]) == (0, 0, 0)
    assert out["wider"] <= 0
    assert out["headline"].startswith("All 2 runs end alike")
    assert out["titles"][0] == "“Q <b>?”: step 0, none of 4 right; step 2, 1 of 4 right"
    assert out["equations"][0] == "Eq. 6: max ra = max(0, 0, 0, 0) = 0, so memorize"
    assert out["equations"][2] == "Eq. 6: max ra = max(1, 0, 0, 0) = 1, so explore"
    assert out["opened"].startswith("Step 2; group 3 of 4")
    assert (out["focused"], out["first"]) == ("which", "modes")
    assert out["imitated"] == 1  # of four prompts, three explored
    assert out["lanes"] == ["<i>a", "b", "<i>a, kept prompts by kind:", "sum"]
    assert "Accuracy: sum" in out["charts"]
    assert out["memorized"] == "Step 0; group 1 of 1"
    assert "None of 4 responses is right" in out["why"]
    assert "not used" in out["why"]
    assert out["explored"] == out["some"] == "Step 1; group 1 of 3"
    assert out["response"].endswith("ra 1rt 0.500r 1.500")  # no r_f, and it adds up
    assert out["next"] == "Step 2; group 3 of 4; memorized before, at step 0"
    assert "which rt compares withred 4, blue <b>9 (not in the image)" in out["trace"]
    assert [text.split(", ", 1)[1] for text in out["history"]] == [
        "step 0: memorization, 0 of 4 right", "step 2: exploration, 1 of 4 right"]
    assert out["back"] == "Step 0; group 1 of 4"
    assert out["clicked"].startswith("Step 3; group 4 of 4")  # the last of its lane
    assert out["switched"] == out["next"]
    assert (out["begin"], out["all"], out["wrong"]) == ("2 of 8 rows", "8 of 8 rows", "5 of 8 rows")
    assert out["pictures"] == 8
    assert out["marks"] > 0
    assert (out["at"], out["tapped"]) == ("0", "2")
    assert out["none"].startswith("None: no kept prompt")
    assert "SFT imitates the reference" in out["sft"]


# ---- The story -----------------------------------------------------------------------------------


def test_the_story_is_of_the_hardest_kind_that_was_explored_after_all() -> None:
    easy, seldom = visits("t", "tallest", (0, 0), (2, 4)), visits("d", "difference", (0, 0), (3, 1))
    never, once = visits("s", "sum", (1, 0), (4, 0)), visits("u", "sum", (5, 0))
    assert told(*never, *once, *easy)["name"] == "t"
    assert told(*never, *easy, *seldom)["name"] == "d"
    longer = visits("v", "difference", (0, 0), (3, 1), (6, 1))
    assert told(*seldom, *longer)["name"] == "v"
    assert told(*seldom, *visits("w", "difference", (0, 0), (9, 3)))["name"] == "w"
    # A run that does not switch is not shown by the prompts that suit it.
    assert told(*never, *easy, mode="grpo")["name"] == "s"
    assert told(*once, *visits("x", "sum", (1, 1), (2, 0))) is None  # seen once; right at first
    closing = told(*seldom, *longer, *visits("y", "difference", (0, 0), (9, 0)))["closing"]
    assert "Of 3 kept prompts of this kind" in closing
    assert "2 were explored later" in closing


def test_the_story_goes_from_the_first_visit_to_the_last() -> None:
    tale = told(*visits("s", "sum", (2, 0), (4, 0), (7, 1), (9, 4)))
    assert tale["title"] == "“Q <b>?”: step 2, none of 4 right; step 9, 4 of 4 right"
    assert [chapter["title"] for chapter in tale["chapters"]] == [
        "1. The first visit: step 2, none of 4 right",
        "2. The first right responses: step 7, 1 of 4 right",
        "3. The last visit: step 9, 4 of 4 right"]
    assert "If none is, the reference is imitated" in tale["lead"]


def test_a_group_says_what_it_shows() -> None:
    cfg = dataclasses.asdict(Config()) | {"helper_rates": False, "by_eq_6": True}
    explored = described(cfg, group_row(7, "x", 1))
    switch, eq_2 = explored["equations"]  # by hand: (1.5 - 0.75) / 0.4330 = 1.73
    assert switch == {"kind": "switch"}
    assert (eq_2["k"], eq_2["reward"], eq_2["mean"]) == (0, 1.5, 0.75)
    assert eq_2["deviation"] == pytest.approx(0.433, abs=1e-3)
    assert eq_2["advantage"] == pytest.approx(1.7317, abs=1e-3)
    assert explored["remarks"][0] == "y1 is pushed up most (+1.73), y2 down most (−0.58)."
    assert explored["remarks"][1].endswith("0 of 1.")  # it says blue 9, where blue is 7
    assert "itself says 9" in explored["remarks"][2]
    assert "of 1 right responses 1 repeat it" in explored["remarks"][2]
    part = described(cfg, group_row(7, "x", 1, trace="red 5, blue 9"))  # of which it says one
    assert "itself says 5 and 9" in part["remarks"][2]
    assert "of 1 right responses 0 repeat it" in part["remarks"][2]
    helped = described(cfg | {"helper_rates": True}, group_row(7, "x", 1))
    assert helped["remarks"] == explored["remarks"][:2]  # a helper's r_t does not go by the trace
    released = group_row(7, "x", 1)
    released["responses"][0]["advantage"] = 5.0  # not by Eq. 2, as with --released-code
    assert described(cfg, released)["equations"] == [{"kind": "switch"}]
    assert described(cfg, group_row(9, "x", 4))["equations"][1] == {"kind": "alike", "reward": 1.5}
    imitated = group_row(2, "x", 0, target="red 3.\nAnswer: 0")
    for k, advantage in enumerate((-1.0, 1.7, -0.4, -0.3)):
        imitated["responses"][k]["advantage"] = advantage
    tempting, pseudo = described(cfg, imitated)["remarks"]
    assert tempting.startswith("Had they been compared all the same, y2 would have won")
    assert "says 3, which the image does not show" in pseudo
    assert described(cfg, imitated)["equations"][1] == {"kind": "imitate", "prompts": 8}


def test_the_story_looks_at_the_same_prompt_in_other_runs(tmp_path: Path) -> None:
    mine, other = visits("s", "sum", (0, 0), (3, 1)), visits("s", "sum", (1, 0), (2, 2))
    a = write_run(tmp_path / "a", mine)
    g = write_run(tmp_path / "g", other, mode="grpo")
    t = write_run(tmp_path / "t", [other[0] | {"responses": []}], mode="sft")
    u = write_run(tmp_path / "u", [row | {"responses": []} for row in other], mode="sft")
    assert page_of(g, a, t, u)["stories"][0]["elsewhere"] == [
        "g (GRPO): step 1, none of 4 right, memorization; step 2, 2 of 4 right, exploration.",
        "t (SFT): visits in SFT: 1, the last at step 1.",
        "u (SFT): visits in SFT: 2, the last at step 2."]


def shown_run(name: str, mode: str, *accuracy: float, **more: float) -> records.Run:
    """A run for the headline."""
    rows = [{"step": 75 * i, "accuracy": share, "any_format": 0.6, "accuracy_sum": share / 4,
             "any_format_sum": 0.1, "accuracy_value": 1.0} | more
            for i, share in enumerate(accuracy)]
    metrics = [{"memorized": share} for share in [0.8, 0.6] + [0.5] * 16 + [0.2, 0.0]]
    return SimpleNamespace(name=name, cfg={"mode": mode}, evaluations=rows, metrics=metrics)


def test_the_headline_is_what_happened() -> None:
    run = shown_run("a", "dyme", 0.0, 0.8, valid_thinking=0.4, thinking_judged=0.9)
    assert story.headline([run]) == (
        "In 75 steps of DyME, accuracy on held-out rows went from 0.00 to 0.80; on “sum”, where "
        "its base was worst, it went from 0.00 to 0.20. (Counting the last word of whatever it "
        "responds, the base was right in 0.60.) Right with valid thinking: 0.40. Rules can judge "
        "the thinking of 0.90. The share of prompts memorized went from 0.70 to 0.10 (first and "
        "last tenth).")
    several = story.headline([shown_run("g", "grpo", 0.0, 0.4), shown_run("a", "dyme", 0.0, 0.8),
                              shown_run("new", "sft", 0.0)])
    assert several.startswith("Of 2 runs, a ends highest: in 75 steps of DyME, accuracy")
    alike = story.headline([shown_run("a", "dyme", 0.0, 0.002), shown_run("b", "sft", 0.0, 0.0)])
    assert alike.startswith("All 2 runs end alike; a: in 75 steps of DyME")
    assert "(lowest: g, 0.40)" in several
    nothing = story.headline([shown_run("g", "grpo", 0.0, 0.0)])
    assert nothing.startswith("In 75 steps of GRPO, accuracy on held-out rows stayed at 0.00; on")
    assert story.headline([shown_run("new", "sft", 0.0)]).startswith("No run has been evaluated")


# ---- eval.py's table -----------------------------------------------------------------------------


def test_the_table_fits_100_columns_and_pools_seeds(capsys: Capture) -> None:
    names = ["runs/a-model-with-a-rather-long-name-s0", "runs/copy", "runs/b", "runs/other"]
    same = {"mode": "two-stage", "rows": 12345, "official": 0.5, "length": 1234.5, "pass@8": 0.25,
            "thinking_judged": 0.5, "prompt": "think", "any_format_sum": 0.75}
    same |= {f"accuracy_{kind}": 0.5 for kind in ("sum", "difference", "tallest", "shortest")}
    evaluation.print_table([
        same | {"model": name, "seed": int(name == "runs/b"), "accuracy": i / 10,
                "setting": name == "runs/other"} for i, name in enumerate(names)])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert out.replace("\n ", "").count("rules can judge the thinking of 0.500") == 4
    assert "accuracy_difference 0.500" in out and "any_format_sum" not in out
    assert "accuracy, 2 seeds: mean 0.150 (from 0.100 to 0.200)" in out  # the copy for the first
    assert out.count(", accuracy, ") == 1


def test_two_models_of_one_last_name_have_two_folders(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    policy = load_policy("tiny", parallel.select_device("cpu"))
    monkeypatch.setattr(evaluation, "load_policy", lambda *_: policy)
    monkeypatch.setattr(evaluation, "respond", lambda *_, **__: [{"response": ""}])
    monkeypatch.setattr(evaluation.thinking, "summarise", lambda _: {"rows": 1})
    monkeypatch.setattr(evaluation.settings, "check_model_name", lambda *_: None)
    for name in ("a/model", "b/model", str(tmp_path / "model")):
        evaluation.main([name, "--plain"])
    assert len([*Path("runs").glob("eval-*/predictions.jsonl")]) == 3
    assert Path("runs/eval-a--model").is_dir()


def test_a_run_is_scored_in_its_precision_and_up_to_its_length(
        tmp_path: Path, monkeypatch: Patch) -> None:
    saved, seen, limits = {"data": "toy", "image_edge": 0, "max_new_tokens": 7}, [], []
    policy = load_policy("tiny", parallel.select_device("cpu"))

    def respond(policy: Policy, rows: Any, tokens: int, *_: Any, **__: Any) -> list[Any]:
        seen.append(policy.autocast)
        limits.append(tokens)
        return [{"response": ""}]

    monkeypatch.setattr(evaluation, "load_policy", lambda *_: policy)
    monkeypatch.setattr(evaluation, "respond", respond)
    monkeypatch.setattr(evaluation.thinking, "summarise", lambda _: {"rows": 1})
    monkeypatch.setattr(evaluation, "pooling_key", lambda *_: "")
    (tmp_path / "checkpoint").mkdir()
    for precision in ("float32", "bf16"):
        monkeypatch.setattr(evaluation.settings, "read",
                            lambda *_, precision=precision: saved | {"precision": precision})
        evaluation.main([str(tmp_path), "--plain"])
    # It was trained in bf16, and up to 7 tokens.
    evaluation.main([str(tmp_path), "--plain", "--precision", "float32", "--max-new-tokens", "9"])
    assert limits == [7, 7, 9]
    assert seen[0] is seen[2] is contextlib.nullcontext
    assert seen[1]().fast_dtype == torch.bfloat16


@pytest.mark.parametrize("files, says", [
    (["config.json"], "has no best yet"), (["config.json", "metrics.jsonl"], "has no best yet"),
    (["metrics.jsonl"], "is not a run folder"), ([], "is not a run folder")])
def test_best_weights_that_are_not_there_are_told_in_a_line(
        tmp_path: Path, files: list[str], says: str, capsys: Capture) -> None:
    run = write_run(tmp_path / "a", [])
    for file in run.iterdir():
        if file.name not in files:
            file.unlink()
    assert run_folders.run_main(lambda: evaluation.main([str(run), "--best"])) == 2
    error = capsys.readouterr().err.strip()
    assert says in error
    assert "\n" not in error
