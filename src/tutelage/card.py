"""The model card: README.md beside an exported model."""

from __future__ import annotations

import json
import re
from html import escape

from tutelage.results import RunRecord, told_of_probes
from tutelage.visible import visible

__all__ = ["code", "markdown", "model_card"]


def markdown(text: object) -> str:
    """A text as Markdown that shows it as it is: no emphasis, link, table, tag, mention or new line comes of it.

    >>> markdown("a*b* <i>|\\nhttp://x")
    'a&#42;b&#42; &lt;i&gt;&#124;&#92;nhttp&#58;//x'
    """
    shown = escape(visible(text, lines=False).replace("\t", " "), quote=False)
    shown = re.sub(
        r"[\\`*{}\[\]()#+!|~$@:\"']|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])", lambda found: f"&#{ord(found[0])};", shown
    )
    shown = re.sub(r"^(-+|=+|\d+[.)])(?=\s|$)", lambda found: "".join(f"&#{ord(char)};" for char in found[0]), shown)
    return shown.replace("www.", "www&#46;")


def code(text: object) -> str:
    """A name as Markdown that shows it as it is, as code."""
    shown = markdown(text)
    return f"`{shown}`" if shown == str(text) else f"<code>{shown}</code>"


def model_card(record: RunRecord) -> str:
    """A README.md for the model: what made it, with which settings, and what was found on held-out rows."""
    epochs = record.demonstration_epochs
    lines = [
        "---",
        "library_name: " + ("peft" if record.settings.get("adapter") else "transformers"),
        "tags: [tutelage, " + json.dumps(record.algorithm) + "]",
        "---",
        "",
        f"# {markdown(record.name)}",
        "",
        f"Trained with **{markdown(record.algorithm)}** by tutelage, starting from {code(record.model)}, on "
        f"{code(record.dataset)} "
        f"(seed {record.seed}{'' if epochs is None else f', {epochs:g} passes over the demonstrations'}).",
        "",
        *([record.card, ""] if record.card else []),
        "## Settings",
        "",
        "| setting | value |",
        "| --- | --- |",
        *(
            f"| {markdown(name)} | {markdown(value)} |"
            for name, value in {**record.settings, **told_of_probes(record)}.items()
        ),
        "",
        "## Results on held-out rows",
        "",
    ]
    if record.evaluation is None:
        lines.append("No held-out data was given.")
    else:
        lines += ["| quantity | mean | 95% interval | n |", "| --- | --- | --- | --- |"]
        lines += [
            f"| {markdown(name)} | {found.mean:.4g} | {found.low:.4g} to {found.high:.4g} | {found.n} |"
            for name, found in record.evaluation.means.items()
        ]
        lines += [f"\n{markdown(note)}" for note in record.evaluation.notes]
    return "\n".join([*lines, ""])
