"""launch/train.sh: refusals in one line, help, signals, and who holds --out."""

import inspect
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from processes import assert_nothing_left
from small_run import INTERVALS, REPOSITORY, SMALL, steps_done, wait_for_steps, workers_of

from options import DESCRIPTION, parse_args
from out_folder import hold_folder

TRAIN = str(REPOSITORY / "launch" / "train.sh")


def start_train(*options: str, **variables: str) -> subprocess.Popen[str]:
    """Start launch/train.sh on CPUs with the current environment, as a new session."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"SKIP_INSTALL": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        ["bash", TRAIN, *options],
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run_train(*options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    process = start_train(*options, **variables)
    out, err = process.communicate(timeout=100)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.mark.parametrize(
    ("options", "variables", "reason"),
    [
        (["--steps", "0"], {}, "train.sh: error: --steps must be positive, got 0"),
        (["--stepz", "1"], {}, "train.sh: error: unrecognized arguments: --stepz 1"),
        (["--data", ""], {}, "train.sh: error: argument --data: must be a path, got an empty one"),
        ([], {"SKIP_INSTALL": "yes"}, "error: SKIP_INSTALL must be 0 or 1, got yes"),
    ],
)
def test_refused_before_processes_start(
    options: list[str], variables: dict[str, str], reason: str, tmp_path: Path
) -> None:
    ended = run_train("--out", str(tmp_path / "out"), *options, **variables)
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", f"{reason}\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("NPROC_PER_NODE", "many", "must be a positive number, got many"),
        ("OMP_NUM_THREADS", "-1", "must be a positive number, got -1"),
        ("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "soon", "must be a positive number, got soon"),
        ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "true", "must be 0 or 1, got true"),
        ("TORCHRUN_ARGS", "--nnodez 2", "got '--nnodez 2': unrecognized arguments: --nnodez"),
        ("TORCHRUN_ARGS", "'", 'must be options of torchrun, got "\'": No closing quotation'),
        ("TORCHRUN_ARGS", "it.py", "got 'it.py': a script is among them"),
    ],
)
def test_variable_with_a_wrong_value(
    name: str, value: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from start import prepare_environment

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    assert prepare_environment().options == ["--standalone"]
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"^{name} .*{re.escape(reason)}"):
        prepare_environment()


def test_other_errors_before_processes_start_keep_their_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import start

    def failing(error: Exception) -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["launch/start.py"])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(start, "prepare_environment", lambda: failing(RuntimeError("of torch")))
    with pytest.raises(RuntimeError, match="of torch"):
        start.main()
    monkeypatch.setattr(start, "prepare_environment", lambda: failing(ValueError("refused")))
    with pytest.raises(SystemExit):
        start.main()
    assert capsys.readouterr().err == "train.sh: error: refused\n"


@pytest.mark.parametrize(
    "name", ["FLASH_MOE_STRICT_INDICES", "FLASH_MOE_PEER_MEMORY", "TRITON_INTERPRET"]
)
def test_switch_with_a_wrong_value(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from flash_moe import triton_flash_expert_func
    from flash_moe_dist import ExpertParallel

    def use_it() -> None:
        ExpertParallel()
        inputs = torch.randn(2, 4), torch.randn(5, 4), torch.randn(5, 4)
        triton_flash_expert_func(*inputs, torch.tensor([[0], [1]]), torch.rand(2, 1))

    monkeypatch.setenv(name, "yes")
    with pytest.raises(ValueError, match=f"{name} must be 0 or 1, got 'yes'"):
        use_it()


@pytest.mark.parametrize("script", ["train", "bench_scaling"])
def test_started_without_torchrun(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import bench_scaling
    import train

    main = {"train": train.main, "bench_scaling": bench_scaling.main}[script]
    monkeypatch.setattr(sys, "argv", [f"launch/{script}.py"])
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit) as ended:
        inspect.unwrap(main)()
    assert ended.value.code == 2
    assert re.fullmatch(
        r"\w+\.(sh|py): error: environment variables WORLD_SIZE, LOCAL_RANK are not set: start "
        rf"this with torchrun, for example torchrun .* launch/{script}\.py\n",
        capsys.readouterr().err,
    )


@pytest.mark.parametrize(
    ("error", "line"), [(ValueError("two\nlines"), "two\nlines"), (OSError(), "OSError")]
)
@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_refused_inside_is_printed_once(
    rank: int,
    error: Exception,
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from errors import exit_on_shared_error
    from flash_moe_dist.agreement import same_error_on_all_ranks

    monkeypatch.setattr("flash_moe_dist.runtime.leave_group", lambda: None)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    runtime: Any = SimpleNamespace(is_main=rank == 0)

    def fail() -> None:
        with exit_on_shared_error("it.py", runtime), same_error_on_all_ranks():
            raise error

    def status() -> object:
        with pytest.raises(SystemExit) as ended:
            fail()
        return ended.value.code

    assert status() == 2
    assert capsys.readouterr().err == ("" if rank else f"it.py: error: {line}\n")
    handed_over = tmp_path / "refusal"
    handed_over.touch()
    monkeypatch.setenv("FLASH_MOE_REFUSAL_FILE", str(handed_over))
    assert status() == 0
    assert handed_over.read_text() == ("" if rank else line)
    assert capsys.readouterr().err == ""


def test_options_are_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    from flash_moe.bench.__main__ import parse as parse_bench
    from scaling.arguments import parse as parse_scaling

    with pytest.raises(ValueError, match="unrecognized arguments: --step 1"):
        parse_args(DESCRIPTION, ["--step", "1"])
    with pytest.raises(ValueError, match="unrecognized arguments: --repeat 3"):
        parse_scaling("", ["--repeat", "3"], False, 2)
    with pytest.raises(SystemExit):
        parse_bench(["--repeat", "3"])
    assert "unrecognized arguments: --repeat 3" in capsys.readouterr().err


def test_help_has_a_text_and_a_default_for_every_option(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from comparison.arguments import parse as parse_comparison
    from flash_moe.bench.__main__ import parse as parse_bench
    from scaling.arguments import parse as parse_scaling
    from table_optimizers.arguments import parse as parse_table_optimizers

    parsers = (
        lambda: parse_args(DESCRIPTION, ["--help"]),
        lambda: parse_scaling("", ["--help"], False, 2),
        lambda: parse_comparison("", ["--help"]),
        lambda: parse_table_optimizers("", ["--help"], False),
        lambda: parse_bench(["--help"]),
    )
    for parse in parsers:
        with pytest.raises(SystemExit):
            parse()
        listed = capsys.readouterr().out.partition("options:\n")[2]
        entries = re.split(r"\n  (?=--)", listed)[1:]
        assert len(entries) >= 8
        for entry in entries:
            assert "None" not in entry, entry
            assert re.search(r" {2}[a-z].*\w.*\(default:\s.*\)", entry, re.DOTALL), entry


def test_a_folder_is_held_by_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("out_folder.WAIT_SECONDS", 0.2)
    out = tmp_path / "new" / "out"
    assert hold_folder(out, create=False) is None
    assert not out.parent.exists()
    first = hold_folder(out, create=True)
    assert first is not None
    for create in (True, False):
        with pytest.raises(ValueError, match=f"is in use by process {os.getpid()} on "):
            hold_folder(out, create)
    first.close()
    code = f"from out_folder import *; held = hold_folder(Path({str(out)!r}), True); print(1)"
    holder = subprocess.Popen(
        [sys.executable, "-c", f"{code}; sys.stdout.flush(); time.sleep(100)"],
        cwd=REPOSITORY / "launch",
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    with pytest.raises(ValueError, match=f"is in use by process {holder.pid} on "):
        hold_folder(out, create=True)
    holder.kill()
    holder.communicate()
    again = hold_folder(out, create=False)
    assert again is not None
    # What launch/README.md advises where the lock of a dead process stays.
    (out / "lock").unlink()
    new = hold_folder(out, create=True)
    assert new is not None
    new.close()
    again.close()


def test_a_folder_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    held = hold_folder(tmp_path, create=True)
    assert held is not None
    held.close()
    assert "lock is not locked: [Errno 95]" in capsys.readouterr().err


def test_a_link_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    (tmp_path / "lock").symlink_to(tmp_path / "file")
    with pytest.raises(ValueError, match="--out must be a writable folder"):
        hold_folder(tmp_path, create=True)
    assert (tmp_path / "file").read_text() == "content"


def test_process_whose_parent_has_died_before() -> None:
    code = "from signals import *; end_with_torchrun(); print('trains')"
    for parent, status in ((os.getpid(), 0), (2**22 + 1, -signal.SIGKILL)):
        ended = subprocess.run(
            [sys.executable, "-c", code],
            cwd=REPOSITORY / "launch",
            env={"TORCHELASTIC_RUN_ID": "a", "FLASH_MOE_LAUNCHER_PID": str(parent)},
            capture_output=True,
            check=False,
        )
        assert ended.returncode == status, ended.stderr
        assert (b"trains" in ended.stdout) == (status == 0)


# A child asks for the signal, and its parent dies meanwhile, below a process that adopts the child.
CHILD = """
import os, signal, time
import signals
parent = os.getppid()
class Late:
    def prctl(self, *_):
        os.kill(parent, signal.SIGKILL)
        while os.getppid() == parent:
            time.sleep(0.01)
