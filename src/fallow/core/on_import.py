"""Runs something once another package has been imported, without importing it now."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_waiting: list[tuple[str, str]] | None = None  # (package, module) of what is held back


class _After(MetaPathFinder, Loader):
    """Finds `package` as Python does, and imports `module` right after it."""

    def __init__(self, package: str, module: str) -> None:
        self.package, self.module = package, module
        self.loader: Loader | None = None

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.package:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        assert self.loader is not None
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert self.loader is not None
        assert module.__spec__ is not None
        sys.meta_path.remove(self)
        module.__loader__ = module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _import(self.package, self.module)


def after_import(package: str, module: str) -> None:
    """Import `module` when (or, if that was before, now that) `package` is imported by whomever."""
    if package in sys.modules:
        _import(package, module)
    else:
        sys.meta_path.insert(0, _After(package, module))


@contextmanager
def held_back() -> Iterator[None]:
    """Within the block nothing is imported because of another import; it is at its end, when what it needs is there."""
    global _waiting
    if _waiting is not None:
        yield
        return
    _waiting = []
    try:
        yield
    finally:
        due, _waiting = _waiting, None
    for package, module in due:
        _import(package, module)


def _import(package: str, module: str) -> None:
    if _waiting is not None:
        _waiting.append((package, module))
        return
    try:
        import_module(module)
    except Exception as error:  # whatever is wrong with ours, `import peft` of somebody else must not fail for it
        warnings.warn(f"{module} does not work with this {package} and is left out: {error!r}", stacklevel=2)
