"""Training learns, resumes bit by bit, leaks no label and says clearly what it cannot do; the yardsticks are what they claim."""

import dataclasses
import json
import math
import signal
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from hstu_lab import training
from hstu_lab.config import ACTIONS, TASKS, ConfigError, preset
from hstu_lab.evaluation import hidden_states, target_ranks
from hstu_lab.events import Catalog, EventLog, EventsError, World
from hstu_lab.model import HSTU, KVCache, load_checkpoint
from hstu_lab.tokens import encode_history, unpack
from hstu_lab.training import (
    Corpus,
    Markov,
    MostPopular,
    Trainer,
    TrainingError,
    candidate_logits,
    compare,
    evaluate,
    evaluate_baseline,
    fit_config,
    learning_rate_factor,
    next_item_loss,
    ranking_loss,
    train,
)  # fmt: skip

TINY = preset("tiny")


@pytest.fixture(scope="module")
def log():
    return World(TINY, seed=1).generate(60, seed=1, events_per_user=30)


@pytest.fixture
def model(log):
    """An untrained model whose biases are random too, on the log's catalog."""
    torch.manual_seed(0)
    model = HSTU(TINY)
    for name, parameter in model.named_parameters():
        if "bias" in name or "down" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.tables.item_features.copy_(torch.from_numpy(log.catalog.item_features(TINY)))
    return model.eval()


def small_log(histories, rows=8, known=None):
    """A log of item lists, a click a minute."""
    known = range(1, rows) if known is None else known
    ids = [f"i{row}" if row in known else None for row in range(rows)]
    items = np.array([item for history in histories for item in history], dtype=np.int64)
    offsets = np.cumsum([0, *map(len, histories)])
    n = len(items)
    return EventLog(
        Catalog("small", ids, ids), [f"u{i}" for i in range(len(histories))], offsets, items, np.full(n, 2), 60 * np.arange(n),
        np.full(n, np.nan, dtype=np.float32), np.zeros(n, dtype=np.int64),
    )  # fmt: skip


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ---- the run


def test_a_short_training_beats_both_baselines(tmp_path):
    log = World(TINY, seed=0).generate(300, seed=0, events_per_user=30)
    result = train(TINY, log, tmp_path, steps=250, batch_size=16, lr=1e-2, progress=False)
    hstu, popular, markov = (result.metrics[name]["HR@10"] for name in ("hstu", "most_popular", "markov"))
    assert hstu > 1.3 * max(popular, markov)
    assert not result.interrupted


