"""Tests of data: rows, pictures and traces, odd, broken or as published; the READMEs' commands."""

import copy
import dataclasses
import io
import json
import math
import re
import shlex
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

import dyme
import eval as evaluation
from dyme import Config, Policy
from reward import Example, reference_response, verify
from support import UserError, chartqa, data, domains, row_files, thinking, toy
from support import runs as run_folders
from test_dyme import CPU, SHARED, Capture, Patch, Row, run

REAL = SHARED / "real"
needs_real = pytest.mark.skipif(not REAL.exists(), reason="needs ../shared/real")


def right(example: Example, answer: str) -> bool:
    """Is an answer right as a reward?"""
    return verify(f"I think.\nAnswer: {answer}", example).correct


def official(example: Example, answer: str) -> float | None:
    return thinking.judge(example, f"I think.\nAnswer: {answer}", True)["official"]


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "white").save(path)


def write_rows(file: Path, rows: Any) -> str:
    """Write rows as the file's name asks; the name of the file."""
    lines = file.suffix == ".jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    return str(file)


def wrong_against_themselves(examples: list[Example]) -> list[str]:
    return [e.name for e in examples if not verify(reference_response(e), e).correct]


# ---- Images --------------------------------------------------------------------------------------


def opened(image: Image.Image, folder: Path, suffix: str, **options: Any) -> np.ndarray:
    image.save(folder / f"picture{suffix}", **options)
    return np.asarray(row_files.image_opener(folder / f"picture{suffix}", "row 1")())


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
    (".tif", [0.0, 0.5, 1.0], np.float32, [0, 128, 255]),
    (".tif", [0.0, 100.0, 255.0], np.float32, [0, 100, 255]),
    (".tif", [0, 32768, 65535], np.int32, [0, 128, 255]),
    (".tif", [np.nan, -1.0, 1.0], np.float32, [0, 0, 255]),
])
def test_deep_pictures_are_scaled(tmp_path: Path, suffix: str, values: list[float], dtype: type,
                                  shown: list[int]) -> None:
    image = Image.fromarray(np.array([values], dtype))
    assert opened(image, tmp_path, suffix)[0, :, 0].tolist() == shown


def test_a_photo_is_upright_and_broken_notes_cost_nothing(tmp_path: Path) -> None:
    notes = Image.Exif()
    notes[0x112] = 6  # the camera was held on its side
    image = Image.new("RGB", (4, 2), "white")
    image.putpixel((0, 1), (0, 0, 0))
    upright = opened(image, tmp_path, ".png", exif=notes)
    assert upright.shape == (4, 2, 3)
    assert (upright[0, 0] == 0).all()  # its lower left is now its upper left
    broken = PngImagePlugin.PngInfo()
    broken.add_text("Raw profile type exif", "\nexif\n4\nzz")
    assert opened(image, tmp_path, ".png", pnginfo=broken).shape == (2, 4, 3)


# ---- Your own rows -------------------------------------------------------------------------------


