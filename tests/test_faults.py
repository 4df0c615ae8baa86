"""Faults of machines and interruptions: nothing is lost, the reason is said in one line, and nobody waits."""
import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import eval as evaluation
import fast
import train
from helpers import DEVICE, ROOT, TEXT_FLAGS, command, log_of, random_tokens, refused, tiny
from tools import cli, exits, report
from tools.checkpoint import load_checkpoint, save_checkpoint
from tools.run import prepare_folder


@contextmanager
def full_disk(room):
    """No file can grow beyond `room` bytes: writing more fails in the middle of a file, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def started(*arguments, until, env=None):
    """A program of ours in the background, once a line that it prints holds `until`."""
    process = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, text=True, env=env,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if until in line:
            return process
    raise AssertionError("".join(lines))


# ---------------------------------------------------------------- disks

def test_a_disk_that_fills_up_leaves_the_checkpoint_before(tmp_path):
    model, path = tiny(), tmp_path / "ckpt.pt"
    save_checkpoint(path, model, step=1)
    size = path.stat().st_size
    with full_disk(size // 2), pytest.raises(OSError):
        save_checkpoint(path, model, step=2)
    assert load_checkpoint(path, DEVICE)[1]["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["ckpt.pt"]              # no partial file


def test_a_kill_between_the_two_renames_of_a_checkpoint(tmp_path, monkeypatch):
    model, path = tiny(), tmp_path / "ckpt.pt"
    save_checkpoint(path, model, step=1)
    replace, calls = os.replace, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return replace(*arguments)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, model, step=2)
    assert load_checkpoint(path, DEVICE)[1]["step"] == 1
    assert load_checkpoint(tmp_path / "ckpt.prev.pt", DEVICE)[1]["step"] == 1


def test_a_disk_that_fills_up_while_training_is_said_in_one_line(tmp_path, capsys):
    with full_disk(20_000):         # on a CPU: on a GPU, Triton's cache of compiled kernels meets it first
        error = refused(capsys, train.main, *TEXT_FLAGS, "--device", "cpu", "--out", tmp_path)
    assert "ckpt.pt" in error and "Traceback" not in error and not list(tmp_path.glob("*.partial"))


def test_a_disk_that_fills_up_leaves_the_memory_file_before(tmp_path):
    model, path = tiny(), tmp_path / "memory"
    memory = fast.Memory(model)
    memory.save(path)
    fast.read(model, random_tokens(1, 2000), memory)
    with full_disk(50_000), pytest.raises(OSError):
        memory.save(path)
    assert fast.Memory.load(path, model).length == 0 and len(list(tmp_path.iterdir())) == 1
    memory.save(path)
    assert fast.Memory.load(path, model).length == 2000


def test_a_report_is_whole_or_not_there(tmp_path):
    with full_disk(100), pytest.raises(OSError):
        report.save_report(tmp_path / "x.json", {}, DEVICE, [dict(length=1)])
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(needle_run, tmp_path, capsys, monkeypatch):
    def deny(*_, **__):
        raise PermissionError(13, "Permission denied", "ckpt.pt")

    monkeypatch.setattr(torch, "load", deny)
    error = refused(capsys, evaluation.main, "niah", "--ckpt", needle_run[0] / "ckpt.pt")
    assert "Permission denied" in error and "damaged" not in error


# ---------------------------------------------------------------- one folder, several runs

def test_training_again_moves_the_run_aside(tmp_path, no_table, capsys):
    for steps in (2, 3, 4):
        train.main([*TEXT_FLAGS, "--steps", str(steps), "--out", str(tmp_path / "out")])
    assert [len(log_of(tmp_path / name)) for name in ("out.1", "out.2", "out")] == [2, 3, 4]
    assert f"is now in {tmp_path}/out.2" in capsys.readouterr().out


def test_a_folder_is_locked_while_it_is_moved_aside(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ckpt.pt").touch()
    rename = Path.rename

    def meanwhile(path, aside):
        with pytest.raises(ValueError, match="another run is writing"):         # what a second process meets
            monkeypatch.setattr(Path, "rename", rename)
            prepare_folder(tmp_path / "out", False)
        return rename(path, aside)

    monkeypatch.setattr(Path, "rename", meanwhile)
    prepare_folder(tmp_path / "out", False).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.1"]


def test_two_runs_in_one_folder_are_refused(tmp_path, capsys):
    process = started("train.py", *TEXT_FLAGS, "--steps", 9999, "--out", tmp_path, until="fast/")
    try:
        for flags in ((), ("--resume",)):
            error = refused(capsys, train.main, *TEXT_FLAGS, "--steps", 9999, *flags, "--out", tmp_path)
            assert "another run is writing" in error
        assert process.poll() is None
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


# ---------------------------------------------------------------- signals

@pytest.mark.parametrize("name, status", [("SIGINT", 130), ("SIGTERM", 143)])
def test_signals_end_a_measurement_in_one_line(name, status, needle_run):
    process = started("eval.py", "niah", "--ckpt", needle_run[0] / "ckpt.pt", "--lengths", 2 ** 22,
                      "--device", "cpu", until="fast/")
    process.send_signal(signal.Signals[name])
    said = process.communicate(timeout=60)[0]
    assert process.returncode == status and "Traceback" not in said
    assert said.strip().splitlines()[-1] in ("error: interrupted", "error: terminated")


def test_a_second_signal_ends_a_program_at_once():
    source = """
