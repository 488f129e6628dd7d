"""A checkpoint from elsewhere is parsed, never executed: whatever is in it gives a UserError, and no memory for nothing."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pretrain import checkpoint
from pretrain.errors import UserError
from pretrain.loading import load_model
from tests.pretrain import running
from tests.pretrain.running import assert_refused

STEP = 12


@pytest.fixture
def run(tmp_path: Path, tiny_data: Path) -> Path:
    """A copy of the trained run with its last checkpoint alone."""
    source, target = running.trained(tiny_data), tmp_path / "run"
    target.mkdir()
    for name in ("config.yaml", "tokenizer.model"):
        shutil.copy(source / name, target / name)
    folder = running.checkpoint_folder(source, STEP)
    shutil.copytree(folder, running.checkpoint_folder(target, STEP))
    return target


@pytest.fixture(autouse=True)
def little_memory(tiny_data: Path) -> Iterator[None]:
    """No more than a gigabyte of address space beyond what the process has."""
    running.trained(tiny_data)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**30, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def no_pickle() -> Iterator[None]:
    import torch

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was unpickled")

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
            patch.setattr(owner, name, refuse)
        yield


def refused(run: Path) -> str:
    """Every way to the tensors refuses the only checkpoint with a UserError; its words."""
    with no_pickle():
        with pytest.raises(UserError) as caught:
            load_model(run, STEP)
        with pytest.raises(UserError):
            load_model(run)
    return str(caught.value)


def files_of(run: Path) -> tuple[Path, Path]:
    folder = running.checkpoint_folder(run, STEP)
    [tensors] = folder.glob("*.safetensors")
    return folder / "manifest.json", tensors


def test_the_checkpoint_itself_is_read_without_a_pickle(run: Path) -> None:
    """What all refusals below are compared with."""
    with no_pickle():
        assert load_model(run).step == STEP
        assert load_model(run, STEP).step == STEP


def _forbid_classes() -> None:
    """In this process nothing is unpickled that names a class, as anything that executes must."""
    import sys

    def watch(event: str, _: Any) -> None:
        if event == "pickle.find_class":
            os.write(2, b"Traceback: something was unpickled\n")
            os._exit(99)

    sys.addaudithook(watch)


def test_evaluation_and_inspection_unpickle_nothing(run: Path, tiny_data: Path) -> None:
    """By the interpreter's own audit of every unpickler, those written in C too."""
    for arguments in (("generate", run, "--max-tokens", "2"), ("inspect", run)):
        assert running.command(*arguments, fault=_forbid_classes).code == 0


# -- the manifest ----------------------------------------------------------------------------------------------------


def _without_box(manifest: Any) -> None:
    del manifest["boxes"][0]


def _put(*keys: Any, to: Any) -> Callable[[Any], None]:
    """A change of the value that these keys lead to."""

    def change(manifest: Any) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = to

    return change


def _split_first_box(manifest: Any, *, second: int) -> None:
    """The first box as two of half its rows; the second begins at this row."""
    tensor, shape, offset, size, file = manifest["boxes"].pop(0)
    half = size[0] // 2
    manifest["boxes"] += [
        [tensor, shape, offset, [half, *size[1:]], file],
        [tensor, shape, [second, *offset[1:]], [size[0] - half, *size[1:]], file],
    ]


def _rename_file(manifest: Any, *, name: str) -> None:
    [known] = manifest["files"]
    manifest["files"] = {name: manifest["files"][known]}
    for box in manifest["boxes"]:
        box[4] = name


