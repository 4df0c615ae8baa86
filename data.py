"""Text, and the needles hidden in it.

Corpora: `stdlib` is the running Python's own library source, as bytes: real text without a download.

The needle task is the paper's NIAH protocol (Sec. 4) in a form that a small model learns in minutes. Several
named needles are hidden in real text, and as many questions are asked at its end (chunk borders shown as //):

    .. def close(self):  // se|kQ7b:VVVVVV| // elf._f ..    needle: a name and its value, distinct bytes
    ..  return None|?kQ7b // :VVVVVV .assert // ..          question: it ends a chunk; its answer follows

The question has to *end* a chunk because it is that chunk's landmark which retrieves, for the tokens of the
next. The colon after it belongs to the question: it is the first token to see what was retrieved, and
predicts the answer.

Run `python data.py` to see an example.
"""
import argparse
import string
import sys
import sysconfig
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Every random draw is a pure function of (stream, seed, step or length), so training can resume exactly and
# evaluation never meets training's needles.
TRAINING, VALIDATION, EVALUATION = 1, 2, 3


# ---------------------------------------------------------------- tokenizer and corpora

def encode_bytes(text):
    """The byte tokenizer: text -> UTF-8 bytes as token ids 0..255."""
    return np.frombuffer(text.encode(), np.uint8)


def decode_bytes(tokens):
    """Token ids 0..255 -> text; bytes that are not UTF-8 are shown as they print in Python, \\x80."""
    return bytes(tokens).decode(errors="backslashreplace")


class Corpus(NamedTuple):
    train: np.ndarray       # token ids, one document after the other
    val: np.ndarray         # of other documents
    vocab_size: int


def load_corpus(name):
    """The corpus called name; ValueError if there is none."""
    if name != "stdlib":
        raise ValueError(f"--data must be 'stdlib' (the only corpus so far), got {name!r}")
    return stdlib_corpus()


def stdlib_corpus():
    """Python's library source as bytes; about one file in eight, chosen by its path, is for validation."""
    root = Path(sysconfig.get_path("stdlib"))
    splits = [], []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if "-packages/" not in name:                     # site-packages and dist-packages are not the library
            splits[zlib.crc32(name.encode()) % 8 == 0].append(path.read_bytes())
    train, val = (np.frombuffer(b"".join(files), np.uint8) for files in splits)
    return Corpus(train, val, 256)


# ---------------------------------------------------------------- the needle task

NAME = 4            # letters and digits in a needle's name
ALPHABET = np.array([ord(c) for c in string.ascii_letters + string.digits])
VALUES = 128        # values are bytes from here up, which source code hardly contains


class NeedleTask(NamedTuple):
    """The sizes of the task."""
    chunk_size: int         # S, as the model's: a chunk is S - 1 text tokens
    n_needle: int           # needles in a context, each asked for once
    n_value: int            # bytes in a needle's value
    straddle: bool = False  # True: needles lie anywhere; False: each inside one chunk

    @property
    def text(self):
        return self.chunk_size - 1

    @property
    def needle_length(self):
        return NAME + self.n_value + 3                          # |kQ7b:VVVVVV|

    def fit(self, length):
        """The task with as many of its needles as fit in `length` tokens; ValueError if not even one does."""
        if self.n_needle < 1 or not 1 <= self.n_value <= 128:
            raise ValueError(f"n_needle must be at least 1 and n_value in 1..128, "
                             f"got {self.n_needle} and {self.n_value}")
        if self.text < self.needle_length:
            raise ValueError(f"chunk_size must be at least {self.needle_length + 1} to hold a needle with a "
                             f"value of {self.n_value} bytes, got {self.chunk_size}")
        room = (length - 1 - self.n_value) // (2 * self.text)    # a chunk for each needle, and each question
        if room < 1:
            raise ValueError(f"seq_len must be at least {2 * self.text + 1 + self.n_value} for a needle and "
                             f"its question in chunks of {self.chunk_size}, got {length}")
        return self._replace(n_needle=min(self.n_needle, room))


