"""Notebook 08: who holds which block of the pool, and who computes what in which step of the scheduler."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import ipywidgets
import matplotlib

from hstu_lab.widgets.base import EDGE, STYLE, Explorer, Figure
from hstu_lab.widgets.serving import DECODE, PREFILL, WAITING

SCORE, CACHED = "#009e73", "#cccccc"
ACTIVITIES = {"reads its history": PREFILL, "generates an item": DECODE, "scores candidates": SCORE, "waits": "#eeeeee"}
_PAPER = {"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.75, "linewidth": 0}
_REQUESTS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#7f6a4f")


@dataclasses.dataclass(frozen=True)
class Frame:
    """A `PagedEngine` after one step. Requests are named by id.

    work: {request: (activity, tokens or candidates)} of the step; cached: tokens that an admitted request found. tables:
    {request: its blocks} and filled: {request: its cached tokens} of those still running; named: blocks that a prefix can be
    found in, with or without a holder.
    """

    work: dict[int, tuple[str, int]]
    preempted: tuple[int, ...]
    waiting: tuple[int, ...]
    cached: dict[int, int]
    tables: dict[int, tuple[int, ...]]
    filled: dict[int, int]
    named: frozenset[int]


def watch(engine) -> list[Frame]:
    """Step a `PagedEngine` until it is done; one frame a step."""
    frames, scheduler = [], engine.scheduler
    while scheduler.running or scheduler.waiting:
        generated = {r.id: bool(r.items) for r in (*scheduler.running, *scheduler.waiting)}
        before = {r.id: len(r.scores) for r in (*scheduler.running, *scheduler.waiting)}
        work, preempted = engine.step()

        def activity(request, count, generated=generated, before=before) -> str:
            if len(request.scores) > before[request.id]:
                return "scores candidates"
            return "generates an item" if count == 1 and generated[request.id] else "reads its history"

        frames.append(
            Frame(
                {r.id: (activity(r, n), n) for r, n in work},
                tuple(r.id for r in preempted),
                tuple(r.id for r in scheduler.waiting),
                {r.id: r.cached_tokens for r, _ in work if r.cached_tokens is not None},
                {r.id: tuple(r.blocks) for r in scheduler.running},
                {r.id: r.computed for r in scheduler.running},
                frozenset(engine.manager.cached.values()),
            )
        )
    return frames


def request_colour(request: int) -> str:
    """The colour of a request in every figure of this module."""
    return _REQUESTS[request % len(_REQUESTS)]


def block_map(frame: Frame, *, num_blocks: int, block_size: int, columns: int = 8) -> Figure:
    """The pool and the block tables after a step.

    A block's slots are filled in the colour of its request, in stripes where several share it; pale: nobody holds it, but its
    prefix can still be found. Beside it each running request's table: position in the prompt -> block of the pool.
    """
    holders: dict[int, list[int]] = {}
    slots: dict[int, int] = {}
    for request, table in frame.tables.items():
        for i, block in enumerate(table):
            holders.setdefault(block, []).append(request)
            slots[block] = max(slots.get(block, 0), min(frame.filled[request] - i * block_size, block_size))
    with matplotlib.rc_context({**STYLE, "axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False}):
        figure = Figure(10, 0.9 + 0.45 * max(-(-num_blocks // columns), len(frame.tables), 2))
        left, right = figure.subplots(1, 2)
        for block in range(num_blocks):
            x, y = block % columns, block // columns
            left.add_patch(
                matplotlib.patches.Rectangle((x, y), 0.94, 0.88, facecolor="white", edgecolor="#999999", linewidth=0.8)
            )
            owners = holders.get(block, [])
            if not owners and block in frame.named:
                left.add_patch(matplotlib.patches.Rectangle((x, y), 0.94, 0.88, facecolor=CACHED, linewidth=0))
            for i, owner in enumerate(owners):
                height, width = 0.88 / len(owners), 0.94 * slots[block] / block_size
                left.add_patch(
                    matplotlib.patches.Rectangle((x, y + i * height), width, height, facecolor=request_colour(owner), linewidth=0)
                )
            left.annotate(str(block), (x + 0.47, y + 0.44), ha="center", va="center", fontsize=9, bbox=_PAPER)
        left.set(xlim=(-0.05, columns), ylim=(-(-num_blocks // columns), -0.05), xticks=[], yticks=[])
        left.set_title("the pool: pale blocks are cached, white ones empty")
        longest = max((len(table) for table in frame.tables.values()), default=1)
        for row, (request, table) in enumerate(frame.tables.items()):
            for i, block in enumerate(table):
                colour = request_colour(request)
                right.add_patch(matplotlib.patches.Rectangle((i, row), 0.94, 0.88, facecolor=colour, linewidth=0))
                right.annotate(str(block), (i + 0.47, row + 0.44), ha="center", va="center", fontsize=9, bbox=_PAPER)
        right.set_yticks([row + 0.44 for row in range(len(frame.tables))], [f"request {request}" for request in frame.tables])
        right.set_xticks([i + 0.47 for i in range(longest)], [str(i * block_size) for i in range(longest)])
        right.set(xlim=(0, max(longest, 6)), ylim=(max(len(frame.tables), 1), -0.05), xlabel="first token of the block")
        right.tick_params(length=0)
        right.set_title("block tables")
    return figure


def scheduler_timeline(frames: Sequence[Frame], max_tokens: int | None = None) -> Figure:
    """Steps from left to right, one row a request: what it does in each step, with its tokens or candidates; ✕: preempted.

    White between two cells: it runs, and older requests took the step's budget. Below, the tokens and candidates of each
    step, against that budget, `max_tokens`.
    """
    requests = sorted({r for frame in frames for r in (*frame.work, *frame.waiting)})
    found: dict[int, int] = {}
    for frame in frames:
        found = {**frame.cached, **found}
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(10, 1.9 + 0.27 * len(requests))
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(0.27 * len(requests) + 0.3, 1))
        for step, frame in enumerate(frames, 1):
            for request in (*frame.waiting, *frame.work):
                kind, count = frame.work.get(request, ("waits", 0))
                row = requests.index(request)
                top.add_patch(matplotlib.patches.Rectangle((step - 0.5, row), 1, 0.9, facecolor=ACTIVITIES[kind], **EDGE))
                mark = "✕" if request in frame.preempted else str(count) if count > 1 and len(frames) <= 60 else ""
                colour = WAITING if request in frame.preempted else "black"
                top.annotate(mark, (step, row + 0.45), ha="center", va="center", fontsize=7, color=colour)
        names = [f"request {r}" + (f" ({found[r]} cached)" if found.get(r) else "") for r in requests]
        top.set_yticks([row + 0.45 for row in range(len(requests))], names, fontsize=8)
        top.set(xlim=(0.5, len(frames) + 0.5), ylim=(max(len(requests), 1), 0), title=f"{len(frames)} steps")
        floor = [0] * len(frames)
        for kind in list(ACTIVITIES)[:3]:
            heights = [sum(n for k, n in frame.work.values() if k == kind) for frame in frames]
            bottom.bar(range(1, len(frames) + 1), heights, bottom=floor, color=ACTIVITIES[kind], width=0.85)
            floor = [low + height for low, height in zip(floor, heights)]
        if max_tokens:
            bottom.axhline(max_tokens, color="#444444", linestyle="--", linewidth=1)
        bottom.set(xlabel="step" + (" (dashed: the budget)" if max_tokens else ""), ylabel="computed")
        bottom.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        handles = [matplotlib.patches.Patch(color=colour, label=kind) for kind, colour in ACTIVITIES.items()]
        figure.legend(handles=handles, loc="outside upper right", ncols=4, frameon=False, fontsize=8)
    return figure


def paging_explorer(frames: Sequence[Frame], *, num_blocks: int, block_size: int) -> Explorer:
    """Step through a recorded run (or press play): the pool and the block tables after each step.

    CSS classes: paging-step, paging-play, paging-label, paging-image.
    """

    def draw(step: int) -> tuple[str, Figure]:
        frame = frames[step - 1]
        did = ", ".join(f"{request} {kind} ({count})" for request, (kind, count) in frame.work.items())
        gone = "".join(f"; {request} preempted" for request in frame.preempted)
        held = len({block for table in frame.tables.values() for block in table})
        return f"step {step}: {did}{gone}; {held} of {num_blocks} blocks held", block_map(
            frame, num_blocks=num_blocks, block_size=block_size
        )

    step = ipywidgets.IntSlider(value=1, min=1, max=len(frames), description="after step", continuous_update=False)
    play = ipywidgets.Play(value=1, min=1, max=len(frames), interval=700).add_class("paging-play")
    ipywidgets.jslink((play, "value"), (step, "value"))
    explorer = Explorer("paging", draw, step=step)
    explorer.children = (play, *explorer.children)
    return explorer


def schedule_explorer(run: Callable[..., Sequence[Frame]], *, num_blocks: Sequence[int], max_tokens: Sequence[int]) -> Explorer:
    """Choose the pool, the budget of a step, chunked prefill and prefix caching: `run` serves the same requests again.

    run(num_blocks, max_tokens, chunked, prefix_caching) -> frames. CSS classes: schedule-num-blocks, schedule-max-tokens,
    schedule-chunked, schedule-prefix-caching, schedule-label, schedule-image.
    """

    def draw(num_blocks: int, max_tokens: int, chunked: bool, prefix_caching: bool) -> tuple[str, Figure]:
        frames = run(num_blocks=num_blocks, max_tokens=max_tokens, chunked=chunked, prefix_caching=prefix_caching)
        computed = sum(count for frame in frames for _, count in frame.work.values())
        preempted = sum(len(frame.preempted) for frame in frames)
        text = f"{len(frames)} steps, {computed} tokens and candidates computed, {preempted} preemptions"
        return text, scheduler_timeline(frames, max_tokens)

    def choice(name: str, options: Sequence[int]) -> ipywidgets.SelectionSlider:
        return ipywidgets.SelectionSlider(options=options, value=options[-1], description=name, continuous_update=False)

    return Explorer(
        "schedule", draw, num_blocks=choice("blocks", num_blocks), max_tokens=choice("budget", max_tokens),
        chunked=ipywidgets.Checkbox(value=True, description="chunked prefill"),
        prefix_caching=ipywidgets.Checkbox(value=True, description="prefix caching"),
    )  # fmt: skip
