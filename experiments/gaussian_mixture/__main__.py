"""python -m experiments.gaussian_mixture [--fit variational,sgld,sghmc] [--method default,published]."""

from experiments.front import Experiment, command
from experiments.gaussian_mixture.figures import summarise
from experiments.gaussian_mixture.settings import Settings
from experiments.gaussian_mixture.study import run

app = command(Experiment("gaussian_mixture", {"published": Settings()}, run, summarise))

if __name__ == "__main__":
    app()
