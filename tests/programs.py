"""Pyro programs of every shape that people write, each with its data: what becomes of them is in test_adoption.py.

A program is made anew for every test, under that test's default type. Rows differ from one another throughout, so that
a row in the wrong place changes the numbers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_forget.data import Data
from pyro_forget.posterior import SampledPosterior, VariationalPosterior

NUM_DATA = 24


@dataclass(frozen=True)
class Program:
    """A model, its data and how it is taken over.

    Attributes:
        guide: makes the guide from the model; it is run once, which stands for the fit.
        plate: as the user names it.
        options: of `VariationalPosterior`.
        plain: the program as a plain run of Pyro sees every row once, where it is another; an oracle.
    """

    model: Callable[..., Any]
    data: Data
    guide: Callable[[Any], Any] = AutoNormal
    plate: str = "data"
    options: Mapping[str, Any] = field(default_factory=dict)
    plain: Callable[..., Any] | None = None

    @property
    def call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for all rows."""
        batch = next(self.data.with_batch_size(len(self.data)).batches())
        return batch.args, batch.kwargs

    def fitted(self) -> Any:
        """The guide after its first run, moved off its symmetric start."""
        guide = self.guide(self.model)
        args, kwargs = self.call
        guide(*args, **kwargs)
        for value in list(guide.parameters()) if isinstance(guide, nn.Module) else []:
            if value.requires_grad:
                value.data.add_(0.1 * torch.randn_like(value))
        return guide

    def variational(self, guide: Any = None) -> VariationalPosterior:
        """Taken over as an SVI run."""
        return VariationalPosterior(self.model, guide or self.fitted(), self.data, plate=self.plate, **self.options)

    def draws(self, chains: int = 2, length: int = 3) -> dict[str, Tensor]:
        """Draws of the prior in the shape that MCMC gives them."""
        args, kwargs = self.call
        traces = [poutine.trace(self.model).get_trace(*args, **kwargs) for _ in range(chains * length)]
        names = [name for name, node in traces[0].iter_stochastic_nodes() if node["value"].is_floating_point()]
        stacked = {name: torch.stack([trace.nodes[name]["value"] for trace in traces]) for name in names}
        return {name: value.unflatten(0, (chains, length)).detach() for name, value in stacked.items()}

    def sampled(self) -> SampledPosterior:
        """Taken over as an MCMC run."""
        scaled = {name: value for name, value in self.options.items() if name == "minibatch_scale"}
        return SampledPosterior(self.model, self.draws(), self.data, plate=self.plate, **scaled)

    def posterior(self, by: str) -> VariationalPosterior | SampledPosterior:
        """Taken over as one or the other."""
        return self.variational() if by == "guide" else self.sampled()


ADOPTED: dict[str, Callable[[], Program]] = {}
REFUSED: dict[str, tuple[Callable[[], Program], str]] = {}
# Pyro's SVI refuses the first; the others are no posteriors of draws.
ONLY_BY = {"batch_shape_outside_plates": "draws", "maximum_likelihood": "guide", "maximum_a_posteriori": "guide"}


def adopted(make: Callable[[], Program]) -> Callable[[], Program]:
    ADOPTED[make.__name__] = make
    return make


def refused(words: str) -> Callable[[Callable[[], Program]], Callable[[], Program]]:
    """The decisive words of the refusal, as a regular expression."""

    def keep(make: Callable[[], Program]) -> Callable[[], Program]:
        REFUSED[make.__name__] = (make, words)
        return make

    return keep


