"""The service answers, refuses by name, sheds, drops what nobody waits for, and outlives its engine."""

import asyncio
import collections
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import aiohttp
import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from serving import EVENT, TOKEN, running

from hstu_lab.__main__ import main
from hstu_lab.pipeline import Recommender
from hstu_lab.server import ServerError, ServerOptions, is_loopback, make_app

MOST = 6


@pytest.fixture(scope="module")
def served(tiny_checkpoint):
    with running(tiny_checkpoint, "--max-in-flight", MOST) as server:
        server.wait_ready()
        yield server


@pytest.fixture(autouse=True)
def _up(request):
    """Each test finds the engine up, whatever the one before did to it."""
    if "served" in request.fixturenames:
        request.getfixturevalue("served").wait_ready()


@pytest.fixture(scope="module")
def body(tiny_world):
    """The request of the world's first user."""
    history = tiny_world.history(0)
    ids, actions = tiny_world.catalog.ids, ("none", "impression", "click", "like", "share", "purchase", "dwell")
    events = [
        {"item": ids[i], "action": actions[a], "timestamp": int(t)}
        for i, a, t in zip(history.items, history.actions, history.timestamps)
    ]
    return {"user": history.user, "events": events}


def together(server, bodies, path="/recommend", **client):
    """All requests at once: [(status, headers, answer)] in order."""

    async def one(session, body):
        async with session.post(server.base + path, json=body) as answer:
            return answer.status, answer.headers, await answer.json()

    async def every():
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0), **client) as session:
            return await asyncio.gather(*(one(session, body) for body in bodies))

    return asyncio.run(every())


# ---- answers


@pytest.mark.parametrize("task", ["topk", "slate"])
def test_the_answer_is_the_recommenders(served, body, tiny_checkpoint, tiny_world, task):
    status, _, answer = served.call("/recommend", body | {"task": task})
    assert status == 200
    with Recommender(tiny_checkpoint) as recommender:
        wanted = recommender.recommend(tiny_world.history(0), task=task, strategy="eager")
    assert [item["item_id"] for item in answer["items"]] == [item.item_id for item in wanted.items]
    assert answer["items"][0]["score"] == pytest.approx(wanted.items[0].score, abs=1e-6)
    assert (answer["user"], answer["task"], answer["strategy"]) == (body["user"], task, "eager")
    assert set(answer["stages_ms"]) == {"waiting", "tokens", "encoder", "stack", "ranking"}


