"""The roofline's arithmetic against counts made another way."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hstu_lab import hardware, roofline
from hstu_lab.config import preset
from hstu_lab.hardware import DEVICES, device
from hstu_lab.measure import read_record

H200 = device("H200-SXM-141GB")


@pytest.mark.parametrize("name", ["tiny", "small", "ml-1m"])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 17), (2, 50)])
def test_matrix_flops_are_those_that_pytorch_counts(name, batch, length):
    """PyTorch's own counter runs the dense stack, whose attention does the masked half too: compare without attention."""
    from hstu_lab.model import HSTUStack

    config = preset(name)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        HSTUStack(config).eval().dense(
            torch.randn(batch, length, config.d_model),
            torch.full((batch,), length),
            torch.zeros(batch, length, dtype=torch.int64),
        )
    counted = counter.get_flop_counts()["Global"]
    linear = sum(n for op, n in counted.items() if "addmm" in str(op) or str(op).endswith(".mm"))
    ops = roofline.stack(config, batch, length)
    assert sum(op.flops * op.count for op in ops if op.name != "attention") == linear
    attended = next(op for op in ops if op.name == "attention")
    dense = sum(counted.values()) - linear
    assert attended.flops * attended.count == pytest.approx(dense * (length + 1) / (2 * length))


def test_the_seeds_model_needs_71_and_567_gflop():
    config = preset("gr-3b")
    assert roofline.flops(roofline.stack(config, 1, 512)) / 1e9 == pytest.approx(71, rel=0.01)
    assert roofline.flops(roofline.stack(config, 8, 512)) / 1e9 == pytest.approx(567, rel=0.01)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (4, 4), (5, 12)])
def test_causal_pairs_by_counting(queries, keys):
    counted = sum(k <= q for q in range(keys - queries, keys) for k in range(keys))
    assert roofline.causal_pairs(queries, keys) == counted


@pytest.mark.parametrize(("length", "candidates"), [(1, 1), (5, 3), (0, 2)])
def test_candidates_see_the_history_and_themselves(length, candidates):
    config, seen = (
        preset("tiny"),
        sum(k < length or k == q for q in range(length, length + candidates) for k in range(length + candidates)),
    )
    operator = roofline.candidate_attention(config, 2, candidates, length)
    assert operator.flops == 2 * 2 * config.num_heads * seen * (config.d_qk + config.d_v)
    assert operator.special == 2 * config.num_heads * seen


def test_a_request_encodes_and_ranks_too():
    from hstu_lab.model import EventEncoder

    config, length, candidates = preset("tiny"), 20, 7
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for tokens in (length, candidates):
            ids = torch.zeros(tokens, dtype=torch.int64)
            EventEncoder(config)(torch.randn(tokens, config.d_model), ids, ids)
    request = roofline.whole(config, 1, length, candidates)
    assert sum(op.flops for op in request if "encoder" in op.name) == counter.get_total_flops()
    ranked = sum(op.count for op in request if op.name.startswith("ranking: "))
    assert ranked == 4 + 5 * config.num_layers + 2  # encoder, layers, final norm and task heads
    (logits,) = (op for op in request if op.name == "next-item logits")
    assert logits.flops == 2 * config.d_model * config.num_items


def test_the_smallest_work_is_bound_by_its_launch():
    assert roofline.predict(roofline.Operator("one byte", 0, 1), H200).bound == "launch"


def test_waves():
    assert roofline.wave_quantisation(132, 132) == 1
    assert roofline.wave_quantisation(66, 132) == 2
    assert roofline.wave_quantisation(133, 132) == pytest.approx(2 * 132 / 133)
    assert roofline.wave_quantisation(0, 132) == 1


def test_the_larger_term_is_the_time():
    memory = roofline.predict(roofline.Operator("copy", 0, 4.8e9), H200, launch=0)
    assert memory.bound == "memory"
    assert memory.seconds == pytest.approx(1e-3)
    matrix = roofline.predict(roofline.Operator("matmul", 989.4e9, 1, tiles=132), H200, launch=1e-6)
    assert matrix.bound == "matrix"
    assert matrix.seconds == pytest.approx(1.001e-3)
    special = roofline.predict(roofline.Operator("tanh", 1, 1, special=H200.special), H200)
    assert special.bound == "special functions"


