"""Grouped Cross Attention (GCA): the paper's equations in PyTorch, and FlashGCA, Triton kernels for them.

A query chunk attends to the K chunks that were retrieved for it, in two stages (Sec. 3). For a query row x:

    o_c = softmax_j(q(x) . K_c[j] * scale) V_c          stage 1: attention inside each retrieved chunk c
    out = sum_c w_c * o_c                               stage 2: the chunks, by their retrieval weights

By default, this softmax has one more score, of 0: exp(s_j) / (1 + sum_j exp(s_j)), "softmax-off-by-one".

Read in this order:

    gca_reference       these two lines in PyTorch: slow, and the definition of what is right
    forward_kernel      Algorithm 1 of the paper (Appendix B)
    backward_*_kernel   Algorithm 2: first dQ and dw, then dK and dV
    gca                 the function that the model calls

`python gca.py` compares kernels and reference. On a GPU, train.py uses fast/gca.py's kernels, which have the
same results, or with --fast false these.

Shapes: B batch, Cq query chunks of Sq rows, Ck chunks of Sk keys, K retrieved chunks ("slots") a query chunk,
Hq query heads, Hkv key/value heads (head h reads head h // (Hq / Hkv)), D width of a head. Kernels count the
chunks of all sequences in one row (chunk_numbers). Their Q, K and V are tensors, so K is called n_slot there.
"""
from __future__ import annotations

import os
import warnings
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch.autograd.forward_ad import unpack_dual

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"                    # lets `python gca.py` run on any machine
try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:                 # no Triton (macOS, Windows): everything runs on the reference
    triton = None
jit = triton.jit if triton else lambda kernel: kernel
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"       # Triton's interpreter: the kernels on the CPU


# ---------------------------------------------------------------- the definition

