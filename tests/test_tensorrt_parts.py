"""Graphs with our nodes in them give what the plain ones give; ONNX's reference evaluator runs the nodes by our oracle."""

import numpy as np
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from hstu_lab import onnx_export, onnx_precision
from hstu_lab.config import preset
from hstu_lab.model import HSTU
from hstu_lab.onnx_parts import RankerPart, StackPart
from hstu_lab.tensorrt_parts import REFERENCE, FusedRankerPart, FusedStackPart, HstuAttention

LENGTH, CANDIDATES = 17, 6
CHANGES = {"all": {}, "position": {"rab": "position"}, "no bias": {"rab": "none"}, "no users": {"num_users": 0}}


@pytest.fixture(params=CHANGES, ids=lambda name: name.replace(" ", "-"), scope="module")
def model(request):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = HSTU(preset("tiny").replace(num_layers=2, **CHANGES[request.param])).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(False)


def _graph(name, part, config):
    with torch.no_grad():
        program = onnx_export.trace(name, part.eval(), config, {"length": LENGTH, "candidates": CANDIDATES})
    return onnx_precision.fold_indices(program.model_proto)


def _inputs(config, lengths):
    made = torch.Generator().manual_seed(1)
    shape = (len(lengths), LENGTH)
    x = torch.randn(*shape, config.d_model, generator=made)
    candidates = torch.randn(len(lengths), CANDIDATES, config.d_model, generator=made)
    times = torch.randint(0, 9999, shape, generator=made).cumsum(1)
    return {"x": x, "x_history": x, "x_candidates": candidates, "times": times, "lengths": torch.tensor(lengths)}


@pytest.mark.parametrize(
    ("name", "plain", "fused"), [("stack", StackPart, FusedStackPart), ("ranker", RankerPart, FusedRankerPart)]
)
def test_fused_graphs_give_the_plain_parts_answers(model, name, plain, fused):
    graph = _graph(name, fused(model), model.config)
    kinds = [node.op_type for node in graph.graph.node]
    assert kinds.count("HstuAttention") == kinds.count("NormGate") == model.config.num_layers
    run = ReferenceEvaluator(graph, new_ops=REFERENCE).run
    for lengths in ([17, 1, 9], [2]):
        given = {value.name: _inputs(model.config, lengths)[value.name] for value in graph.graph.input}
        truth = plain(model)(**given)
        ours = run(None, {key: value.numpy() for key, value in given.items()})
        for mine, expected in zip(ours, truth if isinstance(truth, tuple) else (truth,)):
            np.testing.assert_allclose(mine, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_another_formula_would_be_seen(model):
    class Wrong(HstuAttention):
        def _run(self, *inputs, **attributes):
            (out,) = super()._run(*inputs, **attributes)
            return (out[:, ::-1].copy(),)

    Wrong.__name__ = "HstuAttention"
    graph = _graph("stack", FusedStackPart(model), model.config)
    given = {key: _inputs(model.config, [17, 5])[key] for key in ("x", "times", "lengths")}
    wrong = ReferenceEvaluator(graph, new_ops=[Wrong, *REFERENCE[1:]]).run(None, {k: v.numpy() for k, v in given.items()})
    _, hidden = StackPart(model)(**given)
    assert np.abs(wrong[1] - hidden.numpy()).max() > 1e-3
