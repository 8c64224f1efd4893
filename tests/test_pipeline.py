"""The project's main promise: for one task, every strategy gives one list. Real vLLM, real ONNX Runtime, 200 users."""

import asyncio
import json
import re
import shutil
import threading
import time

import numpy as np
import pytest
import torch

from hstu_lab import pipeline, strategies, tensorrt_library
from hstu_lab.config import TASK_NAMES, preset
from hstu_lab.event_log import Catalog, History
from hstu_lab.events import World
from hstu_lab.model import HSTU, CheckpointError, load_checkpoint, save_checkpoint
from hstu_lab.pipeline import Recommender, RequestError
from hstu_lab.settings import Settings
from hstu_lab.strategies import STAGES, Batch, Eager, StrategyUnavailable, best_items
from hstu_lab.telemetry import StageTimer
from hstu_lab.vllm_engine import Engine, EngineError, EngineOptions

STRATEGIES = ("eager", "onnx", "vllm", "unified")
NUM_USERS = 200


@pytest.fixture(scope="module")
def histories(tiny_world):
    """Of every length from 0 (the user is all there is) to beyond what the model takes."""
    return [tiny_world.history(i)[: i if i < 100 else None] for i in range(NUM_USERS)]


@pytest.fixture(scope="module")
def recommender(tiny_checkpoint):
    with Recommender(tiny_checkpoint, settings=Settings(max_num_batched_tokens=512)) as recommender:
        yield recommender


@pytest.mark.timeout(300)
@pytest.mark.parametrize("task", TASK_NAMES)
def test_every_strategy_gives_the_same_list(recommender, histories, task):
    answers = {s: recommender.recommend_batch(histories, task=task, strategy=s) for s in STRATEGIES}
    for i, truth in enumerate(answers["eager"]):
        assert len(truth.items) == 10
        rows = [item.row for item in truth.items]
        assert len(set(rows)) == 10
        assert not set(rows) & set(histories[i].items.tolist())
        for strategy in STRATEGIES[1:]:
            answer = answers[strategy][i]
            assert answer.candidates == truth.candidates, (strategy, i)
            assert [item.row for item in answer.items] == rows, (strategy, i)
            for ours, theirs in zip(answer.items, truth.items):
                assert ours.score == pytest.approx(theirs.score, abs=1e-4)


def test_the_two_tasks_are_different_jobs(recommender, histories):
    topk, slate = (recommender.recommend_batch(histories[:20], task=task, strategy="eager") for task in TASK_NAMES)
    assert any({i.row for i in a.items} != {i.row for i in b.items} for a, b in zip(topk, slate))
    assert all(len(answer.candidates) == recommender.config.num_candidates for answer in topk)


def test_trained_weights_agree_too():
    """The shipped checkpoint: sharp logits instead of random ones."""
    config = load_checkpoint(pipeline.SHIPPED_CHECKPOINT).config
    log = World(config, seed=0).generate(NUM_USERS, seed=0)
    histories = [log.history(i) for i in range(NUM_USERS)]
    with Recommender() as recommender:
        for task in TASK_NAMES:
            lists = {}
            for strategy in STRATEGIES:
                answers = recommender.recommend_batch(histories, task=task, strategy=strategy)
                lists[strategy] = [{item.row: item.score for item in answer.items} for answer in answers]
            for strategy in STRATEGIES[1:]:
                for ours, truth in zip(lists[strategy], lists["eager"], strict=True):
                    assert _same_list(ours, truth), (task, strategy)


def _same_list(ours, truth, tie=2e-6):
    """{row: score}, best first: the same rows in the same order, but rows whose scores float32 cannot tell apart may swap."""
    places = zip(ours.values(), truth.values(), strict=True)
    same_scores = all(ours[row] == pytest.approx(truth[row], abs=tie) for row in ours.keys() & truth.keys())
    return same_scores and (list(ours) == list(truth) or all(abs(a - b) <= tie for a, b in places))