def gca_reference(q, k, v, weights, indices, softmax_one=True, scale=None):
    """GCA as the paper writes it; arguments and result as for gca().

    In the einsums: b sequence, c query chunk, n slot, q query row, k key, h head, d width.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = torch.promote_types(q.dtype, weights.dtype)
    k_c = copy_retrieved(k.to(dtype), indices, q.shape[3])              # (B, Cq, K, Sk, Hq, D)
    v_c = copy_retrieved(v.to(dtype), indices, q.shape[3])
    scores = torch.einsum("bcqhd,bcnkhd->bcnhqk", q.to(dtype) * scale, k_c)
    if softmax_one:                                                     # one more score, of 0: adds 1 below
        p = F.pad(scores, (0, 1)).softmax(-1)[..., :-1]
    else:
        p = scores.softmax(-1)
    o = torch.einsum("bcnhqk,bcnkhd->bcnqhd", p, v_c)                   # stage 1
    w = torch.where(indices < 0, 0, weights).to(dtype)
    return torch.einsum("bcn,bcnqhd->bcqhd", w, o).to(q.dtype)          # stage 2


def copy_retrieved(x, indices, n_head):
    """x (B, Ck, Sk, Hkv, D) -> (B, Cq, K, Sk, n_head, D): a copy of each chunk wherever it was retrieved."""
    B, Ck, Sk, Hkv, D = x.shape
    if Ck == 0:
        return x.new_zeros(*indices.shape, Sk, n_head, D)
    wrong = (indices < -1) | (indices >= Ck)
    numbers = chunk_numbers(indices, Ck).clamp(min=0).masked_fill(wrong, B * Ck)        # torch: out of range
    x = x.flatten(0, 1).index_select(0, numbers.flatten()).unflatten(0, indices.shape)
    x = torch.where(indices[..., None, None, None] < 0, 0, x)           # an empty slot is a chunk of zeros
    return x.repeat_interleave(n_head // Hkv, dim=4) if n_head > Hkv else x


def chunk_numbers(indices, Ck):
    """The sequences of a batch lie one after the other, so chunk c of sequence b is number b * Ck + c."""
    first = torch.arange(len(indices), device=indices.device)[:, None, None] * Ck
    return torch.where(indices < 0, -1, indices + first).contiguous()   # an empty slot stays -1


# ---------------------------------------------------------------- the kernels
#
# A chunk has at most 128 keys, so its keys are one tile and its softmax needs no running maximum, unlike
# FlashAttention's. The backward kernels compute the softmax again instead of storing it.
#
# Tiles are read through tensor descriptors. What lies outside the tensor reads as zeros and is never written.
# So an empty slot (chunk -1) is a chunk of zeros with weight 0, and short chunks are filled up with zeros.

@jit
def load_tile(X, c, row, h, ROWS: tl.constexpr, D: tl.constexpr):
    """Rows row .. row + ROWS - 1 of chunk c in head h: (ROWS, D). X is (chunks, rows, heads * D)."""
    return X.load([c, row, h * D]).reshape(ROWS, D)


@jit
def chunk_softmax(scores, scale, n_key, KEYS: tl.constexpr, ONE: tl.constexpr):
    """Softmax over one chunk's keys: numerators p and denominator. exp(x) = exp2(x * log2(e)).

    Keys beyond n_key, which fill the tile up, have scores of 0. With softmax-off-by-one they are subtracted
    from the sum, because to mask them takes the forward kernel a sixth longer.
    """
    scale *= 1.4426950408889634
    if not ONE:
        scores = tl.where(tl.arange(0, KEYS)[None, :] < n_key, scores, float("-inf"))
    peak = tl.max(scores, 1) * scale
    if ONE:                                                 # one more score, of 0
        peak = tl.maximum(peak, 0.0)
    p = tl.exp2(scores * scale - peak[:, None])
    total = tl.sum(p, 1)
    if ONE:                                                 # each filler added exp2(-peak), and one is meant
        total += (1 - (KEYS - n_key)) * tl.exp2(-peak)
    return p, total


@jit
def forward_kernel(Q, K, V, W, Index, Out, scale, n_slot, Sk, GROUP: tl.constexpr, D: tl.constexpr,
                   ROWS: tl.constexpr, KEYS: tl.constexpr, ONE: tl.constexpr, DOT: tl.constexpr):
    """Algorithm 1. One program: one block of query rows in one head. It walks over the K retrieved chunks."""
    c = tl.program_id(0)                        # query chunk
    row = tl.program_id(1) * ROWS
    h = tl.program_id(2)                        # slowest: programs that run together share the keys of a head
    slots = c.to(tl.int64) * n_slot

    q = load_tile(Q, c, row, h, ROWS, D)
    out = tl.zeros((ROWS, D), tl.float32)
    for slot in range(n_slot):
        chunk = tl.load(Index + slots + slot).to(tl.int32)
        w = tl.where(chunk < 0, 0.0, tl.load(W + slots + slot))
        k = load_tile(K, chunk, 0, h // GROUP, KEYS, D)
        v = load_tile(V, chunk, 0, h // GROUP, KEYS, D)
        scores = tl.dot(q, k.T, input_precision=DOT)                            # (ROWS, KEYS)
        p, total = chunk_softmax(scores, scale, Sk, KEYS, ONE)
        o = tl.dot(p.to(v.dtype), v, input_precision=DOT)                       # o_c * total
        out += o * (w / total)[:, None]                                         # w_c * o_c
    Out.store([c, row, h * D], out.to(Out.dtype).reshape(1, ROWS, D))


@jit
def backward_tile(q, k, v, do, w, scale, n_key, KEYS: tl.constexpr, ONE: tl.constexpr, DOT: tl.constexpr):
    """Algorithm 2 for one block of rows and one chunk c: w_c P_c, dS_c (ROWS, KEYS) and delta_c (ROWS,).

    dS_c is the gradient of the scaled scores. dQ and dK get the scale when they are stored.
    """
    p, total = chunk_softmax(tl.dot(q, k.T, input_precision=DOT), scale, n_key, KEYS, ONE)
    dp = tl.dot(do, v.T, input_precision=DOT)
    delta = tl.sum(p * dp, 1) / total                               # sum_j P_cj (dO . v_j) = rowsum(dO * o_c)
    wp = p * (w / total)[:, None]
    return wp, wp * (dp - delta[:, None]), delta


@jit
def backward_q_kernel(Q, K, V, DO, W, Index, DQ, DW, scale, n_slot, Sk, GROUP: tl.constexpr, D: tl.constexpr,
                      ROWS: tl.constexpr, KEYS: tl.constexpr, ONE: tl.constexpr, DOT: tl.constexpr):
    """Algorithm 2, dQ and dw: the forward kernel's loop again.

    DW (query chunk, slot, n_block, Hq) is a number from each program, to be summed over its blocks and heads.
    """
    c = tl.program_id(0)
    block = tl.program_id(1)
    h = tl.program_id(2)
    n_block = tl.num_programs(1)
    n_head = tl.num_programs(2)
    slots = c.to(tl.int64) * n_slot

    q = load_tile(Q, c, block * ROWS, h, ROWS, D)
    do = load_tile(DO, c, block * ROWS, h, ROWS, D)
    dq = tl.zeros((ROWS, D), tl.float32)
    for slot in range(n_slot):
        chunk = tl.load(Index + slots + slot).to(tl.int32)
        w = tl.where(chunk < 0, 0.0, tl.load(W + slots + slot))
        k = load_tile(K, chunk, 0, h // GROUP, KEYS, D)
        v = load_tile(V, chunk, 0, h // GROUP, KEYS, D)
        _, ds, delta = backward_tile(q, k, v, do, w, scale, Sk, KEYS, ONE, DOT)
        dq += tl.dot(ds.to(k.dtype), k, input_precision=DOT)
        tl.store(DW + ((slots + slot) * n_block + block) * n_head + h, tl.sum(delta, 0))
    DQ.store([c, block * ROWS, h * D], (dq * scale).to(DQ.dtype).reshape(1, ROWS, D))


@jit
def backward_kv_kernel(Q, K, V, DO, W, Pairs, Offsets, DK, DV, scale, Sq, Sk, SLOTS: tl.constexpr,
                       GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
                       ONE: tl.constexpr, DOT: tl.constexpr):
    """Algorithm 2, dK and dV. One program: one chunk in one key/value head, and all who retrieved it."""
    chunk = tl.program_id(0)
    h = tl.program_id(1)
    start = tl.load(Offsets + chunk)
    stop = tl.load(Offsets + chunk + 1)

    k = load_tile(K, chunk, 0, h, KEYS, D)
    v = load_tile(V, chunk, 0, h, KEYS, D)
    dk = tl.zeros((KEYS, D), tl.float32)
    dv = tl.zeros((KEYS, D), tl.float32)
    for head in range(h * GROUP, (h + 1) * GROUP):
        for row in range(0, Sq, ROWS):
            for i in range(start, stop):
                pair = tl.load(Pairs + i)                                       # query chunk * SLOTS + slot
                w = tl.load(W + pair)
                q = load_tile(Q, (pair // SLOTS).to(tl.int32), row, head, ROWS, D)
                do = load_tile(DO, (pair // SLOTS).to(tl.int32), row, head, ROWS, D)
                wp, ds, _ = backward_tile(q, k, v, do, w, scale, Sk, KEYS, ONE, DOT)
                wp_t = wp.to(do.dtype).T                                        # (KEYS, ROWS)
                ds_t = ds.to(q.dtype).T
                dv += tl.dot(wp_t, do, input_precision=DOT)
                dk += tl.dot(ds_t, q, input_precision=DOT)
    DK.store([chunk, 0, h * D], (dk * scale).to(DK.dtype).reshape(1, KEYS, D))
    DV.store([chunk, 0, h * D], dv.to(DV.dtype).reshape(1, KEYS, D))


# ---------------------------------------------------------------- launching them, as a PyTorch op

KERNEL_LIMITS = ("float32, bfloat16 or float16, with D 16, 32, .. 256, at most 128 keys a chunk, 64 KiB a "
                 "head, and less where a GPU has little shared memory")


def tile_keys(k):
    return max(16, triton.next_power_of_2(k.shape[2]))      # all of a chunk's


def tile_rows(q, k):
    """Query rows of a tile, 16 to 64; 0: the kernels do not take these tensors, or do not fit this GPU.

    The largest kernel, dK/dV, decides. Its shared memory was read off compiled ones (tests/compiled.py).
    """
    n_row, n_key, D, size = q.shape[2], k.shape[2], q.shape[4], q.element_size()
    is_taken = q.dtype in (torch.float32, torch.bfloat16, torch.float16) and D in (16, 32, 64, 128, 256)
    if triton is None or not is_taken or n_key > 128 or tile_keys(k) * D * size > 65536:
        return 0
    keys, (major, memory) = tile_keys(k), gpu(q.device)
    rows = 16 if keys * D * size == 65536 else 32 if size == 4 else 64
    rows = min(rows, max(16, triton.next_power_of_2(n_row)))

    def needed(rows):                                       # bytes, as the compiled kernels have them
        if major >= 9:                                      # TMA: a float32 tile, of fast/gca.py's sums
            return 4 * keys * D
        if major < 8:
            return 8 * (keys * D + rows * D + rows * keys)
        if size == 4:
            return 16 * (keys + rows) * D + 8 * rows * max(keys, D)
        return 4 * keys * D + 2 * rows * max(keys, D)

    while rows >= 16 and needed(rows) > memory:
        rows //= 2
    return rows if rows >= 16 else 0


@torch.compiler.assume_constant_result
def gpu(device):                    # its compute capability, and the shared memory that a program may have
    if device.type != "cuda":
        return 9, 2 ** 20           # the interpreter
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.shared_memory_per_block_optin


def launch_options(q, k, softmax_one):
    """The kernels' compile-time arguments."""
    D, rows, keys, exact = q.shape[4], tile_rows(q, k), tile_keys(k), q.dtype == torch.float32
    large = exact or keys * D * q.element_size() > 16384
    # For small tiles, one warp takes half the time of four on an H200. Older GPUs would run out of registers.
    small = not exact and max(rows, keys) <= 32 and D <= 64 and gpu(q.device)[0] >= 9
    dot = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"         # x3: as exact as float32
    return dict(GROUP=q.shape[3] // k.shape[3], D=D, ROWS=rows, KEYS=keys, ONE=softmax_one, DOT=dot,
                num_warps=8 if large else 1 if small else 4, num_stages=1 if large else 2)


