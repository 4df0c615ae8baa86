"""Perplexity of unseen text: by length of the context, by document, by how far back one could copy from.

    by_length       the same tokens after more and more context
    by_document     windows of one length from every document, and each model's ratio to the first one
    by_copy         the same windows, their tokens sorted by when the 4-gram that ends in them was last seen

Text.measure (text.py) has one of these make its table, a row at a time. `read` is tools/reader.py's.
"""
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from gca import require
from tasks import EVALUATION

N_SCORED = 256              # tokens scored at each place of a table by length
LOGITS = 2 ** 12            # tokens whose logits are held at once
GRAM = 4                    # so many tokens in a row are a copy of what was seen before
BOOTSTRAPS = 2000


class Documents(NamedTuple):
    """The documents of a split: token ids, where each begins and how many it has, and their names or None."""
    text: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    names: list

    def name(self, i):
        return self.names[i] if self.names else f"document {i}"


def perplexity(loss):
    """Of a mean loss in nats; of a model that has diverged the largest power of e that a float can hold."""
    return math.exp(min(loss, 700))


# ---------------------------------------------------------------- by length

def places(documents, longest, n_place, seed):
    """{document: places in the text (n,)} where tokens are scored, n_place in all.

    Each is in the last quarter of a document that has `longest` tokens before that. Documents take turns, in
    an order that the seed draws; so tables of other lengths have the same places, but for documents that are
    too short for one of them.
    """
    starts, sizes, n_scored = documents.starts, documents.sizes, scored_at_once(documents)
    order = np.random.default_rng([EVALUATION, seed]).permutation(len(sizes))
    fits = [i for i in order if sizes[i] - sizes[i] // 4 >= longest and sizes[i] // 4 >= n_scored]
    require(fits, f"--lengths must be at most {longest_context(sizes, 1.0)}: no document has {longest} "
            "tokens of context before its last quarter")
    found = {}
    for turn in range(n_place):
        i = fits[turn % len(fits)]
        rng = np.random.default_rng([EVALUATION, seed, i, turn // len(fits)])
        place = starts[i] + rng.integers(sizes[i] - sizes[i] // 4, sizes[i] - n_scored + 1)
        found[i] = np.append(found.get(i, np.array([], int)), place)
    return found


def scored_at_once(documents):
    """How many tokens are scored at a place: fewer where all documents are short."""
    n = min(N_SCORED, int(documents.sizes.max()) // 4)
    require(n, "--data: there is no document of four tokens or more to measure on")
    return n


def longest_context(sizes, share):
    """The tokens of context that all documents but this share of them have, before their last quarter."""
    return int(np.quantile(sizes - sizes // 4, share, method="lower"))


def by_length(model, read, documents, found, lengths, decode_bytes):
    """A row for each length: loss of the tokens at all places."""
    where, n_scored = np.concatenate([*found.values()]), scored_at_once(documents)
    n, n_byte = len(where) * n_scored, sum(len(decode_bytes(documents.text[i:i + n_scored].tolist()))
                                           for i in where)
    for length in lengths:
        total = scored_loss(model, read, documents.text, where, n_scored, length)
        yield dict(length=length, scored=n, loss=total / n, perplexity=perplexity(total / n),
                   bits_per_byte=total / math.log(2) / n_byte)


def scored_loss(model, read, text, where, n_scored, length):
    """Summed cross-entropy of n_scored tokens at each place, each after `length` tokens of context.

    Or an eighth more, at most: they are scored a few at a time, from windows of that length.
    """
    piece = max(n for n in range(1, n_scored + 1) if n_scored % n == 0 and n <= max(1, length // 8))
    begins = (where[:, None] + np.arange(0, n_scored, piece)).flatten()
    at_once = max(1, min(read.contexts_at_once(model, length + piece), LOGITS // piece))
    total = 0.0
    for group in np.split(begins, range(at_once, len(begins), at_once)):
        total += losses(model, read, text, group - length, length + piece - 1, piece).sum().item()
    return total


def losses(model, read, text, begins, n, n_scored):
    """Cross-entropy (B, n_scored) of the last tokens, each from those before it, in stretches from `begins`.

    A stretch has n tokens that are read, and one more to predict.
    """
    x = np.stack([text[i:i + n + 1] for i in begins]).astype(np.int64)
    x = torch.from_numpy(x).to(model.embedding.weight.device)
    at = torch.zeros_like(x[:, 1:], dtype=torch.bool)
    at[:, -n_scored:] = True
    logits = read(model, x[:, :-1], at)
    loss = F.cross_entropy(logits.float(), x[:, -n_scored:].flatten(), reduction="none")
    return loss.view(-1, n_scored).cpu()


# ---------------------------------------------------------------- by document, and by distance of the copy

def windows(documents, length, most):
    """{document: where its windows of `length` tokens begin}: at most so many, evenly spread."""
    found = {}
    for i, (start, size) in enumerate(zip(documents.starts, documents.sizes, strict=True)):
        if size > length:
            found[i] = start + np.linspace(0, size - length - 1, min(most, size // length)).astype(int)
    require(found, f"--lengths must be below the {max(documents.sizes)} tokens of the longest document, "
            f"got {length}")
    return found


def losses_by_document(model, read, documents, found, length):
    """{document: losses (windows, tokens) of the second half of its windows}."""
    at_once = max(1, min(read.contexts_at_once(model, length), LOGITS // (length - length // 2)))
    result = {}
    for document, begins in found.items():
        groups = np.split(begins, range(at_once, len(begins), at_once))
        result[document] = torch.cat([losses(model, read, documents.text, group, length, length - length // 2)
                                      for group in groups]).numpy()
    return result


def ratio(differences):
    """The ratio of perplexities of mean loss differences, and 95% of bootstraps over them."""
    differences, rng = np.array(differences), np.random.default_rng(0)
    drawn = differences[rng.integers(len(differences), size=(BOOTSTRAPS, len(differences)))].mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return dict(ratio=perplexity(differences.mean()), low=perplexity(low), high=perplexity(high))


def by_document(model, read, documents, found, length, first):
    """A row for each document, and one for their mean: perplexity, its ratio to the first model's.

    low, high: 95% of bootstraps, over the windows of a document, or over documents; lower: in how many of
    them the perplexity is lower. first: {}, which the first model fills, for those after it.
    """
    mine = losses_by_document(model, read, documents, found, length)
    theirs, means = first.setdefault("losses", mine), []
    for document, x in mine.items():
        by_window = x.mean(1) - theirs[document].mean(1)
        means.append((x.mean(), by_window.mean()))
        yield dict(document=documents.name(document), length=length, scored=x.size,
                   perplexity=perplexity(x.mean()), **ratio(by_window), lower=int(by_window.mean() < 0))
    loss, difference = np.array(means).T
    yield dict(document=f"all {len(mine)}", length=length, scored=sum(x.size for x in mine.values()),
               perplexity=perplexity(loss.mean()), **ratio(difference), lower=int((difference < 0).sum()))


def by_copy(model, read, documents, found, length, first, window):
    """A row for each distance: loss of the tokens whose 4-gram was last seen so far back in their context."""
    mine = losses_by_document(model, read, documents, found, length)
    back = [last_seen(documents.text[i:i + length + 1])[length // 2 + 1:]
            for begins in found.values() for i in begins]
    back, x, theirs = (np.concatenate([y.flatten() for y in parts])
                       for parts in (back, mine.values(), first.setdefault("losses", mine).values()))
    kinds = {"never": back == 0, f"up to {window} ago": (0 < back) & (back <= window),
             f"up to {2 * window}": (window < back) & (back <= 2 * window), "further back": back > 2 * window}
    for name, here in kinds.items():
        n = int(here.sum())
        loss, base = (float(y[here].mean()) if n else math.nan for y in (x, theirs))
        yield dict(last_seen=name, length=length, share=n / len(back), scored=n, loss=loss,
                   perplexity=perplexity(loss), ratio=perplexity(loss - base))


def last_seen(tokens):
    """How many tokens ago the 4-gram that ends in each token ended before; 0: never. tokens (T,) -> (T,)."""
    back = np.zeros(len(tokens), int)
    if len(tokens) < GRAM:
        return back
    grams = np.lib.stride_tricks.sliding_window_view(tokens, GRAM)
    number = np.unique(grams, axis=0, return_inverse=True)[1].flatten()
    order = np.argsort(number, kind="stable")                   # the same gram: side by side, in order
    same = number[order[1:]] == number[order[:-1]]
    back[GRAM - 1:][order[1:][same]] = (order[1:] - order[:-1])[same]
    return back


def copied_from(tokens, n_text, least):
    """How many tokens of each chunk could be copied from each other chunk, at least `least` tokens back.

    tokens (T,) -> (chunks, chunks): for chunk t, counts by the chunk where their 4-gram was last seen.
    """
    back, n_chunk = last_seen(tokens), -(-len(tokens) // n_text)
    ends = np.flatnonzero(back >= max(1, least))
    counts = np.zeros((n_chunk, n_chunk), np.float32)
    np.add.at(counts, ((ends - 1) // n_text, (ends - back[ends]) // n_text), 1)    # predicted a token earlier
    return counts
