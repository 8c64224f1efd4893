"""User events in memory: the catalog of items, one user's history, and the log of all users in columns."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
from collections.abc import Iterator, Sequence

import numpy as np

from hstu_lab.config import ModelConfig

CATALOG_VERSION = 1


class EventsError(ValueError):
    """Events that cannot be used. The message is one line naming file, row, field and remedy, as far as each exists."""


@contextlib.contextmanager
def clear_errors(path: str | os.PathLike, remedy: str, verb: str = "read") -> Iterator[None]:
    """Turn whatever a damaged or unwritable file makes the libraries inside raise into one EventsError."""
    try:
        yield
    except EventsError:
        raise
    except Exception as error:  # gzip, zlib, zipfile, json and pyarrow raise some twenty kinds on damaged bytes
        if verb == "read" and isinstance(error, FileNotFoundError):
            raise EventsError(f"{path}: no such file: check the path") from error
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise EventsError(f"{path}: cannot be {verb} ({said}): {remedy}") from error


@dataclasses.dataclass
class Report:
    """What became of a file's rows. `rejected` and `repaired` count rows by reason; `str(report)` is one line."""

    source: str = ""
    rows: int = 0
    kept: int = 0
    rejected: dict[str, int] = dataclasses.field(default_factory=dict)
    repaired: dict[str, int] = dataclasses.field(default_factory=dict)
    reject_file: str | None = None

    def __str__(self) -> str:
        line = f"{self.source}: {self.rows:,} rows, {self.kept:,} kept"
        if self.rejected:
            line += f", {sum(self.rejected.values()):,} rejected ({_counts(self.rejected)})"
            line += f" -> {self.reject_file}" if self.reject_file else ""
        return line + (f"; repaired: {_counts(self.repaired)}" if self.repaired else "")


def printable(text: str) -> str:
    """`text` as one line that steers no terminal: identifiers may hold any character."""
    return re.sub("[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: ascii(found[0])[1:-1], text)


def _counts(reasons: dict[str, int]) -> str:
    return ", ".join(f"{n:,} {reason}" for reason, n in sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0])))


# ---- items


@dataclasses.dataclass
class Catalog:
    """The items of one world by table row. Row 0 means no item; ids[row] is None where a row holds none.

    `titles` runs like `ids`; `features` maps a side feature's name to int64 (num_items,), 0 meaning unknown.
    """

    name: str
    ids: list[str | None]
    titles: list[str | None]
    features: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def num_items(self) -> int:
        """Table rows, row 0 included."""
        return len(self.ids)

    @functools.cached_property
    def rows(self) -> dict[str, int]:
        """Row of every external id."""
        return {id: row for row, id in enumerate(self.ids) if id is not None}

    @property
    def known(self) -> np.ndarray:
        """bool (num_items,): which rows hold an item."""
        return np.array([id is not None for id in self.ids], dtype=bool)

    def row(self, id: str) -> int:
        """Table row of an external id; 0 if the catalog does not have it."""
        return self.rows.get(id, 0)

    def item_features(self, config: ModelConfig) -> np.ndarray:
        """int64 (F, config.num_items) in the order of `config.side_features`; features the catalog lacks are 0.

        Raises EventsError where the catalog or one of its features outgrows the config's tables.
        """
        if self.num_items > config.num_items:
            raise EventsError(
                f"catalog {self.name!r} has {self.num_items:,} item rows, preset {config.preset!r} holds {config.num_items:,}: "
                "choose a larger preset or raise num_items"
            )
        table = np.zeros((len(config.side_features), config.num_items), dtype=np.int64)
        for target, (name, rows) in zip(table, config.side_features):
            values = self.features.get(name, np.zeros(1, dtype=np.int64))
            if values.min() < 0 or values.max() >= rows:
                raise EventsError(
                    f"catalog {self.name!r}: feature {name!r} runs from {values.min():,} to {values.max():,}, preset "
                    f"{config.preset!r} has rows 0 to {rows - 1:,}: raise that side feature's rows"
                )
            target[: len(values)] = values
        return table

    def save(self, path: str | os.PathLike) -> None:
        """Write the catalog as JSON."""
        features = {name: values.tolist() for name, values in self.features.items()}
        fields = {"schema_version": CATALOG_VERSION, "name": self.name, "ids": self.ids, "titles": self.titles}
        text = json.dumps({**fields, "features": features}, ensure_ascii=False)
        with clear_errors(path, "give a path that can be written", "written"):
            pathlib.Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike) -> Catalog:
        """Read what `save` wrote. Raises EventsError naming the file and the field."""
        remedy = "restore it, or train again"
        with clear_errors(path, remedy):
            fields = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
            version = fields.get("schema_version") if isinstance(fields, dict) else None
            if version != CATALOG_VERSION:
                raise EventsError(f"{path}: schema_version is {version!r}, this release reads {CATALOG_VERSION}: {remedy}")
            wanted = ("name", "ids", "titles", "features")
            if lacking := [field for field in wanted if field not in fields]:
                raise EventsError(f"{path}: {lacking[0]} is missing: {remedy}")
            name, ids, titles, features = (fields[field] for field in wanted)
            features = {name: np.array(values, dtype=np.int64) for name, values in features.items()}
            for field, values in (("ids", ids), ("titles", titles)):
                if type(values) is not list or not all(value is None or type(value) is str for value in values):
                    raise EventsError(f"{path}: {field} is not a list of texts and nulls: {remedy}")
            for field, values in (("titles", titles), *features.items()):
                if len(values) != len(ids):
                    raise EventsError(f"{path}: {field} has {len(values)} values for {len(ids)} ids: {remedy}")
            return cls(name, ids, titles, features)


