"""How much shared memory the kernels need on GPUs that are not here: `python tests/compiled.py 75 80`.

Compiles every Triton kernel for compute capability 7.5, 8.0, .. with the tiles that launch_options picks, and
compares with what such a GPU has. Without arguments: all of LIMITS, which takes long. Exit status: how many
are too large.
"""
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
from triton import compile as compile_kernel  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

import gca  # noqa: E402
from fast import gca as fast_gca  # noqa: E402

LIMITS = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}      # KiB: T4, A100, RTX 30, ..
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
KERNELS = {gca: ["forward_kernel", "backward_q_kernel", "backward_kv_kernel"],
           fast_gca: ["forward_kernel", "backward_kv_kernel", "add_pieces_kernel"]}


def signature(kernel, dtype, options, small_lists):
    """The types and constants that a launch with these options would compile the kernel for."""
    def tiles(names, rows, dtype=NAMES[dtype]):
        return dict.fromkeys(names.split(), f"tensordesc<{dtype}[1, {rows}, {options['D']}]>")

    lists = "*i32" if small_lists else "*i64"
    types = tiles("Q DO Out DQ", options["ROWS"]) | tiles("K V DK DV", options["KEYS"])
    types |= tiles("PieceK PieceV", options["KEYS"], "fp32")
    types |= dict(W="*fp32", DW="*fp32", Index="*i64", Pairs=lists, Offsets=lists, Items="*i32", scale="fp32")
    constants = options | dict(SLOTS=8, BLOCKS=1, SEGMENT=64)
    kinds = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    return kinds, {name: constants[name] for name in kernel.arg_names if name in constants}


def needs(capability, dtype, D, n_key):
    """{kernel: KiB of shared memory} on such a GPU; {} where tile_rows refuses such tensors."""
    major, memory = capability // 10, LIMITS[capability] * 1024
    gca.gpu = lambda device: (major, memory)
    q = torch.empty(1, 1, min(64, n_key), 1, D, dtype=dtype, device="meta")
    k = torch.empty(1, 1, n_key, 1, D, dtype=dtype, device="meta")
    if not gca.tile_rows(q, k):
        return {}
    options, found = gca.launch_options(q, k, True), {}
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    for file, names in KERNELS.items():
        for name in names:
            kernel = getattr(file, name)
            source = ASTSource(kernel, *signature(kernel, dtype, options, file is fast_gca))
            done = compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=launch)
            found[f"{file.__name__}.{name}"] = done.metadata.shared / 1024
    return found


def main(capabilities, dtypes=NAMES, widths=(16, 32, 64, 128, 256), keys=(32, 64, 128)):
    too_large = 0
    for capability, dtype, D, n_key in itertools.product(capabilities, dtypes, widths, keys):
        found, limit = needs(capability, dtype, D, n_key), LIMITS[capability]
        largest = max(found, key=found.get, default=None)
        words = f"{found[largest]:3.0f} of {limit} KiB ({largest})" if found else "refused"
        print(f"{capability} {NAMES[dtype]} D {D:3}, {n_key:3} keys: {words}", flush=True)
        too_large += bool(found) and found[largest] > limit
    return too_large


if __name__ == "__main__":
    sys.exit(main([int(x) for x in sys.argv[1:]] or LIMITS))
