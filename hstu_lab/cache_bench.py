"""Measure the hot cache: on the GPU that is here, and its policies on recorded traces.

    python -m hstu_lab.cache_bench gpu [--out FOLDER]
    python -m hstu_lab.cache_bench traces [--movielens ml-1m.zip] [--grocery grocery.csv.gz] [--out FOLDER]

Writes data/measured/<device>/hot_cache.json and cache_traces.json. `gpu` needs PyTorch, Triton and an NVIDIA GPU, nothing else
of the project's stack; where fbgemm-gpu's CUDA build is installed, its tables are measured beside. `traces` runs on one CPU core.
Without files, `traces` takes synthetic ones.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import multiprocessing
import pathlib
import statistics
import time
import traceback

import numpy as np
import torch
from torch import Tensor

from hstu_lab import cache_fbgemm, measure
from hstu_lab.hot_cache import HotCache, quantize_rows

WIDTH, ROWS, HOT, BATCH = 1024, 2**21, 400_000, 2**14
CAPACITY = 2**19
"""Slots: 1 GiB of float16 rows, far beyond any L2."""
REQUESTS = 300
FRESH = 256
"""Batches in rotation: their rare rows are more than the slots left over for them, so that they miss every time."""
ASKED = 4 * FRESH
"""Batches in rotation where it must be long until a rare row comes again: a cache of a quarter of the rows turns over sooner."""
CHECKED = 16
"""Batches that nobody has asked for before, to count hits on and to compare the rows."""
SKEW = 1.05
"""Of the Zipf traffic that FBGEMM is compared on: the quarter of the rows asked for most is asked for in 94 cases of 100."""


def timed(fn, name: str, *, moved: float = 0, inputs=None, graph: bool = True) -> measure.Measurement:
    """Measure and print one line."""
    work = {"bytes": moved} if moved else {}
    result = measure.measure(fn, name=name, repeats=20, min_time=0.1, cuda_graph=graph, work=work, inputs=inputs)
    rate = f"{result.bytes_per_second / 1e9:9.1f} GB/s" if moved else ""
    print(f"{name:58s} {result.median * 1e6:9.1f} us {rate}", flush=True)
    return result


def host_seconds(fn, calls: int = 50) -> float:
    """Seconds that the host is busy issuing one call."""
    best = float("inf")
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            fn()
        best = min(best, (time.perf_counter() - start) / calls)
    torch.cuda.synchronize()
    return best


def gpu_seconds(fn, inputs, calls: int = 8, samples: int = 5) -> float:
    """Seconds of GPU time of one call, however long the host takes to issue it: the calls queue up behind a kernel that waits.

    Median of `samples`. Raises RuntimeError where the host cannot get ahead.
    """
    took, arguments, cycles = [], itertools.cycle(inputs), 4 * 10**7
    while len(took) < samples:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(cycles)
        start.record()
        for _ in range(calls):
            fn(*next(arguments))
        end.record()
        ahead = not start.query()
        end.synchronize()
        if ahead:
            took.append(start.elapsed_time(end) / 1e3 / calls)
        elif (cycles := 2 * cycles) > 10**9:
            raise RuntimeError(f"the host does not get {calls} calls ahead of the GPU")
    return statistics.median(took)


class Traffic:
    """Ids of requests over a table whose first `HOT` rows are asked for again and again, the others once in a long while."""

    def __init__(self, rows: int = ROWS, hot: int = HOT):
        self.rows, self.hot = rows, hot
        self.generator = torch.Generator("cuda").manual_seed(0)

    def batch(self, hit_share: float, count: int = BATCH) -> Tensor:
        def uniform(low, high):
            return torch.randint(low, high, (count,), device="cuda", generator=self.generator)

        hot = torch.rand(count, device="cuda", generator=self.generator) < hit_share
        return torch.where(hot, uniform(0, self.hot), uniform(self.hot, self.rows))


def host_table(rows: int = ROWS) -> Tensor:
    """(rows, 1024) float16 in pinned memory, random: zeros are quicker to move."""
    table = torch.empty(rows, WIDTH, dtype=torch.float16, pin_memory=True)
    for part in table.split(2**18):
        part.copy_(torch.randn(len(part), WIDTH, device="cuda", dtype=torch.float16))
    return table


def warmed(table: Tensor, ids: Tensor, capacity: int = CAPACITY, **options) -> HotCache:
    """A cache that holds the rows of ids."""
    cache = HotCache(table, capacity, "cuda", **options)
    for part in ids.split(len(cache.state.spare)):
        cache.prefetch(part)
    cache.release()
    torch.cuda.synchronize()
    missing = len(ids) - int((cache.state.slot_of[ids] >= 0).sum())
    if missing:
        raise RuntimeError(f"{missing} of {len(ids)} rows did not reach the cache")
    return cache


def kernels(record: measure.Record, table: Tensor) -> None:
    """Lookup, fetch and the plain gather from pinned memory, as graph replays over inputs larger than L2 together."""
    from hstu_lab.ops import triton_cache

    results, traffic = record.measurements, Traffic()
    results.append(measure.peak_copy_bandwidth())
    copy = results[-1].bytes_per_second
    print(f"copy {copy / 1e12:.2f} TB/s", flush=True)
    cache = warmed(table, torch.arange(HOT, device="cuda"))
    state = cache.state

    def buffers(count):
        lists = torch.empty(2, count, dtype=torch.int32, device="cuda")
        want = torch.empty(count, dtype=torch.int64, device="cuda")
        return torch.empty(count, WIDTH, dtype=table.dtype, device="cuda"), lists, want

    for count in (BATCH, 4 * BATCH):
        sets = [(traffic.batch(1.0, count), *buffers(count)) for _ in range(max(2, 2**17 // count))]
        counts = torch.zeros(2, dtype=torch.int32, device="cuda")

        def hits(ids, out, lists, want, counts=counts):
            triton_cache.lookup(ids, state, out, *lists, want, counts, 1)

        moved = 2 * count * WIDTH * 2 + count * 12
        results.append(timed(hits, f"lookup {count} hits", moved=moved, inputs=sets))
        record.data[f"share of copy bandwidth, {count} hits"] = results[-1].bytes_per_second / copy
        print(f"{'':58s} {results[-1].bytes_per_second / copy:.2f} of copy bandwidth")
        assert int(counts[0]) == 0
        ids, out, *_ = sets[0]
        assert torch.equal(out, table[ids.cpu()].cuda())
    moved = BATCH * WIDTH * 2
    over_bus = [(traffic.batch(0.5), torch.empty(BATCH, WIDTH, dtype=table.dtype, device="cuda")) for _ in range(4)]
    gather = functools.partial(triton_cache.gather, table)
    results.append(timed(gather, f"pinned-host gather of {BATCH}", moved=moved, inputs=over_bus))
    plain = results[-1]
    for programs in (32, 64):
        for share in (0.9,):
            sets = [(traffic.batch(share), *buffers(BATCH)) for _ in range(8)]
            tally = torch.zeros(2, dtype=torch.int32, device="cuda")

            def both(ids, out, lists, want, tally=tally, programs=programs):
                tally.zero_()
                triton_cache.lookup(ids, state, out, *lists, want, tally, 1)
                triton_cache.fetch(ids, state, out, *lists, tally, programs)

            name = f"lookup and fetch {BATCH}, {share:.0%} hits, {programs} programs"
            results.append(timed(both, name, inputs=sets))
            misses = int(tally[0])
            record.data[name] = {"misses": misses, "speed over the pinned-host gather": plain.median / results[-1].median}
            print(f"{'':58s} {misses} misses, {plain.median / results[-1].median:.1f}x the plain gather")
            ids, out, *_ = sets[-1]
            assert torch.equal(out, table[ids.cpu()].cuda())


def through_the_cache(record: measure.Record, table: Tensor) -> None:
    """`HotCache.rows` itself, inserts and evictions included, against the other places that the rows could be."""
    from hstu_lab.ops import triton_cache

    results, traffic = record.measurements, Traffic()
    cache = warmed(table, torch.arange(HOT, device="cuda"))
    for share in (1.0, 0.9):
        sets = [(traffic.batch(share),) for _ in range(FRESH)]
        for (ids,) in sets:
            cache.rows(ids)
        before = cache.stats()
        results.append(timed(cache.rows, f"cache.rows {BATCH}, aimed at {share:.0%} hits", inputs=sets, graph=False))
        after = cache.stats()
        ratio = 1 - (after.misses - before.misses) / (after.lookups - before.lookups)
        alone, issued = gpu_seconds(cache.rows, sets), host_seconds(functools.partial(cache.lookup, sets[0][0]))
        record.data[results[-1].name] = {"hit ratio": ratio, "host seconds to issue one": issued, "gpu bytes": after.gpu_bytes,
                                         "GPU seconds": alone}  # fmt: skip
        print(f"{'':58s} {alone * 1e6:.1f} us of the GPU alone, hit ratio {ratio:.3f}, host {issued * 1e6:.0f} us to issue")
    ids, work = sets[0][0], cache._work[0]
    out = torch.empty(BATCH, WIDTH, dtype=table.dtype, device="cuda")
    each = {
        "lookup kernel": lambda: triton_cache.lookup(ids, cache.state, out, *work.lists, work.want, work.counts, 1),
        "fetch kernel": lambda: triton_cache.fetch(ids, cache.state, out, *work.lists, work.counts),
        "publish kernel": lambda: triton_cache.publish(cache.state, work.want, work.counts, 0, 1, 0, 0),
        "record an event": lambda: work.looked.record(cache._side),
        "wait for an event": lambda: cache._side.wait_event(work.looked),
        "allocate the answer": lambda: torch.empty_like(out),
    }
    record.data["host seconds"] = {name: host_seconds(fn) for name, fn in each.items()}
    print({name: f"{seconds * 1e6:.1f} us" for name, seconds in record.data["host seconds"].items()})
    work.counts.zero_()
    sets = [(traffic.batch(0.5), out) for _ in range(16)]
    results.append(timed(functools.partial(triton_cache.gather, table), "pinned-host gather, issued one by one", inputs=sets,
                         moved=BATCH * WIDTH * 2, graph=False))  # fmt: skip
    plain = results[-1].median
    for result in results:
        if result.name.startswith("cache.rows"):
            record.data[result.name]["speed over the pinned-host gather"] = plain / result.median
            print(f"{result.name:58s} {plain / result.median:.1f}x the plain gather, end to end", flush=True)
    whole = table.cuda()
    results.append(timed(functools.partial(triton_cache.gather, whole), "everything in HBM, gather", inputs=sets,
                         moved=2 * BATCH * WIDTH * 2, graph=False))  # fmt: skip


def requests(record: measure.Record, table: Tensor) -> None:
    """Requests of 8 users x 512 events x 4 tables: rows, their sums, the gr-3b stack; one after another, each waited for."""
    from hstu_lab.config import preset
    from hstu_lab.kernel_bench import GraphedStack, run_once
    from hstu_lab.ops import triton_cache

    run = GraphedStack(preset("gr-3b").replace(rab="position+time"), 8, 512)
    run_once(run)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    traffic, whole, aside = Traffic(), table.cuda(), torch.cuda.Stream()
    out = torch.empty(BATCH, WIDTH, dtype=table.dtype, device="cuda")

    def finish(rows):
        run.x.copy_(rows.view(-1, 4, WIDTH).sum(dim=1))
        graph.replay()

    def serve(name, prepare, share):
        cache = None if prepare in ("HBM", "pinned host") else warmed(table, torch.arange(HOT, device="cuda"))
        ids = [traffic.batch(share) for _ in range(REQUESTS + 51)]
        torch.cuda.synchronize()
        latencies = []
        for i in range(REQUESTS + 50):
            torch.cuda.synchronize()
            if i == 50 and cache is not None:
                before = cache.stats()
            start = time.perf_counter()
            if cache is None:
                finish(triton_cache.gather(whole if prepare == "HBM" else table, ids[i], out))
            elif prepare == "at once":
                finish(cache.rows(ids[i]))
            else:
                under_way = cache.lookup(ids[i])
                cache.release()
                finish(under_way.wait())
                with torch.cuda.stream(aside):  # the next request's misses travel while this one is computed
                    cache.prefetch(ids[i + 1])
                torch.cuda.current_stream().synchronize()
                latencies.append(time.perf_counter() - start)
                continue
            torch.cuda.current_stream().synchronize()
            latencies.append(time.perf_counter() - start)
        result = measure.Measurement(name, latencies[50:], clock="wall")
        record.measurements.append(result)
        said = {"p50": statistics.median(result.samples), "p99": result.percentile(99)}
        if cache is not None:
            after = cache.stats()
            said["share of rows that travelled"] = (after.misses - before.misses) / (BATCH * REQUESTS)
        record.data[name] = said
        print(f"{name:58s} p50 {said['p50'] * 1e3:.3f} ms  p99 {said['p99'] * 1e3:.3f} ms  "
              f"{said.get('share of rows that travelled', 0):.3f} travelled", flush=True)  # fmt: skip

    record.measurements.append(timed(graph.replay, "gr-3b stack, 8 x 512, graph replay", graph=False))
    for name, prepare, share in (
        ("request, everything in HBM", "HBM", 0.9),
        ("request, cache, 100% hits", "at once", 1.0),
        ("request, cache, 100% hits, next prefetched", "next", 1.0),
        ("request, cache, 90% hits, misses waited for", "at once", 0.9),
        ("request, cache, 90% hits, misses overlapped", "next", 0.9),
        ("request, pinned host, no cache", "pinned host", 0.9),
    ):
        serve(name, prepare, share)


def sizes(record: measure.Record, table: Tensor) -> None:
    """A table that does not fit the memory it is given: Zipf traffic, caches of 1 to 50 % of the rows, LRU."""
    generator = torch.Generator("cuda").manual_seed(1)
    order = torch.randperm(ROWS, device="cuda", generator=generator)
    table_of = record.data.setdefault("sizes", [])
    for skew in (0.8, 1.1):
        weight = torch.arange(1, ROWS + 1, device="cuda", dtype=torch.float64).pow(-skew).cumsum(0)
        for share in (0.01, 0.1, 0.5):

            def batch(weight=weight):
                u = torch.rand(BATCH, device="cuda", generator=generator, dtype=torch.float64) * weight[-1]
                return order[torch.searchsorted(weight, u).clamp(max=ROWS - 1)]

            # The most popular rows to start with: filling by traffic alone would take longer than the measurement.
            capacity = int(share * ROWS)
            spares = min(max(64, capacity // 64), 4096)
            cache = warmed(table, order[: capacity - 2 * spares], capacity)
            sets = [(batch(),) for _ in range(ASKED)]
            for (ids,) in sets[:64]:
                cache.rows(ids)
            before = cache.stats()
            result = timed(cache.rows, f"Zipf {skew}, cache of {share:.0%}", inputs=sets[64:], graph=False)
            after = cache.stats()
            ratio = 1 - (after.misses - before.misses) / (after.lookups - before.lookups)
            record.measurements.append(result)
            table_of.append({"skew": skew, "share": share, "gpu bytes": after.gpu_bytes, "hit ratio": ratio,
                             "seconds": result.median})  # fmt: skip
            print(f"{'':58s} {after.gpu_bytes / 1e9:.2f} GB, hit ratio {ratio:.3f}", flush=True)
            del cache
            torch.cuda.empty_cache()


def int8_rows(record: measure.Record, table: Tensor) -> None:
    """Half the bytes over the bus and in the cache, decoded to float16 on the way out."""
    traffic = Traffic()
    quantized, scales = quantize_rows(table[: 2**19])
    quantized, scales = (t.pin_memory() for t in (quantized, scales))
    traffic.rows, traffic.hot = 2**19, 2**17
    for name, rows, options in (("int8", quantized, {"scales": scales}), ("float16", table[: 2**19], {})):
        cache = warmed(rows, torch.arange(2**17, device="cuda"), 2**18, **options)
        for share in (1.0, 0.9):
            sets = [(traffic.batch(share),) for _ in range(FRESH)]
            for (ids,) in sets:
                cache.rows(ids)
            record.measurements.append(timed(cache.rows, f"{name} rows, {BATCH}, {share:.0%} hits", inputs=sets, graph=False))


class Held:
    """Where the rows may be, besides FBGEMM's tables: behind a hot cache (policy), or as they are. Asked like an `UvmTable`."""

    def __init__(self, table: Tensor, policy: str | None = None):
        self.table, self.policy, self.caches = table, policy, policy is not None
        self.out = torch.empty(BATCH, WIDTH, dtype=table.dtype, device="cuda")
        self.forget()

    def forget(self) -> None:
        self.cache = HotCache(self.table, CAPACITY, "cuda", policy=self.policy) if self.caches else None

    def rows(self, ids: Tensor) -> Tensor:
        from hstu_lab.ops import triton_cache

        return self.cache.rows(ids) if self.caches else triton_cache.gather(self.table, ids, self.out[: len(ids)])

    def cached(self, ids: Tensor) -> Tensor:
        return self.cache.state.slot_of[ids] >= 0


