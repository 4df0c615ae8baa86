"""Grouped Cross Attention (GCA), the paper's attention over retrieved chunks: a specification and a kernel.

A query chunk attends to the K chunks retrieved for it in two stages (Sec. 3): one softmax inside each of
them, then a sum of the K results, weighted by the retrieval weights. For a query row x, in every head:

    o_c = softmax_j(q(x) . K_c[j] * scale) V_c                          stage 1, for each retrieved chunk c
    out = sum_c w_c * o_c                                               stage 2

    gca_reference   these two lines in PyTorch: the specification
    FlashGCA        Triton kernels, forward and backward (Appendix B), which read K and V through the indices;
                    hopper.py has them once more, tuned for Hopper GPUs
    gca             the function to call: checks its arguments and picks one of the two

Run `python gca.py` to check the kernels against the reference and to time them (bench.py).

Symbols: B batch, Cq query chunks of Sq rows, Ck chunks of Sk keys, K retrieved chunks (slots) a query
chunk, Hq query heads, Hkv key/value heads (head h reads key/value head h // (Hq / Hkv)), D head width.
"""
from __future__ import annotations

import os

import torch
import torch.nn.functional as F

if __name__ == "__main__":                      # python gca.py: bench.py imports this file as a module
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"    # the kernels can be checked on any machine
    import bench
    raise SystemExit(bench.main())
try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:                 # no triton (macOS, Windows): everything runs on the reference
    triton = None
jit = triton.jit if triton else lambda kernel: kernel

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"            # Triton runs kernels on the CPU, for tests
hopper = None
if triton and torch.cuda.is_available() and not INTERPRET:
    try:
        import hopper
    except (ImportError, AttributeError):       # a Triton whose Gluon has other names; it is experimental
        pass
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
# no rescaling. One accumulator serves all K chunks, because w_c / l_c can be applied to P_c, or to P_c V_c
# before it is added. And as a tile sees all keys of its rows, the backward kernels recompute softmax and
# delta on the spot: the forward pass stores nothing but its output.
#
# Tiles move through tensor descriptors (TMA, the copy engine of Hopper GPUs; pointers on older ones), for
# which a tensor is (B, C, S, H * D). Whatever lies outside it is read as zeros and never written. So short
# chunks need no masks, and an empty slot (index -1) needs no branch: it is a chunk of zeros, with weight 0.
#
# Programs are numbered chunks first, then heads: those that run at the same time then share the keys and
# values of one or two heads, which fit the L2 cache, where all heads together do not.
#
# What was tried: milliseconds of single kernels of prototypes, paper's shape in bf16, on an H100 or H200.
#     forward  heads first 0.36, chunks first 0.30 | pointers 0.32, TMA 0.30 | 1 or 2 warps 0.40, 8 warps 0.67
#              w / l applied to P V instead of P: 3%, 8% for small heads
#     dQ       recomputing the softmax 0.42, and storing its statistics for dK/dV besides 0.51
#     dK/dV    reading those 0.69-0.75, recomputing 0.58 | by pointers 0.74 | 1 stage 0.91, 3 stages 0.73
#              scores with their rows along the keys (nothing is transposed, but sums cross warps) 1.20
#              P and dS both handed over before their products run: they wait once, 0.59 for 0.64
#              K and the blocks of rows a chunk known to the compiler, for divisions: 3% and 1.5%
#     dK/dV with skewed retrieval, in hopper.py, beside 0.41 for uniform: the longest programs first 0.44 |
#              chunks in order 0.48, so of all heads side by side 0.46 (uniform 0.43) | pieces of 32: 0.45,
#              and twice their memory | early programs for all lists that may be long, most of them idle: 0.45
#     one fused pass with atomic sums for dQ: 1.13 for 1.03 (heads of 64), 0.34 for 0.46 (heads of 16), but
#              its bits differ from run to run | warp_specialize: 2 to 3 times slower
#     no gain: unrolled loops, dQ beside dK/dV on a stream of its own, the next scores before this softmax
#     a say in when to wait, which Triton does not offer: 5% in dQ, 9% forward, 25% in dK/dV (hopper.py)

