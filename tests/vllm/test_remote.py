"""Two `vold serve` engines behind HTTP: transformers' answers with every set of weights, also when one is killed."""

from __future__ import annotations

import base64
import io
import random
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("vllm.version", reason="vLLM has an environment of its own: make test-vllm")

from engines import Engine
from test_sampler import CPU, agree, all_logits, other_weights, prompts  # noqa: F401 - a fixture

from support import ranks
from support.steps import assign_token_weights, batch_of, gradients, make_groups, make_trainer, relative
from vold.config.schema import EngineConfig, ObjectiveConfig, PromptConfig, SamplingConfig, VllmConfig
from vold.data.packing import pack
from vold.data.problems import Problem
from vold.data.prompts import build_prompt
from vold.models.architecture import Architecture
from vold.models.images import load_prompt_encoder
from vold.models.tokenizer import load_tokenizer
from vold.objectives import build_objective
from vold.parallel.launch import initialise, shutdown
from vold.rollout import TransformersSampler, open_sampler
from vold.rollout.vllm import http
from vold.rollout.vllm.engines import Request, load_sizes, sized_images
from vold.teacher import Teacher, VllmDistributions, VllmTeacher
from vold.types import Sample

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def engines(tiny_student_dir, tmp_path_factory):
    logs = tmp_path_factory.mktemp("engines")
    found = [Engine(tiny_student_dir, logs / f"{number}.log") for number in range(2)]
    try:
        for engine in found:
            engine.wait()
        yield found
    finally:
        for engine in found:
            engine.kill()


def remote(engines, **settings) -> VllmConfig:
    return VllmConfig(urls=tuple(engine.url for engine in engines), secret_file=engines[0].secret_file, **settings)


def test_a_stranger_gets_nothing(engines, tiny_student_dir, tmp_path):
    """Neither weights nor paths nor connections: vLLM's own endpoints stay behind the guard."""
    import httpx2

    url, secret = engines[0].url, engines[0].secret_file.read_text().strip()
    ours = {"x-vold-secret": secret}
    for path in ("/collective_rpc", "/inference/v1/generate", "/v1/completions", "/invocations", "/sleep", "/tokenize"):
        for headers in ({}, {"x-vold-secret": secret[:-1]}, {"authorization": f"Bearer {secret}"}):
            assert httpx2.post(url + path, json={}, headers=headers).status_code == 401
        if path not in ("/collective_rpc", "/inference/v1/generate"):
            assert httpx2.post(url + path, json={}, headers=ours).status_code == 404
    for call in (
        {"method": "load_policy", "args": ["/etc"]},
        {"method": "load_policy", "args": [str(tmp_path)]},
        {"method": "receive_policy", "args": ["192.0.2.1", 80, 1, 2]},
        {"method": "save_sharded_state", "args": [str(tmp_path)]},
    ):
        assert httpx2.post(f"{url}/collective_rpc", json=call, headers=ours).status_code == 403
    picture = {"token_ids": [1], "sampling_params": {"max_tokens": 1}}
    for image in ("http://127.0.0.1:9/x.png", f"file://{tmp_path}/x.png"):
        body = picture | {"content_parts": [{"type": "image_url", "url": image}]}
        assert httpx2.post(f"{url}/inference/v1/generate", json=body, headers=ours, timeout=60).status_code >= 400
    assert httpx2.get(f"{url}/health").status_code == 200
    settings = VllmConfig(urls=(url,), secret_file=tmp_path / "another")
    with pytest.raises(ValueError, match=r"HTTP 401: .*give both the same vllm.secret_file"):
        open_sampler(EngineConfig(engine="vllm", vllm=settings), tiny_student_dir, dtype=torch.float32, device=CPU)


def test_weights_by_a_stream(engines, prompts, tiny_student_dir):  # noqa: F811
    """`transport: nccl` on a CPU is gloo; all engines receive together."""
    settings = VllmConfig(
        urls=tuple(engine.url for engine in engines), secret_file=engines[0].secret_file, transport="nccl"
    )
    vllm = open_sampler(EngineConfig(engine="vllm", vllm=settings), tiny_student_dir, dtype=torch.float32, device=CPU)
    pair = vllm, TransformersSampler(tiny_student_dir, dtype=torch.float32, device=CPU)
    found = [agree(pair, prompts)]
    for seed in (1, 2):
        for sampler in pair:
            sampler.load_weights(iter(other_weights(tiny_student_dir, seed)))
        found.append(agree(pair, prompts * 2)[: len(prompts)])
    assert len({tuple(ids) for ids in found}) == 3, "the weights matter"


def test_a_teacher_behind_the_engines(engines, prompts, tiny_student_dir):  # noqa: F811
    """One with eyes, at the run's temperature."""
    settings = remote(engines)
    expected = TransformersSampler(tiny_student_dir, dtype=torch.float32, device=CPU)
    rollouts = expected.sample(prompts, SamplingConfig(max_new_tokens=12), responses=2, seed=0)
    teacher = VllmTeacher(tiny_student_dir, settings, temperature=0.7)
    scores = teacher.submit(rollouts).result()
    for rollout, found in zip(rollouts, scores, strict=True):
        logp = (all_logits(expected, rollout) / 0.7).log_softmax(-1)
        logp = logp.gather(1, torch.tensor(rollout.response_ids.tolist())[:, None])[:, 0]
        assert found == pytest.approx(logp.tolist(), rel=0, abs=1e-4)
    teacher.close()


