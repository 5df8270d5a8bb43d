"""A rank dies, hangs, strays, is interrupted or forks: what the others get, how soon, and what is left."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import colrow
from colrow.collectives import Communicator, communicator
from colrow.transport import SharedGroup, TransportError, agreement, share_memory
from colrow.transport.arena import SHARED_FILES, create_file
from tests.collectives import crew
from tests.pool import Pool
from tests.transport.available import needs_shared_memory

pytestmark = needs_shared_memory

TIMEOUT = 1.5
BUSY = 2.0
"""Seconds that a busy machine may add."""


@pytest.fixture(autouse=True)
def _server(ranks: Callable[[int], Pool]) -> None:
    """The pools' fork server runs."""
    ranks(1)


def _ready(timeout: float = TIMEOUT) -> Communicator:
    """A group whose ranks are at the same point, with a short timeout from here on."""
    size = int(os.environ["WORLD_SIZE"])
    colrow.init_mesh(tp=size, timeout=30)
    ranks = communicator(colrow.init_mesh(tp=size, timeout=30))
    ranks.all_reduce(torch.ones(300_000), label="first")
    dist.distributed_c10d._set_pg_timeout(_seconds(timeout), ranks.group)
    ranks.barrier()
    return ranks


def _seconds(number: float) -> Any:
    from datetime import timedelta

    return timedelta(seconds=number)


def _memory(ranks: Communicator) -> SharedGroup:
    shared = share_memory(ranks.group)
    assert shared is not None
    return shared


def _waiting(event: str) -> dict[str, Any]:
    """Rank 0 waits in shared memory for a rank to which something happens; seconds, processor time, error."""
    ranks = _ready()
    shared = _memory(ranks)
    tensor = torch.ones(1000)
    if ranks.rank == ranks.size - 1:
        time.sleep(0.5)
        if event == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if event == "comes late":
            time.sleep(0.5)
            shared.all_reduce(tensor, tensor)
        if event == "leaves":
            shared.close()
        time.sleep(4.0 if event == "hangs" else 2.0)
        return {}
    begin, processor = time.monotonic(), time.process_time()
    message = again = ""
    try:
        shared.all_reduce(tensor, tensor)
    except TransportError as error:
        message = str(error)
    seconds, processor = time.monotonic() - begin, time.process_time() - processor
    if message:
        with pytest.raises(TransportError):
            shared.barrier()
        assert time.monotonic() - begin - seconds < 0.5, "a failed group fails at once"
        again = "failed"
    return {"seconds": seconds, "processor": processor, "message": message, "again": again}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("event", "message", "longest"),
    [
        ("dies", "rank {} has died", 0.5 + 1.0),
        ("leaves", "rank {} has left the group", 0.5 + 1.0),
        ("hangs", "rank {} did not come in time", TIMEOUT + 0.5),
        ("comes late", "", 1.0 + 0.5),
    ],
)
def test_waiting_for_a_rank(event: str, message: str, longest: float, size: int) -> None:
    """Whoever waits sleeps: a late rank costs no processor."""
    ends = crew.run(_waiting, event, size=size, stuck=(size - 1,))
    for end in ends[:-1]:
        assert end.code == 0
        assert end.result["message"].startswith(message.format(size - 1)), end
        assert bool(end.result["message"]) == bool(message), end
        assert end.result["seconds"] < longest + BUSY
        assert end.result["processor"] < 0.2


