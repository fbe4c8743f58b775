"""How numbers are laid out as text, beside those of the paper's tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from large_batch import paper
from large_batch.measurements import Measured, Solution
from large_batch.paper import Spread
from large_batch.sharpness_metric import Curvature, SharpnessResult
from large_batch.spectra import Eigenvalues, Traces
from large_batch.spectrum import Estimate
from large_batch.tracking import Tracked
from large_batch.trends import RankCorrelation

LARGEST = "largest"  # of what several solvers found
SHARE = 0.1  # of the largest eigenvalue, beyond which eigenvalues are counted: far above a density's resolution


def lay_out(rows: list[list[str]]) -> str:
    """Lay out rows of cells, the first row a header, the first column left-aligned and the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def cell(values: Sequence[float | None]) -> str:
    """Return mean ± sample deviation of those that are known, and of how many if not of all."""
    known = [value for value in values if value is not None]
    of = f" ({len(known)} of {len(values)})" if len(known) < len(values) else ""
    return f"{Spread.of(known)}{of}" if known else "-"


def solution_table(solutions: Sequence[Solution], published: dict[tuple[str, int], list[str]]) -> str:
    """Lay out solutions, trials as mean ± sample deviation, beside Tables 2 and 3 where they apply.

    `published` holds cells by (regime, epochs): Table 2's test accuracy and Table 3's sharpness at each epsilon.
    """
    epsilons = [f"{epsilon:g}" for epsilon in paper.EPSILONS]
    header = ["", "batch", "epochs", "from SB epoch", "train loss", "train %", "test %"]
    header += [*(f"sharpness {epsilon}" for epsilon in epsilons), "distance", "paper test %"]
    lines = [[*header, *(f"paper {epsilon}" for epsilon in epsilons)]]
    groups: dict[tuple, list[Solution]] = {}
    for solution in solutions:
        groups.setdefault(
            (solution.minimizer, solution.batch_size, solution.epochs, solution.warm_start_epochs), []
        ).append(solution)
    for (minimizer, batch, epochs, warm), trials in groups.items():
        columns = [
            [getattr(solution, name) for solution in trials]
            for name in ("train_loss", "train_accuracy", "test_accuracy")
        ]
        columns += [[solution.sharpness_at(epsilon) for solution in trials] for epsilon in paper.EPSILONS]
        columns.append([solution.distance_from_start for solution in trials])
        place = [minimizer, str(batch), str(epochs), "-" if warm is None else str(warm)]
        beside = published.get((minimizer, epochs), ["-"] * (1 + len(epsilons)))
        lines.append([*place, *map(cell, columns), *beside])
    used = [column for column in zip(*lines, strict=True) if set(column[1:]) != {"-"}]
    return lay_out([list(line) for line in zip(*used, strict=True)])


def settings_of(measured: Measured) -> tuple[str, str, float, str, str]:
    """Return how sharpness was measured, apart from with which A: factor, measure, size, space, solver."""
    at = measured.measurement
    return f"{at.rescale:g}", at.measure, at.epsilon, at.space, at.solver


