"""Pictures of what eval.py's --json wrote, by context length."""
import json


def plot(reports, path):
    """A curve for each file of niah, for each model of the others; needs matplotlib."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ValueError("plot needs matplotlib: pip install matplotlib") from error
    tables = {report.stem: json.loads(report.read_text())["rows"] for report in reports}
    if "token_accuracy" in next(iter(tables.values()))[0]:
        panels, curves = dict(token_accuracy="answer tokens right, %"), tables
    else:
        panels, curves = dict(read_tokens_per_second="tokens read per second", peak_gpu_gib="GPU memory, GiB",
                              ms_per_new_token="ms per new token"), {}
        if "perplexity" in next(iter(tables.values()))[0]:
            panels = dict(perplexity="perplexity")
        for row in (row for rows in tables.values() for row in rows):
            curves.setdefault(row["model"], []).append(row)
    figure, axes = plt.subplots(1, len(panels), figsize=(8, 3.6) if len(panels) == 1 else (11, 3.4),
                                layout="constrained", squeeze=False)
    for axis, (key, label) in zip(axes[0], panels.items(), strict=True):
        for name, rows in curves.items():
            axis.plot([row["length"] for row in rows], [row[key] for row in rows], "o-", label=name)
        axis.set(xscale="log", xlabel="tokens of context", ylabel=label)
        if key == "token_accuracy":
            axis.set(ylim=(-3, 103))
        elif key != "perplexity":
            axis.set(yscale="log")
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    figure.savefig(path, dpi=150)
