"""A server that speaks Ollama's wire protocol in front of the real llama.cpp engine.

It stands in for Ollama where none is installed. It does what the genuine server does where a client can see it, its
faults included: prompts over the context are cut without a word, and other options reload the model.
`python tests/support/ollama_server.py` prints `ready http://127.0.0.1:PORT`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from headrace.errors import HeadraceError
from processors.generation.providers.base import Choices, Done, Finish, Text
from processors.generation.providers.gguf import read_header
from processors.generation.providers.llama_cpp import LlamaCpp, Options
from processors.generation.providers.llama_models import resolve
from schemas.control import Model

TEMPLATE = "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
JINJA = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
"""The same template, as the engine takes it."""
PULLABLE = {"smollm2:135m": "SmolLM2-135M-Instruct"}
SLOTS = 2


class Server:
    """The models on disk, and the one engine a model in memory."""

    def __init__(self, directory: Path) -> None:
        template = directory / "chatml.jinja"
        template.write_text(JINJA)
        self.engine = LlamaCpp("ollama", Options(embeddings="mean", chat_template=str(template)))
        self.directory = directory
        self.files: dict[str, Path] = {}
        self.loaded: dict[str, Model] = {}

    def name(self, given: str) -> str:
        return given if ":" in given else f"{given}:latest"

    def known(self, given: str) -> str:
        name = self.name(given)
        if name not in self.files:
            raise Refused(404, f"model '{given}' not found")
        return name

    async def hold(self, name: str, options: dict[str, Any]) -> Model:
        """Have the model in memory with this context; another one reloads it."""
        context = options.get("num_ctx", 4096)
        model = Model(
            id=name, provider="ollama", backend_tag=str(self.files[name]), context_length=context, max_concurrency=SLOTS
        )
        await self.engine.load(model)
        self.loaded[name] = model
        return model


class Refused(Exception):
    """An answer with Ollama's error shape."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def ndjson(lines: AsyncIterator[dict[str, Any]]) -> StreamingResponse:
    async def encoded() -> AsyncIterator[bytes]:
        async with contextlib.aclosing(lines) as source:  # type: ignore[type-var]
            async for line in source:
                yield json.dumps(line).encode() + b"\n"

    return StreamingResponse(encoded(), media_type="application/x-ndjson")


async def tags(request: Request) -> Response:
    server: Server = request.app.state.server
    models = [
        {"name": name, "model": name, "modified_at": now(), "size": path.stat().st_size, "digest": "0" * 64}
        for name, path in server.files.items()
    ]
    return JSONResponse({"models": models})


async def running(request: Request) -> Response:
    server: Server = request.app.state.server
    sizes = {one.model: one.bytes for one in await server.engine.resident()}
    models = [
        {
            "name": name,
            "model": name,
            "size": sizes[name],
            "size_vram": 0,
            "expires_at": "2318-01-01T00:00:00Z",
            "context_length": model.context_length,
        }
        for name, model in server.loaded.items()
        if name in sizes
    ]
    return JSONResponse({"models": models})


async def show(request: Request) -> Response:
    server: Server = request.app.state.server
    name = server.known((await request.json())["model"])
    header = read_header(server.files[name])
    info: dict[str, Any] = {key: value for key, value in header.metadata.items() if not isinstance(value, tuple)}
    info |= dict.fromkeys(header.lengths)  # the genuine server keeps arrays to itself, too
    info["general.parameter_count"] = sum(tensor.elements for tensor in header.tensors)
    return JSONResponse(
        {
            "modelfile": f"FROM {server.files[name]}",
            "template": TEMPLATE,
            "details": {"family": "llama", "quantization_level": "Q4_1"},
            "model_info": info,
            "capabilities": ["completion"],
        }
    )


