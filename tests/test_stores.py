"""Experts at rest: every byte where the file says it is, and never the bytes of another file."""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from zoo import FAMILIES

from promoe_triton.errors import PromoeError
from promoe_triton.layout import ExpertLayout
from promoe_triton.memory import SlotMemory, in_files, own_memory
from promoe_triton.patch._rest import checkpoint_store
from promoe_triton.patch._swap import find_experts
from promoe_triton.protocols import PAGE, ExpertKey, ExpertSpec, Part, TensorSpec, round_up
from promoe_triton.stores import safetensors_files
from promoe_triton.stores.checkpoint import CheckpointStore, apply_moves, same_tensors
from promoe_triton.stores.conversion import ParameterSource
from promoe_triton.stores.host import ResidentStore
from promoe_triton.stores.image import Piece, SlotImage, merge, operand_alignment, slot_image
from promoe_triton.stores.reader import FileReader
from promoe_triton.stores.resolve import checkpoint_files, resolve_files
from promoe_triton.stores.safetensors_files import DTYPES, TensorRef, Unchanged, read_header, read_headers
from promoe_triton.stores.spool import spool

READERS = {"buffered": False, "direct": True}


def random_bytes(nbytes: int, seed: int = 0) -> bytes:
    return (
        torch.randint(256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        .numpy()
        .tobytes()
    )


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def safetensors(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


class TestHeaders:
    def test_as_the_safetensors_library_writes_them(self, tmp_path: Path) -> None:
        file = tmp_path / "some.safetensors"
        tensors = {
            name: torch.arange(6).reshape(2, 3).to(dtype)
            for name, dtype in DTYPES.items()
            if dtype != torch.float8_e8m0fnu
        }
        tensors["scalar"], tensors["empty"] = torch.tensor(3.0), torch.empty(0, 3)
        save_file(tensors, file, metadata={"format": "pt"})
        refs = read_header(file)
        assert refs.keys() == tensors.keys()
        for name, tensor in tensors.items():
            ref = refs[name]
            assert (ref.file, ref.shape, ref.dtype) == (file, tuple(tensor.shape), tensor.dtype)
            assert file.read_bytes()[ref.offset : ref.offset + ref.nbytes] == raw(tensor)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            pytest.param(b"", "not a safetensors file", id="empty"),
            pytest.param(b"\x01\x00", "not a safetensors file", id="shorter-than-a-length"),
            pytest.param(safetensors({})[:-1], "header ends after 9", id="header-cut"),
            pytest.param(b"PK\x03\x04" + bytes(30), "not a safetensors file", id="a-zip"),
            pytest.param(safetensors(b"\xff\xfe\x00\x00"), "no JSON header at offset 8", id="no-text"),
            pytest.param(safetensors(b"{'a': 1}"), "no JSON header at offset 8", id="no-json"),
            pytest.param(safetensors(["a"]), "not a safetensors file", id="a-list"),
            pytest.param(safetensors({"a": 3}), "not a safetensors file", id="a-number-for-a-tensor"),
            pytest.param(safetensors({"a": {"dtype": "F32"}}), "not a safetensors file", id="no-shape"),
            pytest.param(
                safetensors({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, b"1"),
                "tensor a has dtype F4",
                id="unsupported-dtype",
            ),
            pytest.param(
                safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, bytes(11)),
                r"truncated: tensor a lies at offsets \d+ to \d+, but the file has \d+ bytes",
                id="truncated",
            ),
            pytest.param(
                safetensors({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 8]}}, bytes(8)),
                "tensor a",
                id="shape-beyond-its-bytes",
            ),
            pytest.param(
                safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, bytes(8)),
                "tensor a",
                id="before-the-data",
            ),
        ],
    )
    def test_refused_with_the_file_named(self, content: bytes, message: str, tmp_path: Path) -> None:
        file = tmp_path / "bad.safetensors"
        file.write_bytes(content)
        with pytest.raises(PromoeError, match=message) as error:
            read_headers([file])
        assert str(file) in str(error.value)

    @settings(deadline=None)
    @given(st.binary(max_size=60))
    def test_any_bytes_are_read_or_refused(self, content: bytes) -> None:
        whole = safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(8))
        file = self.folder / "any.safetensors"
        for text in (content, safetensors(content), whole[: len(content)], whole[:20] + content + whole[20:]):
            file.write_bytes(text)
            try:
                refs = read_header(file)
            except PromoeError as error:
                assert str(file) in str(error)  # noqa: PT017
            else:
                assert all(0 <= ref.offset <= ref.offset + ref.nbytes <= len(text) for ref in refs.values())

    @pytest.fixture(autouse=True, scope="class")
    @staticmethod
    def _folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
        request.cls.folder = tmp_path_factory.mktemp("headers")

    folder: Path

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(PromoeError, match=r"gone\.safetensors is missing"):
            read_headers([tmp_path / "gone.safetensors"])


