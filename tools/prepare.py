"""Corpora for train.py --data: token ids in train.bin, val.bin (and test.bin), uint16, and meta.json.

    python -m tools.prepare text FOLDER --out data/mine     a folder of .txt files, one document a file
    python -m tools.prepare pg19                            the paper's corpora, from the Hugging Face hub
    python -m tools.prepare arxiv-math                      (they need the package datasets)
"""
import hashlib
import json
import multiprocessing
import os
import sys
import zlib
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gca import require
from tasks.text import load_tokenizer
from tools import cli

# ---------------------------------------------------------------- a folder of text -> a corpus

def split_documents(folder):
    """{split: paths} of a folder's .txt files: its own train, val and test, or one in twenty for val."""
    splits = {name: sorted((folder / name).rglob("*.txt")) for name in ("train", "val", "test")}
    if not splits["train"]:
        files = sorted(folder.rglob("*.txt"))
        require(len(files) >= 2,
                f"{folder} must hold at least two .txt files, a document each, got {len(files)}")
        drawn = sorted(files, key=lambda path: zlib.crc32(path.relative_to(folder).as_posix().encode()))
        n_val = max(1, len(files) // 20)
        splits = dict(train=sorted(drawn[n_val:]), val=sorted(drawn[:n_val]))
    require(splits["val"], f"{folder}/val must hold .txt files, as {folder}/train does")
    return {name: files for name, files in splits.items() if files}


def tokenize(document, tokenizer, errors):
    """The tokens of a document (a path, or its text) and the separator, (n,) uint16, and its size in bytes.

    None if it is not UTF-8 text.
    """
    tokenizer = load_tokenizer(tokenizer)
    data = document.encode() if isinstance(document, str) else document.read_bytes()
    try:
        text = data.decode(errors=errors)
    except UnicodeDecodeError:
        return None
    if b"\0" in data:
        return None
    return np.append(tokenizer.encode(text), tokenizer.separator).astype(np.uint16), len(data)


def prepare(splits, out, tokenizer, errors="strict"):
    """Write out/train.bin, val.bin (and test.bin), uint16, and meta.json. A split that is there is kept.

    splits  {name: (documents, how many (None: unknown), what identifies them)}
    """
    kind = load_tokenizer(tokenizer)
    out.mkdir(parents=True, exist_ok=True)
    meta = dict(tokenizer=tokenizer, vocab_size=kind.vocab_size, errors=errors, splits={})
    old = json.loads((out / "meta.json").read_text()) if (out / "meta.json").is_file() else {}
    for split, (documents, number, identity) in splits.items():
        source = hashlib.sha256(json.dumps([tokenizer, errors, identity]).encode()).hexdigest()
        done = old.get("splits", {}).get(split, {})
        if done.get("source") != source or not (out / f"{split}.bin").is_file():
            done = write_split(out / f"{split}.bin", documents, number, tokenizer, errors)
        meta["splits"][split] = done | dict(source=source)
        write_atomically(out / "meta.json", json.dumps(meta, indent=1) + "\n")
        print(f"{split}: {done['documents']:,} documents, {done['tokens']:,} tokens, "
              f"{done['skipped']:,} skipped (not UTF-8 text)")


def write_split(path, documents, number, tokenizer, errors):
    """Tokenize documents, in order and in parallel, into one .bin; atomic. Returns counts and a hash."""
    partial_path, digest = path.with_name(path.name + ".partial"), hashlib.sha256()
    count, documents, work = Counter(), iter(documents), partial(tokenize, tokenizer=tokenizer, errors=errors)
    with multiprocessing.Pool() as pool, open(partial_path, "wb") as file, \
            tqdm(desc=path.stem, total=number, unit="document") as bar:
        while group := list(islice(documents, 256)):            # a pool would read all of a stream at once
            for done in pool.imap(work, group):
                bar.update()
                if done is None:
                    count["skipped"] += 1
                    continue
                tokens, size = done
                file.write(tokens.tobytes())
                digest.update(tokens.tobytes())
                count.update(tokens=len(tokens), bytes=size, documents=1)
    if not count["documents"]:
        partial_path.unlink()
        raise ValueError(f"{path.stem} must hold UTF-8 text, got none; --errors replace takes others")
    os.replace(partial_path, path)
    return dict(tokens=count["tokens"], bytes=count["bytes"], documents=count["documents"],
                skipped=count["skipped"], sha256=digest.hexdigest())


def prepare_text(folder, out, tokenizer, errors):
    """A folder of .txt files -> a corpus in out."""
    def identity(files):
        return [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in files]

    splits = split_documents(folder)
    prepare({name: (files, len(files), identity(files)) for name, files in splits.items()},
            out, tokenizer, errors)


# Data sets of the paper (Sec. 4), on the Hugging Face hub: arguments of datasets.load_dataset, the names of
# the splits there, and which rows are meant. The arXiv part of proof-pile is ArXiv-math.
PROOF_PILE = "hf://datasets/hoskinson-center/proof-pile"
DATASETS = {
    "pg19": (dict(path="emozilla/pg19"),
             dict(train="train", val="validation", test="test"),
             lambda row: True),
    "arxiv-math": (dict(path="json", data_files=dict(train=f"{PROOF_PILE}/train/*.jsonl.gz",
                                                     val=f"{PROOF_PILE}/dev/*.jsonl.gz",
                                                     test=f"{PROOF_PILE}/test/*.jsonl.gz")),
                   dict(train="train", val="val", test="test"),
                   lambda row: json.loads(row["meta"]).get("config") == "arxiv"),
}


def prepare_dataset(name, out, tokenizer):
    """Download one of DATASETS, row by row, into a corpus in out."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(f"{name} needs the package datasets: pip install datasets") from error
    arguments, names, wanted = DATASETS[name]

    def texts(split):
        for row in load_dataset(**arguments, split=split, streaming=True):
            if wanted(row):
                yield row["text"]

    prepare({split: (texts(theirs), None, [name, theirs]) for split, theirs in names.items()}, out, tokenizer)


def write_atomically(path, text):
    partial_path = path.with_name(path.name + ".partial")
    partial_path.write_text(text)
    os.replace(partial_path, path)


# ---------------------------------------------------------------- command line

def main(argv=None):
    parser = cli.Parser(description="Prepare a corpus.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=cli.Parser)
    text = commands.add_parser("text", description="Tokenize a folder of .txt files, one document a file.")
    text.add_argument("folder", type=Path, help="holds the files, or folders train, val and test that do")
    text.add_argument("--out", type=Path, required=True, help="folder to write train.bin and val.bin to")
    text.add_argument("--errors", choices=["strict", "replace"], default="strict",
                      help="what is not UTF-8: skip the document, or replace the characters (%(default)s)")
    for name in DATASETS:
        download = commands.add_parser(name, description=f"Download {name} (needs the package datasets).")
        download.add_argument("--out", type=Path, default=Path("data") / name, help="default: %(default)s")
    for command in commands.choices.values():
        command.add_argument("--tokenizer", choices=["gpt2", "bytes"], default="gpt2",
                             help="default: %(default)s")
    args = parser.parse_args(argv)
    with cli.mistakes_in_one_line(parser):
        if args.command == "text":
            prepare_text(args.folder, args.out, args.tokenizer, args.errors)
        else:
            prepare_dataset(args.command, args.out, args.tokenizer)


if __name__ == "__main__":
    main(sys.argv[1:])