MISMATCHES: dict[str, tuple[Callable[[SharedGroup], None], Callable[[SharedGroup], None], str, str]] = {
    "size": (
        lambda group: group.all_reduce(torch.ones(10), torch.ones(10)),
        lambda group: group.all_reduce(torch.ones(500_000), torch.ones(500_000)),
        "all_reduce (sum) of 10 float32",
        "all_reduce (sum) of 500000 float32",
    ),
    "dtype": (
        lambda group: group.all_reduce(torch.ones(10), torch.ones(10)),
        lambda group: group.all_reduce(torch.ones(10).int(), torch.ones(10).int()),
        "10 float32",
        "10 int32",
    ),
    "reduction": (
        lambda group: group.all_reduce(torch.ones(10), torch.ones(10)),
        lambda group: group.all_reduce(torch.ones(10), torch.ones(10), "max"),
        "(sum)",
        "(max)",
    ),
    "operation": (
        lambda group: group.barrier(),
        lambda group: group.all_gather(torch.ones(4), torch.ones(4 * group.size)),
        "barrier",
        "all_gather of",
    ),
    "cut": (
        lambda group: group.all_gather(torch.ones(4), torch.ones(10), (4, 6)),
        lambda group: group.all_gather(torch.ones(5), torch.ones(10), (5, 5)),
        "all_gather of 40 bytes of float32",
        "all_gather of 40 bytes of float32, divided differently over the ranks",
    ),
    "source": (
        lambda group: group.broadcast(torch.ones(4), 0),
        lambda group: group.broadcast(torch.ones(4), 1),
        "all_gather of 16 bytes of float32",
        "divided differently",
    ),
    "dtype of a broadcast": (
        lambda group: group.broadcast(torch.ones(4), 0),
        lambda group: group.broadcast(torch.ones(4).int(), 0),
        "all_gather of 16 bytes of float32",
        "all_gather of 16 bytes of int32",
    ),
    "dtype of an all-gather": (
        lambda group: group.all_gather(torch.ones(4).half(), torch.ones(8).half()),
        lambda group: group.all_gather(torch.ones(4).bfloat16(), torch.ones(8).bfloat16()),
        "all_gather of 16 bytes of float16",
        "all_gather of 16 bytes of bfloat16",
    ),
    "dtype of an all-to-all": (
        lambda group: group.all_to_all(torch.ones(4).cfloat(), torch.ones(4).cfloat()),
        lambda group: group.all_to_all(torch.ones(4).double(), torch.ones(4).double()),
        "all_to_all of complex64",
        "all_to_all of float64",
    ),
    "parts": (
        lambda group: group.all_to_all(torch.ones(3), torch.ones(3), [1, 2], [1, 2]),
        lambda group: group.all_to_all(torch.ones(2), torch.ones(4), [1, 1], [3, 1]),
        "all_to_all, 4 bytes from one to the other",
        "all_to_all, 8 bytes",
    ),
}


def _strays(kind: str) -> list[Any]:
    ranks = _ready(20)
    shared = _memory(ranks)
    begin = time.monotonic()
    try:
        MISMATCHES[kind][ranks.rank](shared)  # type: ignore[operator]
    except TransportError as error:
        return [time.monotonic() - begin, error.is_mismatch, str(error)]
    return [time.monotonic() - begin, False, "no error"]


@pytest.mark.parametrize("kind", MISMATCHES)
def test_different_calls_fail_at_once(kind: str) -> None:
    ends = crew.run(_strays, kind, size=2)
    first, second = MISMATCHES[kind][2:]
    if kind not in ("parts", "cut", "source"):  # which are told from the view of one rank
        for rank, end in enumerate(ends):
            ours, theirs = (first, second) if rank == 0 else (second, first)
            assert re.fullmatch(
                rf"rank {rank} is in .*{re.escape(ours)}.*, rank {1 - rank} in .*{re.escape(theirs)}.*",
                end.result[2],
            ), end
    for end in ends:
        assert end.result[0] < BUSY, end
        assert end.result[1], end
    assert any(second in end.result[2] for end in ends) or kind == "parts"


def _different_tensors() -> None:
    ranks = _ready(20)
    with crew.timed():
        ranks.all_reduce(torch.ones(10 + ranks.rank), label="exit mlp")


def test_different_sizes_are_a_rank_failure_on_all() -> None:
    for rank, end in enumerate(crew.run(_different_tensors, size=3)):
        assert end.label == "exit mlp", end
        assert end.seconds < 3.0 + BUSY
        start = f"all_reduce 'exit mlp' did not complete on rank {rank}: all its ranks are in it, but their"
        assert end.message.startswith(start), end
    # at least whoever saw it first says what the sizes are


def _interrupted() -> list[Any]:
    ranks = _ready(20)
    shared = _memory(ranks)
    begin = time.monotonic()
    try:
        if ranks.rank == 1:
            time.sleep(1.0)
            shared.barrier()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        shared.barrier()
    except BaseException as error:
        return [time.monotonic() - begin, type(error).__name__, str(error)]
    return [0, "", ""]


def test_control_c_while_waiting() -> None:
    ends = crew.run(_interrupted, size=2)
    assert ends[0].result[1] == "KeyboardInterrupt", ends[0]
    assert ends[0].result[0] < 0.3 + 0.3 + BUSY
    assert ends[1].result[1:] == ["TransportError", "rank 0 was interrupted, says rank 0"]


