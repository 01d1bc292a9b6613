"""Tests of `--data charts` and of the eyes that SmolLM2 gets to see them."""

import itertools
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import dyme
import reward
from support import UserError, charts, make_sight, sight, smollm2, thinking, toy
from support import runs as run_folders

CHART = charts.Chart({"red": 4, "blue": 27, "green": 12, "brown": 50})


def test_a_chart_is_drawn_to_scale() -> None:
    pixels = np.asarray(CHART.draw())
    assert pixels.shape == (192, 192, 3)
    for i, (name, value) in enumerate(CHART.values.items()):
        column = pixels[:, 21 + 42 * i + 21]  # the middle of one of four slots of 42 pixels
        filled = (column == [int(charts.COLORS[name][j:j + 2], 16) for j in (1, 3, 5)]).all(-1)
        # Three pixels to a unit; the foot of a bar lies under the axis.
        assert np.flatnonzero(filled).tolist() == [*range(172 - 3 * value, 172)]
    assert CHART.facts() == "red 4, blue 27, green 12, brown 50"


def test_charts_and_invented_heights_are_as_said() -> None:
    drawn = [*itertools.islice(charts.random_charts(), 200)]
    heights = {height for chart in drawn for height in chart.values.values()}
    assert (min(heights), max(heights)) == (1, charts.TOP)
    assert {len(chart.values) for chart in drawn} == {4, 5, 6}
    for kind, answer in (("sum", "31"), ("difference", "23")):
        values = charts.invented(kind, ["blue", "red"], CHART, np.random.default_rng(0))
        assert toy.answer_to(kind, ["blue", "red"], values) == answer
        assert not {*values.values()} & {*CHART.values.values()}


@pytest.mark.slow
@pytest.mark.parametrize(("traces", "share"), [("high", 1.0), ("low", 0.3)])
def test_rows_of_charts_are_right_and_as_bad_as_asked_for(traces: str, share: float) -> None:
    rows = charts.make_examples("charts", "val", traces)
    judged = [thinking.judge(e, reward.reference_response(e), finished=True) for e in rows]
    assert all(row["accuracy"] for row in judged)
    assert np.mean([not row["thinking_fault"] for row in judged]) == pytest.approx(share, abs=0.05)
    for example in rows:
        shown = re.findall(r"\d+", (example.trace or "").split("Reasoning")[0])
        real = {int(n) for n in re.findall(r"\d+", example.facts or "")}
        assert {int(n) for n in shown} <= real or not {int(n) for n in shown} & real
    assert {e.source for e in rows} == {"value", "sum", "difference", "tallest", "shortest"}


@pytest.mark.slow
def test_no_chart_is_in_two_splits() -> None:
    facts = [e.facts for split in charts.SPLITS
             for e in charts.make_examples("charts", split, "high")]
    assert len(set(facts)) == len(facts) == 2048 + 512 + 512


def test_a_chart_that_comes_again_is_left_out_and_lessons_take_none_of_the_rows(
        monkeypatch: pytest.MonkeyPatch) -> None:
    other = charts.Chart({"red": 1, "blue": 2, "green": 3, "pink": 4})
    drawn = itertools.cycle([CHART, CHART, other])
    monkeypatch.setattr(charts, "random_chart", lambda rng: next(drawn))
    assert [*itertools.islice(charts.random_charts(), 2)] == [CHART, other]
    monkeypatch.setattr(charts, "make_examples", lambda data, split, traces: [
        reward.Example("", "", facts=CHART.facts())])
    assert [*itertools.islice(make_sight.training_charts(0), 3)] == [other] * 3


def test_charts_are_read_by_name_and_have_the_preset_of_sums() -> None:
    cfg = dyme.parse_config(["--model", "SmolLM2-135M", "--data", "charts"])
    assert (cfg.steps, cfg.prompts, cfg.max_new_tokens) == (40, 4, 96)
    with pytest.raises(UserError, match="give charts"):
        charts.make_examples("charts:new", "test", "low")


def test_what_the_visual_tokens_shall_say_by_hand() -> None:
    assert make_sight.description(CHART) == [
        "Ġred", "Ġ", "4", ",", "Ċ", "Ċ", "Ġblue", "Ġ", "2", "7", ",", "Ċ",
        "Ġgreen", "Ġ", "1", "2", ",", "Ċ", "Ġbrown", "Ġ", "5", "0", ",", "Ċ", *["Ċ"] * 12]


