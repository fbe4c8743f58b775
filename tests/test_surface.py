"""Lines and planes of weight space, each against another computation."""

from types import SimpleNamespace

import keras
import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from sklearn.decomposition import PCA

from large_batch import surface, surface_figures
from large_batch.errors import UserError
from large_batch.functions import Point
from large_batch.objective import Objective, flat_weights
from large_batch.places import SurfaceRequest, path_point, state_between
from large_batch.surface import (
    Part,
    Surface,
    evaluate,
    layout,
    normalised,
    principal,
    random_plane,
    steepest_plane,
    through,
)
from large_batch.surface_figures import Panel

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def network():
    """Convolutions of each kind, one of them in a model within the model, and batch normalisation."""
    inner = [keras.Input((6, 6, 2)), keras.layers.DepthwiseConv2D(3, depth_multiplier=2)]
    inner = keras.Sequential(inner, name="pointwise")  # which is no kernel of that name
    layers = [inner, keras.layers.BatchNormalization(), keras.layers.Conv2DTranspose(3, 2), keras.layers.Flatten()]
    return keras.Sequential([keras.Input((6, 6, 2)), *layers, keras.layers.Dense(3)])


def test_filter_normalisation_by_hand(network):
    """Filter by filter, as the definitions of the layers name them."""
    w = flat_weights(network) + 0.1
    direction = RNG.normal(size=len(w))
    model = keras.models.clone_model(network)

    def arrays(vector):
        offsets = np.cumsum([np.prod(v.shape) for v in model.trainable_variables])[:-1].astype(int)
        return [
            part.reshape(v.shape) for part, v in zip(np.split(vector, offsets), model.trainable_variables, strict=True)
        ]

    expected, ours = arrays(direction.copy()), arrays(w)  # a copy, since what is expected is written into it
    depthwise, _, gamma, _, transposed, _, dense, _ = range(8)
    for kernel, filters in (
        (depthwise, [np.s_[:, :, i, j] for i in range(2) for j in range(2)]),  # of input i, multiple j
        (transposed, [np.s_[:, :, i, :] for i in range(3)]),
        (dense, [np.s_[:, i] for i in range(3)]),
    ):
        for one in filters:
            length = np.linalg.norm(expected[kernel][one])
            expected[kernel][one] = expected[kernel][one] / length * np.linalg.norm(ours[kernel][one])
    parts = layout(network)
    for i in (gamma, *range(1, 8, 2)):
        expected[i] = expected[i] * np.linalg.norm(ours[i]) / np.linalg.norm(expected[i])
    kept = arrays(normalised(direction, w, parts, "filter", vectors=True))
    for i, array in enumerate(kept):
        np.testing.assert_allclose(array, expected[i], rtol=1e-12)
    zeroed = arrays(normalised(direction, w, parts, "filter"))
    for i, array in enumerate(zeroed):
        np.testing.assert_array_equal(array, kept[i] if kept[i].ndim > 1 else 0)
    by_layer = arrays(normalised(direction, w, parts, "layer"))
    np.testing.assert_allclose(np.linalg.norm(by_layer[dense]), np.linalg.norm(ours[dense]))
    np.testing.assert_allclose(
        by_layer[dense] / by_layer[dense][0, 0], arrays(direction)[dense] / arrays(direction)[dense][0, 0]
    )
    np.testing.assert_array_equal(normalised(direction, w, parts, "none", vectors=True), direction)


def test_what_is_a_filter_and_what_a_bias():
    """Of layers whose biases are no vectors, and whose kernels are no matrices."""
    sequence = keras.Input((5, 6))
    attended = keras.layers.MultiHeadAttention(2, 3)(sequence, sequence)
    normalised = keras.layers.LayerNormalization(axis=(1, 2))(attended)
    model = keras.Model(sequence, keras.layers.GRU(4)(normalised))
    attention = [Part((6, 2, 3), (1, 2)), Part((2, 3), ())] * 3 + [Part((2, 3, 6), (2,)), Part((6,), ())]
    gru = [Part((6, 12), (-1,)), Part((4, 12), (-1,)), Part((2, 12), ())]
    assert layout(model) == [*attention, *[Part((5, 6), ())] * 2, *gru]
    moved = random_plane(model, flat_weights(model), 1).directions[0] != 0
    assert moved.sum() == 4 * 36 + 10 * 12, "the kernels"


