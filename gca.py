"""Grouped Cross Attention (GCA), the paper's attention over retrieved chunks: a specification and a kernel.

A query chunk attends to the K chunks retrieved for it in two stages (Sec. 3): one softmax inside each of
them, then a sum of the K results, weighted by the retrieval weights. For a query row x, in every head:

    o_c = softmax_j(q(x) . K_c[j] * scale) V_c                          stage 1, for each retrieved chunk c
    out = sum_c w_c * o_c                                               stage 2

    gca_reference   these two lines in PyTorch: the specification
    FlashGCA        Triton kernels, forward and backward (Appendix B), which read K and V through the indices
    gca             the function to call: checks its arguments and picks one of the two

Run `python gca.py` to check the kernels against the reference and to time them.

Symbols: B batch, Cq query chunks of Sq rows, Ck chunks of Sk keys, K retrieved chunks (slots) a query
chunk, Hq query heads, Hkv key/value heads (head h reads key/value head h // (Hq / Hkv)), D head width.
"""
from __future__ import annotations

import argparse
import json
import os
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"        # `python gca.py` checks the kernels on any machine
try:
    import triton
    import triton.language as tl
except ImportError:                 # no triton (macOS, Windows): everything runs on the reference
    triton = None
jit = triton.jit if triton else lambda kernel: kernel

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"            # Triton runs kernels on the CPU, for tests
CHECK_INDICES = os.environ.get("GCA_CHECK_INDICES") == "1"       # check them on the GPU too (costs a sync)
HEAD_WIDTHS, MAX_KEYS, MAX_TILE = (16, 32, 64, 128, 256), 128, 65536   # what the kernels take
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# ---------------------------------------------------------------- the specification

def gca_reference(q, k, v, weights, indices, softmax_one=True, scale=None):
    """GCA after the equations; arguments as gca(). Low-precision inputs compute in the weights' dtype."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = torch.promote_types(q.dtype, weights.dtype)
    k_c, v_c = (retrieved_chunks(x.to(dtype), indices, q.shape[3]) for x in (k, v))    # (B, Cq, K, Sk, Hq, D)
    scores = torch.einsum("bcqhd,bcnkhd->bcnhqk", q.to(dtype) * scale, k_c)
    if softmax_one:                                               # 1 in the denominator: one more score of 0
        p = F.pad(scores, (0, 1)).softmax(-1)[..., :-1]
    else:
        p = scores.softmax(-1)
    o = torch.einsum("bcnhqk,bcnkhd->bcnqhd", p, v_c)             # stage 1: inside each chunk
    w = torch.where(indices < 0, 0, weights).to(dtype)
    return torch.einsum("bcn,bcnqhd->bcqhd", w, o).to(q.dtype)    # stage 2: the chunks, by their weights


def retrieved_chunks(x, indices, n_head):
    """Copy x (B, Ck, Sk, Hkv, D) chunk by chunk to where it was retrieved: (B, Cq, K, Sk, n_head, D)."""
    B, Ck, Sk, Hkv, D = x.shape
    if Ck == 0:
        return x.new_zeros(*indices.shape, Sk, n_head, D)
    rows = (indices.clamp(min=0) + torch.arange(B, device=x.device)[:, None, None] * Ck).flatten()
    x = x.flatten(0, 1).index_select(0, rows).unflatten(0, indices.shape)
    x = torch.where(indices[..., None, None, None] < 0, 0, x)     # an empty slot is a chunk of zeros
    return x.repeat_interleave(n_head // Hkv, dim=4) if n_head > Hkv else x


# ---------------------------------------------------------------- FlashGCA: what the kernels share
#
# A chunk has at most 128 keys, so it is one tile, and its softmax is local to the tile: no running maximum,
# no rescaling. One accumulator serves all K chunks, because w_c / l_c can be folded into P_c before the
# product with V_c. And as a tile sees all keys of its rows, the backward kernels recompute softmax and delta
# on the spot: the forward pass stores nothing but its output.
#
# An empty slot (index -1) is read as a chunk of zeros with weight 0: no branch, and no memory traffic, since
# masked loads fetch nothing.

@jit
def load_rows(base, rows, n_rows, stride, D: tl.constexpr):
    """Rows of a (n_rows, D) matrix; those beyond n_rows are zeros."""
    at = base + rows[:, None] * stride + tl.arange(0, D)[None, :]
    return tl.load(at, mask=rows[:, None] < n_rows, other=0.0)


@jit
def store_rows(base, rows, n_rows, stride, x, D: tl.constexpr):
    at = base + rows[:, None] * stride + tl.arange(0, D)[None, :]
    tl.store(at, x.to(base.dtype.element_ty), mask=rows[:, None] < n_rows)


@jit
def chunk_softmax(scores, scale, is_key, AXIS: tl.constexpr, ONE: tl.constexpr):
    """Softmax over one chunk's keys: numerators, and one over their sum (+ 1). exp(x) = exp2(x * log2(e))."""
    scores = tl.where(is_key, scores * (scale * 1.4426950408889634), float("-inf"))
    top = tl.max(scores, AXIS)
    if ONE:
        top = tl.maximum(top, 0.0)
    p = tl.exp2(scores - tl.expand_dims(top, AXIS))
    total = tl.sum(p, AXIS)
    if ONE:
        total += tl.exp2(-top)
    return p, 1.0 / total


