"""The rank, device and process groups of this process.

Only this file creates process groups. All other code receives a `Layout`.
"""

from __future__ import annotations

import datetime
import math
import os
import random
import socket
import time
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from vold.parallel import cpu
from vold.parallel.collectives import RanksLost, note_start, ranks_not_started, use_store

ValueT = TypeVar("ValueT")


@dataclass(frozen=True)
class LaunchEnvironment:
    """This process among all, from torchrun's environment variables; a world of one process without them."""

    rank: int
    world: int
    local_rank: int
    device: torch.device

    @classmethod
    def from_environment(cls) -> LaunchEnvironment:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")), local_rank, device)


@dataclass(frozen=True)
class GroupSizes:
    """The sizes by which the world is divided into groups, see Layout and ExpertLayout."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    vpp: int | None = None
    ep: int = 1
    etp: int = 1


@dataclass(frozen=True)
class ExpertLayout:
    """The division of a mixture's experts among the ranks of a pipeline stage: different experts (ep), parts of each
    expert (etp), copies (dp); a rank's numbers and groups in each. Other weights are divided as Layout says."""

    ep: int
    etp: int
    dp: int
    ep_rank: int
    etp_rank: int
    dp_rank: int
    ep_group: ProcessGroup
    etp_group: ProcessGroup
    dp_group: ProcessGroup


@dataclass(frozen=True)
class Layout:
    """The division of the world: tensor (tp), pipeline (pp), context (cp) and data (dp) parallel sizes, this rank's
    numbers, groups.

    replica_group  the ranks that hold the same parameters, cp x dp of them: gradients are summed over it
    stage_group  the ranks of this model copy's pipeline stage, tp x cp of them
    vpp  virtual pipeline stages per rank, or None;  sp  sequence parallelism inside the tp group
    distributed_optimizer  optimizer state is divided over replica_group;  recompute  none, swiglu, selective or full
    deterministic  two runs on CUDA are bit-equal;  offload_activations  they wait in CPU memory for the backward pass
    experts  the division of a mixture's experts
    """

    tp: int
    pp: int
    cp: int
    dp: int
    tp_rank: int
    pp_rank: int
    cp_rank: int
    dp_rank: int
    tp_group: ProcessGroup
    pp_group: ProcessGroup
    cp_group: ProcessGroup
    dp_group: ProcessGroup
    experts: ExpertLayout
    replica_group: ProcessGroup
    stage_group: ProcessGroup
    device: torch.device
    vpp: int | None = None
    sp: bool = False
    distributed_optimizer: bool = False
    recompute: str = "none"
    deterministic: bool = False
    offload_activations: bool = False

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    @property
    def is_first_of_stage(self) -> bool:
        """True on one rank of `stage_group`, its first."""
        return self.tp_rank == 0 and self.cp_rank == 0

    def from_last_stage(self, value: ValueT | None) -> ValueT:
        """The last pipeline stage's `value` (a small Python object) on every stage. All of them must call; the others'
        `value` is ignored."""
        box: list = [value]
        if self.pp == 1:
            return box[0]
        source = dist.get_global_rank(self.pp_group, self.pp - 1)
        dist.broadcast_object_list(box, src=source, group=self.pp_group, device=self.device)
        return box[0]


def initialise(
    tp: int = 1,
    pp: int = 1,
    *,
    seed: int,
    cp: int = 1,
    vpp: int | None = None,
    sp: bool = False,
    ep: int = 1,
    etp: int = 1,
    distributed_optimizer: bool = False,
    recompute: str = "none",
    deterministic: bool = False,
    offload_activations: bool = False,
    timeout_seconds: float = 1800.0,
) -> Layout:
    """Create (or reuse) the process groups, seed every generator and return this rank's layout.

    Raises ValueError when the sizes do not fit the world, and RanksLost when not all of its processes have come here
    within `timeout_seconds`. May be called again in one process: the world is kept, and
    the model-parallel groups are rebuilt only when their sizes change.
    """
    launch = LaunchEnvironment.from_environment()
    sizes = GroupSizes(tp, pp, cp, vpp, ep, etp)
    _check_sizes(launch.world, sizes, sp)
    if tp > 1:  # Megatron requires it: one queue to the GPU keeps its collectives ahead of the matmuls they overlap
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if launch.device.type == "cuda":
        _fix_order_of_sums(deterministic)
    cpu.install()
    _start_world(launch, timeout_seconds)
    _build_groups(sizes, timeout_seconds)
    _seed(seed)
    choices = {"distributed_optimizer": distributed_optimizer, "recompute": recompute, "deterministic": deterministic}
    choices["offload_activations"] = offload_activations
    return _layout(launch.device, vpp=vpp, sp=sp, **choices)