@jit
def load_tile(X, b, c, row, h, ROWS: tl.constexpr, D: tl.constexpr):
    """Rows row, row + 1, .. of chunk c in head h: (ROWS, D)."""
    return X.load([b, c, row, h * D]).reshape(ROWS, D)


@jit
def store_tile(X, b, c, row, h, x, ROWS: tl.constexpr, D: tl.constexpr):
    X.store([b, c, row, h * D], x.to(X.dtype).reshape(1, 1, ROWS, D))


@jit
def chunk_softmax(scores, scale, n_key, KEYS: tl.constexpr, ONE: tl.constexpr):
    """Softmax over one chunk's keys: numerators, and one over their sum (+ 1). exp(x) = exp2(x * log2(e))."""
    scale *= 1.4426950408889634
    if not ONE:
        scores = tl.where(tl.arange(0, KEYS)[None, :] < n_key, scores, float("-inf"))
    top = tl.max(scores, 1) * scale
    if ONE:
        top = tl.maximum(top, 0.0)
    p = tl.exp2(scores * scale - top[:, None])
    total = tl.sum(p, 1)
    if ONE:                                     # one more score of 0: there already are KEYS - n_key of them
        total += (1 - KEYS + n_key) * tl.exp2(-top)
    return p, 1.0 / total


# Algorithm 1. One program computes the output of one block of query rows in one head: it walks over the K
# slots, reads index, weight and that chunk's keys and values, and keeps q and the sum on chip. When there are
# few programs, as in generation, the slots are dealt out over n_part programs: stage 2 is a plain sum, so
# their outputs only have to be added.

