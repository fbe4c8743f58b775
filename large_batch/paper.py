"""What the paper published: Keskar, Mudigere, Nocedal, Smelyanskiy, Tang, "On Large-Batch Training for Deep Learning:
Generalization Gap and Sharp Minima", ICLR 2017, and the curves of the figures in its repository."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SMALL_BATCH, LARGE_BATCH = 256, {"F1": 6000, "C1": 5000, "C2": 5000, "C3": 5000, "C4": 5000}  # F2: as the data are
EPSILONS = (1e-3, 5e-4)  # half-widths of the box of Metric 2.1
DIMENSION = 100  # of the random subspaces of Table 4
ORIGINAL_CURVES = Path(__file__).parent / "original_figures"


@dataclass(frozen=True)
class NetworkRow:
    """A row of Table 1, and the layers that the section of Appendix B gives it, as `network_zoo.layers` writes them."""

    kind: str
    section: str
    dataset: str
    layers: str


@dataclass(frozen=True)
class DataRow:
    """A row of Table 5: the samples of both halves, the shape of a sample's features, and the classes."""

    train: int
    test: int
    features: tuple[int, ...]
    classes: int

    def cells(self) -> list[str]:
        """Return it as the cells of a table."""
        return [f"{self.train:,}", f"{self.test:,}", " x ".join(map(str, self.features)), f"{self.classes:,}"]


SHALLOW = "[64, 5, 5, 2], MaxPool(3), [64, 5, 5, 2], MaxPool(3), 384, 192"
DEEP = (
    "2 x [64, 3, 3, 1], MaxPool(2), 2 x [128, 3, 3, 1], MaxPool(2), 3 x [256, 3, 3, 1], MaxPool(2), "
    "3 x [512, 3, 3, 1], MaxPool(2), 3 x [512, 3, 3, 1], MaxPool(2), 512"
)
TABLE_1 = {
    "F1": NetworkRow("fully connected", "B.1", "mnist", "5 x 512, 10"),
    "F2": NetworkRow("fully connected", "B.2", "timit", "7 x 512, 1973"),
    "C1": NetworkRow("shallow convolutional", "B.3", "cifar10", f"{SHALLOW}, 10"),
    "C2": NetworkRow("deep convolutional", "B.4", "cifar10", f"{DEEP}, 10"),
    "C3": NetworkRow("shallow convolutional", "B.3", "cifar100", f"{SHALLOW}, 100"),
    "C4": NetworkRow("deep convolutional", "B.4", "cifar100", f"{DEEP}, 100"),
}
TABLE_5 = {
    "mnist": DataRow(60_000, 10_000, (28, 28), 10),
    "timit": DataRow(721_329, 310_621, (360,), 1973),
    "cifar10": DataRow(50_000, 10_000, (32, 32), 10),
    "cifar100": DataRow(50_000, 10_000, (32, 32), 100),
}
SAMPLES = {network: TABLE_5[row.dataset].train for network, row in TABLE_1.items()}  # of the training set


