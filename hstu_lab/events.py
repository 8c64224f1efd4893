"""User events: the behaviour schema, its files, MovieLens-1M, task labels and jagged batches.

One event is one JSON object a line (JSONL, optionally gzipped) or one row of a Parquet file with the same columns:

    {"user": "u17", "session": "u17-3", "item": "i42", "action": "click", "timestamp": 1700000000, "dwell": 12.5,
     "context": {"device": "phone"}}

`user`, `item` (text or integers), `action` (one of `config.ACTIONS` but "none") and `timestamp` (Unix seconds) are required;
`session`, `dwell` (seconds, >= 0) and `context` (an object) are optional. A row that breaks a rule is rejected, counted by
reason and, if asked, written to a reject file; disorder and exact duplicates are repaired and counted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import math
import os
import pathlib
import re
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from hstu_lab.config import ACTIONS, preset
from hstu_lab.event_log import Catalog, EventLog, EventsError, History, Report, clear_errors
from hstu_lab.synthetic import World

__all__ = [
    "Catalog",
    "EventLog",
    "EventsError",
    "History",
    "Report",
    "World",
    "movielens_catalog",
    "read_events",
    "task_labels",
    "to_jagged",
    "write_events",
    "write_sample",
]

CLOCK_SKEW = 300
"""Seconds that a timestamp may lie ahead of this machine's clock."""
SESSION_GAP = 3600
"""Seconds without an event after which an event that names no session starts a new one."""
ENGAGED_DWELL = 30.0
"""Dwell seconds from which a look counts as engagement."""
LONGEST_DWELL = 10 * 365 * 86400
DAY = 86400
MOVIELENS = "movielens-1m"
MOVIELENS_ROWS = 3953
RATING_ACTIONS = {1: "impression", 2: "impression", 3: "click", 4: "like", 5: "purchase"}
EVENT_ACTIONS = ACTIONS[1:]
COLUMNS = ("user", "session", "item", "action", "timestamp", "dwell", "context")
LONGEST_ID = 200

REMEDIES = {
    "unreadable JSON": "write one JSON object a line",
    "not an object": "write one JSON object a line",
    "missing": "give a value",
    "not an identifier": f"give text of 1 to {LONGEST_ID} characters, or an integer",
    "empty": "give the identifier",
    "unknown action": f"use one of {', '.join(EVENT_ACTIONS)}",
    "not a number": "give seconds as a number",
    "NaN or infinite": "give seconds as a finite number",
    "negative": "give seconds from 0 up",
    "in the future": "give Unix seconds in UTC, or set this machine's clock",
    "in the future, looks like milliseconds": "divide by 1000: Unix seconds are wanted",
    "longer than ten years": "give seconds, not milliseconds",
    "unknown item": (
        "use an item of the catalog; a checkpoint knows the items of the log it was trained on, "
        "`python -m hstu_lab train --events FILE` makes one for another"
    ),
    "unknown user": "add the user to users.dat",
    "not UserID::MovieID::Rating::Timestamp": "restore the line from the official file",
    "not a rating from 1 to 5": "restore the line from the official file",
}
"""What can be wrong with a row, and what to do about it."""


class _BadRow(Exception):
    def __init__(self, field: str, reason: str):
        super().__init__(field, reason)
        self.field, self.reason = field, reason


# ---- files


