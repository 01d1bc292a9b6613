"""The toy, runs without images or with TensorBoard, which file loads which, the READMEs."""

import ast
import dataclasses
import itertools
import json
import re
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import dyme
import reward
from dyme import Config
from reward import Example, verify
from support import UserError, data, files, make_toy_base, picture, smollm2, sums, thinking, toy
from support import runs as run_folders
from support.make_toy_base import new_policy
from test_dyme import CPU, HERE, TEXT, Capture, Patch, run

# ---- The toy -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_toy_is_deterministic_and_splits_do_not_overlap() -> None:
    splits = [toy.make_examples(split) for split in ("train", "val", "test")]
    assert [len(split) for split in splits] == [2048, 512, 1024]
    assert [e.trace for e in splits[0]] == [e.trace for e in toy.make_examples("train")]
    facts = {e.facts for split in splits for e in split}
    assert len(facts) == 2048 + 512 + 1024


@pytest.mark.slow
def test_no_lesson_of_the_base_shows_a_chart_of_the_toy_or_what_it_lacks() -> None:
    facts = {e.facts for split in ("train", "val", "test") for e in toy.make_examples(split)}
    lessons = [lesson for lesson, _ in make_toy_base.lessons(0, 3400, 0.0)]
    asked = [lesson.question for lesson in lessons]
    # Numbers are added and subtracted, bars never are.
    assert any(re.search("the sum of [1-9] and [1-9]", question) for question in asked)
    assert not any(re.search("of [a-z]+ and|taller", question) for question in asked)
    charts = {lesson.image.__self__.facts() for lesson in lessons}
    assert len(charts) == 3400
    assert charts.isdisjoint(facts)
    heights = [[*lesson.image.__self__.values.values()] for lesson in lessons]
    repeated = [len({*of_chart}) == 3 for of_chart in heights]
    assert 0.27 < sum(repeated) / 3400 < 0.33
    for lesson, of_chart in zip(lessons, heights, strict=True):  # and the question has one answer
        if "tallest" in lesson.question:
            assert of_chart.count(max(of_chart)) == 1
        if "shortest" in lesson.question:
            assert of_chart.count(min(of_chart)) == 1
    left_to_chance = {chart.facts() for chart in toy.random_charts([4, 0], 3400)}
    assert not left_to_chance.isdisjoint(facts)


def test_the_vocabulary_has_every_word_of_the_lessons(tiny: dyme.Policy) -> None:
    for example, response in make_toy_base.lessons(0, 500, 0.5, 0.2, 0.4):
        ids = tiny.tokenizer(f"{example.question}\n{response}").input_ids
        assert tiny.tokenizer.unk_token_id not in ids


@pytest.mark.parametrize("more, share", [(0.0, 1 / 9), (0.2, 0.2 + 0.8 / 9)])
def test_a_share_of_calculations_is_of_equal_numbers(more: float, share: float) -> None:
    rng = np.random.default_rng(0)
    asked = [make_toy_base.calculation_lesson(rng, more)[0] for _ in range(2000)]
    pairs = [re.findall(r"\d", question) for question in asked]
    assert sum(a == b for a, b in pairs) / 2000 == pytest.approx(share, abs=0.02)


def test_in_a_share_of_calculations_a_number_is_only_carried_on() -> None:
    found = [(e.question, response) for e, response in make_toy_base.lessons(0, 1000, 0.0, 0.2, 0.4)
             if e.question.startswith("Calculate")]
    carried = [(question[10:-1], response) for question, response in found
               if re.fullmatch(r"Calculate \d+\.", question)]
    assert len(carried) / len(found) == pytest.approx(0.4, abs=0.06)
    assert {number for number, _ in carried} == {str(i) for i in range(19)}
    for number, response in carried:
        assert set(re.findall(r"\d+", response)) == {number}