def test_the_heads_learn_what_sells(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    log = small_log([rng.permutation(np.arange(1, 31))[:20].tolist() for _ in range(40)], rows=33, known=range(1, 31))
    log.actions = np.where(log.items % 2, ACTIONS.index("impression"), ACTIONS.index("purchase"))
    config = TINY.replace(num_items=33, side_features=())
    monkeypatch.setattr(training, "RANKING_SHARE", 1)
    train(config, log, tmp_path, steps=60, lr=1e-2, progress=False)
    tokens, lengths, _, _ = Corpus(log, config).ranking(np.arange(8), rng)
    model = load_checkpoint(tmp_path)
    assert model.known_items.nonzero().squeeze(1).tolist() == list(range(1, 31))
    logits = candidate_logits(model, tokens, lengths, torch.arange(1, 31).repeat(8, 1))
    sold = logits[..., TASKS.index("monetization")].sigmoid()
    assert sold[:, 1::2].min() > 0.6 > 0.4 > sold[:, 0::2].max()


def test_an_interrupted_run_resumes_bit_by_bit(tmp_path, log):
    def ctrl_c(step, loss):
        if step == 10:
            signal.raise_signal(signal.SIGINT)

    usual = signal.getsignal(signal.SIGINT)
    straight = train(TINY, log, tmp_path / "straight", steps=20, progress=False)
    stopped = train(TINY, log, tmp_path / "resumed", steps=20, progress=False, on_step=ctrl_c)
    assert (stopped.steps, stopped.interrupted, stopped.metrics) == (10, True, {})
    assert "interrupted" in str(stopped)
    assert json.loads((tmp_path / "resumed" / "training.json").read_text())["interrupted"]
    load_checkpoint(tmp_path / "resumed")
    assert signal.getsignal(signal.SIGINT) == usual

    resumed = train(TINY, log, tmp_path / "resumed", steps=20, progress=False, resume=True)
    assert resumed.steps == straight.steps == 20
    assert resumed.losses == straight.losses
    assert resumed.metrics == straight.metrics
    assert resumed.seconds > stopped.seconds
    assert_same_weights(tmp_path / "straight", tmp_path / "resumed")


def test_a_run_that_crashed_resumes_from_its_last_save(tmp_path, log, monkeypatch):
    def crash(step, loss):
        if step == 6:
            raise MemoryError

    monkeypatch.setattr(training, "SAVE_EVERY", 0)
    train(TINY, log, tmp_path / "straight", steps=9, progress=False)
    with pytest.raises(MemoryError):
        train(TINY, log, tmp_path / "resumed", steps=9, progress=False, on_step=crash)
    steps = []
    train(TINY, log, tmp_path / "resumed", steps=9, progress=False, resume=True, on_step=lambda step, _: steps.append(step))
    assert steps == [6, 7, 8, 9]
    assert_same_weights(tmp_path / "straight", tmp_path / "resumed")


def test_the_second_ctrl_c_is_not_held_back(tmp_path, log):
    def twice(step, loss):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(TINY, log, tmp_path, steps=20, progress=False, on_step=twice)


def test_one_seed_gives_one_model_and_leaves_the_callers_random_numbers_alone(tmp_path, log):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    train(TINY, log, tmp_path / "a", steps=3, progress=False)
    assert torch.equal(torch.rand(1), expected)
    done = threading.Thread(target=train, args=(TINY, log, tmp_path / "b"), kwargs={"steps": 3, "progress": True})
    done.start()
    done.join()
    train(TINY, log, tmp_path / "c", steps=3, seed=1, progress=False)
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    assert not torch.equal(*(weights(tmp_path / x)["heads.towers.retention.0.weight"] for x in "ac"))


def test_minutes_end_a_run_and_what_it_writes_can_be_served(tmp_path, log):
    result = train(TINY, log, tmp_path, minutes=1 / 60, progress=False)
    assert 1 <= result.seconds < 30
    loaded = load_checkpoint(tmp_path)
    assert loaded.tables.item_features.tolist() == log.catalog.item_features(TINY).tolist()
    assert loaded.known_items.tolist() == Catalog.load(tmp_path / "catalog.json").known.tolist()
    assert json.loads((tmp_path / "users.json").read_text()) == log.users
    account = json.loads((tmp_path / "training.json").read_text())
    assert account["metrics"] == compare(loaded, log) == result.metrics
    assert account["steps"] == result.steps > 0
    assert account["versions"]["torch"] == torch.__version__
    written = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {
        "model.safetensors", "config.json", "catalog.json", "users.json", "training.json", "state.safetensors",
    }  # fmt: skip


def test_the_learning_rate_climbs_and_falls_to_zero():
    assert learning_rate_factor(0) == 0
    assert learning_rate_factor(training.WARM_UP) == 1
    falling = [learning_rate_factor(used) for used in np.linspace(training.WARM_UP, 1, 20)]
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] == pytest.approx(0)


def test_a_target_time_bias_sees_the_time_of_the_target_and_nothing_else_of_it(model, log):
    tokens, lengths = Corpus(log, TINY).next_items(np.arange(4), np.random.default_rng(0))
    item, action, level, user = unpack(tokens, TINY)
    others = torch.where(user >= 0, tokens, (item + 1) % TINY.num_items + TINY.num_items * TINY.num_actions * level)
    later = torch.where(user >= 0, tokens, item + TINY.num_items * (action + TINY.num_actions * (level + 100)))
    at = 9
    for sees in (False, True):
        model.config = model.stack.config = TINY.replace(target_time_bias=sees)
        states = []
        for changed in (tokens, others, later):
            mixed = torch.where(torch.arange(tokens.shape[1]) <= at, tokens, changed)
            states.append(hidden_states(model, mixed, lengths)[:, at])
        assert torch.equal(states[0], states[1])
        assert torch.equal(states[0], states[2]) != sees


# ---- data and losses


def test_histories_are_those_of_serving(log):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "ACTION_DROPOUT", 0)
        patch.setattr(training, "USER_DROPOUT", 0)
        for config in (TINY, TINY.replace(num_users=0), TINY.replace(max_seq_len=30)):
            corpus = Corpus(log, config)
            tokens, lengths = corpus.next_items(np.array([7, 3]), np.random.default_rng(0))
            for user, row, length in zip((7, 3), tokens, lengths):
                h = log.history(user)[:-1]
                assert row[:length].tolist() == encode_history(h.items, h.actions, h.timestamps, user + 1, config)
                assert not row[length:].any()


