"""Shared memory as a backend of torch.distributed: what it lacks goes through gloo."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.checkpoint as checkpoint
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

import colrow
from colrow.collectives import communicator
from colrow.transport.c10d import SharedMemoryProcessGroup
from tests.collectives import crew
from tests.pool import Pool
from tests.transport.available import needs_shared_memory

pytestmark = needs_shared_memory


@pytest.fixture(autouse=True)
def _server(ranks: Callable[[int], Pool]) -> None:
    """The pools' fork server runs."""
    ranks(1)


def _join() -> SharedMemoryProcessGroup:
    colrow.init_mesh(tp=int(os.environ["WORLD_SIZE"]), timeout=30)
    group = dist.group.WORLD
    assert isinstance(group, SharedMemoryProcessGroup)
    assert dist.get_backend() == "shm"
    return group


def _of_ranks(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(world())]


def world() -> int:
    return dist.get_world_size()


def _plain_calls() -> bool:
    """All that dist offers, with and without async_op, on contiguous tensors and others."""
    group = _join()
    rank, size = dist.get_rank(), world()
    parts = _of_ranks((4, 6), 1)
    total = sum(parts)
    for transposed in (False, True):

        def own(transposed: bool = transposed) -> Tensor:
            """This rank's part, perhaps with other strides."""
            mine = parts[rank].clone()
            return mine.t().contiguous().t() if transposed else mine

        for asynchronous in (False, True):
            tensor = own()
            work = dist.all_reduce(tensor, async_op=asynchronous)
            if work is not None:
                assert work.wait()
                assert work.is_completed()
            torch.testing.assert_close(tensor, total)
        for operation, expected in (
            (dist.ReduceOp.AVG, total / size),
            (dist.ReduceOp.MAX, torch.stack(parts).amax(0)),
            (dist.ReduceOp.MIN, torch.stack(parts).amin(0)),
            (dist.ReduceOp.PRODUCT, torch.stack(parts).prod(0)),
        ):
            tensor = own()
            dist.all_reduce(tensor, operation)
            torch.testing.assert_close(tensor, expected)
        tensor = own()
        dist.broadcast(tensor, size - 1)
        assert torch.equal(tensor, parts[-1])
        listed = [torch.empty(4, 6, dtype=torch.float64) for _ in range(size)]
        dist.all_gather(listed, own())
        assert torch.equal(torch.stack(listed), torch.stack(parts))
        result = torch.empty(4 * size, 6, dtype=torch.float64)
        dist.all_gather_into_tensor(result, own())
        assert torch.equal(result, torch.cat(parts))
    blocks = _of_ranks((size, 3), 2)
    summed = torch.empty(3, dtype=torch.float64)
    dist.reduce_scatter_tensor(summed, blocks[rank].reshape(-1))
    torch.testing.assert_close(summed, sum(blocks)[rank])
    dist.reduce_scatter(summed, list(blocks[rank]), dist.ReduceOp.AVG)
    torch.testing.assert_close(summed, sum(blocks)[rank] / size)
    received = torch.empty_like(blocks[rank])
    dist.all_to_all_single(received, blocks[rank])
    assert torch.equal(received, torch.stack([block[rank] for block in blocks]))
    rows = [rank + 1] * size
    unequal = torch.cat([torch.full((rank + 1, 2), 10.0 * rank + to) for to in range(size)])
    received = torch.empty(sum(range(1, size + 1)), 2)
    dist.all_to_all_single(received, unequal, list(range(1, size + 1)), rows)
    expected_rows = [torch.full((sender + 1, 2), 10.0 * sender + rank) for sender in range(size)]
    assert torch.equal(received, torch.cat(expected_rows))
    pieces = [torch.empty(3, dtype=torch.float64) for _ in range(size)]
    dist.all_to_all(pieces, list(blocks[rank]))
    assert torch.equal(torch.stack(pieces), torch.stack([block[rank] for block in blocks]))
    turned = nn.Parameter(torch.full((4, 3), float(rank)).t())
    dist.broadcast(turned, 1)
    dist.all_reduce(turned)
    leaves = [torch.empty(3, 4).t().requires_grad_() for _ in range(size)]
    dist.all_gather(leaves, turned.detach().t().contiguous().t().reshape(4, 3))
    assert all(torch.equal(leaf, torch.full((4, 3), float(size))) for leaf in leaves)
    dist.barrier()
    assert group.shared_memory() is not None
    return True


