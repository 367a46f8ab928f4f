"""Tables of a whole model, which decodes or is fine-tuned."""

from __future__ import annotations

from scripts.benchmarks.report import Report
from scripts.benchmarks.tables.markdown import markdown


def model_table(report: Report) -> str:
    """The table of ``model.json``: medians in milliseconds, a token where decoding, and the peer's over each."""
    names = list(report["cells"][0]["ms"])
    peer = names[0]
    rows = []
    for cell in report["cells"]:
        medians = {name: cell["ms"][name]["p50"] for name in names}
        times = [f"{medians[name]:.2f} ({medians[peer] / medians[name]:.2f}x)" for name in names[1:]]
        rows.append([cell["what"], f"{medians[peer]:.2f}", *times])
    return markdown([f"{report['layers']} layers", *(f"{name} ms" for name in names)], rows)


def model_memory_table(report: Report) -> str:
    """The ``"memory"`` of ``model_int4.json``: the model's weights, and the peak of torch's allocator with them."""
    memory = report["memory"]
    figures = [f"{memory[key]:.2f}" for key in ("weights_gb", "peak_gb")]
    return markdown(["", "weights GB", "peak GB"], [[memory["what"], *figures]])


def greedy_table(report: Report) -> str:
    """The other table of ``model.json``: greedy choices and logits, compared with the peer's at the same tokens."""
    peer = next(iter(report["cells"][0]["ms"]))
    columns = {
        "steps": "steps",
        "same": "same token",
        "beyond": "margin beyond difference",
        "beyond_same": "of these the same",
        "decided": "margin beyond twice that",
        "wrong": "of these wrong",
    }
    return markdown(
        [f"beside {peer}", *columns.values(), "largest difference"],
        [
            [
                row["name"],
                *(str(row[key]) for key in columns),
                f"{row['largest_difference']:.3f} (std of logits {row['std_of_logits']:.2f})",
            ]
            for row in report["greedy"]
        ],
    )


def finetune_table(report: Report) -> str:
    """The table of ``finetune.json``: tokens a second and ours over the peer's, gigabytes, losses of the first seed."""
    peer, ours = report["recipes"][0]["tokens_per_s"]
    rows = []
    for row in report["recipes"]:
        speeds, losses = row["tokens_per_s"], row["loss"]
        rows.append(
            [
                row["recipe"],
                str(speeds[peer]),
                f"{speeds[ours]} ({speeds[ours] / speeds[peer]:.2f}x)",
                *(f"{row['peak_gb'][name]:.1f}" for name in (peer, ours)),
                *(f"{losses[name][0][0]:.3f} to {losses[name][0][-1]:.3f}" for name in (peer, ours)),
                f"{row['difference']:.4f} of {row['noise']:.4f}",
            ]
        )
    columns = [f"{name} {what}" for what in ("tokens/s", "peak GB", "loss") for name in (peer, ours)]
    return markdown([f"LoRA, {report['layers']} layers", *columns, "difference of noise"], rows)
