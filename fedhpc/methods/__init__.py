"""Server methods: how a round's uploads become the next global parameters.

A method needs no model, file or MPI: state in, uploads in, state out. A new one is a file here and a line in METHODS.
"""

from fedhpc.config import ServerConfig
from fedhpc.methods.base import LocalRule, Method, Population, ServerState, SummedMethod
from fedhpc.methods.fedavg import FedAvg
from fedhpc.methods.fedavgm import FedAvgM
from fedhpc.methods.fedopt import FedAdam, FedYogi
from fedhpc.methods.fedpeptao import DriftCorrected, Paper, Released
from fedhpc.methods.fedprox import FedProx
from fedhpc.methods.mime import Mime
from fedhpc.methods.scaffold import Scaffold

METHODS: dict[str, type[Method]] = {
    "fedavg": FedAvg,
    "fedprox": FedProx,
    "fedavgm": FedAvgM,
    "moms_adamd": FedAvgM,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
    "scaffold": Scaffold,
    "mime": Mime,
    "drift_corrected": DriftCorrected,
    "paper": Paper,
    "released": Released,
}
"""By method, or variant of fedpeptao."""


def make_method(config: ServerConfig, population: Population) -> Method:
    """The method that a configuration names."""
    return METHODS[config.name](config, population)


__all__ = ["METHODS", "LocalRule", "Method", "Population", "ServerState", "SummedMethod", "make_method"]
