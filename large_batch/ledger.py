"""The ledger: each claim of the paper, and of what was written about it since, beside what results/ says of it.

Only files in results/ are read. Each line says which command its number came from, and how it was judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from large_batch import claims, evidence, paper, verdicts
from large_batch.results import Result
from large_batch.verdicts import FAR_CURVATURE, FAR_RATIO, FAR_RISE, NOT_AT_END, Entry, Line, published

NOT_RUN = "not run"
WHY_NOT = {  # where it is not for the hours it takes
    "F2": "TIMIT is licensed",
    "C3": "CIFAR-100 was not at hand",
    "C4": "CIFAR-100 was not at hand",
}
REPRODUCTION = "[a reproduction](https://github.com/timmywanttolearn/large_batch_training/blob/7e9bba5/README.md)"


def ledger(results: Sequence[Result], networks: Sequence[str]) -> list[Line]:
    """Return all lines, claim by claim; a claim about which a network has no result is not run there."""
    lines = []
    for claim in CLAIMS:
        for network in (name for name in networks if name in claim.networks):
            own = [result for result in results if result.network == network and result.usual]
            lines += list(claim.judge(claim, own, network)) or [
                Line(claim.text, claim.source, network, claim.published(network), "", NOT_RUN)
            ]
    return lines


def cell_verdict(row: dict[str, Any], results: Sequence[Result], result: Result) -> str:
    """Return the verdict of today's rule on a row of the paper's tables, from the numbers that `paper_tables.py` wrote.

    Args:
        row: One of the rows in `result`.
        results: All, which tell whether the training is at its end.
        result: That of the table.
    """
    minimizer, beside = row["minimizer"], paper.compared_with(row["minimizer"])
    what = ("quantity", "space", "epsilon")
    cells = {one["minimizer"]: one for one in result.content["rows"] if all(one[name] == row[name] for name in what)}
    why = {
        end: verdicts.not_at_end(results, result.network, result.setting("epochs"), (end,)) if "LB" in end else ""
        for end in (minimizer, beside)
    }

    def numbers(end: str) -> tuple[list[float | None], paper.Spread | None]:
        cell = cells.get(end, {"values": [], "paper": None})
        return cell["values"], paper.Spread(**cell["paper"]) if cell["paper"] else None

    return why[minimizer] or claims.agreement(*numbers(minimizer), *(((), None) if why[beside] else numbers(beside)))


AT_END = (
    f"There is no verdict where LB's accuracy on the training set is more than {NOT_AT_END} points below the paper's."
)
AT_THEIR_END = AT_END.replace("where LB's accuracy", "where plain LB's accuracy, or that of LB with the method,")
STEEPER = (
    "From LB's end of the path the training loss rises more than twice as much as from SB's (the mean over both sides, "
    "an eighth of the way between them; of trials the geometric mean), and clearly more (t-test of the logarithm, "
    f"{evidence.LEVEL:.0%}; of one trial {FAR_RISE} times as much). {AT_END}"
)
CLEARLY_SHARPER = (
    f"clearly so (Welch's t-test of the logarithms, {evidence.LEVEL:.0%}; with one trial, or where that says more: "
    f"{evidence.FAR} standard errors of the seeds' spread, the wider of that in Table 3 and that of these trials)."
)
SHARPER = (
    f"LB is at least {paper.LEAST_RATIO:.2g} times as sharp as SB (geometric means over the seeds; the smallest ratio "
    f"in the paper's Tables 3 and 4), or, in direction, sharper, and {CLEARLY_SHARPER} {AT_END}"
)
STILL_SHARPER = (
    f"LB of each kind is sharper than plain SB (geometric means over the seeds), and {CLEARLY_SHARPER} "
    f"{AT_END.replace('where LB', 'where that LB')}"
)
HELPS = f"LB's test accuracy with the method is above plain LB's, and {evidence.CLEAR}. {AT_THEIR_END}"
CLOSES = (
    "Between SB and LB, both with augmented data, less than half of the gap without is left. For the gap, and between "
    f"what is left and half of it, {evidence.CLEAR}. {AT_THEIR_END}"
)
NO_HELP = (
    "LB's test accuracy with the method is below the middle between plain LB's and SB's, and not above plain LB's. "
    "Above plain LB's contradicts; between plain LB's and the middle, or below plain LB's by more than the gap, it is "
    f"in direction only. For the gap, and between the method and the middle or plain LB, {evidence.CLEAR}. "
    f"{AT_THEIR_END}"
)
ALIKE = (
    "LB's test accuracy differs from that with ADAM by less than half of the gap between SB and LB, on either side. "
    f"For the gap, and between that difference and half of it, {evidence.CLEAR}. {AT_THEIR_END}"
)
CLAIMS = (
    Entry(
        "Small batches generalise better.",
        "Table 2",
        verdicts.gap,
        f"SB's test accuracy is above LB's, and {evidence.CLEAR}. {AT_END}",
        published(("SB", "LB"), "test_accuracy"),
    ),
    Entry(
        "The test accuracy does not peak and decay: stopping early would not close the gap.",
        "Section 2.2, Figure 2",
        verdicts.early_stopping,
        published=lambda network: "no peak in any curve",
    ),
    Entry(
        "On the line through the minimizers the loss is steeper around LB.",
        "Figure 3",
        verdicts.steeper("linear"),
        STEEPER,
        verdicts.original_rises,
    ),
    Entry(
        "On a curve through them, too.",
        "Figure 7",
        verdicts.steeper("curvilinear"),
        STEEPER,
        lambda network: "steeper at LB",
    ),
    Entry(
        "LB minimizers are sharper by an order of magnitude or more (full space).",
        "Table 3",
        verdicts.sharper("full"),
        SHARPER,
        published(("SB", "LB"), "sharpness", "full", 1e-3),
    ),
    Entry(
        "In random subspaces, too.",
        "Table 4",
        verdicts.sharper("random"),
        SHARPER,
        published(("SB", "LB"), "sharpness", "random", 1e-3),
    ),
    Entry(
        "Small batches go further from the start.",
        "Section 3",
        verdicts.by_command("training_curves", "as far from the starting point"),
        published=lambda network: "{} to {} times as far".format(*paper.DISTANCE_RATIO),
    ),
    Entry(
        "As the loss falls, LB iterates become sharper, SB ones flatter.",
        "Figure 6",
        verdicts.by_command("training_curves", "As the loss falls"),
        published=lambda network: "of F2 and C1: LB sharper and sharper, SB in the end flatter than before",
        figure="-sharpness",
    ),
    Entry(
        "Beyond a batch size the test accuracy falls.",
        "Figure 4",
        verdicts.by_command("batch_size_sweep", "There is a batch size"),
        published=lambda network: (
            f"about {paper.BATCH_SIZE_THRESHOLD[network]:,}"
            if network in paper.BATCH_SIZE_THRESHOLD
            else "there is one, without a number"
        ),
    ),
    Entry(
        "The sharpness rises up to there, and less beyond.",
        "Figure 4",
        verdicts.by_command("batch_size_sweep", "The sharpness rises"),
        published=lambda network: "it rises, and flattens around the threshold",
    ),
    Entry(
        "Warm-started late, LB generalises and is flat; early, it is not.",
        "Figure 5",
        verdicts.by_command("warmstart", "Warm-started"),
        published=lambda network: "of F2 and C1: late ones generalise better, early ones do not",
    ),
    Entry(
        "A batch that grows may remedy the gap.",
        "Section 4",
        verdicts.by_command("warmstart", "Starting with"),
        published=lambda network: "a proposal, not tried",
    ),
    Entry(
        "With augmented data LB generalises about as well as SB.",
        "Table 6",
        verdicts.remedied(("augment",), evidence.closes_the_gap, ("SB augment",)),
        CLOSES,
        published(("SB", "LB", "SB augment", "LB augment"), "test_accuracy"),
        ("C1", "C2", "C3", "C4"),
    ),
    Entry(
        "Conservative training helps LB.",
        "Table 7",
        verdicts.remedied(("conservative",), evidence.helps),
        HELPS,
        published(("SB", "LB", "LB conservative"), "test_accuracy"),
    ),
    Entry(
        "Adversarial and stability training do not help LB.",
        "Appendix E.3; of adversarial training sections 2.2.2 and 4 say the opposite",
        verdicts.remedied(("adversarial", "stability"), evidence.does_not_help),
        NO_HELP,
        lambda network: "no improvement; by what settings is not said",
    ),
    Entry(
        "LB with augmented data, conservative or robust training is still sharper than SB.",
        "Appendix E",
        verdicts.sharper("full", [f"LB {how}" for how in ("augment", "conservative", "adversarial", "stability")], 1),
        STILL_SHARPER,
    ),
    Entry(
        "LB of other optimizers generalises as LB of ADAM.",
        "Section 2.2",
        verdicts.remedied(("adagrad", "sgd", "adaqn"), evidence.is_alike),
        ALIKE,
        lambda network: "similar results",
    ),
    Entry(
        "LB of other optimizers is sharper than SB, too.",
        "Section 2.2, of sharpness",
        verdicts.sharper("full", ["LB adagrad", "LB sgd", "LB adaqn"], 1),
        STILL_SHARPER,
        lambda network: "similar results",
    ),
    Entry(
        "Around LB the loss curves in few directions only.",
        "Section 2.2.2",
        verdicts.steep_in_few,
        "tr(H)^2 / tr(H^2) of the Hessian H, and the random vertices of the box where the loss rises by a tenth of "
        f"Metric 2.1, are both {FAR_CURVATURE} times below {paper.STEEP_SHARE:g} % of all (one training). Neither is "
        "an estimate of the paper's share.",
        lambda network: f"about {paper.STEEP_SHARE:g} % of the dimensions",
    ),
    Entry(
        "With SB at a parallel efficiency of 0.2, LB is faster to the highest test accuracy that both reach.",
        "a condition in Appendix C",
        verdicts.pays,
        "LB's iterations per SB's are below (B_S / B_L) / 0.2, and clearly so (t-test of the logarithm, "
        f"{evidence.LEVEL:.0%}; of one trial, by a factor of {FAR_RATIO}).",
        lambda network: "if it needs less than 0.5 times as many iterations, at B_S / B_L = 0.1",
    ),
    Entry(
        "LB has many large eigenvalues, SB few.",
        "Section 2.1",
        verdicts.large_eigenvalues,
        f"LB's tr(H)^2 / tr(H^2) of the Hessian H is {FAR_CURVATURE} times SB's (one training each), and its largest "
        "eigenvalue is above SB's. tr(H)^2 / tr(H^2) counts eigenvalues, whatever their size.",
        lambda network: "LB many large ones, SB many small ones",
    ),
    Entry(
        "Metric 2.1 can be changed without changing the function.",
        "Dinh et al., 2017",
        verdicts.rescaled,
        "Where the weights before batch normalisations are multiplied by factors, it changes by more than 2 times.",
        lambda network: "no number: sharpness depends on how a function is written",
    ),
    Entry(
        "VGG11's cross-entropy can be drawn beyond LB, where a reproduction could not.",
        REPRODUCTION,
        verdicts.finite_beyond,
        "The training loss is finite at all points beyond LB.",
        lambda network: "could not be drawn there: outputs became negative",
        ("VGG11",),
    ),
    Entry(
        "In batches of up to 256 MobileNetV2's accuracy is level, at 1,024 it falls.",
        REPRODUCTION,
        verdicts.by_command("finetune", "level up to a batch"),
        published=lambda network: (
            "94.32 % at 32, 94.28 % at 256, 93.76 % at 1,024; first told of fine-tuning, later of training from scratch"
        ),
        networks=("MobileNetV2",),
    ),
)
