"""The reproduction on one page: every claim and every table beside ours, every figure, and how each number was made.

Reads results/ and Figures/ only. Writes REPORT.md, Figures/report.html, which needs no other file, and the verdicts in
README.md, between the comments there.

    python report.py
"""

from __future__ import annotations

if __name__ == "__main__":  # first, so that Ctrl-C is answered while the others are imported
    import large_batch.ctrl_c  # noqa: F401

import base64
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from large_batch import cli, files, paper
from large_batch.cli import setting
from large_batch.errors import UserError
from large_batch.ledger import WHY_NOT, Line, cell_verdict, ledger
from large_batch.networks import NAMES
from large_batch.results import Result, largest_sharpness, read, trials
from large_batch.verdicts import PAIR

TITLE = "Large-batch training and sharp minima: the reproduction"
PART = re.compile(r"(?:at )?((?:\w+, )?epsilon [\d.e-]+|\w+):")  # what a line is about, where there are several
SHORT = re.compile(r"(<!-- made by report.py -->).*?(<!-- end -->)", re.DOTALL)
VERDICTS = """
*Holds*: by the rule below. *In direction*: the sign, or a part of the claim, is the paper's, the size or the rest is
not. *Contradicted*: the opposite is clear. *Not met*: a condition that the paper states is not fulfilled. *No verdict*:
one trial, where the effect is not far beyond what seeds differ by, nothing clear, or a training that is not at its end.
"""
AGREEMENT = """
The verdicts of the tables below: *agrees*: the means differ by at most three times the wider deviation (which is no
test: what varies much agrees with much). *same direction*, *contradicts*: they differ by more, and the minimizer
clearly lies on the paper's side, or the other, of the one that it is compared with: augmented data and conservative
training with plain training in batches of that size, SB with LB, and all other LB with SB (Welch's t-test, two-sided,
5 %; of single trials four standard errors of the paper's wider deviation). *no verdict*: that is not clear, a number is
missing, or a training is not at its end.
A table has the seeds of its own command; the claims above count every seed whose accuracy or sharpness some command
wrote to its .csv file. Table 4 has one random subspace of each seed; the claim above has all that were measured.

*largest found* is the largest sharpness that L-BFGS-B or vertex ascent found in ten iterations each, over the seeds
where both were tried. It is a lower bound of the maximum, as each of them is. Compared is the paper's protocol,
L-BFGS-B.
"""
OVER_EPOCHS = """
Accuracies are percent; sharpness is Metric 2.1 over the whole training set, by the paper's protocol. What has a
deviation is of several seeds, the rest of one, of the random subspaces the mean.
"""
ORIGINS = """
The time of its own is that of the command. The other times are those of trainings and measurements that it found, made
by other commands, or by itself before it was stopped; the .json file says of each when and at which commit. F1's
trainings of 100 epochs, seed 0, and C1's, seeds 0, 1 and 2, come with the repository.
"""
TESTS = """
Tests are two-sided where either side gives a verdict, else one-sided. Lines are judged one by one, without a correction
for their number: of many, a few of the verdicts at 5 % may be wrong.
"""
SHOWN = {  # by script and the ending of the figure's name
    "plot_parametric_plot": "Loss and accuracy on the way from SB over LB and beyond",
    "sharpness": "Sharpness by several measures, over factors of the weights",
    "training_curves": "Training and test accuracy by epoch, SB and LB",
    "training_curves-sharpness": "Sharpness over the training loss, from the start to the minimizers of SB and LB",
    "batch_size_sweep": "Test accuracy and sharpness over the batch size",
    "warmstart": "Test accuracy and sharpness of LB over the epochs of SB before it",
    "warmstart-schedule": "Training and test accuracy by epoch, SB, LB and a batch that grows",
    "performance_model": "How long SB and LB take to equal test accuracies, by SB's parallel efficiency",
    "plot_surface": "Contours of the loss around SB and LB",
    "plot_surface-3d": "The loss around SB and LB as a surface",
    "plot_spectrum": "Spectral densities of the Hessian at SB and LB",
    "edge_of_stability": "The largest eigenvalue of the Hessian during training",
    "rank_measures": "Measures of sharpness over the generalisation gap",
    "finetune": "Accuracy over the batch size",
}
STYLE = """
:root { color-scheme: light dark; --edge: #8886; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: auto; padding: 1rem; overflow-wrap: break-word; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: 0.9rem; margin: 1rem 0; }
th, td { border: 1px solid var(--edge); padding: 0.3rem 0.6rem; text-align: left; vertical-align: top; }
th { background: var(--soft); }
img { max-width: 100%; height: auto; background: white; border-radius: 4px; }
code { background: var(--soft); border-radius: 3px; padding: 0 0.2rem; }
@media (max-width: 40rem) {
  thead { display: none; }
  tr, td { display: block; border: 0; }
  tr { border: 1px solid var(--edge); margin-bottom: 0.6rem; }
  td:empty { display: none; }
  td::before { content: attr(data-label) ": "; opacity: 0.7; }
}
"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags."""

    result_dir: str = setting("results", "Where the numbers are.", group="Folders")
    figure_dir: str = setting("Figures", "Where the figures are, and the page goes.", group="Folders")
    report: str = setting("REPORT.md", "Where the text goes.", group="Folders")
    readme: str = setting("README.md", "Where the verdicts in short go, if it is there.", group="Folders")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first row is its head."""
    lines = [f"| {' | '.join(cell.replace('||', '‖').replace('|', '/') or ' ' for cell in row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def claims(lines: Sequence[Line], notes: str) -> str:
    """Return the ledger: what has a result, by which rules it was judged, and what has none, and why.

    `notes` is the address of what is said of the results.
    """
    rows, rules, missing = [["claim", "network", "verdict", "ours", "published", "figure", "from"]], {}, {}
    for line in lines:
        claim = f"{line.claim} ({line.source})"
        if line.results:
            links = ", ".join(f"[{result.command}](#{anchor(result.path)})" for result in line.results)
            drawn = ", ".join(f"[{place}](#figure-{anchor(path)})" for place, path in enumerate(line.figures, 1))
            rows.append([claim, line.network, f"**{line.verdict}**", line.found, line.published, drawn, links])
            rules[claim] = line.rule
        else:
            missing.setdefault(claim, []).append(line.network)
    reasons = [f"{network}: {why}" for network, why in WHY_NOT.items()]
    not_run = (
        f"{'; '.join(reasons)}. The others take hours to days of two cores and have not been run yet with this "
        "version; `python campaign.py --list` says what comes next, and "
        f"[older results]({notes}#batch-sizes) tell of C1's Figures 4 and 5."
    )
    unknown = [["claim", "networks"], *([claim, ", ".join(networks)] for claim, networks in missing.items())]
    judged = "\n\n".join([table([["claim", "it holds where"], *map(list, rules.items())]), TESTS.strip()])
    return "\n\n".join([VERDICTS.strip(), table(rows), "### Rules", judged, "### Not run", not_run, table(unknown)])


def in_short(lines: Sequence[Line]) -> str:
    """Return the verdicts alone, a column for each network with any; of epsilons and methods each its own, where they
    differ."""
    of_networks: dict[str, list[Sequence[Result]]] = {}
    verdicts: dict[str, dict[str, dict[str, str]]] = {}
    for line in (line for line in lines if line.results):
        of_networks.setdefault(line.network, []).append(line.results)
        of = verdicts.setdefault(f"{line.claim} ({line.source})", {}).setdefault(line.network, {})
        part = PART.match(line.found)
        of[part[1] if part else ""] = line.verdict.partition(":")[0]

    def cell(of: dict[str, str]) -> str:
        if len(set(of.values())) < 2:
            return "".join(set(of.values())) or "-"
        if len(of) > 2:
            counts = Counter(of.values())
            return "; ".join(f"{verdict}: {count} of {len(of)}" for verdict, count in counts.most_common())
        return "; ".join(f"{part}: {verdict}" for part, verdict in of.items())

    rows = [[claim, *(cell(of.get(name, {})) for name in of_networks)] for claim, of in verdicts.items()]
    return table([["claim", *(f"{name}, {lengths(found)}" for name, found in of_networks.items())], *rows])


def lengths(results: Sequence[Sequence[Result]]) -> str:
    """Return how long was trained for the results of several claims, and how often, in words."""
    epochs = [one.setting("epochs", 1) for of_claim in results for one in of_claim]
    trials = [len({seed for one in of_claim for seed in one.seeds}) for of_claim in results]
    (few, many), (one, several) = ((min(numbers), max(numbers)) for numbers in (epochs, trials))
    words = f"{few} - {many} epochs" if few < many else f"{few} epochs"
    if one < several:
        return f"{words}, {one} - {several} trials"
    return f"{words}, {one} trials" if one > 1 else f"{words}, 1 trial"


def anchor(path: Path) -> str:
    """Return the name of the heading of a result's file, or, after "figure-", of a figure's."""
    return re.sub(r"[^a-z0-9_ -]", "", path.stem.lower()).replace(" ", "-")


def tables(results: Sequence[Result]) -> str:
    """Return the paper's tables side by side, of each network's longest trainings."""
    parts, seen = [], set()
    for result in results:
        for name in dict.fromkeys(row["table"] for row in result.content.get("rows", ())):
            if result.script != "paper_tables" or not result.usual or (result.network, name) in seen:
                continue
            seen.add((result.network, name))
            rows = [["minimizer", "quantity", "space", "epsilon", "ours", "largest found", "paper", "verdict"]]
            rows += [cells(row, results, result) for row in result.content["rows"] if row["table"] == name]
            used = [column for column in zip(*rows, strict=True) if any(column[1:])]
            told = result.content["tables"][name]
            heading = f"### {told['title']}: {result.network}, {result.training}"
            source = f"[python {result.command}](#{anchor(result.path)})"
            parts += [heading, table(list(zip(*used, strict=True))), told["note"], source]
    return "\n\n".join(filter(None, [AGREEMENT.strip(), *parts])) if parts else "None yet."


def described(path: Path) -> str:
    """Return Tables 1 and 5, as `network_zoo.py` wrote them; "" where it did not."""
    if not path.exists():
        return ""
    content = json.loads(path.read_text("utf-8"))
    parts = [part for title, rows in content["tables"].items() for part in (f"### {title}", table(rows))]
    return "\n\n".join([*parts, f"`python {content['provenance']['command']}`"])


def cells(row: dict[str, Any], results: Sequence[Result], result: Result) -> list[str]:
    """Return the cells of a row of a result's table; of sharpness with the largest that any solver found."""
    known = [value for value in row["values"] if value is not None]
    ours = paper.Spread.of(known).rounded() if known else "-"
    if 0 < len(known) < len(row["values"]):
        ours += f" ({len(known)} of {len(row['values'])})"
    theirs = str(paper.Spread(**row["paper"])) if row["paper"] else "-"
    where = {"epsilon": row["epsilon"], "epochs": result.setting("epochs")}
    full = row["space"] == "full"
    largest = largest_sharpness(results, result.network, row["minimizer"], **where) if full else None
    what = [row["minimizer"], row["quantity"].replace("_", " "), row["space"] or "", f"{row['epsilon'] or ''}"]
    return [*what, ours, largest.rounded() if largest else "", theirs, cell_verdict(row, results, result)]


