"""What all commands share: Hydra's entry, and errors that say what to do."""

import difflib
import errno
import itertools
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from effnet_train.exit_codes import INTERRUPTED_EXIT_CODE, PASSING_EXIT_CODE, USER_ERROR_EXIT_CODE

_PACKAGE = Path(__file__).parent.parent
# In the wheel the configs lie inside the package, in a checkout beside it.
CONFIG_DIR = next(path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir())

# Folders of configs/ that are no choices of a run: Hydra's own, and the paper's numbers.
_NO_GROUPS = ("hydra", "tables")


class PassingError(Exception):
    """Its cause, which is of the machines and not of what was asked for: a start anew may help."""


# What else a word with a = may be, by command.
_NO_KEY = {"predict": " (an image whose name holds a = comes after --)"}


def command(config: str, task: Callable[[DictConfig], None]) -> Callable[[], None]:
    """Return the entry point of the command whose root file is `configs/<config>.yaml`.

    It raises SystemExit, with status 2 and a message on standard error, for everything that a user can mend.
    """

    def main() -> None:
        _check_unfolded(sys.argv[1:])
        # With this set Hydra raises its errors instead of printing them: we print them, with the closest names.
        traceback_wanted = os.environ.setdefault("HYDRA_FULL_ERROR", "0") == "1"
        os.environ["HYDRA_FULL_ERROR"] = "1"

        def guarded(cfg: DictConfig) -> None:
            os.environ["HYDRA_FULL_ERROR"] = str(int(traceback_wanted))  # for the ranks that the task starts
            try:
                with _told(config, traceback_wanted or HydraConfig.get().mode == RunMode.MULTIRUN):
                    task(cfg)
            finally:
                os.environ["HYDRA_FULL_ERROR"] = "1"

        # Once more around Hydra: for its own errors, and for those of a sweep, whose other runs have gone on.
        try:
            with _told(config, traceback_wanted):
                hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=config)(guarded)()
        except KeyboardInterrupt:  # before there was anything to save, or a second time
            raise SystemExit(INTERRUPTED_EXIT_CODE) from None

    return main


def first_word(program: str, kind: str, about: str, choices: Mapping[str, str]) -> str:
    """Take away the command line's first word, which names one of `choices`, and return it; the rest is Hydra's.

    `choices` are a line about each by name. Without a choice they are told: raises SystemExit, with status 0 where
    help was asked for, else 2.
    """
    words = sys.argv[1:]
    if words and words[0] in choices:
        return sys.argv.pop(1)
    if words and words[0] not in ("-h", "--help"):
        print(f"{program}: error: {words[0]} is no {kind}: give one of {', '.join(choices)} first", file=sys.stderr)
        raise SystemExit(USER_ERROR_EXIT_CODE)
    width = max(map(len, choices)) + 1
    lines = [f"  {program} {name:{width}} {line}" for name, line in choices.items()]
    usage = f"{program} {kind.upper()} [key=value ...]: {about}."
    print("\n".join([usage, "", *lines, "", f"{kind.upper()} --help tells more."]))
    raise SystemExit(0 if words else USER_ERROR_EXIT_CODE)


def check_places(program: str, name: str, words: Sequence[str], configs: Mapping[str, str]) -> None:
    """Refuse a word whose key the command `name` hasn't, but one of its siblings: `configs` are their root files."""
    keys = {config: set(yaml.safe_load((CONFIG_DIR / f"{config}.yaml").read_text())) for config in configs.values()}
    for word in words:
        key, equals, _ = word.partition("=")
        others = [other for other, config in configs.items() if key in keys[config]]
        if equals and others and name not in others:
            fail(f"{key} is not a key of {program} {name}, but of {', '.join(others)}")


def jobs(program: str, config: str, about: str, tasks: Mapping[str, Callable[[DictConfig], None]]) -> None:
    """Run the job that the first word names, by `configs/<config>_<job>.yaml`; a task's docstring says what it does."""
    name = first_word(program, "job", about, {job: (task.__doc__ or "").splitlines()[0] for job, task in tasks.items()})
    command(f"{config}_{name}", tasks[name])()


