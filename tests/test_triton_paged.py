"""Paged attention in Triton against the oracle, unwritten slots poisoned."""

import random

import pytest
import torch
from triton_cases import GPU, LIMITS, error, paged_case

cpu_only = pytest.mark.skipif(GPU, reason="the interpreter's small tiles; the GPU tests draw longer sequences")


@cpu_only
@pytest.mark.parametrize("bias", ["none", "both"])
def test_decode_one_query_each(bias):
    assert error(*paged_case([5, 50, 16, 1], [1, 1, 1, 1], bias=bias)) < 1e-5


@cpu_only
@pytest.mark.parametrize("num_context", [0, 3])
def test_extend_prefill_and_idle_sequences(num_context):
    assert error(*paged_case([5, 40, 17], [5, 20, 0], bias="both", num_context=num_context)) < 1e-5


@cpu_only
def test_candidates():
    assert error(*paged_case([5, 40, 17], [3, 18, 1], candidates=True, bias="both")) < 1e-5


@cpu_only
def test_half_precision_odd_widths_and_32_bit_tables():
    got, expected = paged_case([33, 9], [2, 1], d=25, dv=50, heads=3, dtype=torch.float16, table_dtype=torch.int32)
    assert error(got, expected) < LIMITS[torch.float16]


@cpu_only
def test_pages_that_are_no_power_of_two_are_refused():
    with pytest.raises(ValueError, match="powers of two"):
        paged_case([5], [1], page=3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
@pytest.mark.parametrize("chunk", range(5))
def test_random_batches_on_the_gpu(dtype, chunk):
    """10 batches a chunk: decode, extend and candidates, split and whole keys, every bias."""
    for seed in range(10 * chunk, 10 * chunk + 10):
        draw = random.Random(seed)
        seq_lens = [draw.choice([1, 2, 63, 64, 65, 128, draw.randrange(1, 900)]) for _ in range(draw.randrange(1, 7))]
        candidates = draw.random() < 0.3
        most = draw.choice([1, 20, 200])
        counts = [draw.randrange(1, most + 1) if candidates else draw.randrange(1, min(most, n) + 1) for n in seq_lens]
        d, num_context, page, table_dtype = draw.choice(
            [(50, 1, 16, torch.int32), (64, 1, 64, torch.int64), (128, 4, 16, torch.int64), (128, 4, 128, torch.int32)]
        )
        options = {
            "heads": draw.choice([1, 4]), "d": d, "dv": d, "bias": draw.choice(["none", "both"]), "dtype": dtype,
            "candidates": candidates, "num_context": num_context, "page": page, "max_seq_len": 1024, "table_dtype": table_dtype,
        }  # fmt: skip
        got = error(*paged_case(seq_lens, counts, seed=seed, **options))
        assert got <= LIMITS[dtype], (seed, seq_lens, counts, options, got)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_chunks_without_a_bias_on_the_gpu(dtype, monkeypatch):
    """The kernel that Hopper has for them, split and whole; fewer tiles than buffers, idle sequences, pages of every kind."""
    launched = []
    if torch.cuda.get_device_capability()[0] == 9:
        from hstu_lab.ops import triton_extend

        launch = triton_extend.launch
        monkeypatch.setattr(triton_extend, "launch", lambda *args, **kw: (launched.append(kw["tiles"]), launch(*args, **kw)))
    for seed in range(20):
        draw = random.Random(seed)
        batch, longest = draw.choice([(1, 2000), (3, 1200), (70, 200)])
        seq_lens = [draw.choice([1, 63, 64, 65, 128, draw.randrange(1, longest)]) for _ in range(batch)]
        counts = [draw.choice([0, n, draw.randrange(1, n + 1)]) for n in seq_lens]
        counts[0] = max(1, counts[0])
        d, page = draw.choice([64, 128]), draw.choice([8, 16, 32, 64, 256])
        options = {"heads": draw.choice([1, 4]), "d": d, "dv": d, "dtype": dtype, "page": page, "max_seq_len": 1024}
        got = error(*paged_case(seq_lens, counts, seed=seed, **options))
        assert got <= LIMITS[dtype], (seed, seq_lens, counts, options, got)
    for seed in range(6):  # more than 204 queries: four groups share a program, and some of them are idle
        draw = random.Random(seed)
        seq_lens = [draw.choice([256, 257, 320, draw.randrange(256, 700)]) for _ in range(33)]
        counts = [draw.choice([0, 1, 64, 65, 128, 129, 200]) for _ in seq_lens]
        counts[0] = draw.choice([205, 240, 256])
        options = {"heads": 4, "d": 64, "dv": 64, "dtype": dtype, "page": draw.choice([8, 16, 64]), "max_seq_len": 1024}
        got = error(*paged_case(seq_lens, counts, seed=seed, **options))
        assert got <= LIMITS[dtype], (seed, seq_lens, counts, options, got)
    if torch.cuda.get_device_capability()[0] == 9:
        assert {1} < {tiles.splits for tiles in launched}
        assert {(tiles.groups, tiles.resident) for tiles in launched} == {(1, 2), (1, 3), (4, 1)}


def history_case(seed: int, dtype=torch.float32, heads=2, d=16, page=4, longest=40, bias="both"):
    """Error of a batch whose sequences end in candidates that lie in the cache, cut into chunks at random."""
    draw = random.Random(seed)
    seq_lens = [draw.randrange(1, longest) for _ in range(4)]
    history = [n if draw.random() < 0.3 else draw.randrange(1, n + 1) for n in seq_lens]
    counts = [draw.choice([1, draw.randrange(1, n + 1)]) for n in seq_lens]
    options = {"heads": heads, "d": d, "dv": d, "bias": bias, "dtype": dtype, "page": page, "max_seq_len": max(64, longest)}
    return error(*paged_case(seq_lens, counts, seed=seed, history_lens=history, **options))


@cpu_only
@pytest.mark.parametrize("seed", range(3))
def test_candidates_in_the_cache(seed):
    assert history_case(seed) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
def test_candidates_in_the_cache_on_the_gpu(dtype):
    for seed in range(30):
        page, d = random.Random(seed).choice([(16, 64), (64, 64), (128, 128)])
        assert history_case(seed, dtype, d=d, page=page, longest=900) <= LIMITS[dtype], seed


def test_candidates_in_the_cache_are_candidates_beside_it():
    """The oracle against itself: a candidate in its slot, or given as its own key and value, has the same answer."""
    from hstu_lab.ops import reference

    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, 8, generator=g) for _ in range(3))
    keys, values = torch.randn(2, 6, 4, 2, 8, generator=g)
    times = torch.randint(0, 1000, (6, 4), generator=g)
    times[1, 1:] = times[1, 0]
    bias = reference.RelativeBias(torch.randn(2, 16, generator=g), torch.randn(2, 64, generator=g))
    table, offsets, history = torch.tensor([[3, 1, 0]]), torch.tensor([0, 3]), torch.tensor([5])
    common = {"divisor": 16, "bias": bias, "query_times": times[1, 1:], "slot_times": times}
    beside = reference.attention_paged(q, keys, values, table, offsets, history, candidates=(k, v), **common)
    keys[1, 1:], values[1, 1:] = k, v
    within = reference.attention_paged(q, keys, values, table, offsets, torch.tensor([8]), history_lens=history, **common)
    torch.testing.assert_close(within, beside)
