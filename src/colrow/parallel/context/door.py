"""Where a call of a model begins and ends: its sequences are cut, and what it gives is put together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from colrow.apply.replay import Replaying
from colrow.apply.values import Change, changed
from colrow.errors import PlanError
from colrow.forwards import OwnForward, own_forwards
from colrow.parallel.context.names import positional_names
from colrow.parallel.context.plan import ContextPlan, Extent
from colrow.parallel.context.results import ShardedSequence
from colrow.parallel.context.running import Running, TakenAtDoor
from colrow.parallel.context.share import SequenceShare
from colrow.plan.places import Path
from colrow.replicas import fingerprint
from colrow.trace.tree import tensors_by_path
from colrow.tracer import outside_of_graphs

_NOT_COMPILED = (
    "sequences are cut over ranks (cp) in Python: compile the layers of the model instead of all of it"
)


class Door(OwnForward):
    """A model's forward on a rank's tokens.

    Args:
        model: in which all calls have been changed.
        plan: what comes in and goes out.
        running: is told which tokens the rank has.

    Attributes:
        before: attentions and losses that earlier stages of a pipeline have done of this call.
    """

    def __init__(self, model: nn.Module, plan: ContextPlan, running: Running) -> None:
        super().__init__(model)
        self._plan, self._running = plan, running
        self.before = (0, 0)
        self._is_released = False
        self._checked: set[int] = set()

    def release(self) -> None:
        self._is_released = True

    @property
    def passed(self) -> tuple[int, int]:
        """How many attentions and losses the last call had, if it was a stage's up to that stage's end."""
        return self._running.counts[0], self._running.counts[1]

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._inner(arguments, keywords) if self._is_released else self._cut(*arguments, **keywords)

    @outside_of_graphs(_NOT_COMPILED)
    def _cut(self, *arguments: Any, **keywords: Any) -> Any:
        running = self._running
        given = self._by_name(arguments, keywords)
        share = self._share(given)
        running.counts = [0, 0]
        output = self._on_tokens(given, share, arguments, keywords)
        course = (self.before[0] + running.counts[0], self.before[1] + running.counts[1])
        if course not in self._plan.outputs:
            why = "" if course[1] else self._plan.without_targets
            reason = f" ({why})" if why else ""
            raise PlanError(
                "",
                f"this call has {course[0]} attentions and {course[1]} losses over tokens, the examples had "
                f"{' or '.join(f'{one[0]} and {one[1]}' for one in sorted(self._plan.outputs))}; sequences "
                f"are cut over ranks (cp), and what the model does in other calls is not known{reason}",
                "Give colrow.parallelize an example of each way in which the model is called.",
            )
        for path, extent in self._plan.outputs[course].items():
            output = changed(output, path, self._leaving(path, extent, share, has_loss=course[1] > 0))
        return output

    def _on_tokens(
        self,
        given: dict[int | str, Any],
        share: SequenceShare,
        arguments: tuple[Any, ...],
        keywords: Mapping[str, Any],
    ) -> Any:
        """What the model makes of this rank's tokens of its arguments."""
        with self._holding(share):
            for path, dimension in self._plan.inputs.items():
                take = partial(self._take, extent=Extent(dimension))
                if path[0] in given:
                    given[path[0]] = changed(given[path[0]], path[1:], take)
            own, named = self._as_given(given, arguments, keywords)
            return self._inner(own, named)

    def _leaving(self, path: Path, extent: Extent, share: SequenceShare, has_loss: bool) -> Change:
        """What becomes of a rank's tokens in the result."""
        running = self._running
        if has_loss:
            return lambda local: ShardedSequence(local, share, extent, running)  # type: ignore[return-value]
        label = f"gather {'.'.join(map(str, path)) or 'the result'}"

        def join(local: Tensor) -> Tensor:
            with running.of(share):
                return running.join(local, extent, label)

        return join

    @contextmanager
    def _holding(self, share: SequenceShare) -> Iterator[None]:
        """A context in which the share is known, and again when what is checkpointed in it is recomputed."""
        with self._running.of(share), Replaying(lambda: partial(self._holding, share)):
            yield

    # ---------------------------------------------------------------- arguments

    @cached_property
    def _names(self) -> list[str]:
        return positional_names(self)

    def _by_name(self, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> dict[int | str, Any]:
        """All arguments by their names; by their positions where they have none."""
        names = [*self._names[: len(arguments)], *range(len(self._names), len(arguments))]
        return {**dict(zip(names, arguments, strict=True)), **keywords}

    @staticmethod
    def _as_given(
        given: Mapping[int | str, Any], arguments: tuple[Any, ...], keywords: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        items = list(given.values())
        return tuple(items[: len(arguments)]), {name: given[name] for name in keywords}

    def _share(self, given: Mapping[int | str, Any]) -> SequenceShare:
        """The share of this call's sequences.

        Raises:
            ValueError: if the call is not like the examples, or the ranks' calls differ.
        """
        plan, ranks = self._plan, self._running.ranks
        tensors = _tensors(given)
        unknown = [path for path in tensors if path not in plan.inputs and path not in plan.whole_inputs]
        if unknown:
            raise ValueError(
                f"the model is given {'.'.join(map(str, unknown[0]))}, which it was not in the examples that "
                "it was parallelized with; sequences are cut over ranks (cp), and what it does with that is "
                "not known: give colrow.parallelize an example of each way in which the model is called"
            )
        lengths = self._lengths(tensors)
        if not lengths:
            names = ", ".join(".".join(map(str, path)) for path in plan.inputs)
            raise ValueError(f"the model is given no sequence: it needs {names}, as in the examples")
        length = next(iter(lengths.values()))
        for path, other in lengths.items():
            if other not in (length, 1):
                raise ValueError(f"{'.'.join(map(str, path))} has {other} tokens, others have {length}")
        self._check_same(length, tensors)
        for path, number in plan.constants.items():
            if path in tensors and bool((tensors[path] != number).any()):
                raise ValueError(
                    f"{'.'.join(map(str, path))} is not {number} everywhere, as in the examples; sequences "
                    "are cut over ranks (cp): leave padding out, or mark its labels as ignored without a mask"
                )
        for path in plan.counting & tensors.keys():
            # a program may look for where they begin anew, and finds none among a rank's tokens
            if bool((tensors[path].diff(dim=plan.inputs[path]) != 1).any()):
                raise ValueError(
                    f"{'.'.join(map(str, path))} does not count on from token to token, as in the examples; "
                    "sequences are cut over ranks (cp), and what the model does with several in one is not "
                    "known: give colrow.parallelize an example of that"
                )
        share = SequenceShare(length, ranks.size, self._running.order)
        if length not in self._checked:
            self._check_course(length, share)
            self._checked.add(length)
        return share

    def _lengths(self, tensors: Mapping[Path, Tensor]) -> dict[Path, int]:
        """How many tokens each argument has that is cut."""
        inputs = self._plan.inputs
        return {path: tensors[path].shape[dimension] for path, dimension in inputs.items() if path in tensors}

    def _check_course(self, length: int, share: SequenceShare) -> None:
        """The program must go the same way on each rank's tokens as on all; all ranks decide alike."""
        for guard in self._plan.guards:
            for tokens in sorted(set(share.counts)):
                if guard.differs(tokens, length):
                    raise ValueError(
                        f"with {tokens} of {length} tokens on a rank the program would take another way than "
                        f"with all ({guard}): give longer sequences, cut them over fewer ranks (cp), or do "
                        "not let the program depend on the length"
                    )

    def _check_same(self, length: int, tensors: Mapping[Path, Tensor]) -> None:
        """All ranks of the group must be given the same batch: they have parts of its sequences."""
        ranks = self._running.ranks
        if ranks.size == 1:
            return
        first = next(iter(tensors.values()))
        own = torch.tensor([length, len(tensors)], dtype=torch.int64, device=first.device)
        for tensor in tensors.values():
            if not tensor.is_floating_point() and not tensor.is_complex():
                own = torch.cat([own, fingerprint(tensor)])
        # as long on all ranks, whatever they were given
        own = torch.stack([own[0], own[1], (own * 31 ** torch.arange(len(own), device=own.device)).sum()])
        everyone = ranks.all_gather(own.unsqueeze(0), 0, label="compare the ranks' batches")
        if bool((everyone != everyone[:1]).any()):
            raise ValueError(
                "the ranks of a cp group are given different batches: each works on its tokens of the same "
                "sequences, so give all of them the same; other ranks of dp get other batches"
            )

    def _take(self, whole: Tensor, extent: Extent) -> Tensor:
        if whole.shape[extent.dimension] == 1 != self._running.share.length:
            return whole  # one for all tokens
        if whole.requires_grad and torch.is_grad_enabled():
            taken: Tensor = TakenAtDoor.apply(whole, self._running, extent)
            return taken
        return self._running.take(whole, extent)


def _tensors(given: Mapping[int | str, Any]) -> dict[Path, Tensor]:
    return {
        (name, *path): tensor
        for name, item in given.items()
        for path, tensor in tensors_by_path(item, inside_objects=True)
    }


class Rehearsal(Door):
    """A door for tensors without numbers and ranks that are not there: nothing is compared."""

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        given = self._by_name(arguments, keywords)
        length = max(self._lengths(_tensors(given)).values())
        share = SequenceShare(length, self._running.ranks.size, self._running.order)
        return self._on_tokens(given, share, arguments, keywords)


def door_of(model: nn.Module) -> Door | None:
    """Where calls of a model begin whose sequences are cut over ranks."""
    return next((one for one in own_forwards(model) if isinstance(one, Door)), None)
