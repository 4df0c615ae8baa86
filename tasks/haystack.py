"""A haystack with needles: named values hidden in real text, and questions, after Sec. 4's NIAH protocol.

Several needles take the place of text, and as many questions are asked at its end (// are chunk borders):

    .. def close(self):  // se|kQ7b:VVVVVV| // elf._f ..    needle: a name and its value
    ..  return None|?kQ7b // :VVVVVV .assert // ..          question: it ends a chunk; its answer follows

The question has to *end* a chunk, because it is that chunk's landmark which retrieves, for the tokens of the
next chunk. Its colon opens the next chunk: it is the first token that sees what was retrieved, and predicts
the answer, as in the authors' released code. (The last text token of a chunk predicts before its own landmark
has retrieved.) In the released code a context has one question; here every needle is asked for.

Names and values are random. Of bytes, names are letters and digits, and values bytes that source code hardly
contains; of GPT-2 tokens, both are any but single ASCII characters.
`python -m tasks.needles` shows an example, one chunk a line. chains.py has pairs of needles.
"""
import string
from typing import NamedTuple

import numpy as np

NAME = 4            # tokens in a needle's name


class Alphabet(NamedTuple):
    names: np.ndarray       # token ids that names are made of
    values: np.ndarray      # and values; all of a pair is made of these
    bar: int                # the tokens | ? :
    ask: int
    colon: int


LETTERS = np.array([ord(c) for c in string.ascii_letters + string.digits])
# GPT-2's first 94 tokens are the ASCII characters from ! to ~, in order, and its last is the separator of
# documents. Names and values have none of these.
GPT2 = np.arange(94, 50256)
ALPHABETS = dict(
    bytes=Alphabet(LETTERS, np.arange(128, 256), *map(ord, "|?:")),
    gpt2=Alphabet(GPT2, GPT2, *(ord(c) - ord("!") for c in "|?:")))


class Haystack:
    """Contexts with needles |name:value|, and a question for each."""

    needles_per_answer, n_name = 1, NAME        # n_name: tokens that a question names

    def __init__(self, n_text, n_value, alphabet=ALPHABETS["bytes"], anywhere=False):
        """n_text: text tokens of a chunk; n_value: tokens of a value.

        anywhere: needles lie anywhere before the questions; otherwise each inside one chunk, no two in one.
        """
        self.n_text, self.n_value, self.alphabet, self.anywhere = n_text, n_value, alphabet, anywhere
        self.needle_length = NAME + n_value + 3                         # |name:value|
        self.least_length = 2 * n_text + 1 + n_value                    # of a context with one question
        self.answer_offsets = np.arange(n_value)    # positions that predict an answer, from where it begins

    def chunks_after_questions(self, length, n):
        """The chunk (n,) behind each of n questions, so late that the last answer still fits."""
        return (length - 1 - self.n_value) // self.n_text - np.arange(n)[::-1]

    def questions_in(self, length, wanted):
        """How many needles and questions a context has: as many as wanted, or as fit, a chunk for each."""
        return min(wanted, (length - 1 - self.n_value) // self.n_text // 2)

    def batch(self, text, rng, B, length, wanted):
        """B contexts of `length` tokens: stretches of text, with questions_in() needles and questions each.

        Returns tokens and next_tokens (B, length), and answer_at (B, n * n_value): the positions whose next
        token is part of an answer.
        """
        n, (bar, ask, colon) = self.questions_in(length, wanted), self.alphabet[2:]
        start = rng.integers(len(text), size=(B, 1))            # one token more, as next_tokens are shifted
        x = text.take(start + np.arange(length + 1), mode="wrap").astype(np.int64)
        names = random_names(rng, B, n, NAME, self.alphabet.names)                      # (B, n, NAME)
        values = distinct(rng, B * n, self.n_value, len(self.alphabet.values))      # none has a token twice
        values = self.alphabet.values[values].reshape(B, n, self.n_value)

        first_answer = self.chunks_after_questions(length, n)[0]
        n_before = first_answer - 1                                     # chunks before the first question's
        needle_at = needle_places(rng, B, n, n_before, self.n_text, self.needle_length, self.anywhere)
        colon_at = self.chunks_after_questions(length, n) * self.n_text + np.zeros((B, 1), int)     # (B, n)
        write(x, needle_at, bar, names, colon, values, bar)
        write(x, colon_at - (2 + NAME), bar, ask, names)
        write(x, colon_at, colon, values)
        # A colon predicts the first token of the value, and each token but the last one predicts the next.
        return x[:, :-1], x[:, 1:], (colon_at[..., None] + self.answer_offsets).reshape(B, -1)


def needle_places(rng, B, n, n_chunk, n_text, size, anywhere):
    """Where n needles of `size` tokens begin in the first n_chunk chunks: (B, n)."""
    if anywhere:
        return random_starts(rng, B, n, n_chunk * n_text, size)
    chunk = random_starts(rng, B, n, n_chunk, 1)
    return chunk * n_text + rng.integers(0, n_text - size + 1, (B, n))


def write(x, at, *parts):
    """Write parts, (B, n, tokens) or a token each, one after the other into x (B, length), from at (B, n)."""
    row, at = np.arange(len(x))[:, None, None], at[..., None]
    for part in parts:
        size = 1 if isinstance(part, int) else part.shape[2]
        x[row, at + np.arange(size)] = part
        at = at + size


def distinct(rng, rows, n, high):
    """(rows, n) integers below high, no two of a row equal."""
    if n * n > 4 * high:                # so many that almost every draw has two that are equal
        return np.stack([rng.choice(high, n, replace=False) for _ in range(rows)])
    x = rng.integers(high, size=(rows, n))
    while (again := (np.diff(np.sort(x)) == 0).any(1)).any():
        x[again] = rng.integers(high, size=(again.sum(), n))
    return x


def random_names(rng, B, n, size, alphabet):
    """(B, n, size) tokens of an alphabet, no two names of a context equal: the first four tell them apart."""
    head, base = min(size, 4), len(alphabet)
    numbers = distinct(rng, B, n, base ** head)
    names = alphabet[numbers[..., None] // base ** np.arange(head) % base]      # its digits in this base
    if size == head:
        return names
    return np.concatenate([names, rng.choice(alphabet, (B, n, size - head))], axis=2)


def random_starts(rng, B, n, room, size):
    """(B, n) starts of n stretches of `size`, in random order, that do not overlap within `room`."""
    # Places on a line where the stretches have no length; then each moves on by those before it.
    gaps = np.sort(rng.integers(0, room - n * size + 1, (B, n)))
    return rng.permuted(gaps + np.arange(n) * size, axis=1)