def _check_unfolded(words: Sequence[str]) -> None:
    """Refuse names of shards that a shell has made of braces without quotes: only the last would be read."""
    for one, other in itertools.pairwise(words):
        key = one.partition("=")[0]
        if key in ("data.train", "data.val") and other.startswith(f"{key}=") and one != other:
            fail(
                f"{one} {other}: {key} is given twice. Where the shell has made it so of braces, quote them twice: "
                f"\"{key}='train-{{0000..0146}}.tar'\""
            )


@contextmanager
def _told(config: str, traceback_wanted: bool) -> Iterator[None]:
    """Turn the errors that a user can mend into a message and SystemExit."""
    try:
        yield
    except Exception as error:
        text = None if traceback_wanted else user_message(error, config)
        if text is None:
            raise
        fail(text, error)


def run_rank(config: str, function: Callable[..., None], *args: Any) -> None:
    """Run `function(*args)` as a rank that the elastic launcher started, its errors told as `command` tells them."""
    try:
        function(*args)
    except KeyboardInterrupt:  # the launcher takes a rank that leaves by it for one that has ended well
        raise SystemExit(INTERRUPTED_EXIT_CODE) from None
    except Exception as error:
        text = None if os.environ.get("HYDRA_FULL_ERROR") == "1" else user_message(error, config)
        if text is not None:
            fail(text, error)
        traceback.print_exc()
        raise SystemExit(1) from error


def fail(text: str, error: Exception | None = None) -> None:
    """Print `text` as this command's error, which is `error`'s, and leave."""
    from effnet_train.data.remote import RemoteError

    rank = f"[rank {os.environ['RANK']}] " if os.environ.get("RANK", "0") != "0" else ""
    print(f"{Path(sys.argv[0]).name}: {rank}error: {text}", file=sys.stderr, flush=True)
    passing = isinstance(error, PassingError | RemoteError) or (error and _of_another_rank(error) is not None)
    raise SystemExit(PASSING_EXIT_CODE if passing else USER_ERROR_EXIT_CODE)


