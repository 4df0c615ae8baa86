"""The smallest model that retrieves: `python docs/smallest.py`, a minute or two on a CPU.

A text is chunks of 8 tokens, each with a name, its value and filler: 0 name value value value . . . The
second-to-last chunk asks for a name, 1 name 1 1 1 1 1 1, and the last one has to say its value after a 0. The
window is the chunk itself, so the last chunk has the value from gca() alone.
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from gca import gca

S, K, D, VOCAB = 8, 4, 64, 514          # tokens in a chunk (no landmark), chunks it retrieves, width, tokens


class Smallest(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB + 1, D)                     # the last one is the landmark
        nn.init.normal_(self.embedding.weight, std=D ** -0.5)
        self.position = nn.Parameter(torch.randn(S + 1, D) * 0.1)       # in the chunk
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)       # of the window layer
        self.search, self.key = nn.Linear(D, D), nn.Linear(D, D)        # of landmarks
        self.q, self.kv = nn.Linear(D, D), nn.Linear(D, 2 * D)          # of the GCA layer
        self.norms = nn.ModuleList(nn.RMSNorm(D) for _ in range(3))

    def forward(self, tokens):                                          # (B, C, S) -> logits (B, C, S, VOCAB)
        C = tokens.shape[1]
        x = self.embedding(F.pad(tokens, (0, 1), value=VOCAB)) + self.position          # (B, C, S + 1, D)

        # The window: each token sees those before it in its chunk, and the landmark sees all of them.
        q, k, v = self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))

        # Retrieval: landmark t scores all chunks before t, and chooses the K best for chunk t + 1.
        h = self.norms[1](x)
        scores = self.search(h[:, :, -1]) @ self.key(h[:, :, -1]).mT * D ** -0.5        # (B, C, C)
        best, indices = scores.masked_fill(torch.ones(C, C).triu().bool(), float("-inf")).topk(K)  # (B, C, K)
        empty = best == float("-inf")                                   # the first chunks have none before
        weights = best.masked_fill(empty, -1e9).softmax(-1).masked_fill(empty, 0)
        weights = F.pad(weights, (0, 0, 1, -1))                         # what t retrieved serves t + 1
        indices = F.pad(indices.masked_fill(empty, -1), (0, 0, 1, -1), value=-1)

        # GCA: tokens read the K chunks, and add up what they read by the weights. So scores have a gradient.
        k, v = self.kv(h[:, :, :S]).unsqueeze(3).chunk(2, dim=-1)                       # one head
        x = x + gca(self.q(h).unsqueeze(3), k, v, weights, indices).squeeze(3)
        return self.norms[2](x)[:, :, :S] @ self.embedding.weight[:VOCAB].T


def texts(B, C):
    """Texts (B, C, S), and the values (B, 3) that their last chunks begin with, after a 0."""
    x = torch.randint(2, VOCAB, (B, C, S))
    x[:, :, 0] = 0
    x[:, :, 1] = 2 + torch.rand(B, VOCAB - 2).argsort(1)[:, :C]         # all names of a text differ
    asked = x[torch.arange(B), torch.randint(C - 2, (B,))]              # (B, S): one chunk of each text
    x[:, -2], x[:, -2, 1], x[:, -1, 1:4] = 1, asked[:, 1], asked[:, 2:5]
    return x, asked[:, 2:5]


torch.manual_seed(0)
model = Smallest()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(1, 401):
    x, value = texts(128, 8 if step <= 200 else 16)                     # few chunks to choose from at first
    loss = F.cross_entropy(model(x)[:, -1, :3].flatten(0, 1), value.flatten())      # i predicts token i + 1
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if step % 50 == 0:
        print(f"step {step}: loss {loss.item():.2f}")
for C in (8, 64, 512):                                                  # chunks
    x, value = texts(16, C)
    with torch.no_grad():
        right = (model(x)[:, -1, :3].argmax(-1) == value).all(1).float().mean()
    print(f"{C * S:,} tokens: {right:.0%} of the values copied")