def test_only_ties_may_swap():
    truth = {7: 0.9, 4: 0.5, 2: 0.5 - 2e-7, 1: 0.1}
    assert _same_list({7: 0.9, 2: 0.5, 4: 0.5, 1: 0.1}, truth)
    assert not _same_list({4: 0.9, 7: 0.5, 2: 0.5, 1: 0.1}, truth)
    assert not _same_list({7: 0.9, 4: 0.5, 1: 0.5, 2: 0.1}, truth)
    assert not _same_list({7: 0.9, 4: 0.5, 2: 0.4, 1: 0.1}, truth | {2: 0.5, 4: 0.4})


def _reference(tiny_checkpoint, histories, task):
    recommender = Recommender(tiny_checkpoint)
    batch, _ = recommender.prepare(histories)
    count = 100 if task == "topk" else 10
    return batch, Eager(recommender.model).candidates(batch, task, count, StageTimer())


@pytest.mark.timeout(300)
@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "whole"])
@pytest.mark.parametrize("caching", [True, False], ids=["cached", "uncached"])
def test_prefix_caching_and_chunked_prefill_change_nothing(tiny_checkpoint, histories, caching, chunked):
    options = EngineOptions(
        enable_prefix_caching=caching, enable_chunked_prefill=chunked, max_num_batched_tokens=128, max_num_seqs=16,
        kv_cache_memory_bytes=2 << 20,
    )  # fmt: skip
    some = histories[40:120]
    with Engine(tiny_checkpoint, options) as engine:
        for task, call in (("topk", engine.topk), ("slate", engine.slate)):
            batch, truth = _reference(tiny_checkpoint, some, task)
            count = 100 if task == "topk" else 10
            first = call(batch.histories, batch.seen, count)
            again = call(batch.histories, batch.seen, count)
            assert [g.items for g in first] == truth
            assert [g.items for g in again] == truth
            hits = sum(g.cached_tokens for g in again)
            assert (hits > 0) == caching


@pytest.mark.timeout(120)
def test_a_wrong_block_table_is_noticed(tiny_checkpoint, histories, monkeypatch):
    """The comparison above must fail when requests read each other's blocks; else it proves nothing."""
    from hstu_lab.vllm_plugin.attention import HSTUMetadataBuilder

    build = HSTUMetadataBuilder.build

    def crossed(self, *args, **kwargs):
        metadata = build(self, *args, **kwargs)
        metadata.block_table = metadata.block_table.roll(1, dims=0)  # the same object: slates read it as well
        return metadata

    batch, truth = _reference(tiny_checkpoint, histories[60:76], "slate")
    with Engine(tiny_checkpoint, EngineOptions(kv_cache_memory_bytes=2 << 20)) as engine:
        assert [g.items for g in engine.slate(batch.histories, batch.seen, 10)] == truth
        monkeypatch.setattr(HSTUMetadataBuilder, "build", crossed)
        engine.reset_prefix_cache()
        wrong = [g.items for g in engine.slate(batch.histories, batch.seen, 10)]
    assert sum(a != b for a, b in zip(wrong, truth)) > len(truth) // 2


@pytest.mark.timeout(120)
@pytest.mark.parametrize("strategy", ["eager", "unified"])
def test_async_requests_in_flight_together_get_their_own_answers(recommender, histories, strategy):
    some = histories[50:70]

    async def together():
        return await asyncio.gather(*(recommender.recommend_async(h, strategy=strategy) for h in some))

    alone = recommender.recommend_batch(some, strategy="eager")
    for answer, truth in zip(asyncio.run(together()), alone):
        assert answer.user == truth.user
        assert [i.row for i in answer.items] == [i.row for i in truth.items]


