"""What went wrong without a word on earlier code: a test for each kind, and for its neighbours."""
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
import torch
from tqdm import tqdm

import eval as evaluation
import train
from gca import gca
from helpers import DEVICE, ROOT, TEXT_FLAGS, TINY_FLAGS, command, log_of, refused, tiny, trained
from tasks.text import Corpus, Text, load_corpus, load_tokenizer, text_files
from tools import exits, prepare, report
from tools import run as run_module
from tools.checkpoint import load_checkpoint

CLOSE = dict(atol=1e-4, rtol=0)
ON = "--device", DEVICE.type


# ---------------------------------------------------------------- means of unequal parts

@pytest.mark.parametrize("batch_size", [16, 14, 5, 1])
def test_a_validation_loss_does_not_depend_on_the_batch_size(batch_size):
    text = np.random.default_rng(0).integers(1, 256, 3000).astype(np.uint8)
    settings = dict(seq_len=100, batch_tokens=10 ** 6, micro_batch=0)
    model, corpus = tiny(), Corpus("random", text, text, 256)
    losses = [Text(settings | dict(batch_size=n), corpus).score(model, 0, 0, 0)["val_loss"]
              for n in (16, batch_size)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.fixture
def uneven(tmp_path):
    """A corpus of pairs whose summaries have 1 to 40 bytes."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    for split in ("train", "val"):
        sizes = [40 if i % 3 == 0 else 1 for i in range(24)]
        rows = [dict(document=f"{split} {i} " * 9, summary="s" * size) for i, size in enumerate(sizes)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare.main(["summaries", str(folder), "--out", str(tmp_path / "uneven"), "--tokenizer", "bytes"])
    return ["--task", "summaries", "--data", tmp_path / "uneven", "--n_summary", 40, "--seq_len", 160,
            "--steps", 4, "--gumbel", "false", "--validate_every", 99, "--dtype", "float32"]


def test_a_label_weighs_the_same_in_whatever_micro_batch(uneven, tmp_path, no_table):
    rows = [trained(tmp_path / str(n), *TINY_FLAGS, *uneven, "--micro_batch", n) for n in (0, 2, 1)]
    for name in ("loss", "grad_norm"):
        values = [[float(row[name]) for row in table] for table in rows]
        assert all(other == pytest.approx(values[0], rel=1e-4) for other in values[1:])


def test_a_label_weighs_the_same_in_whatever_process(monkeypatch):
    labels = np.full((4, 30), -100)
    for row, n in enumerate((30, 1, 1, 8)):
        labels[row, :n] = 5
    ranks, weights = object.__new__(run_module.Ranks), []
    for size in (1, 2, 4):
        ranks.size, ranks.device = size, torch.device("cpu")
        shares = []
        for ranks.rank in range(size):
            shares += list(ranks.share([labels, labels])[1] / size)
        weights.append(shares)
    assert weights[0] == weights[1] == weights[2] == pytest.approx([0.75, 0.025, 0.025, 0.2])


# ---------------------------------------------------------------- a corpus made again

def corpus_of(folder, words):
    """Four documents of these words, prepared as folder."""
    texts = folder.parent / f"{folder.name}-texts"
    texts.mkdir(exist_ok=True)
    for i in range(4):
        (texts / f"{i}.txt").write_text(f"{words} {i} " * 60)
    prepare.main(["text", str(texts), "--out", str(folder), "--tokenizer", "bytes"])
    return folder


def test_other_contents_under_the_same_name_are_refused_and_another_path_is_not(tmp_path, no_table, capsys):
    data, out = corpus_of(tmp_path / "data", "one text"), tmp_path / "run"
    trained(out, *TEXT_FLAGS, "--steps", 2, "--data", data)
    shutil.copytree(data, tmp_path / "elsewhere")
    assert len(trained(out, "--resume", "--steps", 3, "--data", tmp_path / "elsewhere", *ON)) == 3
    shutil.rmtree(tmp_path / "elsewhere")
    assert "--data must be" in refused(capsys, train.main, "--resume", "--steps", 4, "--out", out, *ON)
    corpus_of(tmp_path / "elsewhere", "another text")
    line = "--resume", "--steps", 4, "--out", out, *ON
    assert "elsewhere holds other text than when the run in" in refused(capsys, train.main, *line)
    ppl = "ppl", "--ckpt", out / "ckpt.pt", "--lengths", 64, "--places", 2, *ON
    assert "elsewhere holds other text than when" in refused(capsys, evaluation.main, *ppl)
    evaluation.main([*map(str, ppl), "--data", str(tmp_path / "elsewhere")])
    assert len(trained(out, *line, "--data", tmp_path / "elsewhere")) == 4


def test_inspect_takes_another_haystack(needle_run, tmp_path, capsys):
    data = corpus_of(tmp_path / "data", "hay and more hay")
    line = "inspect", "--ckpt", needle_run[0] / "ckpt.pt", "--needles", 300, "--data", data, *ON
    evaluation.main([*map(str, line)])
    assert "hay" in capsys.readouterr().out


# ---------------------------------------------------------------- float16

def test_a_run_in_float16_resumes_with_its_loss_scale(tmp_path, no_table, monkeypatch):
    monkeypatch.setattr(torch.amp.GradScaler.__init__, "__defaults__", ("cuda", 2.0 ** 21, 2.0, 0.5, 3, True))
    flags = *TEXT_FLAGS, "--dtype", "float16", "--checkpoint_every", 4, "--validate_every", 99
    whole = trained(tmp_path / "whole", *flags, "--steps", 40)
    assert 0 < sum(float(row["skipped"]) for row in whole) < 40
    rates, calls = train.learning_rate, []

    def crash(step, config):
        calls.append(step)
        if len(calls) > 30:
            raise RuntimeError("a crash")
        return rates(step, config)

    monkeypatch.setattr(train, "learning_rate", crash)
    with pytest.raises(RuntimeError, match="a crash"):
        trained(tmp_path / "cut", *flags, "--steps", 40)
    monkeypatch.setattr(train, "learning_rate", rates)
    resumed = trained(tmp_path / "cut", "--resume", *ON)
    assert resumed == whole or DEVICE.type == "cuda"


# ---------------------------------------------------------------- indices out of range

@pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU indices are not checked")
@pytest.mark.parametrize("wrong", [3, -2, 100])
def test_a_compiled_gca_refuses_an_index_out_of_range(wrong):
    q, (k, v) = torch.randn(2, 1, 4, 1, 16), torch.randn(2, 2, 3, 4, 1, 16)
    weights, right = torch.rand(2, 1, 2), torch.tensor([[[0, -1]], [[1, 2]]])
    compiled = torch.compile(gca, backend="eager")
    torch.testing.assert_close(compiled(q, k, v, weights, right), gca(q, k, v, weights, right))
    with pytest.raises(IndexError):
        compiled(q, k, v, weights, right.masked_fill(right == 1, wrong))


# ---------------------------------------------------------------- texts that are not meant

def test_what_is_a_text(tmp_path, capsys):
    texts = tmp_path / "texts"
    for folder in (".ipynb_checkpoints", ".git/deep", "notes.txt", "inside"):
        (texts / folder).mkdir(parents=True)
    meant = ["a.txt", "b.TXT", "inside/c.txt", os.fsdecode(b"caf\xe9.txt")]
    for name in [*meant, ".ipynb_checkpoints/a-checkpoint.txt", ".git/deep/d.txt", "._a.txt", "e.text"]:
        (texts / name).write_text(f"the text of {name!r} ")
    (texts / ".#a.txt").symlink_to("nobody@nowhere")
    (texts / "gone.txt").symlink_to("nowhere")
    os.mkfifo(texts / "pipe.txt")
    found, others = text_files(texts, ".txt")
    assert sorted(str(path.relative_to(texts)) for path in found) == sorted(meant) and len(others) == 7
    prepare.main(["text", str(texts), "--out", str(tmp_path / "data"), "--tokenizer", "bytes"])
    assert "7 left out, because they are hidden or no regular files" in capsys.readouterr().out
    corpus = load_corpus(str(tmp_path / "data"))
    assert sum(bytes(split.astype(np.uint8)).count(0) for split in (corpus.train, corpus.val)) == 4


# ---------------------------------------------------------------- lost work

@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGTERM", "SIGINT"])
def test_whatever_signal_asks_a_run_to_end_saves_first(name, tmp_path, no_table, monkeypatch, capsys):
    def score(*_):
        os.kill(os.getpid(), getattr(signal, name))
        return dict(val_loss=1.0)

    monkeypatch.setattr(Text, "score", score)
    if name == "SIGHUP":
        signal.signal(signal.SIGHUP, signal.SIG_DFL)        # also where nohup runs the tests
    with pytest.raises(SystemExit) as stopped:
        trained(tmp_path, *TEXT_FLAGS, "--validate_every", 3, "--steps", 40)
    assert stopped.value.code == 128 + getattr(signal, name)
    assert f"Stopped by {name} after step" in capsys.readouterr().out
    step = load_checkpoint(tmp_path / "ckpt.pt", DEVICE)[1]["step"]
    assert step in (3, 4) and len(log_of(tmp_path)) == step


def test_nohup_stays_nohup(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with exits.signals(exits.raise_signal):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


class Full(io.StringIO):
    """A stream on a full disk, on a terminal or not."""

    def __init__(self, is_terminal):
        super().__init__()
        self.isatty = lambda: is_terminal

    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress_that_cannot_be_written_stops_no_run(is_terminal, tmp_path, no_table, monkeypatch):
    monkeypatch.setattr(run_module, "LINE_EVERY", 0)
    monkeypatch.setattr(sys, "stderr", Full(is_terminal))
    assert len(trained(tmp_path, *TEXT_FLAGS, "--steps", 40)) == 40
    assert load_checkpoint(tmp_path / "ckpt.pt", DEVICE)[1]["step"] == 40
    thread = threading.Thread(target=lambda: tqdm(disable=True), daemon=True)       # takes tqdm's lock
    thread.start()
    thread.join(timeout=60)
    assert not thread.is_alive()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("where", ["> /dev/full", "2> /dev/full"])
def test_rows_that_cannot_be_shown_are_saved(where, text_run, tmp_path):
    line = (f"{sys.executable} eval.py ppl --ckpt {text_run}/ckpt.pt --lengths 64,128 --places 2 "
            f"--device cpu --json {tmp_path}/ppl.json {where}")
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert len(json.loads((tmp_path / "ppl.json").read_text())["rows"]) == 2
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_stdout_is_one_error_after_the_work(unbuffered, needle_run, tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.txt").write_text("some text")
    ckpt = needle_run[0] / "ckpt.pt"
    lines = [f"eval.py niah --ckpt {ckpt} --lengths 128 --questions 1 --device cpu",
             f"eval.py inspect --ckpt {ckpt} --prompt 'a text' --html {tmp_path}/page.html --device cpu",
             f"-m tools.prepare text {tmp_path} --out {tmp_path}/corpus --tokenizer bytes"]
    for line in lines:
        done = subprocess.run(["bash", "-c", f"{sys.executable} {line} > /dev/full"], cwd=ROOT, text=True,
                              env=dict(os.environ, PYTHONUNBUFFERED=unbuffered), stderr=subprocess.PIPE)
        assert done.returncode == 2 and "Exception ignored" not in done.stderr, line
        assert done.stderr.endswith("error: No space left on device\n"), line
    assert (tmp_path / "page.html").exists() and (tmp_path / "corpus" / "val.bin").exists()


def test_a_link_to_itself_and_an_empty_name(tmp_path, capsys):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for out in (tmp_path / "loop", ""):
        assert "--out" in refused(capsys, train.main, *TEXT_FLAGS, "--out", out)


def test_a_log_that_was_cut_in_a_row_is_said_and_mended(text_run, tmp_path, no_table, capsys):
    shutil.copy(text_run / "ckpt.pt", tmp_path)
    lines = (text_run / "log.csv").read_text().splitlines(keepends=True)
    (tmp_path / "log.csv").write_text("".join(lines[:30]) + lines[30][:9])
    rows = trained(tmp_path, "--resume", "--steps", 42, *ON)
    assert "has 29 of the 40 rows" in capsys.readouterr().out
    assert [row["step"] for row in rows] == [*map(str, range(1, 30)), "41", "42"]
    assert all(None not in row and None not in row.values() for row in rows)


def test_a_link_in_the_place_of_the_folder_is_followed(tmp_path, no_table):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "runs")
    for steps in (2, 3):
        trained(tmp_path / "out", *TEXT_FLAGS, "--steps", steps)
    assert (tmp_path / "out").is_symlink() and len(log_of(tmp_path / "disk" / "runs")) == 3
    assert len(log_of(tmp_path / "disk" / "runs.1")) == 2


def test_a_folder_that_cannot_be_moved_is_refused_in_words(tmp_path, no_table, monkeypatch, capsys):
    trained(tmp_path / "out", *TEXT_FLAGS, "--steps", 2)

    def busy(*_):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(type(tmp_path), "rename", busy)
    error = refused(capsys, train.main, *TEXT_FLAGS, "--out", tmp_path / "out")
    assert "--out" in error and "cannot be moved aside (Device or resource busy)" in error
    assert len(log_of(tmp_path / "out")) == 2


def test_a_run_inside_the_folder_is_not_moved_while_it_is_written(tmp_path, no_table, capsys):
    trained(tmp_path / "out", *TEXT_FLAGS, "--steps", 2)
    (tmp_path / "out" / "inner").mkdir()
    lock = run_module.lock(tmp_path / "out" / "inner")
    assert "another run is writing to" in refused(capsys, train.main, *TEXT_FLAGS, "--out", tmp_path / "out")
    lock.close()


def test_a_file_system_without_locks(tmp_path, no_table, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_module.fcntl, "flock", none)
    assert len(trained(tmp_path, *TEXT_FLAGS, "--steps", 2)) == 2


# ---------------------------------------------------------------- surroundings

def test_training_in_a_thread_of_a_notebook(tmp_path, no_table, monkeypatch):
    """Streams that cannot be reconfigured, and no signals."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    thread = threading.Thread(target=trained, args=(tmp_path, *TEXT_FLAGS, "--steps", 3), daemon=True)
    thread.start()
    thread.join(timeout=120)
    assert not thread.is_alive() and len(log_of(tmp_path)) == 3


def test_gca_py_alone_works_in_a_project_with_names_like_ours(tmp_path):
    """Copied: beside a model.py, a tools.py and a package fast of the project's own."""
    shutil.copy(ROOT / "gca.py", tmp_path)
    (tmp_path / "fast").mkdir()
    for name in ("model.py", "tools.py", "fast/__init__.py"):
        (tmp_path / name).write_text("raise ImportError('not this one')\n")
    (tmp_path / "mine.py").write_text("""
import torch
from gca import gca
q, k = torch.randn(1, 2, 4, 2, 16), torch.randn(1, 3, 4, 2, 16)
print(gca(q, k, k, torch.rand(1, 2, 1), torch.tensor([[[0], [2]]])).shape)
""")
    done = subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, capture_output=True, text=True)
    assert "[1, 2, 4, 2, 16]" in done.stdout, done.stderr


