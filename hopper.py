"""FlashGCA for Hopper GPUs (H100, H200): gca.py's three large kernels, one level lower.

Triton decides by itself when a kernel waits for a product or a tile. Gluon, the language beneath it in the
same package, leaves that to the program. These kernels compute what gca.py's compute; what happens, and why,
is said there. What is different here:

    waits        products run beside arithmetic (dO V^T while the softmax is computed, the last slot's dS K
                 while this slot's scores are), and tiles are fetched a turn ahead
    statistics   dQ's kernel leaves log-sum-exp and delta of every row and slot to that of dK and dV, which
                 then needs no sums over keys. So it can compute scores transposed: P^T and dS^T come out in
                 registers, where P^T dO and dS^T Q take them, instead of by way of shared memory

gca.py calls `forward` and `backward` where `fits` says so, and its own kernels everywhere else.
"""
import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, tma
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma as product
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_init as accumulator
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait as finish
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

if hasattr(gl, "thread_barrier"):           # the names of Triton 3.6, and those of 3.9
    thread_barrier, copy_rows = gl.thread_barrier, async_copy.async_copy_global_to_shared
    copy_in, copy_out = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global
else:
    thread_barrier, copy_rows = gl.barrier, async_copy.async_load
    copy_in, copy_out = tma.async_load, tma.async_store
LOG2E = gl.constexpr(1.4426950408889634)


# ---------------------------------------------------------------- what the kernels share
#
# A tile is copied to shared memory (by TMA) while the program goes on; a barrier there counts its bytes, and
# whoever needs the tile waits for the barrier. Turn t uses buffers t % 2, and meanwhile those of turn t + 1
# are filled, once every warp has seen the last turn's products finished: hence one thread_barrier() a turn.
#
# A product is issued in one place and finished in another: finish(n, ..) waits for all but the last n. Its
# left operand may come from registers. What is in flight holds registers, though, which decide how many
# programs share a processor: the waits below keep dQ's kernel within 128 a thread, dK's and dV's within 168.
#
# What was tried: microseconds a kernel, paper's shape in bf16, on an H200. gca.py's take 280, 397 and 548.
#     forward  255 | the last P V in flight beside these scores, 106 registers for 95: 266
#              queries from registers: no gain
#     dQ       378, of which the statistics take 22 | scores and dO V^T in flight together: 5% more
#     dK, dV   410 | the last turn's products in flight beside this turn's, 224 registers: 495; capped at 168,
#              the assembler gives up and waits for each product: 445 | as in gca.py, nothing stored: 515
#     all heads at once, not in two halves: 50 less for both, and twice the memory

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
def fetch(X, x, Y, y, ready, i, b, c, row, h, wanted):
    """Start to copy the tiles of X and Y at (b, c, row, h) to buffers i."""
    D: gl.constexpr = X.block_shape[3]
    mbarrier.expect(ready.index(i), 2 * X.block_type.nbytes, pred=wanted)
    copy_in(X, [b, c, row, h * D], ready.index(i), x.index(i), pred=wanted)
    copy_in(Y, [b, c, row, h * D], ready.index(i), y.index(i), pred=wanted)


@gluon.jit
def fetched(X, x, Y, y, ready, turn):
    """The two tiles (rows, D) of a turn, once they are there. A barrier is passed in even and odd rounds."""
    i = turn % 2
    mbarrier.wait(ready.index(i), turn // 2 % 2)
    return x.index(i).reshape(X.block_shape[2:]), y.index(i).reshape(Y.block_shape[2:])


@gluon.jit
def store(X, x, b, c, row, h, value):
    """Write a tile of X, by way of the shared memory x."""
    x.reshape(X.block_shape[2:]).store(value.to(X.dtype))
    fence_async_shared()
    copy_out(X, [b, c, row, h * X.block_shape[3]], x)
    tma.store_wait(0)
    thread_barrier()


@gluon.jit
def left_operand(x, dtype: gl.constexpr, D: gl.constexpr):
    """For a product of 64 rows and D columns."""
    return gl.convert_layout(x.to(dtype), gl.DotOperandLayout(0, layout(D), 2))


@gluon.jit
def index_and_weight(Index, W, slot, n_slot):
    exists = slot < n_slot
    index = gl.load(Index + slot, mask=exists, other=-1).to(gl.int32)
    return index, gl.where(index < 0, 0.0, gl.load(W + slot, mask=exists, other=0.0))


@gluon.jit
def chunk_softmax(scores, scale, n_key, KEYS: gl.constexpr, ONE: gl.constexpr):
    """Softmax over one chunk's keys: numerators, their sum (+ 1), what was taken off the scores (base 2)."""
    scale *= LOG2E
    if not ONE:
        key = gl.arange(0, KEYS, layout=gl.SliceLayout(0, scores.type.layout))
        scores = gl.where(key[None, :] < n_key, scores, float("-inf"))
    top = gl.max(scores, 1) * scale
    if ONE:
        top = gl.maximum(top, 0.0)
    p = gl.exp2(scores * scale - top[:, None])
    total = gl.sum(p, 1)
    if ONE:
        total += (1 - KEYS + n_key) * gl.exp2(-top)
    return p, total, top


@gluon.jit
def log2(x):
    """Of normal numbers; gl.log2's care for the others makes dQ's kernel 5% slower."""
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, True, 1)


