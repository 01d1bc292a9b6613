"""Tests of what comes from outside: rows, images and traces that are odd or broken, the hub, the commands of the READMEs."""

import dataclasses
import io
import json
import re
import shlex
import socket
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

import dyme
import eval as evaluation
from dyme import Config, Policy
from reward import Example, reference_response
from support import UserError, data, hub, models, references, rows, thinking, toy
from support import runs as run_folders
from support.test_support import make_chartqa, write_image
from test_dyme import CPU, SHARED, Capture, Patch, Row, run

# ---- Images --------------------------------------------------------------------------------------


def opened(image: Image.Image, folder: Path, suffix: str, **options: Any) -> np.ndarray:
    image.save(folder / f"picture{suffix}", **options)
    return np.asarray(rows.image_opener(folder / f"picture{suffix}", "row 1")())


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparent_pictures_stand_on_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    options = {}
    if mode == "P":
        image, options = Image.new("P", (2, 1)), {"transparency": 0}
        image.putpalette([0, 0, 0, 0, 0, 0])
        image.putpixel((1, 0), 1)
    if mode == "RGB":  # one colour stands for "transparent"
        image, options = Image.new("RGB", (2, 1), (9, 9, 9)), {"transparency": (9, 9, 9)}
        image.putpixel((1, 0), (0, 0, 0))
    image = image.convert(mode) if mode != "P" else image
    assert opened(image, tmp_path, ".png", **options).tolist() == [[[255] * 3, [0] * 3]]


@pytest.mark.parametrize("suffix, values, dtype, shown", [
    (".png", [0, 32768, 65535], np.uint16, [0, 128, 255]),
    (".png", [0, 100, 200], np.uint16, [0, 0, 1]),  # dark, not bright: its white is known
    (".tif", [0.0, 0.5, 1.0], np.float32, [0, 128, 255]),
    (".tif", [0.0, 100.0, 255.0], np.float32, [0, 100, 255]),
    (".tif", [0, 32768, 65535], np.int32, [0, 128, 255]),
    (".tif", [np.nan, -1.0, 1.0], np.float32, [0, 0, 255]),
])
def test_deep_pictures_are_scaled(tmp_path: Path, suffix: str, values: list[float], dtype: type, shown: list[int]) -> None:
    image = Image.fromarray(np.array([values], dtype))
    assert opened(image, tmp_path, suffix)[0, :, 0].tolist() == shown


def test_a_photo_is_upright_and_broken_notes_cost_nothing(tmp_path: Path) -> None:
    notes = Image.Exif()
    notes[0x112] = 6  # the camera was held on its side
    image = Image.new("RGB", (4, 2), "white")
    image.putpixel((0, 1), (0, 0, 0))
    upright = opened(image, tmp_path, ".png", exif=notes)
    assert upright.shape == (4, 2, 3) and (upright[0, 0] == 0).all()  # its lower left is now its upper left
    broken = PngImagePlugin.PngInfo()
    broken.add_text("Raw profile type exif", "\nexif\n4\nzz")
    assert opened(image, tmp_path, ".png", pnginfo=broken).shape == (2, 4, 3)


# ---- Rows ----------------------------------------------------------------------------------------


def test_a_field_that_is_likely_a_slip_is_named(tmp_path: Path) -> None:
    row = {"question": "q", "answer": "a", "image_id": 3}
    for slip, meant in (("img", "image"), ("hints", "trace"), ("fact", "facts")):
        (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row | {"question": f"q{i}", slip: "x"}) for i in range(3)))
        with pytest.raises(UserError, match=f"row 1: `{slip}` is not read; did you mean `{meant}`"):
            data.load_data(str(tmp_path / "rows.jsonl"), "train")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row | {"question": f"q{i}"}) for i in range(3)))
    assert len(data.load_data(str(tmp_path / "rows.jsonl"), "train")) == 2


