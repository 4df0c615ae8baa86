"""Needles: find named values that are hidden in real text. tasks/haystack.py has what a context looks like.

Training begins with short contexts, which double when enough answers are right. `python -m tasks.needles`
shows an example, one chunk a line.
"""
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F

from gca import require
from model import NO_LABEL
from tasks import EVALUATION, TRAINING, VALIDATION
from tasks.chains import PAIRS, Pairs
from tasks.haystack import ALPHABETS, Haystack
from tasks.text import stdlib_corpus

KINDS = "multi", "single", *PAIRS
# For a row of a table: the tokens to read, about; and the fewest and the most questions.
AFFORDABLE, FEW_QUESTIONS, MANY_QUESTIONS = dict(cpu=2 ** 19, cuda=2 ** 26), 32, 240


@dataclass
class NeedleConfig:
    needle: str = "multi"           # multi: n_needle in a context; single: one; pairs as in tasks/chains.py
    n_needle: int = 3               # needles (or pairs) and questions in a context, or as many as fit
    n_value: int = 6                # tokens in a needle's value (of pairs: in each name, too)
    anywhere: bool = False          # True: needles lie across chunk borders, too; False: inside one chunk
    grow_at: float = 0.75           # share of whole answers that are right, at which the context doubles
    lm_weight: float = 0.3          # of the language-model loss, beside the answers'


