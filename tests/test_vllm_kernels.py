"""The engine on the Triton kernels, in Triton's interpreter: the same answers as on the oracle's operators."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytestmark = [pytest.mark.timeout(300), pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")]

SCRIPT = """
import json, sys
from hstu_lab.vllm_engine import Engine, EngineOptions

def answers(ops):
    options = EngineOptions(kv_cache_memory_bytes=8 << 20, max_num_seqs=4, ops=ops, prompt_embeds=False)
    prompts = [list(range(100, 100 + n)) for n in (5, 20)]
    with Engine(sys.argv[1], options) as engine:
        slates = engine.slate(prompts, [[7], []], 3)
        whole = [list(range(100, 132)), list(range(200, 216))]  # pages of 16 tokens and nothing behind them
        engine.topk(whole, [[], []], 3)
        candidates = [list(range(1, 35)), list(range(1, 35)), [5, 7]]
        scores = engine.score([prompts[1], *whole], candidates) + engine.score(whole, candidates[1:])
        engine.cached_scores = None
        scores += engine.score(whole, candidates[1:])  # as prompt tokens
    return [g.items for g in slates], [g.logprobs for g in slates], [s.tolist() for s in scores]

expected = answers("reference")
from hstu_lab.ops import triton_candidates, triton_decode, triton_serving
steps = {"small": 0, "candidates": 0, "against_cache": 0, "own": 0}
def counted(module, name, key):
    function = getattr(module, name)
    def call(*args, **kwargs):
        steps[key] += 1
        return function(*args, **kwargs)
    setattr(module, name, call)
counted(triton_decode, "decode_layer", "small")
counted(triton_serving, "attention_candidates", "candidates")
counted(triton_candidates, "candidates_stack", "against_cache")
counted(triton_candidates, "attention_candidates", "own")
print(json.dumps([expected, answers("triton"), steps]))
"""


def test_the_engine_answers_the_same_on_the_kernels(tiny_checkpoint):
    """Slates (small steps, beside prompts) and candidates, whose task scores come from what the last layer left in the cache."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", SCRIPT, tiny_checkpoint], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    expected, got, steps = json.loads(run.stdout.splitlines()[-1])
    assert steps["small"] >= 2 * 2, "no small step was computed by the kernels for it"
    assert steps["candidates"], "no tile of candidates was"
    assert steps["against_cache"] == 1, "those of whole pages, without others, share a step"
    assert steps["own"] == 2, "in both layers, candidates beside a tail are tiles of their own"
    assert got[0] == expected[0]
    for ours, theirs in zip(got[1], expected[1], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    for ours, theirs in zip(got[2], expected[2], strict=True):
        assert torch.tensor(ours).sub(torch.tensor(theirs)).abs().max() < 1e-5