async def _at_once(recommender, histories, **how):
    return await asyncio.gather(*(recommender.recommend_async(h, **how) for h in histories), return_exceptions=True)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("task", TASK_NAMES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_answers_of_shared_batches_are_those_of_requests_alone(recommender, histories, strategy, task):
    """The same items in the same order; scores within float32's error, for a padded batch adds up in another order."""
    some, before = histories[3:120:8], recommender.batch_sizes()
    alone = [recommender.recommend(history, strategy=strategy, task=task) for history in some]
    for answer, truth in zip(asyncio.run(_at_once(recommender, some, strategy=strategy, task=task)), alone, strict=True):
        assert answer.candidates == truth.candidates
        assert [i.row for i in answer.items] == [i.row for i in truth.items]
        assert [i.score for i in answer.items] == pytest.approx([i.score for i in truth.items], abs=2e-6)
        assert set(answer.stages) == {*STAGES, *([] if strategy == "vllm" else ["waiting"])}
    sizes = {name: counts for name, counts in recommender.batch_sizes().items() if name[1:] == (strategy, task)}
    assert {stage for stage, *_ in sizes} == {"vllm": set(), "unified": {"encoder", "ranking"}}.get(strategy, {"answer"})
    for name, counts in sizes.items():
        new = {size: count - before.get(name, {}).get(size, 0) for size, count in counts.items()}
        assert sum(size * count for size, count in new.items()) == len(some), name
        assert max(new) > 1, name
        assert recommender._batchers[name].most == recommender.settings.batch_size


def _gated(runner):
    """Makes `runner` stand still in its first batch until told, noting how many requests each of its batches had."""
    gate, begun, sizes, work = threading.Event(), threading.Event(), [], runner.candidates

    def candidates(batch, *rest):
        sizes.append(len(batch))
        begun.set()
        assert gate.wait(60)
        return work(batch, *rest)

    runner.candidates = candidates
    return gate, begun, sizes


def test_completions_in_flight_share_batches_whatever_their_counts(tiny_checkpoint):
    with Recommender(tiny_checkpoint, strategy="eager") as recommender:
        config, calls = recommender.config, []
        prompts = [[config.user_token_base + 1, 5 + i, 9] for i in range(6)]
        batches = [(Batch([p], [[t for t in p if t < config.num_items]]), 2 + i % 2) for i, p in enumerate(prompts)]
        runner = recommender.runner("eager")
        alone = [runner.candidates(batch, "slate", count, StageTimer())[0] for batch, count in batches]
        candidates = runner.candidates

        def counted(batch, *arguments):
            calls.append(len(batch))
            time.sleep(0.2)
            return candidates(batch, *arguments)

        runner.candidates = counted

        async def run():
            return await asyncio.gather(*(recommender.complete(batch, count, "eager") for batch, count in batches))

        assert asyncio.run(run()) == [(items, 0) for items in alone]
        assert sum(calls) == 6
        assert len(calls) < 5, "those that came while the first was in work share batches"


async def _first_then_others(recommender, begun, histories):
    """Tasks of the requests, of which the first is being worked on and the others wait."""
    tasks = [asyncio.create_task(recommender.recommend_async(histories[0]))]
    while not begun.is_set():
        await asyncio.sleep(0.01)
    tasks += [asyncio.create_task(recommender.recommend_async(history)) for history in histories[1:]]
    while len(recommender._batchers["answer", "eager", "topk"]._waiting) < len(histories) - 1:
        await asyncio.sleep(0.01)
    return tasks


def test_who_cancels_and_who_is_at_fault_disturbs_nobody(tiny_checkpoint, histories):
    some = histories[10:20]
    with Recommender(tiny_checkpoint, strategy="eager") as recommender:
        alone = [recommender.recommend(history) for history in some]
        runner = recommender.runner("eager")
        culprit = recommender.prepare(some[4:5])[0].histories[0]
        work = runner.rank

        def rank(batch, *rest):
            if culprit in batch.histories:
                raise ValueError("this one cannot be ranked")
            return work(batch, *rest)

        runner.rank = rank
        gate, begun, sizes = _gated(runner)

        async def run():
            tasks = await _first_then_others(recommender, begun, some)
            tasks[7].cancel()  # it waits
            tasks[0].cancel()  # it is being worked on
            await asyncio.sleep(0)
            gate.set()
            return await asyncio.gather(*tasks, return_exceptions=True)

        answers = asyncio.run(run())
        assert [i for i, a in enumerate(answers) if isinstance(a, asyncio.CancelledError)] == [0, 7]
        assert str(answers[4]) == "this one cannot be ranked"
        for i in (1, 2, 3, 5, 6, 8, 9):
            assert [item.row for item in answers[i].items] == [item.row for item in alone[i].items]
        assert sizes[:2] == [1, 8], "the one that came first, then all that waited but the one that had left"


def test_one_at_a_time_shares_with_nobody_and_waiting_is_told(tiny_checkpoint, histories):
    with Recommender(tiny_checkpoint, strategy="eager") as recommender:
        for history in histories[10:14]:
            [answer] = asyncio.run(_at_once(recommender, [history]))
            assert answer.batch_size == 1
        gate, begun, sizes = _gated(recommender.runner("eager"))

        async def run():
            tasks = await _first_then_others(recommender, begun, histories[10:14])
            await asyncio.sleep(0.3)
            gate.set()
            return await asyncio.gather(*tasks)

        first, *others = asyncio.run(run())
        assert sizes == [1, 3]
        assert [answer.batch_size for answer in (first, *others)] == [1, 3, 3, 3]
        assert all(answer.stages["waiting"] > 290 for answer in others), "they waited for the batch before theirs"
        assert all(answer.total_ms == pytest.approx(sum(answer.stages.values())) for answer in others)


def test_closing_answers_who_is_in_flight(tiny_checkpoint, histories):
    recommender = Recommender(tiny_checkpoint, strategy="eager")
    gate, begun, _ = _gated(recommender.runner("eager"))

    async def run():
        tasks = await _first_then_others(recommender, begun, histories[10:16])
        asyncio.get_running_loop().call_later(0.05, gate.set)
        await asyncio.to_thread(recommender.close)
        return await asyncio.gather(*tasks)

    assert [len(answer.items) for answer in asyncio.run(run())] == [10] * 6


@pytest.mark.parametrize("strategy", ["eager", "onnx"])
def test_a_batch_ranked_in_parts_has_the_scores_of_the_whole(recommender, histories, strategy, monkeypatch):
    batch, _ = recommender.prepare(histories[:60])
    runner, candidates = recommender.runner(strategy), torch.arange(1, 31).repeat(60, 1)
    whole = runner.rank(batch, candidates, StageTimer())
    monkeypatch.setattr(strategies, "SCORES", 30_000)
    parts = batch.parts(recommender.config.num_heads, 30)
    assert sorted(row for rows in parts for row in rows) == list(range(60))
    lengths = batch.lengths.tolist()
    for rows in parts:
        longest = max(lengths[row] for row in rows)
        assert len(rows) == 1 or len(rows) * recommender.config.num_heads * (longest + 30) ** 2 <= 30_000
    assert 5 < len(parts) < 60
    torch.testing.assert_close(runner.rank(batch, candidates, StageTimer()), whole, atol=2e-6, rtol=0)


@pytest.mark.parametrize("task", TASK_NAMES)
@pytest.mark.parametrize("strategy", ["eager", "onnx", "unified"])
def test_tables_behind_a_hot_cache_give_the_same_answers(recommender, tiny_checkpoint, histories, strategy, task):
    some = histories[1:60:4]
    truth = recommender.recommend_batch(some, strategy=strategy, task=task)
    with Recommender(tiny_checkpoint, settings=Settings(hot_cache_rows=3, hot_cache_policy="lfu")) as cached:
        answers = cached.recommend_batch(some, strategy=strategy, task=task)
        for _ in range(4):
            again = cached.recommend(some[0], strategy=strategy, task=task)
            assert [i.row for i in again.items] == [i.row for i in truth[0].items]
        stats = cached.hot_cache()
    assert [a.items for a in answers] == [a.items for a in truth]
    sizes = {name: rows for name, rows in recommender.config.tables if name != "item" and rows > 3}
    assert set(stats) == set(sizes), "the item table stays whole: logits read all of it"
    for table, seen in stats.items():
        assert seen.resident <= seen.capacity == 3 < sizes[table]
        assert seen.misses > 0, table
    assert stats["user"].misses < stats["user"].lookups, "who comes again is found"
    assert recommender.hot_cache() == {}


def test_joined_batches_come_apart_again():
    parts = [Batch([[5, 6], [7]], [[5], []]), Batch([[8]], [[8]])]
    joined = Batch.join(parts)
    assert (joined.histories, joined.seen, joined.encoded) == ([[5, 6], [7], [8]], [[5], [], [8]], None)
    joined.encoded = torch.arange(4.0).unsqueeze(1)
    taken = joined.take([2, 0])
    assert (taken.histories, taken.seen) == ([[8], [5, 6]], [[8], [5]])
    assert taken.encoded.flatten().tolist() == [3, 0, 1]
    assert Batch.join([taken, taken]).encoded.flatten().tolist() == [3, 0, 1, 3, 0, 1]


def test_an_answer_says_what_it_is(recommender, histories):
    answer = recommender.recommend(histories[30], strategy="onnx")
    assert set(answer.stages) == set(STAGES)
    assert answer.stages["stack"] > 0
    assert answer.engines["stack"].startswith("ONNX Runtime")
    assert answer.items[0].title in str(answer)
    assert json.loads(json.dumps(answer.to_dict()))["items"][0]["item_id"] == answer.items[0].item_id
    scores = [item.score for item in answer.items]
    assert scores == sorted(scores, reverse=True)


def test_the_final_order_is_the_weighted_sum(recommender, histories):
    answer = recommender.recommend(histories[30], strategy="eager")
    for item in answer.items:
        parts = (item.engagement, item.retention, item.monetization)
        assert item.score == pytest.approx(np.dot(parts, recommender.config.task_weights))


def test_ties_go_to_the_lower_item():
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0]])
    assert best_items(logits, [[]], 4) == [[1, 3, 2, 4]]
    assert best_items(logits, [[1, 2]], 4) == [[3, 4, 0]]