async def generate(request: Request) -> Response:
    """Only what loads and unloads: an empty prompt."""
    server: Server = request.app.state.server
    body = await request.json()
    name = server.known(body["model"])
    if body.get("prompt"):
        raise Refused(501, "this server generates by /api/chat only")
    if body.get("keep_alive") == 0:
        if model := server.loaded.pop(name, None):
            await server.engine.unload(model)
        reason = "unload"
    else:
        await server.hold(name, body.get("options") or {})
        reason = "load"
    return JSONResponse({"model": name, "created_at": now(), "response": "", "done": True, "done_reason": reason})


async def chat(request: Request) -> Response:
    server: Server = request.app.state.server
    body = await request.json()
    name = server.known(body["model"])
    if body.get("tools"):
        raise Refused(400, f"registry.ollama.ai/library/{name} does not support tools")
    model = await server.hold(name, body.get("options") or {})
    asked = openai_body(body)
    asked["messages"], was_cut = await cut(server, model, asked["messages"])
    parts = answer(server, model, name, asked, was_cut)
    if body.get("stream", True):
        return ndjson(parts)
    return await whole(parts)


async def whole(stream: AsyncIterator[dict[str, Any]]) -> Response:
    parts = [part async for part in stream]
    if "error" in parts[-1]:
        raise Refused(500, parts[-1]["error"])
    content = "".join(part["message"]["content"] for part in parts)
    return JSONResponse({**parts[-1], "message": {"role": "assistant", "content": content}})


def openai_body(body: dict[str, Any]) -> dict[str, Any]:
    options = body.get("options") or {}
    asked = {"messages": body["messages"], "max_tokens": options.get("num_predict")}
    passed = ("temperature", "top_p", "seed", "stop", "presence_penalty", "frequency_penalty", "top_k", "min_p")
    asked |= {key: options[key] for key in passed if key in options}
    form = body.get("format")
    if form == "json":
        asked["response_format"] = {"type": "json_object"}
    elif form:
        asked["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": form}}
    return asked


