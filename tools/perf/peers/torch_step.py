"""A training step of PyTorch: forward, loss, backward, AdamW. PyTorch is imported by need."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tools.perf.harness import StepTimer
from vlp_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A model of PyTorch and how it is trained.

    Attributes:
      build: makes the module, with random weights.
      loss: (module, batch of tensors) -> scalar. Images are normalized float32 NCHW, texts and
        labels int64.
      notes: how it differs from our model.
      after_step: called with the module after each update.
    """

    build: Callable[[], Any]
    loss: Callable[[Any, Mapping[str, Any]], Any]
    notes: tuple[str, ...] = ()
    after_step: Callable[[Any], None] = lambda module: None


class TorchStep:
    """A `Contender`: the step of a `Recipe` on one GPU or the CPU.

    On a GPU: bfloat16 autocast, `torch.compile`, fused AdamW, TF32 where float32 is left. On the
    CPU: float32, eager. (bfloat16 on a CPU may be AMX there, which XLA does not use.)

    Args:
      batch: images uint8 NHWC, integers.
      optimizer: `config.optimizer`; of it the learning rate, the betas, epsilon, weight decay and
        the norm that gradients are clipped to.
      compile_model: None for what the device suggests.
      mean, std: of the pixels.

    Raises:
      UserError: a GPU is wanted and this PyTorch has none.
    """

    def __init__(
        self,
        name: str,
        recipe: Recipe,
        batch: Mapping[str, np.ndarray],
        optimizer: Mapping[str, Any],
        *,
        on_gpu: bool,
        compile_model: bool | None,
        mean: Sequence[float],
        std: Sequence[float],
    ):
        import torch

        patch_torchvision()
        if on_gpu and not torch.cuda.is_available():
            raise UserError(f"--peer {name}: this PyTorch sees no GPU; install one with CUDA")
        self.name = name
        self._torch, self._on_gpu, self._recipe = torch, on_gpu, recipe
        compiled = on_gpu if compile_model is None else compile_model
        device = torch.device("cuda" if on_gpu else "cpu")
        torch.manual_seed(0)
        if on_gpu:
            # TF32 for the few products that autocast leaves in float32.
            torch.set_float32_matmul_precision("high")
        self._model = recipe.build().to(device).train()
        # The optimizer keeps the module itself, whose parameters the compiled one shares.
        self._forward = torch.compile(self._model) if compiled else self._model
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(),
            lr=optimizer["learning_rate"],
            betas=(optimizer["b1"], optimizer["b2"]),
            eps=optimizer["eps"],
            weight_decay=optimizer["weight_decay"],
            fused=True,
        )
        self._clip_norm = optimizer["clip_norm"]
        self._batch = {key: value.to(device) for key, value in to_tensors(batch, mean, std).items()}
        if on_gpu:
            torch.cuda.synchronize()
        self.facts: dict[str, Any] = {
            "parameters": sum(p.numel() for p in self._model.parameters()),
            "devices": 1,
            "compiled": compiled,
            "threads": torch.get_num_threads(),
        }
        begin = time.perf_counter()
        # The first step compiles; its time stands for "compile" in the table.
        self.run(1)
        self.facts["first_step_seconds"] = time.perf_counter() - begin
        mode = "torch.compile" if compiled else "eager"
        dtype = "bfloat16 autocast" if on_gpu else "float32"
        form = f"{mode}, {dtype}, fused AdamW, images normalized before the step"
        self.notes = (form, *recipe.notes)

    def run(self, steps: int) -> list[float]:
        """Trains `steps` steps; the seconds of each."""
        if self._on_gpu:
            timer = StepTimer(lambda event: event.synchronize())
        else:
            # On CPU PyTorch computes before it returns: there is nothing to wait for.
            timer = StepTimer(lambda nothing: None, ahead=0)
        for _ in range(steps):
            self._step()
            timer.started(self._event())
        seconds = timer.seconds()
        if self._on_gpu:
            self._torch.cuda.synchronize()
            self.facts["peak_bytes_in_use"] = self._torch.cuda.max_memory_allocated()
        return seconds

    def _step(self) -> None:
        torch = self._torch
        with torch.autocast("cuda", torch.bfloat16, enabled=self._on_gpu):
            loss = self._recipe.loss(self._forward, self._batch)
        loss.backward()
        if self._clip_norm:
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            self._recipe.after_step(self._model)

    def _event(self) -> Any:
        """Returns an event that ends with all work so far; None on CPU, where it has ended."""
        if not self._on_gpu:
            return None
        event = self._torch.cuda.Event()
        event.record()
        return event


def to_tensors(
    batch: Mapping[str, np.ndarray], mean: Sequence[float], std: Sequence[float]
) -> dict[str, Any]:
    """Converts our batch for PyTorch's models: normalized float32 NCHW, int64."""
    import torch

    tensors = {}
    for name, value in batch.items():
        if value.dtype == np.uint8:
            scaled = (value.astype(np.float32) / 255 - np.float32(mean)) / np.float32(std)
            tensors[name] = torch.from_numpy(scaled.transpose(0, 3, 1, 2).copy())
        else:
            tensors[name] = torch.from_numpy(value.astype(np.int64))
    return tensors


def patch_torchvision() -> None:
    """Defines two operators that a torchvision of another build of PyTorch looks for and lacks.

    open_clip, timm and transformers import torchvision; nothing here runs its operators.
    """
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        try:
            torch._C._get_schema(f"torchvision::{schema.split('(')[0]}", "")
        except RuntimeError:
            library.define(schema)
    _LIBRARIES.append(library)


_LIBRARIES: list[Any] = []  # a definition is undone when its library goes
