"""`effnet-search run`: the parts of a search from the configuration, each training an `effnet-train`."""

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from effnet_train.analysis.latency import measure
from effnet_train.analysis.runs import Run
from effnet_train.cli import build, check, plan, run_folder
from effnet_train.cli.launch import is_remote, quoted, training_command, words_beside
from effnet_train.cli.lock import locked
from effnet_train.cli.scale_search import cost_of
from effnet_train.distributed import Session, resolve_device
from effnet_train.engine.checkpoint import write_bytes
from effnet_train.engine.loggers import tell
from effnet_train.engine.progress import duration
from effnet_train.engine.tensorboard import TensorBoardLogger
from effnet_train.exit_codes import PREEMPTED_EXIT_CODE, USER_ERROR_EXIT_CODE
from effnet_train.search.journal import Entry, Journal
from effnet_train.search.reward import Reward
from effnet_train.search.run import JOURNAL, Limits, Outcome, Search
from effnet_train.search.searchers import Random
from effnet_train.search.space import Space, Stages, same_network
from effnet_train.search.trials import Trial, run_all, stop_signals

# Keys that settle neither what is asked for nor what comes of it: another start may have others.
_FREE = ("trials", "jobs", "attempts", "trial_limit_s", "max_failures", "keep_weights")
_PARTS = ("space", "searcher", "reward", "limits")
# Of the command line's words, those that no training gets: the model's other keys, as model.activation, each one does.
_OWN = (*_FREE, "round", "latency_device", "model", *(f"{key}{all_}" for key in _PARTS for all_ in ("", ".*")))
_HELD = "is being written by"  # a lock's refusal
_CANDIDATES = "candidates"
_WEIGHTS = ("*.pt", "*.safetensors")


def search(cfg: DictConfig) -> None:
    """Plan, or search until there are as many trials as asked for. Raises SystemExit(75) where it was stopped."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        raise ValueError("effnet-search run takes no -m: jobs= trains several candidates at a time, or cluster= does")
    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    check.check_config(config, check.SEARCH_RUN)
    base = str(HydraConfig.get().runtime.choices["model"])
    if "stages" not in config["model"]:
        raise ValueError(f"model={base} has no stages to search for: choose model=mnasnet, or one that builds on it")
    space: Space = instantiate(cfg.space, _convert_="all")
    searcher = instantiate(cfg.searcher, sizes=space.sizes, seed=config["seed"], _convert_="all")
    build.check_batch(cfg, 1)
    folder = Path(config["run_root"]) / str(config["name"])
    reward, limits = Reward(**config["reward"]), Limits(**config["limits"])
    print("\n".join(_plan(config, space, folder)), flush=True)
    length, classes = plan.of_trainings(cfg)
    if config["dry_run"]:
        print(f"cost           {_price(cfg, config, space, length.total_steps * length.batch_size, classes)}")
        return
    if config["latency_device"] == "cuda" and not torch.cuda.is_available():
        raise ValueError("latency_device=cuda, but torch sees no CUDA device here: use latency_device=cpu")
    with locked(folder, Session()), stop_signals() as asked:
        kept = {key: value for key, value in config.items() if key not in _FREE}
        # A run may be made longer; trials of several lengths are no search.
        cut = {} if config["max_steps"] is None else {"max_steps of a trial": config["max_steps"]}
        run_folder.claim(folder, {**kept, "base": base, **cut})
        journal = Journal(folder / JOURNAL)
        watcher = Watcher(folder, config, journal)
        own = Search(
            folder=folder,
            journal=journal,
            space=space,
            searcher=searcher,
            reward=reward,
            limits=limits,
            count=partial(_costs, space=space, config=config, classes=classes),
            name=_namer(space, config["model"]),
            train=Trainings(folder, config, space, base, asked),
            told=watcher.told,
            learnt=watcher.learnt,
            max_failures=config["max_failures"],
        )
        try:
            done = own.run(config["trials"], config["round"])
        finally:
            watcher.close()
    if not done:
        print(f"effnet-search: stopped, all saved in {folder}: the same command goes on", file=sys.stderr)
        raise SystemExit(PREEMPTED_EXIT_CODE)
    print("\n".join(_end(folder, journal, limits)))


def network_file(
    about: str, base: str, space: Space, stages: Sequence[Mapping[str, Any]], values: Mapping[str, Any] | None = None
) -> str:
    """Return the text of a file for `model=`: stages, and what else `base` has otherwise."""
    ends = {"stem_channels": space.stem_channels, "head_channels": space.head_channels}
    rows = [
        f"  - {yaml.safe_dump(dict(stage), default_flow_style=True, sort_keys=False, width=200)}" for stage in stages
    ]
    rest = yaml.safe_dump({**(values or {}), **ends}, sort_keys=False)
    return f"# {about}\ndefaults: [{base}]\nstages:\n{''.join(rows)}{rest}"


def _costs(stages: Stages, *, space: Space, config: Mapping[str, Any], classes: int) -> dict[str, float]:
    """Return what a network costs, by kind; its latency where somebody asks for it."""
    model = _model(stages, space, config)
    counted = cost_of(model, classes)
    costs: dict[str, float] = {"flops": counted.multiply_adds, "params": counted.parameters}
    if config["reward"]["cost"] == "latency_ms" or config["limits"]["latency_ms"] is not None:
        networks = {"": (build.build_model(model, classes), model["resolution"])}
        times = measure(networks, rounds=7, device=config["latency_device"])
        costs["latency_ms"] = 1000 * float(times[""]["median_s"])
    return costs


def _model(stages: Stages, space: Space, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a candidate's model, in the resolution in which the data set's images come, whatever the model's own."""
    ends = {"stem_channels": space.stem_channels, "head_channels": space.head_channels}
    return {**config["model"], **ends, "stages": stages, "resolution": config["data"]["preprocess"]["resolution"]}