class TestUnchanged:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        return self.write(tmp_path / "w.safetensors")

    @staticmethod
    def write(file: Path) -> Path:
        n = 3 * 2**20
        file.write_bytes(safetensors({"a": {"dtype": "U8", "shape": [n], "data_offsets": [0, n]}}, random_bytes(n)))
        # As if it had been there for long: whatever is written from now on has another time.
        os.utime(file, ns=(10**18, 10**18))
        return file

    def test_left_alone(self, file: Path) -> None:
        unchanged = Unchanged([file])
        assert list(unchanged.files) == [file]
        assert unchanged.check(file) is True

    @staticmethod
    def touched(file: Path) -> None:
        file.touch()

    @staticmethod
    def replaced_by_a_copy(file: Path) -> None:
        copy = file.with_suffix(".copy")
        copy.write_bytes(file.read_bytes())
        copy.replace(file)

    @staticmethod
    def written_again(file: Path) -> None:
        file.write_bytes(file.read_bytes())

    @pytest.mark.parametrize("change", [touched, replaced_by_a_copy, written_again], ids=lambda f: f.__name__)
    def test_equal_contents_go_on(self, change: Callable[[Path], None], file: Path) -> None:
        unchanged = Unchanged([file])
        change(file)
        assert unchanged.check(file) is False, "what is open is stale"
        assert unchanged.check(file) is True, "and is known from then on"

    def test_moved_away_and_back(self, file: Path) -> None:
        unchanged = Unchanged([file])
        away = file.rename(file.with_suffix(".away"))
        with pytest.raises(PromoeError, match=r"w\.safetensors has gone .*put it back and call again"):
            unchanged.check(file)
        away.rename(file)
        unchanged.check(file)

    def test_shorter(self, file: Path) -> None:
        unchanged = Unchanged([file])
        size = file.stat().st_size
        os.truncate(file, size - 1)
        message = rf"w\.safetensors has changed .* {size - 1} bytes instead of {size}, it ends at offset {size - 1};"
        with pytest.raises(PromoeError, match=message):
            unchanged.check(file)

    def test_longer(self, file: Path) -> None:
        unchanged = Unchanged([file])
        size = file.stat().st_size
        with file.open("ab") as handle:
            handle.write(b"1")
        with pytest.raises(PromoeError, match=rf"has changed .* it should have ended at offset {size};"):
            unchanged.check(file)

    def test_refused_until_it_is_back(self, file: Path) -> None:
        unchanged = Unchanged([file])
        content = file.read_bytes()
        file.write_bytes(content[:9] + b"???" + content[12:])
        for _ in range(2):
            with pytest.raises(PromoeError, match="has changed while the model was using it"):
                unchanged.check(file)
        file.write_bytes(content)
        assert unchanged.check(file) is False

    @settings(deadline=None, max_examples=40)
    @example(offset=0)
    @example(offset=3 * 2**20)
    @given(offset=st.integers(0, 3 * 2**20))
    def test_one_other_byte_anywhere(self, offset: int) -> None:
        file = self.write(self.folder / "w.safetensors")
        unchanged = Unchanged([file])
        content = bytearray(file.read_bytes())
        content[offset] ^= 1
        file.write_bytes(content)
        block = offset // 65536 * 65536
        message = rf"has changed while .* other contents in the 65536 bytes from offset {block} on; put the original"
        with pytest.raises(PromoeError, match=message):
            unchanged.check(file)

    def test_other_contents_of_the_same_time(self, file: Path) -> None:
        """`cp -p` and `rsync -t` set the time that the source had."""
        unchanged = Unchanged([file])
        before = file.stat()
        file.write_bytes(safetensors({}, bytes(before.st_size - 10)))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert file.stat().st_size == before.st_size
        with pytest.raises(PromoeError, match="has changed while the model was using it"):
            unchanged.check(file)

    folder: Path

    @pytest.fixture(autouse=True, scope="class")
    @staticmethod
    def _folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
        request.cls.folder = tmp_path_factory.mktemp("unchanged")


