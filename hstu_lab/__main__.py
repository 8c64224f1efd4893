"""The command line: python -m hstu_lab recommend | benchmark | serve | load | doctor | train | export."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys

# Before torch is imported: its C++ side reports how it bound memory.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# Threads that spin while they wait make small operators several times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

DEFAULT_USERS = {"batch": None, "benchmark": 64, "comprehensive": 32}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status. Errors that a user can mend are one line on stderr and status 2."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        if not _is_ours(error) and not isinstance(error, OSError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def _is_ours(error: Exception) -> bool:
    """The package's own errors carry a remedy; anything else is a defect and keeps its traceback."""
    return type(error).__module__.startswith("hstu_lab")


def _parser() -> argparse.ArgumentParser:
    from hstu_lab.ops import BACKENDS
    from hstu_lab.settings import PRECISIONS, STRATEGIES, TASK_NAMES

    parser = argparse.ArgumentParser(prog="python -m hstu_lab", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", metavar="FILE", help="settings as TOML (default: hstu_lab.toml, where there is one)")
    common.add_argument("--log-level", choices=("DEBUG", "INFO", "WARNING", "ERROR"), type=str.upper)
    common.add_argument("--log-file", metavar="FILE", help="write the log here as well as to stderr")
    common.add_argument("--json", action="store_true", help="print JSON on stdout, nothing else")

    serving = argparse.ArgumentParser(add_help=False)
    serving.add_argument("--events", metavar="FILE", help="JSONL, Parquet, or MovieLens-1M folder or zip (default: the sample)")
    serving.add_argument("--checkpoint", metavar="FOLDER", help="default: the newest one trained on the items of --events")
    serving.add_argument("--user", metavar="ID", help="default: the first user of the events")
    serving.add_argument("--users", type=_positive, metavar="N", help="how many users (modes batch, benchmark, comprehensive)")
    serving.add_argument("--task", choices=TASK_NAMES)
    serving.add_argument("--strategy", choices=("auto", *STRATEGIES))
    serving.add_argument("--ops", choices=tuple(BACKENDS), help="operators of the PyTorch and vLLM stages")
    serving.add_argument("--precision", choices=PRECISIONS, help="of the ONNX Runtime and TensorRT stages (default: fp32)")
    serving.add_argument("--batch-size", type=_positive, metavar="N")
    serving.add_argument("--reject-file", metavar="FILE", help="where bad rows go (mode batch: beside the events)")

    modes = ("single", "batch", "benchmark", "comprehensive")
    recommend = commands.add_parser("recommend", parents=[common, serving], help="ten items for a user, or for all of them")
    recommend.add_argument("--mode", choices=modes, default="single")
    recommend.set_defaults(run=_recommend)
    benchmark = commands.add_parser("benchmark", parents=[common, serving], help="latency and throughput, with agreement")
    benchmark.add_argument("--mode", choices=modes, default="benchmark")
    benchmark.set_defaults(run=_recommend)

    serve = commands.add_parser("serve", parents=[common], help="answer over HTTP, the engine in a supervised process of its own")
    serve.add_argument("--checkpoint", metavar="FOLDER", help="default: the shipped one")
    serve.add_argument("--strategy", choices=("auto", *STRATEGIES), help="auto: vllm if it is here")
    serve.add_argument("--ops", choices=tuple(BACKENDS), help="operators of the PyTorch and vLLM stages")
    serve.add_argument("--host", default="127.0.0.1", help="another than loopback needs a token")
    serve.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    serve.add_argument("--token-file", metavar="FILE", help="file with the bearer token (default: HSTU_LAB_TOKEN, where set)")
    serve.add_argument("--max-in-flight", type=_positive, default=64, help="more requests than that get 429 (default: 64)")
    serve.add_argument("--deadline-ms", type=_positive, default=5000, help="of requests that name none (default: 5000)")
    serve.set_defaults(run=_serve)

    load = commands.add_parser(
        "load", parents=[common], help="send the log's visits to a service here; p50/p95/p99, goodput, the knee"
    )
    load.add_argument("--url", default="http://127.0.0.1:8000", help="loopback only; HSTU_LAB_TOKEN is sent along")
    load.add_argument("--events", metavar="FILE", help="the log whose visits are sent (default: the sample)")
    load.add_argument("--task", choices=TASK_NAMES)
    load.add_argument("--rates", default="5,10,20,40,80", help="requests/s of the open loop, one run each")
    load.add_argument("--clients", type=_positive, metavar="N", help="a closed loop of N clients instead")
    load.add_argument("--seconds", type=float, default=5.0, help="of each run (default: 5)")
    load.add_argument("--limit-ms", type=float, default=200.0, help="p99 that the knee must keep (default: 200)")
    load.add_argument("--record", metavar="NAME", help="write data/measured/DEVICE/NAME.json and figures/NAME.png")
    load.add_argument("--note", metavar="TEXT", help="what else a reader of the record must know")
    load.set_defaults(run=_load)

    doctor = commands.add_parser("doctor", parents=[common], help="what this machine can run")
    doctor.add_argument("--deep", action="store_true", help="import every engine instead of only looking for it")
    doctor.set_defaults(run=_doctor)

    train = commands.add_parser("train", parents=[common], help="train a checkpoint")
    train.add_argument("--events", default="synthetic", metavar="FILE", help="as for recommend, or `synthetic` (default)")
    train.add_argument("--preset", default="small", help="tiny, small (default), ml-1m, ml-1m-large or gr-3b")
    train.add_argument("--minutes", type=float, help="stop after so many minutes (default: 5, where --steps is not given)")
    train.add_argument("--steps", type=_positive, help="stop after so many steps")
    train.add_argument("--out", metavar="FOLDER", help="default: data/checkpoints/local/PRESET")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--resume", action="store_true", help="go on where the training in --out stopped")
    train.add_argument("--reject-file", metavar="FILE")
    train.set_defaults(run=_train)

    export = commands.add_parser("export", parents=[common], help="a checkpoint as three ONNX models or TensorRT engines")
    export.add_argument("--to", choices=("onnx", "tensorrt"), default="onnx")
    export.add_argument("--precision", choices=PRECISIONS, default="fp32")
    export.add_argument("--checkpoint", metavar="FOLDER", help="default: the shipped one")
    export.add_argument("--events", metavar="FILE", help="log that int8 is calibrated with (default: the sample)")
    export.add_argument("--out", metavar="FOLDER", help="default: the cache that the strategies onnx and tensorrt read")
    export.add_argument("--target", metavar="SM", help="GPU to build engines for (default: this machine's, else sm_80, an A100)")
    export.add_argument("--workspace-mb", type=_positive, metavar="N", help="GPU memory an engine may use while it runs")
    export.add_argument("--batch-size", type=_positive, metavar="N", help="largest batch of the engines")
    export.set_defaults(run=_export)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _settings(options: argparse.Namespace):
    from hstu_lab.settings import configure_logging, load_settings

    names = (
        "events", "checkpoint", "task", "strategy", "ops", "precision", "workspace_mb", "batch_size", "log_level", "log_file"
    )  # fmt: skip
    settings = load_settings(options.config, **{name: getattr(options, name, None) for name in names})
    configure_logging(settings.log_level, settings.log_file)
    return settings


# ---- recommend and benchmark


def _recommend(options: argparse.Namespace) -> int:
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
    answers = recommender.recommend_batch(good) if good else []
    for answer in answers:
        if options.json:
            print(json.dumps(answer.to_dict()))
        else:
            print(f"{answer.user}: " + ", ".join(item.title for item in answer.items))
    print(f"{len(answers)} users served, {failed} not", file=sys.stderr)
    if not options.json and answers:
        print("\n" + recommender.telemetry.table())
    return 0 if answers else 2


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
    settings = _settings(options)
    from hstu_lab.server import ServerError, ServerOptions, serve

    token = os.environ.get("HSTU_LAB_TOKEN") or None
    if options.token_file:
        token = pathlib.Path(options.token_file).read_text().strip()
        if not token:
            raise ServerError(f"--token-file {options.token_file} is empty: write the token into it")
    where = ServerOptions(options.host, options.port, token, options.max_in_flight, options.deadline_ms)
    return serve(where, settings.model_dump(mode="json", exclude_none=True))


def _load(options: argparse.Namespace) -> int:
    import asyncio

    settings = _settings(options)
    from hstu_lab import events, load
    from hstu_lab.pipeline import SAMPLE

    try:
        rates = [float(rate) for rate in options.rates.split(",")]
    except ValueError as error:
        raise load.LoadError(f"--rates {options.rates}: give numbers with commas between them") from error
    log = events.read_events(settings.events or SAMPLE)
    sample = load.bodies(log, 2000, task=settings.task, deadline_ms=5000)

    async def run() -> tuple[dict, list[dict]]:
        async with load.Client(options.url, os.environ.get("HSTU_LAB_TOKEN")) as client:
            service = await client.check()
            if options.clients:
                return service, [(await load.closed_loop(client, sample, options.clients, options.seconds)).to_dict()]
            return service, await load.sweep(
                client, sample, rates, options.seconds, report=(lambda _: None) if options.json else print
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
        log = events.World(config, seed=options.seed).generate(config.num_users - 1, seed=options.seed)
    else:
        log = _read(options.events, None, options)
    out = pathlib.Path(options.out) if options.out else CHECKPOINTS / "local" / options.preset
    minutes = options.minutes if options.minutes or options.steps else 5.0
    result = training.train(
        training.fit_config(config, log), log, out, minutes=minutes, steps=options.steps, seed=options.seed,
        resume=options.resume, progress=not options.json,
    )  # fmt: skip
    print(json.dumps(result.to_dict()) if options.json else result)
    return 0


def _export(options: argparse.Namespace) -> int:
    settings = _settings(options)
    from hstu_lab import onnx_export
    from hstu_lab.model import load_checkpoint
    from hstu_lab.pipeline import SHIPPED_CHECKPOINT

    checkpoint = pathlib.Path(options.checkpoint or SHIPPED_CHECKPOINT)
    precision = options.precision
    if options.to == "tensorrt":
        from hstu_lab.tensorrt_build import choose_target

        choose_target(target=options.target)  # before the export, which takes longer than to say no
    histories = onnx_export.sample_histories(checkpoint, options.events) if precision == "int8" else None
    shown = not options.json
    if options.out and options.to == "onnx":
        model = load_checkpoint(checkpoint)
        folder = onnx_export.export(model, options.out, precision=precision, histories=histories, progress=shown)
    else:
        folder = onnx_export.export_cached(checkpoint, precision=precision, histories=histories, progress=shown)
    if options.to == "tensorrt":
        return _build_engines(folder, settings, options)
    files = sorted(str(path) for path in pathlib.Path(folder).glob("*.onnx"))
    print(json.dumps(files) if options.json else "\n".join(files))
    return 0


def _build_engines(folder, settings, options: argparse.Namespace) -> int:
    from hstu_lab.onnx_models import load_metadata_config
    from hstu_lab.tensorrt_build import EngineCache, onnx_metadata
    from hstu_lab.tensorrt_models import build_engines, default_cache, serving_profiles
    from hstu_lab.tensorrt_plan import read_header

    config = load_metadata_config(folder, onnx_metadata(pathlib.Path(folder) / "encoder.onnx"))
    candidates = max(config.num_candidates, settings.num_items, config.slate_size)
    paths = build_engines(
        folder, serving_profiles(config, settings.batch_size, candidates), target=options.target,
        cache=EngineCache(options.out) if options.out else default_cache(), workspace=settings.workspace_mb << 20,
        progress=not options.json,
    )  # fmt: skip
    if options.json:
        print(json.dumps([str(path) for path in paths.values()]))
        return 0
    for path in paths.values():
        print(f"{path}\n  {read_header(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