# ---------------------------------------------------------------- the kernels

@gluon.jit
def forward_kernel(Q, K, V, W, Index, Out, scale, n_slot, Cq, Sq, Sk, Hq, GROUP: gl.constexpr,
                   D: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr, ONE: gl.constexpr):
    pid, n_block = gl.program_id(0), gl.cdiv(Sq, ROWS)
    c, block, h, b = pid % Cq, pid // Cq % n_block, pid // (Cq * n_block) % Hq, pid // (Cq * n_block * Hq)
    Index += (b * Cq + c).to(gl.int64) * n_slot
    W += (b * Cq + c).to(gl.int64) * n_slot

    q, q_ready = buffers(Q, 1), barriers(1)
    k, v, ready = buffers(K, 2), buffers(V, 2), barriers(2)
    mbarrier.expect(q_ready.index(0), Q.block_type.nbytes)
    copy_in(Q, [b, c, block * ROWS, h * D], q_ready.index(0), q.index(0))
    index, w = index_and_weight(Index, W, 0, n_slot)
    fetch(K, k, V, v, ready, 0, b, index, 0, h // GROUP, True)
    index, w_next = index_and_weight(Index, W, 1, n_slot)
    none = gl.zeros((ROWS, KEYS), gl.float32, layout(KEYS))              # what scores are not added to
    out = gl.zeros((ROWS, D), gl.float32, layout(D))
    pv = accumulator(gl.zeros((ROWS, D), gl.float32, layout(D)))
    factor = gl.zeros((ROWS,), gl.float32, gl.SliceLayout(1, layout(D)))
    mbarrier.wait(q_ready.index(0), 0)
    q_tile = q.index(0).reshape([ROWS, D])
    for slot in range(n_slot):
        k_tile, v_tile = fetched(K, k, V, v, ready, slot)
        pv = finish(0, [pv])                                 # P V of the last slot
        scores = product(q_tile, k_tile.permute((1, 0)), none, use_acc=False, is_async=True)
        thread_barrier()
        fetch(K, k, V, v, ready, (slot + 1) % 2, b, index, 0, h // GROUP, slot + 1 < n_slot)
        index, w_after = index_and_weight(Index, W, slot + 2, n_slot)
        if D < KEYS:
            out += pv * factor[:, None]
        scores = finish(0, [scores])
        p, total, top = chunk_softmax(scores, scale, Sk, KEYS, ONE)
        if D < KEYS:                                                     # scale P V, the smaller tile, later
            factor = gl.convert_layout(w / total, gl.SliceLayout(1, layout(D)))
            pv = product(left_operand(p, Q.dtype, D), v_tile, accumulator(pv), use_acc=False, is_async=True)
        else:
            p *= (w / total)[:, None]
            pv = product(left_operand(p, Q.dtype, D), v_tile, accumulator(pv), is_async=True)
        w, w_next = w_next, w_after
    pv = finish(0, [pv])
    if D < KEYS:
        pv = out + pv * factor[:, None]
    thread_barrier()
    store(Out, q.index(0), b, c, block * ROWS, h, pv)


@gluon.jit
def backward_q_kernel(Q, K, V, DO, W, Index, DQ, Stats, scale, n_slot, Cq, Sq, Sk, Hq, GROUP: gl.constexpr,
                      D: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr, ONE: gl.constexpr):
    """dQ, and Stats (B, Cq, n_slot, 2, Hq, n_block, ROWS): log-sum-exp (base 2) and delta."""
    pid, n_block = gl.program_id(0), gl.cdiv(Sq, ROWS)
    c, block, h, b = pid % Cq, pid // Cq % n_block, pid // (Cq * n_block) % Hq, pid // (Cq * n_block * Hq)
    slots = (b * Cq + c).to(gl.int64) * n_slot
    Index += slots
    W += slots
    n_stat = Hq * n_block * ROWS
    Stats += slots * 2 * n_stat + (h * n_block + block) * ROWS
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, layout(KEYS)))

    q, do, q_ready = buffers(Q, 1), buffers(DO, 1), barriers(1)
    k, v, ready = buffers(K, 2), buffers(V, 2), barriers(2)
    fetch(Q, q, DO, do, q_ready, 0, b, c, block * ROWS, h, True)
    index, w = index_and_weight(Index, W, 0, n_slot)
    fetch(K, k, V, v, ready, 0, b, index, 0, h // GROUP, True)
    index, w_next = index_and_weight(Index, W, 1, n_slot)
    none = gl.zeros((ROWS, KEYS), gl.float32, layout(KEYS))              # what scores are not added to
    dq = accumulator(gl.zeros((ROWS, D), gl.float32, layout(D)))
    q_tile, do_tile = fetched(Q, q, DO, do, q_ready, 0)
    for slot in range(n_slot):
        k_tile, v_tile = fetched(K, k, V, v, ready, slot)
        scores = product(q_tile, k_tile.permute((1, 0)), none, use_acc=False, is_async=True)
        scores, dq = finish(0, [scores, dq])
        dp = product(do_tile, v_tile.permute((1, 0)), none, use_acc=False, is_async=True)
        thread_barrier()
        fetch(K, k, V, v, ready, (slot + 1) % 2, b, index, 0, h // GROUP, slot + 1 < n_slot)
        index, w_after = index_and_weight(Index, W, slot + 2, n_slot)
        p, total, top = chunk_softmax(scores, scale, Sk, KEYS, ONE)
        inverse = 1.0 / total
        dp = finish(0, [dp])
        delta = gl.sum(p * dp, 1) * inverse                              # rowsum(dO * o_c)
        gl.store(Stats + rows, top + log2(total))
        gl.store(Stats + n_stat + rows, delta)
        Stats += 2 * n_stat
        ds = p * ((dp - delta[:, None]) * (w * inverse)[:, None])
        dq = product(left_operand(ds, Q.dtype, D), k_tile, accumulator(dq), is_async=True)
        w, w_next = w_next, w_after
    dq = finish(0, [dq])
    thread_barrier()
    store(DQ, q.index(0), b, c, block * ROWS, h, dq * scale)


@gluon.jit
def backward_kv_kernel(Q, K, V, DO, W, DK, DV, PieceK, PieceV, Stats, Pairs, Offsets, Items, scale, n_piece,
                       B, Cq, Ck, Hkv, SLOTS: gl.constexpr, BLOCKS: gl.constexpr, GROUP: gl.constexpr,
                       D: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr, SEGMENT: gl.constexpr):
    pid, n_early = gl.program_id(0), n_piece + Ck // 8                  # as in gca.py, up to `stop = min(..)`
    is_early = pid < n_early * Hkv * B
    n_item = gl.where(is_early, n_early, n_piece + Ck - n_early)
    pid -= gl.where(is_early, 0, n_early * Hkv * B)
    item, h, b = pid % n_item + gl.where(is_early, 0, n_early), pid // n_item % Hkv, pid // (n_item * Hkv)
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
        fetch(K, k, V, v, k_ready, 0, b, chunk, 0, h, True)
        pair = gl.load(Pairs + start, mask=start < stop, other=0)
        w = gl.load(W + pair)
        fetch(Q, q, DO, do, ready, 0, b, pair // SLOTS, 0, h * GROUP, start < stop)
        fetch_stats(both, stats, 0, pair, n_stat, h * GROUP * BLOCKS * ROWS)
        pair = gl.load(Pairs + start + 1 // TILES, mask=start + 1 // TILES < stop, other=0)   # of turn 1
        none = gl.zeros((KEYS, ROWS), gl.float32, layout(ROWS))         # what scores are not added to
        dk = accumulator(gl.zeros((KEYS, D), gl.float32, layout(D)))
        dv = accumulator(gl.zeros((KEYS, D), gl.float32, layout(D)))
        k_tile, v_tile = fetched(K, k, V, v, k_ready, 0)
        for turn in range((stop - start) * TILES):
            q_tile, do_tile = fetched(Q, q, DO, do, ready, turn)
            scores = product(k_tile, q_tile.permute((1, 0)), none, use_acc=False, is_async=True)
            async_copy.wait_group(0)                                    # for stats
            scores, dv, dk = finish(0, [scores, dv, dk])
            dp = product(v_tile, do_tile.permute((1, 0)), none, use_acc=False, is_async=True)
            thread_barrier()
            w_now, w, tile = w, gl.load(W + pair), (turn + 1) % TILES
            block, head, more = tile // GROUP, h * GROUP + tile % GROUP, turn + 1 < (stop - start) * TILES
            fetch(Q, q, DO, do, ready, (turn + 1) % 2, b, pair // SLOTS, block * ROWS, head, more)
            fetch_stats(both, stats, (turn + 1) % 2, pair, n_stat, (head * BLOCKS + block) * ROWS)
            place = start + (turn + 2) // TILES
            pair = gl.load(Pairs + place, mask=place < stop, other=0)
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
            store(PieceK, piece, b, item, 0, h, dk * scale)
            store(PieceV, piece, b, item, 0, h, dv)
        else:
            store(DK, k.index(0), b, chunk, 0, h, dk * scale)
            store(DV, v.index(0), b, chunk, 0, h, dv)


@gluon.jit
def fetch_stats(Stats, stats, i, pair, n_stat, row):
    """Start to copy log-sum-exp and delta of a pair's rows to buffer i."""
    copy_rows(stats.index(i), Stats + pair.to(gl.int64) * 2 * n_stat + row)
    async_copy.commit_group()


# ---------------------------------------------------------------- the host's side

def fits(q, D, ROWS, KEYS, **_):
    """Whether the kernels take this: 33 to 64 rows and keys a chunk, heads of at most 64, 16-bit numbers."""
    return (torch.cuda.get_device_capability(q.device)[0] == 9 and q.element_size() == 2
            and ROWS == KEYS == 64 and D <= 64)


@functools.cache
def shared_layout(D, element_size):
    dtype = gl.float32 if element_size == 4 else gl.bfloat16
    return gl.NVMMASharedLayout.get_default_for([1, 1, 64, D], dtype)


def with_layouts(*descriptors):
    """Triton's descriptors as Gluon's, which name the layout in shared memory."""
    return [TensorDescriptor(x.base, x.shape, x.strides, x.block_shape,
                             shared_layout(x.block_shape[3], x.base.element_size())) for x in descriptors]


def forward(query, keys, values, w, indices, out, scale, D, ROWS, **tiles):
    """Launch forward_kernel; descriptors of q, k, v and out as gca.py makes them."""
    (B, Cq, Sq, width), Sk, n_slot = query.shape, keys.shape[2], w.shape[2]
    Hq, n_block = width // D, -(-Sq // ROWS)
    forward_kernel[(B * Cq * Hq * n_block,)](
        *with_layouts(query, keys, values), w, indices, *with_layouts(out), scale, n_slot, Cq, Sq, Sk, Hq,
        D=D, ROWS=ROWS, **tiles, num_warps=4)


def backward(query, keys, values, upstream, w, indices, dquery, sums, lists, scale, SEGMENT, GROUP, D, ROWS,
             KEYS, ONE):
    """Fill dquery and sums (dk, dv and the tiles of pieces), descriptors; returns dweights (B, Cq, K)."""
    (B, Cq, Sq, width), (_, Ck, Sk, _), n_slot = query.shape, keys.shape, w.shape[2]
    Hq, n_block, n_piece = width // D, -(-Sq // ROWS), lists[-1].shape[1] - Ck
    stats = torch.empty(B, Cq, n_slot, 2, Hq * n_block * ROWS, dtype=torch.float32, device=w.device)
    inputs = (*with_layouts(query, keys, values, upstream), w)
    backward_q_kernel[(B * Cq * Hq * n_block,)](
        *inputs, indices, *with_layouts(dquery), stats, scale, n_slot, Cq, Sq, Sk, Hq, GROUP=GROUP, D=D,
        ROWS=ROWS, KEYS=KEYS, ONE=ONE, num_warps=4)
    backward_kv_kernel[(B * (n_piece + Ck) * (Hq // GROUP),)](
        *inputs, *with_layouts(*sums), stats, *lists, scale, n_piece, B, Cq, Ck, Hq // GROUP, SLOTS=n_slot,
        BLOCKS=n_block, GROUP=GROUP, D=D, ROWS=ROWS, KEYS=KEYS, SEGMENT=SEGMENT, num_warps=4)
    return stats[:, :, :, 1].sum(-1)