def test_half_a_character_is_replaced_and_its_row_named(runs: Path, capsys: Capture) -> None:
    smile = "\U0001f600"
    found = [{"question": f"What is {i}? {smile}", "answer": "red", "hint": f"Red. {smile}"} for i in range(12)]
    found[4] |= {"question": "What \ud83d?", "hint": "Half \udc00."}
    (runs / "rows.json").write_text(json.dumps(found))  # JSON writes them as \ud83d
    examples = rows.read_rows(runs / "rows.json", "test")
    assert examples[4].question == "What \ufffd?" and examples[4].trace == "Half \ufffd." and smile in examples[5].trace
    assert "rows.json: 1 rows hold half a character" in (said := capsys.readouterr().out) and "the first is row 5" in said
    flags = ["--model", str(toy.BASE), "--data", str(runs / "rows.json"), "--steps", "2", "--mode", "sft"]
    assert run(runs, "a", *flags) == 0 == run(runs, "a", "--resume")


def spoil(archive: Path, name: str, how: str) -> None:
    """Break a file within a zip: its bytes, or as if it were encrypted."""
    whole = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as file:
        info = file.getinfo(name)
    if how == "encrypted":  # a flag, in the file's own header and in the list at the end
        whole[info.header_offset + 6] |= 1
        whole[whole.rindex(b"PK\1\2", 0, whole.rindex(name.encode())) + 8] |= 1
    else:
        start = info.header_offset + 30 + len(name)
        whole[start:start + info.compress_size] = b"\xff" * info.compress_size
    archive.write_bytes(bytes(whole))


@pytest.mark.parametrize("how", ["corrupt", "encrypted"])
@pytest.mark.parametrize("name", ["train_human.json", "tables/human2.csv", "png/human2.png"])
def test_broken_files_in_a_zip_are_one_line(tmp_path: Path, name: str, how: str) -> None:
    root = make_chartqa(tmp_path / "ChartQA Dataset")
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in root.rglob("*"):
            file.write(path, path.relative_to(tmp_path))
    spoil(archive, f"ChartQA Dataset/train/{name}", how)
    with pytest.raises(UserError, match=f"{Path(name).name}.*(cannot be read|unreadable).*" + ("encrypt" if how == "encrypted" else "")):
        for example in data.load_data(str(archive), "train"):
            example.image()


def test_no_permission_to_read_is_one_line(tmp_path: Path, monkeypatch: Patch) -> None:
    def refuse(path: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "rows.json").write_text("[]")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        with pytest.raises(UserError, match="rows.json: cannot be read .*Permission denied"):
            data.load_data(str(tmp_path / "rows.json"), "train")
    monkeypatch.setattr(Path, "is_dir", refuse)  # a folder that may not be entered
    with pytest.raises(UserError, match="--data .*: cannot be read .*Permission denied"):
        data.load_data(str(tmp_path), "train")


