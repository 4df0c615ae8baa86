"""FlashGCA for Hopper GPUs (H100, H200): kernels of fast/gca.py, one level lower.

Triton decides by itself when a kernel waits for a product or a tile. Gluon, the language beneath it in the
same package, leaves that to the program. These kernels compute what gca.py's do, which explains them. What is
different here:

    two heads    Forward, heads of 128: a program takes two query heads that share keys. A tile of keys or
                 values is read once for both, and the products of one run beside the softmax of the other.
    waits        Backward: dO V^T runs while the softmax is computed, the last slot's dS K while this slot's
                 scores are. Tiles are fetched one turn ahead.
    statistics   dQ's kernel stores log-sum-exp and delta of every row and slot. The kernel of dK and dV then
                 needs no sums over keys, so it can compute scores transposed: P^T and dS^T come out in
                 registers, where the products P^T dO and dS^T Q want them.

fast/gca.py calls `forward` where `forward_fits` says so and no query's slots are split among programs,
`backward` where `backward_fits` does, and its own kernels elsewhere. docs/log.md lists what was tried.
"""
import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, tma
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma as product
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_init as accumulator
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait as finish

from fast.launch import descriptor as plain_descriptor
from fast.launch import launch

if hasattr(gl, "thread_barrier"):           # the names of Triton 3.6, and those of 3.9
    thread_barrier, copy_rows = gl.thread_barrier, async_copy.async_copy_global_to_shared
    copy_in, copy_out = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global
else:
    thread_barrier, copy_rows = gl.barrier, async_copy.async_load
    copy_in, copy_out = tma.async_load, tma.async_store
LOG2E = gl.constexpr(1.4426950408889634)


# ---------------------------------------------------------------- what the kernels share
#
# A tile is copied to shared memory (by TMA) while the program goes on. A barrier there counts its bytes, and
# whoever needs the tile waits for the barrier. Turn t uses buffers t % 2. Meanwhile those of turn t + 1 are
# filled, once every warp has seen that the last turn's products are finished: hence one thread_barrier() a
# turn.
#
# A product is issued in one place and finished in another: finish(n, ..) waits for all but the last n. Its
# left operand may come from registers. What is in flight holds registers, and registers decide how many
# programs share a processor. With heads of 64, the waits below keep dQ's kernel within 128 a thread, that of
# dK and dV within 168.

@gluon.constexpr_function
def layout(columns):
    """Of a product with 64 rows, in the registers of 4 warps."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.jit
def buffers(X, N: gl.constexpr):
    """Shared memory for N tiles of X."""
    return gl.allocate_shared_memory(X.dtype, [N] + X.block_shape, X.layout)


@gluon.jit
def barriers(N: gl.constexpr):
    ready = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(ready.index(i), count=1)
    fence_async_shared()
    return ready


@gluon.jit
def fetch(X, x, Y, y, ready, i, c, row, h, wanted):
    """Start to copy the tiles of X and Y at (c, row, h) to buffers i."""
    D: gl.constexpr = X.block_shape[2]
    mbarrier.expect(ready.index(i), 2 * X.block_type.nbytes, pred=wanted)
    copy_in(X, [c, row, h * D], ready.index(i), x.index(i), pred=wanted)
    copy_in(Y, [c, row, h * D], ready.index(i), y.index(i), pred=wanted)


@gluon.jit
def fetched(X, x, Y, y, ready, turn):
    """The two tiles (rows, D) of a turn, once they are there. A barrier is passed in even and odd rounds."""
    i = turn % 2
    mbarrier.wait(ready.index(i), turn // 2 % 2)
    return x.index(i).reshape(X.block_shape[1:]), y.index(i).reshape(Y.block_shape[1:])


@gluon.jit
def store(X, x, c, row, h, value):
    """Write a tile of X, by way of the shared memory x."""
    x.reshape(X.block_shape[1:]).store(value.to(X.dtype))
    fence_async_shared()
    copy_out(X, [c, row, h * X.block_shape[2]], x)
    tma.store_wait(0)
    thread_barrier()


@gluon.jit
def left_operand(x, dtype: gl.constexpr, D: gl.constexpr):
    """For a product of 64 rows and D columns."""
    return gl.convert_layout(x.to(dtype), gl.DotOperandLayout(0, layout(D), 2))


@gluon.jit
def chunk_and_weight(Index, W, slot, n_slot, first):
    """A slot's chunk, as first + its index, and its weight; -1 and 0 of an empty slot, or behind the last."""
    exists = slot < n_slot
    index = gl.load(Index + slot, mask=exists, other=-1).to(gl.int32)
    w = gl.where(index < 0, 0.0, gl.load(W + slot, mask=exists, other=0.0))
    return gl.where(index < 0, -1, first + index), w


