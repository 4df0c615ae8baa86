"""eval.py's commands: tables, reports and pictures, and what is refused."""
import json
import math
from pathlib import Path

import pytest
import torch

import eval as evaluation
from helpers import DEVICE, refused
from tools import plot, reader

ON = "--device", DEVICE.type


@pytest.fixture(scope="session")
def run(needle_run):
    return needle_run[0]


def test_niah(run, tmp_path, capsys):
    reports = []
    for use_fast in ("true", "false"):
        out = tmp_path / f"{use_fast}.json"
        measure("niah", "--ckpt", run / "ckpt.pt", "--lengths", "128,1000", "--questions", 8, "--json", out,
                "--fast", use_fast, *ON)
        printed = capsys.readouterr().out
        who = "fast/" if use_fast == "true" else "the plain files"
        assert "1,000" in printed and printed.startswith(f"Read by {who}")
        reports.append(json.loads(out.read_text()))
    rows = reports[0]["rows"]
    assert [row["length"] for row in rows] == [128, 1000] and rows[0]["questions"] == 8
    assert {"token_accuracy", "exact_match", "seconds", "tokens_per_second", "peak_gpu_gib"} <= set(rows[0])
    assert {"settings", "hardware", "versions", "commit"} <= set(reports[0])
    for row, other in zip(*(report["rows"] for report in reports), strict=True):
        accuracy = row["token_accuracy"], other["token_accuracy"]
        assert accuracy[0] == pytest.approx(accuracy[1], abs=13)            # one of 8 may differ


def test_as_many_needles_as_wanted(run, tmp_path):
    out = tmp_path / "niah.json"
    line = "niah", "--ckpt", run / "ckpt.pt", "--n_needle", 2, "--lengths", 500, "--questions", 4
    measure(*line, "--json", out, *ON)
    report = json.loads(out.read_text())
    assert report["rows"][0]["needles"] == 2 and report["settings"]["n_needle"] == 2


def test_a_table_whose_short_contexts_hold_fewer_needles_is_one_curve():
    rows = [dict(model="out", length=n, needles=k, exact_match=1) for k, n in ((1, 80), (3, 500), (3, 900))]
    more = [dict(row, needles=2 * row["needles"]) for row in rows]
    assert plot.curves({Path("a/niah.json"): rows}) == {"out": rows}
    assert plot.curves({Path("a/niah.json"): rows + more}) == {"out, 3 needles": rows, "out, 6 needles": more}


def measure(*arguments):
    evaluation.main([*map(str, arguments)])


def test_rows_measured_before_a_failure_are_shown(run, capsys, monkeypatch):
    def read(self, model, tokens, at, original=reader.Reader.__call__):
        if tokens.shape[1] == 128:
            raise MemoryError("no room")
        return original(self, model, tokens, at)

    monkeypatch.setattr(reader.Reader, "__call__", read)
    line = f"niah --ckpt {run}/ckpt.pt --lengths 64,128 --questions 4 --device {DEVICE.type}".split()
    with pytest.raises(SystemExit) as stop:
        evaluation.main(line)
    said = capsys.readouterr()
    assert stop.value.code == 2 and "token_accuracy" in said.out and "error: out of memory" in said.err


def test_plain_reading_is_spared_lengths_that_nobody_asked_for(run, capsys, monkeypatch):
    monkeypatch.setattr(reader, "PLAIN_CHUNKS", 20)
    measure("niah", "--ckpt", run / "ckpt.pt", "--questions", 4, "--fast", "false", *ON)
    assert [row.split()[1] for row in capsys.readouterr().out.splitlines()[2:]] == ["64", "256"]


