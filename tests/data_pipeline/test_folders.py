"""What a folder or a list of a user's gives: every real file once, under a name of its own, in one
order; nothing hidden, no loop, and what is left out is said.
"""

import os
import zipfile
from pathlib import Path

import pytest
from forked import forked

import data_pipeline.folders as folders
from data_pipeline.errors import DataPipelineError
from data_pipeline.folders import files_below, is_hidden
from data_pipeline.shards.inputs import list_inputs


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def sources(*arguments, report=lambda line: None) -> list[str]:
    return [item.source for item in list_inputs(list(arguments), report)]


@pytest.mark.parametrize(
    "hidden",
    [
        ".ipynb_checkpoints/a-checkpoint.mp4",
        "b/@eaDir/a.mp4/SYNOVIDEO.jpg",
        "__MACOSX/b/._a.mp4",
        "b/$Recycle.Bin/a.mp4",
        ".Trashes/501/a.mp4",
        "lost+found/a.mp4",
        "b/c/._a.mp4",
        "b/Thumbs.db",
        ".DS_Store",
    ],
)
def test_hidden_and_system_entries_are_no_inputs_wherever_they_lie(tmp_path, hidden):
    folder = tmp_path / ".data" / "videos"  # hidden above the folder that was named: its own affair
    touch(folder, "b/a.mp4", hidden)
    said = []
    assert sources(folder, report=said.append) == ["b/a.mp4"]
    assert is_hidden(hidden) and len(said) == 1 and "1 hidden or system files" in said[0]


def test_link_loops_are_left_out_and_reported_and_every_real_folder_is_read_once(tmp_path):
    folder = tmp_path / "v"
    touch(folder, "a/1.mp4", "b/2.mp4")
    touch(tmp_path, "other/3.mp4", "other/deep/4.mp4")
    (folder / "self.mp4").symlink_to("self.mp4")
    (folder / "up").symlink_to("..")
    (folder / "a" / "up2").symlink_to("../..")
    (folder / "a" / "here").symlink_to(".")
    (folder / "a" / "to_b").symlink_to("../b")
    (folder / "b" / "to_a").symlink_to("../a")
    (folder / "gone.mp4").symlink_to("nowhere.mp4")
    (folder / "out").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "back").symlink_to(folder)
    said = []
    assert sources(folder, report=said.append) == ["a/1.mp4", "b/2.mp4"]
    found = " ".join(said)
    assert "1 links lead out" in found and "4 links of" in found and "a/here first" in found
    assert "1 links of" in found and "gone.mp4" in found
    assert "2 links of" in found and "read anyway" in found
    everything = files_below(folder, said.append, leave_folder=True)
    assert everything == ["a/1.mp4", "b/2.mp4", "out/3.mp4", "out/deep/4.mp4"]


def test_a_folder_that_only_a_link_reaches_is_read(tmp_path):
    touch(tmp_path, "v/.store/a.mp4")
    (tmp_path / "v" / "shown").symlink_to(".store")
    assert sources(tmp_path / "v") == ["shown/a.mp4"]


def test_a_link_costs_one_look_however_many_there_are(tmp_path, monkeypatch):
    looks = []
    resolve = os.path.realpath
    monkeypatch.setattr(
        folders.os.path, "realpath", lambda path, **options: looks.append(path) or resolve(path)
    )
    touch(tmp_path, "other/a.mp4")
    (tmp_path / "v").mkdir()
    counts = []
    for number in range(200):
        (tmp_path / "v" / f"{number}.mp4").symlink_to(tmp_path / "other" / "a.mp4")
        if number in (99, 199):
            looks.clear()
            files_below(tmp_path / "v", report=lambda line: None)
            counts.append(len(looks))
    assert counts[1] - counts[0] == 100


def test_the_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    touch(tmp_path, "b/1.mp4", "a/2.mp4", "a.mp4", "a-b/3.mp4", "B/4.mp4")
    (tmp_path / "c").symlink_to("a")
    listing = os.scandir
    both = []
    for turned in (False, True):
        monkeypatch.setattr(
            folders.os,
            "scandir",
            lambda path, turned=turned: _Listing(sorted(listing(path), key=str, reverse=turned)),
        )
        both.append(files_below(tmp_path, report=lambda line: None))
    assert both[0] == both[1] == ["B/4.mp4", "a/2.mp4", "a-b/3.mp4", "a.mp4", "b/1.mp4"]


