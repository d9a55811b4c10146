"""Federated prompt tuning of large language models over MPI (FedPepTAO, EMNLP 2023).

The names below are fedhpc's public interface; what is not here may change. Each is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fedhpc import methods, testing, tuning
    from fedhpc.api import RunResult, run
    from fedhpc.attack.attack import Attack, BadDevicesConfig
    from fedhpc.config import Config
    from fedhpc.config.file import load_config
    from fedhpc.config.sections import (
        AttackConfig,
        ExchangeConfig,
        FederationConfig,
        MethodConfig,
        SelectionConfig,
        TuningConfig,
    )
    from fedhpc.errors import ConfigError, UserError
    from fedhpc.evaluate.generation_metrics import GenerationMetric
    from fedhpc.evaluate.metrics import Metric
    from fedhpc.exchange.encoding import Encoding
    from fedhpc.federation.partition import Partitioner
    from fedhpc.job.tracker import Tracker, TrackerConfig
    from fedhpc.methods import Method, Population, ServerState, SummedMethod
    from fedhpc.methods.updates import Layout, RoundUploads, Sums
    from fedhpc.registry import (
        register_attack,
        register_encoding,
        register_generation_metric,
        register_method,
        register_metric,
        register_partition,
        register_strategy,
        register_tracker,
        register_tuning,
    )
    from fedhpc.selection import Strategy
    from fedhpc.tuning import Tuning

_HOMES = {
    "fedhpc.api": ("RunResult", "run"),
    "fedhpc.attack.attack": ("Attack", "BadDevicesConfig"),
    "fedhpc.config": ("Config",),
    "fedhpc.config.file": ("load_config",),
    "fedhpc.config.sections": (
        *("AttackConfig", "ExchangeConfig", "FederationConfig", "MethodConfig", "SelectionConfig", "TuningConfig"),
    ),
    "fedhpc.errors": ("ConfigError", "UserError"),
    "fedhpc.evaluate.generation_metrics": ("GenerationMetric",),
    "fedhpc.evaluate.metrics": ("Metric",),
    "fedhpc.exchange.encoding": ("Encoding",),
    "fedhpc.federation.partition": ("Partitioner",),
    "fedhpc.job.tracker": ("Tracker", "TrackerConfig"),
    "fedhpc.methods": ("Method", "Population", "ServerState", "SummedMethod"),
    "fedhpc.methods.updates": ("Layout", "RoundUploads", "Sums"),
    "fedhpc.registry": (
        *("register_attack", "register_encoding", "register_generation_metric", "register_method"),
        *("register_metric", "register_partition", "register_strategy", "register_tracker", "register_tuning"),
    ),
    "fedhpc.selection": ("Strategy",),
    "fedhpc.tuning": ("Tuning",),
}
_MODULES = ("methods", "testing", "tuning")
_HOME = {name: home for home, names in _HOMES.items() for name in names}
__all__ = [
    "Attack",
    "AttackConfig",
    "BadDevicesConfig",
    "Config",
    "ConfigError",
    "Encoding",
    "ExchangeConfig",
    "FederationConfig",
    "GenerationMetric",
    "Layout",
    "Method",
    "MethodConfig",
    "Metric",
    "Partitioner",
    "Population",
    "RoundUploads",
    "RunResult",
    "SelectionConfig",
    "ServerState",
    "Strategy",
    "SummedMethod",
    "Sums",
    "Tracker",
    "TrackerConfig",
    "Tuning",
    "TuningConfig",
    "UserError",
    "load_config",
    "methods",
    "register_attack",
    "register_encoding",
    "register_generation_metric",
    "register_method",
    "register_metric",
    "register_partition",
    "register_strategy",
    "register_tracker",
    "register_tuning",
    "run",
    "testing",
    "tuning",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in _MODULES:
        return import_module(f"fedhpc.{name}")
    raise AttributeError(f"module 'fedhpc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
