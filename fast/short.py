"""Reading a short text from its beginning as a CUDA graph: one launch instead of hundreds.

Up to some thousand tokens, Python launches kernels more slowly than the GPU runs them. So the second text of
a shape is recorded. From then on the recording is replayed; what it leaves behind is copied into the memory.
"""
import os
import threading
from weakref import WeakKeyDictionary

import torch

from fast.memory import Memory
from fast.window import WIDE, band_blocks

DEVICES = ["cuda"]
SHORT = 2 ** 23     # numbers in the residual stream; of longer texts, kernels take longer than their launches
FEW = 512           # chunks; among more, retrieval looks at scores on the host, which no recording may
MOST = 4            # kinds of call kept for a model; the one that came first is given up first

graphs = WeakKeyDictionary()        # model -> {kind of call: its graph, None after the first such call}


def graph_for(read_segment, model, tokens, memory):
    """What to call in place of read_segment(model, ..) for these tokens; None if that itself is best.

    read_segment: that of stream.py, which imports this file.
    """
    if not pays(model, tokens, memory):
        return None
    kind, known = kind_of(model, tokens), graphs.setdefault(model, {})
    if kind in known:
        known[kind] = known[kind] or GraphedText(read_segment, model, tokens)
        return known[kind]
    if len(known) >= MOST:
        del known[next(iter(known))]
    known[kind] = None
    return None


def pays(model, tokens, memory):
    config = model.config
    starts = memory.length == 0 and not memory.cache
    is_short = (0 < tokens.numel() * config.n_embd <= SHORT
                and tokens.shape[1] // (config.chunk_size - 1) <= FEW)
    is_watched = (os.environ.get("GCA_CHECK_INDICES") == "1"
                  or any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()))
    return tokens.device.type in DEVICES and starts and is_short and not is_watched


def kind_of(model, tokens):
    """All that a recording takes for granted: where the weights are, who calls, and how."""
    device = tokens.device
    stream = torch.cuda.current_stream(device) if tokens.is_cuda else None
    modes = (torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type),
             torch.is_inference_mode_enabled(), torch.are_deterministic_algorithms_enabled())
    weights = [(x.data_ptr(), x.dtype) for x in [*model.parameters(), *model.buffers()]]
    return (tokens.shape, str(model.config), threading.get_ident(), stream, *modes, *weights)


class GraphedText:
    """read_segment for texts of one shape, (B, n), and an empty memory.

    The result lies where the next call writes its own: read() makes logits of it at once.
    """

    def __init__(self, read_segment, model, tokens):
        device_type, (B, n) = tokens.device.type, tokens.shape
        self.tokens, self.graph = tokens.clone(), torch.cuda.CUDAGraph()
        rehearsal, self.memory = (Memory(model, B, capacity=n) for _ in range(2))
        self.first_serving = list(self.memory.serving)          # the graph reads it; read_segment replaces it
        with torch.autocast(device_type, torch.get_autocast_dtype(device_type),
                            torch.is_autocast_enabled(device_type),
                            cache_enabled=False):               # cached casts would not outlive the context
            read_segment(model, self.tokens, rehearsal)         # compile and choose algorithms
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):   # other threads go on
                self.hidden = read_segment(model, self.tokens, self.memory)
                self.windows = torch.stack([x for pair in self.memory.window for x in pair])
        # If flex_attention ran, the graph reads its mask, which is cached. The cache may drop it.
        n_position, window = n + self.memory.chunks, model.config.window
        self.mask = band_blocks(n_position, n_position, window, tokens.device) if window >= WIDE else None
        self.memory.model = None                                # or the model could never be given up

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