class _Listing(list):
    """A list that can be used as os.scandir's iterator."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    touch(tmp_path, "locked/a.mp4", "open/b.mp4")
    listing = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return listing(path)

    monkeypatch.setattr(folders.os, "scandir", refuse)
    said = []
    assert sources(tmp_path, report=said.append) == ["open/b.mp4"]
    assert "1 folders" in said[0] and "locked first" in said[0]


def test_inputs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    touch(tmp_path, "2019/v/x.mp4", "2020/v/x.mp4", "2020/v/y.mp4")
    a, b = tmp_path / "2019" / "v", tmp_path / "2020" / "v"
    said = []
    assert sources(a, b, report=said.append) == ["2019/v/x.mp4", "2020/v/x.mp4", "y.mp4"]
    assert len(said) == 1 and "2 inputs share a name" in said[0] and "2019/v/x.mp4" in said[0]
    assert sources(a / "x.mp4", b / "x.mp4") == ["2019/v/x.mp4", "2020/v/x.mp4"]
    for folder in (a, b):
        (folder / "list.csv").write_text("x.mp4,1\n")
    assert sources(a / "list.csv", b / "list.csv") == ["2019/v/x.mp4", "2020/v/x.mp4"]
    # a name made longer may not meet that of a third input
    touch(tmp_path, "more/2019/v/x.mp4")
    three = sources(a / "x.mp4", b / "x.mp4", tmp_path / "more")
    assert len(set(three)) == 3 and all(name.endswith("v/x.mp4") for name in three)


def test_names_that_do_not_collide_stay_as_they_are(tmp_path):
    touch(tmp_path, "a/x.mp4", "a/sub/x.mp4", "b/y.mp4")
    assert sources(tmp_path / "a", tmp_path / "b") == ["sub/x.mp4", "x.mp4", "y.mp4"]


def test_a_file_that_is_named_twice_is_packed_once(tmp_path, monkeypatch):
    touch(tmp_path, "a/x.mp4")
    monkeypatch.chdir(tmp_path)
    said = []
    (tmp_path / "link").symlink_to("a")
    assert sources("a", "a/x.mp4", tmp_path / "a", "link", report=said.append) == ["x.mp4"]
    assert "3 inputs are named more than once" in said[0]


@pytest.mark.parametrize("on_disk", ["amélie, 1.mp4".encode("latin-1"), "amélie, 1.mp4".encode()])
@pytest.mark.parametrize("suffix", [".txt", ".csv"])
def test_a_latin1_list_means_the_file_that_is_there(tmp_path, on_disk, suffix):
    with open(os.fsencode(tmp_path) + b"/" + on_disk, "wb") as stream:
        stream.write(b"x")
    line = "amélie, 1.mp4".encode("latin-1")
    cell = line if suffix == ".txt" else b'"' + line + b'",3'
    listed = tmp_path / f"list{suffix}"
    listed.write_bytes(cell + b"\n")
    assert sources(listed) == [os.fsdecode(on_disk)]


def test_a_list_in_bytes_that_name_nothing_is_an_error_with_file_and_line(tmp_path):
    touch(tmp_path, "a.mp4")
    listed = tmp_path / "list.txt"
    listed.write_bytes(b"a.mp4\n\nam\xe9lie.mp4\n")
    with pytest.raises(DataPipelineError, match=r"list.txt line 3: 'am\\udce9lie.mp4' is no UTF"):
        list_inputs([listed])
    listed.write_bytes(b"a.mp4\nb\0.mp4\n")
    with pytest.raises(DataPipelineError, match="list.txt line 2 holds a NUL byte"):
        list_inputs([listed])
    (tmp_path / "list.csv").write_text('a.mp4,1\n"b.mp4,2\n')
    with pytest.raises(DataPipelineError, match="list.csv line 2 is no CSV"):
        list_inputs([tmp_path / "list.csv"])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists_in_unicode_are_read(tmp_path, encoding):
    touch(tmp_path, "amélie.mp4", "b.mp4")
    (tmp_path / "list.txt").write_text("amélie.mp4\r\nb.mp4", encoding=encoding)
    assert sources(tmp_path / "list.txt") == ["amélie.mp4", "b.mp4"]


def test_packing_a_folder_with_a_loop_ends_without_a_traceback(tmp_path):
    touch(tmp_path, "d/no_video.mp4")
    (tmp_path / "d" / "self.mp4").symlink_to("self.mp4")
    command = ("-m", "data_pipeline", "pack", tmp_path / "d", "--output", tmp_path / "out")
    done = forked(*command, "--workers", 1, check=False)
    assert "Traceback" not in done.stderr and "1 links of" in done.stdout
    assert "rejected: 1 container" in done.stdout


def test_hidden_entries_of_a_remote_folder_are_no_inputs_either(tmp_path):
    pytest.importorskip("fsspec")
    archive = tmp_path / "clips.zip"
    with zipfile.ZipFile(archive, "w") as bundle:
        for name in ("v/b/a.mp4", "v/__MACOSX/b/._a.mp4", "v/.ipynb_checkpoints/a.mp4"):
            bundle.writestr(name, "x")
    assert sources(f"zip://v::file://{archive}") == ["b/a.mp4"]