def _namer(space: Space, model: Mapping[str, Any]) -> Callable[[Stages], str]:
    """Return `same_network` for candidates that the model's own width and depth scale."""
    width, depth = model.get("width", 1.0), model.get("depth", 1.0)
    return partial(same_network, stem_channels=space.stem_channels, width=width, depth=depth)


def _price(cfg: DictConfig, config: Mapping[str, Any], space: Space, images: int, classes: int) -> str:
    """Word what trainings of so many `images` cost, by the step of a network of middling cost on this device."""
    drawn = [_model(space.decode(tokens), space, config) for tokens in Random(sizes=space.sizes).ask(9)]
    middling = sorted(drawn, key=lambda model: cost_of(model, classes).multiply_adds)[4]
    session = Session(device=torch.device(resolve_device(cfg.device)))
    precision = build.resolve_precision(cfg.precision, session.device)
    own = OmegaConf.merge(cfg, {"model": middling})
    assert isinstance(own, DictConfig)
    micro = cfg.batch_size // build.resolve_accumulate(own, 1, session.device, classes, precision)
    rate, timed = plan.images_per_s(own, classes, precision, session, micro)
    total = config["trials"] * images
    return (
        f"{total:,.3g} images if each trial is trained: about {plan.duration(total / rate / 3600)} of one such device, "
        f"without waiting for data ({timed}, of a network of middling cost: {rate:,.1f} images/s)"
    )


def _plan(config: Mapping[str, Any], space: Space, folder: Path) -> list[str]:
    reward, limits = config["reward"], {key: value for key, value in config["limits"].items() if value is not None}
    way = f"({reward['cost']} / {reward['target']:,.6g})"
    power = (
        f"{way} ** {reward['alpha']:g}"
        if reward["alpha"] == reward["beta"]
        else f"{way} ** {reward['alpha']:g} within and ** {reward['beta']:g} beyond"
    )
    cut = "" if config["max_steps"] is None else f", cut short after {config['max_steps']:,} steps"
    return [
        f"space          {space.count:,.4g} candidates of {len(space.sizes)} tokens",
        *(f"  {line}" for line in space.describe()),
        f"searcher       {config['searcher']['_target_'].rpartition('.')[2]}, {config['round']} candidates a round",
        f"reward         top-1 * {power}",
        f"limits         {', '.join(f'{key} {value:,.6g}' for key, value in limits.items()) or 'none'}",
        f"trials         {config['trials']:,}, each of {config['epochs']:g} epochs{cut}",
        f"folder         {folder}",
    ]