@dataclass(frozen=True)
class Spread:
    """Mean and sample deviation over trials, the paper's 5 or ours; None for the deviation of one trial."""

    mean: float
    deviation: float | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return that of some values."""
        return cls(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None)

    def __str__(self) -> str:
        return f"{self.mean:.5g}" + ("" if self.deviation is None else f" ± {self.deviation:.4g}")

    def rounded(self) -> str:
        """Return it in as many digits as trials can tell."""
        return f"{self.mean:.4g}" + ("" if self.deviation is None else f" ± {float(f'{self.deviation:.2g}'):g}")


@dataclass(frozen=True)
class Accuracy:
    """A row of Table 2 (percent): the small-batch (SB) and large-batch (LB) minimizer on training and test set."""

    train_small: Spread
    train_large: Spread
    test_small: Spread
    test_large: Spread


TABLE_2 = {
    "F1": Accuracy(Spread(99.66, 0.05), Spread(99.92, 0.01), Spread(98.03, 0.07), Spread(97.81, 0.07)),
    "F2": Accuracy(Spread(99.99, 0.03), Spread(98.35, 2.08), Spread(64.02, 0.2), Spread(59.45, 1.05)),
    "C1": Accuracy(Spread(99.89, 0.02), Spread(99.66, 0.2), Spread(80.04, 0.12), Spread(77.26, 0.42)),
    "C2": Accuracy(Spread(99.99, 0.04), Spread(99.99, 0.01), Spread(89.24, 0.12), Spread(87.26, 0.07)),
    "C3": Accuracy(Spread(99.56, 0.44), Spread(99.88, 0.30), Spread(49.58, 0.39), Spread(46.45, 0.43)),
    "C4": Accuracy(Spread(99.10, 1.23), Spread(99.57, 1.84), Spread(63.08, 0.5), Spread(57.81, 0.17)),
}


OUR_SEED_SPREAD = {"F1": 0.11, "C1": 0.45}  # the same of ours, in results/: paper_tables.py -n F1 --trials 5, C1 3


def seed_spread(network: str) -> float | None:
    """Return the larger of SB's and LB's deviations of the test accuracy over 5 seeds (Table 2), or that of ours if it
    is more; None for others."""
    row = TABLE_2.get(network)
    ours = OUR_SEED_SPREAD.get(network, 0.0)
    return max(row.test_small.deviation, row.test_large.deviation, ours) if row else None


@dataclass(frozen=True)
class Sharpness:
    """A row of Table 3 or 4 at one epsilon: Metric 2.1 (percent) of the small-batch and the large-batch minimizer."""

    small: Spread
    large: Spread


TABLE_3 = {  # full space, by network and epsilon
    ("F1", 1e-3): Sharpness(Spread(1.23, 0.83), Spread(205.14, 69.52)),
    ("F1", 5e-4): Sharpness(Spread(0.61, 0.27), Spread(42.90, 17.14)),
    ("F2", 1e-3): Sharpness(Spread(1.39, 0.02), Spread(310.64, 38.46)),
    ("F2", 5e-4): Sharpness(Spread(0.90, 0.05), Spread(93.15, 6.81)),
    ("C1", 1e-3): Sharpness(Spread(28.58, 3.13), Spread(707.23, 43.04)),
    ("C1", 5e-4): Sharpness(Spread(7.08, 0.88), Spread(227.31, 23.23)),
    ("C2", 1e-3): Sharpness(Spread(8.68, 1.32), Spread(925.32, 38.29)),
    ("C2", 5e-4): Sharpness(Spread(2.07, 0.86), Spread(175.31, 18.28)),
    ("C3", 1e-3): Sharpness(Spread(29.85, 5.98), Spread(258.75, 8.96)),
    ("C3", 5e-4): Sharpness(Spread(8.56, 0.99), Spread(105.11, 13.22)),
    ("C4", 1e-3): Sharpness(Spread(12.83, 3.84), Spread(421.84, 36.97)),
    ("C4", 5e-4): Sharpness(Spread(4.07, 0.87), Spread(109.35, 16.57)),
}
TABLE_4 = {  # random subspaces of dimension 100, by network and epsilon
    ("F1", 1e-3): Sharpness(Spread(0.11, 0.00), Spread(9.22, 0.56)),
    ("F1", 5e-4): Sharpness(Spread(0.05, 0.00), Spread(9.17, 0.14)),
    ("F2", 1e-3): Sharpness(Spread(0.29, 0.02), Spread(23.63, 0.54)),
    ("F2", 5e-4): Sharpness(Spread(0.05, 0.00), Spread(6.28, 0.19)),
    ("C1", 1e-3): Sharpness(Spread(2.18, 0.23), Spread(137.25, 21.60)),
    ("C1", 5e-4): Sharpness(Spread(0.71, 0.15), Spread(29.50, 7.48)),
    ("C2", 1e-3): Sharpness(Spread(0.95, 0.34), Spread(25.09, 2.61)),
    ("C2", 5e-4): Sharpness(Spread(0.31, 0.08), Spread(5.82, 0.52)),
    ("C3", 1e-3): Sharpness(Spread(17.02, 2.20), Spread(236.03, 31.26)),
    ("C3", 5e-4): Sharpness(Spread(4.03, 1.45), Spread(86.96, 27.39)),
    ("C4", 1e-3): Sharpness(Spread(6.05, 1.13), Spread(72.99, 10.96)),
    ("C4", 5e-4): Sharpness(Spread(1.89, 0.33), Spread(19.85, 4.12)),
}


# LB's sharpness per SB's, the smallest of "one to two orders of magnitude" (section 2.2.2)
LEAST_RATIO = min(row.large.mean / row.small.mean for row in (*TABLE_3.values(), *TABLE_4.values()))


def sharpness_spread(network: str) -> float | None:
    """Return the deviation over 5 seeds of the logarithm of LB's sharpness per SB's (Table 3, to first order), the
    larger one of both epsilons; None for others."""
    rows = [TABLE_3[network, epsilon] for epsilon in EPSILONS if (network, epsilon) in TABLE_3]
    spreads = [math.hypot(*(one.deviation / one.mean for one in (row.small, row.large))) for row in rows]
    return max(spreads, default=None)


@dataclass(frozen=True)
class Remedied:
    """A row of Table 6 or 7 (percent): test accuracy of SB, and of LB with a remedy; LB's full-space Metric 2.1."""

    test_small: Spread
    test_large: Spread
    sharpness: dict[float, Spread]


def _remedied(*numbers: tuple[float, float]) -> Remedied:
    small, large, *sharpness = (Spread(*pair) for pair in numbers)
    return Remedied(small, large, dict(zip(EPSILONS, sharpness, strict=True)))