@jit
def forward_kernel(Q, K, V, W, Index, Out, scale, n_slot, n_part, B, Cq, Sq, Sk, Hq, GROUP: tl.constexpr,
                   D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, ONE: tl.constexpr,
                   DOT: tl.constexpr):
    pid, n_block = tl.program_id(0), tl.cdiv(Sq, ROWS)
    c, row, h = pid % Cq, pid // Cq % n_block * ROWS, pid // (Cq * n_block) % Hq
    b, part = pid // (Cq * n_block * Hq) % B, pid // (Cq * n_block * Hq * B)
    slots, per_part = (b * Cq + c).to(tl.int64) * n_slot, tl.cdiv(n_slot, n_part)

    q = load_tile(Q, b, c, row, h, ROWS, D)
    out = tl.zeros((ROWS, D), tl.float32)
    for slot in range(part * per_part, min((part + 1) * per_part, n_slot)):
        index = tl.load(Index + slots + slot).to(tl.int32)
        w = tl.where(index < 0, 0.0, tl.load(W + slots + slot))
        k = load_tile(K, b, index, 0, h // GROUP, KEYS, D)
        v = load_tile(V, b, index, 0, h // GROUP, KEYS, D)
        scores = tl.dot(q, k.T, input_precision=DOT)                     # (ROWS, KEYS)
        p, inverse = chunk_softmax(scores, scale, Sk, KEYS, ONE)
        if D <= KEYS:                                                    # scale the smaller of the two tiles
            out += tl.dot(p.to(v.dtype), v, input_precision=DOT) * (w * inverse)[:, None]
        else:
            out += tl.dot((p * (w * inverse)[:, None]).to(v.dtype), v, input_precision=DOT)
    store_tile(Out, part * B + b, c, row, h, out, ROWS, D)


# Algorithm 2, first half: dQ and dw, with the forward kernel's grid and loop. Each program writes its own
# share of dw, a number a slot, summed over heads and blocks afterwards: no atomics, so the same bits in every
# run.

@jit
def backward_q_kernel(Q, K, V, DO, W, Index, DQ, DW, scale, n_slot, Cq, Sq, Sk, Hq, GROUP: tl.constexpr,
                      D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, ONE: tl.constexpr,
                      DOT: tl.constexpr):
    pid, n_block = tl.program_id(0), tl.cdiv(Sq, ROWS)
    c, block, h, b = pid % Cq, pid // Cq % n_block, pid // (Cq * n_block) % Hq, pid // (Cq * n_block * Hq)
    slots = (b * Cq + c).to(tl.int64) * n_slot

    q = load_tile(Q, b, c, block * ROWS, h, ROWS, D)
    do = load_tile(DO, b, c, block * ROWS, h, ROWS, D)
    dq = tl.zeros((ROWS, D), tl.float32)
    for slot in range(n_slot):
        index = tl.load(Index + slots + slot).to(tl.int32)
        w = tl.where(index < 0, 0.0, tl.load(W + slots + slot))
        k = load_tile(K, b, index, 0, h // GROUP, KEYS, D)
        v = load_tile(V, b, index, 0, h // GROUP, KEYS, D)
        scores = tl.dot(q, k.T, input_precision=DOT)                     # (ROWS, KEYS)
        dp = tl.dot(do, v.T, input_precision=DOT)
        p, inverse = chunk_softmax(scores, scale, Sk, KEYS, ONE)
        delta = tl.sum(p * dp, 1) * inverse                              # rowsum(dO * o_c)
        ds = p * ((dp - delta[:, None]) * (w * inverse)[:, None])        # exactly 0 if there is one key
        dq += tl.dot(ds.to(k.dtype), k, input_precision=DOT)
        tl.store(DW + ((slots + slot) * n_block + block) * Hq + h, tl.sum(delta, 0))
    store_tile(DQ, b, c, block * ROWS, h, dq * scale, ROWS, D)


# Algorithm 2, second half: dK and dV of a chunk sum over every (query chunk, slot) that retrieved it. First,
# the list of those pairs for each chunk (compressed sparse rows). One program makes one chunk's list: it
# counts the slots that hold earlier chunks, which gives the list's place, then writes its own slots there, in
# order. Every program reads all slots of its sequence; that is less work than it sounds (10 microseconds for
# the paper's shape), and one launch where sorting takes nine.

@jit
def retrieved_by_kernel(Index, Pairs, Offsets, n_pair, Ck, BLOCK: tl.constexpr):
    chunk, b = tl.program_id(0) % (Ck + 1), (tl.program_id(0) // (Ck + 1)).to(tl.int64)
    place = 0
    for start in range(0, n_pair, BLOCK):
        i = start + tl.arange(0, BLOCK)
        index = tl.load(Index + b * n_pair + i, mask=i < n_pair, other=-1)
        place += tl.sum(((index >= 0) & (index < chunk)).to(tl.int32), 0)
    tl.store(Offsets + b * (Ck + 1) + chunk, place)
    for start in range(0, n_pair, BLOCK):
        i = start + tl.arange(0, BLOCK)
        mine = (tl.load(Index + b * n_pair + i, mask=i < n_pair, other=-1) == chunk).to(tl.int32)
        tl.store(Pairs + b * n_pair + place + tl.cumsum(mine, 0) - 1, i, mask=mine == 1)
        place += tl.sum(mine, 0)


# Then one program computes dK and dV of one chunk in one key/value head, in a walk over the chunk's list. So
# that popular chunks do not leave the GPU to a few programs, long lists are cut into pieces of SEGMENT pairs.
# The first piece writes to dK and dV; each later one has a program and float32 tiles of its own, which
# add_pieces_kernel then adds up in order.
#
# Items[b] lists the work of a head. The first n_piece items are later pieces: item i is the chunk with one
# that begins in the SEGMENT places of Pairs from (i + 1) * SEGMENT on, or Ck. There is at most one, as pieces
# are that long, and its list has place (i + 1) * SEGMENT. All chunks follow, longest lists first.

@jit
def items_kernel(Offsets, Items, n_piece, Ck, BLOCK: tl.constexpr, SEGMENT: tl.constexpr):
    chunk, b = tl.program_id(0) % (Ck + 1), tl.program_id(0) // (Ck + 1)
    Offsets += b * (Ck + 1)
    Items += b * (n_piece + Ck)
    first = tl.load(Offsets + chunk)
    stop = tl.load(Offsets + chunk + 1, mask=chunk < Ck, other=(n_piece + 1) * SEGMENT)
    for i in range(max(tl.cdiv(first, SEGMENT) - 1, 0), tl.cdiv(stop, SEGMENT) - 1):
        piece = i + 1 - first // SEGMENT
        exists = (chunk < Ck) & (piece > 0) & (first + piece * SEGMENT < stop)
        tl.store(Items + i, tl.where(exists, chunk, Ck))
    rank = 0                                    # how many lists are longer, or as long and of earlier chunks
    for start in range(0, Ck, BLOCK):
        other = start + tl.arange(0, BLOCK)
        length = tl.load(Offsets + other + 1, mask=other < Ck, other=0)
        length -= tl.load(Offsets + other, mask=other < Ck, other=1)
        before = (length > stop - first) | (length == stop - first) & (other < chunk)
        rank += tl.sum(before.to(tl.int32), 0)
    tl.store(Items + n_piece + rank, chunk, mask=chunk < Ck)


# Programs of one head are neighbours, to share its queries in the L2 cache. But those with most to do, all
# later pieces and an eighth of the chunks, come before all others: none of them is left over at the end.

@jit
def backward_kv_kernel(Q, K, V, DO, W, DK, DV, PieceK, PieceV, Pairs, Offsets, Items, scale, n_piece,
                       B, Cq, Ck, Sk, Hkv, SLOTS: tl.constexpr, BLOCKS: tl.constexpr, GROUP: tl.constexpr,
                       D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, ONE: tl.constexpr,
                       DOT: tl.constexpr, SEGMENT: tl.constexpr):
    pid, n_early = tl.program_id(0), n_piece + Ck // 8
    is_early = pid < n_early * Hkv * B
    n_item = tl.where(is_early, n_early, n_piece + Ck - n_early)
    pid -= tl.where(is_early, 0, n_early * Hkv * B)
    item, h, b = pid % n_item + tl.where(is_early, 0, n_early), pid // n_item % Hkv, pid // (n_item * Hkv)
    pairs = b * Cq * SLOTS
    chunk = tl.load(Items + b * (n_piece + Ck) + item)
    if chunk < Ck:
        first = tl.load(Offsets + b * (Ck + 1) + chunk)
        stop = tl.load(Offsets + b * (Ck + 1) + chunk + 1)
        start = first
        if item < n_piece:
            start += (item + 1 - first // SEGMENT) * SEGMENT
        stop = min(start + SEGMENT, stop)
        k = load_tile(K, b, chunk, 0, h, KEYS, D)
        v = load_tile(V, b, chunk, 0, h, KEYS, D)
        dk = tl.zeros((KEYS, D), tl.float32)
        dv = tl.zeros((KEYS, D), tl.float32)
        TILES: tl.constexpr = BLOCKS * GROUP                             # of a pair: blocks of rows, heads
        for step in range(start * TILES, stop * TILES):
            pair = tl.load(Pairs + pairs + step // TILES)
            w = tl.load(W + pairs + pair)
            c, row, head = pair // SLOTS, step % TILES // GROUP * ROWS, h * GROUP + step % GROUP
            q = load_tile(Q, b, c, row, head, ROWS, D)
            do = load_tile(DO, b, c, row, head, ROWS, D)
            scores = tl.dot(q, k.T, input_precision=DOT)                 # (ROWS, KEYS)
            dp = tl.dot(do, v.T, input_precision=DOT)
            p, inverse = chunk_softmax(scores, scale, Sk, KEYS, ONE)
            delta = tl.sum(p * dp, 1) * inverse
            p *= (w * inverse)[:, None]
            ds = p * (dp - delta[:, None])
            p, ds = p.to(do.dtype).T, ds.to(q.dtype).T                   # both before either product
            dv += tl.dot(p, do, input_precision=DOT)
            dk += tl.dot(ds, q, input_precision=DOT)
        if item < n_piece:
            store_tile(PieceK, b, item, 0, h, dk * scale, KEYS, D)
            store_tile(PieceV, b, item, 0, h, dv, KEYS, D)
        else:
            store_tile(DK, b, chunk, 0, h, dk * scale, KEYS, D)
            store_tile(DV, b, chunk, 0, h, dv, KEYS, D)


@jit
def add_pieces_kernel(DK, DV, PieceK, PieceV, Offsets, Items, n_piece, Ck, Hkv, D: tl.constexpr,
                      KEYS: tl.constexpr, SEGMENT: tl.constexpr):
    """dK and dV of a chunk += the tiles of its later pieces: a program for each, of which the first works."""
    pid = tl.program_id(0)
    item, h, b = pid % n_piece, pid // n_piece % Hkv, pid // (n_piece * Hkv)
    chunk = tl.load(Items + b * (n_piece + Ck) + item)
    if chunk < Ck:
        first = tl.load(Offsets + b * (Ck + 1) + chunk)
        if first // SEGMENT == item:
            dk = load_tile(DK, b, chunk, 0, h, KEYS, D).to(tl.float32)
            dv = load_tile(DV, b, chunk, 0, h, KEYS, D).to(tl.float32)
            stop = item + (tl.load(Offsets + b * (Ck + 1) + chunk + 1) - first - 1) // SEGMENT
            for later in tl.range(item, stop, num_stages=3):
                dk += load_tile(PieceK, b, later, 0, h, KEYS, D)
                dv += load_tile(PieceV, b, later, 0, h, KEYS, D)
            store_tile(DK, b, chunk, 0, h, dk, KEYS, D)
            store_tile(DV, b, chunk, 0, h, dv, KEYS, D)


# ---------------------------------------------------------------- FlashGCA: the host's side

SEGMENT = 64        # pairs of a piece: the fewer, the more memory for the tiles of all possible pieces
LARGE = 2 ** 25     # queries (numbers) from which backward works in two halves of the heads: half that memory


def tile_bytes(k):
    """Bytes of the tile that holds one chunk's keys in one head."""
    return max(16, triton.next_power_of_2(k.shape[2])) * k.shape[-1] * k.element_size()


def launch_options(q, k, softmax_one):
    """Tiles: all keys of a chunk, 64 query rows or, where registers are short, fewer. How to compile that."""
    D, exact, size = q.shape[-1], q.dtype == torch.float32, tile_bytes(k)
    most = 16 if size == MAX_TILE else 32 if exact else 64
    keys, rows = (max(16, triton.next_power_of_2(n)) for n in (k.shape[2], min(q.shape[2], most)))
    dot = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"      # three products: like float32
    large = exact or size > 16384
    return (dict(GROUP=q.shape[3] // k.shape[3], D=D, ROWS=rows, KEYS=keys, ONE=softmax_one),
            dict(DOT=dot, num_warps=8 if large else 4, num_stages=1 if large else 2))


def aligned(*tensors):
    """The tensors as descriptors want them: no gaps between heads, strides of multiples of 16 bytes."""
    def fits(x):
        steps = [s * x.element_size() for s, n in zip(x.stride()[:3], x.shape[:3], strict=True) if n > 1]
        heads = x.stride(4) == 1 and (x.stride(3) == x.shape[4] or x.shape[3] == 1)
        return heads and x.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps)

    return [x if fits(x) else x.clone(memory_format=torch.contiguous_format) for x in tensors]


def descriptors(rows, *tensors):
    """For tiles of `rows` rows of one chunk in one head; tensors (B, C, S, H, D), aligned."""
    def strides(x):                             # of an axis of one element, torch allows any
        return [step if n > 1 else 16 for step, n in zip(x.stride()[:3], x.shape[:3], strict=True)]

    return [TensorDescriptor(x, [*x.shape[:3], x.shape[3] * x.shape[4]], [*strides(x), 1],
                             [1, 1, rows, x.shape[4]]) for x in tensors]


def n_parts(n_program, n_slot, device):
    """Over how many programs to deal out the slots of a query block, so that the GPU is busy."""
    if device.type != "cuda":
        return 1
    n_processor = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(n_slot, 2 * n_processor // n_program))


@torch.library.custom_op("gca::forward", mutates_args=())
def flash_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weights: torch.Tensor,
                  indices: torch.Tensor, softmax_one: bool, scale: float) -> torch.Tensor:
    if not (q.numel() and k.numel()):
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    tiles, how = launch_options(q, k, softmax_one)
    (B, Cq, Sq, Hq, _), Sk, n_slot = q.shape, k.shape[2], weights.shape[2]
    n_program = B * Cq * Hq * -(-Sq // tiles["ROWS"])
    n_part = n_parts(n_program, n_slot, q.device)
    dtype = q.dtype if n_part == 1 else torch.float32
    out = torch.empty(n_part * B, *q.shape[1:], dtype=dtype, device=q.device)
    q, k, v = aligned(q, k, v)
    w, indices = weights.float().contiguous(), indices.contiguous()
    query, output = descriptors(tiles["ROWS"], q, out)
    arguments = query, *descriptors(tiles["KEYS"], k, v), w, indices, output, scale
    if hopper and hopper.fits(q, **tiles) and n_part == 1:
        hopper.forward(*arguments, **tiles)
    else:
        forward_kernel[(n_part * n_program,)](*arguments, n_slot, n_part, B, Cq, Sq, Sk, Hq, **tiles, **how)
    return out if n_part == 1 else out.view(n_part, *q.shape).sum(0).to(q.dtype)


def retrieved_by(indices, Ck):
    """Who retrieved each chunk (CSR): indices (B, Cq, K) -> pairs (B, Cq * K), offsets (B, Ck + 1).

    pairs[offsets[c]:offsets[c + 1]] are the flat (query chunk, slot) pairs that hold chunk c, in order.
    """
    B, n_pair = len(indices), indices[0].numel()
    pairs, offsets = (torch.empty(B, n, dtype=torch.int32, device=indices.device) for n in (n_pair, Ck + 1))
    block = min(4096, triton.next_power_of_2(n_pair))
    retrieved_by_kernel[(B * (Ck + 1),)](indices, pairs, offsets, n_pair, Ck, BLOCK=block)
    return pairs, offsets


def work_items(pairs, offsets):
    """The work on dK and dV, as items_kernel has it: (B, n_piece + Ck)."""
    (B, n_pair), Ck = pairs.shape, offsets.shape[1] - 1
    n_piece = (n_pair - 1) // SEGMENT
    items = torch.empty(B, n_piece + Ck, dtype=torch.int32, device=pairs.device)
    block = min(4096, triton.next_power_of_2(Ck))
    items_kernel[(B * (Ck + 1),)](offsets, items, n_piece, Ck, BLOCK=block, SEGMENT=SEGMENT)
    return items


@torch.library.custom_op("gca::backward", mutates_args=())
def flash_backward(do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weights: torch.Tensor,
                   indices: torch.Tensor, softmax_one: bool, scale: float
                   ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if not (q.numel() and k.numel()):
        return tuple(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, weights))
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    do, q, k, v = aligned(do, q, k, v)
    w, indices = weights.float().contiguous(), indices.contiguous()
    pairs, offsets = retrieved_by(indices, k.shape[1])
    lists = pairs, offsets, work_items(pairs, offsets)
    n_part = 2 if q.numel() >= LARGE and k.shape[3] % 2 == 0 else 1
    dw = [backward_of_heads(*heads, w, indices, lists, softmax_one, scale)
          for heads in zip(*(x.chunk(n_part, dim=3) for x in (do, q, k, v, dq, dk, dv)), strict=True)]
    return dq, dk, dv, sum(dw).to(weights.dtype)


def backward_of_heads(do, q, k, v, dq, dk, dv, w, indices, lists, softmax_one, scale):
    """Fill dq, dk and dv, which may be some of the heads; returns dweights (B, Cq, K)."""
    tiles, how = launch_options(q, k, softmax_one)
    ROWS, KEYS = tiles["ROWS"], tiles["KEYS"]
    (B, Cq, Sq, Hq, D), (_, Ck, Sk, Hkv, _), n_slot = q.shape, k.shape, w.shape[2]
    n_block, n_piece = -(-Sq // ROWS), lists[-1].shape[1] - Ck
    pieces = torch.empty(2, B, max(1, n_piece), Sk, Hkv, D, dtype=torch.float32, device=q.device)
    inputs = (*descriptors(ROWS, q), *descriptors(KEYS, k, v), *descriptors(ROWS, do), w)
    dquery, sums = *descriptors(ROWS, dq), descriptors(KEYS, dk, dv, *pieces)
    if hopper and hopper.fits(q, **tiles):
        dw = hopper.backward(*inputs, indices, dquery, sums, lists, scale, SEGMENT, **tiles)
    else:
        parts = torch.empty(B, Cq, n_slot, n_block * Hq, dtype=torch.float32, device=q.device)
        backward_q_kernel[(B * Cq * n_block * Hq,)](
            *inputs, indices, dquery, parts, scale, n_slot, Cq, Sq, Sk, Hq, **tiles, **how)
        backward_kv_kernel[(B * (n_piece + Ck) * Hkv,)](
            *inputs, *sums, *lists, scale, n_piece, B, Cq, Ck, Sk, Hkv, SLOTS=n_slot, BLOCKS=n_block,
            SEGMENT=SEGMENT, **tiles, **how)
        dw = parts.sum(-1)
    if n_piece:
        add_pieces_kernel[(B * n_piece * Hkv,)](
            *sums, *lists[1:], n_piece, Ck, Hkv, D=D, KEYS=KEYS, SEGMENT=SEGMENT)
    return dw


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


def no_second_derivative(ctx, *grads):
    raise RuntimeError("the kernels are differentiable once; for second derivatives use backend='reference'")


flash_forward.register_autograd(backward, setup_context=save_inputs)
flash_backward.register_autograd(no_second_derivative)


# ---------------------------------------------------------------- the function to call

def gca(q, k, v, weights, indices, softmax_one=True, scale=None, backend="auto"):
    """Grouped Cross Attention: out = sum_c w_c softmax(q K_c^T * scale) V_c, c in indices (Sec. 3).

    q        (B, Cq, Sq, Hq, D)    query chunks
    k, v     (B, Ck, Sk, Hkv, D)   every chunk's keys and values, once; Hkv divides Hq
    weights  (B, Cq, K) float32    retrieval weights
    indices  (B, Cq, K) int        chunks in [0, Ck), repeats allowed; -1 = empty slot, which adds nothing
    softmax_one                    softmax-off-by-one: 1 + sum in the denominator, so a row may take nothing
    scale                          of the scores, positive; default D ** -0.5
    backend                        "triton", "reference" or "auto": triton for what it takes, on a GPU
    returns  (B, Cq, Sq, Hq, D) in q's dtype, differentiable in q, k, v and weights

    Under autocast, q, k and v are cast to its dtype, as for torch's own attention. Raises ValueError, naming
    the argument, for what does not fit; RuntimeError if the backend cannot run.
    """
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    check_arguments(q, k, v, weights, indices, backend)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale must be positive, got {scale}")
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
