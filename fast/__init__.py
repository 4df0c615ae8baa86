"""The same results, faster. gca.py, model.py and tasks/ never import this package: it works from outside.

    model = apply(model)                    swaps up to three functions of a model, by the table below
    memory = Memory(model)                  what reading leaves behind (memory.py)
    logits = read(model, tokens, memory)    reads on, instead of reading everything again (stream.py)
    for tokens in generate(model, ..): ..   generates, at a nearly constant cost per token (generate.py)
    check(model)                            whether reading in pieces still gives what the plain files give

    gca.py, hopper.py, launch.py    the kernels          window.py, loss.py    the table's other twins
    training.py                     steps as CUDA graphs, which tools/run.py asks for in train.py's loop
    short.py                        Graphs: short texts as CUDA graphs, which read() replays
    offload.py                      chunks of a memory in CPU memory, and the GPU's share of them
    bench.py, speed.py              what is timed        files.py              whole files, or none

Each fast piece has a test that it does what its plain twin does. A piece is swapped only where that pays.
"""
import copy
import warnings

import torch

import model as plain
from fast import gca, loss, stream, training, window
from fast.generate import generate
from fast.memory import Memory
from fast.short import Graphs
from fast.stream import read, read_segment
from gca import require

__all__ = ["Graphs", "Memory", "apply", "check", "describe", "generate", "read"]

TABLE = [
    # plain function      fast twin                   in words; "" where it does not pay
    ("gca",               gca.gca,                    gca.in_words),
    ("window_attention",  window.window_attention,    window.in_words),
    ("cross_entropy",     loss.cross_entropy,         loss.in_words),
]


def apply(model, compile=False):
    """Swap pieces of a model on a GPU for faster ones with the same results; returns the model.

    On a CPU the plain pieces are as fast, and stay. compile: also torch.compile each layer, which takes most
    of a minute and makes steps faster.
    """
    if not model.embedding.weight.is_cuda:
        return model
    swap(model)
    if compile:
        warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
        for layer in [*model.layers, *([model.encoder] if model.config.n_group else [])]:
            layer.compile(dynamic=False)
    return model


def swap(model):
    for name, twin, in_words in TABLE:
        if in_words(model):
            setattr(model, name, twin)


def describe(model, config=None):
    """What of the table is active in the model, in words, or "": for the line that says what runs.

    config: a TrainConfig, for a model that is to be trained: also whether its steps are CUDA graphs.
    """
    active = [training.in_words(model, config)] if config else []
    active += [in_words(model) for name, twin, in_words in TABLE if getattr(model, name) is twin]
    return ", ".join(filter(None, active))


@torch.no_grad()
def check(model):
    """ValueError if reading in pieces differs from the plain files, or is not finite, on random tokens.

    Layers are written once, so an edit of theirs takes effect everywhere. An edit of what has a twin in here
    does not. Pieces are of half a window, and of one token each at the end. Where two scores are nearly
    equal, rounding decides which chunk is read. So the text is so short that each chunk retrieves all before
    it, unless the window is wider; and what the twins of retrieve() choose is compared by itself.
    """
    S, K, W = model.config.chunk_size, model.config.top_k, model.config.window
    device, dtype = model.embedding.weight.device, model.embedding.weight.dtype
    is_exact = dtype == torch.float32 and not torch.is_autocast_enabled(device.type)
    n = (K + 1) * (S - 1)               # so few chunks that each retrieves all before it, even by chance
    if model.config.retriever != "random":
        n = max(n, W + S)                                               # more than the window holds
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (1, n), generator=draw).to(device)
    original = copy.copy(model)                         # the same weights
    for name, _, _ in TABLE:
        setattr(original, name, getattr(plain, name))
    memory = Memory(model)
    pieces = [*tokens[:, :-8].split(max(1, W // 2), dim=1), *tokens[:, -8:].split(1, dim=1)]
    wanted = original.hidden(tokens)
    require(wanted.isfinite().all(), "the model's output is not finite: its weights are lost, or --dtype is "
            "too narrow for them")
    try:
        got = torch.cat([read_segment(model, piece, memory) for piece in pieces if piece.numel()], dim=1)
        errors = ((got - wanted).norm(dim=-1) / wanted.norm(dim=-1))[0].float()
        error = max(errors.quantile(0.85 if is_exact else 0.5), errors[-8:].median()).item()
        said = f"relative error {error:.1e}"
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as problem:       # an edit of shapes may end in any of torch's errors
        error, said = 1.0, str(problem)
    scores = torch.randn(1, 3 * K, 3 * K, generator=draw).to(device)
    weights, indices = plain.retrieve(scores, K)
    other_weights, other_indices = stream.retrieve(lambda block, t, c: scores[:, t][..., c], range(3 * K),
                                                   [scores], K)
    if not (torch.equal(indices, other_indices) and torch.allclose(weights, other_weights, atol=1e-6)):
        error, said = 1.0, "other chunks, or other weights"
    require(error <= (1e-3 if is_exact else 5e-2), f"fast/ reads other than the plain files ({said}). "
            "An edit of gca.py, or of window_attention, retrieve or WholeText in model.py, must be made "
            "in its twin, too (fast/gca.py, window.py, stream.py); or give --fast false")
