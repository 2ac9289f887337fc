"""Calls a function once a module has been imported, without importing it.

If the module is there already, at once. Else the finder below sees its import, lets the other
finders do it, and calls the function after the module's own code has run.
"""

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

Callback = Callable[[ModuleType], None]


def after_import(name: str, callback: Callback) -> None:
    """Calls ``callback(module)`` when module `name` is imported, or now if it is."""
    if name in sys.modules:
        _call(callback, import_module(name))  # waits, if another thread is still at it
    else:
        sys.meta_path.insert(0, _Finder(name, callback))


class _Finder(MetaPathFinder):
    def __init__(self, name: str, callback: Callback) -> None:
        self.name = name
        self.callback = callback

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_call(module: ModuleType) -> None:
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                _call(self.callback, module)

        # On this loader alone: it stays what it is for whoever asks it for sources or resources.
        spec.loader.exec_module = run_and_call  # type: ignore[method-assign]
        return spec


def _call(callback: Callback, module: ModuleType) -> None:
    try:
        callback(module)
    except Exception as error:  # an import of theirs must not fail because of us
        warnings.warn(
            f"pytorch_block_sparse: cannot be registered with {module.__name__}, of a version that "
            f"it does not know: {type(error).__name__}: {error}",
            stacklevel=2,
        )
