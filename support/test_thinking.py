"""Tests of thinking.py: how held-out responses are judged, and which thinking is valid."""

import dataclasses
import json
import re
import time
from pathlib import Path

import pytest

import reward
from reward import Example
from support import thinking, toy
from support.thinking import equations, groundedness, thinking_fault

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
BARS = "red 4, blue 7, green 2, cyan 9"
YEARS = "2015 = 12, 2016 = 18, 2017 = 9, 2018 = 25"
TABLE = "Finland: News = 62%, Government = 48%\nNorway: News = 57%, Government = 61%"
MONTHS = "Jan -3.5, Feb -1.2, Mar 4.8, Apr 9.1"


# ---- Judging a response --------------------------------------------------------------------------


@pytest.mark.parametrize("thought, fault", [
    ("Observation: red 8, blue 3.\nReasoning: 8 - 3 = 5.\nConclusion: 5.", ""),
    ("red 8, blue 3. 8 + 3 = 5, so 5.", "8 + 3 = 5 is false"),
    ("red 9, blue 4. 9 - 4 = 5.", "9 is not in the image"),
    ("red 3, blue 8. So 5.", "'red 3' is not in the image"),
    ("red 8, blue 3. 8 - 3 = 5. Conclusion: 3.", "it does not end in 5"),
    ("", "nothing is quoted from the image"),
    ("It is so: five or 5", "5 is not in the image"), ("8 - 3 = 5", "")])
def test_valid_thinking_by_hand(thought: str, fault: str) -> None:
    example = Example("How much taller is red than blue?", "5", facts="red 8, blue 3")
    judged = thinking.judge(example, f"{thought}\nAnswer: 5", True)
    assert judged["thinking_fault"] == fault
    assert judged["accuracy"]
    assert judged["valid_thinking"] is (fault == "")


def test_what_is_wrong_or_cannot_be_judged_is_not_valid() -> None:
    example = Example("How much taller is red than blue?", "5", facts="red 8, blue 3")
    wrong = thinking.judge(example, "8 - 3 = 5\nAnswer: 6", True)  # for right reasons
    assert wrong["valid_thinking"] is False
    without = thinking.judge(dataclasses.replace(example, facts=None), "Answer: 5", True)
    assert without["valid_thinking"] is None
    unknown = thinking.judge(example, "8 - 3 = what we want, so 5\nAnswer: 5", True)
    assert "not judged" in unknown["thinking_fault"]
    assert unknown["valid_thinking"] is None
    rows = [row | {"length": 1} for row in (wrong, without, unknown)]
    assert thinking.summarise(rows)["thinking_judged"] == 0.5  # of the two that have facts


def test_accuracy_forgives_no_value_unless_the_example_says_so() -> None:
    example = Example("Q?", "100")
    assert not thinking.judge(example, "t\nAnswer: 104", True)["accuracy"]
    chart = dataclasses.replace(example, tolerance=0.05)  # ChartQA's metric
    assert thinking.judge(chart, "t\nAnswer: 104", True)["accuracy"]
    assert not thinking.judge(chart, "t\nAnswer: 106", True)["accuracy"]


def test_a_text_ends_in_an_answer_formatting_aside() -> None:
    assert thinking.ends_in("so 1,000 + 234 = 1,234.", "1234")
    assert thinking.ends_in("it is −4", "-4")
    assert thinking.ends_in("change -5", "-$5")
    assert not thinking.ends_in("is -$5", "5")
    assert thinking.ends_in("= - 2", "-2")
    assert thinking.ends_in("3-4", "4")
    assert thinking.ends_in("[22, 35]", "22,35")
    assert thinking.ends_in("<CONCLUSION> 4 </CONCLUSION>", "4")
    assert not thinking.ends_in("it is 4", "-4")
    assert not thinking.ends_in("it is -4", "4")
    assert not thinking.ends_in("", "4")


