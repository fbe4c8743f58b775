"""The paper's figures, in one style, drawn with matplotlib and written as .pdf and .png."""

import io
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import runs
from paper import CurvePoint

LOSS, ACCURACY, LOSS_MUTED, ACCURACY_MUTED = "#1f4fd8", "#d62222", "#b4c3ea", "#efb9b9"


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write the figure as `<stem>.pdf` and `<stem>.png`; return the paths."""
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("pdf", "png")]
    for path in paths:
        drawn = io.BytesIO()  # in memory first, since on a full disk matplotlib raises errors of its own
        # No date inside, so that the same curves give the same file.
        metadata = {"CreationDate": None} if path.suffix == ".pdf" else None
        figure.savefig(drawn, dpi=150, format=path.suffix[1:], metadata=metadata)
        with runs.writing(path) as temporary:
            temporary.write_bytes(drawn.getvalue())
    return paths


def parametric_plot(points: list, original: list[CurvePoint], title: str, path_label: str) -> Figure:
    """Draw Figure 3 or 7: cross-entropy (left, blue) and accuracy (right, red) against alpha, training set solid and
    test set dashed, with the original's curves behind in muted tones where there are any.

    `points` have the attributes of `plot_parametric_plot.Point`. Where Keras 1's clipping of the softmax changes the
    loss visibly, the clipped loss, which is what the original shows, is drawn dotted.
    """
    figure = Figure(figsize=(7.2, 5.2), layout="constrained")
    left = figure.add_subplot()
    right = left.twinx()
    for curve, loss, accuracy, width in (
        (original, LOSS_MUTED, ACCURACY_MUTED, 3.5),
        (points, LOSS, ACCURACY, 1.6),
    ):
        alphas = [point.alpha for point in curve]
        for half, line in (("train", "-"), ("test", "--")):
            left.plot(alphas, [getattr(point, f"{half}_loss") for point in curve], line, color=loss, lw=width)
            right.plot(alphas, [getattr(point, f"{half}_accuracy") for point in curve], line, color=accuracy, lw=width)
    clipped = any(
        getattr(point, f"{half}_loss") > 1.01 * getattr(point, f"{half}_clipped_loss") + 0.01
        for point in points
        for half in ("train", "test")
    )
    if clipped:
        for half in ("train", "test"):
            losses = [getattr(point, f"{half}_clipped_loss") for point in points]
            left.plot([point.alpha for point in points], losses, ":", color=LOSS, lw=1.2)
    left.set_xlabel(rf"$\alpha$   (0: small batch, 1: large batch; {path_label})")
    left.set_ylabel("Cross Entropy", color=LOSS)
    right.set_ylabel("Accuracy (%)", color=ACCURACY)
    left.set_ylim(bottom=0)
    right.set_ylim(0, 105)
    left.set_title(title)
    left.grid(True, color="0.85")
    left.set_axisbelow(True)

    entries = [Line2D([], [], color="0.2", ls="-", label="train"), Line2D([], [], color="0.2", ls="--", label="test")]
    if clipped:
        entries.append(Line2D([], [], color=LOSS, ls=":", label="loss, softmax clipped as in Keras 1"))
    if original:
        entries.append(Line2D([], [], color="0.75", lw=3.5, label="original figure"))
    figure.legend(handles=entries, loc="outside lower center", ncols=len(entries), frameon=False)
    return figure
