"""How tables are measured: reading and generating by the clock, as much at once as fits, by fast/ or not."""
import time

import numpy as np
import torch
import torch.nn.functional as F

import fast
from fast.speed import synchronize, warm_up
from fast.stream import segment_length
from model import WholeText, retrieve, softmax_of_filled
from tasks.perplexity import copied_from
from tools import cli, report

PLAIN_CHUNKS = 10_000       # model.py scores all chunks against all: more take gigabytes


class Reader:
    """read(model, tokens, at) -> logits at the marked positions; adds up time and tokens.

    use_fast: reads in segments (fast/stream.py), contexts of any length; otherwise all at once, by model.py.
    """

    def __init__(self, device, dtype=torch.float32, use_fast=True):
        self.device, self.dtype, self.use_fast = device, dtype, use_fast
        self.warm, self.checked = set(), set()          # shapes that were compiled for; models
        self.most_chunks = float("inf") if use_fast else PLAIN_CHUNKS   # in a context that nobody asked for
        self.reset()

    def reset(self):
        self.seconds, self.tokens = 0.0, 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def numbers(self):
        """What reading has taken since the last reset, as columns of a table."""
        speed = self.tokens / self.seconds if self.seconds else 0.0
        return dict(seconds=self.seconds, tokens_per_second=speed, **report.peak_memory(self.device))

    def prepare(self, model):
        """Swap the model's pieces for fast/'s, if they are to be used; returns what reads, in words."""
        if not self.use_fast or model.config.retriever == "oracle":
            return f"Read by the plain files, whole contexts (by default at most {PLAIN_CHUNKS:,} chunks)."
        active = fast.describe(fast.apply(model))
        return f"Read by fast/, in segments{active and f', with {active}'}."

    def contexts_at_once(self, model, length):
        return max(1, segment_length(model, 1) // length)

    @torch.no_grad()
    def __call__(self, model, tokens, at):
        """Logits at the marked positions: tokens, at (B, n) -> (number, vocab_size)."""
        text = self.with_oracle(model, tokens) if model.config.retriever == "oracle" else None
        use_fast = self.use_fast and not text
        with cli.autocast(self.device, self.dtype):
            if use_fast:
                self.check(model)
            if use_fast and self.device.type == "cuda" and (model, tokens.shape) not in self.warm:
                warm_up(model, tokens)                              # compile before the clock runs
                self.warm.add((model, tokens.shape))
            start = time.perf_counter()
            if use_fast:
                memory = fast.Memory(model, len(tokens), capacity=tokens.shape[1])
                logits = fast.read(model, tokens, memory, at)
            else:
                logits = model.head(model.hidden(tokens, text)[at])
            synchronize(self.device)
        self.seconds += time.perf_counter() - start
        self.tokens += tokens.numel()
        return logits

    def with_oracle(self, model, tokens):
        """A text whose chunks retrieve those that most of their tokens could be copied from.

        Weights are the model's own. What a perfect choice would give, not what a model can know.
        """
        S, K = model.config.chunk_size, model.config.top_k
        counts = [copied_from(row, S - 1, model.config.window) for row in tokens.cpu().numpy()]
        counts = F.pad(torch.from_numpy(np.stack(counts)), (0, 1, 0, 1)).to(self.device)

        def choose(scores):                                 # (B, C, C): landmark t retrieves for chunk t + 1
            C = scores.shape[1]
            _, indices = retrieve(scores + 1000 * counts[:, 1:C + 1, :C], K)
            weights = softmax_of_filled(scores.gather(-1, indices.clamp(min=0)), indices < 0)
            return weights, indices

        return WholeText(model, tokens.shape[1], choose)

    def check(self, model):
        """ValueError if fast/ does other than the plain files; once for each model."""
        if self.use_fast and model not in self.checked:
            fast.check(model)
            self.checked.add(model)

    @torch.no_grad()
    def write(self, model, tokens, firsts, offsets):
        """What the model writes at `offsets` from each of `firsts`, from its own tokens: (B, n, offsets).

        tokens (B, T); what lies between the offsets is given. By fast/, as one memory that forks.
        """
        start, written = time.perf_counter(), []
        with cli.autocast(self.device, self.dtype):
            self.check(model)
            memory, done = fast.Memory(model, len(tokens)), 0
            for first in firsts:
                fast.read(model, tokens[:, done:first], memory, "last")
                here, token, answer = memory.fork(), tokens[:, first], []
                for i in range(offsets[-1] + 1):
                    logits = fast.read(model, token[:, None], here, "last")
                    token = tokens[:, first + i + 1] if i < offsets[-1] else token
                    if i in offsets:
                        token = logits.argmax(-1)
                        answer.append(token)
                written.append(torch.stack(answer, dim=1))
                done = first
            synchronize(self.device)
        self.seconds, self.tokens = self.seconds + time.perf_counter() - start, self.tokens + tokens.numel()
        return torch.stack(written, dim=1)

    def generate(self, model, prompts, n, stop):
        """What follows each prompt, greedily: lists of at most n tokens, which end before `stop`.

        By fast/generate.py, whatever use_fast says. Prompts and new tokens count as read.
        """
        most = 2 ** 18 if self.device.type == "cuda" else 2 ** 14               # tokens of prompts at once
        made, groups, start = {}, [[]], time.perf_counter()
        for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
            if groups[-1] and (len(groups[-1]) + 1) * len(prompts[i]) > most:
                groups.append([])
            groups[-1].append(i)
        for group in groups:
            texts = [prompts[i] for i in group]
            with cli.autocast(self.device, self.dtype):
                self.check(model)
                new = [*fast.generate(model, texts, n, temperature=0, stop=[stop])]
            for i, tokens in zip(group, torch.stack(new).T.tolist(), strict=True):     # (B, n)
                made[i] = [token for token in tokens if token not in (stop, -1)]
        self.seconds += time.perf_counter() - start
        self.tokens += sum(map(len, prompts)) + sum(map(len, made.values()))
        return [made[i] for i in range(len(prompts))]
