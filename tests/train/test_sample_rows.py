"""Rows of samples.jsonl."""

from __future__ import annotations

from vold.train.sample_rows import token_texts


def test_a_character_of_several_tokens_is_shown_once():
    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode(errors="replace")

    assert token_texts(Bytes(), [97, *"é".encode(), 98]) == ["a", "", "é", "b"]
    assert token_texts(Bytes(), [97, "é".encode()[0]]) == ["a", "\ufffd"]
    assert token_texts(Bytes(), [0xFF, 0xFF, 0xFF, 0xFF, 97]) == ["", "", "", "\ufffd" * 4, "a"]
