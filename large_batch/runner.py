"""Trains and measures a list of requests: each once, kept, resumed, and shared by processes that run the same command.

Recipes that differ in their epochs only are one training, whose iterates are kept on the way. What another process has
taken is left to it; when nothing is left to take, it is waited for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TypeVar

from large_batch import measurements, memory, places, store
from large_batch.cli import Settings
from large_batch.errors import BusyError, MachineError, NotFiniteError, UserError
from large_batch.functions import Point
from large_batch.gradients import KeptGradients
from large_batch.measurements import Measured, SharpnessRequest, Solution
from large_batch.minimizers import Minimizers, NoMinimizerError
from large_batch.models import digest
from large_batch.objectives import Objectives, Request
from large_batch.places import Item, Place, Span, SurfaceRequest, path_point, state_between
from large_batch.progress import Progress, Report
from large_batch.recipes import Recipe
from large_batch.scalars import Scalars
from large_batch.surface import Plane
from large_batch.training import Epoch

Work = TypeVar("Work")
Result = TypeVar("Result")


def trajectories(recipes: Iterable[Recipe]) -> dict[Recipe, list[Recipe]]:
    """Return the trainings that lead to the recipes: by longest recipe, the iterates that are asked for, the earliest
    first. Those at which others start come before these."""
    wanted: dict[Recipe, set[int]] = {}

    def want(recipe: Recipe) -> None:
        if recipe.warm_start:
            want(recipe.warm_start)
        wanted.setdefault(recipe.at_epoch(0), set()).add(recipe.epochs)

    for recipe in recipes:
        want(recipe)
    iterates = [[begin.at_epoch(epoch) for epoch in sorted(epochs)] for begin, epochs in wanted.items()]
    return {group[-1]: group for group in iterates}


def leave_busy_for_last(work: Sequence[Work], do: Callable[[Work, bool], Result], wait: bool) -> dict[Work, Result]:
    """Return what `do(item, wait)` returns for each item.

    `do` raises `BusyError` for what another process does, unless told to wait: that is asked for again at the end, or,
    without `wait`, the error is raised once all else is done.
    """
    done = {}
    for last in (False, True):
        busy = None
        for item in work:
            if item not in done:
                try:
                    done[item] = do(item, last and wait)
                except BusyError as error:
                    busy = busy or error
    if busy:
        raise busy
    return {item: done[item] for item in work}


class Runner:
    """Trains and measures over one data set, in one store, as a command's settings say.

    Args:
        minimizers: The store, the network and the data.
        settings: Of the command: what is trained anew, waited for, and written for TensorBoard.
    """

    def __init__(self, minimizers: Minimizers, settings: Settings):
        self.minimizers, self.retrain, self.wait = minimizers, settings.retrain, settings.wait
        self.scalars = Scalars(settings.tensorboard) if settings.tensorboard else None
        self.objectives = Objectives(minimizers.network, minimizers.data, settings.definition, minimizers.replicas)
        self._loaded: dict[Recipe | str, Point] = {}  # the last two, the ends of a path
        self._digests: dict[Span, str] = {}
        self._planes: dict[SurfaceRequest, Plane] = {}  # the last one, for its rows

    def solve(
        self,
        regimes: dict[str, Sequence[Recipe]],
        requests: Sequence[Request],
        sharp: Collection[Recipe] | None = None,
        tested: Collection[Recipe] = (),
    ) -> dict[str, list[Solution]] | None:
        """Return the solutions of the recipes of each regime, stored, or trained and measured now.

        Args:
            regimes: The recipes by the role of their minimizers.
            requests: What is measured of each: loss and accuracy first, then sharpness.
            sharp: Those whose sharpness is measured; default: all.
            tested: Those that need a test history.

        Returns:
            The solutions, or None where another process reports the results.

        Raises:
            UserError: Where one of `tested` was trained without a test history, or a loss is not finite.
            MachineError: Where another process trains one anew.
        """
        for recipe in () if self.retrain else tested:
            self.minimizers.check_tested(recipe)
        recipes = dict.fromkeys(recipe for group in regimes.values() for recipe in group)
        wanted = {
            recipe: [(one, Place(recipe)) for one in requests[: None if sharp is None or recipe in sharp else 1]]
            for recipe in recipes
        }
        if (found := self.run(list(recipes), [item for items in wanted.values() for item in items])) is None:
            return None

        def solution(minimizer: str, recipe: Recipe) -> Solution:
            at, (first, *others) = self.minimizers.stored(recipe), [found[item] for item in wanted[recipe]]
            if first.result.note:
                raise UserError(f"{recipe.name} is no minimizer: {first.result.note}.")
            weights = first.measurement.weights_digest
            if at is None or digest(at.weights, at.state) != weights:
                raise MachineError(f"{recipe.name} was trained anew meanwhile; run the command again.")
            return Solution(minimizer, recipe, at.provenance, weights, at.distance, first, others)

        return {regime: [solution(regime, recipe) for recipe in group] for regime, group in regimes.items()}

    def run(
        self, recipes: Sequence[Recipe], asked: Sequence[Item] = (), leave_diverged: bool = False
    ) -> dict[Item, Measured] | None:
        """Train the recipes and those that the places need, and measure what is asked for at each place.

        What is to do and what is done is said first.

        Args:
            recipes: To train.
            asked: Requests, each with its place.
            leave_diverged: Whether a training that diverges, or a loss that is not finite, is only said, and what is
                asked for there is not among the results.

        Returns:
            The measurements, or None where another process reports the results, or has what is left in its hands and
            is not waited for.

        Raises:
            UserError: As `Minimizers.train` and the requests do.
        """
        ends = list(dict.fromkeys(end for _, place in asked for end in place.ends))
        for file in (end for end in ends if not isinstance(end, Recipe)):
            self._load(file, wait=True)  # a file that is none shows before hours of work
        needed = list(dict.fromkeys([*recipes, *(end for end in ends if isinstance(end, Recipe))]))
        trainings = trajectories(needed)
        for iterates in trainings.values() if not self.retrain else ():
            if all(one.epochs == 0 for one in iterates[:-1]):  # others would be of another training, made here
                self.minimizers.take_shipped(iterates)
        try:
            found = self._run(trainings, asked, leave_diverged)
        except BusyError as error:
            if self.wait:
                raise
            print(f"{error} What is left is in other hands; the same command without --nowait waits for the results.")
            return None
        return found if self.minimizers.replicas.chief else None

    def _run(
        self, trainings: dict[Recipe, list[Recipe]], asked: Sequence[Item], leave_diverged: bool
    ) -> dict[Item, Measured]:
        train, test = len(self.minimizers.data.x_train), len(self.minimizers.data.x_test)
        missing = {longest: last for longest, iterates in trainings.items() if (last := self._missing(iterates))}
        # A training that is whole but for its end still has something to do
        to_train = {a: max(1, self.minimizers.samples_to_train(last, self.retrain)) for a, last in missing.items()}
        resumed = sum(to_train[longest] < last.epochs * train for longest, last in missing.items())
        done = self.stored(asked)
        costs = {item: 0 if item in done else item[0].cost(train, test) for item in asked}
        steps = list(dict.fromkeys(self.minimizers.memory(longest) for longest in missing))
        passes = {
            (getattr(item[0], "samples", None), item[0].of_hessian, item[0].statistics)
            for item, cost in costs.items()
            if cost
        }
        passes |= {(longest.followed.samples, True) for longest in missing if longest.followed}
        needed = [step.bytes for step in steps] + [self.objectives.measuring_bytes(*one) for one in passes]
        if self.minimizers.replicas.chief:
            work = f"{len(trainings)} trainings ({len(trainings) - len(missing)} stored, {resumed} resumed)"
            self._say_plan(f"{work}, {len(asked)} measurements ({len(done)} stored)", trainings, needed)
        for step in steps:
            step.check()
        for iterates in trainings.values() if not self.retrain and self.minimizers.replicas.chief else ():
            self.minimizers.warn_of_two(iterates)

        trained = {longest: longest.passes * samples for longest, samples in to_train.items()}
        diverged = set()
        with Progress(sum(trained.values()) + sum(costs.values())) as progress:

            def do(work: Recipe | Item, wait: bool) -> Measured | None:
                if work in done:
                    return done[work]
                if isinstance(work, Recipe):
                    with progress.job(trained[work], work.name) as report:
                        try:
                            self._train(trainings[work], lambda n, note: report(work.passes * n, note), wait)
                        except NoMinimizerError as error:
                            if not leave_diverged:
                                raise
                            diverged.update(trainings[work])
                            store.log.warning(error)
                    return None
                if not diverged.isdisjoint(work[1].ends):
                    return None
                with progress.job(costs[work], work[1].name) as report:
                    try:
                        return self._measure(*work, report, wait)
                    except NotFiniteError as error:
                        if not leave_diverged:
                            raise
                        store.log.warning("%s: %s", work[1].name, error)
                        return None

            results = leave_busy_for_last([*to_train, *dict.fromkeys(asked)], do, self.wait)
        found = {item: results[item] for item in asked if results[item]}
        if self.scalars and self.minimizers.replicas.chief:
            self._write_scalars(trainings, found)
        return found

    def stored(self, asked: Sequence[Item]) -> dict[Item, Measured]:
        """Return those measurements that are stored, and not to be made anew."""
        return {item: found for item in asked if (found := self._stored(item))}

    def _write_scalars(self, trainings: Iterable[Recipe], results: dict[Item, Measured]) -> None:
        """Write what is not written yet: trainings that were stored, and the sharpness of iterates."""
        for longest in trainings:
            self.scalars.epochs(self._run_name(longest), self.minimizers.state(longest).history)
        runs = {longest.at_epoch(0): self._run_name(longest) for longest in trainings}
        for (_, place), measured in results.items():
            if isinstance(measured.measurement, SharpnessRequest) and isinstance(end := place.ends[0], Recipe):
                run, request = runs[end.at_epoch(0)], measured.measurement
                self.scalars.sharpness(run, end.epochs, request.name, request.how, measured.result.value)

    def _run_name(self, recipe: Recipe) -> str:
        return self.minimizers.folder(recipe).path.name

    def _say_plan(self, work: str, trainings: Iterable[Recipe], needed: list[int]) -> None:
        """Print what will be done, with what, and where it is kept."""
        device = self.minimizers.origin.device
        if device == "CPU":
            device = f"CPU only, {self.minimizers.origin.threads} threads; for a GPU: pip install -e '.[gpu]'"
        if (replicas := self.minimizers.replicas.count) > 1:
            device = f"{replicas} replicas: {device}"
        sizes = sorted({size for recipe in trainings for size in recipe.batch_sizes})
        print(f"Device:   {device}")
        if sizes:
            print(f"Batches:  {', '.join(f'{size:,}' for size in sizes)} samples")
        print(f"Work:     {work}")
        if needed:
            used, free = memory.used_bytes(), memory.free_bytes()
            print(f"Memory:   about {(used + max(needed)) / 2**30:.1f} GiB; {(used + free) / 2**30:.1f} GiB are free")
        print(f"Kept in:  {self.minimizers.run_dir}", flush=True)

    def _missing(self, iterates: list[Recipe]) -> Recipe | None:
        """Return the last iterate of a training that is not stored, None if all of them are."""
        return next((one for one in reversed(iterates) if self.retrain or not self.minimizers.is_stored(one)), None)

    def _train(self, iterates: list[Recipe], report: Report, wait: bool) -> None:
        """Store the iterates of a training, the last missing one first: the others are on its way.

        Raises `BusyError`, unless told to `wait`, where another process trains it, or what it starts from.
        """
        longest, minimizers = iterates[-1], self.minimizers
        keep = [recipe.epochs for recipe in iterates]

        def watch(history: list[Epoch]) -> None:
            if self.scalars and minimizers.replicas.chief:
                self.scalars.epochs(self._run_name(longest), history)

        for recipe in reversed(iterates):
            anew = self.retrain and not wait and recipe == longest  # what is waited for is new
            if wait or anew or not minimizers.is_stored(recipe):  # what is waited for may be about to be replaced
                settings = {"retrain": anew, "test_history": True, "keep": keep, "wait": wait}
                minimizers.train(recipe, report=report, watch=watch, **settings)

    def _stored(self, item: Item) -> Measured | None:
        """Return the measurement if it and all that it depends on is stored, and not to be made anew."""
        recipes = [end for end in item[1].ends if isinstance(end, Recipe)]
        if recipes and (self.retrain or not all(map(self.minimizers.is_stored, recipes))):
            return None
        request, _ = self._at(*item, wait=True)
        return measurements.stored(self.minimizers.run_dir, request)

    def _measure(self, request: Request, place: Place | Span, report: Report, wait: bool) -> Measured:
        request, point = self._at(request, place, wait)

        def compute(gradients: KeptGradients) -> object:
            if isinstance(place, Span):
                return request.compute(self.objectives, self._plane(request, place, wait), report)
            at, fixed = self.objectives.rescaled(point.weights, point.state, request.rescale)
            self.objectives.take_state(fixed, request.statistics)
            self.objectives.gradients = gradients
            return request.compute(self.objectives, at, report)

        minimizers = self.minimizers
        return measurements.load_or_compute(
            minimizers.run_dir, request, compute, minimizers.origin, minimizers.replicas, wait
        )

    def _at(self, request: Request, place: Place | Span, wait: bool) -> tuple[Request, Point | None]:
        """Return the request with the digest of the weights at a place, and the point there; of a span, which is no one
        place, only the request."""
        if isinstance(place, Span):
            if place not in self._digests:
                self._digests[place] = places.spanned_digest(self._load(end, wait) for end in place.ends)
            return dataclasses.replace(request, weights_digest=self._digests[place]), None
        point, *others = [self._load(end, wait) for end in place.ends]
        for other in others:
            weights = path_point(place.curve, place.alpha, point.weights, other.weights)
            point = Point(weights, state_between(place.alpha, point.state, other.state))
        return dataclasses.replace(request, weights_digest=digest(point.weights, point.state)), point

    def _load(self, end: Recipe | str, wait: bool) -> Point:
        if end not in self._loaded:
            if isinstance(end, Recipe):
                missing = not self.minimizers.is_stored(end)
                if not wait and self.minimizers.replicas.broadcast(missing):
                    raise BusyError(f"Another process trains {end.name}.")
                alone = self.minimizers.replicas.machines == 1  # several machines look together, in `train`
                minimizer = self.minimizers.stored(end) if alone else None
                minimizer = minimizer or self.minimizers.train(end, wait=wait)
                point = Point(minimizer.weights, minimizer.state)
            else:
                point = self.objectives.read(end)
            while len(self._loaded) > 1:
                self._loaded.pop(next(iter(self._loaded)))
            self._loaded[end] = point
        return self._loaded[end]

    def _plane(self, request: SurfaceRequest, span: Span, wait: bool) -> Plane:
        if request.plane not in self._planes:
            self._planes.clear()
            points = [self._load(end, wait=True) for end in span.ends]
            minimizers = self.minimizers
            self._planes[request.plane] = places.plane_of(
                request.plane, points, self.objectives, minimizers.run_dir, minimizers.replicas, wait
            )
        return self._planes[request.plane]