def descriptor(x, rows):
    """For tiles of `rows` rows of one chunk in one head of x (B, C, S, H, D); copies x if it has gaps."""
    B, C, S, H, D = x.shape
    x = x.contiguous() if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
    return TensorDescriptor(x, [B * C, S, H * D], [S * H * D, H * D, 1], [1, rows, D])


def retrieved_by(numbers, n_chunk):
    """Who retrieved each chunk: pairs[offsets[c]:offsets[c + 1]] are query chunk * K + slot, which hold c."""
    chunks, pairs = numbers.flatten().sort(stable=True)                 # empty slots, -1, come first
    return pairs, torch.searchsorted(chunks, torch.arange(n_chunk + 1, device=chunks.device))


@torch.library.custom_op("gca::forward", mutates_args=())
def flash_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weights: torch.Tensor,
                  indices: torch.Tensor, softmax_one: bool, scale: float) -> torch.Tensor:
    (B, Cq, Sq, Hq, _), (_, Ck, Sk, _, _), n_slot = q.shape, k.shape, weights.shape[2]
    options = launch_options(q, k, softmax_one)
    rows, keys = options["ROWS"], options["KEYS"]
    w, out = weights.float().contiguous(), q.new_empty(q.shape)
    forward_kernel[(B * Cq, triton.cdiv(Sq, rows), Hq)](
        descriptor(q, rows), descriptor(k, keys), descriptor(v, keys), w, chunk_numbers(indices, Ck),
        descriptor(out, rows), scale, n_slot, Sk, **options)
    return out


