"""Paged attention for a serving step of any mixture: requests that add one token beside prompts of thousands.

A grid that fits the longest prompt would be nearly empty, and tiles that fit it would waste most of their rows on the others. So
the step's query tiles are listed on the device, once for all layers: short requests one small tile each, long ones as many large
tiles as they need, and apart from them the tiles of candidates only: those all stand at one position and time, so that one row of
bias serves the whole tile. Nothing depends on a number that the host would have to read: one CUDA graph serves every mixture of
a size.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from hstu_lab.ops.reference import RelativeBias
from hstu_lab.ops.triton_paged import LIST_ROWS, NO_TILE, PagedTiles, attention_paged, default_tiles
from hstu_lab.ops.triton_runtime import add, capability, interpreted, most, processors

SHORT = 16
"""Most queries of a request that count as short."""


@triton.jit
def list_tiles_kernel(
    QueryOffsets, SeqLens, HistoryLens, Short, Long, Alike, batch, length, BATCH_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
    SHORT_ROWS: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    """One program: an entry of Short for every request; of Long or Alike for each tile of a long one; none left unwritten."""
    b = tl.arange(0, BATCH_PAD)
    inside = b < batch
    count = tl.load(QueryOffsets + b + 1, mask=inside, other=0) - tl.load(QueryOffsets + b, mask=inside, other=0)
    count = count.to(tl.int32)
    tl.store(Short + b, tl.where((count > 0) & (count <= SHORT_ROWS), b * LIST_ROWS, FILL), mask=inside)
    tiles = tl.where(count > SHORT_ROWS, (count + BLOCK_M - 1) // BLOCK_M, 0)
    end = tl.associative_scan(tiles, 0, add)
    # Rows of a request before its first candidate, of those that are new.
    before = tl.load(HistoryLens + b, mask=inside, other=0) - (tl.load(SeqLens + b, mask=inside, other=0) - count)
    for tile in range(tl.reduce(tiles, 0, most)):
        entry, alike = b * LIST_ROWS + tile, tile * BLOCK_M >= before
        tl.store(Long + end - tiles + tile, tl.where(alike, FILL, entry), mask=tile < tiles)
        tl.store(Alike + end - tiles + tile, tl.where(alike, entry, FILL), mask=tile < tiles)
    for first in range(tl.reduce(tiles, 0, add), length, BATCH_PAD):
        nothing = tl.full((BATCH_PAD,), FILL, tl.int32)
        tl.store(Long + first + b, nothing, mask=first + b < length)
        tl.store(Alike + first + b, nothing, mask=first + b < length)


@dataclasses.dataclass(frozen=True)
class StepTiles:
    """The query tiles of a step: lists (L,) int32 for `attention_paged`, and how large they are.

    `short`: a tile for every short request. `long` and `alike` (candidates only): tiles of the others; missing in small steps.
    """

    short: Tensor
    long: Tensor | None
    alike: Tensor | None
    short_tiles: PagedTiles
    long_tiles: PagedTiles


def list_tiles(query_offsets: Tensor, seq_lens: Tensor, history_lens: Tensor, like: Tensor, page: int, longest: int) -> StepTiles:
    """List the query tiles of a step, whose queries `like` resembles; query_offsets (B + 1,), seq_lens and history_lens (B,).

    like (T, H, d); page: the cache's block size; longest: most tokens that a sequence can have.
    """
    batch = query_offsets.shape[0] - 1
    total, heads, d = like.shape
    small = default_tiles(like.dtype, d, page, SHORT, capability(like))
    if interpreted():
        splits = 2
    else:
        splits = min((4 if d <= 64 else 2) * processors(like) // (batch * heads), triton.cdiv(longest, 2 * small.block_n), 16)
    # The splits of a large step would have to be added up for all of its rows, and it fills the GPU without them.
    small = dataclasses.replace(small, splits=max(1, splits) if total <= 1024 else 1)
    large = default_tiles(like.dtype, d, page, 512, capability(like))
    short = torch.empty(batch, dtype=torch.int32, device=query_offsets.device)
    length = total // large.block_m + min(batch, total // (SHORT + 1))
    long, alike = torch.empty(2, length, dtype=torch.int32, device=query_offsets.device)
    list_tiles_kernel[(1,)](
        query_offsets, seq_lens, history_lens, short, long, alike, batch, length,
        BATCH_PAD=max(16, triton.next_power_of_2(batch)), BLOCK_M=large.block_m, SHORT_ROWS=SHORT, FILL=NO_TILE,
    )  # fmt: skip
    if not length or total <= SHORT:
        long = alike = None
    return StepTiles(short, long, alike, small, large)


def attention_step(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, query_offsets: Tensor, seq_lens: Tensor,
    tiles: StepTiles, *, divisor: float, bias: RelativeBias | None, query_times: Tensor, slot_times: Tensor, history_lens: Tensor,
) -> Tensor:  # fmt: skip
    """`attention_paged` of a whole step, its tiles listed by `list_tiles`; rows that belong to no sequence are left unwritten."""
    where = q, key_cache, value_cache, block_table, query_offsets, seq_lens
    common = {
        "divisor": divisor, "bias": bias, "query_times": query_times, "slot_times": slot_times, "history_lens": history_lens,
    }  # fmt: skip
    out = attention_paged(*where, **common, max_queries=SHORT, tiles=tiles.short_tiles, tile_list=tiles.short)
    if tiles.long is not None:
        attention_paged(*where, **common, max_queries=q.shape[0], tiles=tiles.long_tiles, tile_list=tiles.long, out=out)
        attention_paged(*where, **common, max_queries=1, tiles=tiles.long_tiles, tile_list=tiles.alike, out=out)
    return out
