"""Events are read back as written, whatever their order; what is broken is named, counted and set aside, never a traceback."""

import gzip
import json
import random
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hstu_lab.config import ACTIONS, preset
from hstu_lab.event_log import Catalog, EventLog, EventsError, History
from hstu_lab.events import ENGAGED_DWELL, MOVIELENS, SESSION_GAP, read_events, task_labels, to_jagged, write_events
from hstu_lab.events import World as ReexportedWorld
from hstu_lab.synthetic import World

NOW = 1_700_000_000
ROW = {"user": "u1", "item": "i1", "action": "click", "timestamp": 1000}
COLUMNS = ("offsets", "items", "actions", "timestamps", "dwell", "sessions")
IDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6).filter(str.strip)
USERS = ["ada", "u" * 200, "u2", "u10", "ü\n☃"]
ROWS = st.fixed_dictionaries(
    {
        "user": st.sampled_from(USERS),
        "item": IDS | st.integers(-5, 10**12),
        "action": st.sampled_from(ACTIONS[1:]),
        "timestamp": st.integers(0, 40) | st.floats(0, NOW, allow_nan=False),
    },
    optional={
        "session": st.sampled_from(["s1", "s2", "s10"]) | st.none(),
        "dwell": st.floats(0, 1e4, width=32) | st.none(),
        "context": st.dictionaries(st.sampled_from(["device", "\ud800"]), st.integers() | IDS, max_size=2),
    },
)
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write_lines(path, rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def read_rows(tmp_path, rows, **options):
    return read_events(write_lines(tmp_path / "log.jsonl", rows), now=NOW, **options)


def assert_same(a: EventLog, b: EventLog):
    assert a.users == b.users
    assert [a.catalog.ids[i] for i in a.items] == [b.catalog.ids[i] for i in b.items]
    for name in COLUMNS:
        if name != "items":
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


# ---- what is good comes back


@pytest.mark.parametrize("name", ["again.jsonl", "again.jsonl.gz", "again.parquet"])
@given(rows=st.lists(ROWS, min_size=1, max_size=30))
@quick
def test_a_written_log_reads_back_the_same(tmp_path, name, rows):
    log = read_rows(tmp_path, rows)
    write_events(log, tmp_path / name)
    again = read_events(tmp_path / name, log.catalog, now=NOW)
    assert_same(log, again)
    assert log.report.kept == again.report.rows == again.report.kept
    contexts = [None] * log.num_events if log.context is None else [context or None for context in log.context]
    back = [None] * log.num_events if again.context is None else [context or None for context in again.context]
    assert contexts == back


@given(rows=st.lists(ROWS, min_size=1, max_size=30), seed=st.integers(0, 9))
@quick
def test_the_order_of_rows_does_not_matter(tmp_path, rows, seed):
    shuffled = random.Random(seed).sample(rows, len(rows))
    a, b = read_rows(tmp_path, rows, seed=seed), read_rows(tmp_path, shuffled, seed=seed)
    assert_same(a, b)
    assert a.catalog.ids == b.catalog.ids
    for i in range(len(a)):
        assert (np.diff(a.history(i).timestamps) >= 0).all()


@given(rows=st.lists(ROWS, min_size=1, max_size=20, unique_by=lambda row: (row["user"], str(row["item"]))), data=st.data())
@quick
def test_exact_duplicates_are_dropped_and_counted(tmp_path, rows, data):
    extra = data.draw(st.lists(st.sampled_from(rows), max_size=10))
    log = read_rows(tmp_path, rows + extra)
    assert_same(log, read_rows(tmp_path, rows))
    assert log.report.repaired.get("exact duplicates, dropped", 0) == len(extra)
    assert (log.report.rows, log.report.kept) == (len(rows) + len(extra), len(rows))


def test_unsorted_events_are_sorted_and_counted(tmp_path):
    times = [50, 10, 20, 15]
    log = read_rows(tmp_path, [{**ROW, "item": f"i{t}", "timestamp": t} for t in times])
    assert log.timestamps.tolist() == sorted(times)
    assert [log.catalog.ids[i] for i in log.items] == ["i10", "i15", "i20", "i50"]
    assert log.report.repaired == {"out of time order, sorted": 2}
    assert str(log.report) == f"{tmp_path / 'log.jsonl'}: 4 rows, 4 kept; repaired: 2 out of time order, sorted"


def test_fields_land_in_their_columns(tmp_path):
    rows = [
        {"user": "u10", "session": "a", "item": 7, "action": "purchase", "timestamp": 20.9, "dwell": 1.5, "context": {"d": 1}},
        {"user": "u2", "item": "i3", "action": "impression", "timestamp": 5, "dwell": None},
    ]
    log = read_rows(tmp_path, rows)
    assert log.users == ["u2", "u10"]
    assert log.catalog.ids == [None, "7", "i3"]
    assert log.catalog.name == "log"
    u10 = log.history(log.index("u10"))
    assert (u10.user, u10.items.tolist(), u10.timestamps.tolist(), u10.dwell.tolist()) == ("u10", [1], [20], [1.5])
    assert [ACTIONS[a] for a in log.actions] == ["impression", "purchase"]
    assert np.isnan(log.dwell[0])
    assert log.context.tolist() == [None, {"d": 1}]


def test_sessions_are_numbered_by_name_and_by_gap(tmp_path):
    named = [{**ROW, "item": f"i{i}", "timestamp": i, "session": name} for i, name in enumerate("aabba")]
    assert read_rows(tmp_path, named).sessions.tolist() == [0, 0, 1, 1, 2]
    gaps = [{**ROW, "timestamp": t} for t in (0, SESSION_GAP, 2 * SESSION_GAP + 1, 2 * SESSION_GAP + 2)]
    assert read_rows(tmp_path, gaps).sessions.tolist() == [0, 0, 1, 1]
    users = [{**ROW, "user": user, "timestamp": t} for user in "vw" for t in (0, 9999)]
    assert read_rows(tmp_path, users).sessions.tolist() == [0, 1, 0, 1]


def test_byte_order_mark_windows_lines_and_blank_lines_are_fine(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [json.dumps(ROW), "", json.dumps({**ROW, "timestamp": 2000}), "   "]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    log = read_events(path)
    assert log.timestamps.tolist() == [1000, 2000]
    assert (log.report.rows, log.report.rejected) == (2, {})


def test_a_history_of_100_000_events_loads(tmp_path):
    log = read_rows(tmp_path, [{**ROW, "timestamp": t} for t in range(100_000)])
    assert len(log) == 1
    assert len(log.history(0)) == 100_000


# ---- ties


def tied_rows(users=400):
    return [{**ROW, "user": f"u{u}", "item": item} for u in range(users) for item in ("first", "second")]


def test_ties_of_time_are_broken_at_random_but_by_the_seed(tmp_path):
    def first(seed):
        log = read_rows(tmp_path, tied_rows(), seed=seed)
        return np.array([log.catalog.ids[i] == "first" for i in log.items[log.offsets[:-1]]])

    assert 0.4 < first(0).mean() < 0.6  # the file's order would give 1.0
    np.testing.assert_array_equal(first(0), first(0))
    assert 0.4 < (first(0) == first(1)).mean() < 0.6


def test_ties_do_not_depend_on_who_else_is_in_the_file(tmp_path):
    everybody, few = read_rows(tmp_path, tied_rows()), read_rows(tmp_path, tied_rows(50))
    assert_same(everybody.select([everybody.index(user) for user in few.users]), few)


def test_fractions_of_a_second_are_cut_off_and_counted(tmp_path):
    times = (1000.2, 1000.9, 1001.0, 1002)
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"user": "u1", "item": "i1", "action": "click", "timestamp": t}) + "\n" for t in times))
    log = read_events(path)
    assert log.timestamps.tolist() == [1000, 1001, 1002]
    assert log.report.repaired == {"fractions of a second, cut off": 2, "exact duplicates, dropped": 1}


