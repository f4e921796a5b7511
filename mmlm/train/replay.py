"""An iteration once more, watched: where the first value that is not finite appears.

Hooks look at what every module returns, at the gradients of that and at those of the parameters.
The weights are what they were, because an iteration that is not finite changes nothing, and so are
the batches and what drop path drops. Hooks are gone afterwards.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import get_attr_wrapped_model, unwrap_model
from torch import Tensor

from mmlm.config.model import ModelConfig
from mmlm.data.collate import Batch
from mmlm.models.internvl_model import InternVLModel
from mmlm.models.language_model import LanguageModel
from mmlm.parallel.topology import Topology
from mmlm.train.forward_step import ForwardStep
from mmlm.train.row_samples import row_unit, samples_of_rows
from mmlm.train.train_step import forward_backward

Kind = Literal["activation", "gradient", "parameter gradient", "summed gradient"]
KINDS: tuple[Kind, ...] = ("activation", "gradient", "parameter gradient", "summed gradient")
"""What can be not finite, in the order in which one makes the next."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A tensor of one microbatch that is not finite, as one rank sees it."""

    kind: Kind
    """Output of a module (or the pixels that go in), gradient of that output, gradient of a
    parameter in this microbatch, or of one summed over microbatches and ranks."""
    layer: str
    """Global name of the module or parameter."""
    chunk: int
    """Pipeline stage, from 0; with virtual stages the chunk in pipeline order."""
    microbatch: int
    """Of its DP rank, from 0; -1 for a summed gradient, which belongs to all."""
    order: int
    """Place among what the stage looks at for this microbatch; the same on all TP ranks."""
    rank: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    sample_ids: tuple[int, ...] | None
    """Whose rows are not finite; None where the rows of the tensor are not told apart."""

    @property
    def causal_key(self) -> tuple[int, int, int]:
        """Sorts the findings of a microbatch: a smaller one is the cause of the greater ones."""
        is_forward = self.kind == "activation"
        return KINDS.index(self.kind), self.chunk if is_forward else -self.chunk, self.order


def replay(
    model: Sequence[DistributedDataParallel],
    forward_step: ForwardStep,
    batches: Sequence[Batch],
    sizes: ModelConfig,
    topology: Topology,
) -> tuple[float, list[Finding]]:
    """Run forward and backward once more and look at every tensor; collective.

    Args:
        model: this rank's wrapped chunks.
        forward_step: as in the iteration.
        batches: as in the iteration.
        sizes: of the model.
        topology: this rank's place.

    Returns:
        The loss of this time, and on every rank the findings of all: for each microbatch and kind
        the first one, and the first whose rows are told apart.
    """
    with _Watched(forward_step, model, sizes, topology) as watched:
        loss = forward_backward(model, watched, batches, topology)
    # a sum over the DP ranks says nothing where a part of it was found
    return loss, _of_all_ranks(watched.findings(), topology) or _of_all_ranks(
        watched.summed_gradients(), topology
    )


def _of_all_ranks(own: list[Finding], topology: Topology) -> list[Finding]:
    everything: list[list[Finding]] = [[] for _ in range(topology.world_size)]
    dist.all_gather_object(everything, own, group=topology.control_group)
    return [finding for of_rank in everything for finding in of_rank]


