"""FlashGCA once more, faster, same results. Importing it adds a backend to gca(): "fast".

    even work       Many chunks may retrieve the same one. The list of those who did is then cut into pieces,
                    and the longest lists start first, so that no program is left over at the end.
    shared slots    Where there are few query chunks, as in generation, several programs share one's slots.
    gaps            Heads that are slices of a larger tensor are read where they are.
    hopper.py       On H100s and H200s, backward, and forward for some heads, one level below Triton.

docs/log.md has what each of these gave, and what was tried. Shapes are gca.py's.
"""
from __future__ import annotations

from functools import lru_cache

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

import gca as plain
from fast.launch import aligned, descriptor, launch, without_large_gaps
from gca import (
    INTERPRET,
    backward_q_kernel,
    backward_tile,
    chunk_softmax,
    jit,
    launch_options,
    load_tile,
    tile_rows,
    triton,
)

if triton:
    import triton.language as tl

hopper = None
if triton and torch.cuda.is_available() and not INTERPRET:
    try:
        from fast import hopper
    except (ImportError, AttributeError):       # a Triton whose Gluon has other names; it is experimental
        pass

OPTIONS = {}        # launch_options by shape
SEGMENT = 64        # pairs in a piece of a list; shorter pieces take more memory
LARGE = 2 ** 25     # numbers in q from which the backward pass takes half of the heads at a time: less memory


def jit_for_any_number_of_chunks(kernel):
    """jit, but a growing text does not compile the kernel again, as it would for each new divisor of Ck."""
    return triton.jit(kernel, do_not_specialize=["Ck"]) if triton else kernel


@jit
def store_tile(X, c, row, h, x, ROWS: tl.constexpr, D: tl.constexpr):
    X.store([c, row, h * D], x.to(X.dtype).reshape(1, ROWS, D))


# ---------------------------------------------------------------- forward

