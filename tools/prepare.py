"""Corpora for train.py --data: token ids in train.bin, val.bin (and test.bin), uint16, and meta.json.

    python -m tools.prepare text FOLDER --out data/mine     a folder of .txt and .md files, a document each
    python -m tools.prepare packages                        the source of the installed Python packages
    python -m tools.prepare pg19                            the paper's corpora, from the Hugging Face hub
    python -m tools.prepare arxiv-math                      (they need the package datasets)

Documents and summaries, for train.py --task summaries, are documents in turn, and val.jsonl and test.jsonl
hold what generated summaries are compared with:

    python -m tools.prepare docstrings                      functions and modules of the installed packages
    python -m tools.prepare summaries PATH --out data/mine  JSONL: {"document": .., "summary": ..} a line
    python -m tools.prepare xsum                            or cnn_dailymail: the paper's (package datasets)
"""
import hashlib
import json
import os
import sys
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))   # also as `python tools/prepare.py`

from fast.files import atomic_file
from gca import require
from tasks.text import load_corpus, load_tokenizer, text_files
from tools import cli, exits, packages, pairs
from tools.hub import DATASETS, WITH_SUMMARIES, splits_of

# ---------------------------------------------------------------- a folder of text -> a corpus

def split_documents(folder):
    """{split: paths} of a folder's text files: its own train, val and test, or one in twenty for val."""
    files, others = text_files(folder, (".txt", ".md"))
    if others:
        first = exits.visible(str(others[0]))
        exits.say(f"{len(others)} left out, because they are hidden or no regular files: {first}"
                  f"{', ..' if len(others) > 1 else ''}")
    splits = {name: [path for path in files if path.relative_to(folder).parts[0] == name]
              for name in ("train", "val", "test")}
    if any(splits.values()):
        require(splits["train"], f"{folder}/train must hold .txt or .md files, as val and test do")
        n_outside = len(files) - sum(map(len, splits.values()))
        if n_outside:
            exits.say(f"{n_outside} left out, because they lie outside of the folders train, val and test")
    else:
        require(len(files) >= 2,
                f"{folder} must hold at least two .txt or .md files, a document each, got {len(files)}")
        drawn = sorted(files, key=lambda path: zlib.crc32(os.fsencode(path.relative_to(folder))))
        n_val = max(1, len(files) // 20)
        splits = dict(train=sorted(drawn[n_val:]), val=sorted(drawn[:n_val]))
    require(splits["val"], f"{folder}/val must hold .txt or .md files, as {folder}/train does")
    return {name: files for name, files in splits.items() if files}


def tokenize(document, tokenizer, errors):
    """The tokens of a document (a path, or its text) and the separator, (n,) uint16, and its size in bytes.

    None if it is not UTF-8 text.
    """
    tokenizer = load_tokenizer(tokenizer)
    data = document.encode() if isinstance(document, str) else document.read_bytes()
    text = text_in(data, errors)
    if text is None:
        return None
    return np.append(tokenizer.encode(text), tokenizer.separator).astype(np.uint16), len(data)


def text_in(data, errors):
    """The UTF-8 text in these bytes, or None: zero bytes stand between documents."""
    try:
        return None if b"\0" in data else data.decode(errors=errors)
    except UnicodeDecodeError:
        return None


def prepare(splits, out, tokenizer, errors="strict", references=None, names=None):
    """Write out/train.bin, val.bin (and test.bin), uint16, and meta.json. A split that is there is kept.

    splits      {name: (documents, how many (None: unknown), what identifies them)}
    references  {split: the contents of SPLIT.jsonl}: every second document is the summary of the one before
    names       {split: of its documents}
    """
    kind, is_new = load_tokenizer(tokenizer), not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        write_corpus(splits, out, tokenizer, kind, errors, references, names)
    except BaseException:
        if is_new and not any(out.iterdir()):
            out.rmdir()
        raise


def write_corpus(splits, out, tokenizer, kind, errors, references, names):
    meta = dict(tokenizer=tokenizer, vocab_size=kind.vocab_size, errors=errors, splits={})
    hashes = {split: digest(data) for split, data in (references or {}).items()}
    meta |= dict(references=hashes) if hashes else {}
    sources = {split: digest(json.dumps([tokenizer, errors, identity]).encode())
               for split, (_, _, identity) in splits.items()}
    there = {split: split_that_is_there(out, split, source) for split, source in sources.items()}
    meta["splits"] = {split: done | dict(source=sources[split]) for split, done in there.items() if done}
    for split, (texts, number, _) in splits.items():
        done = there[split] or write_split(out / f"{split}.bin", texts, number, tokenizer, errors,
                                           (names or {}).get(split, ()))
        require(not (references and done["skipped"]), f"{split}: a document without its summary")
        meta["splits"][split] = done | dict(source=sources[split])
        if split in hashes:
            with atomic_file(out / f"{split}.jsonl") as file:
                file.write(references[split])
        with atomic_file(out / "meta.json") as file:
            file.write((json.dumps(meta, indent=1) + "\n").encode())
        number = f"{done['documents'] // 2:,} pairs" if references else f"{done['documents']:,} documents"
        exits.say(f"{split}: {number}, {done['tokens']:,} tokens, "
                  f"{done['skipped']:,} skipped (not UTF-8, or with a NUL byte)")


def digest(data):
    return hashlib.sha256(data).hexdigest()


def digest_of_file(path):
    written = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2 ** 20):
            written.update(block)
    return written.hexdigest()


