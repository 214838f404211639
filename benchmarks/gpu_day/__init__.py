"""Everything that only a GPU can tell, in nine minutes on a bare machine: docs/gpu.md."""