def test_squared_distances_by_hand() -> None:
    x, table = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0], [4.0, 6.0]])
    assert make_sight.squared_distances(x, table).tolist() == [[0.0, 25.0]]


def test_lessons_read_what_the_chart_shows() -> None:
    for _, (example, response) in zip(range(100), make_sight.lessons(0), strict=False):
        values = example.image.__self__.values  # type: ignore[union-attr]
        names = re.findall("|".join(values), response)
        assert names and re.findall(r"\d+", response) == [str(values[name]) for name in names]
        assert not re.search("[-+=]|Answer|sum|tall|short", response)


def small_language(folder: Path) -> Path:
    """A random Llama of two layers, and a tokenizer that splits as SmolLM2's does."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator([f" {name} 12,\n" for name in charts.COLORS] * 9, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=special[1], eos_token=special[2], pad_token=special[2])
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=1,
        eos_token_id=2, pad_token_id=2))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_recipe_and_the_model_it_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"STEPS": 3, "LESSONS": 2, "BATCH": 4}.items():
        monkeypatch.setattr(make_sight, name, value)
    language, file = small_language(tmp_path / "language"), tmp_path / "new.safetensors"
    make_sight.make(language, file)
    sight.build(language, tmp_path / "model", file)
    policy = dyme.load_policy(str(tmp_path / "model"), torch.device("cpu"))
    saved = safetensors.torch.load_file(file)

    # The language model is the package's but for its attention: W + up down.
    text = transformers.AutoModelForCausalLM.from_pretrained(language).state_dict()
    ours = policy.model.model.text_model.state_dict()
    change = saved["1.q_proj.up"].float() @ saved["1.q_proj.down"].float()
    assert change.abs().max() > 1e-4
    name = "layers.1.self_attn.q_proj.weight"
    torch.testing.assert_close(ours[name], text[f"model.{name}"] + change)
    name = "layers.1.mlp.up_proj.weight"
    assert torch.equal(ours[name], text[f"model.{name}"])
    rows, new_line = ours["embed_tokens.weight"], policy.tokenizer("\n").input_ids
    assert torch.equal(rows[-4:], rows[new_line].expand(4, -1))

    # The eyes are the file's, and see the pixels that they were taught on.
    assert torch.equal(policy.model.model.connector.modality_projection.proj.weight,
                       saved["connector.modality_projection.proj.weight"].float())
    row = reward.Example("What?", "4", CHART.draw)
    inputs = dyme.encode_prompts(policy, [row], 0)
    torch.testing.assert_close(inputs["pixel_values"][0, 0], make_sight.picture(CHART))
    assert (inputs["input_ids"] == policy.model.config.image_token_id).sum() == 36
    assert policy.end_ids == [2]


def test_eyes_that_are_in_the_repository_read() -> None:
    """Of vectors that stand for the same word the nearest ones belong together."""
    stored = safetensors.torch.load_file(sight.WEIGHTS)
    assert sight.WEIGHTS.stat().st_size < 6e6
    config = transformers.AutoConfig.for_model(
        "idefics3", scale_factor=1, vision_config=sight.VISION, text_config={
            "model_type": "llama", "vocab_size": 8, "hidden_size": 576, "num_hidden_layers": 1,
            "intermediate_size": 8, "num_attention_heads": 9})
    model = transformers.AutoModelForImageTextToText.from_config(config)
    sight.eyes(model).load_state_dict(
        {name: x.float() for name, x in stored.items() if not name[0].isdigit()})
    seen = [chart for _, chart in zip(range(64), charts.random_charts(), strict=False)]
    with torch.no_grad():
        pixels = torch.stack([make_sight.picture(chart) for chart in seen])
        tower = model.model.vision_model(pixel_values=pixels).last_hidden_state
        vectors = model.model.connector(tower)[:, :24].flatten(0, 1)  # of the first four bars
    words = [word for chart in seen for word in make_sight.description(chart)[:24]]
    nearest = (torch.cdist(vectors, vectors) + torch.eye(len(words)) * 1e9).argmin(1).tolist()
    assert np.mean([words[i] == words[j] for i, j in enumerate(nearest)]) > 0.95


def test_eyes_are_for_the_package_s_model_alone(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "my.gguf").write_text("")
    folder, file = str(tmp_path / "new"), str(tmp_path / "my.gguf")
    monkeypatch.setattr(sys, "argv", ["smollm2", folder, file, "--sight"])
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: name)
    assert run_folders.run_main(smollm2.main) == 2
    assert "give no other file" in capsys.readouterr().err