class TestLargeUnchanged:
    """Files too large to be compared whole."""

    @pytest.fixture
    def file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(safetensors_files, "READ_WHOLE", 2**20)
        return TestUnchanged.write(tmp_path / "w.safetensors")

    def test_moved_away_and_back(self, file: Path) -> None:
        unchanged = Unchanged([file])
        away = file.rename(file.with_suffix(".away"))
        with pytest.raises(PromoeError, match="has gone"):
            unchanged.check(file, 0)
        away.chmod(0o600)
        away.rename(file)
        assert unchanged.check(file, 0) is False
        assert unchanged.check(file, 0) is True

    def test_changed_in_place_where_no_sample_is(self, file: Path) -> None:
        unchanged = Unchanged([file])
        original = shutil.copy2(file, file.with_suffix(".original"))
        with file.open("r+b") as handle:
            handle.seek(2**20)
            handle.write(bytes(2**20))
        message = (
            r"w\.safetensors has changed .* another modification time, noticed at a read at offset 5000, .*"
            r"put the original back \(cp -p over it keeps its time\) and call again, or load the model again"
        )
        for _ in range(2):
            with pytest.raises(PromoeError, match=message):
                unchanged.check(file, 5000)
        subprocess.run(["cp", "-p", original, file], check=True)
        assert unchanged.check(file, 5000) is False

    def test_changed_in_place_where_a_sample_is(self, file: Path) -> None:
        unchanged = Unchanged([file])
        content = bytearray(file.read_bytes())
        content[100] ^= 1
        before = file.stat()
        file.write_bytes(content)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(PromoeError, match="other contents in the 4096 bytes from offset 0 on"):
            unchanged.check(file, 5000)

    def test_the_same_bytes_written_anew(self, file: Path) -> None:
        unchanged = Unchanged([file])
        file.write_bytes(file.read_bytes())
        with pytest.raises(PromoeError, match=r"another modification time, .* or load the model again"):
            unchanged.check(file, 0)

    def test_replaced_by_a_copy_of_the_same_time(self, file: Path) -> None:
        """Whose samples are the same: nothing tells that the rest is."""
        unchanged = Unchanged([file])
        other = Path(shutil.copy2(file, file.with_suffix(".other")))
        original = file.rename(file.with_suffix(".original"))
        other.rename(file)
        with pytest.raises(PromoeError, match=r"another inode, it is another file, .*; move the original file back"):
            unchanged.check(file, 0)
        original.rename(file)
        assert unchanged.check(file, 0) is False


FILE_BYTES = 6 * PAGE + 1234


@dataclass(frozen=True, slots=True, kw_only=True)
class Lie:
    """How the tensors of one expert lie in a file: for each its dtype and the ranges it is made of."""

    dtypes: tuple[torch.dtype, ...]
    ranges: tuple[tuple[tuple[int, int], ...], ...]


