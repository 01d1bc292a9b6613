"""Other domains: a reader of rows and a check of answers each."""

import fnmatch
import functools
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

import reward
from reward import NUMBER, Example
from support import UserError, hub, rows


@dataclass(frozen=True)
class Domain:
    """A data set in its published layout: `--data NAME:FOLDER`, or NAME alone where it can be downloaded."""

    files: dict[str, str]  # split: pattern of its file's name; without val, a tenth of train is held back
    row: Callable[[dict[str, Any], Any, str], Example | None]  # (row, folder, name) to an example, if usable
    page: str  # where to get it
    hub: tuple[str, ...] = ()  # data set id and files, where they are plain JSON and zip


def read(data: str, split: str) -> list[Example]:
    """Read a split of a domain. Raises UserError naming the file, the row, or the page to get it from."""
    name, _, folder = data.partition(":")
    domain = DOMAINS[name]
    part = "train" if split == "val" and "val" not in domain.files else split
    if part not in domain.files:
        raise UserError(f"--data {data}: has no {split} split (it has {', '.join(domain.files)})")
    root = Path(folder) if folder else download(name, domain)
    found = sorted(f for f in root.glob("*") if fnmatch.fnmatch(f.name, domain.files[part]))
    if not found:
        raise UserError(f"--data {data}: no file {domain.files[part]} there; get it from {domain.page} and "
                        f"give its folder as --data {name}:FOLDER")
    examples = []
    for i, row in enumerate(rows.parse_rows(found[0]), 1):
        try:
            example = domain.row(row, root, f"{found[0].name} row {i}")
            if example and not (example.question.strip() and str(example.answer).strip()):
                raise ValueError("its question or answer is empty")
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise UserError(f"{found[0].name} row {i}: is not a row of {name} ({error!r})") from None
        examples += [example] if example else []
    if not examples:
        raise UserError(f"--data {data}: {found[0].name} has no usable row")
    if "val" in domain.files or split == "test":
        return examples
    return rows.hold_back(examples, [e.source + e.question for e in examples], split, data)


def download(name: str, domain: Domain) -> Path:
    """Fetch a domain's files from the hub. Raises UserError naming the page to get them from by hand."""
    advice = f"get it from {domain.page} and give its folder as --data {name}:FOLDER"
    if not domain.hub:
        raise UserError(f"--data {name}: cannot be downloaded from here; {advice}")
    paths = [hub.download(name, domain.hub[0], file, advice) for file in domain.hub[1:]]
    return Path(paths[0]).parent


def find_image(root: Path, folders: Iterable[str], image: str, name: str) -> Callable[[], Image.Image]:
    """Find an image in one of several folders, or in a zip of a folder's name."""
    for folder in folders:
        if (root / folder / image).is_file():
            return rows.image_opener(root / folder / image, name)
        if (root / f"{folder}.zip").is_file():
            inside = open_zip(root / f"{folder}.zip")
            inside = inside / folder if (inside / folder).is_dir() else inside
            return rows.image_opener(inside / image, name)
    return rows.image_opener(root / next(iter(folders)) / image, name)


@functools.cache
def open_zip(file: Path) -> zipfile.Path:
    """A zip, opened once for all rows: each opening reads its list of files, and keeps a file open."""
    return zipfile.Path(file)


def aokvqa_row(row: dict[str, Any], root: Path, name: str) -> Example:
    """A-OKVQA (Schwenk et al., 2022): any of the direct answers is right.

    Two scores are named: *official* is the published soft accuracy, *any_match* that of the DyME release. As
    there, the target is the correct choice (if it is a direct answer), the trace the longest rationale.
    """
    answers, choices = row["direct_answers"], row.get("choices") or []
    said = Counter(reward.plain(answer) for answer in answers)
    scores: dict[str, Callable[[str], float]] = {
        "official": lambda answer: min(said[reward.plain(answer)] / 3, 1.0),
        "any_match": lambda answer: float(reward.plain(answer) in said)}
    target = Counter(answers).most_common(1)[0][0]
    if choices:
        index = row["correct_choice_idx"]
        if index not in range(len(choices)):
            raise ValueError(f"correct_choice_idx {index} is none of its choices")
        choice = choices[index]
        scores["multiple_choice"] = lambda answer: float(reward.plain(answer) == reward.plain(choice))
        target = choice if reward.plain(choice) in said else target
    image = find_image(root, (f"{row['split']}2017", "images"), f"{row['image_id']:012}.jpg", name)
    return Example(row["question"], target, image, max(row["rationales"], key=len, default=None), name=name,
                   scores=scores,
                   accepts=lambda answer, limit: any(reward.answers_match(answer, a, limit) for a in answers))