def test_what_cannot_be_written_or_lacks_a_field_is_said(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"user": "u1", "item": "i1", "action": "click", "timestamp": 5}\n{}\n')
    (tmp_path / "file").write_text("")
    with pytest.raises(EventsError, match=r"cannot be written .* give another reject file"):
        read_events(path, reject_file=tmp_path / "file" / "rejects.jsonl")
    (tmp_path / "catalog.json").write_text('{"schema_version": 1, "name": "x", "ids": [null], "titles": [null]}')
    with pytest.raises(EventsError, match="features is missing"):
        Catalog.load(tmp_path / "catalog.json")


# ---- what is bad is named, counted, set aside


BAD = [
    ({"user": None}, "user", "missing"),
    ({"user": ""}, "user", "empty"),
    ({"user": " \t"}, "user", "empty"),
    ({"user": ["u1"]}, "user", "not an identifier"),
    ({"user": True}, "user", "not an identifier"),
    ({"user": 1.5}, "user", "not an identifier"),
    ({"user": "u" * 201}, "user", "not an identifier"),
    ({"user": "\ud800"}, "user", "not an identifier"),
    ({"user": 10**30}, "user", "not an identifier"),
    ({"item": None}, "item", "missing"),
    ({"item": {"id": 3}}, "item", "not an identifier"),
    ({"item": ""}, "item", "empty"),
    ({"session": ""}, "session", "empty"),
    ({"session": [1]}, "session", "not an identifier"),
    ({"action": None}, "action", "missing"),
    ({"action": "clicked"}, "action", "unknown action"),
    ({"action": "none"}, "action", "unknown action"),
    ({"action": ["click"]}, "action", "unknown action"),
    ({"action": 2}, "action", "unknown action"),
    ({"timestamp": None}, "timestamp", "missing"),
    ({"timestamp": True}, "timestamp", "not a number"),
    ({"timestamp": "1000"}, "timestamp", "not a number"),
    ({"timestamp": float("nan")}, "timestamp", "NaN or infinite"),
    ({"timestamp": float("inf")}, "timestamp", "NaN or infinite"),
    ({"timestamp": -1}, "timestamp", "negative"),
    ({"timestamp": -0.5}, "timestamp", "negative"),
    ({"timestamp": NOW + 301}, "timestamp", "in the future"),
    ({"timestamp": 10**40}, "timestamp", "in the future"),
    ({"timestamp": 1_690_000_000_000}, "timestamp", "in the future, looks like milliseconds"),
    ({"dwell": -0.1}, "dwell", "negative"),
    ({"dwell": float("nan")}, "dwell", "NaN or infinite"),
    ({"dwell": "12"}, "dwell", "not a number"),
    ({"dwell": False}, "dwell", "not a number"),
    ({"dwell": 1e39}, "dwell", "longer than ten years"),
    ({"context": "phone"}, "context", "not an object"),
    ("[1, 2]", "row", "not an object"),
    ("null", "row", "not an object"),
    ("{'user': 1}", "row", "unreadable JSON"),
    ('{"user": "u1"', "row", "unreadable JSON"),
    ("[" * 100_000, "row", "unreadable JSON"),
    ('{"timestamp": ' + "9" * 5000 + "}", "row", "unreadable JSON"),
]


