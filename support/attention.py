"""Attention for groups of query heads that share keys and values, with a mask, without copying either.

transformers repeats keys and values for every query head as soon as there is a mask: in decoding that is the
whole cache, in every layer, for every token (7 times the memory traffic on SmolVLM-256M).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


def use_grouped(model: torch.nn.Module) -> None:
    """Let the language model attend by `grouped_attention`; the vision tower has no groups."""
    AttentionInterface.register("grouped", grouped_attention)
    AttentionMaskInterface.register("grouped", grouped_mask)
    model.config.get_text_config()._attn_implementation = "grouped"


def grouped_attention(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
                      scaling: float | None = None, **kwargs: Any) -> tuple[Tensor, None]:
    """softmax(q k^T scaling + mask) v of `query: (B, H, Q, D)` on `key, value: (B, G, S, D)`; (B, Q, H, D).

    Heads h H/G to (h + 1) H/G - 1 share the keys of group h: they are treated as H/G times Q queries of one head,
    for which the mask, (B, 1, H/G Q, S) from `additive_mask`, has a row each.
    """
    if mask is None:  # causal, which the kernels know by themselves, groups included
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, **kwargs)
    B, H, Q, D = query.shape
    folded = query.reshape(B, key.shape[1], -1, D)  # (B, G, H/G Q, D)
    out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(B, H, Q, -1).transpose(1, 2).contiguous(), None


def grouped_mask(*args: Any, config: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor | None:
    """The mask of a forward pass as transformers describes it, in the form that `grouped_attention` takes."""
    visible = sdpa_mask(*args, config=config, dtype=dtype, **kwargs)
    return None if visible is None else additive_mask(visible, config, dtype)


def additive_mask(visible: Tensor, config: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """What to add to the scores, (B, 1, H/G Q, S): 0 where `visible: (B, 1, Q, S)`, else the lowest number.

    Made once for all layers: from a mask of booleans each layer would make its own, and keep it for the backward
    pass.
    """
    device = visible.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    repeats = config.num_attention_heads // config.num_key_value_heads
    B, _, Q, S = visible.shape
    # CUDA's kernels copy a mask whose rows are not a multiple of 8 apart.
    mask = torch.zeros(B, 1, repeats, Q, -(-S // 8) * 8, dtype=dtype, device=visible.device)[..., :S]
    return mask.masked_fill_(~visible[:, :, None], torch.finfo(dtype).min).flatten(2, 3)