def _end(folder: Path, journal: Journal, limits: Limits) -> list[str]:
    entries = list(journal.entries.values())
    counts = {status: sum(e.status == status and e.same_as is None for e in entries) for status in ("over", "failed")}
    trained = sum(e.status == "trained" and e.same_as is None for e in entries)
    same = sum(entry.same_as is not None for entry in entries)
    words = [f"{trained} trained", f"{same} the same as others", f"{counts['over']} over a limit"]
    words += [f"{counts['failed']} failed, see {folder / JOURNAL}"] if counts["failed"] else []
    lines = [f"done: {len(entries)} trials: {', '.join(words)}"]
    best = journal.best()
    if best is None:
        raise ValueError(f"none of {len(entries)} candidates was trained, see {journal.path}{_least(entries, limits)}")
    return [
        *lines,
        f"best: trial {best.number}, {_words(best)}",
        f"effnet-search report search={folder}",
        f"effnet-search export best search={folder} output=nets/model/mine.yaml",
    ]


def _least(entries: Sequence[Entry], limits: Limits) -> str:
    """Word how far candidates that are all above limits are from them."""
    over = [entry.costs for entry in entries if entry.status == "over"]
    given = {kind: value for kind, value in asdict(limits).items() if over and value is not None}
    words = [
        f"limits.{kind}={value:,.6g}, the least was {min(c[kind] for c in over):,.6g}" for kind, value in given.items()
    ]
    return f": {'; '.join(words)}. Give name= and higher ones, or another space" if words else ""


def _words(entry: Entry) -> str:
    if entry.top1 is None or entry.reward is None:
        return f"{'FAILED' if entry.status == 'failed' else 'not trained'}: {entry.reason}"
    latency = f", {entry.costs['latency_ms']:.3g} ms" if "latency_ms" in entry.costs else ""
    costs = (
        f"{entry.costs['flops'] / 1e6:,.3g} M multiply-adds, {entry.costs['params'] / 1e6:,.3g} M parameters{latency}"
    )
    return f"reward {entry.reward:.4f}, top-1 {entry.top1:.2%}, {costs}"