@pytest.mark.parametrize("safe_path", ["", "1"])
@pytest.mark.parametrize("program", ["train.py", "eval.py", "tools/prepare.py"])
def test_programs_start_from_anywhere_and_with_a_safe_path(program, safe_path, tmp_path):
    env = dict(os.environ, PYTHONSAFEPATH=safe_path)
    line = [sys.executable, str(ROOT / program), "--help"]
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr


@pytest.mark.parametrize("run", [" " * 10 ** 6, "\n" * 10 ** 6, " \t" * 400_000])
def test_a_million_spaces_are_tokens(run):
    try:
        gpt2 = load_tokenizer("gpt2")
    except ValueError:
        pytest.skip("GPT-2's tokenizer is not here")
    for text in (f"a{run}b", f"{run}b", run):
        assert gpt2.decode_bytes([*gpt2.encode(text)]).decode() == text
    short = "def f():\n\treturn   1 \n\n" * 99
    import tiktoken
    assert gpt2.encode(short) == tiktoken.get_encoding("gpt2").encode_ordinary(short)


@pytest.mark.parametrize("name", ["pg19", "arxiv-math", "xsum"])
@pytest.mark.parametrize("error", [ConnectionError("[Errno None] None\nand 85 lines"), OSError(), KeyError()])
def test_data_sets_without_a_network_end_in_one_line(name, error, tmp_path, monkeypatch, capsys):
    def load_dataset(**_):
        raise error

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    said = refused(capsys, prepare.main, name, "--out", tmp_path / "new", "--tokenizer", "bytes")
    assert f"{name}: the data set could not be read from the Hugging Face hub" in said
    assert said.count("\n") == 1 and not (tmp_path / "new").exists()