def test_what_a_terminal_cannot_show_is_shown_by_its_code(monkeypatch: Patch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii", write_through=True))
    assert run_folders.run_main(lambda: print("4 \u2192 5")) == 0
    assert shown.getvalue() == b"4 \\u2192 5\n"


# ---- Domains -------------------------------------------------------------------------------------

AOKVQA = {"split": "train", "image_id": 7, "question": "What?", "choices": ["cat", "dog"], "correct_choice_idx": 1,
          "direct_answers": ["hound"] * 4 + ["dog"] * 2, "rationales": ["It barks.", "It is a dog."]}


def write_aokvqa(folder: Path, found: list[Row]) -> str:
    (folder / "aokvqa_v1p0_train.json").write_text(json.dumps(found))
    write_image(folder / "train2017" / "000000000007.jpg")
    return f"aokvqa:{folder}"


def test_aokvqa_has_two_named_scores_and_the_releases_target(tmp_path: Path) -> None:
    found = [AOKVQA | {"question": f"What {i}?"} for i in range(11)]
    del found[3]["choices"], found[3]["correct_choice_idx"]
    examples = data.load_data(write_aokvqa(tmp_path, found), "train")
    examples.sort(key=lambda e: int(re.search(r"\d+", e.question)[0]))
    with_choices, without = (next(e for e in examples if e.question == f"What {i}?") for i in (1, 3))
    # The correct choice and the longest rationale; without choices, the commonest answer.
    assert (with_choices.answer, without.answer, with_choices.trace) == ("dog", "hound", "It is a dog.")
    judged = [thinking.judge(e, "Answer: Dog.", True) | {"length": 1} for e in (with_choices, without)]
    assert judged[0]["official"] == pytest.approx(2 / 3) and judged[0]["scores"] == {"any_match": 1.0, "multiple_choice": 1.0}
    judged.append(thinking.judge(without, "Answer: cat", True) | {"length": 1})
    summary = thinking.summarise(judged)
    assert summary["official"] == pytest.approx(4 / 9) and summary["any_match"] == pytest.approx(2 / 3)
    assert summary["multiple_choice"] == 1.0  # of the one row that has choices


@pytest.mark.parametrize("change", [{"correct_choice_idx": 2}, {"correct_choice_idx": -1}, {"correct_choice_idx": None},
                                    {"direct_answers": []}, {"choices": 3}, {"rationales": [1]}])
def test_bad_aokvqa_rows_are_named(tmp_path: Path, change: Row) -> None:
    source = write_aokvqa(tmp_path, [AOKVQA, AOKVQA | change])
    with pytest.raises(UserError, match="aokvqa_v1p0_train.json row 2: is not a row of aokvqa"):
        data.load_data(source, "train")


def test_a_slake_answer_without_a_word_must_be_met_exactly(tmp_path: Path) -> None:
    row = {"img_name": "1.jpg", "question": "Sign?", "answer": "+", "q_lang": "en", "answer_type": "OPEN"}
    (tmp_path / "test.json").write_text(json.dumps([row]))
    write_image(tmp_path / "imgs" / "1.jpg")
    example, = data.load_data(f"slake:{tmp_path}", "test")
    assert [thinking.judge(example, f"Answer: {a}", True)["official"] for a in ("+", "-", "plus")] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("change", [{"answer": ""}, {"question": None}, {"question": " "}])
def test_a_row_without_question_or_answer_is_named(tmp_path: Path, change: Row) -> None:
    row = {"img_name": "1.jpg", "question": "Sign?", "answer": "yes", "q_lang": "en", "answer_type": "CLOSED"}
    (tmp_path / "test.json").write_text(json.dumps([row, row | change]))
    write_image(tmp_path / "imgs" / "1.jpg")
    with pytest.raises(UserError, match="test.json row 2: is not a row of slake"):
        data.load_data(f"slake:{tmp_path}", "test")


def test_a_zip_of_images_is_opened_once(tmp_path: Path, monkeypatch: Patch) -> None:
    write_image(tmp_path / "1.jpg")
    with zipfile.ZipFile(tmp_path / "imgs.zip", "w") as file:
        file.write(tmp_path / "1.jpg", "imgs/1.jpg")
    row = {"img_name": "1.jpg", "question": "Sign?", "answer": "yes", "q_lang": "en", "answer_type": "OPEN"}
    (tmp_path / "test.json").write_text(json.dumps([row] * 9))
    openings = []
    monkeypatch.setattr(zipfile, "Path", lambda file, make=zipfile.Path: openings.append(file) or make(file))
    assert len(data.load_data(f"slake:{tmp_path}", "test")) == 9 and len(openings) == 1


def test_official_accuracy_forgives_a_full_stop() -> None:
    for said, answer, right in (("Yes.", "Yes", 1), ("0.5.", "0.5", 1), (".5", "0.5", 1), ("U.S.", "U.S.", 1), ("Yes", "No", 0)):
        assert thinking.judge(Example("q", answer), f"So.\nAnswer: {said}", True)["official"] == right
        assert thinking.judge(Example("q", answer), said, True)["official"] == right  # --prompt direct


# ---- Traces --------------------------------------------------------------------------------------


def test_hints_leave_out_training_rows_without_a_trace(tmp_path: Path, capsys: Capture) -> None:
    root = make_chartqa(tmp_path / "data")
    hints = [{"question": "Total in 2020? (0)", "answer": "7", "hint": "Look."},
             {"question": "Total in 2020? (1)", "answer": "7", "hint": "One."},
             {"question": "Total in 2020? (1)", "answer": "7", "hint": "Another."},
             {"question": "Total in 2020? (2)", "answer": "8", "hint": "Wrong."}]
    (tmp_path / "hints.json").write_text(json.dumps(hints))
    train = data.load_data(str(root), "train", hints=str(tmp_path / "hints.json"))
    assert [(e.trace, e.facts) for e in train] == [("Look.", "2019: Total = 5\n2020: Total = 7")]
    assert "1 training rows have a trace; the other 5 are left out" in capsys.readouterr().out
    assert len(data.load_data(str(root), "val", hints=str(tmp_path / "hints.json"))) == 12  # all are held out
    assert len(data.load_data(str(root), "train")) == 6
    for bad, says in (("[]", "no trace for any row"), ('[{"question": 3}]', "row 1: is not"), ("{}", "holds no list")):
        (tmp_path / "hints.json").write_text(bad)
        with pytest.raises(UserError, match=f"hints.json.*{says}"):
            data.load_data(str(root), "train", hints=str(tmp_path / "hints.json"))


def test_traces_of_aokvqa_bring_facts_and_those_of_gsm8k_lose_their_marks(tmp_path: Path) -> None:
    # The same question of two pictures: a row's own rationale tells which trace is its.
    found = [AOKVQA | {"question": f"What {i}?"} for i in range(10)] + [AOKVQA | {"rationales": ["A dog it is."]}]
    hints = [{"question": "What?", "answer": "dog", "hint": hint, "visual_fact": f'{{"description": "{hint}"}}',
              "choices": ["cat", "dog"], "direct_answers": "['dog']"} for hint in ("A cow.", "A dog it is.")]
    hints.append({"question": "What 4?", "answer": "dog", "hint": "So.", "visual_fact": {"error": "failed"}})
    (tmp_path / "hints.json").write_text(json.dumps(hints))
    source = write_aokvqa(tmp_path, found)
    examples = data.load_data(source, "train") + data.load_data(source, "val")
    joined = references.join(examples, str(tmp_path / "hints.json"))
    assert {(e.question, e.trace, e.facts) for e in joined} == {
        ("What?", "A dog it is.", '{"description": "A dog it is."}'), ("What 4?", "So.", None)}
    row = {"question": "How many?", "answer": "2+3=<<2+3=5>>5.\n#### 1,500"}
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row | {"question": f"{i}?"}) for i in range(12)))
    hints = [{"question": f"{i}?", "answer": "1500", "hint": "Add: 2+3=<<2+3=5>>5.\n#### 1500"} for i in range(12)]
    (tmp_path / "hints.json").write_text(json.dumps(hints))
    train = data.load_data(f"gsm8k:{tmp_path}", "train", hints=str(tmp_path / "hints.json"))
    assert len(train) == 11 and {e.trace for e in train} == {"Add: 2+3=5."}


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
def test_released_traces_join_rows_of_their_form(tmp_path: Path) -> None:
    file = SHARED / "text-samples" / "dyme_chartqa_train_medium_24.json"
    hints = json.loads(file.read_text())
    examples = [Example(row["question"], row["answer"]) for row in hints]
    joined = references.join([*examples, Example("Another?", "7")], str(file))
    assert [e.trace for e in joined] == [row["hint"] for row in hints]


