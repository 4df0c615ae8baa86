"""Reading without end: DRT.forward's logits for a text that comes in pieces, at a constant cost per token.

    memory = Memory(model)                      what reading leaves behind (memory.py)
    logits = read(model, tokens, memory)        reads on from where the memory stands, by any number of tokens

The data flow is that of DRT.hidden, with three differences. Self-attention continues from the windows in the
memory. A piece of text may begin and end inside a chunk (Grid). And landmarks are scored a block at a time,
so that only the memory's chunks grow with the text. (Chunks in CPU memory are waited for, too: memory.py.)
"""
from functools import partial

import torch
import torch.nn.functional as F

from fast import gca, window
from gca import require
from model import log_distance

SEGMENT = dict(cpu=2 ** 20, cuda=2 ** 25)   # numbers in the residual stream of one segment
MAX_SCORES = 2 ** 26                # retrieval scores held at once; both bound the memory that reading takes
BUNDLE = 64                         # scores of which only the largest is compared at first
SORTED = 512                        # so few scores, or fewer, are simply sorted


@torch.no_grad()
def read(model, tokens, memory, at=None, graphs=None):
    """The logits that model(all tokens so far) gives for these tokens, which the memory then holds, too.

    tokens  (B, n), the next n of each sequence
    at      (B, n) bool: logits at these positions alone, (number, vocab_size); "last": after the last token,
            (B, vocab_size); None: all, (B, n, vocab_size)
    graphs  fast.Graphs(model): short texts that come again in a shape are replayed as CUDA graphs (short.py)

    A long text is read in segments. Retrieval never explores here, whatever mode the model is in. ValueError
    if memory and tokens do not go together; whatever goes wrong, the memory stays as it was.
    """
    memory.check(model, tokens)
    require(graphs is None or graphs.model is model, "graphs must be this model's own")
    before = memory.snapshot()
    try:
        return read_segments(model, tokens, memory, at, graphs)
    except BaseException:
        memory.restore(before)
        raise


def read_segments(model, tokens, memory, at, graphs):
    size = segment_length(model, len(tokens))
    segments = tokens.split(size, dim=1)
    graph = graphs.reader(tokens, memory) if graphs and len(segments) == 1 else None
    read_next = graph or partial(read_segment, model)
    if isinstance(at, str):
        require(at == "last", f"at must be a mask, 'last' or None, got {at!r}")
        for segment in segments:
            last = read_next(segment, memory)[:, -1]
        return model.head(last)
    if at is None:
        return model.head(torch.cat([read_next(segment, memory) for segment in segments], dim=1))
    hidden, rows = [], []
    for segment, mask in zip(segments, at.split(size, dim=1), strict=True):
        hidden.append(read_next(segment, memory)[mask])
        rows.append(mask.nonzero()[:, 0])
    order = torch.cat(rows).argsort(stable=True)                        # segment by segment -> row by row
    return model.head(torch.cat(hidden)[order])


