"""Mistakes that users make: one clear line that names flag or file, exit status 2, nothing half-written."""
import json
import math
import shutil
import types

import numpy as np
import pytest
import torch

import eval as evaluation
import fast
import train
from fast.generate import sample
from helpers import DEVICE, TEXT_FLAGS, TINY_FLAGS, random_tokens, refused, tiny
from tools import cli, prepare
from tools.checkpoint import load_checkpoint, save_checkpoint


def one_line(capsys, main, *arguments):
    error = refused(capsys, main, *arguments)
    assert error.count("\n") == 1 and error.startswith("error: ") and "Traceback" not in error
    return error


# ---------------------------------------------------------------- settings

NUMBERS = """batch_size batch_tokens steps lr warmup grow_at validate_every checkpoint_every seq_len
             seed start_len micro_batch final_lr weight_decay query_gain encoder_lr lm_weight""".split()
FLOATS = "lr grow_at final_lr weight_decay query_gain encoder_lr lm_weight".split()
SIZES = "n_layer n_group n_encoder n_head n_embd chunk_size top_k window n_kv_head".split()


@pytest.mark.parametrize("flags", [
    *(f"--{name} -1" for name in [*NUMBERS, *SIZES, "n_needle", "n_value"]),
    *(f"--{name} {value}" for name in FLOATS for value in ("nan", "inf", "-inf", "1e300")),
    *(f"--{name} 99999999999999999999999" for name in [*NUMBERS, *SIZES]),
    *(f"--{name} many" for name in NUMBERS),
    "--n_layer 1000000000", "--n_embd 1000000 --n_head 1", "--n_value 129", "--n_needle 0",
    "--n_layer 3", "--n_embd 65", "--dtype int8", "--task needle", "--needle five", "--device gpu",
    "--n_value 1 --needle multihop", "--n_needle -5 --needle single",
    "--needle multihop --n_value 7", "--needle multihop --seq_len 50",
    "--data stdlib --task summaries",
    "--preset big", "--data nowhere", "--resume", "--lr", "--steps 1.5", "--gumbel yes"])
def test_training_settings(flags, tmp_path, capsys):
    flags = flags.split()
    error = one_line(capsys, train.main, "--preset", "cpu", *flags, "--out", tmp_path / "new")
    assert flags[0].strip("-") in error or flags[0] == "--resume"
    assert not (tmp_path / "new").exists()


def test_a_batch_that_no_memory_holds_is_refused_on_a_cpu(tmp_path, capsys):
    flags = "--device cpu --batch_size 1000000 --seq_len 1000 --start_len 0 --batch_tokens 1000000000".split()
    error = one_line(capsys, train.main, *flags, "--out", tmp_path / "new")
    assert "--batch_tokens must be lower" in error and "2,861 GiB" in error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("flags", [
    *(f"niah --lengths {value}" for value in ("20", "many", "0", "-5", "1,,2")), "niah --questions 0",
    "niah --questions x", "niah --seed -1", "niah --seed 99999999999999999999", "niah --size 3",
    "niah --needle five", "niah --n_needle 0", "niah --json nowhere/x.json",
    "niah --json .", "niah --dtype half", "niah --data nowhere",
    "ppl --lengths 99999999", "ppl --places 0", "ppl --split train", "ppl --split test", "ppl --data none",
    "ppl --retriever best", *(f"sample --prompt x --temperature {t}" for t in ("-1", "nan", "inf")),
    "sample --prompt x --sample_top_k 0", "sample --prompt x --sample_top_p 0",
    "sample --prompt x --tokens 0", "sample --file nowhere", "sample --prompt x --file y",
    "summarize --documents 0", "summarize", "summarize --split train", "summarize --data nowhere",
    "sample", "speed --lengths 0", "speed --n_embd 64",
    "tell", ""])
def test_evaluation_flags(flags, needle_run, capsys):
    command = flags.split()
    if command and command[0] in ("niah", "ppl", "summarize", "sample", "speed"):
        command += ["--ckpt", needle_run[0] / "ckpt.pt", "--device", DEVICE.type]
    one_line(capsys, evaluation.main, *command)