def regression(num_data: int = NUM_DATA, dim: int = 2) -> tuple[Tensor, Tensor]:
    """x (num_data, dim) and y (num_data,); the last quarter of y follows another rule."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(num_data, dim, generator=generator)
    y = x @ torch.linspace(1, 2, dim) + 0.5 * torch.randn(num_data, generator=generator)
    y[-num_data // 4 :] *= -1.5
    return x, y


def weights(dim: int = 2) -> Tensor:
    return pyro.sample("w", dist.Normal(torch.zeros(dim), 2.0).to_event(1))


def linear(x: Tensor, y: Tensor | None = None) -> None:
    w = weights()
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.7), obs=y)


def on(model: Callable[..., Any], **options: Any) -> Program:
    """A program of (x, y)."""
    return Program(model, Data(*regression()), **options)


# --- calls


@adopted
def positional() -> Program:
    return on(linear)


@adopted
def keyword() -> Program:
    x, y = regression()
    return Program(linear, Data(x, y=y))


@adopted
def dictionary() -> Program:
    def model(batch: dict[str, Tensor]) -> None:
        linear(batch["x"], batch["y"])

    x, y = regression()
    return Program(model, Data({"x": x, "y": y, "unit": "cm"}))


@adopted
def data_frame() -> Program:
    def model(frame: pd.DataFrame) -> None:
        linear(torch.tensor(frame[["a", "b"]].values), torch.tensor(frame["y"].values))

    x, y = regression()
    frame = pd.DataFrame({"a": x[:, 0], "b": x[:, 1], "y": y, "who": [f"person {n}" for n in range(NUM_DATA)]})
    return Program(model, Data(frame.set_index(np.arange(NUM_DATA)[::-1])))


@adopted
def arrays() -> Program:
    def model(x: np.ndarray, y: np.ndarray) -> None:
        linear(torch.as_tensor(x), torch.as_tensor(y))

    x, y = regression()
    return Program(model, Data(x.numpy(), y.numpy()))


@adopted
def data_along_dim_1() -> Program:
    def model(x: Tensor, y: Tensor) -> None:
        linear(x.T, y)

    x, y = regression()
    return Program(model, Data.of((x.T.contiguous(), y), dims={0: 1}))


@adopted
def fixed_argument_of_the_datas_length() -> Program:
    def model(x: Tensor, y: Tensor, knots: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), knots.square().sum()).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.7), obs=y)

    return Program(model, Data.of(regression(), {"knots": torch.linspace(0, 1, NUM_DATA)}, fixed=("knots",)))


@adopted
def arguments_that_are_no_rows() -> Program:
    def model(x: Tensor, y: Tensor, prior_std: Tensor, *, noise: float, names: list[str]) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), prior_std.expand(2)).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, noise), obs=y)

    return Program(model, Data(*regression(), torch.tensor([3.0]), noise=0.7, names=["a", "b"]))


@adopted
def own_ids() -> Program:
    return Program(linear, Data.of(regression(), ids=[10**12 - 7 * n for n in range(NUM_DATA)], batch_size=5))


@adopted
def number_of_data_as_argument() -> Program:
    def model(x: Tensor, y: Tensor, num_data: int) -> None:
        w = weights()
        with pyro.plate("data", num_data):
            pyro.sample("y", dist.Normal(x @ w, 0.7), obs=y)

    return Program(model, Data(*regression(), NUM_DATA))


# --- plates


@adopted
def hard_coded_length() -> Program:
    def model(x: Tensor, y: Tensor) -> None:
        w = weights()
        with pyro.plate("data", NUM_DATA):
            pyro.sample("y", dist.Normal(x @ w, 0.7), obs=y)

    return on(model)


@adopted
def subsample_size() -> Program:
    def model(x: Tensor, y: Tensor) -> None:
        w = weights()
        with pyro.plate("data", len(x), subsample_size=6) as rows:
            pyro.sample("y", dist.Normal(x[rows] @ w, 0.7), obs=y[rows])

    return on(model, plain=linear)


@adopted
def hard_coded_subsample() -> Program:
    def model(x: Tensor, y: Tensor) -> None:
        w = weights()
        with pyro.plate("data", NUM_DATA, subsample_size=20) as rows:
            pyro.sample("y", dist.Normal(x[rows] @ w, 0.7), obs=y[rows])

    return on(model, plain=linear)


@adopted
def pyro_subsample() -> Program:
    def model(x: Tensor, y: Tensor) -> None:
        w = weights()
        with pyro.plate("data", len(y), subsample_size=6):
            mean = pyro.subsample(x, event_dim=1) @ w
            pyro.sample("y", dist.Normal(mean, 0.7), obs=pyro.subsample(y, event_dim=0))

    return on(model, plain=linear)


@adopted
def subsample_given() -> Program:
    def model(x: Tensor, y: Tensor, rows: Tensor) -> None:
        w = weights()
        with pyro.plate("data", NUM_DATA, subsample=rows):
            pyro.sample("y", dist.Normal(x @ w, 0.7), obs=y)

    return Program(model, Data(*regression(), torch.arange(NUM_DATA)))


@adopted
def plate_at_another_dim() -> Program:
    def model(x: Tensor, y: Tensor) -> None:
        w = weights()
        with pyro.plate("data", len(x), dim=-2), pyro.plate("repeats", 3, dim=-1):
            pyro.sample("y", dist.Normal((x @ w)[:, None], 0.7), obs=y)

    x, y = regression()
    return Program(model, Data(x, torch.stack([y, 2 * y, y - 1], -1)))


@adopted
def nested_plates() -> Program:
    """Batting averages: players by seasons, one skill for all."""

    def model(at_bats: Tensor, hits: Tensor) -> None:
        skill = pyro.sample("skill", dist.Uniform(0.0, 1.0))
        with pyro.plate("num_players", len(at_bats), dim=-2), pyro.plate("seasons", at_bats.shape[1]):
            pyro.sample("hits", dist.Binomial(at_bats, skill), obs=hits)

    at_bats = torch.arange(1.0, 37.0).reshape(12, 3)
    return Program(model, Data(at_bats, (at_bats * torch.linspace(0.1, 0.6, 3)).floor()), plate="num_players")


@adopted
def groups() -> Program:
    """Homes in counties, as the radon data: latents of groups, whose number is an argument."""

    def model(county: Tensor, y: Tensor, num_counties: int) -> None:
        centre = pyro.sample("centre", dist.Normal(0.0, 5.0))
        spread = pyro.sample("spread", dist.HalfCauchy(1.0))
        with pyro.plate("counties", num_counties):
            level = pyro.sample("level", dist.Normal(centre, spread))
        with pyro.plate("homes", len(y)):
            pyro.sample("y", dist.Normal(level[county], 1.0), obs=y)

    return Program(model, Data(torch.arange(NUM_DATA) % 5, regression()[1], 5), plate="homes")


@adopted
def sequential_plate() -> Program:
    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
        for row in pyro.plate("data", len(y)):
            pyro.sample(f"y_{row}", dist.StudentT(4.0, mean, 1.0), obs=y[row])

    return Program(model, Data(regression(9)[1]))


@adopted
def closed_over_but_read_by_index() -> Program:
    x, y = regression()

    def model() -> None:
        w = weights()
        with pyro.plate("data", len(x), subsample_size=8) as rows:
            pyro.sample("y", dist.Normal(x[rows] @ w, 0.7), obs=y[rows])

    return Program(model, Data.of(num_data=NUM_DATA, batch_size=7), plain=lambda: linear(x, y))


# --- sites


@adopted
def row_weights() -> Program:
    def model(x: Tensor, y: Tensor, importance: Tensor) -> None:
        w = weights()
        with pyro.plate("data", len(x)), poutine.scale(scale=importance):
            pyro.sample("y", dist.Normal(x @ w, 0.7), obs=y)

    return Program(model, Data(*regression(), torch.linspace(0.2, 2, NUM_DATA)))


@adopted
def tempered() -> Program:
    def model(x: Tensor, y: Tensor) -> None:
        w = weights()
        with pyro.plate("data", len(x)), poutine.scale(scale=0.3):
            pyro.sample("y", dist.Normal(x @ w, 0.7), obs=y)

    return on(model)


@adopted
def minibatch_scale_taken_out() -> Program:
    return on(scaled_by_rows, options={"minibatch_scale": True})


@adopted
def several_sites() -> Program:
    def model(x: Tensor, y: Tensor, count: Tensor) -> None:
        w = weights()
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.7), obs=y)
            pyro.sample("count", dist.Poisson((x[:, 0] * w[0]).exp()), obs=count)

    return Program(model, Data(*regression(), torch.arange(NUM_DATA) // 5))


@adopted
def masked_distribution() -> Program:
    def model(x: Tensor, y: Tensor, seen: Tensor) -> None:
        w = weights()
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.7).mask(seen), obs=y)

    return Program(model, Data(*regression(), torch.arange(NUM_DATA) % 3 > 0))


@adopted
def masked_by_handler() -> Program:
    def model(x: Tensor, y: Tensor, seen: Tensor) -> None:
        w = weights()
        with pyro.plate("data", len(x)), poutine.mask(mask=seen):
            pyro.sample("y", dist.Normal(x @ w, 0.7), obs=y)

    return Program(model, Data(*regression(), torch.arange(NUM_DATA) % 3 > 0))


def without_nan(model: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, y, seen: model(x, y.nan_to_num(), seen)


@adopted
def masked_nan() -> Program:
    """Missing values left as NaN, as the mask allows; a run of Pyro itself sees NaN times 0."""
    program = masked_by_handler()
    (x, y, seen), _ = program.call
    return Program(program.model, Data(x, torch.where(seen, y, torch.nan), seen), plain=without_nan(program.model))


@adopted
def masked_nan_of_a_distribution() -> Program:
    program = masked_distribution()
    (x, y, seen), _ = program.call
    return Program(program.model, Data(x, torch.where(seen, y, torch.nan), seen), plain=without_nan(program.model))


@adopted
def deterministic() -> Program:
    def model(x: Tensor, y: Tensor) -> None:
        w = weights()
        pyro.deterministic("length", w.norm())
        with pyro.plate("data", len(x)):
            mean = pyro.deterministic("mean", x @ w)
            pyro.sample("y", dist.Normal(mean, 0.7), obs=y)

    return on(model)


@adopted
def factor_in_the_plate() -> Program:
    def model(x: Tensor, y: Tensor) -> None:
        w = weights()
        with pyro.plate("data", len(x)):
            pyro.factor("huber", -nn.functional.huber_loss(x @ w, y, reduction="none"))

    return on(model)


@adopted
def factor_outside_the_plate() -> Program:
    def model(x: Tensor, y: Tensor) -> None:
        w = weights()
        pyro.factor("ridge", -3.0 * w.square().sum())
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.7), obs=y)

    return on(model)


@adopted
def rows_that_are_vectors() -> Program:
    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        factor = pyro.sample("factor", dist.LKJCholesky(3, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.MultivariateNormal(x @ w, scale_tril=factor), obs=y)

    x, y = regression()
    return Program(model, Data(x, torch.stack([y, y.sin(), 1 - y], -1)))


@adopted
def pairs_of_a_series() -> Program:
    def model(previous: Tensor, y: Tensor) -> None:
        slope = pyro.sample("slope", dist.Uniform(-1.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(slope * previous, 0.7), obs=y)

    _, y = regression()
    return Program(model, Data(y[:-1], y[1:]))


# --- latents


@adopted
def every_support() -> Program:
    def model(y: Tensor) -> None:
        mix = pyro.sample("mix", dist.Dirichlet(torch.tensor([2.0, 1.0, 3.0])))
        scale = pyro.sample("scale", dist.HalfCauchy(1.0))
        low = pyro.sample("low", dist.Uniform(-2.0, -1.0))
        factor = pyro.sample("factor", dist.LKJCholesky(3, 2.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(low + mix @ factor[2], scale), obs=y)

    return Program(model, Data(regression()[1]))


@adopted
def reparametrised() -> Program:
    def model(y: Tensor) -> None:
        spread = pyro.sample("spread", dist.LogNormal(0.0, 1.0))
        level = pyro.sample("level", dist.Normal(torch.zeros(3), spread).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(level.sum(), 1.0), obs=y)

    return Program(poutine.reparam(model, config={"level": LocScaleReparam(0.0)}), Data(regression()[1]))


@adopted
def batch_shape_outside_plates() -> Program:
    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.7), obs=y)

    return on(model)


@adopted
def pyro_sample_before_the_plate() -> Program:
    """Pyro's tutorial on Bayesian regression."""

    class Regression(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.linear = PyroModule[nn.Linear](2, 1)
            self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
            self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
            mean = self.linear(x).squeeze(-1)
            with pyro.plate("data", x.shape[0]):
                pyro.sample("obs", dist.Normal(mean, sigma), obs=y)
            return mean

    return on(Regression())


# --- learned parameters


@adopted
def learned_noise() -> Program:
    def model(x: Tensor, y: Tensor) -> None:
        noise = pyro.param("noise", torch.tensor(0.7), constraint=constraints.positive)
        w = weights()
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, noise), obs=y)

    return on(model)


