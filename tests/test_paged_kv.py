"""The small engine gives the dense model's answers whatever the pool, and its blocks are never lost, leaked or mixed up."""

import collections
import random

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from hstu_lab.paged_kv import BlockManager, PagedEngine, Request, Scheduler
from hstu_lab.tokens import pack, user_token

SIZE = 4


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


# ---- the oracle


def dense_logits(model, tokens):
    offsets = torch.tensor([0, len(tokens)])
    return model.logits(model.dense(torch.tensor(tokens), offsets)[0, -1])


def best(logits, excluded, count):
    logits = logits.clone()
    logits[list(excluded)] = -torch.inf
    scores, items = logits.sort(descending=True, stable=True)
    return items[scores.isfinite()][:count].tolist()


def oracle(model, job):
    """What one dense pass a step says: items of a topk or slate, scores of candidates."""
    tokens = list(job["tokens"])
    if job["task"] == "score":
        return model.rank(torch.tensor(tokens), torch.tensor([0, len(tokens)]), torch.tensor([job["candidates"]]))[0]
    if job["task"] == "topk":
        return best(dense_logits(model, tokens), job["excluded"], job["count"])
    items, excluded = [], set(job["excluded"])
    while len(items) < job["count"]:
        [item] = best(dense_logits(model, [*tokens, *items]), excluded, 1)
        items.append(item)
        excluded.add(item)
    return items


def assert_answers(model, jobs, requests):
    for job, request in zip(jobs, requests, strict=True):
        assert request.done
        if job["task"] == "score":
            torch.testing.assert_close(torch.tensor(request.scores), oracle(model, job), atol=1e-5, rtol=0)
        else:
            assert request.items == oracle(model, job)


def make_history(config, choose, length):
    events = [
        pack(choose.randrange(1, config.num_items), choose.randrange(config.num_actions), choose.randrange(200), config)
        for _ in range(length)
    ]
    return [user_token(choose.randrange(config.num_users), config), *events]


def make_jobs(config, choose, number):
    """Random requests; half of the users come back with a history that a former one begins."""
    jobs = []
    for _ in range(number):
        history = make_history(config, choose, choose.choice([0, 1, 3, 7, 8, 15, 16, 31, 45]))
        if jobs and choose.random() < 0.5:
            history = [*choose.choice(jobs)["tokens"][:45], *history[1 : choose.randrange(1, 8)]]
        job = {"tokens": history, "task": choose.choice(["topk", "slate", "score"])}
        job |= {"count": choose.randrange(1, 8), "excluded": choose.sample(range(1, config.num_items), choose.randrange(30))}
        if job["task"] == "score":
            job["candidates"] = choose.sample(range(1, config.num_items), choose.choice([1, 5, 40]))
        jobs.append(job)
    return jobs


