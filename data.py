"""Text, and the needles hidden in it.

Corpora: `stdlib` is the running Python's own library source, as bytes: real text without a download.
`python data.py text FOLDER --out data/mine` makes one of .txt files, for `train.py --data data/mine`;
`python data.py pg19` and `arxiv-math` download the paper's.

The needle task is the paper's NIAH protocol (Sec. 4) in a form that a small model learns in minutes. Several
named needles are hidden in real text, and as many questions are asked at its end (chunk borders shown as //):

    .. def close(self):  // se|kQ7b:VVVVVV| // elf._f ..    needle: a name and its value, distinct bytes
    ..  return None|?kQ7b // :VVVVVV .assert // ..          question: it ends a chunk; its answer follows

The question has to *end* a chunk because it is that chunk's landmark which retrieves, for the tokens of the
next. The colon after it belongs to the question: it is the first token to see what was retrieved, and
predicts the answer.

Run `python data.py show` to see an example.
"""
import argparse
import hashlib
import json
import multiprocessing
import os
import string
import sys
import sysconfig
import zlib
from collections import Counter
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

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


class Tokenizer(NamedTuple):
    encode: object          # text -> token ids
    decode_bytes: object    # token ids -> the bytes they stand for
    vocab_size: int
    separator: int          # between documents


@lru_cache
def load_tokenizer(name):
    """`bytes`, or tiktoken's `gpt2`; ValueError if that cannot be had."""
    if name == "bytes":
        return Tokenizer(encode_bytes, bytes, 256, 0)
    try:
        import tiktoken
        gpt2 = tiktoken.get_encoding("gpt2")
    except Exception as error:                      # of the network, in many shapes
        raise ValueError("the GPT-2 tokenizer could not be loaded: set TIKTOKEN_CACHE_DIR to a folder that "
                         "holds tiktoken's files for it, or use --tokenizer bytes") from error
    return Tokenizer(gpt2.encode_ordinary, gpt2.decode_bytes, gpt2.n_vocab, gpt2.eot_token)


class Corpus(NamedTuple):
    train: np.ndarray       # token ids, one document after the other
    val: np.ndarray         # of other documents
    vocab_size: int
    tokenizer: str = "bytes"
    test: np.ndarray = None     # of yet others, where there are some


def load_corpus(name):
    """`stdlib`, or a folder that data.py prepared, read as it is needed; ValueError if there is none."""
    if name == "stdlib":
        return stdlib_corpus()
    folder, splits = Path(name), {}
    if not (folder / "meta.json").is_file():
        raise ValueError(f"--data must be 'stdlib' or a folder that `python data.py` made, got {name!r}")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        sizes = {split: meta["splits"][split]["tokens"] for split in {"train", "val", *meta["splits"]}}
        vocab_size, tokenizer = meta["vocab_size"], meta["tokenizer"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}/meta.json is damaged or not one of data.py: prepare it again") from error
    for split, wanted in sizes.items():
        path = folder / f"{split}.bin"
        if not path.is_file() or path.stat().st_size != 2 * wanted or not wanted:
            raise ValueError(f"{path} must hold the {wanted} tokens that meta.json says: prepare it again")
        splits[split] = np.memmap(path, np.uint16, mode="r")
    return Corpus(vocab_size=vocab_size, tokenizer=tokenizer, **splits)


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


# ---------------------------------------------------------------- a folder of text -> a corpus

