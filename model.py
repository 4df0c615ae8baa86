"""DRT, the Differentiable Retrieval-based Transformer (Sec. 3), as one readable file.

A language model that reads text in chunks. After each chunk it retrieves the K past chunks that should help
most with the *next* chunk, whose tokens then attend to them by Grouped Cross Attention (gca.py). Retrieval
scores weight what is read, so the next-token loss alone trains the retriever.

    tokens -> insert landmarks -> lower decoder -> chunk encoder -> landmark keys l_c, chunk keys and values
                                       |                                     |
                                       +--> upper decoder, G groups: retrieve, then self-attention, GCA, MLP

Layers say what is computed. The text that is read says who attends to whom: WholeText below, or fast/'s Piece
of a longer text. DRT.hidden, at the end, is the data flow of both.

Shapes: B batch, T text tokens, N positions of text and landmarks, C chunks of S positions (S - 1 text tokens
and a landmark; the last chunk may be incomplete), M complete chunks, K chunks retrieved for each chunk, W
sliding window, d width, H heads of width D, G groups of upper layers.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from gca import gca, require

RETRIEVERS = "learned", "random", "last"
NO_LABEL = -100             # a target that counts nothing in the loss, as in torch


@dataclass
class DRTConfig:
    vocab_size: int = 256       # text tokens; the landmark is a vector of its own, outside the vocabulary
    n_layer: int = 2            # decoder layers, half lower, half upper (all lower if n_group = 0)
    n_group: int = 1            # G: retrievals of the upper decoder; 0 = sliding-window base LM, no retrieval
    n_encoder: int = 2          # bidirectional layers of the chunk encoder
    encoder_rope: bool = True   # rotary positions inside the chunk encoder
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
    retriever: str = "learned"  # ablations: random, or last: the last K chunks; all weigh the same

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        for name, least in dict(vocab_size=2, n_layer=1, n_group=0, n_encoder=0, n_head=1, n_kv_head=1,
                                n_embd=1, chunk_size=2, top_k=1, window=1).items():
            value, most = getattr(self, name), 1000 if name in ("n_layer", "n_encoder") else 10 ** 7
            require(least <= value <= most, f"{name} must be in {least} .. {most}, got {value}")
        d, H, Hkv = self.n_embd, self.n_head, self.n_kv_head
        require(d % H == 0, f"n_embd must be a multiple of n_head, got {d} and {H}")
        require(H % Hkv == 0, f"n_kv_head must be a divisor of n_head {H}, got {Hkv}")
        require(self.n_group == 0 or self.n_layer % (2 * self.n_group) == 0,
                f"n_layer must be a multiple of 2 * n_group, got {self.n_layer} and {self.n_group}")
        require(d // H % 2 == 0 or not (self.encoder_rope and self.n_encoder and self.n_group),
                f"n_embd / n_head must be even for rotary positions (encoder_rope), got {d} / {H}")
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
    """Causal attention to the last W positions (Sec. 3): q (B, H, N, D); k, v (B, Hkv, P, D) -> (B, H, N, D).

    The queries are the last N of P positions; P - N <= W. Each block of W queries attends to its own block of
    keys and the one before: exact, and linear in N.
    """
    (B, _, N, _), P = q.shape, k.shape[2]
    if N <= window:
        bias = band_bias(N, P, window, slopes).to(q.dtype)                      # (H, N, P)
        return F.scaled_dot_product_attention(q, k, v, bias, enable_gqa=True)

    n_first = N + window - P                 # queries whose keys all lie in the first block
    if n_first:
        first = window_attention(q[:, :, :n_first], k[:, :, :window], v[:, :, :window], window, slopes)
        rest = window_attention(q[:, :, n_first:], k, v, window, slopes)
        return torch.cat([first, rest], dim=2)

    # From here P = N + W: block i of the queries sees blocks i and i + 1 of the keys.
    def blocks(x):                           # (B, H, n W, D) -> (B n, H, W, D)
        return x.unflatten(2, (-1, window)).transpose(1, 2).flatten(0, 1)

    if P % window:                           # to whole blocks
        q, k, v = (F.pad(x, (0, 0, 0, -P % window)) for x in (q, k, v))
    k, v = (torch.cat([blocks(x[:, :, :-window]), blocks(x[:, :, window:])], dim=2) for x in (k, v))
    bias = band_bias(window, 2 * window, window, slopes).to(q.dtype)            # (H, W, 2W)
    out = F.scaled_dot_product_attention(blocks(q), k, v, bias, enable_gqa=True)
    return out.unflatten(0, (B, -1)).transpose(1, 2).flatten(2, 3)[:, :, :N]


# ---------------------------------------------------------------- layers

class SelfAttention(nn.Module):
    """attend(q, k, v) decides who attends to whom."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_dim = config.n_embd // config.n_head
        width = (config.n_head + 2 * config.n_kv_head) * self.head_dim
        self.qkv = nn.Linear(config.n_embd, width, bias=False)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, attend):            # (B, N, d) -> (B, N, d)
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = qkv.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=1)       # (B, H or Hkv, N, D)
        return self.out(attend(q, k, v).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """read(q) is GCA with the retrieved chunks, whose keys and values the encoder makes for all layers."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.query = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, read):              # (B, N, d) -> (B, N, d)
        q = self.query(x).unflatten(-1, (self.n_head, -1))                              # (B, N, H, D)
        return self.out(read(q).flatten(2))


class MLP(nn.Module):
    """SwiGLU, 8/3 d wide (up to the next 64), so that it costs as much as a plain MLP of width 4d."""

    def __init__(self, config):
        super().__init__()
        hidden = math.ceil(config.n_embd * 8 / 3 / 64) * 64
        self.gate_up = nn.Linear(config.n_embd, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, config.n_embd, bias=False)

    def forward(self, x):                    # (B, N, d) -> (B, N, d)
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm layer: y = x + SA(x);  z = y + GCA(y) in upper layers;  out = z + MLP(z)  (Sec. 3)."""

    def __init__(self, config, upper=False):
        super().__init__()
        self.gca_residual = config.gca_residual
        self.attention, self.mlp = SelfAttention(config), MLP(config)
        self.norm1, self.norm2 = nn.RMSNorm(config.n_embd, 1e-5), nn.RMSNorm(config.n_embd, 1e-5)
        if upper:
            self.cross, self.norm_cross = CrossAttention(config), nn.RMSNorm(config.n_embd, 1e-5)

    def forward(self, x, attend, read=None):
        y = x + self.attention(self.norm1(x), attend)
        if read is None:
            return y + self.mlp(self.norm2(y))
        z = y + self.cross(self.norm_cross(y), read)
        residual = z if self.gca_residual else y            # y in the authors' released code
        return residual + self.mlp(self.norm2(z))


class ChunkEncoder(nn.Module):
    """Bidirectional layers inside each chunk. The landmark's output is the chunk's retrieval key l_c."""

    def __init__(self, config):
        super().__init__()
        self.norm_in, self.norm_out = nn.RMSNorm(config.n_embd, 1e-5), nn.RMSNorm(config.n_embd, 1e-5)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_encoder))
        self.head_dim = config.n_embd // config.n_head
        rotation = rotary_cos_sin(config.chunk_size, self.head_dim) if config.encoder_rope else None
        self.register_buffer("rotation", rotation, persistent=False)
        self.key = nn.Linear(config.n_embd, config.n_kv_head * self.head_dim, bias=False)
        self.value = nn.Linear(config.n_embd, config.n_kv_head * self.head_dim, bias=False)

    def begin_as_identity(self):             # not in the paper: at first, the layers add nothing
        for layer in self.layers:
            nn.init.zeros_(layer.attention.out.weight)
            nn.init.zeros_(layer.mlp.down.weight)

    def forward(self, x):
        """x (B, M, S, d) -> landmarks (B, M, d), k and v (B, M, S - 1, Hkv, D).

        The paper gives the landmark's own row a zero key and value: exp(0) = 1 in the denominator and nothing
        in the sum, which is softmax-off-by-one. gca() has that built in, so only the text rows are kept.
        """
        B, M, S, _ = x.shape

        def attend(q, k, v):                 # each position of a chunk to all of them
            if not len(q):                   # no chunk is complete: torch's attention fails on some GPUs
                return q
            if self.rotation is not None:
                q, k = rotate(q, self.rotation), rotate(k, self.rotation)
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        x = self.norm_in(x).flatten(0, 1)                   # chunks are the batch
        for layer in self.layers:
            x = layer(x, attend)
        x = self.norm_out(x).unflatten(0, (B, M))
        text, landmarks = x[:, :, :-1], x[:, :, -1]
        k = self.key(text).unflatten(-1, (-1, self.head_dim))
        v = self.value(text).unflatten(-1, (-1, self.head_dim))
        return landmarks, k, v


