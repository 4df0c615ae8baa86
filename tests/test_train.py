"""Training, by its functions and command line: learning, stopping, resuming, and what it refuses."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import types

import pytest
import torch

import eval as evaluation
import train as train_module
from helpers import DEVICE, ROOT, TEXT_FLAGS, TINY_FLAGS, command, log_of, refused
from helpers import trained as train
from model import DRT, DRTConfig
from tasks.needles import Needles
from tasks.text import Text
from tools import run as run_module
from tools import settings as settings_module
from tools.checkpoint import load_checkpoint

# ---------------------------------------------------------------- learning

def test_training_writes_checkpoint_log_and_table(needle_run):
    out, printed = needle_run
    assert printed.count("fast/") == 2 and "65,536" in printed               # 1024 times the training length
    rows = log_of(out)
    assert [int(row["step"]) for row in rows] == list(range(1, 21))
    for row in rows:
        loss, answer, lm = (float(row[name]) for name in ("loss", "answer_loss", "lm_loss"))
        assert loss == pytest.approx(answer + 0.3 * lm, rel=1e-5) and 0 < lm < 20 and 0 < answer < 20
        assert row["seq_len"] == "64" and row["batch_size"] == "4"
    assert 0 <= float(rows[-1]["val_exact_match"]) <= 1
    assert {"ckpt.pt", "log.csv", "niah.json"} <= {path.name for path in out.iterdir()}
    settings = json.loads((out / "niah.json").read_text())["settings"]
    assert settings["n_embd"] == 16 and (settings["data"], settings["split"]) == ("stdlib", "val")
    model, saved = load_checkpoint(out / "ckpt.pt", DEVICE)
    assert model.config.n_embd == 16 and saved["step"] == 20 and not model.training


def test_a_tiny_model_learns_to_retrieve(tmp_path, no_table):
    """From nothing to above half of the whole answers; without retrieval they cannot be known."""
    rows = train(tmp_path, "--preset", "cpu", "--n_needle", 1, "--seq_len", 64, "--steps", 300,
                 "--validate_every", 20, "--device", DEVICE.type)
    accuracy = [float(row["val_exact_match"]) for row in rows if row["val_exact_match"]]
    assert accuracy[0] < 0.05 and accuracy[-1] > 0.5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(bad, tmp_path, no_table, monkeypatch):
    original, factor = DRT.hidden, torch.tensor(bad, device=DEVICE)
    monkeypatch.setattr(DRT, "hidden", lambda self, *text: original(self, *text) * factor)
    flags = [*TEXT_FLAGS, "--checkpoint_every", 5, "--validate_every", 50, "--fast", "false"]
    rows = train(tmp_path, *flags, "--steps", 5)
    assert [row["skipped"] for row in rows] == ["1.0"] * 5
    model, saved = load_checkpoint(tmp_path / "ckpt.pt", DEVICE)
    torch.manual_seed(0)
    before, fresh = saved["model"], DRT(model.config).state_dict()
    assert all(torch.equal(before[name], fresh[name]) for name in before)
    factor.fill_(1)
    rows = train(tmp_path / "again", *flags, "--steps", 5)
    after = load_checkpoint(tmp_path / "again" / "ckpt.pt", DEVICE)[1]["model"]
    assert rows[-1]["skipped"] == "0.0" and all(not torch.equal(before[name], after[name]) for name in before)


def test_the_encoders_learning_rate_is_a_share_of_the_others(tmp_path, no_table):
    flags = [*TEXT_FLAGS, "--n_encoder", 1, "--steps", 4]
    changes = []
    for share in (0, 0.1, 1):
        train(tmp_path / str(share), *flags, "--encoder_lr", share)
        model = load_checkpoint(tmp_path / str(share) / "ckpt.pt", DEVICE)[0]
        torch.manual_seed(0)
        starts = dict(DRT(model.config).to(DEVICE).named_parameters())
        moved = {name: (p - starts[name]).abs().mean().item() for name, p in model.named_parameters()}
        assert all(x > 0 for name, x in moved.items() if not name.startswith("encoder.layers."))
        changes.append(sum(x for name, x in moved.items() if name.startswith("encoder.layers.")))
    assert changes[0] == 0 and 0.05 < changes[1] / changes[2] < 0.2


def test_query_gain_is_what_the_norms_of_queries_begin_with():
    config = train_module.TrainConfig(query_gain=4.0)
    for n_group in (0, 1):
        model = settings_module.make_model(config, DRTConfig(n_group=n_group), DEVICE, None)
        assert n_group == 0 or (model.query_norms[0].weight == 4).all()


def test_the_first_steps_of_a_language_model_have_short_contexts(text_run):
    assert [row["seq_len"] for row in log_of(text_run)] == ["64"] * 16 + ["100"] * 24


def test_a_log_file_gets_a_line_now_and_then(tmp_path, no_table, monkeypatch, capsys):
    monkeypatch.setattr(run_module, "LINE_EVERY", 0)
    train(tmp_path, *TEXT_FLAGS, "--steps", 60, "--validate_every", 100, "--checkpoint_every", 100)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all("tokens/s" in line and "\r" not in line for line in lines)
    assert "60/60" in lines[-1] and "val_loss" in lines[-1]


def test_every_score_is_in_the_log(tmp_path, no_table):
    """Also where the metrics of many steps were just written."""
    rows = train(tmp_path, *TEXT_FLAGS, "--steps", 55, "--validate_every", 25, "--checkpoint_every", 30)
    assert [i + 1 for i, row in enumerate(rows) if row["val_loss"]] == [25, 50, 55]


def test_a_run_begins_with_the_weights_of_another(text_run, tmp_path, no_table, capsys):
    """Of a language model, to find needles: its shape, without naming it, and its weights."""
    before = load_checkpoint(text_run / "ckpt.pt", DEVICE)[1]
    flags = ["--preset", "cpu", "--device", DEVICE.type, "--init_from", text_run / "ckpt.pt", "--n_value", 1]
    train(tmp_path / "new", *flags, "--steps", 1, "--lr", 1e-9, "--batch_size", 2, "--top_k", 3)
    model, after = load_checkpoint(tmp_path / "new" / "ckpt.pt", DEVICE)
    assert model.config.n_embd == 16 and model.config.top_k == 3 and after["step"] == 1
    for name, tensor in before["model"].items():
        torch.testing.assert_close(after["model"][name], tensor, atol=1e-6, rtol=0)
    for flags, message in ((["--n_embd", 32], f"--init_from: {text_run}/ckpt.pt has --n_embd 16, got 32"),
                           (["--resume"], "--init_from must be left out with --resume"),
                           (["--encoder_identity", "true"], "--encoder_identity must be left out"),
                           (["--query_gain", 4], "--query_gain must be left out"),
                           (["--window", 5], "has --window 16, got 5")):
        line = "--preset", "cpu", "--init_from", text_run / "ckpt.pt", *flags, "--out", tmp_path / "other"
        if flags == ["--resume"]:
            line = *line[:-1], text_run
        assert message in refused(capsys, train_module.main, *line, "--device", DEVICE.type)
    assert not (tmp_path / "other").exists()


# ---------------------------------------------------------------- runs that are stopped, or shared

def test_a_signal_in_the_last_step_starts_no_table(tmp_path, monkeypatch, capsys):
    def score(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        return dict(val_loss=1.0)

    monkeypatch.setattr(Text, "score", score)
    with pytest.raises(SystemExit) as stopped:
        train_module.main(list(map(str, ["--out", tmp_path, *TEXT_FLAGS, "--steps", 1])))
    assert stopped.value.code == 143 and "Stopped by SIGTERM after step 1;" in capsys.readouterr().out
    assert (tmp_path / "ckpt.pt").exists() and not (tmp_path / "ppl.json").exists()


def test_a_killed_run_resumes_as_if_it_had_not_been(text_run, tmp_path, no_table, capsys):
    """Whenever the signal comes: after a checkpoint at the least, which is the only thing waited for."""
    line = [sys.executable, "train.py", "--out", tmp_path, *TEXT_FLAGS]
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while not (tmp_path / "ckpt.pt").exists() and process.poll() is None:
        os.sched_yield()
    process.kill()
    process.communicate(timeout=120)
    whole, resumed = log_of(text_run), train(tmp_path, "--resume", "--device", DEVICE.type)
    assert len(resumed) == 40
    if DEVICE.type == "cpu":
        assert whole == resumed
        for name, tensor in load_checkpoint(text_run / "ckpt.pt", DEVICE)[1]["model"].items():
            assert torch.equal(tensor, load_checkpoint(tmp_path / "ckpt.pt", DEVICE)[1]["model"][name]), name
    train(tmp_path, "--resume", "--device", DEVICE.type)
    assert f"The run in {tmp_path} has done its 40 steps" in capsys.readouterr().out


def test_needle_training_resumes_with_its_context_length(tmp_path, no_table, monkeypatch):
    monkeypatch.setattr(Needles, "score", lambda *_: dict(val_exact_match=1.0))
    flags = [*TINY_FLAGS, "--n_value", 1, "--steps", 40, "--validate_every", 15, "--checkpoint_every", 20]
    whole = train(tmp_path / "whole", *flags)
    monkeypatch.setattr(train_module, "learning_rate", fail_after(train_module.learning_rate, 30))
    with pytest.raises(RuntimeError):
        train(tmp_path / "cut", *flags)
    monkeypatch.setattr(train_module, "learning_rate", train_module.learning_rate.original)
    cut = train(tmp_path / "cut", "--resume", "--device", DEVICE.type)
    assert [row["seq_len"] for row in cut] == ["64"] * 15 + ["128"] * 25
    assert whole == cut or DEVICE.type == "cuda"


def test_a_run_from_before_a_setting_existed_resumes(text_run, tmp_path, no_table, capsys):
    saved = torch.load(text_run / "ckpt.pt", weights_only=True)
    assert [group["weight_decay"] for group in saved["optimizer"]["param_groups"]] == [0.001, 0.0]   # as ever
    for name in ("recency", "encoder_rope"):
        del saved["config"][name], saved["settings"][name]
    del saved["settings"]["encoder_lr"]
    for group in saved["optimizer"]["param_groups"]:
        del group["share"]
    torch.save(saved, tmp_path / "ckpt.pt")
    shutil.copy(text_run / "log.csv", tmp_path)
    assert len(train(tmp_path, "--resume", "--steps", 42, "--device", DEVICE.type)) == 42
    error = refused(capsys, train_module.main, "--resume", "--out", tmp_path, "--recency", "true")
    assert "has --recency False, got True" in error


def test_a_model_from_before_a_setting_existed(needle_run, tmp_path):
    saved = torch.load(needle_run[0] / "ckpt.pt", weights_only=True)
    for name in ("recency", "encoder_rope"):
        del saved["config"][name], saved["settings"][name]
    torch.save(saved, tmp_path / "ckpt.pt")
    line, preset = ["--preset", "code"], train_module.PRESETS["code"]       # with recency
    args = settings_module.make_parser(train_module.TrainConfig, train_module.PRESETS, line).parse_args(line)
    chosen = settings_module.settings(args, train_module.TrainConfig, preset, saved)
    assert chosen["recency"] is False and chosen["encoder_rope"] is False
    for line in (["niah", "--lengths", "128", "--questions", "1"], ["inspect", "--needles", "128"]):
        evaluation.main([*line, "--ckpt", str(tmp_path / "ckpt.pt"), "--device", DEVICE.type])


def fail_after(function, n):
    """The function, which raises RuntimeError after n calls."""
    calls = []

    def failing(*arguments):
        calls.append(1)
        if len(calls) > n:
            raise RuntimeError("a crash")
        return function(*arguments)

    failing.original = function
    return failing


def test_two_processes_take_the_steps_of_one(tmp_path, no_table):
    flags = *TEXT_FLAGS, "--device", "cpu", "--gumbel", "false", "--steps", 10
    command("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py", *flags,
            "--out", tmp_path)
    for row, other in zip(log_of(tmp_path), train(tmp_path / "one", *flags), strict=True):
        for name in ("loss", "grad_norm", "val_loss"):
            if other[name]:
                assert float(row[name]) == pytest.approx(float(other[name]), rel=1e-4), (row["step"], name)


def test_several_processes_need_contexts_of_a_chunk():
    """In shorter ones nothing is retrieved, and DDP waits for gradients that never come."""
    corpus = types.SimpleNamespace(tokenizer="bytes")
    task = types.SimpleNamespace(settings=dict(chunk_size=16), corpus=corpus, lengths=lambda: [14],
                                 check=lambda length: None)
    settings_module.check_batches(train_module.TrainConfig(), task, n_rank=1)
    with pytest.raises(ValueError, match="--seq_len and --start_len must be at least a chunk, 15, .* got 14"):
        settings_module.check_batches(train_module.TrainConfig(), task, n_rank=2)


def test_a_damaged_checkpoint_is_said_and_the_one_before_offered(text_run, tmp_path, no_table, capsys):
    for name in ("ckpt.pt", "ckpt.prev.pt", "log.csv"):
        (tmp_path / name).write_bytes((text_run / name).read_bytes())
    (tmp_path / "ckpt.pt").write_bytes((text_run / "ckpt.pt").read_bytes()[:9000])
    error = refused(capsys, train_module.main, "--resume", "--out", tmp_path, "--device", DEVICE.type)
    assert f"mv {tmp_path}/ckpt.prev.pt {tmp_path}/ckpt.pt" in error and "from step 35" in error
    os.replace(tmp_path / "ckpt.prev.pt", tmp_path / "ckpt.pt")
    assert train(tmp_path, "--resume", "--device", DEVICE.type) == log_of(text_run) or DEVICE.type == "cuda"


# ---------------------------------------------------------------- what the user gets wrong

def test_a_run_that_goes_astray_ends_with_a_message(tmp_path, monkeypatch, capsys):
    original = DRT.hidden
    monkeypatch.setattr(DRT, "hidden", lambda self, *text: original(self, *text) * math.nan)
    error = refused(capsys, train_module.main, "--out", tmp_path, *TEXT_FLAGS, "--fast", "false")
    assert "not finite in 10 steps in a row" in error


def test_no_room_for_checkpoints_is_found_before_the_first_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    error = refused(capsys, train_module.main, "--out", tmp_path / "new", *TEXT_FLAGS)
    assert "MiB free for checkpoints" in error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("flags, message", [
    ("--n_embd 65 --n_head 4", "n_embd must be a multiple of n_head, got 65 and 4"),
    ("--top_k 0", "top_k must be in 1 .. 10000000, got 0"),
    ("--chunk_size 1", "chunk_size must be in 2 .. 10000000, got 1"),
    ("--chunk_size 12", "chunk_size must be at least 14 to hold a needle with a value of 6 bytes, got 12"),
    ("--seq_len 30", "seq_len must be at least 37 for a needle and its question in chunks of 16, got 30"),
    ("--data nowhere", "--data must be 'stdlib', 'packages' or a folder that `python -m tools.prepare` made"),
    ("--steps x", "argument --steps: invalid int value: 'x'"),
    ("--softmax_one maybe", "argument --softmax_one: must be true or false, got 'maybe'"),
    ("--steps 0", "--steps must be positive, got 0"),
    ("--seed -1", "--seed must not be negative, got -1"),
    ("--colour red", "unrecognized arguments: --colour red"),
    ("--resume", "no checkpoint at"),
    ("--task lm --seq_len 9000000 --batch_tokens 9000000", "--data must hold more than seq_len tokens"),
    ("--batch_size 5 --micro_batch 2", "must be a multiple of 1 processes times --micro_batch 2"),
    ("--batch_tokens 64 --micro_batch 2", "all that --batch_tokens allows"),
    ("--micro_batch -1", "--micro_batch must not be negative, got -1"),
] + ([] if torch.cuda.is_available() else [("--device cuda", "--device must be auto, cpu, or cuda on a")]))
def test_training_mistakes_get_one_line(flags, message, tmp_path, capsys):
    error = refused(capsys, train_module.main, "--preset", "cpu", "--out", tmp_path / "new", *flags.split())
    assert message in error and error.count("\n") == 1 and not (tmp_path / "new").exists()


def test_a_file_in_the_place_of_the_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert "file" in refused(capsys, train_module.main, "--preset", "cpu", "--out", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_log_of_another_version_is_not_continued(text_run, tmp_path, capsys):
    shutil.copytree(text_run, tmp_path, dirs_exist_ok=True)
    before = (tmp_path / "log.csv").read_text().replace("val_loss", "loss_of_val", 1)
    (tmp_path / "log.csv").write_text(before)
    error = refused(capsys, train_module.main, "--resume", "--steps", 42, "--out", tmp_path)
    assert error.startswith("error: --resume: ") and "log.csv" in error and error.count("\n") == 1
    assert (tmp_path / "log.csv").read_text() == before


def test_resume_names_the_flag_that_differs(text_run, capsys):
    error = refused(capsys, train_module.main, "--resume", "--out", text_run, "--n_embd", 32)
    assert error == f"error: --resume: the run in {text_run} has --n_embd 16, got 32\n"
