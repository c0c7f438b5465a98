"""Pieces of a user's own: records, functions and sources that a config names, `module:object` or `file.py:object`.

What a config names is imported when it is read, and so runs. The user wrote the config of a training; a run folder or a
model file may be anybody's: what reads these asks `refuse_untrusted` first. A piece that no module holds under a name
(of `__main__`, of a function) is called `own:NAME`, and has to be passed again, `own=[piece]`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from gpu_bp.errors import UserError, nearest
from gpu_bp.spec import Record

Piece = Record | Callable[..., Any]

# Where in a config a piece may stand: a name, a table with a kind, a list, or a table of these.
PLACES = (
    ("network", "activation"),
    ("network", "output_activation"),
    ("loss",),
    ("optimizer",),
    ("data", "sources"),
    ("train", "metrics"),
)


def load(name: str) -> object:
    """The object called `module:object`, `package.module:Class.attribute` or `path/to/file.py:object`.

    Modules are found as `python -m` finds them, in the working folder too. One name is one object, however often asked.

    Raises:
        UserError: no such module or object, or the module's own error while it was imported.
    """
    module_name, path = _module_of(name), name.rpartition(":")[2]
    if not module_name or not path:
        raise UserError(f"{name!r} is not of the form module:object or path/to/file.py:object")
    if module_name == "own":
        raise UserError(f"{name!r} is a piece that was passed from Python: pass it again, own=[{path}]")
    found: Any = _module(module_name)
    for part in path.split("."):
        if not hasattr(found, part):
            known = (
                [attribute for attribute in vars(found) if attribute[0] != "_"] if hasattr(found, "__dict__") else ()
            )
            raise UserError(f"{module_name} has no object {path!r}; {nearest(part, known)}")
        found = getattr(found, part)
    return found


def find(name: str, kinds: tuple[type[Record], ...], own: Sequence[Piece] = ()) -> Record:
    """The record of that name: one of those passed, or else what `load` gives.

    Raises:
        UserError: as `load`, or it is of none of the kinds.
    """
    found = _passed_or_loaded(name, own)
    if not isinstance(found, kinds):
        raise UserError(f"{name} is {_article(type(found))}, {_article(kinds[0])} is needed")
    if not (found.name.isascii() and found.name.isidentifier()):
        raise UserError(f"{name}: the record's name {found.name!r} must be an identifier, since kernels are called so")
    return found


def find_function(name: str, own: Sequence[Piece] = ()) -> Callable[..., Any]:
    """The function of that name, likewise."""
    found = _passed_or_loaded(name, own)
    if not callable(found):
        raise UserError(f"{name} is {_article(type(found))}, a function is needed")
    return found


def name_of(piece: Piece) -> tuple[str, dict[str, Any]]:
    """What a piece that is not the package's is called in a config, and the values to be written beside that name."""
    values = piece.values if isinstance(piece, Record) else {}
    for module_name, module in list(sys.modules.items()):
        held = dict(getattr(module, "__dict__", {}))
        if module_name == "__main__" or held.get("__spec__") is None:  # it cannot be imported under that name
            continue
        for attribute, value in held.items():
            if value is piece or same_formula(value, piece):
                differing = {key: chosen for key, chosen in values.items() if chosen != value.values[key]}
                return f"{module_name}:{attribute}", differing
    return f"own:{_called(piece)}", dict(values)


def same_formula(a: object, b: object) -> bool:
    """Whether two records are one but for the values chosen, and for what follows from these."""
    if type(a) is not type(b) or not isinstance(a, Record):
        return False
    chosen = {"values", "origin", *(("state", "update") if getattr(a, "variant", None) else ())}
    return all(getattr(a, f.name) == getattr(b, f.name) for f in fields(a) if f.name not in chosen)


def refuse_untrusted(names: Iterable[str], where: str, own: Sequence[Piece], trust_code: bool) -> None:
    """Raises UserError where a file names code, unless it is trusted or the piece was passed."""
    for name in names:
        passed = _module_of(name) == "own" or any(_stands_for(piece, name) for piece in own)
        if not trust_code and not passed:
            raise UserError(
                f"{where} names code, {name}, which runs when it is read: "
                "where you trust it, say --trust-code (from Python trust_code=True)"
            )


