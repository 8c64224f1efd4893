"""Exercise checks: `check("name", answer)` prints ✓, or ✗ with what to look at.

A check is a function of the learner's answer, registered under the exercise's name, that calls `expect` for each thing that
must hold. What goes wrong inside the answer is told in one line, never as a traceback.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

_CHECKS: dict[str, Callable[[Any], None]] = {}


class CheckFailed(AssertionError):
    """An answer that does not pass; the message says what to look at."""


def register(name: str) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Decorator: the check of the exercise of that name. Raises ValueError where the name is taken."""

    def add(function: Callable[[Any], None]) -> Callable[[Any], None]:
        if name in _CHECKS:
            raise ValueError(f"check {name!r} is registered twice")
        _CHECKS[name] = function
        return function

    return add


def names() -> list[str]:
    """Every registered check."""
    return sorted(_CHECKS)


def expect(condition: bool, hint: str) -> None:
    """Fail the running check with that hint unless the condition holds."""
    if not condition:
        raise CheckFailed(hint)


def expect_close(got: Any, wanted: float, hint: str, *, tolerance: float = 1e-6) -> None:
    """Fail the running check unless `got` is a number within a relative `tolerance` of `wanted`."""
    try:
        close = abs(float(got) - wanted) <= tolerance * max(abs(wanted), 1e-12)
    except (TypeError, ValueError):
        raise CheckFailed(f"got {got!r} where a number was expected: {hint}") from None
    expect(close, f"got {float(got):.6g}, expected {wanted:.6g}: {hint}")


def check(name: str, answer: Any, strict: bool = False) -> bool:
    """Check the answer (usually a function) to the exercise `name`; print the verdict and return it.

    With `strict` a wrong answer raises CheckFailed. Raises KeyError for a name that no check has.
    """
    if name not in _CHECKS:
        raise KeyError(f"no check {name!r}; there are: {', '.join(names())}")
    try:
        _CHECKS[name](answer)
    except CheckFailed as failure:
        problem = str(failure)
    except NotImplementedError as error:
        problem = str(error) or "not written yet: replace `raise NotImplementedError` by your answer"
    except Exception as error:
        problem = f"your answer raised {type(error).__name__}: {error}{_where(error, answer)}"
    else:
        print(f"✓ {name}")
        return True
    print(f"✗ {name}: {problem}")
    if strict:
        raise CheckFailed(f"{name}: {problem}")
    return False


def _where(error: Exception, answer: Any) -> str:
    """The line of the answer that raised, counted from its `def`."""
    code = getattr(answer, "__code__", None)
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if code and frame.f_code is code]
    return f" (line {lines[-1] - code.co_firstlineno + 1} of {code.co_name})" if lines else ""


# 00_start_here


@register("one-stage-faster")
def _one_stage_faster(answer):
    stages = {"tokens": 0.5, "encoder": 1.5, "stack": 6.0, "ranking": 2.0}
    expect_close(answer(stages, "stack", 1), 10.0, "a speed-up of 1 changes nothing: the total is the sum of all stages")
    expect_close(answer(stages, "stack", 4), 5.5, "only that stage shrinks, the others stay as they are")
    expect_close(answer(stages, "encoder", 1e12), 8.5, "a stage that takes no time leaves the rest of the total")
    expect(stages["stack"] == 6.0, "the stages you were given were changed: compute a new total instead")


# 01_events_and_tables


@register("bucketed-waste")
def _bucketed_waste(answer):
    expect_close(answer([1, 3, 2], 3), 3 / 9, "one batch of three, padded to 3 each: 9 slots hold 6 events")
    expect_close(answer([4, 4, 4], 2), 0.0, "equal lengths need no padding")
    expect_close(answer([1, 9, 1, 9], 2), 0.0, "sort first: then the short ones share a batch and nothing is padded")
    expect_close(answer([5, 2, 4, 1, 3], 2), 2 / 17, "the last batch may be smaller: 2 x 2 + 2 x 4 + 1 x 5 slots hold 15 events")
    expect_close(answer([10, 2, 9, 1], 2), 2 / 24, "neighbours in size share a batch: 1 with 2 and 9 with 10")
    expect_close(answer([0, 0], 2), 0.0, "histories without events take no slots: nothing is wasted, and nothing to divide by")
    lengths = [3, 1, 2]
    answer(lengths, 2)
    expect(lengths == [3, 1, 2], "the lengths you were given were reordered: sort a copy")


