"""Gradients of experts beside those of the rest: reduced to the same mean, clipped by one norm."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from moeplan.runtime_client.device.launches import is_captured
from moeplan.runtime_client.errors import RanksDifferError
from moeplan.runtime_client.group import ExpertGroup
from moeplan.runtime_client.layers.changes import steps_of
from moeplan.runtime_client.layers.expert_layer import ExpertLayer
from moeplan.runtime_client.layers.rank_checks import is_looked_at, row_sums
from moeplan.runtime_client.models.optimizers import watch_optimizers
from moeplan.runtime_client.models.replicas import Replicas

__all__ = ["ExpertGradients", "expert_parameters", "groups_of", "ignore_experts"]


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of our layers by their names in a model: what wrappers for data parallelism must leave alone."""
    return {
        f"{name}.{layer.own}" if name else layer.own: layer.weights
        for name, layer in model.named_modules()
        if isinstance(layer, ExpertLayer)
    }


def ignore_experts(model: nn.Module) -> None:
    """Tell DistributedDataParallel to leave experts alone, when it wraps the model or what is compiled from it."""
    names = list(expert_parameters(model))
    names += [f"_orig_mod.{name}" for name in names]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


class ExpertGradients:
    """Makes gradients of experts go with those of the rest of a model, under DDP, FSDP2 or neither.

        model = AutoModelForCausalLM.from_pretrained(...)
        replace_experts(model, make)
        gradients = ExpertGradients(model)
        model = DistributedDataParallel(model)
        ...
        loss.backward()
        gradients.clip_grad_norm_(1.0)
        optimizer.step()

    A layer's gradients hold the tokens of all ranks of its expert group, where the others hold this rank's until they
    are reduced. So each backward pass scales them to the mean over all ranks, and averages them over replicas where
    there are more ranks than in an expert group (data parallelism times expert parallelism), while it goes on. It also
    tells DistributedDataParallel to leave experts alone; tell FSDP2 with
    ``fully_shard(model, ignored_params=set(expert_parameters(model).values()))``. Of resident experts with replicas,
    FSDP2 may instead spread weights and optimizer states over the replicas: ``fully_shard(layer, mesh=replicas)`` for
    each layer, before ``fully_shard(model)``.

    Every rank of `ranks` makes one at the same point. Gradients may be accumulated over any number of backward passes.

    Args:
        model: The model. Parts of it that will be compiled or checkpointed are so already; the whole may be later.
        ranks: The ranks that train these layers on other tokens each; the world by default, and with a pipeline those
            of this stage. They are one or several expert groups.
        mean: Whether the other gradients are averaged over `ranks`, as DDP and FSDP2 do with a loss that is a mean over
            a rank's tokens; otherwise they are summed.
        stages: Ranks that hold the other stages of a pipeline, for the norm.

    Raises:
        ValueError: the model has no layers of ours, or `ranks` are not whole expert groups of one size.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        ranks: dist.ProcessGroup | None = None,
        mean: bool = True,
        stages: dist.ProcessGroup | None = None,
    ) -> None:
        layers = [module for module in model.modules() if isinstance(module, ExpertLayer)]
        if not layers:
            raise ValueError(f"{type(model).__name__}: has no FullyShardedExperts or ResidentExperts")
        self.model = model
        self.stages = stages
        self.layers = {group: [layer for layer in layers if layer.group is group] for group in _groups(layers)}
        ignore_experts(model)
        _watch(model)
        for group, members in self.layers.items():
            groups = groups_of(group.members, ranks)
            replicas = _replicas_of(group, groups)
            for layer in members:
                layer.replicated = replicas is not None
                if isinstance(layer.prepare, _Reduction):
                    layer.prepare.detach()
                layer.prepare = reduction = _Reduction(layer.title, groups, replicas, mean)
                layer.scale = 1 / group.size
                layer.on_way = reduction.arrived if group.size > 1 or replicas is not None else None

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale all gradients so that their norm, over all ranks together, is at most `max_norm`.

        As ``torch.nn.utils.clip_grad_norm_``, which knows only a rank's own experts. Every rank calls it. What torch's
        own has made of a step is refused in the pass after it (`RanksDifferError`), since nothing of ours runs before.

        Args:
            max_norm: The norm that they may have.
            norm_type: Which norm; ``inf`` for the largest element.

        Returns:
            The norm before, the same on every rank.
        """
        experts = set(expert_parameters(self.model).values())
        shared = [p for p in self.model.parameters() if p not in experts]
        kinds = [[p for p in shared if isinstance(p, DTensor) == cut] for cut in (False, True)]  # torch mixes them not
        norms = [_norm(_gradients(kind), norm_type, like=next(iter(experts))) for kind in kinds]
        for group, layers in self.layers.items():
            mine = [layer.weights for layer in layers]
            norms.append(_over_ranks(_norm(_gradients(mine), norm_type, like=mine[0]), group.tokens, norm_type))
        total = _over_ranks(_join(torch.stack(norms), norm_type), self.stages, norm_type)
        for parameters in (*kinds, *([p for p in experts if isinstance(p, DTensor) == cut] for cut in (False, True))):
            clip_grads_with_norm_(parameters, max_norm, total)
        return total