@adopted
def learned_prior() -> Program:
    def model(x: Tensor, y: Tensor) -> None:
        spread = pyro.param("spread", torch.tensor(2.0), constraint=constraints.positive)
        w = pyro.sample("w", dist.Normal(torch.zeros(2), spread).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.7), obs=y)

    return on(model)


@adopted
def bayesian_last_layer() -> Program:
    class Network(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Linear(2, 3)
            self.last = PyroModule[nn.Linear](3, 1, bias=False)
            self.last.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))

        def forward(self, x: Tensor, y: Tensor) -> None:
            mean = self.last(self.features(x).tanh()).squeeze(-1)
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(mean, 0.7), obs=y)

    return on(Network())


@adopted
def module_parameters() -> Program:
    """A model that is a PyroModule with a constrained parameter of its own."""

    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.noise = PyroParam(torch.tensor(0.7), constraints.positive)

        def forward(self, x: Tensor, y: Tensor) -> None:
            w = weights()
            noise = self.noise
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(x @ w, noise), obs=y)

    return on(Model())


@adopted
def maximum_likelihood() -> Program:
    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.param("w", torch.tensor([0.5, -0.5]))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.7), obs=y)

    def guide_of(model: Any) -> Callable[..., None]:
        def guide(x: Tensor, y: Tensor) -> None:
            pass

        # The first run of the model makes its parameters, as the first step of SVI would.
        model(*regression())
        return guide

    return on(model, guide=guide_of)


