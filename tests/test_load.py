"""The load generator sends what the log has, counts everything it sent, and stays on this machine and within bounds."""

import asyncio
import json

import pytest
from aiohttp import web

from hstu_lab import load, widgets
from hstu_lab.__main__ import main
from hstu_lab.events import write_events
from hstu_lab.telemetry import Histogram

ROWS = [
    {"mode": "open", "offered": rate, "sent": 100, "seconds": 2.0, "goodput": good / 2, "p50_ms": p99 / 4, "p95_ms": p99 / 2,
     "p99_ms": p99, "outcomes": {"200": good, "429": 100 - good}, "kv_usage": 0.25,
     "prefix_hits": 0.5}
    for rate, p99, good in ((10, 20.0, 100), (20, 90.0, 100), (40, 150.0, 90), (80, 15.0, 100))
]  # fmt: skip


def serve(handler, run):
    """run(client) against an application that answers /recommend with `handler`, and the bodies it got."""
    got = []

    async def recommend(request):
        got.append(await request.json())
        return await handler(request)

    async def ready(_):
        return web.json_response({"strategy": "eager"})

    async def metrics(_):
        hits = 3 * len(got)
        return web.Response(
            text=f'x 3\nvllm:kv_cache_usage_perc{{engine="0"}} 0.375\nvllm:prefix_cache_hits_total{{engine="0"}} {hits}\n'
            f'vllm:prefix_cache_queries_total{{engine="0"}} {4 * len(got)}\nvllm:prefix_cache_hits_total_more 5\n'
        )

    async def every():
        application = web.Application()
        application.add_routes([web.post("/recommend", recommend), web.get("/ready", ready), web.get("/metrics", metrics)])
        runner = web.AppRunner(application)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        try:
            async with load.Client(f"http://127.0.0.1:{port}", "t") as client:
                return await run(client)
        finally:
            await runner.cleanup()

    return asyncio.run(every()), got


async def fine(request):
    assert request.headers["Authorization"] == "Bearer t"
    return web.json_response({})


def test_visits_are_the_sessions_of_the_log_in_order_of_time(tiny_world):
    found = load.visits(tiny_world)
    assert len(found) == sum(int(tiny_world.history(u).sessions.max()) + 1 for u in range(len(tiny_world)))
    times = [int(tiny_world.history(v.user).timestamps[v.length - 1]) for v in found]
    assert times == sorted(times)
    for visit in found[:50]:
        history = tiny_world.history(visit.user)
        assert visit.length == len(history) or history.sessions[visit.length] != history.sessions[visit.length - 1]
    returning = load.return_rate(found)
    assert returning == 1 - len({v.user for v in found}) / len(found)
    assert 0 < returning < 1


def test_bodies_are_consecutive_visits_and_the_log_again_where_it_ends(tiny_world):
    found = load.visits(tiny_world)
    sample = load.bodies(tiny_world, 50, task="slate", deadline_ms=7, seed=3)
    assert sample == load.bodies(tiny_world, 50, task="slate", deadline_ms=7, seed=3)
    lengths = [len(body["events"]) for body in sample]
    every = [visit.length for visit in found]
    assert any(every[i : i + 50] == lengths for i in range(len(every)))
    assert {(body["task"], body["deadline_ms"]) for body in sample} == {("slate", 7)}
    again = load.bodies(tiny_world, len(found) + 5)
    assert again[len(found) :] == again[:5]


def test_an_open_loop_sends_poisson_arrivals_and_counts_from_when_they_were_due(tiny_world):
    async def slow(_):
        await asyncio.sleep(0.05)
        return web.json_response({})

    sample = load.bodies(tiny_world, 10)
    result, got = serve(slow, lambda client: load.open_loop(client, sample, 100, 1.0))
    assert 60 < result.sent < 140
    assert result.outcomes == {"200": len(got)}
    assert got[:10] == sample
    assert result.latency.count == result.sent
    assert result.latency.min >= 50
    assert (result.kv_usage, result.prefix_hits) == (0.375, 0.75)
    row = result.to_dict()
    assert row["goodput"] == pytest.approx(result.sent / result.seconds)
    assert row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]
    assert "req/s" in load.line(row)


def test_a_closed_loop_has_as_many_requests_out_as_clients(tiny_world):
    out = most = 0

    async def counting(_):
        nonlocal out, most
        out += 1
        most = max(most, out)
        await asyncio.sleep(0.01)
        out -= 1
        return web.json_response({})

    result, got = serve(counting, lambda client: load.closed_loop(client, load.bodies(tiny_world, 5), 3, 0.5))
    assert most == 3
    assert result.sent == len(got) > 10
    assert "clients" in load.line(result.to_dict())


def test_what_is_refused_or_lost_is_counted_and_has_no_latency(tiny_world):
    async def moody(request):
        number = len((await request.json())["events"]) % 3
        if number == 0:
            request.transport.abort()
        return web.json_response({}, status=(200, 429, 200)[number])

    sample = load.bodies(tiny_world, 30)
    result, _ = serve(moody, lambda client: load.open_loop(client, sample, 60, 0.5))
    assert set(result.outcomes) == {"200", "429", "lost"}
    assert result.latency.count == result.outcomes["200"] < result.sent


