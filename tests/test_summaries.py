"""Pairs of documents and summaries: where they come from, what a training context holds, what is scored."""
import json

import numpy as np
import pytest
import torch

import eval as evaluation
import train
from eval import Reader
from helpers import DEVICE, TINY_FLAGS, random_tokens, refused, tiny
from tasks import summaries
from tasks.summaries import Split, Summaries, context_of, load_expected, mean_rouge, pack
from tasks.text import load_corpus
from tools import packages, pairs, prepare

SOURCE = '''"""Numbers for people.

More about them.
"""
import os


class Number:
    """Not taken: a class."""

    @property
    def half(self):
        """Return half of the number.

        Longer explanation.
        """
        if self.value is None:
            return None
        rest, whole = self.value % 2, self.value // 2
        return whole + rest / 2

    def short(self):
        """Return what it is."""
        return 1

    def one_line(self): """Not taken either."""; return "a body that is long enough to count as one, at least"


def vague(x):
    """No words."""
''' + "    x = compute_something(x)\n" * 40 + "    return x\n"


def test_docstrings_of_functions_and_modules():
    found = [*pairs.pairs_of_file(packages.with_tabs(SOURCE))]
    assert [(pair["kind"], pair["summary"]) for pair in found] == [
        ("module", "Numbers for people."), ("function", "Return half of the number.")]
    module, function = (pair["document"] for pair in found)
    assert module.startswith("import os") and "class Number:" in module and "More about" not in module
    assert all(words not in module for words in ("Not taken: a class", "Return half", "Return what"))
    assert function.startswith("def half(self):\n\tif self.value is None:\n\t\treturn None\n")
    assert function.endswith("rest / 2") and "explanation" not in function
    assert [*pairs.pairs_of_file("def f(:\n")] == []
    for odd in ("\\x00", "\\ud800"):                    # a corpus cannot hold them
        odd_summary = SOURCE.replace("Return half of", f"Return {odd} of")
        assert [pair["kind"] for pair in pairs.pairs_of_file(odd_summary)] == ["module"]
    assert [*pairs.pairs_of_file("# one\r" + SOURCE)][1] == found[1]


def test_docstrings_become_a_corpus(tmp_path, monkeypatch):
    """Splits by package; a document that validation or test has is not in training."""
    body = "".join(f"    total = total * {i} + offset\n" for i in range(30))

    def file(name, i):
        return f'def {name}{i}(offset, total):\n    """Add {name} number {i}."""\n{body}    return {i}\n'

    files = {name: {f"{name}/{i}.py": file(name, i) for i in range(8)} for name in ("a", "b", "c")}
    files["a"]["a/more.py"] = file("b", 3)
    files["c"]["c/more.py"] = file("a", 1)
    splits = {split: {name: files[name]} for split, name in dict(test="a", val="b", train="c").items()}
    monkeypatch.setattr(packages, "split_files", lambda most: (splits, {}))
    prepare.main(["docstrings", "--out", str(tmp_path / "out"), "--tokenizer", "bytes"])
    corpus = load_corpus(tmp_path / "out")
    assert corpus.references.keys() == {"val", "test"}
    assert [len(Split(x, 0)) for x in (corpus.test, corpus.val, corpus.train)] == [9, 7, 8]
    val = Split(corpus.val, 0)
    rows = [json.loads(line) for line in (tmp_path / "out/val.jsonl").read_text().splitlines()]
    assert [text(val.summary(i)) for i in range(7)] == [row["references"][0] for row in rows]
    assert text(val.document(0)).startswith("def b") and {row["kind"] for row in rows} == {"function"}


def text(tokens):
    return bytes(tokens.tolist()).decode()


