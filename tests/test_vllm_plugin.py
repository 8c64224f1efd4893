"""The plugin piece by piece, then in the real engine where only that can show it: preemption, biases, bad checkpoints."""

import importlib.metadata
import os
import types

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hstu_lab.config import RAB_KINDS, preset
from hstu_lab.model import HSTU, load_checkpoint, save_checkpoint
from hstu_lab.strategies import best_items
from hstu_lab.tokens import encode_history, level_seconds, pack
from hstu_lab.vllm_engine import ENVIRONMENT, Engine, EngineError, EngineOptions

pytestmark = pytest.mark.timeout(120)
TINY_BLOCK = 2 * 16 * 2 * (16 + 16) * 4
"""Bytes of a block of 16 tokens of the tiny preset, in float32."""


@pytest.fixture(scope="module", autouse=True)
def _vllm_environment():
    """The pieces below import vLLM by themselves: as the engine would, quiet and in one process."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@pytest.fixture(scope="module")
def prompts(tiny_model, tiny_world):
    """Twelve histories of 41 to 52 events as tokens, and the items in them."""
    histories = [tiny_world.history(i)[: 41 + i] for i in range(12)]
    assert [len(h) for h in histories] == list(range(41, 53))
    tokens = [
        encode_history(h.items.tolist(), h.actions.tolist(), h.timestamps.tolist(), i + 1, tiny_model.config)
        for i, h in enumerate(histories)
    ]
    return tokens, [h.items.tolist() for h in histories]


# ---- what slots know


def note(slots, gaps, items, query_offsets, seq_lens, table, at, block_size):
    """One step on a cache of `block_size`; returns the tokens' times and the sequences' history lengths."""
    from hstu_lab.vllm_plugin.attention import HSTUMetadata

    metadata = HSTUMetadata(
        len(at), torch.tensor(query_offsets), torch.tensor(seq_lens), torch.tensor(table).int(), torch.tensor(at)
    )
    slots.note(torch.as_tensor(gaps), torch.as_tensor(items), metadata, torch.empty(40, block_size, 2, 32))
    return metadata.query_times.tolist(), metadata.history_lens.tolist()


def new_slots():
    from hstu_lab.ops import reference
    from hstu_lab.vllm_plugin.slots import Slots

    return Slots(reference)


@pytest.mark.parametrize("seed", range(5))
def test_times_add_up_over_any_chunks(tiny_model, seed):
    """Four sequences read in chunks of random size, scattered over random blocks, get the times of one pass."""
    config, rng = tiny_model.config, torch.Generator().manual_seed(seed)
    seconds, block_size, lengths = torch.tensor(level_seconds(config.num_time_levels)), 4, [1, 7, 16, 33]
    levels = [torch.randint(config.num_time_levels, (n,), generator=rng) for n in lengths]
    tokens = pack(torch.ones(sum(lengths), dtype=torch.int64), 2, torch.cat(levels), config)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    truth = tiny_model.times(tokens, offsets).split(lengths)

    table = 1 + torch.randperm(4 * 9, generator=rng).view(4, 9)
    slots, got, done = new_slots(), [[] for _ in lengths], [0] * 4
    while done != lengths:
        batch = [b for b in range(4) if done[b] < lengths[b]]
        counts = [int(torch.randint(1, lengths[b] - done[b] + 1, (), generator=rng)) for b in batch]
        parts = [(b, torch.arange(done[b], done[b] + n)) for b, n in zip(batch, counts)]
        at = torch.cat([table[b, at // block_size] * block_size + at % block_size for b, at in parts]).tolist()
        for b, n in zip(batch, counts):
            done[b] += n
        gaps = torch.cat([seconds[levels[b][at]] for b, at in parts])
        ends, rows = torch.tensor([0, *counts]).cumsum(0).tolist(), table[batch].tolist()
        times, history = note(slots, gaps, gaps * 0, ends, [done[b] for b in batch], rows, at, block_size)
        assert slots.times.view(-1)[at].tolist() == times
        assert history == [done[b] for b in batch]
        for (b, _), start, end in zip(parts, ends, ends[1:]):
            got[b] += times[start:end]
    assert got == [wanted.tolist() for wanted in truth]


def test_a_new_cache_forgets_the_old_one():
    slots = new_slots()
    assert note(slots, [0, 50], [1, 2], [0, 2], [2], [[0]], [0, 1], 4) == ([0, 50], [2])
    assert note(slots, [7], [3], [0, 1], [3], [[0]], [2], 4) == ([57], [3])
    assert note(slots, [7], [3], [0, 1], [3], [[0]], [2], 8) == ([7], [3])


def test_a_prefix_may_be_shared_in_the_step_that_computes_it():
    """Three requests of one step, each beginning with the blocks that the one before is only now filling."""
    slots = new_slots()
    table = [[1, 0, 0], [1, 2, 0], [1, 2, 3]]
    times, history = note(slots, [0, 10, 20, 30, 40, 50], [1] * 6, [0, 2, 4, 6], [2, 4, 6], table, [2, 3, 4, 5, 6, 7], 2)
    assert times == slots.times.flatten()[2:8].tolist() == [0, 10, 30, 60, 100, 150]
    assert history == [2, 4, 6]


def test_candidates_take_the_last_time_and_are_no_history():
    """Padding (slot -1) between two steps of one request: three events, the mark and candidates."""
    slots = new_slots()
    times, history = note(slots, [5, 6, 7, -1, -1, 99], [1] * 6, [0, 5], [5], [[1, 2]], [4, 5, 6, 7, 8, -1], 4)
    assert (times[:5], history) == ([5, 11, 18, 18, 18], [3])
    assert note(slots, [-1, -1], [1, 1], [0, 2], [7], [[1, 2]], [9, 10], 4) == ([18, 18], [3])


def test_made_up_steps_stay_inside_the_block_table():
    """vLLM warms up its largest CUDA graph with sequences longer than any table; kernels would read block numbers behind it."""
    from hstu_lab.vllm_plugin.attention import HSTUMetadataBuilder

    layer = types.SimpleNamespace(impl=types.SimpleNamespace(slots=new_slots()))
    graphs = types.SimpleNamespace(has_full_cudagraphs=lambda: True)
    compilation = {"static_forward_context": {"layer": layer}, "cudagraph_mode": graphs, "max_cudagraph_capture_size": 8192}
    config = types.SimpleNamespace(compilation_config=types.SimpleNamespace(**compilation))
    builder = HSTUMetadataBuilder(types.SimpleNamespace(block_size=16), ["layer"], config, torch.device("cpu"))
    seq_lens = torch.tensor([8192, 3], dtype=torch.int32)
    common = types.SimpleNamespace(
        seq_lens=seq_lens, block_table_tensor=torch.zeros(2, 6, dtype=torch.int32), max_seq_len=8192, num_actual_tokens=2,
        query_start_loc=torch.tensor([0, 1, 2]), slot_mapping=torch.tensor([-1, -1]),
    )  # fmt: skip
    assert builder.build(0, common).seq_lens.tolist() == [96, 3]
    common.max_seq_len = 96
    assert builder.build(0, common).seq_lens is seq_lens, "a graph must read vLLM's own buffer"
    assert layer.impl.slots.step.slots.tolist() == [-1, -1]


# ---- what prompt embeddings carry


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_gap_level_and_item_survives_embedding(tiny_model, dtype):
    from hstu_lab.vllm_plugin.modeling import attach_token, detach_token
    from hstu_lab.vllm_plugin.slots import CANDIDATE

    level = torch.arange(-1, tiny_model.config.num_time_levels)
    item = torch.randint(0, 2**24, (len(level),), generator=torch.Generator().manual_seed(0))
    item[:4] = torch.tensor([0, 255, 256, 2**24 - 1])
    assert level[0] == CANDIDATE
    x = torch.randn(len(level), tiny_model.config.d_model).to(dtype)
    embeds = attach_token(x, level, item)
    assert embeds.dtype == dtype
    assert embeds.shape == (len(level), tiny_model.config.d_model + 5)
    assert [part.equal(wanted) for part, wanted in zip(detach_token(embeds), (x, level, item))] == [True] * 3


# ---- seen items


def processor(sequences):
    """A processor over sequences (lists of items) that lie in blocks of 4, none of them in block order."""
    from hstu_lab.vllm_plugin.seen_items import SeenItems

    slots = new_slots()
    table = (1 + torch.randperm(3 * len(sequences), generator=torch.Generator().manual_seed(1))).view(-1, 3).tolist()
    at = [row[i // 4] * 4 + i % 4 for row, items in zip(table, sequences) for i in range(len(items))]
    lens = [len(items) for items in sequences]
    items = [item for items in sequences for item in items]
    note(slots, [0] * len(at), items, torch.tensor([0, *lens]).cumsum(0).tolist(), lens, table, at, 4)
    slots.step = types.SimpleNamespace(seq_lens=torch.tensor(lens), block_table=torch.tensor(table))
    layer = types.SimpleNamespace(impl=types.SimpleNamespace(slots=slots))
    graphs = types.SimpleNamespace(has_full_cudagraphs=lambda: True)
    compilation = {"static_forward_context": {"layer": layer}, "cudagraph_mode": graphs, "max_cudagraph_capture_size": 8192}
    config = types.SimpleNamespace(compilation_config=types.SimpleNamespace(**compilation))
    return SeenItems(config, torch.device("cpu"), False)


def params(seen):
    from vllm import SamplingParams

    return SamplingParams(extra_args=None if seen is None else {"seen": seen})


def update(*added, removed=(), moved=()):
    from vllm.v1.sample.logits_processor import BatchUpdate

    return BatchUpdate(batch_size=4, removed=list(removed), added=list(added), moved=list(moved))


def masked(seen_items, rows=3):
    """Masked items of each row of a batch of `rows` requests over ten items."""
    return [row.isinf().nonzero().flatten().tolist() for row in seen_items.apply(torch.zeros(rows, 10))]


def test_given_items_and_those_of_the_sequence_are_masked_in_their_own_row():
    seen_items = processor([[1, 7, 1, 9, 4], [5, 6], [3]])
    seen_items.update_state(update((0, params([2, 5]), None, []), (1, params(None), None, []), (2, params([]), None, [])))
    assert masked(seen_items) == [[1, 2, 4, 5, 7, 9], [], [3]]
    seen_items.update_state(None)
    assert masked(seen_items) == [[1, 2, 4, 5, 7, 9], [], [3]]


def test_requests_without_the_argument_are_left_alone():
    seen_items = processor([[1], [2]])
    seen_items.update_state(update((0, params(None), None, []), (1, params(None), None, [])))
    assert masked(seen_items, rows=2) == [[], []]


def test_masks_move_and_go_with_their_requests():
    from vllm.v1.sample.logits_processor import MoveDirectionality

    seen_items = processor([[1], [1], [1]])
    seen_items.update_state(update((0, params([4]), None, []), (1, params([6]), None, []), (2, params([8]), None, [])))
    seen_items.update_state(update(moved=[(0, 2, MoveDirectionality.SWAP)]))
    assert masked(seen_items) == [[1, 8], [1, 6], [1, 4]]
    seen_items.update_state(update(removed=[0], moved=[(2, 0, MoveDirectionality.UNIDIRECTIONAL)]))
    assert masked(seen_items) == [[1, 4], [1, 6], []]
    seen_items.update_state(update((1, params(None), None, [])))
    assert masked(seen_items) == [[1, 4], [], []]
    seen_items.update_state(update((1, params([]), None, [])))
    seen_items.update_state(update(removed=[1]))
    assert masked(seen_items) == [[1, 4], [], []]


def test_ids_that_are_no_items_mask_nothing():
    seen_items = processor([[-1, 12, 2]])
    seen_items.update_state(update((0, params([10, 99, 3]), None, [])))
    assert masked(seen_items, rows=1) == [[2, 3]]


@pytest.mark.parametrize("seen", [[1, -1], [1.5], (1, 2), "12", 7], ids=str)
def test_a_bad_list_of_seen_items_is_refused(seen):
    from hstu_lab.vllm_plugin.seen_items import SeenItems

    with pytest.raises(ValueError, match="seen"):
        SeenItems.validate_params(params(seen))


@pytest.mark.parametrize("seen", [None, [], [0, 3]], ids=str)
def test_a_good_list_of_seen_items_is_taken(seen):
    from hstu_lab.vllm_plugin.seen_items import SeenItems

    SeenItems.validate_params(params(seen))


# ---- registration


def test_registering_twice_is_registering_once():
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from hstu_lab.vllm_plugin import register
    from hstu_lab.vllm_plugin.modeling import HSTUPretrainedConfig

    register()
    known = list(ModelRegistry.get_supported_archs())
    register()
    assert list(ModelRegistry.get_supported_archs()) == known
    assert known.count("HSTUForRecommendation") == 1
    assert isinstance(AutoConfig.for_model("hstu_lab"), HSTUPretrainedConfig)


def test_vllm_finds_the_plugin_by_its_entry_point():
    from hstu_lab.vllm_plugin import register

    points = {point.name: point for point in importlib.metadata.entry_points(group="vllm.general_plugins")}
    assert points["hstu_lab"].load() is register


# ---- the real engine


def test_the_callers_environment_wins(tiny_checkpoint, monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "CRITICAL")
    with Engine(tiny_checkpoint, EngineOptions(kv_cache_memory_bytes=64 * TINY_BLOCK)):
        assert {name: os.environ[name] for name in ENVIRONMENT} == ENVIRONMENT | {"VLLM_LOGGING_LEVEL": "CRITICAL"}


def test_the_memory_given_becomes_blocks_and_a_bad_request_stops_nobody(tiny_checkpoint, prompts):
    tokens, seen = prompts
    with Engine(tiny_checkpoint, EngineOptions(kv_cache_memory_bytes=21 * TINY_BLOCK - 1)) as engine:
        assert engine.engine.vllm_config.cache_config.num_gpu_blocks == 20
        with pytest.raises(EngineError, match=r"refused.*seen"):
            engine.topk([tokens[0]], [[-1]], 3)
        assert len(engine.topk([tokens[0]], [seen[0]], 3)[0].items) == 3
        with pytest.raises(EngineError, match="k is 0"):
            engine.topk([tokens[0]], [[]], 0)


@pytest.mark.parametrize("cached_scores", [True, False])
def test_a_catalog_smaller_than_what_is_asked_for_gives_all_of_it(tmp_path, cached_scores):
    """Two items and the row that is none: lists, slates and scores, alone and in one step."""
    model = HSTU(preset("tiny").replace(num_items=3, num_users=0, side_features=())).eval()
    model.known_items[1:] = True
    save_checkpoint(model, tmp_path)
    options = EngineOptions(kv_cache_memory_bytes=8 << 20, prompt_embeds=False, cached_scores=cached_scores)
    with torch.inference_mode():
        [expected] = model.rank(torch.tensor([1, 1]), torch.tensor([0, 2]), torch.tensor([[2, 1]]))
    with Engine(tmp_path, options) as engine:
        with engine.held():
            scores = engine.submit_score([1, 1], [2, 1])
            futures = [engine.submit_topk([1, 1], [], 100), engine.submit_slate([1, 1], [], 10), engine.submit_topk([], [], 5)]
            while engine.turn():
                pass
        assert [future.result().items for future in futures[:2]] == [[2], [2]]
        with pytest.raises(EngineError, match="refused"):
            futures[2].result()
        for got in (scores.result(), *engine.score([[1, 1]], [[2, 1]])):
            torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
        assert engine.score([[1, 1]], [[]])[0].shape == (0, 3)


def test_prompts_that_share_a_prefix_may_come_together(tiny_checkpoint, prompts):
    """One user three times, and every shorter history of that user, all in the same steps of a cold engine."""
    [longest, *_], [items, *_] = prompts
    lengths = [len(longest)] * 3 + [17, 33, 32, 16, 40]
    tokens, seen = [longest[:n] for n in lengths], [items[: n - 1] for n in lengths]
    model = load_checkpoint(tiny_checkpoint)
    with Engine(tiny_checkpoint, EngineOptions(kv_cache_memory_bytes=100 * TINY_BLOCK)) as engine:
        answers = engine.topk(tokens, seen, 50)
        assert any(answer.cached_tokens for answer in answers), "no prefix was shared: the test shows nothing"
        engine.reset_prefix_cache()
        generated = engine.slate(tokens, seen, 10)
    assert [answer.items for answer in answers] == dense_topk(model, tokens, seen, 50)
    assert [answer.items for answer in generated] == slates(model, tokens, seen)


def test_preemption_changes_no_list(tiny_checkpoint, prompts, monkeypatch):
    """Twelve slates that need up to 48 blocks share 13: some lose their blocks halfway and are computed again."""
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted, preempt = [], Scheduler._preempt_request

    def noting(self, request, *args, **kwargs):
        preempted.append(request.num_output_tokens)
        return preempt(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", noting)
    tokens, seen = prompts
    wanted = slates(load_checkpoint(tiny_checkpoint), tokens, seen)
    for caching in (True, False):
        preempted.clear()
        options = EngineOptions(kv_cache_memory_bytes=14 * TINY_BLOCK, enable_prefix_caching=caching, fused_slates=False)
        with Engine(tiny_checkpoint, options) as engine:
            assert [answer.items for answer in engine.slate(tokens, seen, 10)] == wanted
        assert any(preempted), "nobody was preempted after a first item: the test shows nothing"


@pytest.mark.parametrize("rab", RAB_KINDS)
def test_every_kind_of_bias_is_served(tiny_model, tmp_path, prompts, rab):
    model = HSTU(tiny_model.config.replace(rab=rab)).eval()
    wanted = model.state_dict()
    model.load_state_dict({name: tensor for name, tensor in tiny_model.state_dict().items() if name in wanted})
    save_checkpoint(model, tmp_path)
    tokens, seen = prompts
    with Engine(tmp_path, EngineOptions(kv_cache_memory_bytes=100 * TINY_BLOCK)) as engine:
        best, generated = engine.topk(tokens, seen, 50), engine.slate(tokens, seen, 10)
    for answer, expected, history in zip(best, dense_topk(model, tokens, seen, 50), tokens):
        logits = model.logits(model.dense(torch.tensor(history), torch.tensor([0, len(history)]))[0, -1:])[0]
        assert sorted(answer.items) == sorted(expected)
        for a, b in zip(answer.items, expected):  # two items of one user tie in the reference to the last bit
            assert a == b or (logits[a] - logits[b]).abs() < 1e-6
    assert [answer.items for answer in generated] == slates(model, tokens, seen)


def test_the_kinds_of_bias_give_different_lists(tiny_model, prompts):
    """Else the test above would pass with any bias, or none."""
    lists = []
    for rab in RAB_KINDS:
        model = HSTU(tiny_model.config.replace(rab=rab)).eval()
        wanted = model.state_dict()
        model.load_state_dict({name: tensor for name, tensor in tiny_model.state_dict().items() if name in wanted})
        lists.append(dense_topk(model, *prompts, 50))
    assert all(a != b for i, one in enumerate(lists) for other in lists[:i] for a, b in zip(one, other))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tensors: tensors.update({"tables.extra": torch.zeros(1)}), r"tables\.extra is unknown"),
        (lambda tensors: tensors.pop("stack.final_norm.weight"), r"stack\.final_norm\.weight"),
    ],
    ids=["unknown", "missing"],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tiny_checkpoint, tmp_path, spoil, message):
    save_checkpoint(load_checkpoint(tiny_checkpoint), tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    spoil(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=message):
        Engine(tmp_path, EngineOptions(kv_cache_memory_bytes=64 * TINY_BLOCK))


@torch.inference_mode()
def dense_topk(model, tokens, seen, k):
    offsets = torch.tensor([0, *map(len, tokens)]).cumsum(0)
    hidden = model.dense(torch.tensor([token for history in tokens for token in history]), offsets)
    return best_items(model.logits(hidden[torch.arange(len(tokens)), offsets.diff() - 1]), seen, k)


def slates(model, tokens, seen):
    """Ten items each, one dense pass an item: no cache that could be wrong in the same way."""
    generated = [[] for _ in tokens]
    for _ in range(10):
        grown = [t + g for t, g in zip(tokens, generated)]
        best = dense_topk(model, grown, [s + g for s, g in zip(seen, generated)], 1)
        for own, item in zip(generated, best):
            own += item
    return generated
