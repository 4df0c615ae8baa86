"""Summaries: a document, the separator, its summary, the separator. The loss is on the summary and its end.

    pad def norm(x): .. re|turn x / .. |SEP Normalize a vector . SEP pad pad def ..      (| chunk borders)

The separator behind a document opens a chunk, as generation aligns prompts too (fast/generate.py): all of the
document then lies in chunks whose landmarks have retrieved when the first token of the summary is predicted.
Several pairs share a training context, so that no step computes on padding alone. They may retrieve each
other's chunks.

A corpus of pairs is made by `python -m tools.prepare docstrings`, `summaries`, `xsum` or `cnn_dailymail`.
"""
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gca import require
from model import NO_LABEL
from tasks import EVALUATION, TRAINING
from tasks.text import N_VALIDATION, NEWLINES, documents, load_tokenizer

N_EXAMPLE = 3       # of each kind, kept to be shown
CODE = "function", "module"


@dataclass
class SummaryConfig:
    n_summary: int = 256            # most tokens of a summary


# ---------------------------------------------------------------- pairs and training contexts

class Split:
    """The pairs of one split: where each document and summary lies in the text."""

    def __init__(self, text, separator):
        self.text, self.separator = text, separator
        starts, sizes = documents(text, separator)
        self.document_starts, self.document_sizes = starts[::2], sizes[::2]
        self.summary_starts, self.summary_sizes = starts[1::2], sizes[1::2]

    def __len__(self):
        return len(self.summary_starts)

    def document(self, i):
        return self.text[self.document_starts[i]:self.document_starts[i] + self.document_sizes[i]]

    def summary(self, i):
        return self.text[self.summary_starts[i]:self.summary_starts[i] + self.summary_sizes[i]]


