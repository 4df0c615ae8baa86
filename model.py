"""DRT, the Differentiable Retrieval-based Transformer (Sec. 3 of the paper), as one readable file.

A language model that reads text in chunks. After each chunk it retrieves the K past chunks that should help
most with the *next* chunk, whose tokens then attend to them through Grouped Cross Attention (gca.py). The
retrieval scores weight what is read, so the next-token loss alone trains the retriever.

    tokens -> landmarks inserted -> lower decoder -> chunk encoder -> landmark keys l_c and chunk keys/values
                                        |                                       |
                                        +-> upper decoder, G groups: retrieve, then self-attention, GCA, MLP

Symbols, the same throughout the repository:
    B batch      T text tokens    S tokens in a chunk, its landmark included (S - 1 text tokens + 1 landmark)
    C chunks     d width          K chunks retrieved for each chunk         W sliding window of self-attention
    H heads      D head width     G groups of upper layers; each retrieves once, at its first layer
    N positions of the token stream with its landmarks: chunk c is positions c*S .. c*S + S-1, landmark last
"""
import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from gca import gca
from inference import Memory, as_batches, check_generation, generate, save_atomically  # noqa: F401 (Memory)

RETRIEVERS = "learned", "random", "last"


@dataclass
class DRTConfig:
    vocab_size: int = 256       # text tokens; the landmark is a vector of its own, outside the vocabulary
    n_layer: int = 2            # decoder layers, half lower, half upper (all lower if n_group = 0)
    n_group: int = 1            # G: retrievals of the upper decoder; 0 = sliding-window base LM, no retrieval
    n_encoder: int = 2          # bidirectional layers of the chunk encoder
    n_head: int = 4             # H
    n_kv_head: int = 0          # key/value heads (grouped-query attention); 0 = n_head
    n_embd: int = 64            # d
    chunk_size: int = 16        # S
    top_k: int = 4              # K
    window: int = 16            # W
    softmax_one: bool = True    # softmax-off-by-one in GCA: a token may take nothing from a chunk
    gca_residual: bool = True   # True: GCA's output stays in the residual stream; False: only the MLP sees it
    gumbel: bool = True         # Gumbel noise on the ranking in training: exploration
    retriever: str = "learned"  # or, ablations: "random" or "last": K earlier chunks, weighted equally

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        for name, least in dict(vocab_size=2, n_layer=1, n_group=0, n_encoder=0, n_head=1, n_kv_head=1,
                                n_embd=1, chunk_size=2, top_k=1, window=1).items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd must be a multiple of n_head, got {self.n_embd} and {self.n_head}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head must be a divisor of n_head {self.n_head}, got {self.n_kv_head}")
        if self.n_group and (self.n_layer % 2 or self.n_layer // 2 % self.n_group):
            raise ValueError(f"n_layer must be even and its upper half a multiple of n_group, "
                             f"got n_layer {self.n_layer} and n_group {self.n_group}")
        if self.retriever not in RETRIEVERS:
            raise ValueError(f"retriever must be one of {', '.join(RETRIEVERS)}, got {self.retriever!r}")


# ---------------------------------------------------------------- sliding-window self-attention with ALiBi

def alibi_slopes(n_head):
    """One slope a head, a geometric series (Press et al., 2022): for 8 heads 1/2, 1/4, .., 1/256."""
    base = 2 ** math.floor(math.log2(n_head))
    slopes = [2 ** (-8 * i / base) for i in range(1, base + 1)]
    slopes += [2 ** (-4 * i / base) for i in range(1, 2 * (n_head - base), 2)]  # between them, as ALiBi does
    return torch.tensor(slopes)


def band_bias(n_query, n_key, window, slopes):
    """ALiBi inside the window, -inf outside; queries are the last of the keys: (H, n_query, n_key)."""
    query = torch.arange(n_key - n_query, n_key, device=slopes.device)
    distance = query[:, None] - torch.arange(n_key, device=slopes.device)
    bias = -slopes[:, None, None] * distance
    return bias.masked_fill((distance < 0) | (distance >= window), float("-inf"))


def dense_attention(q, k, v, window, slopes):
    """Every key against every query, then the band: for few queries."""
    bias = band_bias(q.shape[2], k.shape[2], window, slopes).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, bias, enable_gqa=True)