@torch.library.custom_op("gca::backward", mutates_args=())
def flash_backward(do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weights: torch.Tensor,
                   indices: torch.Tensor, softmax_one: bool, scale: float) -> list[torch.Tensor]:
    """dq, dk, dv and dweights. There are no atomic sums, so the bits are the same in every run."""
    (B, Cq, Sq, Hq, _), (_, Ck, Sk, Hkv, _), n_slot = q.shape, k.shape, weights.shape[2]
    options = launch_options(q, k, softmax_one)
    rows, keys, n_block = options["ROWS"], options["KEYS"], triton.cdiv(Sq, options["ROWS"])
    w, numbers = weights.float().contiguous(), chunk_numbers(indices, Ck)
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    dw_shares = w.new_empty(B, Cq, n_slot, n_block, Hq)                 # one number from each program
    inputs = descriptor(q, rows), descriptor(k, keys), descriptor(v, keys), descriptor(do, rows), w
    backward_q_kernel[(B * Cq, n_block, Hq)](
        *inputs, numbers, descriptor(dq, rows), dw_shares, scale, n_slot, Sk, **options)
    backward_kv_kernel[(B * Ck, Hkv)](
        *inputs, *retrieved_by(numbers, B * Ck), descriptor(dk, keys), descriptor(dv, keys), scale, Sq, Sk,
        SLOTS=n_slot, **options)
    return [dq, dk, dv, dw_shares.sum((3, 4)).to(weights.dtype)]


