"""Run a step on the fake device and print what a reader wants to know of it."""

import argparse
import time

from .device import install
from .models import MODELS
from .step import Case, run_step

PHASES = ("teacher", "student_forward", "student_backward", "optimizer", "step", "export")

parser = argparse.ArgumentParser(prog="python -m benchmarks.fake_cuda", description=__doc__)
parser.add_argument("--student", default="qwen3-1.7b", choices=MODELS)
parser.add_argument("--teacher", default="qwen3-8b", choices=[*MODELS, "none"])
parser.add_argument("--offload", action="store_true")
parser.add_argument("--image", type=int, nargs=2, metavar=("ROWS", "COLUMNS"), help="patches of each prompt's image")
parser.add_argument("--microbatch-tokens", type=int, default=16384)
parser.add_argument("--tp", type=int, default=1)
parser.add_argument("--layers", type=int, help="fewer than the models have, for a quick look")
arguments = parser.parse_args()
install()
started = time.process_time()
step = run_step(
    Case(
        student=arguments.student,
        teacher=None if arguments.teacher == "none" else arguments.teacher,
        offload=arguments.offload,
        image_patches=tuple(arguments.image) if arguments.image else None,
        microbatch_tokens=arguments.microbatch_tokens,
        world=arguments.tp,
        tp=arguments.tp,
        layers=arguments.layers,
    )
)
trace = step.trace
micro_batches = [(m.tokens.input_ids_T.numel(), m.target_N.numel()) for m in step.batch.micro_batches]
print(f"{step.parameters:,} parameters; (T, N) of micro-batches {micro_batches}; {step.branches}")
print(f"{time.process_time() - started:.1f} s of CPU, {sum(trace.operations.values()):,} operations")
for phase in PHASES:
    operations = {op: count for op, count in trace.operations.items() if op.phase == phase}
    tflop = sum(op.flops * count for op, count in operations.items()) / 1e12
    gigabytes = sum(op.bytes * count for op, count in operations.items()) / 1e9
    peak, waits = trace.peaks[phase] / 2**30, trace.waits_by_site(phase)
    launches = sum(count for op, count in operations.items() if not op.is_free)
    print(f"\n{phase}: {launches:,} launches, {tflop:.1f} TFLOP, {gigabytes:.1f} GB, peak {peak:.2f} GiB")
    print(f"  {sum(waits.values())} host waits")
    for where, count in waits.items():
        print(f"  {count:5} {where}")
print("\nissues:")
for issue, count in trace.issues.items():
    print(f"  {count:5} {issue}")
