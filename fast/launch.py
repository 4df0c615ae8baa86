"""Launching a Triton kernel for less: what calls with the same sizes share is worked out once.

    descriptor(x, rows)                         gca.py's, also for heads that are slices of a larger tensor
    launch(kernel, kind, grid, *args, ..)       kernel[grid](*args, ..)
    with own_workspaces(): ..                   around the recording of a CUDA graph

Triton looks at every argument of a launch to find the kernel that was compiled for it. That takes longer than
a small kernel takes the GPU (docs/kernels.md, "What Python costs").
"""
from contextlib import contextmanager
from functools import lru_cache

import torch

from gca import triton

if triton:
    from triton.tools.tensor_descriptor import TensorDescriptor

COMPILED = {}           # kernels that ran, by what Triton would have looked at: (kernel, compiled)
MAX_ENTRIES = 10_000    # as a growing text has ever new sizes


def launch(kernel, kind, grid, *args, **constants):
    """kernel[grid](*args, **constants); in the kernel's signature constants come last.

    kind: device and dtypes of the tensors. All of them are aligned(), or in descriptors.
    """
    key = (id(kernel), kind, *[x for x in args if type(x) is int], *constants.values())
    _, compiled = COMPILED.get(key, (None, None))
    if compiled:
        in_order = [constants[name] for name in kernel.arg_names[len(args):]]      # without num_warps, ..
        compiled[(*grid, 1, 1)[:3]](*args, *in_order)
        return
    if len(COMPILED) >= MAX_ENTRIES:
        COMPILED.clear()
    COMPILED[key] = kernel, kernel[grid](*args, **constants)    # None in the interpreter; kept, so is its id


def aligned(x):
    """x, or a copy: without gaps, at an address that is a multiple of 16, for which kernels are compiled."""
    is_aligned = x.is_contiguous() and x.data_ptr() % 16 == 0
    return x if is_aligned else x.clone(memory_format=torch.contiguous_format)


def without_large_gaps(x):
    """x, or a copy if a descriptor cannot read it: gaps inside heads or between sequences, odd addresses."""
    if x.is_contiguous():
        return aligned(x)
    B, C, S, H, D = x.shape
    heads = x.stride(4) == 1 and (H == 1 or x.stride(3) == D)
    sequences = B == 1 or C == 1 or x.stride(0) == C * x.stride(1)
    steps = [x.stride(i) * x.element_size() for i in range(3) if x.shape[i] > 1]
    in_place = x.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps)
    return x if heads and sequences and in_place else x.clone(memory_format=torch.contiguous_format)


def descriptor(x, rows, layout=None):
    """For tiles of `rows` rows of one chunk in one head; x (B, C, S, H, D) without large gaps.

    layout: in shared memory, for kernels in Gluon.
    """
    known = checked_descriptor(x.shape, x.stride(), x.dtype, rows, layout)
    new = object.__new__(type(known))                           # only the address differs: no second check
    new.__dict__.update(known.__dict__, base=x)
    return new


@lru_cache(MAX_ENTRIES)
def checked_descriptor(shape, stride, dtype, rows, layout):
    B, C, S, H, D = shape
    chunk = stride[1] if C > 1 else stride[0] if B > 1 else 16          # axes of one element have any stride
    row = stride[2] if S > 1 else 16
    sizes = [B * C, S, H * D], [chunk, row, 1], [1, rows, D]
    base = torch.empty(0, dtype=dtype)
    if layout is None:
        return TensorDescriptor(base, *sizes)
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
    return GluonDescriptor(base, *sizes, layout)


@contextmanager
def own_workspaces():
    """Around a recording: cuBLAS takes its workspace from this graph's memory, not from another's.

    For graphs that are given up one by one: by torch's source it would be lost with the first of them.
    """
    forget = torch._C._cuda_clearCublasWorkspaces if torch.cuda.is_available() else lambda: None
    forget()
    yield
    forget()