def _parts_that_do_not_fit() -> bool:
    """Refused before anything is read or written beyond a tensor; the group goes on."""
    _join()
    size = world()
    for parts in ([torch.empty(1_000_000)] * size, [torch.empty(2)] * size, [torch.empty(4)] * (size + 1)):
        with pytest.raises(ValueError, match=f"all_gather: parts of .* for {size} ranks"):
            dist.all_gather(parts, torch.ones(4))
        with pytest.raises(ValueError, match=f"reduce_scatter: parts of .* for {size} ranks"):
            dist.reduce_scatter(torch.ones(4), parts)
    dist.all_reduce(torch.ones(1))
    return True


def _through_gloo() -> bool:
    """What shared memory lacks: to and from one rank, sending, sparse tensors, objects."""
    _join()
    rank, size = dist.get_rank(), world()
    tensor = torch.full((3,), float(rank))
    if rank == 0:
        dist.send(torch.arange(3.0), 1)
    if rank == 1:
        dist.recv(tensor, 0)
        assert tensor.tolist() == [0, 1, 2]
    tensor = torch.full((3,), float(rank))
    dist.reduce(tensor, 1)
    assert rank != 1 or tensor.tolist() == [sum(range(size))] * 3
    gathered = [torch.empty(2) for _ in range(size)] if rank == 0 else None
    dist.gather(torch.full((2,), float(rank)), gathered)
    assert gathered is None or [part[0].item() for part in gathered] == list(range(size))
    dist.scatter(
        tensor := torch.empty(2), [torch.full((2,), float(to)) for to in range(size)] if rank == 0 else None
    )
    assert tensor.tolist() == [rank, rank]
    found: list[Any] = [None] * size
    dist.all_gather_object(found, {"rank": rank})
    assert found == [{"rank": other} for other in range(size)]
    told = [{"told": 1} if rank == 0 else None]
    dist.broadcast_object_list(told)
    assert told == [{"told": 1}]
    sparse = torch.sparse_coo_tensor([[rank]], [1.0], (size,))
    dist.all_reduce(sparse)
    assert sparse.to_dense().tolist() == [1.0] * size
    return True


def _functional() -> bool:
    """Functional collectives, eager and compiled, and what is made of them."""
    _join()
    rank, size = dist.get_rank(), world()
    group = dist.group.WORLD
    assert group is not None
    parts = _of_ranks((size * 2, 3), 3)
    own, total = parts[rank], sum(parts)

    def every(x: Tensor) -> tuple[Tensor, ...]:
        return (
            functional.all_reduce(x * 1, "sum", group),
            functional.all_reduce(x * 1, "avg", group),
            functional.all_gather_tensor(x * 1, 0, group),
            functional.reduce_scatter_tensor(x * 1, "sum", 0, group),
            functional.all_to_all_single(x * 1, None, None, group),
            functional.broadcast(x * 1, 0, group),
        )

    expected = (
        total,
        total / size,
        torch.cat(parts),
        total[2 * rank : 2 * rank + 2],
        torch.cat([part[2 * rank : 2 * rank + 2] for part in parts]),
        parts[0],
    )
    under_way = functional.all_reduce(own, "sum", group)
    dist.all_reduce(under_way)  # which has no memory of its own
    torch.testing.assert_close(under_way + 0, total * size)
    gathered = torch.empty(2 * size * size, 3, dtype=torch.float64)
    dist.all_gather_into_tensor(gathered, functional.all_reduce(own, "sum", group))
    torch.testing.assert_close(gathered, torch.cat([total] * size))
    torch.testing.assert_close(
        communicator(group).all_reduce(functional.all_reduce(own, "sum", group)), size * total
    )
    for function in (every, torch.compile(every, backend="aot_eager", fullgraph=True)):
        for found, wanted in zip(function(own), expected, strict=True):
            torch.testing.assert_close(found + 0, wanted)
    mesh = colrow.init_mesh(tp=size)["tp"]
    with pytest.raises(ValueError, match="a DTensor has no memory of its own"):
        dist.all_reduce(DTensor.from_local(own, mesh, [Shard(0)]))
    whole = DTensor.from_local(own, mesh, [Shard(0)]).redistribute(mesh, [Replicate()]).to_local()
    assert torch.equal(whole, torch.cat(parts))
    return True


def _model(seed: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5)).double()


def _gradients_of_all(seed: int = 7) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs of each rank, and the mean over ranks of the model's gradients on them."""
    inputs = _of_ranks((3, 6), seed)
    model = _model()
    (sum(model(x).square().sum() for x in inputs) / world()).backward()
    return inputs, [parameter.grad for parameter in model.parameters()]  # type: ignore[misc]


