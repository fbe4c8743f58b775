"""How sharpness and curvature are laid out, beside the values of Tables 3 and 4."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

import cli
import paper
from curvature import Curvature
from measurements import Measured, Measurement

DIMENSION = 100  # of the random subspaces of Table 4


@dataclass(frozen=True)
class Setting:
    """A row of the table: how Metric 2.1 is measured, apart from where and with which A."""

    space: str
    epsilon: float
    solver: str

    @classmethod
    def of(cls, measured: Measured) -> Setting:
        """Return the row that a measurement belongs to."""
        return cls(measured.measurement.space, measured.measurement.epsilon, measured.measurement.solver)


@dataclass(frozen=True)
class Value:
    """A row of the .csv file: Metric 2.1 (percent) of one minimizer, mean and sample deviation over the trials, and the
    paper's. None where a trial is not resolved in float32, where there is one trial, where nothing was published."""

    minimizer: str
    space: str
    epsilon: float
    solver: str
    trials: int
    mean: float | None
    deviation: float | None
    paper_mean: float | None
    paper_deviation: float | None

    def __str__(self) -> str:
        if self.mean is None:
            return "not resolved"
        return f"{self.mean:.4g}" + ("" if self.deviation is None else f" ± {self.deviation:.2g}")


def published(measurement: Measurement, label: str) -> paper.Published | None:
    """Return the value of Table 3 or 4 to set beside a measurement of the minimizer called `label`, if there is one."""
    if measurement.dimension not in (None, DIMENSION):
        return None
    table = paper.TABLE_3 if measurement.space == "full" else paper.TABLE_4
    row = table.get((measurement.network, measurement.epsilon))
    return {"SB": row.small, "LB": row.large}.get(label) if row else None


def values(measured: list[Measured], label: str, comparable: bool) -> list[Value]:
    """Return a row for each setting in which the minimizer called `label` was measured, over its trials; `comparable`
    says whether it was trained on the paper's data with the paper's batch size."""
    rows = []
    for setting in dict.fromkeys(map(Setting.of, measured)):
        same = [each for each in measured if Setting.of(each) == setting]
        trials = [each.result.value for each in same]
        resolved = None not in trials
        theirs = published(same[0].measurement, label) if comparable else None
        rows.append(
            Value(
                label,
                *dataclasses.astuple(setting),
                trials=len(trials),
                mean=float(np.mean(trials)) if resolved else None,
                deviation=float(np.std(trials, ddof=1)) if resolved and len(trials) > 1 else None,
                paper_mean=theirs.mean if theirs else None,
                paper_deviation=theirs.deviation if theirs else None,
            )
        )
    return rows


def ratio(small: float | None, large: float | None) -> str:
    """Return LB/SB as a cell."""
    return f"{large / small:.3g}" if small and large else "-"


def comparison(small: list[Value], large: list[Value]) -> str:
    """Lay out both minimizers beside the paper's, a line for each setting, and say in how many LB is the sharper."""
    rows = [["space", "epsilon", "solver", "SB", "LB", "LB/SB", "paper SB", "paper LB", "paper LB/SB"]]
    for sb, lb in zip(small, large, strict=True):
        theirs = [f"{v.paper_mean:g} ± {v.paper_deviation:g}" if v.paper_mean is not None else "-" for v in (sb, lb)]
        ratios = ratio(sb.mean, lb.mean), ratio(sb.paper_mean, lb.paper_mean)
        rows.append([sb.space, f"{sb.epsilon:g}", sb.solver, str(sb), str(lb), ratios[0], *theirs, ratios[1]])
    resolved = [(sb, lb) for sb, lb in zip(small, large, strict=True) if None not in (sb.mean, lb.mean)]
    sharper = sum(lb.mean > sb.mean for sb, lb in resolved)
    return f"{cli.table(rows)}\nLB is sharper than SB in {sharper} of the {len(resolved)} rows that are resolved."


def detail_table(measured: dict[str, list[Measured]]) -> str:
    """Lay out how each value was found."""
    header = "minimizer, space, epsilon, solver, value, f(x), max f, evaluations, iterations, stopped by"
    rows = [header.split(", ")]
    for label, those in measured.items():
        for each in those:
            at, result = each.measurement, each.result
            space = at.space if at.trial is None else f"{at.space} {at.trial}"
            losses = f"{result.loss:.4g}", f"{result.largest_loss:.4g}"
            counts = str(result.evaluations), str(result.iterations)
            rows.append([label, space, f"{at.epsilon:g}", at.solver, str(result), *losses, *counts, result.stopped])
    return cli.table(rows)


def curvature_table(found: dict[str, Curvature]) -> str:
    """Lay out the curvature of each minimizer in a column."""

    def spread(numbers: list[float]) -> str:
        return " / ".join(f"{number:.3g}" for number in np.percentile(numbers, (0, 50, 100)))

    def share(c: Curvature) -> str:
        effective = c.projection.effective_dimensions
        return "-" if effective is None else f"{100 * effective / c.size:.2g}"

    some = next(iter(found.values()))
    eps, p, directions = some.sharpness.epsilon, len(some.projection.ritz_values), len(some.rises)
    lines = {
        "loss": lambda c: f"{c.sharpness.loss:.4g}",
        "largest eigenvalues of the Hessian H": lambda c: ", ".join(f"{value:.4g}" for value in c.eigenvalues),
        f"Ritz values on {p} random directions: min / median / max": lambda c: spread(c.projection.ritz_values),
        "curvature along each of them: min / median / max": lambda c: spread(c.projection.directional),
        "share of the dimensions that are curved, tr(H)^2 / (n tr(H^2)) (%)": share,
        f"Metric 2.1 at eps {eps:g} by vertex ascent (%)": lambda c: str(c.sharpness),
        "  what the largest eigenvalue says of it, for small eps": lambda c: "{:.3g} - {:.3g}".format(
            *c.sharpness_bounds
        ),
        f"rise at {directions} random vertices of the box (%): min / median / max": lambda c: spread(c.rises),
        "  share of them above a tenth of the metric (%)": lambda c: (
            "-" if c.steep_share is None else f"{c.steep_share:g}"
        ),
    }
    rows = [["", *found], *([line, *map(cell, found.values())] for line, cell in lines.items())]
    return (
        f"{cli.table(rows)}\nThe paper: around LB minimizers the loss rises steeply in a subspace of about "
        f"{paper.STEEP_SHARE:g} % of the dimensions only."
    )
