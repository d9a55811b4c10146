"""The parts that a run is put together from, by name, and how anyone adds one.

A part is a class: a server method, a tuning, a partition, a selection strategy, an upload encoding, an attack, a
metric, a tracker. It says in its own ``Config`` which keys it has in its section of the configuration, and in ``check``
what it does not go together with. The parts that fedhpc brings are registered in the same way as anybody's: by a
decorator in a module that is imported before a configuration is read. Such modules are those of SHIPPED, those of
installed packages that name themselves in the entry-point group ``fedhpc.plugins``, and those under ``plugins:`` in the
file.

Nothing here loads PyTorch.
"""

import ast
import hashlib
import importlib
import inspect
import linecache
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from fedhpc.errors import ConfigError

SHIPPED = (
    *("fedhpc.methods", "fedhpc.tuning", "fedhpc.federation.partitions", "fedhpc.attack.attacks"),
    *("fedhpc.selection.strategies", "fedhpc.exchange.encodings", "fedhpc.evaluate.metrics"),
    *("fedhpc.evaluate.generation_metrics", "fedhpc.job.trackers"),
)
"""Modules that register fedhpc's own parts; of a folder all files, so that a new part is one file."""
ENTRY_POINTS = "fedhpc.plugins"
RECORDED = (
    *("round", "devices", "absent", "device_steps", "device_bytes", "device_trips", "examples", "steps", "loss"),
    *("rejected", "seconds"),
    *("accuracy", "perplexity", "device_accuracy", "evaluated", "bytes", "bytes_down", "bytes_up", "update_norm"),
    *("device_learning_rate", "server_learning_rate", "taken", "staleness", "between_steps_s"),
    *("epsilon", "clip", "short_changes", "spent_budget"),
)
"""What a line of metrics.jsonl has beside the metrics of generated text."""
NO_PLUGINS = sys.stdlib_module_names | {"fedhpc", "numpy", "torch", "pydantic"}
"""Packages whose classes a part may inherit from without their source being a part of the run's identity."""


class Registry:
    """The parts of one kind.

    Args:
        what: a part is called in messages.
        base: the public class that a part derives from.
        section: of the configuration that has the parts' keys; empty where parts have none.
        key: in that section, which names a part.
        default: the part that is meant where the key is not given.
        taken: names that no part can have.
    """

    def __init__(
        self,
        what: str,
        base: str,
        *,
        section: str = "",
        key: str = "",
        default: str = "",
        taken: Collection[str] = (),
    ) -> None:
        self.what, self.base, self.taken = what, base, taken
        self.section, self.key, self.default = section, key, default
        self._parts: dict[str, type] = {}

    def register(self, name: str) -> Callable[[type], Any]:
        """A class decorator: from now on the class is the part of this name.

        Examples:
            >>> @fedhpc.register_metric("errors")
            ... class Errors(fedhpc.Metric):
            ...     def scores(self, counts, accuracy):
            ...         return {"errors": 1 - accuracy}

        Raises:
            ConfigError: another class has the name, or the class is no such part.
        """
        if not isinstance(name, str) or not name:
            raise ConfigError(f"a {self.what} is registered under a name: @fedhpc.register_...('mine')")

        def add(part: type) -> type:
            self._check(name, part)
            taken = self._parts.get(name)
            if taken is not None and not _is_same(taken, part):
                raise ConfigError(
                    f"{self.what} {name!r} is registered twice: by {_place(taken)} and {_place(part)}; choose another "
                    "name"
                )
            self._parts[name] = part
            return part

        return add

    def _check(self, name: str, part: type) -> None:
        who = f"{self.what} {name!r}: {_place(part)}"
        if name in self.taken:
            raise ConfigError(f"{who} needs another name: metrics.jsonl has something else of this name")
        names = [each.__name__ if each.__module__.startswith("fedhpc.") else "" for each in part.__mro__]
        if self.base not in names:
            raise ConfigError(f"{who} must derive from fedhpc.{self.base}")
        makes_others = any("make" in vars(each) for each in part.__mro__[: names.index(self.base)])
        if not makes_others and (lacking := sorted(getattr(part, "__abstractmethods__", ()))):
            raise ConfigError(f"{who} lacks {', '.join(lacking)}")
        if self.section and not hasattr(part.Config, "model_fields"):  # type: ignore[attr-defined]
            raise ConfigError(f"{who}: its Config must derive from that of fedhpc.{self.base}")

    def __repr__(self) -> str:
        return f"Registry({self.what!r})"

    def __getitem__(self, name: str) -> Any:
        load_shipped()
        return self._parts[name]

    def __contains__(self, name: object) -> bool:
        load_shipped()
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.items())

    def __len__(self) -> int:
        load_shipped()
        return len(self._parts)

    def items(self) -> Iterable[tuple[str, Any]]:
        """Names and classes: fedhpc's own by module, whichever was imported first, then the others."""
        load_shipped()
        own = ((part.__module__ if part.__module__.startswith("fedhpc.") else "~") for part in self._parts.values())
        return [item for _, item in sorted(zip(own, self._parts.items(), strict=True), key=lambda each: each[0])]


