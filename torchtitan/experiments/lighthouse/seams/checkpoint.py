"""Upstream's checkpoint manager with the moments named at which ours checks, chooses and seals: 0.2.2 has no hooks.

What is written and read stays torch's distributed checkpoint. The writer digests every byte on its way to the file, so
that nothing is read back, on the rank that writes it. torch gathers what the ranks have written where it writes the
table of contents, also in the background, and there the digests arrive too.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future as TorchFuture
from torchtitan.components.checkpoint import DATALOADER, MODEL, AsyncMode, CheckpointManager
from torchtitan.experiments.lighthouse.errors import Refused
from torchtitan.experiments.lighthouse.seams.unpickle import AllowListPlanner, AllowListReader
from torchtitan.tools.utils import GarbageCollection
from xxhash import xxh3_128

T = TypeVar("T")

#: Name of a file to its size in bytes and its digest.
Written = dict[str, tuple[int, str]]
#: Called once, where the table of contents is written, when all files are on the disk. It may run in another process.
Seal = Callable[[Path, Written], None]


#: From so many bytes on, a thread is worth its while.
_LARGE = 1 << 18


class DigestingStream(io.BufferedWriter):
    """A new file that is digested while it is written: neither waits for Python, so one hides behind the other."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self.digest = xxh3_128()
        self.failure: OSError | None = None
        self._digesting = ThreadPoolExecutor(1, "digest")

    def write(self, data: Any) -> int:
        digested = None
        if len(data) < _LARGE:
            self.digest.update(data)
        else:
            digested = self._digesting.submit(self.digest.update, data)
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise
        finally:
            if digested is not None:
                digested.result()  # torch takes the bytes back

    def close(self) -> None:
        super().close()
        self._digesting.shutdown()


class DigestingFiles(FileSystem):
    """Remembers size and digest of every file that it has written."""

    def __init__(self) -> None:
        self.written: Written = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        if mode != "wb":
            with super().create_stream(path, mode) as plain:
                yield plain
            return
        path = Path(path)
        stream = DigestingStream(path)
        try:
            with stream:
                yield stream
        except Exception as error:
            # torch makes another error of it, in the middle of a file, which says nothing of the disk.
            raise stream.failure or error from error
        self.written[path.name] = path.stat().st_size, stream.digest.hexdigest()

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)


@dataclass(frozen=True)
class DigestedResult(WriteResult):
    """What torch sends to the rank that writes the table of contents, and what this rank has written."""

    written: Written = field(default_factory=dict)


class DigestingWriter(FileSystemWriter):
    """torch's writer, which calls ``seal`` when all is written.

    Args:
        mark: put into the table of contents, for whoever wants to know that this writer wrote it.
    """

    def __init__(self, path: Path, seal: Seal, mark: str) -> None:
        super().__init__(path)
        self.fs: DigestingFiles = DigestingFiles()
        self.seal, self.mark = seal, mark

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        results = super().write_data(plan, planner).wait()
        digested: list[WriteResult] = [
            DigestedResult(result.index, result.size_in_bytes, result.storage_data, {} if i else self.fs.written)
            for i, result in enumerate(results)
        ]
        future: TorchFuture[list[WriteResult]] = TorchFuture()
        future.set_result(digested)
        return future

    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta(checkpoint_id=self.checkpoint_id, save_id=self.save_id, modules=[self.mark])

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        written: Written = {}
        for result in (result for of_rank in results for result in of_rank):
            written |= cast(DigestedResult, result).written
        # Its own table of contents, and not what this rank has written beside: it may have had no result to send.
        self.seal(Path(self.path), written | {".metadata": self.fs.written[".metadata"]})


