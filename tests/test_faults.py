"""A fault ends in a clear error, the next call works and is right, and nothing waits or stays for ever."""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import json
import opcode
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from zoo import EXPERTS, FAMILIES

import promoe_triton
from promoe_triton import Config, PromoeError
from promoe_triton.backends.torch import Grouped
from promoe_triton.links import choice
from promoe_triton.links import threads as links_threads
from promoe_triton.links.device import DeviceFiller
from promoe_triton.links.filling import SlotFiller
from promoe_triton.links.sources import DiskSource
from promoe_triton.links.streams import HostStreams
from promoe_triton.links.threads import CLOSE_SECONDS
from promoe_triton.protocols import Chunk, Observation, Prediction, Seam
from promoe_triton.stores import safetensors_files, spool
from promoe_triton.transfers import URGENT

ROOT = Path(__file__).parent.parent
PACKAGE = str(ROOT / "promoe_triton")
F = FAMILIES["mixtral"]
NEW = 4


def build(dtype: torch.dtype = torch.bfloat16) -> Any:
    """In bf16, whose products do not depend on where the loader has put the weights (those of fp32 do)."""
    torch.manual_seed(0)
    model = F.build()
    for parameter in model.parameters():  # and no buffers, as the loader does it
        parameter.data = parameter.data.to(dtype)
    return model


def logits(model: Any, prompt: int = 7) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**F.inputs(model, prompt)).logits
    return result


def tokens(model: Any) -> list[int]:
    result: list[list[int]] = model.generate(**F.inputs(model, 7), max_new_tokens=NEW, do_sample=False).tolist()
    return result[0]


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("promoe-read")]


def open_files() -> set[tuple[str, str]]:
    """Number and name of every open file of this process."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing itself
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
    return found


class Disk:
    """Stands between the product and `preadv`: counts reads, and does with them what a test wants."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._preadv = os.preadv
        self._count = itertools.count()
        self.fault: Callable[[int], None] = lambda read: None
        self.most = 2**40
        monkeypatch.setattr(os, "preadv", self.preadv)

    def arm(self, fault: Callable[[int], None]) -> None:
        """Call `fault` with 0, 1, 2... before every read from now on, in the reading thread."""
        self._count = itertools.count()
        self.fault = fault

    def heal(self) -> None:
        self.fault = lambda read: None

    def preadv(self, handle: int, buffers: list[memoryview], offset: int) -> int:
        self.fault(next(self._count))
        return self._preadv(handle, [buffers[0][: self.most]], offset)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def input_output_error(read: int) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


class DiskAhead(Disk):
    """A disk that is at fault only with what is copied ahead of need, on a link that copies much of it.

    copied: all chunks that were asked for. struck: those that the fault has met. needed, dropped: those of them that
    `hold` has held until the layer asked for the expert, or did without it. spares_urgent: whether the fault leaves
    alone what layers wait for.
    """

    spares_urgent = True

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(monkeypatch)
        self._here = threading.local()
        self.copied: list[Chunk] = []
        self.struck: list[Chunk] = []
        self.needed: list[Chunk] = []
        self.dropped: list[Chunk] = []
        self.over = threading.Event()
        self.over.set()
        self.link: Any = None
        for filler in (SlotFiller, DeviceFiller):
            monkeypatch.setattr(filler, "copy", self._noting(filler.copy))

    def _noting(self, copy: Callable[[Any, Chunk], int]) -> Callable[[Any, Chunk], int]:
        def noted(filler: Any, chunk: Chunk) -> int:
            self._here.chunk = chunk
            self.copied.append(chunk)
            return copy(filler, chunk)

        return noted

    @property
    def chunk(self) -> Chunk:
        """What this thread copies."""
        chunk: Chunk = self._here.chunk
        return chunk

    def arm(self, fault: Callable[[int], None]) -> None:
        self.over.clear()
        super().arm(fault)

    def heal(self) -> None:
        self.over.set()
        super().heal()

    def preadv(self, handle: int, buffers: list[memoryview], offset: int) -> int:
        chunk = getattr(self._here, "chunk", None)  # none where the caller's thread reads weights back
        if chunk is None or (self.spares_urgent and not chunk.speculative):
            return self._preadv(handle, buffers, offset)
        if not self.over.is_set():
            self.struck.append(chunk)
        return super().preadv(handle, buffers, offset)

    def hold(self, read: int) -> None:
        """Let the read go on once the gate of its layer is done, or the disk is healed."""
        transfer = self.chunk.transfer
        for _ in range(10_000):
            with self.link.settled:
                queue = self.link.feed.queue
                is_dropped, is_needed = queue.stopped(transfer), queue.rank(transfer) == URGENT
            if is_dropped or is_needed:
                (self.dropped if is_dropped else self.needed).append(self.chunk)
                return
            if self.over.wait(0.001):
                return
        raise AssertionError("held for longer than any call takes")


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> DiskAhead:
    return DiskAhead(monkeypatch)


@pytest.fixture(scope="module")
def want() -> Tensor:
    return logits(build())


@pytest.fixture(scope="module")
def want_short() -> dict[int, Tensor]:
    """Of prompts that leave most experts of a layer aside: of one token, two and three."""
    return {prompt: logits(build(), prompt) for prompt in (1, 2, 3)}


@pytest.fixture(scope="module")
def wanted_tokens() -> list[int]:
    return tokens(build())


