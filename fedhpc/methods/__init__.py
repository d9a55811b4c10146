"""Server methods: how a round's uploads become the next global parameters.

A method needs no model, file or MPI: state in, uploads in, state out. A new one is one file: a class, registered; here
its module is named.
"""

from typing import Any

from fedhpc.methods import fedavg, fedavgm, fedopt, fedpeptao, fedprox, mime, scaffold  # noqa: F401
from fedhpc.methods.base import LocalRule, Method, Population, ServerState, SummedMethod
from fedhpc.registry import METHODS


def make_method(config: Any, population: Population) -> Method:
    """The method that a configuration's section `server` names."""
    method: Method = METHODS[config.method].make(config, population)
    return method


__all__ = ["LocalRule", "Method", "Population", "ServerState", "SummedMethod", "make_method"]