signals.ctypes.CDLL = lambda _: Late()
signals.end_with_torchrun()
print("trains")
"""
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
SUBREAPER = """
import ctypes, os, subprocess, sys
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
subprocess.run([sys.executable, "-c", *sys.argv[1:]])
print("status", os.waitpid(-1, 0)[1])
"""


def test_process_whose_parent_dies_below_a_subreaper() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", SUBREAPER, PARENT, CHILD],
        cwd=REPOSITORY / "launch",
        env={"TORCHELASTIC_RUN_ID": "a"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout == f"status {signal.SIGKILL.value}\n"


@pytest.mark.parametrize(
    ("parent", "killed"), [("the same", False), ("a subreaper", True), ("init", True)]
)
def test_ranks_of_ones_own_script_whose_parent_has_died(
    parent: str, killed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flash_moe_dist import runtime

    pids = {"the same": os.getppid(), "a subreaper": 2**22 + 1, "init": 1}
    sent: list[int] = []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    monkeypatch.setattr("ctypes.CDLL", lambda _: SimpleNamespace(prctl=lambda *_: None))
    monkeypatch.setattr("os.getppid", lambda: pids[parent])
    monkeypatch.setattr("os.kill", lambda _, number: sent.append(number))
    monkeypatch.setattr(runtime, "_is_python", lambda _: False)
    if parent == "init":
        # It was the parent by the time of the import.
        monkeypatch.setattr(runtime, "PARENT_AT_IMPORT", 1)
    runtime._end_with_torchrun()
    assert bool(sent) == killed


@pytest.mark.slow
def test_killed_while_processes_import(text: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start_train(*SMALL, "--steps", "100000", "--data", text, "--out", str(out))
    while not workers_of(process):
        assert process.poll() is None
    process.kill()
    process.communicate(timeout=10)
    assert_nothing_left(str(tmp_path))
    assert not out.exists()


@pytest.mark.slow
def test_ctrl_c_then_refusals_inside(text: str, tmp_path: Path) -> None:
    # No validation draws a plot.
    endless = ("--steps", "100000", "--validation-interval", "100000")
    options = (*SMALL, *INTERVALS, *endless, "--data", text, "--out", str(tmp_path))
    process = start_train(*options)
    wait_for_steps(tmp_path, 6, process)
    plot_of_the_start = (tmp_path / "loss.png").read_bytes()
    second = run_train(*options, "--resume", NPROC_PER_NODE="1")
    assert (second.returncode, process.poll()) == (2, None)
    assert re.search(
        r"^train\.sh: error: (rank 0: )?--out \S+ is in use by process \d+ on .*$",
        second.stderr.splitlines()[-1],
    )
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    last = steps_done(tmp_path)
    assert out.splitlines()[-1] == (
        f"SIGINT: ended after step {last} of 100000, with a checkpoint; --resume continues"
    )
    assert "Traceback" not in err
    assert "SignalException" not in err
    plot = (tmp_path / "loss.png").read_bytes()
    assert plot.startswith(b"\x89PNG")
    assert plot != plot_of_the_start
    assert (tmp_path / "checkpoints" / f"step-{last:08d}" / ".metadata").is_file()
    # Known to the processes only, and not to be tried again.
    refused = run_train(*options, NPROC_PER_NODE="1", TORCHRUN_ARGS="--standalone --max-restarts 2")
    assert refused.returncode == 2
    assert refused.stderr.splitlines() == [
        f"train.sh: error: --out {tmp_path} holds a checkpoint of step {last}: --resume continues "
        "from it, another --out starts a new run"
    ]
    assert steps_done(tmp_path) == last
