"""Random input for the tests of the Triton kernels, and the kernels: interpreted on the CPU, compiled where there is a GPU."""

import torch
import triton

GPU = torch.cuda.is_available()
interpret = triton.knobs.runtime.interpret
triton.knobs.runtime.interpret = not GPU  # only while the kernels are defined: other tests use Triton as it is
from hstu_lab.ops import (  # noqa: E402
    reference,
    triton_bias,
    triton_candidates,
    triton_decode,
    triton_encoder,
    triton_ends,
    triton_kv_write,
    triton_ops,
    triton_serving,
    triton_tiles,
)

triton.knobs.runtime.interpret = interpret

DEVICE = "cuda" if GPU else "cpu"
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest relative Frobenius error against the float32 oracle."""
BIASES = ("none", "position", "time", "both")

__all__ = [
    "BIASES",
    "DEVICE",
    "GPU",
    "LIMITS",
    "attention_case",
    "error",
    "paged_case",
    "reference",
    "triton_bias",
    "triton_candidates",
    "triton_decode",
    "triton_encoder",
    "triton_ends",
    "triton_kv_write",
    "triton_ops",
    "triton_serving",
    "triton_tiles",
]


def error(got, expected):
    """Relative Frobenius error; NaN (a row not written, on poisoned memory) passes no limit."""
    return ((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


def random_bias(kind, heads, positions, buckets, dtype, generator):
    position, time = (torch.randn(heads, n, generator=generator).to(dtype).to(DEVICE) for n in (positions, buckets))
    if kind == "none":
        return None
    return reference.RelativeBias(position if kind != "time" else None, time if kind != "position" else None)


def random_times(lengths, generator, in_order=True):
    """Unix seconds (T,): bursts minutes apart, days between them; out of order on request."""
    total = sum(lengths)
    gaps = torch.empty(total).exponential_(1 / 40, generator=generator)
    long = torch.rand(total, generator=generator) < 0.1
    times = 1_700_000_000 + torch.where(long, gaps * 3000, gaps).long().cumsum(0)
    return times if in_order else times[torch.randperm(total, generator=generator)]


def attention_case(
    lengths, *, seed=0, heads=2, d=16, dv=16, bias="none", dtype=torch.float32, max_seq_len=64, candidates=None, num_context=0,
    buckets=64, in_order=True,
):  # fmt: skip
    """(got, expected) of attention over sequences of these lengths; q, k, v are slices of one tensor, as in the model."""
    g = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    packed = torch.randn(total, heads * (2 * d + dv), generator=g).to(dtype).to(DEVICE)
    q, k, v = packed.split([heads * d, heads * d, heads * dv], dim=-1)
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    rab = random_bias(bias, heads, max_seq_len, buckets, dtype, g)
    arguments = {
        "divisor": max_seq_len, "bias": rab, "times": random_times(lengths, g, in_order).to(DEVICE), "num_context": num_context,
        "num_candidates": None if candidates is None else torch.tensor(candidates, device=DEVICE),
    }  # fmt: skip
    offsets = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    poison()
    got = triton_ops.attention_jagged(q, k, v, offsets, **arguments)
    if rab is not None:
        parts = (None if part is None else part.float() for part in (rab.position, rab.time))
        arguments["bias"] = reference.RelativeBias(*parts)
    return got, reference.attention_jagged(q.float(), k.float(), v.float(), offsets, **arguments)


def paged_case(
    seq_lens, counts, *, seed=0, heads=2, d=16, dv=16, bias="none", dtype=torch.float32, candidates=False, num_context=0,
    page=4, max_seq_len=64, table_dtype=torch.int64, history_lens=None,
):  # fmt: skip
    """(got, expected) of paged attention; the pages are shuffled and every slot no token was written to holds NaN."""
    g = torch.Generator().manual_seed(seed)
    pages = max(-(-n // page) for n in seq_lens) + 1
    blocks = len(seq_lens) * pages
    table = torch.randperm(blocks, generator=g).view(len(seq_lens), pages)
    keys, values = (torch.randn(blocks, page, heads, width, generator=g) for width in (d, dv))
    slot_times = torch.randint(0, 10**6, (blocks, page), generator=g) + 1_700_000_000
    poisoned = torch.full((blocks, page), True)
    for row, n in zip(table, seq_lens):
        for i in range(n):
            poisoned[row[i // page], i % page] = False
    total = sum(counts)
    q, own_k, own_v = (torch.randn(total, heads, width, generator=g).to(dtype).to(DEVICE) for width in (d, d, dv))
    rab = random_bias(bias, heads, max_seq_len, 64, dtype, g)
    keys, values = keys.to(dtype).to(DEVICE), values.to(dtype).to(DEVICE)
    arguments = {
        "divisor": max_seq_len, "bias": rab, "num_context": num_context, "slot_times": slot_times.to(DEVICE),
        "query_times": (torch.randint(0, 10**6, (total,), generator=g) + 1_700_500_000).to(DEVICE),
        "history_lens": None if history_lens is None else torch.tensor(history_lens, device=DEVICE),
    }  # fmt: skip
    where = (
        table.to(table_dtype).to(DEVICE), torch.tensor([0, *counts], device=DEVICE).cumsum(0),
        torch.tensor(seq_lens, device=DEVICE),
    )  # fmt: skip
    bad = poisoned.to(DEVICE)[..., None, None]
    poison()
    got = triton_ops.attention_paged(
        q, keys.masked_fill(bad, torch.nan), values.masked_fill(bad, torch.nan), *where, **arguments,
        candidates=(own_k, own_v) if candidates else None,
    )  # fmt: skip
    if rab is not None:
        parts = (None if part is None else part.float() for part in (rab.position, rab.time))
        arguments["bias"] = reference.RelativeBias(*parts)
    expected = reference.attention_paged(
        q.float(), keys.float(), values.float(), *where, **arguments,
        candidates=(own_k.float(), own_v.float()) if candidates else None,
    )  # fmt: skip
    return got, expected


def poison():
    """Fill freed GPU memory with NaN, so that an output row that is not written shows."""
    if GPU:
        junk = [torch.full((2**22,), torch.nan, device="cuda") for _ in range(4)]
        torch.cuda.synchronize()
        del junk
