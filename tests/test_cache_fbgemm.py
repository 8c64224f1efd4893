"""FBGEMM's tables answer like the table itself; where they cannot run, the benchmark says why."""

import pytest
import torch

from hstu_lab import cache_bench, cache_fbgemm, measure
from hstu_lab.cache_fbgemm import UvmTable

TABLE = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0)).half()


@pytest.mark.parametrize("training", [False, True])
def test_rows_are_the_table_s(training):
    store = UvmTable(TABLE, "HOST", training=training, bag=4)
    ids = torch.randint(0, len(TABLE), (64,), generator=torch.Generator().manual_seed(1))
    for asked in (ids, ids[:8]):
        assert torch.equal(store.rows(asked), TABLE[asked])
    store.bag = 1
    assert torch.equal(store.rows(ids[:7]), TABLE[ids[:7]])


def test_a_capacity_below_one_set_is_refused():
    with pytest.raises(ValueError, match="capacity is 31"):
        UvmTable(TABLE, "MANAGED_CACHING", 31)


def test_what_is_missing_is_named(monkeypatch):
    import fbgemm_gpu

    monkeypatch.setattr(fbgemm_gpu, "__variant__", "cpu")
    assert "CUDA build" in cache_fbgemm.missing()
    monkeypatch.setattr(fbgemm_gpu, "__variant__", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cache_fbgemm.missing() == "no NVIDIA GPU here"
    monkeypatch.setitem(__import__("sys").modules, "fbgemm_gpu", None)
    assert "does not import" in cache_fbgemm.missing()


def test_the_benchmark_records_why_it_did_not_compare(monkeypatch, capsys):
    monkeypatch.setattr(cache_fbgemm, "missing", lambda: "no such thing")
    record = measure.Record.here("hot_cache", command="a test")
    cache_bench.against_fbgemm(record, TABLE)
    assert record.data["fbgemm"] == {"not measured": "no such thing"}
    assert "no such thing" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("location", "algorithm"), [("DEVICE", "LRU"), ("MANAGED", "LRU"), ("MANAGED_CACHING", "LRU"), ("MANAGED_CACHING", "LFU")]
)
def test_rows_on_a_gpu_are_the_table_s_while_they_come_and_go(location, algorithm, training):
    if reason := cache_fbgemm.missing():
        pytest.skip(reason)
    store = UvmTable(TABLE, location, 1024, algorithm, training=training)
    draws = torch.Generator().manual_seed(2)
    for _ in range(20):
        ids = torch.randint(0, len(TABLE), (512,), generator=draws)
        assert torch.equal(store.rows(ids.cuda()).cpu(), TABLE[ids])
    assert store.caches == (location == "MANAGED_CACHING")
    if store.caches:
        everything = torch.arange(len(TABLE), device="cuda")
        assert 512 < int(store.cached(everything).sum()) <= 1024
        few = everything[:16]
        store.forget()
        assert not store.cached(everything).any()
        store.rows(few)
        assert store.cached(few).all()
        assert int(store.cached(everything).sum()) == 16
