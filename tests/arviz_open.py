"""Open an exported file with ArviZ 1.x alone: neither torch, nor Pyro, nor this package is needed.

    python tests/arviz_open.py FILE.nc ...

It summarises, scores and plots every request in the files, prints what it saw, and ends with an error otherwise.
"""

import sys
import tempfile
from pathlib import Path

import arviz as az
import numpy as np
from xarray import DataTree

SUFFIXES = {"before": "_before", "after": "", "refit": "_refit"}


def main(path: str) -> None:
    """Check every request in the file."""
    require(int(az.__version__.split(".")[0]) >= 1, f"ArviZ 1.x is wanted, this is {az.__version__}")
    tree = az.from_netcdf(path)
    requests = {"": tree} if "posterior" in tree.children else dict(tree.children)
    for name, request in requests.items():
        print(f"== {name or Path(path).name}: {list(request.children)}")
        check(request)


def check(tree: DataTree) -> None:
    """One request: `summary`, `loo` and a forest of all its posteriors."""
    summary = az.summary(tree)
    print(summary)
    require(bool(np.isfinite(summary["mean"].astype(float)).all()), "a mean is not finite")
    models = {name: model(tree, suffix) for name, suffix in SUFFIXES.items() if f"posterior{suffix}" in tree.children}
    for name, each in models.items():
        elpd = az.loo(each)
        print(f"{name}: elpd {elpd.elpd:.3f} ± {elpd.se:.3f}")
        require(bool(np.isfinite(elpd.elpd)), f"the elpd of {name} is not finite")
    require(az.loo(tree).elpd == az.loo(models["after"]).elpd, "the tree itself gives another elpd")
    plot(models)


def model(tree: DataTree, suffix: str) -> DataTree:
    """One posterior of a request under the names that ArviZ looks for."""
    groups = ("posterior", "log_likelihood")
    return DataTree.from_dict({group: tree[group + suffix].to_dataset() for group in groups})


def plot(models: dict[str, DataTree]) -> None:
    """A forest plot of all models, saved and thrown away."""
    drawn = az.plot_forest(models, combined=True, backend="matplotlib")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "forest.png")
        drawn.savefig(file)
        require(file.stat().st_size > 5000, "the forest plot is empty")
    print("forest plot drawn")


def require(truth: bool, otherwise: str) -> None:
    """End with an error message unless it is so."""
    if not truth:
        raise SystemExit(f"FAILED: {otherwise}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    for file in sys.argv[1:]:
        main(file)