def pack(pairs, order, length, n_text):
    """Which pairs go into each context of `length` tokens, and where.

    order: pair numbers. Returns a list for each context: [[(pair, tokens of its document, position of its
    separator)]]. A document that is too long for a context of its own is cut.
    """
    contexts, end = [], length + 1                  # as if a full context came before
    for i in order:
        n_answer = int(pairs.summary_sizes[i]) + 2                      # both separators
        size = min(int(pairs.document_sizes[i]), length - n_answer - n_text)
        at = -(-(end + size) // n_text) * n_text                        # the next chunk border
        if at + n_answer > length + 1:
            contexts.append([])
            at = -(-size // n_text) * n_text
        contexts[-1].append((i, size, at))
        end = at + n_answer
    return contexts


def context_of(pairs, placed, length, pad):
    """Tokens and labels (length,) of one context; placed: its list of pack()."""
    x = np.full(length + 1, pad, np.int64)          # one more, because labels are shifted by one
    labels = np.full(length + 1, NO_LABEL, np.int64)
    for i, size, at in placed:
        answer = np.append(pairs.summary(i), pairs.separator)
        x[at - size:at] = pairs.document(i)[:size]
        x[at] = pairs.separator
        x[at + 1:at + 1 + len(answer)] = labels[at + 1:at + 1 + len(answer)] = answer
    return x[:-1], labels[1:]


# ---------------------------------------------------------------- the task

class Summaries:
    """Write the summary that follows a document."""

    METRICS = ()
    SCORES = ("val_loss",)
    REPORT, TITLE = "summaries.json", "Loss of true summaries of unseen documents, and ROUGE of its own"

    def __init__(self, settings, corpus):
        self.settings, self.corpus = settings, corpus
        require(isinstance(corpus.references, dict), "--data must be a folder of documents and summaries, as "
                f"python -m tools.prepare docstrings makes one, got {corpus.name}")
        self.n_text, self.n_summary = settings["chunk_size"] - 1, settings["n_summary"]
        require(self.n_summary >= 1, f"--n_summary must be at least 1, got {self.n_summary}")
        self.separator = load_tokenizer(corpus.tokenizer).separator
        self.pad, self.contexts, self.epoch = NEWLINES[corpus.tokenizer], [], 0
        self.train, self.val = (Split(text, self.separator) for text in (corpus.train, corpus.val))
        self.expected = {split: load_expected(corpus, split) for split in corpus.references}

    def lengths(self):
        return [self.settings["seq_len"]]

    def check(self, length):
        """ValueError if a summary is longer than n_summary, or a context too short for one."""
        for split, pairs in (("train", self.train), ("val", self.val)):
            longest = int(pairs.summary_sizes.max(initial=0))
            require(longest <= self.n_summary, f"--n_summary must be at least {longest}, for the longest "
                    f"summary in {self.corpus.name}'s {split}, got {self.n_summary}")
        least = self.n_summary + 2 * self.n_text + 2
        require(length >= least,
                f"--seq_len must be at least {least} for summaries of {self.n_summary} tokens, got {length}")

    def batch(self, step, length, size):
        """Tokens and labels of step number `step`, (size, length) each; each epoch packs all pairs anew."""
        while len(self.contexts) < (step + 1) * size:
            rng = np.random.default_rng([TRAINING, self.settings["seed"], self.epoch])
            order = rng.permutation(len(self.train)).tolist()
            self.contexts += pack(self.train, order, length, self.n_text)
            self.epoch += 1
        placed = self.contexts[step * size:(step + 1) * size]
        return self.arrays(self.train, placed, length)

    def arrays(self, pairs, contexts, length):
        """Tokens and labels of these contexts, (number, length) each."""
        rows = [context_of(pairs, placed, length, self.pad) for placed in contexts]
        return np.stack([tokens for tokens, _ in rows]), np.stack([labels for _, labels in rows])

    def loss(self, model, tokens, labels):
        return model.cross_entropy(model.hidden(tokens), model.embedding.weight, labels), {}

    @torch.no_grad()
    def true_loss(self, model, pairs, numbers, n_context=None):
        """Mean loss of these pairs' summaries, in contexts as in training, the first n_context of them."""
        device, total, n = model.embedding.weight.device, 0.0, 0
        longest = int(pairs.summary_sizes.max())
        length = max(self.settings["seq_len"], longest + 2 * self.n_text + 2)
        for placed in pack(pairs, numbers, length, self.n_text)[:n_context]:
            tokens, labels = (torch.from_numpy(x).to(device) for x in self.arrays(pairs, [placed], length))
            number = int((labels != NO_LABEL).sum())
            total, n = total + self.loss(model, tokens, labels)[0].item() * number, n + number
        return total / n

    def score(self, model, step, length, size):
        """Mean loss of the summaries in unseen contexts, always the same."""
        return dict(val_loss=self.true_loss(model, self.val, range(len(self.val)), N_VALIDATION))

    def next_length(self, length, step, score):
        return length

    def measured_on(self, split=None):
        return self.corpus.describe(split)

    def measure(self, model, read, lengths=None, n=None, seed=0, split=None):
        """A row for each kind of document: loss of the true summaries, and ROUGE of generated ones (greedy).

        n: documents of each kind. The loss is taken in contexts of seq_len, where long documents are cut;
        ROUGE reads them whole. split: "val" or "test", default: test where there is one. In the place of a
        summary, lead: how the document begins; name: the words of its first function's or class's name;
        inside: the first line of the first docstring that is left in it. ROUGE needs the package rouge-score;
        without it there is the loss alone. The first documents of a kind are kept in self.examples.
        """
        n = n or (400 if model.embedding.weight.is_cuda else 20)
        split = self.corpus.unseen(split)
        require(split in self.expected, f"--split must be val: {self.corpus.name} has no test split")
        pairs, expected = Split(getattr(self.corpus, split), self.separator), self.expected[split]
        self.examples, rng = [], np.random.default_rng([EVALUATION, seed])
        for kind in sorted({row["kind"] for row in expected}):
            numbers = [i for i, row in enumerate(expected) if row["kind"] == kind]
            numbers = sorted(rng.permutation(numbers)[:n].tolist())
            size = float(pairs.document_sizes[numbers].mean())
            row = dict(kind=kind, documents=len(numbers), document_tokens=size,
                       loss=self.true_loss(model, pairs, numbers))
            if rouge_scorer():
                references = [expected[i]["references"] for i in numbers]
                row |= self.rouge(model, read, pairs, numbers, references, kind)
            yield row

    def rouge(self, model, read, pairs, numbers, references, kind):
        """ROUGE of what the model writes for these documents, and of how they begin."""
        decode = load_tokenizer(self.corpus.tokenizer).decode_bytes

        def text(ids):
            return decode(ids).decode(errors="replace").strip()

        prompts = [np.append(pairs.document(i), self.separator).astype(np.int64) for i in numbers]
        written = [text(ids) for ids in read.generate(model, prompts, self.n_summary, self.separator)]
        begins = [text(pairs.document(i).tolist()) for i in numbers]
        leads = [lead(document, kind) for document in begins]
        for i in range(min(N_EXAMPLE, len(numbers))):
            self.examples.append((kind, leads[i], references[i], written[i]))
        row = mean_rouge(references, written, "") | mean_rouge(references, leads, "lead_")
        for name, baseline in dict(name_=words_of_name, inside_=docstring_inside).items():
            others = [baseline(document) if kind in CODE else "" for document in begins]
            row[f"{name}rougeL"] = mean_rouge(references, others, "")["rougeL"]
        return row


# What a summary should be better than: how a document begins; of code, the name and a docstring inside.

def lead(text, kind):
    """The first line of source code; of prose the first sentence: up to a mark that a capital follows."""
    line = text.split("\n")[0]
    return line if kind in CODE else re.split(r"(?<=[.!?])\s+(?=[A-Z\"'])", line)[0]


def words_of_name(code):
    """`def read_theFile(` -> `read the file`: of the first function or class."""
    found = re.search(r"\b(?:def|class)\s+(\w+)", code)
    return " ".join(re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", found[1])).lower() if found else ""


def docstring_inside(code):
    """The first line of the first docstring that is left in the code."""
    found = re.search(r'(?:"""|\'\'\')\s*([^\n]+?)\s*(?:"""|\'\'\'|\n)', code)
    return found[1] if found else ""


class Words:
    """ROUGE's words. The package's own tokenizer drops all letters but a to z: Cyrillic texts score 0."""

    def __init__(self):
        from rouge_score.tokenizers import DefaultTokenizer
        self.stem = DefaultTokenizer(use_stemmer=True).tokenize

    def tokenize(self, text):
        words = re.findall(r"[぀-ヿ一-鿿]|[^\W_぀-ヿ一-鿿]+", text.lower())      # Chinese: each letter
        return [x for word in words for x in (self.stem(word) if word.isascii() else [word])]


def mean_rouge(references, texts, prefix):
    """{name: mean F1 in percent} of ROUGE-1, 2 and L, each with the best of a document's references."""
    names = "rouge1", "rouge2", "rougeL"
    scorer = rouge_scorer().RougeScorer(names, tokenizer=Words())
    scores = [scorer.score_multi(wanted, text) for wanted, text in zip(references, texts, strict=True)]
    return {prefix + name: 100 * float(np.mean([score[name].fmeasure for score in scores])) for name in names}


def rouge_scorer():
    """The module of rouge-score, or None where it is not installed."""
    try:
        from rouge_score import rouge_scorer
    except ImportError:
        return None
    return rouge_scorer


def load_expected(corpus, split):
    """[{"kind": .., "references": [..]}] of a split; ValueError if tools.prepare did not write that."""
    path = Path(corpus.name) / f"{split}.jsonl"
    data = path.read_bytes() if path.is_file() else b""
    require(hashlib.sha256(data).hexdigest() == corpus.references[split],
            f"{path} must hold the references of its corpus: prepare it again")
    return [json.loads(line) for line in data.decode().splitlines()]