def split_that_is_there(out, split, source):
    """What meta.json says of a split made of the same documents, if its file is whole; otherwise None."""
    try:
        done = json.loads((out / "meta.json").read_text(encoding="utf-8"))["splits"][split]
        if done["source"] == source and done["sha256"] == digest_of_file(out / f"{split}.bin"):
            return {name: done[name]
                    for name in ("tokens", "bytes", "documents", "skipped", "sha256", "names")}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass                            # whatever stands there is written anew
    return None


def write_split(path, documents, number, tokenizer, errors, names):
    """Tokenize documents, in order, into one .bin; atomic. Returns counts, a hash, and names.

    In threads, because tiktoken leaves Python to others while it works.
    """
    count, documents, work = Counter(), iter(documents), partial(tokenize, tokenizer=tokenizer, errors=errors)
    written, names, kept, skipped = hashlib.sha256(), iter(names), [], []
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        with atomic_file(path) as file, tqdm(
                desc=path.stem, total=number, unit="document", disable=None) as bar:
            while group := list(islice(documents, 4096)):       # a pool would read all of a stream at once
                for done in pool.map(work, group):
                    bar.update()
                    name = next(names, None)
                    if done is None:
                        skipped.append(name)
                        continue
                    tokens, size = done
                    file.write(tokens.tobytes())
                    written.update(tokens.tobytes())
                    kept.append(name)
                    count.update(tokens=len(tokens), bytes=size, documents=1)
            require(count["documents"], f"{path.stem} must hold UTF-8 text, got none; --errors replace takes "
                    "other text")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    if any(skipped):
        first = ", ".join(map(exits.visible, skipped[:9]))
        exits.say(f"{path.stem}: left out, because they are no text: {first}{', ..' if skipped[9:] else ''}")
    return dict(tokens=count["tokens"], bytes=count["bytes"], documents=count["documents"],
                skipped=len(skipped), sha256=written.hexdigest(), names=[*filter(None, kept)])


def prepare_text(folder, out, tokenizer, errors):
    """A folder of .txt and .md files -> a corpus in out."""
    def identity(files):                # by content: a file may change and keep its size
        return [(path.relative_to(folder).as_posix(), digest_of_file(path)) for path in files]

    splits = split_documents(folder)
    for split, files in splits.items():         # before anything is written
        is_text = any(text_in(path.read_bytes(), errors) is not None for path in files)
        require(is_text, f"{split} must hold UTF-8 text, got none; --errors replace takes other text")
    prepare({split: (files, len(files), identity(files)) for split, files in splits.items()}, out, tokenizer,
            errors, names={split: [path.relative_to(folder).as_posix() for path in files]
                           for split, files in splits.items()})


def prepare_packages(out, tokenizer, most):
    """The installed packages -> a corpus in out, and what went where."""
    splits, copies = packages.documents(most)
    work = {}
    for split, texts in splits.items():
        sizes = ", ".join(f"{name} {len(text) / 1e6:.1f}" for name, text in texts.items())
        exits.say(f"{split}: {sizes} million characters; {copies[split]} files left out as copies")
        identity = [(name, digest(text.encode())) for name, text in texts.items()]
        work[split] = texts.values(), len(texts), identity
    prepare(work, out, tokenizer, names={split: list(texts) for split, texts in splits.items()})
    for line in packages.overlap_in_words(load_corpus(str(out))):
        exits.say(line)