@adopted
def maximum_a_posteriori() -> Program:
    return on(linear, guide=AutoDelta)


# --- refused


@refused(r"scaled by 3 on 8 rows and 1 on 24.*minibatch_scale=True")
def scaled_by_rows_inside() -> Program:
    return on(scaled_by_rows)


def scaled_by_rows(x: Tensor, y: Tensor) -> None:
    w = weights()
    with poutine.scale(scale=NUM_DATA / len(x)), pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.7), obs=y)


@refused(r"asks for 22 rows, the data have 24.*mask")
def rows_dropped() -> Program:
    def model(x: Tensor, y: Tensor) -> None:
        kept = ~torch.isnan(y)
        w = weights()
        with pyro.plate("data", int(kept.sum())):
            pyro.sample("y", dist.Normal(x[kept] @ w, 0.7), obs=y[kept])

    x, y = regression()
    y[[3, 11]] = torch.nan
    return Program(model, Data(x, y))


@refused(r"Latent 'z' is local to the data plate 'data'")
def local_latent() -> Program:
    def model(y: Tensor) -> None:
        centre = pyro.sample("centre", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(centre, 1.0))
            pyro.sample("y", dist.Normal(z, 0.7), obs=y)

    return Program(model, Data(regression()[1]))


@refused(r"Latent 'skill' is local to the data plate 'num_players'")
def a_skill_for_each_player() -> Program:
    """Batting averages, not pooled: one latent for each row."""

    def model(at_bats: Tensor, hits: Tensor) -> None:
        with pyro.plate("num_players", len(at_bats)):
            skill = pyro.sample("skill", dist.Beta(1.0, 1.0))
            pyro.sample("hits", dist.Binomial(at_bats, skill), obs=hits)

    at_bats = torch.arange(10.0, 28.0)
    return Program(model, Data(at_bats, (at_bats * 0.3).floor()), plate="num_players")


