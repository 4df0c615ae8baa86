"""Needles: named values hidden in real text, and questions that ask for them, after Sec. 4's NIAH protocol.

Several needles are hidden in a stretch of text, and as many questions are asked at its end (// are chunk
borders):

    .. def close(self):  // se|kQ7b:VVVVVV| // elf._f ..    needle: a name and its value
    ..  return None|?kQ7b // :VVVVVV .assert // ..          question: it ends a chunk; its answer follows

The question has to *end* a chunk, because it is that chunk's landmark which retrieves, for the tokens of the
next chunk. Its colon opens the next chunk: it is the first token that sees what was retrieved, and predicts
the answer. (The last text token of a chunk predicts before its own landmark has retrieved. The paper lets the
answer itself open the chunk.) Other than in the paper, every needle is asked for.

`--needle multihop` hides chains of two needles, |a:b| and |b:c|. The question |?a asks for the path :b:c,
which opens the next chunk, and whose second part may open one more (`--path spread`):

    ..  None|?aaaa // :bbbb:cccc .. //                      joined
    ..  None|?aaaa // :bbbb .assert // :cccc (x, y) ..      spread: the landmark between has read b
    ..  None|?aaaa // .assert(x, y) // :bbbb:cccc ..        late: nothing that is written says b in between

Names and values are random: bytes that source code hardly contains, or GPT-2 tokens of any kind.
`python -m tasks.needles` shows an example, one chunk a line.
"""
import string
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from gca import require
from tasks.text import EVALUATION, TRAINING, VALIDATION, stdlib_corpus, window_batch

KINDS = "multi", "single", "multihop"
PATHS = "joined", "spread", "late"
NAME = 4            # tokens in a needle's name


class Alphabet(NamedTuple):
    names: np.ndarray       # token ids that names are made of
    values: np.ndarray      # and values
    bar: int                # the tokens | ? :
    ask: int
    colon: int


# GPT-2's first 94 tokens are the ASCII characters from ! to ~, and its last one is the separator.
ALPHABETS = dict(
    bytes=Alphabet(np.frombuffer((string.ascii_letters + string.digits).encode(), np.uint8).astype(np.int64),
                   np.arange(128, 256), *b"|?:"),
    gpt2=Alphabet(np.arange(94, 50256), np.arange(94, 50256), 91, 30, 25),
)


@dataclass
class NeedleConfig:
    needle: str = "multi"           # multi: n_needle in a context; single: one; multihop: chains of two
    n_needle: int = 3               # as many as there are questions, in a long context (multihop: chains)
    n_value: int = 6                # tokens in a needle's value (multihop: in each name, too)
    straddle: bool = False          # True: needles lie anywhere; False: each inside one chunk
    path: str = "joined"            # multihop's answer: in one chunk; spread: over two; late: a chunk later
    grow_at: float = 0.9            # answer accuracy at which the context doubles
    lm_weight: float = 0.3          # of the language-model loss, beside the answers'
    lm_share: float = 0.0           # share of the steps that are language modelling alone


# ---------------------------------------------------------------- one batch

class Form(NamedTuple):
    """The form of needles and questions, in tokens."""
    n_text: int             # text tokens of a chunk
    n_value: int
    n_hop: int = 1
    path: str = "joined"

    @property
    def n_name(self):
        return self.n_value if self.n_hop > 1 else NAME     # of a chain, what is a value here is a name there

    @property
    def n_needle(self):
        return self.n_name + self.n_value + 3               # |name:value|

    @property
    def parts(self):
        """Where the parts of an answer begin, each with its colon, behind the border of the question."""
        first = self.n_text if self.path == "late" else 0
        second = self.n_text if self.path == "spread" else first + self.n_value + 1
        return [first, second] if self.n_hop > 1 else [0]

    @property
    def answer(self):
        """The positions, behind that border, whose next token belongs to the answer."""
        return np.concatenate([part + np.arange(self.n_value) for part in self.parts])

    @property
    def n_chunk(self):
        """Chunks from one question to the next."""
        return 1 if self.n_hop == 1 else 3 if self.path == "late" else 2

    def last_border(self, length):
        """The chunk that the last question's answer opens."""
        return (length - 1 - self.parts[-1] - self.n_value) // self.n_text

    def room(self, length):
        """How many questions a context of this length can have, with a chunk for each needle."""
        return (self.last_border(length) + self.n_chunk - 1) // (self.n_chunk + self.n_hop)


