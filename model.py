"""DRT, the Differentiable Retrieval-based Transformer (Sec. 3), as one readable file.

A language model that reads text in chunks. After each chunk it retrieves the K past chunks that should help
most with the *next* chunk, whose tokens then attend to them by Grouped Cross Attention (gca.py). Retrieval
scores weight what is read, so the next-token loss alone trains the retriever.

    tokens -> insert landmarks -> lower decoder -> chunk encoder -> landmark keys l_c, chunk keys and values
                                       |                                     |
                                       +--> upper decoder, G groups: retrieve, then self-attention, GCA, MLP

Shapes: B batch, T text tokens, N positions of text and landmarks, C chunks of S positions (S - 1 text tokens
and a landmark; the last chunk may be incomplete), K chunks retrieved for each chunk, W sliding window,
d width, H heads of width D, G groups of upper layers.

fast/ swaps self.gca, self.window_attention and self.cross_entropy for faster twins, and reads without end.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from gca import gca, require

RETRIEVERS = "learned", "random", "last"


@dataclass
class DRTConfig:
    vocab_size: int = 256       # text tokens; the landmark is a vector of its own, outside the vocabulary
    n_layer: int = 2            # decoder layers, half lower, half upper (all lower if n_group = 0)
    n_group: int = 1            # G: retrievals of the upper decoder; 0 = sliding-window base LM, no retrieval
    n_encoder: int = 2          # bidirectional layers of the chunk encoder
    n_head: int = 4             # H: heads
    n_kv_head: int = 0          # key/value heads (grouped-query attention); 0 = n_head
    n_embd: int = 64            # d: width
    chunk_size: int = 16        # S: positions of a chunk, its landmark included
    top_k: int = 4              # K: chunks retrieved for each chunk
    window: int = 16            # W: positions of the sliding window
    softmax_one: bool = True    # softmax-off-by-one in GCA: a token may take nothing from a chunk
    gca_residual: bool = True   # True: GCA's output stays in the residual stream; False: only the MLP sees it
    gumbel: bool = True         # Gumbel noise on the ranking in training: exploration
    recency: bool = False       # not in the paper: scores fall with the log of the distance (learned)
    retriever: str = "learned"  # ablations: random, or last: the last K chunks, weighted equally

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        for name, least in dict(vocab_size=2, n_layer=1, n_group=0, n_encoder=0, n_head=1, n_kv_head=1,
                                n_embd=1, chunk_size=2, top_k=1, window=1).items():
            value, most = getattr(self, name), 1000 if name in ("n_layer", "n_encoder") else 10 ** 7
            require(value >= least, f"{name} must be at least {least}, got {value}")
            require(value <= most, f"{name} must be at most {most}, got {value}")
        d, H, Hkv = self.n_embd, self.n_head, self.n_kv_head
        require(d % H == 0, f"n_embd must be a multiple of n_head, got {d} and {H}")
        require(H % Hkv == 0, f"n_kv_head must be a divisor of n_head {H}, got {Hkv}")
        require(self.n_group == 0 or self.n_layer % (2 * self.n_group) == 0,
                f"n_layer must be a multiple of 2 * n_group, got {self.n_layer} and {self.n_group}")
        require(self.retriever in RETRIEVERS,
                f"retriever must be one of {', '.join(RETRIEVERS)}, got {self.retriever!r}")


# ---------------------------------------------------------------- sliding-window self-attention with ALiBi

def alibi_slopes(n_head):
    """One slope for each head, a geometric series (Press et al., 2022): for 8 heads 1/2, 1/4, .., 1/256."""
    base = 2 ** math.floor(math.log2(n_head))
    slopes = [2 ** (-8 * i / base) for i in range(1, base + 1)]
    slopes += [2 ** (-4 * i / base) for i in range(1, 2 * (n_head - base), 2)]  # n_head is no power of 2
    return torch.tensor(slopes)


def band_bias(n_query, n_key, window, slopes):
    """ALiBi inside the window, -inf outside; the queries are the last of the keys: (H, n_query, n_key)."""
    query = torch.arange(n_key - n_query, n_key, device=slopes.device)
    key = torch.arange(n_key, device=slopes.device)
    distance = query[:, None] - key
    bias = -slopes[:, None, None] * distance
    return bias.masked_fill((distance < 0) | (distance >= window), float("-inf"))


def window_attention(q, k, v, window, slopes):
    """Causal attention to the last W positions (Sec. 3): q (B, H, N, D); k, v (B, Hkv, N, D) -> (B, H, N, D).

    Each block of W queries attends to its own block of keys and the one before: exact, and linear in N.
    """
    B, _, N, _ = q.shape
    n = min(N, window)                                      # the first block has no block before it
    bias = band_bias(n, n, window, slopes).to(q.dtype)                          # (H, n, n)
    first = F.scaled_dot_product_attention(q[:, :, :n], k[:, :, :n], v[:, :, :n], bias, enable_gqa=True)
    if N <= window:
        return first

    def blocks(x):                           # (B, H, n * W, D) -> (B * n, H, W, D)
        return x.unflatten(2, (-1, window)).transpose(1, 2).flatten(0, 1)

    bias = band_bias(window, 2 * window, window, slopes).to(q.dtype)            # (H, W, 2W)
    q, k, v = (F.pad(x, (0, 0, 0, -N % window)) for x in (q, k, v))             # to whole blocks
    k, v = (torch.cat([blocks(x[:, :, :-window]), blocks(x[:, :, window:])], dim=2) for x in (k, v))
    rest = F.scaled_dot_product_attention(blocks(q[:, :, window:]), k, v, bias, enable_gqa=True)
    rest = rest.unflatten(0, (B, -1)).transpose(1, 2).flatten(2, 3)
    return torch.cat([first, rest], dim=2)[:, :, :N]


# ---------------------------------------------------------------- layers

class SelfAttention(nn.Module):
    """Causal over the sliding window, or bidirectional over all of x (in the chunk encoder)."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, self.window = config.n_head, config.n_kv_head, config.window
        self.head_dim = config.n_embd // config.n_head
        width = (config.n_head + 2 * config.n_kv_head) * self.head_dim
        self.qkv = nn.Linear(config.n_embd, width, bias=False)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.register_buffer("slopes", alibi_slopes(config.n_head), persistent=False)
        self.window_attention = window_attention

    def heads(self, x):                      # (B, N, d) -> q (B, H, N, D); k, v (B, Hkv, N, D)
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return qkv.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=1)

    def forward(self, x, causal=True):       # (B, N, d) -> (B, N, d)
        q, k, v = self.heads(x)
        if causal:
            out = self.window_attention(q, k, v, self.window, self.slopes)
        else:
            out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.out(out.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """GCA with its two projections. Keys and values come from the chunk encoder, the same for all layers."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.softmax_one = config.n_head, config.softmax_one
        self.query = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.gca = gca

    def forward(self, x, k, v, weights, indices):
        """x (B, N, d); k, v (B, C, S - 1, Hkv, D); weights, indices (B, C, K) -> (B, N, d)."""
        q = to_chunks(self.query(x).unflatten(-1, (self.n_head, -1)), k.shape[2] + 1)       # (B, C, S, H, D)
        out = self.gca(q, k, v, weights, indices, self.softmax_one)
        return self.out(out.flatten(3).flatten(1, 2)[:, :x.shape[1]])


class MLP(nn.Module):
    """SwiGLU, 8/3 d wide, so that it costs as much as a plain MLP of width 4d."""

    def __init__(self, config):
        super().__init__()
        hidden = math.ceil(config.n_embd * 8 / 3 / 64) * 64
        self.gate_up = nn.Linear(config.n_embd, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, config.n_embd, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm decoder layer: y = x + SA(x);  z = y + GCA(y) in upper layers;  out = z + MLP(z)  (Sec. 3)."""

    def __init__(self, config, upper=False):
        super().__init__()
        self.gca_residual = config.gca_residual
        self.attention, self.mlp = SelfAttention(config), MLP(config)
        self.norm1, self.norm2 = nn.RMSNorm(config.n_embd, 1e-5), nn.RMSNorm(config.n_embd, 1e-5)
        if upper:
            self.cross, self.norm_cross = CrossAttention(config), nn.RMSNorm(config.n_embd, 1e-5)

    def forward(self, x, retrieved=None):
        y = z = x + self.attention(self.norm1(x))
        if retrieved is not None:
            z = y + self.cross(self.norm_cross(y), *retrieved)
        residual = z if self.gca_residual else y            # y in the authors' released code
        return residual + self.mlp(self.norm2(z))


class ChunkEncoder(nn.Module):
    """Bidirectional layers inside each chunk, no positions. The landmark's output is the chunk's key l_c.

    It uses the parts of a Block with bidirectional attention in place of the window.
    """

    def __init__(self, config):
        super().__init__()
        self.norm_in, self.norm_out = nn.RMSNorm(config.n_embd, 1e-5), nn.RMSNorm(config.n_embd, 1e-5)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_encoder))
        self.head_dim = config.n_embd // config.n_head
        self.key = nn.Linear(config.n_embd, config.n_kv_head * self.head_dim, bias=False)
        self.value = nn.Linear(config.n_embd, config.n_kv_head * self.head_dim, bias=False)

    def begin_as_identity(self):             # not in the paper: at first, no layer adds anything
        for layer in self.layers:
            nn.init.zeros_(layer.attention.out.weight)
            nn.init.zeros_(layer.mlp.down.weight)

    def forward(self, x):
        """x (B, C, S, d) -> landmarks (B, C, d), k and v (B, C, S - 1, Hkv, D).

        The paper gives the landmark's own row a zero key and value: exp(0) = 1 in the denominator and nothing
        in the sum, which is softmax-off-by-one. gca() has that built in, so only the text rows are kept.
        """
        B, C = x.shape[:2]
        x = self.norm_in(x).flatten(0, 1)                   # chunks are the batch
        for layer in self.layers:
            x = x + layer.attention(layer.norm1(x), causal=False)
            x = x + layer.mlp(layer.norm2(x))
        x = self.norm_out(x).unflatten(0, (B, C))
        text, landmarks = x[:, :, :-1], x[:, :, -1]
        k = self.key(text).unflatten(-1, (-1, self.head_dim))
        v = self.value(text).unflatten(-1, (-1, self.head_dim))
        return landmarks, k, v