def test_a_trace_longer_than_the_context_falls_back_and_marks_are_told_once(
        runs: Path, tiny: Policy, capsys: Capture) -> None:
    found = [{"question": f"Which {i}?", "answer": "red", "hint": "It is red."} for i in range(24)]
    found[2]["hint"] = "red 3, " * 9000
    found[3]["hint"] = "red 3, " * 60  # half of the context has fewer tokens than this has bytes, but it fits
    found[4]["hint"], found[5]["answer"] = "So.\nANSWER: red", "Answer: red"
    found[6]["hint"] = "It ends<end_of_utterance> here."
    examples = [Example(row["question"], row["answer"], trace=row["hint"], name=f"row {i}") for i, row in enumerate(found)]
    checked = references.check(examples, tiny, lambda example: dyme.full_length(tiny, example))
    said = capsys.readouterr().out.splitlines()
    assert checked[2].trace is None and reference_response(checked[2]) == "Answer: red"
    assert [a for a, b in zip(checked, examples, strict=True) if a != b] == [checked[2]]
    assert len(said) == 3 and "2 training rows hold 'Answer:'" in said[1] and said[1].endswith("the first is row 4")
    assert "context of 512" in said[0] and said[0].endswith("row 2") and said[2].endswith("row 6")
    (runs / "rows.json").write_text(json.dumps(found))
    flags = ["--model", str(toy.BASE), "--data", str(runs / "rows.json"), "--steps", "3", "--mode", "sft"]
    assert run(runs, "a", *flags, "--prompts", "4", "--generations", "8") == 0  # every row is imitated


