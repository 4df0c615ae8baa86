"""Batches and scores of the tasks: what lies where, and that nothing is drawn twice."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers import DEVICE, command, tiny
from model import DRT, DRTConfig, cross_entropy
from tasks.chains import Pairs
from tasks.haystack import ALPHABETS, Haystack
from tasks.needles import NeedleConfig, Needles
from tasks.text import Text, encode_bytes, load_corpus, window_batch
from tools.reader import Reader


def settings(**change):
    """Those of a run, as far as the tasks read them."""
    defaults = dict(vars(NeedleConfig()), chunk_size=16, seed=0, start_len=64, seq_len=128, steps=100,
                    batch_size=4, batch_tokens=8192, micro_batch=0)
    return defaults | change


# ---------------------------------------------------------------- text

def test_byte_tokenizer():
    assert bytes(encode_bytes("naïve")).decode() == "naïve" and len(encode_bytes("naïve")) == 6


def test_stdlib_splits_share_no_file():
    corpus = load_corpus("stdlib")
    assert len(corpus.train) > 4 * len(corpus.val) > 4e5
    text, train = corpus.val.tobytes(), corpus.train.tobytes()
    samples = [text[i:i + 200] for i in range(0, len(text), len(text) // 50)]
    assert sum(sample in train for sample in samples) < len(samples) / 4       # library files copy each other


def test_windows_are_read_once_an_epoch_whatever_the_batches():
    text, length = np.arange(1000), 30                                  # 33 windows
    starts = [window_batch(text, 0, i, 1, length)[0][0, 0] for i in range(99)]
    for epoch in range(3):
        assert sorted(starts[33 * epoch:33 * epoch + 33]) == list(range(0, 990, 30))
    assert starts[:33] != starts[33:66]
    tokens, labels = window_batch(text, 0, 20, 40, length)              # across an epoch's end
    assert tokens[:, 0].tolist() == starts[20:60] and (labels == tokens + 1).all()
    assert window_batch(text, 1, 0, 33, length)[0][:, 0].tolist() != starts[:33]
    with pytest.raises(ValueError, match="more than seq_len tokens in each split, got 30"):
        window_batch(text[:30], 0, 0, 1, 30)


def test_contexts_start_short_and_then_are_long():
    corpus = load_corpus("stdlib")
    text, needles = Text(settings(), corpus), Needles(settings(seq_len=200), corpus)
    assert text.lengths() == [64, 128] and needles.lengths() == [64, 128, 200]
    assert [text.next_length(64, step, None) for step in (39, 40)] == [64, 128]
    assert needles.next_length(64, 1, None) == needles.next_length(64, 1, dict(val_exact_match=0.74)) == 64
    assert [needles.next_length(n, 1, dict(val_exact_match=0.75)) for n in (64, 128, 200)] == [128, 200, 200]
    for task in (Text, Needles):
        assert task(settings(start_len=0), corpus).lengths() == [128]


# ---------------------------------------------------------------- needles

def test_the_score_counts_whole_answers(monkeypatch):
    """A model that is wrong in one token of each second answer has half of them right."""
    task, model = Needles(settings(n_needle=4), load_corpus("stdlib")), tiny()

    def hidden(tokens):
        n_row, expected = len(tokens), tokens.roll(-1, dims=1)
        at = torch.from_numpy(answers[0][2]).view(n_row, 4, 6)
        expected.scatter_(1, at[:, ::2, 3], 0)                  # byte 0 is in no value
        return F.one_hot(expected, 256).float()

    monkeypatch.setattr(model, "hidden", hidden)
    monkeypatch.setattr(model, "head", lambda x: x)
    batch, answers = task.haystack.batch, []
    monkeypatch.setattr(task.haystack, "batch", lambda *args: answers.append(batch(*args)) or answers[-1])
    assert task.score(model, 25, 200, 5) == dict(val_exact_match=0.5)


@pytest.mark.parametrize("anywhere", [False, True])
@pytest.mark.parametrize("length, chunk_size, n_needle", [(128, 16, 3), (131, 20, 3), (1000, 32, 9)])
def test_needles_and_questions_are_where_they_should_be(anywhere, length, chunk_size, n_needle):
    text, S = np.full(5000, ord("."), np.uint8), chunk_size - 1
    tokens, labels, answer_at = Haystack(S, 6, anywhere=anywhere).batch(
        text, np.random.default_rng(0), 20, length, n_needle)
    assert tokens.shape == labels.shape == (20, length) and answer_at.shape == (20, n_needle * 6)
    assert (labels[:, :-1] == tokens[:, 1:]).all()
    for row, label, answer in zip(tokens, labels, answer_at, strict=True):
        context, values = row.astype(np.uint8).tobytes(), label[answer].astype(np.uint8).tobytes()
        firsts = answer[::6]                                                        # positions of the colons
        assert (firsts % S == 0).all() and (np.diff(firsts) == S).all()
        for i, first in enumerate(firsts):
            name, value = context[first - 4:first], values[6 * i:6 * i + 6]
            assert context[first - 6:first] == b"|?" + name and len(set(value)) == 6 and min(value) >= 128
            place = context.index(b"|" + name + b":" + value + b"|")       # exactly one, before all questions
            assert place + 13 <= (firsts[0] // S - 1) * S and context.count(b"|" + name) == 1
            assert anywhere or place // S == (place + 12) // S


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
@pytest.mark.parametrize("anywhere", [False, True])
def test_chains_lead_from_the_question_to_its_answer(tokenizer, anywhere):
    """Needles |a:b| and |b:c|; then |?a ends a chunk, and :b:c opens the one after the next."""
    text, S, alphabet = np.full(5000, 7), 15, ALPHABETS[tokenizer]
    chains = Pairs(S, 6, alphabet, anywhere)
    tokens, labels, answer_at = chains.batch(text, np.random.default_rng(0), 9, 400, 5)
    assert answer_at.shape == (9, 5 * 12)
    answer_at = answer_at.reshape(9, 5, 2, 6)
    for row, label, answer in zip(tokens.tolist(), labels.tolist(), answer_at, strict=True):
        context = "".join(map(chr, row))
        bar, ask, colon = map(chr, alphabet[2:])
        starts = set()
        for parts in answer:
            first, second = ("".join(chr(label[i]) for i in part) for part in parts)
            at = int(parts[0, 0])
            starts.add(at)
            assert at % S == 0 and parts[1, 0] == at + 7
            assert row[at] == row[parts[1, 0]] == alphabet.colon
            border = at - S
            assert context[border - 8:border - 6] == bar + ask
            name = context[border - 6:border]
            for a, b in ((name, first), (first, second)):
                place = context.index(f"{bar}{a}{colon}{b}{bar}")
                assert context.count(f"{bar}{a}{colon}") == 1 and place < min(answer[:, 0, 0]) - S
                assert context.count(f"{bar}{ask}{name}") == 1
                assert anywhere or place // S == (place + 14) // S
        assert len(starts) == 5
    assert chains.questions_in(400, 99) == 5 and chains.questions_in(74, 99) == 1
    assert chains.questions_in(73, 99) == 0 and chains.least_length == 74
    assert chains.batch(text, np.random.default_rng(0), 1, 400, 99)[2].shape == (1, 12 * 5)


@pytest.mark.parametrize("kind", ["multivalue", "multiquery"])
def test_pairs_of_needles_and_what_is_asked_for(kind):
    """The second needle's name; a question with one name or two; the first token of two values is given."""
    few = ALPHABETS["bytes"]._replace(values=np.arange(128, 132))       # so that values often begin alike
    pairs = Pairs(15, 3, few, kind=kind)
    tokens, labels, answer_at = pairs.batch(np.full(5000, 7), np.random.default_rng(0), 9, 400, 4)
    answer_at = answer_at.reshape(9, 4, -1)
    if kind == "multivalue":
        answer_at = np.concatenate([answer_at[..., :1] - 1, answer_at], axis=2)
    for row, label, at in zip(tokens.tolist(), labels.tolist(), answer_at.reshape(9, 4, 2, 3), strict=True):
        context = "".join(map(chr, row))
        for parts in at:
            b, c = ("".join(chr(label[i]) for i in part) for part in parts)
            asked = context[:parts[0, 0]].rpartition("|?")[2].split("?")
            names = asked * 2 if kind == "multivalue" else asked
            first, second = (context.index(f"|{a}:{x}|") for a, x in zip(names, (b, c), strict=True))
            assert kind != "multivalue" or b[0] != c[0]         # which one is meant can be known
            assert first != second and all(len(name) == 3 for name in names) and parts[0, 0] % 15 == 0


