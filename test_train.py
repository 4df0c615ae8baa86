"""Data, training and evaluation, by their functions and command lines: what each promises and refuses."""
import csv
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"    # as test_gca.py needs it, before either imports triton

import data  # noqa: I001
import eval as evaluation
import model as model_module
import train as train_module
from data import NeedleTask, decode_bytes, encode_bytes, load_corpus, needle_batch, window_batch
from model import DRT, DRTConfig, load_checkpoint, save_checkpoint

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HERE = Path(__file__).parent


# ---------------------------------------------------------------- data

def test_byte_tokenizer():
    assert decode_bytes(encode_bytes("naïve")) == "naïve" and len(encode_bytes("naïve")) == 6


def test_stdlib_splits_share_no_file():
    corpus = load_corpus("stdlib")
    assert len(corpus.train) > 4 * len(corpus.val) > 4e6
    text, train = corpus.val.tobytes(), corpus.train.tobytes()
    samples = [text[i:i + 200] for i in range(0, len(text), len(text) // 50)]
    assert sum(sample in train for sample in samples) < len(samples) / 4       # library files copy each other


@pytest.mark.parametrize("straddle", [False, True])
@pytest.mark.parametrize("length, chunk_size, n_needle", [(128, 16, 3), (131, 20, 3), (1000, 32, 9)])
def test_needles_and_questions_are_where_they_should_be(straddle, length, chunk_size, n_needle):
    text = np.full(5000, ord("."), np.uint8)
    task, S = NeedleTask(chunk_size, n_needle, 6, straddle), chunk_size - 1
    tokens, labels, is_answer = needle_batch(text, task.fit(length), np.random.default_rng(0), 20, length)
    assert tokens.shape == labels.shape == is_answer.shape == (20, length)
    assert (is_answer.sum(1) == n_needle * 6).all() and (labels[:, :-1] == tokens[:, 1:]).all()
    for row, label, answer in zip(tokens, labels, is_answer, strict=True):
        context, wanted = row.astype(np.uint8).tobytes(), label[answer].astype(np.uint8).tobytes()
        firsts = np.flatnonzero(answer)[::6]                                       # positions of the colons
        assert (firsts % S == 0).all() and (np.diff(firsts) == S).all()
        for i, first in enumerate(firsts):
            name, value = context[first - 4:first], wanted[6 * i:6 * i + 6]
            assert context[first - 6:first] == b"|?" + name and len(set(value)) == 6 and min(value) >= 128
            place = context.index(b"|" + name + b":" + value + b"|")       # exactly one, before all questions
            assert place + task.needle_length <= (firsts[0] // S - 1) * S and context.count(b"|" + name) == 1
            assert straddle or place // S == (place + task.needle_length - 1) // S


def test_batches_are_a_function_of_their_stream():
    text, task = load_corpus("stdlib").val, NeedleTask(16, 3, 6)
    draw = [needle_batch(text, task, np.random.default_rng(stream), 4, 128)[0]
            for stream in ((1, 0, 5), (1, 0, 5), (3, 0, 5))]
    assert (draw[0] == draw[1]).all() and (draw[0] != draw[2]).any()


def documents(folder, **texts):
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def test_a_folder_of_text_becomes_a_corpus(tmp_path):
    texts = {f"book{i}": f"Book {i}, naïve. " * 200 for i in range(9)}
    folder = documents(tmp_path / "books", **texts, latin=b"caf\xe9", binary=b"a\0b")
    out = tmp_path / "corpus"
    line = "data.py", "text", folder, "--out", out, "--tokenizer", "bytes"
    command(*line)
    corpus, meta = load_corpus(out), json.loads((out / "meta.json").read_text())
    assert corpus.vocab_size == 256 and corpus.tokenizer == "bytes"
    found = [decode_bytes(np.array(tokens, np.uint8)) for tokens in (corpus.train, corpus.val)]
    assert sorted((found[0] + found[1]).split("\0")) == sorted(["", *texts.values()])
    assert sum(split["skipped"] for split in meta["splits"].values()) == 2 and len(found[1]) < len(found[0])
    written = (out / "train.bin").stat().st_mtime_ns
    command(*line)                                                                 # nothing to do
    assert (out / "train.bin").stat().st_mtime_ns == written
    assert json.loads((out / "meta.json").read_text()) == meta
    command(*line, "--errors", "replace")
    assert json.loads((out / "meta.json").read_text())["splits"]["train"]["skipped"] == 1
    text, task = load_corpus(out).train, NeedleTask(16, 3, 6)
    tokens, _, _ = needle_batch(text, task, np.random.default_rng(0), 4, 128)
    assert tokens.shape == (4, 128) and tokens.max() < 256
    (out / "val.bin").write_bytes(b"xx")
    with pytest.raises(ValueError, match="val.bin must hold the"):
        load_corpus(out)


def test_own_splits_are_kept(tmp_path):
    folder = tmp_path / "books"
    for split in ("train", "val", "test"):
        documents(folder / split, one=f"the {split} text")
    command("data.py", "text", folder, "--out", tmp_path / "out", "--tokenizer", "bytes")
    for split in ("train", "val", "test"):
        written = (tmp_path / "out" / f"{split}.bin").read_bytes()
        assert written.decode("utf-16-le") == f"the {split} text\0"


def test_gpt2_tokens(tmp_path):
    folder = documents(tmp_path / "books", a="Hello world", b="Hello again")
    done = subprocess.run([sys.executable, "data.py", "text", folder, "--out", tmp_path / "out"], cwd=HERE,
                          capture_output=True, text=True, timeout=300)
    if "set TIKTOKEN_CACHE_DIR" in done.stderr:
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()
        pytest.skip("the GPT-2 tokenizer can be neither downloaded nor found: set TIKTOKEN_CACHE_DIR")
    corpus = load_corpus(tmp_path / "out")
    assert corpus.vocab_size == 50257 and corpus.tokenizer == "gpt2"
    assert sorted([corpus.train.tolist(), corpus.val.tolist()]) == [[15496, 757, 50256], [15496, 995, 50256]]
    error = command("train.py", "--data", tmp_path / "out", "--out", tmp_path / "run", status=2).stderr
    assert "must be prepared with --tokenizer bytes" in error and not (tmp_path / "run").exists()


@pytest.mark.parametrize("texts, message", [
    (dict(), "must hold at least two .txt files"), (dict(one="x"), "got 1"),
    (dict(one=b"\xff", two=b"\xfe"), "must hold UTF-8 text")])
def test_preparation_mistakes_get_one_line(texts, message, tmp_path):
    (tmp_path / "books").mkdir()
    folder = documents(tmp_path / "books", **texts)
    line = "data.py", "text", folder, "--out", tmp_path / "out", "--tokenizer", "bytes"
    error = command(*line, status=2).stderr
    assert message in error and error.splitlines()[-1].startswith("error: ")
    assert not list(tmp_path.glob("out/*"))


def test_data_sets_are_read_row_by_row(tmp_path, monkeypatch):
    """The paper's two, by a stand-in for the package that downloads them: splits, and arXiv's rows alone."""
    asked = []

    def load_dataset(path, split, streaming, data_files=None):
        asked.append((path, split, streaming))
        return [dict(text=f"{split} {i}", meta=json.dumps(dict(config="arxiv" if i else "books")))
                for i in range(3)]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    data.prepare_dataset("pg19", tmp_path / "pg19", "bytes")
    data.prepare_dataset("arxiv-math", tmp_path / "math", "bytes")
    assert asked[:3] == [("emozilla/pg19", split, True) for split in ("train", "validation", "test")]
    corpora = [load_corpus(tmp_path / name) for name in ("pg19", "math")]
    assert decode_bytes(corpora[0].val.astype(np.uint8)) == "validation 0\0validation 1\0validation 2\0"
    assert decode_bytes(corpora[1].test.astype(np.uint8)) == "test 1\0test 2\0"
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        data.prepare_dataset("pg19", tmp_path / "again", "bytes")


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


# ---------------------------------------------------------------- learning

def test_the_loss_without_all_logits(monkeypatch):
    """Rows in several blocks, a vocabulary that is padded, labels that are missing: loss and gradients."""
    monkeypatch.setattr(model_module, "LOSS_ROWS", 70)
    torch.manual_seed(0)
    model = DRT(DRTConfig(vocab_size=301)).to(DEVICE).eval()
    tokens, targets = torch.randint(301, (2, 2, 100), device=DEVICE)
    targets[:, ::3] = -100
    losses = model(tokens, targets)[1], model.loss(tokens, targets)
    gradients = [torch.autograd.grad(2 * loss, list(model.parameters())) for loss in losses]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(model.loss(tokens, targets), losses[0].detach())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(bad, monkeypatch):
    config = train_module.TrainConfig(task="lm")
    model = DRT(DRTConfig()).to(DEVICE)
    objective, optimizer = train_module.Objective(model, config), train_module.make_optimizer(model, config)
    batch, ranks = list(torch.randint(256, (2, 4, 60), device=DEVICE)), train_module.Ranks(DEVICE)
    before = [p.clone() for p in model.parameters()]
    original, factor = model.loss, [bad]
    monkeypatch.setattr(model, "loss", lambda *x: original(*x) * factor[0])
    assert train_module.train_step(objective, optimizer, batch, ranks)[-1] == 1
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    factor[0] = 1
    assert train_module.train_step(objective, optimizer, batch, ranks)[-1] == 0
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_micro_batches_add_up_to_the_batch():
    gradients = []
    for micro_batch in (0, 1):
        torch.manual_seed(0)
        config = train_module.TrainConfig(task="lm", micro_batch=micro_batch)
        model = DRT(DRTConfig(gumbel=False)).to(DEVICE)
        optimizer, ranks = train_module.make_optimizer(model, config), train_module.Ranks(DEVICE)
        batch = list(torch.randint(256, (2, 4, 60), device=DEVICE))
        metrics = train_module.train_step(train_module.Objective(model, config), optimizer, batch, ranks)
        gradients.append((metrics[0], *(p.grad for p in model.parameters())))
    close = dict(atol=1e-6, rtol=1e-4) if DEVICE.type == "cpu" else dict(atol=1e-2, rtol=1e-2)   # bfloat16
    torch.testing.assert_close(*gradients, **close)



def test_a_tiny_model_learns_to_retrieve():
    """From chance (1 in 128) to above 90% of answer tokens; without retrieval the answers cannot be known."""
    config = train_module.TrainConfig(steps=220)
    corpus, task = load_corpus("stdlib"), NeedleTask(16, 1, 6)
    torch.manual_seed(0)
    model = DRT(DRTConfig(n_encoder=1)).to(DEVICE).train()
    optimizer, objective = train_module.make_optimizer(model, config), train_module.Objective(model, config)
    unseen = train_module.draw_batch(corpus.val, task, (2, 0), 64, 64, DEVICE)
    assert train_module.validate(model, unseen).item() < 0.05
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = train_module.learning_rate(step, config)
        batch = train_module.draw_batch(corpus.train, task, (1, 0, step), 64, 64, DEVICE)
        train_module.train_step(objective, optimizer, batch, train_module.Ranks(DEVICE))
    assert train_module.validate(model, unseen).item() > 0.9


# ---------------------------------------------------------------- command lines

SMALL = f"""--n_embd 16 --n_head 1 --top_k 2 --steps 20 --batch_size 4 --n_value 1 --warmup 2
            --device {DEVICE.type}""".split()


def command(*arguments, status=0):
    line = [sys.executable, *map(str, arguments)]
    done = subprocess.run(line, cwd=HERE, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stderr
    return done


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """The folder of a 20-step training run."""
    out = tmp_path_factory.mktemp("run")
    done = command("train.py", "--preset", "cpu", "--out", out, *SMALL)
    assert "131,072" in done.stdout                                           # 1024 times the training length
    return out


@pytest.mark.parametrize("program", ["train.py", "eval.py", "data.py"])
def test_help(program):
    assert "usage" in command(program, "--help").stdout


def test_training_writes_checkpoint_and_log(run):
    rows = list(csv.DictReader(open(run / "log.csv")))
    assert [int(row["step"]) for row in rows] == list(range(1, 21))
    for row in rows:                            # learning itself has a test of its own
        loss, answer, lm = (float(row[name]) for name in ("loss", "answer_loss", "lm_loss"))
        assert loss == pytest.approx(answer + 0.3 * lm) and 0 < lm < 20 and 0 < answer < 20
        assert row["seq_len"] == "64" and row["batch_size"] == "4"
    assert 0 <= float(rows[-1]["val_accuracy"]) <= 1
    assert sorted(path.name for path in run.iterdir()) == ["ckpt.pt", "log.csv", "niah.json"]
    model, saved = load_checkpoint(run / "ckpt.pt", DEVICE)
    assert model.config.n_embd == 16 and saved["step"] == 20


def test_eval_niah(run):
    out = run.parent / "niah.json"
    done = command("eval.py", "niah", "--ckpt", run / "ckpt.pt", "--lengths", "128,1000", "--questions", 8,
                   "--json", out, "--device", DEVICE.type)
    rows = json.loads(out.read_text())["rows"]
    assert "1,000" in done.stdout and [row["length"] for row in rows] == [128, 1000]
    assert {"length", "questions", "token_accuracy", "exact_match", "seconds", "tokens_per_second",
            "peak_gpu_gib"} <= set(rows[0]) and rows[0]["questions"] == 8


def test_eval_speed(tmp_path):
    out = tmp_path / "speed.json"
    done = command("eval.py", "speed", "--lengths", "50,1000", "--tokens", 20, "--compare", "--json", out,
                   "--n_embd", 32, "--offload", "--device", DEVICE.type)
    rows = json.loads(out.read_text())["rows"]
    assert "random weights" in done.stdout and [row["length"] for row in rows] == [50] * 3 + [1000] * 3
    assert len({row["model"] for row in rows}) == 3
    assert all(row["read_seconds"] > 0 and row["ms_per_new_token"] > 0 for row in rows)
    error = command("eval.py", "speed", "--n_embd", 65, "--n_head", 4, status=2).stderr
    assert error == "error: n_embd must be a multiple of n_head, got 65 and 4\n"


def test_full_attention_reads_and_decodes_alike():
    model = evaluation.FullAttention(DRTConfig(n_group=0, n_layer=3)).to(DEVICE)
    tokens, cache = torch.randint(256, (1, 40), device=DEVICE), model.cache(1, 40)
    with torch.no_grad():
        whole = model.read(tokens, model.cache(1, 40), 0)
        model.read(tokens[:, :39], cache, 0)
        torch.testing.assert_close(model.read(tokens[:, 39:], cache, 39), whole, atol=1e-4, rtol=0)


def test_eval_sample(run, tmp_path):
    (tmp_path / "text").write_text("import os\n" * 50)
    line = ["eval.py", "sample", "--ckpt", run / "ckpt.pt", "--tokens", 30, "--device", DEVICE.type]
    first, again = (command(*line, "--file", tmp_path / "text", "--seed", 3).stdout for _ in range(2))
    assert first == again and len(first) > 20
    error = command(*line, "--prompt", "", status=2).stderr
    assert error == "error: --prompt must hold some text, got none\n"
    assert "temperature must be at least 0" in command(*line, "--prompt", "x", "--temperature", -1,
                                                       status=2).stderr


# ---------------------------------------------------------------- runs that are stopped, or shared

LM = f"""--task lm --n_embd 16 --n_head 1 --top_k 2 --seq_len 100 --batch_size 4 --warmup 2 --steps 40
         --checkpoint_every 7 --validate_every 20 --device {DEVICE.type}""".split()


def log_of(folder):
    """Its rows, less what depends on the machine's speed."""
    speed = ("tokens_per_second", "mfu", "gpu_gib")
    return [{name: x for name, x in row.items() if name not in speed}
            for row in csv.DictReader(open(folder / "log.csv"))]


@pytest.fixture(scope="session")
def lm_run(tmp_path_factory):
    """The folder of a 40-step language-model run."""
    out = tmp_path_factory.mktemp("lm")
    done = command("train.py", "--preset", "cpu", "--out", out, *LM)
    assert "bits_per_byte" in done.stdout
    return out


def test_the_first_steps_of_a_language_model_have_short_contexts(lm_run):
    assert [row["seq_len"] for row in log_of(lm_run)] == ["64"] * 16 + ["100"] * 24
    for preset, wanted in dict(books=[(1008, 64), (8064, 8)], pg19=[(16380, 32)]).items():
        known = train_module.PRESETS[preset]
        config = train_module.TrainConfig(**{f.name: known.get(f.name, f.default)
                                             for f in dataclasses.fields(train_module.TrainConfig)})
        assert list(train_module.lengths(config)) == wanted


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_a_stopped_run_resumes_as_if_it_had_not_been(how, lm_run, tmp_path):
    """Whenever the signal comes: after a checkpoint at the least, which is the only thing waited for."""
    line = [sys.executable, "train.py", "--preset", "cpu", "--out", tmp_path, *LM]
    process = subprocess.Popen(line, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while not (tmp_path / "ckpt.pt").exists() and process.poll() is None:
        os.sched_yield()
    process.send_signal(signal.Signals[how])
    said = process.communicate(timeout=120)[0]
    if how != "SIGKILL":
        assert process.returncode == 0
        assert f"Stopped by {how} after step" in said or "bits_per_byte" in said       # it was done already
    command("train.py", "--resume", "--out", tmp_path, "--device", DEVICE.type)
    whole, resumed = log_of(lm_run), log_of(tmp_path)
    assert len(resumed) == 40
    if DEVICE.type == "cpu":
        assert whole == resumed
        for name, tensor in load_checkpoint(lm_run / "ckpt.pt", DEVICE)[1]["model"].items():
            assert torch.equal(tensor, load_checkpoint(tmp_path / "ckpt.pt", DEVICE)[1]["model"][name]), name


def test_needle_training_resumes_with_its_context_length(tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "final_table", lambda *_: None)
    monkeypatch.setattr(train_module, "validate", lambda *_: torch.tensor(1.0))         # so the context grows
    flags = ["--preset", "cpu", *SMALL, "--steps", "40", "--validate_every", "15", "--checkpoint_every", "20"]
    train_module.main([*flags, "--out", str(tmp_path / "whole")])
    step, calls = train_module.train_step, []

    def fail_at_step_31(*arguments):
        calls.append(1)
        if len(calls) > 30:
            raise RuntimeError("a crash")
        return step(*arguments)

    monkeypatch.setattr(train_module, "train_step", fail_at_step_31)
    with pytest.raises(RuntimeError):
        train_module.main([*flags, "--out", str(tmp_path / "cut")])
    monkeypatch.setattr(train_module, "train_step", step)
    train_module.main(["--resume", "--out", str(tmp_path / "cut"), "--device", DEVICE.type])
    whole, cut = log_of(tmp_path / "whole"), log_of(tmp_path / "cut")
    assert [row["seq_len"] for row in cut] == ["64"] * 15 + ["128"] * 25
    assert whole == cut or DEVICE.type == "cuda"


def test_two_processes_take_the_steps_of_one(lm_run, tmp_path):
    line = "train.py", "--preset", "cpu", *LM, "--device", "cpu", "--gumbel", "false", "--out"
    command("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *line, tmp_path)
    command(*line, tmp_path / "one")
    for row, other in zip(log_of(tmp_path), log_of(tmp_path / "one"), strict=True):
        for name in ("loss", "grad_norm", "val_loss"):
            if other[name]:
                assert float(row[name]) == pytest.approx(float(other[name]), rel=1e-4), (row["step"], name)


def test_a_damaged_checkpoint_is_said_and_the_one_before_offered(lm_run, tmp_path):
    for name in ("ckpt.pt", "ckpt.prev.pt", "log.csv"):
        (tmp_path / name).write_bytes((lm_run / name).read_bytes())
    (tmp_path / "ckpt.pt").write_bytes((lm_run / "ckpt.pt").read_bytes()[:9000])
    line = "train.py", "--resume", "--out", tmp_path, "--device", DEVICE.type
    error = command(*line, status=2).stderr
    assert error.startswith("error: ") and error.count("\n") == 1
    assert f"mv {tmp_path}/ckpt.prev.pt {tmp_path}/ckpt.pt" in error and "from step 35" in error
    os.replace(tmp_path / "ckpt.prev.pt", tmp_path / "ckpt.pt")
    command(*line)
    assert log_of(tmp_path) == log_of(lm_run) or DEVICE.type == "cuda"


def test_a_run_that_goes_astray_ends_with_a_message(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(DRT, "loss", lambda self, *_: self.embedding.weight.sum() * math.nan)
    with pytest.raises(SystemExit) as stop:
        train_module.main(["--preset", "cpu", "--out", str(tmp_path), *LM])
    assert stop.value.code == 2
    assert "not finite in 10 steps in a row" in capsys.readouterr().err


def test_no_room_for_checkpoints_is_found_before_the_first_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_module.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    with pytest.raises(SystemExit):
        train_module.main(["--preset", "cpu", "--out", str(tmp_path / "new"), *LM])
    assert "GB free for checkpoints" in capsys.readouterr().err and not (tmp_path / "new").exists()


# ---------------------------------------------------------------- perplexity

def test_perplexity_scores_the_same_tokens_after_more_or_less_context():
    starts, sizes = evaluation.documents(np.array([1] * 500 + [0] + [1] * 900 + [0]), 0)
    assert starts.tolist() == [0, 501, 1402] and sizes.tolist() == [500, 900, 0]
    where = evaluation.places(starts, sizes, 300, 9000, np.random.default_rng(0))
    assert set(where) == set(range(801, 501 + 900 - 256 + 1))                  # in the second document alone
    with pytest.raises(ValueError, match="--lengths must be at most 644"):
        evaluation.places(starts, sizes, 645, 1, np.random.default_rng(0))
    model, text = DRT(DRTConfig()).to(DEVICE).eval(), np.random.default_rng(0).integers(256, size=2000)
    with torch.no_grad():
        wanted = sum(F.cross_entropy(model(x[None, :-1])[0][0, -256:], x[-256:], reduction="sum").item()
                     for x in (torch.from_numpy(text[i - 100:i + 256]).to(DEVICE) for i in (400, 700, 1500)))
    loss = evaluation.scored_loss(model, text, np.array([400, 700, 1500]), 100, DEVICE)
    assert loss == pytest.approx(wanted, rel=1e-2 if DEVICE.type == "cuda" else 1e-5)       # bf16 there


def test_eval_ppl(lm_run, run, tmp_path):
    line = ["eval.py", "ppl", "--ckpt", lm_run / "ckpt.pt", run / "ckpt.pt", "--device", DEVICE.type]
    command(*line, "--lengths", "100,400", "--places", 4, "--json", tmp_path / "ppl.json")
    rows = json.loads((tmp_path / "ppl.json").read_text())["rows"]
    names = [lm_run.name] * 2 + [run.name] * 2
    assert [(row["model"], row["length"]) for row in rows] == list(zip(names, [100, 400] * 2, strict=True))
    for row in rows:                                                    # bytes: one token each
        assert row["scored"] == 1024 and row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert row["bits_per_byte"] == pytest.approx(row["loss"] / math.log(2))
    command(*line, "--lengths", 400, "--places", 4, "--retriever", "last", "--json", tmp_path / "last.json")
    last = json.loads((tmp_path / "last.json").read_text())
    assert last["rows"][0]["loss"] != rows[1]["loss"] and last["settings"][run.name]["retriever"] == "last"
    assert "must be of a run with --task niah" in command("eval.py", "niah", "--ckpt", lm_run / "ckpt.pt",
                                                          status=2).stderr


# ---------------------------------------------------------------- what the user gets wrong

@pytest.mark.parametrize("flags, message", [
    ("--n_embd 65 --n_head 4", "n_embd must be a multiple of n_head, got 65 and 4"),
    ("--top_k 0", "top_k must be at least 1, got 0"),
    ("--chunk_size 1", "chunk_size must be at least 2, got 1"),
    ("--chunk_size 12", "chunk_size must be at least 14 to hold a needle with a value of 6 bytes, got 12"),
    ("--seq_len 30", "seq_len must be at least 37 for a needle and its question in chunks of 16, got 30"),
    ("--data nowhere", "--data must be 'stdlib' or a folder that `python data.py` made, got 'nowhere'"),
    ("--steps x", "argument --steps: invalid int value: 'x'"),
    ("--softmax_one maybe", "argument --softmax_one: must be true or false, got 'maybe'"),
    ("--steps 0", "--steps must be positive, got 0"),
    ("--seed -1", "--seed must not be negative, got -1"),
    ("--colour red", "unrecognized arguments: --colour red"),
    ("--resume", "no checkpoint at"),
    ("--task lm --seq_len 9000000 --batch_tokens 9000000", "--data must hold more than seq_len tokens"),
    ("--batch_size 5 --micro_batch 2", "must be a multiple of 1 processes times --micro_batch 2"),
    ("--micro_batch -1", "--micro_batch must not be negative, got -1"),
] + ([] if torch.cuda.is_available() else [("--device cuda", "--device must be auto, cpu, or cuda on a")]))
def test_training_mistakes_get_one_line(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train_module.main(["--preset", "cpu", "--out", str(tmp_path / "new"), *flags.split()])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "new").exists()


def test_a_file_in_the_place_of_the_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit):
        train_module.main(["--preset", "cpu", "--out", str(tmp_path / "file")])
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "file" in error and (tmp_path / "file").read_text() == "mine"


def test_resume_names_the_flag_that_differs(run):
    line = "train.py", "--resume", "--out", run, "--n_embd", 32, "--device", DEVICE.type
    error = command(*line, status=2).stderr
    assert error == f"error: --resume: the run in {run} has --n_embd 16, got 32\n"


@pytest.mark.parametrize("kind", ["missing", "text", "cut", "foreign"])
def test_bad_checkpoints_get_one_line(kind, run, tmp_path):
    path = tmp_path / "bad.pt"
    if kind == "text":
        path.write_text("hello")
    elif kind == "cut":
        path.write_bytes((run / "ckpt.pt").read_bytes()[:20000])
    elif kind == "foreign":
        torch.save(dict(weights=torch.zeros(3)), path)
    error = command("eval.py", "niah", "--ckpt", path, "--device", "cpu", status=2).stderr
    assert error.startswith("error: ") and str(path) in error and error.count("\n") == 1


@pytest.mark.parametrize("flags", [["--lengths", "20"], ["--lengths", "many"], ["--questions", "0"],
                                   ["--size", "3"], ["--json", "nowhere/x.json"]])
def test_evaluation_mistakes_get_one_line(flags, run):
    line = "eval.py", "niah", "--ckpt", run / "ckpt.pt", "--device", DEVICE.type, *flags
    error = command(*line, status=2).stderr
    assert error.startswith("error: ") and error.count("\n") == 1


def test_checkpoints_are_replaced_whole(tmp_path, monkeypatch):
    model, path = DRT(DRTConfig()).to(DEVICE), tmp_path / "ckpt.pt"
    save_checkpoint(path, model, step=1)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError):
        save_checkpoint(path, model, step=2)
    assert load_checkpoint(path, DEVICE)[1]["step"] == 1
