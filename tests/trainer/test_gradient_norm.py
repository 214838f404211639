"""The gradient's norm, read once from the device, is Megatron's to the bit at every layout, and so is clipping."""

from norm_ranks import body

from support import ranks, tiny


def test_norm_and_clipping_are_megatrons(tmp_path):
    student = tiny.save(tiny.FAMILIES["qwen3"](), tmp_path / "student")
    ranks.run(4, body, str(student), logs=tmp_path / "logs")