async def cut(server: Server, model: Model, messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
    """What the genuine server does to a prompt over the context: drop old messages, then cut the text of the last.

    Also returns whether text was cut: the genuine server then counts exactly the context's tokens.
    """
    was_cut = False

    async def fits() -> bool:
        count = await server.engine.count_prompt(model, {"messages": messages})
        return count is not None and count < model.context_length

    while not await fits():
        first = next((at for at, one in enumerate(messages[:-1]) if one["role"] != "system"), None)
        if first is not None:
            messages = messages[:first] + messages[first + 1 :]
            continue
        text = messages[-1]["content"]
        if not text:
            break
        messages = [*messages[:-1], {**messages[-1], "content": text[len(text) // 8 + 1 :]}]
        was_cut = True
    return messages, was_cut


async def answer(
    server: Server, model: Model, name: str, asked: dict[str, Any], was_cut: bool
) -> AsyncIterator[dict[str, Any]]:
    head = {"model": name, "created_at": now(), "done": False}
    reason = "stop"
    try:
        async with contextlib.aclosing(server.engine.generate(model, asked)) as batches:
            async for batch in batches:
                for piece in batch:
                    if isinstance(piece, Text):
                        yield {**head, "message": {"role": "assistant", "content": piece.text}}
                    elif isinstance(piece, Finish):
                        reason = piece.reason
                    elif isinstance(piece, Choices):
                        raise RuntimeError("this server is never asked for more than text")
                    elif isinstance(piece, Done) and piece.usage is not None:
                        count = model.context_length if was_cut else piece.usage.prompt_tokens
                        yield {
                            **head,
                            "message": {"role": "assistant", "content": ""},
                            "done": True,
                            "done_reason": reason,
                            "prompt_eval_count": count,
                            "eval_count": piece.usage.completion_tokens,
                        }
    except HeadraceError as problem:
        yield {"error": f"an error was encountered while running the model: {problem.message}"}


async def pull(request: Request) -> Response:
    server: Server = request.app.state.server
    tag = (await request.json())["model"]

    async def steps() -> AsyncIterator[dict[str, Any]]:
        yield {"status": "pulling manifest"}
        if tag not in PULLABLE:
            yield {"error": "pull model manifest: file does not exist"}
            return
        path = resolve(PULLABLE[tag], None)
        size = path.stat().st_size
        for done in (0, size // 2, size):
            yield {"status": "pulling b179c9523d0e", "digest": "sha256:b179c9523d0e", "total": size, "completed": done}
        server.files[server.name(tag)] = path
        yield {"status": "success"}

    return ndjson(steps())


async def blob(request: Request) -> Response:
    server: Server = request.app.state.server
    digest = request.path_params["digest"]
    path = server.directory / digest.replace(":", "-")
    if request.method == "HEAD":
        return Response(status_code=200 if path.exists() else 404)
    seen = hashlib.sha256()
    with path.open("wb") as file:
        async for chunk in request.stream():
            seen.update(chunk)
            file.write(chunk)
    if digest != f"sha256:{seen.hexdigest()}":
        path.unlink()
        raise Refused(400, "digest mismatch")
    return Response(status_code=201)


async def create(request: Request) -> Response:
    server: Server = request.app.state.server
    body = await request.json()
    digest = next(iter(body["files"].values()))
    path = server.directory / digest.replace(":", "-")
    if not path.exists():
        raise Refused(400, f"no such blob {digest}")
    gguf = path.with_suffix(".gguf")
    if not gguf.exists():
        os.link(path, gguf)

    async def steps() -> AsyncIterator[dict[str, Any]]:
        yield {"status": "parsing GGUF"}
        server.files[server.name(body["model"])] = gguf
        yield {"status": "success"}

    return ndjson(steps())


async def embed(request: Request) -> Response:
    server: Server = request.app.state.server
    body = await request.json()
    model = await server.hold(server.known(body["model"]), body.get("options") or {})
    texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
    return JSONResponse({"model": body["model"], "embeddings": await server.engine.embed(model, texts)})


async def version(_: Request) -> Response:
    return JSONResponse({"version": "0.11.4"})


async def alive(_: Request) -> Response:
    return PlainTextResponse("Ollama is running")


async def refused(_: Request, problem: Exception) -> Response:
    status = problem.status if isinstance(problem, Refused | HeadraceError) else 500
    return JSONResponse({"error": str(problem)}, status_code=status)


def application(server: Server) -> Starlette:
    """The wire protocol over `server`."""
    return Starlette(
        routes=[
            Route("/", alive),
            Route("/api/version", version),
            Route("/api/tags", tags),
            Route("/api/ps", running),
            Route("/api/show", show, methods=["POST"]),
            Route("/api/generate", generate, methods=["POST"]),
            Route("/api/chat", chat, methods=["POST"]),
            Route("/api/pull", pull, methods=["POST"]),
            Route("/api/create", create, methods=["POST"]),
            Route("/api/blobs/{digest}", blob, methods=["HEAD", "POST"]),
            Route("/api/embed", embed, methods=["POST"]),
        ],
        exception_handlers={Refused: refused, HeadraceError: refused},
    )


async def main() -> None:
    """Serve on a free loopback port until stopped, or until standard input ends."""
    with tempfile.TemporaryDirectory(prefix="headrace-ollama-") as directory:
        server = Server(Path(directory))
        app = application(server)
        app.state.server = server
        web = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
        listener = socket.create_server(("127.0.0.1", 0))
        print(f"ready http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        serving = asyncio.create_task(web.serve(sockets=[listener]))
        parent = asyncio.create_task(asyncio.to_thread(sys.stdin.buffer.read))
        await asyncio.wait([serving, parent], return_when=asyncio.FIRST_COMPLETED)
        web.should_exit = True
        await serving
        await server.engine.close()


if __name__ == "__main__":
    asyncio.run(main())
