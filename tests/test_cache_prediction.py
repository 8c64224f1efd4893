"""The learned policy: causal, deterministic, within Belady's bound, worth having where users return, harmless where it is not."""

import gzip
import itertools
import zipfile

import numpy as np
import pytest
import torch

from hstu_lab import cache_prediction
from hstu_lab.cache_features import F
from hstu_lab.cache_policies import POLICIES, simulate
from hstu_lab.cache_prediction import BINS, HIDDEN, Network, Watch, play
from hstu_lab.cache_traces import Trace, movielens_trace, request_trace, review_trace, stalls, synthetic_trace
from hstu_lab.hot_cache import HotCache


def events(accesses=4000, users=40, items=600, seed=0):
    """Users in sessions: a few are active at a time, each asks for new rows of his own taste."""
    random = np.random.default_rng(seed)
    asked, rows = [], []
    active = list(range(4))
    for _ in range(accesses):
        if random.random() < 0.02:
            active[random.integers(4)] = int(random.integers(users))
        user = active[random.integers(4)]
        asked.append(user)
        rows.append((user * 37 + int(random.exponential(60))) % items)
    return Trace("sessions", np.array(rows), np.array(asked), np.arange(accesses))


@pytest.fixture(scope="module")
def requests():
    return request_trace(events(), last=30, every=5)


@pytest.fixture(scope="module")
def played(requests):
    return play(requests, 50)


def best_classic(played, part):
    return max(played.shadow[name][part].mean() for name in POLICIES)


def test_it_closes_a_quarter_of_the_distance_where_users_return(played, requests):
    half = played.second_half
    best, bound = best_classic(played, half), simulate("belady", requests.items, 50)[half].mean()
    assert (played.hits[half].mean() - best) / (bound - best) > 0.25
    assert played.report().startswith("prediction led")


def test_it_stays_within_belady_and_shadows_are_the_plain_policies(played, requests):
    assert played.hits.sum() <= simulate("belady", requests.items, 50).sum()
    for name in POLICIES:
        assert np.array_equal(played.shadow[name], simulate(name, requests.items, 50)), name


def requests_of(trace):
    """(rows, user, second) of each request."""
    for start, end in itertools.pairwise([*trace.starts, len(trace.items)]):
        yield trace.items[start:end], int(trace.users[start]), int(trace.times[start])


def test_on_line_it_expects_what_it_expects_in_a_simulation(played, requests):
    watch = Watch(played.network, requests.num_items, int(requests.users.max()) + 1, 50)
    assert (watch.outlook() == -np.inf).all()
    for rows, user, second in requests_of(requests):
        watch.see(rows, user, second)
    assert np.array_equal(watch.outlook(), played.outlook)
    some = np.array([5, 3, 599])
    assert np.array_equal(watch.outlook(some), played.outlook[some])
    assert np.isfinite(watch.outlook()).sum() > 100
    with pytest.raises(ValueError, match="in order of time"):
        watch.see(some, 0, second - 1)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_real_cache_hits_more_by_what_is_expected_than_by_lru(requests, device):
    half = len(requests.items) // 2
    network = play(requests.first(half), 60).network

    def hit_ratio(watch):
        cache, asked = HotCache(torch.zeros(requests.num_items, 2), 60 + 12, device, spares=12), 0
        for rows, user, second in requests_of(requests):
            if asked <= half:
                before = cache.stats()
            asked += len(rows)
            cache.rows(torch.from_numpy(rows).to(device))
            if watch is not None:
                watch.see(rows, user, second)
                cache.prioritise(torch.from_numpy(watch.outlook()))
        after = cache.stats()
        return 1 - (after.misses - before.misses) / (after.lookups - before.lookups)

    watch = Watch(network, requests.num_items, int(requests.users.max()) + 1, 60)
    assert hit_ratio(watch) > hit_ratio(None) + 0.01


def test_the_future_does_not_reach_back(requests):
    count = 6000
    changed = Trace(
        "changed", np.concatenate([requests.items[:count], requests.items[count:][::-1]]), requests.users, requests.times
    )
    one, other = (play(trace, 50, rehearsed=0).hits[:count] for trace in (requests, changed))
    assert np.array_equal(one, other)


def test_two_runs_are_equal(requests):
    first = requests.first(5000)
    assert np.array_equal(play(first, 30, rehearsed=0).hits, play(first, 30, rehearsed=0).hits)


def test_where_prediction_does_not_help_the_cache_follows_a_classic_policy_and_says_so(monkeypatch):
    trace = synthetic_trace(20_000, 500, skew=1.0)
    monkeypatch.setattr(cache_prediction, "LEARNING_RATE", 0.0)
    network = Network.new()
    # A long time since the last use foretells a short wait: the opposite of the truth, and it never learns.
    network.weights[:-BINS] = 0
    network.weights[0] = 1.0
    network.weights[HIDDEN * (F + 1) : -BINS : HIDDEN] = 1.0
    network.smooth[:] = network.weights
    played = play(trace, 50, network=network)
    half = played.second_half
    assert played.shadow["predicted"][half].mean() < best_classic(played, half) - 0.05
    assert played.hits[half].mean() > best_classic(played, half) - 0.01
    assert "where it did not help the cache followed" in played.report()


def test_on_a_loop_the_cache_does_not_fall_between_two_equally_good_policies():
    played = play(Trace("loop", np.arange(16_000) % 400), 200, rehearsed=0)
    half = played.second_half
    assert played.hits[half].mean() > best_classic(played, half) - 0.01


