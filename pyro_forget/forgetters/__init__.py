"""Methods of forgetting, one a file; each is a `Forgetter`, whose settings are its fields."""

from pyro_forget.forgetters.default import default_forgetter
from pyro_forget.forgetters.finetune import Finetune
from pyro_forget.forgetters.influence import Influence
from pyro_forget.forgetters.more_steps import MoreSteps
from pyro_forget.forgetters.output_layer import OutputLayer
from pyro_forget.forgetters.paired_descent import PairedDescent
from pyro_forget.forgetters.published_chain import PublishedChain
from pyro_forget.forgetters.retrain import Retrain
from pyro_forget.forgetters.reweight import Reweight
from pyro_forget.forgetters.transport import Transport

__all__ = [
    "Finetune",
    "Influence",
    "MoreSteps",
    "OutputLayer",
    "PairedDescent",
    "PublishedChain",
    "Retrain",
    "Reweight",
    "Transport",
    "default_forgetter",
]