# ---------------------------------------------------------------- retrieval

def log_distance(t, c, near):
    """log of the distance of chunks c before chunks t, in units of `near` chunks; 0 up to that distance."""
    return ((t - c).clamp(min=near) / near).log()


def retrieval_scores(query, landmarks, decay=None, near=1):
    """r_t,c = q_t . l_c / sqrt(d): query, landmarks (B, C, d) -> (B, C, C) of chunks t and c, float32.

    decay (DRTConfig.recency): a scalar; it times the log of the distance beyond `near` chunks is subtracted.
    """
    scores = query.float() @ landmarks.float().mT * query.shape[-1] ** -0.5
    if decay is not None:
        chunk = torch.arange(scores.shape[1], device=scores.device)
        scores = scores - decay * log_distance(chunk[:, None], chunk, near)
    return scores


def retrieve(query, landmarks, top_k, explore=False, retriever="learned", decay=None, near=1):
    """For each chunk t, the K strictly earlier chunks c with the highest retrieval_scores() r_t,c.

    query, landmarks (B, C, d) -> weights, indices (B, C, K); index -1 where a slot is empty. explore: Gumbel
    noise changes which chunks are chosen, but not their weights. retriever: as in DRTConfig.
    """
    scores = retrieval_scores(query, landmarks, decay, near)                    # (B, C, C)
    chunk = torch.arange(scores.shape[1], device=query.device)
    if retriever != "learned":
        scores = torch.zeros_like(scores)                   # so that all weigh the same
    ranking = scores.detach() + chunk if retriever == "last" else scores.detach()
    if retriever == "random" or (explore and retriever == "learned"):
        ranking = ranking - torch.empty_like(ranking).exponential_().log()      # plus Gumbel noise
    ranking = ranking.masked_fill(chunk >= chunk[:, None], float("-inf"))
    best, indices = ranking.sort(descending=True, stable=True)      # of equal scores, the earlier chunk
    best, indices = best[..., :top_k], indices[..., :top_k]
    empty = best == float("-inf")                           # fewer than K chunks are earlier
    weights = scores.gather(-1, indices).masked_fill(empty, -1e30).softmax(-1).masked_fill(empty, 0)
    n_spare = top_k - indices.shape[-1]
    return F.pad(weights, (0, n_spare)), F.pad(indices.masked_fill(empty, -1), (0, n_spare), value=-1)


