"""What the paper published: Keskar, Mudigere, Nocedal, Smelyanskiy, Tang, "On Large-Batch Training for Deep Learning:
Generalization Gap and Sharp Minima", ICLR 2017, and the curves of the figures in its repository."""

import csv
from dataclasses import dataclass
from pathlib import Path

ORIGINAL_CURVES = Path(__file__).parent / "Figures" / "original"


@dataclass(frozen=True)
class Published:
    """Mean and standard deviation over the paper's 5 trials."""

    mean: float
    deviation: float

    def __str__(self) -> str:
        return f"{self.mean:g} ± {self.deviation:g}"


@dataclass(frozen=True)
class Accuracy:
    """A row of Table 2 (percent): the small-batch (SB) and large-batch (LB) minimizer on training and test set."""

    train_small: Published
    train_large: Published
    test_small: Published
    test_large: Published


TABLE_2 = {
    "F1": Accuracy(Published(99.66, 0.05), Published(99.92, 0.01), Published(98.03, 0.07), Published(97.81, 0.07)),
    "F2": Accuracy(Published(99.99, 0.03), Published(98.35, 2.08), Published(64.02, 0.2), Published(59.45, 1.05)),
    "C1": Accuracy(Published(99.89, 0.02), Published(99.66, 0.2), Published(80.04, 0.12), Published(77.26, 0.42)),
    "C2": Accuracy(Published(99.99, 0.04), Published(99.99, 0.01), Published(89.24, 0.12), Published(87.26, 0.07)),
    "C3": Accuracy(Published(99.56, 0.44), Published(99.88, 0.30), Published(49.58, 0.39), Published(46.45, 0.43)),
    "C4": Accuracy(Published(99.10, 1.23), Published(99.57, 1.84), Published(63.08, 0.5), Published(57.81, 0.17)),
}

# Section 3: ||x_S - x_0|| / ||x_L - x_0|| was observed in this range.
DISTANCE_RATIO = (3, 10)


@dataclass(frozen=True)
class CurvePoint:
    """A point of an original figure: clipped cross-entropy (nats) and accuracy (percent) at x_S + alpha (x_L - x_S)."""

    alpha: float
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float


def original_curve(network: str) -> list[CurvePoint]:
    """Return the 25 points of the original's linear parametric plot (Figure 3); empty where none was released.

    The curves lie in the repository beside this file; raises `FileNotFoundError` where it was copied without them.
    """
    if network not in ("C1", "C2", "C3", "C4"):
        return []
    with open(ORIGINAL_CURVES / f"{network}.csv", newline="") as file:
        return [CurvePoint(**{name: float(cell) for name, cell in row.items()}) for row in csv.DictReader(file)]
