"""The flags of the command line: what each means, its unit and default, and the combinations that make no sense."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from typing import NoReturn

from hstu_lab.config import TASK_NAMES, ConfigError
from hstu_lab.settings import OPS, PRECISIONS, STRATEGIES

MODES = ("single", "batch", "benchmark", "comprehensive")


class _Parser(argparse.ArgumentParser):
    """Raises what is wrong with a flag as one line, like every other error here, in place of twelve lines of usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def parser(run: Mapping[str, Callable[[argparse.Namespace], int]]) -> argparse.ArgumentParser:
    """The flags of every command. `run[command](options)` does its work and gives the exit status; `options.run` is that one.

    Parsing raises ConfigError for a flag that cannot be.
    """
    whole = _Parser(prog="python -m hstu_lab", description="HSTU Lab: a generative recommender, from one event to ten items.")
    commands = whole.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, about: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        added = commands.add_parser(name, parents=[common, *parents], help=about, description=about[0].upper() + about[1:] + ".")
        added.set_defaults(run=run[name])
        return added

    common = _common_options()
    serving = _serving_options()
    for name, mode, about in (
        ("recommend", "single", "ten items for a user, or for all of them"),
        ("benchmark", "benchmark", "latency and throughput, with agreement"),
    ):
        modes = "single: one user; batch: a line for every user; benchmark: one strategy; comprehensive: all, with agreement"
        of = command(name, about, serving)
        of.add_argument("--mode", choices=MODES, default=mode, help=f"{modes} (default: {mode})")
    _serve_options(command("serve", "answer over HTTP, the engine in a supervised process of its own"))
    _load_options(command("load", "send the log's visits to a service here; p50/p95/p99, goodput, the knee"))
    doctor = command("doctor", "what this machine can run, and the command that installs what is missing")
    doctor.add_argument("--deep", action="store_true", help="import every engine instead of only looking for it")
    _train_options(command("train", "train a checkpoint"))
    _export_options(command("export", "a checkpoint as three ONNX models or TensorRT engines"))
    return whole


def _common_options() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", metavar="FILE", help="settings as TOML (default: hstu_lab.toml, where there is one)")
    levels = ("DEBUG", "INFO", "WARNING", "ERROR")
    common.add_argument("--log-level", choices=levels, type=str.upper, help="least severe that is logged (default: WARNING)")
    common.add_argument("--log-file", metavar="FILE", help="write the log here as well as to stderr")
    common.add_argument("--json", action="store_true", help="print JSON on stdout, nothing else")
    return common


def _serving_options() -> argparse.ArgumentParser:
    serving = argparse.ArgumentParser(add_help=False)
    serving.add_argument("--events", metavar="FILE", help="JSONL, Parquet, or MovieLens-1M folder or zip (default: the sample)")
    serving.add_argument("--checkpoint", metavar="FOLDER", help="default: the newest one trained on the items of --events")
    serving.add_argument("--user", metavar="ID", help="default: the first user of the events")
    serving.add_argument(
        "--users",
        type=_positive,
        metavar="N",
        help="how many (default: all in mode batch, 64 in benchmark, 32 in comprehensive)",
    )
    serving.add_argument(
        "--task", choices=TASK_NAMES, help="topk: the best ten of one pass (default); slate: ten generated one after another"
    )
    serving.add_argument(
        "--strategy", choices=("auto", *STRATEGIES), help="which engine does which stage (default: auto, which says why)"
    )
    serving.add_argument("--precision", choices=PRECISIONS, help="of the ONNX Runtime and TensorRT stages (default: fp32)")
    serving.add_argument(
        "--batch-size", type=_positive, metavar="N", help="most users that one engine call answers together (default: 64)"
    )
    _engine_options(serving)
    serving.add_argument("--reject-file", metavar="FILE", help="where bad rows go (mode batch: beside the events; else nowhere)")
    return serving


def _engine_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--ops", choices=OPS, help="operators of the PyTorch and vLLM stages (default: reference; the others want a GPU)"
    )
    about = "rows of each table of side features and users kept on the device, the rest in host memory (default: whole tables)"
    command.add_argument("--hot-cache-rows", type=_positive, metavar="N", help=about)


def _serve_options(serve: argparse.ArgumentParser) -> None:
    serve.add_argument("--checkpoint", metavar="FOLDER", help="default: the shipped one")
    serve.add_argument("--strategy", choices=("auto", *STRATEGIES), help="default: auto, which is vllm if it is here")
    _engine_options(serve)
    serve.add_argument("--host", default="127.0.0.1", help="another than loopback needs a token (default: 127.0.0.1)")
    serve.add_argument("--port", type=_port, default=8000, metavar="N", help="0 takes a free one (default: 8000)")
    serve.add_argument("--token-file", metavar="FILE", help="file with the bearer token (default: HSTU_LAB_TOKEN, where set)")
    serve.add_argument(
        "--max-in-flight", type=_positive, default=64, metavar="N", help="more requests than that get 429 (default: 64)"
    )
    serve.add_argument(
        "--deadline-ms", type=_positive, default=5000, metavar="MS", help="of requests that name none (default: 5000)"
    )