@register("users-within-budget")
def _users_within_budget(answer):
    from hstu_lab.config import preset
    from hstu_lab.tables import parameter_groups

    def weighs(config, users, width):
        return width * sum(group.count for group in parameter_groups(config.replace(num_users=users)))

    budgets = ("small", 2_000_000, 4), ("gr-3b", 24 * 10**9, 4), ("gr-3b", 8 * 10**9, 2), ("ml-1m", 10**6, 4)
    for name, budget, width in budgets:
        config = preset(name)
        users = answer(budget, width, config)
        said = f"{name} with {users!r} users and {width} bytes a parameter"
        expect(type(users) is int, f"{users!r} users: give a whole number, rounded down")
        expect(weighs(config, users, width) <= budget, f"{said} weighs {weighs(config, users, width):,} bytes, over {budget:,}")
        expect(weighs(config, users + 1, width) > budget, f"{said} leaves room for one more in {budget:,} bytes")
    expect(answer(1000, 4, preset("small")) == 0, "the rest of the model alone is over 1,000 bytes: no user fits")


# 02_hstu_model


@register("biased-attention")
def _biased_attention(answer):
    import torch

    from hstu_lab.ops import reference

    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 9, 8, generator=generator)
    bias = torch.randn(9, 9, generator=generator)
    position = torch.arange(9)
    nothing, other = torch.zeros(9, 9), torch.cat([k[:-1], k[:1]])

    def truth(bias):
        heads = (x.unsqueeze(0) for x in (q, k, v))
        return reference.pointwise_attention(*heads, reference.visible(position, position), bias, 32)[0]

    got, plain = answer(q, k, v, bias, 32), answer(q, k, v, nothing, 32)
    expect(isinstance(got, torch.Tensor) and got.shape == v.shape, f"give one row a position: {tuple(v.shape)}")
    expect(not got.isnan().any(), "NaN came out: SiLU(-inf) is no number; give masked pairs weight 0 after the SiLU")
    expect(torch.allclose(answer(q, other, v, bias, 32)[:-1], got[:-1]), "another last key changes earlier rows: mask the future")
    expect(bool(plain[0].any()), "the first position sees nothing: every position sees itself too")
    expect(torch.allclose(plain * 2, answer(q, k, v, nothing, 16), atol=1e-5), "divide by max_seq_len, whatever the length is")
    expect(
        torch.allclose(plain, truth(nothing), atol=1e-5), "wrong without a bias already: SiLU of q . k / sqrt(d_qk), one by one"
    )
    expect(torch.allclose(got, truth(bias), atol=1e-5), "the bias is added to the scaled scores, before the SiLU")


@register("hit-rate")
def _hit_rate(answer):
    import torch

    scores = torch.tensor([[0.0, 3.0, 2.0, 1.0], [0.0, 1.0, 1.0, 1.0]])
    targets, nothing = torch.tensor([2, 3]), [[], []]
    expect_close(
        answer(scores, targets, nothing, 2), 0.5, "half of the rows: item 2 is second in row one; in row two 3 is third of a tie"
    )
    expect_close(answer(scores, targets, nothing, 1), 0.0, "neither target is the very best")
    expect_close(answer(scores, targets, [[1], []], 1), 0.5, "item 1 has been seen: item 2 becomes the best of row one")
    expect_close(answer(scores, targets, [[], [1, 2]], 3), 1.0, "with 1 and 2 seen, item 3 leads row two")
    expect_close(answer(scores, targets, nothing, 1), 0.0, "the scores must not be changed by an earlier call")


# 03_roofline


@register("candidate-flops")
def _candidate_flops(answer):
    from hstu_lab import roofline
    from hstu_lab.config import preset

    expect_close(answer(1, 16, 16, 1, 0), 64, "one event sees itself: 2 x 16 FLOPs for its score, 2 x 16 for its share of V")
    expect_close(answer(1, 16, 16, 3, 0), 6 * 64, "3 events make 1 + 2 + 3 causal pairs")
    expect_close(answer(1, 16, 16, 3, 2), (6 + 8) * 64, "each of 2 candidates sees 3 events and itself, not the other candidate")
    expect_close(answer(2, 16, 16, 3, 2), 2 * 14 * 64, "every head does the same work")
    expect_close(answer(1, 16, 48, 3, 2), 14 * 128, "scores cost d_qk, the weighted sum of V costs d_v")
    config = preset("gr-3b")
    passes = roofline.attention(config, 1, 512, 512), roofline.candidate_attention(config, 1, 100, 512)
    wanted = sum(operator.flops for operator in passes)
    expect_close(answer(config.num_heads, config.d_qk, config.d_v, 512, 100), wanted, "gr-3b, 512 events, 100 candidates")