TABLE_6 = {  # data augmentation, of the baseline, too
    "C1": _remedied((83.63, 0.14), (82.50, 0.67), (231.77, 30.50), (45.89, 3.83)),
    "C2": _remedied((89.82, 0.12), (90.26, 1.15), (468.65, 47.86), (105.22, 19.57)),
    "C3": _remedied((54.55, 0.44), (53.03, 0.33), (103.68, 11.93), (37.67, 3.46)),
    "C4": _remedied((63.05, 0.5), (65.88, 0.13), (271.06, 29.69), (45.31, 5.93)),
}
TABLE_7 = {  # conservative training, of LB; two deviations of SB differ from Table 2's
    "F1": _remedied((98.03, 0.07), (98.12, 0.01), (232.25, 63.81), (46.02, 12.58)),
    "F2": _remedied((64.02, 0.2), (61.94, 1.10), (928.40, 51.63), (190.77, 25.33)),
    "C1": _remedied((80.04, 0.12), (78.41, 0.22), (520.34, 34.91), (171.19, 15.13)),
    "C2": _remedied((89.24, 0.05), (88.495, 0.63), (632.01, 208.01), (108.88, 47.36)),
    "C3": _remedied((49.58, 0.39), (45.98, 0.54), (337.92, 33.09), (110.69, 3.88)),
    "C4": _remedied((63.08, 0.10), (62.51, 0.67), (354.94, 20.23), (68.76, 16.29)),
}
# Of these the paper says in words only that LB was as with plain ADAM: appendix E.3 and section 2.2.
AS_LARGE = ("adversarial", "stability", "adagrad", "sgd", "adaqn")


def published(
    network: str, minimizer: str, quantity: str, space: str | None = None, epsilon: float | None = None
) -> Spread | None:
    """Return what the paper has of a minimizer, in percent; None where it says nothing.

    Args:
        network: F1 ... C4.
        minimizer: "SB" or "LB", and how it was trained other than by plain ADAM: "LB conservative", "LB sgd", ...
        quantity: "train_accuracy", "test_accuracy", or "sharpness" (Metric 2.1) in a `space`, "full" or "random", at an
            `epsilon`.
    """
    side, _, how = minimizer.partition(" ")
    if how in AS_LARGE and side == "LB":
        how = ""
    name = {"SB": "small", "LB": "large"}.get(side)
    if not how and name and network in TABLE_2:
        if quantity == "sharpness":
            row = (TABLE_3 if space == "full" else TABLE_4).get((network, epsilon))
            return getattr(row, name) if row else None
        return getattr(TABLE_2[network], f"{quantity.removesuffix('_accuracy')}_{name}")
    row = {"augment": TABLE_6, "conservative": TABLE_7}.get(how, {}).get(network)
    if row and quantity == "test_accuracy" and (side, how) != ("SB", "conservative"):
        return getattr(row, f"test_{name}")
    return row.sharpness.get(epsilon) if row and (side, quantity, space) == ("LB", "sharpness", "full") else None


def compared_with(minimizer: str) -> str:
    """Return the minimizer beside which the paper's text sets one."""
    side, _, how = minimizer.partition(" ")
    return side if how in ("augment", "conservative") else {"SB": "LB", "LB": "SB"}[side]


# Section 2.2.2: the loss around a large-batch minimizer rises steeply only in a subspace of about this share of the
# dimensions (percent).
STEEP_SHARE = 5.0

# Section 3, Figure 4: the batch size after which the test accuracy drops is about this.
BATCH_SIZE_THRESHOLD = {"F2": 15_000, "C1": 500}

# A reproduction by others: MobileNetV2 on CIFAR-10, 200 epochs of SGD whose learning rate grows with the batch;
# validation accuracy (percent) by batch size. Its first version says fine-tuned from ImageNet, at 3e-4 for 32 samples,
# its later ones say trained from scratch, at 0.0125 and with warm-up, of the same accuracies. These have another table
# of fine-tuning: 224 x 224 pixels, 100 epochs, 96.30, 96.37, 96.11, 96.01 and 84.16 % at 32 to 512.
FINE_TUNED = {32: 94.32, 64: 94.32, 128: 94.27, 256: 94.28, 512: 94.16, 1024: 93.76}

# Section 3: ||x_S - x_0|| / ||x_L - x_0|| was observed in this range.
DISTANCE_RATIO = (3, 10)


def solution_cells(network: str, minimizer: str, sharpness: bool = True) -> list[str]:
    """Return Table 2's test accuracy and, beside our `sharpness` over the whole training set only, Table 3's, of the
    paper's SB or LB minimizer."""
    numbers = [published(network, minimizer, "test_accuracy")]
    numbers += [published(network, minimizer, "sharpness", "full", epsilon) for epsilon in EPSILONS if sharpness]
    return [*map(str, numbers), *["-"] * (1 + len(EPSILONS) - len(numbers))]


@dataclass(frozen=True)
class CurvePoint:
    """A point of an original figure: clipped cross-entropy (nats) and accuracy (percent) at x_S + alpha (x_L - x_S)."""

    alpha: float
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float


def original_curve(network: str) -> list[CurvePoint]:
    """Return the 25 points of the original's linear parametric plot (Figure 3); empty where none was released."""
    if network not in ("C1", "C2", "C3", "C4"):
        return []
    with open(ORIGINAL_CURVES / f"{network}.csv", newline="") as file:
        return [CurvePoint(**{name: float(cell) for name, cell in row.items()}) for row in csv.DictReader(file)]
