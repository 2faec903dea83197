"""Every command as a newcomer calls it: a wrong path is one message, never a traceback.

CALLS is the list of all paths that commands take, ROUGH what a user may give there instead. All are
called in this process, as a process for each would take minutes.
"""

import argparse
import errno
import importlib
import json
import logging
import os
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, call, run
from forked import forked_ranks
from safetensors.torch import save_file

from model_factory.command_line.command import EXIT_CODES, message_of, outcome_of, run_command
from model_factory.command_line.reading import names_place, reading
from model_factory.files import DamagedFile, write_json

# a picture's first bytes and then nothing of one: no UTF-8, no JSON, no CSV, no tensors
GARBAGE = b"\x89PNG\r\n\x1a\n\x00\xff\xfe nothing \x80\x81" * 20
DEEP = b"[" * 200_000  # deeper than the JSON reader follows
INSIDE = (
    "manifest.json", "config.json", "labels.json", "labels.npy", "centroids.npy", "clusters.json",
    "results.jsonl", "record.json", "answers.jsonl", "parts.json", "mm_projector.bin", "train.csv",
    "val.csv", "classInd.txt", "trainlist01.txt", "testlist01.txt", "x_test_split1.txt",
    "train.json", "validation.json", "coco_pope_random.json", "pid_splits.json", "problems.json",
    "model.safetensors", "backbone.pt", "tokenizer.json", "preprocessor_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Call:
    """A command line with one BAD path: where a `kind` (file, folder, output) is expected."""

    module: str
    kind: str
    line: str

    def __str__(self) -> str:
        return f"{self.module} {self.line}"


DATA = "data_pipeline.__main__"
EVAL = "eval_encoder."
PROBE = f"{EVAL}attentive_probe"
SCORERS = f"{EVAL}lmm.scoring.scorers"
ANSWERS = f"{EVAL}lmm.scoring.answers"
PREPARE = f"{EVAL}probe.prepare"
CLOUD = "--features SET/centroids/train/features --output NEW/v.gif --steps 2 --samples 20"
SHORT = "--num_frames 2 --default_epoch 1 --head linear"
UNTRAINED = f"--data_root ROOT --model_weight random --model_name llava_vit_tiny_ln {SHORT}"
STAGE = "--model_name_or_path ABSENT --vision_tower ABSENT --output_dir NEW/o"
CALLS = [
    *(Call(DATA, "folder", line) for line in (
        "verify BAD",
        "stats BAD",
        "tempo NEW/t BAD --workers 1",
        "tempo NEW/t SET/clips --val BAD --workers 1",
        "view BAD --output NEW/s.png",
        "export BAD --output NEW/e",
        "features BAD --output NEW/f",
        "features SHARDS --output NEW/f --encoder BAD",
        "features SHARDS --output NEW/f --encoder clip:BAD",
        "cluster BAD --num-centroids 4 --output NEW/c",
        "cluster SHARDS --num-centroids 4 --output NEW/c --init BAD",
        "label BAD --centroids SET/centroids/train --output NEW/l",
        "label SHARDS --centroids BAD --output NEW/l",
        "browse BAD --output NEW/b.png",
        "browse SHARDS --labels BAD --output NEW/b.png",
    )),
    *(Call(DATA, "file", line) for line in (
        "label SHARDS --from BAD.npy --num-classes 4 --output NEW/l",
        "label SHARDS --from BAD.jsonl --num-classes 4 --output NEW/l",
        "browse SHARDS --truth BAD --output NEW/b.png",
    )),
    *(Call(DATA, "output", line) for line in (
        "pack SET/clips --workers 1 --output BAD",
        "motion-shapes BAD --num-train 8 --num-val 8 --workers 1",
        "brief-events BAD --num-train 8 --num-val 8 --workers 1",
        "tempo BAD SET/clips --num-train 6 --num-val 6 --workers 1",
        "view SHARDS --output BAD/s.png",
        "export SHARDS --output BAD",
        "features SHARDS --output BAD",
        "cluster SHARDS --num-centroids 4 --output BAD",
        "label SHARDS --centroids SET/centroids/train --output BAD",
        "browse SHARDS --output BAD/b.png",
    )),
    Call(f"{EVAL}probe.compare", "folder", "compare BAD --output NEW/c"),
    Call(f"{EVAL}probe.report", "folder", "BAD --shards SHARDS"),
    Call(f"{EVAL}probe.report", "folder", "NEW --shards BAD"),
    Call(PREPARE, "folder", "ssv2 --videos SET/clips --output NEW/o --annotations BAD"),
    Call(PREPARE, "folder", "ucf101 --videos SET/clips --output NEW/o --splits BAD"),
    Call(PREPARE, "folder", "hmdb51 --videos SET/clips --output NEW/o --splits BAD"),
    Call(PREPARE, "file", "kinetics --videos SET/clips --output NEW/o --train BAD --val BAD"),
    Call(f"{EVAL}visualize_clusters", "folder",
         "--features BAD --shards SHARDS --output NEW/v.gif --steps 2"),
    Call(f"{EVAL}visualize_clusters", "folder", f"{CLOUD} --shards BAD"),
    Call(f"{EVAL}visualize_clusters", "file", f"{CLOUD} --shards SHARDS --truth BAD"),
    Call(PROBE, "folder", f"--dataset BAD --output NEW/o {UNTRAINED}"),
    Call(PROBE, "file", f"--dataset SET --train_data_csv_path BAD --output NEW/o {UNTRAINED}"),
    Call(PROBE, "folder",
         f"--dataset motion_shapes --data_root ROOT --model_weight BAD --output NEW/o {SHORT}"),
    Call(PROBE, "folder", "--dataset motion_shapes --data_root ROOT --model_family clip "
         f"--model_weight BAD --output NEW/o {SHORT}"),
    Call(PROBE, "output", f"--dataset motion_shapes --output BAD {UNTRAINED}"),
    Call(f"{EVAL}lmm.demo.tiny", "file", "BAD --output NEW/o"),
    Call(f"{EVAL}lmm.demo.tiny", "output", "NEW/list.json --output BAD"),
    Call(f"{EVAL}lmm.demo.question_set", "output", "--output BAD --num_train 40 --num_val 192"),
    Call(f"{EVAL}lmm.scoring.table", "folder", "a=BAD --labels NEW/labels.jsonl"),
    Call(f"{EVAL}lmm.scoring.table", "file", "a=NEW/model --labels BAD"),
    *(Call(SCORERS, "folder", f"{name} --answers NEW/answers.jsonl --annotations BAD")
      for name in ("pope", "sqa", "mme")),
    *(Call(SCORERS, "file", f"{name} --answers NEW/answers.jsonl --annotations BAD")
      for name in ("textvqa", "seed")),
    Call(SCORERS, "file", "gqa --answers BAD --annotations NEW/gqa.json"),
    *(Call(ANSWERS, "file", f"{name} --answers NEW/answers.jsonl --questions BAD "
           f"--output NEW/o{'.tsv' if name == 'mmbench' else ''}")
      for name in ("vqav2", "vizwiz", "mmbench", "mmvet", "llavabench")),
    Call(ANSWERS, "file",
         "mmvet --answers BAD --questions NEW/questions.jsonl --output NEW/o"),
    Call(f"{EVAL}lmm.questions", "file", "--model ABSENT --questions BAD --answers NEW/a.jsonl"),
    Call(f"{EVAL}lmm.questions", "folder",
         "--model BAD --questions NEW/questions.jsonl --answers NEW/a.jsonl"),
    Call(f"{EVAL}lmm.chat", "folder", "--model BAD --question x"),
    Call(f"{EVAL}lmm_probe", "file", f"{STAGE} --image_folder NEW --data_path BAD"),
    Call(f"{EVAL}lmm_probe", "folder", f"{STAGE} --data_path NEW/seen.json --image_folder BAD"),
    Call(f"{EVAL}lmm_probe", "folder", "--data_path NEW/list.json --image_folder NEW --output_dir "
         "NEW/o --vision_tower ABSENT --model_name_or_path BAD"),
    Call("model_factory.convert_llava_vit_packing_to_hf", "file",
         "llava_vit_tiny_ln BAD --output_dir NEW/o"),
    Call("model_factory.export_llava_tower", "folder", "BAD --output_dir NEW/o"),
    Call("model_factory.export_llava_tower", "file", "BAD.pt --output_dir NEW/o"),
    Call("model_factory.llava.tower_check", "folder", "BAD NEW/reference.safetensors"),
    Call("training.export", "folder", "BAD --output NEW/o"),
    Call("training.doctor", "output", "--output BAD"),
    Call("training.train_univit", "folder",
         "--list_datasets BAD --output NEW/o --model_name llava_vit_tiny_ln"),
    Call("training.train_univit", "folder", "--preset debug --init_backbone BAD --output NEW/o"),
    Call("training.train_univit", "folder", "--preset debug --resume BAD --output NEW/o"),
    Call("training.train_univit", "file",
         "--preset debug --list_init_partial_fc_paths BAD --output NEW/o"),
    Call("training.train_univit", "output", "--preset debug --output BAD"),
]  # fmt: skip
ROUGH = {
    "file": ("absent", "folder", "empty", "garbage", "deep", "array"),
    "folder": ("absent", "file", "empty folder", "garbage inside", "objects inside", "loop"),
    "output": ("file", "below a file"),
}


def given(path: Path, kind: str) -> Path:
    """What stands at a path; returns what the command is told."""
    if kind == "folder" or kind == "empty folder":
        path.mkdir()
    elif kind.endswith("inside"):
        path.mkdir()
        for name in INSIDE:
            (path / name).write_bytes(GARBAGE if kind.startswith("garbage") else b"{}")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind != "absent":
        contents = {"empty": b"", "deep": DEEP, "array": b"[]\n"}
        path.write_bytes(contents.get(kind, GARBAGE))
    return path / "below" if kind == "below a file" else path


def bytes_below(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(file): file.read_bytes() for file in files}


@pytest.fixture
def new(tmp_path) -> Path:
    """A folder with small sound files of each kind."""
    folder = tmp_path / "new"
    (folder / "model").mkdir(parents=True)
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Nothing."}]
    sample = {"id": "a", "conversations": turns}
    (folder / "list.json").write_text(json.dumps([sample]))
    (folder / "seen.json").write_text(json.dumps([{**sample, "image": "gone.png"}]))
    answer = {"question_id": 1, "prompt": "p", "text": "t", "answer_id": "x", "model_id": "m"}
    record = {"tokens_per_picture": 1, "parameters": 2, "learning": 1, "seconds": 3.0}
    texts = {
        "answers.jsonl": json.dumps({**answer, "metadata": {}}) + "\n",
        "questions.jsonl": json.dumps({"question_id": 1, "text": "p"}) + "\n",
        "labels.jsonl": json.dumps({"question_id": 1, "label": "t", "category": "c"}) + "\n",
        "gqa.json": json.dumps({"1": {"answer": "t"}}),
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    write_json(folder / "model" / "record.json", {**record, "arguments": {"blind": False}})
    numbers = {"pixel_values": torch.zeros(1, 3, 8, 8), "features": torch.zeros(1, 1, 4)}
    save_file(numbers, folder / "reference.safetensors")
    (folder / "model" / "answers.jsonl").write_text(texts["answers.jsonl"])
    return folder


@pytest.fixture
def alone(monkeypatch):
    """Give back what commands change in their process: signals, log, process group, variables."""
    logger = logging.getLogger("univit")
    kept = list(logger.handlers), logger.propagate, logger.level
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    handlers = {number: signal.getsignal(number) for number in numbers}
    threads = torch.get_num_threads()
    monkeypatch.setattr(os, "environ", os.environ.copy())
    # libraries' handlers write to the standard error of the test that imported them
    monkeypatch.setattr(logging, "raiseExceptions", False)

    def restore():
        signal.set_wakeup_fd(-1)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        logger.handlers[:] = []
        if dist.is_initialized():
            dist.destroy_process_group()

    logger.handlers[:] = []
    yield restore
    restore()
    logger.handlers[:], logger.propagate, logger.level = kept
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", CALLS, ids=str)
def test_a_wrong_path_ends_with_its_name_and_changes_nothing(
    case, packed, new, alone, tmp_path, capsys
):
    main = importlib.import_module(case.module).main
    for rough in ROUGH[case.kind]:
        name = f"bad_{rough.replace(' ', '_')}"
        suffix = next((part[3:] for part in case.line.split() if part.startswith("BAD.")), "")
        path = given(tmp_path / f"{name}{suffix}", rough)
        before = bytes_below(tmp_path / f"{name}{suffix}")
        fresh = shutil.copytree(new, tmp_path / f"new {rough}".replace(" ", "_"))
        words = case.line.replace(f"BAD{suffix}", str(path)).replace("NEW", str(fresh))
        words = words.replace("SHARDS", str(packed / "train")).replace("SET", str(packed))
        words = words.replace("ROOT", str(packed.parent)).replace("ABSENT", str(tmp_path / "no"))
        capsys.readouterr()
        try:
            code = main(words.split())
        except SystemExit as end:  # a rank of a training ends from inside
            code = end.code
        out, err = capsys.readouterr()
        alone()
        assert "Traceback" not in err and "a fault of univit" not in err, (rough, err)
        assert code in (1, EXIT_CODES["bad checkpoint"], EXIT_CODES["storage"]), (rough, out, err)
        assert name in err or name in out, (rough, "the message names no path", err)
        assert bytes_below(tmp_path / f"{name}{suffix}") == before, f"{rough} was changed"


def test_every_command_is_called_here():
    """A new file with a main is a new command: its paths belong into CALLS."""
    mains = {
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        for package in ("model_factory", "data_pipeline", "training", "eval_encoder")
        for path in (ROOT / package).rglob("*.py")
        if "\ndef main(" in path.read_text()
    }
    # the page has lmm_chat's paths and needs gradio; lmms-eval has a command line of its own
    apart = {"eval_encoder.lmm.web.page", "eval_encoder.lmm.scoring.lmms_eval"}
    assert mains == {case.module for case in CALLS} | apart
    thin = [path.read_text() for path in (ROOT / "eval_encoder").glob("*.py")]
    for name in mains:
        text = (ROOT / (name.replace(".", "/") + ".py")).read_text()
        callers = [caller for caller in thin if f"from {name} import" in caller]
        assert "run_command(" in text, name
        assert any("sys.exit(" in part for part in (text, *callers)), name


def ended(error: BaseException, capsys, **args) -> tuple[int, str]:
    """(exit code, what is said) of a command whose work raises an error."""

    def work(_):
        raise error

    code = run_command(parse=lambda argv: argparse.Namespace(**args), work=work)
    return code, capsys.readouterr().err


def test_each_kind_of_end_has_its_code_and_one_line(capsys):
    full = OSError(errno.ENOSPC, "No space left on device")
    denied = PermissionError(errno.EACCES, "Permission denied", "/data/a")
    assert ended(ValueError("--lr 0"), capsys) == (1, "error: --lr 0\n")
    assert ended(denied, capsys) == (1, "error: /data/a: Permission denied\n")
    assert ended(full, capsys, output="OUT") == (8, "error: OUT: No space left on device\n")
    assert ended(MemoryError(), capsys)[0] == 10
    assert ended(torch.OutOfMemoryError("CUDA out of memory"), capsys)[0] == 10
    assert ended(KeyboardInterrupt(), capsys) == (130, "stopped by SIGINT\n")
    missing = ModuleNotFoundError("No module named 'peft'", name="peft")
    assert ended(missing, capsys) == (
        1, "error: No module named 'peft': install the package that brings it\n",
    )  # fmt: skip
    assert ended(OSError("several\n   lines of a library"), capsys)[1] == (
        "error: several lines of a library\n"
    )


def test_errors_of_ours_have_the_codes_of_a_run_in_every_command(capsys):
    from data_pipeline.errors import BudgetExceeded, DataTimeout
    from training.errors import (
        BadCheckpoint,
        ConfigMismatch,
        NonFiniteLoss,
        PeerFailed,
        StorageError,
    )

    codes = {BudgetExceeded: 4, NonFiniteLoss: 5, BadCheckpoint: 6, ConfigMismatch: 7}
    codes |= {DataTimeout: 8, StorageError: 8, PeerFailed: 9}
    for kind, code in codes.items():
        assert ended(kind("said"), capsys) == (code, "error: said\n")


def test_a_fault_of_ours_shows_its_traceback_and_where_the_record_is(capsys):
    code, said = ended(KeyError("colour"), capsys, output="OUT")
    lines = said.splitlines()
    assert code == 1 and lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith("error: KeyError: 'colour': a fault of univit's own")
    assert lines[-1].endswith("what is on record lies in OUT")
    own = ModuleNotFoundError("No module named 'training.gone'", name="training.gone")
    assert "Traceback" in ended(own, capsys)[1]


def test_the_traceback_of_a_mistake_is_shown_on_demand(capsys, monkeypatch):
    monkeypatch.setenv("UNIVIT_TRACEBACK", "1")
    code, said = ended(ValueError("--lr 0"), capsys)
    assert code == 1 and said.startswith("Traceback") and said.endswith("\nerror: --lr 0\n")


def test_names_in_messages_cannot_act_on_a_terminal(capsys):
    hostile = "a\x1b[2J\u202eb.mp4"
    _, said = ended(ValueError(f"{hostile} is damaged\n  repair it"), capsys)
    assert said == "error: a\\x1b[2J\\u202eb.mp4 is damaged\n  repair it\n"
    gone = FileNotFoundError(errno.ENOENT, "No such file or directory", f"{hostile}\nerror: x")
    assert message_of(gone) == "a\\x1b[2J\\u202eb.mp4\\nerror: x: No such file or directory"
    assert "\x1b" not in ended(KeyError(hostile), capsys)[1]


PRINTS = (
    "import os, sys\n"
    "from model_factory.command_line.command import run_command\n"
    "reader, writer = os.pipe()\n"
    "os.close(reader)\n"
    "os.dup2(writer if sys.argv[1] == 'closed' else os.open('/dev/full', os.O_WRONLY), 1)\n"
    "lines = 'line\\n' * int(sys.argv[2])\n"
    "sys.exit(run_command(parse=lambda argv: None, work=lambda args: print(lines)))"
)


# less and more than what is buffered until the end
@pytest.mark.parametrize("count", [1, 100_000])
def test_output_that_nobody_reads_on_ends_a_command_quietly(count):
    done = run("-c", PRINTS, "closed", count, check=False)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("count", [1, 100_000])
def test_a_full_standard_output_is_named(count):
    done = run("-c", PRINTS, "full", count, check=False)
    said = "error: standard output: No space left on device\n"
    assert (done.returncode, done.stderr) == (EXIT_CODES["storage"], said)


@pytest.mark.dist
def test_ranks_say_what_they_all_would_say_once(tmp_path):
    flags = ("--dataset", "motion_shapes", "--data_root", tmp_path / "nowhere")
    done = forked_ranks(2, "eval_encoder/attentive_probe.py", *flags, check=False)
    assert done.returncode == 1 and done.stderr.count("error: benchmark motion_shapes") == 1


def test_reading_names_the_place_and_lets_messages_of_ours_pass(tmp_path):
    file = tmp_path / "x.json"
    file.write_bytes(GARBAGE)

    @names_place("path")
    def read(path, parse):
        return parse(path)

    with pytest.raises(DamagedFile, match=f"^{file} cannot be read .UnicodeDecodeError"):
        read(file, parse=lambda path: path.read_text(encoding="utf-8"))
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "absent", parse=lambda path: path.read_bytes())
    with pytest.raises(MemoryError), reading(file):
        raise MemoryError
    from model_factory.registry import packing_name

    with pytest.raises(ValueError) as error, reading(file):
        packing_name("no_such_model")
    assert type(error.value) is ValueError and str(file) not in str(error.value)
    assert outcome_of(error.value) == "error"


def test_answers_go_to_no_file_of_something_else(tmp_path):
    from eval_encoder.lmm import questions as lmm_eval

    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "text": "?"}\n')
    words = ("--model", tmp_path / "m", "--questions", tmp_path / "q.jsonl", "--answers")
    for content in (GARBAGE, b"notes without an end", b'{"question_id": 1}\n', b"[]\n", DEEP):
        answers = tmp_path / "answers.jsonl"
        answers.write_bytes(content)
        with pytest.raises(SystemExit, match="error: .*answers.jsonl"):
            call(lmm_eval.main, *words, answers)
        assert answers.read_bytes() == content


