"""Perplexity by length, by document and by copy: what is scored, after how much context, and who copies."""
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval as evaluation
from helpers import DEVICE, refused, tiny
from model import DRT, DRTConfig
from tasks import perplexity
from tasks.text import documents, load_corpus
from tools import prepare
from tools.checkpoint import load_checkpoint
from tools.reader import Reader


def test_perplexity_scores_the_same_tokens_after_more_or_less_context():
    starts, sizes = documents(np.array([1] * 500 + [0] + [1] * 900 + [0]), 0)
    assert starts.tolist() == [0, 501] and sizes.tolist() == [500, 900]
    model, text = DRT(DRTConfig()).to(DEVICE).eval(), np.random.default_rng(0).integers(256, size=2000)
    with torch.no_grad():
        expected = 0
        for i in (400, 700, 1500):
            for j in range(i, i + 256, 8):                  # the most of 64 // 8 = 8 tokens at a time
                x = torch.from_numpy(text[j - 64:j + 8]).to(DEVICE)
                logits = model(x[None, :-1])[0][0, -8:]
                expected += F.cross_entropy(logits, x[-8:], reduction="sum").item()
    for use_fast in (True, False):
        read = Reader(DEVICE, use_fast=use_fast)
        loss = perplexity.scored_loss(model, read, text, np.array([400, 700, 1500]), 256, 64)
        assert loss == pytest.approx(expected, rel=1e-4)