def quickest_bag(table: Tensor, training: bool) -> tuple[int, dict]:
    """How many ids one warp of FBGEMM's operator best reads: (number, {number: GPU seconds}), all rows in GPU memory."""
    store = cache_fbgemm.UvmTable(table, "DEVICE", training=training)
    took, traffic = {}, Traffic()
    sets = [(traffic.batch(1.0),) for _ in range(16)]
    for store.bag in (1, 4, 16, 64):
        store.rows(*sets[0])
        took[store.bag] = gpu_seconds(store.rows, sets)
    print(f"FBGEMM {'for training' if training else 'inference'}, ids a warp: "
          + ", ".join(f"{bag}: {1e6 * seconds:.1f} us" for bag, seconds in took.items()), flush=True)  # fmt: skip
    return min(took, key=took.get), took


def against_fbgemm(record: measure.Record, table: Tensor) -> None:
    """The same lookups through FBGEMM's tables and through ours, each in the other places that rows could be too."""
    if reason := cache_fbgemm.missing():
        record.data["fbgemm"] = {"not measured": reason}
        print(reason, flush=True)
        return
    import fbgemm_gpu

    traffic = Traffic()
    order = torch.randperm(ROWS, device="cuda", generator=traffic.generator)
    weight = torch.arange(1, ROWS + 1, device="cuda", dtype=torch.float64).pow(-SKEW).cumsum(0)

    def zipf():
        u = torch.rand(BATCH, device="cuda", generator=traffic.generator, dtype=torch.float64) * weight[-1]
        return order[torch.searchsorted(weight, u).clamp(max=ROWS - 1)]

    # Rows to begin with, and what is asked for then: filling by traffic alone would take longer than the measurement.
    hot, popular = torch.arange(HOT, device="cuda"), order[: CAPACITY - 2 * 4096]
    asked = {
        "all hits": (hot, [(traffic.batch(1.0),) for _ in range(ASKED + CHECKED)]),
        "90 % to hot rows": (hot, [(traffic.batch(0.9),) for _ in range(ASKED + CHECKED)]),
        f"Zipf {SKEW}": (popular, [(zipf(),) for _ in range(ASKED + CHECKED)]),
    }
    bags = {training: quickest_bag(table, training) for training in (False, True)}
    uvm = functools.partial(cache_fbgemm.UvmTable, table, "MANAGED_CACHING", CAPACITY)
    stores = {
        "hot cache, LRU": lambda: Held(table, "lru"),
        "hot cache, LFU": lambda: Held(table, "lfu"),
        "pinned host, our gather": lambda: Held(table),
        "HBM, our gather": lambda: Held(table.cuda()),
        "FBGEMM, HBM": lambda: cache_fbgemm.UvmTable(table, "DEVICE", bag=bags[False][0]),
        "FBGEMM, unified memory": lambda: cache_fbgemm.UvmTable(table, "MANAGED", bag=bags[False][0]),
        "FBGEMM, unified memory, cached, LRU": lambda: uvm(bag=bags[False][0]),
        "FBGEMM, unified memory, cached, LFU": lambda: uvm(algorithm="LFU", bag=bags[False][0]),
        "FBGEMM for training, unified memory, cached, LRU": lambda: uvm(training=True, bag=bags[True][0]),
        "FBGEMM for training, unified memory, cached, LFU": lambda: uvm(algorithm="LFU", training=True, bag=bags[True][0]),
    }
    cases = []
    record.data["fbgemm"] = {"version": fbgemm_gpu.__version__, "cases": cases, "skew": SKEW, "capacity": CAPACITY,
                             "ids a warp, and GPU seconds": {"inference": bags[False][1], "training": bags[True][1]}}  # fmt: skip
    for name, build in stores.items():
        held, started = torch.cuda.memory_allocated(), time.perf_counter()
        store = build()
        torch.cuda.synchronize()
        print(f"{name}: built in {time.perf_counter() - started:.1f} s", flush=True)
        gpu_bytes = torch.cuda.memory_allocated() - held
        for what, (start, sets) in asked.items():
            before, timed_on, alone_on, after = sets[:FRESH], sets[FRESH : ASKED - 64], sets[ASKED - 64 : ASKED], sets[ASKED:]
            if store.caches:
                store.forget()
                for part in start.split(4096):
                    store.rows(part)
                for (ids,) in before:
                    store.rows(ids)
            result = timed(store.rows, f"{name}, {what}", inputs=timed_on, graph=False)
            record.measurements.append(result)
            alone = gpu_seconds(store.rows, alone_on)
            hits = []
            for (ids,) in after:
                hits.append(store.cached(ids).float().mean() if store.caches else torch.tensor(torch.nan))
                if not torch.equal(store.rows(ids), table[ids.cpu()].cuda()):
                    raise RuntimeError(f"{name}, {what}: the rows are not the table's")
            ratio = float(torch.stack(hits).mean()) if store.caches else None
            cases.append({"where": name, "asked": what, "seconds": result.median, "GPU seconds": alone, "gpu bytes": gpu_bytes,
                          "hit ratio": ratio,
                          "host seconds to issue one": host_seconds(functools.partial(store.rows, ids))})  # fmt: skip
            print(f"{'':58s} {alone * 1e6:9.1f} us of the GPU alone, hit ratio {ratio}, "
                  f"host {cases[-1]['host seconds to issue one'] * 1e6:.0f} us to issue", flush=True)  # fmt: skip
        del store
        torch.cuda.empty_cache()