@pytest.mark.parametrize(("change", "field", "reason"), BAD, ids=[f"{f}-{r}-{i}" for i, (_, f, r) in enumerate(BAD)])
def test_a_bad_row_is_counted_and_the_good_ones_go_on(tmp_path, change, field, reason):
    bad = change if isinstance(change, str) else {**ROW, **change}
    rejects = tmp_path / "rejects" / "bad.jsonl"
    log = read_rows(tmp_path, [ROW, bad, {**ROW, "timestamp": 2000}], reject_file=rejects)
    assert log.timestamps.tolist() == [1000, 2000]
    assert log.report.rejected == {f"{field}: {reason}": 1}
    assert (log.report.rows, log.report.kept, log.report.reject_file) == (3, 2, str(rejects))
    [line] = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert (line["file"], line["row"], line["field"], line["reason"]) == (str(tmp_path / "log.jsonl"), 2, field, reason)
    assert line["text"] == (bad if isinstance(bad, str) else json.dumps(bad))
    assert line["remedy"]
    assert f"1 rejected (1 {field}: {reason}) -> {rejects}" in str(log.report)

    with pytest.raises(EventsError, match=f"row 2, field '{field}': {reason}; ") as raised:
        read_rows(tmp_path, [ROW, bad], on_bad="raise")
    assert "\n" not in str(raised.value)
    with pytest.raises(EventsError, match=f"none of 1 rows can be used; the first is row 1, field '{field}': {reason}"):
        read_rows(tmp_path, [bad])


@pytest.mark.parametrize("field", ["user", "item", "action", "timestamp"])
def test_a_missing_field_is_a_bad_row(tmp_path, field):
    partial = {name: value for name, value in ROW.items() if name != field}
    assert read_rows(tmp_path, [ROW, partial]).report.rejected == {f"{field}: missing": 1}


