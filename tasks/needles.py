"""Needles: find named values that are hidden in real text. tasks/haystack.py has what a context looks like.

Training begins with short contexts, which double whenever the answers are right. `python -m tasks.needles`
shows an example, one chunk a line.
"""
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from gca import require
from tasks.haystack import ALPHABETS, Form, needle_batch, show_example
from tasks.text import EVALUATION, TRAINING, VALIDATION, window_batch

KINDS = "multi", "single", "multihop"
PATHS = "joined", "spread", "late"


@dataclass
class NeedleConfig:
    needle: str = "multi"           # multi: n_needle in a context; single: one; multihop: chains of two
    n_needle: int = 3               # in a context, if it is long enough; as many questions (multihop: chains)
    n_value: int = 6                # tokens in a needle's value (multihop: in each name, too)
    straddle: bool = False          # True: needles lie anywhere; False: each inside one chunk
    path: str = "joined"            # multihop's answer: in one chunk; spread: over two; late: a chunk later
    grow_at: float = 0.9            # answer accuracy at which the context doubles
    lm_weight: float = 0.3          # of the language-model loss, beside the answers'
    lm_share: float = 0.0           # share of the steps that are language modelling alone


class Needles:
    """Find needles: the answers' loss, and a little language modelling beside it."""

    METRICS = ("answer_loss", "lm_loss", "answer_accuracy")     # what loss() returns beside the loss
    SCORES = ("val_accuracy",)
    REPORT, TITLE = "niah.json", "Needles in contexts of up to 1024 times the training length"

    def __init__(self, settings, corpus):
        """settings: those of a run, by name: NeedleConfig's, chunk_size, seed and seq_len among them."""
        self.settings, self.corpus = settings, corpus
        kind, path, n_text = settings["needle"], settings["path"], settings["chunk_size"] - 1
        n_value = settings["n_value"]
        require(kind in KINDS, f"needle must be one of {', '.join(KINDS)}, got {kind!r}")
        require(path in PATHS, f"path must be one of {', '.join(PATHS)}, got {path!r}")
        self.alphabet = ALPHABETS[corpus.tokenizer]
        self.form = Form(n_text, n_value, 2 if kind == "multihop" else 1, path)
        self.n_question = 1 if kind == "single" else settings["n_needle"]
        require(self.n_question >= 1, f"n_needle must be at least 1, got {self.n_question}")
        most, fewest = len(self.alphabet.values), self.form.n_hop
        require(fewest <= n_value <= most, f"n_value must be in {fewest}..{most}, got {n_value}")
        least = 1 + self.form.needle_length
        require(n_text + 1 >= least, f"chunk_size must be at least {least} to hold a needle with a value of "
                f"{n_value} {'bytes' if corpus.tokenizer == 'bytes' else 'tokens'}, got {n_text + 1}")
        require(0 <= settings["lm_share"] < 1, f"lm_share must be in [0, 1), got {settings['lm_share']}")
        n_name, n_kind = 3 * self.n_question, len(self.alphabet.values) ** min(n_value, 4)
        require(kind != "multihop" or n_name <= n_kind, f"n_needle must be at most {n_kind // 3}, for "
                f"different names of {n_value} tokens, got {self.n_question}")

    def lengths(self):
        """The context lengths of training: start_len, if a question fits, doubled until it is seq_len."""
        seq_len = self.settings["seq_len"]
        start_len = max(self.settings["start_len"] or seq_len, self.form.least_length)
        lengths = [min(start_len, seq_len)]
        while lengths[-1] < seq_len:
            lengths.append(min(2 * lengths[-1], seq_len))
        return lengths

    def fitting(self, length, flag="--seq_len"):
        """How many questions a context of `length` tokens has: as many as wanted, if there is room."""
        least = self.form.least_length
        require(length >= least, f"{flag} must be at least {least} for a needle and its "
                f"question in chunks of {self.form.n_text + 1}, got {length}")
        return min(self.n_question, self.form.room(length))

    def check(self, length, flag="--seq_len"):
        """ValueError if a context of this length has no room for a question, or the corpus is shorter."""
        self.fitting(length, flag)
        if self.settings["lm_share"]:
            window_batch(self.corpus.train, 0, 0, 1, length)

    def draw(self, text, rng, length, size, depth=None):
        """`size` contexts of this text, as needle_batch has them; depth: of the needles of one question."""
        n_question = self.fitting(length) if depth is None else 1
        straddle = self.settings["straddle"] and depth is None
        return needle_batch(text, rng, size, length, self.form, n_question, self.alphabet, straddle, depth)

    def batch(self, step, length, size):
        """Tokens, next tokens and answer_at of step number `step`; of plain text, no answers."""
        seed, share = self.settings["seed"], self.settings["lm_share"]
        if int((step + 1) * share) > int(step * share):             # a share of the steps, evenly spread
            return *window_batch(self.corpus.train, seed, step * size, size, length), np.zeros((size, 0), int)
        rng = np.random.default_rng([TRAINING, seed, step])
        return self.draw(self.corpus.train, rng, length, size)

    def loss(self, model, tokens, labels, answer_at):
        """The loss and METRICS of a batch: tokens, labels (B, T), answer_at (B, n).

        A batch of plain text (n = 0) has language modelling alone, and nan for its answers.
        """
        hidden = model.hidden(tokens)                                               # (B, T, d)
        text_labels = labels.scatter(1, answer_at, -100)
        lm_loss = model.cross_entropy(hidden, model.embedding.weight, text_labels)
        if not answer_at.shape[1]:
            nothing = torch.full_like(lm_loss.detach(), math.nan)
            return lm_loss, (nothing, lm_loss, nothing)
        answers = hidden.gather(1, answer_at[..., None].expand(-1, -1, hidden.shape[-1]))     # (B, n, d)
        logits = model.head(answers).float()                                        # (B, n, vocab_size)
        answer_labels = labels.gather(1, answer_at)
        answer_loss = F.cross_entropy(logits.flatten(0, 1), answer_labels.flatten())
        accuracy = (logits.argmax(-1) == answer_labels).float().mean()
        return answer_loss + self.settings["lm_weight"] * lm_loss, (answer_loss, lm_loss, accuracy)

    @torch.no_grad()
    def score(self, model, step, length, size):
        """Accuracy of the answers in a batch of unseen text."""
        rng = np.random.default_rng([VALIDATION, self.settings["seed"], step])
        batch = self.draw(self.corpus.val, rng, length, size)
        device = model.embedding.weight.device
        tokens, labels, answer_at = (torch.from_numpy(x).to(device) for x in batch)
        row = torch.arange(size, device=device)[:, None]
        hit = model.head(model.hidden(tokens)[row, answer_at]).argmax(-1) == labels[row, answer_at]
        return dict(val_accuracy=hit.float().mean().item())

    def next_length(self, length, step, score):
        """The context doubles when the answers are right."""
        if score and score["val_accuracy"] >= self.settings["grow_at"]:
            return min(2 * length, self.settings["seq_len"])
        return length

    def measured_on(self):                  # the haystack
        return self.corpus.describe("val")

    def measure(self, model, read, lengths=None, n_question=None, seed=0, n_depth=None):
        """Accuracy of the answers by context length, a row each; read: as eval.py's Reader.

        n_depth: rows for each length, at so many depths (in percent). Each context then has one question.

        Every token of an answer is predicted greedily from the true tokens before it. With one hop, all of
        them are right exactly when greedy generation would write the answer. Of a path, the second colon and
        the text between its parts are given.
        """
        if not lengths:
            lengths = [self.settings["seq_len"] * 4 ** i for i in range(6)]
            lengths = [length for length in lengths if length // self.form.n_text <= read.most_chunks]
        for length in lengths:
            for depth in [None] if n_depth is None else [(i + 0.5) / n_depth for i in range(n_depth)]:
                hits = self.answers(model, read, length, n_question, seed, depth).double()
                n_needle = self.form.n_hop * (self.fitting(length) if depth is None else 1)
                where = {} if depth is None else dict(depth=round(100 * depth, 1))
                yield dict(length=length, **where, questions=len(hits), needles=n_needle,
                           token_accuracy=100 * hits.mean().item(),
                           exact_match=100 * hits.all(1).double().mean().item())

    def answers(self, model, read, length, n_question, seed, depth=None):
        """Whether each token of each answer is right: (n_question, n_hop * n_value)."""
        device, n = model.embedding.weight.device, self.fitting(length) if depth is None else 1
        if not n_question:              # 240 where contexts are short, 32 where they are long: not hours
            affordable = 2 ** (26 if device.type == "cuda" else 19) // length * n
            n_question = max(32, min(240, affordable))
        n_context = -(-n_question // n)
        batch = min(n_context, read.contexts_at_once(model, length))
        draw = [EVALUATION, seed, length] + ([] if depth is None else [int(1000 * depth)])
        rng, hits = np.random.default_rng(draw), []
        for _ in range(0, n_context, batch):
            arrays = self.draw(self.corpus.val, rng, length, batch, depth)
            tokens, labels, answer_at = map(torch.from_numpy, arrays)
            at = torch.zeros(tokens.shape, dtype=torch.bool).scatter(1, answer_at, True)
            logits = read(model, tokens.to(device), at.to(device))
            hits.append(logits.argmax(-1).cpu() == labels[at])
        return torch.cat(hits).view(-1, len(self.form.answer_offsets))[:n_question]


if __name__ == "__main__":
    show_example()
