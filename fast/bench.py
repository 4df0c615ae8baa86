"""FlashGCA beside its baselines: `python -m fast.bench` prints time and memory of SHAPES by contenders."""
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import fast.gca  # noqa: F401 (it adds the backend "fast")
from gca import copy_retrieved, gca, gca_reference, triton
from tools import cli, exits, report


def random_inputs(device, dtype, B, Cq, Sq, Hq, Hkv, D, Ck, Sk, K, retrieval="uniform"):
    """Random arguments of gca().

    retrieval: "uniform": different chunks, all equally likely; "skewed": by Zipf's law; "worst": uniform, but
    one slot of every query chunk holds chunk 0.
    """
    q, k, v = (torch.randn(B, C, S, H, D, device=device, dtype=dtype)
               for C, S, H in ((Cq, Sq, Hq), (Ck, Sk, Hkv), (Ck, Sk, Hkv)))
    popularity = torch.arange(1, Ck + 1, device=device).double() ** -(retrieval == "skewed")
    if retrieval == "worst":
        popularity[0] = 0
    indices = torch.multinomial(popularity.expand(B * Cq, Ck), K).view(B, Cq, K)
    if retrieval == "worst":
        indices[..., 0] = 0
    return q, k, v, torch.rand(B, Cq, K, device=device), indices


PAPER = dict(B=4, Cq=256, Sq=64, Hq=12, Hkv=12, D=64, Ck=256, Sk=64, K=8)       # of one layer, in training
SHAPES = [("paper", PAPER | dict(retrieval=name)) for name in ("uniform", "skewed", "worst")] + [
    ("GQA 16/4 x 128", PAPER | dict(Hq=16, Hkv=4, D=128)),
    ("65,536 tokens", PAPER | dict(B=1, Cq=1024, Ck=1024)),
    ("K 32", PAPER | dict(K=32)),
    ("chunks of 32", dict(B=4, Cq=260, Sq=32, Hq=6, Hkv=6, D=64, Ck=260, Sk=32, K=32)),
    ("8 heads of 16", PAPER | dict(Hq=8, Hkv=8, D=16)),
    ("8 heads of 32", PAPER | dict(Hq=8, Hkv=8, D=32)),
    ("8 chunks", dict(B=1, Cq=8, Sq=64, Hq=8, Hkv=8, D=16, Ck=8, Sk=64, K=4)),
    *((f"decode {rows} x {B}", PAPER | dict(B=B, Cq=1, Sq=rows)) for B in (1, 8, 64) for rows in (1, 64))]


def copied(x, indices, n_head):
    """The retrieved chunks of each query chunk as one sequence: (B * Cq, n_head, K * Sk, D)."""
    return copy_retrieved(x, indices, n_head).flatten(2, 3).flatten(0, 1).transpose(1, 2)