def rotary_cos_sin(S, D):
    """Cosines and sines of s * 10000 ** (-2i / D), position s, pair i: (2, S, D / 2)  (Su et al., 2021)."""
    angles = torch.arange(S)[:, None] * 10000.0 ** -(torch.arange(0, D, 2) / D)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x, rotation):                     # x (.., S, D): number i and number i + D / 2 are a pair
    a, b = x.chunk(2, dim=-1)
    cos, sin = rotation.to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


# ---------------------------------------------------------------- retrieval

def retrieval_scores(query, landmarks, t, c, decay=None, window_chunks=1):
    """r_t,c = q_t . l_c / sqrt(d): query (B, n, d) of chunks t (n,), landmarks (B, m, d) of chunks c (m,).

    Returns (B, n, m), float32. decay (DRTConfig.recency): a learned number, or None. Beyond the window, which
    is window_chunks long, decay * log(distance / window) is subtracted.
    """
    scale = query.shape[-1] ** -0.5
    if query.is_cuda and query.dtype == landmarks.dtype == torch.bfloat16 and not query.requires_grad:
        scores = torch.bmm(query, landmarks.mT, out_dtype=torch.float32) * scale        # faster
    else:
        scores = (query.float() * scale) @ landmarks.float().mT
    if decay is not None:
        distance = (t[:, None] - c).clamp(min=window_chunks) / window_chunks
        scores = scores - decay * distance.log()
    return scores