def test_whole_distributions_from_behind_the_engines(engines, prompts, tiny_student_dir, layout):  # noqa: F811
    """Hidden states over HTTP, text and images: the same bits' worth as those of a teacher in the trainer."""
    responses = [(5, 6, 7), tuple(range(8, 20)), (9,), (10, 11)]
    samples = [Sample(prompt, ids, 0.0, 0.0, 1.0) for prompt, ids in zip(prompts, responses, strict=True)]
    encode, size = load_prompt_encoder(tiny_student_dir), len(load_tokenizer(tiny_student_dir))
    numbers = {"dtype": torch.float32, "vocab_size": size}
    inside = Teacher(tiny_student_dir, layout, full_distributions=True, encode=encode, **numbers)
    rows = Architecture.from_pretrained(tiny_student_dir).vocab
    outside = VllmDistributions(tiny_student_dir, remote(engines), layout, student_rows=rows, **numbers)
    batch = pack(samples, max_tokens=1 << 20, encode=encode)
    (expected,), (found,) = (teacher.score(batch).micro_batches for teacher in (inside, outside))
    assert torch.equal(found.head_teacher_UE, expected.head_teacher_UE)
    assert (found.hidden_teacher_nE - expected.hidden_teacher_nE).abs().max() <= 1e-4
    assert outside.metrics == {"teacher_failed": 0.0}


def test_two_engines_and_the_death_of_one(engines, prompts, tiny_student_dir, capfd):  # noqa: F811
    config = EngineConfig(engine="vllm", vllm=remote(engines))
    vllm = open_sampler(config, tiny_student_dir, dtype=torch.float32, device=CPU)
    pair = vllm, TransformersSampler(tiny_student_dir, dtype=torch.float32, device=CPU)

    def sync_weights(seed: int) -> None:
        for sampler in pair:
            sampler.load_weights(iter(other_weights(tiny_student_dir, seed)))

    found = [agree(pair, prompts)]
    for seed in (1, 2):
        sync_weights(seed)
        found.append(agree(pair, prompts))
    assert len({tuple(ids) for ids in found}) == 3, "the weights matter"
    for prompt in prompts:
        ours, theirs = (sampler.score(prompt, (5, 6, 7)) for sampler in pair)
        assert ours == pytest.approx(theirs, rel=0, abs=1e-4)

    long = SamplingConfig(max_new_tokens=128)
    undisturbed = vllm.sample(prompts * 20, long, responses=4, seed=0)
    killer = threading.Timer(0.5, engines[0].kill)  # in the midst of some seconds of work
    killer.start()
    assert vllm.sample(prompts * 20, long, responses=4, seed=0) == undisturbed, "nothing is lost, the seeds are kept"
    killer.join()
    assert f"vold: engine {engines[0].url} gets no more requests: " in capfd.readouterr().err

    engines[0].start()  # with the weights of the checkpoint
    engines[0].wait()
    engines[1].kill()
    agree(pair, prompts)  # none is left that this sampler knows of: it finds the new one and brings it up to date
    sync_weights(3)
    assert f"vold: engine {engines[1].url} is left out: " in capfd.readouterr().err
    agree(pair, prompts)


def seen_pictures(folder: Path, count: int = 40) -> list[Path]:
    """Images of as many sizes and shapes, of every kind of pixel: colour, grey, transparent, turned, 16 bits."""
    draw = random.Random(0)
    paths = []
    for number in range(count):
        size = (
            (draw.randint(1, 400), draw.randint(20, 300))
            if number % 3
            else (28 * (1 + number % 9), 28 * (1 + number % 5))
        )
        size = (max(size[0], size[1] // 100 + 1), size[1])
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 4), np.uint8)
        mode = ("RGB", "RGBA", "L", "P", "I;16")[number % 5]
        if mode == "I;16":
            image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
        else:
            image = Image.fromarray(pixels, "RGBA").convert(mode)
        exif = Image.Exif()
        exif[0x0112] = 1 + number % 8
        paths.append(folder / f"{number}.png")
        image.save(paths[-1], exif=exif)
    return paths


