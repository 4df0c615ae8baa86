"""The paper's data sets (Sec. 4), row by row from the Hugging Face hub; they need the package datasets."""
import json

from gca import Mistake

# Arguments of datasets.load_dataset, the names of the splits there, and what of a row is meant: its text, or
# document and summary. The arXiv part of proof-pile is ArXiv-math.
PROOF_PILE = "hf://datasets/hoskinson-center/proof-pile"
SPLITS = dict(train="train", val="validation", test="test")
DATASETS = {
    "pg19": (dict(path="emozilla/pg19"), SPLITS, lambda row: row["text"]),
    "arxiv-math": (dict(path="json", data_files=dict(train=f"{PROOF_PILE}/train/*.jsonl.gz",
                                                     val=f"{PROOF_PILE}/dev/*.jsonl.gz",
                                                     test=f"{PROOF_PILE}/test/*.jsonl.gz")),
                   dict(train="train", val="val", test="test"),
                   lambda row: row["text"] if json.loads(row["meta"]).get("config") == "arxiv" else None),
    "xsum": (dict(path="EdinburghNLP/xsum"), SPLITS,
             lambda row: dict(document=row["document"], summary=row["summary"])),
    "cnn_dailymail": (dict(path="abisee/cnn_dailymail", name="3.0.0"), SPLITS,
                      lambda row: dict(document=row["article"], summary=row["highlights"])),
}
WITH_SUMMARIES = "xsum", "cnn_dailymail"


def splits_of(name):
    """{split: (its rows, which are downloaded as they are asked for, and its name on the hub)} of a data set.

    ValueError without the package, or, from the rows, where the hub cannot be read.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise Mistake(f"{name} needs the package datasets: pip install datasets") from error
    arguments, names, wanted = DATASETS[name]

    def rows(split):
        try:
            for row in load_dataset(**arguments, split=split, streaming=True):
                if found := wanted(row):
                    yield found
        except Exception as error:              # of the network, in many shapes
            words = str(error).split("\n")[0] or type(error).__name__
            raise Mistake(f"{name}: the data set could not be read from the Hugging Face hub ({words}); "
                          "what is whole in --out is kept for the next try") from error

    return {split: (rows(theirs), theirs) for split, theirs in names.items()}