def save_inputs(ctx, inputs, output):
    *tensors, ctx.softmax_one, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def gradients(ctx, do):
    return *flash_backward(do, *ctx.saved_tensors, ctx.softmax_one, ctx.scale), None, None, None


def second_derivative(ctx, *grads):
    raise RuntimeError("the kernels are differentiable once; second derivatives need backend='reference'")


def fake_forward(q, *_):            # shapes alone: what torch.compile needs to know
    return q.new_empty(q.shape)


def fake_backward(do, q, k, v, weights, *_):
    return [x.new_empty(x.shape) for x in (q, k, v, weights)]


flash_forward.register_fake(fake_forward)
flash_backward.register_fake(fake_backward)
flash_forward.register_autograd(gradients, setup_context=save_inputs)
flash_backward.register_autograd(second_derivative)


# ---------------------------------------------------------------- the function to call

BACKENDS = {"reference": gca_reference, "triton": flash_forward}        # fast/gca.py adds "fast"
AXES = {"q": "B Cq Sq Hq D", "k": "B Ck Sk Hkv D", "v": "B Ck Sk Hkv D",
        "weights": "B Cq K", "indices": "B Cq K"}
DTYPES = {"weights": [torch.float32, torch.float64], "indices": [torch.int64, torch.int32]}


def gca(q, k, v, weights, indices, softmax_one=True, scale=None, backend="auto"):
    """Grouped Cross Attention: out = sum_c w_c softmax(q K_c^T * scale) V_c over the chunks c in indices.

    q        (B, Cq, Sq, Hq, D)    query chunks
    k, v     (B, Ck, Sk, Hkv, D)   every chunk's keys and values, once; Hkv divides Hq
    weights  (B, Cq, K) float32    retrieval weights
    indices  (B, Cq, K) int        retrieved chunks, repeats allowed; -1 is an empty slot, which adds nothing
    softmax_one                    softmax-off-by-one: 1 + sum in the denominator, so a row may take nothing
    scale                          of the scores, positive; default D ** -0.5
    backend                        "reference", "triton", "fast" (once fast is imported), or "auto": Triton on
                                   a GPU for what it takes, otherwise the reference
    returns  (B, Cq, Sq, Hq, D)    in q's dtype, differentiable in q, k, v and weights

    Under autocast, q, k and v are cast to its dtype. Raises ValueError, which
    names the argument, for what does not fit, and RuntimeError where the backend cannot run. On a GPU indices
    are checked only if GCA_CHECK_INDICES=1 is set, because the check has to wait for the GPU.
    """
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    check_arguments(dict(q=q, k=k, v=v, weights=weights, indices=indices), scale, backend)
    backend = choose_backend(backend, q, k, v, weights)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if INTERPRET and q.dtype == torch.bfloat16:                 # the interpreter cannot multiply bfloat16
        inputs = q.float(), k.float(), v.float()
        return BACKENDS[backend](*inputs, weights, indices, softmax_one, scale).to(q.dtype)
    return BACKENDS[backend](q, k, v, weights, indices, softmax_one, scale)


