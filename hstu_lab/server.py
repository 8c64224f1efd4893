"""The service: `/recommend` in the events schema, an OpenAI-style `/v1/completions`, `/health`, `/ready` and `/metrics`.

Every accepted request ends in an answer or a named error. What is not accepted is told at once: 401 without the token, 413 and
422 naming the field, 429 with Retry-After when too much is in flight, 503 while there is no engine, 504 past the deadline.
The engine runs in a process of its own (`hstu_lab.engine_process`).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hmac
import ipaddress
import logging
import math
import signal
import time
from typing import Annotated, Literal

import prometheus_client
import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator
from starlette.exceptions import HTTPException

from hstu_lab.config import ACTIONS, TASK_NAMES
from hstu_lab.engine_process import EngineBroken, EngineProcess, EngineRefused, EngineUnavailable
from hstu_lab.events import CLOCK_SKEW, EVENT_ACTIONS, LONGEST_DWELL, LONGEST_ID

log = logging.getLogger(__name__)

MOST_EVENTS = 10_000
LONGEST_DEADLINE_MS = 60_000
KEEP_ALIVE_SECONDS = 75
"""Longer than clients keep idle connections, or a request may meet a connection that is just being closed."""
BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 60)


class ServerError(ValueError):
    """Options that the service cannot start with; the message names the option and the remedy."""


@dataclasses.dataclass(frozen=True)
class ServerOptions:
    """Where and how to listen. `max_in_flight` bounds accepted requests; `deadline_ms` holds where a request names none.

    `token`: the bearer token that every request but /health must carry; None needs a loopback `host`.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    max_in_flight: int = 64
    deadline_ms: int = 5_000
    drain_seconds: int = 20
    max_body_bytes: int = 4 << 20

    def __post_init__(self):
        for name in ("max_in_flight", "deadline_ms", "drain_seconds", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise ServerError(f"{name} is {getattr(self, name)}: give 1 or more")
        if not 0 <= self.port <= 65535:
            raise ServerError(f"port is {self.port}: give 0 (any that is free) to 65535")
        if not self.token and not is_loopback(self.host):
            raise ServerError(f"host {self.host} can be reached from outside: set a token (HSTU_LAB_TOKEN or --token-file)")


def is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


# ---- what comes in and goes out


def _not_in_the_future(value: float) -> float:
    if value > time.time() + CLOCK_SKEW:
        hint = "divide by 1000" if value > 1e11 else "Unix seconds in UTC are wanted"
        raise ValueError(f"lies in the future: {hint}")
    return value


def _not_blank(value: str | int) -> str:
    if not (text := str(value)).strip():
        raise ValueError("is empty: give the identifier")
    text.encode()  # a lone surrogate is JSON, but no text
    return text


Text = Annotated[str, StringConstraints(max_length=LONGEST_ID)]
Id = Annotated[Text | Annotated[int, Field(ge=-(2**63), lt=2**64, strict=True)], AfterValidator(_not_blank)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", str_strip_whitespace=False)


class EventIn(Strict):
    """One event of the schema in `hstu_lab.events`; the user may be left out."""

    item: Id
    action: Literal[EVENT_ACTIONS]
    timestamp: Annotated[Seconds, AfterValidator(_not_in_the_future)]
    user: Id | None = None
    session: Annotated[str, StringConstraints(max_length=2 * LONGEST_ID)] | int | None = None
    dwell: Annotated[Seconds, Field(le=LONGEST_DWELL)] | None = None
    context: dict | None = None


Deadline = Annotated[int, Field(ge=1, le=LONGEST_DEADLINE_MS)]


class RecommendIn(Strict):
    """A user's events, any order, and what is wanted: `topk` (best ten of one pass) or `slate` (ten, one after another)."""

    user: Id
    events: Annotated[list[EventIn], Field(max_length=MOST_EVENTS)] = []
    task: Literal[TASK_NAMES] = "topk"
    deadline_ms: Deadline | None = None

    @model_validator(mode="after")
    def _one_user(self):
        for i, event in enumerate(self.events):
            if event.user is not None and event.user != self.user:
                raise ValueError(f"events.{i}.user is {event.user!r}, the request's user {self.user!r}: send one user's events")
        return self


class ItemOut(BaseModel):
    item_id: str
    title: str
    score: float
    engagement: float
    retention: float
    monetization: float


class RecommendOut(BaseModel):
    user: str
    task: str
    items: list[ItemOut]
    strategy: str
    repairs: dict[str, int]
    stages_ms: dict[str, float]


class CompletionIn(Strict):
    """OpenAI's completion request where it fits: the prompt is packed event tokens, a completion is the next items."""

    model: str = "hstu"
    prompt: Annotated[list[Annotated[int, Field(ge=0, lt=2**31, strict=True)]], Field(min_length=1, max_length=MOST_EVENTS)]
    max_tokens: Annotated[int, Field(ge=1, le=100)] = 10
    temperature: Literal[0] = 0
    n: Literal[1] = 1
    stream: Literal[False] = False
    deadline_ms: Deadline | None = None


class ErrorDetail(BaseModel):
    type: str
    message: str
    param: str | None
    code: int


class ErrorOut(BaseModel):
    """OpenAI's form of an error; `param` names the field where there is one."""

    error: ErrorDetail


ERRORS = {
    401: "the token is missing or wrong",
    413: "the body is too long",
    422: "a field is wrong; `param` names it",
    429: "too much is in flight; Retry-After says when to try again",
    503: "the engine is starting, died with the request in it, or the service is stopping",
    504: "no answer within the deadline",
}


def failure(status: int, kind: str, message: str, param: str | None = None, retry_after: float | None = None) -> JSONResponse:
    """An error in OpenAI's form: {"error": {"type", "message", "param", "code"}}."""
    headers = {} if retry_after is None else {"Retry-After": str(max(math.ceil(retry_after), 1))}
    message, param = (text and text.encode("utf-8", "backslashreplace").decode() for text in (message, param))
    body = {"error": {"type": kind, "message": message, "param": param, "code": status}}
    return JSONResponse(body, status, headers)


# ---- the service


class Service:
    """What the routes share: the engine process, who is in flight, how long work takes, and the metrics of all that."""

    def __init__(self, options: ServerOptions, settings: dict):
        self.options, self.settings = options, settings
        self.engine = EngineProcess(settings)
        self.in_flight, self.draining = 0, False
        self.mean_seconds = 0.05
        self.registry = prometheus_client.CollectorRegistry()
        kinds = {"registry": self.registry, "namespace": "hstu"}
        self.answers = prometheus_client.Counter("http_requests", "Requests by outcome", ["route", "outcome"], **kinds)
        self.seconds = prometheus_client.Histogram("request_seconds", "Answered", ["route"], buckets=BUCKETS, **kinds)
        for name, text, value in (
            ("in_flight", "Accepted requests without an answer yet", lambda: self.in_flight),
            ("engine_up", "1 while the engine process answers", lambda: float(self.engine.ready is not None)),
            ("engine_restarts", "Engine processes started again", lambda: self.engine.restarts),
        ):
            prometheus_client.Gauge(name, text, **kinds).set_function(value)

    def refusal(self) -> JSONResponse | None:
        """Why no request can be accepted now, if so."""
        if self.draining:
            return failure(503, "draining", "the service is stopping: ask another", retry_after=5)
        if self.engine.broken:
            return failure(503, "engine_broken", f"the engine cannot start: {self.engine.broken}")
        if self.engine.ready is None:
            return failure(503, "engine_unavailable", self._engine_state(), retry_after=5)
        if self.in_flight >= self.options.max_in_flight:
            busy = f"{self.in_flight} requests are in flight: try again later"
            return failure(429, "overloaded", busy, retry_after=self.mean_seconds)
        return None

    def _engine_state(self) -> str:
        why = f" again, {self.engine.restarts}. restart: {self.engine.last_failure}" if self.engine.restarts else ""
        return f"the engine is starting{why}"

    async def answer(self, request: Request, route: str, kind: str, deadline_ms: int | None, **body) -> dict | JSONResponse:
        """The engine's answer, or the error that the client gets; the work is dropped when its deadline or its client goes."""
        started = time.monotonic()
        if refused := self.refusal():
            return self._count(route, str(refused.status_code), refused)
        self.in_flight += 1
        work = asyncio.ensure_future(self.engine.ask(kind, **body))
        gone = asyncio.ensure_future(_disconnected(request))
        limit = (deadline_ms or self.options.deadline_ms) / 1000
        try:
            await asyncio.wait({work, gone}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                if gone.done():
                    return self._count(route, "disconnected", failure(499, "disconnected", "the client went away"))
                return self._count(route, "504", failure(504, "deadline_exceeded", f"no answer within {limit * 1000:.0f} ms"))
            answer = work.result()
        except EngineRefused as error:
            return self._count(route, "422", failure(422, "invalid_request", str(error)))
        except EngineUnavailable as error:
            return self._count(route, "503", failure(503, "engine_unavailable", str(error), retry_after=5))
        finally:
            self.in_flight -= 1
            work.cancel()
            gone.cancel()
        took = time.monotonic() - started
        self.mean_seconds += 0.05 * (took - self.mean_seconds)
        self.seconds.labels(route).observe(took)
        self._count(route, "200", None)
        return answer

    def _count(self, route: str, outcome: str, response: JSONResponse | None) -> JSONResponse | None:
        self.answers.labels(route, outcome).inc()
        return response


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def make_app(options: ServerOptions, settings: dict) -> FastAPI:
    """The application; its lifespan starts and stops the engine process. `settings`: see `EngineProcess`."""
    service = Service(options, settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI):
        async with service.engine:
            yield

    def authorised(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if options.token and not hmac.compare_digest(given.encode(), f"Bearer {options.token}".encode()):
            raise HTTPException(401, "give the token as `Authorization: Bearer ...`", {"WWW-Authenticate": "Bearer"})

    app = FastAPI(title="HSTU Lab", lifespan=lifespan)
    app.state.service = service
    needs_token = [Depends(authorised)]
    errors = {status: {"model": ErrorOut, "description": text} for status, text in ERRORS.items()}

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        path = [] if first["type"] == "json_invalid" else first["loc"][1:]
        field = ".".join(str(part) for part in path if not str(part).startswith(("function-", "constrained-")))
        said = first["msg"]
        if first["type"] == "extra_forbidden":
            model = {"/recommend": RecommendIn, "/v1/completions": CompletionIn}[request.url.path]
            model = EventIn if "events" in first["loc"] else model
            said = f"there is no such field; known: {', '.join(model.model_fields)}"
        more = f" (and {len(error.errors()) - 1} more)" if len(error.errors()) > 1 else ""
        service.answers.labels(request.url.path, "422").inc()
        return failure(422, "invalid_request", f"{field or 'body'}: {said}{more}", field or "body")

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        response = failure(error.status_code, "http_error", str(error.detail))
        response.headers.update(error.headers or {})
        return response

    @app.get("/health", summary="200 while the server runs, whatever the engine does")
    async def health() -> dict:
        return {"status": "draining" if service.draining else "ok", "engine_restarts": service.engine.restarts}

    @app.get("/ready", summary="200 while requests are answered, else 503", dependencies=needs_token)
    async def ready() -> JSONResponse:
        if service.draining or service.engine.ready is None:
            return service.refusal()
        return JSONResponse({"status": "ready", **service.engine.ready, "max_in_flight": options.max_in_flight})

    @app.get("/metrics", summary="Prometheus text: the server's, the stages' and vLLM's own", dependencies=needs_token)
    async def metrics() -> PlainTextResponse:
        text = prometheus_client.generate_latest(service.registry).decode()
        with contextlib.suppress(EngineUnavailable, EngineBroken, EngineRefused, TimeoutError):
            text += (await asyncio.wait_for(service.engine.ask("metrics"), 2))["text"]
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    @app.post("/recommend", response_model=RecommendOut, responses=errors, dependencies=needs_token)
    async def recommend(body: RecommendIn, request: Request):
        # A client that sends an event again means the same event: as where a file is read (`events.read_events`).
        events = dict.fromkeys((e.item, ACTIONS.index(e.action), int(e.timestamp), e.dwell) for e in body.events)
        items, actions, timestamps = ([event[column] for event in events] for column in range(3))
        answer = await service.answer(
            request, "/recommend", "recommend", body.deadline_ms, user=body.user, task=body.task, items=items, actions=actions,
            timestamps=timestamps,
        )  # fmt: skip
        if isinstance(answer, JSONResponse):
            return answer
        if dropped := len(body.events) - len(events):
            answer["repairs"]["exact duplicates dropped"] = dropped
        return {"user": body.user, "task": body.task, **answer}

    @app.get("/v1/models", dependencies=needs_token)
    async def models() -> dict:
        return {"object": "list", "data": [{"id": "hstu", "object": "model", "owned_by": "hstu_lab"}]}

    @app.post("/v1/completions", responses=errors, dependencies=needs_token)
    async def completions(body: CompletionIn, request: Request):
        answer = await service.answer(
            request, "/v1/completions", "complete", body.deadline_ms, tokens=body.prompt, count=body.max_tokens
        )
        if isinstance(answer, JSONResponse):
            return answer
        items, prompt = answer["items"], len(body.prompt)
        used = {"prompt_tokens": prompt, "completion_tokens": len(items), "total_tokens": prompt + len(items)}
        choice = {"index": 0, "text": " ".join(map(str, items)), "token_ids": items, "finish_reason": "length", "logprobs": None}
        usage = used | {"prompt_tokens_details": {"cached_tokens": answer["cached_tokens"]}}
        return {"object": "text_completion", "created": int(time.time()), "model": "hstu", "choices": [choice], "usage": usage}

    app.add_middleware(BodyLimit, most=options.max_body_bytes)
    return app


class BodyLimit:
    """ASGI: answers 413 as soon as a body is longer than `most` bytes, declared or not."""

    def __init__(self, app, most: int):
        self.app, self.most = app, most

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.most:
            return await self._refuse(scope, receive, send)
        read = 0

        async def counted():
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.most:
                raise HTTPException(413, f"the body is longer than {self.most:,} bytes: send fewer events")
            return message

        await self.app(scope, counted, send)

    async def _refuse(self, scope, receive, send) -> None:
        await failure(413, "http_error", f"the body is longer than {self.most:,} bytes: send fewer events")(scope, receive, send)


class _Server(uvicorn.Server):
    """On SIGTERM: readiness turns red, nothing new is accepted, what was accepted is answered, then the engine stops."""

    def handle_exit(self, sig: int, frame) -> None:
        self.config.app.state.service.draining = True
        self.force_exit = self.should_exit and sig == signal.SIGINT  # a second Ctrl-C does not wait
        self.should_exit = True


def serve(options: ServerOptions, settings: dict) -> int:
    """Listen until SIGTERM or Ctrl-C; the exit status. Raises ServerError where the port is taken or the engine is broken."""
    app = make_app(options, settings)
    config = uvicorn.Config(
        app, host=options.host, port=options.port, log_level="warning", access_log=False,
        timeout_graceful_shutdown=options.drain_seconds, lifespan="on", timeout_keep_alive=KEEP_ALIVE_SECONDS,
        loop="asyncio",  # uvloop leaves the closed port listening while requests drain: new clients would hang
    )  # fmt: skip
    try:
        sockets = [config.bind_socket()]
    except SystemExit as error:
        raise ServerError(
            f"port {options.port} of {options.host} cannot be taken: another service listens; give --port"
        ) from error
    print(f"listening on http://{options.host}:{sockets[0].getsockname()[1]}; /ready tells when the engine is up", flush=True)
    server, engine = _Server(config), app.state.service.engine
    engine.on_broken = functools.partial(setattr, server, "should_exit", True)
    server.run(sockets)
    if engine.broken:
        raise ServerError(f"the engine cannot start: {engine.broken}")
    return 0
