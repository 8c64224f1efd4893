"""The event encoder of a serving step in three or four launches: packed tokens to the stack's input, and what the cache notes.

Said in PyTorch it is some thirty operators. The oracle is `hstu_lab.tokens.unpack`, the tables and
`hstu_lab.model.EventEncoder`.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from hstu_lab.ops.triton_decode import MOST_TOKENS, project_normed, project_onto
from hstu_lab.ops.triton_linear import project_residual, project_silu
from hstu_lab.ops.triton_memory import layer_norm
from hstu_lab.ops.triton_runtime import interpreted, least

MAX_FEATURES = 4


@dataclasses.dataclass(frozen=True)
class EncoderTables:
    """What reading a token looks up. Tables (rows, d_model); feature_ids (F, num_items) int64; level_bucket, level_seconds (L,).

    tables: item, then one for each feature. Tokens from `limit` up are candidates (see `hstu_lab.vllm_plugin.candidates`), from
    `user_base` up users, where there is a `user` table.
    """

    tables: tuple[Tensor, ...]
    feature_ids: Tensor
    user: Tensor | None
    action: Tensor
    gap: Tensor
    level_bucket: Tensor
    level_seconds: Tensor
    num_items: int
    num_actions: int
    user_base: int
    limit: int


@triton.jit
def table_row(Table, row, column, WIDTH: tl.constexpr):
    return tl.load(Table + row * WIDTH + column, mask=column < WIDTH, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_items", "num_actions", "user_base", "limit"])
def read_kernel(
    Tokens, T0, T1, T2, T3, T4, FeatureIds, User, Action, Gap, LevelBucket, LevelSeconds, Out, Gaps, Items, num_items,
    num_actions, user_base, limit, FEATURES: tl.constexpr, HAS_USER: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """One token a program: the sum of its rows, its gap in seconds (-1 for a candidate) and its item."""
    at = tl.program_id(0)
    column = tl.arange(0, PAD)
    token = tl.load(Tokens + at).to(tl.int64)
    is_candidate = token >= limit
    bare = token - limit
    token = tl.where(is_candidate, tl.where(bare >= num_items, 0, bare), token)
    is_user = token >= user_base
    event = tl.where(is_user, 0, token)
    item, rest = event % num_items, event // num_items
    action, level = rest % num_actions, rest // num_actions
    x = table_row(T0, item, column, WIDTH)
    if FEATURES > 0:
        x += table_row(T1, tl.load(FeatureIds + item), column, WIDTH)
    if FEATURES > 1:
        x += table_row(T2, tl.load(FeatureIds + num_items + item), column, WIDTH)
    if FEATURES > 2:
        x += table_row(T3, tl.load(FeatureIds + 2 * num_items + item), column, WIDTH)
    if FEATURES > 3:
        x += table_row(T4, tl.load(FeatureIds + 3 * num_items + item), column, WIDTH)
    if HAS_USER:
        user = table_row(User, tl.where(is_user, token - user_base, 0), column, WIDTH)
        x = tl.where(is_user, user, x)
    x += table_row(Action, action, column, WIDTH)
    x += table_row(Gap, tl.load(LevelBucket + level).to(tl.int64), column, WIDTH)
    tl.store(Out + at.to(tl.int64) * WIDTH + column, x.to(Out.dtype.element_ty), mask=column < WIDTH)
    seconds = least(tl.load(LevelSeconds + level), 2147483647).to(tl.int32)
    tl.store(Gaps + at, tl.where(is_candidate, -1, seconds))
    tl.store(Items + at, item.to(tl.int32))


def read_tokens(tokens: Tensor, known: EncoderTables) -> tuple[Tensor, Tensor, Tensor]:
    """Packed tokens (T,) -> summed rows (T, d_model), gaps (T,) int32 in seconds, -1 for a candidate, and items (T,) int32."""
    width, count = known.action.shape[1], len(tokens)
    out = torch.empty(count, width, dtype=known.action.dtype, device=tokens.device)
    gaps, items = torch.empty(2, count, dtype=torch.int32, device=tokens.device)
    tables = (*known.tables, *[known.tables[0]] * (MAX_FEATURES + 1 - len(known.tables)))
    read_kernel[(count,)](
        tokens, *tables, known.feature_ids, known.user, known.action, known.gap, known.level_bucket, known.level_seconds, out,
        gaps, items, known.num_items, known.num_actions, known.user_base, known.limit,
        FEATURES=len(known.tables) - 1, HAS_USER=known.user is not None, WIDTH=width, PAD=triton.next_power_of_2(width),
    )  # fmt: skip
    return out, gaps, items


def encode_tokens(tokens: Tensor, known: EncoderTables, encoder) -> tuple[Tensor, Tensor, Tensor]:
    """`read_tokens`, its rows through the residual MLP of `encoder`, an `hstu_lab.model.EventEncoder`."""
    x, gaps, items = read_tokens(tokens, known)
    norm, up, down = encoder.norm, encoder.up, encoder.down
    if len(tokens) <= MOST_TOKENS and (x.dtype != torch.float32 or interpreted()):
        return project_onto(project_normed(x, norm, up), down, x), gaps, items
    hidden = project_silu(layer_norm(x, norm.weight, norm.bias, norm.eps), up.weight, up.bias)
    return project_residual(hidden, down.weight, down.bias, x), gaps, items
