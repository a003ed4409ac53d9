"""Stop it anywhere, run the same command: the same bits."""

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from effnet_train.cli.app import PassingError
from effnet_train.data.loader import Batch
from effnet_train.distributed import PreemptionNotice
from effnet_train.engine.checkpoint import load_checkpoint
from effnet_train.engine.saving import Checkpoints
from effnet_train.engine.state import TrainState
from effnet_train.engine.train import Stepper

Train = Callable[..., Path]
VARYING = ("train/images_per_s", "train/data_wait")  # what depends on the clock


def state(folder: Path, step: int) -> dict[str, Any]:
    return without_provenance(folder / f"step_{step:09d}.pt")


def without_provenance(path: Path) -> dict[str, Any]:
    """Return a checkpoint without what differs from one command to another that does the same."""
    payload = load_checkpoint(path)
    del payload["provenance"]
    return payload


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in VARYING} for line in lines]


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return TensorBoard's numbers as its own reader finds them."""
    reader = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    tags = [tag for tag in reader.Tags()["scalars"] if tag not in VARYING]
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in tags}


def same(one: Any, other: Any) -> bool:
    """Compare nested plain values and tensors, bit for bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param((), id="paper"),
        pytest.param(("augment=autoaugment", "precision=bf16", "accumulate=2", "clip_norm=1.0"), id="bf16-accumulate"),
        pytest.param(
            ("mixing.mixup_alpha=0.2", "mixing.cutmix_alpha=1.0", "optim=sgd", "schedule=cosine"), id="mixing"
        ),
        pytest.param(("workers=2", "model.checkpointing=true", "precision=fp16"), id="workers-fp16"),
    ],
)
def test_stop_and_resume_gives_the_same_bits(train: Train, overrides: tuple[str, ...]) -> None:
    whole = train("whole", *overrides)
    train("parts", *overrides, "max_steps=2")
    parts = train("parts", *overrides)
    assert same(state(whole, 4), state(parts, 4))
    assert not same(state(whole, 2)["model"], state(whole, 4)["model"])
    for name in ("best.pt", "model.safetensors"):
        assert (whole / name).exists()
        assert (parts / name).exists()
    assert same(without_provenance(whole / "best.pt"), without_provenance(parts / "best.pt"))


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Send this process a real signal in the middle of a step."""
    call = Stepper.__call__

    def with_signal(self: Stepper, state: TrainState, batch: Sequence[Batch], lr: float) -> bool:
        trained = call(self, state, batch, lr)
        if state.step == step:
            os.kill(os.getpid(), signal.SIGUSR1)
        return trained

    monkeypatch.setattr(Stepper, "__call__", with_signal)


