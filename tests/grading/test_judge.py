"""The judge against a local server that speaks the chat completions protocol, and everything that such a server can do
wrong."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from support.chat_server import ChatServer, completion
from vold.config.schema import JudgeConfig
from vold.grading.judge import Judge

ROW = {
    "prompt": "2+2? {gold}",
    "response_text": "It is {prompt} 4.",
    "response_ids": [1],
    "gold": "4",
    "images": [],
    "metadata": {"topic": "sums"},
    "finish_reason": "stop",
}


@pytest.fixture
def server():
    with ChatServer() as server:
        yield server


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr("vold.endpoint.MAX_PAUSE", 0.01)


def ask(server, folder, *rows, **settings):
    config = JudgeConfig(url=server.url, model="judge-1", **settings)
    with Judge(config, folder) as judge:
        return [future.result() for future in [judge.submit(row) for row in rows or (ROW,)]]


def test_what_is_sent_and_what_comes_back(server, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    settings = {
        "template": "{prompt}|{gold}|{response}|{topic}",
        "system": "You grade.",
        "body": {"seed": 1, "max_tokens": None, "temperature": 0.5},
        "api_key_env": "JUDGE_KEY",
    }
    assert ask(server, tmp_path, **settings) == [{"score": 0.7}]
    assert server.paths == ["/v1/chat/completions"]
    assert server.headers[0]["Authorization"] == "Bearer s3cret"
    assert server.asked == [
        {
            "model": "judge-1",
            "messages": [
                {"role": "system", "content": "You grade."},
                {"role": "user", "content": "2+2? {gold}|4|It is {prompt} 4.|sums"},
            ],
            "temperature": 0.5,
            "seed": 1,
        }
    ]
    assert not any("s3cret" in path.read_text() for path in tmp_path.rglob("*.jsonl"))


def test_no_key_is_sent_unless_asked_for_and_a_missing_one_is_named(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "other")
    ask(server, tmp_path)
    assert "Authorization" not in server.headers[0]
    with pytest.raises(ValueError, match=r"reward.judge.api_key_env = NOT_SET: the environment has no such variable"):
        ask(server, tmp_path, api_key_env="NOT_SET")


def test_a_proxy_of_the_environment_is_not_asked_for_a_plain_http_address(server, tmp_path, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert ask(server, tmp_path, retries=0) == [{"score": 0.7}]


@pytest.mark.parametrize(
    ("answer", "settings", "expected"),
    [
        ("I thought of Score: 2 first.\n\n**Score:** 10", {}, {"score": 1.0}),
        ("score = 2.5", {}, {"score": 0.25}),
        ("Score: 11", {}, "the score 11 lies outside [0, 10]"),
        ("I cannot say.", {}, "no score (reward.judge.pattern) in the answer 'I cannot say.'"),
        ("", {}, "no score (reward.judge.pattern) in the answer ''"),
        ("Verdict: YES", {"pattern": r"Verdict: (\w+)", "scores": {"yes": 1, "no": -0.5}}, {"score": 1.0}),
        ("Verdict: no", {"pattern": r"Verdict: (\w+)", "scores": {"yes": 1, "no": -0.5}}, {"score": -0.5}),
        (
            "Verdict: maybe",
            {"pattern": r"Verdict: (\w+)", "scores": {"yes": 1}},
            "'maybe' is neither a number nor one of reward.judge.scores",
        ),
        ('{"grade": 3}', {"pattern": r'"grade":\s*(\d)', "lowest": 1, "highest": 5}, {"score": 0.5}),
        ("Score: nan", {"pattern": r"Score: (\w+)"}, "the score nan lies outside [0, 10]"),
        ("Score: -3", {}, "no score (reward.judge.pattern) in the answer 'Score: -3'"),
        ("Score: \x1b[31m", {}, "no score (reward.judge.pattern) in the answer 'Score: ⟨001B⟩[31m'"),
    ],
)
def test_the_score_is_read_from_the_answer_or_there_is_none(server, tmp_path, answer, settings, expected):
    server.answers = [completion(answer)]
    assert ask(server, tmp_path, **settings) == [expected]


@pytest.mark.parametrize(
    "trouble",
    [
        (500, "boom"),
        (503, "", ("Retry-After", "0")),
        (429, "slow down", ("Retry-After", "nonsense")),
        (200, "no JSON"),
        (200, "[]"),
        (200, '{"choices": []}'),
        (200, "[" * 100_000),
    ],
)
def test_what_may_pass_is_tried_again(server, tmp_path, trouble):
    server.answers = [trouble, trouble, completion("Score: 5")]
    assert ask(server, tmp_path, retries=2) == [{"score": 0.5}]
    assert len(server.asked) == 3
    server.asked.clear()
    (reason,) = ask(server, tmp_path / "other", retries=1)
    assert reason.startswith("no answer in 2 attempts: ") and "\n" not in reason


def test_a_refused_response_is_masked_and_a_refused_key_ends_the_run(server, tmp_path):
    server.answers = [(400, '{"error": "context\nlength"}')]
    assert ask(server, tmp_path, retries=3) == ['HTTP 400: {"error": "context length"}']
    assert len(server.asked) == 1
    for status in (401, 403, 404, 302):
        server.answers = [(status, "no", ("Location", f"{server.url}/elsewhere"))]
        with pytest.raises(ValueError, match=rf"/v1/chat/completions answers HTTP {status}: no; look at reward.judge"):
            ask(server, tmp_path / str(status))
    assert set(server.paths) == {"/v1/chat/completions"}, "a redirect is not followed"


def test_nobody_listens(server, tmp_path):
    server.http.server_close()
    (reason,) = ask(server, tmp_path, retries=1)
    assert reason.startswith("no answer in 2 attempts: ")


def test_a_server_that_answers_drop_by_drop_or_without_end_is_left(server, tmp_path, monkeypatch):
    monkeypatch.setattr("vold.grading.judge.MAX_BYTES", 1000)
    server.answers = [(200, "x" * 5000)]
    assert ask(server, tmp_path, retries=0) == ["no answer in 1 attempts: an answer of more than 60 s or 1000 bytes"]
    server.delay = 1.5
    (reason,) = ask(server, tmp_path, retries=0, seconds=0.2)
    assert reason.startswith("no answer in 1 attempts: ")


def test_scores_are_kept_on_disk_and_equal_questions_asked_once(server, tmp_path):
    other = ROW | {"response_text": "It is 5."}
    assert ask(server, tmp_path, ROW, other, ROW) == [{"score": 0.7}] * 3
    assert len(server.asked) == 2
    server.answers = [completion("Score: 0")]
    assert ask(server, tmp_path, other, ROW, pattern=r"Score: (\d)", retries=0) == [{"score": 0.7}] * 2
    assert len(server.asked) == 2, "a resumed run asks nothing again"
    assert ask(server, tmp_path, temperature=1.0) == [{"score": 0.0}], "another request"
    (tmp_path / "answers-half.jsonl").write_text('{"key": "a", "answ')
    assert ask(server, tmp_path) == [{"score": 0.7}]


def test_the_budget_counts_every_request_of_the_run(server, tmp_path):
    rows = [ROW | {"response_text": str(n)} for n in range(4)]
    spent = "reward.judge.budget = 3 requests is spent"
    settings = {"budget": 3, "concurrency": 1, "cache": tmp_path / "shared"}
    server.answers = [(500, "boom"), completion("Score: 7")]
    assert ask(server, tmp_path / "run", *rows, **settings) == [{"score": 0.7}, {"score": 0.7}, spent, spent]
    assert ask(server, tmp_path / "run", *rows, **settings) == [{"score": 0.7}, {"score": 0.7}, spent, spent]
    assert len(server.asked) == 3
    assert ask(server, tmp_path / "another", *rows, **settings) == [{"score": 0.7}] * 4


def test_requests_run_side_by_side_up_to_the_limit(server, tmp_path):
    server.delay = 0.2
    rows = [ROW | {"response_text": str(n)} for n in range(9)]
    assert ask(server, tmp_path, *rows, concurrency=3) == [{"score": 0.7}] * 9
    assert server.most == 3


def test_a_truncated_response_is_not_sent(server, tmp_path):
    assert ask(server, tmp_path, ROW | {"finish_reason": "length"}) == [{"score": 0.0}]
    assert not server.asked


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "localhost:8000"}, "match pattern"),
        ({"url": "http://user:pass@host/v1"}, "match pattern"),
        ({"pattern": "("}, "is no regular expression"),
        ({"pattern": "score"}, "has 0 groups; it needs one"),
        ({"lowest": 5, "highest": 5}, "must be below highest"),
        ({"template": "Is it good?"}, r"lacks \{response\}"),
        ({"api_key_env": "sk-123456"}, "the name of an environment variable, not the key itself"),
    ],
)
def test_mistakes_in_the_config(settings, message):
    with pytest.raises(ValidationError, match=message):
        JudgeConfig(**{"url": "http://h/v1", "model": "m"} | settings)