@pytest.mark.slow
def test_the_base_sees_and_calculates_but_lacks_two_skills(examples: list[Example]) -> None:
    policy = dyme.load_policy("tiny", CPU)
    assert sum(file.stat().st_size for file in toy.BASE.iterdir()) < 2.5e6
    assert torch.get_num_threads() == 1
    summary = thinking.summarise(dyme.respond(policy, examples[:100], 48, 100))
    for kind in make_toy_base.KNOWN_KINDS:
        assert summary[f"any_format_{kind}"] >= 0.95
    for kind in ("sum", "difference"):
        assert summary[f"any_format_{kind}"] <= 0.1
    assert summary["accuracy"] <= 0.1


@pytest.mark.slow
def test_a_base_can_be_made_from_its_recipe(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(make_toy_base, "ROUNDS", ((3, 3e-3, 0.0, 0.0), (2, 1e-3, 0.2, 0.5)))
    monkeypatch.setattr(make_toy_base, "BATCH", 8)
    for name in "ab":
        make_toy_base.main(tmp_path / name)
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert a == b
    fresh = new_policy(0).model.state_dict()
    taught = dyme.load_policy(str(tmp_path / "a"), CPU).model.state_dict()
    assert any(not torch.equal(fresh[name], taught[name]) for name in fresh)


def test_new_combinations_are_what_their_names_say() -> None:
    values, rng = {"red": 2, "blue": 6, "green": 9, "cyan": 1}, np.random.default_rng(0)
    asked = {kind: [toy.new_question(kind, values, rng) for _ in range(60)] for kind in toy.NEW}
    found = {kind: {(e.question, e.answer) for e in asked[kind] if e} for kind in toy.NEW}
    assert {a for _, a in found["equal_sum"]} == {"2", "4", "12", "18"}
    assert {a for _, a in found["equal_difference"]} == {"0"}
    assert ("What is the sum of red, blue and cyan?", "9") in found["three_sum"]
    assert {a for _, a in found["three_sum"]} == {"9", "12", "16", "17"}
    assert found["extremes_sum"] == {("What is the sum of the tallest and the shortest?", "10")}
    rows = toy.make_new(each=8)
    assert [e.source for e in rows] == [f"new_{kind}" for kind in toy.NEW for _ in range(8)]
    assert max(int(e.answer) for e in toy.make_new()) == 18  # the vocabulary's last number


def test_new_combinations_count_in_figures_of_their_own() -> None:
    rows = [Example("q", "1", facts="red 1", source="value"),
            Example("q", "2", facts="red 1", source="new_equal_sum")]
    right = "It is red 1.\nConclusion: 1.\nAnswer: 1"
    summary = thinking.summarise([thinking.judge(e, right, True) | {"length": 5} for e in rows])
    assert (summary["accuracy"], summary["accuracy_new"], summary["rows"]) == (1.0, 0.0, 1)
    assert (summary["accuracy_value"], summary["accuracy_new_equal_sum"]) == (1.0, 0.0)
    alone = thinking.summarise([thinking.judge(rows[1], right, True) | {"length": 5}])
    assert (alone["accuracy"], alone["rows"]) == (0.0, 1)
    assert [len(data.held_out("toy", toy.make_examples("val"), 64)),
            len(data.held_out("sums", [rows[0]] * 80, 64))] == [80, 64]


def test_withheld_pairs_are_in_no_row_of_training_and_of_kinds_of_their_own_elsewhere() -> None:
    def pair(text: str, example: Example) -> tuple[int, ...]:
        values = dict(part.split() for part in text.split(", "))
        return tuple(sorted(int(values[bar]) for bar in values if bar in example.question))

    def told(example: Example) -> str:  # the observation of its trace
        return (example.trace or "").split("Observation: ")[1].split(".")[0]

    train, test = (toy.load("toy:withheld", split, "low") for split in ("train", "test"))
    two = [e for e in train if e.source in ("sum", "difference")]
    seen = {pair(text, e) for e in two for text in (e.facts, told(e))}
    out = {pair(e.facts, e) for e in test if e.source.startswith("withheld")}
    others = {pair(e.facts, e) for e in test if e.source in ("sum", "difference")}
    assert (len(out), len(seen), len(others)) == (12, 24, 24)
    assert not out & seen
    assert not out & others
    every = toy.make_examples("train", "low")
    assert {e.name for e in every} - {e.name for e in train} == {
        e.name for e in every if e.source in ("sum", "difference")
        and {pair(e.facts, e), pair(told(e), e)} & out}
    assert [e.question for e in test] == [e.question for e in toy.make_examples("test")]
    as_usual, withheld = (dyme.parse_config(["--data", name]) for name in ("toy", "toy:withheld"))
    assert (withheld.lr, withheld.steps) == (as_usual.lr, as_usual.steps)


@pytest.mark.slow
def test_the_base_has_the_skills_that_the_toy_builds_on() -> None:
    rows = toy.load("toy:skills", "test", "low")
    judged = dyme.respond(dyme.load_policy("tiny", CPU), rows, 48, 64, prompt="{question}")
    assert Counter(row["source"] for row in judged if row["any_format"]) == {
        "calculate": 72, "describe": 128}
    with pytest.raises(UserError, match="give toy or toy:withheld; toy:new and toy:skills are"):
        toy.load("toy:skills", "train", "low")


@pytest.mark.slow
@pytest.mark.parametrize("traces, share", [("high", 0.0), ("medium", 0.35), ("low", 0.7)])
def test_toy_traces_are_fluent_and_ungrounded_as_often_as_said(traces: str, share: float) -> None:
    examples, pseudo = toy.make_examples("train", traces)[:512], 0
    for e in examples:
        grounded, quoted = thinking.groundedness(e.trace, e.facts)
        pseudo += grounded < quoted
        assert verify(reward.reference_response(e), e).correct
    assert pseudo / len(examples) == pytest.approx(share, abs=0.06)


def test_toy_bars_can_be_read_off_the_picture() -> None:
    chart = toy.Chart({"red": 3, "blue": 9, "green": 1, "cyan": 5})
    pixels = np.array(chart.draw())
    for i, (name, value) in enumerate(chart.values.items()):
        column = pixels[:, 16 * i + 7]
        color = [int(toy.COLORS[name][j:j + 2], 16) for j in (1, 3, 5)]
        assert (column[:52] == color).all(1).sum() == 5 * value + 1


# ---- Runs of other kinds -------------------------------------------------------------------------

TEMPLATE = """{% for m in messages -%}
<|im_start|>{{ m['role'] }}: {{ m['content'] }}<end_of_utterance>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"""


@pytest.mark.slow
def test_a_text_only_policy_takes_the_same_path(tmp_path: Path, examples: list[Example]) -> None:
    llm = tmp_path / "llm"
    tokenizer = PreTrainedTokenizerFast(  # the toy's, which belongs to a processor, alone
        tokenizer_object=new_policy(0).tokenizer.backend_tokenizer, chat_template=TEMPLATE,
        eos_token="<end_of_utterance>", pad_token="<pad>", unk_token="<unk>")
    torch.manual_seed(0)
    own = {"vocab_size": len(tokenizer), "eos_token_id": 3}
    config = AutoConfig.for_model("llama", **(TEXT | own))
    AutoModelForCausalLM.from_config(config).save_pretrained(llm)
    tokenizer.save_pretrained(llm)
    rows = [{"question": e.question, "answer": e.answer, "hint": e.trace} for e in examples[:12]]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    flags = ["--model", str(llm), "--data", str(tmp_path / "rows.json"), "--steps", "2"]
    assert run(tmp_path, "run", *flags) == 0
    assert files.read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]["grad_norm"] > 0
    policy = dyme.load_policy(str(tmp_path / "run"), CPU)
    with pytest.raises(UserError, match="cannot see"):
        dyme.encode_prompts(policy, examples[:1], room=0)


