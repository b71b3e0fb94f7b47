"""Sets that are iterated over in the order of the set they were made from.

The order of a set depends on the size of its table and on who came first where two items want one place, that is, on
its history; a program's `list(set(words))` or `tuple(pairs)` is part of its answer. CPython's way of looking for a place
(Objects/setobject.c) is followed here only to find a history that leads to the order wanted; the set is then really
filled that way, and looked at. Where none is found, the set has an order of its own.
"""

from collections.abc import Iterator

_MAX_ITEMS = 5_000  # of a set whose order is looked for
_MAX_STEPS = 50_000
_LINEAR_PROBES, _PERTURB_SHIFT = 9, 5
_MAX_PROBES = 40  # that an item is taken to have needed
_EMPTY, _ENTRY = set().__sizeof__(), 16  # bytes


def ordered_set(kind: type, items: list, size: object) -> set | frozenset:
    """A set (`kind`: set or frozenset) of `items`, in their order where that can be had.

    size: what `__sizeof__` said of the original.
    """
    made = kind(items)
    if len(items) > _MAX_ITEMS or len(made) != len(items) or type(size) is not int or _fits(made, items, size):
        return made
    slots = 8 if size <= _EMPTY else (size - _EMPTY) // _ENTRY
    history = _history(items, slots) if slots & (slots - 1) == 0 and len(items) < slots <= 16 * _MAX_ITEMS else None
    if history is None:
        return made
    for attempt in (dict.fromkeys(history), history, _room_for(history, slots)):
        other = kind(attempt)
        if kind is set and len(other) > len(items):
            other -= other - made
        if _fits(other, items, size):
            return other
    return made


def _fits(made: set | frozenset, items: list, size: int) -> bool:
    return made.__sizeof__() == size and all(one is other for one, other in zip(made, items, strict=False))


def _room_for(history: list, slots: int) -> dict:
    """With as many further items, to be discarded, as a table of that size is made for: the set was once larger."""
    return dict.fromkeys([*history, *(object() for _ in range(slots // 4 - len(history)))])


def _probes(hashed: int, slots: int) -> Iterator[int]:
    """Places in the order in which an item is tried in them."""
    mask = slots - 1
    place, perturb = hashed & mask, hashed & ((1 << 64) - 1)
    while True:
        yield from range(place, place + (_LINEAR_PROBES if place + _LINEAR_PROBES <= mask else 0) + 1)
        perturb >>= _PERTURB_SHIFT
        place = (place * 5 + 1 + perturb) & mask


def _history(items: list, slots: int) -> list | None:
    """An order of coming in that leaves `items` in a table in their order: each in its place, then the displaced."""
    probes = [
        [place for _, place in zip(range(_MAX_PROBES), _probes(hash(item), slots), strict=False)] for item in items
    ]
    chosen: list[int] = []  # for each item so far, how many places it was tried in before it got one
    taken: list[int] = []  # and which one it got: they rise
    attempt = 0
    for _ in range(_MAX_STEPS):
        if len(chosen) == len(items):
            break
        index, before = len(chosen), taken[-1] if taken else -1
        tries = probes[index]
        # What it was tried in must be taken: lower places are known, higher ones wait for a later item.
        while attempt < _MAX_PROBES and (
            tries[attempt] <= before
            or any(place < tries[attempt] and place not in taken for place in tries[:attempt])
            or tries[attempt] in tries[:attempt]
            or any(before < p < tries[attempt] for i, n in enumerate(chosen) for p in probes[i][:n])
        ):
            attempt += 1
        if attempt < _MAX_PROBES:
            chosen.append(attempt)
            taken.append(tries[attempt])
            attempt = 0
        elif not chosen:
            return None
        else:
            attempt = chosen.pop() + 1
            taken.pop()
    if len(chosen) < len(items):
        return None
    owner = dict(zip(taken, range(len(items)), strict=True))
    ready = [index for index, tried in enumerate(chosen) if tried == 0]
    waiting = [index for index, tried in enumerate(chosen) if tried]
    while waiting:
        done = set(ready)
        free = [i for i in waiting if all(owner.get(place, i) in done for place in probes[i][: chosen[i]])]
        if not free:
            return None
        ready += free
        waiting = [index for index in waiting if index not in free]
    return [items[index] for index in ready]