def _data_parallel() -> bool:
    """DDP and FSDP2 reduce their gradients; DCP saves and loads what FSDP2 has cut."""
    _join()
    inputs, expected = _gradients_of_all()
    rank = dist.get_rank()
    replicated = DistributedDataParallel(_model())
    replicated(inputs[rank]).square().sum().backward()
    for parameter, gradient in zip(replicated.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    mesh = colrow.init_mesh(dp=world())["dp"]
    model = _model()
    fully_shard(model, mesh=mesh)
    model(inputs[rank]).square().sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert isinstance(parameter.grad, DTensor)
        torch.testing.assert_close(parameter.grad.full_tensor(), gradient)
    folder = [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(folder)
    checkpoint.save({"model": model.state_dict()}, checkpoint_id=folder[0])
    assert (Path(folder[0]) / ".metadata").exists()
    other = _model(6)
    fully_shard(other, mesh=mesh)
    state = {"model": other.state_dict()}
    checkpoint.load(state, checkpoint_id=folder[0])
    for name, value in _model().state_dict().items():
        assert torch.equal(state["model"][name].full_tensor(), value), name
    return True


def _subgroups() -> bool:
    """Groups of some ranks, used in turn; and one that is destroyed while the others go on."""
    _join()
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([1, 2]), dist.new_group([2, 0])]
    for _ in range(3):
        for pair in pairs:
            members = dist.get_process_group_ranks(pair) if dist.get_rank(pair) >= 0 else []
            if rank in members:
                assert isinstance(pair, SharedMemoryProcessGroup)
                tensor = torch.tensor([float(rank)])
                dist.all_reduce(tensor, group=pair)
                assert tensor.item() == sum(members)
                assert communicator(pair).all_reduce(torch.ones(2)).tolist() == [2, 2]
        dist.barrier()
    mesh = colrow.init_mesh(tp=3)
    pair = communicator(mesh).subgroup([2, 0]) if rank != 1 else None
    if pair is not None:
        assert pair.all_gather(torch.tensor([rank]), 0).tolist() == [2, 0]
        assert isinstance(pair.group, SharedMemoryProcessGroup)
    if rank in (0, 1):
        dist.destroy_process_group(pairs[0])
    tensor = torch.ones(1)
    dist.all_reduce(tensor)
    assert tensor.item() == 3
    return True


@pytest.mark.parametrize(
    ("function", "size"),
    [
        (_plain_calls, 2),
        (_plain_calls, 3),
        (_parts_that_do_not_fit, 2),
        (_through_gloo, 2),
        (_through_gloo, 3),
        (_functional, 2),
        (_data_parallel, 2),
        (_subgroups, 3),
    ],
)
def test_torch_distributed(function: Callable[[], bool], size: int) -> None:
    for end in crew.run(function, size=size, limit=60):
        assert end.code == 0
        assert end.result is True


def _fall_back() -> list[str]:
    """Without shared memory the same group works through gloo, with the same sums of half precision."""
    group = _join()
    rank, size = dist.get_rank(), world()
    assert group.shared_memory() is None
    parts = _of_ranks((1000,), 4, torch.bfloat16)
    tensor = parts[rank].clone()
    dist.all_reduce(tensor)
    wide = parts[0].float()
    for part in parts[1:]:
        wide += part.float()
    assert (tensor.float() - wide).abs().max() <= wide.abs().max() * 2**-8, "rounded more than once"
    rows = torch.ones(4, 3)
    dist.all_reduce(rows[:, 1])
    assert rows.tolist() == [[1, size, 1]] * 4
    result = torch.empty(1000 * size, dtype=torch.bfloat16)
    dist.all_gather_into_tensor(result, parts[rank])
    assert torch.equal(result, torch.cat(parts))
    dist.broadcast(tensor, 1)
    dist.barrier()
    direct = communicator(group).all_reduce(parts[rank])
    assert (direct.float() - wide).abs().max() <= wide.abs().max() * 2**-8
    return []


def _without_extension() -> list[str]:
    import colrow.transport.agreement as agreement

    if os.environ["RANK"] == "1":
        agreement.what_is_lacking = lambda: "there is no extension"  # type: ignore[assignment]
    return _fall_back()


def test_without_the_extension_on_one_rank() -> None:
    for end in crew.run(_without_extension, size=3):
        assert (end.code, end.result) == (0, [])