class _Watched:
    """A forward step whose tensors are looked at; use as a context manager."""

    def __init__(
        self,
        step: ForwardStep,
        model: Sequence[DistributedDataParallel],
        sizes: ModelConfig,
        topology: Topology,
    ) -> None:
        self._step = step
        self._chunks: list[InternVLModel] = [wrapped.module for wrapped in model]
        self._sizes = sizes
        self._topology = topology
        self._hooks = ExitStack()
        self._calls: dict[int, int] = {}  # microbatches that each chunk has begun
        self._batches: dict[int, Batch] = {}
        self._work = (0, -1, True)  # chunk, microbatch, whether forward: what is worked on
        self._microbatch = -1
        self._order = 0
        self._found: dict[tuple[int, Kind], list[Finding]] = {}

    def __enter__(self) -> "_Watched":
        for chunk in self._chunks:
            place = self._place_of(chunk)
            for name, module in _named_modules(chunk):
                handle = module.register_forward_hook(partial(self._on_output, name, place))
                self._hooks.callback(handle.remove)
            for name, parameter in _named_parameters(chunk):
                hook = partial(self._on_parameter_gradient, name, place)
                self._hooks.callback(parameter.register_hook(hook).remove)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._hooks.close()

    def __call__(self, iterator: Iterator[Batch], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        """Run one microbatch through a chunk, as megatron-core's schedules call it."""
        batch = next(iterator)
        place = self._place_of(chunk)
        number = self._calls.get(place, 0)
        self._calls[place] = number + 1
        self._batches[number] = batch
        self._turn_to(place, number, is_forward=True)
        if get_attr_wrapped_model(chunk, "pre_process") and batch.pixel_values is not None:
            self._look("activation", "pixel_values", 0, batch.pixel_values)
        output, loss_function = self._step(iter([batch]), chunk)
        # before recomputed layers, which a hook of the output comes after
        output = _BackwardMark.apply(
            output, partial(self._turn_to, place, number, is_forward=False)
        )
        return output, loss_function

    def findings(self) -> list[Finding]:
        """What was found on this rank."""
        return [finding for found in self._found.values() for finding in found]

    def summed_gradients(self) -> list[Finding]:
        """Sums of finite gradients that are not finite."""
        self._microbatch, self._order = -1, 0
        for chunk in self._chunks:
            place = self._place_of(chunk)
            for name, parameter in _named_parameters(chunk):
                self._look("summed gradient", name, place, parameter.main_grad)
        return self.findings()

    def _place_of(self, chunk: torch.nn.Module) -> int:
        """In pipeline order, with virtual stages too."""
        own = [id(each) for each in self._chunks].index(id(unwrap_model(chunk)))
        return own * self._topology.pp_size + self._topology.pp_rank

    def _turn_to(self, chunk: int, microbatch: int, *, is_forward: bool) -> None:
        work = (chunk, microbatch, is_forward)
        if work != self._work:
            self._work, self._microbatch, self._order = work, microbatch, 0

    def _on_output(
        self, layer: str, chunk: int, module: torch.nn.Module, inputs: Any, output: Any
    ) -> None:
        tensors = output if isinstance(output, tuple | list) else (output,)
        for tensor in tensors:
            # a linear layer may return its bias for others to add
            if not isinstance(tensor, Tensor) or isinstance(tensor, torch.nn.Parameter):
                continue
            self._look("activation", layer, chunk, tensor)
            if tensor.requires_grad:
                hook = partial(self._on_gradient, layer, chunk, self._microbatch)
                tensor.register_hook(hook)

    def _on_gradient(self, layer: str, chunk: int, microbatch: int, gradient: Tensor) -> None:
        self._turn_to(chunk, microbatch, is_forward=False)
        self._look("gradient", layer, chunk, gradient)

    def _on_parameter_gradient(self, name: str, chunk: int, gradient: Tensor) -> None:
        self._look("parameter gradient", name, chunk, gradient)

    @torch.no_grad()
    def _look(self, kind: Kind, layer: str, chunk: int, tensor: Tensor) -> None:
        self._order += 1
        found = self._found.setdefault((self._microbatch, kind), [])
        if any(finding.sample_ids is not None for finding in found):
            return
        unit = row_unit(layer) if kind in ("activation", "gradient") else None
        if found and unit is None:
            return
        if not tensor.is_floating_point() or bool(tensor.isfinite().all()):
            return
        samples = None
        if unit is not None:
            bad = ~tensor.detach().isfinite().flatten(1).all(dim=1).cpu()
            samples = samples_of_rows(
                bad,
                unit,
                self._batches[self._microbatch],
                self._sizes,
                sequence_parallel_rank=self._sequence_parallel_rank,
            )
        place = self._topology
        found.append(
            Finding(
                kind=kind,
                layer=layer,
                chunk=chunk,
                microbatch=self._microbatch,
                order=self._order,
                rank=place.rank,
                tp_rank=place.tp_rank,
                pp_rank=place.pp_rank,
                dp_rank=place.dp_rank,
                sample_ids=samples,
            )
        )

    @property
    def _sequence_parallel_rank(self) -> int | None:
        shared = self._chunks[0].config.sequence_parallel
        return self._topology.tp_rank if shared else None


class _BackwardMark(torch.autograd.Function):
    """The identity without a copy (and no view), which says when its gradient comes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, say: Callable[[], None]) -> Tensor:
        ctx.say = say
        output = torch.empty(1, dtype=x.dtype, device=x.device)
        output.data = x.data
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.say()
        return gradient, None


def _named_modules(chunk: InternVLModel) -> Iterator[tuple[str, torch.nn.Module]]:
    """Modules under global names, but those whose output hides the padded vocabulary with -inf."""
    layers = _global_layers(chunk)
    for name, module in chunk.named_modules():
        if name and not isinstance(module, LanguageModel):
            yield _global_name(name, layers), module


def _named_parameters(chunk: InternVLModel) -> Iterator[tuple[str, Any]]:
    layers = _global_layers(chunk)
    for name, parameter in chunk.named_parameters():
        if parameter.requires_grad:
            yield _global_name(name, layers), parameter


def _global_layers(chunk: InternVLModel) -> dict[str, str]:
    """Name of each layer in the chunk -> in the whole model; megatron-core counts from 1."""
    return {
        name: f"{name.rpartition('.')[0]}.{module.layer_number - 1}"
        for name, module in chunk.named_modules()
        if isinstance(module, TransformerLayer)
    }


def _global_name(name: str, layers: dict[str, str]) -> str:
    for local, whole in layers.items():
        if name == local or name.startswith(f"{local}."):
            return whole + name[len(local) :]
    return name


def first_findings(findings: Sequence[Finding]) -> list[tuple[list[Finding], tuple[int, ...]]]:
    """Find where it began, for each microbatch of each DP rank; a pure function.

    Args:
        findings: of all ranks.

    Returns:
        For each microbatch with findings the first one (as all TP ranks that saw it at the same
        place have it), and the samples whose rows it is in; none where rows are not told apart.
    """
    by_microbatch: dict[tuple[int, int], list[Finding]] = {}
    for finding in findings:
        # a sum over the DP ranks is one finding, whoever has seen it
        dp_rank = -1 if finding.kind == "summed gradient" else finding.dp_rank
        by_microbatch.setdefault((dp_rank, finding.microbatch), []).append(finding)
    firsts = []
    for _, found in sorted(by_microbatch.items()):
        least = min(finding.causal_key for finding in found)
        first = [finding for finding in found if finding.causal_key == least]
        told = [f for f in found if f.sample_ids is not None and f.kind == first[0].kind]
        samples: set[int] = set()
        if told:
            least = min(finding.causal_key for finding in told)
            samples = {s for f in told if f.causal_key == least for s in f.sample_ids or ()}
        firsts.append((first, tuple(sorted(samples))))
    return sorted(firsts, key=lambda each: each[0][0].causal_key)
