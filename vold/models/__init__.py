"""The families of vold.models.families on Megatron layers; weights and tokenizers in Hugging Face's formats."""

import vold.parallel  # noqa: F401 - its warning filter must be in place before Megatron is imported