def read_events(
    path: str | os.PathLike,
    catalog: Catalog | None = None,
    *,
    reject_file: str | os.PathLike | None = None,
    on_bad: str = "reject",
    now: float | None = None,
    seed: int = 0,
    progress: bool = False,
) -> EventLog:
    """Read a .jsonl, .jsonl.gz or .parquet file of events, or MovieLens-1M's official folder or zip.

    catalog: the items that exist; events of other items are rejected. Without one, the file's own items make the catalog.
    reject_file: JSONL of the bad rows (file, row, field, reason, remedy, text); made only if there are any.
    on_bad: "reject" counts bad rows and goes on, "raise" stops at the first. now: Unix seconds that the future starts at.

    Repairs, counted in `log.report`: fractions of a second are cut off, a user's events out of time order are sorted, and an
    event equal to another in user, item, action, timestamp and dwell is dropped. Events of one user in the same second are put
    in a random order fixed by `seed`: a file's own order may be the same for all users and so give away what comes next
    (MovieLens-1M's does). An event that names no session belongs to the session before it unless more than `SESSION_GAP`
    seconds have passed.

    Raises EventsError where the file cannot be read or no row of it survives.
    """
    if on_bad not in ("reject", "raise"):
        raise ValueError(f"on_bad is {on_bad!r}: use 'reject' or 'raise'")
    path = pathlib.Path(path)
    if not path.exists():
        raise EventsError(f"{path}: no such file: check the path")
    latest = min((time.time() if now is None else now) + CLOCK_SKEW, 2.0**53)
    rejects = _Rejects(path, reject_file, on_bad)
    if path.is_dir() or path.suffix == ".zip":
        return _read_movielens(path, catalog, rejects, latest, seed)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        rows = _jsonl_rows(path, rejects)
    elif path.suffix == ".parquet":
        rows = _parquet_rows(path, rejects)
    else:
        raise EventsError(f"{path}: of unknown kind: give a .jsonl, .jsonl.gz or .parquet file or MovieLens-1M's folder or zip")
    known = None if catalog is None else catalog.rows
    events, fractions = [], 0
    for number, row, text in tqdm(rows, desc=f"reading {path.name}", unit=" events", disable=not progress):
        try:
            events.append(_check_row(row, known, latest))
            fractions += row["timestamp"] % 1 != 0
        except _BadRow as bad:
            rejects.add(number, bad.field, bad.reason, text)
    report = rejects.report(len(events))
    report.repaired = {"fractions of a second, cut off": fractions} if fractions else {}
    columns = list(zip(*events))
    if catalog is None:
        ids = sorted(set(columns[2]), key=natural_order)
        catalog = Catalog(path.name.split(".")[0], [None, *ids], [None] * (len(ids) + 1))
    return _to_log(catalog, columns, report, seed)


class _Rejects:
    """Counts bad rows by reason and keeps their text for the reject file."""

    def __init__(self, path: pathlib.Path, reject_file: str | os.PathLike | None, on_bad: str):
        self.path, self.stop = path, on_bad == "raise"
        self.file = None if reject_file is None else pathlib.Path(reject_file)
        if self.file is not None and self.file.exists() and path.exists() and self.file.samefile(path):
            raise EventsError(f"{path}: the reject file is the file itself: give another name")
        self.rows: list[tuple[int, str, str, str]] = []

    def add(self, row: int, field: str, reason: str, source: bytes | dict) -> None:
        """Reject a row; `source` is its line, or its fields where the file has no lines."""
        if self.stop:
            raise EventsError(f"{self.path}: row {row:,}, field {field!r}: {reason}; {REMEDIES[reason]}")
        text = source.decode("utf-8", "backslashreplace") if type(source) is bytes else json.dumps(source, default=str)
        self.rows.append((row, field, reason, text))

    def report(self, kept: int) -> Report:
        """Write the reject file and sum up. Raises EventsError where nothing was kept."""
        reject_file = None
        if self.rows and self.file is not None:
            self.rows.sort()
            with clear_errors(self.file, "give another reject file", "written"):
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with open(self.file, "w", encoding="utf-8") as file:
                    for row, field, reason, text in self.rows:
                        line = {"file": str(self.path), "row": row, "field": field, "reason": reason}
                        file.write(json.dumps({**line, "remedy": REMEDIES[reason], "text": text.rstrip("\r\n")}) + "\n")
            reject_file = str(self.file)
        if not kept:
            if not self.rows:
                raise EventsError(f"{self.path}: has no events: give a file with at least one row")
            row, field, reason, _ = self.rows[0]
            raise EventsError(
                f"{self.path}: none of {len(self.rows):,} rows can be used; the first is row {row:,}, field {field!r}: {reason}; "
                f"{REMEDIES[reason]}"
            )
        counts = Counter(f"{field}: {reason}" for _, field, reason, _ in self.rows)
        return Report(str(self.path), kept + len(self.rows), kept, dict(counts), {}, reject_file)


