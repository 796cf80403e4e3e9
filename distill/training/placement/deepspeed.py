"""DeepSpeed ZeRO: one engine per trainable role.

The placement (`distill.methods.placement.Placement`) computes gradients, steps, averages and state by role. Lightning
starts the ranks, moves batches and runs the loop; the method is not wrapped, because roles are called through denoisers,
hooks and forward-mode derivatives.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distill.errors import BadInput
from distill.methods.optim import WHOLE, optimizer_of
from distill.methods.placement import Replicas
from distill.training.placement.blocks import root


class Zero(Replicas):
    """One DeepSpeed engine per trainable role; in stage 3 also one without optimizer per frozen or averaged network.

    Args:
        stage: 1 shards the optimizer's state, 2 the gradients too, 3 the weights too.
        settings: the user's DeepSpeed config, merged with ours.
        offload_optimizer, offload_parameters: keep them on the CPU.
    """

    def __init__(
        self,
        stage: int,
        accumulate: int = 1,
        settings: dict[str, Any] | None = None,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
    ):
        super().__init__(accumulate)
        self.stage, self.sharded, self.fresh, self.settings = stage, stage == 3, True, settings or {}
        self.forward_mode = stage < 3
        self.offload = {"offload_optimizer": offload_optimizer, "offload_param": offload_parameters}
        self.deepspeed = _deepspeed()

    def prepare(self, method: Any) -> None:
        self.rank, self.world, self.method = dist.get_rank(), dist.get_world_size(), method
        os.environ.setdefault("LOCAL_RANK", str(self.rank))
        if not self.sharded:
            method.to(self.device)
        else:
            torch.set_autocast_cache_enabled(False)  # it would keep whole networks, cast, until the step ends
        self.start_alike()
        self.offloads: list[Any] = []
        self.engines, frozen = {}, [n for n in self.names if n not in method.trainable] if self.sharded else []
        for role in method.trainable:
            if (name := method.optim[role].name.rpartition(".")[2]) in WHOLE:
                raise BadInput(
                    f"optim.{role}.name: {name} takes weights as matrices, which zero{self.stage} cuts to flat parts; use "
                    "engine.strategy=ddp, or AdamW."
                )
            self.module(role).requires_grad_(True)  # what does not require it now is left out for ever
            optimizer = optimizer_of(method.optim[role], self.parameters(role), role)
            self.engines[role] = self._engine(role, self.config(method.optim[role].clip), optimizer=optimizer)
        for name in frozen:
            if self.parameters(name):
                self._engine(name, self.config(0.0, frozen=True))
        method.to(self.device)
        self.draw_apart()

    def _engine(self, name: str, config: dict[str, Any], **keywords) -> Any:
        engine = self.deepspeed.initialize(model=root(self.module(name)), config=config, **keywords)[0]
        if self.sharded:
            self.offloads.append(getattr(engine.optimizer, "parameter_offload", engine.optimizer))
            _lenient(self.offloads[-1])
        return engine

    def config(self, clip: float, frozen: bool = False) -> dict[str, Any]:
        """The DeepSpeed config: the user's settings, overridden by what the run's config decides."""
        zero = {"stage": self.stage} | self.settings.get("zero_optimization", {})
        zero |= {key: {"device": "cpu"} for key, wanted in self.offload.items() if wanted}
        if self.stage == 3:  # whole copies kept on a rank would escape the averages
            zero |= {"stage3_param_persistence_threshold": 0} | ({"stage3_max_reuse_distance": 0} if frozen else {})
        ours = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.accumulate,
            "gradient_clipping": clip,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31,
        }
        return self.settings | ours

    def zero_grad(self, role: str) -> None:
        self.engines[role].optimizer.zero_grad()

    def backward(self, role: str, loss: Tensor, last: bool = True) -> None:
        loss = loss * torch.where(torch.isfinite(loss), 1.0, math.nan)  # its gradient would pass for a sound one
        self.engines[role].optimizer.clear_backward_seen_flag()  # as its own forward would: it counts micro-batches
        self.engines[role].backward(loss)
        for offload in self.offloads:  # of the networks that this gradient went through on its way
            offload.release_backward_leftovers()
        if not last:
            self.engines[role].step()  # counts the micro-batch

    def step(self, role: str, lr: float, finite: Tensor) -> tuple[Tensor, Tensor]:
        engine = self.engines[role]
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        engine.step()  # leaves the step out on all ranks if a gradient is not finite
        stepped = torch.as_tensor(not engine.optimizer.overflow, device=self.device)
        norm = engine.get_global_grad_norm() if stepped else math.nan
        return torch.as_tensor(float(norm or 0.0), device=self.device), stepped

    def waits(self, role: str) -> bool:
        return True

    def _state(self, name: str) -> dict[Any, dict[str, Any]]:
        if name not in self.engines:
            return {}
        masters = {"masters": dict(enumerate(self._flat(name)))}
        return dict(self.engines[name].optimizer.optimizer.state) | masters

    def bare_step(self, role: str) -> None:
        self.engines[role].step()

    def copy(self, name: str, source: str) -> None:
        super().copy(name, source)
        self._renew_masters(name)

    def reset_optimizer(self, role: str) -> None:
        for state in self.engines[role].optimizer.optimizer.state.values():
            for value in state.values():
                value.zero_()

    # -- state ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def weights(self, name: str) -> dict[str, Tensor]:
        found = {}
        for key, value in self.module(name).state_dict(keep_vars=True).items():
            with self.deepspeed.zero.GatheredParameters([value], enabled=hasattr(value, "ds_id")):
                if self.rank == 0:
                    found[key] = value.detach().cpu().clone()
        return found

    @torch.no_grad()
    def load_weights(self, name: str, weights: dict[str, Tensor]) -> None:
        for key, value in self.module(name).state_dict(keep_vars=True).items():
            if hasattr(value, "ds_id"):
                value.ds_tensor.copy_(self._part(weights[key], value))
            else:
                value.copy_(weights[key])
        self._renew_masters(name)

    def _part(self, whole: Tensor, value: Tensor) -> Tensor:
        """This rank's part of a whole tensor, in stage 3: flat, padded with zeros."""
        n = value.ds_tensor.numel()
        part = whole.flatten()[n * self.rank : n * (self.rank + 1)]
        return nn.functional.pad(part, (0, n - part.numel()))

    def _renew_masters(self, name: str) -> None:
        """The optimizer's own copy of the weights, from the weights."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        if name in self.engines:
            for p in self.module(name).requires_grad_(True).parameters():
                safe_set_local_fp32_param(p, p.ds_tensor) if self.sharded else safe_set_full_fp32_param(p, p.data)

    def _flat(self, role: str) -> list[Tensor]:
        optimizer = self.engines[role].optimizer
        return optimizer.fp32_partitioned_groups_flat if self.sharded else optimizer.single_partition_of_fp32_groups

    def moments(self, role: str) -> dict[str, Any]:
        from deepspeed.utils import safe_get_full_optimizer_state

        base, parameters = self.engines[role].optimizer.optimizer, self.parameters(role)
        self.module(role).requires_grad_(True)  # DeepSpeed handles no others
        first = base.state.get(self._flat(role)[0], {})
        state: dict[int, dict[str, Any]] = {}
        for i, p in enumerate(parameters) if first else []:
            whole = {k: safe_get_full_optimizer_state(p, k) for k, v in first.items() if v.ndim}
            kept = {k: v.cpu().view(p.ds_shape if self.sharded else p.shape) for k, v in whole.items()}
            state[i] = {k: v.cpu().clone() for k, v in first.items() if not v.ndim} | (kept if self.rank == 0 else {})
        group = {k: v for k, v in base.param_groups[0].items() if k != "params"} | {
            "params": list(range(len(parameters)))
        }
        return {"state": state, "param_groups": [group]}

    def load_moments(self, role: str, state: dict[str, Any]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if not state["state"]:
            return
        optimizer, first = self.engines[role].optimizer, state["state"][0]
        for flat in self._flat(role):
            empty = lambda v: torch.zeros_like(flat) if v.ndim else v.clone()  # noqa: B023
            optimizer.optimizer.state[flat] = {k: empty(v) for k, v in first.items()}
        if not self.sharded:
            optimizer._lazy_init_hp_params_optimizer_state()
        self.module(role).requires_grad_(True)
        for i, p in enumerate(self.parameters(role)):
            for key, value in state["state"][i].items():
                if value.ndim and self.sharded:
                    safe_set_local_optimizer_state(p, self._part(value, p), key)
                elif value.ndim:
                    safe_set_full_optimizer_state(p, value, key)


def _lenient(offload: Any) -> None:
    """Allow the backward pass to start inside a module instead of at its output.

    A head reads the features of an inner layer, so its gradient enters there; DeepSpeed then refuses to release the
    enclosing modules.
    """
    before, after = offload.pre_sub_module_backward_function, offload.post_sub_module_backward_function
    finish, entered = offload.release_backward_leftovers, set()

    def enter(module):
        entered.add(module)
        before(module)

    def leave(module):
        if module in entered:
            entered.remove(module)
            after(module)
        else:
            offload.get_param_coordinator().release_sub_module(module, forward=True)

    def end():
        entered.clear()
        finish()

    offload.pre_sub_module_backward_function, offload.post_sub_module_backward_function = enter, leave
    offload.release_backward_leftovers = end


def _deepspeed() -> Any:
    try:
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module="torch.distributed.c10d_logger")  # it calls by their old names, often
        import deepspeed
    except ImportError as error:
        raise BadInput(
            f"engine.strategy: ZeRO needs deepspeed ({error}); pip install deepspeed, or use fsdp."
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles C++ at the start; gloo will do
    return deepspeed
