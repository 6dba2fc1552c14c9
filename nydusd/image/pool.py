"""A pool of processes that work on a stream of tasks and give the results in the order of the tasks.

Runs in the process of the command, which has one thread, or others that only run a compressor (`nydusd.image.batches`).
Each worker is a fork of it and has two slots of shared memory for what it makes, so that it goes on while a result is being
written; nothing is pickled but tasks and small results.
Memory is bounded by the slots, whatever the number of tasks.

A worker that dies (out of memory, a kill) is replaced and its tasks are given to the new one; the third death over the
same task is an error. Workers end when the pipe to the command closes, so none outlives it, however it ends.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, Pipe, wait
from types import TracebackType
from typing import Generic, Self, TypeVar

from nydusd.errors import InternalError, NydusError
from nydusd.image.errors import ImageError

_SLOTS = 2
_TRIES = 3
_TICK = 0.2

T = TypeVar("T")
R = TypeVar("R")
Work = Callable[[T, memoryview], R]
"""Does a task: bytes into the view, which is one slot; what else there is to say is the result."""


class _Task(Generic[T]):
    def __init__(self, task: T) -> None:
        self.task = task
        self.slot = 0
        self.tries = 0


class _Worker(Generic[T, R]):
    """One process and its slots. `tasks` are those it has and has not answered, in order."""

    def __init__(self, slot_size: int) -> None:
        self.slot_size = slot_size
        self.memory = mmap.mmap(-1, _SLOTS * slot_size)
        self.free = list(range(_SLOTS))
        self.tasks: deque[_Task[T]] = deque()
        self.pid = 0
        self.pipe: Connection | None = None

    def slot(self, number: int) -> memoryview:
        return memoryview(self.memory)[number * self.slot_size : (number + 1) * self.slot_size]

    def send(self, task: _Task[T]) -> None:
        assert self.pipe is not None
        # A dead one is found, and replaced, by whoever waits for its answer.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send((task.slot, task.task))


class Pool(Generic[T, R]):
    """`with Pool(work, processes, slot_size) as pool: for task, result, data in pool.run(tasks): ...`

    `data` is a view of the slot and is good until the next step of the loop. An error that `work` raises is raised by
    `run`.
    """

    def __init__(self, work: Work[T, R], processes: int, slot_size: int) -> None:
        self._work = work
        self._workers = [_Worker[T, R](slot_size) for _ in range(processes)]

    def __enter__(self) -> Self:
        for worker in self._workers:
            self._start(worker)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            self._end(worker, kill=kind is not None)

    def run(self, tasks: Iterable[T]) -> Iterator[tuple[T, R, memoryview]]:
        """The results in the order of the tasks. Tasks are drawn as workers have room for them."""
        source = iter(tasks)
        waiting: deque[tuple[_Worker[T, R], _Task[T]]] = deque()
        while True:
            while (worker := self._with_room()) is not None:
                try:
                    task = _Task(next(source))
                except StopIteration:
                    break
                task.slot = worker.free.pop(0)
                worker.tasks.append(task)
                worker.send(task)
                waiting.append((worker, task))
            if not waiting:
                return
            worker, task = waiting.popleft()
            result = self._result(worker)
            with worker.slot(task.slot) as data:
                yield task.task, result, data
            worker.free.append(task.slot)

    def run_any(self, tasks: Iterable[T], tick: Callable[[], None]) -> Iterator[tuple[T, R]]:
        """The results as they come, for tasks of very different length: each worker has one at a time.

        `tick` is called while none has come, some times a second.
        """
        source = iter(tasks)
        while True:
            for worker in self._workers:
                if not worker.tasks and (task := next(source, None)) is not None:
                    worker.tasks.append(_Task(task))
                    worker.send(worker.tasks[0])
            busy = {worker.pipe: worker for worker in self._workers if worker.tasks and worker.pipe is not None}
            if not busy:
                return
            for pipe in wait(busy, _TICK):
                worker = busy[pipe]  # type: ignore[index]
                done = worker.tasks[0].task
                yield done, self._result(worker)
            tick()

    def _with_room(self) -> _Worker[T, R] | None:
        worker = max(self._workers, key=lambda one: len(one.free))
        return worker if worker.free else None

    def _result(self, worker: _Worker[T, R]) -> R:
        """The answer to the first task of a worker."""
        while True:
            assert worker.pipe is not None
            try:
                ok, answer = worker.pipe.recv()
            except (EOFError, ConnectionResetError):
                self._replace(worker)
                continue
            worker.tasks.popleft()
            if not ok:
                raise answer
            result: R = answer
            return result

    def _replace(self, worker: _Worker[T, R]) -> None:
        first = worker.tasks[0]
        first.tries += 1
        status = self._end(worker, kill=True)
        if first.tries >= _TRIES:
            raise ImageError(
                f"a worker process died {_TRIES} times over {first.task!s:.200} (wait status {status}): too little memory?"
            )
        self._start(worker)
        for task in worker.tasks:
            worker.send(task)

    def _start(self, worker: _Worker[T, R]) -> None:
        ours, theirs = Pipe()
        others = [one.pipe for one in self._workers if one.pipe is not None]
        pid = os.fork()
        if pid == 0:
            # Copies of the others' pipes would keep those workers alive after the command's death.
            for pipe in [ours, *others]:
                pipe.close()
            _serve(theirs, self._work, worker)
        theirs.close()
        worker.pid, worker.pipe = pid, ours

    @staticmethod
    def _end(worker: _Worker[T, R], *, kill: bool) -> int:
        if worker.pipe is None:
            return 0
        if kill:
            os.kill(worker.pid, signal.SIGKILL)
        worker.pipe.close()
        worker.pipe = None
        return os.waitpid(worker.pid, 0)[1]


def _serve(pipe: Connection, work: Work[T, R], worker: _Worker[T, R]) -> None:
    """A worker's life. Never returns: what the command has open or buffered is none of its business."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the command ends its workers itself
        while True:
            number, task = pipe.recv()
            try:
                with worker.slot(number) as view:
                    answer = (True, work(task, view))
            except NydusError as error:
                answer = (False, error)  # type: ignore[assignment]
            except Exception:  # ours: the command must say it, with the place where it happened
                answer = (False, InternalError(traceback.format_exc()))  # type: ignore[assignment]
            pipe.send(answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)
    finally:
        os._exit(1)