def fake_layout(
    rank: int,
    world: int,
    *,
    tp: int = 1,
    pp: int = 1,
    cp: int = 1,
    vpp: int | None = None,
    sp: bool = False,
    ep: int = 1,
    etp: int = 1,
    **choices,
) -> Layout:
    """The layout of one rank in a world that does not exist, whose groups send nothing: for shapes on the meta device,
    in a process without a visible GPU. Raises ValueError as `initialise` does; call `shutdown` when done."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    sizes = GroupSizes(tp, pp, cp, vpp, ep, etp)
    _check_sizes(world, sizes, sp)
    shutdown()
    cpu.install()
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    _build_groups(sizes)
    _seed_megatron(0)  # its layers look up generators by name
    return _layout(torch.device("meta"), vpp=vpp, sp=sp, **choices)


def shutdown() -> None:
    """Destroy all groups; safe to call twice."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _check_sizes(world: int, sizes: GroupSizes, sp: bool) -> None:
    given = {name: size for name, size in vars(sizes).items() if name != "vpp"}
    if min(given.values()) < 1:
        shown = " ".join(f"{name}={size}" for name, size in given.items() if size != 1)
        raise ValueError(f"parallel sizes must be at least 1, got {shown}: set the wrong one to 1")
    copy = {name: size for name, size in given.items() if name in ("tp", "pp") or (name == "cp" and size > 1)}
    ranks = math.prod(copy.values())
    if world % ranks:
        factors = " x ".join(f"{name}={size}" for name, size in copy.items())
        raise ValueError(
            f"{factors} = {ranks} does not divide the world of {world} processes: "
            f"start a multiple of {ranks} processes (torchrun --nproc-per-node) or lower {' or '.join(copy)}"
        )
    if sizes.vpp is not None and (sizes.pp == 1 or sizes.vpp < 2):
        raise ValueError(
            f"vpp={sizes.vpp} needs pp of at least 2 and at least 2 stages a rank, got pp={sizes.pp}: leave vpp unset"
        )
    if sp and sizes.tp == 1:
        raise ValueError(f"sp={sp} needs tp of at least 2, got tp={sizes.tp}: leave sp off")
    stage, ep, etp = world // sizes.pp, sizes.ep, sizes.etp
    if stage % (ep * etp):
        raise ValueError(
            f"ep={ep} x etp={etp} = {ep * etp} does not divide the {stage} processes of a pipeline stage: "
            "lower ep or etp, or start more processes"
        )