def retrieve(scores, top_k, retriever="learned", explore=False):
    """For each chunk t, the K strictly earlier chunks c with the highest scores r_t,c, and their weights.

    scores (B, M, M) -> weights, indices (B, M, K); index -1 where a slot is empty. explore: choose by scores
    with Gumbel noise; weights are without. retriever: as in DRTConfig.
    """
    chunk = torch.arange(scores.shape[1], device=scores.device)
    scores, ranking = scores_and_ranking(scores, chunk, retriever, explore)
    ranking = ranking.masked_fill(chunk >= chunk[:, None], float("-inf"))
    # Of equal scores a stable sort takes the earlier chunk on every machine, which topk does not.
    best, indices = ranking.sort(descending=True, stable=True)
    best, indices = best[..., :top_k], indices[..., :top_k]
    empty = best == float("-inf")                           # fewer than K chunks are earlier
    weights = softmax_of_filled(scores.gather(-1, indices), empty)
    n_spare = top_k - indices.shape[-1]
    return F.pad(weights, (0, n_spare)), F.pad(indices.masked_fill(empty, -1), (0, n_spare), value=-1)


def scores_and_ranking(scores, c, retriever, explore=False):
    """The scores (.., m) of chunks c (m,), which make the weights; and those that chunks are chosen by."""
    if retriever != "learned":
        scores = torch.zeros_like(scores)                   # so that all weigh the same
    ranking = scores.detach()
    if retriever == "last":
        ranking = ranking + c
    if retriever == "random" or (explore and retriever == "learned"):
        ranking = ranking - torch.empty_like(ranking).exponential_().log()      # -log(Exp(1)): Gumbel noise
    return scores, ranking


def softmax_of_filled(scores, empty):        # over slots (.., K); an empty slot weighs 0, also if all are
    return scores.masked_fill(empty, -1e30).softmax(-1).masked_fill(empty, 0)


# ---------------------------------------------------------------- the text that is read