class NeverLoaded:
    """Fails the test where any weights are asked for."""

    def __call__(self, *args, **kwargs):
        raise AssertionError("weights are loaded before the list is known to be sound")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--data_path ABSENT --image_folder NEW", "no does not exist"),
        ("--data_path NEW/list.json --image_folder ABSENT", "is no folder"),
        ("--data_path NEW/list.json --image_folder NEW --version plain", "'a': 2 turns and 0"),
        ("--data_path NEW/list.json --image_folder NEW --version v9", "choose one of plain"),
        ("--data_path NEW/list.json --image_folder NEW --data_fraction 0.1", "is none"),
        ("--data_path NEW/seen.json --image_folder NEW", "1 of 1 pictures and clips"),
    ],
)
def test_a_stage_checks_its_data_before_it_looks_for_weights(
    line, message, new, alone, tmp_path, monkeypatch, capsys
):
    """The models are absent too; what is said is about the data."""
    from eval_encoder import lmm_probe
    from eval_encoder.lmm.model import open as lmm_open

    monkeypatch.setattr(lmm_open, "compose", NeverLoaded())
    words = f"{STAGE} {line}".replace("ABSENT", str(tmp_path / "no")).replace("NEW", str(new))
    with pytest.raises(SystemExit, match=message):
        call(lmm_probe.main, *words.split())