def _fix_order_of_sums(deterministic: bool) -> None:
    """Ask torch, cuBLAS and flash-attn (see layer_ops) for kernels that add up in a fixed order. Kernels without such a
    form warn."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would write every buffer once more


def _start_world(launch: LaunchEnvironment, timeout_seconds: float) -> None:
    if launch.device.type == "cuda":
        torch.cuda.set_device(launch.device)
    else:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or torch.get_num_threads()))
    if dist.is_initialized():
        return
    if "MASTER_ADDR" not in os.environ and launch.world > 1:
        raise ValueError(f"WORLD_SIZE={launch.world} but MASTER_ADDR is not set: start with torchrun")
    backend = "nccl" if launch.device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if launch.world > 1:
        store = _meet(launch, timeout)
        dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.world, timeout=timeout)
        return
    address = "env://" if "MASTER_ADDR" in os.environ else f"tcp://127.0.0.1:{_free_port()}"
    dist.init_process_group(backend, init_method=address, rank=launch.rank, world_size=launch.world, timeout=timeout)


def _meet(launch: LaunchEnvironment, timeout: datetime.timedelta) -> dist.Store:
    """The rendezvous store, once every rank has come to it. Raises RanksLost, naming those that have not."""
    where = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT')}"
    limit = f"within timeout_seconds = {timeout.total_seconds():g}"
    try:
        store, _, _ = next(dist.rendezvous("env://", launch.rank, launch.world, timeout=timeout))
        store.set_timeout(timeout)
        started, deadline = note_start(store, launch.rank), time.monotonic() + timeout.total_seconds()
        while started < launch.world and time.monotonic() < deadline:
            time.sleep(0.1)
            started = note_start(store)
        missing = ranks_not_started(store, launch.world) if started < launch.world else []
    except dist.DistError as error:
        reason = " ".join(str(error).split())[:200]
        raise RanksLost(
            f"the rendezvous at {where}, of rank 0 or torchrun, was not reached {limit}: {reason}"
        ) from None
    if missing:
        names = ", ".join(map(str, missing))
        raise RanksLost(f"rank {names} did not start {limit}: see its own output; the job ends")
    use_store(store)
    return store


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _build_groups(sizes: GroupSizes, timeout_seconds: float = 1800.0) -> None:
    from megatron.core import parallel_state as mpu

    if mpu.model_parallel_is_initialized():
        found = GroupSizes(
            mpu.get_tensor_model_parallel_world_size(),
            mpu.get_pipeline_model_parallel_world_size(),
            mpu.get_context_parallel_world_size(),
            mpu.get_virtual_pipeline_model_parallel_world_size(),
            mpu.get_expert_model_parallel_world_size(),
            mpu.get_expert_tensor_parallel_world_size(),
        )
        if found == sizes:
            return
        mpu.destroy_model_parallel()
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=sizes.tp,
        pipeline_model_parallel_size=sizes.pp,
        virtual_pipeline_model_parallel_size=sizes.vpp,
        context_parallel_size=sizes.cp,
        expert_model_parallel_size=sizes.ep,
        expert_tensor_parallel_size=sizes.etp,
        distributed_timeout_minutes=timeout_seconds / 60,
        create_gloo_process_groups=dist.get_backend() != "fake",
    )


def _seed(seed: int) -> None:
    """Python, torch and Megatron's named generators; the tp ranks of one replica differ only in the last."""
    random.seed(seed)
    torch.manual_seed(seed)
    _seed_megatron(seed)


def _seed_megatron(seed: int) -> None:
    from megatron.core import tensor_parallel

    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def _layout(device: torch.device, **choices) -> Layout:
    from megatron.core import parallel_state as mpu

    return Layout(
        tp=mpu.get_tensor_model_parallel_world_size(),
        pp=mpu.get_pipeline_model_parallel_world_size(),
        cp=mpu.get_context_parallel_world_size(),
        dp=mpu.get_data_parallel_world_size(),
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        pp_rank=mpu.get_pipeline_model_parallel_rank(),
        cp_rank=mpu.get_context_parallel_rank(),
        dp_rank=mpu.get_data_parallel_rank(),
        tp_group=mpu.get_tensor_model_parallel_group(),
        pp_group=mpu.get_pipeline_model_parallel_group(),
        cp_group=mpu.get_context_parallel_group(),
        dp_group=mpu.get_data_parallel_group(),
        experts=_expert_layout(),
        replica_group=mpu.get_data_parallel_group(with_context_parallel=True),
        stage_group=mpu.get_tensor_and_context_parallel_group(),
        device=device,
        **choices,
    )


def _expert_layout() -> ExpertLayout:
    from megatron.core import parallel_state as mpu

    return ExpertLayout(
        ep=mpu.get_expert_model_parallel_world_size(),
        etp=mpu.get_expert_tensor_parallel_world_size(),
        dp=mpu.get_expert_data_parallel_world_size(),
        ep_rank=mpu.get_expert_model_parallel_rank(),
        etp_rank=mpu.get_expert_tensor_parallel_rank(),
        dp_rank=mpu.get_expert_data_parallel_rank(),
        ep_group=mpu.get_expert_model_parallel_group(),
        etp_group=mpu.get_expert_tensor_parallel_group(),
        dp_group=mpu.get_expert_data_parallel_group(),
    )
