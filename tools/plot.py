"""Pictures of what eval.py's --json wrote: by length of the context, by document, by distance of copies.

And of log.csv: how training went.
"""
import csv
import json
import math
from collections import Counter, defaultdict
from pathlib import Path

from fast.files import atomic_file
from gca import Mistake, require


def run_names(paths):
    """A name for each file, {path: name}: its folder, or as much of the path as tells the files apart."""
    parts = {path: [*path.absolute().parent.parts[1:], path.stem] for path in map(Path, paths)}
    for n in range(1, max(map(len, parts.values())) + 1):
        for names in ({path: "/".join(x[-n - 1:-1]) for path, x in parts.items()},
                      {path: "/".join(x[-n - 1:]) for path, x in parts.items()}):
            if len(set(names.values())) == len(names):
                return names
    return {path: str(path) for path in parts}


def load_report(path):
    """The rows of a report; ValueError if it is not one."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        kind = kind_of(rows)
        numbers = DRAWN.get(kind, [*PANELS][2:])
        for row in rows:
            require(type(row["length"]) is int and abs(math.log(row["length"])) < 50, "no length")
            require(isinstance(row.get("model", ""), str), "no name")
            require(kind in PANELS or isinstance(row[kind], str), "no document or distance")
            require(all(math.isfinite(row[key]) for key in numbers), "nothing to draw")
    except OSError:
        raise
    except Exception as error:                              # not JSON of eval.py
        raise Mistake(f"{path} must be a report of eval.py niah, ppl or speed --json") from error
    return rows


def load_log(path):
    """Of a log.csv: {step: score of unseen text}, the score's name, and {context length: its first step}."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [*csv.DictReader(file)]
        name = next(column for column in rows[0] if column in SCORES)
        scores = {int(row["step"]): float(row[name]) for row in rows if row[name]}
        begins = {int(row["seq_len"]): int(row["step"]) for row in reversed(rows)}
        require(scores and all(map(math.isfinite, scores.values())), "nothing to draw")
    except OSError:
        raise
    except Exception as error:                              # not written by train.py
        raise Mistake(f"{path} must be a log.csv of train.py, with scores of unseen text") from error
    return scores, name, begins


SCORES = dict(val_loss="loss of unseen text, nats a token",
              val_exact_match="share of whole answers that are right")
# By kind of report, what must be finite. Of eval.py speed: all its panels.
DRAWN = dict(document=["ratio", "low", "high"], last_seen=["share"],     # of no tokens, the loss is nan
             exact_match=["exact_match"], perplexity=["perplexity"])


def kind_of(rows):
    """What the rows of a report are about: a key of PANELS, "document" or "last_seen"."""
    return next(key for key in ("document", "last_seen", *PANELS) if key in rows[0])


PANELS = dict(exact_match="whole answers right, %", perplexity="perplexity",
              read_tokens_per_second="tokens read per second", peak_gpu_gib="GPU memory, GiB",
              ms_per_new_token="ms per new token")
GRAY = "text.color axes.labelcolor axes.edgecolor xtick.color ytick.color".split()
STYLE = dict.fromkeys(GRAY, "gray") | {"axes.facecolor": "none", "figure.facecolor": "none",
                                       "legend.framealpha": 0}      # legible on light pages and on dark ones


def flags(parser):
    parser.add_argument("reports", type=Path, nargs="+",
                        help="what --json wrote, or runs' log.csv; a curve for each, or for each model")
    parser.add_argument("--out", type=Path, default=Path("plot.png"), help="the picture (%(default)s)")


def run(args, device):
    draw(args.reports, args.out)
    return None, None