def test_places_do_not_depend_on_the_lengths_of_a_table():
    sizes = np.array([5000, 1100, 40, 9000, 3000, 2000])
    these = perplexity.Documents(None, np.cumsum(sizes) - sizes, sizes, None)
    tables = [perplexity.places(these, longest, 40, 7) for longest in (64, 1000, 3000)]
    assert [sorted(table) for table in tables] == [[0, 1, 3, 4, 5], [0, 3, 4, 5], [0, 3]]
    for table, longest in zip(tables, (64, 1000, 3000), strict=True):
        counts = [len(where) for where in table.values()]
        assert sum(counts) == 40 and max(counts) - min(counts) <= 1                 # balanced
        for i, where in table.items():
            assert (where - these.starts[i] >= max(longest, sizes[i] - sizes[i] // 4)).all()
            assert (where + 256 <= these.starts[i] + sizes[i]).all()
            assert where[:8].tolist() == tables[-1].get(i, where)[:8].tolist() == tables[0][i][:8].tolist()
    assert perplexity.places(these, 64, 40, 8)[0].tolist() != tables[0][0].tolist()
    with pytest.raises(ValueError, match="--lengths must be at most 6750: no document has 6751"):
        perplexity.places(these, 6751, 1, 0)


def test_when_a_gram_was_last_seen():
    tokens = np.array([1, 2, 3, 4, 9, 1, 2, 3, 4, 5, 1, 2, 3, 4, 4, 4, 4, 4, 4])
    assert perplexity.last_seen(tokens).tolist() == [0] * 8 + [5, 0, 0, 0, 0, 5, 0, 0, 0, 1, 1]
    assert perplexity.last_seen(tokens[:3]).tolist() == [0] * 3
    counts = perplexity.copied_from(tokens, 5, 2)               # position 8, predicted by 7: from position 3
    assert counts[1, 0] == 1 and counts[2, 1] == 1 and counts.sum() == 2


def test_the_oracle_retrieves_what_the_coming_chunk_copies():
    model, text = tiny(top_k=1), np.random.default_rng(0).integers(1, 256, 15 * 40)
    text[15 * 30:15 * 31] = text[15 * 7:15 * 8]                                     # chunk 30 repeats chunk 7
    tokens, seen = torch.from_numpy(text)[None].to(DEVICE), []
    gca, model.gca = model.gca, lambda q, k, v, w, i, *more: (seen.append(i), gca(q, k, v, w, i, *more))[1]
    model.config.retriever = "oracle"
    logits = Reader(DEVICE)(model, tokens, torch.ones_like(tokens, dtype=torch.bool))
    assert seen[0][0, 30].tolist() == [7] and logits.shape == (600, 256)


def test_a_table_by_document_and_one_by_copy(text_run, tmp_path, capsys):
    rng, texts = np.random.default_rng(0), tmp_path / "texts"
    for split in ("train", "val"):
        (texts / split).mkdir(parents=True)
        for name, n in dict(a=2500, b=1700, short=90).items():
            words = rng.choice(["one ", "two ", "three ", "four "], n // 4)
            (texts / split / f"{name}.txt").write_text("".join(words))
    (texts / "val" / "aa.txt").write_bytes(b"not UTF-8 \xff")
    prepare.main(["text", str(texts), "--out", str(tmp_path / "data"), "--tokenizer", "bytes"])
    line = ["ppl", "--ckpt", text_run, "--data", tmp_path / "data", "--lengths", 200, "--places", 3,
            "--retriever", "learned", "random", "oracle", "--json", tmp_path / "ppl.json"]
    line = [*map(str, [*line, "--device", DEVICE.type, "--dtype", "float32"])]

    evaluation.main([*line, "--by", "document"])
    report = json.loads((tmp_path / "ppl.json").read_text())
    assert "2 documents measured; left out: val/short.txt" in capsys.readouterr().out
    by_document, (settings, *_) = report["rows"], report["settings"].values()
    assert (settings["documents"], settings["left_out"]) == (["val/a.txt", "val/b.txt"], ["val/short.txt"])
    assert [row["document"] for row in by_document] == ["val/a.txt", "val/b.txt", "all 2"] * 3
    model, corpus = load_checkpoint(text_run / "ckpt.pt", DEVICE)[0], load_corpus(tmp_path / "data")
    end, losses = int(np.flatnonzero(corpus.val == 0)[0]), []
    for start in np.linspace(0, end - 201, 3).astype(int):
        tokens = torch.from_numpy(corpus.val[start:start + 201].astype(np.int64)).to(DEVICE)
        losses.append(F.cross_entropy(model(tokens[None, :-1])[0][0, 100:], tokens[101:]).item())
    assert by_document[0]["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    assert all(row["ratio"] == row["low"] == row["high"] == 1 for row in by_document[:3])
    for i in (3, 6):                                            # random chunks, and those of the oracle
        a, b, both = by_document[i:i + 3]
        assert a["ratio"] == pytest.approx(a["perplexity"] / by_document[0]["perplexity"])
        assert both["ratio"] == pytest.approx(math.sqrt(a["ratio"] * b["ratio"]))
        assert both["low"] <= both["ratio"] <= both["high"] and both["scored"] == 6 * 100

    evaluation.main([*line, "--by", "copy"])
    rows = json.loads((tmp_path / "ppl.json").read_text())["rows"]
    assert [row["last_seen"] for row in rows[:4]] == ["never", "up to 16 ago", "up to 32", "further back"]
    windows = [corpus.val[i:i + 201] for start, n in zip(*documents(corpus.val, 0), strict=True) if n > 200
               for i in start + np.linspace(0, n - 201, 3).astype(int)]
    back = np.concatenate([perplexity.last_seen(x)[101:] for x in windows])
    counts = [(back == 0).sum(), ((0 < back) & (back <= 16)).sum(), ((16 < back) & (back <= 32)).sum()]
    assert [row["scored"] for row in rows[:3]] == counts and min(counts) > 0
    for table in (rows[:4], rows[4:8], rows[8:]):
        assert sum(row["share"] for row in table) == pytest.approx(1)
        assert sum(row["scored"] for row in table) == 6 * 100
    mean = sum(row["loss"] * row["share"] for row in rows[:4])
    assert mean == pytest.approx(np.mean([math.log(row["perplexity"]) for row in by_document[:2]]), rel=1e-4)


@pytest.mark.parametrize("by", ["length", "document", "copy"])
def test_a_model_that_has_diverged_gets_a_table(by, text_run, tmp_path, capsys):
    for split in ("train", "val"):
        (tmp_path / "texts" / split).mkdir(parents=True)
        for i in range(2):
            (tmp_path / "texts" / split / f"a\n{i}.txt").write_text(f"{i} {split} " * 99)
    prepare.main(["text", str(tmp_path / "texts"), "--out", str(tmp_path / "data"), "--tokenizer", "bytes"])
    model, state = load_checkpoint(text_run / "ckpt.pt", DEVICE)
    weights = {name: 1e4 * x if x.dim() > 1 else x for name, x in state["model"].items()}
    torch.save(dict(state, model=weights), tmp_path / "ckpt.pt")
    capsys.readouterr()
    evaluation.main(["ppl", "--by", by, "--ckpt", str(text_run), str(tmp_path), "--places", "2", "--lengths",
                     "100", "--data", str(tmp_path / "data"), "--device", DEVICE.type])
    table = capsys.readouterr().out.splitlines()
    assert any("e+" in row for row in table) and max(map(len, table)) < 300
    assert by != "document" or r"val/a\n0.txt" in table[-3]        # a name never breaks its row


def test_mistakes_with_tables_by_document_and_by_copy(text_run, tmp_path, capsys):
    line = "ppl", "--ckpt", text_run, "--device", DEVICE.type
    for flags, words in ((["--by", "document"], "--by document: stdlib has no names of its documents"),
                         (["--by", "copy", "--lengths", 30], "more than two windows of 16 with --by copy"),
                         (["--by", "copy", "--lengths", "64,128"], "--lengths must be one with --by copy"),
                         (["--by", "copy", "--lengths", 10 ** 9], "--lengths must be below the")):
        assert words in refused(capsys, evaluation.main, *line, *flags)
    model, state = load_checkpoint(text_run / "ckpt.pt", DEVICE)
    base = tiny(n_group=0)
    torch.save(dict(state, config=vars(base.config), model=base.state_dict()), tmp_path / "ckpt.pt")
    error = refused(capsys, evaluation.main, "ppl", "--ckpt", tmp_path, "--retriever", "oracle",
                    "--device", DEVICE.type)
    assert "a base LM retrieves nothing" in error
