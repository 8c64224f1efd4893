"""fp16 and int8 exports of the shipped checkpoint keep its answers; the graph pass does what it says, and no more."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from hstu_lab import onnx_precision
from hstu_lab.events import World
from hstu_lab.model import load_checkpoint
from hstu_lab.onnx_export import INPUTS, OnnxError, OnnxModels, export_cached, sample_histories
from hstu_lab.onnx_report import TOLERANCE, best_overlap, diff, diff_table, parity
from hstu_lab.pipeline import SHIPPED_CHECKPOINT
from hstu_lab.tokens import encode_history


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    return load_checkpoint(SHIPPED_CHECKPOINT)


@pytest.fixture(scope="module")
def folders(small_onnx):
    return small_onnx


@pytest.fixture(scope="module")
def unseen(model):
    """Users of another seed's log, so none that calibrated int8: lengths from a bare user token up to the longest."""
    log = World(model.config, seed=0).generate(120, seed=7)
    lengths = [0, 1, 2, 15, 16, 17, 63, 100, 200, *range(3, 90, 3)]
    histories = []
    for user, length in enumerate(lengths):
        row = log.history(user)[:length]
        histories.append(encode_history(row.items, row.actions, row.timestamps, 0, model.config))
    offsets = torch.tensor([0, *map(len, histories)]).cumsum(0)
    return torch.tensor([token for history in histories for token in history]), offsets


@pytest.mark.parametrize("precision", TOLERANCE)
def test_every_output_is_within_tolerance_and_the_list_stays(model, folders, unseen, precision):
    models = OnnxModels(folders[precision], threads=1)
    assert models.precision == precision
    tokens, offsets = unseen
    candidates = torch.randint(1, model.config.num_items, (len(offsets) - 1, 30), generator=torch.Generator().manual_seed(1))
    rows = parity(model, models, tokens, offsets, candidates)
    assert len(rows) == 6
    for row in rows:
        assert row.within(TOLERANCE[precision]), row
    overlap = best_overlap(model, models, tokens, offsets)
    assert overlap.mean() >= {"fp32": 1.0, "fp16": 0.99, "int8": 0.9}[precision]
    if precision != "fp32":
        assert max(row.max_rel for row in rows) > TOLERANCE["fp32"], "as exact as fp32: is it in fewer bits at all?"


def test_a_wrong_scale_is_noticed(model, folders, unseen, tmp_path):
    """Parity must fail where calibration is off; else it proves nothing about int8."""
    for part in INPUTS:
        proto = onnx.load(folders["fp32"] / f"{part}.onnx")
        scales = dict.fromkeys(onnx_precision.quantisable(proto), 1.0)
        bad = onnx_precision.convert(proto, scales)
        onnx.save(bad, tmp_path / f"{part}.onnx")
    tokens, offsets = unseen
    rows = parity(model, OnnxModels(tmp_path, threads=1), tokens, offsets, torch.ones(len(offsets) - 1, 2, dtype=torch.int64))
    assert max(row.max_rel for row in rows) > TOLERANCE["int8"]


def test_weights_are_in_fewer_bits_and_the_files_say_so(folders):
    sizes = {}
    for precision, folder in folders.items():
        for part in INPUTS:
            proto = onnx.load(folder / f"{part}.onnx")
            onnx.checker.check_model(proto, full_check=True)
            props = {p.key: p.value for p in proto.metadata_props}
            assert props["precision"] == precision
            assert ("calibration" in props) == (precision == "int8")
            sizes[precision, part] = (folder / f"{part}.onnx").stat().st_size
            kinds = {t.data_type for t in proto.graph.initializer if len(t.dims) == 2}
            assert TensorProto.FLOAT not in kinds or precision == "fp32", (precision, part)
            quantised = sum(n.op_type == "QuantizeLinear" for n in proto.graph.node)
            assert (quantised > 0) == (precision == "int8")
    for part in INPUTS:
        assert sizes["fp32", part] > sizes["fp16", part] > sizes["int8", part]


def test_int8_products_are_those_with_weights_but_not_the_logits(folders):
    proto = onnx.load(folders["int8"] / "stack.onnx")
    into = {n.output[0]: n for n in proto.graph.node}
    products = [n for n in proto.graph.node if n.op_type == "MatMul"]
    by_int8 = [n for n in products if all(into.get(i) and into[i].op_type == "DequantizeLinear" for i in n.input)]
    layers = load_checkpoint(SHIPPED_CHECKPOINT).config.num_layers
    assert len(by_int8) == layers, "UVQK of each layer; the gated sum before the output projection is too noisy"
    assert len(products) == 4 * layers + 1
    assert all("dequantize" not in i.lower() for i in products[-1].input)


def test_int8_needs_histories_that_the_checkpoint_knows(tmp_path, model):
    with pytest.raises(OnnxError, match="int8 needs histories"):
        export_cached(SHIPPED_CHECKPOINT, tmp_path, precision="int8", histories=[])
    with pytest.raises(OnnxError, match="precision 'int4' is unknown: use one of fp32, fp16, int8"):
        export_cached(SHIPPED_CHECKPOINT, tmp_path, precision="int4")
    assert len(sample_histories(SHIPPED_CHECKPOINT)) == 64


