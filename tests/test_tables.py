"""Features are jagged lists by table, rows come from any store, and the parameter calculator counts what is there."""

from collections import Counter

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hstu_lab.config import PRESETS, preset
from hstu_lab.model import HSTU
from hstu_lab.tables import HostRows, Tables, parameter_groups, seed_arithmetic, to_features
from hstu_lab.tokens import pack, user_token


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


CONFIG = preset("tiny")
NO_USERS = CONFIG.replace(num_users=0)


def item_features(config=CONFIG):
    """Category and creator of every item, row 0 of both for item 0."""
    features = torch.zeros(len(config.side_features), config.num_items, dtype=torch.int64)
    for row, (_, rows) in zip(features, config.side_features):
        row[1:] = 1 + torch.arange(config.num_items - 1) % (rows - 1)
    return features


def batch(config=CONFIG):
    """Two users with 2 and 3 events, and one with none: tokens (T,), offsets (4,), items and users as packed."""
    items, users = [3, 500, 7, 3, 20], [5, 0, 300]
    events = [pack(item, 2, 9 * i, config) for i, item in enumerate(items)]
    first = [[user_token(user, config)][: config.num_context] for user in users]
    parts = [first[0] + events[:2], first[1] + events[2:], first[2]]
    offsets = torch.tensor([0, *map(len, parts)]).cumsum(0)
    return torch.tensor([*parts[0], *parts[1], *parts[2]]), offsets, items, users


def tables(config=CONFIG, store=None):
    torch.manual_seed(0)
    made = Tables(config, store)
    made.item_features[:] = item_features(config)
    return made


def test_features_are_one_jagged_list_a_table():
    tokens, offsets, items, users = batch()
    features = to_features(tokens, offsets, item_features(), CONFIG)
    assert isinstance(features, KeyedJaggedTensor)
    assert features.keys() == [name for name, _ in CONFIG.tables]
    assert features["item"].values().tolist() == items
    for name, feature in zip(("category", "creator"), item_features()):
        assert features[name].values().tolist() == feature[items].tolist()
    for name in ("item", "category", "creator"):
        assert features[name].lengths().tolist() == [2, 3, 0]
    assert features["user"].values().tolist() == users
    assert features["user"].lengths().tolist() == [1, 1, 1]


def test_without_a_user_table_there_are_no_user_features():
    tokens, offsets, items, _ = batch(NO_USERS)
    features = to_features(tokens, offsets, item_features(NO_USERS), NO_USERS)
    assert features.keys() == ["item", "category", "creator"]
    assert features["item"].values().tolist() == items
    assert features["item"].lengths().tolist() == [2, 3, 0]


@pytest.mark.parametrize("config", [CONFIG, NO_USERS, NO_USERS.replace(side_features=())], ids=["all", "no users", "items only"])
def test_a_token_gets_its_items_rows_summed_or_its_users_row(config):
    tokens, offsets, items, users = batch(config)
    made = tables(config)
    weight, features = made.store.weight, item_features(config)
    events = iter(
        weight("item")[item] + sum(weight(name)[row[item]] for (name, _), row in zip(config.side_features, features))
        for item in items
    )
    people = iter(users)
    expected = [weight("user")[next(people)] if token >= config.user_token_base else next(events) for token in tokens.tolist()]
    torch.testing.assert_close(made(tokens, offsets), torch.stack(expected))


@pytest.mark.parametrize("tokens", [[], [user_token(3, CONFIG)], [17]], ids=["nothing", "a user", "an item"])
def test_batches_without_events_or_users_work(tokens):
    made = tables()
    rows = made(torch.tensor(tokens, dtype=torch.int64), torch.tensor([0, 0, len(tokens)]))
    assert rows.shape == (len(tokens), CONFIG.d_model)
    if tokens == [user_token(3, CONFIG)]:
        torch.testing.assert_close(rows[0], made.store.weight("user")[3])


@pytest.mark.parametrize("row", [501, 10_000])
def test_an_id_beyond_its_table_is_never_answered(row):
    with pytest.raises((IndexError, RuntimeError)):
        HostRows(CONFIG).rows(KeyedJaggedTensor.from_lengths_sync(["item"], torch.tensor([row]), torch.tensor([1])))


