"""What was retrieved, on the terminal and as a page; the page in a browser, where there is one."""
import json
import re
import shutil
import subprocess

import pytest
import torch

import eval as evaluation
from helpers import DEVICE, TEXT, random_tokens, refused, tiny
from tasks.chains import PAIRS
from tasks.needles import NeedleConfig, Needles
from tasks.text import load_corpus
from tools.exits import visible
from tools.trace import Trace, check_size, first_of_all, needle_traces

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = ("</script><script>document.title='run'</script><img src=x onerror=document.title='run'>&lt; "
           "\u202eleft\u2066")


def trace(n=203, **config):
    return Trace(tiny(**config), random_tokens(n), bytes)


def test_a_trace_is_what_the_model_did():
    """Retrieved chunks are DRT.retrieve's; gain is the loss without retrieval less the loss with it."""
    model, tokens = tiny(n_layer=4, n_group=2), random_tokens(203)
    seen = Trace(model, tokens, bytes)
    assert seen.indices.shape == (2, 14, 4) and seen.n_chunk == 14 and len(seen.gain) == 203
    assert seen.best(0, 0) == [] and len(seen.best(1, 3)) == 2
    weights = torch.tensor([slot[1] for slot in seen.best(0, 13)])
    scores = torch.tensor([slot[2] for slot in seen.best(0, 13)])
    torch.testing.assert_close(scores.softmax(0), weights, atol=1e-4, rtol=0)           # K are all there are
    logits, _ = model(tokens[None])
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[1:], reduction="none")
    model.gca = lambda q, *_: q * 0
    without = torch.nn.functional.cross_entropy(model(tokens[None])[0][0, :-1], tokens[1:], reduction="none")
    torch.testing.assert_close(seen.gain[1:], (without - loss).detach().cpu(), atol=1e-5, rtol=0)
    assert seen.gain[:2 * TEXT + 1].abs().max() == 0                    # two chunks have nothing to retrieve


def test_needles_that_were_found_first(needle_run):
    task = Needles(vars(NeedleConfig()) | dict(seq_len=128, chunk_size=16), load_corpus("stdlib"))
    (seen, pairs), _ = needle_traces(tiny(), task, 300, 4, 0)
    assert len(pairs) == 3
    for question, (needle,) in pairs:
        name = seen.text(question - 1)[-4:]
        assert f"|{name}:" in seen.text(needle) and seen.text(question).startswith(":")
    seen.indices[0, [question for question, _ in pairs], 0] = torch.tensor([needle for _, (needle,) in pairs])
    seen.weights[0, :, 0] = 2
    assert first_of_all(seen, pairs) == 3
    for kind in PAIRS[1:]:                              # two needles lead to an answer
        settings = vars(NeedleConfig()) | dict(needle=kind, seq_len=128, chunk_size=16)
        task = Needles(settings, load_corpus("stdlib"))
        (seen, pairs), _ = needle_traces(tiny(), task, 300, 4, 0)
        assert pairs and all(len({*needles}) == 2 for _, needles in pairs)


def test_a_needle_across_a_border_is_in_both_chunks():
    settings = vars(NeedleConfig()) | dict(anywhere=True, seq_len=128, chunk_size=16)
    traces = needle_traces(tiny(), Needles(settings, load_corpus("stdlib")), 300, 12, 0)
    found = [(seen, question, needles) for seen, pairs in traces for question, needles in pairs]
    assert {len(needles) for _, _, needles in found} == {1, 2}
    for seen, question, needles in found:
        text = bytes(seen.tokens[needles[0] * TEXT:(needles[-1] + 1) * TEXT])
        name = bytes(seen.tokens[question * TEXT - 4:question * TEXT])
        begins = text.index(b"|" + name + b":")
        assert begins < TEXT and text[begins + 12:begins + 13] == b"|"          # |name:value|
        assert len(needles) == 1 + (begins + 12 >= TEXT)                        # and no chunk besides


def test_inspect(needle_run, tmp_path, capsys):
    line = ["inspect", "--ckpt", needle_run[0] / "ckpt.pt", "--device", DEVICE.type]
    (tmp_path / "text").write_text("def f(): pass\n" * 40)
    page = tmp_path / "page.html"
    evaluation.main([*map(str, line), "--file", str(tmp_path / "text"), "--html", str(page)])
    said = capsys.readouterr().out
    assert "chunk 37 of 0 .. 37" in said and said.count("tokens before") == 2 and "\\n" in said
    assert len(data_of(page)["chunks"]) == 38
    evaluation.main([*map(str, line), "--needles", "200", "--questions", "3"])
    assert "questions retrieved a chunk of their needle" in capsys.readouterr().out


def data_of(page):
    return json.loads(re.search(r'application/json">(.*?)</script>', page.read_text(), re.S)[1])


def test_landmarks_in_numbers(capsys):
    """By hand: two directions at right angles (of 6 pairs, 2 are alike), weights all on one and in halves."""
    trace = object.__new__(Trace)
    trace.n_text, trace.n_chunk, trace.landmarks = 10, 4, torch.eye(2)[[0, 0, 1]]
    trace.indices = torch.tensor([[[-1, -1], [0, -1], [0, 1], [1, 0]]])
    trace.weights = torch.tensor([[[0, 0], [1, 0], [1, 0], [0.5, 0.5]]])
    trace.show_landmarks(near=2)
    line = capsys.readouterr().out
    assert "mean cosine 0.333;" in line and "in the mean 2 chunks weigh as 1.5 equal" in line
    assert "25% of them lie beyond" in line and "has 50% of the retrievals" in line