# Algorithm 1. One program computes the output of one block of query rows in one head: it walks over the K
# slots, reads index, weight and that chunk's keys and values, and keeps q and the sum on chip. The grid has
# one dimension (so no limit at 65,535), heads innermost: neighbours read neighbouring memory of the same
# chunks.

@jit
def forward_kernel(Q, K, V, W, Index, Out, scale, n_slot, Cq, Sq, Sk, Hq, group,
                   q_b, q_c, q_s, q_h, k_b, k_c, k_s, k_h, v_b, v_c, v_s, v_h,
                   D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, ONE: tl.constexpr,
                   DOT: tl.constexpr):
    n_block = tl.cdiv(Sq, ROWS)
    pid = tl.program_id(0).to(tl.int64)
    h, block, c, b = pid % Hq, pid // Hq % n_block, pid // (Hq * n_block) % Cq, pid // (Hq * n_block * Cq)
    rows, keys = block * ROWS + tl.arange(0, ROWS), tl.arange(0, KEYS)
    slots = (b * Cq + c) * n_slot
    K += b * k_b + h // group * k_h
    V += b * v_b + h // group * v_h

    q = load_rows(Q + b * q_b + c * q_c + h * q_h, rows, Sq, q_s, D)
    out = tl.zeros((ROWS, D), tl.float32)
    for slot in range(n_slot):
        index = tl.load(Index + slots + slot).to(tl.int64)
        n_key = tl.where(index < 0, 0, Sk)
        w = tl.where(index < 0, 0.0, tl.load(W + slots + slot))
        k = load_rows(K + index * k_c, keys, n_key, k_s, D)
        v = load_rows(V + index * v_c, keys, n_key, v_s, D)
        scores = tl.dot(q, tl.trans(k), input_precision=DOT)         # (ROWS, KEYS)
        p, inverse = chunk_softmax(scores, scale, keys[None, :] < Sk, 1, ONE)
        p *= (w * inverse)[:, None]
        out += tl.dot(p.to(v.dtype), v, input_precision=DOT)
    store_rows(Out + ((b * Cq + c) * Sq * Hq + h) * D, rows, Sq, Hq * D, out, D)


# Algorithm 2, first half: dQ and dw, with the forward kernel's grid and loop. Each program writes its own
# share of dw, a number a slot, summed over heads and blocks afterwards: no atomics, so the same bits in every
# run.

