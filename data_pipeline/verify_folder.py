"""`verify DIR`: every file that the pipeline wrote, known by the record that binds it.

    manifest.json        shards, see shards.verify
    labels.json          labels; of these shards, where both are there
    clusters.json        centroids, and the space that they lie in
    features.json        vectors, shard by shard
    partial/record.json  a clustering that was stopped

DIR must hold a record itself; folders inside are checked too, their labels and vectors against the
manifest above them. A link to a folder that was checked already is passed over. A file of a kind
that is read here and that no record names is a problem: it came from elsewhere, and a reader may
take it. Other files are named, and not checked. Cost: one reading of every byte.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from model_factory.command_line.plain_text import printable
from model_factory.files import DamagedFile

from .clustering import features, kmeans, labels, progress
from .errors import DataPipelineError
from .shards.manifest import MANIFEST_NAME, Manifest, load_manifest
from .shards.verify import verify
from .shards.writer import SHARD_SUFFIXES

KINDS_READ = (".tar", ".idx", ".json", ".npy")
FEATURES_AGAIN = (
    "run the `features` or `cluster` command that made the folder again, or move away what is "
    "left where it does not belong here"
)
MOST_NAMED = 5  # files of others in the last line


@dataclass
class Findings:
    """What a look at a folder has found, one line each: problems, what was checked, and names of
    files that the pipeline did not write."""

    problems: list[str] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def lines(self, directory: Path) -> list[str]:
        """What to print."""
        if self.problems:
            return self.problems
        checked = f"{directory}: {', '.join(self.checked)}"
        if not self.others:
            return [f"{checked}, every byte as written"]
        named = ", ".join(map(printable, self.others[:MOST_NAMED]))
        more = len(self.others) - MOST_NAMED
        if more > 0:
            named += f" and {more} more"
        return [f"{checked}, every byte that a record names as written; not checked: {named}"]


def verify_folder(directory: Path) -> Findings:
    """Check a folder of shards, labels, centroids or features, or of several of these kinds, and
    the folders inside.

    Raises MissingData where the folder itself has no record of any kind.
    """
    if not _is_ours(directory):
        load_manifest(directory)  # raises the error for what is missing, and how to make it
    findings = Findings()
    _Folder(directory, findings).check()
    return findings


def _is_ours(directory: Path) -> bool:
    return any((directory / name).is_file() for name in _CHECKS)


@dataclass
class _Folder:
    """One folder.

    prefix      where it lies in the folder asked for: stands before names in messages
    manifest    of the shards here, or of those in the nearest folder above that has some
    seen        folders that were checked, links resolved; shared by all of one call
    known       files here that a record names
    """

    directory: Path
    findings: Findings
    prefix: str = ""
    manifest: Manifest | None = None
    seen: set[Path] = field(default_factory=set)
    known: set[str] = field(default_factory=set)

    def check(self) -> None:
        """All that lies here, and below."""
        self.seen.add(self.directory.resolve())
        is_whole = True
        for name, check in _CHECKS.items():
            if not (self.directory / name).is_file():
                continue
            self.known.add(name)
            try:
                checked = check(self)
                place = f" in {printable(self.prefix)}" if self.prefix else ""
                self.findings.checked.append(f"{checked}{place}")
            except (DataPipelineError, DamagedFile, OSError) as error:
                self.findings.problems.append(str(error))
                is_whole = False
        # a damaged record does not show which files it names
        self._rest(is_whole)

    def _rest(self, is_whole: bool) -> None:
        for path in sorted(self.directory.iterdir()):
            name = f"{self.prefix}{path.name}"
            if path.is_dir():
                if path.resolve() in self.seen:  # by a link, perhaps to the folder that it lies in
                    continue
                if _is_ours(path):
                    inner = _Folder(
                        path,
                        self.findings,
                        prefix=f"{name}/",
                        manifest=self.manifest,
                        seen=self.seen,
                    )
                    inner.check()
                else:
                    self.findings.others.append(f"{name}/")
            elif path.name in self.known or _is_lock(path):
                continue
            elif path.suffix in KINDS_READ:
                # after a damaged record it may be one of its files
                if is_whole:
                    self.report(path.name, "no record names this file; move it away")
            else:
                self.findings.others.append(name)

    def report(self, name: str, problem: str) -> None:
        """Add a problem of a file here."""
        self.findings.problems.append(f"{printable(self.prefix + name)}: {problem}")


def _is_lock(path: Path) -> bool:
    return path.name.startswith(".") and path.suffix == ".lock"


def _check_shards(folder: _Folder) -> str:
    folder.manifest = load_manifest(folder.directory)
    shards = folder.manifest.shards
    prefix = printable(folder.prefix)
    folder.findings.problems += [f"{prefix}{problem}" for problem in verify(folder.manifest)]
    folder.known |= {f"{shard['name']}{suffix}" for shard in shards for suffix in SHARD_SUFFIXES}
    # a tar that the manifest does not name is among the problems already
    folder.known |= {path.name for path in folder.directory.glob("*.tar")}
    return f"{len(folder.manifest)} samples in {len(shards)} shards"


def _check_labels(folder: _Folder) -> str:
    folder.known.add(labels.LABELS_NAME)
    if folder.manifest is not None:
        _, num_classes = labels.load_labels(folder.directory, folder.manifest)
        return f"labels of {num_classes} classes"
    shards = Path("DIR")  # in the commands of messages: the record does not name the folder
    record = labels.read_labels_record(folder.directory, shards)
    rows = labels.read_labels_array(folder.directory, record=record, shards=shards)
    return f"{len(rows)} rows of labels of {record['num_classes']} classes (shards not looked at)"


def _check_centroids(folder: _Folder) -> str:
    centroids, record, _ = kmeans.load_centroids(folder.directory)
    folder.known |= record["files"].keys()
    return f"{len(centroids)} centroids"


def _check_features(folder: _Folder) -> str:
    origin = features.read_features_record(folder.directory)["origin"]
    shards = _shards_with_vectors(folder, origin)
    rows = 0
    width = None
    for shard in sorted(shards):
        array = folder.directory / f"{shard}.npy"
        record = folder.directory / f"{shard}.json"
        folder.known |= {array.name, record.name}
        missing = [path.name for path in (array, record) if not path.is_file()]
        if missing:
            folder.report(shard, f"{' and '.join(missing)} missing; {FEATURES_AGAIN}")
            continue
        try:
            vectors = features.read_vectors(
                array, width=width, origin_sha256=features.origin_hash(origin)
            )
        except DataPipelineError as error:
            folder.findings.problems.append(str(error))
            continue
        # all shards have vectors of one width: the next ones are checked by the first
        rows += len(vectors)
        width = vectors.shape[1]
    return f"{rows} vectors"


def _shards_with_vectors(folder: _Folder, origin: dict) -> set[str]:
    """Names of shards that have a vector file or its record here, and of those that ought to."""
    found = {
        path.stem
        for path in folder.directory.iterdir()
        if path.suffix in (".json", ".npy") and path.name not in folder.known
    }
    manifest = folder.manifest
    # a manifest above may be of other shards than these vectors
    if manifest is None or origin.get("manifest_sha256") != manifest.sha256:
        return found
    return found | {shard["name"] for shard in manifest.shards if shard["samples"]}


def _check_progress(folder: _Folder) -> str:
    saved = progress.read_progress(folder.directory)
    for name in saved["files"]:
        folder.known.add(name)
        if progress.is_as_saved(folder.directory, state=saved, name=name):
            progress.read_saved(
                folder.directory, state=saved, name=name
            )  # CorruptShard if no array
        else:
            folder.report(name, "not what its record says; the clustering computes it again")
    return f"{len(saved['files'])} files of a clustering that was stopped"


# in this order: labels are compared with the manifest
_CHECKS: dict[str, Callable[[_Folder], str]] = {
    MANIFEST_NAME: _check_shards,
    labels.RECORD_NAME: _check_labels,
    kmeans.RECORD_NAME: _check_centroids,
    features.RECORD_NAME: _check_features,
    progress.RECORD_NAME: _check_progress,
}
