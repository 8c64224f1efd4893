"""Measure the vLLM engine on the GPU that is here and write what was seen to data/measured/<device>/vllm_*.json.

    python -m hstu_lab.vllm_bench [step] [candidates] [load] [--out FOLDER] [--replicas 1 4] [--seconds 1.5]

Weights are random (times do not depend on them) and made here; users and items are drawn from a seed. Every figure of an
engine stands beside the null model's, whose forward pass does nothing: what is left is the host's share.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import pathlib
import random
import statistics
import tempfile
import time
import traceback

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hstu_lab import measure
from hstu_lab.config import ModelConfig, preset
from hstu_lab.measure import Measurement, Record
from hstu_lab.model import EventEncoder, HSTUStack, SavedConfig, TaskHeads
from hstu_lab.ops import triton_ops
from hstu_lab.ops.triton_kv_write import write_kv
from hstu_lab.ops.triton_serving import attention_step, list_tiles
from hstu_lab.vllm_engine import ENVIRONMENT, Engine, EngineOptions
from hstu_lab.vllm_load import TASKS, Cell, Users, closed_loop, fill, open_loop

HISTORIES = (128, 256, 512, 1024)
OPTIONS = EngineOptions(
    kv_cache_memory_bytes=8 << 30, block_size=32, max_num_seqs=256, max_num_batched_tokens=8192, dtype="bfloat16", ops="triton",
    cuda_graphs="FULL", prompt_embeds=False, micro_batch=512,
)  # fmt: skip


def serving_config(name: str = "gr-3b", **changes) -> ModelConfig:
    """The preset without side features and users: the stack, the item table and the heads, which is what the engine holds."""
    return preset(name).replace(num_users=0, side_features=(), **changes)


def random_checkpoint(config: ModelConfig, folder: pathlib.Path, dtype: torch.dtype, device: str = "cpu") -> pathlib.Path:
    """A checkpoint of random weights that vLLM can load, written to `folder`; biases and tables are no zeros."""
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        parts = nn.ModuleDict({"encoder": EventEncoder(config), "stack": HSTUStack(config), "heads": TaskHeads(config)})
        for name, parameter in parts.named_parameters():
            if "bias" in name or "down" in name:
                nn.init.normal_(parameter, std=0.02)
        tensors = {name: tensor.to(dtype) for name, tensor in parts.state_dict().items()}
        for name, rows in config.tables:
            tensors[f"tables.embeddings.{name}.weight"] = (torch.randn(rows, config.d_model) * 0.1).to(dtype)
        tensors["tables.item_features"] = torch.zeros(len(config.side_features), config.num_items, dtype=torch.int64)
        tensors["known_items"] = torch.arange(config.num_items) > 0
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"config": config.to_json(), "format": "pt"})
    (folder / "config.json").write_text(json.dumps(SavedConfig(config).to_dict(), indent=1) + "\n")
    return folder


def make_null() -> None:
    """From now on engines of this process run a model that does nothing but note its tokens: the host's work stays whole."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm.forward_context import get_forward_context

    from hstu_lab.vllm_plugin.modeling import HSTUForRecommendation

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None) -> Tensor:
        metadata = get_forward_context().attn_metadata
        if metadata is not None:
            metadata = metadata[self.attention[0].layer_name]
            items = input_ids[: metadata.num_tokens] % self.config.num_items
            self.slots.note(torch.zeros_like(items), items, metadata, self.attention[0].kv_cache)
        return self.item_matrix[:1].expand(len(input_ids), -1)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        return self.known_items.float().expand(len(hidden_states), -1).clone()

    HSTUForRecommendation.forward, HSTUForRecommendation.compute_logits = forward, compute_logits


def runner_of(engine: Engine):
    """vLLM's model runner, in this process."""
    return engine.engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def random_histories(config: ModelConfig, count: int, length: int, seed: int) -> list[list[int]]:
    users = Users(config, Cell("topk", length, 0.0), 1, seed)
    return [users._events(length) for _ in range(count)]


# ---- one engine, one step


def seconds_of(run, repeats: int) -> tuple[float, ...]:
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        samples.append(time.perf_counter() - start)
    return tuple(samples)