@pytest.mark.parametrize("flags, message", [
    ("--prompt", "expected one argument"), ("--prompt x --chunk 1", "--chunk must be in 0 .. 0, got 1"),
    ("--prompt x --chunk -1", "--chunk must be in 0 .. 0, got -1"), ("", "required"),
    ("--prompt x --file y", "not allowed with"), ("--file EMPTY", "--file must hold some text"),
    ("--prompt x --html none/x.html", "--html: no folder none"), ("--needles 0", "1 to 122,880 tokens"),
    ("--prompt x --html /dev/null", "a folder or a device"), ("--needles 999999", "1 to 122,880 tokens"),
    ("--file EMPTY --html EMPTY", "would be overwritten"),
    ("--needles 20", "for a needle and its question"), ("--needles -5", "1 to 122,880 tokens")])
def test_inspection_mistakes(flags, message, needle_run, tmp_path, capsys):
    (tmp_path / "empty").touch()
    flags = flags.replace("EMPTY", f"{tmp_path}/empty").split()
    error = refused(capsys, evaluation.main, "inspect", "--ckpt", needle_run[0] / "ckpt.pt", *flags)
    assert message in error and error.count("\n") == 1


def test_a_base_lm_has_nothing_to_show():
    with pytest.raises(ValueError, match="a base LM .* retrieves nothing"):
        check_size(tiny(n_group=0), 100, None)


def test_characters_stay_whole():
    text = "שלום العالم é" * 9
    seen = Trace(tiny(), torch.tensor([*text.encode()], device=DEVICE), bytes)
    assert all("".join(piece for piece, _ in seen.runs(c)) == seen.text(c) for c in range(seen.n_chunk))


def test_a_terminal_is_not_obeyed():
    assert visible("a\x1b[2J\n\tb\u202e é") == r"a\x1b[2J\n\tb\u202e é"


# ---------------------------------------------------------------- in a browser

def in_browser(page, script, tmp_path, size="1200,760"):
    """What the page's DOM is after the script ran in it."""
    tested = tmp_path / "tested.html"
    tested.write_text(page.read_text().replace("</html>", f"<script>{script}</script></html>"))
    line = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/user",
            f"--window-size={size}", "--virtual-time-budget=5000", "--dump-dom", f"file://{tested}"]
    return subprocess.run(line, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.skipif(not BROWSER, reason="no Chromium is installed")
def test_hostile_text_is_shown_as_text(tmp_path):
    text = (HOSTILE + "\0\ud7ff" + "x" * 1000).encode() + b"\xff\xfe"
    seen = Trace(tiny(), torch.tensor([*text], device=DEVICE), bytes)
    seen.page(tmp_path / "page.html", HOSTILE, 0)
    script = """
document.body.dataset.title = document.title;
document.body.dataset.shown = rows.map(row => row.lastChild.textContent).join("");
"""
    dom = in_browser(tmp_path / "page.html", script, tmp_path)
    shown = "".join(seen.text(c) for c in range(seen.n_chunk))
    assert "onerror=document" in shown and "<img" not in dom
    assert 'data-title="run"' not in dom and 'data-shown="' in dom and "&lt;/script&gt;" in dom


@pytest.mark.skipif(not BROWSER, reason="no Chromium is installed")
def test_the_chosen_chunk_is_in_view(tmp_path):
    """Also among chunks of many lines, whose height is not known before they are seen."""
    text = b"".join(b"\n" * 14 + b"x" if c % 3 else b"all on one line"[:TEXT] for c in range(600))
    seen = Trace(tiny(), torch.tensor([*text], device=DEVICE), bytes)
    seen.page(tmp_path / "page.html", "lines", 451)
    script = """
setTimeout(() => { const {top, bottom} = rows[451].getBoundingClientRect();
                   document.body.dataset.seen = top >= 0 && bottom <= innerHeight; }, 2000);
"""
    assert 'data-seen="true"' in in_browser(tmp_path / "page.html", script, tmp_path)


@pytest.mark.skipif(not BROWSER, reason="no Chromium is installed")
@pytest.mark.parametrize("size", ["1200,760", "400,800"])
def test_the_page_of_2000_chunks(size, tmp_path):
    """Small, complete, and by keyboard: down, to the heaviest, and back. No wider than a phone."""
    seen, page = trace(2000 * TEXT), tmp_path / "page.html"
    seen.page(page, "2,000 chunks", 7)
    assert page.stat().st_size < 3e6 and len(data_of(page)["chunks"]) == 2000
    script = """
const press = key => dispatchEvent(new KeyboardEvent("keydown", {key, cancelable: true})), steps = [];
rows[1000].click();
for (const key of ["ArrowDown", "ArrowUp", "ArrowLeft", "ArrowRight"]) { press(key); steps.push(chosen); }
document.body.dataset.steps = steps.join(" ");
document.body.dataset.marked = marked.map(row => rows.indexOf(row)).sort().join(" ");
document.body.dataset.wide = document.documentElement.scrollWidth > innerWidth;
"""
    dom = in_browser(page, script, tmp_path, size)
    heaviest = seen.best(0, 1000)[0][0]
    assert f'data-steps="1001 1000 {heaviest} 1000"' in dom
    assert f'data-marked="{" ".join(sorted(str(slot[0]) for slot in seen.best(0, 1000)))}"' in dom
    assert 'data-wide="false"' in dom
