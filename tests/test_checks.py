"""A check passes the right answer, tells a wrong one what to look at, and never shows a traceback."""

import math

import numpy as np
import pytest
import torch

from hstu_lab import checks


@pytest.fixture
def doubling(monkeypatch):
    monkeypatch.setattr(checks, "_CHECKS", {})

    @checks.register("doubling")
    def check_doubling(answer):
        checks.expect_close(answer(2), 4.0, "two twice is four")
        checks.expect(answer(0) == 0, "nothing twice is nothing")


def test_a_right_answer_passes(doubling, capsys):
    assert checks.check("doubling", lambda x: 2 * x) is True
    assert checks.check("doubling", lambda x: 2 * x, strict=True) is True
    assert capsys.readouterr().out == "✓ doubling\n" * 2


def unwritten(x):
    raise NotImplementedError


def crashing(x):
    y = x - 2
    return 1 / y


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: x**2 + 1, "got 5, expected 4: two twice is four"),
        (lambda x: 4, "nothing twice is nothing"),
        (lambda x: float("nan"), "got nan, expected 4"),
        (lambda x: None, "got None where a number was expected"),
        (unwritten, "not written yet"),
        (crashing, r"your answer raised ZeroDivisionError: division by zero \(line 3 of crashing\)"),
        (lambda: 1, "your answer raised TypeError"),
        (None, "your answer raised TypeError: 'NoneType' object is not callable"),
    ],
)
def test_a_wrong_answer_is_told_what_to_look_at(doubling, capsys, answer, message):
    assert checks.check("doubling", answer) is False
    printed = capsys.readouterr().out
    assert printed.startswith("✗ doubling: ")
    assert printed.count("\n") == 1
    with pytest.raises(checks.CheckFailed, match=message):
        checks.check("doubling", answer, strict=True)


def test_unknown_and_repeated_names_are_refused(doubling):
    with pytest.raises(KeyError, match="no check 'tripling'; there are: doubling"):
        checks.check("tripling", lambda x: 3 * x)
    with pytest.raises(ValueError, match="registered twice"):
        checks.register("doubling")(print)
    assert checks.names() == ["doubling"]


