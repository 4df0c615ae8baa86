"""Text: corpora by name, language modelling on them, and perplexity by context length.

    stdlib      the running Python's own library source, as bytes: real text without a download
    packages    the source of the installed packages, as bytes: more text, half of it for validation
    a folder    what `python -m tools.prepare` made: token ids in train.bin, val.bin, test.bin, and meta.json

What each method of a task is for, tasks/__init__.py says.
"""
import hashlib
import json
import os
import re
import sysconfig
import zlib
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from gca import Mistake, require
from tasks import TRAINING
from tasks.perplexity import Documents, by_copy, by_document, by_length, longest_context, places, windows

# ---------------------------------------------------------------- tokenizers

class Tokenizer(NamedTuple):
    encode: object          # text -> token ids
    decode_bytes: object    # token ids -> the bytes they stand for
    vocab_size: int
    separator: int          # between documents


NEWLINES = dict(bytes=10, gpt2=198)         # the token of a line break


def encode_bytes(text):
    """The byte tokenizer: text -> UTF-8 bytes as token ids 0..255."""
    return np.frombuffer(text.encode(), np.uint8)


@lru_cache
def load_tokenizer(name):
    """`bytes`, or tiktoken's `gpt2`; ValueError if that cannot be had."""
    if name == "bytes":
        return Tokenizer(encode_bytes, bytes, 256, 0)
    try:
        import tiktoken
        gpt2 = tiktoken.get_encoding("gpt2")
    except Exception as error:                      # of the network, in many shapes
        raise Mistake("the GPT-2 tokenizer could not be loaded. It is downloaded once; without a network, "
                      "set TIKTOKEN_CACHE_DIR to a copy of tiktoken's cache, or prepare text with "
                      "--tokenizer bytes") from error

    def encode(text):
        """In pieces, because a run of a million spaces is too much for tiktoken's regular expression."""
        ends = [run.end() for run in re.finditer(r"\s{50000}", text)]
        pieces = [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]
        return [token for piece in pieces for token in gpt2.encode_ordinary(piece)]

    return Tokenizer(encode, gpt2.decode_bytes, gpt2.n_vocab, gpt2.eot_token)


# ---------------------------------------------------------------- corpora

def text_files(folder, ending):
    """The texts in a folder, in order: regular files with this ending (or these). And what else has it.

    What has a name that begins with a dot is no text: editors and systems keep copies and locks there.
    """
    texts, others = [], []
    for path in sorted(Path(folder).rglob("*")):
        if path.name.lower().endswith(ending):
            is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
            (texts if path.is_file() and not is_hidden else others).append(path)
    return texts, others


class Corpus(NamedTuple):
    name: str               # as --data has it
    train: np.ndarray       # token ids, one document after the other
    val: np.ndarray         # of other documents
    vocab_size: int
    tokenizer: str = "bytes"
    test: np.ndarray = None     # of yet others, where there are some
    references: dict = None     # every second document is a summary: {split: hash of SPLIT.jsonl}
    names: dict = None          # {split: names of its documents}, where they have names
    contents: str = ""          # a hash of all tokens, if it is known

    def unseen(self, split=None):           # the split to measure on
        return split or ("val" if self.test is None else "test")

    def describe(self, split=None):         # the same for a report
        split = self.unseen(split)
        return dict(data=str(self.name), split=split, documents=(self.names or {}).get(split))