# ---------------------------------------------------------------- files

def broken_checkpoints(whole):
    """{name: bytes or what to save} of files that are no checkpoints, made from one that is."""
    state = torch.load(whole, weights_only=True)

    def without(**change):
        return {name: change.get(name, x) for name, x in state.items() if change.get(name, x) is not None}

    return {
        "empty": b"", "text": b"hello", "json": b"{}", "cut": whole.read_bytes()[:9000],
        "cut at the end": whole.read_bytes()[:-1], "a list": [1, 2], "a tensor": torch.zeros(3),
        "no config": without(config={}), "no parts": {}, "config of words": without(config="n_layer"),
        "a foreign setting": without(config=state["config"] | dict(colour=3)),
        "a billion layers": without(config=state["config"] | dict(n_layer=10 ** 9)),
        "wide": without(config=state["config"] | dict(n_embd=2 ** 20)),
        "of another type": without(config=state["config"] | dict(n_layer="2")),
        "a weight missing": without(model=dict([*state["model"].items()][1:])),
        "a weight of another shape": without(model=state["model"] | {"norm.weight": torch.zeros(3)}),
        "no step": {name: x for name, x in state.items() if name != "step"},
        "settings of words": without(settings="all")}


@pytest.mark.parametrize("name", [
    "empty", "text", "json", "cut", "cut at the end", "a list", "a tensor", "no config", "no parts",
    "config of words", "a foreign setting", "a billion layers", "wide", "of another type", "a weight missing",
    "a weight of another shape", "no step", "settings of words"])
def test_broken_checkpoints(name, needle_run, tmp_path, capsys):
    content, path = broken_checkpoints(needle_run[0] / "ckpt.pt")[name], tmp_path / "ckpt.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    shutil.copy(needle_run[0] / "log.csv", tmp_path)
    assert str(path) in one_line(capsys, evaluation.main, "niah", "--ckpt", path, "--device", DEVICE.type)
    assert str(path) in one_line(capsys, train.main, "--resume", "--out", tmp_path, "--device", DEVICE.type)


def test_a_setting_of_another_type_in_a_checkpoint(needle_run, tmp_path, capsys):
    state = torch.load(needle_run[0] / "ckpt.pt", weights_only=True)
    state["settings"]["n_value"] = "six"
    torch.save(state, tmp_path / "ckpt.pt")
    error = one_line(capsys, evaluation.main, "niah", "--ckpt", tmp_path / "ckpt.pt", "--device", DEVICE.type)
    assert "n_value of type int, got 'six'" in error


def test_mistakes_name_flags_that_were_given(needle_run, text_run, tmp_path, capsys):
    state = torch.load(needle_run[0] / "ckpt.pt", weights_only=True)
    torch.save(changed(state, "settings.n_value", 1), tmp_path / "ckpt.pt")
    error = one_line(capsys, evaluation.main, "niah", "--ckpt", tmp_path, "--needle", "multihop")
    assert f"--needle multihop must fit the model of {tmp_path}" in error
    state = torch.load(text_run / "ckpt.pt", weights_only=True)
    torch.save(dict(state, tokenizer="gpt2"), tmp_path / "ckpt.pt")
    error = one_line(capsys, evaluation.main, "ppl", "--ckpt", text_run, tmp_path)
    assert f"--ckpt must have the tokenizer and vocabulary of {tmp_path}" in error


def test_flipped_bits_are_found(tmp_path):
    """Of every kind of file that torch.save writes: one bit anywhere in the tensors."""
    model, rng = tiny(n_embd=16, n_head=1), np.random.default_rng(0)
    memory = fast.Memory(model)
    fast.read(model, random_tokens(1, 300), memory)
    save_checkpoint(tmp_path / "ckpt.pt", model)
    memory.save(tmp_path / "memory")
    for name, load in (("ckpt.pt", lambda path: load_checkpoint(path, DEVICE)),
                       ("memory", lambda path: fast.Memory.load(path, model))):
        whole = (tmp_path / name).read_bytes()
        found = 0
        for _ in range(60):
            data, i = bytearray(whole), int(rng.integers(len(whole)))
            data[i] ^= 1 << int(rng.integers(8))
            (tmp_path / "flipped").write_bytes(data)
            try:
                load(tmp_path / "flipped")
            except ValueError as error:
                assert "damaged" in str(error)
                found += 1
        assert found > 40                               # the rest is padding between the tensors, and dates