@register("smallest-batch")
def _smallest_batch(answer):
    from hstu_lab import roofline

    for k, n, ridge, dtype in (
        (1024, 4096, 153.0, "bf16"),
        (1024, 1024, 206.1, "bf16"),
        (256, 64, 9.7, "fp32"),
        (64, 64, 0.3, "bf16"),
    ):
        width = roofline.DTYPE_BYTES[dtype]
        batch = answer(k, n, ridge, width)
        said = f"{k} x {n}, ridge {ridge}, {width} bytes a value: batch {batch!r}"
        expect(type(batch) is int and batch > 0, f"{said}: give a whole number from 1 up")
        reached = roofline.gemm("", batch, k, n, dtype).intensity
        expect(reached >= ridge, f"{said} has {reached:.1f} FLOP a byte only")
        expect(batch == 1 or roofline.gemm("", batch - 1, k, n, dtype).intensity < ridge, f"{said}: one row less would do")
    expect(answer(64, 64, 153.0, 2) is None, "64 x 64 never gets over 32 FLOP a byte, however large the batch: return None")


# 04_triton_kernels


@register("computed-tiles")
def _computed_tiles(answer):
    expect(answer(64, 64, 64) == 1, "one tile of queries, one of keys")
    expect(answer(128, 64, 64) == 3, "the second tile of queries sees two tiles of keys, the first only one")
    expect(answer(128, 128, 32) == 4, "one tile of 128 queries meets four tiles of 32 keys: some scores are masked, no tile is")
    expect(
        answer(128, 32, 128) == 4, "a tile of keys that any query sees is computed whole: 4 tiles of queries, one key tile each"
    )
    expect(
        answer(100, 64, 32) == 6, "queries 0-63 see 2 tiles of 32 keys; queries 64-99 see keys 0-99: 4 tiles, the last half empty"
    )
    expect(answer(0, 64, 64) == 0, "no events, no tiles")
    for length, m, n in ((1000, 64, 32), (513, 128, 64), (257, 16, 128)):
        wanted = sum(col < min(row + m, length) for row in range(0, length, m) for col in range(0, length, n))
        got = answer(length, m, n)
        expect(got == wanted, f"{length} events, tiles of {m} x {n}: got {got}, a count of visible tiles gives {wanted}")


@register("silu-by-tanh")
def _silu_by_tanh(answer):
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    called = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(str(func._overloadpacket).removeprefix("aten.").rstrip("_"))
            return func(*args, **(kwargs or {}))

    x = torch.cat([torch.linspace(-20, 20, 401), torch.tensor([-1000.0, 1000.0])])
    kept = x.clone()
    with Recorder():
        got = answer(x)
    expect(torch.equal(x, kept), "the scores you were given were changed: return new ones")
    expect(isinstance(got, torch.Tensor) and got.shape == x.shape, "give one value for each score")
    expect(torch.allclose(got, torch.nn.functional.silu(x), atol=1e-5), "not SiLU: sigmoid(x) is (1 + tanh(x / 2)) / 2")
    dear = sorted(set(called) & {"exp", "exp2", "expm1", "sigmoid", "silu", "reciprocal", "softplus", "logaddexp"})
    expect(not dear, f"{', '.join(dear)}: use tanh in their place")
    expect(called.count("tanh") == 1, f"{called.count('tanh')} calls of tanh: one is enough")


# 05_cutlass_kernels


@register("bank-passes")
def _bank_passes(answer):
    rows = [128 * row for row in range(8)]
    expect(answer([16 * i for i in range(8)]) == 1, "eight pieces side by side: 128 bytes, every bank delivers one word")
    expect(answer(rows) == 8, "eight rows of 128 bytes, same column: all pieces lie in banks 0 to 3, eight words each")
    expect(answer([144 * row for row in range(8)]) == 1, "rows of 144 bytes: each row starts four banks further")
    expect(answer([0] * 8) == 1, "eight threads that read the same piece: a word is delivered once, to everybody")
    expect(answer([64 * row for row in range(8)]) == 4, "rows of 64 bytes: even rows start at bank 0, odd ones at bank 16")
    expect(
        answer([128 * row + 16 * (row % 2) for row in range(8)]) == 4, "one bit of swizzle: two groups of banks share the work"
    )
    expect(answer([8 * i for i in range(4)]) == 1, "pieces may overlap: count words, not pieces")