def test_a_sweep_goes_up_and_reports(tiny_world):
    said = []
    run = lambda client: load.sweep(client, load.bodies(tiny_world, 5), [40, 20], 0.3, report=said.append)  # noqa: E731
    rows, _ = serve(fine, run)
    assert [row["offered"] for row in rows] == [20, 40]
    assert len(said) == 2
    assert json.loads(json.dumps(rows)) == rows


def test_the_knee_is_the_last_rate_before_the_limit_or_refusals():
    assert load.knee(ROWS, 100) == 20
    assert load.knee(ROWS, 50) == 10
    assert load.knee(ROWS, 10) == 0
    assert load.knee(ROWS, 200) == 20, "at 40 one in ten was refused; what comes after does not count"
    assert load.knee(ROWS, 200, most_refused=0.2) == 80
    assert load.knee([ROWS[0] | {"p99_ms": float("nan"), "outcomes": {}}], 100) == 0


@pytest.mark.parametrize("url", ["http://10.0.0.1:80", "http://example.org", "https://127.0.0.1", "ftp://localhost", "nothing"])
def test_load_is_sent_to_this_machine_only(url):
    with pytest.raises(load.LoadError, match="this machine only"):
        load.Client(url)


@pytest.mark.parametrize(("rate", "seconds"), [(1e6, 10), (0, 1), (10, 0), (10, 1e9), (-1, 1)])
def test_a_run_is_bounded(rate, seconds):
    with pytest.raises(load.LoadError):
        asyncio.run(load.open_loop(None, [{}], rate, seconds))


def test_without_a_service_the_command_says_so(capsys, tmp_path, tiny_world):
    write_events(tiny_world.select(range(3)), tmp_path / "log.jsonl")
    arguments = ["load", "--events", str(tmp_path / "log.jsonl"), "--url", "http://127.0.0.1:9"]
    assert main(arguments) == 2
    assert "no service answers" in capsys.readouterr().err
    assert main([*arguments, "--rates", "fast"]) == 2
    assert "--rates: fast is no number" in capsys.readouterr().err


# ---- the view


def test_latency_and_outcomes_are_drawn_against_the_load():
    left, right = widgets.load_curve(ROWS, 100, 20, 40, "recorded on X").axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in left.lines}
    assert lines["p99"] == [[10, 20], [20, 90], [40, 150], [80, 15]]
    assert left.get_title(loc="left") == "the knee at p99 ≤ 100 ms: 20/s"
    heights = [round(patch.get_height(), 3) for patch in right.patches]
    assert heights[:8] == [50, 50, 45, 50, 0, 0, 5, 0]
    assert left.figure.get_supxlabel() == "recorded on X"
    lost = ROWS[0] | {"outcomes": {"200": 40, "504": 20, "lost": 40}}
    assert widgets.outcome_rates(lost) == {"answered": 20, "refused (429)": 0, "too late (504)": 10, "other errors": 20}


def test_the_explorer_tells_the_chosen_load_and_the_knee():
    explorer = widgets.load_explorer(ROWS, load.knee)
    assert explorer.label.value == (
        "10 requests/s: p99 20.0 ms, 50.0 answers/s, 50% of the tokens found in the cache; within 100 ms up to 20 requests/s"
    )
    before = bytes(explorer.image.value)
    explorer.controls["offered"].value, explorer.controls["limit"].value = 40, 50
    assert explorer.label.value.startswith("40 requests/s: p99 150.0 ms, 45.0 answers/s")
    assert explorer.label.value.endswith("within 50 ms up to 10 requests/s")
    assert bytes(explorer.image.value) != before


def test_a_run_without_answers_has_no_percentiles():
    row = load.LoadResult("open", 5, 1.0, {"lost": 3}, Histogram()).to_dict()
    assert row["p99_ms"] != row["p99_ms"]
    assert (row["goodput"], row["sent"]) == (0, 3)


def test_what_is_no_service_is_told_from_one_that_starts():
    import http.server
    import threading

    said = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(said["status"])
            self.send_header("Content-Type", said["type"])
            self.end_headers()
            self.wfile.write(said["body"])

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    async def check():
        async with load.Client(f"http://127.0.0.1:{server.server_port}") as client:
            await client.check()

    starting = b'{"error": {"message": "the engine is starting"}}'
    for status, kind, body, message in (
        (404, "text/html", b"<p>no</p>", r"something else answers there \(status 404"),
        (200, "application/json", b"{", "something else answers there"),
        (503, "application/json", starting, "the engine is starting; wait until /ready is green"),
        (401, "application/json", b'{"error": {"message": "give the token"}}', "give the token; set HSTU_LAB_TOKEN"),
    ):
        said |= {"status": status, "type": kind, "body": body}
        with pytest.raises(load.LoadError, match=message):
            asyncio.run(check())
    server.shutdown()