def test_items_outside_the_catalog_are_bad_rows(tmp_path):
    catalog = Catalog("shop", [None, "i9", None, "i1"], [None] * 4)
    log = read_rows(tmp_path, [ROW, {**ROW, "item": "i2"}, {**ROW, "item": "i9"}], catalog=catalog)
    assert sorted(log.items.tolist()) == [1, 3]
    assert log.catalog is catalog
    assert log.report.rejected == {"item: unknown item": 1}


def test_now_is_this_machine_s_clock(tmp_path):
    path = write_lines(tmp_path / "log.jsonl", [ROW, {**ROW, "timestamp": 40_000_000_000}])
    assert read_events(path).report.rejected == {"timestamp: in the future": 1}


def test_no_reject_file_without_bad_rows_and_none_over_the_events(tmp_path):
    log = read_rows(tmp_path, [ROW], reject_file=tmp_path / "bad.jsonl")
    assert log.report.reject_file is None
    assert not (tmp_path / "bad.jsonl").exists()
    with pytest.raises(EventsError, match="the reject file is the file itself"):
        read_rows(tmp_path, [ROW, "?"], reject_file=tmp_path / "log.jsonl")
    with pytest.raises(EventsError, match="cannot be written"):
        read_rows(tmp_path, [ROW, "?"], reject_file=tmp_path / "log.jsonl" / "bad.jsonl")


def good_parquet(path, **changes):
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"user": ["u1", "u2"], "item": ["i1", "i2"], "action": ["click", "like"], "timestamp": [10, 20], **changes}
    pq.write_table(pa.table({name: values for name, values in columns.items() if values is not None}), path)
    return path


def test_parquet_rows_are_checked_like_lines(tmp_path):
    path = good_parquet(tmp_path / "log.parquet", timestamp=[10, -1], context=['{"device": "tv"}', None])
    log = read_events(path, reject_file=tmp_path / "bad.jsonl")
    assert log.report.rejected == {"timestamp: negative": 1}
    assert log.context.tolist() == [{"device": "tv"}]
    assert json.loads(json.loads((tmp_path / "bad.jsonl").read_text())["text"])["timestamp"] == -1
    broken = good_parquet(tmp_path / "context.parquet", context=["{", None])
    assert read_events(broken).report.rejected == {"context: unreadable JSON": 1}


# ---- files that cannot be read


def tiny_movielens(path, ratings=None, movies=None, users=None):
    """MovieLens-1M's layout with made-up contents, as a zip or a folder."""
    movies = movies or "1::Été (1995)::Comedy|Drama\n3::Night Train: A Film (1996)::Action\n3952::Last (2000)::Drama\n"
    users = users or "1::F::1::10::48067\n2::M::56::16::70072\n"
    ratings = ratings or "2::1::5::300\n1::3952::3::100\n1::1::2::50\n1::3::4::200\n2::3::1::301\n"
    for name, text in (("ratings.dat", ratings), ("movies.dat", movies), ("users.dat", users)):
        if path.suffix == ".zip":
            with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr(f"ml-1m/{name}", text.encode("latin-1"))
        else:
            path.mkdir(exist_ok=True)
            (path / name).write_bytes(text.encode("latin-1"))
    return path


