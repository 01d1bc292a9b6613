"""Tests of models with recurrent layers, by one forward pass over everything."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

import dyme
from support import fast
from support.test_fast import text_model
from test_dyme import (
    IMAGE,
    PROMPTS,
    QWEN,
    QWEN_VISION,
    SEQUENCES,
    TEXT,
    Inputs,
    assert_close,
    bare_policy,
    family_inputs,
    gradients,
    pad_batch,
    plain_logits,
    plain_loss,
    summed,
)

DELTA = {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
         "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
         "mamba_chunk_size": 8}
HYBRIDS: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_5_text": DELTA,
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64}}  # attention and a state in every layer
JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "mamba_d_state": 8,
         "num_experts_per_tok": 1, "mamba_dt_rank": 4, "use_mamba_kernels": False}
each_hybrid = pytest.mark.parametrize("kind", [*HYBRIDS, "qwen3_5"])  # the last one sees


def hybrid(kind: str) -> tuple[torch.nn.Module, list[Inputs]]:
    """A random model, and three prompts of different lengths."""
    if kind != "qwen3_5":
        ids = [torch.tensor([text]) for text in PROMPTS]
        prompts = [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids]
        return text_model(kind, **HYBRIDS[kind]).double(), prompts
    torch.manual_seed(0)
    rope = QWEN["text_config"]["rope_parameters"] | {"mrope_section": [1, 1, 0]}
    text = TEXT | DELTA | {"model_type": "qwen3_5_text", "rope_parameters": rope | {
        "partial_rotary_factor": 0.5}}
    known = QWEN | {"text_config": text, "vision_config": QWEN_VISION | {
        "num_position_embeddings": 16}}
    config = AutoConfig.for_model(kind, **known)
    assert config.image_token_id == IMAGE
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float64).eval()
    return model, [family_inputs("qwen2_5_vl", text, i) for i, text in enumerate(PROMPTS)]


@pytest.mark.parametrize("micro_batch", [3, 1])
@each_hybrid
def test_the_loss_and_its_gradient_are_the_specifications(kind: str, micro_batch: int) -> None:
    model, prompts = hybrid(kind)
    batches = [pad_batch(prompts[i:i + micro_batch]) for i in range(0, 3, micro_batch)]
    loss, ours = summed(bare_policy(model), batches, SEQUENCES, temperature=0.7)
    expected = plain_loss(model, prompts, SEQUENCES, 0.7)
    expected.backward()
    theirs = gradients(model)
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    assert_close(ours, theirs, 1e-5 * max(float(g.abs().max()) for g in theirs.values()))


@each_hybrid
def test_sampled_ids_are_those_of_one_forward_pass(kind: str) -> None:
    model, prompts = hybrid(kind)
    uniforms = 0.2 + 0.8 * dyme.keyed_uniforms(0, 0, range(3), 2, 6)
    responses = dyme.rollout(bare_policy(model), [pad_batch(prompts)], uniforms, 2, 0.7)
    for n, response in enumerate(responses):
        logits: Tensor = plain_logits(model, prompts[n // 2], response.ids).float()
        ids, _ = dyme.draw(logits, uniforms[n, :len(response.ids)], 0.7)
        assert ids.tolist() == response.ids


def test_hybrids_are_known_and_go_on_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    policy = bare_policy(text_model("lfm2", **HYBRIDS["lfm2"]))
    dyme.check_model(policy.model)
    assert fast.speed_up(policy) is policy
    assert capsys.readouterr().err.startswith("going on as with --plain: ")


def test_a_model_that_forgets_its_state_is_refused() -> None:
    """Jamba starts anew if it is given more than one token to go on with."""
    with pytest.raises(ValueError, match="not known here"):
        dyme.check_model(text_model("jamba", **JAMBA))


def test_a_model_whose_layers_look_at_the_image_in_every_pass_is_refused() -> None:
    """Llama 3.2 Vision, whose log-probs would be others without a word."""
    text = {"model_type": "mllama_text_model", "cross_attention_layers": [1]}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
              "num_global_layers": 1, "attention_heads": 4, "image_size": 16, "patch_size": 8,
              "vision_output_dim": 64, "intermediate_layers_indices": [0]}
    config = AutoConfig.for_model("mllama", vision_config=vision, text_config=TEXT | text)
    with pytest.raises(ValueError, match="not known here"):
        dyme.check_model(AutoModelForImageTextToText.from_config(config))
