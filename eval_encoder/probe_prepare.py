"""Official split files -> the two lists a benchmark needs:
`python -m eval_encoder.probe_prepare ssv2 ...`.

Something-Something v2 ships something-something-v2-train.json, -validation.json and -labels.json
(with or without the prefix); a clip's class is its template with the brackets taken away. Videos
that are named but absent are counted and left out; nothing else is.
"""

import argparse
import csv
import json
import os
import sys
from pathlib import Path

VIDEO_SUFFIX = ".webm"


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m eval_encoder.probe_prepare", description=__doc__.split("\n")[0]
    )
    commands = parser.add_subparsers(dest="dataset", required=True)
    ssv2 = commands.add_parser("ssv2", help="Something-Something v2")
    ssv2.add_argument(
        "--annotations", type=Path, required=True, help="folder of the official JSON files"
    )
    ssv2.add_argument("--videos", type=Path, required=True, help="folder of the .webm files")
    ssv2.add_argument("--output", type=Path, required=True, help="DATA_ROOT/ssv2")
    return parser


def prepare_ssv2(annotations: Path, videos: Path, output: Path) -> dict[str, tuple[int, int]]:
    """Write ssv2_train_new.csv and ssv2_val_new.csv; returns split -> (listed, absent videos).

    Paths in the lists are relative to `output`. Raises ValueError for missing or unknown content.
    """
    classes = {name: int(index) for name, index in _read_json(annotations, "labels").items()}
    output.mkdir(parents=True, exist_ok=True)
    counts = {}
    for split, file in (("train", "train"), ("val", "validation")):
        rows, absent = [], 0
        for entry in _read_json(annotations, file):
            template = entry["template"].replace("[", "").replace("]", "")
            if template not in classes:
                raise ValueError(
                    f"clip {entry['id']}: template {template!r} is not in the labels file"
                )
            video = videos / f"{entry['id']}{VIDEO_SUFFIX}"
            if not video.is_file():
                absent += 1
                continue
            rows.append((os.path.relpath(video, output), classes[template]))
        with open(output / f"ssv2_{split}_new.csv", "w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows(rows)
        counts[split] = (len(rows), absent)
    return counts


def _read_json(annotations: Path, name: str):
    for candidate in (f"something-something-v2-{name}.json", f"{name}.json"):
        if (annotations / candidate).is_file():
            return json.loads((annotations / candidate).read_bytes())
    raise ValueError(
        f"{annotations} holds no something-something-v2-{name}.json: give the folder of the "
        "official files"
    )


def main(argv: list[str] | None = None) -> None:
    """Run one command; a user's mistake ends with its message."""
    args = build_parser().parse_args(argv)
    try:
        counts = prepare_ssv2(args.annotations, args.videos, args.output)
    except ValueError as error:
        sys.exit(f"error: {error}")
    for split, (listed, absent) in counts.items():
        print(f"{split}: {listed} videos listed, {absent} named but absent")


if __name__ == "__main__":
    main()
