"""What a DRT is trained and measured on: batches, loss and score of each task side by side, in one file.

A task is a class that train.py and eval.py ask, by these names:

    Task(settings, corpus)                  settings: those of a run, {flag: value}
    lengths(), check(length)                the context lengths of training; ValueError where one does not fit
    batch(step, length, size)               the arrays of a training step, (size, length) each
    loss(model, *batch)                     the loss, and a number for each name in METRICS
    score(model, step, length, size)        how it does on unseen text: a number for each name in SCORES
    next_length(length, step, score)        the context length of the next step
    measure(model, read, lengths, n, seed)  the table after training, a row at a time; read: eval.py's Reader
    measured_on()                           the text that it is measured on, for the report
    REPORT, TITLE                           the file that the table goes to, and what stands above it

To add a task, write one file here, and name its class in eval.py's TASKS. (haystack.py belongs to needles.py:
what a context with needles holds.)
"""