@jit
def backward_q_kernel(Q, K, V, W, Index, DO, DQ, DW, scale, n_slot, Cq, Sq, Sk, Hq, group,
                      q_b, q_c, q_s, q_h, k_b, k_c, k_s, k_h, v_b, v_c, v_s, v_h,
                      D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, ONE: tl.constexpr,
                   DOT: tl.constexpr):
    n_block = tl.cdiv(Sq, ROWS)
    pid = tl.program_id(0).to(tl.int64)
    h, block, c, b = pid % Hq, pid // Hq % n_block, pid // (Hq * n_block) % Cq, pid // (Hq * n_block * Cq)
    rows, keys = block * ROWS + tl.arange(0, ROWS), tl.arange(0, KEYS)
    slots, here = (b * Cq + c) * n_slot, ((b * Cq + c) * Sq * Hq + h) * D
    K += b * k_b + h // group * k_h
    V += b * v_b + h // group * v_h

    q = load_rows(Q + b * q_b + c * q_c + h * q_h, rows, Sq, q_s, D)
    do = load_rows(DO + here, rows, Sq, Hq * D, D)
    dq = tl.zeros((ROWS, D), tl.float32)
    for slot in range(n_slot):
        index = tl.load(Index + slots + slot).to(tl.int64)
        n_key = tl.where(index < 0, 0, Sk)
        w = tl.where(index < 0, 0.0, tl.load(W + slots + slot))
        k = load_rows(K + index * k_c, keys, n_key, k_s, D)
        v = load_rows(V + index * v_c, keys, n_key, v_s, D)
        scores = tl.dot(q, tl.trans(k), input_precision=DOT)         # (ROWS, KEYS)
        p, inverse = chunk_softmax(scores, scale, keys[None, :] < Sk, 1, ONE)
        p *= inverse[:, None]
        dp = tl.dot(do, tl.trans(v), input_precision=DOT)
        delta = tl.sum(p * dp, 1)                                    # rowsum(dO * o_c)
        ds = w * p * (dp - delta[:, None])
        dq += tl.dot(ds.to(k.dtype), k, input_precision=DOT)
        tl.store(DW + (slots + slot) * n_block * Hq + block * Hq + h, tl.sum(delta, 0))
    store_rows(DQ + here, rows, Sq, Hq * D, dq * scale, D)


# Algorithm 2, second half: dK and dV of a chunk sum over every (query chunk, slot) that retrieved it. The
# list of those pairs comes sorted by chunk (see retrieved_by). One program takes one segment of a chunk's
# list, at most SEGMENT pairs, in one key/value head; a popular chunk thus has many programs. The first
# segment writes to dK and dV, the others to float32 tiles of their own, which add_segments_kernel then adds
# up in order.

