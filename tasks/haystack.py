"""A haystack with needles: named values hidden in real text, and questions, after Sec. 4's NIAH protocol.

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
from typing import NamedTuple

import numpy as np

from tasks.text import stdlib_corpus

NAME = 4            # tokens in a needle's name


class Alphabet(NamedTuple):
    names: np.ndarray       # token ids that names are made of
    values: np.ndarray      # and values; all of a chain is made of these
    bar: int                # the tokens | ? :
    ask: int
    colon: int


# GPT-2's first 94 tokens are the ASCII characters from ! to ~, among them the marks; its last one is the
# separator of documents. Names and values have none of these.
LETTERS = np.array([ord(c) for c in string.ascii_letters + string.digits])
ALPHABETS = dict(
    bytes=Alphabet(names=LETTERS, values=np.arange(128, 256), bar=ord("|"), ask=ord("?"), colon=ord(":")),
    gpt2=Alphabet(names=np.arange(94, 50256), values=np.arange(94, 50256), bar=91, ask=30, colon=25),
)


class Form(NamedTuple):
    """The form of needles and questions, in tokens. A border is where a question ends and a chunk begins."""
    n_text: int             # text tokens of a chunk
    n_value: int
    n_hop: int = 1          # 1: |name:value|; 2: |a:b| and |b:c|
    path: str = "joined"    # of a chain's answer

    @property
    def n_name(self):
        return self.n_value if self.n_hop > 1 else NAME     # of a chain, what is a value here is a name there

    @property
    def needle_length(self):
        return self.n_name + self.n_value + 3               # |name:value|

    @property
    def part_offsets(self):
        """Where the parts of an answer begin, each with its colon: tokens after the border, (n_hop,)."""
        first = self.n_text if self.path == "late" else 0
        second = self.n_text if self.path == "spread" else first + self.n_value + 1
        return [first, second] if self.n_hop > 1 else [0]

    @property
    def answer_offsets(self):
        """The positions whose next token is part of the answer: tokens after the border, (number,)."""
        return np.concatenate([part + np.arange(self.n_value) for part in self.part_offsets])

    @property
    def chunks_per_question(self):
        """From one border to the next. The last of these chunks ends with the next question.

        One chunk has room for a part of an answer and a question, which are as long as a needle.
        """
        return 1 if self.n_hop == 1 else 3 if self.path == "late" else 2

    @property
    def least_length(self):
        """Tokens of a context with one question: chunks for its needles and itself, and the answer."""
        return (self.n_hop + 1) * self.n_text + 1 + self.part_offsets[-1] + self.n_value

    def last_border(self, length):
        """The chunk that begins at the last question's border, so late that its answer just fits."""
        return (length - 1 - self.part_offsets[-1] - self.n_value) // self.n_text

    def room(self, length):
        """How many questions a context of this length can have, with a chunk for each needle.

        Of n questions, the first one's border is chunk last_border - (n - 1) * chunks_per_question. All
        chunks before it but the question's own are for the n * n_hop needles.
        """
        each = self.chunks_per_question
        return (self.last_border(length) + each - 1) // (each + self.n_hop)


def needle_batch(text, rng, batch, length, form, n_question, alphabet=ALPHABETS["bytes"], straddle=False,
                 depth=None):
    """Contexts of `length` tokens: random stretches of text, with needles and questions written into them.

    straddle: needles lie anywhere before the questions; otherwise each inside one chunk, no two in the same.
    depth: in [0, 1), of the needles of a single question, in chunks that follow each other: 0 is the text's
    beginning. None: in any chunks.

    Returns tokens and next_tokens (batch, length), and answer_at (batch, number): the positions whose next
    token is part of an answer.
    """
    B, n, n_text = batch, n_question, form.n_text

    # The haystack: one token more than the context, because next_tokens are shifted by one.
    start = rng.integers(len(text), size=(B, 1))
    x = text.take(start + np.arange(length + 1), mode="wrap").astype(np.int64)

    # What is written: chains of n_hop + 1 strings, (B, n, tokens) each. A needle leads from each to the next:
    # |name:value|, or |a:b| and |b:c|. No token is twice in a value.
    if form.n_hop == 1:
        names = random_names(rng, B, n, NAME, alphabet.names)
        values = distinct(rng, B * n, form.n_value, len(alphabet.values)).reshape(B, n, form.n_value)
        chain = [names, alphabet.values[values]]
    else:
        names = random_names(rng, B, n * (form.n_hop + 1), form.n_value, alphabet.values)
        chain = np.split(names, form.n_hop + 1, axis=1)
    bar = np.full((B, n, 1), alphabet.bar)
    ask = np.full((B, n, 1), alphabet.ask)
    colon = np.full((B, n, 1), alphabet.colon)
    needles = [np.concatenate([bar, a, colon, b, bar], axis=2)
               for a, b in zip(chain[:-1], chain[1:], strict=True)]

    # Where the questions end, with room for the answers between them.
    border = form.last_border(length) - form.chunks_per_question * np.arange(n)[::-1]   # (n,), in chunks
    border_at = np.broadcast_to(border * n_text, (B, n))

    # Where the needles go: before all questions.
    n_needle, n_before = n * form.n_hop, border[0] - 1
    if straddle:
        needle_at = random_starts(rng, B, n_needle, n_before * n_text, form.needle_length)
    else:
        if depth is None:
            chunk = random_starts(rng, B, n_needle, n_before, 1)
        else:
            first = int(depth * (n_before - n_needle + 1))
            chunk = np.broadcast_to(first + np.arange(n_needle), (B, n_needle))
        needle_at = chunk * n_text + rng.integers(0, n_text - form.needle_length + 1, (B, n_needle))

    write(x, needle_at, np.concatenate(needles, axis=1))
    write(x, border_at - (2 + form.n_name), np.concatenate([bar, ask, chain[0]], axis=2))
    for offset, part in zip(form.part_offsets, chain[1:], strict=True):
        write(x, border_at + offset, np.concatenate([colon, part], axis=2))

    # A colon predicts the first token of the value, and each token but the last one predicts the next.
    answer_at = (border_at[..., None] + form.answer_offsets).reshape(B, -1)
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
    names = alphabet[numbers[..., None] // base ** np.arange(head) % base]      # its digits in this base
    if size == head:
        return names
    return np.concatenate([names, rng.choice(alphabet, (rows, n, size - head))], axis=2)


def random_starts(rng, rows, n, room, size):
    """(rows, n) starts of n stretches of `size`, in random order, that do not overlap within `room`."""
    # Places on a line where the stretches have no length; then each moves on by those before it.
    gaps = np.sort(rng.integers(0, room - n * size + 1, (rows, n)))
    return rng.permuted(gaps + np.arange(n) * size, axis=1)


def show_example():
    """Print one context, a chunk a line."""
    form = Form(n_text=15, n_value=6)
    tokens, _, _ = needle_batch(stdlib_corpus().val, np.random.default_rng(), 1, 128, form, 3)
    for i in range(0, 128, 15):
        chunk = bytes(tokens[0, i:i + 15].tolist())
        print(f"{i // 15:4}  {str(chunk)[2:-1]}")
