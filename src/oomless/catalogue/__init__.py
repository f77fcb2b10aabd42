"""Facts as data, each with its source: GPUs, what lies outside the allocator, and known models' configs.

Plans are made from this without a download and without a GPU. Nothing here imports torch or transformers; the
data lies in ``gpus.yaml``, ``overheads.yaml``, ``efficiency.yaml``, ``networks.yaml`` and ``model_configs/*.json`` beside the loaders.
``docs/catalogue.md`` tells how an entry is made.
"""

from oomless.catalogue.gpus import Gpu, apple_gpu, gpu, gpus, recognise
from oomless.catalogue.models import MADE, Model, model, model_config, models, models_of, name_words, parameters
from oomless.catalogue.networks import Network, assumed_network
from oomless.catalogue.overheads import Overhead, overhead, overheads

__all__ = [
    "MADE",
    "Gpu",
    "Model",
    "Network",
    "Overhead",
    "apple_gpu",
    "assumed_network",
    "gpu",
    "gpus",
    "model",
    "model_config",
    "models",
    "models_of",
    "name_words",
    "overhead",
    "overheads",
    "parameters",
    "recognise",
]
