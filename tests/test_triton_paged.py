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