def test_several_numbers_of_needles_in_a_haystack_of_packages(run, tmp_path, capsys):
    line = ["niah", "--ckpt", run, "--lengths", "300,600", "--questions", 4, *ON]
    measure(*line, "--n_needle", "2,5", "--anywhere", "false", "--generate", "--json", tmp_path / "niah.json")
    report = json.loads((tmp_path / "niah.json").read_text())
    assert [row["needles"] for row in report["rows"]] == [2, 2, 5, 5]
    assert [row["length"] for row in report["rows"]] == [300, 600] * 2
    assert all(row["repeats"] == 1 and 0 <= row["written"] <= 100 for row in report["rows"])
    assert report["settings"]["anywhere"] is False
    measure(*line, "--data", "packages", "--retriever", "last", "--json", tmp_path / "niah.json")
    assert json.loads((tmp_path / "niah.json").read_text())["settings"]["data"] == "packages"
    error = refused(capsys, evaluation.main, *line, "--n_needle", "2,99")
    assert "--n_needle must be at most 9 in 300 tokens" in error
    assert "--n_needle" in refused(capsys, evaluation.main, *line, "--n_needle", "2,,3")
    error = refused(capsys, evaluation.main, *line, "--n_needle", "3", "--needle", "single")
    assert "--n_needle must be left out" in error


def test_a_checkpoint_of_before_knows_where_its_needles_lie(run, tmp_path):
    state = torch.load(run / "ckpt.pt", weights_only=True)
    assert state["settings"].pop("anywhere")
    state["settings"]["straddle"] = False
    torch.save(state, tmp_path / "ckpt.pt")
    line = "niah", "--ckpt", tmp_path, "--lengths", 128, "--questions", 1
    measure(*line, "--json", tmp_path / "x.json", *ON)
    assert json.loads((tmp_path / "x.json").read_text())["settings"]["anywhere"] is False


def test_ppl(run, text_run, tmp_path, capsys):
    line = ["ppl", "--ckpt", text_run / "ckpt.pt", run / "ckpt.pt", *ON]
    measure(*line, "--lengths", "100,400", "--places", 4, "--json", tmp_path / "ppl.json")
    report = json.loads((tmp_path / "ppl.json").read_text())
    rows, settings = report["rows"], report["settings"][run.name]
    assert (settings["data"], settings["split"]) == ("stdlib", "val")
    names = [text_run.name] * 2 + [run.name] * 2
    assert [(row["model"], row["length"]) for row in rows] == list(zip(names, [100, 400] * 2, strict=True))
    for row in rows:                                                    # bytes: one token each
        assert row["scored"] == 1024 and row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert row["bits_per_byte"] == pytest.approx(row["loss"] / math.log(2))
    measure(*line, "--lengths", 400, "--places", 4, "--retriever", "last", "--json", tmp_path / "last.json")
    last = json.loads((tmp_path / "last.json").read_text())
    assert last["rows"][0]["loss"] != rows[1]["loss"] and last["settings"][run.name]["retriever"] == "last"
    error = refused(capsys, evaluation.main, "niah", "--ckpt", text_run / "ckpt.pt", *ON)
    assert "must be of a run with --task needles" in error


def test_speed(tmp_path, capsys):
    out = tmp_path / "speed.json"
    measure("speed", "--lengths", "50,1000", "--tokens", 20, "--json", out, "--n_embd", 32,
            "--offload", *ON)
    rows = json.loads(out.read_text())["rows"]
    assert "random weights" in capsys.readouterr().out
    assert [row["length"] for row in rows] == [50, 1000]
    assert all(row["read_seconds"] > 0 and row["ms_per_new_token"] > 0 for row in rows)
    error = refused(capsys, evaluation.main, "speed", "--n_embd", 65, "--n_head", 4)
    assert error == "error: n_embd must be a multiple of n_head, got 65 and 4\n"


