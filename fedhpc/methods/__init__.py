"""Server methods: how a round's uploads become the next global parameters.

A method needs no model, file or MPI: state in, uploads in, state out. A new one is a file here and a line in METHODS.
"""

from fedhpc.config import ServerConfig
from fedhpc.methods.base import Method, ServerState, SummedMethod
from fedhpc.methods.fedavg import FedAvg
from fedhpc.methods.fedpeptao import DriftCorrected, Released

METHODS: dict[tuple[str, str | None], type[Method]] = {
    ("fedavg", None): FedAvg,
    ("fedpeptao", "drift_corrected"): DriftCorrected,
    ("fedpeptao", "released"): Released,
}


def make_method(config: ServerConfig, *, num_devices: int, sample_rate: float) -> Method:
    """The method that a configuration names."""
    variant = config.variant if config.method == "fedpeptao" else None
    return METHODS[config.method, variant](config, num_devices=num_devices, sample_rate=sample_rate)


__all__ = ["METHODS", "Method", "ServerState", "SummedMethod", "make_method"]