import os, signal
from tools import exits

@exits.program
def main(_):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        os.kill(os.getpid(), signal.SIGTERM)            # while it tidies up
        print("not at once")

main()
"""
    assert command("-c", source, status=143).stdout == ""


@pytest.mark.parametrize("often", [False, True])
def test_a_signal_ends_the_preparation_in_one_line(often, tmp_path):
    """Ctrl-C once, and hit again and again: then it ends at once, and no worker is left behind."""
    source = f"""
import os, signal, sys
from tools import prepare

def interrupt(document, **_):
    if {often} or document.name == "7.txt":
        os.kill(os.getpid(), signal.SIGINT)

prepare.tokenize = interrupt
prepare.main(sys.argv[1:])
"""
    for i in range(100):
        (tmp_path / f"{i}.txt").write_text("some text")
    line = "-c", source, "text", tmp_path, "--out", tmp_path / "out", "--tokenizer", "bytes"
    done = subprocess.run([sys.executable, *map(str, line)], cwd=ROOT, capture_output=True, text=True,
                          timeout=60)
    assert "Traceback" not in done.stderr           # and nobody holds the pipe to stderr any more
    if often:
        assert done.returncode in (130, -signal.SIGINT)
    else:
        assert done.returncode == 130 and done.stderr.endswith("error: interrupted\n")
    assert not list(tmp_path.glob("out/train.bin"))


@pytest.mark.parametrize("what, status, word", [("KeyboardInterrupt", 130, "interrupted"),
                                                ("exits.Terminated(1)", 129, "terminated")])
def test_a_signal_that_meets_a_lock_ends_in_one_line(what, status, word):
    """Python's locks then fail with an error of their own, in place of the signal's."""
    source = f"""
from tools import exits

@exits.program
def main(argv):
    try:
        try:
            raise {what}
        finally:
            raise RuntimeError("cannot release un-acquired lock")
    finally:
        raise RuntimeError("cannot schedule new futures")

main()
"""
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status and done.stderr == f"error: {word}\n"


# ---------------------------------------------------------------- groups of processes

def test_every_process_of_a_group_says_its_own_reason(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(SystemExit):
        exits.end(2, "no such thing")
    assert capsys.readouterr().err == "error: process 3 of 8: no such thing\n"


# ---------------------------------------------------------------- surroundings

def test_another_folder_another_locale_and_a_reader_who_has_seen_enough(needle_run, tmp_path):
    """From elsewhere, in ASCII, into `| head -1`: the first line comes, and the status says why it ended."""
    line = (f"{sys.executable} {ROOT}/eval.py niah --ckpt {needle_run[0]}/ckpt.pt --lengths 64,128 "
            f"--questions 4 --device cpu --json report.json | head -1; exit ${{PIPESTATUS[0]}}")
    env = dict(os.environ, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONDONTWRITEBYTECODE="1")
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.startswith("Read by fast/") and "Traceback" not in done.stderr
    assert done.returncode in (0, 141)
    assert done.returncode == 141 or json.loads((tmp_path / "report.json").read_text())["rows"]


def test_a_closed_stdout_and_stderr(needle_run, tmp_path):
    line = (f"{sys.executable} eval.py niah --ckpt {needle_run[0]}/ckpt.pt --lengths 64 --questions 4 "
            f"--device cpu --json {tmp_path}/report.json >&- 2>&-")
    assert subprocess.run(["bash", "-c", line], cwd=ROOT).returncode == 0
    assert json.loads((tmp_path / "report.json").read_text())["rows"][0]["questions"] == 4


# ---------------------------------------------------------------- machines

def test_a_machine_without_triton(tmp_path):
    """macOS and Windows have none: everything runs on the reference, and the kernels say what they need."""
    source = """