class Needles:
    """Find needles: the answers' loss, and a little language modelling beside it."""

    METRICS = ("answer_loss", "lm_loss", "answer_accuracy")     # beside the loss; the last one is of tokens
    SCORES = ("val_exact_match",)
    REPORT, TITLE = "niah.json", "Needles by length of the context, up to 1024 times that of training"

    def __init__(self, settings, corpus):
        """settings: those of a run, by name: NeedleConfig's, chunk_size, seed and seq_len among them."""
        self.settings, self.corpus = settings, corpus
        kind, n_value = settings["needle"], settings["n_value"]
        require(kind in KINDS, f"needle must be one of {', '.join(KINDS)}, got {kind!r}")
        alphabet = ALPHABETS[corpus.tokenizer]
        given = settings["chunk_size"] - 1, n_value, alphabet, settings["anywhere"]
        self.haystack = Pairs(*given, kind) if kind in PAIRS else Haystack(*given)
        require(settings["n_needle"] >= 1, f"n_needle must be at least 1, got {settings['n_needle']}")
        self.n_needle = 1 if kind == "single" else settings["n_needle"]
        fewest, most = (2 if kind in PAIRS else 1), len(alphabet.values)
        require(fewest <= n_value <= most, f"n_value must be in {fewest}..{most}, got {n_value}")
        least = 1 + self.haystack.needle_length
        unit = "bytes" if corpus.tokenizer == "bytes" else "tokens"
        require(settings["chunk_size"] >= least, f"chunk_size must be at least {least} to hold a needle with "
                f"a value of {n_value} {unit}, got {settings['chunk_size']}")
        most_pairs = most ** min(n_value, 4) // 4               # four different names for each
        require(kind not in PAIRS or self.n_needle <= most_pairs, "n_needle must be at most "
                f"{most_pairs}, for different names of {n_value} tokens, got {self.n_needle}")

    def lengths(self):
        """The context lengths of training: start_len, if a question fits, doubled until it is seq_len."""
        seq_len = self.settings["seq_len"]
        start_len = max(self.settings["start_len"] or seq_len, self.haystack.least_length)
        lengths = [min(start_len, seq_len)]
        while lengths[-1] < seq_len:
            lengths.append(min(2 * lengths[-1], seq_len))
        return lengths

    def check(self, length, flag="--seq_len"):
        least = self.haystack.least_length
        require(length >= least, f"{flag} must be at least {least} for a needle and its "
                f"question in chunks of {self.settings['chunk_size']}, got {length}")

    def batch(self, step, length, size):
        """Tokens, next tokens and answer_at of step number `step`."""
        rng = np.random.default_rng([TRAINING, self.settings["seed"], step])
        return self.haystack.batch(self.corpus.train, rng, size, length, self.n_needle)

    def loss(self, model, tokens, labels, answer_at):
        """The loss and METRICS of a batch: tokens, labels (B, T), answer_at (B, answer tokens)."""
        hidden = model.hidden(tokens)                                               # (B, T, d)
        text_labels = labels.scatter(1, answer_at, NO_LABEL)
        lm_loss = model.cross_entropy(hidden, model.embedding.weight, text_labels)
        answers = hidden.gather(1, answer_at[..., None].expand(-1, -1, hidden.shape[-1]))     # (B, .., d)
        logits = model.head(answers).float()                                        # (B, .., vocab_size)
        answer_labels = labels.gather(1, answer_at)
        answer_loss = F.cross_entropy(logits.flatten(0, 1), answer_labels.flatten())
        accuracy = (logits.argmax(-1) == answer_labels).float().mean()
        metrics = dict(answer_loss=answer_loss, lm_loss=lm_loss, answer_accuracy=accuracy)
        return answer_loss + self.settings["lm_weight"] * lm_loss, metrics

    @torch.no_grad()
    def score(self, model, step, length, size):
        """The share of whole answers that are right, in a batch of unseen text."""
        rng = np.random.default_rng([VALIDATION, self.settings["seed"], step])
        batch = self.haystack.batch(self.corpus.val, rng, size, length, self.n_needle)
        device = model.embedding.weight.device
        tokens, labels, answer_at = (torch.from_numpy(x).to(device) for x in batch)
        row = torch.arange(size, device=device)[:, None]
        hit = model.head(model.hidden(tokens)[row, answer_at]).argmax(-1) == labels[row, answer_at]
        whole = hit.view(size, -1, len(self.haystack.answer_offsets)).all(-1)       # (B, answers)
        return dict(val_exact_match=whole.double().mean().item())

    def next_length(self, length, step, score):
        """The context doubles when grow_at of the answers are right, each as a whole.

        By single tokens it would grow too soon: given the first token of a value, whoever copies any needle's
        value, whatever its name, has the others right.
        """
        if score and score["val_exact_match"] >= self.settings["grow_at"]:
            return min(2 * length, self.settings["seq_len"])
        return length

    def measured_on(self):                  # the haystack
        return self.corpus.describe("val")

    def measure(self, model, read, lengths=None, n_question=None, seed=0, n_needles=None, write=False):
        """Accuracy of the answers by context length, a row each; read: tools/reader.py's.

        Every token of an answer is predicted greedily from the true tokens before it. If all of them are
        right, greedy generation would write the answer, but for what is given: of pairs, the colon between
        their values. `repeats`: how often the context repeats the haystack's text.
        Of single needles, a model that answers with any one's value gets one answer in `needles` right.

        n_needles: numbers of needles in a context, a table for each. write: generate the answers, too, each
        token from those that the model wrote itself.
        """
        if not lengths:
            most = read.most_chunks * self.haystack.n_text
            lengths = [self.settings["seq_len"] * 4 ** i for i in range(6)]
            lengths = [length for length in lengths if length <= most] or lengths[:1]
        for wanted, length in product(n_needles or [self.n_needle], lengths):
            n = self.haystack.questions_in(length, wanted)
            hits, written = self.answers(model, read, length, n, n_question, seed, write)
            row = dict(length=length, questions=len(hits), needles=self.haystack.needles_per_answer * n,
                       repeats=max(1.0, length / len(self.corpus.val)),
                       token_accuracy=100 * hits.double().mean().item(),
                       exact_match=100 * hits.all(1).double().mean().item())
            yield row | (dict(written=100 * written.all(1).double().mean().item()) if write else {})

    def answers(self, model, read, length, n, n_question, seed, write=False):
        """Whether each token of each answer is right, predicted and (if asked for) written.

        Of contexts with n questions: (n_question, tokens of an answer) each.
        """
        device = model.embedding.weight.device
        if not n_question:
            n_question = AFFORDABLE[device.type] // length * n
            n_question = max(FEW_QUESTIONS, min(MANY_QUESTIONS, n_question))
        n_context, at_once = -(-n_question // n), read.contexts_at_once(model, length)
        hits, written = [], []
        for first in range(0, n_context, at_once):
            contexts = []                               # each drawn for itself: the same on every machine
            for i in range(first, min(first + at_once, n_context)):
                rng = np.random.default_rng([EVALUATION, seed, length, i])
                contexts.append(self.haystack.batch(self.corpus.val, rng, 1, length, n))
            tokens, labels, answer_at = (
                torch.from_numpy(np.concatenate([context[i] for context in contexts])) for i in range(3))
            at = torch.zeros(tokens.shape, dtype=torch.bool).scatter(1, answer_at, True)
            logits = read(model, tokens.to(device), at.to(device))
            hits.append(logits.argmax(-1).cpu() == labels[at])
            if write:
                firsts = answer_at[0].view(n, -1)[:, 0].tolist()            # the same in each context
                offsets = (self.haystack.answer_offsets - self.haystack.answer_offsets[0]).tolist()
                new = read.write(model, tokens.to(device), firsts, offsets).cpu()           # (B, n, tokens)
                written.append(new.flatten() == labels[at])
        hits, written = (torch.cat(x).view(-1, len(self.haystack.answer_offsets))[:n_question] if x else None
                         for x in (hits, written))
        return hits, written


def show_example():
    """Print one context, a chunk a line."""
    haystack, rng = Haystack(n_text=15, n_value=6, anywhere=True), np.random.default_rng()
    tokens, _, _ = haystack.batch(stdlib_corpus().val, rng, 1, 128, 3)
    for i in range(0, 128, 15):
        chunk = bytes(tokens[0, i:i + 15].tolist())
        print(f"{i // 15:4}  {str(chunk)[2:-1]}")


if __name__ == "__main__":
    show_example()
