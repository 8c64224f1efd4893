"""What TensorRT 8.6 must have spelled out before its parser sees a graph; newer ones read the files as they are."""

from __future__ import annotations

import numpy as np


def spelled_out(model):
    """A copy of an `onnx.ModelProto` as the parser of 8.6 must see it; every change keeps the values."""
    return with_float_weights(with_plain_norms(model))


def with_plain_norms(model):
    """ReduceL2 as products, their sum and its root. Since opset 18 its axes are an input, which 8.6 does not look at: it reduces
    over all axes without a word. With one history that is the same; with eight, logits came out smaller by the root of eight.
    """
    import onnx
    from onnx import helper

    made = onnx.ModelProto()
    made.CopyFrom(model)
    nodes = []
    for node in made.graph.node:
        if node.op_type != "ReduceL2":
            nodes.append(node)
            continue
        square, total = f"{node.output[0]}_squares", f"{node.output[0]}_total"
        kept = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        nodes += [
            helper.make_node("Mul", [node.input[0], node.input[0]], [square], name=square),
            helper.make_node("ReduceSum", [square, *node.input[1:]], [total], name=total, **kept),
            helper.make_node("Sqrt", [total], [node.output[0]], name=f"{node.output[0]}_root"),
        ]
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    return made


def with_float_weights(model):
    """A copy of an `onnx.ModelProto` in which no weight is stored as int8: it knows "float, quantised, dequantised" only.

    A product's int8 weight (K, N) with one step a column becomes float32 (N, K) -> QuantizeLinear -> DequantizeLinear ->
    Transpose, the form that 8.6 is documented to run on int8 tensor cores. The values are the same.
    """
    import onnx
    from onnx import helper, numpy_helper

    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        stored = tensors.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if stored is None or len(stored.dims) != 2:
            nodes.append(node)
            continue
        weight, steps, zeros = node.input
        turned = (numpy_helper.to_array(stored) * numpy_helper.to_array(tensors[steps])).astype(np.float32).T
        name = f"{weight}_float"
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(turned), name))
        graph.initializer.remove(stored)
        nodes += [
            helper.make_node("QuantizeLinear", [name, steps, zeros], [f"{name}_q"], name=f"{name}_quantize", axis=0),
            helper.make_node("DequantizeLinear", [f"{name}_q", steps, zeros], [f"{name}_dq"], name=f"{name}_dequantize", axis=0),
            helper.make_node("Transpose", [f"{name}_dq"], [node.output[0]], name=f"{name}_turn", perm=[1, 0]),
        ]
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(nodes)
    return made