PARTS = {"kernels": kernels, "rows": through_the_cache, "requests": requests, "sizes": sizes, "int8": int8_rows,
         "fbgemm": against_fbgemm}  # fmt: skip


def gpu(arguments: argparse.Namespace) -> None:
    measure.require_gpu()
    record = measure.Record.here("hot_cache", command="python -m hstu_lab.cache_bench gpu")
    table = host_table()
    failed = []
    for part in arguments.parts or PARTS:
        print(f"--- {part}", flush=True)
        try:
            with torch.no_grad():
                PARTS[part](record, table)
        except Exception:  # one part that fails must not lose the others' measurements
            traceback.print_exc()
            failed.append(part)
        finally:  # nor may one that is interrupted
            measure.write_record(record, arguments.out)
        torch.cuda.empty_cache()
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


SHARES = (0.01, 0.05, 0.1)


def judged(trace, share: float) -> dict:
    """Second-half hit ratios on one trace with a cache of `share` of its rows: each policy, the cache, Belady."""
    from hstu_lab.cache_policies import POLICIES, simulate
    from hstu_lab.cache_prediction import play
    from hstu_lab.cache_traces import stalls

    capacity = max(1, int(share * trace.num_items))
    start = time.process_time()
    played = play(trace, capacity)
    seconds = time.process_time() - start
    half = played.second_half
    ratios = {name: float(hits[half].mean()) for name, hits in played.shadow.items()}
    belady = {bypass: float(simulate("belady", trace.items, capacity, trace.num_items, bypass=bypass)[half].mean())
              for bypass in (True, False)}  # fmt: skip
    best = max(POLICIES, key=ratios.get)
    cache = float(played.hits[half].mean())
    windows = [float(part.mean()) for part in np.array_split(played.hits, 50)]
    wait = stalls(trace, capacity, played.hits)
    return {
        "share": share, "capacity": capacity, "policies": ratios, "cache": cache, "best classic": best, "belady": belady[True],
        "belady without bypass": belady[False], "closed": (cache - ratios[best]) / (belady[True] - ratios[best]),
        "led by": played.report(), "processor seconds an access, all policies": seconds / len(trace.items),
        "hit ratio over time": windows, "stalls": dataclasses.asdict(wait),
    }  # fmt: skip


