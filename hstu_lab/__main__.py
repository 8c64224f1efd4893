"""The command line: python -m hstu_lab recommend | benchmark | serve | load | doctor | train | export."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import tempfile

from hstu_lab.config import is_ours
from hstu_lab.options import parser, refuse_idle_flags

# Before torch is imported: its C++ side reports how it bound memory.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# Threads that spin while they wait make small operators several times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

DEFAULT_USERS = {"batch": None, "benchmark": 64, "comprehensive": 32}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status. Errors that a user can mend are one line on stderr and status 2."""
    try:
        options = parser(COMMANDS).parse_args(arguments)
        return options.run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        if not is_ours(error) and not isinstance(error, OSError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def _settings(options: argparse.Namespace):
    from hstu_lab.settings import configure_logging, load_settings

    names = (
        "events", "checkpoint", "task", "strategy", "ops", "precision", "workspace_mb", "batch_size",
        "hot_cache_rows", "log_level", "log_file",
    )  # fmt: skip
    settings = load_settings(options.config, **{name: getattr(options, name, None) for name in names})
    configure_logging(settings.log_level, settings.log_file)
    return settings


# ---- recommend and benchmark


def _recommend(options: argparse.Namespace) -> int:
    refuse_idle_flags(options)
    settings = _settings(options)
    from hstu_lab.pipeline import Recommender
    from hstu_lab.strategies import StrategyUnavailable, missing

    if settings.strategy != "auto" and (why := missing(settings.strategy)):
        raise StrategyUnavailable(f"strategy {settings.strategy} {why}")
    log, checkpoint = _log_and_checkpoint(settings, options)
    with Recommender(checkpoint, settings=settings) as recommender:
        if options.mode == "single":
            index = log.index(options.user) if options.user is not None else 0
            history = log.history(index)
            first = recommender.recommend(history)
            recommender.forget_prefixes()
            answer = recommender.recommend(history, strategy=first.strategy)
            if options.json:
                print(json.dumps(answer.to_dict() | {"reason": first.reason, "first_request_ms": first.total_ms}))
            else:
                why = f"; chosen by auto: {first.reason}" if first.reason else ""
                print(f"{answer}\nthe first request, engines warming up, took {first.total_ms:.2f} ms{why}")
            return 0
        count = options.users or DEFAULT_USERS[options.mode] or len(log)
        histories = [log.history(i) for i in range(min(count, len(log)))]
        if options.user is not None:
            histories = [log.history(log.index(options.user))]
        if options.mode == "batch":
            return _batch(recommender, histories, options)
        return _measure(recommender, histories, settings, options)


def _log_and_checkpoint(settings, options: argparse.Namespace):
    """The event log, read in the catalog of the checkpoint that will answer."""
    from hstu_lab import events
    from hstu_lab.model import CheckpointError, load_config
    from hstu_lab.pipeline import SAMPLE, SHIPPED_CHECKPOINT, find_checkpoint

    path = settings.events or SAMPLE
    try:
        checkpoint = settings.checkpoint or (find_checkpoint(path) if settings.events else SHIPPED_CHECKPOINT)
        load_config(checkpoint)
    except CheckpointError:
        events.read_events(path)  # where the events are broken too, that comes first
        raise
    catalog = events.Catalog.load(pathlib.Path(checkpoint) / "catalog.json")
    return _read(path, catalog, options), checkpoint


def _read(path, catalog, options: argparse.Namespace):
    from hstu_lab import events

    rejects = options.reject_file
    if rejects is None and getattr(options, "mode", None) == "batch":
        rejects = f"{path}.rejected.jsonl"
    log = events.read_events(path, catalog, reject_file=rejects, progress=not options.json and sys.stderr.isatty())
    if log.report.rejected or log.report.repaired:
        print(log.report, file=sys.stderr)
    return log


def _batch(recommender, histories, options: argparse.Namespace) -> int:
    """One JSON line a user; a user that cannot be served is reported on stderr and the others are."""
    from tqdm import tqdm

    from hstu_lab.event_log import printable
    from hstu_lab.pipeline import RequestError

    good, failed = [], 0
    for history in histories:
        try:
            recommender.prepare([history])
        except RequestError as error:
            failed += 1
            print(f"error: {error}", file=sys.stderr)
        else:
            good.append(history)
    strategy, size = None, recommender.settings.batch_size
    hidden = sys.stdout.isatty() or not sys.stderr.isatty()  # on a terminal the lines themselves tell how far it is
    with tqdm(total=len(good), unit=" users", disable=hidden) as bar:
        for start in range(0, len(good), size):  # an answer is printed when it is there, and stays if the rest is interrupted
            for answer in recommender.recommend_batch(good[start : start + size], strategy=strategy):
                strategy = answer.strategy
                if options.json:
                    print(json.dumps(answer.to_dict()), flush=True)
                else:
                    print(printable(f"{answer.user}: " + ", ".join(item.title for item in answer.items)), flush=True)
                bar.update()
    print(f"{len(good)} users served, {failed} not", file=sys.stderr)
    if not options.json and good:
        print("\n" + recommender.telemetry.table())
    return 0 if good else 2


def _measure(recommender, histories, settings, options: argparse.Namespace) -> int:
    from hstu_lab.benchmark import comprehensive, run_strategy, table
    from hstu_lab.benchmark import row as to_row

    tasks = (options.task,) if options.task else ("topk", "slate")
    progress = not options.json
    if options.mode == "benchmark":
        rows = []
        for task in tasks:
            strategy = settings.strategy
            if strategy == "auto":
                strategy, _ = recommender.choose(task, len(histories))
            rows.append(to_row(run_strategy(recommender, histories, task, strategy, progress=progress)))
        print(json.dumps(rows) if options.json else table(rows))
        return 0
    _, record, written = comprehensive(recommender, histories, tasks=tasks, progress=progress)
    if options.json:
        print(json.dumps(record.data["rows"]))
        return 0
    print(table(record.data["rows"]))
    print(f"\nmeasured here: {record.note}; {record.label.removeprefix('recorded on ')}")
    for path in written:
        print(f"wrote {path}")
    return 0


# ---- the other commands


def _serve(options: argparse.Namespace) -> int:
    refuse_idle_flags(options)
    settings = _settings(options)
    from hstu_lab.environment import doctor
    from hstu_lab.server import ServerError, ServerOptions, serve

    # The engine's own process would find these out after the port is taken, and try again for ever.
    if settings.checkpoint and not (settings.checkpoint / "model.safetensors").is_file():
        raise ServerError(f"checkpoint {settings.checkpoint}: no model.safetensors there; `python -m hstu_lab train` makes one")
    for strategy in doctor().strategies:
        if strategy.name == settings.strategy and not strategy.available:
            raise ServerError(f"strategy {strategy.name} cannot run here: {strategy.reason}")
    token = os.environ.get("HSTU_LAB_TOKEN") or None
    if options.token_file:
        try:
            token = pathlib.Path(options.token_file).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ServerError(
                f"--token-file {options.token_file} cannot be read ({error}): give a text file with the token"
            ) from error
        if not token:
            raise ServerError(f"--token-file {options.token_file} is empty: write the token into it")
    where = ServerOptions(options.host, options.port, token, options.max_in_flight, options.deadline_ms)
    return serve(where, settings.model_dump(mode="json", exclude_none=True))


def _load(options: argparse.Namespace) -> int:
    import asyncio

    settings = _settings(options)
    from hstu_lab import events, load
    from hstu_lab.measure import check_name
    from hstu_lab.pipeline import SAMPLE

    if options.record:
        check_name(options.record)
    log = events.read_events(settings.events or SAMPLE)
    sample = load.bodies(log, 2000, task=settings.task, deadline_ms=5000)

    async def run() -> tuple[dict, list[dict]]:
        async with load.Client(options.url, os.environ.get("HSTU_LAB_TOKEN")) as client:
            service = await client.check()
            if options.clients:
                return service, [(await load.closed_loop(client, sample, options.clients, options.seconds)).to_dict()]
            return service, await load.sweep(
                client, sample, options.rates, options.seconds, report=(lambda _: None) if options.json else print
            )

    service, rows = asyncio.run(run())
    if options.clients and not options.json:
        print(load.line(rows[0]))
    best = load.knee(rows, options.limit_ms)
    if options.json:
        print(json.dumps({"rows": rows, "knee": best}))
    elif not options.clients:
        print(f"the knee: {best:.4g} requests/s with p99 within {options.limit_ms:.0f} ms, measured here")
    if options.record:
        _record_load(options, service, rows, best, sample, settings.task)
    return 0


def _record_load(
    options: argparse.Namespace, service: dict, rows: list[dict], best: float, sample: list[dict], task: str
) -> None:
    from hstu_lab.benchmark import FIGURES
    from hstu_lab.measure import Record, write_record
    from hstu_lab.widgets import load_curve

    lengths, users = [len(body["events"]) for body in sample], len({body["user"] for body in sample})
    note = (
        f"{task} by {service['strategy']}, preset {service['preset']}, client and service on one machine; {len(sample)} visits "
        f"of {users} users in the log's order, {min(lengths)} to {max(lengths)} events"
    )
    note += f"; {options.note}" if options.note else ""
    data = {"rows": rows, "service": service, "limit_ms": options.limit_ms, "knee": best}
    record = Record.here(options.record, data=data, note=note)
    print(f"wrote {write_record(record)}")
    path = FIGURES / f"{options.record}.png"
    load_curve(rows, options.limit_ms, best, source=record.label).savefig(path, dpi=120, metadata={"Software": None})
    print(f"wrote {path}")


def _doctor(options: argparse.Namespace) -> int:
    from hstu_lab.environment import doctor

    report = doctor(deep=options.deep)
    print(json.dumps(report.as_dict(), indent=1) if options.json else report)
    return 0


def _train(options: argparse.Namespace) -> int:
    _settings(options)
    from hstu_lab import events, training
    from hstu_lab.config import preset
    from hstu_lab.pipeline import CHECKPOINTS

    config = preset(options.preset)
    if options.events == "synthetic":
        training.prove_room(config)  # a log for all users of a preset that is too large takes minutes
        log = events.World(config, seed=options.seed).generate(seed=options.seed)
    else:
        log = _read(options.events, None, options)
    out = pathlib.Path(options.out) if options.out else CHECKPOINTS / "local" / f"{options.preset}-{log.catalog.name}"
    minutes = options.minutes if options.minutes or options.steps else 5.0
    result = training.train(
        training.fit_config(config, log), log, out, minutes=minutes, steps=options.steps, seed=options.seed,
        resume=options.resume, progress=not options.json,
    )  # fmt: skip
    print(json.dumps(result.to_dict()) if options.json else result)
    return 0


def _export(options: argparse.Namespace) -> int:
    refuse_idle_flags(options)
    settings = _settings(options)
    from hstu_lab import onnx_export
    from hstu_lab.model import load_checkpoint
    from hstu_lab.pipeline import SHIPPED_CHECKPOINT

    checkpoint = pathlib.Path(options.checkpoint or SHIPPED_CHECKPOINT)
    precision = options.precision
    if options.to == "tensorrt":
        from hstu_lab.tensorrt_build import choose_target
        from hstu_lab.tensorrt_plugin import check_library

        library, _ = choose_target(target=options.target)  # before the export, which takes longer than to say no
        if options.kernels:
            check_library(library)
    histories = onnx_export.sample_histories(checkpoint, options.events) if precision == "int8" else None
    shown = not options.json
    if options.out and options.to == "onnx":
        model = load_checkpoint(checkpoint)
        folder = onnx_export.export(model, options.out, precision=precision, histories=histories, progress=shown)
    else:
        folder = onnx_export.export_cached(checkpoint, precision=precision, histories=histories, progress=shown)
    if options.to == "tensorrt":
        return _build_engines(checkpoint, folder, settings, options)
    files = sorted(str(path) for path in pathlib.Path(folder).glob("*.onnx"))
    print(json.dumps(files) if options.json else "\n".join(files))
    return 0


def _build_engines(checkpoint: pathlib.Path, folder: pathlib.Path, settings, options: argparse.Namespace) -> int:
    from hstu_lab.onnx_models import load_metadata_config
    from hstu_lab.tensorrt_build import EngineCache, choose_target, onnx_metadata
    from hstu_lab.tensorrt_models import build_engines, default_cache, serving_profiles
    from hstu_lab.tensorrt_plan import read_header

    config = load_metadata_config(folder, onnx_metadata(pathlib.Path(folder) / "encoder.onnx"))
    candidates = max(config.num_candidates, settings.num_items, config.slate_size)
    cache, workspace = EngineCache(options.out) if options.out else default_cache(), settings.workspace_mb << 20
    if options.kernels:
        from hstu_lab.model import load_checkpoint
        from hstu_lab.tensorrt_buckets import bucket_lengths, build_buckets, export_buckets

        capability = int(choose_target(target=options.target)[1].removeprefix("sm_"))
        with tempfile.TemporaryDirectory() as scratch:
            files = export_buckets(
                load_checkpoint(checkpoint), folder, pathlib.Path(scratch), bucket_lengths(config), candidates, capability
            )
            paths = build_buckets(files, settings.batch_size, cache, workspace, progress=not options.json)
    else:
        profiles = serving_profiles(config, settings.batch_size, candidates)
        built = build_engines(
            folder, profiles, target=options.target, cache=cache, workspace=workspace, progress=not options.json
        )
        paths = list(built.values())
    if options.json:
        print(json.dumps([str(path) for path in paths]))
        return 0
    for path in paths:
        print(f"{path}\n  {read_header(path)}")
    return 0


COMMANDS = {
    "recommend": _recommend, "benchmark": _recommend, "serve": _serve, "load": _load, "doctor": _doctor, "train": _train,
    "export": _export,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