METHODS = Registry("server method", "Method", section="server", key="method", default="fedpeptao")
TUNINGS = Registry("tuning", "Tuning", section="tuning", key="kind", default="prompt")
TUNING_OF_TEXTS = "lora"
"""What `fedhpc init` proposes where texts are generated."""
PARTITIONS = Registry("partition", "Partitioner", section="federation", key="partition", default="dirichlet")
STRATEGIES = Registry("selection strategy", "Strategy", section="selection", key="strategy", default="score")
ENCODINGS = Registry("upload encoding", "Encoding", section="exchange", key="encoding", default="dense")
ATTACKS = Registry("attack", "Attack", section="attack", key="kind", default="none")
METRICS = Registry("metric", "Metric")
GENERATION_METRICS = Registry("metric of generated text", "GenerationMetric", taken=RECORDED)
TRACKERS = Registry("tracker", "Tracker", section="trackers", key="kind")
SECTIONS = (METHODS, TUNINGS, PARTITIONS, STRATEGIES, ENCODINGS, ATTACKS)
"""Registries whose parts have keys in a section of the configuration."""

register_method = METHODS.register
register_tuning = TUNINGS.register
register_partition = PARTITIONS.register
register_strategy = STRATEGIES.register
register_encoding = ENCODINGS.register
register_attack = ATTACKS.register
register_metric = METRICS.register
register_generation_metric = GENERATION_METRICS.register
register_tracker = TRACKERS.register

_loaded: set[str] = set()


def load_shipped() -> None:
    """Register fedhpc's own parts, once."""
    if "" not in _loaded:
        _loaded.add("")
        for name in SHIPPED:
            module = importlib.import_module(name)
            for file in pkgutil.iter_modules(getattr(module, "__path__", ())):
                importlib.import_module(f"{name}.{file.name}")


def load_installed() -> None:
    """Register the parts of installed packages, once.

    Raises:
        ConfigError: one of them cannot be imported.
    """
    load_shipped()
    if ENTRY_POINTS not in _loaded:
        for point in entry_points(group=ENTRY_POINTS):
            _import(point.module, f"the installed plug-in {point.name}")
        _loaded.add(ENTRY_POINTS)


def load_plugins(modules: Iterable[str]) -> None:
    """Register the parts of modules that a configuration names; they may lie in the current folder.

    Raises:
        ConfigError: one of them cannot be imported.
    """
    load_installed()
    for module in modules:
        if "/" in module or module.endswith(".py"):
            name = Path(module).name.removesuffix(".py")
            raise ConfigError(f"plugins: {module} is a file; give the module's name, {name}, and start where it lies")
        if module not in _loaded:
            if not {"", os.getcwd()} & set(sys.path):  # the program `fedhpc` does not look here by itself
                sys.path.append(os.getcwd())
            _import(module, f"plugins: {module}")
            _loaded.add(module)


def _import(module: str, who: str) -> None:
    try:
        importlib.import_module(module)
    except ConfigError as error:
        raise ConfigError(f"{who}: {error}") from None
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        words = f" ({where.filename}, line {where.lineno})"
        if isinstance(error, ModuleNotFoundError):
            words = f"; looked for in {Path.cwd()} and where Python looks: start in its folder, or set PYTHONPATH"
        raise ConfigError(f"{who} cannot be imported: {type(error).__name__}: {error}{words}") from error


def source_sha256(parts: Iterable[type], plugins: Iterable[str]) -> Mapping[str, str]:
    """Where parts come from that are not fedhpc's own -> SHA-256 of that source code.

    A module of a plug-in counts whole, and with it all modules of its package. A class in a script or notebook that
    was started counts by its own text and that of the classes there which it inherits from: the rest of a script may
    change from run to run.
    """
    modules = [*plugins]
    scripts = []
    for part in parts:
        for base in part.__mro__:
            if base.__module__ == "__main__":
                scripts.append(base)
            elif base.__module__.partition(".")[0] not in NO_PLUGINS:
                modules.append(base.__module__)
    found = {name: _sha256(_module_source(name)) for name in sorted(set(modules))}
    return found | {part.__qualname__: _sha256(_class_source(part)) for part in scripts}


def _module_source(name: str) -> bytes:
    """The text of a module, or of all modules of a package."""
    module = sys.modules[name]
    if not getattr(module, "__file__", None):
        return repr(module).encode()
    file = Path(str(module.__file__))
    files = sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]
    return b"\0".join(path.read_bytes() for path in files)


def _class_source(part: type) -> bytes:
    try:
        return inspect.getsource(part).encode()
    except (OSError, TypeError):  # a notebook's, or typed into an interpreter that keeps no text
        return (_cell_source(part) or repr(sorted(vars(part)))).encode()


def _cell_source(part: type) -> str | None:
    """The text of a class in a notebook's cell: `inspect` finds that of functions alone."""
    for function in filter(inspect.isfunction, vars(part).values()):
        code = function.__code__
        lines = linecache.getlines(code.co_filename)
        for node in ast.walk(ast.parse("".join(lines))):
            if isinstance(node, ast.ClassDef) and code.co_firstlineno in range(node.lineno, (node.end_lineno or 0) + 1):
                first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
                return "".join(lines[first - 1 : node.end_lineno])
    return None


def _sha256(source: bytes) -> str:
    return hashlib.sha256(source).hexdigest()


def _is_same(one: type, other: type) -> bool:
    """Whether two classes are one that was defined again: a notebook's cell, or a module loaded once more."""
    return (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)


def _place(part: type) -> str:
    return f"{part.__module__}.{part.__qualname__}"