# ---- Models and the hub --------------------------------------------------------------------------


@pytest.fixture
def silent_hub(monkeypatch: Patch, tmp_path: Path) -> Iterator[str]:
    """A hub that takes calls and never answers, and no file from an earlier download."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        for place in ("huggingface_hub.constants.ENDPOINT", "huggingface_hub.file_download.constants.ENDPOINT"):
            monkeypatch.setattr(place, url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        real = hub.silence
        monkeypatch.setattr(hub, "silence", lambda: real(0.5))
        real.cache_clear()
        yield url
        real.cache_clear()


@pytest.mark.parametrize("flags, wanted", [
    (["--model", "SmolVLM-256M", "--data", "chartqa"], "HuggingFaceTB/SmolVLM-256M-Instruct"),
    (["--model", str(toy.BASE), "--data", "chartqa"], "ahmed-masry/ChartQA"),
    (["--model", str(toy.BASE), "--data", "slake"], "BoKelvin/SLAKE"),
])
def test_a_silent_hub_is_told_soon_and_leaves_no_folder(
        runs: Path, silent_hub: str, flags: list[str], wanted: str, capsys: Capture) -> None:
    start = time.monotonic()
    assert run(runs, "a", *flags) == 2
    error = capsys.readouterr().err.strip()
    assert f"the hub {silent_hub} does not answer" in error and wanted in error and "\n" not in error
    assert time.monotonic() - start < 10 and not (runs / "a").exists()


def test_a_models_own_code_is_never_run_nor_asked_for(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {
        "AutoConfig": "code.Mine", "AutoProcessor": "code.Mine"}}))
    (tmp_path / "processor_config.json").write_text(json.dumps({"auto_map": {"AutoProcessor": "code.Mine"}}))
    (tmp_path / "code.py").write_text("raise SystemExit('it ran')")
    assert models.loader_options(str(tmp_path))["trust_remote_code"] is False
    with pytest.raises(UserError, match="a model that brings its own code is not run here"):
        dyme.load_policy(str(tmp_path), CPU)


# ---- Commands ------------------------------------------------------------------------------------


def test_eval_takes_its_flags_in_any_order_and_can_ask_directly(
        runs: Path, monkeypatch: Patch, capsys: Capture) -> None:
    assert run(runs, "a", "--steps", "1") == 0
    a = str(runs / "a")
    for flags in ([a, "--limit", "2"], ["--limit", "2", a], ["--model", a, "--limit", "2"], ["--limit", "2", "--model", a],
                  ["--best", a, "--limit", "2"], ["--seed", "1", "--model", a, "--best", "--limit", "2"]):
        args = evaluation.parse_arguments(flags)
        assert (args.model, args.limit, args.prompt) == ([a], 2, "think")
    asked = []
    encode = dyme.encode_prompts
    monkeypatch.setattr(dyme, "encode_prompts", lambda *args: asked.append(args[3]) or encode(*args))
    flags = [a, "--limit", "2", "--max-new-tokens", "4"]
    for more in ([], ["--prompt", "direct", "--samples", "2"]):
        assert run_folders.run_main(lambda: evaluation.main([*flags, *more])) == 0
    assert asked == [dyme.PROMPT] + [evaluation.PROMPTS["direct"]] * 2 and "step" not in asked[1]
    assert json.loads((runs / "a" / "evaluation.json").read_text())["prompt"] == "direct"


HERE = Path(dyme.__file__).parent
# What stands for something else in the commands of the READMEs.
PLACEHOLDERS = {"MODE": "dyme", "LR": "1e-4", "SEED": "0", "URL": "http://127.0.0.1:8000/v1", "N": "3"}


def commands() -> list[list[str]]:
    """Every command of the READMEs as a list of words, those of the paper's table written out."""
    found = []
    for file in (HERE / "README.md", HERE / "support" / "README.md"):
        text = file.read_text()
        found += re.findall(r"(?<![\w`])python (?:dyme|eval)\.py.*?(?=#|&|$)", "\n".join(
            line for block in re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE) for line in block.splitlines()),
            re.MULTILINE)
        found += [quoted.replace("\n", " ") for quoted in re.findall(r"`(python (?:dyme|eval)\.py [^`]*)`", text)]
    table = (HERE / "support" / "README.md").read_text().partition("## The paper as commands")[2].partition("\n## ")[0]
    short = dict(re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", table, re.MULTILINE))
    for line in table.partition("`python dyme.py ...`")[2].splitlines():
        cells = line.split(" | ")
        for command in re.findall(r"`([^`]+)`", cells[1]) if len(cells) == 3 else []:
            found.append("python dyme.py " + " ".join(short.get(word, word) for word in command.split()))
    words = [[PLACEHOLDERS.get(word, word) for word in shlex.split(command)[1:]] for command in found]
    assert len(short) > 5 and len(words) > 50
    return [command for command in words if not {"...", "--help"} & {*command}]


RECIPES = [  # of the release's configurations: what a command is for, and what it must then say
    ({"model": "Qwen2.5-VL-7B", "mode": "dyme"}, {"lr": 1e-5, "generations": 8, "prompts": 16}),
    ({"model": "Qwen2.5-0.5B", "mode": "dyme"}, {"lr": 1e-5, "generations": 16, "max_new_tokens": 1024, "prompts": 32}),
    ({"data": "aokvqa:FOLDER", "mode": "dyme"}, {"lr": 1e-5, "generations": 4, "prompts": 32, "model": "LLaVA-OV-0.5B"}),
    ({"hints": "DyME/data/chartqa/train_low.json", "mode": "dyme"}, {"lr": 1e-5, "generations": 4, "prompts": 32}),
    ({"model": "SmolVLM-500M", "mode": "grpo"}, {"lr": 1e-5, "generations": 4, "prompts": 16, "beta": 0.04}),
    ({"model": "SmolVLM-500M", "mode": "dyme"}, {"lr": 8e-5, "generations": 8, "prompts": 32, "max_new_tokens": 300}),
]


def test_every_command_of_the_readmes_is_understood_and_the_papers_are_its_recipes(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("NAME", "RUN", "runs/NAME"):  # a run to go on with, or to evaluate
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps(dataclasses.asdict(Config(lr=5e-4))))
    configs = []
    for program, *flags in commands():
        if program == "eval.py" and flags[0].startswith("runs/"):  # made by another command
            (tmp_path / flags[0]).mkdir(exist_ok=True)
        try:
            if program == "dyme.py":
                configs.append(dataclasses.asdict(dyme.parse_config(flags)))
            elif flags[:1] != ["report"]:
                evaluation.parse_arguments(flags)
        except UserError as error:
            pytest.fail(f"python {program} {shlex.join(flags)}: {error}")
    for chosen, recipe in RECIPES:
        found = [cfg for cfg in configs if chosen.items() <= cfg.items()]
        assert found and all(recipe.items() <= cfg.items() for cfg in found), (chosen, found)