@register("swizzle-by-xor")
def _swizzle_by_xor(answer):
    from hstu_lab.ops.cute_layouts import shared_offsets

    for bits in (3, 2, 1):
        truth = shared_offsets(8, 64, 0, bits)
        for row, column in ((0, 5), (1, 0), (3, 17), (5, 63), (7, 32)):
            got = answer(64 * row + column, bits)
            expect(
                got == truth[row, column],
                f"{bits} bits: element ({row}, {column}), offset {64 * row + column}, belongs at {truth[row, column]}, got {got}",
            )


@register("consumer-registers")
def _consumer_registers(answer):
    expect(
        answer(2, 24) == 240, "2 consumer warpgroups beside one of 24: (65536 - 128 x 24) / 256 is 244; registers come in eights"
    )
    expect(answer(3, 32) == 160, "3 beside one of 32: (65536 - 4096) / 384 is exactly 160")
    expect(answer(3, 24) == 160, "24 for the producer frees 1,024 registers, too few for 8 more in each of 384 threads")
    expect(answer(1, 56) == 248, "one consumer could have 456: more than 255 nobody can name, so 248 is the most that counts")


# 06_onnx_export


@register("recent-mean")
def _recent_mean(answer):
    import onnxruntime
    import torch

    from hstu_lab.onnx_export import quiet

    class Answer(torch.nn.Module):
        def forward(self, x, lengths):
            return answer(x, lengths)

    def histories(*lengths):
        generator = torch.Generator().manual_seed(len(lengths))
        return torch.randn(len(lengths), max(lengths) + 2, 3, generator=generator), torch.tensor(lengths)

    def truth(x, lengths):
        return torch.stack([row[max(n - 4, 0) : n].mean(dim=0) for row, n in zip(x, lengths.tolist())])

    batches = [histories(3), histories(1, 4, 5, 12), histories(30, 2)]
    for x, lengths in batches:
        mean = answer(x, lengths)
        expect(isinstance(mean, torch.Tensor) and mean.shape == (len(x), 3), f"the answer is {type(mean).__name__}, not (B, D)")
        expect(
            torch.allclose(mean, truth(x, lengths), atol=1e-5),
            f"in PyTorch already, lengths {lengths.tolist()} are wrong: padding must not count, nor events before the last 4",
        )
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    with quiet():
        program = torch.onnx.export(
            Answer().eval(), (torch.ones(2, 5, 3), torch.tensor([3, 5])), input_names=["x", "lengths"], dynamo=True,
            dynamic_shapes={"x": {0: batch, 1: length}, "lengths": {0: batch}}, verbose=False,
        )  # fmt: skip
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    shape = session.get_inputs()[0].shape
    expect(shape[:2] == ["batch", "length"], f"the file's x is {shape}: a Python number fixed what should be dynamic")
    for x, lengths in batches:
        (mean,) = session.run(None, {"x": x.numpy(), "lengths": lengths.numpy()})
        expect(
            torch.allclose(torch.from_numpy(mean), truth(x, lengths), atol=1e-5),
            f"right in PyTorch, but the file is wrong for lengths {lengths.tolist()}: something was decided during the export",
        )


# 07_tensorrt_engines


@register("quantise-dequantise")
def _quantise_dequantise(answer):
    import numpy as np

    def close(values, step, wanted, hint):
        got = answer(np.array(values, np.float32), step)
        expect(
            isinstance(got, np.ndarray) and got.shape == (len(values),), f"the answer is {type(got).__name__}, not one value each"
        )
        expect(np.allclose(got, wanted, atol=1e-6), f"{values} at step {step}: got {got.tolist()}, expected {wanted}: {hint}")

    close([0.0, 0.5, -0.5, 1.0], 0.5, [0.0, 0.5, -0.5, 1.0], "whole multiples of the step are exact")
    close([0.3, -0.3, 0.7], 0.5, [0.5, -0.5, 0.5], "round to the nearest step")
    close([100.0, -100.0], 0.5, [63.5, -63.5], "int8 ends at 127 steps on both sides: clip")
    close([0.25, 0.75], 0.5, [0.0, 1.0], "half-way values go to the even step, as QuantizeLinear rounds")
    values = np.linspace(-3, 3, 1001, dtype=np.float32)
    kept = values.copy()
    answer(values, 0.01)
    expect(np.array_equal(values, kept), "the values you were given were changed: return new ones")