def test_pictures_through_the_server_are_the_trainers(engines, tiny_student_dir, layout, tmp_path):
    """40 sizes: the pixels that travel, the number of tokens that the engine makes of each, and the hidden states."""
    encode, processor = load_prompt_encoder(tiny_student_dir), load_sizes(tiny_student_dir)
    tokenizer = load_tokenizer(tiny_student_dir)
    paths = seen_pictures(tmp_path)
    problems = [Problem(f"p{n}", "<image>what is it", images=(path,)) for n, path in enumerate(paths)]
    asked = [build_prompt(problem, tokenizer, PromptConfig(suffix="")) for problem in problems]
    for prompt in asked:
        (sized,) = sized_images(prompt, processor)
        url = http._data_url(sized)
        travelled = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        (own,) = processor.read(prompt.images)
        again = processor._processor(images=[travelled.convert("RGB")], return_tensors="pt")
        assert tuple(again["image_grid_thw"][0].tolist()) == own.grid_thw
        assert torch.equal(again["pixel_values"], own.pixel_values), "the trainer's pixels, bit by bit"
        request = Request.scoring(prompt, (5,), processor)
        address = http.Address(engines[0].url, engines[0].secret_file.read_text().strip())
        body = {"token_ids": request.token_ids, "sampling_params": {**request.params, "detokenize": False}}
        body["content_parts"] = [{"type": "image_url", "url": url}]
        answer = http.post(address, "/inference/v1/generate", body, 60.0)
        assert len(answer["prompt_logprobs"]) == encode.length(prompt) + 1
    samples = [Sample(prompt, (5, 6, 7), 0.0, 0.0, 1.0) for prompt in asked]
    numbers = {"dtype": torch.float32, "vocab_size": len(tokenizer)}
    inside = Teacher(tiny_student_dir, layout, full_distributions=True, encode=encode, **numbers)
    rows = Architecture.from_pretrained(tiny_student_dir).vocab
    outside = VllmDistributions(tiny_student_dir, remote(engines), layout, student_rows=rows, **numbers)
    batch = pack(samples, max_tokens=1 << 20, encode=encode)
    (expected,), (found,) = (teacher.score(batch).micro_batches for teacher in (inside, outside))
    assert (found.hidden_teacher_nE - expected.hidden_teacher_nE).abs().max() <= 1e-4


def on_two_ranks(student, url: str, secret, out) -> None:
    """Gradients at tensor parallelism 2, with the teacher in the trainer and behind the engine."""
    layout = initialise(2, 1, seed=0)
    size = len(load_tokenizer(student))
    objective = build_objective(ObjectiveConfig(preset="opd", divergence="reverse_kl"), 13)
    samples = objective.assign_token_weights(make_groups([[1.0, 0.0], [0.0, 1.0]]))
    numbers = {"dtype": torch.float32, "vocab_size": size}
    inside = Teacher(student, layout, full_distributions=True, **numbers)
    settings = VllmConfig(urls=(url,), secret_file=secret)
    rows = Architecture.from_pretrained(student).vocab
    outside = VllmDistributions(student, settings, layout, student_rows=rows, **numbers)
    trainer = make_trainer(student, layout, objective=objective, lr=0.05)
    trainer.step(batch_of(assign_token_weights("grpo", make_groups([[1.0, 0.0]]))))  # away from the teacher
    found = [gradients(trainer, teacher.score(batch_of(samples))) for teacher in (inside, outside)]
    assert outside.metrics == {"teacher_failed": 0.0}
    torch.save(
        [relative(found[1], found[0]), max(float(g.abs().max()) for g in found[0].values())], out / str(layout.tp_rank)
    )
    shutdown()


def test_tensor_parallel_ranks_share_what_one_asked(engines, tiny_student_dir, tmp_path):
    (tmp_path / "out").mkdir()
    arguments = (tiny_student_dir, engines[0].url, engines[0].secret_file, tmp_path / "out")
    ranks.run(2, on_two_ranks, *arguments, logs=tmp_path / "logs")
    for rank in range(2):
        gap, largest = torch.load(tmp_path / "out" / str(rank), weights_only=True)
        assert gap <= 1e-2 and largest > 1e-4


def test_hidden_states_and_the_death_of_an_engine(engines, prompts, tiny_student_dir, layout, capfd):  # noqa: F811
    """As for the policy's: nothing is lost when one of two dies at work, and one that dies is found again; with none
    left the run ends by name."""
    for engine in engines:
        engine.kill()
        engine.start()
    for engine in engines:
        engine.wait()
    size, rows = len(load_tokenizer(tiny_student_dir)), Architecture.from_pretrained(tiny_student_dir).vocab
    settings = remote(engines, restart_seconds=2.0)
    numbers = {"dtype": torch.float32, "vocab_size": size, "student_rows": rows}
    teacher = VllmDistributions(tiny_student_dir, settings, layout, **numbers)
    draw = random.Random(0)
    samples = [
        Sample(prompts[n % len(prompts)], [draw.randrange(5, 30) for _ in range(90)], 0.0, 0.0, 1.0) for n in range(240)
    ]
    batch = pack(samples, max_tokens=4096, encode=load_prompt_encoder(tiny_student_dir))
    undisturbed = teacher.score(batch)
    killer = threading.Timer(0.5, engines[0].kill)
    killer.start()
    disturbed = teacher.score(batch)
    killer.join()
    assert teacher.metrics == {"teacher_failed": 0.0}
    for one, other in zip(undisturbed.micro_batches, disturbed.micro_batches, strict=True):
        assert (one.hidden_teacher_nE - other.hidden_teacher_nE).abs().max() <= 1e-4
    assert f"vold: engine {engines[0].url} gets no more requests: " in capfd.readouterr().err
    engines[1].kill()
    with pytest.raises(ValueError, match=r"no vLLM engine of .* answers"):
        teacher.score(batch)
