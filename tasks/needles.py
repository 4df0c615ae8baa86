"""Needles: named values hidden in real text, and questions that ask for them, after Sec. 4's NIAH protocol.

Several needles are hidden in a stretch of text, and as many questions are asked at its end (// are chunk
borders):

    .. def close(self):  // se|kQ7b:VVVVVV| // elf._f ..    needle: a name and its value, distinct bytes
    ..  return None|?kQ7b // :VVVVVV .assert // ..          question: it ends a chunk; its answer follows

The question has to *end* a chunk, because it is that chunk's landmark which retrieves, for the tokens of the
next chunk. Its colon opens the next chunk: it is the first token that sees what was retrieved, and predicts
the answer. (The last text token of a chunk predicts before its own landmark has retrieved. The paper lets the
answer itself open the chunk.) Other than in the paper, tokens are bytes, and every needle is asked for.

`python -m tasks.needles` shows an example, one chunk a line.
"""
import string
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from gca import require
from tasks.text import EVALUATION, TRAINING, VALIDATION, stdlib_corpus

NAME = 4            # letters and digits in a needle's name
ALPHABET = np.array([ord(c) for c in string.ascii_letters + string.digits])
VALUES = 128        # values are bytes from here up, which source code hardly contains


@dataclass
class NeedleConfig:
    needle: str = "multi"           # multi: up to n_needle needles in a context, all asked for; single: one
    n_needle: int = 3               # in a context, and as many questions
    n_value: int = 6                # bytes in a needle's value
    straddle: bool = False          # True: needles lie anywhere; False: each inside one chunk
    grow_at: float = 0.9            # answer accuracy at which the context doubles
    lm_weight: float = 0.3          # of the language-model loss, beside the answers'


# ---------------------------------------------------------------- one batch