def assert_empty(engine):
    manager = engine.manager
    assert not any(manager.references)
    assert sorted(manager.free) == list(range(manager.num_blocks))


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_answers_are_the_dense_models_for_random_arrivals_pools_and_steps(tiny_model, seed, prefix_caching, chunked):
    choose = random.Random(f"{seed} {prefix_caching} {chunked}")
    size = choose.choice([1, 4, 16])
    engine = PagedEngine(
        tiny_model, -(-64 // size) + choose.choice([0, 1, 40]), size, max_tokens=choose.choice([3, 17, 64]) if chunked else 64,
        max_running=choose.choice([1, 3, 9]), micro_batch=choose.choice([1, 7, 64]), prefix_caching=prefix_caching,
        chunked=chunked,
    )  # fmt: skip
    jobs = make_jobs(tiny_model.config, choose, 14)
    requests = []
    for job in jobs:
        requests.append(engine.add(**job))
        for _ in range(choose.randrange(4)):
            engine.step()
    engine.run()
    assert_answers(tiny_model, jobs, requests)
    assert_empty(engine)
    if not prefix_caching:
        assert not engine.manager.cached
        assert all(request.cached_tokens == 0 for request in requests)


@pytest.mark.parametrize("max_tokens", [256, 6])
def test_a_tiny_pool_preempts_returns_the_blocks_and_changes_no_answer(tiny_model, max_tokens):
    choose = random.Random(7)
    jobs = [
        {"tokens": make_history(tiny_model.config, choose, 14), "task": "slate", "count": 8, "excluded": []} for _ in range(5)
    ]
    engine = PagedEngine(tiny_model, 13, SIZE, prefix_caching=False, max_tokens=max_tokens)
    requests, times = [engine.add(**job) for job in jobs], collections.Counter()
    while not all(request.done for request in requests):
        work, preempted = engine.step()
        assert len({id(request) for request, _ in work}) == len(work)
        assert not {id(request) for request in preempted} & {id(request) for request, _ in work}
        for request in preempted:
            times[request.id] += 1
            assert (request.blocks, request.computed) == ([], 0)
        assert sorted(r.id for r in engine.scheduler.waiting) == [r.id for r in engine.scheduler.waiting], "who came first"
    assert times
    assert requests[0].id not in times, "the oldest request is never preempted"
    assert_answers(tiny_model, jobs, requests)
    assert_empty(engine)


def test_a_preempted_request_finds_its_tokens_in_the_prefix_cache(tiny_model):
    engine = PagedEngine(tiny_model, 9, SIZE)
    choose = random.Random(1)
    first, second = (engine.add(make_history(tiny_model.config, choose, 14), "slate", 6) for _ in range(2))
    read, preempted = collections.Counter(), []
    while not second.done:
        work, victims = engine.step()
        preempted += victims
        read.update({request.id: count for request, count in work})
    assert preempted == [second]
    assert read == {first.id: 15 + 5, second.id: 15 + 5}, "its four whole blocks were still there: nothing is computed twice"


def test_a_step_stays_within_its_budget_and_its_micro_batch(tiny_model):
    engine = PagedEngine(tiny_model, 64, 16, max_tokens=20, micro_batch=7, max_running=4)
    for job in make_jobs(tiny_model.config, random.Random(5), 12):
        engine.add(**job)
    while engine.scheduler.running or engine.scheduler.waiting:
        reading = {id(r): r.computed < len(r.tokens) for r in (*engine.scheduler.running, *engine.scheduler.waiting)}
        work, _ = engine.step()
        assert 0 < sum(count for _, count in work) <= 20
        assert len(work) <= 4
        assert all(count <= 7 for request, count in work if not reading[id(request)])


def test_without_chunks_a_prompt_is_read_in_one_step_and_with_them_nobody_waits_for_it(tiny_model):
    choose = random.Random(2)
    long, short = (make_history(tiny_model.config, choose, length) for length in (40, 3))

    def counts(chunked):
        engine = PagedEngine(tiny_model, 16, 16, max_tokens=42, chunked=chunked)
        requests = [engine.add(short, "slate", 4), engine.add(long), engine.add([3, *long[1:20]])]
        steps = []
        while not all(r.done for r in requests):
            steps.append({r.id: n for r, n in engine.step()[0]})
        return steps

    assert counts(chunked=True)[:2] == [{0: 4, 1: 38}, {0: 1, 1: 3, 2: 20}]
    assert counts(chunked=False)[:3] == [{0: 4}, {0: 1, 1: 41}, {0: 1, 2: 20}]


# ---- prefix reuse: the edge cases


@pytest.mark.parametrize("length", [SIZE - 1, SIZE, SIZE + 1, 2 * SIZE, 2 * SIZE + 1])
def test_a_prompt_that_is_cached_whole_still_computes_its_last_token(tiny_model, length):
    history = make_history(tiny_model.config, random.Random(3), length - 1)
    engine = PagedEngine(tiny_model, 16, SIZE)
    for task, extra in ("topk", {}), ("slate", {}), ("score", {"candidates": [1, 2, 3]}):
        cold = engine.add(history, task, 4, **extra)
        engine.run()
        again = engine.add(history, task, 4, **extra)
        work, _ = engine.step()
        engine.run()
        assert again.items == cold.items
        torch.testing.assert_close(torch.tensor(again.scores), torch.tensor(cold.scores), atol=1e-6, rtol=0)
        if task == "score":  # no hidden state of the history is needed: whole blocks of all of it are reused
            assert again.cached_tokens == length // SIZE * SIZE
            assert work == [(again, length % SIZE or 3)]
        else:
            assert again.cached_tokens == (length - 1) // SIZE * SIZE
            assert work == [(again, length - again.cached_tokens)]
            assert work[0][1] >= 1


def test_times_belong_to_a_prefixs_identity(tiny_model):
    config = tiny_model.config
    fast, slow = ([user_token(1, config), *(pack(item, 1, level, config) for item in range(1, 12))] for level in (3, 150))
    engine = PagedEngine(tiny_model, 16, SIZE)
    first = engine.add(fast, count=10)
    engine.run()
    second, third = engine.add(slow, count=10), engine.add(fast, count=10)
    engine.run()
    assert (second.cached_tokens, third.cached_tokens) == (0, 8)
    assert third.items == first.items == best(dense_logits(tiny_model, fast), [], 10)
    assert second.items == best(dense_logits(tiny_model, slow), [], 10) != first.items


class Colliding(int):
    """A token whose hash equals every other's."""

    def __hash__(self):
        return 0


def hold(manager, tokens):
    request = Request(0, "topk", list(tokens))
    request.blocks = manager.share(manager.match(tokens))
    request.computed = len(request.blocks) * manager.block_size
    assert manager.reserve(request, len(tokens) - request.computed)
    manager.publish(request, len(tokens) - request.computed)
    return request


def test_prefixes_whose_hashes_collide_are_told_apart_by_content():
    manager = BlockManager(8, 2)
    one, two = ([Colliding(t) for t in tokens] for tokens in ([1, 2, 3, 4], [5, 6, 3, 4]))
    a = hold(manager, one)
    assert hash((0, tuple(one[:2]))) == hash((0, tuple(two[:2])))
    assert manager.match(two) == []
    b = hold(manager, two)
    assert not set(a.blocks) & set(b.blocks), "the same tokens after another beginning are another block"
    assert (manager.match(one), manager.match(two)) == (a.blocks, b.blocks)


def test_a_beginning_that_was_evicted_and_cached_anew_does_not_bring_back_what_followed_it():
    manager = BlockManager(2, 2)
    first = hold(manager, [1, 2, 3, 4])
    manager.release(first.blocks)
    other = hold(manager, [7, 8])
    manager.release(other.blocks)
    assert manager.match([1, 2, 3, 4]) == first.blocks[:1], "the end of a prefix is evicted before its beginning"
    manager.release(hold(manager, [9, 9, 8, 8]).blocks)
    assert manager.match([1, 2, 3, 4]) == manager.match([7, 8]) == []
    again = hold(manager, [1, 2])
    assert manager.match([1, 2, 3, 4]) == again.blocks


def test_eviction_takes_blocks_without_a_name_then_the_longest_unused():
    manager = BlockManager(6, 2)
    old, young = hold(manager, [1, 1, 2, 2]), hold(manager, [3, 3, 4])
    assert list(manager.free) == [4, 5]
    manager.release(old.blocks)
    manager.release(young.blocks)
    partial, whole = young.blocks[1], young.blocks[0]
    assert list(manager.free) == [partial, 4, 5, old.blocks[1], old.blocks[0], whole]
    touched = manager.share(manager.match([1, 1, 2, 2]))
    manager.release(touched)
    assert list(manager.free)[-3:] == [whole, old.blocks[1], old.blocks[0]], "a hit makes a prefix young again"
    taken = hold(manager, [5] * 7)
    assert taken.blocks == [partial, 4, 5, whole]
    assert manager.match([3, 3, 4]) == []
    assert manager.match([1, 1, 2, 2]) == touched


def test_two_who_compute_the_same_prefix_at_once_end_up_with_one_block(tiny_model):
    history = make_history(tiny_model.config, random.Random(4), 10)
    engine = PagedEngine(tiny_model, 16, SIZE)
    a, b = engine.add(history, "slate", 3), engine.add(history, "slate", 3)
    engine.step()
    assert a.blocks[:2] == b.blocks[:2]
    assert a.blocks[2] != b.blocks[2]
    assert [engine.manager.references[block] for block in a.blocks] == [2, 2, 1]
    engine.run()
    assert a.items == b.items
    assert_empty(engine)


@pytest.mark.parametrize("length", [9, 11, 12])
def test_forks_share_a_half_full_block_until_one_of_them_writes(tiny_model, length):
    tokens = make_history(tiny_model.config, random.Random(6), length - 1)
    engine = PagedEngine(tiny_model, 16, SIZE)
    request = engine.add(tokens, "slate", 5)
    engine.step()
    second = best(dense_logits(tiny_model, tokens), [], 2)[1]
    twin = engine.fork(request, second)
    shared = list(request.blocks)
    assert twin.blocks == shared
    engine.step()
    whole = length // SIZE
    assert request.blocks[:whole] == twin.blocks[:whole] == shared[:whole]
    assert request.blocks[whole] != twin.blocks[whole]
    engine.run()
    job = {"tokens": tokens, "task": "slate", "count": 5, "excluded": []}
    assert request.items == oracle(tiny_model, job)
    job |= {"tokens": [*tokens, second], "count": 4, "excluded": [second]}
    assert twin.items == [second, *oracle(tiny_model, job)]
    assert_empty(engine)
    with pytest.raises(ValueError, match="fork a running slate"):
        engine.fork(request, 1)


def test_forks_in_a_tiny_pool_are_preempted_and_still_right(tiny_model):
    tokens = make_history(tiny_model.config, random.Random(8), 9)
    engine = PagedEngine(tiny_model, 6, SIZE)
    request = engine.add(tokens, "slate", 8)
    engine.step()
    choices = best(dense_logits(tiny_model, tokens), [], 5)
    twins = [engine.fork(request, item) for item in choices[1:]]
    preempted = 0
    while not all(r.done for r in (request, *twins)):
        preempted += len(engine.step()[1])
    assert preempted
    for item, slate in zip(choices, (request, *twins)):
        job = {"tokens": [*tokens, item], "task": "slate", "count": 7, "excluded": [item]}
        assert slate.items == [item, *oracle(tiny_model, job)]
    assert_empty(engine)


def test_a_slate_ends_where_no_item_is_left(tiny_model):
    engine = PagedEngine(tiny_model, 8)
    everything = set(range(1, tiny_model.config.num_items))
    few = engine.add(make_history(tiny_model.config, random.Random(0), 3), "slate", 5, excluded=everything - {17, 300})
    none = engine.add(make_history(tiny_model.config, random.Random(0), 4), "topk", 5, excluded=everything)
    engine.run()
    assert sorted(few.items) == [17, 300]
    assert none.items == []


def test_equal_logits_are_ranked_by_item(tiny_model):
    engine = PagedEngine(tiny_model, 8)
    request = engine.add([1], "topk", 60, excluded={3})
    engine._choose(request, torch.zeros(tiny_model.config.num_items).index_fill(0, torch.tensor([0]), -torch.inf))
    assert request.items == [1, 2, *range(4, 62)]


def test_finishing_early_frees_everything_wherever_the_request_is(tiny_model):
    engine = PagedEngine(tiny_model, 8, max_running=1)
    running, waiting = (engine.add(make_history(tiny_model.config, random.Random(0), 20), "slate") for _ in range(2))
    engine.step()
    for request in (running, waiting, running):
        engine.scheduler.finish(request)
    assert_empty(engine)
    engine.run()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "rank"}, "task is 'rank'"),
        ({"tokens": []}, "tokens is empty"),
        ({"count": -1}, "count is -1"),
        ({"tokens": [1] * 65}, "tokens: 65 in the end, 64 fit"),
        ({"tokens": [1] * 60, "task": "slate"}, "tokens: 69 in the end"),
        ({"candidates": [1]}, "candidates: give one"),
        ({"task": "score"}, "candidates: give one"),
        ({"task": "score", "candidates": [0]}, "use items from 1 to 500"),
        ({"task": "score", "candidates": [501]}, "use items from 1 to 500"),
    ],
)
def test_what_can_never_be_served_is_refused_by_name(tiny_model, changes, message):
    with pytest.raises(ValueError, match=message):
        PagedEngine(tiny_model, 8, 16).add(**({"tokens": [1, 2], "task": "topk"} | changes))