def test_an_unknown_tokenizer_is_not_called_damaged(tmp_path, capsys):
    data = corpus_of(tmp_path / "data", "words")
    meta = json.loads((data / "meta.json").read_text())
    (data / "meta.json").write_text(json.dumps(meta | dict(tokenizer="words")))
    error = refused(capsys, train.main, *TEXT_FLAGS, "--data", data, "--out", tmp_path / "run")
    assert "the tokenizer must be one of bytes, gpt2, got words" in error and "damaged" not in error


def test_a_library_file_that_cannot_be_read_is_left_out(tmp_path, monkeypatch):
    from tasks import text
    for i in range(40):
        (tmp_path / f"module{i}.py").write_bytes(b"x = 1\n" if i else b"\xff\xfe\0 not text")
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "gone.py").symlink_to("nowhere")
    monkeypatch.setattr(text.sysconfig, "get_path", lambda _: str(tmp_path))
    assert len(text.stdlib_corpus().train) > 100


def test_measuring_does_not_write_into_the_checkout(tmp_path, monkeypatch):
    """git refreshes its index unless it is told not to, and leaves a lock there if it is killed meanwhile."""
    monkeypatch.setattr(report, "__file__", str(tmp_path / "cli.py"))
    (tmp_path / "cli.py").write_text("one")
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)                                    # a hook's, of another checkout
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    git = "git", "-c", "user.name=n", "-c", "user.email=e", "-C", tmp_path
    for line in (["init", "-q"], ["add", "cli.py"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *line], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout[:12]
    os.utime(tmp_path / "cli.py", (0, 0))                           # as new to the index, but not changed
    index = (tmp_path / ".git" / "index").read_bytes()
    assert report.commit() == head and (tmp_path / ".git" / "index").read_bytes() == index
    (tmp_path / "cli.py").write_text("two")
    assert report.commit() == f"{head}+"


@pytest.mark.parametrize("n_value", [1, 2])
def test_the_same_questions_whatever_is_read_at_once(n_value, monkeypatch):
    """A table's contexts do not depend on how many of them a machine reads at a time."""
    from tasks.needles import NeedleConfig, Needles
    from tools.reader import Reader
    settings = dict(vars(NeedleConfig()), chunk_size=16, seed=0, start_len=64, seq_len=128, n_value=n_value)
    read, results = Reader(DEVICE), []
    for at_once in (1, 4, 100):
        monkeypatch.setattr(Reader, "contexts_at_once", lambda *_, n=at_once: n)
        hits = Needles(settings, load_corpus("stdlib")).answers(tiny(), read, 200, 3, 24, 0)[0]
        results.append(hits)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_command_that_does_not_need_rouge_score():
    source = "import sys; sys.modules['rouge_score'] = None; import eval; eval.main(['niah', '--help'])"
    assert "usage" in command("-c", source).stdout


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_stderr_changes_no_exit_status(needle_run):
    """Python would flush it once more as it exits, and end with 120."""
    line = "eval.py", "niah", "--ckpt", needle_run[0] / "ckpt.pt", "--lengths", 64, "--questions", 3
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    for more, status in ([], 0), (["--bad"], 2):
        with open("/dev/full", "w") as full:
            done = subprocess.run([sys.executable, *map(str, [*line, *more])], cwd=ROOT, env=buffered,
                                  stdout=subprocess.DEVNULL, stderr=full)
        assert done.returncode == status