def distinct(rng, rows, n, high):
    """(rows, n) integers below high, no two of a row equal."""
    x = rng.integers(high, size=(rows, n))
    while (again := (np.diff(np.sort(x)) == 0).any(1)).any():
        x[again] = rng.integers(high, size=(again.sum(), n))
    return x


def places(rng, rows, n, room, size):
    """(rows, n) starts of n stretches of `size`, in random order, that do not overlap within `room`."""
    gaps = np.sort(rng.integers(0, room - n * size + 1, (rows, n)))
    return rng.permuted(gaps + np.arange(n) * size, axis=1)


def needle_batch(text, task, rng, batch, length):
    """A batch of the needle task over random stretches of text (repeated where it is shorter than a context).

    Returns tokens (batch, length), next_tokens (batch, length) and is_answer (batch, length), which marks the
    positions whose next token is part of an answer. All questions lie at the end, one a chunk, one after
    another.
    """
    B, n, S = batch, task.n_needle, task.text
    last = (length - 1 - task.n_value) // S                     # the chunk that the last answer opens
    x = text.take(rng.integers(len(text), size=(B, 1)) + np.arange(length + 1), mode="wrap").astype(np.int64)

    letters = ALPHABET[distinct(rng, B, n, 62 ** NAME)[..., None] // 62 ** np.arange(NAME) % 62]
    values = distinct(rng, B * n, task.n_value, 256 - VALUES).reshape(B, n, -1) + VALUES
    bar, ask, colon = (np.full((B, n, 1), ord(c)) for c in "|?:")
    needles = np.concatenate([bar, letters, colon, values, bar], -1)
    questions = np.concatenate([bar, ask, letters, colon, values], -1)

    if task.straddle:
        start = places(rng, B, n, (last - n) * S, task.needle_length)
    else:
        start = places(rng, B, n, last - n, 1) * S + rng.integers(0, S - task.needle_length + 1, (B, n))
    answer = S * np.arange(last - n + 1, last + 1)[:, None] + np.arange(task.n_value)   # (n, V), colon first
    question = answer[:, :1] - (2 + NAME) + np.arange(questions.shape[-1])
    rows = np.arange(B)[:, None, None]
    x[rows, start[..., None] + np.arange(task.needle_length)] = needles
    x[rows, question] = questions
    is_answer = np.zeros((B, length), bool)
    is_answer[:, answer] = True
    return x[:, :-1], x[:, 1:], is_answer


# ---------------------------------------------------------------- command lines

class Parser(argparse.ArgumentParser):
    """A user's mistake ends in one line, `error: ...`, and exit status 2."""

    def error(self, message):
        sys.stdout.flush()
        self.exit(2, f"error: {message}\n")

    def add_fields(self, fields, choices=None, helps=None):
        """A flag for each field of a dataclass, None where it is not given."""
        for field in fields:
            kind = boolean if type(field.default) is bool else type(field.default)
            self.add_argument(f"--{field.name}", type=kind, choices=(choices or {}).get(field.name),
                              help=(helps or {}).get(field.name, f"default: {field.default}"))


def boolean(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return text.lower() == "true"


def main():
    parser = Parser(description="Show one context of the needle task, a line a chunk.")
    parser.add_argument("--chunk_size", type=int, default=16, help="S, landmark included (%(default)s)")
    parser.add_argument("--seq_len", type=int, default=128, help="tokens of context (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another context (%(default)s)")
    args = parser.parse_args()
    try:
        task = NeedleTask(args.chunk_size, n_needle=3, n_value=6).fit(args.seq_len)
    except ValueError as error:
        parser.error(error)
    tokens, _, _ = needle_batch(stdlib_corpus().val, task, np.random.default_rng(args.seed), 1, args.seq_len)
    for i in range(0, args.seq_len, task.text):
        print(f"{i // task.text:4}  {decode_bytes(tokens[0, i:i + task.text].astype(np.uint8))!r}")


if __name__ == "__main__":
    main()
