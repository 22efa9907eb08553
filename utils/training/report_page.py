"""report.html: one file that shows a run: settings, curves, sheets of images by step, metrics with their receipts.

All of it comes from metrics.jsonl and the sheets in the run's folder; images stand in the page itself, as data URIs.
"""

import base64
import html
import io
import json
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from utils.files import atomic_file, printable
from utils.training.metrics_file import NAME, read_metrics
from utils.training.tracker import SHEETS, SIGNED, require_ours

PAGE = "report.html"
MAX_SHEETS = 12  # on the page, spread evenly over those that there are
MAX_SIDE, MAX_BYTES = 1100, 2**18  # pixels and bytes of a sheet; larger ones are shown as JPEG
MAX_POINTS = 1000  # of a curve
HELD_OUT = "held_out_"  # how a loss of images that were left out is called; without it, that of training
BESIDES = {"kind", "step", "time", "epoch", "seconds", "receipt"}  # what a record has besides its values

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2430; background: #f6f7f9; margin: 0; }
main { max-width: 1120px; margin: 0 auto; padding: 24px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 32px 0 12px; }
.note { color: #5a6572; }
.cards, .curves, .sheets { display: grid; gap: 12px; }
.cards { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); margin-top: 16px; }
.curves { grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); }
.sheets { grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); }
.cards div, figure, table, pre { background: #fff; border: 1px solid #e1e5ea; border-radius: 8px; }
.cards div { padding: 10px 14px; } .cards b { display: block; font-size: 21px; }
figure { margin: 0; padding: 10px; } figure img { width: 100%; display: block; }
figcaption { color: #5a6572; font-size: 13px; } .pixels { image-rendering: pixelated; }
table { border-collapse: collapse; width: 100%; overflow: hidden; font-size: 14px; }
th, td { text-align: left; padding: 4px 12px; border-bottom: 1px solid #eef0f3; overflow-wrap: anywhere; }
td.number { font-variant-numeric: tabular-nums; }
.settings { columns: 3; font-size: 13px; overflow-wrap: anywhere; } .settings div { break-inside: avoid; }
pre { padding: 12px; font-size: 12px; white-space: pre-wrap; overflow-wrap: anywhere; margin: 6px 0; }
summary { cursor: pointer; }
"""


def write_or_say_why_not(folder: Path, report: Callable[[str], None]) -> None:
    """write_report; what hinders it is one line, and no error."""
    try:
        write_report(folder)
    except Exception as error:  # of any kind: the run itself is done and saved
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        report(f"could not write {folder / PAGE}: {printable(reason)}; python -m examples.report {folder} tries again")


def write_report(folder: Path) -> Path:
    """Write FOLDER/report.html; its path. ValueError where the folder, or what the page would replace, is no run's."""
    if not (folder / NAME).is_file():
        raise ValueError(f"{folder}: has no {NAME}; name the --results-dir of a run of train.py")
    try:
        require_ours(folder / PAGE)
    except FileExistsError as error:
        raise ValueError(f"{folder}: {error.strerror}") from None
    records, sheets = read_metrics(folder / NAME), sorted((folder / SHEETS).glob("step_*.png"))
    try:
        page = make_page(records, sheets, folder.name)
    except (AttributeError, LookupError, OSError, OverflowError, RecursionError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder / NAME}: holds records that are not as train.py writes them ({reason})") from None
    with atomic_file(folder / PAGE) as file:
        file.write(page.encode())
    return folder / PAGE


def make_page(records: list[dict], sheets: list[Path], name: str) -> str:
    """The page of these records of metrics.jsonl, at least one, and these files step_00001000.png."""
    of_kind = {kind: [r for r in records if r["kind"] == kind] for kind in ("run", "training", "evaluation")}
    starts, training, evaluations = of_kind.values()
    if not starts:
        raise ValueError(f"{NAME} has no line of the kind run: no start of a run")
    settings, last = starts[-1]["settings"], records[-1]
    stage = "S-VAE" if settings["vae_only"] else "AR"
    written = datetime.fromtimestamp(last["time"], UTC)
    shown = spread(sheets, MAX_SHEETS)
    what = "originals above their reconstructions" if settings["vae_only"] else "samples of the first classes"
    return "\n".join([
        "<!DOCTYPE html>",
        f'<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="{SIGNED.decode()}">',
        f"<title>{escape(name)}</title><style>{STYLE}</style></head><body>",
        f"<main><h1>{escape(settings['model'])}, {stage} stage</h1>",
        f'<div class="note">{escape(name)} · last line of {written:%Y-%m-%d %H:%M} UTC · commit '
        f"{escape((starts[-1]['commit'] or 'unknown')[:10])} · {escape(starts[-1]['device'])}</div>",
        f'<div class="cards">{"".join(cards(starts[-1], training, evaluations))}</div>',
        section("Curves", "curves", [curve(title, lines) for title, lines in panels(training, evaluations).items()]),
        section(f"Images by step ({len(shown)} of {len(sheets)} sheets): {what}", "sheets", map(sheet, shown)),
        evaluation_table(evaluations),
        "<h2>Settings</h2>", f'<div class="settings">{"".join(map(setting, settings.items()))}</div>',
        "<h2>Starts</h2>", table(["at step", "on", *starts[-1]["versions"], "commit"], (
            [s["step"], s["device"], *s["versions"].values(), s["commit"]] for s in starts)),
        "</main></body></html>",
    ]) + "\n"  # fmt: skip


def cards(start: dict, training: list[dict], evaluations: list[dict]) -> Iterable[str]:
    """The few numbers that one looks for first."""
    batch, values = start["settings"]["global_batch_size"], {"parameters": start["trainable_parameters"]}
    if training:
        values |= {"steps": training[-1]["step"], "images seen": training[-1]["step"] * batch}
        rates = [record["images/s"] for record in training if record.get("images/s")]
        values["images/s (median)"] = median(rates) if rates else None
    if evaluations:
        values |= {shown_name(name): value for name, value in values_of(evaluations[-1]).items()}
    return (f"<div>{escape(name)}<b>{number(value)}</b></div>" for name, value in values.items())


def panels(training: list[dict], evaluations: list[dict]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Title -> label -> points (step, value): each loss beside the same one of images left out, each metric alone."""
    found: dict[str, dict[str, list]] = {}
    for label, records in (("training", training), ("evaluation", evaluations)):
        for record in records:
            for name, value in values_of(record).items():
                title = name.removeprefix(HELD_OUT)
                line = "held out" if name.startswith(HELD_OUT) else label
                if value is not None:
                    found.setdefault(title, {}).setdefault(line, []).append((record["step"], value))
    return found


def values_of(record: dict) -> dict[str, float | None]:
    return {name: value for name, value in record.items() if name not in BESIDES}


def curve(title: str, lines: dict[str, list[tuple[int, float]]]) -> str:
    """A panel as an SVG in a data URI, where no name inside can clash with another panel's."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    colours = {"training": "#8aa4c8", "held out": "#c2410c", "evaluation": "#0f766e"}
    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}):
        figure = Figure(figsize=(4.4, 2.5))
        axis = figure.add_axes((0.15, 0.12, 0.82, 0.76))
        for label, points in lines.items():
            points = np.array(spread(points, MAX_POINTS))
            marker = "" if label == "training" and len(points) > 1 else "o"
            axis.plot(*points.T, color=colours[label], marker=marker, markersize=4, linewidth=1.3, label=label)
        values = np.array([value for points in lines.values() for _, value in points])
        if title.endswith(("loss", "norm")) and values.min() > 0 and values.max() > 20 * values.min():
            axis.set_yscale("log")
        else:
            axis.locator_params(axis="y", nbins=5)
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
        axis.locator_params(axis="x", nbins=5)
        axis.set_title(f"{title} by step", fontsize=10, loc="left")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1:
            axis.legend(frameon=False)
        picture = io.BytesIO()
        figure.savefig(picture, format="svg", metadata={"Date": None})
    uri = data_uri(picture.getvalue(), "svg+xml")
    return f'<figure><img src="{uri}" alt="{escape(title)} by step"></figure>'


def sheet(path: Path) -> str:
    """A sheet and its step; of what is none, such as a pipe that would be waited for, the name alone."""
    try:
        return picture(path, int(path.stem.removeprefix("step_")))
    except Exception:  # Pillow raises a dozen kinds
        return f"<figure><figcaption>{escape(path.name)} is no sheet</figcaption></figure>"


def picture(path: Path, step: int) -> str:
    if not path.is_file():
        raise ValueError
    content, kind = path.read_bytes(), "png"
    with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
        small = max(image.size) < 500
        if len(content) > MAX_BYTES:
            image = image.convert("RGB")
            image.thumbnail((MAX_SIDE, MAX_SIDE))
            smaller = io.BytesIO()
            image.save(smaller, format="JPEG", quality=90)
            content, kind = smaller.getvalue(), "jpeg"
    image = f'<img class="{"pixels" if small else ""}" src="{data_uri(content, kind)}" alt="images at step {step}">'
    return f"<figure>{image}<figcaption>step {step:,}</figcaption></figure>"


def evaluation_table(evaluations: list[dict]) -> str:
    """All evaluations by step, and what made the newest; what made an earlier one stands in metrics.jsonl."""
    if not evaluations:
        return ""
    names = list(dict.fromkeys(name for record in evaluations for name in values_of(record)))
    rows = ([record["step"], *map(record.get, names), record["seconds"]] for record in evaluations)
    receipt = escape(json.dumps(evaluations[-1]["receipt"], indent=2))
    return (
        "<h2>Evaluations</h2>"
        + table(["step", *map(shown_name, names), "seconds"], rows)
        + f"<details><summary>receipt of step {evaluations[-1]['step']:,}</summary><pre>{receipt}</pre></details>"
    )


def setting(item: tuple[str, object]) -> str:
    name, value = item
    return "" if value is None else f'<div><span class="note">{escape(name)}</span> {escape(value)}</div>'


# ---- pieces of HTML ------------------------------------------------------------------------------------------------


def section(title: str, kind: str, items: Iterable[str]) -> str:
    items = list(items)
    return f'<h2>{escape(title)}</h2><div class="{kind}">{"".join(items)}</div>' if items else ""


def table(head: list[str], rows: Iterable[Iterable[object]]) -> str:
    def cell(value: object, tag: str = "td") -> str:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return f"<{tag}{' class=number' if is_number else ''}>{number(value)}</{tag}>"

    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f"<table><tr>{''.join(cell(name, 'th') for name in head)}</tr>{body}</table>"


def number(value: object) -> str:
    """A value as people read it."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else escape(value)


def shown_name(name: str) -> str:
    return name.replace(HELD_OUT, "held out: ")


def spread(items: list, count: int) -> list:
    """At most `count` of them, evenly, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]


def data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def escape(value: object) -> str:
    return html.escape(printable(str(value)))