def test_auto_says_why_and_learns(tiny_checkpoint, histories):
    recommender = Recommender(tiny_checkpoint)
    answer = recommender.recommend(histories[30])
    assert answer.strategy in recommender.available()
    assert answer.reason
    for strategy in ("eager", "onnx"):
        for _ in range(3):
            recommender.recommend(histories[30], strategy=strategy)
    chosen, why = recommender.choose("topk", 1)
    assert chosen in ("eager", "onnx")
    assert "measured here" in why


def test_a_missing_engine_is_named(recommender, histories, monkeypatch):
    with pytest.raises(StrategyUnavailable, match=r"tensorrt.*GPU"):
        recommender.recommend(histories[30], strategy="tensorrt")
    find = strategies.importlib.util.find_spec
    monkeypatch.setattr(strategies.importlib.util, "find_spec", lambda name: None if name == "vllm" else find(name))
    fresh = Recommender(recommender.checkpoint)
    with pytest.raises(StrategyUnavailable, match="vllm, which is not installed; pip install"):
        fresh.recommend(histories[30], strategy="vllm")
    assert fresh.choose("slate", 8)[0] == "onnx"


def _history(**changes):
    fields = {
        "user": "u1", "items": np.array([1, 2]), "actions": np.array([2, 2]), "timestamps": np.array([10, 20]),
        "dwell": np.array([1.0, 1.0]), "sessions": np.array([0, 0]),
    }  # fmt: skip
    return History(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"items": np.array([1])}, "1 items, 2 actions"),
        ({"timestamps": np.array([10.0, np.nan])}, "timestamps"),
        ({"timestamps": np.array([-1, 5])}, "timestamps"),
        ({"actions": np.array([2, 99])}, "action 99"),
        ({"actions": np.array([-3, 2])}, "action -3"),
    ],
)
def test_bad_histories_are_refused_by_field(recommender, changes, message):
    with pytest.raises(RequestError, match=message):
        recommender.recommend(_history(**changes), strategy="eager")