def _jsonl_rows(path: pathlib.Path, rejects: _Rejects) -> Iterator[tuple[int, Any, bytes]]:
    """(line number, parsed line, line) of every line that is JSON; blank lines do not count."""
    with (
        clear_errors(path, "it may be truncated; restore it"),
        (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file,
    ):
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                row = json.loads(str(line, "utf-8"))
            except (ValueError, RecursionError):
                rejects.add(number, "row", "unreadable JSON", line)
                continue
            yield number, row, line


def _parquet_rows(path: pathlib.Path, rejects: _Rejects) -> Iterator[tuple[int, dict, dict]]:
    """(row number, row, row) of every row; a context may be a JSON string."""
    import pyarrow.parquet as pq

    number = 0
    with clear_errors(path, "it may be damaged; restore it"), pq.ParquetFile(path, page_checksum_verification=True) as file:
        names = file.schema_arrow.names
        for field in ("user", "item", "action", "timestamp"):
            if field not in names:
                raise EventsError(f"{path}: column {field!r} is missing among {', '.join(names)[:200]}: rename or add it")
        for batch in file.iter_batches(columns=[field for field in COLUMNS if field in names]):
            for row in batch.to_pylist():
                number += 1
                context = row.get("context")
                if isinstance(context, str):
                    try:
                        row["context"] = json.loads(context)
                    except (ValueError, RecursionError):
                        rejects.add(number, "context", "unreadable JSON", row)
                        continue
                yield number, row, row


def _check_row(row: Any, known: dict[str, int] | None, latest: float) -> tuple:
    """A row's values in the order of `COLUMNS`, or _BadRow."""
    if type(row) is not dict:
        raise _BadRow("row", "not an object")
    get = row.get
    user, session, item = _identifier(get("user"), "user"), get("session"), _identifier(get("item"), "item")
    if session is not None:
        session = _identifier(session, "session", 2 * LONGEST_ID)
    action, dwell, context = get("action"), get("dwell"), get("context")
    if action is None:
        raise _BadRow("action", "missing")
    if type(action) is not str or action not in _ACTION_IDS:
        raise _BadRow("action", "unknown action")
    timestamp = _seconds(get("timestamp"), "timestamp")
    if timestamp > latest:
        milliseconds = 1e11 <= timestamp <= latest * 1000
        raise _BadRow("timestamp", "in the future, looks like milliseconds" if milliseconds else "in the future")
    if dwell is None:
        dwell = math.nan
    elif (dwell := _seconds(dwell, "dwell")) > LONGEST_DWELL:
        raise _BadRow("dwell", "longer than ten years")
    if context is not None and type(context) is not dict:
        raise _BadRow("context", "not an object")
    if known is not None and item not in known:
        raise _BadRow("item", "unknown item")
    return user, session, item, _ACTION_IDS[action], int(timestamp), dwell, context


def _identifier(value: Any, field: str, longest: int = LONGEST_ID) -> str:
    if value is None:
        raise _BadRow(field, "missing")
    if type(value) is int and value.bit_length() <= 64:
        value = str(value)
    if type(value) is not str or len(value) > longest or not _encodes(value):
        raise _BadRow(field, "not an identifier")
    if not value.strip():
        raise _BadRow(field, "empty")
    return value


def _encodes(text: str) -> bool:
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _seconds(value: Any, field: str) -> float:
    if value is None:
        raise _BadRow(field, "missing")
    if type(value) is not int and type(value) is not float:
        raise _BadRow(field, "not a number")
    if value != value or value in (math.inf, -math.inf):
        raise _BadRow(field, "NaN or infinite")
    if value < 0:
        raise _BadRow(field, "negative")
    return value


def natural_order(id: str) -> tuple:
    """Sort key under which "u2" comes before "u10"."""
    parts = re.split(r"([0-9]+)", id)
    parts[1::2] = map(int, parts[1::2])
    return parts, id


_ACTION_IDS = {action: i for i, action in enumerate(ACTIONS) if i}


def _codes(values: Iterable[str], order: Iterable[str]) -> np.ndarray:
    index = {value: i for i, value in enumerate(order)}
    return np.fromiter((index[value] for value in values), dtype=np.int64)


def _to_log(catalog: Catalog, columns: Sequence[Sequence], report: Report, seed: int) -> EventLog:
    """Columns in the order of `COLUMNS`, any row order -> a log: sorted, without duplicates, sessions numbered."""
    user, session, item, action, timestamp, dwell, context = columns
    users = sorted(set(user), key=natural_order)
    names = sorted({name for name in session if name is not None})
    contexts = None
    if any(context):
        contexts = np.empty(len(user), dtype=object)
        contexts[:] = context
    return _sort(
        catalog, users, _codes(user, users), _codes(item, [id or "" for id in catalog.ids]), np.array(action, dtype=np.int64),
        np.array(timestamp, dtype=np.int64), np.array(dwell, dtype=np.float32), _codes(session, [None, *names]) - 1, contexts,
        report, seed,
    )  # fmt: skip


def _sort(catalog, users, user, item, action, timestamp, dwell, session, context, report: Report, seed: int) -> EventLog:
    """Coded columns (T,) -> a log. user indexes `users`, item is a catalog row, session -1 where the event names none."""
    by_user = np.argsort(user, kind="stable")
    late = (np.diff(user[by_user]) == 0) & (np.diff(timestamp[by_user]) < 0)
    ties = _hashes(users)[user] ^ _hashes([id or "" for id in catalog.ids])[item]
    ties = _scramble(ties + np.uint64(seed % 2**64))
    columns = [user, timestamp, ties, item, action, dwell, session]
    order = np.lexsort(columns[::-1])
    columns = [column[order] for column in columns]
    same = np.ones(len(order) - 1, dtype=bool)
    for column in columns[:-1]:
        same &= (column[1:] == column[:-1]) | ((column[1:] != column[1:]) & (column[:-1] != column[:-1]))
    first = np.concatenate([[True], ~same])
    user, timestamp, _, item, action, dwell, session = (column[first] for column in columns)
    repairs = report.repaired | {"out of time order, sorted": int(late.sum()), "exact duplicates, dropped": int(same.sum())}
    report = dataclasses.replace(report, kept=len(user), repaired={reason: n for reason, n in repairs.items() if n})
    offsets = np.searchsorted(user, np.arange(len(users) + 1))
    context = None if context is None else context[order][first]
    return EventLog(
        catalog, users, offsets, item, action, timestamp, dwell, _number_sessions(offsets, timestamp, session), context, report
    )


def _hashes(ids: Sequence[str]) -> np.ndarray:
    """A hash of each id that does not depend on the file around it."""
    return _scramble(np.array([zlib.crc32(id.encode()) for id in ids], dtype=np.uint64))


def _scramble(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function on uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _number_sessions(offsets: np.ndarray, timestamp: np.ndarray, session: np.ndarray) -> np.ndarray:
    """Sessions 0, 1, ... of each user: a new one starts where the name changes, or after a gap where a name is missing."""
    named = (session[1:] >= 0) & (session[:-1] >= 0)
    starts = np.where(named, session[1:] != session[:-1], np.diff(timestamp) > SESSION_GAP)
    running = np.concatenate([[0], np.cumsum(starts)])
    return running - np.repeat(running[offsets[:-1]], np.diff(offsets))


def write_events(log: EventLog, path: str | os.PathLike) -> None:
    """Write a log as .jsonl, .jsonl.gz or .parquet in the schema above; `read_events` gives the same log back."""
    path = pathlib.Path(path)
    user = [log.users[i] for i in np.repeat(np.arange(len(log)), np.diff(log.offsets))]
    session = [f"{name}-{number}" for name, number in zip(user, log.sessions.tolist())]
    item = [log.catalog.ids[row] for row in log.items.tolist()]
    action = [ACTIONS[i] for i in log.actions.tolist()]
    dwell = [None if value == "nan" else float(value) for value in log.dwell.astype(str).tolist()]
    context = [None] * len(user) if log.context is None else log.context.tolist()
    columns = (user, session, item, action, log.timestamps.tolist(), dwell, context)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        with clear_errors(path, "give another path", "written"), open(path, "wb") as raw:
            # mtime 0: the same log gives the same bytes.
            file = gzip.GzipFile("", "wb", 9, raw, mtime=0) if path.suffix == ".gz" else raw
            for row in zip(*columns):
                fields = {name: value for name, value in zip(COLUMNS, row) if value is not None}
                file.write((json.dumps(fields) + "\n").encode())
            if file is not raw:
                file.close()
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        texts = [None if value is None else json.dumps(value) for value in context]
        types = (*[pa.string()] * 4, pa.int64(), pa.float64(), pa.string())
        arrays = [pa.array(values, type) for values, type in zip((*columns[:-1], texts), types)]
        with clear_errors(path, "give another path", "written"):
            pq.write_table(pa.table(dict(zip(COLUMNS, arrays))), path, compression="zstd", write_page_checksum=True)
    else:
        raise EventsError(f"{path}: of unknown kind: use .jsonl, .jsonl.gz or .parquet")


def write_sample(path: str | os.PathLike, preset_name: str = "small", num_users: int = 200) -> EventLog:
    """Write and return the first users of the log that checkpoints of the synthetic world are trained on by default.

    The shipped sample: python -c "from hstu_lab import events; events.write_sample('data/sample/events.jsonl.gz')"
    """
    log = World(preset(preset_name)).generate()
    sample = log.select(range(min(num_users, len(log))))
    write_events(sample, path)
    return sample


# ---- MovieLens-1M


_RATING = re.compile(rb"[0-9]{1,18}::[0-9]{1,18}::[0-9]{1,18}::[0-9]{1,18}").fullmatch
_FILM = re.compile(rb"([0-9]{1,7})::(.*)::([^:]*)").fullmatch


def _read_movielens(path: pathlib.Path, catalog: Catalog | None, rejects: _Rejects, latest: float, seed: int) -> EventLog:
    files = _movielens_files(path)
    catalog = movielens_catalog(path, files) if catalog is None else catalog
    lines = files["ratings.dat"].splitlines()
    numbers = np.array([number for number, line in enumerate(lines) if _RATING(line)], dtype=np.int64)
    if len(numbers) < len(lines):
        for number, line in enumerate(lines):
            if line.strip() and not _RATING(line):
                rejects.add(number + 1, "row", "not UserID::MovieID::Rating::Timestamp", line)
        lines = [lines[number] for number in numbers]
    numerals = b"\n".join(lines).replace(b"::", b" ")
    values = np.fromstring(numerals, dtype=np.int64, sep=" ").reshape(-1, 4) if lines else np.zeros((0, 4), dtype=np.int64)

    ids, codes = np.unique(values[:, 1], return_inverse=True)
    items = np.array([catalog.row(str(id)) for id in ids.tolist()], dtype=np.int64)[codes]
    users = np.array(re.findall(rb"^[0-9]{1,18}(?=::)", files["users.dat"], re.MULTILINE), dtype="S18").astype(np.int64)
    checks = (
        ("user", "unknown user", ~np.isin(values[:, 0], users)),
        ("item", "unknown item", items == 0),
        ("action", "not a rating from 1 to 5", (values[:, 2] < 1) | (values[:, 2] > 5)),
        ("timestamp", "in the future", values[:, 3] > latest),
    )
    broken = np.stack([bad for _, _, bad in checks])
    good = ~broken.any(0)
    for event in np.flatnonzero(~good):
        field, reason, _ = checks[broken[:, event].argmax()]
        rejects.add(int(numbers[event]) + 1, field, reason, lines[event])
    report = rejects.report(int(good.sum()))
    values, items = values[good], items[good]
    ids, user = np.unique(values[:, 0], return_inverse=True)
    users = [str(id) for id in ids.tolist()]
    actions = np.array([0, *(_ACTION_IDS[RATING_ACTIONS[rating]] for rating in range(1, 6))])[values[:, 2]]
    dwell, session = np.full(len(items), np.nan, dtype=np.float32), np.full(len(items), -1)
    return _sort(catalog, users, user, items, actions, values[:, 3], dwell, session, None, report, seed)


def _movielens_files(path: pathlib.Path) -> dict[str, bytes]:
    """Contents of ratings.dat, movies.dat and users.dat in a zip, or in a folder or the folders in it."""
    remedy = "it may be truncated; download MovieLens-1M again"
    names, contents = ("ratings.dat", "movies.dat", "users.dat"), {}
    with clear_errors(path, remedy), contextlib.ExitStack() as stack:
        archive = None if path.is_dir() else stack.enter_context(zipfile.ZipFile(path))
        members = [str(p) for depth in ("*.dat", "*/*.dat") for p in path.glob(depth)] if archive is None else archive.namelist()
        for name in names:
            found = [member for member in members if pathlib.PurePath(member).name == name]
            if not found:
                raise EventsError(f"{path}: has no {name}: give MovieLens-1M's official folder or zip")
            contents[name] = pathlib.Path(found[0]).read_bytes() if archive is None else archive.read(found[0])
    return contents


def movielens_catalog(path: str | os.PathLike, files: dict[str, bytes] | None = None) -> Catalog:
    """MovieLens-1M's films: the row is the official MovieID (3,953 rows, 3,883 films), `category` the first genre."""
    path = pathlib.Path(path)
    lines = (files or _movielens_files(path))["movies.dat"].splitlines()
    films = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        match = _FILM(line)
        if match is None or not int(match[1]):
            raise EventsError(f"{path}: movies.dat row {number}: not MovieID::Title::Genres; restore the official file")
        films.append((int(match[1]), match[2].decode("latin-1"), match[3].decode("latin-1").split("|")[0]))
    rows = max([MOVIELENS_ROWS, *(film + 1 for film, _, _ in films)])
    ids: list[str | None] = [None] * rows
    titles: list[str | None] = [None] * rows
    genres = sorted({genre for _, _, genre in films})
    category = np.zeros(rows, dtype=np.int64)
    for film, title, genre in films:
        ids[film], titles[film], category[film] = str(film), title, genres.index(genre) + 1
    return Catalog(MOVIELENS, ids, titles, {"category": category})


# ---- labels and batches


def task_labels(log: EventLog) -> np.ndarray:
    """float32 (T, 3): engagement, retention and monetization of every event, NaN where the log cannot tell.

    Engagement: a click, like, share or purchase, or a dwell of `ENGAGED_DWELL` seconds; 0 for a mere look. Retention: the
    user's next session starts within a day of this session's end; NaN in the last session. Monetization: a purchase.
    MovieLens has ratings only, so stand-ins are used: engagement is a rating of 4 or 5, monetization a rating of 5, and
    retention another session (more than an hour later) within seven days.
    """
    films = log.catalog.name == MOVIELENS
    engaging = ("like", "purchase") if films else ("click", "like", "share", "purchase")
    engaged = np.isin(log.actions, [_ACTION_IDS[action] for action in engaging])
    if not films:
        engaged |= log.dwell >= ENGAGED_DWELL  # NaN compares false
    bought = log.actions == _ACTION_IDS["purchase"]

    user = np.repeat(np.arange(len(log)), np.diff(log.offsets))
    ends = np.flatnonzero(np.diff(user, append=-1).astype(bool) | np.diff(log.sessions, append=-1).astype(bool))
    next_start = np.append(ends[:-1] + 1, 0) if len(ends) else ends
    gap = (log.timestamps[next_start] - log.timestamps[ends]).astype(np.float32)
    returned = np.where(user[next_start] == user[ends], gap <= (7 if films else 1) * DAY, np.nan)
    if len(returned):
        returned[-1] = np.nan
    retention = np.repeat(returned, np.diff(ends, prepend=-1))
    return np.stack([engaged, retention, bought], axis=1).astype(np.float32)


def to_jagged(log: EventLog, user_indices: Sequence[int]):
    """TorchRec `KeyedJaggedTensor` of those users' events: keys item, action and timestamp, int64, one list a user each."""
    import torch  # here, because reading events needs no PyTorch and TorchRec takes seconds to import
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    part = log.select(user_indices)
    values = np.concatenate([part.items, part.actions, part.timestamps])
    lengths = np.tile(np.diff(part.offsets), 3)
    keys = ["item", "action", "timestamp"]
    return KeyedJaggedTensor(keys=keys, values=torch.from_numpy(values), lengths=torch.from_numpy(lengths))