def _watch(model: nn.Module) -> None:
    """Watch layers of a model of one's own, or of a copy, as `replace_experts` does those that it makes."""
    children = [(block, child) for block in model.modules() for child in block.children()]
    unseen = {child: block for block, child in children if isinstance(child, ExpertLayer) and not child.is_watched}
    for layer, block in unseen.items():
        layer.watch(block, model)
    if unseen:
        watch_optimizers(unseen, ())


def _groups(layers: Iterable[ExpertLayer]) -> list[ExpertGroup]:
    """In the order of the layers, which is the same on all ranks."""
    return list({layer.group: None for layer in layers})


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _norm(gradients: Sequence[Tensor], norm_type: float, like: Tensor) -> Tensor:
    """Norm of gradients that this rank has, or that are DTensors."""
    gradients = [gradient for gradient in gradients if gradient.numel()]
    norm = get_total_norm(gradients, norm_type) if gradients else torch.zeros((), device=like.device)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).to(like.device, torch.float64)


def _join(norms: Tensor, norm_type: float) -> Tensor:
    """The norm of everything, from norms of its parts, [parts]."""
    return torch.linalg.vector_norm(norms, norm_type)


def _over_ranks(norm: Tensor, ranks: dist.ProcessGroup | None, norm_type: float) -> Tensor:
    """The norm of what all ranks hold, each another part. Gathered, so that it is the same to the last bit."""
    if ranks is None:
        return norm
    norms = [torch.empty_like(norm) for _ in range(dist.get_world_size(ranks))]
    dist.all_gather(norms, norm, group=ranks)
    return _join(torch.stack(norms), norm_type)


def groups_of(members: Sequence[int], ranks: dist.ProcessGroup | None = None) -> list[tuple[int, ...]]:
    """The expert groups that ranks are divided into, ascending. Every rank of `ranks` calls it.

    Args:
        members: Global ranks of this rank's group.
        ranks: The ranks; the world by default.

    Raises:
        ValueError: they are not whole expert groups of one size.
    """
    if not dist.is_initialized():
        return [tuple(members)]
    told: list[tuple[int, ...]] = [()] * dist.get_world_size(ranks)
    dist.all_gather_object(told, tuple(members), group=ranks)
    groups = sorted(set(told))
    everyone = {rank for members in groups for rank in members}
    if len({len(members) for members in groups}) > 1 or len(everyone) != len(told):
        raise ValueError(f"expert groups {groups}: must be of one size, and together the {len(told)} ranks")
    return groups


def _replicas_of(group: ExpertGroup, groups: Sequence[tuple[int, ...]]) -> Replicas | None:
    """Ranks that hold the same experts as this one, each in its own of the groups; None if there is no other."""
    if len(groups) == 1:
        return None
    place = group.members.index(dist.get_rank())
    return Replicas([members[place] for members in groups], group.timeout)