@refused(r"Latent 'linear.weight' is local to the data plate.*before the plate opens")
def pyro_sample_in_the_plate() -> Program:
    class Regression(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.linear = PyroModule[nn.Linear](2, 1, bias=False)
            self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))

        def forward(self, x: Tensor, y: Tensor) -> None:
            with pyro.plate("data", len(x)):
                mean = (x[:, None, :] @ self.linear.weight.mT).squeeze()
                pyro.sample("y", dist.Normal(mean, 0.7), obs=y)

    return on(Regression())


@refused(r"Latent 'which' is discrete and local to the data plate.*MixtureSameFamily")
def mixture() -> Program:
    @config_enumerate
    def model(y: Tensor) -> None:
        centres = pyro.sample("centres", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        with pyro.plate("data", len(y)):
            which = pyro.sample("which", dist.Categorical(torch.tensor([0.3, 0.7])))
            pyro.sample("y", dist.Normal(centres[which], 1.0), obs=y)

    return Program(model, Data(regression()[1]), guide=lambda model: AutoNormal(poutine.block(model, hide=["which"])))


@refused(r"asks for 23 rows, the data have 24.*\(prev, y\)")
def series() -> Program:
    def model(y: Tensor) -> None:
        slope = pyro.sample("slope", dist.Uniform(-1.0, 1.0))
        with pyro.plate("data", len(y) - 1):
            pyro.sample("y", dist.Normal(slope * y[:-1], 0.7), obs=y[1:])

    return Program(model, Data(regression()[1]))


@refused(r"no plate 'data'.*Plates: none; observed sites: \['y'\].*with pyro.plate")
def event_instead_of_plate() -> Program:
    def model(x: Tensor, y: Tensor) -> None:
        pyro.sample("y", dist.Normal(x @ weights(), 0.7).to_event(1), obs=y)

    return on(model)


@refused(r"no plate 'data'.*observed sites: \['y_0', 'y_1'")
def python_loop() -> Program:
    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
        for row in range(len(y)):
            pyro.sample(f"y_{row}", dist.Normal(mean, 1.0), obs=y[row])

    return Program(model, Data(regression()[1]))


@refused(r"no plate 'data'.*observed sites: \['y'\]")
def gaussian_process() -> Program:
    def model(x: Tensor, y: Tensor) -> None:
        length = pyro.sample("length", dist.LogNormal(0.0, 1.0))
        kernel = torch.exp(-torch.cdist(x, x).square() / length) + 0.1 * torch.eye(len(x))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), kernel), obs=y)

    return on(model)


