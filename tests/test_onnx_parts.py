"""The modules that are traced give what the model gives, whatever the lengths, biases and users."""

import pytest
import torch

from hstu_lab.config import preset
from hstu_lab.model import HSTU
from hstu_lab.onnx_parts import RankerPart, StackPart, TimeBuckets, _History
from hstu_lab.onnx_precision import MASKED
from hstu_lab.ops import reference

CHANGES = {"all": {}, "position": {"rab": "position"}, "no bias": {"rab": "none"}, "no users": {"num_users": 0}}


@pytest.fixture(params=CHANGES, ids=lambda name: name.replace(" ", "-"))
def model(request):
    """float64, so that only another formula could differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = HSTU(preset("tiny").replace(**CHANGES[request.param])).double().eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(False)


def _histories(config, lengths, seed):
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(len(lengths), 17, config.d_model, generator=made, dtype=torch.float64)
    times = torch.randint(0, 9999, (len(lengths), 17), generator=made).cumsum(1)
    return x, times, torch.tensor(lengths)


@pytest.mark.parametrize("lengths", [[17, 1, 9, 5, 16], [1], [2, 3]], ids=str)
def test_the_stack_is_the_models(model, lengths):
    x, times, lengths = _histories(model.config, lengths, 1)
    logits, hidden = StackPart(model)(x, times, lengths)
    truth = model.stack.dense(x, lengths, times)[torch.arange(len(lengths)), lengths - 1]
    torch.testing.assert_close(hidden, truth, rtol=1e-12, atol=1e-12)
    known = model.known_items
    torch.testing.assert_close(logits[:, known], model.logits(truth)[:, known], rtol=1e-12, atol=1e-12)
    assert (logits[:, ~known] < MASKED / 2).all(), "finite, and below all others"
    assert logits.isfinite().all()
    assert (~known).any()


@pytest.mark.parametrize("lengths", [[17, 1, 0, 5, 16], [0], [17]], ids=str)
def test_the_ranker_is_one_masked_pass(model, lengths):
    x, times, lengths = _histories(model.config, lengths, 2)
    candidates = torch.randn(
        len(lengths), 7, model.config.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    ours = RankerPart(model)(x, candidates, times, lengths)
    now = times.gather(1, (lengths - 1).clamp(min=0).unsqueeze(1)).expand(-1, 7)
    hidden = model.stack.candidates(torch.cat([x, candidates], 1), lengths, 17, torch.cat([times, now], 1))
    truth = model.heads(hidden[:, 17:]).sigmoid()
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
    assert (ours - ours.roll(1, 1)).abs().max() > 1e-3  # the candidates differ, so a mixed-up order would be seen


@pytest.mark.parametrize("count", [1, 2, 8, 9, 63, 64, 65, 100])
def test_buckets_in_octal_are_the_references(count):
    config = preset("tiny").replace(num_time_buckets=count)
    edges = torch.tensor([0, *reference.time_thresholds(count)])
    random = torch.randint(0, 2**40, (1000,), generator=torch.Generator().manual_seed(0))
    seconds = torch.cat([edges - 1, edges, edges + 1, torch.arange(5000), random, torch.tensor([2**50])]).clamp(min=0)
    found = TimeBuckets(config)(torch.zeros(1, dtype=torch.int64), seconds)[0]
    assert torch.equal(found, reference.time_bucket(seconds, count))
    assert found.max() == count - 1


def test_a_sum_over_a_long_history_stays_within_float16():
    """2,048 products of 8 x 8 before the division by N are 131,072, twice what float16 holds."""
    config = preset("tiny").replace(max_seq_len=2048, rab="position")
    history = _History(config, TimeBuckets(config), torch.zeros(1, 2048, dtype=torch.int64), torch.tensor([2048]))
    history.gate = history.gate.half()
    q, v = torch.zeros(1, 1, 2048, 2).half(), torch.full((1, 1, 2048, 2), 8.0).half()
    bias = reference.RelativeBias(torch.full((1, 2048), 8.0).half())
    out = history.attend(q, q.transpose(2, 3), v, bias)
    assert out[0, 0, -1, 0].item() == pytest.approx(64, rel=3e-3)
    assert (torch.full((2048,), 8.0).half() @ v[0, 0]).isinf().all(), "without the division before it, it does not"


def test_what_lies_in_the_padding_does_not_matter(model):
    x, times, lengths = _histories(model.config, [5, 1, 17], 4)
    other, later = x.clone(), times.clone()
    for row, length in enumerate(lengths):
        other[row, length:], later[row, length:] = 7.0, 3
    torch.testing.assert_close(StackPart(model)(x, times, lengths), StackPart(model)(other, later, lengths))
    candidates = x[:, :4]
    torch.testing.assert_close(
        RankerPart(model)(x, candidates, times, lengths), RankerPart(model)(other, candidates, later, lengths)
    )