def test_rescaled_filters_are_drawn_alike():
    """The point of Li et al.: ReLU networks whose weights differ and whose function does not have the same surface."""
    layers = [keras.Input((8,)), keras.layers.Dense(5, "relu"), keras.layers.Dense(3)]
    model = keras.Sequential(layers)
    x, y = RNG.normal(size=(50, 8)).astype(np.float32), RNG.integers(0, 3, 50)
    objective, w = Objective(model, x, y), flat_weights(model)
    other = w.copy()
    other[:40] *= 16  # the first kernel; its biases are 0
    other[45:60] /= 16
    there, here = (evaluate(objective, random_plane(model, v, seed=3), points=3).loss for v in (other, w))
    np.testing.assert_allclose(there, here, rtol=1e-5)
    plain = [
        evaluate(objective, random_plane(model, v, seed=3, normalisation="none"), points=3).loss for v in (other, w)
    ]
    assert abs(plain[0] / plain[1] - 1).max() > 0.1


def test_random_directions_are_a_function_of_the_seed(network):
    w = flat_weights(network)
    first, again, other = (random_plane(network, w, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.directions, again.directions)
    assert first.directions.shape == (2, len(w))
    different = [*first.directions, *other.directions]
    assert all(abs(np.corrcoef(a, b)[0, 1]) < 0.5 for i, a in enumerate(different) for b in different[:i])
    np.testing.assert_array_equal(random_plane(network, w, 1, seed=1).directions[0], first.directions[0])
    np.testing.assert_array_equal(first.at((0, 0)), w)


def test_a_plane_through_three_points_reproduces_the_line(digits):
    """Of softmax regression on the real digits: at (alpha, 0) is what Figure 3 has at alpha."""
    model = keras.Sequential([keras.Input((784,)), keras.layers.Dense(10)])
    objective = Objective(model, digits.x_train, digits.y_train)
    small, large, start = (RNG.normal(0, 0.1, 7850) for _ in range(3))
    plane = through([small, large, start])
    for mark, point in zip(plane.marks, (small, large, start), strict=True):
        np.testing.assert_allclose(plane.at(mark), point, atol=1e-12)
    a, b = plane.directions
    assert a @ b == pytest.approx(0, abs=1e-9 * (a @ a))
    assert b @ b == pytest.approx(a @ a) == pytest.approx(np.linalg.norm(small - large) ** 2)
    line = evaluate(objective, through([small, large]), points=5, reach=0.5)
    np.testing.assert_allclose(line.a, [-0.5, 0, 0.5, 1, 1.5])
    for alpha, loss, accuracy in zip(line.a, line.loss[0], line.accuracy[0], strict=True):
        expected = objective.evaluate(path_point("linear", alpha, small, large))
        found = objective.evaluate(plane.at((alpha, 0)))
        # The weights are equal but for rounding to float32, and the losses but for what that is worth.
        assert loss == pytest.approx(expected.loss, rel=1e-6) == pytest.approx(found.loss, rel=1e-6)
        assert abs(accuracy - expected.accuracy) <= 100 / len(digits.x_train)


@pytest.mark.parametrize("dimensions", [1, 2])
def test_principal_components_are_those_of_sklearn(dimensions):
    walk = np.cumsum(RNG.normal(size=(9, 300)), axis=0)
    plane = principal(walk, dimensions)
    known = PCA(dimensions).fit(walk)
    np.testing.assert_allclose(plane.axis_values, 100 * known.explained_variance_ratio_)
    signs = np.sign(np.sum(plane.directions * known.components_, axis=1))
    np.testing.assert_allclose(plane.directions, signs[:, None] * known.components_, atol=1e-10)
    projected = signs * known.transform(walk)
    np.testing.assert_allclose(plane.marks, projected - projected[0], atol=1e-9)
    assert (plane.marks[-1] >= 0).all()
    np.testing.assert_allclose(plane.mixture @ walk, plane.directions, atol=1e-10)


def test_the_surface_along_eigenvectors_is_a_parabola():
    root = RNG.normal(size=(40, 40))
    hessian, center = root @ root.T, RNG.normal(size=40)

    def value_and_gradient(w):
        slope = hessian @ (w - center)
        return float((w - center) @ slope / 2), slope

    function = SimpleNamespace(
        evaluate=lambda w: SimpleNamespace(loss=value_and_gradient(w)[0], accuracy=np.nan),
        value=lambda w: value_and_gradient(w)[0],
        value_and_gradient=value_and_gradient,
        hessian_vector_product=lambda w, v: hessian @ v,
    )
    plane, notes = steepest_plane(function, center), []
    values = np.linalg.eigvalsh(hessian)[:-3:-1]
    np.testing.assert_allclose(plane.axis_values, values, rtol=1e-3)
    found = evaluate(function, plane, points=3, reach=2.0, report=notes.append)
    expected = [[values @ np.square([x, y]) / 2 for x in (-2, 0, 2)] for y in (-2, 0, 2)]
    np.testing.assert_allclose(found.loss, expected, rtol=1e-3, atol=1e-9)
    assert len(notes) == 9


def test_grids():
    square = through([np.zeros(3), np.array([2.0, 0, 0]), np.array([0, 1.0, 0])])
    np.testing.assert_allclose(square.marks, [[0, 0], [1, 0], [0, 0.5]])
    a, b = square.axes(3, reach=0.25)
    np.testing.assert_allclose(a, [-0.25, 0.5, 1.25])
    np.testing.assert_allclose(b, [0.25 - 0.375, 0.25, 0.25 + 0.375])
    thin = through([np.zeros(3), np.array([2.0, 0, 0]), np.array([0, 0.01, 0])])
    assert np.ptp(thin.axes(3, 0.0)[1]) == pytest.approx(0.5), "else nothing would be seen"


def test_states_are_mixed_like_the_weights():
    states = [[RNG.normal(size=2).astype(np.float32), np.array([7], np.uint32)] for _ in range(3)]
    points = [Point(RNG.normal(size=5), state) for state in states]
    plane = through(points)
    for mark, (mean, number) in zip(plane.marks, states, strict=True):
        found, kept = plane.point(mark).state
        np.testing.assert_allclose(found, mean, rtol=1e-5)
        assert (found.dtype, kept.dtype, kept[0]) == (np.float32, np.uint32, number[0])
    np.testing.assert_allclose(plane.point((0.25, 0)).state[0], 0.75 * states[0][0] + 0.25 * states[1][0], rtol=1e-5)
    line = through(points[:2])
    for alpha in (-1.0, 0.25, 2.0):
        between = state_between(alpha, *states[:2])  # as on the path of Figure 3
        np.testing.assert_allclose(line.point((alpha,)).state[0], between[0], rtol=1e-5)
    assert principal([Point(point.weights, []) for point in points], 1).point((0.5,)).state == []


def test_each_point_is_evaluated_with_its_own_state():
    points = [Point(RNG.normal(size=5), [np.float32([mean])]) for mean in (1.0, 3.0)]
    taken, flat = [], SimpleNamespace(samples=1, evaluate=lambda w: SimpleNamespace(loss=1.0, accuracy=0.0))
    objectives = SimpleNamespace(take_state=taken.append, train=lambda n: flat, test=lambda n: flat)
    problem = dict.fromkeys(("network", "dataset", "data_digest", "definition", "weights_digest"), "")
    grid = {"dimensions": 1, "points": 3, "row": 1, "reach": 0.5, "samples": 1}
    request = SurfaceRequest(**problem, directions="points", **grid)
    request.compute(objectives, through(points), lambda *_: None)
    assert taken == [[2.0]], "in the middle"
    seen = []
    flat.evaluate = lambda point: seen.append(*point.state) or SimpleNamespace(loss=1.0, accuracy=0.0)
    evaluate(flat, through(points), points=4, reach=0.5)
    np.testing.assert_allclose(np.ravel(seen), [1, 1 + 1 / 3, 3 - 1 / 3, 3], rtol=1e-6)


def test_mistakes(network):
    w = flat_weights(network)
    for points in ([w], [w] * 4):
        with pytest.raises(UserError, match="A line goes through 2 points and a plane through 3"):
            through(points)
    with pytest.raises(UserError, match="do not determine a line"):
        through([w, w])
    with pytest.raises(UserError, match="do not determine a plane"):
        through([w, w + 1, w + 3])
    with pytest.raises(UserError, match="2 points do not have 2 principal components"):
        principal([w, w + 1])
    with pytest.raises(UserError, match="3 points do not have 2 principal components"):
        principal([w, w + 1, w + 3])
    with pytest.raises(UserError, match="'Filter' .did you mean filter.*; choose one of filter, layer, none"):
        random_plane(network, w, normalisation="Filter")
    for points, words in (
        ([Point(w, []), w], "bare weights, but not of both"),
        ([w[None], w[None]], "flat vectors of weights, or of Points"),
        ([w, w[1:]], "must be weights of one model"),
        ([w, np.nan * w], "made of finite weights"),
    ):
        for plane in (through, principal):
            with pytest.raises(UserError, match=words):
                plane(points)
    with pytest.raises(UserError, match="but none of 3"):
        random_plane(network, w, 3)
    with pytest.raises(UserError, match=r"No weight moves .*, since all that could are 0; let the biases"):
        random_plane(network, 0 * w)
    with pytest.raises(UserError, match="2 or more points each way, not 1"):
        evaluate(None, through([w, w + 1]), points=1)
    with pytest.raises(UserError, match="The model has 6 trainable weights, the vector given has 5"):
        normalised(np.ones(5), np.ones(5), [Part((2, 3), (-1,))])


def test_where_the_loss_is_no_number_the_figure_is_grey():
    loss, accuracy = np.array([[1.0, 2.0, np.nan, np.inf]] * 2), np.array([[90.0, 80.0, np.nan, np.nan]] * 2)
    found = Surface(np.arange(4.0), np.arange(2.0), loss, accuracy, np.zeros((1, 2)), np.array([]))
    figure = surface_figures.contours([Panel("one", found)])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    for axes, colour in zip(figure.axes, (colormaps["viridis"](0.0), colormaps["viridis_r"](0.875)), strict=False):
        for place, expected in ((2.6, to_rgba(surface_figures.BLANK)), (0.02, colour)):
            x, y = axes.transData.transform((place, 0.6))
            pixel = np.asarray(canvas.buffer_rgba())[-int(y), int(x)]
            assert tuple(pixel / 255) == pytest.approx(expected, abs=0.05)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["not finite"]


def test_figures_of_losses_that_are_no_numbers():
    values = np.array([[np.inf, 1.0, 0.0], [np.nan, 2.0, 1e-9]])
    found = Surface(np.arange(3.0), np.arange(2.0), values, np.full((2, 3), 50.0), np.zeros((1, 2)), np.array([]))
    line = Surface(np.arange(3.0), np.zeros(1), values[:1], values[:1], np.zeros((1, 1)), np.array([]))
    panels = [Panel("one", found), Panel("other", found, marks=("here",))]
    for figure in (surface_figures.contours(panels), surface_figures.views(panels[:1])):
        figure.draw_without_rendering()
    blank, face = figure.axes[0].collections[0].get_facecolor()
    assert blank[3] == 0
    assert tuple(face) == pytest.approx(colormaps["viridis"](0.0)), "the scale's colour, whatever the slope"
    without = Surface(found.a, found.b, values, np.full((2, 3), np.nan), found.marks, found.axis_values)
    assert len(surface_figures.contours([Panel("a regression", without)]).axes) == 2, "the loss and its scale"
    surface_figures.lines([Panel("line", line)]).draw_without_rendering()
    # Densities have negative losses, which a logarithmic scale would leave out
    below = Surface(found.a, found.b, values - 5, values, found.marks, found.axis_values)
    line = Surface(line.a, line.b, values[1:] - 5, values[1:], line.marks, line.axis_values)
    figure, drawn = surface_figures.contours([Panel("one", below)]), surface_figures.lines([Panel("line", line)])
    assert figure.axes[-2].get_ylim() == pytest.approx((-5, -3)), "the scale of the losses"
    assert drawn.axes[0].get_ylim()[0] < -5 < -3 < drawn.axes[0].get_ylim()[1]
    height = surface_figures.views([Panel("one", below)])
    for each in (figure, drawn, height):
        each.draw_without_rendering()
    assert height.axes[0].get_zlim() == pytest.approx((np.arcsinh(-5), np.arcsinh(-3)))
    assert surface.NORMALISATIONS[0] == "filter"


def test_vtk():
    """As VTK's file format has it: the first coordinate runs fastest."""
    losses, accuracies = np.array([[1.5, 2, np.nan], [4, 5, 6]]), np.arange(6).reshape(2, 3)
    text = surface.vtk(np.array([-1, 0.5, 2]), np.array([0.25, 1]), {"loss": losses, "accuracy": accuracies})
    assert text.splitlines()[2:8] == [
        "ASCII",
        "DATASET STRUCTURED_POINTS",
        "DIMENSIONS 3 2 1",
        "ORIGIN -1.0 0.25 0",
        "SPACING 1.5 0.75 1",
        "POINT_DATA 6",
    ]
    loss, accuracy = text.partition("POINT_DATA 6\n")[2].split("SCALARS ")[1:]
    for found, name, values in ((loss, "loss", losses), (accuracy, "accuracy", accuracies)):
        head, lookup, *numbers = found.splitlines()
        assert (head, lookup) == (f"{name} double 1", "LOOKUP_TABLE default")
        np.testing.assert_array_equal([float(number) for line in numbers for number in line.split()], values.ravel())
    assert "DIMENSIONS 3 1 1" in surface.vtk(np.arange(3), np.zeros(1), {"loss": np.zeros((1, 3))})