def test_flipped_bits_in_a_files_directory_are_found_or_harmless(tmp_path):
    """At its end a file lists what it holds, and where; a bit there may lead to before the file's start."""
    model, path = tiny(n_embd=16, n_head=1), tmp_path / "memory"
    fast.Memory(model).save(path)
    whole, refused = path.read_bytes(), 0
    for i in range(len(whole) - 1200, len(whole), 3):
        data = bytearray(whole)
        data[i] ^= 1 << i % 8
        path.write_bytes(data)
        try:
            fast.Memory.load(path, model)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 100


def test_names_of_a_compiled_model_are_understood(tmp_path):
    model = tiny()
    save_checkpoint(tmp_path / "ckpt.pt", model)
    state = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    state["model"] = {f"_orig_mod.{name}": x for name, x in state["model"].items()}
    torch.save(state, tmp_path / "ckpt.pt")
    loaded, _ = load_checkpoint(tmp_path / "ckpt.pt", DEVICE)
    tokens = random_tokens(1, 50)
    assert torch.equal(loaded(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize("change", [
    dict(length=301), dict(length=-1), dict(batch_size=2), dict(chunks=[]), dict(window=[]),
    dict(unfinished=None), dict(serving=3), dict(format="2"), dict(config=dict(n_ring=1))])
def test_memory_files_whose_parts_do_not_fit(change, tmp_path):
    model = tiny()
    memory = fast.Memory(model)
    fast.read(model, random_tokens(1, 305), memory)
    memory.save(tmp_path / "memory")
    state = torch.load(tmp_path / "memory", weights_only=True)
    torch.save(state | change, tmp_path / "memory")
    said = dict(format="has format '2'", config="must be a memory of this model")
    with pytest.raises(ValueError, match=said.get(*change, "damaged")):
        fast.Memory.load(tmp_path / "memory", model)


def test_a_memory_of_a_model_that_differs_anywhere_is_refused(tmp_path):
    model = tiny()
    memory = fast.Memory(model)
    memory.save(tmp_path / "memory")
    with torch.no_grad():
        model.layers[1].mlp.down.weight[0, 0] += 1
    with pytest.raises(ValueError, match="must be a memory of this model"):
        fast.Memory.load(tmp_path / "memory", model)


META = dict(tokenizer="bytes", vocab_size=256, splits=dict(train=dict(tokens=400), val=dict(tokens=400)))


@pytest.mark.parametrize("meta", [
    "", "{", "[]", "3", "null", "[" * 100_000, json.dumps(META | dict(splits=[])),
    json.dumps(META | dict(splits=dict(train=3))), json.dumps(META | dict(tokenizer="words")),
    json.dumps(META | dict(vocab_size="many")), json.dumps({"tokenizer": "bytes"})])
def test_broken_corpora(meta, tmp_path, capsys):
    for split in ("train", "val"):
        np.zeros(400, np.uint16).tofile(tmp_path / f"{split}.bin")
    (tmp_path / "meta.json").write_text(meta)
    error = one_line(capsys, train.main, *TEXT_FLAGS, "--data", tmp_path, "--out", tmp_path / "run")
    assert str(tmp_path) in error


def test_a_corpus_of_short_documents_is_trained_on_and_measured(tmp_path):
    """Half of a document is scored after the other half."""
    for i in range(300):
        (tmp_path / f"{i}.txt").write_text("twenty words make a short text " * 3)
    corpus, out = tmp_path / "corpus", tmp_path / "run"
    prepare.main(["text", str(tmp_path), "--out", str(corpus), "--tokenizer", "bytes"])
    train.main([*TEXT_FLAGS, "--steps", "2", "--data", str(corpus), "--out", str(out)])
    row, = json.loads((out / "ppl.json").read_text())["rows"]
    assert row["length"] == 64 and row["scored"] == 8 * 23


def test_a_corpus_without_any_words_is_refused_before_the_first_step(tmp_path, capsys):
    for split in ("train", "val"):
        np.zeros(400, np.uint16).tofile(tmp_path / f"{split}.bin")              # separators alone
    (tmp_path / "meta.json").write_text(json.dumps(META))
    error = one_line(capsys, train.main, *TEXT_FLAGS, "--data", tmp_path, "--out", tmp_path / "run")
    assert "no document of four tokens" in error and not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [
    "", "[]", "3", '{"rows": []}', '{"rows": [3]}', '{"rows": {"a": 1}}', '{"rows": [{"length": 3}]}',
    '{"rows": [{"perplexity": 3}]}', '{"rows": [{"length": 1, "perplexity": 3}, {"length": 2}]}', "\0",
    '{"rows": [{"length": 1%s, "perplexity": 3}]}' % ("0" * 400), "[" * 9999,
    '{"rows": [{"length": 0, "perplexity": 3}]}', '{"rows": [{"length": 1, "perplexity": "x"}]}',
    '{"rows": [{"length": 1, "perplexity": 3, "model": [3]}]}'])
def test_reports_that_cannot_be_drawn(content, tmp_path, capsys):
    (tmp_path / "report.json").write_text(content)
    error = one_line(capsys, evaluation.main, "plot", tmp_path / "report.json", "--out", tmp_path / "x.png")
    assert "report.json" in error and not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("content", ["", "step,loss\n1,2\n", "step,seq_len,val_loss\n1,8,\n",
                                     "step,seq_len,val_loss\n1,8,nan\n", "step,seq_len,val_loss\nx,8,1\n"])
def test_logs_that_cannot_be_drawn(content, tmp_path, capsys):
    (tmp_path / "log.csv").write_text(content)
    error = one_line(capsys, evaluation.main, "plot", tmp_path / "log.csv", "--out", tmp_path / "x.png")
    assert "log.csv must be a log.csv of train.py" in error and not (tmp_path / "x.png").exists()


def test_texts_that_are_not_utf8(needle_run, tmp_path, capsys):
    (tmp_path / "latin").write_bytes(b"caf\xe9 au lait")
    error = one_line(capsys, evaluation.main, "sample", "--ckpt", needle_run[0] / "ckpt.pt", "--file",
                     tmp_path / "latin", "--device", DEVICE.type)
    assert "latin must be UTF-8 text" in error


@pytest.mark.parametrize("flags", ["text nowhere --out x", "text", "text . --tokenizer words --out x",
                                   "books", "pg19 --out", ""])
def test_preparation_flags(flags, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one_line(capsys, prepare.main, *flags.split())
    assert not list(tmp_path.iterdir())


def test_a_value_error_of_a_bug_says_where_it_is(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "learning_rate", lambda *_: int("a bug"))
    error = refused(capsys, train.main, *TINY_FLAGS, "--steps", 2, "--out", tmp_path)
    assert "ValueError in" in error and "test_mistakes.py, line" in error


def test_as_many_different_values_as_there_are():
    from tasks.haystack import distinct
    for n, high in ((128, 128), (64, 128), (6, 128), (3, 62 ** 4)):
        x = distinct(np.random.default_rng(0), 50, n, high)
        assert x.shape == (50, n) and x.max() < high and (np.diff(np.sort(x)) > 0).all()


def test_reports_of_equal_names_are_two_curves(tmp_path):
    from tools.plot import curves, run_names
    paths = [tmp_path / run / "out" / "ckpt.pt" for run in ("run1", "run2")]
    assert [*run_names(paths).values()] == ["run1/out", "run2/out"]
    reports = [tmp_path / run / "ppl.json" for run in ("drt", "base")]
    rows = [dict(model="out", length=1, perplexity=math.pi)]
    assert [*curves(dict.fromkeys(reports, rows))] == ["drt: out", "base: out"]


# ---------------------------------------------------------------- what came out of trying to break it

def changed(state, where, value):
    """A checkpoint's state with one part replaced: where is a path of names."""
    *path, last = where.split(".")
    part = state
    for name in path:
        part = part[name]
    part[last] = value
    return state


@pytest.mark.parametrize("where, value", [
    ("optimizer", {}), ("optimizer.param_groups", 3), ("optimizer.state", {}), ("settings", {}),
    ("settings.n_embd", 32), ("settings.lr", "x"), ("settings.data", 3), ("settings.seed", 1.5),
    ("settings.task", 3), ("settings.task", "cook"), ("settings.dtype", "f"), ("length", 0),
    ("length", 10 ** 12), ("step", -1), ("step", 99), ("config.window", 5)])
def test_checkpoints_that_were_edited_do_not_resume(where, value, needle_run, tmp_path, capsys):
    torch.save(changed(torch.load(needle_run[0] / "ckpt.pt", weights_only=True), where, value),
               tmp_path / "ckpt.pt")
    shutil.copy(needle_run[0] / "log.csv", tmp_path)
    before = (tmp_path / "log.csv").read_bytes()
    one_line(capsys, train.main, "--resume", "--out", tmp_path, "--device", DEVICE.type)
    assert (tmp_path / "log.csv").read_bytes() == before


def test_fewer_steps_than_were_taken(needle_run, capsys):
    error = one_line(capsys, train.main, "--resume", "--steps", 5, "--out", needle_run[0])
    assert "--steps must be at least the 20" in error


@pytest.mark.parametrize("damage", ["missing", "cut", "binary"])
def test_a_damaged_log_does_not_stop_a_run(damage, text_run, tmp_path, no_table, capsys):
    shutil.copy(text_run / "ckpt.pt", tmp_path)
    log = (text_run / "log.csv").read_bytes()
    if damage != "missing":
        (tmp_path / "log.csv").write_bytes(log[:len(log) // 2] if damage == "cut" else b"\xff\xfe\n" * 4)
    train.main(["--resume", "--steps", "42", "--out", str(tmp_path), "--device", DEVICE.type])
    assert "of the 40 rows before this step" in capsys.readouterr().out


@pytest.mark.parametrize("group", ["RANK=0 WORLD_SIZE=0", "RANK=x WORLD_SIZE=2", "RANK=2 WORLD_SIZE=2",
                                   "RANK=1", "WORLD_SIZE=2", "RANK=0 WORLD_SIZE=2"])
def test_groups_that_torchrun_did_not_start(group, tmp_path, capsys, monkeypatch):
    for pair in group.split():
        monkeypatch.setenv(*pair.split("="))
    error = one_line(capsys, train.main, *TINY_FLAGS, "--out", tmp_path / "new")
    assert "torchrun" in error and not (tmp_path / "new").exists()


def test_the_current_folder_is_not_moved_aside(tmp_path, capsys, monkeypatch):
    (tmp_path / "log.csv").write_text("mine")
    monkeypatch.chdir(tmp_path)
    for out in (".", tmp_path):
        assert "current folder" in one_line(capsys, train.main, *TINY_FLAGS, "--out", out)
    assert (tmp_path / "log.csv").read_text() == "mine"


def test_a_prompt_typed_in_another_locale():
    def given(prompt):
        return cli.given_text(types.SimpleNamespace(file=None, prompt=prompt))

    assert given("é".encode().decode("ascii", errors="surrogateescape")) == "é"
    with pytest.raises(ValueError, match="--prompt must be UTF-8"):
        given("\udcff")


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-6, 1e300])
def test_temperatures_at_the_edge(temperature):
    logits = torch.tensor([[0.0, 50.0, -1e4], [3.0, 1.0, 2.0]])
    tokens = sample(logits, temperature)
    assert temperature > 1 or tokens.tolist() == [1, 0]