# ---- events in memory


_none = functools.partial(np.zeros, 0, np.int64)


@dataclasses.dataclass
class History:
    """Events of one user, oldest first; `history[:n]` cuts every column. `History("new")` has none, which is legal.

    items int64 (catalog rows), actions int64 (ids of `config.ACTIONS`), timestamps int64 (Unix seconds), dwell float32
    (seconds, NaN: unknown), sessions int64 (0, 1, ... within the user); all (length,).
    """

    user: str
    items: np.ndarray = dataclasses.field(default_factory=_none)
    actions: np.ndarray = dataclasses.field(default_factory=_none)
    timestamps: np.ndarray = dataclasses.field(default_factory=_none)
    dwell: np.ndarray = dataclasses.field(default_factory=functools.partial(np.zeros, 0, np.float32))
    sessions: np.ndarray = dataclasses.field(default_factory=_none)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, part: slice) -> History:
        return History(
            self.user, self.items[part], self.actions[part], self.timestamps[part], self.dwell[part], self.sessions[part]
        )


@dataclasses.dataclass
class EventLog:
    """Events of U users in columns: user i's events are rows offsets[i]:offsets[i + 1] of each, oldest first.

    users: external ids in natural order ("u2" before "u10"); offsets int64 (U + 1,); the other columns (T,) as in `History`.
    `context` (T,) holds a dict or None an event, or is None where no event has one.
    """

    catalog: Catalog
    users: list[str]
    offsets: np.ndarray
    items: np.ndarray
    actions: np.ndarray
    timestamps: np.ndarray
    dwell: np.ndarray
    sessions: np.ndarray
    context: np.ndarray | None = None
    report: Report = dataclasses.field(default_factory=Report)

    def __len__(self) -> int:
        return len(self.users)

    @property
    def num_events(self) -> int:
        return len(self.items)

    @functools.cached_property
    def _rows(self) -> dict[str, int]:
        return {user: i for i, user in enumerate(self.users)}

    def index(self, user: str) -> int:
        """Position of a user's external id in `users`. Raises EventsError if there is none."""
        if user not in self._rows:
            raise EventsError(
                f"user {user!r} is unknown: the log has {len(self):,} users, {self.users[0]!r} to {self.users[-1]!r}"
                if self.users
                else f"user {user!r} is unknown: the log is empty"
            )
        return self._rows[user]

    def history(self, i: int) -> History:
        """All events of the user at position i."""
        a, b = self.offsets[i], self.offsets[i + 1]
        columns = (self.items, self.actions, self.timestamps, self.dwell, self.sessions)
        return History(self.users[i], *(column[a:b] for column in columns))

    def select(self, indices: Sequence[int]) -> EventLog:
        """A log of the users at these positions only, in this order."""
        indices = np.asarray(indices, dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(np.diff(self.offsets)[indices])])
        events = np.arange(offsets[-1]) + np.repeat(self.offsets[:-1][indices] - offsets[:-1], np.diff(offsets))
        columns = (self.items, self.actions, self.timestamps, self.dwell, self.sessions)
        context = None if self.context is None else self.context[events]
        report = Report(f"{len(indices)} users of {self.report.source}", len(events), len(events))
        users = [self.users[i] for i in indices]
        return EventLog(self.catalog, users, offsets, *(column[events] for column in columns), context, report)