def needle_batch(text, rng, batch, length, chunk_size, n_needle, n_value, straddle=False, depth=None):
    """Contexts of `length` tokens: random stretches of text, with needles and questions written into them.

    depth: in [0, 1), of a single needle: 0 is the text's beginning; None: anywhere before the questions.

    Returns tokens and next_tokens (batch, length), and is_answer (batch, length): the positions whose next
    token is part of an answer.
    """
    B, n, n_text = batch, n_needle, chunk_size - 1              # text tokens of a chunk
    last = (length - 1 - n_value) // n_text                     # the chunk that the last colon opens
    needle_length = NAME + n_value + 3

    # The haystack: one token more than the context, because next_tokens are shifted by one.
    start = rng.integers(len(text), size=(B, 1))
    x = text.take(start + np.arange(length + 1), mode="wrap").astype(np.int64)

    # What is written: needles |name:value| and questions |?name:value
    numbers = distinct(rng, B, n, 62 ** NAME)                                           # (B, n)
    names = ALPHABET[numbers[..., None] // 62 ** np.arange(NAME) % 62]                  # in base 62
    values = distinct(rng, B * n, n_value, 256 - VALUES).reshape(B, n, n_value) + VALUES
    bar, ask, colon = (np.full((B, n, 1), ord(c)) for c in "|?:")
    needles = np.concatenate([bar, names, colon, values, bar], axis=-1)             # (B, n, needle_length)
    questions = np.concatenate([bar, ask, names, colon, values], axis=-1)

    # Where the needles go: before all questions, each in a chunk of its own (straddle: anywhere).
    if straddle:
        needle_at = random_starts(rng, B, n, (last - n) * n_text, needle_length)
    else:
        chunk = random_starts(rng, B, n, last - n, 1)
        if depth is not None:
            chunk = np.full((B, n), int(depth * (last - n)))
        needle_at = chunk * n_text + rng.integers(0, n_text - needle_length + 1, (B, n))

    # Where the questions go: the last n chunk borders. The colon is the first token behind the border.
    colon_at = n_text * np.arange(last - n + 1, last + 1)                               # (n,)
    question_at = np.broadcast_to(colon_at - (2 + NAME), (B, n))
    write(x, needle_at, needles)
    write(x, question_at, questions)

    # The colon predicts the first byte of the value, and each byte but the last one predicts the next.
    is_answer = np.zeros((B, length), bool)
    is_answer[:, colon_at[:, None] + np.arange(n_value)] = True
    return x[:, :-1], x[:, 1:], is_answer


def write(x, at, strings):
    """x[b, at[b, i]:] = strings[b, i], for all b and i; x (B, length), at (B, n), strings (B, n, size)."""
    row = np.arange(len(x))[:, None, None]
    x[row, at[..., None] + np.arange(strings.shape[-1])] = strings


def distinct(rng, rows, n, high):
    """(rows, n) integers below high, no two of a row equal."""
    if n * n > 4 * high:                # so many that almost every draw has two that are equal
        return np.stack([rng.choice(high, n, replace=False) for _ in range(rows)])
    x = rng.integers(high, size=(rows, n))
    while (again := (np.diff(np.sort(x)) == 0).any(1)).any():
        x[again] = rng.integers(high, size=(again.sum(), n))
    return x


def random_starts(rng, rows, n, room, size):
    """(rows, n) starts of n stretches of `size`, in random order, that do not overlap within `room`."""
    gaps = np.sort(rng.integers(0, room - n * size + 1, (rows, n)))
    return rng.permuted(gaps + np.arange(n) * size, axis=1)


# ---------------------------------------------------------------- the task

class Needles:
    """Find needles: the answers' loss, and a little language modelling beside it."""

    METRICS = ("answer_loss", "lm_loss", "answer_accuracy")     # what loss() returns beside the loss
    SCORES = ("val_accuracy",)
    REPORT, TITLE = "niah.json", "Needles in contexts of up to 1024 times the training length"

    def __init__(self, settings, corpus):
        """settings: those of a run, by name: NeedleConfig's, chunk_size, seed and seq_len among them."""
        self.settings, self.corpus = settings, corpus
        self.chunk_size, self.n_value = settings["chunk_size"], settings["n_value"]
        self.n_needle = 1 if settings["needle"] == "single" else settings["n_needle"]
        require(corpus.tokenizer == "bytes", "--data must be prepared with --tokenizer bytes for needles, "
                f"got {corpus.tokenizer} in {corpus.name}")
        require(self.n_needle >= 1, f"n_needle must be at least 1, got {self.n_needle}")
        require(1 <= self.n_value <= 128, f"n_value must be in 1..128, got {self.n_value}")
        least = NAME + self.n_value + 4
        require(self.chunk_size >= least, f"chunk_size must be at least {least} to hold a needle with a "
                f"value of {self.n_value} bytes, got {self.chunk_size}")

    def lengths(self):
        """The context lengths of training: start_len, doubled until it is seq_len."""
        seq_len = self.settings["seq_len"]
        lengths = [min(self.settings["start_len"] or seq_len, seq_len)]
        while lengths[-1] < seq_len:
            lengths.append(min(2 * lengths[-1], seq_len))
        return lengths

    def fitting(self, length):
        """How many needles a context of `length` tokens has: a chunk for each, and one for each question."""
        n_text = self.chunk_size - 1
        room = (length - 1 - self.n_value) // (2 * n_text)
        require(room >= 1, f"seq_len must be at least {2 * n_text + 1 + self.n_value} for a needle and its "
                f"question in chunks of {self.chunk_size}, got {length}")
        return min(self.n_needle, room)

    check = fitting

    def draw(self, text, rng, length, size, depth=None):
        n_needle = self.fitting(length) if depth is None else 1
        return needle_batch(text, rng, size, length, self.chunk_size, n_needle, self.n_value,
                            self.settings["straddle"] and depth is None, depth)

    def batch(self, step, length, size):
        """Tokens, next tokens and is_answer of step number `step`, (size, length) each."""
        rng = np.random.default_rng([TRAINING, self.settings["seed"], step])
        return self.draw(self.corpus.train, rng, length, size)

    def loss(self, model, tokens, labels, is_answer):
        """The loss and METRICS of a batch."""
        logits, _ = model(tokens)                                                   # (B, T, vocab_size)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
        hit, answer = logits.flatten(0, 1).argmax(-1) == labels.flatten(), is_answer.flatten()
        answer_loss, lm_loss = mean_where(loss, answer), mean_where(loss, ~answer)
        total = answer_loss + self.settings["lm_weight"] * lm_loss
        return total, (answer_loss, lm_loss, mean_where(hit, answer))

    @torch.no_grad()
    def score(self, model, step, length, size):
        """Accuracy of the answers in a batch of unseen text."""
        rng = np.random.default_rng([VALIDATION, self.settings["seed"], step])
        batch = self.draw(self.corpus.val, rng, length, size)
        tokens, labels, at = (torch.from_numpy(x).to(model.embedding.weight.device) for x in batch)
        hit = model.head(model.hidden(tokens)[at]).argmax(-1) == labels[at]
        return dict(val_accuracy=hit.float().mean().item())

    def next_length(self, length, step, score):
        """The context doubles when the answers are right."""
        if score and score["val_accuracy"] >= self.settings["grow_at"]:
            return min(2 * length, self.settings["seq_len"])
        return length

    def measure(self, model, read, lengths=None, n_question=None, seed=0, n_depth=None):
        """Accuracy of the answers by context length, a row each; read: as eval.py's Reader.

        n_depth: so many rows for each length, each with one needle at a depth, in percent of the context.

        Every token is predicted greedily from the true tokens before it. So all tokens of an answer are right
        exactly when greedy generation would have produced that answer.
        """
        for length in lengths or [self.settings["seq_len"] * 4 ** i for i in range(6)]:
            for depth in [None] if n_depth is None else [(i + 0.5) / n_depth for i in range(n_depth)]:
                hits = self.answers(model, read, length, n_question, seed, depth).double()
                n_needle = self.fitting(length) if depth is None else 1
                where = {} if depth is None else dict(depth=round(100 * depth, 1))
                yield dict(length=length, **where, questions=len(hits), needles=n_needle,
                           token_accuracy=100 * hits.mean().item(),
                           exact_match=100 * hits.all(1).double().mean().item())

    def answers(self, model, read, length, n_question, seed, depth=None):
        """Whether each token of each answer is right: (n_question, n_value)."""
        device, n_needle = model.embedding.weight.device, self.fitting(length) if depth is None else 1
        if not n_question:              # 240 where contexts are short, 32 where they are long: not hours
            affordable = 2 ** (26 if device.type == "cuda" else 19) // length * n_needle
            n_question = max(32, min(240, affordable))
        n_context = -(-n_question // n_needle)
        batch = min(n_context, read.contexts_at_once(model, length))
        draw = [EVALUATION, seed, length] + ([] if depth is None else [int(1000 * depth)])
        rng, hits = np.random.default_rng(draw), []
        for _ in range(0, n_context, batch):
            arrays = self.draw(self.corpus.val, rng, length, batch, depth)
            tokens, labels, at = map(torch.from_numpy, arrays)
            logits = read(model, tokens.to(device), at.to(device))
            hits.append(logits.argmax(-1).cpu() == labels[at])
        return torch.cat(hits).view(-1, self.n_value)[:n_question]


def mean_where(x, mask):                # x[mask].mean() without waiting for the GPU
    return (x * mask).sum() / mask.sum().clamp(min=1)


if __name__ == "__main__":
    tokens, _, _ = needle_batch(stdlib_corpus().val, np.random.default_rng(), 1, 128, 16, 3, 6)
    for i in range(0, 128, 15):
        chunk = bytes(tokens[0, i:i + 15].tolist())
        print(f"{i // 15:4}  {str(chunk)[2:-1]}")
