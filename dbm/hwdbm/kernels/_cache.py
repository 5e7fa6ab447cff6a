"""Compiling kernels so that they always start, whatever became of the cache on disk.

numba keeps compiled code beside the source, or under the user's home. A cache that is damaged, foreign, or can't be
written must cost a compilation, never the program.
"""

import hashlib
import logging
import pickle
from collections.abc import Callable
from typing import Any

from numba import njit, types
from numba.core.caching import CompileResultCacheImpl, FunctionCache, IndexDataCacheFile

from hwdbm import files

_log = logging.getLogger("hwdbm")
_said: list[str] = []


def compiled(*signature: types.Type) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that compiles a function for one signature, or takes its code from the cache."""

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher: Any = njit(nogil=True)(function)
        if dispatcher is function:
            raise RuntimeError("numba is switched off (NUMBA_DISABLE_JIT)")
        try:
            dispatcher._cache = _Cache(function)
        except Exception:  # noqa: BLE001 - numba has no error of its own for it
            _say_once(
                "compiled kernels aren't kept, and are compiled at each start: neither the package's folder nor the "
                "user's cache can be written (NUMBA_CACHE_DIR names another)"
            )
        dispatcher.compile(signature)
        dispatcher.disable_compile()
        return dispatcher

    return decorate


class _Places(CompileResultCacheImpl):
    """Where numba keeps compiled code: not in a ``~`` of the current folder, where it would run what it finds."""

    def __init__(self, function: Callable[..., Any]) -> None:
        if files.caches() is None:
            self._locator_classes = [each for each in self._locator_classes if "UserWide" not in each.__name__]
        super().__init__(function)


class _Cache(FunctionCache):
    """numba's cache of a function, which never raises, and checks what it loads."""

    _impl_class = _Places

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file = _File(
            cache_path=self._cache_path,
            filename_base=self._impl.filename_base,
            source_stamp=self._impl.locator.get_source_stamp(),
        )

    def load_overload(self, sig: object, target_context: object) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # noqa: BLE001 - unpickling a damaged file may raise anything
            _say_once(f"a damaged cache of compiled kernels is made anew: {self.cache_path} ({error!r})")
            try:
                self.flush()
            except Exception as failed:  # noqa: BLE001 - nor may the folder be writable
                _say_once(f"compiled kernels aren't kept: {failed}")
            return None

    def save_overload(self, sig: object, data: object) -> None:
        try:
            super().save_overload(sig, data)
        except Exception as error:  # noqa: BLE001 - a full disk, a folder that went
            why = error.strerror if isinstance(error, OSError) else error
            _say_once(f"compiled kernels aren't kept in {self.cache_path}: {why}")


class _File(IndexDataCacheFile):
    """The files of a cache, with a digest of the code: what was cut or altered is never run."""

    def _save_data(self, name: str, data: object) -> None:
        code = self._dump(data)
        super()._save_data(name, (hashlib.sha256(code).digest(), code))

    def _load_data(self, name: str) -> Any:
        digest, code = super()._load_data(name)
        if hashlib.sha256(code).digest() != digest:
            raise ValueError(f"{name} isn't what was written")
        return pickle.loads(code)  # noqa: S301 - numba's own format


def _say_once(text: str) -> None:
    """Tell the user, in one line however many functions there are: without a handler it goes to stderr."""
    if not _said:
        _said.append(text)
        _log.warning("hwdbm: %s", " ".join(text.split()))
