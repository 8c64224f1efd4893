"""Measure the vLLM engine on the GPU that is here and write what was seen to data/measured/<device>/vllm_*.json.

    python -m hstu_lab.vllm_bench [step] [slate] [load] [candidates] [--out FOLDER]

Weights are random (times do not depend on them) and made here; users and items are drawn from a seed.
"""

from __future__ import annotations

import json
import pathlib

import torch
from safetensors.torch import save_file
from torch import nn

from hstu_lab.config import ModelConfig, preset
from hstu_lab.model import EventEncoder, HSTUStack, SavedConfig, TaskHeads


def serving_config(name: str = "gr-3b", **changes) -> ModelConfig:
    """The preset without side features and users: the stack, the item table and the heads, which is what the engine holds."""
    return preset(name).replace(num_users=0, side_features=(), **changes)


def random_checkpoint(config: ModelConfig, folder: pathlib.Path, dtype: torch.dtype, device: str = "cpu") -> pathlib.Path:
    """A checkpoint of random weights that vLLM can load, written to `folder`; biases and tables are no zeros."""
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        parts = nn.ModuleDict({"encoder": EventEncoder(config), "stack": HSTUStack(config), "heads": TaskHeads(config)})
        for name, parameter in parts.named_parameters():
            if "bias" in name or "down" in name:
                nn.init.normal_(parameter, std=0.02)
        tensors = {name: tensor.to(dtype) for name, tensor in parts.state_dict().items()}
        for name, rows in config.tables:
            tensors[f"tables.embeddings.{name}.weight"] = (torch.randn(rows, config.d_model) * 0.1).to(dtype)
        tensors["tables.item_features"] = torch.zeros(len(config.side_features), config.num_items, dtype=torch.int64)
        tensors["known_items"] = torch.arange(config.num_items) > 0
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"config": config.to_json(), "format": "pt"})
    (folder / "config.json").write_text(json.dumps(SavedConfig(config).to_dict(), indent=1) + "\n")
    return folder
