"""Engines behind HTTP and what can happen to them: each fault is named, nothing is lost, never half a group."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.fake_engine import FakeEngine
from vold.config.schema import AdapterConfig, VllmConfig
from vold.rollout.vllm import weight_files, weight_stream
from vold.rollout.vllm.adapters import EngineAdapter
from vold.rollout.vllm.engines import Request
from vold.rollout.vllm.remote import RemoteEngines, syncs_by_stream

REQUESTS = [Request((5, 6, 7), (), {"n": 3, "logprobs": 0}) for _ in range(12)]
# Of requests; of scores: see tests/teacher.
FAULTS = ["500", "garbage", "cut off", "hang", "a response lost", "other ids", "no log-probs", "nan", "restarted"]
FAULTS += ["ids of no token", "negative ids", "brackets", "versions of other tokens"]


@pytest.fixture
def two():
    engines = [FakeEngine(), FakeEngine()]
    yield engines
    for engine in engines:
        engine.stop()


@pytest.fixture
def connect(tiny_student_dir, tmp_path):
    def connect(engines, **settings) -> RemoteEngines:
        settings = {"timeout": 3.0, "restart_seconds": 0.0, "weights_dir": tmp_path, **settings}
        return RemoteEngines(tiny_student_dir, VllmConfig(urls=tuple(e.url for e in engines), **settings))

    return connect


def complete(remote: RemoteEngines) -> bool:
    """All requests are answered, each with all its responses."""
    found = dict(remote.stream(REQUESTS))
    return sorted(found) == list(range(12)) and all(
        [r.ids for r in a.responses] == [[1, 2, 3]] * 3 for a in found.values()
    )


def test_requests_are_spread(two, connect):
    assert complete(connect(two))
    assert all(engine.answered for engine in two)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_the_other_engine_takes_over(two, connect, capfd, fault):
    remote = connect(two, timeout=2.0 if fault == "hang" else 30.0)
    two[0].fault = fault
    assert complete(remote)
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith(f"vold: engine {two[0].url} gets no more requests: ")
    answered = two[0].answered
    assert complete(remote) and two[0].answered == answered, "it is not asked again"


def test_adapters_have_a_name_and_a_folder_a_version(two, tiny_student_dir, tmp_path):
    settings = VllmConfig(urls=tuple(e.url for e in two), weights_dir=tmp_path, transport="files")
    adapter = EngineAdapter(AdapterConfig(rank=2), tiny_student_dir)
    remote = RemoteEngines(tiny_student_dir, settings, adapter=adapter)
    assert remote._at(two[0].url).adapter == "", "the base, before the first version"
    for version in (1, 2):
        remote.load_weights([("a.lora_A.weight", torch.ones(2))], version)
        assert remote._at(two[0].url).adapter == remote._label and remote._label.endswith(f"-{version}")
        assert complete(remote)
    for engine in two:
        loaded = [body for path, body in engine.calls if path == "/v1/load_lora_adapter"]
        unloaded = [body["lora_name"] for path, body in engine.calls if path == "/v1/unload_lora_adapter"]
        assert len({body["lora_path"] for body in loaded}) == 2 and unloaded == [loaded[0]["lora_name"]]
        assert (
            not Path(loaded[0]["lora_path"]).exists() and Path(loaded[1]["lora_path"], "adapter_config.json").exists()
        )
        methods = [body.get("method") for _, body in engine.calls]
        assert methods.count("keep_newest_adapter") == 2 and "load_policy" not in methods
    for engine in two:  # started again, with the base
        engine.adapters.clear()
        engine.version = "default"
    assert complete(remote) and remote._label in two[0].adapters | two[1].adapters
    with pytest.raises(ValueError, match=r"adapter.sync = adapter travels in files"):
        RemoteEngines(tiny_student_dir, settings.model_copy(update={"transport": "nccl"}), adapter=adapter)


def test_a_dead_engine_is_left_out_until_it_is_back(two, connect, capfd):
    two[0].stop()
    remote = connect(two)
    assert f"engine {two[0].url} is left out: " in capfd.readouterr().err
    assert complete(remote)
    two[0] = FakeEngine(two[0].port)
    remote.load_weights([("a", torch.ones(2))], 1)
    assert two[0].version == two[1].version and two[0].version.endswith("-1")
    assert complete(remote) and two[0].answered


@pytest.mark.parametrize("fault", ["500", "garbage", "a response lost"])
def test_a_request_that_fails_everywhere_is_given_up_and_the_engines_go_on(two, connect, capfd, fault):
    """It is to blame, not they: they answer the others, and a trial."""
    remote = connect(two)
    for engine in two:
        engine.fault, engine.victim = fault, 77
    poisoned = Request((77, 6, 7), (), REQUESTS[0].params)
    found = dict(remote.stream([*REQUESTS, poisoned]))
    assert found.pop(12) is None and len(found) == 12 and all(found.values())
    assert "answers and gets requests again" in capfd.readouterr().err
    for engine in two:
        engine.answered = 0
    assert complete(remote) and all(engine.answered for engine in two)


def test_answers_come_as_they_finish(two, connect):
    remote = connect(two)
    for engine in two:
        engine.held = {5}
    stream = remote.stream([*REQUESTS[:2], Request((8, 6, 7), (), REQUESTS[0].params)])
    assert next(stream)[0] == 2
    for engine in two:
        engine.held = set()
    assert sorted(place for place, _ in stream) == [0, 1]


@pytest.mark.parametrize("keep", [True, False])
def test_requests_are_kept_over_new_weights_where_that_is_asked_for(two, tiny_student_dir, tmp_path, keep):
    """The engine pauses before the weights come and goes on when they have their name; each token has its version.
    Otherwise such an answer counts as none, and the request is sent again."""
    settings = VllmConfig(urls=(two[0].url,), weights_dir=tmp_path, timeout=30.0, restart_seconds=0.0)
    remote = RemoteEngines(tiny_student_dir, settings, keep_requests=keep)
    remote.load_weights([("a", torch.ones(2))], 1)
    two[0].held, two[0].calls = {5}, []
    stream = remote.stream([REQUESTS[0], Request((8, 6, 7), (), REQUESTS[0].params)])
    assert [r.versions for r in next(stream)[1].responses] == [[1, 1, 1]] * 3
    remote.load_weights([("a", torch.ones(2))], 2)
    two[0].held = set()
    _, found = next(stream)
    paths = [path.partition("?")[0] for path, _ in two[0].calls]
    if keep:
        assert [r.versions for r in found.responses] == [[1, 2, 2]] * 3
        assert paths == ["/collective_rpc", "/pause", "/collective_rpc", "/update_weight_version", "/resume"]
        assert two[0].calls[1][0] == "/pause?mode=keep&clear_cache=true"
    else:
        assert [r.versions for r in found.responses] == [[2, 2, 2]] * 3 and "/pause" not in paths


def test_an_engine_goes_on_where_its_weights_did_not_come(two, tiny_student_dir, tmp_path, monkeypatch):
    settings = VllmConfig(urls=tuple(e.url for e in two), weights_dir=tmp_path, timeout=30.0, restart_seconds=0.0)
    remote = RemoteEngines(tiny_student_dir, settings, keep_requests=True)
    two[0].fault_of_calls = "load_policy"
    remote.load_weights([("a", torch.ones(2))], 1)
    paths = [path.partition("?")[0] for path, _ in two[0].calls]
    assert paths[-1] == "/resume" and two[0].version.endswith("-0") and two[1].version.endswith("-1")
    assert complete(remote) and not two[0].answered


def test_who_wants_no_more_hangs_up(two, connect, capfd):
    """An engine aborts the requests of a client that is gone; nothing is said of it, and no engine is lost."""
    remote = connect(two)
    for engine in two:
        engine.held = {5}
    stream = remote.stream([*REQUESTS, Request((8, 6, 7), (), REQUESTS[0].params)])
    assert next(stream)[0] == 12
    stream.close()
    assert all(engine.hung_up.wait(60.0) for engine in two)
    for engine in two:
        engine.held = set()
    assert complete(remote) and not capfd.readouterr().err


def test_an_engine_started_again_is_found_before_the_next_weights(two, connect, capfd):
    remote = connect(two)
    two[0].fault = "500"
    assert complete(remote)
    two[0].stop()
    two[0] = FakeEngine(two[0].port)  # with the weights of the checkpoint, and no name for them
    remote._pool.next_check = 0.0
    assert complete(remote) and two[0].answered and two[0].version == two[1].version
    assert f"engine {two[0].url} answers and gets requests again" in capfd.readouterr().err


def test_late_failures_do_not_cost_an_engine_that_is_back(two, connect, capfd):
    """All twelve requests are under way when the only engine dies; one of them finds it again, started anew."""
    two[1].stop()
    remote = connect(two, restart_seconds=60.0)
    capfd.readouterr()
    two[0].fault = "all fail once"
    assert complete(remote)
    assert [line for line in capfd.readouterr().err.splitlines() if "gets no more requests" in line] == [
        f'vold: engine {two[0].url} gets no more requests: HTTP 500: {{"error": "broken"}}'
    ]


def test_no_engine_left_is_one_line(two, connect):
    remote = connect(two)
    for engine in two:
        engine.fault = "500"
    with pytest.raises(ValueError) as error:
        list(remote.stream(REQUESTS))
    assert "\n" not in str(error.value) and "no vLLM engine of" in str(error.value)


def test_nobody_there_is_one_line(two, connect):
    for engine in two:
        engine.stop()
    with pytest.raises(ValueError, match=f"no vLLM engine of {two[0].url}, {two[1].url} answers .*vold serve"):
        connect(two)


def test_no_place_for_weights_is_one_line(two, connect, tmp_path):
    with pytest.raises(ValueError, match=r"vllm.weights_dir = .*/none is no directory"):
        connect(two, weights_dir=tmp_path / "none")


def test_a_wrong_request_stops_the_run_and_costs_no_engine(two, connect):
    remote = connect(two)
    for engine in two:
        engine.fault = "400"
    with pytest.raises(ValueError, match=r"HTTP 400.*too long"):
        list(remote.stream(REQUESTS[:1]))
    for engine in two:
        engine.fault = ""
    assert complete(remote) and all(engine.answered for engine in two)


def test_an_engine_started_again_gets_its_weights_before_it_is_used(two, connect, tmp_path):
    """Both die; one comes back with the weights of the checkpoint."""
    remote = connect(two, restart_seconds=10.0)
    remote.load_weights([("a", torch.ones(2))], 1)
    for engine in two:
        engine.stop()
    two[1] = FakeEngine(two[1].port)
    assert complete(remote)
    paths = [path for path, _ in two[1].calls]
    assert paths[-1] == "/update_weight_version", "it says that it is up to date only when it is"
    loaded = [body["args"][0] for _, body in two[1].calls if body.get("method") == "load_policy"]
    assert loaded == [str(next(tmp_path.glob("vold-weights-*")))]


def test_weights_are_written_in_parts_and_caches_emptied(two, connect, tmp_path, monkeypatch):
    monkeypatch.setattr(weight_files, "PART_BYTES", 100)
    remote = connect(two)
    weights = {f"w{i}": torch.full((10,), float(i)) for i in range(7)}
    for version in (1, 2):
        for engine in two:
            engine.calls.clear()
        remote.load_weights(iter(weights.items()), version)
        (directory,) = tmp_path.glob("vold-weights-*")  # the version before is gone
        parts = [load_file(file) for file in sorted(directory.glob("*.safetensors"))]
        assert len(parts) == 3
        found = {name: tensor for part in parts for name, tensor in part.items()}
        assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)
        for engine in two:
            emptied = {path for path, _ in engine.calls if path.startswith("/reset_")}
            assert emptied == {"/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"}


# -- weights by a stream -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "draw"])
def test_auto_is_a_stream_from_gpus_to_another_machine(monkeypatch, host):
    settings = VllmConfig(urls=("http://localhost:8006", f"http://{host}:8007"))
    assert not syncs_by_stream(settings)  # there is no GPU
    assert syncs_by_stream(settings.model_copy(update={"transport": "nccl"}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert syncs_by_stream(settings) == (host == "draw")
    assert not syncs_by_stream(settings.model_copy(update={"transport": "files"}))


def test_all_engines_receive_one_stream(two, connect):
    remote = connect(two, transport="nccl")
    weights = {f"w{i}": torch.full((2, i + 1), float(i)) for i in range(4)}
    for version in (1, 2):
        remote.load_weights(iter(weights.items()), version)
        for engine in two:
            assert engine.weights.keys() == weights.keys() and engine.version.endswith(f"-{version}")
            assert all(torch.equal(engine.weights.pop(name), w) for name, w in weights.items())
    assert complete(remote) and all(engine.answered for engine in two)


def test_an_engine_that_was_away_waits_for_the_next_stream(two, connect, capfd):
    remote = connect(two, transport="nccl")
    two[0].stop()
    remote.load_weights([("a", torch.ones(2))], 1)
    assert f"engine {two[0].url} is left out: " in capfd.readouterr().err
    two[0] = FakeEngine(two[0].port)
    two[1].fault = "500"
    with pytest.raises(ValueError, match="no vLLM engine of"):  # the one that is back has other weights
        list(remote.stream(REQUESTS))
    two[1].fault = ""
    remote.load_weights([("a", torch.ones(2))], 2)
    assert complete(remote) and all(engine.answered for engine in two)


def test_an_engine_that_dies_in_the_stream_stops_the_run_in_one_line(two, connect, monkeypatch):
    monkeypatch.setattr(weight_stream, "SECONDS", 5.0)
    remote = connect(two, transport="nccl")
    two[0].fault = "dies"
    made = []
    weights = ((f"w{i}", made.append(i) or torch.ones(2)) for i in range(4))
    with pytest.raises(ValueError, match=r"weights were not sent .*vllm.transport = 'nccl'") as error:
        remote.load_weights(weights, 1)
    assert "\n" not in str(error.value) and made == [0, 1, 2, 3], "other ranks go through all of it, so does this one"


# -- ranks ---------------------------------------------------------------------------------------------------------


def test_ranks_share_engines_and_errors(two, tiny_student_dir, launch, tmp_path):
    """Each asks; rank 0 hands out what all of them stream; what it cannot write is every rank's one line."""
    script = Path(__file__).with_name("engine_ranks.py")
    done = launch(2, script, tiny_student_dir, tmp_path, *(engine.url for engine in two))
    assert done.returncode == 0, done.stderr
    said = sorted(re.findall(r"rank \d: .*?no room", done.stdout))  # the ranks may share a line
    assert said == [f"rank {rank}: 12 answers, 3 + 3 weights, no room" for rank in (0, 1)]
    assert two[0].answered + two[1].answered == 24 and two[0].version == two[1].version
