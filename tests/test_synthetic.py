"""The synthetic world is what its docstring says: same by seed, Zipf, drifting, and told by the history, not by the last item."""

import pathlib

import numpy as np
import pytest

from hstu_lab import synthetic
from hstu_lab.config import ACTIONS, PRESETS, ModelConfig, preset
from hstu_lab.event_log import EventsError
from hstu_lab.events import read_events, task_labels, write_sample
from hstu_lab.synthetic import HOURS, POPULARITY, START, World

COLUMNS = ("offsets", "items", "actions", "timestamps", "dwell", "sessions")


@pytest.fixture(scope="module")
def world():
    return World(preset("small"))


@pytest.fixture(scope="module")
def log(world):
    return world.generate(600, events_per_user=150)


def user_of_event(log):
    return np.repeat(np.arange(len(log)), np.diff(log.offsets))


def test_the_same_seeds_give_the_same_log_and_others_another():
    def generate(world_seed, seed):
        return World(preset("tiny"), world_seed).generate(20, seed, events_per_user=40)

    a, b, other_users, other_world = generate(0, 0), generate(0, 0), generate(0, 1), generate(1, 0)
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert a.catalog.titles == b.catalog.titles == other_users.catalog.titles
    assert a.items.tolist() != other_users.items.tolist()
    assert a.catalog.titles != other_world.catalog.titles
    assert [log.catalog.name for log in (a, other_users, other_world)] == ["synthetic-tiny"] * 2 + ["synthetic-tiny-seed1"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_world_fits_the_tables_of_every_preset(name):
    config = preset(name)
    world = World(config)
    features = world.catalog.item_features(config)  # raises where an id outgrows its table
    assert world.catalog.num_items == config.num_items
    assert world.catalog.known[1:].all()
    assert features.size == 0 or features[:, 1:].min() >= 1
    assert len(set(world.catalog.titles)) == config.num_items


def test_a_world_fits_odd_tables_and_refuses_impossible_ones():
    config = preset("tiny").replace(num_items=9, num_users=4, side_features=(("mood", 3), ("creator", 2), ("category", 1)))
    log = World(config).generate(3, events_per_user=4)
    table = log.catalog.item_features(config)
    assert table.max(1).tolist() == [2, 1, 0]
    assert log.users == ["u1", "u2", "u3"]
    for call, said in (
        (lambda: World(config.replace(num_items=8)), "a world needs 8 items"),
        (lambda: World(config).generate(4), "4 users asked for, the preset has rows for 3"),
        (lambda: World(config).generate(0), "0 users asked for"),
        (lambda: World(config).generate(3, events_per_user=5), "nobody meets twice"),
    ):
        with pytest.raises(EventsError, match=said):
            call()


def test_histories_are_well_formed(log):
    user = user_of_event(log)
    same = np.diff(user) == 0
    assert (np.diff(log.timestamps)[same] > 0).all()
    steps = np.diff(log.sessions)[same]
    assert set(steps.tolist()) == {0, 1}
    assert (log.sessions[log.offsets[:-1]] == 0).all()
    pairs = user * len(log.catalog.ids) + log.items
    assert len(np.unique(pairs)) == len(pairs)  # nobody meets an item twice
    counts = np.diff(log.offsets)
    assert counts.min() >= 100
    assert counts.max() <= 200
    assert log.items.min() >= 1
    assert set(log.actions.tolist()) == set(range(1, len(ACTIONS)))
    assert np.isfinite(log.dwell).all()
    assert log.dwell.min() > 0
    assert log.timestamps.min() >= START


def test_a_creator_keeps_to_two_categories(world):
    for creator in range(world.creator.max() + 1):
        assert len(set(world.category[1:][world.creator[1:] == creator])) <= 2


def test_popularity_follows_zipf(world, log):
    heads = np.sort(world.weight[world.episode == 1])[::-1]
    slope = np.polyfit(np.log(np.arange(1, len(heads) + 1)), np.log(heads), 1)[0]
    assert slope == pytest.approx(-POPULARITY)
    counts = np.sort(np.bincount(log.items, minlength=len(log.catalog.ids))[1:])[::-1]
    share = counts[: len(counts) // 10].sum() / counts.sum()
    assert 0.3 < share < 0.9  # uniform popularity would give 0.1
    seen_slope = np.polyfit(np.log(np.arange(10, 500)), np.log(counts[10:500]), 1)[0]
    assert -1.5 < seen_slope < -0.3  # flatter than the weights, because nobody meets the head twice


def test_tastes_differ_and_drift(world, log, monkeypatch):
    def tastes(log, part, parts=5):
        histograms = np.zeros((len(log), world.category.max() + 1))
        for i in range(len(log)):
            items = np.array_split(log.history(i).items, parts)[part]
            np.add.at(histograms[i], world.category[items], 1)
        return histograms / np.linalg.norm(histograms, axis=1, keepdims=True)

    def similarity(log, a, b, shift=0):
        return (tastes(log, a) * np.roll(tastes(log, b), shift, axis=0)).sum(1).mean()

    near, far, strangers = similarity(log, 0, 1), similarity(log, 0, 4), similarity(log, 0, 4, shift=1)
    assert near > far + 0.05
    assert far > strangers + 0.05
    monkeypatch.setattr(synthetic, "DRIFT", 1.0)
    steady = world.generate(len(log))
    assert similarity(steady, 0, 4) > far + 0.05


def hit_rate(log, scores, k=10):
    """Share of users whose last item is among the k best of `scores` (U, items), items seen before left out."""
    user, last = user_of_event(log), log.offsets[1:] - 1
    seen = np.zeros(scores.shape, dtype=bool)
    seen[user, log.items] = True
    target = log.items[last]
    wanted = scores[np.arange(len(log)), target]
    return float(((np.where(seen, -np.inf, scores) > wanted[:, None]).sum(1) < k).mean())


def test_the_history_tells_the_next_item_and_the_last_item_does_not(world, log):
    num_items, last = len(log.catalog.ids), log.offsets[1:] - 1
    train = np.ones(log.num_events, dtype=bool)
    train[last] = False
    popularity = np.bincount(log.items[train], minlength=num_items).astype(float)
    user = user_of_event(log)
    steps = (user[1:] == user[:-1]) & train[1:]
    transitions = np.zeros((num_items, num_items))
    np.add.at(transitions, (log.items[:-1][steps], log.items[1:][steps]), 1)
    markov = transitions[log.items[last - 1]] + 1e-6 * popularity
    followed = np.zeros((len(log), num_items))
    for lag in range(40, 1, -1):
        event = last - lag
        reacted = log.actions[event] >= ACTIONS.index("click")
        followed[np.arange(len(log)), world.next_row[log.items[event]]] = np.where(reacted, 0.95**lag, 0)
    rule, chain, popular = (hit_rate(log, s) for s in (followed + 1e-9 * popularity, markov, np.tile(popularity, (len(log), 1))))
    assert rule > 2 * max(chain, popular)
    assert min(chain, popular) > 10 / num_items  # and yet there is something to learn for the baselines


def test_a_series_goes_on_later_and_only_after_a_reaction(world, log):
    user, index = user_of_event(log), np.arange(log.num_events)
    met = np.full((len(log), len(log.catalog.ids)), -1)
    met[user, log.items] = index
    following = world.next_row[log.items]
    lag = np.where(following > 0, met[user, following] - index, -1)
    reacted = log.actions >= ACTIONS.index("click")
    soon = (lag > 1) & (lag <= 10)
    assert soon[reacted].mean() > 4 * soon[~reacted].mean()
    assert soon[reacted].mean() > 9 * 2 * (lag == 1)[reacted].mean()  # nine lags against one


def test_tastes_show_in_the_task_labels(log):
    labels = task_labels(log)
    rates = np.nanmean(labels, axis=0)
    assert (rates > 0.02).all()
    assert (rates < 0.8).all()
    category = log.catalog.features["category"][log.items]
    user = user_of_event(log)
    counts = np.zeros((len(log), category.max() + 1))
    np.add.at(counts, (user, category), 1)
    liked = category == counts.argmax(1)[user]
    assert labels[liked, 0].mean() > labels[~liked, 0].mean() + 0.1
    returned = labels[:, 1] == 1
    known = ~np.isnan(labels[:, 1])
    assert labels[known & returned, 0].mean() > labels[known & ~returned, 0].mean() + 0.02
    engaged = labels[:, 0] == 1
    assert log.dwell[engaged].mean() > 2 * log.dwell[~engaged].mean()


def test_sessions_start_by_the_daily_cycle(log):
    first = np.flatnonzero(np.diff(log.sessions) == 1) + 1  # session starts, without the users' first ones
    hours = np.bincount(log.timestamps[first] // 3600 % 24, minlength=24)
    assert np.corrcoef(hours, HOURS)[0, 1] > 0.8


def test_the_span_follows_days():
    spans = []
    for days in (10.0, 40.0):
        log = World(preset("tiny")).generate(50, events_per_user=60, days=days)
        spans.append(np.median(log.timestamps[log.offsets[1:] - 1] - log.timestamps[log.offsets[:-1]]) / 86400)
    assert 5 < spans[0] < 20
    assert 20 < spans[1] < 80


def test_a_sample_is_the_first_users_of_the_default_log(tmp_path):
    sample = write_sample(tmp_path / "sample.jsonl.gz", "tiny", num_users=7)
    log = World(preset("tiny")).generate()
    back = read_events(tmp_path / "sample.jsonl.gz", log.catalog)
    assert sample.users == back.users == log.users[:7]
    for name in COLUMNS:
        expected = getattr(log.select(range(7)), name)
        np.testing.assert_array_equal(getattr(sample, name), expected)
        np.testing.assert_array_equal(getattr(back, name), expected)
    assert back.report.rejected == back.report.repaired == {}


def test_configs_without_user_rows_have_a_thousand_users():
    config = ModelConfig.from_json(preset("tiny").replace(num_users=0).to_json())
    assert len(World(config).generate(events_per_user=2)) == 1000


def test_the_shipped_sample_is_still_of_this_world(world):
    path = pathlib.Path(__file__).parent.parent / "data" / "sample" / "events.jsonl.gz"
    assert path.stat().st_size <= 400_000
    sample = read_events(path, world.catalog, on_bad="raise")
    expected = world.generate().select(range(len(sample)))
    assert len(sample) == 200
    assert sample.users == expected.users
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(sample, name), getattr(expected, name))
