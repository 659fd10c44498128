from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coinfer.bundle import FORMAT, MANIFEST_BYTES, Manifest, load_bundle, new_folder, sha256_of, write_manifest
from coinfer.errors import BundleError
from coinfer.plan import TensorSpec
from coinfer.profile import Machine, Profile, Timing

MACHINE = Machine(name="m", processor="p", cores=2, system="s", python="3.11", versions={"numpy": "2"})
TIMING = Timing(median_s=0.001, p5_s=0.0009, p95_s=0.002, repeats=20)
PROFILE = Profile(machine=MACHINE, threads=1, date="2025-01-02", segments={"head.onnx": TIMING}, codecs={})


def manifest_of(trio) -> Manifest:
    return Manifest(
        format=FORMAT,
        coinfer="0.1.0",
        model="net",
        data="digits",
        created="2025-01-02T03:04:05Z",
        input=TensorSpec(name="input", shape=(8, 8, 3), dtype="uint8"),
        outputs=(TensorSpec(name="output", shape=(10,)),),
        preprocess=None,
        classes=("0", "1"),
        goal="latency",
        max_loss_points=1.0,
        reference_plan=0,
        reference_accuracy=0.9,
        is_agreement=False,
        int8_slowdown_ratio=2.0,
        weights_sha256={"net": "0" * 64},
        menu=tuple(candidate.plan for candidate in trio),
        files={},
    )


def write_bundle(target: Path, trio) -> Path:
    with new_folder(target) as folder:
        (folder / "segments").mkdir()
        (folder / "segments" / "head.onnx").write_bytes(b"head" * 100)
        (folder / "evidence.json").write_bytes(msgspec.json.encode(trio))
        (folder / "profile.json").write_bytes(msgspec.json.encode(PROFILE))
        write_manifest(folder, manifest_of(trio))
    return target


@pytest.fixture
def folder(tmp_path: Path, trio) -> Path:
    return write_bundle(tmp_path / "bundle", trio)


def test_a_bundle_gives_back_what_was_written(folder, trio):
    bundle = load_bundle(folder)
    assert bundle.candidates() == trio
    assert bundle.profile() == PROFILE
    assert bundle.plan(2) == trio[2].plan
    assert bundle.path("segments/head.onnx").read_bytes() == b"head" * 100
    assert set(bundle.manifest.files) == {"segments/head.onnx", "evidence.json", "profile.json"}


def test_its_identity_is_the_hash_of_bundle_json(folder):
    assert load_bundle(folder).digest == hashlib.sha256((folder / "bundle.json").read_bytes()).hexdigest()
    assert sha256_of(folder / "bundle.json") == load_bundle(folder).digest


def test_equal_content_has_an_equal_identity(folder, tmp_path, trio):
    assert load_bundle(folder).digest == load_bundle(write_bundle(tmp_path / "again", trio)).digest


def test_unknown_plans_and_files_are_named(folder):
    bundle = load_bundle(folder)
    with pytest.raises(BundleError, match="plan 9 is not on the menu, which has 0, 1, 2"):
        bundle.plan(9)
    with pytest.raises(BundleError, match='"../secret" is not listed'):
        bundle.path("../secret")


def test_an_altered_file_is_refused(folder):
    content = bytearray((folder / "segments" / "head.onnx").read_bytes())
    content[7] ^= 1
    (folder / "segments" / "head.onnx").write_bytes(content)
    with pytest.raises(BundleError, match='"segments/head.onnx" does not have the sha256'):
        load_bundle(folder)


def test_a_missing_file_is_refused(folder):
    (folder / "profile.json").unlink()
    with pytest.raises(BundleError, match='"profile.json" is missing'):
        load_bundle(folder)


