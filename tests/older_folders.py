"""Packed folders as packers wrote them before records and manifests had digests."""

import json
from pathlib import Path

from data_pipeline.shards.manifest import write_manifest
from model_factory.files import DIGEST_KEY


def unseal(folder: Path, without: tuple[str, ...] = ()) -> None:
    """Make a packed folder one of before; records lose the keys `without` too."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    records = []
    for entry in manifest["shards"]:
        path = folder / f"{entry['name']}.json"
        record = json.loads(path.read_bytes())
        for key in (DIGEST_KEY, *without):
            del record[key]
        path.write_bytes(json.dumps(record, sort_keys=True).encode())
        records.append(record)
    write_manifest(folder, records, manifest["settings"])
