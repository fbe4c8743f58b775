"""How results decide the claims of the ledger: what was found of a network, in words, and the verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from large_batch import claims, evidence, paper
from large_batch.results import Result, Trials, trials

PAIR = ("SB", "LB")
NOT_MET = "not met"
DIVERGED = f"{evidence.OPEN}: a training diverged"
# What one trial must exceed: four deviations of the logarithm over the seeds of other runs, as a factor, rounded up
FAR_RISE = 3  # of LB's rise per SB's: 0.24 over C1's two seeds of 10 epochs, with either pooling
FAR_CURVATURE = 10  # of tr(H)^2 / tr(H^2), whose spread is not known; in its place that of LB's trace per SB's: 0.55
FAR_RATIO = 4.4  # of LB's iterations per SB's: 0.37 over F1's five seeds
NOT_AT_END = 3  # points that LB lacks to the paper's accuracy on the training set where its training is not at its end


@dataclass(frozen=True)
class Line:
    """A line of the ledger: a claim, what was published, what was found for a network and where, and the verdict.

    `found` begins with the epsilon or the method where there is a line for each.
    """

    claim: str
    source: str
    network: str
    published: str
    found: str
    verdict: str
    results: tuple[Result, ...] = ()
    rule: str = ""
    figure: str = ""

    @property
    def figures(self) -> list[Path]:
        """The figures of the results that show it: those whose names have the ending `figure`."""
        drawn = ((result.path.stem + self.figure, result.figures) for result in self.results)
        return [path for name, paths in drawn for path in paths if path.stem == name]


Judge = Callable[["Entry", Sequence[Result], str], Iterator[Line]]


@dataclass(frozen=True)
class Entry:
    """A claim: its words, where it is made, how results are judged, and what was published of a network.

    `rule` says in words how, where the commands do not say it with their results. `figure` is the ending of the name of
    the figure that shows it.
    """

    text: str
    source: str
    judge: Judge
    rule: str = ""
    published: Callable[[str], str] = lambda network: ""
    networks: tuple[str, ...] = tuple(paper.TABLE_2)
    figure: str = ""

    def line(self, network: str, found: str, verdict: str, *results: Result) -> Line:
        """Return a line on a network, from some results, each of which counts once."""
        each = tuple({result.path: result for result in results}.values())
        told = self.published(network), found, verdict
        return Line(self.text, self.source, network, *told, each, self.rule, self.figure)


def published(minimizers: Sequence[str], quantity: str, *where: Any) -> Callable[[str], str]:
    """Return what says the paper's numbers of some minimizers of a network."""

    def text(network: str) -> str:
        numbers = {minimizer: paper.published(network, minimizer, quantity, *where) for minimizer in minimizers}
        return ", ".join(f"{minimizer} {number}" for minimizer, number in numbers.items() if number)

    return text


def by_command(script: str, words: str) -> Judge:
    """Return what the first result of a script says of a claim with some words in it."""

    def judge(entry: Entry, results: Sequence[Result], network: str) -> Iterator[Line]:
        for result in results:
            if result.script == script and (judged := result.claims(words)):
                for one in judged:
                    part = _part(result, "sharpness_samples") if "epsilon" in one.found else ""
                    yield replace(entry.line(network, one.found + part, one.verdict, result), rule=one.rule)
                return

    return judge


def _part(result: Result, setting: str) -> str:
    """Return over which part of the training set a result measured, in words; empty if over all of it."""
    samples = result.setting(setting)
    return f", over the first {samples:,} samples" if samples and samples < paper.SAMPLES[result.network] else ""