def load_corpus(name):
    """`stdlib`, `packages`, or a folder that tools/prepare.py made, read as it is needed; or ValueError."""
    if name == "stdlib":
        return stdlib_corpus()
    if name == "packages":
        return source_corpus(name, {*map(sysconfig.get_path, ("purelib", "platlib"))}, 2)
    folder, splits = Path(name), {}
    require((folder / "meta.json").is_file(),
            "--data must be 'stdlib', 'packages' or a folder that `python -m tools.prepare` made, "
            f"got {name!r}")
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        sizes = {split: meta["splits"][split]["tokens"] for split in {"train", "val", *meta["splits"]}}
        vocab_size, tokenizer = meta["vocab_size"], meta["tokenizer"]
        require(all(type(n) is int for n in [vocab_size, *sizes.values()]), "numbers")
        require(type(tokenizer) is str, "no tokenizer")
        hashes = [meta["splits"][split].get("sha256") for split in sizes]
        contents = hashlib.sha256(json.dumps(sorted(hashes)).encode()).hexdigest() if all(hashes) else ""
        names = meta.get("names") or {split: meta["splits"][split].get("names") for split in sizes}
        require(all(type(name) is str for split in sizes for name in names.get(split) or []), "names")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Mistake(f"{folder}/meta.json is damaged, or tools.prepare did not make it: "
                         "prepare the corpus again") from error
    require(tokenizer in NEWLINES, f"{folder}/meta.json: the tokenizer must be one of {', '.join(NEWLINES)}, "
            f"got {tokenizer}")
    for split, n_token in sizes.items():
        path = folder / f"{split}.bin"
        require(n_token and path.is_file() and path.stat().st_size == 2 * n_token,
                f"{path} must hold the {n_token} tokens that meta.json says: prepare it again")
        splits[split] = np.memmap(path, np.uint16, mode="r")
    others = dict(references=meta.get("references"), names=names, contents=contents)
    return Corpus(name, vocab_size=vocab_size, tokenizer=tokenizer, **others, **splits)


def stdlib_corpus():
    """Python's library source as bytes; about one file in eight, chosen by its path, is for validation."""
    return source_corpus("stdlib", [sysconfig.get_path("stdlib")], 8)


def source_corpus(name, folders, one_in):
    """The .py files in these folders as bytes, one in so many for validation; but not packages inside."""
    train, val = [], []
    for root in map(Path, folders):
        for path in text_files(root, ".py")[0]:
            inside = path.relative_to(root).as_posix()
            if "-packages/" not in inside and os.access(path, os.R_OK):      # those are not the library
                split = val if zlib.crc32(os.fsencode(inside)) % one_in == 0 else train
                split.append(path.read_bytes())
    require(train and val, f"--data {name}: there are no .py files in {', '.join(map(str, folders))}")
    train, val = (np.frombuffer(b"".join(files), np.uint8) for files in (train, val))
    return Corpus(name, train, val, 256)


def documents(text, separator):
    """Where each document of a text begins, and how many tokens it has: (documents,) each."""
    ends = np.append(np.flatnonzero(text == separator), len(text))
    starts = np.append(0, ends[:-1] + 1)
    exists = starts < len(text)                         # nothing follows the last separator
    return starts[exists], (ends - starts)[exists]


# ---------------------------------------------------------------- windows of a corpus

@lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    return np.random.default_rng([TRAINING, seed, epoch]).permutation(n)


def window_batch(text, seed, first, batch, length):
    """Sequences number first, first + 1, .. of an endless walk over the text: tokens and next tokens.

    Each epoch reads every window of `length` tokens once, in an order of its own. So what a step reads is a
    function of its number, and a resumed run goes on where it was.
    """
    n = (len(text) - 1) // length
    require(n, f"--data must hold more than seq_len tokens in each split, got {len(text)} tokens "
            f"for seq_len {length}")
    rows = []
    for i in range(first, first + batch):
        epoch, window = divmod(i, n)
        start = epoch_order(n, seed, epoch)[window] * length
        rows.append(text[start:start + length + 1])
    x = np.stack(rows).astype(np.int64)
    return x[:, :-1], x[:, 1:]


# ---------------------------------------------------------------- the task

SHORT = 0.4             # share of the steps that have contexts of start_len tokens
N_VALIDATION = 16       # sequences, always the same