def _interrupted_in_gloo() -> list[Any]:
    os.environ["COLROW_TRANSPORT"] = "gloo"
    ranks = _ready(20)
    if ranks.rank == 1:
        time.sleep(60)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    begin = time.monotonic()
    try:
        ranks.all_reduce(torch.ones(10))
    except BaseException as error:
        dist.destroy_process_group = lambda: None  # which waits for gloo
        return [time.monotonic() - begin, type(error).__name__]
    return []


def test_control_c_while_waiting_for_gloo() -> None:
    ends = crew.run(_interrupted_in_gloo, size=2, stuck=(1,))
    assert ends[0].result[1] == "KeyboardInterrupt", ends[0]
    assert ends[0].result[0] < 0.3 + 0.3 + BUSY


def _handles(what: str) -> list[Any]:
    """A signal handler on rank 0 calls the group in which its thread waits."""
    ranks = _ready(20)
    shared = _memory(ranks)
    if ranks.rank == 1:
        time.sleep(1.0)
    else:
        call = shared.barrier if what == "calls" else shared.close
        signal.signal(signal.SIGUSR1, lambda *_: call())
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    begin = time.monotonic()
    try:
        shared.barrier()
    except BaseException as error:
        return [time.monotonic() - begin, type(error).__name__, str(error)]
    return [0, "", ""]


@pytest.mark.parametrize(
    ("what", "own", "seen"),
    [
        ("calls", "ValueError: a signal handler has called a collective", "rank 0 was interrupted"),
        ("leaves", "TransportError: this rank has left the group", "rank 0 has left the group"),
    ],
)
def test_a_signal_handler_that_uses_the_group(what: str, own: str, seen: str) -> None:
    """It would wait for itself, where nothing but SIGKILL ends it."""
    ends = crew.run(_handles, what, size=2, limit=20)
    assert ": ".join(ends[0].result[1:]).startswith(own), ends[0]
    assert ends[0].result[0] < 0.3 + 0.3 + BUSY
    assert ends[1].result[1] == "TransportError"
    assert ends[1].result[2].startswith(seen), ends[1]


def _own_part() -> str:
    ranks = _ready(20)
    own = [2 if rank == ranks.rank else 1 for rank in range(ranks.size)]
    with pytest.raises(ValueError, match="the arguments do not fit together"):
        _memory(ranks).all_to_all(torch.ones(3), torch.ones(2), own, [1, 1])
    ranks.barrier()
    return "goes on"


def test_what_a_rank_gives_to_itself() -> None:
    """It must be what the rank takes: seen before anything is done."""
    assert [end.result for end in crew.run(_own_part, size=2)] == ["goes on"] * 2


def _forks() -> list[Any]:
    ranks = _ready(20)
    shared = _memory(ranks)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            ranks.all_reduce(torch.ones(3))
            text = "no error"
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writer, text.encode())
        os._exit(0)
    os.waitpid(child, 0)
    told = os.read(reader, 1000).decode()
    return [told, ranks.all_reduce(torch.ones(2)).tolist(), shared.counters()["sleeps"] >= 0]


def test_fork_after_start() -> None:
    for end in crew.run(_forks, size=2):
        assert end.result[0].startswith("ValueError: this process was forked from a rank"), end
        assert end.result[1] == [2, 2]


def _two_threads() -> bool:
    """Threads of a rank take turns; a group that is closed ends the collective of another thread."""
    ranks = _ready(20)
    shared = _memory(ranks)
    wrong: list[torch.Tensor] = []

    def work() -> None:
        for _ in range(200):
            tensor = torch.ones(20_000)
            shared.all_reduce(tensor, tensor)
            if not bool((tensor == ranks.size).all()):
                wrong.append(tensor)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    shared.barrier()
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            shared.barrier()
        except TransportError as error:
            raised.append(error)

    if ranks.rank == 0:
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.3)
        shared.close()
        thread.join(5.0)
        assert [str(error) for error in raised] == ["this rank has left the group"]
        with pytest.raises(TransportError, match="this rank has left the group"):
            shared.barrier()
    else:
        time.sleep(1.0)
        with pytest.raises(TransportError, match="rank 0 has left the group"):
            shared.barrier()
    return True