def test_own_rows_hold_a_tenth_back_and_keep_an_image_together(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    found = [{"question": f"q{i}", "answer": i, "image": "a.png" if i < 2 else None, "hint": "h"}
             for i in range(12)]
    path = write_rows(tmp_path / "rows.jsonl", found)
    train, val, test = (data.load_data(path, split) for split in ("train", "val", "test"))
    assert len(train) + len(val) == len(test) == 12
    assert len(val) == 1 or all(e.image for e in val)
    assert test[3].answer == "3"
    assert test[0].image().mode == "RGB"
    assert {e.trace for e in test} == {"h"}
    assert sorted(sum(e.image is not None for e in split) for split in (train, val)) == [0, 2]


def test_no_image_is_in_train_and_in_val(tmp_path: Path) -> None:
    for i in range(10):
        write_image(tmp_path / f"{i}.png")
    found = [{"question": f"q{i}", "answer": i // 2, "image": f"{i // 2}.png"} for i in range(20)]
    path = write_rows(tmp_path / "rows.json", found)
    train, val = ({e.answer for e in data.load_data(path, split)} for split in ("train", "val"))
    assert (len(train), len(val)) == (9, 1)


def test_what_is_held_back_is_spread_over_rows_in_any_order() -> None:
    groups = [f"{i:03}" for i in range(100)]  # as files are often ordered
    rows = [Example("q", group) for group in groups]
    val = [int(e.answer) for e in data.hold_back(rows, groups, "val", "x")]
    assert len(val) == 10
    assert min(val) < 50 < max(val)
    assert data.spread(range(10), 3) == [0, 3, 6]
    assert data.spread(range(2), 3) == [0, 1]


GOOD = {"question": "q", "answer": "a"}


@pytest.mark.parametrize("rows, says", [
    ([], "no usable row"), ([{"question": "q"}], "row 1: `answer` is missing"),
    ([GOOD | {"image": "b.png"}], "row 1: the image b.png"), ([GOOD], "two different"),
    ([GOOD, 3], "row 2: is no object"), ([GOOD, None], "row 2: is no object"),
    ([GOOD | {"trace": ["x"]}], "row 1: .*must be text"), ([GOOD | {"facts": {}}], "must be text"),
    ([GOOD | {"answer": ["3"]}], "row 1: `answer` is a list"),
    ([GOOD | {"answer": {}}], "row 1: `answer` is an object"),
    ([GOOD | {"answer": True}], "row 1: `answer` is true or false"),
    ([GOOD | {"answer": math.nan}], "row 1: `answer` is not a number"),
    ([GOOD | {"answer": -math.inf}], "row 1: `answer` is not a number"),
    ([GOOD | {"question": math.nan}], "row 1: `question` is not a number"),
    ([GOOD | {"answer": "\u200b\ufeff"}], "row 1: `answer` is empty, or shows nothing"),
    ([GOOD | {"answer": "\u3164"}], "row 1: `answer` is empty, or shows nothing"),
    ([GOOD | {"answer": " \n"}], "row 1: `answer` is empty, or shows nothing"),
    ([GOOD | {"question": "\u2060"}], "row 1: `question` is empty, or shows nothing"),
    ([GOOD | {"img": "x"}], "row 1: `img` is not read; did you mean `image`"),
    ([GOOD | {"answer": "Answer: 5"}], "row 1: `answer` holds 'Answer:'"),
    ([GOOD | {"hints": "x"}], "row 1: `hints` is not read; did you mean `trace`"),
    ([GOOD | {"fact": "x"}], "row 1: `fact` is not read; did you mean `facts`"),
])
def test_an_own_row_that_cannot_be_used_is_refused_by_name(
        tmp_path: Path, rows: list[Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        data.load_data(write_rows(tmp_path / "bad.json", rows), "train")


@pytest.mark.parametrize("text, says", [
    ("{", r"bad.jsonl: cannot be read \(line 1: "),
    (json.dumps(GOOD) + "\n\n{\n", r"bad.jsonl: cannot be read \(line 3: "),
    (json.dumps(GOOD) + "\n\n" + json.dumps({"question": "q"}), "bad.jsonl line 3: `answer`"),
])
def test_a_jsonl_names_the_line_of_the_file(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(UserError, match=says):
        data.load_data(str(tmp_path / "bad.jsonl"), "train")


@pytest.mark.parametrize("number, said", [
    ("5e-05", "0.00005"), ("1e22", "10000000000000000000000"), ("2.50", "2.5"), ("-7", "-7"),
    ("1E3", "1000.0"),
])
def test_a_number_in_json_is_an_answer_that_can_be_given(
        tmp_path: Path, number: str, said: str) -> None:
    (tmp_path / "rows.jsonl").write_text(f'{{"question": "q", "answer": {number}}}')
    example, = data.load_data(str(tmp_path / "rows.jsonl"), "test")
    assert example.answer == said
    assert right(example, said)


def test_half_a_character_is_replaced(runs: Path, capsys: Capture) -> None:
    smile = "\U0001f600"
    found = [{"question": f"What is {i}? {smile}", "answer": "red", "hint": f"Red. {smile}"}
             for i in range(12)]
    found[4] |= {"question": "What \ud83d?", "hint": "Half \udc00."}
    found[5]["facts"] = "\\ud83d is no half"
    path = write_rows(runs / "rows.json", found)  # JSON writes them as \ud83d
    examples = data.load_data(path, "test")
    assert examples[4].question == "What \ufffd?"
    assert examples[4].trace == "Half \ufffd."
    assert examples[5].trace == f"Red. {smile}"
    assert examples[5].facts == "\\ud83d is no half"
    flags = ["--model", str(toy.BASE), "--data", path, "--steps", "2", "--mode", "sft"]
    assert run(runs, "a", *flags) == 0


# ---- Files ---------------------------------------------------------------------------------------


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
def test_what_is_broken_in_a_zip_is_told_in_one_line(
        tmp_path: Path, capsys: Capture, name: str, how: str) -> None:
    root = make_chartqa(tmp_path / "ChartQA Dataset")
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in root.rglob("*"):
            file.write(path, path.relative_to(tmp_path))
    spoil(archive, f"ChartQA Dataset/train/{name}", how)
    said = ""
    try:  # a file of rows ends it; a row is skipped, or fails when its picture is decoded
        found = data.load_data(str(archive), "train")
        assert len(found) in (5, 6)
        said = capsys.readouterr().out.strip()
        for example in found:
            example.image()
    except UserError as error:
        said = str(error)
    assert "\n" not in said
    assert re.search(f"{Path(name).name}.*(cannot be read|unreadable)", said)
    assert ("encrypt" in said) == (how == "encrypted")


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


def test_flags_of_one_kind_of_data_are_refused_with_another(tmp_path: Path) -> None:
    own = write_rows(tmp_path / "rows.json", [GOOD])
    for source in ("toy", own):
        with pytest.raises(UserError, match="--hints belongs to published data"):
            data.load_data(source, "train", hints="hints.json")
    with pytest.raises(UserError, match="--augmented belongs to ChartQA"):
        data.load_data("gsm8k:x", "train", augmented=True)


@pytest.mark.parametrize("source, name", [
    ("toy", "toy"), ("slake", "slake"), ("gsm8k:/a/b", "gsm8k"), ("/a/b.jsonl", "b"), ("a/c", "c")])
def test_data_has_a_short_name(source: str, name: str) -> None:
    assert data.name_of(source) == name


@pytest.mark.parametrize("source, page", [
    ("chartqa", "ahmed-masry/ChartQA"), ("slake", "BoKelvin/SLAKE"),
    ("gsm8k", "grade-school-math")])
def test_a_failed_download_is_one_line_that_names_the_page(
        monkeypatch: Patch, source: str, page: str) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no\nnetwork")

    monkeypatch.setattr(domains, "snapshot_download", fail)
    with pytest.raises(UserError) as caught:
        data.load_data(source, "train")
    assert page in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ("HF_HUB_OFFLINE=1" in str(caught.value)) == (source != "gsm8k")


def test_what_a_terminal_cannot_show_is_shown_by_its_code(monkeypatch: Patch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii", write_through=True))
    assert run_folders.run_main(lambda: print("4 \u2192 5")) == 0
    assert shown.getvalue() == b"4 \\u2192 5\n"


# ---- ChartQA -------------------------------------------------------------------------------------


def test_traces_from_tables_quote_the_cells_and_explain_the_answer() -> None:
    table = [["Country", "2010", "2011"], ["France", "28", "29"], ["Italy", "43%", "33"],
             ["Spain", "10", "12"]]
    assert chartqa.table_facts(table).splitlines()[1] == "Italy: 2010 = 43%, 2011 = 33"
    trace = chartqa.chart_trace(table, "What is the sum of France and Italy in 2010?", "71")
    assert trace.startswith("Goal: ")
    assert "France (2010) = 28, Italy (2010) = 43%." in trace
    assert "28 + 43 = 71." in trace
    assert "Spain" not in trace
    trace = chartqa.chart_trace(table, "Largest value in 2010?", "43")
    assert "Italy (2010) with 43% is the one asked for" in trace
    assert chartqa.chart_trace([], "q", "a") is None


def make_chartqa(root: Path, splits: tuple[str, ...] = ("train", "val", "test"),
                 rows: int = 6) -> Path:
    for split in splits:
        for folder in ("png", "tables"):
            (root / split / folder).mkdir(parents=True)
        for kind in ("human", "augmented"):
            entries = []
            for i in range(rows):
                name, part = f"{kind}{i}", root / split
                Image.new("RGB", (40, 30), (i, 0, 0)).save(part / "png" / f"{name}.png")
                table = b"Year,Total\r\n2019,5\r\n2020,7\r\n"
                (part / "tables" / f"{name}.csv").write_bytes(table)
                query = f"Total in 2020? ({i})"
                entries.append({"imgname": f"{name}.png", "query": query, "label": "7"})
            write_rows(root / split / f"{split}_{kind}.json", entries)
    return root


def test_chartqa_folder_and_zip_give_the_same_rows(tmp_path: Path) -> None:
    root = make_chartqa(tmp_path / "ChartQA Dataset")
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in root.rglob("*"):
            file.write(path, path.relative_to(tmp_path))
    keys = ("question", "answer", "trace", "facts", "source", "name")
    for split, count in (("train", 6), ("val", 12), ("test", 12)):
        local, zipped = (data.load_data(str(source), split) for source in (tmp_path, archive))
        assert len(local) == count
        for a, b in zip(local, zipped, strict=True):
            assert [getattr(a, key) for key in keys] == [getattr(b, key) for key in keys]
            assert np.array_equal(np.array(a.image()), np.array(b.image()))
    assert len(data.load_data(str(archive), "train", augmented=True)) == 12
    assert "2020 (Total) = 7" in local[0].trace
    assert {e.source for e in local} == {"human", "augmented"}


def test_chartqa_alone_forgives_5_percent_and_only_in_evaluation(tmp_path: Path) -> None:
    example = data.load_data(str(make_chartqa(tmp_path)), "train")[0]
    assert example.tolerance == 0.05
    assert not right(example, "7.1")
    assert Example("q", "a").tolerance == 0


def test_chartqa_without_val_holds_images_back(tmp_path: Path) -> None:
    root = make_chartqa(tmp_path, splits=("train",), rows=20)
    train, val = (data.load_data(str(root), split) for split in ("train", "val"))
    assert len(train) == 18
    assert len(val) == 2
    assert {e.question for e in train}.isdisjoint(e.question for e in val)
    with pytest.raises(UserError, match="test has no usable row"):
        data.load_data(str(root), "test")


@pytest.mark.parametrize("change, says", [
    ({"imgname": "../../secret.png"}, "outside its folder"), ({"query": None}, "has no attribute"),
    ({"imgname": "none.png"}, "missing or unreadable"),
    ({"label": " "}, "expected a string as answer, got ''"),
])
def test_chartqa_rows_that_cannot_be_used_are_skipped_and_told_once(
        tmp_path: Path, capsys: Capture, change: Row, says: str) -> None:
    root = make_chartqa(tmp_path)
    file = root / "train" / "train_human.json"
    found = json.loads(file.read_text())
    found[2] |= change
    found[4] |= change
    write_rows(file, found)
    assert len(data.load_data(str(root), "train")) == 4
    said = capsys.readouterr().out
    assert re.search(f"4 rows; 2 skipped .the first: train_human.json row 3: .*{says}", said)
    assert said.count("\n") == 1


@pytest.mark.parametrize("text", ["null", "3", "{", "[3]"])
def test_a_broken_chartqa_file_is_one_line(tmp_path: Path, text: str) -> None:
    root = make_chartqa(tmp_path)
    (root / "train" / "train_human.json").write_text(text)
    with pytest.raises(UserError, match="train_human.json"):
        data.load_data(str(root), "train")


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
def test_real_charts() -> None:
    sample = str(SHARED / "chartqa-sample")
    found = [e for split in ("train", "val", "test")
             for e in data.load_data(sample, split, augmented=True)]
    assert len(found) == 16 + 40 + 5 + 12 + 52 + 25
    assert all(e.image().size[0] > 64 for e in found[:5])
    assert sum(bool(e.trace) for e in found) > 140
    assert len({e.trace for e in found}) > 100
    assert wrong_against_themselves(found) == []


# ---- A-OKVQA -------------------------------------------------------------------------------------

AOKVQA = {"split": "train", "image_id": 7, "question": "What?", "choices": ["cat", "dog"],
          "correct_choice_idx": 1, "direct_answers": ["hound"] * 4 + ["dog"] * 2,
          "difficult_direct_answer": False, "rationales": ["It barks.", "It is a dog."]}


def write_aokvqa(folder: Path, found: list[Row], split: str = "val") -> str:
    write_rows(folder / f"aokvqa_v1p0_{split}.json", found)
    write_image(folder / "train2017" / "000000000007.jpg")
    return f"aokvqa:{folder}"


def test_aokvqa_has_two_named_scores_and_the_releases_target(tmp_path: Path) -> None:
    without = {key: AOKVQA[key] for key in AOKVQA if "choice" not in key}
    found = data.load_data(write_aokvqa(tmp_path, [AOKVQA, without]), "test")
    # The correct choice and the longest rationale; without choices, the commonest answer.
    assert [e.answer for e in found] == ["dog", "hound"]
    assert found[0].trace == "It is a dog."
    assert found[0].image().size == (8, 8)
    assert right(found[0], "Hound.")
    assert not right(found[0], "cat")
    judged = [thinking.judge(e, "Answer: Dog.", True) | {"length": 1} for e in found]
    assert judged[0]["official"] == pytest.approx(2 / 3)
    assert judged[0]["scores"] == {"any_match": 1.0, "multiple_choice": 1.0}
    judged.append(thinking.judge(found[1], "Answer: cat", True) | {"length": 1})
    summary = thinking.summarise(judged)
    assert summary["official"] == pytest.approx(4 / 9)
    assert summary["any_match"] == pytest.approx(2 / 3)
    assert summary["multiple_choice"] == 1.0  # of the one row that has choices


def test_an_empty_choice_of_aokvqa_keeps_its_place(tmp_path: Path) -> None:
    # As in row 1095 of the published val split.
    row = AOKVQA | {"choices": ["s", "", "b", "f"], "correct_choice_idx": 3,
                    "direct_answers": ["f", "letter f", "f"]}
    example, = data.load_data(write_aokvqa(tmp_path, [row]), "test")
    assert example.answer == "f"
    assert example.scores["multiple_choice"]("f") == 1.0
    assert example.scores["multiple_choice"]("b") == 0.0


def test_official_leaves_out_what_aokvqa_calls_difficult(tmp_path: Path) -> None:
    difficult = AOKVQA | {"difficult_direct_answer": True}
    found = data.load_data(write_aokvqa(tmp_path, [AOKVQA, difficult]), "test")
    judged = [thinking.judge(e, f"Answer: {said}", True) | {"length": 1}
              for e, said in zip(found, ("hound", "cat"), strict=True)]
    summary = thinking.summarise(judged)
    assert judged[1]["official"] is None
    assert summary["official"] == 1.0
    assert summary["any_match"] == 0.5
    assert right(found[1], "dog")  # it still trains


@pytest.mark.parametrize("change", [
    {"correct_choice_idx": 2}, {"correct_choice_idx": -1}, {"correct_choice_idx": None},
    {"direct_answers": []}, {"choices": 3}, {"rationales": "It sits."},
    {"choices": ["dog", ""], "correct_choice_idx": 1},
    {"direct_answers": "dog"}, {"direct_answers": ["", " "]},
    {"image_id": 8}, {"image_id": "x"}, {"question": ""}, {"question": None},
])
def test_aokvqa_rows_that_cannot_be_used_are_skipped(
        tmp_path: Path, capsys: Capture, change: Row) -> None:
    source = write_aokvqa(tmp_path, [AOKVQA, AOKVQA | change])
    assert len(data.load_data(source, "test")) == 1
    said = capsys.readouterr().out
    assert "1 rows; 1 skipped (the first: aokvqa_v1p0_val.json row 2: " in said
    with pytest.raises(UserError, match="no usable row.*row 1: "):
        data.load_data(write_aokvqa(tmp_path, [AOKVQA | change]), "test")


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
def test_published_rows_of_aokvqa(tmp_path: Path) -> None:
    source = json.loads((SHARED / "text-samples" / "aokvqa_v1p0_val_40.json").read_text())
    for row in source:
        write_image(tmp_path / "val2017" / f"{row['image_id']:012}.jpg")
    found = data.load_data(write_aokvqa(tmp_path, source), "test")
    assert len(found) == 40
    assert all(e.trace for e in found)
    assert wrong_against_themselves(found) == []
    assert sum(official(e, e.answer) is None for e in found) == 4


# ---- SLAKE ---------------------------------------------------------------------------------------

SLAKE = {"img_name": "xmlab1/source.jpg", "question": "Which organs?", "answer": "Liver, Kidney",
         "q_lang": "en", "answer_type": "OPEN", "qid": 1}


def load_slake(folder: Path, rows: list[Row]) -> list[Example]:
    write_rows(folder / "test.json", rows)
    write_image(folder / "imgs" / "xmlab1" / "source.jpg")
    return data.load_data(f"slake:{folder}", "test")


def test_slake_scores_recall_and_closed_questions_apart(tmp_path: Path) -> None:
    opened, closed = load_slake(tmp_path, [SLAKE, SLAKE | {"q_lang": "zh"}, SLAKE | {
        "question": "Is it CT?", "answer": "Yes", "answer_type": "CLOSED"}])
    assert (opened.source, closed.source) == ("open", "closed")
    assert official(opened, "the liver") == 0.5
    assert official(closed, "yes") == 1.0
    assert official(closed, "yes no") == 0.0
    assert right(closed, "yes")
    assert not right(closed, "yes no")
    judged = [thinking.judge(e, f"Answer: {answer}", True) | {"length": 1}
              for e, answer in ((opened, "liver"), (closed, "Yes"))]
    summary = thinking.summarise(judged)
    assert summary["official"] == 0.75
    assert summary["official_closed"] == 1


@pytest.mark.parametrize("answer, given, met", [
    ("Left", "left right upper lower lung heart", False), ("Left", "Left.", True),
    ("Left", "not left", False), ("Liver, Kidney", "kidney, liver", True),
    ("Liver, Kidney", "Kidney and liver", True), ("Liver, Kidney", "liver", False),
    ("Liver, Kidney", "liver, kidney, lung", False), ("Lung", "lung lung", False),
    ("Left Lung, Right", "Right Lung, Left", False), ("Left Lung, Right", "right, left lung", True),
    ("Transverse  Plane", "transverse plane", True), ("2", "2", True), ("2", "3", False),
    ("+", "+", True), ("+", "plus", False), ("+", "-", False),
])
def test_slake_is_right_with_the_same_words_and_no_others(
        tmp_path: Path, answer: str, given: str, met: bool) -> None:
    example, = load_slake(tmp_path, [SLAKE | {"answer": answer}])
    assert right(example, given) is met


def test_a_slake_answer_without_a_word_has_no_recall(tmp_path: Path) -> None:
    example, = load_slake(tmp_path, [SLAKE | {"answer": "+"}])
    assert [official(example, a) for a in ("+", "-", "plus")] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("change", [
    {"answer": ""}, {"question": None}, {"question": " "}, {"answer": "\u200b"}, {"answer": None},
    {"img_name": "none.jpg"}])
def test_a_slake_row_that_cannot_be_used_is_skipped_and_told(
        tmp_path: Path, capsys: Capture, change: Row) -> None:
    assert len(load_slake(tmp_path, [SLAKE, SLAKE | change])) == 1
    said = capsys.readouterr().out
    assert "slake test: 1 rows; 1 skipped (the first: test.json row 2: " in said


def test_a_zip_of_images_is_opened_once(tmp_path: Path) -> None:
    write_image(tmp_path / "1.jpg")
    for inside in ("imgs/1.jpg", "1.jpg"):
        with zipfile.ZipFile(tmp_path / "imgs.zip", "w") as file:
            file.write(tmp_path / "1.jpg", inside)
        write_rows(tmp_path / "test.json", [SLAKE | {"img_name": "1.jpg"}] * 9)
        domains.open_zip.cache_clear()
        found = data.load_data(f"slake:{tmp_path}", "test")
        assert len(found) == 9
        assert found[0].image().size == (8, 8)
        assert domains.open_zip.cache_info().misses == 1


@pytest.mark.slow
@needs_real
def test_slake_loads_all_english_rows_but_the_one_without_an_answer(
        tmp_path: Path, capsys: Capture) -> None:
    counts = {}
    (tmp_path / "imgs").mkdir()
    write_image(tmp_path / "one.jpg")
    for file in ("train", "validate", "test"):
        rows = json.loads((REAL / "slake" / f"{file}.json").read_text())
        for image in {row["img_name"] for row in rows}:
            place = tmp_path / "imgs" / image
            place.parent.mkdir(exist_ok=True)
            if not place.exists():
                place.hardlink_to(tmp_path / "one.jpg")
        write_rows(tmp_path / f"{file}.json", rows)
    for split in ("train", "val", "test"):
        found = data.load_data(f"slake:{tmp_path}", split)
        counts[split] = len(found)
        assert wrong_against_themselves(found) == []
    said = capsys.readouterr().out
    assert counts == {"train": 4918, "val": 1053, "test": 1061}
    assert "train.json row 1623" in said
    assert said.count("skipped") == 1
    # One list of the commonest words of the training answers.
    words = " ".join(sorted({word for e in found for word in re.findall(r"\w+", e.answer)}))
    assert not any(right(e, words) for e in found if e.source == "open")


# ---- GSM8K ---------------------------------------------------------------------------------------


def gsm8k(answer: str) -> Example:
    return domains.gsm8k_row({"question": "q", "answer": answer}, None, "row 1")


@pytest.mark.parametrize("answer, given, met", [
    ("-3", "-3", True), ("-3", "3", False), ("18", "-18", False), ("18", "18", True),
    ("18", "$18", True), ("18", "-$18", False), ("18", "$-18", False), ("18", "\u221218", False),
    ("-3", "\u22123", True), ("18", "minus 18", False), ("-3", "negative 3", True),
    ("-3", "-$3", True), ("18", "- 18", False), ("18", "20 - 2 = 18", True), ("2", "20 - 2", False),
    ("18", "18 eggs", True), ("1,500", "in 2 weeks 1,500", True), ("1,500", "$1,500 dollars", True),
    ("1,500", "1500.00", True), ("1,500", "150", False), ("18", "1/18", False),
    ("2", "9 * 2", False),
    ("18", "5 or 17", False), ("18", "18 million", False), ("18", "1,18", False),
    ("5", "x5", False),
    ("5", "It is 5.", True), ("5", "none", False), ("18", "+18", True), ("15", "10-15", False),
    ("18", "18/3", False), ("18", "18k", False), ("5", "1e5", False),
    ("57500", "$35000 + $22500 = $57500/year.", True), ("18", "18 / (3)", False),
])
def test_gsm8k_takes_the_last_number_with_its_sign(answer: str, given: str, met: bool) -> None:
    assert right(gsm8k(f"So.\n#### {answer}"), given) is met


def test_gsm8ks_solution_is_the_trace_without_its_calculator(tmp_path: Path) -> None:
    row = {"question": "How many?", "answer": "She has 2+3=<<2+3=5>>5.\nThen more.\n#### 1,500"}
    bad = [{"question": "x"}, row | {"answer": 5}, row | {"answer": "So.\n#### many"}, 3, []]
    write_rows(tmp_path / "test.jsonl", [row, *bad])
    example, = data.load_data(f"gsm8k:{tmp_path}", "test")
    assert example.trace == "She has 2+3=5.\nThen more."
    assert example.image is None
    assert example.name == "test.jsonl line 1"
    assert reference_response(example).endswith("Answer: 1,500")


@pytest.mark.slow
@needs_real
@pytest.mark.parametrize("split, count", [("train", 6726), ("val", 747), ("test", 1319)])
def test_every_reference_of_gsm8k_is_right_against_itself(split: str, count: int) -> None:
    found = data.load_data(f"gsm8k:{REAL / 'gsm8k'}", split)
    assert len(found) == count
    assert wrong_against_themselves(found) == []
    assert not any("<<" in e.trace for e in found)
    flipped = {e.name: e.answer[1:] if e.answer[0] == "-" else f"-{e.answer}" for e in found}
    assert [e.name for e in found if right(e, flipped[e.name]) and e.answer != "0"] == []
    assert [e.name for e in found if right(e, f"{e.answer}1")] == []


# ---- Geometry ------------------------------------------------------------------------------------

ANGLES = "What is it?\nChoices:\nA:40°\nB:60°\nC:140°"
WORDS = "Which?\nChoices:\nA. Increasing\nB. Decreasing\nC. Constant\nD. None"


@pytest.mark.parametrize("question, answer, good, bad", [
    (ANGLES, "C", r"C|c|(C)|\boxed{C}|Option C|C (140°)|C: 140|The answer is C|140|"
                  r"140 degrees|$140^\circ$|**C**|\text{C}|C. 140°|C - 140|"
                  r"∠C = 140°|The answer is 140|C) 140",
     r"A|(B)|40|60|A: 140|C: 60|C (60)|B, C|C or B|-140|147|A C|1400|C, D|A line C|C - 60|A: 140°"),
    (ANGLES, "B", "B|60", "58|57|63|61|A"),  # no tolerance
    (WORDS, "Decreasing", "B|(B)|Decreasing|decreasing.|B. Decreasing|Option B",
     "D|None|A|Increasing|B. Increasing|D. Decreasing"),
    ("Which?\nChoices:\nA.one\nB.two\nC.three", "(C)", "C|(C)|three|C.three", "A|one|B"),
    ("Which? Look at the image.", "C", r"C|\boxed{C}|Option C|C (140°)|C, because", "A|140|CD|C B"),
    ("Which two?\nChoices:\nA:w\nB:x\nC:y\nD:z", "C\nD", "C, D|D and C|C D", "C|D|A and C"),
    ("Which?\nChoices:\nA:38\nB:52\nC:52", "52", "B|C|52", "A|38"),
    ("Which?\nChoices:\nA:one\nB:\nC:three", "C", "C|three", "A|B|C:three|one"[:3]),
    ("Find it.", r"Area $=113.1 \mathrm{~cm}^{2}$", r"113.1|113.1 cm^2|113.1 cm²|Area = 113.1|"
     r"113.10|A = 113.1 cm^2|113.1 square centimeters|$113.1 \mathrm{cm}^2$",
     "113|112|113.1 m^2|1131|-113.1|113.1 or 5|118"),
    ("Find it.", r"Area $=12.5 \mathrm{~cm}^{2}$", "12.5|12.5 cm^2", "12|13 cm^2"),
    ("Find it.", r"Area $=121 \pi \mathrm{cm}^{2}$", r"121π|121 \pi|121pi cm^2", "121|11π"),
    ("Find it.", r"\frac{\sqrt{30}}{2}", r"√30/2|\frac{\sqrt{30}}{2}|$\frac{\sqrt{30}}{2}$",
     "30/2|15|√30"),
    ("Find it.", r"$-\frac{21}{29}$", r"-21/29|-\frac{21}{29}", "21/29|-21|29"),
    ("Find it.", "$r=24.4$", "24.4|r=24.4|r = 24.4", "d = 24.4|24"),
    ("Find it.", "$5=s$", "5|s=5|s = 5", "t=5|6"),
    ("Find it.", "12 cm", "12|$12$ cm|12 cm|12 centimeters|x = 12 cm", "13 cm|12 m|12 km"),
    ("Find it.", r"315^\circT", "315|315°|315° T", "31|316"),
    ("Find it.", "$x=0$", "x=0|0|x = 0", "y=0|1"),
    ("Find it.", "(2,-2)", "(2, -2)", "(-2, 2)|2,2|2"),
    ("Find it.", "[1,2]", "[1, 2]", "(1,2)|1|(1, 2]"),
    ("Find it.", "4.4 m", "4.4 m|4.4|4.4 metres", "4.4 cm"),
    ("Find it.", r"y=-2 x+5", "y=-2x+5|-2x+5", "y=2x+5|5"),
    ("Find it.", "even", "Even|even.", "odd"),
    ("Find it.", r"$13 \%$", r"13|13%|$13\%$", "14|1300%"),
    ("Find it.", r"\frac{1}{2}", "1/2|0.5", "12|1|2"),
    ("Find it.", "2√{3}", r"2√3|2sqrt(3)|2\sqrt{3}", "23|√3|2*3"),
    ("Find it.", "4πcm", r"4π|4 * pi|4 \times \pi cm", "4|4 m|π"),
    ("Find it.", "8厘米", "8|8厘米", "8海里|9"), ("Find it.", "40海里", "40.0|40", "40米"),
    ("Where is it?", "A(3,4)", "A(3, 4)", "A(5, 6)|A|B"),
    ("Find it.", "$C=40.84$ cm", "40.84", "C|C=41"),
])
def test_geometry(question: str, answer: str, good: str, bad: str) -> None:
    example = domains.geometry_example(question, answer, None, "row 1")
    assert [given for given in good.split("|") if not right(example, given)] == []
    assert [given for given in bad.split("|") if right(example, given)] == []


def test_geo170k_and_mathverse_are_read_as_published(tmp_path: Path) -> None:
    human = ("<image>\nFirst perform reasoning, then select the choice.\n"
             "Question: What is angle 2?\nChoices:\nA: 40\u00b0\nB: 60\u00b0")
    said = [{"from": "human", "value": human},
            {"from": "gpt", "value": "It is alternate.\nAnswer:B"}]
    rows = [{"image": "g/1.png", "conversations": said}] * 11 + [{"image": "g/1.png"}]
    rows += [{"image": "g/1.png", "conversations": [said[0], {"from": "gpt", "value": "So."}]}]
    rows = [json.loads(json.dumps(row).replace("angle 2", f"angle {i}"))
            for i, row in enumerate(rows)]
    write_rows(tmp_path / "qa_tuning.json", rows)
    write_image(tmp_path / "images" / "g" / "1.png")
    found = [e for split in ("train", "val") for e in data.load_data(f"geo170k:{tmp_path}", split)]
    assert len(found) == 11
    assert found[0].question.startswith("What is angle")
    assert found[0].trace == "It is alternate."
    assert right(found[0], "60")
    assert official(found[0], "60") == 1
    test = {"question": "Find x.", "answer": "12 cm", "image": "g/1.png"}
    write_rows(tmp_path / "testmini.json", [test, test | {"image": ""}, test | {"question": ""},
                                            test | {"image": "", "question": ""}])
    found = data.load_data(f"mathverse:{tmp_path}", "test")
    assert len(found) == 3
    assert found[0].image().size == (8, 8)
    assert found[1].image is None
    assert found[2].question == "Answer the question that is in the image."
    with pytest.raises(UserError, match="no train split"):
        data.load_data(f"mathverse:{tmp_path}", "train")


@pytest.mark.slow
@needs_real
def test_references_of_mathverse_are_right_against_themselves() -> None:
    found = data.load_data(f"mathverse:{REAL / 'mathverse'}", "test")
    rows = json.loads((REAL / "mathverse" / "testmini_text_only.json").read_text())
    assert len(found) == 788
    assert wrong_against_themselves(found) == []
    choices = [re.findall(r"^([A-H])[:.](.*)$", e.question, re.MULTILINE) for e in found]
    for example, row, listed in zip(found, rows, choices, strict=True):
        if row["question_type"] == "multi-choice" and row["answer"] in "ABCDEF":
            values = dict(listed)
            others = {k: v for k, v in values.items() if v != values[row["answer"]]}
            assert right(example, values[row["answer"]])
            assert not any(right(example, letter) for letter in others)
            assert not any(right(example, value) for value in others.values() if value)
        elif re.fullmatch(r"[^{}\d]*\$?=\$?(\d+\.?\d*)[^\d]*(\{[23]\})?\$?", row["answer"].strip()):
            number = re.search(r"\d+\.?\d*", row["answer"])[0]
            assert right(example, number) is ("pi" not in row["answer"])


# ---- Traces of the release -----------------------------------------------------------------------


def test_hints_leave_out_training_rows_without_a_trace(tmp_path: Path, capsys: Capture) -> None:
    root = make_chartqa(tmp_path / "data")
    hints = [{"question": "Total in 2020? (0)", "answer": "7", "hint": "Look."},
             {"question": "Total in 2020? (1)", "answer": "7", "hint": "One."},
             {"question": "Total in 2020? (1)", "answer": "7", "hint": "Another."},
             {"question": "Total in 2020? (2)", "answer": "8", "hint": "Wrong."}]
    file = write_rows(tmp_path / "hints.json", hints)
    example, = data.load_data(str(root), "train", hints=file)
    assert (example.trace, example.facts) == ("Look.", "2019: Total = 5\n2020: Total = 7")
    said = capsys.readouterr().out
    assert "1 training rows have a trace; the other 5 are left out" in said
    assert len(data.load_data(str(root), "val", hints=file)) == 12  # all are held out
    assert len(data.load_data(str(root), "train")) == 6


@pytest.mark.parametrize("text, says", [
    ("[]", "no trace for any row"), ('[{"question": 3}]', "row 1: is not"),
    ("{}", "no list of rows"),
    ('[{"question": "q", "answer": "a", "hint": 3}]', "row 1: is not"), ("[3]", "row 1: is not")])
def test_a_bad_file_of_traces_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "hints.json").write_text(text)
    with pytest.raises(UserError, match=f"hints.json.*{says}"):
        domains.join([Example("q", "a")], str(tmp_path / "hints.json"))


def joined(tmp_path: Path, example: Example, **row: Any) -> Example:
    found, = domains.join([example], write_rows(tmp_path / "hints.json", [row]))
    return found


@pytest.mark.parametrize("theirs", [
    "What\u2019s  \u201cit\u201d?", "What's \"it\"? ", "what's \"it\"?",
    "What\u2019s\u00a0\"it\"?"])
def test_a_join_forgives_typography(tmp_path: Path, theirs: str) -> None:
    example = Example('What\'s "it"?', "1,500")
    for answer in ("1500", "1500.0", "$1,500", 1500):
        assert joined(tmp_path, example, question=theirs, answer=answer, hint="h").trace == "h"


def test_only_an_answer_after_four_hashes_is_cut_off_a_trace(tmp_path: Path) -> None:
    example, heading = Example("q", "5"), "Goal: find it.\n#### Conclusion\nIt is so."
    for trace, kept in ((heading, heading), ("So 5.\n#### 5", "So 5."),
                        ("<<Map>> so", "<<Map>> so"),
                        ("2+3=<<2+3=5>>5", "2+3=5")):
        assert joined(tmp_path, example, question="q", answer="5", hint=trace).trace == kept
        assert joined(tmp_path, example, question="q", answer="5", trace=trace).trace == kept


@pytest.mark.slow
@needs_real
def test_all_of_gsm8k_joins_whatever_its_quotes_and_spaces(tmp_path: Path) -> None:
    found = data.load_data(f"gsm8k:{REAL / 'gsm8k'}", "train")
    curly = str.maketrans({"'": "\u2019", '"': "\u201c"})
    hints = [{"question": e.question.translate(curly).replace(".  ", ". ").replace(". ", ".  "),
              "answer": e.answer, "hint": f"{e.trace}\n#### {e.answer}"} for e in found]
    both = domains.join(found, write_rows(tmp_path / "hints.json", hints))
    assert len(both) == len(found)
    assert [e.trace for e in both] == [e.trace for e in found]


def test_traces_of_aokvqa_bring_facts_and_a_row_takes_its_own(tmp_path: Path) -> None:
    # The same question of two pictures: a row's own rationale tells which trace is its.
    found = [AOKVQA | {"question": f"What {i}?"} for i in range(10)]
    found.append(AOKVQA | {"rationales": ["A dog it is."]})
    hints = [{"question": "What?", "answer": "dog", "hint": hint, "visual_fact": f"{hint} Facts.",
              "direct_answers": "['dog']"} for hint in ("A cow.", "A dog it is.")]
    hints.append({"question": "What 4?", "answer": "dog", "hint": "So.", "visual_fact": {"e": 1}})
    examples = data.load_data(write_aokvqa(tmp_path, found), "test")
    both = domains.join(examples, write_rows(tmp_path / "hints.json", hints))
    assert {(e.question, e.trace, e.facts) for e in both} == {
        ("What?", "A dog it is.", "A dog it is. Facts."), ("What 4?", "So.", None)}


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
def test_released_traces_join_rows_of_their_form() -> None:
    file = SHARED / "text-samples" / "dyme_chartqa_train_medium_24.json"
    hints = json.loads(file.read_text())
    examples = [Example(row["question"], row["answer"]) for row in hints]
    both = domains.join([*examples, Example("Another?", "7")], str(file))
    assert [e.trace for e in both] == [row["hint"] for row in hints]


# ---- References that can be imitated -------------------------------------------------------------


@pytest.mark.slow
def test_a_trace_longer_than_the_context_falls_back_and_is_told(
        runs: Path, tiny: Policy, capsys: Capture) -> None:
    found = [{"question": f"Which {i}?", "answer": "red", "hint": "It is red."} for i in range(24)]
    found[2]["hint"] = "red 3, " * 9000
    found[3]["hint"] = "red 3, " * 60  # fewer tokens than half of the context has bytes: it fits
    examples = [Example(row["question"], row["answer"], trace=row["hint"], name=f"row {i}")
                for i, row in enumerate(found)]
    checked = data.check_references(examples, tiny, lambda e: len(
        dyme.target_ids(tiny, e)) + dyme.encode_prompts(tiny, [e], 0)["input_ids"].shape[1])
    said = capsys.readouterr().out.splitlines()
    assert checked[2].trace is None
    assert [a for a, b in zip(checked, examples, strict=True) if a != b] == [checked[2]]
    assert len(said) == 1
    assert "context of 512" in said[0]
    assert said[0].endswith("row 2")
    path = write_rows(runs / "rows.json", found)
    flags = ["--model", str(toy.BASE), "--data", path, "--steps", "3", "--mode", "sft"]
    assert run(runs, "a", *flags, "--prompts", "4", "--generations", "8") == 0  # every row


def test_a_row_of_more_bytes_than_half_a_context_has_tokens_is_measured(tiny: Policy) -> None:
    row = Example("q", "a", trace="x" * 300)
    kept = data.check_references([row], tiny, lambda e: 600 if e.trace else 5)
    assert kept[0].trace is None


@pytest.mark.parametrize("words", [600, 20_000])
@pytest.mark.parametrize("trace", [None, "It is red."])
def test_an_answer_longer_than_the_context_is_refused_by_name(
        runs: Path, capsys: Capture, words: int, trace: str | None) -> None:
    found = [{"question": f"Which {i}?", "answer": "red", "trace": trace} for i in range(12)]
    for row in found:
        row["answer"] = "red " * words
    path = write_rows(runs / "rows.json", found)
    assert run(runs, "a", "--model", str(toy.BASE), "--data", path, "--steps", "1") == 2
    error = capsys.readouterr().err.strip()
    says = r".*rows.json row \d+: question and answer exceed the model's context.*"
    assert re.fullmatch(says, error)
    assert not (runs / "a" / "metrics.jsonl").exists()


# ---- Models --------------------------------------------------------------------------------------


def test_a_models_own_code_is_never_run_nor_asked_for(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {
        "AutoConfig": "code.Mine", "AutoProcessor": "code.Mine"}}))
    write_rows(tmp_path / "processor_config.json", {"auto_map": {"AutoProcessor": "code.Mine"}})
    (tmp_path / "code.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(UserError, match="a model that brings its own code is not run here"):
        dyme.load_policy(str(tmp_path), CPU)


# ---- Commands ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_eval_takes_its_flags_in_any_order_and_can_ask_directly(
        runs: Path, monkeypatch: Patch, capsys: Capture) -> None:
    assert run(runs, "a", "--steps", "1") == 0
    a = str(runs / "a")
    two = ["--limit", "2"]
    for flags in ([a, *two], [*two, a], ["--model", a, *two], [*two, "--model", a],
                  ["--best", a, *two], ["--seed", "1", "--model", a, "--best", *two]):
        args = evaluation.parse_arguments(flags)
        assert (args.model, args.limit, args.prompt) == ([a], 2, "think")
    asked = []
    encode = dyme.encode_prompts
    monkeypatch.setattr(dyme, "encode_prompts",
                        lambda *args: asked.extend(args[3:]) or encode(*args))
    flags = [a, "--limit", "2", "--max-new-tokens", "4"]
    for more in ([], ["--prompt", "direct", "--samples", "2"]):
        assert run_folders.run_main(lambda more=more: evaluation.main([*flags, *more])) == 0
    assert asked == [dyme.PROMPT] + [evaluation.PROMPTS["direct"]] * 2 and "step" not in asked[1]
    assert json.loads((runs / "a" / "evaluation.json").read_text())["prompt"] == "direct"


HERE = Path(dyme.__file__).parent
# What stands for something else in the commands of the READMEs.
PLACEHOLDERS = {"MODE": "dyme", "LR": "1e-4", "SEED": "0", "N": "3",
                "URL": "http://127.0.0.1:8000/v1"}


def commands() -> list[list[str]]:
    """Every command of the READMEs as a list of words, those of the paper's table written out."""
    found = []
    for file in ("README.md", "support/README.md", "support/DETAILS.md", "support/SUMS.md"):
        text = (HERE / file).read_text()
        found += re.findall(r"(?<![\w`])python (?:dyme|eval)\.py.*?(?=#|&|$)", "\n".join(
            re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)), re.MULTILINE)
        found += [quoted.replace("\n", " ")
                  for quoted in re.findall(r"`(python (?:dyme|eval)\.py [^`]*)`", text)]
    table = (HERE / "support" / "README.md").read_text()
    table = table.partition("## The paper as commands")[2].partition("\n## ")[0]
    short = dict(re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", table, re.MULTILINE))
    for line in table.partition("`python dyme.py ...`")[2].splitlines():
        cells = line.split(" | ")
        for command in re.findall(r"`([^`]+)`", cells[1]) if len(cells) == 3 else []:
            flags = " ".join(short.get(word, word) for word in command.split())
            found.append(f"python dyme.py {flags}")
    words = [[PLACEHOLDERS.get(word, word) for word in shlex.split(command)[1:]]
             for command in found]
    assert len(short) > 5 and len(words) > 50
    return [command for command in words if not {"...", "--help"} & {*command}]


RECIPES = [  # of the release's configurations: what a command is for, and what it must then say
    ({"model": "Qwen2.5-VL-7B", "mode": "dyme"}, {"lr": 1e-5, "generations": 8, "prompts": 16}),
    ({"model": "Qwen2.5-0.5B", "mode": "dyme"},
     {"lr": 1e-5, "generations": 16, "max_new_tokens": 1024, "prompts": 32}),
    ({"data": "aokvqa:FOLDER", "mode": "dyme"},
     {"lr": 1e-5, "generations": 4, "prompts": 32, "model": "LLaVA-OV-0.5B"}),
    ({"hints": "DyME/data/chartqa/train_low.json", "mode": "dyme"},
     {"lr": 1e-5, "generations": 4, "prompts": 32}),
    ({"model": "SmolVLM-500M", "mode": "grpo"},
     {"lr": 1e-5, "generations": 4, "prompts": 16, "beta": 0.04}),
    ({"model": "SmolVLM-500M", "mode": "dyme", "data": "chartqa"},
     {"lr": 8e-5, "generations": 4, "prompts": 32, "max_new_tokens": 300}),
    ({"switch": "threshold:0.8"}, {"generations": 4, "prompts": 32, "max_new_tokens": 200}),
    ({"data": "aokvqa:FOLDER", "mode": "two-stage"}, {"lr": 1e-5, "prompts": 16, "beta": 0.04}),
    ({"hints": "DyME/data/chartqa/train_high.json", "mode": "two-stage", "beta": 0.04},
     {"generations": 4, "prompts": 32}),
]


def test_every_command_of_the_readmes_is_understood_and_the_papers_are_its_recipes(
        tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("NAME", "RUN", "runs/NAME", "smollm2"):  # a run to go on with, or to evaluate
        (tmp_path / name).mkdir(parents=True)
        write_rows(tmp_path / name / "config.json", dataclasses.asdict(Config(lr=5e-4)))
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


def test_fields_that_look_like_a_trace_but_are_not_read_are_told(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": f"{i}?", "answer": "1", "rationale": "So.", "trace": "t" * (i == 0)}
            for i in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data.load_data(str(tmp_path / "rows.json"), "train")
    assert "not read: rationale; a trace is called `trace`" in capsys.readouterr().out


def test_traces_that_end_before_their_answer_are_told(tmp_path: Path, capsys: Capture) -> None:
    traces = ["Find the answer: it is 1.\nAnswer: 1", "So.\nAnswer: 1", "So."]
    rows = [{"question": f"{i}?", "answer": "1", "trace": t} for i, t in enumerate(traces * 2)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data.load_data(str(tmp_path / "rows.json"), "train")
    said = capsys.readouterr().out
    assert "2 traces are cut at a first 'Answer:' that is not their end; the first: " in said


def test_a_damaged_model_is_named_when_it_is_loaded(
        tmp_path: Path, monkeypatch: Patch, tiny: Policy) -> None:
    def says(model: Any, processor: Any, words: str) -> None:
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        model.save_pretrained(tmp_path / "m")
        processor.save_pretrained(tmp_path / "m")
        with pytest.raises(UserError, match=f"{words}.*files is damaged or missing"):
            dyme.load_policy(str(tmp_path / "m"), CPU)

    processor = copy.deepcopy(tiny.processor)
    processor.tokenizer.add_tokens(["<think>"])
    says(tiny.model, processor, "its tokenizer has 155 tokens, its weights 154")
    model = copy.deepcopy(tiny.model)
    next(model.parameters()).data[0] = math.nan  # of the tower, which no check of words sees
    says(model, tiny.processor, "the weights are not finite")
    processor = copy.deepcopy(tiny.processor)
    processor.image_seq_len = 64
    says(tiny.model, processor, "mage features")  # as transformers says it
    model = copy.deepcopy(tiny.model)
    model.generation_config.eos_token_id = "<end_of_utterance>"
    says(model, tiny.processor, "cannot be loaded")
    # A folder goes before a short name.
    (tmp_path / "SmolVLM-256M").mkdir()
    monkeypatch.chdir(tmp_path)
    assert dyme.model_source("SmolVLM-256M") == "SmolVLM-256M"
    assert dyme.model_source("SmolVLM2-256M").startswith("HuggingFaceTB/")


def test_a_model_of_a_family_that_is_not_known_is_not_called_damaged(
        tmp_path: Path, monkeypatch: Patch, tiny: Policy) -> None:
    tiny.model.save_pretrained(tmp_path)
    tiny.processor.save_pretrained(tmp_path)
    ours = dyme.next_logits
    monkeypatch.setattr(dyme, "next_logits", lambda *args: 2 * ours(*args))
    with pytest.raises(UserError, match="not known here.*; support/README.md has the families"):
        dyme.load_policy(str(tmp_path), CPU)


def test_rows_in_a_file_of_another_kind_are_told_what_to_be(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("question,answer\n")
    with pytest.raises(UserError, match="rows.csv: rows are in a file that ends in .json or"):
        data.load_data(str(tmp_path / "rows.csv"), "train")


def test_a_question_that_holds_the_models_picture_token_is_refused_by_name(tiny: Policy) -> None:
    row = Example("What is <image>?", "red", name="rows.json row 7")
    with pytest.raises(UserError, match="rows.json row 7: its question holds '<image>'"):
        data.check_references([row], tiny, lambda example: 1)


def test_a_picture_for_a_model_of_text_is_refused_before_the_run(tiny: Policy,
                                                                 examples: list[Example]) -> None:
    blind = dataclasses.replace(tiny, processor=tiny.tokenizer)
    with pytest.raises(UserError, match="toy train row 0: has an image, and this model reads text"):
        data.check_references(examples[:1], blind, lambda example: 1)
