"""Makes threadpoolctl control our thread pool, whenever it is imported, without importing it."""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_NAME = "threadpoolctl"


def register() -> None:
    """Register now if threadpoolctl is imported already, else when it will be."""
    module = sys.modules.get(_NAME)
    if module is not None:
        _register_controller(module)
    else:
        _step_aside()
        sys.meta_path.insert(0, _Finder())


def _is_ours(finder: object) -> bool:
    # By name: after a second import of this module the class is another.
    kind = type(finder)
    return kind.__module__ == __name__ and kind.__name__ == _Finder.__name__


def _step_aside() -> None:
    sys.meta_path[:] = [finder for finder in sys.meta_path if not _is_ours(finder)]


def _register_controller(threadpoolctl: Any) -> None:
    # Versions before 3.2 cannot be extended; a module that is still being imported has nothing yet.
    base: Any = getattr(threadpoolctl, "LibController", None)
    if base is None or not hasattr(threadpoolctl, "register"):
        return

    class FastattnController(base):  # type: ignore[misc]
        """The thread pool of fastattn."""

        user_api = "fastattn"
        internal_api = "fastattn"
        # The extension module's file; others are called _core too, the symbol tells them apart.
        filename_prefixes = ("_core",)
        check_symbols = ("fastattn_get_num_threads",)

        def get_num_threads(self) -> int:
            return int(self.dynlib.fastattn_get_num_threads())

        def set_num_threads(self, num_threads: int) -> None:
            self.dynlib.fastattn_set_num_threads(num_threads)

        def get_version(self) -> str | None:
            import ctypes

            # Asked before the symbols are checked: other packages have a _core, too.
            version = getattr(self.dynlib, "fastattn_version", None)
            if version is None:
                return None
            version.restype = ctypes.c_char_p
            return str(version().decode())

    threadpoolctl.register(FastattnController)


class _Finder(MetaPathFinder):
    """Lets the other finders find threadpoolctl, then steps aside for good."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _NAME:
            return None
        for finder in list(sys.meta_path):
            if _is_ours(finder) or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(Loader):
    """Loads by the real loader, puts that in its place again, and registers."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _step_aside()
        _register_controller(module)
