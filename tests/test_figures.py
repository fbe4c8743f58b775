"""What the figures show: to the colour-blind, too."""

from itertools import combinations

import numpy as np
from conftest import recipe, solution
from matplotlib.colors import to_rgb

from large_batch import figures
from large_batch.measurements import Evaluated
from large_batch.trends import Breakpoint


def test_what_is_not_resolved_is_not_drawn(digits):
    def row(batch, sharpness, warm=None):
        at = recipe(digits, batch_size=batch, epochs=5)
        if warm:
            at = recipe(digits, batch_size=batch, epochs=5, warm_start=recipe(digits, epochs=warm))
        return solution("", at, sharpness)

    none, some = [row(size, None) for size in (64, 128, 256)], [row(64, None), row(128, 2.0), row(256, 20.0)]
    for found in (none, some):
        warm = [row(128, None, 1), row(128, found[1].sharpness_at(1e-3), 2)]
        for figure in (
            figures.batch_size_sweep(found, Breakpoint(128, 0, np.inf), "title"),
            figures.sharpness_by_loss({"SB": none, "LB": found}, "title"),
            figures.warm_starts(found, warm, 80.0, none, "title"),
        ):
            figure.draw_without_rendering()
    _, right = figures.batch_size_sweep(some, None, "title").axes
    assert list(bars(right).values()) == [([128, 256], [2, 20])] * 2


def lines(axes):
    """Return the points of each line that has a label of its own."""
    named = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    return {label: (list(line.get_xdata()), list(line.get_ydata())) for label, line in named.items()}


def bars(axes):
    """Return the means and the errors of what is drawn with errors, by label."""
    return {
        drawn.get_label(): (list(drawn.lines[0].get_xdata()), list(drawn.lines[0].get_ydata()))
        for drawn in axes.containers
    }


def test_what_is_drawn_over_batch_sizes_and_warm_starts(digits):
    def found(batch, accuracy, sharpness, seed=0, **more):
        result = Evaluated(*[0.5] * 5, accuracy)
        return solution("", recipe(digits, batch_size=batch, seed=seed, **more), sharpness, result)

    rows = [found(64, 90.0, 1.0), found(64, 92.0, 3.0, seed=1), found(128, 80.0, 40.0)]
    left, right = figures.batch_size_sweep(rows, Breakpoint(100, 70, 1000), "title").axes
    assert bars(left) == {"test accuracy": ([64, 128], [91, 80])}
    assert list(bars(right).values()) == [([64, 128], [2, 40])] * 2
    assert lines(left)["threshold"][0] == [100, 100]
    (shaded,) = left.patches
    assert (shaded.get_x(), shaded.get_x() + shaded.get_width()) == (70, 128)
    (axes,) = figures.fine_tuning(rows, {64: 93.0}, "title").axes
    assert bars(axes) == {"here": ([64, 128], [91, 80])}
    assert lines(axes)["published"] == ([64], [93])
    small = [found(64, 50.0 + epochs, None, epochs=epochs) for epochs in (1, 2)]
    warm = [found(128, 60.0 + start.epochs, 5.0 * start.epochs, warm_start=start.recipe) for start in small]
    above, below = figures.warm_starts(small, warm, 95.0, [found(128, 70.0, 8.0)], "title").axes
    drawn = lines(above)
    assert drawn["SB iterates"] == ([1, 2], [51, 52])
    assert drawn["warm-started LB"] == ([1, 2], [61, 62])
    assert (drawn["LB alone"][1], drawn["SB alone, late"][1]) == ([70, 70], [95, 95])
    assert lines(below)["sharpness, epsilon 0.001"] == ([1, 2], [5, 10])
    assert lines(below)["of LB alone, epsilon 0.001"][1] == [8, 8]


def test_what_is_drawn_of_the_performance_model_and_of_policies():
    left, right = figures.performance_model(0.1, 0.2, [0.3], [([90.0, 91.0], [0.25, 0.35])]).axes
    drawn = lines(left)
    np.testing.assert_allclose(np.prod(drawn["bound, $B_S / B_L$ = 0.1"], axis=0), 0.1)
    assert drawn["at $f_S(P)$ = 0.2"] == ([0.2], [0.5])
    assert drawn["found"][1] == [0.3, 0.3]
    assert lines(right)["bound at $f_S(P)$ = 0.2"][1] == [0.5, 0.5]
    assert list(right.lines[0].get_ydata()) == [0.25, 0.35]
    points = [Evaluated(1.0, 1.0, 60.0, 2.0, 2.0, 50.0), Evaluated(None, None, None, 3.0, 3.0, 40.0)]
    above, below = figures.statistics_policies([0.0, 1.0], {"batch": points}, "title", "path").axes
    assert lines(above)["batch, test"] == ([0, 1], [2, 3])
    np.testing.assert_array_equal(lines(above)["batch, train"], ([0, 1], [1, np.nan]))
    assert lines(below)["batch, test"] == ([0, 1], [50, 40])


def test_regimes_differ_by_more_than_colour_and_the_figures_say_what_they_show(digits, tmp_path):
    def path(batch):
        return [solution("", recipe(digits, batch_size=batch, epochs=epochs), 1.0 + epochs) for epochs in range(3)]

    paths = figures.sharpness_by_loss({"SB": path(64), "LB": path(128)}, "title")
    (axes,) = paths.axes
    assert len({(line.get_linestyle(), line.get_marker()) for line in axes.lines}) == 4
    assert [text.get_text() for text in paths.legends[0].texts][1] == "SB, epsilon 0.0005"
    arrows = [(text.xyann[1], text.xy[1]) for text in axes.texts]
    assert len(arrows) == 8
    assert all(begin < end for begin, end in arrows), "from earlier to later, as the sharpness rises here"
    rising = [[50.0 + epoch for epoch in range(30)]]
    curves = [figures.Curve(name, rising, rising) for name in ("SB", "LB", "growing")]
    (axes,) = figures.training_curves(curves, "title").axes
    assert len({(line.get_linestyle(), line.get_marker()) for line in axes.lines}) == 6
    # Trained until converged, trials end after different numbers of epochs
    uneven = figures.Curve("SB", [[50.0, 60.0, 70.0], [52.0, 64.0]], [[40.0, 50.0, 60.0], [44.0, 50.0]])
    (axes,) = figures.training_curves([uneven], "title").axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [[51, 62, 70], [42, 50, 60]]
    assert [path.get_extents().x1 for band in axes.collections for path in band.get_paths()] == [2, 2]


# How the three kinds of the colour-blind see linear RGB (Machado, Oliveira and Fernandes, 2009, severity 1).
BLIND = [
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
]


def lab(rgb):
    """CIE L*a*b* of linear RGB."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ np.clip(rgb, 0, 1)
    x, y, z = np.cbrt(np.maximum(xyz / [0.9505, 1, 1.089], 1e-4))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_the_colour_blind_tell_the_colours_apart():
    colors = [((np.array(to_rgb(color)) + 0.055) / 1.055) ** 2.4 for _, color in figures.REGIMES]
    for kind in BLIND:
        seen = [lab(np.array(kind) @ color) for color in colors]
        assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 30, "just noticeable is 2.3"
