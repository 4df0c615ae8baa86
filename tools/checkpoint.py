"""Checkpoints: written whole or not at all, and checked before anything is made of them."""
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from fast.files import Damaged, atomic_file, load_saved, saved_config
from gca import Mistake, require
from model import DRT
from tasks.text import NEWLINES

PARTS = dict(config=dict, model=dict)               # of every checkpoint, and of one that a run has written:
RUN_PARTS = PARTS | dict(optimizer=dict, step=int, length=int, tokenizer=str, settings=dict)


def save_checkpoint(path, model, **state):
    """Write model and state, atomically; the checkpoint that was there stays as NAME.prev.pt."""
    path = Path(path)
    with atomic_file(path) as file:
        torch.save(dict(config=asdict(model.config), model=model.state_dict(), **state), file)
        if path.exists():
            previous = path.with_suffix(f".prev{path.suffix}")
            linked = previous.with_name(previous.name + ".partial")
            linked.unlink(missing_ok=True)
            try:
                os.link(path, linked)           # a second name, so that the first is there at all times
            except OSError:                     # a file system without such names
                linked = path
            os.replace(linked, previous)


def load_checkpoint(path, device, parts=PARTS):
    """A checkpoint's model, ready to read (eval mode), and all that was saved with it.

    path: the file, or the folder of its run; parts: {name: type} that it must hold. ValueError if it is not
    one of ours.
    """
    path = Path(path, "ckpt.pt") if Path(path).is_dir() else Path(path)
    require(path.is_file(), f"no checkpoint at {path}; train.py writes ckpt.pt to its --out")
    state = load_saved(path, "a checkpoint of train.py", parts)
    weights = {name.replace("_orig_mod.", ""): x for name, x in state["model"].items()}     # of torch.compile
    try:
        config = saved_config(state["config"])
        claimed = shapes(config)                # compared with the file's, before anything is allocated
        require(claimed == {name: x.shape for name, x in weights.items()}, "other tensors")
    except Exception as error:
        raise Damaged(f"{path} is damaged, or of another model.py: its tensors are not those of its "
                      "settings") from error
    model = DRT(config).to(device)
    model.load_state_dict(weights)
    state["model"] = weights
    if "straddle" in state.get("settings", {}):                 # what --anywhere was called
        state["settings"]["anywhere"] = state["settings"].pop("straddle")
    if "tokenizer" in state:
        model.newline = NEWLINES.get(state["tokenizer"], 0)     # what fast.generate pads prompts with
    return model.eval(), state


def shapes(config):
    """{name: shape} of the tensors of a model, which is not made."""
    with torch.device("meta"):
        return {name: x.shape for name, x in DRT(config).state_dict().items()}


def load_run(out, device):
    """The state of the run in out; ValueError if it is damaged, which says so if there is one before it."""
    path, previous = out / "ckpt.pt", out / "ckpt.prev.pt"
    try:
        state = load_checkpoint(path, device, RUN_PARTS)[1]
        if state["step"] < 1:
            raise Damaged(f"{path} is damaged: its step is {state['step']}")
        return state
    except Damaged as error:
        try:
            step = load_checkpoint(previous, device, RUN_PARTS)[1]["step"]
        except ValueError:
            raise error from None
        raise Mistake(f"{error}; the checkpoint before it is whole: mv {previous} {path}, then --resume "
                         f"from step {step}") from None


def load_optimizer(optimizer, state):
    """ValueError if the state is not one of this optimizer."""
    try:
        optimizer.load_state_dict(state)
        require(state["state"] and all(p.shape == optimizer.state[p][name].shape for p in optimizer.state
                                       for name in ("exp_avg", "exp_avg_sq")), "other tensors")
    except Exception as error:              # whatever torch makes of foreign numbers
        raise Damaged("the checkpoint is damaged: its optimizer is not that of its model") from error


def check_first(state, path, config, tokenizer):
    """ValueError if a checkpoint (or None) does not fit a run that is to begin with its weights."""
    if state:
        require(state["tokenizer"] == tokenizer,
                f"--init_from: {path} has tokens of {state['tokenizer']}, got a corpus of {tokenizer}")
        first = asdict(saved_config(state["config"]))
        for name, value in asdict(config).items():
            before, is_free = first[name], name in ("gumbel", "retriever", "top_k")
            require(is_free or value == before, f"--init_from: {path} has --{name} {before}, got {value}")


def check_corpus(corpus, saved, path, given):
    """ValueError for a corpus that a checkpoint cannot read or, unless given, has not been trained on."""
    found, wanted = (corpus.tokenizer, corpus.vocab_size), (saved["tokenizer"], saved["config"]["vocab_size"])
    flag = "--data" if given else "--ckpt"          # without --data, the corpus is the first checkpoint's
    require(found == wanted, f"{flag} must have the tokenizer and vocabulary of {path}, {wanted[0]} and "
            f"{wanted[1]}, got {found[0]} and {found[1]} in {corpus.name}")
    require(given or saved.get("contents", "") in ("", corpus.contents), f"{corpus.name} holds other text "
            f"than when {path} was trained: prepare it as it was, or give --data to say that this is meant")


def check_space(out, n_parameter, n_file):
    """ValueError where there is no room for so many checkpoints more."""
    needed, folder = n_file * 12 * n_parameter, out.absolute()  # 12: a weight and AdamW's two averages
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    require(free >= needed, f"--out: {out} must have {needed / 2 ** 20:,.0f} MiB free for checkpoints of "
            f"{n_parameter:,} parameters, it has {free / 2 ** 20:,.0f}: lower --n_embd or --n_layer")