# ---------------------------------------------------------------- the model

def to_chunks(x, size):                      # (B, n, ..) -> (B, chunks, size, ..): zeros fill the last one
    padding = -x.shape[1] % size
    if padding:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, padding))
    return x.unflatten(1, (-1, size))


def cross_entropy(hidden, weight, targets):
    """Mean cross-entropy of logits hidden @ weight.T; hidden (B, T, d), targets (B, T), -100 = no label."""
    return F.cross_entropy(F.linear(hidden, weight).flatten(0, 1).float(), targets.flatten())


class DRT(nn.Module):
    """The language model; n_group = 0 makes it the sliding-window base LM, without landmarks or retrieval."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.n_lower = config.n_layer // 2 if config.n_group else config.n_layer
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)         # tied: also the output head
        self.layers = nn.ModuleList(Block(config, upper=i >= self.n_lower) for i in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, 1e-5)
        if config.n_group:
            self.landmark = nn.Parameter(torch.empty(config.n_embd))
            self.encoder = ChunkEncoder(config)
            self.query_norms = nn.ModuleList(nn.RMSNorm(config.n_embd, 1e-5) for _ in range(config.n_group))
            if config.recency:
                self.decay = nn.Parameter(torch.zeros(config.n_group))
        for name, p in self.named_parameters():
            if p.dim() == 2 or name == "landmark":
                nn.init.normal_(p, std=p.shape[-1] ** -0.5)                     # 1 / sqrt(fan_in)
        self.cross_entropy = cross_entropy

    def forward(self, tokens, targets=None):
        """tokens (B, T) -> logits (B, T, vocab_size), and mean cross-entropy of targets (-100: no label)."""
        logits = self.head(self.hidden(tokens))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def loss(self, tokens, targets):         # forward's loss, for which not all logits have to exist at once
        return self.cross_entropy(self.hidden(tokens), self.embedding.weight, targets)

    def head(self, hidden):                  # (.., d) -> (.., vocab_size)
        return F.linear(hidden, self.embedding.weight)

    def hidden(self, tokens):
        """The data flow of Sec. 3: tokens (B, T) -> the last layer's output, normalized (B, T, d)."""
        lower, upper = self.layers[:self.n_lower], self.layers[self.n_lower:]
        x = self.embedding(tokens)                                              # (B, T, d)
        if self.config.n_group:
            x = self.insert_landmarks(x)                                        # (B, N, d)
        for layer in lower:
            x = layer(x)
        if not self.config.n_group:                                             # the base LM
            return self.norm(x)
        landmarks, k, v = self.encoder(self.complete_chunks(x))
        group_size = len(upper) // self.config.n_group
        for i, layer in enumerate(upper):
            if i % group_size == 0:                                             # each group retrieves once
                weights, indices = self.retrieve(i // group_size, x, landmarks)
            x = layer(x, (k, v, weights, indices))
        return self.norm(self.remove_landmarks(x, tokens.shape[1]))

    def retrieve(self, group, x, landmarks):
        """What each chunk attends to, found by the landmark *before* it: weights and indices (B, C, K)."""
        query = self.query_norms[group](self.complete_chunks(x)[:, :, -1])
        n_chunk = math.ceil(x.shape[1] / self.config.chunk_size)
        explore = self.config.gumbel and self.training and torch.is_grad_enabled()      # not in validation
        with torch.autocast(x.device.type, enabled=False):                      # ranking needs full precision
            weights, indices = retrieve(query, landmarks, self.config.top_k, explore, self.config.retriever,
                                        *self.decay_and_near(group))
        # Shifted by one chunk: chunk 0 gets nothing, and nobody gets what the last landmark found.
        weights = F.pad(weights, (0, 0, 1, 0))[:, :n_chunk]
        return weights, F.pad(indices, (0, 0, 1, 0), value=-1)[:, :n_chunk]

    def decay_and_near(self, group):
        """For retrieval_scores(): inside the window, the distance does not matter."""
        decay = self.decay[group].float() if self.config.recency else None
        return decay, max(1, self.config.window // self.config.chunk_size)

    def insert_landmarks(self, x):           # (B, T, d) -> (B, N, d): one behind every S - 1 text tokens
        T, n_text = x.shape[1], self.config.chunk_size - 1
        x = to_chunks(x, n_text)
        landmark = self.landmark.to(x.dtype).expand(*x.shape[:2], 1, -1)
        return torch.cat([x, landmark], dim=2).flatten(1, 2)[:, :T + T // n_text]

    def remove_landmarks(self, x, T):        # (B, N, d) -> (B, T, d): landmarks predict nothing
        return to_chunks(x, self.config.chunk_size)[:, :, :-1].flatten(1, 2)[:, :T]

    def complete_chunks(self, x):            # (B, N, d) -> (B, number of complete chunks, S, d)
        S = self.config.chunk_size
        return x[:, :x.shape[1] // S * S].unflatten(1, (x.shape[1] // S, S))

    @torch.no_grad()
    def generate(self, tokens, n_new, temperature=1.0):
        """Yield n_new tokens (B,) after tokens (B, T). Reads all again for each; fast.generate reads on.

        After a question, use fast.generate: it pads prompts so that their last token opens a chunk.
        """
        for _ in range(n_new):
            logits = self(tokens)[0][:, -1].float()
            if temperature == 0:
                token = logits.argmax(-1, keepdim=True)
            else:
                token = (logits / temperature).softmax(-1).multinomial(1)
            tokens = torch.cat([tokens, token], dim=1)
            yield token[:, 0]
