"""An OpenAI-style endpoint on the production adapter, which follows the production alias.

Answers are greedy, one at a time, by the code of the evaluation. On loopback the Host header is
checked, because any web page can make a name of its own point at 127.0.0.1; beyond loopback a token is required.
"""

import hmac
import ipaddress
import json
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retuner import bundle, registry
from retuner.answering import Answer, Answering
from retuner.errors import Refused, RetunerError
from retuner.registry_reads import PRODUCTION, read_alias
from retuner.runtime import Runtime

MAX_BODY_BYTES = 1 << 20
LOOK_SECONDS = 3.0
"""Between two looks at the production alias."""
FAILED_SECONDS = 60.0
"""Before a version that could not be loaded is tried again."""


def serve(
    runtime: Runtime,
    model_name: str,
    host: str,
    port: int,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),  # noqa: T201
) -> None:
    """Answer requests until SIGINT or SIGTERM.

    Errors: Refused when `host` is not loopback and there is no token, the port is taken, or nothing is in
    production; Unavailable when the registry or the base cannot be had.
    """
    import uvicorn

    if not is_loopback(host) and not runtime.serve_token:
        raise Refused(
            f"listening on {host} lets others in, and there is no token",
            "RETUNER_SERVE_TOKEN, or a loopback address",
            "set RETUNER_SERVE_TOKEN to a long random text, or leave --host out",
        )
    listening = _listen(host, port)
    production = Production(runtime, model_name, say)
    production.look()
    if not production.loaded:
        raise production.failure or Refused(
            f"{model_name} has no version in production",
            "one to answer with",
            "promote one (retuner promote VERSION); it is then followed without a restart",
        )
    address = listening.getsockname()
    shown = f"[{address[0]}]" if ":" in address[0] else address[0]
    say(f"{production.loaded.name} answers at http://{shown}:{address[1]}/v1")
    app = build_app(production, runtime.serve_token, check_host=is_loopback(host))
    config = uvicorn.Config(app, log_level="warning", server_header=False, timeout_graceful_shutdown=30)
    uvicorn.Server(config).run(sockets=[listening])


@dataclass(frozen=True)
class Loaded:
    name: str
    """`support@3`."""
    version: int
    answering: Answering


class Production:
    """What the production alias points to, in memory. The old version answers until the new one can."""

    def __init__(self, runtime: Runtime, model_name: str, say: Callable[[str], None]):
        self.runtime, self.model_name, self._say = runtime, model_name, say
        self.loaded: Loaded | None = None
        self.failure: RetunerError | None = None
        """Why `loaded` is not what the alias points to."""
        self._generating = threading.Lock()
        self._failed: tuple[int, float] | None = None

    def answer(self, loaded: Loaded, messages: list[dict[str, str]], max_new_tokens: int | None) -> Answer:
        """One at a time, by the version that was loaded when the request came."""
        with self._generating:
            return loaded.answering.answer(messages, max_new_tokens)

    def follow(self, stopping: threading.Event) -> None:
        while not stopping.wait(LOOK_SECONDS):
            self.look()

    def look(self) -> None:
        """Load what the alias points to now, if it is not loaded. A failure is kept in `failure`."""
        try:
            version = read_alias(self.runtime, self.model_name, PRODUCTION)
            if version is None:
                raise Refused(f"{self.model_name} has no version in production", f"the alias {PRODUCTION}")
            if self.loaded and version == self.loaded.version:
                self.failure = self._failed = None
                return
            if self._failed and self._failed[0] == version and time.monotonic() < self._failed[1]:
                return
            self._failed = (version, time.monotonic() + FAILED_SECONDS)
            self.loaded = self._load(version)
            self.failure = self._failed = None
            self._say(f"{self.loaded.name} is loaded and answers from now on")
        except Exception as error:  # noqa: BLE001 - whatever it is, the old version goes on answering
            failure = (
                error if isinstance(error, RetunerError) else RetunerError(f"{type(error).__name__}: {error}")
            )
            if str(failure) != str(self.failure):
                self._say(f"production is not followed: {failure.found}")
            self.failure = failure

    def _load(self, version: int) -> Loaded:
        self.runtime.home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.runtime.home) as folder:
            whole = registry.fetch_bundle(self.runtime, self.model_name, version, Path(folder, "bundle"))
            # Its weights and settings are used, its code is not: this process has its own.
            answering = Answering((whole / bundle.SETTINGS).parent, self.runtime)
        return Loaded(f"{self.model_name}@{version}", version, answering)


class _Exact(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Exact):
    type: Literal["text"]
    text: str


class ChatMessage(_Exact):
    role: str
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None

    def spelled(self) -> dict[str, str]:
        content = (
            self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        )
        return {"role": self.role, "content": content}


class StreamOptions(_Exact):
    include_usage: bool = False


class TextFormat(_Exact):
    type: Literal["text"]


Nothing = Annotated[list[Any], Field(max_length=0)]
Zero = Annotated[float, Field(ge=0, le=0)]
One = Annotated[float, Field(ge=1, le=1)]


class ChatRequest(_Exact):
    """What of OpenAI's chat request is understood. What would change how a version answers is refused, not ignored."""

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Zero | None = None
    top_p: One | None = None
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    stop: Nothing | None = None
    tools: Nothing | None = None
    logprobs: Literal[False] | None = None
    response_format: TextFormat | None = None
    seed: int | None = None
    user: str | None = None


