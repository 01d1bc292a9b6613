"""Published data sets: how rows are read and answers checked; traces for them (`--hints`)."""

import functools
import importlib
import re
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

import reward
from reward import Example
from support import UserError, parallel, row_files


@dataclass(frozen=True)
class Domain:
    """A data set as published: `--data NAME:FOLDER`, or NAME alone where it can be downloaded."""

    files: dict[str, str]  # split: pattern of its file's name; val is else a tenth of train
    row: Callable[[dict[str, Any], Any, str], Example | None]  # (row, folder, name); None: ignored
    page: str = ""  # where to get it, if not from the hub
    hub: tuple[str, ...] = ()  # data set id and files, where they can be downloaded


def read(source: str, split: str, augmented: bool) -> row_files.Rows:
    """Read a split of a domain, or of ChartQA. Raises UserError naming what is not there."""
    name, _, folder = source.partition(":")
    if name not in DOMAINS:
        return importlib.import_module("support.chartqa").read(source, split, augmented)
    if augmented:
        raise UserError("--augmented belongs to ChartQA data")
    domain = DOMAINS[name]
    part = "train" if split == "val" and "val" not in domain.files else split
    if part not in domain.files:
        raise UserError(f"--data {source}: has no {split} split (it has {', '.join(domain.files)})")
    page = domain.page or f"https://huggingface.co/datasets/{domain.hub[0]}"
    advice = f"get it from {page} and give its folder as --data {name}:FOLDER"
    root = Path(folder) if folder else download(name, domain.hub, advice)
    found = sorted(root.glob(domain.files[part]))
    if not found:
        raise UserError(f"--data {source}: no file {domain.files[part]} there; {advice}")
    rows, skipped = read_usable(found[0], lambda row, name: domain.row(row, root, name))
    groups = [] if "val" in domain.files else [e.source + e.question for _, e in rows]
    return [example for _, example in rows], groups, skipped


def read_usable(file: Any, make: Callable[[Any, str], Example | None]
                ) -> tuple[list[tuple[Any, Example]], list[str]]:
    """A published file's rows and what `make(row, name)` makes of them; why others are skipped."""
    rows, skipped = [], []
    for place, row in row_files.parse_rows(file):
        name = f"{file.name} {place}"
        try:
            if not (example := make(row, name)):
                continue
            for key in ("question", "answer"):
                if not row_files.visible(getattr(example, key)):
                    raise ValueError(f"expected a string as {key}, got {getattr(example, key)!r}")
            rows.append((row, example))
        except (LookupError, TypeError, ValueError, AttributeError, UserError) as e:
            why = f"it has no {e}" if isinstance(e, KeyError) else str(e)
            skipped.append(f"{name}: {why.removeprefix(f'{name}: ')[:200]}")
    return rows, skipped


def download(name: str, hub: tuple[str, ...], advice: str, revision: str | None = None) -> Path:
    """Fetch files from the hub, or find them where it put them before; their folder."""
    if not hub:
        raise UserError(f"--data {name}: cannot be downloaded from here; {advice}")
    try:
        return Path(snapshot_download(hub[0], repo_type="dataset", revision=revision,
                                      allow_patterns=[*hub[1:]]))
    except Exception as error:  # noqa: BLE001 - the client raises many kinds, alike to the user
        raise UserError(f"--data {name}: {hub[0]} cannot be downloaded ({type(error).__name__}); "
                        f"{advice} (HF_HUB_OFFLINE=1 takes what is here already)") from None


def find_image(root: Path, folders: tuple[str, ...], image: str, name: str) -> Any:
    """Find an image in one of several folders, or in a zip of a folder's name; None without one."""
    places: list[Any] = []
    for folder in folders:
        places += [root / folder, *open_zip(root / f"{folder}.zip")]
    found = [place / image for place in places if (place / image).is_file()]
    return row_files.image_opener((found or [places[0] / image])[0], name) if image else None


@functools.cache
def open_zip(file: Path) -> tuple[zipfile.Path, ...]:
    """Where a zip's images may be. Opened once for all rows: each opening reads its whole list."""
    return (zipfile.Path(file, f"{file.stem}/"), zipfile.Path(file)) if file.is_file() else ()


# ---- A-OKVQA, SLAKE, GSM8K -----------------------------------------------------------------------