def test_sample(run, tmp_path, capsys):
    (tmp_path / "text").write_text("import os\n" * 50)
    line, samples = ["sample", "--ckpt", run / "ckpt.pt", "--tokens", 30, *ON], []
    for _ in range(2):
        measure(*line, "--file", tmp_path / "text", "--seed", 3)
        samples.append(capsys.readouterr().out)
    assert samples[0] == samples[1] and len(samples[0]) > 20
    error = refused(capsys, evaluation.main, *line, "--prompt", "")
    assert error == "error: --prompt must hold some text, got none\n"
    error = refused(capsys, evaluation.main, *line, "--prompt", "x", "--temperature", -1)
    assert "temperature must be at least 0" in error


def test_a_log_has_scores_and_shows_where_contexts_grow(tmp_path):
    rows = "1,9.5,64,\n2,9.0,64,0.5\n3,8.5,128,\n4,8.0,128,0.75\n"
    (tmp_path / "log.csv").write_text("step,loss,seq_len,val_exact_match\n" + rows)
    assert plot.load_log(tmp_path / "log.csv") == ({2: 0.5, 4: 0.75}, "val_exact_match", {128: 3, 64: 1})


def test_plot_of_a_log(run, tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is not installed")
    measure("plot", run / "log.csv", "--out", tmp_path / "log.png")
    assert (tmp_path / "log.png").stat().st_size > 5000
    log = {100: 2.0, 1000: 1.0}, "val_loss", {256: 500, 128: 495, 64: 1}
    axis, = plot.draw_training(plt, {tmp_path / "log.csv": log})
    assert [text.get_text() for text in axis.texts] == ["256 tokens", "64 tokens"]      # 128 has no room


def test_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    for key in ("exact_match", "perplexity"):
        rows = [dict(model="a", length=2 ** i, needles=n) | {key: 9.0 + i} for n in (3, 9) for i in range(3)]
        assert [*plot.curves(dict(x=rows))] == ["a, 3 needles", "a, 9 needles"]
        (tmp_path / "report.json").write_text(json.dumps(dict(rows=rows)))
        measure("plot", tmp_path / "report.json", "--out", tmp_path / f"{key}.png")
        assert (tmp_path / f"{key}.png").stat().st_size > 5000
    for key, values in dict(document=["x", "y", "all 2"], last_seen=["never", "up to 16 ago"]).items():
        numbers = dict(ratio=0.9, low=0.8, high=0.95, share=0.4, loss=1.2, length=99)
        rows = [dict(model=model, **{key: value}, **numbers) for model in "ab" for value in values]
        (tmp_path / "report.json").write_text(json.dumps(dict(rows=rows)))
        measure("plot", tmp_path / "report.json", "--out", tmp_path / key)              # a .png
        assert (tmp_path / f"{key}.png").stat().st_size > 5000


def test_pictures_that_would_mislead_are_refused(tmp_path, capsys):
    """Ratios of two reports, each to its own first model; losses in other texts; a log among reports."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")

    def report(name, **row):
        numbers = dict(ratio=0.9, low=0.8, high=0.95, share=0.4, loss=math.nan, length=99)
        rows = [dict(model=model, **numbers | row) for model in "ab" for _ in range(2)]
        (tmp_path / name).write_text(json.dumps(dict(rows=rows)))
        return tmp_path / name

    (tmp_path / "log.csv").write_text("step,seq_len,val_loss\n1,64,0.5\n")
    near, far = report("near.json", last_seen="never"), report("far.json", last_seen="never", share=0.3)
    documents = report("a.json", document="$\\frac$_"), report("b.json", document="x")
    for reports, error in (((near, far), "must be of the same text"), (documents, "must have one report"),
                           ((near, tmp_path / "log.csv"), "either logs")):
        line = refused(capsys, evaluation.main, "plot", *reports, "--out", tmp_path / "no.png")
        assert error in line and line.count("\n") == 1 and not (tmp_path / "no.png").exists()
    measure("plot", documents[0], "--out", tmp_path / "yes.png")        # what looks like a formula is a name
    assert plot.shown("_$a") == r" _\$a"


# ---------------------------------------------------------------- what the user gets wrong