def test_needles_of_gpt2_tokens():
    corpus = load_corpus("stdlib")._replace(tokenizer="gpt2", vocab_size=50257)
    task = Needles(settings(n_value=8), corpus)
    _, labels, answer_at = batch = task.batch(0, 128, 2)
    values = np.take_along_axis(labels, answer_at, 1)
    assert values.max() > 40000 and values.min() >= 94
    model = DRT(DRTConfig(vocab_size=50257)).to(DEVICE)
    loss, metrics = task.loss(model, *(torch.from_numpy(x).to(DEVICE) for x in batch))
    assert loss.isfinite() and set(metrics) == set(task.METRICS)
    assert all(x.isfinite() for x in metrics.values())


def test_batches_are_a_function_of_seed_and_step():
    corpus = load_corpus("stdlib")
    for task in (Text, Needles):
        first, again, other_step, other_seed = (
            task(settings(seed=seed), corpus).batch(step, 64, 4)[0] for seed, step in
            ((0, 5), (0, 5), (0, 6), (1, 5)))
        assert (first == again).all() and (first != other_step).any() and (first != other_seed).any()


def test_scores_of_a_model_that_knows_the_answers():
    """Loss, validation and table agree on what an answer is, by a model that is told it."""
    task = Needles(settings(), load_corpus("stdlib"))
    tokens, labels, at = (torch.from_numpy(x) for x in task.batch(0, 128, 2))

    class Oracle(torch.nn.Module):
        """Predicts every token of the batch, or only those that are no answers."""
        def __init__(self, knows):
            super().__init__()
            self.knows, self.cross_entropy = knows, cross_entropy
            self.embedding = torch.nn.Embedding.from_pretrained(torch.eye(256))

        def hidden(self, tokens):
            right = labels if self.knows else labels.scatter(1, at, 0)
            return 20.0 * F.one_hot(right, 256)

        def head(self, hidden):
            return hidden

    for knows in (True, False):
        loss, metrics = task.loss(Oracle(knows), tokens, labels, at)
        answer_loss, lm_loss, accuracy = (metrics[name] for name in task.METRICS)
        assert accuracy == knows and lm_loss < 1e-5 and (answer_loss < 1e-5) == knows
        torch.testing.assert_close(loss, answer_loss + 0.3 * lm_loss)


def test_show_an_example():
    assert command("-m", "tasks.needles").stdout.count("|?") >= 3             # the text may have one, too


@pytest.mark.parametrize("kind", ["multi", "multiquery", "multihop"])
@torch.no_grad()
def test_answers_are_written_from_the_tokens_that_the_model_wrote(kind):
    """Against forward, a token at a time; the colon between two values is given."""
    task = Needles(settings(needle=kind, n_value=3), load_corpus("stdlib"))
    model, offsets = tiny(), task.haystack.answer_offsets
    tokens, _, answer_at = task.haystack.batch(task.corpus.val, np.random.default_rng(0), 2, 200, 2)
    tokens, firsts = torch.from_numpy(tokens).to(DEVICE), answer_at[0].reshape(2, -1)[:, 0]
    given = firsts - offsets[0]                                             # where the parts are counted from
    written = Reader(DEVICE).write(model, tokens, firsts.tolist(), (offsets - offsets[0]).tolist())
    for q in range(2):
        text = tokens.clone()
        for i, at in enumerate(given[q] + offsets):
            new = model(text[:, :at + 1])[0][:, -1].argmax(-1)
            assert torch.equal(written[:, q, i], new)
            text[:, at + 1] = new                                           # what it wrote is what it reads