def test_batches_hold_every_user_once_and_differ_by_epoch(log):
    corpus = Corpus(log, TINY)
    epochs = [corpus.batches(0, epoch, 8) for epoch in (0, 1)]
    for batches in epochs:
        assert sorted(np.concatenate(batches).tolist()) == corpus.users.tolist()
    assert np.concatenate(epochs[0]).tolist() != np.concatenate(epochs[1]).tolist()
    later = corpus.batches_from(len(epochs[0]) + 2, 0, 8)
    assert next(later).tolist() == epochs[1][2].tolist()


def test_some_actions_and_users_are_made_unknown(log):
    corpus, users = Corpus(log, TINY), np.arange(60)
    first = torch.from_numpy(log.actions[log.offsets[:-1]])
    tokens = torch.stack([corpus.next_items(users, np.random.default_rng(seed))[0][:, :2] for seed in range(50)])
    _, action, _, user = unpack(tokens, TINY)
    assert ((action[..., 1] == 0).float().mean() - training.ACTION_DROPOUT).abs() < 0.03
    assert ((user[..., 0] == 0).float().mean() - training.USER_DROPOUT).abs() < 0.03
    assert ((action[..., 1] == first) | (action[..., 1] == 0)).all()


def test_no_label_leaks_into_a_candidate(model, log):
    users = np.arange(16)
    tokens, lengths, items, labels = Corpus(log, TINY).ranking(users, np.random.default_rng(2))
    assert lengths.max() - 1 < TINY.max_history, "the cut must be readable off the length"
    cuts = log.offsets[users] + lengths.numpy() - 1
    actions, times = log.actions.copy(), log.timestamps.copy()
    for user, cut in zip(users, cuts):
        actions[cut : log.offsets[user + 1]] = 7 - log.actions[cut : log.offsets[user + 1]]
        times[cut : log.offsets[user + 1]] += 500_000
    changed = Corpus(dataclasses.replace(log, actions=actions, timestamps=times), TINY)
    tokens2, lengths2, items2, labels2 = changed.ranking(users, np.random.default_rng(2))
    assert not torch.equal(labels.nan_to_num(2), labels2.nan_to_num(2))
    scores = candidate_logits(model, tokens, lengths, items)
    assert torch.equal(scores, candidate_logits(model, tokens2, lengths2, items2))
    bare = (tokens >= TINY.user_token_base) | (tokens < TINY.num_items)
    forgot = torch.where(bare, tokens, tokens % TINY.num_items)
    assert not torch.allclose(scores, candidate_logits(model, forgot, lengths, items)), "the history's actions do count"
    for user, cut, row, label in zip(users, cuts, items, labels):
        count = min(training.RANKING_CANDIDATES, log.offsets[user + 1] - 1 - cut)
        assert row[:count].tolist() == log.items[cut : cut + count].tolist()
        assert not row[count:].any()
        assert label[count:].isnan().all()


def test_candidates_are_scored_as_in_serving(model, log):
    tokens, lengths, items, _ = Corpus(log, TINY).ranking(np.arange(5), np.random.default_rng(0))
    scores = candidate_logits(model, tokens, lengths, items).sigmoid()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    cache = KVCache(TINY, 5)
    model.extend(torch.cat([row[:n] for row, n in zip(tokens, lengths)]), offsets, cache)
    served = model.task_scores(model.score_candidates(items.flatten(), torch.arange(6) * items.shape[1], cache))
    torch.testing.assert_close(served.view_as(scores), scores, atol=1e-5, rtol=0)


def test_the_next_item_loss_is_cross_entropy_over_the_target_and_the_negatives(model, log):
    model.config = TINY.replace(temperature=1.0)
    tokens, lengths = Corpus(log, TINY).next_items(np.arange(6), np.random.default_rng(0))
    negatives = (tokens[0, 1 : lengths[0]] % TINY.num_items).unique()
    loss = next_item_loss(model, tokens, lengths, negatives)
    total, count = 0.0, 0
    for row, n in zip(tokens, lengths.tolist()):
        logits = model.logits(model.jagged(row[: n - 1], torch.tensor([0, n - 1])))
        target = row[1:n] % TINY.num_items
        drawn = torch.zeros_like(logits, dtype=torch.bool).index_fill(1, negatives, True).scatter(1, target[:, None], True)
        total += F.cross_entropy(logits.masked_fill(~drawn, -torch.inf), target, reduction="sum").item()
        count += n - 1
    assert loss.item() == pytest.approx(total / count, rel=1e-5)


