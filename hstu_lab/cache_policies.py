"""Eviction policies on traces of ids: the classic ones, one small step function each, and Belady's bound.

Every policy is demand-only: a row comes in when it is asked for and missing, and may be refused. `simulate` runs one over a
trace; `step` takes one access, so that a cache can run several side by side and follow the best of them.

Sources: LFU with aging: Arlitt et al., LFU-DA (2000). S3-FIFO: Yang et al., SOSP 2023. SIEVE: Zhang et al., NSDI 2024. ARC:
Megiddo and Modha, FAST 2003. W-TinyLFU: Einziger et al., ACM TOS 2017, with exact counts in place of a sketch. Belady's MIN:
IBM Systems Journal 5 (1966); `bypass` lets it refuse the row asked for, as some of the others do, which only raises the bound.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

jit = njit(cache=True, nogil=True)

POLICIES = ("fifo", "lru", "lfu", "s3-fifo", "sieve", "arc", "w-tinylfu", "counts")
"""On-line policies. "lfu" ages; "counts" keeps the rows most often asked for so far, and refuses others."""
NAMES = {
    "fifo": "FIFO", "lru": "LRU", "lfu": "LFU with aging", "s3-fifo": "S3-FIFO", "sieve": "SIEVE", "arc": "ARC",
    "w-tinylfu": "W-TinyLFU", "counts": "counts so far, pinned", "belady": "Belady", "predicted": "predicted",
}  # fmt: skip
NUMBER_OF_POLICIES = len(POLICIES)
FIFO, LRU, LFU, S3FIFO, SIEVE, ARC, TINYLFU, COUNTS = range(NUMBER_OF_POLICIES)
HEADS = 4
INSIDE, PREV, NEXT, COUNT, KEY, PLACE, LIST = range(7)


class State(NamedTuple):
    """What one policy knows. item: (7, n + 4) int64, a row a field; the last 4 columns are the heads of linked lists.

    INSIDE 1 where the row is cached; PREV, NEXT links of the list LIST (-1: none); COUNT uses; KEY, PLACE of the heap.
    heap: (capacity + 1,) ids, the lowest key first. number: capacity, size, clock, then each policy's own.
    """

    kind: int
    item: np.ndarray
    heap: np.ndarray
    number: np.ndarray


CAPACITY, SIZE, CLOCK, VICTIM, OWN = range(5)
SIZES = OWN + 4
"""number[SIZES + l] is the length of list l."""


def new_state(policy: str, num_items: int, capacity: int) -> State:
    """Empty cache of `capacity` rows over ids 0 .. num_items - 1. Raises ValueError for an unknown policy or no capacity."""
    if policy not in POLICIES:
        raise ValueError(f"policy {policy!r}: use one of {', '.join(POLICIES)}")
    if capacity < 1:
        raise ValueError(f"capacity is {capacity}: give at least one row")
    item = np.zeros((7, num_items + HEADS), np.int64)
    heads = np.arange(num_items, num_items + HEADS)
    item[PREV, heads] = item[NEXT, heads] = heads
    item[LIST], item[PLACE] = -1, -1
    number = np.zeros(SIZES + HEADS, np.int64)
    number[CAPACITY] = capacity
    return State(POLICIES.index(policy), item, np.zeros(capacity + 1, np.int64), number)


# ---- linked lists (newest after the head) and a heap


@jit
def _unlink(item, number, i):
    before, after = item[PREV, i], item[NEXT, i]
    item[NEXT, before], item[PREV, after] = after, before
    number[SIZES + item[LIST, i]] -= 1
    item[LIST, i] = -1


@jit
def _push(item, number, which, i):
    head = item.shape[1] - HEADS + which
    after = item[NEXT, head]
    item[PREV, i], item[NEXT, i] = head, after
    item[NEXT, head] = item[PREV, after] = i
    item[LIST, i] = which
    number[SIZES + which] += 1


@jit
def _oldest(item, which):
    return item[PREV, item.shape[1] - HEADS + which]


@jit
def _move(item, number, which, i):
    _unlink(item, number, i)
    _push(item, number, which, i)


@jit
def _up(item, heap, at):
    i = heap[at]
    while at > 0 and item[KEY, heap[(at - 1) >> 1]] > item[KEY, i]:
        heap[at] = heap[(at - 1) >> 1]
        item[PLACE, heap[at]] = at
        at = (at - 1) >> 1
    heap[at] = i
    item[PLACE, i] = at


@jit
def _down(item, heap, at, size):
    i = heap[at]
    while 2 * at + 1 < size:
        child = 2 * at + 1
        if child + 1 < size and item[KEY, heap[child + 1]] < item[KEY, heap[child]]:
            child += 1
        if item[KEY, heap[child]] >= item[KEY, i]:
            break
        heap[at] = heap[child]
        item[PLACE, heap[at]] = at
        at = child
    heap[at] = i
    item[PLACE, i] = at


@jit
def _heap_push(item, heap, number, i):
    heap[number[SIZE]] = i
    number[SIZE] += 1
    item[INSIDE, i] = 1
    _up(item, heap, number[SIZE] - 1)


@jit
def _heap_pop(item, heap, number):
    i = heap[0]
    number[SIZE] -= 1
    item[INSIDE, i], item[PLACE, i] = 0, -1
    if number[SIZE]:
        heap[0] = heap[number[SIZE]]
        _down(item, heap, 0, number[SIZE])
    number[VICTIM] = i
    return i


@jit
def _evict(item, number, i):
    item[INSIDE, i] = 0
    number[SIZE] -= 1
    number[VICTIM] = i


@jit
def _admit(item, number, which, i):
    _push(item, number, which, i)
    item[INSIDE, i] = 1
    number[SIZE] += 1


# ---- policies: what happens when i is asked for; hit says whether it is cached


@jit
def _fifo(item, number, i, hit, recent):
    if hit:
        if recent:
            _move(item, number, 0, i)
        return
    if number[SIZE] == number[CAPACITY]:
        old = _oldest(item, 0)
        _unlink(item, number, old)
        _evict(item, number, old)
    _admit(item, number, 0, i)


@jit
def _lfu(item, heap, number, i, hit):
    if hit:
        item[COUNT, i] += 1
    else:
        if number[SIZE] == number[CAPACITY]:
            number[OWN] = item[KEY, _heap_pop(item, heap, number)] >> 40
        item[COUNT, i] = 1 + number[OWN]
    item[KEY, i] = (item[COUNT, i] << 40) + number[CLOCK]
    if hit:
        _down(item, heap, item[PLACE, i], number[SIZE])
    else:
        _heap_push(item, heap, number, i)


@jit
def _counts(item, heap, number, i, hit):
    item[COUNT, i] += 1
    item[KEY, i] = (item[COUNT, i] << 40) + number[CLOCK]
    if hit:
        _down(item, heap, item[PLACE, i], number[SIZE])
        return
    if number[SIZE] == number[CAPACITY]:
        if item[KEY, heap[0]] > item[KEY, i]:
            return
        _heap_pop(item, heap, number)
    _heap_push(item, heap, number, i)


@jit
def _s3fifo(item, number, i, hit):
    small, main, ghost = 0, 1, 2
    if hit:
        item[COUNT, i] = min(item[COUNT, i] + 1, 3)
        return
    capacity = number[CAPACITY]
    probation = max(capacity // 10, 1)
    while number[SIZE] >= capacity:
        if number[SIZES + small] >= probation or number[SIZES + main] == 0:
            old = _oldest(item, small)
            _unlink(item, number, old)
            if item[COUNT, old] > 1:
                item[COUNT, old] = 0
                _push(item, number, main, old)
                continue
            _evict(item, number, old)
            _push(item, number, ghost, old)
            if number[SIZES + ghost] > max(capacity - probation, 1):
                _unlink(item, number, _oldest(item, ghost))
        else:
            old = _oldest(item, main)
            if item[COUNT, old] > 0:
                item[COUNT, old] -= 1
                _move(item, number, main, old)
                continue
            _unlink(item, number, old)
            _evict(item, number, old)
    known = item[LIST, i] == ghost
    if known:
        _unlink(item, number, i)
    item[COUNT, i] = 0
    _admit(item, number, main if known else small, i)


@jit
def _sieve(item, number, i, hit):
    if hit:
        item[COUNT, i] = 1
        return
    head = item.shape[1] - HEADS
    if number[SIZE] == number[CAPACITY]:
        hand = number[OWN] if number[OWN + 1] else item[PREV, head]
        if hand == head:
            hand = item[PREV, head]
        while item[COUNT, hand]:
            item[COUNT, hand] = 0
            hand = item[PREV, hand]
            if hand == head:
                hand = item[PREV, head]
        number[OWN], number[OWN + 1] = item[PREV, hand], 1
        _unlink(item, number, hand)
        _evict(item, number, hand)
    item[COUNT, i] = 0
    _admit(item, number, 0, i)


@jit
def _arc_replace(item, number, in_ghost2):
    target = number[OWN]
    first = number[SIZES]
    if first and (first > target or (in_ghost2 and first == target) or number[SIZES + 1] == 0):
        old = _oldest(item, 0)
        _move(item, number, 2, old)
    else:
        old = _oldest(item, 1)
        _move(item, number, 3, old)
    _evict(item, number, old)


@jit
def _arc(item, number, i, hit):
    once, often, ghost1, ghost2 = 0, 1, 2, 3
    capacity, where = number[CAPACITY], item[LIST, i]
    if hit:
        _move(item, number, often, i)
        return
    ones, oftens = number[SIZES + ghost1], number[SIZES + ghost2]
    if where in (ghost1, ghost2):
        if where == ghost1:
            number[OWN] = min(capacity, number[OWN] + max(oftens // ones, 1))
        else:
            number[OWN] = max(0, number[OWN] - max(ones // oftens, 1))
        if number[SIZE] >= capacity:
            _arc_replace(item, number, where == ghost2)
        _unlink(item, number, i)
        _admit(item, number, often, i)
        return
    if number[SIZES + once] + ones >= capacity:
        if number[SIZES + once] < capacity:
            _unlink(item, number, _oldest(item, ghost1))
            if number[SIZE] >= capacity:
                _arc_replace(item, number, False)
        else:
            old = _oldest(item, once)
            _unlink(item, number, old)
            _evict(item, number, old)
    elif number[SIZE] + ones + oftens >= capacity:
        if number[SIZE] + ones + oftens >= 2 * capacity:
            _unlink(item, number, _oldest(item, ghost2))
        if number[SIZE] >= capacity:
            _arc_replace(item, number, False)
    _admit(item, number, once, i)


@jit
def _tinylfu(item, number, i, hit):
    window, probation, protected = 0, 1, 2
    capacity = number[CAPACITY]
    window_size = max(capacity // 100, 1)
    protected_size = (capacity - window_size) * 4 // 5
    item[COUNT, i] += 1
    number[OWN] += 1
    if number[OWN] >= 10 * capacity:
        number[OWN] = 0
        for j in range(item.shape[1] - HEADS):
            item[COUNT, j] >>= 1
    if hit:
        if item[LIST, i] == window:
            _move(item, number, window, i)
            return
        _move(item, number, protected, i)
        if number[SIZES + protected] > protected_size:
            _move(item, number, probation, _oldest(item, protected))
        return
    _admit(item, number, window, i)
    if number[SIZES + window] > window_size:
        candidate = _oldest(item, window)
        if number[SIZE] > capacity:
            victim = _oldest(item, probation)
            if victim >= item.shape[1] - HEADS:
                victim = _oldest(item, protected)
            if victim >= item.shape[1] - HEADS or item[COUNT, candidate] <= item[COUNT, victim]:
                _unlink(item, number, candidate)
                _evict(item, number, candidate)
                return
            _unlink(item, number, victim)
            _evict(item, number, victim)
        _move(item, number, probation, candidate)


@jit
def step(state, i):
    """Ask `state` for id i: whether it was a hit. Afterwards number[VICTIM] is the id that went, or -1."""
    item, heap, number = state.item, state.heap, state.number
    number[CLOCK] += 1
    number[VICTIM] = -1
    hit = item[INSIDE, i] == 1
    kind = state.kind
    if kind in (FIFO, LRU):
        _fifo(item, number, i, hit, kind == LRU)
    elif kind == LFU:
        _lfu(item, heap, number, i, hit)
    elif kind == S3FIFO:
        _s3fifo(item, number, i, hit)
    elif kind == SIEVE:
        _sieve(item, number, i, hit)
    elif kind == ARC:
        _arc(item, number, i, hit)
    elif kind == TINYLFU:
        _tinylfu(item, number, i, hit)
    else:
        _counts(item, heap, number, i, hit)
    return hit


@jit
def _run(state, ids, hits):
    for t in range(len(ids)):
        hits[t] = step(state, ids[t])


# ---- off line


@jit
def next_uses(ids, num_items):
    """(T,) int64: when each access's id is asked for again; 2^40 where never."""
    following = np.empty(len(ids), np.int64)
    later = np.full(num_items, np.int64(1) << 40)
    for t in range(len(ids) - 1, -1, -1):
        following[t] = later[ids[t]]
        later[ids[t]] = t
    return following


