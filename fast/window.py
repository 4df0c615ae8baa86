"""Sliding-window attention with ALiBi, faster, and for queries that have a past: the twin of model.py's.

    window_attention      picks the first of these that fits
    dense_attention       every key against every query: for few queries
    flex_window           one kernel that reads only the blocks inside the window (CUDA, flex_attention)
    blockwise_attention   model.py's way, with a past

All take q (B, H, n, D) and k, v (B, Hkv, m, D) with m >= n: the queries are the last n of the m positions.
"""
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from model import band_bias

BLOCK = 128                         # of flex_attention's block mask
WIDE = 128                          # narrower: blocks, a little slower, but nothing is compiled


def window_attention(q, k, v, window, slopes):
    """Causal self-attention over the last W positions, with ALiBi (Sec. 3). Any n >= 1."""
    if q.shape[2] <= window:
        return dense_attention(q, k, v, window, slopes)
    if q.is_cuda and window >= WIDE and q.shape[-1] >= 16:  # flex_attention takes no narrower heads
        return flex_window(q, k, v, window, slopes)
    return blockwise_attention(q, k, v, window, slopes)


def in_words(model):
    config = model.config
    is_flex = config.window >= WIDE and config.n_embd // config.n_head >= 16
    return "flex attention" if is_flex else "window in blocks"


def dense_attention(q, k, v, window, slopes):
    bias = band_bias(q.shape[2], k.shape[2], window, slopes).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, bias, enable_gqa=True)


def blockwise_attention(q, k, v, window, slopes):
    """Blocks of W queries against their own block of keys and the one before: exact, and linear in n."""
    B, H, n, _ = q.shape
    past = k.shape[2] - n
    n_first = max(0, window - past)          # queries that have no full window of keys before them
    n_first_key = past + n_first             # what these see
    n_block = -(-(n - n_first) // window)
    padding = n_block * window - (n - n_first)
    bias = band_bias(window, 2 * window, window, slopes).to(q.dtype)            # (H, W, 2W)

    def key_blocks(x):                       # (B, Hkv, m, D) -> (B * n_block, Hkv, 2W, D)
        x = F.pad(x[:, :, n_first_key - window:], (0, 0, 0, padding)).unflatten(2, (n_block + 1, window))
        return torch.cat([x[:, :, :-1], x[:, :, 1:]], dim=3).transpose(1, 2).flatten(0, 1)

    blocks = F.pad(q[:, :, n_first:], (0, 0, 0, padding)).unflatten(2, (n_block, window))
    blocks = blocks.transpose(1, 2).flatten(0, 1)                               # (B * n_block, H, W, D)
    out = F.scaled_dot_product_attention(blocks, key_blocks(k), key_blocks(v), bias, enable_gqa=True)
    out = out.unflatten(0, (B, n_block)).transpose(1, 2).flatten(2, 3)[:, :, :n - n_first]
    if not n_first:
        return out
    # No slice of the bias above: with one of width 5 or 20, SDPA ended in "misaligned address" on a GPU.
    bias = band_bias(n_first, n_first_key, window, slopes).to(q.dtype)
    q, k, v = q[:, :, :n_first], k[:, :, :n_first_key], v[:, :, :n_first_key]
    return torch.cat([F.scaled_dot_product_attention(q, k, v, bias, enable_gqa=True), out], dim=2)


# ---------------------------------------------------------------- flex_attention

@lru_cache
def compiled_flex_attention():
    """Compiled on first use (importing the compiler takes seconds), once for each kind of shape."""
    torch._dynamo.config.recompile_limit = 64       # beyond it, flex_attention silently builds a full matrix
    return torch.compile(flex_attention)


@lru_cache
def band_blocks(n, m, window, device):
    """The block mask: 128 queries at a time see blocks low .. high of 128 keys.

    Blocks full_low .. full_high lie in the windows of all 128 queries. They are listed apart, because they
    need no mask.
    """
    past = m - n
    start = torch.arange(0, n, BLOCK, device=device, dtype=torch.int32)[:, None] + past
    low = (start - window + 1).clamp(min=0) // BLOCK
    high = (start + BLOCK - 1).clamp(max=m - 1) // BLOCK
    full_low = (start + BLOCK - window).clamp(min=0).add(BLOCK - 1) // BLOCK
    full_high = torch.maximum((start + 1) // BLOCK - 1, full_low - 1)
    i = torch.arange(-(-m // BLOCK), device=device, dtype=torch.int32)
    before = full_low - low                                 # masked blocks that come before the full ones
    masked = torch.where(i < before, low + i, full_high + 1 + i - before)

    def listed(count, blocks):                              # only the first `count` are looked at
        return count[None, None, :, 0], blocks.clamp(max=len(i) - 1)[None, None]

    def in_window(b, h, i, j):
        return (past + i >= j) & (past + i - j < window)

    full = listed(full_high - full_low + 1, full_low + i) if window >= 2 * BLOCK - 1 else ()
    return BlockMask.from_kv_blocks(*listed(before + high - full_high, masked), *full, BLOCK_SIZE=BLOCK,
                                    mask_mod=in_window, seq_lengths=(n, m))


def flex_window(q, k, v, window, slopes):
    past, group = k.shape[2] - q.shape[2], q.shape[1] // k.shape[1]
    if group > 1:                                  # its own GQA does not compile for every shape (torch 2.11)
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)

    def alibi(score, b, h, i, j):
        return score - slopes[h] * (past + i - j)

    mask = band_blocks(q.shape[2], k.shape[2], window, q.device)
    tiles = dict(fwd_BLOCK_M=64, fwd_BLOCK_N=64)
    return compiled_flex_attention()(q, k, v, score_mod=alibi, block_mask=mask, kernel_options=tiles)


# ---------------------------------------------------------------- generation

def one_query_attention(q, k, v, bias):
    """The last position's query alone, for which SDPA with a bias leaves most of a GPU waiting.

    q (B, H, 1, D); k, v (B, Hkv, m, D), m <= W + 1; bias (H, W + 1): band_bias of one query.
    """
    q = q.unflatten(1, (k.shape[1], -1))[..., 0, :].float()                     # (B, Hkv, H / Hkv, D)
    bias = bias[:, -k.shape[2]:].unflatten(0, (k.shape[1], -1))
    scores = q @ k.float().mT * q.shape[-1] ** -0.5 + bias
    return (scores.softmax(-1).to(v.dtype) @ v).flatten(1, 2)[:, :, None]