def _columns_that_overlap(manifest: Any) -> None:
    """Two ranges of columns that share some, and leave out as many."""
    tensor, shape, _, _, file = manifest["boxes"].pop(0)
    rows, columns = shape
    manifest["boxes"] += [
        [tensor, shape, [0, 0], [rows, columns // 2], file],
        [tensor, shape, [0, 1], [rows, columns // 2], file],
    ]


MANIFESTS: dict[str, Callable[[Any], None]] = {
    "a box is missing": _without_box,
    "boxes overlap and leave a hole": partial(_split_first_box, second=1),
    "two boxes at one place": lambda m: m["boxes"].append(m["boxes"][0]),
    "columns overlap": _columns_that_overlap,
    "a box outside its tensor": _put("boxes", 0, 2, to=[10**6, 0]),
    "a negative offset": _put("boxes", 0, 2, to=[-1, 0]),
    "an absurd shape": lambda m: m["boxes"][0].__setitem__(slice(1, 4), [[2**62, 32], [0, 0], [2**62, 32]]),
    "another shape than the model's": lambda m: m["boxes"][0].__setitem__(slice(1, 4), [[8, 32], [0, 0], [8, 32]]),
    "three dimensions": lambda m: m["boxes"][0].__setitem__(slice(1, 4), [[8, 8, 8], [0, 0, 0], [8, 8, 8]]),
    "no dimension": lambda m: m["boxes"][0].__setitem__(slice(1, 4), [[], [], []]),
    "numbers that are booleans": _put("boxes", 0, 2, to=[False, False]),
    "numbers that are floats": _put("boxes", 0, 2, to=[0.0, 0.0]),
    "numbers that are texts": _put("boxes", 0, 2, to=["0", "0"]),
    "a box of four fields": lambda m: m["boxes"][0].pop(),
    "boxes that are no list": _put("boxes", to=7),
    "a box that is no list": _put("boxes", 0, to=None),
    "a tensor without a name": _put("boxes", 0, 0, to=["x"]),
    "a tensor of another name": _put("boxes", 0, 0, to="blocks.9.weight"),
    "a file that is not listed": _put("boxes", 0, 4, to="other.safetensors"),
    "a path up": partial(_rename_file, name="../outside.safetensors"),
    "an absolute path": partial(_rename_file, name="/etc/outside.safetensors"),
    "a hidden file": partial(_rename_file, name="..safetensors"),
    "a file with a line end": partial(_rename_file, name="a.safetensors\n"),
    "a pickle by name": partial(_rename_file, name="model.pt"),
    "files that are a list": _put("files", to=["a.safetensors"]),
    "a file without a hash": lambda m: m["files"].update({name: {"bytes": 1} for name in m["files"]}),
    "a file with a wrong size": lambda m: m["files"].update({name: {"bytes": -1, "sha256": ""} for name in m["files"]}),
    "another format": _put("format", to=4),
    "no state": lambda m: m.pop("state"),
    "a state that is a list": _put("state", to=[1]),
    "an unknown part of the state": _put("state", "more", to=1),
    "a step that is a text": _put("state", "step", to="12"),
    "a negative step": _put("state", "samples", to=-1),
    "updates that are null": _put("state", "updates", to=None),
    "another step than the folder's": _put("state", "step", to=9),
    "about that is a list": _put("about", to=[]),
}


OF_ANOTHER_MODEL = (
    "another shape than the model's",
    "a tensor of another name",
    "a box is missing",
)  # no manifest can tell that


@pytest.mark.parametrize("what", MANIFESTS)
def test_a_hostile_manifest_is_refused(run: Path, what: str) -> None:
    path, _ = files_of(run)
    manifest = json.loads(path.read_text())
    before = json.dumps(manifest)
    MANIFESTS[what](manifest)
    assert json.dumps(manifest) != before
    path.write_text(json.dumps(manifest))
    assert str(run) in refused(run)
    if what not in OF_ANOTHER_MODEL:
        with pytest.raises(UserError):
            checkpoint.open_checkpoint(path.parent)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"3", b'"x"', b"\xff\xfe{}", b"[" * 200_000, b'{"format": ' + b"9" * 5000 + b"}"],
    ids=["empty", "cut", "list", "null", "number", "text", "no UTF-8", "deep", "a number of 5,000 digits"],
)
def test_a_manifest_that_is_none_is_refused(run: Path, content: bytes) -> None:
    path, _ = files_of(run)
    path.write_bytes(content)
    refused(run)


def test_a_manifest_of_gigabytes_is_refused_unread(run: Path) -> None:
    path, _ = files_of(run)
    os.truncate(path, 2**40)  # sparse: it takes no space
    assert "more than a manifest can have" in refused(run)


# -- links -----------------------------------------------------------------------------------------------------------


def test_links_are_not_followed(run: Path, tmp_path: Path) -> None:
    """Not even to a file whose hash is right."""
    for path in files_of(run):
        outside = tmp_path / path.name
        path.rename(outside)
        path.symlink_to(outside)
        refused(run)
        path.unlink()
        outside.rename(path)
    assert load_model(run).step == STEP


def test_a_pipe_in_place_of_a_file_does_not_block(run: Path) -> None:
    for path in files_of(run):
        kept = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        refused(run)
        path.unlink()
        path.write_bytes(kept)


# -- the files of tensors, with a manifest that agrees to them -------------------------------------------------------


def replace_tensors(run: Path, content: bytes) -> None:
    """Put the bytes in place of the file of tensors, and their size and hash into the manifest."""
    path, tensors = files_of(run)
    tensors.write_bytes(content)
    manifest = json.loads(path.read_text())
    manifest["files"] = {tensors.name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}}
    path.write_text(json.dumps(manifest))


def with_header(content: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def _swap_shape(header: dict[str, Any]) -> None:
    """The same bytes as a tensor of other dimensions."""
    assert header["embedding.weight"]["shape"] == [512, 32]
    header["embedding.weight"]["shape"] = [32, 512]


def _overlap(header: dict[str, Any]) -> None:
    first, second = sorted((name for name in header if name != "__metadata__"), key=lambda name: _begin(header, name))[
        :2
    ]
    length = header[second]["data_offsets"][1] - header[second]["data_offsets"][0]
    header[second]["data_offsets"] = [header[first]["data_offsets"][0], header[first]["data_offsets"][0] + length]


def _begin(header: dict[str, Any], name: str) -> int:
    begin: int = header[name]["data_offsets"][0]
    return begin


def _change_all(header: dict[str, Any], **values: Any) -> None:
    for name, entry in header.items():
        if name != "__metadata__":
            entry.update(values)


def _pickled(marker: Path) -> bytes:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (marker,))

    return pickle.dumps(Evil())


def _zipped(marker: Path) -> bytes:
    """As torch.save writes it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", _pickled(marker))
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


CONTENTS: dict[str, Callable[[bytes, Path], bytes]] = {
    "empty": lambda content, _: b"",
    "a header of 2^63 bytes": lambda content, _: struct.pack("<Q", 2**63) + content[8:],
    "a header of 2^64 - 1 bytes": lambda content, _: b"\xff" * 8 + content[8:],
    "a header longer than the file": lambda content, _: struct.pack("<Q", len(content)) + content[8:],
    "a header that is no JSON": lambda content, _: content[:8] + b"\0" * (len(content) - 8),
    "a tensor larger than the file": lambda content, _: content[:-4],
    "bytes after the last tensor": lambda content, _: content + b"more",
    "overlapping tensors": lambda content, _: with_header(content, _overlap),
    "a shape that does not fit": lambda content, _: with_header(content, partial(_change_all, shape=[3, 5])),
    "an absurd shape": lambda content, _: with_header(content, partial(_change_all, shape=[2**40, 2**40])),
    "other dimensions": lambda content, _: with_header(content, _swap_shape),
    "another type": lambda content, _: with_header(content, partial(_change_all, dtype="I32")),
    "an unknown type": lambda content, _: with_header(content, partial(_change_all, dtype="OBJECT")),
    "a tensor missing": lambda content, _: with_header(content, lambda header: header.pop("embedding.weight")),
    "other names": lambda content, _: with_header(
        content, lambda header: header.update(x=header.pop("embedding.weight"))
    ),
    "no tensor": lambda content, _: struct.pack("<Q", 2) + b"{}",
    "a pickle": lambda content, marker: _pickled(marker),
    "a file of torch.save": lambda content, marker: _zipped(marker),
}


@pytest.mark.parametrize("what", CONTENTS)
def test_a_hostile_file_of_tensors_is_refused(run: Path, tmp_path: Path, what: str) -> None:
    _, tensors = files_of(run)
    marker = tmp_path / "executed"
    content = CONTENTS[what](tensors.read_bytes(), marker)
    assert content != tensors.read_bytes()
    replace_tensors(run, content)
    assert str(running.checkpoint_folder(run, STEP)) in refused(run)
    assert not marker.exists()


@pytest.mark.parametrize("what", ["a pickle", "another type", "a header of 2^63 bytes"])
def test_a_run_does_not_go_on_from_such_a_file(run: Path, tmp_path: Path, what: str) -> None:
    """The whole way of `train`, in a process of its own: refused before anything is changed."""
    _, tensors = files_of(run)
    replace_tensors(run, CONTENTS[what](tensors.read_bytes(), tmp_path / "executed"))
    before = running.content_of(run)
    assert_refused(running.command("train", run), str(running.checkpoint_folder(run, STEP)))
    assert not (tmp_path / "executed").exists()
    assert running.content_of(run) == before


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_named_before_anything_is_trained(
    run: Path, tmp_path: Path, tiny_data: Path, number: float
) -> None:
    """In a run that is gone on with, and in a model that another starts from."""
    _, tensors = files_of(run)
    content = tensors.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    begin = 8 + length + json.loads(content[8 : 8 + length])["embedding.weight"]["data_offsets"][0]
    replace_tensors(run, content[: begin + 400] + struct.pack("<f", number) + content[begin + 404 :])
    words = "its 'embedding.weight' has numbers that are not finite (NaN or infinity)"
    assert words in refused(run)
    before = running.content_of(run)
    assert_refused(running.command("train", run), words)
    assert running.content_of(run) == before
    assert_refused(running.train(tmp_path / "other", tiny_data, f"model.initial={run}"), words)


def test_a_checkpoint_of_a_larger_model_is_not_taken_for_a_part_of_it(run: Path) -> None:
    """A config edited to one layer less would otherwise give another model without a word."""
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("num_layers: 2", "num_layers: 1"))
    assert "another model" in refused(run)


def test_a_checkpoint_of_another_width_is_refused_with_both_shapes(run: Path) -> None:
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("hidden_size: 32", "hidden_size: 64"))
    words = refused(run)
    assert "another model" in words and "32" in words and "64" in words


def test_no_checkpoint_is_no_fault_of_the_files(tmp_path: Path) -> None:
    """A folder that is not there, or empty, has none; one of another name is not one."""
    assert checkpoint.latest(tmp_path) is None
    (tmp_path / "checkpoints" / "step-12").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step-00000012.partial").mkdir()
    assert checkpoint.latest(tmp_path) is None
