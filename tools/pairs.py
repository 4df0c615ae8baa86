"""Documents and their summaries, for train.py --task summaries.

    docstrings()    functions and modules of the installed packages, and their docstrings' first lines
    from_jsonl()    {"document": .., "summary": ..} a line; test lines may list more "references"

A pair is a dict of these, with "kind" (function, module) where eval.py's table has a row for each kind.
"""
import ast
import json
import re
import textwrap
import warnings
import zlib
from collections import Counter

from gca import Mistake, require
from tools import packages

HAVE_DOCSTRINGS = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
FEWEST_WORDS = 3            # in a docstring's first line
SHORTEST = dict(function=100, module=500)                   # characters of a document
MOST_FUNCTIONS = dict(train=60_000, val=2_000, test=2_000)  # of a split; modules are all kept


# ---------------------------------------------------------------- docstrings

def docstrings(most):
    """{split: pairs} of the installed packages, split as packages.split_files() splits them.

    most: characters of the training packages. No document is in two splits.
    """
    files, _ = packages.split_files(most)
    splits, seen = {}, set()
    for split, texts_by_package in files.items():           # test and val before train
        pairs = [pair for texts in texts_by_package.values() for text in texts.values()
                 for pair in pairs_of_file(text) if pair["document"] not in seen]
        seen |= {pair["document"] for pair in pairs}
        pairs.sort(key=lambda pair: zlib.crc32(pair["document"].encode()))
        kept, count = [], Counter()
        for pair in pairs:
            count[pair["kind"]] += 1
            if pair["kind"] == "module" or count["function"] <= MOST_FUNCTIONS[split]:
                kept.append(pair)
        splits[split] = kept
    return splits


def pairs_of_file(text):
    """A file's pairs: each function, and the module, without any docstrings, and their own one's first line.

    The text has tabs for four spaces (packages.py).
    """
    source = re.sub(r"^\t+", lambda tabs: "    " * len(tabs[0]), text, flags=re.M)
    source = source.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                             # of what is odd in the source
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):      # Python 2, or code too deep to parse
        return
    lines = source.split("\n")
    documented = [node for node in ast.walk(tree)
                  if isinstance(node, HAVE_DOCSTRINGS) and ast.get_docstring(node)]
    left_out = {i for node in documented for i in lines_of(node.body[0], lines)}
    for node in documented:
        kind = "module" if isinstance(node, ast.Module) else "function"
        summary = ast.get_docstring(node).strip().split("\n")[0].strip()
        if (isinstance(node, ast.ClassDef) or len(node.body) < 2 or node.body[0].lineno not in left_out
                or len(summary.split()) < FEWEST_WORDS or not is_text(summary)):
            continue
        numbers = range(node.lineno, node.end_lineno + 1) if kind == "function" else range(1, len(lines) + 1)
        rest = [lines[i - 1] for i in numbers if i not in left_out]
        document = packages.with_tabs(textwrap.dedent("\n".join(rest)).strip("\n"))
        if len(document) >= SHORTEST[kind] and is_text(document):
            yield dict(kind=kind, document=document, summary=summary)


def lines_of(docstring, lines):
    """The numbers of the lines that a docstring has, from 1; none where it shares one with code."""
    before = lines[docstring.lineno - 1].encode()[:docstring.col_offset]
    after = lines[docstring.end_lineno - 1].encode()[docstring.end_col_offset:]
    is_alone = not before.strip() and after.strip()[:1] in (b"", b"#")
    return range(docstring.lineno, docstring.end_lineno + 1) if is_alone else []


# ---------------------------------------------------------------- JSONL

def from_jsonl(path):
    """{split: pairs} of a folder's train.jsonl, val.jsonl and test.jsonl, or of one file, split by a hash.

    ValueError for a line that is no pair, by its number.
    """
    if path.is_file():
        splits = dict(train=[], val=[], test=[])
        for pair in read_jsonl(path):
            part = zlib.crc32(pair["document"].encode()) % 20
            splits["val" if part == 0 else "test" if part == 1 else "train"].append(pair)
        require(splits["train"] and splits["val"], f"PATH: {path} has too few pairs for two splits: give a "
                "folder with train.jsonl and val.jsonl")
    else:
        require((path / "train.jsonl").is_file(), f"PATH: {path} must be a .jsonl file, or a folder with "
                "train.jsonl, val.jsonl and test.jsonl")
        splits = {split: [*read_jsonl(path / f"{split}.jsonl")] for split in ("train", "val", "test")
                  if (path / f"{split}.jsonl").is_file()}
    for split in ("train", "val"):
        require(splits.get(split), f"PATH: {path} must hold pairs for {split}, got none")
    return {split: pairs for split, pairs in splits.items() if pairs}


def read_jsonl(path):
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise Mistake(f"{where}: must be a JSON object with document and summary") from None
            require(isinstance(row, dict), f"{where}: must be a JSON object with document and summary")
            yield checked(row, where)


def checked(row, where):
    """The row's document, summary and references; ValueError, which begins with `where`, if it has none."""
    pair = {name: row.get(name) for name in ("document", "summary")}
    for name, text in pair.items():
        require(isinstance(text, str), f"{where}: {name} must be text, got {text!r:.40}")
        require(text.strip(), f"{where}: {name} must not be empty")
    references = row.get("references", [])
    require(isinstance(references, list) and all(isinstance(x, str) and x.strip() for x in references),
            f"{where}: references must be a list of texts, got {references!r:.40}")
    for text in (*pair.values(), *references):
        require(is_text(text), f"{where}: must be text, without zero bytes and halves of surrogate pairs")
    return pair | (dict(references=references) if references else {})


def is_text(text):
    """Whether a corpus can hold it: zero bytes stand between documents there."""
    return not re.search("[\0\ud800-\udfff]", text)