def sharpness_comparison(results: dict[str, list[Measured]], comparable: bool) -> str:
    """Lay out the sharpness of SB and LB beside the paper's, a line for each setting, and count where LB is sharper.

    Each solver finds a lower bound of the maximum, so of several the largest value of each trial has a line, too.

    Args:
        results: The measurements of SB and of LB, in the same settings.
        comparable: Whether they were trained on the paper's data with the paper's batch sizes.
    """
    header = ["rescaled", "measure", "space", "epsilon", "solver", "SB", "LB", "LB/SB", "paper SB", "paper LB"]
    rows = [[*header, "paper LB/SB"]]
    sharper = resolved = 0
    settings = dict.fromkeys(map(settings_of, results["SB"]))
    several = Counter(setting[:-1] for setting in settings)
    settings |= dict.fromkeys((*setting, LARGEST) for setting, solvers in several.items() if solvers > 1)
    for setting in settings:
        ours, theirs = [], []
        for label, measured in results.items():
            trials = [one for one in measured if setting in (settings_of(one), (*settings_of(one)[:-1], LARGEST))]
            values = _largest_of_trials(trials)
            ours.append(None if None in values else Spread.of(values))
            theirs.append(published(trials[0], label) if comparable else None)
        factor, measure, epsilon, space, solver = setting
        cells = ["not resolved" if spread is None else str(spread) for spread in ours]
        beside = ["-" if spread is None else str(spread) for spread in theirs]
        place = [factor, measure, space, "-" if epsilon is None else f"{epsilon:g}", solver]
        rows.append([*place, *cells, _ratio(*ours), *beside, _ratio(*theirs)])
        if None not in ours:
            resolved, sharper = resolved + 1, sharper + (ours[1].mean > ours[0].mean)
    text = lay_out(_with_usual_left_out(rows))
    return f"{text}\nLB is sharper than SB in {sharper} of the {resolved} rows that are resolved."


def _largest_of_trials(measured: list[Measured]) -> list[float | None]:
    """Return the largest value of each trial; None where a solver's is not resolved."""
    trials: dict[int | None, list[float | None]] = {}
    for one in measured:
        trials.setdefault(one.measurement.trial, []).append(one.result.value)
    return [None if None in values else max(values) for values in trials.values()]


def _with_usual_left_out(rows: list[list[str]]) -> list[list[str]]:
    """Return the rows without the columns of the factor and the measure that say nothing."""
    usual = {"rescaled": {"1"}, "measure": {"keskar"}}
    columns = [column for column in zip(*rows, strict=True) if set(column[1:]) != usual.get(column[0])]
    return [list(row) for row in zip(*columns, strict=True)]


def rescaled_evaluations(results: dict[str, list[Measured]]) -> str:
    """Lay out loss and accuracy of each minimizer for each factor, with which they should hardly change."""
    rows = [["minimizer", "rescaled", "train loss", "train %", "test loss", "test %"]]
    for label, group in results.items():
        for measured in group:
            at = measured.result
            numbers = at.train_loss, at.train_accuracy, at.test_loss, at.test_accuracy
            cells = ("not finite" if number is None else f"{number:.6g}" for number in numbers)
            rows.append([label, f"{measured.measurement.rescale:g}", *cells])
    return lay_out(rows)


def published(measured: Measured, minimizer: str) -> Spread | None:
    """Return the value of Table 3 or 4 to set beside a measurement of a minimizer, SB or LB, if there is one: over
    part of the training set it is another function's."""
    at = measured.measurement
    if at.dimension not in (None, paper.DIMENSION) or at.measure != "keskar" or at.rescale != 1 or at.samples:
        return None
    return paper.published(at.network, minimizer, "sharpness", at.space, at.epsilon)


def _ratio(small: Spread | None, large: Spread | None) -> str:
    return f"{large.mean / small.mean:.3g}" if small and large and small.mean else "-"


def sharpness_details(results: dict[str, list[Measured]]) -> str:
    """Lay out each value, and how it was found where it is one in a box or ball."""
    header = (
        "minimizer, rescaled, measure, space, epsilon, solver, value, f(x), max f, evaluations, iterations, stopped by"
    )
    rows = [header.split(", ")]
    for label, measured in results.items():
        for trial in measured:
            at, result = trial.measurement, trial.result
            space = at.space if at.trial is None else f"{at.space} {at.trial}"
            place = [label, f"{at.rescale:g}", at.measure, space]
            if isinstance(result, SharpnessResult):
                losses = f"{result.loss:.4g}", f"{result.largest_loss:.4g}"
                counts = str(result.evaluations), str(result.iterations)
                rows.append([*place, f"{at.epsilon:g}", at.solver, str(result), *losses, *counts, result.stopped])
            else:  # of the Hessian
                rows.append([*place, "-", at.solver, f"{result.value:.4g}", *["-"] * 5])
    return lay_out(_with_usual_left_out(rows))


