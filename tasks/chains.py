"""Two needles for an answer: two hops (Sec. 4), and what RULER calls multi-value and multi-query.

    multihop      |a:b| .. |b:c|    ?a      :b:c    a chain, of which the question names the beginning
    multivalue    |a:b| .. |a:c|    ?a      :b:c    both values of a name; the first token of one is given
    multiquery    |a:b| .. |d:c|    ?a?d    :b:c    the values of two names

A question ends a chunk, as in haystack.py. Its answer opens the next chunk, or, of a chain, the one after (//
is the border of a chunk):

    ..  None|?aaaa // :bbbb:cccc ..                         two values
    ..  None|?aaaa // .assert(x, y) // :bbbb:cccc ..        a chain: b is not written before c is asked for

So a chain takes two retrievals. The question's landmark retrieves |a:b|, and in the first group of layers the
chunk of text between attends to it. Its own landmark then knows b, and retrieves |b:c| for the second group.
"""
import numpy as np

from tasks.haystack import ALPHABETS, places, random_names, write

PAIRS = "multihop", "multivalue", "multiquery"


class Pairs:
    """Contexts with pairs of needles, and a question for each pair; methods as Haystack's."""

    n_hop = 2

    def __init__(self, n_text, n_value, alphabet=ALPHABETS["bytes"], anywhere=False, kind="multihop"):
        self.n_text, self.n_value, self.alphabet, self.kind = n_text, n_value, alphabet, kind
        self.n_name = 2 * n_value + 1 if kind == "multiquery" else n_value      # of what a question names
        self.needle_length = 2 * n_value + 3                            # |a:b|, where both are names
        first = n_text if kind == "multihop" else 0     # where the parts begin: tokens after the question
        self.parts = first, first + n_value + 1
        self.chunks_per_question = 3 if kind == "multihop" else 2
        self.least_length = 3 * n_text + 1 + self.parts[1] + n_value    # of a context with one question
        self.answer_offsets = np.concatenate([part + np.arange(n_value) for part in self.parts])
        if kind == "multivalue":                    # which value comes first is anybody's guess
            self.answer_offsets = self.answer_offsets[1:]
        self.anywhere = anywhere

    def answer_chunks(self, length, n):
        """The chunks (n,) after those that n questions end, so late that the last answer still fits."""
        last = (length - 1 - self.parts[1] - self.n_value) // self.n_text
        return last - self.chunks_per_question * np.arange(n)[::-1]

    def questions_in(self, length, wanted):
        """How many questions a context has: as many as wanted, if there is a chunk for each needle.

        Of n questions, the first one ends chunk answer_chunks(length, n)[0] - 1 = last - each (n - 1) - 1.
        The 2 n needles lie in the chunks before that.
        """
        last, each = int(self.answer_chunks(length, 1)[0]), self.chunks_per_question
        return min(wanted, (last + each - 1) // (each + self.n_hop))

    def batch(self, text, rng, B, length, wanted):
        n, (bar, ask, colon) = self.questions_in(length, wanted), self.alphabet[2:]
        start = rng.integers(len(text), size=(B, 1))
        x = text.take(start + np.arange(length + 1), mode="wrap").astype(np.int64)
        names = random_names(rng, B, 4 * n, self.n_value, self.alphabet.values)
        a, b, c, d = names.reshape(B, 4, n, -1).swapaxes(0, 1)          # (B, n, n_value) each
        if self.kind == "multivalue":               # the first token has to tell a name's two values apart
            one, other = self.alphabet.values[:2]
            c[..., 0] = np.where(c[..., 0] == b[..., 0], np.where(b[..., 0] == one, other, one), c[..., 0])
        second = dict(multihop=b, multivalue=a, multiquery=d)[self.kind]        # the second needle's name

        answer_chunks = self.answer_chunks(length, n)
        n_before = answer_chunks[0] - 1                                 # chunks before the first question's
        needle_at = places(rng, B, 2 * n, n_before, self.n_text, self.needle_length, self.anywhere)
        border_at = answer_chunks * self.n_text + np.zeros((B, 1), int)                         # (B, n)
        write(x, needle_at[:, :n], bar, a, colon, b, bar)
        write(x, needle_at[:, n:], bar, second, colon, c, bar)
        asked = (a, ask, d) if self.kind == "multiquery" else (a,)
        write(x, border_at - (2 + self.n_name), bar, ask, *asked)
        write(x, border_at + self.parts[0], colon, b)
        write(x, border_at + self.parts[1], colon, c)
        return x[:, :-1], x[:, 1:], (border_at[..., None] + self.answer_offsets).reshape(B, -1)
