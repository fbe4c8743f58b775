"""The ledger: each claim of the paper, and of what was written about it since, beside what results/ says of it.

Only files in results/ are read. Each line says which command its number came from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from large_batch import claims, paper
from large_batch.results import Result, trials

NOT_RUN = "not run"
WHY_NOT = {  # where it is not for the hours it takes
    "F2": "TIMIT is licensed",
    "C3": "CIFAR-100 was not at hand",
    "C4": "CIFAR-100 was not at hand",
}
ORDER = 10  # "one to two orders of magnitude": at least this factor
FAR_RATIO = 4.3  # 4 deviations of log(I_L / I_S) over F1's five seeds (0.37), as a factor: what one trial must exceed


@dataclass(frozen=True)
class Line:
    """A line of the ledger: a claim, what was published, what was found for a network, and the verdict."""

    claim: str
    source: str
    network: str
    published: str
    found: str
    verdict: str
    result: Result | None = None


def ledger(results: Sequence[Result], networks: Sequence[str]) -> list[Line]:
    """Return all lines, claim by claim; a claim about which a network has no result is not run there."""
    lines = []
    for claim in CLAIMS:
        for network in (name for name in networks if name in claim.networks):
            own = [
                result
                for result in results
                if result.network == network and (result.usual or network not in paper.TABLE_2)
            ]
            lines += list(claim.judge(claim, own, network)) or [
                Line(claim.text, claim.source, network, claim.published(network), "", NOT_RUN)
            ]
    return lines


@dataclass(frozen=True)
class Entry:
    """A claim: its words, where it is made, what was published of a network, and how results are judged."""

    text: str
    source: str
    published: Callable[[str], str]
    judge: Callable[[Entry, Sequence[Result], str], Iterator[Line]]
    networks: tuple[str, ...] = tuple(paper.TABLE_2)

    def line(self, network: str, found: str, verdict: str, result: Result) -> Line:
        """Return a line on a network."""
        return Line(self.text, self.source, network, self.published(network), found, verdict, result)


def _published(minimizers: Sequence[str], quantity: str, *where: Any) -> Callable[[str], str]:
    def text(network: str) -> str:
        numbers = {minimizer: paper.published(network, minimizer, quantity, *where) for minimizer in minimizers}
        return ", ".join(f"{minimizer} {number}" for minimizer, number in numbers.items() if number)

    return text


def _judged(script: str, words: str) -> Callable[[Entry, Sequence[Result], str], Iterator[Line]]:
    """Return what the first result of a script says of a claim with some words in it."""

    def judge(entry: Entry, results: Sequence[Result], network: str) -> Iterator[Line]:
        for result in results:
            if result.script == script and (judged := result.claims(words)):
                yield from (entry.line(network, one.found, one.verdict, result) for one in judged)
                return

    return judge


def _gap(entry: Entry, results: Sequence[Result], network: str) -> Iterator[Line]:
    if found := trials(results, network, ("SB", "LB"), "test_accuracy"):
        small, large = found
        verdict = claims.unclear(small.values, large.values, paper.seed_spread(network)) or claims.HOLDS
        if claims.unclear(large.values, small.values, paper.seed_spread(network)) == "":
            verdict = claims.CONTRADICTED
        yield entry.line(network, f"SB {small} %, LB {large} % after {small.length}", verdict, large.result)


def _sharper(space: str) -> Callable[[Entry, Sequence[Result], str], Iterator[Line]]:
    """Return the rule on Metric 2.1: LB is at least ten times as sharp as SB, in the mean of the logarithms."""

    def published(network: str, epsilon: float) -> str:
        return _published(("SB", "LB"), "sharpness", space, epsilon)(network)

    def judge(entry: Entry, results: Sequence[Result], network: str) -> Iterator[Line]:
        for epsilon in paper.EPSILONS:
            where = {"space": space, "epsilon": epsilon}
            if ends := trials(results, network, ("SB", "LB"), "sharpness", **where):
                small, large = ends
                logs = [np.log(one.values) for one in (small, large)]
                ratio = float(np.exp(logs[1].mean() - logs[0].mean()))
                unclear = claims.unclear(logs[1], logs[0], None)
                if ratio >= ORDER:  # with one trial, too: seeds differ by far less in Table 3
                    verdict = claims.HOLDS
                elif ratio < 1:
                    verdict = claims.CONTRADICTED if not claims.unclear(logs[0], logs[1], None) else unclear
                else:
                    verdict = unclear or f"{claims.DIRECTION}: less than {ORDER} times"
                found = f"epsilon {epsilon:g}: SB {small}, LB {large}, {ratio:.3g} times, after {small.length}"
                yield replace(entry.line(network, found, verdict, large.result), published=published(network, epsilon))

    return judge


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


def _steep_in_few(entry: Entry, results: Sequence[Result], network: str) -> Iterator[Line]:
    if known := _curvature(results):
        large, result = known[0]["LB"], known[1]
        share, steep = 100 * _dimensions(large) / large["size"], large["steep_share"] or 0.0  # None: not resolved
        found = f"LB curves in {share:.2g} % of the dimensions; {steep:.2g} % of random vertices are steep"
        few = max(share, steep) <= paper.STEEP_SHARE
        yield entry.line(network, found, claims.HOLDS if few else claims.CONTRADICTED, result)


def _large_eigenvalues(entry: Entry, results: Sequence[Result], network: str) -> Iterator[Line]:
    if known := _curvature(results):
        (small, large), result = (known[0][label] for label in ("SB", "LB")), known[1]
        counts = [_dimensions(one) for one in (small, large)]
        largest = [one["eigenvalues"][0] for one in (small, large)]
        found = (
            f"LB curves in about {counts[1]:.3g} dimensions, SB in {counts[0]:.3g}; the largest eigenvalues are "
            f"{largest[1]:.3g} and {largest[0]:.3g}"
        )
        if counts[1] <= 2 * counts[0]:
            verdict = claims.CONTRADICTED
        else:
            verdict = claims.HOLDS if largest[1] > largest[0] else f"{claims.DIRECTION}: more, but not larger ones"
        yield entry.line(network, found, verdict, result)


def _rescaled(entry: Entry, results: Sequence[Result], network: str) -> Iterator[Line]:
    """The doubt holds where Metric 2.1 changes by more than a factor of 2 though the function does not."""
    for result in results:
        sharp = [row for row in result.rows if row.get("quantity") == "sharpness" and row.get("value")]
        rows = [row for row in sharp if row.get("solver", "lbfgsb") == "lbfgsb"]
        values: dict[str, dict[str, float]] = {}
        for row in rows:
            values.setdefault(row["minimizer"], {})[row.get("rescale") or "1"] = float(row["value"])
        if result.script != "sharpness" or not values.keys() >= {"SB", "LB"} or len(values["SB"]) < 2:
            continue
        ranges = {label: (min(found.values()), max(found.values())) for label, found in values.items()}
        found = ", ".join(f"{label} {low:.3g} - {high:.3g}" for label, (low, high) in ranges.items())
        changes = max(high / low for low, high in ranges.values())
        words = f"Metric 2.1 over factors {', '.join(sorted(values['SB'], key=float))}: {found}"
        yield entry.line(network, words, claims.HOLDS if changes > 2 else claims.CONTRADICTED, result)
        return


def _finite_beyond(entry: Entry, results: Sequence[Result], network: str) -> Iterator[Line]:
    for result in results:
        if result.script == "plot_parametric_plot" and result.setting("curve") == "linear" and result.rows:
            losses = [row["train_loss"] for row in result.rows if float(row["alpha"]) > 1]
            known = [float(loss) for loss in losses if loss]
            if not losses:
                continue
            value = f"{min(known):.3g} - {max(known):.3g}" if known else "nowhere finite"
            found = f"the training loss beyond LB is {value}, after {result.training}"
            yield entry.line(network, found, claims.HOLDS if len(known) == len(losses) else claims.CONTRADICTED, result)
            return


def _steeper(curve: str) -> Callable[[Entry, Sequence[Result], str], Iterator[Line]]:
    """Return the rule on a parametric plot: from LB's end the training loss rises more than twice as much as from SB's,
    the mean over both sides, an eighth of the way between them."""

    def judge(entry: Entry, results: Sequence[Result], network: str) -> Iterator[Line]:
        for result in results:
            rows = [row for row in result.rows if row.get("train_loss")]  # elsewhere it is not finite
            if result.script != "plot_parametric_plot" or result.setting("curve") != curve or not rows:
                continue
            alphas, losses = (np.array([float(row[name]) for row in rows]) for name in ("alpha", "train_loss"))
            small, large = (
                float(np.interp([end - 1 / 8, end + 1 / 8], alphas, losses).mean() - np.interp(end, alphas, losses))
                for end in (0, 1)
            )
            found = f"the loss rises by {small:.3g} around SB and by {large:.3g} around LB"
            steeper = claims.HOLDS if large > 2 * small else claims.CONTRADICTED
            yield entry.line(network, found, steeper, result)
            return

    return judge


def _remedied(hows: Sequence[str], helps: bool) -> Callable[[Entry, Sequence[Result], str], Iterator[Line]]:
    """Return the rule on large batches with a remedy: what becomes of their gap to SB, where that is clear.

    A remedy helps where its test accuracy is clearly above plain LB's, and does harm where it is clearly below. One
    that is not to help holds where it closes up to half of the gap; more, but not clearly, is no verdict. Where it does
    harm by more than the gap, as a training that is not at its end, it is in direction only.
    """

    def judge(entry: Entry, results: Sequence[Result], network: str) -> Iterator[Line]:
        spread = paper.seed_spread(network)
        for how in hows:
            if not (ends := trials(results, network, ("SB", "LB", f"LB {how}"), "test_accuracy")):
                continue
            small, large, remedied = ends
            gain = float(np.mean(remedied.values) - np.mean(large.values))
            gap = float(np.mean(small.values) - np.mean(large.values))
            better = not claims.unclear(remedied.values, large.values, spread)
            worse = not claims.unclear(large.values, remedied.values, spread)
            if gap <= 0 or claims.unclear(small.values, large.values, spread):
                verdict = f"{claims.OPEN}: no clear gap"
            elif helps:
                harm = claims.CONTRADICTED if worse else f"{claims.OPEN}: no clear gain"
                verdict = claims.HOLDS if better else harm
            elif gain > gap / 2:
                verdict = claims.CONTRADICTED if better else f"{claims.OPEN}: a gain, but not a clear one"
            else:
                verdict = f"{claims.DIRECTION}: worse than plain LB" if worse and gain < -gap else claims.HOLDS
            found = f"{how}: {remedied} %, plain LB {large} %, SB {small} % after {small.length}"
            yield entry.line(network, found, verdict, remedied.result)

    return judge


def _pays(entry: Entry, results: Sequence[Result], network: str) -> Iterator[Line]:
    """LB pays where it needs fewer iterations than (B_S / B_L) / f_S times those of SB, in all trials; far fewer in a
    single one."""
    for result in results:
        if result.script == "performance_model" and result.content["found"]:
            ratios, bound = [one["ratio"] for one in result.content["found"]], result.content["largest_ratio"]
            needed = f"{min(ratios):.3g}" if len(ratios) == 1 else f"{min(ratios):.3g} - {max(ratios):.3g}"
            found = f"LB needs {needed} times as many iterations; the bound is {bound:.3g}, after {result.training}"
            if len(ratios) == 1 and bound / FAR_RATIO < ratios[0] < bound * FAR_RATIO:
                verdict = claims.ONE_TRIAL
            elif min(ratios) < bound <= max(ratios):
                verdict = f"{claims.OPEN}: not in all trials"
            else:
                verdict = claims.HOLDS if max(ratios) < bound else claims.CONTRADICTED
            yield entry.line(network, found, verdict, result)
            return


CLAIMS = (
    Entry("Small batches generalise better.", "Table 2", _published(("SB", "LB"), "test_accuracy"), _gap),
    Entry(
        "The gap is no over-fitting: stopping early would not close it.",
        "Section 2.2, Figure 2",
        lambda network: "no peak in any curve",
        _judged("training_curves", "early stopping"),
    ),
    Entry(
        "On the line between the minimizers the loss is steeper around LB.",
        "Figure 3",
        lambda network: "steeper at LB",
        _steeper("linear"),
    ),
    Entry("On a curve between them, too.", "Figure 7", lambda network: "steeper at LB", _steeper("curvilinear")),
    Entry(
        "LB minimizers are one to two orders of magnitude sharper (full space).",
        "Table 3",
        _published(("SB", "LB"), "sharpness", "full", 1e-3),
        _sharper("full"),
    ),
    Entry(
        "In random subspaces, too.",
        "Table 4",
        _published(("SB", "LB"), "sharpness", "random", 1e-3),
        _sharper("random"),
    ),
    Entry(
        "Small batches go further from the start.",
        "Section 3",
        lambda network: "{} to {} times as far".format(*paper.DISTANCE_RATIO),
        _judged("training_curves", "as far from the starting point"),
    ),
    Entry(
        "As the loss falls, LB iterates become sharper, SB ones flatter.",
        "Figure 6",
        lambda network: "",
        _judged("training_curves", "As the loss falls"),
    ),
    Entry(
        "Beyond a batch size the test accuracy falls.",
        "Figure 4",
        lambda network: (
            f"about {paper.BATCH_SIZE_THRESHOLD[network]:,}" if network in paper.BATCH_SIZE_THRESHOLD else ""
        ),
        _judged("batch_size_sweep", "There is a batch size"),
    ),
    Entry(
        "The sharpness rises up to there, and less beyond.",
        "Figure 4",
        lambda network: "",
        _judged("batch_size_sweep", "The sharpness rises"),
    ),
    Entry(
        "Warm-started late, LB generalises and is flat; early, it is not.",
        "Figure 5",
        lambda network: "",
        _judged("warmstart", "Warm-started"),
    ),
    Entry(
        "A batch that grows may remedy the gap.", "Section 4", lambda network: "", _judged("warmstart", "Starting with")
    ),
    Entry(
        "Data augmentation helps LB.",
        "Table 6",
        _published(("SB augment", "LB augment"), "test_accuracy"),
        _remedied(("augment",), helps=True),
    ),
    Entry(
        "Conservative training helps LB.",
        "Table 7",
        _published(("LB conservative",), "test_accuracy"),
        _remedied(("conservative",), helps=True),
    ),
    Entry(
        "Adversarial and stability training do not.",
        "Appendix E.3",
        lambda network: "no improvement",
        _remedied(("adversarial", "stability"), helps=False),
    ),
    Entry(
        "Other optimizers do not.",
        "Section 2.2",
        lambda network: "the same gap",
        _remedied(("adagrad", "sgd", "adaqn"), helps=False),
    ),
    Entry(
        "Around LB the loss is steep in few directions only.",
        "Section 2.2.2",
        lambda network: f"about {paper.STEEP_SHARE:g} % of the dimensions",
        _steep_in_few,
    ),
    Entry(
        "LB is faster to an accuracy that both reach, if SB's parallel efficiency is 0.2.",
        "Appendix C",
        lambda network: "if it needs less than 0.5 times as many iterations, at B_S / B_L = 0.1",
        _pays,
    ),
    Entry("LB has many large eigenvalues, SB few.", "Section 1", lambda network: "", _large_eigenvalues),
    Entry(
        "Metric 2.1 can be changed without changing the function.",
        "Dinh et al., 2017",
        lambda network: "a doubt",
        _rescaled,
    ),
    Entry(
        "The curve of VGG11 is finite beyond LB.",
        "a reproduction",
        lambda network: "not finite",
        _finite_beyond,
        ("VGG11",),
    ),
    Entry(
        "Fine-tuned in batches of up to 256 MobileNetV2 is level, at 1,024 it falls.",
        "a reproduction",
        lambda network: "94.32 % at 32, 94.28 % at 256, 93.76 % at 1,024",
        _judged("finetune", "level up to a batch"),
        ("MobileNetV2",),
    ),
)
