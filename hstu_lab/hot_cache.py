"""The hot cache: the rows of a table in host memory that the GPU asks for most, kept in GPU memory.

`HotCache.lookup(ids)` gathers the rows that are there and lists those that are not in one kernel; the misses come from pinned
host memory on a side stream, into the answer and into spare slots. The same class runs on the CPU.

Any row may sit in any slot: `slot_of` holds one int32 for every row of the table (0.2 % of a 1,024-wide fp16 table), which
costs one load and knows no conflict misses, where a hash table or sets of slots would cost probes and evict by accident.

Concurrency. A lookup may run on any stream while rows are being inserted. A slot is reused two steps after its row was chosen
to go: step k unmaps the victims; step k + 1 writes new rows into their slots after every lookup that was issued before it, and
lookups issued after it wait for step k (long done) and so cannot see the old mapping. Hits never wait for the step in progress.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

SAMPLE = 16
"""A slot is freed by evicting the least valued of this many rows, taken in turn around the slots: no order of all is kept."""
POLICIES = ("lru", "lfu", "priority")
NEVER = torch.iinfo(torch.int64).max


class CacheError(ValueError):
    """A table, an id or a size that the cache cannot take; the message names it and the remedy."""


@dataclasses.dataclass
class CacheState:
    """Tensors of one cache. N rows of the table, S slots, K spares; on the cache's device, but for the table.

    slot_of (N,) int32: a row's slot, or -1. id_of (S,) int64: a slot's row, -1 empty, -2 spare. last_used (S,) int64: the
    number of the last lookup that hit it. uses (S,) int32: hits since inserted. claimed (N,) int64: the last lookup that missed
    the row. priority (N,) float32 or None: what a predictor expects of a row. spare (K,) int32: slots that the next misses go
    to, -1 where none could be freed. totals (3,) int64: rows missed, rows inserted, slots ever used. compiled: the kernels that
    have run on it, by what they were compiled for.
    """

    table: Tensor
    table_scales: Tensor | None
    slots: Tensor
    slot_scales: Tensor | None
    slot_of: Tensor
    id_of: Tensor
    last_used: Tensor
    uses: Tensor
    claimed: Tensor
    priority: Tensor | None
    spare: Tensor
    totals: Tensor
    compiled: dict = dataclasses.field(default_factory=dict)


def lookup(ids, state: CacheState, out, miss_at, miss_rank, want, counts, clock: int) -> None:
    """Copy the rows of `ids` (T,) that are cached to out (T, D), and list the misses.

    counts (2,) int32, zero before: misses, and distinct missing rows. miss_at: positions of misses in `ids`. miss_rank: place
    of the row in `want` (distinct missing ids), or -1 where another position asked for it first. out None: only list.
    """
    slot = state.slot_of[ids].long()
    hit = slot >= 0
    if out is not None:
        out[hit] = _decoded(state.slots, state.slot_scales, slot[hit], out.dtype)
    state.last_used[slot[hit]] = clock
    state.uses.index_add_(0, slot[hit], torch.ones_like(slot[hit], dtype=torch.int32))
    at = (~hit).nonzero().squeeze(1)
    distinct, inverse = ids[at].unique(return_inverse=True)
    first = torch.full_like(distinct, len(at)).scatter_reduce_(0, inverse, torch.arange(len(at), device=ids.device), "amin")
    miss_at[: len(at)] = at.int()
    miss_rank[: len(at)] = -1
    miss_rank[first] = torch.arange(len(distinct), device=ids.device, dtype=torch.int32)
    want[: len(distinct)] = distinct
    state.claimed[distinct] = clock
    counts += torch.tensor([len(at), len(distinct)], dtype=counts.dtype, device=counts.device)


def fetch(ids, state: CacheState, out, miss_at, miss_rank, counts) -> None:
    """Copy the missing rows from the table to `out` (unless None) and, while there are spare slots, into those."""
    misses = int(counts[0])
    at, rank = miss_at[:misses].long(), miss_rank[:misses].long()
    index = ids[at]
    if out is not None:
        out[at] = _decoded(state.table, state.table_scales, index, out.dtype)
    kept = (rank >= 0) & (rank < len(state.spare))
    slot = torch.where(kept, state.spare[rank.clamp(0, len(state.spare) - 1)].long(), -1)
    kept &= slot >= 0
    state.slots[slot[kept]] = state.table[index[kept]]
    if state.slot_scales is not None:
        state.slot_scales[slot[kept]] = state.table_scales[index[kept]]


def publish(state: CacheState, want, counts, by: int, clock: int, hand: int, in_use: int) -> None:
    """Map the fetched rows to their slots; unmap a victim for each slot used, which is a spare from now on; zero `counts`.

    Slots never used come first. Then the r-th victim is the least, by POLICIES[by], of the SAMPLE rows in the slots from
    hand + r * SAMPLE on; rows asked for by lookup number `in_use` or later stay.
    """
    spares, slots = len(state.spare), len(state.id_of)
    spare = state.spare.long()
    used = (spare >= 0) & (torch.arange(spares, device=spare.device) < counts[1])
    index = want[:spares]
    used &= state.slot_of[torch.where(used, index, 0)] < 0
    state.slot_of[index[used]] = spare[used].int()
    state.id_of[spare[used]] = index[used]
    state.last_used[spare[used]] = clock
    state.uses[spare[used]] = 1
    empty = (used | (spare < 0)).nonzero().squeeze(1)
    filled = int(state.totals[2])
    fresh = torch.arange(filled, min(filled + len(empty), slots), device=spare.device)
    place = torch.arange(len(empty), device=spare.device)[len(fresh) :, None] * SAMPLE + torch.arange(SAMPLE, device=spare.device)
    candidate = (hand + place) % slots
    owner = state.id_of[candidate]
    free = (place < slots) & (owner >= 0) & (state.last_used[candidate] < in_use)
    if by == 0:
        value = (state.last_used[candidate] - clock).float()
    elif by == 1:
        value = state.uses[candidate].float()
    else:
        value = state.priority[owner.clamp(min=0)]
    least, at = torch.where(free, value, torch.inf).min(dim=1)
    sampled = torch.where(least < torch.inf, candidate.gather(1, at[:, None]).squeeze(1), -1)
    victim = torch.cat([fresh, sampled])
    state.spare[empty] = victim.int()
    gone = victim[victim >= 0]
    old = state.id_of[gone]
    state.slot_of[old[old >= 0]] = -1
    state.id_of[gone] = -2
    state.totals += torch.stack([counts[0].long(), used.sum(), torch.tensor(len(fresh), device=counts.device)])
    counts.zero_()


def _decoded(rows: Tensor, scales: Tensor | None, index: Tensor, dtype: torch.dtype) -> Tensor:
    taken = rows[index]
    return taken.to(dtype) if scales is None else (taken.float() * scales[index, None]).to(dtype)


@dataclasses.dataclass(frozen=True)
class Lookup:
    """An answer under way: `rows` (T, D); hits are there in stream order, misses after `wait()`."""

    rows: Tensor
    _arrived: torch.cuda.Event | None

    def wait(self) -> Tensor:
        """Make the current stream wait for the missing rows (the host does not wait); returns `rows`."""
        if self._arrived is not None:
            torch.cuda.current_stream(self.rows.device).wait_event(self._arrived)
            self.rows.record_stream(torch.cuda.current_stream(self.rows.device))
        return self.rows


@dataclasses.dataclass(frozen=True)
class CacheStats:
    """Since the cache was made. `lookups` counts rows asked for by `lookup`, `prefetched` those asked for by `prefetch`."""

    lookups: int
    prefetched: int
    misses: int
    inserted: int
    resident: int
    capacity: int
    bytes_moved: int
    gpu_bytes: int

    @property
    def hit_ratio(self) -> float:
        """Share of all rows asked for, by lookup or prefetch, that were cached. NaN before the first."""
        asked = self.lookups + self.prefetched
        return 1 - self.misses / asked if asked else float("nan")


class _Work:
    """Lists of one step's misses, and when it has looked up, fetched and published."""

    def __init__(self, size: int, device: torch.device):
        self.lists = torch.empty(2, size, dtype=torch.int32, device=device)
        self.want = torch.empty(size, dtype=torch.int64, device=device)
        self.counts = torch.zeros(2, dtype=torch.int32, device=device)
        if device.type == "cuda":
            self.looked, self.arrived, self.published = (torch.cuda.Event() for _ in range(3))
            torch.cuda.current_stream(device).synchronize()