def test_repairs_are_counted(recommender, tiny_world):
    one = recommender.recommend(_history(items=np.array([1, 10**6])), strategy="eager")
    assert one.repairs["unknown items dropped"] == 1
    disordered = recommender.recommend(_history(timestamps=np.array([20, 10])), strategy="eager")
    assert disordered.repairs["unsorted events sorted"] == 1
    stranger = recommender.recommend(_history(user="nobody"), strategy="eager")
    assert stranger.repairs["unknown user"] == 1
    empty = recommender.recommend(tiny_world.history(0)[:0], strategy="eager")
    assert empty.repairs["empty history"] == 1
    assert len(empty.items) == 10


def test_a_history_of_100_000_events_is_cut_and_counted(recommender, tiny_world):
    many = 100_000
    rng = np.random.default_rng(0)
    history = _history(
        items=rng.integers(1, 201, many), actions=np.full(many, 2), timestamps=np.arange(many) * 60,
        dwell=np.zeros(many), sessions=np.zeros(many, dtype=int),
    )  # fmt: skip
    lists = [recommender.recommend(history, strategy=s) for s in STRATEGIES]
    kept = many - lists[0].repairs["oldest events left out"]
    assert recommender.config.max_history - recommender.config.slide < kept <= recommender.config.max_history
    assert all([i.row for i in a.items] == [i.row for i in lists[0].items] for a in lists)
    assert not {i.row for i in lists[0].items} & set(history.items.tolist())