def cut(path, share=0.6):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def zip_without_ratings(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ml-1m/movies.dat", "1::A (1995)::Comedy\n")
    return path


def folder_without_ratings(path):
    path.mkdir()
    return path


UNREADABLE = {
    "no such file": ("log.jsonl", lambda path: path, "no such file"),
    "no such folder": ("ml-1m", lambda path: path, "no such file"),
    "empty": ("log.jsonl", lambda path: write_lines(path, []), "has no events"),
    "empty gzip": ("log.jsonl.gz", lambda path: write_lines(path, []), "has no events"),
    "binary": ("log.jsonl", lambda path: path.write_bytes(bytes(range(256)) * 40), "unreadable JSON"),
    "UTF-16": ("log.jsonl", lambda path: path.write_text(json.dumps(ROW), encoding="utf-16"), "unreadable JSON"),
    "of unknown kind": ("log.csv", lambda path: path.write_text("user,item\n"), "of unknown kind"),
    "not gzip": ("log.jsonl.gz", lambda path: path.write_text("{}"), "cannot be read"),
    "truncated gzip": ("log.jsonl.gz", lambda path: cut(write_lines(path, [ROW] * 500)), "may be truncated"),
    "empty parquet": ("log.parquet", lambda path: path.write_bytes(b""), "cannot be read"),
    "truncated parquet": ("log.parquet", lambda path: cut(good_parquet(path)), "cannot be read"),
    "text as parquet": ("log.parquet", lambda path: path.write_text("{}" * 50), "cannot be read"),
    "no item column": ("log.parquet", lambda path: good_parquet(path, item=None), "column 'item' is missing among user, action"),
    "other types": ("log.parquet", lambda path: good_parquet(path, timestamp=["a", "b"]), "field 'timestamp': not a number"),
    "no rows": ("log.parquet", lambda path: good_parquet(path, user=[], item=[], action=[], timestamp=[]), "has no events"),
    "truncated zip": ("ml-1m.zip", lambda path: cut(tiny_movielens(path)), "may be truncated"),
    "text as zip": ("ml-1m.zip", lambda path: path.write_text("PK"), "cannot be read"),
    "zip without ratings": ("ml-1m.zip", zip_without_ratings, r"has no ratings\.dat"),
    "folder without ratings": ("ml-1m", folder_without_ratings, r"has no ratings\.dat"),
    "no ratings": ("ml-1m.zip", lambda path: tiny_movielens(path, ratings="\n"), "has no events"),
    "broken ratings": ("ml-1m.zip", lambda path: tiny_movielens(path, ratings="\x00\x01"), "row 1, field 'row': not UserID::"),
    "broken films": (
        "ml-1m.zip",
        lambda path: tiny_movielens(path, movies="1::A::B\n2,A,B\n"),
        r"movies\.dat row 2: not MovieID",
    ),
    "broken users": ("ml-1m.zip", lambda path: tiny_movielens(path, users="F,1\n"), "field 'user': unknown user"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_an_unusable_file_gives_one_clear_line(tmp_path, case):
    name, make, said = UNREADABLE[case]
    path = tmp_path / name
    make(path)
    with pytest.raises(EventsError, match=said) as raised:
        read_events(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["log.jsonl", "log.jsonl.gz", "log.parquet", "ml-1m.zip"])
@given(damage=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=3), st.integers(0, 3)), max_size=5))
@quick
def test_random_damage_raises_nothing_but_events_error(tmp_path, name, damage):
    path = tmp_path / name
    path.unlink(missing_ok=True)
    if name == "ml-1m.zip":
        tiny_movielens(path)
    else:
        write_events(read_rows(tmp_path, [{**ROW, "timestamp": t, "context": {"a": t}} for t in range(20)]), path)
    content = path.read_bytes()
    for place, inserted, removed in damage:
        at = int(place * len(content))
        content = content[:at] + inserted + content[at + removed :]
    path.write_bytes(content)
    log, said = None, ""
    try:
        log = read_events(path, reject_file=tmp_path / "bad.jsonl")
    except EventsError as error:
        said = str(error)
    if log is None:
        assert said.startswith(f"{path}: ")
        assert "\n" not in said
    else:
        report = log.report
        assert log.num_events == report.kept == log.offsets[-1] > 0
        lost = sum(report.rejected.values()) + report.repaired.get("exact duplicates, dropped", 0)
        assert report.rows == report.kept + lost


def test_a_flipped_bit_in_a_parquet_page_is_noticed(tmp_path):
    path = tmp_path / "log.parquet"
    log = read_rows(tmp_path, [{**ROW, "item": f"i{i}", "timestamp": 7 * i, "dwell": 0.1 * i} for i in range(200)])
    write_events(log, path)
    content = path.read_bytes()
    pages = len(content) - 8 - int.from_bytes(content[-8:-4], "little")  # the footer's length stands before the last 4 bytes
    noticed = 0
    for at in range(4, pages, 29):
        path.write_bytes(content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :])
        try:
            assert_same(log, read_events(path, log.catalog, now=NOW))
        except EventsError:
            noticed += 1
    assert noticed > 10