def test_signals_in_the_middle_of_epochs_and_intervals(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs of 11.2 steps, log lines every 5, evaluations every 6 (one stop falls on one): the rows of one run."""
    options = ("epochs=2", "max_steps=13", "batch_size=128", "log_every.steps=5", "evaluate_every.steps=6")
    whole = train("whole", *options, "save_every.steps=100")
    for stop in (1, 4, 6, 9):
        with monkeypatch.context() as patch:
            stop_after(patch, stop)
            with pytest.raises(SystemExit) as left:
                train("parts", *options, "save_every.steps=100")
            assert left.value.code == 75
    parts = train("parts", *options, "save_every.steps=100")
    assert same(state(whole, 13), state(parts, 13))
    assert same(without_provenance(whole / "best.pt"), without_provenance(parts / "best.pt"))
    assert rows(whole) == rows(parts)
    tables = [
        [
            {k: v for k, v in row.items() if k not in VARYING}
            for row in csv.DictReader((run / "metrics.csv").read_text().splitlines())
        ]
        for run in (whole, parts)
    ]
    assert tables[0] == tables[1]


@pytest.mark.parametrize("save", [1, 100])
def test_a_signal_in_the_middle_of_an_evaluation(train: Train, monkeypatch: pytest.MonkeyPatch, save: int) -> None:
    """It ends there, with the step saved; the next start makes it up, and the log is that of one run."""
    options = ("max_steps=4", "evaluate_every.steps=2", f"save_every.steps={save}", "eval_batch_size=100")
    whole = train("whole", *options)
    agreed, asked = PreemptionNotice.agreed, []

    def with_signal(self: PreemptionNotice) -> bool:
        asked.append(True)
        if len(asked) == 5:  # the start, two steps, two of the evaluation's four batches
            os.kill(os.getpid(), signal.SIGTERM)
        return agreed(self)

    with monkeypatch.context() as patch:
        patch.setattr(PreemptionNotice, "agreed", with_signal)
        with pytest.raises(SystemExit) as left:
            train("parts", *options)
    assert left.value.code == 75
    assert len(asked) == 5
    assert state(whole.with_name("parts"), 2)["evaluated"] == 0
    parts = train("parts", *options)
    assert same(state(whole, 4), state(parts, 4))
    assert same(without_provenance(whole / "best.pt"), without_provenance(parts / "best.pt"))
    assert rows(whole) == rows(parts)


def test_a_crash_in_an_evaluation_loses_no_step(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any, **__: Any) -> None:
        raise RuntimeError("crash")

    with monkeypatch.context() as patch:
        patch.setattr("effnet_train.cli.rank.evaluate", crash)
        with pytest.raises(PassingError) as error:
            train("parts")
    assert str(error.value.__cause__) == "crash"
    parts, whole = train("parts"), train("whole")
    assert rows(whole) == rows(parts)
    assert same(state(whole, 4), state(parts, 4))


def test_a_kill_between_an_evaluations_line_and_its_checkpoint(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """No line twice in the log, and none missing."""
    whole = train("whole")
    save, saved = Checkpoints.save, []

    def killed(self: Checkpoints, payload: Any, **options: Any) -> None:
        saved.append(payload["step"])
        if len(saved) == 2:  # the second save of step 2, with the evaluation's scores
            raise KeyboardInterrupt
        save(self, payload, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            train("parts")
    assert saved == [2, 2]
    time.sleep(1.1)  # event files are read in the order of the seconds in their names
    parts = train("parts")
    assert rows(whole) == rows(parts)
    assert events(whole) == events(parts)
    assert same(state(whole, 4), state(parts, 4))
    assert same(without_provenance(whole / "best.pt"), without_provenance(parts / "best.pt"))


def slow_disk(monkeypatch: pytest.MonkeyPatch, fails: Sequence[str] = ()) -> None:
    """Make each write take a while, or fail where it is of one of these names, each once."""
    left, replace = list(fails), os.replace

    def slow(source: str, target: Path) -> None:
        if str(target).endswith(".pt"):
            time.sleep(0.3)
            if Path(target).name in left:
                left.remove(Path(target).name)
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, target)

    monkeypatch.setattr(os, "replace", slow)


def test_who_leaves_has_all_on_the_disk(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow it is: at a signal, in an evaluation whose checkpoint is under way, and at the end."""
    options = ("max_steps=4", "evaluate_every.steps=2", "save_every.steps=1", "eval_batch_size=100")
    whole = train("whole", *options)
    agreed, asked = PreemptionNotice.agreed, []

    def with_signal(self: PreemptionNotice) -> bool:
        asked.append(True)
        if len(asked) in (2, 7):  # the first step; the evaluation after the second
            os.kill(os.getpid(), signal.SIGTERM)
        return agreed(self)

    with monkeypatch.context() as patch:
        slow_disk(patch)
        patch.setattr(PreemptionNotice, "agreed", with_signal)
        for step in (1, 2):
            with pytest.raises(SystemExit) as left:
                train("parts", *options)
            assert left.value.code == 75
            assert Checkpoints(whole.with_name("parts")).steps()[-1] == step
            assert not list(whole.with_name("parts").glob(".*.pt-*"))
        parts = train("parts", *options)
    assert same(state(whole, 4), state(parts, 4))
    assert same(without_provenance(whole / "best.pt"), without_provenance(parts / "best.pt"))
    assert rows(whole) == rows(parts)


def test_who_leaves_in_an_evaluation_saves_what_the_disk_refused_before(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = ("max_steps=4", "evaluate_every.steps=2", "save_every.steps=2", "eval_batch_size=100")
    agreed, asked = PreemptionNotice.agreed, []

    def with_signal(self: PreemptionNotice) -> bool:
        asked.append(True)
        if len(asked) == 5:  # the start, two steps, two of the evaluation's four batches
            os.kill(os.getpid(), signal.SIGTERM)
        return agreed(self)

    with monkeypatch.context() as patch:
        slow_disk(patch, fails=["step_000000002.pt"])
        patch.setattr(PreemptionNotice, "agreed", with_signal)
        with pytest.raises(SystemExit) as left:
            train("parts", *options)
    assert left.value.code == 75
    assert Checkpoints(tmp_path / "parts").steps() == [2]
    assert same(state(train("parts", *options), 4), state(train("whole", *options), 4))


def test_a_best_that_was_not_written_is_not_the_best(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores are compared with what is there; with the first left out, the run's best is the second, as it is alone."""
    options = ("max_steps=4", "evaluate_every.steps=2", "save_every.steps=2")
    with monkeypatch.context() as patch:
        slow_disk(patch, fails=["best.pt"])
        parts = train("parts", *options)
    assert state(parts, 2)["best"] == {}
    best = load_checkpoint(parts / "best.pt")
    assert best["step"] == best["best"]["step"] == state(parts, 4)["best"]["step"] == 4
    assert json.loads((parts / "summary.json").read_text())["best"]["step"] == 4
    assert same(state(train("whole", *options), 4)["model"], state(parts, 4)["model"])


@pytest.mark.parametrize("background", ["true", "false"])
def test_milestones_and_a_copy_elsewhere(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: str
) -> None:
    """A milestone is saved at its own step; on a machine that has nothing, or less, the run goes on from the copy."""
    monkeypatch.setattr("effnet_train.cli.remote_lock._SETTLE_S", 0.0)
    options = ("max_steps=9", "save_every.steps=4", "checkpoint.milestones=[0.03]", "checkpoint.keep=1")
    options = (*options, f"checkpoint.background={background}", f"checkpoint.remote=memory://{tmp_path.name}")
    whole = train("whole", *options)
    names = {"step_000000003.milestone.pt", "step_000000009.pt", "best.pt", "model.safetensors", "summary.json"}
    found = {path.name for path in whole.iterdir()}
    assert names <= found
    assert {name for name in found if name.startswith("step_")} < names
    there = fsspec.filesystem("memory").find(f"/{tmp_path.name}/whole")
    assert {path.rpartition("/whole/")[2].partition("/")[0] for path in there} == found
    for step in (4, 6):
        train("parts", *options, f"max_steps={step}")
        shutil.rmtree(tmp_path / "parts")
    parts = train("parts", *options)
    assert same(state(whole, 9), state(parts, 9))
    assert same(without_provenance(whole / "best.pt"), without_provenance(parts / "best.pt"))
    assert rows(whole) == rows(parts)
    shutil.rmtree(tmp_path / "parts")
    with pytest.raises(ValueError, match=r"model\.dropout was 0\.2, now 0\.3"):
        train("parts", *options, "model.dropout=0.3")
    assert not list((tmp_path / "parts").glob("*.pt"))


def test_a_run_that_goes_on_needs_no_more_what_it_started_from(train: Train) -> None:
    source = train("source")
    start = f"init_from={source}"
    whole = train("whole", start)
    train("parts", start, "max_steps=2")
    shutil.rmtree(source)
    assert same(state(whole, 4), state(train("parts", start), 4))


def test_a_run_keeps_the_precision_it_began_with(train: Train) -> None:
    """Under `auto` too, which on another device would choose another."""
    train("run", "max_steps=2", "precision=auto")
    folder = train("run", "max_steps=2", "precision=auto")
    path = folder / "step_000000002.pt"
    payload = load_checkpoint(path)
    assert payload["meta"]["precision"] == "fp32"
    payload["meta"]["precision"] = "bf16"  # as on a GPU
    torch.save(payload, path)
    train("run", "precision=auto")
    train("other", "max_steps=2", "precision=fp32")
    train("other", "precision=fp32")
    assert state(folder, 4)["meta"]["precision"] == "bf16"
    assert not same(state(folder, 4)["model"], state(folder.with_name("other"), 4)["model"])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # a weight's last digit
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-5000]), id="truncated"),
        pytest.param(flip, id="flipped"),
        pytest.param(Path.unlink, id="deleted"),
    ],
)
def test_without_its_newest_checkpoint_a_run_ends_the_same(
    train: Train, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object]
) -> None:
    """From the one before it, with the logs and the best of a run that nobody disturbed."""
    options = ("max_steps=6", "save_every.steps=2", "evaluate_every.steps=2", "log_every.steps=1")
    whole, parts = train("whole", *options), train("parts", *options, "max_steps=4")
    newest = parts / "step_000000004.pt"
    damage(newest)
    capsys.readouterr()
    train("parts", *options)
    told = capsys.readouterr().err
    assert ("step_000000004.pt is damaged" in told) == (damage is not Path.unlink)
    assert "going on from step 2 of 6" in told
    for step in (4, 6):
        assert same(state(whole, step), state(parts, step))
    assert same(*(without_provenance(folder / "best.pt") for folder in (whole, parts)))
    assert rows(whole) == rows(parts)