def slake_row(row: dict[str, Any], root: Path, name: str) -> Example | None:
    """SLAKE (Liu et al., 2021), English rows: closed questions exactly, open ones by recall of words."""
    if row["q_lang"] != "en":
        return None
    words = words_of(row["answer"])
    # An answer without a word ("+", say) has no recall: it must be met exactly.
    closed = row["answer_type"] == "CLOSED"

    def recall(answer: str) -> float:
        return len(words & words_of(answer)) / len(words)

    def exact(answer: str) -> float:
        return float(reward.plain(answer) == reward.plain(row["answer"]))

    score = exact if closed or not words else recall
    return Example(row["question"], row["answer"], find_image(root, ("imgs",), row["img_name"], name),
                   source="closed" if closed else "open", name=name, scores={"official": score},
                   accepts=lambda answer, _: score(answer) == 1)


def geo170k_row(row: dict[str, Any], root: Path, name: str) -> Example | None:
    """Geo170K (Gao et al., 2023): a question with choices; the given solution is the trace."""
    said = {turn["from"]: turn["value"] for turn in row["conversations"]}
    question = said["human"].partition("Question:")[2].strip() or said["human"].replace("<image>", "").strip()
    thinking, answers = reward.split_response(said["gpt"])
    if not answers:
        return None  # no verifiable answer
    return geometry_example(question, answers[-1], find_image(root, ("images",), row["image"], name), name,
                            thinking)


def mathverse_row(row: dict[str, Any], root: Path, name: str) -> Example:
    """MathVerse (Zhang et al., 2024), the test of the geometry domain."""
    question = row["question"].strip() or "Answer the question that is in the image."
    image = find_image(root, ("images",), row["image"], name)
    return geometry_example(question, row["answer"], image, name)


def geometry_example(question: str, answer: str, image: Callable[[], Image.Image], name: str,
                     trace: str | None = None) -> Example:
    """A question whose answer is a choice's letter, or its value; units and degree signs are forgiven."""
    choices = dict(re.findall(r"^\(?([A-H])[:.)]\s*(.+)$", question, re.MULTILINE))

    def accepts(given: str, tolerance: float) -> bool:
        letter = re.fullmatch(r"\(?([A-H])\)?(?:[:.)].*)?", reward.strip_answer(given))
        if letter and choices:
            return letter[1] == reward.strip_answer(answer)[:1]
        value = choices.get(reward.strip_answer(answer)[:1], answer)
        return reward.answers_match(without_unit(given), without_unit(value), tolerance)

    return Example(question, answer, image, trace, name=name, accepts=accepts,
                   scores={"official": lambda given: float(accepts(given, 0.0))})


def gsm8k_row(row: dict[str, Any], _: Path, name: str) -> Example:
    """GSM8K (Cobbe et al., 2021): no image; the last number of an answer must be the right one."""
    solution, _, answer = row["answer"].rpartition("####")
    target = float(answer.replace(",", ""))

    def accepts(given: str, _: float) -> bool:
        numbers = re.findall(rf"-?{NUMBER}", given)
        return bool(numbers) and float(numbers[-1].replace(",", "")) == target

    return Example(row["question"], answer.strip(), trace=re.sub(r"<<.*?>>", "", solution).strip(), name=name,
                   accepts=accepts, scores={"official": lambda given: float(accepts(given, 0.0))})


def words_of(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def without_unit(text: str) -> str:
    """Drop degree signs, units of length and area, and TeX around a value."""
    text = re.sub(r"\$|\\\w+\{|[{}^]|\\circ", "", reward.strip_answer(text))
    unit = r"\s*(?:°|º|degrees?|(?:centi|milli|kilo)?met(?:er|re)s?|[cmk]?m|units?)[23²³]?$"
    return re.sub(unit, "", text.strip())


DOMAINS = {
    "aokvqa": Domain({"train": "aokvqa_v1p0_train*.json", "test": "aokvqa_v1p0_val*.json"}, aokvqa_row,
                     "https://github.com/allenai/aokvqa (and train2017/, val2017/ of https://cocodataset.org)"),
    "slake": Domain({"train": "train*.json", "val": "valid*.json", "test": "test*.json"}, slake_row,
                    "https://huggingface.co/datasets/BoKelvin/SLAKE",
                    ("BoKelvin/SLAKE", "train.json", "validation.json", "test.json", "imgs.zip")),
    "geo170k": Domain({"train": "qa_tuning*.json"}, geo170k_row,
                      "https://huggingface.co/datasets/Luckyjhg/Geo170K",
                      ("Luckyjhg/Geo170K", "qa_tuning.json", "images.zip")),
    "mathverse": Domain({"test": "testmini*.json"}, mathverse_row,
                        "https://huggingface.co/datasets/AI4Math/MathVerse",
                        ("AI4Math/MathVerse", "testmini.json", "images.zip")),
    "gsm8k": Domain({"train": "*train*.jsonl", "test": "*test*.jsonl"}, gsm8k_row,
                    "https://github.com/openai/grade-school-math (grade_school_math/data)"),
}
