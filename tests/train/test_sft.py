"""`vold sft` on a tiny world."""

from __future__ import annotations

import torch
from transformers import AutoModelForImageTextToText

from vold.run.run_dir import read_rows
from vold.train.sft import train_sft


def test_sft_lowers_the_loss_and_exports_a_loadable_model(load, tmp_path, layout, world):
    image = f"{{path: {world.data / 'val_image.jsonl'}, layout: geometry3k}}"
    sampling = "{max_new_tokens: 4, temperature: 0.0}"
    evaluated = [f"evaluation={{every: 6, sampling: {sampling}, sets: {{image: {image}}}}}"]
    config = load("sft", tmp_path / "sft", "steps=12", "optimizer.lr=3e-3", *evaluated)
    train_sft(config)
    rows = read_rows(config.run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    handed_over = [row for row in rows if "parity_error" in row]
    assert [row["step"] for row in handed_over] == [6, 12] and all(row["parity_max"] < 1e-4 for row in handed_over)
    assert all(0.0 <= row["accuracy_image"] <= 1.0 for row in handed_over)
    model = AutoModelForImageTextToText.from_pretrained(config.run_dir / "model")
    before = AutoModelForImageTextToText.from_pretrained(world.student).state_dict()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and not any("visual" in name for name in moved), "vision is frozen, the language model is not"
    assert any("embed_tokens" in name for name in moved)