def test_any_format_counts_the_last_word_and_sources_are_averaged_alone() -> None:
    rows = [Example("q", "Cape Verde", source="a"), Example("q", "7", source="b")]
    rows.append(rows[1])
    said = ["It is the Cape Verde.", "so 7 of 8", "thus\nAnswer: 7"]
    judged = [thinking.judge(example, text, True) | {"length": 1}
              for example, text in zip(rows, said, strict=True)]
    assert [p["any_format"] for p in judged] == [True, False, True]
    summary = thinking.summarise(judged)
    assert summary["any_format"] == pytest.approx(2 / 3)
    assert (summary["accuracy_a"], summary["accuracy_b"]) == (0, 0.5)
    assert summary["official"] == pytest.approx(1 / 3)  # not a mean over parts
    assert summary["valid_thinking"] is None
    assert summary["thinking_judged"] is None


def test_chartqas_score_is_the_mean_of_its_two_parts() -> None:
    rows = [Example("q", "7", source="human"), Example("q", "8", source="human"),
            Example("q", "7", source="augmented")]
    judged = [thinking.judge(row, "Answer: 7", True) | {"length": 1} for row in rows]
    assert thinking.summarise(judged)["official"] == 0.75  # of 0.5 and 1, not of three rows


@pytest.mark.slow
@pytest.mark.parametrize("text", [
    " " * 50_000, "1 + " * 20_000 + "= 3", "Answer: -" + " " * 50_000 + "x", "(" * 50_000,
    "1" * 50_000,
    "1 = 1 + 0 = " * 5_000, "red 3, blue 4. 3 + 4 = 7. " * 2_000, r"\text{" * 8_000])
def test_time_to_judge_grows_no_faster_than_a_response(text: str) -> None:
    start = time.process_time()
    thinking.judge(Example("q", "[1, 2]", facts="red 3"), text, True)
    assert time.process_time() - start < 5  # quadratic patterns took minutes


def test_facts_set_in_columns_are_read_at_once() -> None:
    start = time.process_time()
    assert thinking.read_facts(f"red{' ' * 700}high, blue 7")[0] == [({"blue"}, 7)]
    assert thinking.read_facts("red     4, blue 7")[0] == [({"red"}, 4), ({"blue"}, 7)]
    assert time.process_time() - start < 5  # the cube of the spaces


# ---- Valid thinking ------------------------------------------------------------------------------


