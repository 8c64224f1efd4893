"""The model's passes give one answer; its checkpoints are read back or refused by name."""

import json
import struct

import pytest
import torch

from hstu_lab.config import PRESETS, ModelConfig, preset
from hstu_lab.model import HSTU, CheckpointError, KVCache, load_checkpoint, load_config, save_checkpoint
from hstu_lab.tables import parameter_groups


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def random_model(rab="position+time", seed=0, **changes) -> HSTU:
    """A model whose biases and MLPs are random too, so that nothing hides behind a zero initialisation."""
    torch.manual_seed(seed)
    model = HSTU(preset("tiny").replace(rab=rab, **changes))
    for name, parameter in model.named_parameters():
        if "bias" in name or "down" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    config = model.config
    for row, (_, rows) in zip(model.tables.item_features, config.side_features):
        row[1:] = torch.randint(1, rows, (config.num_items - 1,))
    return model.eval()


def random_tokens(config: ModelConfig, lengths, seed=0):
    """Jagged histories with a user token each: (tokens, offsets)."""
    g = torch.Generator().manual_seed(seed)
    parts, sizes = [], []
    for n in lengths:
        item = torch.randint(1, config.num_items, (n,), generator=g)
        action = torch.randint(0, config.num_actions, (n,), generator=g)
        level = torch.randint(0, config.num_time_levels, (n,), generator=g)
        events = item + config.num_items * (action + config.num_actions * level)
        user = torch.randint(0, max(config.num_users, 1), (config.num_context,), generator=g) + config.user_token_base
        parts += [user, events]
        sizes.append(n + config.num_context)
    return torch.cat(parts), torch.tensor([0, *sizes]).cumsum(0)


LENGTHS = [0, 1, 7, 15, 16, 17, 40, 53]


@pytest.mark.parametrize("rab", ["none", "position", "position+time"])
@pytest.mark.parametrize("num_users", [0, 301])
def test_dense_jagged_and_cached_passes_agree(rab, num_users):
    model = random_model(rab, num_users=num_users)
    lengths = LENGTHS if num_users else LENGTHS[1:]
    tokens, offsets = random_tokens(model.config, lengths)
    jagged = model.logits(model.jagged(tokens, offsets))
    dense = model.dense(tokens, offsets)
    inside = torch.arange(dense.shape[1]) < offsets.diff().unsqueeze(-1)
    torch.testing.assert_close(model.logits(dense[inside]), jagged, atol=1e-4, rtol=0)

    cache = KVCache(model.config, len(lengths), block_size=16)
    cached = torch.empty_like(jagged)
    sizes, done = offsets.diff(), torch.zeros(len(lengths), dtype=torch.int64)
    for chunk in (3, 11, 1, 1, 64):
        counts = (sizes - done).clamp(max=chunk)
        rows = torch.cat([torch.arange(o + d, o + d + c) for o, d, c in zip(offsets.tolist(), done.tolist(), counts.tolist())])
        step = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        cached[rows] = model.logits(model.extend(tokens[rows], step, cache))
        done += counts
    assert bool((done == sizes).all())
    torch.testing.assert_close(cached, jagged, atol=1e-4, rtol=0)


def test_candidates_agree_in_every_pass_and_do_not_see_each_other():
    model = random_model()
    config, lengths = model.config, [1, 5, 30]
    tokens, offsets = random_tokens(config, lengths)
    candidates = torch.arange(1, 10).repeat(3, 1)
    parts = [torch.cat([tokens[a:b], c]) for a, b, c in zip(offsets, offsets[1:], candidates)]
    both = offsets + torch.arange(4) * 9
    hidden = model.jagged(torch.cat(parts), both, torch.full((3,), 9))
    scores = torch.stack([hidden[b - 9 : b] for b in both[1:]])

    cache = KVCache(config, 3)
    model.extend(tokens, offsets, cache)
    cached = model.score_candidates(candidates.flatten(), torch.arange(4) * 9, cache).view(3, 9, -1)
    torch.testing.assert_close(cached, scores, atol=1e-4, rtol=0)
    assert cache.seq_lens.tolist() == [n + 1 for n in lengths], "scoring must leave the cache as it was"

    alone = model.score_candidates(candidates[:, :1].flatten(), torch.arange(4), cache).view(3, 1, -1)
    torch.testing.assert_close(alone, scores[:, :1], atol=1e-4, rtol=0)