def early_stopping(entry: Entry, results: Sequence[Result], network: str) -> Iterator[Line]:
    """Judge the training curves of SB and LB."""
    for result in results:
        if result.script == "training_curves" and result.epochs:
            curves: dict[str, dict[str, list[float]]] = {label: {} for label in PAIR}
            for row in result.epochs:
                curves[row["regime"]].setdefault(row["seed"], []).append(float(row["test_accuracy"]))
            trials = (list(curves[label].values()) for label in PAIR)
            judged = claims.early_stopping(*trials, paper.seed_spread(network))
            yield replace(entry.line(network, judged.found, judged.verdict, result), rule=judged.rule)
            return


def _unfinished(results: Sequence[Result], network: str, ends: Sequence[Trials], minimizers: Sequence[str]) -> str:
    """Return why the trainings of these ends cannot be compared: one diverged, or one of some minimizers of LB is not
    at its end; empty if they can."""
    if any(np.isnan(one.values).any() for one in ends):
        return DIVERGED
    return not_at_end(results, network, ends[0].epochs, minimizers)


def not_at_end(results: Sequence[Result], network: str, epochs: int, minimizers: Sequence[str] = ("LB",)) -> str:
    """Return why minimizers of LB after so many epochs cannot be judged: one has less of the training set than the
    paper's LB; empty if they can, or where nothing is known."""
    known = paper.published(network, "LB", "train_accuracy")
    for minimizer in minimizers:
        found = trials(results, network, (minimizer,), "train_accuracy", epochs=epochs)
        if found and known and (reached := np.mean(found[0].values)) < known.mean - NOT_AT_END:
            return f"{evidence.OPEN}: {minimizer} is not at its end ({reached:.3g} % of the training set)"
    return ""


def gap(entry: Entry, results: Sequence[Result], network: str) -> Iterator[Line]:
    """Judge SB's and LB's test accuracies."""
    if found := trials(results, network, ("SB", "LB"), "test_accuracy"):
        small, large = found
        verdict = _unfinished(results, network, found, ("LB",)) or evidence.clear_side(
            [(1, small.values), (-1, large.values)], paper.seed_spread(network)
        )
        yield entry.line(
            network, f"SB {small} %, LB {large} % after {small.length}", verdict, *small.results, *large.results
        )


def sharper(space: str, minimizers: Sequence[str] = ("LB",), times: float = paper.LEAST_RATIO) -> Judge:
    """Return the rule on Metric 2.1: minimizers of LB are so many times as sharp as SB, in the mean of the
    logarithms."""

    def judge(entry: Entry, results: Sequence[Result], network: str) -> Iterator[Line]:
        for minimizer, epsilon in product(minimizers, paper.EPSILONS):
            if ends := trials(results, network, ("SB", minimizer), "sharpness", space=space, epsilon=epsilon):
                small, large = ends
                ratio, verdict = _sharper(small.values, large.values, paper.sharpness_spread(network), times)
                verdict = _unfinished(results, network, ends, (minimizer,)) or verdict
                part = f"epsilon {epsilon:g}" if minimizer == "LB" else f"{minimizer.split()[-1]}, epsilon {epsilon:g}"
                found = f"{part}: SB {small}, {minimizer} {large}, {ratio:.3g} times, after {small.length}"
                theirs = [paper.published(network, one, "sharpness", space, epsilon) for one in ("SB", minimizer)]
                as_plain = minimizer.split()[-1] in paper.AS_LARGE  # of which the paper has words only
                known = published(("SB",) if as_plain else ("SB", minimizer), "sharpness", space, epsilon)(network)
                if as_plain:
                    known += ", LB as plain LB, without a number"
                elif all(theirs):
                    known += f", {theirs[1].mean / theirs[0].mean:.3g} times"
                line = entry.line(network, found, verdict, *small.results, *large.results)
                yield replace(line, published=known)

    return judge


