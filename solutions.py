"""Solutions: what a list of recipes leads to, trained and measured, and what that costs.

Recipes that differ in their epochs only are one training, whose iterates are kept on the way. Everything is stored and
reused, and what other processes do is left to them and waited for.
"""

from __future__ import annotations

import quiet_tensorflow  # noqa: F401

import dataclasses
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import measurements
import paper
import runs
import tasks
import training
from curvature import PASSES
from data_zoo import DataSet
from errors import BusyError
from measurements import EvaluationMeasurement, Measured, SharpnessMeasurement
from metric import ITERATIONS
from objective import Objective
from progress import Progress
from recipes import Recipe
from replicas import ALONE, Replicas
from training import Minimizer
from training_loop import DivergedError, TrainingLoop

PROBE_BATCH, PROBE_SECONDS = 512, 0.5  # the steps that are timed before the cost is estimated


@dataclass(frozen=True)
class Solution:
    """A minimizer, how it came about, and what was measured there: `evaluation` holds an `Evaluated`, `sharpness` a
    `SharpnessResult` at each of `paper.EPSILONS`, or nothing.

    `weights` is the digest of the weights; the distance is Euclidean, from where this training started.
    """

    recipe: Recipe
    training: runs.Provenance
    weights: str
    distance_from_start: float
    evaluation: Measured
    sharpness: list[Measured]


@dataclass(frozen=True)
class Plan:
    """What is asked for and what of it is still to do.

    `trainings` are all that lead to the recipes `asked`, each as its longest recipe and the ascending epochs whose
    iterates count; `to_train` holds the samples still to be trained by each that is not done, by its longest recipe.
    `sharp` are the recipes whose sharpness is asked for, `measurements` and `measured` count what is to be measured and
    what is; `passes` holds the forward passes of single samples that the rest takes, by recipe.
    """

    asked: list[Recipe]
    sharp: set[Recipe]
    trainings: dict[Recipe, list[int]]
    to_train: dict[Recipe, int]
    complete: dict[Recipe, Solution]
    measurements: int
    measured: int
    passes: dict[Recipe, int]

    @property
    def work(self) -> int:
        """All that is to do, in forward passes of single samples."""
        return 3 * sum(self.to_train.values()) + sum(self.passes.values())

    def __str__(self) -> str:
        count = len(self.trainings)
        return (
            f"{count} trainings ({count - len(self.to_train)} of them done), {self.measurements} measurements "
            f"({self.measured} of them done)"
        )


def trajectories(recipes: Iterable[Recipe]) -> dict[Recipe, list[int]]:
    """Return the trainings that lead to the recipes: by longest recipe, the ascending epochs whose iterates are asked
    for. Those at which others start come before these."""
    wanted: dict[Recipe, set[int]] = {}

    def want(recipe: Recipe) -> None:
        if recipe.warm_start:
            want(recipe.warm_start)
        wanted.setdefault(recipe.iterate(0), set()).add(recipe.epochs)

    for recipe in recipes:
        want(recipe)
    return {begin.iterate(max(epochs)): sorted(epochs) for begin, epochs in wanted.items()}