def test_a_wrong_block_table_is_noticed():
    model = random_model()
    tokens, offsets = random_tokens(model.config, [20, 30])
    truth = model.logits(model.jagged(tokens, offsets))[offsets[1:] - 1]
    caches = [KVCache(model.config, 2, block_size=8) for _ in range(2)]
    heads = torch.cat([torch.arange(0, 20), torch.arange(21, 51)])
    first = torch.tensor([0, 20, 50])
    last = torch.tensor([20, 51])
    results = []
    for cache, wrong in zip(caches, (False, True)):
        model.extend(tokens[heads], first, cache)
        if wrong:
            cache.block_table[0, 0], cache.block_table[1, 0] = cache.block_table[1, 0].clone(), cache.block_table[0, 0].clone()
        results.append(model.logits(model.extend(tokens[last], torch.tensor([0, 1, 2]), cache)))
    torch.testing.assert_close(results[0], truth, atol=1e-4, rtol=0)
    finite = torch.isfinite(truth)
    assert (results[1] - truth)[finite].abs().max() > 0.01


def test_history_beyond_the_cache_is_refused():
    model = random_model()
    cache = KVCache(model.config, 1)
    tokens, offsets = random_tokens(model.config, [70])
    with pytest.raises(ValueError, match="max_seq_len is 64"):
        model.extend(tokens, offsets, cache)


def test_the_past_does_not_see_the_future():
    model = random_model()
    tokens, offsets = random_tokens(model.config, [30])
    changed = tokens.clone()
    changed[20:] = random_tokens(model.config, [30], seed=9)[0][20:]
    before, after = model.jagged(tokens, offsets), model.jagged(changed, offsets)
    torch.testing.assert_close(before[:20], after[:20])
    assert not torch.allclose(before[20:], after[20:])


@pytest.mark.parametrize("name", ["tiny", "small", "ml-1m", "ml-1m-large", "gr-3b"])
def test_parameter_calculator_equals_the_model(name):
    config = preset(name)
    if name == "gr-3b":
        with torch.device("meta"):
            from hstu_lab.tables import Tables

            model = HSTU(config, tables=Tables(config, device="meta"))
    else:
        model = HSTU(config)
    counted = {}
    for parameter_name, parameter in model.named_parameters():
        top = parameter_name.split(".")[0]
        counted[top] = counted.get(top, 0) + parameter.numel()
    groups = parameter_groups(config)
    for top, count in counted.items():
        assert sum(g.count for g in groups if g.name.split(".")[0] == top) == count, top
    assert sum(g.count for g in groups) == sum(p.numel() for p in model.parameters())


def test_gr_3b_holds_3_2_billion_parameters():
    total = sum(g.count for g in parameter_groups(PRESETS["gr-3b"]))
    assert abs(total / 3.2e9 - 1) < 0.01


def test_checkpoint_round_trip(tmp_path):
    model = random_model()
    save_checkpoint(model, tmp_path)
    loaded = load_checkpoint(tmp_path)
    assert loaded.config == model.config == load_config(tmp_path)
    for (name, a), (_, b) in zip(model.state_dict().items(), loaded.state_dict().items()):
        assert torch.equal(a, b), name
    assert json.loads((tmp_path / "config.json").read_text())["hstu"]["d_model"] == model.config.d_model


def rewrite_metadata(path, change):
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


def other_version(header):
    config = json.loads(header["__metadata__"]["config"])
    header["__metadata__"]["config"] = json.dumps({**config, "schema_version": 99})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.unlink(), "no such file"),
        (lambda p: p.write_bytes(b""), "not a readable safetensors"),
        (lambda p: p.write_bytes(b"\x80\x04garbage" * 50), "not a readable safetensors"),
        (lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]), "safetensors|read"),
        (lambda p: rewrite_metadata(p, other_version), "schema_version is 99"),
        (lambda p: rewrite_metadata(p, lambda h: h["__metadata__"].pop("config")), "no 'config'"),
    ],
)
def test_damaged_checkpoints_are_refused_in_one_line(tmp_path, damage, message):
    save_checkpoint(random_model(), tmp_path)
    damage(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message) as raised:
        load_checkpoint(tmp_path)
    assert "\n" not in str(raised.value)
    assert "model.safetensors" in str(raised.value)


def test_a_checkpoint_with_nan_is_refused(tmp_path):
    model = random_model()
    model.stack.layers[0].uvqk.weight[0, 0] = torch.nan
    save_checkpoint(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"stack\.layers\.0\.uvqk\.weight holds NaN"):
        load_checkpoint(tmp_path)