def _sharper(
    small: Sequence[float], large: Sequence[float], spread: float | None, times: float = 1
) -> tuple[float, str]:
    """Return how many times as sharp LB is, the mean of the logarithms over trials, and the verdict.

    `spread` is the deviation over seeds of the logarithm of the ratio that is known from other runs.
    """
    logs = [np.log(values) for values in (large, small)]
    ratio = float(np.exp(logs[0].mean() - logs[1].mean()))

    def side(by: float) -> str:
        return evidence.clear_side([(1, logs[0] - np.log(by)), (-1, logs[1])], spread and spread / 2**0.5)

    verdict = side(1)
    if verdict == evidence.HOLDS and ratio < times:
        verdict = f"{evidence.DIRECTION}: less than {times:.2g} times"
    elif verdict.startswith(evidence.OPEN) and side(times) == evidence.CONTRADICTED:
        verdict = f"{evidence.OPEN}: no clear difference, but clearly less than {times:.2g} times"
    return ratio, verdict


def _curvature(results: Sequence[Result]) -> tuple[dict[str, dict], Result] | None:
    """Return what is known of the Hessian at SB and LB, `sharpness_metric.Curvature` as a dictionary each."""
    for result in results:
        if result.script == "sharpness" and result.setting("curvature"):
            found = {
                label: one["result"]
                for label, group in result.content["results"].items()
                for one in group
                if "steep_share" in one["result"] and one.get("measurement", {}).get("rescale", 1) == 1
            }
            if found.keys() == {"SB", "LB"}:
                return found, result
    return None


def _dimensions(curvature: dict) -> float:
    """Return tr(H)^2 / tr(H^2): in as many dimensions the loss curves."""
    return curvature["projection"]["trace"] ** 2 / curvature["projection"]["trace_of_square"]


def steep_in_few(entry: Entry, results: Sequence[Result], network: str) -> Iterator[Line]:
    """Judge in how many directions the loss around LB curves, and is steep."""
    if known := _curvature(results):
        large, result = known[0]["LB"], known[1]
        share, steep = 100 * _dimensions(large) / large["size"], large["steep_share"] or 0.0  # None: not resolved
        vertices = f"{steep:.2g} % of {len(large['rises'])} random vertices are steep"
        found = f"LB curves in {share:.2g} % of the dimensions; {vertices}"
        verdict = evidence.beyond([paper.STEEP_SHARE / max(share, steep)], FAR_CURVATURE)
        small = 100 * _dimensions(known[0]["SB"]) / large["size"]
        found += f"; SB curves in {small:.2g} %, seed {result.setting('seed', 0)}{_part(result, 'curvature_samples')}"
        yield entry.line(network, found, verdict, result)


def large_eigenvalues(entry: Entry, results: Sequence[Result], network: str) -> Iterator[Line]:
    """Judge how many large eigenvalues SB and LB have, and the largest ones."""
    if known := _curvature(results):
        (small, large), result = (known[0][label] for label in ("SB", "LB")), known[1]
        counts = [_dimensions(one) for one in (small, large)]
        largest = [one["eigenvalues"][0] for one in (small, large)]
        found = (
            f"LB curves in about {counts[1]:.3g} dimensions, SB in {counts[0]:.3g}; the largest eigenvalues are "
            f"{largest[1]:.3g} and {largest[0]:.3g}, seed {result.setting('seed', 0)}"
            f"{_part(result, 'curvature_samples')}"
        )
        verdict = evidence.beyond([counts[1] / counts[0]], FAR_CURVATURE)
        if verdict == evidence.HOLDS and largest[1] <= largest[0]:
            verdict = f"{evidence.DIRECTION}: more dimensions, but no larger eigenvalue"
        spectra = [one for one in results if one.script == "plot_spectrum"][:1]  # which has the figure
        yield entry.line(network, found, verdict, result, *spectra)