def test_a_wrong_list_ends_before_torch_is_imported(tmp_path):
    words = f"{STAGE} --data_path ABSENT".replace("ABSENT", str(tmp_path / "no"))
    words = words.replace("NEW", str(tmp_path))
    done = run("-X", "importtime", "eval_encoder/lmm_probe.py", *words.split(), check=False)
    assert done.returncode == 1 and "no does not exist" in done.stderr
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "numpy", "transformers"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--report_to wandb", "--report_to wandb needs .* pip install wandb, or give"),
        ("--report_to comet_ml", "--report_to comet_ml needs .* pip install comet-ml"),
        ("--report_to tensorboard", "pip install tensorboard"),
        ("--report_to paper", "--report_to paper: choose among .*wandb"),
    ],
)
def test_a_report_that_cannot_be_made_is_refused_before_weights_are_loaded(
    flags, message, new, alone, tmp_path, monkeypatch
):
    from transformers.integrations import integration_utils

    from eval_encoder import lmm_probe
    from eval_encoder.lmm.model import open as lmm_open

    for name in ("wandb", "comet_ml", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: False)
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    monkeypatch.setattr(integration_utils, "is_comet_available", lambda: False)
    monkeypatch.setattr(lmm_open, "compose", NeverLoaded())
    words = f"{STAGE} --data_path NEW/list.json --image_folder NEW {flags}"
    words = words.replace("ABSENT", str(tmp_path / "no")).replace("NEW", str(new))
    with pytest.raises(SystemExit, match=message):
        call(lmm_probe.main, *words.split())