import sys
sys.modules["triton"] = None
import fast.bench, gca, torch, train
train.main(sys.argv[1:])
fast.bench.main([])
x = torch.ones(1, 1, 4, 1, 16)
gca.gca(x, x, x, torch.ones(1, 1, 1), torch.zeros(1, 1, 1).long(), backend="triton")
"""
    done = command("-c", source, *TEXT_FLAGS, "--steps", 2, "--device", "cpu", "--out", tmp_path, status=1)
    assert "bits_per_byte" in done.stdout and "Nothing can be timed" in done.stdout
    assert "needs Triton" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6 GiB."), MemoryError("6 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_names_what_to_lower(error, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(train, "make_optimizer", fail)
    said = refused(capsys, train.main, *TEXT_FLAGS, "--out", tmp_path)
    assert "out of memory" in said and "lower --batch_tokens, --micro_batch" in said


def test_the_number_type_of_a_gpu_without_bfloat16(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    exits.say_once.cache_clear()
    for _ in range(2):
        assert cli.pick_dtype("auto", torch.device("cuda")) == torch.float16
    assert capsys.readouterr().out.count("no bfloat16") == 1
    assert cli.pick_dtype("float32", torch.device("cuda")) == torch.float32
    assert cli.pick_dtype("auto", torch.device("cpu")) == torch.float32


def test_training_in_float16_with_a_gradient_scaler(tmp_path, no_table):
    losses = []
    for dtype in ("float16", "float32"):
        flags = *TEXT_FLAGS, "--gumbel", "false", "--steps", "20", "--dtype", dtype
        train.main([*flags, "--out", str(tmp_path / dtype)])
        losses.append([float(row["loss"]) for row in log_of(tmp_path / dtype)])
    assert losses[0] == pytest.approx(losses[1], rel=0.03) and losses[0] != losses[1]


# ---------------------------------------------------------------- many forks

def test_a_conversation_of_many_forks_stays_small(tmp_path):
    """A fork for every turn: few pages, and files and memory of the size of what was read."""
    model = tiny()
    memory = fast.Memory(model)
    fast.read(model, random_tokens(1, 1500), memory)
    tokens = [random_tokens(1, 20) for _ in range(200)]
    for turn in tokens:
        memory = memory.fork()
        fast.read(model, turn, memory)
    assert memory.length == 5500 and len(memory.pages) <= 12
    memory.save(tmp_path / "forked")
    whole = fast.Memory(model)
    fast.read(model, random_tokens(1, 5500), whole)
    whole.save(tmp_path / "whole")
    sizes = [(tmp_path / name).stat().st_size for name in ("forked", "whole")]
    assert sizes[0] < 1.1 * sizes[1] and sum(memory.nbytes.values()) < 4 * sizes[1]


def test_padding_is_a_newline_of_the_models_own_tokenizer(needle_run, monkeypatch):
    model, _ = load_checkpoint(needle_run[0] / "ckpt.pt", DEVICE)
    read, generate = [], sys.modules["fast.generate"]
    original = generate.read
    monkeypatch.setattr(generate, "read", lambda model, tokens, *x: read.append(tokens) or
                        original(model, tokens, *x))
    next(iter(fast.generate(model, [[65, 66]], 1)))
    assert read[0].tolist() == [[10] * 14 + [65, 66]]