def rescaled(entry: Entry, results: Sequence[Result], network: str) -> Iterator[Line]:
    """The doubt holds where Metric 2.1 changes by more than a factor of 2 though the function does not."""
    for result in results:
        values: dict[tuple, dict[str, float]] = {}
        for row in (row for row in result.rows if row.get("quantity") == "sharpness"):
            if row.get("value") and float(row["value"]) > 0 and row.get("solver", "lbfgsb") == "lbfgsb":
                where = tuple(row.get(name) for name in ("seed", "space", "epsilon", "trial"))
                values.setdefault((row["minimizer"], *where), {})[row.get("rescale") or "1"] = float(row["value"])
        first = {label: next((found for (end, *_), found in values.items() if end == label), {}) for label in PAIR}
        if result.script != "sharpness" or any(len(found) < 2 for found in first.values()):
            continue
        ranges = {label: (min(found.values()), max(found.values())) for label, found in first.items()}
        found = ", ".join(f"{label} {low:.3g} - {high:.3g}" for label, (low, high) in ranges.items())
        changes = max(high / low for low, high in ranges.values())
        factors = ", ".join(f"{float(factor):g}" for factor in sorted(first["SB"], key=float))
        part = _part(result, "sharpness_samples")
        words = f"Metric 2.1 over factors {factors}: {found}, after {result.training}{part}"
        yield entry.line(network, words, evidence.HOLDS if changes > 2 else evidence.CONTRADICTED, result)
        return


def _lines_of(results: Sequence[Result], curve: str) -> Iterator[tuple[Result, np.ndarray, np.ndarray]]:
    """Yield the parametric plots along a kind of path, with alphas and training losses, infinite where not finite."""
    for result in results:
        if result.script == "plot_parametric_plot" and result.setting("curve") == curve and result.rows:
            alphas = np.array([float(row["alpha"]) for row in result.rows])
            losses = np.array([float(row.get("train_loss") or "inf") for row in result.rows])
            yield result, alphas, losses


def finite_beyond(entry: Entry, results: Sequence[Result], network: str) -> Iterator[Line]:
    """Judge whether the training loss is finite beyond LB."""
    for result, alphas, losses in _lines_of(results, "linear"):
        if (beyond := losses[alphas > 1]).size:
            known = beyond[np.isfinite(beyond)]
            value = f"{known.min():.3g} - {known.max():.3g}" if known.size else "nowhere finite"
            found = f"the training loss beyond LB is {value}, after {result.training}"
            whole = known.size == beyond.size
            yield entry.line(network, found, evidence.HOLDS if whole else evidence.CONTRADICTED, result)
            return


def _rises(alphas: np.ndarray, losses: np.ndarray, end: float) -> tuple[float, float]:
    """Return by how much the loss rises an eighth of the path from an end (0 or 1), towards the other end and away from
    it; infinite where it is not finite on the way."""
    inwards = 1 / 8 if end == 0 else -1 / 8

    def rise(near: float) -> float:
        first = np.searchsorted(alphas, min(near, end), "right") - 1
        last = np.searchsorted(alphas, max(near, end), "left")
        finite = np.isfinite(losses[first : last + 1]).all()
        return float(np.interp(near, alphas, losses) - np.interp(end, alphas, losses)) if finite else float("inf")

    return rise(end + inwards), rise(end - inwards)


def steeper(curve: str) -> Judge:
    """Return the rule on a parametric plot: from LB's end the training loss rises more than twice as much as from SB's,
    in the longest trainings."""

    def judge(entry: Entry, results: Sequence[Result], network: str) -> Iterator[Line]:
        plots = [plot for plot in _lines_of(results, curve) if plot[1].min() <= -1 / 8 and plot[1].max() >= 9 / 8]
        if not plots:
            return
        lengths = [(plot[0].setting("epochs"), not plot[0].setting("until_converged")) for plot in plots]
        plots = [plot for plot, length in zip(plots, lengths, strict=True) if length == max(lengths)]
        finest = {plot[0].setting("seed", 0): plot for plot in sorted(plots, key=lambda plot: len(plot[1]))}
        plots = [finest[seed] for seed in sorted(finest)]
        rises = np.array([[_rises(*points, end) for end in (0, 1)] for _, *points in plots])
        length = plots[0][0].setting("epochs")
        verdict = not_at_end(results, network, length) or _steeper(rises.mean(axis=2))
        seeds = ", ".join(str(result.setting("seed", 0)) for result, *_ in plots)
        found = f"{_risen(rises)}, after {length} epochs, seed {seeds}"
        yield entry.line(network, found, verdict, *(result for result, *_ in plots))

    return judge