class Text:
    """Language modelling: predict every next token."""

    METRICS = ()                        # what loss() returns beside the loss
    SCORES = ("val_loss",)
    REPORT, TITLE = "ppl.json", "Perplexity of unseen text by context length"

    def __init__(self, settings, corpus):
        self.settings, self.corpus = settings, corpus

    def lengths(self):
        """The context lengths of training: start_len for a while, then seq_len."""
        seq_len = self.settings["seq_len"]
        start_len = min(self.settings["start_len"] or seq_len, seq_len)
        return [start_len, seq_len] if start_len < seq_len else [seq_len]

    def check(self, length):
        """ValueError if the corpus cannot fill contexts of this length, or has no text to measure on."""
        for split in (self.corpus.train, self.corpus.val):
            window_batch(split, 0, 0, 1, length)
        self.plan()

    def batch(self, step, length, size):
        """Tokens and next tokens of step number `step`, (size, length) each."""
        batch = window_batch(self.corpus.train, self.settings["seed"], step * size, size, length)
        self.check_tokens(batch)
        return batch

    def check_tokens(self, batch):
        largest, n = max(x.max() for x in batch), self.corpus.vocab_size
        require(largest < n, f"{self.corpus.name} must hold tokens below its vocabulary's {n}, got {largest}")

    def loss(self, model, tokens, labels):
        return model.cross_entropy(model.hidden(tokens), model.embedding.weight, labels), {}

    @torch.no_grad()
    def score(self, model, step, length, size):
        """Mean loss of unseen text in contexts of seq_len tokens, as many at a time as in training."""
        batch = window_batch(self.corpus.val, 0, 0, N_VALIDATION, self.settings["seq_len"])
        self.check_tokens(batch)
        size = min(self.settings["batch_size"], self.settings["batch_tokens"] // self.settings["seq_len"])
        size = self.settings["micro_batch"] or max(1, size)
        device = model.embedding.weight.device
        tokens, labels = (torch.from_numpy(x).to(device).split(size) for x in batch)
        losses = [self.loss(model, *pair)[0] * len(pair[0]) for pair in zip(tokens, labels, strict=True)]
        return dict(val_loss=torch.stack(losses).sum().item() / N_VALIDATION)

    def next_length(self, length, step, score):
        return self.settings["seq_len"] if step >= SHORT * self.settings["steps"] else length

    def plan(self, by="length", lengths=None, n=None, seed=0, split=None):
        """Of a table: the documents, the lengths of context, and {document: places or windows in it}.

        ValueError if the corpus has no text for it. Notes for measured_on() which documents are measured.
        """
        split = self.corpus.unseen(split)
        text, names = getattr(self.corpus, split), (self.corpus.names or {}).get(split)
        these = Documents(text, *documents(text, load_tokenizer(self.corpus.tokenizer).separator), names)
        if by == "length":
            longest = longest_context(these.sizes, 0.5)                 # half of the documents have that
            lengths = lengths or [4 ** i for i in range(3, 9) if 4 ** i <= longest] or [max(1, longest)]
            found = places(these, max(lengths), n or 8, seed)
        else:
            require(names or by == "copy", f"--by document: {self.corpus.name} has no names of its "
                    "documents, which tools.prepare keeps for text and packages")
            lengths = lengths or [self.settings["seq_len"]]
            require(len(lengths) == 1, f"--lengths must be one with --by {by}, got {len(lengths)}")
            found = windows(these, lengths[0], n or 2)
        numbers = range(len(these.sizes))
        self.measured = dict(documents=[these.name(i) for i in numbers if i in found],
                             left_out=[these.name(i) for i in numbers if i not in found])
        return these, lengths, found

    def measured_on(self, split=None):
        return self.corpus.describe(split) | self.measured

    def measure(self, model, read, lengths=None, n=None, seed=0, split=None, by="length", **shared):
        """Perplexity by length of the context, by document or by copy, a row each (perplexity.py).

        n: places, or windows of each document. split: "val" or "test"; default: test where there is one.
        shared: what by_document and by_copy take, the same for all models.
        """
        if not n:
            n = (64 if model.embedding.weight.is_cuda else 8) // (1 if by == "length" else 4)
        these, lengths, found = self.plan(by, lengths, n, seed, split)
        if by == "length":
            decode_bytes = load_tokenizer(self.corpus.tokenizer).decode_bytes
            return by_length(model, read, these, found, lengths, decode_bytes)
        table = by_document if by == "document" else by_copy
        return table(model, read, these, found, lengths[0], **shared)