def test_unknown_labels_do_not_count():
    torch.manual_seed(0)
    logits = torch.randn(4, 3, requires_grad=True)
    labels = torch.tensor([[1, 0, math.nan], [math.nan, 1, 0], [0, math.nan, 1], [math.nan] * 3])
    known = ~labels.isnan()
    loss = ranking_loss(logits, labels)
    assert loss.item() == pytest.approx(F.binary_cross_entropy_with_logits(logits[known], labels[known]).item())
    loss.backward()
    assert torch.equal(logits.grad != 0, known)
    assert ranking_loss(logits, torch.full((4, 3), math.nan)).item() == 0


# ---- yardsticks


def by_hand(log, scores_of, ks):
    """Leave-one-out in plain Python: sort the unseen items by falling score, then id, and look the target up."""
    ranks = []
    for i in range(len(log)):
        history = log.history(i)
        if len(history) < 2:
            continue
        past, target, scores = history[:-1], int(history.items[-1]), scores_of(i, history[:-1])
        seen = set(past.items.tolist()) - {target}
        order = sorted((-scores[item], item) for item in np.flatnonzero(log.catalog.known).tolist() if item not in seen)
        ranks.append([item for _, item in order].index(target))
    result = {}
    for k in ks:
        result[f"HR@{k}"] = sum(rank < k for rank in ranks) / len(ranks)
        result[f"NDCG@{k}"] = sum(1 / math.log2(rank + 2) for rank in ranks if rank < k) / len(ranks)
    return result


@pytest.mark.parametrize("num_users", [301, 0])
def test_evaluate_is_leave_one_out_by_hand(log, num_users):
    config = TINY.replace(num_users=num_users, max_seq_len=40)
    torch.manual_seed(1)
    model = HSTU(config)

    def scores(i, past):
        tokens = torch.tensor(encode_history(past.items, past.actions, past.timestamps, i + 1, config))
        return model.logits(model.jagged(tokens, torch.tensor([0, len(tokens)])))[-1].tolist()

    model.train()
    with torch.no_grad():
        metrics = evaluate(model, log, ks=(10, 100), batch_size=7)
        assert model.training
        model.eval()
        assert metrics == pytest.approx(by_hand(log, scores, (10, 100)))
        some = log.select(range(40, 50))
        assert evaluate(model, some, user_rows=range(41, 51)) == pytest.approx(evaluate(model, log, users=range(40, 50)))


def test_baselines_are_leave_one_out_by_hand(log):
    training_pairs = [history[:-1].items.tolist() for history in map(log.history, range(len(log)))]
    popular, after = np.zeros(TINY.num_items), np.zeros((TINY.num_items, TINY.num_items))
    for items in training_pairs:
        np.add.at(popular, items, 1)
        np.add.at(after, (items[:-1], items[1:]), 1)
    chain = (after + popular / popular.sum()) / (after.sum(1, keepdims=True) + 1)
    expected = by_hand(log, lambda i, past: popular, (5, 50))
    assert evaluate_baseline(MostPopular(log), log, ks=(5, 50)) == pytest.approx(expected)
    expected = by_hand(log, lambda i, past: chain[past.items[-1]], (5, 50))
    assert evaluate_baseline(Markov(log), log, ks=(5, 50)) == pytest.approx(expected)


def test_the_held_out_event_trains_nothing():
    log = small_log([[1, 2, 3], [1, 2, 4], [5], [6, 7]])
    assert MostPopular(log).counts.tolist() == [0, 2, 2, 0, 0, 0, 1, 0]
    assert np.flatnonzero(Markov(log).scores(np.array([2])) >= 1).tolist() == []
    assert np.flatnonzero(Markov(log).scores(np.array([1])) >= 1).tolist() == [2]
    assert evaluate_baseline(MostPopular(log), log, ks=(1,), users=[0])["HR@1"] == 0
    # u0 saw 1 and 2; of the others item 6 was met, then 3, 4, 5, 7 tie and the lower id comes first.
    assert evaluate_baseline(MostPopular(log), log, ks=(2,), users=[0])["HR@2"] == 1


def test_items_that_do_not_exist_are_not_ranked_and_a_repeated_target_is():
    log = small_log([[1, 6, 1], [6, 1, 6]], known=(1, 6))
    assert evaluate_baseline(MostPopular(log), log, ks=(1,)) == {"HR@1": 1.0, "NDCG@1": 1.0}