@register("tightest-profile")
def _tightest_profile(answer):
    single, short = {"batch": (1, 1), "length": (1, 256)}, {"batch": (1, 8), "length": (1, 64)}
    every = {"batch": (1, 64), "length": (1, 256)}
    expect(answer([every], {"batch": 3, "length": 9}) == 0, "one profile that holds the sizes: index 0")
    expect(
        answer([every, single], {"batch": 1, "length": 200}) == 1, "both hold (1, 200); the one with the smaller largest sizes"
    )
    expect(answer([every, single, short], {"batch": 1, "length": 10}) == 1, "1 x 256 is less than 8 x 64 and 64 x 256")
    expect(answer([every, single, short], {"batch": 8, "length": 64}) == 2, "the largest size is inside")
    expect(answer([single, short], {"batch": 2, "length": 65}) is None, "no profile holds batch 2 with length 65: return None")
    from_two = {"batch": (2, 8), "length": (1, 64)}
    expect(answer([from_two], {"batch": 1, "length": 10}) is None, "the least size counts too: batch 1 is below 2")


# 08_paged_kv


@register("full-hit-prefix")
def _full_hit_prefix(answer):
    tokens = list(range(100, 140))
    cached = {tuple(tokens[:end]) for end in range(4, 41, 4)}
    expect(answer(tokens, set(), 4, "topk") == 0, "nothing is cached: nothing is reused")
    expect(answer(tokens[:39], cached, 4, "topk") == 36, "39 tokens begin with 9 whole cached blocks of 4")
    expect(answer(tokens[:10], cached, 4, "slate") == 8, "the third block is not full: 8 tokens are reused")
    expect(
        answer(tokens, cached, 4, "topk") == 36,
        "everything is cached, but an item is chosen from the last token's hidden state: its block is computed",
    )
    expect(answer(tokens[:4], cached, 4, "slate") == 0, "one block, and the last token is in it: it is computed")
    expect(answer(tokens, cached, 4, "score") == 40, "candidates read keys and values only: all of the history is reused")
    expect(answer(tokens[:39], cached, 4, "score") == 36, "whole blocks only, for candidates too")
    hole = cached - {tuple(tokens[:8])}
    expect(answer(tokens, hole, 4, "score") == 4, "the second block was evicted: what follows it cannot be reused")
    other = [7, *tokens[1:]]
    expect(answer(other, cached, 4, "topk") == 0, "another first token: no block has the same beginning")


@register("copy-on-write")
def _copy_on_write(answer):
    references = {3: 1, 5: 2, 8: 3}
    expect(answer([], references, 0, 5, 4) == 2, "5 tokens take 2 blocks of 4")
    expect(answer([3], references, 4, 1, 4) == 1, "the table's one block is full: a new one")
    expect(answer([3], references, 2, 2, 4) == 0, "the two fit into block 3, which nobody else holds")
    expect(answer([3, 5], references, 6, 1, 4) == 1, "block 5 is half full and held twice: its copy takes a block")
    expect(answer([3, 5], references, 6, 3, 4) == 2, "a copy of block 5 and a new block for the third token")
    expect(answer([5, 3], references, 6, 1, 4) == 0, "block 5 is full and only read: no copy")
    expect(answer([5], references, 4, 1, 4) == 1, "the next token begins a block of its own: block 5 stays as it is")
    expect(answer([3, 8], references, 6, 0, 4) == 0, "no token, no block")


@register("m-falcon")
def _m_falcon(answer):
    expect(answer(200, 512, 64, True) == 712, "the history once, and every candidate")
    expect(answer(200, 512, 64, False) == 2112, "8 micro-batches of 200 + 64")
    expect(answer(200, 65, 64, False) == 465, "65 candidates are two micro-batches")
    expect(answer(200, 65, 64, True) == 265, "two micro-batches, one history")
    expect(answer(200, 0, 64, True) == answer(200, 0, 64, False) == 0, "no candidates: nothing to compute")


# 09_vllm_serving


@register("tokens-to-compute")
def _tokens_to_compute(answer):
    old = list(range(100, 140))
    expect(answer([], old, 16) == 40, "nothing is cached yet: every token is computed")
    expect(answer(old, [*old, 7], 16) == 9, "of 40 cached tokens 2 whole blocks of 16 are reused; 41 - 32 are computed")
    expect(answer(old, [*old, 7], 8) == 1, "blocks of 8: all 40 tokens are reused, the new one is computed")
    expect(answer(old[:32], old[:32], 16) == 16, "an answer needs the last token's hidden state: its block is computed again")
    changed = [*old[:20], 7, *old[21:]]
    expect(answer(old, changed, 16) == 24, "one token differs: its block and all after it are computed, the block before is not")
    expect(answer(old, old[1:], 16) == 39, "the first token is gone, so no prefix is shared, though 39 tokens are the same")
    expect(answer(old, old[:20], 16) == 4, "a shorter prompt shares one whole block")