def build_app(production: Production, token: str | None, check_host: bool) -> FastAPI:
    """The ASGI application; while it runs, a thread follows the alias."""

    @asynccontextmanager
    async def following(app: FastAPI) -> AsyncIterator[None]:
        stopping = threading.Event()
        thread = threading.Thread(target=production.follow, args=(stopping,), name="follow", daemon=True)
        thread.start()
        yield
        stopping.set()

    # The pages at /docs would load scripts from elsewhere.
    app = FastAPI(title="Retuner", lifespan=following, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, token=token, check_host=check_host)

    @app.exception_handler(HTTPException)
    async def http_error(request: Any, error: HTTPException) -> Response:
        return _error(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Any, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or "the body"
        what = "not supported" if first["type"] == "extra_forbidden" else first["msg"]
        return _error(400, f"{where}: {what}; answers are greedy text, one at a time", where)

    @app.exception_handler(Exception)
    async def defect(request: Any, error: Exception) -> Response:
        return _error(500, f"{type(error).__name__}; the server's log shows more")

    @app.get("/healthz")
    async def health() -> Response:
        loaded, failure = production.loaded, production.failure
        told = {"status": "behind" if failure else "ok", "model": loaded.name if loaded else None}
        return JSONResponse({**told, "problem": str(failure)} if failure else told)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        name = _served(production).name
        listed = [
            {"id": each, "object": "model", "owned_by": "retuner"} for each in (name, production.model_name)
        ]
        return {"object": "list", "data": listed}

    @app.post("/v1/chat/completions")
    async def complete(request: ChatRequest) -> Response:
        loaded = _served(production)
        if request.model not in (production.model_name, loaded.name):
            here = f"{production.model_name}, or {loaded.name},"
            return _error(
                404, f"the model {request.model!r} is not served here; {here} is", "model", "model_not_found"
            )
        limit = request.max_completion_tokens or request.max_tokens
        messages = [message.spelled() for message in request.messages]
        try:
            answer = await run_in_threadpool(production.answer, loaded, messages, limit)
        except Refused as refusal:
            return _error(400, str(refusal), "messages")
        reply = _Reply(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), loaded.name, answer)
        if request.stream:
            usage = bool(request.stream_options and request.stream_options.include_usage)
            return StreamingResponse(reply.events(usage), media_type="text/event-stream")
        return JSONResponse(reply.whole())

    return app


def _served(production: Production) -> Loaded:
    if production.loaded is None:
        raise HTTPException(503, "no version is loaded")
    return production.loaded


@dataclass(frozen=True)
class _Reply:
    id: str
    created: int
    model: str
    answer: Answer

    def whole(self) -> dict[str, Any]:
        message = {"role": "assistant", "content": self.answer.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self._finish()}
        return {**self._head("chat.completion"), "choices": [choice], "usage": self._usage()}

    def events(self, with_usage: bool) -> Iterator[str]:
        head = self._head("chat.completion.chunk")
        for delta, finish in (
            ({"role": "assistant", "content": self.answer.text}, None),
            ({}, self._finish()),
        ):
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
            yield f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"
        if with_usage:
            yield f"data: {json.dumps({**head, 'choices': [], 'usage': self._usage()})}\n\n"
        yield "data: [DONE]\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _finish(self) -> str:
        return "stop" if self.answer.finished else "length"

    def _usage(self) -> dict[str, int]:
        prompt, answer = self.answer.prompt_tokens, self.answer.answer_tokens
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


class Guard:
    """Turns requests away before anything reads them: foreign hosts, no token, no JSON, too long a body."""

    def __init__(self, app: ASGIApp, token: str | None, check_host: bool):
        self.app, self.token, self.check_host = app, token, check_host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        body = b""
        refusal = self._refusal(scope, headers)
        while refusal is None:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > MAX_BODY_BYTES:
                refusal = _error(413, f"a body of more than {MAX_BODY_BYTES:,} bytes")
            if not message.get("more_body"):
                break
        if refusal is not None:
            return await refusal(scope, receive, send)
        read = False

        async def whole_body() -> Message:
            nonlocal read
            if read:
                return await receive()  # a disconnect, when it comes
            read = True
            return {"type": "http.request", "body": body, "more_body": False}

        return await self.app(scope, whole_body, send)

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> Response | None:
        if self.check_host and not is_loopback(_host_name(headers.get("host", ""))):
            return _error(421, "this server answers to its loopback names only")
        if self.token and scope["path"] != "/healthz":
            given = headers.get("authorization", "").encode()
            if not hmac.compare_digest(given, f"Bearer {self.token}".encode()):
                return _error(401, "a bearer token is required", code="invalid_api_key")
        # A web page can send other kinds to any address without asking first.
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":
            return _error(415, f"content-type is {kind or 'missing'}; application/json is understood")
        if int(headers.get("content-length") or 0) > MAX_BODY_BYTES:
            return _error(413, f"a body of more than {MAX_BODY_BYTES:,} bytes")
        return None


def _error(status: int, message: str, param: str | None = None, code: str | None = None) -> Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    told = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": told}, status, headers)


def _host_name(header: str) -> str:
    """`[::1]:8000` to `::1`, `localhost:8000` to `localhost`."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    address = "127.0.0.1" if host == "localhost" else host
    try:
        return socket.create_server(
            (address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET
        )
    except OSError as error:
        raise Refused(
            f"port {port} on {host} cannot be listened on: {error.strerror or error}",
            "a free port on an address of this machine",
            "name another with --port",
        ) from None
