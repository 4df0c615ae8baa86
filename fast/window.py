"""Sliding-window attention with ALiBi, faster: the twin of model.py's, and what is called in its place.

    window_attention      flex_window on a GPU, for WIDE windows and as many queries; otherwise model.py's
    flex_window           one kernel that reads only the blocks inside the window (torch's flex_attention)
    one_query_attention   for a single query; stream.py calls it, in generation

All take q (B, H, n, D) and k, v (B, Hkv, m, D), n <= m <= n + W: the queries are the last n of m positions.
"""
from functools import lru_cache

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import model as plain

BLOCK = 128                         # of flex_attention's block mask
WIDE = 128                          # fewer: model.py's blocks, a little slower, but nothing is compiled


def window_attention(q, k, v, window, slopes):
    """Causal self-attention over the last W positions, with ALiBi (Sec. 3)."""
    if q.is_cuda and min(q.shape[2], window) >= WIDE and q.shape[-1] >= 16:     # it takes no narrower heads
        return flex_window(q, k, v, window, slopes)
    return plain.window_attention(q, k, v, window, slopes)


def in_words(model):
    config = model.config
    return "flex attention" if config.window >= WIDE and config.n_embd // config.n_head >= 16 else ""


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

    full = listed(full_high - full_low + 1, full_low + i) if window >= 2 * BLOCK - 1 else ()    # or none fits
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
    if q.shape[-1] == 64 and q.element_size() == 2:             # backward on an H200: 1.37 ms, not 1.57
        tiles |= dict(bwd_BLOCK_M1=32, bwd_BLOCK_N1=64, bwd_BLOCK_M2=64, bwd_BLOCK_N2=32, bwd_num_warps=4,
                      bwd_num_stages=3)
    return compiled_flex_attention()(q, k, v, score_mod=alibi, block_mask=mask, kernel_options=tiles)


# ---------------------------------------------------------------- generation

def one_query_attention(q, k, v, bias):
    """The last position's query alone, for which SDPA with a bias leaves most of a GPU waiting.

    q (B, H, 1, D); k, v (B, Hkv, m, D), m <= W + 1: the last W positions and its own, the oldest of which
    bias masks; bias (H, W + 1): band_bias of one query.
    """
    q = q.unflatten(1, (k.shape[1], -1))[..., 0, :].float()                     # (B, Hkv, H / Hkv, D)
    bias = bias[:, -k.shape[2]:].unflatten(0, (k.shape[1], -1))
    with torch.autocast(q.device.type, enabled=False):                          # scores in float32
        scores = q @ k.float().mT * q.shape[-1] ** -0.5 + bias
        return (scores.softmax(-1).to(v.dtype) @ v).flatten(1, 2)[:, :, None]
