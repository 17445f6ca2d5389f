"""The table of methods: the shipped rows, then what installed distributions add.

A distribution adds a `Method`, or a tuple of them, by an entry point whose name is the method's:

    [project.entry-points."autopeft.methods"]
    toy = "peft_toys.methods:TOY"

Workers and the cost process are processes of their own; they find it as the driver does.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, MutableMapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NamedTuple

from autopeft import __version__
from autopeft.methods.base import Method
from autopeft.methods.faults import FAMILIES, find_faults

ENTRY_POINT_GROUP = "autopeft.methods"


class Origin(NamedTuple):
    """The distribution that a method comes from."""

    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}".rstrip()


OURS = Origin("autopeft", __version__)


class _Offer(NamedTuple):
    """A method that a distribution offers, not yet accepted."""

    method: Method
    origin: Origin
    entry: str


class MethodTable(MutableMapping[str, Method]):
    """Methods by name. Entry points are read once, when the first method is looked up.

    Not at import: a distribution's module imports this package before it has defined its own methods. One that cannot
    be used harms nobody else: it is left out, with a warning, or an error where it is the one asked for.
    """

    def __init__(self, shipped: Iterable[Method]) -> None:
        rows = sorted(shipped, key=lambda method: FAMILIES.index(method.family))
        self.shipped = {method.name: method for method in rows}
        assert len(self.shipped) == len(rows), "two rows have one name"
        self._rows: dict[str, Method] | None = None
        self._origins: dict[str, Origin] = {}
        self._why_left_out: dict[str, str] = {}
        self._unsaid: list[str] = []

    def __getitem__(self, name: str) -> Method:
        method = self._read()[name]
        self._warn()
        return method

    def __iter__(self) -> Iterator[str]:
        rows = self._read()
        self._warn()
        return iter(rows)

    def __len__(self) -> int:
        return len(self._read())

    def __setitem__(self, name: str, method: Method) -> None:
        """For tests of a method that no distribution offers yet."""
        self._read()[name] = method

    def __delitem__(self, name: str) -> None:
        del self._read()[name]

    def origin(self, name: str) -> Origin:
        """Where a method of the table comes from; autopeft itself for one that a test has put there."""
        self._read()
        return self._origins.get(name, OURS)

    def why_left_out(self, name: str) -> str | None:
        """Why the method or entry point of that name, which a distribution offers, is not in the table."""
        self._read()
        why = self._why_left_out.get(name)
        if why in self._unsaid:
            # The caller says it, as the answer to what was asked.
            self._unsaid.remove(why)
        return why

    def _read(self) -> dict[str, Method]:
        if self._rows is None:
            # Set first, so that what a distribution's module asks of the table while loading is answered as well.
            self._rows = dict(self.shipped)
            self._add(self._load(entry) for entry in _find_entries())
        return self._rows

    def _load(self, entry: EntryPoint) -> list[_Offer]:
        origin = _find_origin(entry)
        had_torch = "torch" in sys.modules
        try:
            offers = [_Offer(method, origin, entry.name) for method in _as_methods(entry.load())]
        except Exception as exc:
            what = f"{type(exc).__name__}: {exc}".rstrip(".")
            self._leave_out(
                entry.name,
                f"The entry point '{entry.name} = {entry.value}' of the distribution {origin} must load to a Method or "
                f"a tuple of them, but ends in {what}. It is left out; update or uninstall {origin.distribution}.",
            )
            return []
        if "torch" in sys.modules and not had_torch:
            self._unsaid.append(
                f"The entry point '{entry.name}' of the distribution {origin} imports torch while it is loaded, which "
                "every autopeft command then waits for. A method should import torch inside its functions."
            )
        return offers

    def _add(self, loaded: Iterable[list[_Offer]]) -> None:
        assert self._rows is not None
        by_name: dict[str, list[_Offer]] = {}
        for offer in (offer for offers in loaded for offer in offers):
            by_name.setdefault(offer.method.name, []).append(offer)
        for name, offers in by_name.items():
            why = _why_not(offers, shipped=name in self.shipped)
            if why is None:
                self._rows[name] = offers[0].method
                self._origins[name] = offers[0].origin
            else:
                self._leave_out(name, why)

    def _leave_out(self, name: str, why: str) -> None:
        why = " ".join(why.split())
        self._why_left_out[name] = why
        self._unsaid.append(why)

    def _warn(self) -> None:
        while self._unsaid:
            logging.getLogger("autopeft").warning("autopeft: %s", self._unsaid.pop(0))


def _find_entries() -> list[EntryPoint]:
    """In an order that does not depend on that of sys.path."""
    return sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda entry: (str(_find_origin(entry)), entry.name))


def _find_origin(entry: EntryPoint) -> Origin:
    assert entry.dist is not None  # as for every entry point that is found and not made
    return Origin(entry.dist.name, entry.dist.version)


def _as_methods(loaded: Any) -> tuple[Method, ...]:
    methods = loaded if isinstance(loaded, tuple) else (loaded,)
    for method in methods:
        if not isinstance(method, Method):
            raise TypeError(f"it holds a {type(method).__name__}")
    return methods


def _why_not(offers: list[_Offer], *, shipped: bool) -> str | None:
    """Why what is offered under one name cannot be taken; None where it can."""
    method, origin, entry = offers[0]
    if shipped:
        others = " and ".join(sorted({str(offer.origin) for offer in offers}))
        return (
            f"The method '{method.name}' of the distribution {others} is left out, because autopeft has a method of "
            "that name. It needs another name."
        )
    if len(offers) > 1:
        given = " and ".join(f"{offer.origin} (entry point '{offer.entry}')" for offer in offers)
        return (
            f"The method '{method.name}' is offered by {given}, and nothing says which is meant, so it is left out. "
            "Uninstall one, or have it renamed."
        )
    try:
        faults = find_faults(method)
    except Exception as exc:
        faults = [f"looking at it ends in {type(exc).__name__}: {exc}".rstrip(".")]
    if faults:
        return (
            f"The method '{method.name}' of the distribution {origin} (entry point '{entry}') is left out: "
            f"{'; '.join(faults)}. Update or uninstall {origin.distribution}."
        )
    return None
