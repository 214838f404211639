"""Process groups, collectives and the CPU platform."""

import warnings

# Megatron warns at every import that it will use torch instead; that is our choice (no TransformerEngine, no apex).
warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed")
warnings.filterwarnings("ignore", message="full scope is deprecated", module="megatron")
