"""HSTU as an out-of-tree vLLM model: the entry point `vllm.general_plugins` calls `register` in every vLLM process."""

from __future__ import annotations


def register() -> None:
    """Make vLLM and transformers know `model_type` "hstu_lab" and its architecture. Idempotent."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from hstu_lab.vllm_plugin.modeling import HSTUForRecommendation, HSTUPretrainedConfig

    AutoConfig.register(HSTUPretrainedConfig.model_type, HSTUPretrainedConfig, exist_ok=True)
    register_backend(AttentionBackendEnum.CUSTOM, "hstu_lab.vllm_plugin.attention.HSTUAttentionBackend")
    # The class itself, not "module:Class": vLLM inspects a string in a subprocess of its own, which takes ten seconds.
    if "HSTUForRecommendation" not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model("HSTUForRecommendation", HSTUForRecommendation)