@pytest.fixture(autouse=True, scope="module")
def _fast_collections() -> Iterator[None]:
    """Keep the garbage collector from looking through torch and transformers at every test."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """No thread and no open file outlives the models of a test."""
    gc.collect()
    threads, handles = set(readers()), open_files()
    yield
    gc.collect()
    assert set(readers()) <= threads
    assert open_files() <= handles


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build().save_pretrained(tmp_path, max_shard_size="80KB")
    return tmp_path


SETTINGS = {"slots": 2, "io_timeout": 5.0, "store": "checkpoint"}


def load(folder: Path, **options: Any) -> Any:
    """A model with few slots over its checkpoint, loaded whole and patched (which is faster than from_pretrained)."""
    model = type(build()).from_pretrained(folder, dtype=torch.bfloat16)
    return promoe_triton.patch(model, **(SETTINGS | options))


def check_short(model: Any, want: dict[int, Tensor], times: int = 1) -> None:
    for prompt in [*want] * times:
        assert torch.equal(logits(model, prompt), want[prompt])


def check_tables(model: Any) -> None:
    """Between calls nothing is leased, filling or abandoned, but for what is copied ahead."""
    runtime = model._promoe_runtime
    shared, core = runtime.link._shared, runtime.core
    with shared.settled:
        known = list(core.queue)
        for table in {layer.table for layer in runtime.layers}:
            table.check_integrity()
            held = sum(t.slot >= 0 and core.tables[t.key.layer] is table for t in known)
            assert table.available() == len(table) - held
        assert all(core.queue.rank(transfer) != URGENT for transfer in known)
        assert {*core._on_way.values()} <= {*known}
        assert shared.in_flight == shared.speculating
        assert not core.queue.errors


def deleted(file: Path) -> None:
    file.unlink()


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def emptied(file: Path) -> None:
    os.truncate(file, 0)


def overwritten(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def replaced(file: Path) -> None:
    other = file.with_suffix(".other")
    other.write_bytes(bytes(file.stat().st_size))
    other.replace(file)


def made_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


FAULTS = [deleted, truncated, emptied, overwritten, replaced, made_a_folder]


def put_back(file: Path, content: bytes) -> None:
    if file.is_dir():
        file.rmdir()
    file.write_bytes(content)


def largest(folder: Path) -> Path:
    return max(folder.glob("*.safetensors"), key=lambda file: file.stat().st_size)


class TestFiles:
    @pytest.mark.parametrize("io", ["buffered", "direct"])
    @pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
    def test_a_shard_is(self, fault: Callable[[Path], None], io: Any, folder: Path, want: Tensor) -> None:
        model = load(folder, io=io)
        assert torch.equal(logits(model), want)
        file = largest(folder)
        content = file.read_bytes()
        fault(file)
        for _ in range(2):
            with pytest.raises(PromoeError, match=r"expert \d of MoE layer \d could not be read") as error:
                logits(model)
            assert str(file) in str(error.value)
        put_back(file, content)
        assert torch.equal(logits(model), want)
        check_tables(model)

    @pytest.mark.parametrize("fault", [deleted, truncated, overwritten], ids=lambda fault: fault.__name__)
    def test_a_shard_of_a_model_that_was_never_loaded_whole_is(
        self, fault: Callable[[Path], None], folder: Path, want: Tensor
    ) -> None:
        model = promoe_triton.from_pretrained(str(folder), dtype=torch.bfloat16, slots=2)
        file = largest(folder)
        content = file.read_bytes()
        fault(file)
        with pytest.raises(PromoeError, match=file.name):
            logits(model)
        put_back(file, content)
        assert torch.equal(logits(model), want)

    @pytest.mark.parametrize("fault", [truncated, emptied, overwritten], ids=lambda fault: fault.__name__)
    def test_the_offset_is_named(self, fault: Callable[[Path], None], folder: Path) -> None:
        model = load(folder)
        file = largest(folder)
        fault(file)
        offset = 0 if fault is overwritten else file.stat().st_size
        # Whichever comes first: a thread that looks at the file before it reads, or one in the middle of an expert.
        with pytest.raises(PromoeError, match=rf"{file.name} .*(ends at|from) offset {offset}\b"):
            logits(model)

    def test_the_offset_of_a_late_change_is_named(self, tmp_path: Path) -> None:
        build().save_pretrained(tmp_path)
        model = load(tmp_path)
        file = tmp_path / "model.safetensors"
        block = (file.stat().st_size - 1) // 65536 * 65536
        assert block > 0
        with file.open("r+b") as handle:
            handle.seek(block)
            handle.write(bytes(100))
        with pytest.raises(PromoeError, match=f"other contents in the 65536 bytes from offset {block} on"):
            logits(model)

    def test_a_large_one_is_changed_in_place(
        self, tmp_path: Path, want: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """All of it but its header, in which the only sample lies."""
        monkeypatch.setattr(safetensors_files, "READ_WHOLE", 4096)
        build().save_pretrained(tmp_path)
        model = load(tmp_path)
        file = tmp_path / "model.safetensors"
        original = shutil.copy2(file, tmp_path / "original")
        with file.open("r+b") as handle:
            handle.seek(8192)
            handle.write(bytes(file.stat().st_size - 8192))
        with pytest.raises(PromoeError, match=r"another modification time, noticed at a read at offset \d{4,}, "):
            logits(model)
        subprocess.run(["cp", "-p", original, file], check=True)
        assert torch.equal(logits(model), want)

    @pytest.mark.parametrize("io", ["buffered", "direct"])
    @pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
    def test_a_shard_of_converted_experts_is(
        self, fault: Callable[[Path], None], io: Any, tmp_path: Path, want: Tensor
    ) -> None:
        build(torch.float32).save_pretrained(tmp_path)
        model = load(tmp_path, io=io)
        assert torch.equal(logits(model), want)
        file = largest(tmp_path)
        content = file.read_bytes()
        fault(file)
        with pytest.raises(PromoeError, match=r"model\.safetensors"):
            logits(model)
        put_back(file, content)
        assert torch.equal(logits(model), want)
        check_tables(model)

    @pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
    @pytest.mark.parametrize(
        "action",
        [
            pytest.param(lambda model, folder: promoe_triton.unpatch(model), id="unpatch"),
            pytest.param(lambda model, folder: model.state_dict(), id="state_dict"),
            pytest.param(lambda model, folder: model.save_pretrained(folder / "other"), id="save_pretrained"),
        ],
    )
    def test_weights_are_never_taken_from_a_shard_that_is(
        self, action: Callable[[Any, Path], Any], fault: Callable[[Path], None], folder: Path, want: Tensor
    ) -> None:
        model = load(folder)
        file = largest(folder)
        content = file.read_bytes()
        fault(file)
        with pytest.raises(PromoeError, match=file.name):
            action(model, folder)
        put_back(file, content)
        assert torch.equal(logits(model), want)
        assert torch.equal(logits(promoe_triton.unpatch(model)), want)

    @pytest.mark.parametrize("fault", [deleted, overwritten], ids=lambda fault: fault.__name__)
    def test_in_the_middle_of_generate(
        self, fault: Callable[[Path], None], folder: Path, disk: Disk, wanted_tokens: list[int]
    ) -> None:
        model = load(folder)
        file = largest(folder)
        content = file.read_bytes()
        reads = itertools.count()
        disk.arm(lambda read: None if next(reads) != 20 else fault(file))
        with pytest.raises(PromoeError, match=file.name):
            tokens(model)
        disk.heal()
        put_back(file, content)
        assert tokens(model) == wanted_tokens

    @pytest.mark.parametrize("chunk", [4096, "4MiB"], ids=["between-two-chunks", "within-a-chunk"])
    def test_overwritten_while_it_is_read(self, chunk: Any, tmp_path: Path, disk: Disk, want: Tensor) -> None:
        """At each of a forward's reads, the last one included: after it no other read could notice."""
        build().save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        content = file.read_bytes()
        model = load(tmp_path, chunk=chunk, depth=1)
        logits(model)
        reads: list[int] = []
        disk.arm(reads.append)
        logits(model)
        for moment in [*range(0, len(reads), max(len(reads) // 8, 1)), len(reads) - 2, len(reads) - 1]:
            disk.arm(lambda read, moment=moment: overwritten(file) if read == moment else None)  # type: ignore[misc]
            try:
                got = logits(model)
            except PromoeError as error:
                assert file.name in str(error)  # noqa: PT017
            else:
                assert torch.equal(got, want), f"wrong after read {moment} of {len(reads)}"
            disk.heal()
            put_back(file, content)
            assert torch.equal(logits(model), want), f"wrong after read {moment} of {len(reads)} and repair"

    def test_overwritten_and_restored_while_it_is_read(self, tmp_path: Path, disk: Disk, want: Tensor) -> None:
        """Between two reads of one expert, so that each look at the file finds it as it was."""
        build().save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        content = file.read_bytes()
        model = load(tmp_path, chunk=4096, depth=1)
        reads: list[int] = []
        disk.arm(reads.append)
        logits(model)
        refused = 0
        for moment in range(0, len(reads), max(len(reads) // 16, 1)):

            def fault(read: int, moment: int = moment) -> None:
                if read == moment:
                    overwritten(file)
                elif read == moment + 1:
                    put_back(file, content)

            disk.arm(fault)
            try:
                got = logits(model)
            except PromoeError as error:
                assert file.name in str(error)  # noqa: PT017
                refused += "written anew while an expert was read" in str(error)
            else:
                assert torch.equal(got, want), f"wrong after read {moment} of {len(reads)}"
            disk.heal()
            put_back(file, content)
            assert torch.equal(logits(model), want), f"wrong after read {moment} of {len(reads)} and repair"
        assert refused

    def test_a_spool_that_somebody_removed(self, tmp_path: Path, want: Tensor) -> None:
        model = promoe_triton.patch(build(), slots=2, store="spool", spool_dir=tmp_path)
        (place,) = tmp_path.iterdir()
        away = place.rename(tmp_path / "away")
        with pytest.raises(PromoeError, match=f"{place}/layer-000.safetensors has gone"):
            logits(model)
        away.rename(place)
        assert torch.equal(logits(model), want)


class TestDensePart:
    """What is no expert must not hang on the file either."""

    @pytest.fixture
    def shards(self, tmp_path: Path) -> Path:
        """A checkpoint with the dense part of the model in a file of its own."""
        build().save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        parts: dict[str, dict[str, Tensor]] = {"experts.safetensors": {}, "dense.safetensors": {}}
        for name, tensor in load_file(file).items():
            parts["experts.safetensors" if ".experts." in name else "dense.safetensors"][name] = tensor.clone()
        file.unlink()
        for name, tensors in parts.items():
            save_file(tensors, tmp_path / name, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": {key: name for name, tensors in parts.items() for key in tensors}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        return tmp_path

    def test_overwritten_in_place(self, shards: Path, want: Tensor) -> None:
        model = promoe_triton.from_pretrained(str(shards), slots=2, dtype=torch.bfloat16)
        overwritten(shards / "dense.safetensors")
        assert torch.equal(logits(model), want)


class TestReads:
    @pytest.mark.parametrize("io", ["buffered", "direct"])
    @pytest.mark.parametrize("moment", [0, 1, 5, 11])
    def test_an_error_once(self, moment: int, io: Any, folder: Path, disk: Disk, want: Tensor) -> None:
        model = load(folder, io=io)

        def fault(read: int) -> None:
            if read == moment:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        disk.arm(fault)
        with pytest.raises(PromoeError, match=r"reading .*\.safetensors at offset \d+: Input/output error"):
            logits(model)
        assert torch.equal(logits(model), want)
        check_tables(model)

    def test_an_error_in_a_converted_expert(self, tmp_path: Path, disk: Disk, want: Tensor) -> None:
        build(torch.float32).save_pretrained(tmp_path)
        model = load(tmp_path)

        def fault(read: int) -> None:
            if read == 3:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        disk.arm(fault)
        with pytest.raises(PromoeError, match=r"reading .*\.safetensors at offset \d+: Input/output error"):
            logits(model)
        assert torch.equal(logits(model), want)
        check_tables(model)

    @pytest.mark.parametrize("error", [MemoryError, ValueError, SystemExit], ids=lambda error: error.__name__)
    def test_any_exception_in_a_reading_thread(
        self, error: type[BaseException], folder: Path, disk: Disk, want: Tensor
    ) -> None:
        model = load(folder)

        def fault(read: int) -> None:
            if read == 2:
                raise error("mine")

        disk.arm(fault)
        with pytest.raises(PromoeError, match=r"could not be read: mine"):
            logits(model)
        assert torch.equal(logits(model), want)

    def test_errors_for_ever_are_errors_for_ever(self, folder: Path, disk: Disk, want: Tensor) -> None:
        model = load(folder, chunk=4096, depth=3)

        def fault(read: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        disk.arm(fault)
        for _ in range(5):
            with pytest.raises(PromoeError, match="Input/output error"):
                logits(model)
        disk.heal()
        assert torch.equal(logits(model), want)
        check_tables(model)

    @pytest.mark.parametrize(
        ("io", "most"),
        [("buffered", 1000), ("buffered", 4097), ("direct", 4096)],
        ids=["buffered-1000", "buffered-4097", "direct-4096"],
    )
    def test_short_reads(self, io: Any, most: int, folder: Path, disk: Disk, want: Tensor) -> None:
        disk.most = most
        model = load(folder, io=io)
        assert torch.equal(logits(model), want)

    def test_patching_fails_whole(self, tmp_path: Path, disk: Disk, want: Tensor) -> None:
        def fault(read: int) -> None:
            if read == 2:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        before = set(readers())
        model = build()
        parameters = dict(model.named_parameters())
        disk.arm(fault)
        with pytest.raises(PromoeError, match=r"expert \d of MoE layer 0 could not be read: .*Input/output error"):
            promoe_triton.patch(model, slots=6, store="spool", spool_dir=tmp_path)
        gc.collect()
        assert set(readers()) <= before
        assert not os.listdir(tmp_path)
        with pytest.raises(PromoeError, match="not patched"):
            promoe_triton.stats(model)
        assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
        assert torch.equal(logits(model), want)
        assert torch.equal(logits(promoe_triton.patch(model, slots=6, store="spool")), want)

    @pytest.mark.parametrize(
        ("spoil", "words"),
        [
            (lambda place: None, "must be a folder that exists, .* is not there"),
            (lambda place: place.write_text(""), "must be a folder that exists, .* is a file"),
        ],
        ids=["not there", "a file"],
    )
    def test_a_spool_in_no_folder(self, spoil: Callable[[Path], Any], words: str, tmp_path: Path, want: Tensor) -> None:
        place, model = tmp_path / "spool", build()
        spoil(place)
        with pytest.raises(PromoeError, match=words):
            promoe_triton.patch(model, slots=6, store="spool", spool_dir=place)
        assert torch.equal(logits(model), want)

    def test_a_spool_on_a_disk_that_fills_up(
        self, tmp_path: Path, want: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, write = build(), spool._write

        def full(file: Path, tensors: Any) -> None:
            if "001" in file.name:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(file, tensors)

        monkeypatch.setattr(spool, "_write", full)
        with pytest.raises(PromoeError, match=r"cannot write the spool of .* to .*: No space left on device"):
            promoe_triton.patch(model, slots=6, store="spool", spool_dir=tmp_path)
        assert not os.listdir(tmp_path)
        assert torch.equal(logits(model), want)

    def test_a_spool_where_nobody_may_write(
        self, tmp_path: Path, want: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*args: Any, **options: Any) -> str:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        model = build()
        monkeypatch.setattr(spool.tempfile, "mkdtemp", refuse)
        with pytest.raises(PromoeError, match=r"cannot write to spool_dir .*: Read-only file system; name another"):
            promoe_triton.patch(model, slots=6, store="spool", spool_dir=tmp_path)
        assert torch.equal(logits(model), want)

    def test_patching_on_a_disk_that_goes_on_failing(self, tmp_path: Path, disk: Disk, want: Tensor) -> None:
        """The weights are on that disk only: they come back when it does."""

        def fault(read: int) -> None:
            if read >= 2:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        model = build()
        disk.arm(fault)
        with pytest.raises(PromoeError, match=r"Input/output error.*stays patched"):
            promoe_triton.patch(model, slots=6, store="spool", spool_dir=tmp_path)
        disk.heal()
        assert torch.equal(logits(model), want)
        assert torch.equal(logits(promoe_triton.unpatch(model)), want)

    def test_loading_fails_whole(self, folder: Path, disk: Disk, want: Tensor) -> None:
        """And at once: it does not load what did not fit, only to give it up."""
        later: list[int] = []

        def fault(read: int) -> None:
            if read == 1:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            later.append(read)

        before = set(readers())
        disk.arm(fault)
        with pytest.raises(PromoeError, match=r"could not be read: .*Input/output error"):
            promoe_triton.from_pretrained(str(folder), dtype=torch.bfloat16, slots=6)
        gc.collect()
        assert set(readers()) <= before
        assert len(later) < 6 * 3
        disk.heal()
        assert torch.equal(logits(promoe_triton.from_pretrained(str(folder), dtype=torch.bfloat16, slots=6)), want)


@pytest.fixture
def ring(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Slots as on a GPU: filled through a ring of host memory."""
    made: list[DeviceFiller] = []

    def filler(store: Any, memory_of_layer: Any, direct: bool) -> DeviceFiller:
        streams = HostStreams()
        made.append(DeviceFiller(DiskSource(store, streams, direct), memory_of_layer, streams))
        return made[-1]

    monkeypatch.setattr(choice, "SlotFiller", filler)
    yield
    assert made
    made.clear()


@pytest.mark.usefixtures("ring")
class TestThroughTheRing:
    """The same faults on the way from the disk through a ring of host memory, as to a GPU."""

    @pytest.mark.parametrize("io", ["buffered", "direct"])
    @pytest.mark.parametrize("moment", [0, 1, 5, 11])
    def test_an_error_once(self, moment: int, io: Any, folder: Path, disk: Disk, want: Tensor) -> None:
        TestReads().test_an_error_once(moment, io, folder, disk, want)

    @pytest.mark.parametrize(("io", "most"), [("buffered", 1000), ("direct", 4096)])
    def test_short_reads(self, io: Any, most: int, folder: Path, disk: Disk, want: Tensor) -> None:
        TestReads().test_short_reads(io, most, folder, disk, want)

    @pytest.mark.parametrize("fault", [deleted, truncated, overwritten], ids=lambda fault: fault.__name__)
    def test_a_shard_is(self, fault: Callable[[Path], None], folder: Path, want: Tensor) -> None:
        TestFiles().test_a_shard_is(fault, "auto", folder, want)

    def test_no_byte_for_too_long(self, folder: Path, disk: Disk, want: Tensor) -> None:
        TestStalls().test_no_byte_for_too_long(3, folder, disk, want)

    def test_a_slow_disk_is_no_stalled_one(self, folder: Path, disk: Disk, want: Tensor) -> None:
        TestStalls().test_a_slow_disk_is_no_stalled_one(folder, disk, want)

    def test_ctrl_c_in_the_middle_of_generate(self, folder: Path, disk: Disk, wanted_tokens: list[int]) -> None:
        TestInterruptions().test_ctrl_c_in_the_middle_of_generate(folder, disk, wanted_tokens)


class TestStalls:
    """A disk that does not answer. The events let it answer at the end, whatever comes."""

    @contextmanager
    def stalled(self, disk: Disk, moment: int | None = None) -> Iterator[threading.Event]:
        """Hold the read number `moment`, or all reads, until the event is set."""
        answer = threading.Event()

        def fault(read: int) -> None:
            if moment is None or read == moment:
                answer.wait()

        disk.arm(fault)
        try:
            yield answer
        finally:
            answer.set()
            disk.heal()

    @pytest.mark.parametrize("moment", [None, 0, 3], ids=["all", "first", "fourth"])
    def test_no_byte_for_too_long(self, moment: int | None, folder: Path, disk: Disk, want: Tensor) -> None:
        model = load(folder, io_timeout=0.2)
        with self.stalled(disk, moment) as answer:
            with pytest.raises(
                PromoeError,
                match=r"no byte arrived for 0\.2 s while waiting for expert .* from .*model.* at offset \d+",
            ):
                logits(model)
            # The read is still on its way into its slot: nobody may use that before it has landed.
            with pytest.raises(PromoeError, match="interrupted reads have not ended"):
                logits(model)
            answer.set()
            assert torch.equal(logits(model), want)
        check_tables(model)

    def test_in_the_middle_of_generate(self, folder: Path, disk: Disk, wanted_tokens: list[int]) -> None:
        model = load(folder, io_timeout=0.2)
        with self.stalled(disk, 17), pytest.raises(PromoeError, match="no byte arrived"):
            tokens(model)
        assert tokens(model) == wanted_tokens

    def test_a_slow_disk_is_no_stalled_one(self, folder: Path, disk: Disk, want: Tensor) -> None:
        """Bytes that arrive for others count as progress: a busy disk is waited for."""
        model = load(folder, io_timeout=0.5, depth=1, slots=11, warm=False, chunk=4096)
        never = threading.Event()

        def slow(read: int) -> None:
            if read < 6:  # an expert takes three: longer than a stalled disk is waited for
                never.wait(0.2)

        disk.arm(slow)
        assert torch.equal(logits(model), want)

    def test_unpatching_does_not_wait_for_ever(self, folder: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
        model = load(folder, io_timeout=0.2)
        waits: list[float | None] = []
        with self.stalled(disk):
            with pytest.raises(PromoeError, match="no byte arrived"):
                logits(model)
            join = threading.Thread.join
            with monkeypatch.context() as context:
                context.setattr(threading.Thread, "join", lambda thread, timeout=None: waits.append(timeout))
                model._promoe_runtime.close()
        for thread in readers():
            join(thread, 30)
        assert len(waits) == Config().depth
        assert all(timeout is not None and timeout <= CLOSE_SECONDS for timeout in waits)
        with pytest.raises(PromoeError):
            logits(model)

    def test_all_threads_together_have_a_bounded_time_to_end(
        self, folder: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = load(folder, io_timeout=0.2, depth=4)
        monkeypatch.setattr(links_threads, "CLOSE_SECONDS", 0.2)
        with self.stalled(disk):
            with pytest.raises(PromoeError, match="no byte arrived"):
                logits(model)
            waits: list[float] = []
            join = threading.Thread.join

            def timed(thread: threading.Thread, timeout: float | None = None) -> None:
                assert timeout is not None
                waits.append(timeout)
                join(thread, timeout)

            with monkeypatch.context() as context:
                context.setattr(threading.Thread, "join", timed)
                model._promoe_runtime.close()
            assert len(waits) == 4
            assert 0.0 < waits[0] <= 0.2
            assert waits[-1] < waits[0], "what the first has taken is not there for the last"
        for thread in readers():
            thread.join(30)

    def test_a_second_forward_waits_a_bounded_time(self, folder: Path, disk: Disk, want: Tensor) -> None:
        model = load(folder, lock_timeout=0.1, io_timeout=60.0)
        inside = threading.Event()
        results: list[Tensor] = []
        with self.stalled(disk) as answer:
            stall = disk.fault

            def fault(read: int) -> None:
                inside.set()
                stall(read)

            disk.arm(fault)
            first = threading.Thread(target=lambda: results.append(logits(model)))
            first.start()
            inside.wait()
            with pytest.raises(PromoeError, match=r"waited 0\.1 s for another thread's forward .*lock_timeout"):
                logits(model)
            answer.set()
            first.join()
        assert torch.equal(results[0], want)
        assert torch.equal(logits(model), want)

    def test_unpatching_waits_for_a_forward_that_is_inside(self, folder: Path, disk: Disk, want: Tensor) -> None:
        model = load(folder, lock_timeout=0.1)
        inside, answer = threading.Event(), threading.Event()

        def hold(read: int) -> None:
            inside.set()
            answer.wait(10)

        disk.arm(hold)
        errors: list[str] = []

        def forward() -> None:
            try:
                logits(model)
            except PromoeError as error:
                errors.append(str(error))

        other = threading.Thread(target=forward)
        other.start()
        inside.wait(10)
        with pytest.raises(PromoeError, match=r"waited 0\.1 s for another thread's forward"):
            promoe_triton.unpatch(model)
        answer.set()
        other.join()
        assert not errors
        disk.heal()
        assert torch.equal(logits(promoe_triton.unpatch(model)), want)


@contextmanager
def ctrl_c(disk: Disk, moment: int) -> Iterator[None]:
    """Strike in the main thread while the read number `moment` is on its way."""
    main = threading.main_thread().ident
    assert main is not None
    handled = threading.Event()

    def interrupt(read: int) -> None:
        if read == moment:
            signal.pthread_kill(main, signal.SIGINT)
            # The read does not go on before the signal has been taken.
            handled.wait(10)

    def handler(number: int, frame: FrameType | None) -> None:
        handled.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handler)
    try:
        disk.arm(interrupt)
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        disk.heal()
        signal.signal(signal.SIGINT, before)


class TestInterruptions:
    def test_ctrl_c_in_the_middle_of_generate(self, folder: Path, disk: Disk, wanted_tokens: list[int]) -> None:
        model = load(folder)
        for moment in (0, 1, 2, 9, 25):
            with ctrl_c(disk, moment):
                tokens(model)
            assert tokens(model) == wanted_tokens
            check_tables(model)

    @pytest.mark.parametrize(
        ("options", "step"),
        [
            pytest.param({"slots": 2}, 37, id="streaming"),
            pytest.param({"slots": 8}, 17, id="mostly-resident"),
            pytest.param({"slots": 5, "partition": "global"}, 5, id="shared"),
            pytest.param({"slots": 2}, 3, id="streaming-thoroughly", marks=pytest.mark.slow),
            pytest.param({"slots": 8}, 2, id="mostly-resident-thoroughly", marks=pytest.mark.slow),
            pytest.param({"slots": 5, "partition": "global"}, 1, id="shared-everywhere", marks=pytest.mark.slow),
        ],
    )
    def test_wherever_a_signal_can_strike(
        self, options: dict[str, Any], step: int, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One interruption at every so-manieth such place that a layer passes, each in a call of its own.

        The interruption is kept for a while, as a shell keeps the last traceback: what hangs on it ends in the middle
        of the next call.
        """
        stock = build().model.layers[1].mlp.experts
        inputs = [routing(ids) for ids in ([[5, 1]], [[2, 3]], [[0, 1], [2, 5], [4, 0]])]
        with torch.no_grad():
            want = [stock(*each) for each in inputs]
        kept: list[object] = []
        activate = Grouped.activate

        def drop_and_activate(*args: Any) -> None:
            if kept:
                kept.clear()
                gc.collect()
            activate(*args)

        monkeypatch.setattr(Grouped, "activate", drop_and_activate)
        broken: list[str] = []
        model = load(folder, lock_timeout=0.05, **options)
        for number in itertools.count(0, step):
            experts = model.model.layers[1].mlp.experts
            with torch.no_grad():
                for each in inputs[:2]:  # so that other experts are in the slots
                    experts(*each)
                where, struck = interrupted(number, lambda call, each: call(*each), experts, inputs[2])
                if where is None:
                    break
                kept.append(struck)
                del struck
                try:
                    right = [torch.equal(experts(*inputs[i]), want[i]) for i in (2, 0, 1, 2)]
                    outcome = "" if all(right) else "a wrong result"
                    check_tables(model)
                except Exception as error:
                    outcome = f"{type(error).__name__}: {str(error).splitlines()[0][:70]}"
            if outcome:
                broken.append(f"{where}: {outcome}")
                model = load(folder, lock_timeout=0.05, **options)
            if len(broken) == 20:
                break
        assert not broken, f"{len(broken)} of {number // step} places:\n" + "\n".join(broken)
        assert number > 300, "a call passes many such places"

    @pytest.mark.parametrize("stage", ["begin", "up", "activate", "down", "combine"])
    @pytest.mark.parametrize("error", [RuntimeError, MemoryError], ids=lambda error: error.__name__)
    def test_an_exception_in_a_kernel(
        self, error: type[Exception], stage: str, folder: Path, want: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = load(folder)
        calls = itertools.count()
        original = getattr(Grouped, stage)

        def broken(*args: Any) -> Any:
            if next(calls) == 1:
                raise error("mine")
            return original(*args)

        monkeypatch.setattr(Grouped, stage, broken)
        with pytest.raises(error, match="mine"):
            logits(model)
        assert torch.equal(logits(model), want)
        check_tables(model)

    def test_a_call_that_makes_no_sense(self, folder: Path, want: Tensor) -> None:
        model = load(folder)
        experts = model.model.layers[0].mlp.experts
        for ids in ([[-1, 0]], [[0], [1]]):
            with pytest.raises((ValueError, RuntimeError, IndexError)), torch.no_grad():
                experts(torch.randn(1, 48), torch.tensor(ids), torch.ones(1, 2))
            assert torch.equal(logits(model), want)
        check_tables(model)


class Names:
    """Names some experts of the next layer whenever one has routed: those chosen for it, or else others each time."""

    stateless = True

    def __init__(self, chosen: Sequence[Sequence[int]] = ()) -> None:
        self._chosen = chosen
        self._asked = 0

    def predict(self, seen: Observation) -> Sequence[Prediction]:
        if seen.seam is not Seam.ROUTED:
            return []
        layer = (seen.layer + 1) % 2
        self._asked += 1
        # Half of them: those that lie in slots are kept there, and what is copied needs another's slot.
        experts = self._chosen[layer] if self._chosen else [(self._asked + i) % EXPERTS for i in (0, 1, 2)]
        return [Prediction(layer=layer, steps=0, expert_ids=torch.tensor(experts), scores=torch.zeros(len(experts)))]


def left_aside(prompt: int) -> list[list[int]]:
    """Which experts of each layer a prompt has no use for."""
    stock, chosen = build(), list[set[int]]()
    for block in stock.model.layers:
        block.mlp.gate.register_forward_hook(
            lambda router, args, output: chosen.append({*output[2].flatten().tolist()})
        )
    logits(stock, prompt)
    return [[expert for expert in range(EXPERTS) if expert not in of] for of in chosen]


@pytest.mark.parametrize("_way", ["slots", "ring"], indirect=True)
class TestAheadOfNeed:
    """The same faults in copies that nobody waits for yet: what a layer gets to know of one is its delay at most.

    Each test counts the copies that it has hit.
    """

    @pytest.fixture(autouse=True)
    def _way(self, request: pytest.FixtureRequest) -> None:
        if request.param == "ring":
            request.getfixturevalue("ring")

    def load(self, folder: Path, ahead: DiskAhead, predictor: Any = None, **options: Any) -> Any:
        """A model that knows how fast its link and its layers are, and so copies ahead what is named."""
        always = {"predictor": predictor or Names(), "always_predict": True}
        model = load(folder, **({"slots": 8, "chunk": 4096} | always | options))
        model._promoe_runtime.core.admission._worth = 0.0  # whatever became of what was named before
        ahead.link = model._promoe_runtime.link._shared
        logits(model, 1)
        return model

    @pytest.mark.parametrize("moment", ["at-once", "after-the-gate"])
    @pytest.mark.parametrize("fault", ["fails", "is-short", "is-slow"])
    def test_one_that(
        self, fault: str, moment: str, folder: Path, ahead: DiskAhead, want_short: dict[int, Tensor]
    ) -> None:
        """After the gate: it comes to its end when a layer waits for it by now, or has dropped it."""
        model = self.load(folder, ahead)

        def strike(read: int) -> None:
            if moment == "after-the-gate":
                ahead.hold(read)
            if fault == "fails":
                input_output_error(read)
            if fault == "is-slow":
                ahead.over.wait(0.01)

        ahead.most = 1000 if fault == "is-short" else 2**40
        ahead.arm(strike)
        for _ in range(100):
            check_short(model, want_short)
            hit = [ahead.struck] if moment == "at-once" else [ahead.needed, ahead.dropped]
            if min(map(len, hit)) >= 6:
                break
        else:
            raise AssertionError(f"hit {[*map(len, hit)]}")
        stats = promoe_triton.stats(model).ahead
        check_tables(model)
        ahead.heal()
        check_short(model, want_short)
        assert stats.experts > 0
        if moment == "after-the-gate":
            assert stats.late > 0
            assert stats.dropped > 0
        if fault == "fails":
            again = {(chunk.transfer, chunk.begin, chunk.end) for chunk in ahead.copied if not chunk.speculative}
            assert {(chunk.transfer, chunk.begin, chunk.end) for chunk in ahead.needed} <= again

    def test_one_that_fails_again_when_it_is_needed(
        self, folder: Path, ahead: DiskAhead, want_short: dict[int, Tensor]
    ) -> None:
        """Then it is an error like any other, and the next call works."""
        model = self.load(folder, ahead)

        def strike(read: int) -> None:
            if ahead.chunk.speculative:
                ahead.hold(read)
            ahead.spares_urgent = not ahead.needed
            input_output_error(read)

        ahead.arm(strike)
        with pytest.raises(PromoeError, match=r"could not be read: reading .*Input/output error"):
            check_short(model, want_short, 100)
        ahead.heal()
        assert any(ahead.needed[0].transfer is chunk.transfer and not chunk.speculative for chunk in ahead.struck)
        check_short(model, want_short)
        check_tables(model)

    @pytest.mark.parametrize("fault", [deleted, truncated, overwritten], ids=lambda fault: fault.__name__)
    def test_a_file_that_is(
        self, fault: Callable[[Path], None], tmp_path: Path, ahead: DiskAhead, want_short: dict[int, Tensor]
    ) -> None:
        """When the last bytes of a copy are on their way, asked for ahead of need, and a layer waits for them."""
        build().save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        content = file.read_bytes()
        model = self.load(tmp_path, ahead)

        def strike(read: int) -> None:
            chunk = ahead.chunk
            if chunk.end == ahead.link.filler.cuts(chunk.transfer).ends[-1]:
                ahead.hold(read)
                if ahead.needed and ahead.needed[0] is chunk:
                    ahead.over.wait(0.05)  # what else the layer waits for has come by then
                    fault(file)

        ahead.arm(strike)
        with pytest.raises(PromoeError, match=r"expert \d of MoE layer \d could not be read: .*model\.safetensors"):
            check_short(model, want_short, 100)
        assert ahead.needed
        ahead.heal()
        put_back(file, content)
        check_short(model, want_short)
        check_tables(model)

    @pytest.mark.parametrize("then", ["more-calls", "unpatch"])
    def test_one_that_hangs_and_is_not_needed(
        self,
        then: str,
        folder: Path,
        ahead: DiskAhead,
        want_short: dict[int, Tensor],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Nobody waits for it, and the last free lane brings what is needed."""
        names = Names([experts[:3] for experts in left_aside(1)])
        model = self.load(folder, ahead, names, depth=2, warm=False)
        monkeypatch.setattr(links_threads, "CLOSE_SECONDS", 0.2)
        with TestStalls().stalled(ahead) as answer:
            for _ in range(20):
                assert torch.equal(logits(model, 1), want_short[1])
            assert len(ahead.struck) == ahead.link.speculating == 1
            if then == "unpatch":
                assert torch.equal(logits(promoe_triton.unpatch(model), 1), want_short[1])
            else:
                answer.set()
                for prompt, right in want_short.items():
                    assert torch.equal(logits(model, prompt), right)
                check_tables(model)
        if then == "unpatch":
            for thread in readers():
                thread.join(30)

    def test_one_that_hangs_and_is_needed(self, folder: Path, ahead: DiskAhead, want_short: dict[int, Tensor]) -> None:
        model = self.load(folder, ahead, io_timeout=0.2)
        with TestStalls().stalled(ahead) as answer:
            with pytest.raises(PromoeError, match=r"no byte arrived for 0\.2 s while waiting for expert"):
                check_short(model, want_short, 100)
            assert ahead.struck
            with pytest.raises(PromoeError, match="interrupted reads have not ended"):
                logits(model)
            answer.set()
            check_short(model, want_short)
        check_tables(model)

    def test_ctrl_c_while_it_is_on_its_way(self, folder: Path, ahead: DiskAhead, wanted_tokens: list[int]) -> None:
        model = self.load(folder, ahead)
        for moment in (0, 1, 9):
            with ctrl_c(ahead, moment):
                for _ in range(50):
                    tokens(model)
            assert tokens(model) == wanted_tokens
            check_tables(model)
        assert len(ahead.struck) >= 3

    def test_wherever_a_signal_can_strike(self, folder: Path, ahead: DiskAhead, want_short: dict[int, Tensor]) -> None:
        """In a call of the whole model, predictions included, with copies held on their way until it has struck."""
        model = self.load(folder, ahead, lock_timeout=0.05)
        strikes = caught = 0
        for number in itertools.count(0, 31):
            logits(model, 3)  # so that other experts are in the slots
            ahead.arm(ahead.hold)
            logits(model, 1)  # which leaves copies for the first layer on their way
            where, struck = interrupted(number, logits, model, 2)
            strikes, caught = strikes + 1, caught + (ahead.link.speculating > 0)
            ahead.heal()
            if where is None:
                break
            del struck
            for prompt in (2, 1, 3, 2):
                assert torch.equal(logits(model, prompt), want_short[prompt]), where
            check_tables(model)
        assert strikes > 20
        assert caught > 8


# The interpreter looks for signals where a function begins, a call returns and a loop goes round...
SIGNAL_POINTS = {
    code for name, code in opcode.opmap.items() if name in ("RESUME", "JUMP_BACKWARD") or name.startswith("CALL")
}
# ...but not where a call has raised, on the way to a handler, and inside of `yield from`.
NO_SIGNAL_BEFORE = {opcode.opmap[name] for name in ("PUSH_EXC_INFO", "POP_EXCEPT", "JUMP_BACKWARD_NO_INTERRUPT")}


def routing(ids: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """What a layer is called with, for these experts of each token."""
    generator = torch.Generator().manual_seed(len(ids))
    x_TD = torch.randn(len(ids), 48, generator=generator).to(torch.bfloat16)
    return x_TD, torch.tensor(ids), torch.full((len(ids), len(ids[0])), 0.5, dtype=torch.bfloat16)


def interrupted(number: int, work: Callable[..., Any], *arguments: Any) -> tuple[str | None, object]:
    """Call `work`, interrupted at the signal point `number` of the package and of what it runs context managers with.

    Returns where that was (None: the call has got to its end) and what keeps the interrupted frames alive.
    """
    points = itertools.count()
    where: list[str] = []
    last: dict[FrameType, int] = {}

    def in_package(frame: FrameType, event: str, arg: Any) -> Any:
        if event == "opcode":
            before, last[frame] = last.get(frame), frame.f_code.co_code[frame.f_lasti]
            passed = before in SIGNAL_POINTS and last[frame] not in NO_SIGNAL_BEFORE
            if passed and not where and next(points) == number:
                where.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}")
                raise KeyboardInterrupt
        return in_package

    def anywhere(frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith((PACKAGE, contextlib.__file__)):
            return None
        frame.f_trace_opcodes = True
        return in_package

    struck: BaseException | None = None
    before = sys.gettrace()
    gc.disable()  # what it would end is not what is to be interrupted
    sys.settrace(anywhere)
    try:
        work(*arguments)
    except BaseException as error:
        if not where:
            raise
        struck = error
    finally:
        sys.settrace(before)
        gc.enable()
    return (where[0] if where else None), [struck, last]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"slots": 1, "depth": 3, "chunk": 4096}, id="one-slot"),
        pytest.param({"slots": 2, "depth": 2, "chunk": 8192, "io": "direct"}, id="one-a-layer"),
        pytest.param({"slots": 5, "depth": 3, "chunk": 4096, "partition": "global", "policy": "lfru"}, id="shared"),
        pytest.param({"slots": 9, "depth": 1, "policy": "static"}, id="most"),
        pytest.param({"slots": 8, "depth": 3, "chunk": 4096, "always_predict": True}, id="ahead-of-need"),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_any_faults_in_any_order(seed: int, options: dict[str, Any], folder: Path, disk: Disk) -> None:
    """Errors of the disk, stalls, interruptions of waits: each call is right or raises, and in the end all is well."""
    want = {prompt: logits(build(), prompt) for prompt in range(1, 6)}
    model = load(folder, io_timeout=0.05, **options)
    chance = random.Random(seed)
    answer = threading.Event()
    outcomes = {"right": 0, "raised": 0}
    wait = threading.Condition.wait

    def fault(read: int) -> None:
        draw = chance.random()
        if draw < 0.03:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if draw < 0.04:
            answer.wait()

    def interruptible(condition: threading.Condition, timeout: float | None = None) -> bool:
        if threading.current_thread() is threading.main_thread() and chance.random() < 0.03:
            raise KeyboardInterrupt
        return wait(condition, timeout)

    disk.arm(fault)
    with pytest.MonkeyPatch.context() as context:
        context.setattr(threading.Condition, "wait", interruptible)
        # At least 40 calls, and as many more as it takes: when reads are asked for is a matter of threads.
        for call in range(400):
            if call >= 40 and min(outcomes.values()) >= 3:
                break
            prompt = chance.randrange(1, 6)
            try:
                got = logits(model, prompt)
            except (PromoeError, KeyboardInterrupt):
                outcomes["raised"] += 1
                answer.set()  # what hangs is let go, and later reads do not hang before the next fault
                answer = threading.Event() if chance.random() < 0.5 else answer
            else:
                outcomes["right"] += 1
                assert torch.equal(got, want[prompt])
    answer.set()
    disk.heal()
    with suppress(PromoeError):
        logits(model)  # may still find reads that were held
    for prompt, right in want.items():
        assert torch.equal(logits(model, prompt), right)
    check_tables(model)
    assert min(outcomes.values()) >= 3, outcomes
    if options.get("always_predict"):
        assert promoe_triton.stats(model).ahead.bytes_copied > 0


class TestNothingStays:
    """The fixture of this file counts threads and open files around every test; these tell who ends them."""

    def test_unpatch_ends_threads_and_closes_files(self, folder: Path) -> None:
        threads, handles = set(readers()), set(os.listdir("/proc/self/fd"))
        model = load(folder, depth=3)
        logits(model)
        assert len(set(readers()) - threads) == 3
        assert set(os.listdir("/proc/self/fd")) > handles
        promoe_triton.unpatch(model)
        assert set(readers()) == threads
        assert set(os.listdir("/proc/self/fd")) == handles

    def test_so_does_the_last_reference(self, folder: Path) -> None:
        threads, handles = set(readers()), set(os.listdir("/proc/self/fd"))
        model = load(folder, depth=3)
        logits(model)
        del model
        gc.collect()
        assert set(readers()) == threads
        assert set(os.listdir("/proc/self/fd")) == handles

    def test_even_after_a_fault(self, folder: Path) -> None:
        threads = set(readers())
        model = load(folder)
        deleted(largest(folder))
        with pytest.raises(PromoeError, match="has gone"):
            logits(model)
        del model
        gc.collect()
        assert set(readers()) == threads

    def test_nothing_grows(self, folder: Path) -> None:
        model = load(folder)
        shared = model._promoe_runtime.link._shared
        for prompt in range(1, 8):
            logits(model, prompt)
            check_tables(model)
        gc.collect()
        before = len(gc.get_objects())
        for prompt in [*range(1, 8)] * 3:
            logits(model, prompt)
        gc.collect()
        assert len(gc.get_objects()) < before + 200
        assert len(shared.filler._reader._handles) <= 4
        assert len(model._promoe_runtime.counters.step_seconds) <= 512

    def test_an_exchanged_file_leaves_no_handles_behind(self, folder: Path, want: Tensor) -> None:
        model = load(folder)
        file = largest(folder)
        for _ in range(3):
            put_back(file, file.read_bytes())
            assert torch.equal(logits(model), want)
        open_now = len(os.listdir("/proc/self/fd"))
        for _ in range(30):
            put_back(file, file.read_bytes())
            assert torch.equal(logits(model), want)
        assert len(os.listdir("/proc/self/fd")) < open_now + 10

    def test_in_processes_of_their_own(self, tmp_path: Path) -> None:
        """How the interpreter ends with a patched model alive; and files changed under mappings of the loader.

        One process imports torch and forks a child for each; a bus error ends that child alone.
        """
        (tmp_path / "spool").mkdir()
        done = subprocess.run(
            [sys.executable, "-c", CHILDREN, str(tmp_path)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": "tests"},
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr
        ends = dict(case.rsplit(":", 1) for case in done.stdout.split())
        assert list(ends) == CASES, done.stderr
        assert {case: end for case, end in ends.items() if end != "0"} == {"raised": "1"}, done.stderr
        assert "mine" in done.stderr
        assert "promoe-read" not in done.stderr
        assert not os.listdir(tmp_path / "spool"), "the spools are removed"


CASES = ["alive", "cycle", "raised"] + [
    f"{fault}/{how}" for fault in ("emptied", "overwritten") for how in ("slots", "patched", "resident")
]

CHILDREN = """
import atexit, os, sys, threading

def left():  # after all that ends threads by itself
    if any(thread.name.startswith("promoe-read") for thread in threading.enumerate()):
        os._exit(9)

atexit.register(left)
from pathlib import Path
import torch
import test_faults
from test_faults import CASES, build, logits
import promoe_triton
from transformers.utils import logging

logging.disable_progress_bar()
torch.set_num_threads(1)
folder = Path(sys.argv[1])
case = None
for case in CASES:
    child = os.fork()
    if child == 0:
        break
    _, status = os.waitpid(child, 0)
    os.write(1, f"{case}:{os.waitstatus_to_exitcode(status)} ".encode())
else:
    sys.exit()
if "/" in case:
    fault, how = case.split("/")
    want = logits(build())
    place = folder / how / fault
    build().save_pretrained(place)
    if how == "patched":
        stock = type(build()).from_pretrained(place, dtype=torch.bfloat16)
        model = promoe_triton.patch(stock, slots=2, store="spool", spool_dir=folder / "spool")
    else:
        slots = 12 if how == "slots" else None
        model = promoe_triton.from_pretrained(str(place), dtype=torch.bfloat16, slots=slots)
    getattr(test_faults, fault)(place / "model.safetensors")
    assert torch.equal(logits(model), want)
    sys.exit()
model = promoe_triton.patch(build(), slots=2, store="spool", spool_dir=folder / "spool")
logits(model)
if case == "cycle":
    model.itself = [model]
    del model
if case == "raised":
    raise RuntimeError("mine")
"""