class Trainings:
    """Train networks in processes of their own, as the command line's words say, a few at a time.

    `asked` grows where this process is asked to stop: then they save and leave, and what has not ended has no outcome.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], space: Space, base: str, asked: Sequence[int]) -> None:
        self._folder, self._config, self._space, self._base, self._asked = folder, config, space, base, asked
        self._places = _places(config["jobs"], config["device"])

    def __call__(self, networks: Mapping[int, Stages], ended: Callable[[int, Outcome], None]) -> None:
        """Train the networks that have no result yet, and tell each that has ended."""
        trials = {str(number): self._trial(number, stages) for number, stages in networks.items()}
        for name, trial in list(trials.items()):
            run = trial.result()
            # Of another network where somebody removed the journal: the training then refuses the folder, saying so.
            if run is not None and run.config["model"].get("stages") == list(map(dict, networks[int(name)])):
                del trials[name]
                ended(int(name), self._outcome(run, None))
        jobs = len(self._places) if self._places else max(1, len(trials))
        for attempt in range(1, self._config["attempts"] + 1):
            again = self._attempt(trials, jobs, ended, last=attempt == self._config["attempts"])
            trials = {name: trials[name] for name in again}

    def _attempt(
        self, trials: Mapping[str, Trial], jobs: int, ended: Callable[[int, Outcome], None], *, last: bool
    ) -> list[str]:
        """Start each trial, tell those that have an outcome, and return the others."""
        free, held, since, again = deque(self._places), dict[str, str | None](), dict[str, float](), list[str]()
        limit_s = self._config["trial_limit_s"]

        def begin(name: str) -> Any:
            since[name] = time.monotonic()
            held[name] = free.popleft() if free else None
            return trials[name].start({} if held[name] is None else {"CUDA_VISIBLE_DEVICES": str(held[name])})

        def left(name: str, status: int) -> None:
            free.append(held[name])
            seconds = time.monotonic() - since[name]
            run = trials[name].result()
            if run is not None:
                ended(int(name), self._outcome(run, seconds))
            elif self._asked:
                return
            elif _HELD in (reason := trials[name].reason(status)):  # a job of a start before: neither one's failure
                print(f"effnet-search: trial {name} has no outcome yet: {reason}", file=sys.stderr)
            elif limit_s is not None and seconds > limit_s:
                ended(int(name), Outcome(None, f"it took longer than trial_limit_s={limit_s:g}", seconds))
            elif last or status in (0, USER_ERROR_EXIT_CODE):
                ended(int(name), Outcome(None, reason, seconds))
            else:
                again.append(name)

        starts = {name: partial(begin, name) for name in trials}
        run_all(starts, jobs=jobs, asked=self._asked, ended=left, limit_s=limit_s)
        return again

    def _trial(self, number: int, stages: Stages) -> Trial:
        name = f"trial{number:05d}"
        files = (self._folder / _CANDIDATES).absolute()
        (files / "model").mkdir(parents=True, exist_ok=True)
        text = network_file(f"Trial {number}.", self._base, self._space, stages)
        write_bytes(files / "model" / f"{name}.yaml", text.encode())
        own = [f"model={name}", f"hydra.searchpath=[{quoted(f'file://{files}')}]"]
        words = words_beside(own, _OWN, self._folder / name, ("recipe", "loggers"))
        return Trial(name, self._folder / name, training_command(words), self._config["max_steps"])

    def _outcome(self, run: Run, seconds: float | None) -> Outcome:
        """Return the score of the images that selected the weights: held-out ones, where some are."""
        best = json.loads((run.folder / "summary.json").read_text(encoding="utf-8"))["best"]
        if not self._config["keep_weights"]:
            for file in (file for pattern in _WEIGHTS for file in run.folder.glob(pattern)):
                file.unlink(missing_ok=True)
        prefix = str(run.config["select_by"]).rpartition("/")[0]
        return Outcome(float(best[f"{prefix}/top1"]), None, seconds)


def _places(jobs: int | str, device: str) -> list[str | None]:
    """Return for each training at a time the GPUs that it sees, None for all; none at all where a cluster has them."""
    if is_remote():
        return [None] * jobs if isinstance(jobs, int) else []
    gpus = _gpus() if device in ("auto", "cuda") else []
    wanted = jobs if isinstance(jobs, int) else max(1, len(gpus))
    if wanted == 1 or not gpus:
        return [None] * wanted
    return [",".join(gpus[i % len(gpus) :: max(1, min(wanted, len(gpus)))]) for i in range(wanted)]


def _gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return visible.split(",")[:count] if visible else [str(i) for i in range(count)]


class Watcher:
    """Tell on the terminal and to TensorBoard where a search stands."""

    def __init__(self, folder: Path, config: Mapping[str, Any], journal: Journal) -> None:
        self._best = journal.best()
        self._entries, self._trials = len(journal.entries), config["trials"]
        self._before, self._since = self._entries, time.monotonic()
        self._board = TensorBoardLogger()
        tell(
            [self._board], lambda board: board.open(folder, step=self._entries, evaluated=self._entries, config=config)
        )
        if self._entries:
            print(f"going on: {self._entries} of {self._trials} trials are done", flush=True)

    def told(self, entry: Entry) -> None:
        """Print a line for a trial, and add to its curves."""
        self._entries += 1
        former = -1.0 if self._best is None else (self._best.reward or 0.0)
        if entry.status == "trained" and (entry.reward or 0.0) > former:
            self._best = entry
        left = (time.monotonic() - self._since) / (self._entries - self._before) * (self._trials - self._entries)
        best = f"; best {self._best.reward:.4f} (trial {self._best.number})" if self._best else ""
        same = f" (the same network as trial {entry.same_as})" if entry.same_as is not None else ""
        line = f"{self._entries} of {self._trials}: trial {entry.number}{same}: {_words(entry)}{best}"
        print(f"{line}; left {duration(left)}", flush=True)
        values: dict[str, float | None] = {
            "trial/top1": entry.top1,
            "trial/reward": entry.reward,
            "search/best_reward": self._best.reward if self._best else None,
        }
        values |= {f"trial/{kind}": cost for kind, cost in entry.costs.items()}
        self._scalars({key: value for key, value in values.items() if value is not None})

    def learnt(self, values: Mapping[str, float]) -> None:
        """Add to the searcher's curves."""
        self._scalars({f"searcher/{key}": value for key, value in values.items()})

    def close(self) -> None:
        """Close the curves."""
        tell([self._board], lambda board: board.close())

    def _scalars(self, values: Mapping[str, float]) -> None:
        tell([self._board], lambda board: board.scalars(self._entries, values, epoch=0.0))
