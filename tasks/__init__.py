"""What a DRT is trained and measured on: batches, loss and score of each task side by side, in one file.

A task is a class that train.py and eval.py ask, by these names:

    Task(settings, corpus)                  settings: those of a run, {flag: value}; both are kept
    lengths(), check(length)                the context lengths of training; ValueError where one does not fit
    batch(step, length, size)               a training step: tokens and labels (size, length), and what else
    loss(model, *batch)                     the loss, and {name: number} of METRICS
    score(model, step, length, size)        how it does on unseen text: {name: number} of SCORES
    next_length(length, step, score)        the context length of the next step
    measure(model, read, lengths, n, seed)  the table after training, a row at a time; read: tools/reader.py's
    measured_on()                           the text that it is measured on, for the report; of tasks on
                                            corpora with a test split, both take the split, too
    METRICS, SCORES, REPORT, TITLE          names; the file that the table goes to, what stands above it

To add a task, write one file here, and name its class in TASKS. (haystack.py and chains.py belong to
needles.py: what a context with needles holds.)
"""
from importlib import import_module

# Every random draw is a function of one of these, a seed, and a step or length. So a run can resume exactly,
# and evaluation never meets what training has seen.
TRAINING, VALIDATION, EVALUATION = 1, 2, 3

TASKS = {"needles": "Needles", "text": "Text", "summaries": "Summaries"}        # file and class
PAPER_NAMES = {"niah": "needles", "lm": "text"}


def task_class(name):
    """The class of a task, by its name or the paper's."""
    name = PAPER_NAMES.get(name, name)
    return getattr(import_module(f"tasks.{name}"), TASKS[name])