def test_decode_is_bound_by_memory_and_long_prefill_is_not():
    config = preset("gr-3b")
    decode = roofline.predict(roofline.attention(config, 64, 1, 1024), H200)
    prefill = roofline.predict(roofline.attention(config, 8, 2048, 2048), H200)
    assert decode.bound == "memory"
    assert prefill.bound != "memory"


def test_half_precision_moves_half_the_bytes():
    config = preset("gr-3b")
    fp32, bf16 = (sum(op.bytes * op.count for op in roofline.whole(config, 4, 256, dtype=d)) for d in ("fp32", "bf16"))
    assert fp32 == 2 * bf16


def test_every_device_says_where_its_figures_come_from():
    assert {
        "A100-SXM4-40GB",
        "A100-SXM4-80GB",
        "A100-PCIe-40GB",
        "A100-PCIe-80GB",
        "H100-SXM5-80GB",
        "H200-SXM-141GB",
        "L4-24GB",
    } == set(DEVICES)
    for entry in DEVICES.values():
        assert "datasheet" in entry.source
        assert not entry.measured
        assert entry.ridge("bf16") == entry.flops["bf16"] / entry.bandwidth


def test_measured_ceilings_replace_the_datasheets():
    found = H200.with_ceilings(dtype="bf16", flops=782e12, bandwidth=4.25e12, source="a record")
    assert (found.flops["bf16"], found.bandwidth, found.measured) == (782e12, 4.25e12, True)
    assert found.flops["int8"] == H200.flops["int8"]
    assert H200.flops["bf16"] == 989.4e12


def test_a_product_takes_as_long_as_a_measured_square_one():
    gpu = H200.with_ceilings(dtype="bf16", products=[(4e9, 10e-6), (1e9, 5e-6)], launch=1e-6, source="a record")
    assert gpu.product_seconds(1e9) == gpu.product_seconds(1e6) == 5e-6
    assert gpu.product_seconds(2e9) == pytest.approx(math.sqrt(5e-6 * 10e-6))
    assert gpu.product_seconds(8e9) == pytest.approx(20e-6)
    product = roofline.gemm("", 1000, 1000, 1000)
    assert roofline.predict(product, gpu).seconds == pytest.approx(gpu.product_seconds(2e9))
    assert roofline.predict(product, gpu, "fp32").seconds != pytest.approx(gpu.product_seconds(2e9))


def test_attention_waits_for_its_longest_program_or_for_free_slots():
    config = preset("gr-3b").replace(rab="none", num_heads=2)
    operator = roofline.attention(config, 3, 150, 150)  # 3 row tiles of 1, 2 and 3 steps, 6 times
    assert (operator.programs, operator.steps, operator.longest) == (18, 36, 3)
    few, many = (
        H200.with_ceilings(dtype="bf16", chains={"none": (4e-6, 1e-6)}, resident=resident, launch=1e-6, source="a record")
        for resident in (1, 1 / 132)
    )
    assert roofline.predict(operator, few).terms["waiting"] == pytest.approx(4e-6 + 3e-6 - 1e-6)
    assert roofline.predict(operator, many).terms["waiting"] == pytest.approx(18 * 4e-6 + 36e-6 - 1e-6)
    assert "waiting" not in roofline.predict(roofline.attention(config, 3, 1, 150), few).terms  # decode is another kernel


def test_the_recorded_stack_is_within_30_percent_of_its_prediction():
    """Both from records: no clock runs here."""
    gpu = roofline.calibrated(H200, read_record("triton_calibration", "nvidia-h200"))
    record = read_record("triton_stack", "nvidia-h200")
    for batch in (1, 8):
        for rab in ("none", "position+time"):
            operators = roofline.stack(preset("gr-3b").replace(rab=rab), batch, 512)
            predicted = roofline.total([roofline.predict(op, gpu) for op in operators])
            recorded = record[f"stack gr-3b B={batch} N=512 bias={rab}"].median
            assert recorded / 1.3 < predicted < recorded * 1.3


def test_this_cpu_is_measured():
    cpu = device("cpu")
    assert cpu.measured
    assert cpu.flops["fp32"] > 1e8
    assert cpu.bandwidth > 1e8


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"V100.*A100"):
        device("V100")
    with pytest.raises(ValueError, match=r"fp4.*bf16"):
        H200.peak("fp4")
    assert hardware.this_cpu() is hardware.this_cpu()
