"""The world: this process among its peers. The only importer of accelerate, and of torch's collectives."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from accelerate import (
    Accelerator,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)
from accelerate import __version__ as accelerate_version
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, distributed, nn
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from aplantida_dist.board import Board
from aplantida_dist.errors import UserError
from aplantida_dist.signals import end_with_the_parent
from aplantida_dist.watchdog import Watchdog, first_words

Value = TypeVar("Value")

_BEHIND_THE_WATCHDOG_S = 10
"""How much longer a collective waits than the watchdog, who knows what for."""

_PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


class WorldError(UserError):
    """The launcher, the machine and the config do not agree on what to run on."""


@dataclass(frozen=True)
class World:
    """One process of a run: its rank, how many there are, its device, and what they do together.

    spreads_parameters: each rank holds a part of every parameter of the trained model (FSDP2) instead of all of it (DDP).
    hosts: the same ranks over gloo, for what concerns no device; None where there is one.
    watchdog: this rank's notes of where it is; who acts notes it there, and the calls below note that they wait.
    """

    accelerator: Accelerator
    spreads_parameters: bool
    hosts: distributed.ProcessGroup | None
    watchdog: Watchdog

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def world_size(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def ranks_here(self) -> range:
        """The ranks of this node, as the launcher tells; all, where it tells nothing."""
        if "LOCAL_WORLD_SIZE" not in os.environ:
            return range(self.world_size)
        first = self.rank - int(os.environ["LOCAL_RANK"])
        return range(first, first + int(os.environ["LOCAL_WORLD_SIZE"]))

    @property
    def is_main(self) -> bool:
        """Rank 0: the only writer of shared files."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """Collective. Put the model on its device under DDP or FSDP2 and autocast, and the optimizer behind the gradient scaler.

        FSDP2 takes a model whose blocks are named (`spreading.name_blocks`), and puts other parameters in the place of its own.
        """
        if self.spreads_parameters:
            # accelerate leaves precision to FSDP2, where all of a model would be bf16: under autocast it computes as under DDP.
            model = self._under_autocast(model, device_placement=False)
            # accelerate forgets that it has a plugin whenever its state is asked for anew, as by autocast and by optimizers.
            self.accelerator.state.distributed_type = DistributedType.FSDP
        prepared: tuple[nn.Module, Any] = self.accelerator.prepare(model, optimizer)
        if self.spreads_parameters:
            _keep_in_parts(prepared[0])
        return prepared

    def prepare_for_evaluation(self, model: nn.Module) -> nn.Module:
        """Put a model on its device under autocast, whole on every rank."""
        return self._under_autocast(model, device_placement=True)

    def prepare_beside(self, model: nn.Module) -> nn.Module:
        """Collective. Put a copy of the model to be trained on its device under autocast, without DDP, but spread as that one will be."""
        if not self.spreads_parameters:
            return self.prepare_for_evaluation(model)
        spread: nn.Module = fsdp2_prepare_model(self.accelerator, self._under_autocast(model, device_placement=False))
        _keep_in_parts(spread)
        return spread

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The module inside DDP, or that FSDP2 has spread where it is; its forward keeps autocast."""
        unwrapped: nn.Module = self.accelerator.unwrap_model(model)
        return unwrapped

    def accumulating(self, model: nn.Module, *, is_last: bool) -> AbstractContextManager[None]:
        """Within it a backward pass adds gradients up on this rank; the step's last slot sums them across ranks.

        Under FSDP2 every slot does: a gradient that waited would be whole on every rank, and so what does not fit.
        """
        return contextlib.nullcontext() if is_last or self.spreads_parameters else self.accelerator.no_sync(model)

    def sum_across_ranks(self, vector: Tensor) -> Tensor:
        """Collective. The sum of every rank's integer vector, as a new tensor on this device."""
        total = vector.clone()
        self.watchdog.note("waiting for the other ranks")
        if self.world_size > 1:
            distributed.all_reduce(total, op=distributed.ReduceOp.SUM)
        return total

    def begin_maximum_across_ranks(self, number: int) -> Callable[[], int]:
        """Collective. Begin to find the largest of every rank's numbers, beside whatever else runs; the call it returns waits for it."""
        if self.hosts is None:
            return lambda: number
        largest = torch.tensor([number])
        work = distributed.all_reduce(largest, op=distributed.ReduceOp.MAX, group=self.hosts, async_op=True)

        def answer() -> int:
            self.watchdog.note("waiting for the other ranks")
            work.wait()
            return int(largest)

        return answer

    def gather_across_ranks(self, value: Any) -> list[Any]:
        """Collective. Every rank's value, in the order of ranks."""
        values: list[Any] = [value]
        self.watchdog.note("waiting for the other ranks")
        if self.world_size > 1:
            values = [None] * self.world_size
            distributed.all_gather_object(values, value)
        return values

    def share_buffers_across_ranks(self, model: nn.Module) -> None:
        """Collective. Give every rank the main process's buffers, such as BatchNorm's running statistics."""
        self.watchdog.note("waiting for the other ranks")
        if self.world_size > 1:
            for buffer in model.buffers():
                distributed.broadcast(buffer, src=0)

    def agree_across_ranks(self, act: Callable[[], Value]) -> Value:
        """Collective. Do something on every rank that any rank may fail at: where one raises a UserError, all of them do.

        So a mistake that one node alone can see ends the run on every node, at once and with one message.
        """
        value, fault = None, None
        self.watchdog.note("working")
        try:
            value = act()
        except UserError as error:
            fault = str(error)
        faults = self.gather_across_ranks(fault)
        first = next((rank for rank, text in enumerate(faults) if text is not None), None)
        if first is not None:
            is_common = all(text == faults[first] for text in faults)
            raise self.told_by_main(WorldError(faults[first] if is_common else f"rank {first}: {faults[first]}"))
        return cast(Value, value)

    def learn_from_main_across_ranks(self, act: Callable[[], Value]) -> Value:
        """Collective. Do something on the main process alone: every rank gets its value, or raises the UserError that it met."""
        value, fault = None, None
        if self.is_main:
            self.watchdog.note("working")
            try:
                value = act()
            except UserError as error:
                fault = error
        value, fault = self.gather_across_ranks((value, fault))[0]
        if fault is not None:
            raise self.told_by_main(fault)
        return cast(Value, value)

    def told_by_main(self, error: UserError) -> UserError:
        """Mark an error that every rank raises at once, so that it is printed once."""
        error.is_told_elsewhere = not self.is_main
        return error

    def require_equal_across_ranks(self, what: str, value: str) -> None:
        """Collective. Raise WorldError on every rank unless all ranks hold the same value, such as a digest."""
        values = self.gather_across_ranks(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                text = f"{what} differs between ranks: rank 0 has {values[0]}, rank {rank} has {other}"
                raise self.told_by_main(WorldError(f"{text}; give every node the same files"))

    @contextlib.contextmanager
    def watched(self) -> Iterator[Watchdog]:
        """Collective. Within it no rank stands still for longer than the time-out, and the first failure on any rank ends all (`Watchdog.watching`)."""
        beat = self.watchdog.beat()
        board = _open_board(self.watchdog.budget_s) if self.world_size > 1 else None
        if board is not None:
            first_words(board, beat)
        # torchrun and accelerate launch keep it themselves.
        keeps_board = board is not None and self.is_main and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ
        with self.watchdog.watching(board, self.gather_across_ranks(beat), keeps_board=keeps_board):
            yield self.watchdog

    def close(self) -> None:
        """Leave the process group; what is on disk is on disk already."""
        self.accelerator.end_training()

    def _under_autocast(self, model: nn.Module, *, device_placement: bool) -> nn.Module:
        prepared: nn.Module = self.accelerator.prepare_model(
            model, device_placement=device_placement, evaluation_mode=True
        )
        return prepared


def open_world(*, precision: str, timeout_s: int, spreads_parameters: bool = False) -> World:
    """Collective. Join the processes that the launcher started; WorldError where launcher and config disagree.

    One process spreads nothing.
    """
    _refuse_conflicts(precision)
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    plugin = _fsdp2() if spreads_parameters and expected > 1 else None
    _die_with_the_launcher()
    # DDP says so of every depthwise convolution, whose dimension of size 1 has a stride that means nothing.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    try:
        accelerator = Accelerator(
            mixed_precision=_PRECISIONS[precision],
            fsdp_plugin=plugin,
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_s + _BEHIND_THE_WATCHDOG_S)),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            ],
        )
    except ValueError as error:
        raise WorldError(f"train.precision {precision}: {error}; choose another precision or device") from error
    if precision == "fp16" and accelerator.scaler is None:
        # accelerate trains in fp32 then, without a word.
        raise WorldError(
            f"train.precision fp16 needs a GPU, this process runs on {accelerator.device.type}; choose bf16 or fp32"
        )
    if accelerator.num_processes != expected:
        raise WorldError(
            f"the launcher started {expected} processes, accelerate sees {accelerator.num_processes}; "
            "on a machine without GPUs set ACCELERATE_USE_CPU=true"
        )
    if plugin is not None and accelerator.device.type == "cpu":
        _spread_on_cpu(accelerator, plugin)
    watchdog = Watchdog(rank=int(accelerator.process_index), budget_s=timeout_s)
    hosts = _gather_hosts(timeout_s) if expected > 1 else None
    return World(accelerator, spreads_parameters=plugin is not None, hosts=hosts, watchdog=watchdog)