class HookedCheckpoints(CheckpointManager):
    """Upstream's manager, which calls the methods below; all ranks call them together."""

    folder: str
    #: In the table of contents of each checkpoint.
    mark = ""
    #: Whether the next call of ``save`` is to save, whatever the interval.
    due = False
    _last_save = False
    _saving: Path | None = None

    def choose(self, step: int) -> int | None:
        """The step to load from ``folder``, as ``checkpoint.load_step`` asks; None for none of them.

        Then upstream does what it does without the folder: it starts from ``initial_load_path``, or from nothing.
        """
        raise NotImplementedError

    def check_initial(self, checkpoint: Path) -> None:
        """Before the checkpoint at ``initial_load_path`` is read."""
        raise NotImplementedError

    def prepare_to_load(self, checkpoint: Path) -> None:
        """Before ``checkpoint`` is read with its data position. The data loader then says which keys to read."""
        raise NotImplementedError

    def begin_save(self, checkpoint: Path, tensors: Mapping[str, Tensor]) -> Path:
        """Before anything is written, with all that will be. The folder to write to."""
        raise NotImplementedError

    def seal_for(self, checkpoint: Path, last_of_stage: bool) -> Seal:
        """What makes ``checkpoint`` of the folder that ``begin_save`` has named. It must be picklable."""
        raise NotImplementedError

    def seal_unrecorded(self, checkpoint: Path, folder: Path) -> None:
        """The same for a folder that upstream's own writer has filled."""
        raise NotImplementedError

    def explain(self, failures: Mapping[int, BaseException], saving: Path | None) -> str | None:
        """A line for the user, where what failed on these ranks can be put into one.

        Args:
            saving: the folder that was being written; None while loading.
        """
        raise NotImplementedError

    def stale(self, keep: int) -> list[Path]:
        """The folders to delete, on the first rank, where ``keep`` checkpoints are to be kept."""
        raise NotImplementedError

    def load(self, step: int = -1) -> bool:
        if not self.enable:
            return super().load(step)
        chosen = self.choose(step)
        if chosen is not None:
            return super().load(chosen)
        if self.initial_load_path and not self.initial_load_in_hf:
            self.check_initial(Path(self.initial_load_path))
        # Upstream looks whether the folder is there, each rank for itself, and takes an empty one for a reason to
        # ignore initial_load_path.
        folder, self.folder = self.folder, os.path.join(self.folder, "none of them")
        try:
            return super().load(-1)
        finally:
            self.folder = folder

    def _should_save(self, curr_step: int, last_step: bool = False) -> bool:
        due, self.due = self.due, False
        return super()._should_save(curr_step, last_step or due)

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool) -> None:
        if from_hf:
            super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)
            return
        with self._explained(None):
            if DATALOADER in state_dict:
                self.prepare_to_load(Path(checkpoint_id))
            state_dict_loader.load(
                state_dict, storage_reader=AllowListReader(checkpoint_id), planner=AllowListPlanner()
            )
        if MODEL in self.states:
            self.states[MODEL].load_state_dict(state_dict)

    def _save_last_step(self, curr_step: int) -> None:
        self._last_save = True
        try:
            super()._save_last_step(curr_step)
        finally:
            self._last_save = False

    def dcp_save(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        async_mode: AsyncMode,
        enable_garbage_collection: bool = False,
        to_hf: bool = False,
    ) -> Future[Any] | AsyncSaveResponse | None:
        # Asked for once: the trainer's own part checks the step then, and a data loader's may be large.
        state = {name: part.state_dict() if isinstance(part, Stateful) else part for name, part in state_dict.items()}
        checkpoint = Path(checkpoint_id)
        folder = self.begin_save(checkpoint, dict(named_tensors(state)))
        if to_hf:
            super().dcp_save(state, str(folder), async_mode, enable_garbage_collection, to_hf)
            dist.barrier()
            self.seal_unrecorded(checkpoint, folder)
            return None
        writer = DigestingWriter(folder, self.seal_for(checkpoint, self._last_save), self.mark)
        self._saving = folder
        with self._explained(folder):
            if async_mode == AsyncMode.ASYNC:
                # As upstream has it. Unnamed, the writer itself would be the stager, of a kind that torch has replaced.
                stager = DefaultStager(StagingOptions(False, False, False, False))
                saved = state_dict_saver.async_save(
                    state, storage_writer=writer, process_group=self.pg, async_stager=stager
                )
                future = cast("Future[Any]", saved)  # not the other: this stager copies before it returns
                future.add_done_callback(lambda _: stager.close())
                return future
            if async_mode == AsyncMode.ASYNC_WITH_PINNED_MEM:
                self.stager: Any = ready_again(self.stager)
                return state_dict_saver.async_save(
                    state,
                    storage_writer=writer,
                    process_group=self.pg,
                    async_checkpointer_type=AsyncCheckpointerType.PROCESS,
                    async_stager=self.stager,
                )
            state_dict_saver.save(state, storage_writer=writer)
        if enable_garbage_collection:
            GarbageCollection.collect("GC collection invoked by checkpointer.")
        return None

    def _async_wait(self) -> None:
        try:
            with self._explained(self._saving):
                super()._async_wait()
        finally:
            self.save_future = None

    def close(self) -> None:
        # A run that ends by running out of data would leave its last save half done.
        if getattr(self, "save_future", None) is not None:
            self._async_wait()
        super().close()

    def _purge_stale_checkpoints(self) -> None:
        if self.keep_latest_k > 0 and dist.get_rank() == 0:
            for folder in self.stale(self.keep_latest_k):
                self.purge_queue.put(str(folder))

    @contextmanager
    def _explained(self, saving: Path | None) -> Iterator[None]:
        """torch raises one exception on all ranks, with what failed on each; it is made one line where it can be."""
        try:
            yield
        except CheckpointException as failure:
            line = self.explain({rank: error for rank, (error, _) in failure.failures.items()}, saving)
            if line is None:
                raise
            raise Refused(line) from failure


def ready_again(stager: DefaultStager) -> DefaultStager:
    """The stager, or one in its place where torch lets each be used only once.

    torch 2.11 empties a stager when it has staged, and the next use fails with ``KeyError: <class 'type'>``. torch 2.13
    does not, and such a stager keeps its pinned memory from save to save.
    """
    if torch.__version__ >= "2.13":
        return stager
    stager.close()  # its thread; what it staged lives on with the one who writes it
    return DefaultStager(stager._config)


def named_tensors(state: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a nested state with its path, names joined by dots, in the order of the state."""
    if isinstance(state, Tensor):
        yield name, state
        return
    if isinstance(state, dict):
        parts: Iterable[tuple[Any, Any]] = state.items()
    elif isinstance(state, list | tuple):
        parts = enumerate(state)
    else:
        return
    for key, part in parts:
        yield from named_tensors(part, f"{name}.{key}" if name else str(key))


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def on_first_rank(action: Callable[[], T]) -> T:
    """What ``action`` gives on the first rank, on all of them; its failure too, so that none waits for another.

    Raises:
        Refused: where it was refused or failed.
    """
    outcome: list[Any] = [None, None]
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except Exception as error:
            failure = error
            outcome[1] = str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise Refused(outcome[1]) from failure
    return cast(T, outcome[0])


def from_every_rank(mine: T) -> list[T]:
    """``mine`` of each rank, by rank."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone
