"""Server methods: how a round's uploads become the next global parameters.

A method needs no model, file or MPI: state in, uploads in, state out. A new one is one file: a class,
registered.
"""

from typing import Any

from fedhpc.methods.base import LocalRule, Method, Population, ServerState, SummedMethod
from fedhpc.methods.ditto import Ditto
from fedhpc.methods.fedavg import FedAvg
from fedhpc.methods.fedavgm import FedAvgM, MomSAdamD
from fedhpc.methods.fedbuff import FedBuff
from fedhpc.methods.fedex_lora import FedExLoRA
from fedhpc.methods.fedopt import FedAdam, FedYogi
from fedhpc.methods.fedpeptao import FedPepTAO
from fedhpc.methods.fedprox import FedProx
from fedhpc.methods.flexlora import FlexLoRA
from fedhpc.methods.flora import FLoRA
from fedhpc.methods.mime import Mime
from fedhpc.methods.robust import CoordinateMedian, GeometricMedian, Krum, TrimmedMean
from fedhpc.methods.scaffold import Scaffold
from fedhpc.registry import METHODS


def make_method(config: Any, population: Population) -> Method:
    """The method that a configuration's section `server` names."""
    method: Method = METHODS[config.method].make(config, population)
    return method


__all__ = [
    "CoordinateMedian",
    "Ditto",
    "FLoRA",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedBuff",
    "FedExLoRA",
    "FedPepTAO",
    "FedProx",
    "FedYogi",
    "FlexLoRA",
    "GeometricMedian",
    "Krum",
    "LocalRule",
    "Method",
    "Mime",
    "MomSAdamD",
    "Population",
    "Scaffold",
    "ServerState",
    "SummedMethod",
    "TrimmedMean",
    "make_method",
]
