"""Lets `import torchvision` succeed without its compiled operators; on PYTHONPATH, so that vLLM's helpers have it too.

torchvision 0.28.0 is linked with CUDA, so beside a CPU build of torch its library does not load, and it then fails to
describe two operators that nobody declared. Qwen2.5-VL's processor imports torchvision but calls neither of them.
"""

import sys

MISSING = ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",)
MISSING += (MISSING[0].replace("nms", "qnms", 1),)


class DeclareOperators:
    """An import hook that finds nothing: it acts just before the module that describes the operators is read."""

    library = None

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "torchvision._meta_registrations":
            import torch

            if not hasattr(torch.ops.torchvision, "nms"):
                cls.library = torch.library.Library("torchvision", "DEF")
                for schema in MISSING:
                    cls.library.define(schema)


sys.meta_path.insert(0, DeclareOperators)
