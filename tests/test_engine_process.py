"""The supervisor tells why there is no engine, notices one that hangs, and leaves no process behind."""

import asyncio
import os
import signal
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from hstu_lab.config import preset
from hstu_lab.engine_process import EngineBroken, EngineProcess, EngineRefused, EngineUnavailable, _cache_lines, _score_lines
from hstu_lab.hot_cache import CacheStats
from hstu_lab.model import HSTU, save_checkpoint

BODY = {"user": "u1", "task": "topk", "items": ["i1", "i2"], "actions": [1, 2], "timestamps": [10, 20]}


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_an_engine_that_cannot_start_says_why_and_is_not_tried_again(tmp_path, monkeypatch):
    killed, told = [], []
    monkeypatch.setattr(asyncio.subprocess.Process, "kill", lambda process: killed.append(process.pid))

    async def run():
        async with EngineProcess({"strategy": "eager", "checkpoint": str(tmp_path)}) as engine:
            engine.on_broken = lambda: told.append(engine.broken)
            with pytest.raises(EngineUnavailable, match="is starting"):
                await engine.ask("recommend", **BODY)
            await asyncio.wait_for(engine._task, 100)
            assert engine.restarts == 0
            assert not killed, "a signal to one that has ended takes its exit status away from asyncio"
            with pytest.raises(EngineBroken, match="CheckpointError"):
                await engine.ask("recommend", **BODY)
            return engine.last_failure

    failure = asyncio.run(run())
    assert failure.startswith("CheckpointError")
    assert str(tmp_path) in failure
    assert told == [failure]


def test_one_that_has_been_up_or_ends_by_a_defect_is_tried_again():
    engine = EngineProcess({})
    engine._receive({"failed": "MemoryError: ", "ours": False})
    assert not engine.broken, "memory may be free a moment later"
    engine._receive({"ready": {}})
    engine._receive({"failed": "CheckpointError: gone", "ours": True})
    assert not engine.broken, "it is being replaced, perhaps"


def test_a_model_without_user_rows_is_served(tmp_path, tiny_world):
    save_checkpoint(HSTU(preset("tiny").replace(num_users=0)), tmp_path)
    tiny_world.catalog.save(tmp_path / "catalog.json")

    async def run():
        async with EngineProcess({"strategy": "eager", "checkpoint": str(tmp_path)}) as engine:
            while engine.ready is None and not engine.broken:
                await asyncio.sleep(0.05)
            return await engine.ask("recommend", **BODY)

    assert len(asyncio.run(run())["items"]) == 10


def test_one_that_hangs_is_killed_and_one_that_answers_is_closed(tiny_checkpoint):
    async def run():
        settings = {"strategy": "eager", "checkpoint": str(tiny_checkpoint)}
        async with EngineProcess(settings, hang_seconds=3) as engine:
            while engine.ready is None:
                await asyncio.sleep(0.05)
            first = engine.pid
            assert len((await engine.ask("recommend", **BODY))["items"]) == 10
            with pytest.raises(EngineRefused, match="action 99 is unknown"):
                await engine.ask("recommend", **BODY | {"actions": [1, 99]})
            os.kill(first, signal.SIGSTOP)
            waiting = asyncio.create_task(engine.ask("recommend", **BODY))
            started = time.monotonic()
            with pytest.raises(EngineUnavailable, match="no sign of life for 3 s"):
                await waiting
            assert time.monotonic() - started < 30
            assert engine.pending == 0
            assert gone(first)
            while engine.pid is None:
                await asyncio.sleep(0.05)
            return first, engine.pid

    first, second = asyncio.run(run())
    assert first != second
    assert gone(second)


def test_hot_caches_are_told_as_prometheus_counters():
    stats = CacheStats(lookups=40, prefetched=0, misses=10, inserted=9, resident=8, capacity=8, bytes_moved=1280, gpu_bytes=2000)
    assert _cache_lines({}) == []
    lines = _cache_lines({"user": stats, "store": stats})
    families = {f.name: f for f in text_string_to_metric_families("\n".join(lines) + "\n")}
    told = {name: {s.labels["table"]: s.value for s in family.samples} for name, family in families.items()}
    assert told == {
        "hstu_hot_cache_lookups": {"user": 40, "store": 40}, "hstu_hot_cache_misses": {"user": 10, "store": 10},
        "hstu_hot_cache_bytes_moved": {"user": 1280, "store": 1280}, "hstu_hot_cache_resident": {"user": 8, "store": 8},
    }  # fmt: skip
    assert families["hstu_hot_cache_resident"].type == "gauge"


def test_scores_beside_vllm_are_told_as_prometheus_counters():
    assert _score_lines({}) == []
    lines = _score_lines({"requests": 3, "candidates": 300})
    families = list(text_string_to_metric_families("\n".join(lines) + "\n"))
    assert {f.name: [s.value for s in f.samples] for f in families} == {
        "hstu_cached_score_requests": [3], "hstu_cached_score_candidates": [300],
    }  # fmt: skip
    assert {f.type for f in families} == {"counter"}
