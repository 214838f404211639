"""The GPU code path, executed on a CPU on tensors without numbers.

Tensors say that they are on CUDA and have shapes, strides and dtypes, but no memory (torch's FakeTensorMode). All that
is above the kernels is the real thing: vold, Megatron, Liger's and torch's Python. What would run on the device is
written down instead (`Trace`): every operation with its shapes, FLOPs and bytes, every Triton launch, attention call
and collective, every wait of the host, and the bytes alive.

It cannot see numbers, streams, the order of NCCL calls, or what an operator allocates and frees inside one call.

    python -m benchmarks.fake_cuda --student qwen3-1.7b --teacher qwen3-8b

device.py    torch.cuda without a device, Triton launches, flash-attn; `install`, once for the rest of a process
engine.py    a backward pass in Python: torch's engine asks the device for streams
trace.py     `Trace`, what was executed; `tracing`, the modes that write it
values.py    numbers of small tensors that came from the host, so that shapes which depend on them are right
work.py      FLOPs and bytes of one operation
step.py      a trainer and a teacher of real sizes, one step
"""