@jit
def _belady(item, heap, number, ids, following, bypass, hits):
    for t in range(len(ids)):
        i = ids[t]
        hits[t] = item[INSIDE, i] == 1
        item[KEY, i] = -following[t]
        if hits[t]:
            _up(item, heap, item[PLACE, i])
            _down(item, heap, item[PLACE, i], number[SIZE])
            continue
        if number[SIZE] == number[CAPACITY]:
            if bypass and item[KEY, heap[0]] >= item[KEY, i]:
                continue
            _heap_pop(item, heap, number)
        _heap_push(item, heap, number, i)


def simulate(policy: str, ids: np.ndarray, capacity: int, num_items: int | None = None, *, bypass: bool = True) -> np.ndarray:
    """Which accesses of the trace ids (T,) hit, (T,) bool, from an empty cache of `capacity` rows.

    policy: one of POLICIES, or "belady", which knows the future; `bypass` concerns only that one. Raises ValueError.
    """
    ids = np.ascontiguousarray(ids, dtype=np.int64)
    num_items = int(ids.max(initial=-1)) + 1 if num_items is None else num_items
    if len(ids) and not 0 <= ids.min() <= ids.max() < num_items:
        raise ValueError(f"ids from {ids.min()} to {ids.max()}: give 0 to {num_items - 1}")
    state = new_state("counts" if policy == "belady" else policy, num_items, capacity)
    hits = np.empty(len(ids), np.bool_)
    if policy == "belady":
        _belady(state.item, state.heap, state.number, ids, next_uses(ids, num_items), bypass, hits)
    else:
        _run(state, ids, hits)
    return hits