@pytest.mark.parametrize("path", ["log.txt", "missing/log.jsonl", "missing/log.parquet"])
def test_a_log_that_cannot_be_written_gives_one_clear_line(tmp_path, path):
    log = read_rows(tmp_path, [ROW])
    with pytest.raises(EventsError, match=path.replace(".", r"\.")):
        write_events(log, tmp_path / path)


# ---- MovieLens-1M


@pytest.mark.parametrize("name", ["ml-1m.zip", "ml-1m"])
def test_movielens_is_read_from_its_zip_and_its_folder(tmp_path, name):
    log = read_events(tiny_movielens(tmp_path / name))
    assert log.users == ["1", "2"]
    assert log.items.tolist() == [1, 3952, 3, 1, 3]  # rows are the official MovieIDs
    assert [ACTIONS[a] for a in log.actions] == ["impression", "click", "like", "purchase", "impression"]
    assert log.timestamps.tolist() == [50, 100, 200, 300, 301]
    catalog = log.catalog
    assert (catalog.name, catalog.num_items, int(catalog.known.sum())) == (MOVIELENS, 3953, 3)
    assert (catalog.titles[1], catalog.titles[3]) == ("Été (1995)", "Night Train: A Film (1996)")
    assert [catalog.features["category"][i] for i in (0, 1, 3, 3952)] == [0, 2, 1, 3]  # Action, Comedy, Drama
    assert catalog.num_items == preset("ml-1m").num_items
    assert catalog.item_features(preset("ml-1m")).shape == (0, 3953)


def test_bad_ratings_are_counted_and_the_good_ones_go_on(tmp_path):
    bad = ["1::2::5::100", "9::1::5::100", "1::1::6::100", "1::1::5::99999999999", "1::1::5", "1,1,5,100", "1::1::x::100"]
    lines = ["1::1::5::100", *bad, "2::1::3::200"]
    path = tiny_movielens(tmp_path / "ml-1m.zip", ratings="\r\n".join(lines))
    log = read_events(path, reject_file=tmp_path / "bad.jsonl")
    assert log.report.kept == 2
    assert log.report.rejected == {
        "item: unknown item": 1,
        "user: unknown user": 1,
        "action: not a rating from 1 to 5": 1,
        "timestamp: in the future": 1,
        "row: not UserID::MovieID::Rating::Timestamp": 3,
    }
    rejects = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [(line["row"], line["text"]) for line in rejects] == list(enumerate(bad, 2))
    with pytest.raises(EventsError, match="row 6, field 'row'"):
        read_events(path, on_bad="raise")


def test_movielens_ties_are_random_but_seeded(tmp_path):
    users = "".join(f"{u}::F::1::10::48067\n" for u in range(1, 401))
    ratings = "".join(f"{u}::{film}::4::100\n" for u in range(1, 401) for film in (1, 3))
    path = tiny_movielens(tmp_path / "ml-1m.zip", ratings=ratings, users=users)
    first = [read_events(path, seed=seed).items[::2] == 1 for seed in (0, 0, 1)]
    assert 0.4 < first[0].mean() < 0.6
    assert (first[0] == first[1]).all()
    assert 0.4 < (first[0] == first[2]).mean() < 0.6


# ---- in memory


def test_histories_slice_and_may_be_empty(tmp_path):
    assert len(History("new")) == 0
    history = read_rows(tmp_path, [{**ROW, "timestamp": t} for t in range(5)]).history(0)
    assert history[:2].timestamps.tolist() == [0, 1]
    assert history[3:].user == "u1"
    assert all(len(getattr(history[1:3], name)) == 2 for name in COLUMNS[1:])


def test_an_unknown_user_is_named(tmp_path):
    log = read_rows(tmp_path, [{**ROW, "user": f"u{i}"} for i in range(12)])
    assert log.index("u10") == 10
    with pytest.raises(EventsError, match="user 'x' is unknown: the log has 12 users, 'u0' to 'u11'"):
        log.index("x")


def test_select_keeps_the_users_asked_for(tiny_world):
    part = tiny_world.select([5, 2])
    assert part.users == ["u6", "u3"]
    for i, j in enumerate([5, 2]):
        for name in COLUMNS[1:]:
            np.testing.assert_array_equal(getattr(part.history(i), name), getattr(tiny_world.history(j), name))
    assert part.context[0] == tiny_world.context[tiny_world.offsets[5]]
    assert len(tiny_world.select([])) == 0