def prepare_pairs(splits, out, tokenizer):
    """{split: pairs} -> a corpus of documents and summaries in turn, and the references in SPLIT.jsonl.

    A line of SPLIT.jsonl is {"kind": .., "references": [..]}; meta.json has the file's hash.
    """
    work, references = {}, {}
    for split, rows in splits.items():
        texts = [text for pair in rows for text in (pair["document"], pair["summary"])]
        work[split] = texts, len(texts), digest(json.dumps(rows).encode())
        lines = [dict(kind=pair.get("kind", "document"), references=pair.get("references", [pair["summary"]]))
                 for pair in rows]
        if split != "train":
            references[split] = "".join(json.dumps(line) + "\n" for line in lines).encode()
    prepare(work, out, tokenizer, references=references)
    encode = load_tokenizer(tokenizer).encode
    longest = max(len(encode(pair["summary"])) for rows in splits.values() for pair in rows)
    exits.say(f"the longest summary has {longest} tokens (train.py --n_summary)")


def prepare_dataset(name, out, tokenizer):
    """Download one of the hub's DATASETS into a corpus in out."""
    splits = splits_of(name)
    if name in WITH_SUMMARIES:
        complete = {split: [pair for pair in rows if all(text.strip() for text in pair.values())]
                    for split, (rows, _) in splits.items()}
        return prepare_pairs(complete, out, tokenizer)
    prepare({split: (rows, None, [name, theirs]) for split, (rows, theirs) in splits.items()}, out, tokenizer)


# ---------------------------------------------------------------- command line

@exits.program
def main(argv=None):
    parser = cli.Parser(description="Prepare a corpus.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=cli.Parser)
    text = cli.add_command(commands, "text", "Tokenize a folder of .txt and .md files, a document each. "
                           "Without folders train and val in it, one file in twenty is for validation.")
    text.add_argument("folder", type=Path, help="holds the files, or folders train, val and test that do")
    text.add_argument("--out", type=cli.folder, required=True, help="for train.bin and val.bin")
    text.add_argument("--errors", choices=["strict", "replace"], default="strict",
                      help="what is not UTF-8: skip the document, or replace the characters (%(default)s)")
    installed = cli.add_command(commands, "packages", "The source of the installed Python packages and "
                                    "of the standard library, a document a package, four spaces as a tab.")
    installed.add_argument("--out", type=cli.folder, default=Path("data/code"), help="default: %(default)s")
    docstrings = cli.add_command(commands, "docstrings", "Functions and modules of the installed "
                                     "packages without their docstring, and its first line.")
    docstrings.add_argument("--out", type=cli.folder, default=Path("data/docstrings"),
                            help="default: %(default)s")
    for command in (installed, docstrings):
        command.add_argument("--most", type=int, default=400, help="millions of characters to train on "
                             "(default: %(default)s)")
    jsonl = cli.add_command(commands, "summaries", 'JSONL, a line {"document": .., "summary": ..}; '
                                'also "references" in test lines: all that are accepted.')
    jsonl.add_argument("path", type=Path, help="a file, or a folder: train.jsonl, val.jsonl (and test.jsonl)")
    jsonl.add_argument("--out", type=cli.folder, required=True, help="folder to write to")
    for name in DATASETS:
        download = cli.add_command(commands, name, f"Download {name} (needs the package datasets).")
        download.add_argument("--out", type=cli.folder, default=Path("data") / name,
                              help="default: %(default)s")
    for command in commands.choices.values():
        command.add_argument("--tokenizer", choices=["gpt2", "bytes"], default="gpt2",
                             help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.command == "text":
        require(args.folder.is_dir(), f"FOLDER: no folder {args.folder}")
        prepare_text(args.folder, args.out, args.tokenizer, args.errors)
    elif args.command in ("packages", "docstrings"):
        require(args.most > 0, f"--most must be positive, got {args.most}")
        load_tokenizer(args.tokenizer)                      # is it there? before all packages are read
        if args.command == "packages":
            prepare_packages(args.out, args.tokenizer, args.most * 10 ** 6)
        else:
            prepare_pairs(pairs.docstrings(args.most * 10 ** 6), args.out, args.tokenizer)
    elif args.command == "summaries":
        require(args.path.exists(), f"PATH: no file or folder {args.path}")
        folder = args.path if args.path.is_dir() else args.path.parent
        require(folder.resolve() != args.out.resolve(), f"--out: {args.out} is PATH's folder: give another")
        prepare_pairs(pairs.from_jsonl(args.path), args.out, args.tokenizer)
    else:
        prepare_dataset(args.command, args.out, args.tokenizer)


if __name__ == "__main__":
    main(sys.argv[1:])
