"""Summaries: a document, the separator, its summary, the separator again. The loss is on the summary alone.

    pad pad def norm(x): .. re | turn x / ..   | SEP Normalize a vector . SEP | pad ..        | chunk borders

The separator behind a document opens a chunk, as generation aligns prompts too (fast/generate.py): all of the
document then lies in chunks whose landmarks have retrieved when the first token of the summary is predicted.
Several pairs share a training context, so that no step computes on padding alone.

A corpus of pairs is made by `python -m tools.prepare docstrings`, `summaries`, `xsum` or `cnn_dailymail`.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gca import require
from tasks.text import EVALUATION, N_VALIDATION, NEWLINES, TRAINING, documents, load_tokenizer

NO_LABEL = -100
N_EXAMPLE = 3       # of each kind, kept to be shown


@dataclass
class SummaryConfig:
    n_summary: int = 256            # most tokens of a summary


# ---------------------------------------------------------------- pairs and training contexts

class Pairs:
    """The pairs of one split: where each document and summary lies in the text."""

    def __init__(self, text, separator):
        self.text, self.separator = text, separator
        starts, sizes = (x[:-1] for x in documents(text, separator))    # nothing follows the last separator
        self.starts, self.sizes = starts[::2], sizes[::2]
        self.summary_starts, self.summary_sizes = starts[1::2], sizes[1::2]

    def __len__(self):
        return len(self.summary_starts)

    def document(self, i, most=None):
        return self.text[self.starts[i]:self.starts[i] + self.sizes[i]][:most]

    def summary(self, i):
        return self.text[self.summary_starts[i]:self.summary_starts[i] + self.summary_sizes[i]]


def pack(pairs, order, length, n_text, n_summary):
    """Which pairs go into each context of length + 1 tokens, and where their first separators lie.

    order: pair numbers. Returns [[(pair, position of its separator)]], a list for each context.
    """
    contexts, end = [], length + 1                              # end: of what the last context holds already
    for i in order:
        size = min(int(pairs.sizes[i]), length - n_summary - n_text)    # a longer document is cut
        answer = int(pairs.summary_sizes[i]) + 2                # both separators
        at = -(-(end + size) // n_text) * n_text                # the next chunk border
        if at + answer > length + 1:
            contexts.append([])
            at = -(-size // n_text) * n_text
        contexts[-1].append((i, at))
        end = at + answer
    return contexts


def context_of(pairs, placed, length, n_summary, n_text, pad):
    """Tokens and labels (length,) of one context; placed: [(pair, position of its separator)]."""
    x, labels = np.full(length + 1, pad, np.int64), np.full(length + 1, NO_LABEL, np.int64)
    for i, at in placed:
        document, summary = pairs.document(i, length - n_summary - n_text), pairs.summary(i)
        answer = np.concatenate([summary, [pairs.separator]])
        x[at - len(document):at] = document
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
        require(corpus.pairs, "--data must be a folder of documents and summaries, as "
                f"python -m tools.prepare docstrings makes one, got {corpus.name}")
        self.n_text, self.n_summary = settings["chunk_size"] - 1, settings["n_summary"]
        require(self.n_summary >= 1, f"--n_summary must be at least 1, got {self.n_summary}")
        self.separator = load_tokenizer(corpus.tokenizer).separator
        self.pad, self.contexts, self.epoch = NEWLINES[corpus.tokenizer], [], 0
        self.train, self.val = (Pairs(text, self.separator) for text in (corpus.train, corpus.val))
        for split, pairs in (("train", self.train), ("val", self.val)):
            longest = int(pairs.summary_sizes.max(initial=0))
            require(longest <= self.n_summary, f"--n_summary must be at least {longest}, for the longest "
                    f"summary in {corpus.name}'s {split}, got {self.n_summary}")

    def lengths(self):
        return [self.settings["seq_len"]]

    def check(self, length):
        least = self.n_summary + 2 * self.n_text + 1
        require(length >= least,
                f"--seq_len must be at least {least} for summaries of {self.n_summary} tokens, got {length}")

    def batch(self, step, length, size):
        """Tokens and labels of step number `step`, (size, length) each; each epoch packs all pairs anew."""
        while len(self.contexts) < (step + 1) * size:
            rng = np.random.default_rng([TRAINING, self.settings["seed"], self.epoch])
            order = rng.permutation(len(self.train)).tolist()
            self.contexts += pack(self.train, order, length, self.n_text, self.n_summary)
            self.epoch += 1
        placed = self.contexts[step * size:(step + 1) * size]
        return self.arrays(self.train, placed, length)

    def arrays(self, pairs, placed, length):
        rows = [context_of(pairs, row, length, self.n_summary, self.n_text, self.pad) for row in placed]
        return tuple(map(np.stack, zip(*rows, strict=True)))

    def loss(self, model, tokens, labels):
        return model.loss(tokens, labels), ()

    @torch.no_grad()
    def true_loss(self, model, pairs, numbers, n_context=None):
        """Mean loss of these pairs' summaries, in contexts as in training, the first n_context of them."""
        length, device = self.settings["seq_len"], model.embedding.weight.device
        placed = pack(pairs, numbers, length, self.n_text, self.n_summary)[:n_context]
        total, n = 0.0, 0
        for row in placed:
            tokens, labels = (torch.from_numpy(x).to(device) for x in self.arrays(pairs, [row], length))
            number = int((labels != NO_LABEL).sum())
            total, n = total + model.loss(tokens, labels).item() * number, n + number
        return total / n

    def score(self, model, step, length, size):
        """Mean loss of the summaries in unseen contexts, always the same."""
        return dict(val_loss=self.true_loss(model, self.val, range(len(self.val)), N_VALIDATION))

    def next_length(self, length, step, score):
        return length

    def measure(self, model, read, lengths=None, n=None, seed=0, split=None):
        """A row for each kind of document: loss of the true summaries, and ROUGE of generated ones (greedy).

        n: documents of each kind, read whole; split: "val" or "test", default: test where there is one.
        lead: the document's first line in the place of a summary. ROUGE needs the package rouge-score;
        without it there is the loss alone. The first documents of a kind are kept in self.examples.
        """
        n = n or (400 if model.embedding.weight.is_cuda else 20)
        split = split or ("val" if self.corpus.test is None else "test")
        pairs = Pairs(getattr(self.corpus, split), self.separator)
        expected = load_expected(Path(self.corpus.name) / f"{split}.jsonl", len(pairs))
        self.examples, rng = [], np.random.default_rng([EVALUATION, seed])
        for kind in sorted({row["kind"] for row in expected}):
            numbers = [i for i, row in enumerate(expected) if row["kind"] == kind]
            numbers = sorted(rng.permutation(numbers)[:n].tolist())
            row = dict(kind=kind, documents=len(numbers), document_tokens=float(pairs.sizes[numbers].mean()),
                       loss=self.true_loss(model, pairs, numbers))
            if rouge_scorer():
                references = [expected[i]["references"] for i in numbers]
                row |= self.rouge(model, read, pairs, numbers, references, kind)
            yield row

    def rouge(self, model, read, pairs, numbers, references, kind):
        """ROUGE of what the model writes for these documents, and of their first lines."""
        decode = load_tokenizer(self.corpus.tokenizer).decode_bytes

        def text(ids):
            return decode(ids).decode(errors="replace").strip()

        prompts = [np.append(pairs.document(i), self.separator).astype(np.int64) for i in numbers]
        made = [text(ids) for ids in read.generate(model, prompts, self.n_summary, self.separator)]
        leads = [text(pairs.document(i, 256).tolist()).split("\n")[0] for i in numbers]
        for example in [*zip(leads, references, made, strict=True)][:N_EXAMPLE]:
            self.examples.append((kind, *example))
        return mean_rouge(references, made, "") | mean_rouge(references, leads, "lead_")


def mean_rouge(references, texts, prefix):
    """{name: mean F1 in percent} of ROUGE-1, 2 and L, each with the best of a document's references."""
    names = "rouge1", "rouge2", "rougeL"
    scorer = rouge_scorer().RougeScorer(names, use_stemmer=True)
    scores = [scorer.score_multi(wanted, text) for wanted, text in zip(references, texts, strict=True)]
    return {prefix + name: 100 * float(np.mean([score[name].fmeasure for score in scores])) for name in names}


def rouge_scorer():
    """The module of rouge-score, or None where it is not installed."""
    try:
        from rouge_score import rouge_scorer
    except ImportError:
        return None
    return rouge_scorer


def load_expected(path, n_pair):
    """[{"kind": .., "references": [..]}] of a split; ValueError if it is not what tools.prepare wrote."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        require(len(rows) == n_pair, "other rows")
        require(all(isinstance(row["kind"], str) and row["references"] for row in rows), "other rows")
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is not that of its corpus: prepare it again") from error
    return rows