class WholeText:
    """T tokens that are read all at once: where chunks lie, and who attends to whom.

    choose: a function in the place of retrieve(): scores (B, M, M) -> weights, indices (B, M, K)
    """

    def __init__(self, model, T, choose=None):
        self.model, self.T, self.S, config = model, T, model.config.chunk_size, model.config
        explore = config.gumbel and model.training and torch.is_grad_enabled()          # not in validation
        self.choose = choose or (lambda scores: retrieve(scores, config.top_k, config.retriever, explore))

    def insert_landmarks(self, x):           # (B, T, d) -> (B, N, d): one behind every S - 1 text tokens
        x = to_chunks(x, self.S - 1)                                            # (B, C, S - 1, d)
        landmark = self.model.landmark.to(x.dtype).expand(*x.shape[:2], 1, -1)
        return torch.cat([x, landmark], dim=2).flatten(1, 2)[:, :self.T + self.T // (self.S - 1)]

    def attend(self, i):
        """For layer i (here all are alike): q (B, H, N, D) attends to k, v (B, Hkv, N, D) in the window."""
        function, window, slopes = self.model.window_attention, self.model.config.window, self.model.slopes
        return lambda q, k, v: function(q, k, v, window, slopes)

    def store(self, x):
        """Encode the complete chunks in x (B, N, d), the lower decoder's output."""
        self.landmarks, self.k, self.v = self.model.encoder(self.complete_chunks(x))

    def retrieve(self, group, x):
        """For the layers of a group, whose input is x (B, N, d): read(q), q (B, N, H, D) -> (B, N, H, D)."""
        model, S, n_chunk = self.model, self.S, math.ceil(x.shape[1] / self.S)
        query = model.query_norms[group](self.complete_chunks(x)[:, :, -1])     # (B, M, d)
        chunk = torch.arange(query.shape[1], device=x.device)
        with torch.autocast(x.device.type, enabled=False):                      # ranking needs full precision
            scores = model.scores(group, query, self.landmarks, chunk, chunk)
            weights, indices = self.choose(scores)
        # Landmark t serves chunk t + 1. Chunk 0 gets nothing, and if the last chunk is complete, too, then
        # nobody reads what its landmark found.
        weights = F.pad(weights, (0, 0, 1, 0))[:, :n_chunk]                     # (B, C, K)
        indices = F.pad(indices, (0, 0, 1, 0), value=-1)[:, :n_chunk]
        gca, k, v, softmax_one = model.gca, self.k, self.v, model.config.softmax_one

        def read(q):
            out = gca(to_chunks(q, S), k, v, weights, indices, softmax_one)     # (B, C, S, H, D)
            return out.flatten(1, 2)[:, :q.shape[1]]

        return read

    def remove_landmarks(self, x):           # (B, N, d) -> (B, T, d): landmarks predict nothing
        return to_chunks(x, self.S)[:, :, :-1].flatten(1, 2)[:, :self.T]

    def complete_chunks(self, x):            # (B, N, d) -> (B, M, S, d)
        n = x.shape[1] // self.S
        return x[:, :n * self.S].unflatten(1, (n, self.S))


def to_chunks(x, size):                      # (B, n, ..) -> (B, chunks, size, ..): zeros fill the last one
    padding = -x.shape[1] % size
    if padding:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, padding))
    return x.unflatten(1, (-1, size))


# ---------------------------------------------------------------- the model

def cross_entropy(hidden, weight, targets):
    """Mean cross-entropy of logits hidden @ weight.T; hidden (B, T, d), targets (B, T) or NO_LABEL."""
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
        self.register_buffer("slopes", alibi_slopes(config.n_head), persistent=False)
        # Three functions that fast.apply() replaces by faster ones with the same results:
        self.gca, self.window_attention, self.cross_entropy = gca, window_attention, cross_entropy

    def forward(self, tokens, targets=None):
        """tokens (B, T) -> logits (B, T, vocab_size), and mean cross-entropy of targets (or NO_LABEL).

        Training calls hidden(), and makes logits only where it needs them (tasks/).
        """
        hidden = self.hidden(tokens)
        loss = None if targets is None else self.cross_entropy(hidden, self.embedding.weight, targets)
        return self.head(hidden), loss

    def head(self, hidden):                  # (.., d) -> (.., vocab_size)
        return F.linear(hidden, self.embedding.weight)

    def hidden(self, tokens, text=None):
        """The data flow of Sec. 3: tokens (B, T) -> the last layer's output, normalized (B, T, d).

        text: what these tokens are a part of; default: they are all of it.
        """
        text, config = text or WholeText(self, tokens.shape[1]), self.config
        x = self.embedding(tokens)                                              # (B, T, d)
        if config.n_group:
            x = text.insert_landmarks(x)                                        # (B, N, d)
        for i in range(self.n_lower):
            x = self.layers[i](x, text.attend(i))
        if not config.n_group:                                                  # the base LM
            return self.norm(x)
        text.store(x)
        group_size = (config.n_layer - self.n_lower) // config.n_group
        for i in range(self.n_lower, config.n_layer):
            group, layer_in_group = divmod(i - self.n_lower, group_size)
            if layer_in_group == 0:                                             # each group retrieves once
                read = text.retrieve(group, x)
            x = self.layers[i](x, text.attend(i), read)
        return self.norm(text.remove_landmarks(x))

    def scores(self, group, query, landmarks, t, c):
        """retrieval_scores() of one group."""
        decay = self.decay[group].float() if self.config.recency else None
        window_chunks = max(1, self.config.window // self.config.chunk_size)
        return retrieval_scores(query, landmarks, t, c, decay, window_chunks)

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
