"""The source of the installed Python packages and of the standard library: a corpus without a download.

A document is a package: its files in sorted order, each below a line with its path. Indentation by four
spaces is written as a tab, because GPT-2 has no token for many spaces. Code repeats itself over long
distances, so a language model gains from what it can look up.
"""
import hashlib
import re
import sys
import sysconfig
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path

import numpy as np

from gca import require
from tasks.text import documents as find_documents
from tasks.text import load_tokenizer, text_files

LEAST = 80_000              # characters of a package: about 16,000 tokens
HELD_OUT = 0.1, 0.33        # share of all characters that is measured on; the second where packages are few
FEW = 6                     # so many can be held out, or the second share is taken
FAMILY = 0.05               # packages that share so many of their lines are in one split
COMMON = 8                  # a line that more packages have (of a license) says nothing
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


def families(lines):
    """{package: its lines} -> lists of packages that copy from each other, directly or through others."""
    packages_of, shared = defaultdict(list), Counter()
    for name in lines:
        for line in lines[name]:
            packages_of[line].append(name)
    for names in packages_of.values():
        if 1 < len(names) <= COMMON:
            shared.update(combinations(names, 2))
    family = {name: [name] for name in lines}
    for (a, b), n in shared.items():
        if n > FAMILY * min(len(lines[a]), len(lines[b])) and family[a] is not family[b]:
            family[a] += family[b]
            family |= dict.fromkeys(family[b], family[a])
    return [names for first, names in family.items() if first == names[0]]


def split_packages(sizes, families):
    """{package: characters}, and which belong together -> {split: names}, by a hash of the names.

    Families are held out, in turn for test and val, until a tenth of the text or a third of the packages is;
    none of which one is a fifth of that. ValueError where there are too few.
    """
    total, splits = sum(sizes.values()), dict(train=[], val=[], test=[])
    size_of = {names[0]: sum(map(sizes.get, names)) for names in families}
    for share in HELD_OUT:
        small = [names for names in families if size_of[names[0]] <= share / 5 * total]
        if sum(map(len, small)) >= FEW:
            break
    room, most = share * total, len(sizes) // 3
    for names in sorted(small, key=lambda names: hashlib.sha256(names[0].encode()).digest()):
        n_held = len(splits["val"] + splits["test"])
        if n_held + len(names) <= most and size_of[names[0]] <= room:
            splits[min(("test", "val"), key=lambda split: len(splits[split]))] += names
            room -= size_of[names[0]]
    splits["train"] = [name for name in sizes if name not in splits["val"] + splits["test"]]
    for split, least in dict(train=1, val=2, test=2).items():
        require(len(splits[split]) >= least, f"packages: {sys.executable} has too few for three splits: "
                f"{split} would have {len(splits[split])} of {LEAST:,} characters or more; install others")
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
    sizes = {name: sum(map(len, texts.values())) for name, texts in sorted(packages.items())}
    sizes = {name: size for name, size in sizes.items() if size >= LEAST}
    lines = {name: set().union(*map(long_lines, packages[name].values())) for name in sizes}
    splits = split_packages(sizes, families(lines))
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


def overlaps(train, documents, n=8, bits=26):
    """The share of each document's n-grams that the training tokens have, too: what could be remembered."""
    def hashes(tokens):
        h = np.zeros(max(0, len(tokens) - n + 1), np.uint64)
        for i in range(n):
            h = h * np.uint64(0x9E3779B97F4A7C15) + tokens[i:i + len(h)].astype(np.uint64)
        return h

    grams = [np.unique(hashes(tokens)) for tokens in documents]
    wanted = np.unique(np.concatenate(grams))
    may_be, found = np.zeros(2 ** bits, bool), np.zeros(len(wanted), bool)
    may_be[wanted >> np.uint64(64 - bits)] = True               # most of the training text is none of them
    for start in range(0, len(train), 2 ** 22):
        h = hashes(train[start:start + 2 ** 22 + n - 1])
        h = h[may_be[h >> np.uint64(64 - bits)]]
        at = np.searchsorted(wanted, h).clip(max=len(wanted) - 1)
        found[at[wanted[at] == h]] = True
    return [found[np.searchsorted(wanted, x)].mean() if len(x) else 0.0 for x in grams]


def overlap_in_words(corpus):
    """A line for each split that is measured on: its packages, their tokens, and overlaps()."""
    gram = 8 if corpus.tokenizer == "gpt2" else 32              # tokens, or bytes
    for split in ("val", "test"):
        text = getattr(corpus, split)
        starts, sizes = find_documents(text, load_tokenizer(corpus.tokenizer).separator)
        each = [text[i:i + n] for i, n in zip(starts, sizes, strict=True)]
        named = zip(corpus.names[split], sizes, overlaps(corpus.train, each, gram), strict=True)
        yield (f"{split}, tokens, and how many of their {gram}-grams are in train: "
               + ", ".join(f"{name} {n:,} {share:.0%}" for name, n, share in named))