def test_threads() -> None:
    for end in crew.run(_two_threads, size=2):
        assert (end.code, end.result) == (0, True)


def _gloo_group_destroyed() -> list[Any]:
    """A group that somebody made with gloo: colrow's own collectives share memory beside it."""
    from datetime import timedelta

    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    ranks = communicator(colrow.init_mesh(tp=2, timeout=20))
    assert ranks.all_reduce(torch.ones(2), label="before").tolist() == [2, 2]
    assert share_memory(ranks.group) is not None
    if ranks.rank == 1:
        dist.destroy_process_group()
        time.sleep(5)
        return []
    begin = time.monotonic()
    try:
        ranks.all_reduce(torch.ones(2), label="after")
    except colrow.RankFailure as failure:
        return [time.monotonic() - begin, list(failure.ranks), failure.label]
    return []


def test_a_gloo_group_that_is_destroyed() -> None:
    ends = crew.run(_gloo_group_destroyed, size=2, stuck=(1,))
    seconds, blamed, label = ends[0].result
    assert (blamed, label) == ([1], "after")
    assert seconds < 1.0 + BUSY


@contextlib.contextmanager
def _only_files(folder: Path = SHARED_FILES) -> Iterator[None]:
    saved = agreement.CREATORS
    agreement.CREATORS = (lambda ranks: create_file(ranks, folder),)
    yield
    agreement.CREATORS = saved


def _files() -> list[str]:
    return sorted(path.name for path in SHARED_FILES.glob("colrow-*"))


def _in_files(room: int) -> list[Any]:
    """Through a file in /dev/shm that has room for so many bytes only."""
    fallocate = os.posix_fallocate

    def allocate(file: int, start: int, length: int) -> None:
        if length > room:
            raise OSError(28, "No space left on device")
        fallocate(file, start, length)

    os.posix_fallocate = allocate
    with _only_files():
        ranks = _ready(20)
    shared = share_memory(ranks.group)
    result = ranks.all_reduce(torch.arange(400_000.0)).equal(torch.arange(400_000.0) * ranks.size)
    if ranks.rank == 1 and shared is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    return [result, shared.bytes if shared is not None else 0]


@pytest.mark.parametrize("room", [64 << 20, 700_000, 1000])
def test_small_shared_memory(room: int) -> None:
    """Smaller buffers where there is little room, gloo where there is none; nothing is left behind."""
    before = _files()
    ends = crew.run(_in_files, room, size=2)
    assert ends[0].result[0]
    assert ends[0].result[1] <= room
    assert (ends[0].result[1] > 0) == (room > 1000)
    assert _files() == before


def test_stale_files_are_removed(tmp_path: Path) -> None:
    """One that nobody holds and that is old; not one that a process holds, nor a new one."""
    held = create_file(2, tmp_path)
    stale, young = tmp_path / "colrow-1-a", tmp_path / "colrow-2-b"
    for path in (stale, young):
        path.write_bytes(b"x")
    for path in (stale, Path(held.path)):
        os.utime(path, (1, 1))
    child = os.fork()
    if child == 0:  # a lock is held against other processes
        create_file(2, tmp_path)
        os._exit(0)
    os.waitpid(child, 0)
    assert not stale.exists()
    assert young.exists()
    assert Path(held.path).exists()
    os.close(held.file)


def _many(count: int) -> list[int]:
    """Resident kilobytes after some collectives and after many more; open files."""
    ranks = _ready(60)
    shared = _memory(ranks)
    tensor = torch.ones(64)

    def resident() -> int:
        return int(re.findall(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[0])

    def calls(number: int) -> None:
        for _ in range(number):
            shared.all_reduce(tensor, tensor, "max")
            dist.all_reduce(tensor, dist.ReduceOp.MAX)

    calls(1000)
    files, before = len(os.listdir("/proc/self/fd")), resident()
    calls(count)
    return [before, resident(), files, len(os.listdir("/proc/self/fd"))]


def _check_memory(count: int, limit: float) -> None:
    for end in crew.run(_many, count, size=2, limit=limit):
        before, after, files, files_after = end.result
        assert after < before + 1000, f"grew by {after - before} kB"
        assert files == files_after


def test_memory_does_not_grow() -> None:
    _check_memory(5000, 60)


@pytest.mark.slow
def test_memory_does_not_grow_over_a_million() -> None:
    _check_memory(500_000, 600)