@gluon.jit
def chunk_softmax(scores, scale, n_key, KEYS: gl.constexpr, ONE: gl.constexpr):
    """Softmax over one chunk's keys: numerators, their sum (+ 1), what was taken off the scores (base 2)."""
    scale *= LOG2E
    if not ONE:
        key = gl.arange(0, KEYS, layout=gl.SliceLayout(0, scores.type.layout))
        scores = gl.where(key[None, :] < n_key, scores, float("-inf"))
    peak = gl.max(scores, 1) * scale
    if ONE:
        peak = gl.maximum(peak, 0.0)
    p = gl.exp2(scores * scale - peak[:, None])
    total = gl.sum(p, 1)
    if ONE:
        total += (1 - KEYS + n_key) * gl.exp2(-peak)
    return p, total, peak


@gluon.jit
def log2(x):
    """log2 of normal numbers. gl.log2 also handles the others, which makes dQ's kernel 5% slower."""
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, True, 1)


# ---------------------------------------------------------------- the kernels

@gluon.jit(do_not_specialize=["Ck"])
def forward_kernel(Q, K, V, W, Index, Out, scale, n_slot, Cq, Ck, Sq, Sk, Hq, GROUP: gl.constexpr,
                   D: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr, ONE: gl.constexpr):
    """Query heads h and h + 1, which share keys. Index counts in each sequence, as fast/gca.py's does."""
    pid = gl.program_id(0)
    n_block = gl.cdiv(Sq, ROWS)
    row = pid // Cq % n_block * ROWS
    h = pid // (Cq * n_block) % (Hq // 2) * 2
    b = pid // (Cq * n_block * (Hq // 2))
    c = b * Cq + pid % Cq
    Index += c.to(gl.int64) * n_slot
    W += c.to(gl.int64) * n_slot

    q, q_ready = buffers(Q, 2), barriers(1)
    k, v, ready = buffers(K, 2), buffers(V, 2), barriers(2)
    mbarrier.expect(q_ready.index(0), 2 * Q.block_type.nbytes)
    copy_in(Q, [c, row, h * D], q_ready.index(0), q.index(0))
    copy_in(Q, [c, row, (h + 1) * D], q_ready.index(0), q.index(1))
    chunk, w = chunk_and_weight(Index, W, 0, n_slot, b * Ck)
    fetch(K, k, V, v, ready, 0, chunk, 0, h // GROUP, True)
    next_chunk, next_w = chunk_and_weight(Index, W, 1, n_slot, b * Ck)
    unread = gl.zeros((ROWS, KEYS), gl.float32, layout(KEYS))            # use_acc=False does not read it
    out_0 = accumulator(gl.zeros((ROWS, D), gl.float32, layout(D)))
    out_1 = accumulator(gl.zeros((ROWS, D), gl.float32, layout(D)))
    mbarrier.wait(q_ready.index(0), 0)
    q_0, q_1 = q.index(0).reshape([ROWS, D]), q.index(1).reshape([ROWS, D])
    for slot in range(n_slot):
        k_tile, v_tile = fetched(K, k, V, v, ready, slot)
        scores_0 = product(q_0, k_tile.permute((1, 0)), unread, use_acc=False, is_async=True)
        scores_1 = product(q_1, k_tile.permute((1, 0)), unread, use_acc=False, is_async=True)
        scores_0, out_0, out_1 = finish(1, [scores_0, out_0, out_1])     # scores_1 runs on
        thread_barrier()
        fetch(K, k, V, v, ready, (slot + 1) % 2, next_chunk, 0, h // GROUP, slot + 1 < n_slot)
        next_chunk, w_after = chunk_and_weight(Index, W, slot + 2, n_slot, b * Ck)      # loads take a while
        p, total, _ = chunk_softmax(scores_0, scale, Sk, KEYS, ONE)
        p *= (w / total)[:, None]
        out_0 = product(left_operand(p, Q.dtype, D), v_tile, accumulator(out_0), is_async=True)
        scores_1 = finish(1, [scores_1])                                 # out_0 runs on
        p, total, _ = chunk_softmax(scores_1, scale, Sk, KEYS, ONE)
        p *= (w / total)[:, None]
        out_1 = product(left_operand(p, Q.dtype, D), v_tile, accumulator(out_1), is_async=True)
        w, next_w = next_w, w_after
    out_0, out_1 = finish(0, [out_0, out_1])
    thread_barrier()
    store(Out, q.index(0), c, row, h, out_0)                # q is not needed any more, its memory is
    store(Out, q.index(1), c, row, h + 1, out_1)


@gluon.jit
def backward_q_kernel(Q, K, V, DO, W, Index, DQ, Stats, scale, n_slot, Cq, Sq, Sk, Hq, GROUP: gl.constexpr,
                      D: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr, ONE: gl.constexpr):
    """dQ, and Stats (B, Cq, n_slot, 2, Hq, n_block, ROWS): log-sum-exp (base 2) and delta.

    Index holds chunk numbers of the whole batch, as the kernel of this name in gca.py takes them.
    """
    pid = gl.program_id(0)
    n_block = gl.cdiv(Sq, ROWS)
    block = pid // Cq % n_block
    h = pid // (Cq * n_block) % Hq
    c = pid // (Cq * n_block * Hq) * Cq + pid % Cq
    slots = c.to(gl.int64) * n_slot
    Index += slots
    W += slots
    n_stat = Hq * n_block * ROWS
    Stats += slots * 2 * n_stat + (h * n_block + block) * ROWS
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, layout(KEYS)))

    q, do, q_ready = buffers(Q, 1), buffers(DO, 1), barriers(1)
    k, v, ready = buffers(K, 2), buffers(V, 2), barriers(2)
    fetch(Q, q, DO, do, q_ready, 0, c, block * ROWS, h, True)
    chunk, w = chunk_and_weight(Index, W, 0, n_slot, 0)
    fetch(K, k, V, v, ready, 0, chunk, 0, h // GROUP, True)
    next_chunk, next_w = chunk_and_weight(Index, W, 1, n_slot, 0)
    unread = gl.zeros((ROWS, KEYS), gl.float32, layout(KEYS))            # use_acc=False does not read it
    dq = accumulator(gl.zeros((ROWS, D), gl.float32, layout(D)))
    q_tile, do_tile = fetched(Q, q, DO, do, q_ready, 0)
    for slot in range(n_slot):
        k_tile, v_tile = fetched(K, k, V, v, ready, slot)
        scores = product(q_tile, k_tile.permute((1, 0)), unread, use_acc=False, is_async=True)
        scores, dq = finish(0, [scores, dq])
        dp = product(do_tile, v_tile.permute((1, 0)), unread, use_acc=False, is_async=True)
        thread_barrier()
        fetch(K, k, V, v, ready, (slot + 1) % 2, next_chunk, 0, h // GROUP, slot + 1 < n_slot)
        next_chunk, w_after = chunk_and_weight(Index, W, slot + 2, n_slot, 0)
        p, total, peak = chunk_softmax(scores, scale, Sk, KEYS, ONE)
        inverse = 1.0 / total
        dp = finish(0, [dp])
        delta = gl.sum(p * dp, 1) * inverse                              # rowsum(dO * o_c)
        gl.store(Stats + rows, peak + log2(total))
        gl.store(Stats + n_stat + rows, delta)
        Stats += 2 * n_stat
        ds = p * ((dp - delta[:, None]) * (w * inverse)[:, None])
        dq = product(left_operand(ds, Q.dtype, D), k_tile, accumulator(dq), is_async=True)
        w, next_w = next_w, w_after
    dq = finish(0, [dq])
    thread_barrier()
    store(DQ, q.index(0), c, block * ROWS, h, dq * scale)


@gluon.jit
def backward_kv_kernel(Q, K, V, DO, W, DK, DV, PieceK, PieceV, Stats, Pairs, Offsets, Items, scale, n_piece,
                       B, Cq, Ck, Hkv, SLOTS: gl.constexpr, BLOCKS: gl.constexpr, GROUP: gl.constexpr,
                       D: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr, SEGMENT: gl.constexpr):
    pid = gl.program_id(0)                      # find the item as in fast/gca.py, up to `stop = min(..)`
    n_early = n_piece + Ck // 8
    is_early = pid < n_early * Hkv * B
    n_item = gl.where(is_early, n_early, n_piece + Ck - n_early)
    pid -= gl.where(is_early, 0, n_early * Hkv * B)
    item = pid % n_item + gl.where(is_early, 0, n_early)
    h = pid // n_item % Hkv
    b = pid // (n_item * Hkv)
    Pairs += b * Cq * SLOTS
    chunk = gl.load(Items + b * (n_piece + Ck) + item)
    if chunk < Ck:
        first = gl.load(Offsets + b * (Ck + 1) + chunk)
        stop = gl.load(Offsets + b * (Ck + 1) + chunk + 1)
        start = first
        if item < n_piece:
            start += (item + 1 - first // SEGMENT) * SEGMENT
        stop = min(start + SEGMENT, stop)
        TILES: gl.constexpr = BLOCKS * GROUP                            # of a pair: blocks of rows, heads
        W += b * Cq * SLOTS
        n_stat = Hkv * GROUP * BLOCKS * ROWS
        j = gl.arange(0, 2 * ROWS, gl.BlockedLayout([1], [32], [4], [0]))     # ROWS log-sum-exps, ROWS deltas
        both = Stats + (b * Cq * SLOTS).to(gl.int64) * 2 * n_stat + j // ROWS * n_stat + j % ROWS

        k, v, k_ready = buffers(K, 1), buffers(V, 1), barriers(1)
        q, do, ready = buffers(Q, 2), buffers(DO, 2), barriers(2)
        stats = gl.allocate_shared_memory(gl.float32, [2, 2 * ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        fetch(K, k, V, v, k_ready, 0, b * Ck + chunk, 0, h, True)
        pair = gl.load(Pairs + start, mask=start < stop, other=0)
        w = gl.load(W + pair)
        fetch(Q, q, DO, do, ready, 0, b * Cq + pair // SLOTS, 0, h * GROUP, start < stop)
        fetch_stats(both, stats, 0, pair, n_stat, h * GROUP * BLOCKS * ROWS)
        pair = gl.load(Pairs + start + 1 // TILES, mask=start + 1 // TILES < stop, other=0)   # of turn 1
        unread = gl.zeros((KEYS, ROWS), gl.float32, layout(ROWS))       # use_acc=False does not read it
        dk = accumulator(gl.zeros((KEYS, D), gl.float32, layout(D)))
        dv = accumulator(gl.zeros((KEYS, D), gl.float32, layout(D)))
        k_tile, v_tile = fetched(K, k, V, v, k_ready, 0)
        for turn in range((stop - start) * TILES):
            q_tile, do_tile = fetched(Q, q, DO, do, ready, turn)
            scores = product(k_tile, q_tile.permute((1, 0)), unread, use_acc=False, is_async=True)
            async_copy.wait_group(0)                                    # for stats
            scores, dv, dk = finish(0, [scores, dv, dk])
            dp = product(v_tile, do_tile.permute((1, 0)), unread, use_acc=False, is_async=True)
            thread_barrier()
            w_now = w
            w = gl.load(W + pair)
            tile = (turn + 1) % TILES
            block = tile // GROUP
            head = h * GROUP + tile % GROUP
            more = turn + 1 < (stop - start) * TILES
            fetch(Q, q, DO, do, ready, (turn + 1) % 2, b * Cq + pair // SLOTS, block * ROWS, head, more)
            fetch_stats(both, stats, (turn + 1) % 2, pair, n_stat, (head * BLOCKS + block) * ROWS)
            later = start + (turn + 2) // TILES
            pair = gl.load(Pairs + later, mask=later < stop, other=0)
            now = stats.index(turn % 2)
            lse = now.slice(0, ROWS).load(gl.SliceLayout(0, layout(ROWS)))
            p = gl.exp2(scores * (scale * LOG2E) - lse[None, :]) * w_now                 # (KEYS, ROWS)
            dp = finish(0, [dp])
            delta = now.slice(ROWS, ROWS).load(gl.SliceLayout(0, layout(ROWS)))
            ds = p * (dp - delta[None, :])
            dv = product(left_operand(p, Q.dtype, D), do_tile, accumulator(dv), is_async=True)
            dk = product(left_operand(ds, Q.dtype, D), q_tile, accumulator(dk), is_async=True)
        dv, dk = finish(0, [dv, dk])
        async_copy.wait_group(0)
        thread_barrier()
        if item < n_piece:
            piece = gl.allocate_shared_memory(gl.float32, PieceK.block_shape, PieceK.layout)
            store(PieceK, piece, b * n_piece + item, 0, h, dk * scale)
            store(PieceV, piece, b * n_piece + item, 0, h, dv)
        else:
            store(DK, k.index(0), b * Ck + chunk, 0, h, dk * scale)
            store(DV, v.index(0), b * Ck + chunk, 0, h, dv)


@gluon.jit
def fetch_stats(Stats, stats, i, pair, n_stat, row):
    """Start to copy log-sum-exp and delta of a pair's rows to buffer i."""
    copy_rows(stats.index(i), Stats + pair.to(gl.int64) * 2 * n_stat + row)
    async_copy.commit_group()


# ---------------------------------------------------------------- the host's side

def backward_fits(q, options):
    """Whether it takes this: 33 to 64 keys a chunk, 33 rows or more, heads of at most 128, 16-bit numbers."""
    return (is_hopper() and q.element_size() == 2
            and options["ROWS"] == options["KEYS"] == 64 and options["D"] <= 128)


def forward_fits(q, options):
    """Whether it takes this: as backward, and heads of 128, of which an even number reads each key head."""
    return backward_fits(q, options) and options["D"] == 128 and options["GROUP"] % 2 == 0


@functools.cache
def is_hopper():
    return torch.cuda.get_device_capability()[0] == 9


@functools.cache
def shared_layout(D, element_size):
    dtype = gl.float32 if element_size == 4 else gl.bfloat16
    return gl.NVMMASharedLayout.get_default_for([1, 64, D], dtype)


def descriptor(x, rows):
    """fast/launch.py's, which here names the layout in shared memory."""
    return plain_descriptor(x, rows, shared_layout(x.shape[4], x.element_size()))


def forward(kind, q, k, v, w, indices, out, scale, B, Cq, Ck, n_slot, options):
    """Fill out; q, k, v and out are descriptors."""
    (_, Sq, width), Sk = q.shape, k.shape[1]
    tiles = {name: options[name] for name in ("GROUP", "D", "ROWS", "KEYS", "ONE")}
    Hq, n_block = width // options["D"], -(-Sq // options["ROWS"])
    launch(forward_kernel, kind, (B * Cq * n_block * (Hq // 2),),
           q, k, v, w, indices, out, scale, n_slot, Cq, Ck, Sq, Sk, Hq, **tiles, num_warps=4)


def backward(kind, q, k, v, do, w, numbers, dq, sums, lists, scale, SEGMENT, B, Cq, Ck, n_slot, options):
    """Fill dq and sums (dk, dv and the tiles of pieces), all descriptors; returns dweights (B, Cq, K)."""
    (_, Sq, width), Sk = q.shape, k.shape[1]
    tiles = {name: options[name] for name in ("GROUP", "D", "ROWS", "KEYS")}
    Hq, n_block = width // options["D"], -(-Sq // options["ROWS"])
    Hkv, n_piece = Hq // options["GROUP"], lists[-1].shape[1] - Ck
    n_stat = Hq * n_block * options["ROWS"]
    stats = torch.empty(B, Cq, n_slot, 2, n_stat, dtype=torch.float32, device=w.device)
    launch(backward_q_kernel, kind, (B * Cq * n_block * Hq,),
           q, k, v, do, w, numbers, dq, stats, scale, n_slot, Cq, Sq, Sk, Hq, **tiles, ONE=options["ONE"],
           num_warps=4)
    launch(backward_kv_kernel, kind, (B * (n_piece + Ck) * Hkv,),
           q, k, v, do, w, *sums, stats, *lists, scale, n_piece, B, Cq, Ck, Hkv, SLOTS=n_slot, BLOCKS=n_block,
           SEGMENT=SEGMENT, **tiles, num_warps=4)
    return stats[:, :, :, 1].sum(-1)