def _gather_hosts(timeout_s: int) -> distributed.ProcessGroup:
    """Collective. A group of all ranks over gloo, whatever the group of their devices is."""
    group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s + _BEHIND_THE_WATCHDOG_S))
    assert isinstance(group, distributed.ProcessGroup)  # a number stands for a rank that is no member
    return group


@contextlib.contextmanager
def told_once_a_node() -> Iterator[None]:
    """Before the ranks have met, all those of a node meet the same errors: the first of them tells it."""
    try:
        yield
    except UserError as error:
        error.is_told_elsewhere = os.environ.get("LOCAL_RANK", "0") != "0"
        raise


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception says that the device's memory, or the host's, is full."""
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def seed_device(device: torch.device, seed: int) -> None:
    """Seed the generators that dropout and drop path draw from.

    The CPU's and this device's alone: `torch.manual_seed` seeds every back end, at 200 times the cost.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


def _fsdp2() -> FullyShardedDataParallelPlugin:
    """FSDP2 with all said that accelerate would else take from the environment: whole a block at a time, fp32 throughout."""
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        mixed_precision_policy=MixedPrecisionPolicy(),
        cpu_offload=False,
        cpu_ram_efficient_loading=False,
        activation_checkpointing=False,
    )


def _spread_on_cpu(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Set what accelerate sets on GPUs by itself; on CPU ranks it ignores the plugin and takes DDP without a word."""
    num_ranks = accelerator.num_processes
    sizes = ParallelismConfig(dp_replicate_size=1, dp_shard_size=num_ranks, tp_size=1, cp_size=1, sp_size=1)
    accelerator.state.fsdp_plugin = plugin
    # Without a mesh torch would spread over the GPUs of a machine that has some.
    accelerator.state.parallelism_config = sizes
    accelerator.state.device_mesh = init_device_mesh("cpu", (num_ranks,), mesh_dim_names=tuple(sizes.fsdp_dim_names))


def _keep_in_parts(model: nn.Module) -> None:
    """Have FSDP2 take every block apart again after a forward, the outermost too, so that between two of them parameters are parts."""
    if not isinstance(model, FSDPModule):
        raise WorldError(
            f"train.parallel: found fsdp, but accelerate {accelerate_version} did not spread the parameters; install the version of "
            "pyproject.toml, or set it to ddp"
        )
    model.set_reshard_after_forward(True)


def _open_board(timeout_s: float) -> Board:
    """The store where the ranks met, through a connection of its own: torch's may be waiting on theirs."""
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
    )
    # The store of a launcher that restarts its ranks outlives them.
    return PrefixStore(f"watchdog_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _die_with_the_launcher() -> None:
    """Have the kernel end this rank when its launcher is killed.

    torchrun gives each rank a session of its own, so a SIGKILL of the launcher's group would leave ranks that train on
    and write into the folder of the run that resumes.
    """
    if {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys():
        end_with_the_parent()


def _refuse_conflicts(precision: str) -> None:
    """The config states precision, accumulation and parallelism; a launcher that states another would be ignored in silence."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", _PRECISIONS[precision]):
        raise WorldError(
            f"accelerate was launched with mixed precision {launched}, the config says train.precision {precision}; "
            "leave it to the config (--mixed_precision no)"
        )
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation != "1":
        raise WorldError(
            f"accelerate was launched with {accumulation} gradient accumulation steps; here they follow from "
            "train.global_batch_size and train.micro_batch_size: leave the option out"
        )
    for option in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_USE_{option}", "false").lower() == "true":
            raise WorldError(
                f"accelerate was launched with {option} (ACCELERATE_USE_{option}=true); here the config says how ranks share a "
                "model: set train.parallel to ddp or fsdp, and launch with distributed_type MULTI_GPU"
            )