def aokvqa_row(row: dict[str, Any], root: Path, name: str) -> Example:
    """A-OKVQA (Schwenk et al., 2022): any of the direct answers is right."""
    lists = []
    for key in ("direct_answers", "choices", "rationales"):
        if not isinstance(found := row.get(key) or [], list):
            raise ValueError(f"its {key} is no list of texts")
        # The places of choices count, those of the others do not.
        lists.append([item for item in found if key == "choices" or row_files.visible(item)])
    answers, choices, rationales = lists
    said, difficult = Counter(map(reward.plain, answers)), row.get("difficult_direct_answer")
    # *official* is the published soft accuracy, without the rows marked difficult; *any_match*, the
    # target (the correct choice, if it is a direct answer) and the trace are the release's.
    scores: dict[str, Callable[[str], Any]] = {
        "official": lambda given: None if difficult else min(said[reward.plain(given)] / 3, 1.0),
        "any_match": lambda given: float(reward.plain(given) in said)}
    target = Counter(answers).most_common(1)[0][0]
    if choices:
        if row["correct_choice_idx"] not in range(len(choices)):
            raise ValueError("its correct_choice_idx is none of its choices")
        choice = choices[row["correct_choice_idx"]]
        if not row_files.visible(choice):
            raise ValueError("its correct choice is empty")
        scores["multiple_choice"] = lambda given: float(reward.plain(given) == reward.plain(choice))
        target = choice if reward.plain(choice) in said else target
    image = find_image(root, (f"{row['split']}2017", "images"), f"{row['image_id']:012}.jpg", name)
    return Example(row["question"], target, image, max(rationales, key=len, default=None),
                   name=name, scores=scores,
                   accepts=lambda given, _: any(reward.answers_match(given, a) for a in answers))


def slake_row(row: dict[str, Any], root: Path, name: str) -> Example | None:
    """SLAKE (Liu et al., 2021), English rows: closed questions exactly, open ones by words."""
    if row["q_lang"] != "en":
        return None
    answer, closed = row["answer"], row["answer_type"] == "CLOSED"

    def official(given: str) -> float:
        # Published is, for open questions, the recall of words; r_a also wants no other words.
        words, said = (set(re.findall(r"\w+", text.lower())) for text in (answer, given))
        if closed or not words:  # "+" has no word
            return float(reward.plain(given) == reward.plain(answer))
        return len(words & said) / len(words)

    def accepts(given: str, _: float) -> bool:
        alike = not closed and parts_of(given) == parts_of(answer) != []
        return alike or reward.answers_match(given, answer)

    return Example(row["question"], answer, find_image(root, ("imgs",), row["img_name"], name),
                   source="closed" if closed else "open", name=name,
                   accepts=accepts, scores={"official": official})


def parts_of(text: str) -> list[list[str]]:
    """The words between commas, in any order: "Left Lung, Right" is not "Right Lung, Left"."""
    parts = re.split(r"[,;&]|\band\b", text.lower())
    return sorted(sorted(words) for part in parts if (words := re.findall(r"\w+", part)))


def gsm8k_row(row: dict[str, Any], _: Path, name: str) -> Example:
    """GSM8K (Cobbe et al., 2021): no image; the last number of an answer must be the right one."""
    solution, _, answer = row["answer"].rpartition("####")
    if reward.parse_number(answer) is None:
        raise ValueError("it does not end in #### and a number")

    def accepts(given: str, _: float) -> bool:
        return any(reward.answers_match(text, answer) for text in (given, last_number(given)))

    return Example(row["question"], answer.strip(), name=name, accepts=accepts,
                   trace=re.sub(r"<<.*?>>", "", solution).strip(),
                   scores={"official": lambda given: float(accepts(given, 0.0))})


def last_number(text: str) -> str:
    """The last number of a text with its sign; empty if it is part of another: 1/18, 9 * 2, 18k."""
    text = re.sub(r"\b(?:minus|negative)\b", "-", reward.strip_answer(text).lower())
    text = re.sub(r"- ?[$€£]? ?(?=[\d.])", "-", text)
    *_, last = [None, *re.finditer(reward.SIGNED, text)]
    part_of = r"[a-z_]$|[/^*×÷]\s*$|[\d)%]\s*[+-]\s*$|\d[.,]$"
    if not last or re.search(part_of, text[:last.start()]):
        return ""
    more = re.match(r"\s*(?:/\s*[\d(]|\^|k\b|thousand|million|billion)", text[last.end():])
    return "" if more else last[0]