def curvature_table(results: dict[str, Curvature]) -> str:
    """Lay out the curvature of each minimizer in a column."""

    def spread(numbers: list[float]) -> str:
        return " / ".join(f"{number:.3g}" for number in np.percentile(numbers, (0, 50, 100)))

    def share(c: Curvature) -> str:
        effective = c.projection.effective_dimensions
        return "-" if effective is None else f"{100 * effective / c.size:.2g}"

    first = next(iter(results.values()))
    eps, p, directions = first.sharpness.epsilon, len(first.projection.ritz_values), len(first.rises)
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
    rows = [["", *results], *([line, *map(text, results.values())] for line, text in lines.items())]
    return (
        f"{lay_out(rows)}\nThe paper: around LB minimizers the loss rises steeply in a subspace of about "
        f"{paper.STEEP_SHARE:g} % of the dimensions only."
    )


def spectrum_table(results: dict[str, list[Measured]]) -> str:
    """Lay out the spectrum of the Hessian at each minimizer in a column; `results` are of the requests of `spectra`."""
    columns = {
        label: {row: text for measured in group for row, text in _spectrum_rows(measured).items()}
        for label, group in results.items()
    }
    first = next(iter(columns.values()))
    return lay_out([["", *columns], *([row, *(column[row] for column in columns.values())] for row in first)])


def _spectrum_rows(measured: Measured) -> dict[str, str]:
    """Return the lines of one measurement: what it is of, and the number."""
    at, result = measured.measurement, measured.result
    rows = {}
    if isinstance(result, Eigenvalues):
        rows[f"{at.end} eigenvalues"] = ", ".join(f"{value:.4g}" for value in result.values)
    elif isinstance(result, Traces):
        rows["trace, Hutchinson's estimate"] = str(result.hutchinson)
        rows |= {f"  part of {layer}": str(Estimate(*pair)) for layer, pair in result.by_layer.items()}
        rows["trace, Hutch++"] = str(result.hutchpp)
    else:
        _, high = result.range
        for words, count, sign in (("above", result.above, 1), ("below", result.below, -1)):
            counted = Estimate(*(float(part[0]) for part in count(np.array([sign * SHARE * high]))))
            rows[f"eigenvalues {words} {100 * sign * SHARE:g} % of the largest"] = str(counted)
    return {f"{at.layer}: {row}" if at.layer else row: text for row, text in rows.items()}


def tracked_table(tracked: dict[str, list[Tracked]]) -> str:
    """Lay out what was found first, at its largest and last in each training, beside the edge of stability."""
    rows = [["", "first", "largest", "last", "edge", "P^-1 H: first", "largest", "last", "edge"]]
    for label, group in tracked.items():
        cells = [label]
        for name, edge in (("eigenvalue", "edge"), ("preconditioned", "preconditioned_edge")):
            known = [getattr(row, name) for row in group if getattr(row, name) is not None]
            numbers = [known[0], max(known), known[-1], getattr(group[-1], edge)] if known else []
            cells += [f"{number:.4g}" for number in numbers] or ["-"] * 4
        rows.append(cells)
    return lay_out(rows)


def rank_table(ranks: dict[str, RankCorrelation]) -> str:
    """Lay out the rank correlation of each measure with the generalisation gap, the highest first."""
    settings = list(next(iter(ranks.values())).granulated)
    rows = [["measure", "minimizers", "Kendall's tau (95 %)", *(f"by {name}" for name in settings), "mean but seed"]]
    for measure, rank in sorted(ranks.items(), key=lambda item: -(item[1].tau or 0)):
        taus = [*rank.granulated.values(), rank.mean_granulated]
        cells = ["-" if tau is None else f"{tau:+.2f}" for tau in taus]
        rows.append([measure, str(rank.count), str(rank), *cells])
    return lay_out(rows)