def test_fewer_items_than_asked_for(recommender, tiny_world):
    """A user who has seen all but three items gets three, from every strategy."""
    config = recommender.config
    items = np.arange(1, config.num_items - 3)
    n = len(items)
    history = _history(
        items=items, actions=np.full(n, 2), timestamps=np.arange(n) * 60, dwell=np.zeros(n), sessions=np.zeros(n, dtype=int)
    )
    left = set(range(config.num_items - 3, config.num_items))
    for task in TASK_NAMES:
        for strategy in STRATEGIES:
            assert {i.row for i in recommender.recommend(history, task=task, strategy=strategy).items} == left, (task, strategy)


def test_a_catalog_smaller_than_the_candidates_asked_for(tmp_path, tiny_world):
    """Five items, two of them seen, all five seen: every strategy gives what is left, and nothing dies of what is not."""
    config = preset("tiny").replace(num_items=6, side_features=())
    torch.manual_seed(0)
    save_checkpoint(HSTU(config), tmp_path)
    Catalog("five", [None, *"abcde"], [None] * 6).save(tmp_path / "catalog.json")
    (tmp_path / "users.json").write_text(json.dumps(["u1"]))
    whole = History("u1", np.arange(1, 6), np.full(5, 2), np.arange(5) * 60, np.zeros(5), np.zeros(5, dtype=int))
    with Recommender(tmp_path, settings=Settings(kv_cache_mb=4)) as recommender:
        for task in TASK_NAMES:
            for history, left in ((whole[:2], 3), (whole, 0)):
                answers = [recommender.recommend(history, task=task, strategy=strategy) for strategy in STRATEGIES]
                lists = [[item.item_id for item in answer.items] for answer in answers]
                assert lists == [lists[0]] * len(STRATEGIES), (task, left, lists)
                assert len(lists[0]) == left
                assert ("nothing is left" in str(answers[0])) == (not left)
                waiting = asyncio.run(recommender.recommend_async(history, task=task, strategy="vllm"))
                assert [item.item_id for item in waiting.items] == lists[0]


def test_an_empty_history_without_a_user_token_is_refused(tmp_path, tiny_world):
    config = preset("ml-1m").replace(num_items=preset("tiny").num_items)
    save_checkpoint(HSTU(config), tmp_path)
    tiny_world.catalog.save(tmp_path / "catalog.json")
    with pytest.raises(RequestError, match="history is empty"):
        Recommender(tmp_path).recommend(tiny_world.history(0)[:0], strategy="eager")


