"""Names of NNX modules in what is traced, as Linen gives them by itself.

While a model runs, each call of one of its modules is put into a `jax.named_scope` of the module's
place in the one that calls it: `blocks/attn/qkv`. The names end up in the compiled program's
metadata and so in traces; the program itself is the same.
"""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import jax
from flax import nnx

_CALLERS: ContextVar[tuple[_Caller, ...]] = ContextVar("callers", default=())
_CALL = "__call__"


class _Caller:
    """A module that is being called, and how it knows the modules inside."""

    def __init__(self, module: nnx.Module) -> None:
        self.module = module
        self._paths: dict[int, str] = {}
        classes: dict[type, list[str]] = defaultdict(list)
        for path, inner in nnx.iter_modules(module):
            if path:
                name = "/".join(map(str, path))
                self._paths[id(inner)] = name
                classes[type(inner)].append(name)
        # Loops and rematerialisation call a copy, which is known by its class if that is the only
        # one of it.
        self._only = {of: names[0] for of, names in classes.items() if len(names) == 1}

    def name_of(self, module: nnx.Module) -> str | None:
        return self._paths.get(id(module)) or self._only.get(type(module))


@contextlib.contextmanager
def module_scopes(model: nnx.Module) -> Iterator[None]:
    """Names what the modules of a model trace as long as the context is open.

    Args:
      model: whose modules are named by their place in it. The classes of its modules call through
        a wrapper meanwhile; modules that are no part of the model are left alone.
    """
    owners: dict[type, Any] = {}
    for _, module in nnx.iter_modules(model):
        for cls in type(module).__mro__:
            if _CALL in vars(cls) and cls is not object and cls not in owners:
                owners[cls] = vars(cls)[_CALL]
                break
    token = _CALLERS.set((*_CALLERS.get(), _Caller(model)))
    changed = {cls: call for cls, call in owners.items() if not hasattr(call, "_names_scopes")}
    try:
        for cls, call in changed.items():
            setattr(cls, _CALL, _named(call))
        yield
    finally:
        for cls, call in changed.items():
            setattr(cls, _CALL, call)
        _CALLERS.reset(token)


def _named(call: Any) -> Callable[..., Any]:
    """A `__call__` in the scope of its module."""

    @functools.wraps(call)
    def named_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = call.__get__(self, type(self))
        callers = _CALLERS.get()
        if not callers or callers[-1].module is self:  # `super().__call__`
            return bound(*args, **kwargs)
        name = callers[-1].name_of(self)
        if name is None:
            return bound(*args, **kwargs)
        token = _CALLERS.set((*callers, _Caller(self)))
        try:
            with jax.named_scope(name):
                return bound(*args, **kwargs)
        finally:
            _CALLERS.reset(token)

    named_call._names_scopes = True  # pyright: ignore[reportAttributeAccessIssue]
    return named_call
