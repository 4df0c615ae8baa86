"""Corpora: from folders and data sets to token ids, and what is said of folders that hold none."""
import json
import os
import re
import sys
import types

import numpy as np
import pytest
import tiktoken

from helpers import command, refused
from tasks.haystack import Haystack
from tasks.text import load_corpus, load_tokenizer
from tools import packages, prepare


def text_of(tokens):
    return bytes(np.array(tokens, np.uint8)).decode()


def documents(folder, **texts):
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def test_a_folder_of_text_becomes_a_corpus(tmp_path):
    texts = {f"book{i}": f"Book {i}, naïve. " * 200 for i in range(9)}
    folder = documents(tmp_path / "books", **texts, latin=b"caf\xe9", binary=b"a\0b")
    (folder / "book3.txt").rename(folder / "book3.md")
    out = tmp_path / "corpus"
    line = ["text", str(folder), "--out", str(out), "--tokenizer", "bytes"]
    printed = command("-m", "tools.prepare", *line).stdout
    assert "binary.txt" in printed and "latin.txt" in printed
    corpus, meta = load_corpus(out), json.loads((out / "meta.json").read_text())
    assert corpus.vocab_size == 256 and corpus.tokenizer == "bytes"
    found = [text_of(tokens) for tokens in (corpus.train, corpus.val)]
    assert sorted((found[0] + found[1]).split("\0")) == sorted(["", *texts.values()])
    assert sum(split["skipped"] for split in meta["splits"].values()) == 2 and len(found[1]) < len(found[0])
    written = [(out / name).stat().st_mtime_ns for name in ("train.bin", "val.bin")]
    prepare.main(line)                                                             # nothing to do
    assert [(out / name).stat().st_mtime_ns for name in ("train.bin", "val.bin")] == written
    assert json.loads((out / "meta.json").read_text()) == meta
    prepare.main([*line, "--errors", "replace"])
    assert json.loads((out / "meta.json").read_text())["splits"]["train"]["skipped"] == 1
    tokens, _, _ = Haystack(15, 6).batch(load_corpus(out).train, np.random.default_rng(0), 4, 128, 3)
    assert tokens.shape == (4, 128) and tokens.max() < 256
    (out / "val.bin").write_bytes(b"xx")
    with pytest.raises(ValueError, match="val.bin must hold the"):
        load_corpus(out)


def test_a_corpus_that_is_not_its_documents_any_more_is_prepared_anew(tmp_path):
    """Documents that changed and kept their size and time, and a file that was cut."""
    folder, out = documents(tmp_path / "books", a="one two", b="three four"), tmp_path / "corpus"
    line = ["text", str(folder), "--out", str(out), "--tokenizer", "bytes"]
    prepare.main(line)
    before = load_corpus(out).train.tolist()
    for path in folder.glob("*.txt"):
        times = path.stat().st_atime_ns, path.stat().st_mtime_ns
        path.write_text(path.read_text().upper())
        os.utime(path, ns=times)
    prepare.main(line)
    after = load_corpus(out).train.tolist()
    assert text_of(after) == text_of(before).upper() != text_of(before)
    (out / "train.bin").write_bytes((out / "train.bin").read_bytes()[:-2])
    with pytest.raises(ValueError, match="train.bin must hold the"):
        load_corpus(out)
    prepare.main(line)
    assert load_corpus(out).train.tolist() == after


def test_own_splits_are_kept(tmp_path):
    folder = tmp_path / "books"
    for split in ("train", "val", "test"):
        documents(folder / split, one=f"the {split} text")
    prepare.main(["text", str(folder), "--out", str(tmp_path / "out"), "--tokenizer", "bytes"])
    for split in ("train", "val", "test"):
        written = (tmp_path / "out" / f"{split}.bin").read_bytes()
        assert written.decode("utf-16-le") == f"the {split} text\0"


