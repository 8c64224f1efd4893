"""Model presets: every size that the model, the kernels and the engines need, in one frozen dataclass."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable

ACTIONS = ("none", "impression", "click", "like", "share", "purchase", "dwell")
"""Actions in the order of their ids. 0 ("none") marks a position whose action is unknown: a candidate or a generated item."""

TASKS = ("engagement", "retention", "monetization")
TASK_NAMES = ("topk", "slate")
"""What a request may ask for; TASKS are what items are scored for."""

RAB_KINDS = ("none", "position", "position+time")
PRECISIONS = ("fp32", "fp16", "int8")
"""Of exported graphs and engines."""

SCHEMA_VERSION = 1
COUNTS = (
    "num_items", "num_users", "d_model", "num_layers", "num_heads", "d_qk", "d_v", "max_seq_len", "num_time_buckets",
    "num_time_levels", "num_actions", "slate_size", "num_candidates",
)  # fmt: skip


def is_ours(error: Exception) -> bool:
    """The package's own errors carry a remedy; anything else is a defect and keeps its traceback."""
    return type(error).__module__.startswith("hstu_lab")


class ConfigError(ValueError):
    """A configuration value that cannot work; the message names the field and the remedy."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of one HSTU recommender (Zhai et al. 2024, arXiv:2402.17152, with the choices of this project's README).

    `num_items` and `num_users` count table rows; row 0 is reserved (no item, unknown user). `side_features` are
    (name, rows) pairs of per-item categorical features, row 0 again meaning unknown. `num_users == 0` drops the user
    token. `max_seq_len` is both the longest sequence and the fixed divisor N of pointwise attention.
    """

    preset: str
    num_items: int
    num_users: int
    side_features: tuple[tuple[str, int], ...]
    d_model: int
    num_layers: int
    num_heads: int
    d_qk: int
    d_v: int
    max_seq_len: int
    rab: str = "position+time"
    num_time_buckets: int = 64
    num_time_levels: int = 512
    num_actions: int = len(ACTIONS)
    temperature: float = 0.05
    dropout: float = 0.1
    target_time_bias: bool = False
    slate_size: int = 10
    num_candidates: int = 100
    task_weights: tuple[float, ...] = (1.0, 0.5, 2.0)
    norm_eps: float = 1e-6

    def __post_init__(self):
        self._convert("side_features", lambda pairs: tuple((str(n), int(r)) for n, r in pairs), "pairs of a name and its rows")
        self._convert("task_weights", lambda weights: tuple(float(w) for w in weights), "one number for each task")
        for field in COUNTS:
            value, least = getattr(self, field), {"num_users": 0, "num_actions": len(ACTIONS)}.get(field, 1)
            if type(value) is not int or value < least:
                raise ConfigError(f"{field} is {value!r}: give a whole number from {least} up")
        numbers = (self.temperature, self.norm_eps, self.dropout)
        temperature, eps, dropout = (value if type(value) in (int, float) else math.nan for value in numbers)
        for field, fits, wanted in (
            ("temperature", 0 < temperature < math.inf, "a number above 0"),
            ("norm_eps", 0 < eps < math.inf, "a number above 0"),
            ("dropout", 0 <= dropout < 1, "a number from 0 to below 1"),
            ("target_time_bias", type(self.target_time_bias) is bool, "true or false"),
            ("task_weights", all(map(math.isfinite, self.task_weights)), "finite numbers"),
        ):
            if not fits:
                raise ConfigError(f"{field} is {getattr(self, field)!r}: give {wanted}")
        names = [name for name, _ in self.tables]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"side_features gives {twice[0]!r}, the name of another table: give each a name of its own")
        for name, rows in self.side_features:
            if rows < 1:
                raise ConfigError(f"side_features gives {name!r} {rows} rows: give 1 or more")
        if self.rab not in RAB_KINDS:
            raise ConfigError(f"rab is {self.rab!r}: use one of {', '.join(RAB_KINDS)}")
        if len(self.task_weights) != len(TASKS):
            raise ConfigError(f"task_weights has {len(self.task_weights)} values: give one for each of {', '.join(TASKS)}")
        if self.token_limit > 2**31:
            raise ConfigError(
                f"num_items x num_actions x num_time_levels + num_users is {self.token_limit}, over 2^31: lower num_time_levels"
            )
        if self.max_history < 1:
            taken = self.slate_size + self.num_context
            raise ConfigError(f"max_seq_len is {self.max_seq_len}: it must exceed slate_size + num_context = {taken}")

    def _convert(self, field: str, convert: Callable, wanted: str) -> None:
        try:
            object.__setattr__(self, field, convert(getattr(self, field)))
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"{field} is {getattr(self, field)!r}: give {wanted}") from error

    @property
    def num_context(self) -> int:
        """Tokens before the first event: the user token, where there is a user table."""
        return 1 if self.num_users else 0

    @property
    def max_history(self) -> int:
        """Most events of a history that one request may carry: room is kept for the user token and a whole slate."""
        return self.max_seq_len - self.num_context - self.slate_size

    @property
    def slide(self) -> int:
        """Events that a served history loses at once when it outgrows `max_history`: an eighth, so that one visit in so many
        is computed anew and the others find their prefix cached."""
        return max(self.max_history // 8, 1)

    @property
    def user_token_base(self) -> int:
        """First token id that means a user; smaller ids are packed events."""
        return self.num_items * self.num_actions * self.num_time_levels

    @property
    def token_limit(self) -> int:
        """One more than the largest token id; vLLM keeps token ids in int32."""
        return self.user_token_base + self.num_users

    @property
    def tables(self) -> tuple[tuple[str, int], ...]:
        """(name, rows) of every embedding table, item first; all are d_model wide."""
        users = (("user", self.num_users),) if self.num_users else ()
        return (("item", self.num_items), *self.side_features, *users)

    def replace(self, **changes) -> ModelConfig:
        """A copy with the named fields changed. Raises ConfigError where the result cannot work."""
        unknown = sorted(set(changes) - {f.name for f in dataclasses.fields(self)})
        if unknown:
            raise ConfigError(f"unknown model field {unknown[0]!r}: see hstu_lab.config.ModelConfig")
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        return json.dumps({"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """Parse what `to_json` wrote. Raises ConfigError on another schema version or unknown and missing fields."""
        try:
            fields = json.loads(text)
            version = fields.pop("schema_version")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConfigError("config is not JSON with a schema_version: re-export the checkpoint") from error
        if version != SCHEMA_VERSION:
            raise ConfigError(
                f"schema_version is {version}, this release reads {SCHEMA_VERSION}: retrain or convert the checkpoint"
            )
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ConfigError(f"unknown model field {unknown[0]!r}: the checkpoint comes from another release")
        try:
            return cls(**fields)
        except TypeError as error:
            raise ConfigError(f"config is incomplete: {error}") from error


def _presets() -> dict[str, ModelConfig]:
    tiny = ModelConfig(
        preset="tiny", num_items=501, num_users=301, side_features=(("category", 17), ("creator", 65)),
        d_model=32, num_layers=2, num_heads=2, d_qk=16, d_v=16, max_seq_len=64,
    )  # fmt: skip
    small = ModelConfig(
        preset="small", num_items=2001, num_users=2001, side_features=(("category", 33), ("creator", 257)),
        d_model=64, num_layers=3, num_heads=4, d_qk=16, d_v=16, max_seq_len=256,
    )  # fmt: skip
    # The paper's MovieLens models: d 50; the user table and side features are off, as in the published runs.
    ml1m = ModelConfig(
        preset="ml-1m", num_items=3953, num_users=0, side_features=(), d_model=50, num_layers=2, num_heads=1,
        d_qk=50, d_v=50, max_seq_len=211, dropout=0.2,
    )  # fmt: skip
    ml1m_large = ml1m.replace(preset="ml-1m-large", num_layers=8, num_heads=2, d_qk=25, d_v=25)
    # 12 layers hold 63 M parameters and the items 51 M; side features and users fill the total to 3.2 B.
    gr3b = ModelConfig(
        preset="gr-3b", num_items=50_000, num_users=2_400_000, side_features=(("category", 10_000), ("creator", 600_000)),
        d_model=1024, num_layers=12, num_heads=16, d_qk=64, d_v=64, max_seq_len=2048,
    )  # fmt: skip
    return {p.preset: p for p in (tiny, small, ml1m, ml1m_large, gr3b)}


PRESETS = _presets()


def preset(name: str) -> ModelConfig:
    """The preset of that name. Raises ConfigError naming the known ones."""
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r} is unknown: use one of {', '.join(PRESETS)}")
    return PRESETS[name]