def test_ties_go_to_the_lower_id_and_nan_helps_nobody():
    nan = math.nan
    scores = torch.tensor([[0, 3, 2, 2, 2.0], [0, 1, nan, 1, 0], [0, 5, 4, 3, nan], [9, 1, 1, 1, 1]])
    excluded = torch.zeros(4, 5, dtype=torch.bool)
    excluded[:, 0] = True
    assert target_ranks(scores, torch.tensor([3, 3, 4, 2]), excluded).tolist() == [2, 2, 3, 1]


# ---- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "minutes and steps are both missing"),
        ({"minutes": 0}, "minutes is 0"),
        ({"minutes": math.nan}, "minutes is nan"),
        ({"steps": -1}, "steps is -1"),
        ({"steps": 1, "batch_size": 0}, "batch_size is 0"),
        ({"steps": 1, "lr": math.inf}, "lr is inf"),
        ({"steps": 1, "seed": -1}, "seed is -1"),
        ({"steps": 1, "resume": True}, r"state\.safetensors: no such file, so there is nothing to resume"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, log, arguments, message):
    with pytest.raises(TrainingError, match=message):
        train(TINY, log, tmp_path, progress=False, **arguments)
    assert not any(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_found_out_before_the_first_step(tmp_path, log):
    (tmp_path / "file").write_text("")
    steps = []
    with pytest.raises(TrainingError, match=r"out is .*file/run: cannot be written"):
        train(TINY, log, tmp_path / "file" / "run", steps=1, progress=False, on_step=lambda *seen: steps.append(seen))
    assert not steps


def test_a_model_beyond_this_machines_memory_is_refused_before_it_is_made(tmp_path, log, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("hstu_lab.environment.memory_bytes", lambda: 500_000)
    with pytest.raises(TrainingError, match=r"tiny: to train its 47,395 parameters takes 0\.0 GiB .*a smaller preset"):
        train(TINY, log, tmp_path, steps=1, progress=False)
    monkeypatch.setattr("hstu_lab.environment.memory_bytes", lambda: 800_000)
    assert train(TINY, log, tmp_path, steps=1, progress=False).steps == 1


def test_a_log_that_does_not_fit_the_config_is_refused(log):
    with pytest.raises(TrainingError, match=r"num_users is 60, rows for 59 users .* set num_users to 61"):
        fit_config(TINY.replace(num_users=60), log)
    assert fit_config(TINY.replace(num_users=61), log).num_users == 61
    assert fit_config(TINY.replace(num_items=50), log).num_items == 501
    with pytest.raises(ConfigError, match="lower num_time_levels"):
        fit_config(TINY.replace(num_time_levels=512, num_items=10), small_log([[1, 2, 3]], rows=700_000))
    with pytest.raises(EventsError, match="'category'"):
        Trainer(TINY.replace(side_features=(("category", 2),)), log)
    with pytest.raises(TrainingError, match="no user has 2 events"):
        Corpus(small_log([[1], [2]]), TINY.replace(num_items=8))
    with pytest.raises(TrainingError, match="two events or more"):
        evaluate_baseline(MostPopular(log), small_log([[1], []]))


def test_a_run_of_other_settings_or_a_damaged_one_is_not_resumed(tmp_path, log):
    train(TINY, log, tmp_path, steps=2, progress=False)
    with pytest.raises(TrainingError, match=r"lr was 0.003, now 0.01"):
        train(TINY, log, tmp_path, steps=4, lr=0.01, resume=True, progress=False)
    with pytest.raises(TrainingError, match=r"dropout was 0.1, now 0.3"):
        train(TINY.replace(dropout=0.3), log, tmp_path, steps=4, resume=True, progress=False)
    with pytest.raises(TrainingError, match=r"users was 60, now 20"):
        train(TINY, log.select(range(20)), tmp_path, steps=4, resume=True, progress=False)
    state = tmp_path / training.STATE_FILE
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(TrainingError, match=r"state\.safetensors: cannot be read"):
        train(TINY, log, tmp_path, steps=4, resume=True, progress=False)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, log, monkeypatch):
    monkeypatch.setattr(training, "next_item_loss", lambda model, *_: model.item_matrix().sum() * math.nan)
    monkeypatch.setattr(training, "RANKING_SHARE", 0)
    with pytest.raises(TrainingError, match=r"lr is 0\.003: the loss of step 1 is nan"):
        train(TINY, log, tmp_path, steps=4, progress=False)
    assert not (tmp_path / "model.safetensors").exists()
