"""An edit of model.py changes what is trained, read, written, measured and shown alike; or eval refuses."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval as evaluation
import fast
import fast.stream
import fast.window
import model as model_module
from helpers import DEVICE, random_tokens, refused, tiny
from model import DRT, Block, ChunkEncoder, CrossAttention, SelfAttention
from tasks.needles import NeedleConfig, Needles
from tasks.text import Corpus, Text
from tools.checkpoint import save_checkpoint
from tools.reader import Reader
from tools.trace import Trace

SETTINGS = dict(vars(NeedleConfig()), chunk_size=16, seed=0, start_len=64, seq_len=128)
CLOSE = dict(atol=2e-4, rtol=1e-4)
LOGITS_BEFORE = [0.133746, 0.838102, 0.343032, -0.555672]          # of the last test, on a CPU


def scaled(original, factor):
    return lambda *arguments, **more: original(*arguments, **more) * factor


def other_encoder(original):
    def forward(self, x):
        landmarks, k, v = original(self, x)
        return landmarks.flip(-1), k * 0.5, v * 1.5
    return forward


def first_chunk_wins(original):
    def scores(query, landmarks, t, c, *recency):
        return original(query, landmarks, t, c, *recency) + 9.0 * (c == 0)
    return scores


def other_tokens(original):
    return lambda self, tokens, *text: original(self, tokens ^ 1, *text)


EDITS = {                       # of a class or of model.py: the attribute, and the function in its place
    "Block": (Block, "forward", lambda f: scaled(f, 1.1)),
    "SelfAttention": (SelfAttention, "forward", lambda f: scaled(f, 1.3)),
    "CrossAttention": (CrossAttention, "forward", lambda f: scaled(f, 1.3)),
    "MLP": (model_module.MLP, "forward", lambda f: scaled(f, 1.3)),
    "ChunkEncoder": (ChunkEncoder, "forward", other_encoder),
    "retrieval_scores": (model_module, "retrieval_scores", first_chunk_wins),
    "DRT.hidden": (DRT, "hidden", other_tokens),
}


class Noting(Reader):
    """A reader that keeps the logits which a table is made of."""

    def __call__(self, *arguments):
        self.logits = super().__call__(*arguments)
        return self.logits


def outputs(model, tokens, corpus):
    """What users see of a model, each beside the same by DRT.forward: {name: (result, expected)}."""
    logits = model(tokens)[0]
    pieces, memory = tokens.split([7, 60, 1, 1, 34], dim=1), fast.Memory(model)
    read = torch.cat([fast.read(model, piece, memory) for piece in pieces], dim=1)
    tables = []
    for use_fast in (True, False):
        reader = Noting(DEVICE, use_fast=use_fast)
        [*Needles(SETTINGS, corpus).measure(model, reader, [300], 3)]
        row, = Text(SETTINGS, corpus).measure(model, Reader(DEVICE, use_fast=use_fast), [200], 2)
        tables.append((reader.logits, torch.tensor(row["loss"])))
    prompt = tokens[:, :31]                                             # its last token opens a chunk
    written = torch.stack([*fast.generate(model, prompt, 40, temperature=0)], dim=1)
    by_forward = model(torch.cat([prompt, written], dim=1))[0][:, 30:-1].argmax(-1)
    loss = F.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none")
    gca, model.gca = model.gca, lambda q, *_: q * 0                     # read nothing
    without = F.cross_entropy(model(tokens)[0][0, :-1], tokens[0, 1:], reduction="none")
    model.gca = gca
    gain = Trace(model, tokens[0], bytes).gain[1:]
    return dict(read=(read, logits), generate=(written, by_forward), needles=(tables[0][0], tables[1][0]),
                perplexity=(tables[0][1], tables[1][1]), inspect=(gain, (without - loss).cpu()))


@pytest.mark.parametrize("edit", EDITS)
@torch.no_grad()
def test_an_edit_changes_every_output_as_it_changes_forward(edit, monkeypatch):
    text = np.random.default_rng(0).integers(1, 256, 3000).astype(np.uint8)
    model, tokens = tiny(n_layer=4, n_group=2, top_k=2), random_tokens(1, 103)
    corpus = Corpus("random", text, text, 256)
    before = outputs(model, tokens, corpus)
    holder, name, change = EDITS[edit]
    monkeypatch.setattr(holder, name, change(getattr(holder, name)))
    for output, (result, expected) in outputs(model, tokens, corpus).items():
        torch.testing.assert_close(result, expected, **CLOSE, msg=output)
        assert not torch.allclose(result, before[output][0], **CLOSE), output


TWINS = {                       # of the same: what has a twin in fast/, and is edited on one side alone
    "one query": (fast.window, "one_query_attention", lambda f: scaled(f, 1.2)),
    "retrieve": (fast.stream, "retrieve", lambda f: lambda *x: (lambda w, i: (w.flip(-1), i))(*f(*x))),
    "landmarks": (model_module.WholeText, "insert_landmarks", lambda f: scaled(f, 1.2)),
    "choice": (model_module, "scores_and_ranking", lambda f: lambda *x: (lambda s, r: (s, -r))(*f(*x))),
    "weights": (model_module, "softmax_of_filled", lambda f: lambda s, e: f(2 * s, e)),
    "few": (model_module.WholeText, "remove_landmarks", lambda f: lambda *x: flip_every_fifth(f(*x))),
}


def flip_every_fifth(x):
    x = x.clone()
    x[:, ::5] *= -1
    return x


@pytest.mark.parametrize("twin", TWINS)
def test_twins_that_differ_are_refused_before_anything_is_measured(twin, monkeypatch):
    model, tokens = tiny(), random_tokens(1, 300)
    fast.check(model)
    holder, name, change = TWINS[twin]
    monkeypatch.setattr(holder, name, change(getattr(holder, name)))
    at = torch.zeros(1, 300, dtype=torch.bool, device=DEVICE)
    with pytest.raises(ValueError, match="fast/ reads other than the plain files"):
        Reader(DEVICE)(model, tokens, at)
    assert Reader(DEVICE, use_fast=False)(model, tokens, at).shape == (0, 256)


@pytest.mark.parametrize("config", [
    dict(), dict(n_group=0), dict(retriever="random"), dict(retriever="last", window=70), dict(top_k=40),
    dict(n_layer=4, n_group=2, n_kv_head=1, recency=True), dict(window=1), dict(chunk_size=64, window=5)])
def test_twins_that_agree_pass(config):
    model = tiny(**config)
    fast.check(model)
    model.norm.weight.data.fill_(float("nan"))          # weights that are lost are not called an edit
    with pytest.raises(ValueError, match="is not finite"):
        fast.check(model)


class Shifted(model_module.Block):
    """Each token sees the one before it, outside of attention: pieces do not know of that."""

    def forward(self, x, attend, read=None):
        return super().forward(x + F.pad(x, (0, 0, 1, 0))[:, :-1], attend, read)


class Twice(model_module.Block):
    def forward(self, x, attend, read=None):
        return super().forward(x + self.attention(self.norm1(x), attend), attend, read)


@pytest.mark.parametrize("block", [Shifted, Twice])
def test_what_fast_cannot_follow_is_refused_wherever_it_is_used(block, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(model_module, "Block", block)
    model, path, words = tiny(), tmp_path / "ckpt.pt", "fast/ reads other than the plain files"
    save_checkpoint(path, model, tokenizer="bytes", settings={}, step=1, length=64, optimizer={})
    with pytest.raises(ValueError, match=words):
        Reader(DEVICE)(model, random_tokens(1, 30), torch.ones(1, 30, dtype=torch.bool, device=DEVICE))
    with pytest.raises(ValueError, match=words):
        Reader(DEVICE).generate(model, [[5, 6]], 3, 0)
    for line in (["speed", "--lengths", 64], ["sample", "--prompt", "a", "--ckpt", path]):
        assert words in refused(capsys, evaluation.main, *line, "--device", DEVICE.type)


def test_checkpoints_from_before_rotary_positions_give_the_logits_that_they_gave(tmp_path):
    """By numbers that commit 9a9439b printed, which had no positions in the encoder."""
    from tools.checkpoint import load_checkpoint
    model = tiny(encoder_rope=False)
    save_checkpoint(tmp_path / "ckpt.pt", model)
    state = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    del state["config"]["encoder_rope"]
    torch.save(state, tmp_path / "ckpt.pt")
    loaded, _ = load_checkpoint(tmp_path / "ckpt.pt", DEVICE)
    assert loaded.config.encoder_rope is False
    tokens = torch.arange(100, device=DEVICE)[None] * 7 % 256
    assert torch.equal(loaded(tokens)[0], model(tokens)[0])
    logits = loaded(tokens)[0][0, -1, :4].tolist()
    assert logits == pytest.approx(LOGITS_BEFORE, abs=2e-4) or DEVICE.type == "cuda"    # other random numbers
