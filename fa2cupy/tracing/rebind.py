"""A function whose free variables, global or closure, have other values; the function itself stays as it is."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

__all__ = ["free_names", "rebound"]


def rebound(function: Callable[..., Any], values: Mapping[str, object]) -> Callable[..., Any]:
    """The function with these values of its free variables, and of those of the functions that it uses: those that its
    closure holds, also in tuples and lists, and the global ones of its own module.
    """
    result: Callable[..., Any] = _Rebinding(values).of(function)
    return result


def free_names(function: Callable[..., Any]) -> set[str]:
    """Names of the variables that `rebound` would look at."""
    found: set[str] = set()
    for each in _reachable(function, set()):
        found |= _names(each.__code__) | set(each.__code__.co_freevars)
    return found


def _names(code: types.CodeType) -> set[str]:
    """Global names (and attributes') of a function and of those inside it."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return names


def _held(value: Any) -> Iterator[types.FunctionType]:
    """The functions that a value is, or holds."""
    if isinstance(value, types.FunctionType):
        yield value
    elif isinstance(value, types.MethodType):
        yield from _held(value.__func__)
    elif isinstance(value, functools.partial):
        for each in (value.func, *value.args, *value.keywords.values()):
            yield from _held(each)
    elif type(value) in (tuple, list):
        for each in value:
            yield from _held(each)
    elif not isinstance(value, type) and callable(value):
        call = vars(type(value)).get("__call__")
        if isinstance(call, types.FunctionType):
            yield call


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _used(function: types.FunctionType) -> Iterator[Any]:
    """The values in which a function may find others."""
    for cell in function.__closure__ or ():
        yield _contents(cell)
    for name in _names(function.__code__):
        value = function.__globals__.get(name)
        if isinstance(value, types.FunctionType) and value.__globals__ is function.__globals__:
            yield value


def _reachable(value: Any, seen: set[int]) -> Iterator[types.FunctionType]:
    for function in _held(value):
        if id(function) not in seen:
            seen.add(id(function))
            yield function
            for each in _used(function):
                yield from _reachable(each, seen)


class _Rebinding:
    def __init__(self, values: Mapping[str, object]) -> None:
        self._values = values
        self._made: dict[int, tuple[object, types.FunctionType]] = {}  # with the function, whose id it is

    def of(self, value: Any) -> Any:
        if not any(self._is_concerned(each) for each in _reachable(value, set())):
            return value
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return types.MethodType(self.of(value.__func__), value.__self__)
        if isinstance(value, functools.partial):
            keywords = {name: self.of(each) for name, each in value.keywords.items()}
            return functools.partial(self.of(value.func), *map(self.of, value.args), **keywords)
        if type(value) in (tuple, list):
            return type(value)(map(self.of, value))
        return types.MethodType(self.of(type(value).__call__), value)

    def _is_concerned(self, function: types.FunctionType) -> bool:
        code = function.__code__
        return not self._values.keys().isdisjoint(_names(code) | set(code.co_freevars))

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        if id(function) in self._made:
            return self._made[id(function)][1]
        code = function.__code__
        names = dict(function.__globals__)
        cells = [types.CellType() for _ in code.co_freevars]
        new = types.FunctionType(code, names, function.__name__, function.__defaults__, tuple(cells))
        new.__kwdefaults__ = function.__kwdefaults__
        self._made[id(function)] = function, new  # before its variables, which may hold it
        for name in _names(code):
            value = names.get(name)
            if name in self._values:
                names[name] = self._values[name]
            elif isinstance(value, types.FunctionType) and value.__globals__ is function.__globals__:
                names[name] = self.of(value)
        for name, old, cell in zip(code.co_freevars, function.__closure__ or (), cells, strict=True):
            value = self._values[name] if name in self._values else self.of(_contents(old))
            cell.cell_contents = value
        return new