def user_message(error: BaseException, config: str) -> str | None:
    """Return what to tell a user of `error`, or None where it is our own mistake and wants a traceback."""
    if isinstance(error, PassingError):
        assert error.__cause__ is not None
        return user_message(error.__cause__, config)
    if isinstance(error, MissingConfigException):
        return _closest_option(error)
    if isinstance(error, ConfigCompositionException):
        return _closest_key(str(error), str(error.__cause__), config)
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no value: give {error.full_key}=... on the command line"
    if isinstance(error, InstantiationException):
        return _instantiation(error)
    if isinstance(error, OverrideParseException):
        return _no_override(error, config)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return str(error).strip()
    if str(error).startswith("Config group override must"):
        return f"{error}: give group=option, where the groups are {', '.join(_groups())}"
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
        return (
            f"out of memory ({str(error).splitlines()[0]}). Raise accumulate= (same recipe, smaller pieces), set "
            "model.checkpointing=true or precision=bf16, or lower batch_size= (the learning rate follows it)"
        )
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
        return (
            f"a data worker has died ({str(error).splitlines()[0]}): for want of memory, lower workers= or batch_size="
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"{error}: make room there; what was saved is intact, and the same command goes on from it"
    if isinstance(error, PermissionError) and error.filename:
        return _denied(error)
    if isinstance(error, ValueError | OSError | ImportError | FloatingPointError):
        # What a data worker raised comes with the worker's traceback before it.
        return re.split(rf"\n[\w.]*{type(error).__name__}: ", str(error))[-1].rstrip()
    return _of_another_rank(error)


def _of_another_rank(error: BaseException) -> str | None:
    """Return what to say of an error that is but the trace of another rank's."""
    if not isinstance(error, RuntimeError):
        return None
    if re.search("onnection (closed|reset) by peer|remote process exited|socket closed", str(error), re.IGNORECASE):
        return "another rank has left: its own message says why, or its launcher's where it was killed"
    if re.search("timed? ?out", str(error), re.IGNORECASE):
        return (
            f"another rank has not answered for too long (timeout_s=): it hangs, or the network to it is cut ({error})"
        )
    return None


def _denied(error: PermissionError) -> str:
    return f"{error.filename}: access denied ({error.strerror}): let this user in, or choose another place"


def _instantiation(error: InstantiationException) -> str | None:
    cause = error.__cause__
    where = re.search(r"full_key: (\S+)", str(error))
    key = f" (in {where[1]})" if where and f"{where[1]}." not in str(cause) else ""
    if isinstance(cause, PermissionError) and cause.filename:
        return f"{_denied(cause)}{key}"
    if isinstance(cause, TypeError | ValueError | OSError | ImportError):
        return f"{cause}{key}"
    return None if cause is not None else str(error).strip()


def _no_override(error: OverrideParseException, config: str) -> str:
    word = error.override
    key, equals, value = word.partition("=")
    if equals:
        quotes = f"put two pairs of quotes around the value, {key}=\"'{value}'\""
        return f"{word} cannot be read as key=value: {quotes}{_NO_KEY.get(config, '')}"
    hint = (
        f": did you mean checkpoint={word}?"
        if config in ("eval", "export", "label", "predict")
        else ": give key=value or group=option, see --help"
    )
    return f"{word} is not of the form key=value{hint}"


def _closest_option(error: MissingConfigException) -> str:
    missing, options = error.missing_cfg_file or "", list(error.options or [])
    if missing.endswith("submitit_slurm"):
        return "cluster=slurm needs the extra slurm: pip install 'effnet-train[slurm]'"
    group, _, choice = missing.rpartition("/")
    close = difflib.get_close_matches(choice, options, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(f'{group}={name}' for name in close)}? " if close else ""
    return f"{group}={choice} is not known: {hint}The choices are {', '.join(options)}"


def _closest_key(text: str, cause: str, config: str) -> str:
    found = re.search(r"Could not override '([^']+)'", text)
    if not found:
        return text.strip()
    # Of a value that holds keys, the cause tells which is wrong.
    inner = re.search(r"is not in struct\s+full_key: (\S+)", cause)
    key = (inner[1] if inner and inner[1].startswith(f"{found[1]}.") else found[1]).split("@")[0]
    names = _known_keys(config)
    if key in names:
        return f"{key} is not a key of this configuration: one of the groups chosen has none, see --cfg job"
    close = difflib.get_close_matches(key, names, n=3, cutoff=0.6)
    if not close:  # a right leaf in a wrong place
        leaf = key.rpartition(".")[2]
        close = [name for name in names if name.rpartition(".")[2].startswith(leaf)][:3]
    hint = f"did you mean {' or '.join(close)}?" if close else "--cfg job prints all keys"
    return f"{key} is not a key of the configuration: {hint}{_NO_KEY.get(config, '')}"


def _known_keys(config: str) -> list[str]:
    """Return the groups and the dotted keys of a command's default configuration."""
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        composed = hydra.compose(config, return_hydra_config=True)
    groups = {choice.partition("@")[0] for choice in composed.hydra.runtime.choices}
    keys: Any = OmegaConf.to_container(composed, resolve=False)
    del keys["hydra"]
    return [group for group in _groups() if group in groups] + list(_flatten(keys))


def _groups() -> list[str]:
    return sorted(path.name for path in CONFIG_DIR.iterdir() if path.is_dir() and path.name not in _NO_GROUPS)


def _flatten(node: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(node, dict) or not node:
        return {prefix: node}
    flat: dict[str, object] = {}
    for key, value in node.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def differing_keys(one: object, other: object) -> dict[str, tuple[object, object]]:
    """Return the dotted keys in which two plain configurations differ, with both values (None: absent)."""
    left, right = _flatten(one), _flatten(other)
    return {
        key: (left.get(key), right.get(key))
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key)
    }
