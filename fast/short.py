"""Reading short texts as CUDA graphs: one launch instead of hundreds.

    graphs = fast.Graphs(model)
    logits = fast.read(model, tokens, memory, "last", graphs)

Up to some thousand tokens, Python launches kernels more slowly than the GPU runs them. So when the shape of a
text comes for the second time, reading it is recorded. From then on the recording is replayed; what it leaves
behind is copied into the memory. Elsewhere (long texts, CPUs, a memory that is not empty) nothing changes.
"""
import os

import torch

from fast.launch import own_workspaces
from fast.memory import Memory
from fast.stream import SORTED, read_segment
from fast.window import WIDE, band_blocks

DEVICES = ["cuda"]          # where there are CUDA graphs; tests have a stand-in
SHORT = 2 ** 23     # numbers in the residual stream; of longer texts, kernels take longer than their launches
MOST = 16           # recordings; each keeps the memory that reading takes


class Graphs:
    """Recordings for one model, whose weights may change where they are, but nothing else about it.

    For one thread: a recording has one place for its results.
    """

    def __init__(self, model):
        self.model, self.seen, self.recorded = model, set(), {}

    def reader(self, tokens, memory):
        """A function of tokens and memory that does what read_segment does; None: that itself is best."""
        if not self.pays(tokens, memory):
            return None
        device = tokens.device.type
        kind = (tokens.shape, tokens.dtype,
                torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        if kind in self.seen and kind not in self.recorded and len(self.recorded) < MOST:
            self.recorded[kind] = GraphedText(self.model, tokens)
        self.seen.add(kind)
        return self.recorded.get(kind)

    def pays(self, tokens, memory):
        config, n_chunk = self.model.config, tokens.shape[1] // (self.model.config.chunk_size - 1)
        is_short = 0 < tokens.numel() * config.n_embd <= SHORT and n_chunk <= SORTED
        can_be = (tokens.device.type in DEVICES and memory.length == 0 and not memory.cache
                  and config.retriever != "random" and os.environ.get("GCA_CHECK_INDICES") != "1")
        return is_short and can_be


class GraphedText:
    """read_segment for texts of one shape, (B, n), and an empty memory.

    The result lies where the next call writes its own: read() makes logits of it at once.
    """

    def __init__(self, model, tokens):
        device_type, (B, n) = tokens.device.type, tokens.shape
        self.tokens, self.graph = tokens.clone(), torch.cuda.CUDAGraph()
        rehearsal, self.memory = (Memory(model, B, capacity=n) for _ in range(2))
        self.first_serving = list(self.memory.serving)          # the graph reads it; read_segment replaces it
        with torch.autocast(device_type, torch.get_autocast_dtype(device_type),
                            torch.is_autocast_enabled(device_type),
                            cache_enabled=False):               # cached casts would not outlive the context
            read_segment(model, self.tokens, rehearsal)         # compile and choose algorithms
            with own_workspaces(), torch.cuda.graph(self.graph):
                self.hidden = read_segment(model, self.tokens, self.memory)
                self.windows = torch.stack([x for pair in self.memory.window for x in pair])
        # If flex_attention ran, the graph reads its mask, which is cached. The cache may drop it.
        n_position, window = n + self.memory.chunks, model.config.window
        self.mask = band_blocks(n_position, n_position, window, tokens.device) if window >= WIDE else None

    def __call__(self, tokens, memory):
        self.tokens.copy_(tokens)
        self.graph.replay()
        windows, left = self.windows.clone(), self.memory
        memory.length = left.length
        memory.window = list(zip(windows[::2].unbind(), windows[1::2].unbind(), strict=True))
        memory.serving = [(weights.clone(), indices.clone()) for weights, indices in left.serving]
        if left.pages:
            memory.unfinished = left.unfinished.clone()
            memory.append(*left.pages[0].filled())
        return self.hidden