# ---- Geometry ------------------------------------------------------------------------------------

Quantity = tuple[str, str, str]  # the name, value and unit of "Area = 9π cm^2"
LEAD_IN = r"(?i)^(?:the )?(?:(?:correct )?(?:answer|option|choice)(?: is)?:? *)+"
# How formulas and units are written, and what is compared instead.
TEX = (
    (r"\\[dt]?frac ?{([^{}]*)} ?{([^{}]*)}", r"(\1)/(\2)"),
    (r"(?:\\?sqrt|√) ?[{(]([^{}()]*)[})]", r"√(\1)"),
    (r" ?(?:\*|\\times|\\cdot)? ?(?:\\pi|(?<![a-z])pi(?![a-z])|π)", "π"),
    (r"[掳º]|degrees?|\^?{?\\circ}?", "°"),
    (r"(?:(c)enti|(m)illi|(k)ilo)?(?:(m)et(?:er|re)|(g)ram|(l)it(?:er|re))s?", r"\1\2\3\4\5\6"),
    (r"\\(?:left|right|angle|(?=\W))|[$~∠]|(?<!\d) | (?!\d)", ""),
    # (3)/(4) is 3/4
    (r"(?<=[/√^])[({](-?[\w.π]+)[)}]|(?<![\w)])\((-?[\w.π√]+)\)(?=/)", r"\1\2"),
)
UNIT = (r"(?<=[\dπ.)])(?:square|sq\.?|cubic)?([ckm]?m|(?:平方|厘|千)?米|海里|小时|秒"
        r"|k?g|l|km/h|units?)"
        r"(?:\^?[23]|[²³]|squared|cubed)?$")


def geo170k_row(row: dict[str, Any], root: Path, name: str) -> Example:
    """Geo170K (Gao et al., 2023): a question with choices; the given solution is the trace."""
    said = {turn["from"]: turn["value"] for turn in row["conversations"]}
    question = said["human"].partition("Question:")[2] or said["human"].replace("<image>", "")
    thinking, answers = reward.split_response(said["gpt"])
    image = find_image(root, ("images",), row["image"], name)
    return geometry_example(question.strip(), ["", *answers][-1], image, name, thinking)


def mathverse_row(row: dict[str, Any], root: Path, name: str) -> Example:
    """MathVerse (Zhang et al., 2024), the test of the geometry domain."""
    image = find_image(root, ("images",), row["image"], name)
    seen = "Answer the question that is in the image." if image else ""
    return geometry_example(row["question"].strip() or seen, row["answer"], image, name)


def geometry_example(question: str, answer: str, image: Any, name: str,
                     trace: str | None = None) -> Example:
    """A question whose answer is a choice, by letter or value, or a value; units are forgiven."""
    listed = re.findall(r"^\(?([A-H])[:.)][ \t]*(.*)$", question, re.MULTILINE)
    choices = {letter: quantity(value) for letter, value in listed}
    chosen, target = letters(answer, choices), quantity(answer)
    # An answer that is the value of two choices is met by either letter.
    right = [chosen] if chosen else [{c} for c in choices if same(choices[c], target)]
    values = [choices[c] for c in choices if chosen == {c}] or [target]

    def accepts(given: str, _: float) -> bool:
        given = re.sub(LEAD_IN, "", reward.strip_answer(given))
        said = letters(given, choices, unlisted=bool(chosen) and not choices)
        return said in right if said else same(quantity(given), values[0])

    return Example(question, answer, image, trace, name=name, accepts=accepts,
                   scores={"official": lambda given: float(accepts(given, 0.0))})


def letters(text: str, choices: dict[str, Quantity], unlisted: bool = False) -> set[str]:
    """The letters that a whole answer consists of: C; C and D; C (140°), if that is its value."""
    text = reward.strip_answer(text)
    text = text.upper() if len(text) == 1 else text
    if re.fullmatch(r"(?:[\s,;&().]*(?:and )?\b[A-H]\b)+[\s,;&().]*", text):
        return set(re.findall(r"\b[A-H]\b", text))
    match = re.fullmatch(r"\(?([A-H])\)?(?:\s*[:.,)=-]|\s*(?=\())\s*(.+)", text)
    fits = match and match[1] in choices and same(quantity(match[2]), choices[match[1]])
    # Where the question lists no choices, any value may stand beside a letter.
    return {match[1]} if match and (fits or unlisted) else set()


