"""Candidates against a cached history (M-FALCON): the stack alone, as GPU time of graph replays, and through the engine.

Parts of `hstu_lab.vllm_bench` and `hstu_lab.decode_bench`, which write the records.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
import traceback
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from hstu_lab import measure, ops
from hstu_lab.measure import Measurement, Record
from hstu_lab.model import HSTUStack
from hstu_lab.tokens import pack
from hstu_lab.vllm_engine import Engine
from hstu_lab.vllm_load import random_histories, seconds_of, serving_config

IN_FLIGHT = 32
"""Users that wait in each engine while candidates are its load."""


class CachedUsers:
    """A stack with the histories of B users in a paged cache, as the engine keeps them; scores candidates against them."""

    def __init__(self, stack: HSTUStack, x: Tensor, times: Tensor, history: int, count: int, page: int = 32):
        config, (self.users, rows) = stack.config, x.shape[:2]
        self.stack, self.x, self.history, self.count, self.page = stack, x, history, count, page
        per_user = -(-rows // page)
        shape = (config.num_layers, self.users * per_user, page, config.num_heads, 2 * config.d_qk)
        self.caches = torch.zeros(shape, device="cuda", dtype=x.dtype)
        self.table = torch.randperm(self.users * per_user, device="cuda").view(self.users, per_user).int()
        self.slot_times = torch.zeros(self.users * per_user, page, dtype=torch.int64, device="cuda")
        self.times, self.steps = times, {}
        self.run(0, history)

    def step(self, first: int, count: int) -> tuple[Tensor, ...]:
        """What an engine has ready before a step: its rows, slots, times, and the lengths of its sequences."""
        if (first, count) not in self.steps:
            where = torch.arange(first, first + count, device="cuda")
            slots = (self.table[:, where // self.page].long() * self.page + where % self.page).flatten()
            times = self.times[:, first : first + count].flatten()
            self.slot_times.view(-1)[slots] = times
            offsets = torch.arange(self.users + 1, device="cuda", dtype=torch.int32) * count
            lens = torch.full((self.users,), first + count, device="cuda", dtype=torch.int32)
            rows = self.x[:, first : first + count].flatten(0, 1)
            self.steps[first, count] = rows, slots, times, offsets, lens, lens.clamp(max=self.history)
        return self.steps[first, count]

    def run(self, first: int, count: int) -> Tensor:
        """Hidden states (B, count, d_model) of the rows from `first` on; those behind the history are candidates.

        As a step of any mixture, which is how the engine runs them.
        """
        from hstu_lab.ops.triton_kv_write import write_kv
        from hstu_lab.ops.triton_serving import attention_step, list_tiles

        x, slots, times, offsets, seq_lens, history = self.step(first, count)
        where, listed, divisor = (self.table, offsets, seq_lens), [], self.stack.config.max_seq_len

        def attend(layer, q, k, v, bias):
            write_kv(k, v, self.caches[layer], slots)
            keys, values = self.caches[layer].tensor_split(2, dim=-1)
            known = {"bias": bias, "query_times": times, "slot_times": self.slot_times}
            if not listed:
                listed.append(list_tiles(*where, history, q, self.page, **known))
            return attention_step(q, keys, values, *where, *listed, divisor=divisor, history_lens=history, **known)

        return self.stack(x, attend).unflatten(0, (self.users, count))

    def score(self, first: int, count: int) -> Tensor:
        """The same for rows that are all candidates: nothing of them is written to the cache, since nobody reads it."""
        from hstu_lab.ops.triton_candidates import candidates_stack

        x, _, times, offsets, seq_lens, history = self.step(first, count)
        where = self.table, offsets, seq_lens, history
        x = candidates_stack(x, self.stack, self.caches, *where, times, self.slot_times, count)
        return x.unflatten(0, (self.users, count))


def stack_candidates(record: Record, stack: HSTUStack, users: int, history: int, count: int, micro: int) -> dict[str, Callable]:
    """The stack alone, by name: one pass over everything, against the cache, and the history again for each few; all ran once."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(users, history + count, stack.config.d_model, device="cuda", generator=generator).bfloat16()
    times = (torch.arange(history + count, device="cuda").clamp(max=history - 1) * 60).expand(users, -1).contiguous()
    cache = CachedUsers(stack, x, times, history, count)

    def one_pass_of(of_them: int) -> Callable[[], Tensor]:
        length = history + of_them
        offsets = torch.arange(users + 1, device="cuda") * length
        number = torch.full((users,), of_them, device="cuda")
        rows, seconds = x[:, :length].flatten(0, 1), times[:, :length].flatten()
        return lambda: stack.jagged(rows, offsets, seconds, number, length).unflatten(0, (users, length))

    one_pass, few = one_pass_of(count), one_pass_of(micro)
    expected = one_pass()[:, history:].float()
    for way, run in (("candidates only", cache.score), ("any mixture", cache.run)):
        got = run(history, count).float()
        error = ((got - expected).norm() / expected.norm()).item()
        record.data[f"hidden states of {users} users: {way} against one pass, relative error"] = error
    ways = {
        "one pass": one_pass,
        "cached": lambda: cache.score(history, count),
        "cached, step of any mixture": lambda: cache.run(history, count),
        f"cached, {micro} at a time": lambda: [cache.score(i, micro) for i in range(history, history + count, micro)],
        f"history again for each {micro}": lambda: [few() for _ in range(count // micro)],
    }
    for run in ways.values():
        run()  # compiles what it needs
    return {f"stack {count} candidates N={history} users={users} {name}": run for name, run in ways.items()}


@torch.inference_mode()
def candidates(record: Record, ready: Callable[[], None] = lambda: None) -> None:
    """512 candidates after 1,024 events, the stack alone: GPU time of graph replays."""
    with torch.device("cuda"):
        stack = HSTUStack(serving_config(), ops.get("triton")).bfloat16().eval()
    for name, parameter in stack.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter, std=0.02)
    ways: dict[str, Callable] = {}
    for users in (1, 4, 8):
        ways |= stack_candidates(record, stack, users, 1024, 512, 64)
    ready()
    for name, run in ways.items():
        record.measurements.append(measure.measure(run, name=name, repeats=20, cuda_graph=True))
        print(record.measurements[-1], flush=True)


def engine_candidates(engine: Engine, history: int = 1024, count: int = 512, micro: int = 64) -> tuple[list[Measurement], float]:
    """512 candidates after 1,024 events through the engine, for one user and for eight at once; and the largest difference of
    cached and fresh scores. Histories of whole pages have nothing to compute but candidates; of others, the events behind the
    last page come along."""
    found, users, page = [], 8, engine.engine.vllm_config.cache_config.block_size

    def note(name: str, samples) -> None:
        found.append(Measurement(f"engine {count} candidates {name}", samples))
        print(found[-1], flush=True)

    items = [random.Random(i).sample(range(1, engine.config.num_items), count) for i in range(20)]
    prompts = random_histories(engine.config, users, history, 7)
    fresh, cached = (torch.stack(engine.score(prompts, items[:users])) for _ in range(2))
    for length in (history, history - page // 2):
        known = [prompt[:length] for prompt in prompts]
        engine.topk(known, [[]] * users, 1)
        for at_once in (1, users):
            for size in (count, micro) if at_once == 1 and length == history else (count,):
                turn, engine.micro_batch = iter(items), size
                send = lambda: engine.score(known[:at_once], [next(turn)] * at_once)  # noqa: B023, E731
                send()
                note(f"N={length} users={at_once} cached, {size} at a time", seconds_of(send, len(items) - 1))
    engine.micro_batch = count
    for at_once, repeats in ((1, 20), (users, 6)):
        others = iter(random_histories(engine.config, (repeats + 1) * at_once, history, 10 + at_once))
        send = lambda: engine.score([next(others) for _ in range(at_once)], items[:at_once])  # noqa: B023, E731
        send()
        note(f"N={history} users={at_once} one pass", seconds_of(send, repeats))

    def again() -> None:
        for first in range(0, count, micro):
            engine.reset_prefix_cache()
            engine.score(prompts[:1], [items[0][first : first + micro]])

    note(f"N={history} users=1 history again for each {micro}", seconds_of(again, 3))
    return found, (cached - fresh).abs().max().item()


def candidates_load(
    engine: Engine, cached: bool, history: int = 1024, count: int = 512, seconds: float = 1.5, margin: float = 0.5
) -> float:
    """Users a second whose candidates are scored while IN_FLIGHT wait: the same ones, who are cached, or each a new one.

    Counted for `seconds` between margins in which the load is on as well, so that engines told together load the GPU together.
    """
    config, draw = engine.config, random.Random(history)
    prompts = random_histories(config, IN_FLIGHT, history, 9)
    items = [np.array(draw.sample(range(1, config.num_items), count)) for _ in prompts]
    engine.topk(prompts, [[]] * IN_FLIGHT, 1)
    first_turn = random.getrandbits(16)  # whom an earlier load brought is not new
    turn, done, errors, left, finished = itertools.count(first_turn), [], [], [IN_FLIGHT], threading.Event()
    start = time.perf_counter() + margin

    def send() -> None:
        number = next(turn)
        prompt = prompts[number % IN_FLIGHT]
        if not cached:  # a first event of its own makes every block behind it new
            first = pack(1 + number % (config.num_items - 1), 1, number // config.num_items % config.num_time_levels, config)
            prompt = [first, *prompt[1:]]
        engine.submit_score(prompt, items[number % IN_FLIGHT]).add_done_callback(heard)

    def heard(future) -> None:
        done.append(time.perf_counter())
        errors.extend(filter(None, [future.exception()]))
        if done[-1] < start + seconds + margin and not errors:
            send()
            return
        left[0] -= 1
        if not left[0]:
            finished.set()

    for _ in prompts:
        send()
    finished.wait()
    if errors:
        raise errors[0]
    return sum(start <= now < start + seconds for now in done) / seconds


def stack_process(connection) -> None:
    """The stack's candidates in a process of their own, whose kernels compile while the engines start."""
    record = Record.here("vllm_candidates", command="python -m hstu_lab.vllm_bench")

    def ready() -> None:
        connection.send("ready")
        connection.recv()

    try:
        candidates(record, ready)
        connection.send(record)
    except Exception:
        traceback.print_exc()
        connection.send("failed")