@register("users-that-fit")
def _users_that_fit(answer):
    tiny = {"layers": 2, "heads": 2, "head_size": 16}
    expect(
        answer(2**20, 32, **tiny) == 63,
        "a block is 2 layers x 16 tokens x 2 heads x 32 values x 4 bytes = 8 KiB; 1 is vLLM's own",
    )
    expect(answer(2**20, 33, **tiny) == 42, "33 tokens hold 3 blocks: a block belongs to one history")
    expect(answer(2**20, 32, **tiny, value_bytes=2) == 127, "half the bytes a value: twice the blocks")
    expect(answer(2**20 - 1, 32, **tiny) == 63, "127 whole blocks: 126 for requests")
    expect(answer(16384, 33, **tiny) == 0, "two blocks in all: none fits")


# 10_gpu_hot_cache


@register("lru-hits")
def _lru_hits(answer):
    expect(answer([1, 2, 1, 2], 2) == [False, False, True, True], "both rows fit: the second time they hit")
    expect(answer([1, 2, 3, 1], 2) == [False] * 4, "row 1 was the least recent when 3 came: it is gone")
    expect(answer([1, 2, 1, 3, 1], 2) == [False, False, True, False, True], "a hit makes a row the most recent: 2 goes, not 1")
    expect(answer([5, 5], 1) == [False, True], "the slot still holds row 5")
    expect(answer([5, 6, 5], 1) == [False] * 3, "one slot holds the last row only")
    expect(answer([], 3) == [], "no access, no hit")
    ids = [1, 2]
    answer(ids, 1)
    expect(ids == [1, 2], "the trace you were given was changed")


@register("hidden-hit-ratio")
def _hidden_hit_ratio(answer):
    expect_close(answer(1000, 2000, 1e9, 0.5e-3), 0.75, "in half a millisecond 1 GB/s moves 500 kB: 250 of the 1,000 rows")
    expect_close(answer(1000, 2000, 1e9, 0.0), 1.0, "no time to hide in: every row must hit")
    expect_close(answer(1000, 2000, 1e9, 1.0), 0.0, "all rows fit in that time: no hit is needed, and none below zero")
    expect_close(answer(16_384, 2048, 50e9, 0.3e-3), 1 - 15e6 / (16_384 * 2048), "15 MB of 33.6 MB travel in 0.3 ms")


# 11_unified_pipeline


@register("may-swap")
def _may_swap(answer):
    scores = {3: 9.0, 8: 8.9995, 5: 7.0, 2: 6.0}
    expect(answer([3, 8, 5], [3, 8, 5], scores, 1e-3) is True, "equal lists agree")
    expect(answer([3, 8, 5], [8, 3, 5], scores, 1e-3) is True, "3 and 8 are 0.0005 apart, below twice the error 0.001")
    expect(answer([3, 8, 5], [8, 3, 5], scores, 1e-4) is False, "0.0005 is above twice the error 0.0001: a real difference")
    expect(answer([1, 2], [2, 1], {1: 1.0, 2: 0.5}, 0.25) is False, "exactly twice the error apart is not less than that")
    expect(answer([3, 8, 5], [3, 5, 8], scores, 1e-3) is False, "8 and 5 are far apart: no rounding error swaps them")
    expect(answer([3, 8, 5], [3, 8, 2], scores, 1e-3) is False, "2 took the place of 5, whose score is far above")
    expect(answer([3, 8, 5], [3, 8], scores, 1e-3) is False, "a shorter list does not agree")
    expect(answer([3, 8, 5], [3, 3, 5], scores, 1e-3) is False, "3 appears twice and 8 is gone: a list has distinct items")


@register("largest-batch")
def _largest_batch(answer):
    expect(answer(10.0, 2.0, 1.0) == 8, "2 ms once and 1 ms a user: 8 users take exactly 10 ms")
    expect(answer(10.0, 2.0, 1.5) == 5, "5 users take 9.5 ms, 6 take 11 ms: round down")
    expect(answer(10.0, 12.0, 1.0) == 0, "the fixed cost alone breaks the limit: no batch fits")
