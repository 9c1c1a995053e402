"""Book-keeping of recorded runs: what fits into a budget, which output comes next, and whether a graph pays."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

from torch import Tensor

Key = Hashable
T = TypeVar("T")


class GraphError(RuntimeError):
    """A run could not be recorded; the message names the network call at which it failed. The engine stays usable."""


class Shelf(Generic[T]):
    """Values by key, with sizes. Putting one away makes room by dropping the least recently used that nobody holds."""

    def __init__(self, budget: int | None = None) -> None:
        self.budget = budget
        self._items: OrderedDict[Key, tuple[T, int]] = OrderedDict()
        self._held: set[Key] = set()

    @property
    def size(self) -> int:
        return sum(size for _, size in self._items.values())

    def keys(self) -> list[Key]:
        """Least recently used first."""
        return list(self._items)

    def take(self, key: Key) -> T | None:
        """The value, now held and most recently used."""
        if key not in self._items:
            return None
        self._items.move_to_end(key)
        self._held.add(key)
        return self._items[key][0]

    def release(self, key: Key) -> None:
        self._held.discard(key)

    def put(self, key: Key, value: T, size: int) -> list[T]:
        """Store ``value``, held. Returns what was dropped. Raises ``GraphError`` if there can be no room."""
        dropped: list[T] = []
        if self.budget is not None:
            free = self.budget - sum(s for k, (_, s) in self._items.items() if k in self._held)
            if size > free:
                raise GraphError(
                    f"graph: a recording of {size} bytes does not fit into the {free} bytes left of the budget"
                )
            for old in [k for k in self._items if k not in self._held]:
                if self.size + size <= self.budget:
                    break
                dropped.append(self._items.pop(old)[0])
        self._items[key] = (value, size)
        self._held.add(key)
        return dropped

    def drop(self, chosen: Callable[[Any], bool]) -> None:
        """Forget all values whose key is ``chosen``."""
        for key in [k for k in self._items if chosen(k)]:
            del self._items[key]
            self._held.discard(key)


class Ring:
    """``count`` output tensors handed out in turn: a sample is overwritten ``count`` calls later."""

    def __init__(self, count: int) -> None:
        self.count, self._tensors, self._next = count, list[Tensor](), 0

    def take(self, make: Callable[[], Tensor]) -> Tensor:
        if len(self._tensors) < self.count:
            self._tensors.append(make())
            return self._tensors[-1]
        self._next = (self._next + 1) % self.count
        return self._tensors[self._next - 1]


def pays(host: float, device: float, replay: float) -> tuple[bool, str]:
    """Whether a replay is worth it against a run of ``host`` seconds to enqueue and ``device`` until it is done."""
    plain = max(host, device)
    gain = 1 - replay / plain if plain > 0 else 0.0
    if gain < 0.03:
        return False, f"graph does not pay: {replay * 1e3:.3f} ms replayed, {plain * 1e3:.3f} ms without"
    return True, f"graph pays: {replay * 1e3:.3f} ms replayed, {plain * 1e3:.3f} ms without"