@refused(r"does not run on 8 of its rows.*Pass all data as arguments")
def closed_over() -> Program:
    x, y = regression()

    def model() -> None:
        w = weights()
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.7), obs=y)

    return Program(model, Data.of(num_data=NUM_DATA))


@refused(r"does not run on 8 of its rows.*poutine.condition")
def conditioned_outside() -> Program:
    x, y = regression()
    return Program(poutine.condition(linear, data={"y": y}), Data(x))


@refused(r"Latent 'y' is local to the data plate.*observed in the fit, pass its values")
def nothing_observed() -> Program:
    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0))

    return Program(model, Data(regression()[1]))


@refused(r"Latent 'outlier' is discrete")
def discrete_global() -> Program:
    def model(y: Tensor) -> None:
        outlier = pyro.sample("outlier", dist.Bernoulli(0.5))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(outlier, 1.0), obs=y)

    def guide_of(model: Any) -> Callable[[Tensor], None]:
        def guide(y: Tensor) -> None:
            pyro.sample("outlier", dist.Bernoulli(pyro.param("p", torch.tensor(0.5), constraints.unit_interval)))

        return guide

    return Program(model, Data(regression()[1]), guide=guide_of)


@refused(r"no plate 'data'.*Plates: \['num_players'\].*plate=\"num_players\"")
def plate_of_another_name() -> Program:
    program = nested_plates_of_one()
    return Program(program.model, program.data)


def nested_plates_of_one() -> Program:
    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
        with pyro.plate("num_players", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    return Program(model, Data(regression()[1]), plate="num_players")


@refused(r"no plate 'data'.*Plates: \['counties', 'homes'\].*plate=\"homes\"")
def one_plate_holds_the_observed() -> Program:
    program = groups()
    return Program(program.model, program.data)


@refused(r"no plate 'data'.*Plates: \['num_players', 'seasons'\]")
def two_plates_hold_the_observed() -> Program:
    program = nested_plates()
    return Program(program.model, program.data)


@refused(r"depends on which other rows come along.*centring")
def centred() -> Program:
    def model(x: Tensor, y: Tensor) -> None:
        w = weights()
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x - x.mean(0)) @ w, 0.7), obs=y)

    return on(model)


@refused(r"depends on which other rows come along.*batch norm")
def batch_norm() -> Program:
    class Network(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2, affine=False)

        def forward(self, x: Tensor, y: Tensor) -> None:
            w = weights()
            mean = self.norm(x) @ w
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(mean, 0.7), obs=y)

    return on(Network())


@refused(r"depends on which other rows come along.*length taken from a shape")
def length_taken_from_the_shape() -> Program:
    def model(x: Tensor, y: Tensor) -> None:
        w = weights()
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, len(x) ** 0.5), obs=y)

    return on(model)


@refused(r"depends on which other rows come along.*shape \(N, 1\)")
def mean_of_shape_n_1() -> Program:
    def model(x: Tensor, y: Tensor) -> None:
        w = weights()
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x @ w)[:, None], 0.7).to_event(1), obs=y)

    return on(model)


@refused(r"[Pp]rior depends on the data.*'top'")
def support_from_the_data() -> Program:
    def model(y: Tensor) -> None:
        top = pyro.sample("top", dist.Uniform(0.0, y.abs().max() + 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(top, 1.0), obs=y)

    return Program(model, Data(regression()[1]))


@refused(r"[Pp]rior depends on the data.*'w'")
def prior_from_the_data() -> Program:
    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), x.std(0)).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.7), obs=y)

    return on(model)


@refused(r"[Pp]rior depends on the data.*'total'")
def factor_of_the_data_outside() -> Program:
    def model(x: Tensor, y: Tensor) -> None:
        w = weights()
        pyro.factor("total", -(x @ w - y).square().sum())
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.7), obs=y)

    return on(model)


@refused(r"not finite for 2 rows, ids \[103, 111\]")
def nan_unmasked() -> Program:
    x, y = regression()
    y[3], y[11] = torch.nan, torch.inf
    return Program(linear, Data.of((x, y), ids=range(100, 100 + NUM_DATA)))


WAYS = [(name, by) for name in ADOPTED for by in ONLY_BY.get(name, "guide draws").split()]
