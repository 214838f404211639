"""Who may ask an engine of `vold serve` for what: the secret that a run shares with its engines, and the ASGI
middleware that compares it.

vLLM's own --api-key leaves the calls that replace weights open, and anyone on the machine reaches its loopback port.
"""

from __future__ import annotations

import hmac
import json
import os
import re
import secrets
import socket
import stat
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ADAPTER_FOLDER = "adapter"
"""The folder with an adapter's files, in a version's folder (vold.rollout.vllm.adapters)."""
HEADER = "x-vold-secret"
SETTINGS = "VOLD_SERVE_GUARD"
"""Environment variable of the server with its Settings as JSON; the secret itself stays in its file."""
ALLOWED = {
    ("GET", "/weight_info"),
    ("POST", "/inference/v1/generate"),
    ("POST", "/collective_rpc"),
    ("POST", "/reset_mm_cache"),
    ("POST", "/reset_encoder_cache"),
    ("POST", "/reset_prefix_cache"),
    ("POST", "/update_weight_version"),
    ("POST", "/pause"),
    ("POST", "/resume"),
}
"""What RemoteEngines calls. vLLM's other endpoints fetch URLs and call any method of the engine."""
ADAPTER_CALLS = {("POST", "/v1/load_lora_adapter"): {"lora_name", "lora_path"}}
ADAPTER_CALLS[("POST", "/v1/unload_lora_adapter")] = {"lora_name"}
"""What it calls beside of an engine that gets adapters -> the body's keys."""
CALL_BYTES = 1 << 16  # body of a collective_rpc
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


def read_secret(path: Path) -> str:
    """The secret in a file of mode 600, which is written when it is missing: trainer and engines may start in any
    order. Raises ValueError where other users could read or have written it."""
    with suppress(FileExistsError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
        try:
            os.link(partial, path)  # complete or absent, and never over another
        finally:
            partial.unlink()
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise ValueError(f"vllm.secret_file = {path} cannot be read ({error.strerror}); choose another") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise ValueError(f"vllm.secret_file = {path} must be yours alone: chmod 600 {path}, or choose another")
        secret = os.read(descriptor, 4096).strip()
    finally:
        os.close(descriptor)
    if not re.fullmatch(rb"[\w-]{32,}", secret):
        raise ValueError(f"vllm.secret_file = {path} holds no secret of 32 or more letters and digits; delete it")
    return secret.decode()


@dataclass(frozen=True)
class Settings:
    """secret_file; checkpoint: directory that is served; weights_dir: whose folders hold new weights; streams: weights
    may come from another address; adapters: the engine gets adapters, and its weights stay."""

    secret_file: str
    checkpoint: str
    weights_dir: str
    streams: bool
    adapters: bool = False

    @classmethod
    def from_environment(cls) -> Settings:
        return cls(**json.loads(os.environ[SETTINGS]))

    def refusal(self, call: Any, client: str) -> str:
        """Why a collective_rpc is refused; "" where it is not. client: the address that it comes from."""
        if not isinstance(call, Mapping) or call.keys() - {"method", "args"} or not isinstance(call.get("args"), list):
            return "a call has a method and args"
        method, arguments = call.get("method"), call["args"]
        if method == "prepare_policy":
            return "" if all(isinstance(a, int | float) for a in arguments) else "its arguments are numbers"
        if method == "send_hidden_states":
            return "" if len(arguments) == 1 and isinstance(arguments[0], str) else "its argument is a request's name"
        if method == "keep_newest_adapter":
            return "" if self.adapters and not arguments else "this engine gets whole weights"
        if method in ("load_policy", "receive_policy") and self.adapters:
            return "this engine gets adapters (adapter.sync); give trainer and engine the same config"
        if method == "load_policy":
            ours = len(arguments) == 1 and isinstance(arguments[0], str) and self._is_ours(arguments[0])
            return "" if ours else "weights are read from the checkpoint and the run's folders in weights_dir"
        if method == "receive_policy":
            if not self.streams:
                return "vllm.transport of this engine is not nccl"
            near = len(arguments) == 4 and (arguments[0] == client or _is_here(arguments[0]))
            return "" if near else "weights are received from who asks for it alone"
        return f"{method!r} is not a call of vold's"

    def adapter_refusal(self, body: Any, keys: set[str]) -> str:
        """Why a call with an adapter's name, and its path, is refused; "" where it is not."""
        if not isinstance(body, Mapping) or body.keys() != keys or not all(isinstance(v, str) for v in body.values()):
            return f"an adapter's call has {' and '.join(sorted(keys))}"
        if not re.fullmatch(r"[\w-]{1,80}", body["lora_name"]):
            return "an adapter's name has letters and digits"
        path = Path(body.get("lora_path", ""))
        of_version = path.name == ADAPTER_FOLDER and path.parent != Path(self.checkpoint)
        is_ours = of_version and self._is_ours(str(path.parent)) and not path.is_symlink()
        return "" if is_ours or "lora_path" not in keys else "adapters are read from the run's folders in weights_dir"

    def _is_ours(self, name: str) -> bool:
        """The checkpoint, or a folder of ours directly below weights_dir that nobody else can write to."""
        path = Path(name)
        if not path.is_absolute() or ".." in path.parts or "\0" in name:
            return False
        if path == Path(self.checkpoint):
            return True
        with suppress(OSError):
            status = path.lstat()
            mine = status.st_uid == os.getuid() and not status.st_mode & 0o022
            return path.parent == Path(self.weights_dir) and stat.S_ISDIR(status.st_mode) and mine
        return False


def _is_here(address: object) -> bool:
    """Whether an address is one of this machine's."""
    if not isinstance(address, str):
        return False
    with suppress(OSError, UnicodeError, ValueError):
        family, kind, protocol, _, where = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(where)
            return True
    return False


class Guard:
    """ASGI middleware in front of vLLM's server: calls of RemoteEngines that carry the secret, and /health."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app, self._settings = app, Settings.from_environment()
        self._secret = read_secret(Path(self._settings.secret_file)).encode()

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":  # a websocket
            return await send({"type": "websocket.close", "code": 1008})
        where = (scope["method"], scope["path"])
        if where == ("GET", "/health"):
            return await self._app(scope, receive, send)
        given = [value for name, value in scope["headers"] if name.lower() == HEADER.encode()]
        if not hmac.compare_digest(given[0] if len(given) == 1 else b"", self._secret):
            return await _reply(send, 401, "this engine belongs to a run, whose secret the request does not carry")
        keys = ADAPTER_CALLS.get(where) if self._settings.adapters else None
        if where not in ALLOWED and keys is None:
            return await _reply(send, 404, "an engine of `vold serve` answers vold's own requests alone")
        if where[1] == "/collective_rpc" or keys is not None:
            body = await _body(receive)
            if reason := "too long" if body is None else self._refusal(_parse(body), keys, scope):
                return await _reply(send, 403, reason)
            receive = _replay(body)
        await self._app(scope, receive, send)

    def _refusal(self, body: Any, keys: set[str] | None, scope: dict[str, Any]) -> str:
        if keys is not None:
            return self._settings.adapter_refusal(body, keys)
        return self._settings.refusal(body, (scope.get("client") or ("",))[0])


async def _body(receive: Receive) -> bytes | None:
    """A request's body; None where it is longer than a call."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > CALL_BYTES:
            return None
        if not message.get("more_body"):
            return body


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _replay(body: bytes | None) -> Receive:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


async def _reply(send: Send, status: int, error: str) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})