def needle_batch(text, rng, batch, length, form, n_question, alphabet=ALPHABETS["bytes"], straddle=False,
                 depth=None):
    """Contexts of `length` tokens: random stretches of text, with needles and questions written into them.

    depth: in [0, 1), of the needles of a single question: 0 is the text's beginning; None: anywhere before
    the questions.

    Returns tokens and next_tokens (batch, length), and answer_at (batch, number): the positions whose next
    token is part of an answer.
    """
    B, n, n_text = batch, n_question, form.n_text

    # The haystack: one token more than the context, because next_tokens are shifted by one.
    start = rng.integers(len(text), size=(B, 1))
    x = text.take(start + np.arange(length + 1), mode="wrap").astype(np.int64)

    # What is written: chains of names that end with a value, (B, n, tokens) each. One needle leads from each
    # to the next: |name:value|, or |a:b| and |b:c|, (B, n_hop * n, tokens).
    if form.n_hop == 1:
        names = random_names(rng, B, n, NAME, alphabet.names)
        values = distinct(rng, B * n, form.n_value, len(alphabet.values)).reshape(B, n, form.n_value)
        chain = [names, alphabet.values[values]]
    else:
        names = random_names(rng, B, n * (form.n_hop + 1), form.n_value, alphabet.values)
        chain = np.split(names, form.n_hop + 1, axis=1)
    bar, ask, colon = (np.full((B, n, 1), token) for token in alphabet[2:])
    needles = [np.concatenate([bar, a, colon, b, bar], axis=2)
               for a, b in zip(chain[:-1], chain[1:], strict=True)]

    # Where the questions go: they end at the last chunk borders, with room for the answers between them.
    border = form.last_border(length) - form.n_chunk * np.arange(n)[::-1]               # (n,), in chunks
    border_at = np.broadcast_to(border * n_text, (B, n))

    # Where the needles go: before all questions, each in a chunk of its own (straddle: anywhere).
    n_needle, n_before = n * form.n_hop, border[0] - 1
    if straddle:
        needle_at = random_starts(rng, B, n_needle, n_before * n_text, form.n_needle)
    else:
        chunk = random_starts(rng, B, n_needle, n_before, 1)
        if depth is not None:
            first = int(depth * (n_before - n_needle + 1))
            chunk = np.broadcast_to(first + np.arange(n_needle), (B, n_needle))
        needle_at = chunk * n_text + rng.integers(0, n_text - form.n_needle + 1, (B, n_needle))

    write(x, needle_at, np.concatenate(needles, axis=1))
    write(x, border_at - (2 + form.n_name), np.concatenate([bar, ask, chain[0]], axis=2))
    for part, answer in zip(form.parts, chain[1:], strict=True):
        write(x, border_at + part, np.concatenate([colon, answer], axis=2))

    # A colon predicts the first token of the value, and each token but the last one predicts the next.
    answer_at = (border_at[..., None] + form.answer).reshape(B, -1)
    return x[:, :-1], x[:, 1:], answer_at


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


def random_names(rng, rows, n, size, alphabet):
    """(rows, n, size) tokens of an alphabet, no two names of a row equal: the first four tell them apart."""
    head, base = min(size, 4), len(alphabet)
    numbers = distinct(rng, rows, n, base ** head)
    names = alphabet[numbers[..., None] // base ** np.arange(head) % base]
    if size == head:
        return names
    return np.concatenate([names, rng.choice(alphabet, (rows, n, size - head))], axis=2)


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
        least = 1 + self.form.n_needle
        require(n_text + 1 >= least, f"chunk_size must be at least {least} to hold a needle with a value of "
                f"{n_value} tokens, got {n_text + 1}")
        require(0 <= settings["lm_share"] < 1, f"lm_share must be in [0, 1), got {settings['lm_share']}")

    def lengths(self):
        """The context lengths of training: start_len, doubled until it is seq_len."""
        seq_len = self.settings["seq_len"]
        lengths = [min(self.settings["start_len"] or seq_len, seq_len)]
        while lengths[-1] < seq_len:
            lengths.append(min(2 * lengths[-1], seq_len))
        return lengths

    def fitting(self, length):
        """How many questions a context of `length` tokens has: as many as wanted, if there is room."""
        room, form = self.form.room(length), self.form
        least = (form.n_hop + 1) * form.n_text + 1 + form.parts[-1] + form.n_value
        require(room >= 1, f"seq_len must be at least {least} for a needle and its question in chunks of "
                f"{form.n_text + 1}, got {length}")
        return min(self.n_question, room)

    check = fitting

    def draw(self, text, rng, length, size, depth=None):
        n_question = self.fitting(length) if depth is None else 1
        straddle = self.settings["straddle"] and depth is None
        return needle_batch(text, rng, size, length, self.form, n_question, self.alphabet, straddle, depth)

    def batch(self, step, length, size):
        """Tokens, next tokens and answer_at of step number `step`; of plain text, no answers."""
        seed, share = self.settings["seed"], self.settings["lm_share"]
        if int((step + 1) * share) > int(step * share):
            return *window_batch(self.corpus.train, seed, step * size, size, length), np.zeros((size, 0), int)
        rng = np.random.default_rng([TRAINING, seed, step])
        return self.draw(self.corpus.train, rng, length, size)

    def loss(self, model, tokens, labels, answer_at):
        """The loss and METRICS of a batch; a batch of plain text has language modelling alone."""
        hidden = model.hidden(tokens)                                               # (B, T, d)
        other = labels.scatter(1, answer_at, -100)
        lm_loss = model.cross_entropy(hidden, model.embedding.weight, other)
        if not answer_at.shape[1]:
            return lm_loss, (lm_loss * 0, lm_loss, lm_loss * 0)
        answers = hidden.gather(1, answer_at[..., None].expand(-1, -1, hidden.shape[-1]))
        logits = model.head(answers).float()                                        # (B, n, vocab_size)
        right = labels.gather(1, answer_at)
        answer_loss = F.cross_entropy(logits.flatten(0, 1), right.flatten())
        accuracy = (logits.argmax(-1) == right).float().mean()
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

    def measure(self, model, read, lengths=None, n_question=None, seed=0, n_depth=None):
        """Accuracy of the answers by context length, a row each; read: as eval.py's Reader.

        n_depth: so many rows for each length, each with one question, its needles at a depth (in percent).

        Every token is predicted greedily from the true tokens before it. So all tokens of an answer are right
        exactly when greedy generation would have produced that answer.
        """
        for length in lengths or [self.settings["seq_len"] * 4 ** i for i in range(6)]:
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
        return torch.cat(hits).view(-1, len(self.form.answer))[:n_question]


if __name__ == "__main__":
    form = Form(n_text=15, n_value=6)
    tokens, _, _ = needle_batch(stdlib_corpus().val, np.random.default_rng(), 1, 128, form, 3)
    for i in range(0, 128, 15):
        chunk = bytes(tokens[0, i:i + 15].tolist())
        print(f"{i // 15:4}  {str(chunk)[2:-1]}")