def test_gpt2_tokens(tmp_path, capsys, monkeypatch):
    folder = documents(tmp_path / "books", a="Hello world", b="Hello again")
    line = "text", folder, "--out", tmp_path / "out"
    with monkeypatch.context() as without_network:
        without_network.setattr(tiktoken, "get_encoding", lambda _: exec("raise OSError"))
        load_tokenizer.cache_clear()
        error = refused(capsys, prepare.main, *line)
    assert "set TIKTOKEN_CACHE_DIR" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    try:
        load_tokenizer("gpt2")
    except ValueError:
        pytest.skip("the GPT-2 tokenizer can be neither downloaded nor found: set TIKTOKEN_CACHE_DIR")
    prepare.main([*map(str, line)])
    corpus = load_corpus(tmp_path / "out")
    assert corpus.vocab_size == 50257 and corpus.tokenizer == "gpt2"
    assert sorted([corpus.train.tolist(), corpus.val.tolist()]) == [[15496, 757, 50256], [15496, 995, 50256]]


@pytest.mark.parametrize("texts, message", [
    (dict(), "must hold at least two .txt or .md files"), (dict(one="x"), "got 1"),
    (dict(one=b"\xff", two=b"\xfe"), "must hold UTF-8 text")])
def test_preparation_mistakes_get_one_line(texts, message, tmp_path, capsys):
    (tmp_path / "books").mkdir()
    folder = documents(tmp_path / "books", **texts)
    line = "text", folder, "--out", tmp_path / "out", "--tokenizer", "bytes"
    assert message in refused(capsys, prepare.main, *line)
    assert not list(tmp_path.glob("out/*"))


def test_a_split_that_is_no_text_leaves_the_corpus_before(tmp_path, capsys):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        documents(tmp_path / split, one="some text")
    line = "text", tmp_path, "--out", tmp_path / "out", "--tokenizer", "bytes"
    prepare.main([*map(str, line)])
    before = load_corpus(tmp_path / "out")
    documents(tmp_path / "train", one="another text")
    documents(tmp_path / "val", one=b"\xff")
    assert "val must hold UTF-8 text" in refused(capsys, prepare.main, *line)
    after = load_corpus(tmp_path / "out")
    assert bytes(after.train) == bytes(before.train) and bytes(after.val) == bytes(before.val)