class _Reduction:
    """Averages the gradient of a parameter over replicas, once it has those of its passes.

    Averages of what replicas hold already are what they hold, so it may run after each of several backward passes.
    Gradients of a penalty on weights are not those of tokens of other ranks; where gradients are summed, all ranks add
    theirs.
    """

    def __init__(self, title: str, groups: Sequence[tuple[int, ...]], replicas: Replicas | None, mean: bool) -> None:
        self.title = title
        self.ranks = sorted(rank for group in groups for rank in group)
        self.replicas = replicas
        self.summed = 1 if mean else len(self.ranks)
        # Of each parameter that the layer has had: ``torch.func.functional_call`` puts others there, and back again.
        self.hooks: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.backwards = 0
        self.averages = self.waits = False

    def __call__(self, parameter: nn.Parameter, averaged: bool) -> None:
        """Attach to a parameter, unless it is.

        Args:
            parameter: The parameter of a layer.
            averaged: Whether something else averages its gradients over replicas.
        """
        if parameter in self.hooks:
            return
        if not parameter.is_leaf:
            raise RuntimeError(
                f"{self.title}: its weights are computed from others, of which ranks may hold other parts. Give "
                "functional_call parameters, do not parametrize experts, and write\n"
                "    FullyShardedDataParallel(model, ignored_states=list(expert_parameters(model).values()))"
            )
        self._require_ranks()
        hooks: list[RemovableHandle] = []
        if self.summed != 1:
            hooks.append(parameter.register_hook(lambda gradient: gradient * self.summed))
        self.averages = self.replicas is not None and not averaged
        if self.averages:
            hooks.append(parameter.register_post_accumulate_grad_hook(self._average))
        self.hooks[parameter] = hooks

    def _require_ranks(self) -> None:
        """Raise if DistributedDataParallel reduces other gradients over other ranks.

        Raises:
            RuntimeError: it does.
        """
        data_parallel = DistributedDataParallel._get_active_ddp_module()
        if data_parallel is None:
            return
        reduced = sorted(dist.get_process_group_ranks(data_parallel.process_group))
        if reduced != self.ranks:
            raise RuntimeError(
                f"{self.title}: DistributedDataParallel reduces gradients over ranks {reduced}, and those of experts "
                f"go with ranks {self.ranks}. Write, with the process_group that it was given,\n"
                "    ExpertGradients(model, ranks=process_group)"
            )

    def arrived(self) -> None:
        """Note a pass's gradient that is on its way to the parameter."""
        if self.averages:
            self.waits = True
            torch.autograd.Variable._execution_engine.queue_callback(self._require_averaged)

    def _require_averaged(self) -> None:
        """Refuse, on all ranks alike, gradients that the parameter was not given.

        Raises:
            RuntimeError: the backward pass that is over has left them to its caller.
        """
        if self.waits:
            self.waits = False
            raise RuntimeError(
                f"{self.title}: torch.autograd.grad gives gradients of its weights that are not averaged over replicas "
                "in other expert groups. Write loss.backward(), which accumulates them"
            )

    def detach(self) -> None:
        """Leave the parameters to another."""
        for hooks in self.hooks.values():
            for hook in hooks:
                hook.remove()

    def _average(self, parameter: Tensor) -> None:
        if len(parameter._post_accumulate_grad_hooks) > 1:
            raise RuntimeError(
                f"{self.title}: register_post_accumulate_grad_hook of its weights sees gradients that are not averaged "
                "over replicas yet. Step optimizers once loss.backward() is over"
            )
        gradient = parameter.grad
        assert gradient is not None, "it has been accumulated"
        assert self.replicas is not None, "there are replicas"
        self.waits = False
        self.backwards += 1
        if is_looked_at(self.backwards) and not is_captured(parameter):  # not in each replay of a CUDA graph
            self._require_replicas(self.replicas, parameter)
        self.replicas.average(gradient, self.title, steps_of(parameter))

    def _require_replicas(self, replicas: Replicas, parameter: Tensor) -> None:
        """Raise, on all replicas alike, if they do not hold the same experts.

        Raises:
            RanksDifferError: they do not.
        """
        mine = row_sums(parameter).sum()
        sums = [torch.empty_like(mine) for _ in replicas.members]
        dist.all_gather(sums, mine, group=replicas.group)
        if len({int(each) for each in sums}) > 1:
            raise RanksDifferError(
                f"{self.title}: ranks {list(replicas.members)} hold the same experts, each in "
                "its own expert group, and their weights differ. They were drawn from other seeds or loaded from other "
                "files, or only some of them have made a step. Draw experts from one seed on all ranks, or load all of "
                "a checkpoint:\n"
                '    dcp.load({"training": TrainingState(model, optimizer)}, checkpoint_id=folder)'
            )
