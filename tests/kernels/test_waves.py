"""Sizes of chunks and tiles on GPUs of 108 (A100) and 132 SMs (H100, H200): whole waves, within the memory."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from vold_kernels import head, waves
from vold_kernels.chunks import TILE_COLUMNS, default_budget
from vold_kernels.waves import HeadShape

VOCAB = 151936
GIB = 1 << 30


def test_waves_by_hand():
    assert [waves.waves(128, 256 * n, 132) for n in (1, 132, 133, 264)] == [1, 1, 2, 2]
    assert waves.waves(129, 257, 4) == 1 and waves.waves(129, 513, 4) == 2
    assert waves.waves(4224, 8192, 132) == 8 and 4224 // 128 * 8192 // 256 == 8 * 132


@pytest.mark.parametrize("sms", [108, 132])
@pytest.mark.parametrize("tokens", [1, 127, 128, 3000, 8192, 32768])
@pytest.mark.parametrize("most", [128, 1000, 2208, 4416, 8192])
def test_chunks_are_the_best_of_all_sizes_that_fit(tokens, most, sms):
    shape = HeadShape(tokens, 2048, VOCAB)
    chosen = waves.resident_tokens(shape, most, sms)
    assert chosen % 128 == 0 and 128 <= chosen <= most
    best = min(waves.resident_flops(shape, size, sms) for size in range(128, most + 1, 128))
    assert waves.resident_flops(shape, chosen, sms) == best


def test_a_chunk_of_the_student_fills_the_processors():
    """dH of 2816 tokens, the equal third of 8192, is 176 blocks: two waves of 132 SMs, a third of them idle."""
    for sms, most in itertools.product((108, 132), (2208, 4416)):
        chosen = waves.resident_tokens(HeadShape(8192, 2048, VOCAB), most, sms)
        blocks = chosen // 128 * 8
        assert blocks / (waves.waves(chosen, 2048, sms) * sms) > 0.96
    assert waves.waves(2816, 2048, 132) == 2


def test_nothing_fits_below_a_block():
    assert waves.resident_tokens(HeadShape(8192, 2048, VOCAB), 127, 132) is None
    assert waves.tile(HeadShape(8192, 2048, VOCAB), 128 * 8191, (8192, 8192), 132) is None
    assert waves.tile(HeadShape(8192, 2048, VOCAB), 1 << 30, (8192, 16), 132) is None


@pytest.mark.parametrize("sms", [108, 132])
@pytest.mark.parametrize(("tokens", "rows"), [(1, VOCAB), (2048, 77), (8192, VOCAB), (30000, VOCAB // 8)])
def test_tiles_fit_and_end_where_a_segment_of_fold_ends(tokens, rows, sms):
    shape, numbers, most = HeadShape(tokens, 4096, rows), 64 << 20, (8192, 4 * TILE_COLUMNS)
    size = waves.tile(shape, numbers, most, sms)
    assert size[0] % 128 == 0 and size[0] * size[1] <= numbers and size[0] <= 8192 and size[1] <= most[1]
    assert size[1] % TILE_COLUMNS == 0 or size[1] == rows
    smallest = waves.tile_flops(shape, (128, min(TILE_COLUMNS, rows)), sms)
    assert waves.tile_flops(shape, size, sms) <= smallest


def test_a_single_chunk_has_nothing_to_run_under():
    shape = HeadShape(2048, 2048, VOCAB)
    alone = waves.resident_flops(shape, 2048, 132) - waves._chunk_flops(shape, 2048, 132)
    assert alone == pytest.approx(10 * VOCAB * 2048 * waves.FLOPS_PER_BYTE)


def test_memory_is_halved_where_it_is_short():
    assert [waves.bytes_within(8 * GIB, free * GIB) // GIB for free in (100, 16, 15, 8, 7, 4, 2)] == [
        8,
        8,
        4,
        4,
        2,
        2,
        1,
    ]
    assert waves.bytes_within(8 * GIB, 0) == GIB // 2


@pytest.mark.parametrize(("free", "tokens", "tile_tokens"), [(100, 4096, 2816), (9, 2048, 2816), (1, 256, 1408)])
def test_a_head_on_an_h200_chooses_by_whole_waves_and_free_memory(free, tokens, tile_tokens, monkeypatch):
    monkeypatch.setattr(head, "processors", lambda device: 132)
    monkeypatch.setattr(head, "free_bytes", lambda device: free * GIB)
    monkeypatch.setattr(head, "lanes_of", lambda device, overlap: SimpleNamespace(buffers=2))
    weight_UD = torch.empty(VOCAB, 2048, dtype=torch.bfloat16, device="meta")
    for ranks, expected in ((1, tokens), (2, 2048)):  # ranks of a group choose alike
        shard = SimpleNamespace(rows=VOCAB, sizes_R=torch.full((ranks,), VOCAB))
        one = head.Head(weight_UD, shard, 1.0, default_budget(torch.device("cuda")))
        assert one.resident_tokens(VOCAB, 8192) == expected
    assert one.tile(8192)[0] == tile_tokens and one.tile(8192)[1] % TILE_COLUMNS == 0