def test_catalogs_are_saved_loaded_and_refused_by_name(tmp_path, tiny_world):
    path, catalog = tmp_path / "catalog.json", tiny_world.catalog
    catalog.save(path)
    again = Catalog.load(path)
    assert (again.name, again.ids, again.titles) == (catalog.name, catalog.ids, catalog.titles)
    np.testing.assert_array_equal(again.item_features(preset("tiny")), catalog.item_features(preset("tiny")))
    assert (again.row("i7"), again.row("nothing")) == (7, 0)

    fields = json.loads(path.read_text())
    for change, said in (
        ({"schema_version": 99}, "schema_version is 99, this release reads 1"),
        ({"ids": "abc"}, "ids is not a list"),
        ({"titles": [None]}, "titles has 1 values for 501 ids"),
        ({"features": {"category": [1]}}, "category has 1 values"),
        ({"features": {"category": ["x"] * 501}}, "cannot be read"),
    ):
        path.write_text(json.dumps({**fields, **change}))
        with pytest.raises(EventsError, match=said):
            Catalog.load(path)
    cut(path)
    with pytest.raises(EventsError, match=r"catalog\.json: cannot be read"):
        Catalog.load(path)


def test_item_features_follow_the_config_and_are_refused_where_too_large(tiny_world):
    config, catalog = preset("tiny"), tiny_world.catalog
    table = catalog.item_features(config.replace(side_features=(("creator", 65), ("mood", 5)), num_items=600))
    np.testing.assert_array_equal(table[0, :501], catalog.features["creator"])
    assert table.shape == (2, 600)
    assert not table[1].any()
    assert not table[:, 501:].any()
    with pytest.raises(EventsError, match="feature 'creator' runs from 0 to 64, preset 'tiny' has rows 0 to 63"):
        catalog.item_features(config.replace(side_features=(("creator", 64),)))
    with pytest.raises(EventsError, match="has 501 item rows, preset 'tiny' holds 500"):
        catalog.item_features(config.replace(num_items=500))


def test_task_labels_of_a_hand_made_log(tmp_path):
    day = 86400
    rows = [
        {"session": "a", "action": "impression", "timestamp": 0},
        {"session": "a", "action": "dwell", "timestamp": 60, "dwell": ENGAGED_DWELL},
        {"session": "b", "action": "dwell", "timestamp": 60 + day, "dwell": ENGAGED_DWELL - 1},
        {"session": "c", "action": "purchase", "timestamp": 61 + 2 * day},
        {"session": "c", "action": "click", "timestamp": 62 + 2 * day},
        {"user": "u2", "session": "d", "action": "share", "timestamp": 70 + 2 * day},
    ]
    labels = task_labels(read_rows(tmp_path, [{**ROW, **row} for row in rows]))
    nan = np.nan
    expected = [[0, 1, 0], [1, 1, 0], [0, 0, 0], [1, nan, 1], [1, nan, 0], [1, nan, 0]]
    np.testing.assert_array_equal(labels, np.array(expected, dtype=np.float32))
    assert labels.dtype == np.float32


def test_task_labels_of_movielens_use_its_stand_ins(tmp_path):
    days = [0, 0, 7, 15]
    ratings = "".join(f"1::{film}::{r}::{86400 * day}\n" for film, r, day in zip((1, 1, 3, 3952), (5, 3, 4, 2), days))
    log = read_events(tiny_movielens(tmp_path / "ml-1m.zip", ratings=ratings))
    by_action = {ACTIONS[a]: label for a, label in zip(log.actions, task_labels(log).tolist())}
    assert by_action["purchase"] == [1, 1, 1]
    assert by_action["click"] == [0, 1, 0]
    assert by_action["like"] == [1, 0, 0]
    assert by_action["impression"][::2] == [0, 0]
    assert np.isnan(by_action["impression"][1])


def test_jagged_batches_hold_the_users_events(tiny_world):
    jagged = to_jagged(tiny_world, [3, 0])
    assert jagged.keys() == ["item", "action", "timestamp"]
    for key, column in (("item", "items"), ("action", "actions"), ("timestamp", "timestamps")):
        lists = jagged[key].to_dense()
        for values, i in zip(lists, (3, 0)):
            np.testing.assert_array_equal(values.numpy(), getattr(tiny_world.history(i), column))


def test_the_world_is_at_hand_in_events():
    assert ReexportedWorld is World