def over_epochs(results: Sequence[Result]) -> str:
    """Return what is known of SB and LB after each number of epochs, for the networks of which there are several."""
    columns = {
        name: (name.replace(" ", "_"), {}) for name in ("train accuracy", "test accuracy", "distance from start")
    }
    for space, epsilon in product(("full", "random"), paper.EPSILONS):
        columns[f"sharpness, {space}, {epsilon:g}"] = "sharpness", {"space": space, "epsilon": epsilon}
    results = [result for result in results if not result.setting("until_converged")]
    parts = []
    for network in dict.fromkeys(result.network for result in results):
        own = [row for result in results if result.network == network and result.usual for row in result.rows]
        lengths = sorted({int(row["epochs"]) for row in own if row.get("minimizer") in PAIR and row.get("epochs")})
        rows, sources = [["epochs", "minimizer", *columns]], {}
        for length, minimizer in product(lengths, PAIR):
            found = [trials(results, network, (minimizer,), name, epochs=length, **at) for name, at in columns.values()]
            numbers = [str(one[0]) if one else "" for one in found]
            rows += [[str(length), minimizer, *numbers]] if any(numbers) else []
            sources |= {result.path: result for one in found if one for result in one[0].results}
        if len({row[0] for row in rows[1:]}) > 1:
            links = ", ".join(f"[python {result.command}](#{anchor(path)})" for path, result in sources.items())
            parts += [f"### Over epochs: {network}", table(rows), f"From {links}."]
    return "\n\n".join([OVER_EPOCHS.strip(), *parts]) if parts else ""