@st.composite
def lies(draw: st.DrawFn) -> Lie:
    dtypes, ranges = [], []
    for _ in range(draw(st.integers(1, 4))):
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
        size = dtype.itemsize
        mine = []
        for _ in range(draw(st.integers(1, 3))):
            nbytes = size * draw(st.one_of(st.integers(1, 9), st.integers(1, 2 * PAGE // size)))
            # Aligned to nothing, to the dtype, or to half of what a product wants; or up to the very end.
            step = draw(st.sampled_from([1, 2, size, 8, 64, PAGE]))
            last = FILE_BYTES - nbytes
            mine.append((draw(st.sampled_from([last, draw(st.integers(0, last // step)) * step])), nbytes))
        dtypes.append(dtype)
        ranges.append(tuple(mine))
    return Lie(dtypes=tuple(dtypes), ranges=tuple(ranges))


def image_of(lie: Lie, file: Path, direct: bool) -> SlotImage:
    spec = ExpertSpec(
        tensors=tuple(
            TensorSpec(
                name=f"t{i}",
                part=Part.DOWN if i % 2 else Part.UP,
                shape=(sum(nbytes for _, nbytes in ranges) // dtype.itemsize,),
                dtype=dtype,
            )
            for i, (dtype, ranges) in enumerate(zip(lie.dtypes, lie.ranges, strict=True))
        )
    )
    pieces = {
        f"t{i}": [Piece(file=file, offset=offset, nbytes=nbytes) for offset, nbytes in ranges]
        for i, ranges in enumerate(lie.ranges)
    }
    return slot_image(spec, pieces, direct)


class TestImage:
    @pytest.fixture(scope="class")
    @staticmethod
    def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
        file = tmp_path_factory.mktemp("image") / "f.bin"
        file.write_bytes(random_bytes(FILE_BYTES))
        return file

    def read(self, image: SlotImage, part: Part, reader: FileReader, memory: SlotMemory, slot: int) -> None:
        base = slot * memory.slot_bytes
        for tensor in image.of(part).tensors:
            for extent in tensor.extents:
                place = base + extent.slot_offset
                reader.read_into(extent.file, extent.offset, extent.nbytes, memory.view, place, extent.needed)
        apply_moves(image.of(part), memory.slot(slot))

    @pytest.mark.parametrize("io", READERS)
    @settings(deadline=None, max_examples=200)
    @given(lie=lies(), down_first=st.booleans())
    def test_what_is_viewed_is_what_the_file_has(self, io: str, lie: Lie, down_first: bool, file: Path) -> None:
        content = file.read_bytes()
        image = image_of(lie, file, READERS[io])
        memory = SlotMemory(2, image.slot_bytes)
        memory.slot(0).fill_(170)
        with FileReader(Unchanged([file]), READERS[io]) as reader:
            assert reader.direct == READERS[io]
            for part in (Part.DOWN, Part.UP) if down_first else (Part.UP, Part.DOWN):
                self.read(image, part, reader, memory, 1)
        for tensor, ranges in zip(image.tensors, lie.ranges, strict=True):
            view = tensor.view(memory.slot(1))
            assert raw(view) == b"".join(content[offset : offset + nbytes] for offset, nbytes in ranges)
            assert view.data_ptr() % operand_alignment(tensor.spec.dtype) == 0
        assert bool((memory.slot(0) == 170).all()), "the neighbour is untouched"

    @pytest.mark.parametrize("io", READERS)
    @settings(deadline=None)
    @given(lie=lies())
    def test_nothing_overlaps_and_all_is_inside(self, io: str, lie: Lie, file: Path) -> None:
        image = image_of(lie, file, READERS[io])
        extents = sorted((e for t in image.tensors for e in t.extents), key=lambda e: e.slot_offset)
        assert all(a.slot_offset + a.nbytes <= b.slot_offset for a, b in pairwise(extents))
        assert extents[-1].slot_offset + extents[-1].nbytes <= image.slot_bytes
        assert extents[0].slot_offset >= 0
        assert all(0 < e.needed <= e.nbytes for e in extents)
        if READERS[io]:
            assert all(n % PAGE == 0 for e in extents for n in (e.offset, e.nbytes, e.slot_offset))
            assert all(e.nbytes - e.needed < PAGE for e in extents)
        else:
            assert all(e.nbytes == e.needed for e in extents)
            assert all(not t.moves for t in image.tensors)
        for tensor in image.tensors:
            assert sum(e.nbytes for e in tensor.extents) >= tensor.spec.nbytes
            inside = range(tensor.extents[0].slot_offset, tensor.end + 1)
            assert tensor.start in inside
            assert tensor.start + tensor.spec.nbytes in inside

    @pytest.mark.parametrize("phase", [0, 4, 8, 12, 16, 24, 4080, 4088])
    def test_single_precision_is_aligned_whatever_its_phase(self, phase: int, file: Path) -> None:
        lie = Lie(dtypes=(torch.float32,), ranges=(((PAGE + phase, 400),),))
        (tensor,) = image_of(lie, file, direct=True).tensors
        assert tensor.start % 16 == 0
        assert bool(tensor.moves) == (phase % 16 != 0), "moved only where it must be"

    @pytest.mark.parametrize("phase", [0, 2, 6, 4094])
    def test_bf16_lies_as_in_the_file(self, phase: int, file: Path) -> None:
        lie = Lie(dtypes=(torch.bfloat16,), ranges=(((PAGE + phase, 400),),))
        (tensor,) = image_of(lie, file, direct=True).tensors
        assert not tensor.moves
        assert tensor.start % PAGE == phase

    def test_pieces_that_follow_each_other_are_read_as_one(self, tmp_path: Path) -> None:
        a, b = tmp_path / "a", tmp_path / "b"
        pieces = [
            Piece(file=a, offset=0, nbytes=10),
            Piece(file=a, offset=10, nbytes=5),
            Piece(file=a, offset=16, nbytes=4),
            Piece(file=b, offset=20, nbytes=4),
            Piece(file=a, offset=24, nbytes=4),
        ]
        assert merge(pieces) == [Piece(file=a, offset=0, nbytes=15), *pieces[2:]]
        assert merge([]) == []


class TestReader:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        file = tmp_path / "f.bin"
        file.write_bytes(random_bytes(2 * PAGE + 100))
        return file

    @pytest.mark.parametrize("io", READERS)
    @pytest.mark.parametrize(
        ("offset", "nbytes"),
        [(0, 1), (0, PAGE), (1, PAGE), (PAGE - 1, 2), (PAGE + 7, 63), (2 * PAGE, 100), (5, 2 * PAGE + 95)],
    )
    def test_any_range(self, io: str, offset: int, nbytes: int, file: Path) -> None:
        memory = SlotMemory(1, 5 * PAGE)
        with FileReader(Unchanged([file]), READERS[io]) as reader:
            start = reader.read(file, offset, nbytes, memory.view, 10)
        assert start >= 10
        assert bytes(memory.view[start : start + nbytes]) == file.read_bytes()[offset : offset + nbytes]

    @pytest.mark.parametrize("io", READERS)
    def test_past_the_end(self, io: str, file: Path) -> None:
        memory = SlotMemory(1, 5 * PAGE)
        with (
            FileReader(Unchanged([file]), READERS[io]) as reader,
            pytest.raises(PromoeError, match=rf"{file} ends at offset {2 * PAGE + 100}, 1 bytes before"),
        ):
            reader.read(file, PAGE, PAGE + 101, memory.view, 0)

    @pytest.mark.parametrize("io", READERS)
    def test_cannot_be_opened(self, io: str, file: Path) -> None:
        unchanged = Unchanged([file])
        file.unlink()
        with (
            FileReader(unchanged, READERS[io]) as reader,
            pytest.raises(PromoeError, match=rf"cannot open {file}: No such file"),
        ):
            reader.read(file, 0, 1, SlotMemory(1, PAGE).view, 0)

    def test_an_exchanged_file_is_opened_anew_and_all_is_closed(self, file: Path) -> None:
        before = set(os.listdir("/proc/self/fd"))
        memory = SlotMemory(1, 5 * PAGE)
        with FileReader(Unchanged([file]), direct=False) as reader:
            reader.read(file, 0, 10, memory.view, 0)
            copy = file.with_suffix(".copy")
            copy.write_bytes(file.read_bytes())
            copy.replace(file)
            reader.check({file: 0})
            with file.open("r+b") as handle:
                handle.write(b"new")  # visible only in the new file
            reader.read(file, 0, 3, memory.view, 0)
            assert bytes(memory.view[:3]) == b"new"
        assert set(os.listdir("/proc/self/fd")) == before

    def test_each_of_two_readers_notices_an_exchanged_file(self, file: Path) -> None:
        """As those of a model and of its copy, over one store: the first to look must not hide it from the second."""
        unchanged, memory = Unchanged([file]), SlotMemory(1, 5 * PAGE)
        with FileReader(unchanged, direct=False) as first, FileReader(unchanged, direct=False) as second:
            for old in ("old", "older"):
                for reader in (first, second):
                    reader.read(file, 0, 10, memory.view, 0)
                content = file.read_bytes()
                away = file.rename(file.with_suffix(f".{old}"))
                file.write_bytes(content)
                first.check({file: 0})
                away.write_bytes(bytes(len(content)))  # no file of the model's any more
                second.check({file: 0})
                for reader in (first, second):
                    reader.read(file, 0, 10, memory.view, 0)
                    assert bytes(memory.view[:10]) == content[:10]

    def test_what_stands_in_for_a_file_is_never_read(self, file: Path) -> None:
        """Exchanged between the look at it and its opening, and back before the next look."""
        memory = SlotMemory(1, 5 * PAGE)
        with FileReader(Unchanged([file]), direct=False) as reader:
            reader.check({file: 0})
            away = file.rename(file.with_suffix(".away"))
            file.write_bytes(bytes(away.stat().st_size))
            with pytest.raises(PromoeError, match=r"f\.bin was exchanged while it was opened; call again"):
                reader.read(file, 0, 10, memory.view, 0)
            away.rename(file)
            reader.check({file: 0})
            reader.read(file, 0, 10, memory.view, 0)
            assert bytes(memory.view[:10]) == file.read_bytes()[:10]

    def test_short_reads_go_on_where_they_stopped(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        preadv = os.preadv

        def short(handle: int, buffers: Any, offset: int) -> int:
            return preadv(handle, [buffers[0][:7]], offset)

        monkeypatch.setattr(os, "preadv", short)
        memory = SlotMemory(1, 5 * PAGE)
        with FileReader(Unchanged([file]), direct=False) as reader:
            reader.read(file, 3, 1000, memory.view, 0)
        assert bytes(memory.view[:1000]) == file.read_bytes()[3:1003]


def experts_of(model: Any) -> tuple[list[Any], list[ExpertLayout]]:
    found = find_experts(model)
    return [model.get_submodule(path) for path in found], list(found.values())


def assert_holds(store: CheckpointStore, model: Any) -> None:
    """Every expert of the store is the loaded one, bit for bit."""
    modules, layouts = experts_of(model)
    loaded = ResidentStore(modules, layouts)
    assert list(store.specs) == list(loaded.specs)
    for layer, layout in enumerate(layouts):
        for expert in range(layout.experts):
            key = ExpertKey(layer, expert)
            got, want = store.load(key), loaded.load(key)
            assert got.keys() == want.keys()
            for name, tensor in want.items():
                assert got[name].dtype == tensor.dtype
                assert got[name].shape == tensor.shape
                assert raw(got[name]) == raw(tensor), f"{key}.{name}"


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32, **how: Any) -> Any:
    torch.manual_seed(0)
    model: Any = FAMILIES[name].build().to(dtype)
    model.save_pretrained(folder, **how)
    return model


def store_of(model: Any) -> CheckpointStore:
    return checkpoint_store(model, find_experts(model), checkpoint_files(model))


CHECKPOINTS = {
    "mixtral": "w1, w2, w3 of each expert",
    "qwen3_moe": "gate, up and down of each expert",
    "phimoe": "w1, w2, w3, biased router",
    "gpt_oss": "stacked, transposed, biases",
    "llama4_text": "stacked and transposed",
    "dbrx": "all experts in one matrix",
    "granitemoe": "stacked under other names",
    "aria_text": "transposed, fc1 and fc2",
    "nemotron_h": "no gate",
    "longcat_flash": "rows that no expert uses",
    "deepseek_v3": "dense layers before",
    "jetmoe": "two kinds of experts in a layer",
}


class TestCheckpoint:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    @pytest.mark.parametrize("name", CHECKPOINTS)
    def test_holds_what_is_loaded(self, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
        cls = type(saved(name, tmp_path, dtype))
        model = cls.from_pretrained(tmp_path, dtype=dtype)
        store = store_of(model)
        assert_holds(store, model)
        assert store.describe() == f"checkpoint {tmp_path}"
        assert store.files == [tmp_path / "model.safetensors"]

    @pytest.mark.parametrize("name", CHECKPOINTS)
    def test_in_shards(self, name: str, tmp_path: Path) -> None:
        cls = type(saved(name, tmp_path, max_shard_size="60KB"))
        model = cls.from_pretrained(tmp_path)
        store = store_of(model)
        assert len(store.files) > 2
        assert_holds(store, model)

    @pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "longcat_flash", "aria_text"])
    def test_stacked_as_the_model_has_it(self, name: str, tmp_path: Path) -> None:
        cls = type(saved(name, tmp_path, save_original_format=False))
        names = load_file(tmp_path / "model.safetensors").keys()
        assert not any("experts.0." in name for name in names)
        model = cls.from_pretrained(tmp_path)
        store = store_of(model)
        assert not store.staged(0)
        assert_holds(store, model)

    @pytest.mark.parametrize(
        ("kept", "wanted"),
        [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)],
        ids=["fp32-as-bf16", "bf16-as-fp32", "fp16-as-fp32"],
    )
    @pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "aria_text", "dbrx"])
    def test_in_another_dtype(self, name: str, kept: torch.dtype, wanted: torch.dtype, tmp_path: Path) -> None:
        cls = type(saved(name, tmp_path, kept))
        model = cls.from_pretrained(tmp_path, dtype=wanted)
        store = store_of(model)
        assert store.staged(0)
        assert store.specs[0].tensors[0].dtype == wanted
        assert_holds(store, model)

    def test_pieces_apart_in_the_file_are_gathered(self, tmp_path: Path) -> None:
        """Mixtral's w2 lies between w1 and w3, which are one tensor of the model."""
        cls = type(saved("mixtral", tmp_path))
        store = store_of(cls.from_pretrained(tmp_path))
        assert not store.staged(0)
        for direct in (False, True):
            up, down = store.image(ExpertKey(0, 1), direct).tensors
            assert [tensor.spec.part for tensor in (up, down)] == [Part.UP, Part.DOWN]
            assert len(up.extents) == 2
            assert len(down.extents) == 1
            assert bool(up.moves) == direct

    @pytest.mark.parametrize("name", CHECKPOINTS)
    def test_a_slot_has_room_for_every_expert_however_it_is_read(self, name: str, tmp_path: Path) -> None:
        cls = type(saved(name, tmp_path, torch.bfloat16, max_shard_size="60KB"))
        model = cls.from_pretrained(tmp_path, dtype=torch.bfloat16)
        store, (_, layouts) = store_of(model), experts_of(model)
        for layer, layout in enumerate(layouts):
            room = store.slot_bytes(layer, layout.experts)
            assert room % PAGE == 0
            for expert in range(layout.experts):
                for direct in (False, True):
                    assert store.image(ExpertKey(layer, expert), direct).slot_bytes <= room

    def test_same_tensors_sees_a_bit(self, tmp_path: Path) -> None:
        cls = type(saved("mixtral", tmp_path))
        model = cls.from_pretrained(tmp_path)
        store, key = store_of(model), ExpertKey(1, 3)
        expected = {name: tensor.clone() for name, tensor in store.load(key).items()}
        assert same_tensors(store, key, expected)
        expected["down_proj"].view(torch.int32)[2, 3] ^= 1
        assert not same_tensors(store, key, expected)
        zeros = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
        assert not same_tensors(store, key, zeros)

    @pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16], ids=["plain", "converted"])
    def test_a_changed_file_is_never_loaded(self, kept: torch.dtype, tmp_path: Path) -> None:
        cls = type(saved("mixtral", tmp_path, kept))
        model = cls.from_pretrained(tmp_path, dtype=torch.float32)
        store = store_of(model)
        assert_holds(store, model)
        file = tmp_path / "model.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[:4096] + bytes(len(content) - 4096))
        with pytest.raises(PromoeError, match=r"model\.safetensors has changed"):
            store.load(ExpertKey(0, 0))
        file.write_bytes(content)
        assert_holds(store, model)

    def test_a_checkpoint_without_the_experts(self, tmp_path: Path) -> None:
        model = saved("mixtral", tmp_path)
        file = tmp_path / "model.safetensors"
        save_file({k: v for k, v in load_file(file).items() if "layers.1" not in k}, file)
        with pytest.raises(PromoeError, match=r"no tensors for model\.layers\.1\.mlp\.experts\.gate_up_proj"):
            checkpoint_store(model, find_experts(model), [file])

    def test_a_checkpoint_without_one_expert(self, tmp_path: Path) -> None:
        model = saved("mixtral", tmp_path)
        file = tmp_path / "model.safetensors"
        save_file({k: v for k, v in load_file(file).items() if "layers.1.block_sparse_moe.experts.3.w3" not in k}, file)
        with pytest.raises(PromoeError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj: 5 tensors match"):
            checkpoint_store(model, find_experts(model), [file])


class TestConversionThroughStaging:
    """A converted expert is read through a buffer, at any phase of the file."""

    @pytest.mark.parametrize("io", READERS)
    @settings(deadline=None)
    @given(offset=st.integers(0, 2 * PAGE), rows=st.integers(1, 40), kept=st.sampled_from(["F32", "BF16", "F16"]))
    def test_any_phase(self, io: str, offset: int, rows: int, kept: str, folder: Path) -> None:
        dtype = DTYPES[kept]
        weights = torch.randn(3, rows, 5, generator=torch.Generator().manual_seed(offset)).to(dtype)
        file = folder / "c.bin"
        file.write_bytes(bytes(offset) + raw(weights))
        wanted = torch.bfloat16 if dtype == torch.float32 else torch.float32
        spec = ExpertSpec(tensors=(TensorSpec(name="w", part=Part.UP, shape=(rows, 5), dtype=wanted),))
        source = ParameterSource(
            parameter="w",
            shape=(3, rows, 5),
            dtype=wanted,
            experts=3,
            refs={"w": [TensorRef(file=file, offset=offset, shape=(3, rows, 5), dtype=dtype)]},
        )
        store = CheckpointStore([spec], [{"w": source}], "test")
        for expert in range(3):
            key = ExpertKey(0, expert)
            image = store.image(key, READERS[io])
            slot = SlotMemory(1, store.slot_bytes(0, 3)).slot(0)
            with FileReader(store.unchanged, READERS[io]) as reader:
                moved = store.convert(key, image, slot, reader)
            assert moved == rows * 5 * dtype.itemsize
            assert torch.equal(image.tensors[0].view(slot), weights[expert].to(wanted))

    @pytest.fixture(scope="class")
    @staticmethod
    def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tmp_path_factory.mktemp("staging")


class TestSpool:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    @pytest.mark.parametrize("name", CHECKPOINTS)
    def test_holds_what_is_loaded(self, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
        torch.manual_seed(0)
        model: Any = FAMILIES[name].build().to(dtype)
        store = spool(*experts_of(model), tmp_path)
        assert_holds(store, model)
        assert not any(store.staged(layer) for layer in range(len(store.specs)))
        # Files that anyone can read, and whose data direct reads need not move.
        for file in store.files:
            assert min(ref.offset for ref in read_header(file).values()) % PAGE == 0
            assert load_file(file).keys() == read_header(file).keys()

    def test_goes_with_its_last_user(self, tmp_path: Path) -> None:
        model: Any = FAMILIES["mixtral"].build()
        store = spool(*experts_of(model), tmp_path)
        (place,) = tmp_path.iterdir()
        size = sum(file.stat().st_size for file in place.iterdir())
        assert store.describe().startswith(f"spool {place} (")
        assert size < 1.2 * sum(p.nbytes for module in experts_of(model)[0] for p in module.parameters())
        del store
        gc.collect()
        assert not place.exists()

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forks in a process with threads, from Python 3.12 on
    def test_does_not_go_with_a_fork_of_its_user(self, tmp_path: Path) -> None:
        model: Any = FAMILIES["mixtral"].build()
        store = spool(*experts_of(model), tmp_path)
        child = os.fork()
        if child == 0:
            del store
            gc.collect()
            os._exit(0)
        os.waitpid(child, 0)
        assert_holds(store, model)

    def test_a_full_disk_is_told_beforehand(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
        with pytest.raises(PromoeError, match=r"the spool needs \d+ kB, but .* has 100 kB free; .*spool_dir="):
            spool(*experts_of(FAMILIES["mixtral"].build()), tmp_path)
        assert not list(tmp_path.iterdir())

    def test_a_failed_write_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("promoe_triton.stores.spool._sources", fail)
        with pytest.raises((OSError, PromoeError), match="No space left"):
            spool(*experts_of(FAMILIES["mixtral"].build()), tmp_path)
        assert not list(tmp_path.iterdir())

    def test_no_such_folder(self, tmp_path: Path) -> None:
        with pytest.raises((OSError, PromoeError), match="nowhere"):
            spool(*experts_of(FAMILIES["mixtral"].build()), tmp_path / "nowhere")


class TestResolve:
    def test_one_file(self, tmp_path: Path) -> None:
        saved("mixtral", tmp_path)
        assert resolve_files(str(tmp_path)) == [tmp_path / "model.safetensors"]

    def test_shards_in_order(self, tmp_path: Path) -> None:
        saved("mixtral", tmp_path, max_shard_size="100KB")
        files = resolve_files(str(tmp_path))
        assert files == sorted(tmp_path.glob("*.safetensors"))
        assert len(files) > 2

    def test_a_missing_shard_is_named(self, tmp_path: Path) -> None:
        saved("mixtral", tmp_path, max_shard_size="100KB")
        gone = sorted(tmp_path.glob("*.safetensors"))[1]
        gone.unlink()
        with pytest.raises(PromoeError, match=gone.name):
            resolve_files(str(tmp_path))

    def test_no_safetensors(self, tmp_path: Path) -> None:
        saved("mixtral", tmp_path)
        (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
        with pytest.raises(PromoeError, match="safetensors"):
            resolve_files(str(tmp_path))

    @pytest.mark.parametrize("name", ["/no/such/folder", "no-such/model"], ids=["folder", "hub-id"])
    def test_nothing_there(self, name: str) -> None:
        with pytest.raises(PromoeError, match=name):
            resolve_files(name, local_files_only=True)

    def test_a_model_from_nowhere(self) -> None:
        with pytest.raises(PromoeError, match="not loaded from a checkpoint"):
            checkpoint_files(FAMILIES["mixtral"].build())


@pytest.mark.parametrize("shape", [(7,), (3, 5)], ids=["vector", "matrix"])
def test_specs_count_their_bytes(shape: tuple[int, ...]) -> None:
    spec = TensorSpec(name="w", part=Part.UP, shape=shape, dtype=torch.bfloat16)
    assert spec.nbytes == 2 * math.prod(shape)
    assert ExpertSpec(tensors=(spec, spec)).nbytes == 2 * spec.nbytes


class TestSlotMemory:
    def test_slots_are_whole_pages_apart(self) -> None:
        memory = SlotMemory(3, PAGE + 1)
        assert memory.slot_bytes == 2 * PAGE == round_up(PAGE + 1)
        assert memory.slot(0).data_ptr() % PAGE == 0
        for index in range(3):
            memory.slot(index).fill_(index + 1)
        assert [int(memory.slot(i).min()) for i in range(3)] == [1, 2, 3]
        assert bytes(memory.view[2 * PAGE : 2 * PAGE + 1]) == b"\x02"

    def test_pages_come_when_they_are_written(self) -> None:
        def anonymous() -> int:
            lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))

        before = anonymous()
        memory = SlotMemory(64, 2**20)
        assert anonymous() - before < 2**24
        memory.view[:] = bytes(64 * 2**20)
        assert anonymous() - before >= 64 * 2**20


class TestOwnMemory:
    @pytest.fixture
    def tensors(self, tmp_path: Path) -> dict[str, Tensor]:
        """Named tensors in one mapped file: two at odd places, a turned one, every second row, and an alias."""
        file = tmp_path / "w"
        file.write_bytes(random_bytes(5000))
        storage = torch.UntypedStorage.from_file(str(file), shared=True, nbytes=5000)
        whole = torch.empty(0, dtype=torch.uint8).set_(storage)
        first = whole[:400].view(torch.float32)
        return {
            "first": first,
            "odd": whole[1012:1412].view(torch.float32),
            "turned": whole[2000:2240].view(torch.int16).view(12, 10).t(),
            "rows": whole[3000:3200].view(20, 10)[::2],
            "alias": first.view(-1),
        }

    def test_only_what_lies_in_files_is_found(self, tensors: dict[str, Tensor]) -> None:
        anonymous, shared = torch.ones(9), torch.ones(9).share_memory_()
        elsewhere = [anonymous, shared, torch.empty(3, device="meta"), torch.empty(0)]
        mapped = list(tensors.values())
        found = in_files([*elsewhere, *mapped, *mapped])
        assert [id(tensor) for tensor in found] == [id(tensor) for tensor in mapped]

    def test_copies_are_equal_and_do_not_change_with_the_file(self, tensors: dict[str, Tensor], tmp_path: Path) -> None:
        before = {name: (t.clone(), t.stride(), t.data_ptr() % 64, t.shape) for name, t in tensors.items()}
        own_memory(tensors.values())
        assert not in_files(tensors.values())
        with (tmp_path / "w").open("r+b") as handle:
            handle.write(bytes(5000))
        for name, tensor in tensors.items():
            bits, *lie = before[name]
            assert torch.equal(tensor.contiguous().view(torch.uint8), bits.contiguous().view(torch.uint8)), name
            assert lie == [tensor.stride(), tensor.data_ptr() % 64, tensor.shape]
        assert tensors["alias"].data_ptr() == tensors["first"].data_ptr(), "what was one stays one"
