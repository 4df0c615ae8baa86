"""An offloaded memory's way between CPU and GPU: chunks travel on a stream of their own, and some stay.

    memory.py       keeps all chunks in pinned CPU memory, in pages
    ChunkCache      the GPU's share: the chunks that were retrieved last
"""
from __future__ import annotations

from contextlib import contextmanager
from functools import lru_cache

import torch
import torch.nn.functional as F

from gca import jit, triton

if triton:
    import triton.language as tl


@lru_cache
def copy_stream(device):
    """The CUDA stream on which chunks travel, beside the one that computes."""
    return torch.cuda.Stream(device)


@contextmanager
def copying(device):
    """What is done in here goes to the copy stream, after all that was asked of the GPU so far."""
    if device.type != "cuda":
        yield
        return
    copy_stream(device).wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(copy_stream(device)):
        yield


@jit
def gather_kernel(Source, Target, Rows, Chunks, Slots, row_stride, n, BLOCK: tl.constexpr):
    """Target[slot] = Source[row, chunk], n numbers each. The GPU reads Source in pinned CPU memory."""
    i = tl.program_id(0)
    row, chunk, slot = tl.load(Rows + i), tl.load(Chunks + i), tl.load(Slots + i)          # int64
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(Source + row * row_stride + chunk * n + at, mask=at < n)
    tl.store(Target + slot * n + at, x, mask=at < n)


def gather_chunks(source, rows, chunks, target, slots):
    """target[slots] = source[rows, chunks]; source (B, M, ..) on the CPU, target (slots, ..) on the GPU."""
    n, block = target[0].numel(), 2048
    if not (target.is_cuda and triton):
        target[slots] = source[rows.to(source.device), chunks.to(source.device)].to(target.device)
    elif len(slots):
        grid = len(slots), triton.cdiv(n, block)
        gather_kernel[grid](source, target, rows, chunks, slots, source.stride(0), n, BLOCK=block)


# ---------------------------------------------------------------- the GPU's share

class ChunkCache:
    """Keys and values of the chunks that were retrieved last, on the GPU. Pages: those of memory.py.

    Each has a slot in k and v (1, slots, S-1, Hkv, D), for all sequences of the batch together. Chunk c of
    sequence b is called key c * B + b. When slots run out, the least recently used give way.
    """

    def __init__(self, n_group=1):
        self.n_group = n_group                                  # as many retrievals are in use at once
        self.hits = self.wanted = self.clock = self.generation = 0
        self.forget()

    def forget(self):
        self.generation += 1                                    # slots given out before are void
        self.k = self.v = None
        self.slot_of = None                                     # (keys,) the slot of each, or -1

    @property
    def hit_rate(self):
        return self.hits / max(1, self.wanted)

    def fetch(self, pages, indices):
        """Bring the chunks in indices (B, n, K) to the GPU; returns their slots (B, n, K)."""
        B = len(indices)
        sequence = torch.arange(B, device=indices.device)[:, None, None]
        keys = torch.where(indices < 0, -1, indices * B + sequence)
        wanted = keys.unique()
        wanted = wanted[wanted >= 0]
        self.make_room(len(wanted), B * sum(page.used for page in pages), pages[0], indices.device)
        self.clock += 1
        slots = self.slot_of[wanted]
        self.last_use[slots[slots >= 0]] = self.clock
        missing = wanted[slots < 0]
        if len(missing):
            self.load(pages, missing, self.last_use.argsort()[:len(missing)], B)
        self.hits, self.wanted = self.hits + len(wanted) - len(missing), self.wanted + len(wanted)
        return torch.where(keys < 0, -1, self.slot_of[keys])

    def load(self, pages, keys, slots, B):
        """Fill slots with the chunks called keys, which are in none; what the slots held is given up."""
        evicted = self.key_in[slots]
        self.slot_of[evicted[evicted >= 0]] = -1
        self.key_in[slots], self.slot_of[keys], self.last_use[slots] = keys, slots, self.clock
        self.generation += 1
        with copying(self.k.device):
            first = 0
            for page in pages:
                chunks = keys // B - first
                here = (chunks >= 0) & (chunks < page.used)
                for stored, cached in zip(page.tensors[1:], (self.k, self.v), strict=True):
                    gather_chunks(stored, (keys % B)[here], chunks[here], cached[0], slots[here])
                first += page.used
        for x in (keys, slots):
            if x.is_cuda:
                x.record_stream(copy_stream(x.device))          # not to be reused before it was read there

    def make_room(self, n_slot, n_key, page, device):
        if self.k is None or self.n_group * n_slot > self.k.shape[1]:       # too small: it starts again
            self.forget()
            room = self.n_group * n_slot + n_slot // 4 + 16
            self.k, self.v = (x.new_empty(1, room, *x.shape[2:], device=device) for x in page.tensors[1:])
            self.key_in = torch.full((room,), -1, device=device)
            self.last_use = torch.zeros(room, dtype=torch.long, device=device)
            self.slot_of = torch.full((max(1, n_key),), -1, device=device)
        elif n_key > len(self.slot_of):
            self.slot_of = F.pad(self.slot_of, (0, 2 * n_key - len(self.slot_of)), value=-1)
