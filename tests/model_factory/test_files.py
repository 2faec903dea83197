"""What decides something is bound: no changed byte is read as if it were as written."""

import json
import resource
import subprocess

import pytest

from model_factory.command_line.plain_text import in_html, in_markdown, printable
from model_factory.files import (
    CHECKSUMS_NAME,
    DamagedFile,
    check_checksums,
    is_plain_name,
    json_bytes,
    json_line,
    listing_of,
    parse_json,
    parse_json_line,
    read_json,
    stays_below,
    write_checksums,
    write_json,
)

CONTENT = {"count": 3, "mean": [0.5, -1e-9], "name": "Grüße", "nested": {"yes": True}}


def test_a_sealed_object_is_read_back_and_any_flipped_bit_is_found(tmp_path):
    path = tmp_path / "record.json"
    write_json(path, CONTENT)
    assert read_json(path, {"count": int, "mean": list}) == CONTENT
    written = path.read_bytes()
    for bit in range(8 * len(written)):
        flipped = bytearray(written)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(DamagedFile, match=r"record\.json"):
            read_json(path, {})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"other": int}, "has no 'other'"),
        ({"name": int}, "'name' is 'Grüße', expected int"),
        ({"nested": (list, str)}, "expected list or str"),
    ],
)
def test_a_field_that_is_absent_or_of_another_type_is_named(tmp_path, fields, said):
    write_json(tmp_path / "record.json", CONTENT)
    with pytest.raises(DamagedFile, match=said):
        read_json(tmp_path / "record.json", fields)


def test_true_is_no_number(tmp_path):
    write_json(tmp_path / "record.json", {"num_classes": True})
    with pytest.raises(DamagedFile, match="num_classes"):
        read_json(tmp_path / "record.json", {"num_classes": int})


def test_numbers_that_json_does_not_have_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "record.json", {"mean": float("nan")})
    assert not (tmp_path / "record.json").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"counts": [{9: 1, 10: 2}]}, "a key of JSON is text, not 9"),
        ({"count": 1, "digest": "mine"}, "key of the seal"),
    ],
)
def test_what_would_not_be_read_back_is_not_written(tmp_path, content, said):
    with pytest.raises(ValueError, match=said):
        write_json(tmp_path / "record.json", content)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", ["NaN", "1e999", "-Infinity", "[" * 900 + "]" * 900])
def test_what_is_parsed_and_never_written_counts_as_changed(tmp_path, number):
    (tmp_path / "record.json").write_text(f'{{"digest": "0", "mean": {number}}}')
    with pytest.raises(DamagedFile, match=r"record\.json"):
        read_json(tmp_path / "record.json", {})


def test_a_record_on_one_line_is_sealed_alike(tmp_path):
    path = tmp_path / "record.json"
    path.write_bytes(json_bytes(CONTENT, indent=None))
    assert path.read_bytes().count(b"\n") == 0
    assert read_json(path, {"count": int}) == CONTENT
    path.write_bytes(path.read_bytes().replace(b'"count": 3', b'"count": 4'))
    with pytest.raises(DamagedFile, match="changed"):
        read_json(path, {})


def test_a_write_that_fails_names_its_file_and_leaves_the_old_one(tmp_path):
    path = tmp_path / "record.json"
    write_json(path, CONTENT)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match="too large") as error:
            write_json(path, {**CONTENT, "more": "x" * 200})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.filename == str(path)
    assert read_json(path, {}) == CONTENT and list(tmp_path.iterdir()) == [path]


def test_a_write_that_cannot_begin_or_end_names_its_file_and_not_the_temporary_one(tmp_path):
    absent = tmp_path / "absent" / "record.json"
    (tmp_path / "folder.json").mkdir()
    for path in (absent, tmp_path / "folder.json"):
        with pytest.raises(OSError, match=r"[^.]\w+\.json'$") as error:
            write_json(path, CONTENT)
        assert error.value.filename == str(path) and ".tmp" not in str(error.value)


@pytest.mark.parametrize("name", ["a/b", "../a", "", "/a", ".", 3, None])
def test_only_a_name_without_a_folder_is_plain(name):
    assert is_plain_name("video-000001") and not is_plain_name(name)


@pytest.mark.parametrize(
    "data",
    [b"[" * 100_000, b'{"a": 1, "a": 2}', b"\xff\xfe{}", b"[]", b"", b'{"a": "%s"}' % (b"x" * 100)],
    ids=["deep", "a key twice", "no UTF-8", "a list", "empty", "too long"],
)
def test_hostile_json_is_an_error_that_names_the_file(data):
    with pytest.raises(DamagedFile, match="somewhere"):
        parse_json(data, name="somewhere", max_bytes=100 if len(data) < 200 else 1 << 20)