def flex_attention_on_blocks(q, k, v, indices):
    """A function of q, k and v: FlexAttention of each query chunk to its chunks, one softmax over all."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention
    (B, Cq, Sq, _, _), Ck, Sk = q.shape, k.shape[1], k.shape[2]
    blocks = F.pad(indices, (0, Ck - indices.shape[2])).int()[:, None]
    count = torch.full((B, 1, Cq), indices.shape[2], dtype=torch.int32, device=q.device)
    mask = BlockMask.from_kv_blocks(count * 0, blocks, count, blocks, BLOCK_SIZE=(Sq, Sk))
    compiled = torch.compile(flex_attention, dynamic=False)
    tiles = dict(BLOCK_M=64, BLOCK_N=64, BLOCK_M1=32, BLOCK_N1=64, BLOCK_M2=64, BLOCK_N2=32)
    return lambda *qkv: compiled(*(x.flatten(1, 2).transpose(1, 2) for x in qkv), block_mask=mask,
                                 enable_gqa=True, kernel_options=tiles)


def contenders(q, k, v, weights, indices, compiled):
    """Yield name, function and leaves of every baseline and of our kernels.

    All do the same FLOPs, those of SDPA and FlexAttention with one softmax over all chunks. compiled: also
    those that torch.compile has to compile, which takes minutes.
    """
    heads, sdpa = q.shape[3], F.scaled_dot_product_attention
    copies = [copied(x, indices, heads) for x in (k, v)]
    yield "SDPA, copied before", sdpa, (q.flatten(0, 1).transpose(1, 2), *copies)
    del copies
    yield "reference", lambda *x: gca_reference(*x, indices), (q, k, v, weights)
    if compiled:
        function = torch.compile(gca_reference, dynamic=False)
        yield "compiled reference", lambda *x: function(*x, indices), (q, k, v, weights)
    yield "copy + SDPA", lambda q, k, v: sdpa(q.flatten(0, 1).transpose(1, 2), copied(k, indices, heads),
                                              copied(v, indices, heads)), (q, k, v)
    if compiled:
        yield "FlexAttention", flex_attention_on_blocks(q, k, v, indices), (q, k, v)
    yield "gca.py", lambda *x: gca(*x, indices, backend="triton"), (q, k, v, weights)
    yield "fast/gca.py", lambda *x: gca(*x, indices, backend="fast"), (q, k, v, weights)


def measure(function, leaves, backward):
    """Median milliseconds, forward and backward, and MiB beyond inputs, output and gradients at the peak.

    Both are timed as CUDA graphs, because some take no longer than Python takes to launch them. Backward is
    what forward and backward together take beyond the forward pass. eager_ms: all of it, called from Python.
    """
    def milliseconds(run):
        torch.cuda.synchronize()                # it runs on a stream of its own, which waits for nothing
        return triton.testing.do_bench_cudagraph(run, return_mode="median")

    with torch.no_grad():
        row = dict(forward_ms=milliseconds(partial(function, *leaves)))
        if not backward:
            return row | dict(eager_ms=wall_time(partial(function, *leaves)))
    upstream = torch.randn_like(function(*leaves))

    def gradients():
        inputs = [x.detach().requires_grad_() for x in leaves]  # leaves of the stream that records the graph
        out = function(*inputs)
        return out, *torch.autograd.grad(out, inputs, upstream)

    gradients()                                 # compile
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = sum(x.numel() * x.element_size() for x in gradients())
    extra = torch.cuda.max_memory_allocated() - before - kept
    backward_ms, eager_ms = milliseconds(gradients) - row["forward_ms"], wall_time(gradients)
    return row | dict(backward_ms=backward_ms, eager_ms=eager_ms, extra_mib=extra / 2 ** 20)


def wall_time(run, n=50):
    """Milliseconds of a call in a row of n, at the end of which the GPU is waited for."""
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(n):
        run()
    torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start) / n


def compare(name, shape, peak):
    """One row for each contender; ours have the ratio to the best baseline, forward + backward."""
    torch._dynamo.reset()
    *floats, indices = random_inputs("cuda", torch.bfloat16, **shape)
    backward = shape["Cq"] > 1
    flops = 4 * shape["B"] * shape["Cq"] * shape["Sq"] * shape["Hq"] * shape["K"] * shape["Sk"] * shape["D"]
    best = float("inf")
    for contender, function, leaves in contenders(*floats, indices, compiled=backward):
        try:
            row = measure(function, leaves, backward)
        except RuntimeError as error:           # out of memory, or not for this shape
            print(f"{name}, {contender}: {str(error).splitlines()[0][:100]}")
            continue
        total = row["forward_ms"] + row.get("backward_ms", 0)
        row["forward_share"] = 100 * flops / row["forward_ms"] / peak
        if backward:
            row["backward_share"] = 250 * flops / row["backward_ms"] / peak
        if contender in ("gca.py", "fast/gca.py"):
            row["ratio"] = best / total
        elif contender != "SDPA, copied before":
            best = min(best, total)
        yield dict(shape=name, retrieval=shape.get("retrieval", "uniform"), contender=contender) | row


def benchmark(shapes):
    """Rows of numbers, printed as they come. Shares are of the measured bf16 matrix product, in percent."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    peak = 2 * 8192 ** 3 / triton.testing.do_bench(lambda: a @ b, return_mode="median")   # FLOP a millisecond
    print(f"{torch.cuda.get_device_name()}, bf16; matrix product: {peak / 1e9:.0f} TFLOP/s")
    columns = "forward_ms", "backward_ms", "eager_ms", "forward_share", "backward_share", "extra_mib", "ratio"
    print(f"{'shape':16}{'retrieval':10}{'contender':20}", *(f"{column:>14}" for column in columns))
    rows = []
    for name, shape in shapes:
        for row in compare(name, shape, peak):
            rows.append(row)
            values = (f"{row[column]:14.3f}" if column in row else " " * 14 for column in columns)
            print(f"{name:16}{row['retrieval']:10}{row['contender']:20}", *values, flush=True)
    return rows


@exits.program
def main(argv=None):
    parser = cli.Parser(description="Time FlashGCA and its baselines on a GPU.")
    parser.add_argument("--json", type=Path, help="write the benchmark's rows to this file")
    args = parser.parse_args(argv)
    cli.check_writable("--json", args.json)
    if triton is None or not torch.cuda.is_available():
        return print("Nothing can be timed without a GPU. `python gca.py` checks the kernels on any machine.")
    rows = benchmark(SHAPES)
    if args.json:
        report.save_report(args.json, {}, torch.device("cuda"), rows)


if __name__ == "__main__":
    main(sys.argv[1:])