def quantity(text: str) -> Quantity:
    """What a formula, or a value with a unit, says: without TeX, spaces and degree signs."""
    text = reward.strip_answer(text).lower()
    for pattern, plain in TEX * 3:  # from the inside out
        text = re.sub(pattern, plain, text)
    text = re.sub(r"^(-?[\d.]+)=([a-z]\w*)$", r"\2=\1", text)
    named = re.fullmatch(r"([a-z][\w.]*(?:\([a-z]\))?|\(x,y\)|)=([^=]+)", text)
    name, value = named.groups() if named else ("", text)
    value, *unit = re.split(UNIT, re.sub("°t?$", "", value))
    return name, value.removesuffix("."), re.sub("units?", "", unit[0]) if unit else ""


def same(given: Quantity, target: Quantity) -> bool:
    """Equal in value; a name or a unit may be missing, but no other may stand there."""
    names, (value, wanted), units = zip(given, target, strict=True)
    variables = all(names) and max(map(len, names)) < 4  # x and y, but not A and Area
    if variables and names[0] != names[1] or all(units) and units[0] != units[1]:
        return False
    # An interval such as [1, 2] would be taken for a list.
    return value == wanted != "" or wanted[:1] != "[" and reward.answers_match(value, wanted)


# ---- Traces of the release -----------------------------------------------------------------------


def join(examples: list[Example], file: str) -> list[Example]:
    """The rows that have a trace in a file, with it (as in Table S1). Raises UserError."""
    traces: dict[tuple[str, str], dict[str, str | None]] = {}
    for place, row in row_files.parse_rows(Path(file)):
        try:
            answer, facts = str(row["answer"]), row.get("visual_fact")
            # GSM8K's marks for a calculator, and its answer line.
            trace = re.sub(r"<<[^<>]*=[^<>]*>>", "", row.get("trace") or row["hint"] or "").strip()
            solution, mark, last = trace.rpartition("####")
            trace = solution.strip() if mark and reward.answers_match(last, answer) else trace
            if trace:
                found = traces.setdefault(key(row["question"], answer), {})
                found[trace] = facts if isinstance(facts, str) and facts else None
        except (TypeError, KeyError, AttributeError) as error:
            raise UserError(f"--hints {file} {place}: is not {{question, answer, hint}} "
                            f"({error!r})") from None
    joined = []
    for example in examples:
        found = traces.get(key(example.question, example.answer), {})
        # Of several (for other images) a row takes the one that it has already, or none.
        for trace, facts in found.items():
            if len(found) == 1 or trace == (example.trace or "").strip():
                joined.append(replace(example, trace=trace, facts=facts or example.facts))
    if not joined:
        raise UserError(f"--hints {file}: has no trace for any row of --data (question, answer)")
    if parallel.is_main():
        print(f"--hints {file}: {len(joined)} training rows have a trace; the other "
              f"{len(examples) - len(joined)} are left out")
    return joined


def key(question: str, answer: str) -> tuple[str, str]:
    """What a row and its trace have in common: question and answer, typography apart."""
    number = reward.parse_number(answer)
    return reward.plain(question), reward.plain(answer) if number is None else str(number)


DOMAINS = {
    "aokvqa": Domain({"train": "aokvqa_v1p0_train*.json", "test": "aokvqa_v1p0_val*.json"},
                     aokvqa_row, "https://github.com/allenai/aokvqa (and train2017/, val2017/ of "
                     "https://cocodataset.org)"),
    "slake": Domain({"train": "train*.json", "val": "valid*.json", "test": "test*.json"}, slake_row,
                    hub=("BoKelvin/SLAKE", "train.json", "validation.json", "test.json",
                         "imgs.zip")),
    "geo170k": Domain({"train": "qa_tuning*.json"}, geo170k_row,
                      hub=("Luckyjhg/Geo170K", "qa_tuning.json", "images.zip")),
    "mathverse": Domain({"test": "testmini*.json"}, mathverse_row,
                        hub=("AI4Math/MathVerse", "testmini.json", "images.zip")),
    "gsm8k": Domain({"train": "*train*.jsonl", "test": "*test*.jsonl"}, gsm8k_row,
                    "https://github.com/openai/grade-school-math (grade_school_math/data)"),
}
