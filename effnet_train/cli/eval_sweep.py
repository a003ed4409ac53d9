"""`effnet-eval resolution=[...]`: which test size suits a checkpoint, as a table, a JSON record and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effnet_train.cli.eval import Part
    from effnet_train.engine.scores import Metrics

PICTURES = (".png", ".svg", ".pdf")


def is_sweep(config: Mapping[str, Any], checkpoints: int) -> bool:
    """Say whether one checkpoint is to be scored at several sizes, each in turn."""
    return isinstance(config["resolution"], list) and checkpoints == 1


def sizes_of(config: Mapping[str, Any], checkpoints: int) -> list[int | None]:
    """Return the size asked for of each checkpoint; None: its own. Raises ValueError."""
    size = config["resolution"]
    if not isinstance(size, list):
        return [size] * checkpoints
    if is_sweep(config, checkpoints):
        return [None]
    if len(size) != checkpoints or min(size) < 1:
        raise ValueError(f"resolution={size} must be a size in pixels for each of the {checkpoints} checkpoints")
    return size


def check_sweep(config: Mapping[str, Any], checkpoints: int) -> None:
    """Check what is asked for together with a list of resolutions, or only with one. Raises ValueError."""
    sizes, picture = config["resolution"], config["picture"]
    if not is_sweep(config, checkpoints):
        if picture is not None:
            raise ValueError(
                f"picture={picture} is of one checkpoint's scores at several sizes: give resolution=[224,256,288]"
            )
        return
    if not sizes or len(set(sizes)) < len(sizes) or min(sizes) < 1:
        raise ValueError(f"resolution={sizes} must be different sizes in pixels, as [224,256,288]")
    if config["details"] is not None:
        raise ValueError(f"details={config['details']} are of one resolution=: give the one that the list finds best")
    if picture is not None:
        from effnet_train.analysis.figures import new_figure
        from effnet_train.cli.outputs import check_file

        check_file("picture", Path(picture), PICTURES)
        new_figure(1, 1)  # without matplotlib, say so now


def report_sweep(config: Mapping[str, Any], part: "Part", found: Mapping[int, "Metrics"]) -> dict[str, Any]:
    """Print the scores at each resolution as a table, draw them if asked, and return the record."""
    from effnet_train.engine.adversarial import Attack

    trained_at, attacked = part.preprocess.resolution, Attack(**config["attack"]).record()
    print(f"{part.label} ({part.whose}), {config['split']}, {part.network}")
    if attacked:
        print(attack_line(attacked))
    print("\n".join(sweep_lines(found, trained_at)))
    if config["picture"]:
        from effnet_train.analysis.sweep import sweep_picture

        top1 = {size: metrics.top1 for size, metrics in found.items()}
        sweep_picture(
            top1, trained_at=trained_at, best=best_size(found), title=part.label, output=Path(config["picture"])
        )
    return {
        **{"checkpoint": part.label, "weights": part.which, "step": part.step, "network": part.network},
        **{key: config[key] for key in ("split", "classes", "crops", "flip")},
        **({"attack": attacked} if attacked else {}),
        **sweep_record(found),
    }


def attack_line(attacked: Mapping[str, float]) -> str:
    """Word the attack that scores are under."""
    return "  attacked  " + ", ".join(f"{key} {value:g}" for key, value in attacked.items())


def best_size(found: Mapping[int, "Metrics"]) -> int:
    """Return the size of the highest top-1; of several the smallest, which costs least."""
    return min(found, key=lambda size: (-found[size].top1, size))


def sweep_record(found: Mapping[int, "Metrics"]) -> dict[str, Any]:
    """Return the best size and its scores, and those of all in `sweep`."""
    best = best_size(found)
    rows = [{"resolution": size, **found[size].record()} for size in sorted(found)]
    return {"resolution": best, **found[best].record(), "sweep": rows}


def sweep_lines(found: Mapping[int, "Metrics"], trained_at: int) -> Sequence[str]:
    """Return a table of the scores at each size, the best one and the one of training marked."""
    best, lines = best_size(found), ["  resolution     top-1     top-5      loss   images/s"]
    for size, metrics in sorted(found.items()):
        marks = ["best"] * (size == best) + ["as trained"] * (size == trained_at)
        scores = f"{metrics.top1:9.2%} {metrics.top5:9.2%} {metrics.loss:9.4f} {metrics.images_per_s:10,.0f}"
        lines.append(f"  {size:10d} {scores}   {', '.join(marks)}".rstrip())
    return lines
