"""Who may ask an engine for what: strangers nothing, the run its own calls, and no other path, address or endpoint."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer

import pytest

from support.fake_engine import FakeEngine
from vold.config import dump_config, load_config
from vold.config.schema import EvalConfig, RlConfig, VllmConfig
from vold.rollout.vllm import http
from vold.rollout.vllm.guard import ADAPTER_CALLS, ALLOWED, SETTINGS, Guard, Settings, read_secret
from vold.rollout.vllm.http import Address, EngineFailed, get
from vold.rollout.vllm.remote import RemoteEngines, is_local


@pytest.fixture
def secret_file(tmp_path) -> Path:
    return tmp_path / "run" / "engines.secret"


@pytest.fixture
def settings(tmp_path, secret_file) -> Settings:
    (tmp_path / "weights").mkdir()
    (tmp_path / "student").mkdir()
    return Settings(str(secret_file), str(tmp_path / "student"), str(tmp_path / "weights"), streams=False)


@pytest.fixture
def ask(settings, monkeypatch):
    """ask(method, path, headers, body) -> (status of the guard or of the server behind it, body that reached it)."""
    monkeypatch.setenv(SETTINGS, json.dumps(asdict(settings)))
    reached: list[bytes | None] = []

    async def server(scope, receive, send) -> None:
        reached.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    guard = Guard(server)

    def ask(method: str, path: str, headers: dict | None = None, body: bytes = b"{}", client=("127.0.0.1", 5)):
        sent: list[dict] = []
        parts = [
            {"type": "http.request", "body": body[:7], "more_body": True},
            {"type": "http.request", "body": body[7:]},
        ]

        async def receive():
            return parts.pop(0)

        async def send(message):
            sent.append(message)

        raw = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        scope = {"type": "http", "method": method, "path": path, "headers": raw, "client": client}
        reached.clear()
        asyncio.run(guard(scope, receive, send))
        return sent[0]["status"], reached[0] if reached else None

    return ask


@pytest.fixture
def ours(ask, secret_file) -> dict[str, str]:
    return {"x-vold-secret": read_secret(secret_file)}


def test_strangers_get_nothing_but_health(ask, ours):
    secret = ours["x-vold-secret"]
    wrong = [{}, {"x-vold-secret": ""}, {"x-vold-secret": secret[:-1]}, {"x-vold-secret": secret + "x"}]
    wrong += [{"authorization": f"Bearer {secret}"}, {"cookie": f"x-vold-secret={secret}"}]
    for method, path in [*ALLOWED, ("GET", "/metrics"), ("POST", "/invocations"), ("OPTIONS", "/collective_rpc")]:
        for headers in wrong:
            assert ask(method, path, headers) == (401, None)
    assert ask("GET", "/health")[0] == 200


def test_the_run_gets_its_own_calls_alone(ask, ours):
    call = json.dumps({"method": "prepare_policy", "args": [100, 0.7]}).encode()
    for method, path in ALLOWED:
        assert ask(method, path, ours, call)[0] == 200
    assert ask("POST", "/collective_rpc", {"X-Vold-Secret": ours["x-vold-secret"]}, call) == (200, call)
    for path in ("/v1/chat/completions", "/invocations", "/sleep", "/load_lora_adapter", "/docs", "/health/"):
        for method in ("GET", "POST"):
            assert ask(method, path, ours) == (404, None)


def test_a_websocket_is_closed(ask, ours, settings, monkeypatch):
    sent: list[dict] = []

    async def send(message):
        sent.append(message)

    asyncio.run(Guard(None)({"type": "websocket", "path": "/v1/realtime", "headers": []}, None, send))
    assert [message["type"] for message in sent] == ["websocket.close"]


CALLS = [
    b"",
    b"[]",
    b"[" * 50_000,
    b"{" + b" " * 100_000,
    b'{"method": "load_policy", "args": ["/etc"], "kwargs": {}}',
    b'{"method": ["load_policy"], "args": ["/etc"]}',
    b'{"method": "load_policy", "args": "/"}',
    b'{"method": "__reduce__", "args": []}',
    b'{"method": "load_policy", "args": [["/etc"]]}',
    b'{"method": "prepare_policy", "args": ["os.system"]}',
    b'{"method": "receive_policy", "args": ["127.0.0.1", 80, 1, 2]}',
    b'{"method": "send_hidden_states", "args": [["name"]]}',
    b'{"method": "take_hidden_states", "args": ["name"]}',
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: repr(call[:60]))
def test_other_calls_are_refused(ask, ours, call):
    assert ask("POST", "/collective_rpc", ours, call) == (403, None)


def test_weights_are_read_from_the_runs_own_folders(settings, tmp_path, monkeypatch):
    weights = tmp_path / "weights"
    (weights / "vold-weights-1").mkdir(mode=0o700)
    (weights / "others").mkdir()
    (weights / "others").chmod(0o777)
    (weights / "link").symlink_to("/etc")
    (weights / "file").touch()
    (weights / "vold-weights-1" / "deep").mkdir(mode=0o700)
    refused = lambda path: settings.refusal({"method": "load_policy", "args": [str(path)]}, "127.0.0.1")  # noqa: E731
    assert not refused(weights / "vold-weights-1") and not refused(tmp_path / "student")
    for path in ("/etc", "/", "", ".", "vold-weights-1", weights, weights / "..", weights / "none", weights / "a\0b"):
        assert refused(path), path
    for path in ("others", "link", "file", "vold-weights-1/deep", "vold-weights-1/../others", "../student/.."):
        assert refused(f"{weights}/{path}"), path
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert refused(weights / "vold-weights-1"), "another user's"


def test_adapters_are_read_from_the_runs_own_folders_and_weights_stay(settings, tmp_path, ask, ours):
    weights, load = tmp_path / "weights", "/v1/load_lora_adapter"
    for name in ("vold-weights-1", "vold-weights-2"):
        (weights / name).mkdir(mode=0o700)
    (weights / "vold-weights-1" / "adapter").mkdir(mode=0o700)
    (weights / "vold-weights-2" / "adapter").symlink_to("/etc")
    good = {"lora_name": "ab12-3", "lora_path": str(weights / "vold-weights-1" / "adapter")}
    assert ask("POST", load, ours, json.dumps(good).encode())[0] == 404, "an engine of whole weights has no such call"
    adapted = replace(settings, adapters=True)
    refused = lambda body: adapted.adapter_refusal(body, ADAPTER_CALLS[("POST", load)])  # noqa: E731
    assert not refused(good)
    assert not adapted.adapter_refusal({"lora_name": "ab12-3"}, ADAPTER_CALLS[("POST", "/v1/unload_lora_adapter")])
    bad = [good | {"load_inplace": True}, good | {"lora_name": "../x"}, good | {"lora_name": 7}, {"lora_name": "a"}, []]
    places = [weights / "vold-weights-1", weights / "vold-weights-2" / "adapter", tmp_path / "adapter", "/etc/adapter"]
    places += [f"{weights}/vold-weights-1/../vold-weights-1/adapter", tmp_path / "student" / "adapter", ""]
    for body in [*bad, *(good | {"lora_path": str(place)} for place in places)]:
        assert refused(body), body
    for method, args in (("load_policy", [settings.checkpoint]), ("keep_newest_adapter", [1])):
        assert adapted.refusal({"method": method, "args": args}, "127.0.0.1")
    keep = {"method": "keep_newest_adapter", "args": []}
    assert not adapted.refusal(keep, "127.0.0.1") and settings.refusal(keep, "127.0.0.1")


def test_an_engine_connects_to_who_asks_alone(settings):
    streams = Settings(**{**asdict(settings), "streams": True})
    refused = lambda *args: streams.refusal({"method": "receive_policy", "args": list(args)}, "203.0.113.7")  # noqa: E731
    assert not refused("203.0.113.7", 29500, 1, 2) and not refused("127.0.0.1", 29500, 1, 2)
    for address in ("192.0.2.1", "example.invalid", "169.254.169.254", "", None, 7, "a" * 9999, "\ud800"):
        assert refused(address, 80, 1, 2), address
    assert refused("203.0.113.7")


def test_a_secret_is_made_once_and_read_by_all(secret_file):
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(read_secret(secret_file))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1 and len(found[0]) >= 32
    assert secret_file.stat().st_mode & 0o777 == 0o600
    assert list(secret_file.parent.iterdir()) == [secret_file]


@pytest.mark.parametrize("how", ["readable", "a link", "a folder", "a pipe", "empty", "short", "binary"])
def test_a_secret_that_others_may_know_is_refused(secret_file, how, tmp_path):
    secret_file.parent.mkdir()
    if how == "a link":
        secret_file.symlink_to(tmp_path / "elsewhere")
        read_secret(tmp_path / "elsewhere")
    elif how == "a folder":
        secret_file.mkdir()
    elif how == "a pipe":
        os.mkfifo(secret_file, 0o600)
    else:
        content = {"readable": b"x" * 40, "empty": b"", "short": b"x" * 31, "binary": b"\x00\xff" * 40}[how]
        secret_file.write_bytes(content)
        secret_file.chmod(0o644 if how == "readable" else 0o600)
    with pytest.raises(ValueError) as error:
        read_secret(secret_file)
    assert str(secret_file) in str(error.value) and len(str(error.value).splitlines()) == 1


def test_the_trainer_sends_its_secret(tiny_student_dir, secret_file, tmp_path):
    engine = FakeEngine(secret=read_secret(secret_file))
    try:
        options = {"urls": (engine.url,), "restart_seconds": 0.0, "weights_dir": tmp_path}
        RemoteEngines(tiny_student_dir, VllmConfig(**options, secret_file=secret_file))
        assert [path for path, _ in engine.calls][-1] == "/update_weight_version"
        with pytest.raises(ValueError, match=r"HTTP 401: .* give both the same vllm.secret_file"):
            RemoteEngines(tiny_student_dir, VllmConfig(**options, secret_file=tmp_path / "another"))
    finally:
        engine.stop()


def test_a_config_with_urls_has_the_secret_of_its_run(tmp_path):
    path = tmp_path / "rl.yaml"
    path.write_text(
        "{run_dir: r, student: s, data: {path: d, layout: orz}, steps: 1, optimizer: {lr: 1e-5}, "
        "rollout: {max_new_tokens: 8, engine: vllm}}"
    )
    assert load_config(RlConfig, path).rollout.vllm.secret_file is None
    urls = ["rollout.vllm.urls=[http://a:1]", "teacher_vllm.urls=[unix:/tmp/x.sock]", "teacher_vllm.secret_file=mine"]
    config = load_config(RlConfig, path, urls)
    assert (config.rollout.vllm.secret_file, config.teacher_vllm.secret_file) == (
        Path("r/engines.secret"),
        Path("mine"),
    )
    path.write_text(dump_config(config, "rl"))
    assert load_config(RlConfig, path) == config
    config = EvalConfig(run_dir="e", checkpoint="c", vllm={"urls": ["http://a:1"]})
    assert config.vllm.secret_file == Path("e/engines.secret")


def test_an_engine_behind_a_unix_socket(tmp_path):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"weight_version": self.headers["X-Vold-Secret"]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_args) -> None:
            pass

    path = tmp_path / "engine.sock"
    address = Address(f"unix:{path}", "s" * 40)
    with pytest.raises(EngineFailed):
        get(address, "/weight_info")
    with ThreadingUnixStreamServer(str(path), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        assert get(address, "/weight_info") == {"weight_version": "s" * 40}
        server.shutdown()
    assert is_local(address.url) and "s" * 40 not in repr(address)


def test_an_answer_without_end_is_cut(monkeypatch):
    monkeypatch.setattr(http, "ANSWER_BYTES", 1000)
    listener = socket.create_server(("127.0.0.1", 0))

    def pour() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(9999)
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            try:
                while True:
                    connection.sendall(b"x" * 4096)
            except OSError:
                pass

    threading.Thread(target=pour, daemon=True).start()
    with listener, pytest.raises(EngineFailed, match="an answer of more than 1000 bytes"):
        get(Address(f"http://127.0.0.1:{listener.getsockname()[1]}"), "/weight_info")