def figures(results: Sequence[Result], report: Path) -> str:
    """Return all figures, each with its command; the original's curves are behind ours where they exist."""
    parts = []
    for result in results:
        kind = f"{result.script}-schedule" if result.setting("schedule") else result.script
        for path in result.figures:
            shown = SHOWN[kind + path.stem.removeprefix(result.path.stem)]
            words = f"{shown}, {result.network} ({result.command})"
            parts.append(f"### Figure {path.stem}\n\n![{words}]({link(path, report)})\n\n`python {result.command}`")
    return "\n\n".join(parts)


def link(path: Path, report: Path) -> str:
    """Return a file's address, from the report's folder."""
    return quote(os.path.relpath(path, report.parent))


def origins(results: Sequence[Result], report: Path) -> str:
    """Return how each number was made."""
    parts = [ORIGINS.strip()]
    for result in results:
        origin = result.content["provenance"]
        packages = ", ".join(f"{name} {version}" for name, version in origin["packages"].items())
        commit, changed, _ = origin["commit"].partition("+")
        trained, measured = (taken / 60 for taken in seconds(result.content))
        written = [result.path, *filter(Path.exists, [result.path.with_suffix(".csv")])]
        lines = [
            f"`python {result.command}`",
            f"- {result.training}; {origin['wall_seconds'] / 60:.1f} min of its own, {measured:.0f} min for "
            f"measurements and {trained:.0f} min for trainings that it found",
            f"- finished {origin['finished']}",
            f"- at commit {commit[:12]}{' with changes' if changed else ''}; {packages}; Python {origin['python']}",
            f"- {origin['machine']}; {origin.get('processor', 'processor unknown')}",
            f"- numbers: {', '.join(f'[{path.name}]({link(path, report)})' for path in written)}",
        ]
        parts.append("\n".join([f"### {result.path.stem}", "", lines[0], "", *lines[1:]]))
    return "\n\n".join(parts)


