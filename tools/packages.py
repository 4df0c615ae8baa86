"""The source of the installed Python packages and of the standard library: a corpus without a download.

A document is a package: its files in sorted order, each below a line with its path. Indentation by four
spaces is written as a tab, because GPT-2 has no token for many spaces. Code repeats itself over long
distances, so a language model gains from what it can look up.
"""
import hashlib
import re
import sys
import sysconfig
from pathlib import Path

from gca import require
from tasks.text import text_files

LEAST = 200_000             # characters of a package
LARGE = 400_000             # of a document that is long enough to measure long contexts in
N_LARGE = 3                 # such documents in the validation and test splits, at least,
ENOUGH = 0.03               # and this share of all characters
TOO_MUCH = 0.08             # of all characters: larger packages are for training
VENDORED = {"_vendor", "vendor", "_vendored_packages", "vendored", "third_party", "_third_party", "externals",
            "extern", "__pycache__", "node_modules", "site-packages", "dist-packages"}


def installed_packages():
    """{package: {name: path} of its files}; the single modules of the standard library are `python`."""
    packages = {}
    for kind in ("purelib", "platlib", "stdlib"):
        folder = Path(sysconfig.get_path(kind))
        for path in text_files(folder, ".py")[0]:
            inside = path.relative_to(folder)
            if not VENDORED & {*inside.parts}:
                of_a_module = "python" if kind == "stdlib" else inside.stem
                name = inside.parts[0] if len(inside.parts) > 1 else of_a_module
                packages.setdefault(name, {})[inside.as_posix()] = path
    return packages


def read_package(files):
    """{name: text} of its files that can be read and are UTF-8."""
    texts = {}
    for name, path in files.items():
        try:
            text = path.read_bytes().decode()
        except (OSError, UnicodeDecodeError):
            continue
        if text.strip() and "\0" not in text:
            texts[name] = with_tabs(text)
    return texts


def with_tabs(text):
    return re.sub(r"^(?: {4})+", lambda spaces: "\t" * (len(spaces[0]) // 4), text, flags=re.M)


def split_packages(sizes):
    """{package: characters} -> {split: names}, by a hash of the names. Large packages are for training.

    ValueError where they do not suffice for three splits.
    """
    def n_large(names):
        return sum(sizes[name] >= LARGE for name in names)

    order = sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest())
    splits, total = dict(train=[], val=[], test=[]), sum(sizes.values())
    for name in order:
        wanting = [split for split in ("test", "val")
                   if n_large(splits[split]) < N_LARGE or sum(map(sizes.get, splits[split])) < ENOUGH * total]
        if sizes[name] > TOO_MUCH * total or not wanting:
            wanting = ["train"]
        splits[min(wanting, key=lambda split: len(splits[split]))].append(name)
    for split, names in splits.items():
        require(n_large(names) >= (1 if split == "train" else N_LARGE),
                f"packages: {sys.executable} has too few for three splits: {split} would have only "
                f"{n_large(names)} with {LARGE:,} characters or more; install others")
    return splits


def documents(most=None):
    """{split: {package: text}}, and {split: how many files were left out as copies}; most: as split_files."""
    files, copies = split_files(most)
    return {split: {name: "".join(f"# {path}\n{text.rstrip()}\n\n" for path, text in texts.items())
                    for name, texts in packages.items()} for split, packages in files.items()}, copies


def split_files(most=None):
    """{split: {package: {path: text}}}, and {split: how many files were left out as copies}.

    A file is a copy if most of its lines are in a split that is measured on, as those of a package that is
    installed under two names. most: characters of training text, at most.
    """
    packages = {name: read_package(files) for name, files in installed_packages().items()}
    sizes = {name: sum(map(len, texts.values())) for name, texts in packages.items()}
    splits = split_packages({name: size for name, size in sizes.items() if size >= LEAST})
    seen, copies, result = set(), dict.fromkeys(splits, 0), {}
    for split in ("test", "val", "train"):              # what is measured on was never trained on
        result[split], here, room = {}, set(), most if split == "train" and most else float("inf")
        for name in splits[split]:
            kept = {}
            for path, text in packages[name].items():
                lines = long_lines(text)
                if len(lines & seen) > len(lines) / 2:
                    copies[split] += 1
                elif room >= len(text):
                    kept[path] = text
                    room -= len(text)
                    here |= lines if split != "train" else set()
            if kept:
                result[split][name] = kept
        seen |= here
    return result, copies


def long_lines(text):
    """Its lines that say more than `return None`: two files that share most of them are copies."""
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= 25}