def environment(folder, sizes, copy_of=None):
    """Packages of about so many characters, as {package: {name: path}}."""
    rng = np.random.default_rng(0)
    found = {}
    for name, size in sizes.items():
        lines = [f"    value_{i} = compute({i}, {rng.integers(10 ** 9)})" for i in range(size // 30)]
        path = documents(folder, **{name: "def f():\n" + "\n".join(lines)}) / f"{name}.txt"
        found[name] = {f"{name}/a.py": path}
        if copy_of == name:
            text = path.read_text().replace("compute(1", "work(1")
            (folder / "copy.txt").write_text(text)
            found["big0"]["big0/copied.py"] = folder / "copy.txt"
    return found


def test_installed_packages_become_a_corpus(tmp_path, monkeypatch, capsys):
    sizes = {f"big{i}": 3_000_000 for i in range(3)} | {f"p{i}": 420_000 for i in range(12)} | dict(tiny=900)
    found = environment(tmp_path, sizes, "p0")
    monkeypatch.setattr(packages, "installed_packages", lambda: found)
    splits, copies = packages.documents()
    names = {split: {*texts} for split, texts in splits.items()}
    assert {"big0", "big1", "big2"} <= names["train"] and "tiny" not in set.union(*names.values())
    assert len(names["test"]) == 3 and len(names["val"]) == 2          # a third of 15
    assert sum(map(len, names.values())) == 15                         # every other package is in one split
    assert "p0" in names["train"] and copies == dict(train=0, val=0, test=0)        # of big0's family
    text = next(iter(splits["test"].values()))
    assert text.startswith("# p") and "\n\tvalue_7 = " in text
    assert packages.documents() == (splits, copies)
    capsys.readouterr()
    prepare.main(["packages", "--out", str(tmp_path / "code"), "--tokenizer", "bytes"])
    said, first = capsys.readouterr().out, [*splits["test"]][0]
    assert re.search(rf"test, tokens, and how many of their 32-grams are in train: {first} [\d,]+ \d+%", said)
    corpus = load_corpus(tmp_path / "code")
    assert corpus.names == {split: list(texts) for split, texts in splits.items()}
    assert corpus.describe()["documents"] == [*splits["test"]]
    meta = json.loads((tmp_path / "code/meta.json").read_text())
    for damaged in (["p0"], "p0", dict(test=3), dict(test=[1])):
        (tmp_path / "code/meta.json").write_text(json.dumps(meta | dict(names=damaged)))
        with pytest.raises(ValueError, match="meta.json is damaged"):
            load_corpus(tmp_path / "code")
    assert sum(map(len, packages.documents(most=4_000_000)[0]["train"].values())) < 4_100_000
    monkeypatch.setattr(packages, "installed_packages", lambda: {k: found[k] for k in ("big0", "p1", "tiny")})
    error = refused(capsys, prepare.main, "packages", "--out", tmp_path / "out", "--tokenizer", "bytes")
    assert "too few for three splits" in error and not (tmp_path / "out").exists()


def test_families_of_packages_and_copies_of_files(monkeypatch):
    """a, b and c copy from each other in a chain; d has one small file of e, and a license that all have."""
    def lines(name, n):
        return [f"{name} says at length in line number {i}" for i in range(n)]

    rows = dict(a=lines("a", 100), b=lines("b", 100) + lines("a", 20), c=lines("c", 90) + lines("b", 20),
                d=lines("d", 100), e=lines("e", 200), **{f"f{i}": lines(f"f{i}", 100) for i in range(30)})
    sets = {name: {*x} | {*lines("license", 10)} for name, x in rows.items()}
    assert [names for names in packages.families(sets) if len(names) > 1] == [["a", "b", "c"]]
    monkeypatch.setattr(packages, "LEAST", 1)
    texts = {name: {f"{name}/x.py": "\n".join(x)} for name, x in rows.items()}
    for name in texts:
        texts[name][f"{name}/copy.py"] = "\n".join(lines("e", 4) + [name])
    monkeypatch.setattr(packages, "installed_packages", lambda: texts)
    monkeypatch.setattr(packages, "read_package", lambda files: files)
    splits, copies = packages.split_files()
    held_out = {*splits["val"], *splits["test"]}
    assert len(held_out & {"a", "b", "c"}) in (0, 3) and 4 <= len(held_out) <= len(rows) // 3
    assert sum(copies.values()) >= len(splits["train"]) - 1         # one package alone has those four lines


def test_how_much_of_a_document_is_in_the_training_text():
    rng = np.random.default_rng(0)
    train, new = rng.integers(50000, size=20000), rng.integers(50000, size=1000)
    half = np.concatenate([train[7000:7500], new[:500]])
    shares = packages.overlaps(train.astype(np.uint16), [new, train[5:900], half, new[:5]])
    assert shares == pytest.approx([0, 1, 493 / 993, 0])


def test_what_is_left_out_of_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(packages.sysconfig, "get_path", lambda kind: tmp_path / kind)
    for name in ("purelib/a/b.py", "purelib/a/_vendor/c.py", "purelib/a/__pycache__/d.py",
                 "purelib/single.py", "stdlib/email/x.py", "stdlib/os.py", "stdlib/site-packages/a/e.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1")
    (tmp_path / "purelib/a/latin.py").write_bytes(b"x = '\xe9'")
    found = packages.installed_packages()
    assert {name: [*files] for name, files in found.items()} == {
        "a": ["a/b.py", "a/latin.py"], "single": ["single.py"], "email": ["email/x.py"], "python": ["os.py"]}
    assert [*packages.read_package(found["a"])] == ["a/b.py"]
    assert packages.with_tabs("        a\n      b\n  c\n    \n") == "\t\ta\n\t  b\n  c\n\t\n"


def test_data_sets_are_read_row_by_row(tmp_path, monkeypatch):
    """The paper's two, by a stand-in for the package that downloads them: splits, and arXiv's rows alone."""
    asked = []

    def load_dataset(path, split, streaming, data_files=None):
        asked.append((path, split, streaming))
        return [dict(text=f"{split} {i}", meta=json.dumps(dict(config="arxiv" if i else "books")))
                for i in range(3)]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    prepare.prepare_dataset("pg19", tmp_path / "pg19", "bytes")
    prepare.prepare_dataset("arxiv-math", tmp_path / "math", "bytes")
    assert asked[:3] == [("emozilla/pg19", split, True) for split in ("train", "validation", "test")]
    corpora = [load_corpus(tmp_path / name) for name in ("pg19", "math")]
    assert text_of(corpora[0].val) == "validation 0\0validation 1\0validation 2\0"
    assert text_of(corpora[1].test) == "test 1\0test 2\0"
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        prepare.prepare_dataset("pg19", tmp_path / "again", "bytes")