def test_all_checkpoints_damaged_is_an_error(train: Train) -> None:
    folder = train("whole")
    for path in folder.glob("*.pt"):
        path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"all 3 checkpoints of .* are damaged"):
        train("whole")


def test_the_best_checkpoint_is_the_last_resort(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    whole = train("whole")
    reference = state(whole, 4)
    for path in whole.glob("step_*.pt"):
        path.write_bytes(b"nothing")
    train("whole")
    assert capsys.readouterr().err.count("trying the one before") == 2
    assert same(reference, state(whole, 4))


def test_a_damaged_best_is_made_anew(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train("run")
    best = folder / "best.pt"
    best.write_bytes(best.read_bytes()[:-5000])
    (folder / "model.safetensors").unlink()
    train("run")
    assert "best.pt is not that of step " in capsys.readouterr().err
    assert load_checkpoint(best)["step"] == 4
    assert (folder / "model.safetensors").exists()


def test_a_folder_of_another_configuration_is_refused(train: Train) -> None:
    folder = train("one")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(ValueError, match=r"model\.dropout was 0\.2, now 0\.3.*name="):
        train("one", "model.dropout=0.3")
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    script = Path(sys.executable).with_name("effnet-train")
    fixed = ("recipe=demo", "device=cpu", "model.width=0.25", "save_every.steps=10", "save_every.epochs=null")
    return subprocess.Popen(
        [str(script), *fixed, "max_steps=40", "run_root=.", *arguments],
        cwd=folder,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[1]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3])  # of two ranks, sums come out the same in any order
def test_killed_and_terminated_for_real(tmp_path: Path, ranks: int) -> None:
    """SIGKILL, then a request to stop, then to the end: the checkpoint of a run that nobody disturbed.

    Schedulers signal the command or its whole process group, data workers and launcher included: one case of each.
    """
    options = (f"ranks={ranks}", "batch_size=48", "loggers=none")
    undisturbed = start(tmp_path, *options, "name=whole")
    _, errors = undisturbed.communicate(timeout=240)
    assert undisturbed.returncode == 0, errors

    killed = start(tmp_path, *options, "name=parts")
    wait_for((tmp_path / "parts" / "step_000000010.pt").exists, killed)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()

    terminated = start(tmp_path, *options, "name=parts")
    wait_for((tmp_path / "parts" / "step_000000020.pt").exists, terminated)
    if ranks == 1:
        terminated.send_signal(signal.SIGTERM)
    else:
        os.killpg(terminated.pid, signal.SIGUSR1)
    _, errors = terminated.communicate(timeout=120)
    assert terminated.returncode == 75, errors
    assert "the same command goes on" in errors

    finished = start(tmp_path, *options, "name=parts")
    _, errors = finished.communicate(timeout=240)
    assert finished.returncode == 0, errors
    assert same(state(tmp_path / "whole", 40), state(tmp_path / "parts", 40))


SLOW = """
import os, time
replace = os.replace
def stuck(source, target):
    if str(target).endswith("step_000000020.pt"):
        time.sleep(600)
    replace(source, target)
os.replace = stuck
"""


@pytest.mark.slow
def test_killed_while_training_is_ahead_of_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the disk stuck, training goes on to its next save; after SIGKILL, the run goes on from the one before."""
    options = ("loggers.tensorboard=null", "log_every.steps=1", "log_every.epochs=null", "batch_size=48")
    undisturbed = start(tmp_path, *options, "name=whole")
    _, errors = undisturbed.communicate(timeout=240)
    assert undisturbed.returncode == 0, errors
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SLOW)
    folder = tmp_path / "parts"
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{tmp_path / 'site'}:{os.environ.get('PYTHONPATH', '')}")
        killed = start(tmp_path, *options, "name=parts")
    log = folder / "metrics.jsonl"
    wait_for(lambda: log.is_file() and log.read_text().count("train/loss") >= 29, killed)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert Checkpoints(folder).steps() == [10]
    assert len(list(folder.glob(".step_000000020.pt-*"))) == 1
    finished = start(tmp_path, *options, "name=parts")
    _, errors = finished.communicate(timeout=240)
    assert finished.returncode == 0, errors
    assert same(state(tmp_path / "whole", 40), state(folder, 40))
    assert same(*(without_provenance(tmp_path / name / "best.pt") for name in ("whole", "parts")))
    assert rows(tmp_path / "whole") == rows(folder)
    assert not list(folder.glob(".*.pt-*"))


def alive(session_id: int) -> list[str]:
    """Return the command lines of the processes of a session."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(folder.name)) == session_id and "Z" not in (folder / "stat").read_text().split()[2]:
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except (ProcessLookupError, FileNotFoundError):
            pass
    return found


@pytest.mark.slow
def test_data_workers_leave_with_a_trainer_that_was_killed(tmp_path: Path) -> None:
    """The one process alone, as the kernel does that has no memory left: nobody tells its workers."""
    process = start(tmp_path, "name=run", "loggers=none", "workers=2", "save_every.steps=2")
    wait_for((tmp_path / "run" / "step_000000002.pt").exists, process)
    assert len(alive(process.pid)) > 2
    process.kill()
    process.communicate()  # ends, as nobody holds its output any more
    deadline = time.monotonic() + 30
    while alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert alive(process.pid) == []


def workers_of(session_id: int) -> list[int]:
    """Return the data workers of a session: children of the fork server."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(folder.name)) == session_id:
                command = (folder / "cmdline").read_text()
                parents[int(folder.name)] = (int((folder / "stat").read_text().rpartition(")")[2].split()[1]), command)
        except (ProcessLookupError, FileNotFoundError):
            pass
    servers = [pid for pid, (_, command) in parents.items() if "forkserver" in command]
    return [pid for pid, (parent, _) in parents.items() if parent in servers]


@pytest.mark.slow
def test_a_data_worker_that_is_killed_ends_the_run_with_a_word(tmp_path: Path) -> None:
    process = start(tmp_path, "name=run", "loggers=none", "workers=2", "save_every.steps=2")
    wait_for((tmp_path / "run" / "step_000000002.pt").exists, process)
    found = workers_of(process.pid)
    assert len(found) == 2
    os.kill(found[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1  # which a start anew may mend
    assert "a data worker has died (DataLoader worker" in errors
    assert "lower workers= or batch_size=" in errors
