"""Draw the throughput and latency of a run as charts. matplotlib is imported only when they are drawn."""

from __future__ import annotations

from pathlib import Path

from benchmarks.targets import Results

_CHARTS = (
    ("tokens_per_second", 1, "tokens per second"),
    ("time_to_first_token", 1000, "time to first token, ms"),
    ("time_between_tokens", 1000, "time between tokens, ms"),
)


def draw(results: Results, path: Path) -> None:
    """Write one SVG file with three charts, each plotted against the number of concurrent requests."""
    import matplotlib

    matplotlib.use("svg")
    # A fixed salt: the same figures then give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "the same picture for the same figures"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(_CHARTS), figsize=(14, 4.2), layout="constrained")
    by_batch = results["throughput"]
    batches = [int(batch) for batch in by_batch]
    for axis, (name, factor, title) in zip(axes, _CHARTS, strict=True):
        for peer in by_batch[str(batches[0])]:
            rows = [by_batch[str(batch)].get(peer) for batch in batches]
            points = [(batch, row[name] * factor) for batch, row in zip(batches, rows, strict=True) if row]
            ours = peer.startswith("our ")
            axis.plot(*zip(*points, strict=True), marker="o", label=peer, linewidth=2.5 if ours else 1.2)
        axis.set(xscale="log", yscale="log", title=title, xlabel="concurrent requests")
        axis.set_xticks(batches, [str(batch) for batch in batches])
        axis.minorticks_off()
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(visible=True, alpha=0.3)
    machine = results["machine"]
    figure.suptitle(f"{machine['processor']}, {machine['cores']} cores")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