def test_any_order_unknown_items_and_too_long_histories_are_repaired_and_said(served, body, tiny_model):
    strange = {"item": "nobody knows it", "action": "like", "timestamp": 1_700_000_000}
    straight = served.call("/recommend", body)[2]
    mixed = served.call("/recommend", body | {"events": [strange, *reversed(body["events"])]})[2]
    assert mixed["repairs"] == {"unsorted events sorted": 1, "unknown items dropped": 1} | straight["repairs"]
    long = [EVENT | {"timestamp": 1_600_000_000 + i} for i in range(500)]
    status, _, answer = served.call("/recommend", body | {"events": long})
    assert status == 200
    excess, slide = 500 - served.wait_ready()["max_history"], tiny_model.config.slide
    assert answer["repairs"]["oldest events left out"] == -(-excess // slide) * slide
    new = served.call("/recommend", {"user": "never seen"})[2]
    assert new["repairs"] == {"unknown user": 1, "empty history": 1}
    assert len(new["items"]) == 10


def test_an_event_sent_twice_counts_once_as_in_a_file(served, body):
    straight = served.call("/recommend", body)[2]
    again = [body["events"][2] | {"timestamp": body["events"][2]["timestamp"] + 0.5, "session": "another"}, *body["events"][:2]]
    twice = served.call("/recommend", body | {"events": body["events"] + again})[2]
    assert twice["repairs"] == {"exact duplicates dropped": 3} | straight["repairs"]
    assert twice["items"] == straight["items"]
    dwelt = served.call("/recommend", body | {"events": [body["events"][0], body["events"][0] | {"dwell": 1.5}]})[2]
    assert "exact duplicates dropped" not in dwelt["repairs"], "an event that differs in what was seen of it is another"


def test_completions_are_the_next_items_of_packed_tokens(served, tiny_model):
    prompt = [tiny_model.config.user_token_base + 1, 5, 9]
    status, _, answer = served.call("/v1/completions", {"prompt": prompt, "max_tokens": 4})
    assert status == 200
    assert len(answer["choices"][0]["token_ids"]) == 4
    assert answer["usage"]["total_tokens"] == 7
    longer = served.call("/v1/completions", {"prompt": [*prompt, answer["choices"][0]["token_ids"][0]], "max_tokens": 3})[2]
    assert longer["choices"][0]["token_ids"] == answer["choices"][0]["token_ids"][1:]
    for changes, field in ({"prompt": [2**30]}, "prompt"), ({"prompt": [1] * 100}, "prompt"):
        status, _, answer = served.call("/v1/completions", {"prompt": prompt} | changes)
        assert (status, answer["error"]["message"].split(":")[0]) == (422, field)
    assert served.call("/v1/models")[2]["data"][0]["id"] == "hstu"


def test_a_service_whose_engine_can_never_start_ends_with_one_line(tiny_checkpoint, tmp_path):
    """The command line finds a missing file before it listens; that the weights are no weights, only the engine."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "torn")
    (folder / "model.safetensors").write_bytes(b"no weights")
    command = [sys.executable, "-m", "hstu_lab", "serve", "--checkpoint", str(folder), "--strategy", "eager", "--port", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode != 0
    assert "the engine cannot start: CheckpointError" in ended.stderr.splitlines()[-1]
    assert str(folder) in ended.stderr
    assert "Traceback" not in ended.stderr


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"user": ""}, "user"),
        ({"user": None}, "user"),
        ({"user": "\ud800"}, "user"),
        ({"task": "best"}, "task"),
        ({"surprise": 1}, "surprise"),
        ({"deadline_ms": 0}, "deadline_ms"),
        ({"events": {}}, "events"),
        ({"events": [EVENT | {"action": "clack"}]}, "events.0.action"),
        ({"events": [EVENT, EVENT | {"timestamp": -1}]}, "events.1.timestamp"),
        ({"events": [EVENT | {"timestamp": float("nan")}]}, "events.0.timestamp"),
        ({"events": [EVENT | {"timestamp": True}]}, "events.0.timestamp"),
        ({"events": [EVENT | {"timestamp": 1_700_000_000_000}]}, "events.0.timestamp"),
        ({"events": [EVENT | {"item": "x" * 201}]}, "events.0.item"),
        ({"events": [EVENT | {"dwell": "long"}]}, "events.0.dwell"),
        ({"events": [{"item": "i5", "action": "like"}]}, "events.0.timestamp"),
        ({"events": [EVENT] * 10_001}, "events"),
    ],
)
def test_a_broken_field_is_named(served, changes, field):
    status, _, answer = served.call("/recommend", {"user": "u1", "events": [EVENT]} | changes)
    assert status == 422
    assert answer["error"]["param"].startswith(field)
    assert answer["error"]["type"] == "invalid_request"


def test_an_unknown_field_is_told_the_known_ones(served):
    for path, body, known in (
        ("/recommend", {"user": "u1", "surprise": 1}, "user, events, task, deadline_ms"),
        ("/recommend", {"user": "u1", "events": [EVENT | {"surprise": 1}]}, "item, action, timestamp"),
        ("/v1/completions", {"prompt": [1], "surprise": 1}, "model, prompt, max_tokens"),
    ):
        status, _, answer = served.call(path, body)
        assert status == 422
        assert f"surprise: there is no such field; known: {known}" in answer["error"]["message"]


def test_events_of_another_user_are_refused(served):
    status, _, answer = served.call("/recommend", {"user": "u1", "events": [EVENT | {"user": "u2"}]})
    assert status == 422
    assert "events.0.user is 'u2'" in answer["error"]["message"]


@pytest.mark.parametrize("raw", [b"", b"{", b"[1, 2", b"null", b"\xff\xfe", b"[" * 100_000, b'{"user": 1e999}', b"9" * 5000])
def test_what_is_no_json_is_refused(served, raw):
    status, _, answer = served.call("/recommend", raw=raw)
    assert status in (400, 422)
    assert answer["error"]["message"]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_long_is_refused(served, chunked):
    long = b'{"user": "' + b"x" * (5 << 20) + b'"}'

    async def send():
        async def pieces():
            for start in range(0, len(long), 1 << 20):
                yield long[start : start + (1 << 20)]

        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.post(served.base + "/recommend", data=pieces() if chunked else long) as answer,
        ):
            return answer.status

    with contextlib.suppress(aiohttp.ClientOSError):  # the server may close while we still send
        assert asyncio.run(send()) == 413
    served.wait_ready()


@pytest.mark.parametrize("path", ["/recommend", "/v1/completions", "/ready", "/metrics"])
@pytest.mark.parametrize("token", [None, "another"])
def test_nothing_without_the_token(served, path, token):
    status, headers, _ = served.call(path, {} if path in ("/recommend", "/v1/completions") else None, token=token)
    assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
    assert served.call("/health", token=token)[0] == 200


def from_schema(schema, parts):
    """Values that fit a JSON schema of the OpenAPI document, more or less."""
    if "$ref" in schema:
        return st.deferred(lambda: from_schema(parts[schema["$ref"].rsplit("/", 1)[1]], parts))
    if "anyOf" in schema:
        return st.one_of([from_schema(option, parts) for option in schema["anyOf"]])
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    match schema.get("type"):
        case "object" if "properties" in schema:
            fields = {name: from_schema(part, parts) for name, part in schema["properties"].items()}
            required = {name: fields.pop(name) for name in schema.get("required", ())}
            return st.fixed_dictionaries(required, optional=fields)
        case "array":
            return st.lists(from_schema(schema["items"], parts), max_size=4)
        case "string":
            return st.text(max_size=8)
        case "integer":
            return st.integers(schema.get("minimum"), schema.get("maximum"))
        case "number":
            return st.floats(allow_nan=False) | st.integers(0, 2**31)
        case "null":
            return st.none()
    return st.dictionaries(st.text(max_size=3), st.none(), max_size=2)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def broken(draw, whole):
    """A body that fits the schema, with up to two of its parts replaced, dropped or added."""
    value = draw(whole)
    for _ in range(draw(st.integers(0, 2))):
        spot = value
        while isinstance(spot, dict | list) and spot and draw(st.booleans()):
            inside = [v for v in (spot.values() if isinstance(spot, dict) else spot) if isinstance(v, dict | list) and v]
            if not inside:
                break
            spot = draw(st.sampled_from(inside))
        if isinstance(spot, dict):
            spot[draw(st.sampled_from([*spot, "more"]))] = draw(JUNK)
        elif spot:
            spot[draw(st.integers(0, len(spot) - 1))] = draw(JUNK)
    return value


@pytest.mark.parametrize("path", ["/recommend", "/v1/completions"])
def test_no_body_breaks_the_server(served, path):
    document = make_app(ServerOptions(), {}).openapi()
    parts = document["components"]["schemas"]
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    seen = collections.Counter()

    @settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
    @given(broken(from_schema(schema, parts)) | JUNK)
    def fuzz(value):
        status, _, answer = served.call(path, raw=json.dumps(value).encode())
        seen[status] += 1
        assert status in (200, 422, 504), (status, answer)
        assert status == 200 or answer["error"]["message"]
        assert status != 504 or value["deadline_ms"] < 1000

    fuzz()
    assert seen[422] > 10
    assert seen[200] > 0


# ---- too much, too slow, gone


def test_overload_is_shed_and_what_is_accepted_is_answered(served, body):
    answers = together(served, [body | {"task": "slate"}] * (10 * MOST))
    counts = collections.Counter(status for status, _, _ in answers)
    assert set(counts) == {200, 429}
    assert counts[200] >= MOST
    assert counts[429] > 0
    for status, headers, answer in answers:
        if status == 429:
            assert int(headers["Retry-After"]) >= 1
            assert answer["error"]["type"] == "overloaded"
    assert served.metric("hstu_http_requests_total", outcome="429") >= counts[429]
    assert served.metric("hstu_in_flight") == 0
    assert served.call("/recommend", body)[0] == 200


def test_who_waits_is_answered_together_and_the_metrics_tell(served, body):
    def batches(part):
        return served.metric(f"hstu_batch_requests_{part}", stage="answer", strategy="eager", task="slate")

    before, batches_before = batches("sum"), batches("count")
    answers = together(served, [body | {"task": "slate"}] * MOST)
    assert [status for status, _, _ in answers] == [200] * MOST
    assert batches("sum") - before == MOST
    assert batches("count") - batches_before <= MOST
    assert served.metric("hstu_batch_requests_bucket", stage="answer", task="slate", le="+Inf") == batches("count")
    assert served.metric("hstu_batch_requests_bucket", stage="answer", task="slate", le="1") < batches("count"), (
        "some were shared"
    )


def test_a_deadline_that_expires_is_told(served, body):
    answers = together(served, [body | {"task": "slate", "deadline_ms": 1}] * 4)
    assert {status for status, _, _ in answers} == {504}
    assert answers[0][2]["error"]["type"] == "deadline_exceeded"
    assert served.call("/recommend", body)[0] == 200


def send_and_leave(server, body):
    host, port = server.base.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    head = f"POST /recommend HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        time.sleep(0.02)


@contextlib.contextmanager
def frozen(pid):
    """A process that does not run meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def in_background(server, bodies):
    """The requests on their way, and the list that their answers will be in once the thread ends."""
    answers = []
    thread = threading.Thread(target=lambda: answers.extend(together(server, bodies)))
    thread.start()
    until(lambda: server.metric("hstu_in_flight") == len(bodies))
    return thread, answers


def test_a_client_that_leaves_is_noticed_while_the_engine_works(served, body):
    before = served.metric("hstu_http_requests_total", outcome="disconnected")
    with frozen(served.wait_ready()["pid"]):
        for _ in range(3):
            send_and_leave(served, body | {"deadline_ms": 60_000})
        until(lambda: served.metric("hstu_http_requests_total", outcome="disconnected") == before + 3)
        assert served.metric("hstu_in_flight") == 0, "their places are free although the engine has not answered"


# ---- the engine dies, the server stops


def test_a_killed_engine_is_told_and_comes_back(served, body):
    pid = served.wait_ready()["pid"]
    with frozen(pid):  # so that the requests are in it when it dies
        thread, waiting = in_background(served, [body | {"deadline_ms": 60_000}] * 3)
        os.kill(pid, signal.SIGKILL)
    thread.join()
    assert [status for status, _, _ in waiting] == [503] * 3
    assert "killed by SIGKILL" in waiting[0][2]["error"]["message"]
    status, headers, answer = served.call("/ready")
    assert (status, answer["error"]["type"]) == (503, "engine_unavailable")
    assert int(headers["Retry-After"]) > 0
    assert served.call("/health")[0] == 200
    assert served.wait_ready()["pid"] != pid
    assert served.call("/recommend", body)[0] == 200
    assert served.metric("hstu_engine_restarts") >= 1


def test_sigterm_answers_what_was_accepted_and_then_ends(tiny_checkpoint, body):
    with running(tiny_checkpoint) as server:
        pid = server.wait_ready()["pid"]
        with frozen(pid):
            thread, waiting = in_background(server, [body | {"deadline_ms": 60_000}] * 5)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            with pytest.raises(OSError, match=r"refused|reset"):
                server.call("/ready")
        thread.join()
        assert [status for status, _, _ in waiting] == [200] * 5
        assert server.process.wait(15) == 0
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


# ---- how it is started


def test_only_loopback_without_a_token():
    assert all(map(is_loopback, ("127.0.0.1", "::1", "localhost", "127.1.2.3")))
    assert not any(map(is_loopback, ("0.0.0.0", "10.0.0.1", "example.org", "::")))
    with pytest.raises(ServerError, match="set a token"):
        ServerOptions(host="0.0.0.0")
    assert ServerOptions(host="0.0.0.0", token="x").token
    with pytest.raises(ServerError, match="deadline_ms is 0"):
        ServerOptions(deadline_ms=0)
    with pytest.raises(ServerError, match="port is 99999"):
        ServerOptions(port=99999)


def test_the_openapi_document_tells_every_error():
    document = make_app(ServerOptions(), {}).openapi()
    for path in ("/recommend", "/v1/completions"):
        assert set(document["paths"][path]["post"]["responses"]) == {"200", "401", "413", "422", "429", "503", "504"}
    detail = document["components"]["schemas"]["ErrorDetail"]["properties"]
    assert set(detail) == {"type", "message", "param", "code"}


def test_a_start_that_cannot_work_is_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("HSTU_LAB_TOKEN", raising=False)
    assert main(["serve", "--host", "0.0.0.0"]) == 2
    assert capsys.readouterr().err.startswith("error: host 0.0.0.0 can be reached")
    (tmp_path / "token").write_text("\n")
    assert main(["serve", "--token-file", str(tmp_path / "token")]) == 2
    assert "is empty" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot be taken" in capsys.readouterr().err