def split_documents(folder):
    """{split: paths} of a folder's .txt files: its own train, val and test, or one in twenty for val."""
    splits = {name: sorted((folder / name).rglob("*.txt")) for name in ("train", "val", "test")}
    if not splits["train"]:
        files = sorted(folder.rglob("*.txt"))
        if len(files) < 2:
            raise ValueError(f"{folder} must hold at least two .txt files, a document each, got {len(files)}")
        drawn = sorted(files, key=lambda path: zlib.crc32(path.relative_to(folder).as_posix().encode()))
        n_val = max(1, len(files) // 20)
        splits = dict(train=sorted(drawn[n_val:]), val=sorted(drawn[:n_val]))
    if not splits["val"]:
        raise ValueError(f"{folder}/val must hold .txt files, as {folder}/train does")
    return {name: files for name, files in splits.items() if files}


def tokenize(document, tokenizer, errors):
    """The tokens of a document (a path, or its text) and the separator, (n,) uint16, and its size in bytes.

    None if it is not UTF-8 text.
    """
    tokenizer = load_tokenizer(tokenizer)
    data = document.encode() if isinstance(document, str) else document.read_bytes()
    try:
        text = data.decode(errors=errors)
    except UnicodeDecodeError:
        return None
    if b"\0" in data:
        return None
    return np.append(tokenizer.encode(text), tokenizer.separator).astype(np.uint16), len(data)


def prepare(splits, out, tokenizer, errors="strict"):
    """Write out/train.bin, val.bin (and test.bin), uint16, and meta.json. A split that is there is kept.

    splits  {name: (documents, how many (None: unknown), what identifies them)}
    """
    kind = load_tokenizer(tokenizer)
    out.mkdir(parents=True, exist_ok=True)
    meta = dict(tokenizer=tokenizer, vocab_size=kind.vocab_size, errors=errors, splits={})
    old = json.loads((out / "meta.json").read_text()) if (out / "meta.json").is_file() else {}
    for split, (documents, number, identity) in splits.items():
        source = hashlib.sha256(json.dumps([tokenizer, errors, identity]).encode()).hexdigest()
        done = old.get("splits", {}).get(split, {})
        if done.get("source") != source or not (out / f"{split}.bin").is_file():
            done = write_split(out / f"{split}.bin", documents, number, tokenizer, errors)
        meta["splits"][split] = done | dict(source=source)
        write_atomically(out / "meta.json", json.dumps(meta, indent=1) + "\n")
        print(f"{split}: {done['documents']:,} documents, {done['tokens']:,} tokens, "
              f"{done['skipped']:,} skipped (not UTF-8 text)")


def write_split(path, documents, number, tokenizer, errors):
    """Tokenize documents, in order and in parallel, into one .bin; atomic. Returns counts and a hash."""
    partial_path, digest = path.with_name(path.name + ".partial"), hashlib.sha256()
    count, documents, work = Counter(), iter(documents), partial(tokenize, tokenizer=tokenizer, errors=errors)
    with multiprocessing.Pool() as pool, open(partial_path, "wb") as file, \
            tqdm(desc=path.stem, total=number, unit="document") as bar:
        while some := list(islice(documents, 256)):             # a pool would read all of a stream at once
            for done in pool.imap(work, some):
                bar.update()
                if done is None:
                    count["skipped"] += 1
                    continue
                tokens, size = done
                file.write(tokens.tobytes())
                digest.update(tokens.tobytes())
                count.update(tokens=len(tokens), bytes=size, documents=1)
    if not count["documents"]:
        partial_path.unlink()
        raise ValueError(f"{path.stem} must hold UTF-8 text, got none; --errors replace takes others")
    os.replace(partial_path, path)
    return dict(tokens=count["tokens"], bytes=count["bytes"], documents=count["documents"],
                skipped=count["skipped"], sha256=digest.hexdigest())


def prepare_text(folder, out, tokenizer, errors):
    """A folder of .txt files -> a corpus in out."""
    def identity(files):
        return [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in files]

    splits = split_documents(folder)
    prepare({name: (files, len(files), identity(files)) for name, files in splits.items()},
            out, tokenizer, errors)


# Data sets of the paper (Sec. 4), on the Hugging Face hub: arguments of datasets.load_dataset, the names of
# the splits there, and which rows are meant. The arXiv part of proof-pile is ArXiv-math.
PROOF_PILE = "hf://datasets/hoskinson-center/proof-pile"
DATASETS = {
    "pg19": (dict(path="emozilla/pg19"),
             dict(train="train", val="validation", test="test"),
             lambda row: True),
    "arxiv-math": (dict(path="json", data_files=dict(train=f"{PROOF_PILE}/train/*.jsonl.gz",
                                                     val=f"{PROOF_PILE}/dev/*.jsonl.gz",
                                                     test=f"{PROOF_PILE}/test/*.jsonl.gz")),
                   dict(train="train", val="val", test="test"),
                   lambda row: json.loads(row["meta"]).get("config") == "arxiv"),
}


def prepare_dataset(name, out, tokenizer):
    """Download one of DATASETS, row by row, into a corpus in out."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(f"{name} needs the package datasets: pip install datasets") from error
    arguments, names, wanted = DATASETS[name]

    def texts(split):
        for row in load_dataset(**arguments, split=split, streaming=True):
            if wanted(row):
                yield row["text"]

    prepare({split: (texts(theirs), None, [name, theirs]) for split, theirs in names.items()}, out, tokenizer)


def write_atomically(path, text):
    partial_path = path.with_name(path.name + ".partial")
    partial_path.write_text(text)
    os.replace(partial_path, path)


# ---------------------------------------------------------------- windows of a corpus, for language modelling

@lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    return np.random.default_rng([TRAINING, seed, epoch]).permutation(n)


def window_batch(text, seed, first, batch, length):
    """Sequences number first, first + 1, .. of an endless walk over the text: tokens and next tokens.

    Each epoch reads every window of `length` tokens once, in an order of its own. So what a step reads is a
    pure function of its number, no two ranks read the same, and a resumed run goes on where it was.
    """
    n = (len(text) - 1) // length
    if n < 1:
        raise ValueError(f"--data must hold more than seq_len tokens in each split, got {len(text)} tokens "
                         f"for seq_len {length}")
    rows = []
    for i in range(first, first + batch):
        epoch, window = divmod(i, n)
        start = epoch_order(n, seed, epoch)[window] * length
        rows.append(text[start:start + length + 1])
    x = np.stack(rows).astype(np.int64)
    return x[:, :-1], x[:, 1:]


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
    parser = Parser(description="Prepare a corpus, or look at the needle task.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    text = commands.add_parser("text", description="Tokenize a folder of .txt files, one document a file.")
    text.add_argument("folder", type=Path, help="holds the files, or folders train, val and test that do")
    text.add_argument("--out", type=Path, required=True, help="folder to write train.bin and val.bin to")
    text.add_argument("--tokenizer", choices=["gpt2", "bytes"], default="gpt2", help="default: %(default)s")
    text.add_argument("--errors", choices=["strict", "replace"], default="strict",
                      help="what is not UTF-8: skip the document, or replace the characters (%(default)s)")
    for name in DATASETS:
        download = commands.add_parser(name, description=f"Download {name} (needs the package datasets).")
        download.add_argument("--out", type=Path, default=Path("data") / name, help="default: %(default)s")
        download.add_argument("--tokenizer", choices=["gpt2", "bytes"], default="gpt2",
                              help="default: %(default)s")
    show = commands.add_parser("show", description="Show one context of the needle task, a line a chunk.")
    show.add_argument("--chunk_size", type=int, default=16, help="S, landmark included (%(default)s)")
    show.add_argument("--seq_len", type=int, default=128, help="tokens of context (%(default)s)")
    show.add_argument("--seed", type=int, default=0, help="another seed, another context (%(default)s)")
    args = parser.parse_args(sys.argv[1:] or ["show"])
    try:
        if args.command == "text":
            prepare_text(args.folder, args.out, args.tokenizer, args.errors)
        elif args.command in DATASETS:
            prepare_dataset(args.command, args.out, args.tokenizer)
        else:
            show_task(args.chunk_size, args.seq_len, args.seed)
    except (ValueError, OSError) as error:
        parser.error(error)


def show_task(chunk_size, seq_len, seed):
    task = NeedleTask(chunk_size, n_needle=3, n_value=6).fit(seq_len)
    tokens, _, _ = needle_batch(stdlib_corpus().val, task, np.random.default_rng(seed), 1, seq_len)
    for i in range(0, seq_len, task.text):
        print(f"{i // task.text:4}  {decode_bytes(tokens[0, i:i + task.text].astype(np.uint8))!r}")


if __name__ == "__main__":
    main()