@pytest.mark.parametrize("question, answer, facts, thought", [
    ("What is the sum of red and blue?", "11", BARS, "4 (red) + 7 (blue) = 11"),
    ("What is the sum of red and blue?", "11", BARS, "Red is 4. Blue is 7. Together they are 11."),
    ("What is the total of all bars?", "22", BARS,
     "- red: 4\n- blue: 7\n- green: 2\n- cyan: 9\n\n4 + 7 + 2 + 9 = 22"),
    ("What is blue minus green?", "5", BARS, "7 bars - 2 bars = 5 bars in all."),
    ("What is twice blue?", "14", BARS,
     "<REASONING> 2 · 7 = 14. </REASONING>\n<CONCLUSION> 14 </CONCLUSION>"),
    ("What is the product?", "28", BARS, "4 x 7 = 28"),
    ("Is blue taller than red?", "Yes", BARS, "As 7 > 4, blue is taller."),
    ("Which is second?", "blue", BARS,
     "1. Cyan is 9.\n2. Blue is 7.\nThe 2nd of the 4 bars is blue."),
    ("What is the average of all years?", "16", YEARS,
     "12 + 18 + 9 + 25 = 64. For 4 years: 64 / 4 = 16."),
    ("What is half of Finland's trust in news?", "31%", TABLE,
     "Finland (News) = 62%. 0.62 / 2 = 0.31, so 31%"),
    ("What is 30% of red and blue?", "3.3", BARS, "red 4, blue 7. 4 + 7 = 11. 11 × 0.30 = 3.3"),
    ("What was 2016's share?", "28.1%", YEARS,
     "18 / 64 * 100 = 28.1% where 64 = 12 + 18 + 9 + 25."),
    ("By what percentage did it grow from 2015 to 2016?", "50%", YEARS,
     "(18 - 12) / 12 = 0.5, which is 50%."),
    ("How many years are above 10?", "3", YEARS, "12, 18 and 25 are above 10, so 3 years."),
    ("Which years are under 15?", "[2015, 2017]", YEARS,
     "2015 with 12 and 2017 with 9: 2015 and 2017."),
    ("Where is the most trust in news?", "Finland", TABLE,
     "Finland (News) = 62%, Norway (News) = 57%. Finland."),
    ("What is the difference of April and January?", "12.6", MONTHS,
     "April is 9.1, January -3.5. 9.1 - (-3.5) = 12.6"),
    # What follows the answer repeats the question.
    ("What were sales in 2015?", "12", YEARS, "Sales were 12 in 2015."),
    ("What were songs in Q3?", "12", "Q2 = 18, Q3 = 12", "There were 12 songs in Q3."),
    ("What is the difference between 2015 and 2016?", "6", YEARS,
     "18 - 12 = 6. The difference between 2015 and 2016 is 6."),
    ("How much more does blue read than red?", "3", BARS, "7 - 4 = 3. Blue reads 3 more than red."),
    ("How many are left?", "4", "start 13, sells 12, buys 3", "13 - 12 = 1, 1 + 3 = 4."),
    ("Are red and blue above 9?", "Yes", BARS, "Red 4 and blue 7: 4 + 7 > 9, so yes."),
    ("Is red cheaper?", "Yes", "red $27, blue $75", "$27 is less than $75, so yes."),
])
def test_sensible_thinking_is_valid(question: str, answer: str, facts: str, thought: str) -> None:
    example = Example(question, answer, facts=facts)
    assert thinking_fault(f"{thought}\nAnswer: {answer}", example) == ""


@pytest.mark.parametrize("question, answer, facts, thought, fault", [
    ("What is the sum of red and blue?", "11", BARS, "Red is 2 and blue is 9. 2 + 9 = 11.",
     "'Red is 2' is not in the image"),
    ("What is the sum of red and blue?", "11", BARS, "9 + 2 = 11",
     "no value of blue or red is quoted"),
    ("Which is tallest?", "cyan", BARS, "2 (cyan) is the most: cyan", "'2' is not in the image"),
    ("What is the product?", "28", BARS, "4 x 7 = 30 = 28", "4 * 7 = 30 is false"),
    ("Is blue taller than red?", "Yes", BARS, "Red 4 > blue 7, so yes", "4 > blue 7 is false"),
    ("Which is tallest?", "cyan", BARS, "cyan 9 > cyan 9, cyan", "9 > cyan 9 is false"),
    ("Is blue taller than red?", "Yes", BARS, "Red is 4 and blue is 7. 4 is more than 7: yes",
     "4 is more than 7 is false"),
    ("Is blue taller than red?", "Yes", BARS, "Blue is 7 and red is 4, so no.",
     "it does not end in Yes"),
    ("Is red cheaper?", "No", "red $75, blue $27", "$75 is less than $27, so no.",
     "75 is less than 27 is false"),
    ("What were sales in 2015?", "12", YEARS, "2015 = 12, but sales were 18 in 2016.",
     "it does not end in 12"),
    ("What is the difference between 2015 and 2016?", "6", YEARS,
     "18 - 12 = 6. The difference between 2015 and 2016 is 9.", "it does not end in 6"),
    ("sum?", "64", YEARS, "12+18+9+25=64.4 so 64", "12 + 18 + 9 + 25 = 64.4 is false"),
    ("ages?", "25", YEARS, "12 - 18 = 9, so 25", "12 - 18 = 9 is false"),
    ("Where is the most trust in news?", "Finland", TABLE, "Finland (News) = 48%. Finland.",
     "'(News) = 48' is not in the image"),
    ("What is March?", "4.8", MONTHS, "March is -4.8, that is 4.8",
     "'March is -4.8' is not in the image"),
    ("What is red?", "4", BARS, "4 / 9 = 0.4444, 4 * 9 = 36, 36 / 9 = 4",
     "not judged: what 4 / 9 = 0.4444 is for"),
    ("What is red?", "4", BARS, "red = seven or 4. 2 + 7 = nine. 4", "not judged: 2 + 7 = ?"),
])
def test_false_thinking_is_told(question: str, answer: str, facts: str, thought: str,
                                fault: str) -> None:
    example = Example(question, answer, facts=facts)
    assert thinking_fault(f"{thought}\nAnswer: {answer}", example) == fault


