"""STUB until the helper's module is merged."""

from typing import Any, Protocol


class Ranks(Protocol):
    rank: int
    size: int

    def broadcast(self, value: Any) -> Any: ...
    def all_gather(self, value: Any) -> list[Any]: ...
    def sum_tree(self, array: Any) -> None: ...


class Alone:
    rank, size = 0, 1

    def broadcast(self, value: Any) -> Any:
        return value

    def all_gather(self, value: Any) -> list[Any]:
        return [value]

    def sum_tree(self, array: Any) -> None:
        pass