@pytest.mark.parametrize("shape", [(1, 1), (8, 5), (64, 256)])
def test_columns_are_rounded_to_their_nearest_step(shape):
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    weight[:, 0] = 0
    values, steps = onnx_precision.quantise_columns(weight)
    assert values.dtype == np.int8
    assert (np.abs(values * steps - weight) <= steps / 2 + 1e-7).all()
    assert np.abs(values).max() <= 127


def test_the_best_step_balances_rounding_and_clipping():
    rng = np.random.default_rng(0)
    normal = np.abs(rng.normal(size=100_000))
    spiky = np.append(normal, 50.0)

    def error(step):
        clipped = np.clip(np.rint(spiky / step), -127, 127) * step
        return np.square(clipped - spiky).mean()

    best = onnx_precision.best_range
    assert best(np.full(1000, 3.0)).step == pytest.approx(3.0 / 127)
    assert error(best(spiky).step) < 0.8 * error(spiky.max() / 127)
    assert best(spiky).noise == pytest.approx(np.sqrt(error(best(spiky).step) / np.square(spiky).mean()), rel=0.1)
    assert best(normal).noise < onnx_precision.MOST_NOISE < best(spiky).noise
    assert best(np.zeros(5)).step > 0
    assert best(np.array([])).step > 0


def test_products_that_int8_would_blur_stay_in_half():
    ranges = {"quiet": onnx_precision.Range(0.1, 0.01), "noisy": onnx_precision.Range(0.1, 0.05)}
    assert onnx_precision.quiet_steps(ranges) == {"quiet": 0.1}
    assert onnx_precision.quiet_steps(ranges, most=0.1) == {"quiet": 0.1, "noisy": 0.1}


def _difference(gap):
    """y = x W - x (W - gap V): whatever int8 does to one of the products is 1 / gap times as large in y."""
    rng = np.random.default_rng(0)
    weight, other = (rng.normal(size=(32, 16)).astype(np.float32) for _ in range(2))
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "a"], ["xa"]), onnx.helper.make_node("Sin", ["x"], ["s"]),
        onnx.helper.make_node("MatMul", ["s", "b"], ["sb"]), onnx.helper.make_node("MatMul", ["s", "same"], ["sa"]),
        onnx.helper.make_node("Sub", ["sa", "sb"], ["d"]), onnx.helper.make_node("Mul", ["xa", "zero"], ["nothing"]),
        onnx.helper.make_node("Add", ["d", "nothing"], ["y"]),
    ]  # fmt: skip
    weights = {"a": weight, "same": weight, "b": weight - np.float32(gap) * other, "zero": np.float32(0)}
    tensors = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    ends = [
        onnx.helper.make_tensor_value_info(*end)
        for end in (("x", TensorProto.FLOAT, ["n", 32]), ("y", TensorProto.FLOAT, ["n", 16]))
    ]
    graph = onnx.helper.make_graph(nodes, "difference", ends[:1], ends[1:], tensors)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)


def test_products_whose_noise_grows_on_the_way_go_back_to_half():
    batches = [{"x": np.random.default_rng(1).normal(size=(50, 32)).astype(np.float32)}]
    for gap, kept in ((1.0, {"x", "s"}), (0.02, {"x"})):
        model = _difference(gap)
        ranges = onnx_precision.calibrate(model, batches)
        ranges["s"] = onnx_precision.Range(ranges["s"].step, ranges["x"].noise + 1e-6)  # the noisier of the two, by a hair
        steps = onnx_precision.quiet_steps(ranges)
        assert steps.keys() == {"x", "s"}
        assert onnx_precision.settle(model, ranges, steps, batches).keys() == kept, gap


def test_calibration_without_histories_is_refused(folders):
    with pytest.raises(ValueError, match="no histories"):
        onnx_precision.calibrate(onnx.load(folders["fp32"] / "encoder.onnx"), [])


def test_the_diff_names_what_was_lost(folders, tmp_path):
    stack = folders["fp32"] / "stack.onnx"
    assert diff(stack, stack) == []
    rows = {row.what: row for row in diff(stack, folders["int8"] / "stack.onnx")}
    assert rows["metadata precision"].after == "int8"
    assert rows["weights FLOAT"].lost
    assert rows["operator QuantizeLinear"].before == "0"
    assert not any(what.startswith(("input", "output")) for what in rows)
    proto = onnx.load(stack)
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 5
    del proto.graph.output[1]
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "lost.onnx")
    lost = {row.what for row in diff(stack, tmp_path / "lost.onnx") if row.lost}
    assert {"input x", "output hidden", "metadata checkpoint"} <= lost
    text = diff_table(diff(stack, tmp_path / "lost.onnx"))
    assert "- input x" in text
    assert "float (batch, 5, 64)" in text
