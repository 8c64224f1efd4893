"""The encoder of a step, small or large, against the model's own: packed tokens of every kind, with and without users."""

import types

import pytest
import torch
from triton_cases import DEVICE, GPU, LIMITS, error, poison, triton_encoder

from hstu_lab.config import preset
from hstu_lab.model import EventEncoder
from hstu_lab.ops import reference
from hstu_lab.tokens import level_seconds, unpack
from hstu_lab.vllm_plugin.candidates import strip
from hstu_lab.vllm_plugin.modeling import DeviceTables, HSTUForRecommendation

DTYPES = [torch.float16, *([torch.bfloat16] if GPU else [torch.float32])]


@torch.inference_mode()
@pytest.mark.parametrize("times", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("changes", [{}, {"num_users": 0, "side_features": ()}, {"d_model": 50, "num_users": 0}], ids=str)
def test_packed_tokens(dtype, changes, times):
    """The whole of what the model reads of a step: rows, gaps and items; events, users, candidates, marks, bare items."""
    config = preset("tiny").replace(**changes)
    g = torch.Generator().manual_seed(3)
    tables, encoder = DeviceTables(config), EventEncoder(config)
    for parameter in [*tables.parameters(), *encoder.parameters()]:
        torch.nn.init.normal_(parameter, std=0.3, generator=g)
    for count, row in zip([rows for _, rows in config.side_features], tables.item_features):
        row.copy_(torch.randint(0, count, row.shape, generator=g))
    seconds = torch.tensor(level_seconds(config.num_time_levels)).to(DEVICE)
    model = types.SimpleNamespace(
        config=config, tables=tables.to(dtype).to(DEVICE), encoder=encoder.to(dtype).to(DEVICE), level_seconds=seconds,
        level_bucket=reference.time_bucket(seconds, config.num_time_buckets),
    )  # fmt: skip
    known = HSTUForRecommendation.encoder_tables.func(model)
    ids = [torch.randint(0, config.user_token_base, (7,), generator=g), torch.tensor([0, 1, config.num_items - 1])]
    ids += [torch.tensor([config.token_limit, config.token_limit + 5, config.token_limit + config.num_items + 9])]
    ids += [torch.tensor([config.user_token_base - 1, *([config.user_token_base + 4] if config.num_users else [])])]
    ids = torch.cat(ids).repeat(times).to(DEVICE)
    poison()
    x, gaps, items = triton_encoder.encode_tokens(ids, known, model.encoder)

    tokens, is_candidate = strip(ids, config)
    item, action, level, _ = unpack(tokens, config)
    expected = model.encoder.float()(model.tables.float()(tokens), action, model.level_bucket[level])
    assert error(x, expected) <= LIMITS[dtype]
    assert items.equal(item.int())
    assert gaps.equal(seconds[level].masked_fill(is_candidate, -1).int())