def test_checkpoint_parts_must_fit(tiny_checkpoint, tmp_path, tiny_world):
    save_checkpoint(load_checkpoint(tiny_checkpoint), tmp_path)
    tiny_world.catalog.save(tmp_path / "catalog.json")
    with pytest.raises(CheckpointError, match=r"users\.json: no such file"):
        Recommender(tmp_path)
    (tmp_path / "users.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"users\.json: not JSON"):
        Recommender(tmp_path)
    (tmp_path / "users.json").write_text(json.dumps([f"u{i}" for i in range(301)]))
    with pytest.raises(CheckpointError, match="at most 300"):
        Recommender(tmp_path)


def test_engines_do_not_start_on_a_checkpoint_that_has_changed(tiny_checkpoint, tmp_path, histories):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    recommender = Recommender(folder)
    recommender.recommend(histories[30], strategy="eager")
    save_checkpoint(HSTU(recommender.config), folder)
    with pytest.raises(CheckpointError, match="has changed since it was loaded"):
        recommender.recommend(histories[30], strategy="vllm")


@pytest.mark.parametrize(
    ("target", "installed", "said"),
    [
        (None, {"tensorrt_rtx"}, "needs an NVIDIA GPU"),
        ("sm_90", {"tensorrt_rtx"}, r"needs the full TensorRT on this GPU \(sm_90\), pip install tensorrt"),
        ("sm_90", set(), "tensorrt or tensorrt_rtx is not installed"),
        ("sm_80", {"tensorrt_rtx"}, None),
    ],
)
def test_what_keeps_engines_from_running_is_said(monkeypatch, target, installed, said):
    load = tensorrt_library._load
    monkeypatch.setattr(tensorrt_library, "gpu_target", lambda: target)
    monkeypatch.setattr(tensorrt_library, "_load", lambda name: load(name) if name in installed else None)
    why = strategies.missing("tensorrt")
    if said is None:
        assert why is None
    else:
        assert re.search(said, why)
        assert "use onnx or unified" in why


def test_onnx_runtime_in_tensorrts_place_is_named(recommender, histories):
    if tensorrt_library.gpu_target() is not None:
        pytest.skip("there is a GPU here")
    engines = recommender.recommend(histories[30], strategy="unified").engines
    assert engines["encoder"] == engines["ranking"]
    assert re.fullmatch(r"ONNX Runtime [\d.]+ CPU, for TensorRT \(no GPU\)", engines["encoder"])
    assert "TensorRT" not in recommender.recommend(histories[30], strategy="onnx").engines["encoder"]


def test_lower_precision_is_said_and_scores_stay_close():
    log = World(load_checkpoint(pipeline.SHIPPED_CHECKPOINT).config, seed=0).generate(20, seed=1)
    histories = [log.history(i) for i in range(20)]
    with Recommender() as exact, Recommender(settings=Settings(precision="fp16")) as half:
        truth, ours = (r.recommend_batch(histories, strategy="onnx") for r in (exact, half))
    assert ours[0].engines["stack"].endswith(" CPU, fp16")
    kept = [len(set(a.candidates) & set(b.candidates)) / len(a.candidates) for a, b in zip(truth, ours)]
    assert np.mean(kept) > 0.97
    scores = [{item.row: item.score for item in answer.items} for answer in (truth[0], ours[0])]
    for row in scores[0].keys() & scores[1].keys():
        assert scores[1][row] == pytest.approx(scores[0][row], abs=5e-3)


@pytest.mark.gpu
def test_tensorrt_gives_the_same_list(recommender, histories):
    if why := strategies.missing("tensorrt"):
        pytest.skip(why)
    for task in TASK_NAMES:
        truth, ours = (recommender.recommend_batch(histories[:40], task=task, strategy=s) for s in ("eager", "tensorrt"))
        assert [a.candidates for a in ours] == [a.candidates for a in truth]


def test_a_closed_engine_says_so(tiny_checkpoint):
    engine = Engine(tiny_checkpoint, EngineOptions(kv_cache_memory_bytes=2 << 20))
    engine.close()
    with pytest.raises(EngineError, match="not running"):
        engine.topk([[1]], [[]], 3)


def test_a_prompt_beyond_the_model_is_refused(tiny_checkpoint):
    with (
        Engine(tiny_checkpoint, EngineOptions(kv_cache_memory_bytes=2 << 20)) as engine,
        pytest.raises(EngineError, match="refused"),
    ):
        engine.topk([[1] * 500], [[]], 3)


def test_batch_helper_appends_generated_items():
    batch = Batch([[5, 6], [7]], [[5], []]).with_items([[1], [2]])
    assert batch.tokens.tolist() == [5, 6, 1, 7, 2]
    assert batch.offsets.tolist() == [0, 3, 5]
    assert batch.seen == [[5, 1], [2]]


@pytest.mark.timeout(120)
def test_engines_in_one_process_do_not_disturb_each_other(tiny_checkpoint, histories):
    options = EngineOptions(kv_cache_memory_bytes=2 << 20)
    batch, truth = _reference(tiny_checkpoint, histories[60:68], "slate")
    with Engine(tiny_checkpoint, options) as stays:
        with Engine(tiny_checkpoint, options) as goes:
            waiting = [stays.submit_slate(p, s, 10) for p, s in zip(batch.histories, batch.seen)]
            assert [g.items for g in goes.slate(batch.histories, batch.seen, 10)] == truth
            assert [future.result().items for future in waiting] == truth
        assert [g.items for g in stays.slate(batch.histories, batch.seen, 10)] == truth