def test_a_request_beyond_the_pool_or_an_unchunked_step_is_refused(tiny_model):
    with pytest.raises(ValueError, match="32 fit"):
        PagedEngine(tiny_model, 2, 16).add([1] * 33)
    with pytest.raises(ValueError, match="10 fit"):
        PagedEngine(tiny_model, 4, 16, max_tokens=10, chunked=False).add([1] * 11)


# ---- the block manager alone, under any order of events


class Blocks(RuleBasedStateMachine):
    """Holders come, grow, fork and go; a dictionary remembers what every held slot and every cached block must contain."""

    holders = Bundle("holders")

    def __init__(self):
        super().__init__()
        self.memory = {}  # what the device would hold: block -> tokens in it, with all tokens before them
        self.manager = BlockManager(6, 2, copy=lambda source, target: self.memory.update({target: list(self.memory[source])}))
        self.live = []

    def compute(self, request):
        """Writes what `reserve` made room for, then publishes it."""
        for i in range(request.computed, len(request.tokens)):
            block = request.blocks[i // 2]
            assert self.manager.references[block] == 1, "somebody else's block is written"
            self.memory[block] = [*self.memory.get(block, [])[: i % 2], tuple(request.tokens[: i + 1])]
        self.manager.publish(request, len(request.tokens) - request.computed)

    @rule(target=holders, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def come(self, tokens):
        request = Request(0, "topk", tokens)
        request.blocks = self.manager.share(self.manager.match(tokens[:-1]))
        request.computed = 2 * len(request.blocks)
        assert request.computed < len(tokens)
        before = list(self.manager.free)
        if not self.manager.reserve(request, len(tokens)):
            assert list(self.manager.free) == before, "a refusal changes nothing"
            assert -(-len(tokens) // 2) - len(request.blocks) > len(before)
            self.manager.release(request.blocks)
            return multiple()
        self.compute(request)
        self.live.append(request)
        return request

    @rule(request=holders, token=st.integers(0, 1))
    def grow(self, request, token):
        if request in self.live:
            request.tokens.append(token)
            if self.manager.reserve(request, 1):
                self.compute(request)
            else:
                request.tokens.pop()

    @rule(target=holders, request=holders)
    def fork(self, request):
        if request not in self.live:
            return multiple()
        twin = Request(0, "topk", list(request.tokens), computed=request.computed)
        twin.blocks = self.manager.share(request.blocks)
        self.live.append(twin)
        return twin

    @rule(request=consumes(holders))
    def go(self, request):
        self.live.remove(request)
        self.manager.release(request.blocks)

    @invariant()
    def references_count_the_holders(self):
        held = collections.Counter(block for request in self.live for block in request.blocks)
        assert self.manager.references == [held[block] for block in range(6)]
        assert sorted(self.manager.free) == [block for block in range(6) if not held[block]]

    @invariant()
    def every_slot_holds_its_token(self):
        for request in self.live:
            assert len(request.blocks) == -(-len(request.tokens) // 2)
            for i in range(len(request.tokens)):
                assert self.memory[request.blocks[i // 2]][i % 2] == tuple(request.tokens[: i + 1])

    @invariant()
    def what_is_cached_is_what_its_name_says(self):
        assert len(set(self.manager.cached.values())) == len(self.manager.cached)
        for key, block in self.manager.cached.items():
            assert self.manager.keys[block] == key
            whole = list(self.memory[block][1])
            assert tuple(whole[-2:]) == key[1]
            assert block in self.manager.match(whole), "its beginning is cached as long as it is"


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_a_block_is_not_released_twice():
    manager = BlockManager(2, 2)
    request = hold(manager, [1, 2])
    manager.release(request.blocks)
    with pytest.raises(RuntimeError, match="released twice"):
        manager.release(request.blocks)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 6)), min_size=1, max_size=8),
    st.integers(1, 20), st.integers(1, 4), st.booleans(),
)  # fmt: skip
def test_every_request_ends_whatever_the_step_and_the_pool(sizes, max_tokens, max_running, caching):
    """The scheduler alone: a request of (prompt, items) is done after items steps of generation; nobody starves."""
    manager = BlockManager(6, 3, caching)
    scheduler = Scheduler(manager, max_tokens, max_running, 1)
    left = [Request(i, "slate", [0] * prompt, count) for i, (prompt, count) in enumerate(sizes)]
    scheduler.waiting.extend(left)
    steps = 0
    while left:
        work, _ = scheduler.schedule()
        assert work
        assert sum(count for _, count in work) <= max_tokens
        for request, count in work:
            manager.publish(request, count)
            if request.computed == len(request.tokens):
                request.items.append(0)
                request.tokens.append(len(request.items))
                if len(request.items) == request.count:
                    scheduler.finish(request)
                    left.remove(request)
        steps += 1
        assert steps < 500
    assert not any(manager.references)
