"""Reading without end: DRT.forward's logits for a text that comes in pieces, at a constant cost per token.

    memory = Memory(model)                      what reading leaves behind (memory.py)
    logits = read(model, tokens, memory)        reads on from where the memory stands, by any number of tokens

The data flow is DRT.hidden's. What it asks of model.py's WholeText, it asks of a Piece here, with three
differences. Self-attention continues from the windows in the memory. A piece may begin and end inside a chunk
(Grid). And landmarks are scored a block at a time, so that only the memory's chunks grow with the text.
"""
from functools import partial

import torch
import torch.nn.functional as F

from fast import window
from gca import require
from model import scores_and_ranking, softmax_of_filled

SEGMENT = dict(cpu=2 ** 20, cuda=2 ** 25)   # elements in the residual stream of one segment
MAX_SCORES = 2 ** 26                # retrieval scores held at once; both bound the memory that reading takes
BUNDLE = 64                         # scores of which only the largest is compared at first
SORTED = 512                        # so few scores, or fewer, are simply sorted


@torch.inference_mode(False)        # so that a memory can be read on in whatever mode
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
    is_mask = torch.is_tensor(at) and at.dtype == torch.bool and at.shape == tokens.shape
    require(is_mask or at is None or isinstance(at, str) and at == "last",
            "at must be a bool mask of tokens' shape, 'last' or None")
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
    if isinstance(at, str):                                             # "last"
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


# ---------------------------------------------------------------- a piece of a text

def read_segment(model, tokens, memory):
    """DRT.hidden from where the memory stands: tokens (B, n) -> the last layer's output (B, n, d)."""
    return model.hidden(tokens, Piece(model, tokens.shape[1], memory))


class Piece:
    """The next n tokens of a text whose past a memory holds; methods as those of model.py's WholeText."""

    def __init__(self, model, n, memory):
        self.model, self.memory = model, memory
        self.grid = Grid(model.config.chunk_size, memory.length, n)
        memory.length += n                  # restored if reading fails

    def insert_landmarks(self, x):           # (B, n, d) -> (B, N, d): one behind each completed chunk
        x = self.grid.pad(x, self.grid.S - 1, self.grid.n)
        landmark = self.model.landmark.to(x.dtype).expand(*x.shape[:2], 1, -1)
        return self.grid.to_stream(torch.cat([x, landmark], dim=2))

    def attend(self, i):
        """For layer i: attention that continues from the window in the memory, and leaves one there."""
        memory, width, slopes = self.memory, self.model.config.window, self.model.slopes
        window_attention = self.model.window_attention
        pasts = [memory.window[i]]                                      # (k, v) of the last W positions

        def attend(q, k, v):
            require(pasts, "a layer must attend once: fast/ keeps one window for each")
            past = pasts.pop()
            if past is not None:
                k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
            memory.window[i] = copy_of(k[:, :, -width:]), copy_of(v[:, :, -width:])
            if past is not None and q.shape[2] == 1:
                return window.one_query_attention(q, k, v, memory.bias)
            return window_attention(q, k, v, width, slopes)

        return attend

    def store(self, x):
        """Store the chunks that this piece completes, and keep the rest for the next piece."""
        memory, S, n_whole = self.memory, self.grid.S, self.grid.whole * self.grid.S
        x = torch.cat([memory.unfinished, x], dim=1) if memory.unfinished is not None else x
        memory.unfinished = copy_of(x[:, n_whole:])
        if n_whole or not memory.pages:                 # GCA needs a page, even an empty one
            memory.append(*self.model.encoder(x[:, :n_whole].unflatten(1, (self.grid.whole, S))))

    def retrieve(self, group, x):
        """read(q) for the layers of a group: GCA with chunks of the memory.

        Landmark t retrieves for chunk t + 1. The chunk that this piece begins in has been served before.
        """
        model, memory, grid = self.model, self.memory, self.grid
        weights, indices = memory.serving[group]                        # (B, 1, K)
        if grid.whole:
            query = model.query_norms[group](grid.landmarks(x))         # (B, whole, d)
            t = range(grid.first, grid.first + grid.whole)
            with torch.autocast(x.device.type, enabled=False):          # ranking needs full precision
                score = partial(model.scores, group, query)
                new_weights, new_indices = retrieve(
                    score, t, memory.landmarks(), model.config.top_k, model.config.retriever)
            weights = torch.cat([weights, new_weights], dim=1)
            indices = torch.cat([indices, new_indices], dim=1)
            memory.serving[group] = copy_of(weights[:, -1:]), copy_of(indices[:, -1:])
            weights, indices = weights[:, :grid.chunks], indices[:, :grid.chunks]
        pages, indices, ready = memory.serve(group, indices)
        gca, softmax_one = model.gca, model.config.softmax_one

        def read(q):
            if ready:                                                   # chunks come from CPU memory
                ready.wait()
            return grid.to_stream(gca_of_pages(gca, grid.to_chunks(q), pages, weights, indices, softmax_one))

        return read

    def remove_landmarks(self, x):           # (B, N, d) -> (B, n, d)
        grid = self.grid
        if grid.chunks == 1:
            return x[:, :grid.n]
        return grid.to_chunks(x)[:, :, :-1].flatten(1, 2)[:, grid.offset:grid.offset + grid.n]


