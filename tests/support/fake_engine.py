"""An HTTP server with the addresses of `vold serve` that RemoteEngines uses, and faults on demand."""

from __future__ import annotations

import json
import select
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from vold.rollout.vllm import weight_stream
from vold.rollout.vllm.hidden_states import ASK, to_json


class _Server(ThreadingHTTPServer):
    request_queue_size = 64  # connections that wait to be accepted; with the default of 5 some wait for a second

    def handle_error(self, request, client_address) -> None:
        """Prints nothing: a client may hang up on a bad answer."""


class FakeEngine:
    """Answers every request with the ids 1, 2, 3. `fault` changes how: see `_Handler.generate`; with a `victim`, only
    for requests that begin with this id. Requests that begin with one of `held` wait while it is there. secret: what a
    request must carry, where there is one."""

    def __init__(self, port: int = 0, secret: str = ""):
        self.secret = secret
        self.version, self.fault, self.answered, self.calls = "default", "", 0, []
        self.victim: int | None = None
        self.fault_of_calls = ""  # a worker's method that fails
        self.weights: dict[str, torch.Tensor] = {}  # that came by a stream
        self.hidden: dict[str, list] = {}  # by the name that a request gave its hidden states
        self.adapters: set[str] = set()
        self.width = 0  # of hidden states: each row is full of its token's id
        self.held: set[int] = set()
        self.twelve = threading.Barrier(12)
        self.hung_up = threading.Event()  # a client did not wait for its answer
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.engine = self
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_args) -> None:
        pass

    def do_GET(self) -> None:
        if self.refuses():
            return
        self.reply({"weight_version": self.server.engine.version})

    def do_POST(self) -> None:
        engine = self.server.engine
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.refuses():
            return None
        if self.path == "/inference/v1/generate":
            return self.generate(engine, body)
        engine.calls.append((self.path, body))
        if self.path.endswith("_lora_adapter"):
            change = engine.adapters.add if self.path == "/v1/load_lora_adapter" else engine.adapters.discard
            change(body["lora_name"])
            return self.reply(f"Success: LoRA adapter '{body['lora_name']}' done.")
        if engine.fault_of_calls and body.get("method") == engine.fault_of_calls:
            return self.reply({"error": "out of memory"}, 500)
        if body.get("method") == "receive_policy":
            address, port, rank, world = body["args"]
            received = weight_stream.receive(address, port, rank, world, torch.device("cpu"))
            if engine.fault == "dies":
                next(received)
                return self.reply({"error": "out of memory"}, 500)
            engine.weights = dict(received)
        if body.get("method") == "send_hidden_states":
            return self.reply({"results": [None, engine.hidden.pop(body["args"][0], None)]})
        if self.path == "/update_weight_version":
            engine.version = body["new_version"]
        self.reply({"success": True})

    def refuses(self) -> bool:
        secret = self.server.engine.secret
        if wrong := bool(secret) and self.headers["X-Vold-Secret"] != secret:
            self.reply({"error": "whose secret the request does not carry"}, 401)
        return wrong

    def generate(self, engine: FakeEngine, body: dict) -> None:
        asked, began = body["token_ids"], engine.version
        fault = engine.fault if engine.victim in (None, asked[0]) else ""
        while asked[0] in engine.held:
            if select.select([self.connection], [], [], 0.05)[0]:  # nothing more is sent: it is the end
                return engine.hung_up.set()
        if "model" in body and body["model"] not in engine.adapters:
            return self.reply({"error": {"message": f"The model `{body['model']}` does not exist."}}, 404)
        if fault == "all fail once":  # together: a barrier of the twelve
            engine.twelve.wait(60.0)
            engine.fault = ""
            return self.reply({"error": "broken"}, 500)
        if fault == "500":
            return self.reply({"error": "broken"}, 500)
        if fault == "400":
            return self.reply({"error": "too long"}, 400)
        if fault == "garbage":
            return self.reply("<html>", 200)
        if fault == "cut off":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            return self.wfile.write(b"{")
        if fault == "hang":  # past the client's time-out, who is gone then
            return select.select([self.connection], [], [], 60.0)
        n = body["sampling_params"].get("n", 1)
        choices = [choice([1, 2, 3], engine.version) for _ in range(n - (fault == "a response lost"))]
        if began != engine.version:  # new weights came on the way
            spans = [{"version": began, "start": 0, "end": 1}, {"version": engine.version, "start": 1, "end": 3}]
            choices = [{**found, "weight_versions": spans} for found in choices]
        if fault == "versions of other tokens":
            choices[0]["weight_versions"][0]["end"] = 2
        if fault == "other ids":
            choices[0]["logprobs"]["content"][1]["token_id"] = 9
        if fault == "no log-probs":
            choices[0].pop("logprobs")
        if fault == "ids of no token":
            choices = [choice([1, 2, 1 << 40], engine.version) for _ in range(n)]
        if fault == "negative ids":
            choices = [choice([1, 2, -3], engine.version) for _ in range(n)]
        if fault == "brackets":
            return self.reply("[" * 100_000)
        if fault == "nan":
            choices[0]["logprobs"]["content"][1]["logprob"] = float("nan")
        if fault == "restarted":
            choices[0]["weight_versions"][0]["version"] = "default"
        if asked_for := (body["sampling_params"].get("extra_args") or {}).get(ASK):
            name, count = asked_for
            rows = torch.tensor(asked[-count:], dtype=torch.float32)[:, None].expand(-1, engine.width)
            if fault == "nan":
                rows = rows * float("nan")
            if fault == "hidden states of another length":
                rows = rows[:-1]
            if fault != "no hidden states":
                engine.hidden[name] = to_json(rows)
            if fault == "too few bytes":
                engine.hidden[name][3] = "AAAA"
        scored = None
        if "prompt_logprobs" in body["sampling_params"]:  # minus a hundredth of each id
            scored = [None, *({str(token): {"logprob": -token / 100}} for token in asked[1:])]
            if fault == "scores of other ids":
                scored[-1] = {"99": {"logprob": -1.0}}
            if fault == "nan":
                scored[-1][str(asked[-1])]["logprob"] = float("nan")
            if fault == "too few scores":
                scored.pop()
        engine.answered += 1
        self.reply({"choices": choices, "prompt_logprobs": scored})

    def reply(self, answer, code: int = 200) -> None:
        text = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


def choice(ids: list[int], version: str) -> dict:
    content = [{"token_id": token, "logprob": -0.5} for token in ids]
    spans = [{"version": version, "start": 0, "end": len(ids)}]
    return {"token_ids": ids, "logprobs": {"content": content}, "weight_versions": spans}