class HotCache:
    """Rows of `table` (N, D) that the device asks for most, in at most `capacity` slots of device memory.

    table: float32, float16, bfloat16, or int8 with `scales` (N,) float32, in host memory; on a GPU a copy of it is pinned unless
    it is already. `cache.table` is the table from then on. A capacity above N is cut to N. spares: slots kept free for the next
    misses, out of `capacity` (default 1/64 of it, 64 to 4,096); more distinct misses than that in one lookup are answered but
    not kept. dtype: of the rows given (default: the table's, float16 for int8). policy: "lru", "lfu" (hits since inserted) or,
    once `prioritise` has been called, "priority"; may be set at any time. Raises CacheError naming what is wrong.
    """

    def __init__(
        self, table: Tensor, capacity: int, device: torch.device | str = "cpu", *, scales: Tensor | None = None,
        policy: str = "lru", spares: int | None = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        self.device = torch.device(device)
        if table.dim() != 2 or 0 in table.shape or table.device.type != "cpu":
            raise CacheError(f"a table of shape {tuple(table.shape)} on {table.device}: give (rows, width) in host memory")
        if (table.dtype == torch.int8) != (scales is not None) or (scales is not None and scales.shape != table.shape[:1]):
            raise CacheError(f"a table of {table.dtype}: int8 needs `scales` (rows,) float32, other dtypes take none")
        if capacity < 1:
            raise CacheError(f"capacity is {capacity}: give the number of rows that the device may hold, from 1")
        rows, width = table.shape
        self.capacity = min(capacity, rows)
        # All rows fit: no slot need be free for a next one, and each row has a slot of its own to go to.
        spares = min(max(64, self.capacity // 64), 4096) if spares is None else spares
        spares = max(1, min(spares, (self.capacity + 1) // 2))
        self.table = _pinned(table.detach().contiguous(), self.device)
        self.dtype = dtype or (torch.float16 if table.dtype == torch.int8 else table.dtype)

        def full(size, value, kind):
            return torch.full(size, value, dtype=kind, device=self.device)

        slots = self.capacity + (spares if self.capacity == rows else 0)
        self.state = CacheState(
            table=self.table,
            table_scales=None if scales is None else _pinned(scales.detach().contiguous().float(), self.device),
            slots=full((slots, width), 0, table.dtype),
            slot_scales=None if scales is None else full((slots,), 0, torch.float32),
            slot_of=full((rows,), -1, torch.int32),
            id_of=full((slots,), -1, torch.int64),
            last_used=full((slots,), 0, torch.int64),
            uses=full((slots,), 0, torch.int32),
            claimed=full((rows,), 0, torch.int64),
            priority=None,
            spare=torch.arange(spares, dtype=torch.int32, device=self.device),
            totals=full((3,), 0, torch.int64),
        )
        self.state.id_of[:spares] = -2
        self.state.totals[2] = spares
        self.policy = policy
        self._clock, self._hand, self._lookups, self._prefetched = 0, 0, 0, 0
        self._in_use = NEVER
        self._lock = threading.Lock()
        self._work: list[_Work] = []
        self._must_see: torch.cuda.Event | None = None
        self._readers: dict[torch.cuda.Stream, torch.cuda.Event] = {}
        self._side = None
        if self.device.type == "cuda":
            from hstu_lab.ops import triton_cache as kernels

            self._kernels = kernels
            self._side = torch.cuda.Stream(self.device)
            self._side.wait_stream(torch.cuda.current_stream(self.device))

    @property
    def policy(self) -> str:
        """Which rows go first: one of POLICIES."""
        return POLICIES[self._by]

    @policy.setter
    def policy(self, name: str) -> None:
        if name not in POLICIES or (name == "priority" and self.state.priority is None):
            raise CacheError(f"policy {name!r}: use one of {', '.join(POLICIES)}; 'priority' after prioritise(...)")
        self._by = POLICIES.index(name)

    def prioritise(self, priority: Tensor) -> None:
        """Evict the rows of least priority (N,) float32 first, from now on: what a predictor expects of each row."""
        if priority.shape != self.table.shape[:1]:
            raise CacheError(f"priorities of shape {tuple(priority.shape)}: give one for each of {len(self.table)} rows")
        with self._lock:
            if self.state.priority is None:
                self._settle()
                self.state.priority = torch.empty(len(self.table), dtype=torch.float32, device=self.device)
            if self._side is None:
                self.state.priority.copy_(priority)
            else:
                self._side.wait_stream(torch.cuda.current_stream(self.device))
                with torch.cuda.stream(self._side):
                    self.state.priority.copy_(priority, non_blocking=True)
                if priority.is_cuda:
                    priority.record_stream(self._side)
            self._by = POLICIES.index("priority")

    # ---- reading

    def lookup(self, ids: Tensor) -> Lookup:
        """Rows of ids (T,) int64, in range, on the cache's device. Never waits for the host or for rows being inserted."""
        out = torch.empty(len(ids), self.table.shape[1], dtype=self.dtype, device=self.device)
        with self._lock:
            self._lookups += len(ids)
            return Lookup(out, self._step(ids, out))

    def rows(self, ids: Tensor) -> Tensor:
        """`lookup(ids).wait()`: rows (T, D) of ids of any shape (flattened), ready in stream order."""
        return self.lookup(ids.reshape(-1)).wait()

    def prefetch(self, ids: Tensor) -> None:
        """Start fetching the rows of ids (T,) that are missing, for a lookup to come; they and the hits stay until it has been.

        Rows asked for by `prefetch` are in use, and not evicted, until `release()`.
        """
        with self._lock:
            self._prefetched += len(ids)
            self._in_use = min(self._in_use, self._clock + 1)
            self._step(ids, None)

    def release(self) -> None:
        """Rows of earlier prefetches may be evicted again: their lookup has been issued."""
        with self._lock:
            self._in_use = NEVER

    def _step(self, ids: Tensor, out: Tensor | None) -> torch.cuda.Event | None:
        if ids.dim() != 1 or ids.dtype != torch.int64 or ids.device.type != self.device.type:
            raise CacheError(f"ids of shape {tuple(ids.shape)}, {ids.dtype}, on {ids.device}: give (T,) int64 on {self.device}")
        ids = ids.contiguous()
        self._clock += 1
        clock, work = self._clock, self._workspace(len(ids))
        lists, want, counts = work.lists, work.want, work.counts
        self._hand = (self._hand + SAMPLE * len(self.state.spare)) % len(self.state.id_of)
        choice = self._by, clock, self._hand, min(self._in_use, clock)
        if self._side is None:
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(self.table):
                raise CacheError(f"ids from {int(ids.min())} to {int(ids.max())}: the table has rows 0 to {len(self.table) - 1}")
            lookup(ids, self.state, out, *lists, want, counts, clock)
            fetch(ids, self.state, out, *lists, counts)
            publish(self.state, want, counts, *choice)
            return None
        reader, side = torch.cuda.current_stream(self.device), self._side
        # The step before the last: its victims may be overwritten from now on, so their old places must not be seen any more.
        reader.wait_event(self._work[(clock - 2) % len(self._work)].published)
        if self._must_see is not None:
            reader.wait_event(self._must_see)
        self._kernels.lookup(ids, self.state, out, *lists, want, counts, clock, stream=reader)
        work.looked.record(reader)
        self._readers[reader] = work.looked
        for event in self._readers.values():
            side.wait_event(event)
        self._readers = {reader: work.looked}
        ids.record_stream(side)
        if out is not None:
            out.record_stream(side)
        self._kernels.fetch(ids, self.state, out, *lists, counts, stream=side)
        work.arrived.record(side)
        self._kernels.publish(self.state, want, counts, *choice, stream=side)
        work.published.record(side)
        return work.arrived

    def _workspace(self, count: int) -> _Work:
        """Lists for the misses of this step, in turn: a step waits for the one before the last, so its own were free before."""
        size = max(count, len(self.state.spare), 1)
        if not self._work or size > len(self._work[0].want):
            self._settle()
            self._work = [_Work(size, self.device) for _ in range(4)]
            self._readers.clear()
        return self._work[self._clock % len(self._work)]

    # ---- writing

    def update(self, ids: Tensor, rows: Tensor, scales: Tensor | None = None) -> None:
        """Replace rows of the table: ids (U,) int64, distinct; rows (U, D) in the table's dtype, with `scales` (U,) for int8.

        Every lookup issued afterwards, on any stream, gives the new rows; lookups issued before have been answered with the old
        ones (the host waits for them). Cached copies are replaced in place.
        """
        ids, rows = ids.reshape(-1), rows.reshape(-1, self.table.shape[1])
        host = ids.cpu()
        if len(host) != len(rows) or rows.dtype != self.table.dtype or (scales is None) != (self.state.table_scales is None):
            raise CacheError(f"{len(host)} ids with {len(rows)} rows of {rows.dtype}: give one row of {self.table.dtype} an id")
        if len(host.unique()) != len(host):
            raise CacheError("an id is given twice: which of its rows shall be kept?")
        if len(host) and not 0 <= int(host.min()) <= int(host.max()) < len(self.table):
            raise CacheError(f"ids from {int(host.min())} to {int(host.max())}: the table has rows 0 to {len(self.table) - 1}")
        with self._lock:
            self._settle()
            self.table[host] = rows.cpu().clone()  # the rows given may be rows of this table
            if scales is not None:
                self.state.table_scales[host] = scales.cpu().clone()
            slot = self.state.slot_of[host.to(self.device)].long()
            cached = slot >= 0
            self.state.slots[slot[cached]] = rows.to(self.device)[cached]
            if scales is not None:
                self.state.slot_scales[slot[cached]] = scales.to(self.device)[cached]
            if self._side is not None:
                self._must_see = torch.cuda.current_stream(self.device).record_event()
                self._side.wait_event(self._must_see)

    # ---- looking at it

    def resident(self) -> Tensor:
        """Ids (R,) of the rows that a lookup would find, sorted; waits for what is under way."""
        with self._lock:
            self._settle()
            return (self.state.slot_of >= 0).nonzero().squeeze(1)

    @property
    def gpu_bytes(self) -> int:
        """Device memory (on a CPU: memory besides the table) that the cache holds."""
        state = self.state
        held = [getattr(state, f.name) for f in dataclasses.fields(state) if not f.name.startswith("table")]
        return sum(t.nbytes for t in held if isinstance(t, Tensor))

    def stats(self) -> CacheStats:
        """Counters; waits for what is under way."""
        resident = len(self.resident())
        misses, inserted, _ = self.state.totals.tolist()
        moved = misses * self.table[0].nbytes
        return CacheStats(self._lookups, self._prefetched, misses, inserted, resident, self.capacity, moved, self.gpu_bytes)

    def _settle(self) -> None:
        if self._side is not None:
            self._side.synchronize()  # waits for every lookup, which the side stream has waited for
            if self._must_see is not None:
                self._must_see.synchronize()


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda" or tensor.is_pinned():
        return tensor
    return tensor.pin_memory()


def quantize_rows(table: Tensor) -> tuple[Tensor, Tensor]:
    """(N, D) -> int8 rows (N, D) and scales (N,) float32: each row's largest magnitude becomes 127."""
    scales = (table.float().abs().amax(dim=1) / 127).clamp(min=1e-12)
    return (table.float() / scales[:, None]).round().to(torch.int8), scales


class CachedRows:
    """A row store of `tables.Tables` (its `RowStore`): each named table behind a hot cache, the rest resident on the device.

    weights: {table name: (rows, D) in host memory}. capacity: {table name: rows to keep}; tables that it leaves out are copied to
    the device whole, as is one whose capacity covers it (the item table, which the engine needs there anyway).
    """

    def __init__(self, weights: Mapping[str, Tensor], capacity: Mapping[str, int], device="cpu", **options):
        if unknown := set(capacity) - set(weights):
            raise CacheError(f"no table {sorted(unknown)[0]!r}; there are: {', '.join(weights)}")
        self.caches = {
            name: HotCache(weight.detach(), capacity[name], device, **options)
            for name, weight in weights.items()
            if name in capacity and capacity[name] < len(weight)
        }
        self.resident = {name: weight.detach().to(device) for name, weight in weights.items() if name not in self.caches}

    def weight(self, table: str) -> Tensor:
        """The whole table (rows, D) on the device. Raises CacheError for one that is behind a cache."""
        if table in self.caches:
            raise CacheError(f"table {table} is behind a hot cache: ask for rows of it, or leave it out of `capacity`")
        return self.resident[table]

    def rows(self, features: KeyedJaggedTensor) -> dict[str, Tensor]:
        """Rows (number of values of that key, D) of every key of `features`; misses of all tables travel at the same time."""
        asked = {name: features[name].values() for name in features.keys()}  # noqa: SIM118, a KeyedJaggedTensor is no dict
        under_way = {name: self.caches[name].lookup(ids) for name, ids in asked.items() if name in self.caches}
        return {name: under_way[name].wait() if name in under_way else self.resident[name][ids] for name, ids in asked.items()}

    def stats(self) -> dict[str, CacheStats]:
        """Counters of every cache by its table; waits for what is under way."""
        return {name: cache.stats() for name, cache in self.caches.items()}