def original_rises(network: str) -> str:
    """Return what the original's curve of a network says of Figure 3, in words, and the numbers where it was
    released."""
    if not (points := paper.original_curve(network)):
        return "steeper at LB"
    curve = np.array([(point.alpha, point.train_loss) for point in points]).T
    return f"steeper at LB; clipped, {_risen(np.array([[_rises(*curve, end) for end in (0, 1)]]))}"


def _risen(rises: np.ndarray) -> str:
    """Return in words how the loss rises, from an array of shape (trials, 2 ends, 2 sides)."""
    small, large = ([_between(side) for side in rises[:, end].T] for end in (0, 1))
    return (
        f"the loss rises by {large[0]} from LB towards SB and by {large[1]} beyond, by {small[0]} from SB towards LB "
        f"and by {small[1]} beyond"
    )


def _between(values: Sequence[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} - {high}"


def _steeper(rises: Sequence[Sequence[float]]) -> str:
    """Return the verdict on how much the loss rises from SB and from LB, of each trial; one that does not rise, or to
    what is not finite, is compared as one of almost nothing, or of very much."""
    small, large = np.clip(np.array(rises, float), 1e-9, 1e9).T
    verdict = evidence.beyond(large / small, FAR_RISE)
    if verdict == evidence.HOLDS and np.exp(np.mean(np.log(large / small))) < 2:
        verdict = f"{evidence.DIRECTION}: less than twice"
    return verdict


def remedied(hows: Sequence[str], rule: Callable[..., str], beside: Sequence[str] = ()) -> Judge:
    """Return a rule on the test accuracies of large batches with a remedy, or another optimizer.

    Args:
        hows: The remedies or optimizers, each with a line of its own.
        rule: Takes the values of SB, of plain LB, of LB with the remedy, those of `beside`, and the seeds' spread.
        beside: Other minimizers that the rule takes.
    """

    def judge(entry: Entry, results: Sequence[Result], network: str) -> Iterator[Line]:
        for how in hows:
            ends = trials(results, network, ("SB", "LB", f"LB {how}", *beside), "test_accuracy")
            if not ends:
                continue
            values = (one.values for one in ends)
            lacking = _unfinished(results, network, ends, ("LB", f"LB {how}"))
            verdict = lacking or rule(*values, paper.seed_spread(network))
            others = "".join(f", {name} {one} %" for name, one in zip(beside, ends[3:], strict=True))
            found = f"{how}: {ends[2]} %, plain LB {ends[1]} %, SB {ends[0]} %{others} after {ends[0].length}"
            yield entry.line(network, found, verdict, *(result for one in ends for result in one.results))

    return judge


def pays(entry: Entry, results: Sequence[Result], network: str) -> Iterator[Line]:
    """LB pays where it clearly needs fewer iterations than (B_S / B_L) / f_S times those of SB.

    The paper has this as a condition: where it is not met, nothing is contradicted.
    """
    for result in results:
        if result.script == "performance_model" and result.content["found"]:
            ratios, bound = [one["ratio"] for one in result.content["found"]], result.content["largest_ratio"]
            needed = f"{min(ratios):.3g}" if len(ratios) == 1 else f"{min(ratios):.3g} - {max(ratios):.3g}"
            found = f"LB needs {needed} times as many iterations; the bound is {bound:.3g}, after {result.training}"
            verdict = evidence.beyond([bound / ratio for ratio in ratios], FAR_RATIO)
            verdict = NOT_MET if verdict == evidence.CONTRADICTED else verdict
            yield entry.line(network, found, verdict, result)
            return