def copy_of(x):                             # a slice would keep the whole of its tensor in memory
    return x.clone(memory_format=torch.contiguous_format)


def gca_of_pages(gca, q, pages, weights, indices, softmax_one):
    """gca() over chunks in several pages, [(k, v, chunks used)]: its sum over chunks is a sum over pages."""
    B = len(q)
    if len(pages[0][0]) < B:        # an offloaded memory's cache, (1, slots, ..): chunks of all sequences
        q, weights, indices = (x.flatten(0, 1)[None] for x in (q, weights, indices))
    outputs, first = [], 0
    for i, (k, v, n_used) in enumerate(pages):
        here = indices
        if len(pages) > 1:
            is_last = i + 1 == len(pages)       # more may come: a CUDA graph (generate.py) then still holds
            stop = first + (k.shape[1] if is_last else n_used)
            here = torch.where((indices >= first) & (indices < stop), indices - first, -1)
        outputs.append(gca(q, k, v, weights, here, softmax_one))
        first += n_used
    return sum(outputs[1:], outputs[0]).view(B, -1, *q.shape[2:])


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

    def to_chunks(self, x):                  # (B, N, ..) -> (B, C, S, ..); a single chunk: (B, 1, N, ..)
        return self.pad(x, self.S, self.length)

    def to_stream(self, x):                  # and back
        start = self.offset if self.chunks > 1 else 0
        return x.flatten(1, 2)[:, start:start + self.length]

    def landmarks(self, x):                  # (B, N, d) -> (B, whole, d)
        return x[:, self.S - 1 - self.offset::self.S]


# ---------------------------------------------------------------- retrieval, a block of landmarks at a time

def retrieve(score, t, landmarks, top_k, retriever="learned"):
    """model.py's retrieve() for the chunks in the range t: weights, indices (B, n, K).

    landmarks: every chunk's l_c in order, as a list of (B, m, d). score(block, t, c): the scores (B, n, m) of
    chunks t (n,) and a block of landmarks, of chunks c (m,). The best K so far compete with each block's.
    """
    B, n, K, device = len(landmarks[0]), len(t), top_k, landmarks[0].device
    positions = torch.arange(t.start, t.stop, device=device)
    size = max(1, MAX_SCORES // max(1, B * n) // BUNDLE) * BUNDLE
    nothing = torch.empty(B, n, 0, device=device)
    best_ranking, best_scores, best_indices = nothing, nothing, nothing.long()
    start = 0
    for page in landmarks:
        for block in page.split(size, dim=1):
            c = torch.arange(start, start + block.shape[1], device=device)
            scores, ranking = scores_and_ranking(score(block, positions, c), c, retriever)
            if start + block.shape[1] > t.start:                           # not all are earlier chunks
                ranking = ranking.masked_fill(c >= positions[:, None], float("-inf"))
            chosen = first_largest(ranking, K)
            best_ranking = torch.cat([best_ranking, ranking.gather(-1, chosen)], dim=-1)
            best_scores = torch.cat([best_scores, scores.gather(-1, chosen)], dim=-1)
            best_indices = torch.cat([best_indices, chosen + start], dim=-1)
            best_ranking, order = best_ranking.sort(descending=True, stable=True)
            best_ranking, order = best_ranking[..., :K], order[..., :K]
            best_scores, best_indices = best_scores.gather(-1, order), best_indices.gather(-1, order)
            start += block.shape[1]
    empty, n_spare = best_ranking == float("-inf"), K - best_ranking.shape[-1]
    weights, indices = softmax_of_filled(best_scores, empty), best_indices.masked_fill(empty, -1)
    return F.pad(weights, (0, n_spare)), F.pad(indices, (0, n_spare), value=-1)


def first_largest(x, k):
    """Indices of the k largest along the last axis, in order; of equal numbers the first (a stable sort).

    Equal scores are rare. So it chooses one more than asked for, which shows whether the last one chosen has
    equals. Only then it chooses again: those above that one, and of those equal to it the first. Few numbers
    are all sorted, because a CUDA graph (short.py) cannot ask the CPU what to do next.
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