def draw(reports, path):
    """One curve for each model of each report; needs matplotlib. All reports must be of one kind."""
    is_log = all(report.suffix == ".csv" for report in reports)
    require(is_log or not any(report.suffix == ".csv" for report in reports),
            "plot must have either logs (log.csv) or reports of eval.py, got both")
    tables = {report: load_log(report) if is_log else load_report(report) for report in reports}
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise Mistake("plot needs matplotlib: pip install matplotlib") from error
    with plt.rc_context(STYLE):
        axes = draw_training(plt, tables) if is_log else draw_reports(plt, tables)
        for axis in axes:
            axis.grid(alpha=0.3)
        figure, (handles, labels) = axes[0].figure, axes[0].get_legend_handles_labels()
        columns = max(1, 112 // (max(map(len, labels)) + 8))
        figure.legend(handles, labels, loc="outside upper center", ncols=columns)
        save(figure, path)


def shown(name):
    """The name as matplotlib prints it: no formula, and no label that it hides."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def draw_training(plt, logs):
    """Scores of unseen text by step. Of the first run, dotted lines show where its contexts grow."""
    names, (_, first, begins) = run_names(logs), next(iter(logs.values()))
    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for path, (scores, name, _) in logs.items():
        require(name == first, f"{path} must have the first run's score {first}, it has {name}")
        axis.plot(scores.keys(), scores.values(), label=shown(names[path]))
    labelled = math.inf
    for length, step in begins.items():                     # the last one first
        axis.axvline(step, color="gray", linestyle=":")
        if labelled - step > axis.get_xlim()[1] / 50:       # its label does not lie on the one after it
            axis.annotate(f"{length:,} tokens", (step, 1), (3, -3), xycoords=("data", "axes fraction"),
                          textcoords="offset points", rotation=90, va="top", fontsize=7, color="gray")
            labelled = step
    axis.set(xlabel="step", ylabel=SCORES[first])
    return [axis]


def draw_reports(plt, tables):
    kinds = {report: kind_of(rows) for report, rows in tables.items()}
    kind = next(iter(kinds.values()))
    for report in tables:
        require(kinds[report] == kind, f"{report} must be of the same command as {next(iter(tables))}")
    if kind not in ("document", "last_seen"):
        return draw_lengths(plt, kind, tables)
    require(kind == "last_seen" or len(tables) == 1, "plot must have one report of --by document: its ratios "
            f"are to its own first model, got {len(tables)}")
    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    found = curves(tables)
    require(kind == "last_seen" or len(found) > 1, f"{next(iter(tables))} must have two models or more "
            "for a picture of ratios, got one")
    (draw_ratios if kind == "document" else draw_copies)(axis, found)
    return [axis]


def draw_lengths(plt, kind, tables):
    """A panel for accuracy or perplexity, or one for each quantity of speed, by length of the context."""
    keys = [kind] if kind in ("exact_match", "perplexity") else [
        key for key in [*PANELS][2:] if any(row[key] for rows in tables.values() for row in rows)]
    figure, axes = plt.subplots(1, len(keys), figsize=(8, 3.6) if len(keys) == 1 else (11, 3.4),
                                layout="constrained", squeeze=False)
    for axis, key in zip(axes[0], keys, strict=True):
        for i, (name, rows) in enumerate(curves(tables).items()):
            style = "o-" if i < 10 else "s--"               # matplotlib has ten colours
            axis.plot([row["length"] for row in rows], [row[key] for row in rows], style, label=shown(name))
        axis.set(xscale="log", xlabel="tokens of context", ylabel=PANELS[key])
        if key == "exact_match":
            axis.set(ylim=(-3, 103))
        elif key != "perplexity":
            axis.set(yscale="log")
    return axes[0]


def draw_ratios(axis, tables):
    """Each document's ratio of perplexities to the first model's, lowest first, with 95% of bootstraps."""
    (first, _), *others = tables.items()
    for i, (name, rows) in enumerate(others):
        rows = sorted(rows[:-1], key=lambda row: row["ratio"])                  # the last one is their mean
        ratios = [row["ratio"] for row in rows]
        errors = [[row["ratio"] - row["low"] for row in rows], [row["high"] - row["ratio"] for row in rows]]
        if i == 0:
            names = [row["document"] for row in rows]                           # the others in its order
            axis.set_xticks(range(len(names)), map(shown, names), rotation=45, ha="right", fontsize=7)
        require({row["document"] for row in rows} <= {*names}, f"{name} must have the others' documents")
        at = [names.index(row["document"]) + 0.15 * i for row in rows]
        axis.errorbar(at, ratios, errors, fmt="o", label=shown(name))
    axis.axhline(1, color="gray")
    axis.set(ylabel=f"perplexity over that of {shown(first)}")


def draw_copies(axis, tables):
    """Loss of the tokens whose 4-gram was last seen so far back, a bar for each model."""
    width, same = 0.8 / len(tables), ("last_seen", "length", "share")
    kinds = [[row[key] for key in same] for row in next(iter(tables.values()))]
    for i, (name, rows) in enumerate(tables.items()):
        require([[row[key] for key in same] for row in rows] == kinds,
                f"{name} must be of the same text, length and window as the others")
        middle = (i - (len(tables) - 1) / 2) * width
        axis.bar([j + middle for j in range(len(rows))], [row["loss"] for row in rows], width,
                 label=shown(name))
    axis.set_xticks(range(len(rows)), [f"{row['last_seen']}\n{100 * row['share']:.0f}% of tokens"
                                       for row in rows])
    axis.set(xlabel="tokens since the last time that this and the 3 tokens before it were seen",
             ylabel="loss, nats a token")


def save(figure, path):
    try:
        path = path if path.suffix else path.with_suffix(".png")
        with atomic_file(path) as file:
            figure.savefig(file, format=path.suffix[1:], dpi=150)
    except ValueError as error:                             # of the name's ending
        raise Mistake(f"--out: {path}: {error}") from None
    print(f"{path} is written.")


def curves(tables):
    """{label: rows} of each model; the report's name is part of the label where two have the same name.

    And so is the number of needles, where a model has several tables: rows that repeat a length.
    """
    names, found = run_names(tables), {}
    models = [(report, model) for report, rows in tables.items()
              for model in dict.fromkeys(row.get("model", "") for row in rows)]
    for report, model in models:
        is_unique = model and sum(model == other for _, other in models) == 1
        label = model if is_unique else f"{names[report]}: {model}" if model else names[report]
        rows = [row for row in tables[report] if row.get("model", "") == model]
        by_table, seen = defaultdict(list), Counter()
        for row in rows:
            by_table[seen[row["length"]] if "needles" in row else 0].append(row)
            seen[row["length"]] += 1
        for table in by_table.values():
            most = max(row.get("needles", 0) for row in table)          # short contexts hold fewer
            found[f"{label}, {most} needles" if len(by_table) > 1 else label] = table
    return found