def test_a_number_beside_a_name_must_be_its_own() -> None:
    text = "red 4, blue 4, so green + blue = 9 and cyan 9"
    found = [text[start:end] + "+-"[not grounded]
             for start, end, grounded in thinking.quoted_numbers(text, BARS)]
    assert found == ["4+", "4-", "9+", "9+"]  # the sum of two bars is neither's height


@pytest.mark.slow
@pytest.mark.parametrize("traces, share", [("high", 1.0), ("medium", 0.64), ("low", 0.30)])
def test_the_toy_s_traces_are_all_judged(traces: str, share: float) -> None:
    examples = toy.make_examples("train", traces)[:384]
    faults = [thinking_fault(reward.reference_response(e), e) for e in examples]
    assert not any("not judged" in fault for fault in faults)
    assert faults.count("") / len(faults) == pytest.approx(share, abs=0.05)


@pytest.mark.skipif(not (SHARED / "cases").exists(), reason="needs ../shared/cases")
@pytest.mark.parametrize("valid, most_misjudged", [(True, 2), (False, 3)])
def test_thinking_is_judged_as_a_person_would(valid: bool, most_misjudged: int) -> None:
    cases = json.loads((SHARED / "cases" / "thinking.json").read_text(encoding="utf-8"))
    cases = [case for case in cases if case["valid"] is valid]
    faults = [thinking_fault(case["response"], Example(
        case["question"], case["answer"], facts=case["facts"])) for case in cases]
    judged = [fault == "" for fault in faults if "not judged" not in fault]
    assert len(judged) >= 0.8 * len(cases)
    assert judged.count(not valid) <= most_misjudged


# ---- Equations and groundedness ------------------------------------------------------------------


@pytest.mark.parametrize("text", [
    "3 − 7 = −4", "8 -3 = 5", "3 × 2 = 6", "$5 - $3 = $2", "3 - 5 = - 2", "20 / 50 = 40%",
    "(2 + 2 + 3) / 3 = 2.3",
    "1/6 = 0.16", "- 3 + 4 = 7", "-3 + 4 = 1", "3 - -4 = 7", "in 2010 3 + 4 = 7", "3 + 9 = 24 / 2",
    "9 minus 2 equals 7",
    "4 plus 7 is 11", "60 students x 2/3 = 40", "120 * (1-20%) = 96", "80% * 80% = 64%",
    "2.50 - 2.24 = 26 cents",
    "30 x (1 and 1/3) = 40", "$80 000 x 20/100 = $16 000", "4^2 = 16", "2(3 + 4) = 14",
    "64 = 12 + 52", "100 / 3 = 33", r"9 \times 2 = 18", r"\frac{7}{2} \cdot 1600 \div 2 = 2800",
    r"6 \times 1\frac{1}{10} = 6.6", r"\frac{-15}{2} = -7\frac{1}{2}"])
def test_true_equations_are_read(text: str) -> None:
    assert [e.true for e in equations(text)] == [True]


@pytest.mark.parametrize("text", [
    "9 ÷ 3 = −3", "-3 + 4 = 7", "0.1 + 0.2 = 0.31", "3 - -4 = -1", "29 - 18 = 12",
    "1,250 + 310 = 1,575", "4 + 7 is 12", "4.5 + 3.7 = 8",
    "7 + 4 = 2 * 9", "100 + 1 = 2 * 50", "10 / 4 = 3", "15 / 2 = 7", "100 / 3 = 34",
    "12 - 18 = 9", "4 apples + 7 apples = 12 apples", r"\( 9 \times 2 = 9 \)",
    r"\frac{2}{3} - \frac{1}{4} = \frac{1}{12}"])