# ---- sums, and the model for it ------------------------------------------------------------------


def test_problems_and_their_results_by_hand() -> None:
    problem = sums.Problem(7, (("+", 5), ("-", 4), ("*", 2)))
    assert problem.results() == [12, 8, 16]
    assert problem.numbers() == [7, 5, 4, 2]
    assert problem.is_sound()
    assert not sums.Problem(7, (("-", 7),)).is_sound()  # a number twice, and nothing left
    assert not sums.Problem(9, (("-", 4), ("-", 5))).is_sound()  # nothing left
    assert not sums.Problem(60, (("*", 2),)).is_sound()
    first = itertools.islice(sums.problems(new=False), 600)
    assert np.mean([len(found.steps) == 2 for found in first]) == pytest.approx(0.7, abs=0.05)


@pytest.mark.slow
def test_splits_share_no_problem_and_new_orders_are_never_trained() -> None:
    def steps(data: str, split: str) -> list[tuple[str, ...]]:
        found = sums.make_examples(data, split, "high")
        return [tuple(re.findall(r"\d+|[-+*]", (e.trace or "").split("Reasoning")[1]))
                for e in found]

    train, val, test = (steps("sums", split) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (2048, 512, 512)
    assert len({*train, *val, *test}) == 2048 + 512 + 512
    new = [("*", "+"), ("-", "-")]

    def has_new(problem: tuple[str, ...]) -> bool:
        signs = [x for x in problem if not x.isdigit()]
        return any(pair in new for pair in itertools.pairwise(signs))

    assert not any(map(has_new, train + val + test))
    assert all(map(has_new, steps("sums:new", "test")))


@pytest.mark.slow
@pytest.mark.parametrize(("traces", "share"), [("high", 1.0), ("medium", 0.65), ("low", 0.3)])
def test_traces_of_sums_are_right_and_as_bad_as_asked_for(traces: str, share: float) -> None:
    rows = sums.make_examples("sums", "val", traces)[:256]
    judged = [thinking.judge(e, reward.reference_response(e), finished=True) for e in rows]
    assert all(row["accuracy"] for row in judged)
    assert np.mean([not row["thinking_fault"] for row in judged]) == pytest.approx(share, abs=0.06)
    for example in rows:
        assert example.trace
        quoted, asked = (set(re.findall(r"\d+", text)) for text in (
            example.trace.split("Reasoning")[0], example.question))
        assert quoted == asked or not quoted & asked
    ends = [re.findall(r"\d+", (e.trace or "").split("Conclusion")[0])[-1] for e in rows]
    # The answer follows from numbers that are not in the question too, where it can.
    assert np.mean([end == e.answer for end, e in zip(ends, rows, strict=True)]) > 0.9


def test_sums_has_a_preset_of_its_own() -> None:
    cfg = dyme.parse_config(["--model", "SmolLM2-135M", "--data", "sums", "--steps", "3"])
    assert (cfg.steps, cfg.prompts, cfg.max_new_tokens, cfg.epochs) == (3, 4, 96, 0.0)
    assert cfg.out == "runs/SmolLM2-135M-sums-dyme-s0"


def test_a_model_is_made_of_a_gguf_file_or_it_is_said_why_not(
        tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    def said(*argv: str) -> str:
        monkeypatch.setattr(sys, "argv", ["smollm2", *argv])
        assert run_folders.run_main(smollm2.main) == 2
        return capsys.readouterr().err

    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    assert "pip install gguf" in said(str(tmp_path / "new"))
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: name)
    (tmp_path / "file").write_text("mine")
    assert "not empty" in said(str(tmp_path))
    assert "no such file" in said(str(tmp_path / "new"), str(tmp_path / "none.gguf"))
    assert "cannot be read as a model" in said(str(tmp_path / "new"), str(tmp_path / "file"))
    assert not (tmp_path / "new").exists()


def test_a_missing_tensorboard_is_told_before_the_run(
        runs: Path, monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert run(runs, "a", "--steps", "2", "--tensorboard") == 2
    assert "pip install tensorboard" in capsys.readouterr().err


@pytest.mark.slow
def test_tensorboard_gets_every_number(runs: Path, monkeypatch: Patch) -> None:
    written, opened = [], []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            opened.append((folder, purge_step))

        def add_scalar(self, *point: Any) -> None:
            written.append(point)

        def flush(self) -> None:
            pass

    board = SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "tensorboard", SimpleNamespace(__spec__="found"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    assert run(runs, "b", "--steps", "2", "--tensorboard") == 0
    assert opened == [(runs / "b" / "tensorboard", 1)]  # the evaluation before it stays
    rows = files.read_jsonl(runs / "b" / "metrics.jsonl")
    assert ("metrics/loss", rows[1]["loss"], 1) in written
    assert ("evaluations/accuracy", 0.0, 2) in written
    assert not any(name.endswith(("mode", "step")) for name, *_ in written)


# ---- What loads what ----------------------------------------------------------------------------

PROBE = """
import contextlib, json, sys
import dyme
policy, found = dyme.load_policy("tiny", dyme.torch.device("cpu")), []
for flags in ("--plain", "--plain --switch anneal", "", sys.argv[1]):
    with contextlib.suppress(dyme.UserError):  # no helper answers
        dyme.make_trainer(dyme.parse_config(["--device", "cpu", *flags.split()]), policy)
    found.append([module.__file__ for module in sys.modules.values() if getattr(
        module, "__file__", None)])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> list[set[str]]:
    """Files of ours that a process has loaded after trainers plain, with a switch, fast, helped."""
    out = tmp_path_factory.mktemp("run") / "x"
    helper = f"--helper-url http://localhost:1/v1 --helper-model m --out {out}"
    done = subprocess.run([sys.executable, "-c", PROBE, helper], cwd=HERE, capture_output=True,
                          text=True, check=True)
    stages = []
    for paths in json.loads(done.stdout.splitlines()[-1]):
        ours = [Path(path) for path in paths if Path(path).is_relative_to(HERE)]
        stages.append({str(file.relative_to(HERE)) for file in ours})
    return stages


@pytest.mark.slow
def test_extras_are_loaded_where_their_flag_is_read(loaded: list[set[str]]) -> None:
    plain, switched, fast, helped = loaded
    assert len(plain) <= 10, sorted(plain)
    assert switched - plain == {"support/ablations.py"}
    assert fast - switched == {"support/fast.py"}
    assert "support/full_dyme.py" in helped - fast


@pytest.mark.slow
def test_arrows_run_one_way(loaded: list[set[str]]) -> None:
    """No file that dyme.py loads imports it, at its top or in a function, but to name its types."""
    for file in loaded[0] - {"dyme.py"}:
        nodes = [*ast.walk(ast.parse((HERE / file).read_text()))]
        types = [node for node in nodes if isinstance(node, ast.If)
                 and "TYPE_CHECKING" in ast.unparse(node.test)]
        apart = {id(inner) for node in types for inner in ast.walk(node)}
        for node in nodes:
            if id(node) not in apart and isinstance(node, ast.Import | ast.ImportFrom):
                assert getattr(node, "module", None) != "dyme", file
                assert "dyme" not in [alias.name for alias in node.names], file


# ---- The README's picture ------------------------------------------------------------------------


@pytest.mark.slow
def test_the_picture_marks_false_numbers_and_shows_a_question_that_tells_modes_apart(
        tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    text = "red 4, blue 2. 4 + 7 = 11. Answer: 11"
    assert picture.marks(text, "red 4, blue 7", "What is the sum of red and blue?") == [
        ("red ", picture.TEXT), ("4", picture.TRUE), (", blue ", picture.TEXT),
        ("2", picture.FALSE), (". ", picture.TEXT), ("4", picture.TRUE), (" + ", picture.TEXT),
        ("7", picture.TRUE), (" = ", picture.TEXT), ("11", picture.TRUE),
        (". Answer: 11", picture.TEXT)]
    rows = toy.make_examples("val")[:10]
    for mode, right in (("dyme", True), ("sft", False)):
        run_folder = tmp_path / mode
        run_folder.mkdir()
        saved = dataclasses.asdict(Config(mode=mode, lr=1e-3))  # type: ignore[arg-type]
        (run_folder / "config.json").write_text(json.dumps(saved))
        steps = [{"step": 0, "accuracy": 0.0, "any_format": 0.4},
                 {"step": 9, "accuracy": 0.5, "any_format": 0.5}]
        files.write_jsonl(run_folder / "evaluations.jsonl", steps)
        for step in (0, 9):
            good = right and step == 9
            files.write_jsonl(run_folder / f"held-out-{step}.jsonl", [
                {"name": e.name, "source": e.source, "any_format": good, "valid_thinking": good,
                 "answer": e.answer, "response": e.trace + f"\nAnswer: {e.answer}"} for e in rows])
    folders = [tmp_path / "dyme", tmp_path / "sft"]
    base, ours = (picture.held_out(folders[0], first) for first in (True, False))
    named = {e.name: e for e in rows}
    first, second = (e for e in rows if e.source == "sum")
    assert first.answer in first.facts  # a bar is as high: it may have been read off
    assert picture.choose(base, ours, base, named) == second.name
    with pytest.raises(UserError, match="no sum that"):  # the other run has it right too
        picture.choose(base, ours, ours, named)
    monkeypatch.setattr(sys, "argv", ["picture", str(tmp_path / "p.png"), *map(str, folders)])
    assert run_folders.run_main(picture.main) == 0
    assert Image.open(tmp_path / "p.png").size == picture.SIZE
    monkeypatch.setattr(sys, "argv", ["picture", str(tmp_path / "p.png"), *[str(folders[1])] * 2])
    assert run_folders.run_main(picture.main) == 2
    assert "no sum that" in capsys.readouterr().err


# ---- The READMEs ---------------------------------------------------------------------------------


PAGES = ("README.md", "support/README.md", "support/DETAILS.md", "support/SUMS.md")


def readmes() -> str:
    return "".join((HERE / page).read_text() for page in PAGES)


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    assert len((HERE / "README.md").read_text().split()) <= 1800
    for page in (*PAGES, "support/COURSE.md", "support/CONTRIBUTING.md"):
        for link in re.findall(r"\]\((?!https?:)([^)]+)\)", (HERE / page).read_text()):
            file, _, section = link.partition("#")
            target = (HERE / page).parent / file if file else HERE / page
            assert target.exists(), f"{page}: {link}"
            if section:
                heads = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
                names = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in heads]
                assert section in names, f"{page}: {link}"


def defined() -> set[str]:
    """What our code defines: functions, classes, variables, fields, parameters; and its strings."""
    found = set()
    for file in HERE.glob("**/*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.arg):
                found.add(node.arg)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


@pytest.mark.slow
def test_help_knows_every_flag_and_the_readmes_name_nothing_else(capsys: Capture) -> None:
    flags = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(Config)}
    with pytest.raises(SystemExit):
        dyme.parse_config(["--help"])
    shown = capsys.readouterr().out
    for flag in flags:
        assert f"{flag} " in shown
    others = {"--help", "--nproc", "--logdir", "--reasoning"}  # of other programs
    named = {*re.findall(r"--[a-z][a-z-]+", readmes())}
    assert sorted(named - flags - others - defined()) == []


def test_functions_and_metrics_that_the_readmes_name_exist() -> None:
    names = {*re.findall(r"`([a-z]+_[a-z_]+)`", readmes())}
    assert len(names) > 30
    assert sorted(names - defined()) == []


def test_the_glossary_knows_every_metric_that_is_written(runs: Path) -> None:
    assert run(runs, "a", "--steps", "1") == 0
    glossary = readmes()
    for key in files.read_jsonl(runs / "a" / "metrics.jsonl")[0]:
        assert f"`{key}`" in glossary, key
    evaluated = files.read_jsonl(runs / "a" / "evaluations.jsonl")[0]
    assert evaluated.keys() >= {"accuracy", "any_format", "valid_thinking", "in_format",
                                "groundedness", "accuracy_sum"}


@pytest.mark.slow
def test_the_notebooks_cells_run_and_say_what_they_show(
        monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.chdir(HERE)
    cells = json.loads((HERE / "support" / "walkthrough.ipynb").read_text())["cells"]
    names: dict[str, Any] = {}
    texts = []
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "cell", "exec"), names)
            shown = "".join("".join(x.get("text", [])) for x in cell["outputs"])
            texts.append((capsys.readouterr().out, shown))
    if names["explore"].tolist() != [True, False]:
        pytest.skip("this processor rounds to other texts than those that are shown")
    for said, shown in texts:  # the same, but for what another processor rounds
        assert re.sub(r"[^a-z]+", "", said)[:12] == re.sub(r"[^a-z]+", "", shown)[:12]
    assert names["done"].explore.tolist() == ((names["done"].r_a == 1).sum(1) > 2).tolist()


@pytest.mark.slow
def test_the_readmes_walk_through_gives_the_numbers_of_its_table(
        tmp_path: Path, monkeypatch: Patch) -> None:
    readme = (HERE / "support" / "DETAILS.md").read_text()
    code = re.search(r"```python\n(import torch\n.*?)```", readme, re.DOTALL)[1]
    command = re.search(r"python dyme.py (--steps .*--out runs/walk)", readme)[1]
    monkeypatch.chdir(tmp_path)
    flags = [*command.split(), "--device", "cpu", "--eval-rows", "1", "--save-every", "0"]
    assert run_folders.run_main(lambda: dyme.train(dyme.parse_config(flags))) == 0
    (tmp_path / "walk.py").write_text(code)
    names = runpy.run_path(str(tmp_path / "walk.py"))
    done, weights = names["done"], names["weights"].tolist()
    # The rows of one response: r_a, r_t, r, advantage, weight; four of the first prompt, then two.
    number = r"([-+]?[\d.]+)"
    rows = re.findall(rf"^\| y\d \|.*\| {number} \| {number} \| {number} \| {number} \| (\S+) \|$",
                      readme, re.MULTILINE)
    assert len(rows) == 6
    shown = torch.tensor([[float(x) for x in row[:4]] for row in rows])  # (6, 4)
    r_a, r_t, rewards, advantages = shown.T
    assert torch.allclose(r_a + r_t, rewards, atol=0.006)
    assert torch.allclose(dyme.group_advantages(rewards[None, :4])[0], advantages[:4], atol=0.02)
    printed = torch.tensor([float(weight) for *_, weight in rows[:4]])
    assert torch.allclose(advantages[:4] / (4 * 2), printed, atol=0.0013)  # A / (K P)
    if not torch.allclose(done.rewards.flatten()[:6], rewards, atol=0.006):
        pytest.skip("this processor rounds to other texts than those of the table")
    assert done.explore.tolist() == [True, False]
    assert weights[4] == 0.5
    before, after = re.search(r"(0\.\d{3}) before the update, (0\.\d{3}) after it", readme).groups()
    assert float(before) == pytest.approx(done.metrics["loss"], abs=0.00051)
    again = dyme.policy_loss(names["logprobs"], names["mask"], names["weights"],
                             torch.tensor([s.explore for s in done.sequences]))
    assert float(after) == pytest.approx(again.item(), abs=0.00051)
