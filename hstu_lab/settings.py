"""Every knob of a run in one typed place: a TOML file, then HSTU_LAB_* environment variables, then command-line flags."""

from __future__ import annotations

import difflib
import logging
import os
import pathlib
import sys
import tomllib
from typing import Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from hstu_lab.config import PRECISIONS, TASK_NAMES, ConfigError
from hstu_lab.ops import BACKENDS

STRATEGIES = ("eager", "onnx", "vllm", "tensorrt", "unified")
OPS = tuple(BACKENDS)
FILE_NAME = "hstu_lab.toml"
PREFIX = "HSTU_LAB_"
OTHER_VARIABLES = ("DATA", "KERNELS", "TOKEN", "FIXED_ONNX", "TENSORRT_PYTHON")
"""Environment variables with that prefix that are no field of `Settings`; the last two are for tests."""

log = logging.getLogger(__name__)


class Settings(BaseSettings):
    """Later sources win: defaults, `hstu_lab.toml` in the working folder (or `--config FILE`), environment, flags."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", toml_file=FILE_NAME)

    checkpoint: pathlib.Path | None = None
    """Checkpoint folder; None picks one that was trained on the world that the events come from."""
    events: pathlib.Path | None = None
    """Event file or MovieLens folder; None takes the sample log."""
    task: Literal[TASK_NAMES] = "topk"
    strategy: Literal["auto", *STRATEGIES] = "auto"
    ops: Literal[OPS] = "reference"
    """Operators of the PyTorch and vLLM stages."""
    precision: Literal[PRECISIONS] = "fp32"
    """Of the ONNX Runtime and TensorRT stages; fp16 and int8 may reorder items whose scores are close."""
    hot_cache_rows: int = Field(0, ge=0)
    """Rows of each table of side features and users that the device keeps, the rest in host memory; 0 keeps whole tables there.

    For every stage that reads tables in PyTorch: all of eager, onnx and tensorrt, encoder and ranking of unified.
    """
    hot_cache_policy: Literal["lru", "lfu"] = "lru"
    """Which rows of such a table go first."""
    workspace_mb: int = Field(1024, ge=1)
    """GPU memory that one TensorRT engine may use while it runs, MiB."""
    batch_size: int = Field(64, ge=1, le=4096)
    """Most requests that one engine call answers together."""
    num_items: int = Field(10, ge=1, le=1000)
    """Items in an answer of task topk; a slate has as many as the model was built for."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of PyTorch and ONNX Runtime; None leaves their defaults."""
    kv_cache_mb: int = Field(256, ge=1)
    """Memory of vLLM's paged cache, MiB."""
    block_size: int = Field(16, ge=1)
    """Tokens in a block of vLLM's cache."""
    max_num_seqs: int = Field(64, ge=1)
    max_num_batched_tokens: int = Field(2048, ge=16)
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "WARNING"
    log_file: pathlib.Path | None = None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


def load_settings(config_file: str | pathlib.Path | None = None, **flags) -> Settings:
    """Settings with the flags that are not None on top. Raises ConfigError naming the field, its source and the remedy."""
    given = {name: value for name, value in flags.items() if value is not None}
    path = pathlib.Path(config_file or FILE_NAME)
    if config_file is not None and not path.is_file():
        raise ConfigError(f"{path}: no such settings file; leave out --config or give one that exists")

    for variable in (name.removeprefix(PREFIX) for name in sorted(os.environ) if name.startswith(PREFIX)):
        if variable.lower() not in Settings.model_fields and variable not in OTHER_VARIABLES:
            nearest = difflib.get_close_matches(variable.lower(), Settings.model_fields, 1, 0)[0]
            log.warning("%s%s is set, but there is no such setting; unset it, or was %s meant?", PREFIX, variable, nearest)

    class FromFile(Settings):
        model_config = SettingsConfigDict(toml_file=path)

    try:
        return FromFile(**given)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML ({error}); see `python -m hstu_lab recommend --help` for the fields") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])
        variable = f"{PREFIX}{field.upper()}"
        source = "flag" if field in given else variable if variable in os.environ else str(path)
        known = field in Settings.model_fields
        problem = first["msg"] if known else f"there is no such field; known fields: {', '.join(Settings.model_fields)}"
        raise ConfigError(f"setting {field} ({source}) is {first['input']!r}: {problem}") from error


def configure_logging(level: str, file: str | pathlib.Path | None) -> None:
    """Send the package's log to stderr, and to `file` as well where one is given. Raises ConfigError if it cannot be written."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if file is not None:
        try:
            handlers.append(logging.FileHandler(file))
        except OSError as error:
            raise ConfigError(f"--log-file {file}: {error.strerror}; give a file in a folder that exists") from error
    root = logging.getLogger("hstu_lab")
    root.handlers[:] = handlers
    root.setLevel(level)
    root.propagate = False
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
