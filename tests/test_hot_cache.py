"""The hot cache against a dictionary, on the CPU and (marked) on the GPU with several streams."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hstu_lab.hot_cache import CachedRows, CacheError, HotCache, quantize_rows

ROWS, WIDTH = 97, 24
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = pytest.mark.parametrize("device", ["cpu", GPU])
FEW = 24
some_ids = st.lists(st.integers(0, FEW - 1), max_size=60)  # few rows: what is updated must have been cached, and come back


def numbered(version: int, ids, dtype=torch.float32):
    """Rows that tell which id and which version of it they are."""
    ids = torch.as_tensor(ids, dtype=torch.float32)
    return (ids[:, None] + version / 128 + torch.zeros(WIDTH)).to(dtype)


class AgainstADictionary(RuleBasedStateMachine):
    """Random lookups, prefetches, releases, updates and changes of policy; answers are checked at random later moments."""

    device = "cpu"

    @initialize(capacity=st.integers(1, FEW + 5), spares=st.one_of(st.none(), st.integers(1, 20)))
    def make(self, capacity, spares):
        self.truth = {i: numbered(0, [i])[0] for i in range(FEW)}
        self.cache = HotCache(numbered(0, range(FEW)), capacity, self.device, spares=spares)
        self.version, self.under_way = 0, []
        self.streams = [torch.cuda.Stream() for _ in range(3)] if self.device == "cuda" else [None]

    def on(self, stream):
        return torch.cuda.stream(self.streams[stream % len(self.streams)])

    def expected(self, ids):
        return torch.stack([self.truth[i] for i in ids]) if ids else torch.empty(0, WIDTH)

    @rule(ids=some_ids, stream=st.integers(0, 2))
    def lookup(self, ids, stream):
        with self.on(stream):
            given = torch.tensor(ids, dtype=torch.int64).to(self.device)
            self.under_way.append((self.cache.lookup(given), self.expected(ids), stream))

    @rule(data=st.data())
    def read(self, data):
        if self.under_way:
            answer, expected, stream = self.under_way.pop(data.draw(st.integers(0, len(self.under_way) - 1)))
            with self.on(stream):
                assert torch.equal(answer.wait().cpu(), expected)

    @rule(ids=some_ids, stream=st.integers(0, 2))
    def prefetch(self, ids, stream):
        with self.on(stream):
            self.cache.prefetch(torch.tensor(ids, dtype=torch.int64).to(self.device))

    @rule()
    def release(self):
        self.cache.release()

    @rule(ids=st.lists(st.integers(0, FEW - 1), max_size=20, unique=True), stream=st.integers(0, 2))
    def update(self, ids, stream):
        self.version += 1
        rows = numbered(self.version, ids)
        with self.on(stream):
            self.cache.update(torch.tensor(ids, dtype=torch.int64), rows)
        self.truth.update(zip(ids, rows))

    @rule(policy=st.sampled_from(["lru", "lfu", "priority"]), seed=st.integers(0, 99))
    def change_policy(self, policy, seed):
        if policy == "priority":
            self.cache.prioritise(torch.rand(FEW, generator=torch.Generator().manual_seed(seed)).to(self.device))
        else:
            self.cache.policy = policy

    @invariant()
    def cached_rows_are_current(self):
        if self.device == "cpu":
            for row in self.cache.resident().tolist():
                assert torch.equal(self.cache.state.slots[int(self.cache.state.slot_of[row])], self.truth[row])

    @invariant()
    def never_over_capacity(self):
        resident = self.cache.resident()
        assert len(resident) <= self.cache.capacity
        slots = self.cache.state.slot_of[resident].long()
        assert len(slots.unique()) == len(slots)
        assert torch.equal(self.cache.state.id_of[slots], resident)

    def teardown(self):
        for answer, expected, stream in getattr(self, "under_way", []):
            with self.on(stream):
                assert torch.equal(answer.wait().cpu(), expected)


AgainstADictionary.TestCase.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestOnTheCPU = AgainstADictionary.TestCase


class OnTheGPU(AgainstADictionary):
    device = "cuda"

    @invariant()
    def never_over_capacity(self):
        """Only now and then: it waits for the device, and what is under way should stay so."""
        if self.version % 5 == 4:
            super().never_over_capacity()


OnTheGPU.TestCase.settings = settings(
    max_examples=100, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
TestOnTheGPU = pytest.mark.gpu(OnTheGPU.TestCase)


@pytest.mark.gpu
def test_streams_that_race_read_whole_current_rows():
    """Rows wide enough to be torn: every row is one number, so a half-written one shows; evictions all the time, no waiting."""
    rows, width = 20_000, 1024
    table = torch.arange(rows, dtype=torch.float32)[:, None].expand(rows, width).contiguous()
    cache = HotCache(table, 2048, "cuda", spares=256)
    streams = [torch.cuda.Stream() for _ in range(4)]
    generator = torch.Generator("cuda").manual_seed(0)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    for step in range(400):
        with torch.cuda.stream(streams[step % 4]):
            ids = (torch.rand(4096, device="cuda", generator=generator) ** 4 * rows).long()
            answer = cache.lookup(ids).wait()
            wrong += (answer != ids[:, None]).any(dim=1).sum()
        if step % 50 == 49:
            changed = torch.arange(step, rows, 50)
            cache.update(changed, table[changed])
    torch.cuda.synchronize()
    assert int(wrong) == 0
    assert 0.2 < cache.stats().hit_ratio < 0.99


@DEVICES
@pytest.mark.parametrize("capacity", [1, 30, ROWS, 3 * ROWS])
def test_a_cache_as_large_as_the_table_misses_each_row_once(capacity, device):
    cache = HotCache(numbered(0, range(ROWS)), capacity, device)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        cache.rows(torch.randint(0, ROWS, (50,), generator=generator).to(device))
        cache.resident()
    stats = cache.stats()
    assert stats.resident <= capacity
    if capacity >= ROWS:
        assert stats.resident == ROWS
        before = stats.misses
        cache.rows(torch.arange(ROWS, device=device))
        assert cache.stats().misses == before
    assert stats.lookups == 40 * 50
    assert stats.bytes_moved == stats.misses * WIDTH * 4


@DEVICES
def test_ids_of_any_layout_and_odd_counts(device):
    """A kernel compiled for the first call serves counts and addresses of another alignment."""
    cache = HotCache(numbered(0, range(ROWS)), 30, device, spares=4)
    ids = torch.randint(0, ROWS, (128,), generator=torch.Generator().manual_seed(0))
    there = ids.to(device)
    for part in (slice(0, 64), slice(1, 64), slice(3, 4), slice(5, 100), slice(0, 0), slice(0, 128, 2), slice(7, 128, 3)):
        assert torch.equal(cache.rows(there[part]).cpu(), cache.table[ids[part]])
    columns = ids.reshape(32, 4)
    assert torch.equal(cache.lookup(there.reshape(32, 4)[:, 1]).wait().cpu(), cache.table[columns[:, 1]])


@DEVICES
def test_rows_under_way_are_not_evicted(device):
    cache = HotCache(numbered(0, range(ROWS)), 40, device, spares=10)
    soon = torch.arange(10, device=device)
    cache.prefetch(soon)
    for start in range(10, 90, 10):
        cache.rows(torch.arange(start, start + 10, device=device))
    before = cache.stats().misses
    cache.rows(soon)
    assert cache.stats().misses == before
    cache.release()
    for start in range(10, 90, 10):
        cache.rows(torch.arange(start, start + 10, device=device))
    assert not set(range(10)) <= set(cache.resident().tolist())


@DEVICES
def test_policies_keep_what_they_value(device):
    def survivors(policy=None, priority=None):
        cache = HotCache(numbered(0, range(ROWS)), 20, device, spares=2, policy=policy or "lru")
        if priority is not None:
            cache.prioritise(priority)
        for _ in range(9):
            cache.rows(torch.tensor([7], device=device))
        for start in range(10, 90, 2):
            cache.rows(torch.tensor([start, start + 1], device=device))
        return set(cache.resident().tolist())

    assert 7 not in survivors("lru")
    assert 7 in survivors("lfu")
    likely = torch.arange(ROWS, dtype=torch.float32).flip(0).to(device)
    assert len({7, *range(10, 20)} & survivors(priority=likely)) > 8  # each victim is the least of 16 of the 20


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_int8_rows_are_decoded(dtype, device):
    table = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    quantized, scales = quantize_rows(table)
    cache = HotCache(quantized.clone(), 30, device, scales=scales.clone(), dtype=dtype)
    for _ in range(5):
        ids = torch.randint(0, ROWS, (40,))
        got = cache.rows(ids.to(device)).cpu()
        assert got.dtype == dtype
        assert torch.allclose(got.float(), quantized[ids] * scales[ids, None], rtol=1e-3, atol=1e-6)
        assert ((got.float() - table[ids]).abs() <= scales[ids, None] * 0.51 + 1e-3).all()
    cache.update(torch.tensor([3]), quantized[:1], scales[:1])
    assert torch.allclose(cache.rows(torch.tensor([3], device=device)).cpu().float(), quantized[:1] * scales[:1, None], rtol=1e-3)


def test_what_it_refuses():
    table = numbered(0, range(ROWS))
    with pytest.raises(CacheError, match="int8 needs `scales`"):
        HotCache(table.to(torch.int8), 10)
    with pytest.raises(CacheError, match="capacity is 0"):
        HotCache(table, 0)
    with pytest.raises(CacheError, match=r"\(rows, width\) in host memory"):
        HotCache(table[0], 10)
    cache = HotCache(table, 10)
    with pytest.raises(CacheError, match="rows 0 to 96"):
        cache.rows(torch.tensor([ROWS]))
    with pytest.raises(CacheError, match="rows 0 to 96"):
        cache.rows(torch.tensor([-1]))
    with pytest.raises(CacheError, match=r"give \(T,\) int64"):
        cache.lookup(torch.tensor([1], dtype=torch.int32))
    with pytest.raises(CacheError, match="given twice"):
        cache.update(torch.tensor([1, 1]), table[:2])
    with pytest.raises(CacheError, match=r"one row of torch\.float32 an id"):
        cache.update(torch.tensor([1]), table[:2])
    with pytest.raises(CacheError, match="'priority' after prioritise"):
        cache.policy = "priority"
    with pytest.raises(CacheError, match="one for each of 97 rows"):
        cache.prioritise(torch.zeros(3))
    with pytest.raises(CacheError, match="no table 'films'"):
        CachedRows({"item": table}, {"films": 3})
    assert np.isnan(HotCache(table, 10).stats().hit_ratio)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_the_model_gives_the_same_on_cached_rows(tiny_model, tiny_world, device):
    from hstu_lab.model import HSTU
    from hstu_lab.tables import Tables

    weights = {name: tiny_model.tables.store.weight(name) for name, _ in tiny_model.config.tables}
    capacity = {name: max(1, len(weight) // 4) for name, weight in weights.items() if name != "item"}
    store = CachedRows(weights, capacity, device)
    assert set(store.caches) == set(capacity)
    cached = Tables(tiny_model.config, store=store, device=device)
    cached.item_features.copy_(tiny_model.tables.item_features)
    generator = torch.Generator().manual_seed(0)
    assert HSTU is type(tiny_model)
    config = tiny_model.config
    for _ in range(5):
        lengths = torch.tensor([4, 0, 9])
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        tokens = torch.randint(1, config.num_items, (int(offsets[-1]),), generator=generator)
        with torch.inference_mode():
            assert torch.equal(cached(tokens.to(device), offsets.to(device)).cpu(), tiny_model.tables(tokens, offsets))