def described(name: str, cell: dict) -> str:
    """One line of a cell of `judged`."""
    best, wait = cell["best classic"], cell["stalls"]
    return (
        f"{name:22s} {cell['share']:4.0%}  cache {cell['cache']:.4f}  predicted {cell['policies']['predicted']:.4f}  "
        f"{best} {cell['policies'][best]:.4f}  Belady {cell['belady']:.4f}  closed {cell['closed']:+.3f}  "
        f"{cell['processor seconds an access, all policies'] * 1e6:.0f} us an access; stalls a request {wait['demand']:.2f} -> "
        f"{wait['prefetched']:.2f}, moved {wait['moved_on_demand']:.2f} -> {wait['moved_with_prefetch']:.2f}; {cell['led by']}"
    )


def after_a_shift(trace, share: float) -> dict:
    """A new catalogue half-way: the cache against the best classic policy after 2 % of the trace."""
    from hstu_lab.cache_policies import POLICIES
    from hstu_lab.cache_prediction import play
    from hstu_lab.cache_traces import Trace

    half, count = len(trace.items) // 2, len(trace.items)
    items = np.where(np.arange(count) < half, trace.items, trace.items + trace.num_items)
    played = play(Trace(trace.name, items, trace.users, trace.times), max(1, int(share * trace.num_items)))
    window = slice(half + count // 50, half + count // 25)
    ratios = {name: float(played.shadow[name][window].mean()) for name in POLICIES}
    best = max(ratios, key=ratios.get)
    cache = float(played.hits[window].mean())
    return {"share": share, "cache": cache, "best classic": best, "its ratio": ratios[best], "relative": cache / ratios[best],
            "led by": played.report(window)}  # fmt: skip


def traces(arguments: argparse.Namespace) -> None:
    from hstu_lab.cache_traces import movielens_trace, request_trace, review_trace, synthetic_trace

    todo = []
    if arguments.movielens:
        items = movielens_trace(arguments.movielens)
        todo += [items, request_trace(items, name="ML-1M requests")]
    if arguments.grocery:
        todo.append(review_trace(arguments.grocery, "Amazon Grocery items"))
    todo = todo or [synthetic_trace(100_000, skew=0.9, drift=0.5), synthetic_trace(100_000, skew=0.6, returning=0.5)]
    record = measure.Record.here("cache_traces", command="python -m hstu_lab.cache_bench traces --movielens ml-1m.zip "
                                 "--grocery grocery.csv.gz", note="second half of each trace; learned from the first half and "
                                 "on line; one configuration for all, chosen on the first halves")  # fmt: skip
    cells, shifts = record.data.setdefault("traces", {}), record.data.setdefault("shift", {})
    todo.sort(key=lambda trace: -len(trace.items))
    with concurrent.futures.ProcessPoolExecutor(arguments.processes, multiprocessing.get_context("spawn")) as pool:
        running = {(trace.name, share): pool.submit(judged, trace, share) for trace in todo for share in SHARES}
        shifted = {t.name: pool.submit(after_a_shift, t, 0.05) for t in todo if len(t.items) < 2_000_000}
        for trace in todo:
            sizes = {"accesses": len(trace.items), "rows": trace.num_items, "requests": len(trace.starts)}
            cells[trace.name] = sizes | {"cells": [running[trace.name, share].result() for share in SHARES]}
            for cell in cells[trace.name]["cells"]:
                print(described(trace.name, cell), flush=True)
            measure.write_record(record, arguments.out)
        for name, result in shifted.items():
            shifts[name] = result.result()
            print("shift", name, shifts[name], flush=True)
    closed = [cell["closed"] for rows in cells.values() for cell in rows["cells"]]
    record.data["closed on average"] = sum(closed) / len(closed)
    print(f"closed on average {record.data['closed on average']:.3f}, least {min(closed):+.3f}")
    print(measure.write_record(record, arguments.out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("gpu", help="kernels, requests and sizes on the NVIDIA GPU that is here")
    command.add_argument("parts", nargs="*", metavar="part", help=f"some of {', '.join(PARTS)}; default: all")
    command.add_argument("--out", type=pathlib.Path, default=None, help="folder for the record (default: data/measured)")
    command.set_defaults(run=gpu)
    command = commands.add_parser("traces", help="policies on recorded traces: hit ratios of the second half")
    command.add_argument("--movielens", type=pathlib.Path, help="MovieLens-1M's official zip")
    command.add_argument("--grocery", type=pathlib.Path, help="a table of user_id, item_id and time")
    command.add_argument("--processes", type=int, default=1, help="traces and sizes run side by side (default: 1)")
    command.add_argument("--out", type=pathlib.Path, default=None, help="folder for the record (default: data/measured)")
    command.set_defaults(run=traces)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