def segment_length(model, batch_size):
    """Tokens of each sequence that read() takes at once: whole chunks, so that all segments are alike."""
    n_text = model.config.chunk_size - 1
    size = SEGMENT[model.embedding.weight.device.type] // (batch_size * model.config.n_embd)
    return max(1, size // n_text) * n_text


# ---------------------------------------------------------------- the data flow, once more

def read_segment(model, tokens, memory):
    """DRT.hidden from where the memory stands: tokens (B, n) -> the last layer's output (B, n, d)."""
    grid = Grid(model.config.chunk_size, memory.length, tokens.shape[1])
    x = model.embedding(tokens)                                         # (B, n, d)
    memory.length += tokens.shape[1]
    if model.config.n_group:
        x = grid.insert_landmarks(x, model.landmark)                    # (B, N, d)
    for i in range(model.n_lower):
        x = decode(model.layers[i], x, memory, i)
    if not model.config.n_group:
        return model.norm(x)
    encode(model, x, grid, memory)
    group_size = (model.config.n_layer - model.n_lower) // model.config.n_group
    for i in range(model.n_lower, model.config.n_layer):
        if (i - model.n_lower) % group_size == 0:
            retrieved = retrieve_for_group(model, (i - model.n_lower) // group_size, x, grid, memory)
        x = decode(model.layers[i], x, memory, i, grid, retrieved)
    return grid.text(model.norm(x))


def decode(layer, x, memory, i, grid=None, retrieved=None):
    """Block.forward of layer i, whose self-attention continues from the window in memory."""
    y = z = x + self_attention(layer.attention, layer.norm1(x), memory, i)
    if retrieved is not None:
        z = y + cross_attention(layer.cross, layer.norm_cross(y), grid, *retrieved)
    residual = z if layer.gca_residual else y
    return residual + layer.mlp(layer.norm2(z))


def self_attention(attention, x, memory, i):
    q, k, v = attention.heads(x)
    past = memory.window[i]                                             # (k, v) of the last W positions
    if past is not None:
        k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
    if past is not None and x.shape[1] == 1:
        out = window.one_query_attention(q, k, v, memory.bias)
    else:
        out = window.window_attention(q, k, v, attention.window, attention.slopes)
    width = attention.window
    memory.window[i] = copy_of(k[:, :, -width:]), copy_of(v[:, :, -width:])
    return attention.out(out.transpose(1, 2).flatten(2))


def copy_of(x):                             # a slice would keep the whole of its tensor in memory
    return x.clone(memory_format=torch.contiguous_format)


def cross_attention(cross, x, grid, weights, indices, pages, ready):
    """The rows of each chunk of the grid attend to the chunks retrieved for it, which `ready` waits for."""
    q = grid.to_chunks(cross.query(x).unflatten(-1, (cross.n_head, -1)))                # (B, C, S, H, D)
    if ready:
        ready.wait()
    out = attend(q, pages, weights, indices, cross.softmax_one)
    return cross.out(grid.to_stream(out).flatten(2))


def attend(q, pages, weights, indices, softmax_one):
    """gca() over chunks in several pages, [(k, v, chunks used)]: its sum over chunks is a sum over pages."""
    B = len(q)
    if len(pages[0][0]) < B:        # an offloaded memory's cache, (1, slots, ..): chunks of all sequences
        q, weights, indices = (x.flatten(0, 1)[None] for x in (q, weights, indices))
    outputs, first = [], 0
    for k, v, n_used in pages:
        here = indices
        if len(pages) > 1:
            here = torch.where((indices >= first) & (indices < first + n_used), indices - first, -1)
        outputs.append(gca.gca(q, k, v, weights, here, softmax_one))
        first += n_used
    return sum(outputs[1:], outputs[0]).view(B, -1, *q.shape[2:])


def encode(model, x, grid, memory):
    """Store the chunks that this piece completes, and keep the rest for the next piece."""
    x = torch.cat([memory.unfinished, x], dim=1) if memory.unfinished is not None else x
    n_whole = grid.whole * grid.S
    memory.unfinished = copy_of(x[:, n_whole:])
    if grid.whole or not memory.pages:
        memory.append(*model.encoder(x[:, :n_whole].unflatten(1, (grid.whole, grid.S))))


def retrieve_for_group(model, g, x, grid, memory):
    """What the chunks of the grid attend to: weights, indices (B, C, K), pages of k and v, and a CUDA event.

    Landmark t retrieves for chunk t + 1. The chunk that this piece begins in was served by an earlier one.
    """
    weights, indices = memory.serving[g]                                # (B, 1, K)
    if grid.whole:
        query = model.query_norms[g](grid.landmarks(x))                 # (B, whole, d)
        with torch.autocast(x.device.type, enabled=False):              # ranking needs full precision
            new_weights, new_indices = retrieve(query, memory.landmarks(), grid.first, model.config.top_k,
                                                model.config.retriever, *model.decay_and_near(g))
        weights, indices = torch.cat([weights, new_weights], dim=1), torch.cat([indices, new_indices], dim=1)
        memory.serving[g] = copy_of(weights[:, -1:]), copy_of(indices[:, -1:])
        weights, indices = weights[:, :grid.chunks], indices[:, :grid.chunks]
    pages, indices, ready = memory.serve(g, indices)
    return weights, indices, pages, ready


class Grid:
    """Where n text tokens, read after `before` others, fall on the grid of chunks: pure geometry."""

    def __init__(self, chunk_size, before, n):
        n_text = chunk_size - 1
        self.S, self.n = chunk_size, n
        self.first, self.offset = divmod(before, n_text)    # chunk of the first token, its row in that chunk
        self.whole = (self.offset + n) // n_text            # chunks that these tokens complete
        self.chunks = -(-(self.offset + n) // n_text)       # chunks that they touch
        self.length = n + self.whole                        # N: positions of the stream, landmarks included

    def pad(self, x, rows, length):
        """(B, length, ..) -> (B, C, rows, ..): zeros before the first token's row and after the last one's.

        A single chunk needs no padding: (B, 1, length, ..).
        """
        if self.chunks == 1:
            return x[:, None]
        after = self.chunks * rows - self.offset - length
        if self.offset or after:                        # F.pad copies even where there is nothing to add
            x = F.pad(x, (0, 0) * (x.dim() - 2) + (self.offset, after))
        return x.unflatten(1, (self.chunks, rows))

    def to_chunks(self, x):                  # (B, N, ..) -> (B, C, S, ..)
        return self.pad(x, self.S, self.length)

    def to_stream(self, x):                  # (B, C, S, ..) -> (B, N, ..)
        start = self.offset if self.chunks > 1 else 0
        return x.flatten(1, 2)[:, start:start + self.length]

    def insert_landmarks(self, x, landmark):  # (B, n, d), (d,) -> (B, N, d): one behind each completed chunk
        x = self.pad(x, self.S - 1, self.n)
        landmark = landmark.to(x.dtype).expand(*x.shape[:2], 1, -1)
        return self.to_stream(torch.cat([x, landmark], dim=2))

    def landmarks(self, x):                  # (B, N, d) -> (B, whole, d)
        return x[:, self.S - 1 - self.offset::self.S]

    def text(self, x):                       # (B, N, d) -> (B, n, d): the stream without its landmarks
        if self.chunks == 1:
            return x[:, :self.n]
        return self.to_chunks(x)[:, :, :-1].flatten(1, 2)[:, self.offset:self.offset + self.n]


# ---------------------------------------------------------------- retrieval, a block of landmarks at a time

def retrieve(query, landmarks, first, top_k, retriever="learned", decay=None, near=1):
    """model.py's retrieve for chunks first .. first + n - 1: query (B, n, d) -> weights, indices (B, n, K).

    landmarks: every chunk's l_c in order, as a list of (B, M, d). The best K so far compete with the best K
    of each block.
    """
    B, n, d = query.shape
    t = torch.arange(first, first + n, device=query.device)[:, None]
    size = max(1, MAX_SCORES // max(1, B * n) // BUNDLE) * BUNDLE
    nothing = torch.empty(B, n, 0, device=query.device)
    best_ranking, best_scores, best_indices = nothing, nothing, t.new_empty(B, n, 0)
    start = 0
    for page in landmarks:
        for block in page.split(size, dim=1):
            scores = inner_products(query, block)                       # (B, n, M)
            chunk = torch.arange(start, start + block.shape[1], device=query.device)
            if decay is not None:
                scores -= penalty(decay * d ** 0.5, first, n, start, block.shape[1], near)      # scaled below
            if retriever != "learned":
                scores = torch.zeros_like(scores)
            ranking = scores
            if retriever == "last":
                ranking = ranking + chunk
            if retriever == "random":
                ranking = torch.rand_like(ranking)
            if start + block.shape[1] > first:                          # not all are earlier chunks
                ranking = ranking.masked_fill(chunk >= t, float("-inf"))
            chosen = first_largest(ranking, top_k)
            best_ranking = torch.cat([best_ranking, ranking.gather(-1, chosen)], dim=-1)
            best_scores = torch.cat([best_scores, scores.gather(-1, chosen)], dim=-1)
            best_indices = torch.cat([best_indices, chosen + start], dim=-1)
            best_ranking, order = best_ranking.sort(descending=True, stable=True)
            best_ranking, order = best_ranking[..., :top_k], order[..., :top_k]
            best_scores, best_indices = best_scores.gather(-1, order), best_indices.gather(-1, order)
            start += block.shape[1]
    n_spare = top_k - best_ranking.shape[-1]
    empty = F.pad(best_ranking, (0, n_spare), value=float("-inf")) == float("-inf")
    scores = F.pad(best_scores * d ** -0.5, (0, n_spare)).masked_fill(empty, -1e30)
    weights = scores.softmax(-1).masked_fill(empty, 0)
    return weights, F.pad(best_indices, (0, n_spare)).masked_fill(empty, -1)


def penalty(decay, first, n, start, M, near):
    """decay * log_distance of chunks start .. start + M - 1 before chunks first .. first + n - 1: (n, M).

    It depends on the distance alone, so it is computed once for each diagonal, n + M - 1 times.
    """
    chunk = torch.arange(start, start + n + M - 1, device=decay.device)
    line = decay * log_distance(first + n - 1, chunk, near)
    last_first = line.unfold(0, M, 1)                                   # row r: of chunk first + n - 1 - r
    return last_first[torch.arange(n - 1, -1, -1, device=decay.device)]


def inner_products(query, landmarks):
    """(B, n, d), (B, M, d) -> (B, n, M) float32, as exact as the inputs."""
    if query.is_cuda and query.dtype == landmarks.dtype != torch.float32:
        return torch.bmm(query, landmarks.mT, out_dtype=torch.float32)  # low precision in, none lost
    return query.float() @ landmarks.float().mT


def first_largest(x, k):
    """Indices of the k largest along the last axis, in order; of equal numbers the first (a stable sort).

    Equal scores are rare. So it chooses one more than asked for, which shows whether the last one chosen has
    equals. Only then it chooses again: those above that one, and of those equal to it the first. Few numbers
    are all sorted: no look from the host, which a recording (short.py) could not have.
    """
    if x.shape[-1] <= SORTED:
        return x.sort(descending=True, stable=True).indices[..., :k]
    chosen = largest(x, k + 1).sort().values
    values, order = x.gather(-1, chosen).sort(descending=True, stable=True)
    chosen = chosen.gather(-1, order)
    if chosen.shape[-1] <= k:
        return chosen
    least = values[..., k - 1:k]
    if not ((values[..., k:] == least) & (least > float("-inf"))).any():
        return chosen[..., :k]
    position = torch.arange(x.shape[-1], device=x.device, dtype=torch.float32)
    rank = torch.where(x > least, 1.0, torch.where(x == least, -position, float("-inf")))
    chosen = largest(rank, k).sort().values
    return chosen.gather(-1, x.gather(-1, chosen).sort(descending=True, stable=True).indices)


def largest(x, k):
    """Indices of the k largest along the last axis (of all, if there are fewer).

    Of many numbers, it first finds the k bundles with the largest maxima: no other bundle can hold one of the
    k largest. The numbers are written in rows, and a bundle is a column: a GPU finds its maximum sooner.
    """
    n = x.shape[-1]
    if n < max(64, k) * BUNDLE:
        return x.topk(min(k, n)).indices
    if n % BUNDLE:
        x = F.pad(x, (0, -n % BUNDLE), value=float("-inf"))
    table = x.unflatten(-1, (BUNDLE, -1))
    column = table.amax(-2).topk(k).indices                             # (.., k)
    bundles = table.gather(-1, column[..., None, :].expand(*column.shape[:-1], BUNDLE, k)).flatten(-2)
    best = bundles.topk(k).indices
    best = column.gather(-1, best % k) + best // k * table.shape[-1]
    return best.clamp(max=n - 1)                            # padding is chosen only where all others are -inf
