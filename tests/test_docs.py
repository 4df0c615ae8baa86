"""What README and docs/ say: code prints what stands below it; commands, links and files exist."""
import contextlib
import io
import re

import pytest
import torch

import eval as evaluation
import train
from fast import bench
from gca import triton
from helpers import ROOT, command
from tools import prepare, profiler
from tools.settings import default_settings

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LOG = ROOT / "docs" / "log.md"              # of earlier code: its commands and files may be gone


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)


# ---------------------------------------------------------------- code

def test_the_walkthrough_prints_what_it_says(monkeypatch):
    """Every block, in one session; the last two need the model of the quick start in out/."""
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs/walkthrough.md").read_text(encoding="utf-8")
    pairs = re.findall(r"```python\n(.*?)```\n\n```\n(.*?)```", page, flags=re.S)
    assert len(pairs) == 13 == len(blocks(ROOT / "docs/walkthrough.md", "python"))
    session = {}
    for number, (code, expected) in enumerate(pairs, 1):
        if number == 9 and not triton or number > 11 and not is_of_quick_start(ROOT / "out/ckpt.pt"):
            continue
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, session)
        assert printed.getvalue() == expected, f"step {number}"


def test_a_long_text_is_read_and_asked_as_the_results_say(monkeypatch, tmp_path):
    if not is_of_quick_start(ROOT / "out/ckpt.pt"):
        pytest.skip("the model of the quick start is not in out/")
    monkeypatch.chdir(ROOT)
    code, = blocks(ROOT / "docs/results.md", "python")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code.replace("document.memory", f"{tmp_path}/document.memory"), {})
    assert printed.getvalue().strip() == code.rpartition("# ")[2].strip()


def is_of_quick_start(path):
    quick = default_settings(train.TrainConfig) | train.PRESETS["cpu"]
    saved = torch.load(path, weights_only=True) if path.exists() else dict(settings={}, step=0)
    quick["n_kv_head"] = quick["n_kv_head"] or quick["n_head"]
    return saved["step"] == quick["steps"] and quick.items() <= saved["settings"].items()


def test_the_smallest_model_learns_to_copy_from_far():
    assert len((ROOT / "docs/smallest.py").read_text().splitlines()) <= 80
    last = command("docs/smallest.py").stdout.splitlines()[-1]
    assert re.fullmatch(r"4,096 tokens: (8\d|9\d|100)% of the values copied", last)


# ---------------------------------------------------------------- commands

def commands():
    """{command: page} of all that a shell is told, in blocks and between backticks; quoted words are x."""
    found = {}
    for page in set(PAGES) - {LOG}:
        text = re.sub(r"'[^']*'", "x", "".join(blocks(page, "sh")).replace("\\\n", " "))
        inline = re.findall(r"`(python [^`]+)`", page.read_text(encoding="utf-8").replace("\n", " "))
        for line in [*text.splitlines(), *inline]:
            parts = re.split(r"&&|;|\|", line.partition("#")[0])
            found |= {part: page for part in parts if "python" in part or "torchrun" in part}
    return found


PROGRAMS = {"train.py": train.main, "eval.py": evaluation.main, "tools.prepare": prepare.main,
            "fast.bench": bench.main, "tools.profiler": profiler.main}


@pytest.fixture(scope="module")
def known():
    """What --help says of each program, or of each of its commands."""
    words = {}
    for name, commands in {"train.py": [()], "eval.py": [(x,) for x in evaluation.COMMANDS],
                           "tools.prepare": [(x,) for x in ("text", "packages", "docstrings", "summaries",
                                                            *prepare.DATASETS)],
                           "fast.bench": [()], "tools.profiler": [()]}.items():
        for parts in commands:
            with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit):
                PROGRAMS[name]([*parts, "--help"])
            words[name, *parts] = printed.getvalue()
    return words


def test_every_command_has_the_flags_that_it_is_given(known):
    checked = 0
    for line, page in commands().items():
        words = line.replace("..", "x").split()
        name = next((name for name in PROGRAMS for word in words if word.endswith(name)), None)
        if name is None:
            continue
        rest = words[next(i for i, word in enumerate(words) if word.endswith(name)) + 1:]
        key = (name, rest[0]) if (name, rest[0] if rest else "") in known else (name,)
        assert key in known, f"{page.name}: no such command: {line}"
        for flag in (word for word in rest if word.startswith("--")):
            assert re.search(rf"{flag}\b", known[key]), f"{page.name}: {name} has no {flag}: {line}"
            checked += 1
    assert checked > 20


# ---------------------------------------------------------------- links, files, numbers

def anchors(page):
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if "://" in path:
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: no {path}"
        assert not anchor or anchor in anchors(target), f"{page.name}: no heading {link}"
    for name in re.findall(r"`((?:\w+/)*\w+\.py)\b", text) if page != LOG else ():
        assert (ROOT / name).exists() or [*ROOT.glob(f"*/{name}")], f"{page.name}: no file {name}"


def test_readme_states_the_lines_of_the_files():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"\| \[([\w/]+\.py)\]\(\1\) \| (\d+) \|", readme)
    assert len(rows) >= 7
    for name, lines in rows:
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) == int(lines), name