def one_query_attention(q, k, v, bias):
    """The last position's query alone, in generation, where SDPA with a bias keeps most of a GPU waiting.

    q (B, H, 1, D); k, v (B, Hkv, m, D); bias (H, W + 1): band_bias of one query and the longest past.
    """
    q = q.unflatten(1, (k.shape[1], -1))[..., 0, :].float()                             # (B, Hkv, H / Hkv, D)
    scores = q @ k.float().mT * q.shape[-1] ** -0.5 + bias[:, -k.shape[2]:].unflatten(0, (k.shape[1], -1))
    return (scores.softmax(-1).to(v.dtype) @ v).flatten(1, 2)[:, :, None]


def banded_attention(q, k, v, window, slopes):
    """Blocks of W queries against their own block of keys and the one before: exact, and linear in N."""
    B, H, n, D = q.shape
    past = k.shape[2] - n
    first = max(0, window - past)            # queries that have no full window of keys before them
    head = dense_attention(q[:, :, :first], k[:, :, :past + first], v[:, :, :past + first], window, slopes)
    n_block = -(-(n - first) // window)
    tail = n_block * window - (n - first)    # padding that fills the last block

    def key_blocks(x):                       # (B, Hkv, m, D) -> (B * n_block, Hkv, 2W, D)
        x = F.pad(x[:, :, past + first - window:], (0, 0, 0, tail)).unflatten(2, (n_block + 1, window))
        return torch.cat([x[:, :, :-1], x[:, :, 1:]], dim=3).transpose(1, 2).flatten(0, 1)

    q = F.pad(q[:, :, first:], (0, 0, 0, tail)).unflatten(2, (n_block, window)).transpose(1, 2).flatten(0, 1)
    out = dense_attention(q, key_blocks(k), key_blocks(v), window, slopes)
    out = out.view(B, n_block, H, window, D).transpose(1, 2).flatten(2, 3)[:, :, :n - first]
    return torch.cat([head, out], dim=2)


@lru_cache
def compiled_flex_attention():
    """Compiled on first use (importing the compiler takes seconds), once for each kind of shape."""
    torch._dynamo.config.recompile_limit = 64       # past it, flex_attention silently builds the n x m matrix
    return torch.compile(flex_attention)


@lru_cache
def band_blocks(n, m, window, device):
    """flex_attention's block mask: for 128 queries at a time, blocks low .. high of 128 keys are in windows.

    Blocks full_low .. full_high are in the windows of all 128, so they come apart: they need no mask.
    """
    size, past = 128, m - n
    start = torch.arange(0, n, size, device=device, dtype=torch.int32)[:, None] + past
    low = (start - window + 1).clamp(min=0) // size
    high = (start + size - 1).clamp(max=m - 1) // size
    full_low = (start + size - window).clamp(min=0).add(size - 1) // size
    full_high = torch.maximum((start + 1) // size - 1, full_low - 1)
    i = torch.arange(-(-m // size), device=device, dtype=torch.int32)
    before = full_low - low                                 # masked blocks that come before the full ones
    masked = torch.where(i < before, low + i, full_high + 1 + i - before)

    def listed(count, blocks):                              # only the first `count` are looked at
        return count[None, None, :, 0], blocks.clamp(max=len(i) - 1)[None, None]

    def in_window(b, h, i, j):
        return (past + i >= j) & (past + i - j < window)

    full = listed(full_high - full_low + 1, full_low + i) if window >= 2 * size - 1 else ()
    return BlockMask.from_kv_blocks(*listed(before + high - full_high, masked), *full, BLOCK_SIZE=size,
                                    mask_mod=in_window, seq_lengths=(n, m))


def fused_attention(q, k, v, window, slopes):
    """The same in one kernel (CUDA): only the blocks inside the band are read."""
    past, group = k.shape[2] - q.shape[2], q.shape[1] // k.shape[1]
    if group > 1:                                  # its own GQA does not compile for every shape (torch 2.11)
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)

    def alibi(score, b, h, i, j):
        return score - slopes[h] * (past + i - j)

    mask = band_blocks(q.shape[2], k.shape[2], window, q.device)
    tiles = dict(fwd_BLOCK_M=64, fwd_BLOCK_N=64)            # 0.47 ms for 0.57: 4 x 16K tokens, 12 heads of 64
    return compiled_flex_attention()(q, k, v, score_mod=alibi, block_mask=mask, kernel_options=tiles)


def window_attention(q, k, v, window, slopes):
    """Causal self-attention over the last W positions, with ALiBi (Sec. 3; no rotary embedding).

    q (B, H, n, D); k, v (B, Hkv, m, D), m >= n: the queries are the last n of the m positions. Any n >= 1.
    """
    if q.shape[2] <= window:
        return dense_attention(q, k, v, window, slopes)
    fused = q.is_cuda and q.shape[-1] >= 16                                    # flex_attention takes no less
    return (fused_attention if fused else banded_attention)(q, k, v, window, slopes)


# ---------------------------------------------------------------- layers

class SelfAttention(nn.Module):
    """Multi-head attention of a stream to its window (causal), or inside each chunk (bidirectional)."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, self.window = config.n_head, config.n_kv_head, config.window
        self.head_dim = config.n_embd // config.n_head
        width = (config.n_head + 2 * config.n_kv_head) * self.head_dim
        self.qkv = nn.Linear(config.n_embd, width, bias=False)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)
        slopes = alibi_slopes(config.n_head)
        self.register_buffer("slopes", slopes, persistent=False)
        bias = band_bias(1, self.window + 1, self.window, slopes)[:, 0]
        self.register_buffer("bias", bias, persistent=False)

    def heads(self, x):                      # (B, n, d) -> (B, H, n, D), (B, Hkv, n, D) twice
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return qkv.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=1)

    def forward(self, x, past=None):
        """Causal, sliding window. past: (k, v) of the W positions before x; returns out, and k and v."""
        q, k, v = self.heads(x)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        if past is not None and x.shape[1] == 1:
            out = one_query_attention(q, k, v, self.bias)
        else:
            out = window_attention(q, k, v, self.window, self.slopes)
        return self.out(out.transpose(1, 2).flatten(2)), (k, v)

    def inside(self, x):
        """Bidirectional, over all of x: the chunk encoder calls it with chunks as the batch."""
        q, k, v = self.heads(x)
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.out(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU, as wide as makes it cost what a 4d MLP costs."""

    def __init__(self, config):
        super().__init__()
        hidden = -(-config.n_embd * 8 // (3 * 64)) * 64
        self.gate_up = nn.Linear(config.n_embd, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, config.n_embd, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class CrossAttention(nn.Module):
    """GCA's two projections. Keys and values come ready-made from the chunk encoder, shared by all layers."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.softmax_one = config.n_head, config.softmax_one
        self.query = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, grid, weights, pages, indices, ready=None):
        """x (B, N, d): the rows of each chunk of the grid attend to the K chunks retrieved for it.

        weights, indices (B, C, K); the chunks are in pages of k and v, once `ready` (a CUDA event) is.
        """
        q = grid.to_chunks(self.query(x).unflatten(-1, (self.n_head, -1)))              # (B, C, S, H, D)
        if ready:
            ready.wait()
        out = attend(q, pages, weights, indices, self.softmax_one)
        return self.out(grid.to_stream(out).flatten(2))


def attend(q, pages, weights, indices, softmax_one):
    """gca() over chunks in several pages, [(k, v)]: its sum over chunks is a sum over pages."""
    B = len(q)
    if len(pages[0][0]) < B:                       # one page for the whole batch, as if it were one sequence
        q, weights, indices = (x.flatten(0, 1)[None] for x in (q, weights, indices))
    out, first = [], 0
    for k, v in pages:
        here = indices
        if len(pages) > 1:
            here = torch.where((indices >= first) & (indices < first + k.shape[1]), indices - first, -1)
        out.append(gca(q, k, v, weights, here, softmax_one))
        first += k.shape[1]
    return sum(out[1:], out[0]).view(B, -1, *q.shape[2:])


class Block(nn.Module):
    """Pre-norm decoder layer: y = x + SA(x);  z = y + GCA(y) in upper layers;  out = z + MLP(z)  (Sec. 3)."""

    def __init__(self, config, upper=False):
        super().__init__()
        self.gca_residual = config.gca_residual
        self.attention, self.mlp = SelfAttention(config), MLP(config)
        self.norm1, self.norm2 = nn.RMSNorm(config.n_embd, 1e-5), nn.RMSNorm(config.n_embd, 1e-5)
        if upper:
            self.cross, self.norm_cross = CrossAttention(config), nn.RMSNorm(config.n_embd, 1e-5)

    def forward(self, x, past=None, retrieved=None):
        out, past = self.attention(self.norm1(x), past)
        y = z = x + out
        if retrieved is not None:
            z = y + self.cross(self.norm_cross(y), *retrieved)
        return (z if self.gca_residual else y) + self.mlp(self.norm2(z)), past


class ChunkEncoder(nn.Module):
    """Bidirectional layers inside each chunk; no positions. The landmark's output is the chunk's key l_c."""

    def __init__(self, config):
        super().__init__()
        self.norm_in, self.norm_out = nn.RMSNorm(config.n_embd, 1e-5), nn.RMSNorm(config.n_embd, 1e-5)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_encoder))
        self.head_dim = config.n_embd // config.n_head
        width = config.n_kv_head * self.head_dim
        self.key, self.value = (nn.Linear(config.n_embd, width, bias=False) for _ in "kv")

    def forward(self, x):
        """x (B, C, S, d) -> landmarks (B, C, d), k and v (B, C, S-1, Hkv, D).

        The paper gives the landmark's own row a zero key and value: exp(0) = 1 in the denominator and nothing
        in the sum, which is softmax-off-by-one. gca() has that built in, so only the text rows are kept.
        """
        B, C = x.shape[:2]
        x = self.norm_in(x).flatten(0, 1)
        for layer in self.layers:
            x = x + layer.attention.inside(layer.norm1(x))
            x = x + layer.mlp(layer.norm2(x))
        x = self.norm_out(x).unflatten(0, (B, C))
        k, v = (f(x[:, :, :-1]).unflatten(-1, (-1, self.head_dim)) for f in (self.key, self.value))
        return x[:, :, -1], k, v


# ---------------------------------------------------------------- chunks and retrieval

class Grid:
    """Where n text tokens, read after `before` others, fall on the grid of chunks: pure geometry."""

    def __init__(self, chunk_size, before, n):
        text = chunk_size - 1
        self.S, self.n = chunk_size, n
        self.first, self.offset = divmod(before, text)      # chunk of the first token, its row in that chunk
        self.whole = (self.offset + n) // text              # chunks that these tokens complete
        self.chunks = -(-(self.offset + n) // text)         # chunks that they touch
        self.length = n + self.whole                        # N: positions of the stream, landmarks included

    def place(self, x, rows, length):
        """(B, length, ...) -> (B, C, rows, ...): zeros before the first token's row and after the last's.

        A single chunk is left without: (B, 1, length, ...).
        """
        if self.chunks == 1:
            return x[:, None]
        after = self.chunks * rows - self.offset - length
        if self.offset or after:                        # F.pad copies even where there is nothing to add
            x = F.pad(x, (0, 0) * (x.dim() - 2) + (self.offset, after))
        return x.unflatten(1, (self.chunks, rows))

    def to_chunks(self, x):                  # (B, N, ...) -> (B, C, S, ...)
        return self.place(x, self.S, self.length)

    def to_stream(self, x):                  # (B, C, S, ...) -> (B, N, ...)
        start = self.offset if self.chunks > 1 else 0
        return x.flatten(1, 2)[:, start:start + self.length]

    def insert_landmarks(self, x, landmark):  # (B, n, d), (d,) -> (B, N, d): one behind each completed chunk
        x = self.place(x, self.S - 1, self.n)
        return self.to_stream(torch.cat([x, landmark.to(x.dtype).expand(*x.shape[:2], 1, -1)], dim=2))

    def landmarks(self, x):                  # (B, N, d) -> (B, whole, d)
        return x[:, self.S - 1 - self.offset::self.S]

    def text(self, x):                       # (B, N, d) -> (B, n, d): the stream without its landmarks
        if self.chunks == 1:
            return x[:, :self.n]
        return self.to_chunks(x)[:, :, :-1].flatten(1, 2)[:, self.offset:self.offset + self.n]


SEGMENT = dict(cpu=2 ** 20, cuda=2 ** 25)   # numbers in the residual stream that DRT.read takes at once, and
MAX_SCORES = 2 ** 26                # retrieval scores held at once: both bound the memory of reading
BUNDLE = 64                         # scores of which the best stands for all, at first


def retrieve(query, landmarks, first, top_k, gumbel=False, retriever="learned"):
    """Causal retrieval (Sec. 3): for each chunk t the K strictly earlier chunks that score highest.

    query (B, n, d): chunks first .. first+n-1 at their landmarks; landmarks: every chunk's l_c in order, as a
    list of (B, M, d). Scores r_t,c = q_t . l_c / sqrt(d). Gumbel noise takes part in the ranking alone: the
    weights are the softmax of the noiseless scores. retriever: as in DRTConfig. Returns weights and indices
    (B, n, K), index -1 where a slot is empty. Scores are computed a block at a time; the best K so far
    compete with each block's best K.
    """
    (B, n, d), start = query.shape, 0
    t = torch.arange(first, first + n, device=query.device)[:, None]
    size = max(1, MAX_SCORES // max(1, B * n) // BUNDLE) * BUNDLE
    best = [torch.empty(B, n, 0, device=query.device)] * 2 + [t.new_empty(B, n, 0)]
    for block in (block for page in landmarks for block in page.split(size, dim=1)):
        scores = inner_products(query, block)                                          # (B, n, M)
        chunk = torch.arange(start, start + block.shape[1], device=query.device)
        if retriever != "learned":
            scores = torch.zeros_like(scores)
        ranking = scores.detach() if retriever != "last" else scores + chunk
        if start + block.shape[1] > first:                                     # not all are earlier chunks
            ranking = ranking.masked_fill(chunk >= t, float("-inf"))
        if retriever == "random" or gumbel and retriever == "learned":
            ranking = ranking * d ** -0.5 - torch.empty_like(ranking).exponential_().log()
        chosen = top(ranking, top_k)
        candidates = ranking.gather(-1, chosen), scores.gather(-1, chosen), chosen + start
        ranking, *rest = (torch.cat(pair, dim=-1) for pair in zip(best, candidates, strict=True))
        ranking, order = ranking.topk(min(top_k, ranking.shape[-1]))
        best = [ranking, *(x.gather(-1, order) for x in rest)]
        start += block.shape[1]
    _, scores, indices = (F.pad(x, (0, top_k - x.shape[-1])) for x in best)
    empty = F.pad(best[0], (0, top_k - best[0].shape[-1]), value=float("-inf")) == float("-inf")
    weights = (scores * d ** -0.5).masked_fill(empty, torch.finfo(scores.dtype).min).softmax(-1)
    return weights.masked_fill(empty, 0), indices.masked_fill(empty, -1)


def inner_products(query, landmarks):
    """(B, n, d), (B, M, d) -> (B, n, M) float32, as exact as the inputs."""
    if query.is_cuda and query.dtype == landmarks.dtype != torch.float32 and not query.requires_grad:
        return torch.bmm(query, landmarks.mT, out_dtype=torch.float32)      # low precision in, none lost
    return query.float() @ landmarks.float().mT


def top(x, k):
    """Indices of the k largest along the last axis (of all, if there are fewer).

    Of many numbers, first the k bundles with the largest maxima: no other can hold one of the k largest. A
    bundle is a column of the numbers written in rows: a GPU finds its maximum faster than a row's.
    """
    n = x.shape[-1]
    if n < max(64, k) * BUNDLE:
        return x.topk(min(k, n)).indices
    if n % BUNDLE:
        x = F.pad(x, (0, -n % BUNDLE), value=float("-inf"))
    table = x.unflatten(-1, (BUNDLE, -1))
    which = table.amax(-2).topk(k).indices                                             # (.., k)
    inside = table.gather(-1, which[..., None, :].expand(*which.shape[:-1], BUNDLE, k)).flatten(-2)
    best = inside.topk(k).indices
    best = which.gather(-1, best % k) + best // k * table.shape[-1]
    return best.clamp(max=n - 1)                            # padding is chosen only where all others are -inf


# ---------------------------------------------------------------- the loss over a large vocabulary

LOSS_ROWS = 8192                    # positions whose logits are held at once


def logits_loss(logits, labels, vocab_size):
    """Cross-entropies (n,), 0 where labels are -100, and their gradient in the logits (n, padded)."""
    column, has_label = torch.arange(logits.shape[1], device=logits.device), labels >= 0
    dtype, logits = logits.dtype, logits.float().masked_fill(column >= vocab_size, float("-inf"))
    total = logits.logsumexp(1, keepdim=True)
    picked = logits.gather(1, labels.clamp(min=0)[:, None])
    gradient = (logits - total).exp() - (column == labels[:, None]).float()
    return (total - picked)[:, 0] * has_label, (gradient * has_label[:, None]).to(dtype)


compiled_logits_loss = lru_cache(lambda: torch.compile(logits_loss, dynamic=False))


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of x @ weight.T, some rows at a time: all logits together would not fit the memory.

    x (n, d), weight (vocab_size, d), labels (n,), -100 = no label. The gradients are computed on the way,
    while a block's logits are there, so no product is computed twice. The vocabulary is padded to a multiple
    of 64: GPT-2's 50,257 is odd, and matrix products of odd sizes take four times as long.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda", cast_inputs=torch.bfloat16)
    def forward(ctx, x, weight, labels):
        vocab_size, count = len(weight), (labels >= 0).sum().clamp(min=1)
        padded = F.pad(weight, (0, 0, 0, -vocab_size % 64))
        total = torch.zeros((), device=x.device)
        dx, dweight = torch.empty_like(x), torch.zeros_like(padded, dtype=torch.float32)
        step = compiled_logits_loss() if x.is_cuda else logits_loss
        for x_rows, dx_rows, label_rows in zip(*(y.split(LOSS_ROWS) for y in (x, dx, labels)), strict=True):
            losses, dlogits = step(x_rows @ padded.T, label_rows, vocab_size)
            total += losses.sum()
            if ctx.needs_input_grad[0]:                            # not in validation
                torch.mm(dlogits, padded, out=dx_rows)
                dweight += dlogits.T @ x_rows
        ctx.save_for_backward(dx, dweight[:vocab_size], count)
        return total / count

    @staticmethod
    @torch.amp.custom_bwd(device_type="cuda")
    def backward(ctx, upstream):
        dx, dweight, count = ctx.saved_tensors
        return dx * (upstream / count), dweight * (upstream / count), None


# ---------------------------------------------------------------- the model

class DRT(nn.Module):
    """The language model; n_group = 0 makes it the sliding-window base LM, without landmarks or retrieval."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        n_lower = config.n_layer // 2 if config.n_group else config.n_layer
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)        # tied: also the output head
        self.layers = nn.ModuleList(Block(config, upper=i >= n_lower) for i in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, 1e-5)
        self.lower, self.groups = range(n_lower), []
        if config.n_group:
            size = (config.n_layer - n_lower) // config.n_group
            self.groups = [range(i, i + size) for i in range(n_lower, config.n_layer, size)]
            self.landmark = nn.Parameter(torch.empty(config.n_embd))
            self.encoder = ChunkEncoder(config)
            self.query_norms = nn.ModuleList(nn.RMSNorm(config.n_embd, 1e-5) for _ in self.groups)
        for name, p in self.named_parameters():
            if p.dim() == 2 or name == "landmark":
                nn.init.normal_(p, std=p.shape[-1] ** -0.5)                    # fan_in ** -0.5

    def forward(self, tokens, targets=None, at=None):
        """Next-token logits, and the mean cross-entropy where there are targets.

        tokens (B, T), any T >= 1, without landmarks; targets (B, T), -100 = no label.
        at (B, T) bool: positions whose logits are wanted; they are (number, vocab_size) then. Default: all.
        """
        hidden = self.hidden(tokens)
        logits = self.head(hidden if at is None else hidden[at])
        if targets is None:
            return logits, None
        targets = targets if at is None else targets[at]
        return logits, F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())

    def loss(self, tokens, targets):
        """The loss that forward(tokens, targets) returns, without holding the logits of all positions."""
        hidden = self.hidden(tokens).flatten(0, 1)
        return LinearCrossEntropy.apply(hidden, self.embedding.weight, targets.flatten())

    @torch.no_grad()
    def read(self, tokens, memory, at=None):
        """Continue reading from where the memory stands, by any number of tokens; logits as in forward.

        tokens (B, n); at: as in forward, or "last": the logits after the last token alone, (B, vocab_size).
        A long text is read in segments, so that all memory but the chunks' is bounded. ValueError if memory
        and tokens do not go together; whatever goes wrong leaves the memory as it was.
        """
        memory.check(self, tokens)
        before = memory.snapshot()
        try:
            return self.read_segments(tokens, memory, at)
        except BaseException:
            memory.restore(before)
            raise

    def read_segments(self, tokens, memory, at):
        size = self.segment(len(tokens))
        pieces = tokens.split(size, dim=1)
        if isinstance(at, str):
            for piece in pieces:
                hidden = self.hidden(piece, memory)[:, -1]
            return self.head(hidden)
        if at is None:
            return self.head(torch.cat([self.hidden(piece, memory) for piece in pieces], dim=1))
        marks = at.split(size, dim=1)
        hidden = torch.cat([self.hidden(x, memory)[mark] for x, mark in zip(pieces, marks, strict=True)])
        rows = torch.cat([mark.nonzero()[:, 0] for mark in marks])
        return self.head(hidden[rows.argsort(stable=True)])                 # segment by segment -> row by row

    def segment(self, batch_size):
        """Tokens of each sequence that read() takes at once: whole chunks, so that all segments are alike."""
        text = self.config.chunk_size - 1
        size = SEGMENT[self.embedding.weight.device.type] // (batch_size * self.config.n_embd)
        return max(1, size // text) * text

    def head(self, hidden):
        return F.linear(hidden, self.embedding.weight)

    def hidden(self, tokens, memory=None):
        """The data flow of Sec. 3: tokens (B, n) -> last layer's output, normalized (B, n, d)."""
        grid = Grid(self.config.chunk_size, memory.length if memory else 0, tokens.shape[1])
        x = self.embedding(tokens)
        if memory:
            memory.length += grid.n
        if not self.groups:
            return self.norm(self.decode(self.lower, x, memory))
        x = grid.insert_landmarks(x, self.landmark)                            # (B, N, d)
        x = self.decode(self.lower, x, memory)
        chunks = self.encode(x, grid, memory)
        for g, layers in enumerate(self.groups):
            retrieved = self.retrieve(g, x, chunks, grid, memory)
            x = self.decode(layers, x, memory, (grid, *retrieved))
        return grid.text(self.norm(x))

    def decode(self, layers, x, memory, retrieved=None):
        """Run decoder layers (a range) over the stream, each continuing from its window in memory, if any."""
        for i in layers:
            x, kv = self.layers[i](x, memory.window[i] if memory else None, retrieved)
            if memory:                                         # a copy: a slice would keep the whole stream's
                memory.window[i] = tuple(y[:, :, -self.config.window:].contiguous() for y in kv)
        return x

    def encode(self, x, grid, memory):
        """The chunks that this stream completes: their (landmarks, k, v), which memory gets, if any."""
        if memory:
            if memory.unfinished is not None and memory.unfinished.shape[1]:
                x = torch.cat([memory.unfinished, x], dim=1)
            memory.unfinished = x[:, grid.whole * grid.S:].contiguous()
            if not grid.whole and memory.pages:
                return None
        chunks = self.encoder(x[:, :grid.whole * grid.S].unflatten(1, (grid.whole, grid.S)))
        if memory:
            memory.append(*chunks)
        return chunks

    def retrieve(self, g, x, chunks, grid, memory):
        """Group g's retrieved chunks for every chunk of the grid: landmark t retrieves for chunk t + 1.

        Returns what CrossAttention takes: weights (B, C, K), pages of chunks, indices (B, C, K), event.
        """
        config, explore = self.config, self.config.gumbel and self.training
        no_slot = x.new_zeros(len(x), 1, config.top_k, dtype=torch.float32)
        served = memory.serving[g] if memory else (no_slot, no_slot.long() - 1)
        if grid.whole:
            landmarks = memory.landmarks() if memory else chunks[:1]
            with torch.autocast(x.device.type, enabled=False):                 # ranking needs full precision
                new = retrieve(self.query_norms[g](grid.landmarks(x)), landmarks, grid.first, config.top_k,
                               explore, config.retriever)
            served = [torch.cat(pair, dim=1) for pair in zip(served, new, strict=True)]
            if memory:
                memory.serving[g] = tuple(y[:, -1:].contiguous() for y in served)
            served = [y[:, :grid.chunks] for y in served]
        weights, indices = served
        pages, indices, ready = memory.serve(g, indices) if memory else ([chunks[1:]], indices, None)
        return weights, pages, indices, ready

    def generate(self, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop=(), pad=0,
                 memory=None, offload=False):
        """Yield the tokens that follow each prompt, (B,) at a time; -1 for a sequence that has ended.

        prompt          (B, n) tokens, or a list of B prompts of different lengths
        temperature     0: always the likeliest token; otherwise torch.manual_seed makes it repeatable
        top_k, top_p    sample among the k likeliest; among the likeliest that hold top_p of the probability
        stop            tokens that end a sequence (they are yielded)
        memory          what was read before the prompt; it reads prompt and answer too: fork() to keep it
        offload         as in Memory, where memory is None

        A prompt is padded on the left, with token `pad`, so that its last token opens a chunk: all of the
        question lies in chunks whose landmarks have retrieved when the first new token is predicted.
        """
        how = temperature, top_k, top_p
        device = self.embedding.weight.device
        prompts = [torch.as_tensor(row, dtype=torch.long, device=device) for row in prompt]
        check_generation(prompts, self.config.vocab_size, max_new_tokens, *how, stop, pad)
        batches = as_batches(self, prompts, pad, memory, offload)
        return generate(self, batches, max_new_tokens, how, stop)


# ---------------------------------------------------------------- checkpoints

def save_checkpoint(path, model, **state):
    """Write model and state, atomically; the checkpoint that was there stays as NAME.prev.pt."""
    path = Path(path)
    save_atomically(path, dict(config=asdict(model.config), model=model.state_dict(), **state),
                    path.with_suffix(f".prev{path.suffix}"))


def load_checkpoint(path, device):
    """The model of a checkpoint, and all that was saved with it; ValueError if it is not one of ours."""
    if not Path(path).is_file():
        raise ValueError(f"no checkpoint at {path}: train one with python train.py")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        model = DRT(DRTConfig(**state["config"])).to(device)
        model.load_state_dict(state["model"])
    except Exception as error:                  # whatever a foreign or damaged file makes torch raise
        raise ValueError(f"{path} is damaged or not a checkpoint of train.py") from error
    return model, state
