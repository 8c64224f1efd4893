"""FBGEMM's embedding tables, to measure the hot cache against: what TorchRec users have for a table in host memory.

FBGEMM (https://github.com/pytorch/FBGEMM) keeps such a table in unified memory. MANAGED reads every row over the bus;
MANAGED_CACHING keeps some of them on the GPU in sets of 32 slots, where the least recently (LRU) or least frequently (LFU) used
goes first: a lookup brings all missing rows in, on the same stream, then reads. It takes fbgemm-gpu's CUDA build; `missing` says
when that is not here.
"""

from __future__ import annotations

import torch
from torch import Tensor

WAYS = 32
"""Slots of a set. A row may sit in one set only: sets overflow before the cache is full."""


def missing() -> str | None:
    """Why FBGEMM's caches cannot run here, or None where they can."""
    try:
        import fbgemm_gpu
    except (ImportError, OSError) as error:
        return f"fbgemm_gpu does not import ({str(error).splitlines()[0]}): pip install fbgemm-gpu, as built for this PyTorch"
    if (variant := getattr(fbgemm_gpu, "__variant__", "cpu")) != "cuda":
        return f"fbgemm_gpu is the {variant} build: its caches need the CUDA build, pip install fbgemm-gpu"
    return None if torch.cuda.is_available() else "no NVIDIA GPU here"


class UvmTable:
    """A table of float16 rows (N, D) in FBGEMM's table batched embedding, one row out for each id in.

    location: DEVICE (the whole table in GPU memory), MANAGED, MANAGED_CACHING, or HOST, which is read on the CPU. capacity: rows
    to keep with MANAGED_CACHING, rounded down to whole sets. algorithm: "LRU" or "LFU". training: the operator that models are
    trained with (it writes evicted rows back), else the one of quantised inference. bag: ids that one warp reads in
    turn.

    Rows are copied from `table`. Raises ValueError for a capacity of less than one set.
    """

    def __init__(
        self, table: Tensor, location: str, capacity: int = 0, algorithm: str = "LRU", *, training: bool = False, bag: int = 1
    ):  # fmt: skip
        from fbgemm_gpu import split_table_batched_embeddings_ops_common as common
        from fbgemm_gpu.split_embedding_configs import SparseType

        if location == "MANAGED_CACHING" and capacity < WAYS:
            raise ValueError(f"capacity is {capacity}: a cache has whole sets, so give {WAYS} rows or more")
        rows, width = table.shape
        place, device = common.EmbeddingLocation[location], "cpu" if location == "HOST" else "cuda"
        options = {
            "pooling_mode": common.PoolingMode.NONE, "output_dtype": SparseType.FP16, "device": torch.device(device),
            "bounds_check_mode": common.BoundsCheckMode.NONE, "cache_algorithm": common.CacheAlgorithm[algorithm],
            "cache_sets": capacity // WAYS,
        }  # fmt: skip
        self.bag, self.caches = bag, location == "MANAGED_CACHING"
        self._offsets: dict[tuple[int, int], Tensor] = {}
        if training:
            from fbgemm_gpu import split_table_batched_embeddings_ops_training as ops

            spec = (rows, width, place, ops.ComputeDevice.CPU if location == "HOST" else ops.ComputeDevice.CUDA)
            self.op = ops.SplitTableBatchedEmbeddingBagsCodegen([spec], weights_precision=SparseType.FP16, **options)
            self.op.split_embedding_weights()[0].copy_(table)
        else:
            from fbgemm_gpu import split_table_batched_embeddings_ops_inference as ops

            self.op = ops.IntNBitTableBatchedEmbeddingBagsCodegen([("", rows, width, SparseType.FP16, place)], **options)
            self.op.initialize_weights()
            self.op.split_embedding_weights()[0][0].copy_(table.view(torch.uint8))

    @torch.no_grad()
    def rows(self, ids: Tensor) -> Tensor:
        """Rows (T, D) float16 of ids (T,) int64, on the table's device; T a multiple of `bag`."""
        key = len(ids), self.bag
        if key not in self._offsets:
            self._offsets[key] = torch.arange(0, len(ids) + 1, self.bag, device=ids.device)
        return self.op(ids, self._offsets[key])

    def forget(self) -> None:
        """Empty the cache and its counts."""
        self.op.reset_cache_states()

    def cached(self, ids: Tensor) -> Tensor:
        """Which of ids (T,) are in a slot now: (T,) bool. Only for MANAGED_CACHING."""
        state = self.op
        asked = torch.ops.fbgemm.linearize_cache_indices(state.cache_hash_size_cumsum, ids, ids.new_tensor([0, len(ids)]))
        return torch.ops.fbgemm.lxu_cache_lookup(asked, state.lxu_cache_state, int(state.total_cache_hash_size)) >= 0
