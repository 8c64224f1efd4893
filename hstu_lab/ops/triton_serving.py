"""Paged attention for a serving step of any mixture: requests that add one token beside prompts of thousands.

A grid that fits the longest prompt would be nearly empty, and tiles that fit it would waste most of their rows on the others. So
the step's query tiles are listed on the device, once for all layers: short requests one small tile each, long ones as many large
tiles as they need, and apart from them the tiles of candidates only: those all stand at one position and time, see
`triton_candidates`. Nothing depends on a number that the host would have to read: one CUDA graph serves every mixture of
a size.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from hstu_lab.ops import triton_candidates
from hstu_lab.ops.reference import RelativeBias
from hstu_lab.ops.triton_candidates import attention_candidates
from hstu_lab.ops.triton_paged import LIST_ROWS, NO_TILE, PagedTiles, attention_paged, default_tiles
from hstu_lab.ops.triton_runtime import add, capability, interpreted, least, most, processors

SHORT = 16
"""Most queries of a request that count as short."""


@triton.jit(do_not_specialize=["batch", "long_length", "alike_length"])
def list_tiles_kernel(
    QueryOffsets, SeqLens, HistoryLens, Short, Long, Alike, batch, long_length, alike_length, BATCH_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, ALIKE_M: tl.constexpr, SHORT_ROWS: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    """One program: an entry of Short for every request; of Long or Alike for each tile of a long one; none left unwritten."""
    b = tl.arange(0, BATCH_PAD)
    inside = b < batch
    count = tl.load(QueryOffsets + b + 1, mask=inside, other=0) - tl.load(QueryOffsets + b, mask=inside, other=0)
    count = count.to(tl.int32)
    tl.store(Short + b, tl.where((count > 0) & (count <= SHORT_ROWS), b * LIST_ROWS, FILL), mask=inside)
    count = tl.where(count > SHORT_ROWS, count, 0)
    # Rows of a request before its first candidate, of those that are new.
    before = tl.load(HistoryLens + b, mask=inside, other=0) - (tl.load(SeqLens + b, mask=inside, other=0) - count)
    before = least(most(before.to(tl.int32), 0), count)
    tiles = (before + BLOCK_M - 1) // BLOCK_M
    end = tl.associative_scan(tiles, 0, add)
    for tile in range(tl.reduce(tiles, 0, most)):
        tl.store(Long + end - tiles + tile, b * LIST_ROWS + tile, mask=tile < tiles)
    nothing = tl.full((BATCH_PAD,), FILL, tl.int32)
    for first in range(tl.reduce(tiles, 0, add), long_length, BATCH_PAD):
        tl.store(Long + first + b, nothing, mask=first + b < long_length)
    done = tiles * (BLOCK_M // ALIKE_M)
    tiles = most((count + ALIKE_M - 1) // ALIKE_M - done, 0)
    end = tl.associative_scan(tiles, 0, add)
    for tile in range(tl.reduce(tiles, 0, most)):
        tl.store(Alike + end - tiles + tile, b * LIST_ROWS + done + tile, mask=tile < tiles)
    for first in range(tl.reduce(tiles, 0, add), alike_length, BATCH_PAD):
        tl.store(Alike + first + b, nothing, mask=first + b < alike_length)


@dataclasses.dataclass(frozen=True)
class StepTiles:
    """The query tiles of a step: lists (L,) int32 for `attention_paged`, and how large they are.

    `short`: a tile for every short request. `long` and `alike` (candidates only): tiles of the others; missing in small steps.
    `buckets`: what `time_buckets` says of the candidates' histories.
    """

    short: Tensor
    long: Tensor | None
    alike: Tensor | None
    short_tiles: PagedTiles
    long_tiles: PagedTiles
    alike_tiles: PagedTiles
    buckets: Tensor | None = None


def list_tiles(
    block_table: Tensor, query_offsets: Tensor, seq_lens: Tensor, history_lens: Tensor, like: Tensor, page: int, *,
    bias: RelativeBias | None, query_times: Tensor, slot_times: Tensor,
) -> StepTiles:  # fmt: skip
    """List the query tiles of a step, whose queries `like` (T, H, d) resembles; page: the cache's block size.

    bias: of any layer, it says which parts there are. Shapes of the rest as in `attention_paged`.
    """
    batch, longest = query_offsets.shape[0] - 1, block_table.shape[1] * page
    total, heads, d = like.shape
    small = default_tiles(like.dtype, d, page, SHORT, capability(like))
    if interpreted():
        splits = 1 if total > SHORT else 2
    else:
        splits = min((4 if d <= 64 else 2) * processors(like) // (batch * heads), triton.cdiv(longest, 2 * small.block_n), 16)
    # The splits of a large step would have to be added up for all of its rows, and it fills the GPU without them.
    small = dataclasses.replace(small, splits=max(1, splits) if total <= 4 * SHORT else 1)
    large = default_tiles(like.dtype, d, page, 512, capability(like))
    alike_tiles = triton_candidates.default_tiles(like)
    alike_tiles = dataclasses.replace(alike_tiles, block_m=min(alike_tiles.block_m, large.block_m))
    short = torch.empty(batch, dtype=torch.int32, device=query_offsets.device)
    lengths = [total // size + min(batch, total // (SHORT + 1)) for size in (large.block_m, alike_tiles.block_m)]
    long, alike = (torch.empty(length, dtype=torch.int32, device=query_offsets.device) for length in lengths)
    list_tiles_kernel[(1,)](
        query_offsets, seq_lens, history_lens, short, long, alike, batch, *lengths,
        BATCH_PAD=max(16, triton.next_power_of_2(batch)), BLOCK_M=large.block_m, ALIKE_M=alike_tiles.block_m, SHORT_ROWS=SHORT,
        FILL=NO_TILE,
    )  # fmt: skip
    if total <= SHORT:
        return StepTiles(short, None, None, small, large, alike_tiles)
    where = block_table, query_offsets, seq_lens, history_lens
    buckets = triton_candidates.time_buckets(bias, *where, query_times, slot_times)
    return StepTiles(short, long, alike, small, large, alike_tiles, buckets)


def attention_step(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, query_offsets: Tensor, seq_lens: Tensor,
    tiles: StepTiles, *, divisor: float, bias: RelativeBias | None, query_times: Tensor, slot_times: Tensor, history_lens: Tensor,
) -> Tensor:  # fmt: skip
    """`attention_paged` of a whole step, its tiles listed by `list_tiles`; rows that belong to no sequence are left unwritten."""
    where = q, key_cache, value_cache, block_table, query_offsets, seq_lens
    common = {
        "divisor": divisor, "bias": bias, "query_times": query_times, "slot_times": slot_times, "history_lens": history_lens,
    }  # fmt: skip
    out = torch.empty_like(q, memory_format=torch.contiguous_format)

    def alike() -> None:
        attention_candidates(
            *where, history_lens, tiles.buckets, divisor=divisor, bias=bias, tiles=tiles.alike_tiles, tile_list=tiles.alike,
            out=out,
        )  # fmt: skip

    # Adding up parts writes every row: whichever does so comes first. Only one does, see `list_tiles`.
    if tiles.alike is not None and tiles.alike_tiles.splits > 1:
        alike()
    attention_paged(*where, **common, max_queries=SHORT, tiles=tiles.short_tiles, tile_list=tiles.short, out=out)
    if tiles.long is not None:
        attention_paged(*where, **common, max_queries=q.shape[0], tiles=tiles.long_tiles, tile_list=tiles.long, out=out)
    if tiles.alike is not None and tiles.alike_tiles.splits == 1:
        alike()
    return out