@jit_for_any_number_of_chunks
def forward_kernel(Q, K, V, W, Index, Out, scale, n_slot, n_part, B, Cq, Ck, Sq, Sk, Hq,
                   GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
                   ONE: tl.constexpr, DOT: tl.constexpr):
    """gca.py's forward kernel for one part of the slots. Out: the parts, one after another, to be added."""
    pid = tl.program_id(0)
    n_block = tl.cdiv(Sq, ROWS)
    row = pid // Cq % n_block * ROWS
    h = pid // (Cq * n_block) % Hq
    b = pid // (Cq * n_block * Hq) % B
    c = b * Cq + pid % Cq
    part = pid // (Cq * n_block * Hq * B)
    slots = c.to(tl.int64) * n_slot
    per_part = tl.cdiv(n_slot, n_part)

    q = load_tile(Q, c, row, h, ROWS, D)
    out = tl.zeros((ROWS, D), tl.float32)
    for slot in range(part * per_part, min((part + 1) * per_part, n_slot)):
        index = tl.load(Index + slots + slot).to(tl.int32)
        w = tl.where(index < 0, 0.0, tl.load(W + slots + slot))
        chunk = tl.where(index < 0, -1, b * Ck + index)
        k = load_tile(K, chunk, 0, h // GROUP, KEYS, D)
        v = load_tile(V, chunk, 0, h // GROUP, KEYS, D)
        scores = tl.dot(q, k.T, input_precision=DOT)                            # (ROWS, KEYS)
        p, total = chunk_softmax(scores, scale, Sk, KEYS, ONE)
        if D <= KEYS:                                                           # scale the smaller tile
            out += tl.dot(p.to(v.dtype), v, input_precision=DOT) * (w / total)[:, None]
        else:
            out += tl.dot((p * (w / total)[:, None]).to(v.dtype), v, input_precision=DOT)
    store_tile(Out, part * B * Cq + c, row, h, out, ROWS, D)


# ---------------------------------------------------------------- backward: who retrieved each chunk
#
# dK and dV of a chunk sum over the (query chunk, slot) pairs that hold it. One program makes one such list.
# It counts the slots that hold earlier chunks, which is where the list begins, and then writes its own slots
# there, in order. Every program reads all slots of its sequence, but that is one launch where sorting takes
# several.

@jit
def retrieved_by_kernel(Index, Pairs, Offsets, Numbers, n_pair, Ck, BLOCK: tl.constexpr):
    """Pairs (B, n_pair), Offsets (B, Ck + 1) and Numbers (B, n_pair), which are the chunk_numbers()."""
    chunk = tl.program_id(0) % (Ck + 1)         # Ck stands for the empty slots, whose pairs come last
    b = (tl.program_id(0) // (Ck + 1)).to(tl.int64)
    wanted = tl.where(chunk < Ck, chunk, -1)
    number = tl.where(chunk < Ck, b * Ck + chunk, -1).to(tl.int32)
    offset = 0
    for start in range(0, n_pair, BLOCK):
        i = start + tl.arange(0, BLOCK)
        index = tl.load(Index + b * n_pair + i, mask=i < n_pair, other=-1)
        offset += tl.sum(((index >= 0) & (index < chunk)).to(tl.int32), 0)
    tl.store(Offsets + b * (Ck + 1) + chunk, offset)
    for start in range(0, n_pair, BLOCK):
        i = start + tl.arange(0, BLOCK)
        index = tl.load(Index + b * n_pair + i, mask=i < n_pair, other=-1)
        mine = ((index == wanted) & (i < n_pair)).to(tl.int32)
        tl.store(Pairs + b * n_pair + offset + tl.cumsum(mine, 0) - 1, i, mask=mine == 1)
        tl.store(Numbers + b * n_pair + i, number, mask=mine == 1)
        offset += tl.sum(mine, 0)


# ---------------------------------------------------------------- backward: a list of even work
#
# A list longer than SEGMENT pairs is cut into pieces. The first piece writes to dK and dV. Each later piece
# has a program and float32 tiles of its own, which add_pieces_kernel adds up in order.
#
# Items[b] lists what there is to do for one head. Its first n_piece entries are later pieces: entry i is the
# chunk with a piece that begins in the SEGMENT places of Pairs from (i + 1) * SEGMENT on, or Ck if there is
# none. There is at most one, because pieces are that long. All chunks follow, those with long lists first.

@jit
def items_kernel(Offsets, Items, n_piece, Ck, BLOCK: tl.constexpr, SEGMENT: tl.constexpr):
    """One program: the entries of one chunk. Number Ck has no list; it fills what is behind the last list."""
    chunk = tl.program_id(0) % (Ck + 1)
    b = tl.program_id(0) // (Ck + 1)
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


# ---------------------------------------------------------------- backward: dK and dV
#
# Programs of one head are neighbours, so that they share its queries in the L2 cache. But all later pieces
# and an eighth of the chunks, which have most to do, come before everything else ("early").

@jit
def backward_kv_kernel(Q, K, V, DO, W, DK, DV, PieceK, PieceV, Pairs, Offsets, Items, scale, n_piece,
                       B, Cq, Ck, Sk, Hkv, SLOTS: tl.constexpr, BLOCKS: tl.constexpr, GROUP: tl.constexpr,
                       D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, ONE: tl.constexpr,
                       DOT: tl.constexpr, SEGMENT: tl.constexpr):
    """gca.py's kernel of this name for one entry of the list of work."""
    pid = tl.program_id(0)
    n_early = n_piece + Ck // 8
    is_early = pid < n_early * Hkv * B
    n_item = tl.where(is_early, n_early, n_piece + Ck - n_early)
    pid -= tl.where(is_early, 0, n_early * Hkv * B)
    item = pid % n_item + tl.where(is_early, 0, n_early)
    h = pid // n_item % Hkv
    b = pid // (n_item * Hkv)
    pairs = b * Cq * SLOTS
    chunk = tl.load(Items + b * (n_piece + Ck) + item)
    if chunk < Ck:
        first = tl.load(Offsets + b * (Ck + 1) + chunk)
        stop = tl.load(Offsets + b * (Ck + 1) + chunk + 1)
        start = first
        if item < n_piece:
            start += (item + 1 - first // SEGMENT) * SEGMENT
        stop = min(start + SEGMENT, stop)
        k = load_tile(K, b * Ck + chunk, 0, h, KEYS, D)
        v = load_tile(V, b * Ck + chunk, 0, h, KEYS, D)
        dk = tl.zeros((KEYS, D), tl.float32)
        dv = tl.zeros((KEYS, D), tl.float32)
        TILES: tl.constexpr = BLOCKS * GROUP                            # of a pair: blocks of rows, heads
        for step in range(start * TILES, stop * TILES):
            pair = tl.load(Pairs + pairs + step // TILES)
            w = tl.load(W + pairs + pair)
            c = b * Cq + pair // SLOTS
            row = step % TILES // GROUP * ROWS
            head = h * GROUP + step % GROUP
            q = load_tile(Q, c, row, head, ROWS, D)
            do = load_tile(DO, c, row, head, ROWS, D)
            wp, ds, _ = backward_tile(q, k, v, do, w, scale, Sk, KEYS, ONE, DOT)
            wp_t, ds_t = wp.to(do.dtype).T, ds.to(q.dtype).T            # both before either product
            dv += tl.dot(wp_t, do, input_precision=DOT)
            dk += tl.dot(ds_t, q, input_precision=DOT)
        if item < n_piece:
            store_tile(PieceK, b * n_piece + item, 0, h, dk * scale, KEYS, D)
            store_tile(PieceV, b * n_piece + item, 0, h, dv, KEYS, D)
        else:
            store_tile(DK, b * Ck + chunk, 0, h, dk * scale, KEYS, D)
            store_tile(DV, b * Ck + chunk, 0, h, dv, KEYS, D)


@jit
def add_pieces_kernel(DK, DV, PieceK, PieceV, Offsets, Items, n_piece, Ck, Hkv, D: tl.constexpr,
                      KEYS: tl.constexpr, SEGMENT: tl.constexpr):
    """dK and dV of a chunk += the tiles of its later pieces. One program a piece; the first one works."""
    pid = tl.program_id(0)
    item = pid % n_piece
    h = pid // n_piece % Hkv
    b = pid // (n_piece * Hkv)
    chunk = tl.load(Items + b * (n_piece + Ck) + item)
    if chunk < Ck:
        first = tl.load(Offsets + b * (Ck + 1) + chunk)
        if first // SEGMENT == item:
            number = b * Ck + chunk
            dk = load_tile(DK, number, 0, h, KEYS, D).to(tl.float32)
            dv = load_tile(DV, number, 0, h, KEYS, D).to(tl.float32)
            stop = item + (tl.load(Offsets + b * (Ck + 1) + chunk + 1) - first - 1) // SEGMENT
            for later in tl.range(item, stop, num_stages=3 if D * KEYS <= 4096 else 1):
                dk += load_tile(PieceK, b * n_piece + later, 0, h, KEYS, D)
                dv += load_tile(PieceV, b * n_piece + later, 0, h, KEYS, D)
            store_tile(DK, number, 0, h, dk, KEYS, D)
            store_tile(DV, number, 0, h, dv, KEYS, D)


# ---------------------------------------------------------------- the host's side

def n_parts(n_program, n_slot, device):
    """Over how many programs to share the slots of a query block, so that the GPU is busy."""
    return max(1, min(n_slot, 2 * n_processors(device) // n_program))


@lru_cache
def n_processors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


def tiles(q, k, softmax_one):
    """gca.py's launch_options, worked out once."""
    key = q.shape[2:], k.shape[2:], q.dtype, q.device, softmax_one, torch.backends.cuda.matmul.allow_tf32
    if key not in OPTIONS:
        OPTIONS[key] = launch_options(q, k, softmax_one)
    return OPTIONS[key]


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor,
            softmax_one: bool, scale: float) -> torch.Tensor:
    (B, Cq, Sq, Hq, _), (_, Ck, Sk, _, _), n_slot = q.shape, k.shape, weights.shape[2]
    options = tiles(q, k, softmax_one)
    rows, keys = options["ROWS"], options["KEYS"]
    n_program = B * Cq * Hq * -(-Sq // rows)
    n_part = n_parts(n_program, n_slot, q.device)
    dtype = q.dtype if n_part == 1 else torch.float32
    out = torch.empty(q.shape if n_part == 1 else (n_part, *q.shape), dtype=dtype, device=q.device)
    q, k, v = (without_large_gaps(x) for x in (q, k, v))
    on_hopper = hopper and n_part == 1 and hopper.forward_fits(q, options)
    tile, kind = hopper.descriptor if on_hopper else descriptor, (q.device, q.dtype, indices.dtype)
    inputs = tile(q, rows), tile(k, keys), tile(v, keys), aligned(weights.float()), aligned(indices)
    tensors = *inputs, tile(out.view(n_part * B, *q.shape[1:]), rows)
    if on_hopper:
        hopper.forward(kind, *tensors, scale, B, Cq, Ck, n_slot, options)
    else:
        launch(forward_kernel, kind, (n_part * n_program,),
               *tensors, scale, n_slot, n_part, B, Cq, Ck, Sq, Sk, Hq, **options)
    return out if n_part == 1 else out.sum(0).to(q.dtype)


def retrieved_by(indices, Ck):
    """Who retrieved each chunk of each sequence: indices (B, Cq, K) -> pairs, offsets, chunk numbers.

    pairs[b, offsets[b, c]:offsets[b, c + 1]] are the (query chunk * K + slot) that hold chunk c, in order.
    """
    B, n_pair = len(indices), indices[0].numel()
    pairs, numbers = (torch.empty(B, n_pair, dtype=torch.int32, device=indices.device) for _ in range(2))
    offsets = torch.empty(B, Ck + 1, dtype=torch.int32, device=indices.device)
    block, kind = min(4096, triton.next_power_of_2(n_pair)), (indices.device, indices.dtype)
    launch(retrieved_by_kernel, kind, (B * (Ck + 1),),
           indices, pairs, offsets, numbers, n_pair, Ck, BLOCK=block)
    return pairs, offsets, numbers


def work_items(pairs, offsets):
    """The list of work on dK and dV, as items_kernel explains it: (B, n_piece + Ck)."""
    (B, n_pair), Ck = pairs.shape, offsets.shape[1] - 1
    n_piece = (n_pair - 1) // SEGMENT
    items = torch.empty(B, n_piece + Ck, dtype=torch.int32, device=pairs.device)
    block = min(4096, triton.next_power_of_2(Ck))
    launch(items_kernel, offsets.device, (B * (Ck + 1),),
           offsets, items, n_piece, Ck, BLOCK=block, SEGMENT=SEGMENT)
    return items


def backward(do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weights: torch.Tensor,
             indices: torch.Tensor, softmax_one: bool, scale: float) -> list[torch.Tensor]:
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    do, q, k, v = (without_large_gaps(x) for x in (do, q, k, v))
    w = aligned(weights.float())
    pairs, offsets, numbers = retrieved_by(aligned(indices), k.shape[1])
    lists = pairs, offsets, work_items(pairs, offsets)
    tensors = do, q, k, v, dq, dk, dv
    in_halves = q.numel() >= LARGE and k.shape[3] % 2 == 0
    halves = zip(*(x.chunk(2, dim=3) for x in tensors), strict=True) if in_halves else [tensors]
    dw, *others = [backward_of_heads(*heads, w, numbers, lists, softmax_one, scale) for heads in halves]
    return [dq, dk, dv, sum(others, dw).to(weights.dtype)]


def backward_of_heads(do, q, k, v, dq, dk, dv, w, numbers, lists, softmax_one, scale):
    """Fill dq, dk and dv, which may be slices of the heads; returns dweights (B, Cq, K)."""
    options = tiles(q, k, softmax_one)
    rows, keys = options["ROWS"], options["KEYS"]
    (B, Cq, Sq, Hq, D), (_, Ck, Sk, Hkv, _), n_slot = q.shape, k.shape, w.shape[2]
    n_block, n_piece = -(-Sq // rows), lists[-1].shape[1] - Ck
    on_hopper = hopper and hopper.backward_fits(q, options)
    tile, kind = hopper.descriptor if on_hopper else descriptor, (q.device, q.dtype)
    pieces = torch.empty(2, B, max(1, n_piece), Sk, Hkv, D, dtype=torch.float32, device=q.device)
    inputs = tile(q, rows), tile(k, keys), tile(v, keys), tile(do, rows), w
    sums = [tile(x, keys) for x in (dk, dv, *pieces)]
    if on_hopper:
        dw = hopper.backward(kind, *inputs, numbers, tile(dq, rows), sums, lists, scale, SEGMENT, B, Cq, Ck,
                             n_slot, options)
    else:
        dw_shares = w.new_empty(B, Cq, n_slot, n_block, Hq)
        launch(backward_q_kernel, kind, (B * Cq, n_block, Hq),
               *inputs, numbers, tile(dq, rows), dw_shares, scale, n_slot, Sk, **options)
        launch(backward_kv_kernel, kind, (B * (n_piece + Ck) * Hkv,),
               *inputs, *sums, *lists, scale, n_piece, B, Cq, Ck, Sk, Hkv, SLOTS=n_slot, BLOCKS=n_block,
               SEGMENT=SEGMENT, **options)
        dw = dw_shares.sum((3, 4))
    if n_piece:
        if on_hopper:                                                   # add_pieces_kernel is Triton's
            sums = [descriptor(x, keys) for x in (dk, dv, *pieces)]
        launch(add_pieces_kernel, kind, (B * n_piece * Hkv,),
               *sums, *lists[1:], n_piece, Ck, Hkv, D=D, KEYS=keys, SEGMENT=SEGMENT)
    return dw


# ---------------------------------------------------------------- as PyTorch ops, and without their cost

fast_forward = torch.library.custom_op("gca::fast_forward", forward, mutates_args=())
fast_backward = torch.library.custom_op("gca::fast_backward", backward, mutates_args=())


def gradients(ctx, do):
    return *fast_backward(do, *ctx.saved_tensors, ctx.softmax_one, ctx.scale), None, None, None


fast_forward.register_fake(plain.fake_forward)
fast_backward.register_fake(plain.fake_backward)
fast_forward.register_autograd(gradients, setup_context=plain.save_inputs)
fast_backward.register_autograd(plain.second_derivative)


class Eager(torch.autograd.Function):
    """The same without torch's registry of ops, which takes Python a tenth of a millisecond for each pass."""

    @staticmethod
    def forward(ctx, *inputs):
        plain.save_inputs(ctx, inputs, None)
        return forward(*inputs)

    @staticmethod
    def backward(ctx, do):
        if torch.is_grad_enabled() or torch.compiler.is_compiling():    # create_graph=True: the op raises
            return gradients(ctx, do)
        return *backward(do, *ctx.saved_tensors, ctx.softmax_one, ctx.scale), None, None, None


def op(q, k, v, weights, indices, softmax_one, scale):
    """The registered op where something traces or watches the call, the short way where nothing does."""
    is_watched = (torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
                  or torch._C._are_functorch_transforms_active())
    is_plain = type(q) is torch.Tensor and type(softmax_one) is bool and not is_watched
    return (Eager.apply if is_plain else fast_forward)(q, k, v, weights, indices, softmax_one, scale)


plain.BACKENDS["fast"] = op


def gca(q, k, v, weights, indices, softmax_one=True, scale=None):
    """gca.py's gca() with the fastest backend for these tensors: "fast" on a GPU, where the kernels fit."""
    backend = "fast" if q.is_cuda and tile_rows(q, k) else "auto"
    return plain.gca(q, k, v, weights, indices, softmax_one, scale, backend)


def in_words(model):
    """Which kernels a model runs on a GPU, in half precision; "" for a base LM."""
    config, device = model.config, model.embedding.weight.device
    x = torch.empty(1, 1, config.chunk_size, config.n_head, config.n_embd // config.n_head,
                    dtype=torch.bfloat16, device=device)
    kernels = "Triton kernels" if tile_rows(x, x[:, :, 1:]) else "reference attention"
    return kernels if config.n_group else ""
