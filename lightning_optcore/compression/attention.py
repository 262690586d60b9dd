"""Multi-head attention from which heads can be removed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_NESTED = "_optcore_nested_tensor"


def forbid_nested_tensors(encoder: Any, reason: str) -> None:
    """Let an ``nn.TransformerEncoder`` pack no padded inputs into nested tensors: only its fused kernel takes them."""
    before, reasons = encoder.__dict__.setdefault(_NESTED, (encoder.use_nested_tensor, ()))
    encoder.__dict__[_NESTED] = (before, (*(one for one in reasons if one != reason), reason))
    encoder.use_nested_tensor = False


def allow_nested_tensors(module: nn.Module, reason: str) -> None:
    """Undo :func:`forbid_nested_tensors` in all submodules, where no other reason is left."""
    for child in module.modules():
        before, reasons = child.__dict__.get(_NESTED, (False, ()))
        if reason not in reasons:
            continue
        left = tuple(one for one in reasons if one != reason)
        child.__dict__[_NESTED] = (before, left)
        if not left:
            encoder: Any = child
            encoder.use_nested_tensor = before
            del child.__dict__[_NESTED]


class HeadPrunedAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with fewer heads than ``embed_dim / head_dim``.

    PyTorch's own forward derives the size of a head from the embedding, so that no head can be missing. This
    one takes it from the weights. Names of parameters and the call are the same. It is made by
    :func:`allow_missing_heads`, never constructed.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, as :meth:`torch.nn.MultiheadAttention.forward` does."""
        unbatched = query.dim() == 2
        if unbatched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = key_padding_mask.unsqueeze(0) if key_padding_mask is not None else None
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        weights = self.in_proj_weight.chunk(3)
        biases = self.in_proj_bias.chunk(3) if self.in_proj_bias is not None else (None, None, None)
        q, k, v = (
            self._heads(nn.functional.linear(x, weight, bias))
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        mask = _merged_mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        attention = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / self.head_dim**0.5
            attention = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            attention = nn.functional.dropout(attention, dropout)
            output = attention @ v
        else:
            output = nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout)
        output = self.out_proj(output.transpose(1, 2).flatten(2))
        if attention is not None and average_attn_weights:
            attention = attention.mean(dim=1)
        if unbatched:
            return output.squeeze(0), attention.squeeze(0) if attention is not None else None
        return output if self.batch_first else output.transpose(0, 1), attention

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def _merged_mask(attn_mask: Tensor | None, padding: Tensor | None, query: Tensor) -> Tensor | None:
    """Return one additive mask that broadcasts over (batch, heads, queries, keys)."""
    merged = None
    if attn_mask is not None:
        merged = _additive(attn_mask, query)
        if merged.dim() == 3:
            # PyTorch's form is (batch * all heads, queries, keys) with one mask for every head.
            per_head = merged.unflatten(0, (query.shape[0], -1))
            if not bool((per_head == per_head[:, :1]).all()):
                raise ValueError("attn_mask differs between heads, some of which were pruned")
            merged = per_head[:, :1]
    if padding is not None:
        hidden = _additive(padding, query)[:, None, None, :]
        merged = hidden if merged is None else merged + hidden
    return merged


def _additive(mask: Tensor, query: Tensor) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask.to(query.dtype)
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask, float("-inf"))


def can_miss_heads(module: nn.MultiheadAttention) -> bool:
    """Tell whether heads of the module can be removed (one embedding size, no learned extra keys)."""
    return bool(module._qkv_same_embed_dim) and module.bias_k is None and not module.add_zero_attn


def allow_missing_heads(module: nn.Module, name: str) -> None:
    """Make the attention module ``name``, in place, take the size of its heads from its weights."""
    attention: Any = module.get_submodule(name)
    if isinstance(attention, HeadPrunedAttention):
        return
    attention.__class__ = HeadPrunedAttention
    # The fused kernel of nn.TransformerEncoderLayer would assume all heads; it asks this flag.
    attention._qkv_same_embed_dim = False
    above = name
    while above:
        above = above.rpartition(".")[0]
        encoder: Any = module.get_submodule(above)
        if isinstance(encoder, nn.TransformerEncoder):
            forbid_nested_tensors(encoder, "heads")


def allow_all_heads(module: nn.Module) -> None:
    """Undo :func:`allow_missing_heads` in all submodules."""
    for child in module.modules():
        restored: Any = child
        if isinstance(child, HeadPrunedAttention):
            restored.__class__ = nn.MultiheadAttention
            restored._qkv_same_embed_dim = True
    allow_nested_tensors(module, "heads")
