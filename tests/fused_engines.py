"""Builds and runs small engines with our kernels inside: `python fused_engines.py FOLDER`, in a Python that has TensorRT 8.

FOLDER holds the files and expected outputs of CASES. Prints a line an output: case, output, largest relative error.
"""

import pathlib
import sys

import numpy as np

from hstu_lab import tensorrt_bench as bench
from hstu_lab.config import preset
from hstu_lab.tensorrt_engine import Engine

CONFIG = preset("tiny").replace(num_layers=2, max_seq_len=600)
CASES = tuple(
    bench.Case(part, precision, 256, (3,), fused=True) for part in ("ranker", "stack") for precision in ("fp16", "int8")
)


def main(folder: pathlib.Path) -> None:
    for case in CASES:
        (batch,) = case.batches
        with Engine(bench._cache(folder).get(bench._request(folder, case, batch, 2), progress=False)) as engine:
            types = {spec.name: spec.dtype for spec in engine.header.inputs}
            feed = {k: v.astype(types[k]) for k, v in bench.make_inputs(case, batch, CONFIG, False).items()}
            for graph in (False, True):
                answer = engine.infer(feed, graph=graph)
                with np.load(case.data(folder, batch)) as stored:
                    for output in answer:
                        print(case.name, output, bench.error(answer[output], stored[f"expected {output}"]), flush=True)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