@jit
def backward_kv_kernel(Q, K, V, W, DO, DK, DV, Extra, Item_chunk, First_item, Offsets, Pairs,
                       scale, n_slot, n_item, n_extra, Cq, Ck, Sq, Sk, Hq, Hkv, group,
                       q_b, q_c, q_s, q_h, k_b, k_c, k_s, k_h, v_b, v_c, v_s, v_h, D: tl.constexpr,
                       ROWS: tl.constexpr, KEYS: tl.constexpr, ONE: tl.constexpr, DOT: tl.constexpr,
                       SEGMENT: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    h, item, b = pid % Hkv, pid // Hkv % n_item, pid // (Hkv * n_item)
    chunk = tl.load(Item_chunk + b * n_item + item).to(tl.int64)
    if chunk < Ck:                                               # items beyond the last chunk's are unused
        part = item - tl.load(First_item + b * (Ck + 1) + chunk)
        start = tl.load(Offsets + b * (Ck + 1) + chunk) + part * SEGMENT
        stop = tl.minimum(start + SEGMENT, tl.load(Offsets + b * (Ck + 1) + chunk + 1))
        keys = tl.arange(0, KEYS)
        k = load_rows(K + b * k_b + chunk * k_c + h * k_h, keys, Sk, k_s, D)
        v = load_rows(V + b * v_b + chunk * v_c + h * v_h, keys, Sk, v_s, D)
        dk = tl.zeros((KEYS, D), tl.float32)
        dv = tl.zeros((KEYS, D), tl.float32)
        n_block = tl.cdiv(Sq, ROWS)
        for step in range(start * group * n_block, stop * group * n_block):
            pair = tl.load(Pairs + b * Cq * n_slot + step // (group * n_block)).to(tl.int64)
            head, rows = h * group + step % group, step // group % n_block * ROWS + tl.arange(0, ROWS)
            w = tl.load(W + b * Cq * n_slot + pair)
            c = pair // n_slot
            q = load_rows(Q + b * q_b + c * q_c + head * q_h, rows, Sq, q_s, D)
            do = load_rows(DO + ((b * Cq + c) * Sq * Hq + head) * D, rows, Sq, Hq * D, D)
            scores = tl.dot(k, tl.trans(q), input_precision=DOT)     # (KEYS, ROWS)
            p, inverse = chunk_softmax(scores, scale, keys[:, None] < Sk, 0, ONE)
            p *= inverse[None, :]
            dp = tl.dot(v, tl.trans(do), input_precision=DOT)
            ds = w * p * (dp - tl.sum(p * dp, 0)[None, :])
            dv += tl.dot((w * p).to(do.dtype), do, input_precision=DOT)
            dk += tl.dot(ds.to(q.dtype), q, input_precision=DOT)
        dk *= scale
        if part == 0:
            at = ((b * Ck + chunk) * Sk * Hkv + h) * D
            store_rows(DK + at, keys, Sk, Hkv * D, dk, D)
            store_rows(DV + at, keys, Sk, Hkv * D, dv, D)
        else:                                                    # item - chunk - 1 such segments came before
            at = ((b * n_extra + item - chunk - 1) * Hkv + h) * 2 * Sk * D
            store_rows(Extra + at, keys, Sk, D, dk, D)
            store_rows(Extra + at + Sk * D, keys, Sk, D, dv, D)


@jit
def add_segments_kernel(DK, DV, Extra, First_item, n_extra, Ck, Sk, Hkv, D: tl.constexpr, KEYS: tl.constexpr):
    """dK and dV of one chunk and head += its other segments, if it has any."""
    pid = tl.program_id(0).to(tl.int64)
    h, chunk, b = pid % Hkv, pid // Hkv % Ck, pid // (Hkv * Ck)
    start = tl.load(First_item + b * (Ck + 1) + chunk) - chunk
    stop = tl.load(First_item + b * (Ck + 1) + chunk + 1) - chunk - 1
    if start < stop:
        keys = tl.arange(0, KEYS)
        at = ((b * Ck + chunk) * Sk * Hkv + h) * D
        dk = load_rows(DK + at, keys, Sk, Hkv * D, D).to(tl.float32)
        dv = load_rows(DV + at, keys, Sk, Hkv * D, D).to(tl.float32)
        for i in range(start, stop):
            tile = Extra + ((b * n_extra + i) * Hkv + h) * 2 * Sk * D
            dk += load_rows(tile, keys, Sk, D, D)
            dv += load_rows(tile + Sk * D, keys, Sk, D, D)
        store_rows(DK + at, keys, Sk, Hkv * D, dk, D)
        store_rows(DV + at, keys, Sk, Hkv * D, dv, D)


# ---------------------------------------------------------------- FlashGCA: the host's side

SEGMENT = 64        # pairs of a chunk's list for one program of backward_kv_kernel


def retrieved_by(indices, Ck):
    """Who retrieved each chunk, and which program of backward_kv_kernel takes which part of that list (CSR).

    indices (B, Cq, K) -> pairs (B, Cq*K): the flat (query chunk, slot) pairs, sorted by retrieved chunk,
    empty slots last; offsets (B, Ck+1): chunk c's are pairs[offsets[c]:offsets[c+1]]; first_item (B, Ck+1):
    its work items, one a segment but at least one; item_chunk (B, n_item): the chunk of each item, Ck = item
    not used.
    """
    def counting(n):
        return torch.arange(n, device=indices.device).expand(len(indices), -1).contiguous()

    flat = indices.flatten(1)
    retrieved, pairs = torch.where(flat < 0, Ck, flat).sort(dim=1, stable=True)
    offsets = torch.searchsorted(retrieved, counting(Ck + 1))
    segments = ((offsets.diff() + SEGMENT - 1) // SEGMENT).clamp(min=1)
    first_item = F.pad(segments.cumsum(1), (1, 0))
    items = counting(Ck + flat.shape[1] // SEGMENT)                  # no list is so long that it needs more
    item_chunk = torch.searchsorted(first_item[:, 1:].contiguous(), items, right=True)
    return pairs, offsets, first_item, item_chunk


def tile_bytes(k):
    """Bytes of the tile that holds one chunk's keys in one head."""
    return max(16, triton.next_power_of_2(k.shape[2])) * k.shape[-1] * k.element_size()


def launch_options(q, k, softmax_one):
    """Tile sizes and warps: a whole chunk of keys, and 64 query rows, or 16 beside the largest chunks."""
    D, n_row = q.shape[-1], 64 if tile_bytes(k) < 65536 else 16
    keys, rows = (max(16, triton.next_power_of_2(n)) for n in (k.shape[2], min(q.shape[2], n_row)))
    dot = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"  # as torch's flag says: default float32
    return dict(D=D, ROWS=rows, KEYS=keys, ONE=softmax_one, DOT=dot, num_warps=8 if keys * D > 4096 else 4,
                num_stages=1 if q.dtype == torch.float32 else 2)


def sizes(q, k, weights):
    """What kernels want to know: n_slot, Cq, Sq, Sk, Hq, Hq / Hkv."""
    return weights.shape[2], q.shape[1], q.shape[2], k.shape[2], q.shape[3], q.shape[3] // k.shape[3]


def unit_stride(*tensors):
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def strides(*tensors):
    return [stride for x in tensors for stride in x.stride()[:4]]


@torch.library.custom_op("gca::forward", mutates_args=())
def flash_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weights: torch.Tensor,
                  indices: torch.Tensor, softmax_one: bool, scale: float) -> torch.Tensor:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    q, k, v = unit_stride(q, k, v)
    options = launch_options(q, k, softmax_one)
    B, Cq, Sq, Hq, _ = q.shape
    grid = (B * Cq * Hq * -(-Sq // options["ROWS"]),)
    if grid[0]:
        forward_kernel[grid](q, k, v, weights.contiguous(), indices.contiguous(), out, scale,
                             *sizes(q, k, weights), *strides(q, k, v), **options)
    return out


@torch.library.custom_op("gca::backward", mutates_args=())
def flash_backward(do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weights: torch.Tensor,
                   indices: torch.Tensor, softmax_one: bool, scale: float
                   ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    q, k, v = unit_stride(q, k, v)
    do, weights, indices = do.contiguous(), weights.contiguous(), indices.contiguous()
    options = launch_options(q, k, softmax_one)
    (B, Cq, Sq, Hq, D), (_, Ck, Sk, Hkv, _) = q.shape, k.shape
    n_block = -(-Sq // options["ROWS"])
    dw = torch.zeros(*weights.shape, n_block * Hq, dtype=torch.float32, device=q.device)
    if q.numel():
        backward_q_kernel[(B * Cq * n_block * Hq,)](q, k, v, weights, indices, do, dq, dw, scale,
                                                    *sizes(q, k, weights), *strides(q, k, v), **options)
    if k.numel():
        pairs, offsets, first_item, item_chunk = retrieved_by(indices, Ck)
        n_item = item_chunk.shape[1]
        extra = torch.empty(B, n_item - Ck, Hkv, 2, Sk, D, dtype=torch.float32, device=q.device)
        backward_kv_kernel[(B * n_item * Hkv,)](
            q, k, v, weights, do, dk, dv, extra, item_chunk, first_item, offsets, pairs, scale,
            weights.shape[2], n_item, n_item - Ck, Cq, Ck, Sq, Sk, Hq, Hkv, Hq // Hkv, *strides(q, k, v),
            SEGMENT=SEGMENT, **options)
        if extra.numel():
            add_segments_kernel[(B * Ck * Hkv,)](dk, dv, extra, first_item, n_item - Ck, Ck, Sk, Hkv, D=D,
                                                 KEYS=options["KEYS"])
    return dq, dk, dv, dw.sum(-1).to(weights.dtype)


@flash_forward.register_fake
def _(q, k, v, weights, indices, softmax_one, scale):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


@flash_backward.register_fake
def _(do, q, k, v, weights, indices, softmax_one, scale):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, weights))


def save_inputs(ctx, inputs, output):
    *tensors, ctx.softmax_one, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def backward(ctx, do):
    return *flash_backward(do, *ctx.saved_tensors, ctx.softmax_one, ctx.scale), None, None, None


flash_forward.register_autograd(backward, setup_context=save_inputs)


# ---------------------------------------------------------------- the function to call

def gca(q, k, v, weights, indices, softmax_one=True, scale=None, backend="auto"):
    """Grouped Cross Attention: out = sum_c w_c softmax(q K_c^T * scale) V_c, c in indices (Sec. 3).

    q        (B, Cq, Sq, Hq, D)    query chunks
    k, v     (B, Ck, Sk, Hkv, D)   every chunk's keys and values, once; Hkv divides Hq
    weights  (B, Cq, K) float32    retrieval weights
    indices  (B, Cq, K) int        chunks in [0, Ck), repeats allowed; -1 = empty slot, which adds nothing
    softmax_one                    softmax-off-by-one: 1 + sum in the denominator, so a row may take nothing
    scale                          of the scores; default D ** -0.5
    backend                        "triton", "reference" or "auto": triton for what it takes, on a GPU
    returns  (B, Cq, Sq, Hq, D) in q's dtype, differentiable in q, k, v and weights

    Raises ValueError, naming the argument, for what does not fit; RuntimeError if the backend cannot run.
    """
    check_arguments(q, k, v, weights, indices, backend)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    fits = (triton and q.dtype in DTYPES and q.shape[-1] in HEAD_WIDTHS and k.shape[2] <= MAX_KEYS
            and tile_bytes(k) <= MAX_TILE)
    if backend == "reference" or backend == "auto" and not (q.is_cuda and fits):
        return gca_reference(q, k, v, weights, indices, softmax_one, scale)
    if triton is None:
        raise RuntimeError("backend 'triton' needs triton (Linux: pip install triton); 'reference' does not")
    if not q.is_cuda and not INTERPRET:
        raise RuntimeError(f"backend 'triton' needs a GPU, or TRITON_INTERPRET=1; q is on {q.device}")
    if not fits:
        raise ValueError(f"q, k and v for backend 'triton' must be float32, bfloat16 or float16, with D in "
                         f"{HEAD_WIDTHS} and at most {MAX_KEYS} keys a chunk (64 if float32 with D 256), "
                         f"got {q.dtype}, D {q.shape[-1]}, Sk {k.shape[2]}")
    return flash_forward(q, k, v, weights, indices, softmax_one, scale)


def check_arguments(q, k, v, weights, indices, backend):
    if backend not in ("auto", "triton", "reference"):
        raise ValueError(f"backend must be 'auto', 'triton' or 'reference', got {backend!r}")
    for name, x, rank, axes in (("q", q, 5, "(B, Cq, Sq, Hq, D)"), ("k", k, 5, "(B, Ck, Sk, Hkv, D)"),
                                ("v", v, 5, "(B, Ck, Sk, Hkv, D)"), ("weights", weights, 3, "(B, Cq, K)"),
                                ("indices", indices, 3, "(B, Cq, K)")):
        if x.dim() != rank:
            raise ValueError(f"{name} must be {axes}, got shape {tuple(x.shape)}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")
    B, Cq, Sq, Hq, D = q.shape
    Ck, Sk, Hkv, K = *k.shape[1:4], weights.shape[2]
    for name, x, shape in (("k", k, (B, Ck, Sk, Hkv, D)), ("v", v, (B, Ck, Sk, Hkv, D)),
                           ("weights", weights, (B, Cq, K)), ("indices", indices, (B, Cq, K))):
        if x.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, to fit the others, got {tuple(x.shape)}")
    if Hkv < 1 or Hq % Hkv:
        raise ValueError(f"k must have a number of heads that divides q's {Hq}, got {Hkv}")
    for name, size in (("k", Sk), ("indices", K)):
        if size < 1:
            raise ValueError(f"{name} must have at least one key or slot a chunk, got none")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}")
    if weights.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"weights must be float32, got {weights.dtype}")
    if indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"indices must be int32 or int64, got {indices.dtype}")
    if (CHECK_INDICES or not q.is_cuda) and not torch.compiler.is_compiling() and indices.numel():
        low, high = indices.min().item(), indices.max().item()
        if low < -1 or high >= Ck:
            wrong = low if low < -1 else high
            raise ValueError(f"indices must be in [0, {Ck}), or -1 for an empty slot, got {wrong}")


# ---------------------------------------------------------------- check and benchmark: python gca.py

def random_inputs(device, dtype, B=2, Cq=5, Sq=33, Hq=4, Hkv=2, D=64, Ck=7, Sk=63, K=4, skew=0.0):
    """Random arguments of gca(); skew > 0 draws chunks by Zipf's law, so that few are retrieved by most."""
    q, k, v = (torch.randn(B, C, S, H, D, device=device, dtype=dtype)
               for C, S, H in ((Cq, Sq, Hq), (Ck, Sk, Hkv), (Ck, Sk, Hkv)))
    popularity = torch.arange(1, Ck + 1, device=device).double() ** -skew
    indices = torch.multinomial(popularity.expand(B * Cq, Ck), K, replacement=True).view(B, Cq, K)
    return q, k, v, torch.rand(B, Cq, K, device=device), indices


def output_and_gradients(function, *tensors):
    *floats, indices = tensors
    leaves = [x.detach().requires_grad_() for x in floats]
    out = function(*leaves, indices)
    return out, *torch.autograd.grad(out, leaves, torch.ones_like(out).cumsum(1).sin())


def check(device):
    """Print the kernel's relative errors against the reference in float64: output and gradients."""
    for dtype in DTYPES if device == "cuda" else DTYPES[:1]:
        *floats, indices = random_inputs(device, dtype)
        got = output_and_gradients(partial(gca, backend="triton"), *floats, indices)
        wanted = output_and_gradients(gca_reference, *(x.double() for x in floats), indices)
        errors = [f"{((x - y).norm() / y.norm()).item():.1e}" for x, y in zip(got, wanted, strict=True)]
        print(f"{str(dtype)[6:]:9} relative error of out, dq, dk, dv, dweights:", *errors)


def copied_sdpa(q, k, v, weights, indices):
    """What one would do without a kernel: copy the chunks, then fused attention: one softmax."""
    k, v = (retrieved_chunks(x, indices, q.shape[3]).flatten(2, 3) for x in (k, v))     # (B, Cq, K*Sk, Hq, D)
    q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def benchmark():
    """Forward and backward at the paper's shape: rows of numbers, ours last."""
    shape = dict(B=4, Cq=256, Sq=64, Hq=12, Hkv=12, D=64, Ck=256, Sk=64, K=8)
    flops = 4 * 4 * 256 * 64 * 12 * 8 * 64 * 64          # of the forward; the backward has 2.5 times them
    rows = []
    for retrieval, skew in (("uniform", 0.0), ("skewed", 1.0)):
        *floats, indices = random_inputs("cuda", torch.bfloat16, **shape, skew=skew)
        leaves = [x.requires_grad_() for x in floats]
        for name, function in (("reference", gca_reference), ("copy + SDPA", copied_sdpa), ("FlashGCA", gca)):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            out = function(*leaves, indices)
            upstream, used = torch.randn_like(out), leaves if name != "copy + SDPA" else leaves[:3]
            backward = partial(torch.autograd.grad, out, used, upstream, retain_graph=True)
            backward()
            extra = torch.cuda.max_memory_allocated() - before
            with torch.no_grad():
                ms = triton.testing.do_bench(partial(function, *leaves, indices), return_mode="median")
            ms_back = triton.testing.do_bench(backward, return_mode="median")
            rows.append(dict(retrieval=retrieval, implementation=name, forward_ms=ms, backward_ms=ms_back,
                             forward_tflops=flops / ms / 1e9, backward_tflops=2.5 * flops / ms_back / 1e9,
                             extra_mib=extra / 2 ** 20))
            out = backward = None
    return rows


def main():
    parser = argparse.ArgumentParser(description="Check FlashGCA against the reference; on a GPU, time it.")
    parser.add_argument("--json", type=Path, help="write the benchmark's rows to this file")
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    args = parser.parse_args()
    if triton is None:
        return print("Nothing to check: triton is not installed (Linux: pip install triton).")
    check("cuda" if torch.cuda.is_available() else "cpu")
    if not torch.cuda.is_available():
        return print("No GPU: the check alone, in Triton's interpreter. There is nothing to time.")
    rows = benchmark()
    print(f"{torch.cuda.get_device_name()}, bf16, 4 x 256 chunks of 64, 12 heads of 64, K 8")
    print(*(f"{name:>16}" for name in rows[0]))
    for row in rows:
        print(*(f"{x:16.2f}" if isinstance(x, float) else f"{x:>16}" for x in row.values()))
    if args.json:
        report = dict(hardware=torch.cuda.get_device_name(), rows=rows)
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