def test_a_link_in_place_of_a_file_is_refused(folder, tmp_path):
    os.rename(folder / "profile.json", tmp_path / "elsewhere.json")
    (folder / "profile.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(BundleError, match='"profile.json" is missing'):
        load_bundle(folder)


def edit(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / "bundle.json").read_text())
    (folder / "bundle.json").write_text(json.dumps({**manifest, **changes}))


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "segments/../../outside"])
def test_a_name_that_leads_out_is_refused(folder, tmp_path, name):
    (tmp_path / "outside").write_bytes(b"x")
    edit(folder, files={name: {"num_bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}})
    with pytest.raises(BundleError, match="leads out of the bundle"):
        load_bundle(folder)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version_is_refused_before_anything_else(folder, version):
    edit(folder, format=version, field_of_a_later_version=1)
    with pytest.raises(BundleError, match=f"bundle format must be 1, got {json.dumps(version)}"):
        load_bundle(folder)


def test_a_manifest_with_an_impossible_plan_is_refused(folder):
    plan = {"number": 3, "kind": "split", "variant": "net"}
    edit(folder, menu=[plan])
    with pytest.raises(BundleError, match="not a manifest: a split plan has"):
        load_bundle(folder)


def test_evidence_of_another_kind_is_refused(folder):
    content = b'[{"plan": 3}]'
    (folder / "evidence.json").write_bytes(content)
    files = {"evidence.json": {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    edit(folder, files=files)
    with pytest.raises(BundleError, match="evidence.json cannot be read"):
        load_bundle(folder).candidates()
    with pytest.raises(BundleError, match='"profile.json" is not listed'):
        load_bundle(folder).profile()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=st.one_of(st.binary(max_size=200), st.from_regex(r'[\[\]{}:,"a-z0-9 ]{0,60}').map(str.encode)))
def test_any_other_bytes_are_refused(tmp_path, content):
    (tmp_path / "bundle.json").write_bytes(content)
    with pytest.raises(BundleError):
        load_bundle(tmp_path)


@pytest.mark.parametrize("content", [b'{"format": 1, "files": ' + b"[" * 200_000, b"[" * 200_000, b'{"a": "\xff"}'])
def test_hostile_bytes_are_refused(tmp_path, content):
    (tmp_path / "bundle.json").write_bytes(content)
    with pytest.raises(BundleError):
        load_bundle(tmp_path)


def test_a_folder_without_a_bundle_is_named(tmp_path):
    with pytest.raises(BundleError, match="no bundle.json in .*give a folder that `coinfer build -o` wrote"):
        load_bundle(tmp_path)


def test_a_failed_build_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with new_folder(tmp_path / "out" / "bundle") as folder:
            (folder / "half").write_bytes(b"x")
            raise KeyboardInterrupt
    assert list((tmp_path / "out").iterdir()) == []


def test_a_failed_rebuild_leaves_the_old_bundle(folder, tmp_path):
    before = load_bundle(folder).digest
    with pytest.raises(OSError, match="disk"):
        with new_folder(folder):
            raise OSError("disk")
    assert load_bundle(folder).digest == before
    assert list(tmp_path.iterdir()) == [folder]


def test_a_rebuild_replaces_the_old_bundle_whole(folder, tmp_path, trio):
    (folder / "stray").write_bytes(b"x")
    write_bundle(folder, trio[:1])
    assert not (folder / "stray").exists()
    assert len(load_bundle(folder).manifest.menu) == 1
    assert list(tmp_path.iterdir()) == [folder]


def test_the_old_bundle_comes_back_where_the_last_rename_fails(folder, tmp_path, trio, monkeypatch):
    before, rename = load_bundle(folder).digest, os.rename

    def failing(source, target):
        if Path(target) == folder and ".old." not in str(source):
            raise OSError("disk")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="disk"):
        write_bundle(folder, trio[:1])
    assert load_bundle(folder).digest == before
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_no_bundle_is_never_replaced(tmp_path, kind):
    target = tmp_path / "photos"
    if kind == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "cat.jpg").write_text("mine")
    with pytest.raises(BundleError, match="photos exists and is not a bundle"):
        with new_folder(target):
            raise AssertionError("must not get here")
    assert target.exists()


def listed_as(folder, name):
    """The bundle's profile.json under another name in the manifest."""
    manifest = json.loads((folder / "bundle.json").read_text())
    manifest["files"][name] = manifest["files"].pop("profile.json")
    (folder / "bundle.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/", "", ".", "..", "C:\\x", "..\\x", "a\0b", "C:x"]
)
def test_file_names_with_path_traversal_are_refused(folder, name):
    listed_as(folder, name)
    with pytest.raises(BundleError, match="leads out of the bundle") as caught:
        load_bundle(folder)
    assert str(caught.value).isprintable()


def test_a_linked_folder_is_refused(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (folder / "profile.json").rename(tmp_path / "elsewhere" / "profile.json")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    listed_as(folder, "linked/profile.json")
    with pytest.raises(BundleError, match='folder of file "linked/profile.json" is a link'):
        load_bundle(folder)


def test_a_pipe_is_refused_without_waiting(folder):
    (folder / "profile.json").unlink()
    os.mkfifo(folder / "profile.json")
    with pytest.raises(BundleError, match='"profile.json" is missing'):
        load_bundle(folder)


def test_a_file_that_changes_after_the_check_is_checked_anew(folder):
    bundle = load_bundle(folder)
    content = (folder / "profile.json").read_bytes()
    (folder / "profile.json").unlink()
    (folder / "profile.json").write_bytes(content)
    assert bundle.path("profile.json").read_bytes() == content
    os.utime(folder / "profile.json", ns=(0, 0))
    (folder / "profile.json").write_bytes(content[:-1] + b" ")
    with pytest.raises(BundleError, match='"profile.json" does not have the sha256'):
        bundle.path("profile.json")
    (folder / "profile.json").unlink()
    with pytest.raises(BundleError, match='"profile.json" is missing'):
        bundle.path("profile.json")


def test_an_endless_manifest_is_refused(folder):
    os.truncate(folder / "bundle.json", MANIFEST_BYTES + 1)
    with pytest.raises(BundleError, match=f"bundle.json has at most {MANIFEST_BYTES} B"):
        load_bundle(folder)