def choose_backend(backend, q, k, v, weights):
    """The name of a backend that can run; RuntimeError or ValueError if the one that was asked for cannot."""
    fits, got = tile_rows(q, k) > 0, f"got {q.dtype}, D {q.shape[4]}, {k.shape[2]} keys"
    if backend == "auto":
        if q.is_cuda and not fits:
            warn_once(f"gca runs on the slow reference: its kernels take {KERNEL_LIMITS}; {got}")
        backend = "triton" if q.is_cuda and fits else "reference"
    if backend == "reference" or not (q.numel() and k.numel()):
        return "reference"
    if triton is None or not (q.is_cuda or INTERPRET):
        raise RuntimeError(f"backend {backend!r} needs Triton (Linux: pip install triton) and a GPU, or "
                           f"TRITON_INTERPRET=1; q is on {q.device}")
    require(fits, f"q, k and v for backend {backend!r} must be {KERNEL_LIMITS}; {got}")
    is_eager = not torch.compiler.is_compiling()
    if is_eager and any(unpack_dual(x).tangent is not None for x in (q, k, v, weights)):
        raise RuntimeError("the kernels have no forward-mode derivatives: use backend='reference'")
    return backend


class Mistake(ValueError):
    """What a caller or user did wrong; the message says it to them."""


def require(condition, message, *values):    # values: for the message's {}, put together only if it is needed
    if not condition:
        raise Mistake(message.format(*values) if values else message)


@lru_cache
def warn_once(message):
    warnings.warn(message, stacklevel=3)


def check_arguments(tensors, scale, backend):
    require(backend in ("auto", *BACKENDS), f"backend must be auto or one of {[*BACKENDS]}, got {backend!r}")
    require(scale is None or 0 < scale < float("inf"), f"scale must be positive, got {scale}")
    q, indices, sizes = tensors["q"], tensors["indices"], {}
    for name, x in tensors.items():
        axes, shape, wanted = AXES[name].split(), [*x.shape], DTYPES.get(name, [q.dtype])
        require(x.dim() == len(axes), "{} must be ({}), got shape {}", name, AXES[name], shape)
        for axis, size in zip(axes, shape, strict=True):
            n = sizes.setdefault(axis, size)
            require(n == size, "{} must have {} {}, as the others, got shape {}", name, axis, n, shape)
            require(size or axis not in ("Sk", "K", "D"), "{} must have {} of at least 1, got 0", name, axis)
        require(x.dtype in wanted, "{} must have a dtype of {}, got {}", name, wanted, x.dtype)
        require(x.device == q.device, "{} must be on q's device {}, got {}", name, q.device, x.device)
    Hq, Hkv, Ck = sizes["Hq"], sizes["Hkv"], sizes["Ck"]
    require(Hkv and Hq % Hkv == 0, f"k must have a number of heads that divides q's {Hq}, got {Hkv}")
    on_cpu = not q.is_cuda and not torch.compiler.is_compiling()
    if (on_cpu or os.environ.get("GCA_CHECK_INDICES") == "1") and indices.numel():
        for i in indices.aminmax():
            require(-1 <= i < Ck, f"indices must be in [0, {Ck}), or -1 for an empty slot, got {i}")


if __name__ == "__main__":          # the kernels against the reference in float64, on this machine
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    (q, do), (k, v) = torch.randn(2, 2, 3, 33, 4, 32), torch.randn(2, 2, 5, 63, 2, 32)
    weights, indices = torch.rand(2, 3, 4), torch.randint(-1, 5, (2, 3, 4))
    results = []
    for backend, dtype in ("triton", torch.float32), ("reference", torch.float64):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v, weights)]
        out = gca(*inputs, indices, backend=backend)
        results.append([out, *torch.autograd.grad(out, inputs, do.to(dtype))])
    for name, x, wanted in zip(("out", "dq", "dk", "dv", "dweights"), *results, strict=True):
        print(f"{name:9} kernels against reference: relative error {(x - wanted).norm() / wanted.norm():.1e}")
