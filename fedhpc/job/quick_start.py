"""A start in half the time: the garbage collector rests, and PyTorch's compiler is loaded when it is used.

transformers' modules name `torch._dynamo` while they are imported, for decorators and a class, and with it comes the
whole compiler; they name `torch.distributed`'s tensors, too, although fedhpc's network is MPI. And the list of models
that transformers can load is made anew in every process, from the text of some thousand files, which a network file
system takes long to open; it is remembered here.
"""

import gc
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial, wraps
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from fedhpc.files import write_whole

Function = Callable[..., Any]
COMPILER = "torch._dynamo"
NAMED_BY_TRANSFORMERS = f"{COMPILER}._trace_wrapped_higher_order_op"


@contextmanager
def quick_start() -> Iterator[None]:
    """Import and load what a rank needs, and no more."""
    gc.disable()
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    try:
        yield
    finally:
        gc.freeze()  # what was loaded lives for ever; no later collection need look at it
        gc.enable()


class _DeferredCompiler(ModuleType):
    """`torch._dynamo`, whose code runs at the first use of a name other than those of decorators."""

    def __init__(self, name: str, loader: Loader) -> None:
        super().__init__(name)
        marked: list[tuple[str, Function]] = []

        def load() -> None:
            self.__class__ = ModuleType  # type: ignore[assignment]
            loader.exec_module(self)
            for mark, function in marked:
                getattr(self, mark)(function)

        def mark(name: str, function: Function) -> Function:
            marked.append((name, function))
            return function

        def disable(function: Function | None = None, *args: Any, **kwargs: Any) -> Function:
            if function is None:
                return lambda function: disable(function, *args, **kwargs)

            @wraps(function)
            def disabled(*call_args: Any, **call_kwargs: Any) -> Any:
                if isinstance(self, _DeferredCompiler):  # nothing is being compiled
                    return function(*call_args, **call_kwargs)
                return self.disable(function, *args, **kwargs)(*call_args, **call_kwargs)

            return disabled

        marks = {name: partial(mark, name) for name in ("allow_in_graph", "assume_constant_result")}
        vars(self).update(marks, disable=disable, _load=load)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        vars(self)["_load"]()
        return getattr(self, name)


def _lighten_transformers(utils: ModuleType) -> None:
    """Without distributed tensors, as with a PyTorch that has none; the list of models from memory."""
    names = vars(utils)
    models = Path(str(utils.__file__)).parents[1] / "models"
    search = names["create_import_structure_from_path"]

    @cache
    def search_models() -> Any:
        version = f"{sys.modules['transformers'].__version__} {models} {models.stat().st_mtime_ns}"
        folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "fedhpc"
        file = folder / f"models_{hashlib.sha256(version.encode()).hexdigest()[:16]}.json"
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            return _decoded(json.loads(file.read_text(encoding="utf-8")))
        found = search(models)
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(_encoded(found)).encode())
        return found

    def remembered(path: str | Path) -> Any:
        return search_models() if Path(path) in (models, models / "__init__.py") else search(path)

    names.update(is_torch_distributed_available=lambda: False, create_import_structure_from_path=remembered)


def _encoded(folder: dict[Any, Any]) -> dict[str, Any]:
    """An import structure: for each set of backends the names in every module; folders in it."""
    return {
        "modules": [
            [sorted(backends), {module: sorted(names) for module, names in modules.items()}]
            for backends, modules in folder.items()
            if isinstance(backends, frozenset)
        ],
        "folders": {name: _encoded(inner) for name, inner in folder.items() if isinstance(name, str)},
    }


def _decoded(folder: dict[str, Any]) -> dict[Any, Any]:
    modules = {
        frozenset(backends): {module: set(names) for module, names in modules.items()}
        for backends, modules in folder["modules"]
    }
    return {**modules, **{name: _decoded(inner) for name, inner in folder["folders"].items()}}


class _DeferringLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _DeferredCompiler(spec.name, self.loader)

    def exec_module(self, module: ModuleType) -> None:
        """Later."""


class _LighteningLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _lighten_transformers(module)


LOADERS: dict[str, type[Loader]] = {
    COMPILER: _DeferringLoader,
    "transformers.utils.import_utils": _LighteningLoader,
}


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        compiler = sys.modules.get(COMPILER)
        if (
            name.startswith(f"{COMPILER}.")
            and name != NAMED_BY_TRANSFORMERS
            and isinstance(compiler, _DeferredCompiler)
        ):
            vars(compiler)["_load"]()  # its parts need its own order
        if name not in LOADERS:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = LOADERS[name](spec.loader)  # type: ignore[call-arg]
        return spec