def seconds(content: dict[str, Any]) -> tuple[float, float]:
    """Return how long the trainings and the measurements took that a result names, each once.

    A training counts to its last iterate, whose time includes the others'. What the command did itself, while it ran,
    is part of its own time.
    """
    own, trained, measured = content["provenance"], {}, {}

    def finished(origin: dict[str, Any]) -> float:
        return datetime.fromisoformat(origin["finished"]).timestamp()

    began = finished(own) - own["wall_seconds"]

    def add(part: Any) -> None:
        of = (part.get("training") or part.get("provenance")) if isinstance(part, dict) else None
        if of and part is not content:
            recipe = part.get("recipe")
            what, took = (recipe, trained) if recipe else (part["measurement"], measured)
            before = of["wall_seconds"]
            if of["command"] == own["command"]:
                before = min(before, max(0.0, before - (finished(of) - began)))
            key = json.dumps(what | {"epochs": None}, sort_keys=True)
            took[key] = max(before, took.get(key, 0.0))
        for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
            add(inner)

    add(content)
    return sum(trained.values()), sum(measured.values())


def text(results: Sequence[Result], lines: Sequence[Line], report: Path) -> str:
    """Return the report in Markdown."""
    folder = results[0].path.parent
    notes = link(folder / "README.md", report)
    sections = {
        "Claims": claims(lines, notes),
        "Tables": "\n\n".join([described(folder / "network_zoo.json"), tables(results), over_epochs(results)]),
        "Figures": f"{figures(results, report)}\n\nFigures of older results are [beside them]({notes}#batch-sizes).",
        "How each number was made": origins(results, report),
    }
    start = (
        f"# {TITLE}\n\nMade by `python report.py` from `results/`. SB is small-batch, LB large-batch "
        "training. Sharpness is Metric 2.1 in percent, ± the deviation over trials."
    )
    return "\n\n".join([start, *(f"## {name}\n\n{body}" for name, body in sections.items())]) + "\n"


def page(markdown_text: str, report: Path, folder: Path) -> str:
    """Return the report as one HTML page for a folder, the figures within it."""
    import markdown

    body = markdown.markdown(markdown_text, extensions=["tables", "toc"])

    def embedded(match: re.Match) -> str:
        data = base64.b64encode(Path(os.path.normpath(report.parent / unquote(match[1]))).read_bytes()).decode()
        return f'src="data:image/png;base64,{data}"'

    def labelled(match: re.Match) -> str:
        """Give each cell its column's name, which narrow screens show."""
        names = iter(re.findall(r"<th>(.*?)</th>", match[0]) * match[0].count("<tr>"))
        return re.sub("<td>", lambda _: f'<td data-label="{next(names)}">', match[0])

    body = re.sub(r'src="([^":]+\.png)"', embedded, body)
    body = re.sub(r'href="(?!#|http)', f'href="{os.path.relpath(report.parent, folder)}/', body)
    body = re.sub("<table>.*?</table>", labelled, body, flags=re.DOTALL)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{TITLE}</title><style>{STYLE}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def main(settings: Settings) -> None:
    """Read the results and write the text, the page and the verdicts in short."""
    report, folder, readme = Path(settings.report), Path(settings.figure_dir), Path(settings.readme)
    if not (results := read(Path(settings.result_dir), folder)):
        raise UserError(f"There are no results in {settings.result_dir}; name the folder that the commands wrote to.")
    lines = ledger(results, NAMES)
    markdown_text = text(results, lines, report)
    pages = {report: markdown_text.encode(), folder / "report.html": page(markdown_text, report, folder).encode()}
    if readme.exists():
        verdicts = SHORT.sub(lambda match: f"{match[1]}\n{in_short(lines)}\n{match[2]}", readme.read_text("utf-8"))
        pages[readme] = verdicts.encode()
    files.write_all(pages)
    print(*pages, sep="\n")


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