def names(config: Mapping[str, Any]) -> list[str]:
    """All names of one's own pieces in the tables of a config."""
    found: list[str] = []
    change_names(config, lambda name: found.append(name) or name)  # type: ignore[func-returns-value]
    return found


def absolute(name: str) -> str:
    """The name with the path of its file made absolute, where it has one."""
    file, path = _module_of(name), name.rpartition(":")[2]
    return f"{Path(file).resolve()}:{path}" if file.endswith(".py") else name


def change_names(config: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """The tables of a config, with each name of a piece of one's own replaced by what `change` makes of it."""
    result = dict(config)
    for *parents, last in PLACES:
        table = result
        for parent in parents:
            table[parent] = dict(table[parent]) if isinstance(table.get(parent), Mapping) else table.get(parent)
            table = table[parent] or {}
        if isinstance(table, dict) and last in table:
            table[last] = _changed(table[last], change)
    return {key: value for key, value in result.items() if key in config}


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value) if ":" in value else value
    if isinstance(value, list | tuple):
        return [_changed(member, change) for member in value]
    if isinstance(value, Mapping):
        names = ("kind",) if "kind" in value else tuple(value)  # what stands beside a kind are its parameters
        return {key: _changed(member, change) if key in names else member for key, member in value.items()}
    return value


def _passed_or_loaded(name: str, own: Sequence[Piece]) -> object:
    found = [piece for piece in own if _stands_for(piece, name)]
    if any(piece is not found[0] and not same_formula(piece, found[0]) for piece in found):
        raise UserError(f"two pieces that were passed are called {name}; give one of them another name")
    return found[0] if found else load(name)


def _stands_for(piece: Piece, name: str) -> bool:
    return name in (f"own:{_called(piece)}", name_of(piece)[0]) or any(
        held is piece or same_formula(held, piece) for held in _already_held(name)
    )


def _already_held(name: str) -> Iterator[object]:
    """What modules that are already imported hold under that name; nothing is run."""
    module_name, path = _module_of(name), name.rpartition(":")[2]
    for key, module in list(sys.modules.items()):
        if key == module_name or (module_name.endswith(".py") and getattr(module, "__file__", None) == module_name):
            held: Any = module
            for part in path.split("."):
                held = getattr(held, "__dict__", {}).get(part)
            yield held


def _module_of(name: str) -> str:
    """What stands before the last colon."""
    return name.rpartition(":")[0]


def _called(piece: Piece) -> str:
    """A record's name, or a function's, where it has one: a lambda is called `lambda`."""
    return piece.name if isinstance(piece, Record) else getattr(piece, "__name__", type(piece).__name__).strip("<>")


def _article(kind: type) -> str:
    return f"{'an' if kind.__name__[0] in 'AEIOUaeiou' else 'a'} {kind.__name__}"


def _module(name: str) -> Any:
    """The module of that name, or of that file, which then stands in sys.modules under its absolute path."""
    place = str(Path(name).resolve()) if name.endswith(".py") else name
    if place in sys.modules:
        return sys.modules[place]
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    importlib.invalidate_caches()  # a file may have been written a moment ago
    try:
        return _run_file(place) if name.endswith(".py") else importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise UserError(f"there is no module {error.name!r}, neither installed nor in {folder}") from None
        raise _failed(name, error) from None
    except (Exception, SystemExit) as error:
        raise _failed(name, error) from None
    finally:
        sys.path.remove(folder)


def _run_file(place: str) -> Any:
    if not Path(place).is_file():
        raise UserError(f"there is no file {place}")
    spec = importlib.util.spec_from_file_location(place, place)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[place] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[place]
        raise
    return module


def _failed(name: str, error: BaseException) -> UserError:
    if isinstance(error, UserError):
        return error
    return UserError(f"{name} could not be imported: {type(error).__name__}: {' '.join(str(error).split())}")
