"""Two needles for an answer: two hops (Sec. 4), and what RULER calls multi-value and multi-query.

    multihop      |a:b| .. |b:c|    ?a      :b:c    a chain, of which the question names the beginning
    multivalue    |a:b| .. |a:c|    ?a      :b:c    both values of a name; the first token of one is given
    multiquery    |a:b| .. |d:c|    ?a?d    :b:c    the values of two names

A question ends a chunk, as in haystack.py. Its answer opens the next chunk, or, of a chain, the one after (//
is the border of a chunk):

    ..  None|?aaaa // :bbbb:cccc ..                         two values
    ..  None|?aaaa // .assert(x, y) // :bbbb:cccc ..        a chain

What the answer's chunk reads was chosen by the landmark before it, and the question says a, not b. So a chain
takes two retrievals, of two groups of upper layers. The question's landmark retrieves |a:b|, and in the first
group the chunk of text between reads it, landmark included. So this landmark knows b when the second group
retrieves: |b:c|, from which the answer's chunk writes both.
"""
import numpy as np

from tasks.haystack import ALPHABETS, needle_places, random_names, write

PAIRS = "multihop", "multivalue", "multiquery"


class Pairs:
    """Contexts with pairs of needles, and a question for each pair; methods as Haystack's."""

    needles_per_answer = 2

    def __init__(self, n_text, n_value, alphabet=ALPHABETS["bytes"], anywhere=False, kind="multihop"):
        self.n_text, self.n_value, self.alphabet, self.kind = n_text, n_value, alphabet, kind
        self.n_name = 2 * n_value + 1 if kind == "multiquery" else n_value      # of what a question names
        self.needle_length = 2 * n_value + 3                            # |a:b|, where both are names
        first = n_text if kind == "multihop" else 0
        self.colons = first, first + n_value + 1        # where :b and :c begin: tokens after the question
        self.chunks_per_question = 3 if kind == "multihop" else 2
        self.least_length = 3 * n_text + 1 + self.colons[1] + n_value   # of a context with one question
        self.answer_offsets = np.concatenate([colon + np.arange(n_value) for colon in self.colons])
        if kind == "multivalue":                    # which value comes first is anybody's guess
            self.answer_offsets = self.answer_offsets[1:]
        self.anywhere = anywhere

    def chunks_after_questions(self, length, n):
        """The chunk (n,) behind each of n questions, so late that the last answer still fits."""
        last = (length - 1 - self.colons[1] - self.n_value) // self.n_text
        return last - self.chunks_per_question * np.arange(n)[::-1]

    def questions_in(self, length, wanted):
        """How many questions a context has: as many as wanted, or as many as fit.

        Their 2 n needles need a chunk each before the first question's: 2 n <= last - each * (n - 1) - 1.
        """
        last, each = int(self.chunks_after_questions(length, 1)[0]), self.chunks_per_question
        return min(wanted, (last + each - 1) // (each + self.needles_per_answer))

    def batch(self, text, rng, B, length, wanted):
        """B contexts with questions_in() questions each: tokens, next tokens and answer_at, as Haystack's."""
        n, (bar, ask, colon) = self.questions_in(length, wanted), self.alphabet[2:]
        start = rng.integers(len(text), size=(B, 1))
        x = text.take(start + np.arange(length + 1), mode="wrap").astype(np.int64)
        names = random_names(rng, B, 4 * n, self.n_value, self.alphabet.values)
        a, b, c, d = names.reshape(B, 4, n, -1).swapaxes(0, 1)          # (B, n, n_value) each
        if self.kind == "multivalue":               # the first token has to tell a name's two values apart
            one, other = self.alphabet.values[:2]
            c[..., 0] = np.where(c[..., 0] == b[..., 0], np.where(b[..., 0] == one, other, one), c[..., 0])
        second = dict(multihop=b, multivalue=a, multiquery=d)[self.kind]        # the second needle's name

        chunks = self.chunks_after_questions(length, n)
        n_before = chunks[0] - 1                                        # chunks before the first question's
        needle_at = needle_places(rng, B, 2 * n, n_before, self.n_text, self.needle_length, self.anywhere)
        border_at = chunks * self.n_text + np.zeros((B, 1), int)                                # (B, n)
        write(x, needle_at[:, :n], bar, a, colon, b, bar)
        write(x, needle_at[:, n:], bar, second, colon, c, bar)
        asked = (a, ask, d) if self.kind == "multiquery" else (a,)
        write(x, border_at - (2 + self.n_name), bar, ask, *asked)
        write(x, border_at + self.colons[0], colon, b)
        write(x, border_at + self.colons[1], colon, c)
        return x[:, :-1], x[:, 1:], (border_at[..., None] + self.answer_offsets).reshape(B, -1)
