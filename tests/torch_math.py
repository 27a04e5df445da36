"""Attention in plain PyTorch: fastattn must give the gradients that autograd makes of it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from fastattn import reference


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    layout: str = "bshd",
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    q_offset: Any = None,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    q_lens: torch.Tensor | None = None,
    kv_lens: torch.Tensor | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, lse, weights) in q's dtype, four axes. A row without a key has lse -inf, and 0 else."""
    if layout == "bshd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    (B, Hq, Sq, D), (Hkv, Sk) = q.shape, k.shape[1:3]
    k, v = (x.repeat_interleave(Hq // Hkv, 1) for x in (k, v))
    q_len, kv_len = (
        torch.full((B, 1, 1, 1), n) if lens is None else lens.view(B, 1, 1, 1)
        for lens, n in ((q_lens, Sq), (kv_lens, Sk))
    )
    offset = kv_len - q_len if q_offset is None else torch.as_tensor(q_offset).view(-1, 1, 1, 1)
    i, j = torch.arange(Sq)[:, None], torch.arange(Sk)
    distance = i + offset - j
    allowed = (i < q_len) & (j < kv_len)
    left, right = (None, None) if window is None else window
    if causal:
        allowed = allowed & (distance >= 0)
    if left is not None:
        allowed = allowed & (distance <= left)
    if right is not None:
        allowed = allowed & (distance >= -right)
    if mask is not None:
        allowed = allowed & mask
    if bias is not None:
        allowed = allowed & (bias != -math.inf)
    allowed = allowed.expand(B, Hq, Sq, Sk)

    score = q @ k.transpose(-1, -2) * (1.0 / math.sqrt(D) if scale is None else scale)
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    if alibi_slopes is not None:
        score = score - alibi_slopes.to(score.dtype).expand(B, Hq)[:, :, None, None] * distance.abs()
    if bias is not None:
        score = score + torch.where(allowed, bias, 0.0)  # keeps inf - inf out of the gradients
    # The lowest number instead of -inf, for the same reason: what it leaves is 0 after the second `where`.
    score = torch.where(allowed, score, torch.finfo(score.dtype).min)
    logits = score
    if sinks is not None:
        sink = sinks.to(score.dtype).view(1, Hq, 1, 1).expand(B, Hq, Sq, 1)
        logits = torch.cat([score, sink], -1)
    lse = torch.logsumexp(logits, -1) if logits.shape[-1] else torch.full((B, Hq, Sq), -math.inf)
    weights = torch.where(allowed, torch.exp(score - lse[..., None]), 0.0)
    exists = (i < q_len)[..., 0].expand(B, Hq, Sq)
    exists = exists if sinks is not None else exists & allowed.any(-1)
    lse = torch.where(exists, lse, -math.inf)
    kept = weights
    if dropout:
        keep = [[reference.dropout_keep(Sq, Sk, dropout, seed, b, h) for h in range(Hq)] for b in range(B)]
        kept = weights * torch.from_numpy(np.array(keep)) / (1.0 - dropout)
    out = kept @ v
    return out.transpose(1, 2) if layout == "bshd" else out, lse, weights
