"""`effnet-scale JOB ...`: compound scaling of any network. The first word says what to do, the rest is Hydra's."""

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from effnet_train.cli.app import jobs
from effnet_train.cli.model_file import checked_output, write

_TARGETS = ("phi", "flops", "params", "latency_ms")


def main() -> None:
    """Run the job that the first word names."""
    jobs("effnet-scale", "scale", "compound scaling of any network", JOBS)


def search(cfg: DictConfig) -> None:
    """Train a grid of coefficients on the budget, and rank them."""
    from effnet_train.cli.scale_search import search as run

    run(cfg)


def apply(cfg: DictConfig) -> None:
    """Print and write the network of a phi, or of a budget."""
    from effnet_train.cli import check
    from effnet_train.cli.scale_search import cost_of
    from effnet_train.models.scaling import compound
    from effnet_train.search.coefficients import PUBLISHED_PHI, Coefficients, scaled

    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    check.check_config(config, check.SCALE_APPLY)
    target = _target(config)
    base, choice = config["model"], str(HydraConfig.get().runtime.choices["model"])
    coefficients = Coefficients(config["alpha"], config["beta"], config["gamma"])
    compound(0, coefficients.alpha, coefficients.beta, coefficients.gamma)  # refuses them in one place
    file = checked_output(config["output"])
    phi = config["phi"] if target == "phi" else _solve(config, coefficients, target)
    dimensions = scaled(base, coefficients, phi, multiple=config["multiple"])
    here, there = (cost_of(base | part, config["num_classes"]) for part in (dimensions, {}))
    rows = [
        (
            "base",
            f"{choice}: {_words(base)}, {_costs(there)}",
        ),
        ("law", f"{coefficients}: alpha * beta^2 * gamma^2 = {coefficients.product:.4g}"),
        ("phi", f"{phi:.4g}: {_factors(coefficients, phi, base['resolution'])}"),
        ("network", _words(dimensions)),
        ("parameters", f"{here.parameters:,}"),
        (
            "multiply-adds",
            f"{_large(here.multiply_adds)}, {here.multiply_adds / there.multiply_adds:.3g} times the base's; "
            f"the law says {coefficients.product**phi:.3g}",
        ),
    ]
    if target == "latency_ms":
        measured, asked = _latency_ms(base | dimensions, config["num_classes"]), config[target]
        off = f"; {measured / asked - 1:.1%} above the {asked:g} asked for" if measured > asked else ""
        rows.append(("latency", f"{measured:.3g} ms measured here{off}"))
        if off:
            # Measured once more: clocks are noisy, and machines have other things to do.
            print(f"warning: latency_ms={asked:g} is not kept, see below: give less to stay below it", file=sys.stderr)
    if choice == "b0" and coefficients == Coefficients():
        rows += [("published", _published(name)) for name, at in PUBLISHED_PHI.items() if abs(at - phi) < 1e-9]
    print("\n".join(f"{name:<14} {text}" for name, text in rows))
    overrides = {key: base[key] for key in _overridden_keys() if key not in dimensions}
    written = yaml.safe_dump(dimensions | overrides, sort_keys=False)
    comment = f"# {choice} scaled by {coefficients}, phi {phi:.6g} (effnet-scale apply).\n"
    text = f"{comment}defaults: [{choice}]\n{written}"
    if file is None:
        print(f"\n{text}", end="")
    else:
        write(file, text)


def _target(config: Mapping[str, Any]) -> str:
    given = [key for key in _TARGETS if config[key] is not None]
    if len(given) != 1:
        told = " and ".join(f"{key}={config[key]}" for key in given) or "none of them"
        raise ValueError(f"{told}: give one of {', '.join(f'{key}=' for key in _TARGETS)}")
    if given[0] != "phi" and config[given[0]] <= 0:
        raise ValueError(f"{given[0]}={config[given[0]]} must be above 0")
    return given[0]


def _solve(config: Mapping[str, Any], coefficients: Any, target: str) -> float:
    """Return the largest phi within the budget. Raises ValueError naming its key."""
    from effnet_train.cli.scale_search import cost_of
    from effnet_train.search.coefficients import TooLargeError, largest_phi, scaled

    known: dict[str, float] = {}

    def cost(phi: float) -> float:
        try:
            dimensions = scaled(config["model"], coefficients, phi, multiple=config["multiple"])
        except TooLargeError:
            return math.inf
        key = str(dimensions)
        if key not in known:
            model = config["model"] | dimensions
            if target == "latency_ms":
                known[key] = _latency_ms(model, config["num_classes"])
            else:
                counted = cost_of(model, config["num_classes"])
                known[key] = counted.multiply_adds if target == "flops" else counted.parameters
        return known[key]

    try:
        # Nobody can tell a hundredth of phi from the noise of a clock.
        precision = 0.05 if target == "latency_ms" else 1e-3
        return largest_phi(cost, config[target], growth=coefficients.product, precision=precision)
    except ValueError as error:
        raise ValueError(f"{target}={config[target]:g}: {error}") from None


def _latency_ms(model: Mapping[str, Any], classes: int) -> float:
    from effnet_train.analysis.latency import measure
    from effnet_train.cli.build import build_model

    times = measure({"": (build_model(model, classes), model["resolution"])}, rounds=7)
    return 1000 * float(times[""]["median_s"])


def _published(name: str) -> str:
    from effnet_train.cli.build import model_variants
    from effnet_train.cli.scale_search import cost_of

    variant = model_variants()[name]
    cost = cost_of(variant, 1000)
    return f"model={name}: {_words(variant)}, {_costs(cost)}"


def _words(dimensions: Mapping[str, Any]) -> str:
    return "depth {depth:g}, width {width:g}, {resolution} pixels".format(**dimensions)


def _factors(coefficients: Any, phi: float, resolution: int) -> str:
    from effnet_train.models.scaling import compound

    depth, width, size = compound(phi, coefficients.alpha, coefficients.beta, coefficients.gamma)
    return f"depth x {depth:.4g}, width x {width:.4g}, resolution x {size:.4g} ({resolution * size:.1f} pixels)"


def _costs(cost: Any) -> str:
    return f"{cost.parameters:,} parameters, {_large(cost.multiply_adds)} multiply-adds"


def _large(number: int) -> str:
    return f"{number / 1e9:.4g} billion" if number >= 1e8 else f"{number / 1e6:.4g} million"


def _overridden_keys() -> list[str]:
    """Return the model's keys that the command line set."""
    words = [text.lstrip("+") for text in HydraConfig.get().overrides.task]
    return [text.partition("=")[0].removeprefix("model.") for text in words if text.startswith("model.")]


JOBS: Mapping[str, Callable[[DictConfig], None]] = {"search": search, "apply": apply}

if __name__ == "__main__":
    main()
