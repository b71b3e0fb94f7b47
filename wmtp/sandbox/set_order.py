"""Sets that are iterated over in the order of the set they were made from.

That order depends on the size of the table and on who came first where two items want one place; a program's
`list(set(words))` is part of its answer. CPython's way of looking for a place (Objects/setobject.c) is followed here
only to find a history that leads to the order wanted; the set is then really filled that way, and looked at.
"""

import operator
from graphlib import CycleError, TopologicalSorter

_MAX_ITEMS = 2_000  # of a set whose order is looked for
_STEPS_EACH = 4  # that are spent on the search, for each item
_LINEAR_PROBES, _PERTURB_SHIFT = 9, 5
_MAX_PROBES = 24  # that an item is taken to have needed
_EMPTY, _ENTRY = set().__sizeof__(), 16  # bytes


def ordered_set(kind: type, items: list, size: object) -> set | frozenset:
    """Returns a set of `items`, in their order where that can be had; `size` is the `__sizeof__` of the original."""
    made = kind(items)
    if len(items) > _MAX_ITEMS or len(made) != len(items) or type(size) is not int or _fits(made, items, size):
        return made
    slots = 8 if size <= _EMPTY else (size - _EMPTY) // _ENTRY
    history = _history(items, slots) if slots & (slots - 1) == 0 and len(items) < slots <= 16 * _MAX_ITEMS else None
    if history is None:
        return made
    for attempt in (dict.fromkeys(history), history, _room_for(history, slots)):
        other = kind(attempt)
        if kind is set:
            other -= other - made
        if _fits(other, items, size):
            return other
    made_to_measure, further = history[: slots // 2 - 1], history[slots // 2 - 1 :]
    other = kind(dict.fromkeys(made_to_measure)).union(dict.fromkeys(further))
    return other if _fits(other, items, size) else made


def _fits(made: set | frozenset, items: list, size: int) -> bool:
    return made.__sizeof__() == size and len(made) == len(items) and all(map(operator.is_, made, items))


def _room_for(history: list, slots: int) -> dict:
    """Adds as many items, to be discarded, as a table of that size is made for: the set was once larger."""
    return dict.fromkeys([*history, *(object() for _ in range(slots // 4 - len(history)))])


def _probes(hashed: int, slots: int) -> list[int]:
    """Returns places in the order in which an item is tried in them, without repetition."""
    mask = slots - 1
    place, perturb = hashed & mask, hashed & ((1 << 64) - 1)
    places: dict[int, None] = {}
    while len(places) < min(_MAX_PROBES, slots):
        further = _LINEAR_PROBES if place + _LINEAR_PROBES <= mask else 0
        places.update(dict.fromkeys(range(place, place + further + 1)))
        perturb >>= _PERTURB_SHIFT
        place = (place * 5 + 1 + perturb) & mask
    return list(places)


def _history(items: list, slots: int) -> list | None:
    """Returns an order of coming in that leaves `items` in a table in their order; None where none is found."""
    probes = [_probes(hash(item), slots) for item in items]
    stack: list[tuple[int, int, int]] = []  # of the items so far: place, number of places tried before, see below
    taken: set[int] = set()
    wanted: list[int] = []  # higher places that must be taken in the end, for something was tried in them
    attempt = 0
    for _ in range(_STEPS_EACH * (len(items) + 1)):
        if len(stack) == len(items) and taken.issuperset(wanted):
            break
        before = stack[-1][0] if stack else -1
        tries = probes[len(stack)] if len(stack) < len(items) else []
        while attempt < len(tries):
            place = tries[attempt]
            if (
                place > before
                and all(other > place or other in taken for other in tries[:attempt])
                and not any(before < other < place for other in wanted)
            ):
                break
            attempt += 1
        if attempt < len(tries):
            stack.append((place, attempt, len(wanted)))
            taken.add(place)
            wanted += [other for other in tries[:attempt] if other > place]
            attempt = 0
        elif not stack:
            return None
        else:
            place, attempt, size = stack.pop()
            taken.discard(place)
            del wanted[size:]
            attempt += 1
    else:
        return None
    owner = {place: index for index, (place, _, _) in enumerate(stack)}
    sooner = {index: [owner[place] for place in probes[index][:tried]] for index, (_, tried, _) in enumerate(stack)}
    try:
        return [items[index] for index in TopologicalSorter(sooner).static_order()]
    except CycleError:
        return None
