"""The load driver against the real engine: what is in flight, what is cached, what a latency counts from."""

import itertools
import threading
import time

import pytest
import torch

from hstu_lab.config import preset
from hstu_lab.tokens import level_seconds, unpack
from hstu_lab.vllm_engine import Engine, EngineOptions
from hstu_lab.vllm_load import Cell, Users, closed_loop, fill, open_loop, random_histories, serving_config, submit


@pytest.fixture(scope="module")
def engine(tiny_checkpoint):
    with Engine(tiny_checkpoint, EngineOptions(kv_cache_memory_bytes=16 << 20)) as engine:
        yield engine


def test_cold_prompts_share_no_block_and_warm_ones_their_first_part():
    config = preset("tiny")
    cold = [next(users) for users in [Users(config, Cell("topk", 40, 0.0), 4)] for _ in range(50)]
    assert {len(prompt) for prompt in cold} == {40}
    assert len({prompt[0] for prompt in cold}) == 50
    users = Users(config, Cell("topk", 40, 0.9), 4)
    warm = list(itertools.islice(iter(lambda: next(users), None), 50))
    assert all(prompt[:36] == warm[i % 4][:36] for i, prompt in enumerate(warm))
    assert len({prompt[36] for prompt in warm}) == 50
    assert max(token for prompt in cold + warm for token in prompt) < config.user_token_base


def count_in_flight(monkeypatch, before=lambda: None):
    """Have `submit` call `before` and count: ([requests in flight now], [the most that there were])."""
    now, most = [0], [0]

    def counting(engine, cell, prompt):
        before()
        now[0] += 1
        most[0] = max(most[0], now[0])
        future = submit(engine, cell, prompt)
        future.add_done_callback(lambda _: now.__setitem__(0, now[0] - 1))
        return future

    monkeypatch.setattr("hstu_lab.vllm_load.submit", counting)
    return now, most


@pytest.mark.parametrize("warm", [0.0, 0.9])
def test_a_closed_loop_keeps_its_number_in_flight(engine, monkeypatch, warm):
    cell = Cell("slate", 40, warm)
    users = Users(engine.config, cell, 8)
    fill(engine, cell, users)
    now, most = count_in_flight(monkeypatch)
    outcome = closed_loop(engine, cell, users, in_flight=6, seconds=1)
    assert most[0] == 6
    assert now[0] == 0
    assert outcome.latencies
    assert outcome.cached == pytest.approx(32 / 40 if warm else 0, abs=0.01)


def test_a_caller_that_stands_still_fills_the_loop_all_the_same(engine, monkeypatch):
    """On a busy machine the first requests come back many times before the last is sent: only then does the clock start."""
    cell, sent, me = Cell("slate", 40, 0.0), [0], threading.current_thread()

    def stand_still():
        if threading.current_thread() is me:
            sent[0] += 1
            time.sleep(0.5 * (sent[0] == 4))

    _, most = count_in_flight(monkeypatch, stand_still)
    closed_loop(engine, cell, Users(engine.config, cell, 1), in_flight=6, seconds=0.2)
    assert most[0] == 6


def test_a_first_wave_that_does_not_come_is_told(engine, monkeypatch):
    monkeypatch.setattr("hstu_lab.vllm_load.FIRST_WAVE_SECONDS", 0.1)
    with engine.held(), pytest.raises(RuntimeError, match="topk history=40 cold: 0 of the first 3 answers"):
        closed_loop(engine, Cell("topk", 40, 0.0), Users(engine.config, Cell("topk", 40, 0.0), 1), 3, 0.1)


def test_an_open_loop_waits_for_nobody(engine):
    """Latencies count from the planned arrival, so an engine that stands still for a while shows in them."""
    cell = Cell("topk", 40, 0.0)
    outcome = open_loop(engine, cell, Users(engine.config, cell, 1), rate=40, seconds=0.5)
    assert 5 <= len(outcome.latencies) <= 50
    assert min(outcome.latencies) > 0


def test_drawn_histories_are_short_enough_for_the_kernels():
    """At the longest, each gap the largest of those drawn."""
    config = serving_config()
    [history] = random_histories(config, 1, config.max_seq_len, 0)
    levels = unpack(torch.tensor(history), config)[2]
    seconds = level_seconds(config.num_time_levels)
    assert config.max_seq_len * seconds[int(levels.max())] < 2**31
    assert seconds[int(levels.max())] > 86400, "gaps of days are drawn"