@pytest.mark.parametrize("seed", [0, 1])
def test_a_new_catalogue_half_way(seed):
    trace = synthetic_trace(50_000, 800, skew=0.9, shift=0.5, returning=0.2, seed=seed)
    played = play(trace, 80, rehearsed=0)
    back = slice(25_000 + 1000, 25_000 + 2000)
    assert played.hits[back].mean() > 0.95 * best_classic(played, back)
    assert played.hits[25_000:25_100].mean() < 0.8 * played.hits[24_000:25_000].mean(), "there was no shift to recover from"


@pytest.mark.parametrize(("skew", "drift", "returning"), [(0.9, 0.0, 0.0), (0.6, 2.0, 0.0), (0.8, 0.0, 0.6), (0.0, 0.0, 0.0)])
def test_traces_of_every_kind_lose_nothing(skew, drift, returning):
    trace = synthetic_trace(30_000, 800, skew=skew, drift=drift, returning=returning, seed=3)
    played = play(trace, 40, rehearsed=60_000)
    half = played.second_half
    assert played.hits[half].mean() > best_classic(played, half) - 0.01


def test_a_span_is_learned_from_as_soon_as_it_is_over():
    """Nothing is ever asked for twice: after three capacities the spans of 0.5, 1 and 2 are known to be empty, others not."""
    network = Network.new()
    before = network.weights[-BINS:].copy()
    play(Trace("all new", np.arange(600)), 200, network=network)
    after = network.weights[-BINS:]
    assert (after[:3] < before[:3]).all()
    assert (after[3:] == before[3:]).all()


def test_small_and_empty_traces():
    assert len(play(Trace("none", np.array([], dtype=int)), 3).hits) == 0
    assert play(Trace("one", np.array([4])), 1).hits.tolist() == [False]
    assert play(Trace("same", np.zeros(50, int)), 1).hits.tolist() == [False] + [True] * 49
    everything = play(Trace("all fit", np.tile(np.arange(20), 10)), 20)
    assert everything.hits[20:].all()
    with pytest.raises(ValueError, match="capacity is 0"):
        play(Trace("one", np.array([4])), 0)
    with pytest.raises(ValueError, match="differ in length"):
        Trace("odd", np.array([1, 2]), np.array([1]))
    with pytest.raises(ValueError, match="negative"):
        Trace("below", np.array([-1]))


def test_requests_are_the_users_last_rows():
    trace = Trace("x", np.arange(8), np.array([0, 0, 1, 0, 0, 1, 1, 1]), np.arange(8))
    got = request_trace(trace, last=3, every=2)
    assert got.items.tolist() == [0, 1, 1, 3, 4, 2, 5, 5, 6, 7]
    assert got.starts.tolist() == [0, 2, 5, 7]
    assert got.times.tolist() == [1, 1, 4, 4, 4, 5, 5, 7, 7, 7]


def test_prefetching_one_request_ahead_leaves_only_what_does_not_fit(requests, played):
    wait = stalls(requests, 50, played.hits)
    assert wait.prefetched <= wait.demand / 2
    assert wait.moved_with_prefetch >= wait.moved_on_demand * 0.9
    tight = stalls(requests, 10, play(requests, 10, rehearsed=0).hits)
    assert tight.prefetched > tight.demand / 2, "10 slots cannot hold a request of 30 rows"


def test_files(tmp_path):
    with gzip.open(tmp_path / "log.csv.gz", "wt") as file:
        file.write("user_id\titem_id\ttime\n7\t30\t200\n5\t10\t100\n7\t10\t200\n")
    trace = review_trace(tmp_path / "log.csv.gz")
    assert (trace.name, trace.items.tolist(), trace.users.tolist()) == ("log", [0, 1, 0], [0, 1, 1])
    (tmp_path / "plain.csv").write_text("item_id,user_id\n1,2\n")
    with pytest.raises(ValueError, match="no column 'time'"):
        review_trace(tmp_path / "plain.csv")
    with zipfile.ZipFile(tmp_path / "ml.zip", "w") as archive:
        archive.writestr("ml-1m/ratings.dat", "1::50::5::900\n2::40::3::800\n1::40::4::900\n")
    trace = movielens_trace(tmp_path / "ml.zip")
    assert (trace.items.tolist(), trace.users.tolist(), trace.times.tolist()) == ([0, 1, 0], [1, 0, 0], [800, 900, 900])


def test_the_outlook_drives_the_row_cache(requests):
    import torch

    from hstu_lab.hot_cache import HotCache

    served, capacity = 12_000, 60
    head, tail = requests.first(served), requests.items[served : served + 600]
    cache = HotCache(torch.arange(requests.num_items, dtype=torch.float32)[:, None].repeat(1, 4), capacity, spares=4)
    outlook = torch.from_numpy(play(head, capacity, rehearsed=0).outlook)
    outlook = torch.cat([outlook, outlook.new_full((requests.num_items - len(outlook),), -torch.inf)])
    cache.prioritise(outlook)
    for part in torch.from_numpy(head.items[-2000:]).split(8):
        assert torch.equal(cache.rows(part)[:, 0], part.float())
    kept = cache.resident()
    others = torch.from_numpy(np.setdiff1d(head.items[-2000:], kept.numpy()))
    assert outlook[kept].mean() > outlook[others].mean()
    soon = torch.from_numpy(np.unique(tail))
    assert torch.isin(kept, soon).float().mean() > torch.isin(others, soon).float().mean() + 0.1
