"""The three ways of a decode step that the benchmark compares do the same work."""

import pytest
import torch
from triton_cases import DEVICE, GPU, LIMITS, error, poison

from hstu_lab.config import preset
from hstu_lab.decode_bench import DecodeStep, Model


@torch.inference_mode()
def test_a_decode_step_by_every_way():
    dtype = torch.bfloat16 if GPU else torch.float32
    config = preset("tiny").replace(num_users=0, side_features=())
    step = DecodeStep(Model.random(config, dtype, DEVICE), 3, 21, page=8)
    exact = step.exact()
    assert exact.isfinite().all()
    for way in ("fused", "operators"):
        poison()
        assert error(getattr(step, way)(), exact) <= LIMITS[dtype], way
    slot = step.caches[0, 0, 0].nbytes
    weights = sum(4 * config.d_model**2 + config.d_model**2 for _ in range(config.num_layers)) * exact.element_size()
    assert step.bytes == pytest.approx(weights * (0.5 if GPU else 1) + 3 * 22 * slot * config.num_layers)