def test_a_changed_line_is_found_and_one_of_an_older_version_is_read():
    line = json_line(CONTENT)
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    assert parse_json_line(line, "line 1") == CONTENT
    assert parse_json_line(json.dumps(CONTENT).encode(), "line 1") == CONTENT
    for bit in range(8 * (len(line) - 1)):
        flipped = bytearray(line)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            found = parse_json_line(bytes(flipped), "line 1")
        except DamagedFile:
            continue
        # a bit of the key `digest` itself: the line looks older, and says the same
        assert {key: found[key] for key in CONTENT} == CONTENT


def test_checksums_find_what_changed_is_absent_or_was_added_and_sha256sum_reads_them(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.bin", "sub/b c.bin"):
        (tmp_path / name).write_bytes(name.encode())
    assert not check_checksums(tmp_path), "there is no list yet"
    write_checksums(tmp_path)
    assert check_checksums(tmp_path)
    command = ["sha256sum", "--check", "--strict", "--quiet", CHECKSUMS_NAME]
    assert subprocess.run(command, cwd=tmp_path).returncode == 0
    (tmp_path / "foreign.bin").write_bytes(b"")
    with pytest.raises(DamagedFile, match="foreign.bin is not listed"):
        check_checksums(tmp_path, names=["a.bin", "foreign.bin"])
    (tmp_path / "a.bin").write_bytes(b"A.bin")
    (tmp_path / "sub" / "b c.bin").unlink()
    assert_said = r"a\.bin changed .*; sub/b c\.bin is listed there and absent"
    with pytest.raises(DamagedFile, match=assert_said):
        check_checksums(tmp_path)


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "", ".", "a\0b", "..\\x"])
def test_names_that_lead_out_of_a_folder_are_told(name):
    assert not stays_below(name)


def test_a_list_of_checksums_that_is_damaged_is_refused(tmp_path):
    (tmp_path / CHECKSUMS_NAME).write_text("0" * 63 + "  a.bin\n")
    with pytest.raises(DamagedFile, match="no line of sha256sum"):
        check_checksums(tmp_path)


def test_a_list_that_sha256sum_wrote_of_bytes_and_one_of_a_single_file_are_read(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"a")
    assert listing_of(tmp_path / "a.pt") == CHECKSUMS_NAME
    done = subprocess.run(["sha256sum", "--binary", "a.pt"], cwd=tmp_path, capture_output=True)
    (tmp_path / "a.pt.sha256").write_bytes(done.stdout)
    assert b" *a.pt" in done.stdout and listing_of(tmp_path / "a.pt") == "a.pt.sha256"
    assert check_checksums(tmp_path, ["a.pt"], listing="a.pt.sha256")
    (tmp_path / "a.pt").write_bytes(b"b")
    with pytest.raises(DamagedFile, match="a.pt changed .* remove a.pt.sha256"):
        check_checksums(tmp_path, ["a.pt"], listing="a.pt.sha256")


def test_a_list_that_would_be_refused_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="no file"):
        write_checksums(tmp_path)
    for name in ("a\\b", "a\nb"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ValueError, match="rename the file"):
            write_checksums(tmp_path)
        (tmp_path / name).unlink()
    assert not list(tmp_path.iterdir())


def test_other_spellings_of_a_name_in_a_list_are_the_same_file(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.pt").write_bytes(b"a")
    command = ["sha256sum", "./sub//a.pt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True)
    (tmp_path / CHECKSUMS_NAME).write_bytes(done.stdout)
    assert check_checksums(tmp_path, ["sub/a.pt"])
    (tmp_path / "sub" / "a.pt").write_bytes(b"b")
    with pytest.raises(DamagedFile, match=r"sub/a\.pt changed"):
        check_checksums(tmp_path, ["sub/a.pt"])


def test_a_list_that_cannot_be_read_is_no_missing_one(tmp_path):
    (tmp_path / CHECKSUMS_NAME).mkdir()
    with pytest.raises(IsADirectoryError):
        check_checksums(tmp_path)


def test_names_are_shown_as_typed_and_never_act():
    name = "a\x1b[2J|<b>\n\u202e*\udcff"
    assert printable(name) == r"a\x1b[2J|<b>\n\u202e*\udcff"
    assert in_markdown(name) == r"a\\x1b\[2J\|&lt;b&gt;\\n\\u202e\*\\udcff"
    assert in_html('"' + name) == r"&quot;a\x1b[2J|&lt;b&gt;\n\u202e*\udcff"
    assert printable("Grüße, 世界") == "Grüße, 世界"
