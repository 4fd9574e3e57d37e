"""python -m experiments.fashion_mnist --method before,default,published,finetune --num-erased 200,500,942.

The refits that all are compared with: --method retrain --seeds 0,1,2 --num-erased 200,500,942.

Rivals at several budgets, each method by itself, since comma lists run the product: --method finetune --finetune-steps
50,100,400, and for chains --fit sgld,sghmc --method sampler --sampler-steps 50,200,800.

As published, on a GPU: --preset full --device cuda --fit svi,sgld,sghmc --seeds 0,1,2,3,4 --num-erased
1000,2000,3000,4000,5000,6000.
"""

from experiments.fashion_mnist.figures import summarise
from experiments.fashion_mnist.settings import PRESETS
from experiments.fashion_mnist.study import run
from experiments.front import Experiment, command

app = command(Experiment("fashion_mnist", PRESETS, run, summarise))

if __name__ == "__main__":
    app()