class Recorded:
    """A store that adds a constant to another store's rows and counts what it is asked for."""

    def __init__(self, store, shift):
        self.store, self.shift, self.asked = store, shift, Counter()

    def rows(self, features):
        for name, ids in features.to_dict().items():
            self.asked.update((name, row) for row in ids.values().tolist())
        return {name: rows + self.shift for name, rows in self.store.rows(features).items()}


def test_rows_come_from_the_store_that_was_injected():
    tokens, offsets, items, users = batch()
    plain = tables()
    store = Recorded(plain.store, shift=1.0)
    injected = tables(store=store)
    assert not list(injected.parameters()), "the rows belong to the store"
    # An event is the sum of three rows, each shifted; a user is one row.
    shift = torch.where(tokens >= CONFIG.user_token_base, 1.0, 3.0).unsqueeze(-1)
    torch.testing.assert_close(injected(tokens, offsets), plain(tokens, offsets) + shift)
    assert {row: n for (name, row), n in store.asked.items() if name == "item"} == Counter(items)
    assert {row: n for (name, row), n in store.asked.items() if name == "user"} == Counter(users)
    assert store.asked.total() == 3 * len(items) + len(users)


def test_a_model_reads_its_rows_from_an_injected_store():
    tokens, offsets, items, _ = batch()
    tokens, offsets = tokens[: offsets[2]], offsets[:3]
    torch.manual_seed(0)
    model = HSTU(CONFIG).eval()
    before = model.jagged(tokens, offsets)
    store = Recorded(model.tables.store, shift=0.0)
    model.tables = Tables(CONFIG, store)
    assert torch.equal(model.jagged(tokens, offsets), before)
    assert store.asked["item", 3] == items.count(3)
    store.shift = 1.0
    assert not torch.allclose(model.jagged(tokens, offsets), before)


def test_lookups_are_quiet(caplog):
    import torch.fx._symbolic_trace as tracing

    tracing.is_fx_tracing_warning.cache_clear()
    logger = tracing.log
    logger.addHandler(caplog.handler)
    try:
        tables()(*batch()[:2])
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.messages == []


# ---- the parameter calculator


def instantiate(config):
    """The model, without memory for its weights where it is large."""
    if config.num_users * config.d_model < 10**8:
        return HSTU(config)
    with torch.device("meta"):
        return HSTU(config, Tables(config, device="meta"))


@pytest.mark.parametrize("rab", ["none", "position", "position+time"])
@pytest.mark.parametrize("name", PRESETS)
def test_the_calculator_counts_the_parameters_of_the_model(name, rab):
    config = preset(name).replace(rab=rab)
    assert sum(group.count for group in parameter_groups(config)) == sum(p.numel() for p in instantiate(config).parameters())


def test_the_calculator_counts_every_table_by_its_name():
    counts = {group.name: group.count for group in parameter_groups(CONFIG)}
    store = HostRows(CONFIG)
    for name, rows in CONFIG.tables:
        assert store.weight(name).shape == (rows, CONFIG.d_model)
        assert counts[f"tables.{name}"] == store.weight(name).numel()


@pytest.mark.parametrize(
    "changes",
    [
        {"num_users": 0},
        {"side_features": ()},
        {"d_qk": 8, "d_v": 24, "num_heads": 3},
        {"num_time_buckets": 10},
        {"max_seq_len": 33},
        {"num_layers": 5},
    ],
    ids=str,
)
def test_the_calculator_follows_every_size(changes):
    config = CONFIG.replace(**changes)
    assert sum(group.count for group in parameter_groups(config)) == sum(p.numel() for p in HSTU(config).parameters())


def test_gr_3b_holds_3_2_billion_parameters_and_what_it_grew_from_does_not():
    groups = parameter_groups(preset("gr-3b"))
    total = sum(group.count for group in groups)
    assert total == pytest.approx(3.2e9, rel=0.01)
    described = {group.name: group.count for group in seed_arithmetic()}
    counts = {group.name: group.count for group in groups}
    assert described["HSTU stack"] == counts["stack.layers"]
    assert described["item table"] == counts["tables.item"]
    assert sum(described.values()) < total / 10
    assert sum(count for name, count in counts.items() if name.startswith("tables.")) > 0.97 * total