def decode_steps(engine: Engine, batch: int, history: int, steps: int = 40) -> tuple[float, ...]:
    """Seconds of engine steps in which `batch` requests add one item each."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    core = engine.engine
    for i, prompt in enumerate(random_histories(engine.config, batch, history, batch)):
        params = SamplingParams(
            temperature=0, max_tokens=steps + 6, logprobs=0, flat_logprobs=True, detokenize=False, ignore_eos=True,
            extra_args={"seen": []}, output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        core.add_request(f"step-{batch}-{history}-{i}-{time.time_ns()}", {"prompt_token_ids": prompt}, params)
    for _ in range(4):
        core.step()
    samples = seconds_of(core.step, steps)
    while core.has_unfinished_requests():
        core.step()
    return samples


def graph_replays(engine: Engine) -> dict[int, tuple[float, ...]]:
    """Seconds of one replay of the captured decode graphs, by batch; the inputs are those of the last step."""
    found = {}
    for descriptor, entry in getattr(runner_of(engine).model, "concrete_cudagraph_entries", {}).items():
        if entry.cudagraph is None or descriptor.num_tokens not in (1, 8, 64):
            continue
        events = [torch.cuda.Event(enable_timing=True) for _ in range(31)]
        events[0].record()
        for event in events[1:]:
            for _ in range(10):
                entry.cudagraph.replay()
            event.record()
        torch.cuda.synchronize()
        found[descriptor.num_tokens] = tuple(a.elapsed_time(b) / 1e4 for a, b in itertools.pairwise(events))
    return found


def step(record: Record, folder: pathlib.Path, null: bool) -> None:
    """A decode step through the engine and as graph replay; a slate and a topk for one user alone."""
    suffix = " null" if null else ""
    with Engine(folder, OPTIONS) as engine:
        config = engine.config
        for task, k in TASKS.items():
            getattr(engine, task)(random_histories(config, 8, 512, 1), [[]] * 8, k)
        for batch in (1, 8, 64):
            samples = decode_steps(engine, batch, 512)
            record.measurements.append(Measurement(f"engine step B={batch} N=512{suffix}", samples))
            print(record.measurements[-1], flush=True)
            if batch == 8:
                for size, replays in {} if null else graph_replays(engine).items():
                    if size == batch:  # the graph's inputs are those of the batch that ran last
                        record.measurements.append(Measurement(f"graph replay B={size} N=512", replays, 10, "cuda events"))
                        print(record.measurements[-1], flush=True)
        for task, k in TASKS.items():
            prompts = iter(random_histories(config, 40, 512, 3))
            send = getattr(engine, task)
            alone = seconds_of(lambda: send([next(prompts)], [[]], k), 40)  # noqa: B023
            record.measurements.append(Measurement(f"{task} alone N=512{suffix}", alone))
            print(record.measurements[-1], flush=True)


# ---- candidates


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
        self.times = times
        self.run(0, history)

    def run(self, first: int, count: int) -> Tensor:
        """Hidden states (B, count, d_model) of the rows from `first` on; those behind the history are candidates."""
        users, where = self.users, torch.arange(first, first + count, device="cuda")
        slots = (self.table[:, where // self.page].long() * self.page + where % self.page).flatten()
        times = self.times[:, first : first + count].flatten()
        self.slot_times.view(-1)[slots] = times
        offsets = torch.arange(users + 1, device="cuda", dtype=torch.int32) * count
        seq_lens = torch.full((users,), first + count, device="cuda", dtype=torch.int32)
        history = seq_lens.clamp(max=self.history)
        x, tiles = self.x[:, first : first + count].flatten(0, 1), []

        def attend(layer, q, k, v, bias):
            write_kv(k, v, self.caches[layer], slots)
            keys, values = self.caches[layer].tensor_split(2, dim=-1)
            if not tiles:
                tiles.append(list_tiles(offsets, seq_lens, history, q, self.page, self.table.shape[1] * self.page))
            return attention_step(
                q, keys, values, self.table, offsets, seq_lens, *tiles, divisor=self.stack.config.max_seq_len, bias=bias,
                query_times=times, slot_times=self.slot_times, history_lens=history,
            )  # fmt: skip

        return self.stack(x, attend).unflatten(0, (users, count))


def stack_candidates(record: Record, stack: HSTUStack, users: int, history: int, count: int, micro: int) -> None:
    """Graph replays of the stack alone: one pass over everything, against the cache, and the history again for each few."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(users, history + count, stack.config.d_model, device="cuda", generator=generator).bfloat16()
    times = (torch.arange(history + count, device="cuda").clamp(max=history - 1) * 60).expand(users, -1).contiguous()
    cache = CachedUsers(stack, x, times, history, count)

    def one_pass(length: int = history + count, of_them: int = count) -> Tensor:
        offsets = torch.arange(users + 1, device="cuda") * length
        number = torch.full((users,), of_them, device="cuda")
        rows, seconds = x[:, :length].flatten(0, 1), times[:, :length].flatten()
        return stack.jagged(rows, offsets, seconds, number, length).unflatten(0, (users, length))

    expected, got = one_pass()[:, history:].float(), cache.run(history, count).float()
    error = ((got - expected).norm() / expected.norm()).item()
    record.data[f"hidden states of {users} users: cached against one pass, relative error"] = error
    ways = {
        "one pass": one_pass,
        "cached": lambda: cache.run(history, count),
        f"cached, {micro} at a time": lambda: [cache.run(first, micro) for first in range(history, history + count, micro)],
        f"history again for each {micro}": lambda: [one_pass(history + micro, micro) for _ in range(count // micro)],
    }
    for name, run in ways.items():
        name = f"stack {count} candidates N={history} users={users} {name}"
        record.measurements.append(measure.measure(run, name=name, repeats=20, cuda_graph=True))
        print(record.measurements[-1], flush=True)


@torch.inference_mode()
def candidates(record: Record, folder: pathlib.Path) -> None:
    """512 candidates after 1,024 events: the stack alone, then through the engine; and whether the scores agree."""
    config, history, count, micro = serving_config(), 1024, 512, 64
    stack = HSTUStack(config, triton_ops).cuda().bfloat16()
    for name, parameter in stack.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter, std=0.02)
    for users in (1, 8):
        stack_candidates(record, stack, users, history, count, micro)
    torch.cuda.empty_cache()
    with Engine(folder, OPTIONS) as engine:
        prompts = random_histories(config, 30, history, 7)
        items = [random.Random(i).sample(range(1, config.num_items), count) for i in range(10)]
        engine.score(prompts[:1], items[:1])
        for size in (512, 64):
            engine.micro_batch = size
            turn = iter(items)
            samples = seconds_of(lambda: engine.score(prompts[:1], [next(turn)]), 10)  # noqa: B023
            record.measurements.append(Measurement(f"engine 512 candidates N=1024 cached micro={size}", samples))
        engine.micro_batch, fresh = 512, iter(prompts[1:])
        samples = seconds_of(lambda: engine.score([next(fresh)], items[:1]), 10)
        record.measurements.append(Measurement("engine 512 candidates N=1024 one pass", samples))

        def again() -> None:
            for first in range(0, count, micro):
                engine.reset_prefix_cache()
                engine.score(prompts[:1], [items[0][first : first + micro]])

        record.measurements.append(Measurement("engine 512 candidates N=1024 history again", seconds_of(again, 5)))
        for name in ("cached micro=512", "cached micro=64", "one pass", "history again"):
            print(record[f"engine 512 candidates N=1024 {name}"], flush=True)
        cached = engine.score(prompts[:1], items[:1])[0]
        engine.reset_prefix_cache()
        fresh = engine.score(prompts[:1], items[:1])[0]
        record.data["engine scores: cached against not cached, largest difference"] = (cached - fresh).abs().max().item()
    print(json.dumps(record.data, indent=1), flush=True)


# ---- load on one or more replicas


def replica(connection, folder: pathlib.Path, options: EngineOptions, null: bool, seed: int, warm_users: int) -> None:
    """One engine in a process of its own; runs the cells it is sent, at the moment it is told."""
    try:
        if null:
            make_null()
        with Engine(folder, options) as engine:
            longest = min(512, engine.config.max_history)
            for task, k in TASKS.items():
                getattr(engine, task)(random_histories(engine.config, 64, longest, seed), [[]] * 64, k)
            connection.send("ready")
            while (order := connection.recv()) is not None:
                cell, rate, in_flight, seconds = order
                users = Users(engine.config, cell, warm_users, seed)
                fill(engine, cell, users)
                connection.send("filled")
                time.sleep(max(connection.recv() - time.time(), 0))
                if rate is None:
                    connection.send(closed_loop(engine, cell, users, in_flight, seconds))
                else:
                    connection.send(open_loop(engine, cell, users, rate, seconds, seed))
                if not cell.warm:
                    engine.reset_prefix_cache()
    except Exception:
        traceback.print_exc()
        connection.send("failed")


class Replicas:
    """Engines of one GPU, each in its own process, that start a load together."""

    def __init__(self, count: int, folder: pathlib.Path, options: EngineOptions, null: bool = False, warm_users: int = 128):
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for i in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=replica, args=(theirs, folder, options, null, i, warm_users), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def wait(self, word: str, seconds: float = 150) -> None:
        for pipe in self.pipes:
            said = pipe.recv() if pipe.poll(seconds) else "nothing"
            if said != word:
                raise RuntimeError(f"a replica said {said!r}, not {word!r}: see its messages above")

    def run(self, cell: Cell, seconds: float, rate: float | None = None, in_flight: int = 128) -> dict:
        """Requests a second of all replicas together and percentiles of the latency; `rate` asks for open-loop load."""
        share = None if rate is None else rate / len(self.pipes)
        for pipe in self.pipes:
            pipe.send((cell, share, in_flight, seconds))
        self.wait("filled")
        for pipe in self.pipes:
            pipe.send(time.time() + 0.1)
        outcomes = [pipe.recv() for pipe in self.pipes]
        if "failed" in outcomes:
            raise RuntimeError("a replica failed")
        latencies = sorted(x for outcome in outcomes for x in outcome.latencies)
        at = lambda p: latencies[min(int(p * len(latencies)), len(latencies) - 1)] if latencies else float("nan")  # noqa: E731
        return {
            "requests/s": sum(len(o.latencies) / o.seconds for o in outcomes), "requests": len(latencies), "p50 s": at(0.5),
            "p95 s": at(0.95), "p99 s": at(0.99), "cached": statistics.mean(o.cached for o in outcomes),
            **({} if rate is None else {"offered/s": rate}),
        }  # fmt: skip

    def close(self) -> None:
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()


def load(
    record: Record, folder: pathlib.Path, counts: list[int], seconds: float, options: EngineOptions = OPTIONS,
    histories: tuple[int, ...] = HISTORIES, out: pathlib.Path | None = None,
) -> None:  # fmt: skip
    """The table: requests/s of every cell with every number of replicas, the null model's, and half the best as open loop.

    Written to the record after every group, so that what was seen is kept where the time runs out.
    """
    cells = [Cell(task, history, warm) for history in histories for task in TASKS for warm in (0.0, 0.9)]
    most = max(counts)
    groups = {str(count): Replicas(count, folder, options) for count in counts}
    groups["null"] = Replicas(most, folder, options, null=True)
    table = record.data.setdefault("table", {str(cell): {} for cell in cells})

    def run(name: str, key: str, cell: Cell, **how) -> None:
        seen = table[str(cell)][key] = groups[name].run(cell, **how)
        p50, p99 = 1e3 * seen["p50 s"], 1e3 * seen["p99 s"]
        print(f"{cell!s:30s} {key:8s} {seen['requests/s']:8.0f}/s  p50 {p50:7.1f} ms  p99 {p99:7.1f} ms"
              f"  cached {seen['cached']:.2f}", flush=True)  # fmt: skip

    for name, group in groups.items():
        try:
            group.wait("ready")
            for cell in cells:
                run(name, name, cell, seconds=seconds)
            if name == str(most):
                for cell in cells:
                    run(name, "half", cell, seconds=max(seconds, 2.0), rate=table[str(cell)][name]["requests/s"] / 2)
        except Exception as error:  # the other groups may do better
            record.data.setdefault("failed", {})[name] = repr(error)
            print(name, repr(error), flush=True)
        group.close()
        measure.write_record(record, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="part", help="some of step, null, candidates, load; default: all")
    parser.add_argument("--out", type=pathlib.Path, default=None, help="folder for the records (default: data/measured)")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 4], help="engines on the GPU under load")
    parser.add_argument("--histories", type=int, nargs="+", default=HISTORIES, help="events of a request under load")
    parser.add_argument("--seconds", type=float, default=1.5, help="length of one load")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = random_checkpoint(serving_config(), pathlib.Path(temporary) / "gr-3b", torch.bfloat16)
        for part in arguments.parts or ("step", "candidates", "load"):
            print(f"--- {part}", flush=True)
            record = Record.here(f"vllm_{part}", command=f"python -m hstu_lab.vllm_bench {part}")
            if part == "step":
                step(record, folder, null=False)
            elif part == "null":
                make_null()
                step(record, folder, null=True)
            elif part == "candidates":
                candidates(record, folder)
            elif part == "load":
                load(record, folder, arguments.replicas, arguments.seconds, histories=arguments.histories, out=arguments.out)
            else:
                parser.error(f"unknown part {part!r}: use some of step, null, candidates, load")
            measure.write_record(record, arguments.out)


if __name__ == "__main__":
    main()
