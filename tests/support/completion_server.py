"""A local server that speaks the completions protocol, with log-probs of a prompt's ids from a transformers model."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


class CompletionServer:
    """dialect: `prompt_logprobs`, as vLLM's; `echo`, with ids for names; `text`, with texts for names; `none`. faults:
    (status, body) of the next answers, one each. asked: the bodies. A context manager."""

    def __init__(self, model, dialect: str = "prompt_logprobs", *, vocab_size: int | None = None):
        self.model, self.dialect, self.vocab_size = model, dialect, vocab_size
        self.asked: list[dict] = []
        self.faults: list[tuple[int, str]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.asked.append(body)
                status, text = server.faults.pop(0) if server.faults else (200, json.dumps(server.answer(body)))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *_: None
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def answer(self, body: dict) -> dict:
        ids = body["prompt"]
        with torch.no_grad():
            logp = self.model(torch.tensor([ids])).logits[0, :, : self.vocab_size].float().log_softmax(-1)
        k = body.get("prompt_logprobs", body.get("logprobs"))
        steps: list[dict[int, float] | None] = [None]
        for position, id in enumerate(ids[1:]):
            top = logp[position].topk(k).indices.tolist()
            steps.append({i: float(logp[position, i]) for i in dict.fromkeys([id, *top])})
        if self.dialect == "prompt_logprobs" and "prompt_logprobs" in body:
            found = [step and {str(i): {"logprob": x, "rank": 0} for i, x in step.items()} for step in steps]
            return {"choices": [{"text": "", "prompt_logprobs": found}]}
        if self.dialect in ("echo", "text") and body.get("echo"):
            name = (lambda i: f"token_id:{i}") if self.dialect == "echo" else (lambda i: chr(65 + i % 26))
            logprobs = {
                "tokens": [name(i) for i in ids],
                "token_logprobs": [step and step[i] for step, i in zip(steps, ids, strict=True)],
                "top_logprobs": [step and {name(i): x for i, x in step.items()} for step in steps],
            }
            return {"choices": [{"text": "", "logprobs": logprobs}]}
        return {"choices": [{"text": ""}]}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()
