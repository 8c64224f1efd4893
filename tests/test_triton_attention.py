"""Jagged attention in Triton against the oracle: in the interpreter here, compiled on a GPU."""

import random

import pytest
import torch
from triton_cases import BIASES, DEVICE, GPU, LIMITS, attention_case, error, reference, triton_bias, triton_ops, triton_tiles

UNEVEN = [1, 0, 16, 17, 33, 40]
BLOCK_EDGES = [0, 1, 15, 16, 17, 31, 32, 33]
cpu_only = pytest.mark.skipif(GPU, reason="the interpreter's small tiles; the GPU tests draw longer sequences")


@cpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bias", BIASES)
def test_equals_the_oracle(bias, dtype):
    assert error(*attention_case(UNEVEN, bias=bias, dtype=dtype)) < LIMITS[dtype]


@cpu_only
@pytest.mark.parametrize("bias", ["none", "both"])
def test_candidates_see_the_history_and_themselves(bias):
    got, expected = attention_case([40, 5, 20, 3], bias=bias, candidates=[7, 5, 0, 1], num_context=1)
    assert error(got, expected) < 1e-5


@cpu_only
@pytest.mark.parametrize("bias", ["position", "time", "both"])
@pytest.mark.parametrize("candidates", [None, [7, 5, 0, 1]])
def test_position_bias_added_after_the_product(bias, candidates, monkeypatch):
    """What Hopper does where there is a time bias: the loop over tiles that are looked up needs no barrier and is pipelined."""
    tiles = triton_tiles.Tiles(16, 16, 16, after=True)
    monkeypatch.setattr("hstu_lab.ops.triton_attention.default_tiles", lambda *arguments: tiles)
    got, expected = attention_case([64, 5, 20, 3], bias=bias, candidates=candidates)
    assert error(got, expected) < 1e-5


@cpu_only
def test_context_prefix_sees_itself_whole():
    with_context = attention_case([40, 2], num_context=20, bias="position")
    assert error(*with_context) < 1e-5
    assert error(with_context[0], attention_case([40, 2], num_context=0, bias="position")[0]) > 1e-2


@cpu_only
@pytest.mark.parametrize("seed", range(3))
def test_random_lengths_and_widths(seed):
    draw = random.Random(seed)
    lengths = draw.sample(BLOCK_EDGES, 4)
    options = {
        "d": draw.choice([8, 25, 32]),
        "dv": draw.choice([16, 50]),
        "heads": draw.choice([1, 3]),
        "bias": draw.choice(BIASES),
    }
    assert error(*attention_case(lengths, seed=seed, **options)) < 1e-5


@cpu_only
def test_times_out_of_order():
    assert error(*attention_case([48, 33], bias="time", in_order=False)) < 1e-5


def timed_case(times, **options):
    g = torch.Generator().manual_seed(0)
    n = len(times)
    q, k, v = (torch.randn(n, 1, 16, generator=g).to(DEVICE) for _ in range(3))
    arguments = {
        "divisor": n, "bias": reference.RelativeBias(time=torch.randn(1, 64, generator=g).to(DEVICE)), "times": times.to(DEVICE),
        "offsets": torch.tensor([0, n], device=DEVICE),
    }  # fmt: skip
    return (ops.attention_jagged(q, k, v, **arguments, **o) for ops, o in ((triton_ops, options), (reference, {})))


@pytest.mark.parametrize("step", [1, 37, 100, 3600])
def test_bucket_boundaries_at_every_column_of_a_tile(step):
    """Even times put a boundary before, at and behind every key of a tile; tiles with more than four are looked up."""
    got, expected = timed_case(1_700_000_000 + step * torch.arange(150))
    assert error(got, expected) < 1e-5


def test_a_tile_out_of_order_inside_is_looked_up():
    """First and last key of every tile in order, one in the middle not: its column is no bucket boundary."""
    times = 1_700_000_000 + 1000 * torch.arange(96)
    times[5] += 40_000
    times[38] -= 30_000
    got, expected = timed_case(times)
    assert error(got, expected) < 1e-5