def _load_options(load: argparse.ArgumentParser) -> None:
    load.add_argument(
        "--url",
        default="http://127.0.0.1:8000",
        help="loopback only; HSTU_LAB_TOKEN is sent along (default: http://127.0.0.1:8000)",
    )
    load.add_argument("--events", metavar="FILE", help="the log whose visits are sent (default: the sample)")
    load.add_argument("--task", choices=TASK_NAMES, help="what every visit asks for (default: topk)")
    load.add_argument(
        "--rates", type=_rates, default="5,10,20,40,80", metavar="R,R,...",
        help="requests/s of the open loop, one run each (default: 5,10,20,40,80)",
    )  # fmt: skip
    load.add_argument("--clients", type=_positive, metavar="N", help="a closed loop of N clients instead")
    load.add_argument("--seconds", type=_above_zero, default=5.0, metavar="S", help="of each run (default: 5)")
    load.add_argument("--limit-ms", type=_above_zero, default=200.0, metavar="MS", help="p99 that the knee keeps (default: 200)")
    load.add_argument("--record", metavar="NAME", help="write data/measured/DEVICE/NAME.json and figures/NAME.png")
    load.add_argument("--note", metavar="TEXT", help="what else a reader of the record must know")


def _train_options(train: argparse.ArgumentParser) -> None:
    train.add_argument("--events", default="synthetic", metavar="FILE", help="as for recommend, or `synthetic` (default)")
    train.add_argument("--preset", default="small", help="tiny, small (default), ml-1m, ml-1m-large or gr-3b")
    train.add_argument(
        "--minutes", type=_above_zero, metavar="M", help="stop after so many minutes (default: 5, where --steps is not given)"
    )
    train.add_argument("--steps", type=_positive, metavar="N", help="stop after so many steps")
    train.add_argument("--out", metavar="FOLDER", help="default: data/checkpoints/local/PRESET-LOG, which recommend finds")
    about = "of weights, batches and the synthetic log (default: 0)"
    train.add_argument("--seed", type=_seed, default=0, metavar="N", help=about)
    train.add_argument("--resume", action="store_true", help="go on where the training in --out stopped")
    train.add_argument("--reject-file", metavar="FILE", help="where bad rows of --events go (default: nowhere)")


def _export_options(export: argparse.ArgumentParser) -> None:
    export.add_argument("--to", choices=("onnx", "tensorrt"), default="onnx", help="default: onnx")
    export.add_argument("--precision", choices=PRECISIONS, default="fp32", help="default: fp32")
    export.add_argument("--checkpoint", metavar="FOLDER", help="default: the shipped one")
    export.add_argument("--events", metavar="FILE", help="log that int8 is calibrated with (default: the sample)")
    export.add_argument("--out", metavar="FOLDER", help="default: the cache that the strategies onnx and tensorrt read")
    engines = export.add_argument_group("with --to tensorrt")
    engines.add_argument("--target", metavar="SM", help="GPU to build engines for (default: this machine's, else sm_80, an A100)")
    engines.add_argument(
        "--workspace-mb", type=_positive, metavar="MIB", help="GPU memory that an engine may use while it runs (default: 1024)"
    )
    engines.add_argument("--batch-size", type=_positive, metavar="N", help="largest batch of the engines (default: 64)")
    about = "stack and ranker in kernels of ours, an engine for each length from 64 on; TensorRT 8 only (default: TensorRT's own)"
    engines.add_argument("--kernels", action="store_true", default=None, help=about)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 on")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 0 to 2^63 - 1")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is no port: give 0 to 65535")
    return int(text)


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text or 'nothing'} is no number above 0")
    return value


def _rates(text: str) -> list[float]:
    """Numbers with commas between them."""
    return [_above_zero(rate) for rate in text.split(",")]


def refuse_idle_flags(options: argparse.Namespace) -> None:
    """A flag that would change nothing was meant to: raises ConfigError naming it and what it goes with."""

    def given(name: str) -> bool:
        return getattr(options, name, None) is not None

    mode, strategy = getattr(options, "mode", None), getattr(options, "strategy", None)
    if given("users") and (mode == "single" or given("user")):
        raise ConfigError(f"--users {options.users}: one user was asked for; leave it out, or give --mode batch without --user")
    if strategy in ("eager", "vllm") and getattr(options, "precision", None) not in (None, "fp32"):
        raise ConfigError(
            f"--precision {options.precision}: no stage of strategy {strategy} has it; use onnx, unified or tensorrt"
        )
    if strategy == "vllm" and given("hot_cache_rows"):
        raise ConfigError("--hot-cache-rows: strategy vllm keeps whole tables; use eager, onnx, tensorrt or unified")
    if given("to") and given("events") and options.precision != "int8":
        raise ConfigError("--events is the log that int8 is calibrated with: add --precision int8, or leave it out")
    if getattr(options, "to", None) == "onnx":
        for name in ("target", "workspace_mb", "batch_size", "kernels"):
            if given(name):
                raise ConfigError(f"--{name.replace('_', '-')} is for engines: add --to tensorrt, or leave it out")
    elif given("kernels") and options.precision == "fp32":
        raise ConfigError("--kernels compute in fp16 and int8: add --precision fp16 or int8, or leave --kernels out")