def test_false_equations_are_read(text: str) -> None:
    assert [e.true for e in equations(text)] == [False]


@pytest.mark.parametrize("text", [
    "sales (2018) = 41", "= 3", "5 = 5", "x = 4", "3 + 4 = ²", "ages 18-29 = 42%",
    "24V + 15 + 6 = 141", "x*4 + 240 = 1920",
    "2 hours = 120 minutes", "half of 60 is 60/2 of it", "3 + 4 = 7x", "1/2 (68) + 10 = 44",
    "4 + 7 = eleven hundred",
    # From published solutions whose answers are right.
    "she received 1/2 dozen = 6 brownies", "1 1/2 dozen = 18 brownies", "This 2/5 equals 12.8",
    "3/4 gallon = (3/4) * 8 = 6 pints", "W2 = W1 + 10 = 20 + 10 = 30",
    "24 x 50 percent = 12 pounds", "35 + 25 = (3/4)(F - 5)", "17/7=2 r3",
    "17 ÷ 5 = 3 remainder 2"])
def test_what_is_no_equation_or_cannot_be_read_is_not_called_false(text: str) -> None:
    assert not [e for e in equations(text) if e.true is False]


@pytest.mark.parametrize("text, grounded", [
    ("red 3, blue 4. 3 + 4 = 7.", (5, 5)), ("red 3, blue 5. 3 + 5 = 8.",
     (2, 5)),  # 8 is not derived
    ("3 + 4 = 8", (2, 3)), ("(3 + 9) / 2 = 6", (4, 4)),  # an average's count is derived
    ("(3 + 9) / 2 = 5", (2, 4)), ("9 / 2 = 4.5", (2, 3)), ("3 + 9 / 2 = 7.5", (3, 4)),
    ("-3 + 4 = 1. 3 - -4 = 7. - 3 + 4 = 7. -3 - 4 = −7", (12, 12)), ("sales (4) = 3", (2, 2))])
def test_groundedness_by_hand(text: str, grounded: tuple[int, int]) -> None:
    assert groundedness(text, "red 3, blue 4, green 9") == grounded


@pytest.mark.parametrize("text, facts, grounded", [
    ("100 - 62 = 38", "news 62", (3, 3)),  # what is left of all
    ("The most is 4.4", "red 4.37, blue 2", (1, 1)), ("red 4.4", "red 4.37, blue 2", (1, 1)),
    ("red reads 7", BARS, (0, 1)),  # blue's
    ("64 + 18 = 82 where 64 = 12 + 18 + 9 + 25", YEARS, (8, 8))])
def test_groundedness_by_other_facts(text: str, facts: str, grounded: tuple[int, int]) -> None:
    assert groundedness(text, facts) == grounded


def test_numbers_of_the_question_are_not_quoted() -> None:
    facts = "red 3, blue 4, green 9"
    assert groundedness("above 5: green 9", facts, "How many bars are above 5?") == (1, 1)


def test_arithmetic_is_parsed_and_never_executed() -> None:
    assert thinking._arithmetic("__import__('os')") is None
    assert thinking._arithmetic("9 ** 9 ** 9") is None
    assert thinking._arithmetic("2 + 3 * 4") == 14


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "real" / "gsm8k").exists(), reason="needs ../shared/real/gsm8k")
def test_few_of_the_solutions_of_gsm8k_hold_a_false_equation() -> None:
    folder = SHARED / "real" / "gsm8k"
    lines = [line for split in ("train", "test")
             for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
    solutions = [re.sub("<<.*?>>", "", json.loads(line)["answer"].split("####")[0])
                 for line in lines]
    flagged = [s for s in solutions if any(e.true is False for e in equations(s))]
    assert len(flagged) <= 40
