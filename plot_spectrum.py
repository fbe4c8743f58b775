"""Spectral densities of the Hessian at small-batch and large-batch minimizers (section 2.2.2 of Keskar et al., 2017).

Trains a network with small-batch and with large-batch ADAM, or reuses what is trained, estimates the distribution of
all eigenvalues of the Hessian at both minimizers by stochastic Lanczos quadrature, and draws it with error bars over
the random vectors: the density, and how many eigenvalues are above a value. With --by_layer so for each layer's block
of the Hessian, too. Each density is kept and reused, and several processes with one --run_dir share the work.

    python plot_spectrum.py -n F1
    python plot_spectrum.py -n F1 --by_layer --curvature_samples=5000 --probes=5
"""

from __future__ import annotations

if __name__ == "__main__":  # first, so that Ctrl-C is answered while the others are imported
    import large_batch.ctrl_c  # noqa: F401

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from large_batch import cli
from large_batch.cli import setting

POINTS = 2000  # of the .csv file


@dataclass(frozen=True, kw_only=True)
class Settings(cli.SpectrumSettings):
    """The flags."""

    curvature_samples: int = setting(
        10_000, "Training samples over which the Hessian is taken, the first ones.", "n{}", "Spectrum", least=1
    )

    def resolve(self, network: Any, samples: int) -> Settings:
        """Keep to the samples there are."""
        return replace(super().resolve(network, samples), curvature_samples=min(self.curvature_samples, samples))


def rows(densities: dict[str, dict[str, Any]]) -> list[dict]:
    """Return the rows of the .csv file: the density of each minimizer and layer at eigenvalues of its range, with bells
    of one width for all minimizers, as in the figure."""
    found = []
    for layer, group in densities.items():
        width = max(density.width for density in group.values())
        for label, density in group.items():
            low, high = density.range
            eigenvalues = np.linspace(low - 5 * width, high + 5 * width, POINTS)
            values = zip(eigenvalues, *density.at(eigenvalues, width), strict=True)
            place = {"minimizer": label, "layer": layer, "width": width}
            found += [place | dict(zip(("eigenvalue", "density", "error"), row, strict=True)) for row in values]
    return found


def main(settings: Settings) -> None:
    """Train or find the minimizers, estimate the densities, write the numbers and draw the figure."""
    settings.check()
    import network_zoo
    from large_batch import curvature_figures, tables
    from large_batch.experiment import Experiment
    from large_batch.places import Place
    from large_batch.runner import Runner
    from large_batch.spectra import Effort

    # Recipes
    experiment = Experiment.begin(settings, network_zoo.get)
    settings = experiment.settings
    ends = {label: experiment.recipe(batch) for label, batch in settings.batches.items()}
    effort = Effort(settings.curvature_samples, settings.probes, settings.steps)
    runner = Runner(experiment.minimizers, settings)
    layers = ["", *(runner.objectives.parts if settings.by_layer else ())]
    asked = {
        layer: {label: (effort.density(experiment.request, layer=layer), Place(end)) for label, end in ends.items()}
        for layer in layers
    }
    # Run
    measured = runner.run([], [item for group in asked.values() for item in group.values()])
    if measured is None:
        return
    found = {layer: {label: measured[item] for label, item in group.items()} for layer, group in asked.items()}
    densities = {layer: {label: one.result for label, one in group.items()} for layer, group in found.items()}
    # Table and figure
    what = f"Spectrum of the Hessian over {settings.curvature_samples:,} training samples"
    title = experiment.title(f"{what}, {settings.epochs} epochs")
    by_label = {label: [group[label] for group in found.values()] for label in ends}
    print(f"\n{title}\n{tables.spectrum_table(by_label)}")
    origins = {label: experiment.origin_of(end) for label, end in ends.items()}
    drawn = {"": curvature_figures.spectral_densities(densities, title)}
    experiment.write("spectrum", rows(densities), {"minimizers": origins, "results": by_label}, drawn)


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