def jsonl(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def pair(i, size=9):
    return dict(document=f"document {i} " + "word " * size, summary=f"summary {i}", other=1)


@pytest.mark.parametrize("row, message", [
    ("{", "line 2: must be a JSON object"), ("[1]", "line 2: must be a JSON object"),
    (dict(document="x"), "line 2: summary must be text, got None"),
    (dict(document=3, summary="x"), "line 2: document must be text, got 3"),
    (dict(document=" ", summary="x"), "line 2: document must not be empty"),
    (dict(document="x", summary="y", references=["z", 1]), "line 2: references must be a list of texts"),
    (dict(document="x\0", summary="y"), "line 2: must be text, without zero bytes"),
    ('{"document": "\\ud800", "summary": "x"}', "line 2: must be text, without")])
def test_broken_lines_are_named(row, message, tmp_path, capsys):
    path = jsonl(tmp_path / "x.jsonl", pair(0), row, pair(1))
    line = "summaries", path, "--out", tmp_path / "out", "--tokenizer", "bytes"
    error = refused(capsys, prepare.main, *line)
    assert f"{path}, {message}" in error and not (tmp_path / "out").exists()


def test_missing_files_of_pairs(tmp_path, capsys):
    line = "--out", tmp_path / "out", "--tokenizer", "bytes"
    assert "no file or folder" in refused(capsys, prepare.main, "summaries", tmp_path / "none", *line)
    assert "with train.jsonl" in refused(capsys, prepare.main, "summaries", tmp_path, *line)
    jsonl(tmp_path / "train.jsonl", pair(0))
    assert "pairs for val, got none" in refused(capsys, prepare.main, "summaries", tmp_path, *line)


@pytest.fixture
def corpus(tmp_path):
    rows = [pair(i, size=3 + i % 40) for i in range(200)]
    jsonl(tmp_path / "rows/train.jsonl", *rows[:150])
    jsonl(tmp_path / "rows/val.jsonl", *rows[150:170])
    test = [row | dict(references=["other words", row["summary"]]) for row in rows[170:]]
    jsonl(tmp_path / "rows/test.jsonl", *test)
    line = "summaries", tmp_path / "rows", "--out", tmp_path / "corpus", "--tokenizer", "bytes"
    prepare.main([*map(str, line)])
    return load_corpus(tmp_path / "corpus")


def settings(**change):
    return dict(chunk_size=16, seq_len=400, seed=0, micro_batch=0, n_summary=20) | change


def test_one_file_is_split_by_a_hash(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", *[pair(i) for i in range(200)])
    splits = pairs.from_jsonl(path)
    assert len(splits["train"]) > 150 and len(splits["val"]) > 2 and len(splits["test"]) > 2
    assert sum(map(len, splits.values())) == 200


def test_a_context_holds_pairs_whose_separator_opens_a_chunk(corpus):
    train_pairs = Split(corpus.train, 0)
    contexts = pack(train_pairs, range(len(train_pairs)), 400, 15)
    assert [i for placed in contexts for i, *_ in placed] == [*range(150)] and len(contexts) < 100
    for placed in contexts:
        tokens, labels = context_of(train_pairs, placed, 400, ord("\n"))
        assert len(tokens) == len(labels) == 400
        expected = np.full(400, -100)
        for i, _, at in placed:
            document = train_pairs.document(i).tolist()
            assert at % 15 == 0 and tokens[at] == 0 and tokens[at - len(document):at].tolist() == document
            answer = [*train_pairs.summary(i), 0]
            expected[at:at + len(answer)] = answer
        assert (labels == expected).all()


def test_a_long_document_is_cut(corpus):
    long = Split(np.array([*b"d" * 1000, 0, *b"summary", 0]), 0)
    ((only,),) = pack(long, [0], 400, 15)
    tokens, labels = context_of(long, [only], 400, 10)
    assert (tokens == ord("d")).sum() == 400 - 9 - 15 and (labels >= 0).sum() == 8


def test_every_epoch_reads_every_pair_once(corpus):
    task = Summaries(settings(), corpus)
    first = task.batch(0, 400, 4)
    again = Summaries(settings(), corpus)
    again.batch(9, 400, 4)                                                  # as a resumed run
    assert all((x == y).all() for x, y in zip(first, again.batch(0, 400, 4), strict=True))
    while task.epoch < 3:
        task.batch(len(task.contexts) // 4, 400, 4)
    numbers = [i for placed in task.contexts for i, *_ in placed]
    assert all(sorted(numbers[150 * epoch:150 * (epoch + 1)]) == [*range(150)] for epoch in range(3))
    assert numbers[:150] != numbers[150:300]


@pytest.mark.parametrize("change, message", [
    (dict(n_summary=5), "--n_summary must be at least 11, for the longest summary"),
    (dict(n_summary=0), "--n_summary must be at least 1")])
def test_settings_that_do_not_fit(change, message, corpus):
    with pytest.raises(ValueError, match=message):
        Summaries(settings(**change), corpus).check(400)
    with pytest.raises(ValueError, match="--seq_len must be at least 52"):
        Summaries(settings(), corpus).check(50)
    with pytest.raises(ValueError, match="documents and summaries, as"):
        Summaries(settings(), load_corpus("stdlib"))


def test_generation_ends_before_the_separator():
    model, prompts = tiny(), [random_tokens(n).tolist() for n in (40, 7, 90)]
    alone = [[int(x) for x in model_tokens(model, prompt)] for prompt in prompts]
    stop = alone[0][5]
    made = Reader(DEVICE).generate(model, prompts, 12, stop)
    for tokens, expected in zip(made, alone, strict=True):
        assert tokens == (expected[:expected.index(stop)] if stop in expected else expected)


def model_tokens(model, prompt):
    return [x[0] for x in evaluation.fast.generate(model, [prompt], 12, temperature=0)]


def test_rouge_takes_the_best_reference():
    pytest.importorskip("rouge_score")
    scores = mean_rouge([["one two three", "nothing"], ["a b c d"]], ["Nothing!", "a b"], "x_")
    assert scores["x_rouge1"] == pytest.approx(50 * (1 + 2 / 3)) and scores["x_rouge2"] == pytest.approx(25)


@pytest.mark.parametrize("text", ["собака видит кошку", "ο σκύλος", "naïve café", "我们读书", "كلب يرى"])
def test_rouge_of_text_that_is_not_latin(text):
    pytest.importorskip("rouge_score")
    scores = mean_rouge([[text], [text]], [text, "other words"], "")
    assert scores == pytest.approx(dict(rouge1=50, rouge2=50, rougeL=50))


def test_rouge_of_english_is_that_of_the_package():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge2"], use_stemmer=True)
    texts = "Reads the files' lines, 3 of 4; and writes_them!", "Reading a file line; 3 of 4 written."
    theirs = scorer.score(*texts)["rouge2"].fmeasure
    assert mean_rouge([[texts[0]]], [texts[1]], "")["rouge2"] == pytest.approx(100 * theirs)


def test_baselines_of_code():
    code = "@cached\ndef read_theFile(x):\n\tdef y():\n\t\t'''Say more.\n\n\t\tX.'''\n"
    assert summaries.words_of_name(code) == "read the file"
    assert summaries.docstring_inside(code) == "Say more."
    assert summaries.words_of_name("class HTTPServer: pass") == "http server"
    assert summaries.words_of_name("x = 1") == summaries.docstring_inside("x = 1") == ""


def test_train_and_summarize(corpus, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    flags = ["--task", "summaries", "--data", corpus.name, "--seq_len", 400, "--n_summary", 20, "--steps", 4]
    train.main([*map(str, [*TINY_FLAGS, *flags, "--out", out])])
    assert "document" in capsys.readouterr().out and (out / "summaries.json").is_file()
    line = "summarize", "--ckpt", out / "ckpt.pt", "--device", DEVICE.type, "--documents", 3
    if summaries.rouge_scorer():
        evaluation.main([*map(str, [*line, "--json", tmp_path / "x.json"])])
        said = capsys.readouterr().out
        assert said.count("true: other words") == 3
        report = json.loads((tmp_path / "x.json").read_text())
        (row,), settings = report["rows"], report["settings"]["run"]
        assert (settings["data"], settings["split"]) == (str(corpus.name), "test")
        assert row["documents"] == 3 and 0 <= row["rougeL"] <= 100 and row["lead_rouge1"] >= 0
    monkeypatch.setattr(evaluation, "rouge_scorer", lambda: None)
    assert "pip install rouge-score" in refused(capsys, evaluation.main, *line)


@pytest.mark.parametrize("kind, text, lead", [
    ("document", "As Ada et al. (2017) show, e.g. 3.5 texts suffice. Then we rest.\nMore.",
     "As Ada et al. (2017) show, e.g. 3.5 texts suffice."),
    ("document", "No end", "No end"), ("document", "", ""),
    ("function", "x = f('a. B')\n\treturn x.y", "x = f('a. B')")])
def test_the_lead_is_the_first_sentence_or_line_of_code(kind, text, lead):
    assert summaries.lead(text, kind) == lead


def test_without_rouge_training_ends_with_the_loss(corpus, monkeypatch):
    monkeypatch.setattr(summaries, "rouge_scorer", lambda: None)
    task = Summaries(settings(), corpus)
    (row,) = evaluation.measure(task, dict(tiny=tiny()), Reader(DEVICE), n=5)
    assert not any("rouge" in name for name in row) and row["loss"] > 0
    with torch.no_grad():
        loss, n = 0.0, 0
        numbers = sorted(np.random.default_rng([3, 0]).permutation(30)[:5].tolist())
        test = Split(corpus.test, 0)
        for placed in pack(test, numbers, 400, 15):
            arrays = context_of(test, placed, 400, 10)
            tokens, labels = (torch.from_numpy(x)[None].to(DEVICE) for x in arrays)
            count = (labels >= 0).sum().item()
            loss, n = loss + tiny()(tokens, labels)[1].item() * count, n + count
    assert row["loss"] == pytest.approx(loss / n, rel=1e-4)


def test_damaged_references(corpus, tmp_path, capsys):
    (tmp_path / "corpus/test.jsonl").write_text("{}\n")
    out = tmp_path / "run"
    flags = ["--task", "summaries", "--data", corpus.name, "--seq_len", 400, "--n_summary", 20, "--steps", 1]
    error = refused(capsys, train.main, *TINY_FLAGS, *flags, "--out", out)
    assert "test.jsonl must hold the references of its corpus" in error and not out.exists()


def test_summaries_by_a_model_of_another_task(corpus, needle_run, capsys):
    """With its 64 tokens of context; and the mistakes that are possible then."""
    pytest.importorskip("rouge_score")
    line = "summarize", "--ckpt", needle_run[0] / "ckpt.pt", "--device", DEVICE.type, "--documents", 1
    assert "documents and summaries" in refused(capsys, evaluation.main, *line)
    path = needle_run[0] / "ckpt.pt"
    same = path.parent / ".." / path.parent.name / "ckpt.pt"
    error = refused(capsys, evaluation.main, *line, "--data", corpus.name, "--json", same)
    assert "would be overwritten" in error
    evaluation.main([*map(str, [*line, "--data", corpus.name])])
    assert "lead_rouge1" in capsys.readouterr().out


def test_a_corpus_that_cannot_be_made_anew_stays_as_it_was(tmp_path, monkeypatch):
    def files():
        return {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    for split in ("train", "val"):
        jsonl(tmp_path / f"{split}.jsonl", pair(0), pair(1))
    line = ["summaries", str(tmp_path), "--out", str(tmp_path / "out"), "--tokenizer", "bytes"]
    prepare.main(line)
    before = files()
    jsonl(tmp_path / "val.jsonl", pair(2))
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "load_tokenizer", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare.prepare_pairs(pairs.from_jsonl(tmp_path), tmp_path / "out", "bytes")
    assert files() == before
    prepare.main(line)
    assert files()["val.jsonl"] != before["val.jsonl"]
    assert len(load_expected(load_corpus(tmp_path / "out"), "val")) == 1


def test_a_corpus_never_overwrites_where_it_comes_from(tmp_path, capsys):
    for split in ("train", "val"):
        jsonl(tmp_path / f"{split}.jsonl", pair(0), pair(1))
    before = (tmp_path / "val.jsonl").read_text()
    for path in (tmp_path, tmp_path / "train.jsonl"):
        error = refused(capsys, prepare.main, "summaries", path, "--out", tmp_path, "--tokenizer", "bytes")
        assert "--out" in error and (tmp_path / "val.jsonl").read_text() == before