class Solver:
    """Finds solutions over one data set, in one store."""

    def __init__(
        self,
        data: DataSet,
        run_dir: str | Path,
        origin: runs.Provenance,
        *,
        sharpness_samples: int | None = None,
        iterations: int = ITERATIONS,
        retrain: bool = False,
        replicas: Replicas = ALONE,
    ):
        """Sharpness is taken over the first `sharpness_samples` training samples, or over all, by so many `iterations`
        of L-BFGS-B; `origin` describes this process; `retrain` trains everything anew."""
        self.data, self.run_dir, self.origin = data, run_dir, origin
        self.iterations, self.retrain, self.replicas = iterations, retrain, replicas
        samples = len(data.x_train)
        self._part = sharpness_samples if (sharpness_samples or samples) < samples else None
        self._objectives: tuple[Objective, Objective, Objective] | None = None

    def plan(
        self,
        recipes: Sequence[Recipe],
        sharp: Collection[Recipe] | None = None,
        share: Sequence[Recipe] | None = None,
    ) -> Plan:
        """Return what the solutions of a `share` of the recipes take, by default of all, with the sharpness of those
        that are in `sharp`, by default all. Whose share it is, a training is the same: it leads to all the recipes."""
        asked = list(dict.fromkeys(recipes if share is None else share))
        sharp = set(recipes if sharp is None else sharp)
        needed = {longest.iterate(0) for longest in trajectories(asked)}
        every = trajectories(recipes)
        trainings = {longest: epochs for longest, epochs in every.items() if longest.iterate(0) in needed}
        to_train = {}
        for longest, epochs in trainings.items():
            iterates = map(longest.iterate, epochs)
            missing = [each for each in iterates if self.retrain or not training.is_stored(each, self.run_dir)]
            if missing:
                to_train[longest] = training.samples_to_train(missing[-1], self.data, self.run_dir, self.retrain)
        complete, passes, wanted, measured = {}, {}, 0, 0
        for recipe in asked:
            found = [None] * (1 + len(paper.EPSILONS) * (recipe in sharp))
            if not self.retrain and (minimizer := training.stored(recipe, self.data, self.run_dir)):
                wishes = self._wishes(recipe, measurements.digest(minimizer.weights), recipe in sharp)
                found = [measurements.stored(self.run_dir, wish) for wish in wishes]
                if None not in found:
                    complete[recipe] = _solution(minimizer, found)
            wanted += len(found)
            measured += len(found) - found.count(None)
            evaluated = len(self.data.x_train) + len(self.data.x_test)
            searched = PASSES["gradient"] * (self.iterations + 2) * (self._part or len(self.data.x_train))
            passes[recipe] = evaluated * (found[0] is None) + searched * found[1:].count(None)
        return Plan(asked, sharp, trainings, to_train, complete, wanted, measured, passes)

    def seconds(self, plan: Plan) -> float:
        """Estimate how long the plan takes here, from a few training steps."""
        if not plan.work:
            return 0.0
        recipes = list(plan.to_train) or plan.asked
        most = max(1, min(PROBE_BATCH, len(self.data.x_train) // 4))
        sizes = sorted({min(most, batch) for recipe in recipes for batch in recipe.batch_sizes})
        times = [self._seconds_a_sample(recipes[0], batch) for batch in (sizes[0], sizes[-1])]
        # A step costs something, and so does each of its samples.
        step = max(0.0, (times[0] - times[1]) / (1 / sizes[0] - 1 / sizes[-1])) if len(sizes) > 1 else 0.0
        sample = max(0.0, times[1] - step / sizes[-1])
        total = sum(plan.passes.values()) * sample / 3
        for recipe, left in plan.to_train.items():
            for epoch in reversed(range(recipe.epochs)):
                part = min(left, len(self.data.x_train))
                total += part * (sample + step / recipe.batch_size_in(epoch))
                left -= part
        return total

    def _seconds_a_sample(self, recipe: Recipe, batch_size: int) -> float:
        short = dataclasses.replace(recipe, batch_size=batch_size, epochs=1, schedule=(), warm_start=None)
        loop = TrainingLoop(short, self.data, self.replicas)
        samples, began = 0, time.monotonic()
        with suppress(DivergedError):  # the training will say so
            loop.advance(stop=False)  # which compiles
            began = time.monotonic()
            while loop.position.seen < len(self.data.x_train):
                if not self.replicas.chief_says(time.monotonic() - began < PROBE_SECONDS):  # machines stop together
                    break
                samples += loop.advance(stop=False)[0]
        return (time.monotonic() - began) / max(samples, 1)

    def solve(self, plan: Plan) -> dict[Recipe, Solution]:
        """Train and measure what is to do, with a progress bar; return the solutions of all that is asked for.

        Raises as `training.train` and `metric.sharpness` do.
        """
        for longest in plan.to_train:
            training.warn_of_memory(longest, self.data, self.replicas)
        with Progress(plan.work) as progress:
            tasks.each(list(plan.to_train), lambda longest, wait: self._train(longest, plan, progress, wait))
            return tasks.each(plan.asked, lambda recipe, wait: self._measure(recipe, plan, progress, wait))

    def _train(self, longest: Recipe, plan: Plan, progress: Progress, wait: bool) -> None:
        """Store the iterates of a training, the last missing one first: the others are on its way.

        Raises `BusyError`, unless told to `wait`, where another process trains it, or what it starts from.
        """
        epochs, first = plan.trainings[longest], longest.warm_start
        if not wait and self.replicas.chief_says(bool(first) and not training.is_stored(first, self.run_dir)):
            raise BusyError(f"{first.name} is in other hands.")
        with progress.job(3 * plan.to_train[longest], longest.name) as report:
            for epoch in reversed(epochs):
                recipe = longest.iterate(epoch)
                anew = self.retrain and not wait and recipe == longest  # what is waited for is new
                if anew or not training.is_stored(recipe, self.run_dir):
                    training.train(
                        recipe,
                        self.data,
                        self.run_dir,
                        retrain=anew,
                        test_history=True,
                        keep=epochs,
                        report=lambda samples, note: report(3 * samples, note),
                        replicas=self.replicas,
                        wait=wait,
                    )

    def _measure(self, recipe: Recipe, plan: Plan, progress: Progress, wait: bool) -> Solution:
        """Return the solution of a recipe that has been trained."""
        if found := plan.complete.get(recipe):
            return found
        with progress.job(plan.passes[recipe], recipe.name) as report:
            minimizer = training.train(recipe, self.data, self.run_dir, replicas=self.replicas, wait=wait)
            on_train, on_test, on_part = self._all_objectives(recipe)

            def make(wish: EvaluationMeasurement | SharpnessMeasurement) -> object:
                if isinstance(wish, EvaluationMeasurement):
                    result = wish.make(on_train, on_test, minimizer.weights)
                    report(on_train.samples + on_test.samples, "evaluated")
                    return result

                def passed(passes: int, note: str) -> None:
                    report(passes * on_part.samples, f"epsilon {wish.epsilon:g} {note}")

                return wish.make(on_part, minimizer.weights, None, passed)

            wishes = self._wishes(recipe, measurements.digest(minimizer.weights), recipe in plan.sharp)
            found = [
                measurements.keep(self.run_dir, wish, lambda wish=wish: make(wish), self.origin, self.replicas, wait)
                for wish in wishes
            ]
            return _solution(minimizer, found)

    def _wishes(self, recipe: Recipe, weights: str, sharp: bool) -> list[EvaluationMeasurement | SharpnessMeasurement]:
        """Return what is to be measured at the recipe's minimizer, whose weights have this digest."""
        common = dict(
            network=recipe.network,
            definition=recipe.definition,
            architecture=recipe.architecture,
            dataset=self.data.name,
            data_digest=self.data.digest,
            weights_digest=weights,
        )
        box = dict(solver="lbfgsb", iterations=self.iterations, samples=self._part)
        sharpness = [SharpnessMeasurement(**common, epsilon=epsilon, **box) for epsilon in paper.EPSILONS if sharp]
        return [EvaluationMeasurement(**common), *sharpness]

    def _all_objectives(self, recipe: Recipe) -> tuple[Objective, Objective, Objective]:
        """Return the objectives over training set, test set, and the part over which sharpness is taken."""
        if self._objectives is None:
            data, model = self.data, recipe.build(self.data)
            train = Objective(model, data.x_train, data.y_train, replicas=self.replicas)
            test = Objective(model, data.x_test, data.y_test, replicas=self.replicas)
            x, y = data.x_train[: self._part], data.y_train[: self._part]
            part = Objective(model, x, y, replicas=self.replicas) if self._part else train
            self._objectives = train, test, part
        return self._objectives


def _solution(minimizer: Minimizer, found: list[Measured]) -> Solution:
    """Put together what is known of a minimizer, its evaluation first."""
    weights = measurements.digest(minimizer.weights)
    return Solution(minimizer.recipe, minimizer.provenance, weights, minimizer.distance, found[0], found[1:])
