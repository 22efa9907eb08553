"""Table and pictures of the ablation's results; `python -m benchmarks.ablation --report` writes them.

Records are those of benchmarks/ablation.py: one run each, a variant's runs differ in their seeds. Distances are the
pixel-space Fréchet distances; ± and bars are standard deviations over seeds.
"""

import re
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot

from utils.files import atomic_file

matplotlib.use("Agg")  # no window

Results = dict[str, list[dict]]  # variant -> its runs


def values(run: dict, metric: str) -> list[float]:
    """Of a metric, along the guidance scales."""
    return [point[metric] for point in run["points"]]


def at_scale(runs: list[dict], scale: float, metric: str) -> list[float]:
    """Of a metric at one guidance scale, by run."""
    return [point[metric] for run in runs for point in run["points"] if point["cfg_scale"] == scale]


def distance_at_level(run: dict, level: float) -> float:
    """Distance where class agreement first reaches `level`, linear between guidance scales; nan where it never does."""
    before = None
    for agreement, distance in zip(values(run, "class_agreement"), values(run, "pixel_frechet")):
        if agreement >= level:
            if before is None:
                return distance
            return float(np.interp(level, (before[0], agreement), (before[1], distance)))
        before = agreement, distance
    return float("nan")


def norms(run: dict) -> tuple[float, float]:
    """Norm of the first and of the last token before its projection, as trained, at the strongest guidance probed."""
    strongest = max(entry["cfg_scale"] for entry in run["probe"])
    is_flat = re.search("--projection (none|decoder)", run["flags"]["svae"])
    wanted = strongest, "none" if is_flat else "all"
    norm = next(entry["norm"] for entry in run["probe"] if (entry["cfg_scale"], entry["projection"]) == wanted)
    return norm[0], norm[-1]


def mean_text(found: list[float], digits: int) -> str:
    """Mean ± deviation as text; a dash where a run has no value."""
    if np.isnan(found).any():
        return "–"
    deviation = f" ± {np.std(found, ddof=1):.{digits}f}" if len(found) > 1 else ""
    return f"{np.mean(found):.{digits}f}{deviation}"


def table(results: Results, floor: dict, level: float) -> str:
    """Markdown: a row for each variant, by KL weight and then by measured nats per token; real images last.

    `level` is the class agreement at which distances are compared.
    """
    runs = next(iter(results.values()))
    scales = values(runs[0], "cfg_scale")
    shown = [scale for scale in dict.fromkeys((1, 3, scales[-1])) if scale in scales]
    inception = [point["cfg_scale"] for point in runs[0]["points"] if "inception_mind" in point]
    head = ["variant", "seeds", "KL weight", "nats per token", "L1 of reconstructions"]
    head += [f"guidance {scale:g}: agreement %, distance" for scale in shown]
    head += [f"distance at {100 * level:g} % agreement", "norm of first → last token"]
    head += [f"guidance {scale:g}: Inception MIND" for scale in inception]
    rows = []
    for name, runs in sorted(results.items(), key=lambda pair: (pair[1][0]["kl_weight"], mean_nats(pair[1]))):
        row = [name, f"{len(runs)}", f"{runs[0]['kl_weight']:g}"]
        row += [mean_text([run[key] for run in runs], n) for key, n in (("nats_per_token", 2), ("recon_loss", 4))]
        for scale in shown:
            agreement = mean_text([100 * share for share in at_scale(runs, scale, "class_agreement")], 1)
            row.append(f"{agreement}, {mean_text(at_scale(runs, scale, 'pixel_frechet'), 2)}")
        row += [mean_text([distance_at_level(run, level) for run in runs], 2)]
        row += ["{:.2f} → {:.2f}".format(*np.mean([norms(run) for run in runs], axis=0))]
        row += [mean_text(at_scale(runs, scale, "inception_mind"), 1) for scale in inception]
        rows.append(row)
    real = ["real images", "", "", "", "", f"{100 * floor['class_agreement']:.1f}, {floor['pixel_frechet']:.2f}"]
    real += [""] * (len(shown) + 1) + [f"{floor['inception_mind']:.1f}" for _ in inception]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows, real))


def mean_nats(runs: list[dict]) -> float:
    return float(np.mean([run["nats_per_token"] for run in runs]))


def draw(path: Path, results: Results, floor: dict, level: float) -> None:
    """Agreement against distance, distance against guidance, and the distance at equal agreement against nats."""
    figure, (frontier, guidance, rate) = pyplot.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    families = list(dict.fromkeys(name.partition("-")[0] for name in results))
    for name, runs in results.items():
        family = name.partition("-")[0]
        is_first = name == next(other for other in results if other.startswith(f"{family}-"))
        drawn = {"linestyle": "-", "marker": "."} if is_first else {"linestyle": "--", "marker": "x", "markersize": 4}
        style = {"label": name, "color": f"C{families.index(family)}", "linewidth": 1.2, "elinewidth": 0.7, **drawn}
        agreement = 100 * np.array([values(run, "class_agreement") for run in runs])  # (seeds, scales)
        distance = np.array([values(run, "pixel_frechet") for run in runs])
        nats, equal = np.array([(run["nats_per_token"], distance_at_level(run, level)) for run in runs]).T
        frontier.errorbar(distance.mean(0), agreement.mean(0), xerr=bars(distance), yerr=bars(agreement), **style)
        guidance.errorbar(values(runs[0], "cfg_scale"), distance.mean(0), yerr=bars(distance), **style)
        rate.errorbar(nats.mean(), equal.mean(), xerr=bars(nats), yerr=bars(equal), **style)
    frontier.axvline(floor["pixel_frechet"], color="grey", linewidth=0.8, label="real images")
    guidance.axhline(floor["pixel_frechet"], color="grey", linewidth=0.8)
    frontier.set(xlabel="pixel-space Fréchet distance", ylabel="class agreement, %")
    guidance.set(xlabel="guidance scale", ylabel="pixel-space Fréchet distance")
    rate.set(xlabel="measured nats per token", ylabel=f"distance at {100 * level:g} % agreement")
    frontier.legend(fontsize=7)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)


def bars(by_seed: np.ndarray) -> np.ndarray | None:
    """Deviations over the first axis, if there is more than one seed."""
    return by_seed.std(0, ddof=1) if len(by_seed) > 1 else None


def write_between(path: Path, name: str, text: str) -> None:
    """Replace what stands in a document between <!-- NAME --> and <!-- end of NAME -->. ValueError where they lack."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, found, rest = path.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{path}: has no lines {begin} and {end}, between which the table belongs; put them in")
    with atomic_file(path) as file:
        file.write(f"{before}{begin}\n{text}\n{end}{after}".encode())
