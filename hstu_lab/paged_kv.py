"""A serving engine small enough to read: paged keys and values, prefix reuse, continuous batching, M-FALCON.

`BlockManager` says who holds which block, `Scheduler` who computes what next, `PagedEngine` computes it with our model. A
token list is a prefix's whole identity: gaps are part of the tokens (`hstu_lab.tokens`), so equal tokens mean equal times.
Sources: PagedAttention, Kwon et al. 2023 (arXiv:2309.06180); M-FALCON, Zhai et al. 2024 (arXiv:2402.17152, section 3.4).
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Sequence

import torch

from hstu_lab.model import HSTU, KVCache


@dataclasses.dataclass(eq=False)
class Request:
    """One user's request and how far it got; also its answer, once `done`.

    tokens: the prompt, then the items generated; the first `computed` are cached in `blocks`. items: what was chosen, best
    or first first (topk, slate). scores (C, 3): task probabilities of the `candidates` (score).
    """

    id: int
    task: str
    tokens: list[int]
    count: int = 0
    candidates: list[int] = dataclasses.field(default_factory=list)
    excluded: set[int] = dataclasses.field(default_factory=set)
    items: list[int] = dataclasses.field(default_factory=list)
    scores: list[list[float]] = dataclasses.field(default_factory=list)
    blocks: list[int] = dataclasses.field(default_factory=list)
    computed: int = 0
    cached_tokens: int | None = None
    done: bool = False

    @property
    def pending(self) -> int:
        """Tokens still to read; when all are read, candidates still to score."""
        return len(self.tokens) - self.computed or len(self.candidates) - len(self.scores)


class BlockManager:
    """Blocks of `block_size` slots: reference counts, a free list, and a trie of full blocks that outlive their request.

    A cached block is known by (serial number of the block before it, its tokens). Serials are never used twice, and the
    dictionary compares keys, not only their hashes: two prefixes share a block only if all their tokens are equal.
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True, copy=lambda source, target: None):
        self.num_blocks, self.block_size, self.prefix_caching, self.copy = num_blocks, block_size, prefix_caching, copy
        self.references = [0] * num_blocks
        self.free = collections.OrderedDict.fromkeys(range(num_blocks))
        self.cached: dict[tuple[int, tuple[int, ...]], int] = {}
        self.keys, self.serials = [None] * num_blocks, [0] * num_blocks
        self._next_serial = itertools.count(1)

    def match(self, tokens: Sequence[int]) -> list[int]:
        """Cached blocks that hold the longest prefix of the tokens, in order. Takes no reference."""
        found, parent, size = [], 0, self.block_size
        for end in range(size, len(tokens) + 1, size):
            block = self.cached.get((parent, tuple(tokens[end - size : end])))
            if block is None:
                break
            found.append(block)
            parent = self.serials[block]
        return found

    def share(self, blocks: Sequence[int]) -> list[int]:
        """One more reference to each of the blocks."""
        for block in blocks:
            self.free.pop(block, None)
            self.references[block] += 1
        return list(blocks)

    def release(self, blocks: Sequence[int]) -> None:
        """One reference fewer. The last block goes first: prefixes are evicted from their end, unnamed blocks before."""
        for block in reversed(blocks):
            if not self.references[block]:
                raise RuntimeError(f"block {block} is released twice")
            self.references[block] -= 1
            if not self.references[block]:
                self.free[block] = None
                self.free.move_to_end(block, last=self.keys[block] is not None)

    def reserve(self, request: Request, count: int) -> bool:
        """Make room for the request's next `count` tokens, or change nothing and return False."""
        size, first = self.block_size, request.computed // self.block_size
        wanted = -(-min(request.computed + count, len(request.tokens)) // size)
        shared = first < min(wanted, len(request.blocks)) and self.references[request.blocks[first]] > 1
        if wanted - len(request.blocks) + shared > len(self.free):
            return False
        if shared:  # copy on write: somebody else reads the block that the next token would change
            source, request.blocks[first] = request.blocks[first], self._allocate()
            self.copy(source, request.blocks[first])
            self.release([source])
        request.blocks += [self._allocate() for _ in range(wanted - len(request.blocks))]
        return True

    def _allocate(self) -> int:
        block, _ = self.free.popitem(last=False)
        self.cached.pop(self.keys[block], None)  # evicted: its content is about to change
        self.keys[block], self.references[block] = None, 1
        return block

    def publish(self, request: Request, count: int) -> None:
        """Note that the request's next `count` tokens are computed, and let others find what is full by now."""
        size, before = self.block_size, request.computed
        request.computed += count
        for i in range(before // size, request.computed // size) if self.prefix_caching else ():
            parent = self.serials[request.blocks[i - 1]] if i else 0
            key, ours = (parent, tuple(request.tokens[i * size : (i + 1) * size])), request.blocks[i]
            theirs = self.cached.setdefault(key, ours)
            if theirs != ours:  # somebody published an equal block before: use theirs
                request.blocks[i] = self.share([theirs])[0]
                self.release([ours])
            elif self.keys[ours] is None:
                self.keys[ours], self.serials[ours] = key, next(self._next_serial)


class Scheduler:
    """Continuous batching: every step takes what fits of the running requests, oldest first, then admits waiting ones.

    A step computes at most `max_tokens` tokens and candidates (`micro_batch` candidates a request). Without `chunked` a prompt
    is read in one step. Where blocks run out the youngest request is preempted: it returns them and waits at the front.
    """

    def __init__(self, manager: BlockManager, max_tokens: int, max_running: int, micro_batch: int, chunked: bool = True):
        self.manager, self.max_tokens, self.max_running = manager, max_tokens, max_running
        self.micro_batch, self.chunked = micro_batch, chunked
        self.waiting, self.running = collections.deque[Request](), list[Request]()

    def schedule(self) -> tuple[list[tuple[Request, int]], list[Request]]:
        """The next step's work as (request, tokens or candidates), and who was preempted for it."""
        work, preempted, budget = [], [], self.max_tokens
        for request in list(self.running):
            if request not in self.running:  # preempted for an older one
                continue
            count = self._count(request, budget)
            while count and not self.manager.reserve(request, count):
                preempted.append(victim := self.running.pop())
                self._give_back(victim)
                self.waiting.appendleft(victim)
                count = 0 if victim is request else count
            if count:
                work.append((request, count))
                budget -= count
        while self.waiting and not preempted and budget and len(self.running) < self.max_running:
            request = self.waiting[0]
            # An item is chosen from the last token's hidden state, which no cache holds: that token is always computed.
            reusable = request.tokens if request.task == "score" else request.tokens[:-1]
            request.blocks = self.manager.share(self.manager.match(reusable))
            request.computed = len(request.blocks) * self.manager.block_size
            count = self._count(request, budget)
            if not count or not self.manager.reserve(request, count):
                self._give_back(request)
                break
            request.cached_tokens = request.computed if request.cached_tokens is None else request.cached_tokens
            self.running.append(self.waiting.popleft())
            work.append((request, count))
            budget -= count
        return work, preempted

    def _count(self, request: Request, budget: int) -> int:
        reading = request.computed < len(request.tokens)
        count = min(request.pending, budget, budget if reading else self.micro_batch)
        return 0 if reading and not self.chunked and count < request.pending else count

    def _give_back(self, request: Request) -> None:
        self.manager.release(request.blocks)
        request.blocks, request.computed = [], 0

    def finish(self, request: Request) -> None:
        """Take the request out, wherever it is, and free its blocks. Idempotent."""
        for queue in (self.running, self.waiting):
            if request in queue:
                queue.remove(request)
        self._give_back(request)
        request.done = True


class _Step(KVCache):
    """The pool as one step's requests see it: their block tables and how much of each is cached."""

    def __init__(self, pool: PagedEngine, requests: list[Request]):
        self.keys, self.values, self.times, self.block_size = pool.keys, pool.values, pool.times, pool.manager.block_size
        self.max_seq_len, self.at_most = pool.model.config.max_seq_len, max(request.computed for request in requests)
        tables = [torch.tensor(request.blocks, device=pool.times.device) for request in requests]
        self.block_table = torch.nn.utils.rnn.pad_sequence(tables, batch_first=True)
        self.seq_lens = torch.tensor([request.computed for request in requests], device=pool.times.device)
        last = (self.seq_lens - 1).clamp(min=0).unsqueeze(1)
        times = self.times[self.block_table.gather(1, last // self.block_size), last % self.block_size].squeeze(1)
        self.last_times = torch.where(self.seq_lens > 0, times, 0)


class PagedEngine:
    """Serves an `HSTU` model on any device from one pool of num_blocks x block_size slots: `add` requests, then `run`.

    Answers are those of `model.dense`, whatever the pool, the order of arrival and the switches.
    """

    def __init__(
        self, model: HSTU, num_blocks: int = 64, block_size: int = 16, *, max_tokens: int = 256, max_running: int = 16,
        micro_batch: int = 64, prefix_caching: bool = True, chunked: bool = True,
    ):  # fmt: skip
        self.model, self.items, config = model, model.item_matrix().detach(), model.config
        shape = config.num_layers, num_blocks, block_size, config.num_heads
        self.keys, self.values = (self.items.new_zeros(*shape, size) for size in (config.d_qk, config.d_v))
        self.times = torch.zeros(num_blocks, block_size, dtype=torch.int64, device=self.items.device)
        self.manager = BlockManager(num_blocks, block_size, prefix_caching, self._copy)
        self.scheduler = Scheduler(self.manager, max_tokens, max_running, micro_batch, chunked)
        self._ids = itertools.count()

    def add(self, tokens: Sequence[int], task="topk", count=0, candidates: Sequence[int] = (), excluded=()) -> Request:
        """Queue a request: `topk` (`count` best next items), `slate` (`count` items in turn), `score` (`candidates`).

        Items in `excluded` are not chosen. Raises ValueError, naming the field, for what can never be served.
        """
        config, pool, unchunked = self.model.config, self.times.numel(), not self.scheduler.chunked
        count = count or (config.num_candidates if task == "topk" else config.slate_size)
        longest = len(tokens) + (count - 1 if task == "slate" else 0)
        room = min(config.max_seq_len, pool, self.scheduler.max_tokens if unchunked else pool)
        for broken, message in (
            (task not in ("topk", "slate", "score"), f"task is {task!r}: use topk, slate or score"),
            (len(tokens) == 0, "tokens is empty: give the user token or an event"),
            (count < 1, f"count is {count}: give 1 or more"),
            (longest > room, f"tokens: {longest} in the end, {room} fit max_seq_len, pool and unchunked step: drop old ones"),
            ((task == "score") != (len(candidates) > 0), "candidates: give one or more for task score, none for others"),
            (not all(0 < i < config.num_items for i in candidates), f"candidates: use items from 1 to {config.num_items - 1}"),
        ):
            if broken:
                raise ValueError(message)
        request = Request(next(self._ids), task, list(tokens), count, list(candidates), set(excluded))
        self.scheduler.waiting.append(request)
        return request

    def run(self) -> None:
        """Step until every request is done."""
        while self.scheduler.running or self.scheduler.waiting:
            if not self.step()[0]:
                raise RuntimeError("a step found no work although requests are left")

    @torch.inference_mode()
    def step(self) -> tuple[list[tuple[Request, int]], list[Request]]:
        """Compute what the scheduler chose; returns its (work, preempted)."""
        work, preempted = self.scheduler.schedule()
        reading = [(r, r.tokens[r.computed : r.computed + n]) for r, n in work if r.computed < len(r.tokens)]
        scoring = [(r, r.candidates[len(r.scores) :][:n]) for r, n in work if r.computed == len(r.tokens)]
        for (request, tokens), hidden in self._forward(self.model.extend, reading) if reading else ():
            self.manager.publish(request, len(tokens))
            if request.computed == len(request.tokens) and request.task != "score":
                self._choose(request, self.model.logits(hidden[-1], self.items))
        for (request, _), hidden in self._forward(self.model.score_candidates, scoring) if scoring else ():
            request.scores += self.model.task_scores(hidden).tolist()
            if not request.pending:
                self.scheduler.finish(request)
        return work, preempted

    def _forward(self, run, batch: list[tuple[Request, list[int]]]):
        sizes, device = [len(tokens) for _, tokens in batch], self.items.device
        tokens = torch.tensor([token for _, tokens in batch for token in tokens], device=device)
        offsets = torch.tensor([0, *itertools.accumulate(sizes)], device=device)
        return zip(batch, run(tokens, offsets, _Step(self, [request for request, _ in batch])).split(sizes))

    def _choose(self, request: Request, logits: torch.Tensor) -> None:
        logits[list(request.excluded)] = -torch.inf
        scores, items = logits.sort(descending=True, stable=True)  # stable: ties by lower item id
        best = items[scores.isfinite()][: request.count if request.task == "topk" else 1].tolist()
        request.items += best
        request.excluded.update(best)
        if best and len(request.items) < request.count and request.task == "slate":
            request.tokens += best  # a bare item: action 0, gap 0
        else:
            self.scheduler.finish(request)

    def fork(self, request: Request, item: int) -> Request:
        """Another slate, which took `item` where `request` has just taken its last one; both read the same blocks.

        The first to fill a slot of the last, half full block takes a copy of it. `max_running` does not bound forks.
        """
        if request.done or request.computed != len(request.tokens) - 1 or not request.items:
            raise ValueError(f"request {request.id} has not just taken an item: fork a running slate between two steps")
        items, tokens, excluded = (
            [*request.items[:-1], item],
            [*request.tokens[:-1], item],
            request.excluded ^ {request.items[-1], item},
        )
        twin = Request(next(self._ids), "slate", tokens, request.count, items=items, excluded=excluded)
        twin.blocks, twin.computed = self.manager.share(request.blocks), request.computed
        self.scheduler.running.append(twin)
        return twin

    def _copy(self, source: int, target: int) -> None:
        self.keys[:, target], self.values[:, target] = self.keys[:, source], self.values[:, source]
        self.times[target] = self.times[source]