@cpu_only
def test_positions_beyond_the_table_share_its_last_entry():
    assert error(*attention_case([50], bias="position", max_seq_len=20)) < 1e-5


def test_no_rows_at_all():
    got, expected = attention_case([0, 0])
    assert got.shape == expected.shape == (0, 2, 16)


def test_bucket_cells_agree_with_the_thresholds():
    thresholds = reference.time_thresholds(64)
    octaves = [2**o * q // 4 for o in range(2, 31) for q in (4, 5, 6, 7)]
    seconds = {s + e for s in (*thresholds, *octaves) for e in (-65, -1, 0, 1, 65)} | set(range(2000))
    seconds = torch.tensor(sorted(s for s in seconds if 0 <= s < 2**31 - 1))
    _, cells = triton_bias.bucket_tables(64, torch.device("cpu"))
    entry = cells[seconds.to(torch.int32).float().view(torch.int32) >> 21]
    bucket = (entry >> 32) + (seconds >= (entry & 0xFFFFFFFF))
    assert torch.equal(bucket, reference.time_bucket(seconds, 64))


def test_refuses_what_it_would_compute_wrongly():
    q, offsets = torch.randn(4, 2, 16, device=DEVICE), torch.tensor([0, 4], device=DEVICE)
    bias = reference.RelativeBias(time=torch.zeros(2, 64, device=DEVICE))
    with pytest.raises(ValueError, match="times is None"):
        triton_ops.attention_jagged(q, q, q, offsets, divisor=8, bias=bias)
    with pytest.raises(ValueError, match="at most 72"):
        triton_bias.bucket_tables(80, torch.device("cpu"))
    q = q.double()
    with pytest.raises(TypeError, match="float64"):
        triton_ops.attention_jagged(q, q, q, offsets, divisor=8)


@cpu_only
def test_interpreter_refuses_bfloat16():
    with pytest.raises(TypeError, match="bfloat16"):
        attention_case([4], dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
@pytest.mark.parametrize("mode", [(None, 1), (None, 5), ("candidates", 1)], ids=["causal", "context", "candidates"])
@pytest.mark.parametrize(("d", "dv"), [(50, 50), (64, 64), (128, 64)])
def test_200_random_batches_on_the_gpu(d, dv, mode, dtype):
    """23 batches each, 207 a dtype: lengths 0, 1 and block edges among them, every bias, times in order and not.

    One kind of kernel a test, since compiling it is most of the work.
    """
    candidates, num_context = mode
    for seed in range(23):
        draw = random.Random(f"{d} {dv} {mode} {seed}")
        edges = [0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 500, 640]
        lengths = [draw.choice(edges) if draw.random() < 0.6 else draw.randrange(700) for _ in range(draw.randrange(1, 9))]
        if sum(lengths) == 0:
            lengths.append(1)
        options = {
            "heads": draw.choice([1, 2, 4]), "d": d, "dv": dv, "bias": BIASES[seed % len(BIASES)], "dtype": dtype,
            "max_seq_len": 1024, "candidates": [draw.randrange(n + 1) for n in lengths] if candidates else None,
            "num_context": num_context, "in_order": draw.random() < 0.8,
        }  # fmt: skip
        got = error(*attention_case(lengths, seed=seed, **options))
        assert got <= LIMITS[dtype], (seed, lengths, options, got)


@pytest.mark.gpu
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("bias", BIASES)
def test_long_sequences_on_the_gpu(bias, d):
    """The tiles that long input gets, masked and unmasked loops both busy."""
    got = error(*attention_case([2048, 1, 1500, 1025], heads=4, d=d, dv=d, bias=bias, dtype=torch.bfloat16, max_seq_len=2048))
    assert got <= LIMITS[torch.bfloat16]


@cpu_only
def test_a_long_history_is_prepared_in_parts():
    """Tiles of 16 in the interpreter: 420 events are 27 tiles of keys, enough for several programs to share a row of tiles."""
    assert triton_bias.parts_of(27) > 1
    assert error(*attention_case([420], heads=1, bias="both", max_seq_len=512)) < 1e-5
