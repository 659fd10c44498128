"""The folder that both machines hold: a menu of plans, their segments and tables, and the evidence.

    DIR/bundle.json          the Manifest: what this is, the menu, sha256 and size of every other file
    DIR/bundle.json.sig      where it was signed: the signature of bundle.json, see `coinfer.signature`
    DIR/evidence.json        every candidate that was considered, with what was measured (plan reads it)
    DIR/networks.json        how each network of the menu was made: of which other one, by which recipes
    DIR/profile.json         the building machine's Profile
    DIR/samples.safetensors  four pictures, so that a machine can time codecs on real input
    DIR/segments/*.onnx      heads, tails and whole networks of the menu
    DIR/tables/*.safetensors static tables of the menu's codecs
    DIR/exits/*.safetensors  what every image of those that choices are made on did at the exits of a plan
    DIR/map.json             the best plan for every rate and load (`search.planmap`)

A bundle's identity (`Bundle.digest`) is the sha256 of bundle.json, which holds the sha256 of every other file;
device and edge agree on it in the handshake.  Written to a temporary folder, synced, then renamed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import msgspec

from .errors import BundleError, PlanError
from .plan import Candidate, Plan, Preprocess, TensorSpec, Value
from .profile import Conditions, Profile, Radio

FORMAT = 1
SIGNATURE = "bundle.json.sig"
# Of bundle.json, before it is read.
MANIFEST_BYTES = 64 << 20
# What msgspec raises on bytes that are not the JSON of a type; deep nesting is a RecursionError.
_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


T = TypeVar("T")


class FileEntry(Value, frozen=True, kw_only=True):
    """Size and sha256 of one file of a bundle."""

    num_bytes: int
    sha256: str


class Ancestry(Value, frozen=True, kw_only=True):
    """How a network was made.

    `base` is the name of the one that it was made of (None: it was given).  `pruned` has each stage of pruning since
    the unmodified network, its recipe and the channels that each round removed; `unit` the cut, shape and recipe of
    the trained unit in it.
    """

    name: str
    weights_sha256: str
    base: str | None = None
    pruned: tuple[dict[str, Any], ...] = ()
    unit: dict[str, Any] | None = None


class Manifest(Value, frozen=True, kw_only=True):
    """What bundle.json holds.

    `input` is the picture or array a request brings (without batch); `outputs` the network's output
    tensors; `preprocess` None means that a request already is the network's input.
    `reference_plan` is the unmodified fp32 network on the device, always on the menu: losses are counted
    against it.  `is_agreement` says that no labels were used and its own answers stand in; `holdout` where
    the pictures came from that choices were made on, see `data.hold_out`.
    `weights_sha256` maps each variant's name to its weights' hash.  `device_power_w`, `radio`, `max_energy_j`,
    `max_device_bytes` and `max_device_memory_bytes` are the job's, where it names any: what energies are counted with,
    and limits, unless others are given.  `conditions` are what the job named; `cuts` the unmodified network's, in the
    order in which it runs.
    """

    format: int
    coinfer: str
    model: str
    data: str
    created: str
    input: TensorSpec
    outputs: tuple[TensorSpec, ...]
    preprocess: Preprocess | None
    classes: tuple[str, ...]
    goal: str
    max_loss_points: float
    reference_plan: int
    reference_accuracy: float
    is_agreement: bool
    int8_slowdown_ratio: float
    device_power_w: float | None = None
    radio: Radio | None = None
    max_energy_j: float | None = None
    max_device_bytes: float | None = None
    max_device_memory_bytes: float | None = None
    holdout: str | None = None
    conditions: Conditions | None = None
    cuts: tuple[str, ...] = ()
    weights_sha256: dict[str, str]
    menu: tuple[Plan, ...]
    files: dict[str, FileEntry]


Stamp = tuple[int, ...]
"""Which file lies at a path, and since when: it changes with the file."""


class Bundle:
    """A loaded and checked bundle; `stamps` are of its files when they were checked."""

    def __init__(
        self, folder: Path, manifest: Manifest, digest: str, stamps: dict[str, Stamp] | None = None
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.digest = digest
        self._stamps = {} if stamps is None else stamps

    def plan(self, number: int) -> Plan:
        """The menu's plan of that number.

        Raises:
            BundleError: no plan of the menu has it.
        """
        for plan in self.manifest.menu:
            if plan.number == number:
                return plan
        have = ", ".join(str(plan.number) for plan in self.manifest.menu)
        raise BundleError(f"plan {number} is not on the menu, which has {have} (bundle {self.folder})")

    def path(self, name: str) -> Path:
        """The path of one file that the manifest lists; one that has changed since it was checked is checked anew.

        Raises:
            BundleError: the manifest does not list it, or it was altered.
        """
        if name not in self.manifest.files:
            raise BundleError(f'"{name}" is not listed in bundle.json (bundle {self.folder})')
        path = self.folder / name
        try:
            is_same = self._stamps.get(name) == _stamp(path.lstat())
        except OSError:
            is_same = False
        if not is_same:
            self._stamps[name] = _check_file(self.folder, name, self.manifest.files[name])
        return path

    def candidates(self) -> list[Candidate]:
        """Every candidate that was considered, the menu's included, with its evidence.

        Raises:
            BundleError: evidence.json is not listed, or holds something else.
        """
        return self._decode("evidence.json", list[Candidate])

    def networks(self) -> dict[str, Ancestry]:
        """How the networks of the menu were made, and those that they were made of, by name.

        Raises:
            BundleError: networks.json is not listed, or holds something else.
        """
        return self._decode("networks.json", dict[str, Ancestry])

    def profile(self) -> Profile:
        """The building machine's times.

        Raises:
            BundleError: profile.json is not listed, or holds something else.
        """
        return self._decode("profile.json", Profile)

    def _decode(self, name: str, wanted: type[T]) -> T:
        try:
            return msgspec.json.decode(self.path(name).read_bytes(), type=wanted)
        except (*_UNREADABLE, PlanError) as error:
            raise BundleError(f"{name} cannot be read: {error} (bundle {self.folder})") from error


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_bundle(folder: Path) -> Bundle:
    """The bundle in `folder`, every file checked against its sha256.

    Raises:
        BundleError: no bundle there, another version, or a listed file that is missing or altered.
    """
    raw = read_manifest(folder)
    try:
        version = msgspec.json.decode(raw, type=dict[str, msgspec.Raw]).get("format", b"none")
        if bytes(version) != str(FORMAT).encode():
            got = bytes(version)[:80].decode(errors="replace")
            raise BundleError(f"bundle format must be {FORMAT}, got {got} (bundle {folder})")
        manifest = msgspec.json.decode(raw, type=Manifest)
    except (*_UNREADABLE, PlanError) as error:
        raise BundleError(f"bundle.json is not a manifest: {error} (bundle {folder})") from error
    stamps = {name: _check_file(folder, name, entry) for name, entry in manifest.files.items()}
    return Bundle(folder, manifest, hashlib.sha256(raw).hexdigest(), stamps)


def read_manifest(folder: Path) -> bytes:
    """The bytes of bundle.json, which nobody has looked at yet.

    Raises:
        BundleError: it is not there, or longer than any bundle's.
    """
    path = folder / "bundle.json"
    if not path.is_file():
        raise BundleError(f"no bundle.json in {folder}: give a folder that `coinfer build -o` wrote")
    with path.open("rb") as file:
        # No more room than the file needs, and one byte to see that it has not grown meanwhile.
        raw = file.read(min(os.fstat(file.fileno()).st_size, MANIFEST_BYTES) + 1)
    if len(raw) > MANIFEST_BYTES:
        raise BundleError(f"bundle.json has at most {MANIFEST_BYTES} B (bundle {folder})")
    return raw


def _check_file(folder: Path, name: str, entry: FileEntry) -> Stamp:
    """Whether a file is what the manifest says: a file of this folder, with that size and hash.

    Raises:
        BundleError: it is not.
    """
    parts = PurePosixPath(name).parts
    # Every name has one spelling: nothing absolute, empty, dotted, or with another system's separators.
    if name != "/".join(parts) or not parts or {"/", ".."} & set(parts) or any(c in name for c in "\\:\0"):
        raise BundleError(f'file name "{name!a:.200}" leads out of the bundle (bundle {folder})')
    path = folder
    try:
        for part in parts[:-1]:
            path = path / part
            if path.is_symlink():
                raise BundleError(f'the folder of file "{name}" is a link, which is not allowed (bundle {folder})')
        # What is opened is what is checked: no link is followed, and no pipe is waited for.
        file = os.open(folder / name, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:
        raise BundleError(f'file "{name:.200}" is missing (bundle {folder})') from error
    try:
        found = os.fstat(file)
        # Python opens no folder, and leaves its number open.
        if not stat.S_ISREG(found.st_mode):
            raise BundleError(f'file "{name}" is missing (bundle {folder})')
        with os.fdopen(file, "rb", closefd=False) as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest() if found.st_size == entry.num_bytes else None
    finally:
        os.close(file)
    if digest != entry.sha256:
        raise BundleError(f'file "{name}" does not have the sha256 that bundle.json states (bundle {folder})')
    return _stamp(found)


def _stamp(found: os.stat_result) -> Stamp:
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def check_target(target: Path) -> None:
    """Whether a bundle may be written at `target`: nothing is there, or a bundle, or an empty folder.

    Raises:
        BundleError: something else is there.
    """
    if target.exists() and not (target.is_dir() and (not any(target.iterdir()) or (target / "bundle.json").exists())):
        raise BundleError(f"{target} exists and is not a bundle: choose another folder for -o")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that becomes `target` on success and is removed on any error.

    An existing target is replaced only where it holds a bundle or is empty.

    Raises:
        BundleError: `target` exists and is something else.
    """
    check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if target.exists():
            _replace(target, temporary)
        else:
            os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _replace(target: Path, fresh: Path) -> None:
    """Put `fresh` in the place of `target`; the old folder comes back where that fails."""
    retired = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    os.rename(target, retired / "bundle")
    try:
        os.rename(fresh, target)
    except BaseException:
        os.rename(retired / "bundle", target)
        raise
    finally:
        shutil.rmtree(retired, ignore_errors=True)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """List every file below `folder` in the manifest, write it as bundle.json, and sync all to disk."""
    files = {
        path.relative_to(folder).as_posix(): FileEntry(num_bytes=path.stat().st_size, sha256=sha256_of(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).as_posix() not in ("bundle.json", SIGNATURE)
    }
    listed = msgspec.structs.replace(manifest, files=files)
    (folder / "bundle.json").write_bytes(msgspec.json.format(msgspec.json.encode(listed), indent=1))
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
