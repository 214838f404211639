"""The gradient's norm, read once from the device, is Megatron's to the bit at every layout, and so is clipping."""

from norm_ranks import body

from support import ranks


def test_norm_and_clipping_are_megatrons(tiny_student_dir, tmp_path):
    ranks.run(4, body, str(tiny_student_dir), logs=tmp_path)