def test_interrupting_is_not_a_wrong_answer(doubling):
    def interrupt(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checks.check("doubling", interrupt)


def amdahl(stages, stage, speedup):
    return sum(ms / (speedup if name == stage else 1) for name, ms in stages.items())


def may_swap(reference, other, scores, error):
    if len(reference) != len(other) or len(set(other)) != len(other):
        return False
    return all(abs(scores[a] - scores[b]) < 2 * error for a, b in zip(reference, other) if a != b)


def largest_batch(limit, fixed, per_user):
    return max(int((limit - fixed) // per_user), 0)


def bucketed_waste(lengths, batch, order=sorted):
    lengths = order(lengths)
    parts = [lengths[i : i + batch] for i in range(0, len(lengths), batch)]
    slots = sum(len(part) * max(part) for part in parts)
    return 1 - sum(lengths) / slots if slots else 0.0


def users_within(num_bytes, width, config, whole=math.floor, counted=lambda group: group.name != "tables.user"):
    from hstu_lab.tables import parameter_groups

    rest = sum(group.count for group in parameter_groups(config) if counted(group))
    return max(whole((num_bytes / width - rest) / config.d_model), 0)


def tokens_to_compute(old, new, block_size):
    common = next((i for i, (a, b) in enumerate(zip(old, new)) if a != b), min(len(old), len(new)))
    return len(new) - min(common, len(new) - 1) // block_size * block_size


def users_that_fit(memory_bytes, tokens, layers, heads, head_size, block_size=16, value_bytes=4):
    blocks = memory_bytes // (layers * block_size * heads * 2 * head_size * value_bytes)
    return max(blocks - 1, 0) // -(-tokens // block_size)


def qdq(values, step, levels=127, rounded=np.rint):
    return np.clip(rounded(values / step), -levels, levels) * step


def tightest(profiles, sizes):
    fitting = [
        (math.prod(p[d][1] for d in sizes), i)
        for i, p in enumerate(profiles)
        if all(p[d][0] <= n <= p[d][1] for d, n in sizes.items())
    ]
    return min(fitting)[1] if fitting else None


RIGHT = {
    "quantise-dequantise": qdq,
    "tightest-profile": tightest,
    "one-stage-faster": amdahl,
    "bucketed-waste": bucketed_waste,
    "users-within-budget": users_within,
    "tokens-to-compute": tokens_to_compute,
    "users-that-fit": users_that_fit,
    "may-swap": may_swap,
    "largest-batch": largest_batch,
}


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("one-stage-faster", lambda stages, stage, speedup: sum(stages.values()) / speedup),
        (
            "one-stage-faster",
            lambda stages, stage, speedup: stages.update({stage: stages[stage] / speedup}) or sum(stages.values()),
        ),
        ("bucketed-waste", lambda lengths, batch: 1 - sum(lengths) / (len(lengths) * max(lengths) or 1)),
        ("bucketed-waste", lambda lengths, batch: bucketed_waste(lengths, batch, order=list)),
        ("bucketed-waste", lambda lengths, batch: bucketed_waste(lengths, batch, order=lambda x: sorted(x, key=str))),
        ("bucketed-waste", lambda lengths, batch: lengths.sort() or bucketed_waste(lengths, batch)),
        ("users-within-budget", lambda *size: users_within(*size, counted=lambda group: True)),
        ("users-within-budget", lambda *size: users_within(*size, counted=lambda group: False)),
        ("users-within-budget", lambda *size: users_within(*size, whole=math.ceil)),
        ("users-within-budget", lambda *size: users_within(*size, whole=float)),
        ("users-within-budget", lambda size, width, config: users_within(size, 4, config)),
        ("tokens-to-compute", lambda old, new, size: len(new) - len(old) // size * size),
        ("tokens-to-compute", lambda old, new, size: len(new) - len(set(old) & set(new)) // size * size),
        ("tokens-to-compute", lambda old, new, size: tokens_to_compute(old, [*new, -1], size) - 1),
        ("tokens-to-compute", lambda old, new, size: tokens_to_compute(old, new, 1)),
        ("users-that-fit", lambda memory, tokens, layers, heads, head_size: memory // (layers * heads * head_size * 8 * tokens)),
        ("users-that-fit", lambda *sizes, value_bytes=4, **more: users_that_fit(*sizes, **more)),
        ("users-that-fit", lambda memory, *sizes, **more: users_that_fit(memory + 8192, *sizes, **more)),
        ("quantise-dequantise", lambda values, step: np.rint(values / step) * step),
        ("quantise-dequantise", lambda values, step: qdq(values, step, levels=128)),
        ("quantise-dequantise", lambda values, step: qdq(values, step, rounded=lambda x: np.floor(x + 0.5))),
        ("quantise-dequantise", lambda values, step: qdq(values, step, rounded=np.trunc)),
        ("quantise-dequantise", lambda values, step: np.divide(qdq(values, step), step, out=values)),
        ("tightest-profile", lambda profiles, sizes: 0),
        ("tightest-profile", lambda profiles, sizes: tightest(profiles[::-1], sizes)),
        ("tightest-profile", lambda profiles, sizes: tightest([{d: (0, p[d][1]) for d in p} for p in profiles], sizes)),
        (
            "tightest-profile",
            lambda profiles, sizes: next((i for i, p in enumerate(profiles) if tightest([p], sizes) == 0), None),
        ),
        ("may-swap", lambda reference, other, scores, error: reference == other),
        ("may-swap", lambda reference, other, scores, error: set(reference) == set(other)),
        ("may-swap", lambda reference, other, scores, error: True),
        ("may-swap", lambda reference, other, scores, error: may_swap(reference, other, scores, error + 1e-9)),
        ("largest-batch", lambda limit, fixed, per_user: round((limit - fixed) / per_user)),
        ("largest-batch", lambda limit, fixed, per_user: int(limit // per_user)),
        ("largest-batch", lambda limit, fixed, per_user: int((limit - fixed) // per_user)),
    ],
)
def test_the_checks_tell_right_from_nearly_right(name, wrong, capsys):
    assert checks.check(name, RIGHT[name], strict=True)
    assert not checks.check(name, wrong)


def biased_attention(q, k, v, bias, n, scale=None, before=True, masked=0.0, sees=0, weigh=torch.nn.functional.silu):
    scores = q @ k.T * (q.shape[-1] ** -0.5 if scale is None else scale) + before * bias
    future = ~torch.ones_like(scores, dtype=torch.bool).tril(sees)
    if masked == -math.inf:
        return weigh(scores.masked_fill(future, masked)) @ v / n
    return (weigh(scores) + (not before) * bias).masked_fill(future, masked) @ v / n


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"masked": -math.inf}, "NaN"),
        ({"sees": 8}, "mask the future"),
        ({"sees": -1}, "sees itself"),
        ({"scale": 1}, "without a bias already"),
        ({"weigh": lambda scores: scores.softmax(-1)}, "mask the future"),
        ({"weigh": torch.sigmoid}, "without a bias already"),
        ({"before": False}, "before the SiLU"),
    ],
)
def test_what_is_wrong_with_an_attention_is_named(changes, said):
    checks.check("biased-attention", biased_attention, strict=True)
    with pytest.raises(checks.CheckFailed, match=said):
        checks.check("biased-attention", lambda *inputs: biased_attention(*inputs, **changes), strict=True)
    with pytest.raises(checks.CheckFailed, match="divide by max_seq_len"):
        checks.check("biased-attention", lambda q, *more: biased_attention(q, *more[:3], len(q)), strict=True)
